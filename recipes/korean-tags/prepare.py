"""Sentences with tags as CoNLL files: train.conll, dev.conll and test.conll, FORM UPOS XPOS a line."""

from __future__ import annotations

import lzma
from pathlib import Path


def prepare(data: Path, out: Path) -> None:
    """As they are, unpacked."""
    for part in ("train", "dev", "test"):
        text = lzma.decompress((data / f"{part}.tsv.xz").read_bytes()).decode("utf-8")
        (out / f"{part}.conll").write_text(text, "utf-8", newline="\n")
