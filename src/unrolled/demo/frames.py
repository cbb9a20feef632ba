"""Many-to-many, aligned, no delay: a stream of frames goes in, and at each of them a label comes out."""

from __future__ import annotations

from typing import Any

import numpy as np

from unrolled.demo.baselines import most_frequent
from unrolled.demo.road import Road, Row, model_name
from unrolled.evaluation import evaluate_examples
from unrolled.kinds import Answer
from unrolled.kinds.scores import TagScore
from unrolled.prediction import predict

__all__ = ["run"]

_SETTINGS: dict[str, Any] = {
    "cell": "gru", "hidden": 64, "layers": 2, "dropout": 0.3, "batch_size": 8, "lr": 3e-3, "average": 0.98,
    "warmup": 20, "epochs": 60, "training.valid_every": 49,
}  # fmt: skip
_SHORT: dict[str, Any] = {**_SETTINGS, "hidden": 48, "layers": 1, "epochs": 20, "training.valid_every": 28}

_LETTERS = {"stop": ".", "clockwise": ")", "counter clockwise": "(", "move": "~"}


def run(road: Road) -> None:
    """Train on clips and label others frame by frame. It must beat the most frequent label."""
    learn, test = _clips(road.rows("train.csv.xz")), _clips(road.rows("test.csv.xz"))
    counts = [sum(len(labels) for _, labels in part) for part in (learn, test)]
    print(
        "A fingertip in front of a webcam, frame by frame: by how many pixels it has moved to the right and down since "
        f"the last one, and what it does. {len(learn)} clips ({counts[0]:,} frames) to learn from, {len(test)} clips "
        f"({counts[1]:,} frames), recorded later, held out."
    )
    model = road.learn_examples(
        road.data / "train.csv.xz", road.data / "valid.csv.xz", input="series:right,down", output="labels:gesture",
        group="clip", **(_SHORT if road.short else _SETTINGS),
    )  # fmt: skip
    road.show_curve("macro_f1", "macro F1 of the frames of other clips")

    usual = most_frequent(label for _, labels in learn for label in labels)
    score = TagScore(sorted(_LETTERS))
    for _, labels in test:
        score.add(Answer([usual] * len(labels), ""), labels)
    trivial = score.figures()
    figures = evaluate_examples(model, road.data / "test.csv.xz", watcher=road.watcher)
    rows = [
        Row(f"always {usual}", (trivial["macro_f1"], trivial["accuracy"]), must=True),
        Row(model_name(model), (figures["macro_f1"], figures["accuracy"])),
    ]
    road.show_scores("Held-out score", ("macro F1", "accuracy"), rows, (".3f", ".1%"))

    answers = [list(answer.value) for answer in predict(model, [moves for moves, _ in test])]
    print("\nWhat it knows, the longer it looks (right answers by the number of frames it has seen):")
    right = [np.equal(answer, labels) for answer, (_, labels) in zip(answers, test, strict=True)]
    for first, last in ((1, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 64)):
        part = np.concatenate([row[first - 1 : last] for row in right])
        if len(part):
            print(f"  frames {first:>2} to {last:>2}   {part.mean():>4.0%}  {'█' * round(40 * part.mean())}")

    print(f"\nHeld-out clips, a sign a frame: {', '.join(f'{sign} {name}' for name, sign in _LETTERS.items())}")
    for wanted in _LETTERS:
        number = next((n for n, (_, labels) in enumerate(test) if labels[0] == wanted), None)
        if number is not None:
            signs = "".join(_LETTERS.get(label, "?") for label in answers[number])
            print(f"  {wanted:<17}  {signs}")
    road.finish(
        "unrolled evaluate {out} {data}/test.csv.xz      # with the table of confusions",
        "unrolled predict {out} {data}/test.csv.xz",
        "unrolled train YOUR.csv --input series:x,y --output labels:label --group video --out my-frames/",
    )


def _clips(rows: list[dict[str, Any]]) -> list[tuple[np.ndarray, list[str]]]:
    """The movements, [T 2], and labels of each clip."""
    clips: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        clips.setdefault(row["clip"], []).append(row)
    return [
        (np.array([[float(row["right"]), float(row["down"])] for row in clip]), [row["gesture"] for row in clip])
        for clip in clips.values()
    ]
