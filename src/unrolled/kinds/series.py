"""Numbers as input: a series of them, F a step, or one vector."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from unrolled.errors import DataError
from unrolled.kinds.contract import Arrays, Input, register
from unrolled.kinds.number import Scale, Scaled, floats

if TYPE_CHECKING:
    from jaxtyping import Float

    from unrolled.config import Config

__all__ = ["NumbersReader", "Series", "Vector", "series_of"]


def series_of(value: Any) -> npt.NDArray[np.float64]:
    """A raw series as an array [T F]: numbers in an array or in lists, [T F], or [T] for one column; or the path of a
    .npy file of them.

    Raises:
        DataError: the file cannot be read, there is no step, or something is no finite number; columns and steps are
            counted from 1.
    """
    array = _load(value) if isinstance(value, str | os.PathLike) else value
    try:
        array = np.asarray(array)
    except ValueError:
        raise DataError("expected numbers [steps, columns], got rows of different lengths") from None
    if array.dtype.kind not in "iufb":
        raise DataError(f"expected numbers [steps, columns], got {array.dtype.name}")
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or not array.shape[1]:
        raise DataError(f"expected numbers [steps, columns], got an array of shape {list(array.shape)}")
    if not len(array):
        raise DataError("the series is empty: expected at least one step")
    array = array.astype(np.float64)
    wild = np.argwhere(~np.isfinite(array))
    if len(wild):
        step, column = wild[0]
        raise DataError(f"column {column + 1}, step {step + 1}: expected a finite number, got {array[step, column]}")
    return array


def _load(path: str | os.PathLike[str]) -> Any:
    """What a .npy file holds; nothing in it is run, as a pickle's content would be."""
    try:
        loaded = np.load(path, allow_pickle=False)
    except OSError as error:
        raise DataError(f"cannot read {os.fspath(path)}: {error.strerror or error}") from None
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{os.fspath(path)}: not a whole .npy file of numbers: {error}") from None
    if not isinstance(loaded, np.ndarray):
        loaded.close()
        raise DataError(f"{os.fspath(path)}: expected a .npy file with one array, got an archive of several")
    return loaded


class _Read(Scaled, Input):
    def reader(self, config: Config) -> nn.Module:
        return NumbersReader(self.scale.width)


@register
class Series(_Read):
    """A series: F numbers a step; see `series_of` for how it may be given."""

    kind: ClassVar[str] = "series"

    @classmethod
    def check(cls, value: Any) -> None:
        series_of(value)

    @classmethod
    def learn(cls, values: Iterable[Any], config: Config) -> Series:
        return cls(Scale.learn(series_of(value) for value in values))

    def encode(self, value: Any) -> Arrays:
        """The scaled numbers, float32 [T F]."""
        array = series_of(value)
        if array.shape[1] != self.scale.width:
            raise DataError(f"expected {self.scale.width} numbers a step, got {array.shape[1]}")
        return (self.scale.apply(array),)


@register
class Vector(_Read):
    """F numbers, read in one step: an array [F], the cells of a row, or the path of a .npy file of them."""

    kind: ClassVar[str] = "vector"

    @classmethod
    def check(cls, value: Any) -> None:
        _vector(value)

    @classmethod
    def learn(cls, values: Iterable[Any], config: Config) -> Vector:
        return cls(Scale.learn(_vector(value) for value in values))

    def encode(self, value: Any) -> Arrays:
        """The scaled numbers, float32 [1 F]."""
        array = _vector(value)
        if array.shape[1] != self.scale.width:
            raise DataError(f"expected {self.scale.width} numbers, got {array.shape[1]}")
        return (self.scale.apply(array),)


def _vector(value: Any) -> npt.NDArray[np.float64]:
    """A raw vector as an array [1 F]."""
    array = _load(value) if isinstance(value, str | os.PathLike) else value
    if isinstance(array, np.ndarray):
        if array.ndim != 1:
            raise DataError(f"expected a vector [numbers], got an array of shape {list(array.shape)}")
        array = array.tolist()
    numbers = []
    for column, cell in enumerate(array, 1):
        try:
            numbers += floats([cell])
        except DataError as error:
            raise DataError(f"column {column}: {error}") from None
    if not numbers:
        raise DataError("the vector is empty: expected at least one number")
    return np.array([numbers])


class NumbersReader(nn.Module):
    """Scaled numbers are steps of vectors already: nothing is learnt here.

    Args:
        columns: F, how many a step has.
    """

    like: Tensor

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.step_size = columns
        # Follows the model to another device or dtype, as weights would.
        self.register_buffer("like", torch.empty(0), persistent=False)

    def forward(self, numbers: Float[Tensor, "T B F"]) -> Float[Tensor, "T B F"]:
        """The numbers, in the model's dtype."""
        return numbers.to(self.like)
