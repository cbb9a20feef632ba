"""Model folders: what is saved comes back bit for bit, what is not whole is refused by name, nothing is lost when the
disk is full."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unrolled import cells, metrics, storage
from unrolled.cells import Cell, HiddenState
from unrolled.checkpoints import (
    Checkpoint,
    begin_folder,
    checkpoint_steps,
    holds_model,
    load,
    load_weights,
    read_checkpoint,
    save,
    weights_of,
    write_checkpoint,
)
from unrolled.config import resolve, to_dict
from unrolled.errors import ConfigError, StorageError, UnrolledError
from unrolled.kinds import Ends, NextSymbol, Text
from unrolled.model import LanguageModel
from unrolled.training import train
from unrolled.vocabulary import build_vocabulary

SOURCE = Path(__file__).parents[1] / "src" / "unrolled"

TEXT = "the cat sat on the mat\nthe dog sat on the log\n나는 간다\n" * 6

TINY: dict[str, Any] = {
    "cell": "lstm", "hidden": 6, "layers": 2, "dropout": 0.2, "window": 6, "batch_size": 3, "warmup": 0,
    "schedule": "constant", "average": 0.5, "save_every": 2, "valid_every": 4, "keep_memory": False, "steps": 9,
    "log_every": 3,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training; a test that changes it takes a copy."""
    out = tmp_path_factory.mktemp("trained") / "m"
    train(text, out, **TINY)
    return out


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "m")
    return tmp_path / "m"


def make(text: str = TEXT, **settings: Any) -> LanguageModel:
    layers: dict[str, dict[str, Any]] = {"core": {"hidden": 6, "layers": 2}}
    for key, value in settings.items():
        section, name = key.split("__")
        layers.setdefault(section, {})[name] = value
    config = resolve(layers)
    return LanguageModel(config, build_vocabulary(config.input.unit, [text], max_size=300))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def message(action: Callable[[], object], kind: type[UnrolledError] = StorageError) -> str:
    with pytest.raises(kind) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def state_of(folder: Path) -> tuple[bytes, bytes, int]:
    """All that must not depend on interruptions: the kept weights, and the last checkpoint's tensors and step."""
    step = checkpoint_steps(folder)[-1]
    return (
        (folder / "model.safetensors").read_bytes(),
        (folder / "checkpoints" / f"{step:010}" / "state.safetensors").read_bytes(),
        step,
    )


# -------------------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("unit", ["char", "jamo", "word", "subword"])
@pytest.mark.parametrize("cell", ["rnn", "rnn_relu", "lstm", "gru"])
def test_a_model_comes_back_bit_for_bit(tmp_path: Path, cell: str, unit: str) -> None:
    model = make(core__cell=cell, input__unit=unit, core__dropout=0.4)
    save(model, tmp_path / "m")
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        "checkpoints", "config.yaml", "model.safetensors", "vocabulary.json",
    ]  # fmt: skip
    loaded = load(str(tmp_path / "m"))
    assert same(weights_of(loaded), weights_of(model))
    assert loaded.config == model.config
    assert loaded.vocabulary.to_json() == model.vocabulary.to_json()
    assert not loaded.training
    ids = torch.from_numpy(model.vocabulary.encode("the cat sat").astype("int64"))[:, None]
    with torch.inference_mode():
        assert torch.equal(loaded(ids)[0], model.eval()(ids)[0])


def test_tied_weights_are_written_once_and_come_back_tied(tmp_path: Path) -> None:
    model = make(input__embedding=6, output__tied=True)
    save(model, tmp_path / "m")
    tensors, _ = storage.read_tensors(tmp_path / "m" / "model.safetensors", "model")
    assert "reader.table" in tensors
    assert "writer.weight" not in tensors
    loaded = load(tmp_path / "m")
    assert loaded.writer.weight is loaded.reader.table
    assert torch.equal(loaded.writer.weight, model.reader.table)  # type: ignore[arg-type]


class Leaky(Cell):
    """A cell of one's own with a weight, a buffer and a buffer that is no number to learn."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.mix = nn.Linear(input_size + hidden_size, hidden_size)
        self.register_buffer("leak", torch.rand(hidden_size))
        self.register_buffer("calls", torch.tensor(0))

    def step(self, x: Tensor, state: HiddenState) -> tuple[Tensor, HiddenState]:
        if self.training:
            self.calls += 1
        h = self.leak * state.h + (1 - self.leak) * torch.tanh(self.mix(torch.cat([x, state.h], -1)))
        return h, HiddenState(h)


def test_a_cell_of_ones_own_comes_back_with_its_buffers(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cells._CELLS, "leaky", Leaky)
    model = make(core__cell="leaky", input__embedding=4)
    save(model, tmp_path / "m")
    assert same(weights_of(load(tmp_path / "m")), weights_of(model))
    assert "core.layers.1.0.leak" in weights_of(model)

    # A training goes on with them too: `leak` is random, `calls` changes with every step.
    settings = {**TINY, "cell": "leaky", "embedding": 4}
    train(text, tmp_path / "whole", **settings)
    train(text, tmp_path / "parts", **{**settings, "steps": 4})
    train(text, tmp_path / "parts", resume=True, steps=9)
    assert state_of(tmp_path / "parts") == state_of(tmp_path / "whole")
    assert int(read_checkpoint(tmp_path / "whole", 9).tensors["weights.core.layers.0.0.calls"]) == 9 * 6

    monkeypatch.delitem(cells._CELLS, "leaky")
    assert message(lambda: load(tmp_path / "m"), ConfigError) == (
        "core.cell: unknown cell 'leaky': known: gru, lstm, rnn, rnn_relu (a cell of your own: import the module that "
        "registers it first)"
    )


def test_loading_leaves_the_callers_random_state_alone(trained: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load(trained)
    assert torch.equal(torch.rand(2), expected)


def test_nothing_is_pickled() -> None:
    """A model folder may come from anyone: reading it must not be able to run anything."""
    pattern = re.compile(r"torch\.(save|load)\b|\bimport .*(pickle|dill|joblib|marshal|shelve)|yaml\.(unsafe_)?load\(")
    lines = [(path, line) for path in sorted(SOURCE.rglob("*.py")) for line in path.read_text().splitlines()]
    assert len(lines) > 1000
    found = [f"{path.relative_to(SOURCE)}: {line.strip()}" for path, line in lines if pattern.search(line)]
    assert found == []


def test_a_model_is_not_overwritten_unless_asked(tmp_path: Path, text: Path) -> None:
    model = make()
    save(model, tmp_path / "m")
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir() if path.is_file()}
    assert message(lambda: save(make(), tmp_path / "m")) == (
        f"{tmp_path}/m already holds a model: go on with it (--resume), replace it (--force, overwrite=True) or choose "
        "another folder"
    )
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir() if path.is_file()} == before

    train(text, tmp_path / "m", force=True, **TINY)
    (tmp_path / "m" / "notes.txt").write_text("mine")
    (tmp_path / "m" / ".tmp-unrolled-0123456789abcdef").write_text("of a killed process")
    save(model, tmp_path / "m", overwrite=True)
    assert sorted(path.relative_to(tmp_path / "m").as_posix() for path in (tmp_path / "m").rglob("*")) == [
        "checkpoints", "config.yaml", "model.safetensors", "notes.txt", "vocabulary.json",
    ]  # fmt: skip
    assert {name: (tmp_path / "m" / name).read_bytes() for name in before} == before
    assert (tmp_path / "m" / "notes.txt").read_text() == "mine"


def test_folders_that_cannot_be_written_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert message(lambda: save(make(), tmp_path / "file")) == (
        f"{tmp_path}/file is a file, expected a folder to write the model to"
    )
    save(make(), tmp_path / "m")

    def refused(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(shutil, "rmtree", refused)
    assert message(lambda: save(make(), tmp_path / "m", overwrite=True)) == (
        f"{tmp_path}/m: cannot replace the model in it: Permission denied"
    )
    assert holds_model(tmp_path / "m")
    load(tmp_path / "m")


# ----------------------------------------------------------------------------------------- what is not whole

FILES = {
    "config.yaml": "was changed after unrolled wrote it",
    "vocabulary.json": "is damaged",
    "model.safetensors": "is damaged",
    "checkpoints/0000000009/state.json": "is damaged",
    "checkpoints/0000000009/state.safetensors": "is damaged",
}


def reader_of(folder: Path, name: str, text: Path) -> Callable[[], object]:
    """What reads a file: loading, or for a checkpoint resuming."""
    if name.startswith("checkpoints"):
        return lambda: train(text, folder, resume=True, steps=20)
    return lambda: load(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, text: Path, name: str) -> None:
    (folder / name).unlink()
    kind = {"config": "config", "vocabulary": "vocabulary", "model": "model"}.get(name.split(".")[0], "checkpoint")
    path = folder / name
    assert message(reader_of(folder, name, text)) == (
        f"folder {path.parent} lacks {path.name}: expected a file of kind {kind!r} that unrolled wrote"
        if name != "config.yaml"
        else f"folder {folder} lacks config.yaml: expected a file of kind 'config' that unrolled wrote"
    )


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_or_with_a_bit_changed_is_named(folder: Path, text: Path, name: str) -> None:
    path, action = folder / name, reader_of(folder, name, text)
    whole = path.read_bytes()
    for kept in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        assert str(path) in message(action)
    for place in (0, 150, len(whole) // 3, len(whole) // 2, len(whole) - 2):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        said = message(action)
        assert said.startswith(str(path))
        assert place < 150 or FILES[name] in said
    path.write_bytes(whole)
    action()


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_a_newer_version_says_so(folder: Path, text: Path, name: str) -> None:
    path, action = folder / name, reader_of(folder, name, text)
    changed = re.sub(rb'(version"?:? ?"?)1\b', rb"\g<1>2", path.read_bytes(), count=1)
    assert changed != path.read_bytes()
    path.write_bytes(changed)
    assert message(action) == (f"{path} was written by a newer unrolled (version 2, this one reads up to 1): upgrade")


def test_files_of_different_models_are_not_mixed(folder: Path, text: Path, tmp_path: Path) -> None:
    """Each file is whole; it is another model's."""
    (tmp_path / "other.txt").write_text(TEXT.replace("c", "q").replace("m", "z"))  # as many symbols, other ones
    train(tmp_path / "other.txt", tmp_path / "other", **TINY)
    train(text, tmp_path / "wider", **{**TINY, "hidden": 7})
    backup = tmp_path / "backup"
    shutil.copytree(folder, backup)

    def mixed(name: str, source: str) -> None:
        shutil.rmtree(folder)
        shutil.copytree(backup, folder)
        shutil.copyfile(tmp_path / source / name, folder / name)

    for name in ("vocabulary.json", "model.safetensors"):
        mixed(name, "other")
        assert message(lambda: load(folder)) == (
            f"{folder}/model.safetensors: these weights belong to another vocabulary than vocabulary.json beside them: "
            "the files come from different models"
        )
    for name, want, got in (("model.safetensors", 6, 7), ("config.yaml", 7, 6)):
        mixed(name, "wider")
        assert message(lambda: load(folder)) == (
            f"{folder}/model.safetensors: weight core.layers.0.0.bias_hh: the config asks for [{4 * want}], the file "
            f"has [{4 * got}]"
        )
    shutil.copyfile(backup / "checkpoints/0000000009/state.json", folder / "vocabulary.json")
    assert message(lambda: load(folder)) == (
        f"{folder}/vocabulary.json holds kind 'checkpoint': expected kind 'vocabulary'"
    )


@pytest.mark.parametrize("changed", [{"hidden": 7}, {"batch_size": 2}, {"average": 0.0}, {"cell": "gru"}], ids=str)
def test_a_checkpoint_of_another_model_is_not_resumed(
    folder: Path, text: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    train(text, tmp_path / "other", **{**TINY, **changed})
    shutil.rmtree(folder / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", folder / "checkpoints")
    assert message(lambda: train(text, folder, resume=True, steps=20)) == (
        f"{folder}: checkpoint 9 is another model's: its vocabulary, batch size or layers are not those of the config "
        "and vocabulary beside it; put the original folder back"
    )


def test_a_checkpoint_of_another_vocabulary_is_not_resumed(folder: Path, text: Path, tmp_path: Path) -> None:
    """The same text and as many symbols, but which is which differs: the weights would mean something else."""
    vocabulary = build_vocabulary("char", [TEXT])
    other = build_vocabulary("char", [TEXT.replace("c", "q") * 3])
    assert len(other) == len(vocabulary)
    storage.write_json(folder / "vocabulary.json", "vocabulary", Ends(Text(other), NextSymbol()).to_json())
    said = message(lambda: train(text, folder, resume=True, steps=20))
    assert said == (
        f"{folder}: checkpoint 9 is another model's: its vocabulary, batch size or layers are not those of the config "
        "and vocabulary beside it; put the original folder back"
    )


def test_weights_of_other_names_are_refused() -> None:
    model = make()
    tensors = {name: t for name, t in weights_of(model).items() if name != "writer.bias"}
    assert message(lambda: load_weights(model, tensors, "here")) == (
        f"here: weight writer.bias: the config asks for {list(model.writer.bias.shape)}, the file has none"
    )
    tensors = {**weights_of(model), "a": torch.zeros(2, 3)}
    assert message(lambda: load_weights(model, tensors, "here")) == (
        "here: weight a: the config asks for none, the file has [2, 3]"
    )


def test_folders_without_a_model(tmp_path: Path) -> None:
    assert message(lambda: load(tmp_path / "nowhere")) == f"{tmp_path}/nowhere: no such model folder"
    assert message(lambda: load(tmp_path)) == (
        f"folder {tmp_path} lacks config.yaml: expected a file of kind 'config' that unrolled wrote"
    )
    assert not holds_model(tmp_path)
    assert not holds_model(tmp_path / "nowhere")


def test_a_config_that_does_not_make_sense_is_named(tmp_path: Path) -> None:
    """Whole, and of another unrolled that had other settings."""
    save(make(), tmp_path / "m")
    settings = to_dict(make().config)
    settings["core"]["hiden"] = settings["core"].pop("hidden")
    storage.write_yaml(tmp_path / "m" / "config.yaml", "config", settings)
    assert message(lambda: load(tmp_path / "m")) == (
        f"{tmp_path}/m/config.yaml: unknown setting 'core.hiden': did you mean 'hidden'?"
    )


# ------------------------------------------------------------------------------------------------ checkpoints


def test_the_last_checkpoint_and_those_to_keep_stay(tmp_path: Path) -> None:
    model = make()
    begin_folder(tmp_path / "m", model.config, model.ends)
    assert checkpoint_steps(tmp_path / "m") == []
    for step, keep, expected in (
        (0, {0}, [0]),
        (3, {0}, [0, 3]),
        (5, {3}, [3, 5]),
        (12, {3}, [3, 12]),
        (13, {13}, [13]),
    ):
        (tmp_path / "m" / "checkpoints" / ".tmp-unrolled-0123456789abcdef").mkdir()
        write_checkpoint(tmp_path / "m", Checkpoint(step, {"t": torch.full((2,), step)}, {"step": step}), keep)
        assert checkpoint_steps(tmp_path / "m") == expected
        assert len(list((tmp_path / "m" / "checkpoints").iterdir())) == len(expected)
    checkpoint = read_checkpoint(tmp_path / "m", 13)
    assert (checkpoint.step, checkpoint.content) == (13, {"step": 13})
    assert torch.equal(checkpoint.tensors["t"], torch.full((2,), 13))
    # As it is: a checkpoint is never exchanged for another of the same step.
    write_checkpoint(tmp_path / "m", Checkpoint(13, {"t": torch.zeros(1)}, {}), set())
    assert read_checkpoint(tmp_path / "m", 13).content == {"step": 13}


def test_a_damaged_last_checkpoint_can_be_deleted_to_go_on_from_the_best(text: Path, tmp_path: Path) -> None:
    settings = {**TINY, "lr": 0.5}  # too much: the first validation is the best
    train(text, tmp_path / "whole", **settings)
    train(text, tmp_path / "m", **settings)
    best, newest = checkpoint_steps(tmp_path / "m")
    path = tmp_path / "m" / "checkpoints" / f"{newest:010}"
    (path / "state.safetensors").write_bytes(b"")
    assert "an earlier checkpoint" in message(lambda: train(text, tmp_path / "m", resume=True))
    shutil.rmtree(path)
    train(text, tmp_path / "m", resume=True)
    assert checkpoint_steps(tmp_path / "m") == [best, newest]
    assert state_of(tmp_path / "m") == state_of(tmp_path / "whole")


# -------------------------------------------------------------------------------------------------- a full disk


def test_a_full_disk_at_any_write_loses_nothing(
    trained: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC at the n-th flush, for every n: one line that names a path, and the training goes on from there."""
    flush = os.fsync
    left = 0

    def full(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    n = resumed = 0
    while True:
        n += 1
        left = n
        out = tmp_path / f"m{n}"
        monkeypatch.setattr(os, "fsync", full)
        try:
            train(text, out, **TINY)
        except StorageError as error:
            said = str(error)
        else:
            break
        finally:
            monkeypatch.setattr(os, "fsync", lambda descriptor: None)
        assert "\n" not in said
        assert "No space left on device" in said
        assert str(tmp_path) in said
        assert ".tmp-unrolled" not in said
        assert not [path for path in out.rglob("*") if path.name.startswith(".tmp")]
        if n % 3 == 0 and checkpoint_steps(out):  # each third: going on takes as long as all the rest
            resumed += 1
            before = read_checkpoint(out, checkpoint_steps(out)[-1])
            assert before.step <= 9
            train(text, out, resume=True)
            assert state_of(out) == state_of(trained)
        shutil.rmtree(out, ignore_errors=True)
    monkeypatch.setattr(os, "fsync", flush)
    assert n > 40, "a training of 6 checkpoints has more flushes than this"
    assert resumed > 8


def test_a_full_disk_under_the_log_is_named(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")

    def open_full(self: Any, step: int) -> None:
        self.file = open("/dev/full", "w")  # noqa: SIM115

    monkeypatch.setattr(metrics.MetricsLog, "open", open_full)
    said = message(lambda: train(text, tmp_path / "m", **TINY))
    assert said == f"cannot write {tmp_path}/m/metrics.jsonl: No space left on device"


def test_a_full_disk_is_one_line_and_exit_code_2(trained: Path, text: Path, tmp_path: Path) -> None:
    """The real thing: the kernel refuses files above a size that the first checkpoint keeps below and the next, which
    has the optimiser's averages too, does not."""
    program = """
        import resource, signal, sys
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
        from unrolled.cli import main
        main()
    """
    first = tmp_path / "first"
    train(text, first, **{**TINY, "steps": 1, "lr": 1e-30})
    limit = (first / "checkpoints/0000000001/state.safetensors").stat().st_size - 1
    flags = [f"--set={name}={json.dumps(value)}" for name, value in TINY.items()]
    out = tmp_path / "m"
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(limit), "train", text, "--out", out, *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2, result.stderr
    path = out / "checkpoints" / "0000000002" / "state.safetensors"
    assert result.stderr.splitlines()[-1] == (
        f"error: cannot write {path}: File too large; nothing is left of the attempt"
    )
    assert "Traceback" not in result.stderr
    assert checkpoint_steps(out) == [0]
    train(text, out, resume=True)
    assert state_of(out) == state_of(trained)
