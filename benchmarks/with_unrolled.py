"""The same training as `plain_torch.py` by `unrolled.train`: the whole loop of a user's training, logs included.

    python with_unrolled.py FOLDER --input embedding --updates 20 --out RESULT.json

FOLDER is made by `language_model.py`: settings.json, train.txt and a model folder with the initial weights.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import unrolled


class Clock:
    """A watcher that notes when each update ended."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._training = False

    def start(self, what: str, total: float, done: float = 0) -> None:
        self._training = what == "training"
        if self._training:
            self.times.append(time.perf_counter())

    def update(self, done: float, note: str = "") -> None:
        if self._training:
            self.times.append(time.perf_counter())

    def say(self, line: str) -> None: ...

    def stop(self) -> None:
        self._training = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--input", choices=("embedding", "one-hot"), required=True)
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--weights", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()

    s = json.loads((given.folder / "settings.json").read_text("utf-8"))
    clock = Clock()
    unrolled.train(
        given.folder / "train.txt",
        given.weights,
        valid=given.folder / "short.txt",  # what happens after the last update is not measured; so make it short
        watcher=clock,
        init_from=given.folder / given.input,
        window=s["window"],
        batch_size=s["batch_size"],
        epochs=10**6,
        steps=given.updates,
        valid_every=given.updates,
        log_every=1,
        lr=s["lr"],
        betas=s["betas"],
        clip=s["clip"],
        schedule="constant",
        warmup=0,
        weight_decay=0.0,
        average=0.0,
        precision=given.precision,
        device="cpu",
        seed=s["seed"],
    )
    lines = [json.loads(line) for line in (given.weights / "metrics.jsonl").read_text("utf-8").splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    result = {
        "losses": [line["loss"] for line in lines],
        "norms": [line["norm"] for line in lines],
        "clock": clock.times,
        "threads": torch.get_num_threads(),
    }
    given.out.write_text(json.dumps(result), "utf-8")


if __name__ == "__main__":
    main()
