"""A model over data -> figures."""

from __future__ import annotations

from typing import Any

from unrolled.config import parse_end, resolve, to_dict
from unrolled.data import encode_examples, forecast_values, open_data, read_values
from unrolled.errors import ConfigError
from unrolled.evaluation.examples import judge_examples, loss_of
from unrolled.evaluation.text import Evaluation, evaluate_text
from unrolled.kinds import Written
from unrolled.model import ExampleModel, LanguageModel, Model
from unrolled.prediction import Searching
from unrolled.progress import Silent, Watcher

__all__ = ["Evaluation", "evaluate", "evaluate_examples", "evaluate_text", "judge_examples", "loss_of"]


def evaluate(model: Model, data: Any, **settings: Any) -> Any:
    """How well a model does on data: `evaluate_text` for a language model, `evaluate_examples` for all others."""
    if isinstance(model, LanguageModel):
        return evaluate_text(model, data, **settings)
    assert isinstance(model, ExampleModel)
    return evaluate_examples(model, data, **settings)


def evaluate_examples(
    model: ExampleModel,
    data: Any,
    *,
    searching: Searching | None = None,
    batch_size: int = 64,
    skip_bad: bool = False,
    input: str | None = None,
    output: str | None = None,
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """The figures of a model on a table of examples, by name (see `unrolled.kinds.scores`).

    Args:
        data: as for `unrolled.train`, with the output's columns.
        searching: how text is written; None: beam search as it is by default.
        skip_bad: leave out examples that cannot be read, and count them.
        input, output: other columns than those it was trained with, `KIND:COLUMN,...`.

    Raises:
        DataError: the data cannot be used.
        ConfigError: another kind than the model's.
    """
    layers = [parse_end(end, text) for end, text in (("input", input), ("output", output)) if text is not None]
    config = resolve(to_dict(model.config), *layers)
    for end in ("input", "output"):
        if getattr(config, end).kind != getattr(model.config, end).kind:
            raise ConfigError(f"--{end}: the model's is {getattr(model.config, end).kind}, got another kind")
    table = open_data(data, config)
    values = forecast_values(table, config)[1] if config.output.kind == "next" else read_values(table, config)
    watcher = watcher or Silent()
    watcher.start("encoding", len(values))
    encoded = encode_examples(
        values,
        model.ends,
        outputs=config.output.kind != "next",
        skip_bad=skip_bad or config.data.skip_bad,
        progress=watcher.update,
    )
    watcher.stop()
    for bad in encoded.bad:
        watcher.say(f"left out: {bad.where}: {bad.why}")
    if encoded.left_out > len(encoded.bad):
        watcher.say(f"left out: {encoded.left_out - len(encoded.bad):,} more")
    if isinstance(model.ends.output, Written) and searching is None:
        searching = Searching()
    return judge_examples(model, encoded, values, searching=searching, batch_size=batch_size, watcher=watcher)
