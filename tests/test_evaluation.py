"""A model over a text: the figures are those of a plain loop, per character whatever the unit."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import ENGLISH, KOREAN, sentences, small_model

from unrolled.data import EncodedText, encode_texts
from unrolled.errors import ConfigError, DataError
from unrolled.evaluation import Evaluation, evaluate
from unrolled.model import LanguageModel

SUMS = 1e-11
"""Relative: two float64 sums of up to some thousand terms, each from some hundred operations rounded at 1.1e-16."""


@torch.no_grad()
def by_hand(model: LanguageModel, documents: Sequence[str]) -> tuple[float, int]:
    """The model's nats over these documents, one step after the other, and the number of predictions."""
    nats, count = [], 0
    for document in documents:
        ids = model.vocabulary.encode(document).tolist()
        state = model.begin()
        for now, following in itertools.pairwise(ids):
            scores, state = model.step(torch.tensor([now]), state)
            nats.append(-float(torch.log_softmax(scores[0], 0)[following].detach()))
            count += 1
    return math.fsum(nats), count


def write(folder: Path, **texts: str) -> list[Path]:
    paths = []
    for name, text in texts.items():
        paths.append(folder / f"{name}.txt")
        paths[-1].write_text(text, encoding="utf-8")
    return paths


def same(a: Evaluation, b: Evaluation) -> bool:
    """Equal but for the time it took."""
    return {**a.to_dict(), "seconds": 0} == {**b.to_dict(), "seconds": 0}


# Against a plain loop.


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_the_figure_is_that_of_a_plain_loop(cell: str, tmp_path: Path) -> None:
    documents = ["나는 닭이 ", "운다 ㅋㅋㅋ a 나는 학교에 갑니다", "집"]
    paths = write(tmp_path, b=documents[0], a=documents[1], c=documents[2])
    model = small_model(cell=cell, layers=2)
    nats, units = by_hand(model, documents)
    result = evaluate(model, paths)
    assert units == sum(len(text) - 1 for text in documents)
    assert (result.units, result.characters, result.unknown) == (units, units, 0)
    assert result.nats_per_char == pytest.approx(nats / units, rel=SUMS)


def test_a_text_longer_than_the_pieces_it_is_read_in(tmp_path: Path) -> None:
    text = sentences("나는 집에 닭이 a", 500)
    assert len(text) > 2 * 2048  # the longest piece that is computed at once
    model = small_model(hidden=4)
    nats, units = by_hand(model, [text])
    assert evaluate(model, write(tmp_path, a=text)).nats_per_char == pytest.approx(nats / units, rel=SUMS)


@settings(max_examples=30)
@given(parts=st.lists(st.sampled_from(["a", "나", " ", "\n", "\n\n", "닭이\n"]), min_size=1, max_size=12))
def test_documents_of_any_kind_against_the_loop(parts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    text = "".join(parts)
    paths = write(tmp_path_factory.getbasetemp(), parts=text)
    models = {kind: small_model(documents=kind, hidden=3) for kind in ("file", "line", "paragraph")}
    for kind, model in models.items():
        documents = split_documents(text, kind)
        nats, units = by_hand(model, documents)
        if units == 0:
            with pytest.raises(DataError):
                evaluate(model, paths)
        else:
            result = evaluate(model, paths)
            assert result.units == units
            assert result.nats_per_char == pytest.approx(nats / units, rel=SUMS)


def split_documents(text: str, kind: str) -> list[str]:
    """Where a line, or a line after a blank line, that is not blank begins, a document does."""
    if kind == "file":
        return [text]
    documents: list[str] = []
    before_is_blank = True
    for line in text.splitlines(keepends=True):
        blank = not line.strip(" \t\n")
        begins = not blank and (kind == "line" or before_is_blank)
        if documents and (not begins or not documents[-1].strip(" \t\n")):
            documents[-1] += line
        else:
            documents.append(line)
        before_is_blank = blank
    return documents


# Per character, whatever the unit.


@pytest.mark.parametrize("unit", ["jamo", "word", "subword"])
@pytest.mark.parametrize("documents", [["나는 닭이 운다.\n학교에 갑니다", "갑니다 a ㅋㅋㅋ."], ["닭이"], ["a a a\na."]])
def test_figures_are_per_character_of_the_text(unit: str, documents: list[str], tmp_path: Path) -> None:
    model = small_model(unit, KOREAN + "닭이\na a a\na.\n나는 운다. ㅋㅋㅋ.")
    assert not any(model.vocabulary.missing(text) for text in documents)
    paths = write(tmp_path, **{f"text{number}": text for number, text in enumerate(documents)})
    nats, units = by_hand(model, documents)
    if units == 0:
        with pytest.raises(DataError, match="symbol"):
            evaluate(model, paths)
        return
    # A document's first symbol is read and not predicted, so the characters that begin in it are not counted.
    characters = 0
    for text in documents:
        first = model.vocabulary.decode(model.vocabulary.encode(text)[:1])
        characters += len(text) - (1 if unit == "jamo" else len(first.rstrip("\ufffd")) or 1)
    result = evaluate(model, paths)
    assert result.units == units
    assert result.characters == characters
    assert result.nats_per_char == pytest.approx(nats / characters, rel=SUMS)
    assert result.nats_per_unit == pytest.approx(nats / units, rel=SUMS)


def test_jamo_and_characters_count_alike(tmp_path: Path) -> None:
    paths = write(tmp_path, a=KOREAN[:300], b=ENGLISH[:100])
    characters = {
        unit: evaluate(small_model(unit, KOREAN + ENGLISH), paths).characters for unit in ("char", "jamo", "subword")
    }
    assert characters["char"] == characters["jamo"] == 398
    assert characters["subword"] <= 398


def test_equal_odds_cost_the_logarithm_of_the_vocabulary(tmp_path: Path) -> None:
    model = small_model()
    with torch.no_grad():
        model.writer.weight.zero_()
        model.writer.bias.zero_()
    result = evaluate(model, write(tmp_path, a=KOREAN[:200]))
    assert result.perplexity == pytest.approx(len(model.vocabulary), rel=SUMS)
    assert result.nats_per_char == pytest.approx(math.log(len(model.vocabulary)), rel=SUMS)


@pytest.mark.parametrize("unit", ["char", "jamo", "word", "subword"])
def test_bits_and_perplexity_follow_from_nats(unit: str, tmp_path: Path) -> None:
    result = evaluate(small_model(unit), write(tmp_path, a=KOREAN[:400]))
    assert result.bits_per_char == pytest.approx(result.nats_per_char / math.log(2), rel=1e-15)
    assert result.perplexity == pytest.approx(math.exp(result.nats_per_unit), rel=1e-14)
    total = result.nats_per_unit * result.units
    assert result.nats_per_char * result.characters == pytest.approx(total, rel=1e-14)
    assert result.seconds > 0
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()


def test_unknown_symbols_are_counted_and_cost_as_one(tmp_path: Path) -> None:
    model = small_model("char", "ab\n" * 9)
    result = evaluate(model, write(tmp_path, a="ab한글b"))
    assert result.unknown == 2
    known = np.array([1, 2, 0, 0, 2]) if model.vocabulary.encode("a")[0] == 1 else model.vocabulary.encode("ab한글b")
    nats = by_hand_ids(model, known.tolist())
    assert result.nats_per_char == pytest.approx(nats / 4, rel=SUMS)
    assert evaluate(model, write(tmp_path, b="abab")).unknown == 0


def by_hand_ids(model: LanguageModel, ids: list[int]) -> float:
    scores, _ = model(torch.tensor(ids[:-1])[:, None])
    return -sum(float(torch.log_softmax(row[0], 0)[i].detach()) for row, i in zip(scores, ids[1:], strict=True))


# Lanes.


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    lanes=st.integers(2, 12),
    extra=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_lanes_that_warm_up_from_the_start_are_exact(sizes: list[int], lanes: int, extra: int, seed: int) -> None:
    model = small_model(hidden=3)
    draw = np.random.default_rng(seed)
    ids = draw.integers(0, len(model.vocabulary), sum(sizes)).astype(np.uint8)
    text = EncodedText(ids, starts=np.cumsum([0, *sizes[:-1]]))
    if sum(sizes) - len(sizes) == 0:
        return
    exact = evaluate(model, text)
    many = evaluate(model, text, lanes=lanes, warm=len(ids) + extra)
    assert many.nats_per_char == pytest.approx(exact.nats_per_char, rel=SUMS)
    assert (many.units, many.characters) == (exact.units, exact.characters)


def test_lanes_warm_up_only_as_far_as_they_are_told(tmp_path: Path) -> None:
    (path,) = write(tmp_path, a=KOREAN)
    model = small_model(hidden=12)
    exact = evaluate(model, path).nats_per_char
    cold = evaluate(model, path, lanes=9, warm=0)
    warm = evaluate(model, path, lanes=9, warm=100)
    assert cold.units == len(KOREAN) - 1
    assert cold.nats_per_char != pytest.approx(exact, rel=1e-7)
    # The state forgets: what came before 100 steps is all but gone.
    assert warm.nats_per_char == pytest.approx(exact, rel=1e-3)
    assert abs(warm.nats_per_char - exact) < abs(cold.nats_per_char - exact)


def test_more_lanes_than_symbols(tmp_path: Path) -> None:
    (path,) = write(tmp_path, a="나는 a")
    model = small_model()
    assert same(evaluate(model, path, lanes=1000), evaluate(model, path, lanes=3))


# What is read.


def test_files_are_documents_so_their_order_does_not_matter(tmp_path: Path) -> None:
    a, b = write(tmp_path, a=KOREAN[:80], b=ENGLISH[:50])
    model = small_model("char", KOREAN + ENGLISH)
    forwards, backwards, folder = evaluate(model, [a, b]), evaluate(model, [b, a]), evaluate(model, tmp_path)
    assert backwards.nats_per_char == pytest.approx(forwards.nats_per_char, rel=SUMS)
    assert same(folder, forwards)
    (joined,) = write(tmp_path, joined=KOREAN[:80] + ENGLISH[:50])
    assert evaluate(model, joined).units == forwards.units + 1


def test_a_text_that_is_encoded_already(tmp_path: Path) -> None:
    (path,) = write(tmp_path, a=KOREAN[:80])
    model = small_model()
    assert same(evaluate(model, encode_texts(path, model.vocabulary)), evaluate(model, str(path)))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("나는 \ufffd a".encode().replace("\ufffd".encode(), b"\xff"))
    model = small_model()
    with pytest.raises(DataError, match=r"byte 7 \(0xff\) is no UTF-8"):
        evaluate(model, path)
    assert evaluate(model, path, errors="replace").unknown == 1
    assert evaluate(small_model(errors="replace"), path).unknown == 1
    with pytest.raises(DataError):
        evaluate(small_model(errors="replace"), path, errors="strict")


@pytest.mark.parametrize(
    "texts, message",
    [
        ({"a": "나"}, "the text has 1 symbol; evaluating takes at least 2, one to read and one to predict"),
        ({"a": "나", "b": "a"}, "every document of the text is a single symbol: there is nothing to predict"),
        ({"a": ""}, "there is no text in"),
    ],
)
def test_a_text_that_is_too_short(texts: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        evaluate(small_model(), write(tmp_path, **texts))


def test_ranges(tmp_path: Path) -> None:
    paths = write(tmp_path, a="나는")
    with pytest.raises(ConfigError, match=r"lanes: expected at least 1, got 0"):
        evaluate(small_model(), paths, lanes=0)
    with pytest.raises(ConfigError, match=r"warm: expected at least 0 symbols, got -1"):
        evaluate(small_model(), paths, warm=-1)


# What the caller sees of it.


class Steps:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def start(self, what: str, total: float, done: float = 0) -> None:
        self.told.append(("start", what, total, done))

    def update(self, done: float, note: str = "") -> None:
        self.told.append(("update", done, note))

    def say(self, line: str) -> None:
        self.told.append(("say", line))

    def stop(self) -> None:
        self.told.append(("stop",))


def test_progress_goes_from_nothing_to_all(tmp_path: Path) -> None:
    paths = write(tmp_path, a=sentences("나는 a", 600))
    steps = Steps()
    result = evaluate(small_model(hidden=2), paths, watcher=steps)
    first, *updates, last = steps.told
    total = result.units
    assert first == ("start", "evaluating", total, 0)
    assert last == ("stop",)
    assert [update[1] for update in updates] == sorted({*range(2048, total, 2048), total})
    assert updates[-1][2] == f"{result.nats_per_unit:.4f} nats per symbol"


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool, tmp_path: Path) -> None:
    paths = write(tmp_path, a=KOREAN[:100])
    model = small_model(dropout=0.5, layers=2).train(training)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    random_state = torch.get_rng_state()
    first, second = evaluate(model, paths), evaluate(model, paths)
    assert same(first, second), "dropout was on"
    assert model.training == training
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_an_interrupted_evaluation_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    class Interrupt(Steps):
        def update(self, done: float, note: str = "") -> None:
            raise KeyboardInterrupt

    watcher, model = Interrupt(), small_model().train()
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, write(tmp_path, a=KOREAN[:100]), watcher=watcher)
    assert model.training
    assert watcher.told[-1] == ("stop",)
