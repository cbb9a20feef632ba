"""Videos of people who tell a story, drawn as stick figures: films/*.mp4, and tables with a row a frame."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VIDEOS = {"train": ("a1", "a2", "b1", "b3", "c1"), "valid": ("c3",), "test": ("a3",)}
"""The split of the recipe gesture-phases."""
FIRST = 4
"""Frames at a video's beginning that are left out, as in the recipe gesture-phases: its velocities begin later."""
PHASES = {"Preparação": "Preparation"}
"""One row of b1 has its label in Portuguese."""
FRAMES, STRIDE = 200, 40
"""Frames in a piece of a training video, and from the start of one to that of the next."""
POINTS = ("h", "lw", "lh", "rw", "rh")
"""What is drawn beside the spine: head, left wrist and hand, right wrist and hand."""

SIDE, FINER = 128, 4
"""Pixels a side of a film, and how many times finer it is drawn."""
UNIT, SPINE = 40.0, (64.0, 74.0)
"""Pixels of the distance from spine to head, and where the spine is."""
SHOULDERS = 0.75
"""Where on the line from spine to head the arms begin."""
BODY, LEFT, RIGHT = (0, 110, 0), (0, 60, 255), (255, 60, 0)
LINE, DISC = 7, 9
"""Pixels: how wide a line is, and the radius of the disc at its end, the head or a hand."""
RATE = 30
"""Frames a second, about what the recordings have."""

Points = Sequence[tuple[float, float]]


def prepare(data: Path, out: Path) -> None:
    """Columns: film (the rows of one are its frames), 10 positions, phase.

    Positions x, y are told from the spine, in units of its distance to the head, and are all that is drawn. Training
    videos are cut into pieces that overlap, the others are whole.
    """
    (out / "films").mkdir(exist_ok=True)
    for part, videos in VIDEOS.items():
        rows = [["film", *(f"{point}{axis}" for point in POINTS for axis in "xy"), "phase"]]
        for video in videos:
            places, phases = read_video(data / "raw" / f"{video}_raw.csv.gz")
            pictures = [draw(points) for points in places]
            last = max(0, len(places) - FRAMES)
            for start in [*range(0, last, STRIDE), last] if part == "train" else [0]:
                stop = start + FRAMES if part == "train" else len(places)
                name = f"films/{video}-{start}.mp4"
                write_film(out / name, pictures[start:stop])
                for points, phase in zip(places[start:stop], phases[start:stop], strict=True):
                    rows.append([name, *(f"{number:.5f}" for point in points for number in point), phase])
        with (out / f"{part}.csv").open("w", encoding="utf-8", newline="\n") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


def read_video(path: Path) -> tuple[list[Points], list[str]]:
    """Where the points are in each frame, and its phase."""
    places: list[Points] = []
    phases = []
    for at in list(csv.DictReader(gzip.decompress(path.read_bytes()).decode("utf-8-sig").splitlines()))[FIRST:]:
        spine, head = ([float(at[f"{point}{axis}"]) for axis in "xyz"] for point in ("s", "h"))
        size = sum((a - b) ** 2 for a, b in zip(spine, head, strict=True)) ** 0.5
        places.append(
            [((float(at[f"{p}x"]) - spine[0]) / size, (float(at[f"{p}y"]) - spine[1]) / size) for p in POINTS]
        )
        phase = at["phase"].strip()
        phases.append(PHASES.get(phase, phase))
    return places, phases


def draw(points: Points) -> Any:
    """A frame: the body green, the left arm and hand blue, the right ones red, y downwards as in the data. Colours are
    light that adds up, so that nothing is hidden by what is in front of it."""
    from PIL import Image, ImageChops, ImageDraw

    spine, head, *arms = ((FINER * (SPINE[0] + UNIT * x), FINER * (SPINE[1] + UNIT * y)) for x, y in [(0, 0), *points])
    neck = tuple(a + SHOULDERS * (b - a) for a, b in zip(spine, head, strict=True))
    picture = Image.new("RGB", (SIDE * FINER, SIDE * FINER))
    for colour, line in ((BODY, [spine, head]), (LEFT, [neck, *arms[:2]]), (RIGHT, [neck, *arms[2:]])):
        light = Image.new("RGB", picture.size)
        pen = ImageDraw.Draw(light)
        pen.line(line, colour, LINE * FINER, joint="curve")
        pen.circle(line[-1], DISC * FINER, colour)
        picture = ImageChops.add(picture, light)
    return picture.reduce(FINER)


def write_film(path: Path, pictures: Sequence[Any]) -> None:
    """H.264 that any player shows, of a quality that leaves the lines sharp; one thread: the same bytes each time."""
    import av

    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264", rate=RATE, options={"crf": "16", "preset": "medium", "threads": "1"})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            film.mux(stream.encode(av.VideoFrame.from_image(picture)))
        film.mux(stream.encode())
