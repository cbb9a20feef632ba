"""Each demo on a little of its data with shrunken settings, through the command line; and the data that ships."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import lzma
import math
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

import unrolled
from unrolled import cli, demo
from unrolled.data import encode_texts, split_text
from unrolled.demo import road, shakespeare
from unrolled.demo.baselines import NaiveBayes, NearestNeighbour, most_frequent, ngram_perplexity
from unrolled.evaluation import evaluate
from unrolled.ngram import NGram

SHIPPED = road.DATA

# What comes after "ba" needs more than two symbols of memory, so a small network beats a trigram soon.
TEXT = ("ROMEO:\n" + "ababac" * 12 + "\n") * 80
SETTINGS = {
    "cell": "gru", "hidden": 16, "layers": 1, "dropout": 0.0, "window": 32, "batch_size": 4, "lr": 0.03, "warmup": 5,
    "epochs": 4,
}  # fmt: skip

FIGURE = {"sentiment": "accuracy", "translate": "chrf", "chat": "perplexity", "caption": "exact", "frames": "macro_f1"}
"""The figure by which each demo's model must beat the baseline."""
WORST = {name: math.inf if name == "chat" else 0.0 for name in FIGURE}
BEST = {"sentiment": 1.0, "translate": 100.0, "chat": 1.0, "caption": 1.0, "frames": 1.0}
BASELINE = {
    "sentiment": r"always \w+",
    "translate": "always the most frequent translation",
    "chat": "unigram: how frequent each symbol is",
    "caption": "always the most frequent name",
    "frames": r"always \w+",
}


class Result(NamedTuple):
    code: int
    out: str
    err: str


def run(*arguments: object) -> Result:
    """`unrolled demo ARGUMENTS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["unrolled", "demo", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return Result(int(ended.value.code or 0), out.getvalue(), err.getvalue())


def module(name: str) -> ModuleType:
    return import_module(f"unrolled.demo.{name}")


def repack(source: Path, target: Path, keep: Callable[[list[str]], list[str]]) -> None:
    lines = lzma.decompress(source.read_bytes()).decode().splitlines(keepends=True)
    target.write_bytes(lzma.compress("".join(keep(lines)).encode()))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A little of the data, and settings of a few updates."""
    data = tmp_path / "data"
    for source in SHIPPED.glob("*/*[!d]"):  # but for the *.md
        target = data / source.relative_to(SHIPPED)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.parent.name == "frames":
            repack(source, target, lambda lines: lines[:1] + lines[1::3][:400])
        elif source.suffix == ".xz":
            repack(source, target, lambda lines: lines[:41])
        else:
            target.write_bytes(source.read_bytes())
    (data / "tinyshakespeare.txt.xz").write_bytes(lzma.compress(TEXT.encode()))
    monkeypatch.setattr(road, "DATA", data)
    monkeypatch.setattr(shakespeare, "_SETTINGS", SETTINGS)
    monkeypatch.setattr(shakespeare, "_SHORT", {**SETTINGS, "steps": 2, "warmup": 0})
    for name in FIGURE:
        tiny = {**module(name)._SHORT, "hidden": 8, "batch_size": 8, "steps": 4, "warmup": 0}
        tiny["training.valid_every"] = 2
        monkeypatch.setattr(module(name), "_SHORT", tiny)
    # Networks that have learnt nothing write for long.
    for name in ("translate", "chat", "caption"):
        monkeypatch.setattr(module(name), "predict", _briefly(module(name).predict))
        monkeypatch.setattr(module(name), "evaluate_examples", _briefly(module(name).evaluate_examples))


def _briefly(function: Callable[..., Any]) -> Callable[..., Any]:
    from unrolled.decoding import BeamSettings
    from unrolled.prediction import Searching

    return lambda *given, **more: function(*given, **more, searching=Searching(BeamSettings(beam=1, max_length=6)))


def judged(monkeypatch: pytest.MonkeyPatch, name: str, value: float) -> None:
    """Have the demo's model be found so good."""
    real = module(name).evaluate_examples
    monkeypatch.setattr(
        module(name), "evaluate_examples", lambda *given, **more: {**real(*given, **more), FIGURE[name]: value}
    )


# --- Shakespeare


def test_the_demo_shows_all_of_it(tmp_path: Path) -> None:
    out = tmp_path / "my demo"
    done = run("--out", out)
    assert done.code == 0, done
    printed = done.out
    assert "Form: text -> next: many-to-many, aligned, autoregressive (language model).\n" in printed
    curve = re.findall(r"^  epoch +(\S+)  update +(\S+)  (\d\.\d{3})  (█+)$", printed, re.MULTILINE)
    assert [epoch for epoch, *_ in curve] == ["1", "2", "3", "4"]
    nats = [float(value) for *_, value, _ in curve]
    assert nats[-1] < nats[0]
    assert [len(bar) for *_, bar in curve] == pytest.approx([40 * value / max(nats) for value in nats], abs=0.6)

    rows = dict(re.findall(r"^  (\S.*?) {2,}(\d+\.\d{3} +\d+\.\d{3} +\d+\.\d\d)$", printed, re.MULTILINE))
    figures = {name: [float(value) for value in row.split()] for name, row in rows.items()}
    model = unrolled.load(out)
    text = encode_texts(road.DATA / "tinyshakespeare.txt.xz", model.vocabulary)
    learn, held_out = split_text(text, 0.1)
    symbols = len(model.vocabulary)
    expected = {
        "every character equally likely": math.log(symbols),
        "unigram: how frequent it is": float(NGram(learn.ids, 1, symbols).nats(held_out.ids).mean()),
        "trigram: given the two before it": float(NGram(learn.ids, 3, symbols).nats(held_out.ids).mean()),
        "this model (gru, 16 units)": evaluate(model, held_out).nats_per_char,
    }
    assert list(figures) == list(expected)
    for name, value in expected.items():
        assert figures[name] == pytest.approx([value, value / math.log(2), math.exp(value)], abs=0.006)
    assert expected["this model (gru, 16 units)"] < min(list(expected.values())[:-1])

    sample = printed.partition("It writes (temperature 0.8):\n\n")[2].partition(" seconds in all")[0]
    assert sample.startswith("ROMEO:")
    assert len(sample.rpartition("\n\n")[0]) == len("ROMEO:") + 400
    assert f"The model is in {out}. Try next:\n" in printed
    assert re.search(rf"^  unrolled generate '{out}' --prompt", printed, re.MULTILINE), "a path with a space is quoted"
    assert "  unrolled train --help" in printed


def test_a_model_that_learned_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_better(*args: Any, **options: Any) -> Any:
        return dataclasses.replace(evaluate(*args, **options), nats_per_char=2.0)

    monkeypatch.setattr(shakespeare, "evaluate_text", no_better)
    done = run("--short", "--out", tmp_path / "out")
    assert done.code == 2
    assert "error: the demo's model did not beat the baseline (unigram: how frequent it is); please report" in done.err
    assert "trigram" in done.out, "the figures that condemn it are shown"


def test_a_demo_that_was_run_before_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shakespeare, "evaluate_text", lambda *args, **options: evaluate(args[0], args[1].slice(0, 50)))
    out = tmp_path / "out"
    assert "did not beat the baseline" in run("--short", "--out", out).err
    weights = (out / "model.safetensors").read_bytes()
    assert f"error: {out} already holds a model" in run("--short", "--out", out).err
    assert (out / "model.safetensors").read_bytes() == weights
    monkeypatch.setattr(shakespeare, "_SHORT", {**SETTINGS, "steps": 2, "warmup": 0, "seed": 9})
    assert "did not beat the baseline" in run("--short", "--force", "--out", out).err
    assert (out / "model.safetensors").read_bytes() != weights


# --- the other forms


@pytest.mark.parametrize("name", FIGURE)
def test_each_demo_shows_all_of_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "caption":
        pytest.importorskip("PIL", reason="pictures are read with Pillow: pip install 'unrolled[image]'")
    judged(monkeypatch, name, BEST[name])
    monkeypatch.chdir(tmp_path)
    done = run(name, "--short")
    assert done.code == 0, done
    out = Path(f"demo-{name}")
    model = unrolled.load(out)
    assert f"Form: {model.form}.\n" in done.out
    curve = re.findall(r"^  epoch +\S+  update +(\d)  +\d+\.\d{3}  █*$", done.out, re.MULTILINE)
    assert curve == ["2", "4"]
    assert re.search(rf"^  {BASELINE[name]} {{2,}}\d", done.out, re.MULTILINE)
    assert re.search(rf"^  this model \({model.config.core.cell}, 8 units.*\) +\d", done.out, re.MULTILINE)
    assert f"The model is in {out}. Try next:\n  open {out}/report.html in a browser: a look inside" in done.out
    assert (out / "report.html").stat().st_size > 1_000_000
    assert "\n  unrolled " in done.out
    assert done.out.count("unrolled ") >= 3


@pytest.mark.parametrize("name", FIGURE)
def test_each_demo_fails_where_the_baseline_is_not_beaten(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "caption":
        pytest.importorskip("PIL", reason="pictures are read with Pillow: pip install 'unrolled[image]'")
    judged(monkeypatch, name, WORST[name])
    done = run(name, "--short", "--out", tmp_path / "out")
    assert done.code == 2
    assert re.search(
        rf"error: the demo's model did not beat the baseline \({BASELINE[name]}\); please report this", done.err
    )
    assert "this model (" in done.out, "the figures that condemn it are shown"


def test_pictures_without_pillow_are_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    done = run("caption", "--short", "--out", tmp_path / "out")
    assert (done.code, done.out) == (2, "")
    assert done.err == "error: reading images needs Pillow: pip install 'unrolled[image]'\n"


def test_an_unknown_demo_names_the_nearest() -> None:
    done = run("sentimnt")
    assert (done.code, done.err) == (2, "error: there is no demo 'sentimnt': did you mean 'sentiment'?\n")


def test_help_names_every_demo() -> None:
    done = run("--help")
    assert done.code == 0
    assert all(name in done.out for name in demo.DEMOS)


# --- baselines


def test_naive_bayes_by_hand() -> None:
    bayes = NaiveBayes(["aab", "b", "bb"], ["x", "y", "y"])
    # log 1/3 + log 3/6 for x against log 2/3 + log 1/6 for y
    assert bayes.answer("a") == "x"
    # log 1/3 + log 2/6 against log 2/3 + log 4/6
    assert bayes.answer("b") == "y"
    assert bayes.answer("") == "y"


def test_nearest_neighbour_shares_the_largest_part_of_the_words() -> None:
    near = NearestNeighbour(["Tom is here.", "Is Tom here now, too?", "Go!"], ["1", "2", "3"])
    assert [near.answer(text) for text in ("Tom is here!", "is tom HERE now", "go", "unheard")] == ["1", "2", "3", "1"]


def test_most_frequent_is_the_first_of_several() -> None:
    assert most_frequent(["b", "a", "a", "b"]) == "b"


def test_perplexity_of_counted_texts() -> None:
    texts = [np.array([0, 1]), np.array([0])]
    # Each symbol by itself: 0 and the end twice of 5, 1 once; 3 kinds of 4 symbols, the end and the start.
    p = {0: (2 + 3 / 4) / 8, 1: (1 + 3 / 4) / 8, "end": (2 + 3 / 4) / 8}
    nats = -math.log(p[0]) - math.log(p["end"])
    assert ngram_perplexity(texts, [np.array([0])], 1, 2) == pytest.approx(math.exp(nats / 2))
    # Seen before, order and all: better than chance, and never perfect.
    assert 1 < ngram_perplexity(texts, texts, 2, 2) < ngram_perplexity(texts, texts, 1, 2)


# --- what ships


def test_the_text_that_ships_is_the_one_its_source_names() -> None:
    text = lzma.decompress((SHIPPED / "tinyshakespeare.txt.xz").read_bytes())
    source = (SHIPPED / "SOURCE.md").read_text("utf-8")
    digest = re.search(r"uncompressed sha256\s+`([0-9a-f]{64})`", source)
    assert digest
    assert hashlib.sha256(text).hexdigest() == digest[1]
    size, kinds = re.search(r"([\d,]+) characters \((\d+) different ones\)", source).groups()  # type: ignore[union-attr]
    assert (len(text.decode()), len({*text.decode()})) == (int(size.replace(",", "")), int(kinds))


FILES = sorted(path.relative_to(SHIPPED).as_posix() for path in SHIPPED.glob("*/*") if path.suffix != ".md")


@pytest.mark.parametrize("name", FILES)
def test_every_file_that_ships_is_the_one_the_readme_names(name: str) -> None:
    readme = (SHIPPED / "README.md").read_text("utf-8")
    row = re.search(rf"^\| `{re.escape(name)}` \| ([\d,]+) \| ([\d,]+) \| `([0-9a-f]{{64}})`", readme, re.MULTILINE)
    assert row, f"{name}: the README has no line of it"
    packed = (SHIPPED / name).read_bytes()
    assert len(packed) == int(row[1].replace(",", ""))
    if name.endswith(".xz"):
        content = lzma.decompress(packed)
        assert hashlib.sha256(content).hexdigest() == row[3]
        assert content.count(b"\n") == int(row[2].replace(",", ""))


@pytest.mark.parametrize("name", FIGURE)
def test_every_set_that_ships_says_where_from_and_under_which_licence(name: str) -> None:
    source = (SHIPPED / name / "SOURCE.md").read_text("utf-8")
    assert "\n- From: " in source
    assert "\n- Licence: " in source


def test_what_ships_is_small() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 3e6


def test_every_translation_names_its_authors() -> None:
    for part in ("train", "valid", "test"):
        for line in lzma.decompress((SHIPPED / "translate" / f"{part}.jsonl.xz").read_bytes()).decode().splitlines():
            row = json.loads(line)
            korean, given = ([row[key]] if isinstance(row[key], str) else row[key] for key in ("ko", "attribution"))
            assert len(korean) == len(given)
            assert all("Attribution: tatoeba.org #" in text for text in given)
