"""Labels as output: one for the whole input, or one a step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unrolled import native
from unrolled.errors import DataError
from unrolled.kinds.contract import Answer, Arrays, Loss, Output, Run, Score, Steps, Targets, Writer, register
from unrolled.kinds.pooling import Pooling
from unrolled.kinds.scores import LabelScore, TagScore

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from unrolled.config import Config
    from unrolled.nn import Core

__all__ = ["Label", "LabelWriter", "Labels", "LabelsWriter", "aligned", "labels_of", "real"]

_UNSEEN = -1
"""A label that training never saw: no answer can be right, and none is learnt from it."""


class _Named(Output):
    """What label and labels share: the names, in order of their numbers."""

    best = ("accuracy", "max")

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._numbers = {name: number for number, name in enumerate(self.names)}

    @classmethod
    def _of(cls, counts: Counter[str]) -> Any:
        if len(counts) < 2:
            only = f"only one, {next(iter(counts))!r}" if counts else "none"
            raise DataError(f"labels: expected at least two different ones in the training part, got {only}")
        return cls(sorted(counts, key=_order))

    def number(self, name: str) -> int:
        """The number of a label; -1 for one that training never saw.

        Raises:
            DataError: the label is empty.
        """
        if not name.strip():
            raise DataError("the label is empty")
        return self._numbers.get(name, _UNSEEN)

    def to_json(self) -> dict[str, Any]:
        return {"names": self.names}

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> Any:
        return cls([str(name) for name in obj["names"]])


def _order(name: str) -> tuple[float, str]:
    """Numbers by size, before words by the alphabet."""
    try:
        return (float(name), name)
    except ValueError:
        return (math.inf, name)


@register
class Label(_Named):
    """One label for the whole input."""

    kind: ClassVar[str] = "label"

    @classmethod
    def learn(cls, values: Iterable[Any], config: Config) -> Label:
        label: Label = cls._of(Counter(value for value in values if value.strip()))
        return label

    def encode(self, value: str) -> Arrays:
        return (np.array([self.number(value)], np.int64),)

    def writer(self, config: Config, reader: Any, core: Core) -> Writer:
        output = config.output
        return LabelWriter(
            core.output_size,
            len(self.names),
            output.pooling,
            smoothing=output.label_smoothing,
            backend=config.training.backend,
        )

    def answer(self, raw: Tensor) -> Answer:
        """raw: log probabilities [C]."""
        name = self.names[int(raw.argmax())]
        scores = dict(zip(self.names, raw.exp().tolist(), strict=True))
        return Answer(name, name, {"scores": scores})

    def score(self, config: Config) -> Score:
        return LabelScore(self.names)


@register
class Labels(_Named):
    """A label a step: of a word, of a frame."""

    kind: ClassVar[str] = "labels"
    aligned: ClassVar[bool] = True

    @classmethod
    def learn(cls, values: Iterable[Any], config: Config) -> Labels:
        labels: Labels = cls._of(Counter(name for value in values for name in labels_of(value) if name.strip()))
        return labels

    def encode(self, value: Sequence[str] | str) -> Arrays:
        return (np.array([self.number(name) for name in labels_of(value)], np.int64),)

    def writer(self, config: Config, reader: Any, core: Core) -> Writer:
        return LabelsWriter(
            core.output_size, len(self.names), smoothing=config.output.label_smoothing, backend=config.training.backend
        )

    def answer(self, raw: tuple[list[int], list[float]]) -> Answer:
        """raw: for each step the likeliest label and its probability."""
        names = [self.names[i] for i in raw[0]]
        return Answer(names, " ".join(names), {"scores": raw[1]})

    def score(self, config: Config) -> Score:
        return TagScore(self.names)


def labels_of(value: Sequence[str] | str) -> list[str]:
    """The labels of one example: a list as it is, a text at its white space."""
    return value.split() if isinstance(value, str) else [str(name) for name in value]


class _Classes(nn.Module):
    """Scores of C classes, y = W h + b, and the cross-entropy of their softmax."""

    def __init__(self, size: int, classes: int, smoothing: float, backend: str) -> None:
        super().__init__()
        self.smoothing, self.backend = smoothing, backend
        self.weight = nn.Parameter(torch.empty(classes, size).uniform_(-(size**-0.5), size**-0.5))
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, hidden: Float[Tensor, "*steps H"]) -> Float[Tensor, "*steps C"]:
        if self.backend in ("auto", "native") and native.unsuited(self.weight) is None:
            return native.linear(hidden, self.weight, self.bias)
        return F.linear(hidden, self.weight, self.bias)

    def loss(self, hidden: Float[Tensor, "M H"], targets: Int[Tensor, "M"]) -> Loss:
        scores = self(hidden)
        scores = scores if scores.dtype == torch.float64 else scores.float()
        total = F.cross_entropy(scores, targets, ignore_index=_UNSEEN, reduction="sum", label_smoothing=self.smoothing)
        return Loss(total, int((targets != _UNSEEN).sum()))


class LabelWriter(Writer):
    """The label of the whole: scores of the last state or of a pool of all (see `Pooling`)."""

    def __init__(self, size: int, classes: int, pooling: str, *, smoothing: float = 0.0, backend: str = "auto") -> None:
        super().__init__()
        self.pooling = Pooling(pooling, size)
        self.classes = _Classes(size, classes, smoothing, backend)

    def loss(self, read: Callable[[], Any], run: Run, steps: Steps, targets: Targets) -> Loss:
        return self.classes.loss(self.pooling(run, read(), steps.lengths), targets.tensors[0][0])

    def scores(self, read: Callable[[], Any], run: Run, steps: Steps, targets: Targets | None = None) -> Tensor:
        return self.classes(self.pooling(run, read(), steps.lengths))[None]  # type: ignore[no-any-return]

    def answer(self, read: Callable[[], Any], run: Run, steps: Steps) -> list[Any]:
        return list(torch.log_softmax(self.scores(read, run, steps)[0].float(), -1).cpu())


class LabelsWriter(Writer):
    """A label a step, or a word where characters are read: scores of the state at the word's last character."""

    def __init__(self, size: int, classes: int, *, smoothing: float = 0.0, backend: str = "auto") -> None:
        super().__init__()
        self.classes = _Classes(size, classes, smoothing, backend)

    def loss(self, read: Callable[[], Any], run: Run, steps: Steps, targets: Targets) -> Loss:
        hidden = aligned(run(read(), lengths=steps.lengths).outputs, steps)
        # Padding is told by the lengths, not by a number: a real row may hold any.
        mask = real(steps.aligned, len(hidden), hidden.device)
        return self.classes.loss(hidden[mask], targets.tensors[0][: len(hidden)][mask])

    def scores(self, read: Callable[[], Any], run: Run, steps: Steps, targets: Targets | None = None) -> Tensor:
        return self.at(aligned(run(read(), lengths=steps.lengths).outputs, steps))

    def at(self, hidden: Float[Tensor, "*W B H"], x: Any = None) -> Float[Tensor, "*W B C"]:
        """The scores at steps."""
        return self.classes(hidden)  # type: ignore[no-any-return]

    def answer(self, read: Callable[[], Any], run: Run, steps: Steps) -> list[Any]:
        scores = self.scores(read, run, steps)
        best = torch.softmax(scores.float(), -1).max(-1)  # of all rows at once: small operations are slow
        labels, certain = (part.T.tolist() for part in (best.indices, best.values))
        return [(labels[b][:n], certain[b][:n]) for b, n in enumerate(steps.aligned.tolist())]


def aligned(hidden: Float[Tensor, "T B H"], steps: Steps) -> Float[Tensor, "W B H"]:
    """The states at which an aligned output is given: all, or those at the words' ends."""
    if steps.ends is None:
        return hidden
    return hidden.gather(0, steps.ends[..., None].expand(-1, -1, hidden.shape[-1]))


def real(lengths: Int[Tensor, "B"], steps: int, device: torch.device) -> Tensor:
    """Bool [T B]: true where a row has a step."""
    return torch.arange(steps, device=device)[:, None] < lengths.to(device)[None]
