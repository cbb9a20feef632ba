"""Attention as numbers: where a decoder looked, and how that stands to what a person would align."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unrolled.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = [
    "alignment_error_rate",
    "alignments",
    "coverage",
    "entropy",
    "monotonicity",
    "overlooked",
    "pharaoh",
    "read_pharaoh",
]

Link = tuple[int, int]
"""A source word and a target word, counted from 0, that belong together."""


def entropy(attention: Float[Tensor, "U S"]) -> Float[Tensor, "U"]:
    """How spread attention is at each target step, in bits: -sum_s a_s log2 a_s, 0 (one word) to log2 S (all alike).

    Source: Shannon 1948; as a measure of attention, Ghader and Monz 2017.
    """
    a = attention.double()
    bits: Tensor = torch.special.entr(a).sum(-1) / math.log(2)
    return bits


def coverage(attention: Float[Tensor, "U S"]) -> Float[Tensor, "S"]:
    """How much attention each source word was given in all, sum_u a_us. Source: Tu et al. 2016."""
    return attention.double().sum(0)


def monotonicity(attention: Float[Tensor, "U S"]) -> float:
    """The share of steps whose strongest source word does not stand before the last one's: 1 for the order of the
    source, 0 for its reverse; 1 where there is only one step."""
    strongest = attention.argmax(-1)
    if len(strongest) < 2:
        return 1.0
    return float((strongest[1:] >= strongest[:-1]).double().mean())


def alignments(attention: Float[Tensor, "U S"]) -> list[Link]:
    """The strongest source word of each target step, (source, target). The step that ends the text is one of U: leave
    it out (`attention[:-1]`) to align words."""
    return [(int(s), u) for u, s in enumerate(attention.argmax(-1).tolist())]


def overlooked(attention: Float[Tensor, "U S"], share: float = 0.1) -> list[int]:
    """The source words that no step gave more than `share` of its attention."""
    return (attention.amax(0) <= share).nonzero()[:, 0].tolist()


def pharaoh(links: Iterable[Link]) -> str:
    """Links as one line, `0-0 1-2 ...`: source-target. Source: the Pharaoh decoder's format (Koehn 2004)."""
    return " ".join(f"{s}-{t}" for s, t in sorted(links))


def read_pharaoh(line: str) -> tuple[set[Link], set[Link]]:
    """The sure and the possible links of a line; `i-j` is sure, `i?j` is possible only. Sure links are possible too.

    Raises:
        DataError: something else stands there.
    """
    sure: set[Link] = set()
    possible: set[Link] = set()
    for link in line.split():
        mark = "-" if "-" in link else "?"
        source, _, target = link.partition(mark)
        if not (source.isdecimal() and target.isdecimal()):
            raise DataError(f"expected alignments like 0-0 1-2 (sure) or 3?4 (possible), got {link!r}")
        possible.add((int(source), int(target)))
        if mark == "-":
            sure.add((int(source), int(target)))
    return sure, possible


def alignment_error_rate(
    found: Sequence[Iterable[Link]], sure: Sequence[Iterable[Link]], possible: Sequence[Iterable[Link]] | None = None
) -> float:
    """1 - (|A and S| + |A and P|) / (|A| + |S|) over all sentences; 0 is perfect. Source: Och and Ney 2003.

    Args:
        found: the links of each sentence that are judged, A.
        sure, possible: what a person aligned, S and P; P holds S, and is S if it is not given.

    Raises:
        DataError: lists of different length, or no links at all.
    """
    possible = sure if possible is None else possible
    if not len(found) == len(sure) == len(possible):
        raise DataError(f"expected links of as many sentences, got {len(found)}, {len(sure)} and {len(possible)}")
    hits = total = 0
    for links, s, p in zip(found, sure, possible, strict=True):
        a, must = set(links), set(s)
        may = set(p) | must
        hits += len(a & must) + len(a & may)
        total += len(a) + len(must)
    if not total:
        raise DataError("there are no links to compare")
    return 1 - hits / total
