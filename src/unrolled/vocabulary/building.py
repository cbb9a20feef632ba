"""Vocabularies of a text, and of the JSON they were written to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import numpy as np

from unrolled.errors import ConfigError, DataError, StorageError, nearest
from unrolled.vocabulary import hangul
from unrolled.vocabulary.characters import CharacterVocabulary, JamoVocabulary
from unrolled.vocabulary.contract import UNITS, UNKNOWN_NAME, Vocabulary
from unrolled.vocabulary.subwords import learn_subwords, read_tokenizer
from unrolled.vocabulary.words import WORD, WordVocabulary, count_words

__all__ = ["build_vocabulary", "vocabulary_from_json"]

_Key = TypeVar("_Key", int, str)

_WORDS, _SUBWORDS = 30_000, 8_000
_SMALLEST_SIZE = {"char": 2, "jamo": 2, "word": 2, "subword": 257}


def build_vocabulary(
    unit: str, chunks: Iterable[str], *, max_size: int | None = None, min_count: int = 1
) -> Vocabulary:
    """The vocabulary of a text that is read once, chunk by chunk. The same text gives the same vocabulary.

    Args:
        unit: one of `UNITS`.
        chunks: the text in pieces. For characters and jamo they may end anywhere, for words and subwords they
            should end where `last_border` is, else a word is counted as two.
        max_size: the most units, `<unk>` among them; the rarest are left out. None: no limit for characters and
            jamo, 30 000 words, 8 000 subwords.
        min_count: units that occur less often are left out (for subwords: pairs are not merged).

    Raises:
        ConfigError: an unknown unit, or a limit that leaves no room.
        DataError: no text, or no unit that occurs often enough.
    """
    if unit not in UNITS:
        raise ConfigError(f"unknown unit '{unit}': {nearest(unit, UNITS)}")
    if min_count < 1:
        raise ConfigError(f"min_count: expected 1 or more, got {min_count}")
    if max_size is not None and max_size < _SMALLEST_SIZE[unit]:
        bytes_too = " and the 256 bytes" if unit == "subword" else " and one more unit"
        raise ConfigError(
            f"max_size: expected {_SMALLEST_SIZE[unit]} or more (room for {UNKNOWN_NAME}{bytes_too}), got {max_size}"
        )
    if unit == "subword":
        return learn_subwords(chunks, max_size or _SUBWORDS, min_count)
    if unit == "word":
        words = count_words(chunks)
        _expect_units(bool(words), max(words.values(), default=0), min_count)
        frequent = sorted((word for word in words if words[word] >= min_count), key=lambda word: (-words[word], word))
        return WordVocabulary(frequent[: (max_size or _WORDS) - 1])
    counts = hangul.count_numbers(unit, chunks)
    _expect_units(bool(counts.any()), int(counts.max()), min_count)
    numbers = np.flatnonzero(counts >= min_count)
    if max_size is not None:
        numbers = np.sort(numbers[np.lexsort((numbers, -counts[numbers]))][: max_size - 1])
    return CharacterVocabulary(numbers) if unit == "char" else JamoVocabulary(numbers)


def _expect_units(any_text: bool, most: int, min_count: int) -> None:
    if not any_text:
        raise DataError("the text is empty: a vocabulary needs at least one character")
    if most < min_count:
        raise DataError(f"no unit occurs {min_count} times (the most frequent: {most}): lower min_count")


def vocabulary_from_json(obj: object) -> Vocabulary:
    """The vocabulary that `Vocabulary.to_json` wrote.

    Raises:
        StorageError: the values are none that `to_json` writes; the message says what is wrong.
    """
    if not isinstance(obj, Mapping) or obj.get("unit") not in UNITS:
        unit = obj.get("unit") if isinstance(obj, Mapping) else obj
        raise StorageError(f"vocabulary: expected a unit ({', '.join(UNITS)}), got {unit!r}")
    unit = obj["unit"]
    try:
        if unit == "subword":
            return read_tokenizer(obj.get("tokenizer"))
        units = obj.get("units")
        if not isinstance(units, list) or not units:
            raise DataError("expected a list of units")
        if unit == "word":
            return WordVocabulary(_distinct(units, _expect_word))
        if unit == "char":
            return CharacterVocabulary(np.array(_distinct(units, _expect_character), np.int64))
        return JamoVocabulary(np.array(_distinct(units, hangul.number_of), np.int64))
    except DataError as error:
        raise StorageError(f"vocabulary of unit '{unit}': {error}") from None


def _distinct(units: list[object], read: Callable[[object], _Key]) -> list[_Key]:
    keys = [read(unit) for unit in units]
    if len(set(keys)) < len(keys):
        raise DataError(f"{Counter(units).most_common(1)[0][0]!r} stands there twice")
    return keys


def _expect_word(unit: object) -> str:
    if isinstance(unit, str) and WORD.fullmatch(unit):
        return unit
    raise DataError(f"{unit!r} is no word: expected one word or line end, with the space before it")


def _expect_character(unit: object) -> int:
    if isinstance(unit, str) and len(unit) == 1:
        return ord(unit)
    raise DataError(f"{unit!r} is no character")
