"""The native kernels: laws 2 (rows), 5 (windows, budgets), 6 (values and gradients) and 11 (changed weights)."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import (
    CELLS,
    Case,
    LayerCase,
    agree,
    as_exact_as,
    corner_cases,
    gradients,
    layer_cases,
    leaf,
    lookups,
    marks,
    named,
    ragged,
    random,
    refused,
    results_of,
    run_case,
    summands,
    wide_cases,
)
from torch import Tensor
from torch.nn.utils import parametrizations, prune

import unrolled.nn
from unrolled import fused, native
from unrolled.cells import GRU, LSTM, RNN, Lookup, LSTMState, map_state
from unrolled.errors import ConfigError, ModelError
from unrolled.unroll import choose_backend, unroll

every_cell = pytest.mark.parametrize("name", sorted(CELLS))
every_layer = pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
in_both_precisions = pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])

RESULTS = ("outputs", "state.h", "state.c", "states.h", "states.c")
ULP = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """But for the tests of threads: torch's own small operations only wait for more, longest where others compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    yield torch.set_num_threads
    torch.set_num_threads(1)


def bfloat16(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def terms(case: Case) -> Callable[[str], int]:
    """The summands of each result's numbers."""
    gates = CELLS[case.cell].equation.gates
    return lambda name: summands(case.steps, case.batch, case.inputs, case.hidden, gates, name)


def judged(case: Case, fast: dict[str, Tensor], exact: dict[str, Tensor]) -> list[str]:
    """What to compare: everything, but no gradients through a relu that is open in one run and closed in the other.
    There it has no derivative; the values next to it are compared all the same."""
    if case.cell == "rnn_relu" and not torch.equal(fast["outputs"] > 0, exact["outputs"] > 0):
        return [name for name in exact if not name.startswith("d ")]
    return list(exact)


# -------------------------------------------------------------------------------------- law 6: float32


def is_as_exact_as_the_reference(case: Case, inputs: Lookup | None = None, **options: Any) -> None:
    exact = run_case(case, "reference", inputs=inputs, **options)
    plain = run_case(case, "reference", torch.float32, inputs=inputs, **options)
    fast = run_case(case, "native", torch.float32, inputs=inputs, **options)
    as_exact_as(fast, plain, exact, terms(case), judged(case, fast, exact))


@given(case=wide_cases(least_steps=0, least_batch=0))
@settings(max_examples=100)
def test_values_and_gradients_are_as_exact_as_the_references(case: Case) -> None:
    is_as_exact_as_the_reference(case)


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in corner_cases()])
def test_values_and_gradients_are_as_exact_in_the_corners(case: Case) -> None:
    is_as_exact_as_the_reference(case)


@given(case=wide_cases(), data=st.data())
@settings(max_examples=40)
def test_lookups_are_as_exact_as_the_references(case: Case, data: st.DataObject) -> None:
    """One-hot, a table that is projected whole, a table of more rows than there are steps."""
    is_as_exact_as_the_reference(case, data.draw(lookups(case)))


@given(case=wide_cases(), only=st.sets(st.sampled_from(RESULTS), min_size=1))
@settings(max_examples=30)
def test_a_gradient_may_come_from_any_results(case: Case, only: set[str]) -> None:
    is_as_exact_as_the_reference(case, only=only)


@every_cell
@pytest.mark.parametrize("only", RESULTS)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_gradient_from_one_result_alone(name: str, only: str, reverse: bool) -> None:
    if only.endswith(".c") and name != "lstm":
        only = "states.h"  # it has no c
    case = Case(name, steps=4, batch=3, inputs=2, hidden=3, lengths=(4, 1, 0), reverse=reverse, seed=1)
    is_as_exact_as_the_reference(case, only=[only])
    found = run_case(case, "native", torch.float32, only=[only])
    assert found["d initial.h"].any()
    assert found["d weight_hh"].any()


@every_cell
@pytest.mark.parametrize("wanted", ["inputs", "initial", "weight_hh", "weight_ih", "bias_ih", "bias_hh", "table"])
def test_a_gradient_of_one_leaf_alone_is_the_same_bits(name: str, wanted: str) -> None:
    """Frozen weights, or nothing but a frozen cell's input."""
    case = Case(name, steps=3, batch=2, inputs=2, hidden=3, lengths=(3, 2), seed=2)
    inputs = Lookup(torch.tensor([[0, 1], [2, 2], [1, 0]]), random(2, "table", 3, 2)) if wanted == "table" else None
    every = run_case(case, "native", torch.float32, inputs=inputs)
    cell, state = case.build(torch.float32).requires_grad_(False), case.state(torch.float32)
    x: Any = case.sequence(torch.float32)
    if wanted == "initial":
        state = map_state(leaf, state)
        leaves = named("initial", state)
    elif wanted == "inputs":
        x = leaf(x)
        leaves = {"inputs": x}
    elif inputs is not None:
        x = Lookup(inputs.ids, leaf(random(2, "table", 3, 2, dtype=torch.float32)))
        leaves = {"table": x.table}
    else:
        leaves = {wanted: getattr(cell, wanted).requires_grad_()}
    run = unroll(cell, x, state, **case.options(), all_states=True, backend="native")
    agree(gradients(results_of(run), leaves, case.seed), every, 0, [f"d {key}" for key in leaves])


@given(case=wide_cases(least_batch=0))
@settings(max_examples=30)
def test_without_outputs_the_rest_is_the_same_bits(case: Case) -> None:
    """States, and gradients from them, are those of a run whose outputs are returned."""
    final = [f"state.{field}" for field in case.state()._fields]
    with_them = run_case(case, "native", torch.float32, only=final, all_states=False)
    without = run_case(case, "native", torch.float32, only=final, all_states=False, outputs=False)
    assert "outputs" not in without
    agree(without, with_them, 0, list(without))


@in_both_precisions
@given(case=wide_cases())
@settings(max_examples=30)
def test_values_are_the_same_bits_without_a_gradient(bf16: bool, case: Case) -> None:
    """What is not recorded goes directly to the kernels and keeps no tape."""
    found = run_case(case, "native", torch.float32, autocast=torch.bfloat16 if bf16 else None)
    expected = {name: t for name, t in found.items() if not name.startswith("d ")}
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), bfloat16(bf16):
            run = unroll(
                case.build(torch.float32),
                case.sequence(torch.float32),
                case.state(torch.float32),
                **case.options(),
                all_states=True,
                backend="native",
            )
        agree(results_of(run), expected, 0)
        assert not run.outputs.requires_grad


@given(case=wide_cases())
@settings(max_examples=15)
def test_a_gradient_can_be_computed_twice(case: Case) -> None:
    """Backward with retain_graph leaves what was kept as it was."""
    cell, x = case.build(torch.float32), leaf(case.sequence(torch.float32))
    run = unroll(cell, x, **case.options(), backend="native")
    wrt = [x, *cell.parameters()]
    first = torch.autograd.grad(run.outputs.square().sum(), wrt, retain_graph=True)
    second = torch.autograd.grad(run.outputs.square().sum(), wrt)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------ law 6: bfloat16


def deviation(actual: Tensor, exact: Tensor) -> float:
    """Root mean square, relative to that of the exact numbers."""
    return float((actual.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def is_as_exact_under_autocast(case: Case, inputs: Lookup | None = None) -> None:
    exact = run_case(case, "reference", inputs=inputs)
    plain, fast = (
        run_case(case, backend, torch.float32, autocast=torch.bfloat16, inputs=inputs)
        for backend in ("reference", "native")
    )
    for name in judged(case, fast, exact):
        expected = exact[name]
        assert fast[name].dtype == torch.float32
        if int((plain[name] != expected).sum()) >= 64:
            # Enough rounded numbers for chance to move their root mean square error by less than a third. Gradients of
            # sums, which the kernels round once, by up to 2^-8 (8 significant bits), may be exact in the reference.
            once = 2**-8 if name.startswith("d ") else 0
            assert deviation(fast[name], expected) <= 2 * deviation(plain[name], expected) + once, name
        elif expected.numel():
            # A few may be nearly exact in the reference by chance. Each operand of a product is rounded by up
            # to 2^-8 of itself.
            error, usual = (float((run[name].double() - expected).abs().max()) for run in (fast, plain))
            size = max(1.0, float(expected.abs().max()))  # what is summed is of unit size, and may cancel
            allowed = 2 * usual + 2 * 2**-8 * math.sqrt(terms(case)(name)) * size
            assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g}"


@given(case=wide_cases(least_steps=0, least_batch=0))
@settings(max_examples=80)
def test_bfloat16_is_as_exact_as_the_reference_under_autocast(case: Case) -> None:
    is_as_exact_under_autocast(case)


@given(case=wide_cases(), data=st.data())
@settings(max_examples=20)
def test_bfloat16_lookups_are_as_exact_as_the_reference_under_autocast(case: Case, data: st.DataObject) -> None:
    is_as_exact_under_autocast(case, data.draw(lookups(case)))


@every_cell
@pytest.mark.parametrize("ragged", [False, True])
def test_autocast_computes_in_bfloat16(name: str, ragged: bool) -> None:
    """Values and gradients: closer than the reference, which rounds its states too, and further than float32."""
    case = Case(name, steps=8, batch=8, inputs=17, hidden=33, seed=4)
    if ragged:
        marked = ((False, True) * 4, (False,) * 8) * 4
        case = replace(case, lengths=(8, 3, 0, 1, 8, 5, 6, 2), reset=marked, reverse=True)
    exact = run_case(case, "reference")
    plain, fast = (run_case(case, b, torch.float32, autocast=torch.bfloat16) for b in ("reference", "native"))
    for key in judged(case, fast, exact):
        expected = exact[key]
        # Each tensor has hundreds of numbers: chance moves its error by less than a quarter.
        assert deviation(fast[key], expected) <= 1.25 * deviation(plain[key], expected), key
        # float32 is of the order of 1e-7. An empty or marked row passes its state's gradient on as it is.
        if not (ragged and key.startswith("d initial")):
            assert deviation(fast[key], expected) > 1e-4, key


@pytest.mark.parametrize("looked_up", [False, True])
def test_autocast_sums_biases_and_tables_as_they_are(looked_up: bool) -> None:
    """They are no operands of products, which alone are rounded. A relu's last gradient is the one given."""
    case = Case("rnn_relu", steps=1, batch=40, inputs=6, hidden=33)
    cell, d = case.build(torch.float32), random(0, "d", 1, 40, 33, dtype=torch.float32)
    ids = torch.randint(6, (1, 40), generator=torch.Generator().manual_seed(0))
    inputs = Lookup(ids, None) if looked_up else case.sequence(torch.float32)
    with bfloat16():
        out = unroll(cell, inputs, case.state(torch.float32), backend="native").outputs
    out.backward(d)
    a = (d * (out > 0)).double()[0]
    exact = {"bias_ih": a.sum(0), "bias_hh": a.sum(0)}
    if looked_up:
        exact["weight_ih"] = a.t() @ F.one_hot(ids[0], 6).double()
    agree({name: getattr(cell, name).grad.double() for name in exact}, exact, 4 * ULP * math.sqrt(40))


@every_cell
def test_autocast_is_the_callers_in_the_backward(name: str) -> None:
    """What was computed in bfloat16 goes back in it wherever `backward` is called, and float32 in float32."""
    case = Case(name, steps=5, batch=4, inputs=7, hidden=9, lengths=(5, 1, 0, 3))
    found = []
    for forward in (True, False):
        for backward in (True, False):
            cell = case.build(torch.float32)
            with bfloat16(forward):
                out = unroll(cell, case.sequence(torch.float32), lengths=case.lengths, backend="native").outputs
            with bfloat16(backward):
                out.square().sum().backward()
            found.append({key: p.grad for key, p in cell.named_parameters()})
    agree(found[0], found[1], 0)
    agree(found[2], found[3], 0)
    assert not torch.equal(found[0]["weight_hh"], found[2]["weight_hh"])


@every_cell
def test_autocast_takes_bfloat16_inputs_and_states(name: str) -> None:
    """As a layer below, or a carry, hands them on; their gradients come back in their own dtype."""
    case = Case(name, steps=3, batch=2, inputs=4, hidden=5)
    x = leaf(case.sequence().bfloat16())
    state = map_state(lambda t: leaf(t.bfloat16()), case.state())
    with bfloat16():
        run = unroll(case.build(torch.float32), x, state, backend="native")
        same = unroll(
            case.build(torch.float32), x.detach().float(), map_state(lambda t: t.detach().float(), state),
            backend="native",
        )  # fmt: skip
    agree(results_of(run), results_of(same), 0)
    leaves = {"x": x, **named("state", state)}
    for grad in gradients(results_of(run), leaves).values():
        assert grad.dtype == torch.bfloat16
        assert grad.any()


# --------------------------------------------------------------------------- law 6: layers, both directions


def run_layer(
    case: LayerCase,
    backend: str,
    dtype: torch.dtype,
    *,
    full: bool = False,
    reset: Tensor | None = None,
    autocast: bool = False,
) -> dict[str, Tensor]:
    """Every result and every gradient of a layer. full: without lengths. reset `[T B]`."""
    layer = case.build(unrolled.nn, backend=backend)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            size = case.hidden if "weight_hh" in name else parameter.shape[-1]
            parameter.copy_((random(case.seed, name, *parameter.shape) * 0.7 * size**-0.5).float())
    layer.to(dtype)
    x, state = case.sequence().to(dtype), case.state()
    x = leaf(x.transpose(0, 1) if case.batch_first else x)
    if state is not None:
        state = tuple(leaf(t.to(dtype)) for t in state) if isinstance(state, tuple) else leaf(state.to(dtype))
    if reset is not None and case.batch_first:
        reset = reset.T
    with bfloat16(autocast):
        out, final = layer(x, state, lengths=None if full else case.lengths, reset=reset)
    results = {name: t.float() if autocast else t for name, t in {"output": out, **named("final", final)}.items()}
    leaves = {"input": x, **named("initial", state), **dict(layer.named_parameters())}
    return {**{name: t.detach() for name, t in results.items()}, **gradients(results, leaves, case.seed)}


def layer_terms(case: LayerCase) -> Callable[[str], int]:
    """Those of all layers, the upper ones' inputs being both directions' outputs; a number may be the sum of both."""
    gates = {"LSTM": 4, "GRU": 3}.get(case.mode, 1)
    width = max(case.inputs, case.hidden * (1 + case.bidirectional))
    steps = case.steps * case.layers * (1 + case.bidirectional)
    return lambda name: summands(steps, case.batch, width, case.hidden, gates, name)


@given(case=layer_cases(wide=True), data=st.data())
@settings(max_examples=30)
@example(LayerCase("LSTM", 17, 33, 2, False, True, 5, 4, (1, 5, 3, 5), True, True, 0), None)
def test_layers_are_as_exact_as_the_references(case: LayerCase, data: st.DataObject | None) -> None:
    """Layers, directions, ragged lengths with empty rows, documents, batch_first, no biases."""
    reset, full = None, False
    if data is not None:
        case = replace(case, lengths=data.draw(ragged(case.steps, case.batch)))
        full = data.draw(st.booleans())
        bits = data.draw(st.none() | marks(case.steps, case.batch))
        reset = None if bits is None else torch.tensor(bits)
    exact, plain, fast = (
        run_layer(case, backend, dtype, full=full, reset=reset)
        for backend, dtype in (
            ("reference", torch.float64),
            ("reference", torch.float32),
            ("native", torch.float32),
        )
    )
    names = list(exact)
    if case.mode == "RNN_RELU":
        # The layers in between have relus too, of which nothing is seen: see `judged`.
        names = [name for name in names if not name.startswith("d ")]
    as_exact_as(fast, plain, exact, layer_terms(case), names)


@pytest.mark.parametrize("mode", ["RNN_TANH", "LSTM", "GRU"])
@pytest.mark.parametrize("full", [False, True])
def test_layers_under_autocast_are_as_exact_as_the_references(mode: str, full: bool) -> None:
    case = LayerCase(mode, 15, 33, 2, True, True, 6, 7, (6, 2, 0, 1, 5, 6, 3), False, True, 3)
    exact = run_layer(case, "reference", torch.float64, full=full)
    plain, fast = (run_layer(case, b, torch.float32, full=full, autocast=True) for b in ("reference", "native"))
    for name, expected in exact.items():
        assert deviation(fast[name], expected) <= 1.5 * deviation(plain[name], expected), name
    assert deviation(fast["d weight_hh_l0"], exact["d weight_hh_l0"]) > 1e-4


@every_layer
def test_both_directions_at_once_are_each_by_itself(kind: str) -> None:
    """The kernels run two directions in one call; a cell unrolled by itself is one."""
    layer = getattr(unrolled.nn, kind)(5, 7, bidirectional=True, backend="native")
    x, lengths = random(0, "x", 6, 4, 5, dtype=torch.float32), [6, 0, 3, 1]
    reset = torch.tensor([[False, True, False, True]] * 6)
    out, _ = layer(x, lengths=lengths, reset=reset)
    backwards = torch.cat([reset[1:], torch.zeros_like(reset[:1])])
    valid = torch.arange(6)[:, None] < torch.tensor(lengths)
    alone = [
        unroll(cell, x, lengths=lengths, reset=r & valid, reverse=reverse, backend="native").outputs
        for cell, r, reverse in zip(
            layer.cells()[0], (reset, backwards & valid.roll(-1, 0)), (False, True), strict=True
        )
    ]
    agree({"output": out}, {"output": torch.cat(alone, -1)}, 0)


# ----------------------------------------------------------------------------------- layouts in memory


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same numbers, laid out in other ways; what lies between them is NaN."""
    wide = torch.full((*x.shape[:2], 2 * x.shape[2] + 1), math.nan)
    wide[..., ::2][..., : x.shape[2]] = x
    deep = torch.full((2 * x.shape[0], x.shape[1] + 2, x.shape[2] + 3), math.nan)
    deep[::2, 1:-1, 2:-1] = x
    return {
        "batch first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "every other number": wide[..., ::2][..., : x.shape[2]],
        "a piece of a larger one": deep[::2, 1:-1, 2:-1],
        "transposed": x.mT.contiguous().mT,
        "flipped": x.flip(0, 2).flip(0, 2),
        "features first": x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    }


@in_both_precisions
@given(case=wide_cases())
@settings(max_examples=15)
def test_the_layout_of_the_inputs_does_not_matter(bf16: bool, case: Case) -> None:
    """Bit for bit, of states too; with a gradient and without."""
    autocast = torch.bfloat16 if bf16 else None
    expected = run_case(case, "native", torch.float32, autocast=autocast)
    for name, view in layouts(case.sequence(torch.float32)).items():
        state = case.state(torch.float32)
        state = map_state(lambda t: t.t().contiguous().t(), state)
        for record in (False, True):
            cell, x = case.build(torch.float32), view.detach().requires_grad_(record)
            with torch.set_grad_enabled(record), bfloat16(bf16):
                run = unroll(cell, x, state, **case.options(), all_states=True, backend="native")
            assert x.stride() == view.stride(), name
            agree(results_of(run), expected, 0, [key for key in expected if not key.startswith("d ")])
            if record:
                leaves = {"inputs": x, **dict(cell.named_parameters())}
                agree(gradients(results_of(run), leaves, case.seed), expected, 0, [f"d {key}" for key in leaves])


@every_cell
@pytest.mark.parametrize("record", [False, True])
def test_expanded_inputs_states_and_weights(name: str, record: bool) -> None:
    """Tensors with steps of zero, as `expand` makes them, in place of copies."""
    case = Case(name, steps=4, batch=3, inputs=2, hidden=5)
    cell, x = case.build(torch.float32).bind(), case.sequence(torch.float32)[:1, :1]
    state = map_state(lambda t: t[:1], case.state(torch.float32))
    weights = cell.weights._replace(bias_hh=cell.weights.bias_hh[:1].expand_as(cell.weights.bias_hh))
    cell = replace(cell, weights=weights)
    with torch.set_grad_enabled(record):
        run = unroll(cell, x.expand(4, 3, 2), map_state(lambda t: t.expand(3, 5), state), backend="native")
        same = replace(cell, weights=weights._replace(bias_hh=weights.bias_hh.clone()))
        whole = unroll(same, x.repeat(4, 3, 1), map_state(lambda t: t.repeat(3, 1), state), backend="native")
    agree(results_of(run), results_of(whole), 0)
    if record:
        grads = [
            torch.autograd.grad(r.outputs.square().sum(), [cell.weights.ih, cell.weights.hh]) for r in (run, whole)
        ]
        agree(named("d", grads[0]), named("d", grads[1]), 0)


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("inputs", [1, 3])
def test_numbers_that_torch_keeps_negated_are_read_negated(inputs: int, record: bool) -> None:
    """The imaginary part of a conjugate is a view on the original numbers and a flag."""
    x = torch.randn(4, 2, inputs, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)).conj().imag
    h = torch.randn(2, 1, dtype=torch.complex64, generator=torch.Generator().manual_seed(1)).conj().imag
    assert x.is_neg()
    assert h.is_neg()
    cell = LSTM(inputs, 1)
    with torch.set_grad_enabled(record):
        found = unroll(cell, x, LSTMState(h, h), backend="native")
        expected = unroll(cell, x.clone().resolve_neg(), LSTMState(h.resolve_neg(), h.resolve_neg()), backend="native")
    agree(results_of(found), results_of(expected), 0)


@given(case=wide_cases())
@settings(max_examples=15)
def test_nothing_that_was_given_is_changed(case: Case) -> None:
    cell, x, reset = case.build(torch.float32), leaf(case.sequence(torch.float32)), case.resets()
    state = map_state(leaf, case.state(torch.float32))
    lengths = None if case.lengths is None else torch.tensor(case.lengths)
    run = unroll(cell, x, state, lengths=lengths, reset=reset, reverse=case.reverse, all_states=True, backend="native")
    given_ = {name: t.detach().clone() for name, t in results_of(run).items()}
    gradients(results_of(run), {"inputs": x, **named("initial", state), **dict(cell.named_parameters())})
    agree(results_of(run), given_, 0)
    assert torch.equal(x, case.sequence(torch.float32))
    agree(named("", state), named("", case.state(torch.float32)), 0)
    agree(dict(cell.named_parameters()), dict(case.build(torch.float32).named_parameters()), 0)
    assert reset is None or torch.equal(reset, case.resets())  # type: ignore[arg-type]
    assert lengths is None or lengths.tolist() == list(case.lengths or ())


# ------------------------------------------------------------------------------- law 2: rows, bit for bit


def inferred(case: Case, inputs: Any, state: Any, bf16: bool, **options: Any) -> dict[str, Tensor]:
    with torch.inference_mode(), bfloat16(bf16):
        return results_of(
            unroll(case.build(torch.float32), inputs, state, **options, all_states=True, backend="native")
        )


def rows(results: dict[str, Tensor], chosen: list[int]) -> dict[str, Tensor]:
    """The batch is the second to last dimension of each."""
    return {name: t[..., chosen, :] for name, t in results.items()}


@in_both_precisions
@given(case=wide_cases(), data=st.data())
@settings(max_examples=40)
def test_a_row_does_not_depend_on_the_rows_beside_it(bf16: bool, case: Case, data: st.DataObject) -> None:
    """Any of the rows, in any order, some more than once: outputs and states are the same bits."""
    chosen = data.draw(st.lists(st.integers(0, case.batch - 1), min_size=1, max_size=2 * case.batch))
    inputs: Any = data.draw(st.none() | lookups(case))
    if inputs is None:
        inputs = case.sequence(torch.float32)
        some: Any = inputs[:, chosen]
    else:
        inputs = Lookup(inputs.ids, None if inputs.table is None else inputs.table.float())
        some = Lookup(inputs.ids[:, chosen], inputs.table)
    state, reset = case.state(torch.float32), case.resets()
    whole = inferred(case, inputs, state, bf16, **case.options())
    part = inferred(
        case,
        some,
        map_state(lambda t: t[chosen], state),
        bf16,
        lengths=None if case.lengths is None else [case.lengths[b] for b in chosen],
        reset=None if reset is None else reset[:, chosen],
        reverse=case.reverse,
    )
    agree(part, rows(whole, chosen), 0)


@in_both_precisions
@given(case=wide_cases(), more=st.integers(1, 3))
@settings(max_examples=20)
def test_more_padding_is_the_same_bits(bf16: bool, case: Case, more: int) -> None:
    lengths = case.lengths or (case.steps,) * case.batch
    x, state = case.sequence(torch.float32), case.state(torch.float32)
    reset = case.resets()
    options: dict[str, Any] = {"lengths": lengths, "reverse": case.reverse}
    short = inferred(case, x, state, bf16, reset=reset, **options)
    longer = torch.cat([x, torch.full((more, case.batch, case.inputs), math.nan)])
    reset = None if reset is None else torch.cat([reset, torch.ones(more, case.batch, dtype=torch.bool)])
    long = inferred(case, longer, state, bf16, reset=reset, **options)
    agree({name: t[: case.steps] if t.dim() == 3 else t for name, t in long.items()}, short, 0)


@in_both_precisions
@every_cell
@pytest.mark.parametrize("batch", [1, 2, 5, 7, 12, 19])
def test_the_number_of_threads_does_not_matter(
    name: str, batch: int, bf16: bool, threads: Callable[[int], None]
) -> None:
    """Few rows are shared out by units, many by rows; values and gradients are the same bits either way. Each case is
    large enough (400 000 operations) to be shared at all."""
    lengths = tuple((5 * b) % 10 for b in range(batch))
    case = Case(name, steps=9, batch=batch, inputs=65, hidden=129, lengths=lengths, seed=batch)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(run_case(case, "native", torch.float32, autocast=torch.bfloat16 if bf16 else None))
    agree(found[1], found[0], 0)
    agree(found[2], found[0], 0)


@every_layer
@in_both_precisions
def test_the_number_of_threads_does_not_matter_in_both_directions(
    kind: str, bf16: bool, threads: Callable[[int], None]
) -> None:
    mode = {"RNN": "RNN_TANH"}.get(kind, kind)
    for batch in (3, 14):
        case = LayerCase(mode, 65, 129, 1, True, True, 6, batch, (6, 1, 4, 2, 5, 6, 3) * 2, False, True, 3)
        case = replace(case, lengths=case.lengths[:batch])
        found = []
        for count in (1, 2, 3, 4):
            threads(count)
            found.append(run_layer(case, "native", torch.float32, autocast=bf16))
        for other in found[1:]:
            agree(other, found[0], 0)


@in_both_precisions
@given(case=wide_cases(), data=st.data())
@settings(max_examples=30)
def test_a_step_at_a_time_is_the_same_bits(bf16: bool, case: Case, data: st.DataObject) -> None:
    """Vectors and lookups; with marks; a single step and a whole sequence take different ways through the kernels."""
    case = replace(case, lengths=None, reverse=False)
    inputs: Any = data.draw(st.none() | lookups(case))
    if inputs is None:
        inputs = case.sequence(torch.float32)
        pieces: list[Any] = list(inputs[:, None])
    else:
        inputs = Lookup(inputs.ids, None if inputs.table is None else inputs.table.float())
        pieces = [Lookup(ids[None], inputs.table) for ids in inputs.ids]
    state, reset = case.state(torch.float32), case.resets()
    whole = inferred(case, inputs, state, bf16, reset=reset)
    cell = case.build(torch.float32)
    with torch.inference_mode(), bfloat16(bf16):
        for t, piece in enumerate(pieces):
            run = unroll(cell, piece, state, reset=None if reset is None else reset[t : t + 1], backend="native")
            state = run.state
            agree({"outputs": run.outputs[0]}, {"outputs": whole["outputs"][t]}, 0)
            agree(named("states", state), {key: whole[key][t] for key in named("states", state)}, 0)
    agree(named("state", state), whole, 0, list(named("state", state)))


@in_both_precisions
@every_cell
def test_a_core_stepped_is_the_core_at_once(name: str, bf16: bool) -> None:
    core = unrolled.nn.Core(name, 7, 20, 2, backend="native")
    ids = torch.randint(7, (6, 3), generator=torch.Generator().manual_seed(0))
    table = random(0, "table", 7, 7, dtype=torch.float32)
    for inputs in (Lookup(ids, None), Lookup(ids, table)):
        with torch.inference_mode(), bfloat16(bf16):
            whole = core(inputs)
            state = core.initial_state(3)
            for t in range(6):
                y, state = core.step(Lookup(ids[t], inputs.table), state)
                agree({"y": y}, {"y": whole.outputs[t]}, 0)
            agree(named("state", state), named("state", whole.state), 0)


# -------------------------------------------------------------------------------- law 5: windows, budgets


@in_both_precisions
@given(case=wide_cases(least_batch=0), window=st.integers(1, 12), data=st.data())
@settings(max_examples=30)
def test_a_window_keeps_the_values_bit_for_bit_and_stops_the_gradient(
    bf16: bool, case: Case, window: int, data: st.DataObject
) -> None:
    """The gradient is that of a by-hand run whose state is detached between pieces."""
    autocast = torch.bfloat16 if bf16 else None
    inputs = data.draw(st.none() | lookups(case))
    if inputs is not None and inputs.table is not None and inputs.table.shape[0] > case.batch // 4:
        inputs = None  # whether such a table is projected as a whole depends on the number of steps: other sums
    truncated, full = (
        run_case(case, "native", torch.float32, autocast=autocast, inputs=inputs, window=w) for w in (window, None)
    )
    agree(truncated, full, 0, [name for name in full if not name.startswith("d ")])
    if window >= case.steps:
        agree(truncated, full, 0)
    if inputs is None and not bf16:
        exact, plain = (run_case(case, "reference", dtype, window=window) for dtype in (torch.float64, torch.float32))
        as_exact_as(truncated, plain, exact, terms(case), judged(case, truncated, exact))


@in_both_precisions
@given(case=wide_cases(), share=st.floats(0, 1), data=st.data())
@settings(max_examples=40)
@example(Case("lstm", 40, 9, 5, 17, lengths=(40, 1, 0, 39, 8, 7, 30, 20, 33), seed=1), 0.0, None)
@example(Case("gru", 40, 9, 5, 17, reverse=True, seed=1), 0.1, None)
def test_a_tape_budget_is_full_bptt_bit_for_bit(
    bf16: bool, case: Case, share: float, data: st.DataObject | None
) -> None:
    """From the least budget there is to all that full BPTT keeps."""
    autocast = torch.bfloat16 if bf16 else None
    inputs = None if data is None else data.draw(st.none() | lookups(case))
    every, outputs = (True, True) if data is None else data.draw(st.tuples(st.booleans(), st.booleans()))
    options: dict[str, Any] = {"all_states": every, "outputs": outputs}
    given_ = case.sequence(torch.float32) if inputs is None else inputs
    with bfloat16(bf16):
        needs = fused.costs(
            case.build(torch.float32).bind(),
            given_,
            ragged=case.lengths is not None,
            marked=case.reset is not None,
            **options,
        )
    budget = int(needs.least + share * max(needs.full - needs.least, 0))
    full, budgeted = (
        run_case(case, "native", torch.float32, autocast=autocast, inputs=inputs, tape_budget=b, **options)
        for b in (None, budget)
    )
    agree(budgeted, full, 0)


def test_a_tape_budget_below_the_least_is_refused() -> None:
    case = Case("lstm", steps=40, batch=9, inputs=5, hidden=17)
    with refused(ConfigError, "tape_budget: ..."):
        run_case(case, "native", torch.float32, tape_budget=1000)


# ------------------------------------------------------------------------------------ NaN, infinities


def kinds(x: Tensor) -> Tensor:
    """0 for a number, 1 for NaN, 2 and 3 for the infinities."""
    return x.isnan() + 2 * x.isposinf() + 3 * x.isneginf()


@in_both_precisions
@given(case=wide_cases(), fill=st.sampled_from([math.nan, math.inf, -math.inf, 1e38]), data=st.data())
@settings(max_examples=40)
def test_what_padding_holds_changes_nothing(bf16: bool, case: Case, fill: float, data: st.DataObject) -> None:
    """Bit for bit, values and gradients: vectors, ids that there are not, marks."""
    case = replace(case, lengths=case.lengths or data.draw(ragged(case.steps, case.batch)))
    valid, autocast = case.valid(), torch.bfloat16 if bf16 else None
    marked = case
    if case.reset is not None:
        marked = replace(case, reset=tuple(map(tuple, (case.resets() | ~valid).tolist())))  # type: ignore[operator]
    chosen = data.draw(st.none() | lookups(case))
    if chosen is None:
        x = case.sequence(torch.float32)
        plain: Any = torch.where(valid[..., None], x, 0)
        spoilt: Any = torch.where(valid[..., None], x, fill)
    else:
        unknown = data.draw(st.sampled_from([-1, 10**9, -(2**63)]))
        plain, spoilt = (Lookup(chosen.ids.where(valid, torch.tensor(i)), chosen.table) for i in (0, unknown))
    found = run_case(marked, "native", torch.float32, autocast=autocast, inputs=spoilt)
    agree(found, run_case(case, "native", torch.float32, autocast=autocast, inputs=plain), 0)
    if chosen is None:
        assert not found["d inputs"][~valid].any()


@given(
    case=wide_cases(),
    fill=st.sampled_from([math.nan, math.inf, -math.inf]),
    where=st.sampled_from(["inputs", "h", "c", "bias_hh", "weight_ih", "weight_hh"]),
    place=st.integers(0, 10**6),
)
@settings(max_examples=80)
def test_nan_and_infinity_go_where_they_go_in_the_reference(case: Case, fill: float, where: str, place: int) -> None:
    """In outputs and states; where a number is finite it is the reference's."""
    found = []
    for backend in ("native", "reference"):
        cell, x, state = case.build(torch.float32), case.sequence(torch.float32), case.state(torch.float32)
        target = x if where == "inputs" else getattr(state, where, getattr(cell, where, None))
        if target is None:  # no such state or bias
            target = x
        with torch.no_grad():
            target.view(-1)[place % target.numel()] = fill
            found.append(results_of(unroll(cell, x, state, **case.options(), all_states=True, backend=backend)))
    for name, expected in found[1].items():
        assert torch.equal(kinds(found[0][name]), kinds(expected)), name
    # As between any two float32 runs: 4 ulp x sqrt(summands) each.
    tolerance = 8 * ULP * math.sqrt(terms(case)("outputs"))
    agree(*({name: t.nan_to_num(0, 0, 0) for name, t in run.items()} for run in found), tolerance)


@given(
    case=wide_cases(),
    fill=st.sampled_from([math.nan, math.inf, -math.inf]),
    where=st.sampled_from(["inputs", "h", "c", "bias_hh", "weight_ih", "weight_hh"]),
    place=st.integers(0, 10**6),
)
@settings(max_examples=100)
@example(Case("rnn_relu", 2, 5, 1, 1, bias=False, lengths=(0, 0, 0, 0, 2)), math.inf, "weight_hh", 0)
def test_gradients_are_nan_where_they_are_in_the_reference(case: Case, fill: float, where: str, place: int) -> None:
    """With padding, where rows' own steps and initial states have it on the tape path: through padding the reference
    passes a zero times NaN to every gradient, the tape path to those of padding and of weights, the kernels to none."""
    found = []
    for backend in ("native", "reference" if case.lengths is None else "tape"):
        cell, x = case.build(torch.float32), leaf(case.sequence(torch.float32))
        state = map_state(leaf, case.state(torch.float32))
        target = getattr(state, where, getattr(cell, where, None))
        if target is None:  # no such state or bias
            target = x
        target.data.view(-1)[place % target.numel()] = fill
        run = unroll(cell, x, state, **case.options(), all_states=True, backend=backend)
        leaves = {"inputs": x, **named("initial", state), **dict(cell.named_parameters())}
        found.append(gradients(results_of(run), leaves, case.seed))
    for name, expected in found[1].items():
        actual = found[0][name]
        if name == "d inputs":
            actual, expected = actual[case.valid()], expected[case.valid()]
        if case.lengths is None or name.startswith(("d inputs", "d initial")):
            assert torch.equal(kinds(actual), kinds(expected)), name


@in_both_precisions
@every_cell
def test_large_numbers_saturate_the_gates_and_stay_finite(name: str, bf16: bool) -> None:
    case = Case(name, steps=4, batch=3, inputs=5, hidden=17)
    x = case.sequence(torch.float32) * 1e30
    found = run_case(case, "native", torch.float32, inputs=x, autocast=torch.bfloat16 if bf16 else None)
    if name != "rnn_relu":  # which has nothing to saturate
        for key, t in found.items():
            assert t.isfinite().all(), key


@in_both_precisions
@given(case=wide_cases(), scale=st.sampled_from([1e-38, 1e-40, 1e-45]))
@settings(max_examples=20)
def test_denormal_numbers_count_as_zero(bf16: bool, case: Case, scale: float) -> None:
    """Inside the kernels, for speed. Against zeros in their place: off by no more than the smallest normal number, of
    which each of a row's summands may lose one."""
    autocast = torch.bfloat16 if bf16 else None
    tiny, zero = (
        run_case(case, "native", torch.float32, inputs=case.sequence(torch.float32) * s, autocast=autocast)
        for s in (scale, 0)
    )
    for name, expected in zero.items():
        if case.cell == "rnn_relu" and name.startswith("d "):
            continue  # a relu may be open for a tiny number and closed for zero
        if name == "d weight_ih":  # a sum of products with the inputs themselves
            assert float((tiny[name] - expected).abs().max()) <= 1e3 * 1e-37 * terms(case)(name)
        else:
            # A larger number may be rounded the other way: one ulp at each of the steps.
            agree({name: tiny[name]}, {name: expected}, 2 * ULP * case.steps)


def test_denormal_numbers_are_torchs_again_after_a_call(threads: Callable[[int], None]) -> None:
    """The processor's mode is put back on every thread that took part."""
    tiny = torch.full((200_000,), 1e-40)
    for count in (1, 2):
        threads(count)
        case = Case("lstm", steps=8, batch=20, inputs=64, hidden=64)
        run_case(case, "native", torch.float32)
        assert float(tiny[0] * 1) != 0
        assert (tiny * 1 != 0).all()  # on all of torch's threads


# ----------------------------------------------------------------------------------- the output layer


@st.composite
def products(draw: st.DrawFn) -> tuple[int, int, int, bool, int]:
    """M rows, N columns, K summands, with a bias, seed."""
    sizes = st.sampled_from([1, 2, 3, 7, 15, 16, 17, 33, 64, 65, 100])
    return (
        draw(st.integers(0, 20) | st.just(100)),
        draw(sizes),
        draw(sizes),
        draw(st.booleans()),
        draw(st.integers(0, 99)),
    )


def operands(case: tuple[int, int, int, bool, int], dtype: torch.dtype) -> dict[str, Tensor]:
    m, n, k, bias, seed = case
    shapes = {"x": (m, k), "weight": (n, k), **({"bias": (n,)} if bias else {})}
    return {name: leaf(random(seed, name, *shape, dtype=dtype)) for name, shape in shapes.items()}


@given(case=products())
@settings(max_examples=40)
def test_a_linear_layer_is_as_exact_as_torchs(case: tuple[int, int, int, bool, int]) -> None:
    found = []
    for function, dtype in ((native.linear, torch.float32), (F.linear, torch.float32), (F.linear, torch.float64)):
        given_ = operands(case, dtype)
        y = function(given_["x"], given_["weight"], given_.get("bias"))
        found.append({"y": y, **gradients({"y": y}, given_)})
    # A weight's gradient is a sum over the rows.
    as_exact_as(*found, lambda name: max(case[2], case[1] if name == "d x" else case[0] if name.startswith("d") else 1))


@in_both_precisions
@given(case=products(), data=st.data())
@settings(max_examples=40)
def test_a_row_of_a_linear_layer_is_the_same_bits_in_any_batch(
    bf16: bool, case: tuple[int, int, int, bool, int], data: st.DataObject
) -> None:
    m = max(case[0], 1)
    given_ = operands((m, *case[1:]), torch.float32)
    chosen = data.draw(st.lists(st.integers(0, m - 1), min_size=1, max_size=2 * m))
    x, weight, bias = given_["x"], given_["weight"], given_.get("bias")
    with bfloat16(bf16):
        recorded = native.linear(x, weight, bias)
        with torch.inference_mode():
            whole = native.linear(x, weight, bias)
            agree({"y": native.linear(x[chosen], weight, bias)}, {"y": whole[chosen]}, 0)
            strided = torch.full((m, 2 * case[2]), math.nan)
            strided[:, ::2] = x
            agree({"y": native.linear(strided[:, ::2], weight, bias)}, {"y": whole}, 0)
            agree({"y": native.linear(x.expand(3, 1, m, -1), weight, bias)}, {"y": whole.expand(3, 1, m, -1)}, 0)
    agree({"y": recorded}, {"y": whole}, 0)


@in_both_precisions
@pytest.mark.parametrize("rows", [1, 5, 13, 200])
def test_threads_do_not_change_a_linear_layer(rows: int, bf16: bool, threads: Callable[[int], None]) -> None:
    x, weight, bias = (
        random(0, n, *s, dtype=torch.float32) for n, s in (("x", (rows, 257)), ("w", (900, 257)), ("b", (900,)))
    )
    found = []
    for count in (1, 2, 3):
        threads(count)
        with torch.no_grad(), bfloat16(bf16):
            found.append(native.linear(x, weight, bias))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_autocast_rounds_a_linear_layers_operands() -> None:
    x, weight, bias = (
        random(0, n, *s, dtype=torch.float32) for n, s in (("x", (9, 65)), ("w", (33, 65)), ("b", (33,)))
    )
    rounded = F.linear(x.bfloat16().double(), weight.bfloat16().double(), bias.double())
    for record in (False, True):
        with bfloat16():
            y = native.linear(x.requires_grad_(record), weight, bias)
        # The products of rounded operands are exact in float32; 65 of them are summed.
        agree({"y": y.double()}, {"y": rounded}, 4 * ULP * math.sqrt(65))


@given(case=products(), data=st.data())
@settings(max_examples=40)
def test_cross_entropy_is_as_exact_as_torchs(case: tuple[int, int, int, bool, int], data: st.DataObject) -> None:
    """Loss and gradients. Some of the rows are not counted, and hold NaN."""
    m, n, k, _, _ = case
    drawn = data.draw(st.lists(st.integers(-1, n - 1), min_size=m, max_size=m))
    targets = torch.tensor(drawn, dtype=torch.int64)

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        scores, targets = F.linear(x, weight, bias)[targets >= 0], targets[targets >= 0]
        return F.cross_entropy(scores, targets, reduction="sum")

    found = []
    for function, dtype in ((native.cross_entropy, torch.float32), (plain, torch.float32), (plain, torch.float64)):
        given_ = operands(case, dtype)
        if function is not plain:
            given_["x"].data[targets < 0] = math.nan
        loss = function(given_["x"], given_["weight"], given_.get("bias"), targets)
        found.append({"loss": loss, **gradients({"loss": loss}, given_)})
    as_exact_as(*found, lambda name: (n + k) * (1 if name == "d x" else max(m, 1)))
    with torch.no_grad():
        given_ = operands(case, torch.float32)
        loss = native.cross_entropy(given_["x"], given_["weight"], given_.get("bias"), targets)
    assert torch.equal(loss, found[0]["loss"].detach())


def test_a_gradient_over_many_symbols_is_as_exact_as_torchs() -> None:
    """Sums over tens of thousands of symbols are made of sums over pieces: made in one go they would be three times as
    far off as torch's."""
    symbols = 20_001  # the last piece is not whole
    weight, targets = random(0, "w", symbols, 33).float(), torch.arange(5) * (symbols // 5)

    def gradient(dtype: torch.dtype, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        x = random(0, "x", 5, 33, dtype=dtype).requires_grad_()
        (found,) = torch.autograd.grad(loss(x, weight.to(dtype)), x)
        return found.double()

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(x @ w.t(), targets, reduction="sum")

    exact = gradient(torch.float64, plain)
    ours = gradient(torch.float32, lambda x, w: native.cross_entropy(x, w, None, targets))
    assert (ours - exact).norm() <= 1.5 * (gradient(torch.float32, plain) - exact).norm()


@in_both_precisions
def test_threads_do_not_change_cross_entropy(bf16: bool, threads: Callable[[int], None]) -> None:
    targets = torch.randint(-1, 300, (301,), generator=torch.Generator().manual_seed(0))
    found = []
    for count in (1, 2, 3):
        threads(count)
        given_ = operands((301, 300, 65, True, 0), torch.float32)
        with bfloat16(bf16):
            loss = native.cross_entropy(given_["x"], given_["weight"], given_["bias"], targets)
        found.append({"loss": loss, **gradients({"loss": loss}, given_)})
    agree(found[1], found[0], 0)
    agree(found[2], found[0], 0)


def test_autocast_rounds_cross_entropys_operands() -> None:
    targets = torch.arange(40)
    exact = operands((40, 50, 33, True, 0), torch.float64)
    loss = F.cross_entropy(F.linear(exact["x"], exact["weight"], exact["bias"]), targets, reduction="sum")
    exact = {"loss": loss, **gradients({"loss": loss}, exact)}
    given_ = operands((40, 50, 33, True, 0), torch.float32)
    with bfloat16():
        loss = native.cross_entropy(given_["x"], given_["weight"], given_["bias"], targets)
    found = {"loss": loss, **gradients({"loss": loss}, given_)}
    for name, expected in exact.items():
        # Two rounded operands of 2^-9 each, and a softmax that turns an error of scores near 6 into a relative one.
        assert deviation(found[name].detach(), expected.detach()) < 8 * 2**-8, name
    assert deviation(found["d weight"], exact["d weight"]) > 1e-4


def test_a_target_out_of_range_is_named() -> None:
    x, weight = torch.zeros(2, 3), torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"^targets: expected less than 4, got 4$"):
        native.cross_entropy(x, weight, None, torch.tensor([0, 4]))


def test_an_id_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match=r"^ids: expected 0\.\.2 \(rows of the table\), got 3$"):
        unroll(GRU(3, 4), Lookup(torch.tensor([[0, 3]]), None), backend="native")
    with pytest.raises(ValueError, match=r"^ids: expected 0\.\.2 \(rows of the table\), got -1$"):
        unroll(GRU(3, 4), Lookup(torch.tensor([[0, -1]]), None), backend="native")


# ----------------------------------------------------------------------------------- law 11: weights


def by_optimiser(layer: Any) -> None:
    with torch.enable_grad():
        layer(random(3, "x", 4, 2, layer.input_size, dtype=torch.float32))[0].sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.5).step()


def through_numpy(layer: Any) -> None:
    layer.weight_hh_l0.detach().numpy()[:] *= -1


def through_data(layer: Any) -> None:
    layer.weight_ih_l0.data[0] += 1


def through_a_view_made_before(layer: Any) -> None:
    layer.view_made_before += 1


def by_load_state_dict(layer: Any) -> None:
    layer.load_state_dict({name: t * 0.5 for name, t in layer.state_dict().items()})


def by_load_state_dict_assigning(layer: Any) -> None:
    layer.load_state_dict({name: t * 0.5 for name, t in layer.state_dict().items()}, assign=True)


def by_tying(layer: Any) -> None:
    layer.weight_hh_l0 = layer.weight_ih_l0


def by_registering(layer: Any) -> None:
    layer.register_parameter("weight_hh_l0", torch.nn.Parameter(layer.weight_hh_l0.detach() * 2))


def by_parametrising(layer: Any) -> None:
    parametrizations.weight_norm(layer, "weight_hh_l0")
    layer.parametrizations.weight_hh_l0.original0.data.mul_(3)


def by_pruning(layer: Any) -> None:
    prune.l1_unstructured(layer, "weight_hh_l0", 0.5)


def by_swapping_the_bias(layer: Any) -> None:
    layer.bias_hh_l0 = torch.nn.Parameter(layer.bias_hh_l0.detach() + 1)


def by_casting_there_and_back(layer: Any) -> None:
    layer.bfloat16().float()


CHANGES = [
    by_optimiser, through_numpy, through_data, through_a_view_made_before, by_load_state_dict,
    by_load_state_dict_assigning, by_tying, by_registering, by_parametrising, by_pruning, by_swapping_the_bias,
    by_casting_there_and_back,
]  # fmt: skip


def output_of(layer: Any, x: Tensor, hx: Any) -> Tensor:
    return layer(x, hx)[0]


def called(layer: Any, call: Callable[[Any, Tensor, Any], Tensor] = output_of) -> list[tuple[Tensor, Tensor]]:
    """What it gives natively, and what by the reference, for one step and many, one row and many, while training and
    not. One step of few rows is what the kernels do without laying weights out."""
    found = []
    for steps, batch in ((1, 1), (1, 6), (9, 1), (9, 6)):
        x = random(7, "x", steps, batch, layer.input_size, dtype=torch.float32)
        hx: Any = random(7, "h", 1, batch, layer.hidden_size, dtype=torch.float32)
        hx = (hx, hx + 1) if layer.mode == "LSTM" else hx
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            layer.train(mode is torch.enable_grad)
            with mode():
                layer.backend = "reference"
                expected = call(layer, x, hx).detach().clone()
                layer.backend = "auto"
                found.append((call(layer, x, hx).detach().clone(), expected))
    return found


def expect_fresh(fresh: list[tuple[Tensor, Tensor]], stale: list[tuple[Tensor, Tensor]]) -> None:
    """Assert that what came natively is the reference's, and another than before."""
    for (ours, expected), (before, _) in zip(fresh, stale, strict=True):
        # Nine steps of sums of some 20 terms: 4 ulp x sqrt(180).
        agree({"output": ours}, {"output": expected}, 4 * ULP * 14)
        assert not torch.equal(ours, before)


@every_layer
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_changed_weight_is_used_at_once(kind: str, change: Callable[[Any], None]) -> None:
    """By whatever means it was changed, whoever called before."""
    torch.manual_seed(0)
    layer = getattr(unrolled.nn, kind)(3, 3)
    layer.view_made_before = layer.weight_hh_l0.detach()[1]
    assert choose_backend(layer.cells()[0][0], "auto") == "native"
    stale = called(layer)
    change(layer)
    expect_fresh(called(layer), stale)


@every_layer
def test_functional_call_uses_what_it_is_given(kind: str) -> None:
    torch.manual_seed(0)
    layer = getattr(unrolled.nn, kind)(3, 3)
    new = {name: t.detach() * -1 for name, t in layer.named_parameters()}
    before = called(layer)
    expect_fresh(called(layer, lambda layer, x, hx: torch.func.functional_call(layer, new, (x, hx))[0]), before)
    for (a, _), (b, _) in zip(called(layer), before, strict=True):
        assert torch.equal(a, b)


@every_layer
def test_a_deep_copy_has_weights_of_its_own(kind: str) -> None:
    torch.manual_seed(0)
    layer = getattr(unrolled.nn, kind)(3, 3)
    before = called(layer)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight_hh_l0.mul_(-1)
    expect_fresh(called(twin), before)
    for (a, _), (b, _) in zip(called(layer), before, strict=True):
        assert torch.equal(a, b)


@every_cell
def test_a_changed_weight_of_a_core_is_used_at_once(name: str) -> None:
    core = unrolled.nn.Core(name, 5, 6, 2)
    ids = torch.tensor([[0, 1], [4, 2], [3, 3]])

    def run() -> list[Tensor]:
        with torch.no_grad():
            found = [core(Lookup(ids, None)).outputs, core.step(Lookup(ids[0], None), core.initial_state(2))[0]]
        return [*found, core(Lookup(ids, None)).outputs.detach()]

    before = run()
    for parameter in core.parameters():
        parameter.detach().numpy()[:] *= -0.5
    after = run()
    core.backend = "reference"
    for stale, ours, expected in zip(before, after, run(), strict=True):
        # Three steps of two layers, sums of some 12 terms: 4 ulp x sqrt(72).
        agree({"y": ours}, {"y": expected}, 4 * ULP * 9)
        assert not torch.equal(stale, ours)


# ------------------------------------------------------------------------------------ where it applies


@every_cell
def test_auto_is_native_in_float32_on_the_cpu(name: str) -> None:
    case = Case(name, steps=4, batch=3, inputs=2, hidden=3)
    cell = case.build(torch.float32).bind()
    assert choose_backend(cell, "auto") == "native"
    with bfloat16():
        assert choose_backend(cell, "auto") == "native"
    run = unroll(cell, leaf(case.sequence(torch.float32)), all_states=True)
    agree(results_of(run), results_of(unroll(cell, case.sequence(torch.float32), all_states=True, backend="native")), 0)
    assert "Recorded" in repr(run.outputs.grad_fn)


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: LSTM(2, 3).double(), "the weights are float64, and the native kernels take float32"),
        (lambda: LSTM(2, 3).bfloat16(), "the weights are bfloat16, and the native kernels take float32"),
        (lambda: GRU(2, 3).to("meta"), "the weights are on meta"),
    ],
)
def test_the_kernels_say_why_they_cannot_run(make: Any, reason: str) -> None:
    cell = make()
    x = torch.zeros(4, 2, 2, dtype=cell.weight_hh.dtype, device=cell.weight_hh.device)
    with refused(ModelError, f"backend 'native' cannot run here: {reason}; use 'auto' or 'reference'"):
        unroll(cell, x, backend="native")
    assert unroll(cell, x).outputs.shape == (4, 2, 3)


def test_the_kernels_take_no_other_autocast_than_bfloat16s() -> None:
    reason = "autocast is on for another dtype than bfloat16"
    with torch.autocast("cpu", torch.float16):
        with refused(ModelError, f"backend 'native' cannot run here: {reason}; use 'auto' or 'reference'"):
            unroll(RNN(2, 3), torch.zeros(4, 2, 2), backend="native")
        assert choose_backend(RNN(2, 3).bind(), "auto") == "tape"


def test_a_users_cell_is_not_run_natively() -> None:
    class Own:
        def initial_state(self, batch: int) -> Any: ...
        def step(self, x: Any, state: Any) -> Any: ...

    with refused(ModelError, "backend 'native' runs the built-in cells; Own needs 'reference'"):
        choose_backend(Own(), "native")


# --------------------------------------------------------------- instruction sets, and none: in new processes


def in_a_new_process(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    tests = str(Path(__file__).parent)
    paths = os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


CHECK = """
    import torch
    from strategies import CELLS, Case, agree, run_case
    from test_native import is_as_exact_as_the_reference, is_as_exact_under_autocast
    from unrolled import native

    print(dict(native.instruction_sets())["{name}"])
    for cell in CELLS:
        for hidden, inputs in ((5, 17), (33, 16), (65, 3)):
            case = Case(cell, 9, 7, inputs, hidden, seed=1, lengths=(9, 1, 0, 4, 9, 8, 2), reverse=hidden == 5)
            is_as_exact_as_the_reference(case)
            is_as_exact_under_autocast(case)
        case, found = Case(cell, 5, 3, 65, 129), []
        for count in (2, 1):
            torch.set_num_threads(count)
            found.append(run_case(case, "native", torch.float32))
        agree(*found, 0)
"""


def sets(*presences: str) -> list[str]:
    return [name for name, presence in native.instruction_sets() if presence in presences]


@pytest.mark.parametrize("name", sets("available", "in use"))
def test_an_instruction_set_can_be_forced(name: str) -> None:
    done = in_a_new_process(CHECK.format(name=name), UNROLLED_ISA=name)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "in use\n"


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    """Unknown; or one that this processor lacks: each machine has its own, so there the extension is a stand-in."""
    done = in_a_new_process(
        """
        import os, sys, types
        from unrolled.errors import ConfigError

        def refused(message):
            try:
                import unrolled.native
            except ConfigError as error:
                assert str(error) == message, error
                print("refused")

        known = "known are generic, avx2, avx512, avx512bf16"
        refused(f"UNROLLED_ISA: unknown instruction set 'avx3': {known}")

        def lacking(name):
            raise ValueError(f"this processor has no {name}")
        sys.modules["unrolled._native"] = types.SimpleNamespace(use_instruction_set=lacking)
        os.environ["UNROLLED_ISA"] = "avx512"
        refused("UNROLLED_ISA: this processor has no avx512")
        """,
        UNROLLED_ISA="avx3",
    )
    assert (done.stdout, done.returncode) == ("refused\n" * 2, 0), done.stderr


def test_without_the_extension_the_tape_runs_and_it_says_why() -> None:
    done = in_a_new_process(
        """
        import sys
        sys.modules["unrolled._native"] = None  # as if it were not there
        import torch
        from unrolled import native, nn
        from unrolled.errors import ModelError
        from unrolled.unroll import choose_backend

        why = native.why_absent()
        assert "a C++20 compiler (CXX=/nonexistent/c++ is none)" in why, why
        assert "make setup" in why or "pip install" in why, why
        assert native.instruction_sets() == [] and native.threads() == "none" and native.scratch_held() == 0
        layer, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
        assert choose_backend(layer.cells()[0][0], "auto") == "tape"
        layer(x)[0].sum().backward()
        with torch.no_grad():
            layer(x, lengths=[5, 0])
        layer.backend = "native"
        try:
            layer(x)
        except ModelError as error:
            reason = f"the native kernels are not there: {why}"
            assert str(error) == f"backend 'native' cannot run here: {reason}; use 'auto' or 'reference'", error
            print("refused")
        """,
        CXX="/nonexistent/c++",
    )
    assert (done.stdout, done.returncode) == ("refused\n", 0), done.stderr
