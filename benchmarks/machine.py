"""What a measurement ran on: machine, threads and versions, as `unrolled doctor` finds them; and peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["describe", "examine", "free_memory", "peak_memory", "restart_peak", "run_json"]


def examine() -> dict[str, Any]:
    """Name -> finding. In a process of its own, so that this one stays small: see `peak_memory`."""
    found: dict[str, Any] = run_json([sys.executable, "-m", "unrolled", "doctor", "--json"])
    if hasattr(os, "getloadavg"):
        found["load average"] = f"{os.getloadavg()[0]:.2f} over the last minute"
    return found


def describe(found: dict[str, Any]) -> str:
    """The lines that stand above every measurement."""
    names = ("processor", "instruction set", "threads", "device", "path", "step product", "system", "load average")
    versions = ", ".join(f"{name} {found[name]}" for name in ("unrolled", "torch", "numpy", "python"))
    return "\n".join([*(f"{name}: {found[name]}" for name in names if name in found), f"versions: {versions}"])


def run_json(command: list[str]) -> Any:
    """Run a command and read the JSON on the last line of its standard output; its stderr is shown as it comes."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory() -> int:
    """Bytes that this process had in memory at most, since it began or since `restart_peak`.

    On Linux from /proc: what getrusage tells there begins with the parent's, and cannot be restarted.
    """
    try:
        status = Path("/proc/self/status").read_text("utf-8")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def restart_peak() -> int:
    """Count the peak anew from what is in use now, where the system can; the bytes to subtract from later peaks."""
    gc.collect()
    if sys.platform.startswith("linux"):
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)  # what an import left free would hide as much of what comes
        with contextlib.suppress(OSError):  # where it is not allowed, the peak so far is what counts from
            Path("/proc/self/clear_refs").write_text("5", "ascii")
    return peak_memory()


def free_memory() -> int | None:
    """Bytes that a new process can take without swapping; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
