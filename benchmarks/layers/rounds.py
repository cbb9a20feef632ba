"""A row of the table: two sides on the same inputs, checked for equality, then measured in turn, round by round."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Goal", "Missing", "Row", "Setting", "Side", "Size", "Trial", "distances", "measure", "same_bits", "spread"]

EPSILON = 2.0**-23  # a unit in the last place of float32, relative


class Missing(Exception):
    """What a row needs and this machine lacks; the text says what."""


@dataclass(frozen=True)
class Setting:
    """How to measure: rounds, seconds that a side runs in each, threads, unrolled's backend; keep_memory: under
    unrolled's setting of the allocator, for both sides; quick: tiny sizes."""

    rounds: int
    seconds: float
    threads: int
    backend: str = "auto"
    keep_memory: bool = False
    quick: bool = False


@dataclass(frozen=True)
class Size:
    """hidden: H, which is the input size I too."""

    hidden: int
    batch: int
    steps: int


@dataclass(frozen=True)
class Goal:
    """The smallest ratio that passes, and the one aimed at. None: for the reader only."""

    floor: float | None = None
    aim: float | None = None


@dataclass(frozen=True)
class Side:
    """What is run and timed, and what is entered around a whole block of runs, so that it is not timed."""

    run: Callable[[], Any]
    around: tuple[Callable[[], AbstractContextManager[Any]], ...] = ()

    def values(self) -> Any:
        """What a run returns."""
        with ExitStack() as stack:
            for context in self.around:
                stack.enter_context(context())
            return self.run()

    def seconds(self, budget: float) -> float:
        """Seconds per run, the mean over about `budget`.

        A tenth of it goes by before, untimed: the other side's data leave the caches, its threads stop spinning.
        """
        with ExitStack() as stack:
            for context in self.around:
                stack.enter_context(context())
            self._spend(budget / 10)
            return self._spend(budget)

    def _spend(self, budget: float) -> float:
        runs, began = 0, time.perf_counter()
        while True:
            self.run()
            runs += 1
            spent = time.perf_counter() - began
            if spent >= budget:
                return spent / runs


@dataclass(frozen=True)
class Trial:
    """A row made ready. Both sides are functions from the seconds they may take to what a run costs, in `unit`:
    "s", or "B" for bytes. flop: useful floating-point operations of a run of ours; bf16: ours computes in it."""

    ours: Callable[[float], float]
    peer: Callable[[float], float]
    check: Callable[[], list[dict[str, Any]]] = field(default=list)
    unit: str = "s"
    flop: float | None = None
    bf16: bool = False


@dataclass(frozen=True)
class Row:
    """A line of the table. `sizes`: "H/B" -> its goal; `ratio` is the peer's cost by ours, so above 1 ours wins."""

    work: str
    against: str
    sizes: dict[str, Goal]
    build: Callable[[Size, Setting], Trial]
    steps: int = 100
    rounds: int | None = None  # at most, where every measurement is a process of its own
    quick: bool = True  # False: left out of --quick, because another row runs the same code

    def head(self, label: str) -> dict[str, Any]:
        """What is known of a size before it is measured."""
        goal = self.sizes[label]
        return {
            "work": self.work, "size": label, "against": self.against, "steps": self.steps, "floor": goal.floor,
            "aim": goal.aim,
        }  # fmt: skip

    def size(self, label: str, setting: Setting) -> Size:
        hidden, batch = map(int, label.split("/"))
        if setting.quick:
            return Size(8, min(batch, 3), min(self.steps, 5))
        return Size(hidden, batch, self.steps)


def measure(
    row: Row, label: str, setting: Setting, limits: dict[str, float | None], trial: Trial | None = None
) -> dict[str, Any]:
    """Everything about one size of a row, to be kept as JSON. `limits`: precision -> FLOP/s; trial: the row made ready,
    if it is."""
    result = row.head(label)
    try:
        trial = trial or row.build(row.size(label, setting), setting)
    except Missing as why:
        return result | {"missing": str(why)}
    result["equality"] = trial.check()
    ours, peer = [], []
    for k in range(min(setting.rounds, row.rounds or setting.rounds)):
        for costs, side in ((ours, trial.ours), (peer, trial.peer))[:: -1 if k % 2 else 1]:
            costs.append(side(setting.seconds))
    ratio = [b / a for a, b in zip(ours, peer, strict=True)]
    result |= {"unit": trial.unit, "ours": spread(ours), "peer": spread(peer), "ratio": spread(ratio)}
    if trial.flop is not None:
        rate, limit = trial.flop / result["ours"]["median"], limits["bf16" if trial.bf16 else "fp32"]
        result |= {"gflops": rate / 1e9, "share": None if limit is None else rate / limit}
    return result


def spread(values: list[float]) -> dict[str, Any]:
    """Median and spread, and the values themselves."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": values}


def distances(
    names: dict[str, int], ours: Iterable[Tensor], peer: Iterable[Tensor], oracle: Iterable[Tensor]
) -> list[dict[str, Any]]:
    """How far both sides are from the same computation in float64, tensor by tensor.

    The distance is the largest of any element, by the largest element there is. Ours may be twice as far off as the
    peer, and 4 ulp of float32 x sqrt(summands) besides, because a peer that happens to be exact would leave no room for
    another order of summation. In bf16 the peer is torch under autocast, so the first term decides.

    names: of the tensors -> how many products are summed to each of their elements.
    """
    found = []
    for (name, summands), a, b, exact in zip(names.items(), ours, peer, oracle, strict=True):
        scale = max(exact.abs().max().item(), 1e-30)
        ours_off, peer_off = ((t.double() - exact).abs().max().item() / scale for t in (a, b))
        allowed = 2 * peer_off + 4 * EPSILON * math.sqrt(summands)
        # "not <=" rather than ">": a NaN is no equality.
        fault = not ours_off <= allowed
        found.append({"tensor": name, "ours": ours_off, "peer": peer_off, "allowed": allowed, "fault": fault})
    return found


def same_bits(names: Iterable[str], ours: Iterable[Tensor], peer: Iterable[Tensor]) -> list[dict[str, Any]]:
    """The largest difference of each pair of tensors, none of which is allowed."""
    found = []
    for name, a, b in zip(names, ours, peer, strict=True):
        off = (a - b).abs().max().item()
        found.append({"tensor": name, "ours": off, "peer": 0.0, "allowed": 0.0, "fault": not torch.equal(a, b)})
    return found
