"""Hourly load and oil temperature of a transformer station, as tables: train.csv, valid.csv and test.csv."""

from __future__ import annotations

import lzma
from pathlib import Path

MONTH = 30 * 24
"""Hours."""
SEASON = 24
"""Hours before a part that stand in its file too: from them the first forecast is made."""
PARTS = {"train": (0, 12 * MONTH), "valid": (12 * MONTH, 16 * MONTH), "test": (16 * MONTH, 20 * MONTH)}


def prepare(data: Path, out: Path) -> None:
    """As it is: 12 months to train, 4 to validate and 4 to test, as is customary; what comes after is left out."""
    text = lzma.decompress((data / "ETTh1.csv.xz").read_bytes()).decode("utf-8")
    header, *rows = text.splitlines()
    for part, (begin, end) in PARTS.items():
        kept = rows[max(0, begin - SEASON) : end]
        (out / f"{part}.csv").write_text("\n".join([header, *kept]) + "\n", "utf-8", newline="\n")
