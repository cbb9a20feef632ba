"""Scores: against cases counted by hand, and against the definitions written out."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unrolled.errors import DataError
from unrolled.kinds.contract import Answer, Score
from unrolled.kinds.scores import LabelScore, NumberScore, SeriesScore, TagScore, TextScore, render

ROUNDING = 1e-12
"""Relative: float64 sums of at most some hundred terms."""


def answer(value: Any, **details: Any) -> Answer:
    return Answer(value, str(value), details)


def scored(score: Score, *pairs: tuple[Any, Any]) -> dict[str, Any]:
    """The figures after these (answer's value, expected)."""
    for value, expected in pairs:
        score.add(answer(value), expected)
    figures = score.figures()
    json.dumps(figures, allow_nan=False)
    return figures


def near(expected: Any) -> Any:
    return pytest.approx(expected, rel=ROUNDING)


# Labels.


def test_labels_counted_by_hand() -> None:
    figures = scored(
        LabelScore(["a", "b", "c"]), ("a", "a"), ("a", "a"), ("a", "b"), ("b", "b"), ("b", "a"), ("a", "b")
    )
    assert figures["labels"] == {
        "a": {"precision": 2 / 4, "recall": 2 / 3, "f1": near(4 / 7), "expected": 3, "answered": 4},
        "b": {"precision": 1 / 2, "recall": 1 / 3, "f1": near(2 / 5), "expected": 3, "answered": 2},
    }
    assert figures["accuracy"] == figures["micro_f1"] == 3 / 6
    assert figures["macro_f1"] == near((4 / 7 + 2 / 5) / 2), "c occurs nowhere, and does not count"
    assert figures["confusion"] == {"names": ["a", "b"], "counts": [[2, 1], [2, 1]]}
    assert (figures["examples"], figures["unseen"], figures["unseen_labels"]) == (6, 0, {})


def test_a_label_that_is_only_answered_or_only_expected_counts_with_f1_0() -> None:
    figures = scored(LabelScore(["a", "b", "c"]), ("a", "a"), ("b", "c"))
    assert figures["macro_f1"] == near(1 / 3)
    assert figures["labels"]["b"] == {"precision": 0, "recall": 0, "f1": 0, "expected": 0, "answered": 1}
    assert figures["labels"]["c"] == {"precision": 0, "recall": 0, "f1": 0, "expected": 1, "answered": 0}


def test_labels_that_training_never_saw_count_as_wrong_and_are_named() -> None:
    figures = scored(LabelScore(["a", "b"]), ("a", "a"), ("a", "z"), ("b", "y"), ("b", "z"))
    assert figures["accuracy"] == 1 / 4
    assert (figures["unseen"], figures["unseen_labels"]) == (3, {"z": 2, "y": 1})
    assert figures["confusion"]["names"] == ["a", "b", "y", "z"], "by the names' order, then the alphabet"
    assert figures["confusion"]["counts"] == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0]]
    assert figures["macro_f1"] == near((2 / 3 + 0 + 0 + 0) / 4)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcdxy")), min_size=1))
def test_labels_are_the_definitions_written_out(pairs: list[tuple[str, str]]) -> None:
    figures = scored(LabelScore("abcd"), *pairs)
    f1 = []
    for name in {name for pair in pairs for name in pair}:
        right = sum(found == wanted == name for found, wanted in pairs)
        f1.append(2 * right / sum((found == name) + (wanted == name) for found, wanted in pairs))
    assert figures["macro_f1"] == near(sum(f1) / len(f1))
    assert figures["accuracy"] == near(sum(found == wanted for found, wanted in pairs) / len(pairs))
    assert sum(map(sum, figures["confusion"]["counts"])) == figures["examples"] == len(pairs)


# Tags.


def test_tags_are_counted_by_token() -> None:
    figures = scored(TagScore(["NOUN", "VERB"]), (["NOUN", "VERB", "VERB"], "NOUN  VERB\tNOUN"), (["NOUN"], ["ADJ"]))
    assert figures["accuracy"] == figures["micro_f1"] == 2 / 4
    assert (figures["examples"], figures["tokens"], figures["unseen_labels"]) == (2, 4, {"ADJ": 1})
    assert figures["macro_f1"] == near((1 / 2 + 2 / 3 + 0) / 3)
    assert figures["confusion"]["names"] == ["NOUN", "VERB", "ADJ"]
    assert "span_f1" not in figures


def test_as_many_tags_must_be_expected_as_answered() -> None:
    with pytest.raises(DataError, match=r"^labels: expected one for each of 2 answered, got 3$"):
        TagScore(["a", "b"]).add(answer(["a", "b"]), "a b a")


BIO = ["B-X", "I-X", "B-Y", "I-Y", "O"]


@pytest.mark.parametrize(
    "expected, answered, right, wanted, found",
    [
        ("B-X I-X O", "B-X I-X O", 1, 1, 1),
        ("B-X I-X O", "B-X O O", 0, 1, 1),  # half a span is none
        ("B-X I-X", "B-X B-X", 0, 1, 2),  # B ends a span and begins one
        ("B-X O", "I-X O", 1, 1, 1),  # I after nothing begins a span
        ("O B-X I-X", "O I-X I-X", 1, 1, 1),  # I after O too
        ("B-X B-Y", "B-X I-Y", 2, 2, 2),  # and I of another type
        ("B-X B-Y I-Y", "I-X I-Y I-Y", 2, 2, 2),
        ("B-X I-X", "B-Y I-Y", 0, 1, 1),  # the type counts
        ("B-X I-X I-X", "B-X I-X I-Y", 0, 1, 2),
        ("B-X", "B-X", 1, 1, 1),  # the sequence's end ends a span
        ("O O", "B-X O", 0, 0, 1),
        ("B-X O", "O O", 0, 1, 0),
        ("O", "O", 0, 0, 0),
        ("B-Z odd I-Z", "B-X O O", 0, 2, 1),  # unseen types are spans; what is no such tag is O
    ],
)
def test_spans_counted_by_hand(expected: str, answered: str, right: int, wanted: int, found: int) -> None:
    figures = scored(TagScore(BIO), (answered.split(), expected))
    assert figures["spans"] == wanted
    assert figures["span_precision"] == (right / found if found else 0)
    assert figures["span_recall"] == (right / wanted if wanted else 0)
    assert figures["span_f1"] == (2 * right / (wanted + found) if wanted + found else 0)


def test_spans_do_not_run_from_one_sequence_into_the_next() -> None:
    figures = scored(TagScore(BIO), (["B-X"], "B-X"), (["I-X"], "I-X"))
    assert (figures["spans"], figures["span_f1"]) == (2, 1)


@pytest.mark.parametrize(
    "names, bio",
    [
        (BIO, True),
        (["I-X", "O"], True),
        (["B", "I", "O"], True),  # one type without a name
        (["B-X-1", "O"], True),
        (["B-X", "NOUN"], False),
        (["O"], False),
        (["B-", "O"], False),
        (["E-X", "B-X", "O"], False),
    ],
)
def test_spans_are_counted_where_the_names_are_bio_tags(names: list[str], bio: bool) -> None:
    assert ("span_f1" in scored(TagScore(names), ([names[0]], [names[0]]))) == bio


def chunks(tags: list[str]) -> set[tuple[int, int, str]]:
    """Spans after conlleval's own two rules, startOfChunk and endOfChunk, its marks for other schemes left out."""
    starts, ends = [], []
    for i, (before, now) in enumerate(zip(["O", *tags], [*tags, "O"], strict=True)):
        (mark, _, kind), (mark_before, _, kind_before) = now.partition("-"), before.partition("-")
        changed = kind != kind_before
        if mark_before != "O" and (mark in ("B", "O") or changed):
            ends.append(i)
        if mark != "O" and (mark == "B" or mark_before == "O" or changed):
            starts.append((i, kind))
    return {(start, end, kind) for (start, kind), end in zip(starts, ends, strict=True)}


@given(st.lists(st.tuples(st.sampled_from(BIO), st.sampled_from(BIO)), min_size=1, max_size=12))
def test_spans_are_those_of_conlleval(pairs: list[tuple[str, str]]) -> None:
    answered, expected = [found for found, _ in pairs], [wanted for _, wanted in pairs]
    figures = scored(TagScore(BIO), (answered, expected))
    right, wanted, found = len(chunks(answered) & chunks(expected)), len(chunks(expected)), len(chunks(answered))
    assert figures["span_precision"] == (right / found if found else 0)
    assert figures["span_recall"] == (right / wanted if wanted else 0)


# Numbers.


def test_numbers_counted_by_hand() -> None:
    figures = scored(NumberScore([2.0]), (1.0, "1"), (3.0, 2), (5.0, "6.0"))
    assert figures == {
        "mae": near(2 / 3),
        "rmse": near(math.sqrt(2 / 3)),
        "r2": near(1 - 2 / 14),  # about the mean, 3
        "trivial": {"mae": near((1 + 0 + 4) / 3), "rmse": near(math.sqrt(17 / 3))},
        "examples": 3,
        "numbers": 3,
    }


def test_numbers_of_several_columns() -> None:
    figures = scored(NumberScore([0.0, 0.0]), ([1.0, 10.0], ["0", "10"]), ([2.0, 20.0], np.array([2.0, 24.0])))
    first, second = figures["columns"]
    assert first == {"mae": 0.5, "rmse": near(math.sqrt(1 / 2)), "r2": near(1 - 1 / 2)}
    assert second == {"mae": 2.0, "rmse": near(math.sqrt(16 / 2)), "r2": near(1 - 16 / 98)}
    assert figures["mae"] == near(5 / 4)
    assert figures["rmse"] == near(math.sqrt(17 / 4))
    assert figures["r2"] == near((first["r2"] + second["r2"]) / 2)
    assert (figures["examples"], figures["numbers"]) == (2, 4)


def test_numbers_a_step() -> None:
    one = scored(NumberScore([0.0]), ([1.0, 2.0], "1 3"), ([5.0], [6]))
    assert (one["mae"], one["examples"], one["numbers"]) == (near(2 / 3), 2, 3)
    two = scored(NumberScore([0.0, 0.0]), ([[1.0, 2.0], [3.0, 4.0]], np.array([[1.0, 2.0], [3.0, 8.0]])))
    assert (two["mae"], two["examples"], two["numbers"]) == (1.0, 1, 4)


def test_r2_is_not_defined_of_numbers_that_never_change() -> None:
    # 0.1 has no exact float: the sum of squares about a rounded mean would not be 0.
    assert scored(NumberScore([0.0]), *[(0.3, 0.1)] * 7)["r2"] is None
    figures = scored(NumberScore([0.0, 0.0]), ([1.0, 1.0], [0.1, 1.0]), ([1.0, 2.0], [0.1, 2.0]))
    assert [column["r2"] for column in figures["columns"]] == [None, 1.0]
    assert figures["r2"] == 1.0


def test_r2_holds_where_the_mean_is_large() -> None:
    random = np.random.default_rng(0)
    wanted = 1e8 + random.normal(size=200)
    found = wanted + random.normal(size=200) / 2
    figures = scored(NumberScore([0.0]), (found, wanted))
    expected = 1 - ((wanted - found) ** 2).sum() / ((wanted - wanted.mean()) ** 2).sum()
    # The mean of numbers of 1e8 is rounded at 1e-8, their spread is 1.
    assert figures["r2"] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    "medians, value, expected, message",
    [
        ([0.0], [1.0, 2.0], [1.0], "numbers: expected one for each of 2 answered, got 1"),
        ([0.0], 1.0, "one", "expected: expected numbers: could not convert string to float: 'one'"),
        ([0.0], 1.0, "nan", "expected: expected finite numbers, got nan"),
        ([0.0], math.inf, 1.0, "answer: expected finite numbers, got inf"),
        ([0.0, 0.0], [1.0, 2.0], [1.0, 2.0, 3.0], r"expected: expected 2 numbers a row, got an array of \[1, 3\]"),
    ],
)
def test_numbers_that_do_not_fit(medians: list[float], value: Any, expected: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"^{message}$"):
        NumberScore(medians).add(answer(value), expected)


# Series.


def test_series_counted_by_hand() -> None:
    score = SeriesScore(np.array([2.0, 10.0]))
    score.add(answer(np.array([[1.0, 10.0], [2.0, 20.0]])), np.array([[2.0, 10.0], [5.0, 10.0]]))
    figures = score.figures()
    assert figures["columns"] == [
        {"mae": 2.0, "mase": 1.0, "mse": 5.0},
        {"mae": 5.0, "mase": 0.5, "mse": 50.0},
    ]
    assert (figures["mae"], figures["mase"], figures["mse"]) == (3.5, 0.75, 27.5)
    assert (figures["examples"], figures["numbers"]) == (1, 4)
    assert figures.keys().isdisjoint({"naive", "pinball", "coverage"})


def test_the_naive_forecast_is_scored_beside() -> None:
    score = SeriesScore([2.0])
    score.add(answer([1.0, 2.0]), [2.0, 4.0], naive=[2.0, 2.0], last=[1.0, 1.0])
    score.add(answer([7.0]), [6.0], naive=[[2.0]], last=[[2.0]])
    figures = score.figures()
    assert (figures["mae"], figures["mase"]) == (near(4 / 3), near(2 / 3))
    assert figures["naive"] == {"mae": 2.0, "mase": 1.0, "mse": near(20 / 3)}
    assert figures["last"] == {"mae": near(8 / 3), "mase": near(4 / 3), "mse": near(26 / 3)}
    assert "columns" not in figures


def test_the_naive_forecast_is_scored_on_the_same_steps_or_not_at_all() -> None:
    score = SeriesScore([2.0])
    score.add(answer([1.0, 2.0]), [2.0, 4.0], naive=[2.0, 2.0])
    score.add(answer([7.0]), [6.0])
    with pytest.raises(DataError, match=r"^naive forecasts: expected 3 steps, as forecast, got 2$"):
        score.figures()


def test_the_seasonal_naive_forecast_has_mase_1_where_the_scale_was_taken() -> None:
    season, series = 3, np.random.default_rng(0).normal(size=(30, 2)) * [1, 100]
    wanted, naive = series[season:], series[:-season]
    figures = scored(SeriesScore(np.abs(wanted - naive).mean(0)), (naive, wanted))
    assert figures["mase"] == near(1.0)


def test_a_column_that_never_changed_has_no_mase() -> None:
    figures = scored(SeriesScore([2.0, 0.0]), ([[1.0, 1.0]], [[2.0, 2.0]]))
    assert (figures["mase"], figures["columns"][1]["mase"], figures["mae"]) == (0.5, None, 1.0)
    assert scored(SeriesScore([0.0]), ([1.0], [2.0]))["mase"] is None


def test_quantiles_counted_by_hand() -> None:
    score = SeriesScore([1.0])
    quantiles = {"0.1": [0.0, 3.0, 2.0, 4.0], "0.9": [[3.0]] * 4}
    score.add(answer([1.0] * 4, quantiles=quantiles), [1.0, 2.0, 2.0, 4.0])
    figures = score.figures()
    # Errors of 0.1: 1, -1, 0, 0; of 0.9: -2, -1, -1, 1.
    assert figures["pinball"] == near({"0.1": (0.1 + 0.9) / 4, "0.9": (0.2 + 0.1 + 0.1 + 0.9) / 4})
    assert figures["coverage"] == {"0.1": 3 / 4, "0.9": 3 / 4}


def test_quantiles_must_be_of_the_forecasts_size() -> None:
    with pytest.raises(DataError, match=r"^numbers: expected one for each of 1 answered, got 2$"):
        SeriesScore([1.0]).add(answer([1.0, 2.0], quantiles={"0.5": [1.0]}), [1.0, 2.0])


# Text.


def test_bleu_counted_by_hand() -> None:
    figures = scored(TextScore(), ("the cat sat on the mat", "the cat sat on a mat"))
    # Right of 1, 2, 3 and 4 words: 5 of 6 (the second "the" is none), 3 of 5, 2 of 4, 1 of 3; no penalty for length.
    assert figures["bleu"] == near(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4))
    assert (figures["exact"], figures["examples"]) == (0, 1)


def test_chrf_counted_by_hand() -> None:
    figures = scored(TextScore(), ("가나", "가나다"))
    precision, recall = (1 + 1) / 2, (2 / 3 + 1 / 2) / 2  # of 1 and 2 characters; the answer has no 3
    assert figures["chrf"] == near(100 * 5 * precision * recall / (4 * precision + recall))


def test_any_of_several_texts_is_right() -> None:
    figures = scored(TextScore(), ("one two three four", "one two three four"), ("b c d e f", ["a", "b c d e f"]))
    assert figures["bleu"] == near(100)
    assert figures["chrf"] == near(100)
    assert figures["exact"] == 1
    assert "nrefs:var" in figures["signature"]["bleu"]


def test_exact_is_character_for_character() -> None:
    assert scored(TextScore(), ("A b", "a b"), ("a b", "a b"), ("a b", "a b "))["exact"] == near(1 / 3)


def test_signatures_tell_the_defaults() -> None:
    signature = scored(TextScore(), ("a", "a"))["signature"]
    assert signature["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert signature["chrf"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")


def test_an_empty_answer_is_scored() -> None:
    figures = scored(TextScore(), ("", "a b c d"))
    assert (figures["bleu"], figures["chrf"], figures["exact"]) == (0, 0, 0)


def test_some_text_must_be_expected() -> None:
    with pytest.raises(DataError, match=r"^expected at least one text that is right, got an empty list$"):
        TextScore().add(answer("a"), [])


def test_scores_do_not_load_the_library_before_it_is_needed() -> None:
    code = "import sys, unrolled.kinds.scores; sys.exit('sacrebleu' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


@pytest.mark.parametrize(
    "score",
    [LabelScore("ab"), TagScore("ab"), NumberScore([0.0]), SeriesScore([1.0]), TextScore()],
    ids=lambda s: type(s).__name__,
)
def test_nothing_has_no_figures(score: Score) -> None:
    with pytest.raises(DataError, match=r"^there is nothing to score: expected at least one answer$"):
        score.figures()


# The confusion as text.


def test_confusion_as_a_table() -> None:
    pairs = [("명사", "명사")] * 12 + [("v", "명사"), ("명사", "형용사")]
    assert render(scored(LabelScore(["명사", "v"]), *pairs)) == [
        "rows: expected, columns: answered",
        "        명사  v  형용사",
        "  명사    12  1       .",
        "     v     .  .       .",
        "형용사     1  .       .",
    ]


def test_confusion_as_a_list_where_a_table_is_too_wide() -> None:
    pairs = [("PROPN", "NOUN")] * 3 + [("VERB", "PROPN"), ("VERB", "VERB"), ("ADJ", "VERB"), ("ADJ", "VERB")]
    figures = scored(LabelScore(["ADJ", "NOUN", "PROPN", "VERB"]), *pairs)
    assert len(render(figures, width=29)) == 6
    assert max(map(len, render(figures, width=29)[1:])) == 29
    assert render(figures, width=28) == [
        "NOUN taken for PROPN 3 times",
        "VERB taken for ADJ 2 times",
        "PROPN taken for VERB once",
    ]


def test_no_confusion_no_lines() -> None:
    assert render(scored(NumberScore([0.0]), (1.0, 1.0))) == []
