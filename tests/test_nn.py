"""The layers: drop-ins judged by torch.nn (law 4), stacks by the oracle, dropout by what it does, messages."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
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
    LayerCase,
    agree,
    gradients,
    layer_cases,
    leaf,
    marks,
    named,
    nested,
    oracle_weights,
    ragged,
    random,
    refused,
)
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import unrolled.nn
from unrolled import cells
from unrolled.cells import Cell, HiddenState, Lookup, LSTMState, map_state, register
from unrolled.errors import ConfigError, ModelError, ShapeError
from unrolled.nn import GRU, LSTM, RNN, Core, CoreState, dropout_steps

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_cell = pytest.mark.parametrize("name", sorted(CELLS))
every_layer = pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])


# ------------------------------------------------------------------------------- law 4: as torch.nn's


def pair_of(case: LayerCase, backend: str) -> tuple[Any, Any]:
    """torch's layer and ours with its weights, which went over and back by `state_dict`, strictly."""
    theirs = case.build(torch.nn)
    ours = case.build(unrolled.nn, backend=backend)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict({name: t.clone() for name, t in ours.state_dict().items()}, strict=True)
    return theirs, ours


def state_leaves(case: LayerCase) -> tuple[Any, dict[str, Tensor]]:
    state = case.state()
    if state is None:
        return None, {}
    state = tuple(map(leaf, state)) if isinstance(state, tuple) else leaf(state)
    return state, named("initial", state)


def results_with_gradients(
    layer: Any, out: Tensor, final: Any, x: Tensor, initial: dict[str, Tensor]
) -> dict[str, Tensor]:
    results = {"output": out, **named("final", final)}
    wrt = {"input": x, **initial, **dict(layer.named_parameters())}
    return {**results, **gradients(results, wrt)}


@every_backend
@given(case=layer_cases())
@settings(max_examples=60)
def test_a_drop_in_is_torchs_layer(backend: str, case: LayerCase) -> None:
    """Output, final states and the gradients of input, initial states and weights."""
    found = []
    for layer in pair_of(case, backend):
        x = case.sequence()
        x = leaf(x.transpose(0, 1) if case.batch_first else x)
        state, initial = state_leaves(case)
        out, final = layer(x, state)
        assert isinstance(final, tuple) == (case.mode == "LSTM")
        found.append(results_with_gradients(layer, out, final, x, initial))
    agree(found[1], found[0], ROUNDING)


@every_backend
@given(case=layer_cases())
@settings(max_examples=25)
def test_a_drop_in_takes_one_sequence_without_a_batch(backend: str, case: LayerCase) -> None:
    case = replace(case, batch=1)
    found = []
    for layer in pair_of(case, backend):
        x = leaf(case.sequence()[:, 0])
        state, initial = state_leaves(case)
        single = tuple(t[:, 0] for t in state) if isinstance(state, tuple) else None if state is None else state[:, 0]
        out, final = layer(x, single)
        assert out.shape == (case.steps, case.hidden * (1 + case.bidirectional))
        found.append(results_with_gradients(layer, out, final, x, initial))
    agree(found[1], found[0], ROUNDING)


@every_backend
@given(case=layer_cases(), enforce_sorted=st.booleans())
@settings(max_examples=60)
@example(case=LayerCase("LSTM", 2, 3, 2, True, True, 5, 4, (1, 5, 3, 5), True, True, 0), enforce_sorted=False)
def test_a_drop_in_takes_and_returns_a_packed_sequence(backend: str, case: LayerCase, enforce_sorted: bool) -> None:
    """Sorted or not; what comes out goes into torch's own `pad_packed_sequence`."""
    lengths = sorted(case.lengths, reverse=True) if enforce_sorted else list(case.lengths)
    found, packs = [], []
    for layer in pair_of(case, backend):
        x = leaf(case.sequence())
        packed = pack_padded_sequence(
            x.transpose(0, 1) if case.batch_first else x, lengths, case.batch_first, enforce_sorted
        )
        state, initial = state_leaves(case)
        out, final = layer(packed, state)
        assert isinstance(out, PackedSequence)
        padded, sizes = pad_packed_sequence(out, case.batch_first)
        assert sizes.tolist() == lengths
        packs.append(out)
        found.append(results_with_gradients(layer, padded, final, x, initial))
    theirs, ours = packs
    assert torch.equal(ours.batch_sizes, theirs.batch_sizes)
    for indices in ("sorted_indices", "unsorted_indices"):
        a, b = getattr(ours, indices), getattr(theirs, indices)
        assert (a is None and b is None) or torch.equal(a, b)
    agree({"data": ours.data}, {"data": theirs.data}, ROUNDING)
    agree(found[1], found[0], ROUNDING)


@every_backend
def test_a_packed_list_of_sequences(backend: str) -> None:
    rows = [random(0, str(n), n, 3) for n in (2, 4, 1)]
    theirs = torch.nn.GRU(3, 5, dtype=torch.float64)
    ours = GRU(3, 5, dtype=torch.float64, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    packed = pack_sequence(rows, enforce_sorted=False)
    agree(named("", tuple(ours(packed)[0][:2])), named("", tuple(theirs(packed)[0][:2])), ROUNDING)
    for b, row in enumerate(rows):
        agree({"h_n": ours(packed)[1][:, b]}, {"h_n": ours(row)[1]}, ROUNDING)


@every_backend
@given(case=layer_cases())
@settings(max_examples=40)
def test_lengths_are_what_packing_does(backend: str, case: LayerCase) -> None:
    """Without packing: the same numbers, zeros at padding, whatever it holds."""
    theirs, ours = pair_of(case, backend)
    x, lengths = case.sequence(), list(case.lengths)
    packed, final = theirs(pack_padded_sequence(x, lengths, enforce_sorted=False), case.state())
    expected = pad_packed_sequence(packed, total_length=case.steps)[0]
    real = torch.arange(case.steps)[:, None, None] < torch.tensor(lengths)[:, None]
    spoilt = x.where(real, torch.nan)
    out, last = ours(spoilt.transpose(0, 1) if case.batch_first else spoilt, case.state(), lengths=lengths)
    out = out.transpose(0, 1) if case.batch_first else out
    agree({"output": out, **named("final", last)}, {"output": expected, **named("final", final)}, ROUNDING)


@every_backend
@every_layer
def test_rows_without_a_step_keep_their_state(kind: str, backend: str) -> None:
    """What torch cannot pack: a length of 0. Both directions, both layers."""
    layer = getattr(unrolled.nn, kind)(2, 3, 2, bidirectional=True, dtype=torch.float64, backend=backend)
    state = (random(0, "h", 4, 3, 3), random(0, "c", 4, 3, 3))
    out, final = layer(random(0, "x", 4, 3, 2), state if kind == "LSTM" else state[0], lengths=[4, 0, 2])
    for after, before in zip(final if kind == "LSTM" else (final,), state, strict=False):
        assert torch.equal(after[:, 1], before[:, 1])
        assert not torch.equal(after[:, 0], before[:, 0])
    assert torch.equal(out[:, 1], torch.zeros(4, 6, dtype=torch.float64))


@every_layer
def test_no_steps_give_no_output(kind: str) -> None:
    layer = getattr(unrolled.nn, kind)(2, 3, 2, bidirectional=True)
    out, final = layer(torch.zeros(0, 4, 2))
    assert out.shape == (0, 4, 6)
    assert {t.shape for t in (final if kind == "LSTM" else (final,))} == {(4, 4, 3)}


@every_backend
@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_have_the_layers_dtype(kind: str, backend: str, dtype: torch.dtype) -> None:
    layer = getattr(unrolled.nn, kind)(2, 3, dtype=dtype, backend=backend)
    out, final = layer(torch.zeros(4, 2, 2, dtype=dtype))
    assert {out.dtype, *(t.dtype for t in (final if kind == "LSTM" else (final,)))} == {dtype}
    again = getattr(unrolled.nn, kind)(2, 3, backend=backend).to(dtype)
    assert again(torch.zeros(4, 2, 2, dtype=dtype))[0].dtype == dtype


@every_layer
def test_a_bfloat16_layer_runs_on_the_reference(kind: str) -> None:
    """Against torch's layer, which computes a step in another order: two roundings of 2^-9 at each of 4 steps."""
    theirs = getattr(torch.nn, kind)(3, 8, dtype=torch.bfloat16)
    ours = getattr(unrolled.nn, kind)(3, 8, dtype=torch.bfloat16)
    ours.load_state_dict(theirs.state_dict())
    x = random(0, "x", 4, 2, 3, dtype=torch.bfloat16)
    agree({"output": ours(x)[0]}, {"output": theirs(x)[0]}, 8 * 2**-9)
    with refused(ModelError, "backend 'tape' cannot run here: the weights are bfloat16; ..."):
        getattr(unrolled.nn, kind)(3, 8, dtype=torch.bfloat16, backend="tape")(x)


# ------------------------------------------------------------------------ law 4: the class itself


@every_layer
def test_a_drop_in_is_one_of_torchs(kind: str) -> None:
    layer = getattr(unrolled.nn, kind)(2, 3)
    assert isinstance(layer, getattr(torch.nn, kind))
    assert isinstance(layer, torch.nn.RNNBase)


@every_layer
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "dropout": 0.25},
        {"bias": False, "batch_first": True},
        {"num_layers": 2, "bidirectional": True},
    ],
)
def test_the_constructor_is_torchs(kind: str, options: dict[str, Any]) -> None:
    theirs, ours = (getattr(package, kind)(2, 3, **options) for package in (torch.nn, unrolled.nn))
    assert repr(ours) == repr(theirs)
    for attribute in ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)


@every_layer
def test_the_constructor_takes_torchs_positions(kind: str) -> None:
    """RNN has `nonlinearity` at the fourth place, the others do not."""
    positions: tuple[Any, ...] = (2, 3, 2, *(("relu",) if kind == "RNN" else ()), False, True, 0.5, True)
    theirs, ours = (getattr(package, kind)(*positions) for package in (torch.nn, unrolled.nn))
    assert repr(ours) == repr(theirs)
    assert ours.mode == theirs.mode
    assert (ours.bias, ours.batch_first, ours.dropout, ours.bidirectional) == (False, True, 0.5, True)


@every_layer
def test_a_seed_gives_the_weights_that_torchs_layer_starts_with(kind: str) -> None:
    found = []
    for package in (torch.nn, unrolled.nn):
        torch.manual_seed(3)
        found.append(getattr(package, kind)(2, 3, 2, bidirectional=True).state_dict())
    agree(*found, 0)


@every_backend
@every_layer
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_computes_the_same_and_shares_nothing(kind: str, backend: str, duplicate: Any) -> None:
    layer = getattr(unrolled.nn, kind)(2, 3, 2, dropout=0.5, locked=True, recurrent_dropout=0.25, backend=backend)
    x = random(0, "x", 4, 2, 2, dtype=torch.float32)
    expected = layer.eval()(x)[0]
    twin = duplicate(layer)
    assert (type(twin), twin.locked, twin.recurrent_dropout, twin.backend) == (type(layer), True, 0.25, backend)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert torch.equal(twin(x)[0], expected)
    assert not torch.equal(layer(x)[0], expected)


@every_backend
@every_layer
@pytest.mark.parametrize("way", ["data", "optimiser", "load", "functional_call", "tie", "parametrise"])
def test_a_changed_weight_is_used_at_once(kind: str, backend: str, way: str) -> None:
    """By whatever means it was changed: the new output is that of torch's layer with the same weights."""
    ours = getattr(unrolled.nn, kind)(3, 3, dtype=torch.float64, backend=backend)
    theirs = getattr(torch.nn, kind)(3, 3, dtype=torch.float64)
    x = random(0, "x", 4, 2, 3)
    stale = ours(x)[0]
    new = {name: random(1, name, *t.shape) * 0.5 for name, t in ours.named_parameters()}
    if way == "functional_call":
        out = torch.func.functional_call(ours, new, (x,))[0]
    else:
        if way == "data":
            for name, parameter in ours.named_parameters():
                parameter.data[:] = new[name]
        elif way == "optimiser":
            ours.zero_grad()
            stale.sum().backward()
            torch.optim.SGD(ours.parameters(), lr=0.5).step()
        elif way == "load":
            ours.load_state_dict(new)
        elif way == "tie":
            ours.weight_hh_l0 = ours.weight_ih_l0
        else:
            torch.nn.utils.parametrizations.weight_norm(ours, "weight_hh_l0")
            ours.parametrizations.weight_hh_l0.original0.data.mul_(3)
        new = {name: getattr(ours, name).detach().clone() for name in new}
        out = ours(x)[0]
    theirs.load_state_dict(new)
    agree({"output": out}, {"output": theirs(x)[0]}, ROUNDING)
    assert (out - stale).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------- refusals


def test_a_projected_lstm_is_refused() -> None:
    message = "proj_size is not supported; use torch.nn.LSTM for a projected LSTM"
    with refused(ConfigError, message):
        LSTM(4, 5, proj_size=2)
    with refused(ConfigError, message):
        LSTM(4, 5, 1, True, False, 0.0, False, 2)
    assert LSTM(4, 5, proj_size=0).proj_size == 0


@every_layer
@pytest.mark.parametrize("share", [-0.1, 1.0, 2.0])
def test_a_share_out_of_range_is_refused(kind: str, share: float) -> None:
    with refused(ConfigError, f"recurrent_dropout: expected 0 <= p < 1, got {share}"):
        getattr(unrolled.nn, kind)(2, 3, recurrent_dropout=share)


X = torch.zeros(4, 3, 2)
H = torch.zeros(1, 3, 5)


@pytest.mark.parametrize(
    "layer, arguments, options, message",
    [
        (GRU(2, 5), (X[..., :1],), {}, "input: expected [T, B, I=2], got [4, 3, 1]"),
        (GRU(2, 5), (X[0, 0],), {}, "input: expected [T, B, I=2], got [2]"),
        (GRU(2, 5), (X[None],), {}, "input: expected [T, B, I=2], got [1, 4, 3, 2]"),
        (GRU(2, 5, batch_first=True), (X[..., :1],), {}, "input: expected [B, T, I=2], got [4, 3, 1]"),
        (GRU(2, 5), (X.double(),), {}, "inputs: expected float32, as the weights are, got float64"),
        (GRU(2, 5), (X.tolist(),), {}, "input: expected a tensor or a PackedSequence, got list"),
        (GRU(2, 5), (X, H[:, :2]), {}, "h_0: expected [layers*directions=1, B=3, H=5], got [1, 2, 5]"),
        (
            GRU(2, 5, 2, bidirectional=True),
            (X, H),
            {},
            "h_0: expected [layers*directions=4, B=3, H=5], got [1, 3, 5]",
        ),
        (LSTM(2, 5), (X, (H, H[..., :4])), {}, "c_0: expected [layers*directions=1, B=3, H=5], got [1, 3, 4]"),
        (LSTM(2, 5), (X, H), {}, "hx: expected a pair (h_0, c_0)"),
        (LSTM(2, 5), (X, (H,)), {}, "hx: expected a pair (h_0, c_0)"),
        (GRU(2, 5), (X, (H, H)), {}, "hx: expected a tensor h_0"),
        (GRU(2, 5), (X, H.double()), {}, "state.h: expected float32, as the weights are, got float64"),
        (GRU(2, 5), (X,), {"lengths": [4, 3]}, "lengths: expected [B=3], got [2]"),
        (GRU(2, 5), (X,), {"lengths": [4, 3, 5]}, "lengths: expected 0..4 (the number of steps), got 3..5"),
        (
            GRU(2, 5),
            (pack_padded_sequence(X, [4, 3, 1]),),
            {"lengths": [4, 3, 1]},
            "lengths: a PackedSequence has its own lengths; give one or the other",
        ),
        (GRU(2, 5), (X,), {"reset": X[..., 0]}, "reset: expected bool, got float32"),
        (GRU(2, 5), (X,), {"reset": X[:2, :, 0] > 0}, "reset: expected [T=4, B=3], got [2, 3]"),
        (GRU(2, 5), (X,), {"reset": X[:2, :, 0] > 0, "lengths": [1, 2, 3]}, "reset: expected [T=4, B=3], got [2, 3]"),
    ],
)
def test_a_drop_in_refuses(layer: Any, arguments: Any, options: dict[str, Any], message: str) -> None:
    with refused(ShapeError, message):
        layer(*arguments, **options)


def test_an_unknown_backend_is_refused() -> None:
    with refused(ConfigError, "unknown backend 'nativ': did you mean 'native'?"):
        GRU(2, 3, backend="nativ")(X)


# ------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("p", [0.25, 0.5])
def test_dropout_drops_its_share_and_scales_the_rest(locked: bool, p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(50, 20, 40)
    y = dropout_steps(x, p, locked=locked, training=True)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
    # Masks are drawn for 800 places (locked) or 40 000: five standard deviations of the share that is dropped.
    draws = 20 * 40 * (1 if locked else 50)
    assert abs(float((y == 0).double().mean()) - p) < 5 * (p * (1 - p) / draws) ** 0.5
    same = [torch.equal(y[t], y[0]) for t in range(1, 50)]
    assert all(same) if locked else not any(same)
    assert not torch.equal(y[:, 0], y[:, 1])


@pytest.mark.parametrize("locked", [False, True])
def test_dropout_is_off_when_not_training_and_at_zero(locked: bool) -> None:
    x = random(0, "x", 3, 2, 4)
    assert dropout_steps(x, 0.5, locked=locked, training=False) is x
    assert dropout_steps(x, 0.0, locked=locked, training=True) is x
    assert torch.equal(dropout_steps(x, 1.0, locked=locked, training=True), torch.zeros_like(x))


@pytest.mark.parametrize("locked", [False, True])
def test_dropout_passes_the_gradient_of_survivors(locked: bool) -> None:
    torch.manual_seed(0)
    x = leaf(random(0, "x", 3, 2, 40))
    y = dropout_steps(x, 0.5, locked=locked, training=True)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, torch.where(y == 0, 0.0, 2.0))


def transparent(layers: int, size: int, backend: str, **options: Any) -> Any:
    """A stack that returns its input, if positive, unchanged: W_ih = 1, W_hh = 0. What differs, dropout did."""
    stack = RNN(size, size, layers, nonlinearity="relu", bias=False, backend=backend, **options)
    with torch.no_grad():
        for name, parameter in stack.named_parameters():
            parameter.copy_(torch.eye(size) if "weight_ih" in name else torch.zeros(size, size))
    return stack


@every_backend
@pytest.mark.parametrize("locked", [False, True])
def test_a_layers_dropout_is_between_layers_only(backend: str, locked: bool) -> None:
    torch.manual_seed(0)
    x = torch.ones(6, 3, 20)
    for layers in (1, 2, 3):
        stack = transparent(layers, 20, backend, locked=locked, **({"dropout": 0.5} if layers > 1 else {}))
        values = set(stack(x)[0].unique().tolist())
        # One chance to be doubled or dropped in each gap, none before the first layer or after the last.
        assert values == {1: {1.0}, 2: {0.0, 2.0}, 3: {0.0, 4.0}}[layers]
        assert torch.equal(stack.eval()(x)[0], x)


@every_backend
@pytest.mark.parametrize("locked", [False, True])
def test_locked_dropout_has_one_mask_for_all_steps(backend: str, locked: bool) -> None:
    torch.manual_seed(0)
    x = torch.ones(6, 3, 20)
    stack = transparent(2, 20, backend, dropout=0.5, locked=locked)
    first, second = stack(x)[0], stack(x)[0]
    assert all(torch.equal(y, first[0]) for y in first) == locked
    assert not torch.equal(first[:, 0], first[:, 1])
    assert not torch.equal(first, second)


@every_backend
@every_layer
def test_dropout_off_is_torchs_eval(kind: str, backend: str) -> None:
    theirs = getattr(torch.nn, kind)(2, 3, 2, dropout=0.5, dtype=torch.float64).eval()
    ours = getattr(unrolled.nn, kind)(
        2, 3, 2, dropout=0.5, locked=True, recurrent_dropout=0.5, dtype=torch.float64, backend=backend
    ).eval()
    ours.load_state_dict(theirs.state_dict())
    x = random(0, "x", 4, 2, 2)
    agree({"output": ours(x)[0]}, {"output": theirs(x)[0]}, ROUNDING)


def revealing(make: Any, size: int) -> Any:
    """A relu layer whose outputs show the recurrent matrix that was used: W_ih = 0, W_hh = 1 everywhere."""
    layer = make(size)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.fill_(1.0 if "weight_hh" in name else 0.0)
    return layer


@every_backend
@pytest.mark.parametrize("made", ["layer", "core"])
def test_drop_connect_uses_one_matrix_at_all_steps(backend: str, made: str) -> None:
    """From the unit vectors e_b, step one gives the matrix's columns, and step t+1 the matrix times step t. All numbers
    are small whole ones, so equal bits are expected."""
    torch.manual_seed(0)
    size = 8
    if made == "layer":
        layer = revealing(lambda n: RNN(n, n, nonlinearity="relu", recurrent_dropout=0.5, backend=backend), size)
        run = lambda: layer(torch.zeros(4, size, size), torch.eye(size)[None])[0]  # noqa: E731
        weight = layer.weight_hh_l0
    else:
        layer = revealing(lambda n: Core("rnn_relu", n, n, recurrent_dropout=0.5, backend=backend), size)
        run = lambda: layer(torch.zeros(4, size, size), CoreState((HiddenState(torch.eye(size)),))).outputs  # noqa: E731
        weight = layer.layers[0][0].weight_hh
    out = run()
    used = out[0].T  # row b of out[0] is W e_b
    assert set(used.unique().tolist()) == {0.0, 2.0}
    for t in range(3):
        assert torch.equal(out[t + 1], out[t] @ used.T)
    assert not torch.equal(run()[0], out[0])
    (grad,) = torch.autograd.grad(out[0].sum(), weight)
    assert torch.equal(grad, used)  # the sum of W e_b over b and rows: survivors count double, the dropped not at all
    layer.eval()
    assert torch.equal(run()[0], torch.ones(size, size))


@every_backend
def test_drop_connect_draws_for_each_matrix(backend: str) -> None:
    torch.manual_seed(0)
    layer = revealing(
        lambda n: RNN(n, n, 2, nonlinearity="relu", bidirectional=True, recurrent_dropout=0.5, backend=backend), 8
    )
    _, final = layer(torch.zeros(1, 8, 8), torch.eye(8).expand(4, 8, 8))
    assert len({str(matrix.tolist()) for matrix in final}) == 4


# -------------------------------------------------------------------------------------- Core: a stack


class Stack(NamedTuple):
    """A drawn core, its input, its initial state."""

    cell: str
    layers: int
    bidirectional: bool
    steps: int
    batch: int
    lengths: tuple[int, ...] | None
    reset: tuple[tuple[bool, ...], ...] | None
    seed: int

    def build(self, backend: str) -> Core:
        core = Core(self.cell, 3, 4, self.layers, bidirectional=self.bidirectional, backend=backend).double()
        with torch.no_grad():
            for name, parameter in core.named_parameters():
                parameter.copy_(random(self.seed, name, *parameter.shape) * 0.5)
        return core

    def sequence(self) -> Tensor:
        return random(self.seed, "inputs", self.steps, self.batch, 3)

    def state(self) -> CoreState:
        count, kind = self.layers * (1 + self.bidirectional), CELLS[self.cell].equation.state
        draw = lambda k, f: random(self.seed, f"{f}0 of {k}", self.batch, 4)  # noqa: E731
        return CoreState(tuple(kind(*(draw(k, f) for f in kind._fields)) for k in range(count)))

    def resets(self) -> Tensor | None:
        return (
            None if self.reset is None else torch.tensor(self.reset, dtype=torch.bool).reshape(self.steps, self.batch)
        )


@st.composite
def stacks(draw: st.DrawFn, *, one_way: bool = False) -> Stack:
    steps, batch = draw(st.integers(0, 5)), draw(st.integers(0, 3))
    return Stack(
        cell=draw(st.sampled_from(sorted(CELLS))),
        layers=draw(st.integers(1, 3)),
        bidirectional=False if one_way else draw(st.booleans()),
        steps=steps,
        batch=batch,
        lengths=draw(st.none() | ragged(steps, batch)),
        reset=draw(st.none() | marks(steps, batch)),
        seed=draw(st.integers(0, 99)),
    )


def run_stack(stack: Stack, backend: str) -> dict[str, Tensor]:
    """Every result of a core, and every gradient."""
    core, x, state = stack.build(backend), leaf(stack.sequence()), map_state(leaf, stack.state())
    run = core(x, state, lengths=stack.lengths, reset=stack.resets(), all_states=True)
    results = {"outputs": run.outputs, **named("state", run.state), **named("states", run.states)}
    wrt = {"inputs": x, **named("initial", state), **dict(core.named_parameters())}
    return {**results, **gradients(results, wrt, stack.seed)}


@every_backend
@given(stack=stacks())
@settings(max_examples=60)
@example(
    Stack("lstm", 2, True, 5, 2, (3, 5), ((True, False), (False, True), (False, False), (True, True), (True, False)), 0)
)
def test_a_core_runs_each_document_by_itself(backend: str, stack: Stack) -> None:
    """Against the oracle, which cuts every row into its documents; marks in the padding mean nothing."""
    core = stack.build(backend)
    run = core(stack.sequence(), stack.state(), lengths=stack.lengths, reset=stack.resets())
    reset = stack.resets()
    outputs, finals = oracle.run_layers(
        stack.cell,
        [[oracle_weights(cell) for cell in layer] for layer in core.layers],  # type: ignore[attr-defined,union-attr]
        stack.sequence().tolist(),
        [[field.tolist() for field in cell] for cell in stack.state().cells],
        lengths=stack.lengths,
        reset=None if reset is None else reset.tolist(),
    )
    shape = (stack.steps, stack.batch, core.output_size)
    agree({"outputs": run.outputs}, {"outputs": nested(outputs, *shape)}, ROUNDING)
    for after, expected in zip(run.state.cells, finals, strict=True):
        for a, e in zip(after, expected, strict=True):
            agree({"state": a}, {"state": nested(e, stack.batch, 4)}, ROUNDING)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@given(stack=stacks())
@settings(max_examples=40)
def test_a_cores_results_and_gradients_are_the_references(backend: str, stack: Stack) -> None:
    agree(run_stack(stack, backend), run_stack(stack, "reference"), ROUNDING)


@every_backend
@given(stack=stacks(one_way=True))
@settings(max_examples=30)
def test_a_core_is_the_core_stepped(backend: str, stack: Stack) -> None:
    stack = stack._replace(lengths=None, reset=None)
    core, state = stack.build(backend), stack.state()
    run = core(stack.sequence(), state, all_states=True)
    for t, x in enumerate(stack.sequence()):
        y, state = core.step(x, state)
        agree({"y": y}, {"y": run.outputs[t]}, ROUNDING)
        agree(named("state", state), named("state", map_state(lambda field: field[t], run.states)), ROUNDING)  # noqa: B023
    agree(named("state", run.state), named("state", state), ROUNDING)


@every_backend
@given(case=layer_cases())
@settings(max_examples=30)
def test_a_core_is_torchs_layer(backend: str, case: LayerCase) -> None:
    theirs = replace(case, batch_first=False).build(torch.nn)
    name = {"RNN_TANH": "rnn", "RNN_RELU": "rnn_relu"}.get(case.mode, case.mode.lower())
    if not case.bias:  # a core's cells have biases
        theirs = replace(case, batch_first=False, bias=True).build(torch.nn)
    core = Core(name, case.inputs, case.hidden, case.layers, bidirectional=case.bidirectional, backend=backend).double()
    for k, layer in enumerate(core.layers):
        for suffix, cell in zip(("", "_reverse"), layer, strict=False):  # type: ignore[call-overload]
            cell.load_state_dict({n: getattr(theirs, f"{n}_l{k}{suffix}") for n, _ in cell.named_parameters()})
    run = core(case.sequence())
    expected, final = theirs(case.sequence())
    agree({"outputs": run.outputs}, {"outputs": expected}, ROUNDING)
    h = torch.stack([state.h for state in run.state.cells])
    agree({"h": h}, {"h": final[0] if case.mode == "LSTM" else final}, ROUNDING)


@every_backend
@every_layer
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_drop_ins_reset_runs_each_document_by_itself(kind: str, backend: str, batch_first: bool) -> None:
    """In the layout of the input; both directions and layers; one row's documents against a batch of documents."""
    torch.manual_seed(0)
    layer = getattr(unrolled.nn, kind)(
        2, 3, 2, batch_first=batch_first, bidirectional=True, dtype=torch.float64, backend=backend
    )
    x = random(0, "x", 2, 6, 2)  # [B T I]
    starts = torch.tensor([[1, 0, 0, 1, 0, 0], [0, 0, 1, 1, 0, 0]], dtype=torch.bool)
    parts = [[(0, 3), (3, 6)], [(0, 2), (2, 3), (3, 6)]]
    out, _ = layer(x, reset=starts) if batch_first else layer(x.transpose(0, 1), reset=starts.T)
    out = out if batch_first else out.transpose(0, 1)
    for b, row in enumerate(parts):
        expected = torch.cat([layer(x[b, begin:end])[0] for begin, end in row])
        agree({"output": out[b]}, {"output": expected}, ROUNDING)
    single, _ = layer(x[1], reset=starts[1])
    agree({"output": single}, {"output": out[1]}, ROUNDING)


@every_cell
@pytest.mark.parametrize("rows", [torch.tensor([1, 1, 0]), torch.tensor([False, True])])
def test_select_takes_rows_of_every_state(name: str, rows: Tensor) -> None:
    stack = Stack(name, 2, True, 0, 2, None, None, 0)
    state = stack.state()
    chosen = state.select(rows)
    assert type(chosen) is CoreState
    assert [type(cell) for cell in chosen.cells] == [type(cell) for cell in state.cells]
    agree(named("", chosen), {key: t[rows] for key, t in named("", state).items()}, 0)


@every_backend
@every_cell
def test_selected_rows_go_on_as_they_would_have(name: str, backend: str) -> None:
    """Beams and slots: stepping the chosen rows is choosing the stepped rows, to rounding."""
    stack = Stack(name, 2, False, 2, 3, None, None, 0)
    core, state, rows = stack.build(backend), stack.state(), torch.tensor([2, 0, 0])
    x = stack.sequence()[0]
    chosen = core.step(x[rows], state.select(rows))
    y, after = core.step(x, state)
    agree(named("", chosen), named("", (y[rows], after.select(rows))), ROUNDING)


def test_the_initial_state_has_one_state_per_cell() -> None:
    core = Core("lstm", 3, 4, 2, bidirectional=True)
    state = core.initial_state(5)
    assert [type(cell) for cell in state.cells] == [LSTMState] * 4
    assert {t.shape for t in named("", state).values()} == {(5, 4)}
    assert not any(t.any() for t in named("", state).values())
    assert core.output_size == 8
    assert Core("gru", 3, 4).output_size == 4


@every_backend
@every_cell
@pytest.mark.parametrize("embedded", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_a_core_looks_up(name: str, backend: str, embedded: bool, bidirectional: bool) -> None:
    stack = Stack(name, 2, bidirectional, 4, 3, (4, 0, 2), None, 0)
    core, ids = stack.build(backend), torch.tensor([[0, 1, 2], [2, -1, 1], [1, -1, 99], [0, -1, -1]])
    real = torch.arange(4)[:, None] < torch.tensor(stack.lengths)
    own = ids.where(real, torch.tensor(0))
    dense = torch.nn.functional.one_hot(own, 3).double()
    table = random(0, "table", 3, 3) if embedded else None
    found = core(Lookup(ids, table), stack.state(), lengths=stack.lengths)
    expected = core(dense if table is None else dense @ table, stack.state(), lengths=stack.lengths)
    agree(
        {"y": found.outputs, **named("state", found.state)},
        {"y": expected.outputs, **named("state", expected.state)},
        ROUNDING,
    )
    if not bidirectional:
        one = core.step(Lookup(own[0], table), stack.state())
        two = core.step(dense[0] if table is None else dense[0] @ table, stack.state())
        agree(named("", one), named("", two), ROUNDING)


@pytest.mark.parametrize(
    "options, check",
    [
        ({"forget_bias": 1.0}, lambda cell: torch.equal((cell.bias_ih + cell.bias_hh)[4:8], torch.ones(4))),
        (
            {"chrono": 10},
            lambda cell: torch.equal(cell.bias_ih[4:8], -cell.bias_ih[:4]) and bool((cell.bias_ih[4:8] > 0).all()),
        ),
        (
            {"init": "orthogonal"},
            # Orthogonal to float32's rounding of 4 x 4 products.
            lambda cell: torch.allclose(cell.weight_hh[:4] @ cell.weight_hh[:4].T, torch.eye(4), atol=1e-6),
        ),
    ],
)
def test_initialisation_reaches_every_cell(options: dict[str, Any], check: Any) -> None:
    torch.manual_seed(0)
    core = Core("lstm", 3, 4, 2, bidirectional=True, **options)
    found = [cell for layer in core.layers for cell in layer]  # type: ignore[attr-defined]
    assert [cell.input_size for cell in found] == [3, 3, 8, 8]
    for cell in found:
        assert check(cell)


# ----------------------------------------------------------------------- Core: a cell of the user's own


class Minimal(Cell):
    """The least that a cell of one's own needs to be; its state is its own too."""

    class Level(NamedTuple):
        level: Tensor

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.read = torch.nn.Linear(input_size, hidden_size)

    def initial_state(self, batch: int) -> Any:
        return self.Level(self.read.weight.new_ones(batch, self.hidden_size))

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        level = 0.5 * state.level + self.read(x).tanh()
        return level.square(), self.Level(level)


@pytest.fixture
def minimal(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cells, "_CELLS", dict(cells._CELLS))
    register("minimal")(Minimal)
    return "minimal"


@pytest.mark.parametrize("bidirectional", [True, False])
def test_a_core_of_a_users_cell(minimal: str, bidirectional: bool) -> None:
    """Its documents start from its own initial state, not from zeros; `select` and stepping work as for the others."""
    core = Core(minimal, 3, 4, 2, bidirectional=bidirectional).double()
    x, starts = random(0, "x", 5, 2, 3), torch.tensor([[0, 1], [0, 0], [1, 0], [0, 0], [0, 0]], dtype=torch.bool)
    run = core(x, reset=starts)
    cut = torch.cat([core(x[:2, :1]).outputs, core(x[2:, :1]).outputs])
    agree({"y": run.outputs[:, :1]}, {"y": cut}, ROUNDING)
    agree({"y": run.outputs[:, 1:]}, {"y": core(x[:, 1:]).outputs}, ROUNDING)
    agree(named("", core.initial_state(2).select(torch.tensor([1]))), named("", core.initial_state(1)), 0)
    if not bidirectional:
        state = core.initial_state(2)
        plain = core(x)
        for t in range(5):
            y, state = core.step(x[t], state)
            agree({"y": y}, {"y": plain.outputs[t]}, ROUNDING)


def test_a_core_of_a_users_cell_takes_vectors_only(minimal: str) -> None:
    core, ids = Core(minimal, 3, 4), torch.tensor([[0, 1], [2, 2]])
    table = random(0, "table", 5, 3, dtype=torch.float32)
    assert torch.equal(core(Lookup(ids, table)).outputs, core(table[ids]).outputs)
    y, _ = core.step(Lookup(ids[0], table), core.initial_state(2))
    assert torch.equal(y, core.step(table[ids[0]], core.initial_state(2))[0])
    for call in (
        lambda: core(Lookup(ids, None)),
        lambda: core.step(Lookup(ids[0], None), core.initial_state(2)),
    ):
        with refused(ModelError, "this cell takes vectors, but the input is one-hot, ..."):
            call()


@pytest.mark.parametrize(
    "options", [{"init": "orthogonal"}, {"forget_bias": 1.0}, {"chrono": 5}, {"recurrent_dropout": 0.5}]
)
def test_a_users_cell_sets_its_own_weights(minimal: str, options: dict[str, Any]) -> None:
    with refused(
        ConfigError,
        "init, forget_bias, chrono and recurrent_dropout are for the built-in cells; 'minimal' sets its own",
    ):
        Core(minimal, 3, 4, **options)


# ------------------------------------------------------------------------------------ Core: refusals


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (("gru", 3, 4, 0), {}, "core.layers: expected at least 1, got 0"),
        (("gruu", 3, 4), {}, "core.cell: unknown cell 'gruu': did you mean 'gru'? ..."),
        (("gru", 0, 4), {}, "GRU: input and hidden size must be at least 1, got 0 and 4"),
        (("gru", 3, 0), {}, "GRU: input and hidden size must be at least 1, got 3 and 0"),
        (("gru", 3, 4), {"dropout": 1.0}, "core.dropout: expected 0 <= p < 1, got 1.0"),
        (("gru", 3, 4), {"dropout": -0.1}, "core.dropout: expected 0 <= p < 1, got -0.1"),
        (("gru", 3, 4), {"recurrent_dropout": 1.5}, "core.recurrent_dropout: expected 0 <= p < 1, got 1.5"),
        (("gru", 3, 4), {"init": "ortho"}, "unknown init 'ortho': did you mean 'orthogonal'?"),
        (("gru", 3, 4), {"forget_bias": 1.0}, "forget_bias: a gru cell has no forget gate; it is for lstm"),
    ],
)
def test_a_core_is_refused(arguments: Any, options: dict[str, Any], message: str) -> None:
    with refused(ConfigError, message):
        Core(*arguments, **options)


@pytest.mark.parametrize(
    "inputs, options, message",
    [
        (torch.zeros(4), {}, "inputs: expected [T, B, I], got [4]"),
        (torch.zeros(4, 3), {}, "inputs: expected [T, B, I], got [4, 3]"),
        (torch.zeros(4, 2, 2), {}, "inputs: expected [T, B, I=3], got [4, 2, 2]"),
        (Lookup(torch.zeros(4, dtype=torch.int64), None), {}, "ids: expected [T, B], got [4]"),
        (torch.zeros(4, 2, 3), {"lengths": [5, 1]}, "lengths: expected 0..4 (the number of steps), got 1..5"),
        (torch.zeros(4, 2, 3), {"reset": torch.zeros(4, 2)}, "reset: expected bool, got float32"),
        (torch.zeros(4, 2, 3), {"reset": torch.zeros(4, 3) > 0}, "reset: expected [T=4, B=2], got [4, 3]"),
        (
            torch.zeros(4, 2, 3),
            {"state": CoreState((HiddenState(torch.zeros(2, 4)),))},
            "state: expected the states of 4 cells (layers x directions), got 1",
        ),
        (
            torch.zeros(4, 2, 3),
            {"state": CoreState((HiddenState(torch.zeros(3, 4)),) * 4)},
            "state.h: expected [B=2, H=4], got [3, 4]",
        ),
    ],
)
def test_a_core_refuses(inputs: Any, options: dict[str, Any], message: str) -> None:
    with refused(ShapeError, message):
        Core("gru", 3, 4, 2, bidirectional=True)(inputs, **options)


def test_a_core_of_both_directions_cannot_be_stepped() -> None:
    core = Core("gru", 3, 4, bidirectional=True)
    with refused(ModelError, "a bidirectional core needs the whole sequence and cannot be stepped"):
        core.step(torch.zeros(2, 3), core.initial_state(2))


def test_a_core_refuses_to_step_from_another_cores_state() -> None:
    with refused(ShapeError, "state: expected the states of 1 cells (layers x directions), got 2"):
        Core("gru", 3, 4).step(torch.zeros(2, 3), Core("gru", 3, 4, 2).initial_state(2))
