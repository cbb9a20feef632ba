"""Arrays of different lengths, one after the other in a mapped file."""

from __future__ import annotations

import mmap
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from unrolled.data.encoding import writing_here

__all__ = ["Ragged", "RaggedWriter"]

Array: TypeAlias = npt.NDArray[Any]


class Ragged:
    """D arrays [n_d ...], views of one that lies in a file mapped into memory: `ragged[d]`.

    Attributes:
        values: all of them, [N ...].
        lengths: n_d, int64 [D].
    """

    def __init__(self, values: Array, lengths: Array) -> None:
        self.values, self.lengths = values, lengths
        self._ends = np.cumsum(lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, d: int) -> Array:
        end = int(self._ends[d])
        return self.values[end - int(self.lengths[d]) : end]


class RaggedWriter:
    """Writes arrays one after the other; they are in memory one piece at a time.

    The file has no name: it is gone when the process is, however it ends.

    Args:
        directory: where; None: the system's folder for temporary files.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self._directory = directory
        with writing_here(directory):
            self._file = tempfile.TemporaryFile(buffering=1 << 20, dir=directory)
        self._lengths = array("q")
        self._dtype: np.dtype[Any] | None = None
        self._item: tuple[int, ...] = ()

    def append(self, pieces: Array | Iterator[Array] | Iterable[Array]) -> int:
        """One more array, whole or in consecutive pieces; its length.

        All arrays have the dtype and item shape of the first.
        """
        length = 0
        for piece in [pieces] if isinstance(pieces, np.ndarray) else pieces:
            if self._dtype is None:
                self._dtype, self._item = piece.dtype, piece.shape[1:]
            if piece.shape[1:] != self._item:
                raise ValueError(f"expected items of shape {self._item}, got {piece.shape[1:]}")
            with writing_here(self._directory):
                self._file.write(np.ascontiguousarray(piece, self._dtype).data)
            length += len(piece)
        self._lengths.append(length)
        return length

    def drop_last(self) -> None:
        """Forget the last array, which turned out to be one too many."""
        length = self._lengths.pop()
        if length and self._dtype is not None:
            self._file.seek(-length * self._dtype.itemsize * int(np.prod(self._item, dtype=np.int64)), 2)
            self._file.truncate()

    def finish(self) -> Ragged:
        """What was written, read-only."""
        lengths = np.array(self._lengths, np.int64)
        dtype = self._dtype or np.dtype(np.uint8)
        if not lengths.sum():
            return Ragged(np.empty((0, *self._item), dtype), lengths)
        with writing_here(self._directory):
            self._file.flush()
            mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._file.close()
        return Ragged(np.frombuffer(mapped, dtype).reshape(-1, *self._item), lengths)
