"""Backpropagation through time over fixed blocks of time, with everything kept or exactly in a budget of bytes.

A sequence is cut in *blocks* of steps, counted from 0 in the order of computing. Going forward, what the backward of
a block needs can be recorded: the block's *tape*. Or nothing of it is kept, and the block is computed again when its
turn to go backward comes, from a *state* that was kept before it. The gradients are the same bits either way, since
both do the same operations on the same blocks in the same order.

- `block_steps` cuts the sequence. The cut is a function of its size alone, never of the budget: a weight's gradient is
  a sum over blocks, last one first, and another cut would round it differently.
- `plan` finds what to keep and what to compute again, so that the budget holds and the least is computed twice.
- `Blocks` is what a backend must be able to do with a block; `bptt` plays a schedule on it as one autograd node.

The plan is the mixed one of Gruslys, Danihelka, Lanctot, Graves and Munos 2016, "Memory-Efficient Backpropagation
Through Time" (arXiv 1606.03401, section 3.3, BPTT-MSM): at each point either a state or a whole tape may be kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from unrolled.errors import ConfigError, ModelError

__all__ = [
    "Action",
    "Advance",
    "Backward",
    "Blocks",
    "Costs",
    "Drop",
    "Maker",
    "Record",
    "Schedule",
    "Tensors",
    "block_steps",
    "bptt",
    "divide",
    "plan",
]

Tensors: TypeAlias = tuple[Tensor | None, ...]

_ROWS = 256  # rows of a block's products: with fewer, a product does not reach its speed
_MOST = 1024  # blocks of a sequence: with more, the planner would take too long
_WORK = 100_000_000  # numbers that the planner may look at: a third of a second


def block_steps(steps: int, batch: int) -> int:
    """How many of T steps make a block, for B rows; the last block computed may be shorter.

    About 256 rows, so that a block's products are large ones; but at most T/64 or 16 steps, whichever is more, so that
    long sequences of few rows are cut finely enough for a small budget and short ones do not fall to pieces; and at
    least T/1024 steps.
    """
    finest = max(1, math.ceil(steps / _MOST))
    return max(finest, min(math.ceil(_ROWS / max(batch, 1)), max(16, math.ceil(steps / 64))))


# --------------------------------------------------------------------------------------------- schedules


class Advance(NamedTuple):
    """Compute blocks `first` to `last` - 1 without a tape and keep the state before block `last`."""

    first: int
    last: int


class Record(NamedTuple):
    """Compute a block and keep its tape, and with it the state after the block."""

    block: int


class Backward(NamedTuple):
    """Take a block's gradients from its tape and drop the tape."""

    block: int


class Drop(NamedTuple):
    """Forget the state before this block."""

    block: int


Action: TypeAlias = Advance | Record | Backward | Drop


class Schedule(NamedTuple):
    """What to do, in order, with a sequence of `blocks` blocks; the state before block 0 is at hand throughout.

    What comes before the first Backward is the pass forward: it computes each block once.
    """

    blocks: int
    actions: tuple[Action, ...]

    @classmethod
    def full(cls, blocks: int) -> Schedule:
        """Full BPTT: every tape is kept and nothing computed twice."""
        records: list[Action] = [Record(block) for block in range(blocks)]
        return cls(blocks, (*records, *(Backward(block) for block in reversed(range(blocks)))))

    def cost(self) -> int:
        """How many blocks are computed again, each as often as that happens."""
        computed = 0
        for action in self.actions:
            if isinstance(action, Advance):
                computed += action.last - action.first
            elif isinstance(action, Record):
                computed += 1
        return computed - self.blocks

    def peak(self, state: int, tape: int) -> int:
        """The most that is kept at a time, for the bytes of a state and of a tape."""
        now = most = 0
        for action in self.actions:
            if isinstance(action, Advance):
                now += state
            elif isinstance(action, Record):
                now += tape
            else:
                now -= state if isinstance(action, Drop) else tape
            most = max(most, now)
        return most

    def forward(self) -> tuple[Action, ...]:
        """The actions of the pass forward."""
        return self.actions[: self._turn()]

    def backward(self) -> tuple[Action, ...]:
        """The actions of the pass backward."""
        return self.actions[self._turn() :]

    def _turn(self) -> int:
        return next((k for k, action in enumerate(self.actions) if isinstance(action, Backward)), len(self.actions))


# ----------------------------------------------------------------------------------------------- planning


class Costs(NamedTuple):
    """What one run of BPTT keeps, in bytes. state, tape: of one block (the longest); fixed: what is there whatever is
    kept: the scratch memory of one block that is being computed, copies of weights."""

    blocks: int
    state: int
    tape: int
    fixed: int

    @property
    def least(self) -> int:
        """The least budget in which it is possible."""
        return self.fixed + _least(self.blocks, self.state, self.tape)

    @property
    def full(self) -> int:
        """The budget in which nothing is computed twice."""
        return self.fixed + self.blocks * self.tape

    def plan(self, budget: int) -> Schedule:
        """The schedule for so many bytes; see `plan`."""
        return plan(self.blocks, self.state, self.tape, budget - self.fixed)


def divide(budget: int, runs: Sequence[tuple[int, int]]) -> list[int]:
    """A budget in bytes divided between runs that all keep something at the same time.

    Each gets the least it needs, and of what is left a share in proportion to how much more it could use.

    Args:
        runs: (least, full) in bytes for each, as in `Costs`.

    Raises:
        ConfigError: the budget is below the sum of what they need at least; the message names that sum.
    """
    least, full = sum(run[0] for run in runs), sum(run[1] for run in runs)
    if budget < least:
        raise ConfigError(
            f"tape_budget: not possible in {budget:,} bytes: expected at least {least:,} (with {full:,} nothing is "
            f"computed twice)"
        )
    rest, wanted = budget - least, max(full - least, 1)
    return [low + rest * (high - low) // wanted for low, high in runs]


def _least(blocks: int, state: int, tape: int) -> int:
    """One tape, and if there are more the state before it; or all tapes, if these take less."""
    return min(blocks * tape, tape + state)


@lru_cache(maxsize=64)
def plan(blocks: int, state: int, tape: int, budget: int) -> Schedule:
    """The schedule that computes least again among those that never keep more than `budget`.

    Args:
        blocks: n >= 1, of which each is computed at the same cost and has a tape of the same size.
        state, tape: what a kept state and a kept tape take, in any unit, e.g. bytes.
        budget: what may be kept at a time, in the same unit.

    With C(t, m) for how many blocks must be computed to go forward and backward through t blocks, given the state
    before the first and m for what is kept beyond it:

        C(1, m) = 1                                                 if a tape fits into m
        C(t, m) = min(1 + C(t - 1, m - tape),                       keep the first block's tape till its turn comes
                      min over 0 < y < t of  y + C(t - y, m - state) + C(y, m))
                                                                    keep the state after y blocks, do the rest, drop
                                                                    the state and begin again with the first y

    which is the paper's recurrence: its third choice, to keep the tape of block y alone, is the second one followed by
    the first. The state that a tape was made from stays until the block has gone backward.

    All t and m are computed, t^2/2 numbers for each m. m is counted in the greatest common unit of state and tape, so
    that the plan is optimal, as long as that means at most 10^8 numbers (a third of a second). Above, costs are rounded
    up to a larger unit, and the plan is the better one of what comes of that and of the best that computes no block
    more than twice; it keeps to the budget, but may compute a little more than it must.

    Raises:
        ConfigError: not possible in this budget; the message names the least that is.
    """
    least = _least(blocks, state, tape)
    if budget < least:
        raise ConfigError(f"not possible in a budget of {budget:,}: expected at least {least:,}")
    if blocks * tape <= budget:
        return Schedule.full(blocks)
    # One tape always fits; what is counted in units is what may be kept beyond it. A unit is unit / parts.
    rest = budget - tape
    most = max(2 * _WORK // blocks**2, 16)
    unit, parts = math.gcd(state, tape), 1
    exact = rest <= most * unit
    if not exact:
        unit, parts = (state, most * state // rest) if rest < most * state else (-(-rest // most), 1)
    levels = rest * parts // unit
    state_units, tape_units = -(-state * parts // unit), -(-tape * parts // unit)
    choices = _choices(blocks, state_units, tape_units, levels)
    found = Schedule(blocks, _actions(blocks, choices, state_units, tape_units))
    twice = None if exact else _twice(blocks, state, tape, budget)
    return found if twice is None or found.cost() <= twice.cost() else twice


def _twice(blocks: int, state: int, tape: int, budget: int) -> Schedule | None:
    """The best schedule that computes no block more than twice, if there is one.

    As many of the last blocks as fit keep their tapes; the others are cut in parts, each as long as its tapes fit
    beside the states before it and the parts to its left.
    """

    def fit(held: int) -> int:
        return (budget - held * state) // tape

    starts = [0]  # of the parts; while part k is done the states before parts 1 to k are kept
    while blocks - starts[-1] > (length := fit(len(starts) - 1)):
        if length < 1:
            return None
        starts.append(min(starts[-1] + length, blocks - max(fit(len(starts)), 0)))
    actions: list[Action] = [Advance(a, b) for a, b in pairwise(starts)]
    for number, (first, end) in enumerate(reversed([*pairwise([*starts, blocks])])):
        if number:
            actions.append(Drop(end))
        actions += [Record(block) for block in range(first, end)]
        actions += [Backward(block) for block in reversed(range(first, end))]
    return Schedule(blocks, tuple(actions))


def _choices(blocks: int, state: int, tape: int, levels: int) -> np.ndarray[Any, np.dtype[np.int16]]:
    """For t blocks and m units the best y, or 0 for keeping the first block's tape: `[t m]`."""
    # float32 is exact here: no cost reaches 1024^2/2. Row t of `cost` is C(t, .), infinite where it does not fit.
    cost = np.full((blocks + 1, levels + 1), np.inf, dtype=np.float32)
    cost[1] = 1
    choice = np.zeros((blocks + 1, levels + 1), dtype=np.int16)
    # Row t of `later` is C(t, m - state).
    later = np.full_like(cost, np.inf)
    later[1, state:] = 1
    ahead = np.arange(blocks, dtype=np.float32)[:, None]
    every = np.arange(levels + 1)
    for t in range(2, blocks + 1):
        kept = later[t - 1 : 0 : -1] + cost[1:t]  # row y - 1: the rest t - y, and the first y
        kept += ahead[1:t]
        best = kept.argmin(axis=0)
        cost[t] = kept[best, every]
        choice[t] = best + 1
        if tape <= levels:
            taped = cost[t - 1, : levels + 1 - tape] + 1
            better = taped <= cost[t, tape:]
            cost[t, tape:][better] = taped[better]
            choice[t, tape:][better] = 0
        later[t, state:] = cost[t, : levels + 1 - state]
    return choice


def _actions(blocks: int, choice: np.ndarray[Any, np.dtype[np.int16]], state: int, tape: int) -> tuple[Action, ...]:
    """The actions that the choices make; a stack in place of recursion, whose depth would be the number of blocks."""
    actions: list[Action] = []
    todo: list[Action | tuple[int, int, int]] = [(0, blocks, choice.shape[1] - 1)]
    while todo:
        task = todo.pop()
        if isinstance(task, Advance | Record | Backward | Drop):
            actions.append(task)
            continue
        first, t, m = task
        y = int(choice[t, m])
        if t == 1:
            todo += [Backward(first), Record(first)]
        elif y == 0:
            todo += [Backward(first), (first + 1, t - 1, m - tape), Record(first)]
        else:
            middle = first + y
            todo += [(first, y, m), Drop(middle), (middle, t - y, m - state), Advance(first, middle)]
    return tuple(actions)


# ------------------------------------------------------------------------------------------------ playing


class Blocks(Protocol):
    """One layer over one sequence, block by block: what a backend does, on tensors without a history of gradients.

    An object is made for the pass forward, and another for the pass backward (see `Maker`). A *state* is a tuple of
    tensors, the same for all blocks, with what must be known to compute from there and is not in `saved`; a *tape*
    is a tuple of tensors, with what `backward` needs and is not in `saved`. Both own their memory, or share that of a
    state or tape that was passed in or is returned with them: they keep nothing else alive, and as long as they are
    needed they are not written to. `advance` and `record` compute the same bits, in both passes and however often.
    """

    count: int
    start: Tensors
    """The state before block 0."""
    saved: Tensors
    """Memory for all steps that is kept to the end in any case, since it is part of what is returned. The pass forward
    fills it; the pass backward reads it and never writes to it, for others may have kept it too."""
    returned: Tensors
    """Forward: what is returned for all steps, filled by that pass; it may be views of `saved`."""

    def advance(self, first: int, last: int, state: Tensors) -> Tensors:
        """The state before block `last` from the state before block `first` < `last`, in memory of its own."""

    def record(self, block: int, state: Tensors) -> tuple[Tensors, Tensors]:
        """(the block's tape, the state after it), the state as views of the tape or of `saved`."""

    def final(self, state: Tensors) -> Tensors:
        """What is returned as the state after the last block, in memory of its own."""

    def backward(self, block: int, tape: Tensors, d_state: Tensors) -> Tensors:
        """The gradient of the state before the block, from that of the state after it, both as `final` has them (None:
        there is none).

        Adds the block's share to the arguments' gradients in place; called for the last block first. Leaves the tape as
        it is; `advance` and `record` may write over it later. (Tapes that go backward once more are those of a pass
        that computes nothing again.)
        """

    def gradients(self, d_state: Tensors) -> Tensors:
        """The arguments' gradients, in the arguments' order, None where there is none; d_state: of the first state."""


class Maker(Protocol):
    """Makes the Blocks of a pass. Forward: `make(arguments)`. Backward: also what the pass forward saved, the gradients
    of what it returned (None: there is none), and which arguments need one."""

    @property
    def backend(self) -> str:
        """What `unroll` calls it, for messages."""

    def __call__(
        self,
        arguments: Tensors,
        saved: Tensors | None = None,
        d_returned: Tensors | None = None,
        needs: Sequence[bool] | None = None,
        /,
    ) -> Blocks: ...


class _Kept:
    """What is kept at a time: states and tapes by block. No name may hold one of them from one action to the next, for
    it would stay in memory."""

    def __init__(self, start: Tensors) -> None:
        self.states: dict[int, Tensors] = {0: start}
        self.tapes: dict[int, Tensors] = {}

    def play(self, blocks: Blocks, actions: Sequence[Action], d_state: Tensors = ()) -> Tensors:
        """Do what the actions say, from the gradient of the last state, where they go backward; returns that of the
        first state."""
        for action in actions:
            if isinstance(action, Advance):
                self.states[action.last] = blocks.advance(action.first, action.last, self.states[action.first])
            elif isinstance(action, Record):
                self._record(blocks, action.block)
            elif isinstance(action, Drop):
                del self.states[action.block]
            else:
                self.states.pop(action.block + 1, None)
                d_state = blocks.backward(action.block, self.tapes.pop(action.block), d_state)
        return d_state

    def _record(self, blocks: Blocks, block: int) -> None:
        self.tapes[block], self.states[block + 1] = blocks.record(block, self.states[block])


def bptt(make: Maker, costs: Costs, budget: int | None, arguments: Tensors, returned: int) -> tuple[Tensor | None, ...]:
    """Run a sequence through a backend's blocks, differentiable once with respect to the arguments.

    Args:
        make: the backend.
        costs: what it keeps.
        budget: in bytes, for what is kept between forward and backward and the scratch memory of both, beyond the
            arguments, what is returned and their gradients. None: full BPTT.
        arguments: all tensors that go in.
        returned: how many tensors `Blocks.returned` has.

    Returns:
        `Blocks.returned`, then `Blocks.final`.

    In a budget the backward pass uses up what was kept, to make place. Where the graph is kept for another one
    (`retain_graph=True`), that one begins with a pass forward of its own: the same bits, for some more time.

    Raises:
        ConfigError: not possible in this budget; the message names the least that is.
        ModelError: in backward, if a second derivative is asked for.
    """
    schedule = None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments):
        if budget is None:
            schedule = Schedule.full(costs.blocks)
        else:
            schedule = costs.plan(divide(budget, [(costs.least, costs.full)])[0])
    results: tuple[Tensor | None, ...] = _Bptt.apply(make, schedule, returned, *arguments)  # type: ignore[no-untyped-call]
    return results


class _Bptt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, make: Maker, schedule: Schedule | None, returned: int, *arguments: Tensor | None) -> Tensors:
        ctx.set_materialize_grads(False)
        with torch.autocast("cpu", enabled=False):
            blocks = make(arguments)
            if schedule is None:
                return (*blocks.returned, *blocks.final(blocks.advance(0, blocks.count, blocks.start)))
            kept = _Kept(blocks.start)
            kept.play(blocks, schedule.forward())
            final = blocks.final(kept.states.pop(blocks.count))
        ctx.make, ctx.schedule, ctx.returned = make, schedule, returned
        ctx.sizes = len(arguments), len(blocks.saved)
        ctx.kept = None
        tapes: list[Tensor | None] = []
        if schedule.cost() == 0:
            # Autograd lets go of these after the backward pass, and keeps them for another one if asked to.
            tapes = [t for block in range(blocks.count) for t in kept.tapes[block]]
        else:
            del kept.states[0]  # follows from the arguments
            ctx.kept = kept
        ctx.save_for_backward(*arguments, *blocks.saved, *tapes)
        return (*blocks.returned, *final)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        make, schedule = ctx.make, ctx.schedule
        if torch.is_grad_enabled():
            raise ModelError(
                f"the {make.backend} path is differentiable once; for second derivatives (create_graph=True) "
                "use backend='reference'"
            )
        tensors = ctx.saved_tensors
        count, more = ctx.sizes
        arguments, saved, tapes = tensors[:count], tensors[count : count + more], tensors[count + more :]
        with torch.autocast("cpu", enabled=False):
            blocks = make(arguments, saved, grads[: ctx.returned], ctx.needs_input_grad[3:])
            kept, ctx.kept = ctx.kept, None
            if schedule.cost() == 0:
                kept = _Kept(blocks.start)
                size = len(tapes) // schedule.blocks
                kept.tapes = {block: tapes[block * size : (block + 1) * size] for block in range(schedule.blocks)}
            elif kept is None:
                kept = _Kept(blocks.start)
                kept.play(blocks, schedule.forward())
            else:
                kept.states[0] = blocks.start
            gradients = blocks.gradients(kept.play(blocks, schedule.backward(), grads[ctx.returned :]))
        return None, None, None, *gradients
