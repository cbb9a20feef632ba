"""Text that is written: a decoder's steps are its unrolled call, the bridge, label smoothing, scheduled sampling."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from unrolled.config import resolve
from unrolled.kinds import Ends, Text, Written
from unrolled.kinds.contract import Steps
from unrolled.kinds.text import IGNORE
from unrolled.model import ExampleModel
from unrolled.vocabulary import build_vocabulary

SOURCE, TARGET = "the cat sat on a mat", "die Katze sass auf einer Matte"


def translator(dtype: torch.dtype = torch.float64, **settings: Any) -> ExampleModel:
    """A small untrained translator of words; settings by dotted names."""
    layers: dict[str, dict[str, Any]] = {
        "input": {"unit": "word", "embedding": 6},
        "core": {"hidden": 8, "layers": 1, "dropout": 0.0},
        "output": {"kind": "text", "unit": "word", "embedding": 5},
    }
    for name, value in settings.items():
        section, key = name.split("__")
        layers[section][key] = value
    ends = Ends(Text(build_vocabulary("word", [SOURCE])), Written(build_vocabulary("word", [TARGET])))
    torch.manual_seed(3)
    model = ExampleModel(resolve(layers), ends).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model.eval()


def batch(model: ExampleModel, pairs: list[tuple[str, str]]) -> Any:
    ends = model.ends
    steps = ends.input.collate([tuple(map(np.asarray, ends.input.encode(a))) for a, _ in pairs])
    targets = ends.output.collate([tuple(map(np.asarray, ends.output.encode(b))) for _, b in pairs])
    return steps, targets


PAIRS = [(SOURCE, TARGET), ("the cat", "die Katze"), ("a mat sat", "einer Matte"), ("cat", "Katze auf die Matte")]
WAYS = [
    {},
    {"output__attention": "general"},
    {"output__attention": "additive"},
    {"output__attention": "strongest"},
    {"output__attention": "none"},
    {"core__bidirectional": True},
    {"core__layers": 2, "core__cell": "gru"},
    {"core__layers": 2, "core__bidirectional": True, "core__cell": "rnn"},
    {"output__input_feeding": True},
    {"output__input_feeding": True, "core__bidirectional": True, "output__attention": "additive"},
]


def log_probabilities(model: ExampleModel, steps: Steps, targets: Any) -> torch.Tensor:
    """Of each row's target, by `begin` and `step` alone, [B]."""
    wanted = targets.tensors[0]
    state = model.begin(steps)
    word = torch.full_like(wanted[0], model.ends.output.start)  # type: ignore[attr-defined]
    total = torch.zeros(wanted.shape[1], dtype=torch.float64)
    for u in range(len(wanted)):
        scores, state = model.step(word, state)
        p = torch.log_softmax(scores.double(), -1)
        real = wanted[u] != IGNORE
        word = wanted[u].clamp(min=0)
        total += torch.where(real, p.gather(1, word[:, None])[:, 0], 0.0)
    return total


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_stepping_is_the_unrolled_call(way: dict[str, Any]) -> None:
    """Law 1, one floor up: the loss of a batch is what its words cost one by one."""
    model = translator(**way)
    steps, targets = batch(model, PAIRS)
    with torch.no_grad():
        loss = model.loss(steps, targets)
        assert loss.count == sum(len(b.split()) + 1 for _, b in PAIRS)
        torch.testing.assert_close(loss.total, -log_probabilities(model, steps, targets).sum())


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_row_does_not_depend_on_its_batch(way: dict[str, Any]) -> None:
    """Law 2: padding of source and target changes nothing."""
    model = translator(**way)
    with torch.no_grad():
        together = log_probabilities(model, *batch(model, PAIRS))
        alone = torch.cat([log_probabilities(model, *batch(model, [pair])) for pair in PAIRS])
    torch.testing.assert_close(together, alone)


def test_rows_can_be_chosen() -> None:
    """`select` is what beam search stands on: a chosen row goes on as it would have."""
    for way in WAYS:
        model = translator(**way)
        steps, _ = batch(model, PAIRS)
        word = torch.full((4,), model.ends.output.start)  # type: ignore[attr-defined]
        with torch.no_grad():
            _, state = model.step(word, model.begin(steps))
            rows = torch.tensor([2, 0, 0])
            expected = model.step(torch.tensor([1, 2, 3, 4]), state)[0][rows]
            got = model.step(torch.tensor([3, 1, 1]), state.select(rows))[0]
        torch.testing.assert_close(got, expected)


def test_without_a_difference_in_shape_the_state_is_passed_as_it_is() -> None:
    model = translator(core__layers=2)
    assert model.writer.bridge.maps is None
    steps, _ = batch(model, PAIRS)
    with torch.no_grad():
        encoded = model.core(model.reader(*steps.tensors), lengths=steps.lengths).state
        first = model.begin(steps).cells
    for a, b in zip(encoded.cells, first.cells, strict=True):
        assert torch.equal(a.h, b.h)
        assert torch.equal(a.c, b.c)


def test_encoder_and_decoder_share_no_weights() -> None:
    model = translator()
    ours = {p.data_ptr() for p in model.core.parameters()}
    assert not ours & {p.data_ptr() for p in model.writer.parameters()}


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_label_smoothing_is_torchs(smoothing: float, dtype: torch.dtype) -> None:
    """Value and gradients; float32 takes the native way, which never makes the scores."""
    model = translator(dtype, output__label_smoothing=smoothing).train()
    writer = model.writer
    joined = torch.randn(7, writer.weight.shape[1], dtype=dtype, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 3, 1, 4, 6])
    loss = writer.cross_entropy(joined, targets)
    scores = F.linear(joined, writer.weight, writer.bias)
    expected = F.cross_entropy(scores, targets, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)
    wrt = (joined, writer.weight, writer.bias)
    for a, b in zip(torch.autograd.grad(loss, wrt), torch.autograd.grad(expected, wrt), strict=True):
        torch.testing.assert_close(a, b)


def test_scheduled_sampling_reads_what_the_model_writes() -> None:
    """With ratio 1 every word read is the model's own, whatever the target: other targets of the same length, read one
    pass later, give the same steps. With 0 nothing changes."""
    model = translator(output__scheduled_sampling=1.0).train()
    steps, targets = batch(model, PAIRS[:1])
    seen: list[torch.Tensor] = []
    unrolled = model.writer._unroll

    def spy(ids: torch.Tensor, *args: Any) -> Any:
        seen.append(ids.clone())
        return unrolled(ids, *args)

    model.writer._unroll = spy
    model.loss(steps, targets)
    forced, mixed = seen
    own = model.writer.output(unrolled(forced, *model.writer._encode(*_reading(model, steps)), None, *_run(model)))
    assert torch.equal(mixed[0], forced[0])
    assert torch.equal(mixed[1:], own[:-1].argmax(-1))
    assert torch.equal(forced[1:], targets.tensors[0][:-1])


def _run(model: ExampleModel) -> tuple[Any, ...]:
    from unrolled.model import _Run

    return (_Run(model.core),)


def _reading(model: ExampleModel, steps: Steps) -> tuple[Any, ...]:
    return (lambda: model.reader(*steps.tensors), *_run(model), steps)


def test_the_gradient_reaches_both_cores() -> None:
    for way in WAYS:
        model = translator(**way).train()
        model.loss(*batch(model, PAIRS)).total.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, (way, name)
            assert bool(parameter.grad.any()), (way, name)


def test_a_list_of_texts_is_learnt_by_its_first() -> None:
    output = translator().ends.output
    (first,), (only,) = output.encode(["die Katze", "eine Katze"]), output.encode("die Katze")
    assert np.array_equal(np.asarray(first), np.asarray(only))


@pytest.mark.parametrize("feed", ["word", "zeros"])
def test_one_to_many_is_one_core(feed: str) -> None:
    """The core reads the vector, then its own words or zeros: by hand, with one call of the core."""
    from unrolled.kinds.series import Vector

    layers = {
        "input": {"kind": "vector"},
        "core": {"hidden": 8, "layers": 1, "dropout": 0.0},
        "output": {"kind": "text", "unit": "word", "feed": feed},
    }
    config = resolve(layers)
    values = np.random.default_rng(0).normal(size=(5, 4))
    ends = Ends(Vector.learn(list(values), config), Written(build_vocabulary("word", [TARGET])))
    torch.manual_seed(0)
    model = ExampleModel(config, ends).double().eval()
    rows = [tuple(map(np.asarray, ends.input.encode(value))) for value in values[:2]]
    targets = ends.output.collate([tuple(map(np.asarray, ends.output.encode(t))) for t in (TARGET, "die Katze")])
    steps = ends.input.collate(rows)
    steps = steps._replace(tensors=tuple(t.double() for t in steps.tensors))
    with torch.no_grad():
        wanted = targets.tensors[0]
        words = F.embedding(wanted[:-1].clamp(min=0), model.writer.table)
        x = torch.cat([model.reader(*steps.tensors), words * (feed == "word")])
        hidden = model.core(x, lengths=targets.lengths).outputs
        scores = F.linear(4 * hidden, model.writer.weight, model.writer.bias)
        expected = F.cross_entropy(scores.flatten(0, 1), wanted.flatten(), ignore_index=IGNORE, reduction="sum")
        torch.testing.assert_close(model.loss(steps, targets).total, expected)
        torch.testing.assert_close(-log_probabilities(model, steps, targets).sum(), expected)


_TRAINS_LONG = """
import random
import torch
import unrolled
from unrolled.progress import Silent

class Sizes(Silent):
    def update(self, done, note=""):
        if done in (200, 600):
            print([int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("RssAnon")][0])

draw = random.Random(1)
rows = [
    {"source": "abcdefghij"[k % 10] * draw.randrange(3, 60), "target": "xyz" * draw.randrange(1, 20)}
    for k in range(2000)
]
unrolled.train(
    rows, "m", valid=rows[:2], input="text:source", output="text:target", unit="char", cell="gru", hidden=256,
    embedding=16, bidirectional=True, layers=1, batch_size=16, epochs=10, steps=600, valid_every=600,
    precision="bf16", watcher=Sizes(), keep_memory=False,
)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells so the memory of a process")
def test_a_long_training_on_all_kinds_of_lengths_does_not_grow(tmp_path: Path) -> None:
    """What is kept for each shape of a product in bfloat16 adds up, see `Attention._wide`."""
    done = subprocess.run(
        [sys.executable, "-c", _TRAINS_LONG], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    early, late = map(int, done.stdout.split())
    assert late - early < 100, f"{early} MB after 200 updates, {late} MB after 600"
