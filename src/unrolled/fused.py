"""The built-in cells over time on the native kernels: one call forward and one backward for a whole layer.

The counterpart of `unrolled.tape`, whose equations and blocks it shares: values and gradients are those of the
reference loop up to rounding (law 6). What the kernels are given, and how they are reached, is in `unrolled.native`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unrolled import budget, native
from unrolled.budget import Blocks, Costs, Tensors
from unrolled.cells import EQUATIONS, BoundCell, HiddenState, Lookup, LSTMState
from unrolled.native import Direction, Gradients

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["contributions", "costs", "layer", "supports"]


def supports(cell: BoundCell) -> str | None:
    """None if `layer` can run this cell here, else the reason why not."""
    if EQUATIONS.get(cell.equation.name) is not cell.equation:
        return f"the equation {cell.equation.name!r} is not a built-in one"
    return native.unsuited(cell.weights.hh)


def layer(
    cells: Sequence[BoundCell],
    inputs: Float[Tensor, "T B I"] | Lookup,
    states: Sequence[Any],
    *,
    reverse: Sequence[bool],
    lengths: Int[Tensor, "B"] | None = None,
    resets: Sequence[Bool[Tensor, "T B"] | None] = (None, None),
    outputs: bool = True,
    all_states: bool = False,
    tape_budget: int | None = None,
) -> tuple[Float[Tensor, "T B D*H"] | None, list[Any], list[Any] | None]:
    """(outputs of all directions side by side, each direction's state after the last step, its states after every
    step), None for what was not asked for. T >= 1.

    Args:
        cells: one for each direction, of one equation and hidden size.
        inputs: vectors or ids; at padding they may hold anything.
        states: each direction's state before its first step.
        reverse: of each direction: go from the last step to the first.
        lengths: int64 on the CPU, 0..T; None: every row has T steps.
        resets: of each direction: where true the state before this step counts as zero.
        tape_budget: in bytes, see `budget.bptt`, for one direction. None: full BPTT.

    Raises:
        ConfigError: not possible in this budget.
        ValueError: a tensor of another shape, a length or id out of its range.
    """
    name = cells[0].equation.name
    steps, batch = (inputs.ids if isinstance(inputs, Lookup) else inputs).shape[:2]
    given, sources = _sources(cells, inputs, lengths)
    directions = [
        Direction(
            source,
            cell.weights.hh,
            cell.weights.bias_ih if given.is_floating_point() else None,
            cell.weights.bias_hh,
            state.h,
            state.c if name == "lstm" else None,
            reset,
            backwards,
        )
        for cell, source, state, reset, backwards in zip(cells, sources, states, resets, reverse, strict=False)
    ]
    block = 0 if torch.compiler.is_compiling() else budget.block_steps(steps, batch)
    if tape_budget is None or not torch.is_grad_enabled():
        run = native.layer(name, given, directions, lengths=lengths, block=block, all_states=all_states)
        ys: Tensor | None = run.outputs
        hs, c, cs = run.h, run.c, run.cs
    else:
        ys, hs, c, cs = _budgeted(
            name, cells[0], inputs, given, directions[0], lengths, outputs, all_states, tape_budget
        )
    fields = [native.unstack(part) for part in (hs, c) if part is not None]
    finals = [HiddenState(*state) if c is None else LSTMState(*state) for state in zip(*fields, strict=True)]
    if not all_states:
        return (ys if outputs else None), finals, None
    assert ys is not None
    every = []
    for d, (final, state) in enumerate(zip(finals, states, strict=True)):
        h = ys.view(*ys.shape[:2], len(cells), cells[d].hidden_size)[:, :, d]
        parts: tuple[Tensor, ...] = (h,) if cs is None else (h, cs[d])
        if lengths is not None:
            # At padding the state is held: the last one, or, read backwards, the first.
            own = (torch.arange(steps)[:, None] < lengths)[..., None]
            held = state if reverse[d] else final
            parts = tuple(torch.where(own, part, at) for part, at in zip(parts, held, strict=True))
        every.append(type(final)(*parts))
    return (ys if outputs else None), finals, every


def _sources(
    cells: Sequence[BoundCell], inputs: Tensor | Lookup, lengths: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """(vectors or ids, what each direction multiplies them with or looks them up in)."""
    if not isinstance(inputs, Lookup):
        return inputs, [cell.weights.ih for cell in cells]
    ids, table = inputs
    if table is None or _projects_table(inputs):
        return ids.long(), [contributions(cell, table) for cell in cells]
    if lengths is not None:
        ids = ids.masked_fill(torch.arange(ids.shape[0])[:, None] >= lengths, 0)
    return F.embedding(ids, table), [cell.weights.ih for cell in cells]


def contributions(cell: BoundCell, table: Float[Tensor, "V I"] | None) -> Float[Tensor, "V G*H"]:
    """What each symbol contributes to a step, `W_ih e + b_ih` for its vector e in the table, or one-hot if None."""
    ih, bias = cell.weights.ih, cell.weights.bias_ih
    if table is not None:
        return native.linear(table, ih, bias)
    return ih.t().contiguous() if bias is None else ih.t() + bias


def _projects_table(inputs: Lookup) -> bool:
    """Whether the whole table is projected, once: not if it has nearly as many rows as there are steps."""
    return inputs.table is None or inputs.table.shape[0] <= inputs.ids.numel() // 4


# ----------------------------------------------------------------------------------------- in a tape budget


def costs(
    cell: BoundCell,
    inputs: Tensor | Lookup,
    *,
    ragged: bool,
    marked: bool,
    outputs: bool,
    all_states: bool,
) -> Costs:
    """What `layer` keeps of one direction with these arguments; of `inputs` only shape and kind matter.

    A block of S steps has the tape, in numbers: h S B H, unless the outputs are returned; LSTM: gates and c,
    5 S B H, GRU: gates and W_hn h + b_hn, 4 S B H; with lengths also the state after it, which without them is part of
    h and c. A state is h, or h and c.
    """
    name, hidden, gates = cell.equation.name, cell.hidden_size, cell.equation.gates
    vectors = inputs.ids if isinstance(inputs, Lookup) else inputs
    steps, batch = vectors.shape[:2]
    size = budget.block_steps(steps, batch)
    rows, width = min(size, steps) * batch, cell.input_size
    looked_up = isinstance(inputs, Lookup) and _projects_table(inputs)
    width = 0 if looked_up else width
    lstm, gated = name == "lstm", name in ("lstm", "gru")
    kept_h = not (outputs or all_states)
    state = batch * hidden * (1 + lstm)
    tape = rows * hidden * (kept_h + 4 * gated + (lstm and not all_states)) + ragged * state
    columns = (4 if gated else 1) * hidden

    # The kernels' scratch memory, of forward and of backward, which is kept from call to call: weights laid out for one
    # of them, in whole panels of vectors; of a block D, the gradients of its sums (for a table that is looked up, also
    # as it was before it was rounded), what it is multiplied with, and each row's sum of it; D of first steps and what
    # is carried from step to step; states passed on.
    def panels(n: int, whole: int = 64) -> int:
        return -(-n // whole) * whole

    cast = torch.is_autocast_enabled("cpu")
    operand = 2 if cast else 4
    fixed = operand * gates * panels(hidden, 64 if gates == 1 else 16) * (panels(width) + panels(hidden))
    for n in (rows, steps % size * batch):  # a shorter last block leaves scratch memory of its own size
        ahead = min(n, max(batch, 128))
        fixed += operand * ((n + batch) * (columns + 16) + n * (panels(width) + panels(hidden)))
        fixed += 4 * (batch + cast * looked_up * n) * (columns + 16)
        fixed += operand * cast * ahead * (width + 2 * hidden + 64)
    fixed += 4 * (4 * batch * hidden + 4 * state)
    # Of each thread: a piece of D turned, and a few blocks that are smaller than the page that each of them takes.
    fixed += torch.get_num_threads() * (4 * 256 * 96 + 8 * 4096)
    if isinstance(inputs, Lookup):
        symbols = cell.input_size if inputs.table is None else inputs.table.shape[0]
        fixed += 4 * (3 * gates * hidden * symbols if looked_up else 2 * steps * batch * width)
    fixed += 4 * 8 * batch + 64 * rows  # lengths of a block, places of its rows and pointers to them
    # And what none of these is: up to a page for each of some twenty small tensors.
    return Costs(-(-steps // size), state * 4, tape * 4, fixed + 96 * 1024)


def _budgeted(
    name: str,
    cell: BoundCell,
    inputs: Tensor | Lookup,
    given: Tensor,
    direction: Direction,
    lengths: Tensor | None,
    outputs: bool,
    all_states: bool,
    tape_budget: int,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Outputs, last h and c and every c, as `native.Layer` has them."""
    needs = costs(
        cell,
        inputs,
        ragged=lengths is not None,
        marked=direction.reset is not None,
        outputs=outputs,
        all_states=all_states,
    )
    steps, batch = given.shape[:2]
    make = _Maker(
        name,
        budget.block_steps(steps, batch),
        direction.reverse,
        torch.is_autocast_enabled("cpu"),
        outputs or all_states,
        all_states and name == "lstm",
    )
    arguments = (
        given if given.is_floating_point() else None,
        None if given.is_floating_point() else given,
        direction.h0,
        direction.c0,
        direction.source,
        direction.hh,
        direction.bias_ih,
        direction.bias_hh,
        lengths,
        direction.reset,
    )
    ys, cs, h, c = budget.bptt(make, needs, tape_budget, arguments, 2)
    assert h is not None
    return ys, h[None], None if c is None else c[None], None if cs is None else cs[None]


@dataclass(frozen=True)
class _Maker:
    """What a run is, but for its tensors; makes the blocks of a pass (`budget.Maker`).

    size: steps in a block; whole_h, whole_c: outputs, every c of all steps are returned.
    """

    name: str
    size: int
    reverse: bool
    bf16: bool
    whole_h: bool
    whole_c: bool
    backend = "native"

    def __call__(
        self,
        arguments: Tensors,
        saved: Tensors | None = None,
        d_returned: Tensors | None = None,
        needs: Sequence[bool] | None = None,
        /,
    ) -> Blocks:
        return _Blocks(self, arguments, saved, d_returned, needs)


class _Blocks:
    """A pass in the blocks of `budget.Blocks`. A state is (h, c) or (h,). A tape is (state before the block, the
    kernels' tape, h and c of its steps), None for what the equation has not or is returned as a whole.

    The weights are laid out for the kernels where computing turns from forward to backward or back, and not again for
    each block: they cannot change within a pass. Between passes they can, and each is an object of its own. Only one
    layout is kept, since a tape that fits in the place of the other saves more than laying out again costs.
    """

    def __init__(
        self,
        make: _Maker,
        arguments: Tensors,
        saved: Tensors | None,
        d_returned: Tensors | None,
        needs: Sequence[bool] | None,
    ) -> None:
        x, ids, h0, c0, source, hh, bias_ih, bias_hh, lengths, reset = arguments
        given = x if ids is None else ids
        assert given is not None and source is not None and hh is not None and h0 is not None
        self.make, self.inputs, self.lengths, self.reset = make, given, lengths, reset
        self.weights = source, hh, bias_ih, bias_hh
        self.steps, self.batch = given.shape[:2]
        self.hidden, self.count = hh.shape[1], -(-self.steps // make.size)
        self.lstm = make.name == "lstm"
        self._pack: tuple[bool, Any] | None = None
        self._spare: Tensor | None = None  # the kernels' tape of a block that this pass does not need any more
        self.start: Tensors = (h0.float(),) if c0 is None else (h0.float(), c0.float())
        shape = (self.steps, self.batch, self.hidden)
        self.writes = saved is None
        if saved is None:
            saved = (
                native.new_whole(*shape) if make.whole_h else None,
                native.new_whole(*shape) if make.whole_c else None,
            )
        self.saved = self.returned = saved
        self.h, self.c = saved
        if needs is None or d_returned is None:
            return
        self.d_h, self.d_c = d_returned
        wanted = [t if n else None for t, n in zip(arguments, needs, strict=True)]
        self.d_x = native.new_whole(*given.shape) if wanted[0] is not None else None
        self.into = Gradients(
            *(None if t is None else torch.zeros_like(t, memory_format=torch.contiguous_format) for t in wanted[4:8])
        )
        self.needs = needs

    def _span(self, block: int) -> slice:
        """The steps of a block, in the order of the sequence."""
        begin = block * self.make.size
        end = min(begin + self.make.size, self.steps)
        return slice(self.steps - end, self.steps - begin) if self.make.reverse else slice(begin, end)

    def _direction(self, state: Tensors, span: slice) -> Direction:
        h, c = (*state, None)[:2]
        assert h is not None
        reset = None if self.reset is None else self.reset[span]
        return Direction(*self.weights, h, c, reset, self.make.reverse)

    def _packed(self, backward: bool) -> list[Any]:
        if self._pack is None or self._pack[0] != backward:
            source, hh = self.weights[:2]
            ih = source if self.inputs.is_floating_point() else None
            self._pack = None  # first, so that its memory can be used again
            self._pack = backward, native.pack(self.make.name, ih, hh, bf16=self.make.bf16, backward=backward)
        return [self._pack[1]]

    def _lengths(self, span: slice) -> Tensor | None:
        return None if self.lengths is None else (self.lengths - span.start).clamp_(0, span.stop - span.start)

    def _run(self, span: slice, state: Tensors, keep: bool) -> tuple[Tensors, Tensors]:
        """(what `record` keeps, the state after).

        What is not kept is written all the same: there is always place for one more tape, and where the gates stand the
        kernels need no other memory for what they are made of. The place is that of the tape needed last: what is
        given back to the system and taken anew costs a sixth of a block's time in page faults.
        """
        own = self.h if self.writes else None
        spare, self._spare = self._spare, None
        if spare is not None and spare.shape[1] != span.stop - span.start:
            spare = None  # before another one is made
        run, tape = native.forward_into(
            self.make.name,
            self.inputs[span],
            [self._direction(state, span)],
            self._lengths(span),
            bf16=self.make.bf16,
            record=True,
            cs=self.make.whole_c,
            packs=self._packed(backward=False),
            outputs=None if own is None else own[span],
            tape=spare,
        )
        if not keep:
            self._spare = tape
        if self.c is not None and self.writes and run.cs is not None:
            self.c[span] = run.cs[0]
        after: Tensors = (run.h[0],) if run.c is None else (run.h[0], run.c[0])
        h = run.outputs if self.h is None else None
        c = run.cs if self.c is None else None
        if keep and self.lengths is None:
            # The last of what is kept anyway.
            last = 0 if self.make.reverse else -1
            every_h = h if self.h is None else self.h[span]
            every_c = None if c is None else c[0]
            if self.c is not None:
                every_c = self.c[span]
            after = tuple(part[last] for part in (every_h, every_c) if part is not None)
        return (*state, tape, h, c), after

    def advance(self, first: int, last: int, state: Tensors) -> Tensors:
        for block in range(first, last):
            state = self._run(self._span(block), state, keep=False)[1]
        return state

    def record(self, block: int, state: Tensors) -> tuple[Tensors, Tensors]:
        return self._run(self._span(block), state, keep=True)

    def final(self, state: Tensors) -> Tensors:
        h, c = (*state, None)[:2]
        assert h is not None
        return h.clone(), None if c is None else c.clone()

    def backward(self, block: int, tape: Tensors, d_state: Tensors) -> Tensors:
        span = self._span(block)
        *state, gates, h, c = tape
        d_h, d_c = (*d_state, None)[:2]
        h = self.h[span] if h is None and self.h is not None else h
        c = self.c[span][None] if c is None and self.c is not None else c
        assert h is not None
        d_h0, d_c0 = native.backward_into(
            self.make.name,
            self.inputs[span],
            [self._direction(tuple(state), span)],
            self._lengths(span),
            h,
            gates,
            c,
            None if self.d_h is None else self.d_h[span],
            None if d_h is None else d_h[None],
            None if d_c is None else d_c[None],
            None if self.d_c is None else self.d_c[span][None],
            [self.into],
            None if self.d_x is None else self.d_x[span],
            bf16=self.make.bf16,
            block=self.make.size,
            packs=self._packed(backward=True),
        )
        self._spare = gates
        return (d_h0[0], None if d_c0 is None else d_c0[0])

    def gradients(self, d_state: Tensors) -> Tensors:
        d_h, d_c = (*d_state, None)[:2]
        found = [self.d_x, None, d_h, d_c, *self.into, None, None]
        return tuple(g if n else None for g, n in zip(found, self.needs, strict=True))


native.set_block_steps(lambda steps, batch: budget.block_steps(steps, batch))
