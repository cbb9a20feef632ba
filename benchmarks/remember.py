"""How far back a recurrent network learns to look: one symbol, needed k steps later.

    python benchmarks/remember.py [--short | --resume] [--out FILE.json]
    python benchmarks/remember.py --from benchmarks/results/remember.json      tables and plots anew, nothing learnt

The first step shows one of four keys, the steps after it show one of four fillers each, at random, and the last one, k
steps after the first, a question mark: which key was it? Guessing is right in one of four. A model has *learned* it
when it is right on 95 % of 512 sequences that it was not trained on; it is asked every 50 updates and stopped as soon
as it has, or after 1,000 updates. Everything else is the same in all runs: see `SIZES`.

1. Cells and how their weights start, for k of 5 to 500, three seeds each (from `dear` on one, if it does not learn).
2. The same without clipping; and a vanilla RNN whose gradient explodes, by plain gradient descent, with clipping and
   without. Three seeds up to `near`; beyond it one, if it does not learn.
3. Likewise: truncated BPTT with windows of 30 steps in place of full BPTT.
4. The norm of dL/dh_t, t = k, k-1, ..., 0, before and after training, and how far one step's Jacobian stretches.

Writes benchmarks/results/remember.json, the tables in docs/vanishing-gradients.md and its Korean version, and two plots
in docs/img. About fifteen minutes on one core; with --short (seconds) neither docs nor results change.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bptt import replace_between, save_plot
from machine import describe, examine
from torch import Tensor, nn

import unrolled.nn
from unrolled.cells import Lookup, initialise
from unrolled.nn import as_core
from unrolled.trace import gradient_flow, gradient_norms, record_layer, step_singular_values, verdict
from unrolled.unroll import unroll

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
RESULTS = HERE / "results" / "remember.json"

KEYS = 4
FILLERS = 4
QUESTION = KEYS + FILLERS
INPUTS = QUESTION + 1

SIZES: dict[str, Any] = {
    "hidden": 32, "rows": 32, "lr": 3e-3, "distances": [5, 10, 20, 50, 100, 200, 500], "seeds": [1, 2, 3],
    "updates": 1000, "every": 50, "held_out": 512, "enough": 0.95, "window": 30, "dear": 200, "near": 50, "flow": 100,
    "flow_rows": 8,
}  # fmt: skip
SHORT: dict[str, Any] = {
    **SIZES, "hidden": 24, "lr": 1e-2, "distances": [5, 40], "seeds": [1], "updates": 300, "every": 25, "window": 10,
    "near": 40, "flow": 40, "flow_rows": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """One way to learn it: a cell, how its weights start, how its gradient is treated.

    chrono: with the task's own distance as the longest memory. scale: of the recurrent weights at the start.
    """

    name: str
    layer: str
    init: str = "uniform"
    forget_bias: float | None = None
    chrono: bool = False
    scale: float = 1.0
    clip: float | None = 1.0
    truncated: bool = False
    sgd: float | None = None

    @property
    def cell(self) -> str:
        return self.layer.lower()


CELLS = [
    Way("RNN", "RNN"),
    Way("RNN, orthogonal", "RNN", init="orthogonal"),
    Way("LSTM", "LSTM"),
    Way("LSTM, forget bias 1", "LSTM", forget_bias=1.0),
    Way("LSTM, chrono", "LSTM", chrono=True),
    Way("GRU", "GRU"),
    Way("GRU, chrono", "GRU", chrono=True),
]


class Rememberer(nn.Module):
    """A layer, and W_hy [4 H] that names the key from its last state."""

    def __init__(self, way: Way, distance: int, hidden: int) -> None:
        super().__init__()
        self.layer = getattr(unrolled.nn, way.layer)(INPUTS, hidden)
        self.cell: Any = as_core(self.layer).layers[0][0]  # type: ignore[index]  # on the layer's own weights
        longest = max(distance, 3) if way.chrono else None
        initialise(self.cell, way.init, forget_bias=way.forget_bias, chrono=longest)
        with torch.no_grad():
            self.cell.weight_hh.mul_(way.scale)
        self.W_hy = nn.Linear(hidden, KEYS)

    def forward(self, ids: Tensor, window: int | None = None) -> Tensor:
        """Symbols [T B] -> scores of the keys [B 4]."""
        scores: Tensor = self.W_hy(unroll(self.cell, Lookup(ids, None), outputs=False, window=window).state.h)
        return scores


def draw(rows: int, distance: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences [distance + 1, rows] and the keys [rows] that they begin with."""
    ids = torch.randint(KEYS, QUESTION, (distance + 1, rows), generator=generator)
    ids[0] = torch.randint(KEYS, (rows,), generator=generator)
    ids[-1] = QUESTION
    return ids, ids[0]


def learn(way: Way, distance: int, seed: int, sizes: dict[str, Any]) -> tuple[Rememberer, dict[str, Any]]:
    """Train until it has learned, or the updates are over; the model, and what came of it."""
    torch.manual_seed(seed)
    drawn = torch.Generator().manual_seed(seed)
    held_out = draw(sizes["held_out"], distance, torch.Generator().manual_seed(10_000 + seed))
    model = Rememberer(way, distance, sizes["hidden"])
    parameters = list(model.parameters())
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adam(parameters, lr=sizes["lr"]) if way.sgd is None else torch.optim.SGD(parameters, lr=way.sgd)
    )
    window = sizes["window"] if way.truncated else None
    longest, accuracy, update, finite = 0.0, 0.0, 0, True
    began = time.monotonic()
    while update < sizes["updates"] and accuracy < sizes["enough"] and finite:
        ids, keys = draw(sizes["rows"], distance, drawn)
        optimizer.zero_grad()
        F.cross_entropy(model(ids, window), keys).backward()  # type: ignore[no-untyped-call]
        norm = float(nn.utils.clip_grad_norm_(parameters, way.clip or math.inf))
        finite = math.isfinite(norm)
        if finite:
            longest = max(longest, norm)
            optimizer.step()
        update += 1
        if update % sizes["every"] == 0:
            with torch.no_grad():
                accuracy = float((model(held_out[0]).argmax(-1) == held_out[1]).double().mean())
    return model, {
        "way": way.name, "distance": distance, "seed": seed, "learned": accuracy >= sizes["enough"],
        "updates": update, "accuracy": round(accuracy, 4), "longest_gradient": float(f"{longest:.4g}"),
        "finite": finite, "seconds": round(time.monotonic() - began, 2),
    }  # fmt: skip


def flow(way: Way, model: Rememberer, distance: int, sizes: dict[str, Any], when: str) -> dict[str, Any]:
    """How the gradient of the loss at the last step goes back, over some sequences, measured by `unrolled.trace`.

    norms: of dL/dh_t at each distance from the last step, as a share of that at the last step, median of the sequences;
    carried: the same of dL/dc_t of an LSTM; stretch: the greatest and the middle singular value of a step's Jacobian,
    median over five steps.
    """
    model = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(0)
    norms, carried, growths, stretch, words = [], [], [], [], ""
    for _ in range(sizes["flow_rows"]):
        ids, keys = draw(1, distance, generator)
        inputs = F.one_hot(ids, INPUTS).double()

        def loss(outputs: Tensor, keys: Tensor = keys) -> Tensor:
            return F.cross_entropy(model.W_hy(outputs[-1]), keys)

        trace = record_layer(model.layer, inputs, loss)
        (found,) = gradient_flow(trace)
        norms.append(_back(gradient_norms(trace, "core.0.forward")))
        if "core.0.forward.dc" in trace.tensors:
            carried.append(_back(torch.linalg.vector_norm(trace.tensors["core.0.forward.dc"].double(), dim=-1)))
        growths.append(found.growth)
        words = words or verdict(found, way.cell)
        if not stretch:
            core = as_core(model.layer)
            for step in torch.linspace(1, distance - 1, 5).long().tolist():
                # All of them: a basis of the whole space needs no iterations.
                values = step_singular_values(core, trace, "core.0.forward", step, count=10**6, iterations=1)
                stretch.append([float(values[0]), float(values[len(values) // 2])])
    return {
        "way": way.name, "when": when, "growth": statistics.median(growths), "verdict": words,
        "norms": _medians(norms), "carried": _medians(carried),
        "stretch": [statistics.median(column) for column in zip(*stretch, strict=True)],
    }  # fmt: skip


def _back(norms: Tensor) -> list[float]:
    """From the last step back, as a share of the last step's."""
    return (norms.flip(0) / norms[-1]).tolist()


def _medians(rows: list[list[float]]) -> list[float]:
    return [float(f"{statistics.median(column):.4g}") for column in zip(*rows, strict=True)]


# ----------------------------------------------------------------------------------------------- the experiment

_UNCLIPPED = ("RNN", "LSTM", "LSTM, chrono", "GRU", "GRU, chrono")
_GRADIENT_DESCENT = Way("RNN, W_hh × 2, gradient descent", "RNN", scale=2.0, sgd=0.3)
PARTS: dict[str, list[Way]] = {
    "cells": CELLS,
    "clipping": [
        *(replace(way, name=f"{way.name}, no clipping", clip=None) for way in CELLS if way.name in _UNCLIPPED),
        _GRADIENT_DESCENT,
        replace(_GRADIENT_DESCENT, name=f"{_GRADIENT_DESCENT.name}, no clipping", clip=None),
    ],
    "truncated": [
        replace(way, name=f"{way.name}, truncated", truncated=True)
        for way in CELLS
        if way.name in ("LSTM", "LSTM, chrono", "GRU, chrono")
    ],
}


def experiment(sizes: dict[str, Any], out: Path | None, resume: bool = False) -> dict[str, Any]:
    """Everything; kept in `out` after each way. resume: what is there already is not done again."""
    results: dict[str, Any] = {"machine": examine(), "sizes": sizes, "parts": {}, "flow": []}
    if resume and out is not None and out.exists():
        before = json.loads(out.read_text("utf-8"))
        results = before if before["sizes"] == sizes else results
    for part, ways in PARTS.items():
        print(f"{part}: learned by how many of {len(sizes['seeds'])} seeds (median updates), else mean accuracy")
        print(f"{'k':>48}" + "".join(f"{distance:>14}" for distance in sizes["distances"]))
        runs = results["parts"].setdefault(part, [])
        done = {(run["way"], run["distance"], run["seed"]): run for run in runs}
        order = [way.name for way in ways]
        for way in ways:
            print(f"{way.name:>48}", end="", flush=True)
            for distance in sizes["distances"]:
                here: list[dict[str, Any]] = []
                dear = sizes["dear"] if part == "cells" else sizes["near"] + 1
                for seed in sizes["seeds"]:
                    if distance >= dear and here and not here[0]["learned"]:
                        break
                    if (way.name, distance, seed) in done:
                        here.append(done[way.name, distance, seed])
                        continue
                    model, found = learn(way, distance, seed, sizes)
                    here.append(found)
                    runs.append(found)
                    if part == "cells" and distance == sizes["flow"] and seed == sizes["seeds"][0]:
                        torch.manual_seed(seed)
                        fresh = Rememberer(way, distance, sizes["hidden"])
                        results["flow"].append(flow(way, fresh, distance, sizes, "before"))
                        results["flow"].append(flow(way, model, distance, sizes, "after"))
                print(f"{told(here):>14}", end="", flush=True)
            runs.sort(key=lambda run: (order.index(run["way"]), run["distance"], run["seed"]))
            print(f"  {sum(run['seconds'] for run in runs if run['way'] == way.name):6.0f} s", flush=True)
            if out is not None:
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return results


def told(runs: Sequence[dict[str, Any]]) -> str:
    """`3/3 (450)`: how many seeds learned it, in how many updates (median); `0/3 26 %`: how often they were right."""
    learned = [run["updates"] for run in runs if run["learned"]]
    if learned:
        return f"{len(learned)}/{len(runs)} ({statistics.median(learned):,.0f})"
    if any(not run["finite"] for run in runs):
        return f"0/{len(runs)} ∞"
    return f"0/{len(runs)} {statistics.fmean(run['accuracy'] for run in runs):.0%}".replace("%", " %")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="seconds in place of minutes; docs and results stay")
    parser.add_argument("--out", type=Path, help="(default: benchmarks/results/remember.json; none with --short)")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    parser.add_argument("--docs", type=Path, help="the folder to write to (default: docs; none with --short)")
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="FILE.json", help="use these results, learn nothing"
    )
    given = parser.parse_args(arguments)
    docs = given.docs or (None if given.short else DOCS)
    if given.source:
        write_docs(json.loads(given.source.read_text("utf-8")), docs or DOCS)
        return 0
    torch.set_num_threads(1)  # steps are too small to share
    print(describe(examine()) + "\n")
    out = given.out or (None if given.short else RESULTS)
    results = experiment(SHORT if given.short else SIZES, out, given.resume)
    print("\nhow the gradient goes back, k = " + str(results["sizes"]["flow"]))
    for found in results["flow"]:
        print(f"{found['way']:>22} {found['when']:>6}: growth {found['growth']:.3f}; {found['verdict']}")
    if docs is not None:
        write_docs(results, docs)
    return 0


# ------------------------------------------------------------------------------------------- tables and plots

_WORDS: dict[str, dict[str, Any]] = {
    "vanishing-gradients.md": {
        "about": "{processor}, one thread, torch {torch}; {hidden} units, {rows} sequences an update, Adam with a "
        "learning rate of {lr}, the gradient's norm clipped at 1 unless something else is said. `3/3 (450)`: three of "
        "three seeds learned it, in 450 updates (median); `0/3 26 %`: none did within {updates:,} updates, and so "
        "often they were right at the end (guessing: 25 %).",
        "distance": "k =",
        "flow": "| | | growth | 10-fold after | 1000-fold after | greatest singular value | middle one |",
        "before": "before",
        "after": "after",
        "names": {},
    },
    "vanishing-gradients.ko.md": {
        "about": "{processor}, 스레드 1개, torch {torch}. 유닛 {hidden}개, 갱신마다 시퀀스 {rows}개, "
        "Adam(학습률 {lr}). 따로 말하지 않으면 기울기의 크기를 1에서 클리핑합니다. `3/3 (450)`은 시드 세 개가 모두 "
        "배웠고 그때까지 갱신 횟수의 중앙값이 450이라는 뜻이고, `0/3 26 %`는 {updates:,}번 갱신하는 동안 아무도 배우지 "
        "못했으며 마지막에 맞힌 비율이 26 %라는 뜻입니다(찍으면 25 %).",
        "distance": "k =",
        "flow": "| | | growth | 10분의 1이 되는 곳 | 1000분의 1이 되는 곳 | 가장 큰 특잇값 | 가운데 특잇값 |",
        "before": "학습 전",
        "after": "학습 후",
        "names": {
            "no clipping": "클리핑 없음", "gradient descent": "경사 하강", "truncated": "절단", "orthogonal": "직교",
            "forget bias": "망각 편향",
        },
    },
}  # fmt: skip


def write_docs(results: dict[str, Any], docs: Path) -> None:
    """The tables between the marks of both pages, and the plots."""
    for name, words in _WORDS.items():
        page = docs / name
        text = page.read_text("utf-8")
        for part in PARTS:
            text = replace_between(text, f"remember:{part}", grid_table(results, part, words), page)
        text = replace_between(text, "remember:flow", flow_table(results, words), page)
        page.write_text(text, "utf-8")
        print(f"written: {page}")
    plot_grid(results, docs / "img" / "remember.svg")
    plot_flow(results, docs / "img" / "gradient-flow.svg")


def grid(results: dict[str, Any], part: str) -> dict[str, list[list[dict[str, Any]]]]:
    """The runs of a part: by way, for each distance, of each seed."""
    rows: dict[str, list[list[dict[str, Any]]]] = {}
    for run in results["parts"][part]:
        columns = rows.setdefault(run["way"], [[] for _ in results["sizes"]["distances"]])
        columns[results["sizes"]["distances"].index(run["distance"])].append(run)
    return rows


def grid_table(results: dict[str, Any], part: str, words: dict[str, Any]) -> str:
    sizes, machine = results["sizes"], results["machine"]
    about = words["about"].format(processor=machine["processor"], torch=machine["torch"], **sizes)
    rows = grid(results, part)
    measured = [k for i, k in enumerate(sizes["distances"]) if any(columns[i] for columns in rows.values())]
    lines = [about, ""] if part == "cells" else []
    lines += [f"| | {words['distance']} " + " | ".join(map(str, measured)) + " |", "|---|" + "---:|" * len(measured)]
    for way, columns in rows.items():
        lines.append(f"| {named(way, words)} | " + " | ".join(told(runs) for runs in columns if runs) + " |")
    return "\n".join(lines)


def flow_table(results: dict[str, Any], words: dict[str, Any]) -> str:
    lines = [words["flow"], "|---|---|" + "---:|" * 5]
    for found in results["flow"]:
        falls = [next((str(t) for t, norm in enumerate(found["norms"]) if norm <= 1 / by), "–") for by in (10, 1000)]
        figures = [f"{found['growth']:.2f}", *falls, *(f"{value:.2f}" for value in found["stretch"])]
        lines.append(f"| {named(found['way'], words)} | {words[found['when']]} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def named(way: str, words: dict[str, Any]) -> str:
    for english, other in words["names"].items():
        way = way.replace(english, other)
    return way


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    mpl.rcParams.update({"font.size": 10, "svg.hashsalt": "remember", "svg.fonttype": "path"})
    mpl.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    return plt


def plot_grid(results: dict[str, Any], path: Path) -> None:
    """Which learns what: a row a way, a column a distance, the colour how often it was right at the end."""
    plt = _pyplot()
    rows = {way: columns for part in PARTS for way, columns in grid(results, part).items()}
    right = [
        [statistics.fmean(run["accuracy"] for run in runs) if runs else math.nan for runs in columns]
        for columns in rows.values()
    ]
    figure, axes = plt.subplots(figsize=(10, 0.42 * len(rows) + 1.2), layout="constrained")
    image = axes.imshow(right, cmap="RdYlBu", vmin=0.25, vmax=1, aspect="auto")
    for y, columns in enumerate(rows.values()):
        for x, runs in [(x, runs) for x, runs in enumerate(columns) if runs]:
            color = "white" if right[y][x] > 0.9 or right[y][x] < 0.35 else "black"
            axes.text(x, y, told(runs), ha="center", va="center", color=color, fontsize=9)
    axes.set_xticks(range(len(results["sizes"]["distances"])), results["sizes"]["distances"])
    axes.set_yticks(range(len(rows)), list(rows))
    edges, at = [], 0
    for part in PARTS:
        at += len(grid(results, part))
        edges.append(at - 0.5)
    for edge in edges[:-1]:
        axes.axhline(edge, color="white", linewidth=5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("k: how many steps back the symbol stands")
    figure.colorbar(image, label="right on new sequences (0.25: guessing)", fraction=0.03, pad=0.02)
    save_plot(figure, path)


def plot_flow(results: dict[str, Any], path: Path) -> None:
    """A panel a layer: the norm of dL/dh_t against the distance from the last step, before and after training."""
    plt = _pyplot()
    layers = list(dict.fromkeys(way.layer for way in CELLS))
    figure, panels = plt.subplots(1, len(layers), figsize=(12.5, 5), sharey=True, layout="constrained")
    for layer, axes in zip(layers, panels, strict=True):
        for color, way in zip(("#c44536", "#1f6f8b", "#e0a030"), [w for w in CELLS if w.layer == layer], strict=False):
            for found in (found for found in results["flow"] if found["way"] == way.name):
                after = found["when"] == "after"
                axes.plot(found["norms"], color=color, linestyle="-" if after else ":", linewidth=2 if after else 1.6,
                          label=f"{way.name}, {found['when']}")  # fmt: skip
                if way.chrono and found["carried"] and after:
                    axes.plot(found["carried"], color=color, linestyle="--", label=f"{way.name}, after: dL/dc")
        axes.set(yscale="log", xlabel="steps back from the loss", title=layer, ylim=(1e-10, 30))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    panels[0].set_ylabel("norm of dL/dh, as a share of the last step's")
    save_plot(figure, path)


if __name__ == "__main__":
    sys.exit(main())
