"""What this installation runs on and which path the layers take, for a person and for a bug report."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

__all__ = ["examine"]

_PACKAGES = ("unrolled", "torch", "numpy", "safetensors", "tokenizers", "pydantic", "typer", "rich")


def examine() -> dict[str, str]:
    """Name -> finding, in the order in which to show them."""
    import torch

    from unrolled import native, tape
    from unrolled.cells import LSTM
    from unrolled.unroll import choose_backend

    found = {name: _version(name) for name in _PACKAGES}
    found["python"] = f"{platform.python_version()} ({platform.python_implementation()})"
    found["system"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    found["processor"] = _processor()
    found["torch instruction set"] = torch.backends.cpu.get_cpu_capability()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found["threads"] = f"{torch.get_num_threads()} of torch, {usable} cores usable"
    absent = native.why_absent()
    if absent is None:
        spec = importlib.util.find_spec("unrolled._native")
        found["native"] = f"built ({Path(spec.origin).name if spec and spec.origin else 'of unknown origin'})"
        sets = ", ".join(f"{name} ({presence})" for name, presence in native.instruction_sets())
        found["instruction sets"] = f"{sets}; UNROLLED_ISA=<name> forces one"
        found["native threads"] = native.threads()
    else:
        found["native"] = f"absent: {absent}"
    if torch.cuda.is_available():
        found["device"] = f"cuda ({torch.cuda.get_device_name()})"
        found["path"] = "reference: the loop over the steps, recorded by autograd (the weights are on cuda)"
        return found
    found["device"] = "cpu (no CUDA device found)"
    cell = LSTM(1, 1).bind()
    path = choose_backend(cell, "auto")
    if path == "native":
        found["path"] = "native: whole layers, both ways, in C++ (float32, bfloat16 by autocast); float64: tape"
    elif path == "tape":
        found["path"] = "tape: backward written out, in torch operations (float32, float64, bfloat16 by autocast)"
    else:
        found["path"] = f"reference: the loop over the steps, recorded by autograd ({tape.supports(cell)})"
    found["step product"] = "oneDNN" if tape.uses_onednn() else "BLAS (this torch offers no oneDNN product)"
    if path == "native":
        found["step product"] = f"of its own (of the tape: {found['step product']})"
    return found


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
