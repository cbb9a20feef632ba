"""A cell over time: laws 1 (stepping), 2 (padding), 3 (reverse), 5 (windows), for built-in cells and a user's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, pairwise
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from strategies import (
    BACKENDS,
    CELLS,
    ROUNDING,
    Case,
    agree,
    cases,
    corner_cases,
    gradients,
    leaf,
    named,
    nested,
    random,
    refused,
    results_of,
    run_case,
)
from torch import Tensor

from unrolled.cells import (
    GRU,
    LSTM,
    RNN,
    Equation,
    GatedCell,
    HiddenState,
    Lookup,
    LSTMState,
    map_state,
)
from unrolled.errors import ConfigError, ModelError, ShapeError
from unrolled.unroll import Unrolled, unroll

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_corner = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in corner_cases()])


# --------------------------------------------------------------------------------- a cell of the user's own


class Memory(NamedTuple):
    """A state that no built-in cell has: a state in it, three dimensions, whole numbers, nothing called h."""

    inner: HiddenState
    recent: Tensor  # [B 2 H]: the last two inputs
    clock: Tensor  # int64 [B]


class Leaky:
    """A plain object with the two methods of a cell. Only element by element: the same bits in any batch."""

    def __init__(self, size: int) -> None:
        self.rate = random(5, "rate", size).sigmoid().requires_grad_()

    def initial_state(self, batch: int) -> Memory:
        """Not zeros: what a reset must bring back."""
        size = len(self.rate)
        return Memory(
            HiddenState(self.rate.expand(batch, size)),
            torch.ones(batch, 2, size, dtype=torch.float64),
            torch.full((batch,), 3),
        )

    def step(self, x: Tensor, state: Memory) -> tuple[Tensor, Memory]:
        level = state.inner.h * self.rate + x * (1 - self.rate)
        y = level.tanh() + state.recent.sum(1) / state.clock[:, None]
        return y, Memory(HiddenState(level), torch.stack([x, state.recent[:, 0]], dim=1), state.clock + 1)


def memory(case: Case) -> Memory:
    """A state to start from, unlike the initial one."""
    shape = (case.batch, case.hidden)
    recent = random(case.seed, "recent", case.batch, 2, case.hidden)
    return Memory(HiddenState(random(case.seed, "h0", *shape)), recent, torch.arange(case.batch) + 1)


def rows_of(state: Any, rows: slice) -> Any:
    return map_state(lambda t: t[rows], state)


def joined(states: Sequence[Any]) -> Any:
    """States of one row each as one state."""
    return map_state(lambda *parts: torch.cat(parts), *states)


def stepped(cell: Any, inputs: Tensor, state: Any, case: Case) -> Unrolled:
    """`unroll` with nothing but `cell.step`: every row by itself, over its own steps in the order of reading."""
    steps, batch = inputs.shape[:2]
    reset = case.resets()
    outputs = torch.zeros(steps, batch, case.hidden, dtype=inputs.dtype)
    final: list[Any] = []
    states: list[list[Any]] = [[None] * batch for _ in range(steps)]
    for b in range(batch):
        row = slice(b, b + 1)
        first = now = rows_of(state, row)
        own = range(steps if case.lengths is None else case.lengths[b])
        for t in reversed(own) if case.reverse else own:
            if reset is not None and reset[t, b]:
                now = cell.initial_state(1)
            y, now = cell.step(inputs[t, row], now)
            outputs[t, b] = y[0]
            states[t][b] = now
        final.append(now)
        for t in set(range(steps)) - set(own):
            states[t][b] = first if case.reverse else now
    at_steps = map_state(lambda *t: torch.stack(t), *(joined(states[t]) for t in range(steps)))
    return Unrolled(outputs, joined(final), at_steps)


def results_with_gradients(
    cell: Any, run: Unrolled, x: Tensor, state: Any, weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    results = results_of(run)
    floating = {name: t for name, t in named("initial", state).items() if t.is_floating_point()}
    differentiable = {name: t for name, t in results.items() if t.is_floating_point()}
    return {**results, **gradients(differentiable, {"inputs": x, **floating, **weights})}


def leaves(state: Any) -> Any:
    return map_state(lambda t: leaf(t) if t.is_floating_point() else t, state)


# ------------------------------------------------------------------------------------- against the oracle


def agrees_with_the_oracle(case: Case, backend: str) -> None:
    run = unroll(case.build(), case.sequence(), case.state(), **case.options(), all_states=True, backend=backend)
    expected, shape = case.oracle(), (case.steps, case.batch, case.hidden)
    fields = case.state()._fields
    agree(
        results_of(run),
        {
            "outputs": nested(expected.outputs, *shape),
            **{f"state.{f}": nested(expected.state[k], *shape[1:]) for k, f in enumerate(fields)},
            **{f"states.{f}": nested(expected.states[k], *shape) for k, f in enumerate(fields)},
        },
        ROUNDING,
    )


@every_backend
@given(case=cases())
@settings(max_examples=80)
def test_values_are_the_oracles(backend: str, case: Case) -> None:
    agrees_with_the_oracle(case, backend)


@every_backend
@every_corner
def test_values_are_the_oracles_in_the_corners(backend: str, case: Case) -> None:
    agrees_with_the_oracle(case, backend)


@every_backend
@pytest.mark.parametrize("name", sorted(CELLS))
@pytest.mark.parametrize(
    "options",
    [
        {"steps": 2, "batch": 1, "inputs": 2, "hidden": 2},
        {
            "steps": 3,
            "batch": 2,
            "inputs": 1,
            "hidden": 2,
            "reverse": True,
            "lengths": (2, 3),
            "reset": ((False, False), (False, True), (True, False)),
        },
    ],
    ids=["plain", "ragged, marked, reverse"],
)
def test_gradients_are_the_oracles_central_differences(name: str, options: dict[str, Any], backend: str) -> None:
    """No derivative is written down anywhere in this test."""
    case = Case(cell=name, seed=3, **options)
    cell, x, state = case.build(), leaf(case.sequence()), leaves(case.state())
    run = unroll(cell, x, state, **case.options(), all_states=True, backend=backend)
    results = results_of(run)
    wrt = {"inputs": x, **named("initial", state), **dict(cell.named_parameters())}
    found = gradients(results, wrt, case.seed)
    cotangents = [random(case.seed, f"weight of {key}", *t.shape).flatten().tolist() for key, t in results.items()]
    shapes = [t.shape for t in wrt.values()]
    reset = case.resets()

    def loss(numbers: list[float]) -> float:
        parts = torch.tensor(numbers, dtype=torch.float64).split([s.numel() for s in shapes])
        lists = [part.reshape(s).tolist() for part, s in zip(parts, shapes, strict=True)]
        fields = len(case.state())
        run = oracle.run(
            name,
            oracle.Weights(*lists[1 + fields :]),
            lists[0],
            lists[1 : 1 + fields],
            lengths=case.lengths,
            reverse=case.reverse,
            reset=None if reset is None else reset.tolist(),
        )
        flat = [nested(value, -1).tolist() for value in (run.outputs, *run.state, *run.states)]
        pairs = zip(chain.from_iterable(flat), chain.from_iterable(cotangents), strict=True)
        return math.fsum(a * b for a, b in pairs)

    point = torch.cat([t.detach().flatten() for t in wrt.values()]).tolist()
    expected = torch.tensor(oracle.central_differences(loss, point), dtype=torch.float64)
    flat = torch.cat([t.flatten() for t in found.values()])
    # The differences' own error, see central_differences: about 1e-16 x 10 / 1e-6; a wrong term is above 1e-3.
    agree({"gradient": flat}, {"gradient": expected}, 1e-7)


# ------------------------------------------------------------------------------------- law 1: stepping


@every_backend
@given(case=cases(least_steps=1, least_batch=1))
@settings(max_examples=40)
def test_unroll_is_the_built_in_cell_stepped(backend: str, case: Case) -> None:
    """To rounding: unroll projects all steps in one product, of another order of summation than a single row's."""
    found = []
    for way in ("unroll", "steps"):
        cell, x, state = case.build(), leaf(case.sequence()), leaves(case.state())
        if way == "unroll":
            run = unroll(cell, x, state, **case.options(), all_states=True, backend=backend)
        else:
            run = stepped(cell, x, state, case)
        found.append(results_with_gradients(cell, run, x, state, dict(cell.named_parameters())))
    agree(*found, ROUNDING)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@given(case=cases(cell="rnn", least_steps=1, least_batch=1))
@settings(max_examples=40)
def test_unroll_is_a_users_cell_stepped(backend: str, case: Case) -> None:
    """Values bit for bit: the same operations run. Gradients to rounding: a batch's are added in another order."""
    case = replace(case, inputs=case.hidden)
    found = []
    for way in ("unroll", "steps"):
        cell, x, state = Leaky(case.hidden), leaf(case.sequence()), leaves(memory(case))
        if way == "unroll":
            run = unroll(cell, x, state, **case.options(), all_states=True, backend=backend)
            assert type(run.state) is type(run.states) is Memory
        else:
            run = stepped(cell, x, state, case)
        found.append(results_with_gradients(cell, run, x, state, {"rate": cell.rate}))
    values = [name for name in found[0] if not name.startswith("d ")]
    agree(*found, 0, values)
    agree(*found, ROUNDING)


@every_backend
@pytest.mark.parametrize("name", sorted(CELLS))
def test_without_a_state_it_starts_from_the_cells_own(name: str, backend: str) -> None:
    case = Case(name, steps=3, batch=2, inputs=4, hidden=5)
    cell, x = case.build(), case.sequence()
    given_ = unroll(cell, x, cell.initial_state(2), backend=backend)
    agree(results_of(unroll(cell, x, backend=backend)), results_of(given_), 0)
    own = Leaky(4)
    agree(results_of(unroll(own, x)), results_of(unroll(own, x, own.initial_state(2))), 0)


class DoubledLSTM(LSTM):
    """A built-in cell's subclass with a step of its own."""

    def step(self, x: Any, state: Any) -> tuple[Tensor, Any]:
        y, after = super().step(x, state)
        return 2 * y, after


class EagerGRU(GRU):
    """A built-in cell's subclass that starts, and starts again, from ones."""

    def initial_state(self, batch: int) -> Any:
        return HiddenState(torch.ones(batch, self.hidden_size, dtype=torch.float64))


class Sine(GatedCell):
    """An equation of the user's own, called as none of the built-in ones are."""

    equation = Equation(
        "sine", 1, HiddenState, lambda x, s, w, b: HiddenState((x + torch.nn.functional.linear(s.h, w, b)).sin())
    )


MARKS = ((True, False, False), (False, True, False), (False, False, False), (False, True, True))


@pytest.mark.parametrize("kind", [DoubledLSTM, EagerGRU, Sine])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_subclass_of_a_built_in_cell_keeps_what_is_its_own(kind: Any, backend: str) -> None:
    case = Case(
        "lstm", steps=4, batch=3, inputs=2, hidden=3, reset=((True, False, False),) + ((False, True, False),) * 3
    )
    cell = kind(2, 3).double()
    run = unroll(cell, case.sequence(), **case.options(), all_states=True, backend=backend)
    expected = stepped(cell, case.sequence(), cell.initial_state(3), case)
    agree(results_of(run), results_of(expected), ROUNDING)
    with refused(ModelError, "backend 'tape' ..."):
        unroll(cell, case.sequence(), backend="tape")


# -------------------------------------------------------------------------------------- law 2: padding


def with_padding(case: Case, fill: float | Tensor) -> Tensor:
    return torch.where(case.valid()[..., None], case.sequence(), fill)


@every_backend
@given(case=cases(lengths=True), fill=st.sampled_from([math.nan, math.inf, -math.inf, 1e308]))
@settings(max_examples=60)
def test_what_padding_holds_changes_nothing(backend: str, case: Case, fill: float) -> None:
    """Bit for bit, values and gradients; marks in the padding included. Padding itself gets no gradient."""
    plain = run_case(case, backend, inputs=with_padding(case, 0))
    marked = case
    if case.reset is not None:
        rows = zip(case.reset, case.valid().tolist(), strict=True)
        flipped = tuple(tuple(m == v for m, v in zip(*row, strict=True)) for row in rows)  # real ones stay, others flip
        marked = replace(case, reset=flipped)
        assert torch.equal((marked.resets() ^ case.resets()) & case.valid(), torch.zeros_like(case.valid()))  # type: ignore[operator]
    spoilt = run_case(marked, backend, inputs=with_padding(case, fill))
    agree(spoilt, plain, 0)
    assert torch.equal(spoilt["d inputs"][~case.valid()], torch.zeros_like(spoilt["d inputs"][~case.valid()]))


@given(case=cases(cell="rnn", least_steps=1, least_batch=1, lengths=True))
@settings(max_examples=30)
def test_what_padding_holds_changes_nothing_for_a_users_cell(case: Case) -> None:
    case = replace(case, inputs=case.hidden)
    found = []
    for fill in (0, math.nan):
        cell, x, state = Leaky(case.hidden), leaf(with_padding(case, fill)), leaves(memory(case))
        run = unroll(cell, x, state, **case.options(), all_states=True)
        found.append(results_with_gradients(cell, run, x, state, {"rate": cell.rate}))
    agree(*found, 0)


@every_backend
@pytest.mark.parametrize("embedded", [True, False])
@pytest.mark.parametrize("fill", [0, -1, 10**9])
def test_ids_in_padding_are_never_looked_up(backend: str, embedded: bool, fill: int) -> None:
    case = Case("gru", steps=3, batch=3, inputs=4, hidden=2, lengths=(3, 1, 0))
    cell, table = case.build(), random(0, "table", 5, 4) if embedded else None
    ids = torch.randint(1, 4, (3, 3), generator=torch.Generator().manual_seed(0))
    expected = unroll(cell, Lookup(ids, table), lengths=case.lengths, backend=backend)
    spoilt = Lookup(ids.where(case.valid(), torch.tensor(fill)), table)
    agree(results_of(unroll(cell, spoilt, lengths=case.lengths, backend=backend)), results_of(expected), 0)


@every_backend
@given(case=cases(lengths=True))
@settings(max_examples=40)
def test_outputs_in_padding_are_zero_and_states_are_held(backend: str, case: Case) -> None:
    run = unroll(case.build(), case.sequence(), case.state(), **case.options(), all_states=True, backend=backend)
    padding = ~case.valid()
    assert torch.equal(run.outputs[padding], torch.zeros_like(run.outputs[padding]))
    held = case.state() if case.reverse else run.state
    for field, before in zip(run.states, held, strict=True):
        assert torch.equal(field[padding], before.expand_as(field)[padding])
    empty = torch.tensor([length == 0 for length in case.lengths or ()], dtype=torch.bool)
    for after, before in zip(run.state, case.state(), strict=True):
        assert torch.equal(after[empty], before[empty])


@every_backend
@given(case=cases(least_batch=2, lengths=True), data=st.data())
@settings(max_examples=40)
def test_a_row_alone_is_the_row_in_its_batch(backend: str, case: Case, data: st.DataObject) -> None:
    """Without its padding too. To rounding: products of other sizes add in another order."""
    b = data.draw(st.integers(0, case.batch - 1))
    length = (case.lengths or ())[b]
    found = []
    for alone in (False, True):
        cell = case.build()
        x, state = leaf(case.sequence()), leaves(case.state())
        if alone:
            rows = slice(b, b + 1)
            reset = case.resets()
            run = unroll(
                cell,
                x[:length, rows],
                rows_of(state, rows),
                reverse=case.reverse,
                reset=None if reset is None else reset[:length, rows],
                all_states=True,
                backend=backend,
            )
            row = Unrolled(
                run.outputs[:, 0], map_state(lambda t: t[0], run.state), map_state(lambda t: t[:, 0], run.states)
            )
        else:
            run = unroll(cell, x, state, **case.options(), all_states=True, backend=backend)
            row = Unrolled(
                run.outputs[:length, b],
                map_state(lambda t: t[b], run.state),
                map_state(lambda t: t[:length, b], run.states),
            )
        results = results_of(row)
        wrt = {"inputs": x, **named("initial", state), **dict(cell.named_parameters())}
        found.append({**results, **gradients(results, wrt, case.seed)})
    agree(*found, ROUNDING)


@every_backend
@given(case=cases(lengths=True), more=st.integers(1, 3))
@settings(max_examples=30)
def test_more_padding_changes_nothing(backend: str, case: Case, more: int) -> None:
    longer = replace(
        case,
        steps=case.steps + more,
        reset=None if case.reset is None else (*case.reset, *((True,) * case.batch,) * more),
    )
    padded = torch.cat([case.sequence(), torch.full((more, case.batch, case.inputs), math.nan, dtype=torch.float64)])
    # The loss is made of the final state, whose shape does not grow.
    final = [f"state.{field}" for field in case.state()._fields]
    short = run_case(case, backend, only=final)
    long = run_case(longer, backend, inputs=padded, only=final)
    for name in ("outputs", "d inputs"):
        long[name] = long[name][: case.steps]
    agree(long, short, ROUNDING, [name for name in short if not name.startswith("states.")])


# -------------------------------------------------------------------------------------- law 3: reverse


def flip_own(values: Tensor, lengths: Sequence[int] | None) -> Tensor:
    """Every row's own steps in reverse, its padding where it was. values `[T B ...]`."""
    flipped = values.clone()
    for b in range(values.shape[1]):
        own = slice(0, len(values) if lengths is None else lengths[b])
        flipped[own, b] = values[own, b].flip(0)
    return flipped


@every_backend
@given(case=cases(reverse=True))
@settings(max_examples=60)
@example(
    Case("lstm", 4, 3, 2, 3, reverse=True, lengths=(4, 2, 0), reset=((True, False, False), (False, True, True)) * 2)
)
def test_reverse_is_flipping_unrolling_and_flipping_back(backend: str, case: Case) -> None:
    found = []
    for reverse in (True, False):
        cell, x, state, reset = case.build(), leaf(case.sequence()), leaves(case.state()), case.resets()
        if reverse:
            run = unroll(cell, x, state, **case.options(), all_states=True, backend=backend)
        else:
            run = unroll(
                cell,
                flip_own(x, case.lengths),
                state,
                lengths=case.lengths,
                reset=None if reset is None else flip_own(reset, case.lengths),
                all_states=True,
                backend=backend,
            )
            back = flip_own(run.outputs, case.lengths)
            run = Unrolled(back, run.state, map_state(lambda t: flip_own(t, case.lengths), run.states))
        # States in padding are held, so they differ by direction: before the first step, or after the last.
        own = case.valid()[..., None]
        run = Unrolled(run.outputs, run.state, map_state(lambda t: t * own, run.states))  # noqa: B023
        found.append(results_with_gradients(cell, run, x, state, dict(cell.named_parameters())))
    agree(*found, ROUNDING)


# ------------------------------------------------------------------------------ law 5: truncated BPTT


def in_pieces(cell: Any, inputs: Any, state: Any, *, window: int, **options: Any) -> Unrolled:
    """What `window` must do, by hand: one unroll for each piece, the state detached in between."""
    steps, batch = inputs.shape[:2]
    lengths, reset, reverse = options.pop("lengths"), options.pop("reset"), options["reverse"]
    sizes = torch.tensor([steps] * batch if lengths is None else lengths, dtype=torch.int64)
    edges = [*range(0, steps, window), steps]
    spans = list(pairwise(edges))
    if reverse:
        spans = [(steps - b, steps - a) for a, b in spans]
    pieces: dict[int, Unrolled] = {}
    for count, (a, b) in enumerate(spans):
        if count:
            state = map_state(Tensor.detach, state)
        pieces[a] = unroll(
            cell,
            inputs[a:b],
            state,
            lengths=(sizes - a).clamp(0, b - a),
            reset=None if reset is None else reset[a:b],
            **options,
        )
        state = pieces[a].state
    ordered = [pieces[a] for a in sorted(pieces)]
    states = map_state(lambda *t: torch.cat(t), *(piece.states for piece in ordered))
    return Unrolled(torch.cat([piece.outputs for piece in ordered]), state, states)


@every_backend
@given(case=cases(), beyond=st.integers(0, 3))
@settings(max_examples=30)
def test_a_window_over_all_steps_is_full_bptt(backend: str, case: Case, beyond: int) -> None:
    window = max(case.steps + beyond, 1)
    agree(run_case(case, backend, window=window), run_case(case, backend), 0)


@every_backend
@given(case=cases(least_steps=2), window=st.integers(1, 5))
@settings(max_examples=60)
def test_a_window_keeps_the_values_and_stops_the_gradient(backend: str, case: Case, window: int) -> None:
    """Values are those of no window, to rounding (products of other sizes); gradients those of detaching by hand."""
    assume(window < case.steps)
    truncated = run_case(case, backend, window=window)
    full = run_case(case, backend)
    agree(truncated, full, ROUNDING, [name for name in full if not name.startswith("d ")])
    agree(truncated, run_case(case, backend, runner=in_pieces, window=window), ROUNDING)


@every_backend
@pytest.mark.parametrize("reverse", [False, True])
def test_the_gradient_stops_at_the_windows_edge(backend: str, reverse: bool) -> None:
    """7 steps in windows of 3: the last one read is a window by itself, the one read before ends a window of 3."""
    case = Case("lstm", steps=7, batch=2, inputs=3, hidden=4, reverse=reverse)
    x, reading = leaf(case.sequence()), list(range(7))[:: -1 if reverse else 1]
    run = unroll(case.build(), x, window=3, reverse=reverse, backend=backend)
    for last, reached in ((reading[6], {reading[6]}), (reading[5], set(reading[3:6])), (reading[1], set(reading[:2]))):
        (grad,) = torch.autograd.grad(run.outputs[last].sum(), x, retain_graph=True)
        assert {t for t in range(7) if bool(grad[t].any())} == reached


@every_backend
@pytest.mark.parametrize("reverse", [False, True])
def test_a_window_on_lookups(backend: str, reverse: bool) -> None:
    case = Case("gru", steps=5, batch=2, inputs=3, hidden=4, lengths=(5, 2))
    cell, ids = case.build(), torch.tensor([[0, 1], [2, 0], [1, 1], [2, 2], [0, 0]])
    dense = torch.nn.functional.one_hot(ids, 3).double()
    options: dict[str, Any] = {"lengths": case.lengths, "reverse": reverse, "window": 2, "backend": backend}
    agree(results_of(unroll(cell, Lookup(ids, None), **options)), results_of(unroll(cell, dense, **options)), ROUNDING)


def test_a_window_on_a_users_cell() -> None:
    case = Case("rnn", steps=5, batch=3, inputs=2, hidden=2, lengths=(5, 0, 2))
    found = []
    for runner in (unroll, in_pieces):
        cell, x, state = Leaky(2), leaf(case.sequence()), leaves(memory(case))
        run = runner(cell, x, state, **case.options(), all_states=True, window=2)
        found.append(results_with_gradients(cell, run, x, state, {"rate": cell.rate}))
    agree(*found, 0)


# ------------------------------------------------------------------------------------- what is returned


@every_backend
@pytest.mark.parametrize("name", sorted(CELLS))
def test_all_states_are_returned_on_request_only(name: str, backend: str) -> None:
    case = Case(name, steps=3, batch=2, inputs=4, hidden=5)
    run = unroll(case.build(), case.sequence(), backend=backend)
    assert run.states is None
    asked = unroll(case.build(), case.sequence(), all_states=True, backend=backend)
    assert type(asked.states) is type(asked.state) is case.build().equation.state
    assert torch.equal(asked.states.h, run.outputs)
    agree(named("", map_state(lambda t: t[-1], asked.states)), named("", run.state), 0)


@every_backend
@pytest.mark.parametrize("name", sorted(CELLS))
@pytest.mark.parametrize("window", [None, 2])
def test_no_steps_return_the_state_given(name: str, backend: str, window: int | None) -> None:
    case = Case(name, steps=0, batch=2, inputs=4, hidden=5)
    cell, state = case.build(), leaves(case.state())
    run = unroll(cell, case.sequence(), state, window=window, all_states=True, backend=backend)
    assert run.outputs.shape == (0, 2, 5)
    assert run.outputs.dtype == torch.float64
    agree(named("", run.state), named("", state), 0)
    assert {t.shape for t in run.states} == {(0, 2, 5)}
    grads = gradients(named("state", run.state), named("initial", state))
    for key in named("initial", state):
        assert grads[f"d {key}"].any()


def test_no_steps_of_a_users_cell() -> None:
    case = Case("rnn", steps=0, batch=2, inputs=3, hidden=3)
    run = unroll(Leaky(3), case.sequence(), memory(case), all_states=True)
    assert run.outputs.shape == (0, 2, 3)
    assert run.states.recent.shape == (0, 2, 2, 3)
    assert run.states.clock.dtype == torch.int64
    agree(named("", run.state), named("", memory(case)), 0)


@every_backend
@given(case=cases(least_steps=1, least_batch=1))
@settings(max_examples=20)
def test_the_layout_of_the_inputs_does_not_matter(backend: str, case: Case) -> None:
    expected = run_case(case, backend)
    x = case.sequence()
    wide = torch.full((*x.shape[:2], 2 * case.inputs), math.nan, dtype=torch.float64)
    wide[..., ::2] = x
    for view in (x.transpose(0, 1).contiguous().transpose(0, 1), wide[..., ::2], x.flip(0).flip(0).mT.contiguous().mT):
        cell, inputs, state = case.build(), view.detach().requires_grad_(), leaves(case.state())
        run = unroll(cell, inputs, state, **case.options(), all_states=True, backend=backend)
        results = results_of(run)
        found = {
            **results,
            **gradients(
                results, {"inputs": inputs, **named("initial", state), **dict(cell.named_parameters())}, case.seed
            ),
        }
        agree(found, expected, ROUNDING)


@every_backend
def test_expanded_inputs_and_states(backend: str) -> None:
    case = Case("lstm", steps=4, batch=3, inputs=2, hidden=5)
    cell, x, state = case.build(), case.sequence()[:1, :1], map_state(lambda t: t[:1], case.state())
    run = unroll(cell, x.expand(4, 3, 2), map_state(lambda t: t.expand(3, 5), state), backend=backend)
    whole = unroll(cell, x.repeat(4, 3, 1), map_state(lambda t: t.repeat(3, 1), state), backend=backend)
    agree(results_of(run), results_of(whole), 0)


@every_backend
@given(case=cases(least_steps=1, least_batch=1))
@settings(max_examples=20)
def test_nothing_that_was_given_is_changed(backend: str, case: Case) -> None:
    cell, x, state, reset = case.build(), leaf(case.sequence()), leaves(case.state()), case.resets()
    run = unroll(cell, x, state, lengths=case.lengths, reset=reset, reverse=case.reverse, backend=backend)
    gradients(results_of(run), {"inputs": x, **named("initial", state)})
    assert torch.equal(x, case.sequence())
    agree(named("", state), named("", case.state()), 0)
    agree(dict(cell.named_parameters()), dict(case.build().named_parameters()), 0)
    assert reset is None or torch.equal(reset, case.resets())  # type: ignore[arg-type]


@every_backend
@pytest.mark.parametrize("lengths", [[2, 0, 3], (2, 0, 3), torch.tensor([2, 0, 3]), torch.tensor([2, 0, 3]).int()])
def test_lengths_may_be_a_sequence_or_a_tensor(backend: str, lengths: Any) -> None:
    case = Case("gru", steps=3, batch=3, inputs=2, hidden=2, lengths=(2, 0, 3))
    run = unroll(case.build(), case.sequence(), case.state(), lengths=lengths, all_states=True, backend=backend)
    agree(results_of(run), {k: v for k, v in run_case(case, backend).items() if not k.startswith("d ")}, 0)


@every_backend
def test_no_rows_have_no_lengths(backend: str) -> None:
    assert unroll(RNN(2, 3), torch.zeros(4, 0, 2), lengths=[], backend=backend).outputs.shape == (4, 0, 3)


# -------------------------------------------------------------------------------------------- refusals

X = torch.zeros(3, 2, 4)
IDS = torch.zeros(3, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    "error, message, inputs, options",
    [
        (ConfigError, "unknown backend 'tap': did you mean 'tape'?", X, {"backend": "tap"}),
        (ConfigError, "unknown backend 'zz': known: auto, native, reference, tape", X, {"backend": "zz"}),
        (ConfigError, "window: expected at least 1 step, got 0", X, {"window": 0}),
        (ConfigError, "window: expected at least 1 step, got -2", X, {"window": -2}),
        (ShapeError, "inputs: expected [T, B, I=4], got [3, 4]", X[:, 0], {}),
        (ShapeError, "inputs: expected [T, B, I=4], got [3, 2, 3]", X[..., :3], {}),
        (ShapeError, "inputs: expected float32, as the weights are, got float64", X.double(), {}),
        (ShapeError, "inputs: expected float32, as the weights are, got int64", X.long(), {}),
        (ShapeError, "ids: expected [T, B], got [3]", Lookup(IDS[:, 0], None), {}),
        (ShapeError, "ids: expected int64, got float32", Lookup(IDS.float(), None), {}),
        (ShapeError, "inputs: expected float32, as the weights are, got float64", Lookup(IDS, X[0].double()), {}),
        (ShapeError, "lengths: expected [B=2], got [3]", X, {"lengths": [1, 2, 3]}),
        (ShapeError, "lengths: expected [B=2], got [1, 2]", X, {"lengths": [[1, 2]]}),
        (ShapeError, "lengths: expected [B=2], got []", X, {"lengths": 3}),
        (ShapeError, "lengths: expected 0..3 (the number of steps), got 1..4", X, {"lengths": [1, 4]}),
        (ShapeError, "lengths: expected 0..3 (the number of steps), got -1..3", X, {"lengths": [3, -1]}),
        (ShapeError, "lengths: expected whole numbers, got float32", X, {"lengths": [1.0, 2.0]}),
        (ShapeError, "lengths: expected whole numbers, got bool", X, {"lengths": torch.tensor([True, True])}),
        (ShapeError, "reset: expected [T=3, B=2], got [2, 3]", X, {"reset": torch.zeros(2, 3, dtype=torch.bool)}),
        (ShapeError, "reset: expected [T=3, B=2], got [3]", X, {"reset": torch.zeros(3, dtype=torch.bool)}),
        (ShapeError, "reset: expected bool, got int64", X, {"reset": IDS}),
        (ShapeError, "state: expected LSTMState(h, c) for this cell, got HiddenState", X, {"state": HiddenState(X[0])}),
        (ShapeError, "state.h: expected [B=2, H=5], got [2, 4]", X, {"state": LSTMState(X[0], X[0])}),
        (
            ShapeError,
            "state.c: expected [B=2, H=5], got [1, 5]",
            X,
            {"state": LSTMState(torch.zeros(2, 5), torch.zeros(1, 5))},
        ),
        (
            ShapeError,
            "state.c: expected float32, as the weights are, got float64",
            X,
            {"state": LSTMState(torch.zeros(2, 5), torch.zeros(2, 5).double())},
        ),
    ],
)
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_unroll_refuses(error: Any, message: str, inputs: Any, options: dict[str, Any], backend: str) -> None:
    with refused(error, message):
        unroll(LSTM(4, 5), inputs, **{"backend": backend, **options})


def test_an_hidden_state_is_not_taken_from_an_lstm() -> None:
    with refused(ShapeError, "state: expected HiddenState(h) for this cell, got LSTMState"):
        unroll(GRU(4, 5), X, LSTM(4, 5).initial_state(2))


def test_a_users_cell_cannot_look_one_hot_inputs_up() -> None:
    with refused(ModelError, "this cell takes vectors, but the input is one-hot, ..."):
        unroll(Leaky(4), Lookup(IDS, None))


def test_a_users_cell_takes_looked_up_vectors() -> None:
    table = random(0, "table", 6, 4)
    ids = torch.tensor([[1, 5], [0, 0], [2, 4]])
    agree(results_of(unroll(Leaky(4), Lookup(ids, table))), results_of(unroll(Leaky(4), table[ids])), 0)


def test_the_tape_runs_no_users_cell() -> None:
    with refused(ModelError, "backend 'tape' runs the built-in cells; Leaky needs 'reference'"):
        unroll(Leaky(4), X, backend="tape")


def test_a_users_cell_with_an_input_size_has_it_checked() -> None:
    cell = Leaky(3)
    cell.input_size = 3  # type: ignore[attr-defined]
    with refused(ShapeError, "inputs: expected [T, B, I=3], got [3, 2, 4]"):
        unroll(cell, X)
