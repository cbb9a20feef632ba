"""Answers against what they should be: counted example by example, then told as figures.

What is kept while counting is small: pairs of labels and how often each occurred, sums of errors. Only written text is
kept whole, since the library that scores it wants all of it at once. Figures are plain values for JSON: shares are from
0 to 1, and what is not defined is None.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from unrolled.errors import DataError
from unrolled.kinds.contract import Answer, Score

__all__ = ["LabelScore", "NumberScore", "SeriesScore", "TagScore", "TextScore", "render"]

Floats: TypeAlias = npt.NDArray[np.float64]


class LabelScore(Score):
    """One label an example. Of a label with e examples expected, a answered, and c both:

        precision = c / a    recall = c / e    F1 = 2 c / (a + e)        0 where nothing is divided by nothing

    Figures:
        accuracy: share of right answers.
        macro_f1: the mean F1 of the labels that occur, expected or answered. A label known from training that does
            neither is left out; an expected one that training never saw counts, with F1 0. (scikit-learn's
            `f1_score(average="macro")`.)
        micro_f1: F1 of the counts summed over labels. With one label expected and one answered each time this is the
            accuracy; it is told since others tell it.
        examples: how many.
        unseen, unseen_labels: examples whose expected label is not among the names, so that no answer could be right;
            and those labels with how often each occurred.
        labels: precision, recall and f1 of each label that occurs, and how often it was `expected` and `answered`.
        confusion: `names`, the labels that occur, and `counts`, a row for each expected and a column for each answered.

    Args:
        names: the labels that can be answered.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._pairs = _Pairs(names)

    def add(self, answer: Answer, expected: Any) -> None:
        self._pairs.counts[str(expected), str(answer.value)] += 1

    def figures(self) -> dict[str, Any]:
        return self._pairs.figures(examples=self._pairs.counts.total())


class TagScore(Score):
    """A label a token: of a word, of a frame. `expected` is a list of labels, or a text with labels at its white space.

    Figures: those of `LabelScore`, of tokens in place of examples, and
        examples, tokens: how many sequences, and tokens in them.
        span_precision, span_recall, span_f1, spans: where the names are BIO tags (B-X, I-X, O; or B, I, O), of whole
            spans, which are right if both ends and the type are; and how many spans are expected.

    Spans are read as conlleval does (Tjong Kim Sang and Buchholz 2000): a span begins at B, and also at an I whose type
    is another than that of the span it stands in, or that stands in none; it ends before B, O, another type, or the
    sequence's end. Precision is 0 where no span was answered, recall where none was expected, F1 where there is
    neither. What is expected and no such tag is O.

    Args:
        names: the labels that can be answered.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._pairs = _Pairs(names)
        self._bio = all(_BIO.fullmatch(name) for name in names) and any(name != "O" for name in names)
        self._examples = self._expected = self._answered = self._right = 0

    def add(self, answer: Answer, expected: Any) -> None:
        """
        Raises:
            DataError: not as many labels are expected as were answered.
        """
        right = expected.split() if isinstance(expected, str) else [str(name) for name in expected]
        if len(right) != len(answer.value):
            raise DataError(f"labels: expected one for each of {len(answer.value)} answered, got {len(right)}")
        self._pairs.counts.update(zip(right, answer.value, strict=True))
        self._examples += 1
        if self._bio:
            wanted, found = _spans(right), _spans(answer.value)
            self._expected += len(wanted)
            self._answered += len(found)
            self._right += len(wanted & found)

    def figures(self) -> dict[str, Any]:
        spans = {}
        if self._bio:
            precision, recall, f1 = _rates(self._right, self._expected, self._answered)
            spans = {"span_f1": f1, "span_precision": precision, "span_recall": recall, "spans": self._expected}
        return self._pairs.figures(**spans, examples=self._examples, tokens=self._pairs.counts.total())


class _Pairs:
    """How often each label was expected where each was answered: only pairs that occurred are kept."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.counts: Counter[tuple[str, str]] = Counter()

    def figures(self, **more: float) -> dict[str, Any]:
        """What `LabelScore` and `TagScore` share; `more` stands after the first three."""
        total = _expect_some(self.counts.total())
        expected: Counter[str] = Counter()
        answered: Counter[str] = Counter()
        for (wanted, found), n in self.counts.items():
            expected[wanted] += n
            answered[found] += n
        known, occur = set(self.names), expected.keys() | answered.keys()
        names = [name for name in self.names if name in occur] + sorted(occur - known)
        unseen = {name: n for name, n in expected.most_common() if name not in known}
        labels = {}
        for name in names:
            precision, recall, f1 = _rates(self.counts[name, name], expected[name], answered[name])
            labels[name] = {
                "precision": precision,
                "recall": recall,
                "f1": f1,
                "expected": expected[name],
                "answered": answered[name],
            }
        accuracy = sum(self.counts[name, name] for name in names) / total
        return {
            "accuracy": accuracy,
            "macro_f1": math.fsum(label["f1"] for label in labels.values()) / len(labels),
            "micro_f1": accuracy,
            **more,
            "unseen": sum(unseen.values()),
            "unseen_labels": unseen,
            "labels": labels,
            "confusion": {
                "names": names,
                "counts": [[self.counts[wanted, found] for found in names] for wanted in names],
            },
        }


def _rates(right: int, expected: int, answered: int) -> tuple[float, float, float]:
    """Precision, recall and F1, 0 where nothing is divided by nothing."""
    return right / max(answered, 1), right / max(expected, 1), 2 * right / max(expected + answered, 1)


_BIO = re.compile("O|[BI](-.+)?")


def _spans(tags: Iterable[str]) -> set[tuple[int, int, str]]:
    """(start, end, type) of each span, the end not in it."""
    spans: set[tuple[int, int, str]] = set()
    start, inside = 0, None  # the type of the span that the last tag stands in
    for i, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        kind = name if mark in ("B", "I") else None
        if inside is not None and (mark == "B" or kind != inside):
            spans.add((start, i, inside))
            inside = None
        if inside is None and kind is not None:
            start, inside = i, kind
    return spans


class NumberScore(Score):
    """Numbers, one or F an example, or one or F a step. With y expected, ŷ answered:

        MAE = mean |y - ŷ|    RMSE = sqrt(mean (y - ŷ)²)    R² = 1 - sum (y - ŷ)² / sum (y - mean y)²

    Figures:
        mae, rmse: over all numbers of all columns together, in their own units.
        r2: with the mean of what is expected here, not of the training part; of several columns the mean. None for a
            column that never changes.
        trivial: mae and rmse of always answering `medians`, which a model has to beat.
        examples, numbers: how many.
        columns: mae, rmse and r2 of each column, where there are several.

    Args:
        medians: F numbers, each column's trivial guess, from the training part.
    """

    def __init__(self, medians: Sequence[float]) -> None:
        self._medians = np.asarray(medians, np.float64)
        self._errors, self._trivial = _Errors(len(self._medians)), _Errors(len(self._medians))
        # Of y - its first value: small squares where the mean is large, and exactly 0 where y never changes.
        self._first: Floats | None = None
        self._moved, self._squares = np.zeros(len(self._medians)), np.zeros(len(self._medians))
        self._examples = 0

    def add(self, answer: Answer, expected: Any) -> None:
        """
        Raises:
            DataError: something is no finite number, or not as many are expected as were answered.
        """
        wanted = _rows(expected, len(self._medians), "expected")
        self._errors.add(wanted, _rows(answer.value, len(self._medians), "answer"))
        self._trivial.add(wanted, np.broadcast_to(self._medians, wanted.shape))
        if len(wanted):
            if self._first is None:
                self._first = wanted[0].copy()
            moved = wanted - self._first
            self._moved += moved.sum(0)
            self._squares += (moved**2).sum(0)
        self._examples += 1

    def figures(self) -> dict[str, Any]:
        rows = _expect_some(self._errors.rows)
        spread = self._squares - self._moved**2 / rows
        r2 = [
            None if not s > 0 else 1 - e / s
            for e, s in zip(self._errors.squared.tolist(), spread.tolist(), strict=True)
        ]
        mae, mse = self._errors.mae, self._errors.mse
        columns = [
            {"mae": m, "rmse": math.sqrt(s), "r2": r} for m, s, r in zip(mae.tolist(), mse.tolist(), r2, strict=True)
        ]
        return {
            "mae": float(mae.mean()),
            "rmse": math.sqrt(mse.mean()),
            "r2": _mean(r2),
            "trivial": {"mae": float(self._trivial.mae.mean()), "rmse": math.sqrt(self._trivial.mse.mean())},
            "examples": self._examples,
            "numbers": rows * len(self._medians),
            **({"columns": columns} if len(columns) > 1 else {}),
        }


class SeriesScore(Score):
    """Forecasts of F columns, any number of steps ahead. With y expected, ŷ forecast, over all steps of all forecasts:

        MAE = mean |y - ŷ|    MSE = mean (y - ŷ)²    MASE = mean |y - ŷ| / scale

    Figures:
        mae, mse: over all columns together, in their own units.
        mase: each column by its own scale, then the mean of the columns (Hyndman and Koehler 2006). Below 1 it
            errs less than the seasonal-naive forecast did in the training part. A column whose scale is 0, since it
            never changed, has none and is left out.
        pinball: of each quantile q that was forecast, mean max(q (y - ŷ), (q - 1) (y - ŷ)) (Koenker and Bassett 1978).
        coverage: of each quantile, the share of y at or below it, which should be q.
        naive, last: mae, mse and mase of the seasonal-naive forecasts and of those that nothing changes, if they were
            given.
        examples, numbers: how many forecasts, and numbers in them.
        columns: mae, mse and mase of each column, where there are several.

    Args:
        scale: F numbers, the mean absolute error of the seasonal-naive forecast within the training part.
    """

    def __init__(self, scale: npt.ArrayLike) -> None:
        self._scale = np.asarray(scale, np.float64)
        self._errors = _Errors(len(self._scale))
        self._beside = {name: _Errors(len(self._scale)) for name in ("naive", "last")}
        self._pinball: dict[str, float] = {}
        self._covered: Counter[str] = Counter()
        self._counted: Counter[str] = Counter()
        self._examples = 0

    def add(self, answer: Answer, expected: Any, naive: Any = None, last: Any = None) -> None:
        """One more forecast; all are arrays [horizon F], or [horizon] where F is 1.

        Args:
            answer: with quantiles, if there are any, in `details["quantiles"]`: `{"0.1": array, ...}`.
            naive, last: what the seasonal-naive forecast and the one that nothing changes say here, to be scored
                beside; each for all forecasts or for none.

        Raises:
            DataError: something is no finite number, or of another size.
        """
        wanted = _rows(expected, len(self._scale), "expected")
        self._errors.add(wanted, _rows(answer.value, len(self._scale), "answer"))
        for name, beside in (("naive", naive), ("last", last)):
            if beside is not None:
                self._beside[name].add(wanted, _rows(beside, len(self._scale), name))
        for name, forecast in answer.details.get("quantiles", {}).items():
            error, q = _errors(wanted, _rows(forecast, len(self._scale), f"quantile {name}")), float(name)
            self._pinball[name] = self._pinball.get(name, 0.0) + float(np.maximum(q * error, (q - 1) * error).sum())
            self._covered[name] += int((error <= 0).sum())
            self._counted[name] += error.size
        self._examples += 1

    def figures(self) -> dict[str, Any]:
        """
        Raises:
            DataError: there were no forecasts, or naive ones for some of them only.
        """
        numbers = _expect_some(self._errors.rows) * len(self._scale)
        figures, columns = self._of(self._errors)
        figures |= {"examples": self._examples, "numbers": numbers}
        if self._counted:
            figures["pinball"] = {name: total / self._counted[name] for name, total in self._pinball.items()}
            figures["coverage"] = {name: self._covered[name] / n for name, n in self._counted.items()}
        for name, beside in self._beside.items():
            if not beside.rows:
                continue
            if beside.rows != self._errors.rows:
                raise DataError(f"{name} forecasts: expected {self._errors.rows} steps, as forecast, got {beside.rows}")
            figures[name], _ = self._of(beside)
        return {**figures, **({"columns": columns} if len(columns) > 1 else {})}

    def _of(self, errors: _Errors) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """mae, mase and mse of all, and of each column."""
        columns = [
            {"mae": mae, "mase": mae / scale if scale > 0 else None, "mse": mse}
            for mae, mse, scale in zip(errors.mae.tolist(), errors.mse.tolist(), self._scale.tolist(), strict=True)
        ]
        return {name: _mean([column[name] for column in columns]) for name in ("mae", "mase", "mse")}, columns


class _Errors:
    """Absolute and squared errors of rows [n F], summed in each column."""

    def __init__(self, width: int) -> None:
        self.absolute, self.squared, self.rows = np.zeros(width), np.zeros(width), 0

    def add(self, wanted: Floats, found: Floats) -> None:
        error = _errors(wanted, found)
        self.absolute += np.abs(error).sum(0)
        self.squared += (error**2).sum(0)
        self.rows += len(error)

    @property
    def mae(self) -> Floats:
        return self.absolute / self.rows

    @property
    def mse(self) -> Floats:
        return self.squared / self.rows


def _errors(wanted: Floats, found: Floats) -> Floats:
    """y - ŷ [n F]."""
    if wanted.shape != found.shape:
        raise DataError(f"numbers: expected one for each of {len(found)} answered, got {len(wanted)}")
    return wanted - found


def _rows(value: Any, width: int, name: str) -> Floats:
    """Numbers [n F]: of a number, a text of numbers, a list or array; a flat one is one row unless F is 1.

    Raises:
        DataError: something is no finite number, or the rows are not F long.
    """
    try:
        array = np.array(value.split() if isinstance(value, str) else value, np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: expected numbers: {error}") from None
    if not np.isfinite(array).all():
        raise DataError(f"{name}: expected finite numbers, got {array[~np.isfinite(array)][0]}")
    array = array.reshape(-1, 1) if width == 1 and array.ndim < 2 else np.atleast_2d(array)
    if array.ndim != 2 or array.shape[1] != width:
        raise DataError(f"{name}: expected {width} numbers a row, got an array of {list(array.shape)}")
    return array


def _mean(figures: Sequence[float | None]) -> float | None:
    """The mean of those that are defined."""
    defined = [figure for figure in figures if figure is not None]
    return math.fsum(defined) / len(defined) if defined else None


class TextScore(Score):
    """Written text. `expected` is a text, or a list of texts that are all right.

    Figures:
        bleu, chrf: of the whole corpus, from 0 to 100, as sacrebleu computes them by default (Post 2018): BLEU
            (Papineni et al. 2002) of cased words as its tokeniser `13a` cuts them, at white space and punctuation; chrF
            (Popović 2015) of up to 6 characters, white space aside. Where words are inflected, as in Korean, chrF tells
            more: BLEU counts a word with another particle as another word.
        signature: of both, what makes figures comparable.
        exact: share of answers that are one of the expected texts, character for character.
        examples: how many.
    """

    def __init__(self) -> None:
        self._answers: list[str] = []
        self._expected: list[list[str]] = []

    def add(self, answer: Answer, expected: Any) -> None:
        """
        Raises:
            DataError: no text is expected.
        """
        texts = [expected] if isinstance(expected, str) else [str(text) for text in expected]
        if not texts:
            raise DataError("expected at least one text that is right, got an empty list")
        self._answers.append(str(answer.value))
        self._expected.append(texts)

    def figures(self) -> dict[str, Any]:
        from sacrebleu.metrics.bleu import BLEU  # here, since it loads much
        from sacrebleu.metrics.chrf import CHRF

        examples = _expect_some(len(self._answers))
        # The first right text of each example, the second of each, ...; None where an example has no more.
        references = list(zip_longest(*self._expected))
        bleu, chrf = BLEU(), CHRF()
        right = sum(answer in texts for answer, texts in zip(self._answers, self._expected, strict=True))
        return {
            "bleu": bleu.corpus_score(self._answers, references).score,
            "chrf": chrf.corpus_score(self._answers, references).score,
            "exact": right / examples,
            "examples": examples,
            "signature": {"bleu": str(bleu.get_signature()), "chrf": str(chrf.get_signature())},
        }


def _expect_some(count: int) -> int:
    if not count:
        raise DataError("there is nothing to score: expected at least one answer")
    return count


_LISTED = 12
"""Confusions that are listed where a table would be too wide."""


def render(figures: Mapping[str, Any], width: int = 100) -> list[str]:
    """The `confusion` among figures as lines of plain text: a table, or where it is wider than `width` columns of a
    terminal, the most frequent confusions. No lines where there is none among them."""
    if "confusion" not in figures:
        return []
    names, counts = figures["confusion"]["names"], figures["confusion"]["counts"]
    table = [["", *names]] + [[name, *(str(n or ".") for n in row)] for name, row in zip(names, counts, strict=True)]
    widths = [max(map(_columns, column)) for column in zip(*table, strict=True)]
    if sum(widths) + 2 * len(names) <= width:
        lines = [
            "  ".join(" " * (width - _columns(cell)) + cell for cell, width in zip(row, widths, strict=True))
            for row in table
        ]
        return ["rows: expected, columns: answered", *lines]
    wrong = [
        (n, f"{wanted} taken for {found}")
        for wanted, row in zip(names, counts, strict=True)
        for found, n in zip(names, row, strict=True)
        if n and wanted != found
    ]
    most = sorted(wrong, key=lambda confusion: -confusion[0])[:_LISTED]
    return [f"{what} {'once' if n == 1 else f'{n} times'}" for n, what in most]


def _columns(text: str) -> int:
    """Columns of a terminal that a text takes: Hangul and what else is wide takes two, marks on letters none."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in unicodedata.normalize("NFC", text)
    )
