"""What every numeric test draws from: sizes, ragged lengths, resets, states, weights; and how results are compared.

Sizes come from hypothesis and shrink; the numbers follow from the drawn seed, so that a failing example prints small
and can be built again. All numbers are exact in float32: the float32 and the float64 run of a case have equal inputs.
States are nonzero with h != c, lengths ragged with empty rows, T and B may be 0.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import oracle
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from unrolled import cells
from unrolled.cells import BoundCell, GatedCell, Lookup
from unrolled.errors import UnrolledError
from unrolled.unroll import Unrolled, unroll

CELLS = {"rnn": cells.RNN, "rnn_relu": cells.ReluRNN, "lstm": cells.LSTM, "gru": cells.GRU}

BACKENDS = ("reference", "tape")
"""Every numeric test runs on each of these."""

FAST_BACKENDS = tuple(backend for backend in BACKENDS if backend != "reference")
"""Those that are judged by the reference (law 6)."""

ROUNDING = 1e-12
"""How far two float64 computations of the same numbers may lie apart, relative to the largest number of the tensor
(or to 1). They differ in the order of summation and in how a gate is written: some 100 terms rounded at 1.1e-16 each,
over at most 8 steps whose gain is about 1, so 1e-14 is usual. A wrong term or a wrong formula shows above 1e-3."""


# -------------------------------------------------------------------------------------------- numbers


def random(seed: int, name: str, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers that follow from the seed and the name, exact in float32."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.randn(shape, generator=generator).to(dtype)


def nested(values: Any, *shape: int) -> Tensor:
    """The oracle's lists as a float64 tensor of this shape, which empty lists do not tell."""
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


# -------------------------------------------------------------------------------------- a cell over time


@dataclass(frozen=True)
class Case:
    """A built-in cell, a sequence and all that `unroll` takes with it."""

    cell: str
    steps: int
    batch: int
    inputs: int
    hidden: int
    bias: bool = True
    reverse: bool = False
    lengths: tuple[int, ...] | None = None
    reset: tuple[tuple[bool, ...], ...] | None = None
    seed: int = 0

    def build(self, dtype: torch.dtype = torch.float64) -> GatedCell:
        """The cell; its weights are such that a step's gain is about 1."""
        cell = CELLS[self.cell](self.inputs, self.hidden, self.bias)
        with torch.no_grad():
            for name, parameter in cell.named_parameters():
                scale = {"weight_ih": self.inputs**-0.5, "weight_hh": 0.7 * self.hidden**-0.5}.get(name, 0.5)
                parameter.copy_(random(self.seed, name, *parameter.shape) * scale)
        return cell.to(dtype)

    def sequence(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return random(self.seed, "inputs", self.steps, self.batch, self.inputs, dtype=dtype)

    def state(self, dtype: torch.dtype = torch.float64) -> Any:
        kind = CELLS[self.cell].equation.state
        return kind(*(random(self.seed, f"{name}0", self.batch, self.hidden, dtype=dtype) for name in kind._fields))

    def resets(self) -> Tensor | None:
        if self.reset is None:
            return None
        return torch.tensor(self.reset, dtype=torch.bool).reshape(self.steps, self.batch)

    def options(self) -> dict[str, Any]:
        """lengths, reset and reverse, as `unroll` takes them."""
        return {"lengths": self.lengths, "reset": self.resets(), "reverse": self.reverse}

    def valid(self) -> Tensor:
        """Where a step is a row's own, `[T B]`."""
        sizes = torch.tensor([self.steps] * self.batch if self.lengths is None else self.lengths, dtype=torch.int64)
        return torch.arange(self.steps)[:, None] < sizes

    def oracle(self) -> oracle.Run:
        """The case as the oracle computes it."""
        return oracle.run(
            self.cell,
            oracle_weights(self.build()),
            self.sequence().tolist(),
            [field.tolist() for field in self.state()],
            lengths=self.lengths,
            reverse=self.reverse,
            reset=None if self.reset is None else self.resets().tolist(),  # type: ignore[union-attr]
        )


@st.composite
def ragged(draw: st.DrawFn, steps: int, batch: int, least: int = 0) -> tuple[int, ...]:
    """Lengths in any order; more often than chance would have it one row is full and one is empty."""
    return tuple(draw(st.sampled_from([least, steps]) | st.integers(least, steps)) for _ in range(batch))


@st.composite
def marks(draw: st.DrawFn, steps: int, batch: int) -> tuple[tuple[bool, ...], ...]:
    """Resets `[T B]`, in padding and at the edges too."""
    bits = st.integers(0, 2 ** (steps * batch) - 1)
    chosen = draw(bits) & draw(bits)  # a quarter of all; one number is drawn faster than a boolean each
    return tuple(tuple(bool(chosen >> (t * batch + b) & 1) for b in range(batch)) for t in range(steps))


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    cell: str | None = None,
    least_steps: int = 0,
    least_batch: int = 0,
    lengths: bool | None = None,
    reset: bool | None = None,
    reverse: bool | None = None,
) -> Case:
    """Any case; lengths, reset and reverse: always (True), never (False), or either."""
    steps, batch = draw(st.integers(least_steps, 6)), draw(st.integers(least_batch, 4))

    def wanted(choice: bool | None) -> bool:
        return draw(st.booleans()) if choice is None else choice

    return Case(
        cell=draw(st.sampled_from(sorted(CELLS))) if cell is None else cell,
        steps=steps,
        batch=batch,
        inputs=draw(st.integers(1, 5)),
        hidden=draw(st.sampled_from([1, 2, 3, 5, 8])),
        bias=draw(st.booleans()),
        reverse=wanted(reverse),
        lengths=draw(ragged(steps, batch)) if wanted(lengths) else None,
        reset=draw(marks(steps, batch)) if wanted(reset) else None,
        seed=draw(st.integers(0, 999)),
    )


WIDE = (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 47, 64, 65)
"""Sizes at the kernels' edges: a vector has 4, 8 or 16 numbers, a panel of columns up to 64."""


@st.composite
def wide_cases(draw: st.DrawFn, *, cell: str | None = None, least_steps: int = 1, least_batch: int = 1) -> Case:
    """Cases for the kernels: widths around theirs, rows for several of their tiles (of up to 8), and for more than the
    256 rows of a block."""
    steps, batch = draw(
        st.tuples(st.integers(least_steps, 6), st.integers(least_batch, 9))
        | st.sampled_from([(1, 17), (2, 25), (3, 13), (9, 4), (9, 33), (12, 25), (20, 2)])
    )
    return Case(
        cell=draw(st.sampled_from(sorted(CELLS))) if cell is None else cell,
        steps=steps,
        batch=batch,
        inputs=draw(st.sampled_from(WIDE)),
        hidden=draw(st.sampled_from(WIDE)),
        bias=draw(st.booleans()),
        reverse=draw(st.booleans()),
        lengths=draw(st.none() | ragged(steps, batch)),
        reset=draw(st.none() | marks(steps, batch)),
        seed=draw(st.integers(0, 999)),
    )


@st.composite
def lookups(draw: st.DrawFn, case: Case) -> Lookup:
    """Inputs of a case by number: one-hot, or rows of a float64 table of fewer or more rows than there are steps."""
    symbols = draw(st.sampled_from([None, 1, 3, 40]))
    count = case.inputs if symbols is None else symbols
    generator = torch.Generator().manual_seed(zlib.crc32(f"{case.seed} ids".encode()))
    ids = torch.randint(count, (case.steps, case.batch), generator=generator)
    return Lookup(ids, None if symbols is None else random(case.seed, "table", count, case.inputs))


CORNERS = {
    "no steps": {"steps": 0, "batch": 2},
    "no rows": {"steps": 3, "batch": 0},
    "one of each": {"steps": 1, "batch": 1, "inputs": 1, "hidden": 1},
    "all rows empty": {"steps": 3, "batch": 2, "lengths": (0, 0)},
    "ragged, marked, reverse": {
        "steps": 5,
        "batch": 4,
        "lengths": (5, 0, 1, 3),
        "reset": tuple(tuple((t + b) % 3 == 0 for b in range(4)) for t in range(5)),
        "reverse": True,
    },
}


def corner_cases() -> list[tuple[str, Case]]:
    """(what it is, case) for every cell: the sizes that chance may miss."""
    return [
        (f"{cell}: {name}", Case(**{"cell": cell, "inputs": 3, "hidden": 5, "seed": 7, **corner}))
        for cell in CELLS
        for name, corner in CORNERS.items()
    ]


# -------------------------------------------------------------------------------------------- layers


@dataclass(frozen=True)
class LayerCase:
    """A layer as torch.nn makes it and what it is given. T, B >= 1 and lengths >= 1, as torch demands."""

    mode: str
    inputs: int
    hidden: int
    layers: int
    bias: bool
    bidirectional: bool
    steps: int
    batch: int
    lengths: tuple[int, ...]
    batch_first: bool
    given_state: bool
    seed: int

    def build(self, package: Any, **extras: Any) -> Any:
        """The layer out of `torch.nn` or `unrolled.nn`, in float64. Not seeded: copy one's weights to the other."""
        kind = "RNN" if self.mode.startswith("RNN") else self.mode
        if kind == "RNN":
            extras["nonlinearity"] = self.mode.removeprefix("RNN_").lower()
        return getattr(package, kind)(
            self.inputs,
            self.hidden,
            self.layers,
            bias=self.bias,
            batch_first=self.batch_first,
            bidirectional=self.bidirectional,
            dtype=torch.float64,
            **extras,
        )

    def sequence(self) -> Tensor:
        """`[T B I]`, whatever `batch_first` says."""
        return random(self.seed, "inputs", self.steps, self.batch, self.inputs)

    def state(self) -> Any:
        """None, a tensor, or a pair for LSTM."""
        if not self.given_state:
            return None
        shape = (self.layers * (1 + self.bidirectional), self.batch, self.hidden)
        h, c = (random(self.seed, name, *shape) for name in ("h0", "c0"))
        return (h, c) if self.mode == "LSTM" else h


@st.composite
def layer_cases(draw: st.DrawFn, *, wide: bool = False) -> LayerCase:
    """wide: with sizes at the kernels' edges, see `WIDE`."""
    steps, batch = draw(st.integers(1, 4 if wide else 5)), draw(st.integers(1, 17 if wide else 4))
    return LayerCase(
        mode=draw(st.sampled_from(["RNN_TANH", "RNN_RELU", "LSTM", "GRU"])),
        inputs=draw(st.sampled_from(WIDE) if wide else st.integers(1, 4)),
        hidden=draw(st.sampled_from(WIDE if wide else [1, 2, 5])),
        layers=draw(st.integers(1, 2 if wide else 3)),
        bias=draw(st.booleans()),
        bidirectional=draw(st.booleans()),
        steps=steps,
        batch=batch,
        lengths=draw(ragged(steps, batch, least=1)),
        batch_first=draw(st.booleans()),
        given_state=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )


# ------------------------------------------------------------------------------ results and gradients


def named(name: str, value: Any) -> dict[str, Tensor]:
    """The tensors in a tensor, a state or a tuple of such, by name: `{"state.h": ..., "state.c": ...}`."""
    if value is None:
        return {}
    if isinstance(value, Tensor):
        return {name: value}
    fields = getattr(value, "_fields", None) or [str(k) for k in range(len(value))]
    return {
        key: t for field, part in zip(fields, value, strict=True) for key, t in named(f"{name}.{field}", part).items()
    }


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def gradients(results: Mapping[str, Tensor], leaves: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """`{"d leaf": ...}` of the sum of all results, every element of them times a random number of its own."""
    weighted = [(r, random(seed, f"weight of {name}", *r.shape, dtype=r.dtype)) for name, r in results.items()]
    weighted = [(r, weight) for r, weight in weighted if r.requires_grad]
    if not weighted:
        return {f"d {name}": torch.zeros_like(t) for name, t in leaves.items()}
    outputs, weights = zip(*weighted, strict=True)
    grads = torch.autograd.grad(outputs, list(leaves.values()), weights, allow_unused=True, materialize_grads=True)
    return {f"d {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def results_of(run: Unrolled) -> dict[str, Tensor]:
    return {**named("outputs", run.outputs), **named("state", run.state), **named("states", run.states)}


def run_case(
    case: Case,
    backend: str,
    dtype: torch.dtype = torch.float64,
    *,
    inputs: Tensor | Lookup | None = None,
    runner: Callable[..., Unrolled] = unroll,
    only: Iterable[str] | None = None,
    autocast: torch.dtype | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Every result of a case and every gradient: of inputs (or their table), initial state and weights.

    inputs: in place of the case's own. only: the results (`"outputs"`, `"state.c"`, ...) that the loss is made of.
    autocast: the dtype to run under; the results are then made float32, in which the loss is computed.
    """
    cell = case.build(dtype)
    state = type(case.state())(*(leaf(t) for t in case.state(dtype)))
    if isinstance(inputs, Lookup):
        x: Any = Lookup(inputs.ids, None if inputs.table is None else leaf(inputs.table.to(dtype)))
        leaves = {} if x.table is None else {"table": x.table}
    else:
        x = leaf(case.sequence(dtype) if inputs is None else inputs)
        leaves = {"inputs": x}
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        run = runner(cell, x, state, **{**case.options(), "all_states": True, "backend": backend, **options})
    results = results_of(run)
    if autocast is not None:
        results = {name: t.float() for name, t in results.items()}
    summed = results if only is None else {name: results[name] for name in only if name in results}
    leaves = {**leaves, **named("initial", state), **dict(cell.named_parameters())}
    return {**{name: t.detach() for name, t in results.items()}, **gradients(summed, leaves, case.seed)}


def agree(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float, names: Sequence[str] | None = None
) -> None:
    """Assert that the tensors of the same name are equal to within `tolerance` x the largest number (or x 1).

    tolerance 0: bit for bit. NaN agrees with nothing.
    """
    chosen = list(expected) if names is None else names
    assert names is not None or list(actual) == list(expected)
    for name in chosen:
        a, e = actual[name], expected[name]
        assert a.shape == e.shape, f"{name}: shape {list(a.shape)}, expected {list(e.shape)}"
        if tolerance == 0:
            assert torch.equal(a, e), f"{name}: not the same bits: {a} and {e}"
        elif e.numel():
            error = float((a.detach().double() - e.detach().double()).abs().max())
            allowed = tolerance * max(1.0, float(e.detach().abs().max()))
            assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g}: {a} and {e}"


def summands(steps: int, batch: int, inputs: int, hidden: int, gates: int, name: str) -> int:
    """How many rounded terms go into one number: those of a row's products over all steps, and for a gradient of a
    weight or a table those of all rows."""
    row = steps * (gates * hidden + inputs)
    return row * batch if name.startswith("d ") and ("weight" in name or "bias" in name or "table" in name) else row


def as_exact_as(
    fast: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    terms: Callable[[str], int],
    names: Iterable[str] | None = None,
) -> None:
    """Law 6 in float32: assert that the error of `fast` against the float64 numbers `exact` is at most twice that of
    `plain`, and 4 ulp x sqrt(summands) of the largest number, or of 1: what is summed is of unit size, and may cancel.

    terms: how many summands a tensor's numbers have.
    """
    ulp = torch.finfo(torch.float32).eps
    assert list(fast) == list(plain) == list(exact)
    for name in exact if names is None else names:
        expected = exact[name].detach()
        assert fast[name].dtype == torch.float32
        assert fast[name].shape == expected.shape
        if expected.numel():
            error, usual = (float((run[name].detach().double() - expected).abs().max()) for run in (fast, plain))
            allowed = 2 * usual + 4 * ulp * math.sqrt(terms(name)) * max(1.0, float(expected.abs().max()))
            assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g}"


def refused(error: type[UnrolledError], message: str) -> Any:
    """`pytest.raises` of this very message, or of its beginning where it ends in `...`."""
    pattern = re.escape(message.removesuffix("...")) + ("" if message.endswith("...") else "$")
    return pytest.raises(error, match="^" + pattern)


def oracle_weights(cell: GatedCell | BoundCell) -> oracle.Weights:
    """A cell's weights as the oracle takes them."""
    weights = cell.bind().weights if isinstance(cell, GatedCell) else cell.weights
    return oracle.Weights(*(None if t is None else t.tolist() for t in weights))
