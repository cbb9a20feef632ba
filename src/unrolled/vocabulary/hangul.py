"""Text as numbers: code points, and Hangul syllables as their parts (jamo).

The arithmetic of Hangul syllables is that of the Unicode Standard, chapter 3.12, "Conjoining Jamo Behavior": the
syllable of leading consonant l, vowel v and final consonant t (0: none) is U+AC00 + (l * 21 + v) * 28 + t.

A part is a private number behind the last code point (L, V, T below), so that it never collides with a character of
the text: conjoining jamo of NFD text and compatibility jamo keep themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from unrolled.errors import DataError

__all__ = [
    "BLOCK",
    "CODE_POINTS",
    "COMPATIBILITY",
    "NUMBERS",
    "PER_LEAD",
    "PER_VOWEL",
    "SYLLABLES",
    "L",
    "T",
    "V",
    "blocks",
    "codes_of",
    "compose",
    "count_numbers",
    "decompose",
    "join",
    "number_of",
    "split",
    "text_of",
    "unit_of",
]

Array: TypeAlias = npt.NDArray[Any]

CODE_POINTS = 0x110000
BLOCK = 1 << 18  # characters in work at once: whole texts are never held as 32-bit code points

SYLLABLES, _LEADS, _VOWELS, _FINALS = 0xAC00, 19, 21, 27
PER_VOWEL = _FINALS + 1  # a syllable without a final consonant comes before its 27 with one
PER_LEAD = _VOWELS * PER_VOWEL
_SYLLABLE_COUNT = _LEADS * PER_LEAD
L = CODE_POINTS
V = L + _LEADS
T = V + _VOWELS
NUMBERS = T + _FINALS
_RAW = "\u034f"  # COMBINING GRAPHEME JOINER, before a conjoining jamo that stands as such in the text

_CONJOINING = [
    *range(0x1100, 0x1100 + _LEADS),
    *range(0x1161, 0x1161 + _VOWELS),
    *range(0x11A8, 0x11A8 + _FINALS),
]
COMPATIBILITY = (
    "ㄱㄲㄴㄷㄸㄹㅁㅂㅃㅅㅆㅇㅈㅉㅊㅋㅌㅍㅎ"
    "ㅏㅐㅑㅒㅓㅔㅕㅖㅗㅘㅙㅚㅛㅜㅝㅞㅟㅠㅡㅢㅣ"
    "ㄱㄲㄳㄴㄵㄶㄷㄹㄺㄻㄼㄽㄾㄿㅀㅁㅂㅄㅅㅆㅇㅈㅊㅋㅌㅍㅎ"
)
_PART_CODES = np.array([ord(letter) for letter in COMPATIBILITY], np.int64)
_PART_OF = {chr(code): L + index for index, code in enumerate(_CONJOINING)}


def codes_of(text: str) -> Array:
    """The code points of `text`, uint32 [N]; lone surrogates keep themselves."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def text_of(codes: Array) -> str:
    """The text of code points [N]; the inverse of `codes_of`."""
    return codes.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")


def blocks(text: str) -> Iterator[Array]:
    """The code points of `text`, a block at a time."""
    for start in range(0, len(text), BLOCK):
        yield codes_of(text[start : start + BLOCK])


def split(codes: Array) -> Array:
    """Code points [N] to numbers [M], M >= N: syllables become their parts."""
    index = codes - np.uint32(SYLLABLES)  # wraps below the syllables, so that one comparison finds them
    syllable = index < _SYLLABLE_COUNT
    if not syllable.any():
        return codes
    final = index % PER_VOWEL
    rows = np.empty((len(codes), 3), np.uint32)
    rows[:, 0] = np.where(syllable, L + index // PER_LEAD, codes)
    rows[:, 1] = V + index % PER_LEAD // PER_VOWEL
    rows[:, 2] = T + final - np.uint32(1)
    keep = np.empty((len(codes), 3), bool)
    keep[:, 0] = True
    keep[:, 1] = syllable
    keep[:, 2] = syllable & (final > 0)
    return rows[keep]


def join(numbers: Array) -> Array:
    """Numbers [M] to code points [N]: the inverse of `split`; parts that form no syllable become letters.

    A vowel joins the lead right before it and a final the pair right before it, and nothing else joins.
    """
    numbers = numbers.astype(np.int64)
    codes = numbers.copy()
    part = numbers >= L
    codes[part] = _PART_CODES[numbers[part] - L]
    lead = (numbers >= L) & (numbers < V)
    vowel = (numbers >= V) & (numbers < T)
    pairs = np.flatnonzero(lead[:-1] & vowel[1:])
    codes[pairs] = SYLLABLES + (numbers[pairs] - L) * PER_LEAD + (numbers[pairs + 1] - V) * PER_VOWEL
    triples = pairs[pairs + 2 < len(numbers)]
    triples = triples[numbers[triples + 2] >= T]
    codes[triples] += numbers[triples + 2] - T + 1
    keep = np.ones(len(numbers), bool)
    keep[pairs + 1] = False
    keep[triples + 2] = False
    return codes[keep]


def unit_of(number: int) -> str:
    """The string that names a number, in JSON and in `decompose`."""
    if number >= L:
        return chr(_CONJOINING[number - L])
    return _RAW + chr(number) if chr(number) in _PART_OF else chr(number)


def number_of(unit: object) -> int:
    """The number that a string names.

    Raises:
        DataError: the string names none.
    """
    if isinstance(unit, str):
        if unit in _PART_OF:
            return _PART_OF[unit]
        if len(unit) == 1:
            return ord(unit)
        if len(unit) == 2 and unit[0] == _RAW and unit[1] in _PART_OF:
            return ord(unit[1])
    raise DataError(
        f"{unit!r} is no jamo unit: expected one character, or U+034F and the conjoining jamo that the text holds"
    )


def decompose(text: str) -> list[str]:
    """Cut `text` into jamo units, each a string.

    A Hangul syllable becomes two or three conjoining jamo, every other character stays. A conjoining jamo that
    stands as such in the text (NFD text) is marked by U+034F before it, so that the text can be had back:
    `compose(decompose(text)) == text` for every string. Source: the Unicode Standard, chapter 3.12.

    >>> [f"{ord(unit):x}" for unit in decompose("한a")]
    ['1112', '1161', '11ab', '61']
    """
    return [unit_of(number) for block in blocks(text) for number in split(block).tolist()]


def compose(units: Iterable[str]) -> str:
    """Join jamo units, as `decompose` gives them, to text; parts that form no syllable become letters (ㅎ).

    Raises:
        DataError: a string that is no unit.
    """
    return text_of(join(np.array([number_of(unit) for unit in units], np.int64)))


def _together(chunks: Iterable[str]) -> Iterator[str]:
    """The chunks, small ones joined: a count has as many entries as the highest code point, however short the text."""
    held: list[str] = []
    size = 0
    for chunk in chunks:
        held.append(chunk)
        size += len(chunk)
        if size >= BLOCK:
            yield "".join(held)
            held, size = [], 0
    yield "".join(held)


def count_numbers(unit: str, chunks: Iterable[str]) -> Array:
    """How often each number occurs, int64 [NUMBERS]."""
    counts = np.zeros(NUMBERS, np.int64)
    for chunk in _together(chunks):
        for block in blocks(chunk):
            found = np.bincount(block)
            counts[: len(found)] += found
    if unit == "jamo":
        syllables = counts[SYLLABLES : SYLLABLES + _SYLLABLE_COUNT]
        cube = syllables.reshape(_LEADS, _VOWELS, PER_VOWEL)
        counts[L:V] = cube.sum((1, 2))
        counts[V:T] = cube.sum((0, 2))
        counts[T:] = cube.sum((0, 1))[1:]
        syllables[:] = 0
    return counts
