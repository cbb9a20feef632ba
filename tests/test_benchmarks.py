"""The benchmarks' own machinery; what they measure is measured by `make bench`."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest

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
