"""Text to ids and back, in four units: characters, jamo, words and subwords.

    unit      one unit is                                   decode(encode(text)) == text
    char      a code point                                  but for units the vocabulary lacks
    jamo      a code point; a Hangul syllable is 2 or 3     but for units the vocabulary lacks
    word      a word or line end with the space before it   but for units the vocabulary lacks (lone surrogates too)
    subword   a run of UTF-8 bytes, joined by byte-pair     for every text that UTF-8 can hold
              encoding (tokenizers)                         (a lone surrogate is unknown)

Id 0 is always `<unk>`, the unit that stands for all that a vocabulary lacks; as text it is written U+FFFD.

Both directions also work as a stream, on text or ids that come in any chunks: `Vocabulary.encoder` and
`Vocabulary.decoder` hold back what is not decided yet (a word that may go on, an open syllable, a split UTF-8
character), and what they hold is a value, `held`, from which a new one can be brought to the same state.

The arithmetic of Hangul syllables is that of the Unicode Standard, chapter 3.12, "Conjoining Jamo Behavior": the
syllable of leading consonant l, vowel v and final consonant t (0: none) is U+AC00 + (l * 21 + v) * 28 + t.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from unrolled.errors import ConfigError, DataError, ShapeError, StorageError, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers import Tokenizer

__all__ = [
    "UNITS",
    "CharacterVocabulary",
    "Decoder",
    "Encoder",
    "JamoVocabulary",
    "SubwordVocabulary",
    "Vocabulary",
    "WordVocabulary",
    "build_vocabulary",
    "compose",
    "decompose",
    "last_border",
    "vocabulary_from_json",
]

UNITS = ("char", "jamo", "word", "subword")
"""The units that text can be cut into."""

Array: TypeAlias = npt.NDArray[Any]
_Key = TypeVar("_Key", int, str)

_UNKNOWN_NAME = "<unk>"
_UNKNOWN_TEXT = "\ufffd"
_CODE_POINTS = 0x110000
_BLOCK = 1 << 18  # characters in work at once: whole texts are never held as 32-bit code points


# Borders: where text may be cut without changing how its words and subwords are encoded.

# An optional space goes with the word or line end behind it, so that joining units gives the text back, and
# texts with one space before each word and line end (as PTB and WikiText have them) keep their known word counts.
_WORD = re.compile(r" ?\n| ?\S+|\s")
_SURROGATE = re.compile("[\ud800-\udfff]")
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


def _pieces(text: str, size: int) -> Iterator[str]:
    """Cut `text` at borders into pieces of about `size` characters."""
    start = 0
    while start < len(text):
        border = _BORDER.search(text, start + size) if len(text) - start > size else None
        end = border.start() if border else len(text)
        yield text[start:end]
        start = end


# Code points and jamo. A part of a syllable is a private number behind the last code point (L, V, T below), so that
# it never collides with a character of the text: conjoining jamo of NFD text and compatibility jamo keep themselves.

_SYLLABLES, _LEADS, _VOWELS, _FINALS = 0xAC00, 19, 21, 27
_PER_VOWEL = _FINALS + 1  # a syllable without a final consonant comes before its 27 with one
_PER_LEAD = _VOWELS * _PER_VOWEL
_SYLLABLE_COUNT = _LEADS * _PER_LEAD
_L = _CODE_POINTS
_V = _L + _LEADS
_T = _V + _VOWELS
_NUMBERS = _T + _FINALS
_RAW = "\u034f"  # COMBINING GRAPHEME JOINER, before a conjoining jamo that stands as such in the text

_CONJOINING = [
    *range(0x1100, 0x1100 + _LEADS),
    *range(0x1161, 0x1161 + _VOWELS),
    *range(0x11A8, 0x11A8 + _FINALS),
]
_COMPATIBILITY = (
    "ㄱㄲㄴㄷㄸㄹㅁㅂㅃㅅㅆㅇㅈㅉㅊㅋㅌㅍㅎ"
    "ㅏㅐㅑㅒㅓㅔㅕㅖㅗㅘㅙㅚㅛㅜㅝㅞㅟㅠㅡㅢㅣ"
    "ㄱㄲㄳㄴㄵㄶㄷㄹㄺㄻㄼㄽㄾㄿㅀㅁㅂㅄㅅㅆㅇㅈㅊㅋㅌㅍㅎ"
)
_PART_CODES = np.array([ord(letter) for letter in _COMPATIBILITY], np.int64)
_PART_OF = {chr(code): _L + index for index, code in enumerate(_CONJOINING)}


def _codes(text: str) -> Array:
    """The code points of `text`, uint32 [N]; lone surrogates keep themselves."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _text(codes: Array) -> str:
    return codes.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")


def _blocks(text: str) -> Iterator[Array]:
    """The code points of `text`, a block at a time."""
    for start in range(0, len(text), _BLOCK):
        yield _codes(text[start : start + _BLOCK])


def _split(codes: Array) -> Array:
    """Code points [N] to numbers [M], M >= N: syllables become their parts."""
    index = codes - np.uint32(_SYLLABLES)  # wraps below the syllables, so that one comparison finds them
    syllable = index < _SYLLABLE_COUNT
    if not syllable.any():
        return codes
    final = index % _PER_VOWEL
    rows = np.empty((len(codes), 3), np.uint32)
    rows[:, 0] = np.where(syllable, _L + index // _PER_LEAD, codes)
    rows[:, 1] = _V + index % _PER_LEAD // _PER_VOWEL
    rows[:, 2] = _T + final - np.uint32(1)
    keep = np.empty((len(codes), 3), bool)
    keep[:, 0] = True
    keep[:, 1] = syllable
    keep[:, 2] = syllable & (final > 0)
    return rows[keep]


def _join(numbers: Array) -> Array:
    """Numbers [M] to code points [N]: the inverse of `_split`; parts that form no syllable become letters.

    A vowel joins the lead right before it and a final the pair right before it, and nothing else joins.
    """
    numbers = numbers.astype(np.int64)
    codes = numbers.copy()
    part = numbers >= _L
    codes[part] = _PART_CODES[numbers[part] - _L]
    lead = (numbers >= _L) & (numbers < _V)
    vowel = (numbers >= _V) & (numbers < _T)
    pairs = np.flatnonzero(lead[:-1] & vowel[1:])
    codes[pairs] = _SYLLABLES + (numbers[pairs] - _L) * _PER_LEAD + (numbers[pairs + 1] - _V) * _PER_VOWEL
    triples = pairs[pairs + 2 < len(numbers)]
    triples = triples[numbers[triples + 2] >= _T]
    codes[triples] += numbers[triples + 2] - _T + 1
    keep = np.ones(len(numbers), bool)
    keep[pairs + 1] = False
    keep[triples + 2] = False
    return codes[keep]


def _unit_of(number: int) -> str:
    """The string that names a number, in JSON and in `decompose`."""
    if number >= _L:
        return chr(_CONJOINING[number - _L])
    return _RAW + chr(number) if chr(number) in _PART_OF else chr(number)


def _number_of(unit: object) -> int:
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
    return [_unit_of(number) for block in _blocks(text) for number in _split(block).tolist()]


def compose(units: Iterable[str]) -> str:
    """Join jamo units, as `decompose` gives them, to text; parts that form no syllable become letters (ㅎ).

    Raises:
        DataError: a string that is no unit.
    """
    return _text(_join(np.array([_number_of(unit) for unit in units], np.int64)))


# What all vocabularies do.


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


class _UnitDecoder(Decoder):
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


# Characters and jamo.


class _CodeVocabulary(Vocabulary):
    """Units that are numbers: code points, and behind them the parts of syllables."""

    _range: ClassVar[int]

    def __init__(self, numbers: Array) -> None:
        # Row 0 stands for <unk>, for decoding.
        self._numbers = np.concatenate([[ord(_UNKNOWN_TEXT)], numbers]).astype(np.int64)
        self._table = np.zeros(self._range, self.dtype)
        self._table[numbers] = np.arange(1, len(self), dtype=self.dtype)
        self.sizes = (self._numbers < _V).astype(np.int64)

    def __len__(self) -> int:
        return len(self._numbers)

    def _numbers_in(self, codes: Array) -> Array:
        """Code points [N] to numbers [M]."""
        return codes

    def encode(self, text: str) -> Array:
        if len(text) <= _BLOCK:
            return self._table[self._numbers_in(_codes(text))]
        return np.concatenate([self._table[self._numbers_in(block)] for block in _blocks(text)])

    def missing(self, text: str) -> list[str]:
        lacking: dict[str, None] = {}
        for block in _blocks(text):
            numbers = self._numbers_in(block)
            found = numbers[self._table[numbers] == self.unknown]
            lacking.update(dict.fromkeys(self._show(number) for number in found.tolist()))
        return list(lacking)

    def name(self, id: int) -> str:
        return self._show(int(self._numbers[id])) if self._check_one(id) else _UNKNOWN_NAME

    @staticmethod
    def _show(number: int) -> str:
        return _COMPATIBILITY[number - _L] if number >= _L else chr(number)

    def to_json(self) -> dict[str, Any]:
        return {"unit": self.unit, "units": [self._write(number) for number in self._numbers[1:].tolist()]}

    @staticmethod
    @abstractmethod
    def _write(number: int) -> str: ...


class CharacterVocabulary(_CodeVocabulary):
    """Code points, sorted. Built by `build_vocabulary` or `vocabulary_from_json`."""

    unit = "char"
    _range = _CODE_POINTS

    def decode(self, ids: Iterable[int] | Array) -> str:
        return _text(self._numbers[self._check(ids)])

    def decoder(self) -> Decoder:
        return _UnitDecoder(self, [chr(code) for code in self._numbers.tolist()])

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
    _range = _NUMBERS

    def _numbers_in(self, codes: Array) -> Array:
        return _split(codes)

    def unit_sizes(self, text: str) -> Array:
        return np.concatenate([np.empty(0, bool), *(_split(block) < _V for block in _blocks(text))]).astype(np.int64)

    def decode(self, ids: Iterable[int] | Array) -> str:
        return _text(_join(self._numbers[self._check(ids)]))

    def decoder(self) -> Decoder:
        return _JamoDecoder(self)

    @staticmethod
    def _write(number: int) -> str:
        return _unit_of(number)


class _JamoDecoder(Decoder):
    """Holds back an open syllable: a lead, which a vowel may join, or a pair, which a final may join."""

    def __init__(self, vocabulary: JamoVocabulary) -> None:
        self._vocabulary = vocabulary
        self._numbers: list[int] = vocabulary._numbers.tolist()
        self._held: tuple[int, ...] = ()

    def feed(self, id: int) -> str:
        index = self._vocabulary._check_one(id)
        number = self._numbers[index]
        if _V <= number < _T and len(self._held) == 1:
            self._held = (*self._held, index)
            return ""
        if number >= _T and len(self._held) == 2:
            return chr(ord(self.finish()) + number - _T + 1)
        text = self.finish()
        if _L <= number < _V:
            self._held = (index,)
            return text
        return text + self._vocabulary._show(number)

    def finish(self) -> str:
        held = [self._numbers[index] for index in self._held]
        self._held = ()
        if len(held) < 2:
            return "".join(map(self._vocabulary._show, held))
        return chr(_SYLLABLES + (held[0] - _L) * _PER_LEAD + (held[1] - _V) * _PER_VOWEL)

    @property
    def held(self) -> tuple[int, ...]:
        return self._held


# Words.


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
        self._words = [_UNKNOWN_TEXT, *words]
        self._ids = _WordIds({word: index for index, word in enumerate(words, 1)})
        self.sizes = np.array([len(word) for word in self._words], np.int64)

    def __len__(self) -> int:
        return len(self._words)

    def encode(self, text: str) -> Array:
        parts = [self._encode_piece(piece) for piece in _pieces(text, _BLOCK)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def _encode_piece(self, text: str) -> Array:
        words = _WORD.findall(text)
        return np.fromiter(map(self._ids.__getitem__, words), self.dtype, count=len(words))

    def unit_sizes(self, text: str) -> Array:
        return np.fromiter((len(word) for piece in _pieces(text, _BLOCK) for word in _WORD.findall(piece)), np.int64)

    def border(self, text: str) -> int:
        return last_border(text)

    def decode(self, ids: Iterable[int] | Array) -> str:
        return "".join(map(self._words.__getitem__, self._check(ids).tolist()))

    def decoder(self) -> Decoder:
        return _UnitDecoder(self, self._words)

    def name(self, id: int) -> str:
        return self._words[id] if self._check_one(id) else _UNKNOWN_NAME

    def missing(self, text: str) -> list[str]:
        words = (word for piece in _pieces(text, _BLOCK) for word in _WORD.findall(piece))
        return list(dict.fromkeys(word for word in words if word not in self._ids))

    def to_json(self) -> dict[str, Any]:
        return {"unit": self.unit, "units": self._words[1:]}


# Subwords.

_SUBWORD_PIECE = 1 << 12  # characters: tokenizers keeps hundreds of bytes for each subword of a piece


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in byte-level BPE. Source: GPT-2's encoder.py, `bytes_to_unicode`."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain}
    letters.update({chr(256 + index): byte for index, byte in enumerate(other)})
    return letters


def _tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """Byte-level BPE after GPT-2, but that a line end is always a unit of its own, so that lines are independent.

    It has no special tokens: those would be found in the text, and `<unk>` written there is just text.
    """
    # Without it tokenizers starts threads, and then warns, or locks up, when the process forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


class SubwordVocabulary(Vocabulary):
    """Byte-level byte-pair encoding: all 256 bytes, and what merges of frequent pairs make of them.

    Lossless for every text that UTF-8 can hold; only a lone surrogate is `<unk>`. Source: Sennrich, Haddow and Birch
    2016, "Neural Machine Translation of Rare Words with Subword Units"; Radford et al. 2019 (bytes).
    """

    unit = "subword"

    def __init__(self, vocabulary: Mapping[str, int], merges: Iterable[Sequence[str]]) -> None:
        """
        Args:
            vocabulary: subwords, a letter for each byte, to ids 0 .. V-1; id 0 is `<unk>`.
            merges: the pairs that are merged, first to last.

        Raises:
            DataError: ids with gaps, another unit 0, a byte without a unit, merges that do not fit.
        """
        names = sorted(vocabulary, key=vocabulary.__getitem__)
        if [vocabulary[name] for name in names] != list(range(len(names))) or names[:1] != [_UNKNOWN_NAME]:
            raise DataError(f"subwords must have the ids 0, 1, 2, ..., and 0 must be {_UNKNOWN_NAME}")
        letters = _byte_letters()
        lacking = [byte for letter, byte in letters.items() if letter not in vocabulary]
        if lacking:
            raise DataError(f"the subwords lack {len(lacking)} of the 256 bytes, the first of them {lacking[0]:#04x}")
        try:
            self._bytes = [_UNKNOWN_TEXT.encode(), *(bytes(letters[letter] for letter in name) for name in names[1:])]
        except KeyError as error:
            raise DataError(f"a subword holds {error.args[0]!r}, which stands for no byte") from None
        try:
            self._tokenizer = _tokenizer(dict(vocabulary), [(left, right) for left, right in merges])
        except Exception as error:  # tokenizers raises bare Exception
            raise DataError(f"the merges do not fit the subwords: {error}") from None
        # A byte 10xxxxxx continues a character, every other one begins it.
        self.sizes = np.array([sum(byte & 0xC0 != 0x80 for byte in unit) for unit in self._bytes], np.int64)

    def __len__(self) -> int:
        return len(self._bytes)

    def encode(self, text: str) -> Array:
        parts = [np.empty(0, self.dtype)]
        start = 0
        for surrogate in _SURROGATE.finditer(text):
            parts += [*self._encode_part(text[start : surrogate.start()]), np.array([self.unknown], self.dtype)]
            start = surrogate.end()
        parts += self._encode_part(text[start:] if start else text)
        return np.concatenate(parts)

    def _encode_part(self, text: str) -> list[Array]:
        found = self._tokenizer.encode_batch_fast([*_pieces(text, _SUBWORD_PIECE)], add_special_tokens=False)
        return [np.array(piece.ids, self.dtype) for piece in found]

    def border(self, text: str) -> int:
        return last_border(text)

    def decode(self, ids: Iterable[int] | Array) -> str:
        return b"".join(map(self._bytes.__getitem__, self._check(ids).tolist())).decode("utf-8", "replace")

    def decoder(self) -> Decoder:
        return _SubwordDecoder(self)

    def name(self, id: int) -> str:
        return self._bytes[id].decode("utf-8", "backslashreplace") if self._check_one(id) else _UNKNOWN_NAME

    def missing(self, text: str) -> list[str]:
        return list(dict.fromkeys(_SURROGATE.findall(text)))

    def to_json(self) -> dict[str, Any]:
        return {"unit": self.unit, "tokenizer": json.loads(self._tokenizer.to_str())}


class _SubwordDecoder(Decoder):
    """Holds back the bytes of a character whose last byte has not come yet."""

    def __init__(self, vocabulary: SubwordVocabulary) -> None:
        self._vocabulary = vocabulary
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held: tuple[int, ...] = ()

    def feed(self, id: int) -> str:
        units = self._vocabulary._bytes
        index = self._vocabulary._check_one(id)
        text = self._utf8.decode(units[index])
        # Only ids that hold the bytes of the open character are kept; UTF-8 finds its place again from any byte.
        open_bytes = len(self._utf8.getstate()[0])
        kept: tuple[int, ...] = ()
        for last in (index, *reversed(self._held)):
            if open_bytes <= 0:
                break
            kept = (last, *kept)
            open_bytes -= len(units[last])
        self._held = kept
        return text

    def finish(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        self._held = ()
        return text

    @property
    def held(self) -> tuple[int, ...]:
        return self._held


# Building and loading.

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
            f"max_size: expected {_SMALLEST_SIZE[unit]} or more (room for {_UNKNOWN_NAME}{bytes_too}), got {max_size}"
        )
    if unit == "subword":
        return _learn_subwords(chunks, max_size or _SUBWORDS, min_count)
    if unit == "word":
        words = Counter[str]()
        for chunk in chunks:
            for piece in _pieces(chunk, _BLOCK):
                words.update(_WORD.findall(piece))
        # JSON would join two surrogates to one character, and no UTF-8 text holds any.
        for word in [word for word in words if _SURROGATE.search(word)]:
            del words[word]
        _expect_units(bool(words), max(words.values(), default=0), min_count)
        frequent = sorted((word for word in words if words[word] >= min_count), key=lambda word: (-words[word], word))
        return WordVocabulary(frequent[: (max_size or _WORDS) - 1])
    counts = _count_numbers(unit, chunks)
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


def _count_numbers(unit: str, chunks: Iterable[str]) -> Array:
    """How often each number occurs, int64 [_NUMBERS]."""
    counts = np.zeros(_NUMBERS, np.int64)
    for chunk in chunks:
        for block in _blocks(chunk):
            found = np.bincount(block)
            counts[: len(found)] += found
    if unit == "jamo":
        syllables = counts[_SYLLABLES : _SYLLABLES + _SYLLABLE_COUNT]
        cube = syllables.reshape(_LEADS, _VOWELS, _PER_VOWEL)
        counts[_L:_V] = cube.sum((1, 2))
        counts[_V:_T] = cube.sum((0, 2))
        counts[_T:] = cube.sum((0, 1))[1:]
        syllables[:] = 0
    return counts


def _learn_subwords(chunks: Iterable[str], size: int, min_count: int) -> Vocabulary:
    tokenizer = _tokenizer({}, [])
    from tokenizers import pre_tokenizers, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=min_count,
        special_tokens=[_UNKNOWN_NAME],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    any_text = False

    def pieces() -> Iterator[str]:
        nonlocal any_text
        for chunk in chunks:
            any_text = any_text or bool(chunk)
            # Small pieces, because tokenizers takes 256 of them into memory at once.
            yield from _pieces(_SURROGATE.sub("", chunk), _SUBWORD_PIECE)

    tokenizer.train_from_iterator(pieces(), trainer)
    if not any_text:
        raise DataError("the text is empty: a vocabulary needs at least one character")
    model = json.loads(tokenizer.to_str())["model"]
    return SubwordVocabulary(model["vocab"], model["merges"])


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
            return _read_tokenizer(obj.get("tokenizer"))
        units = obj.get("units")
        if not isinstance(units, list) or not units:
            raise DataError("expected a list of units")
        if unit == "word":
            return WordVocabulary(_distinct(units, _expect_word))
        if unit == "char":
            return CharacterVocabulary(np.array(_distinct(units, _expect_character), np.int64))
        return JamoVocabulary(np.array(_distinct(units, _number_of), np.int64))
    except DataError as error:
        raise StorageError(f"vocabulary of unit '{unit}': {error}") from None


def _distinct(units: list[object], read: Callable[[object], _Key]) -> list[_Key]:
    keys = [read(unit) for unit in units]
    if len(set(keys)) < len(keys):
        raise DataError(f"{Counter(units).most_common(1)[0][0]!r} stands there twice")
    return keys


def _expect_word(unit: object) -> str:
    if isinstance(unit, str) and _WORD.fullmatch(unit):
        return unit
    raise DataError(f"{unit!r} is no word: expected one word or line end, with the space before it")


def _expect_character(unit: object) -> int:
    if isinstance(unit, str) and len(unit) == 1:
        return ord(unit)
    raise DataError(f"{unit!r} is no character")


def _read_tokenizer(saved: Any) -> SubwordVocabulary:
    """Of a tokenizer's JSON only the model is used: all else is always as `_tokenizer` has it."""
    model = saved.get("model") if isinstance(saved, Mapping) else None
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    merges = model.get("merges") if isinstance(model, Mapping) else None
    if not isinstance(vocabulary, Mapping) or not isinstance(merges, list) or saved.get("normalizer") is not None:
        raise DataError("expected the JSON of a byte-level BPE tokenizer without normalizer")
    if not all(type(index) is int for index in vocabulary.values()):
        raise DataError("the ids of subwords must be integers")
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in merges):
        raise DataError("merges must be pairs of subwords")
    return SubwordVocabulary(vocabulary, merges)
