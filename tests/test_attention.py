"""Attention: the equations, one number at a time; real source steps only; a memory that many rows look at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import ROUNDING, agree, gradients, leaf, ragged, random, refused
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unrolled import attention
from unrolled.attention import ATTENTIONS, Attention, Memory
from unrolled.errors import ConfigError, ShapeError

every_kind = pytest.mark.parametrize("kind", ATTENTIONS)


@dataclass(frozen=True)
class Look:
    """Some queries and the sentences they look at."""

    target: int
    source: int
    batch: int
    query_size: int
    memory_size: int
    lengths: tuple[int, ...]
    seed: int

    def queries(self, kind: str, dtype: torch.dtype = torch.float64) -> Tensor:
        same = kind in ("dot", "strongest")
        size = self.memory_size if same else self.query_size
        return random(self.seed, "queries", self.target, self.batch, size, dtype=dtype)

    def states(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return random(self.seed, "states", self.source, self.batch, self.memory_size, dtype=dtype)

    def build(self, kind: str, dtype: torch.dtype = torch.float64) -> Attention:
        look = Attention(kind, self.queries(kind).shape[2], self.memory_size)
        with torch.no_grad():
            for name, parameter in look.named_parameters():
                parameter.copy_(random(self.seed, name, *parameter.shape))
        return look.to(dtype)


@st.composite
def looks(draw: st.DrawFn, *, least: int = 0) -> Look:
    source, batch = draw(st.integers(least, 5)), draw(st.integers(least, 4))
    return Look(
        target=draw(st.integers(least, 4)),
        source=source,
        batch=batch,
        query_size=draw(st.integers(1, 4)),
        memory_size=draw(st.integers(1, 4)),
        lengths=draw(ragged(source, batch)),
        seed=draw(st.integers(0, 999)),
    )


def score(kind: str, look: Attention, s: list[float], h: list[float]) -> float:
    weights = {name: parameter.tolist() for name, parameter in look.named_parameters()}

    def product(matrix: list[list[float]], vector: list[float]) -> list[float]:
        return [math.fsum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]

    if kind in ("dot", "strongest"):
        return product([s], h)[0]
    key = product(weights["key.weight"], h)
    if kind == "general":
        return product([s], key)[0]
    inner = [math.tanh(a + b) for a, b in zip(product(weights["query.weight"], s), key, strict=True)]
    return product([weights["v"]], inner)[0]


def by_hand(kind: str, look: Attention, s: list[float], states: list[list[float]]) -> tuple[list[float], list[float]]:
    """Context and weights of one decoder state over one sentence's real steps."""
    scores = [score(kind, look, s, h) for h in states]
    if kind == "strongest":
        weights = [float(j == scores.index(max(scores))) for j in range(len(scores))]
    else:
        each = [math.exp(x - max(scores)) for x in scores]
        weights = [x / math.fsum(each) for x in each]
    size = look.memory_size
    return [math.fsum(a * h[i] for a, h in zip(weights, states, strict=True)) for i in range(size)], weights


@every_kind
@settings(max_examples=60)
@given(case=looks())
def test_the_equation_one_number_at_a_time(kind: str, case: Look) -> None:
    look, queries, states = case.build(kind), case.queries(kind), case.states()
    context, weights = look(queries, look.remember(states, case.lengths))
    assert context.shape == (case.target, case.batch, case.memory_size)
    assert weights.shape == (case.target, case.batch, case.source)
    for u in range(case.target):
        for b, length in enumerate(case.lengths):
            expected = by_hand(kind, look, queries[u, b].tolist(), states[:length, b].tolist())
            padded = expected[1] + [0.0] * (case.source - length)
            agree({"c": context[u, b]}, {"c": torch.tensor(expected[0], dtype=torch.float64)}, ROUNDING)
            agree({"a": weights[u, b]}, {"a": torch.tensor(padded, dtype=torch.float64)}, ROUNDING)


# Law 10 and law 2.


@every_kind
@settings(max_examples=60)
@given(case=looks())
def test_weights_are_a_distribution_over_real_steps(kind: str, case: Look) -> None:
    look = case.build(kind, torch.float32)
    _, weights = look(case.queries(kind, torch.float32), look.remember(case.states(torch.float32), case.lengths))
    assert bool((weights >= 0).all())
    for b, length in enumerate(case.lengths):
        assert not weights[:, b, length:].any()
        sums = weights[:, b].double().sum(dim=1)
        # A float32 softmax of at most 5 numbers.
        assert torch.allclose(sums, torch.full_like(sums, float(length > 0)), atol=1e-6, rtol=0)


@every_kind
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
@given(case=looks(least=1))
def test_padding_changes_nothing(kind: str, garbage: float, case: Look) -> None:
    look, queries = case.build(kind), leaf(case.queries(kind))
    clean, dirty = leaf(case.states()), case.states()
    for b, length in enumerate(case.lengths):
        dirty[length:, b] = garbage
    dirty.requires_grad_()
    runs = []
    for states in (clean, dirty):
        results = dict(zip(("context", "weights"), look(queries, look.remember(states, case.lengths)), strict=True))
        leaves = {"queries": queries, "states": states, **dict(look.named_parameters())}
        runs.append({**results, **gradients(results, leaves, case.seed)})
    agree(runs[1], runs[0], 0)
    for b, length in enumerate(case.lengths):
        assert not runs[1]["d states"][length:, b].any()
        assert torch.isfinite(runs[1]["d queries"]).all()


@every_kind
@given(case=looks(least=1), data=st.data())
def test_a_row_does_not_depend_on_the_others(kind: str, case: Look, data: st.DataObject) -> None:
    look, queries, states = case.build(kind), case.queries(kind), case.states()
    context, weights = look(queries, look.remember(states, case.lengths))
    b = data.draw(st.integers(0, case.batch - 1))
    length = case.lengths[b]
    alone = look(queries[:, [b]], look.remember(states[:length, [b]]))
    agree({"c": alone[0], "a": alone[1]}, {"c": context[:, [b]], "a": weights[:, [b], :length]}, ROUNDING)


@every_kind
@given(case=looks(least=1))
def test_all_queries_at_once_are_one_after_the_other(kind: str, case: Look) -> None:
    look, queries = case.build(kind), case.queries(kind)
    memory = look.remember(case.states(), case.lengths)
    context, weights = look(queries, memory)
    for u in range(case.target):
        one = look(queries[u], memory)
        agree({"c": one[0], "a": one[1]}, {"c": context[u], "a": weights[u]}, ROUNDING)


# Gradients.


@pytest.mark.parametrize("kind", ["dot", "general", "additive"])
@settings(max_examples=15)
@given(case=looks(least=1))
def test_gradients(kind: str, case: Look) -> None:
    look = case.build(kind)
    names = [name for name, _ in look.named_parameters()]

    def run(queries: Tensor, states: Tensor, *weights: Tensor) -> Any:
        with_weights = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(Both(look, case.lengths), add("look", with_weights), (queries, states))

    inputs = (leaf(case.queries(kind)), leaf(case.states()), *(leaf(p) for p in look.parameters()))
    assert torch.autograd.gradcheck(run, inputs)


class Both(torch.nn.Module):
    """remember and look as one function of everything."""

    def __init__(self, look: Attention, lengths: tuple[int, ...]) -> None:
        super().__init__()
        self.look, self.lengths = look, lengths

    def forward(self, queries: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        context, weights = self.look(queries, self.look.remember(states, self.lengths))
        return context, weights


def add(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": weight for name, weight in weights.items()}


@given(case=looks(least=1))
def test_the_choice_of_the_strongest_learns_as_the_softmax_would(case: Look) -> None:
    strongest, dot = case.build("strongest"), case.build("dot")
    queries, states = leaf(case.queries("dot")), leaf(case.states())
    context, weights = strongest(queries, strongest.remember(states, case.lengths))
    results, leaves = {"context": context, "weights": weights}, {"queries": queries, "states": states}
    actual = gradients(results, leaves, case.seed)
    soft = dot(queries, dot.remember(states, case.lengths))[1]
    frozen, hard = states.detach().transpose(0, 1), weights.detach()
    taken = torch.einsum("ubs,bsh->ubh", soft, frozen) + torch.einsum("ubs,sbh->ubh", hard, states)
    expected = gradients({"context": taken, "weights": soft}, leaves, case.seed)
    agree(actual, expected, ROUNDING)


# The additive scores go block by block.


@settings(max_examples=40)
@given(case=looks(), block=st.integers(1, 60))
def test_blocks_change_nothing(case: Look, block: int) -> None:
    runs = []
    for size in (block, 1 << 16):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "_BLOCK", size)
            look, queries, states = case.build("additive"), leaf(case.queries("additive")), leaf(case.states())
            context, weights = look(queries, look.remember(states, case.lengths))
            leaves = {"queries": queries, "states": states, **dict(look.named_parameters())}
            results = {"context": context, "weights": weights}
            runs.append({**results, **gradients(results, leaves, case.seed)})
    agree(runs[0], runs[1], ROUNDING)


def test_additive_scores_of_a_large_case_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    tanh = attention._tanh

    def seen(q: Tensor, k: Tensor) -> Tensor:
        nonlocal largest
        result = tanh(q, k)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(attention, "_tanh", seen)
    look = Attention("additive", 64, 64)
    states, queries = torch.randn(40, 8, 64, requires_grad=True), torch.randn(30, 8, 64, requires_grad=True)
    look(queries, look.remember(states))[0].sum().backward()
    assert largest <= attention._BLOCK < 30 * 40 * 8 * 64 / 4


# A memory is a value that rows are taken of.


@every_kind
@settings(max_examples=60)
@given(case=looks(least=1), data=st.data())
def test_rows_of_a_memory(kind: str, case: Look, data: st.DataObject) -> None:
    look, queries, states = case.build(kind), case.queries(kind), leaf(case.states())
    memory = look.remember(states, case.lengths)
    before = (memory.values.clone(), memory.mask.clone())
    rows = list(range(case.batch))
    chosen = memory
    for _ in range(data.draw(st.integers(1, 3))):
        picked = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=7))
        rows = [rows[i] for i in picked]
        chosen = chosen.select(torch.tensor(picked))
    lengths = [case.lengths[row] for row in rows]
    copied = look.remember(states[:, rows], lengths)
    results = [dict(zip("ca", look(queries[:, rows], m), strict=True)) for m in (chosen, copied)]
    agree(results[0], results[1], ROUNDING)
    leaves = {"states": states, **dict(look.named_parameters())}
    agree(gradients(results[0], leaves), gradients(results[1], leaves), ROUNDING)
    assert torch.equal(chosen.states, copied.states)
    assert chosen.lengths.tolist() == lengths
    # What it was taken of is as it was.
    assert torch.equal(memory.values, before[0])
    assert torch.equal(memory.mask, before[1])
    assert memory.sentence is None


@given(case=looks(least=1), data=st.data())
def test_rows_by_mask(case: Look, data: st.DataObject) -> None:
    memory = case.build("dot").remember(case.states(), case.lengths)
    mask = torch.tensor([data.draw(st.booleans()) for _ in range(case.batch)])
    assert torch.equal(memory.select(mask).states, memory.states[:, mask])
    assert torch.equal(memory.select(mask).lengths, memory.lengths[mask])


def test_a_sentence_is_not_copied_for_the_rows_of_a_beam_and_is_let_go_when_none_looks_at_it() -> None:
    look = Attention("general", 3, 4)
    memory = look.remember(torch.randn(5, 6, 4))
    beams = memory.select(torch.arange(6).repeat_interleave(5))
    assert beams.values is memory.values
    assert beams.keys is memory.keys
    assert beams.crowd == 5
    few = beams.select(torch.arange(10, 15))
    assert few.values.shape == (1, 5, 4)
    assert few.keys.shape == (1, 5, 3)


def test_a_memory_cannot_be_changed() -> None:
    memory = Attention("dot", 2, 2).remember(torch.randn(3, 1, 2))
    with pytest.raises(AttributeError):
        memory.values = memory.keys  # type: ignore[misc]
    assert isinstance(memory, Memory)


# Precision.


@every_kind
def test_under_autocast_softmax_is_in_float32(kind: str) -> None:
    case = Look(3, 4, 3, 5, 5, (4, 0, 2), 1)
    look, queries, states = (
        case.build(kind, torch.float32),
        leaf(case.queries(kind).float()),
        leaf(case.states().float()),
    )
    plain = look(queries, look.remember(states, case.lengths))
    with torch.autocast("cpu", torch.bfloat16):
        context, weights = look(queries, look.remember(states, case.lengths))
    assert weights.dtype == torch.float32
    sums = weights.sum(dim=2)
    # Within float32's rounding; bfloat16's would be 4e-3.
    assert torch.allclose(sums, torch.tensor([1.0, 0.0, 1.0]).expand(3, 3), atol=1e-6)
    if kind != "strongest":  # whose choice may be another
        # Scores of up to about 10 whose terms were rounded to 8 bits.
        assert torch.allclose(weights, plain[1], atol=0.1)
    (context.float().sum() + weights.sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in look.parameters() if p.grad is not None)
    assert queries.grad is not None
    assert torch.isfinite(queries.grad).all()


# What is refused.


class _Products(TorchDispatchMode):
    """Notes of every batched product what it multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bmm.default:
            self.dtypes += [t.dtype for t in args]
        return func(*args, **(kwargs or {}))


@every_kind
def test_products_of_many_shapes_are_in_float32_under_autocast(kind: str) -> None:
    """For each shape of a product in bfloat16 torch keeps code: a training would grow by a gigabyte and more."""
    look = Attention(kind, 4, 4)
    states = torch.randn(5, 3, 4, requires_grad=True)
    with _Products() as products:
        with torch.autocast("cpu", torch.bfloat16):
            memory = look.remember(states.bfloat16(), [5, 3, 1])
            context, weights = look(torch.randn(2, 3, 4, requires_grad=True), memory)
        (context.sum() + weights.square().sum()).backward()
    assert set(products.dtypes) == {torch.float32}
    assert context.dtype == weights.dtype == torch.float32


@pytest.mark.parametrize("kind", ["dot", "strongest"])
def test_sizes_that_cannot_be_multiplied_are_refused(kind: str) -> None:
    with refused(
        ConfigError,
        f"attention: {kind} multiplies decoder states with encoder states, which have 3 and 6 numbers: make the sizes "
        "equal (a bidirectional encoder has twice its hidden size), or use general or additive",
    ):
        Attention(kind, 3, 6)


def test_other_settings_are_refused() -> None:
    with refused(ConfigError, "attention: unknown kind 'generel': did you mean 'general'?"):
        Attention("generel", 3, 3)
    with refused(ConfigError, "attention.query_size: expected at least 1, got 0"):
        Attention("general", 0, 3)
    with refused(ConfigError, "attention.memory_size: expected at least 1, got -1"):
        Attention("general", 3, -1)


def test_shapes_are_refused() -> None:
    look = Attention("dot", 3, 3)
    states = torch.zeros(4, 2, 3)
    with refused(ShapeError, "states: expected [S, B, H_m=3], got [4, 2, 5]"):
        look.remember(torch.zeros(4, 2, 5))
    with refused(ShapeError, "lengths: expected [B=2], got [3]"):
        look.remember(states, [1, 2, 3])
    with refused(ShapeError, "lengths: expected 0..4 (the number of source steps), got 1..5"):
        look.remember(states, [1, 5])
    with refused(ShapeError, "lengths: expected 0..4 (the number of source steps), got -1..2"):
        look.remember(states, [-1, 2])
    with refused(ShapeError, "lengths: expected whole numbers, got float32"):
        look.remember(states, torch.tensor([1.0, 2.0]))
    memory = look.remember(states)
    with refused(ShapeError, "queries: expected [U, R=2, H=3], got [1, 3, 3]"):
        look(torch.zeros(1, 3, 3), memory)
    with refused(ShapeError, "queries: expected [R=2, H=3], got [2, 4]"):
        look(torch.zeros(2, 4), memory)


def test_it_says_what_it_is() -> None:
    assert repr(Attention("dot", 3, 3)) == "Attention(dot, query_size=3, memory_size=3)"
