"""Model = input kind + recurrent core + output kind; the form of the lecture notes follows from the two ends."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unrolled import fused, native
from unrolled.cells import Lookup, map_state
from unrolled.config import Config
from unrolled.errors import ConfigError, ModelError
from unrolled.kinds.contract import Answer, Ends, Loss, Steps, Targets
from unrolled.kinds.text import NextSymbol, NextWriter, Text, TextReader
from unrolled.nn import Core, CoreState, dropout_steps
from unrolled.unroll import Unrolled
from unrolled.vocabulary import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float, Int

__all__ = ["ExampleModel", "Form", "LanguageModel", "Model", "build_model", "form_of"]


@dataclass(frozen=True)
class Form:
    """One of the five forms of the lecture notes, as it follows from what goes in and what comes out."""

    input: str
    output: str
    name: str
    example: str

    def __str__(self) -> str:
        return f"{self.input} -> {self.output}: {self.name} ({self.example})"


_IN = {"text": "many", "video": "many", "series": "many", "image": "one", "vector": "one"}
_ALIGNED = ("labels", "numbers")


def form_of(config: Config) -> Form:
    """The form that follows from the two ends.

    Raises:
        ConfigError: no form has these ends.
    """
    given, asked = config.input, config.output
    many = _IN[given.kind] == "many" or (given.kind == "image" and given.rows)
    what = {"text": "text", "image": "an image", "video": "a video", "series": "a series", "vector": "a vector"}
    if asked.kind == "next":
        if given.kind not in ("text", "series"):
            raise ConfigError(f"output.kind: {what[given.kind]} has nothing that comes next: expected text or series")
        example = "language model" if given.kind == "text" else "forecasting"
        return Form(given.kind, "next", "many-to-many, aligned, autoregressive", example)
    if asked.kind in _ALIGNED:
        if not many:
            raise ConfigError(
                f"output.kind: {what[given.kind]} is one step, and {asked.kind} are one a step: expected "
                f"{asked.kind.removesuffix('s')}"
            )
        delay = "both directions" if config.core.bidirectional else "no delay"
        example = {"text": "tagging", "video": "frame-level video"}.get(given.kind, "a label per step")
        return Form(given.kind, asked.kind, f"many-to-many, aligned, {delay}", example)
    if asked.kind == "text":
        if not many:
            return Form(given.kind, "text", "one-to-many", "captioning")
        how = "without attention" if asked.attention == "none" else f"with {asked.attention} attention"
        example = "translation, chatbot" if given.kind == "text" else "description"
        return Form(given.kind, "text", f"many-to-many, encoder-decoder {how}", example)
    examples = {"text": "sentiment", "video": "activity", "image": "picture classification"}
    example = "regression" if asked.kind == "number" else examples.get(given.kind, "classification")
    return Form(given.kind, asked.kind, "many-to-one" if many else "one-to-one", example)


class _Run:
    """See `unrolled.kinds.contract.Run`."""

    def __init__(self, core: Core) -> None:
        self.core = core

    def __call__(self, x: Any, state: Any = None, *, lengths: Any = None, outputs: bool = True) -> Unrolled:
        run: Unrolled = self.core(x, state, lengths=lengths, outputs=outputs)
        return run._replace(outputs=self.drop(run.outputs)) if outputs else run

    def drop(self, hidden: Tensor) -> Tensor:
        core = self.core
        steps = hidden if hidden.dim() == 3 else hidden[None]
        return dropout_steps(steps, core.dropout, locked=core.locked, training=core.training).view_as(hidden)


class Model(nn.Module):
    """Input kind + recurrent core + output kind. What the two ends are decides the form, and which subclass it is.

    Args:
        config: the resolved settings (`unrolled.config.resolve`).
        ends: what was learnt from the training data about both ends.

    Raises:
        ConfigError: an unknown cell, ends that no form has, or settings that do not fit together.
    """

    def __init__(self, config: Config, ends: Ends) -> None:
        super().__init__()
        core = config.core
        self.config, self.ends = config, ends
        self.form = form_of(config)
        self.reader = ends.input.reader(config)
        self.core = Core(
            core.cell,
            self.reader.step_size,  # type: ignore[arg-type]
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
        self.writer = ends.output.writer(config, self.reader, self.core)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def _repr_html_(self) -> str:
        # Plain HTML of its own: a model stands below all that draws. `unrolled.inspect` shows what happens in it.
        core = self.config.core
        rows = {
            "form": str(self.form),
            "core": f"{core.cell}, hidden size {core.hidden:,}, layers {core.layers}"
            + (", both directions" if core.bidirectional else ""),
            "weights": f"{sum(p.numel() for p in self.parameters()):,}",
        }
        cells = "".join(
            f"<tr><th style='text-align:left'>{name}</th><td style='text-align:left'>{html.escape(value)}</td></tr>"
            for name, value in rows.items()
        )
        return f"<div><b>{type(self).__name__}</b><table>{cells}</table></div>"


class ExampleModel(Model):
    """A model that is trained on examples, each an input and its output."""

    writer: Any

    def loss(self, steps: Steps, targets: Targets) -> Loss:
        """The summed loss of a batch of examples, and how many targets it is of."""
        loss: Loss = self.writer.loss(lambda: self._read(steps), _Run(self.core), steps, targets)
        return loss

    def scores(self, steps: Steps, targets: Targets | None = None) -> Tensor:
        """What comes out at each step, before anything is chosen, `[U B V]`; U = 1 where there is one for all. Of text
        that is written, `targets` are the words that are read on the way."""
        scores: Tensor = self.writer.scores(lambda: self._read(steps), _Run(self.core), steps, targets)
        return scores

    def answer(self, steps: Steps) -> list[Answer]:
        """What the model says about each input of a batch; not for text, which is searched for."""
        raw = self.writer.answer(lambda: self._read(steps), _Run(self.core), steps)
        return [self.ends.output.answer(row) for row in raw]

    def begin(self, steps: Steps | None = None, *, batch: int = 1) -> Any:
        """The state before the first step.

        Of a model that writes text: once the inputs `steps` are read, before the first word is written. Of one whose
        outputs are aligned: before anything is read, for `batch` rows.

        Raises:
            ModelError: the model gives one answer to all of its input and has no steps to stream.
        """
        if self.ends.output.aligned:
            return self.writer.first(self.core, batch)
        if steps is None or not hasattr(self.writer, "begin"):
            raise ModelError(f"{self.form}: there is one answer to the whole input, so that nothing can be streamed")
        return self.writer.begin(lambda: self._read(steps), _Run(self.core), steps)

    def _read(self, steps: Steps) -> Any:
        x, share = self.reader(*steps.tensors), self.config.input.dropout
        if not self.training or not share:
            return x
        vectors = x.vectors() if isinstance(x, Lookup) else x
        return dropout_steps(vectors, share, locked=False, training=True)

    def step(self, x: Int[Tensor, "B"] | Steps, state: Any) -> tuple[Float[Tensor, "B V"], Any]:
        """One step of each row: what comes out, and the state after.

        Of a model that writes text, x is the last word and out come the scores of the next one. Of one whose outputs
        are aligned, x is one step of input, `Steps` with T = 1, and its output comes at once, with no delay.

        Raises:
            ModelError: the core reads both directions.
        """
        if isinstance(x, Steps):
            read = self.reader(*x.tensors)
            step: Any = Lookup(read.ids[0], read.table) if isinstance(read, Lookup) else read[0]
        else:
            step = x
        scores, state = self.writer.step(self.core, step, state)
        return scores, state


def build_model(config: Config, ends: Ends) -> Model:
    """The model that these settings and ends make."""
    if isinstance(ends.output, NextSymbol) and isinstance(ends.input, Text):
        return LanguageModel(config, ends.input.vocabulary)
    return ExampleModel(config, ends)


class LanguageModel(Model):
    """Text -> next: a model of running text, whose state is carried from window to window.

    Streams through the same two methods as a cell, one floor up: `begin` gives a state, `step` a symbol's scores
    and the next state.

    Args:
        config: the resolved settings (`unrolled.config.resolve`).
        vocabulary: text <-> ids.

    Raises:
        ConfigError: an unknown cell, or settings that do not fit together.
    """

    reader: TextReader
    writer: NextWriter

    def __init__(self, config: Config, vocabulary: Vocabulary) -> None:
        super().__init__(config, Ends(Text(vocabulary), NextSymbol()))
        self.vocabulary = vocabulary

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
        loss = self.writer.loss(_Run(self.core).drop(run.outputs), targets)
        return loss, map_state(lambda t: t[after - 1], run.states) if after else state

    def _hidden(
        self, ids: Tensor, state: CoreState | None, lengths: Tensor | Sequence[int] | None, reset: Tensor | None
    ) -> tuple[Tensor, CoreState]:
        run = self.core(self.reader(ids), state, lengths=lengths, reset=reset)
        return _Run(self.core).drop(run.outputs), run.state
