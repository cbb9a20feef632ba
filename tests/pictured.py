"""One small untrained model of every form, and what each recorded: for the tests of pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from ends import config_of
from samples import ENGLISH, KOREAN, small_model
from test_written import PAIRS, SOURCE, TARGET, translator

from unrolled.kinds import Ends, Label, Labels, Next, Number, Numbers, Series, Text, Vector, Written
from unrolled.model import ExampleModel
from unrolled.nn import LSTM
from unrolled.trace import Trace, record, record_layer
from unrolled.vocabulary import build_vocabulary

REVIEW, TAGS = "a very good film indeed", "DET ADV ADJ NOUN ADV"
SERIES = np.stack([np.sin(np.arange(12) / 2) * 5 + 20, np.arange(12.0)], axis=1)


def model_of(given: str, asked: str, **settings: Any) -> ExampleModel:
    """A model of these two ends, its weights twice as large as they start."""
    told = {"input.kind": given, "output.kind": asked, "core.hidden": 12, **settings}
    config = config_of(*(f"{key.replace('__', '.')}={value}" for key, value in told.items()))
    text = Text(build_vocabulary(config.input.unit, [REVIEW, KOREAN]), aligned=asked in ("labels", "numbers"))
    ends: dict[str, Any] = {
        "text": text, "series": Series.learn([SERIES], config), "vector": Vector.learn([SERIES[3], SERIES[4]], config),
        "label": Label(["negative", "positive"]), "labels": Labels(sorted({*TAGS.split(), "PUNCT"})),
    }  # fmt: skip
    outs: dict[str, Any] = {
        **ends,
        "number": lambda: Number.learn([1.0, 5.0], config),
        "numbers": lambda: Numbers.learn([[1.0, 5.0]], config),
        "next": lambda: Next.learn([SERIES], config),
        "text": lambda: Written(build_vocabulary("word", [TARGET])),
    }
    output = outs[asked]() if callable(outs[asked]) else outs[asked]
    torch.manual_seed(4)
    model = ExampleModel(config, Ends(ends[given], output)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2).add_(torch.randn(parameter.shape) * 0.1)
    return model


WORDS = {"input.unit": "word", "input.embedding": 8}


def traces() -> dict[str, Trace]:
    """By name, a run of every form, of every cell and depth that a picture draws in another way."""
    return {
        "language model": record(small_model(text=ENGLISH, hidden=16), "the cat sat.\nThe"),
        "language model, two layers, korean": record(small_model(cell="gru", layers=2), KOREAN[:20]),
        "one-to-one": record(model_of("vector", "label", core__cell="rnn"), SERIES[5]),
        "one-to-many": record(model_of("vector", "text"), SERIES[5], expected=TARGET),
        "one-to-many, zeros": record(model_of("vector", "text", output__feed="zeros"), SERIES[5], expected=TARGET),
        "many-to-one": record(model_of("text", "label", **WORDS), REVIEW, expected="positive"),
        "many-to-one, both directions": record(
            model_of("text", "label", core__bidirectional="true", core__cell="lstm", **WORDS), REVIEW
        ),
        "many-to-one, mean": record(
            model_of("text", "label", core__bidirectional="true", output__pooling="mean", **WORDS), REVIEW
        ),
        "many-to-one, number": record(model_of("series", "number", output__pooling="max"), SERIES),
        "aligned": record(model_of("text", "labels", core__layers=2, core__bidirectional="true", **WORDS), REVIEW),
        "aligned, characters": record(model_of("text", "labels"), "a good film"),
        "aligned, numbers": record(model_of("series", "numbers"), SERIES),
        "forecast": record(model_of("series", "next", core__cell="lstm"), SERIES),
        "encoder-decoder": record(translator(), SOURCE, expected=TARGET),
        "encoder-decoder, both directions": record(
            translator(core__layers=2, core__bidirectional=True, core__cell="gru"), SOURCE, expected=TARGET
        ),
        "encoder-decoder, no attention": record(
            translator(output__attention="none", core__layers=2), PAIRS[1][0], expected=PAIRS[1][1]
        ),
        "layer": record_layer(
            LSTM(3, 5, num_layers=2), torch.randn(6, 1, 3, generator=torch.Generator().manual_seed(0))
        ),
    }
