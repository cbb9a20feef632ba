"""Sentences of Tatoeba as tables of the columns en and ko: train.tsv, valid.tsv and test.tsv."""

from __future__ import annotations

import hashlib
from pathlib import Path


def prepare(data: Path, out: Path) -> None:
    """A twentieth of the English sentences is to validate and a tenth to test, chosen by their sha256."""
    parts: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for line in (data / "kor.txt").read_text("utf-8").splitlines():
        en, ko, _ = line.split("\t")
        number = int(hashlib.sha256(en.encode()).hexdigest(), 16) % 20
        parts[{0: "valid", 1: "test", 2: "test"}.get(number, "train")].append(f"{en}\t{ko}\n")
    for part, rows in parts.items():
        (out / f"{part}.tsv").write_text("en\tko\n" + "".join(rows), "utf-8", newline="\n")
