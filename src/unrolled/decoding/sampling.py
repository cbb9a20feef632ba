"""How one symbol is chosen from a model's scores: the distribution that the settings leave, and a draw from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unrolled.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["AHEAD", "NOT_FINITE", "Sampling", "choose", "draw", "next_distribution", "uniforms"]

AHEAD = 64
"""How many random numbers are drawn at once."""


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
    scores: Float[Tensor, "*R V"], sampling: Sampling, written: Sequence[int] | Int[Tensor, "*R N"] | None = None
) -> Float[Tensor, "*R V"]:
    """The probabilities from which the next symbol is drawn, float64; those that `sampling` rules out are zero.

    Args:
        scores: the model's scores, of one row `[V]` or of several; -inf for a symbol that must not be written.
        written: the symbols to penalise, each row's own.

    Raises:
        ModelError: a score is NaN or infinite, or all symbols are ruled out.
    """
    scores = scores.double().clone()
    if not bool((scores < torch.inf).all()) or bool((scores == -torch.inf).all(dim=-1).any()):
        raise ModelError(NOT_FINITE)
    if sampling.repetition_penalty != 1 and written is not None and len(written):
        seen = torch.as_tensor(written if isinstance(written, Tensor) else list(written), device=scores.device)
        old = scores.gather(-1, seen)
        penalised = torch.where(old > 0, old / sampling.repetition_penalty, old * sampling.repetition_penalty)
        scores.scatter_(-1, seen, penalised)  # a symbol that was written twice gets the same score twice
    if sampling.temperature == 0:
        return torch.zeros_like(scores).scatter_(-1, scores.argmax(dim=-1, keepdim=True), 1)
    p = torch.softmax(scores / sampling.temperature, dim=-1)
    if sampling.top_k is not None and sampling.top_k < p.shape[-1]:
        p = _keep_highest(p, p.topk(sampling.top_k, dim=-1).values, sampling.top_k)
    if sampling.top_p is not None and sampling.top_p < 1:
        wanted = sampling.top_p * p.sum(dim=-1, keepdim=True)
        # All of a large vocabulary is sorted only where the first few hundred do not reach top_p.
        for few in (256, p.shape[-1]):
            ordered = p.topk(min(few, p.shape[-1]), dim=-1).values
            # A symbol goes if those before it reach top_p already, so at least one always stays.
            stays = ordered.cumsum(dim=-1) - ordered < wanted
            if not bool(stays[..., -1].any()):
                break
        p = _keep_highest(p, ordered, stays.sum(dim=-1, keepdim=True))
    return p / p.sum(dim=-1, keepdim=True)


def _keep_highest(p: Tensor, ordered: Tensor, count: Tensor | int) -> Tensor:
    """p `[*R V]` with all but each row's `count` highest set to zero, of equal ones the first stay; ordered: the
    highest ones in their order, at least so many."""
    at = torch.as_tensor(count, device=p.device).expand(*p.shape[:-1], 1)
    border = ordered.gather(-1, at - 1)
    above, level = p > border, p == border
    room = at - above.sum(dim=-1, keepdim=True)
    return p.masked_fill(~(above | level & (level.cumsum(dim=-1) <= room)), 0)


def draw(p: Float[Tensor, "*R V"], uniform: Float[Tensor, "*R"]) -> Int[Tensor, "*R"]:
    """The symbols that random numbers in [0, 1) stand for: the first at which the summed probabilities exceed them."""
    reached = p.cumsum(dim=-1)
    choice = torch.searchsorted(reached, uniform[..., None] * reached[..., -1:], right=True)
    # Rounding: 0.99... may come out as all of it.
    last = p.shape[-1] - 1 - (p > 0).flip(-1).long().argmax(dim=-1, keepdim=True)
    return choice.minimum(last)[..., 0]


def choose(p: Float[Tensor, "V"], uniform: float) -> int:
    """`draw` for one row and a plain number."""
    return int(draw(p, p.new_tensor(uniform)))


def uniforms(seed: int | None) -> Iterator[Float[Tensor, "AHEAD"]]:
    """Random numbers in [0, 1), float64, by the `AHEAD`; None: other ones at each call."""
    random = torch.Generator()
    if seed is None:
        random.seed()
    else:
        random.manual_seed(seed)
    while True:
        yield torch.rand(AHEAD, dtype=torch.float64, generator=random)
