"""The examples run as they stand, and the readmes show them as they are."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from samples import ENGLISH, sentences

ROOT = Path(__file__).parents[1]
OWN_CELL = ROOT / "examples" / "own_cell.py"
LANGUAGE_MODEL = ROOT / "examples" / "language_model.py"
SMALL: dict[str, Any] = {"hidden": 12, "layers": 1, "window": 16, "batch_size": 8, "lr": 0.01, "warmup": 5}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(ENGLISH, encoding="utf-8")
    return path


def main_of(example: Path) -> Any:
    return runpy.run_path(str(example))["main"]


def loaded(out: Path) -> Any:
    import unrolled

    return unrolled.load(out)


@pytest.mark.parametrize("example, most", [(OWN_CELL, 60), (LANGUAGE_MODEL, 40)])
def test_examples_are_short(example: Path, most: int) -> None:
    assert len(example.read_text("utf-8").splitlines()) < most


def test_a_cell_of_ones_own_trains_saves_loads_and_writes(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mgu"
    written = main_of(OWN_CELL)(str(text), str(out), epochs=4, **SMALL)
    assert len(written) == 100
    nats, sample = capsys.readouterr().out.split(" nats per character\n")
    assert 0 < float(nats) < 2.9, "no better than the uniform distribution over 20 symbols"
    assert sample == f"The {written}\n"
    model = loaded(out)
    assert type(model.core.layers[0][0]).__name__ == "MinimalGatedUnit"
    # Law 1 holds for it too: the folder's model, stepped, scores as when it reads at once.
    import torch

    ids = torch.from_numpy(model.vocabulary.encode("The cat sat").astype("int64"))[:, None]
    scores, _ = model(ids)
    state, rows = model.begin(), []
    for row in ids:
        stepped, state = model.step(row, state)
        rows.append(stepped)
    assert torch.allclose(torch.stack(rows), scores, atol=1e-5)


def test_the_language_model_of_the_readme_runs(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_of(LANGUAGE_MODEL)(str(text), str(tmp_path / "lm"), cell="gru", epochs=2, **SMALL)
    printed = capsys.readouterr()
    form, figures, *written, likeliest = printed.out.splitlines()
    assert form == "text -> next: many-to-many, aligned, autoregressive (language model)"
    assert re.fullmatch(r"\d\.\d{3} nats, \d\.\d{3} bits per character", figures)
    assert len("\n".join(written)) == 200
    assert re.fullmatch(r"after 'The': \['.+', '.+', '.+'\]", likeliest)
    assert "valid" in printed.err, "progress is shown on stderr"


@pytest.mark.parametrize("example", [OWN_CELL, LANGUAGE_MODEL], ids=lambda path: path.stem)
def test_examples_run_as_their_first_lines_say(example: Path, tmp_path: Path) -> None:
    source = example.read_text("utf-8")
    command = re.search(rf"Run it: python examples/{example.name} (TEXT\.txt)( OUT_FOLDER)?", source)
    assert command, "the docstring says how to run it"
    path = tmp_path / "text.txt"
    path.write_text(sentences("The the cat sat on a mat", 800), encoding="utf-8")  # enough for the default window
    arguments = [str(path), *([str(tmp_path / "out")] if command[2] else [])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(example), *arguments],
        capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=280, check=False, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert " per character" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["text.txt", *(["out"] if command[2] else [])])


@pytest.mark.parametrize("readme", ["README.md", "README.ko.md"])
def test_the_readmes_python_is_the_example(readme: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / readme).read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert LANGUAGE_MODEL.read_text("utf-8") in blocks, (
        f"the Python in {readme} is not examples/language_model.py: copy that file into its ```python block"
    )


def test_the_notes_network_learns_hello(capsys: pytest.CaptureFixture[str]) -> None:
    """One-hot letters, three hidden units, no biases: what it prints is in docs/lecture-notes.md."""
    assert main_of(ROOT / "examples" / "hello.py")() == "hello"
    said = capsys.readouterr().out
    assert said.count("x_1 = h") == 2
    assert "update   1: loss 1.3" in said, "about ln 4: four letters are equally likely"
    assert "It writes: hello" in said
