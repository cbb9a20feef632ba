"""Questions and answers as tables of the columns question and answer: train.tsv, valid.tsv and test.tsv."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
from pathlib import Path


def prepare(data: Path, out: Path) -> None:
    """A twentieth of the questions is to validate and another to test, chosen by sha256, with all their answers."""
    text = gzip.decompress((data / "ChatbotData.csv.gz").read_bytes()).decode("utf-8-sig")
    parts: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for row in csv.DictReader(io.StringIO(text)):
        question, answer = (" ".join(row[name].split()) for name in ("Q", "A"))
        number = int(hashlib.sha256(question.encode()).hexdigest(), 16) % 20
        parts[{0: "valid", 1: "test"}.get(number, "train")].append(f"{question}\t{answer}\n")
    for part, rows in parts.items():
        (out / f"{part}.tsv").write_text("question\tanswer\n" + "".join(rows), "utf-8", newline="\n")
