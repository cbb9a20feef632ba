"""What every vocabulary does, whatever its units: text to ids and back, whole or as a stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from unrolled.errors import DataError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["UNITS", "UNKNOWN_NAME", "UNKNOWN_TEXT", "Decoder", "Encoder", "UnitDecoder", "Vocabulary"]

UNITS = ("char", "jamo", "word", "subword")
"""The units that text can be cut into."""

Array: TypeAlias = npt.NDArray[Any]

UNKNOWN_NAME = "<unk>"
UNKNOWN_TEXT = "\ufffd"


class Vocabulary(ABC):
    """Units of text, numbered: unit 0 is `<unk>`, which stands for all that the vocabulary lacks.

    Vocabularies are equal when they number the same units in the same way. V, below, is `len(vocabulary)`.
    """

    unit: ClassVar[str]
    """Which of `UNITS` this is."""

    unknown: ClassVar[int] = 0
    """The id of `<unk>`."""

    sizes: Array
    """How many characters begin in each unit, int64 [V]; 1 for `<unk>`. For jamo, a character begins at its lead;
    for subwords, at its first byte. Summed over the ids of a text that holds no `<unk>`, this counts its characters."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def encode(self, text: str) -> Array:
        """The ids of `text`, [N] of `dtype`. What the vocabulary lacks becomes `<unk>`; see `missing`."""

    @abstractmethod
    def decode(self, ids: Iterable[int] | Array) -> str:
        """The text of ids [N]; the inverse of `encode` where no id is `<unk>`, which is written U+FFFD.

        Every sequence of ids is some text: parts that form no syllable become letters (ㅎ), bytes that are no UTF-8
        become U+FFFD.

        Raises:
            ShapeError: the ids have more than one dimension, or are no integers.
            DataError: an id is none of the vocabulary's.
        """

    @abstractmethod
    def decoder(self) -> Decoder:
        """A new decoder, for ids that come one by one."""

    def encoder(self) -> Encoder:
        """A new encoder, for text that comes in pieces."""
        return Encoder(self)

    @abstractmethod
    def name(self, id: int) -> str:
        """What to show for a unit: its text, a letter (ㅎ) for a part of a syllable, `\\xec` for a byte that is no
        character by itself, `<unk>`. Control characters are given as they are.

        Raises:
            DataError: the id is none of the vocabulary's.
        """

    @abstractmethod
    def missing(self, text: str) -> list[str]:
        """The names of the units of `text` that the vocabulary lacks, each once, in order of appearance."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """The vocabulary as JSON values; `vocabulary_from_json` is the inverse.

        A unit may be a lone surrogate, which JSON can hold only as an escape (`ensure_ascii`, the default).
        """

    def unit_sizes(self, text: str) -> Array:
        """How many characters of `text` begin in each unit of `encode(text)`, int [N], right for `<unk>` too."""
        return self.sizes[self.encode(text)]

    def border(self, text: str) -> int:
        """The last place where `text` may be cut: both halves encoded by themselves give the ids of the whole,
        whatever follows the text."""
        return len(text)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest of uint8, uint16 and uint32 that holds every id."""
        return np.min_scalar_type(len(self) - 1)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Vocabulary):
            return NotImplemented
        return self is other or self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self)} units>"

    def _check(self, ids: Iterable[int] | Array) -> Array:
        array = ids if isinstance(ids, np.ndarray) else np.array([int(index) for index in ids], np.int64)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ShapeError(f"ids: expected integers [N], got {array.dtype} {list(array.shape)}")
        wrong = array[(array < 0) | (array >= len(self))]
        if len(wrong):
            raise DataError(f"id {wrong[0]} is not in the vocabulary: expected 0 to {len(self) - 1}")
        return array

    def _check_one(self, id: int) -> int:
        if not 0 <= id < len(self):
            raise DataError(f"id {id} is not in the vocabulary: expected 0 to {len(self) - 1}")
        return int(id)


class Encoder:
    """Text to ids, piece by piece: the ids of all `feed`s and of `finish` are those of the whole text.

    Characters and jamo are decided at once; a word or subword when a space or line end follows the word.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.held = ""
        """The text that is not encoded yet. A new encoder that is fed it is in this encoder's state."""

    def feed(self, text: str) -> Array:
        """Take a piece of text; the ids that are decided now, [N]."""
        text = self.held + text
        border = self._vocabulary.border(text)
        self.held = text[border:]
        return self._vocabulary.encode(text[:border])

    def finish(self) -> Array:
        """End of text: the ids of what was held back, [N]. The encoder is as new after it."""
        text, self.held = self.held, ""
        return self._vocabulary.encode(text)


class Decoder(ABC):
    """Ids to text, one by one: the text of all `feed`s and of `finish` is `decode` of all ids."""

    @abstractmethod
    def feed(self, id: int) -> str:
        """Take an id; the text that is decided now, which may be empty.

        Raises:
            DataError: the id is none of the vocabulary's.
        """

    @abstractmethod
    def finish(self) -> str:
        """End of ids: the text that was held back. The decoder is as new after it."""

    @property
    @abstractmethod
    def held(self) -> tuple[int, ...]:
        """The last ids, as far as they decide what comes next. A new decoder that is fed them, and whose answers
        are dropped, is in this decoder's state."""


class UnitDecoder(Decoder):
    """Of units that are text by themselves: nothing is held back."""

    def __init__(self, vocabulary: Vocabulary, texts: Sequence[str]) -> None:
        self._vocabulary = vocabulary
        self._texts = texts

    def feed(self, id: int) -> str:
        return self._texts[self._vocabulary._check_one(id)]

    def finish(self) -> str:
        return ""

    @property
    def held(self) -> tuple[int, ...]:
        return ()
