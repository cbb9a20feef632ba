"""Whole sequences: the most probable ones by beam search, the likeliest symbol at each step, or drawn ones.

Works over a contract, never over a class name:

    step(ids [R], state) -> (scores [R V], state)    read a symbol per row: scores (logits) of the one to come next
    state.select(rows)   -> state                    rows by index (int64); one may be taken many times, or never

A state that says what its step looked at, `attention [R S]`, has that recorded with the symbol it led to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unrolled.decoding.hypotheses import Allowed, Finds, Hypothesis, Past, Rules, Stepped, first_ids
from unrolled.decoding.sampling import AHEAD, NOT_FINITE, Sampling, draw, next_distribution, uniforms
from unrolled.errors import ConfigError, DataError, ModelError, expect_shape

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["BeamSettings", "beam_search", "greedy", "sample"]


@dataclass(frozen=True)
class BeamSettings:
    """How widely is searched, and what a hypothesis may be.

    Attributes:
        beam: how many hypotheses of a row live at once; 1 is greedy.
        length_penalty: alpha >= 0; hypotheses are ranked by log_probability / steps^alpha (the plain power, not the
            ((5 + steps) / 6)^alpha of Wu et al. 2016). 0: by probability, which favours short ones; 1: by the mean
            of a step's log-probability.
        n_best: how many hypotheses are returned for a row, at most `beam`.
        min_length: the end is not written before so many ids.
        max_length: at most so many steps, each of which writes an id or the end; or a function that makes of the
            source lengths `[B]` that of every row, as `lambda source: 2 * source + 10`.
        block_ngram: no run of so many ids is written twice in a hypothesis (Paulus et al. 2018); 0: it may be.

    Raises:
        ConfigError: a value out of its range.
    """

    beam: int = 5
    length_penalty: float = 1.0
    n_best: int = 1
    min_length: int = 0
    max_length: int | Callable[[Tensor], Tensor] = 200
    block_ngram: int = 0

    def __post_init__(self) -> None:
        checks = {
            "beam": (self.beam >= 1, "at least 1 (1 is greedy)"),
            "length_penalty": (0 <= self.length_penalty < math.inf, "at least 0 and finite"),
            "n_best": (1 <= self.n_best <= self.beam, f"1..{self.beam} (the beam)"),
            "min_length": (self.min_length >= 0, "at least 0"),
            "max_length": (callable(self.max_length) or self.max_length >= 1, "at least 1"),
            "block_ngram": (self.block_ngram >= 0, "at least 0 (0 blocks nothing)"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise ConfigError(f"{name}: expected {expected}, got {getattr(self, name)}")
        if not callable(self.max_length) and self.min_length >= self.max_length:
            raise ConfigError(
                f"min_length: expected below max_length={self.max_length}, whose last step is the end's, got "
                f"{self.min_length}"
            )


@torch.inference_mode()
def beam_search(
    model: Stepped,
    state: Any,
    *,
    rows: int,
    start: int | Int[Tensor, "B"],
    end: int,
    settings: BeamSettings | None = None,
    lengths: Int[Tensor, "B"] | Sequence[int] | None = None,
    prefix: Sequence[Sequence[int]] | None = None,
    barred: Sequence[int] = (),
) -> list[list[Hypothesis]]:
    """The best hypotheses of every row, best first; those that ended stand before those that were cut.

    At each step the best `beam` continuations of a row that do not end live on, and those among the best `beam` that
    end are finished. A row leaves the batch once `beam` have finished, at its greatest length, or as soon as no living
    hypothesis can come before the `n_best` finished ones: a log-probability s only falls, so the best score that can
    become of it is s / max_length^alpha.

    Args:
        model, state: see the module; the state has B rows.
        rows: B.
        start: fed first. A tensor also says on which device the ids are to be.
        end: ends a hypothesis.
        lengths: source lengths, for a `max_length` that is a function of them.
        prefix: ids with which each row's hypotheses begin; any number of them, also none.
        barred: ids that are never written. Their probability is not given to others.

    Raises:
        ConfigError: a function `max_length` without `lengths`, or one that gives no more than `min_length`.
        DataError: ids that the model does not have; a prefix that ends or is too long; not one prefix per row.
        ModelError: scores that are not finite, or a row for which nothing is left to write.
        ShapeError: scores that are not `[R V]`; start or lengths without one entry per row.
    """
    settings = settings or BeamSettings()
    beam, n_best, alpha = settings.beam, settings.n_best, settings.length_penalty
    ids = first_ids(start, rows)
    device = ids.device
    rules = Rules(
        rows, end, settings.min_length, settings.max_length, lengths, prefix, barred, device, settings.block_ngram
    )
    found, past = Finds.none(rows, n_best, device), Past()
    finished = torch.zeros(rows, dtype=torch.int64, device=device)
    # The batch holds the same number of lines for every row that is still searched: one at first, then `beam`.
    alive = torch.arange(rows, device=device)  # [b], those rows
    totals = torch.zeros(rows, 1, dtype=torch.float64, device=device)  # [b width], log-probabilities of the lines
    written = ids.new_empty(rows, 0)  # [b*width t], kept up only where n-grams are blocked
    for t in range(int(rules.limits.max()) if rows else 0):
        scores, state = model.step(ids, state)
        expect_shape("scores", scores, "R V", R=len(ids))
        b, width = totals.shape
        # A line has one end, so `beam` others are all that can be wanted of it.
        count = min(beam + 1, scores.shape[1])
        allowed = rules.at(t, alive.repeat_interleave(width), written, scores.shape[1])
        gains, symbols = (x.view(b, width * count) for x in _likeliest(scores, count, allowed))
        total, at = (totals.repeat_interleave(count, dim=1) + gains).topk(min(2 * beam, width * count), dim=1)
        symbols = symbols.gather(1, at)
        new = Finds(
            score=total / (t + 1) ** alpha,
            total=total,
            ended=(symbols == end) & (total > -math.inf),
            t=torch.full_like(at, t),
            line=at // count + width * torch.arange(b, device=device)[:, None],
            symbol=symbols,
            gain=gains.gather(1, at),
        )
        # Those that go on first, in their order. A small vocabulary may have fewer than `beam`: what follows is none.
        onward = new.pick(new.ended.long().sort(dim=1, stable=True).indices[:, :beam])
        onward = onward.only(~onward.ended)
        ended = new.pick(torch.arange(min(beam, at.shape[1]), device=device).expand(b, -1))
        ended = ended.only(ended.ended)
        limits = rules.limits[alive]
        last = limits == t + 1
        best = found.rows(alive).best(n_best, ended, onward.only(last[:, None]))
        found = found.put(alive, best)
        finished[alive] += ended.ended.sum(dim=1)
        done = last | (finished[alive] >= beam) | (best.score[:, -1] >= onward.total[:, 0] / limits**alpha)
        alive, onward = alive[~done], onward.rows(~done)
        totals, lines, ids = onward.total, onward.line.flatten(), onward.symbol.flatten()
        past.add(lines, ids, onward.gain.flatten(), getattr(state, "attention", None))
        if not len(alive):
            break
        state = state.select(lines)
        if rules.block_ngram:
            written = torch.cat([written[lines], ids[:, None]], dim=1)
    return past.hypotheses(found)


_TILE = 128
_BLOCK = 1 << 19  # scores handled at once: 2 MB, so that they stay in the cache from one pass to the next


def _likeliest(
    scores: Float[Tensor, "R V"], count: int, allowed: Allowed
) -> tuple[Float[Tensor, "R count"], Int[Tensor, "R count"]]:
    """The log-probabilities, float64, and the ids of each line's likeliest allowed symbols; -inf where there are no
    more. The probability is shared among all symbols, also those that are not allowed.

    Never a copy of all the scores: some lines at a time in the same scratch memory. With many symbols, the highest
    ones are looked for in those tiles of 128 whose maxima are highest.
    """
    lines, symbols = scores.shape
    tiles = -(-symbols // _TILE)
    block = max(1, _BLOCK // symbols)
    dtype = scores.dtype if scores.dtype == torch.float64 else torch.float32
    scratch = torch.full((min(block, lines), tiles * _TILE), -math.inf, dtype=dtype, device=scores.device)
    gains = torch.empty(lines, count, dtype=torch.float64, device=scores.device)
    ids = torch.empty(lines, count, dtype=torch.int64, device=scores.device)
    finite = torch.ones((), dtype=torch.bool, device=scores.device)
    for first in range(0, lines, block):
        some = slice(first, first + block)
        part = scores[some]
        padded = scratch[: len(part)]
        work = padded[:, :symbols].copy_(part)
        highest = work.amax(dim=1, keepdim=True)
        allowed.restrict(work, some)
        if tiles > 4 * count:
            tiled = padded.view(-1, tiles, _TILE)
            which = tiled.amax(dim=2).topk(count, dim=1).indices  # [r count]
            value, at = tiled.gather(1, which[..., None].expand(-1, -1, _TILE)).flatten(1).topk(count, dim=1)
            index = which.gather(1, at // _TILE) * _TILE + at % _TILE
        else:
            value, index = work.topk(count, dim=1)
        ids[some] = index.clamp_max(symbols - 1)  # a tile's padding, of score -inf, has no id
        total = torch.sub(part, highest, out=work).exp_().sum(dim=1, keepdim=True).double().log() + highest
        finite &= total.isfinite().all()
        gains[some] = value - total
    if not bool(finite):
        raise ModelError(NOT_FINITE)
    return gains, ids


def greedy(
    model: Stepped,
    state: Any,
    *,
    rows: int,
    start: int | Int[Tensor, "B"],
    end: int,
    min_length: int = 0,
    max_length: int | Callable[[Tensor], Tensor] = 200,
    lengths: Int[Tensor, "B"] | Sequence[int] | None = None,
    prefix: Sequence[Sequence[int]] | None = None,
    barred: Sequence[int] = (),
) -> list[Hypothesis]:
    """The symbol with the highest score at every step, for each row: a beam of 1. See `beam_search`."""
    settings = BeamSettings(beam=1, length_penalty=0, min_length=min_length, max_length=max_length)
    found = beam_search(
        model, state, rows=rows, start=start, end=end, settings=settings, lengths=lengths, prefix=prefix, barred=barred
    )
    return [best for (best,) in found]


@torch.inference_mode()
def sample(
    model: Stepped,
    state: Any,
    *,
    rows: int,
    start: int | Int[Tensor, "B"],
    end: int,
    seeds: Sequence[int],
    sampling: Sampling | None = None,
    min_length: int = 0,
    max_length: int | Callable[[Tensor], Tensor] = 200,
    lengths: Int[Tensor, "B"] | Sequence[int] | None = None,
    prefix: Sequence[Sequence[int]] | None = None,
    barred: Sequence[int] = (),
) -> list[Hypothesis]:
    """A sequence drawn for each row, one symbol after the other. See `beam_search`, also for what is raised.

    Args:
        seeds: one per row, which has its own random numbers: what is drawn does not depend on the rest of the batch.
        sampling: how a symbol is drawn; its repetition penalty counts what was written, not what the state has read.

    Raises:
        DataError: not one seed per row.
    """
    sampling = sampling or Sampling()
    BeamSettings(min_length=min_length, max_length=max_length)  # their ranges
    if len(seeds) != rows:
        raise DataError(f"seeds: expected one for each of the {rows} rows, got {len(seeds)}")
    ids = first_ids(start, rows)
    device = ids.device
    rules = Rules(rows, end, min_length, max_length, lengths, prefix, barred, device)
    found, past = Finds.none(rows, 1, device), Past()
    alive = torch.arange(rows, device=device)
    total = torch.zeros(rows, 1, dtype=torch.float64, device=device)
    written = ids.new_empty(rows, 0)
    numbers = [uniforms(seed) for seed in seeds]
    ahead = torch.empty(0, AHEAD)
    for t in range(int(rules.limits.max()) if rows else 0):
        scores, state = model.step(ids, state)
        expect_shape("scores", scores, "R V", R=len(ids))
        if t % AHEAD == 0:
            ahead = torch.stack([next(numbers[row]) for row in alive.tolist()]).to(device)
        scores = scores.double()
        shares = scores.logsumexp(dim=1, keepdim=True)
        if not bool(shares.isfinite().all()):
            raise ModelError(NOT_FINITE)
        open_scores = scores.clone()
        rules.at(t, alive, written, scores.shape[1]).restrict(open_scores, slice(None))
        p = next_distribution(open_scores, sampling, written[:, -sampling.repetition_window :] if t else None)
        symbol = draw(p, ahead[:, t % AHEAD])[:, None]
        gain = scores.gather(1, symbol) - shares
        total = total + gain
        line = torch.arange(len(alive), device=device)[:, None]
        new = Finds(total, total, symbol == end, torch.full_like(symbol, t), line, symbol, gain)
        done = new.ended[:, 0] | (rules.limits[alive] == t + 1)
        found = found.put(alive[done], new.rows(done))
        lines = line[~done, 0]
        ids = symbol[lines, 0]
        past.add(lines, ids, gain[lines, 0], getattr(state, "attention", None))
        if not len(lines):
            break
        alive, total, ahead = alive[lines], total[lines], ahead[lines]
        state = state.select(lines)
        written = torch.cat([written[lines], ids[:, None]], dim=1)
    return [best for (best,) in past.hypotheses(found)]
