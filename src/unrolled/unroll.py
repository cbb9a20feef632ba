"""A cell over time: ragged lengths, reverse direction, resets in mid-sequence, full and truncated BPTT.

Time-major throughout: inputs `[T B I]`, outputs `[T B H]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from unrolled import tape
from unrolled.cells import (
    BoundCell,
    GatedCell,
    HiddenState,
    Lookup,
    LSTMState,
    State,
    map_state,
    where_state,
)
from unrolled.errors import ConfigError, ModelError, ShapeError, expect_shape, nearest

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["BACKENDS", "Unrolled", "real_resets", "unroll", "valid_steps"]

BACKENDS = ("auto", "reference", "tape")


class Unrolled(NamedTuple):
    """What `unroll` returns. outputs `[T B H]`, zero at padding; state: after each row's last step; states: the
    states after every step with fields `[T B ...]` (held at padding), or None if not asked for."""

    outputs: Tensor
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
    all_states: bool = False,
    window: int | None = None,
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
        all_states: return the states after every step too.
        window: truncated BPTT: the gradient does not pass the edges between pieces of so many steps, counted
            from the first step that is computed; the values do (law 5). None: full BPTT.
        backend: `"reference"`: the loop below, recorded by autograd, differentiable any number of times, for
            any cell, device and dtype; `"tape"`: backward written out (built-in cells, CPU, float32 and
            float64, also under bfloat16 autocast); `"auto"`: the tape where it applies.

    Raises:
        ShapeError: inputs, lengths or reset have another shape or type, or a length is outside 0..T.
        ConfigError: an unknown backend, or a window below 1.
        ModelError: the tape was asked for and cannot run this cell; the message says why.
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
    valid = valid_steps(lengths, steps, batch, device)
    if reset is not None:
        reset = real_resets(reset, valid, steps, batch)
    if state is None:
        state = cell.initial_state(batch)
    if isinstance(cell, GatedCell) and cell.keeps_equation():
        cell = cell.bind()
    if isinstance(cell, BoundCell):
        _expect_fit(cell, inputs, state, batch)

    if window is not None and window < 1:
        raise ConfigError(f"window: expected at least 1 step, got {window}")
    size = steps if window is None else window
    starts = list(range(0, steps, size)) if size else []
    pieces: list[Unrolled] = []
    for start in starts:
        begin, end = (max(steps - start - size, 0), steps - start) if reverse else (start, min(start + size, steps))
        if pieces:
            state = map_state(Tensor.detach, state)
        part = slice(begin, end)
        x = Lookup(inputs.ids[part], inputs.table) if isinstance(inputs, Lookup) else inputs[part]
        piece = _unroll_window(
            cell,
            x,
            state,
            None if valid is None else valid[part],
            None if reset is None else reset[part],
            reverse,
            all_states,
            backend,
        )
        pieces.append(piece)
        state = piece.state
    if not pieces:
        return _no_steps(cell, inputs, state, all_states)
    if len(pieces) == 1:
        return pieces[0]
    if reverse:
        pieces.reverse()
    states = map_state(lambda *t: torch.cat(t), *(p.states for p in pieces)) if all_states else None
    return Unrolled(torch.cat([p.outputs for p in pieces]), state, states)


def valid_steps(
    lengths: Tensor | Sequence[int] | None, steps: int, batch: int, device: torch.device
) -> Bool[Tensor, "T B"] | None:
    """Where a step is a row's own and not padding; None if all are.

    Raises:
        ShapeError: lengths is not one whole number 0..T per row.
    """
    if lengths is None:
        return None
    sizes = torch.as_tensor(lengths)
    expect_shape("lengths", sizes, "B", B=batch)
    if batch and (sizes.is_floating_point() or sizes.dtype == torch.bool):  # torch makes [] a float
        raise ShapeError(f"lengths: expected whole numbers, got {_name(sizes.dtype)}")
    if batch and (int(sizes.min()) < 0 or int(sizes.max()) > steps):
        raise ShapeError(
            f"lengths: expected 0..{steps} (the number of steps), got {int(sizes.min())}..{int(sizes.max())}"
        )
    if batch and int(sizes.min()) == steps:
        return None
    return torch.arange(steps, device=device)[:, None] < sizes.to(device)[None, :]


def real_resets(reset: Tensor, valid: Bool[Tensor, "T B"] | None, steps: int, batch: int) -> Bool[Tensor, "T B"]:
    """`reset` without the marks that stand in padding, which may hold anything.

    Raises:
        ShapeError: reset is not bool `[T B]`.
    """
    expect_shape("reset", reset, "T B", T=steps, B=batch)
    if reset.dtype != torch.bool:
        raise ShapeError(f"reset: expected bool, got {_name(reset.dtype)}")
    return reset if valid is None else reset & valid


def _expect_fit(cell: BoundCell, inputs: Tensor | Lookup, state: Any, batch: int) -> None:
    """Check that the inputs and the state are ones that a built-in cell's weights can take."""
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


def _no_steps(cell: Any, inputs: Tensor | Lookup, state: Any, all_states: bool) -> Unrolled:
    """T = 0: no outputs; the state is the one given."""
    first: Tensor = next(t for t in _tensors(state))
    outputs = first.new_zeros(0, first.shape[0], getattr(cell, "hidden_size", first.shape[-1]))
    states = map_state(lambda t: t.new_zeros(0, *t.shape), state) if all_states else None
    return Unrolled(outputs, state, states)


def _tensors(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else [t for part in state for t in _tensors(part)]


def _unroll_window(
    cell: Any,
    inputs: Tensor | Lookup,
    state: Any,
    valid: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    all_states: bool,
    backend: str,
) -> Unrolled:
    """One piece of at least one step, through which the gradient goes in full."""
    if valid is not None:
        # Padding may hold anything, infinities, NaN and unknown ids too; a zero keeps it out of the weights' gradients.
        if isinstance(inputs, Lookup):
            inputs = Lookup(inputs.ids.masked_fill(~valid, 0), inputs.table)
        else:
            inputs = inputs.masked_fill(~valid[..., None], 0)
    if not isinstance(cell, BoundCell):
        if backend == "tape":
            raise ModelError(f"backend 'tape' runs the built-in cells; {type(cell).__name__} needs 'reference'")
        return _loop(cell, None, inputs, state, valid, reset, reverse, all_states)
    projected = cell.project(inputs)
    reason = tape.supports(cell) if backend != "reference" else "it was not asked for"
    if reason is None:
        return _taped(cell, projected, state, valid, reset, reverse, all_states)
    if backend == "tape":
        raise ModelError(f"backend 'tape' cannot run here: {reason}; use 'auto' or 'reference'")
    return _loop(cell, projected, inputs, state, valid, reset, reverse, all_states)


def _loop(
    cell: Any,
    projected: Tensor | None,
    inputs: Tensor | Lookup,
    state: Any,
    valid: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    all_states: bool,
) -> Unrolled:
    """The reference: one step after the other."""
    if projected is None:
        xs = inputs.vectors() if isinstance(inputs, Lookup) else inputs
    else:
        xs = projected
    steps, batch = xs.shape[:2]
    fresh = cell.initial_state(batch) if reset is not None else None
    outputs: list[Tensor] = [xs] * steps
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
        state = states[t] = after
        outputs[t] = y
    stacked = map_state(lambda *t: torch.stack(t), *states) if all_states else None
    return Unrolled(torch.stack(outputs), state, stacked)


def _taped(
    cell: BoundCell,
    projected: Tensor,
    state: Any,
    valid: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    all_states: bool,
) -> Unrolled:
    keep = None if valid is None else valid[..., None]
    clear = None if reset is None else reset[..., None]
    h, c = tape.recurrence(cell, projected, state, reverse=reverse, keep=keep, clear=clear)
    last = 0 if reverse else -1
    states: Any = HiddenState(h) if c is None else LSTMState(h, c)
    final = map_state(lambda t: t[last].clone(), states)
    outputs = h if keep is None else h.masked_fill(~keep, 0)
    return Unrolled(outputs, final, states if all_states else None)
