"""Text as input: how it is cut into symbols, and the readers that make steps of vectors of them; and the next symbol as
output, a language model's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unrolled import native
from unrolled.cells import Lookup
from unrolled.errors import ConfigError, DataError, ModelError
from unrolled.kinds.contract import Answer, Arrays, Input, Output, Score, Steps, count, pad, register
from unrolled.nn import Core
from unrolled.vocabulary import WORD, Vocabulary, build_vocabulary, vocabulary_from_json

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from unrolled.config import Config

__all__ = ["IGNORE", "NextSymbol", "NextWriter", "Text", "TextReader", "WordReader"]

Array: TypeAlias = npt.NDArray[Any]

IGNORE = -100
"""A target that is not counted: the step has nothing to predict (torch's own default in cross_entropy)."""


@register
class Text(Input):
    """Text, or words that are given as a list.

    Where the output has one entry a word (`aligned`), a text is its words between white space, a space before each of
    them, and the steps at which they end are told; white space within a word that is given is read as `_`.

    Args:
        vocabulary: text <-> ids.
        characters: that of a word's characters, where a step reads both (unit word+char).
    """

    kind: ClassVar[str] = "text"

    def __init__(self, vocabulary: Vocabulary, characters: Vocabulary | None = None, *, aligned: bool = False) -> None:
        self.vocabulary, self.characters, self.aligned = vocabulary, characters, aligned

    @classmethod
    def learn(cls, values: Iterable[Any], config: Config) -> Text:
        settings, aligned = config.input, config.output.kind in ("labels", "numbers")

        def texts() -> Iterator[str]:
            for value in values:
                yield "".join(_words(value)) if aligned or not isinstance(value, str) else value

        if settings.unit != "word+char":
            vocabulary = build_vocabulary(
                settings.unit, texts(), max_size=settings.max_vocabulary, min_count=settings.min_count
            )
            return cls(vocabulary, aligned=aligned)
        kept = list(texts())  # read twice
        words = build_vocabulary("word", kept, max_size=settings.max_vocabulary, min_count=settings.min_count)
        return cls(words, build_vocabulary("char", kept), aligned=aligned)

    def words(self, value: str | Sequence[str]) -> list[str]:
        """The words that an aligned output has an entry for."""
        return [word.strip() for word in _words(value)]

    def pieces(self, value: str | Sequence[str]) -> list[str]:
        """What each step of `value` reads, as text: what stands there, also where the vocabulary lacks it."""
        text = "".join(_words(value)) if self.aligned or not isinstance(value, str) else value
        if self.vocabulary.unit == "word":
            return WORD.findall(text)
        return [self.vocabulary.name(i) for i in self.vocabulary.encode(text).tolist()]

    def load_vectors(self, reader: TextReader | WordReader, path: str | Path) -> str:
        """Set the rows of the reader's table to pretrained vectors, where a word has one; what was found, for people.

        The file is word2vec's or fastText's text format: a word and its numbers a line, perhaps a first line with how
        many words and numbers there are. Words are looked up as they are written and, failing that, in lower case. The
        vectors are scaled so that their numbers spread as those of the table's other rows do.

        Raises:
            ConfigError: the input is one-hot, or the table's rows have another size than the vectors.
            DataError: the file cannot be read.
        """
        if reader.table is None:
            raise ConfigError("input.vectors: one-hot input has no vectors to set: set input.embedding to their size")
        size = reader.table.shape[1]
        rows: dict[str, list[int]] = {}
        for number in range(1, len(self.vocabulary)):
            name = self.vocabulary.name(number).strip()
            for key in {name, name.lower()}:
                rows.setdefault(key, []).append(number)
        found: dict[int, tuple[bool, Array]] = {}
        for word, numbers in _vectors(Path(path), size):
            for number in rows.get(word, ()):
                exact = self.vocabulary.name(number).strip() == word
                if number not in found or exact:
                    found[number] = exact, numbers
        if found:
            order = sorted(found)
            vectors = np.stack([found[number][1] for number in order])
            with torch.no_grad():
                reader.table[torch.tensor(order)] = torch.from_numpy(vectors / (vectors.std() or 1.0))
        return f"{path}: vectors for {len(found):,} of {len(self.vocabulary) - 1:,} symbols"

    def encode(self, value: str | Sequence[str]) -> Arrays:
        """ids [T]; of aligned text also where words end [W]; of word+char, ids [W], characters [C], how many in each
        word [W]."""
        if self.characters is not None:
            words = _words(value) if self.aligned or not isinstance(value, str) else WORD.findall(value)
            _expect_text(words)
            spelt = [self.characters.encode(word.removeprefix(" ")) for word in words]
            ids = np.concatenate([self.vocabulary.encode(word) for word in words])
            return ids, np.concatenate(spelt), np.array([len(word) for word in spelt], np.int64)
        if not self.aligned:
            text = value if isinstance(value, str) else "".join(_words(value))
            _expect_text(text)
            return (self.vocabulary.encode(text),)
        words = _words(value)
        _expect_text(words)
        parts = [self.vocabulary.encode(word) for word in words]
        return np.concatenate(parts), np.cumsum([len(part) for part in parts]) - 1

    def collate(self, rows: Sequence[tuple[Array, ...]]) -> Steps:
        lengths = count([row[0] for row in rows])
        ids = pad([row[0] for row in rows])
        if self.characters is not None:
            return Steps((ids, *_spell(rows, ids.shape[0])), lengths)
        if self.aligned:
            return Steps((ids,), lengths, pad([row[1] for row in rows]), count([row[1] for row in rows]))
        return Steps((ids,), lengths)

    def reader(self, config: Config) -> nn.Module:
        settings = config.input
        if self.characters is None:
            return TextReader(len(self.vocabulary), settings.embedding, drop=settings.word_dropout)
        return WordReader(
            len(self.vocabulary),
            settings.embedding or 1,
            len(self.characters),
            settings.characters,
            drop=settings.word_dropout,
            backend=config.training.backend,
        )

    def to_json(self) -> dict[str, Any]:
        told: dict[str, Any] = {"vocabulary": self.vocabulary.to_json()}
        if self.characters is not None:
            told["characters"] = self.characters.to_json()
        return {**told, "aligned": self.aligned}

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> Text:
        characters = obj.get("characters")
        return cls(
            vocabulary_from_json(obj["vocabulary"]),
            None if characters is None else vocabulary_from_json(characters),
            aligned=bool(obj["aligned"]),
        )


def _vectors(path: Path, size: int) -> Iterator[tuple[str, Array]]:
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                word, *cells = line.rstrip("\n").rstrip(" ").split(" ")
                if number == 1 and len(cells) == 1:
                    continue  # how many, and how long
                if len(cells) != size:
                    raise ConfigError(
                        f"input.vectors: {path}, line {number} has {len(cells)} numbers, the embedding {size}: set "
                        f"input.embedding={len(cells)}"
                    )
                try:
                    yield word, np.array(cells, np.float32)
                except ValueError:
                    raise DataError(f"{path}, line {number}: expected a word and {size} numbers") from None
    except OSError as error:
        raise DataError(f"{path}: cannot read this file: {error.strerror}") from error


_SPACE = re.compile(r"\s")


def _words(value: str | Sequence[str]) -> list[str]:
    """Words, a space before each, so that one is the same unit wherever it stands."""
    if isinstance(value, str):
        return [f" {word}" for word in value.split()]
    return [f" {_SPACE.sub('_', word)}" for word in value]


def _expect_text(text: str | Sequence[str]) -> None:
    if not text or (isinstance(text, str) and text.isspace()):
        raise DataError("the text is empty: expected at least one character that is not white space")


def _spell(rows: Sequence[tuple[Array, ...]], steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """The different words of a batch: which one each step is, int64 [T B], their characters [C N], lengths [N]."""
    known: dict[bytes, int] = {}
    spelt: list[Array] = []
    which = np.zeros((steps, len(rows)), np.int64)
    for b, (_, characters, counts) in enumerate(rows):
        ends = np.cumsum(counts)
        for t, end in enumerate(ends.tolist()):
            word = characters[end - counts[t] : end]
            number = known.setdefault(word.tobytes(), len(spelt))
            if number == len(spelt):
                spelt.append(word)
            which[t, b] = number
    return torch.from_numpy(which), pad(spelt), count(spelt)


class TextReader(nn.Module):
    """Symbols -> steps of vectors.

    A symbol enters one-hot, as in the lecture notes, or as a row of a learned embedding `table` [V E]. The two
    differ in width only: an embedding is the product of the one-hot vector with that matrix. Neither product is
    computed (see `unrolled.cells.Lookup`).

    Args:
        symbols: V, the size of the vocabulary.
        embedding: E, or None for one-hot.
        drop: share of symbols that are read as `<unk>` while training, so that it comes to mean something.
    """

    def __init__(self, symbols: int, embedding: int | None, *, drop: float = 0.0) -> None:
        super().__init__()
        self.symbols, self.drop = symbols, drop
        self.table = None if embedding is None else nn.Parameter(torch.randn(symbols, embedding))

    @property
    def step_size(self) -> int:
        """I: the length of one step's vector, V if one-hot."""
        return self.symbols if self.table is None else self.table.shape[1]

    def forward(self, ids: Int[Tensor, "*steps"]) -> Lookup:
        """The steps for these symbols, ids int64 `[T B]` or `[B]`."""
        return Lookup(_forget(ids, self.drop, self.training), self.table)


class WordReader(nn.Module):
    """Words -> steps of vectors: a row of a learned table joined with what a small recurrent reader makes of the word's
    characters, its last states in both directions (Ling et al. 2015; Plank et al. 2016).

    Each different word of a batch is read once, however often it occurs.

    Args:
        words, embedding: V and E of the table; characters, hidden: how many there are, and H of their reader.
        drop: see `TextReader`.
    """

    def __init__(
        self, words: int, embedding: int, characters: int, hidden: int, *, drop: float = 0.0, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(words, embedding))
        self.letters = nn.Parameter(torch.randn(characters, max(hidden // 2, 1)))
        self.core = Core("lstm", self.letters.shape[1], hidden, bidirectional=True, backend=backend)
        self.drop = drop

    @property
    def step_size(self) -> int:
        """I: E + 2H."""
        return self.table.shape[1] + 2 * self.core.hidden_size

    def forward(
        self,
        ids: Int[Tensor, "T B"],
        which: Int[Tensor, "T B"],
        characters: Int[Tensor, "C N"],
        lengths: Int[Tensor, "N"],
    ) -> Float[Tensor, "T B I"]:
        """The steps for word ids, and the characters of the batch's N different words, `which` of them each step is."""
        state = self.core(Lookup(characters, self.letters), lengths=lengths, outputs=False).state
        spelt = torch.cat([cell.h for cell in state.cells], dim=-1)
        words = F.embedding(_forget(ids, self.drop, self.training), self.table)
        return torch.cat([words, spelt[which].to(words.dtype)], dim=-1)


def _forget(ids: Tensor, share: float, training: bool) -> Tensor:
    if not training or share == 0:
        return ids
    return torch.where(torch.rand(ids.shape, device=ids.device) < share, Vocabulary.unknown, ids)


@register
class NextSymbol(Output):
    """The symbol that follows, at each step: a language model's output. It is trained on running text, not on examples;
    there is nothing to learn about it beside the text's own vocabulary."""

    kind: ClassVar[str] = "next-symbol"
    aligned: ClassVar[bool] = True
    best = ("nats_per_char", "min")

    @classmethod
    def learn(cls, values: Iterable[Any], config: Config) -> NextSymbol:
        return cls()

    def encode(self, value: Any) -> Arrays:
        return ()

    def writer(self, config: Config, reader: TextReader, core: Core) -> NextWriter:
        if config.output.tied and reader.table is None:
            raise ConfigError(
                f"output.tied: one-hot input has no embedding to share: set input.embedding={core.output_size}"
            )
        return NextWriter(
            core.output_size,
            reader.symbols,
            reader.table if config.output.tied else None,
            backend=config.training.backend,
        )

    def answer(self, raw: Any) -> Answer:
        return Answer(raw, str(raw))

    def score(self, config: Config) -> Score:
        raise ModelError("a language model is measured on running text: see unrolled.evaluation.evaluate")

    def to_json(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> NextSymbol:
        return cls()


class NextWriter(nn.Module):
    """Hidden states -> scores of the next symbol: y_t = W_hy h_t + b, softmax, cross-entropy.

    Args:
        hidden: size of a hidden state vector.
        symbols: V.
        tied: an embedding table [V H] whose rows serve as W_hy too (Press and Wolf 2017), or None.
        backend: "auto" and "native" use the native kernels where they can: a row's scores are then the same bits in any
            batch, and the scores of a whole window are never in memory.

    Raises:
        ConfigError: the tied table's rows are not `hidden` long.
    """

    def __init__(self, hidden: int, symbols: int, tied: nn.Parameter | None = None, *, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend
        if tied is not None and tied.shape[1] != hidden:
            raise ConfigError(
                f"output.tied: embedding and hidden size must be equal to share a matrix, got {tied.shape[1]} and "
                f"{hidden}: set input.embedding={hidden}"
            )
        self.weight = tied if tied is not None else nn.Parameter(torch.empty(symbols, hidden))
        self.bias = nn.Parameter(torch.zeros(symbols))
        bound = hidden**-0.5
        # A tied table starts small: its rows are scored against states within (-1, 1).
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, hidden: Float[Tensor, "*steps H"]) -> Float[Tensor, "*steps V"]:
        """Scores (logits) of every symbol to come next."""
        if self._native():
            return native.linear(hidden, self.weight, self.bias)
        return F.linear(hidden, self.weight, self.bias)

    def _native(self) -> bool:
        return self.backend in ("auto", "native") and native.unsuited(self.weight) is None

    def loss(self, hidden: Float[Tensor, "T B H"], targets: Int[Tensor, "T B"]) -> Float[Tensor, ""]:
        """The summed cross-entropy in nats over all steps whose target is not IGNORE."""
        if self._native():
            return native.cross_entropy(hidden.flatten(0, 1), self.weight, self.bias, targets.flatten())
        scores = self(hidden).flatten(0, 1)
        if scores.dtype != torch.float64:
            scores = scores.float()  # bfloat16 under autocast is too coarse for a logarithm
        return F.cross_entropy(scores, targets.flatten(), ignore_index=IGNORE, reduction="sum")
