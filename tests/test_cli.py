"""The commands as a person meets them: what is printed where, with which exit code, for good and for bad input."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import io
import json
import lzma
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from samples import ENGLISH, KOREAN, sentences

from unrolled import cli, native
from unrolled.config import flag_key, load_config, resolve

SOURCES = str(Path(cli.__file__).parents[1])
SMALL = ["--hidden", "8", "--layers", "1", "--window", "16", "--batch-size", "4"]
COMMANDS = ("train", "evaluate", "generate", "inspect", "compare", "demo", "doctor")


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a mistake of the user's is answered with."""
        assert self.code == 2, self
        assert self.out == "", self
        lines = self.err.splitlines()
        assert len(lines) == 1, self
        assert lines[0].startswith("error: "), self
        return lines[0].removeprefix("error: ")


def run(*arguments: object, stdin: str | bytes = b"") -> Result:
    """`unrolled ARGUMENTS` in this process, on pipes whose encoding is ASCII at first."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True) for _ in range(2))
    data = stdin.encode() if isinstance(stdin, str) else stdin
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["unrolled", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "ascii"))
        with pytest.raises(SystemExit) as ended:
            cli.main()
    code = ended.value.code
    return Result(0 if code is None else int(code), *(s.buffer.getvalue().decode() for s in (out, err)))


def start(*arguments: object, **environment: str) -> list[str]:
    """The command line of a process of its own."""
    return [
        "env",
        *(f"{k}={v}" for k, v in environment.items()),
        sys.executable,
        "-m",
        "unrolled",
        *map(str, arguments),
    ]


def own_process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = start(*arguments, PYTHONPATH=SOURCES, **environment)
    return subprocess.run(command, capture_output=True, timeout=280, check=False)


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, and a model trained on each; tests read them only."""
    folder = tmp_path_factory.mktemp("shelf")
    texts = {"english": ENGLISH, "korean": KOREAN, "other": sentences("the cat The dog saw sat", 20, seed=5)}
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    for text, unit in (("english", "char"), ("korean", "jamo")):
        out = folder / f"{text}-model"
        done = run("train", folder / f"{text}.txt", "--out", out, "--unit", unit, "--epochs", 2, *SMALL)
        assert done.code == 0, done
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(ENGLISH, encoding="utf-8")
    return path


def train(text: object, out: Path, *more: object, steps: int = 3) -> Result:
    return run("train", text, "--out", out, *SMALL, "--steps", steps, *more)


def contents(folder: Path) -> dict[str, str]:
    """Every file below the folder, by its hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def weights(out: Path) -> str:
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


# Help.


def test_help_teaches() -> None:
    overall = run("--help")
    assert (overall.code, overall.err) == (0, "")
    assert all(command in overall.out for command in COMMANDS)
    assert "unrolled train my.txt --out my/" in overall.out
    for command in COMMANDS:
        done = run(command, "--help")
        assert (done.code, done.err) == (0, "")
        assert re.search(rf"unrolled {command} \S", done.out), f"{command} --help has no example"


@pytest.mark.parametrize("width", [80, 200])
def test_examples_in_help_stand_on_one_line(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for example in (
        "unrolled demo                             see all of it, in two minutes",
        'unrolled generate my/ --prompt "Once "    have it write',
    ):
        assert example in run("--help").out
    assert 'unrolled generate shakespeare/ --prompt "ROMEO:" --temperature 0.8' in run("generate", "--help").out


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\nfrom unrolled.cli import app\n"
        f"for command in [[], *([name] for name in {COMMANDS!r})]:\n"
        "    app([*command, '--help'], standalone_mode=False)\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "False False"


def test_options_that_take_no_value_show_none() -> None:
    shown = run("train", "--help").out
    for option in ("--resume", "--force", "--dump-config"):
        assert re.search(rf"{option} +[A-Z]", shown), f"{option} looks as if it took a value"
    assert re.search(r"--set +KEY=VALUE ", shown)


def test_version() -> None:
    done = run("--version")
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch(r"unrolled(, from a folder that is not installed as a package| \d+\.\d+\.\d+)\n", done.out)


@pytest.mark.parametrize("arguments", [[], ["train"], ["evaluate"], ["generate"]])
def test_nothing_said_is_answered_with_help(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.code == 2
    assert re.search(r"Usage: .*unrolled", done.out)
    assert done.err == ""


def test_the_defaults_in_help_are_those_of_the_settings() -> None:
    shown = " ".join(run("train", "--help").out.replace("│", " ").split())
    config = resolve()
    for name, default in {
        "hidden": config.core.hidden,
        "layers": config.core.layers,
        "dropout": config.core.dropout,
        "window": config.training.window,
        "batch-size": config.training.batch_size,
        "epochs": config.training.epochs,
        "clip": config.training.clip,
        "seed": config.training.seed,
    }.items():
        option = re.search(rf"--{name} +<\w+> (.*?)(?= --|╰)", shown)
        assert option, name
        assert f"({default})" in option[1], f"--{name}: {option[1]}"
    for name, default in {
        "cell": config.core.cell,
        "unit": config.input.unit,
        "documents": config.data.documents,
        "optimizer": config.training.optimizer,
        "schedule": config.training.schedule,
        "precision": config.training.precision,
        "errors": config.data.errors,
        "device": config.training.device,
    }.items():
        assert re.search(rf"--{name} +<str> [^.]*\b{default} \(default\)", shown), name
    assert config.training.lr == 2e-3
    assert "Learning rate (2e-3)" in shown


# Train, and what it says.


def test_training_says_what_it_does_on_stderr(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "my model"
    done = run("train", text, "--out", out, *SMALL, "--epochs", 2)
    assert (done.code, done.out) == (0, "")
    form, sizes, *validations, best, report, hint = done.err.splitlines()
    assert report == f"report: {out / 'report.html'}"
    assert (out / "report.html").exists()
    assert form == "text -> next: many-to-many, aligned, autoregressive (language model)"
    learn = int(0.9 * len(ENGLISH))
    updates = -(-((learn - 1) // 4) // 16)
    assert sizes.startswith(f"{learn:,} characters to train on, {len(ENGLISH) - learn:,} to validate; vocabulary ")
    assert sizes.endswith(f"; {2 * updates:,} updates, {updates:,} an epoch")
    assert len(validations) == 2
    for epoch, line in enumerate(validations, 1):
        assert re.fullmatch(
            rf"epoch {epoch}  update {epoch * updates}  valid \d\.\d{{4}} nats/char  \d\.\d{{4}} bits/char  "
            r"perplexity \d+\.\d\d( .*)?",
            line,
        )
    assert re.fullmatch(rf"best: \d\.\d{{4}} nats per character at update \d+; kept in {out}", best)
    assert hint == f"now try: unrolled generate '{out}'    (--prompt TEXT: how it shall begin)"
    assert "\x1b" not in done.err
    assert run("generate", out, "--length", 5).code == 0


@pytest.mark.parametrize("unit, name", [("char", "characters"), ("jamo", "jamo"), ("word", "words")])
def test_every_unit_from_text_to_text(unit: str, name: str, shelf: Path, tmp_path: Path) -> None:
    out = tmp_path / unit
    sizes = ["--hidden", 8, "--layers", 1, "--window", 8, "--batch-size", 4]
    done = run("train", shelf / "korean.txt", "--out", out, "--unit", unit, *sizes, "--epochs", 1)
    assert done.code == 0, done
    assert re.search(rf"^[\d,]+ {name} to train on, ", done.err, re.MULTILINE)
    result = json.loads(run("evaluate", out, shelf / "korean.txt", "--json").out)
    assert len(KOREAN) - 3 <= result["characters"] <= len(KOREAN) - 1
    written = run("generate", out, "--prompt", "나는", "--length", 20, "--seed", 1).out
    assert written.startswith("나는")
    assert len(written) == 2 + 20 + 1


def test_subwords(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(KOREAN, encoding="utf-8")
    out = tmp_path / "model"
    done = train(text, out, "--unit", "subword", "--set", "max_vocabulary=290")
    assert done.code == 0, done
    assert " subwords to train on, " in done.err
    assert "vocabulary 290;" in done.err
    assert len(run("generate", out, "--prompt", "나는 x", "--length", 20, "--seed", 1).out) == 25


@pytest.mark.parametrize(
    "name, pack",
    [
        ("crlf.txt", lambda data: data.replace(b"\n", b"\r\n")),
        ("cr.txt", lambda data: data.replace(b"\n", b"\r")),
        ("bom.txt", lambda data: b"\xef\xbb\xbf" + data),
        ("bom-crlf.txt.gz", lambda data: gzip.compress(b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n"))),
        ("text.txt.xz", lzma.compress),
        ("no-extension", bytes),
    ],
)
def test_the_same_text_however_it_is_kept(
    name: str, pack: Callable[[bytes], bytes], text: Path, tmp_path: Path
) -> None:
    other = tmp_path / name
    other.write_bytes(pack(text.read_bytes()))
    assert train(text, tmp_path / "clean").code == 0
    assert train(other, tmp_path / "other").code == 0
    assert weights(tmp_path / "other") == weights(tmp_path / "clean")
    first, second = (json.loads(run("evaluate", tmp_path / "clean", path, "--json").out) for path in (text, other))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def units(folder: Path) -> list[str]:
    content = json.loads((folder / "vocabulary.json").read_text())["content"]
    return list(content["input"]["vocabulary"]["units"])


def test_several_files_are_those_of_their_folder(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "inner").mkdir(parents=True)
    for name, seed in (("a", 1), ("inner/b", 2), ("z", 3)):
        (folder / f"{name}.txt").write_text(sentences("the cat sat", 20, seed), encoding="utf-8")
    (folder / "notes.md").write_text("xyz")
    assert train(folder, tmp_path / "folder").code == 0
    files = [folder / "a.txt", folder / "inner" / "b.txt"]
    done = run("train", *files, folder / "z.txt", "--out", tmp_path / "files", *SMALL, "--steps", 3)
    assert done.code == 0, done
    assert weights(tmp_path / "files") == weights(tmp_path / "folder")
    assert (
        "x"
        not in json.loads((tmp_path / "folder" / "vocabulary.json").read_text())["content"]["input"]["vocabulary"][
            "units"
        ]
    )


def test_validation_files(text: Path, shelf: Path, tmp_path: Path) -> None:
    done = train(text, tmp_path / "out", "--valid", shelf / "other.txt")
    size = len((shelf / "other.txt").read_text())
    assert f"{len(ENGLISH):,} characters to train on, {size:,} to validate; " in done.err
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["characters"] == size - 1
    done = train(text, tmp_path / "two", "--valid", shelf / "other.txt", "--valid", shelf / "korean.txt")
    assert re.search(rf"{size + len(KOREAN):,} to validate \([\d,]+ of them unknown\); ", done.err)


def test_starting_from_another_model(text: Path, shelf: Path, tmp_path: Path) -> None:
    source = shelf / "english-model"
    out = tmp_path / "out"
    done = run("train", text, "--out", out, "--init-from", source, "--window", 16, "--batch-size", 4, "--steps", 1)
    assert done.code == 0, done
    assert yaml.safe_load((out / "config.yaml").read_text())["core"]["hidden"] == 8
    before, fresh = (json.loads(run("evaluate", m, text, "--json").out)["nats_per_char"] for m in (source, out))
    assert abs(before - fresh) < 0.2, "one update does not undo what was learned"
    error = run("train", text, "--out", tmp_path / "no", "--init-from", source, "--hidden", 9).error
    assert error == f"training.init_from: {source} is another model than the one asked for: core.hidden: 8 -> 9"
    assert run("train", text, "--out", tmp_path / "no", "--init-from", tmp_path / "none").error == (
        f"{tmp_path / 'none'}: no such model folder"
    )
    assert not (tmp_path / "no").exists()


# Settings.


def dumped(*arguments: object) -> dict[str, dict[str, object]]:
    done = run("train", "text.txt", "--out", "nowhere", *arguments, "--dump-config")
    assert (done.code, done.err) == (0, ""), done
    return yaml.safe_load(done.out)


def test_a_later_layer_of_settings_wins(tmp_path: Path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text("core:\n  hidden: 10\n  layers: 1\n  dropout: 0.0\ntraining:\n  lr: 1e-3\n")
    assert dumped()["core"]["hidden"] == 512
    assert dumped("--config", config)["core"]["hidden"] == 10
    layered = dumped("--set", "core.hidden=30", "--config", config, "--hidden", 20, "--layers", 3)
    assert layered["core"]["hidden"] == 30, "--set goes over flags"
    assert layered["core"]["layers"] == 3, "flags go over the file"
    assert layered["core"]["dropout"] == 0, "the file goes over the defaults"
    assert layered["training"]["lr"] == 1e-3
    assert layered["training"]["batch_size"] == 64
    assert dumped("--hidden", 20, "--set", "hidden=40", "--set", "hidden=50")["core"]["hidden"] == 50
    assert dumped("--set", "training.betas=[0.8, 0.9]")["training"]["betas"] == [0.8, 0.9]
    assert dumped("--window", "full")["training"]["window"] == "full"
    assert not Path("nowhere").exists()


def test_every_flag_sets_what_its_name_says() -> None:
    values = {
        "cell": "gru", "hidden": 3, "layers": 4, "unit": "jamo", "embedding": 5, "dropout": 0.25, "window": 40,
        "stride": 7, "batch-size": 9, "documents": "line", "epochs": 11, "steps": 13, "lr": 0.5, "optimizer": "sgd",
        "schedule": "plateau", "clip": 2.5, "average": 0.75, "patience": 15, "precision": "bf16", "errors": "replace",
        "seed": 17, "device": "cpu",
    }  # fmt: skip
    flags = [part for name, value in values.items() for part in (f"--{name}", value)]
    settings = dumped(*flags)
    found = {name: flag_key(name).split(".") for name in values}
    assert {name: settings[section][key] for name, (section, key) in found.items()} == values


def test_dumped_settings_are_a_config_again(tmp_path: Path) -> None:
    arguments = ["--cell", "gru", "--set", "core.init=orthogonal", "--lr", "1e-4", "--unit", "word"]
    first = run("train", "text.txt", "--out", "nowhere", *arguments, "--dump-config").out
    assert "# " in first
    assert "Units in each layer" in first, "it explains"
    (tmp_path / "dumped.yaml").write_text(first, encoding="utf-8")
    second = run("train", "text.txt", "--out", "nowhere", "--config", tmp_path / "dumped.yaml", "--dump-config").out
    assert second == first
    assert resolve(load_config(tmp_path / "dumped.yaml")).core.init == "orthogonal"


def test_a_model_folders_config_trains_the_same_model_again(text: Path, tmp_path: Path) -> None:
    assert train(text, tmp_path / "a", "--cell", "rnn", "--seed", 5).code == 0
    assert run("train", text, "--out", tmp_path / "b", "--config", tmp_path / "a" / "config.yaml").code == 0
    assert weights(tmp_path / "b") == weights(tmp_path / "a")


# Bad input is one line on stderr, exit code 2, and nothing is written.

TEXTS = {
    "empty.txt": b"",
    "blank.txt": b" \n\t \n\n   " * 2000,
    "short.txt": b"too short for a window of 16 in 4 lanes",
    "latin.txt": b"caf\xe9 " * 100,
    "cp949.txt": "나는 학교에".encode("cp949") * 100,
    "utf16.txt": "plain text ".encode("utf-16") * 100,
    "nul.txt": b"abc\0def " * 100,
    "cut.txt.gz": gzip.compress(ENGLISH.encode())[:-20],
    "wrong.txt.xz": b"not packed at all",
    "good.txt": ENGLISH.encode(),
    "typo.yaml": b"core:\n  hidden: 8\n  layer: 2\n",
    "value.yaml": b"core:\n  hidden: 8\ntraining:\n  lr: fast\n",
    "broken.yaml": b"core:\n  hidden: [8\n",
    "list.yaml": b"- core\n",
}
BAD: dict[str, tuple[str, str]] = {
    "an empty file": ("empty.txt", r"there is no text in empty.txt, or nothing but white space"),
    "white space": ("blank.txt", r"there is no text in blank.txt, or nothing but white space"),
    "shorter than a window": (
        "short.txt",
        r"the text has 35 units; one window of 16 for 4 lanes needs 65: lower --window or --batch-size, or give more",
    ),
    "latin-1": ("latin.txt", r"latin.txt: byte 3 \(0xe9\) is no UTF-8: convert .* or give --errors replace"),
    "cp949": ("cp949.txt", r"cp949.txt: byte 0 \(0xb3\) is no UTF-8: .*Korean text is often CP949"),
    "utf-16": ("utf16.txt", r"utf16.txt: this is UTF-16 text: convert it to UTF-8"),
    "NUL": ("nul.txt", r"nul.txt: byte 3 is NUL: .* or give --errors replace to read NUL as U\+FFFD"),
    "a packed file that was cut": ("cut.txt.gz", r"cut.txt.gz: this .gz file is damaged or cut off"),
    "no packed file": ("wrong.txt.xz", r"wrong.txt.xz: this .xz file is damaged or cut off"),
    "no such file": ("godo.txt", r"godo.txt: there is no such file or folder: did you mean 'good.txt'\?"),
    "no such folder": ("texts/a.txt", r"texts/a.txt: there is no such file or folder, nor a folder texts"),
    "a folder without texts": ("hollow", r"hollow: no texts in this folder: expected files \*.txt"),
    "no such validation file": ("good.txt --valid no.txt", r"no.txt: there is no such file or folder"),
    "a bad validation file": ("good.txt --valid latin.txt", r"latin.txt: byte 3 \(0xe9\) is no UTF-8"),
    "a short validation file": (
        "good.txt --valid one.txt",
        r"the validation text has 1 symbols, expected at least two",
    ),
    "hidden 0": ("good.txt --hidden 0", r"core.hidden: expected an integer >= 1, got 0"),
    "hidden ten": ("good.txt --hidden ten", r"invalid value for '--hidden': .*\(see: .*train --help\)"),
    "a negative window": ("good.txt --window -3", r"training.window: expected an integer >= 1 or full, got -3"),
    "half a window": ("good.txt --window half", r"training.window: expected an integer >= 1 or full, got 'half'"),
    "a stride above the window": ("good.txt --stride 99", r"training.stride: expected at most training.window \(16\)"),
    "an unknown cell": ("good.txt --cell lsmt", r"core.cell: unknown cell 'lsmt': did you mean 'lstm'\?"),
    "an unknown unit": ("good.txt --unit jomo", r"input.unit: expected .*, got 'jomo'; did you mean 'jamo'\?"),
    "an unknown device": ("good.txt --device gpu", r"training.device: expected auto, cpu or cuda, got 'gpu'"),
    "an unknown setting": ("good.txt --set core.hiden=3", r"unknown setting 'core.hiden': did you mean 'hidden'\?"),
    "a setting without a value": ("good.txt --set core.hidden", r"expected KEY=VALUE, e.g. core.hidden=256"),
    "a setting of another type": ("good.txt --set layers=two", r"core.layers: expected an integer >= 1, got 'two'"),
    "an unknown key in a file": (
        "good.txt --config typo.yaml",
        r"typo.yaml, line 3: unknown setting 'core.layer': did you mean 'layers'\?",
    ),
    "a bad value in a file": (
        "good.txt --config value.yaml",
        r"value.yaml, line 4: training.lr: expected a number > 0",
    ),
    "a file that is no YAML": ("good.txt --config broken.yaml", r"broken.yaml, line 3: not YAML"),
    "a file without sections": ("good.txt --config list.yaml", r"list.yaml: expected sections \(input, core, "),
    "no such config": ("good.txt --config no.yaml", r"cannot read config file no.yaml: No such file"),
    "nothing to resume": ("good.txt --resume", r"out holds no model to resume: leave --resume out to start one"),
    "a misspelt option": ("good.txt --hiden 3", r"no such option: --hiden .*--hidden.*\(see: .*train --help\)"),
    "an option without a value": ("good.txt --seed", r"option '--seed' requires an argument"),
}


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with good and bad files, which the test works in."""
    for name, data in TEXTS.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "one.txt").write_text("a")
    (tmp_path / "hollow").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(name: str, desk: Path) -> None:
    arguments, message = BAD[name]
    before = contents(desk)
    error = run("train", *SMALL, "--out", "out", *arguments.split()).error
    assert re.match(message, error), error
    assert contents(desk) == before
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("train good.txt", r"missing option '--out'.* \(see: .*train --help\)"),
        ("train --out out", r"missing argument 'data' \(see: "),
        ("trian good.txt --out out", r"no such command 'trian'. Did you mean 'train'\? \(see: .* --help\)"),
        ("doctor more", r"got unexpected extra argument"),
        ("train good.txt --out good.txt", r"good.txt is a file, expected a folder to write the model to"),
        ("generate nowhere", r"nowhere: no such model folder"),
        ("generate good.txt", r"good.txt: a file, expected a model folder"),
        ("evaluate good.txt good.txt", r"good.txt: a file, expected a model folder"),
        ("generate hollow", r"folder hollow lacks config.yaml: expected a file of kind 'config' that unrolled wrote"),
    ],
)
def test_other_mistakes(arguments: str, message: str, desk: Path) -> None:
    before = contents(desk)
    assert re.match(message, run(*arguments.split()).error)
    assert contents(desk) == before


@pytest.mark.parametrize("bad", ["latin.txt", "nul.txt"])
def test_errors_replace_goes_on(bad: str, desk: Path) -> None:
    done = train(bad, desk / "out", "--errors", "replace")
    assert done.code == 0, done
    assert (
        "\ufffd"
        in json.loads((desk / "out" / "vocabulary.json").read_text())["content"]["input"]["vocabulary"]["units"]
    )
    # What was said at training holds for the model's later texts too.
    assert run("evaluate", "out", bad).code == 0
    assert run("evaluate", "out", bad, "--errors", "strict").error.startswith(f"{bad}: byte 3")


# A folder that holds a model.


def test_a_model_is_not_written_over_unasked(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert train(text, out).code == 0
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    error = train(text, out).error
    assert (
        error == f"{out} already holds a model: go on with it (--resume), replace it (--force) or choose another --out"
    )
    assert contents(out) == before
    # Nor is one lost to an order that cannot be carried out.
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    assert "no UTF-8" in train(tmp_path / "bad.txt", out, "--force").error
    assert "needs" in train(text, out, "--force", "--window", 9999).error
    assert contents(out) == before
    assert train(text, out, "--force", "--seed", 7).code == 0
    after = contents(out)
    assert after["model.safetensors"] != before["model.safetensors"]
    assert after["notes.txt"] == before["notes.txt"]
    assert train(text, tmp_path / "fresh", "--seed", 7).code == 0
    assert weights(tmp_path / "fresh") == weights(out)


def test_going_on_with_a_model(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert train(text, out, steps=3).code == 0
    before = contents(out)
    done = run("train", text, "--out", out, "--resume")
    assert done.code == 0
    assert done.err.splitlines()[2:4] == [
        "going on at update 3",
        "nothing left to do: 3 updates are done; give more --epochs to go on",
    ]
    assert contents(out) == before
    # With the same flags as before and more updates.
    done = train(text, out, "--resume", steps=6)
    assert done.code == 0, done
    assert "going on at update 3" in done.err
    assert "update 6  valid" in done.err


def test_a_resume_that_differs_is_refused(text: Path, shelf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert train(text, out).code == 0
    before = contents(out)
    for arguments, message in (
        ([text, "--hidden", 9], r"was trained with other settings \(core.hidden: 8 -> 9\): leave them out to go on"),
        ([text, "--set", "lr=1"], r"was trained with other settings \(training.lr: 0.002 -> 1.0\)"),
        ([text, "--cell", "lsmt"], r"unknown cell 'lsmt'|core.cell: lstm -> lsmt"),
        ([shelf / "other.txt"], r"the training text is not the one that .* was trained with .*: give the same files"),
        ([text, "--valid", text], r"the (training|validation) text is not the one that .* was trained with"),
    ):
        error = run("train", *arguments, "--out", out, "--resume").error
        assert re.search(message, error), error
    assert contents(out) == before


# A model folder that is not whole.


def damage(folder: Path, how: str) -> None:
    weights, vocabulary, config = (folder / name for name in ("model.safetensors", "vocabulary.json", "config.yaml"))
    if how.startswith("lacks"):
        (folder / how.split()[1]).unlink()
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif how == "one bit":
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 16
        weights.write_bytes(data)
    elif how == "newer":
        vocabulary.write_bytes(vocabulary.read_bytes().replace(b'"version": 1', b'"version": 2'))
    elif how == "edited":
        config.write_text(config.read_text().replace("hidden: 8", "hidden: 9"))
    elif how == "mixed":
        shutil.copy(folder.parent / "korean-model" / "vocabulary.json", vocabulary)


@pytest.mark.parametrize(
    "how, message",
    [
        ("lacks model.safetensors", r"lacks model.safetensors: expected a file of kind 'model' that unrolled wrote"),
        ("lacks vocabulary.json", r"lacks vocabulary.json: expected a file of kind 'vocabulary'"),
        ("lacks config.yaml", r"lacks config.yaml: expected a file of kind 'config'"),
        ("cut", r"model.safetensors is damaged: .* \(it was cut short or a byte has changed\)"),
        ("one bit", r"model.safetensors is damaged: "),
        ("newer", r"vocabulary.json was written by a newer unrolled \(version 2, this one reads up to 1\): upgrade"),
        ("edited", r"config.yaml was changed after unrolled wrote it"),
        ("mixed", r"these weights belong to another vocabulary than vocabulary.json beside them"),
    ],
)
def test_a_damaged_model_is_refused(how: str, message: str, shelf: Path, tmp_path: Path) -> None:
    for name in ("english-model", "korean-model"):
        shutil.copytree(shelf / name, tmp_path / name)
    damage(tmp_path / "english-model", how)
    before = contents(tmp_path)
    for arguments in (["generate", "--prompt", "the"], ["evaluate", shelf / "english.txt"]):
        error = run(arguments[0], tmp_path / "english-model", *arguments[1:]).error
        assert re.search(message, error), error
    assert contents(tmp_path) == before


# Evaluate.


def test_evaluate_for_people_and_for_programs(shelf: Path) -> None:
    model, text = shelf / "english-model", shelf / "other.txt"
    done = run("evaluate", model, text, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.out.endswith("}\n")
    result = json.loads(done.out)
    assert list(result) == [
        "nats_per_char", "bits_per_char", "perplexity", "nats_per_unit", "characters", "units", "unknown", "seconds",
    ]  # fmt: skip
    table = run("evaluate", model, text)
    assert (table.code, table.err) == (0, "")
    rows = dict(re.findall(r"^ *(\S.*?) {2,}([\d,.]+) *$", table.out, re.MULTILINE))
    assert list(rows) == [
        "nats per character", "bits per character", "perplexity per symbol", "nats per symbol", "characters",
        "symbols predicted", "unknown symbols", "seconds",
    ]  # fmt: skip
    for shown, exact in list(zip(rows.values(), result.values(), strict=True))[:-1]:
        assert float(shown.replace(",", "")) == pytest.approx(exact, abs=0.0001)
    assert "\x1b" not in table.out


def test_unknown_symbols_are_pointed_out(shelf: Path) -> None:
    done = run("evaluate", shelf / "english-model", shelf / "korean.txt")
    unknown = sum(character not in ENGLISH for character in KOREAN)
    assert done.code == 0
    assert done.err == (
        f"note: the model never saw {unknown:,} symbols of the text; all count as one, so the figures flatter it\n"
    )


def test_evaluate_in_lanes(shelf: Path) -> None:
    model, text = shelf / "english-model", shelf / "english.txt"
    one, many = (json.loads(run("evaluate", model, text, "--json", "--lanes", lanes).out) for lanes in (1, 5))
    assert many["units"] == one["units"]
    assert many["nats_per_char"] == pytest.approx(one["nats_per_char"], rel=1e-3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["english.txt", "--lanes", "0"], r"lanes: expected at least 1, got 0"),
        (["english.txt", "--errors", "ignore"], r"errors: unknown value 'ignore': known: replace, strict"),
        (["no.txt"], r".*no.txt: there is no such file or folder"),
    ],
)
def test_evaluate_refuses(arguments: list[str], message: str, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shelf)
    assert re.match(message, run("evaluate", "english-model", *arguments).error)


# Generate.


def test_generate_writes_the_prompt_and_what_follows(shelf: Path) -> None:
    model = shelf / "english-model"
    done = run("generate", model, "--prompt", "The cat ", "--length", 30, "--seed", 4)
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch(r"(?s)The cat .{30}\n", done.out)
    again = run("generate", model, "-p", "The cat ", "--length", 30, "--seed", 4, "--no-echo")
    assert "The cat " + again.out == done.out
    assert run("generate", model, "-p", "The cat ", "--length", 30, "--seed", 5).out != done.out
    assert run("generate", model, "--prompt", "-", "--length", 30, "--seed", 4, stdin="The cat ").out == done.out
    stop = done.out[12:14]
    assert run("generate", model, "-p", "The cat ", "--length", 30, "--seed", 4, "--stop", stop).out == (
        done.out[: 8 + done.out[8:].find(stop)] + "\n"
    )
    assert len(run("generate", model).out) == 401, "no prompt, and the default length"


def test_generate_greedily(shelf: Path) -> None:
    model = shelf / "english-model"
    greedy = run("generate", model, "--prompt", "The", "--length", 20, "--greedy")
    assert greedy == run("generate", model, "--prompt", "The", "--length", 20, "--temperature", 0)
    assert greedy == run("generate", model, "--prompt", "The", "--length", 20, "--top-k", 1, "--seed", 3)
    assert greedy == run("generate", model, "--prompt", "The", "--length", 20, "--top-p", 0.01)
    penalised = run("generate", model, "--prompt", "The", "--length", 20, "--greedy", "--repetition-penalty", 5)
    assert penalised != greedy


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--length -1", "length: expected at least 0 characters, got -1"),
        ("--temperature -1", r"temperature: expected at least 0 \(0 is greedy\), got -1.0"),
        ("--temperature 0.5 --greedy", "--greedy is --temperature 0: leave --temperature 0.5 out, or --greedy"),
        ("--top-k 0", "top_k: expected at least 1, got 0"),
        ("--top-p 2", "top_p: expected above 0 and at most 1, got 2.0"),
        ("--repetition-penalty 0", "repetition_penalty: expected above 0, got 0.0"),
        ("--prompt 나는", r"the prompt has symbols that the model never saw: '나' \(U\+B098\), '는' \(U\+B294\)"),
        ("--length many", "invalid value for '--length'"),
    ],
)
def test_generate_refuses(arguments: str, message: str, shelf: Path) -> None:
    assert re.match(message, run("generate", shelf / "english-model", *arguments.split()).error)
    assert run("generate", shelf / "english-model", "--stop", "").error.startswith("stop: expected at least one char")


def test_a_prompt_that_is_no_utf8(shelf: Path) -> None:
    error = run("generate", shelf / "korean-model", "--prompt", "-", stdin="나는".encode("cp949")).error
    assert error.startswith("the prompt has a symbol that the model never saw: '\ufffd' (U+FFFD)")


def test_korean_whatever_the_locale_says(shelf: Path) -> None:
    settings = ["--prompt", "나는 ", "--length", 20, "--seed", 2]
    expected = run("generate", shelf / "korean-model", *settings)
    assert expected.out.startswith("나는 ")
    done = own_process("generate", shelf / "korean-model", *settings, LANG="C", LC_ALL="C", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == expected.out


def test_a_reader_who_leaves_early_sees_no_traceback(shelf: Path) -> None:
    command = start("generate", shelf / "english-model", "--prompt", "The", "--length", 10**6, PYTHONPATH=SOURCES)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as writer:
        assert writer.stdout
        assert writer.stderr
        assert writer.stdout.read(40).startswith(b"The"), "text appears as it is made"
        writer.stdout.close()
        assert writer.stderr.read() == b""
        assert writer.wait(60) in (0, 1)


# Doctor.


def test_doctor(shelf: Path) -> None:
    done = run("doctor", "--json")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    import torch

    assert found["torch"] == torch.__version__
    assert found["threads"].startswith(f"{torch.get_num_threads()} of torch")
    assert found["path"].startswith("native: " if native.why_absent() is None else "tape: ")
    table = " ".join(run("doctor").out.split())
    assert all(name in table for name in found)


# The whole program, at a terminal.


def test_ctrl_c_at_a_terminal_saves_and_resume_goes_on(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["train", text, "--out", out, *SMALL, "--epochs", 3000]
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    command = [sys.executable, "-m", "unrolled", *map(str, arguments)]
    screen = ""

    def become_leader() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    with subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, preexec_fn=become_leader,
        env={**environment, "PYTHONPATH": SOURCES, "TERM": "xterm-256color"},
    ) as process:  # fmt: skip
        os.close(slave)
        asked, deadline = False, time.monotonic() + 200
        with contextlib.suppress(OSError):  # Linux says so when the other side has closed
            while data := os.read(master, 65536):
                screen += data.decode(errors="replace")
                if not asked and " chars/s" in screen and re.search(r"\d:\d\d left", screen):
                    os.write(master, b"\x03")
                    asked = True
                if time.monotonic() > deadline:
                    process.send_signal(signal.SIGKILL)
    os.close(master)
    assert process.returncode == 130, screen[-2000:]
    assert re.search(r"training .*━.* \d+ % \S*\d:\d\d left", screen), "a bar, how far, and the time left"
    assert re.search(r"loss \d\.\d{3}  \d\.\d{3} nats/char  \d\.\d{3} bits/char  [\d,]+ chars/s", screen)
    # The path may be longer than the terminal is wide: the line is not cut.
    stopped = re.search(
        rf"stopped at update ([\d,]+), saved in {out}. Go on with the same command and --resume", screen
    )
    assert stopped, screen[-2000:]
    assert "Traceback" not in screen
    assert screen.count("\x1b[?25l") == screen.count("\x1b[?25h"), "the cursor is shown again"
    step = int(stopped[1].replace(",", ""))
    done = run(*arguments, "--resume", "--steps", step + 1)
    assert done.code == 0, done
    assert f"going on at update {step:,}\n" in done.err
    assert f"update {step + 1:,}  valid" in done.err
