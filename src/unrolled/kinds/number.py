"""Numbers as output: one for the whole input, or one a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from torch import Tensor, nn

from unrolled.errors import DataError
from unrolled.kinds.contract import Answer, Arrays, Loss, Output, Run, Score, Steps, Targets, Writer, register
from unrolled.kinds.label import aligned, real
from unrolled.kinds.pooling import Pooling
from unrolled.kinds.scores import NumberScore

if TYPE_CHECKING:
    from jaxtyping import Float

    from unrolled.config import Config
    from unrolled.nn import Core

__all__ = ["Number", "NumberWriter", "Numbers", "Scale", "Scaled", "floats"]


def floats(value: Any) -> list[float]:
    """The numbers in a cell, a list of cells or an array.

    Raises:
        DataError: something that is no finite number.
    """
    cells = [value] if isinstance(value, str | float | int) else list(value)
    numbers = []
    for cell in cells:
        try:
            number = float(cell)
        except (TypeError, ValueError):
            raise DataError(f"expected a number, got {cell!r}") from None
        if not math.isfinite(number):
            raise DataError(f"expected a finite number, got {cell!r}")
        numbers.append(number)
    return numbers


class Scale:
    """Mean and standard deviation, per column, of the training part: what a model sees is (x - mean) / deviation."""

    def __init__(self, mean: npt.ArrayLike, deviation: npt.ArrayLike) -> None:
        self.mean, self.deviation = np.asarray(mean, np.float64), np.asarray(deviation, np.float64)

    @classmethod
    def learn(cls, arrays: Iterable[Any]) -> Scale:
        """Of rows [n F], each array any number of them; a column that never changes keeps its size.

        Raises:
            DataError: no rows, or rows of different width.
        """
        total, square, rows = np.zeros(0), np.zeros(0), 0
        shift = np.zeros(0)
        for array in arrays:
            if not rows and len(array):
                shift = array[0].astype(np.float64)  # keeps the squares small where the mean is large
                total, square = np.zeros(array.shape[1]), np.zeros(array.shape[1])
            if len(array):
                if array.shape[1] != len(shift):
                    raise DataError(f"expected {len(shift)} numbers a step, as before, got {array.shape[1]}")
                moved = array - shift
                total, square, rows = total + moved.sum(0), square + (moved**2).sum(0), rows + len(array)
        if not rows:
            raise DataError("there are no numbers to learn from")
        mean = total / rows
        deviation = np.sqrt(np.maximum(square / rows - mean**2, 0))
        return cls(shift + mean, np.where(deviation > 1e-12, deviation, 1.0))

    @property
    def width(self) -> int:
        return len(self.mean)

    def apply(self, array: Any) -> Any:
        return ((array - self.mean) / self.deviation).astype(np.float32)

    def undo(self, array: Any) -> Any:
        return array * self.deviation + self.mean

    def to_json(self) -> dict[str, Any]:
        return {"mean": self.mean.tolist(), "deviation": self.deviation.tolist()}

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> Scale:
        return cls(obj["mean"], obj["deviation"])


class Scaled:
    """What numbers at either end share: a scale for each column, learnt from the training part."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale

    def to_json(self) -> dict[str, Any]:
        return {"scale": self.scale.to_json()}

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> Any:
        return cls(Scale.from_json(obj["scale"]))


class _Measured(Scaled, Output):
    best = ("mae", "min")

    def score(self, config: Config) -> Score:
        return NumberScore(self.scale.mean.tolist())


@register
class Number(_Measured):
    """One number, or one of each of several columns, for the whole input."""

    kind: ClassVar[str] = "number"

    @classmethod
    def check(cls, value: Any) -> None:
        floats(value)

    @classmethod
    def learn(cls, values: Iterable[Any], config: Config) -> Number:
        return cls(Scale.learn(np.array([floats(value)]) for value in values))

    def encode(self, value: Any) -> Arrays:
        numbers = floats(value)
        if len(numbers) != self.scale.width:
            raise DataError(f"expected {self.scale.width} numbers, got {len(numbers)}")
        return (self.scale.apply(np.array([numbers])),)

    def writer(self, config: Config, reader: Any, core: Core) -> Writer:
        return NumberWriter(core.output_size, self.scale.width, config.output.pooling)

    def answer(self, raw: Tensor) -> Answer:
        """raw: scaled numbers [F]."""
        numbers = self.scale.undo(raw.double().numpy()).tolist()
        value = numbers[0] if len(numbers) == 1 else numbers
        return Answer(value, " ".join(f"{number:.6g}" for number in numbers))


@register
class Numbers(_Measured):
    """A number a step."""

    kind: ClassVar[str] = "numbers"
    aligned: ClassVar[bool] = True

    @classmethod
    def check(cls, value: Any) -> None:
        _column(value)

    @classmethod
    def learn(cls, values: Iterable[Any], config: Config) -> Numbers:
        return cls(Scale.learn(_column(value) for value in values))

    def encode(self, value: Any) -> Arrays:
        return (self.scale.apply(_column(value)),)

    def writer(self, config: Config, reader: Any, core: Core) -> Writer:
        return NumberWriter(core.output_size, self.scale.width, None)

    def answer(self, raw: Tensor) -> Answer:
        """raw: scaled numbers [W F]."""
        numbers = self.scale.undo(raw.double().numpy())
        flat = numbers[:, 0].tolist() if numbers.shape[1] == 1 else numbers.tolist()
        return Answer(flat, " ".join(f"{number:.6g}" for number in numbers.ravel()))


def _column(value: Any) -> Any:
    """Numbers a step [n F]: from a text or list of numbers [n], or an array [n F]."""
    if isinstance(value, np.ndarray) and value.ndim == 2:
        floats(value.ravel())
        return value
    return np.array(floats(value.split() if isinstance(value, str) else value), np.float64)[:, None]


class NumberWriter(Writer):
    """y = W h + b on the last state or a pool (see `Pooling`), or at each step where `pooling` is None.

    The loss is Huber's, of scaled numbers: squared near the target, as the distance far from it, so that a few wild
    values do not rule the training.
    """

    def __init__(self, size: int, numbers: int, pooling: str | None) -> None:
        super().__init__()
        self.pooling = None if pooling is None else Pooling(pooling, size)
        self.linear = nn.Linear(size, numbers)

    def loss(self, read: Callable[[], Any], run: Run, steps: Steps, targets: Targets) -> Loss:
        wanted = targets.tensors[0]
        if self.pooling is not None:
            found = self.linear(self.pooling(run, read(), steps.lengths))
            wanted = wanted[0]
        else:
            hidden = aligned(run(read(), lengths=steps.lengths).outputs, steps)
            mask = real(steps.aligned, len(hidden), hidden.device)
            found, wanted = self.linear(hidden[mask]), wanted[: len(hidden)][mask]
        return Loss(F.huber_loss(found.float(), wanted, reduction="sum"), wanted.numel())

    def scores(self, read: Callable[[], Any], run: Run, steps: Steps, targets: Targets | None = None) -> Tensor:
        if self.pooling is not None:
            return self.at(self.pooling(run, read(), steps.lengths))[None]
        return self.at(aligned(run(read(), lengths=steps.lengths).outputs, steps))

    def at(self, hidden: Float[Tensor, "*W B H"], x: Any = None) -> Float[Tensor, "*W B F"]:
        """The scaled numbers at steps."""
        return self.linear(hidden)  # type: ignore[no-any-return]

    def answer(self, read: Callable[[], Any], run: Run, steps: Steps) -> list[Any]:
        found = self.scores(read, run, steps).float().cpu()
        if self.pooling is not None:
            return list(found[0])
        return [found[:n, b] for b, n in enumerate(steps.aligned.tolist())]
