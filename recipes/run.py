"""Run a recipe: from data that anyone can get to a model and its figures.

    python recipes/run.py NAME --data DIR [--out DIR] [--model NAME] [--set KEY=VALUE ...] [--resume | --force]

Checks that DIR holds the recipe's data (sha256), prepares train.txt and valid.txt, calls `unrolled train` and
`unrolled evaluate` on the held-out part for each of the recipe's models, and leaves train.log and result.json beside
the model folders. The commands are printed as they run, to be run by hand as well.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import yaml

from unrolled.doctor import examine

HERE = Path(__file__).resolve().parent


class RecipeError(Exception):
    """What keeps a recipe from running, said to the user in one line."""


# ---------------------------------------------------------------------------------------- preparing the data


def split_by_position(text: str) -> tuple[str, str]:
    """The first 90 % of the characters to train, the last 10 % held out."""
    cut = int(0.9 * len(text))
    return text[:cut], text[cut:]


def verses_by_chapter(table: str) -> tuple[str, str]:
    """The column `ko` of a table of Bible verses, a verse a line, in order; about a tenth of the chapters is held out.

    A chapter is held out if the sha256 of its name (`Genesis 1`) is divisible by ten: whole chapters from all books, so
    that the text runs on within each and both parts are of one kind.
    """
    header, *rows = table.splitlines()
    columns = header.split("\t")
    ref, ko = columns.index("ref"), columns.index("ko")
    parts: tuple[list[str], list[str]] = ([], [])
    for row in rows:
        cells = row.split("\t")
        chapter = cells[ref].rsplit(":", 1)[0]
        held_out = int(hashlib.sha256(chapter.encode()).hexdigest(), 16) % 10 == 0
        parts[held_out].append(cells[ko] + "\n")
    return "".join(parts[0]), "".join(parts[1])


PREPARE: dict[str, Callable[[str], tuple[str, str]]] = {
    "split_by_position": split_by_position,
    "verses_by_chapter": verses_by_chapter,
}


def read_recipe(folder: Path) -> dict[str, Any]:
    """`recipe.yaml` of a recipe's folder.

    Keys: data (file name -> sha256; any one of the files will do), prepare (a function of this script), models
    (name -> config file).

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


def find_data(recipe: dict[str, Any], data: Path) -> Path:
    """The recipe's file in the folder `data`, its sha256 checked.

    Raises:
        RecipeError: it is missing or another one.
    """
    wanted: dict[str, str] = recipe["data"]
    for name, expected in wanted.items():
        path: Path = data / name
        if not path.is_file():
            continue
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != expected:
            raise RecipeError(
                f"{path} is not the file that this recipe was made with: its sha256 is {found}, expected {expected}. "
                "Get it from the source that the recipe's README.md names"
            )
        return path
    raise RecipeError(
        f"{data} has no {' or '.join(wanted)}: the recipe's README.md says where to get it; name its folder with --data"
    )


def prepare(recipe: dict[str, Any], data: Path, out: Path) -> None:
    """Write train.txt and valid.txt to `out`."""
    content = data.read_bytes()
    text = (lzma.decompress(content) if data.suffix == ".xz" else content).decode("utf-8")
    for name, part in zip(("train.txt", "valid.txt"), PREPARE[recipe["prepare"]](text), strict=True):
        (out / name).write_text(part, "utf-8", newline="\n")
        print(f"{out / name}: {len(part):,} characters", flush=True)


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
    source = find_data(recipe, data)
    out.mkdir(parents=True, exist_ok=True)
    prepare(recipe, source, out)
    sha256 = recipe["data"][source.name]
    path = out / "result.json"
    old = json.loads(path.read_text("utf-8"))["models"] if only and path.exists() else {}
    result: dict[str, Any] = {"recipe": folder.name, "data": {source.name: sha256}, "machine": examine(), "models": old}
    for name, config in models.items():
        if only is None or name == only:
            result["models"][name] = train_and_evaluate(name, folder / config, out, overrides or [], more or [])
            path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print()
    for name, model in result["models"].items():
        score = model["evaluation"]
        print(
            f"{name}: {score['nats_per_char']:.4f} nats, {score['bits_per_char']:.4f} bits per character on "
            f"{score['characters']:,} characters ({score['unknown']} unknown symbols); trained "
            f"{model['train_seconds']:,.0f} s"
        )
    print(f"written: {path}")
    return result


def train_and_evaluate(name: str, config: Path, out: Path, overrides: list[str], more: list[str]) -> dict[str, Any]:
    """One model of the recipe, in `out/name`; what result.json says of it. more: `--resume` or `--force`."""
    model = out / name
    begun = (model / "config.yaml").exists()
    if begun and not more:
        raise RecipeError(
            f"{model} holds a model: go on with it (--resume), replace it (--force) or name another --out"
        )
    train = ["train", str(out / "train.txt"), "--valid", str(out / "valid.txt"), "--config", str(config)]
    train += ["--out", str(model), *(part for setting in overrides for part in ("--set", setting))]
    train += more if begun else []
    evaluate = ["evaluate", str(model), str(out / "valid.txt"), "--json"]
    began = time.monotonic()
    model.mkdir(exist_ok=True)
    with (model / "train.log").open("a" if "--resume" in train else "w", encoding="utf-8") as log:
        follow(train, log)
    train_seconds = time.monotonic() - began
    evaluation = json.loads(capture(evaluate))
    print(json.dumps(evaluation))
    return {
        "config": yaml.safe_load((model / "config.yaml").read_text("utf-8")),
        "weights": weights_in((model / "train.log").read_text("utf-8")),
        "train_seconds": round(train_seconds, 1),
        "commands": [shown(train), shown(evaluate)],
        "evaluation": evaluation,
    }


def weights_in(log: str) -> int | None:
    """How many weights the model has, as `unrolled train` said."""
    found = re.search(r"([\d,]+) weights", log)
    return int(found[1].replace(",", "")) if found else None


def shown(command: list[str]) -> str:
    return shlex.join(["unrolled", *command])


def follow(command: list[str], log: TextIO) -> None:
    """Run `unrolled ...`, what it says on the screen and in the log.

    Raises:
        RecipeError: it failed.
    """

    def tell(line: str) -> None:
        print(line, end="", flush=True)
        log.write(line)
        log.flush()

    tell(f"$ {shown(command)}\n")
    full = [sys.executable, "-m", "unrolled", *command]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
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


def capture(command: list[str]) -> str:
    """Run `unrolled ...` and return what it prints on standard output.

    Raises:
        RecipeError: it failed.
    """
    print(f"$ {shown(command)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "unrolled", *command], stdout=subprocess.PIPE, text=True, encoding="utf-8", check=False
    )
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
