"""Daily exchange rates of eight currencies, as tables: train.csv, valid.csv and test.csv."""

from __future__ import annotations

import gzip
from pathlib import Path

COUNTRIES = "australia,britain,canada,switzerland,china,japan,new_zealand,singapore"
WEEK = 7
PARTS = {"train": (0.0, 0.6), "valid": (0.6, 0.8), "test": (0.8, 1.0)}


def prepare(data: Path, out: Path) -> None:
    """In order: 60 % of the days to train, 20 % to validate and 20 % to test, as is customary."""
    rows = gzip.decompress((data / "exchange_rate.txt.gz").read_bytes()).decode("utf-8").split()
    for part, (begin, end) in PARTS.items():
        # The week before stands in the file too: from it the first forecast is made.
        kept = rows[max(0, int(begin * len(rows)) - WEEK) : int(end * len(rows))]
        (out / f"{part}.csv").write_text("\n".join([COUNTRIES, *kept]) + "\n", "utf-8", newline="\n")
