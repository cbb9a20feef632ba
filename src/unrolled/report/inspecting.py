"""A model, or two, and an input -> a report."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from unrolled import figures, storage
from unrolled.checkpoints import load
from unrolled.config import to_dict
from unrolled.data import find_texts, open_data, read_text, read_values
from unrolled.decoding import generate
from unrolled.errors import ConfigError, DataError, ModelError, UnrolledError, nearest
from unrolled.kinds import Text
from unrolled.kinds.label import labels_of
from unrolled.model import ExampleModel, LanguageModel, Model
from unrolled.prediction import given_values, predict
from unrolled.report.page import Report, Section, table
from unrolled.report.sections import bits_of, gradient_section, trace_sections
from unrolled.trace import Trace, load_trace, record
from unrolled.trace.units import activity, drivers, importance, interesting

__all__ = ["SECTIONS", "compare", "given", "inspect", "write_examples"]

Inspected: TypeAlias = Model | Trace | str | Path
Given: TypeAlias = Callable[[Model], tuple[Any, Any]]
"""What a model shall read and what should come out, once the model is there."""

SECTIONS = ("answer", "unrolled", "attention", "next", "states", "units", "gradient", "learning", "samples")
"""What a page on one model may have; what its form lacks is left out."""

_EXAMPLES = "examples.json"
_READ = 300  # symbols of a text, unless told otherwise: what a page can show
_FOLLOWED = 2000  # steps: gradients take the reference path, a cell at a time
_SURVEYED, _HELD, _CANDIDATES = 4000, 160, 32  # characters over which units are surveyed and held, and how many units
_WHY = {
    "matters": "the model leans on it most",
    "reads": "it tells the last symbol ({:.0%} of its variance)",
    "keeps": "it lasts: {:.2f} of it is left after 10 symbols",
}
_LARGE = 200_000  # numbers: a larger example is not kept with a model


def inspect(
    model: Inspected,
    example: Any = None,
    *,
    expected: Any = None,
    steps: int | None = None,
    show: Sequence[str] = (),
) -> Report:
    """What there is to be seen in one run of a model, as a page: what it said and how sure it was, where it looked, its
    states, how far its gradient reaches, how it was trained.

    Args:
        model: a model, its folder, a `Trace`, or the file of one. Only of a folder is the training known.
        example: what it shall read: a raw value of the input's kind; for a language model, a text; or what `given`
            finds in a file. If None, an example that was kept when the model was trained; a language model without
            one reads what it writes itself.
        expected: what should come out; of text that is written, it is what is read on the way.
        steps: read at most so many steps; a text of running symbols is read up to 300 of them if None.
        show: only the sections of these names.

    Raises:
        DataError: the example cannot be read, is empty, or does not fit into memory.
        ConfigError: there is no such section.
        ModelError: a section cannot be shown, or something is to be read by a trace, which is a run already.
        StorageError: there is no such model or trace, or it is damaged.
    """
    _expect_steps(steps)
    for name in show:
        if name not in SECTIONS:
            raise ConfigError(f"show: unknown section '{name}': {nearest(name, SECTIONS)}")
    model, folder = _opened(model)
    if isinstance(model, Trace):
        if example is not None or expected is not None:
            raise ModelError("a trace is a run that was recorded already: give the model's folder to read something")
        report = _of_trace(model)
    else:
        report = _of_model(model, folder, example, expected, steps)
    return report.only(show) if show else report


def _expect_steps(steps: int | None) -> None:
    if steps is not None and steps < 1:
        raise DataError(f"steps: expected at least 1, got {steps}")


def _opened(model: Inspected) -> tuple[Model | Trace, Path | None]:
    """A model and its folder, or a trace."""
    if isinstance(model, Model | Trace):
        return model, None
    path = Path(model)
    if path.is_file():
        return load_trace(path), None
    return load(path), path


def _of_trace(trace: Trace) -> Report:
    facts = {
        "cell": str(trace.about.get("cell", "")).upper(),
        "hidden size": f"{trace.about.get('hidden', 0):,}",
        "layers": f"{trace.about.get('layers', 0)}",
        "steps read": f"{len(trace.read):,}",
    }
    if trace.written:
        facts["steps written"] = f"{len(trace.written):,}"
    return Report("A recorded run", str(trace.about.get("form", "")), facts, trace_sections(trace), {"": trace})


def _of_model(model: Model, folder: Path | None, example: Any, expected: Any, steps: int | None) -> Report:
    kept = [] if folder is None else _read_examples(folder)
    metrics = [] if folder is None else _metrics(folder)
    sections: list[Section] = []
    traces = {}
    trace, origin = None, ""
    if callable(example):
        example, beside = example(model)
        expected = beside if expected is None else expected
    if example is None:
        example, expected, origin = _own_example(model, kept)
    if example is not None:
        trace, note = _recorded(model, example, expected, steps)
        traces[""] = trace
        sections = trace_sections(trace)
        if isinstance(model, LanguageModel):
            sections = [_units(model, str(example), trace) if s.name == "units" else s for s in sections]
        first = sections[0]
        remarks = " ".join(part for part in (origin, note) if part)
        if remarks:
            body = f'{first.body}<p class="note">{html.escape(remarks)}</p>'
            sections[0] = Section(first.name, first.title, first.text, body, first.figures)
    training = _training(metrics, model.config.training.clip)
    if training is not None:
        sections.append(training)
    samples = _samples(model, kept)
    if samples is not None:
        sections.append(samples)
    title = folder.resolve().name if folder is not None else "A model"
    return Report(title, str(model.form), _facts(model, metrics), sections, traces)


# ------------------------------------------------------------------------------------------------ what is read


def given(named: str, *, input: str | None = None) -> Given:
    """What a person names as input, as an `example` for `inspect` and `compare`: a text is itself, a file is what it
    holds; of a table that is its first row, and what should come out if that is beside it.

    input: other columns of a table than those of training, `KIND:COLUMN,...`.
    """
    return lambda model: _given(model, named, input)


def _given(model: Model, named: str, input: str | None) -> tuple[Any, Any]:
    """
    Raises:
        DataError: there is no such file, or nothing in it.
    """
    path = Path(named)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # a long text is no name
        is_file = False
    if isinstance(model, LanguageModel):
        if not is_file:
            return named, None
        return "".join(piece for file in find_texts(path) for piece in read_text(file)), None
    assert isinstance(model, ExampleModel)
    kind, asked = model.config.input.kind, model.config.output.kind
    if is_file and kind not in ("image", "video") and asked != "next" and not named.endswith(".npy") and input is None:
        table_ = open_data(named, model.config)
        if table_.columns != ("text",):
            for value, right in read_values(table_, model.config, outputs=None):
                return value, right
    for value in given_values(model, [named], input=input):
        return value, None
    raise DataError(f"{named}: there is nothing in it to read")


def _own_example(model: Model, kept: Sequence[tuple[Any, Any]]) -> tuple[Any, Any, str]:
    """What is read when nothing is given: an example, what should come out, and where it comes from."""
    if kept:
        return *kept[0], "This is an example of its validation part; give a text of your own to read that."
    if not isinstance(model, LanguageModel):
        return None, None, ""
    text = _sample(model, 200)
    return (text or None), None, "Nothing was given to read, so that the model reads what it wrote itself."


def _sample(model: LanguageModel, length: int) -> str:
    """Text that the model writes, the same every time."""
    prompt = ""
    if model.vocabulary.missing("\n"):
        prompt = next(
            (name for name in map(model.vocabulary.name, range(1, len(model.vocabulary))) if name.strip()), ""
        )
    try:
        return prompt + "".join(generate(model, prompt=prompt, length=length, temperature=0.7, seed=1))
    except UnrolledError:  # a vocabulary of nothing to begin with, or scores that are not finite
        return ""


def _recorded(model: Model, example: Any, expected: Any, steps: int | None) -> tuple[Trace, str]:
    """The run, with gradients where there is a loss, and what is to be said about how it was cut."""
    note = ""
    if isinstance(model, LanguageModel):
        text = str(example)
        if not text:
            raise DataError("the text is empty: expected at least one symbol")
        symbols = len(model.vocabulary.encode(text if steps is not None else text[: 50 * _READ]))
        notes = []
        if steps is None and symbols > _READ:
            steps = _READ
            notes.append(f"The first {_READ} symbols are read; --steps reads more.")
        if unknown := model.vocabulary.missing(text[:10_000]):
            named = ", ".join(map(repr, unknown[:5]))
            notes.append(f"The model never saw {named}{' and others' if len(unknown) > 5 else ''}.")
        read = symbols if steps is None else min(symbols, steps)
        if read > _FOLLOWED:
            notes.append(f"Gradients are followed through up to {_FOLLOWED:,} steps, so not here.")
        followed = 1 < read <= _FOLLOWED
        trace = record(model, text, gradient=followed, at=-1 if followed else None, steps=steps)
        note = " ".join(notes)
        return trace, note
    if steps is not None:
        example, expected, note = _cut(model, example, expected, steps)
    names_things = hasattr(model.ends.output, "names") or hasattr(model.ends.output, "vocabulary")
    if not names_things and expected is None and model.config.output.kind == "next":
        expected = example  # what is to be forecast is the series itself
    if not names_things and expected is None:
        return record(model, example), note
    return record(model, example, expected=expected, gradient=True, at=-1 if names_things else None), note


def _cut(model: Model, example: Any, expected: Any, steps: int) -> tuple[Any, Any, str]:
    """The first steps of an example, and of what should come out at each of them."""
    source = model.ends.input
    if isinstance(source, Text):
        whole: Any
        if source.aligned or source.characters is not None or not isinstance(example, str):
            whole = source.words(example)
            example = whole[:steps]
        else:
            whole = source.encode(example)[0]
            example = source.vocabulary.decode(whole[:steps].tolist())
    elif model.config.input.kind == "series":
        from unrolled.kinds.series import series_of

        whole = series_of(example)
        example = whole[:steps]
    else:
        raise DataError(f"--steps: {model.config.input.kind} is read whole; leave it out")
    if len(whole) <= steps:
        return example, expected, ""
    if expected is not None and model.config.output.kind == "labels":
        expected = labels_of(expected)[:steps]
    elif expected is not None and model.config.output.kind == "numbers":
        expected = expected[:steps]
    return example, expected, f"The first {steps:,} of {len(whole):,} steps are read."


# ------------------------------------------------------------------------------------- what is kept with a model


def write_examples(folder: str | Path, examples: Iterable[tuple[Any, Any]]) -> None:
    """Keep a few examples beside a model, inputs and what should come out, for its reports.

    What is no text or number, and what is very large, is left out.

    Raises:
        StorageError: they cannot be written.
    """
    plain = [{"input": _plain(value), "output": _plain(right)} for value, right in examples]
    kept = [pair for pair in plain if pair["input"] is not None]
    if kept:
        storage.write_json(Path(folder) / _EXAMPLES, "examples", {"examples": kept})


def _plain(value: Any) -> Any:
    """A raw value as JSON, or None."""
    if isinstance(value, Path):
        return str(value.resolve())
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, np.ndarray):
        return value.tolist() if value.dtype.kind in "iuf" and value.size <= _LARGE else None
    if isinstance(value, list | tuple):
        if len(value) > _LARGE:
            return None
        items = [_plain(item) for item in value]
        return None if any(item is None for item in items) else items
    return None


def _read_examples(folder: Path) -> list[tuple[Any, Any]]:
    if not (folder / _EXAMPLES).exists():
        return []
    return [(pair["input"], pair["output"]) for pair in storage.read_json(folder / _EXAMPLES, "examples")["examples"]]


def _metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a model's log that are whole; a training that goes on may be writing one."""
    lines = []
    try:
        text = (folder / "metrics.jsonl").read_text("utf-8")
    except OSError:
        return []
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            lines.append(found)
    return lines


# ------------------------------------------------------------------------------------ sections of a model


def _facts(model: Model, metrics: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    core = model.config.core
    facts = {
        "cell": core.cell.upper().replace("_", " "),
        "hidden size": f"{core.hidden:,}",
        "layers": f"{core.layers}{', both directions' if core.bidirectional else ''}",
        "weights": f"{sum(p.numel() for p in model.parameters()):,}",
    }
    if isinstance(model.ends.input, Text):
        vocabulary = model.ends.input.vocabulary
        facts["vocabulary"] = f"{len(vocabulary):,} {vocabulary.unit}{'s' if vocabulary.unit != 'jamo' else ''}"
    valid = [line for line in metrics if line.get("kind") == "valid"]
    train = [line for line in metrics if line.get("kind") == "train"]
    if train:
        facts["trained"] = f"{train[-1]['step']:,} updates, {train[-1].get('epoch', 0):.3g} epochs"
        facts["time"] = _time(float(train[-1].get("seconds", 0)))
    best = [line for line in valid if line.get("best")]
    if best:
        key = model.ends.output.best[0]
        if key in best[-1]:
            facts[f"validation {_spoken(key)}"] = f"{best[-1][key]:.4g}"
    return facts


def _spoken(name: str) -> str:
    return {"nats_per_char": "nats per character"}.get(name, name.replace("_", " "))


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _units(model: LanguageModel, text: str, trace: Trace) -> Section:
    """Units of a language model that are worth a look: what drives them, and what is lost without them."""
    layer = trace.layers()[-1]
    field = "c" if f"{layer}.c" in trace.tensors else "h"
    seen = activity(model, text[:_SURVEYED], layer=layer, field=field)
    if len(seen) < 2:
        return trace_sections(trace)[-1]
    spread = seen.values.astype(np.float64).std(0)
    candidates = np.argsort(-spread, kind="stable")[:_CANDIDATES].tolist()
    effects = importance(model, text[:_HELD], layer, units=candidates) if len(text) > 1 else []
    found = interesting(seen, effects, count=6)
    cost = {effect.unit: effect for effect in effects}
    rows = []
    for one in found:
        driven = [d for d in drivers(seen, one.unit, least=3) if d.sure]
        up = [figures.plain(d.symbol) for d in driven if d.sure > 0][:4]
        down = [figures.plain(d.symbol) for d in reversed(driven) if d.sure < 0][:4]
        effect = cost.get(one.unit) or importance(model, text[:_HELD], layer, units=[one.unit])[0]
        rows.append(
            (
                f"{one.unit}", _WHY[one.why].format(one.figure), " ".join(up) or "–", " ".join(down) or "–",
                f"{effect.cost / math.log(2):+.3f} bits", f"{effect.changed:.1%}",
            )
        )  # fmt: skip
    body = table(
        rows, ("unit", "why it is worth a look", "reading these raises it", "and these lower it",
               "without it, a symbol costs", "first guesses changed")
    )  # fmt: skip
    words = (
        f"The text coloured by what a single unit of the highest layer holds after each step: blue negative, orange "
        f"positive. The table says of each, over {len(seen):,} symbols, which of them drive it, and what is lost when "
        "it is held at zero."
    )
    drawn = figures.unit_text(trace, [one.unit for one in found], layer=layer)
    return Section("units", "What single units do", words, body, [drawn])


def _training(metrics: Sequence[Mapping[str, Any]], clip: float | None) -> Section | None:
    try:
        figure = figures.learning_curve(metrics)
    except DataError:
        return None
    valid = [line for line in metrics if line.get("kind") == "valid" and isinstance(line.get("loss", 0.0), float)]
    key = "nats_per_char" if valid and "nats_per_char" in valid[0] else "loss"
    losses = [(float(line[key]), int(line["step"])) for line in valid if key in line]
    text = "The loss of the training, and at the points that of data it has not learnt from."
    if len(losses) > 1:
        low, at = min(losses)
        last = losses[-1][0]
        text += f" The validation loss was least at update {at:,}: {low:.4f}."
        if at == losses[-1][1]:
            text += " It was still falling at the end: more --epochs may well help."
        elif last > 1.03 * low:
            text += " After that it rose: what it learnt then it learnt by heart; more data or --dropout would help."
        else:
            text += " After that it stayed about there."
    return Section("learning", "How it learnt", text + _clipped(metrics, clip), "", [figure])


def _clipped(metrics: Sequence[Mapping[str, Any]], clip: float | None) -> str:
    """What clipping did, by the norms of the whole gradient that the log has."""
    norms = sorted(float(line["norm"]) for line in metrics if line.get("kind") == "train" and "norm" in line)
    if not norms:
        return ""
    text = f" The gradient's norm was {norms[len(norms) // 2]:.3g} in the middle and {norms[-1]:.3g} at the most"
    if clip is None:
        return text + "; it was not clipped."
    cut = sum(norm > clip for norm in norms) / len(norms)
    if cut == 0:
        return f"{text}: clipping at {clip:g} never had to act."
    return (
        f"{text}: clipping at {clip:g} cut it down in {cut:.0%} of the logged updates, at the most "
        f"{norms[-1] / clip:.3g}-fold. That holds exploding gradients in; vanishing ones it cannot help."
    )


def _samples(model: Model, kept: Sequence[tuple[Any, Any]]) -> Section | None:
    if isinstance(model, LanguageModel):
        text = _sample(model, 400)
        if not text.strip():
            return None
        said = "Written by the model itself, at temperature 0.7 and with seed 1."
        return Section("samples", "What it writes", said, f"<blockquote>{html.escape(text.strip())}</blockquote>")
    values = [pair for pair in kept[:6] if isinstance(pair[0], str) or model.config.input.kind == "text"]
    if not values:
        return None
    rows = [
        (_line(value), answer.text, _line(right))
        for (value, right), answer in zip(values, predict(model, [value for value, _ in values]), strict=True)
    ]
    text = "Examples of the validation part, which it has not learnt from: what it says, and what stands there."
    return Section("samples", "What it says to others", text, table(rows, ("read", "the model says", "stands there")))


def _line(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else Path(value).name if str(value).startswith("/") else str(value)


# ---------------------------------------------------------------------------------------------------- two models


def compare(
    a: str | Path | Model,
    b: str | Path | Model,
    example: Any = None,
    *,
    expected: Any = None,
    steps: int | None = None,
) -> Report:
    """Two models side by side: the settings in which they differ, their learning curves, how far their gradients reach,
    and what each makes of the same input.

    Args: as for `inspect`.

    Raises:
        ModelError: they do not read the same kind of thing, or one is a trace.
        DataError, StorageError: as for `inspect`.
    """
    _expect_steps(steps)
    opened = [_opened(model) for model in (a, b)]
    if any(isinstance(model, Trace) for model, _ in opened):
        raise ModelError("compare: expected two model folders, got a trace")
    models: list[Any] = [model for model, _ in opened]
    folders = [folder for _, folder in opened]
    kinds = [model.config.input.kind for model in models]
    if kinds[0] != kinds[1]:
        raise ModelError(f"compare: both must read the same, and one reads {kinds[0]}, the other {kinds[1]}")
    names = _names(folders)
    metrics = {name: [] if f is None else _metrics(f) for name, f in zip(names, folders, strict=True)}
    origin = ""
    if callable(example):
        example, beside = example(models[0])
        expected = beside if expected is None else expected
    for model, folder in opened:
        if example is None and isinstance(model, Model):
            example, expected, origin = _own_example(model, [] if folder is None else _read_examples(folder))
    traces: dict[str, Trace] = {}
    notes = [origin] if origin else []
    if example is not None:
        for name, model in zip(names, models, strict=True):
            traces[name], note = _recorded(model, example, expected, steps)
            notes += [f"{name}: {note}"] if note else []
    sections = [_settings(names, models)]
    if any(metrics.values()):
        try:
            figure = figures.learning_curve({name: lines for name, lines in metrics.items() if lines})
            text = (
                "The losses of both over their updates; what is lower on text not learnt from (points) predicts better."
            )
            sections.append(Section("learning", "How they learnt", text, "", [figure]))
        except DataError:
            pass
    if traces:
        sections += _side_by_side(traces, notes)
        if any(key.endswith(".dh") for trace in traces.values() for key in trace.tensors):
            sections.append(gradient_section(traces))
    facts = {name: f"{model.config.core.cell.upper()}, {_facts(model, [])['weights']} weights" for name, model in
             zip(names, models, strict=True)}  # fmt: skip
    forms = [str(model.form) for model in models]
    return Report(
        f"{names[0]} and {names[1]}", forms[0] if forms[0] == forms[1] else " · ".join(forms), facts, sections, traces
    )


def _names(folders: Sequence[Path | None]) -> list[str]:
    names = ["A" if folder is None else folder.resolve().name for folder in folders]
    if names[0] == names[1]:
        names = [letter if folder is None else str(folder) for letter, folder in zip("AB", folders, strict=True)]
    return names if names[0] != names[1] else [f"{names[0]} (A)", f"{names[1]} (B)"]


def _settings(names: Sequence[str], models: Sequence[Model]) -> Section:
    first, second = (to_dict(model.config) for model in models)
    rows = [
        (f"{section}.{key}", _setting(value), _setting(second[section][key]))
        for section, values in first.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if value != second[section][key]
    ]
    text = f"They differ in {len(rows)} setting{'s' if len(rows) != 1 else ''}; all others are the same."
    body = table(rows, ("setting", *names)) if rows else ""
    return Section("settings", "Where they differ", text, body)


def _setting(value: Any) -> str:
    return "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _side_by_side(traces: Mapping[str, Trace], notes: Sequence[str]) -> list[Section]:
    """What each model makes of the same input: of a page's sections those that are worth a second look."""
    found: dict[str, list[tuple[str, Section]]] = {}
    for name, trace in traces.items():
        for section in trace_sections(trace):
            if section.name in ("answer", "attention", "next"):
                found.setdefault(section.name, []).append((name, section))
    sections = []
    for key, parts in found.items():
        title = {"answer": "The same input", "attention": "Where they looked", "next": "What they expect"}[key]
        for number, (name, part) in enumerate(parts):
            text = part.text
            if key == "answer" and "surprise" in part.text:
                text = _bits(traces[name]) + text
            note = f'<p class="note">{html.escape(" ".join(notes))}</p>' if key == "answer" and number == 1 else ""
            sections.append(
                Section(
                    key if number == 0 else f"{key}-{number + 1}",
                    f"{title}: {name}" if len(parts) > 1 else f"{title}, {name} alone",
                    text,
                    part.body + (note if notes else ""),
                    part.figures,
                )
            )
    return sections


def _bits(trace: Trace) -> str:
    """Bits per character, in which models of different symbols can be compared."""
    characters = int(trace.about.get("characters", 0)) or len("".join(trace.read[1:]))
    total = sum(bits_of(trace))
    return f"<b>{total / max(characters, 1):.3f} bits per character.</b> " if math.isfinite(total) else ""
