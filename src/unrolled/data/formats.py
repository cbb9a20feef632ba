"""Files of rows, whatever their format: the columns of one file, and its rows in batches."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby, zip_longest
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unrolled.data.reading import opened, read_text, unpacked_suffix
from unrolled.errors import ConfigError, DataError

__all__ = [
    "FORMATS",
    "Batch",
    "Cell",
    "Rows",
    "Settings",
    "format_of",
    "open_objects",
    "open_pair",
    "open_rows",
    "shown",
]

FORMATS = ("tsv", "csv", "jsonl", "parquet", "conllu", "conll", "text")
"""What a file of rows may be."""

Cell: TypeAlias = str | list[str]
"""What stands in a row and a column: a text, or a list of texts."""

_EXTENSIONS = {
    ".tsv": "tsv",
    ".tab": "tsv",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".conllu": "conllu",
    ".conll": "conll",
}
_PARTED = {
    "tsv": "cells are parted by tabs, and quotes are letters like others (a file of tokens and tags, with blank lines"
    " between sentences, is of the format conll)",
    "csv": "cells are parted by commas, and a cell that holds a comma, a quote or a line end stands in quotes",
}

_CHUNK = 1 << 20  # bytes of a file in work at once
_BATCH = 1 << 13  # rows in a batch at most,
_LETTERS = 1 << 22  # and at most so many characters, the last row's aside


@dataclass(frozen=True)
class Settings:
    """How files are read, see `open_table`."""

    format: str | None = None
    columns: tuple[str, ...] | None = None
    header: str | bool = "auto"
    wanted: tuple[str, ...] = ()
    errors: str = "strict"


@dataclass(frozen=True)
class Batch:
    """Some rows: where each stands in its file, counted from 1, and the cells of each column."""

    places: Sequence[int]
    columns: Sequence[Sequence[Cell] | pa.Array]


@dataclass(frozen=True)
class Rows:
    """The rows of one file.

    Attributes:
        name: of the file, for messages.
        folder: where it lies.
        unit: what places are counted in, "line" or "row".
        columns: their names; none if the file is empty.
        batches: the rows, read as they are asked for.
    """

    name: str
    folder: Path
    unit: str
    columns: tuple[str, ...]
    batches: Iterator[Batch]

    def place(self, number: int) -> str:
        """Where a row stands: "reviews.tsv, line 17"."""
        return f"{self.name}, {self.unit} {number}" if self.name else f"{self.unit} {number}"


_Row: TypeAlias = tuple[int, Sequence[Cell]]
_Lines: TypeAlias = Iterator[str]


def format_of(path: Path) -> str:
    """The format that a file's extension tells, one of `FORMATS`."""
    return _EXTENSIONS.get(unpacked_suffix(path), "text")


def open_rows(path: Path, settings: Settings, progress: Callable[[int], None] | None = None) -> Rows:
    """The columns of a file, and its rows; see `open_table` for what is read how.

    Raises:
        ConfigError: a setting that does not suit the format.
        DataError: the file cannot be read, or its first rows are not as expected; those that follow raise later.
    """
    kind = settings.format or format_of(path)
    if settings.header is True and kind not in _PARTED:
        raise ConfigError(f"{path}: header: only tsv and csv files have one, and this is {kind}: leave header out")
    if settings.columns and kind in ("jsonl", "parquet", "conllu"):
        raise ConfigError(f"{path}: columns: {kind} files name their own columns: leave columns out")
    if kind == "parquet":
        columns, batches = _open_parquet(path, settings.wanted, progress)
        return Rows(str(path), path.parent, "row", columns, batches)
    lines = _lines(path, settings.errors, progress)
    rows: Iterator[_Row]
    if kind == "jsonl":
        columns, rows = _cells_of_objects(_json_objects(path, lines), f"{path}, line")
    elif kind == "conllu":
        columns, rows = (*_CONLLU, "text"), _conllu_rows(path, lines)
    elif kind == "conll":
        columns, rows = _open_conll(path, lines, settings.columns)
    elif kind == "text":
        columns = _expect_names(f"{path}", settings.columns or ("text",), 1)
        rows = ((number, (line,)) for number, line in enumerate(lines, 1))
    else:
        parted = _csv_rows(path, lines) if kind == "csv" else _tsv_rows(lines)
        columns, rows = _open_cells(path, parted, settings, _PARTED[kind])
    return Rows(str(path), path.parent, "line", columns, _batches(rows))


def open_pair(first: Path, second: Path, errors: str, progress: Callable[[int], None] | None = None) -> Rows:
    """Two files, line by line: columns `source` and `target`.

    Raises:
        DataError: a file cannot be read; later, one has more lines than the other.
    """
    read = [0, 0]

    def tell(index: int) -> Callable[[int], None]:
        def told(bytes_: int) -> None:
            read[index] = bytes_
            if progress:
                progress(sum(read))

        return told

    def rows() -> Iterator[_Row]:
        counts = [0, 0]
        sides = (_lines(path, errors, tell(index)) for index, path in enumerate((first, second)))
        for number, pair in enumerate(zip_longest(*sides), 1):
            counts = [count + (line is not None) for count, line in zip(counts, pair, strict=True)]
            if counts[0] == counts[1]:
                yield number, pair
        if counts[0] != counts[1]:
            raise DataError(
                f"expected as many lines in {second} as in {first}, line by line the same, got {counts[1]} and"
                f" {counts[0]}: see whether one of them lacks lines or has blank ones too many"
            )

    return Rows(f"{first} and {second}", first.parent, "line", ("source", "target"), _batches(rows()))


def open_objects(objects: Iterable[Any], columns: Sequence[str] | None) -> Rows:
    """Rows that are mappings of column names to values; `columns` are those to keep, None: all.

    Raises:
        DataError: the first is no such row; those that follow raise later.
    """
    names, rows = _cells_of_objects(enumerate(objects, 1), "row", columns)
    return Rows("", Path(), "row", names, _batches(rows))


# Lines and batches.


def _lines(path: Path, errors: str, progress: Callable[[int], None] | None) -> _Lines:
    """Lines without their ends. What follows the last line end is a line if it is not empty."""
    begun: list[str] = []  # of a line that is longer than a chunk, pieces
    for chunk in read_text(path, errors=errors, chunk=_CHUNK, progress=progress):
        lines = chunk.split("\n")  # and not splitlines, for which U+2028 and others end a line too
        begun.append(lines[0])
        if len(lines) > 1:
            yield "".join(begun)
            yield from lines[1:-1]
            begun = [lines[-1]]
    if last := "".join(begun):
        yield last


def _batches(rows: Iterator[_Row]) -> Iterator[Batch]:
    places: list[int] = []
    taken: list[Sequence[Cell]] = []
    letters = 0
    for place, cells in rows:
        places.append(place)
        taken.append(cells)
        letters += sum(map(len, cells))
        if len(taken) == _BATCH or letters >= _LETTERS:
            yield Batch(places, list(zip(*taken, strict=True)))
            places, taken, letters = [], [], 0
    if taken:
        yield Batch(places, list(zip(*taken, strict=True)))


# Lines of cells.


def _tsv_rows(lines: _Lines) -> Iterator[tuple[int, list[str]]]:
    return ((number, line.split("\t")) for number, line in enumerate(lines, 1))


def _csv_rows(path: Path, lines: _Lines) -> Iterator[tuple[int, list[str]]]:
    # The module's own limit of 128 KiB a cell, which is one for the whole process, is only ever raised here.
    csv.field_size_limit(max(csv.field_size_limit(), (1 << 31) - 1))
    reader = csv.reader((f"{line}\n" for line in lines), strict=True)
    place = 1
    try:
        for cells in reader:
            yield place, cells or [""]
            place = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {place}: expected quotes as in RFC 4180, got a row that breaks off or goes on after one"
            f" ({error}): write a quote inside a quoted cell twice, or give the format tsv, where quotes are letters"
        ) from None


def _open_cells(
    path: Path, rows: Iterator[tuple[int, list[str]]], settings: Settings, parted: str
) -> tuple[tuple[str, ...], Iterator[_Row]]:
    """Columns and rows of a file of cells. What its first row is, `open_table` says."""
    start, first = next(((place, cells) for place, cells in rows if cells != [""]), (0, []))
    if not first:
        return (), iter(())
    count = len(first)
    numbers = tuple(map(str, range(1, count + 1)))
    header = settings.header
    if header == "auto":
        if settings.columns:
            header = tuple(first) == settings.columns
        else:
            wanted = settings.wanted
            header = set(wanted) <= set(first) or not all(re.fullmatch("[1-9][0-9]*", name) for name in wanted)
    names = numbers if not header else [name or number for name, number in zip(first, numbers, strict=True)]
    columns = _expect_names(f"{path}, line {start}", settings.columns or names, count)

    def counted() -> Iterator[_Row]:
        blank = 0
        for place, cells in rows if header else chain([(start, first)], rows):
            if cells == [""] and count > 1:
                blank = blank or place  # no row, if no row comes after it
            elif blank or len(cells) != count:
                raise DataError(
                    f"{path}, line {blank or place}: expected {_counted(count)} as in line {start}, got"
                    f" {'a blank line' if blank else _counted(len(cells))}: {parted}"
                )
            else:
                yield place, cells

    return columns, counted()


def _counted(cells: int) -> str:
    return "1 cell" if cells == 1 else f"{cells} cells"


def _expect_names(where: str, names: Sequence[str], count: int) -> tuple[str, ...]:
    """`names`, which must be one for each of `count` cells, and each another."""
    if len(names) != count:
        raise DataError(
            f"{where}: expected {_counted(len(names))}, for the columns {shown(names)}, got {count}: give as many names"
        )
    for index, name in enumerate(names):
        if name in names[:index]:
            raise DataError(
                f"{where}: expected a name for each column, got {shown([name])!r} twice: rename one, or give names"
                " with columns; if the line is no header, say header=False"
            )
    return tuple(names)


def shown(names: Iterable[str]) -> str:
    """Names for a message; they may be texts, where the first row was taken for a header."""
    return ", ".join(name if len(name) <= 40 else f"{name[:37]}..." for name in names)


# Objects.


def _json_objects(path: Path, lines: _Lines) -> Iterator[tuple[int, Any]]:
    decode = json.JSONDecoder(object_pairs_hook=_unique).decode
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, decode(line)
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg} at character {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise DataError(
                f'{path}, line {number}: expected one JSON object, as {{"text": "..."}}, got what is none: {reason}'
            ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands in it twice")
    return found


def _cells_of_objects(
    objects: Iterator[tuple[int, Any]], where: str, columns: Sequence[str] | None = None
) -> tuple[tuple[str, ...], Iterator[_Row]]:
    """Columns and rows of mappings, which must all have the same keys, or at least `columns`."""
    start, first = next(objects, (0, None))
    if not start:
        return tuple(columns or ()), iter(())
    names = tuple(columns or (first if isinstance(first, Mapping) else ()))
    keys = set(names)

    def rows() -> Iterator[_Row]:
        for place, found in chain([(start, first)], objects):
            if not isinstance(found, Mapping) or not found or not all(isinstance(name, str) for name in found):
                raise DataError(
                    f"{where} {place}: expected names with values, as {{'text': '...'}}, got {shown([repr(found)])}"
                )
            if not (keys <= found.keys() if columns else keys == found.keys()):
                raise DataError(
                    f"{where} {place}: expected the names {shown(names)}, got {shown(found)}: give each row the same,"
                    " with null for what is not known"
                )
            try:
                yield place, [_cell(found[name]) for name in names]
            except (TypeError, ValueError):
                bad = next(name for name in names if not _is_cell(found[name]))
                raise DataError(
                    f"{where} {place}: column '{bad}': expected text, a number or a list of them, got"
                    f" {type(found[bad]).__name__}: leave this column out"
                ) from None

    kept = rows()
    return names, chain([next(kept)], kept)


def _cell(value: Any) -> Cell:
    if isinstance(value, str):
        return value
    if hasattr(value, "tolist"):  # numpy's arrays and numbers
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_text(part) for part in value]
    return _text(value)


def _text(value: Any) -> str:
    """The text that stands for a value: itself, what JSON writes, or none for null."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False)


def _is_cell(value: Any) -> bool:
    try:
        _cell(value)
    except (TypeError, ValueError):
        return False
    return True


# Sentences: a token a line, a blank line between them.

_CONLLU = ("form", "lemma", "upos", "xpos", "feats", "deprel", "head")
_CONLLU_CELLS = (1, 2, 3, 4, 5, 7, 6)  # where these stand in a line of ten cells


def _sentences(lines: _Lines) -> Iterator[list[tuple[int, str]]]:
    """The numbered lines between blank lines."""
    for blank, group in groupby(enumerate(lines, 1), lambda line: not line[1].strip(" \t")):
        if not blank:
            yield list(group)


def _conllu_rows(path: Path, lines: _Lines) -> Iterator[_Row]:
    for sentence in _sentences(lines):
        text, place = None, 0
        words: list[list[str]] = []
        pieces: list[str] = []  # of the text, should no comment give it
        spoken = 0  # the last word whose form a range has written
        for number, line in sentence:
            if line.startswith("#"):
                name, _, value = line[1:].partition("=")
                text = value.strip() if name.strip() == "text" else text
                continue
            cells = line.split("\t")
            match = re.fullmatch(r"([0-9]+)(?:-([0-9]+)|\.[0-9]+)?", cells[0])
            if len(cells) != 10 or not match:
                raise DataError(
                    f"{path}, line {number}: expected the ten cells of CoNLL-U, parted by tabs, the first a number (1,"
                    f" 1-2 or 1.1), got {len(cells)}, the first {shown([cells[0]])!r}; where lines are only token and"
                    " tag, give the format conll"
                )
            if cells[0] == match[1] and int(match[1]) != len(words) + 1:
                raise DataError(
                    f"{path}, line {number}: expected word {len(words) + 1} of its sentence, got {match[1]}: a blank"
                    " line parts sentences"
                )
            place = place or number
            if cells[0] == match[1]:
                words.append([cells[index] for index in _CONLLU_CELLS])
            # A range writes what its words are together, as `don't` for `do` and `n't`; an empty node nothing.
            if match[2] or (cells[0] == match[1] and len(words) > spoken):
                pieces += [cells[1], "" if "SpaceAfter=No" in cells[9].split("|") else " "]
                spoken = int(match[2] or match[1])
        if words:
            yield place, [*map(list, zip(*words, strict=True)), "".join(pieces).strip() if text is None else text]


def _open_conll(path: Path, lines: _Lines, columns: tuple[str, ...] | None) -> tuple[tuple[str, ...], Iterator[_Row]]:
    """Columns and rows of sentences. Whether tabs or spaces part the cells, the first token tells."""
    first = count = 0
    tabs = True

    def split(line: str) -> list[str]:
        return line.split("\t") if tabs else re.split(" +", line.strip(" "))

    def rows() -> Iterator[tuple[int, list[list[str]]]]:
        nonlocal tabs, first, count
        for sentence in _sentences(lines):
            place = 0
            tokens: list[list[str]] = []
            for number, line in sentence:
                # `# O`, parted by a space, is a token and its tag; with tabs no token begins so.
                comment = not tokens and re.match("#+ ", line)
                if comment and (tabs or len(split(line)) != count):
                    continue
                if not first:
                    tabs = "\t" in line
                    first, count = number, len(split(line))
                    if count == 1:
                        raise DataError(
                            f"{path}, line {number}: expected a token and its tag, parted by a tab or a space, got one"
                            f" cell, {shown([line])!r}"
                        )
                cells = split(line)
                if len(cells) != count:
                    raise DataError(
                        f"{path}, line {number}: expected {_counted(count)} as in line {first}, got"
                        f" {_counted(len(cells))}: {'tabs' if tabs else 'spaces'} part them, and a blank line parts"
                        " sentences"
                    )
                place = place or number
                tokens.append(cells)
            if tokens:
                yield place, [list(column) for column in zip(*tokens, strict=True)]

    found = rows()
    opening = next(found, None)  # to learn how many columns there are
    if not opening:
        return (), iter(())
    names = columns or ("form", *map(str, range(2, count)), "tag")
    return _expect_names(f"{path}, line {first}", names, count), chain([opening], found)


# Parquet.


def _open_parquet(
    path: Path, wanted: Sequence[str], progress: Callable[[int], None] | None
) -> tuple[tuple[str, ...], Iterator[Batch]]:
    with _parquet(path) as file:
        fields = list(file.schema_arrow)
    names = _expect_names(str(path), [field.name for field in fields], len(fields))
    kept = []
    for name, field in zip(names, fields, strict=True):
        if _is_plain(field.type) or (_is_list(field.type) and _is_plain(field.type.value_type)):
            kept.append(name)
        elif not wanted or name in wanted:
            raise DataError(
                f"{path}: column '{name}': expected text, numbers or lists of them, got {field.type}: write the file"
                " without it, or ask only for the columns that are wanted"
            )
    if not kept:
        raise DataError(f"{path}: expected columns of text, numbers or lists of them, got none: write some into it")
    return tuple(kept), _parquet_batches(path, kept, progress)


def _parquet_batches(path: Path, names: list[str], progress: Callable[[int], None] | None) -> Iterator[Batch]:
    with _parquet(path) as file:
        size, done = path.stat().st_size, 0
        # Few rows at once, and no row group read ahead, since cells may be long.
        for batch in file.iter_batches(batch_size=_BATCH // 8, columns=names):
            rows = range(done + 1, done + 1 + len(batch))
            columns = []
            for name in names:
                try:
                    columns.append(_plain(batch.column(name)))
                except (pa.ArrowException, UnicodeDecodeError) as error:
                    raise DataError(
                        f"{path}, rows {rows[0]} to {rows[-1]}: column '{name}' holds bytes that are no UTF-8"
                        f" ({_first_line(error)}): write it anew as text"
                    ) from None
            yield Batch(rows, columns)
            done += len(batch)
            if progress:
                progress(size * done // file.metadata.num_rows)


@contextmanager
def _parquet(path: Path) -> Iterator[pq.ParquetFile]:
    with opened(path) as (_, stream):
        try:
            yield pq.ParquetFile(stream, pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: cannot read this Parquet file: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _is_list(type_: pa.DataType) -> bool:
    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_))


def _is_plain(type_: pa.DataType) -> bool:
    """Whether there is a text that stands for a value: for text, numbers, truth values, times, and null."""
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    tests = ("string", "large_string", "integer", "floating", "decimal", "boolean", "temporal", "null")
    return any(getattr(pa.types, f"is_{test}")(type_) for test in tests)


def _plain(array: pa.Array) -> pa.Array:
    """The texts that stand for values, the empty one for null; of lists, lists of them."""
    if _is_list(array.type):
        # An offset for each list and one more: a list that is null becomes an empty one.
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), _plain(array.flatten()))
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    texts = pc.fill_null(array.cast(pa.string()), "")
    texts.validate(full=True)
    return texts
