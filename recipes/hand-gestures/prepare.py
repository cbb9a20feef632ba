"""Paths of a fingertip, 16 frames a row, as tables: train.csv, valid.csv and test.csv."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

BLOCK = 100
"""Rows of a gesture that stay together."""
APART = 16
"""Rows left out of the training part beside one that is held out: windows overlap in time."""


def prepare(data: Path, out: Path) -> None:
    """Columns: gesture, x1, y1, ..., x16, y16.

    The rows of each gesture stand in the order of recording. They are cut into blocks; of every ten the fifth is for
    validation and the tenth for the test.
    """
    names = (data / "point_history_labels.csv").read_text("utf-8-sig").split("\n")
    lines = gzip.decompress((data / "point_history.csv.gz").read_bytes()).decode("utf-8").split()
    header = ",".join(["gesture", *(f"{axis}{n}" for n in range(1, 17) for axis in "xy")])
    parts: dict[str, list[str]] = {"train": [header], "valid": [header], "test": [header]}
    seen: Counter[str] = Counter()
    for line in lines:
        label, _, numbers = line.partition(",")
        at = seen[label]
        seen[label] += 1
        part = part_of(at)
        if part == "train" and not part_of(max(at - APART, 0)) == part_of(at + APART) == "train":
            continue
        parts[part].append(f"{names[int(label)].strip()},{numbers}")
    for part, rows in parts.items():
        (out / f"{part}.csv").write_text("\n".join(rows) + "\n", "utf-8", newline="\n")


def part_of(row: int) -> str:
    """Where a gesture's row with this number goes."""
    return {4: "valid", 9: "test"}.get(row // BLOCK % 10, "train")
