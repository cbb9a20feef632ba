"""Counted baselines against the textbook's recursion over dictionaries."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unrolled.errors import ConfigError
from unrolled.ngram import NGram

SYMBOLS = 4
texts = st.lists(st.integers(0, SYMBOLS - 1), max_size=30)


class WittenBell:
    """P(w | h) = (count(h w) + types(h) P(w | h')) / (count(h) + types(h)), uniform below the unigram."""

    def __init__(self, text: Sequence[int], order: int, symbols: int) -> None:
        self.order, self.symbols = order, symbols
        self.following: dict[tuple[int, ...], dict[int, int]] = defaultdict(lambda: defaultdict(int))
        for size in range(order):
            for end in range(size, len(text)):
                self.following[tuple(text[end - size : end])][text[end]] += 1

    def p(self, history: Sequence[int], word: int) -> float:
        history = tuple(history)[-(self.order - 1) :] if self.order > 1 else ()
        return self._p(history, word)

    def _p(self, history: tuple[int, ...], word: int) -> float:
        lower = self._p(history[1:], word) if history else 1 / self.symbols
        counts = self.following.get(history)
        if not counts:
            return lower
        types = len(counts)
        return (counts.get(word, 0) + types * lower) / (sum(counts.values()) + types)


def nats(text: Sequence[int], order: int, held_out: Sequence[int]) -> list[float]:
    ids = np.array(text, np.uint8)
    return list(NGram(ids, order, SYMBOLS).nats(np.array(held_out, np.uint8)))


@given(text=texts, held_out=texts, order=st.integers(1, 4))
def test_every_probability_is_the_textbooks(text: list[int], held_out: list[int], order: int) -> None:
    model = WittenBell(text, order, SYMBOLS)
    expected = [-math.log(model.p(held_out[:t], held_out[t])) for t in range(1, len(held_out))]
    assert nats(text, order, held_out) == pytest.approx(expected, rel=1e-12)


@given(text=texts, history=st.lists(st.integers(0, SYMBOLS - 1), min_size=1, max_size=5), order=st.integers(1, 4))
def test_the_probabilities_of_what_may_follow_sum_to_one(text: list[int], history: list[int], order: int) -> None:
    total = sum(math.exp(-nats(text, order, [*history, word])[-1]) for word in range(SYMBOLS))
    assert total == pytest.approx(1, rel=1e-12)


def test_one_example_by_hand() -> None:
    # a b a b a c: after a came b, b, c; a occurs 3 times of 6, b 2, c 1; d never.
    text = [0, 1, 0, 1, 0, 2]
    unigram_b = (2 + 3 * 1 / 4) / (6 + 3)
    assert math.exp(-nats(text, 1, [0, 1])[0]) == pytest.approx(unigram_b)
    assert math.exp(-nats(text, 2, [0, 1])[0]) == pytest.approx((2 + 2 * unigram_b) / (3 + 2))
    # c was followed by nothing, so the unigram stands.
    assert math.exp(-nats(text, 2, [2, 1])[0]) == pytest.approx(unigram_b)
    assert math.exp(-nats(text, 2, [0, 3])[0]) == pytest.approx(2 / 5 * (3 / 4) / 9)


def test_a_large_vocabulary_does_not_overflow() -> None:
    ids = np.array([70_000, 3, 70_000, 3], np.uint32)
    assert math.exp(-NGram(ids, 3, 100_000).nats(ids)[0]) > 0.3


@pytest.mark.parametrize("order, symbols", [(0, 5), (2, 2**32), (64, 2)])
def test_ranges(order: int, symbols: int) -> None:
    with pytest.raises(ConfigError, match=rf"order >= 1 and V\^n < 2\^63, got n={order}, V={symbols}"):
        NGram(np.array([0, 1]), order, symbols)
