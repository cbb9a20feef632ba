"""Tables to examples to batches: raw values, ragged arrays in mapped files, the order of batches."""

from __future__ import annotations

import mmap
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unrolled.config import resolve
from unrolled.data import Batches, Examples, encode_examples, forecast_values, open_data, read_values
from unrolled.data.examples import Values
from unrolled.data.ragged import Ragged, RaggedWriter
from unrolled.data.scratch import Held
from unrolled.errors import ConfigError, DataError
from unrolled.kinds import Ends, Label, Labels, Number, Text
from unrolled.progress import Silent
from unrolled.training.courses import _Told

ROWS = [{"text": text, "label": label} for text, label in [("a b c", "x"), ("d", "y"), ("e f", "x"), ("g h i j", "y")]]


def config_of(input: str = "text", output: str = "label", **settings: Any) -> Any:
    from unrolled.config import flag_key, parse_end

    layers = [parse_end("input", input), parse_end("output", output)]
    for name, value in settings.items():
        section, key = flag_key(name).split(".")
        layers.append({section: {key: value}})
    return resolve(*layers)


def encoded(rows: list[dict[str, Any]] = ROWS, **settings: Any) -> Examples:
    config = config_of(**settings)
    values = read_values(open_data(rows, config), config)
    kinds: dict[str, Any] = {"label": Label, "labels": Labels, "number": Number}
    output = kinds[config.output.kind].learn([y for _, y in values], config)
    return encode_examples(values, Ends(Text.learn([x for x, _ in values], config), output))


@given(st.lists(st.lists(st.integers(0, 200), max_size=5), max_size=8))
def test_a_ragged_array_gives_back_what_was_written(arrays: list[list[int]]) -> None:
    writer = RaggedWriter()
    for array in arrays:
        writer.append(np.array(array, np.uint8))
    ragged = writer.finish()
    assert len(ragged) == len(arrays)
    assert [ragged[i].tolist() for i in range(len(ragged))] == arrays


def test_a_ragged_array_is_written_in_pieces_and_the_last_can_be_dropped() -> None:
    writer = RaggedWriter()
    assert writer.append(np.ones((2, 3), np.float32)) == 2
    assert writer.append(np.full((1, 3), k, np.float32) for k in range(4)) == 4
    writer.append(np.zeros((5, 3), np.float32))
    writer.drop_last()
    ragged = writer.finish()
    assert ragged.lengths.tolist() == [2, 4]
    assert ragged[1][:, 0].tolist() == [0, 1, 2, 3]


def test_values_are_those_of_the_named_columns() -> None:
    config = config_of("text:label", "label:text")
    values = read_values(open_data(ROWS, config), config)
    assert list(values) == [(row["label"], row["text"]) for row in ROWS]
    assert values[2] == ("x", "e f")


def test_a_missing_column_is_named_with_the_nearest() -> None:
    config = config_of("text:txt", "label")
    with pytest.raises(DataError, match=r"txt.*did you mean 'text'"):
        read_values(open_data(ROWS, config), config)


def test_rows_of_a_group_are_one_example() -> None:
    rows = [
        {"video": v, "x": str(t), "y": str(-t), "phase": p}
        for v, t, p in [("a", 1, "u"), ("b", 5, "u"), ("a", 2, "v"), ("b", 6, "v"), ("a", 3, "u")]
    ]
    config = config_of("series:x,y", "labels:phase", group="video")
    values = read_values(open_data(rows, config), config)
    (xa, ya), (xb, yb) = values
    assert xa.tolist() == [[1, -1], [2, -2], [3, -3]]
    assert ya == ["u", "v", "u"]
    assert xb.tolist() == [[5, -5], [6, -6]]
    assert yb == ["u", "v"]


def test_a_row_may_be_a_whole_series() -> None:
    rows = [{"a": "1", "b": "2", "c": "3", "d": "4", "label": "x"}]
    config = config_of("series:a,b,c,d", "label", width=2)
    ((value, _),) = read_values(open_data(rows, config), config)
    assert value.tolist() == [[1, 2], [3, 4]]
    config = config_of("series:a,b,c", "label", width=2)
    with pytest.raises(DataError, match="3 numbers in a row do not make steps of 2"):
        list(read_values(open_data(rows, config), config))


def test_a_split_is_drawn_and_the_same_for_the_same_seed() -> None:
    config = config_of()
    values = read_values(open_data(ROWS * 10, config), config)
    learn, held = values.split(0.25, 3)
    assert (len(learn), len(held)) == (30, 10)
    again = values.split(0.25, 3)[1]
    assert held.fingerprint == again.fingerprint != values.split(0.25, 4)[1].fingerprint
    assert sorted(map(repr, [*learn, *held])) == sorted(map(repr, values))


def test_labels_must_be_as_many_as_words() -> None:
    rows = [{"text": "a b", "label": "X Y"}, {"text": "a b c", "label": "X Y"}]
    with pytest.raises(DataError, match=r"3 steps, got 2"):
        encoded(rows, output="labels:label")


def test_bad_examples_are_skipped_and_listed_if_asked() -> None:
    rows = [*ROWS, {"text": "", "label": "x"}, {"text": "fine", "label": ""}, {"text": "last", "label": "y"}]
    config = config_of()
    values = read_values(open_data(rows, config), config)
    ends = Ends(Text.learn([x for x, _ in values], config), Label.learn([y for _, y in values], config))
    with pytest.raises(DataError, match="the text is empty"):
        encode_examples(values, ends)
    examples = encode_examples(values, ends, skip_bad=True)
    assert examples.kept.tolist() == [0, 1, 2, 3, 6]
    assert [bad.why.split(":")[0] for bad in examples.bad] == ["the text is empty", "the label is empty"]
    assert examples.left_out == 2
    assert [len(examples.inputs[0][i]) for i in range(5)] == [5, 1, 3, 7, 4]
    assert examples.outputs[0].lengths.tolist() == [1] * 5


def peak_of(rows: int) -> int:
    """Bytes that Python held at most while labels were learnt and encoded, all but the last two of the table empty."""

    def get(numbers: Sequence[int]) -> Iterator[tuple[Any, Any]]:
        return (("fine", "xy"[number % 2] if number >= rows - 2 else "") for number in numbers)

    config = config_of(skip_bad=True)
    values = Values(rows, get, lambda number: f"made up, line {number + 2}", "0" * 64)
    text = Text.learn(["fine"], config)
    tracemalloc.start()
    try:
        label = _Told(values, 1, Silent()).teach(Label, config)
        examples = encode_examples(values, Ends(text, label), skip_bad=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert examples.kept.tolist() == [rows - 2, rows - 1]
    assert examples.left_out == rows - 2
    assert [bad.where for bad in examples.bad] == [f"made up, line {number}" for number in range(2, 12)]
    return peak


def test_bad_examples_take_no_memory_however_many_they_are() -> None:
    peak_of(4096)  # what is imported and made once
    few, many = peak_of(4096), peak_of(8 * 4096)
    assert many - few < 10 * 7 * 4096  # a message each would be more than 100 bytes; as many rows are in work at once


class Sizes:
    """Examples of which only lengths matter."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths)
        self.outputs: tuple[Ragged, ...] = ()


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=60),
    st.integers(1, 9),
    st.one_of(st.none(), st.integers(1, 100)),
    st.integers(0, 3),
)
def test_batches_hold_every_example_once_and_keep_their_bounds(
    lengths: list[int], size: int, most: int | None, epoch: int
) -> None:
    batches = Batches(Sizes(lengths), size, most, seed=5)  # type: ignore[arg-type]
    order = batches.epoch(epoch)
    assert sorted(i for rows in order for i in rows.tolist()) == list(range(len(lengths)))
    for rows in order:
        assert 1 <= len(rows) <= size
        if most is not None and len(rows) > 1:
            assert max(lengths[i] for i in rows) * len(rows) <= most
    again = Batches(Sizes(lengths), size, most, seed=5)  # type: ignore[arg-type]
    assert [rows.tolist() for rows in again.epoch(epoch)] == [rows.tolist() for rows in order]


def test_batches_hold_little_padding_and_come_in_a_new_order() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 2000).tolist()
    batches = Batches(Sizes(lengths), 32, None, seed=0)  # type: ignore[arg-type]
    first, second = batches.epoch(0), batches.epoch(1)
    padded = sum(max(lengths[i] for i in rows) * len(rows) for rows in first)
    assert padded < 1.05 * sum(lengths)
    assert [rows.tolist() for rows in first] != [rows.tolist() for rows in second]
    means = [np.mean([lengths[i] for i in rows]) for rows in first]
    assert np.corrcoef(means, np.arange(len(means)))[0, 1] < 0.3  # not from short to long
    with pytest.raises(ConfigError, match="batch size"):
        Batches(Sizes(lengths), 0, None, seed=0)  # type: ignore[arg-type]


def test_forecasts_look_back_and_are_judged_on_what_follows() -> None:
    rows = [{"a": str(t)} for t in range(100)]
    config = config_of("series:a", "next", window=16, horizon=5)
    table = open_data(rows, config)
    learn, _ = forecast_values(table, config, part=(0.0, 0.8))
    _, judged = forecast_values(table, config, part=(0.8, 1.0))
    assert max(float(x.max()) for x, _ in learn) == 79
    assert {len(x) for x, _ in learn} == {17}
    assert [(len(x), float(x[-1, 0]), y[:, 0].tolist()) for x, y in judged] == [
        (16, float(at - 1), [float(at + k) for k in range(5)]) for at in (80, 85, 90, 95)
    ]


def test_the_first_forecast_of_a_file_has_seen_a_season() -> None:
    rows = [{"a": str(t)} for t in range(22)]
    config = config_of("series:a", "next", window=16, horizon=5, season=7)
    _, judged = forecast_values(open_data(rows, config), config)
    assert [(len(x), float(y[0, 0])) for x, y in judged] == [(7, 7.0), (12, 12.0), (16, 17.0)]


def test_python_rows_and_files_give_the_same(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in ROWS))
    config = config_of()
    assert list(read_values(open_data(path, config), config)) == list(read_values(open_data(ROWS, config), config))


def test_batches_are_counted_without_being_put_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = encoded(ROWS * 5)
    batches = Batches(examples, 3, None, seed=1)
    with monkeypatch.context() as patched:
        patched.setattr(Batches, "epoch", None)
        assert [batches.count(epoch) for epoch in (0, 7)] == [7, 7]
    assert [len(batches.epoch(epoch)) for epoch in (0, 7)] == [7, 7]
    few = Batches(examples, 3, 4, seed=1)
    assert few.count(2) == len(few.epoch(2))


def test_a_large_file_is_given_back_as_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mapped(bytes):
        given_back = 0

        def madvise(self, how: int) -> None:
            self.given_back += 1

    small, large = Mapped(2 << 20), Mapped(4 << 20)
    monkeypatch.setattr("unrolled.data.scratch._HELD", 3 << 20)
    for mapped in (small, large):
        held = Held(mapped)  # type: ignore[arg-type]
        for _ in range(100):
            held.note(1)  # the system reads 64 KB
    assert (small.given_back, large.given_back) == (0, 2 if hasattr(mmap, "MADV_DONTNEED") else 0)


def test_values_stay_the_same_when_their_file_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unrolled.data.scratch._HELD", 1)
    config = config_of()
    values = read_values(open_data(ROWS * 100, config), config)
    first = list(values)
    assert first == [(row["text"], row["label"]) for row in ROWS * 100] == list(values)
    examples = encoded(ROWS * 100)
    expected = [Text.encode(examples.ends.input, row["text"])[0].tolist() for row in ROWS * 100]  # type: ignore[arg-type]
    assert [examples.inputs[0][i].tolist() for i in range(400)] == expected
