"""The tape against the reference (law 6): values and every gradient, in float64, float32 and under autocast."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    BACKENDS,
    CELLS,
    FAST_BACKENDS,
    ROUNDING,
    Case,
    agree,
    cases,
    corner_cases,
    gradients,
    leaf,
    named,
    refused,
    results_of,
    run_case,
)
from torch import Tensor

from unrolled import budget, tape
from unrolled.cells import GRU, LSTM, Equation, GatedCell, HiddenState, Lookup, map_state
from unrolled.errors import ModelError
from unrolled.unroll import unroll

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_fast_backend = pytest.mark.parametrize("backend", FAST_BACKENDS)
every_cell = pytest.mark.parametrize("name", sorted(CELLS))

RESULTS = ("outputs", "state.h", "state.c", "states.h", "states.c")


# ------------------------------------------------------------------------------------------- float64


@every_fast_backend
@given(case=cases())
@settings(max_examples=120)
def test_values_and_gradients_are_the_references(backend: str, case: Case) -> None:
    agree(run_case(case, backend), run_case(case, "reference"), ROUNDING)


@every_fast_backend
@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in corner_cases()])
def test_values_and_gradients_are_the_references_in_the_corners(backend: str, case: Case) -> None:
    agree(run_case(case, backend), run_case(case, "reference"), ROUNDING)


@every_fast_backend
@given(case=cases(least_steps=2), size=st.integers(1, 3))
@settings(max_examples=120)
def test_values_and_gradients_are_the_references_in_short_blocks(backend: str, case: Case, size: int) -> None:
    """As long sequences have them; the last block computed is often shorter."""
    with patch.object(budget, "block_steps", lambda steps, batch: size):
        found = run_case(case, backend)
    agree(found, run_case(case, "reference"), ROUNDING)


@every_fast_backend
@given(case=cases(least_steps=1, least_batch=1), only=st.sets(st.sampled_from(RESULTS), min_size=1))
@settings(max_examples=80)
def test_a_gradient_may_come_from_any_results(backend: str, case: Case, only: set[str]) -> None:
    """From the outputs, the final state or all states alone; the others' gradients are then absent, not zero."""
    agree(run_case(case, backend, only=only), run_case(case, "reference", only=only), ROUNDING)


@every_fast_backend
@every_cell
@pytest.mark.parametrize("only", RESULTS)
def test_a_gradient_from_one_result_alone(backend: str, name: str, only: str) -> None:
    if only.endswith(".c") and name != "lstm":
        only = "states.h"  # it has no c
    case = Case(name, steps=4, batch=3, inputs=2, hidden=3, lengths=(4, 1, 0), seed=1)
    found, expected = (run_case(case, b, only=[only]) for b in (backend, "reference"))
    agree(found, expected, ROUNDING)
    assert found["d initial.h"].any()
    assert found["d weight_hh"].any()


@every_fast_backend
@every_cell
@pytest.mark.parametrize("wanted", ["inputs", "initial", "weight_hh", "weight_ih", "bias_hh"])
def test_a_gradient_may_be_asked_of_one_leaf_alone(backend: str, name: str, wanted: str) -> None:
    """Frozen weights, or nothing but a frozen cell's input."""
    case = Case(name, steps=3, batch=2, inputs=2, hidden=3, lengths=(3, 2), seed=2)
    found = []
    for which in (backend, "reference"):
        cell, x, state = case.build().requires_grad_(False), case.sequence(), case.state()
        if wanted == "inputs":
            x = leaf(x)
        elif wanted == "initial":
            state = map_state(leaf, state)
        else:
            getattr(cell, wanted).requires_grad_()
        every = {"inputs": x, **named("initial", state), **dict(cell.named_parameters())}
        wrt = {key: t for key, t in every.items() if t.requires_grad}
        found.append(gradients(results_of(unroll(cell, x, state, lengths=case.lengths, backend=which)), wrt))
        assert found[-1]
    agree(*found, ROUNDING)


@every_backend
@given(case=cases(least_steps=1))
@settings(max_examples=30)
def test_values_are_the_same_bits_without_a_gradient(backend: str, case: Case) -> None:
    """What is not recorded takes another way through the tape."""
    expected = {name: t for name, t in run_case(case, backend).items() if not name.startswith("d ")}
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            run = unroll(
                case.build(), case.sequence(), case.state(), **case.options(), all_states=True, backend=backend
            )
        agree(results_of(run), expected, 0)
        assert not run.outputs.requires_grad


@every_backend
@every_cell
def test_a_gradient_can_be_computed_twice(backend: str, name: str) -> None:
    """Backward with retain_graph leaves what was kept as it was."""
    case = Case(name, steps=4, batch=3, inputs=2, hidden=3, lengths=(4, 1, 0), reset=((False, True, True),) * 4)
    cell, x = case.build(), leaf(case.sequence())
    run = unroll(cell, x, **case.options(), backend=backend)
    wrt = [x, *cell.parameters()]
    first = torch.autograd.grad(run.outputs.square().sum(), wrt, retain_graph=True)
    second = torch.autograd.grad(run.outputs.square().sum(), wrt)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@every_backend
@every_cell
def test_windows_of_a_carry_add_up(backend: str, name: str) -> None:
    """A state handed on without detaching passes the gradient on: two halves are the whole."""
    case = Case(name, steps=6, batch=2, inputs=2, hidden=3)
    found = []
    for cuts in ((0, 6), (0, 2, 6)):
        cell, x, state = case.build(), leaf(case.sequence()), map_state(leaf, case.state())
        now, outputs = state, []
        for a, b in pairwise(cuts):
            run = unroll(cell, x[a:b], now, backend=backend)
            now = run.state
            outputs.append(run.outputs)
        results = {"outputs": torch.cat(outputs), **named("state", now)}
        found.append(gradients(results, {"inputs": x, **named("initial", state), **dict(cell.named_parameters())}))
    agree(*found, ROUNDING)


# ------------------------------------------------------------------------------------------- float32


def summands(case: Case, name: str) -> int:
    """How many rounded terms go into one number: those of a row's products over all steps, and for a weight's
    gradient those of all rows."""
    row = case.steps * (CELLS[case.cell].equation.gates * case.hidden + case.inputs)
    return row * case.batch if "weight" in name or "bias" in name else row


@every_fast_backend
@given(case=cases(least_steps=1, least_batch=1))
@settings(max_examples=80)
def test_float32_is_as_exact_as_the_reference(backend: str, case: Case) -> None:
    """Law 6: the error against float64 is at most twice the reference's own, and 4 ulp x sqrt(summands). The summands
    are of unit size, also where their sum is small."""
    exact = run_case(case, "reference")
    plain = run_case(case, "reference", torch.float32)
    fast = run_case(case, backend, torch.float32)
    ulp = torch.finfo(torch.float32).eps
    for name, expected in exact.items():
        assert fast[name].dtype == torch.float32
        error, usual = (float((run[name].double() - expected).abs().max()) for run in (fast, plain))
        size = max(1.0, float(expected.abs().max()))
        assert error <= 2 * usual + 4 * ulp * math.sqrt(summands(case, name)) * size, name


@every_cell
def test_float32_without_onednn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch build without oneDNN takes another product; float32 results agree to float32's rounding."""
    case = Case(name, steps=5, batch=3, inputs=4, hidden=8, lengths=(5, 2, 0))
    with_it = run_case(case, "tape", torch.float32)
    monkeypatch.setattr(tape, "_onednn", None)
    assert not tape.uses_onednn()
    # 4 ulp x sqrt(summands), as above; at most sqrt(5 x 36 x 3) = 23.
    agree(run_case(case, "tape", torch.float32), with_it, 4 * torch.finfo(torch.float32).eps * 23)


# ------------------------------------------------------------------------------------------ autocast


def deviation(actual: Tensor, exact: Tensor) -> float:
    """Root mean square, relative to that of the exact numbers."""
    return float((actual.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def run_under_autocast(case: Case, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    cell, x, state = (
        case.build(torch.float32),
        leaf(case.sequence().float()),
        map_state(leaf, case.state(torch.float32)),
    )
    with torch.autocast("cpu", dtype):
        run = unroll(cell, x, state, **case.options(), all_states=True, backend=backend)
    # Under autocast the reference returns bfloat16 where no float32 state came in between; the loss is float32.
    results = {name: t.float() for name, t in results_of(run).items()}
    leaves = {"inputs": x, **named("initial", state), **dict(cell.named_parameters())}
    return {**{name: t.detach() for name, t in results.items()}, **gradients(results, leaves, case.seed)}


@every_fast_backend
@every_cell
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ragged", [False, True])
def test_autocast_is_as_exact_as_the_reference(backend: str, name: str, dtype: torch.dtype, ragged: bool) -> None:
    """The tape keeps its states in float32 and is usually better, with 0.6 to 1.0 of the reference's error. Each tensor
    has hundreds of numbers, so that chance moves its root mean square error by less than a quarter; a relu that is
    open in one and closed in the other moves it most."""
    case = Case(name, steps=8, batch=8, inputs=16, hidden=32, seed=4)
    if ragged:
        case = replace(
            case, lengths=(8, 3, 0, 1, 8, 5, 6, 2), reset=((False, True) * 4, (False,) * 8) * 4, reverse=True
        )
    exact = run_case(case, "reference")
    plain, fast = (run_under_autocast(case, b, dtype) for b in ("reference", backend))
    for key, expected in exact.items():
        assert deviation(fast[key], expected) <= 1.25 * deviation(plain[key], expected), key
        # And it is in low precision, not in float32, which would be of the order of 1e-7.
        if not (ragged and key.startswith("d initial")):
            assert deviation(fast[key], expected) > 1e-5, key


@every_backend
@every_cell
def test_autocast_leaves_float64_alone(backend: str, name: str) -> None:
    case = Case(name, steps=4, batch=3, inputs=4, hidden=5, lengths=(4, 2, 0))
    with torch.autocast("cpu", torch.bfloat16):
        found = run_case(case, backend)
    agree(found, run_case(case, backend), 0)


@every_backend
@every_cell
def test_autocast_takes_a_state_of_its_own_making(backend: str, name: str) -> None:
    """A carry that left autocast in bfloat16 or float32 goes in again, with a lookup as input too."""
    case = Case(name, steps=3, batch=2, inputs=4, hidden=5)
    cell = case.build(torch.float32)
    ids = torch.tensor([[0, 1], [2, 3], [1, 1]])
    with torch.autocast("cpu", torch.bfloat16):
        first = unroll(cell, case.sequence(torch.float32), backend=backend)
        second = unroll(cell, Lookup(ids, None), first.state, backend=backend)
    exact = unroll(
        case.build(), torch.nn.functional.one_hot(ids, 4).double(), unroll(case.build(), case.sequence()).state
    )
    # bfloat16 has 8 bits: a number is off by up to 2^-9 of itself; some ten of them in a row's sum of unit size.
    agree({"outputs": second.outputs.float()}, {"outputs": exact.outputs.float()}, 10 * 2**-9)


# ---------------------------------------------------------------------------------- derivatives by torch


def as_function(case: Case, backend: str) -> tuple[Any, list[Tensor]]:
    """(function of inputs, state and weights, where to differentiate it)."""
    cell = case.build()
    names = [name for name, _ in cell.named_parameters()]
    kind, count = type(case.state()), len(case.state())

    def function(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        weights = dict(zip(names, rest[count:], strict=True))
        bound = cell.bind()
        bound = replace(
            bound, weights=bound.weights._replace(**{n.replace("weight_", ""): w for n, w in weights.items()})
        )
        run = unroll(bound, x, kind(*rest[:count]), **case.options(), all_states=True, backend=backend)
        return tuple(results_of(run).values())

    return function, [leaf(t) for t in (case.sequence(), *case.state(), *cell.parameters())]


SMALL = {"steps": 3, "batch": 2, "inputs": 2, "hidden": 2, "seed": 1}
HARD = {"lengths": (2, 3), "reset": ((False, False), (True, False), (False, True)), "reverse": True}


@every_backend
@every_cell
@pytest.mark.parametrize("more", [{}, HARD], ids=["plain", "ragged, marked, reverse"])
def test_gradcheck(backend: str, name: str, more: dict[str, Any]) -> None:
    function, point = as_function(Case(name, **SMALL, **more), backend)
    assert torch.autograd.gradcheck(function, point)


@every_cell
@pytest.mark.parametrize("more", [{}, HARD], ids=["plain", "ragged, marked, reverse"])
def test_gradgradcheck_of_the_reference(name: str, more: dict[str, Any]) -> None:
    function, point = as_function(Case(name, **{**SMALL, "batch": 2, "inputs": 1}, **more), "reference")
    assert torch.autograd.gradgradcheck(function, point)


@pytest.mark.parametrize("backend", [*FAST_BACKENDS, "auto"])
@every_cell
def test_a_second_derivative_names_the_reference(backend: str, name: str) -> None:
    case = Case(name, **SMALL)
    x = leaf(case.sequence())
    run = unroll(case.build(), x, backend=backend)
    with refused(
        ModelError,
        "the tape path is differentiable once; for second derivatives (create_graph=True) use backend='reference'",
    ):
        torch.autograd.grad(run.outputs.sum(), x, create_graph=True)


@every_cell
def test_torch_func_takes_the_reference_by_itself(name: str) -> None:
    """A torch.func transform cannot go through the tape: "auto" steps aside."""
    case = Case(name, **SMALL)
    cell, x = case.build(), case.sequence()

    def loss(inputs: Tensor) -> Tensor:
        return unroll(cell, inputs).outputs.square().sum()

    leaf_x = leaf(x)
    (expected,) = torch.autograd.grad(loss(leaf_x), leaf_x)
    agree({"d inputs": torch.func.grad(loss)(x)}, {"d inputs": expected}, ROUNDING)
    with refused(
        ModelError, "backend 'tape' cannot run here: a torch.func transform is active; use 'auto' or 'reference'"
    ):
        torch.func.grad(lambda inputs: unroll(cell, inputs, backend="tape").outputs.sum())(x)


# ------------------------------------------------------------------------------------ where it applies


class Sine(GatedCell):
    equation = Equation(
        "sine", 1, HiddenState, lambda x, s, w, b: HiddenState((x + torch.nn.functional.linear(s.h, w, b)).sin())
    )


class RenamedGRU(GatedCell):
    """Called as a built-in cell is, and another equation."""

    equation = Equation("gru", 1, HiddenState, Sine.equation.recur)


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: LSTM(2, 3).bfloat16(), "the weights are bfloat16"),
        (lambda: LSTM(2, 3).half(), "the weights are float16"),
        (lambda: GRU(2, 3).to("meta"), "the weights are on meta"),
        (lambda: Sine(2, 3), "the equation 'sine' is not a built-in one"),
        (lambda: RenamedGRU(2, 3), "the equation 'gru' is not a built-in one"),
    ],
)
def test_the_tape_says_why_it_cannot_run(make: Any, reason: str) -> None:
    cell = make()
    x = torch.zeros(4, 2, 2, dtype=cell.weight_hh.dtype, device=cell.weight_hh.device)
    assert tape.supports(cell.bind()) == reason
    with refused(ModelError, f"backend 'tape' cannot run here: {reason}; use 'auto' or 'reference'"):
        unroll(cell, x, backend="tape")
    auto = unroll(cell, x).outputs
    assert auto.shape == (4, 2, 3)
    if auto.device.type == "cpu":
        assert torch.equal(auto, unroll(cell, x, backend="reference").outputs)


def test_the_tape_leaves_a_compiled_model_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert tape.supports(GRU(2, 3).bind()) == "the model is being compiled"


@every_cell
def test_auto_is_the_tape_where_it_applies(name: str) -> None:
    case = Case(name, steps=4, batch=3, inputs=2, hidden=3)
    assert tape.supports(case.build().bind()) is None
    run = unroll(case.build(), leaf(case.sequence()), all_states=True)
    assert "_Bptt" in repr(run.outputs.grad_fn)
    agree(results_of(run), results_of(unroll(case.build(), case.sequence(), all_states=True, backend="tape")), 0)
