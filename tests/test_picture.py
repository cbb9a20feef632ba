"""Pictures of every form: they are well-formed, say what the trace says, and their arrows go where the numbers went."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pictured import SERIES, model_of, traces
from samples import ENGLISH, small_model
from test_cli import run

from unrolled.checkpoints import save
from unrolled.errors import ConfigError, ModelError, StorageError
from unrolled.picture import Picture, unrolled_svg
from unrolled.trace import Trace, load_trace, record, save_trace

NS = "{http://www.w3.org/2000/svg}"
NAMES = [
    "language model", "language model, two layers, korean", "one-to-one", "one-to-many", "one-to-many, zeros",
    "many-to-one", "many-to-one, both directions", "many-to-one, mean", "many-to-one, number", "aligned",
    "aligned, characters", "aligned, numbers", "forecast", "encoder-decoder", "encoder-decoder, both directions",
    "encoder-decoder, no attention", "layer",
]  # fmt: skip
RECORDED = cache(traces)


class Seen:
    """A picture, read back."""

    def __init__(self, svg: str) -> None:
        self.svg, self.root = svg, ET.fromstring(svg)
        self.nodes = {g.get("data-node"): g for g in self.root.iter(f"{NS}g") if g.get("data-node")}
        self.arrows = [g for g in self.root.iter(f"{NS}g") if g.get("data-from")]
        self.links = [(g.get("data-from"), g.get("data-to")) for g in self.arrows]

    def title(self, node: str) -> str:
        return self.nodes[node].findtext(f"{NS}title") or ""

    def text(self, node: str) -> str:
        return "".join("".join(t.itertext()) for t in self.nodes[node].findall(f"{NS}text"))

    def box(self, node: str) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        circle = self.nodes[node].find(f"{NS}circle")
        if circle is not None:
            x, y, r = (float(circle.get(k, "")) for k in ("cx", "cy", "r"))
            return x - r, y - r, x + r, y + r
        rect = self.nodes[node].find(f"{NS}rect")
        if rect is None:  # an ellipsis, or the 0 before the first step
            text = self.nodes[node].find(f"{NS}text")
            assert text is not None
            x, y = float(text.get("x", "")), float(text.get("y", ""))
            return x - 19, y - 20, x + 19, y + 12
        x, y, w, h = (float(rect.get(k, "")) for k in ("x", "y", "width", "height"))
        return x, y, x + w, y + h

    def has(self, source: str, target: str) -> bool:
        return (source, target) in self.links

    def fed(self) -> set[tuple[Any, Any]]:
        return {
            (g.get("data-from"), g.get("data-to"))
            for g in self.arrows
            if any("fed" in (p.get("class") or "").split() for p in g)
        }


def seen(name: str, **settings: Any) -> Seen:
    return Seen(unrolled_svg(RECORDED()[name], **settings))


def test_every_recorded_form_is_drawn() -> None:
    assert set(NAMES) == set(RECORDED())


@pytest.mark.parametrize("settings", [{}, {"rolled": True}, {"start": 1, "steps": 2}, {"steps": 1}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_arrows_meet_what_they_name(name: str, settings: dict[str, Any]) -> None:
    """Both ends of every arrow lie on the edge of a box that is there, to two pixels; nothing lies outside."""
    if settings.get("start") and max(map(len, (RECORDED()[name].read, RECORDED()[name].written))) < 2:
        settings = {}
    picture = seen(name, **settings)
    width, height = (float(picture.root.get(k, "")) for k in ("width", "height"))
    for g in picture.arrows:
        path, *head = g.findall(f"{NS}path")
        numbers = [float(n) for n in re.findall(r"-?\d+\.?\d*", path.get("d", ""))]
        start, end = numbers[:2], numbers[-2:]
        if head:  # the line ends within its head
            end = [float(n) for n in re.findall(r"-?\d+\.?\d*", head[0].get("d", ""))][:2]
        for (x, y), node in ((start, g.get("data-from")), (end, g.get("data-to"))):
            assert node in picture.nodes, f"{node} is not drawn"
            left, top, right, bottom = picture.box(node)
            inside = left - 2 <= x <= right + 2 and top - 2 <= y <= bottom + 2
            edge = min(abs(x - left), abs(x - right), abs(y - top), abs(y - bottom))
            loose = picture.nodes[node].find(f"{NS}rect") is None
            assert inside, (g.get("data-from"), g.get("data-to"), (x, y), picture.box(node))
            assert loose or edge <= 2, (g.get("data-from"), g.get("data-to"), (x, y), picture.box(node))
            assert 0 <= x <= width
            assert 0 <= y <= height


@pytest.mark.parametrize("settings", [{}, {"rolled": True}, {"start": 1, "steps": 2}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_boxes_do_not_overlap_and_texts_are_within_the_picture(name: str, settings: dict[str, Any]) -> None:
    if settings.get("start") and max(map(len, (RECORDED()[name].read, RECORDED()[name].written))) < 2:
        settings = {}
    picture = seen(name, **settings)
    width, height = (float(picture.root.get(k, "")) for k in ("width", "height"))
    boxes = {n: picture.box(n) for n, g in picture.nodes.items() if g.find(f"{NS}rect") is not None}
    for n, (left, top, right, bottom) in boxes.items():
        assert min(left, top, width - right, height - bottom) >= 0, n
        for other, (a, b, c, d) in boxes.items():
            assert n == other or right <= a or c <= left or bottom <= b or d <= top, (n, other)
    for text in picture.root.iter(f"{NS}text"):
        if text.get("x"):
            assert 0 <= float(text.get("x", "")) <= width
            assert 0 <= float(text.get("y", "")) <= height


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_the_traces(name: str) -> None:
    trace = RECORDED()[name]
    picture = seen(name, steps=99)
    cells = 0
    for node, g in picture.nodes.items():
        match = re.fullmatch(r"((?:core|decoder)\.\d+\.\w+)\.(\d+)", node)
        if match is None or "join" in node:
            continue
        layer, t = match[1], int(match[2])
        most = max(float(trace.tensors[f"{n}.h"].abs().max()) for core in trace.cores for n in trace.layers(core))
        for cell in g.findall(f"{NS}g"):
            told = re.fullmatch(r"([hc])_(\d+), unit (\d+): (\S+)", cell.findtext(f"{NS}title") or "")
            assert told is not None
            assert int(told[2]) == t + 1, "steps are counted from 1"
            value = float(trace.tensors[f"{layer}.{told[1]}"][t, int(told[3])])
            assert told[4] == f"{value:.6g}"
            colour = cell.findall(f"{NS}rect")[1]
            assert colour.get("class") == ("up" if value >= 0 else "down")
            if told[1] == "h":
                assert float(colour.get("fill-opacity", "")) == pytest.approx(abs(value) / most, abs=1e-4)
            cells += 1
    steps = sum(len(trace.tensors[f"{n}.h"]) for core in trace.cores for n in trace.layers(core))
    fields = 2 if trace.about["cell"] == "lstm" else 1
    assert cells == steps * fields * min(8, trace.about["hidden"])
    for n, (node, g) in enumerate((k, v) for k, v in picture.nodes.items() if k.startswith("y.")):
        assert node == f"y.{n}"
        if "chosen.score" not in trace.tensors:
            continue
        language = "language model" in trace.about["form"]
        p = float(
            (trace.tensors["scores.values"][n, 0] if language else trace.tensors["chosen.score"][n]).double().exp()
        )
        assert f"probability {p:.6g}" in picture.title(node)
        bar = next(r for r in g.findall(f"{NS}rect") if r.get("class") == "share")
        assert float(bar.get("width", "")) == pytest.approx(80 * p, abs=0.01)
        assert picture.text(node) == trace.written[n].replace(" ", "␣").replace("\n", "⏎") + f"{p:.3g}"
        first = trace.names[int(trace.tensors["scores.names"][n, 0])].replace(" ", "␣").replace("\n", "⏎")
        assert f"({first} " in picture.title(node)


def test_units_are_those_that_vary_most_or_those_asked_for() -> None:
    trace = RECORDED()["language model"]
    h = trace.tensors["core.0.forward.h"]
    most = sorted(h.var(0).topk(8).indices.tolist())
    shown = [int(n) for n in re.findall(r"h_1, unit (\d+):", seen("language model").svg)]
    assert shown == most
    assert [int(n) for n in re.findall(r"h_1, unit (\d+):", seen("language model", units=[5, 2]).svg)] == [5, 2]
    assert "8 of 16 units" in seen("language model").svg
    assert "its units" in seen("encoder-decoder").svg


# ----------------------------------------------------------------------------------------------------- the forms


def test_a_language_model_reads_holds_and_says_at_every_step() -> None:
    trace = RECORDED()["language model"]
    picture = seen("language model")
    for t in range(8):
        assert picture.has(f"x.core.{t}", f"core.0.forward.{t}")
        assert picture.has(f"core.0.forward.{t}", f"y.{t}")
        assert picture.has(f"core.0.forward.{t}", f"core.0.forward.{t + 1}") == (t < 7)
        assert not picture.has(f"core.0.forward.{t + 1}", f"core.0.forward.{t}")
    assert picture.has("core.0.forward.zero", "core.0.forward.0")
    assert picture.has("core.0.forward.7", "core.0.forward.after")
    assert picture.title("core.0.forward.after") == "8 more steps"
    # Dashed only where the likeliest symbol is the one that came.
    right = {(f"y.{t}", f"x.core.{t + 1}") for t in range(7) if trace.written[t] == trace.read[t + 1]}
    assert picture.fed() == right
    assert right, "else this tells nothing"
    assert "steps 1–8 of 16" in picture.svg
    wrong = next(t for t in range(7) if trace.written[t] != trace.read[t + 1])
    expected = trace.read[wrong + 1].replace(" ", "␣")
    assert picture.title(f"y.{wrong}").endswith(f"; expected {expected})")


def test_layers_stand_on_one_another() -> None:
    picture = seen("language model, two layers, korean")
    assert picture.has("core.0.forward.3", "core.1.forward.3")
    assert picture.has("core.1.forward.3", "y.3")
    assert not picture.has("core.0.forward.3", "y.3")
    assert picture.has("core.1.forward.3", "core.1.forward.4")
    assert picture.box("core.1.forward.3")[3] < picture.box("core.0.forward.3")[1]
    assert picture.text("x.core.0") == RECORDED()["language model, two layers, korean"].read[0]


def test_both_directions_go_both_ways_and_are_joined() -> None:
    picture = seen("aligned")
    for k in (0, 1):
        assert picture.has(f"core.{k}.forward.1", f"core.{k}.forward.2")
        assert picture.has(f"core.{k}.reverse.2", f"core.{k}.reverse.1")
        assert not picture.has(f"core.{k}.reverse.1", f"core.{k}.reverse.2")
        for side in ("forward", "reverse"):
            assert picture.has(f"core.{k}.{side}.2", f"core.{k}.join.2")
    assert picture.has("x.core.2", "core.0.reverse.2")
    assert picture.has("core.0.join.2", "core.1.reverse.2")
    assert picture.has("core.1.join.2", "y.2")
    assert picture.has("core.1.reverse.zero", "core.1.reverse.4"), "it begins at the end"
    assert picture.has("core.1.forward.zero", "core.1.forward.0")


def test_many_to_one_says_once_of_the_last_state() -> None:
    picture = seen("many-to-one")
    assert [link for link in picture.links if link[1] == "y.0"] == [("core.0.forward.4", "y.0")]
    assert "y.1" not in picture.nodes
    both = seen("many-to-one, both directions")
    assert {a for a, b in both.links if b == "y.0"} == {"core.0.forward.4", "core.0.reverse.0"}
    cut = seen("many-to-one, both directions", start=1, steps=2)
    assert {a for a, b in cut.links if b == "y.0"} == {"core.0.forward.after", "core.0.reverse.before"}
    pooled = seen("many-to-one, mean")
    assert [a for a, b in pooled.links if b == "y.0"] == ["pool"]
    assert {a for a, b in pooled.links if b == "pool"} == {f"core.0.join.{t}" for t in range(5)}
    assert "mean of all h" in pooled.text("pool")
    part = seen("many-to-one, mean", start=1, steps=2)
    shown = {"core.0.join.1", "core.0.join.2", "core.0.reverse.before", "core.0.reverse.after"}
    assert {a for a, b in part.links if b == "pool"} == shown, "what is not shown goes in as well"


def test_one_to_many_reads_its_input_and_then_its_own_words_or_zeros() -> None:
    trace = RECORDED()["one-to-many"]
    picture = seen("one-to-many")
    assert picture.text("x.core.0") == "23, 5"
    assert picture.text("x.core.2") == trace.written[1].replace(" ", "␣")
    assert picture.fed() == {(f"y.{t}", f"x.core.{t + 1}") for t in range(6)}
    zeros = seen("one-to-many, zeros")
    assert zeros.text("x.core.2") == "0"
    assert not zeros.fed()
    assert [node for node in seen("one-to-one").nodes if node[0] in "xy"] == ["x.core.0", "y.0"]


def test_an_encoders_last_state_is_the_decoders_first() -> None:
    picture = seen("encoder-decoder")
    assert picture.has("core.0.forward.5", "decoder.0.forward.0")
    assert picture.text("x.decoder.0") == "<s>"
    assert picture.text("x.decoder.1") == "die"
    assert picture.fed() == {(f"y.{u}", f"x.decoder.{u + 1}") for u in range(6)}
    assert "decoder.0.forward.zero" not in picture.nodes
    deep = seen("encoder-decoder, no attention")
    for k in (0, 1):
        assert deep.has(f"core.{k}.forward.1", f"decoder.{k}.forward.0")
    assert "context.0" not in deep.nodes
    both = seen("encoder-decoder, both directions")
    assert {a for a, b in both.links if b == "bridge"} == {
        f"core.{k}.{end}" for k in (0, 1) for end in ("forward.5", "reverse.0")
    }
    assert {b for a, b in both.links if a == "bridge"} == {"decoder.0.forward.0", "decoder.1.forward.0"}
    assert both.has("core.1.join.3", "context.2"), "attention looks at both directions"


def test_lines_of_attention_are_as_wide_as_its_weights() -> None:
    trace = RECORDED()["encoder-decoder"]
    picture = seen("encoder-decoder")
    found = 0
    for g in picture.arrows:
        line = g.find(f"{NS}path[@class='look']")
        if line is None:
            continue
        u = int((g.get("data-to") or "").removeprefix("context."))
        s = int((g.get("data-from") or "").removeprefix("core.0.forward."))
        weight = float(trace.attention[u, s])
        assert float(line.get("stroke-width", "")) == pytest.approx(7 * weight, abs=1e-4)
        assert g.findtext(f"{NS}title") == f"attention of y_{u + 1} to x_{s + 1}: {weight:.6g}"
        found += 1
    assert found == trace.attention.numel()
    for u in range(7):
        assert picture.has(f"context.{u}", f"y.{u}")
    cut = seen("encoder-decoder", start=2, steps=3)
    hidden = 1 - float(trace.attention[2, 2:5].sum())
    assert cut.title("context.2").endswith(f"{hidden:.3g} of it to steps that are not shown")
    assert cut.has("core.0.forward.2", "context.2")
    assert cut.has("core.0.forward.after", "decoder.0.forward.before")


def test_labels_stand_where_their_words_end_and_numbers_in_their_own_units() -> None:
    picture = seen("aligned, characters", steps=12)
    assert [a for a, b in picture.links if b.startswith("y.")] == [f"core.0.forward.{t}" for t in (1, 6, 11)]
    trace = RECORDED()["aligned, numbers"]
    scale = trace.about["scales"]
    picture = seen("aligned, numbers")
    value = float(trace.tensors["numbers"][3, 0]) * scale["written"]["deviation"][0] + scale["written"]["mean"][0]
    assert picture.text("y.3") == f"{value:.3g}"
    assert picture.text("x.core.3") == f"{SERIES[3, 0]:.3g}, 3"
    assert picture.text("x.core.0") == "20, 0"
    forecast = seen("forecast")
    assert len(forecast.text("y.2").split(", ")) == 2
    layer = seen("layer")
    assert not [n for n in layer.nodes if n.startswith("y")]
    first = RECORDED()["layer"].tensors["core.inputs"][0].tolist()
    assert layer.title("x.core.0") == "x_1 = " + ", ".join(f"{number:.6g}" for number in first)
    assert layer.text("x.core.0") == f"{first[0]:.3g}, …", "whole numbers, as many as there is room for"


def test_rolled_is_one_step_and_a_loop() -> None:
    picture = seen("language model", rolled=True, start=3)
    loop = ("core.0.forward.3", "core.0.forward.3")
    assert sorted(picture.links) == sorted(
        [loop, ("x.core.3", "core.0.forward.3"), ("core.0.forward.3", "y.3"), ("y.3", "x.core.3")]
    )
    assert picture.text("x.core.3") == "␣"
    assert "step 4 of 16" in picture.svg
    assert seen("many-to-one", rolled=True).has("core.0.forward.4", "y.0")
    both = seen("encoder-decoder, both directions", rolled=True)
    assert both.has("core.1.reverse.5", "core.1.reverse.5")
    assert both.has("y.0", "x.decoder.0")


# ------------------------------------------------------------------------------------------------- windows and text


def test_a_window_is_moved_back_so_far_that_it_is_full() -> None:
    picture = seen("language model", start=14, steps=5)
    assert [n for n in picture.nodes if n.startswith("x.")] == [f"x.core.{t}" for t in range(11, 16)]
    assert picture.title("core.0.forward.before") == "11 more steps"
    assert picture.has("core.0.forward.before", "core.0.forward.11")
    assert "core.0.forward.after" not in picture.nodes
    assert "core.0.forward.zero" not in picture.nodes
    whole = seen("language model", steps=16)
    assert len([n for n in whole.nodes if n.startswith("x.")]) == 16
    assert "⋯" not in whole.svg


@pytest.mark.parametrize(
    "symbol, drawn",
    [
        ('<&">', '<&">'), ("\n", "⏎"), (" ", "␣"), ("\t", "⇥"), ("a b", "a␣b"), ("\x00", "␀"), ("\x1b", "␛"),
        ("\x7f", "␡"), ("\x85", "\ufffd"), ("\ud800", "\ufffd"), ("\uffff", "\ufffd"), ("한글", "한글"), ("ㅎ", "ㅎ"),
        ("👩\u200d👩\u200d👧", "👩\u200d👩\u200d👧"), ("\u3000", "␣"), ("]]>", "]]>"),
    ],
)  # fmt: skip
def test_any_text_is_drawn_visibly_and_is_well_formed(symbol: str, drawn: str) -> None:
    trace = RECORDED()["language model"]
    names = dict.fromkeys(trace.names, symbol)
    odd = replace(trace, read=(symbol,) * 16, written=(symbol,) * 16, expected=(symbol,) * 15, names=names)
    picture = Seen(unrolled_svg(odd, title=f"a {symbol} title"))
    assert picture.text("x.core.0") == drawn
    assert picture.text("y.0").startswith(drawn)
    assert picture.title("x.core.0") == f"x_1 = {drawn}"
    picture.svg.encode("utf-8")


def test_long_words_are_cut_with_an_ellipsis_and_told_in_full() -> None:
    trace = RECORDED()["many-to-one"]
    word = "Donaudampfschifffahrtsgesellschaft"
    picture = Seen(unrolled_svg(replace(trace, read=(word, "가나다라마바사아자차카타파하", "e\u0301" * 9, "x", "y"))))
    assert re.fullmatch(r"Donau\w*…", picture.text("x.core.0"))
    assert len(picture.text("x.core.0")) < 15
    assert picture.title("x.core.0") == f"x_1 = {word}"
    assert len(picture.text("x.core.1")) < 9, "wide signs take more room"
    assert picture.text("x.core.2") == "e\u0301" * 9, "what is drawn as one sign is measured as one"


def test_it_says_what_it_is_to_who_cannot_see_it() -> None:
    picture = seen("many-to-one")
    assert picture.root.get("role") == "img"
    assert picture.root.get("aria-label") == "text → label: many-to-one (sentiment): GRU, unrolled"
    assert picture.root.findtext(f"{NS}title") == picture.root.get("aria-label")
    described = picture.root.findtext(f"{NS}desc") or ""
    assert described.startswith("core reads a, ␣very, ␣good, ␣film, ␣indeed (steps 1 to 5 of 5); says ")
    assert "prefers-color-scheme: dark" in picture.svg
    assert "Noto Sans KR" in picture.svg
    assert "http" not in picture.svg.replace("http://www.w3.org/2000/svg", ""), "nothing is fetched"
    assert not re.search(r'\bid="', picture.svg), "several can stand in one page"


def test_a_headline_of_ones_own() -> None:
    assert "Mein <Titel>" in "".join(seen("many-to-one", title="Mein <Titel>").root.itertext())


# ------------------------------------------------------------------------------------------------------ the rest


def test_a_trace_from_a_file_gives_the_same_picture(tmp_path: Path) -> None:
    for name in ("encoder-decoder", "aligned, numbers", "aligned, characters", "many-to-one, mean"):
        save_trace(RECORDED()[name], tmp_path / "a.trace")
        assert unrolled_svg(load_trace(tmp_path / "a.trace")) == unrolled_svg(RECORDED()[name]), name


def test_notebooks_show_it_and_it_can_be_saved(tmp_path: Path) -> None:
    picture = Picture.of(RECORDED()["many-to-one"], steps=3)
    assert picture._repr_svg_() == picture.svg == unrolled_svg(RECORDED()["many-to-one"], steps=3)
    picture.save(tmp_path / "한글.svg")
    assert (tmp_path / "한글.svg").read_text("utf-8") == picture.svg
    with pytest.raises(StorageError, match="cannot write the picture"):
        picture.save(tmp_path / "nowhere" / "a.svg")


def test_the_command_writes_a_file(tmp_path: Path) -> None:
    model = small_model(text=ENGLISH, dtype=torch.float32)
    save(model, tmp_path / "m")
    out = tmp_path / "a.svg"
    assert run("picture", tmp_path / "m", "the cat sat", "--out", out, "--steps", 3).code == 0
    assert out.read_text("utf-8") == unrolled_svg(record(model, "the cat sat"), steps=3)
    assert run("picture", tmp_path / "m", "the cat sat", "--out", out, "--rolled", "--start", 2).code == 0
    assert out.read_text("utf-8") == unrolled_svg(record(model, "the cat sat"), rolled=True, start=2)
    assert run("picture", tmp_path / "m", "the", "--out", out, "--start", 3).error == "start: expected 0 to 2, got 3"


def test_what_cannot_be_drawn() -> None:
    trace = RECORDED()["language model"]
    for settings, message in (
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"start": 16}, "start: expected 0 to 15, got 16"),
        ({"start": -1}, "start: expected 0 to 15, got -1"),
        ({"units": [16]}, "units: expected 0 to 15, got 16"),
        ({"units": []}, "units: expected 1 to 16 of them, got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            unrolled_svg(trace, **settings)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="holds no states"):
        unrolled_svg(Trace(("a",), (), (), {}))


def test_a_single_step_and_a_unit_that_is_always_nothing() -> None:
    one = Seen(unrolled_svg(record(small_model(text=ENGLISH, hidden=3), "t")))
    assert [n for n in one.nodes if n.startswith(("x.", "y."))] == ["x.core.0", "y.0"]
    trace = RECORDED()["one-to-one"]
    zero = replace(trace, tensors={**trace.tensors, "core.0.forward.h": torch.zeros(1, 12)})
    assert 'fill-opacity="0.0000"' in unrolled_svg(zero)
    both = record(model_of("text", "label", core__bidirectional="true", **{"input.unit": "word"}), "film")
    assert {a for a, b in Seen(unrolled_svg(both)).links if b == "y.0"} == {"core.0.forward.0", "core.0.reverse.0"}
