"""A model of examples over examples -> figures."""

from __future__ import annotations

import math
import time
from itertools import islice
from typing import Any

import torch

from unrolled.data import Batches, Examples, Values
from unrolled.kinds import Next, Written
from unrolled.model import ExampleModel
from unrolled.prediction import Searching, answers
from unrolled.progress import Silent, Watcher

__all__ = ["judge_examples", "loss_of"]

_AT_ONCE = 256  # raw values that are read together


@torch.inference_mode()
def loss_of(model: ExampleModel, examples: Examples, *, batch_size: int = 64) -> float:
    """The mean loss, per target, of examples with outputs."""
    total, count = 0.0, 0
    training = model.training
    model.eval()
    try:
        for rows in Batches(examples, batch_size, None, 0, shuffle=False).epoch(0):
            steps, targets = examples.batch(rows.tolist())
            loss = model.loss(steps.to(model.device), targets.to(model.device))
            total, count = total + float(loss.total), count + loss.count
    finally:
        model.train(training)
    return total / max(count, 1)


def judge_examples(
    model: ExampleModel,
    examples: Examples,
    values: Values,
    *,
    searching: Searching | None = None,
    batch_size: int = 64,
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """The figures of a model on examples (see `unrolled.kinds.scores`), and `seconds`.

    Args:
        values: the raw values the examples are of: what answers are scored by.
        searching: how text is written. None leaves the writing out: text is then judged by the words it should have
            been alone, `loss` in nats per symbol and `perplexity`.
    """
    watcher = watcher or Silent()
    began = time.monotonic()
    written = isinstance(model.ends.output, Written)
    figures: dict[str, Any] = {}
    if model.config.output.kind != "next":  # a forecast has no targets but what it is scored by
        loss = loss_of(model, examples, batch_size=batch_size)
        figures["loss"] = loss
        if written:
            figures["perplexity"] = math.exp(loss) if loss < 700 else math.inf
    if searching is not None or not written:
        output = model.ends.output

        def raw(numbers: list[int]) -> list[tuple[Any, Any]]:
            return values.take(examples.kept[numbers].tolist())

        score: Any = output.score(model.config)
        watcher.start("answering", len(examples))

        found = answers(model, examples, searching, batch_size=batch_size, source=lambda number: raw([number])[0][0])
        done = 0
        while part := list(islice(found, _AT_ONCE)):
            for (_, answer), (given, expected) in zip(part, raw([number for number, _ in part]), strict=True):
                beside = output.trivial(given, model.config) if isinstance(output, Next) else {}
                score.add(answer, expected, **beside)
            done += len(part)
            watcher.update(done)
        watcher.stop()
        figures |= score.figures()
    figures.setdefault("examples", len(examples))
    figures["left_out"] = examples.left_out
    figures["seconds"] = time.monotonic() - began
    return figures
