"""Sentences and their labels as tables of the columns sentence and label: train.tsv, valid.tsv and test.tsv."""

from __future__ import annotations

import gzip
from pathlib import Path


def prepare(data: Path, out: Path) -> None:
    """Lines `label sentence` as rows. A sentence that is to be judged too is left out of the training part."""
    parts = {}
    for part in ("train", "dev", "test"):
        text = gzip.decompress((data / f"stsa.binary.{part}.txt.gz").read_bytes()).decode("utf-8")
        lines = (line.partition(" ") for line in text.splitlines())
        parts[part] = [(sentence.strip(), label) for label, _, sentence in lines]
    judged = {sentence for part in ("dev", "test") for sentence, _ in parts[part]}
    parts["train"] = [row for row in parts["train"] if row[0] not in judged]
    for part, name in (("train", "train"), ("dev", "valid"), ("test", "test")):
        rows = [f"{sentence}\t{label}\n" for sentence, label in parts[part]]
        (out / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(rows), "utf-8", newline="\n")
