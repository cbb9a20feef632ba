"""The pages on the lecture notes: what they name exists, what they run prints what they say, and both say the same.

After a change, `python tests/test_lecture_notes.py` runs the English page and writes what it prints into both pages.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import math
import re
import runpy
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from typer.testing import CliRunner

from unrolled.cli import app
from unrolled.config import flat_keys, resolve
from unrolled.model import form_of

ROOT = Path(__file__).parents[1]
ENGLISH, KOREAN = "docs/lecture-notes.md", "docs/lecture-notes.ko.md"
AGAIN = "run: python tests/test_lecture_notes.py, and read what it changed"
HELLO = "python examples/hello.py\n"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

both_pages = pytest.mark.parametrize("page", [ENGLISH, KOREAN])


class Block(NamedTuple):
    language: str
    body: str
    start: int
    """Where the body begins in the page."""


def read(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


def blocks(text: str) -> list[Block]:
    return [Block(match[1], match[2], match.start(2)) for match in FENCE.finditer(text)]


def runs(text: str) -> list[tuple[Block, Block]]:
    """Each block that is run, with the text block that follows, which is what it prints."""
    found = blocks(text)
    return [
        (a, b)
        for a, b in zip(found, [*found[1:], Block("", "", 0)], strict=True)
        if a.language == "python" or a.body == HELLO
        if b.language == "text"
    ]


def printed(text: str) -> Iterator[str]:
    """What the blocks of a page print, run one after the other in one namespace."""
    names: dict[str, Any] = {"__name__": "lecture_notes"}
    for block, _ in runs(text):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            if block.language == "python":
                line = text.count("\n", 0, block.start)
                exec(compile("\n" * line + block.body, ENGLISH, "exec"), names)
            else:
                runpy.run_path(str(ROOT / "examples" / "hello.py"))["main"]()
        yield said.getvalue()


NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")


def differ(actual: str, expected: str) -> bool:
    """Whether two outputs are not the same. Whole numbers must be equal; one with decimals may be off by two units of
    its last place, since other instruction sets round otherwise."""
    if NUMBER.sub("#", actual).split() != NUMBER.sub("#", expected).split():
        return True
    for a, b in zip(NUMBER.findall(actual), NUMBER.findall(expected), strict=True):
        places = len(b.partition(".")[2])
        if not math.isclose(float(a), float(b), rel_tol=0, abs_tol=2.01 * 10.0**-places if places else 0):
            return True
    return False


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


@pytest.mark.usefixtures("one_thread")
def test_the_page_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    text = read(ENGLISH)
    assert len(runs(text)) > 10
    for (block, expected), actual in zip(runs(text), printed(text), strict=True):
        where = f"{ENGLISH}:{text.count(chr(10), 0, block.start) + 1}"
        assert not differ(actual, expected.body), f"{where} prints\n{actual}\nand says\n{expected.body}\n{AGAIN}"


def test_outputs_are_compared() -> None:
    assert not differ("loss 1.393, 3 steps\n", "loss 1.394,  3 steps\n")
    assert differ("loss 1.393, 3 steps\n", "loss 1.396, 3 steps\n")
    assert differ("loss 1.393, 3 steps\n", "loss 1.393, 4 steps\n")
    assert differ("loss 1.393\n", "cost 1.393\n")
    assert differ("loss 1.393\n", "loss 1.393 2\n")


def test_every_block_of_python_says_what_it_prints() -> None:
    text = read(ENGLISH)
    assert len([b for b in blocks(text) if b.language == "python"]) == len(runs(text)) - 1
    assert sum(a.body == HELLO for a, _ in runs(text)) == 1


def test_both_pages_run_and_print_the_same() -> None:
    """Comments are translated, code is not."""

    def code(page: str) -> list[tuple[str, str]]:
        return [
            (b.language, ast.dump(ast.parse(b.body)) if b.language == "python" else b.body) for b in blocks(read(page))
        ]

    assert code(KOREAN) == code(ENGLISH)


STATEMENT = re.compile(r"^\*\*(\d\.\d+) ", re.MULTILINE)


@both_pages
def test_statements_are_numbered_in_order(page: str) -> None:
    found = STATEMENT.findall(read(page))
    first = [number for number in found if number.startswith("1.")]
    second = [number for number in found if number.startswith("2.")]
    assert first == [f"1.{i + 1}" for i in range(len(first))]
    assert second == [f"2.{i + 1}" for i in range(len(second))]
    assert found == first + second
    assert (len(first), len(second)) == (32, 29)


def test_both_pages_name_the_same() -> None:
    """Tests, files, settings, names of the program; and under the same statement."""

    def named(page: str) -> dict[str, list[str]]:
        pieces = STATEMENT.split(FENCE.sub("", read(page)))
        return {
            number: sorted(set(re.findall(r"`([^`\n]+)`", piece)))
            for number, piece in zip(["0", *pieces[1::2]], pieces[::2], strict=True)
        }

    assert named(KOREAN) == named(ENGLISH)


# ------------------------------------------------------------------------------------------ what is named exists


def code_of(page: str) -> list[str]:
    """What stands in backquotes in the page's prose."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", read(page)))


@both_pages
def test_tests_exist(page: str) -> None:
    ids = [code for code in code_of(page) if "::" in code]
    assert len(set(ids)) > 40
    for code in ids:
        file, name = code.split("::")
        assert name in re.findall(r"^def (\w+)", read(file), re.MULTILINE), code


@both_pages
def test_files_and_links_exist(page: str) -> None:
    files = [code for code in code_of(page) if re.fullmatch(r"[\w./-]+/[\w.-]+\.\w+", code)]
    assert len(files) > 3
    for file in files:
        assert (ROOT / file).is_file(), file
    links = re.findall(r"\]\(([^)]+)\)", FENCE.sub("", read(page)))
    assert links
    for link in links:
        assert ((ROOT / page).parent / link).is_file(), link


@both_pages
def test_settings_and_flags_exist(page: str) -> None:
    codes = code_of(page)
    keys = set(flat_keys())
    sections = {key.split(".")[0] for key in keys}
    settings = {match for code in codes for match in re.findall(r"\b\w+\.\w+", code) if match.split(".")[0] in sections}
    assert settings
    assert not settings - keys
    flags = {flag for code in codes for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", code)}
    assert "--attention" in flags
    assert not flags - flags_of_the_commands()


def flags_of_the_commands() -> set[str]:
    import typer

    group: Any = typer.main.get_command(app)
    return {flag for command in group.commands.values() for option in command.params for flag in option.opts}


@both_pages
def test_names_of_the_program_exist(page: str) -> None:
    names = {code for code in code_of(page) if re.fullmatch(r"unrolled(\.\w+)+", code)}
    assert names
    for name in names:
        module, rest = name, list[str]()
        while True:
            try:
                found: Any = importlib.import_module(module)
                break
            except ModuleNotFoundError:
                module, _, last = module.rpartition(".")
                rest.insert(0, last)
        for part in rest:
            found = getattr(found, part)


def commands(page: str) -> list[tuple[str, str]]:
    """Each command of a console block, and what it prints first."""
    lines = [b.body.splitlines() for b in blocks(read(page)) if b.language == "console"]
    return [(command.removeprefix("$ "), said) for command, said in lines]


@pytest.mark.parametrize("command, said", commands(ENGLISH))
def test_commands_are_understood_and_have_the_form_that_the_page_gives(command: str, said: str) -> None:
    program, *arguments = shlex.split(command)
    assert program == "unrolled"
    done = CliRunner().invoke(app, [*arguments, "--dump-config"])
    assert done.exit_code == 0, done.output
    assert str(form_of(resolve(yaml.safe_load(done.stdout)))) == said


@pytest.mark.parametrize("page, other", [(ENGLISH, "docs/bptt.md"), (KOREAN, "docs/bptt.ko.md")])
def test_figures_of_bptt_are_its_pages(page: str, other: str) -> None:
    section = read(page)[read(page).index("**2.27") :]
    figures = re.findall(r"[\d,.]+ (?:ms|s|MiB)(?![A-Za-z])", FENCE.sub("", section))
    assert len(figures) > 6
    for figure in figures:
        assert figure in read(other), figure


@pytest.mark.parametrize("readme, page", [("README.md", ENGLISH), ("README.ko.md", KOREAN)])
def test_the_readme_leads_here(readme: str, page: str) -> None:
    assert f"({page})" in read(readme)


def write_pages() -> None:
    """Put what the English page prints into both pages."""
    with tempfile.TemporaryDirectory() as tempfile.tempdir:
        said = list(printed(read(ENGLISH)))
    for page in (ENGLISH, KOREAN):
        text = read(page)
        for (_, block), output in reversed(list(zip(runs(text), said, strict=True))):
            lines = "".join(f"{line.rstrip()}\n" for line in output.splitlines())
            text = text[: block.start] + lines + text[block.start + len(block.body) :]
        (ROOT / page).write_text(text, "utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "src"))
    write_pages()
