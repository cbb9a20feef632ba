"""Looking inside: the recorded run is the ordinary one, gradients are autograd's, figures are what their names say."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from samples import ENGLISH, small_model
from test_written import PAIRS, SOURCE, TARGET, WAYS, batch, translator

from unrolled import nn
from unrolled.cells import EQUATIONS, Lookup
from unrolled.errors import DataError, ModelError, StorageError
from unrolled.kinds.contract import Targets
from unrolled.trace import (
    gradient_flow,
    gradient_norms,
    load_trace,
    record,
    record_layer,
    recording,
    room,
    save_trace,
    step_singular_values,
    verdict,
)
from unrolled.trace.gradients import fall, growth, memory_length, saturation
from unrolled.trace.looking import (
    alignment_error_rate,
    alignments,
    coverage,
    entropy,
    monotonicity,
    overlooked,
    pharaoh,
    read_pharaoh,
)
from unrolled.trace.room import recording_bytes

TEXT = ENGLISH[:40]
CELLS = ("rnn", "rnn_relu", "lstm", "gru")


def ids_of(model: Any, text: str) -> torch.Tensor:
    return torch.from_numpy(model.vocabulary.encode(text).astype("int64"))[:, None]


# ------------------------------------------------------------------------------------------ the recorded run


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cell", CELLS)
def test_the_recorded_run_is_the_ordinary_run(cell: str, dtype: torch.dtype) -> None:
    """Bit for bit, on the path that the model takes: its scores, and its states."""
    model = small_model(text=ENGLISH, dtype=dtype, cell=cell, layers=2)
    trace = record(model, TEXT)
    with torch.inference_mode():
        scores, state = model(ids_of(model, TEXT))
    best = torch.log_softmax(scores[:, 0].float(), -1).topk(10, dim=-1)
    assert torch.equal(trace.tensors["scores.values"], best.values)
    for k in range(2):
        for field in state.cells[k]._fields:
            recorded = trace.tensors[f"core.{k}.forward.{field}"]
            assert recorded.shape == (len(TEXT), 8)
            assert torch.equal(recorded[-1], getattr(state.cells[k], field)[0])
    assert "".join(trace.read) == TEXT
    assert trace.expected == trace.read[1:]
    assert "forward" not in vars(model.core), "nothing is left behind"


@pytest.mark.parametrize("embedding", [None, 5])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gates_make_the_states(cell: str, embedding: int | None) -> None:
    """Put into the cell's equation, the recorded gates give the recorded states."""
    model = small_model(text=ENGLISH, cell=cell, layers=2, embedding=embedding)
    t = record(model, TEXT).tensors
    for k in range(2):
        at = f"core.{k}.forward"
        h, first = t[f"{at}.h"], torch.zeros(1, 8, dtype=torch.float64)
        if cell == "lstm":
            c = t[f"{at}.c"]
            before = torch.cat([first, c[:-1]])
            torch.testing.assert_close(t[f"{at}.f"] * before + t[f"{at}.i"] * t[f"{at}.g"], c)
            torch.testing.assert_close(t[f"{at}.o"] * c.tanh(), h)
        else:
            before = torch.cat([first, h[:-1]])
            torch.testing.assert_close((1 - t[f"{at}.z"]) * t[f"{at}.n"] + t[f"{at}.z"] * before, h)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_translators_are_recorded(way: dict[str, Any]) -> None:
    model = translator(**way)
    trace = record(model, SOURCE, expected=TARGET)
    steps, targets = batch(model, [(SOURCE, TARGET)])
    with torch.inference_mode():
        scores = model.scores(steps, targets)[:, 0]
    assert torch.equal(trace.tensors["scores.values"], torch.log_softmax(scores.float(), -1).topk(8, -1).values)
    assert trace.about["log_probability"] == pytest.approx(-float(model.loss(steps, targets).total), rel=1e-6)
    assert trace.written[-1] == "</s>"
    assert "".join(trace.written[:-1]) == TARGET
    assert [word.strip() for word in trace.read] == SOURCE.split()
    assert trace.cores == (["core", "decoder"])
    assert len(trace.tensors["decoder.0.forward.h"]) == len(TARGET.split()) + 1
    if way.get("output__attention") == "none":
        with pytest.raises(ModelError, match="no attention to look at"):
            _ = trace.attention
    else:
        assert trace.attention.shape == (len(TARGET.split()) + 1, len(SOURCE.split()))
        torch.testing.assert_close(trace.attention.sum(-1), torch.ones(len(trace.attention)))


def test_without_a_target_it_is_what_the_model_itself_writes() -> None:
    from unrolled.decoding import BeamSettings
    from unrolled.prediction import Searching, predict

    model = translator(torch.float32)
    trace = record(model, "the cat")
    (answer,) = predict(model, ["the cat"], searching=Searching(BeamSettings(beam=5, max_length=54)))
    assert "".join(trace.written[:-1]) == answer.text
    assert trace.about["log_probability"] == pytest.approx(answer.details["log_probability"], rel=1e-4)
    assert trace.expected == ()


# ---------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("at", [None, -1, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_are_autograds(cell: str, at: int | None) -> None:
    """By hand: the cell in a loop on the reference path, every state's gradient retained."""
    model = small_model(text=ENGLISH, cell=cell)
    trace = record(model, TEXT, gradient=True, at=at)
    ids = ids_of(model, TEXT)
    (one,) = model.core.layers[0]
    state, states = one.initial_state(1), []
    for t in range(len(ids) - 1):
        _, state = one.step(Lookup(ids[t], None), state)
        for field in state:
            field.requires_grad and field.retain_grad()
        states.append(state)
    scores = F.linear(torch.stack([s.h for s in states]), model.writer.weight, model.writer.bias)[:, 0]
    chosen = slice(None) if at is None else [at]
    F.cross_entropy(scores[chosen], ids[1:, 0][chosen], reduction="sum").backward()
    norms = torch.stack([s.h.grad[0] if s.h.grad is not None else torch.zeros(8) for s in states]).norm(dim=-1)
    torch.testing.assert_close(gradient_norms(trace, "core.0.forward"), norms)
    if cell == "lstm":
        for t in (0, 5):
            torch.testing.assert_close(trace.tensors["core.0.forward.dc"][t], states[t].c.grad[0])


def test_recording_leaves_gradients_and_modes_as_they_were() -> None:
    model = small_model(text=ENGLISH).train()
    model.writer.bias.grad = torch.ones_like(model.writer.bias)
    before = {
        name: (p.requires_grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()
    }
    record(model, TEXT, gradient=True)
    assert model.training
    for name, p in model.named_parameters():
        assert p.requires_grad == before[name][0]
        assert (p.grad is None) == (before[name][1] is None)


def test_gradients_of_a_translator_reach_the_encoder() -> None:
    for way in WAYS[:8]:
        trace = record(translator(**way), SOURCE, expected=TARGET, gradient=True)
        for core in trace.cores:
            for layer in trace.layers(core):
                assert bool(gradient_norms(trace, layer).any()), (way, layer)


def test_a_gradient_without_what_is_expected_is_of_what_the_model_says() -> None:
    model = translator()
    trace = record(model, SOURCE, gradient=True)
    steps, _ = batch(model, [(SOURCE, TARGET)])
    own = trace.tensors["chosen"][:, None]
    targets = Targets((own,), torch.tensor([len(own)]))
    again = recording._gradients({"core": model.core}, lambda: model.loss(steps, targets).total)
    torch.testing.assert_close(trace.tensors["core.0.forward.dh"], again["core.0.forward.dh"][:, 0])


def test_a_text_larger_than_memory_is_refused_before_it_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(text=ENGLISH, cell="lstm", hidden=8, layers=2, dtype=torch.float32)
    need = recording_bytes(model, 1000)
    states = 2 * 6 * 1000 * 2 * 8 * 4  # h, c and four gates of two layers of 8 units, and the copy of them
    assert need == states + 3 * 1000 * len(model.vocabulary) * 4
    monkeypatch.setattr(room, "free_bytes", lambda: need // 10)
    with pytest.raises(DataError, match=r"to record 1,000 steps takes about 0\.0 GiB .* --steps (79|80) "):
        record(model, (ENGLISH * 2)[:1000])
    assert len(record(model, ENGLISH, steps=79).read) == 79


@pytest.mark.parametrize("mode", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("ours", [True, False])
def test_any_layer_of_torch_can_be_recorded(mode: str, ours: bool) -> None:
    torch.manual_seed(0)
    layer = getattr(nn if ours else torch.nn, mode)(3, 4, num_layers=2, bidirectional=True).double()
    x = torch.randn(7, 2, 3, dtype=torch.float64)
    trace = record_layer(layer, x, loss=lambda outputs: outputs[-1].sum())
    out, _ = layer(x[:, :1])
    last = torch.cat([trace.tensors[f"core.1.{side}.h"] for side in ("forward", "reverse")], dim=-1)
    torch.testing.assert_close(last, out[:, 0].detach())
    assert trace.about["cell"] == mode.lower()
    assert gradient_norms(trace, "core.0.forward").shape == (7,)
    with pytest.raises(ModelError, match=r"expected a torch\.nn\.RNN, LSTM or GRU"):
        record_layer(torch.nn.Linear(3, 3), x)


@pytest.mark.parametrize("embedding", [None, 5])
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_singular_values_are_those_of_the_full_jacobian(cell: str, embedding: int | None) -> None:
    model = small_model(text=ENGLISH, cell=cell, layers=2, embedding=embedding)
    trace = record(model, TEXT)
    ids = ids_of(model, TEXT)
    for k, step in ((0, 5), (1, 9), (1, 0)):
        one = model.core.layers[k][0]
        kind = type(one.initial_state(1))
        names = kind._fields
        if step:
            held = torch.cat([trace.tensors[f"core.{k}.forward.{name}"][step - 1] for name in names])
        else:
            held = torch.zeros(8 * len(names), dtype=torch.float64)
        x: Any = trace.tensors["core.0.forward.h"][step][None] if k else Lookup(ids[step], model.reader.table)

        def advance(flat: torch.Tensor, one: Any = one, x: Any = x, kind: Any = kind) -> torch.Tensor:
            _, state = one.step(x, kind(*(part[None] for part in flat.split(8))))
            return torch.cat([field[0] for field in state])

        full = torch.linalg.svdvals(torch.autograd.functional.jacobian(advance, held))
        found = step_singular_values(model.core, trace, f"core.{k}.forward", step, count=3)
        torch.testing.assert_close(found, full[:3].detach(), rtol=1e-6, atol=1e-9)


def test_falls_and_growth_are_those_of_a_known_decay() -> None:
    norms = torch.tensor([0.5**t for t in range(40, -1, -1)], dtype=torch.float64)  # halves at each step back
    assert fall(norms, 10) == 4  # 2^-4 is the first below a tenth
    assert fall(norms, 1000) == 10
    assert growth(norms) == pytest.approx(0.5)
    assert fall(norms.flip(0), 10) is None
    assert growth(norms.flip(0)) == pytest.approx(2)
    assert math.isnan(growth(norms[:1]))
    padded = torch.cat([norms, torch.zeros(3, dtype=torch.float64)])  # nothing flows from after the last target
    assert (fall(padded, 10), growth(padded)) == (4, pytest.approx(0.5))


def test_a_verdict_gives_the_figure_and_what_to_try() -> None:
    """A vanilla network with small weights forgets; with large ones and no squashing it explodes."""
    text = ENGLISH[:120]
    said = {}
    for name, cell, scale in (("small", "rnn", 0.2), ("large", "rnn_relu", 4.0)):
        model = small_model(text=ENGLISH, cell=cell)
        with torch.no_grad():
            model.core.layers[0][0].weight_hh.mul_(scale)
            if name == "large":
                model.core.layers[0][0].weight_hh.copy_(torch.eye(8) * 1.2)
                model.core.layers[0][0].weight_ih.abs_()
        (flow,) = gradient_flow(record(model, text, gradient=True, at=-1))
        said[name] = verdict(flow, cell)
        if name == "small":
            assert f"1000-fold in {flow.thousandth} steps" in said[name]
    assert "try an LSTM or a GRU" in said["small"]
    assert "explodes" in said["large"]
    assert "1.20-fold" in said["large"]


def test_a_verdict_of_an_lstm_follows_the_gradient_that_lives_on_in_c() -> None:
    """With the forget gate open and the output gate all but shut, dL/dh dies at once and dL/dc stays."""
    model = small_model(text=ENGLISH, cell="lstm")
    said = {}
    for name, bias in (("open", 20.0), ("shut", -6.0)):
        with torch.no_grad():
            one = model.core.layers[0][0]
            one.weight_hh.mul_(1e-4)
            one.weight_ih.zero_()
            one.bias_hh.zero_()
            one.bias_ih.zero_()
            one.bias_ih[8:16] = bias
        trace = record(model, ENGLISH[:60], gradient=True, at=-1)
        (flow,) = gradient_flow(trace)
        assert flow.thousandth is not None
        assert flow.thousandth < 3
        assert flow.c is not None
        norms = torch.linalg.vector_norm(trace.tensors["core.0.forward.dc"].double(), dim=-1)
        assert flow.c.growth == pytest.approx(growth(norms))
        said[name] = verdict(flow, "lstm")
        if name == "shut":
            assert flow.c.growth == pytest.approx(1 / (1 + math.exp(6)), rel=0.05)
    assert said["open"].startswith("Over these 58 steps the gradient of c, in which an LSTM remembers, neither falls")
    assert "falls 1000-fold in" in said["shut"]


def test_saturation_and_memory_are_those_of_the_gates() -> None:
    model = small_model(text=ENGLISH, cell="lstm")
    with torch.no_grad():
        one = model.core.layers[0][0]
        for parameter in one.parameters():
            parameter.zero_()
        one.bias_ih[8:16] = math.log(4)  # the forget gate: 0.8 at every step
        one.bias_ih[:8] = 10  # the input gate: open
    trace = record(model, TEXT)
    assert memory_length(trace, "core.0.forward") == pytest.approx(5)
    assert saturation(trace, "core.0.forward") == {"i": 1.0, "f": 0.0, "o": 0.0}
    plain = record(small_model(text=ENGLISH, cell="rnn"), TEXT)
    assert memory_length(plain, "core.0.forward") is None
    assert saturation(plain, "core.0.forward") == {}
    with pytest.raises(ModelError, match="no gradients"):
        gradient_norms(plain, "core.0.forward")


# ------------------------------------------------------------------------------------------------ attention


def test_attention_figures_of_known_matrices() -> None:
    straight, flat = torch.eye(4), torch.full((2, 4), 0.25)
    assert entropy(straight).tolist() == [0, 0, 0, 0]
    assert entropy(flat).tolist() == pytest.approx([2, 2])
    assert coverage(flat).tolist() == pytest.approx([0.5] * 4)
    assert monotonicity(straight) == 1
    assert monotonicity(straight.flip(0)) == 0
    assert alignments(straight.flip(0)) == [(3, 0), (2, 1), (1, 2), (0, 3)]
    assert pharaoh(alignments(straight.flip(0))) == "0-3 1-2 2-1 3-0"
    looked = torch.tensor([[0.9, 0.05, 0.05], [0.95, 0.0, 0.05]])
    assert overlooked(looked) == [1, 2]
    assert read_pharaoh("0-0 2?1") == ({(0, 0)}, {(0, 0), (2, 1)})
    with pytest.raises(DataError, match="got 'a-1'"):
        read_pharaoh("0-0 a-1")


def test_alignment_error_rate_by_hand() -> None:
    """Och and Ney's formula: A = {00, 11, 12}, S = {00}, P = {00, 11}: 1 - (1 + 2) / (3 + 1)."""
    found, sure, possible = [[(0, 0), (1, 1), (1, 2)]], [[(0, 0)]], [[(0, 0), (1, 1)]]
    assert alignment_error_rate(found, sure, possible) == pytest.approx(1 - 3 / 4)
    assert alignment_error_rate(sure, sure) == 0
    with pytest.raises(DataError, match="as many sentences"):
        alignment_error_rate(found, [])
    with pytest.raises(DataError, match="no links"):
        alignment_error_rate([[]], [[]])


# ------------------------------------------------------------------------------------------------- one file


def test_a_trace_is_one_file(tmp_path: Path) -> None:
    trace = record(translator(torch.float32), PAIRS[0][0], expected="die Katze", gradient=True)
    save_trace(trace, tmp_path / "a.trace")
    back = load_trace(tmp_path / "a.trace")
    assert (back.read, back.written, back.expected, back.names) == (
        trace.read,
        trace.written,
        trace.expected,
        trace.names,
    )
    assert back.about == dict(trace.about)
    assert back.tensors.keys() == trace.tensors.keys()
    for name, tensor in trace.tensors.items():
        assert torch.equal(back.tensors[name], tensor), name
    save_trace(trace, tmp_path / "half.trace", half=True)
    half = load_trace(tmp_path / "half.trace")
    torch.testing.assert_close(half.attention, trace.attention, atol=1e-3, rtol=0)
    assert (tmp_path / "half.trace").stat().st_size < (tmp_path / "a.trace").stat().st_size


def test_a_damaged_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.trace"
    save_trace(record(small_model(text=ENGLISH), TEXT), path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match="is damaged"):
        load_trace(path)
    with pytest.raises(StorageError, match="nowhere"):
        load_trace(tmp_path / "nowhere")


def test_what_cannot_be_recorded() -> None:
    model = small_model(text=ENGLISH)
    with pytest.raises(DataError, match="the text is empty"):
        record(model, "")
    with pytest.raises(DataError, match="one symbol"):
        record(model, "a", gradient=True)
    with pytest.raises(DataError, match="at: expected an output step, -2 to 1, got 5"):
        record(model, "the", gradient=True, at=5)
    assert len(record(model, TEXT, steps=7).read) == 7


def test_a_thousand_steps_take_two_seconds() -> None:
    """At most; measured 0.16 s on two cores, and 2.7 s with gradients, which take the reference path."""
    model = small_model(text=ENGLISH, dtype=torch.float32, hidden=512, layers=2)
    record(model, TEXT)
    began = time.monotonic()
    trace = record(model, (ENGLISH * 2)[:1000])
    assert time.monotonic() - began < 2
    assert len(trace.read) == 1000


def test_every_cell_is_recorded_here() -> None:
    assert set(CELLS) == set(EQUATIONS)
