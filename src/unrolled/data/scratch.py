"""A file without a name, for what may be larger than the memory: written from front to back, then mapped."""

from __future__ import annotations

import io
import mmap
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unrolled.errors import StorageError

__all__ = ["Held", "Scratch"]

_HELD = 1 << 28  # bytes of a file that are counted as this process's memory, about
_READ_AT_ONCE = 1 << 16  # by the system, around what is asked for


class Scratch(io.RawIOBase):
    """A file that is gone when the process is, however it ends: it never has a name that could be left behind.

    What cannot be written is a StorageError.
    """

    def __init__(self, directory: str | Path | None, what: str) -> None:
        """
        Args:
            directory: where the file lies; None: the system's folder for temporary files.
            what: what is kept in it, for messages, as in "the encoded text".
        """
        self._directory, self._what = directory, what
        with self._writing():
            # Without a buffer, since closing would try once more to write what found the disk full.
            self._file = tempfile.TemporaryFile(buffering=0, dir=directory)  # noqa: SIM115 - closed by close

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        """Write all bytes of `data`, anything with a buffer; how many they are."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        with self._writing():
            while rest:
                rest = rest[self._file.write(rest) :]
        return size

    def map(self) -> mmap.mmap:
        """The bytes, to be read; they stay when this object is closed."""
        with self._writing():
            return mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)

    def close(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()
        super().close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"{self._directory or tempfile.gettempdir()}: cannot write {self._what} here"
                f" ({error.strerror or error}): name another folder, or set TMPDIR"
            ) from error


class Held:
    """Gives back what was read of a mapped file, now and then, so that a file larger than the memory does not count as
    if it were in it. The bytes stay valid: the system reads them again, from its own memory where they still are."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._mapped, self._read = mapped, 0
        self._large = len(mapped) > _HELD and hasattr(mmap, "MADV_DONTNEED")

    def note(self, size: int) -> None:
        """So many bytes are about to be read somewhere."""
        if self._large:
            self._read += max(size, _READ_AT_ONCE)
            if self._read > _HELD:
                self._mapped.madvise(mmap.MADV_DONTNEED)
                self._read = 0
