"""`unrolled demo`: the whole road, for each of the forms, on data that ships with the package.

Each demo says what its data is and which form it has, learns, shows the learning curve and the score on what was held
out beside baselines, lets the model answer, and says what to try next.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from unrolled.demo.road import Road
from unrolled.errors import ConfigError, nearest
from unrolled.progress import Watcher

__all__ = ["DEMOS", "run_demo"]

DEMOS = ("shakespeare", "sentiment", "translate", "chat", "caption", "frames")
"""Their names: each is a file here with a function `run`, and, but for the first, a folder of `demo_data`."""


def run_demo(name: str, out: Path | None = None, *, short: bool, force: bool, watcher: Watcher) -> None:
    """Run one of the demos.

    Args:
        name: one of DEMOS.
        out: where the model folder goes; None: `demo-NAME`.
        short: learn for a short time, a weaker model.

    Raises:
        TrainingError: the model did not beat the baseline that it must.
        StorageError: `out` holds a model and force is not set.
        ConfigError: there is no such demo, or it needs a library that is not installed.
    """
    if name not in DEMOS:
        raise ConfigError(f"there is no demo {name!r}: {nearest(name, DEMOS)}")
    road = Road(name, out or Path(f"demo-{name}"), short=short, force=force, watcher=watcher)
    import_module(f"unrolled.demo.{name}").run(road)
