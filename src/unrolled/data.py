"""Files to text, text to ids, ids to windows.

    find_texts -> read_text -> encode_texts -> EncodedText -> split_text -> Lanes -> Window

Text is read as a stream and its ids lie in a file that is mapped into memory, so that a text may be larger than the
memory. A text is one or more documents; between them the state is reset, and nothing is predicted across.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import lzma
import mmap
import os
import re
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from unrolled.errors import ConfigError, DataError, StorageError, nearest
from unrolled.kinds.text import IGNORE
from unrolled.vocabulary import Vocabulary, last_border

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor

__all__ = [
    "DOCUMENTS",
    "ERRORS",
    "EncodedText",
    "Lanes",
    "Window",
    "encode_texts",
    "find_texts",
    "read_text",
    "split_text",
]

DOCUMENTS = ("file", "line", "paragraph")
"""What a document may be."""

ERRORS = ("strict", "replace")
"""What may be done about bytes that are no text."""

Array: TypeAlias = npt.NDArray[Any]

_PACKED: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".xz": lzma.LZMAFile,
}
_BLOCK = 1 << 20  # units or bytes in work at once
_LONGEST_LINE = 1 << 20  # characters that are carried over to end a chunk at a line end


# Files to text.


def find_texts(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The text files that `paths` name: each file itself, and of each folder all `*.txt`, `*.txt.gz` and `*.txt.xz`
    in it and in its folders, sorted.

    Raises:
        DataError: a path that does not exist, or a folder without texts.
    """
    found: list[Path] = []
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if _is_text(file.name) and file.is_file())
            if not inside:
                raise DataError(f"{path}: no texts in this folder: expected files *.txt, *.txt.gz or *.txt.xz")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"{path}: there is no such file or folder{_nearest_name(path)}")
    return found


def _is_text(name: str) -> bool:
    return name.lower().endswith((".txt", ".txt.gz", ".txt.xz"))


def _nearest_name(path: Path) -> str:
    try:
        names = os.listdir(path.parent)
    except OSError:
        return f", nor a folder {path.parent}"
    hint = nearest(path.name, names)
    # A folder may hold thousands of names; all of them are no hint.
    return f": {hint}" if hint.startswith("did") or 0 < len(names) <= 10 else ""


def read_text(
    path: str | Path, *, errors: str = "strict", chunk: int = 1 << 22, progress: Callable[[int], None] | None = None
) -> Iterator[str]:
    """The text of one UTF-8 file, in chunks; `.gz` and `.xz` are unpacked, every other extension is plain text.

    A byte order mark at the start is dropped. CRLF and CR become LF. Chunks end at line ends; in a line of more than
    a million characters at a space, and where there is none, anywhere.

    Args:
        path: the file.
        errors: `"strict"`: refuse a file with bytes that are no UTF-8, or with NUL, which binary files and UTF-16
            have; `"replace"`: read them as U+FFFD.
        chunk: bytes that are read at once.
        progress: told, before each chunk, the bytes of the file that have been read.

    Raises:
        ConfigError: another value of `errors`, or a chunk below one byte.
        DataError: the file cannot be read or unpacked, or holds bytes that are no text. The message has their offset,
            in packed files that of the unpacked bytes.
    """
    if errors not in ERRORS:
        raise ConfigError(f"errors: unknown value '{errors}': {nearest(errors, ERRORS)}")
    if chunk < 1:
        raise ConfigError(f"chunk: expected at least 1 byte, got {chunk}")
    return _lines(Path(path), errors, chunk, progress)


def _lines(path: Path, errors: str, chunk: int, progress: Callable[[int], None] | None) -> Iterator[str]:
    rest = ""
    for text, read in _normalised(path, errors, chunk):
        rest += text
        border = rest.rfind("\n") + 1
        if not border and len(rest) >= _LONGEST_LINE:
            border = last_border(rest) or len(rest)
        if progress:
            progress(read)
        if border:
            yield rest[:border]
            rest = rest[border:]
    if rest:
        yield rest


def _normalised(path: Path, errors: str, chunk: int) -> Iterator[tuple[str, int]]:
    """Text without byte order mark and CR, and how many bytes of the file have been read."""
    begun, cr = False, ""
    for text, read, final in _decoded(path, errors, chunk):
        if text and not begun:
            begun = True
            text = text.removeprefix("\ufeff")
        text = cr + text
        cr = "\r" if text.endswith("\r") and not final else ""
        text = text.removesuffix(cr)
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        yield text, read


def _decoded(path: Path, errors: str, chunk: int) -> Iterator[tuple[str, int, bool]]:
    held, offset = b"", 0  # the first bytes of a character that the chunk cuts, and where they stand in the file
    for data, read, final in _bytes(path, chunk):
        data = held + data
        try:
            text, used = codecs.utf_8_decode(data, errors, final)
        except UnicodeDecodeError as error:
            _refuse_nul(path, data[: error.start], offset)
            if offset == 0 and data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise DataError(f"{path}: this is UTF-16 text: convert it to UTF-8") from None
            raise DataError(
                f"{path}: byte {offset + error.start} ({data[error.start]:#04x}) is no UTF-8{_unpacked(path)}: convert"
                " the file to UTF-8 (Korean text is often CP949), or give --errors replace to read such bytes as U+FFFD"
            ) from None
        if errors == "strict":
            _refuse_nul(path, data[:used], offset)
        else:
            text = text.replace("\0", "\ufffd")
        yield text, read, final
        held, offset = data[used:], offset + used


def _refuse_nul(path: Path, data: bytes, offset: int) -> None:
    index = data.find(0)
    if index >= 0:
        raise DataError(
            f"{path}: byte {offset + index} is NUL{_unpacked(path)}: this looks like a binary file or UTF-16 text;"
            " convert it to UTF-8, or give --errors replace to read NUL as U+FFFD"
        )


def _unpacked(path: Path) -> str:
    return " (counted in the unpacked file)" if path.suffix.lower() in _PACKED else ""


def _bytes(path: Path, chunk: int) -> Iterator[tuple[bytes, int, bool]]:
    """Unpacked bytes, how many bytes of the file have been read, and whether this is the end (then without bytes)."""
    suffix = path.suffix.lower()
    try:
        with open(path, "rb") as file:
            unpack = _PACKED.get(suffix)
            stream = unpack(file) if unpack else file
            read = 0
            while data := stream.read(chunk):
                # A plain file may be a pipe, which cannot tell.
                read = file.tell() if unpack else read + len(data)
                yield data, read, False
            yield b"", read, True
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: this {suffix} file is damaged or cut off: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot read this file: {error.strerror or error}") from error


# Text to ids.


class EncodedText:
    """A text as ids, and where its documents begin.

    Attributes:
        ids: uint8, uint16 or uint32 [N]; from `encode_texts` they lie in a file that is mapped into memory.
        starts: where documents begin, int64 [D], ascending, the first of them 0.
        fingerprint: 64 hexadecimal digits that differ when the normalised text, its documents or the part differ.
    """

    def __init__(
        self,
        ids: Array,
        *,
        starts: Array | Sequence[int] = (0,),
        sizes: Array | None = None,
        exceptions: tuple[Array, Array] | None = None,
        fingerprint: str = "",
    ) -> None:
        """
        Args:
            ids: unsigned integers [N], at least one.
            starts: where documents begin, [D], ascending, the first of them 0.
            sizes: how many characters begin in each unit, by id, int64 [V]; None: one in each.
            exceptions: positions, ascending, and sizes there, where the size is not that of the id: `<unk>` may
                stand for more or less than one character.
            fingerprint: of the text.

        Raises:
            DataError: no ids, or starts that are not as said.
        """
        self.ids = ids
        self.starts = np.asarray(starts, np.int64)
        self.fingerprint = fingerprint
        self._sizes = sizes
        self._exceptions, self._exception_sizes = exceptions or (np.empty(0, np.int64), np.empty(0, np.int64))
        if not len(ids):
            raise DataError("the text is empty")
        if not len(self.starts) or self.starts[0] or self.starts[-1] >= len(ids) or (np.diff(self.starts) <= 0).any():
            raise DataError(f"starts: expected 0 and then ascending positions below {len(ids)}, got {self.starts}")

    def __len__(self) -> int:
        """Units."""
        return len(self.ids)

    @cached_property
    def characters(self) -> int:
        """Characters (code points) that begin in this text. The parts of a text add up to the whole."""
        if self._sizes is None:
            return len(self)
        total = int((self._exception_sizes - 1).sum())
        for start in range(0, len(self), _BLOCK):
            counts = np.bincount(self.ids[start : start + _BLOCK])
            total += int(counts @ self._sizes[: len(counts)])
        return total

    @cached_property
    def predicted_characters(self) -> int:
        """Characters that begin in units that are predicted, which are all but each document's first."""
        return self.characters - int(self._sizes_at(self.starts).sum())

    @cached_property
    def unknown(self) -> int:
        """Units of the text that are `<unk>`."""
        blocks = range(0, len(self), _BLOCK)
        return sum(int((self.ids[start : start + _BLOCK] == Vocabulary.unknown).sum()) for start in blocks)

    def slice(self, begin: int, end: int) -> EncodedText:
        """The part [begin, end), a view. It begins with a document, be it in the midst of one.

        Raises:
            DataError: the part is empty, or ends outside of the text.
        """
        if not 0 <= begin < end <= len(self):
            raise DataError(f"expected a part of a text of {len(self)} units, got {begin} to {end}")
        low, high = np.searchsorted(self.starts, [begin + 1, end])
        first, last = np.searchsorted(self._exceptions, [begin, end])
        return EncodedText(
            self.ids[begin:end],
            starts=np.concatenate([[0], self.starts[low:high] - begin]),
            sizes=self._sizes,
            exceptions=(self._exceptions[first:last] - begin, self._exception_sizes[first:last]),
            fingerprint=hashlib.sha256(f"{self.fingerprint} {begin} {end}".encode()).hexdigest(),
        )

    def _sizes_at(self, positions: Array) -> Array:
        """How many characters begin at positions [M], int64 [M]."""
        if self._sizes is None:
            return np.ones(len(positions), np.int64)
        sizes = self._sizes[self.ids[positions]]
        if len(self._exceptions):
            index = np.searchsorted(self._exceptions, positions).clip(max=len(self._exceptions) - 1)
            sizes = np.where(self._exceptions[index] == positions, self._exception_sizes[index], sizes)
        return sizes


def encode_texts(
    paths: str | Path | Sequence[str | Path],
    vocabulary: Vocabulary,
    *,
    documents: str = "file",
    errors: str = "strict",
    directory: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> EncodedText:
    """Read and encode files, in the given order, as one text.

    What documents are: each file is at least one, if it is not empty. With `"line"` each line is one, its line end
    belongs to it; with `"paragraph"` each run of lines between blank lines. Blank lines, of nothing but spaces and
    tabs, begin no document: they end the one before them.

    Args:
        paths: files and folders, see `find_texts`. Files may be empty as long as not all are.
        vocabulary: what encodes; what it lacks becomes `<unk>`, see `EncodedText.unknown`.
        documents: one of `DOCUMENTS`.
        errors: see `read_text`.
        directory: where the ids are kept, in a file without a name, which is gone when the process is, however it
            ends; None: the system's folder for temporary files. It takes 1, 2 or 4 bytes a unit.
        progress: told now and then how many bytes of all files have been read.

    Raises:
        ConfigError: another value of `documents` or `errors`.
        DataError: a file that cannot be read, see `read_text`, or no text in any.
        StorageError: the ids cannot be written.
    """
    if documents not in DOCUMENTS:
        raise ConfigError(f"documents: unknown value '{documents}': {nearest(documents, DOCUMENTS)}")
    files = find_texts(paths)
    marks = _Marks(documents)
    digest = hashlib.sha256()
    starts, odd, odd_sizes = array("q"), array("q"), array("q")
    units = read_before = read_here = 0

    def tell(read: int) -> None:
        nonlocal read_here
        read_here = read
        if progress:
            progress(read_before + read)

    with ExitStack() as stack:
        with _writing(directory):
            # Without a buffer, since closing would try once more to write what found the disk full.
            file = stack.enter_context(tempfile.TemporaryFile(buffering=0, dir=directory))
        for path in files:
            marks.begin_file()
            for chunk in read_text(path, errors=errors, progress=tell):
                begins = marks.find(chunk)
                # No text holds NUL, so that it parts documents without doubt.
                pieces = [chunk[begin:end] for begin, end in zip([0, *begins], [*begins, len(chunk)], strict=True)]
                digest.update("\0".join(pieces).encode())
                ids = vocabulary.encode(chunk)
                unknown = np.flatnonzero(ids == vocabulary.unknown)
                if begins == [0]:
                    starts.append(units)
                    begins = []
                if begins or len(unknown):
                    sizes = vocabulary.unit_sizes(chunk)
                    # A character begins in the first unit by whose end more characters have begun than its offset.
                    starts.extend((units + np.searchsorted(np.cumsum(sizes), begins, side="right")).tolist())
                    unusual = unknown[sizes[unknown] != 1]
                    odd.extend((units + unusual).tolist())
                    odd_sizes.extend(sizes[unusual].tolist())
                with _writing(directory):
                    rest = ids.view(np.uint8).data
                    while rest:
                        rest = rest[file.write(rest) :]
                units += len(ids)
            read_before += read_here
            read_here = 0
        if not units:
            raise DataError(f"there is no text in {', '.join(map(str, files[:3]))}{', ...' if len(files) > 3 else ''}")
        with _writing(directory):
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return EncodedText(
        np.frombuffer(mapped, vocabulary.dtype),
        starts=np.array(starts, np.int64),
        sizes=None if vocabulary.unit == "char" else vocabulary.sizes,
        exceptions=(np.array(odd, np.int64), np.array(odd_sizes, np.int64)),
        fingerprint=digest.hexdigest(),
    )


@contextmanager
def _writing(directory: str | Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{directory or tempfile.gettempdir()}: cannot write the encoded text here ({error.strerror or error}):"
            " name another folder, or set TMPDIR"
        ) from error


class _Marks:
    """Finds where documents begin in chunks of text."""

    # Before each chunk stands what the one before it ended with: "\n\n" a blank line, "\n" another, "x" none.
    _PATTERNS: ClassVar[dict[str, re.Pattern[str] | None]] = {
        "file": None,
        "line": re.compile(r"(?<=\n)(?=[ \t]*[^ \t\n])"),
        "paragraph": re.compile(r"(?<=\n)[ \t]*\n(?=[ \t]*[^ \t\n])"),
    }

    def __init__(self, documents: str) -> None:
        self._pattern = self._PATTERNS[documents]
        self.begin_file()

    def begin_file(self) -> None:
        self._before = ""
        self._only_blank = True

    def find(self, chunk: str) -> list[int]:
        """Offsets in the next chunk of the file."""
        before = self._before
        text = before + chunk
        line = text[text.rfind("\n", 0, -1) + 1 :]
        self._before = "x" if not line.endswith("\n") else "\n" if line.strip(" \t\n") else "\n\n"
        found = self._pattern.finditer(text) if self._pattern else ()
        offsets = [match.end() - len(before) for match in found]
        if self._only_blank:
            # Blank lines at the start of a file belong to its first document, so the first text after them begins none.
            blank = len(chunk) - len(chunk.lstrip(" \t\n"))
            first = chunk.rfind("\n", 0, blank) + 1
            offsets = [offset for offset in offsets if offset > first]
            self._only_blank = blank == len(chunk)
        return offsets if before else [0, *offsets]


def split_text(text: EncodedText, fraction: float) -> tuple[EncodedText, EncodedText]:
    """Training and validation part: the last `fraction` of the units is for validation.

    The cut is at `int((1 - fraction) * N)`, or as far before it as the character begins that it would cut (jamo,
    subwords).

    Raises:
        ConfigError: a fraction that is not between 0 and 1.
        DataError: the text is too short to be cut so.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"fraction: expected a number between 0 and 1, got {fraction}")
    cut = int((1 - fraction) * len(text))
    while cut > 0 and not text._sizes_at(np.array([cut]))[0]:
        cut -= 1
    if not 0 < cut < len(text):
        raise DataError(f"the text has {len(text)} units, too few to split off a fraction of {fraction} for validation")
    return text.slice(0, cut), text.slice(cut, len(text))


# Ids to windows.


@dataclass(frozen=True)
class Window:
    """The piece of all lanes that truncated BPTT goes through at once. T steps, B lanes of this rank.

    Attributes:
        inputs: ids, int64 [T B].
        targets: the ids one step later, int64 [T B]; IGNORE where a document begins there: nothing before it tells.
        reset: bool [T B], true where `inputs` begins a document and the state before it must be the initial one;
            None if nowhere. The first step of a lane is not marked: the carry begins as the initial state.
        start: the step of the lane with which the window begins.
        warm: the first `warm` steps were counted by windows before and only carry the gradient further back.
        advance: after so many steps of this window the next one begins; the state there is its carry.
        counted: targets at or after `warm` that are not IGNORE.
    """

    inputs: Int[Tensor, "T B"]
    targets: Int[Tensor, "T B"]
    reset: Bool[Tensor, "T B"] | None
    start: int
    warm: int
    advance: int
    counted: int


class Lanes:
    """A text in `batch_size` lanes that are read side by side, window by window.

    A lane has `steps` = (N - 1) // batch_size steps; lane b begins at unit b * steps, so that lanes lie end to end
    and each unit but the first is a target once. (The last up to batch_size - 1 units are left over.)

    Window k counts the steps [k * stride, (k + 1) * stride) of each lane and begins `window - stride` steps before
    them: each loss reaches back over at least that many steps. Source: Williams and Peng 1990, "An Efficient
    Gradient-Based Algorithm for On-Line Training of Recurrent Network Trajectories", BPTT(h; h'), with h = window and
    h' = stride. The last window may be shorter.

    Rank r of `ranks` has the lanes [r, r + 1) * batch_size / ranks; all ranks together have those of one.

    Attributes:
        batch_size: lanes of all ranks.
        lanes: the lanes of this rank, a range.
        steps: steps of a lane.
        longest: steps of the longest window: `window`, or the whole lane if that is None.
        stride: as given, or the window if None.
    """

    def __init__(
        self,
        text: EncodedText,
        batch_size: int,
        window: int | None,
        stride: int | None = None,
        *,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """
        Raises:
            ConfigError: a size below 1, a stride above the window, ranks that do not divide the lanes.
            DataError: the text is too short for one window.
        """
        sizes = {"batch size": batch_size, "window": window, "stride": stride, "ranks": ranks}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ConfigError(f"{name}: expected 1 or more, got {size}")
        if batch_size % ranks:
            raise ConfigError(f"batch size: expected a multiple of the {ranks} ranks, got {batch_size}")
        if not 0 <= rank < ranks:
            raise ConfigError(f"rank: expected 0 to {ranks - 1}, got {rank}")
        needed = max(batch_size * (window or 1) + 1, 2 * batch_size)
        if len(text) < needed:
            of = f" of {window}" if window else ""
            raise DataError(
                f"the text has {len(text)} units; one window{of} for {batch_size} lanes needs {needed}:"
                f" lower {'--window or ' if window else ''}--batch-size, or give more text"
            )
        each = batch_size // ranks
        self.batch_size = batch_size
        self.lanes = range(rank * each, (rank + 1) * each)
        self.steps = (len(text) - 1) // batch_size
        self.longest = window or self.steps
        if stride is not None and stride > self.longest:
            raise ConfigError(f"stride: expected at most the window, {self.longest}, got {stride}: it would skip steps")
        self.stride = stride or self.longest
        self._starts = text.starts
        used = batch_size * self.steps
        self._inputs = text.ids[:used].reshape(batch_size, self.steps)[self.lanes.start : self.lanes.stop]
        self._targets = text.ids[1 : used + 1].reshape(batch_size, self.steps)[self.lanes.start : self.lanes.stop]

    def __len__(self) -> int:
        """Windows in an epoch."""
        return (self.steps - 1) // self.stride + 1

    def window(self, k: int) -> Window:
        """Window k of an epoch; any, at any time.

        Raises:
            IndexError: there is no window k.
        """
        import torch

        if not 0 <= k < len(self):
            raise IndexError(f"window {k}: there are {len(self)}")
        start, counted = self._start(k), k * self.stride
        end = min(counted + self.stride, self.steps)
        inputs = self._inputs[:, start:end].T.astype(np.int64, order="C")
        targets = self._targets[:, start:end].T.astype(np.int64, order="C")
        steps, rows = self._documents(start, end)
        reset = None
        if start == 0:
            rows = rows[steps > 0]
            steps = steps[steps > 0]
        if len(steps):
            reset = np.zeros(inputs.shape, bool)
            reset[steps, rows] = True
        steps, rows = self._documents(start + 1, end + 1)
        targets[steps, rows] = IGNORE
        warm = counted - start
        return Window(
            inputs=torch.from_numpy(inputs),
            targets=torch.from_numpy(targets),
            reset=None if reset is None else torch.from_numpy(reset),
            start=start,
            warm=warm,
            advance=(self._start(k + 1) if k + 1 < len(self) else end) - start,
            counted=(end - counted) * len(self.lanes) - int((steps >= warm).sum()),
        )

    def _start(self, k: int) -> int:
        return max(0, (k + 1) * self.stride - self.longest)

    def _documents(self, begin: int, end: int) -> tuple[Array, Array]:
        """Where documents begin in the steps [begin, end) of the lanes: steps from `begin` on, and rows, both [M]."""
        first = np.arange(self.lanes.start, self.lanes.stop) * self.steps + begin
        low, high = np.searchsorted(self._starts, [first, first + (end - begin)])
        counts = high - low
        rows = np.repeat(np.arange(len(first)), counts)
        index = np.arange(counts.sum()) + np.repeat(low - (np.cumsum(counts) - counts), counts)
        return self._starts[index] - first[rows], rows
