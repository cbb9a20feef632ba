"""The figures of a training as it goes: what the bar shows, and `metrics.jsonl`, which keeps them."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from unrolled.errors import StorageError

__all__ = ["MetricsLog", "Recent", "Sums"]


class Sums(Protocol):
    """Where the sums since the last line of the log lie: of what was counted, and how many that are."""

    nats: float
    units: int


class Recent:
    """Mean loss and speed since the last line of the log. The caller holds the sums: a checkpoint has them."""

    def __init__(self, at: Sums, unit: str, chars_per_unit: float | None) -> None:
        self.at, self.unit, self.chars_per_unit = at, unit, chars_per_unit
        self.read, self.seconds = 0, 0.0

    def add(self, mean: float, units: int, seconds: float) -> None:
        """An update: its mean loss, what that is of, how long it took."""
        self.at.nats += mean * units
        self.at.units += units
        self.read += units
        self.seconds += seconds

    def figures(self) -> dict[str, float]:
        at = self.at
        seconds = max(self.seconds, 1e-9)
        if self.chars_per_unit is None:
            return {"loss": at.nats / max(at.units, 1), f"{self.unit}s_per_second": round(self.read / seconds)}
        nats = at.nats / max(at.units * self.chars_per_unit, 1e-9)
        return {
            "loss": at.nats / max(at.units, 1),
            "nats_per_char": nats,
            "bits_per_char": nats / math.log(2),
            "chars_per_second": round(self.read * self.chars_per_unit / seconds),
        }

    def pop(self) -> dict[str, float]:
        figures = self.figures()
        self.at.nats, self.at.units = 0.0, 0
        self.read, self.seconds = 0, 0.0
        return figures

    def note(self) -> str:
        f = self.figures()
        if self.chars_per_unit is None:
            return f"loss {f['loss']:.4f}  {f[f'{self.unit}s_per_second']:,.0f} {self.unit}s/s"
        return (
            f"loss {f['loss']:.3f}  {f['nats_per_char']:.3f} nats/char  {f['bits_per_char']:.3f} bits/char  "
            f"{f['chars_per_second']:,.0f} chars/s"
        )


class MetricsLog:
    """`metrics.jsonl`: a log, appended to; lines after the checkpoint that is gone on from are dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: Any = None

    def open(self, step: int) -> None:
        with self._writing():
            self.path.touch()
            kept = 0
            for line in self.path.read_bytes().splitlines(keepends=True):
                if not _is_up_to(line, step):
                    break
                kept += len(line)
            os.truncate(self.path, kept)
            self.file = self.path.open("a")

    def write(self, line: dict[str, Any]) -> None:
        with self._writing():
            self.file.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        if self.file is not None:
            with self._writing():
                self.file.flush()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror}") from error

    def close(self) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.close()
            self.file = None


def _is_up_to(line: bytes, step: int) -> bool:
    """Whether a line of the log is whole and of this update or an earlier one; a killed run may leave half a line."""
    try:
        return line.endswith(b"\n") and bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False
