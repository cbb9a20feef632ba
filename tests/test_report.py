"""Reports: every form has one, what it lacks is left out, what is wrong is said in a line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from samples import ENGLISH, KOREAN, small_model
from test_written import SOURCE, TARGET, translator

import unrolled
import unrolled.progress
from unrolled.checkpoints import save
from unrolled.errors import ConfigError, DataError, ModelError, StorageError
from unrolled.evaluation import evaluate
from unrolled.report import Report, compare, given, inspect
from unrolled.trace import load_trace, record, save_trace
from unrolled.trace.looking import entropy, monotonicity

TINY = {"hidden": 8, "layers": 1, "epochs": 1, "batch_size": 4}


def names(report: Report) -> list[str]:
    return [section.name for section in report.sections]


def trained(out: Path, rows: list[dict[str, Any]], **settings: Any) -> Path:
    torch.manual_seed(0)
    unrolled.train(rows, out, report=True, **{**TINY, **settings})
    return out


SENTENCES = ["the cat sat", "a dog sat on a mat", "the old cat", "red sun and hill", "a cat", "the dog saw the sun"] * 4
TAGS = {"the": "D", "a": "D", "and": "C", "on": "P"}


def forms() -> dict[str, tuple[Callable[[], list[dict[str, Any]]], dict[str, Any], set[str]]]:
    rng = np.random.default_rng(0)
    common = {"answer", "unrolled", "states", "gradient", "learning"}

    def tags(text: str) -> str:
        return " ".join(TAGS.get(word, "N") for word in text.split())

    def series() -> list[dict[str, Any]]:
        return [
            {"x": float(rng.normal()), "y": float(t), "l": "ab"[g % 2], "ls": "abc"[t % 3], "g": str(g)}
            for g in range(24)
            for t in range(6)
        ]

    return {
        "label": (
            lambda: [{"t": text, "l": "xy"["cat" in text]} for text in SENTENCES],
            {"input": "text:t", "output": "label:l", "input.embedding": 4},
            {*common, "units", "samples"},
        ),
        "labels": (
            lambda: [{"t": text, "l": tags(text)} for text in SENTENCES],
            {"input": "text:t", "output": "labels:l"},
            {*common, "next", "units", "samples"},
        ),
        "number": (
            lambda: [{"t": text, "n": float(len(text))} for text in SENTENCES],
            {"input": "text:t", "output": "number:n"},
            {*common, "units", "samples"},
        ),
        "series to labels": (series, {"input": "series:x,y", "output": "labels:ls", "group": "g"}, {*common, "next"}),
        "series to label": (series, {"input": "series:x,y", "output": "label:l", "group": "g"}, common),
        "attention": (
            lambda: [{"s": text, "t": text.upper()} for text in SENTENCES],
            {"input": "text:s", "output": "text:t", "unit": "word", "input.embedding": 4, "output.embedding": 4},
            {*common, "attention", "next", "units", "samples"},
        ),
        "no attention": (
            lambda: [{"s": text, "t": text.upper()} for text in SENTENCES],
            {"input": "text:s", "output": "text:t", "attention": "none", "input.embedding": 4, "output.embedding": 4},
            {*common, "next", "units", "samples"},
        ),
        "one to one": (
            lambda: [{"v": [float(i), float(i % 3)], "l": "ab"[i % 2]} for i in range(24)],
            {"input": "vector:v", "output": "label:l"},
            common,
        ),
        "one to many": (
            lambda: [{"v": [float(i), float(i % 3)], "t": text} for i, text in enumerate(SENTENCES)],
            {"input": "vector:v", "output": "text:t"},
            {*common, "next"},
        ),
    }


@pytest.mark.parametrize("form", list(forms()))
def test_every_form_has_its_report(tmp_path: Path, form: str) -> None:
    rows, settings, expected = forms()[form]
    out = trained(tmp_path / "m", rows(), **settings)
    page = (out / "report.html").read_text("utf-8")
    assert set(re.findall(r'<section id="([a-z]+)">', page)) == expected
    report = inspect(out)
    assert report.html() == page, "what a training leaves is what inspect shows"
    assert len(page.encode()) < 8_000_000


def test_a_forecast_has_its_report(tmp_path: Path) -> None:
    wave = np.sin(np.arange(200) / 3)
    rows = [{"x": float(x)} for x in wave]
    out = tmp_path / "m"
    unrolled.train(rows, out, input="series:x", output="next", horizon=2, report=True, **TINY, window=16)
    page = (out / "report.html").read_text("utf-8")
    assert set(re.findall(r'<section id="([a-z]+)">', page)) == {"answer", "unrolled", "states", "gradient", "learning"}
    read = inspect(out, wave[:30, None]).traces[""]
    assert len(read.tensors["numbers"]) == 30


def test_a_language_model_reads_what_it_is_given_or_writes() -> None:
    model = small_model(text=ENGLISH, dtype=torch.float32)
    report = inspect(model, ENGLISH[:50])
    assert names(report) == ["answer", "unrolled", "next", "states", "units", "gradient", "samples"]
    assert "".join(report.traces[""].read) == ENGLISH[:50]
    own = inspect(model)
    assert len(own.traces[""].read) >= 200
    assert "what it wrote itself" in own.sections[0].body
    assert inspect(model).html() == own.html()


def test_the_surprise_is_the_models_own() -> None:
    model = small_model(text=ENGLISH, dtype=torch.float32)
    report = inspect(model, ENGLISH[:50])
    scores = report.traces[""].tensors["chosen.score"][:-1]
    assert f"on average {float(-scores.mean()) / np.log(2):.2f} bits" in report.sections[0].text


def test_a_loaded_trace_gives_the_same_page(tmp_path: Path) -> None:
    trace = record(translator(torch.float32), SOURCE, expected=TARGET, gradient=True, at=-1)
    save_trace(trace, tmp_path / "a.trace")
    assert inspect(tmp_path / "a.trace").html() == inspect(trace).html()
    assert names(inspect(trace)) == ["answer", "unrolled", "attention", "next", "states", "units", "gradient"]


def test_the_sentence_on_attention_has_its_figures() -> None:
    trace = record(translator(torch.float32), SOURCE, expected=TARGET)
    (section,) = inspect(trace, show=["attention"]).sections
    words = trace.attention[:-1]
    assert f"{float(entropy(words).mean()):.2f} bits" in section.text
    assert f"{monotonicity(words):.0%}" in section.text
    weights = json.loads(
        re.search(r'<script type="application/json">(.*?)</script>', inspect(trace).sections[0].body)[1]
    )
    np.testing.assert_allclose(weights, trace.attention, atol=5e-5)


def test_text_cannot_break_out_of_the_page() -> None:
    nasty = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    model = small_model(text=nasty + ENGLISH, dtype=torch.float32)
    page = inspect(model, nasty).html()
    assert "<script>alert" not in page
    assert "<img src" not in page
    assert page.count("</script>") == 4


def test_korean_stands_in_the_page_as_it_is(tmp_path: Path) -> None:
    report = inspect(small_model(dtype=torch.float32), "나는 학교에 갑니다.")
    report.save(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_bytes().decode("utf-8")
    assert ">학</span>" in page
    assert "Noto Sans CJK KR" in page


def test_two_models_side_by_side(tmp_path: Path) -> None:
    models = {}
    for cell in ("lstm", "gru"):
        model = small_model(text=ENGLISH, dtype=torch.float32, cell=cell)
        save(model, tmp_path / cell)
        models[cell] = model
    report = compare(tmp_path / "lstm", tmp_path / "gru", ENGLISH[:40])
    assert names(report) == ["settings", "answer", "answer-2", "next", "next-2", "gradient"]
    assert "<td>core.cell</td><td>lstm</td><td>gru</td>" in report.sections[0].body
    curves = report.sections[-1].figures[0].data
    assert [curve.name for curve in curves] == ["lstm, layer 1", "lstm, layer 1, c", "gru, layer 1"]
    for cell, model in models.items():
        scores = record(model, ENGLISH[:40]).tensors["chosen.score"][:-1]
        bits = float(-scores.sum()) / np.log(2) / 39
        assert any(f"<b>{bits:.3f} bits per character.</b>" in section.text for section in report.sections), cell
    with pytest.raises(ModelError, match="expected two model folders, got a trace"):
        compare(record(models["gru"], "the cat"), tmp_path / "gru")


def test_models_of_different_symbols_are_compared_per_character(tmp_path: Path) -> None:
    """As `evaluate` counts: a syllable of three jamo is one character."""
    text = "한국어를 잘 합니다."
    found = {}
    for unit in ("char", "jamo"):
        model = small_model(text=text, dtype=torch.float32, unit=unit)
        save(model, tmp_path / unit)
        (tmp_path / "text.txt").write_text(text, "utf-8")
        found[unit] = evaluate(model, tmp_path / "text.txt").bits_per_char
    report = compare(tmp_path / "char", tmp_path / "jamo", text)
    for unit, bits in found.items():
        assert any(f"<b>{bits:.3f} bits per character.</b>" in section.text for section in report.sections), unit


@pytest.mark.parametrize(
    "norms, clip, said",
    [
        ([0.5, 2.0, 8.0, 0.9], 1.0, "clipping at 1 cut it down in 50% of the logged updates, at the most 8-"),
        ([0.5, 0.25], 1.0, "was 0.5 in the middle and 0.5 at the most: clipping at 1 never had to act."),
        ([3.0], None, "was 3 in the middle and 3 at the most; it was not clipped."),
    ],
)
def test_what_clipping_did_is_told(norms: list[float], clip: float | None, said: str, tmp_path: Path) -> None:
    model = small_model(text=ENGLISH, dtype=torch.float32, clip=clip)
    save(model, tmp_path / "m")
    lines = [{"kind": "train", "step": n, "loss": 3.0, "norm": norm} for n, norm in enumerate(norms, 1)]
    (tmp_path / "m" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    (learning,) = [section for section in inspect(tmp_path / "m", "the cat").sections if section.name == "learning"]
    assert said in learning.text


def test_steps_cut_what_is_read() -> None:
    assert len(inspect(small_model(text=ENGLISH, dtype=torch.float32), ENGLISH, steps=25).traces[""].read) == 25
    long = inspect(small_model(text=ENGLISH, dtype=torch.float32), ENGLISH)
    assert len(long.traces[""].read) == 300
    assert "The first 300 symbols are read" in long.sections[0].body
    assert len(inspect(translator(torch.float32), SOURCE, steps=2).traces[""].read) == 2
    with pytest.raises(DataError, match="steps: expected at least 1, got 0"):
        inspect(translator(torch.float32), SOURCE, steps=0)


def test_what_cannot_be_shown_is_said(tmp_path: Path) -> None:
    model = small_model(text=ENGLISH, dtype=torch.float32)
    with pytest.raises(ModelError, match=r"attention cannot be shown: no decoder with attention .* --attention dot"):
        inspect(model, "the cat", show=["attention"])
    with pytest.raises(ConfigError, match=r"unknown section 'atention': did you mean 'attention'"):
        inspect(model, "the cat", show=["atention"])
    with pytest.raises(DataError, match="the text is empty"):
        inspect(model, "")
    with pytest.raises(ModelError, match="a run that was recorded already"):
        inspect(record(model, "the cat"), "a dog")
    with pytest.raises(StorageError, match="no such model folder"):
        inspect(tmp_path / "nowhere")
    with pytest.raises(StorageError, match=r"folder .*nowhere does not exist"):
        inspect(model, "the cat").save(tmp_path / "nowhere" / "r.html")
    with pytest.raises(StorageError, match="it is a folder, expected the name of a file"):
        inspect(model, "the cat").save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_read_and_a_table_brings_what_should_come_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat\n", "utf-8")
    model = small_model(text=ENGLISH, dtype=torch.float32)
    assert "".join(inspect(model, given(str(tmp_path / "a.txt"))).traces[""].read) == "the cat sat\n"
    rows, settings, _ = forms()["labels"]
    out = trained(tmp_path / "m", rows(), **settings)
    (tmp_path / "t.tsv").write_text("t\tl\nthe cat\tD N\n", "utf-8")
    assert inspect(out, given(str(tmp_path / "t.tsv"))).traces[""].expected == ("D", "N")


def test_values_show_themselves_in_a_notebook() -> None:
    model = small_model(dtype=torch.float32)
    assert "many-to-many, aligned, autoregressive" in model._repr_html_()
    trace = record(model, "나는 집에")
    assert "<b>Trace</b>" in trace._repr_html_()
    assert ">나</span>" in trace._repr_html_()
    assert inspect(trace)._repr_html_().startswith("<iframe srcdoc=")


def test_a_training_ends_well_whatever_becomes_of_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Listener(unrolled.progress.Silent):
        def say(self, line: str) -> None:
            said.append(line)

    def fail(*_: Any, **__: Any) -> Report:
        raise RuntimeError("no room\nleft")

    text = tmp_path / "a.txt"
    text.write_text(ENGLISH, "utf-8")
    monkeypatch.setattr("unrolled.report.inspect", fail)
    settings = {**TINY, "window": 16}
    model = unrolled.train(text, tmp_path / "m", watcher=Listener(), report=True, **settings)
    assert said[-1] == f"note: {tmp_path / 'm' / 'report.html'} could not be written: no room left"
    assert model.form.example == "language model"
    monkeypatch.undo()
    unrolled.train(text, tmp_path / "plain", **settings)
    assert not (tmp_path / "plain" / "report.html").exists()
    unrolled.train(text, tmp_path / "m", force=True, report=True, **settings)
    assert (tmp_path / "m" / "report.html").exists()
    unrolled.train(text, tmp_path / "m", resume=True, **{**settings, "epochs": 2})
    unrolled.train(text, tmp_path / "m", force=True, **settings)
    assert not (tmp_path / "m" / "report.html").exists(), "an earlier model's report goes with it"


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "unrolled", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=cwd)


def test_the_commands(tmp_path: Path) -> None:
    """One after the other, since each starts an interpreter: inspect with a trace, the trace itself, a mistake."""
    save(small_model(text=KOREAN, dtype=torch.float32), tmp_path / "ko")
    done = run("inspect", tmp_path / "ko", "나는 집에 갑니다", "--trace", "a.trace", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "report.html: open it in a browser\n")
    assert "".join(load_trace(tmp_path / "a.trace").read) == "나는 집에 갑니다"
    (tmp_path / "a.trace").write_bytes((tmp_path / "a.trace").read_bytes()[:-9])
    done = run("inspect", "a.trace", "--out", "b.html", cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(r"error: a\.trace is damaged: [^\n]*\n", done.stderr)
    assert not (tmp_path / "b.html").exists()
