"""Videos of people who tell a story, as tables with a row a frame: train.csv, valid.csv and test.csv."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

VIDEOS = {"train": ("a1", "a2", "b1", "b3", "c1"), "valid": ("c3",), "test": ("a3",)}
PHASES = {"Preparação": "Preparation"}
"""One row of b1 has its label in Portuguese."""
FRAMES, STRIDE = 200, 40
"""Frames in a piece of a training video, and from the start of one to that of the next."""
HANDS = ("lh", "rh", "lw", "rw")


def prepare(data: Path, out: Path) -> None:
    """Columns: piece (the rows of one are one series), 12 positions, 32 velocities and accelerations, phase.

    Positions of hands and wrists are told from the spine, in units of its distance to the head. Velocities and
    accelerations, v1 to v32, are those of the data set, which begin at a video's fifth frame. Training videos are cut
    into pieces that overlap, the others are whole.
    """
    for part, videos in VIDEOS.items():
        header, rows = ["piece"], list[list[str]]()
        for video in videos:
            columns, frames = read_video(data, video)
            header = ["piece", *columns]
            starts = [0] if part != "train" else [*range(0, len(frames) - FRAMES, STRIDE), len(frames) - FRAMES]
            for start in starts:
                stop = len(frames) if part != "train" else start + FRAMES
                rows += [[f"{video}-{start}", *frame] for frame in frames[max(start, 0) : stop]]
        with (out / f"{part}.csv").open("w", encoding="utf-8", newline="\n") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])


def read_video(data: Path, video: str) -> tuple[list[str], list[list[str]]]:
    """Names of columns, and the cells of each frame."""
    raw, processed = (
        list(csv.DictReader(gzip.decompress((data / name).read_bytes()).decode("utf-8-sig").splitlines()))
        for name in (f"raw/{video}_raw.csv.gz", f"processed/{video}_va3.csv.gz")
    )
    moves = [f"v{n}" for n in range(1, 33)]
    frames = []
    for at, move in zip(raw[len(raw) - len(processed) :], processed, strict=True):
        spine, head = ([float(at[f"{point}{axis}"]) for axis in "xyz"] for point in ("s", "h"))
        size = sum((a - b) ** 2 for a, b in zip(spine, head, strict=True)) ** 0.5
        places = [
            f"{(float(at[f'{point}{axis}']) - spine[i]) / size:.5f}" for point in HANDS for i, axis in enumerate("xyz")
        ]
        phase = at["phase"].strip()
        frames.append([*places, *(move[name[1:]].strip() for name in moves), PHASES.get(phase, phase)])
    return [*(f"{point}{axis}" for point in HANDS for axis in "xyz"), *moves, "phase"], frames
