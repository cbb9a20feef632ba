"""The built-in cells over time with backpropagation through time written out by hand, in plain torch operations.

The reference loop in `unroll` lets autograd record some ten operations for every step and adds up each weight's
gradient step by step. Here the sequence is cut in blocks of some 256 rows (`budget.block_steps`). A forward loop over a
block's steps writes what the backward needs on the block's *tape*, and a backward loop walks it from the last step to
the first; the inputs' share of all steps, and the weights' gradients, are then one product for each block. Values and
gradients are those of the reference loop up to rounding (law 6); the gain is that the small operations between the
products are fewer and in place. Which tapes are kept, and which are made again, is the business of `budget`.

Notation, with d(x) for the gradient of the loss with respect to x and * elementwise:

    RNN    d(a) = d(h') * (1 - h'^2)     or d(h') where h' > 0     d(h) = W_hh^T d(a)
    LSTM   d(o) = d(h') tanh(c')         d(c') += d(h') o (1 - tanh(c')^2)
           d(i) = d(c') g    d(f) = d(c') c    d(g) = d(c') i      d(c) = d(c') f
           each gate's gradient times s (1 - s), or 1 - g^2, is d(a);      d(h) = W_hh^T d(a)
    GRU    d(z) = d(h') (h - n)          d(n) = d(h') (1 - z)      d(r) = d(a_n) (W_hn h + b_hn)
           d(h) = d(h') z + W_hh^T [d(a_r), d(a_z), d(a_n) r]

    d(W_hh) = sum over blocks of D^T P          D [S*B G*H] = d(a_t), P [S*B H] = h_{t-1}, S steps in the block
    d(W_ih) = sum over blocks of D^T X          X [S*B I] = x_t                            d(X) = D W_ih

Source: Werbos 1990, "Backpropagation through time: what it does and how to do it".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unrolled import budget
from unrolled.budget import Blocks, Costs, Tensors
from unrolled.cells import GRU, LSTM, RNN, BoundCell, Lookup, ReluRNN

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = ["costs", "recurrence", "supports", "uses_onednn"]

_EQUATIONS = tuple(cell.equation for cell in (RNN, ReluRNN, LSTM, GRU))
_tanh_backward = torch.ops.aten.tanh_backward
_relu_backward = torch.ops.aten.threshold_backward  # nothing where h is 0, be the gradient infinite
_sigmoid_backward = torch.ops.aten.sigmoid_backward


def supports(cell: BoundCell) -> str | None:
    """None if `recurrence` can run this cell here, else the reason why not."""
    weight = cell.weights.hh
    if weight.device.type != "cpu":
        return f"the weights are on {weight.device.type}"
    if weight.dtype not in (torch.float32, torch.float64):
        return f"the weights are {str(weight.dtype).removeprefix('torch.')}"
    if cell.equation not in _EQUATIONS:
        return f"the equation {cell.equation.name!r} is not a built-in one"
    if torch.compiler.is_compiling():
        return "the model is being compiled"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    return None


def recurrence(
    cell: BoundCell,
    inputs: Float[Tensor, "T B I"] | Lookup,
    state: Any,
    *,
    reverse: bool = False,
    keep: Bool[Tensor, "T B 1"] | None = None,
    clear: Bool[Tensor, "T B 1"] | None = None,
    outputs: bool = True,
    all_states: bool = False,
    tape_budget: int | None = None,
) -> tuple[Float[Tensor, "T B H"] | None, Any, Any]:
    """(outputs, state after the last step, states after every step), None for what was not asked for. T >= 1.

    Args:
        inputs: vectors or ids; where `keep` is false they may hold anything.
        state: the state before the first step.
        reverse: go from the last step to the first; the state before "the first step" then precedes step T-1.
        keep: where false the step is padding: the state passes through unchanged, the output is zero.
        clear: where true the state before this step counts as zero.
        tape_budget: in bytes, see `budget.bptt`. None: full BPTT.

    Differentiable once: a second derivative raises ModelError, which names the reference path.

    Raises:
        ConfigError: not possible in this budget.
    """
    kind, weights = cell.equation.state, cell.weights
    # Autocast leaves float64 alone.
    cast = torch.is_autocast_enabled("cpu") and weights.hh.dtype != torch.float64
    compute = torch.get_autocast_dtype("cpu") if cast else weights.hh.dtype
    ids = inputs.ids if isinstance(inputs, Lookup) else None
    steps, batch = (inputs if ids is None else ids).shape[:2]  # type: ignore[union-attr]
    needs = costs(
        cell, inputs, ragged=keep is not None, marked=clear is not None, outputs=outputs, all_states=all_states
    )
    source, ih, bias_ih = _source(cell, inputs)
    make = _Maker(
        cell.equation.name,
        budget.block_steps(steps, batch),
        reverse,
        compute,
        whole_h=_whole_h(outputs, all_states, keep is not None),
        whole_c=all_states and cell.equation.name == "lstm",
        masked=outputs and keep is not None and not all_states,
    )
    c0 = state.c if cell.equation.name == "lstm" else None
    arguments = (source, ids, state.h, c0, ih, bias_ih, weights.hh, weights.bias_hh, keep, clear)
    hs, cs, h, c = budget.bptt(make, needs, tape_budget, arguments, 2)
    final = kind(h) if c is None else kind(h, c)  # type: ignore[call-arg,arg-type]
    if hs is None:
        return None, final, None
    states = None
    if all_states:
        states = kind(hs) if c is None else kind(hs, cs)  # type: ignore[call-arg,arg-type]
    if not outputs:
        return None, final, states
    return hs.masked_fill(~keep, 0) if all_states and keep is not None else hs, final, states


def _whole_h(outputs: bool, all_states: bool, ragged: bool) -> bool:
    """Whether the hidden states of all steps are returned, so that no tape has to keep them. In ragged outputs there
    are zeros in their place."""
    return all_states or (outputs and not ragged)


def _source(cell: BoundCell, inputs: Tensor | Lookup) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(what the inputs are or are looked up in, W_ih, b_ih); without W_ih, b_ih: a table of projected inputs."""
    ih, bias = cell.weights.ih, cell.weights.bias_ih
    if not isinstance(inputs, Lookup):
        return inputs, ih, bias
    if inputs.table is None:
        table = ih.t().contiguous()  # whose rows are looked up: they must lie together
        return table if bias is None else table + bias, None, None
    if _projects_table(inputs):
        return F.linear(inputs.table, ih, bias), None, None
    return inputs.table, ih, bias


def _projects_table(inputs: Lookup) -> bool:
    """Whether the whole table is projected, once. It stays in memory until the backward is done, so not if it has
    nearly as many rows as there are steps."""
    return inputs.table is None or inputs.table.shape[0] <= inputs.ids.numel() // 4


def costs(
    cell: BoundCell,
    inputs: Tensor | Lookup,
    *,
    ragged: bool,
    marked: bool,
    outputs: bool,
    all_states: bool,
) -> Costs:
    """What `recurrence` keeps with these arguments; of `inputs` only shape and kind matter.

    A block of S steps has the tape, in numbers:

        RNN    h: (S+1) B H
        LSTM   gates, tanh(c'), h, c: S B 4H + S B H + 2 (S+1) B H
        GRU    gates, W_hn h + b_hn, h: S B 3H + S B H + (S+1) B H

    less h, or h and c, where these are returned for all steps and so are there anyway.
    """
    name, hidden, gates = cell.equation.name, cell.hidden_size, cell.equation.gates
    vectors = inputs.ids if isinstance(inputs, Lookup) else inputs
    steps, batch = vectors.shape[:2]
    size = budget.block_steps(steps, batch)
    number = cell.weights.hh.element_size()
    cast = torch.is_autocast_enabled("cpu") and number == 4
    rows, width, product = min(size, steps) * batch, cell.input_size, gates * hidden
    own = (not _whole_h(outputs, all_states, ragged)) + (name == "lstm" and not all_states)  # of h and c
    gated = name in ("lstm", "gru")
    tape = gated * rows * (product + hidden) + own * (rows + batch) * hidden
    state = own * batch * hidden

    looked_up = isinstance(inputs, Lookup) and _projects_table(inputs)
    source = inputs.table if isinstance(inputs, Lookup) else inputs
    onward = not looked_up and source is not None and source.requires_grad  # the gradient goes on to the inputs
    # The inputs of a block are copied if they do not lie together as they are.
    copies = isinstance(inputs, Lookup) or ragged or not inputs.is_contiguous()
    # Weights transposed for the backward pass; under autocast all of them in its dtype.
    fixed = product * (hidden + onward * width) * (2 if cast else 1)
    # Forward, a block that is not recorded has its sums before the gates and its states, and backward it has their
    # gradient (the GRU's candidate a second one), what it is multiplied with, and the gradient of its inputs.
    forward = rows * (product + copies * width) + own * (rows + batch) * hidden
    backward = rows * (product + (copies + onward) * width + (marked + (name == "gru")) * hidden)
    fixed += max(forward, backward)
    if cast:  # their copies in 16 bits, and a weight's gradient before it is added
        fixed += (rows * (2 * product + 2 * width + hidden) + product * max(width, hidden)) // 2
    # A step has its product, in both dtypes, and some ten vectors per row; gradients of biases.
    fixed += batch * (2 * product + 12 * hidden) + 2 * product
    if isinstance(inputs, Lookup) and looked_up:
        # The projected table and its gradient, each made in two operations.
        fixed += 3 * product * (width if inputs.table is None else inputs.table.shape[0])
    # What oneDNN takes for itself, as measured: 64 columns of a weight for each thread; in 16 bits more.
    if number == 4 and _onednn is not None:
        fixed += torch.get_num_threads() * 64 * (max(product, width) + (1024 if cast else 16))
    masks = 2 * steps * batch * (ragged + marked) + 16 * rows  # bytes: where steps are padding or marked; a block's ids
    return Costs(-(-steps // size), state * number, tape * number, fixed * number + masks + 4096)


def _linear(weight: Tensor, bias: Tensor | None, compute: torch.dtype) -> Callable[[Tensor], Tensor]:
    """`x -> x W^T + b` for a small batch and many calls, computed in `compute`, returned in the weight's dtype."""
    dtype = weight.dtype
    w, b = weight.to(compute), None if bias is None else bias.to(compute)
    if compute != dtype:
        return lambda x: F.linear(x.to(compute), w, b).to(dtype)
    if dtype == torch.float32 and _onednn is not None:
        # oneDNN's product is a third faster than the BLAS behind F.linear for 64 rows (183 against 134 GFLOP/s
        # at 64 x 512 x 2048 on two AVX-512 cores); torch reaches it by this operator only.
        product = _onednn
        w = w.contiguous()
        return lambda x: product(x, w, b, "none", [], "")
    return lambda x: F.linear(x, w, b)


def _find_onednn() -> Callable[..., Tensor] | None:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_onednn = _find_onednn()


def uses_onednn() -> bool:
    """Whether the product of a single step goes through oneDNN in float32."""
    return _onednn is not None


# ------------------------------------------------------------------------------------------------ blocks


@dataclass(frozen=True)
class _Maker:
    """What a run is, but for its tensors; makes the blocks of a pass (`budget.Maker`).

    size: steps in a block; whole_h, whole_c: the states of all steps are returned, so they stand in memory of their
    own; masked: the outputs are returned with zeros in padding.
    """

    equation: str
    size: int
    reverse: bool
    compute: torch.dtype
    whole_h: bool
    whole_c: bool
    masked: bool
    backend = "tape"

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
    """A pass in the blocks of `budget.Blocks`. Those are counted in the order of computing; a block's steps are in the
    order of the sequence.

    A state is (h, c), a tape is (h [S+1 B H], c [S+1 B H], gates [S B G*H], extra [S B H]), less what the equation has
    not and what is returned for all steps (then None in a tape). Slot s of h and c holds the state before step s of
    the block (forward) or after it (reverse); the spare slot is where the block starts. extra: LSTM tanh(c'); GRU
    W_hn h + b_hn, which the reset gate multiplies.

    To be the same bits at any time, a product must see its operands at the same distance from a border of 64 bytes:
    with MKL another alignment is another order of summation. So what a block computes begins in memory of its own.
    """

    def __init__(
        self,
        make: _Maker,
        arguments: Tensors,
        saved: Tensors | None,
        d_returned: Tensors | None,
        needs: Sequence[bool] | None,
    ) -> None:
        source, ids, h0, c0, ih, bias_ih, hh, bias_hh, keep, clear = arguments
        assert source is not None and h0 is not None and hh is not None
        self.make, self.source, self.ids, self.keep, self.clear = make, source, ids, keep, clear
        self.ih, self.bias_ih, self.hh, self.bias_hh = ih, bias_ih, hh, bias_hh
        self.steps, self.batch = (source if ids is None else ids).shape[:2]
        self.hidden, self.dtype = hh.shape[1], hh.dtype
        self.count = -(-self.steps // make.size)
        self.longest = min(make.size, self.steps)
        self.gated = make.equation in ("lstm", "gru")
        self.h0, self.c0 = h0.to(self.dtype), None if c0 is None else c0.to(self.dtype)
        own_h, own_c = not make.whole_h, c0 is not None and not make.whole_c
        self.start: Tensors = (*((self.h0,) if own_h else ()), *((self.c0,) if own_c else ()))
        self._recurrent: Callable[[Tensor], Tensor] | None = None
        self._input: Callable[[Tensor], Tensor] | None = None
        self.forward = saved is None
        if saved is None:
            saved = self._new_results()
        # [T+1 B H], slots as above: the states of all steps, where they are returned.
        self.whole_h, self.whole_c = self.saved = saved
        after = slice(0, -1) if make.reverse else slice(1, None)
        self.masked = self.new(self.steps) if make.masked and self.forward else None
        self.returned: Tensors = (
            self.masked if self.whole_h is None else self.whole_h[after],
            None if self.whole_c is None else self.whole_c[after],
        )
        if d_returned is not None and needs is not None:
            self._new_gradients(d_returned, needs)

    def _new_results(self) -> Tensors:
        start = -1 if self.make.reverse else 0
        whole_h = self.new(self.steps + 1) if self.make.whole_h else None
        if whole_h is not None:
            whole_h[start] = self.h0
        whole_c = self.new(self.steps + 1) if self.make.whole_c else None
        if whole_c is not None and self.c0 is not None:
            whole_c[start] = self.c0
        return whole_h, whole_c

    def _new_gradients(self, d_returned: Tensors, needs: Sequence[bool]) -> None:
        self.d_hs, self.d_cs = d_returned
        self.d_ih, self.d_bias_ih, self.d_hh, self.d_bias_hh = (
            weight.new_zeros(weight.shape) if weight is not None and need else None
            for weight, need in zip((self.ih, self.bias_ih, self.hh, self.bias_hh), needs[4:8], strict=True)
        )
        self.d_source: Tensor | None = None
        if needs[0] and self.ids is None:
            self.d_source = self.source.new_empty(self.source.shape)
        elif needs[0]:
            self.d_source = self.source.new_zeros(self.source.shape, dtype=self.dtype)
        self._back = _linear(self.hh.t(), None, self.make.compute)
        self._back_input: Callable[[Tensor], Tensor] | None = None
        if self.d_source is not None and self.ih is not None:
            self._back_input = _linear(self.ih.t(), None, self.make.compute)

    def new(self, *steps: int) -> Tensor:
        """Memory for [*steps B H]."""
        return self.hh.new_empty(*steps, self.batch, self.hidden)

    def _span(self, block: int) -> tuple[int, int]:
        """The block's steps, in the order of the sequence."""
        begin = block * self.make.size
        end = min(begin + self.make.size, self.steps)
        return (self.steps - end, self.steps - begin) if self.make.reverse else (begin, end)

    def advance(self, first: int, last: int, state: Tensors) -> Tensors:
        slots = self._slots(self.longest)
        for block in range(first, last):
            state, _ = self._compute(block, state, slots, None)
        return tuple(None if t is None else t.clone() for t in state)

    def record(self, block: int, state: Tensors) -> tuple[Tensors, Tensors]:
        begin, end = self._span(block)
        slots = self._slots(end - begin)
        extra = self.new(end - begin) if self.gated else None
        state, gates = self._compute(block, state, slots, extra)
        return (*slots, gates if self.gated else None, extra), state

    def final(self, state: Tensors) -> Tensors:
        last, parts = 0 if self.make.reverse else self.steps, iter(state)
        h = next(parts) if self.whole_h is None else self.whole_h[last]
        c = None if self.c0 is None else next(parts) if self.whole_c is None else self.whole_c[last]
        return tuple(None if t is None else t.clone() for t in (h, c))

    def _slots(self, steps: int) -> Tensors:
        """New memory for those of h and c that are not returned for all steps."""
        own_h, own_c = not self.make.whole_h, self.c0 is not None and not self.make.whole_c
        return self.new(steps + 1) if own_h else None, self.new(steps + 1) if own_c else None

    def _inputs(self, begin: int, end: int) -> Tensor:
        """The block's input vectors, `[S*B I]`, zero in padding."""
        if self.ids is None:
            x = self.source[begin:end]
            if self.keep is not None:
                # Padding may hold anything, infinities and NaN too; a zero keeps it out of the weights' gradients.
                x = x.masked_fill(~self.keep[begin:end], 0)
            return x.flatten(0, 1).contiguous()
        return self.source.index_select(0, self._ids(begin, end))

    def _ids(self, begin: int, end: int) -> Tensor:
        """The block's ids, `[S*B]`, zero in padding."""
        assert self.ids is not None
        ids = self.ids[begin:end]
        return (ids if self.keep is None else ids.masked_fill(~self.keep[begin:end, :, 0], 0)).flatten()

    def _project(self, begin: int, end: int) -> Tensor:
        """What the inputs contribute, `[S B G*H]`, in new memory."""
        x = self._inputs(begin, end)
        if self.ih is not None:
            if self._input is None:
                self._input = _linear(self.ih, self.bias_ih, self.make.compute)
            x = self._input(x.to(self.dtype))
        return x.to(self.dtype).view(end - begin, self.batch, self.hh.shape[0])

    def _compute(self, block: int, state: Tensors, slots: Tensors, extra: Tensor | None) -> tuple[Tensors, Tensor]:
        """Compute a block from its state into the slots; (the state after it, the gates)."""
        begin, end = self._span(block)
        steps, equation, reverse = end - begin, self.make.equation, self.make.reverse
        if self._recurrent is None:
            self._recurrent = _linear(self.hh, self.bias_hh, self.make.compute)
        linear = self._recurrent
        h, c = (None if t is None else t[: steps + 1] for t in slots)
        first, last = (steps, 0) if reverse else (0, steps)
        for slot, given in zip([t for t in (h, c) if t is not None], state, strict=True):
            assert given is not None
            slot[first] = given
        hs = _part(h, self.whole_h, begin, end).unbind()
        cs = None if self.c0 is None else _part(c, self.whole_c, begin, end).unbind()
        # A pass that does not fill what is returned computes it once more, for the gates, and forgets it.
        new_h = self.new() if h is None and not self.forward else None
        new_c = self.new() if c is None and not self.forward else None
        extras = (self.new(),) * steps if extra is None else extra.unbind()
        gates = self._project(begin, end)
        sums, parts = gates.unbind(), _gates(gates, equation)
        kept, cleared = _each(self.keep, begin, end), _each(self.clear, begin, end)
        for s in range(steps - 1, -1, -1) if reverse else range(steps):
            before, after = (s + 1, s) if reverse else (s, s + 1)
            own, mark, a, hb = kept[s], cleared[s], sums[s], hs[before]
            ha = hs[after] if new_h is None else new_h
            hp = hb if mark is None else hb.masked_fill(mark, 0)
            if cs is not None:
                cb, ca = cs[before], cs[after] if new_c is None else new_c
                cp = cb if mark is None else cb.masked_fill(mark, 0)
                a.add_(linear(hp))
                _lstm_forward(parts[s], cp, ca, extras[s], ha)
                if own is not None:
                    torch.where(own, ca, cb, out=ca)
            elif equation == "gru":
                _gru_forward(parts[s], linear(hp), hp, extras[s], ha)
            elif equation == "rnn":
                torch.tanh(a.add_(linear(hp)), out=ha)
            else:
                torch.clamp_min(a.add_(linear(hp)), 0, out=ha)
            if own is not None:
                torch.where(own, ha, hb, out=ha)
        if self.masked is not None:
            assert h is not None and self.keep is not None
            self.masked[begin:end] = (h[:-1] if reverse else h[1:]).masked_fill(~self.keep[begin:end], 0)
        return tuple(slot[last] for slot in (h, c) if slot is not None), gates

    def backward(self, block: int, tape: Tensors, d_state: Tensors) -> Tensors:
        begin, end = self._span(block)
        equation, reverse, steps = self.make.equation, self.make.reverse, end - begin
        own_h, own_c, gates, extra = tape
        h = _part(own_h, self.whole_h, begin, end)
        c = None if self.c0 is None else _part(own_c, self.whole_c, begin, end)
        dh, dc = d_state
        dh = self.new().zero_() if dh is None else dh
        dc = self.new().zero_() if c is not None and dc is None else dc
        d = self.hh.new_empty(steps, self.batch, self.hh.shape[0])
        # The GRU's two products have gradients of their own in the candidate's rows: of h's d(a_n) r, of x's d(a_n).
        d_candidate = self.new(steps) if equation == "gru" else None
        ds, d_candidates = d.unbind(), _each(d_candidate, 0, steps)
        d_hs, d_cs = _each(self.d_hs, begin, end), _each(self.d_cs, begin, end)
        kept, cleared = _each(self.keep, begin, end), _each(self.clear, begin, end)
        hs, cs, extras = h.unbind(), _each(c, 0, steps + 1), _each(extra, 0, steps)
        parts, d_parts = _gates(gates, equation), _gates(d, equation)
        for s in range(steps) if reverse else range(steps - 1, -1, -1):
            before, after = (s + 1, s) if reverse else (s, s + 1)
            own, mark, a = kept[s], cleared[s], ds[s]
            if d_hs[s] is not None:
                dh = dh + (d_hs[s].masked_fill(~own, 0) if self.make.masked and own is not None else d_hs[s])
            direct, through = dh, None
            if dc is not None:
                if d_cs[s] is not None:
                    dc = dc + d_cs[s]
                cp = cs[before] if mark is None else cs[before].masked_fill(mark, 0)
                dc_before = _lstm_backward(d_parts[s], dh, dc, parts[s], cp, extras[s])
                if own is not None:
                    dc_before = torch.where(own, dc_before, dc)
                dc = dc_before if mark is None else dc_before.masked_fill_(mark, 0)
            elif equation == "gru":
                hp = hs[before] if mark is None else hs[before].masked_fill(mark, 0)
                through = _gru_backward(d_parts[s], d_candidates[s], dh, parts[s], hp, extras[s])
            elif equation == "rnn":
                _tanh_backward(dh, hs[after], grad_input=a)
            else:
                _relu_backward(dh, hs[after], 0, grad_input=a)
            if own is not None:
                padding = ~own
                a.masked_fill_(padding, 0)
                if d_candidates[s] is not None:
                    d_candidates[s].masked_fill_(padding, 0)
            dh = self._back(a)
            if through is not None:
                dh = dh.add_(through)
            if own is not None:
                dh = torch.where(own, dh, direct)
            if mark is not None:
                dh = dh.masked_fill(mark, 0)
        self._add(begin, end, h, d.flatten(0, 1), None if d_candidate is None else d_candidate.flatten(0, 1))
        return dh, dc

    def _add(self, begin: int, end: int, h: Tensor, d: Tensor, d_candidate: Tensor | None) -> None:
        """Add the block's share to the gradients; d `[S*B G*H]`: of the sums of h's product; of x's it is the same, but
        for d_candidate `[S*B H]`."""
        cast = d.to(self.make.compute)
        if self.d_hh is not None:
            # Cleared rows saw a zero state.
            previous = h[1:] if self.make.reverse else h[:-1]
            if self.clear is not None:
                previous = previous.masked_fill(self.clear[begin:end], 0)
            self._add_product(self.d_hh, cast, previous.flatten(0, 1))
        sums = None
        if self.d_bias_hh is not None:
            sums = d.sum(0)
            self.d_bias_hh += sums
        if d_candidate is not None:
            d[:, 2 * self.hidden :] = d_candidate
            cast, sums = d.to(self.make.compute), None
        if self.d_bias_ih is not None:
            self.d_bias_ih += d.sum(0) if sums is None else sums
        if self.d_ih is not None:
            self._add_product(self.d_ih, cast, self._inputs(begin, end).to(self.dtype))
        if self.d_source is None:
            return
        if self._back_input is not None:
            d = self._back_input(d)
        if self.ids is None:
            self.d_source[begin:end] = d.view(end - begin, self.batch, self.source.shape[2])
        else:
            self.d_source.index_add_(0, self._ids(begin, end), d)

    def _add_product(self, total: Tensor, d: Tensor, x: Tensor) -> None:
        if d.dtype == total.dtype:
            total.addmm_(d.t(), x)
        else:
            total += d.t() @ x.to(d.dtype)

    def gradients(self, d_state: Tensors) -> Tensors:
        dh, dc = d_state
        return (self.d_source, None, dh, dc, self.d_ih, self.d_bias_ih, self.d_hh, self.d_bias_hh, None, None)


def _part(own: Tensor | None, whole: Tensor | None, begin: int, end: int) -> Tensor:
    """A block's slots, `[S+1 B H]`: its own, or those among all steps'."""
    if own is not None:
        return own
    assert whole is not None
    return whole[begin : end + 1]


def _each(t: Tensor | None, begin: int, end: int) -> tuple[Any, ...]:
    """t[begin], ..., t[end - 1], or as many times None: faster than one at a time."""
    return (None,) * (end - begin) if t is None else t[begin:end].unbind()


def _gates(t: Tensor | None, equation: str) -> list[tuple[Tensor, ...]]:
    """For each step of t `[S B G*H]` the first two gates together, and then each gate by itself."""
    count = {"lstm": 4, "gru": 3}.get(equation)
    if t is None or count is None:
        return []
    parts = (t[..., : t.shape[-1] // count * 2], *t.chunk(count, dim=-1))
    return list(zip(*(part.unbind() for part in parts), strict=True))


def _lstm_forward(gates: tuple[Tensor, ...], cp: Tensor, c: Tensor, tanh_c: Tensor, h: Tensor) -> None:
    """gates (`_gates`) in: the sums before them; writes gates, c, tanh(c) and h [B H]."""
    both, i, f, g, o = gates
    both.sigmoid_()
    g.tanh_()
    o.sigmoid_()
    torch.mul(f, cp, out=c)
    c.addcmul_(i, g)
    torch.tanh(c, out=tanh_c)
    torch.mul(o, tanh_c, out=h)


def _lstm_backward(
    d: tuple[Tensor, ...], dh: Tensor, dc: Tensor, gates: tuple[Tensor, ...], cp: Tensor, tanh_c: Tensor
) -> Tensor:
    """Writes the gradient of the gates' sums to d; returns d(c) before the step."""
    both, i, f, g, o = gates
    d_both, d_i, d_f, d_g, d_o = d
    dc = dc + _tanh_backward(dh * o, tanh_c)
    torch.mul(dc, g, out=d_i)
    torch.mul(dc, cp, out=d_f)
    _sigmoid_backward(d_both, both, grad_input=d_both)
    _tanh_backward(dc * i, g, grad_input=d_g)
    _sigmoid_backward(dh * tanh_c, o, grad_input=d_o)
    return dc.mul_(f)


def _gru_forward(gates: tuple[Tensor, ...], hh: Tensor, hp: Tensor, hn: Tensor, h: Tensor) -> None:
    """gates (`_gates`) in: the product of x; hh [B 3H]: that of h; writes gates, W_hn h + b_hn and h [B H]."""
    both, r, z, candidate = gates
    n = hp.shape[1]
    both.add_(hh[:, : 2 * n]).sigmoid_()
    hn.copy_(hh[:, 2 * n :])
    candidate.addcmul_(r, hn).tanh_()
    torch.sub(hp, candidate, out=h)
    h.mul_(z).add_(candidate)


def _gru_backward(
    d: tuple[Tensor, ...], da: Tensor, dh: Tensor, gates: tuple[Tensor, ...], hp: Tensor, hn: Tensor
) -> Tensor:
    """Writes the gradient of the sums of h's product to d, and of the candidate's sum of x's to da [B H]; the other
    sums of x's have that of h's. Returns what reaches the earlier h without a product."""
    both, r, z, candidate = gates
    d_both, d_r, d_z, d_candidate = d
    through = dh * z
    _tanh_backward(dh - through, candidate, grad_input=da)
    torch.mul(da, hn, out=d_r)
    torch.mul(dh, hp - candidate, out=d_z)
    _sigmoid_backward(d_both, both, grad_input=d_both)
    torch.mul(da, r, out=d_candidate)
    return through
