"""Model = input kind + recurrent core + output kind; the form of the lecture notes follows from the two ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from unrolled import fused, native
from unrolled.cells import map_state
from unrolled.config import Config
from unrolled.errors import ConfigError
from unrolled.kinds.text import NextWriter, TextReader
from unrolled.nn import Core, CoreState, dropout_steps
from unrolled.vocabulary import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float, Int

__all__ = ["Form", "Model"]


@dataclass(frozen=True)
class Form:
    """One of the five forms of the lecture notes, as it follows from what goes in and what comes out."""

    input: str
    output: str
    name: str
    example: str

    def __str__(self) -> str:
        return f"{self.input} -> {self.output}: {self.name} ({self.example})"


_FORMS = {
    ("text", "next"): Form("text", "next", "many-to-many, aligned, autoregressive", "language model"),
}


class Model(nn.Module):
    """A recurrent sequence model with the vocabulary it reads and writes.

    Streams through the same two methods as a cell, one floor up: `begin` gives a state, `step` a symbol's scores
    and the next state.

    Args:
        config: the resolved settings (`unrolled.config.resolve`).
        vocabulary: text <-> ids.

    Raises:
        ConfigError: an unknown cell, or settings that do not fit together.
    """

    def __init__(self, config: Config, vocabulary: Vocabulary) -> None:
        super().__init__()
        core = config.core
        self.config = config
        self.vocabulary = vocabulary
        self.reader = TextReader(len(vocabulary), config.input.embedding)
        self.core = Core(
            core.cell,
            self.reader.step_size,
            core.hidden,
            core.layers,
            bidirectional=core.bidirectional,
            dropout=core.dropout,
            locked=core.locked,
            recurrent_dropout=core.recurrent_dropout,
            init=core.init,
            forget_bias=core.forget_bias,
            chrono=core.chrono,
            backend=config.training.backend,
            tape_budget=config.training.tape_budget,
        )
        if config.output.tied and self.reader.table is None:
            raise ConfigError(
                f"output.tied: one-hot input has no embedding to share: set input.embedding={core.hidden}"
            )
        self.writer = NextWriter(
            self.core.output_size,
            len(vocabulary),
            self.reader.table if config.output.tied else None,
            backend=config.training.backend,
        )

    @property
    def form(self) -> Form:
        """Which of the notes' forms this model is."""
        return _FORMS[self.config.input.kind, self.config.output.kind]

    def begin(
        self,
        ids: Int[Tensor, "T B"] | None = None,
        lengths: Int[Tensor, "B"] | Sequence[int] | None = None,
        *,
        batch: int = 1,
    ) -> CoreState:
        """The state after reading a prompt, or the first state for `batch` rows if there is none."""
        if ids is None:
            return self.core.initial_state(batch)
        state: CoreState = self.core(self.reader(ids), lengths=lengths).state
        return state

    def step(self, ids: Int[Tensor, "B"], state: CoreState) -> tuple[Float[Tensor, "B V"], CoreState]:
        """Read one symbol per row: the scores of the symbol to come next, and the next state."""
        hidden, state = self.core.step(self.reader(ids), state)
        return self.writer(hidden), state

    def hold_still(self) -> native.Writer | None:
        """This model with its weights as they are now, ready to write without Python between the symbols; None where
        the native kernels cannot."""
        layers = self.core.native_layers()
        if layers is None or native.unsuited(self.writer.weight) is not None:
            return None
        return native.Writer(
            layers[0].equation.name,
            fused.contributions(layers[0], self.reader.table),
            [cell.weights for cell in layers],
            self.writer.weight,
            self.writer.bias,
            bf16=torch.is_autocast_enabled("cpu"),
        )

    def forward(
        self,
        ids: Int[Tensor, "T B"],
        state: CoreState | None = None,
        *,
        lengths: Int[Tensor, "B"] | Sequence[int] | None = None,
        reset: Bool[Tensor, "T B"] | None = None,
    ) -> tuple[Float[Tensor, "T B V"], CoreState]:
        """A whole sequence: the scores of what comes after each step, and the final state.

        reset: true where a step is the first of a document: the state is cleared before it.
        """
        hidden, state = self._hidden(ids, state, lengths, reset)
        return self.writer(hidden), state

    def loss(
        self,
        ids: Int[Tensor, "T B"],
        targets: Int[Tensor, "T B"],
        state: CoreState | None = None,
        *,
        reset: Bool[Tensor, "T B"] | None = None,
        after: int | None = None,
    ) -> tuple[Float[Tensor, ""], CoreState]:
        """The summed cross-entropy in nats of the targets (IGNORE: not counted), and the final state.

        after: give the state after so many of the T steps in place of the final one.
        """
        if after is None or after == len(ids):
            hidden, state = self._hidden(ids, state, None, reset)
            return self.writer.loss(hidden, targets), state
        state = self.begin(batch=ids.shape[1]) if state is None else state
        run = self.core(self.reader(ids), state, reset=reset, all_states=True)
        loss = self.writer.loss(self._drop(run.outputs), targets)
        return loss, map_state(lambda t: t[after - 1], run.states) if after else state

    def _hidden(
        self, ids: Tensor, state: CoreState | None, lengths: Tensor | Sequence[int] | None, reset: Tensor | None
    ) -> tuple[Tensor, CoreState]:
        run = self.core(self.reader(ids), state, lengths=lengths, reset=reset)
        return self._drop(run.outputs), run.state

    def _drop(self, hidden: Tensor) -> Tensor:
        return dropout_steps(hidden, self.core.dropout, locked=self.core.locked, training=self.training)
