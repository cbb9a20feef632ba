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
"""

from __future__ import annotations

from unrolled.vocabulary.building import build_vocabulary, vocabulary_from_json
from unrolled.vocabulary.characters import CharacterVocabulary, JamoVocabulary
from unrolled.vocabulary.contract import UNITS, Decoder, Encoder, Vocabulary
from unrolled.vocabulary.hangul import compose, decompose
from unrolled.vocabulary.subwords import SubwordVocabulary
from unrolled.vocabulary.words import WORD, WordVocabulary, last_border

__all__ = [
    "UNITS",
    "WORD",
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
