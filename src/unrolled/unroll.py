"""A cell over time: ragged lengths, reverse direction, resets in mid-sequence; full, truncated and budgeted BPTT.

Time-major throughout: inputs `[T B I]`, outputs `[T B H]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unrolled import fused, native, tape
from unrolled.budget import divide
from unrolled.cells import (
    EQUATIONS,
    BoundCell,
    GatedCell,
    HiddenState,
    Lookup,
    LSTMState,
    State,
    Weights,
    map_state,
    where_state,
)
from unrolled.errors import ConfigError, ModelError, ShapeError, expect_shape, nearest

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = [
    "BACKENDS",
    "Unrolled",
    "choose_backend",
    "divide_tape_budget",
    "expect_fit",
    "real_lengths",
    "real_resets",
    "unroll",
    "valid_steps",
]

BACKENDS = ("auto", "reference", "tape", "native")


class Unrolled(NamedTuple):
    """What `unroll` returns. outputs `[T B H]`, zero at padding, or None if not wanted; state: after each row's last
    step; states: the states after every step with fields `[T B ...]` (held at padding), or None if not asked for."""

    outputs: Any
    state: Any
    states: Any


def unroll(
    cell: Any,
    inputs: Float[Tensor, "T B I"] | Lookup,
    state: State | None = None,
    *,
    lengths: Int[Tensor, "B"] | Sequence[int] | None = None,
    reverse: bool = False,
    reset: Bool[Tensor, "T B"] | None = None,
    outputs: bool = True,
    all_states: bool = False,
    window: int | None = None,
    tape_budget: int | None = None,
    backend: str = "auto",
) -> Unrolled:
    """Run a cell over a sequence; the same as calling `cell.step` T times (law 1).

    Args:
        cell: any object with `initial_state(batch)` and `step(x, state) -> (y, state)`.
        inputs: `[T B I]`, or a Lookup with ids `[T B]`.
        state: the state before the first step; `cell.initial_state(B)`, zeros for the built-in cells, if None.
        lengths: how many of the T steps each row really has, 0..T, in any order; the rest is padding, whatever
            it holds. An empty row returns its initial state.
        reverse: each row from its own last step to its first. The same as flipping every row's own steps
            (and its resets), unrolling, and flipping the outputs back (law 3).
        reset: where true, the state is set to the cell's initial state before this step is computed (the first
            step of a new document, in the direction of reading).
        outputs: false: return no outputs, for which there is then no memory needed; the last state tells what the
            whole sequence came to.
        all_states: return the states after every step too.
        window: truncated BPTT: the gradient does not pass the edges between pieces of so many steps, counted
            from the first step that is computed; the values do (law 5). None: full BPTT.
        tape_budget: bytes for what is kept between forward and backward, scratch memory included, beyond the arguments,
            what is returned and their gradients. Some of it is then computed again in the backward; values and
            gradients are the same bits (law 5). Windows share it. For built-in cells on the tape; without effect where
            no gradient is recorded. None: no bound.
        backend: `"reference"`: the loop below, recorded by autograd, differentiable any number of times, for
            any cell, device and dtype; `"tape"`: backward written out (built-in cells, CPU, float32 and
            float64, also under bfloat16 autocast); `"native"`: the kernels (built-in cells, CPU, float32, also under
            bfloat16 autocast); `"auto"`: the first of native, tape and reference that can.

    Raises:
        ShapeError: inputs, lengths or reset have another shape or type, or a length is outside 0..T.
        ConfigError: an unknown backend, a window below 1, or a tape_budget in which it is not possible; the message
            names the least that is.
        ModelError: the tape or a tape_budget was asked for and the tape cannot run this cell; the message says why.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"unknown backend {backend!r}: {nearest(backend, BACKENDS)}")
    if isinstance(inputs, Lookup):
        expect_shape("ids", inputs.ids, "T B")
        if inputs.ids.dtype not in (torch.int64, torch.int32):
            raise ShapeError(f"ids: expected int64, got {_name(inputs.ids.dtype)}")
        steps, batch = inputs.ids.shape
    else:
        expect_shape("inputs", inputs, "T B I", **({"I": cell.input_size} if hasattr(cell, "input_size") else {}))
        steps, batch = inputs.shape[:2]
    device = inputs.ids.device if isinstance(inputs, Lookup) else inputs.device
    lengths = real_lengths(lengths, steps, batch)
    if reset is not None:
        reset = real_resets(reset, valid_steps(lengths, steps, device), steps, batch)
    if state is None:
        state = cell.initial_state(batch)
    if isinstance(cell, GatedCell) and cell.keeps_equation():
        cell = cell.bind()
    if isinstance(cell, BoundCell):
        expect_fit(cell, inputs, state, batch)

    if window is not None and window < 1:
        raise ConfigError(f"window: expected at least 1 step, got {window}")
    size = steps if window is None else window
    starts = list(range(0, steps, size)) if size else []
    budgets: list[int | None] = [None] * len(starts)
    if tape_budget is not None:
        (bound, path), runs = _expect_blocks(cell, backend), []
        for start in starts:
            costs = path.costs(
                bound,
                _steps(inputs, slice(start, start + size)),
                ragged=lengths is not None,
                marked=reset is not None,
                outputs=outputs,
                all_states=all_states,
            )
            runs.append((costs.least, costs.full))
        if torch.is_grad_enabled():
            budgets = list(divide(tape_budget, runs))
    pieces: list[Unrolled] = []
    for start, share in zip(starts, budgets, strict=True):
        begin, end = (max(steps - start - size, 0), steps - start) if reverse else (start, min(start + size, steps))
        if pieces:
            state = map_state(Tensor.detach, state)
        part = slice(begin, end)
        piece = _unroll_window(
            cell,
            _steps(inputs, part),
            state,
            None if lengths is None else (lengths - begin).clamp(0, end - begin) if len(starts) > 1 else lengths,
            None if reset is None else reset[part],
            reverse,
            outputs,
            all_states,
            share,
            backend,
        )
        pieces.append(piece)
        state = piece.state
    if not pieces:
        return _no_steps(cell, inputs, state, outputs, all_states)
    if len(pieces) == 1:
        return pieces[0]
    if reverse:
        pieces.reverse()
    states = map_state(lambda *t: torch.cat(t), *(p.states for p in pieces)) if all_states else None
    return Unrolled(torch.cat([p.outputs for p in pieces]) if outputs else None, state, states)


def divide_tape_budget(
    tape_budget: int | None,
    layers: Sequence[Sequence[Any]],
    inputs: Tensor | Lookup,
    *,
    ragged: bool,
    marked: bool,
    outputs: bool = True,
    all_states: bool = False,
    backend: str = "auto",
) -> list[int | None]:
    """A tape_budget's share for each cell of a stack, `layers[k][d]`, in this order: the tapes of all of them wait for
    the one backward. Each cell gets the least in which its backward is possible, and of the rest a share in proportion
    to how much more it would take to compute nothing twice.

    Args:
        inputs: of the first layer. ragged, marked: whether there are lengths and resets; the others as in `unroll`.

    Returns:
        None for each where there is no budget or no gradient is recorded.

    Raises:
        ConfigError: not possible in this budget; the message names the least that is.
        ModelError: the tape cannot run one of the cells, or is not to; the message says why.
    """
    cells = [cell for directions in layers for cell in directions]
    if tape_budget is None:
        return [None] * len(cells)
    steps, batch = (inputs.ids if isinstance(inputs, Lookup) else inputs).shape[:2]
    needs: list[tuple[int, int]] = []
    for k, directions in enumerate(layers):
        for cell in directions:
            bound, path = _expect_blocks(cell, backend)
            below = torch.empty(steps, batch, cell.input_size, device="meta", requires_grad=True) if k else inputs
            wanted = outputs or k < len(layers) - 1
            costs = path.costs(bound, below, ragged=ragged, marked=marked, outputs=wanted, all_states=all_states)
            needs.append((costs.least, costs.full))
    if not torch.is_grad_enabled():
        return [None] * len(cells)
    return list(divide(tape_budget, needs))


_FAST = {"native": fused, "tape": tape}
"""The paths with a written-out backward, fastest first."""


def choose_backend(cell: Any, backend: str) -> str:
    """Which path runs this cell: "native", "tape" or "reference".

    Raises:
        ModelError: the one that was asked for cannot; the message says why.
    """
    if backend == "reference":
        return backend
    if not isinstance(cell, BoundCell):
        if backend == "auto":
            return "reference"
        raise ModelError(f"backend {backend!r} runs the built-in cells; {type(cell).__name__} needs 'reference'")
    for name, path in _FAST.items():
        if backend in (name, "auto"):
            reason = path.supports(cell)
            if reason is None:
                return name
            if backend == name:
                raise ModelError(f"backend {name!r} cannot run here: {reason}; use 'auto' or 'reference'")
    return "reference"


def _expect_blocks(cell: Any, backend: str) -> tuple[BoundCell, Any]:
    """The cell as a path with blocks takes it, and that path, for a tape_budget."""
    if isinstance(cell, GatedCell) and cell.keeps_equation():
        cell = cell.bind()
    if backend == "reference":
        raise ModelError(
            "tape_budget: backend 'reference' keeps all that autograd does: use backend 'auto', 'native' or 'tape', or "
            "tape_budget None"
        )
    if not isinstance(cell, BoundCell):
        raise ModelError(
            f"tape_budget: it is for the built-in cells, not for {type(cell).__name__}: use tape_budget None, and a "
            "window to bound the memory"
        )
    chosen = choose_backend(cell, backend)
    if chosen == "reference":
        raise ModelError(f"tape_budget: the tape cannot run here: {tape.supports(cell)}; use tape_budget None")
    return cell, _FAST[chosen]


def _steps(inputs: Tensor | Lookup, part: slice) -> Tensor | Lookup:
    if isinstance(inputs, Lookup):
        return Lookup(inputs.ids[part], inputs.table)
    # The gradient of a slice is as large as what it was cut from, even if that is the slice.
    return inputs if part.start == 0 and part.stop >= len(inputs) else inputs[part]


def real_lengths(lengths: Tensor | Sequence[int] | None, steps: int, batch: int) -> Int[Tensor, "B"] | None:
    """The lengths as int64 on the CPU; None if every row has all steps.

    Raises:
        ShapeError: lengths is not one whole number 0..T per row.
    """
    if lengths is None:
        return None
    sizes = torch.as_tensor(lengths)
    expect_shape("lengths", sizes, "B", B=batch)
    if batch and (sizes.is_floating_point() or sizes.dtype == torch.bool):  # torch makes [] a float
        raise ShapeError(f"lengths: expected whole numbers, got {_name(sizes.dtype)}")
    if torch.compiler.is_compiling():
        return sizes.long()  # their values are not known yet; the kernels look at them when they are
    if batch and (int(sizes.min()) < 0 or int(sizes.max()) > steps):
        raise ShapeError(
            f"lengths: expected 0..{steps} (the number of steps), got {int(sizes.min())}..{int(sizes.max())}"
        )
    if batch and int(sizes.min()) == steps:
        return None
    return sizes.long().cpu().contiguous()


def valid_steps(
    lengths: Int[Tensor, "B"] | None, steps: int, device: torch.device | None = None
) -> Bool[Tensor, "T B"] | None:
    """Where a step is a row's own and not padding, from `real_lengths`; None if all are."""
    if lengths is None:
        return None
    return torch.arange(steps, device=device)[:, None] < lengths.to(device)[None, :]


def real_resets(reset: Tensor, valid: Bool[Tensor, "T B"] | None, steps: int, batch: int) -> Bool[Tensor, "T B"]:
    """`reset` without the marks that stand in padding, which may hold anything.

    Raises:
        ShapeError: reset is not bool `[T B]`.
    """
    expect_shape("reset", reset, "T B", T=steps, B=batch)
    if reset.dtype != torch.bool:
        raise ShapeError(f"reset: expected bool, got {_name(reset.dtype)}")
    return reset if valid is None else reset & valid


def expect_fit(cell: BoundCell, inputs: Tensor | Lookup, state: Any, batch: int) -> None:
    """Check that the inputs and the state are ones that a built-in cell's weights can take.

    Raises:
        ShapeError: they are not; the message says in what.
    """
    if isinstance(inputs, Tensor):
        expect_shape("inputs", inputs, "T B I", I=cell.input_size)
    kind, weight = cell.equation.state, cell.weights.hh
    if not isinstance(state, kind):
        wanted = f"{kind.__name__}({', '.join(kind._fields)})"
        raise ShapeError(f"state: expected {wanted} for this cell, got {type(state).__name__}")
    vectors = inputs.table if isinstance(inputs, Lookup) else inputs
    named = {"inputs": vectors, **{f"state.{field}": part for field, part in state._asdict().items()}}
    for name, tensor in named.items():
        if tensor is None:
            continue
        if name != "inputs":
            expect_shape(name, tensor, "B H", B=batch, H=cell.hidden_size)
        if tensor.dtype != weight.dtype and not (
            tensor.is_floating_point() and torch.is_autocast_enabled(weight.device.type)
        ):
            raise ShapeError(f"{name}: expected {_name(weight.dtype)}, as the weights are, got {_name(tensor.dtype)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _no_steps(cell: Any, inputs: Tensor | Lookup, state: Any, outputs: bool, all_states: bool) -> Unrolled:
    """T = 0: the outputs are empty; the state is the one given."""
    first: Tensor = next(t for t in _tensors(state))
    empty = first.new_zeros(0, first.shape[0], getattr(cell, "hidden_size", first.shape[-1]))
    states = map_state(lambda t: t.new_zeros(0, *t.shape), state) if all_states else None
    return Unrolled(empty if outputs else None, state, states)


def _tensors(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else [t for part in state for t in _tensors(part)]


def _unroll_window(
    cell: Any,
    inputs: Tensor | Lookup,
    state: Any,
    lengths: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    outputs: bool,
    all_states: bool,
    tape_budget: int | None,
    backend: str,
) -> Unrolled:
    """One piece of at least one step, through which the gradient goes in full."""
    chosen = choose_backend(cell, backend)
    if chosen == "native":
        ys, finals, states = fused.layer(
            [cell],
            inputs,
            [state],
            reverse=[reverse],
            lengths=lengths,
            resets=[reset],
            outputs=outputs,
            all_states=all_states,
            tape_budget=tape_budget,
        )
        return Unrolled(ys, finals[0], states[0] if states else None)
    ids = inputs.ids if isinstance(inputs, Lookup) else inputs
    valid = valid_steps(lengths, len(ids), ids.device)
    if chosen == "tape":
        return Unrolled(
            *tape.recurrence(
                cell,
                inputs,
                state,
                reverse=reverse,
                keep=None if valid is None else valid[..., None],
                clear=None if reset is None else reset[..., None],
                outputs=outputs,
                all_states=all_states,
                tape_budget=tape_budget,
            )
        )
    if valid is not None:
        # Padding may hold anything, infinities, NaN and unknown ids too; a zero keeps it out of the weights' gradients.
        if isinstance(inputs, Lookup):
            inputs = Lookup(inputs.ids.masked_fill(~valid, 0), inputs.table)
        else:
            inputs = inputs.masked_fill(~valid[..., None], 0)
    projected = cell.project(inputs) if isinstance(cell, BoundCell) else None
    return _loop(cell, projected, inputs, state, valid, reset, reverse, outputs, all_states)


def _loop(
    cell: Any,
    projected: Tensor | None,
    inputs: Tensor | Lookup,
    state: Any,
    valid: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    outputs: bool,
    all_states: bool,
) -> Unrolled:
    """The reference: one step after the other."""
    if projected is None:
        xs = inputs.vectors() if isinstance(inputs, Lookup) else inputs
    else:
        xs = projected
    steps, batch = xs.shape[:2]
    fresh = cell.initial_state(batch) if reset is not None else None
    ys: list[Tensor] = [xs] * steps
    states: list[Any] = [state] * steps
    for t in range(steps - 1, -1, -1) if reverse else range(steps):
        before = state if reset is None else where_state(reset[t], fresh, state)
        if projected is None:
            y, after = cell.step(xs[t], before)
        else:
            after = cell.recur(xs[t], before)
            y = after.h
        if valid is not None:
            after = where_state(valid[t], after, state)
            y = torch.where(valid[t][:, None], y, torch.zeros_like(y))
        state = after
        if all_states:
            states[t] = after
        if outputs:
            ys[t] = y
    stacked = map_state(lambda *t: torch.stack(t), *states) if all_states else None
    return Unrolled(torch.stack(ys) if outputs else None, state, stacked)


def _reference_layer(
    name: str, inputs: Tensor, directions: Sequence[native.Direction], lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What the native operator computes, in torch's own operations: for its second derivatives."""
    ys, finals, every = [], [], []
    for d in directions:
        equation = EQUATIONS[name]
        looked_up = not inputs.is_floating_point()
        source = d.source
        projected = F.embedding(inputs, source) if looked_up else F.linear(inputs, source, d.bias_ih)
        cell = BoundCell(equation, Weights(source, d.hh, d.bias_ih, d.bias_hh))
        state: Any = HiddenState(d.h0) if d.c0 is None else LSTMState(d.h0, d.c0)
        valid = valid_steps(lengths, len(inputs))
        run = _loop(cell, projected, inputs, state, valid, d.reset, d.reverse, True, True)
        ys.append(run.outputs)
        finals.append(run.state)
        every.append(run.states)
    lstm = name == "lstm"
    return (
        torch.cat(ys, dim=-1),
        torch.stack([s.h for s in finals]),
        torch.stack([s.c for s in finals]) if lstm else None,
        torch.stack([s.c for s in every]) if lstm else None,
    )


native.set_reference(_reference_layer)
