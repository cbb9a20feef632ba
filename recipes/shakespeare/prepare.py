"""A text cut in two by position: train.txt and valid.txt."""

from __future__ import annotations

import lzma
from pathlib import Path


def prepare(data: Path, out: Path) -> None:
    """The first 90 % of the characters to train, the last 10 % held out."""
    plain, packed = data / "input.txt", data / "tinyshakespeare.txt.xz"
    content = plain.read_bytes() if plain.is_file() else lzma.decompress(packed.read_bytes())
    text = content.decode("utf-8")
    cut = int(0.9 * len(text))
    (out / "train.txt").write_text(text[:cut], "utf-8", newline="\n")
    (out / "valid.txt").write_text(text[cut:], "utf-8", newline="\n")
