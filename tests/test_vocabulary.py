"""The laws of vocabularies: nothing is lost, and a stream in any pieces is the whole."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from unrolled.errors import ConfigError, DataError, ShapeError, StorageError
from unrolled.vocabulary import (
    UNITS,
    Vocabulary,
    build_vocabulary,
    compose,
    decompose,
    hangul,
    last_border,
    vocabulary_from_json,
)

KOREAN = "나는 학교에 갑니다. 값이 싸다 ㅋㅋㅋ\n닭 한 마리가 운다!\n"
ENGLISH = "the cat sat on the mat.\nthe dog didn't, the <unk> did \n"
SAMPLE = (KOREAN + ENGLISH) * 3

SURROGATE = re.compile("[\ud800-\udfff]")

# Every code point, and more often those that decide something: syllables, jamo of all sorts, what marks them.
code_points = st.one_of(
    st.characters(),
    st.characters(min_codepoint=0xAC00, max_codepoint=0xD7A3),
    st.characters(min_codepoint=0x1100, max_codepoint=0x11FF),
    st.characters(min_codepoint=0x3131, max_codepoint=0x318E),
    st.characters(categories=["Cs"]),
    st.sampled_from("\u034f\ufffd\ufeff\uffff\U0010ffff\0 \n\r\u0085\u00a0\u2028\x1c"),
)
any_text = st.text(code_points)
utf8_text = st.text(st.one_of(code_points.filter(lambda letter: not 0xD800 <= ord(letter) <= 0xDFFF)))
spaced_text = st.text(st.sampled_from("ab한 \n\t\u00a0\u0085\u2028\u3000\u180e\x1c'!1"))


def learned(unit: str, text: str = SAMPLE) -> Vocabulary:
    return build_vocabulary(unit, [text], max_size=300 if unit == "subword" else None)


VOCABULARIES = {unit: learned(unit) for unit in UNITS}


@st.composite
def cut(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> list[str]:
    """A text in pieces."""
    text = draw(texts)
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6)))
    return [text[begin:end] for begin, end in zip([0, *places], [*places, len(text)], strict=True)]


# Jamo.


@given(any_text)
@example("\ud83d\ude00")
@example("한\u11ab\u1112\u1161\u11ab\u034f\u1100\u034f")
def test_compose_undoes_decompose_for_every_string(text: str) -> None:
    assert compose(decompose(text)) == text


def test_every_syllable_has_the_parts_that_unicode_says() -> None:
    syllables = [chr(code) for code in range(0xAC00, 0xD7A4)]
    for syllable in syllables:
        assert "".join(decompose(syllable)) == unicodedata.normalize("NFD", syllable)
    assert compose(decompose("".join(syllables))) == "".join(syllables)


def test_a_jamo_that_stands_alone_is_not_a_part() -> None:
    assert decompose("한") == ["\u1112", "\u1161", "\u11ab"]
    assert decompose("\u1112\u1161\u11ab") == ["\u034f\u1112", "\u034f\u1161", "\u034f\u11ab"]
    assert decompose("ㅋ") == ["ㅋ"]
    assert decompose("\u115f\u1160\uac00") == ["\u115f", "\u1160", "\u1100", "\u1161"]  # fillers are no parts


@pytest.mark.parametrize(
    "units, text",
    [
        (["\u1100"], "ㄱ"),
        (["\u1100", "\u1100", "\u1161"], "ㄱ가"),
        (["\u1161"], "ㅏ"),
        (["\u1100", "\u1161", "\u11a8", "\u11a8"], "각ㄱ"),
        (["\u1100", "\u1161", "\u1161"], "가ㅏ"),
        (["\u1100", "\u11a8"], "ㄱㄱ"),
        (["\u1100", "a", "\u1161"], "ㄱaㅏ"),
        (["\u1112", "\u1175", "\u11c2"], "힣"),
        (["\u11aa"], "ㄳ"),
    ],
)
def test_parts_without_a_syllable_are_letters(units: list[str], text: str) -> None:
    assert compose(units) == text


@pytest.mark.parametrize("unit", ["", "ab", "\u034fa", 7])
def test_compose_refuses_what_is_no_unit(unit: str) -> None:
    with pytest.raises(DataError, match=r"is no jamo unit: expected one character, or U\+034F and"):
        compose([unit])


# Nothing is lost.


@pytest.mark.parametrize("unit", ["char", "jamo", "word"])
@given(any_text.filter(bool))
@example("<unk>\n <unk> \n\n  x\r\ny\u00a0z ")
@example("한\ud83d\ude00\u1112\u1161\u034f\u1100ㅋ")
def test_no_text_is_lost_if_all_its_units_are_known(unit: str, text: str) -> None:
    if unit == "word":
        text = SURROGATE.sub("x", text)
    vocabulary = build_vocabulary(unit, [text], max_size=10_000)
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert ids.dtype == vocabulary.dtype
    assert (ids != vocabulary.unknown).all()
    assert vocabulary.missing(text) == []


@given(utf8_text)
@example("<unk>")
@example(" \n\n  \n a\r\n\t\0\u2028 한글 \u1112\u1161 \U0010ffff")
def test_subwords_lose_nothing_that_utf8_can_hold(text: str) -> None:
    vocabulary = VOCABULARIES["subword"]
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert vocabulary.unknown not in ids
    assert vocabulary.sizes[ids].sum() == len(text)


@pytest.mark.parametrize("text", ["<unk>\n" * 50, " <unk>" * 50, SAMPLE])
def test_unk_in_the_text_is_text(text: str) -> None:
    for unit in UNITS:
        vocabulary = learned(unit, text)
        ids = vocabulary.encode(text)
        assert vocabulary.unknown not in ids
        assert vocabulary.decode(ids) == text


def test_a_word_with_a_lone_surrogate_is_unknown() -> None:
    vocabulary = build_vocabulary("word", ["cat \ud83d\ude00\ncat"])
    assert vocabulary.to_json()["units"] == ["cat", "\n"]
    assert vocabulary.missing("cat \ud83d\ude00") == [" \ud83d\ude00"]


def test_a_lone_surrogate_is_unknown_to_subwords() -> None:
    vocabulary = VOCABULARIES["subword"]
    text = "cat\ud800 sat\udfff"
    assert vocabulary.decode(vocabulary.encode(text)) == "cat\ufffd sat\ufffd"
    assert vocabulary.missing(text + text) == ["\ud800", "\udfff"]
    assert build_vocabulary("subword", [text], max_size=257) == build_vocabulary("subword", ["cat"], max_size=257)


# Counting characters.


@pytest.mark.parametrize("unit", UNITS)
@given(any_text)
def test_units_say_how_many_characters_begin_in_them(unit: str, text: str) -> None:
    vocabulary = VOCABULARIES[unit]
    ids = vocabulary.encode(text)
    sizes = vocabulary.unit_sizes(text)
    assert sizes.sum() == len(text)
    known = ids != vocabulary.unknown
    np.testing.assert_array_equal(sizes[known], vocabulary.sizes[ids[known]])
    assert len(vocabulary.sizes) == len(vocabulary)
    assert vocabulary.sizes[vocabulary.unknown] == 1


# Streams.


@pytest.mark.parametrize("unit", ["char", "jamo"])
@given(cut(any_text))
def test_characters_and_jamo_are_encoded_one_by_one(unit: str, pieces: list[str]) -> None:
    vocabulary = VOCABULARIES[unit]
    apart = [vocabulary.encode(piece) for piece in pieces]
    np.testing.assert_array_equal(np.concatenate(apart), vocabulary.encode("".join(pieces)))


@pytest.mark.parametrize("unit", UNITS)
@given(cut(spaced_text | any_text))
@example(["the c", "at \n", "\n", " dog"])
@example(["한 ", " 한 \n", "a'", "s\n"])
def test_text_in_pieces_is_encoded_as_the_whole(unit: str, pieces: list[str]) -> None:
    vocabulary = VOCABULARIES[unit]
    encoder = vocabulary.encoder()
    parts = []
    for piece in pieces:
        parts.append(encoder.feed(piece))
        restored = vocabulary.encoder()
        assert restored.feed(encoder.held).size == 0
        assert restored.held == encoder.held
        encoder = restored
    whole = vocabulary.encode("".join(pieces))
    np.testing.assert_array_equal(np.concatenate([*parts, encoder.finish()]), whole)
    assert encoder.held == ""
    assert encoder.finish().size == 0


@pytest.mark.parametrize("unit", ["word", "subword"])
@given(spaced_text, spaced_text)
def test_a_border_changes_no_word_and_no_subword(unit: str, text: str, more: str) -> None:
    vocabulary = VOCABULARIES[unit]
    border = last_border(text)
    parts = [vocabulary.encode(text[:border]), vocabulary.encode(text[border:] + more)]
    np.testing.assert_array_equal(np.concatenate(parts), vocabulary.encode(text + more))


@pytest.mark.parametrize(
    "text, border", [("", 0), ("abc", 0), ("ab c", 2), ("ab  ", 2), ("a\nb", 2), ("\n  ", 1), (" ", 0)]
)
def test_where_the_last_border_is(text: str, border: int) -> None:
    assert last_border(text) == border


def test_blocks_are_encoded_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {unit: vocabulary.encode(SAMPLE) for unit, vocabulary in VOCABULARIES.items()}
    sizes = {unit: vocabulary.unit_sizes(SAMPLE) for unit, vocabulary in VOCABULARIES.items()}
    for size in ("hangul.BLOCK", "words._PIECE", "subwords._PIECE"):
        monkeypatch.setattr(f"unrolled.vocabulary.{size}", 7)
    for unit, vocabulary in VOCABULARIES.items():
        np.testing.assert_array_equal(vocabulary.encode(SAMPLE), whole[unit])
        np.testing.assert_array_equal(vocabulary.unit_sizes(SAMPLE), sizes[unit])
        assert vocabulary.missing("Zebra\n" + SAMPLE + "짧\ud800\n") == vocabulary.missing("Zebra\n짧\ud800\n")
        assert learned(unit) == vocabulary


@pytest.mark.parametrize("unit", UNITS)
@given(st.data())
def test_ids_one_by_one_are_decoded_as_the_whole(unit: str, data: st.DataObject) -> None:
    vocabulary = VOCABULARIES[unit]
    parts = np.flatnonzero(vocabulary.sizes == 0).tolist() or [0]  # the units that can be held back or join
    ids = data.draw(st.lists(st.integers(0, len(vocabulary) - 1) | st.sampled_from(parts)))
    decoder = vocabulary.decoder()
    text = ""
    for index in ids:
        text += decoder.feed(index)
        restored = vocabulary.decoder()
        for held in decoder.held:
            restored.feed(held)
        assert restored.held == decoder.held
        assert len(restored.held) <= 4
        decoder = restored
    text += decoder.finish()
    assert text == vocabulary.decode(ids)
    assert vocabulary.decode(np.array(ids, vocabulary.dtype)) == text
    assert decoder.held == ()
    assert decoder.finish() == ""


def test_a_decoder_holds_back_an_open_syllable() -> None:
    vocabulary = VOCABULARIES["jamo"]
    decoder = vocabulary.decoder()
    told = [decoder.feed(index) for index in vocabulary.encode("닭이\n").tolist()]
    assert told == ["", "", "닭", "", "", "이\n"]


def test_a_decoder_holds_back_a_split_character() -> None:
    vocabulary = build_vocabulary("subword", ["x"], max_size=257)
    decoder = vocabulary.decoder()
    ids = vocabulary.encode("é한x").tolist()
    assert [decoder.feed(index) for index in ids] == ["", "é", "", "", "한", "x"]
    decoder.feed(ids[0])
    assert decoder.finish() == "\ufffd"
    assert decoder.feed(ids[-1]) == "x"


# Ids and names.


def test_the_unknown_unit_is_0() -> None:
    for vocabulary in VOCABULARIES.values():
        assert vocabulary.unknown == 0
        assert vocabulary.name(0) == "<unk>"
        assert vocabulary.decode([0]) == "\ufffd"
    assert VOCABULARIES["char"].encode("Z").tolist() == [0]
    assert VOCABULARIES["jamo"].encode("쯔").tolist()[0] == 0
    assert VOCABULARIES["word"].encode("the zebra cat").tolist()[1] == 0


@pytest.mark.parametrize("size, dtype", [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_ids_are_as_small_as_they_can_be(size: int, dtype: str) -> None:
    vocabulary = build_vocabulary("char", [chr(code) for code in range(size - 1)])
    assert len(vocabulary) == size
    assert vocabulary.dtype == dtype
    text = chr(0) + chr(size - 2)
    assert vocabulary.encode(text).tolist() == [1, size - 1]
    assert vocabulary.encode("").dtype == dtype


@pytest.mark.parametrize("unit", UNITS)
def test_empty_text_has_no_ids(unit: str) -> None:
    vocabulary = VOCABULARIES[unit]
    assert vocabulary.encode("").shape == (0,)
    assert vocabulary.encode("").dtype == vocabulary.dtype
    assert vocabulary.unit_sizes("").shape == (0,)
    assert vocabulary.decode([]) == ""


def test_names_are_what_to_show() -> None:
    assert {VOCABULARIES["jamo"].name(index) for index in VOCABULARIES["jamo"].encode("닭")} == set("ㄷㅏㄺ")
    assert VOCABULARIES["char"].name(VOCABULARIES["char"].encode("\n")[0]) == "\n"
    assert VOCABULARIES["word"].name(VOCABULARIES["word"].encode("the cat")[1]) == " cat"
    assert VOCABULARIES["subword"].name(VOCABULARIES["subword"].encode("\U0010ffff")[0]) == "\\xf4"


def test_missing_units_are_named_once_in_order() -> None:
    assert VOCABULARIES["char"].missing("Zoo 쯔 Zoo") == ["Z", "쯔"]
    assert VOCABULARIES["jamo"].missing("쯔 Z 쯔 쮸") == ["ㅉ", "Z", "ㅠ"]
    assert VOCABULARIES["word"].missing("the Zebra and the Zebra") == [" Zebra", " and"]


@pytest.mark.parametrize("unit", UNITS)
def test_ids_outside_of_the_vocabulary_are_refused(unit: str) -> None:
    vocabulary = VOCABULARIES[unit]
    for wrong in (-1, len(vocabulary)):
        message = rf"id {wrong} is not in the vocabulary: expected 0 to {len(vocabulary) - 1}"
        with pytest.raises(DataError, match=message):
            vocabulary.decode([1, wrong])
        with pytest.raises(DataError, match=message):
            vocabulary.decoder().feed(wrong)
        with pytest.raises(DataError, match=message):
            vocabulary.name(wrong)
    with pytest.raises(ShapeError, match=r"ids: expected integers \[N\], got int64 \[2, 1\]"):
        vocabulary.decode(np.array([[1], [2]]))
    with pytest.raises(ShapeError, match=r"ids: expected integers \[N\], got float64 \[1\]"):
        vocabulary.decode(np.array([1.5]))


# Building.


def test_the_rarest_units_are_left_out() -> None:
    text = "aaabbc"
    assert build_vocabulary("char", [text], max_size=3).to_json() == {"unit": "char", "units": ["a", "b"]}
    assert build_vocabulary("char", [text], min_count=3).to_json() == {"unit": "char", "units": ["a"]}
    assert build_vocabulary("char", ["cab"], max_size=3).to_json()["units"] == ["a", "b"]  # as frequent: code point
    assert build_vocabulary("jamo", ["각각가나"], min_count=3).to_json()["units"] == ["\u1100", "\u1161"]
    assert build_vocabulary("word", ["b a\nb a c"], min_count=2).to_json()["units"] == [" a", "b"]
    assert build_vocabulary("word", ["b a\nb a c"], max_size=2).to_json()["units"] == [" a"]
    assert len(build_vocabulary("subword", [SAMPLE], max_size=260)) == 260


@given(cut(any_text.filter(bool)))
def test_characters_and_jamo_are_counted_in_any_pieces(pieces: list[str]) -> None:
    for unit in ("char", "jamo"):
        assert build_vocabulary(unit, iter(pieces)) == build_vocabulary(unit, ["".join(pieces)])


def test_words_are_counted_as_ptb_counts_them() -> None:
    text = " no it was n't black monday \n but while the <unk> N \n"
    vocabulary = build_vocabulary("word", [text])
    assert len(vocabulary.encode(text)) == len(text.replace("\n", "<eos>").split())
    assert len(vocabulary) == 1 + len(set(text.replace("\n", "<eos>").split()))


def test_a_newline_is_never_inside_a_subword() -> None:
    vocabulary = build_vocabulary("subword", ["\n\n\n\n a\n b\n" * 100], max_size=300)
    assert [vocabulary.name(index) for index in range(len(vocabulary)) if "\n" in vocabulary.name(index)] == ["\n"]


@pytest.mark.parametrize("unit", UNITS)
def test_empty_text_makes_no_vocabulary(unit: str) -> None:
    with pytest.raises(DataError, match="the text is empty: a vocabulary needs at least one character"):
        build_vocabulary(unit, ["", ""])


@pytest.mark.parametrize("unit", ["char", "jamo", "word"])
def test_a_min_count_that_leaves_nothing_is_refused(unit: str) -> None:
    with pytest.raises(DataError, match=r"no unit occurs 9 times \(the most frequent: 2\): lower min_count"):
        build_vocabulary(unit, ["aa" if unit != "word" else "a\na\n"], min_count=9)


def test_settings_that_make_no_vocabulary_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown unit 'jammo': did you mean 'jamo'\?"):
        build_vocabulary("jammo", ["x"])
    with pytest.raises(ConfigError, match="min_count: expected 1 or more, got 0"):
        build_vocabulary("char", ["x"], min_count=0)
    with pytest.raises(
        ConfigError, match=r"max_size: expected 257 or more \(room for <unk> and the 256 bytes\), got 256"
    ):
        build_vocabulary("subword", ["x"], max_size=256)
    with pytest.raises(ConfigError, match=r"max_size: expected 2 or more \(room for <unk> and one more unit\), got 1"):
        build_vocabulary("char", ["x"], max_size=1)


LEARN = """
import hashlib, json, sys
from unrolled.vocabulary import build_vocabulary
vocabulary = build_vocabulary("subword", [sys.argv[1]] * 20, max_size=400)
print(hashlib.sha256(json.dumps(vocabulary.to_json()).encode()).hexdigest())
"""


def test_subwords_are_learned_the_same_in_every_process() -> None:
    """Also with the threads of tokenizers, whose number and order must not matter."""
    digests = set()
    for seed, threads in (("1", "false"), ("2", "false"), ("3", "true")):
        env = os.environ | {"PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": threads}
        command = [sys.executable, "-c", LEARN, SAMPLE]
        digests.add(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)
    assert len(digests) == 1


FORK = """
import os
from unrolled.vocabulary import build_vocabulary
vocabulary = build_vocabulary("subword", ["the cat sat\\n"] * 20, max_size=270)
vocabulary.encode("the cat\\n" * 5000)
child = os.fork()
vocabulary.encode("the cat\\n" * 5000)
if child:
    assert os.waitpid(child, 0)[1] == 0
"""


def test_subwords_survive_a_fork_without_a_warning() -> None:
    env = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run([sys.executable, "-c", FORK], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""


def test_the_module_loads_neither_torch_nor_tokenizers() -> None:
    code = "import sys, unrolled.vocabulary; print(sorted({'torch', 'tokenizers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# JSON.


@pytest.mark.parametrize("unit", UNITS)
@given(any_text)
@example('\ud83d\ude00\u034f\u1100가\u1100"\\\0 \n')
def test_json_keeps_a_vocabulary(unit: str, text: str) -> None:
    vocabulary = VOCABULARIES[unit] if unit == "subword" else build_vocabulary(unit, [text + "\nx"])
    saved = json.dumps(vocabulary.to_json(), allow_nan=False)
    loaded = vocabulary_from_json(json.loads(saved))
    assert loaded == vocabulary
    assert type(loaded) is type(vocabulary)
    assert json.dumps(loaded.to_json()) == saved
    np.testing.assert_array_equal(loaded.encode(text), vocabulary.encode(text))
    assert loaded.decode(loaded.encode(text)) == vocabulary.decode(vocabulary.encode(text))


def test_vocabularies_differ_by_unit_and_units() -> None:
    everything = [*VOCABULARIES.values(), build_vocabulary("char", ["a"]), build_vocabulary("word", ["a"])]
    for index, one in enumerate(everything):
        assert [one == other for other in everything] == [index == place for place in range(len(everything))]
    assert VOCABULARIES["char"] != "char"
    assert repr(build_vocabulary("char", ["abc"])) == "<CharacterVocabulary of 4 units>"


def broken_tokenizer(change: str) -> dict[str, object]:
    saved = VOCABULARIES["subword"].to_json()
    model = saved["tokenizer"]["model"]
    if change == "gap":
        model["vocab"]["xx"] = 1000
    elif change == "byte":
        last = max(model["vocab"], key=model["vocab"].__getitem__)
        model["vocab"][last + "!"] = model["vocab"].pop("A")
        model["vocab"] = {name: rank for rank, name in enumerate(sorted(model["vocab"], key=model["vocab"].get))}
    elif change == "letter":
        model["vocab"]["한"] = len(model["vocab"])
    elif change == "merge":
        model["merges"].append(["q", "qqq"])
    elif change == "pair":
        model["merges"].append("q q")
    elif change == "id":
        model["vocab"]["A"] = "1"
    elif change == "normalizer":
        saved["tokenizer"]["normalizer"] = {"type": "Lowercase"}
    return saved


@pytest.mark.parametrize(
    "saved, message",
    [
        ([], r"vocabulary: expected a unit \(char, jamo, word, subword\), got \[\]"),
        ({"unit": "chars"}, r"vocabulary: expected a unit \(char, jamo, word, subword\), got 'chars'"),
        ({"unit": "char"}, "vocabulary of unit 'char': expected a list of units"),
        ({"unit": "char", "units": []}, "expected a list of units"),
        ({"unit": "char", "units": ["a", "bc"]}, "'bc' is no character"),
        ({"unit": "char", "units": ["a", 1]}, "1 is no character"),
        ({"unit": "char", "units": ["a", "b", "a"]}, "'a' stands there twice"),
        ({"unit": "jamo", "units": ["\u1100", "\u034fa"]}, "is no jamo unit"),
        ({"unit": "jamo", "units": ["\u1100", "\u1100"]}, "'\u1100' stands there twice"),
        ({"unit": "word", "units": ["a b"]}, "'a b' is no word: expected one word or line end, with the space before"),
        ({"unit": "word", "units": [None]}, "None is no word"),
        ({"unit": "word", "units": ["a", "a"]}, "'a' stands there twice"),
        ({"unit": "subword", "tokenizer": {}}, "expected the JSON of a byte-level BPE tokenizer without normalizer"),
        (broken_tokenizer("gap"), "subwords must have the ids 0, 1, 2, ..., and 0 must be <unk>"),
        (broken_tokenizer("byte"), "the subwords lack 1 of the 256 bytes, the first of them 0x41"),
        (broken_tokenizer("letter"), "a subword holds '한', which stands for no byte"),
        (broken_tokenizer("merge"), "the merges do not fit the subwords: "),
        (broken_tokenizer("pair"), "merges must be pairs of subwords"),
        (broken_tokenizer("id"), "the ids of subwords must be integers"),
        (broken_tokenizer("normalizer"), "expected the JSON of a byte-level BPE tokenizer without normalizer"),
    ],
)
def test_wrong_json_is_refused(saved: object, message: str) -> None:
    with pytest.raises(StorageError, match=message):
        vocabulary_from_json(saved)


def test_many_short_texts_are_counted_together() -> None:
    """One by one, each would cost as much as the highest code point is large."""
    texts = ["가나", "a", "", "힣"] * 1000
    assert np.array_equal(hangul.count_numbers("char", texts), hangul.count_numbers("char", ["".join(texts)]))
    assert len(list(hangul._together(["ab"] * hangul.BLOCK))) == 3  # two full ones and the rest
