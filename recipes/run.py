"""Run a recipe: from data that anyone can get to a model and its figures.

    python recipes/run.py NAME --data DIR [--out DIR] [--model NAME] [--set KEY=VALUE ...] [--resume | --force]

Checks that DIR holds the recipe's data (sha256), prepares its files, calls `unrolled train` and `unrolled evaluate` on
them for each of the recipe's models, and leaves train.log and result.json beside the model folders. The commands are
printed as they run, to be run by hand as well.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

import yaml

from unrolled.checkpoints import checkpoint_steps
from unrolled.doctor import examine
from unrolled.errors import StorageError
from unrolled.storage import read_json

HERE = Path(__file__).resolve().parent
RESULT, PREPARED = "result.json", "prepared.json"
TRAINED = "# trained for {:.1f} s so far"
"""What train.log says at the end of each training or part of one."""


class RecipeError(Exception):
    """What keeps a recipe from running, said to the user in one line."""


# ------------------------------------------------------------------------------------------ what a recipe says


def read_recipe(folder: Path) -> dict[str, Any]:
    """`recipe.yaml` of a recipe's folder.

    Keys: data (a list: file name -> sha256 of files of which any one will do), train and test (arguments of `unrolled
    train` and `unrolled evaluate` in the folder with the prepared files), models (name -> config file), figures (which
    of the evaluation's are shown; `naive.mase` is `mase` within `naive`).

    Raises:
        RecipeError: there is none.
    """
    path = folder / "recipe.yaml"
    if not path.exists():
        known = ", ".join(recipe_names())
        raise RecipeError(f"no recipe {folder.name!r}: choose from {known}")
    recipe: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
    return recipe


def recipe_names() -> list[str]:
    return sorted(path.parent.name for path in HERE.glob("*/recipe.yaml"))


def load_prepare(folder: Path) -> Callable[[Path, Path], None]:
    """`prepare` of a recipe's prepare.py: reads data in the first folder, writes files to the second."""
    spec = importlib.util.spec_from_file_location(f"prepare_{folder.name}", folder / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    prepare: Callable[[Path, Path], None] = module.prepare
    return prepare


def find_data(recipe: dict[str, Any], data: Path) -> dict[str, str]:
    """The recipe's files in the folder `data`, name -> sha256, which is checked.

    Raises:
        RecipeError: one is missing or another one.
    """
    return dict(_find(wanted, data) for wanted in recipe["data"])


def _find(wanted: dict[str, str], data: Path) -> tuple[str, str]:
    for name, expected in wanted.items():
        path = data / name
        if not path.is_file():
            continue
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != expected:
            raise RecipeError(
                f"{path} is not the file that this recipe was made with: its sha256 is {found}, expected {expected}. "
                "Get it from the source that the recipe's README.md names"
            )
        return name, expected
    raise RecipeError(
        f"{data} has no {' or '.join(wanted)}: the recipe's README.md says where to get it; name its folder with --data"
    )


# ------------------------------------------------------------------------------------------------- running


def run(
    folder: Path,
    data: Path,
    out: Path,
    *,
    only: str | None = None,
    overrides: list[str] | None = None,
    more: list[str] | None = None,
) -> dict[str, Any]:
    """Run the recipe in `folder`; what `result.json` says.

    Args:
        data: the folder with the recipe's data.
        out: where everything goes.
        only: this one of its models.
        overrides: settings to change, `KEY=VALUE`.
        more: what to do about models that are there already: `["--resume"]` or `["--force"]`.

    Raises:
        RecipeError: the recipe or its data is not there, or a command failed.
    """
    recipe = read_recipe(folder)
    models: dict[str, str] = recipe["models"]
    if only is not None and only not in models:
        raise RecipeError(f"the recipe has no model {only!r}: choose from {', '.join(models)}")
    found = find_data(recipe, data)
    out.mkdir(parents=True, exist_ok=True)
    path = out / RESULT
    ready = "--resume" in (more or []) and prepared_before(folder, found, out, models)
    if not ready:
        prepare_files(folder, data, found, out, models)
    prepared = sorted(name for name in files_in(out, models) if "/" not in name)
    print(f"{'prepared before' if ready else 'prepared'}: {', '.join(prepared)}", flush=True)
    print(f"$ cd {shlex.quote(str(out))}", flush=True)
    old = json.loads(path.read_text("utf-8"))["models"] if only and path.exists() else {}
    result: dict[str, Any] = {"recipe": folder.name, "data": found, "machine": examine(), "models": old}
    for name, config in models.items():
        if only is None or name == only:
            train = [*recipe["train"], "--config", str((folder / config).resolve()), "--out", name]
            train += [part for setting in overrides or [] for part in ("--set", setting)]
            evaluate = ["evaluate", name, *recipe["test"], "--json"]
            result["models"][name] = train_and_evaluate(out / name, ["train", *train], evaluate, more or [])
            path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print()
    for name, model in result["models"].items():
        print(f"{name}: {told(model['evaluation'], recipe['figures'])}; trained {model['train_seconds']:,.0f} s")
    print(f"written: {path}")
    return result


def prepare_files(folder: Path, data: Path, found: dict[str, str], out: Path, models: Iterable[str]) -> None:
    """Have the recipe prepare its files in `out`, and note at the end of what they were made.

    found: the data's files, name -> sha256.
    """
    (out / PREPARED).unlink(missing_ok=True)
    load_prepare(folder)(data, out)
    note = json.dumps(preparation(folder, found, out, models), indent=1)
    (out / PREPARED).write_text(note + "\n", "utf-8")


def prepared_before(folder: Path, found: dict[str, str], out: Path, models: Iterable[str]) -> bool:
    """Whether `out` holds the files as this recipe made them of this data; not so if that was interrupted."""
    try:
        noted = json.loads((out / PREPARED).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return bool(noted == preparation(folder, found, out, models))


def preparation(folder: Path, found: dict[str, str], out: Path, models: Iterable[str]) -> dict[str, Any]:
    """What tells one preparation from another: data, program, and names and sizes of the files that were made."""
    files = files_in(out, models)
    listed = "".join(f"{size} {name}\n" for name, size in sorted(files.items()))
    return {
        "data": found,
        "prepare.py": hashlib.sha256((folder / "prepare.py").read_bytes()).hexdigest(),
        "files": len(files),
        "names and sizes": hashlib.sha256(listed.encode()).hexdigest(),
    }


def files_in(out: Path, models: Iterable[str]) -> dict[str, int]:
    """The prepared files, path below `out` -> size: all that is no model's and not the runner's own."""
    paths = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    others = {*models, RESULT, PREPARED}
    return {name: path.stat().st_size for name, path in paths.items() if name.partition("/")[0] not in others}


def told(evaluation: dict[str, Any], names: Sequence[str]) -> str:
    """Of the evaluation's figures those with these names, as people read them; not all models have all."""
    parts = []
    for name in names:
        value: Any = evaluation
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            shown = f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"
            parts.append(f"{name} {shown}")
    return ", ".join(parts)


def train_and_evaluate(model: Path, train: list[str], evaluate: list[str], more: Sequence[str]) -> dict[str, Any]:
    """One model of the recipe, in the folder `model`; what result.json says of it.

    train, evaluate: the commands, to be run in the folder above; more: `--resume` or `--force`.
    """
    begun = (model / "config.yaml").exists()
    if begun and not more:
        raise RecipeError(
            f"{model} holds a model: go on with it (--resume), replace it (--force) or name another --out"
        )
    train = [*train, *(more if begun else [])]
    resumed = "--resume" in train
    model.mkdir(exist_ok=True)
    step, earlier = trained_before(model) if resumed else (0, 0.0)
    seconds, began = earlier, time.monotonic()
    with (model / "train.log").open("a" if resumed else "w", encoding="utf-8") as log:
        try:
            follow(train, model.parent, log)
        finally:  # interrupted, it counts too; where nothing was left to do, it does not
            if not resumed or last_checkpoint(model)[0] != step:
                seconds += time.monotonic() - began
            log.write(TRAINED.format(seconds) + "\n")
    evaluation = json.loads(capture(evaluate, model.parent))
    print(json.dumps(evaluation, ensure_ascii=False))
    return {
        "config": yaml.safe_load((model / "config.yaml").read_text("utf-8")),
        "weights": weights_in((model / "train.log").read_text("utf-8")),
        "train_seconds": round(seconds, 1),
        "commands": [shown(train), shown(evaluate)],
        "evaluation": evaluation,
    }


def trained_before(model: Path) -> tuple[int, float]:
    """How many updates a training that is to be gone on with has made, and in how many seconds.

    The log has them from start to end of the command. One that was killed had no time to say so; of that, what training
    itself counted up to its last checkpoint is known.
    """
    step, counted = last_checkpoint(model)
    try:
        log = (model / "train.log").read_text("utf-8")
    except FileNotFoundError:
        log = ""
    said = re.findall(re.escape(TRAINED).replace(r"\{:\.1f\}", r"([\d.]+)"), log)
    return step, max(counted, float(said[-1]) if said else 0.0)


def last_checkpoint(model: Path) -> tuple[int, float]:
    """Updates up to a model's last checkpoint, and the seconds that they took."""
    steps = checkpoint_steps(model)
    if not steps:
        return 0, 0.0
    try:
        state = read_json(model / "checkpoints" / f"{steps[-1]:010}" / "state.json", "checkpoint")
    except StorageError:
        return steps[-1], 0.0  # `unrolled train --resume` says what is wrong with it
    return steps[-1], float(state["position"]["seconds"])


def weights_in(log: str) -> int | None:
    """How many weights the model has, as `unrolled train` said."""
    found = re.search(r"([\d,]+) weights", log)
    return int(found[1].replace(",", "")) if found else None


def shown(command: list[str]) -> str:
    return shlex.join(["unrolled", *command])


def follow(command: list[str], folder: Path, log: TextIO) -> None:
    """Run `unrolled ...` in a folder, what it says on the screen and in the log.

    Raises:
        RecipeError: it failed.
    """

    def tell(line: str) -> None:
        print(line, end="", flush=True)
        log.write(line)
        log.flush()

    tell(f"$ {shown(command)}\n")
    full = [sys.executable, "-m", "unrolled", *command]
    streams: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "encoding": "utf-8",
        "cwd": folder,
    }
    with subprocess.Popen(full, **streams) as process:
        assert process.stdout is not None
        while True:
            try:
                while line := process.stdout.readline():
                    tell(line)
                break
            except KeyboardInterrupt:
                continue  # it has got the Ctrl-C too: it saves, says so and ends
    if process.returncode == 130:
        raise KeyboardInterrupt
    if process.returncode:
        raise RecipeError(f"it failed with exit code {process.returncode}: {shown(command)}")


def capture(command: list[str], folder: Path) -> str:
    """Run `unrolled ...` in a folder and return what it prints on standard output.

    Raises:
        RecipeError: it failed.
    """
    print(f"$ {shown(command)}", flush=True)
    full = [sys.executable, "-m", "unrolled", *command]
    done = subprocess.run(full, stdout=subprocess.PIPE, encoding="utf-8", cwd=folder, check=False)
    if done.returncode:
        raise RecipeError(f"it failed with exit code {done.returncode}: {shown(command)}")
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help=f"a recipe: {', '.join(recipe_names())}; or the folder of one")
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds the recipe's data")
    parser.add_argument("--out", type=Path, help="where everything goes (default: runs/NAME)")
    parser.add_argument("--model", help="only this one of the recipe's models")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="change a setting, e.g. training.steps=20")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with a training that was interrupted")
    again.add_argument("--force", action="store_true", help="replace models that are there")
    given = parser.parse_args()
    folder = HERE / given.name if (HERE / given.name).is_dir() else Path(given.name)
    out = given.out or Path("runs") / folder.name
    more = ["--resume"] if given.resume else ["--force"] if given.force else []
    try:
        run(folder, given.data, out, only=given.model, overrides=given.set, more=more)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
