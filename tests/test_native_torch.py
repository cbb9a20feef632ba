"""The native kernels under what torch does around a layer: compile, export, second derivatives, ranks and threads."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import CELLS, Case, agree, as_exact_as, gradients, leaf, named, random, results_of, run_case, summands
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import unrolled.nn
from unrolled import native
from unrolled.cells import Lookup, map_state
from unrolled.unroll import unroll

every_cell = pytest.mark.parametrize("name", sorted(CELLS))
every_layer = pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])

ULP = torch.finfo(torch.float32).eps
LENGTHS = [6, 2, 0]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Torch's own small operations only wait for more, longest where others compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(kind: str, **options: Any) -> Any:
    """Two layers, both directions; the same weights in every process."""
    torch.manual_seed(0)
    return getattr(unrolled.nn, kind)(5, 7, 2, bidirectional=True, backend="native", **options)


def sequence(seed: int = 0, steps: int = 6, batch: int = 3) -> Tensor:
    return random(seed, "x", steps, batch, 5, dtype=torch.float32)


def initial(kind: str, batch: int = 3) -> Any:
    h, c = (random(0, n, 4, batch, 7, dtype=torch.float32) for n in "hc")
    return (h, c) if kind == "LSTM" else h


def run(layer: Any, kind: str, call: Callable[..., Any] | None = None, **options: Any) -> dict[str, Tensor]:
    """Every result and gradient of a layer, called by `call` if given."""
    x = leaf(sequence())
    state = initial(kind)
    state = tuple(map(leaf, state)) if kind == "LSTM" else leaf(state)
    out, final = (layer if call is None else call)(x, state, **options)
    results = {"output": out, **named("final", final)}
    leaves = {"input": x, **named("initial", state), **dict(layer.named_parameters())}
    return {**{name: t.detach() for name, t in results.items()}, **gradients(results, leaves)}


# ------------------------------------------------------------------------------------- second derivatives


def second_derivatives(case: Case, backend: str, dtype: torch.dtype, inputs: Lookup | None = None) -> dict[str, Tensor]:
    """Of a sum of results, and of the square of its gradient, with respect to everything."""
    cell, state = case.build(dtype), map_state(leaf, case.state(dtype))
    if inputs is None:
        x: Any = leaf(case.sequence(dtype))
        leaves = {"inputs": x}
    else:
        x = Lookup(inputs.ids, leaf(inputs.table.to(dtype)))  # type: ignore[union-attr]
        leaves = {"table": x.table}
    leaves = {**leaves, **named("initial", state), **dict(cell.named_parameters())}
    results = results_of(unroll(cell, x, state, **case.options(), all_states=True, backend=backend))
    total = sum((t * random(case.seed, name, *t.shape, dtype=dtype)).sum() for name, t in results.items())
    first = torch.autograd.grad(total, list(leaves.values()), create_graph=True)  # type: ignore[arg-type]
    square = sum(g.square().sum() for g in first)
    second = torch.autograd.grad(square, list(leaves.values()), allow_unused=True, materialize_grads=True)  # type: ignore[arg-type]
    return {
        **{f"d {name}": g.detach() for name, g in zip(leaves, first, strict=True)},
        **{f"dd {name}": g for name, g in zip(leaves, second, strict=True)},
    }


@every_cell
@pytest.mark.parametrize("looked_up", [False, True])
@pytest.mark.parametrize("more", [{}, {"lengths": (5, 0, 2), "reverse": True}, {"reset": ((False, True, False),) * 5}])
def test_second_derivatives_are_the_references(name: str, looked_up: bool, more: dict[str, Any]) -> None:
    """With create_graph=True, by law 6; a first derivative's summands are again summed."""
    case = Case(name, 5, 3, 4, 6, seed=2, **more)
    inputs = None
    if looked_up:
        inputs = Lookup(torch.tensor([[0, 1, 2], [2, 1, 0]] * 2 + [[1, 1, 1]]), random(2, "table", 3, 4))
    fast, plain, exact = (
        second_derivatives(case, backend, dtype, inputs)
        for backend, dtype in (("native", torch.float32), ("reference", torch.float32), ("reference", torch.float64))
    )
    gates = CELLS[name].equation.gates
    as_exact_as(fast, plain, exact, lambda key: summands(5, 3, 4, 6, gates, "d weight") * 4)
    if name != "rnn_relu":
        assert fast["dd initial.h"].any()


@every_layer
def test_a_gradient_penalty_trains(kind: str) -> None:
    """What second derivatives are mostly for, through a whole layer."""
    found = []
    for backend in ("native", "reference"):
        layer = build(kind)
        layer.backend = backend
        x = leaf(sequence())
        (grad,) = torch.autograd.grad(layer(x, lengths=LENGTHS)[0].sum(), x, create_graph=True)
        grad.square().sum().backward()
        found.append({name: p.grad for name, p in layer.named_parameters() if p.grad is not None})
    # A float32 sum of some 1000 terms of two layers: 4 ulp x sqrt(1000).
    agree(*found, 4 * ULP * 32)


@every_cell
def test_second_derivatives_through_a_carry_and_tied_weights(name: str) -> None:
    """Inputs that depend on the weights they meet: a weight's gradient must not count that way too."""
    case = Case(name, 4, 2, 6, 6, seed=3)
    found = []
    for backend, dtype in (("native", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        cell, x, state = case.build(dtype), leaf(case.sequence(dtype)), map_state(leaf, case.state(dtype))
        first = unroll(cell, x, state, backend=backend)
        carried = unroll(cell, first.outputs, first.state, backend=backend)  # the layer above has the same weights
        leaves = {"inputs": x, **named("initial", state), **dict(cell.named_parameters())}
        grads = torch.autograd.grad(carried.outputs.square().sum(), list(leaves.values()), create_graph=True)
        square = sum(g.square().sum() for g in grads)
        second = torch.autograd.grad(square, list(leaves.values()))  # type: ignore[arg-type]
        found.append(
            {
                f"{d} {k}": g.detach()
                for d, gs in (("d", grads), ("dd", second))
                for k, g in zip(leaves, gs, strict=True)
            }
        )
    gates = CELLS[name].equation.gates
    as_exact_as(*found, lambda key: summands(8, 2, 6, 6, gates, "d weight") * 4)


def test_a_linear_layer_and_cross_entropy_have_second_derivatives() -> None:
    targets, found = torch.tensor([2, -1, 0, 3]), []
    for ours in (True, False):
        leaves = {
            n: leaf(random(0, n, *s, dtype=torch.float32)) for n, s in (("x", (4, 5)), ("w", (4, 5)), ("b", (4,)))
        }
        x, weight, bias = leaves.values()
        if ours:
            y = native.linear(x, weight, bias).tanh()
            loss = native.cross_entropy(y @ weight, weight, bias, targets)
        else:
            y = torch.nn.functional.linear(x, weight, bias).tanh()
            scores = torch.nn.functional.linear(y @ weight, weight, bias)
            loss = torch.nn.functional.cross_entropy(scores, targets, ignore_index=-1, reduction="sum")
        first = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), list(leaves.values()))  # type: ignore[arg-type]
        found.append({**named("d", first), **named("dd", second)})
    # Sums of at most 20 terms, nested four deep: 4 ulp x sqrt(80).
    agree(*found, 4 * ULP * 9)


# ------------------------------------------------------------------------------------- compile and export


allowed = torch._dynamo.config.patch(allow_rnn=True)
"""Dynamo takes subclasses of torch.nn.RNNBase into a graph only so; without it, it leaves them out of the graph."""


@allowed
@pytest.mark.parametrize(
    "kind, ragged, bf16",
    [("RNN", True, False), ("GRU", True, True), ("LSTM", True, False), ("LSTM", False, False), ("LSTM", True, True)],
)
def test_a_compiled_layer_is_the_layer(kind: str, ragged: bool, bf16: bool) -> None:
    """In one graph, bit for bit: values, gradients, and without a gradient."""
    layer, options = build(kind), {"lengths": torch.tensor(LENGTHS)} if ragged else {}
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        agree(run(layer, kind, compiled, **options), run(layer, kind, **options), 0)
        with torch.no_grad():
            agree(*(named("", call(sequence(), initial(kind), **options)) for call in (compiled, layer)), 0)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_layer_that_dynamo_leaves_out_is_the_layer(kind: str) -> None:
    layer = build(kind)

    def model(x: Tensor, state: Any, lengths: Tensor) -> Any:
        out, final = layer(x.tanh(), state, lengths=lengths)
        return out * 2, final

    torch._dynamo.reset()
    lengths = torch.tensor(LENGTHS)
    compiled = torch.compile(model, backend="aot_eager")
    agree(run(layer, kind, compiled, lengths=lengths), run(layer, kind, model, lengths=lengths), 0)


@allowed
@pytest.mark.parametrize("name", ["rnn", "lstm"])
def test_a_compiled_core_is_the_core(name: str) -> None:
    """A core is no torch.nn.RNNBase: Dynamo takes it as it is, lookups and documents too."""
    core = unrolled.nn.Core(name, 5, 7, 2, bidirectional=True, backend="native")
    ids, table = torch.tensor([[0, 1], [3, 2], [1, 1], [0, 3]]), leaf(random(0, "table", 4, 5, dtype=torch.float32))
    reset, lengths = torch.tensor([[False, True]] * 4), torch.tensor([4, 2])

    def model(ids: Tensor, table: Tensor | None, lengths: Tensor) -> tuple[Tensor, ...]:
        run = core(Lookup(ids, table), lengths=lengths, reset=reset)
        return run.outputs, *run.state.cells[0]

    for chosen in (table, None):
        torch._dynamo.reset()
        found = []
        for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
            results = named("", call(ids, chosen, lengths))
            leaves = {**dict(core.named_parameters()), **named("table", chosen)}
            found.append({**results, **gradients(results, leaves)})
        agree(found[1], found[0], 0)


@allowed
@pytest.mark.parametrize("kind, dynamic", [("LSTM", None), ("LSTM", True), ("GRU", True)])
def test_a_compiled_layer_takes_other_sizes(kind: str, dynamic: bool | None) -> None:
    layer = build(kind)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for steps, batch in ((6, 3), (9, 2), (4, 5)):
        x, lengths = sequence(steps, steps, batch), torch.arange(batch).clamp_max(steps)
        agree(named("", compiled(x, lengths=lengths)), named("", layer(x, lengths=lengths)), 0)


@allowed
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a compiler")
def test_a_layer_in_a_model_compiled_by_inductor() -> None:
    layer = build("LSTM")

    def model(x: Tensor, lengths: Tensor) -> Tensor:
        return layer(x.tanh() * 2, lengths=lengths)[0].relu().sum(0)

    torch._dynamo.reset()
    found = []
    for call in (model, torch.compile(model, fullgraph=True)):
        x = leaf(sequence())
        out = call(x, torch.tensor(LENGTHS))
        leaves = {"input": x, **dict(layer.named_parameters())}
        found.append({"output": out.detach(), **gradients({"output": out}, leaves)})
    # Its tanh is another than torch's, a few ulp away; sums of some 300 terms.
    agree(found[1], found[0], 8 * ULP * 17)


class Ragged(torch.nn.Module):
    """As `torch.export` wants it: every input by position."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        return self.layer(x, lengths=lengths)


@every_layer
def test_an_exported_layer_is_the_layer(kind: str, tmp_path: Path) -> None:
    """Saved, loaded and run, on another number of rows."""
    layer = build(kind).eval()
    rows = torch.export.Dim("rows", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(layer, (sequence(),), dynamic_shapes=({1: rows},), strict=False)
        torch.export.save(program, tmp_path / "dense.pt2")
        dense = torch.export.load(tmp_path / "dense.pt2").module()
        x = sequence(1, batch=4)
        agree(named("", dense(x)), named("", layer(x)), 0)
        example = (sequence(), torch.tensor(LENGTHS))
        program = torch.export.export(Ragged(layer), example, dynamic_shapes=({1: rows}, {0: rows}), strict=False)
        lengths = torch.tensor([0, 6, 1, 3])
        agree(named("", program.module()(x, lengths)), named("", layer(x, lengths=lengths)), 0)


# --------------------------------------------------------------------------------- the operators themselves


def operator_arguments(cell: str, direction: str, looked_up: bool, lengths: Tensor | None) -> tuple[Any, ...]:
    """Those of `unrolled::layer`, every weight wanting a gradient."""
    gates, count = CELLS[cell].equation.gates * 4, 2 if direction == "both" else 1
    numbers = lambda name, *shape: leaf(random(0, name, *shape, dtype=torch.float32) * 0.5)  # noqa: E731
    x = None if looked_up else numbers("x", 5, 3, 2)
    ids = torch.tensor([[0, 1, 2]] * 5) if looked_up else None
    weights: list[Any] = []
    for d in range(count):
        source = numbers(f"table {d}", 6, gates) if looked_up else numbers(f"ih {d}", gates, 2)
        weights += [source, numbers(f"hh {d}", gates, 4), None if looked_up else numbers(f"bi {d}", gates), None]
        weights[-1] = numbers(f"bh {d}", gates)
    weights += [None] * (8 - len(weights))
    reset = torch.tensor([[False, True, False]] * 5)
    return (
        x, ids, numbers("h", count, 3, 4), numbers("c", count, 3, 4) if cell == "lstm" else None,
        lengths, reset, reset if count == 2 else None, *weights, cell, direction, False, True, 2,
    )  # fmt: skip


@every_cell
@pytest.mark.parametrize("direction", ["forward", "reverse", "both"])
@pytest.mark.parametrize("looked_up", [False, True])
def test_the_layers_operator_keeps_torchs_rules(name: str, direction: str, looked_up: bool) -> None:
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    arguments = operator_arguments(name, direction, looked_up, torch.tensor([5, 0, 3]))
    torch.library.opcheck(native._layer_op, arguments, test_utils=tests)


@every_cell
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_layers_operator_can_be_traced(name: str) -> None:
    arguments = operator_arguments(name, "both", False, None)  # without padding, where the tape is undefined
    torch.library.opcheck(native._layer_op, arguments, test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 4])
def test_the_output_sides_operators_keep_torchs_rules(bias: bool, rows: int) -> None:
    x, weight = leaf(torch.randn(rows, 5)), leaf(torch.randn(7, 5))
    b = leaf(torch.randn(7)) if bias else None
    torch.library.opcheck(native._linear_op, (x, weight, b, False))
    targets = torch.tensor([0, 6, -1, 2][:rows], dtype=torch.int64)
    torch.library.opcheck(native._cross_entropy_op, (x, weight, b, targets, False, True))
    plain = [None if t is None else t.detach() for t in (x, weight, b)]
    torch.library.opcheck(native._cross_entropy_op, (*plain, targets, False, False))


# ------------------------------------------------------------------------------ modes that torch can be in


class Watch(TorchDispatchMode):
    """Lists the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(str(function))
        return function(*args, **(kwargs or {}))


@every_layer
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_dispatch_mode_sees_the_layer(kind: str, mode: Any) -> None:
    """Counters, tracers and the like see an operator; the numbers are the same."""
    layer = build(kind)
    with mode():
        expected = named("", layer(sequence(), initial(kind), lengths=LENGTHS))
        with Watch() as watch:
            found = named("", layer(sequence(), initial(kind), lengths=LENGTHS))
    agree(found, expected, 0)
    assert watch.called.count("unrolled.layer.default") == 2
    with torch.no_grad(), Watch() as watch:
        native.linear(torch.zeros(2, 3), torch.zeros(4, 3), None)
        native.cross_entropy(torch.zeros(2, 3), torch.zeros(4, 3), None, torch.zeros(2, dtype=torch.int64))
    assert {"unrolled.linear.default", "unrolled.cross_entropy.default"} <= set(watch.called)


@every_layer
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_fake_tensors_get_the_shapes(kind: str, mode: Any) -> None:
    layer = build(kind)
    with mode(), FakeTensorMode(allow_non_fake_inputs=True):
        out, final = layer(torch.empty(6, 3, 5))
    assert isinstance(out, FakeTensor)
    assert out.shape == (6, 3, 14)
    assert {t.shape for t in (final if kind == "LSTM" else (final,))} == {(4, 3, 7)}


class Tagged(torch.Tensor):
    """A user's own kind of tensor."""


@every_layer
@pytest.mark.parametrize("record", [False, True])
def test_a_subclass_of_tensor_is_a_tensor(kind: str, record: bool) -> None:
    layer = build(kind)
    with torch.set_grad_enabled(record):
        found = layer(sequence().as_subclass(Tagged), lengths=LENGTHS)[0]
        expected = layer(sequence(), lengths=LENGTHS)[0]
    assert torch.equal(found.as_subclass(Tensor), expected)


@every_layer
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_another_default_dtype_is_the_callers_business(kind: str, default: torch.dtype) -> None:
    """`torch.set_default_dtype` is for tensors that do not say theirs: a float32 layer stays one."""
    layer, x, state, targets = build(kind), sequence(), initial(kind), torch.tensor([1, 2, 3])
    weight = random(0, "weight", 6, 3, 14, dtype=torch.float32)

    def work() -> list[dict[str, Tensor]]:
        layer.zero_grad()
        (layer(x, state, lengths=LENGTHS)[0] * weight).sum().backward()
        loss = native.cross_entropy(native.linear(x[0], layer.weight_ih_l0, None), layer.weight_hh_l0.T, None, targets)
        loss.backward()
        with torch.no_grad():
            inferred = {**named("", layer(x)), "y": native.linear(x, layer.weight_ih_l0, None)}
        return [{name: p.grad.clone() for name, p in layer.named_parameters()}, {"loss": loss.detach()}, inferred]

    expected = work()
    torch.set_default_dtype(default)
    try:
        found = work()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(found, expected, strict=True):
        agree(a, b, 0)


@every_layer
@pytest.mark.parametrize("record", [False, True])
def test_another_default_device_is_the_callers_business(kind: str, record: bool) -> None:
    """As in a program whose other tensors are on an accelerator; "meta" stands in for one."""
    layer, x, state = build(kind), sequence(), initial(kind)
    with torch.set_grad_enabled(record):
        expected = named("", layer(x, state))
        with torch.device("meta"):
            agree(named("", layer(x, state)), expected, 0)
            assert layer(x)[0].device.type == "cpu"


@every_layer
def test_autocast_on_and_off(kind: str) -> None:
    """A training step under autocast leaves float32 gradients; outside, results are float32's again."""
    layer = build(kind)
    before = layer(sequence())[0]
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(sequence())[0]
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(layer(sequence())[0], before)
    out.sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}
    assert torch.equal(layer(sequence())[0], before)
    difference = float((out - before).detach().abs().max())
    # Operands of 2^-9: seen, and no more than some tens of them added up.
    assert 2**-13 < difference < 30 * 2**-9


@every_layer
def test_retain_graph(kind: str) -> None:
    layer = build(kind)
    loss = layer(sequence(), lengths=LENGTHS)[0].square().sum()
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in layer.named_parameters()}
    loss.backward()
    agree({name: p.grad for name, p in layer.named_parameters()}, {name: 2 * g for name, g in once.items()}, 0)


@every_layer
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(kind: str, reentrant: bool) -> None:
    layer, found = build(kind), []

    def direct(x: Tensor) -> Tensor:
        return layer(x, lengths=LENGTHS)[0]

    for call in (direct, lambda x: checkpoint(direct, x, use_reentrant=reentrant)):
        layer.zero_grad()
        x = leaf(sequence())
        call(x).square().sum().backward()
        found.append({"input": x.grad, **{name: p.grad.clone() for name, p in layer.named_parameters()}})
    agree(found[1], found[0], 0)


@every_layer
def test_functional_call_passes_gradients_to_what_it_is_given(kind: str) -> None:
    layer = build(kind)
    expected = run(layer, kind)
    given_ = {name: leaf(p) for name, p in layer.named_parameters()}
    out, final = torch.func.functional_call(layer, given_, (sequence(), initial(kind)))
    results = {"output": out, **named("final", final)}
    agree(gradients(results, given_), expected, 0, [f"d {name}" for name in given_])
    assert all(p.grad is None for p in layer.parameters())


@every_layer
def test_torch_func_takes_the_reference_by_itself(kind: str) -> None:
    layer = build(kind)
    layer.backend = "auto"
    expected = run(layer, kind)["d input"]
    weight = random(0, "weight of output", 6, 3, 14, dtype=torch.float32)

    def loss(x: Tensor) -> Tensor:
        out, final = layer(x, initial(kind))
        parts = final if kind == "LSTM" else (final,)
        keys = ["final.0", "final.1"] if kind == "LSTM" else ["final"]
        weights = [random(0, f"weight of {key}", 4, 3, 7, dtype=torch.float32) for key in keys]
        return (out * weight).sum() + sum((t * w).sum() for t, w in zip(parts, weights, strict=True))

    # Sums of some 300 terms.
    agree({"d input": torch.func.grad(loss)(sequence())}, {"d input": expected}, 4 * ULP * 17)


@every_layer
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_computes_the_same(kind: str, duplicate: Any, tmp_path: Path) -> None:
    layer = build(kind)
    layer(sequence())[0].sum().backward()
    agree(run(duplicate(layer), kind), run(layer, kind), 0)
    torch.save(layer, tmp_path / "layer.pt")
    agree(run(torch.load(tmp_path / "layer.pt", weights_only=False), kind), run(layer, kind), 0)


# ----------------------------------------------------------------------------- threads, forks and ranks


def test_many_threads_at_once() -> None:
    """Each has its own results and gradients, whoever else is computing; some share their work out to others."""
    sizes = ((7, 5, 9, 33), (9, 20, 64, 65))
    cases = [Case(name, *size, seed=k, reverse=k == 1) for k, size in enumerate(sizes) for name in sorted(CELLS)]
    expected = [run_case(c, "native", torch.float32) for c in cases]
    failures: list[Any] = []
    begin = threading.Barrier(len(cases))

    def work(k: int) -> None:
        try:
            torch.set_num_threads(1 + k % 3)  # each thread's own number
            begin.wait()
            for _ in range(3):
                agree(run_case(cases[k], "native", torch.float32), expected[k], 0)
        except BaseException as failure:
            failures.append(failure)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(len(cases))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


class Encoded(torch.utils.data.Dataset[Tensor]):
    """Runs a layer in the process that loads."""

    def __init__(self) -> None:
        self.layer = large()

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.layer(random(index, "x", 8, 20, 64, dtype=torch.float32))[0].sum(0)


def large() -> Any:
    """A layer that the kernels share out between threads."""
    torch.manual_seed(0)
    return unrolled.nn.LSTM(64, 64, bidirectional=True, backend="native")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_loaders_forked_workers_run_a_layer() -> None:
    data = Encoded()
    torch.set_num_threads(2)
    expected = [data[k] for k in range(4)]  # the parent's threads have run
    torch.set_num_threads(1)
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for found, row in zip(loader, expected, strict=True):
        assert torch.equal(found, row)
    assert torch.equal(data[0], expected[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("count", [1, 2])
def test_a_forked_child_runs_a_layer(count: int) -> None:
    """On as many threads as its parent, which had used its own, and the parent goes on. All in a process of its own, so
    that a child that hangs is ended with it."""
    program = f"""
import os, torch
from strategies import agree
from test_native_torch import large, random
from unrolled import native
torch.set_num_threads({count})
layer, x = large(), random(0, "x", 8, 20, 64, dtype=torch.float32)
def work():
    layer.zero_grad()
    out = layer(x, lengths=[8] * 19 + [3])[0]
    with torch.no_grad():
        inferred = layer(x)[0]
    return out.detach(), inferred
expected = work()
child = os.fork()
if child == 0:
    try:
        found = work()
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
        assert {count} == 1 or native.threads() == "own (this process was forked)", native.threads()
        grandchild = os.fork()  # and again, from a process that has threads of the kernels' own
        if grandchild == 0:
            assert torch.equal(work()[0], expected[0])
            os._exit(0)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(work()[0], expected[0])
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


RANK = """
import os, sys
from datetime import timedelta
import torch
import unrolled.nn

index, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
if sys.platform == "linux":
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # what this machine's name resolves to is not our business
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/meeting", rank=index, world_size=2, timeout=timedelta(seconds=60)
)
layer, x, lengths = torch.load(f"{folder}/{index}.pt", weights_only=False)
model = torch.nn.parallel.DistributedDataParallel(layer)
model(x, lengths=lengths)[0].square().sum().backward()
torch.save({name: p.grad for name, p in layer.named_parameters()}, f"{folder}/{index}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_ranks_average_their_gradients(tmp_path: Path) -> None:
    """Of two processes. They meet over a file: a port that was free a moment ago may be another's now. And each is
    ended after a time, whatever it waits for, which torch would let it do for half an hour."""
    for index in range(2):
        torch.save((build("LSTM"), sequence(index), LENGTHS), tmp_path / f"{index}.pt")
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(index), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for index in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(said)
    alone = []
    for index in range(2):
        layer = build("LSTM")
        layer(sequence(index), lengths=LENGTHS)[0].square().sum().backward()
        alone.append({name: p.grad for name, p in layer.named_parameters()})
    average = {name: (alone[0][name] + alone[1][name]) / 2 for name in alone[0]}
    for index in range(2):
        found = torch.load(tmp_path / f"{index}.pt")
        agree(found, average, ULP)  # two numbers added and halved
