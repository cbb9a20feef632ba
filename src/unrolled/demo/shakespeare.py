"""A language model: Shakespeare's letters, one after the other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from unrolled.data import encode_texts, split_text
from unrolled.decoding import generate
from unrolled.demo.road import Road, Row, model_name
from unrolled.evaluation import evaluate_text
from unrolled.model import LanguageModel
from unrolled.ngram import NGram

__all__ = ["run"]

_SETTINGS: dict[str, Any] = {
    "cell": "lstm", "hidden": 256, "layers": 1, "dropout": 0.1, "window": 64, "batch_size": 32, "lr": 4e-3,
    "average": 0.99, "epochs": 9,
}  # fmt: skip
_SHORT: dict[str, Any] = {**_SETTINGS, "hidden": 160, "epochs": 2}


def run(road: Road) -> None:
    """Train on Tiny Shakespeare and have it write. It must beat all three baselines, a trigram among them."""
    text = road.data.parent / "tinyshakespeare.txt.xz"
    print("Tiny Shakespeare: the first 90 % to learn from, the last 10 % held out.")
    model = road.learn(text, **(_SHORT if road.short else _SETTINGS))
    assert isinstance(model, LanguageModel)
    learn, held_out = split_text(encode_texts([text], model.vocabulary), model.config.data.valid_fraction)
    road.show_curve("nats_per_char", "held-out nats per character")

    score = evaluate_text(model, held_out, watcher=road.watcher).nats_per_char
    symbols = len(model.vocabulary)
    held = np.asarray(held_out.ids)
    found = [("every character equally likely", math.log(symbols))]
    for order, name in ((1, "unigram: how frequent it is"), (3, "trigram: given the two before it")):
        found.append((name, float(NGram(np.asarray(learn.ids), order, symbols).nats(held).mean())))
    found.append((model_name(model), score))
    rows = [Row(name, (nats, nats / math.log(2), math.exp(nats)), must=True) for name, nats in found]
    heads = ("nats per char", "bits per char", "perplexity")
    rows[-1] = rows[-1]._replace(must=False)
    road.show_scores("Held-out score", heads, rows, (".3f", ".3f", ".2f"), smaller=True)

    print("\nIt writes (temperature 0.8):\n")
    print("ROMEO:" + "".join(generate(model, "ROMEO:", length=400, temperature=0.8, seed=1)))
    road.finish(
        'unrolled generate {out} --prompt "JULIET:" --temperature 0.6',
        "unrolled train YOUR_TEXT.txt --out my-model/      # any text in any language; Korean: --unit jamo",
        "unrolled train --help",
        "unrolled demo sentiment      # and translate, chat, caption, frames",
    )
