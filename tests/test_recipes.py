"""The recipes: their configs are valid, their data is checked, and the runner goes from data to figures."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import lzma
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from unrolled.cells import cell_names
from unrolled.config import load_config, resolve
from unrolled.demo.road import DATA as SHIPPED

RECIPES = Path(__file__).parents[1] / "recipes"
NAMES = sorted(path.parent.name for path in RECIPES.glob("*/recipe.yaml"))


def load_runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipes_run", RECIPES / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runner = load_runner()


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_whole(name: str) -> None:
    recipe = runner.read_recipe(RECIPES / name)
    assert set(recipe) == {"data", "train", "test", "models", "figures"}
    assert callable(runner.load_prepare(RECIPES / name))
    readme = (RECIPES / name / "README.md").read_text("utf-8")
    for wanted in recipe["data"]:
        for file, sha256 in wanted.items():
            assert re.fullmatch("[0-9a-f]{64}", sha256), file
            assert sha256 in readme, f"{file}: the README gives another sha256"
    assert f"recipes/run.py {name} --data" in readme
    assert f"({name}/README.md)" in (RECIPES / "README.md").read_text("utf-8")
    for config in recipe["models"].values():
        resolve(load_config(RECIPES / name / config), cells=cell_names())


def test_recipes_are_found() -> None:
    assert runner.recipe_names() == NAMES
    assert {"shakespeare", "korean-language-model"} <= set(NAMES)


def test_korean_recipes_differ_in_the_unit_alone() -> None:
    char, jamo = (yaml.safe_load((RECIPES / "korean-language-model" / f"{unit}.yaml").read_text("utf-8"))
                  for unit in ("char", "jamo"))  # fmt: skip
    assert (char["input"].pop("unit"), jamo["input"].pop("unit")) == ("char", "jamo")
    assert char == jamo


def prepared(name: str, data: Path, out: Path) -> dict[str, str]:
    """What the recipe's prepare.py makes of the files in `data`, by name."""
    out.mkdir()
    runner.load_prepare(RECIPES / name)(data, out)
    return {path.name: path.read_text("utf-8") for path in sorted(out.iterdir())}


def write_packed(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pack = lzma.compress if name.endswith(".xz") else gzip.compress
        (folder / name).write_bytes(pack(text.encode()))


def test_shipped_text_is_the_recipes_data(tmp_path: Path) -> None:
    recipe = runner.read_recipe(RECIPES / "shakespeare")
    assert runner.find_data(recipe, SHIPPED)
    made = prepared("shakespeare", SHIPPED, tmp_path / "out")
    train, valid = (made[name].encode() for name in ("train.txt", "valid.txt"))
    assert hashlib.sha256(train + valid).hexdigest() == recipe["data"][0]["input.txt"]
    assert (len(train), len(valid)) == (1_003_854, 111_540)
    assert set(train) >= set(valid)


def test_chapters_are_held_out_whole(tmp_path: Path) -> None:
    refs = [f"{book} {chapter}:{verse}" for book in ("Genesis", "Ruth") for chapter in range(1, 41) for verse in (1, 2)]
    table = "\n".join(["ref\ten\tko", *(f"{ref}\tenglish\t{ref}" for ref in refs), ""])
    write_packed(tmp_path, {"verses.tsv.xz": table})
    made = prepared("korean-language-model", tmp_path, tmp_path / "out")
    train, valid = (made[name].splitlines() for name in ("train.txt", "valid.txt"))
    assert [ref for ref in refs if ref in set(train)] == train  # in order
    assert sorted(train + valid) == sorted(refs)
    assert {ref.split(":")[0] for ref in train}.isdisjoint({ref.split(":")[0] for ref in valid})
    assert 0 < len(valid) < len(refs) / 3


@pytest.mark.parametrize("name", ["english-tags", "korean-tags"])
def test_tags_are_unpacked(name: str, tmp_path: Path) -> None:
    parts = {part: f"{part}\tNOUN\tNN\n.\tPUNCT\t.\n\n나\tPRON\tNP\n\n" for part in ("train", "dev", "test")}
    write_packed(tmp_path, {f"{part}.tsv.xz": text for part, text in parts.items()})
    assert prepared(name, tmp_path, tmp_path / "out") == {f"{part}.conll": parts[part] for part in sorted(parts)}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A recipe of its own in `small/`, its data in `data/`."""
    folder, data = tmp_path / "small", tmp_path / "data"
    folder.mkdir()
    data.mkdir()
    text = "".join(f"{n} is {n * n}, and that is that.\n" for n in range(100))
    (data / "numbers.txt").write_text(text, "utf-8")
    recipe = {
        "data": [{"numbers.txt.xz": "0" * 64, "numbers.txt": hashlib.sha256(text.encode()).hexdigest()}],
        "train": ["train.txt", "--valid", "valid.txt"],
        "test": ["valid.txt"],
        "models": {"gru": "gru.yaml"},
        "figures": ["nats_per_char", "characters"],
    }
    (folder / "prepare.py").write_text(
        "def prepare(data, out):\n"
        "    text = (data / 'numbers.txt').read_text('utf-8')\n"
        "    (out / 'train.txt').write_text(text[:2000], 'utf-8')\n"
        "    (out / 'valid.txt').write_text(text[2000:], 'utf-8')\n",
        "utf-8",
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    config = {
        "core": {"cell": "gru", "hidden": 16, "layers": 1},
        "training": {"window": 16, "batch_size": 4, "steps": 30, "warmup": 0, "lr": 0.02},
    }
    (folder / "gru.yaml").write_text(yaml.safe_dump(config), "utf-8")
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`python recipes/run.py ...`; the exit code."""

    def main(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
        code: int = runner.main()
        return code

    return main


def test_runner_goes_from_data_to_figures(
    small: Path, tmp_path: Path, call: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert call(small, "--data", tmp_path / "data", "--out", out, "--set", "training.seed=7") == 0
    result = json.loads((out / "result.json").read_text("utf-8"))
    model = result["models"]["gru"]
    text = (tmp_path / "data" / "numbers.txt").read_text("utf-8")
    assert (out / "train.txt").read_text("utf-8") + (out / "valid.txt").read_text("utf-8") == text
    assert model["evaluation"]["characters"] == len((out / "valid.txt").read_text("utf-8")) - 1
    assert 0 < model["evaluation"]["nats_per_char"] < 3.5  # 30 updates from ln(22)
    assert model["weights"] > 0
    assert model["config"]["training"]["seed"] == 7
    log = (out / "gru" / "train.log").read_text("utf-8")
    assert log.splitlines()[0] == f"$ {model['commands'][0]}"
    assert "valid" in log
    screen = capfd.readouterr().out
    assert all(f"$ {command}" in screen for command in model["commands"])
    assert f"$ cd {out}\n" in screen
    assert result["data"] == {"numbers.txt": hashlib.sha256(text.encode()).hexdigest()}
    shown = f"gru: nats_per_char {model['evaluation']['nats_per_char']:.4f}, characters {len(text) - 2001}; trained "
    assert shown in screen

    # What is there is not overwritten unasked.
    assert call(small, "--data", tmp_path / "data", "--out", out) == 2
    assert "holds a model: go on with it (--resume)" in capfd.readouterr().err
    assert (out / "gru" / "train.log").read_text("utf-8") == log


def test_other_data_is_refused(
    small: Path, tmp_path: Path, call: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    (data / "numbers.txt").write_text("another text\n", "utf-8")
    assert call(small, "--data", data, "--out", out) == 2
    error = capfd.readouterr().err
    found = hashlib.sha256(b"another text\n").hexdigest()
    expected = runner.read_recipe(small)["data"][0]["numbers.txt"]
    assert error == (
        f"error: {data / 'numbers.txt'} is not the file that this recipe was made with: its sha256 is {found}, "
        f"expected {expected}. Get it from the source that the recipe's README.md names\n"
    )
    assert not out.exists()
    (data / "numbers.txt").unlink()
    assert call(small, "--data", data, "--out", out) == 2
    assert f"{data} has no numbers.txt or numbers.txt.xz" in capfd.readouterr().err


def test_unknown_names_are_refused(
    small: Path, tmp_path: Path, call: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert call("shakespear", "--data", tmp_path) == 2
    assert f"no recipe 'shakespear': choose from {', '.join(NAMES)}" in capfd.readouterr().err
    assert call(small, "--data", tmp_path / "data", "--model", "lstm", "--out", tmp_path / "out") == 2
    assert "no model 'lstm': choose from gru" in capfd.readouterr().err


def test_a_command_that_fails_is_told(
    small: Path, tmp_path: Path, call: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    code = call(small, "--data", tmp_path / "data", "--out", tmp_path / "out", "--set", "core.hiden=8")
    assert code == 2
    screen = capfd.readouterr()
    assert "did you mean" in screen.out
    assert "it failed with exit code 2: unrolled train" in screen.err


def test_figures_within_figures_are_told() -> None:
    evaluation = {"accuracy": 0.94947, "examples": 25094, "naive": {"mase": 1.0}, "r2": None}
    told = runner.told(evaluation, ["accuracy", "examples", "naive.mase", "r2", "bleu"])
    assert told == "accuracy 0.9495, examples 25,094, naive.mase 1.0000"
