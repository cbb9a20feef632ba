"""Files of storage.py: they come back as written, no damage is read as if it were none, no crash makes any."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from unrolled import storage
from unrolled.errors import StorageError

TENSORS = {"w": torch.tensor([[1.5, -2.0]]), "n": torch.tensor(7), "empty": torch.zeros(0, 3)}
CONTENT: dict[str, Any] = {"이름": "안녕", "n": [1, 2.5, None, True], "lone": "\udce9"}


class Format(NamedTuple):
    name: str
    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    damaged: str


FORMATS = [
    Format(
        "model.safetensors",
        lambda path: storage.write_tensors(path, "model", TENSORS, {"note": "é\x1f"}),
        lambda path: storage.read_tensors(path, "model"),
        "is damaged",
    ),
    Format(
        "state.json",
        lambda path: storage.write_json(path, "state", CONTENT),
        lambda path: storage.read_json(path, "state"),
        "is damaged",
    ),
    Format(
        "config.yaml",
        lambda path: storage.write_yaml(path, "config", CONTENT),
        lambda path: storage.read_yaml(path, "config"),
        "was changed after unrolled wrote it",
    ),
]
every_format = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)


def message(action: Callable[[], object]) -> str:
    with pytest.raises(StorageError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- what is written comes back


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.bool,
        *(getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)),
    ],
)
def test_every_dtype_and_layout_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (6, 4, 8), dtype=torch.uint8)
    whole = raw.view(dtype)
    tensors = {
        "whole": whole,
        "transposed": whole.transpose(0, 1),
        "strided": whole[::2],
        "shared": whole[1],
        "scalar": whole[0, 0, 0],
        "empty": whole[:0],
        "이름.weight": whole,
    }
    path = tmp_path / "t.safetensors"
    storage.write_tensors(path, "model", tensors)
    read, metadata = storage.read_tensors(path, "model")
    other = load_file(path)
    assert metadata == {}
    assert list(read) == sorted(tensors)
    for name, tensor in tensors.items():
        for back in (read[name], other[name]):
            assert back.dtype == dtype
            assert back.shape == tensor.shape
            same = back.reshape(-1).view(torch.uint8) == tensor.contiguous().reshape(-1).view(torch.uint8)
            assert same.all()  # as bits: random ones contain NaN


def test_tensors_read_are_torch_memory_that_can_be_trained(tmp_path: Path) -> None:
    tensors = {f"t{size}": torch.nn.Parameter(torch.randn(size, 3)) for size in (1, 2, 5, 7)}
    storage.write_tensors(tmp_path / "t", "model", tensors)
    read, _ = storage.read_tensors(tmp_path / "t", "model")
    for name, tensor in read.items():
        assert torch.equal(tensor, tensors[name])
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0
        assert not tensor.requires_grad
        tensor.add_(1)
    pointers = {tensor.untyped_storage().data_ptr() for tensor in read.values()}
    assert len(pointers) == len(read)


def test_metadata_comes_back_and_other_programs_read_it(tmp_path: Path) -> None:
    given_metadata = {"cell": "lstm", "설명": 'a "quoted"\nline \\', "": ""}
    storage.write_tensors(tmp_path / "t", "model", TENSORS, given_metadata)
    assert storage.read_tensors(tmp_path / "t", "model")[1] == given_metadata
    with safe_open(tmp_path / "t", "pt") as file:
        assert file.metadata().items() >= {"format": "unrolled", "kind": "model", "version": "1"}.items()


def test_no_tensors_at_all(tmp_path: Path) -> None:
    storage.write_tensors(tmp_path / "t", "model", {})
    assert storage.read_tensors(tmp_path / "t", "model") == ({}, {})


@every_format
def test_the_same_contents_are_the_same_bytes(tmp_path: Path, form: Format) -> None:
    form.write(tmp_path / "a")
    form.write(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@every_format
def test_a_file_is_readable_by_whom_the_umask_says(tmp_path: Path, form: Format) -> None:
    old = os.umask(0o022)
    try:
        form.write(tmp_path / form.name)
    finally:
        os.umask(old)
    assert (tmp_path / form.name).stat().st_mode & 0o777 == 0o644


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
text = st.text(st.characters(exclude_categories=[])) | st.sampled_from(
    ["1e-3", "no", "~", "2020-01-01", "\udc80", "=", "<<"]
)
values = st.recursive(
    scalars | text, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=8
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.dictionaries(text, values, max_size=4))
def test_any_json_value_comes_back(tmp_path: Path, content: dict[str, Any]) -> None:
    storage.write_json(tmp_path / "a.json", "state", content)
    read = storage.read_json(tmp_path / "a.json", "state")
    assert repr(read) == repr(content)  # as text: 0.0 == -0.0 and 1 == True otherwise
    assert (tmp_path / "a.json").read_bytes().isascii()
    storage.write_yaml(tmp_path / "a.yaml", "config", content)
    assert repr(storage.read_yaml(tmp_path / "a.yaml", "config")) == repr(content)


def test_yaml_is_for_people(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    storage.write_yaml(path, "config", {"training": {"lr": 0.002, "text": "한국어 🙂"}, "core": {"cell": "gru"}})
    head, _, body = path.read_text(encoding="utf-8").partition("\n")
    assert head.startswith("# unrolled config, version 1, sha256 ")
    assert body == "training:\n  lr: 0.002\n  text: 한국어 🙂\ncore:\n  cell: gru\n"


@pytest.mark.parametrize("write", [storage.write_json, storage.write_yaml])
@pytest.mark.parametrize("content", [{"a": (1, 2)}, {"a": [object()]}, {"a": {"b": object}}, ["a"]])
def test_what_would_not_come_back_is_refused(tmp_path: Path, write: Any, content: Any) -> None:
    with pytest.raises(Exception, match=r"come back|expected a dict|not JSON serializable|cannot represent"):
        write(tmp_path / "a", "state", content)
    assert list(tmp_path.iterdir()) == []


def test_json_refuses_what_other_readers_of_json_refuse(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_json(tmp_path / "a", "state", {"loss": float("nan")})
    with pytest.raises(TypeError, match=r"content\['a'\] would not come back as it is: expected str keys"):
        storage.write_json(tmp_path / "a", "state", {"a": {1: 2}})


def test_names_that_the_format_keeps_for_itself_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'kind' is reserved"):
        storage.write_tensors(tmp_path / "a", "model", {}, {"kind": "x"})
    with pytest.raises(ValueError, match="'__metadata__' is reserved"):
        storage.write_tensors(tmp_path / "a", "model", {"__metadata__": torch.zeros(1)})
    with pytest.raises(ValueError, match="kind: expected lower-case letters and hyphens, got 'a b'"):
        storage.write_json(tmp_path / "a", "a b", {})
    with pytest.raises(TypeError, match=r"tensor 'z': expected a real, integer or bool dtype, got torch.complex64"):
        storage.write_tensors(tmp_path / "a", "model", {"z": torch.zeros(1, dtype=torch.complex64)})


# ---------------------------------------------------------------- no damage is read as if it were none


@every_format
def test_cut_short_at_any_length_is_refused(tmp_path: Path, form: Format) -> None:
    path = tmp_path / form.name
    form.write(path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(StorageError):
            form.read(path)
    path.write_bytes(whole)
    form.read(path)


@every_format
def test_any_flipped_bit_is_refused(tmp_path: Path, form: Format) -> None:
    path = tmp_path / form.name
    form.write(path)
    whole = path.read_bytes()
    for position in range(len(whole) * 8):
        broken = bytearray(whole)
        broken[position // 8] ^= 1 << position % 8
        path.write_bytes(broken)
        with pytest.raises(StorageError):
            form.read(path)


@every_format
@pytest.mark.parametrize("more", [b" ", b"\n", b"\0", b"# end\n"])
def test_more_bytes_at_the_end_are_refused(tmp_path: Path, form: Format, more: bytes) -> None:
    path = tmp_path / form.name
    form.write(path)
    path.write_bytes(path.read_bytes() + more)
    assert form.damaged in message(lambda: form.read(path))


@every_format
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300), keep=st.integers(0, 200))
def test_any_other_bytes_are_refused(tmp_path: Path, form: Format, data: bytes, keep: int) -> None:
    path = tmp_path / form.name
    form.write(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:keep] + data)
    assume(path.read_bytes() != whole)
    with pytest.raises(StorageError):
        form.read(path)


@every_format
def test_each_refusal_says_what_to_do(tmp_path: Path, form: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / form.name
    kind = {"model.safetensors": "model", "state.json": "state", "config.yaml": "config"}[form.name]

    assert message(lambda: form.read(path)) == (
        f"folder {tmp_path} lacks {form.name}: expected a file of kind '{kind}' that unrolled wrote"
    )
    nowhere = tmp_path / "nowhere" / form.name
    assert (
        message(lambda: form.read(nowhere)) == f"{nowhere.parent} is not a folder: expected one with {form.name} in it"
    )

    path.write_bytes(b"hello: world")
    assert (
        message(lambda: form.read(path)) == f"{path} is not a file that unrolled wrote: expected one of kind '{kind}'"
    )

    form.write(path)
    path.write_bytes(path.read_bytes()[:-3])
    said = message(lambda: form.read(path))
    if form.name == "config.yaml":
        assert said == (
            f"{path} was changed after unrolled wrote it (edited or damaged), and it must say what the model beside "
            f"it was made with: put the original back, or start a new training from it: unrolled train --config {path}"
        )
    else:
        assert said == (
            f"{path} is damaged: its contents do not match the sha256 in its first bytes (it was cut short or a byte "
            f"has changed): go on from another copy or an earlier checkpoint"
        )
    path.write_bytes(b"")
    assert message(lambda: form.read(path)) == said

    with monkeypatch.context() as newer:
        newer.setattr(storage, "VERSION", 7)
        form.write(path)
    assert message(lambda: form.read(path)) == (
        f"{path} was written by a newer unrolled (version 7, this one reads up to 1): upgrade"
    )

    path.unlink()
    path.mkdir()
    assert message(lambda: form.read(path)) == f"cannot read {path}: Is a directory"


def test_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    storage.write_json(path, "trace", {})
    assert message(lambda: storage.read_json(path, "state")) == f"{path} holds kind 'trace': expected kind 'state'"
    storage.write_yaml(path, "trace", {})
    assert message(lambda: storage.read_yaml(path, "state")) == f"{path} holds kind 'trace': expected kind 'state'"
    storage.write_tensors(path, "trace", {})
    assert message(lambda: storage.read_tensors(path, "state")) == f"{path} holds kind 'trace': expected kind 'state'"
    with pytest.raises(StorageError):  # nor is one format taken for another
        storage.read_yaml(path, "trace")


def test_a_sealed_file_that_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    text = '{"__metadata__":{"format":"unrolled","kind":"model","version":"1","sha256":"' + "0" * 64 + '"},"w":5}'
    storage._write(path, storage._seal(len(text).to_bytes(8, "little") + text.encode()))
    assert f"{path} is not a readable safetensors file: " in message(lambda: storage.read_tensors(path, "model"))


# ---------------------------------------------------------------- a write that fails changes nothing


@every_format
@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_earlier_file(
    tmp_path: Path, form: Format, earlier: bool, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / form.name
    if earlier:
        form.write(path)
    before = path.read_bytes() if earlier else None

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "fsync", full) if failing == "fsync" else (Path, "replace", full)))
    left = "the earlier one is whole" if earlier else "nothing is left of the attempt"
    assert message(lambda: form.write(path)) == f"cannot write {path}: No space left on device; {left}"
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == (
        [(form.name, before)] if earlier else []
    )


@every_format
def test_an_interrupt_removes_the_temporary(tmp_path: Path, form: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        form.write(tmp_path / form.name)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_not_flushed_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flush = os.fsync

    def fails_for_folders(code: int) -> Callable[[int], None]:
        def fsync(descriptor: int) -> None:
            if Path(f"/proc/self/fd/{descriptor}").is_dir():
                raise OSError(code, os.strerror(code))
            flush(descriptor)

        return fsync

    path = tmp_path / "a.json"
    monkeypatch.setattr(os, "fsync", fails_for_folders(errno.EIO))
    assert message(lambda: storage.write_json(path, "state", {"a": 1})) == (
        f"{path} is written and whole, but a power cut may still undo it: its folder was not flushed: "
        f"Input/output error"
    )
    assert storage.read_json(path, "state") == {"a": 1}
    monkeypatch.setattr(os, "fsync", fails_for_folders(errno.EINVAL))  # a file system without fsync of folders
    storage.write_json(path, "state", {"a": 2})
    assert storage.read_json(path, "state") == {"a": 2}


@every_format
def test_no_folder_and_a_folder_in_the_way(tmp_path: Path, form: Format) -> None:
    path = tmp_path / "no" / form.name
    assert message(lambda: form.write(path)) == f"cannot write {path}: folder {path.parent} does not exist"
    path.mkdir(parents=True)
    assert message(lambda: form.write(path)) == f"cannot write {path}: Is a directory; the earlier one is whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    path = tmp_path / "a"
    storage.write_json(path, "state", {"a": 1})

    def refuse(*_: object, **__: object) -> None:  # root, who runs many a CI, may write to read-only folders
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as refusing:
        refusing.setattr(Path, "open", refuse)
        refusing.setattr(Path, "mkdir", refuse)
        cause = os.strerror(code)
        said = message(lambda: storage.write_json(path, "state", {}))
        assert said == f"cannot write {path}: {cause}; the earlier one is whole"
        said = message(lambda: storage.write_folder(tmp_path / "c", lambda _: None))
        assert said == f"cannot write {tmp_path / 'c'}: {cause}; nothing is left of the attempt"
        said = message(lambda: storage.make_folder(tmp_path / "c"))
        assert said == f"cannot make folder {tmp_path / 'c'}: {cause}"
    assert storage.read_json(path, "state") == {"a": 1}


PREAMBLE = f"""
import os, random, resource, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(storage.__file__).parents[1])!r})
import torch
torch.set_num_threads(1)
from unrolled import storage
from unrolled.errors import StorageError
folder = Path(sys.argv[1])

def write(version):
    size = 2000 + 40 * version
    storage.write_tensors(folder / "model.safetensors", "model", {{"w": torch.full((size,), float(version))}})
    storage.write_json(folder / "state.json", "state", {{"versions": [version] * size}})
    storage.write_yaml(folder / "config.yaml", "config", {{"versions": [version] * 50}})

def read():
    w = storage.read_tensors(folder / "model.safetensors", "model")[0]["w"]
    versions = [
        w.tolist(),
        storage.read_json(folder / "state.json", "state")["versions"],
        storage.read_yaml(folder / "config.yaml", "config")["versions"],
    ]
    for values in versions:
        assert values == values[:1] * len(values), values
        assert len(values) in (50, 2000 + 40 * values[0])
    return [int(values[0]) for values in versions]
"""


def run(folder: Path, script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(script), str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_full_disk(tmp_path: Path) -> None:
    """The kernel's own limit on the size of files stands for a disk that is full in the middle of a write."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    out = run(
        tmp_path,
        """
        write(1)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, resource.RLIM_INFINITY))
        big = "x" * 100000
        for action in (
            lambda: storage.write_tensors(folder / "model.safetensors", "model", {"w": torch.zeros(9999)}),
            lambda: storage.write_json(folder / "state.json", "state", {"a": big}),
            lambda: storage.write_yaml(folder / "config.yaml", "config", {"a": big}),
            lambda: storage.write_folder(folder / "c", lambda c: storage.write_json(c / "a.json", "state", {"a": big})),
            lambda: storage.write_folder(folder / "c", lambda c: (c / "raw").write_text(big)),
        ):
            try:
                action()
            except StorageError as error:
                print(str(error).replace(str(folder), ""))
        assert read() == [1, 1, 1]
        print(*sorted(p.name for p in folder.iterdir()))
        """,
    )
    assert out.splitlines() == [
        "cannot write /model.safetensors: File too large; the earlier one is whole",
        "cannot write /state.json: File too large; the earlier one is whole",
        "cannot write /config.yaml: File too large; the earlier one is whole",
        "cannot write /c/a.json: File too large; nothing is left of the attempt",
        "cannot write /c: File too large; nothing is left of the attempt",
        "config.yaml model.safetensors state.json",
    ]


def test_killed_at_any_moment_every_file_is_whole(tmp_path: Path) -> None:
    out = run(
        tmp_path,
        """
        write(0)
        at, pauses = 0, random.Random(5)
        for _ in range(10):
            child = os.fork()
            if child == 0:
                while True:
                    at += 1
                    write(at)
                    storage.write_folder(folder / str(at), lambda c: [
                        storage.write_json(c / name, "state", {"at": at, "rest": [at] * 5000}) for name in "ab"])
            time.sleep(pauses.uniform(0.02, 0.2))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            versions = read()
            assert max(versions) - min(versions) <= 1, versions
            assert min(versions) >= at
            folders = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())
            assert folders == list(range(1, len(folders) + 1)), folders
            assert len(folders) in (max(versions) - 1, max(versions))
            for number in folders:
                for name in "ab":
                    assert storage.read_json(folder / str(number) / name, "state")["at"] == number
            storage.remove_leftovers(folder)
            assert not [p for p in folder.iterdir() if p.name.startswith(".")]
            at = max(versions)
            write(at)  # the files of one version again
            if at and not (folder / str(at)).exists():
                storage.write_folder(folder / str(at), lambda c: [
                    storage.write_json(c / name, "state", {"at": at}) for name in "ab"])
        print(at)
        """,
    )
    assert int(out) >= 1


# ---------------------------------------------------------------- folders


def test_write_folder_appears_at_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "000000001"

    def write(folder: Path) -> None:
        assert folder.parent == tmp_path
        assert folder.name.startswith(".tmp-unrolled-")
        assert not path.exists()
        storage.write_json(folder / "a.json", "state", {"a": 1})
        (folder / "deeper").mkdir()
        storage.write_tensors(folder / "deeper" / "t", "model", TENSORS)

    storage.write_folder(path, write)
    assert [entry.name for entry in tmp_path.iterdir()] == ["000000001"]
    assert storage.read_json(path / "a.json", "state") == {"a": 1}
    assert storage.read_tensors(path / "deeper" / "t", "model")[0].keys() == TENSORS.keys()


def test_write_folder_flushes_every_file_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events, flush, rename = [], os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        flush(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        events.append("rename")
        return rename(path, target)

    def write(folder: Path) -> None:
        (folder / "deeper").mkdir()
        (folder / "deeper" / "one").write_text("1")
        (folder / "two").write_text("2")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    storage.write_folder(tmp_path / "c", write)
    assert events[:2] == ["one", "deeper"]
    assert events[2] == "two"
    assert events[3].startswith(".tmp-unrolled-")
    assert events[4:] == ["rename", tmp_path.name]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_write_folder_refuses_what_exists(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "c"
    {"folder": path.mkdir, "file": path.touch, "link": lambda: path.symlink_to("nowhere")}[kind]()
    said = message(lambda: storage.write_folder(path, lambda _: None))
    assert said == f"{path} exists: expected a fresh name; delete it or choose another"
    assert list(tmp_path.iterdir()) == [path]


def test_write_folder_failures_leave_nothing(tmp_path: Path) -> None:
    path = tmp_path / "c"

    def fails(error: BaseException) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            storage.write_json(folder / "a", "state", {})
            raise error

        return write

    with pytest.raises(KeyboardInterrupt):
        storage.write_folder(path, fails(KeyboardInterrupt()))
    with pytest.raises(ZeroDivisionError):
        storage.write_folder(path, fails(ZeroDivisionError()))
    assert message(lambda: storage.write_folder(path, fails(OSError(errno.EDQUOT, "Disk quota exceeded")))) == (
        f"cannot write {path}: Disk quota exceeded; nothing is left of the attempt"
    )
    assert message(lambda: storage.write_folder(path, lambda _: Path("/no/such/file").read_text())) == (
        f"cannot write {path}: No such file or directory (/no/such/file); nothing is left of the attempt"
    )
    assert message(lambda: storage.write_folder(path, lambda folder: storage.read_json(folder / "a", "state"))) == (
        f"folder {path} lacks a: expected a file of kind 'state' that unrolled wrote"
    )
    assert list(tmp_path.iterdir()) == []
    nowhere = tmp_path / "no" / "c"
    assert message(lambda: storage.write_folder(nowhere, lambda _: None)) == (
        f"cannot write {nowhere}: folder {nowhere.parent} does not exist"
    )


def test_make_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c"
    storage.make_folder(path)
    storage.make_folder(path)
    assert path.is_dir()
    (tmp_path / "file").touch()
    said = message(lambda: storage.make_folder(tmp_path / "file"))
    assert said == f"cannot make folder {tmp_path / 'file'}: expected a folder or a free name, got a file"
    said = message(lambda: storage.make_folder(tmp_path / "file" / "x"))
    assert said == f"cannot make folder {tmp_path / 'file' / 'x'}: Not a directory"


def test_remove_leftovers_removes_them_and_nothing_else(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    folder = tmp_path / "model"
    folder.mkdir()
    leftovers = [folder / f".tmp-unrolled-{digit * 16}" for digit in "0af"]
    leftovers[0].write_text("half a file")
    leftovers[1].mkdir()
    (leftovers[1] / "a").touch()
    leftovers[2].symlink_to(outside)
    kept = [
        *("model.safetensors", ".tmp", ".tmp-notes.txt", ".tmp-unrolled-0", ".hidden"),
        *(f".tmp-unrolled-{'0' * 17}", f"tmp-unrolled-{'0' * 16}", f".tmp-unrolled-{'A' * 16}"),
    ]
    for name in kept:
        (folder / name).touch()
    assert storage.remove_leftovers(folder) == leftovers
    assert sorted(entry.name for entry in folder.iterdir()) == sorted(kept)
    assert (outside / "precious").exists()
    assert storage.remove_leftovers(folder) == []
    assert storage.remove_leftovers(tmp_path / "nowhere") == []


def test_remove_leftovers_spares_what_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flush, seen = os.fsync, []

    def fsync(descriptor: int) -> None:
        seen.extend(storage.remove_leftovers(tmp_path))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    storage.write_json(tmp_path / "a", "state", {"a": 1})
    storage.write_folder(tmp_path / "b", lambda folder: storage.write_json(folder / "a", "state", {"a": 1}))
    assert seen == []
    assert storage.read_json(tmp_path / "b" / "a", "state") == {"a": 1}


def test_remove_leftovers_says_what_it_cannot_delete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f".tmp-unrolled-{'0' * 16}").touch()

    def refuse(_: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    assert message(lambda: storage.remove_leftovers(tmp_path)) == (
        f"cannot clear {tmp_path} of what an interrupted run left: Permission denied"
    )


def test_storage_loads_neither_torch_nor_yaml_by_itself() -> None:
    script = "import sys, unrolled.storage; print({'torch', 'yaml', 'safetensors', 'numpy'} & {*sys.modules})"
    source = str(Path(storage.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={"PYTHONPATH": source}
    )
    assert done.stdout.strip() == "set()"
