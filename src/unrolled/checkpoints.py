"""A model folder, and everything in it that is needed to go on from where a training stopped.

    shakespeare/
        config.yaml             every setting, resolved
        vocabulary.json         what was learnt about both ends: symbols <-> ids, labels, scales
        model.safetensors       the best weights so far: what evaluate and generate use
        metrics.jsonl           one line per logged update and per validation
        examples.json           a few examples of the validation part, for reports; not needed
        report.html             what there is to be seen; not needed
        checkpoints/0000001234/ weights, optimiser, averages, carry (state.safetensors) and position (state.json)

Each file verifies itself and appears whole or not at all (`unrolled.storage`). The weights name the
vocabulary they were trained with, so that files of different models cannot be mixed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unrolled import storage
from unrolled.config import Config, resolve, to_dict
from unrolled.errors import ConfigError, StorageError
from unrolled.kinds import Ends
from unrolled.model import Model, build_model

__all__ = [
    "Checkpoint",
    "begin_folder",
    "checkpoint_steps",
    "fingerprint",
    "holds_model",
    "load",
    "load_weights",
    "prune_checkpoints",
    "read_checkpoint",
    "read_config",
    "read_ends",
    "save",
    "weights_of",
    "write_checkpoint",
    "write_weights",
]

_CONFIG, _VOCABULARY, _WEIGHTS, _CHECKPOINTS = "config.yaml", "vocabulary.json", "model.safetensors", "checkpoints"


@dataclass(frozen=True)
class Checkpoint:
    """A moment of a training, complete. tensors: all that is numbers; content: the rest, JSON values."""

    step: int
    tensors: dict[str, Tensor]
    content: dict[str, Any]


def holds_model(folder: str | Path) -> bool:
    """Whether the folder holds a model, finished or not."""
    return (Path(folder) / _CONFIG).exists()


def save(model: Model, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write a model to a folder that `load`, `unrolled evaluate` and `unrolled generate` read.

    Raises:
        StorageError: the folder holds a model already and overwrite is not set, or it cannot be written.
    """
    folder = Path(folder)
    begin_folder(folder, model.config, model.ends, overwrite=overwrite)
    write_weights(folder, weights_of(model), model.ends)


def load(folder: str | Path) -> Model:
    """The model in a folder, in evaluation mode, its weights as `save` or training wrote them, bit for bit.

    Nothing that the folder names is imported or run; a cell of your own must be registered before.

    Raises:
        StorageError: a file is missing, damaged, from a newer version or another model's.
        ConfigError: the config names a cell that is not registered.
    """
    folder = Path(folder)
    config = read_config(folder)
    ends = read_ends(folder)
    tensors, metadata = storage.read_tensors(folder / _WEIGHTS, "model")
    if metadata.get("vocabulary") != fingerprint(ends):
        raise StorageError(
            f"{folder / _WEIGHTS}: these weights belong to another vocabulary than {_VOCABULARY} beside them: "
            "the files come from different models"
        )
    with torch.random.fork_rng(devices=[]):  # building draws initial weights; the caller's random state is not ours
        model = build_model(config, ends)
    load_weights(model, tensors, folder / _WEIGHTS)
    return model.eval()


def begin_folder(folder: Path, config: Config, ends: Ends, *, overwrite: bool = False) -> None:
    """Make a model folder without weights. The config is written last: a folder that has one has the rest.

    overwrite: an earlier model's files in it are deleted first (nothing else in the folder is touched).

    Raises:
        StorageError: the folder holds a model and overwrite is not set, or it cannot be written.
    """
    if holds_model(folder):
        if not overwrite:
            raise StorageError(
                f"{folder} already holds a model: go on with it (--resume), replace it (--force, overwrite=True) or "
                "choose another folder"
            )
        try:
            # The config last: whoever is killed before leaves a folder that still counts as holding a model, so
            # that no later one can come to lie beside this one's checkpoints and be resumed from them.
            if (folder / _CHECKPOINTS).exists():
                shutil.rmtree(folder / _CHECKPOINTS)
            storage.remove_leftovers(folder)
            for name in (_WEIGHTS, "metrics.jsonl", "examples.json", "report.html", _VOCABULARY, _CONFIG):
                (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{folder}: cannot replace the model in it: {error.strerror}") from error
    elif folder.exists() and not folder.is_dir():
        raise StorageError(f"{folder} is a file, expected a folder to write the model to")
    storage.make_folder(folder)
    storage.make_folder(folder / _CHECKPOINTS)
    storage.write_json(folder / _VOCABULARY, "vocabulary", ends.to_json())
    storage.write_yaml(folder / _CONFIG, "config", to_dict(config))


def read_config(folder: Path) -> Config:
    """The resolved config of a model folder.

    Raises:
        StorageError: the folder or the file is missing, damaged or newer.
    """
    if not folder.is_dir():
        raise StorageError(f"{folder}: {'a file, expected a' if folder.exists() else 'no such'} model folder")
    try:
        return resolve(storage.read_yaml(folder / _CONFIG, "config"))
    except ConfigError as error:
        raise StorageError(f"{folder / _CONFIG}: {error}") from error


def read_ends(folder: Path) -> Ends:
    """What a model folder keeps of its two ends: vocabularies, labels, scales."""
    return Ends.from_json(storage.read_json(folder / _VOCABULARY, "vocabulary"))


def fingerprint(ends: Ends) -> str:
    """64 hexadecimal digits that differ when the ends do."""
    return hashlib.sha256(json.dumps(ends.to_json(), sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------ weights


def weights_of(model: Model) -> dict[str, Tensor]:
    """The model's weights by name, a shared (tied) one under its first name only; not copies."""
    named: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            named[name] = tensor.detach()
    return named


def write_weights(
    folder: Path, tensors: Mapping[str, Tensor], ends: Ends, about: Mapping[str, str] | None = None
) -> None:
    """Replace the folder's `model.safetensors`; `about` is kept beside the weights, as strings."""
    metadata = {"vocabulary": fingerprint(ends), **(about or {})}
    storage.write_tensors(folder / _WEIGHTS, "model", tensors, metadata)


def load_weights(model: Model, tensors: Mapping[str, Tensor], source: Path | str) -> None:
    """Copy weights into a model.

    Raises:
        StorageError: a name or a shape differs; the message names the first that does, and `source`.
    """
    expected = weights_of(model)
    for name in sorted(expected.keys() | tensors.keys()):
        want, got = expected.get(name), tensors.get(name)
        if want is None or got is None or want.shape != got.shape:
            raise StorageError(
                f"{source}: weight {name}: the config asks for {_shape(want)}, the file has {_shape(got)}"
            )
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(tensors[name])


def _shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else str(list(tensor.shape))


# -------------------------------------------------------------------------------------------- checkpoints


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a model folder, ascending."""
    parent = folder / _CHECKPOINTS
    return sorted(int(p.name) for p in parent.iterdir() if p.name.isdigit()) if parent.is_dir() else []


def write_checkpoint(folder: Path, checkpoint: Checkpoint, keep: set[int]) -> None:
    """Add a checkpoint; once it is durable, delete all others but those of the steps in `keep`.

    Raises:
        StorageError: it cannot be written; the earlier ones are whole.
    """
    parent = folder / _CHECKPOINTS
    storage.make_folder(parent)
    storage.remove_leftovers(parent)
    storage.remove_leftovers(folder)

    def write(target: Path) -> None:
        storage.write_tensors(target / "state.safetensors", "checkpoint", checkpoint.tensors)
        storage.write_json(target / "state.json", "checkpoint", checkpoint.content)

    if checkpoint.step not in checkpoint_steps(folder):
        storage.write_folder(parent / f"{checkpoint.step:010}", write)
    prune_checkpoints(folder, keep | {checkpoint.step})


def prune_checkpoints(folder: Path, keep: set[int]) -> None:
    """Delete all checkpoints but those of the steps in `keep`, and what killed processes left."""
    storage.remove_leftovers(folder / _CHECKPOINTS)
    storage.remove_leftovers(folder)
    for step in checkpoint_steps(folder):
        if step not in keep:
            shutil.rmtree(folder / _CHECKPOINTS / f"{step:010}", ignore_errors=True)


def read_checkpoint(folder: Path, step: int) -> Checkpoint:
    """A checkpoint of a model folder by its step.

    Raises:
        StorageError: it is missing or damaged.
    """
    path = folder / _CHECKPOINTS / f"{step:010}"
    tensors, _ = storage.read_tensors(path / "state.safetensors", "checkpoint")
    return Checkpoint(step, tensors, storage.read_json(path / "state.json", "checkpoint"))
