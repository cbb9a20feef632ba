"""Subwords: runs of bytes, joined by byte-pair encoding."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from unrolled.errors import DataError
from unrolled.vocabulary.contract import UNKNOWN_NAME, UNKNOWN_TEXT, Decoder, Vocabulary
from unrolled.vocabulary.words import SURROGATE, last_border, pieces

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers import Tokenizer

__all__ = ["SubwordVocabulary", "learn_subwords", "read_tokenizer"]

Array: TypeAlias = npt.NDArray[Any]

_PIECE = 1 << 12  # characters: tokenizers keeps hundreds of bytes for each subword of a piece


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
        if [vocabulary[name] for name in names] != list(range(len(names))) or names[:1] != [UNKNOWN_NAME]:
            raise DataError(f"subwords must have the ids 0, 1, 2, ..., and 0 must be {UNKNOWN_NAME}")
        letters = _byte_letters()
        lacking = [byte for letter, byte in letters.items() if letter not in vocabulary]
        if lacking:
            raise DataError(f"the subwords lack {len(lacking)} of the 256 bytes, the first of them {lacking[0]:#04x}")
        try:
            self._bytes = [UNKNOWN_TEXT.encode(), *(bytes(letters[letter] for letter in name) for name in names[1:])]
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
        for surrogate in SURROGATE.finditer(text):
            parts += [*self._encode_part(text[start : surrogate.start()]), np.array([self.unknown], self.dtype)]
            start = surrogate.end()
        parts += self._encode_part(text[start:] if start else text)
        return np.concatenate(parts)

    def _encode_part(self, text: str) -> list[Array]:
        found = self._tokenizer.encode_batch_fast([*pieces(text, _PIECE)], add_special_tokens=False)
        return [np.array(piece.ids, self.dtype) for piece in found]

    def border(self, text: str) -> int:
        return last_border(text)

    def decode(self, ids: Iterable[int] | Array) -> str:
        return b"".join(map(self._bytes.__getitem__, self._check(ids).tolist())).decode("utf-8", "replace")

    def decoder(self) -> Decoder:
        return _SubwordDecoder(self)

    def name(self, id: int) -> str:
        return self._bytes[id].decode("utf-8", "backslashreplace") if self._check_one(id) else UNKNOWN_NAME

    def missing(self, text: str) -> list[str]:
        return list(dict.fromkeys(SURROGATE.findall(text)))

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


def learn_subwords(chunks: Iterable[str], size: int, min_count: int) -> Vocabulary:
    """Merge the most frequent pairs until there are `size` units, `<unk>` and the 256 bytes among them."""
    tokenizer = _tokenizer({}, [])
    from tokenizers import pre_tokenizers, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=min_count,
        special_tokens=[UNKNOWN_NAME],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    any_text = False

    def text_pieces() -> Iterator[str]:
        nonlocal any_text
        for chunk in chunks:
            any_text = any_text or bool(chunk)
            # Small pieces, because tokenizers takes 256 of them into memory at once.
            yield from pieces(SURROGATE.sub("", chunk), _PIECE)

    tokenizer.train_from_iterator(text_pieces(), trainer)
    if not any_text:
        raise DataError("the text is empty: a vocabulary needs at least one character")
    model = json.loads(tokenizer.to_str())["model"]
    return SubwordVocabulary(model["vocab"], model["merges"])


def read_tokenizer(saved: Any) -> SubwordVocabulary:
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
