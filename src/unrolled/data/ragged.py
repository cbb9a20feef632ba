"""Arrays of different lengths, one after the other in a mapped file."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from unrolled.data.scratch import Held, Scratch

__all__ = ["Ragged", "RaggedWriter", "as_int64"]

Array: TypeAlias = npt.NDArray[Any]


class Ragged:
    """D arrays [n_d ...], views of one that lies in a file mapped into memory: `ragged[d]`.

    Attributes:
        values: all of them, [N ...]; starts: where each begins, int64 [D]; lengths: n_d, int64 [D].
    """

    def __init__(self, values: Array, starts: Array, lengths: Array, held: Held | None = None) -> None:
        self.values, self.starts, self.lengths, self._held = values, starts, lengths, held

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, d: int) -> Array:
        start = int(self.starts[d])
        found = self.values[start : start + int(self.lengths[d])]
        if self._held is not None:
            self._held.note(found.nbytes)
        return found


class RaggedWriter:
    """Writes arrays one after the other; they are in memory one piece at a time.

    Args:
        directory: where the file lies, see `Scratch`.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self._file = Scratch(directory, "the encoded examples")
        self._starts, self._lengths = array("q"), array("q")
        self._written = 0
        self._dtype: np.dtype[Any] | None = None
        self._item: tuple[int, ...] = ()
        self._held: list[Array] = []  # small arrays, written together

    def append(self, pieces: Array | Iterable[Array]) -> int:
        """One more array, whole or in consecutive pieces; its length.

        All arrays have the dtype and item shape of the first.
        """
        start = self._written
        for piece in [pieces] if isinstance(pieces, np.ndarray) else pieces:
            if self._dtype is None:
                self._dtype, self._item = piece.dtype, piece.shape[1:]
            if piece.shape[1:] != self._item:
                raise ValueError(f"expected items of shape {self._item}, got {piece.shape[1:]}")
            self._held.append(np.ascontiguousarray(piece, self._dtype))
            self._written += len(piece)
            if len(self._held) >= 1024 or piece.nbytes > 1 << 16:
                self._flush()
        self._starts.append(start)
        self._lengths.append(self._written - start)
        return self._lengths[-1]

    def drop_last(self) -> None:
        """Forget the last array, which turned out to be one too many; its place in the file stays."""
        self._starts.pop()
        self._lengths.pop()

    def _flush(self) -> None:
        if self._held:
            self._file.write(np.concatenate(self._held))
            self._held = []

    def finish(self) -> Ragged:
        """What was written, read-only."""
        self._flush()
        starts, lengths = (as_int64(part) for part in (self._starts, self._lengths))
        dtype = self._dtype or np.dtype(np.uint8)
        if not self._written:
            return Ragged(np.empty((0, *self._item), dtype), starts, lengths)
        mapped = self._file.map()
        self._file.close()
        return Ragged(np.frombuffer(mapped, dtype).reshape(-1, *self._item), starts, lengths, Held(mapped))


def as_int64(values: array[int]) -> Array:
    """The same memory as int64 [N]: of many millions a copy would be felt."""
    return np.frombuffer(values, np.int64) if values else np.empty(0, np.int64)
