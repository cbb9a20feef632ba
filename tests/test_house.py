"""The house's own laws: which module may import which, what is public, what an import costs, what the README says."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "unrolled"

# Lowest first. A module may import those of lower floors and those to its left on its own. A folder is one of them,
# whatever files it has.
FLOORS = """
    errors storage config allocator progress
    _native native cells vocabulary attention
    budget tape fused unroll
    nn
    kinds
    model data
    decoding prediction evaluation checkpoints
    trace streaming
    figures picture report
    metrics training
    ngram
    demo doctor
    server
    cli __main__
"""
HEIGHT = {name: height for height, name in enumerate(FLOORS.split())}

MODULES = sorted(PACKAGE.rglob("*.py"))
PUBLIC = [path for path in MODULES if not any(part.startswith("_") for part in path.relative_to(PACKAGE).parts)]
PUBLIC += sorted(PACKAGE.rglob("__init__.py"))


def module_name(path: Path) -> str:
    """`src/unrolled/kinds/text.py` -> `unrolled.kinds.text`; a package's `__init__.py` is the package itself."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def shown(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def for_each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=shown)


# --- floors


def is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def running_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that can run: all of them but the bodies of `if TYPE_CHECKING:`."""
    yield node
    if isinstance(node, ast.If) and is_type_checking(node.test):
        children: Iterator[ast.AST] = iter(node.orelse)
    else:
        children = ast.iter_child_nodes(node)
    for child in children:
        yield from running_nodes(child)


def imported_modules(source: str, module: str, *, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of every import that can run, inside functions too.

    `from a import b` gives `a.b`: only the floors know whether b is a module.
    """
    for node in running_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")
            up = node.level - is_package  # a package is its own first level
            origin = parents[: len(parents) - up] if node.level else []
            origin += node.module.split(".") if node.module else []
            for alias in node.names:
                yield node.lineno, ".".join([*origin, alias.name])
        elif isinstance(node, ast.Call) and re.search(r"\b(import_module|__import__)$", ast.unparse(node.func)):
            yield from ((node.lineno, str(arg.value)) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def floor_faults(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What in `source`, the text of `module`, goes against the floors; one line each."""
    here = module.split(".")[1]
    if here not in HEIGHT:
        return [f"{module} stands on no floor: place '{here}' in FLOORS in tests/test_house.py and in CONTRIBUTING.md"]
    faults = []
    for line, name in imported_modules(source, module, is_package=is_package):
        package, _, rest = name.partition(".")
        there = rest.split(".")[0]
        if package != "unrolled" or there in (here, "__version__"):
            continue
        if not there:
            faults.append(f"{module}:{line} imports the whole of unrolled; import the module that is meant")
        elif there not in HEIGHT:
            faults.append(
                f"{module}:{line} imports unrolled.{there}, which stands on no floor: import a name from "
                "its own module, not from the package; place a new module in FLOORS in tests/test_house.py"
            )
        elif HEIGHT[there] > HEIGHT[here]:
            faults.append(f"{module}:{line} imports unrolled.{there}, which stands above it")
    return faults


@for_each([path for path in MODULES if path != PACKAGE / "__init__.py"])
def test_module_imports_only_from_lower_floors(path: Path) -> None:
    faults = floor_faults(path.read_text("utf-8"), module_name(path), is_package=path.name == "__init__.py")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "module, source",
    [
        ("unrolled.cells", "import unrolled.nn"),
        ("unrolled.cells", "import unrolled.nn as layers"),
        ("unrolled.cells", "from unrolled.nn import LSTM"),
        ("unrolled.cells", "from unrolled import nn"),
        ("unrolled.cells", "from . import nn"),
        ("unrolled.cells", "from .nn import LSTM"),
        ("unrolled.kinds.text", "from ..training import train"),
        ("unrolled.kinds.text", "from unrolled.model import Model"),
        ("unrolled.cells", "def f():\n    from unrolled import cli"),
        ("unrolled.cells", "class A:\n    async def f(self):\n        import unrolled.cli"),
        ("unrolled.cells", "try:\n    import unrolled.server\nexcept ImportError:\n    pass"),
        ("unrolled.cells", "if TYPE_CHECKING:\n    pass\nelse:\n    import unrolled.nn"),
        ("unrolled.cells", "import importlib\nimportlib.import_module('unrolled.nn')"),
        ("unrolled.tape", "from unrolled.unroll import unroll"),
        ("unrolled.model", "from unrolled import Model"),
        ("unrolled.model", "import unrolled"),
        ("unrolled.helpers", ""),
        ("unrolled.cli", "import unrolled.helpers"),
    ],
)
def test_floor_check_catches(module: str, source: str) -> None:
    assert len(floor_faults(source, module)) == 1


@pytest.mark.parametrize(
    "module, source",
    [
        ("unrolled.nn", "from unrolled.cells import LSTM\nimport unrolled.unroll\nfrom . import errors"),
        ("unrolled.nn", "import torch, unrolledlike\nfrom importlib import import_module\nimport_module('json')"),
        ("unrolled.unroll", "from unrolled.tape import Tape"),
        ("unrolled.kinds.text", "from .label import Label\nfrom unrolled.kinds.image import Image"),
        ("unrolled.kinds.text", "from ..vocabulary import Characters"),
        ("unrolled.cells", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from unrolled.cli import main"),
        ("unrolled.cells", "import typing\nif typing.TYPE_CHECKING:\n    import unrolled.cli"),
        ("unrolled.checkpoints", "from unrolled import __version__"),
        ("unrolled.__main__", "from unrolled.cli import main"),
    ],
)
def test_floor_check_allows(module: str, source: str) -> None:
    assert floor_faults(source, module) == []


def test_floor_check_reads_relative_imports_of_a_package() -> None:
    assert floor_faults("from .text import Text\nfrom ..cells import LSTM", "unrolled.kinds", is_package=True) == []
    assert len(floor_faults("from ..model import Model", "unrolled.kinds", is_package=True)) == 1


def import_circle(sources: dict[str, str]) -> list[str]:
    """Modules that import one another in a circle, the first again at the end; [] where there is none.

    The floors leave room for one only among the files of a folder. `sources`: absolute names to texts.
    """
    graph = {}
    for module, source in sources.items():
        is_package = any(other.startswith(f"{module}.") for other in sources)
        names = [name for _, name in imported_modules(source, module, is_package=is_package)]
        imported = {name if name in sources else name.rpartition(".")[0] for name in names}
        graph[module] = imported & sources.keys() - {module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_one_another_in_a_circle() -> None:
    circle = import_circle({module_name(path): path.read_text("utf-8") for path in MODULES})
    assert not circle, " <- ".join(circle)


def test_circle_check_catches() -> None:
    folder = {"a": "from a.b import B", "a.b": "from a import c", "a.c": "import json"}
    assert import_circle(folder) == []
    assert len(import_circle(folder | {"a.c": "from .b import B"})) == 3
    assert len(import_circle(folder | {"a.c": "from a import B"})) == 4


# --- what is public


def bound_names(tree: ast.Module) -> set[str]:
    """Names that a module binds at its top level, those under `if` and `try` included."""
    names: set[str] = set()
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            names.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        pending += ast.iter_child_nodes(node)
    return names


def declared_all(tree: ast.Module) -> list[str] | None:
    """The names in `__all__`, or None where there is no plain list of strings."""
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and re.match(r"__all__\b", ast.unparse(node)):
            try:
                return list(ast.literal_eval(node.value or ast.List()))
            except ValueError:
                return None
    return None


def public_faults(source: str) -> list[str]:
    """What is wrong with a public module's `__all__` and with the docstrings of what it names."""
    tree = ast.parse(source)
    declared = declared_all(tree)
    if declared is None and any(not isinstance(node, ast.Expr) for node in tree.body):  # more than a docstring
        return ["no `__all__`: write one, a plain list of strings"]
    declared = declared or []
    definitions = {
        node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    faults = [f"`__all__` names {name!r}, which is not there" for name in declared if name not in bound_names(tree)]
    faults += [
        f"{name!r} is public and not in `__all__`: add it, or put an underscore before it"
        for name in definitions
        if not name.startswith("_") and name not in declared
    ]
    faults += [
        f"{name!r} is in `__all__` and has no docstring"
        for name, node in definitions.items()
        if name in declared and not ast.get_docstring(node)
    ]
    return faults


@for_each(PUBLIC)
def test_public_names_are_declared_and_documented(path: Path) -> None:
    faults = public_faults(path.read_text("utf-8"))
    assert not faults, "\n".join(f"{shown(path)}: {fault}" for fault in faults)


@for_each(MODULES)
def test_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text("utf-8"))), f"{shown(path)}: no docstring"


def test_public_check_catches() -> None:
    source = '''
        __all__ = ["LIMIT", "Good", "bare", "gone"]
        LIMIT = 3
        class Good:
            """Has one."""
        def bare(): ...
        def forgotten(): ...
        def _private(): ...
    '''
    assert public_faults(textwrap.dedent(source)) == [
        "`__all__` names 'gone', which is not there",
        "'forgotten' is public and not in `__all__`: add it, or put an underscore before it",
        "'bare' is in `__all__` and has no docstring",
    ]
    assert public_faults("__all__ = [name for name in dir()]") == public_faults("import ast\nimport re") != []
    assert public_faults("'A docstring and nothing else.'") == []


def test_package_exports_what_it_declares() -> None:
    import unrolled

    for name in unrolled.__all__:
        assert getattr(unrolled, name) is not None
        assert name in dir(unrolled)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = unrolled.nothing


# --- what an import costs

PRINT_LOADED = "import sys; print(*{name.split('.')[0] for name in sys.modules} - sys.stdlib_module_names)"


def loaded_by(statement: str) -> set[str]:
    """The top-level packages, the standard library's aside, that a new interpreter has after `statement`."""
    code = f"{statement}\n{PRINT_LOADED}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_package_itself_loads_nothing() -> None:
    assert loaded_by("import unrolled") - loaded_by("") == {"unrolled"}


def test_layers_load_only_torch_and_numpy() -> None:
    extra = loaded_by("import unrolled.nn") - loaded_by("import torch, numpy")
    assert extra == {"unrolled"}, f"`import unrolled.nn` also loads {sorted(extra - {'unrolled'})}"


def test_help_loads_neither_torch_nor_numpy() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "unrolled", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Usage" in done.stdout
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "unrolled" in imported, "nothing was measured"
    assert imported.isdisjoint({"torch", "numpy"})


def test_help_answers_within_half_a_second() -> None:
    # The best of five: a busy machine delays some runs, not all.
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "unrolled", "--help"], capture_output=True, timeout=120, check=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5, f"five runs of --help took {[f'{second:.2f}' for second in seconds]} s"


# --- what the files say


def project_files() -> list[Path]:
    """What git tracks or would track; where there is no git, all but hidden folders and what builds leave."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        paths = [ROOT / name for name in done.stdout.decode().split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        paths = [
            path
            for path in ROOT.rglob("*")
            if not any(part.startswith(".") or part in ("build", "dist") for part in path.relative_to(ROOT).parts[:-1])
        ]
    return [path for path in paths if path.is_file() and "__pycache__" not in path.parts]


# Put together here, so that this file does not find itself.
MACHINE_PATH = re.compile(rb"(?<![\w.~/:-])/(?:" + b"|".join([b"work", b"root", b"home", b"Users"]) + rb")/[\w.]")


def test_no_file_names_a_path_of_one_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100].decode(errors='replace')}"
        for path in project_files()
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1)
        if MACHINE_PATH.search(line)
    ]
    assert not found, "a path that only one machine has:\n" + "\n".join(found)


def test_machine_path_check_catches() -> None:
    assert MACHINE_PATH.search(b"open('/" + b"work/main')")
    assert MACHINE_PATH.search(b"/" + b"root/.cache")
    assert not MACHINE_PATH.search(b"example.com/" + b"work/a, src/" + b"work/b, /workers/a")


FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELLS = ("bash", "console", "sh", "shell")


def commands(markdown: str) -> list[str]:
    """What a reader is told to run: lines of shell and Python blocks, their comments (which are translated) left out.

    In a console block only what follows a `$` is a command; the rest is output.
    """
    lines = []
    for language, body in FENCE.findall(markdown):
        if language not in (*SHELLS, "python"):
            continue
        for line in body.splitlines():
            if language == "console" and not line.startswith("$ "):
                continue
            if line := re.sub(r"(^|\s)\s*# .*$", "", line).rstrip():
                lines.append(line)
    return lines


def test_both_readmes_give_the_same_commands() -> None:
    english, korean = (commands((ROOT / name).read_text("utf-8")) for name in ("README.md", "README.ko.md"))
    assert english
    assert korean == english


def test_commands_are_read_from_code_blocks() -> None:
    markdown = """
        Text `not this`.
        ```sh
        make demo   # 보여 준다
        # alone
        ```
        ```console
        $ unrolled doctor
        all is well
        ```
        ```text
        output
        ```
        ```python
        x = "#1"
        ```
    """
    assert commands(textwrap.dedent(markdown)) == ["make demo", "$ unrolled doctor", 'x = "#1"']


# --- what CI holds against a run


@pytest.mark.parametrize("ci, outcome", [("true", 1), ("false", 0)])
@pytest.mark.parametrize(
    "source",
    [
        "import pytest\ndef test_it(): pytest.skip('no browser')",
        "import pytest\n@pytest.mark.skip(reason='no browser')\ndef test_it(): ...",
        "import pytest\npytest.skip('no browser', allow_module_level=True)",
    ],
    ids=["inside", "mark", "module"],
)
def test_a_skip_fails_only_in_ci(tmp_path: Path, source: str, ci: str, outcome: int) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text("utf-8"), "utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\n", "utf-8")
    (tmp_path / "test_works.py").write_text("def test_works(): ...", "utf-8")
    (tmp_path / "test_xfails.py").write_text(
        "import pytest\n@pytest.mark.xfail\ndef test_it(): raise ValueError", "utf-8"
    )
    (tmp_path / "test_skips.py").write_text(source, "utf-8")
    command = [sys.executable, "-m", "pytest", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    environment = {**os.environ, "CI": ci, "PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == outcome, done.stdout
    assert "1 passed" in done.stdout
    assert "1 xfailed" in done.stdout
    if ci == "true":
        assert "no browser" in done.stdout
