"""Raw inputs in, answers out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from unrolled.config import parse_end, resolve, to_dict
from unrolled.data import Batches, Examples, Values, encode_examples, format_of, open_data, read_values, whole_series
from unrolled.decoding import BeamSettings, Hypothesis, Sampling, beam_search, sample
from unrolled.errors import ConfigError, DataError, ModelError
from unrolled.kinds import Answer, Text
from unrolled.kinds.written import Written
from unrolled.model import ExampleModel, Model

Source: TypeAlias = Callable[[int], Any]

__all__ = ["Searching", "answers", "expect_answers", "given_values", "longest", "predict"]


def longest(source: Tensor) -> Tensor:
    """How long a text may become if nothing else is said: twice the source's steps and 50 more, `[B]`."""
    return 2 * source + 50


@dataclass(frozen=True)
class Searching:
    """How text is written: by beam search, of which beam 1 is greedy, or drawn at random.

    Attributes:
        beams: see `unrolled.decoding.BeamSettings`.
        sampling: draw so in place of searching; seed: of the random numbers.
        prefix: what every text begins with.
        replace_unknown: write unknown words too, each as the source word at which attention looked most.
    """

    beams: BeamSettings = field(default_factory=lambda: BeamSettings(max_length=longest))
    sampling: Sampling | None = None
    seed: int = 1
    prefix: str = ""
    replace_unknown: bool = False


def expect_answers(model: Model) -> ExampleModel:
    """
    Raises:
        ModelError: the model is of running text.
    """
    if not isinstance(model, ExampleModel):
        raise ModelError("this is a language model: it writes on (unrolled generate) and has no answers to predict")
    return model


def given_values(model: Model, given: Iterable[str], *, input: str | None = None, lines: bool = False) -> Iterator[Any]:
    """What a person names as inputs, as raw values: a text is itself, a file is what it holds.

    Args:
        given: texts, names of files, or, with `lines`, lines.
        input: other columns of a table than those of training, `KIND:COLUMN,...`.
        lines: each is a value, whatever files there are; empty ones too, so that lines stay together.
    """
    model = expect_answers(model)
    kind = model.config.input.kind
    layers = [] if input is None else [parse_end("input", input)]
    config = resolve(to_dict(model.config), *layers)
    for item in given:
        if kind in ("image", "video"):
            yield Path(item)
        elif lines or not Path(item).is_file():
            if kind != "text":
                raise DataError(f"{item}: there is no such file; a {kind} comes from a table or an .npy file")
            yield item
        elif kind != "text" and item.endswith(".npy"):
            yield Path(item)
        elif config.output.kind == "next":
            window = config.training.window
            yield from (
                series if window == "full" else series[-window:]
                for series in whole_series(open_data(item, config), config)
            )
        else:
            named = config
            if (config.data.format or format_of(Path(item))) == "text":  # lines, whatever their column was called
                named = resolve(to_dict(config), {"input": {"columns": ["text"]}, "data": {"names": []}})
            yield from (value for value, _ in read_values(open_data(item, named), named, outputs=False))


def predict(
    model: Model,
    values: Iterable[Any],
    *,
    searching: Searching | None = None,
    batch_size: int = 64,
    at_once: int = 1024,
) -> Iterator[Answer]:
    """The model's answers to raw inputs, in their order.

    Args:
        values: texts, lists of words, paths of images, arrays: what the input kind takes.
        searching: how text is written.
        batch_size: how many are computed side by side; it does not change an answer.
        at_once: how many are read before the first answer is given: 1 answers each at once.

    Raises:
        DataError: a value cannot be read; its number is named, from 1.
        ModelError: the model is a language model.
    """
    model = expect_answers(model)
    rest, before = iter(values), 0
    while part := list(islice(rest, at_once)):
        first = before

        def get(rows: Sequence[int], part: list[Any] = part) -> Iterator[tuple[Any, Any]]:
            yield from ((part[row], None) for row in rows)

        def where(i: int, first: int = first) -> str:
            return f"input {first + i + 1}"

        examples = encode_examples(Values(len(part), get, where, ""), model.ends, outputs=False)
        found = dict(answers(model, examples, searching, batch_size=batch_size, source=part.__getitem__))
        yield from (found[number] for number in range(len(part)))
        before += len(part)


@torch.inference_mode()
def _answer(
    model: ExampleModel, examples: Examples, rows: list[int], searching: Searching | None, source: Source | None
) -> list[Answer]:
    steps = examples.steps(rows).to(model.device)
    output = model.ends.output
    if not isinstance(output, Written):
        return model.answer(steps)
    searching = searching or Searching()
    found = _write(model, steps, output, searching, rows)
    read = None
    if searching.replace_unknown:
        read = _expect_words(model, source)
    return [
        _told(output, hypotheses, None if read is None else read(row))
        for row, hypotheses in zip(rows, found, strict=True)
    ]


def _expect_words(model: ExampleModel, source: Source | None) -> Callable[[int], list[str]]:
    text, output = model.ends.input, model.ends.output
    assert isinstance(output, Written)
    if not isinstance(text, Text) or {text.vocabulary.unit, output.vocabulary.unit} != {"word"}:
        raise ConfigError("replace_unknown: only a model that reads and writes words has unknown ones to replace")
    if model.config.output.attention == "none":
        raise ConfigError("replace_unknown: without attention nothing tells which source word it is")
    if source is None:
        raise ConfigError("replace_unknown: the texts themselves are needed, not only their symbols")
    return lambda row: text.pieces(source(row))


def answers(
    model: ExampleModel,
    examples: Examples,
    searching: Searching | None = None,
    *,
    batch_size: int = 64,
    source: Source | None = None,
) -> Iterator[tuple[int, Answer]]:
    """The number of each example and the answer to it, short inputs first.

    source: gives the raw value of an example, for `Searching.replace_unknown`.
    """
    training = model.training
    for rows in Batches(examples, batch_size, None, 0, shuffle=False).epoch(0):
        model.eval()
        try:
            found = _answer(model, examples, rows.tolist(), searching, source)
        finally:
            model.train(training)
        yield from zip(rows.tolist(), found, strict=True)


def _write(
    model: ExampleModel, steps: Any, output: Written, searching: Searching, numbers: Sequence[int]
) -> list[list[Hypothesis]]:
    rows = len(steps.lengths)
    source = model.ends.input
    if isinstance(source, Text):
        for b, length in enumerate(steps.lengths.tolist()):
            if not bool((steps.tensors[0][:length, b] != source.vocabulary.unknown).any()):
                raise DataError("an input has only symbols that the model never saw: there is nothing to go by")
    state = model.begin(steps)
    prefix = None
    if searching.prefix:
        prefix = [output.vocabulary.encode(searching.prefix).tolist()] * rows
    barred = [] if searching.replace_unknown else [output.vocabulary.unknown]
    common: dict[str, Any] = {
        "rows": rows,
        "start": torch.full((rows,), output.start, device=model.device),
        "end": output.end,
        "lengths": steps.lengths,
        "prefix": prefix,
        "barred": barred,
    }
    settings = searching.beams
    if searching.sampling is None:
        return beam_search(model, state, settings=settings, **common)
    drawn = sample(
        model,
        state,
        sampling=searching.sampling,
        seeds=[searching.seed + number for number in numbers],
        min_length=settings.min_length,
        max_length=settings.max_length,
        **common,
    )
    return [[hypothesis] for hypothesis in drawn]


def _told(output: Written, hypotheses: list[Hypothesis], read: list[str] | None) -> Answer:
    best = []
    for h in hypotheses:
        text = output.text(h.ids) if read is None else _with_source(output, h, read)
        best.append({"text": text, "score": h.score, "log_probability": h.log_probability})
    details: dict[str, Any] = {name: best[0][name] for name in ("score", "log_probability")}
    if len(best) > 1:
        details["n_best"] = best
    return Answer(best[0]["text"], str(best[0]["text"]), details)


def _with_source(output: Written, hypothesis: Hypothesis, read: list[str]) -> str:
    """The text, with each unknown word as the source word at which attention looked most when it was written."""
    vocabulary, words = output.vocabulary, list[str]()
    for u, i in enumerate(hypothesis.ids):
        if i == vocabulary.unknown and hypothesis.attention is not None:
            word = read[int(hypothesis.attention[u][: len(read)].argmax())].strip()
            words.append(f" {word}" if words else word)
        elif i < output.end:
            words.append(vocabulary.decode([i]))
    return "".join(words)
