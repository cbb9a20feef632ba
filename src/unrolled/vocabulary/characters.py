"""Vocabularies of characters and of jamo: units that are numbers, looked up in a table."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from unrolled.vocabulary import hangul
from unrolled.vocabulary.contract import UNKNOWN_NAME, UNKNOWN_TEXT, Decoder, UnitDecoder, Vocabulary

__all__ = ["CharacterVocabulary", "JamoVocabulary"]

Array: TypeAlias = npt.NDArray[Any]


class _CodeVocabulary(Vocabulary):
    """Units that are numbers: code points, and behind them the parts of syllables."""

    _range: ClassVar[int]

    def __init__(self, numbers: Array) -> None:
        # Row 0 stands for <unk>, for decoding.
        self._numbers = np.concatenate([[ord(UNKNOWN_TEXT)], numbers]).astype(np.int64)
        self._table = np.zeros(self._range, self.dtype)
        self._table[numbers] = np.arange(1, len(self), dtype=self.dtype)
        self.sizes = (self._numbers < hangul.V).astype(np.int64)

    def __len__(self) -> int:
        return len(self._numbers)

    def _numbers_in(self, codes: Array) -> Array:
        """Code points [N] to numbers [M]."""
        return codes

    def encode(self, text: str) -> Array:
        if len(text) <= hangul.BLOCK:
            return self._table[self._numbers_in(hangul.codes_of(text))]
        return np.concatenate([self._table[self._numbers_in(block)] for block in hangul.blocks(text)])

    def missing(self, text: str) -> list[str]:
        lacking: dict[str, None] = {}
        for block in hangul.blocks(text):
            numbers = self._numbers_in(block)
            found = numbers[self._table[numbers] == self.unknown]
            lacking.update(dict.fromkeys(self._show(number) for number in found.tolist()))
        return list(lacking)

    def name(self, id: int) -> str:
        return self._show(int(self._numbers[id])) if self._check_one(id) else UNKNOWN_NAME

    @staticmethod
    def _show(number: int) -> str:
        return hangul.COMPATIBILITY[number - hangul.L] if number >= hangul.L else chr(number)

    def to_json(self) -> dict[str, Any]:
        return {"unit": self.unit, "units": [self._write(number) for number in self._numbers[1:].tolist()]}

    @staticmethod
    @abstractmethod
    def _write(number: int) -> str: ...


class CharacterVocabulary(_CodeVocabulary):
    """Code points, sorted. Built by `build_vocabulary` or `vocabulary_from_json`."""

    unit = "char"
    _range = hangul.CODE_POINTS

    def decode(self, ids: Iterable[int] | Array) -> str:
        return hangul.text_of(self._numbers[self._check(ids)])

    def decoder(self) -> Decoder:
        return UnitDecoder(self, [chr(code) for code in self._numbers.tolist()])

    @staticmethod
    def _write(number: int) -> str:
        return chr(number)


class JamoVocabulary(_CodeVocabulary):
    """Code points, then parts of Hangul syllables, sorted. Built by `build_vocabulary` or `vocabulary_from_json`.

    A Hangul syllable, U+AC00 to U+D7A3, is two or three units: leading consonant, vowel, and final consonant if it
    has one. Every other character is one, conjoining and compatibility jamo (ㅋㅋㅋ) too, so that no text is lost:
    a part of a syllable and a jamo that stands alone in the text are different units.
    """

    unit = "jamo"
    _range = hangul.NUMBERS

    def _numbers_in(self, codes: Array) -> Array:
        return hangul.split(codes)

    def unit_sizes(self, text: str) -> Array:
        return np.concatenate(
            [np.empty(0, bool), *(hangul.split(block) < hangul.V for block in hangul.blocks(text))]
        ).astype(np.int64)

    def decode(self, ids: Iterable[int] | Array) -> str:
        return hangul.text_of(hangul.join(self._numbers[self._check(ids)]))

    def decoder(self) -> Decoder:
        return _JamoDecoder(self)

    @staticmethod
    def _write(number: int) -> str:
        return hangul.unit_of(number)


class _JamoDecoder(Decoder):
    """Holds back an open syllable: a lead, which a vowel may join, or a pair, which a final may join."""

    def __init__(self, vocabulary: JamoVocabulary) -> None:
        self._vocabulary = vocabulary
        self._numbers: list[int] = vocabulary._numbers.tolist()
        self._held: tuple[int, ...] = ()

    def feed(self, id: int) -> str:
        index = self._vocabulary._check_one(id)
        number = self._numbers[index]
        if hangul.V <= number < hangul.T and len(self._held) == 1:
            self._held = (*self._held, index)
            return ""
        if number >= hangul.T and len(self._held) == 2:
            return chr(ord(self.finish()) + number - hangul.T + 1)
        text = self.finish()
        if hangul.L <= number < hangul.V:
            self._held = (index,)
            return text
        return text + self._vocabulary._show(number)

    def finish(self) -> str:
        held = [self._numbers[index] for index in self._held]
        self._held = ()
        if len(held) < 2:
            return "".join(map(self._vocabulary._show, held))
        return chr(hangul.SYLLABLES + (held[0] - hangul.L) * hangul.PER_LEAD + (held[1] - hangul.V) * hangul.PER_VOWEL)

    @property
    def held(self) -> tuple[int, ...]:
        return self._held
