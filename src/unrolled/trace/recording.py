"""Record one run of a model: what every step read, held and gave.

The values are those of the ordinary run: it is the ordinary run, watched. Gates, which the fast paths never write down,
are computed from the states they made. Gradients are those of the reference path, where autograd keeps every state's.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unrolled import storage
from unrolled.attention import Attention
from unrolled.cells import BoundCell, GatedCell, Lookup
from unrolled.decoding import BeamSettings, beam_search
from unrolled.errors import DataError, ModelError, StorageError
from unrolled.kinds import Text, Written
from unrolled.kinds.contract import Steps, Targets
from unrolled.kinds.number import Scale
from unrolled.kinds.text import IGNORE
from unrolled.model import ExampleModel, LanguageModel, Model
from unrolled.nn import Core, as_core
from unrolled.trace.room import expect_room
from unrolled.unroll import Unrolled

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["GATES", "Trace", "gates_of", "load_trace", "record", "record_layer", "save_trace"]

GATES = {"lstm": ("i", "f", "g", "o"), "gru": ("r", "z", "n"), "rnn": (), "rnn_relu": ()}
"""The gates that are recorded, in torch's order: input, forget, candidate, output; reset, update, candidate."""


@dataclass(frozen=True)
class Trace:
    """What one run recorded, complete enough that no figure needs the model.

    Attributes:
        read: what each input step reads, as text, T of them; for numbers, their first few.
        written: what each output step says: the chosen symbols of a text, the labels; for a language model the
            likeliest next symbol at each step.
        expected: what was given as the right output, step by step; empty if nothing was.
        tensors: by name, all along their own time:
            `{core}.{k}.{forward|reverse}.{field}` [T H]: h, c (of an LSTM) and the gates (see `GATES`) of layer k;
            the core is `core`, or `decoder`, whose time is that of the output; `{core}.inputs` [T I], or ids [T] if
            one-hot;
            `scores.names` and `scores.values`: the `top` best symbols or labels at each output step [U K], ids and
            log-probabilities; `chosen` [U] and `chosen.score` [U]: what was said, and its log-probability;
            `attention` [U S]: where the decoder looked; `numbers` [U F]: what came out, scaled, where that is numbers;
            `ends` [U]: at which input step each output is given, where that is not every one;
            `{core}.{k}.{direction}.d{field}` [T H]: the gradient of the loss with respect to h and c, if asked for.
        names: the symbols or labels that `scores.names` and `chosen` number.
        about: form, cell, sizes and the figures of the run, plain values; with gradients `at`, of which output step
            they are; of some forms also `pooling`, `feed` and `input_feeding` as in the settings, and `scales`, the
            mean and deviation of each column of the numbers that are `read` and `written`.
    """

    read: tuple[str, ...]
    written: tuple[str, ...]
    expected: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    names: Mapping[int, str] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def layers(self, core: str = "core") -> list[str]:
        """The names of a core's layers and directions: `core.0.forward`, ..."""
        return [name.removesuffix(".h") for name in self.tensors if name.startswith(f"{core}.") and name.endswith(".h")]

    @property
    def cores(self) -> list[str]:
        """Which cores were recorded: `core`, and `decoder` where there is one."""
        return [core for core in ("core", "decoder") if self.layers(core)]

    @property
    def attention(self) -> Float[Tensor, "U S"]:
        """Where the decoder looked at each output step.

        Raises:
            ModelError: the model has no attention.
        """
        if "attention" not in self.tensors:
            raise ModelError("this model has no attention to look at: train one with --attention dot")
        return self.tensors["attention"].float()

    def _repr_html_(self) -> str:
        # Plain HTML of its own: figures stand on a higher floor, and a notebook should not carry a drawing library for
        # every value that is looked at. `unrolled.inspect(trace)` shows the pictures.
        def line(name: str, pieces: tuple[str, ...], tints: list[float]) -> str:
            told = "".join(
                f'<span style="background:rgba(217,98,59,{tint:.2f})">{html.escape(piece)}</span>'
                for piece, tint in zip(pieces[:300], tints or [0.0] * 300, strict=False)
            )
            more = f" … {len(pieces) - 300:,} more" if len(pieces) > 300 else ""
            return f"<tr><th>{name}</th><td style='text-align:left;white-space:pre-wrap'>{told}{more}</td></tr>"

        about = self.about
        scores = self.tensors.get("chosen.score", torch.zeros(0))[:300].float()
        doubt = (0.75 * (-scores / math.log(2) / 8).clamp(0, 1)).tolist()  # the warmer the more it surprised
        running = len(self.expected) == len(self.read) - 1 and "decoder" not in self.cores
        rows = [line("read", self.read, [0.0, *doubt] if running else [])]
        if self.written and not running:
            rows.append(line("written", self.written, doubt))
        sizes = f"{about.get('cell', '?')}, hidden size {about.get('hidden', '?')}, layers {about.get('layers', '?')}"
        head = f"<b>Trace</b> {html.escape(str(about.get('form', '')))}<br>{html.escape(sizes)}"
        return f"<div>{head}<table>{''.join(rows)}</table></div>"


def gates_of(cell: Any, inputs: Any, before: Float[Tensor, "T B H"]) -> dict[str, Float[Tensor, "T B H"]]:
    """The gates of a built-in cell at every step, from its inputs and the state before each step.

    Equations: those of `unrolled.cells`. A vanilla cell has none; a cell of one's own tells none.
    """
    bound = cell.bind() if isinstance(cell, GatedCell) else cell
    if not isinstance(bound, BoundCell) or not GATES.get(bound.equation.name):
        return {}
    projected = bound.project(inputs)
    recurrent = F.linear(before, bound.weights.hh, bound.weights.bias_hh)
    if bound.equation.name == "lstm":
        i, f, g, o = (projected + recurrent).chunk(4, dim=-1)
        return {"i": i.sigmoid(), "f": f.sigmoid(), "g": g.tanh(), "o": o.sigmoid()}
    (xr, xz, xn), (hr, hz, hn) = projected.chunk(3, dim=-1), recurrent.chunk(3, dim=-1)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    return {"r": r, "z": z, "n": (xn + r * hn).tanh()}


# ------------------------------------------------------------------------------------------------- watching


@contextmanager
def _replaced(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module` with another forward, for as long as this lasts."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _watch(core: Core, log: dict[str, Tensor], name: str) -> Any:
    """The core as it is, writing into `log` what it reads and holds at every step."""
    ordinary = core.forward

    def forward(inputs: Any, state: Any = None, **settings: Any) -> Unrolled:
        first = core.initial_state(_batch(inputs)) if state is None else state
        run = ordinary(inputs, first, **{**settings, "all_states": True})
        x = inputs
        cells = [cell for layer in core.layers for cell in layer]  # type: ignore[attr-defined]
        _note(log, f"{name}.inputs", _numbers(inputs))
        for k in range(len(core.layers)):
            outputs = []
            for d in range(core.directions):
                n = k * core.directions + d
                states = run.states.cells[n]
                place = f"{name}.{k}.{('forward', 'reverse')[d]}"
                for part, values in zip(states._fields, states, strict=True):
                    _note(log, f"{place}.{part}", values)
                start = first.cells[n].h[None].to(states.h.dtype)
                before = torch.cat([states.h[1:], start]) if d else torch.cat([start, states.h[:-1]])
                for gate, values in gates_of(cells[n], x, before).items():
                    _note(log, f"{place}.{gate}", values)
                outputs.append(states.h)
            x = torch.cat(outputs, dim=-1)
        return run if settings.get("all_states") else run._replace(states=None)

    return _replaced(core, forward)


def _retain(core: Core, kept: dict[str, list[Tensor]], name: str) -> Any:
    """The core on the reference path, cell by cell, keeping every state in `kept` with its gradient to come."""

    def forward(inputs: Any, state: Any = None, *, outputs: bool = True, **settings: Any) -> Unrolled:
        first = core.initial_state(_batch(inputs)) if state is None else state
        steps = (inputs.ids if isinstance(inputs, Lookup) else inputs).shape[0]
        x: Any = inputs
        final = []
        for k, layer in enumerate(core.layers):
            sides = []
            for d, cell in enumerate(layer):  # type: ignore[var-annotated, arg-type]
                place = f"{name}.{k}.{('forward', 'reverse')[d]}"
                now, hidden = first.cells[k * core.directions + d], [torch.empty(0)] * steps
                for t in reversed(range(steps)) if d else range(steps):
                    y, now = cell.step(Lookup(x.ids[t], x.table) if isinstance(x, Lookup) else x[t], now)
                    for part, value in zip(now._fields, now, strict=True):
                        if value.requires_grad:
                            value.retain_grad()
                        kept.setdefault(f"{place}.d{part}", []).append(value)
                    hidden[t] = y
                if d:
                    for part in now._fields:
                        kept[f"{place}.d{part}"].reverse()
                sides.append(torch.stack(hidden))
                final.append(now)
            x = torch.cat(sides, dim=-1)
        return Unrolled(x if outputs else None, type(first)(tuple(final)), None)

    return _replaced(core, forward)


def _note(log: dict[str, Tensor], name: str, values: Tensor) -> None:
    """What was there goes before: a decoder that reads what attention saw is called step by step."""
    log[name] = torch.cat([log[name], values]) if name in log else values


def _numbers(inputs: Any) -> Tensor:
    """Steps as vectors; one-hot ones as ids."""
    if not isinstance(inputs, Lookup):
        return inputs  # type: ignore[no-any-return]
    return inputs.ids if inputs.table is None else inputs.vectors()


def _batch(inputs: Any) -> int:
    shape = (inputs.ids if isinstance(inputs, Lookup) else inputs).shape
    return int(shape[1])


def _look(attention: Attention, log: dict[str, Tensor]) -> Any:
    ordinary, within = attention.forward, False

    def forward(queries: Tensor, memory: Any) -> tuple[Tensor, Tensor]:
        nonlocal within
        outermost, within = not within, True  # it may call itself, with one step as a sequence
        try:
            context, weights = ordinary(queries, memory)
        finally:
            within = not outermost
        if outermost:
            _note(log, "attention", weights if weights.dim() == 3 else weights[None])
        return context, weights

    return _replaced(attention, forward)


# ------------------------------------------------------------------------------------------------ recording


def record(
    model: Model,
    example: Any,
    *,
    expected: Any = None,
    gradient: bool = False,
    at: int | None = None,
    top: int = 10,
    steps: int | None = None,
) -> Trace:
    """One run of a model over one example, recorded.

    Args:
        model: any model that `unrolled.train` makes, in evaluation mode or not: it runs as in evaluation.
        example: a raw input of the model's kind; for a language model, a text.
        expected: what should come out; the loss, and so the gradient, is of it; if None, of what the model itself says.
            Of text that is written, the words that are read on the way: if None, those that the model itself writes by
            beam search. A language model's is the text itself.
        gradient: record the gradient of the loss with respect to every state too.
        at: the output step whose loss alone it is of (-1: the last, how far back does it reach?); None: of all, summed.
        top: how many of the best symbols or labels are kept at each step.
        steps: read at most so many steps of a language model's text.

    Raises:
        DataError: the example cannot be read, does not fit into memory, or is too short to have a loss where a gradient
            is asked for.
        ModelError: a gradient is asked for, numbers come out and none are expected.
    """
    training = model.training
    model.eval()
    try:
        if isinstance(model, LanguageModel):
            trace = _record_text(model, str(example), gradient, at, top, steps)
        else:
            assert isinstance(model, ExampleModel)
            trace = _record_example(model, example, expected, gradient, at, top)
    finally:
        model.train(training)
    return replace(trace, about={**trace.about, "at": at}) if gradient else trace


def _record_text(model: LanguageModel, text: str, gradient: bool, at: int | None, top: int, steps: int | None) -> Trace:
    ids = torch.from_numpy(model.vocabulary.encode(text).astype("int64"))[:steps].to(model.device)
    if not len(ids):
        raise DataError("the text is empty: there is nothing to record")
    if gradient and len(ids) < 2:
        raise DataError("the text is one symbol: a loss takes one to read and one to predict")
    expect_room(model, len(ids), gradient=gradient)
    log: dict[str, Tensor] = {}
    with torch.inference_mode(), _watch(model.core, log, "core"):
        scores, _ = model(ids[:, None])
    targets = torch.cat([ids[1:], ids.new_full((1,), IGNORE)])
    if gradient:

        def loss() -> Tensor:
            scores = model(ids[:-1, None])[0][:, 0]
            return _cross_entropy(scores, ids[1:], at)

        with _in_torch(model):
            log |= _gradients({"core": model.core}, loss)
    names = [model.vocabulary.name(i) for i in range(len(model.vocabulary))]
    log |= _best(scores[:, 0], targets, top)
    read = tuple(names[i] for i in ids.tolist())
    written = tuple(names[i] for i in scores[:, 0].argmax(-1).tolist())
    trace = _trace(model, log, read, written, read[1:], names)
    decode = model.vocabulary.decode
    characters = len(decode(ids.tolist())) - len(decode(ids[:1].tolist()))  # as `evaluate` counts them
    return replace(trace, about={**trace.about, "characters": characters})


def _cross_entropy(scores: Tensor, targets: Tensor, at: int | None) -> Tensor:
    """Summed over all steps, or that of one step."""
    if at is None:
        return F.cross_entropy(scores, targets, reduction="sum")
    if not -len(targets) <= at < len(targets):
        raise DataError(f"at: expected an output step, {-len(targets)} to {len(targets) - 1}, got {at}")
    return F.cross_entropy(scores[at], targets[at])


def _record_example(
    model: ExampleModel, example: Any, expected: Any, gradient: bool, at: int | None, top: int
) -> Trace:
    source, output = model.ends.input, model.ends.output
    steps = source.collate([_whole(source.encode(example))]).to(model.device)
    expect_room(model, int(steps.lengths[0]), gradient=gradient)
    names = _names(output)
    targets = None
    if expected is not None:
        targets = output.collate([_whole(output.encode(expected))]).to(model.device)
    elif gradient and not names:
        raise ModelError("a gradient is of a loss, and that of numbers is of what is expected: give it (expected=...)")
    if isinstance(output, Written) and targets is None:
        targets = _written(model, steps, output)
    cores = {"core": model.core}
    decoder = getattr(model.writer, "core", None)
    if isinstance(decoder, Core):
        cores["decoder"] = decoder
    log: dict[str, Tensor] = {}
    with torch.inference_mode(), ExitStack() as watched:
        for name, core in cores.items():
            watched.enter_context(_watch(core, log, name))
        attention = getattr(model.writer, "attention", None)
        if isinstance(attention, Attention):
            watched.enter_context(_look(attention, log))
        scores = model.scores(steps, targets)[:, 0]
    wanted = targets.tensors[0][:, 0] if targets is not None and names else None
    said: tuple[str, ...] = ()
    if names:
        log |= _best(scores, wanted if isinstance(output, Written) else None, top)
        said = tuple(names[i] for i in log["chosen"].tolist())
    else:
        log["numbers"] = scores
    if gradient and names and (at is not None or targets is None):
        right_ids = log["chosen"] if wanted is None else wanted
        with _in_torch(model):
            log |= _gradients(cores, lambda: _cross_entropy(model.scores(steps, targets)[:, 0], right_ids, at))
    elif gradient:
        if at is not None:
            raise ModelError("at: numbers have one loss; leave it out")
        assert targets is not None
        with _in_torch(model):
            log |= _gradients(cores, lambda: model.loss(steps, targets).total)
    right = () if wanted is None or expected is None else tuple(names[i] if i >= 0 else "?" for i in wanted.tolist())
    read = source.pieces(example) if isinstance(source, Text) else _shown(steps)
    if steps.ends is not None and output.aligned:
        log["ends"] = steps.ends[:, 0]
    return _trace(model, log, tuple(read), said, right, names)


def _whole(arrays: Any) -> Any:
    import numpy as np

    return tuple(array if isinstance(array, np.ndarray) else np.concatenate(list(array)) for array in arrays)


def _written(model: ExampleModel, steps: Steps, output: Written) -> Targets:
    """What the model itself writes, as targets."""
    with torch.inference_mode():
        ((best,),) = beam_search(
            model,
            model.begin(steps),
            rows=1,
            start=torch.tensor([output.start], device=model.device),
            end=output.end,
            settings=BeamSettings(max_length=2 * int(steps.lengths[0]) + 50),
            barred=[output.vocabulary.unknown],
        )
    ids = torch.tensor([*best.ids, output.end], device=model.device)[:, None]
    return Targets((ids,), torch.tensor([len(ids)]))


def _names(output: Any) -> list[str]:
    if isinstance(output, Written):
        return [*(output.vocabulary.name(i) for i in range(output.end)), "</s>"]
    return list(getattr(output, "names", ()))


def _shown(steps: Steps) -> list[str]:
    first = steps.tensors[0][:, 0]
    return [" ".join(f"{number:.3g}" for number in step.flatten()[:4].tolist()) for step in first]


def _best(scores: Tensor, chosen: Tensor | None, top: int) -> dict[str, Tensor]:
    """The best at each step, what was chosen (the likeliest, unless it is given) and its log-probability."""
    log_p = torch.log_softmax(scores.float(), dim=-1)
    values, names = log_p.topk(min(top, log_p.shape[-1]), dim=-1)
    said = log_p.argmax(-1) if chosen is None else torch.where(chosen < 0, log_p.argmax(-1), chosen)
    score = log_p.gather(-1, said[:, None])[:, 0]
    return {"scores.names": names, "scores.values": values, "chosen": said, "chosen.score": score}


@contextmanager
def _in_torch(model: Model) -> Iterator[None]:
    """The model without the native operators, whose first gradient loads seconds' worth of torch's compiler."""
    parts: list[Any] = [part for part in model.modules() if isinstance(getattr(part, "backend", None), str)]
    before = [(part, part.backend) for part in parts]
    for part, _ in before:
        part.backend = "reference"
    try:
        yield
    finally:
        for part, backend in before:
            part.backend = backend


def _gradients(cores: Mapping[str, Core], loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    kept: dict[str, list[Tensor]] = {}
    parameters = [p for core in cores.values() for p in core.parameters()]
    before = [(p, p.requires_grad, p.grad) for p in parameters]
    with torch.enable_grad(), ExitStack() as retained:
        for p in parameters:
            p.requires_grad_(True)
        for name, core in cores.items():
            retained.enter_context(_retain(core, kept, name))
        total = loss()
        leaves = [value for values in kept.values() for value in values]
        found: tuple[Tensor | None, ...] = torch.autograd.grad(total, leaves, allow_unused=True)
    for p, required, gradient in before:
        p.requires_grad_(required)
        p.grad = gradient
    # A state that the loss does not depend on has none.
    whole = [torch.zeros_like(v) if g is None else g for v, g in zip(leaves, found, strict=True)]
    rest = iter(whole)
    return {name: torch.stack([next(rest) for _ in values]) for name, values in kept.items()}


def _trace(
    model: Model,
    log: Mapping[str, Tensor],
    read: tuple[str, ...],
    written: tuple[str, ...],
    expected: tuple[str, ...],
    names: list[str],
) -> Trace:
    config = model.config
    tensors = {}
    for name, value in log.items():
        rows = value[:, 0] if value.dim() > 2 or (name.endswith(".inputs") and value.dim() == 2) else value
        tensors[name] = rows.detach().clone().cpu().contiguous()
    used = {i for name in ("scores.names", "chosen") if name in tensors for i in tensors[name].flatten().tolist()}
    about: dict[str, Any] = {
        "form": str(model.form),
        "cell": config.core.cell,
        "hidden": config.core.hidden,
        "layers": config.core.layers,
        "bidirectional": config.core.bidirectional,
    }
    if config.output.kind in ("label", "number"):
        about["pooling"] = config.output.pooling
    if config.output.kind == "text":
        about |= {"feed": config.output.feed, "input_feeding": config.output.input_feeding}
    numeric = {"read": model.ends.input} if config.input.kind in ("series", "vector") else {}
    scales = {side: getattr(end, "scale", None) for side, end in {**numeric, "written": model.ends.output}.items()}
    if scales := {side: scale.to_json() for side, scale in scales.items() if isinstance(scale, Scale)}:
        about["scales"] = scales
    if "chosen.score" in tensors and written:
        about["log_probability"] = float(tensors["chosen.score"].sum())
    return Trace(read, written, expected, tensors, {i: names[i] for i in sorted(used)}, about)


def record_layer(
    layer: torch.nn.Module,
    inputs: Float[Tensor, "T B I"],
    loss: Callable[[Float[Tensor, "T B O"]], Tensor] | None = None,
) -> Trace:
    """One run of any `torch.nn.RNN`, `LSTM` or `GRU` (or `unrolled.nn`'s), recorded; of the first row of a batch.

    Args:
        layer: time-major, or with `batch_first` inputs `[B T I]`.
        loss: of the layer's outputs; the gradient with respect to every state is recorded if it is given.

    Raises:
        ModelError: another kind of module, or a layer with `proj_size`.
    """
    core = as_core(layer).eval()
    x = inputs.transpose(0, 1) if getattr(layer, "batch_first", False) else inputs
    x = x[:, :1]
    log: dict[str, Tensor] = {}
    with torch.inference_mode(), _watch(core, log, "core"):
        core(x)
    if loss is not None:
        log |= _gradients({"core": core}, lambda: loss(core(x).outputs))
    tensors = {name: value[:, 0].detach().clone().cpu().contiguous() for name, value in log.items()}
    about = {
        "form": type(layer).__name__,
        "cell": {"RNN_TANH": "rnn", "RNN_RELU": "rnn_relu"}.get(str(layer.mode), str(layer.mode).lower()),
        "hidden": core.hidden_size,
        "layers": len(core.layers),
        "bidirectional": core.directions == 2,
    }
    read = tuple(" ".join(f"{number:.3g}" for number in step[0, :4].tolist()) for step in x)
    return Trace(read, (), (), tensors, {}, about)


# -------------------------------------------------------------------------------------------------- one file


def save_trace(trace: Trace, path: str | Path, *, half: bool = False) -> None:
    """Write a trace as one file, safetensors with JSON in it.

    half: keep numbers as float16, half the size; states in (-1, 1) lose nothing that a figure could show.

    Raises:
        StorageError: it cannot be written.
    """
    tensors = {
        name: value.half() if half and value.is_floating_point() else value for name, value in trace.tensors.items()
    }
    content = {
        "read": trace.read,
        "written": trace.written,
        "expected": trace.expected,
        "names": {str(i): name for i, name in trace.names.items()},
        "about": dict(trace.about),
    }
    storage.write_tensors(path, "trace", tensors, {"trace": json.dumps(content)})


def load_trace(path: str | Path) -> Trace:
    """The trace in a file.

    Raises:
        StorageError: it is missing, damaged, newer, or no trace.
    """
    tensors, metadata = storage.read_tensors(path, "trace")
    try:
        content = json.loads(metadata["trace"])
        names = {int(i): str(name) for i, name in content["names"].items()}
        texts = [tuple(map(str, content[key])) for key in ("read", "written", "expected")]
        return Trace(texts[0], texts[1], texts[2], tensors, names, content["about"])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise StorageError(f"{path}: expected what save_trace writes, got other content: {error}") from None
