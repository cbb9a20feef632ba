"""What every way of writing sequences shares: the hypothesis, what may be written where, and who came from whom."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from unrolled.cells import map_state
from unrolled.errors import ConfigError, DataError, ModelError, expect_shape

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["Allowed", "Finds", "Hypothesis", "Past", "Rules", "Stepped", "first_ids"]


class Stepped(Protocol):
    """What can be searched: the `step` of a model or of a decoder."""

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        """ids `[R]` and a state of R rows -> scores (logits) `[R V]` of the symbol to come next, the next state."""


@dataclass(frozen=True)
class Hypothesis:
    """A sequence that was written, and how probable the model holds it to be.

    Attributes:
        ids: what was written, the prefix included, start and end not.
        ended: the end was written; false: cut at the greatest length.
        score: what it was ranked by.
        log_probability: the sum of `steps`, in nats: the model's own, whatever was barred, forced or made warmer.
        steps: each step's log-probability, the end's included.
        attention: `[U S]`, what each step looked at, the end's included; None if the model does not say.
    """

    ids: tuple[int, ...]
    ended: bool
    score: float
    log_probability: float
    steps: tuple[float, ...]
    attention: Float[Tensor, "U S"] | None = field(default=None, compare=False, repr=False)


def first_ids(start: int | Int[Tensor, "B"], rows: int) -> Int[Tensor, "B"]:
    """What is fed first, one id per row.

    Raises:
        ShapeError: a tensor without one entry per row.
    """
    if not isinstance(start, Tensor):
        return torch.full((rows,), start)
    expect_shape("start", start, "B", B=rows)
    return start


class Rules:
    """What may be written at which step of which row.

    Args:
        rows: B.
        end, min_length, max_length, lengths, prefix, barred: see `unrolled.decoding.beam_search`.
        block_ngram: see `unrolled.decoding.BeamSettings`.

    Raises:
        ConfigError, DataError, ShapeError: see `unrolled.decoding.beam_search`.
    """

    def __init__(
        self,
        rows: int,
        end: int,
        min_length: int,
        max_length: int | Callable[[Tensor], Tensor],
        lengths: Int[Tensor, "B"] | Sequence[int] | None,
        prefix: Sequence[Sequence[int]] | None,
        barred: Sequence[int],
        device: torch.device,
        block_ngram: int = 0,
    ) -> None:
        if callable(max_length):
            if lengths is None:
                raise ConfigError("max_length: a function of the source lengths needs them: give lengths, one per row")
            source = torch.as_tensor(lengths, device=device)
            expect_shape("lengths", source, "B", B=rows)
            self.limits = torch.as_tensor(max_length(source), device=device).long()
            expect_shape("max_length(lengths)", self.limits, "B", B=rows)
            if rows and int(self.limits.min()) <= min_length:
                raise ConfigError(
                    f"max_length(lengths): expected above min_length={min_length} everywhere, got "
                    f"{int(self.limits.min())} for a source of {int(source[self.limits.argmin()])} steps"
                )
        else:
            self.limits = torch.full((rows,), max_length, device=device)
        prefix = [[]] * rows if prefix is None else prefix
        if len(prefix) != rows:
            raise DataError(f"prefix: expected one for each of the {rows} rows, got {len(prefix)}")
        for row, (ids, limit) in enumerate(zip(prefix, self.limits.tolist(), strict=True)):
            if end in ids:
                raise DataError(f"prefix: that of row {row} holds the end, id {end}, which ends a hypothesis")
            if len(ids) >= limit:
                raise DataError(
                    f"prefix: that of row {row} has {len(ids)} ids, which leaves nothing of its {limit} steps: "
                    "raise max_length"
                )
        self._longest = max(map(len, prefix), default=0)
        free = [[*ids, *[-1] * (self._longest - len(ids))] for ids in prefix]
        self._forced = torch.tensor(free, dtype=torch.int64, device=device).view(rows, self._longest)
        self._barred = sorted(set(barred))
        self._named = {"barred": self._barred, "prefix": [i for ids in prefix for i in ids], "end": [end]}
        self._end, self._min_length, self.block_ngram = end, min_length, block_ngram

    def at(self, t: int, lines: Int[Tensor, "R"], written: Int[Tensor, "R t"], symbols: int) -> Allowed:
        """What holds at step t. lines: the row that each line of the batch belongs to; symbols: V."""
        if t == 0:
            for name, ids in self._named.items():
                for index in ids:
                    if not 0 <= index < symbols:
                        raise DataError(f"{name}: expected ids of the model's {symbols} symbols, got {index}")
        barred = [*self._barred, self._end] if t < self._min_length else self._barred
        forced = self._forced[lines, t] if t < self._longest else None
        return Allowed(barred, forced, written if 0 < self.block_ngram <= t else None, self.block_ngram)


class Allowed(NamedTuple):
    """What may be written at one step, see `Rules`.

    Shapes: forced `[R]`, -1 where the choice is free; written `[R t]`.
    """

    barred: list[int]
    forced: Tensor | None
    written: Tensor | None
    ngram: int

    def restrict(self, scores: Float[Tensor, "r V"], lines: slice) -> None:
        """Set the scores of what must not be written to -inf, in place; they are those of these lines."""
        forced = None if self.forced is None else self.forced[lines]
        must = None if forced is None else scores.gather(1, forced.clamp_min(0)[:, None])
        scores[:, self.barred] = -math.inf
        if self.written is not None:
            # A symbol is out that followed an earlier run of the ids that are the last n - 1 now.
            past, n = self.written[lines], self.ngram
            t = past.shape[1]
            runs = torch.stack([past[:, i : t - n + 1 + i] for i in range(n)], dim=-1)  # [r t-n+1 n]
            again = (runs[..., :-1] == past[:, None, t - n + 1 :]).all(dim=-1)
            scores[again.nonzero()[:, 0], runs[..., -1][again]] = -math.inf
        if forced is not None and must is not None:
            bound = forced >= 0
            scores[bound] = -math.inf
            scores[bound, forced[bound]] = must[bound, 0]


class Finds(NamedTuple):
    """Hypotheses, n for each of some rows, by their last step. All fields `[b n]`.

    score: what they are ranked by, -inf where there is none; total: log-probability; ended: they wrote the end; t,
    line, symbol, gain: at which step and out of which line of that step's batch, what was written and the
    log-probability of that.
    """

    score: Tensor
    total: Tensor
    ended: Tensor
    t: Tensor
    line: Tensor
    symbol: Tensor
    gain: Tensor

    @classmethod
    def none(cls, rows: int, n: int, device: torch.device) -> Finds:
        """Nothing yet."""
        nothing = torch.full((rows, n), -math.inf, dtype=torch.float64, device=device)
        zero = torch.zeros((rows, n), dtype=torch.int64, device=device)
        return cls(nothing, nothing, zero.bool(), zero, zero, zero, nothing)

    def rows(self, which: Tensor) -> Finds:
        """Those of these rows, by index or mask."""
        return map_state(lambda x: x[which], self)

    def pick(self, which: Int[Tensor, "b m"]) -> Finds:
        """For each row those with these numbers."""
        return map_state(lambda x: x.gather(1, which), self)

    def only(self, which: Bool[Tensor, "b #n"]) -> Finds:
        """The others are none."""
        return self._replace(
            score=self.score.masked_fill(~which, -math.inf),
            total=self.total.masked_fill(~which, -math.inf),
            ended=self.ended & which,
        )

    def best(self, n: int, *others: Finds) -> Finds:
        """The n first of these and the others: those that ended before those that did not, then by score."""
        every = map_state(lambda *parts: torch.cat(parts, dim=1), self, *others)
        order = every.score.sort(dim=1, descending=True, stable=True).indices
        ended = every.ended.gather(1, order).long().sort(dim=1, descending=True, stable=True).indices
        return every.pick(order.gather(1, ended)[:, :n])

    def put(self, which: Int[Tensor, "c"], other: Finds) -> Finds:
        """Other ones for these rows."""
        return map_state(lambda x, y: x.index_copy(0, which, y), self, other)


class Past:
    """Who came from whom: at each step the chosen lines, kept as they were; paths are followed once, at the end."""

    def __init__(self) -> None:
        self._steps: list[tuple[Tensor, Tensor, Tensor]] = []
        self._attention: list[Tensor | None] = []

    def add(
        self, line: Int[Tensor, "R"], symbol: Int[Tensor, "R"], gain: Float[Tensor, "R"], attention: Tensor | None
    ) -> None:
        """A step: the lines that live on, each out of which line of this step's batch, by which symbol of which
        log-probability; and what this step's batch looked at, `[batch S]`."""
        self._steps.append((line, symbol, gain))
        self._attention.append(attention)

    def hypotheses(self, finds: Finds) -> list[list[Hypothesis]]:
        """The finds of every row as they came about, in order.

        Raises:
            ModelError: a row has none.
        """
        found = finds.score > -math.inf  # [B n]
        counts = found.sum(dim=1).tolist()
        if 0 in counts:
            raise ModelError(
                f"row {counts.index(0)}: the model's scores and what is barred or forced leave nothing to write"
            )
        flat = map_state(lambda x: x[found], finds)  # [N]
        line = flat.line
        symbols, gains, looks = [], [], []
        for t in range(len(self._steps) - 1, -1, -1):
            lines, symbol, gain = self._steps[t]
            inside, last = t < flat.t, t == flat.t
            if len(lines):
                at = torch.where(inside, line, 0)
                line = torch.where(inside, lines[at], line)
                symbol, gain = torch.where(inside, symbol[at], flat.symbol), torch.where(inside, gain[at], flat.gain)
            else:
                symbol, gain = flat.symbol, flat.gain
            symbols.append(symbol)
            gains.append(gain)
            if (attention := self._attention[t]) is not None:
                looks.append(attention[torch.where(inside | last, line, 0)])
        written = [[int(i) for i in ids] for ids in zip(*(s.tolist() for s in reversed(symbols)), strict=True)]
        nats = list(zip(*(g.tolist() for g in reversed(gains)), strict=True))
        attended = torch.stack(looks[::-1], dim=1) if looks else None  # [N T S]
        every = iter(
            Hypothesis(
                ids=tuple(written[k][: t + 1 - ended]),
                ended=ended,
                score=score,
                log_probability=total,
                steps=nats[k][: t + 1],
                attention=None if attended is None else attended[k, : t + 1],
            )
            for k, (t, ended, score, total) in enumerate(
                zip(flat.t.tolist(), flat.ended.tolist(), flat.score.tolist(), flat.total.tolist(), strict=True)
            )
        )
        return [[next(every) for _ in range(count)] for count in counts]
