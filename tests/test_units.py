"""Single units over a whole text: their values are the ordinary run's, and what is said of them is so."""

from __future__ import annotations

import math
import time
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from samples import ENGLISH, KOREAN, small_model
from test_written import SOURCE, translator

from unrolled import cells
from unrolled.cells import Cell, HiddenState, Lookup, register
from unrolled.errors import ConfigError, DataError, ModelError
from unrolled.trace import record, units
from unrolled.trace.units import (
    Activity,
    Effect,
    activity,
    activity_of,
    drivers,
    importance,
    interesting,
    intervene,
    peaks,
    persistence,
    switched_on,
    symbol_dependence,
)

TEXT = ENGLISH[:60]


def planted(values: Any, text: str = "", layer: str = "core.0.forward") -> Activity:
    """An activity of known values [N H]."""
    values = np.asarray(values, np.float32)
    text = text or "x" * len(values)
    names = tuple(dict.fromkeys(text))
    return Activity(layer, "h", np.array([names.index(c) for c in text]), names, values)


def detector(symbol: str = "t") -> Any:
    """A vanilla network whose unit 3 is tanh(2) after this symbol and tanh(-2) after any other, whatever was before;
    unit 5 is always 0."""
    model = small_model(text=ENGLISH, cell="rnn")
    (one,) = model.core.layers[0]
    with torch.no_grad():
        one.weight_hh[[3, 5]] = 0
        one.weight_ih[[3, 5]] = 0
        for bias in (one.bias_ih, one.bias_hh):
            bias[[3, 5]] = 0
        one.weight_ih[3] = -2
        one.weight_ih[3, int(model.vocabulary.encode(symbol)[0])] = 2
    return model


# ------------------------------------------------------------------------------------------------ the values


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_values_over_a_whole_text_are_those_of_the_recorded_run(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, the state handed on, give what one piece gives, in float32 to the bit: 2,100 symbols are two windows."""
    text = (ENGLISH * 3)[:2100]
    model = small_model(text=ENGLISH, dtype=torch.float32, cell=cell, layers=2)
    trace = record(model, text)
    for k in range(2):
        place = f"core.{k}.forward"
        for name in (n for n in trace.tensors if n.startswith(f"{place}.")):
            found = activity(model, text, layer=place, field=name.rpartition(".")[2], dtype="float32")
            if name.endswith((".h", ".c")):
                assert np.array_equal(found.values, trace.tensors[name].numpy()), name
            else:  # a gate is computed once more: a product of other sizes, to rounding
                np.testing.assert_allclose(found.values, trace.tensors[name].numpy(), atol=1e-6)
    half = activity(model, text)
    assert half.values.dtype == np.float16
    assert np.array_equal(half.values, trace.tensors["core.0.forward.h"].numpy().astype(np.float16))
    assert half.symbols(0, 2100) == trace.read
    assert (len(half), half.units) == (2100, 8)
    monkeypatch.setattr(units, "_IN_MEMORY", 100)  # as a text does that is too long for the memory
    mapped = activity(model, text)
    assert np.array_equal(mapped.values, half.values)
    assert not mapped.values.flags.writeable
    assert np.array_equal(mapped.unit(7), half.values[:, 7].astype(np.float64))


def test_other_readers_of_text_have_units_too() -> None:
    model = translator(torch.float32)
    trace = record(model, SOURCE)
    found = activity(model, SOURCE, dtype="float32")
    assert np.array_equal(found.values, trace.tensors["core.0.forward.h"].numpy())
    assert "".join(found.symbols(0, 99)) == SOURCE
    both = record(translator(torch.float32, core__bidirectional=True), SOURCE)
    backwards = activity_of(both, "core.0.reverse")
    assert np.array_equal(backwards.values, both.tensors["core.0.reverse.h"].numpy())
    assert backwards.symbols(0, 2) == both.read[:2]
    written = activity_of(both, "decoder.0.forward")
    assert written.symbols(0, 99) == ("<s>", *both.written[:-1])


def test_what_has_no_activity() -> None:
    model = small_model(text=ENGLISH, cell="gru")
    for wrong, message in (
        ({"text": ""}, "the text is empty"),
        ({"layer": "core.1.forward"}, "no 'core.1.forward' here: did you mean 'core.0.forward'"),
        ({"field": "c"}, "no 'c': expected h, r, z, n"),
    ):
        with pytest.raises((DataError, ModelError), match=message):
            activity(model, **{"text": TEXT, **wrong})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected float16 or float32, got 'int8'"):
        activity(model, TEXT, dtype="int8")
    with pytest.raises(ModelError, match="both directions"):
        activity(translator(core__bidirectional=True), SOURCE)
    with pytest.raises(ModelError, match=r"has no core\.0\.forward\.c"):
        activity_of(record(model, TEXT), "core.0.forward", "c")
    large = small_model(text=ENGLISH, cell="rnn_relu")
    with torch.no_grad():
        large.core.layers[0][0].bias_ih.fill_(1e6)
        large.core.layers[0][0].weight_hh.zero_()
    with pytest.raises(ModelError, match="float16 to 65504: use dtype='float32'"):
        activity(large, TEXT)
    assert activity(large, TEXT, dtype="float32").values.max() > 9e5


# -------------------------------------------------------------------------------------------- what is said of them


def test_a_unit_that_is_switched_on_in_a_stretch_is_found() -> None:
    """Four units around [4, 7): on in it alone; down in it alone; on, but one step too long; on in half of it."""
    values = np.zeros((12, 5))
    values[4:7, 0], values[4:7, 1], values[4:8, 2], values[4:6, 3] = 0.8, -0.9, 0.8, 0.8
    values[0, 0] = 0.9  # on elsewhere too, which LSTMVis allows
    found = switched_on(planted(values), 4, 7)
    assert [one.unit for one in found if one.on] == [1, 0], "-0.9 against nothing differs most"
    assert [one.sign for one in found if one.on] == [-1, 1]
    assert {one.unit for one in found if not one.on} == {2, 3, 4}
    assert [one.unit for one in switched_on(planted(values), 4, 8) if one.on] == [2]
    assert [one.unit for one in switched_on(planted(values), 4, 6) if one.on] == [3]
    assert [one.unit for one in switched_on(planted(values), 4, 7, margin=0) if one.on] == [1, 2, 0]
    assert not any(one.on for one in switched_on(planted(values), 4, 7, threshold=0.9))
    # Unit 0 by hand: 0.8 inside; outside one 0.9 among nine steps, its deviation sqrt(0.9^2 / 9 - 0.1^2).
    (zero,) = [one for one in found if one.unit == 0]
    assert (zero.inside, zero.outside) == (pytest.approx(0.8), pytest.approx(0.1))
    assert zero.difference == pytest.approx(0.7 / math.sqrt(0.09 - 0.01))
    assert {one.unit: one.difference for one in found}[4] == 0
    assert {one.unit: one.difference for one in found}[1] == -math.inf
    early = switched_on(planted(values), 0, 1)
    assert next(one for one in early if one.unit == 0).on, "nothing stands before the text"
    for start, stop, message in ((3, 3, "within 0 to 12, got 3 to 3"), (5, 13, "within"), (0, 12, "the whole text")):
        with pytest.raises(DataError, match=message):
            switched_on(planted(values), start, stop)
    with pytest.raises(ConfigError, match=r"at least 0, got 0\.3 and -1"):
        switched_on(planted(values), 4, 7, margin=-1)


def test_the_symbol_that_a_unit_was_planted_on_drives_it() -> None:
    model = detector("t")
    found = activity(model, ENGLISH, dtype="float32")
    first, *rest = ranked = drivers(found, 3)
    assert first.symbol == "t"
    assert first.count == ENGLISH[1:].count("t")
    assert all(one.sure <= 0 for one in rest), "no other symbol drives it up"
    by_hand = [2 * math.tanh(2) * (before != "t") for before, c in pairwise(ENGLISH) if c == "t"]
    assert first.change == pytest.approx(np.mean(by_hand), rel=1e-5)
    assert first.error == pytest.approx(np.std(by_hand, ddof=1) / math.sqrt(len(by_hand)), rel=1e-4, abs=1e-6)
    assert first.sure == pytest.approx(first.change - 1.96 * first.error)
    assert {one.symbol for one in ranked} == set(ENGLISH[1:])
    assert ranked[-1].sure == min(one.sure for one in ranked) < 0


def test_rare_symbols_do_not_win() -> None:
    """`!` comes once with the greatest change of all, `?` five times with as great ones that do not agree."""
    text = "ab" * 30 + "!" + "b?" * 5
    values = np.zeros(len(text))
    for t, symbol in enumerate(text):
        values[t] = {"a": 1.0, "b": 0.0, "!": 9.0, "?": [9.0, -9.0, 5.0, -6.0, 9.0][(t // 2) % 5]}[symbol]
    ranked = drivers(planted(values[:, None], text), 0)
    assert ranked[0].symbol == "a"
    assert ranked[-1].symbol == "b"
    rare = {one.symbol: one for one in ranked}
    assert (rare["!"].count, rare["!"].change, rare["!"].sure) == (1, 9, 0)
    assert math.isnan(rare["!"].error)
    assert rare["?"].sure == 0
    assert rare["a"].error == 0
    assert rare["a"].sure == rare["a"].change == 1, "the first a has nothing before it"
    assert drivers(planted(values[:, None], text), 0, least=31)[0].sure == 0
    with pytest.raises(ModelError, match="expected 0 to 0, got 1"):
        drivers(planted(values[:, None], text), 1)
    with pytest.raises(DataError, match="one symbol"):
        drivers(planted([[1.0]]), 0)


def test_peaks_are_the_highest_places_apart_from_one_another() -> None:
    values = np.zeros(40)
    values[[5, 6, 7, 20, 39]] = [0.5, 0.9, 0.8, 0.7, 0.6]
    values[30] = -0.4
    text = "".join(chr(ord("A") + t) for t in range(40))
    first, second, third = peaks(planted(values[:, None], text), 0, 3, context=2)
    assert [peak.at for peak in (first, second, third)] == [6, 20, 39], "5 and 7 are the first one's neighbours"
    assert (first.start, first.text) == (4, text[4:9])
    assert first.values == pytest.approx((0, 0.5, 0.9, 0.8, 0))
    assert first.symbols[first.at - first.start] == text[6]
    assert third.text == text[37:], "the text ends"
    (low,) = peaks(planted(values[:, None], text), 0, 1, sign=-1)
    assert (low.at, low.value) == (30, pytest.approx(-0.4))
    assert peaks(planted(values[:, None], text), 0, 5, context=1)[1].at == 20
    assert len(peaks(planted(values[:, None], text), 0, 99, context=0)) == 40
    with pytest.raises(ConfigError, match="expected 1 or -1, got 0"):
        peaks(planted(values[:, None]), 0, sign=0)
    with pytest.raises(ConfigError, match="at least 0"):
        peaks(planted(values[:, None]), 0, -1)


def test_what_a_unit_tells_of_the_last_symbol_and_what_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join("abc"[i] for i in np.random.default_rng(0).integers(0, 3, 400))
    random = np.random.default_rng(1).normal(size=400)
    wave = np.sin(2 * np.pi * np.arange(400) / 40)
    reads = np.array([{"a": 1.0, "b": -0.5, "c": 0.2}[c] for c in text])
    rows = planted(np.stack([reads, random, wave, np.full(400, 0.3), reads + random], 1), text)
    told = symbol_dependence(rows)
    assert told[0] == pytest.approx(1)
    assert told[1] < 0.05
    assert math.isnan(told[3])
    groups = [(reads + random)[[c == s for c in text]] for s in "abc"]
    mixed = np.concatenate(groups)
    between = sum(len(g) * (g.mean() - mixed.mean()) ** 2 for g in groups)
    assert told[4] == pytest.approx(between / ((mixed - mixed.mean()) ** 2).sum(), rel=1e-5)
    kept = persistence(rows, 7)
    for u, column in ((0, reads), (1, random), (2, wave)):
        centred = column - column.mean()
        assert kept[u] == pytest.approx((centred[:-7] * centred[7:]).sum() / (centred**2).sum(), abs=1e-5)
    assert math.isnan(kept[3])
    whole = torch.stack([told, kept])
    monkeypatch.setattr(units, "_BLOCK", 5 * 9)  # blocks of 9 rows give the same
    torch.testing.assert_close(torch.stack([symbol_dependence(rows), persistence(rows, 7)]), whole, equal_nan=True)
    for lag in (0, 400):
        with pytest.raises(DataError, match="expected 1 to 399"):
            persistence(rows, lag)

    def effect(unit: int, cost: float) -> Effect:
        return Effect("core.0.forward", "h", unit, 0.0, 2.0, 2.0 + cost, 0.1, 0.1, ())

    chosen = interesting(rows, [effect(1, 0.2), effect(0, 0.5)], count=4)
    assert [(one.unit, one.why) for one in chosen] == [(0, "matters"), (4, "reads"), (2, "keeps"), (1, "matters")]
    assert chosen[0].figure == pytest.approx(0.5)
    assert chosen[1].figure == pytest.approx(float(told[4]))
    assert [one.unit for one in interesting(rows, count=9)] == [0, 2, 4, 1], "one that never varies is not of interest"


# ---------------------------------------------------------------------------------------------- interventions


def by_hand(model: Any, text: str, k: int, unit: int, values: list[float], field: str) -> torch.Tensor:
    """The scores of a model one unit of which is held, from the equations of the lecture notes, in a loop [N V]."""
    ids = torch.from_numpy(model.vocabulary.encode(text).astype("int64"))
    layers = [layer[0] for layer in model.core.layers]
    h = [torch.zeros(8, dtype=torch.float64) for _ in layers]
    c = [torch.zeros(8, dtype=torch.float64) for _ in layers]
    scores = []
    for t, symbol in enumerate(ids):
        table = model.reader.table
        x = F.one_hot(symbol, len(model.vocabulary)).double() if table is None else table[symbol]
        for n, one in enumerate(layers):
            a, b = one.weight_ih @ x + one.bias_ih, one.weight_hh @ h[n] + one.bias_hh
            if one.equation.name == "lstm":
                i, f, g, o = (a + b).chunk(4)
                c[n] = f.sigmoid() * c[n] + i.sigmoid() * g.tanh()
                if n == k and field == "c":
                    c[n] = torch.where(torch.arange(8) == unit, values[t], c[n])
                h[n] = o.sigmoid() * c[n].tanh()
            elif one.equation.name == "gru":
                (ar, az, an), (br, bz, bn) = a.chunk(3), b.chunk(3)
                z = (az + bz).sigmoid()
                h[n] = (1 - z) * (an + (ar + br).sigmoid() * bn).tanh() + z * h[n]
            else:
                h[n] = (a + b).tanh()
            if n == k and field == "h":
                h[n] = torch.where(torch.arange(8) == unit, values[t], h[n])
            x = h[n]
        scores.append(model.writer.weight @ x + model.writer.bias)
    return torch.stack(scores).detach()


CASES = [
    ("rnn", 0, "h", None, 0.0),
    ("rnn", 1, "h", None, 0.7),
    ("gru", 0, "h", 5, -0.4),
    ("lstm", 0, "h", None, 0.5),
    ("lstm", 0, "c", 5, 1.5),
    ("lstm", 1, "c", None, 0.0),
]


@pytest.mark.parametrize("cell, k, field, embedding, value", CASES)
def test_holding_a_unit_is_the_scalar_loop(
    cell: str, k: int, field: str, embedding: int | None, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(text=ENGLISH, cell=cell, layers=2, embedding=embedding)
    effect = intervene(model, TEXT, f"core.{k}.forward", 6, value, field=field)
    ids = torch.from_numpy(model.vocabulary.encode(TEXT).astype("int64"))
    with torch.no_grad():
        p = model(ids[:, None])[0][:-1, 0].log_softmax(-1)
    q = by_hand(model, TEXT, k, 6, [value] * len(TEXT), field)[:-1].log_softmax(-1)
    assert effect.nats_before == pytest.approx(float(F.nll_loss(p, ids[1:])))
    assert effect.nats == pytest.approx(float(F.nll_loss(q, ids[1:])))
    assert effect.kl == pytest.approx(float(F.kl_div(q, p, log_target=True, reduction="batchmean")))
    assert effect.changed == pytest.approx(float((p.argmax(-1) != q.argmax(-1)).double().mean()))
    assert effect.value == pytest.approx(value)
    assert effect.cost == pytest.approx(effect.nats - effect.nats_before)
    moved = (q.exp() - p.exp()).mean(0)
    order = moved.abs().argsort(descending=True)[:5].tolist()
    assert [name for name, _ in effect.symbols] == [model.vocabulary.name(i) for i in order]
    assert [change for _, change in effect.symbols] == pytest.approx(moved[order].tolist())
    # Small windows, and every unit at once or three at a time, tell the same.
    every = importance(model, TEXT, f"core.{k}.forward", value=value, field=field)
    assert [one.cost for one in every] == sorted((one.cost for one in every), reverse=True)
    assert sorted(one.unit for one in every) == list(range(8))
    monkeypatch.setattr(units, "_SCORES", 1000)
    parts = importance(model, TEXT, f"core.{k}.forward", units=[6, 2, 4, 1], value=value, field=field, at_once=3)
    for one in parts:
        (same,) = [other for other in every if other.unit == one.unit]
        assert (one.nats, one.kl, one.changed) == pytest.approx((same.nats, same.kl, same.changed))
    (six,) = [one for one in parts if one.unit == 6]
    assert six.nats == pytest.approx(effect.nats)


@pytest.mark.parametrize("cell, field", [("rnn", "h"), ("gru", "h"), ("lstm", "h"), ("lstm", "c")])
def test_a_unit_held_at_its_own_values_changes_nothing(cell: str, field: str) -> None:
    model = small_model(text=ENGLISH, cell=cell, layers=2)
    trace = record(model, TEXT)
    own = trace.tensors[f"core.0.forward.{field}"][:, 3]
    same = intervene(model, TEXT, "core.0.forward", 3, own, field=field)
    assert same.nats == pytest.approx(same.nats_before, abs=1e-12)
    assert same.kl == pytest.approx(0, abs=1e-12)
    assert same.changed == 0
    shifted = intervene(model, TEXT, "core.0.forward", 3, own.roll(1), field=field)
    assert shifted.kl > 1e-4, "one step late is not the same"
    mean = intervene(model, TEXT, "core.0.forward", 3, "mean", field=field)
    assert mean.value == pytest.approx(float(own.mean()), rel=1e-5)
    assert mean.nats == pytest.approx(
        intervene(model, TEXT, "core.0.forward", 3, float(own.mean()), field=field).nats, rel=1e-5
    )


def test_removing_what_is_not_there_costs_nothing_and_what_the_output_needs_most() -> None:
    model = detector("t")
    with torch.no_grad():
        model.core.layers[0][0].weight_hh.zero_()
        model.writer.weight.zero_()
        model.writer.bias.zero_()
        model.writer.weight[int(model.vocabulary.encode("h")[0]), 3] = 4  # after t comes h
    ranked = importance(model, "the" * 20)
    assert ranked[0].unit == 3
    # By hand: of 59 steps, 20 read t and 39 another; the score of h is 4 tanh(2) or -4 tanh(2), all others' are 0.
    symbols, score = len(model.vocabulary), 4 * math.tanh(2)
    high, low = (math.exp(s) / (math.exp(s) + symbols - 1) for s in (score, -score))
    ordinary = -(20 * math.log(high) + 39 * math.log((1 - low) / (symbols - 1))) / 59
    assert ranked[0].nats_before == pytest.approx(ordinary)
    assert ranked[0].cost == pytest.approx(math.log(symbols) - ordinary)
    assert ranked[0].symbols[0] == ("h", pytest.approx(1 / symbols - (20 * high + 39 * low) / 59))
    assert all(one.kl == pytest.approx(0, abs=1e-12) for one in ranked[1:])


def test_a_cell_of_ones_own_can_be_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "_CELLS", dict(cells._CELLS))

    class Mine(Cell):
        def __init__(self, input_size: int, hidden_size: int) -> None:
            super().__init__(input_size, hidden_size)
            self.joined = torch.nn.Linear(input_size + hidden_size, hidden_size)

        def step(self, x: Any, state: Any) -> Any:
            h = torch.tanh(self.joined(torch.cat([x, state.h], -1)))
            return h, HiddenState(h)

    class Other(Mine):
        def step(self, x: Any, state: Any) -> Any:
            h, state = super().step(x, state)
            return 2 * h, state

    register("mine")(Mine)
    register("other")(Other)
    model = small_model(text=ENGLISH, cell="mine", embedding=5)
    own = record(model, TEXT).tensors["core.0.forward.h"][:, 2]
    assert np.array_equal(activity(model, TEXT, dtype="float32").values[:, 2], own.float().numpy())
    assert intervene(model, TEXT, "core.0.forward", 2, own).kl == pytest.approx(0, abs=1e-12)
    removed = intervene(model, TEXT, "core.0.forward", 2)
    (one,) = model.core.layers[0]
    h, scores = torch.zeros(1, 8, dtype=torch.float64), []
    for i in torch.from_numpy(model.vocabulary.encode(TEXT).astype("int64")):
        h = one.step(Lookup(i[None], model.reader.table).vectors(), HiddenState(h))[0].clone()
        h[:, 2] = 0
        scores.append(F.linear(h, model.writer.weight, model.writer.bias)[0].detach())
    ids = torch.from_numpy(model.vocabulary.encode(TEXT).astype("int64"))
    assert removed.nats == pytest.approx(float(F.cross_entropy(torch.stack(scores)[:-1], ids[1:])))
    with pytest.raises(ModelError, match="a cell of your own can have"):
        intervene(small_model(text=ENGLISH, cell="other", embedding=5), TEXT, "core.0.forward", 2)


def test_what_cannot_be_held() -> None:
    model = small_model(text=ENGLISH)
    with pytest.raises(ModelError, match="expected a language model"):
        importance(translator(), SOURCE)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="expected a language model"):
        intervene(translator(), SOURCE, "core.0.forward", 0)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="unit: expected 0 to 7, got 8"):
        intervene(model, TEXT, "core.0.forward", 8)
    with pytest.raises(ModelError, match=r"only the state of core\.0\.forward can be held, and that has no 'f'"):
        intervene(model, TEXT, "core.0.forward", 0, field="f")
    with pytest.raises(DataError, match="one symbol"):
        intervene(model, "t", "core.0.forward", 0)
    with pytest.raises(DataError, match=r"each of the text's 60 symbols, got \[3\]"):
        intervene(model, TEXT, "core.0.forward", 0, torch.zeros(3))
    with pytest.raises(ConfigError, match="at least 1 row, got 0"):
        importance(model, TEXT, at_once=0)


def test_a_model_is_left_as_it_was_and_dropout_stays_off() -> None:
    model = small_model(text=ENGLISH, layers=2, dropout=0.5).train()
    first, again = (importance(model, TEXT, units=[1])[0] for _ in range(2))
    assert first == again
    assert model.training
    assert np.array_equal(activity(model, TEXT).values, activity(model, TEXT).values)
    assert model.training


def test_korean_is_told_by_its_syllables() -> None:
    model = small_model(cell="gru")
    found = activity(model, KOREAN)
    assert {one.symbol for one in drivers(found, 0)} == set(KOREAN[1:])
    assert peaks(found, 0, 1, context=5)[0].text in KOREAN


def test_all_units_of_a_large_layer_take_seconds() -> None:
    """Of processors' time, at most; 100 symbols of 256 units take 0.3 s on one core."""
    model = small_model(text=ENGLISH, dtype=torch.float32, hidden=256)
    began = time.process_time()
    assert len(importance(model, ENGLISH[:100])) == 256
    assert time.process_time() - began < 10
