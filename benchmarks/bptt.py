"""What backpropagation through time costs as the sequence grows: full BPTT against truncated BPTT.

    python benchmarks/bptt.py [--quick] [--out FILE.json]
    python benchmarks/bptt.py --from benchmarks/results/bptt.json      the tables and the plot anew, nothing measured

1. Going once over T steps, T = 64 ... 16384: full BPTT in one update, truncated BPTT in windows of 128 with an update
   each and the state carried. Time and peak memory, LSTM 1 x 256, 8 rows.
2. `unrolled train` for one epoch on texts of 10^4 to 10^6 characters, window 64 and `--window full`: peak memory.

Every measurement is a process of its own; peak memory is counted from what it used before it began. Writes
benchmarks/results/bptt.json, the tables in docs/bptt.md and docs/bptt.ko.md, and docs/img/bptt.svg. Exits with 1 if
truncated BPTT's memory grows with the text.
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe, examine, free_memory, peak_memory, restart_peak, run_json

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
TEXT = HERE.parent / "src" / "unrolled" / "demo_data" / "tinyshakespeare.txt.xz"
MIB = 2**20

# Growth that is none: a text a hundred times as long takes its own ids (1 byte a character here), the buffers that it
# is read with, and what the allocator happens to keep.
GROWTH_TOLERANCE = 32 * MIB


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run? Neither docs nor results change")
    parser.add_argument("--runs", type=int, help="processes for each measurement (default: 3)")
    parser.add_argument("--out", type=Path, help="(default: benchmarks/results/bptt.json; none with --quick)")
    parser.add_argument("--docs", type=Path, help="the folder to write to (default: docs; none with --quick)")
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="FILE.json", help="use these results, measure nothing"
    )
    parser.add_argument("--run", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        job = json.loads(given.run)
        print(json.dumps(measure_update(job) if job["what"] == "update" else measure_training(job)))
        return 0
    docs = given.docs or (None if given.quick else DOCS)
    if given.source:
        write_docs(json.loads(given.source.read_text("utf-8")), docs or DOCS)
        return 0

    sizes: dict[str, Any] = {
        "hidden": 256, "batch_size": 8, "window": 128, "steps": [64, 256, 1024, 4096, 16384],
        "train_hidden": 64, "train_batch_size": 32, "train_window": 64, "characters": [10**4, 10**5, 10**6],
    }  # fmt: skip
    runs = given.runs or 3
    if given.quick:
        sizes |= {"hidden": 32, "steps": [64, 256], "characters": [3000, 12000], "train_hidden": 16}
        sizes |= {"train_batch_size": 4, "train_window": 32}
        runs = given.runs or 1
    machine = examine()
    print(describe(machine) + "\n")
    results: dict[str, Any] = {"machine": machine, "sizes": sizes, "runs": runs}
    with tempfile.TemporaryDirectory() as folder:
        text = lzma.decompress(TEXT.read_bytes()).decode()
        results["updates"] = updates(Path(folder), text, sizes, runs)
        results["trainings"] = trainings(Path(folder), text, sizes, runs)
    grown = [row["truncated"]["bytes"]["median"] for row in results["trainings"]]
    results["growth_bytes"], results["growth_tolerance_bytes"] = max(grown) - grown[0], GROWTH_TOLERANCE
    out = given.out or (None if given.quick else HERE / "results" / "bptt.json")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        print(f"written: {out}")
    if docs is not None:
        write_docs(results, docs)
    good = results["growth_bytes"] <= GROWTH_TOLERANCE
    print(
        f"truncated BPTT from {sizes['characters'][0]:,} to {sizes['characters'][-1]:,} characters: "
        f"{results['growth_bytes'] / MIB:+.0f} MiB: {'does not grow' if good else 'GROWS'} (at most "
        f"{GROWTH_TOLERANCE / MIB:.0f})"
    )
    return int(not good)


# ---------------------------------------------------------------------------------------------- measuring


def updates(folder: Path, text: str, sizes: dict[str, Any], runs: int) -> list[dict[str, Any]]:
    """Part 1, a row for each T."""
    print(f"LSTM 1 x {sizes['hidden']}, {sizes['batch_size']} rows, once over T steps; median of {runs} [min, max]")
    print(f"{'T':>6}  {'full BPTT':>40}  {'truncated, windows of ' + str(sizes['window']):>40}")
    rows = []
    for steps in sizes["steps"]:
        path = folder / "steps.txt"
        path.write_text(text[: steps * sizes["batch_size"] + 1], "utf-8")
        row: dict[str, Any] = {"steps": steps}
        for name, window in (("full", None), ("truncated", min(sizes["window"], steps))):
            job = {"what": "update", "text": str(path), "window": window, "hidden": sizes["hidden"],
                   "batch_size": sizes["batch_size"]}  # fmt: skip
            row[name] = summary([run(job) for _ in range(runs)])
        rows.append(row)
        print(f"{steps:>6}  {shown(row['full']):>40}  {shown(row['truncated']):>40}", flush=True)
    print()
    return rows


def trainings(folder: Path, text: str, sizes: dict[str, Any], runs: int) -> list[dict[str, Any]]:
    """Part 2, a row for each length of text."""
    print(
        f"unrolled train, one epoch, LSTM 1 x {sizes['train_hidden']}, {sizes['train_batch_size']} lanes; "
        f"median of {runs} [min, max]"
    )
    print(f"{'characters':>10}  {'window ' + str(sizes['train_window']):>40}  {'window full':>40}")
    (folder / "valid.txt").write_text(text[-2000:], "utf-8")
    rows = []
    for characters in sizes["characters"]:
        path = folder / "text.txt"
        path.write_text(text[:characters], "utf-8")
        row: dict[str, Any] = {"characters": characters, "full": None}
        for name, window in (("truncated", sizes["train_window"]), ("full", "full")):
            # About 20 float32 values per unit and step in all, by what part 1 shows.
            needed = 20 * 4 * sizes["train_hidden"] * characters
            free = free_memory()
            if window == "full" and free is not None and needed > 0.8 * free:
                print(f"full BPTT on {characters:,} characters: left out, this machine has {free / MIB:,.0f} MiB free")
                continue
            job = {"what": "train", "text": str(path), "valid": str(folder / "valid.txt"), "window": window,
                   "hidden": sizes["train_hidden"], "batch_size": sizes["train_batch_size"]}  # fmt: skip
            row[name] = summary([run(job) for _ in range(runs)])
        rows.append(row)
        full = "left out" if row["full"] is None else shown(row["full"])
        print(f"{characters:>10}  {shown(row['truncated']):>40}  {full:>40}", flush=True)
    print()
    return rows


def run(job: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = run_json([sys.executable, __file__, "--run", json.dumps(job)])
    return result


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and spread of every figure over the runs."""
    found: dict[str, Any] = {}
    for key in results[0]:
        values = [result[key] for result in results]
        found[key] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return found


def shown(row: dict[str, Any]) -> str:
    seconds, memory = row["seconds"], row["bytes"]
    return (
        f"{seconds['median']:.3f} s [{seconds['min']:.3f}, {seconds['max']:.3f}] "
        f"{memory['median'] / MIB:7,.0f} MiB [{memory['min'] / MIB:,.0f}, {memory['max'] / MIB:,.0f}]"
    )


def measure_update(job: dict[str, Any]) -> dict[str, Any]:
    """Once over the text: seconds, peak memory in bytes, and how many updates that was."""
    import torch

    import unrolled
    from unrolled.cells import map_state
    from unrolled.config import resolve
    from unrolled.data import Lanes, encode_texts, read_text
    from unrolled.nn import CoreState
    from unrolled.vocabulary import build_vocabulary

    vocabulary = build_vocabulary("char", read_text(TEXT))
    lanes = Lanes(encode_texts(job["text"], vocabulary), job["batch_size"], job["window"])
    config = resolve({"core": {"cell": "lstm", "hidden": job["hidden"], "layers": 1, "dropout": 0.0}})
    torch.manual_seed(1)
    model = unrolled.LanguageModel(config, vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def update(ids: torch.Tensor, targets: torch.Tensor, state: CoreState) -> CoreState:
        loss, state = model.loss(ids, targets, state)
        optimizer.zero_grad(set_to_none=True)
        (loss / targets.numel()).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return map_state(lambda t: t.detach().clone(), state)  # the gradient stops here, the value goes on

    def once() -> float:
        state = model.begin(batch=job["batch_size"])
        began = time.perf_counter()
        for k in range(len(lanes)):
            window = lanes.window(k)
            state = update(window.inputs, window.targets, state)
        return time.perf_counter() - began

    first = lanes.window(0)
    # What is loaded when it is first used is no part of the measurement.
    update(first.inputs[:16], first.targets[:16], model.begin(batch=job["batch_size"]))
    before = restart_peak()
    seconds = [once()]
    peak = peak_memory() - before
    seconds += [once() for _ in range(2 if seconds[0] > 1 else 4)]
    return {"seconds": statistics.median(seconds[1:]), "bytes": max(peak, 0), "updates": len(lanes)}


def measure_training(job: dict[str, Any]) -> dict[str, Any]:
    """One epoch of `unrolled.train`, everything that it does: seconds and peak memory in bytes."""
    import unrolled

    def train(folder: str, text: str, **settings: Any) -> None:
        model = Path(folder) / "model"
        unrolled.train(text, model, valid=job["valid"], layers=1, dropout=0.0, device="cpu", **settings)

    with tempfile.TemporaryDirectory() as folder:  # what is loaded when it is first used is no part of the measurement
        train(folder, job["valid"], hidden=8, batch_size=2, window=8, steps=1)
    before = restart_peak()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        train(folder, job["text"], hidden=job["hidden"], batch_size=job["batch_size"], window=job["window"], epochs=1)
    return {"seconds": time.perf_counter() - began, "bytes": peak_memory() - before}


# ------------------------------------------------------------------------------------------ tables and plot

_WORDS = {
    "bptt.md": {
        "updates": "| T | full: time | full: memory | truncated: time | truncated: memory | updates |",
        "trainings": "| characters | `--window {window}` | `--window full` |",
        "none": "left out (too little memory)",
        "about": "{processor}, {threads} threads, torch {torch}; LSTM 1 × {hidden}, {batch} rows; median of {runs} "
        "runs, each in a process of its own. Time and memory of going once over T steps; truncated: windows of "
        "{window} steps.",
        "about_trainings": "Peak memory of one epoch of `unrolled train`, LSTM 1 × {hidden}, {batch} lanes; median of "
        "{runs} runs. What the program takes before it begins is not counted.",
    },
    "bptt.ko.md": {
        "updates": "| T | 전체: 시간 | 전체: 메모리 | 절단: 시간 | 절단: 메모리 | 갱신 횟수 |",
        "trainings": "| 글자 수 | `--window {window}` | `--window full` |",
        "none": "생략(메모리 부족)",
        "about": "{processor}, 스레드 {threads}개, torch {torch}. LSTM 1 × {hidden}, 행 {batch}개. 값마다 별도의 "
        "프로세스에서 {runs}번 잰 중앙값. T 스텝을 한 번 지나가는 데 드는 시간과 메모리이며, 절단은 윈도우 {window} "
        "스텝.",
        "about_trainings": "`unrolled train` 한 에폭의 최대 메모리. LSTM 1 × {hidden}, 레인 {batch}개, {runs}번 잰 "
        "중앙값. 시작하기 전에 프로그램이 이미 쓰고 있던 메모리는 빼고 셉니다.",
    },
}


def write_docs(results: dict[str, Any], docs: Path) -> None:
    """The tables between the markers of both pages, and the plot."""
    for name, words in _WORDS.items():
        page = docs / name
        text = page.read_text("utf-8")
        text = replace_between(text, "bptt:updates", updates_table(results, words), page)
        text = replace_between(text, "bptt:trainings", trainings_table(results, words), page)
        page.write_text(text, "utf-8")
        print(f"written: {page}")
    plot(results, docs / "img" / "bptt.svg")


def replace_between(text: str, marker: str, new: str, page: Path) -> str:
    """`text` with what stands between `<!-- marker -->` and `<!-- /marker -->` replaced."""
    pattern = re.compile(rf"(<!-- {re.escape(marker)} -->\n).*?(<!-- /{re.escape(marker)} -->)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise SystemExit(f"{page}: expected <!-- {marker} --> and <!-- /{marker} --> once, each on a line of its own")
    return pattern.sub(lambda found: f"{found[1]}\n{new}\n\n{found[2]}", text)


def updates_table(results: dict[str, Any], words: dict[str, str]) -> str:
    machine, sizes = results["machine"], results["sizes"]
    lines = [
        words["about"].format(
            processor=machine["processor"], threads=machine["threads"].split()[0], torch=machine["torch"],
            hidden=sizes["hidden"], batch=sizes["batch_size"], runs=results["runs"], window=sizes["window"],
        ),
        "", words["updates"], "|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for row in results["updates"]:
        full, truncated = row["full"], row["truncated"]
        lines.append(
            f"| {row['steps']:,} | {seconds(full)} | {memory(full)} | {seconds(truncated)} | {memory(truncated)} | "
            f"1 / {truncated['updates']['median']:.0f} |"
        )
    return "\n".join(lines)


def trainings_table(results: dict[str, Any], words: dict[str, str]) -> str:
    sizes = results["sizes"]
    about = words["about_trainings"].format(
        hidden=sizes["train_hidden"], batch=sizes["train_batch_size"], runs=results["runs"]
    )
    lines = [about, "", words["trainings"].format(window=sizes["train_window"]), "|---:|---:|---:|"]
    for row in results["trainings"]:
        full = words["none"] if row["full"] is None else memory(row["full"])
        lines.append(f"| {row['characters']:,} | {memory(row['truncated'])} | {full} |")
    return "\n".join(lines)


def seconds(row: dict[str, Any]) -> str:
    value = row["seconds"]["median"]
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def memory(row: dict[str, Any]) -> str:
    return f"{row['bytes']['median'] / MIB:,.0f} MiB"


def plot(results: dict[str, Any], path: Path) -> None:
    """Two panels over T: seconds and MiB."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullLocator

    mpl.rcParams.update({"font.size": 11, "svg.hashsalt": "bptt", "lines.linewidth": 2})
    mpl.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    rows, window = results["updates"], results["sizes"]["window"]
    steps = [row["steps"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    series: dict[str, dict[str, Any]] = {
        "full": {"label": "full BPTT", "color": "#c44536", "marker": "o", "markersize": 9},
        "truncated": {
            "label": f"truncated BPTT, window {window}",
            "color": "#1f6f8b",
            "marker": "s",
            "linestyle": "--",
        },
    }
    for name, style in series.items():
        left.plot(steps, [row[name]["seconds"]["median"] for row in rows], **style)
        right.plot(steps, [max(row[name]["bytes"]["median"], 2**16) / MIB for row in rows], **style)
    each = [row["truncated"]["seconds"]["median"] / row["truncated"]["updates"]["median"] for row in rows]
    left.plot(steps, each, color="#1f6f8b", linestyle=":", label="truncated BPTT, one of its updates")
    for axes, title in ((left, "seconds to go over T steps"), (right, "peak memory, MiB")):
        axes.set(xscale="log", yscale="log", xlabel="T, steps", title=title)
        axes.set_xticks(steps, [f"{step:,}" for step in steps])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    left.legend(frameon=False, fontsize=10)
    save_plot(figure, path)


def save_plot(figure: Any, path: Path) -> None:
    """Without its date, so that the same figures give the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
