"""What a training goes through, one update at a time: the windows of a text, or batches of examples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unrolled.cells import map_state
from unrolled.checkpoints import weights_of
from unrolled.config import Config
from unrolled.data import (
    Batches,
    EncodedText,
    Examples,
    Lanes,
    Table,
    Values,
    encode_examples,
    encode_texts,
    find_texts,
    forecast_values,
    open_data,
    read_text,
    read_values,
    series_values,
    split_text,
)
from unrolled.errors import DataError
from unrolled.evaluation import evaluate_text, judge_examples
from unrolled.kinds import INPUTS, OUTPUTS, Ends, Input, NextSymbol, Text
from unrolled.kinds.text import IGNORE
from unrolled.model import ExampleModel, LanguageModel, Model
from unrolled.progress import Watcher
from unrolled.vocabulary import build_vocabulary

__all__ = ["Course", "ExampleCourse", "Judgement", "Parts", "TextCourse"]

Texts = Sequence[str | Path]


@dataclass(frozen=True)
class Judgement:
    """What a validation found. value: the figure that tells the better model; figures: all, for the log; note: for
    people."""

    value: float
    figures: dict[str, Any]
    note: str


class Course(ABC):
    """What is trained on. `loss(epoch, index)` is called for index 0, 1, ... of each epoch; what is carried from one
    to the next is in `carry`, and a course that is given it back goes on the same.

    Attributes:
        unit: what a loss is counted per: `symbol`, `label`, ...
        chars_per_unit: characters in one, for text; None elsewhere.
        best: the figure by which models are compared, and whether its `min` or `max` is best.
        carry: tensors that the next update needs, beside weights and optimiser.
        fingerprints: of the training and validation data: `text` and `valid`.
    """

    unit: str
    chars_per_unit: float | None = None
    best: tuple[str, str]
    carry: list[Tensor]
    fingerprints: dict[str, str]

    @abstractmethod
    def updates(self, epoch: int) -> int:
        """How many updates an epoch has."""

    @abstractmethod
    def loss(self, epoch: int, index: int) -> tuple[Tensor, int]:
        """The summed loss of an update, and how many targets it is of."""

    def begin_epoch(self) -> None:  # noqa: B027 - most courses have nothing to begin
        """Called after the last update of an epoch."""

    @abstractmethod
    def judge(self) -> Judgement:
        """Validate the model as it is now."""

    @abstractmethod
    def words(self, value: float | None) -> str:
        """A value of `best`, for people."""

    @abstractmethod
    def examples(self, count: int) -> list[tuple[Any, Any]]:
        """A few raw examples of the validation part, inputs and what should come out; the first is of usual length."""

    @abstractmethod
    def describe(self, total: int) -> str:
        """One line about data and model."""


def _size(model: Model) -> str:
    return f"{sum(t.numel() for t in weights_of(model).values()):,} weights"


class TextCourse(Course):
    """A language model's: a text in lanes, window by window, the state carried on (truncated BPTT)."""

    unit = "symbol"
    best = NextSymbol.best

    @staticmethod
    def prepare(
        texts: Texts, valid: Texts | None, config: Config, ends: Ends | None, scratch: Path, watcher: Watcher
    ) -> tuple[Ends, tuple[EncodedText, EncodedText]]:
        """The ends, learnt from the text unless given, and both parts encoded."""
        if ends is None:
            ends = Ends(Text(_vocabulary(texts, config, watcher)), NextSymbol())
        text = _encode(texts, ends, config, scratch, watcher)
        if valid is None:
            text, held_out = split_text(text, config.data.valid_fraction)
        else:
            held_out = _encode(valid, ends, config, scratch, watcher)
        if len(held_out) <= len(held_out.starts):
            raise DataError(
                f"the validation text has {len(held_out)} symbols, expected at least two in one document, one to read "
                "and one to predict: give more text, a larger data.valid_fraction, or --valid"
            )
        return ends, (text, held_out)

    def __init__(
        self, model: LanguageModel, config: Config, parts: tuple[EncodedText, EncodedText], device: torch.device
    ) -> None:
        self.model, self.device = model, device
        self.text, self.valid = parts
        settings = self.settings = config.training
        # One rank today. Several would each take their own lanes of the text and keep their own carry.
        self.lanes = Lanes(
            self.text,
            settings.batch_size,
            None if settings.window == "full" else settings.window,
            settings.stride,
            rank=0,
            ranks=1,
        )
        self.chars_per_unit = self.text.characters / len(self.text)
        self.fingerprints = {"text": self.text.fingerprint, "valid": self.valid.fingerprint}
        self.begin_epoch()

    def updates(self, epoch: int) -> int:
        return len(self.lanes)

    def begin_epoch(self) -> None:
        self.state: Any = self.model.begin(batch=self.settings.batch_size)

    @property
    def carry(self) -> list[Tensor]:
        return _flatten(self.state)

    @carry.setter
    def carry(self, tensors: Sequence[Tensor]) -> None:
        rest = iter(tensors)
        self.state = map_state(lambda t: next(rest), self.state)

    def loss(self, epoch: int, index: int) -> tuple[Tensor, int]:
        window = self.lanes.window(index)
        ids, targets = window.inputs.to(self.device), window.targets.to(self.device)
        targets[: window.warm] = IGNORE
        reset = None if window.reset is None else window.reset.to(self.device)
        # The next window starts `advance` steps further on: the state there is its carry. With stride = window
        # that is the end of this window; with stride < window the windows overlap.
        nats, carry = self.model.loss(ids, targets, self.state, reset=reset, after=window.advance)
        self.state = map_state(lambda t: t.detach().clone(), carry)
        return nats, window.counted

    def judge(self) -> Judgement:
        lanes = max(1, min(self.settings.batch_size, len(self.valid) // 512))
        found = evaluate_text(self.model, self.valid, lanes=lanes)
        figures = {key: value for key, value in found.to_dict().items() if key != "seconds"}
        nats = found.nats_per_char
        return Judgement(
            nats,
            figures,
            f"{nats:.4f} nats/char  {found.bits_per_char:.4f} bits/char  perplexity {found.perplexity:.2f}",
        )

    def words(self, value: float | None) -> str:
        return f"{value:.4f} nats per character"

    def examples(self, count: int) -> list[tuple[Any, Any]]:
        """One: the beginning of the validation text, some 4,000 symbols of it."""
        text = self.model.vocabulary.decode(self.valid.ids[:4000].tolist()).lstrip()
        return [(text, None)] if text else []

    def describe(self, total: int) -> str:
        vocabulary = self.model.vocabulary
        symbols = {"char": "characters", "word": "words", "subword": "subwords"}.get(vocabulary.unit, "jamo")
        not_known, unseen = (
            f" ({part.unknown:,} of them unknown)" if part.unknown else "" for part in (self.text, self.valid)
        )
        return (
            f"{len(self.text):,} {symbols} to train on{not_known}, {len(self.valid):,} to validate{unseen}; vocabulary "
            f"{len(vocabulary):,}; {_size(self.model)}; {total:,} updates, {len(self.lanes):,} an epoch"
        )


def _flatten(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else [t for part in state for t in _flatten(part)]


def _vocabulary(texts: Texts, config: Config, watcher: Watcher) -> Any:
    settings, paths = config.input, find_texts(texts)
    total = sum(path.stat().st_size for path in paths)
    blank = True

    def chunks() -> Iterator[str]:
        nonlocal blank
        done = 0
        for path in paths:
            for chunk in read_text(path, errors=config.data.errors):
                blank = blank and chunk.isspace()
                yield chunk
            done += path.stat().st_size
            watcher.update(done)
        if blank:
            names = f"{', '.join(map(str, paths[:3]))}{', ...' if paths[3:] else ''}"
            raise DataError(f"there is no text in {names}, or nothing but white space")

    watcher.start("counting symbols", total)
    vocabulary = build_vocabulary(
        settings.unit, chunks(), max_size=settings.max_vocabulary, min_count=settings.min_count
    )
    watcher.stop()
    return vocabulary


def _encode(paths: Texts, ends: Ends, config: Config, scratch: Path, watcher: Watcher) -> EncodedText:
    watcher.start("encoding", sum(path.stat().st_size for path in find_texts(paths)))
    assert isinstance(ends.input, Text)
    text = encode_texts(
        paths,
        ends.input.vocabulary,
        documents=config.data.documents,
        errors=config.data.errors,
        directory=scratch,
        progress=watcher.update,
    )
    watcher.stop()
    return text


@dataclass(frozen=True)
class Parts:
    """Training and validation examples; the raw values beside the latter, for what is scored by them."""

    learn: Examples
    valid: Examples
    valid_values: Values


class ExampleCourse(Course):
    """Batches of examples of about equal lengths, in a new order each epoch."""

    @staticmethod
    def prepare(
        data: Any,
        valid: Any,
        config: Config,
        ends: Ends | None,
        scratch: Path,
        watcher: Watcher,
        *,
        input: Input | None = None,
    ) -> tuple[Ends, Parts]:
        """The ends, learnt from the training part unless given, and both parts encoded.

        input: what was learnt about the input elsewhere.
        """
        table = open_data(data, config, directory=scratch, progress=None)
        other = None if valid is None else open_data(valid, config, directory=scratch, progress=None)
        learn, held_out, taught = _parts(table, other, config, watcher)
        if ends is None:
            watcher.start("reading", len(taught))
            read = input or _Told(taught, 0, watcher).teach(INPUTS[config.input.kind], config)
            ends = Ends(read, _Told(taught, 1, watcher).teach(OUTPUTS[config.output.kind], config))
            watcher.stop()
        parts = []
        for name, values in (("encoding", learn), ("encoding validation", held_out)):
            watcher.start(name, len(values))
            parts.append(
                encode_examples(
                    values,
                    ends,
                    # A forecast is judged by what follows, which is no target of the steps before.
                    outputs=values is learn or config.output.kind != "next",
                    skip_bad=config.data.skip_bad,
                    directory=scratch,
                    progress=watcher.update,
                )
            )
            watcher.stop()
            for bad in parts[-1].bad:
                watcher.say(f"left out: {bad.where}: {bad.why}")
            if parts[-1].left_out > len(parts[-1].bad):
                watcher.say(f"left out: {parts[-1].left_out - len(parts[-1].bad):,} more")
        return ends, Parts(parts[0], parts[1], held_out)

    def __init__(self, model: ExampleModel, config: Config, parts: Parts, device: torch.device) -> None:
        self.model, self.parts, self.device = model, parts, device
        settings = config.training
        self.batches = Batches(parts.learn, settings.batch_size, config.data.max_tokens, settings.seed)
        self.unit = {"labels": "label", "numbers": "number", "text": "symbol", "next": "number"}.get(
            config.output.kind, config.output.kind
        )
        self.best = model.ends.output.best
        self.carry = []
        self.fingerprints = {"text": parts.learn.fingerprint, "valid": parts.valid.fingerprint}

    def updates(self, epoch: int) -> int:
        return self.batches.count(epoch)

    def loss(self, epoch: int, index: int) -> tuple[Tensor, int]:
        steps, targets = self.parts.learn.batch(self.batches.epoch(epoch)[index].tolist())
        loss = self.model.loss(steps.to(self.device), targets.to(self.device))
        return loss.total, loss.count

    def judge(self) -> Judgement:
        figures = judge_examples(self.model, self.parts.valid, self.parts.valid_values)
        shown = [
            f"{name} {figures[name]:.4f}" for name in (self.best[0], "loss", "macro_f1", "mase") if name in figures
        ]
        plain = {key: value for key, value in figures.items() if isinstance(value, int | float)}
        return Judgement(float(figures[self.best[0]]), plain, "  ".join(dict.fromkeys(shown)))

    def words(self, value: float | None) -> str:
        return f"{self.best[0]} {value:.4f}"

    def examples(self, count: int) -> list[tuple[Any, Any]]:
        valid = self.parts.valid
        # A forecast is of the series itself: what follows is no target of the steps before.
        several = np.linspace(0, len(valid) - 1, min(count, len(valid))).round().astype(int).tolist()
        usual = int(np.abs(valid.lengths - np.median(valid.lengths)).argmin())
        chosen = list(dict.fromkeys([usual, *several]))[:count]
        values = self.parts.valid_values.take([int(i) for i in valid.kept[chosen]])
        forecast = self.model.config.output.kind == "next"
        return [(value, None if forecast else right) for value, right in values]

    def describe(self, total: int) -> str:
        learn, valid = self.parts.learn, self.parts.valid
        return (
            f"{len(learn):,} examples of {learn.lengths.mean():.1f} steps to train on, {len(valid):,} to validate; "
            f"{_size(self.model)}; {total:,} updates, {self.updates(0):,} an epoch"
        )


class _Told:
    """One side of raw values, for a kind to learn from; what it refuses in the midst of them is told with its place."""

    def __init__(self, values: Values, side: int, watcher: Watcher) -> None:
        self.values, self.side, self.watcher = values, side, watcher
        self.number = -1
        self.bad, self.first_bad = 0, ""  # all of their messages would take memory as the table grows
        self.ended = False

    def _each(self, kind: Any, skip_bad: bool) -> Iterator[Any]:
        for pair in self.values:
            self.number += 1
            if self.number % 256 == 0:
                self.watcher.update(self.number)
            if skip_bad:  # listed when they are encoded
                try:
                    kind.check(pair[self.side])
                except DataError as error:
                    if not self.bad:
                        self.first_bad = f"{self.values.where(self.number)}: {error}"
                    self.bad += 1
                    continue
            yield pair[self.side]
        self.ended = True

    def teach(self, kind: Any, config: Config) -> Any:
        """What the kind learns."""
        try:
            return kind.learn(self._each(kind, config.data.skip_bad), config)
        except DataError as error:
            if self.bad and self.bad == self.number + 1:
                raise DataError(f"no example can be used; the first: {self.first_bad}") from None
            if self.ended or self.number < 0:
                raise
            raise DataError(f"{self.values.where(self.number)}: {error}") from None


def _parts(table: Table, other: Table | None, config: Config, watcher: Watcher) -> tuple[Values, Values, Values]:
    """Training and validation examples, and what the ends learn from; the split of a single table is told."""
    share = config.data.valid_fraction
    if config.output.kind == "next":
        # A forecast is judged on what comes after all that was learnt from.
        if other is not None:
            return forecast_values(table, config)[0], forecast_values(other, config)[1], series_values(table, config)
        part = (0.0, 1 - share)
        learn, _ = forecast_values(table, config, part=part)
        _, judged = forecast_values(table, config, part=(1 - share, 1.0))
        watcher.say(f"no validation file: the last {share:.0%} of the series are held out, {len(judged):,} forecasts")
        return learn, judged, series_values(table, config, part=part)
    values = read_values(table, config)
    if other is not None:
        return values, read_values(other, config), values
    learn, held_out = values.split(share, config.training.seed)
    watcher.say(
        f"no validation file: {len(held_out):,} of {len(values):,} examples, drawn at random, are held out "
        f"(data.valid_fraction {share:g}, seed {config.training.seed})"
    )
    return learn, held_out, learn
