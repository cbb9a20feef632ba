"""What `plain_translation.py` and `plain_classification.py` do, by `unrolled.train` and `unrolled.predict`: as a user
runs them, with reading, logs and all.

    python examples_with_unrolled.py FOLDER train --updates 20 --out RESULT.json
    python examples_with_unrolled.py FOLDER translate --out RESULT.json

FOLDER is made by `examples.py`: settings.json, train.tsv, valid.tsv, test.txt and the model folders.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from with_unrolled import Clock

import unrolled
from unrolled.decoding import BeamSettings
from unrolled.prediction import Searching, longest, predict


def train(folder: Path, updates: int, precision: str, model: Path | None) -> dict[str, Any]:
    s = json.loads((folder / "settings.json").read_text("utf-8"))
    clock = Clock()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        out = model or Path(scratch) / "model"
        unrolled.train(
            folder / "train.tsv",
            out,
            config=folder / "config.yaml",
            valid=folder / "valid.tsv",  # what happens after the last update is not measured; so it is short
            watcher=clock,
            init_from=folder / "start",
            steps=updates,
            valid_every=updates,
            log_every=1,
            precision=precision,
        )
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {
        "losses": [line["loss"] for line in lines if line["kind"] == "train"],
        "clock": clock.times,
        "batch_size": s["batch_size"],
    }


def translate(folder: Path, precision: str) -> dict[str, Any]:
    s = json.loads((folder / "settings.json").read_text("utf-8"))
    texts = (folder / "test.txt").read_text("utf-8").splitlines()
    model = unrolled.load(folder / "trained")
    searching = Searching(BeamSettings(beam=s["beam"], max_length=longest))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        list(predict(model, texts[:10], searching=searching))  # warm
        began = time.perf_counter()
        found = list(predict(model, texts, searching=searching))
        seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "texts": [answer.text for answer in found],
        "log_probabilities": [answer.details["log_probability"] for answer in found],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("what", choices=("train", "translate"))
    parser.add_argument("--updates", type=int, default=0)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--model", type=Path, help="where to leave the trained model")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    result = (
        train(given.folder, given.updates, given.precision, given.model)
        if given.what == "train"
        else translate(given.folder, given.precision)
    )
    given.out.write_text(json.dumps(result), "utf-8")


if __name__ == "__main__":
    main()
