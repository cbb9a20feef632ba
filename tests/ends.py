"""An input kind, a core and an output kind joined by hand, for tests of one kind on its own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unrolled.config import Config, parse_override, resolve
from unrolled.kinds.contract import Input, Output
from unrolled.nn import Core


def config_of(*settings: str) -> Config:
    """Settings written KEY=VALUE."""
    return resolve(*map(parse_override, settings))


def again(end: Input | Output) -> Any:
    """An end as it comes back from JSON."""
    return type(end).from_json(json.loads(json.dumps(end.to_json())))


class Small(nn.Module):
    """A model of one GRU layer, its ends learnt from raw values."""

    def __init__(self, config: Config, input: Input, output: Output, hidden: int = 32) -> None:
        super().__init__()
        self.input, self.output = input, output
        self.reader = input.reader(config)
        self.core = _Core("gru", self.reader.step_size, hidden)
        self.writer: Any = output.writer(config, self.reader, self.core)

    def loss(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> Tensor:
        """The mean loss of a batch of raw values."""
        steps = self.input.collate([self.input.encode(value) for value in inputs])
        targets = self.output.collate([self.output.encode(value) for value in outputs])
        loss = self.writer.loss(lambda: self.reader(*steps.tensors), self.core, steps, targets)
        return loss.total / loss.count

    def answer(self, inputs: Sequence[Any]) -> list[Any]:
        """The raw answers to a batch of raw values."""
        steps = self.input.collate([self.input.encode(value) for value in inputs])
        with torch.no_grad():
            return self.writer.answer(lambda: self.reader(*steps.tensors), self.core, steps)

    def learn(self, batches: Iterable[tuple[Sequence[Any], Sequence[Any]]], lr: float = 5e-3) -> None:
        """One update a batch."""
        optimizer = torch.optim.AdamW(self.parameters(), lr)
        self.train()
        for inputs, outputs in batches:
            optimizer.zero_grad()
            self.loss(inputs, outputs).backward()
            optimizer.step()
        self.eval()


class _Core(Core):
    """As writers are given it."""

    def drop(self, hidden: Tensor) -> Tensor:
        return hidden
