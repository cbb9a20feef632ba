"""Bible verses cut in two by chapter: train.txt and valid.txt."""

from __future__ import annotations

import hashlib
import lzma
from pathlib import Path


def prepare(data: Path, out: Path) -> None:
    """The column `ko` of a table of Bible verses, a verse a line, in order; about a tenth of the chapters is held out.

    A chapter is held out if the sha256 of its name (`Genesis 1`) is divisible by ten: whole chapters from all books, so
    that the text runs on within each and both parts are of one kind.
    """
    header, *rows = lzma.decompress((data / "verses.tsv.xz").read_bytes()).decode("utf-8").splitlines()
    columns = header.split("\t")
    ref, ko = columns.index("ref"), columns.index("ko")
    parts: tuple[list[str], list[str]] = ([], [])
    for row in rows:
        cells = row.split("\t")
        chapter = cells[ref].rsplit(":", 1)[0]
        held_out = int(hashlib.sha256(chapter.encode()).hexdigest(), 16) % 10 == 0
        parts[held_out].append(cells[ko] + "\n")
    for name, part in zip(("train.txt", "valid.txt"), parts, strict=True):
        (out / name).write_text("".join(part), "utf-8", newline="\n")
