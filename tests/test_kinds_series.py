"""Series and vectors as input: scaled by what the training part tells, and refused where they are no numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ends import Small, again, config_of

from unrolled.errors import DataError
from unrolled.kinds.contract import INPUTS
from unrolled.kinds.number import Number
from unrolled.kinds.series import Series, Vector, series_of

CONFIG = config_of("input.kind=series", "output.kind=number")
DRAW = np.random.default_rng(0)
LONG = DRAW.normal([10.0, -3.0, 0.5], [2.0, 100.0, 0.01], (40, 3))
SHORT = DRAW.normal(5.0, 1.0, (7, 3))


def test_kinds_are_known() -> None:
    assert INPUTS["series"] is Series
    assert INPUTS["vector"] is Vector


def test_columns_are_scaled_by_the_mean_and_deviation_of_all_that_is_learnt_from() -> None:
    series = Series.learn([LONG, SHORT], CONFIG)
    (encoded,) = series.encode(LONG)
    together = np.concatenate([LONG, SHORT])
    np.testing.assert_allclose(encoded, (LONG - together.mean(0)) / together.std(0), rtol=1e-5, atol=1e-6)
    assert encoded.dtype == np.float32


def test_encoding_another_series_changes_no_scale() -> None:
    series = Series.learn([LONG], CONFIG)
    before = again(series)
    series.encode(SHORT * 1000)
    np.testing.assert_array_equal(series.encode(LONG)[0], before.encode(LONG)[0])
    assert np.abs(series.encode(SHORT * 1000)[0]).max() > 100, "values unlike the training part's stay unlike them"


def test_a_column_that_never_changes_is_only_moved() -> None:
    series = Series.learn([np.array([[4.0, 1.0], [4.0, 3.0]])], CONFIG)
    np.testing.assert_allclose(series.encode([[6.0, 2.0]])[0], [[2.0, 0.0]])


@pytest.mark.parametrize("raw", [LONG, SHORT[:1]])
def test_json_gives_the_same_encoding(raw: Any) -> None:
    series = Series.learn([LONG, SHORT], CONFIG)
    np.testing.assert_array_equal(again(series).encode(raw)[0], series.encode(raw)[0])
    vector = Vector.learn(list(LONG), CONFIG)
    np.testing.assert_array_equal(again(vector).encode(raw[0])[0], vector.encode(raw[0])[0])


def test_one_column_may_be_given_flat_and_integers_are_numbers() -> None:
    np.testing.assert_array_equal(series_of([1, 2, 3]), [[1.0], [2.0], [3.0]])
    np.testing.assert_array_equal(series_of(np.array([1.5, 2.5], np.float32)), [[1.5], [2.5]])


def test_files_are_read_as_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "long.npy", LONG)
    np.save(tmp_path / "flat.npy", LONG[:, 0])
    np.testing.assert_array_equal(series_of(tmp_path / "long.npy"), LONG)
    np.testing.assert_array_equal(series_of(str(tmp_path / "flat.npy")), LONG[:, :1])
    vector = Vector.learn(list(LONG), CONFIG)
    np.save(tmp_path / "vector.npy", LONG[0])
    np.testing.assert_array_equal(vector.encode(tmp_path / "vector.npy")[0], vector.encode(LONG[0])[0])


def changed(step: int, column: int, value: float) -> Any:
    array = LONG.copy()
    array[step, column] = value
    return array


@pytest.mark.parametrize(
    "raw, message",
    [
        (changed(4, 1, np.nan), "column 2, step 5: expected a finite number, got nan"),
        (changed(0, 2, -np.inf), "column 3, step 1: expected a finite number, got -inf"),
        (LONG[:, :2], "expected 3 numbers a step, got 2"),
        (LONG[:0], "the series is empty: expected at least one step"),
        ([], "the series is empty: expected at least one step"),
        (LONG[None], "expected numbers [steps, columns], got an array of shape [1, 40, 3]"),
        ([[1.0, 2.0], [1.0]], "expected numbers [steps, columns], got rows of different lengths"),
        ([["a", "b", "c"]], "expected numbers [steps, columns], got str32"),
    ],
)
def test_a_series_that_cannot_be_used_is_refused(raw: Any, message: str) -> None:
    series = Series.learn([LONG], CONFIG)
    with pytest.raises(DataError) as caught:
        series.encode(raw)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "raw, message",
    [
        ([1, "x", 3], "column 2: expected a number, got 'x'"),
        ([1, 2, float("inf")], "column 3: expected a finite number, got inf"),
        ([1, 2], "expected 3 numbers, got 2"),
        ([], "the vector is empty: expected at least one number"),
        (LONG, "expected a vector [numbers], got an array of shape [40, 3]"),
    ],
)
def test_a_vector_that_cannot_be_used_is_refused(raw: Any, message: str) -> None:
    vector = Vector.learn(list(LONG), CONFIG)
    with pytest.raises(DataError) as caught:
        vector.encode(raw)
    assert str(caught.value) == message


def test_learning_refuses_series_of_different_width() -> None:
    with pytest.raises(DataError, match="expected 3 numbers a step, as before, got 2"):
        Series.learn([LONG, LONG[:, :2]], CONFIG)


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY\x01\x00garbage", b"PK\x03\x04 no archive"])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.npy"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        series_of(path)
    assert str(caught.value).startswith(f"{path}: not a whole .npy file of numbers: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_cut_short_missing_pickled_or_an_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "series.npy"
    np.save(path, LONG)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"series.npy: not a whole .npy file"):
        series_of(path)
    with pytest.raises(DataError, match=r"cannot read .*gone.npy: No such file or directory"):
        series_of(tmp_path / "gone.npy")
    np.save(path, np.array([print], object), allow_pickle=True)
    with pytest.raises(DataError, match=r"series.npy: not a whole .npy file of numbers: Object arrays"):
        series_of(path)
    np.savez(tmp_path / "several.npz", LONG)
    with pytest.raises(DataError, match=r"several.npz: expected a .npy file with one array"):
        series_of(tmp_path / "several.npz")


def test_reader_hands_on_the_scaled_numbers_in_the_models_dtype() -> None:
    series = Series.learn([LONG], CONFIG)
    steps = series.collate([series.encode(LONG), series.encode(SHORT)])
    reader = series.reader(CONFIG)
    assert reader.step_size == 3
    assert not list(reader.parameters())
    assert not reader.state_dict()
    x = reader(*steps.tensors)
    assert x.shape == (40, 2, 3)
    assert steps.lengths.tolist() == [40, 7]
    torch.testing.assert_close(x[:7, 1], torch.from_numpy(series.encode(SHORT)[0]))
    assert reader.double()(*steps.tensors).dtype == torch.float64


def test_padding_changes_no_answer() -> None:
    torch.manual_seed(0)
    model = Small(CONFIG, Series.learn([LONG], CONFIG), Number.learn([1.0, 2.0], CONFIG)).eval()
    alone, together = model.raw([SHORT]), model.raw([SHORT, LONG])
    torch.testing.assert_close(together[0], alone[0])


@pytest.mark.parametrize("kind", [Series, Vector])
def test_a_sum_is_learnt(kind: Any) -> None:
    torch.manual_seed(0)
    draw = np.random.default_rng(1)
    values = [draw.normal(3.0, 2.0, 4) for _ in range(64)]
    inputs = [value[:, None] for value in values] if kind is Series else values
    sums = [float(value.sum()) for value in values]
    model = Small(CONFIG, kind.learn(inputs, CONFIG), Number.learn(sums, CONFIG))
    first = model.mean_loss(inputs, sums)
    model.learn([(inputs, sums)] * 100)
    assert model.mean_loss(inputs, sums) < first / 20
