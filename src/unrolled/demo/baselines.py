"""What a model must be better than, or is compared with: guesses that need no network."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from unrolled.kinds import Answer
from unrolled.kinds.scores import TextScore
from unrolled.ngram import NGram

__all__ = ["NaiveBayes", "NearestNeighbour", "most_frequent", "ngram_perplexity", "text_figures"]


def text_figures(answers: Iterable[str], expected: Iterable[Any], names: Sequence[str]) -> tuple[float, ...]:
    """These figures of `TextScore` for answers that no model gave."""
    score = TextScore()
    for answer, right in zip(answers, expected, strict=True):
        score.add(Answer(answer, answer), right)
    figures = score.figures()
    return tuple(figures[name] for name in names)


def most_frequent(values: Iterable[str]) -> str:
    """The value that occurs most often; of several the first."""
    return Counter(values).most_common(1)[0][0]


class NaiveBayes:
    """Labels of texts by how often each character occurs under each label (multinomial, add-one smoothing).

        argmax_k  log P(k) + sum_i log P(character i | k),  P(c | k) = (count(c, k) + 1) / (count(k) + V + 1)

    Source: Manning, Raghavan and Schütze 2008, section 13.2. One of the V + 1 characters stands for all others.
    """

    def __init__(self, texts: Sequence[str], labels: Sequence[str]) -> None:
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for text, label in zip(texts, labels, strict=True):
            counts[label].update(text)
        symbols = len({character for count in counts.values() for character in count}) + 1
        self._prior = {label: math.log(n / len(labels)) for label, n in Counter(labels).items()}
        self._counts = counts
        self._total = {label: math.log(count.total() + symbols) for label, count in counts.items()}

    def answer(self, text: str) -> str:
        """The likeliest label."""

        def score(label: str) -> float:
            count, total = self._counts[label], self._total[label]
            return self._prior[label] + math.fsum(math.log(count[character] + 1) - total for character in text)

        return max(self._prior, key=score)


class NearestNeighbour:
    """Answers what belongs to the most similar known text: the one that shares the largest part of the words.

    similarity(a, b) = |words of both| / |words of either| (Jaccard); of several equally similar ones the first.
    """

    def __init__(self, texts: Sequence[str], answers: Sequence[str]) -> None:
        self._words = [_words(text) for text in texts]
        self._answers = answers
        self._with: dict[str, list[int]] = defaultdict(list)
        for number, words in enumerate(self._words):
            for word in words:
                self._with[word].append(number)

    def answer(self, text: str) -> str:
        """What belongs to the most similar text; to the first where no word is known."""
        words = _words(text)
        shared = Counter(number for word in words for number in self._with.get(word, ()))
        best = max(sorted(shared), key=lambda n: shared[n] / (len(words) + len(self._words[n]) - shared[n]), default=0)
        return self._answers[best]


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.casefold()))


def ngram_perplexity(learn: Sequence[np.ndarray], held_out: Sequence[np.ndarray], order: int, symbols: int) -> float:
    """The perplexity per symbol, the end counted, of texts by an n-gram model of others.

    Args:
        learn, held_out: texts as ids below `symbols`.
        symbols: V; the end is one more, and what stands before a text another.
    """
    end, before = symbols, symbols + 1

    def line_up(texts: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.r_[np.full(order - 1, before), text, end] for text in texts])

    model = NGram(line_up(learn), order, symbols + 2)
    held = np.r_[before, line_up(held_out)]
    nats = model.nats(held)[held[1:] != before]
    return math.exp(float(nats.mean()))
