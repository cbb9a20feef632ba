"""The demo on a shrunken text with shrunken settings, and the text that ships."""

from __future__ import annotations

import dataclasses
import hashlib
import lzma
import math
import re
from pathlib import Path
from typing import Any

import pytest

import unrolled
from unrolled import demo
from unrolled.data import encode_texts, split_text
from unrolled.errors import StorageError, TrainingError
from unrolled.evaluation import evaluate
from unrolled.ngram import NGram
from unrolled.progress import Silent

DATA = Path(demo.__file__).parent / "demo_data"

# What comes after "ba" needs more than two symbols of memory, so a small network beats a trigram soon.
TEXT = ("ROMEO:\n" + "ababac" * 12 + "\n") * 80
SETTINGS = {
    "cell": "gru", "hidden": 16, "layers": 1, "dropout": 0.0, "window": 32, "batch_size": 4, "lr": 0.03, "warmup": 5,
    "epochs": 4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = tmp_path / "demo_data" / "tinyshakespeare.txt.xz"
    text.parent.mkdir()
    text.write_bytes(lzma.compress(TEXT.encode()))
    monkeypatch.setattr(demo, "files", lambda package: {"unrolled": tmp_path}[package])
    monkeypatch.setattr(demo, "_SETTINGS", SETTINGS)
    monkeypatch.setattr(demo, "_SHORT", {**SETTINGS, "steps": 2, "warmup": 0})


def run(out: Path, **options: Any) -> None:
    demo.run_demo(out, **{"short": False, "force": False, "watcher": Silent(), **options})


def test_the_demo_shows_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "my demo"
    run(out)
    printed = capsys.readouterr().out
    curve = re.findall(r"^  epoch +(\S+)  update +(\S+)  (\d\.\d{3})  (█+)$", printed, re.MULTILINE)
    assert [epoch for epoch, *_ in curve] == ["1", "2", "3", "4"]
    nats = [float(value) for *_, value, _ in curve]
    assert nats[-1] < nats[0]
    assert [len(bar) for *_, bar in curve] == pytest.approx([40 * value / max(nats) for value in nats], abs=0.6)

    rows = dict(re.findall(r"^  (\S.*?) {2,}(\d+\.\d{3} +\d+\.\d{3} +\d+\.\d\d)$", printed, re.MULTILINE))
    figures = {name: [float(value) for value in row.split()] for name, row in rows.items()}
    model = unrolled.load(out)
    learn, held_out = split_text(encode_texts(tmp_path / "demo_data", model.vocabulary), 0.1)
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


def test_a_model_that_learned_nothing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_better(*args: Any, **options: Any) -> Any:
        return dataclasses.replace(evaluate(*args, **options), nats_per_char=2.0)

    monkeypatch.setattr(demo, "evaluate_text", no_better)
    with pytest.raises(TrainingError, match="the demo's model did not beat the counted baselines; please report this"):
        run(tmp_path / "out", short=True)
    assert "trigram" in capsys.readouterr().out, "the figures that condemn it are shown"


def test_a_demo_that_was_run_before_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "evaluate_text", lambda *args, **options: evaluate(*args[:1], args[1].slice(0, 50)))
    out = tmp_path / "out"
    with pytest.raises(TrainingError):
        run(out, short=True)
    weights = (out / "model.safetensors").read_bytes()
    with pytest.raises(StorageError, match="already holds a model"):
        run(out, short=True)
    assert (out / "model.safetensors").read_bytes() == weights
    monkeypatch.setattr(demo, "_SHORT", {**SETTINGS, "steps": 2, "warmup": 0, "seed": 9})
    with pytest.raises(TrainingError):
        run(out, short=True, force=True)
    assert (out / "model.safetensors").read_bytes() != weights


def test_the_text_that_ships_is_the_one_its_source_names() -> None:
    text = lzma.decompress((DATA / "tinyshakespeare.txt.xz").read_bytes())
    source = (DATA / "SOURCE.md").read_text("utf-8")
    digest = re.search(r"uncompressed sha256\s+`([0-9a-f]{64})`", source)
    assert digest
    assert hashlib.sha256(text).hexdigest() == digest[1]
    size, kinds = re.search(r"([\d,]+) characters \((\d+) different ones\)", source).groups()  # type: ignore[union-attr]
    assert (len(text.decode()), len({*text.decode()})) == (int(size.replace(",", "")), int(kinds))
