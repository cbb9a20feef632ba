"""The layers on their native kernels: against torch.nn, ONNX Runtime, JAX and the machine's limit.

    python benchmarks/native.py [--quick] [--rows TEXT ...] [--rounds 7] [--seconds 0.5] [--backend auto]
    python benchmarks/native.py --from benchmarks/results/native.json      the tables anew, nothing measured

Both sides of a row have the same weights and inputs, each in a process of its own. Values and gradients are compared
first, with a computation in float64 as the judge; then both run in turn, round by round, and the ratio is taken within
a round.
`ROWS` is the table: what is measured, against what, and the smallest ratio that passes for each size.

A full run writes benchmarks/results/native.json and the tables in benchmarks/README.md, README.md and README.ko.md.
Exits with 1 if the sides of a row differ, a floor is missed, or a row could not be measured; --quick judges the first
of these only.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from layers import trials
from layers.apart import measure_apart, serve
from layers.rounds import Goal, Row, Setting, measure
from layers.tables import shown_cost, shown_ratio, write_pages
from machine import describe, examine

HERE = Path(__file__).resolve().parent
SHOWN = Goal()  # for the reader; nothing is judged


def dense(first: Goal = SHOWN, second: Goal = SHOWN, third: Goal = SHOWN) -> dict[str, Goal]:
    """The goals of the three dense sizes, hidden / batch."""
    return {"128/32": first, "256/32": second, "512/64": third}


def alone(first: Goal = SHOWN, second: Goal = SHOWN) -> dict[str, Goal]:
    """The goals at batch 1."""
    return {"128/1": first, "512/1": second}


def ragged(goal: Goal = SHOWN) -> dict[str, Goal]:
    return {"256/32": goal, "512/64": goal}


# The LSTM's bf16 must beat the faster of torch's fp32 and bf16: both of them, by the same floor.
LSTM_BF16 = dense(Goal(1.1, 1.4), Goal(1.5, 2.0), Goal(1.7, 2.1))
# Torch's ragged sequences are packed; ours are given with their lengths, or packed too.
by_lengths = partial(trials.training, ours="lengths", peer="packed")
packed = partial(trials.training, ours="packed", peer="packed")

ROWS = [
    # All sequences equally long, forward and backward to inputs, states and weights.
    Row("LSTM forward + backward, fp32", "torch.nn.LSTM, fp32",
        dense(Goal(1.0, 1.15), Goal(1.15, 1.25), Goal(1.05, 1.15)), partial(trials.training, "LSTM")),
    Row("LSTM forward + backward, bf16", "torch.nn.LSTM, fp32",
        LSTM_BF16, partial(trials.training, "LSTM", bf16=True)),
    Row("LSTM forward + backward, bf16", "torch.nn.LSTM, bf16 autocast",
        LSTM_BF16, partial(trials.training, "LSTM", bf16=True, peer_bf16=True)),
    Row("GRU forward + backward, fp32", "torch.nn.GRU, fp32",
        dense(Goal(1.8, 2.3), Goal(1.4, 1.7), Goal(1.4, 1.6)), partial(trials.training, "GRU")),
    Row("GRU forward + backward, bf16", "torch.nn.GRU, fp32",
        {"512/64": Goal(2.2, 2.7)}, partial(trials.training, "GRU", bf16=True)),
    Row("GRU forward + backward, bf16", "torch.nn.GRU, bf16 autocast",
        {"512/64": Goal(1.05, 1.3)}, partial(trials.training, "GRU", bf16=True, peer_bf16=True)),
    Row("RNN forward + backward, fp32", "torch.nn.RNN, fp32",
        dense(Goal(2.2, 4.0), Goal(1.6, 2.2), Goal(1.3, 1.6)), partial(trials.training, "RNN")),
    # Lengths uniform in T/2 ... T; torch's packing and unpacking count.
    Row("LSTM forward + backward, ragged, fp32", "packed torch.nn.LSTM, fp32",
        ragged(Goal(5.0, 7.0)), partial(by_lengths, "LSTM")),
    Row("LSTM forward + backward, ragged and packed, fp32", "packed torch.nn.LSTM, fp32",
        ragged(), partial(packed, "LSTM")),
    Row("LSTM forward + backward, ragged, bf16", "packed torch.nn.LSTM, fp32",
        ragged(Goal(None, 12.0)), partial(by_lengths, "LSTM", bf16=True)),
    Row("GRU forward + backward, ragged, fp32", "packed torch.nn.GRU, fp32",
        ragged(Goal(2.0, 2.7)), partial(by_lengths, "GRU")),
    Row("GRU forward + backward, ragged and packed, fp32", "packed torch.nn.GRU, fp32",
        ragged(), partial(packed, "GRU")),
    Row("GRU forward + backward, ragged, bf16", "packed torch.nn.GRU, fp32",
        ragged(), partial(by_lengths, "GRU", bf16=True)),
    Row("LSTM of 2 layers in both directions, forward + backward, ragged, fp32", "packed torch.nn.LSTM, fp32",
        {"256/32": Goal(5.0)}, partial(by_lengths, "LSTM", layers=2, both=True)),
    # How near the recurrence comes to what the machine can do.
    Row("LSTM recurrence alone, fp32", "the machine's limit",
        {"512/64": Goal(0.9)}, partial(trials.recurrence, "LSTM")),
    Row("LSTM recurrence alone, bf16", "the machine's limit",
        {"512/64": Goal(0.8)}, partial(trials.recurrence, "LSTM", bf16=True)),
    Row("GRU recurrence alone, fp32", "the machine's limit", {"512/64": SHOWN}, partial(trials.recurrence, "GRU")),
    Row("RNN recurrence alone, fp32", "the machine's limit", {"512/64": SHOWN}, partial(trials.recurrence, "RNN")),
    # Streaming: one step a call.
    Row("LSTM one step", "torch.nn.LSTM", alone(Goal(8.0), Goal(8.0)), partial(trials.step, "LSTM"), steps=1),
    Row("GRU one step", "torch.nn.GRU", alone(Goal(2.5), Goal(2.0)), partial(trials.step, "GRU"), steps=1),
    Row("RNN one step", "torch.nn.RNN", alone(), partial(trials.step, "RNN"), steps=1),
    Row("LSTM one step, frozen", "torch.nn.LSTM", alone(), partial(trials.step, "LSTM", frozen=True), steps=1),
    Row("GRU one step, frozen", "torch.nn.GRU", alone(), partial(trials.step, "GRU", frozen=True), steps=1),
    # A whole sequence at batch 1. Not frozen: the weights are packed anew at every call, ONNX Runtime's never.
    Row("LSTM 100 steps in one call, fp32", "ONNX Runtime, fp32",
        alone(Goal(1.5), Goal(1.1)), partial(trials.onnx, "LSTM")),
    Row("LSTM 100 steps in one call, frozen, fp32", "ONNX Runtime, fp32",
        alone(Goal(1.5), Goal(1.1)), partial(trials.onnx, "LSTM", frozen=True)),
    Row("LSTM 100 steps in one call, bf16", "ONNX Runtime, fp32",
        alone(SHOWN, Goal(2.0)), partial(trials.onnx, "LSTM", bf16=True)),
    Row("LSTM 100 steps in one call, frozen, bf16", "ONNX Runtime, fp32",
        alone(SHOWN, Goal(2.0)), partial(trials.onnx, "LSTM", frozen=True, bf16=True)),
    Row("GRU 100 steps in one call, fp32", "ONNX Runtime, fp32", alone(), partial(trials.onnx, "GRU")),
    Row("GRU 100 steps in one call, frozen, fp32", "ONNX Runtime, fp32",
        alone(), partial(trials.onnx, "GRU", frozen=True)),
    Row("generating 2,000 characters, LSTM of 2 layers", "a loop over torch.nn",
        {"256/1": Goal(15.0, 40.0)}, trials.generating, steps=2000),
    # What else must hold.
    *(Row(f"{cell} peak memory of forward + backward, fp32", f"torch.nn.{cell}, fp32",
          {"512/64": Goal(1.0)}, partial(trials.memory, cell), rounds=3, quick=cell == "LSTM")
      for cell in ("LSTM", "GRU", "RNN")),
    *(Row(f"{cell} forward + backward, fp32", "a scan in JAX, fp32", ragged(), partial(trials.scan, cell))
      for cell in ("LSTM", "GRU")),
    Row("LSTM calls and torch's products in turn", "each alone, added up",  # a tenth for what the caches lose
        {"256/32": Goal(0.9)}, partial(trials.in_turn, "LSTM"), steps=10),
    Row("LSTM CPU time in the second after a call", "20 ms", {"256/32": Goal(1.0)},
        partial(trials.cpu_after_call, "LSTM")),
    *(Row(f"{cell} forward + backward on denormal numbers", "on ordinary numbers",
          {"256/32": Goal(1 / 1.2)}, partial(trials.denormals, cell)) for cell in ("LSTM", "GRU", "RNN")),
    Row("LSTM forward + backward in 5 % of the tape, T = 1000", "the whole tape",
        {"256/32": Goal(1 / 1.45)}, partial(trials.tape_budget, "LSTM"), steps=1000),
]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one of each row: does it run?")
    parser.add_argument("--rows", nargs="+", metavar="TEXT", help="only those with one of these in their title")
    parser.add_argument("--rounds", type=int, help="(default: 7)")
    parser.add_argument("--seconds", type=float, help="that a side runs in a round (default: 0.5)")
    parser.add_argument("--backend", default="auto", help="of unrolled: native refuses where the kernels cannot run")
    parser.add_argument("--keep-memory", action="store_true", help="both sides with unrolled's allocator setting")
    parser.add_argument("--out", type=Path, help="(default: benchmarks/results/native.json, if all rows are measured)")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE.json", help="use these results")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.run:
        job = json.loads(given.run)
        if "side" in job:
            print(json.dumps(trials.peak_of_process(job)))
        else:
            serve(ROWS, job, sys.stdin, partial(print, flush=True))
        return 0
    if given.source:
        write_pages(json.loads(given.source.read_text("utf-8")))
        return 0
    chosen = [(row, label) for row in ROWS for label in row.sizes if wanted(row, label, given.rows)]
    if not chosen:
        parser.error(f"no row has {' or '.join(given.rows)} in its title, such as: {title(ROWS[0], '128/32')}")
    if given.quick:
        chosen = list({id(row): (row, label) for row, label in chosen if row.quick}.values())
    setting = Setting(
        rounds=given.rounds or (1 if given.quick else 7),
        seconds=given.seconds or (0.002 if given.quick else 0.5),
        threads=torch.get_num_threads(),
        backend=given.backend,
        keep_memory=given.keep_memory,
        quick=given.quick,
    )
    full = not (given.quick or given.rows or given.keep_memory)
    results = run(chosen, setting)
    out = given.out or (HERE / "results" / "native.json" if full else None)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        print(f"written: {out}")
    if full:
        write_pages(results)
    faults = [fault for row in results["table"] for fault in verdict(row, given.quick)]
    good = "equal" if given.quick else "equal, no floor missed"
    print("\n" + ("\n".join(faults) or f"all good: {good}"))
    return int(bool(faults))


def run(chosen: list[tuple[Row, str]], setting: Setting) -> dict[str, Any]:
    """Measure rows, and say of each at once what was found."""
    machine = examine()
    print(describe(machine))
    limits = {precision: trials.limit(precision, setting) for precision in ("fp32", "bf16")}
    told = ", ".join(f"{name} {'unknown' if v is None else f'{v / 1e9:.0f} GFLOP/s'}" for name, v in limits.items())
    print(f"limit: {told}; backend: {setting.backend}; {setting.rounds} rounds of {setting.seconds:g} s a side\n")
    began, rows = time.monotonic(), []
    for row, label in chosen:
        if setting.quick:
            result = measure(row, label, setting, limits)
        else:
            result = measure_apart(row, ROWS.index(row), label, setting, limits)
        rows.append(result)
        print(line(result), flush=True)
    print(f"\n{len(rows)} rows, {time.monotonic() - began:.0f} s")
    return {"machine": machine, **asdict(setting), "limits": limits, "table": rows}


def title(row: Row, label: str) -> str:
    return f"{row.work}, {label}, against {row.against}"


def wanted(row: Row, label: str, texts: list[str] | None) -> bool:
    return texts is None or any(text.lower() in title(row, label).lower() for text in texts)


def line(result: dict[str, Any]) -> str:
    """A row as it is printed while measuring."""
    name = f"{result['work']}, {result['size']}"
    if "missing" in result:
        return f"{name:72} not measured: {result['missing']}"
    ours, peer = (shown_cost(result[side]["median"], result["unit"]) for side in ("ours", "peer"))
    share = f"  {result['share']:.0%} of the limit" if result.get("share") is not None else ""
    rate = f"  {result['gflops']:.3g} GFLOP/s{share}" if "gflops" in result else ""
    floor = "" if result["floor"] is None else f"  floor {result['floor']:.2f}"
    return f"{name:72} {ours:>11} against {peer:>11}  {shown_ratio(result)}{floor}{rate}  ({result['against']})"


def verdict(result: dict[str, Any], quick: bool) -> list[str]:
    """What is wrong with a row; if quick, only whether both sides give the same is judged."""
    name = f"{result['work']}, {result['size']}, against {result['against']}"
    if "missing" in result:
        return [] if quick else [f"{name}: not measured: {result['missing']}"]
    faults = [
        f"{name}: {found['tensor']} is {found['ours']:.1e} off, not at most {found['allowed']:.1e}"
        for found in result["equality"]
        if found["fault"]
    ]
    if not quick and result["floor"] is not None and result["ratio"]["median"] < result["floor"]:
        faults.append(f"{name}: {result['ratio']['median']:.2f}x is below the floor of {result['floor']:.2f}x")
    return faults


if __name__ == "__main__":
    sys.exit(main())
