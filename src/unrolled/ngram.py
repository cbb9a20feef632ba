"""Counted baselines: what a model must beat before its score means anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from unrolled.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["NGram"]


class NGram:
    """An n-gram model with Witten-Bell smoothing: each symbol's probability given the n-1 before it, from counts.

        P(w | h) = (count(h w) + types(h) P(w | h')) / (count(h) + types(h))

    types(h) is how many different symbols follow h, and h' is h without its first symbol; below the unigram
    stands the uniform distribution. Source: Witten and Bell 1991; Chen and Goodman 1998, section 2.4.

    Args:
        ids: the training text as symbol ids `[N]`.
        order: n, at least 1.
        symbols: V.

    Raises:
        ConfigError: order below 1, or V^n does not fit 63 bits.
    """

    def __init__(self, ids: Int[np.ndarray, "N"], order: int, symbols: int) -> None:
        if order < 1 or float(symbols) ** order >= 2.0**63:
            raise ConfigError(f"an n-gram model needs order >= 1 and V^n < 2^63, got n={order}, V={symbols}")
        self.order, self.symbols = order, symbols
        self.counts = [np.unique(self._keys(ids, n), return_counts=True) for n in range(1, order + 1)]

    def _keys(self, ids: np.ndarray, n: int) -> np.ndarray:
        """One number for each run of n symbols, `[N-n+1]`; the run's start is the high part."""
        wide = ids.astype(np.int64)
        keys = np.zeros(max(len(wide) - n + 1, 0), dtype=np.int64)
        for k in range(n):
            keys = keys * self.symbols + wide[k : len(wide) - n + 1 + k]
        return keys

    def nats(self, ids: Int[np.ndarray, "N"]) -> Float[np.ndarray, "N-1"]:
        """-log P of every symbol but the first, given as many before it as there are, at most n-1."""
        p = np.full(len(ids), 1 / self.symbols)
        for n in range(1, self.order + 1):
            keys = self._keys(ids, n)
            known, counts = self.counts[n - 1]
            if not len(known):  # the training text was shorter than n
                break
            histories, first = np.unique(known // self.symbols, return_index=True)
            total = np.add.reduceat(counts, first)
            types = np.diff(np.append(first, len(known)))
            at = np.searchsorted(known, keys).clip(max=len(known) - 1)
            count = np.where(known[at] == keys, counts[at], 0)
            history = keys // self.symbols
            at = np.searchsorted(histories, history).clip(max=len(histories) - 1)
            seen = histories[at] == history
            lower = p[n - 1 :]
            # A history that never occurred says nothing: the shorter one stands.
            p[n - 1 :] = np.where(seen, (count + types[at] * lower) / (total[at] + types[at]), lower)
        nats: np.ndarray = -np.log(p[1:])
        return nats
