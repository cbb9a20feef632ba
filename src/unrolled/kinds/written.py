"""Text as output, written word by word: by a decoder of its own after a sequence was read, or by the core that read one
step (an image, a vector).

A written symbol is one of the vocabulary's V; the end of the sentence is symbol V, and the start, which is only ever
read, symbol V + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unrolled import native
from unrolled.attention import Attention, Memory
from unrolled.cells import Lookup, map_state
from unrolled.errors import DataError
from unrolled.kinds.contract import Answer, Arrays, Loss, Output, Run, Score, Steps, Targets, Writer, pad, register
from unrolled.kinds.scores import TextScore
from unrolled.kinds.text import IGNORE
from unrolled.nn import Core, CoreState, dropout_steps
from unrolled.vocabulary import Vocabulary, build_vocabulary, vocabulary_from_json

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from unrolled.config import Config

__all__ = ["Bridge", "CaptionState", "DecoderState", "EncoderDecoder", "OneToMany", "Written"]

Array: TypeAlias = npt.NDArray[Any]


@register
class Written(Output):
    """Text that is written. A raw value is a text, or a list of texts that are all right; the first is learnt."""

    kind: ClassVar[str] = "text"
    best = ("perplexity", "min")

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    @property
    def end(self) -> int:
        """The symbol that ends a sentence."""
        return len(self.vocabulary)

    @property
    def start(self) -> int:
        """The symbol that is read first."""
        return len(self.vocabulary) + 1

    @classmethod
    def learn(cls, values: Iterable[Any], config: Config) -> Written:
        settings, read = config.output, config.input
        unit = settings.unit or ("char" if read.kind != "text" else "word" if read.unit == "word+char" else read.unit)

        texts = (_first(value) for value in values)
        return cls(build_vocabulary(unit, texts, max_size=settings.max_vocabulary, min_count=settings.min_count))

    def encode(self, value: str | Sequence[str]) -> Arrays:
        text = _first(value)
        if not text.strip():
            raise DataError("the text to be written is empty: expected at least one character")
        return (self.vocabulary.encode(text),)

    def collate(self, rows: Sequence[tuple[Array, ...]]) -> Targets:
        """One tensor, int64 [U B]: the symbols and the end; IGNORE after it."""
        ids = [np.append(row[0].astype(np.int64), self.end) for row in rows]
        lengths = torch.tensor([len(row) for row in ids])
        padded = pad(ids)
        return Targets((padded.masked_fill(torch.arange(len(padded))[:, None] >= lengths, IGNORE),), lengths)

    def writer(self, config: Config, reader: Any, core: Core) -> Writer:
        one = config.input.kind == "vector" or (config.input.kind == "image" and not config.input.rows)
        return (OneToMany if one else EncoderDecoder)(config, reader, core, len(self.vocabulary))

    def text(self, ids: Iterable[int]) -> str:
        """The text of written symbols, without the end."""
        return self.vocabulary.decode([i for i in ids if i < self.end])

    def answer(self, raw: Any) -> Answer:
        """raw: written symbols."""
        text = self.text(raw)
        return Answer(text, text)

    def score(self, config: Config) -> Score:
        return TextScore()

    def to_json(self) -> dict[str, Any]:
        return {"vocabulary": self.vocabulary.to_json()}

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> Written:
        return cls(vocabulary_from_json(obj["vocabulary"]))


def _first(value: str | Sequence[str]) -> str:
    return value if isinstance(value, str) else value[0] if len(value) else ""


class _Symbols(Writer):
    """What both writers of text share: the table of symbols that are read, scores and loss of those written."""

    def __init__(self, config: Config, symbols: int, embedding: int, joined: int) -> None:
        super().__init__()
        settings = config.output
        self.symbols, self.smoothing, self.backend = symbols, settings.label_smoothing, config.training.backend
        self.drop_input = config.input.dropout
        self.table = nn.Parameter(torch.randn(symbols + 2, embedding))
        self.weight = nn.Parameter(torch.empty(symbols + 1, joined).uniform_(-(joined**-0.5), joined**-0.5))
        self.bias = nn.Parameter(torch.zeros(symbols + 1))

    def begin(self, read: Callable[[], Any], run: Run, steps: Steps) -> Any:
        """The state before the first word."""
        raise NotImplementedError

    def step(self, core: Core, ids: Int[Tensor, "B"], state: Any) -> tuple[Float[Tensor, "B V+1"], Any]:
        """Read the last word of each row (`start` at first): scores of the next, and the state after."""
        raise NotImplementedError

    def answer(self, read: Callable[[], Any], run: Run, steps: Steps) -> list[Any]:
        raise NotImplementedError("text is searched for: see unrolled.decoding")

    def _native(self) -> bool:
        return self.backend in ("auto", "native") and native.unsuited(self.weight) is None

    def output(self, joined: Float[Tensor, "*steps J"]) -> Float[Tensor, "*steps V+1"]:
        """W [h; c] + b."""
        return (native.linear if self._native() else F.linear)(joined, self.weight, self.bias)

    def cross_entropy(self, joined: Float[Tensor, "M J"], targets: Int[Tensor, "M"]) -> Tensor:
        """The summed cross-entropy, with the share `smoothing` of the target's probability spread over all V + 1
        symbols (Szegedy et al. 2016).

        -sum_v q_v log p_v with q = (1 - s) target + s / (V + 1) is the plain cross-entropy + s (y_target - mean of y):
        scores are linear in their weights, so that the mean is one more row of the matrix, and the scores of all
        symbols are never in memory.
        """
        if self._native():
            total = native.cross_entropy(joined, self.weight, self.bias, targets)
        else:
            scores = F.linear(joined, self.weight, self.bias)
            total = F.cross_entropy(
                scores if scores.dtype == torch.float64 else scores.float(), targets, reduction="sum"
            )
        if self.training and self.smoothing:
            weight = F.embedding(targets, self.weight) - self.weight.mean(0)
            bias = self.bias[targets] - self.bias.mean()
            total = total + self.smoothing * ((joined.to(weight.dtype) * weight).sum() + bias.sum())
        return total

    def _words(self, ids: Int[Tensor, "*steps"]) -> Any:
        """The steps for symbols; in training with `input.dropout`."""
        if not self.training or not self.drop_input:
            return Lookup(ids, self.table)
        return dropout_steps(F.embedding(ids, self.table), self.drop_input, locked=False, training=True)


class DecoderState(NamedTuple):
    """A decoder between two words. memory: what attention looks at, if it does; attention `[B S]`: where it looked for
    the last word; context `[B M]`: what it saw there."""

    cells: CoreState
    memory: Memory | None
    attention: Float[Tensor, "B S"] | None
    context: Float[Tensor, "B M"] | None

    def select(self, rows: Tensor) -> DecoderState:
        """The rows with these numbers."""
        chosen = [None if part is None else part[rows] for part in (self.attention, self.context)]
        memory = None if self.memory is None else self.memory.select(rows)
        return DecoderState(self.cells.select(rows), memory, *chosen)


class EncoderDecoder(_Symbols):
    """A second core, with weights of its own, writes what the first has read.

        h_0 = the encoder's last state (through a `Bridge` where sizes differ)
        h_u = cell(word u - 1, h_{u-1}),  c_u = attention(h_u, the encoder's states),  y_u = W [h_u; c_u] + b

    Sources: Sutskever et al. 2014; attention after the cell and joined at the output layer: Luong et al. 2015, with
    their attentional vector left out. Since what attention sees is not read by the cell, the decoder is one unrolled
    call over all target steps, and attention one product.

    With `output.input_feeding` the cell reads c_{u-1} too, so that steps wait for each other.
    """

    def __init__(self, config: Config, reader: Any, core: Core, symbols: int) -> None:
        settings = config.output
        size = config.core.hidden
        seen = 0 if settings.attention == "none" else core.output_size
        project = settings.attention in ("dot", "strongest") and seen != size
        seen = size if project else seen
        super().__init__(config, symbols, settings.embedding, size + seen)
        self.sampling, self.feeding, self.seen = settings.scheduled_sampling, settings.input_feeding and seen > 0, seen
        self.core = Core(
            config.core.cell,
            settings.embedding + (seen if self.feeding else 0),
            size,
            config.core.layers,
            dropout=config.core.dropout,
            locked=config.core.locked,
            recurrent_dropout=config.core.recurrent_dropout,
            init=config.core.init,
            forget_bias=config.core.forget_bias,
            chrono=config.core.chrono,
            backend=config.training.backend,
            tape_budget=config.training.tape_budget,
        )
        self.bridge = Bridge(core, self.core)
        # A dot product takes vectors of one size.
        self.memory = nn.Linear(core.output_size, size, bias=False) if project else None
        self.attention = Attention(settings.attention, size, seen) if seen else None

    def _encode(self, read: Callable[[], Any], run: Run, steps: Steps) -> tuple[CoreState, Memory | None]:
        encoded = run(read(), lengths=steps.lengths, outputs=self.attention is not None)
        cells = self.bridge(encoded.state)
        if self.attention is None:
            return cells, None
        states = encoded.outputs if self.memory is None else self.memory(encoded.outputs)
        return cells, self.attention.remember(states, steps.lengths)

    def scores(self, read: Callable[[], Any], run: Run, steps: Steps, targets: Targets | None) -> Tensor:
        assert targets is not None
        cells, memory = self._encode(read, run, steps)
        return self.output(self._unroll(self._forced(targets), cells, memory, targets.lengths, run))

    def _forced(self, targets: Targets) -> Int[Tensor, "U B"]:
        """What the decoder reads: the start, then each target but the last."""
        wanted = targets.tensors[0]
        return torch.cat([torch.full_like(wanted[:1], self.symbols + 1), wanted[:-1].clamp(min=0)])

    def loss(self, read: Callable[[], Any], run: Run, steps: Steps, targets: Targets) -> Loss:
        cells, memory = self._encode(read, run, steps)
        wanted, forced = targets.tensors[0], self._forced(targets)
        if self.training and self.sampling:
            forced = self._mix(forced, cells, memory, run)
        joined = self._unroll(forced, cells, memory, targets.lengths, run)
        real = wanted != IGNORE
        return Loss(self.cross_entropy(joined[real], wanted[real]), int(targets.lengths.sum()))

    def _unroll(
        self, ids: Int[Tensor, "U B"], cells: CoreState, memory: Memory | None, lengths: Any, run: Run
    ) -> Float[Tensor, "U B J"]:
        """The decoder over symbols that are given: [h_u; c_u] of all steps."""
        if self.feeding:
            return self._step_through(ids, cells, memory, run)
        hidden = run.drop(self.core(self._words(ids), cells, lengths=lengths).outputs)
        if self.attention is None or memory is None:
            return hidden
        context, _ = self.attention(hidden, memory)
        return torch.cat([hidden, context], dim=-1)

    def _step_through(
        self, ids: Int[Tensor, "U B"], cells: CoreState, memory: Memory | None, run: Run
    ) -> Float[Tensor, "U B J"]:
        context = self.table.new_zeros(ids.shape[1], self.seen)
        joined = []
        assert self.attention is not None and memory is not None
        for words in ids:
            x = self._words(words[None])
            x = torch.cat([x.vectors() if isinstance(x, Lookup) else x, context[None]], dim=-1)
            unrolled = self.core(x, cells)
            cells, hidden = unrolled.state, run.drop(unrolled.outputs)[0]
            context, _ = self.attention(hidden, memory)
            joined.append(torch.cat([hidden, context], dim=-1))
        return torch.stack(joined)

    @torch.no_grad()
    def _mix(self, forced: Int[Tensor, "U B"], cells: CoreState, memory: Memory | None, run: Run) -> Tensor:
        """Some of the given words replaced by what the model itself would write there, having read the given ones: a
        first pass over all steps tells, so that the second is one call too (Mihaylova and Martins 2019)."""
        detached = map_state(lambda t: t.detach(), cells)
        joined = self._unroll(forced, detached, memory, None, run)
        written = self.output(joined[:-1]).argmax(-1)
        own = torch.rand(written.shape, device=written.device) < self.sampling
        return torch.cat([forced[:1], torch.where(own, written, forced[1:])])

    def begin(self, read: Callable[[], Any], run: Run, steps: Steps) -> DecoderState:
        cells, memory = self._encode(read, run, steps)
        batch = len(steps.lengths)
        context = self.table.new_zeros(batch, self.seen) if self.feeding else None
        looked = None if memory is None else self.table.new_zeros(batch, memory.states.shape[0])
        return DecoderState(cells, memory, looked, context)

    def step(
        self, core: Core, ids: Int[Tensor, "B"], state: DecoderState
    ) -> tuple[Float[Tensor, "B V+1"], DecoderState]:
        x: Any = Lookup(ids, self.table)
        if self.feeding:
            assert state.context is not None
            x = torch.cat([x.vectors(), state.context], dim=-1)
        hidden, cells = self.core.step(x, state.cells)
        if self.attention is None or state.memory is None:
            return self.output(hidden), state._replace(cells=cells)
        context, weights = self.attention(hidden, state.memory)
        scores = self.output(torch.cat([hidden, context], dim=-1))
        return scores, DecoderState(cells, state.memory, weights, context if self.feeding else None)


class Bridge(nn.Module):
    """The encoder's last state as the decoder's first.

    Where both are of one shape it is passed as it is. Else a decoder's layer takes what the encoder's layer of the same
    height (its highest, if it has fewer) has, of both directions, through a matrix: h through tanh too, whose range h
    has.
    """

    def __init__(self, encoder: Core, decoder: Core) -> None:
        super().__init__()
        self.directions, self.depth, self.layers = encoder.directions, len(encoder.layers), len(decoder.layers)
        same = (self.directions, self.depth, encoder.hidden_size) == (1, self.layers, decoder.hidden_size)
        self.maps: nn.ModuleList | None = None
        if not same:
            fields = len(encoder.initial_state(1).cells[0])
            self.maps = nn.ModuleList(
                nn.ModuleList(nn.Linear(encoder.output_size, decoder.hidden_size) for _ in range(fields))
                for _ in range(self.layers)
            )

    def forward(self, state: CoreState) -> CoreState:
        """The decoder's first state, rows as before."""
        if self.maps is None:
            return state
        cells = []
        for k, maps in enumerate(self.maps):
            assert isinstance(maps, nn.ModuleList)
            low = min(k, self.depth - 1) * self.directions
            parts = state.cells[low : low + self.directions]
            fields = [torch.cat(field, dim=-1) for field in zip(*parts, strict=True)]
            made = [m(field) for m, field in zip(maps, fields, strict=True)]
            cells.append(type(parts[0])(torch.tanh(made[0]), *made[1:]))
        return CoreState(tuple(cells))


class CaptionState(NamedTuple):
    """The core between two words; first `[B I]`: the vector that is its first step."""

    cells: CoreState
    first: Float[Tensor, "B I"]

    def select(self, rows: Tensor) -> CaptionState:
        """The rows with these numbers."""
        return CaptionState(self.cells.select(rows), self.first[rows])


_ENLARGED = 4.0
"""How many times its state a core that read one step is read by the output layer; see `OneToMany`."""


class OneToMany(_Symbols):
    """The core that read one step writes on: x_1 is the input, later ones are its own last word, or zeros.

    h_1 = cell(x_1, 0),  y_u = W (4 h_u) + b,  h_{u+1} = cell(table[word u] or 0, h_u)

    The first word, which is the hardest, is told from one step out of rest, of which gates let through a part: the
    root mean square of h_1 in an untrained GRU of 256 or 512 units is 0.24 or 0.18, in an LSTM 0.12 or 0.09, of inputs
    of deviation 1. Adam moves a weight as far whatever it multiplies, so that with h_1 itself scores grow slowly: after
    ten epochs of 853 emoji as two artists draw them, 27 % of a third one's were told right, and with 4 h_1 36 %.
    """

    def __init__(self, config: Config, reader: Any, core: Core, symbols: int) -> None:
        super().__init__(config, symbols, reader.step_size, core.output_size)
        self.zeros = config.output.feed == "zeros"

    def scores(self, read: Callable[[], Any], run: Run, steps: Steps, targets: Targets | None) -> Tensor:
        assert targets is not None
        return self.output(self._enlarged(read, run, targets))

    def _enlarged(self, read: Callable[[], Any], run: Run, targets: Targets) -> Float[Tensor, "U B H"]:
        words = self._next(self._words(targets.tensors[0][:-1].clamp(min=0)))
        first = read()
        hidden: Tensor = run(torch.cat([first, words.to(first.dtype)]), lengths=targets.lengths).outputs
        return _ENLARGED * hidden

    def loss(self, read: Callable[[], Any], run: Run, steps: Steps, targets: Targets) -> Loss:
        wanted = targets.tensors[0]
        enlarged = self._enlarged(read, run, targets)
        real = wanted != IGNORE
        return Loss(self.cross_entropy(enlarged[real], wanted[real]), int(targets.lengths.sum()))

    def _next(self, words: Any) -> Tensor:
        vectors: Tensor = words.vectors() if isinstance(words, Lookup) else words
        return torch.zeros_like(vectors) if self.zeros else vectors

    def begin(self, read: Callable[[], Any], run: Run, steps: Steps) -> CaptionState:
        first = read()[0]
        return CaptionState(run.core.initial_state(len(first)), first)

    def step(
        self, core: Core, ids: Int[Tensor, "B"], state: CaptionState
    ) -> tuple[Float[Tensor, "B V+1"], CaptionState]:
        words = self._next(Lookup(ids, self.table))
        x = torch.where((ids == self.symbols + 1)[:, None], state.first, words.to(state.first.dtype))
        hidden, cells = core.step(x, state.cells)
        return self.output(_ENLARGED * hidden), CaptionState(cells, state.first)
