"""Reviews and their labels as tables: train.tsv, valid.tsv and test.tsv."""

from __future__ import annotations

import hashlib
import lzma
from pathlib import Path

HELD_OUT = 30
"""One review of so many in the training part is for validation."""


def held_out(review: str) -> bool:
    """Whether the review with this id is for validation."""
    return int(hashlib.sha256(review.encode()).hexdigest(), 16) % HELD_OUT == 0


def prepare(data: Path, out: Path) -> None:
    """The columns document and label; about 5,000 reviews of the training part, chosen by their ids, to validate."""
    parts: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for part in ("train", "test"):
        header, *rows = lzma.decompress((data / f"{part}.tsv.xz").read_bytes()).decode("utf-8").splitlines()
        columns = header.split("\t")
        at = [columns.index(name) for name in ("id", "document", "label")]
        for row in rows:
            cells = row.split("\t")
            review, document, label = (cells[i] for i in at)
            if document.strip():
                parts["valid" if part == "train" and held_out(review) else part].append(f"{document}\t{label}\n")
    for part, rows in parts.items():
        (out / f"{part}.tsv").write_text("document\tlabel\n" + "".join(rows), "utf-8", newline="\n")
