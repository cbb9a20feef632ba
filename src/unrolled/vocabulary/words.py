"""Words, and borders: where text may be cut without changing how its words and subwords are encoded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from unrolled.vocabulary.contract import UNKNOWN_NAME, UNKNOWN_TEXT, Decoder, UnitDecoder, Vocabulary

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["SURROGATE", "WORD", "WordVocabulary", "count_words", "last_border", "pieces"]

Array: TypeAlias = npt.NDArray[Any]

_PIECE = 1 << 18  # characters in work at once

# An optional space goes with the word or line end behind it, so that joining units gives the text back, and
# texts with one space before each word and line end (as PTB and WikiText have them) keep their known word counts.
WORD = re.compile(r" ?\n| ?\S+|\s")
SURROGATE = re.compile("[\ud800-\udfff]")
_BORDER = re.compile(r"(?<=\S)(?= )|(?<=\n)")


def last_border(text: str) -> int:
    """The last place where `text` may be cut so that no word or subword changes, whatever follows the text.

    That is behind a line end, or between a word and a space; 0 where there is none.

    >>> last_border("to be or no")
    8
    """
    line = text.rfind("\n") + 1
    space = text.rfind(" ", line)
    while space > line and text[space - 1].isspace():
        space = text.rfind(" ", line, space)
    return max(line, space)


def pieces(text: str, size: int) -> Iterator[str]:
    """Cut `text` at borders into pieces of about `size` characters."""
    start = 0
    while start < len(text):
        border = _BORDER.search(text, start + size) if len(text) - start > size else None
        end = border.start() if border else len(text)
        yield text[start:end]
        start = end


class _WordIds(dict[str, int]):
    """Words to ids; what is no key is `<unk>`, without a Python call for those that are."""

    def __missing__(self, word: str) -> int:
        return Vocabulary.unknown


class WordVocabulary(Vocabulary):
    """Words as spaces and line ends part them, the most frequent first.

    A unit is a run of characters that are no white space, or a line end, with the one space before it if there is
    one (" the", "the", " \\n"), or any other single white space; joined they are the text. Punctuation stays with
    its word, so tokenised text (PTB, WikiText) suits it best; for other text see subwords.
    """

    unit = "word"

    def __init__(self, words: Sequence[str]) -> None:
        self._words = [UNKNOWN_TEXT, *words]
        self._ids = _WordIds({word: index for index, word in enumerate(words, 1)})
        self.sizes = np.array([len(word) for word in self._words], np.int64)

    def __len__(self) -> int:
        return len(self._words)

    def encode(self, text: str) -> Array:
        parts = [self._encode_piece(piece) for piece in pieces(text, _PIECE)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def _encode_piece(self, text: str) -> Array:
        words = WORD.findall(text)
        return np.fromiter(map(self._ids.__getitem__, words), self.dtype, count=len(words))

    def unit_sizes(self, text: str) -> Array:
        return np.fromiter((len(word) for piece in pieces(text, _PIECE) for word in WORD.findall(piece)), np.int64)

    def border(self, text: str) -> int:
        return last_border(text)

    def decode(self, ids: Iterable[int] | Array) -> str:
        return "".join(map(self._words.__getitem__, self._check(ids).tolist()))

    def decoder(self) -> Decoder:
        return UnitDecoder(self, self._words)

    def name(self, id: int) -> str:
        return self._words[id] if self._check_one(id) else UNKNOWN_NAME

    def missing(self, text: str) -> list[str]:
        words = (word for piece in pieces(text, _PIECE) for word in WORD.findall(piece))
        return list(dict.fromkeys(word for word in words if word not in self._ids))

    def to_json(self) -> dict[str, Any]:
        return {"unit": self.unit, "units": self._words[1:]}


def count_words(chunks: Iterable[str]) -> Counter[str]:
    """How often each word occurs; words with a lone surrogate are left out."""
    words = Counter[str]()
    for chunk in chunks:
        for piece in pieces(chunk, _PIECE):
            words.update(WORD.findall(piece))
    # JSON would join two surrogates to one character, and no UTF-8 text holds any.
    for word in [word for word in words if SURROGATE.search(word)]:
        del words[word]
    return words
