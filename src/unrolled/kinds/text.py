"""Text as input (a reader of symbols) and the next symbol as output (a writer): the two ends of a language model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unrolled import native
from unrolled.cells import Lookup
from unrolled.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["IGNORE", "NextWriter", "TextReader"]

IGNORE = -100
"""A target that is not counted: the step has nothing to predict (torch's own default in cross_entropy)."""


class TextReader(nn.Module):
    """Symbols -> steps of vectors.

    A symbol enters one-hot, as in the lecture notes, or as a row of a learned embedding `table` [V E]. The two
    differ in width only: an embedding is the product of the one-hot vector with that matrix. Neither product is
    computed (see `unrolled.cells.Lookup`).

    Args:
        symbols: V, the size of the vocabulary.
        embedding: E, or None for one-hot.
    """

    def __init__(self, symbols: int, embedding: int | None) -> None:
        super().__init__()
        self.symbols = symbols
        self.table = None if embedding is None else nn.Parameter(torch.randn(symbols, embedding))

    @property
    def step_size(self) -> int:
        """I: the length of one step's vector, V if one-hot."""
        return self.symbols if self.table is None else self.table.shape[1]

    def forward(self, ids: Int[Tensor, "*steps"]) -> Lookup:
        """The steps for these symbols, ids int64 `[T B]` or `[B]`."""
        return Lookup(ids, self.table)


class NextWriter(nn.Module):
    """Hidden states -> scores of the next symbol: y_t = W_hy h_t + b, softmax, cross-entropy.

    Args:
        hidden: size of a hidden state vector.
        symbols: V.
        tied: an embedding table [V H] whose rows serve as W_hy too (Press and Wolf 2017), or None.
        backend: "auto" and "native" use the native kernels where they can: a row's scores are then the same bits in any
            batch, and the scores of a whole window are never in memory.

    Raises:
        ConfigError: the tied table's rows are not `hidden` long.
    """

    def __init__(self, hidden: int, symbols: int, tied: nn.Parameter | None = None, *, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend
        if tied is not None and tied.shape[1] != hidden:
            raise ConfigError(
                f"output.tied: embedding and hidden size must be equal to share a matrix, got {tied.shape[1]} and "
                f"{hidden}: set input.embedding={hidden}"
            )
        self.weight = tied if tied is not None else nn.Parameter(torch.empty(symbols, hidden))
        self.bias = nn.Parameter(torch.zeros(symbols))
        bound = hidden**-0.5
        # A tied table starts small: its rows are scored against states within (-1, 1).
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, hidden: Float[Tensor, "*steps H"]) -> Float[Tensor, "*steps V"]:
        """Scores (logits) of every symbol to come next."""
        if self._native():
            return native.linear(hidden, self.weight, self.bias)
        return F.linear(hidden, self.weight, self.bias)

    def _native(self) -> bool:
        return self.backend in ("auto", "native") and native.unsuited(self.weight) is None

    def loss(self, hidden: Float[Tensor, "T B H"], targets: Int[Tensor, "T B"]) -> Float[Tensor, ""]:
        """The summed cross-entropy in nats over all steps whose target is not IGNORE."""
        if self._native():
            return native.cross_entropy(hidden.flatten(0, 1), self.weight, self.bias, targets.flatten())
        scores = self(hidden).flatten(0, 1)
        if scores.dtype != torch.float64:
            scores = scores.float()  # bfloat16 under autocast is too coarse for a logarithm
        return F.cross_entropy(scores, targets.flatten(), ignore_index=IGNORE, reduction="sum")
