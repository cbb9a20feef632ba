"""Figures show the numbers of the trace, as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from samples import ENGLISH, KOREAN, small_model
from test_written import SOURCE, TARGET, translator

from unrolled import figures
from unrolled.errors import DataError, ModelError
from unrolled.trace import Trace, gradient_norms, load_trace, record, record_layer, save_trace

TEXT = ENGLISH[:40]


@pytest.fixture(scope="module")
def text_trace() -> Trace:
    return record(small_model(text=ENGLISH, cell="lstm", layers=2), TEXT, gradient=True, at=-1)


@pytest.fixture(scope="module")
def translation() -> Trace:
    return record(translator(torch.float32), SOURCE, expected=TARGET, gradient=True, at=-1)


def test_the_heat_map_is_the_attention(translation: Trace) -> None:
    (heat,) = figures.attention_map(translation).data
    np.testing.assert_array_equal(np.asarray(heat.z), translation.attention.numpy())
    figure = figures.attention_map(translation)
    assert list(figure.layout.xaxis.ticktext) == SOURCE.split()
    assert list(figure.layout.yaxis.ticktext) == [*TARGET.split(), "&lt;/s&gt;"]
    assert (heat.zmin, heat.zmax) == (0, 1)


def test_without_attention_there_is_no_map(text_trace: Trace) -> None:
    with pytest.raises(ModelError, match="no attention to look at"):
        figures.attention_map(text_trace)


def test_a_state_map_has_the_states_of_the_liveliest_units(text_trace: Trace) -> None:
    figure = figures.state_map(text_trace, units=5)
    maps = {trace.name: trace for trace in figure.data}
    assert len(maps) == 2 * 6  # two layers: h, c and four gates
    values = text_trace.tensors["core.1.forward.h"]
    most = sorted(values.float().std(0, correction=0).argsort(descending=True)[:5].tolist())
    np.testing.assert_allclose(np.asarray(maps["core.1.forward.h"].z), values[:, most].T.float().numpy())
    assert [trace.visible for trace in figure.data].count(True) == 1
    assert figure.data[0].name == "core.1.forward.h", "the highest layer is shown first"
    menu = figure.layout.updatemenus[0].buttons
    assert len(menu) == len(maps)
    assert menu[3].args[0]["visible"].index(True) == 3
    with pytest.raises(ModelError, match=r"no layer core\.7\.forward was recorded: there are core\.0\.forward"):
        figures.state_map(text_trace, "core.7.forward")


def test_a_text_is_coloured_by_the_unit(text_trace: Trace) -> None:
    figure = figures.unit_text(text_trace, 3, columns=16)
    heat, letters = figure.data
    held = text_trace.tensors["core.1.forward.c"].float().tanh()[:, 3].numpy()
    z = np.asarray(heat.z, dtype=float)
    np.testing.assert_allclose(z[~np.isnan(z)], held, atol=1e-7)  # one cell a character, in reading order
    assert "".join(letters.text).replace("↵", "") == "".join(TEXT.split())
    for unit, got in ((8, "8"), ([], "none")):
        with pytest.raises(ModelError, match=f"unit: expected 0 to 7, got {got}"):
            figures.unit_text(text_trace, unit)


def test_a_syllable_takes_two_cells() -> None:
    trace = record(small_model(text=KOREAN), "나는 a")
    heat = figures.unit_text(trace, 0).data[0]
    steps = [cell.split(":")[0] for cell in heat.text[0]]
    assert steps == ["step 1", "step 1", "step 2", "step 2", "step 3", "step 4"]


def test_the_expected_symbols_are_the_likeliest(text_trace: Trace) -> None:
    figure = figures.next_symbols(text_trace, start=2, steps=9, best=4)
    (heat,) = figure.data
    np.testing.assert_allclose(np.asarray(heat.z), text_trace.tensors["scores.values"][2:11, :4].float().exp().T)
    names = [
        [figures.shown(text_trace.names[i]) for i in row]
        for row in text_trace.tensors["scores.names"][2:11, :4].tolist()
    ]
    assert [list(row) for row in zip(*heat.text, strict=True)] == names
    right = text_trace.tensors["chosen"][2:11].tolist()
    framed = {(round(shape.x0 + 0.47), round(shape.y0 + 0.45)) for shape in figure.layout.shapes}
    ids = text_trace.tensors["scores.names"][2:11, :4].tolist()
    assert framed == {(t, row.index(right[t])) for t, row in enumerate(ids) if right[t] in row}
    with pytest.raises(DataError, match="start: expected a step, 0 to 39, got 40"):
        figures.next_symbols(text_trace, start=40)


def test_gradient_curves_are_the_norms(text_trace: Trace) -> None:
    other = record(small_model(text=ENGLISH, cell="gru"), TEXT, gradient=True, at=-1)
    figure = figures.gradient_curves({"LSTM": text_trace, "GRU": other})
    curves = {line.name: line for line in figure.data}
    assert list(curves) == ["LSTM, layer 1", "LSTM, layer 1, c", "LSTM, layer 2", "LSTM, layer 2, c", "GRU, layer 1"]
    for name, trace, field in (
        ("LSTM, layer 1", text_trace, "h"),
        ("LSTM, layer 1, c", text_trace, "c"),
        ("GRU, layer 1", other, "h"),
    ):
        back = gradient_norms(trace, "core.0.forward", field).flip(0)
        np.testing.assert_allclose(np.asarray(curves[name].y, float), (back / back[0]).numpy())
        assert curves[name].line.dash == ("dash" if field == "c" else "solid")
    assert curves["LSTM, layer 1, c"].line.color == curves["LSTM, layer 1"].line.color
    assert len({curves[name].line.color for name in curves}) == 3
    assert figure.layout.yaxis.type == "log"
    plain = record(small_model(text=ENGLISH), TEXT)
    with pytest.raises(ModelError, match="no gradients"):
        figures.gradient_curves(plain)


def test_a_reverse_layer_is_followed_the_way_it_reads() -> None:
    torch.manual_seed(0)
    layer = torch.nn.GRU(3, 4, bidirectional=True)
    trace = record_layer(layer, torch.randn(7, 1, 3), loss=lambda outputs: outputs[0].sum())
    forward, reverse = figures.gradient_curves(trace).data
    assert len(forward.y) == 1  # the first output of the forward direction depends on nothing before
    assert len(reverse.y) == 7
    assert reverse.y[0] == 1


def test_learning_curves_are_the_lines_of_the_log() -> None:
    lines: list[dict[str, Any]] = [
        {"kind": "train", "step": 10, "epoch": 0.5, "loss": 3.0},
        {"kind": "train", "step": 20, "epoch": 1.0, "loss": 2.0},
        {"kind": "valid", "step": 20, "epoch": 1.0, "loss": 2.5, "best": True},
    ]
    train, valid = figures.learning_curve(lines).data
    assert (list(train.x), list(train.y)) == ([10, 20], [3.0, 2.0])
    assert (list(valid.x), list(valid.y)) == ([20], [2.5])
    both = figures.learning_curve({"a": lines, "b": lines[:2]})
    assert [line.name for line in both.data] == ["a, training", "a, validation", "b, training"]
    with pytest.raises(DataError, match="no learning curve"):
        figures.learning_curve([])


def test_labels_show_white_space_and_hide_markup() -> None:
    assert figures.shown(" ") == "␣"
    assert figures.shown("\n") == "↵"
    assert figures.shown(" word") == "word"
    assert figures.shown("<b>&") == "&lt;b&gt;&amp;"
    assert figures.shown("한") == "한"
    assert figures.shown("\x07") == "U+0007"


def test_a_figure_needs_no_model(tmp_path: Path, translation: Trace) -> None:
    save_trace(translation, tmp_path / "a.trace")
    back = load_trace(tmp_path / "a.trace")
    for draw in (
        figures.attention_map,
        figures.state_map,
        figures.next_symbols,
        figures.gradient_curves,
        figures.unit_text,
    ):
        assert json.loads(draw(back).to_json()) == json.loads(draw(translation).to_json())


def test_the_button_saves_svg() -> None:
    assert figures.CONFIG["toImageButtonOptions"]["format"] == "svg"
