"""Files to text, text to ids, ids to windows: nothing is lost, counted twice, or repaired in silence."""

from __future__ import annotations

import gzip
import lzma
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from unrolled.data import EncodedText, Lanes, encode_texts, find_texts, read_text, split_text
from unrolled.errors import ConfigError, DataError, StorageError
from unrolled.kinds.text import IGNORE
from unrolled.vocabulary import UNITS, Vocabulary, build_vocabulary

SAMPLE = "나는 학교에 갑니다 ㅋㅋ\nthe cat sat on the mat\n\n닭이 운다\n" * 4
VOCABULARIES = {unit: build_vocabulary(unit, [SAMPLE], max_size=300) for unit in UNITS}

PACK: dict[str, Callable[[bytes], bytes]] = {
    ".txt": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
}

raw_bytes = st.lists(
    st.sampled_from([b"\r", b"\n", b"\r\n", b"\xef\xbb\xbf", b"a", "é".encode(), "한".encode(), "😀".encode()])
    | st.sampled_from([b"\0", b"\xff", b"\xed\xa0\x80", b"\xf0\x9f", b"\xc0\xaf", b"\x80"])
).map(b"".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("texts")


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(PACK.get(path.suffix, bytes)(data))
    return path


def normalised(data: bytes) -> str:
    """What `read_text` shall give, read at once."""
    text = data.decode().removeprefix("\ufeff")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def encoded(folder: Path, texts: list[str], vocabulary: Vocabulary, documents: str = "file") -> EncodedText:
    paths = [write(folder / f"part{number}.txt", text.encode()) for number, text in enumerate(texts)]
    return encode_texts(paths, vocabulary, documents=documents, directory=folder)


# Finding files.


def test_files_are_found_in_folders_sorted(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/y.TXT.gz", "c.txt.xz", "a.md", "d.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.txt").mkdir()
    inside = [tmp_path / name for name in ("a/y.TXT.gz", "a/z.txt", "b.txt", "c.txt.xz")]
    assert find_texts([tmp_path]) == inside
    assert find_texts(tmp_path) == inside
    assert find_texts(str(tmp_path / "a.md")) == [tmp_path / "a.md"]
    assert find_texts([tmp_path / "c.txt.xz", str(tmp_path)]) == [tmp_path / "c.txt.xz", *inside]


def test_paths_that_name_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").touch()
    with pytest.raises(DataError, match=r"copus.txt: there is no such file or folder: did you mean 'corpus.txt'\?"):
        find_texts([tmp_path / "copus.txt"])
    with pytest.raises(DataError, match=r"zzz: there is no such file or folder: known: corpus.txt"):
        find_texts([tmp_path / "zzz"])
    with pytest.raises(DataError, match=r"no such file or folder, nor a folder .*/nowhere$"):
        find_texts([tmp_path / "nowhere" / "corpus.txt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError, match=r"empty: no texts in this folder: expected files \*.txt, \*.txt.gz or \*.txt.xz"
    ):
        find_texts([tmp_path / "empty"])
    for number in range(20):
        (tmp_path / f"file{number}").touch()
    with pytest.raises(DataError, match=r"zzz: there is no such file or folder$"):
        find_texts([tmp_path / "zzz"])


# Reading.


@pytest.mark.parametrize("suffix", PACK)
@given(data=raw_bytes, chunk=st.integers(1, 5) | st.just(1 << 22))
@example(data=b"\xef\xbb\xbfa\r\nb\rc\r\r\n\xef\xbb\xbf", chunk=1)
@example(data="\ufeff".encode(), chunk=2)
@example(data=b"a\r", chunk=2)
def test_text_read_in_chunks_is_the_whole(folder: Path, suffix: str, data: bytes, chunk: int) -> None:
    path = write(folder / f"x{suffix}", data)
    # Python's own decoder, on the whole, says what the text is and where the first bad byte stands.
    try:
        expected, bad = normalised(data), len(data)
    except UnicodeDecodeError as error:
        expected, bad = "", error.start
    nul = data.find(b"\0")
    bad = min(bad, nul) if nul >= 0 else bad
    if bad == len(data):
        assert "".join(read_text(path, chunk=chunk)) == expected
    else:
        with pytest.raises(DataError, match=rf"byte {bad} (is NUL|\({data[bad]:#04x}\) is no UTF-8)"):
            list(read_text(path, chunk=chunk))
    replaced = data.decode(errors="replace").replace("\0", "\ufffd").removeprefix("\ufeff")
    replaced = replaced.replace("\r\n", "\n").replace("\r", "\n")
    assert "".join(read_text(path, chunk=chunk, errors="replace")) == replaced


@given(st.text(st.sampled_from("ab \n")), st.integers(1, 9))
def test_chunks_end_at_line_ends(folder: Path, text: str, chunk: int) -> None:
    chunks = list(read_text(write(folder / "lines.txt", text.encode()), chunk=chunk))
    assert all(piece.endswith("\n") for piece in chunks[:-1])
    assert all(chunks)
    assert "".join(chunks) == text


def test_long_lines_are_cut_at_spaces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("unrolled.data.reading._LONGEST_LINE", 8)
    path = write(tmp_path / "long.txt", b"to be or not  to be\nabcdefghijklmnop\nx")
    assert list(read_text(path, chunk=8)) == ["to be", " or not", "  to be\n", "abcdefghijkl", "mnop\n", "x"]


def test_progress_counts_the_bytes_of_the_file(tmp_path: Path) -> None:
    data = b"one line\n" * 1000
    for suffix in PACK:
        told: list[int] = []
        path = write(tmp_path / f"x{suffix}", data)
        assert "".join(read_text(path, chunk=2000, progress=told.append)) == data.decode()
        assert told == sorted(told)
        assert told[-1] == path.stat().st_size
        assert len(told) >= 5


def test_a_pipe_is_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    child = subprocess.Popen(["sh", "-c", 'printf "a\\nb" > "$0"', str(pipe)])
    assert "".join(read_text(pipe)) == "a\nb"
    assert child.wait() == 0


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_bytes_that_are_no_text_are_named(tmp_path: Path, suffix: str, chunk: int) -> None:
    packed = r" \(counted in the unpacked file\)" if suffix != ".txt" else ""
    path = write(tmp_path / f"x{suffix}", "가\r\n".encode() + b"ab\xea\xb0x")
    expected = (
        rf"x{suffix}: byte 7 \(0xea\) is no UTF-8{packed}: convert the file to UTF-8 \(Korean text is often CP949\),"
        r" or give --errors replace to read such bytes as U\+FFFD"
    )
    with pytest.raises(DataError, match=expected):
        list(read_text(path, chunk=chunk))
    path = write(tmp_path / f"y{suffix}", "가\r\n".encode() + b"ab\0")
    expected = (
        rf"y{suffix}: byte 7 is NUL{packed}: this looks like a binary file or UTF-16 text; convert it to UTF-8,"
        r" or give --errors replace to read NUL as U\+FFFD"
    )
    with pytest.raises(DataError, match=expected):
        list(read_text(path, chunk=chunk))
    assert "".join(read_text(path, chunk=chunk, errors="replace")) == "가\nab\ufffd"


def test_utf16_and_cp949_are_recognised_as_no_utf8(tmp_path: Path) -> None:
    for name, coding, message in (
        ("bom", "utf-16", "bom: this is UTF-16 text: convert it to UTF-8"),
        ("le", "utf-16-le", "le: byte 1 is NUL: this looks like a binary file or UTF-16 text"),
        ("korean", "cp949", r"korean: byte 6 \(0xb0\) is no UTF-8: .*CP949"),
    ):
        with pytest.raises(DataError, match=message):
            list(read_text(write(tmp_path / name, "hello 가\n".encode(coding))))


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_damaged_files_are_refused(tmp_path: Path, suffix: str) -> None:
    whole = PACK[suffix](os.urandom(3000).hex().encode())
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 0xFF
    for data in (whole[:-20], whole[:5], b"no archive", bytes(broken)):
        path = tmp_path / f"x{suffix}"
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"x{suffix}: this {suffix} file is damaged or cut off: "):
            list(read_text(path))


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.txt: cannot read this file: No such file or directory"):
        list(read_text(tmp_path / "none.txt"))
    with pytest.raises(DataError, match="cannot read this file: Is a directory"):
        list(read_text(tmp_path))


def test_settings_of_reading_are_checked_at_once() -> None:
    with pytest.raises(ConfigError, match=r"errors: unknown value 'repalce': did you mean 'replace'\?"):
        read_text("x", errors="repalce")
    with pytest.raises(ConfigError, match="chunk: expected at least 1 byte, got 0"):
        read_text("x", chunk=0)


# Encoding.


@pytest.mark.parametrize("unit", UNITS)
@given(st.lists(st.text(st.sampled_from("나닭a짧Z \n\t")), min_size=1, max_size=3).filter(any))
def test_a_text_is_encoded_whole(folder: Path, unit: str, texts: list[str]) -> None:
    vocabulary = VOCABULARIES[unit]
    text = encoded(folder, texts, vocabulary)
    expected = np.concatenate([vocabulary.encode(part) for part in texts])
    np.testing.assert_array_equal(text.ids, expected)
    assert text.ids.dtype == vocabulary.dtype
    assert len(text) == len(expected)
    assert text.characters == sum(map(len, texts))
    assert text.unknown == (expected == 0).sum()
    lengths = [len(vocabulary.encode(part)) for part in texts]
    assert text.starts.tolist() == [sum(lengths[:index]) for index in range(len(texts)) if lengths[index]]


@pytest.mark.parametrize("unit", UNITS)
def test_a_text_in_many_chunks_is_encoded_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, unit: str) -> None:
    vocabulary = VOCABULARIES[unit]
    texts = [SAMPLE * 2, "짧은 zebra\n" * 5]
    whole = {documents: encoded(tmp_path, texts, vocabulary, documents) for documents in ("file", "line", "paragraph")}
    monkeypatch.setattr("unrolled.data.encoding.read_text", lambda path, **more: read_text(path, chunk=5, **more))
    monkeypatch.setattr("unrolled.data.encoding._BLOCK", 7)
    for documents, expected in whole.items():
        text = encoded(tmp_path, texts, vocabulary, documents)
        np.testing.assert_array_equal(text.ids, expected.ids)
        np.testing.assert_array_equal(text.starts, expected.starts)
        assert text.fingerprint == expected.fingerprint
        assert (text.characters, text.unknown) == (expected.characters, expected.unknown)
        assert text.predicted_characters == expected.predicted_characters


def documents_of(text: str, documents: str) -> list[str]:
    """The documents of a file, slowly: line by line."""
    if documents == "file":
        return [text] if text else []
    found: list[str] = []
    after_blank = False
    for line in text.splitlines(keepends=True):
        blank = not line.strip(" \t\n")
        first = not found or not found[0].strip(" \t\n")  # blank lines at the start belong to the first document
        begins = not found if first else not blank and (documents == "line" or after_blank)
        if begins:
            found.append(line)
        else:
            found[-1] += line
        after_blank = blank
    return found


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("documents", ["file", "line", "paragraph"])
@given(st.lists(st.text(st.sampled_from("나닭a짧Z \n\n\n\t")), min_size=1, max_size=3).filter(any))
@example(["a\n\n\nb\n", "c", "\n\nd\n \t\n e\n\nf"])
@example(["한 a\nb", "짧\n\n짧짧 Z\n"])
def test_documents_begin_where_they_should(folder: Path, documents: str, unit: str, texts: list[str]) -> None:
    vocabulary = VOCABULARIES[unit]
    text = encoded(folder, texts, vocabulary, documents)
    expected = [document for part in texts for document in documents_of(part, documents)]
    lengths = [len(vocabulary.encode(document)) for document in expected]
    assert text.starts.tolist() == [sum(lengths[:index]) for index in range(len(lengths))]
    firsts = sum(int(vocabulary.unit_sizes(document)[0]) for document in expected)
    assert text.predicted_characters == sum(map(len, expected)) - firsts


def test_a_line_that_is_cut_is_one_document(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("unrolled.data.reading._LONGEST_LINE", 8)
    monkeypatch.setattr("unrolled.data.encoding.read_text", lambda path, **more: read_text(path, chunk=8, **more))
    text = "the cat sat on the mat\nthe cat\n"
    for documents in ("line", "paragraph"):
        starts = encoded(tmp_path, [text], VOCABULARIES["char"], documents).starts.tolist()
        assert starts == ([0, 23] if documents == "line" else [0])


def test_the_fingerprint_tells_texts_and_documents_apart(tmp_path: Path) -> None:
    texts = [["ab\ncd\n"], ["ab\ncd"], ["ab\n", "cd\n"], ["a", "b\ncd\n"], ["ab\n\ncd\n"], ["\n", "ab\ncd\n"]]
    vocabulary = VOCABULARIES["char"]
    prints = [encoded(tmp_path, text, vocabulary).fingerprint for text in texts]
    assert len(set(prints)) == len(prints)
    assert all(re.fullmatch("[0-9a-f]{64}", fingerprint) for fingerprint in prints)
    assert encoded(tmp_path, texts[0], VOCABULARIES["jamo"]).fingerprint == prints[0]
    assert encoded(tmp_path, texts[0], vocabulary, "line").fingerprint == prints[2]
    assert encoded(tmp_path, ["\ufeffab\r\ncd\r"], vocabulary).fingerprint == prints[0]
    assert encoded(tmp_path, ["", "ab\ncd\n", ""], vocabulary).fingerprint == prints[0]


@pytest.mark.parametrize("unit", UNITS)
@given(st.data())
def test_parts_add_up_to_the_whole(folder: Path, unit: str, data: st.DataObject) -> None:
    vocabulary = VOCABULARIES[unit]
    texts = data.draw(st.lists(st.text(st.sampled_from("나닭a짧쯔Z \n")), min_size=1, max_size=3).filter(any))
    text = encoded(folder, texts, vocabulary, "line")
    sizes = np.concatenate([vocabulary.unit_sizes(part) for part in texts])
    begin = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(begin + 1, len(text)))
    part = text.slice(begin, end)
    assert part.characters == sizes[begin:end].sum()
    assert part.unknown == (text.ids[begin:end] == 0).sum()
    np.testing.assert_array_equal(part.ids, text.ids[begin:end])
    expected = sorted({0, *(start - begin for start in text.starts.tolist() if begin <= start < end)})
    assert part.starts.tolist() == expected
    assert part.predicted_characters == part.characters - sizes[begin + np.array(expected)].sum()
    # A part of a part is a part.
    low = data.draw(st.integers(0, len(part) - 1))
    inner, direct = part.slice(low, len(part)), text.slice(begin + low, end)
    assert inner.characters == direct.characters
    assert inner.starts.tolist() == direct.starts.tolist()
    assert part.fingerprint != text.fingerprint
    assert part.fingerprint == text.slice(begin, end).fingerprint


def test_ids_are_mapped_and_their_file_has_no_name(tmp_path: Path) -> None:
    (tmp_path / "spill").mkdir()
    source = write(tmp_path / "x.txt", b"the cat\n")
    text = encode_texts(source, VOCABULARIES["char"], directory=tmp_path / "spill")
    assert list((tmp_path / "spill").iterdir()) == []
    assert not text.ids.flags.writeable
    assert VOCABULARIES["char"].decode(text.ids) == "the cat\n"


KILLED = """
import os, signal, sys
from unrolled.data import encode_texts
from unrolled.vocabulary import build_vocabulary
def kill(read): os.kill(os.getpid(), signal.SIGKILL) if read > 100_000 else None
vocabulary = build_vocabulary("char", ["the cat \\n"])
kill_at = kill if sys.argv[3] == "midway" else None
text = encode_texts([sys.argv[1]] * 20, vocabulary, directory=sys.argv[2], progress=kill_at)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("when", ["midway", "later"])
def test_nothing_is_left_when_the_process_is_killed(tmp_path: Path, when: str) -> None:
    (tmp_path / "spill").mkdir()
    source = write(tmp_path / "x.txt", b"the cat\n" * 5000)
    done = subprocess.run([sys.executable, "-c", KILLED, source, tmp_path / "spill", when], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list((tmp_path / "spill").iterdir()) == []


def test_progress_counts_the_bytes_of_all_files(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"x{number}.txt{suffix}", b"the cat\n" * 3) for number, suffix in enumerate(["", ".gz"])]
    told: list[int] = []
    encode_texts([*paths, paths[0]], VOCABULARIES["char"], progress=told.append)
    assert told == sorted(told)
    assert told[-1] == sum(path.stat().st_size for path in (*paths, paths[0]))


def test_texts_that_cannot_be_encoded_are_refused(tmp_path: Path) -> None:
    vocabulary = VOCABULARIES["char"]
    empty = [write(tmp_path / f"{number}.txt", b"" if number else "\ufeff".encode()) for number in range(4)]
    with pytest.raises(DataError, match=r"there is no text in \S+0.txt, \S+1.txt, \S+2.txt, \.\.\.$"):
        encode_texts(empty, vocabulary)
    with pytest.raises(DataError, match=r"there is no text in \S+0.txt$"):
        encode_texts(empty[0], vocabulary)
    with pytest.raises(ConfigError, match=r"documents: unknown value 'lines': did you mean 'line'\?"):
        encode_texts(empty, vocabulary, documents="lines")
    with pytest.raises(ConfigError, match=r"errors: unknown value 'ignore': "):
        encode_texts(empty, vocabulary, errors="ignore")
    source = write(tmp_path / "x.txt", b"the cat\n")
    with pytest.raises(
        StorageError, match=r"nowhere: cannot write the encoded text here \(No such file or directory\)"
    ):
        encode_texts(source, vocabulary, directory=tmp_path / "nowhere")


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = write(tmp_path / "x.txt", b"the cat\n")
    expected = r"cannot write the encoded text here \(No space left on device\): name another folder, or set TMPDIR"
    with Path("/dev/full").open("w+b", buffering=0) as full:
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: full)
        with pytest.raises(StorageError, match=expected):
            encode_texts(source, VOCABULARIES["char"])


def test_an_encoded_text_is_checked() -> None:
    with pytest.raises(DataError, match="the text is empty"):
        EncodedText(np.empty(0, np.uint8))
    for starts in ([], [1], [0, 3], [0, 2, 2]):
        with pytest.raises(DataError, match="starts: expected 0 and then ascending positions below 3"):
            EncodedText(np.zeros(3, np.uint8), starts=starts)
    text = EncodedText(np.zeros(3, np.uint8))
    for begin, end in ((0, 0), (-1, 2), (0, 4), (2, 1)):
        with pytest.raises(DataError, match=f"expected a part of a text of 3 units, got {begin} to {end}"):
            text.slice(begin, end)


# Splitting.


def test_the_last_tenth_is_for_validation() -> None:
    text = EncodedText(np.arange(105, dtype=np.uint8), starts=[0, 50, 94, 100])
    train, valid = split_text(text, 0.1)
    assert len(train) == int(0.9 * 105) == 94
    np.testing.assert_array_equal(np.concatenate([train.ids, valid.ids]), text.ids)
    assert train.starts.tolist() == [0, 50]
    assert valid.starts.tolist() == [0, 6]


@pytest.mark.parametrize("unit", ["jamo", "subword"])
@given(st.floats(0.05, 0.95))
def test_no_character_is_split(folder: Path, unit: str, fraction: float) -> None:
    vocabulary = VOCABULARIES[unit] if unit == "jamo" else build_vocabulary("subword", ["x"], max_size=257)
    text = encoded(folder, [SAMPLE], vocabulary)
    train, valid = split_text(text, fraction)
    assert vocabulary.decode(train.ids) + vocabulary.decode(valid.ids) == SAMPLE
    assert train.characters == len(vocabulary.decode(train.ids))
    assert valid.characters == len(vocabulary.decode(valid.ids))
    assert 0 <= int((1 - fraction) * len(text)) - len(train) <= 2


def test_splits_that_cannot_be_are_refused() -> None:
    text = EncodedText(np.zeros(3, np.uint8))
    for fraction in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="fraction: expected a number between 0 and 1, got"):
            split_text(text, fraction)
    with pytest.raises(DataError, match=r"the text has 3 units, too few to split off a fraction of 0.9 for validation"):
        split_text(text, 0.9)


# Lanes.


@st.composite
def texts_and_lanes(draw: st.DrawFn) -> tuple[EncodedText, int, int | None, int | None]:
    batch_size = draw(st.sampled_from([1, 2, 4, 6]))
    window = draw(st.none() | st.integers(1, 12))
    units = max(batch_size * (window or 1) + 1, 2 * batch_size) + draw(st.integers(0, 100))
    stride = draw(st.none() | st.integers(1, window or (units - 1) // batch_size))
    starts = draw(st.sets(st.integers(1, units - 1), max_size=12))
    ids = np.arange(1, units + 1, dtype=np.uint16)  # each unit is known by its id
    return EncodedText(ids, starts=[0, *sorted(starts)]), batch_size, window, stride


@given(texts_and_lanes())
def test_windows_cover_the_lanes(case: tuple[EncodedText, int, int | None, int | None]) -> None:
    """Against the definition, one step at a time."""
    text, batch_size, window, stride = case
    lanes = Lanes(text, batch_size, window, stride)
    steps = (len(text) - 1) // batch_size
    assert lanes.steps == steps
    longest = window or steps
    stride = stride or longest
    starts = set(text.starts.tolist())
    targeted: list[int] = []
    expected_start = 0
    for k in range(len(lanes)):
        got = lanes.window(k)
        end = min((k + 1) * stride, steps)
        assert got.start == expected_start == max(0, k * stride - (longest - stride))
        assert got.inputs.shape == got.targets.shape == (end - got.start, batch_size)
        assert len(got.inputs) <= longest
        assert got.inputs.dtype == got.targets.dtype == torch.int64
        assert got.inputs.is_contiguous()
        assert got.targets.is_contiguous()
        assert got.start + got.warm == k * stride
        reset = torch.zeros(got.inputs.shape, dtype=torch.bool) if got.reset is None else got.reset
        counted = 0
        for t, b in np.ndindex(*got.inputs.shape):
            position = b * steps + got.start + t
            assert got.inputs[t, b] == text.ids[position]
            border = position + 1 in starts
            assert got.targets[t, b] == (IGNORE if border else text.ids[position + 1])
            assert reset[t, b] == (position in starts and got.start + t > 0)
            if t >= got.warm:
                counted += not border
                targeted.append(position + 1)
        assert got.reset is None or got.reset.any()
        assert got.counted == counted
        expected_start = got.start + got.advance
    assert expected_start == steps
    assert sorted(targeted) == list(range(1, batch_size * steps + 1))


@given(texts_and_lanes(), st.sampled_from([1, 2, 3, 6]))
def test_all_ranks_together_have_the_lanes_of_one(
    case: tuple[EncodedText, int, int | None, int | None], ranks: int
) -> None:
    text, batch_size, window, stride = case
    if batch_size % ranks:
        batch_size, window, stride = ranks, None, None
        text = EncodedText(np.arange(1, 41, dtype=np.uint16), starts=[0, 7, 13])
    alone = Lanes(text, batch_size, window, stride)
    apart = [Lanes(text, batch_size, window, stride, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert [lane for lanes in apart for lane in lanes.lanes] == list(range(batch_size))
    for k in range(len(alone)):
        whole, parts = alone.window(k), [lanes.window(k) for lanes in apart]
        assert torch.equal(torch.cat([part.inputs for part in parts], dim=1), whole.inputs)
        assert torch.equal(torch.cat([part.targets for part in parts], dim=1), whole.targets)
        assert sum(part.counted for part in parts) == whole.counted
        resets = [
            torch.zeros_like(part.inputs, dtype=torch.bool) if part.reset is None else part.reset for part in parts
        ]
        assert torch.equal(
            torch.cat(resets, dim=1), resets[0].new_zeros(whole.inputs.shape) if whole.reset is None else whole.reset
        )
        assert {(part.start, part.warm, part.advance) for part in parts} == {(whole.start, whole.warm, whole.advance)}


def test_a_document_that_begins_with_a_lane_or_window_is_marked() -> None:
    text = EncodedText(np.arange(21, dtype=np.uint8), starts=[0, 5, 10])
    lanes = Lanes(text, 2, 5)
    first, second = lanes.window(0), lanes.window(1)
    assert first.reset is None  # both lanes begin with a document: the carry is the initial state there
    assert first.targets.tolist()[-1] == [IGNORE, 15]
    assert second.reset is not None
    assert second.reset.nonzero().tolist() == [[0, 0]]
    assert second.targets.tolist()[-1] == [IGNORE, 20]
    assert (first.counted, second.counted) == (9, 9)


def test_a_window_may_be_asked_for_twice_and_changed() -> None:
    text = EncodedText(np.arange(21, dtype=np.uint8))
    lanes = Lanes(text, 2, 4)
    before = lanes.window(1)
    before.inputs.zero_()
    before.targets.zero_()
    after = lanes.window(1)
    assert after.inputs.tolist() == [[4, 14], [5, 15], [6, 16], [7, 17]]
    assert text.ids.tolist() == list(range(21))
    for k in (-1, 3):
        with pytest.raises(IndexError, match=f"window {k}: there are 3"):
            lanes.window(k)


def test_a_text_that_is_too_short_is_refused() -> None:
    text = EncodedText(np.zeros(100, np.uint8))
    expected = (
        "the text has 100 units; one window of 64 for 32 lanes needs 2049: lower --window or --batch-size, or give more"
    )
    with pytest.raises(DataError, match=expected):
        Lanes(text, 32, 64)
    with pytest.raises(
        DataError, match="the text has 100 units; one window for 64 lanes needs 128: lower --batch-size"
    ):
        Lanes(text, 64, None)
    with pytest.raises(DataError, match="the text has 1 units; one window of 1 for 1 lanes needs 2"):
        Lanes(text.slice(0, 1), 1, 1)
    assert len(Lanes(text, 1, 99)) == 1
    with pytest.raises(DataError, match="one window of 100 for 1 lanes needs 101"):
        Lanes(text, 1, 100)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"batch_size": 0, "window": 5}, "batch size: expected 1 or more, got 0"),
        ({"batch_size": 2, "window": 0}, "window: expected 1 or more, got 0"),
        ({"batch_size": 2, "window": 5, "stride": 0}, "stride: expected 1 or more, got 0"),
        (
            {"batch_size": 2, "window": 5, "stride": 6},
            "stride: expected at most the window, 5, got 6: it would skip steps",
        ),
        ({"batch_size": 2, "window": None, "stride": 50}, "stride: expected at most the window, 49, got 50"),
        ({"batch_size": 3, "window": 5, "ranks": 2}, "batch size: expected a multiple of the 2 ranks, got 3"),
        ({"batch_size": 2, "window": 5, "ranks": 0}, "ranks: expected 1 or more, got 0"),
        ({"batch_size": 2, "window": 5, "ranks": 2, "rank": 2}, "rank: expected 0 to 1, got 2"),
    ],
)
def test_lanes_that_cannot_be_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Lanes(EncodedText(np.zeros(100, np.uint8)), **settings)
