"""Tables: rows of named cells, from files of any format, in a file that is mapped into memory.

    open_table, open_parallel, table_of -> Table -> select, split, take

A cell is a text, or a list of texts (a sentence's words, its tags); what it means, the kinds judge. So numbers are
kept as they are written, and empty cells as "".
"""

from __future__ import annotations

import hashlib
import operator
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from unrolled.data.formats import FORMATS, Batch, Cell, Rows, Settings, open_objects, open_pair, open_rows, shown
from unrolled.data.reading import ERRORS, find_texts
from unrolled.data.scratch import Held, Scratch
from unrolled.errors import ConfigError, DataError, nearest

__all__ = ["FORMATS", "Cell", "Table", "open_parallel", "open_table", "table_of"]

Array: TypeAlias = npt.NDArray[Any]

_PART = 1 << 12  # cells that are given out at once


class Table:
    """Rows of named cells; those of a file, or some of them.

    Rows are read from the mapped file as they are asked for. `len(table)`, `table[i]` and `for row in table` work as
    with a list of dicts, where `i` may count from the end.

    Attributes:
        name: of the files, for messages.
        columns: names, in the order of the files.
        fingerprint: 64 hexadecimal digits that differ when the columns, the cells or their order differ. It is that of
            the contents: the same rows have the same in every format, and packed or not.
    """

    def __init__(self, store: _Store, rows: Array | None = None, fingerprint: str = "") -> None:
        """Not to be called: tables come from `open_table`, `open_parallel`, `table_of`, and from other tables."""
        self.name = store.name
        self.columns = store.columns
        self.fingerprint = fingerprint or store.fingerprint
        self._store = store
        self._rows = rows

    def __len__(self) -> int:
        """Rows."""
        return self._store.starts[-1] if self._rows is None else len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Cell]:
        """Row `index`, by column."""
        return self.take([index])[0]

    def __iter__(self) -> Iterator[dict[str, Cell]]:
        for cells in zip(*map(self.column, self.columns), strict=True):
            yield dict(zip(self.columns, cells, strict=True))

    def __repr__(self) -> str:
        return f"<Table {self.name}: {len(self)} rows of {', '.join(self.columns)}>"

    def take(self, indices: Iterable[int], columns: Sequence[str] | None = None) -> list[dict[str, Cell]]:
        """Rows by index, in the given order.

        Args:
            indices: of rows.
            columns: the columns that are needed; None: all.

        Raises:
            DataError: a column that there is not.
            IndexError: a row that there is not.
        """
        self.expect_columns(columns or ())
        names = self.columns if columns is None else columns
        rows = self._rows_of(indices)
        cells = (self._store.cells(self.columns.index(name), rows) for name in names)
        return [dict(zip(names, row, strict=True)) for row in zip(*cells, strict=True)]

    def column(self, name: str) -> Iterator[Cell]:
        """The cells of a column, row by row; never all of them in memory.

        Raises:
            DataError: there is no such column.
        """
        self.expect_columns([name])
        at = self.columns.index(name)
        rows = range(len(self)) if self._rows is None else self._rows
        parts = (rows[start : start + _PART] for start in range(0, len(rows), _PART))
        return (cell for part in parts for cell in self._store.cells(at, part))

    def where(self, index: int) -> str:
        """Where a row stands, for messages: "reviews.tsv, line 17"."""
        row = self._row(index)
        (place,) = self._store.cells(-1, [row])
        return self._store.file(row).place(place)

    def folder(self, index: int) -> Path:
        """The folder of the file in which a row stands: what file names in its cells are relative to. Of rows from no
        file, the current one."""
        return self._store.file(self._row(index)).folder

    def expect_columns(self, names: Iterable[str]) -> None:
        """Check that there are such columns.

        Raises:
            DataError: one is missing; the message names the nearest, and lists all.
        """
        _expect_columns(self.name, self.columns, names)

    def select(self, rows: Sequence[int] | Array) -> Table:
        """Some rows, in the given order: a view.

        Raises:
            IndexError: a row that there is not.
        """
        chosen = np.asarray(rows, np.int64).reshape(-1)
        wrong = chosen[(chosen < -len(self)) | (chosen >= len(self))]
        if len(wrong):
            raise IndexError(f"{self.name}: row {wrong[0]}: there are {len(self)}")
        chosen = np.where(chosen < 0, chosen + len(self), chosen)
        digest = hashlib.sha256(self.fingerprint.encode() + chosen.astype("<i8").tobytes())
        return Table(self._store, chosen if self._rows is None else self._rows[chosen], digest.hexdigest())

    def split(self, fraction: float, seed: int) -> tuple[Table, Table]:
        """Training and validation part: `fraction` of the rows, drawn at random, are for validation. In both, rows
        keep their order. The same seed draws the same rows, everywhere.

        Raises:
            ConfigError: a fraction that is not between 0 and 1, or a seed below 0.
            DataError: there are too few rows.
        """
        if not 0 < fraction < 1:
            raise ConfigError(f"fraction: expected a number between 0 and 1, got {fraction}")
        if seed < 0:
            raise ConfigError(f"seed: expected 0 or more, got {seed}")
        cut = int((1 - fraction) * len(self))
        if not 0 < cut < len(self):
            raise DataError(
                f"{self.name}: there are {len(self)} rows, too few to split off a fraction of {fraction} for validation"
            )
        # Raw bits, since what numpy makes of them, in `permutation` say, may change with its version.
        order = np.argsort(np.random.PCG64(seed).random_raw(len(self)), kind="stable")
        return self.select(np.sort(order[:cut])), self.select(np.sort(order[cut:]))

    def _rows_of(self, indices: Iterable[int]) -> list[int]:
        """`_row` of each, many at once."""
        given = list(map(operator.index, indices))
        at = np.array(given, np.int64)
        wrong = np.flatnonzero((at < -len(self)) | (at >= len(self)))
        if len(wrong):
            self._row(given[wrong[0]])
        at %= max(len(self), 1)
        found: list[int] = (at if self._rows is None else self._rows[at]).tolist()
        return found

    def _row(self, index: int) -> int:
        """Which row of the store row `index` of this table is."""
        at = operator.index(index)
        if not -len(self) <= at < len(self):
            raise IndexError(f"{self.name}: row {index}: there are {len(self)}")
        at %= len(self)
        return at if self._rows is None else int(self._rows[at])


def open_table(
    paths: str | Path | Sequence[str | Path],
    *,
    columns: Sequence[str] | None = None,
    header: str | bool = "auto",
    wanted: Sequence[str] = (),
    format: str | None = None,
    errors: str = "strict",
    directory: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Table:
    """Read files of rows, in the given order, as one table. All must have the same columns.

    Formats, by extension, each also with `.gz` or `.xz` after it; text is UTF-8, see `read_text`:

    - tsv (`.tsv`, `.tab`): cells parted by tabs. A quote is a letter like others.
    - csv (`.csv`): cells parted by commas, quoted as in RFC 4180: a quoted cell may hold line ends.
    - jsonl (`.jsonl`, `.ndjson`): an object a line, all with the same names. A list becomes a list cell, null an empty
      cell, and what is neither text nor list the text that JSON writes.
    - parquet (`.parquet`): columns of text, numbers, truth values, times, and lists of them; null is an empty cell.
    - conllu (`.conllu`): a row is a sentence; list cells `form`, `lemma`, `upos`, `xpos`, `feats`, `deprel`, `head`, as
      written, and `text`, from the comment or else from the forms. Ranges (`1-2`) and empty nodes (`1.1`) are no words.
    - conll (`.conll`): a row is a sentence, a line a token, a blank line parts sentences. The first token tells whether
      tabs or spaces part its cells. List cells `form` and `tag`; the columns between them, if there are more, are
      called `2`, `3`, ... Lines before a sentence that begin with `# ` or `## ` are comments.
    - text (`.txt` and every other extension, as `.en`): a line is a row, its column is called `text`.

    Header: only tsv and csv files may have one. With `"auto"` the first line

    - is the header, if `columns` are not given and nothing is `wanted`;
    - is the first row, if `columns` are given, unless it holds just these names;
    - is the first row, if what is wanted are numbers (`1`, `2`, ...) and not all of them stand in it; the columns are
      then called `1`, `2`, ...;
    - is the header otherwise.

    A column whose name is empty in the header is called by its number. In a tsv or csv file of one column a blank line
    is a row, and in one of more columns an error, unless it is among the first or last of the file; in text it always
    is a row.

    Args:
        paths: one or more files.
        columns: names for the columns of tsv, csv, conll and text files without a header, or instead of it.
        header: `True`, `False` or `"auto"`, as above.
        wanted: the columns that are asked for, or would be if they were there: at least one must be. All others are
            kept too, but those of parquet files that no cell can hold are left out.
        format: one of `FORMATS`; None: by extension.
        errors: `"strict"` or `"replace"`, see `read_text`.
        directory: where the cells are kept, in a file without a name, which is gone when the process is, however it
            ends; None: the system's folder for temporary files. It takes about as much as the unpacked files.
        progress: told now and then how many bytes of all files have been read.

    Raises:
        ConfigError: another value of `header`, `format` or `errors`, or one that does not suit a file.
        DataError: a file that cannot be read, rows that are not as expected, none of the wanted columns, or no rows
            in any file. The message says in which file and line.
        StorageError: the cells cannot be written.
    """
    if header not in ("auto", True, False):
        raise ConfigError(f"header: expected 'auto', True or False, got {header!r}")
    _expect_known("format", format or FORMATS[0], FORMATS)
    _expect_known("errors", errors, ERRORS)
    for name, names in {"columns": columns, "wanted": wanted}.items():
        if isinstance(names, str):
            raise ConfigError(f"{name}: expected a list of names, got the text '{names}': give ['{names}']")
    settings = Settings(format, tuple(columns) if columns else None, header, tuple(wanted), errors)
    files = [_expect_file(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if not files:
        raise ConfigError("paths: expected one file at least, got none")
    tell = _Progress(progress)

    def sources() -> Iterator[Rows]:
        for path in files:
            rows = open_rows(path, settings, tell.next())
            if wanted and rows.columns and not set(wanted) & set(rows.columns):
                _expect_columns(rows.name, rows.columns, wanted)
            yield rows

    name = f"{', '.join(map(str, files[:3]))}{', ...' if len(files) > 3 else ''}"
    return Table(_Store(name, sources(), directory))


def open_parallel(
    first: str | Path,
    second: str | Path,
    *,
    errors: str = "strict",
    directory: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Table:
    """Two text files, line by line each other's translation, as one table with the columns `source` and `target`.

    Args:
        first: the file of the sources; either may be packed, see `read_text`.
        second: the file of the targets.
        errors: see `open_table`, as `directory` and `progress`.

    Raises:
        ConfigError: another value of `errors`.
        DataError: a file that cannot be read, no lines, or not as many in both.
        StorageError: the cells cannot be written.
    """
    _expect_known("errors", errors, ERRORS)
    rows = open_pair(_expect_file(first), _expect_file(second), errors, progress)
    return Table(_Store(rows.name, iter([rows]), directory))


def table_of(rows: Any, *, columns: Sequence[str] | None = None, directory: str | Path | None = None) -> Table:
    """A table of rows that a program has: an iterable of dicts, read once, or a data set of Hugging Face's `datasets`.

    Cells may be texts, numbers, truth values, None (an empty cell), and lists or arrays of them.

    Args:
        rows: dicts of the same names, or an object with `column_names` that gives a dict of lists for a slice.
        columns: those to keep, in this order; None: all.
        directory: see `open_table`.

    Raises:
        DataError: no rows, rows that are no dicts or not alike, or values that no cell can hold.
        StorageError: the cells cannot be written.
    """
    if hasattr(rows, "column_names") and hasattr(rows, "__getitem__"):
        if isinstance(rows.column_names, Mapping):
            raise DataError(f"expected one data set, got several: choose one of {', '.join(rows.column_names)}")
        if columns and hasattr(rows, "select_columns"):
            missing = [name for name in columns if name not in rows.column_names]
            if missing:
                raise DataError(f"there is no column '{missing[0]}': {nearest(missing[0], rows.column_names)}")
            rows = rows.select_columns(list(columns))  # so that pictures beside them are not unpacked
        rows = _rows_of_slices(rows)
    elif isinstance(rows, str | bytes | Path | Mapping) or not isinstance(rows, Iterable):
        raise DataError(f"expected an iterable of dicts, got {type(rows).__name__}: files are for open_table")
    return Table(_Store("rows", iter([open_objects(rows, columns)]), directory))


def _rows_of_slices(rows: Any) -> Iterator[dict[str, Any]]:
    for start in range(0, len(rows), 1000):
        part = rows[start : start + 1000]
        for cells in zip(*part.values(), strict=True):
            yield dict(zip(part, cells, strict=True))


def _expect_known(setting: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"{setting}: unknown value '{value}': {nearest(value, known)}")


def _expect_file(path: str | Path) -> Path:
    if Path(path).is_dir():
        raise DataError(f"{path}: expected a file, this is a folder: name the files in it")
    return find_texts(path)[0]


class _Progress:
    """Adds up what is told about one file after another."""

    def __init__(self, told: Callable[[int], None] | None) -> None:
        self._told = told
        self._before = self._here = 0

    def next(self) -> Callable[[int], None]:
        self._before += self._here
        self._here = 0
        return self._tell

    def _tell(self, read: int) -> None:
        self._here = read
        if self._told:
            self._told(self._before + read)


class _Store:
    """The cells of all rows, in a mapped Arrow file without a name.

    Column 0 says where in its file a row stands; the others are texts or lists of texts.

    Attributes:
        name: of the files.
        columns: names.
        batches: of rows.
        starts: the row with which each batch begins, and at the end how many rows there are.
        fingerprint: of columns and cells.
    """

    def __init__(self, name: str, sources: Iterator[Rows], directory: str | Path | None) -> None:
        self.name = name
        self.columns: tuple[str, ...] = ()
        self.starts = [0]
        self._files: list[tuple[int, Rows]] = []  # with the row with which each begins
        digests: list[_Digest] = []
        schema: pa.Schema = None
        writer = None
        with Scratch(directory, "the table") as scratch:
            for source in sources:
                if self.columns and source.columns and source.columns != self.columns:
                    raise DataError(
                        f"{source.name}: expected the columns of {self._files[0][1].name}, {shown(self.columns)}, got"
                        f" {shown(source.columns)}: files of one table have the same"
                    )
                self.columns = self.columns or source.columns
                self._files.append((self.starts[-1], source))
                for batch in source.batches:
                    if writer is None:
                        schema = _schema(batch)
                        writer = pa.ipc.new_file(pa.PythonFile(scratch, "w"), schema)
                        digests = [_Digest() for _ in self.columns]
                    arrays = [_array(source, batch, at, schema.types[at + 1]) for at in range(len(self.columns))]
                    for digest, array in zip(digests, arrays, strict=True):
                        digest.update(array)
                    places = pa.array(np.asarray(batch.places, np.int64))
                    writer.write_batch(pa.record_batch([places, *arrays], schema=schema))
                    self.starts.append(self.starts[-1] + len(places))
            if writer is None:
                raise DataError(f"there are no rows in {name}: expected one at least, below the header if there is one")
            writer.close()
            mapped = scratch.map()
            reader = pa.ipc.open_file(pa.py_buffer(mapped))
        self._held, self._size = Held(mapped), len(mapped)
        self.batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        parts = [f"{len(each)} {each} {digest}" for each, digest in zip(self.columns, digests, strict=True)]
        self.fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def cells(self, at: int, rows: Iterable[int]) -> Iterator[Any]:
        """Column `at` of some rows; -1: their places."""
        for index, run in groupby(rows, lambda row: bisect_right(self.starts, row) - 1):
            self._held.note(self._size // len(self.batches))
            column = self.batches[index].column(at + 1)
            offsets = [int(row) - self.starts[index] for row in run]
            # Many at once are cheaper for each, and dearer to begin.
            yield from (
                column.take(pa.array(offsets)).to_pylist()
                if len(offsets) > 16
                else (column[offset].as_py() for offset in offsets)
            )

    def file(self, row: int) -> Rows:
        """The file that a row is from."""
        return self._files[bisect_right(self._files, row, key=operator.itemgetter(0)) - 1][1]


def _schema(batch: Batch) -> pa.Schema:
    """The first batch tells which columns hold lists."""
    types = []
    for cells in batch.columns:
        filled = cells if isinstance(cells, pa.Array) else next((cell for cell in cells if cell != ""), "")
        is_list = isinstance(filled, list) or (isinstance(filled, pa.Array) and pa.types.is_list(filled.type))
        types.append(pa.list_(pa.string()) if is_list else pa.string())
    # Names would only be in the way: a column may be called as the one of places is.
    return pa.schema([("", type_) for type_ in [pa.int64(), *types]])


def _array(source: Rows, batch: Batch, at: int, type_: pa.DataType) -> pa.Array:
    """A column of a batch as `type_`, which is text or list of texts."""
    cells = batch.columns[at]
    if isinstance(cells, pa.Array) and cells.type != type_:
        cells = cells.to_pylist()
    try:
        if isinstance(cells, pa.Array):
            array = cells
        elif pa.types.is_list(type_):
            # Checked here, since Arrow takes a text for the list of its letters.
            array = pa.array([cell or [] for cell in cells], type_) if _are_lists(cells) else None
        else:
            array = pa.array(cells, type_)
    except (pa.ArrowException, TypeError, UnicodeEncodeError):
        array = None
    if array is not None and b"\0" not in bytes(_parts(array)[-1]):
        return array
    for place, cell in zip(batch.places, cells, strict=True):
        fault = _fault(cell.as_py() if isinstance(cell, pa.Scalar) else cell, pa.types.is_list(type_))
        if fault:
            raise DataError(f"{source.place(place)}: column '{source.columns[at]}': {fault}")
    raise AssertionError(f"{source.name}: column '{source.columns[at]}' was refused, and no cell of it is at fault")


def _are_lists(cells: Iterable[Cell]) -> bool:
    return all(isinstance(cell, list) or cell == "" for cell in cells)


def _fault(cell: Cell, is_list: bool) -> str:
    """What is wrong with a cell; nothing if empty."""
    if isinstance(cell, list) != is_list and cell != "":
        kinds = ("a list", "a text") if is_list else ("a text", "a list")
        return f"expected {kinds[0]}, as in the rows before, got {kinds[1]}"
    text = "".join(cell)
    if "\0" in text:
        return "expected text, got a NUL character in it: write it without"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"expected text, got half a character ({text[error.start]!r}): write it whole or leave it out"
    return ""


def _parts(array: pa.Array) -> list[Any]:
    """What tells an array of texts from others, however it is cut: the sizes of its lists, of its texts, and bytes."""
    parts: list[Any] = []
    if pa.types.is_list(array.type):
        parts.append(np.diff(_offsets(array)))
        array = array.flatten()
    offsets = _offsets(array)
    letters = array.buffers()[2]
    parts.append(np.diff(offsets))
    parts.append(memoryview(letters)[offsets[0] : offsets[-1]] if letters else b"")
    return parts


def _offsets(array: pa.Array) -> Array:
    if not len(array):
        return np.zeros(1, np.int32)
    return np.frombuffer(array.buffers()[1], np.int32)[array.offset : array.offset + len(array) + 1]


class _Digest:
    """Of a column, whatever the batches are in which it comes."""

    def __init__(self) -> None:
        self._hashes = [hashlib.sha256() for _ in range(3)]

    def update(self, array: pa.Array) -> None:
        for hash_, part in zip(self._hashes, reversed(_parts(array)), strict=False):
            hash_.update(part)

    def __str__(self) -> str:
        return " ".join(hash_.hexdigest() for hash_ in self._hashes)


def _expect_columns(table: str, columns: Sequence[str], names: Iterable[str]) -> None:
    for name in names:
        if name not in columns:
            hint = nearest(name, columns)
            raise DataError(
                f"{table}: there is no column '{name}'{f', {hint}' if hint.startswith('did') else ':'} the columns are"
                f" {shown(columns)} (where there is no header they are called 1, 2, ...)"
            )
