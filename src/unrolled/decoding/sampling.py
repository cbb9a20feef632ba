"""How one symbol is chosen from a model's scores: the distribution that the settings leave, and a draw from it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unrolled.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["NOT_FINITE", "Sampling", "choose", "next_distribution"]


@dataclass(frozen=True)
class Sampling:
    """How the next symbol is chosen from its scores; applied in the order of the fields.

    Attributes:
        repetition_penalty: > 0; scores of the last `repetition_window` symbols are divided by it if positive
            and multiplied by it if negative (Keskar et al. 2019); 1 changes nothing.
        repetition_window: how many of the last symbols are penalised.
        temperature: >= 0; scores are divided by it; 0 takes the highest score (greedy).
        top_k: choose among the k most probable symbols only.
        top_p: choose among the fewest most probable symbols that together reach this probability
            (Holtzman et al. 2020).

    Raises:
        ConfigError: a value out of its range.
    """

    repetition_penalty: float = 1.0
    repetition_window: int = 64
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        checks = {
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
            "repetition_window": (self.repetition_window >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "at least 0 (0 is greedy)"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise ConfigError(f"{name}: expected {expected}, got {getattr(self, name)}")


NOT_FINITE = "the model's scores are not finite: its weights or its state hold NaN or infinity; train it anew"


def next_distribution(
    scores: Float[Tensor, "V"], sampling: Sampling, written: deque[int] | None = None
) -> Float[Tensor, "V"]:
    """The probabilities from which the next symbol is drawn, float64; those that `sampling` rules out are zero.

    Args:
        scores: the model's scores; -inf for a symbol that must not be written.
        written: the symbols to penalise.

    Raises:
        ModelError: a score is NaN or infinite, or all symbols are ruled out.
    """
    scores = scores.double().clone()
    if not bool((scores < torch.inf).all()) or bool((scores == -torch.inf).all()):
        raise ModelError(NOT_FINITE)
    if sampling.repetition_penalty != 1 and written:
        seen = torch.tensor(sorted(set(written)))
        old = scores[seen]
        scores[seen] = torch.where(old > 0, old / sampling.repetition_penalty, old * sampling.repetition_penalty)
    if sampling.temperature == 0:
        only = torch.zeros_like(scores)
        only[scores.argmax()] = 1
        return only
    p = torch.softmax(scores / sampling.temperature, dim=0)
    if sampling.top_k is not None and sampling.top_k < p.numel():
        p[p.sort(descending=True, stable=True).indices[sampling.top_k :]] = 0  # of equal ones the first stay
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = p.sort(descending=True, stable=True)
        # A symbol goes if those before it reach top_p already, so at least one always stays.
        before = ordered.cumsum(0) - ordered
        p[order[before >= sampling.top_p * p.sum()]] = 0
    return p / p.sum()


def choose(p: Float[Tensor, "V"], uniform: float) -> int:
    """The symbol that a random number in [0, 1) stands for: the first at which the summed probabilities exceed it."""
    reached = p.cumsum(0)
    choice = int(torch.searchsorted(reached, uniform * reached[-1], right=True))
    return choice if choice < p.numel() else int(p.nonzero()[-1])  # rounding: 0.99... may come out as all of it
