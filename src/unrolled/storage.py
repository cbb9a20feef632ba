"""Files that are either whole or not there, and that verify themselves when they are read.

Three formats, no pickle: tensors (safetensors), JSON, and YAML for what people read. Each file names in its
first bytes who wrote it, what it is, in which version, and a sha256 over *every* byte of the file with its own
64 digits counted as zeros; no separate list of checksums exists that could fall out of step.

    tensors   {"__metadata__":{"format":"unrolled","kind":…,"version":"1","sha256":…, …}, …}   readable by safetensors
    JSON      {"format": "unrolled", "kind": …, "version": 1, "sha256": …, "content": …}
    YAML      # unrolled KIND, version 1, sha256 …

A write goes to a temporary name in the same folder, is flushed to the disk and then renamed: whoever reads,
after a crash too, finds the earlier file or the new one, each whole. A process that was killed leaves at most
a temporary, which `remove_leftovers` deletes. POSIX only (Linux, macOS): it needs rename, fsync and flock.

Every failure is a StorageError that names the file, what was expected and what to do. What a caller can only
get wrong in code (a tuple in a JSON object, a reserved key) is a ValueError or TypeError before anything is written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unrolled.errors import StorageError

if TYPE_CHECKING:
    import torch

__all__ = [
    "VERSION",
    "make_folder",
    "read_json",
    "read_tensors",
    "read_yaml",
    "remove_leftovers",
    "write_folder",
    "write_json",
    "write_tensors",
    "write_text",
    "write_yaml",
]

VERSION = 1
"""The version of the three formats that this unrolled writes, and the newest it reads."""

_UNSEALED = "0" * 64
_KIND = re.compile(r"[a-z][a-z-]*")
_RESERVED = ("format", "kind", "version", "sha256")
_TEMPORARY = re.compile(r"\.tmp-unrolled-[0-9a-f]{16}")

_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL"} | {
    f"{sign}int{bits}": f"{letter}{bits}" for sign, letter in (("", "I"), ("u", "U")) for bits in (8, 16, 32, 64)
}
"""What safetensors calls torch's dtypes."""

# The first bytes of each format: kind, version, digest. They are matched before anything is parsed, so that no
# parser ever meets a damaged file.
_TENSORS_HEAD = re.compile(
    rb'.{8}\{"__metadata__":\{"format":"unrolled","kind":"([a-z-]+)","version":"(\d{1,9})","sha256":"([0-9a-f]{64})"',
    re.DOTALL,
)
_JSON_HEAD = re.compile(
    rb'\{"format": "unrolled", "kind": "([a-z-]+)", "version": (\d{1,9}), "sha256": "([0-9a-f]{64})", "content":\n'
)
_YAML_HEAD = re.compile(rb"# unrolled ([a-z-]+), version (\d{1,9}), sha256 ([0-9a-f]{64})\n")

_DAMAGED = (
    "{path} is damaged: its contents do not match the sha256 in its first bytes (it was cut short or a byte has "
    "changed): go on from another copy or an earlier checkpoint"
)
_EDITED = (
    "{path} was changed after unrolled wrote it (edited or damaged), and it must say what the model beside it was "
    "made with: put the original back, or start a new training from it: unrolled train --config {path}"
)


def write_tensors(
    path: str | Path, kind: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors, and strings about them, as one safetensors file.

    Args:
        path: the file; an earlier one of that name is replaced once the new one is whole.
        kind: what the file is ("model", "checkpoint"): lower-case letters and hyphens.
        tensors: any shapes, scalars and empty ones included, on any device; tensors that are not contiguous are
            written in row order, tensors that share memory each whole (who ties weights writes one of them).
        metadata: further strings, UTF-8 (lone surrogates cannot stand here; `write_json` takes them).

    The same tensors and metadata give the same bytes every time.

    Raises:
        StorageError: the file cannot be written; the earlier one is whole.
        ValueError: a metadata key or tensor name is reserved. TypeError: a complex or quantised tensor.
    """
    metadata = dict(metadata or {})
    taken = [*(key for key in metadata if key in _RESERVED), *(name for name in tensors if name == "__metadata__")]
    if taken:
        raise ValueError(f"{taken[0]!r} is reserved by the file format: choose another name")
    head = {"format": "unrolled", "kind": _checked(kind), "version": str(VERSION), "sha256": _UNSEALED}
    # The file is laid out here and not by safetensors.save because that orders the metadata at random: the same
    # model would give another file each time. Wide types first keeps every tensor aligned, as safetensors does.
    header: dict[str, Any] = {"__metadata__": head | metadata}
    chunks, end = [], 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name].detach().cpu().contiguous()
        dtype = _DTYPES.get(str(tensor.dtype).removeprefix("torch."))
        if dtype is None:
            raise TypeError(f"tensor {name!r}: expected a real, integer or bool dtype, got {tensor.dtype}")
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        chunks.append(_bytes_of(tensor))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    _write(Path(path), _seal(len(text).to_bytes(8, "little") + text, *chunks))


def read_tensors(path: str | Path, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors, sorted by name, and the metadata that `write_tensors` was given.

    Each tensor is a contiguous copy in memory that torch allocated (aligned to 64 bytes), on the CPU: what is
    computed with it later cannot depend on where its bytes lay in the file.

    Raises:
        StorageError: the file is missing, damaged, newer than this unrolled, or not of this kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(path)
    data, _ = _read(path, kind, _TENSORS_HEAD, _DAMAGED)
    try:
        loaded = load(data)
    except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
        # The digest holds, so another program wrote this; no bit flip leads here.
        raise StorageError(f"{path} is not a readable safetensors file: {error}") from error
    length = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
    tensors = {name: loaded.pop(name).clone() for name in sorted(loaded)}
    return tensors, {key: value for key, value in metadata.items() if key not in _RESERVED}


def write_json(path: str | Path, kind: str, content: dict[str, Any]) -> None:
    """Write an object of JSON values; any `str` survives, lone surrogates included.

    Raises:
        StorageError: the file cannot be written; the earlier one is whole.
        TypeError, ValueError: something in it would not come back as it is (a tuple, an int as key, NaN, infinity).
    """
    text = json.dumps(content, allow_nan=False)
    _expect_same(content, json.loads(text))
    head = (
        f'{{"format": "unrolled", "kind": "{_checked(kind)}", "version": {VERSION}, "sha256": "{_UNSEALED}", '
        f'"content":\n'
    )
    _write(Path(path), _seal(head.encode(), text.encode(), b"}\n"))


def read_json(path: str | Path, kind: str) -> dict[str, Any]:
    """The object that `write_json` was given.

    Raises:
        StorageError: the file is missing, damaged, newer than this unrolled, or not of this kind.
    """
    data, _ = _read(Path(path), kind, _JSON_HEAD, _DAMAGED)
    content: dict[str, Any] = json.loads(data)["content"]
    return content


def write_yaml(path: str | Path, kind: str, content: dict[str, Any]) -> None:
    """Write an object of plain values as YAML for people to read, in its own order, Korean as Korean.

    The file is ordinary YAML below one comment line, so it can be given to `unrolled train --config`; but
    `read_yaml` refuses it once it was edited.

    Raises:
        StorageError: the file cannot be written; the earlier one is whole.
        TypeError, yaml.YAMLError: something in it would not come back as it is (a tuple, an object).
    """
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def represent(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
        # Left to itself PyYAML writes some control characters (U+0085) raw, and reads them back as line ends.
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')

    Dumper.add_representer(str, represent)
    body = yaml.dump(content, Dumper=Dumper, allow_unicode=True, sort_keys=False, width=10**9)
    _expect_same(content, yaml.safe_load(body))
    head = f"# unrolled {_checked(kind)}, version {VERSION}, sha256 {_UNSEALED}\n"
    _write(Path(path), _seal(head.encode(), body.encode()))


def read_yaml(path: str | Path, kind: str) -> dict[str, Any]:
    """The object that `write_yaml` was given.

    Raises:
        StorageError: the file is missing, was edited or damaged, is newer than this unrolled, or not of this kind.
    """
    import yaml

    data, body = _read(Path(path), kind, _YAML_HEAD, _EDITED)
    content: dict[str, Any] = yaml.safe_load(data[body:])
    return content


def write_text(path: str | Path, text: str) -> None:
    """Write a text for other programs to read (a page, say): whole or not at all like all files, but not sealed.

    Raises:
        StorageError: the file cannot be written; the earlier one is whole.
    """
    _write(Path(path), [text.encode("utf-8", "replace")])


def write_folder(path: str | Path, write: Callable[[Path], None]) -> None:
    """Make a whole folder appear at once: `write(folder)` fills a hidden one, which is then renamed to `path`.

    Everything in it is on the disk before the rename, so a folder of that name is always complete. `path` must
    be a fresh name (`checkpoints/000001234`): a folder cannot be exchanged for another without a moment in which
    neither is there, so one that exists is refused and not replaced.

    Raises:
        StorageError: `path` exists, its parent does not, or the disk refused; nothing is left of the attempt.
        Whatever `write` raises; nothing is left of the attempt either.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise StorageError(f"{path} exists: expected a fresh name; delete it or choose another")
    temporary = _temporary(path)
    held = None
    try:
        temporary.mkdir()
        held = _hold(temporary)
        write(temporary)
        for folder, _, names in os.walk(temporary, topdown=False):
            for name in names:
                _fsync(Path(folder, name))
            _fsync(Path(folder))
        temporary.rename(path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, StorageError):  # from within `write`: it names a folder that nobody will find
            raise StorageError(str(error).replace(str(temporary), str(path))) from error
        if isinstance(error, OSError):
            about = "" if str(temporary) in str(error.filename) else f" ({error.filename})"
            raise _cannot_write(path, error, about if error.filename else "") from error
        raise
    finally:
        if held is not None:
            os.close(held)
    _make_durable(path)


def make_folder(path: str | Path) -> None:
    """Make a folder, and the folders it lies in, where they are missing; one that exists is left as it is.

    Raises:
        StorageError: it cannot be made, or something that is not a folder has its name.
    """
    path = Path(path)
    try:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            _fsync(folder.parent)
    except FileExistsError as error:
        raise StorageError(f"cannot make folder {path}: expected a folder or a free name, got a file") from error
    except OSError as error:
        raise StorageError(f"cannot make folder {path}: {_cause(error)}") from error


def remove_leftovers(folder: str | Path) -> list[Path]:
    """Delete the temporaries that killed processes left directly in `folder`; return what was deleted.

    Only names that this module gives (`.tmp-unrolled-` and 16 hexadecimal digits) are touched, and none that a
    living process is still writing. A folder that does not exist has no leftovers.

    Raises:
        StorageError: one of them cannot be deleted.
    """
    removed = []
    try:
        for entry in sorted(Path(folder).iterdir()):
            if not _TEMPORARY.fullmatch(entry.name) or _is_held(entry):
                continue
            with contextlib.suppress(FileNotFoundError):  # its writer renamed it just now
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
                removed.append(entry)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"cannot clear {folder} of what an interrupted run left: {_cause(error)}") from error
    return removed


def _checked(kind: str) -> str:
    if not _KIND.fullmatch(kind):
        raise ValueError(f"kind: expected lower-case letters and hyphens, got {kind!r}")
    return kind


def _expect_same(content: object, read: object) -> None:
    if not isinstance(content, dict):
        raise TypeError(f"content: expected a dict, got {type(content).__name__}")
    for key in content:
        if key not in read or content[key] != read[key]:  # type: ignore[operator, index]
            raise TypeError(
                f"content[{key!r}] would not come back as it is: expected str keys, lists, str, int, float, bool, None"
            )


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _seal(head: bytes, *rest: bytes | memoryview) -> list[bytes | memoryview]:
    digest = hashlib.sha256(head)
    for chunk in rest:
        digest.update(chunk)
    return [head.replace(_UNSEALED.encode(), digest.hexdigest().encode(), 1), *rest]


def _read(path: Path, kind: str, head: re.Pattern[bytes], changed: str) -> tuple[bytes, int]:
    """The verified bytes of the file, and where its head ends."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        if not os.path.isdir(path.parent):
            raise StorageError(f"{path.parent} is not a folder: expected one with {path.name} in it") from error
        raise StorageError(
            f"folder {path.parent} lacks {path.name}: expected a file of kind {kind!r} that unrolled wrote"
        ) from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {_cause(error)}") from error
    match = head.match(data)
    if match is None:
        if not data or b"unrolled" in data[:64]:
            raise StorageError(changed.format(path=path))
        raise StorageError(f"{path} is not a file that unrolled wrote: expected one of kind {kind!r}")
    version = int(match[2])
    if version > VERSION:
        raise StorageError(
            f"{path} was written by a newer unrolled (version {version}, this one reads up to {VERSION}): upgrade"
        )
    view = memoryview(data)
    digest = hashlib.sha256(view[: match.start(3)])
    digest.update(_UNSEALED.encode())
    digest.update(view[match.end(3) :])
    if digest.hexdigest().encode() != match[3]:
        raise StorageError(changed.format(path=path))
    if match[1] != kind.encode():
        raise StorageError(f"{path} holds kind {match[1].decode()!r}: expected kind {kind!r}")
    return data, match.end()


def _write(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    temporary = _temporary(path)
    try:
        with temporary.open("xb") as file:
            held = _hold(temporary)
            try:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                os.close(held)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _cannot_write(path, error) from error
        raise
    _make_durable(path)


def _temporary(path: Path) -> Path:
    return path.parent / f".tmp-unrolled-{secrets.token_hex(8)}"


def _hold(path: Path) -> int:
    """Mark a temporary as being written, until the descriptor returned is closed or its process is dead."""
    descriptor = os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError):  # a file system without locks: `remove_leftovers` cannot tell there
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _is_held(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _make_durable(path: Path) -> None:
    """Have the rename that gave `path` its name reach the disk."""
    try:
        _fsync(path.parent)
    except OSError as error:
        raise StorageError(
            f"{path} is written and whole, but a power cut may still undo it: its folder was not flushed: "
            f"{_cause(error)}"
        ) from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no fsync of a folder and say so; there is nothing more that could be done.
        if not (error.errno in (errno.EINVAL, errno.ENOTSUP) and path.is_dir()):
            raise
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: OSError, about: str = "") -> StorageError:
    if not os.path.isdir(path.parent):
        return StorageError(f"cannot write {path}: folder {path.parent} does not exist")
    left = "the earlier one is whole" if os.path.lexists(path) else "nothing is left of the attempt"
    return StorageError(f"cannot write {path}: {_cause(error)}{about}; {left}")


def _cause(error: OSError) -> str:
    return error.strerror or str(error)
