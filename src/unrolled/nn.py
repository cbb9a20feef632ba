"""Layers: RNN, LSTM and GRU as drop-ins for torch.nn's, and Core, the stack of layers inside a model.

    from unrolled.nn import LSTM         in place of        from torch.nn import LSTM

This module needs torch and numpy only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from unrolled import fused, native
from unrolled.cells import (
    EQUATIONS,
    BoundCell,
    Equation,
    GatedCell,
    Lookup,
    State,
    Weights,
    build_cell,
    initialise,
    map_state,
)
from unrolled.errors import ConfigError, ModelError, ShapeError, expect_shape
from unrolled.unroll import (
    Unrolled,
    choose_backend,
    divide_tape_budget,
    expect_fit,
    real_lengths,
    real_resets,
    unroll,
    valid_steps,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["GRU", "LSTM", "RNN", "Core", "CoreState", "as_core", "dropout_steps", "freeze", "replace"]


M = TypeVar("M", bound=torch.nn.Module)


# ---------------------------------------------------------------------------------------- layers in a stack


class CoreState(NamedTuple):
    """The states of a stack: one per layer and direction, layer 0 forward, layer 0 reverse, layer 1 forward, ..."""

    cells: tuple[Any, ...]

    def select(self, rows: Tensor) -> CoreState:
        """The rows with these indices (int64), or where this mask (bool) is true."""
        return map_state(lambda t: t[rows], self)


def dropout_steps(x: Float[Tensor, "T B F"], p: float, *, locked: bool, training: bool) -> Float[Tensor, "T B F"]:
    """Dropout on a sequence, survivors scaled by 1/(1-p).

    locked: one mask per row for all its steps (variational dropout, Gal and Ghahramani 2016) in place of a new
    one at every step.
    """
    if not training or p == 0:
        return x
    if not locked or p == 1:
        return F.dropout(x, p)
    mask = torch.empty_like(x[:1]).bernoulli_(1 - p).div_(1 - p)
    return x * mask


def _run_stack(
    layers: Sequence[Sequence[Any]],
    inputs: Tensor | Lookup,
    states: Sequence[Any],
    *,
    lengths: Any,
    reset: Tensor | None,
    all_states: bool,
    dropout: float,
    locked: bool,
    training: bool,
    backend: str,
    outputs: bool = True,
    tape_budget: int | None = None,
) -> tuple[Any, list[Any], list[Any]]:
    """`layers[k][d]` is the cell of layer k, direction d (1: reverse); the directions' outputs are joined.

    outputs: whether those of the last layer are wanted. tape_budget: see `divide_tape_budget`.

    `reset` marks the first step of a document. Read backwards a document begins at its last step, so the reverse
    direction is cleared one step before the mark: no state crosses a border either way.
    """
    grid = inputs.ids if isinstance(inputs, Lookup) else inputs
    steps, batch = grid.shape[:2]
    lengths = real_lengths(lengths, steps, batch)
    backwards = None
    if reset is not None:
        # A mark in the padding after a row's last step must not clear that step when it is read backwards.
        reset = real_resets(reset, valid_steps(lengths, steps, grid.device), steps, batch)
        backwards = torch.cat([reset[1:], torch.zeros_like(reset[:1])])
    budgets = divide_tape_budget(
        tape_budget,
        layers,
        inputs,
        ragged=lengths is not None,
        marked=reset is not None,
        outputs=outputs,
        all_states=all_states,
        backend=backend,
    )
    x: Any = inputs
    final: list[Any] = []
    kept: list[Any] = []
    remaining = zip(states, budgets, strict=True)
    for k, directions in enumerate(layers):
        if k > 0:
            x = dropout_steps(x, dropout, locked=locked, training=training)
        read = outputs or k < len(layers) - 1
        if (
            len(directions) == 2
            and steps
            and tape_budget is None
            and choose_backend(_bound(directions[0]), backend) == "native"
        ):
            # Both directions in one call, their outputs side by side without a copy.
            (forward, _), (backward, _) = next(remaining), next(remaining)
            for cell, state in zip(directions, (forward, backward), strict=True):
                expect_fit(_bound(cell), x, state, batch)
            x, ended, every = fused.layer(
                [_bound(cell) for cell in directions],
                x,
                [forward, backward],
                reverse=[False, True],
                lengths=lengths,
                resets=[reset, backwards],
                outputs=read,
                all_states=all_states,
            )
            final += ended
            kept += every or [None, None]
            continue
        ys: list[Tensor] = []
        for d, cell in enumerate(directions):
            state, share = next(remaining)
            run = unroll(
                cell,
                x,
                state,
                lengths=lengths,
                reverse=d == 1,
                reset=backwards if d == 1 else reset,
                outputs=read,
                all_states=all_states,
                tape_budget=share,
                backend=backend,
            )
            ys.append(run.outputs)
            final.append(run.state)
            kept.append(run.states)
        x = (ys[0] if len(ys) == 1 else torch.cat(ys, dim=-1)) if read else None
    return x, final, kept


def _bound(cell: Any) -> Any:
    return cell.bind() if isinstance(cell, GatedCell) and cell.keeps_equation() else cell


class Core(torch.nn.Module):
    """A stack of layers of one cell, in one or both directions.

    Args:
        cell: a registered name (`"rnn"`, `"rnn_relu"`, `"lstm"`, `"gru"` or one of your own).
        input_size: I, the size of an input vector (for one-hot input, how many symbols there are).
        hidden_size: H, per direction.
        layers: how many cells are stacked; each reads the outputs of the one below.
        bidirectional: a second cell per layer that reads from the last step to the first; outputs are joined to
            `[T B 2H]`. Such a core cannot stream.
        dropout: share of values dropped between layers while training.
        locked: the same ones at every step of a sequence (see `dropout_steps`).
        recurrent_dropout: share of the recurrent matrix's entries dropped while training, anew for every
            sequence and the same at all its steps (DropConnect: Wan et al. 2013; Merity et al. 2018).
        init, forget_bias, chrono: see `unrolled.cells.initialise`; for the built-in cells.
        backend: see `unrolled.unroll.unroll`.
        tape_budget: bytes for what all layers and directions together keep between forward and backward, beyond
            their inputs and outputs (see `unrolled.unroll.unroll` and `divide_tape_budget`).

    Raises:
        ConfigError: an unknown cell, a size below 1, or a setting that this cell has no use for.
    """

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        layers: int = 1,
        *,
        bidirectional: bool = False,
        dropout: float = 0.0,
        locked: bool = True,
        recurrent_dropout: float = 0.0,
        init: str = "uniform",
        forget_bias: float | None = None,
        chrono: int | None = None,
        backend: str = "auto",
        tape_budget: int | None = None,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ConfigError(f"core.layers: expected at least 1, got {layers}")
        for name, share in (("dropout", dropout), ("recurrent_dropout", recurrent_dropout)):
            if not 0 <= share < 1:
                raise ConfigError(f"core.{name}: expected 0 <= p < 1, got {share}")
        self.hidden_size = hidden_size
        self.directions = 2 if bidirectional else 1
        self.dropout, self.locked, self.recurrent_dropout = dropout, locked, recurrent_dropout
        self.backend, self.tape_budget = backend, tape_budget
        sizes = [input_size, *[hidden_size * self.directions] * (layers - 1)]
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleList(build_cell(cell, size, hidden_size) for _ in range(self.directions)) for size in sizes
        )
        built_in = isinstance(self.layers[0][0], GatedCell)  # type: ignore[index]
        if built_in:
            for built in self._cells():
                initialise(built, init, forget_bias=forget_bias, chrono=chrono)
        elif (init, forget_bias, chrono, recurrent_dropout) != ("uniform", None, None, 0.0):
            raise ConfigError(
                f"init, forget_bias, chrono and recurrent_dropout are for the built-in cells; {cell!r} sets its own"
            )

    def _cells(self) -> list[Any]:
        return [cell for layer in self.layers for cell in layer]  # type: ignore[attr-defined]

    def native_layers(self) -> list[BoundCell] | None:
        """The layers' cells if the native kernels run them all here and they can be stepped, else None."""
        cells = [_bound(cell) for cell in self._cells()]
        if self.directions == 2 or any(choose_backend(cell, self.backend) != "native" for cell in cells):
            return None
        return cells

    @property
    def output_size(self) -> int:
        """H, or 2H in both directions."""
        return self.hidden_size * self.directions

    def initial_state(self, batch: int) -> CoreState:
        """The state before the first step, zeros for the built-in cells."""
        return CoreState(tuple(cell.initial_state(batch) for cell in self._cells()))

    def step(self, x: Float[Tensor, "B I"] | Lookup, state: CoreState) -> tuple[Float[Tensor, "B H"], CoreState]:
        """One step through all layers, dropout off.

        Raises:
            ModelError: the core reads both directions; the reverse one needs the future.
        """
        if self.directions == 2:
            raise ModelError("a bidirectional core needs the whole sequence and cannot be stepped")
        self._expect_cells(state)
        new: list[Any] = []
        y: Any = x
        if self.native_layers() is not None:
            # A sequence of one step, by the way that a whole one takes: the same bits.
            y = Lookup(x.ids[None], x.table) if isinstance(x, Lookup) else x[None]
            for cell, before in zip(self._cells(), state.cells, strict=True):
                run = unroll(cell, y, before, backend=self.backend)
                y = run.outputs
                new.append(run.state)
            return y[0], CoreState(tuple(new))
        for cell, before in zip(self._cells(), state.cells, strict=True):
            if isinstance(y, Lookup) and not isinstance(cell, GatedCell):
                y = y.vectors()
            y, after = cell.step(y, before)
            new.append(after)
        return y, CoreState(tuple(new))

    def forward(
        self,
        inputs: Float[Tensor, "T B I"] | Lookup,
        state: CoreState | None = None,
        *,
        lengths: Int[Tensor, "B"] | Sequence[int] | None = None,
        reset: Bool[Tensor, "T B"] | None = None,
        outputs: bool = True,
        all_states: bool = False,
    ) -> Unrolled:
        """A whole sequence: outputs `[T B output_size]`, final CoreState, and on request all states as a CoreState
        with fields `[T B H]`. `reset` marks the first step of a document; see `unroll` for the rest.
        """
        if isinstance(inputs, Lookup):
            expect_shape("ids", inputs.ids, "T B")
            batch = inputs.ids.shape[1]
        else:
            expect_shape("inputs", inputs, "T B I")
            batch = inputs.shape[1]
        if state is None:
            state = self.initial_state(batch)
        self._expect_cells(state)
        bound = [[self._drop(cell) for cell in layer] for layer in self.layers]  # type: ignore[attr-defined]
        ys, final, kept = _run_stack(
            bound,
            inputs,
            state.cells,
            lengths=lengths,
            reset=reset,
            all_states=all_states,
            dropout=self.dropout,
            locked=self.locked,
            training=self.training,
            backend=self.backend,
            outputs=outputs,
            tape_budget=self.tape_budget,
        )
        return Unrolled(ys, CoreState(tuple(final)), CoreState(tuple(kept)) if all_states else None)

    def _expect_cells(self, state: CoreState) -> None:
        count = len(self._cells())
        if len(state.cells) != count:
            raise ShapeError(
                f"state: expected the states of {count} cells (layers x directions), got {len(state.cells)}"
            )

    def _drop(self, cell: Any) -> Any:
        if not self.training or self.recurrent_dropout == 0:
            return cell
        return cell.bind(F.dropout(cell.weight_hh, self.recurrent_dropout))


# ------------------------------------------------------------------------------------------------ drop-ins


_NAMES = {"RNN_TANH": "rnn", "RNN_RELU": "rnn_relu", "LSTM": "lstm", "GRU": "gru"}
"""The equations' names by what torch calls a layer's mode."""


class _DropIn(torch.nn.RNNBase):
    """What the three drop-ins share. They are torch.nn's classes with another `forward`, so constructor,
    parameters, `state_dict`, `isinstance` and pickling are torch's own."""

    def __init__(
        self, *args: Any, locked: bool = False, recurrent_dropout: float = 0.0, backend: str = "auto", **kwargs: Any
    ) -> None:
        if kwargs.get("proj_size", 0):
            raise ConfigError("proj_size is not supported; use torch.nn.LSTM for a projected LSTM")
        super().__init__(*args, **kwargs)
        if self.proj_size:  # given by position
            raise ConfigError("proj_size is not supported; use torch.nn.LSTM for a projected LSTM")
        if not 0 <= recurrent_dropout < 1:
            raise ConfigError(f"recurrent_dropout: expected 0 <= p < 1, got {recurrent_dropout}")
        self.locked, self.recurrent_dropout, self.backend = locked, recurrent_dropout, backend

    _frozen: tuple[Any, ...] | None = None  # see `freeze`

    def _equation(self) -> Equation:
        return EQUATIONS[_NAMES[self.mode]]

    def cells(self) -> list[list[BoundCell]]:
        """The cells on this layer's own parameters: `[layer][direction]`; direction 1 reads in reverse."""
        equation = self._equation()
        layers: list[list[BoundCell]] = []
        for k in range(self.num_layers):
            layers.append([])
            for suffix in ("", "_reverse")[: 2 if self.bidirectional else 1]:
                names = [f"{name}_l{k}{suffix}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
                ih, hh, *bias = (getattr(self, name) for name in names[: 4 if self.bias else 2])
                hh = F.dropout(hh, self.recurrent_dropout, self.training)
                layers[-1].append(BoundCell(equation, Weights(ih, hh, *(bias or (None, None)))))
        return layers

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Int[Tensor, "B"] | Sequence[int] | None = None,
        reset: Bool[Tensor, "T B"] | None = None,
    ) -> tuple[Any, Any]:
        """As torch.nn's: `(output, h_n)`, or `(output, (h_n, c_n))` for LSTM.

        Args:
            input: `[T B I]`, `[B T I]` with batch_first, `[T I]` for one sequence, or a PackedSequence.
            hx: initial state `[layers*directions B H]` (a pair for LSTM); zeros if None.
            lengths: real steps per row, any order; outputs past them are zero. Not with a PackedSequence, which
                has its own.
            reset: true at the first step of a new document within a row, laid out as the input's first two
                dimensions: no state crosses there, in either direction.

        Raises:
            ShapeError: a tensor of another shape or type than these.
        """
        if lengths is None and reset is None and not torch.compiler.is_compiling():
            found = native.call(self, input, hx)
            if found is not None:
                return found
        if not isinstance(input, Tensor | PackedSequence):
            raise ShapeError(f"input: expected a tensor or a PackedSequence, got {type(input).__name__}")
        if hx is not None:
            pair = isinstance(hx, tuple | list) and len(hx) == 2 and all(isinstance(t, Tensor) for t in hx)
            if not (pair if self.mode == "LSTM" else isinstance(hx, Tensor)):
                raise ShapeError(f"hx: expected {'a pair (h_0, c_0)' if self.mode == 'LSTM' else 'a tensor h_0'}")
        packed = input if isinstance(input, PackedSequence) else None
        if packed is not None:
            if lengths is not None:
                raise ShapeError("lengths: a PackedSequence has its own lengths; give one or the other")
            x, lengths = pad_packed_sequence(packed)
        else:
            assert isinstance(input, Tensor)
            x = input
        single = packed is None and x.dim() == 2
        if single:
            x = x.unsqueeze(1)
            hx = None if hx is None else _map_pair(lambda t: t.unsqueeze(1), hx)
            reset = reset.unsqueeze(1) if reset is not None and reset.dim() == 1 else reset
        elif self.batch_first and packed is None:
            expect_shape("input", x, "B T I", I=self.input_size)
            x = x.transpose(0, 1)
            reset = None if reset is None else reset.transpose(0, 1)
        expect_shape("input", x, "T B I", I=self.input_size)

        if x.is_cuda and lengths is None and reset is None and self.backend == "auto" and not self._drops():
            out, final = super().forward(x.transpose(0, 1) if self.batch_first else x, hx)
            out = out.transpose(0, 1) if self.batch_first else out
        else:
            out, final = self._unrolled(x, hx, lengths, reset)

        if packed is not None:
            return _pack_like(out, lengths, packed), final
        if single:
            return out.squeeze(1), _map_pair(lambda t: t.squeeze(1), final)
        return (out.transpose(0, 1) if self.batch_first else out), final

    def _drops(self) -> bool:
        return self.training and (self.recurrent_dropout > 0 or (self.locked and self.dropout > 0))

    def _unrolled(self, x: Tensor, hx: Any, lengths: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
        layers = self.cells()
        flat = [cell for layer in layers for cell in layer]
        batch = x.shape[1]
        if hx is None:
            states: list[State] = [cell.initial_state(batch) for cell in flat]
        else:
            fields = tuple(hx) if self.mode == "LSTM" else (hx,)
            for name, field in zip(("h_0", "c_0"), fields, strict=False):
                expect_shape(name, field, "layers*directions B H", **{"layers*directions": len(flat)}, B=batch,
                             H=self.hidden_size)  # fmt: skip
            states = [flat[0].equation.state(*parts) for parts in zip(*map(native.unstack, fields), strict=True)]
        out, final, _ = _run_stack(
            layers,
            x,
            states,
            lengths=lengths,
            reset=reset,
            all_states=False,
            dropout=self.dropout,
            locked=self.locked,
            training=self.training,
            backend=self.backend,
        )
        stacked = tuple(native.stack(field) for field in zip(*final, strict=True))
        return out, stacked if self.mode == "LSTM" else stacked[0]


def _map_pair(function: Any, value: Any) -> Any:
    return tuple(function(t) for t in value) if isinstance(value, tuple | list) else function(value)


def _pack_like(out: Tensor, lengths: Any, packed: PackedSequence) -> PackedSequence:
    """`[T B F]` in the caller's row order as a PackedSequence ordered as `packed` is."""
    if packed.sorted_indices is not None:
        out, lengths = out[:, packed.sorted_indices], lengths[packed.sorted_indices.to(lengths.device)]
    data = pack_padded_sequence(out, lengths).data
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


class RNN(_DropIn, torch.nn.RNN):
    """`torch.nn.RNN` with every length and dtype on a fast path; see `torch.nn.RNN` for the constructor.

    The equation is in `unrolled.cells.RNN`. Keyword-only extras of the constructor: `locked` (dropout between
    layers with one mask for all steps), `recurrent_dropout` (DropConnect on the recurrent matrices) and
    `backend`; of the call: `lengths` and `reset`.
    """


class LSTM(_DropIn, torch.nn.LSTM):
    """`torch.nn.LSTM` with every length and dtype on a fast path; see `torch.nn.LSTM` for the constructor.

    The equation is in `unrolled.cells.LSTM`; the extras are those of `RNN`. `proj_size` is refused.
    """


class GRU(_DropIn, torch.nn.GRU):
    """`torch.nn.GRU` with every length and dtype on a fast path; see `torch.nn.GRU` for the constructor.

    The equation is in `unrolled.cells.GRU`; the extras are those of `RNN`.
    """


# ------------------------------------------------------------------------------------------- whole models


def as_core(layer: torch.nn.Module) -> Core:
    """A `torch.nn.RNN`, `LSTM` or `GRU` (or this module's) as a Core on the very same parameters, without dropout.

    Raises:
        ModelError: another kind of module, or a layer with `proj_size`.
    """
    if not isinstance(layer, torch.nn.RNNBase) or layer.proj_size:
        what = "one with proj_size" if isinstance(layer, torch.nn.RNNBase) else type(layer).__name__
        raise ModelError(f"expected a torch.nn.RNN, LSTM or GRU layer, got {what}")
    core = Core(
        _NAMES[layer.mode], layer.input_size, layer.hidden_size, layer.num_layers, bidirectional=layer.bidirectional
    )
    for k, directions in enumerate(core.layers):
        for cell, suffix in zip(directions, ("", "_reverse"), strict=False):  # type: ignore[call-overload]
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                setattr(cell, name, getattr(layer, f"{name}_l{k}{suffix}", None))
    return core


def replace(model: M) -> M:
    """Swap every `torch.nn.RNN`, `LSTM` and `GRU` inside a model for this module's, in place; returns the model.

    The weights are kept: the very same Parameter objects, so an optimiser made before goes on with them. So are hooks,
    training mode and everything else that a layer carries; a layer shared in several places stays shared. Layers with
    `proj_size`, and subclasses of torch's layers, whose `forward` may be another, stay as they are. If the model itself
    is such a layer, it is turned too.

    Example: `model = unrolled.nn.replace(model)`.
    """
    kinds = {torch.nn.RNN: RNN, torch.nn.LSTM: LSTM, torch.nn.GRU: GRU}
    for module in model.modules():
        kind = kinds.get(type(module))
        if kind is None or getattr(module, "proj_size", 0) != 0:
            continue
        # The classes differ in their methods only, so the object stays and whoever holds it sees the change.
        module.__class__ = kind
        for name, value in (("locked", False), ("recurrent_dropout", 0.0), ("backend", "auto")):
            setattr(module, name, value)
    return model


@contextmanager
def freeze(*layers: RNN | LSTM | GRU) -> Iterator[None]:
    """Within the block, these layers compute with copies of their weights, laid out for the kernels once.

    For many short calls: a call without a gradient then has no weights to lay out. A weight that is changed within the
    block is not seen until it ends. Calls that record a gradient use the weights themselves, as do those with `lengths`
    or `reset`, and those under another autocast setting than at the beginning of the block.

    Raises:
        ModelError: a layer that the native kernels cannot run here; the message says why.
    """
    for layer in layers:
        name = layer._equation().name
        reason = native.unsuited(layer.cells()[0][0].weights.hh, name)
        if reason is not None:
            raise ModelError(f"freeze: the native kernels cannot run this layer: {reason}")
        frozen = tuple(
            native.freeze(name, [cell.weights for cell in directions], torch.is_autocast_enabled("cpu"))
            for directions in layer.cells()
        )
        object.__setattr__(layer, "_frozen", frozen)
    try:
        yield
    finally:
        for layer in layers:
            object.__setattr__(layer, "_frozen", None)
