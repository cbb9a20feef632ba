"""Photographs with five captions each: train.tsv, a row a caption; valid, test and learnt.jsonl, a row a photograph."""

from __future__ import annotations

import csv
import json
import tarfile
from pathlib import Path

LEARNT, HELD_OUT = 800, 100
"""Photographs, in the order of their names, to train on; to validate and to test on."""


def prepare(data: Path, out: Path) -> None:
    """Columns: file, caption. learnt.jsonl holds the first hundred of those that are trained on, to see how far what is
    written of them is better than of others."""
    with tarfile.open(data / "images.tar") as tar:
        tar.extractall(out / "photographs", filter="data")
    captions: dict[str, list[str]] = {}
    with (data / "captions.tsv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            captions.setdefault(row["image"], []).append(tidied(row["caption"]))
    photographs = sorted(captions)
    learnt, held_out = photographs[:LEARNT], photographs[LEARNT:]
    lines = [f"photographs/{name}\t{caption}" for name in learnt for caption in captions[name]]
    (out / "train.tsv").write_text("\n".join(["file\tcaption", *lines]) + "\n", "utf-8", newline="\n")
    parts = {"learnt": learnt[:HELD_OUT], "valid": held_out[:HELD_OUT], "test": held_out[HELD_OUT:]}
    for part, names in parts.items():
        rows = [{"file": f"photographs/{name}", "caption": captions[name]} for name in names]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{part}.jsonl").write_text(text, "utf-8", newline="\n")


def tidied(caption: str) -> str:
    """Small letters, no quotation marks and no full stop at the end: what a few hundred photographs cannot teach."""
    return " ".join(caption.lower().replace('"', " ").rstrip(" .").split())
