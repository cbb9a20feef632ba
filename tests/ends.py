"""Small models whose ends are given by hand, for tests of one kind on its own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from unrolled.config import Config, parse_override, resolve
from unrolled.kinds.contract import Ends, Input, Output
from unrolled.model import ExampleModel, _Run


def config_of(*settings: str) -> Config:
    """One small layer, and settings written KEY=VALUE."""
    core = {"cell": "gru", "hidden": 32, "layers": 1, "dropout": 0.0}
    return resolve({"core": core}, *map(parse_override, settings))


def again(end: Input | Output) -> Any:
    """An end as it comes back from JSON."""
    return type(end).from_json(json.loads(json.dumps(end.to_json())))


class Small(ExampleModel):
    """A model that takes raw values."""

    def __init__(self, config: Config, input: Input, output: Output) -> None:
        super().__init__(config, Ends(input, output))
        self.input, self.output, self.run = input, output, _Run(self.core)

    def mean_loss(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> Tensor:
        """The mean loss of a batch."""
        steps = self.input.collate([self.input.encode(value) for value in inputs])
        loss = self.loss(steps, self.output.collate([self.output.encode(value) for value in outputs]))
        return loss.total / loss.count

    def raw(self, inputs: Sequence[Any]) -> list[Any]:
        """The writer's answers to a batch."""
        steps = self.input.collate([self.input.encode(value) for value in inputs])
        with torch.no_grad():
            return self.writer.answer(lambda: self.reader(*steps.tensors), self.run, steps)

    def say(self, inputs: Sequence[Any]) -> list[Any]:
        """The values of the answers to a batch."""
        return [self.output.answer(raw).value for raw in self.raw(inputs)]

    def learn(self, batches: Iterable[tuple[Sequence[Any], Sequence[Any]]], lr: float = 5e-3) -> None:
        """One update a batch."""
        optimizer = torch.optim.AdamW(self.parameters(), lr)
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # in tiny sizes threads only wait for each other, for long on a busy machine
        self.train()
        for inputs, outputs in batches:
            optimizer.zero_grad()
            self.mean_loss(inputs, outputs).backward()
            optimizer.step()
        self.eval()
        torch.set_num_threads(before)
