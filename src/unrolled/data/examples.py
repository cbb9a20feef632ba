"""Rows of a table to examples: the raw values of both ends, and both ends encoded.

Table -> Values -> Examples -> batches of (Steps, Targets)
"""

from __future__ import annotations

import hashlib
from array import array as PackedNumbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from unrolled.data.ragged import Ragged, RaggedWriter, as_int64
from unrolled.data.tables import Table
from unrolled.errors import ConfigError, DataError
from unrolled.kinds.contract import Ends, Steps, Targets

if TYPE_CHECKING:
    from unrolled.config import Config

__all__ = [
    "Bad",
    "Batches",
    "Examples",
    "Values",
    "encode_examples",
    "forecast_values",
    "read_values",
    "series_values",
    "whole_series",
]

Array: TypeAlias = npt.NDArray[Any]

_USUAL = {
    "words": ("form", "text", "sentence"),
    "text": ("text", "form", "sentence", "source", "document"), "label": ("label",), "number": ("number",),
    "labels": ("tag", "upos", "labels", "label"), "numbers": ("numbers", "number"), "image": ("file", "image"),
    "video": ("file", "video"), "vector": ("file", "vector"), "series": ("file", "series"),
    "target": ("target", "text"),
}  # fmt: skip
"""Which columns are meant where none is named, the first that a table has."""
_ROWS = 4096  # rows in work at once
_LISTED = 10  # of the examples that were left out; to keep all would take memory as the table grows


@dataclass(frozen=True)
class Bad:
    """An example that cannot be used, and why."""

    where: str
    why: str


class Values:
    """The raw values of both ends, example by example, as they stand in a table.

    Attributes:
        has_outputs: false where the table lacks the output's columns and that was allowed.
    """

    def __init__(
        self,
        count: int,
        get: Callable[[Sequence[int]], Iterator[tuple[Any, Any]]],
        where: Callable[[int], str],
        fingerprint: str,
        chosen: Array | None = None,
        *,
        has_outputs: bool = True,
    ) -> None:
        """get: the values of these examples, in this order; chosen: a part of them, in its own order."""
        self._get, self._where, self._fingerprint = get, where, fingerprint
        self._chosen = np.arange(count) if chosen is None else chosen
        self._count = count
        self.has_outputs = has_outputs

    def __len__(self) -> int:
        return len(self._chosen)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for start in range(0, len(self), _ROWS):
            yield from self._get(self._chosen[start : start + _ROWS].tolist())

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        return next(iter(self._get([int(self._chosen[i])])))

    def take(self, rows: Sequence[int]) -> list[tuple[Any, Any]]:
        """The values of some examples, read at once."""
        return list(self._get(self._chosen[np.asarray(rows, np.int64)].tolist()))

    def where(self, i: int) -> str:
        """In which file and line example i stands."""
        return self._where(int(self._chosen[i]))

    def select(self, rows: Array) -> Values:
        """The examples with these numbers."""
        return Values(
            self._count, self._get, self._where, self._fingerprint, self._chosen[rows], has_outputs=self.has_outputs
        )

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits that differ when the table or the part of it differ."""
        return hashlib.sha256(
            f"{self._fingerprint} {hashlib.sha256(self._chosen.tobytes()).hexdigest()}".encode()
        ).hexdigest()

    def split(self, fraction: float, seed: int) -> tuple[Values, Values]:
        """Two parts: the second is `fraction` of the examples, drawn at random; both in the table's order.

        Raises:
            DataError: too few examples.
        """
        held = max(1, round(fraction * len(self)))
        if held >= len(self):
            raise DataError(f"{len(self)} examples are too few to hold some out for validation: give more, or --valid")
        order = np.random.default_rng(seed).permutation(len(self))
        return self.select(np.sort(order[held:])), self.select(np.sort(order[:held]))


def read_values(table: Table, config: Config, *, outputs: bool | None = True) -> Values:
    """The examples of a table as the two ends' settings say.

    Rows are examples, or those of equal `data.group` are one. A series is all its rows' numbers [T F]; in a table
    without groups, the row's own [T width], or an .npy file.

    Args:
        outputs: whether the output's columns must be there; None: only if they are.

    Raises:
        ConfigError: columns that must be named are not.
        DataError: a column is missing.
    """
    given, asked = config.input, config.output
    # CoNLL-U has a sentence both as its words and as a text: an output a word is of the words.
    aligned = asked.kind in ("labels", "numbers")
    inputs = _columns(table, given.columns, "words" if aligned and given.kind == "text" else given.kind, "input")
    labelled = outputs is not False
    wanted: tuple[str, ...] = ()
    if labelled:
        usual = "target" if asked.kind == "text" else asked.kind
        try:
            wanted = _columns(table, asked.columns, usual, "output")
        except DataError:
            if outputs:
                raise
            labelled = False
    group = config.data.group
    if group is None and given.kind == "video" and aligned and _repeats(table, inputs[0]):
        group = inputs[0]  # a row a frame
    if group is not None:
        table.expect_columns([group])
        return _grouped(table, config, inputs, wanted, group, labelled)
    read_input = _row_reader(config, inputs, table)
    read_output = _output_reader(config, wanted)

    needed = list(dict.fromkeys([*inputs, *wanted]))

    def get(rows: Sequence[int]) -> Iterator[tuple[Any, Any]]:
        for number, row in zip(rows, table.take(rows, needed), strict=True):
            yield read_input(row, number), read_output(row) if labelled else None

    return Values(len(table), get, table.where, table.fingerprint, has_outputs=labelled)


def _columns(table: Table, named: Sequence[str], usual: str, end: str) -> tuple[str, ...]:
    if named:
        table.expect_columns(named)
        return tuple(named)
    for name in _USUAL[usual]:
        if name in table.columns:
            return (name,)
    kind = "text" if usual in ("target", "words") else usual
    raise DataError(
        f"{end}: which column is it? Expected --{end} {kind}:COLUMN, columns here: {', '.join(table.columns)}"
    )


def _repeats(table: Table, column: str) -> bool:
    first = [row[column] for row in table.take(range(min(2, len(table))), [column])]
    return len(first) == 2 and first[0] == first[1]


def _row_reader(config: Config, columns: Sequence[str], table: Table) -> Callable[[dict[str, Any], int], Any]:
    kind, width, first = config.input.kind, config.input.width, columns[0]

    def path(row: dict[str, Any], number: int) -> Any:
        if not row[first]:
            raise DataError(f"column {first} is empty")
        return table.folder(number) / row[first] if isinstance(row[first], str) else row[first]

    def numbers(row: dict[str, Any], number: int) -> Any:
        cell = row[first]
        if len(columns) == 1 and (not isinstance(cell, str) or cell.endswith(".npy")):
            return path(row, number)
        cells = [row[name] for name in columns]
        if kind == "vector":
            return cells
        if len(cells) % width:
            raise DataError(f"input.width: {len(cells)} numbers in a row do not make steps of {width}")
        return _matrix([cells]).reshape(-1, width)

    def text(row: dict[str, Any], number: int) -> Any:
        return row[first]

    return path if kind in ("image", "video") else numbers if kind in ("vector", "series") else text


def _output_reader(config: Config, columns: Sequence[str]) -> Callable[[dict[str, Any]], Any]:
    if config.output.kind == "number" and len(columns) > 1:
        return lambda row: [row[name] for name in columns]
    return lambda row: row[columns[0]]


def _grouped(
    table: Table, config: Config, inputs: Sequence[str], wanted: Sequence[str], group: str, labelled: bool
) -> Values:
    rows_of: dict[str, list[int]] = {}
    for row, name in enumerate(table.column(group)):
        rows_of.setdefault(str(name), []).append(row)
    needed = list(dict.fromkeys([*inputs, *wanted]))
    groups = [np.array(rows) for rows in rows_of.values()]
    kind, asked = config.input.kind, config.output.kind

    def get(numbers: Sequence[int]) -> Iterator[tuple[Any, Any]]:
        for number in numbers:
            rows = table.take(groups[number].tolist(), needed)
            first = int(groups[number][0])
            if kind == "series":
                value: Any = _matrix([[row[name] for name in inputs] for row in rows])
            elif kind == "text":
                value = [row[inputs[0]] for row in rows]
            else:
                value = table.folder(first) / str(rows[0][inputs[0]])
            if not labelled or asked == "next":
                yield value, value
            elif asked in ("labels", "numbers"):
                cells = [[row[name] for name in wanted] for row in rows]
                yield value, _matrix(cells) if asked == "numbers" else [cell[0] for cell in cells]
            else:
                yield value, _output_reader(config, wanted)(rows[-1])

    return Values(len(groups), get, lambda g: table.where(int(groups[g][0])), table.fingerprint, has_outputs=labelled)


def _matrix(rows: Sequence[Sequence[Any]]) -> Array:
    """Cells as numbers [T F]; an empty one is NaN, which no kind takes: it names the place."""
    try:
        return np.array([[float(cell) if cell != "" else np.nan for cell in row] for row in rows], np.float64)
    except (TypeError, ValueError):
        for t, row in enumerate(rows):
            for cell in row:
                try:
                    float(cell)
                except (TypeError, ValueError):
                    raise DataError(f"step {t + 1}: expected a number, got {cell!r}") from None
        raise


def whole_series(table: Table, config: Config) -> list[Array]:
    """The series that a table holds, float64 [T F] each: all its rows, or those of each group.

    Raises:
        DataError: a column is missing, or a cell holds no number.
    """
    inputs = _columns(table, config.input.columns, "series", "input")
    group = config.data.group
    if group is not None:
        table.expect_columns([group])
        return [value for value, _ in _grouped(table, config, inputs, (), group, False)]
    return [_matrix([[row[name] for name in inputs] for row in table.take(range(len(table)), inputs)])]


def series_values(table: Table, config: Config, *, part: tuple[float, float] = (0.0, 1.0)) -> Values:
    """The whole series of a table, or a part of each, as both input and output: what both ends learn from."""
    whole = whole_series(table, config)

    def get(numbers: Sequence[int]) -> Iterator[tuple[Any, Any]]:
        for number in numbers:
            begin, end = (round(share * len(whole[number])) for share in part)
            yield whole[number][begin:end], whole[number][begin:end]

    return Values(len(whole), get, lambda i: table.where(0), f"{table.fingerprint} {part}")


def forecast_values(table: Table, config: Config, *, part: tuple[float, float] = (0.0, 1.0)) -> tuple[Values, Values]:
    """A table of one series (or one a group) for forecasting: windows to train on, and forecasts to judge.

    The first are windows of `training.window` steps. The second pair what is known, at most a window, with the
    `output.horizon` steps after it, one forecast after the other; the first of a file is made once a season is known.

    Args:
        part: from where to where, as shares of each series; a forecast may look back before the part.

    Raises:
        DataError: a series is too short for one window or one forecast.
    """
    whole = whole_series(table, config)
    window, horizon = config.training.window, config.output.horizon
    windows: list[tuple[int, int, int]] = []
    forecasts: list[tuple[int, int, int]] = []
    for s, series in enumerate(whole):
        begin, end = (round(share * len(series)) for share in part)
        size = end - begin if window == "full" else min(window + 1, end - begin)
        if size < 2:
            raise DataError(f"a series of {end - begin} steps is too short to learn from")
        stride = config.training.stride or max(1, size // 8)
        last = end - size
        starts = sorted({*range(begin, last + 1, stride), last})
        windows += [(s, start, start + size) for start in starts]
        context = size - 1
        origins = range(max(begin, config.output.season), end - horizon + 1, horizon)
        forecasts += [(s, max(0, at - context), at) for at in origins]
    digest = hashlib.sha256(f"{table.fingerprint} {part} {window} {horizon}".encode()).hexdigest()

    def cut(numbers: Sequence[int]) -> Iterator[tuple[Any, Any]]:
        for number in numbers:
            s, start, stop = windows[number]
            yield whole[s][start:stop], whole[s][start:stop]

    def judge(numbers: Sequence[int]) -> Iterator[tuple[Any, Any]]:
        for number in numbers:
            s, start, at = forecasts[number]
            yield whole[s][start:at], whole[s][at : at + horizon]

    return (
        Values(len(windows), cut, lambda i: table.where(windows[i][1]), digest),
        Values(len(forecasts), judge, lambda i: table.where(forecasts[i][2]), digest),
    )


@dataclass(frozen=True)
class Examples:
    """Examples with both ends encoded, in mapped files.

    Attributes:
        inputs, outputs: one `Ragged` for each array of an encoded value.
        kept: which of the raw values each example is, int64 [N].
        left_out: how many could not be used.
        bad: the first ten of them.
        fingerprint: of the raw values.
    """

    ends: Ends
    inputs: tuple[Ragged, ...]
    outputs: tuple[Ragged, ...]
    kept: Array
    left_out: int
    bad: tuple[Bad, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def lengths(self) -> Array:
        """Steps of each input, int64 [N]."""
        return self.inputs[0].lengths

    @property
    def targets(self) -> int:
        """How many targets there are in all: labels, words, numbers."""
        return int(self.outputs[0].lengths.sum()) if self.outputs else 0

    def steps(self, rows: Sequence[int]) -> Steps:
        """The inputs of these examples as a batch."""
        return self.ends.input.collate([tuple(ragged[i] for ragged in self.inputs) for i in rows])

    def batch(self, rows: Sequence[int]) -> tuple[Steps, Targets]:
        """These examples as a batch."""
        targets = self.ends.output.collate([tuple(ragged[i] for ragged in self.outputs) for i in rows])
        return self.steps(rows), targets


def encode_examples(
    values: Values,
    ends: Ends,
    *,
    outputs: bool = True,
    skip_bad: bool = False,
    directory: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Examples:
    """Encode both ends of all examples, or the inputs alone.

    Raises:
        DataError: an example that cannot be used, with its place, unless they are skipped; no example is left.
    """
    writers: list[list[RaggedWriter]] = [[], []]
    kept = PackedNumbers("q")
    bad: list[Bad] = []
    left_out = 0
    pairs = iter(values)
    number = 0
    while True:
        done = [0, 0]
        try:
            pair = next(pairs)
        except StopIteration:
            break
        except DataError as error:
            if skip_bad:
                raise DataError(
                    f"{values.where(number)}: {error} (--skip-bad cannot skip what is not a value)"
                ) from None
            raise DataError(f"{values.where(number)}: {error}") from None
        try:
            lengths = []
            both: tuple[Any, ...] = (ends.input, ends.output)
            for side, (end, value) in enumerate(zip(both, pair, strict=True)):
                if side and not outputs:
                    break
                arrays = end.encode(value)
                while len(writers[side]) < len(arrays):
                    writers[side].append(RaggedWriter(directory))
                for writer, array in zip(writers[side], arrays, strict=True):
                    lengths.append(writer.append(array))
                    done[side] += 1
            # What a forecast is judged by is the steps to come, not one for each that is read.
            if outputs and ends.output.aligned and ends.output.kind != "next":
                words = lengths[1] if len(writers[0]) == 2 else lengths[0]
                _expect_aligned(words, lengths[done[0]])
            kept.append(number)
        except DataError as error:
            for side, written in enumerate(done):
                for writer in writers[side][:written]:
                    writer.drop_last()
            if not skip_bad:
                raise DataError(f"{values.where(number)}: {error}") from None
            left_out += 1
            if len(bad) < _LISTED:
                bad.append(Bad(values.where(number), str(error)))
        number += 1
        if progress and number % 256 == 0:
            progress(number)
    if not kept:
        raise DataError(f"no example can be used; the first: {bad[0].where}: {bad[0].why}" if bad else "no examples")
    made = [tuple(writer.finish() for writer in side) for side in writers]
    return Examples(ends, made[0], made[1], as_int64(kept), left_out, tuple(bad), values.fingerprint)


def _expect_aligned(steps: int, targets: int) -> None:
    if steps != targets:
        raise DataError(f"expected an output for each of the {steps} steps, got {targets}")


class Batches:
    """The order in which examples are gone through: batches of about equal lengths, in a new order each epoch.

    Examples are shuffled, then sorted by length within pools of 100 batches, so that a batch holds little padding and
    its examples are still drawn from everywhere; then the batches are shuffled. The order is a function of the seed and
    the epoch alone: a training that is resumed goes on in it.

    Args:
        examples: what to go through.
        batch_size: most examples of a batch.
        max_tokens: most steps of a batch, padding counted; a longer example is a batch by itself.
        shuffle: whether at all; else the batches come by length, longest last.
    """

    def __init__(
        self, examples: Examples, batch_size: int, max_tokens: int | None, seed: int, *, shuffle: bool = True
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch size: expected at least 1, got {batch_size}")
        self._lengths = examples.lengths
        outputs = examples.outputs
        self._targets = outputs[0].lengths if outputs else np.zeros_like(self._lengths)
        self._batch_size, self._max_tokens, self._seed, self._shuffle = batch_size, max_tokens, seed, shuffle
        self._epoch, self._order = -1, list[Array]()

    def __len__(self) -> int:
        """Batches of the longest epoch: every epoch has about so many, those of the first."""
        return self.count(0)

    def count(self, epoch: int) -> int:
        """How many batches an epoch has, without putting them in order where their number is always the same."""
        if self._max_tokens is None:
            return -(-len(self._lengths) // self._batch_size)
        return len(self.epoch(epoch))

    def epoch(self, epoch: int) -> list[Array]:
        """The batches of an epoch: the numbers of each one's examples."""
        if epoch == self._epoch:
            return self._order
        n = len(self._lengths)
        random = np.random.default_rng([self._seed, epoch])
        order = random.permutation(n) if self._shuffle else np.arange(n)
        pool = self._batch_size * 100 if self._shuffle else n
        batches: list[Array] = []
        for start in range(0, n, pool):
            part = order[start : start + pool]
            part = part[np.lexsort((self._targets[part], self._lengths[part]))]
            batches += self._cut(part)
        if self._shuffle:
            batches = [batches[k] for k in random.permutation(len(batches))]
        self._epoch, self._order = epoch, batches
        return batches

    def _cut(self, part: Array) -> list[Array]:
        if self._max_tokens is None:
            return [part[start : start + self._batch_size] for start in range(0, len(part), self._batch_size)]
        batches, start = [], 0
        longest = np.maximum(self._lengths[part], self._targets[part])
        while start < len(part):
            end, most = start + 1, int(longest[start])
            while end < len(part) and end - start < self._batch_size:
                most = max(most, int(longest[end]))
                if most * (end + 1 - start) > self._max_tokens:
                    break
                end += 1
            batches.append(part[start:end])
            start = end
        return batches
