"""Search: against a search written plainly, against all sequences there are, and its laws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import small_model
from strategies import ROUNDING, random, refused
from torch import Tensor

from unrolled.attention import Attention, Memory
from unrolled.decoding import BeamSettings, Hypothesis, Sampling, beam_search, generate, greedy, sample
from unrolled.decoding import beam as beam_module
from unrolled.decoding.beam import _likeliest
from unrolled.decoding.hypotheses import Allowed
from unrolled.errors import ConfigError, DataError, ModelError, ShapeError
from unrolled.nn import Core, CoreState

START, END = 0, 1


class ToyState(NamedTuple):
    core: CoreState
    memory: Memory | None = None
    attention: Tensor | None = None

    def select(self, rows: Tensor) -> ToyState:
        memory = None if self.memory is None else self.memory.select(rows)
        attention = None if self.attention is None else self.attention[rows]
        return ToyState(self.core.select(rows), memory, attention)


class Toy(torch.nn.Module):
    """A decoder with random weights, so large that what was read makes the next scores clearly differ."""

    def __init__(self, symbols: int, seed: int = 0, *, attends: bool = False, end: float = 0.0) -> None:
        super().__init__()
        size = 6
        self.core = Core("lstm", size, size, backend="reference")
        self.look = Attention("dot", size, size) if attends else None
        self.double()
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(random(seed, name, *parameter.shape))
        self.table = random(seed, "table", symbols, size)
        self.out = random(seed, "out", symbols, size) * 3
        self.bias = torch.zeros(symbols, dtype=torch.float64)
        self.bias[END] += end
        self.sizes: list[int] = []

    def begin(self, seeds: Sequence[int]) -> ToyState:
        """A row per seed, none like another."""
        h, c = (torch.stack([random(seed, name, 6) for seed in seeds]) for name in "hc")
        state = type(self.core.initial_state(1).cells[0])(h, c)
        if self.look is None:
            return ToyState(CoreState((state,)))
        sources = torch.stack([random(seed, "source", 4, 6) for seed in seeds], dim=1)
        memory = self.look.remember(sources, [1 + seed % 4 for seed in seeds])
        return ToyState(CoreState((state,)), memory)

    @torch.no_grad()
    def step(self, ids: Tensor, state: ToyState) -> tuple[Tensor, ToyState]:
        self.sizes.append(len(ids))
        hidden, core = self.core.step(self.table[ids], state.core)
        if self.look is None or state.memory is None:
            return hidden @ self.out.t() + self.bias, ToyState(core)
        context, weights = self.look(hidden, state.memory)
        return (hidden + context) @ self.out.t() + self.bias, ToyState(core, state.memory, weights)


class Table:
    """The scores depend on the last symbol only."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores

    class State(NamedTuple):
        row: Tensor

        def select(self, rows: Tensor) -> Table.State:
            return Table.State(self.row[rows])

    def begin(self, rows: int) -> Table.State:
        return Table.State(torch.arange(rows))

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.scores[ids], state


def recount(model: Toy, seed: int, written: Sequence[int]) -> tuple[list[float], list[Tensor]]:
    """The model's own log-probability of each of these symbols, one row, one step at a time; and what it looked at."""
    state, last, steps, looks = model.begin([seed]), START, [], []
    for symbol in written:
        scores, state = model.step(torch.tensor([last]), state)
        steps.append(float(torch.log_softmax(scores[0], dim=0)[symbol]))
        looks.append(state.attention[0] if state.attention is not None else torch.empty(0))
        last = symbol
    return steps, looks


def check(model: Toy, seed: int, found: Hypothesis, alpha: float) -> None:
    """A hypothesis is worth what the model says (law 9)."""
    steps, looks = recount(model, seed, [*found.ids, *[END] * found.ended])
    assert END not in found.ids
    assert found.steps == pytest.approx(steps, abs=1e-9)
    assert found.log_probability == pytest.approx(math.fsum(steps), abs=1e-9)
    assert found.score == pytest.approx(math.fsum(steps) / len(steps) ** alpha, abs=1e-9)
    if model.look is None:
        assert found.attention is None
    else:
        assert found.attention is not None
        assert torch.allclose(found.attention, torch.stack(looks), atol=1e-12)


@dataclass(frozen=True)
class Search:
    """A toy and a search on it."""

    symbols: int
    seeds: tuple[int, ...]
    settings: BeamSettings
    prefixes: tuple[tuple[int, ...], ...]
    barred: tuple[int, ...]
    end: float
    attends: bool

    def model(self) -> Toy:
        return Toy(self.symbols, attends=self.attends, end=self.end)

    def run(self, only: Sequence[int] | None = None, **changes: Any) -> list[list[Hypothesis]]:
        rows = range(len(self.seeds)) if only is None else only
        model = self.model()
        return beam_search(
            model,
            model.begin([self.seeds[row] for row in rows]),
            rows=len(rows),
            start=START,
            end=END,
            settings=replace(self.settings, **changes),
            prefix=[self.prefixes[row] for row in rows],
            barred=self.barred,
        )


@st.composite
def searches(draw: st.DrawFn, *, beam: int | None = None, longest: int = 7) -> Search:
    symbols = draw(st.integers(4, 9))
    rows = draw(st.integers(1, 4))
    beam = draw(st.integers(1, 5)) if beam is None else beam
    length = draw(st.integers(1, longest))
    forced = st.lists(st.integers(2, symbols - 1), max_size=min(2, length - 1)).map(tuple)
    return Search(
        symbols=symbols,
        seeds=tuple(draw(st.lists(st.integers(0, 99), min_size=rows, max_size=rows))),
        settings=BeamSettings(
            beam=beam,
            length_penalty=draw(st.sampled_from([0.0, 0.6, 1.0, 2.0])),
            n_best=draw(st.sampled_from([1, beam]) | st.integers(1, beam)),
            min_length=draw(st.sampled_from([0, 0, min(2, length - 1)])),
            max_length=length,
            block_ngram=draw(st.sampled_from([0, 0, 2, 3])),
        ),
        prefixes=tuple(draw(forced) if draw(st.booleans()) else () for _ in range(rows)),
        barred=tuple(draw(st.sampled_from([(), (START,), (START, 2)]))),
        end=draw(st.sampled_from([0.0, 2.0, 4.0, -4.0])),
        attends=draw(st.booleans()),
    )


def may_follow(search: Search, row: int, before: Sequence[int], symbol: int) -> bool:
    """One symbol after the other, as the settings say."""
    chosen = search.settings
    if len(before) < len(search.prefixes[row]):
        return symbol == search.prefixes[row][len(before)]
    if symbol in search.barred or (symbol == END and len(before) < chosen.min_length):
        return False
    n, ids = chosen.block_ngram, [*before, symbol]
    return not (n and tuple(ids[-n:]) in list(zip(*(ids[i:-1] for i in range(n)), strict=False)) and len(ids) > n)


class Plain(NamedTuple):
    ended: bool
    score: float
    total: float
    ids: tuple[int, ...]


def plain_search(search: Search, row: int) -> list[Plain]:
    """Beam search over one row, a hypothesis at a time, that never stops before `beam` have ended or all were cut."""
    model, chosen = search.model(), search.settings
    live = [(0.0, (), model.begin([search.seeds[row]]))]
    done: list[Plain] = []
    ended = 0
    for t in range(int(chosen.max_length)):  # type: ignore[arg-type]
        candidates = []
        for total, ids, state in live:
            scores, after = model.step(torch.tensor([ids[-1] if ids else START]), state)
            for symbol, nats in enumerate(torch.log_softmax(scores[0], dim=0).tolist()):
                if may_follow(search, row, ids, symbol):
                    candidates.append((total + nats, symbol, ids, after))
        candidates.sort(key=lambda c: -c[0])
        for total, symbol, ids, _ in candidates[: chosen.beam]:
            if symbol == END:
                done.append(Plain(True, total / (t + 1) ** chosen.length_penalty, total, ids))
                ended += 1
        live = [(total, (*ids, symbol), state) for total, symbol, ids, state in candidates if symbol != END]
        live = live[: chosen.beam]
        if t + 1 == chosen.max_length:
            done += [Plain(False, total / (t + 1) ** chosen.length_penalty, total, ids) for total, ids, _ in live]
        if ended >= chosen.beam:
            break
    return sorted(done, key=lambda found: (not found.ended, -found.score))[: chosen.n_best]


def same(found: Sequence[Hypothesis], expected: Sequence[Any]) -> None:
    assert [(h.ids, h.ended) for h in found] == [(e.ids, e.ended) for e in expected]
    assert [h.score for h in found] == pytest.approx([e.score for e in expected], abs=1e-9)


@settings(max_examples=150)
@given(search=searches())
def test_it_finds_what_a_plain_search_finds(search: Search) -> None:
    expected = [plain_search(search, row) for row in range(len(search.seeds))]
    if not all(expected):
        with pytest.raises(ModelError, match="leave nothing to write"):
            search.run()
        return
    found = search.run()
    for row, seed in enumerate(search.seeds):
        same(found[row], expected[row])
        for hypothesis in found[row]:
            check(search.model(), seed, hypothesis, search.settings.length_penalty)
        order = [(not h.ended, -h.score) for h in found[row]]
        assert order == sorted(order)


@settings(max_examples=25)
@given(search=searches(longest=4), symbols=st.integers(4, 5))
def test_a_wide_beam_finds_the_best_of_all_sequences(search: Search, symbols: int) -> None:
    barred = tuple({*search.barred, START})
    prefixes = tuple(tuple(min(i, symbols - 1) for i in ids) for ids in search.prefixes)
    wide = replace(search.settings, beam=symbols**4, n_best=7)
    search = replace(search, symbols=symbols, settings=wide, barred=barred, prefixes=prefixes)
    longest = int(wide.max_length)  # type: ignore[arg-type]
    others = [i for i in range(symbols) if i != END]
    for row, seed in enumerate(search.seeds):
        every = []
        for length in range(longest + 1):
            for ids in itertools.product(others, repeat=length):
                ended = length < longest
                whole = [*ids, *[END] * ended]
                if all(may_follow(search, row, whole[:i], symbol) for i, symbol in enumerate(whole)):
                    total = math.fsum(recount(search.model(), seed, whole)[0])
                    every.append(Plain(ended, total / len(whole) ** wide.length_penalty, total, ids))
        every.sort(key=lambda found: (not found.ended, -found.score))
        if every:
            same(search.run([row])[0], every[:7])


# Law 9.


@settings(max_examples=60)
@given(search=searches(beam=1, longest=12))
def test_a_beam_of_one_is_greedy(search: Search) -> None:
    search = replace(search, settings=replace(search.settings, block_ngram=0))
    model, chosen = search.model(), search.settings
    found = greedy(
        model,
        model.begin(search.seeds),
        rows=len(search.seeds),
        start=START,
        end=END,
        min_length=chosen.min_length,
        max_length=chosen.max_length,
        prefix=search.prefixes,
        barred=search.barred,
    )
    for row, seed in enumerate(search.seeds):
        written: list[int] = []
        state, last = model.begin([seed]), START
        while len(written) < chosen.max_length and END not in written:  # type: ignore[operator]
            scores, state = model.step(torch.tensor([last]), state)
            order = scores[0].argsort(descending=True).tolist()
            last = next(symbol for symbol in order if may_follow(search, row, written, symbol))
            written.append(last)
        assert [*found[row].ids, *[END] * found[row].ended] == written
        check(model, seed, found[row], 0.0)
    assert [(h.ids, h.steps) for h in found] == [(best.ids, best.steps) for (best,) in search.run()]


@settings(max_examples=60)
@given(search=searches(), data=st.data())
def test_the_rest_of_the_batch_changes_nothing(search: Search, data: st.DataObject) -> None:
    search = replace(search, settings=replace(search.settings, block_ngram=0))
    together = search.run()
    order = data.draw(st.permutations(range(len(search.seeds))))
    shuffled = search.run(order)
    for row, _ in enumerate(search.seeds):
        for other in (search.run([row])[0], shuffled[order.index(row)]):
            same(other, together[row])
            for a, b in zip(other, together[row], strict=True):
                assert a.steps == pytest.approx(b.steps, abs=1e-9)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_language_model_is_one_that_can_be_searched(backend: str) -> None:
    model = small_model("char", dtype=torch.float32, backend=backend)
    ids = torch.from_numpy(model.vocabulary.encode("나는 학교").astype("int64"))
    end = int(model.vocabulary.encode("\n")[0])

    def run(rows: int) -> list[list[Hypothesis]]:
        state = model.begin(ids[:-1, None].expand(-1, rows))
        return beam_search(model, state, rows=rows, start=int(ids[-1]), end=end, settings=BeamSettings(4, n_best=4))

    one, three = run(1), run(3)
    assert [h.ids for h in one[0]] == [h.ids for h in three[2]]
    for best in one[0]:
        whole = torch.tensor([*ids.tolist(), *best.ids, *[end] * best.ended])
        with torch.no_grad():
            scores, _ = model(whole[:-1, None])
        steps = torch.log_softmax(scores[len(ids) - 1 :, 0].double(), dim=1).gather(1, whole[len(ids) :, None])
        # Float32 scores, whose sums are taken in another order.
        assert best.log_probability == pytest.approx(float(steps.sum()), abs=1e-4)


# When it ends.


def test_finished_rows_leave_the_batch() -> None:
    table = torch.zeros(6, 6, dtype=torch.float64)
    model = Counted(table)
    prefixes = [[2] * n for n in (0, 3, 6)]
    table[START, END] = table[2, END] = 50.0
    greedy(model, model.begin(3), rows=3, start=START, end=END, prefix=prefixes, max_length=9)
    assert model.sizes == [3, 2, 2, 2, 1, 1, 1]


class Counted(Table):
    def __init__(self, scores: Tensor) -> None:
        super().__init__(scores)
        self.sizes: list[int] = []

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        self.sizes.append(len(ids))
        return super().step(ids, state)


@pytest.mark.parametrize("alpha, longest, steps", [(0.0, 50, 1), (1.0, 28, 1), (1.0, 50, 2), (1.0, 80, 3)])
def test_it_stops_as_soon_as_nothing_living_can_win(alpha: float, longest: int, steps: int) -> None:
    # The end has probability 0.9, so after n steps the best that lives has n log 0.05, and what can become of it is
    # n log(0.05) / longest^alpha: below log 0.9 from n = 0.0352 longest on.
    model = Counted(torch.tensor([[0.0, 0.9, 0.05, 0.05]] * 4, dtype=torch.float64).log())
    settings = BeamSettings(beam=40, length_penalty=alpha, max_length=longest)
    found = beam_search(model, model.begin(1), rows=1, start=START, end=END, settings=settings)
    assert found[0][0].ids == ()
    assert len(model.sizes) == steps


def test_ended_ones_stand_before_cut_ones() -> None:
    table = torch.tensor([[-math.inf, -3.0, 0.0]] * 3, dtype=torch.float64)
    model = Table(table)
    settings = BeamSettings(beam=2, n_best=2, length_penalty=0, max_length=3)
    (found,) = beam_search(model, model.begin(1), rows=1, start=START, end=END, settings=settings)
    assert [h.ended for h in found] == [True, True]
    settings = replace(settings, max_length=1)
    (found,) = beam_search(model, model.begin(1), rows=1, start=START, end=END, settings=settings)
    assert [(h.ids, h.ended) for h in found] == [((), True), ((2,), False)]


def test_as_many_live_on_as_the_beam_is_wide_whatever_ends() -> None:
    # After two steps "b" and "a" have ended (0.21, 0.20) and c d, a c, b a live (0.198, 0.08, 0.07), the last of which
    # ends third with 0.035. Were there places for two only, it would be a c with 0.0008.
    table = torch.tensor(
        [
            [0, 0, 0.4, 0.35, 0.2, 0.05],  # what follows the start
            [1, 0, 0, 0, 0, 0],  # the end
            [0, 0.5, 0.1, 0.1, 0.2, 0.1],  # a
            [0, 0.6, 0.2, 0.07, 0.07, 0.06],  # b
            [0, 0.01, 0, 0, 0, 0.99],  # c
            [0, 0, 0, 0, 0, 1],  # d
        ],
        dtype=torch.float64,
    )
    model = Table(table.log())
    settings = BeamSettings(beam=3, n_best=3, length_penalty=0, max_length=3)
    (found,) = beam_search(model, model.begin(1), rows=1, start=START, end=END, settings=settings)
    assert [h.ids for h in found] == [(3,), (2,), (3, 2)]
    assert [math.exp(h.score) for h in found] == pytest.approx([0.21, 0.2, 0.035])


def test_the_greatest_length_follows_from_the_source() -> None:
    table = torch.zeros(4, 4, dtype=torch.float64)
    table[:, END] = -50
    model = Table(table)
    settings = BeamSettings(beam=2, max_length=lambda source: 2 * source + 1)
    found = beam_search(model, model.begin(3), rows=3, start=START, end=END, settings=settings, lengths=[0, 3, 1])
    assert [len(best.steps) for (best,) in found] == [1, 7, 3]


def test_no_rows_at_all() -> None:
    model = Table(torch.zeros(4, 4))
    assert beam_search(model, model.begin(0), rows=0, start=START, end=END) == []
    assert sample(model, model.begin(0), rows=0, start=START, end=END, seeds=[]) == []


# The likeliest symbols of a large vocabulary.


@settings(max_examples=60)
@given(
    lines=st.integers(1, 7),
    symbols=st.sampled_from([1, 2, 127, 128, 129, 1000, 1281, 5000]),
    block=st.sampled_from([1, 300, 2000, 1 << 19]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    barred=st.lists(st.integers(0, 4999), max_size=3),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_the_likeliest_symbols(
    lines: int, symbols: int, block: int, dtype: torch.dtype, barred: list[int], seed: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, min(6, symbols)))
    scores = (random(seed, "scores", lines, symbols) * 5).to(dtype)
    before = scores.clone()
    barred = sorted({i % symbols for i in barred})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beam_module, "_BLOCK", block)
        gains, ids = _likeliest(scores, count, Allowed(barred, None, None, 0))
    assert torch.equal(scores, before), "the model's own scores were changed"
    every = torch.log_softmax(scores.double(), dim=1)
    every[:, barred] = -math.inf
    expected = every.topk(count, dim=1).values
    # A float32 sum of exponentials.
    tolerance = ROUNDING if dtype == torch.float64 else 1e-5
    assert torch.allclose(gains, expected, atol=tolerance, rtol=0)
    real = expected > -math.inf
    assert torch.allclose(every.gather(1, ids)[real], expected[real], atol=tolerance, rtol=0)
    assert all(len(set(line)) == count for line, whole in zip(ids.tolist(), real.all(dim=1), strict=True) if whole)
    assert int(ids.max()) < symbols


# Drawn.


@settings(max_examples=40)
@given(
    search=searches(longest=70),
    chosen=st.sampled_from([Sampling(), Sampling(1.5, 3, 0.7, 4), Sampling(top_p=0.6), Sampling(temperature=0)]),
    data=st.data(),
)
def test_what_is_drawn_does_not_depend_on_the_batch(search: Search, chosen: Sampling, data: st.DataObject) -> None:
    model, limits = search.model(), search.settings

    def run(rows: Sequence[int]) -> list[Hypothesis]:
        seeds = [search.seeds[row] for row in rows]
        return sample(
            model,
            model.begin(seeds),
            rows=len(rows),
            start=START,
            end=END,
            seeds=[1000 + row for row in rows],
            sampling=chosen,
            min_length=limits.min_length,
            max_length=limits.max_length,
            prefix=[search.prefixes[row] for row in rows],
            barred=search.barred,
        )

    together = run(range(len(search.seeds)))
    for row, seed in enumerate(search.seeds):
        (alone,) = run([row])
        assert (alone.ids, alone.ended) == (together[row].ids, together[row].ended)
        check(model, seed, together[row], 0.0)
        assert together[row].ids[: len(search.prefixes[row])] == search.prefixes[row]
        assert not set(together[row].ids[len(search.prefixes[row]) :]) & set(search.barred)
        assert together[row].ended or len(together[row].ids) == limits.max_length


@pytest.mark.parametrize("unit", ["char", "subword"])
def test_the_same_seed_draws_what_generate_writes(unit: str) -> None:
    model = small_model(unit, backend="reference")
    ids = torch.from_numpy(model.vocabulary.encode("나는 학교").astype("int64"))
    seeds = [5, 6, 7]
    found = sample(
        model,
        model.begin(ids[:-1, None].expand(-1, 3)),
        rows=3,
        start=int(ids[-1]),
        end=model.vocabulary.unknown,
        seeds=seeds,
        sampling=Sampling(temperature=0.8, top_k=9),
        barred=[model.vocabulary.unknown],
        max_length=100,
    )
    for seed, drawn in zip(seeds, found, strict=True):
        text = model.vocabulary.decode(list(drawn.ids))
        written = "".join(generate(model, "나는 학교", length=len(text), temperature=0.8, top_k=9, seed=seed))
        assert text[:60] == written[:60]
        assert len(text) >= 60


def test_symbols_are_drawn_as_often_as_the_model_says() -> None:
    p = torch.tensor([0.0, 0.1, 0.2, 0.7], dtype=torch.float64)
    model = Table(p.log().expand(4, 4))
    rows = 4000
    found = sample(model, model.begin(rows), rows=rows, start=START, end=END, seeds=range(rows), max_length=1)
    counts = torch.bincount(torch.tensor([h.ids[0] if h.ids else END for h in found]), minlength=4) / rows
    # Five standard deviations of a share among 4000.
    assert torch.allclose(counts.double(), p, atol=5 * 0.5 / math.sqrt(rows))


# What is refused.


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("beam", 0, "beam: expected at least 1 (1 is greedy), got 0"),
        ("length_penalty", -0.1, "length_penalty: expected at least 0 and finite, got -0.1"),
        ("length_penalty", math.nan, "length_penalty: expected at least 0 and finite, got nan"),
        ("n_best", 6, "n_best: expected 1..5 (the beam), got 6"),
        ("n_best", 0, "n_best: expected 1..5 (the beam), got 0"),
        ("min_length", -1, "min_length: expected at least 0, got -1"),
        ("max_length", 0, "max_length: expected at least 1, got 0"),
        ("block_ngram", -1, "block_ngram: expected at least 0 (0 blocks nothing), got -1"),
        (
            "min_length",
            200,
            "min_length: expected below max_length=200, whose last step is the end's, got 200",
        ),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: float, message: str) -> None:
    with refused(ConfigError, message):
        BeamSettings(**{name: value})  # type: ignore[arg-type]


def faults() -> Iterator[tuple[type[Exception], str, dict[str, Any]]]:
    by_source = BeamSettings(max_length=lambda source: source - 1)
    yield (
        ConfigError,
        "max_length: a function of the source lengths needs them: give lengths, one per row",
        {"settings": by_source},
    )
    yield (
        ConfigError,
        "max_length(lengths): expected above min_length=0 everywhere, got 0 for a source of 1 steps",
        {"settings": by_source, "lengths": [3, 1]},
    )
    yield ShapeError, "lengths: expected [B=2], got [1]", {"settings": by_source, "lengths": [3]}
    yield DataError, "prefix: expected one for each of the 2 rows, got 1", {"prefix": [[2]]}
    yield (
        DataError,
        "prefix: that of row 1 holds the end, id 1, which ends a hypothesis",
        {"prefix": [[], [2, 1]]},
    )
    yield (
        DataError,
        "prefix: that of row 0 has 2 ids, which leaves nothing of its 2 steps: raise max_length",
        {"prefix": [[2, 2], []], "settings": BeamSettings(max_length=2)},
    )
    yield DataError, "prefix: expected ids of the model's 4 symbols, got 4", {"prefix": [[], [4]]}
    yield DataError, "barred: expected ids of the model's 4 symbols, got -1", {"barred": [-1]}
    yield DataError, "end: expected ids of the model's 4 symbols, got 9", {"end": 9}
    yield (
        ModelError,
        "row 0: the model's scores and what is barred or forced leave nothing to write",
        {"barred": [0, 1, 2, 3]},
    )
    yield ShapeError, "start: expected [B=2], got [3]", {"start": torch.zeros(3, dtype=torch.int64)}


@pytest.mark.parametrize("error, message, given_", list(faults()))
def test_what_cannot_be_searched_is_refused(error: Any, message: str, given_: dict[str, Any]) -> None:
    model = Table(torch.zeros(4, 4))
    with refused(error, message):
        beam_search(model, model.begin(2), **{"rows": 2, "start": START, "end": END, **given_})


def test_one_seed_a_row() -> None:
    model = Table(torch.zeros(4, 4))
    with refused(DataError, "seeds: expected one for each of the 2 rows, got 1"):
        sample(model, model.begin(2), rows=2, start=START, end=END, seeds=[1])
    with refused(ConfigError, "max_length: expected at least 1, got 0"):
        sample(model, model.begin(2), rows=2, start=START, end=END, seeds=[1, 2], max_length=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_refused(value: float) -> None:
    scores = torch.zeros(4, 4)
    scores[START, 2] = value
    model = Table(scores)
    with refused(ModelError, "the model's scores are not finite: ..."):
        beam_search(model, model.begin(1), rows=1, start=START, end=END)
    with refused(ModelError, "the model's scores are not finite: ..."):
        sample(model, model.begin(1), rows=1, start=START, end=END, seeds=[1])


def test_scores_of_another_shape_are_refused() -> None:
    class Wrong(Table):
        def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
            return self.scores, state

    model = Wrong(torch.zeros(4, 4))
    with refused(ShapeError, "scores: expected [R=2, V], got [4, 4]"):
        beam_search(model, model.begin(2), rows=2, start=START, end=END)
