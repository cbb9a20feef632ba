"""What every demo goes through: learn, the learning curve, the scores beside baselines, what to try next."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from unrolled.config import resolve
from unrolled.data import open_data
from unrolled.errors import TrainingError
from unrolled.model import ExampleModel, Model, form_of
from unrolled.progress import Watcher
from unrolled.training import prepare_config, train

__all__ = ["DATA", "Road", "Row", "model_name", "spread"]

DATA = Path(__file__).resolve().parents[1] / "demo_data"
_BAR = 40


class Row(NamedTuple):
    """A line of a table of scores. must: the model has to be better, in the first of the figures."""

    name: str
    figures: Sequence[float]
    must: bool = False


@dataclass(frozen=True)
class Road:
    """One run of a demo.

    Attributes:
        name: of the demo.
        out: the model folder.
        short: learn for a short time.
        force: replace a model in `out`.
    """

    name: str
    out: Path
    short: bool
    force: bool
    watcher: Watcher
    began: float = field(default_factory=time.monotonic)

    @property
    def data(self) -> Path:
        """The folder with the demo's data."""
        return DATA / self.name

    def rows(self, file: str) -> list[dict[str, Any]]:
        """All rows of a table of the demo's data."""
        table = open_data(self.data / file, resolve())
        return list(table)

    def learn(self, data: Any, valid: Any = None, **settings: Any) -> Model:
        """Say the form, train."""
        config = prepare_config(self.out, **{key: value for key, value in settings.items() if value is not None})
        print(f"Form: {form_of(config)}.\n")
        return train(data, self.out, valid=valid, force=self.force, watcher=self.watcher, report=True, **settings)

    def learn_examples(self, data: Any, valid: Any, **settings: Any) -> ExampleModel:
        """The same of a model of examples."""
        model = self.learn(data, valid, **settings)
        assert isinstance(model, ExampleModel)
        return model

    def show_curve(self, figure: str, words: str) -> None:
        """A line for each validation: the update, the figure, and a bar."""
        print(f"\nLearning curve ({words}):")
        lines = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text("utf-8").splitlines()]
        points = [(line["epoch"], line["step"], line[figure]) for line in lines if line["kind"] == "valid"]
        longest = max(value for *_, value in points) or 1.0
        width = len(f"{longest:.3f}")
        for epoch, step, value in points:
            bar = "█" * round(_BAR * value / longest)
            print(f"  epoch {round(epoch, 2):>4g}  update {step:>5,}  {value:>{width}.3f}  {bar}")

    def show_scores(
        self, title: str, heads: Sequence[str], rows: Sequence[Row], formats: Sequence[str], *, smaller: bool = False
    ) -> None:
        """The table of scores, the model's last.

        Args:
            heads, formats: of the columns of figures.
            smaller: whether the smaller figure is the better one.

        Raises:
            TrainingError: the model is not better than a row that it must beat.
        """
        width = 3 + max(len(title), *(len(row.name) for row in rows))
        print(f"\n{title + ':':<{width}}" + "".join(f"   {head:>8}" for head in heads))
        for row in rows:
            cells = zip(row.figures, heads, formats, strict=True)
            shown = "".join(f"   {value:>{max(len(head), 8)}{form}}" for value, head, form in cells)
            print(f"  {row.name:<{width - 2}}{shown}")
        own = rows[-1].figures[0]
        missed = [r.name for r in rows if r.must and not (own < r.figures[0] if smaller else own > r.figures[0])]
        if missed:
            raise TrainingError(
                f"the demo's model did not beat the baseline ({missed[0]}); please report this with `unrolled doctor`"
            )

    def finish(self, *commands: str) -> None:
        """How long it took, where the model is, and commands to try: {out} and {data} stand for the folders."""
        print(f"\n{time.monotonic() - self.began:.0f} seconds in all. The model is in {self.out}. Try next:")
        page = self.out / "report.html"
        if page.exists():
            print(f"  open {shlex.quote(str(page))} in a browser: a look inside the model")
        for command in commands:
            print(f"  {command.format(out=shlex.quote(str(self.out)), data=shlex.quote(str(self.data)))}")


def model_name(model: Model) -> str:
    """The model as a row of a table is called."""
    core = model.config.core
    both = ", both directions" if core.bidirectional else ""
    return f"this model ({core.cell}, {core.hidden} units{both})"


def spread(number: int, of: int) -> list[int]:
    """So many numbers below `of`, evenly spread: which examples are shown."""
    return [i * of // number for i in range(min(number, of))]
