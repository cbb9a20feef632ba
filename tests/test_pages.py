"""The pages on vanishing gradients and on attention: what they run runs and shows what they say, in small sizes; what
they name exists; and both languages have the same commands, code, tables and plots."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from samples import small_model
from test_lecture_notes import differ
from typer.testing import CliRunner

from unrolled.checkpoints import save
from unrolled.cli import app
from unrolled.config import resolve
from unrolled.trace import record
from unrolled.training import train

ROOT = Path(__file__).parents[1]
BENCHMARKS, DOCS = ROOT / "benchmarks", ROOT / "docs"
SCRIPTS = {"vanishing-gradients": "remember", "attention": "attention_by_length"}
RESULTS = {"vanishing-gradients": "remember", "attention": "attention"}
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

each_page = pytest.mark.parametrize("name", SCRIPTS)


def read(name: str, korean: bool = False) -> str:
    return (DOCS / f"{name}{'.ko' if korean else ''}.md").read_text("utf-8")


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(SCRIPTS[name])


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


# ------------------------------------------------------------------------------------- both languages are alike


@each_page
def test_both_languages_run_the_same(name: str) -> None:
    """Comments are translated, code is not."""

    def code(text: str) -> list[tuple[str, str]]:
        return [(language, re.sub(r"#.*", "#", body)) for language, body in FENCE.findall(text)]

    assert len(code(read(name))) > 2
    assert code(read(name, korean=True)) == code(read(name))


@each_page
def test_both_languages_have_the_same_tables_plots_and_sources(name: str) -> None:
    def cells(text: str) -> list[list[str]]:
        """Of each row of a table the figures and the code."""
        rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
        return [[cell for cell in row if re.fullmatch(r"`.*`|[\d.,%/() –-]*\d[\d.,%/() –+∞-]*", cell)] for row in rows]

    english, korean = read(name), read(name, korean=True)
    assert len(cells(english)) > 20
    assert cells(korean) == cells(english)
    for same in (r"!\[.*?\]\((.*?)\)", r"<!-- (\S+) -->", r"^## ", r"https?://\S+"):
        assert re.findall(same, korean, re.MULTILINE) == re.findall(same, english, re.MULTILINE), same


@each_page
@pytest.mark.parametrize("korean", [False, True])
def test_links_and_plots_exist(name: str, korean: bool) -> None:
    links = re.findall(r"\]\(([^)]+)\)", FENCE.sub("", read(name, korean)))
    assert any(link.startswith("img/") for link in links)
    for link in links:
        assert (DOCS / link.partition("#")[0]).is_file(), link


@each_page
@pytest.mark.parametrize("korean", [False, True])
def test_the_readme_and_the_notes_lead_here(name: str, korean: bool) -> None:
    end = ".ko.md" if korean else ".md"
    assert f"(docs/{name}{end})" in (ROOT / f"README{end}").read_text("utf-8")
    assert f"({name}{end})" in (DOCS / f"lecture-notes{end}").read_text("utf-8")


# ---------------------------------------------------------------------------------- what is named is understood


def commands(name: str, program: str) -> list[list[str]]:
    lines = [line for language, body in FENCE.findall(read(name)) if language == "sh" for line in body.splitlines()]
    split = [shlex.split(line, comments=True) for line in lines if line.strip()]
    return [words for words in split if words and words[0] == program]


@each_page
def test_settings_of_trainings_are_understood(name: str) -> None:
    found = [words for words in commands(name, "unrolled") if words[1] == "train"]
    assert found
    for words in found:
        done = CliRunner().invoke(app, [*words[1:], "--dump-config"])
        assert done.exit_code == 0, done.output
        resolve(yaml.safe_load(done.stdout))


@each_page
def test_the_script_takes_the_arguments_that_the_page_gives(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script(name, monkeypatch).main(["--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    found = [words for words in commands(name, "python") if words[1] == f"benchmarks/{SCRIPTS[name]}.py"]
    assert found
    assert {word for words in found for word in words if word.startswith("--")} <= known


# --------------------------------------------------------------------------------------- the pages show what is


@each_page
@pytest.mark.usefixtures("one_thread")
def test_the_pages_python_prints_what_it_says(name: str) -> None:
    found = FENCE.findall(read(name))
    runs = [(body, said) for (of, body), (_, said) in pairwise(found) if of == "python"]
    assert runs
    for body, said in runs:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(body, f"docs/{name}.md", "exec"), {})
        assert not differ(printed.getvalue(), said), f"docs/{name}.md prints\n{printed.getvalue()}\nand says\n{said}"


@each_page
def test_pages_show_the_results_that_are_kept(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept = BENCHMARKS / "results" / f"{RESULTS[name]}.json"
    for korean in (False, True):
        page = f"{name}{'.ko' if korean else ''}.md"
        shutil.copy(DOCS / page, tmp_path / page)
    script(name, monkeypatch).main(["--from", str(kept), "--docs", str(tmp_path)])
    for made in tmp_path.glob("*.md"):
        assert made.read_text("utf-8") == (DOCS / made.name).read_text("utf-8"), (
            f"docs/{made.name} shows other results than the kept ones; run: "
            f"python benchmarks/{SCRIPTS[name]}.py --from {kept.relative_to(ROOT)}"
        )
    for plot in (tmp_path / "img").iterdir():
        assert plot.read_text("utf-8").startswith("<?xml"), plot
        assert (DOCS / "img" / plot.name).is_file(), plot


# ------------------------------------------------------------------------- what the pages claim, in small sizes


@pytest.mark.usefixtures("one_thread")
def test_far_back_only_gates_that_keep_remember(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`remember.py --short`: near, all cells learn it; far, the vanilla RNN's gradient has vanished, with or without
    clipping, while gates that start open keep it; what is cut by truncation is not learnt."""
    out = tmp_path / "remember.json"
    remember = script("vanishing-gradients", monkeypatch)
    before = {path: path.read_bytes() for path in DOCS.glob("vanishing*")}
    assert remember.main(["--short", "--out", str(out)]) == 0
    assert {path: path.read_bytes() for path in before} == before, "--short leaves the pages as they are"
    results = json.loads(out.read_text("utf-8"))
    near, far = results["sizes"]["distances"]
    learned = {
        (run["way"], run["distance"]): run["learned"] for part in results["parts"].values() for run in part
    }  # fmt: skip
    assert learned["RNN", near]
    assert learned["GRU, chrono", near]
    assert not learned["RNN", far]
    assert not learned["RNN, no clipping", far], "clipping is not what is missing"
    assert learned["GRU, chrono", far]
    assert learned["LSTM, chrono", far]
    assert not learned["LSTM, chrono, truncated", far], "no gradient reaches the key"
    descent = "RNN, W_hh × 2, gradient descent"
    assert learned[descent, near]
    longest = {run["way"]: run["longest_gradient"] for run in results["parts"]["clipping"] if run["distance"] == far}
    assert longest[descent] > 3, "it explodes: clipped at 1, the update is a third of it at most"
    flows = {(flow["way"], flow["when"]): flow for flow in results["flow"]}
    assert flows["RNN", "before"]["norms"][far] < 1e-6
    assert flows["GRU, chrono", "after"]["norms"][far] > 1e-3
    assert flows["RNN", "before"]["stretch"][0] < 1.1
    for korean in (False, True):
        page = f"vanishing-gradients{'.ko' if korean else ''}.md"
        shutil.copy(DOCS / page, tmp_path / page)
    remember.write_docs(results, tmp_path)
    rows = (tmp_path / "vanishing-gradients.md").read_text("utf-8").splitlines()
    assert any(re.fullmatch(r"\| RNN \| 1/1 \(\d+\) \| 0/1 \d+ % \|", row) for row in rows)


@pytest.mark.usefixtures("one_thread")
def test_long_sentences_take_attention_and_it_finds_the_other_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`attention_by_length.py --short`: a language said in reverse."""
    out = tmp_path / "attention.json"
    attention = script("attention", monkeypatch)
    assert attention.main(["--short", "--models", str(tmp_path / "models"), "--out", str(out)]) == 0
    found: Any = json.loads(out.read_text("utf-8"))["pairs"]["made-up"]
    none, dot, strongest = (found["ways"][way] for way in ("none", "dot", "strongest"))
    assert dot["chrf"] > none["chrf"] + 10
    lost = [none["lengths"][i]["chrf"] - dot["lengths"][i]["chrf"] for i in (0, -1)]
    assert lost[1] < lost[0] - 10, "the longer the sentence, the more attention gives"
    assert strongest["chrf"] > none["chrf"]
    assert strongest["entropy"] == 0 < dot["entropy"]
    assert dot["monotonicity"] < 0.5, "it reads from the end: a perfect reader has 0"
    (shown,) = found["shown"]
    words = len(shown["here"].split())
    assert shown["looks"]["dot"]["pharaoh"] == " ".join(f"{s}-{words - 1 - s}" for s in range(words))


# -------------------------------------------------------------------------------------------- looking inside


PLAY = "To be, or not to be, that is the question. " * 60


@pytest.fixture(scope="module")
def looked_into(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the page on looking inside names: small models of the kinds that it speaks of, and a text."""
    folder = tmp_path_factory.mktemp("inspect")
    small: Any = {"hidden": 8, "layers": 1, "embedding": 4, "epochs": 1, "unit": "word"}
    translated = [{"text": "Zwei junge Männer spielen Fußball.", "target": "Two men"}] * 4
    train(translated, folder / "translator", input="text:text", output="text:target", **small)
    (folder / "test.tsv").write_text("text\ttag\n" + "to be\tP V\nto sleep\tP V\n" * 4, "utf-8")
    train(folder / "test.tsv", folder / "tagger", input="text:text", output="labels:tag", **small)
    save(small_model(text=PLAY, dtype=torch.float32, layers=2), folder / "shakespeare")
    for cell in ("lstm", "gru"):
        save(small_model(text=PLAY, dtype=torch.float32, cell=cell), folder / cell)
    (folder / "play.txt").write_text(PLAY, "utf-8")
    return folder


@pytest.mark.usefixtures("one_thread")
def test_the_commands_on_looking_inside_run(looked_into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand there, one after the other: a trace that one leaves is read by another."""
    blocks = [
        re.findall(r"^```\n(.*?)^```$", FENCE.sub("", read("inspect", k)), re.MULTILINE | re.DOTALL)
        for k in (False, True)
    ]
    lines, korean = ([shlex.split(line, comments=True) for body in page for line in body.splitlines()]
                     for page in blocks)  # fmt: skip
    assert len(lines) == 6
    assert korean == lines
    monkeypatch.chdir(looked_into)
    for program, *arguments in lines:
        assert program == "unrolled"
        made = Path(arguments[arguments.index("--out") + 1])
        made.unlink(missing_ok=True)
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, f"{arguments}\n{done.output}"
        assert made.read_text("utf-8").startswith("<svg" if made.suffix == ".svg" else "<!doctype html>"), arguments


@pytest.mark.usefixtures("one_thread")
def test_the_page_on_looking_inside_runs(looked_into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Python, in both languages the same."""
    monkeypatch.chdir(looked_into)
    shown: list[Any] = []
    monkeypatch.setattr("plotly.graph_objects.Figure.show", lambda self, **settings: shown.append(self))
    record_one = record(small_model(text=PLAY, dtype=torch.float32), PLAY[:30], gradient=True, at=-1)
    names: dict[str, Any] = {"one_trace": record_one, "another": record_one}
    blocks = [
        re.findall(r"^```python\n(.*?)^```$", read("inspect", k), re.MULTILINE | re.DOTALL) for k in (False, True)
    ]
    code = [[re.sub(r" +#.*", "", block) for block in page] for page in blocks]
    assert len(code[0]) == 2
    assert code[0] == code[1]
    for block in code[0]:
        exec(compile(block, "docs/inspect.md", "exec"), names)
    assert len(shown) == 1
    assert names["trace"].attention.shape[1] == len(names["trace"].read)
    assert len(names["seen"]) == len(PLAY)
