"""unrolled: recurrent sequence models in PyTorch.

Train them fast on the CPU you have, stream them one step at a time, and look inside every step.
`unrolled.nn` holds the drop-in layers; `unrolled --help` lists the commands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unrolled.checkpoints import load, save
    from unrolled.decoding import generate
    from unrolled.errors import UnrolledError
    from unrolled.evaluation import evaluate
    from unrolled.model import LanguageModel, Model
    from unrolled.prediction import predict
    from unrolled.report import compare, inspect
    from unrolled.trace import record
    from unrolled.training import train

    __version__: str

__all__ = [
    "LanguageModel",
    "Model",
    "UnrolledError",
    "__version__",
    "compare",
    "evaluate",
    "generate",
    "inspect",
    "load",
    "predict",
    "record",
    "save",
    "train",
]

# A name is imported when it is first asked for: `unrolled --help` must answer without torch, and
# `import unrolled.nn` without what only training or the command line needs.
_HOME = {
    "LanguageModel": "unrolled.model",
    "Model": "unrolled.model",
    "UnrolledError": "unrolled.errors",
    "compare": "unrolled.report",
    "evaluate": "unrolled.evaluation",
    "generate": "unrolled.decoding",
    "inspect": "unrolled.report",
    "load": "unrolled.checkpoints",
    "predict": "unrolled.prediction",
    "record": "unrolled.trace",
    "save": "unrolled.checkpoints",
    "train": "unrolled.training",
}


def __getattr__(name: str) -> object:
    value: object
    if name == "__version__":
        from importlib.metadata import version

        value = version("unrolled")
    elif name in _HOME:
        from importlib import import_module

        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
