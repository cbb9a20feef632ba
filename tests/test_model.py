"""A model: both ends and the core between them; stepping, reading at once and the loss say the same."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import KOREAN, small_model
from strategies import ROUNDING, agree, named, random
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unrolled.cells import HiddenState, Lookup, LSTMState, map_state
from unrolled.checkpoints import weights_of
from unrolled.config import resolve
from unrolled.decoding import generate
from unrolled.errors import ConfigError, ModelError
from unrolled.kinds.text import IGNORE, NextWriter, TextReader
from unrolled.model import LanguageModel
from unrolled.nn import CoreState
from unrolled.vocabulary import build_vocabulary

INPUTS: dict[str, dict[str, Any]] = {
    "one-hot": {},
    "embedding": {"embedding": 5},
    "tied": {"embedding": 8, "tied": True},
    "jamo": {"unit": "jamo"},
    "two layers": {"layers": 2, "dropout": 0.4},
}
# Each runs for up to twenty kinds of model.
few_examples = settings(max_examples=15)
every_cell = pytest.mark.parametrize("cell", ["rnn", "rnn_relu", "lstm", "gru"])
every_input = pytest.mark.parametrize("kind", INPUTS)


def build(cell: str, kind: str) -> LanguageModel:
    model = small_model(**{"cell": cell, **INPUTS[kind]})
    if cell == "rnn_relu":  # the only state without bounds: weights this large would have it explode
        with torch.no_grad():
            for parameter in model.core.parameters():
                parameter.mul_(0.2)
    return model


def draw_ids(model: LanguageModel, steps: int, batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(model.vocabulary), (steps, batch), generator=generator)


def draw_state(model: LanguageModel, batch: int, seed: int = 0) -> CoreState:
    """Nonzero, h != c, another one in each layer."""
    count = iter(range(100))
    return map_state(lambda t: random(seed, f"state {next(count)}", *t.shape), model.begin(batch=batch))


def results(scores: Tensor, state: CoreState) -> dict[str, Tensor]:
    return {"scores": scores.detach(), **named("state", map_state(Tensor.detach, state))}


def test_the_form_follows_from_the_ends() -> None:
    form = small_model().form
    assert str(form) == "text -> next: many-to-many, aligned, autoregressive (language model)"
    assert (form.input, form.output) == ("text", "next")


# Law 1 on the model's level.


@every_cell
@every_input
@few_examples
@given(steps=st.integers(1, 6), batch=st.integers(1, 3), seed=st.integers(0, 99))
def test_stepping_is_reading_at_once(cell: str, kind: str, steps: int, batch: int, seed: int) -> None:
    model = build(cell, kind)
    ids, state = draw_ids(model, steps, batch, seed), draw_state(model, batch, seed)
    scores, after = model(ids, state)
    rows = []
    for row in ids:
        row_scores, state = model.step(row, state)
        rows.append(row_scores)
    agree(results(torch.stack(rows), state), results(scores, after), ROUNDING)


@every_cell
def test_stepping_is_reading_at_once_in_float32(cell: str) -> None:
    # 40 steps of some 50 sums, each rounded at 6e-8; the weights of these models amplify a little.
    model = small_model(cell=cell, dtype=torch.float32) if cell != "rnn_relu" else build(cell, "one-hot").float()
    ids = draw_ids(model, 40, 2)
    state = model.begin(batch=2)
    rows = []
    for row in ids:
        row_scores, state = model.step(row, state)
        rows.append(row_scores)
    agree(results(torch.stack(rows), state), results(*model(ids)), 1e-4)


@every_cell
@few_examples
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_begin_reads_each_prompt_to_its_own_end(cell: str, lengths: list[int], seed: int) -> None:
    model = build(cell, "embedding")
    ids = draw_ids(model, 5, len(lengths), seed)
    begun = model.begin(ids, lengths)
    for row, length in enumerate(lengths):
        state = model.begin()
        for step in range(length):
            _, state = model.step(ids[step, row : row + 1], state)
        agree(named("state", begun.select(torch.tensor([row]))), named("state", state), ROUNDING)


def test_begin_without_a_prompt_is_the_initial_state() -> None:
    for cell, kind in {"lstm": LSTMState, "gru": HiddenState, "rnn": HiddenState}.items():
        state = small_model(cell=cell, layers=2).begin(batch=3)
        assert [type(layer) for layer in state.cells] == [kind, kind]
        assert all(t.shape == (3, 8) and not t.any() for layer in state.cells for t in layer)


@every_cell
@few_examples
@given(marks=st.lists(st.booleans(), min_size=1, max_size=7), seed=st.integers(0, 99))
def test_a_reset_begins_a_document(cell: str, marks: list[bool], seed: int) -> None:
    model = build(cell, "one-hot")
    ids, before = draw_ids(model, len(marks), 2, seed), draw_state(model, 2, seed)
    reset = torch.tensor(marks)[:, None].expand(-1, 2)
    scores, state = model(ids, before, reset=reset)
    # The same, document by document, in a way that knows no reset.
    starts = [0, *(t for t, mark in enumerate(marks) if mark and t), len(marks)]
    pieces, after = [], before
    for begin, end in itertools.pairwise(starts):
        piece, after = model(ids[begin:end], model.begin(batch=2) if marks[begin] else before)
        pieces.append(piece)
    agree(results(torch.cat(pieces), after), results(scores, state), ROUNDING)


# The loss.


def cross_entropy(scores: list[float], target: int) -> float:
    top = max(scores)
    return top + math.log(math.fsum(math.exp(score - top) for score in scores)) - scores[target]


@every_cell
@every_input
@few_examples
@given(steps=st.integers(1, 5), batch=st.integers(1, 3), ignored=st.sets(st.integers(0, 14)), seed=st.integers(0, 99))
def test_loss_is_the_summed_cross_entropy(
    cell: str, kind: str, steps: int, batch: int, ignored: set[int], seed: int
) -> None:
    model = build(cell, kind)
    ids, state = draw_ids(model, steps, batch, seed), draw_state(model, batch, seed)
    targets = draw_ids(model, steps, batch, seed + 1)
    targets.view(-1)[[place for place in ignored if place < steps * batch]] = IGNORE
    scores, after = model(ids, state)
    expected = math.fsum(
        cross_entropy(scores[t, b].tolist(), int(targets[t, b]))
        for t in range(steps)
        for b in range(batch)
        if targets[t, b] != IGNORE
    )
    loss, final = model.loss(ids, targets, state)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected, rel=ROUNDING, abs=ROUNDING)
    agree(named("state", final), named("state", after), 0)


def test_targets_that_are_all_ignored_cost_nothing() -> None:
    model = small_model()
    ids = draw_ids(model, 3, 2)
    loss, _ = model.loss(ids, torch.full_like(ids, IGNORE))
    assert loss.item() == 0
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_the_state_carries_the_loss_over_a_border() -> None:
    model = small_model(layers=2)
    ids, targets = draw_ids(model, 7, 2), draw_ids(model, 7, 2, seed=1)
    whole, _ = model.loss(ids, targets)
    first, state = model.loss(ids[:3], targets[:3])
    second, _ = model.loss(ids[3:], targets[3:], state)
    assert (first + second).item() == pytest.approx(whole.item(), rel=ROUNDING)


def test_the_loss_of_bfloat16_scores_is_computed_in_float32() -> None:
    writer = NextWriter(8, 5).bfloat16()
    hidden = random(0, "hidden", 4, 2, 8, dtype=torch.bfloat16)
    loss = writer.loss(hidden, torch.zeros(4, 2, dtype=torch.int64))
    assert loss.dtype == torch.float32


# Dropout is for training only.


def hidden_in(model: LanguageModel) -> Iterator[list[Tensor]]:
    """What the writer is given while the test runs."""
    seen: list[Tensor] = []
    original: Callable[..., Tensor] = model.writer.forward

    def forward(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return original(hidden)

    model.writer.forward = forward  # type: ignore[method-assign]
    yield seen


@pytest.mark.parametrize("locked", [True, False])
def test_dropout_before_the_output_while_training(locked: bool) -> None:
    model = small_model(dropout=0.5, locked=locked, hidden=16)
    seen = next(hidden_in(model))
    ids = draw_ids(model, 30, 2)
    model(ids)
    model(ids)
    assert torch.equal(seen[0], seen[1])
    model.train()
    torch.manual_seed(1)  # the locked mask has 32 values only
    model(ids)
    dropped = seen[2] == 0
    assert 0.3 < dropped.double().mean() < 0.7
    assert torch.allclose(seen[2][~dropped], 2 * seen[0][~dropped], rtol=1e-12)
    same_at_all_steps = bool((dropped == dropped[0]).all())
    assert same_at_all_steps == locked
    stepped, _ = model.step(ids[0], model.begin(batch=2))
    model.eval()
    assert torch.equal(stepped, model.step(ids[0], model.begin(batch=2))[0])


# A one-hot vector is looked up, never multiplied.


class Operations(TorchDispatchMode):
    """Every operation that torch runs, and the shapes of what goes in and comes out."""

    PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "_linear_pointwise", "matmul", "einsum", "mv", "addmv")

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.products: list[set[tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.names.add(name)
        if name in self.PRODUCTS:
            self.products.append({tuple(t.shape) for t in (*args, result) if isinstance(t, Tensor)})
        return result

    def with_matrix(self, rows: int, columns: int) -> list[set[tuple[int, ...]]]:
        """Products with a matrix of this shape, or its transpose, as an operand or as the result."""
        return [shapes for shapes in self.products if shapes & {(rows, columns), (columns, rows)}]


# An RNN's input matrix cannot be told from its output matrix by shape; it goes through the same code.
@pytest.mark.parametrize("backend", ["reference", "tape"])
@pytest.mark.parametrize("cell, gates", [("lstm", 4), ("gru", 3)])
@pytest.mark.parametrize("embedding", [None, 5])
def test_one_hot_input_is_never_multiplied(cell: str, gates: int, embedding: int | None, backend: str) -> None:
    model = small_model(cell=cell, dtype=torch.float32, backend=backend, embedding=embedding).train()
    symbols, rows = len(model.vocabulary), gates * 8
    assert len({symbols, rows, 8, 5, 11 * 3, 11, 3, 1}) == 8, "shapes must tell the matrices apart"
    ids, targets = draw_ids(model, 11, 3), draw_ids(model, 11, 3, seed=1)
    with Operations() as training:
        loss, _ = model.loss(ids, targets)
        loss.backward()  # type: ignore[no-untyped-call]
    with Operations() as writing:
        "".join(generate(model, KOREAN[:5], length=9, seed=1))
    for seen in (training, writing):
        assert "one_hot" not in seen.names
        assert seen.products, "no product was seen at all"
        if embedding is None:
            assert not seen.with_matrix(rows, symbols)
        else:  # the table may be projected, whole, and that is a product without a row for each step
            assert all({*shape} <= {rows, symbols, 5} for shapes in seen.with_matrix(symbols, 5) for shape in shapes)
    first = model.core.layers[0][0]  # type: ignore[index]
    learned = first.weight_ih if embedding is None else model.reader.table
    assert learned.grad.abs().sum() > 0


def test_the_check_finds_a_product_with_one_hot_vectors() -> None:
    model = small_model(dtype=torch.float32, embedding=5)
    x = F.one_hot(draw_ids(model, 11, 3), len(model.vocabulary)).float().flatten(0, 1)
    with Operations() as seen:
        F.linear(x, random(0, "input matrix", 32, len(model.vocabulary), dtype=torch.float32))
        x @ model.reader.table
    assert seen.with_matrix(32, len(model.vocabulary))
    assert not all(
        {*shape} <= {32, len(model.vocabulary), 5}
        for shapes in seen.with_matrix(len(model.vocabulary), 5)
        for shape in shapes
    )


def test_a_lookup_is_the_product_with_one_hot_vectors() -> None:
    model = small_model()
    ids = draw_ids(model, 6, 2)
    cell = model.core.layers[0][0].bind()  # type: ignore[index]
    multiplied = F.one_hot(ids, len(model.vocabulary)).double() @ cell.weights.ih.t() + cell.weights.bias_ih
    agree({"x": cell.project(Lookup(ids, None))}, {"x": multiplied}, ROUNDING)


def test_the_reader_knows_its_width() -> None:
    assert TextReader(7, None).step_size == 7
    assert TextReader(7, 3).step_size == 3


# Settings that do not fit together.


def test_tied_weights_are_one_matrix() -> None:
    model = small_model(embedding=8, tied=True)
    assert model.writer.weight is model.reader.table
    assert len([name for name in weights_of(model) if name in ("writer.weight", "reader.table")]) == 1
    assert not any(p is model.reader.table for name, p in model.named_parameters() if name != "reader.table")


def test_tied_needs_equal_sizes() -> None:
    with pytest.raises(ConfigError, match=r"output.tied: .* expected input.embedding == core.hidden \(8\), got 5"):
        small_model(embedding=5, tied=True)
    with pytest.raises(ConfigError, match=r"output.tied: .* \(8\), got null \(one-hot\)"):
        small_model(tied=True)
    with pytest.raises(ConfigError, match=r"must be equal to share a matrix, got 5 and 8: set input.embedding=8"):
        NextWriter(8, 3, torch.nn.Parameter(torch.zeros(3, 5)))


def test_an_unknown_cell_names_the_nearest() -> None:
    config, vocabulary = resolve({"core": {"cell": "gruu"}}), build_vocabulary("char", ["ab"])
    with pytest.raises(ConfigError, match=r"core.cell: unknown cell 'gruu': did you mean 'gru'\?"):
        LanguageModel(config, vocabulary)


def test_a_language_model_cannot_look_ahead() -> None:
    with pytest.raises(ConfigError, match=r"core.bidirectional: a language model reads left to right"):
        small_model(bidirectional=True)


def test_a_cell_of_ones_own_needs_vectors() -> None:
    with pytest.raises(ModelError, match=r"set input.embedding to a size"):
        Lookup(torch.tensor([1]), None).vectors()
