"""The cells: their equations against the oracle and torch, states, lookups, initialisation, names, messages."""

from __future__ import annotations

import copy
import math
import re
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import (
    BACKENDS,
    CELLS,
    ROUNDING,
    Case,
    agree,
    cases,
    gradients,
    leaf,
    named,
    nested,
    oracle_weights,
    random,
    refused,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unrolled import cells
from unrolled.cells import (
    GRU,
    LSTM,
    RNN,
    Cell,
    Equation,
    GatedCell,
    HiddenState,
    Lookup,
    LSTMState,
    ReluRNN,
    build_cell,
    cell_names,
    initialise,
    map_state,
    register,
    where_state,
)
from unrolled.errors import ConfigError, ModelError, ShapeError
from unrolled.unroll import unroll

every_cell = pytest.mark.parametrize("name", sorted(CELLS))
every_backend = pytest.mark.parametrize("backend", BACKENDS)


# ------------------------------------------------------------------------------------------ equations


@given(case=cases(least_steps=1, lengths=False, reset=False, reverse=False))
@settings(max_examples=60)
@example(Case("lstm", steps=3, batch=0, inputs=2, hidden=3))
def test_a_step_is_the_oracles(case: Case) -> None:
    cell, x, state = case.build(), case.sequence(), case.state()
    expected = case.oracle()
    for t in range(case.steps):
        y, state = cell.step(x[t], state)
        assert torch.equal(y, state.h)
        for k, field in enumerate(state):
            agree({"field": field}, {"field": nested(expected.states[k][t], case.batch, case.hidden)}, ROUNDING)


TORCH_CELLS = {
    "rnn": lambda i, h, bias: torch.nn.RNNCell(i, h, bias, dtype=torch.float64),
    "rnn_relu": lambda i, h, bias: torch.nn.RNNCell(i, h, bias, nonlinearity="relu", dtype=torch.float64),
    "lstm": lambda i, h, bias: torch.nn.LSTMCell(i, h, bias, dtype=torch.float64),
    "gru": lambda i, h, bias: torch.nn.GRUCell(i, h, bias, dtype=torch.float64),
}


@every_cell
@pytest.mark.parametrize("bias", [True, False])
def test_a_step_is_torchs(name: str, bias: bool) -> None:
    """Weights go over by `state_dict` in both directions, strictly; values and all gradients are torch's."""
    case = Case(name, steps=1, batch=3, inputs=4, hidden=5, bias=bias)
    ours, theirs = case.build(), TORCH_CELLS[name](4, 5, bias)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    back = CELLS[name](4, 5, bias).double()
    back.load_state_dict(theirs.state_dict(), strict=True)

    found = []
    for cell in (theirs, ours, back):
        x, state = leaf(case.sequence()[0]), type(case.state())(*map(leaf, case.state()))
        if cell is theirs:
            h = theirs(x, tuple(state) if name == "lstm" else state.h)
            after = LSTMState(*h) if name == "lstm" else HiddenState(h)
        else:
            _, after = cell.step(x, state)
        results = named("state", after)
        found.append(
            {**results, **gradients(results, {"x": x, **named("initial", state), **dict(cell.named_parameters())})}
        )
    agree(found[1], found[0], ROUNDING)
    agree(found[2], found[1], 0)


@given(case=cases(least_steps=1, lengths=False, reset=False, reverse=False))
@settings(max_examples=20)
def test_a_step_is_recur_after_project(case: Case) -> None:
    bound = case.build().bind()
    y, after = bound.step(case.sequence()[0], case.state())
    parts = bound.recur(bound.project(case.sequence()[0]), case.state())
    agree(named("state", after), named("state", parts), 0)
    assert torch.equal(y, parts.h)


@every_cell
def test_bind_takes_another_recurrent_matrix(name: str) -> None:
    case = Case(name, steps=1, batch=3, inputs=4, hidden=5)
    cell, other = case.build(), case.build()
    matrix = random(1, "other", *cell.weight_hh.shape)
    with torch.no_grad():
        other.weight_hh.copy_(matrix)
    x, state = case.sequence()[0], case.state()
    assert torch.equal(cell.bind(matrix).step(x, state)[0], other.step(x, state)[0])
    assert not torch.equal(cell.step(x, state)[0], other.step(x, state)[0])


@every_cell
def test_the_initial_state_is_zeros_of_the_weights_type(name: str) -> None:
    cell = CELLS[name](3, 4).double()
    state = cell.initial_state(2)
    assert type(state) is cell.equation.state
    for field in state:
        assert torch.equal(field, torch.zeros(2, 4, dtype=torch.float64))


# ------------------------------------------------------------------- two readings of the vanilla cell


@pytest.mark.parametrize("kind, nonlinearity", [(RNN, torch.tanh), (ReluRNN, torch.relu)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_joined_matrix_is_the_same_cell(kind: Any, nonlinearity: Any, bias: bool) -> None:
    """tanh(W [h; x] + b) of the lecture notes and tanh(W_hh h + W_xh x + b) are one function."""
    case = Case("rnn", steps=1, batch=3, inputs=2, hidden=4, bias=bias)
    cell = kind(2, 4, bias).double()
    cell.load_state_dict(case.build().state_dict())
    weight, b = cell.joined()
    assert weight.shape == (4, 6)
    assert (b is not None) == bias
    x, h = case.sequence()[0], case.state().h
    joined = torch.cat([h, x], dim=1) @ weight.T + (0 if b is None else b)
    agree({"h": cell.step(x, HiddenState(h))[0]}, {"h": nonlinearity(joined)}, ROUNDING)

    other = kind(2, 4, bias).double()
    other.set_joined(weight, b)
    again, b_again = other.joined()
    assert torch.equal(again, weight)
    assert (b is None and b_again is None) or torch.equal(b_again, b)
    agree({"h": other.step(x, HiddenState(h))[0]}, {"h": cell.step(x, HiddenState(h))[0]}, ROUNDING)


def test_set_joined_without_a_bias_clears_it() -> None:
    cell = RNN(2, 3)
    cell.set_joined(torch.ones(3, 5))
    assert torch.equal(cell.bias_ih + cell.bias_hh, torch.zeros(3))
    assert torch.equal(cell.step(torch.ones(1, 2), cell.initial_state(1))[0], torch.full((1, 3), 2.0).tanh())


def test_set_joined_refuses_another_size_and_changes_nothing() -> None:
    cell = RNN(2, 3)
    before = copy.deepcopy(cell.state_dict())
    with refused(ShapeError, "weight: expected [H=3, H+I=5], got [5, 3]"):
        cell.set_joined(torch.ones(5, 3))
    with refused(ShapeError, "bias: expected [H=3], got [2]"):
        cell.set_joined(torch.ones(3, 5), torch.ones(2))
    agree(cell.state_dict(), before, 0)
    with refused(ConfigError, "a bias was given, and this cell was made with bias=False"):
        RNN(2, 3, bias=False).set_joined(torch.ones(3, 5), torch.ones(3))


# --------------------------------------------------------------------------------------------- lookups


def one_hot(ids: Tensor, size: int) -> Tensor:
    return torch.nn.functional.one_hot(ids, size).double()


@every_backend
@given(case=cases(), symbols=st.integers(1, 40), embedded=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=50)
@example(case=Case("gru", 3, 2, 4, 3), symbols=6, embedded=True, seed=0)  # as many rows as steps
@example(case=Case("gru", 3, 2, 4, 3), symbols=7, embedded=True, seed=0)  # one more
def test_a_lookup_is_the_product_with_one_hot_vectors(
    backend: str, case: Case, symbols: int, embedded: bool, seed: int
) -> None:
    """Values and gradients of cell and table, for tables larger and smaller than the number of steps."""
    size = symbols if embedded else case.inputs
    ids = torch.randint(size, (case.steps, case.batch), generator=torch.Generator().manual_seed(seed))
    found = []
    for looked_up in (True, False):
        cell, state = case.build(), type(case.state())(*map(leaf, case.state()))
        table = leaf(random(seed, "table", symbols, case.inputs)) if embedded else None
        dense = one_hot(ids, size) if table is None else one_hot(ids, size) @ table
        run = unroll(cell, Lookup(ids, table) if looked_up else dense, state, **case.options(), backend=backend)
        results = {"outputs": run.outputs, **named("state", run.state)}
        leaves = {**named("initial", state), **dict(cell.named_parameters()), **named("table", table)}
        found.append({**results, **gradients(results, leaves, seed)})
    agree(found[0], found[1], ROUNDING)


@every_cell
@pytest.mark.parametrize("embedded", [True, False])
def test_one_step_of_a_lookup(name: str, embedded: bool) -> None:
    case = Case(name, steps=1, batch=4, inputs=3, hidden=5)
    cell, state, ids = case.build(), case.state(), torch.tensor([2, 0, 1, 2])
    table = random(0, "table", 9, 3) if embedded else None
    dense = one_hot(ids, 3) if table is None else table[ids]
    agree(named("y", cell.step(Lookup(ids, table), state)), named("y", cell.step(dense, state)), ROUNDING)


class Products(TorchDispatchMode):
    """Records the argument shapes of every operation that multiplies matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[list[tuple[int, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if re.search(r"mm|mv|matmul|linear|einsum|dot", function.__name__):
            self.shapes.append([tuple(a.shape) for a in args if isinstance(a, Tensor)])
        return function(*args, **(kwargs or {}))

    def with_size(self, size: int) -> list[list[tuple[int, ...]]]:
        """Those that a dimension of this size takes part in."""
        return [shapes for shapes in self.shapes if any(size in shape for shape in shapes)]


@every_cell
@every_backend
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_product_with_a_one_hot_matrix_is_computed(name: str, backend: str, bias: bool, dtype: torch.dtype) -> None:
    """23 symbols, and no other size is 23: where it does not appear, the input matrix was in no product."""
    cell = CELLS[name](23, 5, bias).to(dtype)
    ids = torch.randint(23, (3, 2), generator=torch.Generator().manual_seed(0))
    for inputs, expected in ((Lookup(ids, None), False), (one_hot(ids, 23).to(dtype), True)):
        with Products() as products:
            run = unroll(cell, inputs, backend=backend)
            run.outputs.sum().backward()
        assert products.shapes  # the recurrent products were seen
        assert bool(products.with_size(23)) == expected


@every_cell
@every_backend
@pytest.mark.parametrize("symbols, rows", [(3, 3), (23, 12)])
def test_a_table_is_projected_once_or_its_steps_are(name: str, backend: str, symbols: int, rows: int) -> None:
    """12 steps of a table of 3 or 23 rows: the product has the fewer rows, whichever those are."""
    cell, table = CELLS[name](11, 5), torch.randn(symbols, 11, generator=torch.Generator().manual_seed(0))
    with Products() as products, torch.no_grad():
        unroll(cell, Lookup(torch.zeros(3, 4, dtype=torch.int64), table), backend=backend)
    (shapes,) = products.with_size(11)
    assert rows in {shape[0] if shape[-1] == 11 else None for shape in shapes}
    assert not any(other in shape for shape in shapes for other in {3, 23, 12} - {rows})


def test_a_lookup_as_vectors() -> None:
    table = random(0, "table", 4, 3)
    assert torch.equal(Lookup(torch.tensor([[1, 3]]), table).vectors(), table[[1, 3]][None])
    with refused(
        ModelError,
        "this cell takes vectors, but the input is one-hot, which only the built-in cells look up: "
        "set input.embedding to a size",
    ):
        Lookup(torch.tensor([[1, 3]]), None).vectors()


# ---------------------------------------------------------------------------------------------- states


class Pair(NamedTuple):
    """A state within a state, with a whole number and a third dimension."""

    inner: LSTMState
    clock: Tensor
    past: Tensor


def pair(seed: int) -> Pair:
    inner = LSTMState(random(seed, "h", 3, 2), random(seed, "c", 3, 2))
    return Pair(inner, torch.tensor([1, 2, 3]) * seed, random(seed, "past", 3, 2, 4))


@pytest.mark.parametrize("rows", [torch.tensor([2, 0, 2]), torch.tensor([True, False, True]), torch.tensor([]).long()])
def test_select_takes_rows_by_number_or_mask(rows: Tensor) -> None:
    h, c = random(0, "h", 3, 2), random(0, "c", 3, 2)
    assert torch.equal(HiddenState(h).select(rows).h, h[rows])
    chosen = LSTMState(h, c).select(rows)
    assert type(chosen) is LSTMState
    assert torch.equal(chosen.h, h[rows])
    assert torch.equal(chosen.c, c[rows])


def test_map_state_goes_into_nested_states_field_by_field() -> None:
    a, b = pair(1), pair(2)
    total = map_state(torch.add, a, b)
    assert type(total) is Pair
    assert type(total.inner) is LSTMState
    expected = {name: t + named("", b)[name] for name, t in named("", a).items()}
    agree(named("", total), expected, 0)
    assert list(expected) == [".inner.h", ".inner.c", ".clock", ".past"]
    plain = map_state(torch.neg, (a.inner, (a.past,)))
    assert type(plain) is tuple
    assert type(plain[1]) is tuple
    assert torch.equal(plain[1][0], -a.past)


def test_where_state_chooses_row_by_row() -> None:
    a, b, rows = pair(1), pair(2), torch.tensor([True, False, True])
    mixed = named("", where_state(rows, a, b))
    for name, t in mixed.items():
        assert t.dtype == named("", a)[name].dtype
        for k, row in enumerate(rows.tolist()):
            assert torch.equal(t[k], named("", a if row else b)[name][k])


# ------------------------------------------------------------------------------------- initialisation


@every_cell
@pytest.mark.parametrize("init", ["uniform", "orthogonal"])
def test_uniform_fills_its_bounds(name: str, init: str) -> None:
    torch.manual_seed(0)
    cell = CELLS[name](30, 25)
    initialise(cell, init)
    for key, parameter in cell.named_parameters():
        if init == "orthogonal" and key == "weight_hh":
            continue
        assert parameter.abs().max() <= 1 / 5
        # 25 draws or more of U(-0.2, 0.2): that none is above 0.1 has a chance below 0.1%, and the seed is fixed.
        assert parameter.max() > 0.1
        assert parameter.min() < -0.1
    assert len({p.flatten()[0].item() for p in cell.parameters()}) == 4


@every_cell
@pytest.mark.parametrize("bias", [True, False])
def test_a_seed_gives_the_weights_that_torchs_cell_starts_with(name: str, bias: bool) -> None:
    torch.manual_seed(3)
    ours = CELLS[name](4, 5, bias)
    torch.manual_seed(3)
    kind = {"rnn_relu": "RNNCell"}.get(name, f"{name.upper()}Cell")
    agree(ours.state_dict(), getattr(torch.nn, kind)(4, 5, bias).state_dict(), 0)


@every_cell
def test_orthogonal_is_so_gate_by_gate(name: str) -> None:
    torch.manual_seed(0)
    cell = CELLS[name](3, 8).double()
    initialise(cell, "orthogonal")
    blocks = cell.weight_hh.view(-1, 8, 8)
    assert len(blocks) == cell.equation.gates
    for block in blocks:
        agree({"Q Q^T": block @ block.T}, {"Q Q^T": torch.eye(8, dtype=torch.float64)}, ROUNDING)
    assert len({block[0, 0].item() for block in blocks}) == len(blocks)


@pytest.mark.parametrize("value", [1.0, -0.5, 0.0])
def test_forget_bias_is_the_sum_of_both(value: float) -> None:
    torch.manual_seed(0)
    cell = LSTM(3, 16)
    initialise(cell, forget_bias=value)
    total = (cell.bias_ih + cell.bias_hh).view(4, 16)
    assert torch.equal(total[1], torch.full((16,), value))
    for gate in (0, 2, 3):
        assert 0 < total[gate].abs().max() <= 2 / 4


@pytest.mark.parametrize("name", ["lstm", "gru"])
@pytest.mark.parametrize("longest", [3, 50])
def test_chrono_spreads_the_time_scales(name: str, longest: int) -> None:
    """The keeping gate's bias is log u, u ~ U(1, T_max - 1); the LSTM's input gate gets its negative."""
    torch.manual_seed(0)
    hidden = 400
    cell = CELLS[name](1, hidden)
    initialise(cell, chrono=longest)
    total = (cell.bias_ih + cell.bias_hh).view(-1, hidden)
    scales = total[1].exp()  # f is the LSTM's second gate and z the GRU's
    slack = 1 + 1e-6  # exp(log(u)) in float32
    assert scales.min() >= 1 / slack
    assert scales.max() <= (longest - 1) * slack
    # Six standard errors of the mean of 400 uniform draws, whose deviation is width / sqrt(12).
    assert abs(scales.mean().item() - longest / 2) < 6 * (longest - 2) / math.sqrt(12 * hidden)
    if name == "lstm":
        assert torch.equal(total[0], -total[1])
    others = [total[2], total[3]] if name == "lstm" else [total[0], total[2]]
    for gate in others:
        assert 0 < gate.abs().max() <= 2 / math.sqrt(hidden) * slack


@pytest.mark.parametrize(
    "cell, settings_, message",
    [
        (lambda: LSTM(2, 3), {"init": "orthogonl"}, "unknown init 'orthogonl': did you mean 'orthogonal'?"),
        (lambda: LSTM(2, 3), {"init": "zzz"}, "unknown init 'zzz': known: orthogonal, uniform"),
        (lambda: GRU(2, 3), {"forget_bias": 1.0}, "forget_bias: a gru cell has no forget gate; it is for lstm"),
        (lambda: RNN(2, 3), {"forget_bias": 1.0}, "forget_bias: a rnn cell has no forget gate; it is for lstm"),
        (
            lambda: RNN(2, 3),
            {"chrono": 9},
            "chrono: a rnn cell has no gate that keeps its state; it is for lstm and gru",
        ),
        (
            lambda: ReluRNN(2, 3),
            {"chrono": 9},
            "chrono: a rnn_relu cell has no gate that keeps its state; it is for lstm and gru",
        ),
        (lambda: GRU(2, 3), {"chrono": 2}, "chrono: the longest dependency must be at least 3 steps, got 2"),
        (
            lambda: LSTM(2, 3, bias=False),
            {"forget_bias": 1.0},
            "forget_bias and chrono set a bias, and this cell was made with bias=False",
        ),
        (
            lambda: GRU(2, 3, bias=False),
            {"chrono": 9},
            "forget_bias and chrono set a bias, and this cell was made with bias=False",
        ),
    ],
)
def test_initialise_refuses(cell: Any, settings_: dict[str, Any], message: str) -> None:
    with refused(ConfigError, message):
        initialise(cell(), **settings_)


# ------------------------------------------------------------------------------- names and own cells


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(cells, "_CELLS", dict(cells._CELLS))


@pytest.mark.parametrize("name, kind", CELLS.items())
def test_cells_are_built_by_name(name: str, kind: Any) -> None:
    assert name in cell_names()
    cell = build_cell(name, 2, 3)
    assert type(cell) is kind
    assert (cell.input_size, cell.hidden_size) == (2, 3)


@pytest.mark.usefixtures("names")
def test_a_cell_of_your_own_gets_a_name() -> None:
    @register("mine")
    class Mine(RNN):
        pass

    assert "mine" in cell_names()
    assert cell_names() == sorted(cell_names())
    assert type(build_cell("mine", 2, 3)) is Mine
    register("mine")(Mine)  # the same cell again is no fault
    with refused(ConfigError, "the cell name 'mine' is taken: choose another"):
        register("mine")(LSTM)


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize("name", sorted(CELLS))
def test_a_built_in_name_is_not_given_away(name: str) -> None:
    """Not even to a class that is called as the built-in one is."""
    impostor = type(CELLS[name].__name__, (RNN,), {})
    with refused(ConfigError, f"the cell name '{name}' is taken: choose another"):
        register(name)(impostor)
    assert type(build_cell(name, 2, 3)) is CELLS[name]


@pytest.mark.usefixtures("names")
def test_a_notebook_may_run_its_cell_again() -> None:
    for _ in range(2):
        latest = type("Mine", (RNN,), {"__module__": "__main__"})
        register("mine")(latest)
    assert type(build_cell("mine", 2, 3)) is latest


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    advice = " (a cell of your own: import the module that registers it first)"
    with refused(ConfigError, f"core.cell: unknown cell 'lsmt': did you mean 'lstm'?{advice}"):
        build_cell("lsmt", 2, 3)
    with refused(ConfigError, f"core.cell: unknown cell 'xyz': known: gru, lstm, rnn, rnn_relu{advice}"):
        build_cell("xyz", 2, 3)


@pytest.mark.parametrize("sizes", [(0, 3), (2, 0), (-1, 3)])
def test_a_size_below_one_is_refused(sizes: tuple[int, int]) -> None:
    with refused(ConfigError, f"GRU: input and hidden size must be at least 1, got {sizes[0]} and {sizes[1]}"):
        GRU(*sizes)


def test_a_cell_shows_its_sizes() -> None:
    assert repr(GRU(2, 3)) == "GRU(2, 3)"
    assert repr(LSTM(2, 3, bias=False)) == "LSTM(2, 3, bias=False)"


def test_a_cell_needs_a_step() -> None:
    with pytest.raises(TypeError, match=r"abstract method '?step"):
        type("Idle", (Cell,), {})(2, 3)


def test_a_gated_cell_may_have_an_equation_of_its_own() -> None:
    """Parameters, initialisation and lookups come with `GatedCell`; see test_unroll for it over time."""

    class Sine(GatedCell):
        equation = Equation(
            "sine", 1, HiddenState, lambda x, s, w, b: HiddenState((x + torch.nn.functional.linear(s.h, w, b)).sin())
        )

    cell = Sine(2, 3).double()
    x, state = random(0, "x", 4, 2), HiddenState(random(0, "h", 4, 3))
    weights = oracle_weights(cell)
    y, after = cell.step(x, state)
    for b in range(4):
        sums = zip(
            oracle.affine(weights.ih, weights.bias_ih, x[b].tolist()),
            oracle.affine(weights.hh, weights.bias_hh, state.h[b].tolist()),
            strict=True,
        )
        agree({"y": y[b]}, {"y": nested([math.sin(a + c) for a, c in sums], 3)}, ROUNDING)
    assert after.h is y
