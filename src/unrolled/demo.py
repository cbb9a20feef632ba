"""`unrolled demo`: the whole road on a text that ships with the package."""

from __future__ import annotations

import json
import math
import shlex
import time
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np

from unrolled.data import encode_texts, split_text
from unrolled.decoding import generate
from unrolled.errors import TrainingError
from unrolled.evaluation import evaluate_text
from unrolled.model import LanguageModel
from unrolled.ngram import NGram
from unrolled.progress import Watcher
from unrolled.training import train

__all__ = ["run_demo"]

_SETTINGS: dict[str, Any] = {
    "cell": "lstm", "hidden": 256, "layers": 1, "dropout": 0.1, "window": 64, "batch_size": 32, "lr": 4e-3,
    "average": 0.99, "epochs": 4,
}  # fmt: skip
_SHORT: dict[str, Any] = {**_SETTINGS, "hidden": 160, "epochs": 2}


def run_demo(out: Path, *, short: bool, force: bool, watcher: Watcher) -> None:
    """Train on Tiny Shakespeare, show the learning curve, the held-out score beside counted baselines, and a sample.

    Raises:
        TrainingError: a baseline was not beaten.
        StorageError: `out` holds a model and force is not set.
    """
    began = time.monotonic()
    with as_file(files("unrolled") / "demo_data" / "tinyshakespeare.txt.xz") as text:
        print("Tiny Shakespeare: the first 90 % to learn from, the last 10 % held out.")
        model = train(text, out, force=force, watcher=watcher, **(_SHORT if short else _SETTINGS))
        assert isinstance(model, LanguageModel)
        whole = encode_texts([text], model.vocabulary)
    learn, held_out = split_text(whole, model.config.data.valid_fraction)

    print("\nLearning curve (held-out nats per character):")
    for line in _curve(out / "metrics.jsonl"):
        print(line)

    score = evaluate_text(model, held_out, watcher=watcher).nats_per_char
    symbols = len(model.vocabulary)
    held = np.asarray(held_out.ids)
    rows = [("every character equally likely", math.log(symbols))]
    for order, name in ((1, "unigram: how frequent it is"), (3, "trigram: given the two before it")):
        rows.append((name, float(NGram(np.asarray(learn.ids), order, symbols).nats(held).mean())))
    rows.append((f"this model ({model.config.core.cell}, {model.config.core.hidden} units)", score))
    print("\nHeld-out score:                        nats per char   bits per char   perplexity")
    for name, nats in rows:
        print(f"  {name:<36} {nats:>13.3f}   {nats / math.log(2):>13.3f}   {math.exp(nats):>10.2f}")
    if score >= min(nats for _, nats in rows[:-1]):
        raise TrainingError(
            "the demo's model did not beat the counted baselines; please report this with `unrolled doctor`"
        )

    print("\nIt writes (temperature 0.8):\n")
    print("ROMEO:" + "".join(generate(model, "ROMEO:", length=400, temperature=0.8, seed=1)))
    print(f"\n{time.monotonic() - began:.0f} seconds in all. The model is in {out}. Try next:")
    print(f'  unrolled generate {shlex.quote(str(out))} --prompt "JULIET:" --temperature 0.6')
    print("  unrolled train YOUR_TEXT.txt --out my-model/      # any text in any language; Korean: --unit jamo")
    print("  unrolled train --help")


def _curve(metrics: Path) -> list[str]:
    """One line per validation: update, nats, and a bar from the best to the worst."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    points = [(line["epoch"], line["step"], line["nats_per_char"]) for line in lines if line["kind"] == "valid"]
    longest = max(nats for _, _, nats in points)
    return [
        f"  epoch {round(epoch, 2):>4g}  update {step:>5,}  {nats:.3f}  {'█' * round(40 * nats / longest)}"
        for epoch, step, nats in points
    ]
