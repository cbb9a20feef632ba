"""How much memory a recording takes, known before it is taken."""

from __future__ import annotations

import os
from pathlib import Path

from unrolled.errors import DataError
from unrolled.kinds import Written
from unrolled.model import LanguageModel, Model
from unrolled.nn import Core

__all__ = ["expect_room", "free_bytes", "recording_bytes"]

_KEPT = {"lstm": 6, "gru": 4}  # vectors of H a step: states and gates; a vanilla cell has its state
_TAPE = {"lstm": 14, "gru": 12}  # and those that autograd keeps for their gradients, about


def recording_bytes(model: Model, steps: int, *, gradient: bool = False) -> int:
    """About how many bytes it takes to record a run over so many input steps: states, gates and scores, with the copy
    that is being made, and with the gradients of all states if asked for."""
    number = next(model.parameters()).element_size()
    output, symbols = model.ends.output, 0
    written = steps
    if isinstance(model, LanguageModel):
        symbols = len(model.vocabulary)
    elif isinstance(output, Written):
        symbols, written = output.end + 1, 2 * steps + 50
    else:
        symbols = len(getattr(output, "names", ()))
    numbers = 3 * written * symbols
    cores = [(model.core, steps)]
    decoder = getattr(model.writer, "core", None)
    if isinstance(decoder, Core):
        cores.append((decoder, written))
        numbers += 2 * steps * written  # where it looked
    for core, length in cores:
        cell = model.config.core.cell
        each = 2 * _KEPT.get(cell, 1) + (2 + _TAPE.get(cell, 5) if gradient else 0)
        numbers += length * len(core.layers) * core.directions * core.hidden_size * each
    return numbers * number


def free_bytes() -> int:
    """How much memory is to be had: the machine's, or what is left of a container's."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        most, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, max(most - used, 0))
    except (OSError, ValueError):  # no container, or one without a limit
        pass
    return free


def expect_room(model: Model, steps: int, *, gradient: bool = False) -> None:
    """
    Raises:
        DataError: so many steps do not fit into the memory that is free; the message says how many would.
    """
    need, free = recording_bytes(model, steps, gradient=gradient), free_bytes()
    if need > free:
        fit = max(1, int(0.8 * steps * free / need))
        raise DataError(
            f"to record {steps:,} steps takes about {need / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are "
            f"free: read fewer of them, --steps {fit} (steps={fit} in Python)"
        )
