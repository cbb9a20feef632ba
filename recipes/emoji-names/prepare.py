"""Pictures of emoji, a file each, and tables of their names: train.tsv, valid.tsv and test.tsv."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

STYLES = ("noto", "twemoji", "fluent-flat", "openmoji")
SIDE, ACROSS = 48, 48
"""Pixels of a picture, pictures in a row of a sheet."""


def prepare(data: Path, out: Path) -> None:
    """Columns: file, en, ko, group. OpenMoji's pictures are to test, a fifth of fluent's to validate."""
    from PIL import Image

    with (data / "captions.tsv").open(encoding="utf-8", newline="") as file:
        emoji = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    (out / "pictures").mkdir(exist_ok=True)
    parts: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for style in STYLES:
        sheet = Image.open(data / f"sheet_{style}.png").convert("RGB")
        for row in emoji:
            if style not in row["has"].split(","):
                continue
            y, x = divmod(int(row["index"]), ACROSS)
            name = f"pictures/{style}-{row['index']}.png"
            sheet.crop((x * SIDE, y * SIDE, (x + 1) * SIDE, (y + 1) * SIDE)).save(out / name)
            parts[part_of(style, row["hexcode"])].append("\t".join([name, row["en"], row["ko"], row["group"]]))
    for part, rows in parts.items():
        (out / f"{part}.tsv").write_text("\n".join(["file\ten\tko\tgroup", *rows]) + "\n", "utf-8", newline="\n")


def part_of(style: str, code: str) -> str:
    """Where the picture of an emoji in a style goes."""
    if style == "openmoji":
        return "test"
    held_out = int(hashlib.sha256(code.encode()).hexdigest(), 16) % 5 == 0
    return "valid" if style == "fluent-flat" and held_out else "train"
