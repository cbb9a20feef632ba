"""Every error that unrolled raises on purpose, and the one check of a tensor's shape.

    UnrolledError                 base of all; `except UnrolledError` catches what a user can mend
    ├── ConfigError  (ValueError) a setting is unknown, of the wrong type or out of range
    ├── DataError    (ValueError) the text or table given cannot be used as it is
    ├── ModelError   (ValueError) a model cannot do what was asked of it
    ├── ShapeError   (ValueError) a tensor came in another shape or type than expected
    ├── StorageError (OSError)    a model folder is missing, damaged, newer, or cannot be written
    └── TrainingError (RuntimeError) training cannot go on: a loss or gradient is not finite, a resume differs

A message says what was expected, what came, and what to change. The command line prints it as one line and
exits with code 2; anything else that escapes is a defect of unrolled and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = [
    "ConfigError",
    "DataError",
    "ModelError",
    "ShapeError",
    "StorageError",
    "TrainingError",
    "UnrolledError",
    "expect_shape",
    "nearest",
]


class UnrolledError(Exception):
    """Base of every error that unrolled raises on purpose."""


class ConfigError(UnrolledError, ValueError):
    """A setting is unknown, of the wrong type, or out of range."""


class DataError(UnrolledError, ValueError):
    """The text or table given cannot be used as it is."""


class ModelError(UnrolledError, ValueError):
    """A model cannot do what was asked of it."""


class ShapeError(UnrolledError, ValueError):
    """A tensor came in another shape or type than expected."""


class StorageError(UnrolledError, OSError):
    """A model folder is missing, damaged, from a newer version, or cannot be written."""


class TrainingError(UnrolledError, RuntimeError):
    """Training cannot go on."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them.

    >>> nearest("lsmt", ["rnn", "lstm", "gru"])
    "did you mean 'lstm'?"
    >>> nearest("x", ["rnn", "gru"])
    'known: gru, rnn'
    """
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names)}"


def expect_shape(name: str, tensor: torch.Tensor, shape: str, **sizes: int) -> None:
    """Check that `tensor` has the dimensions that `shape` names, e.g. `"T B I"`.

    A dimension named in `sizes` must have that size; one that is not may have any.

    Raises:
        ShapeError: another number of dimensions or another size; the message shows both shapes.

    Example: `expect_shape("inputs", x, "T B I", I=128)`.
    """
    dims = shape.split()
    expected = [sizes.get(dim) for dim in dims]
    actual = tuple(tensor.shape)
    if len(actual) == len(dims) and all(
        want is None or want == got for want, got in zip(expected, actual, strict=True)
    ):
        return
    wanted = ", ".join(dim if size is None else f"{dim}={size}" for dim, size in zip(dims, expected, strict=True))
    raise ShapeError(f"{name}: expected [{wanted}], got {list(actual)}")
