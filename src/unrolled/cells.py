"""The cells: the function that is repeated at every step, its state, and how its weights start.

A *cell* is any object with two methods; a user's own cell keeps the same contract:

    initial_state(batch) -> state               the state before the first step, rows = batch
    step(x, state)       -> (y, state)          x [B I], y [B H]

A *state* is a value: a NamedTuple whose tensors have the batch as their first dimension, passed in and
returned, never kept on a module. `select(rows)` picks rows of it (beams, slots, ragged batches).

The three built-in cells compute everything that x contributes with one product (`project`) and the rest in
`recur`, so that `unroll` can make the products of all steps at once:

    step(x, state) == recur(project(x), state)

Gate order, layout and names of the weights are those of torch.nn's cells.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unrolled.errors import ConfigError, ModelError, expect_shape, nearest

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = [
    "EQUATIONS",
    "GRU",
    "LSTM",
    "RNN",
    "BoundCell",
    "Cell",
    "Equation",
    "GatedCell",
    "HiddenState",
    "LSTMState",
    "Lookup",
    "ReluRNN",
    "State",
    "Weights",
    "build_cell",
    "cell_names",
    "initialise",
    "map_state",
    "register",
    "where_state",
]

State: TypeAlias = tuple[Any, ...]
"""Any NamedTuple of tensors `[B ...]`, or of such NamedTuples."""

S = TypeVar("S", bound=State)


# ---------------------------------------------------------------------------------------------- states


def map_state(function: Callable[..., Tensor], *states: S) -> S:
    """A state of the same type whose tensors are `function` of the given states' tensors, field by field."""
    first = states[0]
    fields = [
        function(*parts) if isinstance(parts[0], Tensor) else map_state(function, *parts)
        for parts in zip(*states, strict=True)
    ]
    return type(first)(*fields) if hasattr(first, "_fields") else type(first)(fields)


def where_state(rows: Bool[Tensor, "B"], chosen: S, other: S) -> S:
    """Row by row: `chosen` where `rows` is true, else `other`."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(rows.view(-1, *[1] * (a.dim() - 1)), a, b)

    return map_state(pick, chosen, other)


class HiddenState(NamedTuple):
    """The state of an RNN or GRU: the hidden state vector h `[B H]`."""

    h: Tensor

    def select(self, rows: Tensor) -> HiddenState:
        """The rows with these indices (int64), or where this mask (bool) is true."""
        return map_state(lambda t: t[rows], self)


class LSTMState(NamedTuple):
    """The state of an LSTM: hidden state h `[B H]` and cell state c `[B H]`, in this order, as in torch."""

    h: Tensor
    c: Tensor

    def select(self, rows: Tensor) -> LSTMState:
        """The rows with these indices (int64), or where this mask (bool) is true."""
        return map_state(lambda t: t[rows], self)


# ---------------------------------------------------------------------------------------------- inputs


class Lookup(NamedTuple):
    """Input steps named by number: step (t, b) is row `ids[t, b]` of `table`, or one-hot if table is None.

    A one-hot vector times a matrix is a row of that matrix, and so is a one-hot vector times an embedding
    times a matrix: built-in cells therefore look a row of their (projected) matrix up, and no product with a
    one-hot matrix is ever computed.

    Shapes: ids int64 `[T B]` (or `[B]` for one step), table `[V I]`.
    """

    ids: Int[Tensor, "*steps"]
    table: Float[Tensor, "V I"] | None

    def vectors(self) -> Float[Tensor, "*steps I"]:
        """The steps as vectors, for a cell that has no input matrix of its own to look up in.

        Raises:
            ModelError: the steps are one-hot; multiplying by one-hot vectors is what this type avoids.
        """
        if self.table is None:
            raise ModelError(
                "this cell takes vectors, but the input is one-hot, which only the built-in cells look up: "
                "set input.embedding to a size"
            )
        return F.embedding(self.ids, self.table)


# ------------------------------------------------------------------------------------------- equations


class Weights(NamedTuple):
    """A built-in cell's weights, in torch's layout. G gates (RNN 1, GRU 3, LSTM 4).

    Shapes: ih `[G*H I]`, hh `[G*H H]`, bias_ih and bias_hh `[G*H]` or None.
    """

    ih: Tensor
    hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None


def _rnn_tanh(projected: Tensor, state: HiddenState, hh: Tensor, bias: Tensor | None) -> HiddenState:
    return HiddenState(torch.tanh(projected + F.linear(state.h, hh, bias)))


def _rnn_relu(projected: Tensor, state: HiddenState, hh: Tensor, bias: Tensor | None) -> HiddenState:
    return HiddenState(torch.relu(projected + F.linear(state.h, hh, bias)))


def _lstm(projected: Tensor, state: LSTMState, hh: Tensor, bias: Tensor | None) -> LSTMState:
    i, f, g, o = (projected + F.linear(state.h, hh, bias)).chunk(4, dim=-1)
    c = torch.sigmoid(f) * state.c + torch.sigmoid(i) * torch.tanh(g)
    return LSTMState(torch.sigmoid(o) * torch.tanh(c), c)


def _gru(projected: Tensor, state: HiddenState, hh: Tensor, bias: Tensor | None) -> HiddenState:
    xr, xz, xn = projected.chunk(3, dim=-1)
    hr, hz, hn = F.linear(state.h, hh, bias).chunk(3, dim=-1)
    r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
    n = torch.tanh(xn + r * hn)
    return HiddenState(n + z * (state.h - n))


@dataclass(frozen=True)
class Equation:
    """One step of a built-in cell as a pure function, and what a caller must know about it.

    `recur(projected [B G*H], state, weight_hh, bias_hh) -> state`.
    """

    name: str
    gates: int
    state: type[HiddenState] | type[LSTMState]
    recur: Callable[[Tensor, Any, Tensor, Tensor | None], Any]


@dataclass(frozen=True)
class BoundCell:
    """A built-in cell's equation bound to weights given as tensors; a cell like any other.

    Layers hand this to `unroll`: the weights may be a module's own parameters, a torch layer's, or a version
    of them with connections dropped.
    """

    equation: Equation
    weights: Weights

    @property
    def hidden_size(self) -> int:
        return self.weights.hh.shape[1]

    @property
    def input_size(self) -> int:
        return self.weights.ih.shape[1]

    def initial_state(self, batch: int) -> Any:
        """Zeros: the notes' h_0."""
        zero = self.weights.hh.new_zeros(batch, self.hidden_size)
        return self.equation.state(*[zero] * len(self.equation.state._fields))

    def project(self, x: Tensor | Lookup) -> Float[Tensor, "*steps G*H"]:
        """What the inputs contribute: `W_ih x + b_ih`, for any number of leading dimensions.

        A Lookup whose table has fewer rows than there are steps is projected as a table first, once.
        """
        w, b = self.weights.ih, self.weights.bias_ih
        if not isinstance(x, Lookup):
            return F.linear(x, w, b)
        if x.table is None:
            matrix = w.t() if b is None else w.t() + b
            return F.embedding(x.ids, matrix)
        if x.table.shape[0] <= x.ids.numel():
            return F.embedding(x.ids, F.linear(x.table, w, b))
        return F.linear(F.embedding(x.ids, x.table), w, b)

    def recur(self, projected: Float[Tensor, "B G*H"], state: Any) -> Any:
        """The rest of a step, given what the input contributes."""
        return self.equation.recur(projected, state, self.weights.hh, self.weights.bias_hh)

    def step(self, x: Tensor | Lookup, state: Any) -> tuple[Tensor, Any]:
        """One step: `(h', state')`."""
        new = self.recur(self.project(x), state)
        return new.h, new


# ----------------------------------------------------------------------------------------------- cells


class Cell(nn.Module, ABC):
    """Base of a cell that owns its parameters; subclass it (and `register` it) for a cell of your own.

    A subclass's constructor takes `(input_size, hidden_size)` and calls `super().__init__` with them.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        if input_size < 1 or hidden_size < 1:
            raise ConfigError(
                f"{type(self).__name__}: input and hidden size must be at least 1, got {input_size} and {hidden_size}"
            )
        self.input_size = input_size
        self.hidden_size = hidden_size

    def initial_state(self, batch: int) -> Any:
        """The state before the first step; zeros unless a subclass says otherwise."""
        return HiddenState(next(self.parameters()).new_zeros(batch, self.hidden_size))

    @abstractmethod
    def step(self, x: Float[Tensor, "B I"], state: Any) -> tuple[Float[Tensor, "B H"], Any]:
        """One step: output and next state."""


class GatedCell(Cell):
    """What the built-in cells share: four tensors named as in torch's cells, and one equation."""

    equation: ClassVar[Equation]

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True) -> None:
        super().__init__(input_size, hidden_size)
        rows = self.equation.gates * hidden_size
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size))
        self.weight_hh = nn.Parameter(torch.empty(rows, hidden_size))
        self.bias_ih = nn.Parameter(torch.empty(rows)) if bias else None
        self.bias_hh = nn.Parameter(torch.empty(rows)) if bias else None
        initialise(self)

    @classmethod
    def keeps_equation(cls) -> bool:
        """Whether `step` and `initial_state` are this class's own, so that `bind` says all there is to say."""
        return cls.step is GatedCell.step and cls.initial_state is GatedCell.initial_state

    def bind(self, weight_hh: Tensor | None = None) -> BoundCell:
        """This cell as a value, with another recurrent matrix if one is given (DropConnect)."""
        hh = self.weight_hh if weight_hh is None else weight_hh
        return BoundCell(self.equation, Weights(self.weight_ih, hh, self.bias_ih, self.bias_hh))

    def initial_state(self, batch: int) -> Any:
        return self.bind().initial_state(batch)

    def step(self, x: Tensor | Lookup, state: Any) -> tuple[Tensor, Any]:
        return self.bind().step(x, state)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}" + ("" if self.bias_ih is not None else ", bias=False")


class RNN(GatedCell):
    """The vanilla cell (Elman 1990), as in `torch.nn.RNNCell`.

        h' = tanh(W_ih x + b_ih + W_hh h + b_hh)

    The lecture notes write it in two ways, `tanh(W_hh h + W_xh x)` and `tanh(W [h; x])`. They are one and the
    same parameters: W is W_hh and W_xh side by side (`joined`), the product of a row of blocks with a column
    of blocks being the sum of the blocks' products.
    """

    equation = Equation("rnn", 1, HiddenState, _rnn_tanh)

    def joined(self) -> tuple[Float[Tensor, "H H+I"], Float[Tensor, "H"] | None]:
        """The notes' second reading: W = [W_hh W_ih] and the one bias b_ih + b_hh, so that
        `h' = nonlinearity(W [h; x] + b)`."""
        bias = None if self.bias_ih is None or self.bias_hh is None else self.bias_ih + self.bias_hh
        return torch.cat([self.weight_hh, self.weight_ih], dim=1), bias

    @torch.no_grad()
    def set_joined(self, weight: Float[Tensor, "H H+I"], bias: Float[Tensor, "H"] | None = None) -> None:
        """Take the parameters from the second reading; the whole bias goes to b_ih, b_hh becomes zero.

        Raises:
            ShapeError: weight is not `[H, H+I]` or bias not `[H]`.
            ConfigError: a bias for a cell that was made without one.
        """
        hidden = self.hidden_size
        expect_shape("weight", weight, "H H+I", **{"H": hidden, "H+I": hidden + self.input_size})
        if bias is not None:
            expect_shape("bias", bias, "H", H=hidden)
            if self.bias_ih is None:
                raise ConfigError("a bias was given, and this cell was made with bias=False")
        self.weight_hh.copy_(weight[:, :hidden])
        self.weight_ih.copy_(weight[:, hidden:])
        if self.bias_ih is not None and self.bias_hh is not None:
            self.bias_hh.zero_()
            self.bias_ih.copy_(torch.zeros_like(self.bias_ih) if bias is None else bias)


class ReluRNN(RNN):
    """The vanilla cell with `relu` in place of tanh (`torch.nn.RNNCell(nonlinearity="relu")`)."""

    equation = Equation("rnn_relu", 1, HiddenState, _rnn_relu)


class LSTM(GatedCell):
    """Long short-term memory (Hochreiter and Schmidhuber 1997, forget gate of Gers et al. 2000, no peepholes),
    as in `torch.nn.LSTMCell`. Gate order i f g o.

        i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)      input gate
        f = sigmoid(W_if x + b_if + W_hf h + b_hf)      forget gate
        g = tanh   (W_ig x + b_ig + W_hg h + b_hg)      candidate
        o = sigmoid(W_io x + b_io + W_ho h + b_ho)      output gate
        c' = f * c + i * g
        h' = o * tanh(c')
    """

    equation = Equation("lstm", 4, LSTMState, _lstm)


class GRU(GatedCell):
    """Gated recurrent unit (Cho et al. 2014) in torch's variant (`torch.nn.GRUCell`): the reset gate is applied
    after the recurrent product, not before it. Gate order r z n.

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)      reset gate
        z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)      update gate
        n = tanh(W_in x + b_in + r * (W_hn h + b_hn))   candidate
        h' = (1 - z) * n + z * h                        computed as n + z * (h - n)
    """

    equation = Equation("gru", 3, HiddenState, _gru)


EQUATIONS = {cell.equation.name: cell.equation for cell in (RNN, ReluRNN, LSTM, GRU)}
"""The built-in equations by name."""


# ------------------------------------------------------------------------------------------ initialisation


@torch.no_grad()
def initialise(
    cell: GatedCell, init: str = "uniform", *, forget_bias: float | None = None, chrono: int | None = None
) -> None:
    """Set a built-in cell's weights afresh from torch's global random state.

    Args:
        init: `"uniform"`: every weight and bias from U(-1/sqrt(H), 1/sqrt(H)), as torch.nn does.
            `"orthogonal"`: the same, but each gate's recurrent matrix is a random orthogonal one (Saxe et al.
            2014), which neither shrinks nor stretches a state.
        forget_bias: LSTM only: the sum of both forget-gate biases starts at this value (Gers et al. 2000;
            Jozefowicz et al. 2015 recommend 1).
        chrono: LSTM and GRU: the longest dependency in steps, T_max >= 3. The gate that keeps the state gets
            the bias log(u), u ~ U(1, T_max - 1), so that units forget at time scales from 1 to T_max (Tallec
            and Ollivier 2018); the LSTM's input gate gets its negative. For the GRU the keeping gate is z.

    Raises:
        ConfigError: an unknown `init`, or a setting that this cell has no gate for.
    """
    hidden, name = cell.hidden_size, cell.equation.name
    bound = 1 / math.sqrt(hidden)
    for parameter in cell.parameters():
        nn.init.uniform_(parameter, -bound, bound)
    if init == "orthogonal":
        for block in cell.weight_hh.view(-1, hidden, hidden):
            nn.init.orthogonal_(block)
    elif init != "uniform":
        raise ConfigError(f"unknown init {init!r}: {nearest(init, ['uniform', 'orthogonal'])}")

    if forget_bias is None and chrono is None:
        return
    if cell.bias_ih is None or cell.bias_hh is None:
        raise ConfigError("forget_bias and chrono set a bias, and this cell was made with bias=False")
    if forget_bias is not None:
        if name != "lstm":
            raise ConfigError(f"forget_bias: a {name} cell has no forget gate; it is for lstm")
        cell.bias_ih[hidden : 2 * hidden] = forget_bias
        cell.bias_hh[hidden : 2 * hidden] = 0
    if chrono is not None:
        if name not in ("lstm", "gru"):
            raise ConfigError(f"chrono: a {name} cell has no gate that keeps its state; it is for lstm and gru")
        if chrono < 3:
            raise ConfigError(f"chrono: the longest dependency must be at least 3 steps, got {chrono}")
        keep = torch.empty(hidden).uniform_(1, chrono - 1).log_()
        cell.bias_ih[hidden : 2 * hidden] = keep  # f is the LSTM's second gate and z the GRU's
        cell.bias_hh[hidden : 2 * hidden] = 0
        if name == "lstm":
            cell.bias_ih[:hidden] = -keep
            cell.bias_hh[:hidden] = 0


# ------------------------------------------------------------------------------------------------ names

_CELLS: dict[str, Callable[[int, int], nn.Module]] = {cell.equation.name: cell for cell in (RNN, ReluRNN, LSTM, GRU)}

C = TypeVar("C", bound=Callable[..., Any])


def _origin(cell: Callable[..., Any]) -> tuple[str, str]:
    return cell.__module__, cell.__qualname__


def register(name: str) -> Callable[[C], C]:
    """Class decorator that gives a cell of your own a name, for `core.cell` in a config and in a model folder.

    Loading a model never imports code that its folder names: import the module that registers the cell first.

    Raises:
        ConfigError: the name belongs to another cell.
    """

    def add(cell: C) -> C:
        known = _CELLS.get(name)
        # A notebook that runs a cell again defines the same class anew: that is no other cell.
        if known is not None and _origin(known) != _origin(cell):
            raise ConfigError(f"the cell name {name!r} is taken: choose another")
        _CELLS[name] = cell
        return cell

    return add


def cell_names() -> list[str]:
    """The names that `build_cell` knows, sorted."""
    return sorted(_CELLS)


def build_cell(name: str, input_size: int, hidden_size: int) -> Any:
    """A new cell by its registered name.

    Raises:
        ConfigError: unknown name; the nearest known one is offered.
    """
    if name not in _CELLS:
        raise ConfigError(
            f"core.cell: unknown cell {name!r}: {nearest(name, _CELLS)} "
            "(a cell of your own: import the module that registers it first)"
        )
    return _CELLS[name](input_size, hidden_size)
