"""The optional extension: what is said where it is missing, and that the package installs and works without it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from samples import ENGLISH, sentences

from unrolled import doctor, native

ROOT = Path(__file__).parents[1]
NO_COMPILER = "no-such-compiler"
EXTENSION = "unrolled._native"


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As if the extension had not been built."""
    monkeypatch.setitem(sys.modules, EXTENSION, None)  # type: ignore[arg-type]
    native.why_absent.cache_clear()
    yield monkeypatch
    native.why_absent.cache_clear()


def hide_headers(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = sysconfig.get_path
    patch.setattr(sysconfig, "get_path", lambda name, *rest: str(tmp_path) if name == "include" else real(name, *rest))


# --- what is said


def test_the_extension_is_here_where_it_is_required() -> None:
    assert native.why_absent() is None or os.environ.get("UNROLLED_REQUIRE_NATIVE", "0") in ("", "0")


def test_a_missing_compiler_is_named_with_its_package(absent: pytest.MonkeyPatch) -> None:
    absent.setenv("CXX", NO_COMPILER)
    absent.setattr(sys, "platform", "linux")
    reason = native.why_absent()
    assert reason is not None
    assert "for want of a C++20 compiler (CXX=no-such-compiler is none)" in reason
    assert re.search(r"apt install g\+\+.*dnf install gcc-c\+\+", reason)
    assert re.search(r", then: (make setup|pip install .*--force-reinstall --no-deps \S+)$", reason)


def test_a_compiler_that_does_not_work_is_none(absent: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old = tmp_path / "an old c++"
    old.write_text("#!/bin/sh\necho 'unrecognized option -std=c++20' >&2; exit 1\n")
    old.chmod(0o755)
    absent.setenv("CXX", f"'{old}'")
    reason = native.why_absent()
    assert reason is not None
    assert "C++20 compiler" in reason


def test_missing_headers_are_named_with_their_package(absent: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nexit 0\n")
    compiler.chmod(0o755)
    absent.setenv("CXX", str(compiler))
    absent.setattr(sys, "platform", "linux")
    hide_headers(absent, tmp_path)
    reason = native.why_absent()
    assert reason is not None
    assert f"for want of Python's headers (no Python.h in {tmp_path})" in reason
    assert re.search(r"apt install python3(\.\d+)?-dev; on Fedora: dnf install python3(\.\d+)?-devel", reason)


def test_both_are_named(absent: pytest.MonkeyPatch, tmp_path: Path) -> None:
    absent.setenv("CXX", NO_COMPILER)
    hide_headers(absent, tmp_path)
    absent.setattr(sys, "platform", "linux")
    assert re.search(r"apt install g\+\+ python3(\.\d+)?-dev; on Fedora", native.why_absent() or "")
    native.why_absent.cache_clear()
    absent.setattr(sys, "platform", "darwin")
    assert "xcode-select --install" in (native.why_absent() or "")


def test_where_nothing_is_missing_the_build_is_to_be_tried(absent: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nexit 0\n")
    compiler.chmod(0o755)
    absent.setenv("CXX", str(compiler))
    (tmp_path / "Python.h").touch()
    hide_headers(absent, tmp_path)
    reason = native.why_absent()
    assert reason is not None
    assert "are here now" in reason
    assert "UNROLLED_REQUIRE_NATIVE=1 " in reason


def test_doctor_says_it(absent: pytest.MonkeyPatch) -> None:
    absent.setenv("CXX", NO_COMPILER)
    found = doctor.examine()
    assert found["native"] == f"absent: {native.why_absent()}"
    assert "instruction sets" not in found


def test_doctor_shows_what_the_extension_uses() -> None:
    found = doctor.examine()
    if native.why_absent() is None:
        assert found["native"].startswith("built (_native.")
        for name, presence in native.instruction_sets():
            assert f"{name} ({presence})" in found["instruction sets"]
        assert "UNROLLED_ISA" in found["instruction sets"]
        assert found["native threads"] == native.threads()
    else:
        assert found["native"].startswith("absent: ")


# --- what is installed: minutes long, `make test-without-native` runs them


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "build", "--sdist", "--outdir", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    return next(out.glob("*.tar.gz"))


@pytest.mark.slow
def test_sdist_holds_what_a_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "src" / "native").iterdir()}
    assert sources
    assert names >= sources | {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "src/unrolled/py.typed"}
    assert any(name.startswith("src/unrolled/demo_data/") for name in names)
    assert not [name for name in names if name.startswith((".ci", ".venv", "build/")) or name.endswith((".so", ".pyc"))]


def headerless_python(folder: Path) -> Path:
    """This Python without its headers: a copy of the program, which takes its own place for where Python is, beside a
    link to the library."""
    program = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
    library = Path(sysconfig.get_path("stdlib"))
    (folder / "bin").mkdir(parents=True)
    (folder / "lib").mkdir()
    shutil.copy(program, folder / "bin" / program.name)
    (folder / "lib" / library.name).symlink_to(library)
    return folder / "bin" / program.name


# The package is the same in both; what it does without the extension is tested in the first.
TESTS = {
    "compiler": ["cells", "tape", "unroll", "nn", "model", "install"],
    "headers": ["cells", "install"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "lacking, named", [("compiler", r"C\+\+20 compiler.*apt install g\+\+"), ("headers", r"Python\.h.*python3.*-dev")]
)
def test_installs_and_works_without(lacking: str, named: str, sdist: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "UNROLLED_REQUIRE_NATIVE"}
    program = Path(sys.executable)
    if lacking == "compiler":
        environment["CXX"] = NO_COMPILER
    else:
        program = headerless_python(tmp_path / "python")
    subprocess.run([program, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True, timeout=120)
    python = tmp_path / "venv" / "bin" / "python"

    def run(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python, "-m", *map(str, command)], check=True, env=environment, timeout=1500, text=True, **options
        )

    # All but unrolled itself is borrowed from the environment that runs this.
    packages = sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")})
    (Path(packages) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-cache-dir", sdist]
    strict = subprocess.run(
        install, env={**environment, "UNROLLED_REQUIRE_NATIVE": "1"}, capture_output=True, timeout=600, check=False
    )
    assert strict.returncode != 0, "UNROLLED_REQUIRE_NATIVE=1 asks for a failure"
    subprocess.run(install, check=True, env=environment, timeout=600)

    found = json.loads(run("unrolled", "doctor", "--json", capture_output=True).stdout)
    said = f"absent: .*for want of.*{named}.*pip install .*--force-reinstall --no-deps"
    assert re.match(said, found["native"]), found
    assert found["path"].startswith("tape")

    text = tmp_path / "text.txt"
    text.write_text(sentences(ENGLISH, 300))
    small = ["--hidden", "8", "--layers", "1", "--window", "16", "--batch-size", "4", "--epochs", "1"]
    run("unrolled", "train", text, "--out", tmp_path / "model", *small)
    assert run("unrolled", "generate", tmp_path / "model", "--length", 20, capture_output=True).stdout
    files = [f"tests/test_{name}.py" for name in TESTS[lacking]]
    run("pytest", "-p", "no:cacheprovider", *files, cwd=ROOT)
