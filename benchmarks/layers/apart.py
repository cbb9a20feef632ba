"""A row measured with each of its sides in a process of its own, as each would be in a user's program.

What a side leaves in the allocator and in thread pools changes what the other takes: a torch.nn.LSTM in bf16 takes a
quarter less time in a process in which something else has freed large blocks before.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from layers.rounds import Missing, Row, Setting, Trial, measure
from unrolled.allocator import keep_freed_memory

__all__ = ["Stopped", "measure_apart", "serve"]

SCRIPT = Path(__file__).resolve().parents[1] / "native.py"


class Stopped(Exception):
    """A process ended before it was told to."""


class Process:
    """`native.py` as a process that has made a row ready and answers line by line, in JSON, until its input ends."""

    def __init__(self, job: dict[str, Any]) -> None:
        command = [sys.executable, str(SCRIPT), "--run", json.dumps(job)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._process.communicate(timeout=60)  # closes its input
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def read(self) -> Any:
        """What it says next."""
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise Stopped(f"a process ended with exit code {self._process.wait()}")
        return json.loads(line)

    def cost(self, seconds: float) -> float:
        """What a run of its side costs, measured for so many seconds."""
        with suppress(BrokenPipeError):  # `read` says why
            self._process.stdin.write(f"{seconds}\n")  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]
        return float(self.read())


def measure_apart(
    row: Row, number: int, label: str, setting: Setting, limits: dict[str, float | None]
) -> dict[str, Any]:
    """`measure` in three processes: two have a side each, the third compares both sides' values and ends before that.

    number: of the row, in `native.ROWS`.
    """
    job = {"row": number, "label": label, "setting": asdict(setting)}
    with ExitStack() as stack:
        ours, peer = (stack.enter_context(Process(job | {"part": part})) for part in ("ours", "peer"))
        try:
            with Process(job | {"part": "equality"}) as judge:
                found = judge.read()
            if "missing" in found:
                return row.head(label) | found
            for side in (ours, peer):
                side.read()  # that it is ready
            equality = found.pop("equality")
            trial = Trial(ours.cost, peer.cost, lambda: equality, **found)
            return measure(row, label, setting, limits, trial)
        except Stopped as why:
            return row.head(label) | {"missing": str(why)}


def serve(rows: list[Row], job: dict[str, Any], asked: TextIO, tell: Callable[[str], None]) -> None:
    """What such a process does."""
    row, setting = rows[job["row"]], Setting(**job["setting"])
    if setting.keep_memory:
        keep_freed_memory()
    try:
        trial = row.build(row.size(job["label"], setting), setting)
    except Missing as why:
        tell(json.dumps({"missing": str(why)}))
        return
    if job["part"] == "equality":
        known = {"unit": trial.unit, "flop": trial.flop, "bf16": trial.bf16}
        tell(json.dumps(known | {"equality": trial.check()}))
        return
    side = getattr(trial, job["part"])
    side(setting.seconds / 2)  # what only the first calls take: fresh memory, threads that start
    tell(json.dumps("ready"))
    for line in asked:
        tell(json.dumps(side(float(line))))
