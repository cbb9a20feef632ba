"""Ids to windows: a text in lanes that are read side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from unrolled.data.encoding import EncodedText
from unrolled.errors import ConfigError, DataError
from unrolled.kinds.text import IGNORE

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor

__all__ = ["Lanes", "Window"]

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True)
class Window:
    """The piece of all lanes that truncated BPTT goes through at once. T steps, B lanes of this rank.

    Attributes:
        inputs: ids, int64 [T B].
        targets: the ids one step later, int64 [T B]; IGNORE where a document begins there: nothing before it tells.
        reset: bool [T B], true where `inputs` begins a document and the state before it must be the initial one;
            None if nowhere. The first step of a lane is not marked: the carry begins as the initial state.
        start: the step of the lane with which the window begins.
        warm: the first `warm` steps were counted by windows before and only carry the gradient further back.
        advance: after so many steps of this window the next one begins; the state there is its carry.
        counted: targets at or after `warm` that are not IGNORE.
    """

    inputs: Int[Tensor, "T B"]
    targets: Int[Tensor, "T B"]
    reset: Bool[Tensor, "T B"] | None
    start: int
    warm: int
    advance: int
    counted: int


class Lanes:
    """A text in `batch_size` lanes that are read side by side, window by window.

    A lane has `steps` = (N - 1) // batch_size steps; lane b begins at unit b * steps, so that lanes lie end to end
    and each unit but the first is a target once. (The last up to batch_size - 1 units are left over.)

    Window k counts the steps [k * stride, (k + 1) * stride) of each lane and begins `window - stride` steps before
    them: each loss reaches back over at least that many steps. Source: Williams and Peng 1990, "An Efficient
    Gradient-Based Algorithm for On-Line Training of Recurrent Network Trajectories", BPTT(h; h'), with h = window and
    h' = stride. The last window may be shorter.

    Rank r of `ranks` has the lanes [r, r + 1) * batch_size / ranks; all ranks together have those of one.

    Attributes:
        batch_size: lanes of all ranks.
        lanes: the lanes of this rank, a range.
        steps: steps of a lane.
        longest: steps of the longest window: `window`, or the whole lane if that is None.
        stride: as given, or the window if None.
    """

    def __init__(
        self,
        text: EncodedText,
        batch_size: int,
        window: int | None,
        stride: int | None = None,
        *,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """
        Raises:
            ConfigError: a size below 1, a stride above the window, ranks that do not divide the lanes.
            DataError: the text is too short for one window.
        """
        sizes = {"batch size": batch_size, "window": window, "stride": stride, "ranks": ranks}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ConfigError(f"{name}: expected 1 or more, got {size}")
        if batch_size % ranks:
            raise ConfigError(f"batch size: expected a multiple of the {ranks} ranks, got {batch_size}")
        if not 0 <= rank < ranks:
            raise ConfigError(f"rank: expected 0 to {ranks - 1}, got {rank}")
        needed = max(batch_size * (window or 1) + 1, 2 * batch_size)
        if len(text) < needed:
            of = f" of {window}" if window else ""
            raise DataError(
                f"the text has {len(text)} units; one window{of} for {batch_size} lanes needs {needed}:"
                f" lower {'--window or ' if window else ''}--batch-size, or give more text"
            )
        each = batch_size // ranks
        self.batch_size = batch_size
        self.lanes = range(rank * each, (rank + 1) * each)
        self.steps = (len(text) - 1) // batch_size
        self.longest = window or self.steps
        if stride is not None and stride > self.longest:
            raise ConfigError(f"stride: expected at most the window, {self.longest}, got {stride}: it would skip steps")
        self.stride = stride or self.longest
        self._starts = text.starts
        used = batch_size * self.steps
        self._inputs = text.ids[:used].reshape(batch_size, self.steps)[self.lanes.start : self.lanes.stop]
        self._targets = text.ids[1 : used + 1].reshape(batch_size, self.steps)[self.lanes.start : self.lanes.stop]

    def __len__(self) -> int:
        """Windows in an epoch."""
        return (self.steps - 1) // self.stride + 1

    def window(self, k: int) -> Window:
        """Window k of an epoch; any, at any time.

        Raises:
            IndexError: there is no window k.
        """
        import torch

        if not 0 <= k < len(self):
            raise IndexError(f"window {k}: there are {len(self)}")
        start, counted = self._start(k), k * self.stride
        end = min(counted + self.stride, self.steps)
        inputs = self._inputs[:, start:end].T.astype(np.int64, order="C")
        targets = self._targets[:, start:end].T.astype(np.int64, order="C")
        steps, rows = self._documents(start, end)
        reset = None
        if start == 0:
            rows = rows[steps > 0]
            steps = steps[steps > 0]
        if len(steps):
            reset = np.zeros(inputs.shape, bool)
            reset[steps, rows] = True
        steps, rows = self._documents(start + 1, end + 1)
        targets[steps, rows] = IGNORE
        warm = counted - start
        return Window(
            inputs=torch.from_numpy(inputs),
            targets=torch.from_numpy(targets),
            reset=None if reset is None else torch.from_numpy(reset),
            start=start,
            warm=warm,
            advance=(self._start(k + 1) if k + 1 < len(self) else end) - start,
            counted=(end - counted) * len(self.lanes) - int((steps >= warm).sum()),
        )

    def _start(self, k: int) -> int:
        return max(0, (k + 1) * self.stride - self.longest)

    def _documents(self, begin: int, end: int) -> tuple[Array, Array]:
        """Where documents begin in the steps [begin, end) of the lanes: steps from `begin` on, and rows, both [M]."""
        first = np.arange(self.lanes.start, self.lanes.stop) * self.steps + begin
        low, high = np.searchsorted(self._starts, [first, first + (end - begin)])
        counts = high - low
        rows = np.repeat(np.arange(len(first)), counts)
        index = np.arange(counts.sum()) + np.repeat(low - (np.cumsum(counts) - counts), counts)
        return self._starts[index] - first[rows], rows
