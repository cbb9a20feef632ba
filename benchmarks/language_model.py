"""Training a character language model: `unrolled.train` against a plain torch script, same model, same data.

    python benchmarks/language_model.py [--quick] [--rounds 5] [--out FILE.json]

An LSTM of 2 x 512 on Tiny Shakespeare, batch 64, window 128, from the same initial weights, without dropout, so that
both sides compute the same function; once with an embedding and once with one-hot input. Every training is a process
of its own: unrolled's setting of the allocator must not reach the other side.

1. Equality: both sides' losses and gradient norms, update by update.
2. Speed: characters per second in rounds, plain, unrolled, plain, unrolled, ...; the ratio is taken within a round.
3. bf16: unrolled's against plain torch's fp32, in speed and in validation loss after the updates of part 1.

Exits with 1 if the sides are not equal or if the median of unrolled's fp32 ratios is below 1.
"""

from __future__ import annotations

import argparse
import json
import lzma
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import describe, examine

HERE = Path(__file__).resolve().parent
TEXT = HERE.parent / "src" / "unrolled" / "demo_data" / "tinyshakespeare.txt.xz"
INPUTS = ("embedding", "one-hot")

# One pass over the same weights: only the order of summation differs. A loss is a mean of 8192 terms of float32
# (2^-24 each way), a gradient's norm a sum of products of up to 8192 terms; both stay below this by far.
FIRST_TOLERANCE = 1e-5
# From then on AdamW divides each gradient by its own size, so that one which is zero but for rounding moves its weight
# as far as any other: rounding grows with the updates. How fast is measured, on the plain side against itself with its
# initial weights moved by one rounding. Our other order of summation makes more than one rounding, so ten times that
# is allowed, and never more than the last number.
CONTROL_FACTOR, LEAST_TOLERANCE, MOST_TOLERANCE = 10, 1e-5, 1e-3


@dataclass(frozen=True)
class Side:
    """One way to train: which script, and with what."""

    name: str
    script: str
    precision: str = "fp32"
    keep_memory: bool = False


PLAIN = Side("plain torch, fp32", "plain_torch.py")
OURS = Side("unrolled, fp32", "with_unrolled.py")
OURS_BF16 = Side("unrolled, bf16", "with_unrolled.py", "bf16")
OTHERS = (  # for the reader: what of it comes from the allocator, and what torch gains from bf16 by itself
    Side("plain torch, fp32, unrolled's allocator setting", "plain_torch.py", keep_memory=True),
    Side("plain torch, bf16 autocast", "plain_torch.py", "bf16"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run? Speed then decides nothing")
    parser.add_argument("--updates", type=int, help="updates of part 1 and 3 (default: 100)")
    parser.add_argument("--rounds", type=int, help="rounds of part 2 (default: 5)")
    parser.add_argument("--timed", type=int, help="timed updates of each run (default: 10)")
    parser.add_argument("--warm", type=int, default=3, help="updates before those (default: 3)")
    parser.add_argument("--out", type=Path, help="(default: benchmarks/results/language_model.json; none with --quick)")
    given = parser.parse_args()
    settings: dict[str, Any] = {
        "hidden": 512, "layers": 2, "embedding": 512, "batch_size": 64, "window": 128, "lr": 2e-3, "betas": [0.9, 0.99],
        "clip": 1.0, "seed": 1, "valid_characters": 10**9,
    }  # fmt: skip
    updates, rounds, timed = 100, 5, 10
    if given.quick:
        settings |= {"hidden": 48, "embedding": 48, "batch_size": 8, "window": 32, "valid_characters": 4000}
        updates, rounds, timed = 12, 2, 5
    updates, rounds, timed = given.updates or updates, given.rounds or rounds, given.timed or timed
    out = given.out or (None if given.quick else HERE / "results" / "language_model.json")

    machine = examine()
    print(describe(machine))
    print(
        f"model: LSTM {settings['layers']} x {settings['hidden']}, batch {settings['batch_size']}, window "
        f"{settings['window']}, characters of Tiny Shakespeare\n"
    )
    results: dict[str, Any] = {"machine": machine, "settings": settings, "quick": given.quick, "inputs": {}}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), settings)
        for kind in INPUTS:
            print(f"== {kind} input")
            results["inputs"][kind] = {
                "equality": equality(bench, kind, updates),
                "speed": speed(bench, kind, rounds, given.warm, timed),
            }
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        print(f"written: {out}")
    faults = [
        f"{kind}: {fault}" for kind, result in results["inputs"].items() for fault in verdict(result, given.quick)
    ]
    good = "equal" if given.quick else "equal, and not slower"
    print("\n".join(faults) or f"all good: {good}")
    return int(bool(faults))


def verdict(result: dict[str, Any], quick: bool) -> list[str]:
    """What is wrong with the figures of one kind of input."""
    faults = [] if result["equality"]["equal"] else ["the two sides do not compute the same"]
    median = result["speed"][OURS.name]["ratio"]["median"]
    if not quick and median < 1:
        faults.append(f"unrolled is slower than plain torch: {median:.3f} of its speed")
    return faults


class Bench:
    """The folder that both sides read, and the processes that train."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        import numpy as np
        import torch
        from plain_torch import LanguageModel

        import unrolled
        from unrolled.config import resolve
        from unrolled.data import encode_texts
        from unrolled.vocabulary import build_vocabulary

        self.folder, self.runs = folder, 0
        text = lzma.decompress(TEXT.read_bytes()).decode()
        cut = int(0.9 * len(text))  # the customary split
        (folder / "train.txt").write_text(text[:cut], "utf-8")
        (folder / "valid.txt").write_text(text[cut:][: settings["valid_characters"]], "utf-8")
        (folder / "short.txt").write_text(text[cut : cut + 200], "utf-8")
        self.vocabulary = build_vocabulary("char", [text[:cut]])
        np.save(folder / "train.npy", encode_texts(folder / "train.txt", self.vocabulary).ids)
        self.settings = settings | {"symbols": len(self.vocabulary)}
        (folder / "settings.json").write_text(json.dumps(self.settings), "utf-8")
        for kind in INPUTS:
            torch.manual_seed(settings["seed"])
            embedding = settings["embedding"] if kind == "embedding" else None
            plain = LanguageModel(len(self.vocabulary), settings["hidden"], settings["layers"], embedding)
            torch.save(plain.state_dict(), folder / f"{kind}.pt")
            config = resolve(
                {
                    "input": {"embedding": embedding},
                    "core": {"hidden": settings["hidden"], "layers": settings["layers"], "dropout": 0.0},
                }
            )
            model = unrolled.LanguageModel(config, self.vocabulary)
            model.load_state_dict(as_unrolled(plain.state_dict()))
            unrolled.save(model, folder / kind)

    def train(self, side: Side, kind: str, updates: int, start: Path | None = None) -> dict[str, Any]:
        """Train in a new process; its result, with `weights`, what it left."""
        self.runs += 1
        weights, out = self.folder / f"run-{self.runs}", self.folder / f"run-{self.runs}.json"
        command = [sys.executable, str(HERE / side.script), str(self.folder), "--input", kind]
        command += ["--updates", str(updates), "--precision", side.precision, "--weights", str(weights)]
        command += ["--out", str(out), *(["--keep-memory"] if side.keep_memory else [])]
        command += [] if start is None else ["--start", str(start)]
        subprocess.run(command, check=True)
        result: dict[str, Any] = json.loads(out.read_text("utf-8"))
        return result | {"weights": weights}

    def validate(self, kind: str, weights: Path) -> float:
        """Nats per character of the validation part, whichever side left the weights."""
        import torch

        import unrolled

        if weights.is_dir():
            model = unrolled.load(weights)
        else:
            model = unrolled.load(self.folder / kind)
            model.load_state_dict(as_unrolled(torch.load(weights)))
        return unrolled.evaluate(model, self.folder / "valid.txt", lanes=32).nats_per_char

    def nudged(self, kind: str) -> Path:
        """The plain side's initial weights, each moved by about one rounding of float32."""
        import torch

        torch.manual_seed(2)
        weights = torch.load(self.folder / f"{kind}.pt")
        path = self.folder / f"{kind}-nudged.pt"
        torch.save({name: t * (1 + 2**-23 * torch.randn_like(t).sign()) for name, t in weights.items()}, path)
        return path


def as_unrolled(plain: dict[str, Any]) -> dict[str, Any]:
    """The names that a Model has for the weights of a plain LanguageModel."""
    renamed = {}
    for name, tensor in plain.items():
        if name == "embedding.weight":
            name = "reader.table"
        elif name.startswith("lstm."):
            kind, layer = name.removeprefix("lstm.").rsplit("_l", 1)
            name = f"core.layers.{layer}.0.{kind}"
        else:
            name = name.replace("output.", "writer.")
        renamed[name] = tensor
    return renamed


def equality(bench: Bench, kind: str, updates: int) -> dict[str, Any]:
    """Parts 1 and 3: how far apart the sides are, update by update and in the validation loss at the end."""
    plain = bench.train(PLAIN, kind, updates)
    ours = bench.train(OURS, kind, updates)
    control = bench.train(PLAIN, kind, updates, start=bench.nudged(kind))
    bf16 = bench.train(OURS_BF16, kind, updates)
    curve = furthest(plain["losses"], ours["losses"])
    drift = furthest(plain["losses"], control["losses"])
    tolerance = min(max(CONTROL_FACTOR * drift, LEAST_TOLERANCE), MOST_TOLERANCE)
    first = max(furthest(plain[key][:1], ours[key][:1]) for key in ("losses", "norms"))
    ends = ((PLAIN, plain), (OURS, ours), (OURS_BF16, bf16))
    nats = {side.name: bench.validate(kind, run["weights"]) for side, run in ends}
    found = {
        "updates": updates,
        "first": {"relative_difference": first, "tolerance": FIRST_TOLERANCE},
        "curve": {"relative_difference": curve, "tolerance": tolerance, "control": drift},
        "losses": {PLAIN.name: plain["losses"], OURS.name: ours["losses"], OURS_BF16.name: bf16["losses"]},
        "valid_nats_per_char": nats,
        "equal": first <= FIRST_TOLERANCE and curve <= tolerance,
    }
    print(f"equality over {updates} updates: {'yes' if found['equal'] else 'NO'}")
    print(f"  first update, loss and gradient norm: {first:.1e} apart (at most {FIRST_TOLERANCE:g})")
    print(f"  losses of all updates: {curve:.1e} apart (at most {tolerance:.1e})")
    print(f"  plain torch against itself, initial weights moved by one rounding: {drift:.1e} apart")
    print(f"validation loss after {updates} updates, nats per character:")
    for name, value in nats.items():
        print(f"  {name:20} {value:.4f}")
    return found


def furthest(a: list[float], b: list[float]) -> float:
    """The largest relative difference of two lists."""
    return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))


def speed(bench: Bench, kind: str, rounds: int, warm: int, timed: int) -> dict[str, Any]:
    """Part 2 and 3: characters per second of every side, and the ratio to plain torch in the same round."""
    rates: dict[str, list[float]] = {side.name: [] for side in (PLAIN, OURS, OURS_BF16, *OTHERS)}
    for _ in range(rounds):
        characters = 0
        for side in (PLAIN, OURS, OURS_BF16, *OTHERS):
            run = bench.train(side, kind, warm + timed)
            if side is PLAIN:
                characters = sum(run["symbols"][warm:])  # both sides read the same windows
            rates[side.name].append(characters / (run["clock"][-1] - run["clock"][warm]))
    print(f"speed, {rounds} rounds of {timed} updates after {warm}: characters per second and ratio, median [min, max]")
    found = {}
    for name, values in rates.items():
        ratios = [rate / plain for rate, plain in zip(values, rates[PLAIN.name], strict=True)]
        found[name] = {"characters_per_second": spread(values), "ratio": spread(ratios)}
        rate, ratio = found[name]["characters_per_second"], found[name]["ratio"]
        print(
            f"  {name:48} {rate['median']:9,.0f} [{rate['min']:,.0f}, {rate['max']:,.0f}]  {ratio['median']:.3f} "
            f"[{ratio['min']:.3f}, {ratio['max']:.3f}]"
        )
    print()
    return found


def spread(values: list[float]) -> dict[str, Any]:
    """Median and spread, and the values themselves."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": values}


if __name__ == "__main__":
    sys.exit(main())
