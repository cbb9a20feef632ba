"""The benchmarks' own machinery; what they measure is measured by `make bench`."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARKS, DOCS = ROOT / "benchmarks", ROOT / "docs"
PAGES = ("bptt.md", "bptt.ko.md")


@pytest.fixture
def bptt(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bptt")


def figure(median: float) -> dict[str, float]:
    return {"median": median, "min": median, "max": median}


def results() -> dict[str, object]:
    def row(seconds: float, mib: float, updates: int) -> dict[str, object]:
        return {"seconds": figure(seconds), "bytes": figure(mib * 2**20), "updates": figure(updates)}

    return {
        "machine": {"processor": "A Processor", "threads": "2 of torch, 2 cores usable", "torch": "2.0"},
        "sizes": {"hidden": 8, "batch_size": 2, "window": 128}
        | {"train_hidden": 4, "train_batch_size": 2, "train_window": 64},
        "runs": 3,
        "updates": [
            {"steps": 64, "full": row(0.0123, 2, 1), "truncated": row(0.01, 2, 1)},
            {"steps": 4096, "full": row(1.26, 1500, 1), "truncated": row(1.2, 4, 32)},
        ],
        "trainings": [
            {"characters": 10_000, "truncated": row(1, 10, 5), "full": row(1, 20, 1)},
            {"characters": 1_000_000, "truncated": row(1, 11, 500), "full": None},
        ],
    }


def test_tables_are_written_between_the_markers(bptt: ModuleType, tmp_path: Path) -> None:
    for page in PAGES:
        shutil.copy(DOCS / page, tmp_path / page)
    bptt.write_docs(results(), tmp_path)
    for page in PAGES:
        text = (tmp_path / page).read_text("utf-8")
        assert "| 64 | 12 ms | 2 MiB | 10 ms | 2 MiB | 1 / 1 |" in text
        assert "| 4,096 | 1.3 s | 1,500 MiB | 1.2 s | 4 MiB | 1 / 32 |" in text
        assert "| 10,000 | 10 MiB | 20 MiB |" in text
        assert "| 1,000,000 | 11 MiB | " in text
        outside = re.compile(r"(<!-- (bptt:\w+) -->).*?(<!-- /\2 -->)", re.DOTALL)
        assert outside.sub(r"\1\3", text) == outside.sub(r"\1\3", (DOCS / page).read_text("utf-8"))
    assert (tmp_path / "img" / "bptt.svg").read_text("utf-8").startswith("<?xml")


def test_a_page_without_markers_is_refused(bptt: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"page\.md: expected <!-- bptt:updates --> and"):
        bptt.replace_between("no markers", "bptt:updates", "table", Path("page.md"))


def test_pages_show_the_results_that_are_kept(bptt: ModuleType, tmp_path: Path) -> None:
    kept = BENCHMARKS / "results" / "bptt.json"
    if not kept.exists():
        assert all("python benchmarks/bptt.py" in (DOCS / page).read_text("utf-8") for page in PAGES)  # says: not yet
        return
    for page in PAGES:
        shutil.copy(DOCS / page, tmp_path / page)
    bptt.write_docs(json.loads(kept.read_text("utf-8")), tmp_path)
    for page in PAGES:
        assert (tmp_path / page).read_text("utf-8") == (DOCS / page).read_text("utf-8"), (
            f"docs/{page} shows other results than the kept ones; run: "
            "python benchmarks/bptt.py --from benchmarks/results/bptt.json"
        )


def test_a_growing_difference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    language_model = importlib.import_module("language_model")
    assert language_model.furthest([1.0, 2.0], [1.0, 2.0]) == 0
    assert language_model.furthest([1.0, 2.0], [1.0, 2.5]) == 0.25
    fine = {"equality": {"equal": True}, "speed": {"unrolled, fp32": {"ratio": {"median": 1.01}}}}
    assert language_model.verdict(fine, quick=False) == []
    slow = {"equality": {"equal": False}, "speed": {"unrolled, fp32": {"ratio": {"median": 0.99}}}}
    assert len(language_model.verdict(slow, quick=False)) == 2
    assert len(language_model.verdict(slow, quick=True)) == 1


# ------------------------------------------------------------------------------------------------- native.py

TABLE = ("native", "layers.apart", "layers.rounds", "layers.tables", "layers.trials")


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # in tiny sizes threads only wait for each other, for long on a busy machine
    yield {name.removeprefix("layers."): importlib.import_module(name) for name in TABLE}
    torch.set_num_threads(threads)


def compared(**changes: object) -> dict[str, object]:
    """A row as it is kept."""
    row = {"work": "LSTM one step", "size": "128/1", "against": "torch.nn.LSTM", "floor": 8.0, "aim": 9.0}
    row |= {"unit": "s", "ours": figure(2e-5), "peer": figure(1.7e-4), "ratio": figure(8.5), "equality": []}
    return row | {"gflops": 13.1, "share": 0.0624} | changes


def test_every_row_runs_in_tiny_sizes_and_both_sides_are_equal(native: dict[str, ModuleType], tmp_path: Path) -> None:
    pages = [BENCHMARKS / "README.md", ROOT / "README.md"]
    before = [page.read_text("utf-8") for page in pages]
    out = tmp_path / "native.json"
    assert native["native"].main(["--quick", "--out", str(out)]) == 0
    rows = json.loads(out.read_text("utf-8"))["table"]
    assert [row["work"] for row in rows] == [row.work for row in native["native"].ROWS if row.quick]
    assert all(row["ratio"]["median"] > 0 for row in rows if "missing" not in row)
    found = [tensor for row in rows for tensor in row.get("equality", [])]
    assert {"output", "final c", "gradient of input", "gradient of weight_hh_l0"} <= {f["tensor"] for f in found}
    assert [page.read_text("utf-8") for page in pages] == before


@pytest.mark.parametrize("peer, text", [("onnx", "ONNX Runtime"), ("jax", "a scan in JAX")])
def test_a_peer_that_is_not_installed_is_named(
    native: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, peer: str, text: str
) -> None:
    monkeypatch.setitem(sys.modules, peer, None)
    row = next(row for row in native["native"].ROWS if text in row.against)
    setting = native["rounds"].Setting(1, 0.0, 1, quick=True)
    result = native["rounds"].measure(row, next(iter(row.sizes)), setting, {"fp32": None, "bf16": None})
    assert result["missing"] == f"{peer} is not installed"
    assert "not measured" in native["native"].verdict(result, quick=False)[0]
    assert native["native"].verdict(result, quick=True) == []


def test_a_missed_floor_fails_and_so_does_a_difference(native: dict[str, ModuleType]) -> None:
    verdict = native["native"].verdict
    assert verdict(compared(), quick=False) == []
    assert verdict(compared(floor=None, ratio=figure(0.1)), quick=False) == []
    slow = compared(ratio=figure(7.99))
    assert verdict(slow, quick=False) == [
        "LSTM one step, 128/1, against torch.nn.LSTM: 7.99x is below the floor of 8.00x"
    ]
    assert verdict(slow, quick=True) == []
    off = {"tensor": "output", "ours": 1e-3, "peer": 1e-7, "allowed": 1e-6, "fault": True}
    assert "output is 1.0e-03 off" in verdict(compared(equality=[off]), quick=True)[0]


def test_both_sides_are_judged_by_float64(native: dict[str, ModuleType]) -> None:
    exact = torch.tensor([1.0, -2.0], dtype=torch.float64)
    near, far = exact.float() * (1 + 2**-20), exact.float() * 1.001

    def fault(ours: torch.Tensor, peer: torch.Tensor) -> bool:
        return native["rounds"].distances({"output": 9}, [ours], [peer], [exact])[0]["fault"]

    assert not fault(near, exact.float())  # 8 ulp, of 4 x sqrt(9) that are allowed beside an exact peer
    assert fault(far, near)
    assert not fault(far, exact.float() * 1.0006)  # less than twice as far off
    assert fault(torch.full((2,), torch.nan), near)
    assert native["rounds"].same_bits(["h"], [near], [exact.float()])[0]["fault"]


def test_rounds_change_the_order_and_a_ratio_is_of_one_round(native: dict[str, ModuleType]) -> None:
    rounds, order = native["rounds"], []

    def side(name: str, costs: list[float]) -> Callable[[float], float]:
        return lambda _: order.append(name) or costs.pop(0)

    def build(size: object, setting: object) -> object:
        return rounds.Trial(side("ours", [1.0, 10.0, 1.0]), side("peer", [2.0, 30.0, 4.0]), flop=2e9)

    row = rounds.Row("w", "a", {"4/2": rounds.Goal(1.0)}, build)
    result = rounds.measure(row, "4/2", rounds.Setting(3, 0.0, 1), {"fp32": 4e9, "bf16": None})
    assert order == ["ours", "peer", "peer", "ours", "ours", "peer"]
    assert result["ratio"] == {"median": 3.0, "min": 2.0, "max": 4.0, "runs": [2.0, 3.0, 4.0]}
    assert (result["gflops"], result["share"]) == (2.0, 0.5)


def test_each_side_is_measured_in_a_process_of_its_own(native: dict[str, ModuleType]) -> None:
    rows, setting = native["native"].ROWS, native["rounds"].Setting(2, 0.002, 1, quick=True)
    number = next(i for i, row in enumerate(rows) if row.work == "RNN one step")
    limits = {"fp32": None, "bf16": None}
    result = native["apart"].measure_apart(rows[number], number, "128/1", setting, limits)
    assert len(result["ratio"]["runs"]) == 2
    assert result["ratio"]["median"] > 0
    assert {"tensor": "output", "fault": False}.items() <= result["equality"][0].items()


def test_a_process_that_dies_ends_its_row_only(native: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    apart, row = native["apart"], native["native"].ROWS[0]
    monkeypatch.setattr(apart, "SCRIPT", Path("there is no such script"))
    result = apart.measure_apart(row, 0, "128/32", native["rounds"].Setting(1, 0.0, 1), {"fp32": None, "bf16": None})
    assert result["missing"] == "a process ended with exit code 2"


def test_the_tables_of_native_are_written_between_the_marks(native: dict[str, ModuleType], tmp_path: Path) -> None:
    results = {
        "machine": {"processor": "A Processor", "torch": "2.0"},
        "threads": 2, "rounds": 7, "seconds": 0.5, "limits": {"fp32": 2.1e11, "bf16": None},
        "table": [
            compared(), compared(size="512/1", ratio={"median": 7.0, "min": 6.0, "max": 9.0}),
            compared(work="RNN one step", floor=None, aim=None), compared(missing="jax is not installed"),
        ],
    }  # fmt: skip
    (tmp_path / "benchmarks").mkdir()
    pages = [tmp_path / name for name in ("benchmarks/README.md", "README.md", "README.ko.md")]
    marked = "before\n<!-- native:begin -->\nold\n<!-- native:end -->\nafter\n"
    for page, text in zip(pages, (marked, marked, "no place for it\n"), strict=True):
        page.write_text(text, "utf-8")
    native["tables"].write_pages(results, tmp_path)
    long, short, other = (page.read_text("utf-8") for page in pages)
    assert other == "no place for it\n"
    assert "old" not in long + short
    assert long.startswith(
        "before\n<!-- native:begin -->\nA Processor, 2 threads, torch 2.0; limit in GFLOP/s: fp32 210."
    )
    assert "| LSTM one step | 128/1 | torch.nn.LSTM | 20.0 µs | 170.0 µs | 8.50x (8.50–8.50) | 8.00x (9.00x) |" in long
    assert "| 13.1 | 6% |" in long
    assert "not measured: jax is not installed" in long
    assert "| LSTM one step | torch.nn.LSTM | 128/1: 8.50x (8.50–8.50), 512/1: **7.00x** (6.00–9.00) |" in short
    assert "RNN" not in short
    pages[2].write_text(marked, "utf-8")
    native["tables"].write_pages(results, tmp_path)
    assert "| LSTM 한 스텝 | torch.nn.LSTM | 128/1: 8.50x" in pages[2].read_text("utf-8")
    pages[0].write_text("no marks", "utf-8")
    with pytest.raises(SystemExit, match="expected <!-- native:begin --> and"):
        native["tables"].write_pages(results, tmp_path)


def test_every_row_with_a_floor_has_korean_words(native: dict[str, ModuleType]) -> None:
    names = {"fp32", "bf16", "torch", "nn", "autocast", "packed", "freeze", "ms"}  # stay as they are
    for row in native["native"].ROWS:
        if any(goal.floor is not None for goal in row.sizes.values()):
            translated = native["tables"].korean(f"{row.work} | {row.against}").replace("ONNX Runtime", "")
            assert set(re.findall(r"\b[a-z]\w*", translated, re.ASCII)) <= names, translated


def test_the_page_shows_the_results_of_native_that_are_kept(native: dict[str, ModuleType]) -> None:
    kept, page = BENCHMARKS / "results" / "native.json", (BENCHMARKS / "README.md").read_text("utf-8")
    if not kept.exists():
        assert "Not measured yet: `python benchmarks/native.py`" in page
        return
    assert native["tables"].long_table(json.loads(kept.read_text("utf-8"))) in page, (
        "benchmarks/README.md shows other results than the kept ones; run: "
        "python benchmarks/native.py --from benchmarks/results/native.json"
    )


# ----------------------------------------------------------------------------------------------- examples.py


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("examples")


def test_examples_run_in_tiny_sizes_and_both_sides_are_equal(
    examples: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "examples.json"
    assert examples.main(["--quick", "--out", str(out)]) == 0
    parts = json.loads(out.read_text("utf-8"))["parts"]
    assert list(parts) == list(examples.PARTS)
    gradients = {told["tensor"] for told in parts["translation"][0]["equality"]}
    assert {"loss", "encoder.weight_hh_l0_reverse", "bridges.0.weight", "output.bias"} <= gradients
    assert parts["beam"][0]["apart"] <= examples.SCORE_TOLERANCE
    assert parts["memory"][0]["measured"][0]["updates"] == 20


def test_a_missed_floor_and_a_difference_of_examples_fail(examples: ModuleType) -> None:
    row = {"work": "translation", "unequal": [], "floors": [("unrolled, fp32", 3.9, 4.0)]}
    assert examples.verdict(row, quick=False) == ["translation: unrolled, fp32 is 3.90, below the floor of 4.00"]
    assert examples.verdict(row, quick=True) == []
    assert examples.verdict(row | {"unequal": ["loss is off"]}, quick=True) == ["translation: loss is off"]
