"""One-to-many: a picture goes in, its name comes out word by word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unrolled.demo.baselines import most_frequent, text_figures
from unrolled.demo.road import Road, Row, model_name, spread
from unrolled.evaluation import evaluate_examples
from unrolled.kinds.image import decode
from unrolled.prediction import predict

__all__ = ["run"]

_SETTINGS: dict[str, Any] = {
    "input.size": 32, "input.features": 256, "cell": "gru", "hidden": 512, "layers": 1, "dropout": 0.3,
    "output.unit": "word", "output.label_smoothing": 0.1, "batch_size": 64, "lr": 3e-3, "weight_decay": 0.05,
    "average": 0.98, "warmup": 50, "epochs": 90, "training.valid_every": 180,
}  # fmt: skip
_SHORT: dict[str, Any] = {**_SETTINGS, "epochs": 8, "training.valid_every": 48}
_FIGURES = ("exact", "chrf", "bleu")

_LEARNT, _HELD_OUT = ("noto", "fluent-flat"), "twemoji"
_SIDE, _ACROSS = 32, 32

Pixels = npt.NDArray[np.uint8]


def run(road: Road) -> None:
    """Train on two artists' emoji and name a third one's. It must beat the most frequent name; that of the picture
    whose pixels are most alike is shown beside it."""
    names = road.rows("names.tsv.xz")
    sheets = {style: _cut(road.data / f"{style}.webp", len(names)) for style in (*_LEARNT, _HELD_OUT)}
    print(
        f"{len(names):,} emoji and their Korean names. To learn from: as Google (Noto) and Microsoft (Fluent) draw "
        "them; held out: as Twitter does.\nTwemoji graphics (c) Twitter, Inc and other contributors, CC BY 4.0."
    )
    rows = {style: _write(pictures, names, road.out / "pictures", style) for style, pictures in sheets.items()}
    learn, test = [row for style in _LEARNT for row in rows[style]], rows[_HELD_OUT]
    # Which update is best is told by a tenth of the pictures to learn from.
    model = road.learn_examples(
        learn, None, input="image:file", output="text:name", **(_SHORT if road.short else _SETTINGS)
    )
    road.show_curve("perplexity", "perplexity per word of other pictures of the two")

    figures = evaluate_examples(model, test, watcher=road.watcher)
    usual = most_frequent(row["name"] for row in learn)
    alike = _nearest(np.concatenate([sheets[style] for style in _LEARNT]), sheets[_HELD_OUT])
    near = [learn[i]["name"] for i in alike]
    expected = [row["name"] for row in test]
    table = [
        Row("always the most frequent name", text_figures([usual] * len(test), expected, _FIGURES), must=True),
        Row("the picture with the most similar pixels", text_figures(near, expected, _FIGURES)),
        Row(model_name(model), tuple(figures[name] for name in _FIGURES)),
    ]
    road.show_scores("Held-out score", ("exact", "chrF", "BLEU"), table, (".1%", ".1f", ".1f"))
    gain = 100 * (table[2].figures[0] - table[1].figures[0])
    print(f"Against the name of the most similar picture that is {gain:+.1f} points.")

    print("\nHeld-out pictures: what the model calls them, and where it is wrong, what they are:")
    chosen = spread(16, len(test))
    found = predict(model, [Path(test[i]["file"]) for i in chosen])
    for i, answer in zip(chosen, found, strict=True):
        right = answer.text == test[i]["name"]
        print(f"  {names[i]['emoji']}  {answer.text}" + ("" if right else f"      (x: {test[i]['name']})"))
    road.finish(
        f"unrolled predict {{out}} {{out}}/pictures/{_HELD_OUT}-0*.png",
        "unrolled predict {out} YOUR.png --n-best 3",
        "unrolled train YOUR.tsv --input image:file --output text:name --out my-captions/",
    )


def _cut(sheet: Path, number: int) -> Pixels:
    """The pictures of a sheet, uint8 [number side side 3]."""
    pixels = decode(sheet, _SIDE)
    down = pixels.shape[0] // _SIDE
    grid = pixels[: down * _SIDE].reshape(down, _SIDE, _ACROSS, _SIDE, 3).swapaxes(1, 2)
    return np.ascontiguousarray(grid.reshape(-1, _SIDE, _SIDE, 3)[:number])


def _write(pictures: Pixels, names: list[dict[str, Any]], folder: Path, style: str) -> list[dict[str, str]]:
    """The pictures as files, and the rows of a table of them."""
    import PIL.Image

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        file = folder / f"{style}-{number:03}.png"
        PIL.Image.fromarray(picture).save(file)
        rows.append({"file": str(file.resolve()), "name": name["ko"]})
    return rows


def _nearest(known: Pixels, pictures: Pixels) -> list[int]:
    """For each picture the known one whose pixels are at the least distance (the sum of squares)."""
    flat = known.reshape(len(known), -1).astype(np.float32) / 255
    squares = (flat**2).sum(1)
    wanted = pictures.reshape(len(pictures), -1).astype(np.float32) / 255
    found: list[int] = (squares - 2 * wanted @ flat.T).argmin(1).tolist()
    return found
