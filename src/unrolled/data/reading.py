"""Files to text: find them, unpack them, decode them, a chunk at a time."""

from __future__ import annotations

import codecs
import gzip
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from unrolled.errors import ConfigError, DataError, nearest
from unrolled.vocabulary import last_border

__all__ = ["ERRORS", "find_texts", "opened", "read_text", "unpacked_suffix"]

ERRORS = ("strict", "replace")
"""What may be done about bytes that are no text."""

_PACKED: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".xz": lzma.LZMAFile,
}
_LONGEST_LINE = 1 << 20  # characters that are carried over to end a chunk at a line end


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
    with opened(path) as (file, stream):
        read = 0
        while data := stream.read(chunk):
            # A plain file may be a pipe, which cannot tell.
            read = read + len(data) if stream is file else file.tell()
            yield data, read, False
        yield b"", read, True


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A file, and the stream of its unpacked bytes, which is the file itself where nothing is packed.

    Raises:
        DataError: it cannot be opened, or later, read or unpacked.
    """
    suffix = path.suffix.lower()
    try:
        with open(path, "rb") as file:
            yield file, _PACKED[suffix](file) if suffix in _PACKED else file
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: this {suffix} file is damaged or cut off: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot read this file: {error.strerror or error}") from error


def unpacked_suffix(path: Path) -> str:
    """The extension of what a file holds, in lower case: `.tsv` for `a.tsv` and for `a.TSV.gz`."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _PACKED else suffix
