"""Text to ids: documents, and the ids of all of them in a mapped file."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from unrolled.data.reading import find_texts, read_text
from unrolled.data.scratch import Scratch
from unrolled.errors import ConfigError, DataError, nearest
from unrolled.vocabulary import Vocabulary

__all__ = ["DOCUMENTS", "EncodedText", "encode_texts", "split_text"]

DOCUMENTS = ("file", "line", "paragraph")
"""What a document may be."""

Array: TypeAlias = npt.NDArray[Any]

_BLOCK = 1 << 20  # units or bytes in work at once


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

    with Scratch(directory, "the encoded text") as scratch:
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
                scratch.write(ids)
                units += len(ids)
            read_before += read_here
            read_here = 0
        if not units:
            raise DataError(f"there is no text in {', '.join(map(str, files[:3]))}{', ...' if len(files) > 3 else ''}")
        mapped = scratch.map()
    return EncodedText(
        np.frombuffer(mapped, vocabulary.dtype),
        starts=np.array(starts, np.int64),
        sizes=None if vocabulary.unit == "char" else vocabulary.sizes,
        exceptions=(np.array(odd, np.int64), np.array(odd_sizes, np.int64)),
        fingerprint=digest.hexdigest(),
    )


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
