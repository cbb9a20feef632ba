"""Files of rows to tables: every format gives the same cells, and what is not as expected is named with its place."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from unrolled.data.tables import FORMATS, Table, open_parallel, open_table, table_of
from unrolled.errors import ConfigError, DataError, StorageError

ROWS = [
    {"id": "1", "text": "너무재밓었다 ㅋㅋ", "label": "1"},
    {"id": "2", "text": '"quoted, she said', "label": "0"},
    {"id": "3", "text": "", "label": ""},
    {"id": "4", "text": "a \u2028 b \x0b c \x85 d", "label": "1"},
]

PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}

# Anything but NUL, what ends a line, and half characters.
texts = st.text(st.characters(exclude_characters="\0\r\n\t", exclude_categories=["Cs"]), max_size=5)
some_texts = texts | st.text(st.sampled_from('", a\n한'), max_size=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(PACK.get(path.suffix, bytes)(data.encode() if isinstance(data, str) else data))
    return path


def as_bytes(rows: list[dict[str, Any]], kind: str) -> bytes:
    """Rows in a format, as other programs write them."""
    names = list(rows[0])
    if kind == "tsv":
        return "".join("\t".join(cells) + "\n" for cells in [names, *(row.values() for row in rows)]).encode()
    if kind == "csv":
        file = io.StringIO()
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return file.getvalue().encode()
    if kind == "jsonl":
        return "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def refused(path: Path, data: str | bytes, message: str, **more: Any) -> None:
    """A file of this data is refused with this message, a whole one that begins with its name."""
    with pytest.raises(DataError) as caught:
        open_table(write(path, data), **more)
    assert str(caught.value) == f"{path}{message}"


@pytest.fixture(params=[None, 3], ids=["whole", "pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read with the usual sizes, and a few bytes and rows at once."""
    if request.param:
        for name in ("_CHUNK", "_BATCH", "_LETTERS"):
            monkeypatch.setattr(f"unrolled.data.formats.{name}", request.param if name == "_CHUNK" else 8)
        monkeypatch.setattr("unrolled.data.tables._PART", request.param)


# Formats.


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet"])
def test_every_format_gives_the_same_table(tmp_path: Path, kind: str, packing: str) -> None:
    table = open_table(write(tmp_path / f"reviews.{kind}{packing}", as_bytes(ROWS, kind)))
    assert table.columns == ("id", "text", "label")
    assert list(table) == ROWS
    assert table.fingerprint == table_of(ROWS).fingerprint


@given(st.lists(st.tuples(texts, texts), min_size=1))
@example([("", "")])
@example([('"', '"a"b'), ("", "x"), ("\ufeff", "")])
def test_tsv_holds_any_text(folder: Path, rows: list[tuple[str, str]]) -> None:
    data = "a\tb\n" + "".join("\t".join(row) + "\n" for row in rows)
    assert [tuple(row.values()) for row in open_table(write(folder / "x.tsv", data))] == rows


@given(st.lists(st.tuples(some_texts, some_texts), min_size=1), st.sampled_from(["\n", "\r\n"]))
@example([("", "")], "\n")
@example([("\n\n", '"\n"'), ("\ufeff", "")], "\r\n")
def test_csv_holds_any_text_and_knows_its_lines(folder: Path, rows: list[tuple[str, str]], end: str) -> None:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator=end)
    writer.writerow(["a", "b"])
    lines = []
    for row in rows:
        lines.append(file.getvalue().count("\n") + 1)
        writer.writerow(row)
    table = open_table(write(folder / "x.csv", file.getvalue()))
    assert [tuple(row.values()) for row in table] == rows
    assert [table.where(index) for index in range(len(table))] == [f"{folder}/x.csv, line {line}" for line in lines]


@given(st.lists(st.text(st.characters(exclude_characters="\0\r\n", exclude_categories=["Cs"])), min_size=1))
def test_a_line_of_text_is_a_row(folder: Path, lines: list[str]) -> None:
    path = write(folder / "x.txt", "\n".join(["first", *lines, "last"]))
    table = open_table(path)
    assert table.columns == ("text",)
    assert list(table.column("text")) == ["first", *lines, "last"]
    assert table.where(1) == f"{path}, line 2"
    assert list(open_table(path, columns=["words"])) == [{"words": line} for line in ["first", *lines, "last"]]


def test_extensions_and_marks_and_line_ends(tmp_path: Path) -> None:
    for name in ("x.tab", "x.TSV", "y.txt"):
        path = write(tmp_path / name, "\ufeffa\tb\r\n1\t2\r\n\r\n")
        assert list(open_table(path, format="tsv" if name == "y.txt" else None)) == [{"a": "1", "b": "2"}]
    assert list(open_table(write(tmp_path / "x.en", "a\tb\n\n"))) == [{"text": "a\tb"}, {"text": ""}]
    assert list(open_table(write(tmp_path / "x.ndjson", '{"a": "1"}\n'))) == [{"a": "1"}]


@pytest.mark.parametrize("kind", ["tsv", "csv", "text"])
def test_long_lines_are_whole(tmp_path: Path, kind: str) -> None:
    cell = "한국어 " * 400_000
    table = open_table(write(tmp_path / "x", f"text\n{cell}\nshort\n"), format=kind)
    assert list(table.column("text"))[-2:] == [cell, "short"]


def test_json_values(tmp_path: Path) -> None:
    data = (
        '{"a": "x", "n": 1.5, "b": true, "o": {"k": "값"}, "l": ["a", 2, null]}\n\n'
        '{"l": [], "o": null, "b": false, "n": -3, "a": "\\u2028"}\n'
        '{"l": null, "o": "", "b": null, "n": 1e100, "a": ""}'
    )
    table = open_table(write(tmp_path / "x.jsonl", data))
    assert list(table) == [
        {"a": "x", "n": "1.5", "b": "true", "o": '{"k": "값"}', "l": ["a", "2", ""]},
        {"a": "\u2028", "n": "-3", "b": "false", "o": "", "l": []},
        {"a": "", "n": "1e+100", "b": "", "o": "", "l": []},
    ]
    assert table.where(1) == f"{tmp_path}/x.jsonl, line 3"


def test_parquet_values(tmp_path: Path) -> None:
    stored = pa.table(
        {
            "text": pa.array(["a", None, "값"]),
            "large": pa.array(["a", "", "b"], pa.large_string()),
            "coded": pa.array(["x", "y", "x"]).dictionary_encode(),
            "number": pa.array([1, None, -3]),
            "real": pa.array([1.5, 0.1, None]),
            "truth": pa.array([True, False, None]),
            "when": pa.array([0, 1, None], pa.date32()),
            "none": pa.nulls(3),
            "words": pa.array([["a", None], None, []], pa.list_(pa.string())),
            "pair": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int32(), 2)),
        }
    )
    pq.write_table(stored, tmp_path / "x.parquet", row_group_size=2)
    table = open_table(tmp_path / "x.parquet")
    rows = list(table)
    assert list(rows[0].values()) == ["a", "a", "x", "1", "1.5", "true", "1970-01-01", "", ["a", ""], ["1", "2"]]
    assert list(rows[1].values()) == ["", "", "y", "", "0.1", "false", "1970-01-02", "", [], ["3", "4"]]
    assert list(rows[2].values()) == ["값", "b", "x", "-3", "", "", "", "", [], ["5", "6"]]
    assert table.where(2) == f"{tmp_path}/x.parquet, row 3"
    assert table.fingerprint == table_of(rows).fingerprint


CONLLU = """\
# newdoc
# text = I don't know.
1\tI\tI\tPRON\tPRP\tCase=Nom\t4\tnsubj\t_\t_
2-3\tdon't\t_\t_\t_\t_\t_\t_\t_\t_
2\tdo\tdo\tAUX\tVBP\t_\t4\taux\t_\t_
3\tn't\tnot\tPART\tRB\t_\t4\tadvmod\t_\t_
4\tknow\tknow\tVERB\tVB\t_\t0\troot\t_\tSpaceAfter=No
4.1\tit\tit\tPRON\tPRP\t_\t_\t_\t_\t_
5\t.\t.\tPUNCT\t.\t_\t4\tpunct\t_\t_


# sent_id = 2
1-2\t#don't\t_\t_\t_\t_\t_\t_\t_\tX=1|SpaceAfter=No
1\tdo\tdo\tAUX\tVBP\t_\t3\taux\t_\t_
2\tn't\tnot\tPART\tRB\t_\t3\tadvmod\t_\t_
3\tgo\tgo\tVERB\tVB\t_\t0\troot\t_\t_
4\t!\t!\tPUNCT\t.\t_\t3\tpunct\t_\t_
"""


@pytest.mark.usefixtures("pieces")
def test_conllu(tmp_path: Path) -> None:
    table = open_table(write(tmp_path / "x.conllu.gz", CONLLU))
    assert table.columns == ("form", "lemma", "upos", "xpos", "feats", "deprel", "head", "text")
    assert table[0] == {
        "form": ["I", "do", "n't", "know", "."],
        "lemma": ["I", "do", "not", "know", "."],
        "upos": ["PRON", "AUX", "PART", "VERB", "PUNCT"],
        "xpos": ["PRP", "VBP", "RB", "VB", "."],
        "feats": ["Case=Nom", "_", "_", "_", "_"],
        "deprel": ["nsubj", "aux", "advmod", "root", "punct"],
        "head": ["4", "4", "4", "0", "4"],
        "text": "I don't know.",
    }
    assert table[1]["form"] == ["do", "n't", "go", "!"]
    assert table[1]["text"] == "#don'tgo !"
    assert len(table) == 2
    assert [table.where(index) for index in (0, 1)] == [f"{tmp_path}/x.conllu.gz, line {line}" for line in (3, 13)]


@pytest.mark.usefixtures("pieces")
def test_conll(tmp_path: Path) -> None:
    data = "## parted by : \\t\n## one\t<나:PS>\n나\tB\n \tO\n#\tO\n\n\n#\tO\n## x\tO\n"
    with pytest.raises(DataError, match=r"x.conll, line 3: .* one cell, 'x'"):
        open_table(write(tmp_path / "x.conll", "\n# a\nx\n"))
    table = open_table(write(tmp_path / "x.tsv", data), format="conll")
    assert list(table) == [
        {"form": ["나", " ", "#"], "tag": ["B", "O", "O"]},
        {"form": ["#", "## x"], "tag": ["O", "O"]},
    ]
    assert table.where(1) == f"{tmp_path}/x.tsv, line 8"
    spaced = open_table(write(tmp_path / "x.conll", "# all of it\na  B\n# O\n \n# O\nb O \n\n# a comment\nc O"))
    assert [row["form"] for row in spaced] == [["a", "#"], ["#", "b"], ["c"]]
    many = write(tmp_path / "y.conll", "EU NNP I-NP B-ORG\nrejects VBZ I-VP O\n")
    assert open_table(many).columns == ("form", "2", "3", "tag")
    named = open_table(many, columns=["form", "pos", "chunk", "ner"])
    assert named[0]["ner"] == ["B-ORG", "O"]


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("packing", PACK)
def test_parallel_files(tmp_path: Path, packing: str) -> None:
    first = write(tmp_path / f"train.de{packing}", "eins\n\ndrei\n")
    second = write(tmp_path / f"train.en{packing}", "one\r\ntwo, or a much longer line than that\r\nthree")
    told: list[int] = []
    table = open_parallel(first, second, progress=told.append)
    assert list(table)[1:] == [
        {"source": "", "target": "two, or a much longer line than that"},
        {"source": "drei", "target": "three"},
    ]
    assert table.where(2) == f"{first} and {second}, line 3"
    assert told == sorted(told)
    assert told[-1] == first.stat().st_size + second.stat().st_size
    short = write(tmp_path / "short.en", "one\ntwo\n")
    for paths, counts in (((first, short), "2 and 3"), ((short, first), "3 and 2")):
        with pytest.raises(DataError) as caught:
            open_parallel(*paths)
        assert str(caught.value) == (
            f"expected as many lines in {paths[1]} as in {paths[0]}, line by line the same, got {counts}: see whether"
            " one of them lacks lines or has blank ones too many"
        )


# Headers and columns.


@pytest.mark.parametrize("kind", ["tsv", "csv"])
@pytest.mark.parametrize(
    "first, given, columns, rows",
    [
        ("id text", {}, "id text", 1),
        ("id text", {"wanted": ["text"]}, "id text", 1),
        ("id text", {"wanted": ["text", "absent"]}, "id text", 1),
        ("id text", {"columns": ["a", "b"]}, "a b", 2),
        ("id text", {"columns": ["id", "text"]}, "id text", 1),
        ("id text", {"columns": ["a", "b"], "header": True}, "a b", 1),
        ("id text", {"header": False}, "1 2", 2),
        ("id text", {"wanted": ["2"]}, "1 2", 2),
        ("id text", {"wanted": ["2", "3"]}, "1 2", 2),
        ("1 text", {"wanted": ["1", "2"]}, "1 2", 2),
        ("1 2", {"wanted": ["1", "2"]}, "1 2", 1),
        ("1 2 Phase", {"wanted": ["2", "Phase"]}, "1 2 Phase", 1),
        ("1 2", {"wanted": ["1"], "header": False}, "1 2", 2),
        ("1 2", {"header": True}, "1 2", 1),
        (" 0", {}, "1 0", 1),
    ],
)
def test_headers(tmp_path: Path, kind: str, first: str, given: dict[str, Any], columns: str, rows: int) -> None:
    data = f"{first}\n{' '.join('x' * len(columns.split()))}\n".replace(" ", "\t" if kind == "tsv" else ",")
    table = open_table(write(tmp_path / f"x.{kind}", data), **given)
    assert table.columns == tuple(columns.split())
    assert len(table) == rows
    assert set(table[-1].values()) == {"x"}


def test_missing_columns_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "reviews.tsv", as_bytes(ROWS, "tsv"))
    end = "the columns are id, text, label (where there is no header they are called 1, 2, ...)"
    table = open_table(path)
    table.expect_columns(["label", "id"])
    for call in (
        lambda: table.expect_columns(["id", "txt"]),
        lambda: table.column("txt"),
        lambda: table.take([], "txt"),
    ):
        with pytest.raises(DataError) as caught:
            call()
        assert str(caught.value).startswith(f"{path}: there is no column 't")
    with pytest.raises(DataError) as caught:
        table.expect_columns(["txt"])
    assert str(caught.value) == f"{path}: there is no column 'txt', did you mean 'text'? {end}"
    with pytest.raises(DataError) as caught:
        open_table(path, wanted=["sentiment"])
    assert str(caught.value) == f"{path}: there is no column 'sentiment': {end}"
    with pytest.raises(DataError, match=r"the columns are x{37}\.\.\. \("):
        open_table(write(path, f"{'x' * 50}\na\n"), wanted=["text"])


def test_several_files_are_one_table(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    first = write(tmp_path / "a.tsv", "id\ttext\n1\ta\n")
    second = write(tmp_path / "more" / "b.csv.gz", "id,text\n2,b\n3,c\n")
    empty = [write(tmp_path / "empty.tsv", ""), write(tmp_path / "header.tsv", "id\ttext\n")]
    table = open_table([empty[0], str(first), empty[1], second])
    assert list(table.column("text")) == ["a", "b", "c"]
    assert [table.where(index) for index in range(3)] == [
        f"{first}, line 2",
        f"{second}, line 2",
        f"{second}, line 3",
    ]
    assert [table.folder(index) for index in range(3)] == [tmp_path, tmp_path / "more", tmp_path / "more"]
    other = write(tmp_path / "c.tsv", "text\tid\nd\t4\n")
    with pytest.raises(DataError) as caught:
        open_table([first, other])
    assert str(caught.value) == (
        f"{other}: expected the columns of {first}, id, text, got text, id: files of one table have the same"
    )
    lists = write(tmp_path / "d.jsonl", '{"id": "5", "text": ["a"]}\n')
    with pytest.raises(DataError) as caught:
        open_table([first, lists])
    assert str(caught.value) == f"{lists}, line 1: column 'text': expected a text, as in the rows before, got a list"
    nothing = tmp_path / "e.parquet"
    pq.write_table(pa.table({"id": ["6"], "text": [None]}, pa.schema([("id", "string"), ("text", "string")])), nothing)
    assert list(open_table([lists, nothing]).column("text")) == [["a"], []]
    pq.write_table(pa.table({"id": ["7"], "text": [["b"]]}), nothing)
    assert list(open_table([lists, nothing]).column("text")) == [["a"], ["b"]]
    with pytest.raises(
        DataError, match=r"e\.parquet, row 1: column 'text': expected a text, as in the rows before, got"
    ):
        open_table([first, nothing])


def test_progress_counts_the_bytes_of_all_files(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"x.{kind}.gz", as_bytes(ROWS, kind)) for kind in ("tsv", "csv", "jsonl")]
    paths.append(write(tmp_path / "x.parquet", as_bytes(ROWS, "parquet")))
    told: list[int] = []
    open_table([*paths, paths[0]], progress=told.append)
    assert told == sorted(told)
    assert told[-1] == sum(path.stat().st_size for path in [*paths, paths[0]])


# What is refused.


@pytest.mark.usefixtures("pieces")
def test_rows_of_other_cell_counts_are_refused(tmp_path: Path) -> None:
    tsv = "cells are parted by tabs, and quotes are letters like others (a file of tokens and tags, with blank lines"
    tsv += " between sentences, is of the format conll)"
    csv_ = "cells are parted by commas, and a cell that holds a comma, a quote or a line end stands in quotes"
    path = tmp_path / "x.tsv"
    refused(path, "a\tb\n1\t2\n1\t2\t3\n", f", line 3: expected 2 cells as in line 1, got 3 cells: {tsv}")
    refused(path, "\n\na\tb\n1\t2\n1\n", f", line 5: expected 2 cells as in line 3, got 1 cell: {tsv}")
    refused(path, "a\tb\n\n\n1\t2\n", f", line 2: expected 2 cells as in line 1, got a blank line: {tsv}")
    refused(path, "a\nb\n1\t2\n", f", line 3: expected 1 cell as in line 1, got 2 cells: {tsv}")
    path = tmp_path / "x.csv"
    refused(path, 'a,b\n"1\n",2\n1\n', f", line 4: expected 2 cells as in line 1, got 1 cell: {csv_}")
    assert list(open_table(write(path, 'a\n\n""\nb\n')).column("a")) == ["", "", "b"]
    refused(
        path,
        "a,b\n",
        ", line 1: expected 3 cells, for the columns a, b, c, got 2: give as many names",
        columns=["a", "b", "c"],
    )
    conll = ": spaces part them, and a blank line parts sentences"
    refused(
        tmp_path / "x.conll",
        "\na A\nb B\n\nc\n",
        f", line 5: expected 2 cells as in line 2, got 1 cell{conll}",
    )
    refused(
        tmp_path / "y.conll",
        "a\tA\n\nb\tB\tC\n",
        f", line 3: expected 2 cells as in line 1, got 3 cells{conll.replace('spaces', 'tabs', 1)}",
    )


def test_quotes_that_are_not_as_expected_are_refused(tmp_path: Path) -> None:
    expected = "expected quotes as in RFC 4180, got a row that breaks off or goes on after one"
    mend = "write a quote inside a quoted cell twice, or give the format tsv, where quotes are letters"
    refused(tmp_path / "x.csv", 'a,b\n"1\n2",2\n"x"y,3\n', f", line 4: {expected} (',' expected after '\"'): {mend}")
    refused(tmp_path / "x.csv", 'a,b\n1,2\n3,"x\ny\n', f", line 3: {expected} (unexpected end of data): {mend}")


def test_column_names_must_differ(tmp_path: Path) -> None:
    end = "rename one, or give names with columns; if the line is no header, say header=False"
    expected = f": expected a name for each column, got 'a' twice: {end}"
    refused(tmp_path / "x.tsv", "\na\tb\ta\n1\t2\t3\n", f", line 2{expected}")
    refused(tmp_path / "x.csv", "1,2\n", f", line 1{expected}", columns=["a", "a"])
    pq.write_table(pa.table([[1], [2]], ["a", "a"]), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x.parquet: expected a name for each column, got 'a' twice"):
        open_table(tmp_path / "x.parquet")


@pytest.mark.parametrize("kind", FORMATS)
def test_files_without_rows_are_refused(tmp_path: Path, kind: str) -> None:
    end = ": expected one at least, below the header if there is one"
    path = tmp_path / "x"
    blank = {"tsv": "a\tb\n\n", "csv": "a,b\n\n", "conllu": "# x\n\n\n", "conll": "# x\n\n", "jsonl": "\n"}
    if kind == "parquet":
        pq.write_table(pa.table({"a": pa.array([], pa.string())}), path)
        with pytest.raises(DataError, match="there are no rows in"):
            open_table(path, format=kind)
        with pytest.raises(DataError, match="cannot read this Parquet file"):
            open_table(write(path, ""), format=kind)
        return
    for data in ("", "\ufeff", blank.get(kind, "")):
        with pytest.raises(DataError) as caught:
            open_table(write(path, data), format=kind)
        assert str(caught.value) == f"there are no rows in {path}{end}"


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "conllu", "conll", "text"])
def test_bytes_that_are_no_text_are_refused(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "x", "가".encode() + b"\xff")
    with pytest.raises(DataError, match=r"x: byte 3 \(0xff\) is no UTF-8: convert the file"):
        open_table(path, format=kind)
    with pytest.raises(DataError, match=r"x: byte 1 is NUL: this looks like a binary file"):
        open_table(write(path, b"a\0"), format=kind)


def test_bytes_that_are_no_text_are_replaced_if_wished(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tsv.xz", b"a\tb\n\xff\t\0\n")
    assert open_table(path, errors="replace")[0] == {"a": "\ufffd", "b": "\ufffd"}
    text = write(tmp_path / "x.txt", b"\xff")
    assert open_parallel(text, text, errors="replace")[0] == {"source": "\ufffd", "target": "\ufffd"}


def test_characters_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    refused(
        path,
        '{"a": "x"}\n\n{"a": "\\u0000"}\n',
        ", line 3: column 'a': expected text, got a NUL character in it: write it without",
    )
    refused(
        path,
        '{"a": ["\\ud800"]}\n',
        ", line 1: column 'a': expected text, got half a character ('\\ud800'): write it whole or leave it out",
    )
    pq.write_table(pa.table({"a": ["x", "a\0"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x.parquet, row 2: column 'a': expected text, got a NUL character"):
        open_table(tmp_path / "x.parquet")
    raw = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())
    pq.write_table(pa.table({"a": raw}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x.parquet, rows 1 to 1: column 'a' holds bytes that are no UTF-8 \("):
        open_table(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    "data, message",
    [
        ('{"a": 1}\n{"a": 1\n', "line 2: {json}, got what is none: Expecting ',' delimiter at character 8"),
        ('{"a": 1, "a": 2}', "line 1: {json}, got what is none: 'a' stands in it twice"),
        ("[" * 100_000, "line 1: {json}, got what is none: *"),
        ('["a"]', "line 1: expected names with values, as {{'text': '...'}}, got ['a']"),
        ("{{}}", "line 1: expected names with values, as {{'text': '...'}}, got {{}}"),
        (
            '{"a": 1}\n{"b": 1}',
            "line 2: expected the names a, got b: give each row the same, with null for what is not known",
        ),
        ('{"a": "x"}\n{"a": ["x"]}', "line 2: column 'a': expected a text, as in the rows before, got a list"),
        ('{"a": ["x"]}\n{"a": "x"}', "line 2: column 'a': expected a list, as in the rows before, got a text"),
    ],
)
def test_json_that_is_not_as_expected_is_refused(tmp_path: Path, data: str, message: str) -> None:
    path = write(tmp_path / "x.jsonl", data.replace("{{}}", "{}"))
    message = message.format(json='expected one JSON object, as {"text": "..."}')
    with pytest.raises(DataError) as caught:
        open_table(path)
    assert str(caught.value).startswith(f"{path}, {message.removesuffix('*')}")
    assert message.endswith("*") or str(caught.value) == f"{path}, {message}"
    assert "\n" not in str(caught.value)


def test_conllu_that_is_not_as_expected_is_refused(tmp_path: Path) -> None:
    word = "\tx" * 9
    ten = (
        ": expected the ten cells of CoNLL-U, parted by tabs, the first a number (1, 1-2 or 1.1), got {}, the first"
        " '{}'; where lines are only token and tag, give the format conll"
    )
    path = tmp_path / "x.conllu"
    refused(path, f"1{word}\n2\tx\n", ", line 2" + ten.format(2, "2"))
    refused(path, f"# a\na{word}\n", ", line 2" + ten.format(10, "a"))
    sentences = ": a blank line parts sentences"
    refused(path, f"1{word}\n1{word}\n", f", line 2: expected word 2 of its sentence, got 1{sentences}")
    refused(path, f"2{word}\n", f", line 1: expected word 1 of its sentence, got 2{sentences}")


def test_parquet_that_holds_no_cells_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a"], "image": [{"bytes": b"x"}], "raw": [b"x"]}), path)
    with pytest.raises(DataError) as caught:
        open_table(path)
    assert str(caught.value) == (
        f"{path}: column 'image': expected text, numbers or lists of them, got struct<bytes: binary>: write the file"
        " without it, or ask only for the columns that are wanted"
    )
    with pytest.raises(DataError, match="column 'raw': expected text, numbers or lists of them, got binary"):
        open_table(path, wanted=["text", "raw"])
    assert open_table(path, wanted=["text"])[0] == {"text": "a"}
    pq.write_table(pa.table({"raw": [b"x"]}), tmp_path / "y.parquet")
    with pytest.raises(DataError, match=r"y\.parquet: expected columns of text, numbers or lists of them, got none"):
        open_table(tmp_path / "y.parquet", wanted=["text"])
    whole = path.read_bytes()
    for data in (b"no parquet at all", whole[:-20], whole[:10], whole[:20] + b"\xff" * 40 + whole[60:]):
        with pytest.raises(DataError, match=r"x.parquet(: cannot read this Parquet file|, rows 1 to 1): ") as caught:
            open_table(write(path, data), wanted=["text"])
        assert "\n" not in str(caught.value)


def test_paths_that_are_no_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "reviews.tsv", "a\n")
    with pytest.raises(DataError, match=r"reviws.tsv: there is no such file or folder: did you mean 'reviews.tsv'\?"):
        open_table(tmp_path / "reviws.tsv")
    with pytest.raises(DataError, match=r": expected a file, this is a folder: name the files in it$"):
        open_parallel(tmp_path / "reviews.tsv", tmp_path)
    with pytest.raises(ConfigError, match=r"^paths: expected one file at least, got none$"):
        open_table([])
    broken = tmp_path / "x.tsv.gz"
    broken.write_bytes(gzip.compress(b"a\tb\n" * 1000)[:-9])
    with pytest.raises(DataError, match=r"x.tsv.gz: this .gz file is damaged or cut off: "):
        open_table(broken)


@pytest.mark.parametrize(
    "name, given, message",
    [
        ("x.tsv", {"format": "tvs"}, "format: unknown value 'tvs': did you mean 'tsv'?"),
        ("x.tsv", {"errors": "ignore"}, "errors: unknown value 'ignore': known: replace, strict"),
        ("x.tsv", {"header": "yes"}, "header: expected 'auto', True or False, got 'yes'"),
        ("x.tsv", {"columns": "text"}, "columns: expected a list of names, got the text 'text': give ['text']"),
        ("x.tsv", {"wanted": "text"}, "wanted: expected a list of names, got the text 'text': give ['text']"),
        (
            "x.txt",
            {"header": True},
            "{path}: header: only tsv and csv files have one, and this is text: leave header out",
        ),
        (
            "x.jsonl",
            {"columns": ["a"]},
            "{path}: columns: jsonl files name their own columns: leave columns out",
        ),
    ],
)
def test_settings_are_checked(tmp_path: Path, name: str, given: dict[str, Any], message: str) -> None:
    path = write(tmp_path / name, '{"a": 1}\n')
    with pytest.raises(ConfigError) as caught:
        open_table(path, **given)
    assert str(caught.value) == message.format(path=path)


# Rows of a program.


class Slices:
    """What a data set of another library looks like from here."""

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self._columns = columns

    @property
    def column_names(self) -> list[str]:
        return list(self._columns)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, rows: slice) -> dict[str, list[Any]]:
        return {name: column[rows] for name, column in self._columns.items()}

    def select_columns(self, names: list[str]) -> Slices:
        return Slices({name: self._columns[name] for name in names})


def test_rows_of_a_program() -> None:
    rows = [
        {"t": "a", "n": 1, "x": np.float32(0.5), "l": ["a", "b"], "v": np.arange(2), "none": None},
        {"t": "b", "n": 2.5, "x": np.int64(3), "l": ("c",), "v": np.array([]), "none": True},
    ]
    table = table_of(iter(rows))
    assert list(table) == [
        {"t": "a", "n": "1", "x": "0.5", "l": ["a", "b"], "v": ["0", "1"], "none": ""},
        {"t": "b", "n": "2.5", "x": "3", "l": ["c"], "v": [], "none": "true"},
    ]
    assert table.where(1) == "row 2"
    assert table.folder(1) == Path()
    assert table_of(rows, columns=["n", "t"])[1] == {"n": "2.5", "t": "b"}
    data = {name: [row[name] for row in rows] for name in rows[0]}
    assert table_of(Slices(data)).fingerprint == table.fingerprint
    assert list(table_of(Slices({"n": list(range(2500))})).column("n")) == [str(number) for number in range(2500)]
    assert table_of(Slices({**data, "picture": [object(), object()]}), columns=["t"])[0] == {"t": "a"}


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "there are no rows in rows: expected one at least, below the header if there is one"),
        (["a"], "row 1: expected names with values, as {'text': '...'}, got 'a'"),
        ([{1: "a"}], "row 1: expected names with values, as {'text': '...'}, got {1: 'a'}"),
        ([{"a": "x"}, {}], "row 2: expected names with values, as {'text': '...'}, got {}"),
        (
            [{"a": "x"}, {"a": b"x"}],
            "row 2: column 'a': expected text, a number or a list of them, got bytes: leave this column out",
        ),
        ([{"a": "x"}, {"a": ["x"]}], "row 2: column 'a': expected a text, as in the rows before, got a list"),
        ("reviews.tsv", "expected an iterable of dicts, got str: files are for open_table"),
        ({"a": ["x"]}, "expected an iterable of dicts, got dict: files are for open_table"),
        (3, "expected an iterable of dicts, got int: files are for open_table"),
    ],
)
def test_rows_that_are_not_as_expected_are_refused(rows: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        table_of(rows)
    assert str(caught.value) == message


def test_columns_that_rows_lack_are_named() -> None:
    with pytest.raises(DataError, match="row 2: expected the names a, got b: give each row the same"):
        table_of([{"a": "x", "b": "y"}, {"b": "z"}], columns=["a"])
    with pytest.raises(DataError, match=r"there is no column 'txt': did you mean 'text'\?"):
        table_of(Slices({"text": ["a"]}), columns=["txt"])
    several = type("Splits", (), {"column_names": {"train": ["a"]}, "__getitem__": lambda *_: None})()
    with pytest.raises(DataError, match="expected one data set, got several: choose one of train"):
        table_of(several)


# The table itself.


@pytest.mark.usefixtures("pieces")
@given(st.data())
def test_views_are_rows_of_the_table(data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.fixed_dictionaries({"a": texts, "b": st.lists(texts)}), min_size=1, max_size=40))
    if not any(row["b"] for row in rows):
        rows[0]["b"] = ["x"]
    table = table_of(rows)
    assert len(table) == len(rows)
    indices = st.lists(st.integers(-len(rows), len(rows) - 1), max_size=30)
    chosen = data.draw(indices)
    assert table.take(chosen) == [rows[index] for index in chosen]
    assert table.take(chosen, ["b"]) == [{"b": rows[index]["b"]} for index in chosen]
    view = table.select(chosen)
    assert list(view) == [rows[index] for index in chosen]
    assert list(view.column("a")) == [rows[index]["a"] for index in chosen]
    assert [view.where(index) for index in range(len(view))] == [f"row {index % len(rows) + 1}" for index in chosen]
    assert view.select(np.arange(len(view))[::-1]).take(range(len(view))) == list(view)[::-1]
    for name in "ab":
        assert list(table.column(name)) == [row[name] for row in rows]


def test_rows_that_there_are_not() -> None:
    table = table_of(ROWS)
    assert table[-1] == table[np.int64(3)] == ROWS[3]
    for call in (lambda: table[4], lambda: table[-5], lambda: table.where(4), lambda: table.take([0, 4])):
        with pytest.raises(IndexError, match=r"rows: row (4|-5): there are 4"):
            call()
    with pytest.raises(IndexError, match="rows: row 9: there are 4"):
        table.select([0, 9])
    with pytest.raises(IndexError, match="rows: row 1: there are 1"):
        table.select([3])[1]


def test_a_split_draws_rows_at_random() -> None:
    table = table_of({"n": number} for number in range(1000))
    train, valid = table.split(0.1, seed=3)
    assert (len(train), len(valid)) == (900, 100)
    drawn = [int(str(cell)) for cell in valid.column("n")]
    assert drawn == sorted(drawn)
    assert sorted([*drawn, *(int(str(cell)) for cell in train.column("n"))]) == list(range(1000))
    assert drawn[:5] == [15, 21, 24, 33, 64]  # the same on every machine, with every version of numpy
    assert 20 < sum(number < 500 for number in drawn) < 80
    assert valid.fingerprint == table.split(0.1, seed=3)[1].fingerprint
    prints = {part.fingerprint for part in (table, train, valid, *table.split(0.1, seed=4))}
    assert len(prints) == 5
    with pytest.raises(ConfigError, match="fraction: expected a number between 0 and 1, got 1"):
        table.split(1, seed=0)
    with pytest.raises(ConfigError, match="seed: expected 0 or more, got -1"):
        table.split(0.5, seed=-1)
    with pytest.raises(DataError, match=r"rows: there are 4 rows, too few to split off a fraction of 0\.99 for"):
        table_of(ROWS).split(0.99, seed=0)


@pytest.mark.usefixtures("pieces")
def test_the_fingerprint_tells_contents_apart() -> None:
    different: list[list[dict[str, Any]]] = [
        [{"a": "ab", "b": "c"}],
        [{"a": "a", "b": "bc"}],
        [{"b": "c", "a": "ab"}],
        [{"a": "c", "b": "ab"}],
        [{"a": "ab"}, {"a": "c"}],
        [{"a": "a"}, {"a": "bc"}],
        [{"a": "abc"}],
        [{"a": ["abc"]}],
        [{"a": ["ab", "c"]}],
        [{"a": ["ab"]}, {"a": ["c"]}],
        [{"a": ["ab", "c"]}, {"a": []}],
        [{"a": []}, {"a": ["ab", "c"]}],
        [{"a": "", "a 64": ""}],
    ]
    prints = [table_of(rows).fingerprint for rows in different]
    assert len(set(prints)) == len(prints)
    assert all(len(fingerprint) == 64 and int(fingerprint, 16) >= 0 for fingerprint in prints)
    many = [{"a": str(number), "b": ["x"] * (number % 3)} for number in range(50)]
    expected = "7085"
    assert table_of(many).fingerprint[:4] == expected  # however it comes in batches


def test_cells_are_mapped_and_their_file_has_no_name(tmp_path: Path) -> None:
    (tmp_path / "spill").mkdir()
    table = open_table(write(tmp_path / "x.tsv", as_bytes(ROWS, "tsv")), directory=tmp_path / "spill")
    assert list((tmp_path / "spill").iterdir()) == []
    assert list(table) == ROWS
    with pytest.raises(StorageError, match=r"nowhere: cannot write the table here \(No such file or directory\)"):
        table_of(ROWS, directory=tmp_path / "nowhere")


MEASURED = """
import resource, sys
from unrolled.data.tables import open_table
open_table(sys.argv[2])  # loads what is loaded only once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
table = open_table(sys.argv[1], directory=sys.argv[3])
print(len(table), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_large_table_opens_in_little_memory(tmp_path: Path) -> None:
    row = f"1\t{'영화가 재미있었다 ' * 8}\t1\n"
    small = write(tmp_path / "small.tsv", f"id\ttext\tlabel\n{row}")
    large = write(tmp_path / "large.tsv", f"id\ttext\tlabel\n{row * 300_000}")
    assert large.stat().st_size > 50e6
    done = subprocess.run([sys.executable, "-c", MEASURED, large, small, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows, kibibytes = map(int, done.stdout.split())
    assert rows == 300_000
    # About 30 MB of batches in work; the whole would be 170 MB in Python, and 60 MB in Arrow.
    assert kibibytes < 50_000


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = r"cannot write the table here \(No space left on device\): name another folder, or set TMPDIR"
    with Path("/dev/full").open("w+b", buffering=0) as full:
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: full)
        with pytest.raises(StorageError, match=expected):
            table_of(ROWS)


def test_a_table_shows_itself() -> None:
    assert repr(table_of(ROWS)) == "<Table rows: 4 rows of id, text, label>"
    assert isinstance(table_of(ROWS), Table)
