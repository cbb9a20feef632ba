"""What every kind keeps: how a raw value is encoded, batched, read as steps, and how hidden states become an answer.

    raw value --Input.encode--> arrays --Input.collate--> Steps --reader--> [T B I] --core--> hidden states
    raw value --Output.encode--> arrays --Output.collate--> Targets --------Writer.loss / Writer.answer--'

An `Input` or `Output` is what was learnt from the training data about one end (a vocabulary, label names, scales): a
value that a model folder keeps as JSON. Readers and writers are the parts of the model with weights. A kind of your
own is a class with these methods, registered with `register`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from unrolled.errors import StorageError, nearest

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from unrolled.config import Config
    from unrolled.nn import Core
    from unrolled.unroll import Unrolled

__all__ = [
    "INPUTS",
    "OUTPUTS",
    "Answer",
    "Arrays",
    "Ends",
    "Input",
    "Loss",
    "Output",
    "Run",
    "Score",
    "Steps",
    "Targets",
    "Writer",
    "count",
    "pad",
    "register",
]

Array: TypeAlias = npt.NDArray[Any]
Arrays: TypeAlias = tuple["Array | Iterator[Array]", ...]
"""One value, encoded: arrays [n ...] whose first dimension runs along time. What is too large to be in memory at once
comes as an iterator of consecutive pieces; `collate` gets whole arrays always."""


class Steps(NamedTuple):
    """Inputs of a batch. T steps, B rows; padding after a row's last step.

    tensors: what the reader takes, the first of them `[T B ...]`; lengths: int64 `[B]`; ends: int64 `[W B]`, the step
    at which each of W words ends, for outputs that are aligned to words while characters are read, with `words` int64
    `[B]` of them; None where every step is one.
    """

    tensors: tuple[Tensor, ...]
    lengths: Int[Tensor, "B"]
    ends: Int[Tensor, "W B"] | None = None
    words: Int[Tensor, "B"] | None = None

    @property
    def aligned(self) -> Int[Tensor, "B"]:
        """How many outputs each row has where there is one a step or word."""
        return self.lengths if self.words is None else self.words

    def to(self, device: torch.device) -> Steps:
        """The same on another device; the lengths stay, since they steer the program."""
        ends = None if self.ends is None else self.ends.to(device)
        return self._replace(tensors=tuple(t.to(device) for t in self.tensors), ends=ends)


class Targets(NamedTuple):
    """Outputs of a batch as they should be: tensors by the kind's own order, and how many each row has, int64 `[B]`."""

    tensors: tuple[Tensor, ...]
    lengths: Int[Tensor, "B"]

    def to(self, device: torch.device) -> Targets:
        return self._replace(tensors=tuple(t.to(device) for t in self.tensors))


@dataclass(frozen=True)
class Loss:
    """A summed loss, a scalar tensor, and how many things (labels, words, numbers) it is the sum of."""

    total: Tensor
    count: int


@dataclass(frozen=True)
class Answer:
    """What a model says about one input.

    value: the label, the list of labels, the number(s), or the text; text: the same as one line; details: scores and
    what else belongs, plain values for JSON.
    """

    value: Any
    text: str
    details: Mapping[str, Any] = field(default_factory=dict)


class Score(ABC):
    """Counts answers against what they should be, example by example; then gives figures."""

    @abstractmethod
    def add(self, answer: Answer, expected: Any) -> None:
        """One more example; `expected` is the raw value."""

    @abstractmethod
    def figures(self) -> dict[str, Any]:
        """The figures by name, plain values for JSON."""


class Run(Protocol):
    """The model's core with its dropout, as a writer runs it."""

    core: Core

    def __call__(self, x: Any, state: Any = None, *, lengths: Tensor | None = None, outputs: bool = True) -> Unrolled:
        """The core over steps `[T B I]`, which the reader gave; its outputs with dropout while training."""

    def drop(self, hidden: Float[Tensor, "*T B H"]) -> Float[Tensor, "*T B H"]:
        """Dropout before the output, for what did not come from `outputs`."""


class Writer(nn.Module, ABC):
    """Hidden states -> loss and answers. A writer decides how the core is run: that is what a form is."""

    @abstractmethod
    def loss(self, read: Callable[[], Any], run: Run, steps: Steps, targets: Targets) -> Loss:
        """The loss of a batch. read: the reader's steps `[T B I]`; run: the core over them."""

    @abstractmethod
    def scores(self, read: Callable[[], Any], run: Run, steps: Steps, targets: Targets | None) -> Tensor:
        """What comes out at each step, before anything is chosen: scores `[U B V]`, or numbers; U = 1 where there is
        one for all. Of text that is written, `targets` are the words that are read on the way."""

    @abstractmethod
    def answer(self, read: Callable[[], Any], run: Run, steps: Steps) -> list[Any]:
        """The model's raw answers to a batch, one a row; `Output.answer` puts them in words."""

    def first(self, core: Core, batch: int) -> Any:
        """The state before anything is read, where there is one output a step; it has `select(rows)`."""
        return core.initial_state(batch)

    def step(self, core: Core, x: Any, state: Any) -> tuple[Tensor, Any]:
        """One step of each row, of inputs `[B I]`: what comes out of it, and the state after."""
        hidden, state = core.step(x, state)
        return self.at(hidden, x), state  # type: ignore[operator]


class Input(ABC):
    """What goes in."""

    kind: ClassVar[str]

    @classmethod  # noqa: B027 - most kinds refuse nothing
    def check(cls, value: Any) -> None:
        """Whether a raw value can be learnt from, for who leaves out those that cannot.

        Raises:
            DataError: it cannot.
        """

    @classmethod
    @abstractmethod
    def learn(cls, values: Iterable[Any], config: Config) -> Input:
        """What the training part's raw values tell, read once.

        Raises:
            DataError: the values cannot be used.
        """

    @abstractmethod
    def encode(self, value: Any) -> Arrays:
        """One raw value as arrays; the first has a row for each step.

        Raises:
            DataError: the value cannot be read; the caller adds where it stands.
        """

    def collate(self, rows: Sequence[tuple[Array, ...]]) -> Steps:
        """A batch of encoded values: each array padded with zeros."""
        return Steps(tuple(pad(column) for column in zip(*rows, strict=True)), count([row[0] for row in rows]))

    @abstractmethod
    def reader(self, config: Config) -> nn.Module:
        """The part of the model that makes steps of vectors of the tensors: has `step_size`, and `forward(*tensors)`
        gives `[T B I]` or a `Lookup`."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]: ...

    @classmethod
    @abstractmethod
    def from_json(cls, obj: Mapping[str, Any]) -> Input: ...


class Output(ABC):
    """What comes out."""

    kind: ClassVar[str]
    aligned: ClassVar[bool] = False
    """Whether there is one a step."""

    @classmethod  # noqa: B027 - most kinds refuse nothing
    def check(cls, value: Any) -> None:
        """As `Input.check`."""

    best: ClassVar[tuple[str, str]]
    """Which figure of a validation tells the better model, and whether `min` or `max` of it is better."""

    @classmethod
    @abstractmethod
    def learn(cls, values: Iterable[Any], config: Config) -> Output: ...

    @abstractmethod
    def encode(self, value: Any) -> Arrays: ...

    def collate(self, rows: Sequence[tuple[Array, ...]]) -> Targets:
        return Targets(tuple(pad(column) for column in zip(*rows, strict=True)), count([row[0] for row in rows]))

    @abstractmethod
    def writer(self, config: Config, reader: Any, core: Core) -> nn.Module:
        """The part of the model that answers, a `Writer`: made for steps of `reader.step_size` numbers and hidden
        states of `core.output_size`."""

    @abstractmethod
    def answer(self, raw: Any) -> Answer:
        """One row of `Writer.answer` in words."""

    @abstractmethod
    def score(self, config: Config) -> Score: ...

    @abstractmethod
    def to_json(self) -> dict[str, Any]: ...

    @classmethod
    @abstractmethod
    def from_json(cls, obj: Mapping[str, Any]) -> Output: ...


def pad(arrays: Sequence[Array]) -> Tensor:
    """Arrays [n_b ...] as one tensor `[T B ...]`, zeros after each one's end; integers as int64, floats as float32,
    pixels (bytes that have more than one dimension) as they are."""
    first = arrays[0]
    steps = max(len(array) for array in arrays)
    dtype = (
        first.dtype
        if first.dtype == np.uint8 and first.ndim > 1
        else np.int64
        if first.dtype.kind in "iub"
        else np.float32
    )
    padded = np.zeros((steps, len(arrays), *first.shape[1:]), dtype)
    for b, array in enumerate(arrays):
        padded[: len(array), b] = array
    return torch.from_numpy(padded)


def count(arrays: Sequence[Array]) -> Int[Tensor, "B"]:
    """The lengths of arrays, int64 `[B]`."""
    return torch.tensor([len(array) for array in arrays], dtype=torch.int64)


INPUTS: dict[str, type[Input]] = {}
OUTPUTS: dict[str, type[Output]] = {}


def register(kind: type[Any]) -> type[Any]:
    """Make an `Input` or `Output` known by its `kind`. A class decorator."""
    (INPUTS if issubclass(kind, Input) else OUTPUTS)[kind.kind] = kind
    return kind


@dataclass(frozen=True)
class Ends:
    """Both ends of a model as they were learnt; what a model folder keeps in `vocabulary.json`."""

    input: Input
    output: Output

    def to_json(self) -> dict[str, Any]:
        return {
            "input": {"kind": self.input.kind, **self.input.to_json()},
            "output": {"kind": self.output.kind, **self.output.to_json()},
        }

    @classmethod
    def from_json(cls, obj: Any) -> Ends:
        """
        Raises:
            StorageError: the values are none that `to_json` writes.
        """
        ends: list[Any] = []
        for name, known in (("input", INPUTS), ("output", OUTPUTS)):
            end = obj.get(name) if isinstance(obj, Mapping) else None
            kind = end.get("kind") if isinstance(end, Mapping) else None
            if not isinstance(end, Mapping) or not isinstance(kind, str) or kind not in known:
                raise StorageError(f"vocabulary: {name}: unknown kind {kind!r}: {nearest(str(kind), known)}")
            try:
                ends.append(known[kind].from_json(end))
            except (KeyError, TypeError, ValueError) as error:
                if isinstance(error, StorageError):
                    raise
                raise StorageError(f"vocabulary: {name}: not what a {kind} keeps: {error}") from error
        return cls(*ends)
