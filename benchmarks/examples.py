"""Training and answering with examples: `unrolled` against plain torch scripts, same model, same data.

    python benchmarks/examples.py [--quick] [--data DIR] [--parts translation ...] [--out FILE.json]

1. translation: an encoder-decoder with dot attention, GRU and LSTM, of subwords with 512 units and of characters with
   256; training.
2. classification: an LSTM in both directions that reads the characters of reviews; training.
3. beam: 1,000 sentences translated with beam 5, by a translator that was trained for that a little.
4. memory: a table of 2 GB trains some updates in less than 2 GB.

DIR holds Multi30k's `train.de.gz`, `train.en.gz` and `test_2016_flickr.de.gz`; without it sentences of the same lengths
are made up. Every run is a process of its own. Exits with 1 if two sides are not equal or a floor is missed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe, examine, run_json

HERE = Path(__file__).resolve().parent
PARTS = ("translation", "classification", "beam", "memory")
FLOORS = {"translation": 4.0, "classification": 4.0, "beam": 5.0}

# Distances are relative, of a whole tensor, to the same in float64. Both sides round, in another order of summation:
# ours may be twice as far off as the peer, which may by chance be nearer than its own rounding.
FACTOR, LEAST = 2.0, 1e-6
# What a run's losses may be apart, update by update: the first from rounding alone, later ones grow as AdamW divides
# each gradient by its own size (see `language_model.py`, where that growth is measured).
FIRST_TOLERANCE, TOLERANCE = 1e-5, 1e-3
# The log-probability of a sentence is a sum over some 15 steps.
SCORE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Side:
    """One way to do it: which script, and in which precision."""

    name: str
    script: str
    precision: str = "fp32"


def sides(plain: str) -> tuple[Side, ...]:
    """The first is the peer, the second what is judged."""
    ours = "examples_with_unrolled.py"
    return (
        Side("plain torch, fp32", plain),
        Side("unrolled, fp32", ours),
        Side("unrolled, bf16", ours, "bf16"),
        Side("plain torch, bf16 autocast", plain, "bf16"),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run? Speed then decides nothing")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(default: all)")
    parser.add_argument("--data", type=Path, help="folder of Multi30k's files (default: made-up sentences)")
    parser.add_argument("--rounds", type=int, help="(default: 5)")
    parser.add_argument("--timed", type=int, help="timed updates of each run (default: 20)")
    parser.add_argument("--warm", type=int, default=3, help="updates before those (default: 3)")
    parser.add_argument("--tsv-size", type=float, help="megabytes of the table of part 4 (default: 2000)")
    parser.add_argument("--out", type=Path, help="(default: benchmarks/results/examples.json; none with --quick)")
    given = parser.parse_args(arguments)
    size = Size(rounds=given.rounds or 5, warm=given.warm, timed=given.timed or 20, megabytes=given.tsv_size or 2000.0)
    if given.quick:
        size = Size(
            rounds=given.rounds or 1, warm=1, timed=given.timed or 2, megabytes=given.tsv_size or 2.0, hidden=16,
            embedding=8, examples=200, vocabularies=(300, 290), learn=4, sentences=4, quick=True,
        )  # fmt: skip
    out = given.out or (None if given.quick else HERE / "results" / "examples.json")

    machine = examine()
    print(describe(machine), "\n", sep="")
    results: dict[str, Any] = {"machine": machine, "quick": given.quick, "parts": {}}
    if out is not None and out.exists():  # parts that are not measured now stay as they were
        results["parts"] = json.loads(out.read_text("utf-8"))["parts"]
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for part in (name for name in PARTS if name in given.parts):
            measured = {"translation": translation, "classification": classification, "beam": beam, "memory": memory}
            rows = measured[part](root, size, given.data)
            results["parts"][part] = rows
            faults += [fault for row in rows for fault in verdict(row, given.quick)]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        print(f"written: {out}")
    print("\n".join(faults) or "all good")
    return int(bool(faults))


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rounds: int
    warm: int
    timed: int
    megabytes: float
    hidden: int = 512
    embedding: int = 256
    examples: int = 29_000
    vocabularies: tuple[int, int] = (5000, 4000)  # of subwords, source and target
    learn: int = 600  # updates of the translator that is searched
    sentences: int = 1000
    memory_limit: float = 2000.0  # megabytes
    quick: bool = False  # one cell, one depth, fp32 alone

    @property
    def updates(self) -> int:
        return self.warm + self.timed


def verdict(row: dict[str, Any], quick: bool) -> list[str]:
    """What is wrong with the figures of a row."""
    faults = [f"{row['work']}: {fault}" for fault in row["unequal"]]
    if not quick:
        for name, figure, floor in row["floors"]:
            if figure < floor:
                faults.append(f"{row['work']}: {name} is {figure:.2f}, below the floor of {floor:.2f}")
    return faults


# ------------------------------------------------------------------------------------------------- the examples


def multi30k(folder: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Pairs to train on, sentences to translate."""

    def lines(name: str) -> list[str]:
        text = gzip.decompress((folder / name).read_bytes()).decode("utf-8")
        return [" ".join(line.split()) for line in text.strip("\n").split("\n")]

    return list(zip(lines("train.de.gz"), lines("train.en.gz"), strict=True)), lines("test_2016_flickr.de.gz")


# Lengths in tenths of the examples: the least, then that of which a tenth is shorter, ... 0, 10, 25, 50, 75, 90, 100 %.
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
WORDS = (1, 7, 8, 11, 13, 16, 39)  # of Multi30k's German sentences
CHARACTERS = (1, 10, 16, 27, 43, 76, 140)  # of NSMC's reviews


def lengths_like(quantiles: tuple[int, ...], count: int, random: np.random.Generator) -> list[int]:
    """Lengths that are spread as these quantiles say."""
    found: list[int] = np.interp(random.random(count), SHARES, quantiles).round().astype(int).tolist()
    return found


def made_up_pairs(count: int, random: np.random.Generator) -> list[tuple[str, str]]:
    """Sentences of the lengths of Multi30k's, in words as frequent as those of a language (Zipf), each word with its
    translation, some of them in another order."""
    syllables = [a + b for a in "bdfghklmnprstvwz" for b in ("a", "e", "i", "o", "u", "au", "er", "in", "ol", "us")]
    sizes = random.integers(1, 5, (2, 12_000))
    source, target = (["".join(random.choice(syllables, n)) for n in side] for side in sizes.tolist())
    frequency = 1 / np.arange(2, 12_002)
    frequency /= frequency.sum()
    pairs = []
    for length in lengths_like(WORDS, count, random):
        words = random.choice(12_000, length, p=frequency)
        turned = words.copy()
        at = random.integers(length)
        turned[at : at + 2] = turned[at : at + 2][::-1]
        pairs.append((" ".join(source[i] for i in words), " ".join(target[i] for i in turned)))
    return pairs


def made_up_reviews(count: int, random: np.random.Generator) -> list[tuple[str, str]]:
    """Texts of the lengths of NSMC's reviews, in as many different characters, and one of two labels."""
    letters = np.array([chr(0xAC00 + 7 * k) for k in range(1500)] + [" "] * 400)
    return [
        ("가" + "".join(random.choice(letters, n)) + "다", str(int(random.integers(2))))
        for n in lengths_like(CHARACTERS, count, random)
    ]


# --------------------------------------------------------------------------------------------------- both sides


class Bench:
    """A folder that both sides read, and the processes that run.

    Args:
        peer: the module of the plain script: has `build` and `batch_of`.
        as_plain: our weights by the plain model's names.
    """

    def __init__(
        self,
        folder: Path,
        rows: Sequence[tuple[str, str]],
        config: dict[str, Any],
        settings: dict[str, Any],
        peer: Any,
        as_plain: Callable[[str], str],
    ) -> None:
        import torch

        import unrolled
        from unrolled.config import resolve
        from unrolled.data import Batches, encode_examples, open_data, read_values
        from unrolled.kinds import INPUTS, OUTPUTS, Ends
        from unrolled.model import build_model
        from unrolled.storage import write_yaml

        folder.mkdir()
        self.folder, self.peer, self.as_plain, self.runs = folder, peer, as_plain, 0
        config = config | {
            "training": {
                "batch_size": settings["batch_size"], "epochs": 1, "lr": settings["lr"], "betas": settings["betas"],
                "clip": settings["clip"], "schedule": "constant", "warmup": 0, "weight_decay": 0.0, "device": "cpu",
                "seed": 1,
            }
        }  # fmt: skip
        table = [{"source": x, "target": y} for x, y in rows]
        resolved = resolve(config)
        values = read_values(open_data(table, resolved), resolved)
        self.ends = Ends(
            INPUTS[resolved.input.kind].learn((x for x, _ in values), resolved),
            OUTPUTS[resolved.output.kind].learn((y for _, y in values), resolved),
        )
        self.examples = encode_examples(values, self.ends)
        # As many as both sides are to read and no more: reading them all is not what is measured here.
        self.batches = Batches(self.examples, settings["batch_size"], None, 1).epoch(0)
        config["training"]["epochs"] = settings["epochs"]
        write_yaml(folder / "config.yaml", "config", config)
        for name, some in (("train", rows), ("valid", rows[:2])):
            lines = ["source\ttarget\n", *(f"{x}\t{y}\n" for x, y in some)]
            (folder / f"{name}.tsv").write_text("".join(lines), "utf-8")
        both = {"source": self.examples.inputs[0], "target": self.examples.outputs[0]}
        ids = {side: [ragged[i].tolist() for i in range(len(ragged))] for side, ragged in both.items()}
        (folder / "examples.json").write_text(json.dumps(ids), "utf-8")
        (folder / "batches.json").write_text(json.dumps([rows.tolist() for rows in self.batches]), "utf-8")
        torch.manual_seed(1)
        self.model: Any = build_model(resolve(config), self.ends)
        unrolled.save(self.model, folder / "start")
        torch.save(self.plain_weights(self.model), folder / "plain.pt")
        output: Any = self.ends.output
        targets = len(output.names if hasattr(output, "names") else output.vocabulary)
        self.settings = settings | {"sources": len(self.ends.input.vocabulary), "targets": targets}  # type: ignore[attr-defined]
        (folder / "settings.json").write_text(json.dumps(self.settings), "utf-8")

    def plain_weights(self, model: Any) -> dict[str, Any]:
        return {self.as_plain(name): t for name, t in model.state_dict().items()}

    def run(self, side: Side, what: str, *more: str) -> dict[str, Any]:
        """Run a side in a new process; its result."""
        self.runs += 1
        out = self.folder / f"run-{self.runs}.json"
        command = [sys.executable, str(HERE / side.script), str(self.folder), what, "--out", str(out), *more]
        command += ["--precision", side.precision]
        subprocess.run(command, check=True)
        result: dict[str, Any] = json.loads(out.read_text("utf-8"))
        return result

    def distances(self) -> list[dict[str, Any]]:
        """Loss and gradients of the first batch: how far both sides are from the plain model in float64."""
        import torch
        import torch.nn.functional as F

        rows = self.batches[0].tolist()
        steps, targets = self.examples.batch(rows)
        loss = self.model.loss(steps, targets)
        mean = loss.total / loss.count
        mean.backward()
        ours = {self.as_plain(name): p.grad for name, p in self.model.named_parameters()} | {"loss": mean.detach()}
        found = []
        ids = json.loads((self.folder / "examples.json").read_text("utf-8"))
        for dtype in (torch.float32, torch.float64):
            plain = self.peer.build(self.settings)
            plain.load_state_dict(self.plain_weights(self.model))
            plain.to(dtype)
            batch = self.peer.batch_of(ids, rows, *([plain.end] if hasattr(plain, "end") else []))
            value = plain(*batch) if hasattr(plain, "end") else F.cross_entropy(plain(*batch[:2]), batch[2])
            value.backward()
            found.append({name: p.grad for name, p in plain.named_parameters()} | {"loss": value.detach()})
        peer, exact = found
        self.model.zero_grad()
        told = []
        for name, judge in exact.items():
            far = [float((side[name].double() - judge).norm() / judge.norm()) for side in (ours, peer)]
            allowed = FACTOR * far[1] + LEAST
            told.append(
                {"tensor": name, "ours": far[0], "peer": far[1], "allowed": allowed, "fault": not far[0] <= allowed}
            )
        return told


def compare(bench: Bench, work: str, part: str, size: Size, plain: str, unit: str) -> dict[str, Any]:
    """A row: equality, then speed of training in rounds."""
    told = bench.distances()
    unequal = [f"{t['tensor']} is {t['ours']:.1e} off, allowed {t['allowed']:.1e}" for t in told if t["fault"]]
    worst = max(told, key=lambda t: t["ours"])
    print(f"== {work}")
    print(f"equality, loss and gradients of the first batch: {'NO' if unequal else 'yes'}; furthest from float64:")
    print(f"  {worst['tensor']}: unrolled {worst['ours']:.1e}, plain torch {worst['peer']:.1e}")
    lengths = bench.examples.outputs[0].lengths + 1 if part == "translation" else bench.examples.lengths
    counted = [int(lengths[rows].sum()) for rows in bench.batches[: size.updates]]
    rates: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}
    every = sides(plain)[: 2 if size.quick else None]
    for number in range(size.rounds):
        for side in every if number % 2 == 0 else every[::-1]:
            run = bench.run(side, "train", "--updates", str(size.updates))
            seconds = run["clock"][-1] - run["clock"][size.warm]
            rates.setdefault(side.name, []).append(sum(counted[size.warm :]) / seconds)
            losses[side.name] = run["losses"]
    apart = [abs(x - y) / abs(x) for x, y in zip(losses[every[0].name], losses[every[1].name], strict=True)]
    if apart[0] > FIRST_TOLERANCE or max(apart) > TOLERANCE:
        unequal.append(f"losses of the runs are {apart[0]:.1e} apart at first, {max(apart):.1e} at most")
    print(f"losses of the runs: {apart[0]:.1e} apart at first, {max(apart):.1e} at most, over {size.updates} updates")
    row = {"work": work, "unit": f"{unit} per second", "equality": told, "apart": apart, "unequal": unequal}
    return row | speeds(rates, unit, {every[1].name: FLOORS[part]})


def speeds(rates: dict[str, list[float]], unit: str, floors: dict[str, float]) -> dict[str, Any]:
    """The sides' rates and their ratios to the first in the same round; shown and as a part of a row."""
    first = rates[sides("")[0].name]
    found = {}
    for name in sorted(rates, key=lambda name: [side.name for side in sides("")].index(name)):
        ratios = [rate / plain for rate, plain in zip(rates[name], first, strict=True)]
        found[name] = {"rate": spread(rates[name]), "ratio": spread(ratios)}
        rate, ratio = found[name]["rate"], found[name]["ratio"]
        print(
            f"  {name:28} {rate['median']:9,.0f} [{rate['min']:,.0f}, {rate['max']:,.0f}] {unit}/s  "
            f"{ratio['median']:.2f}x [{ratio['min']:.2f}, {ratio['max']:.2f}]"
        )
    print()
    return {"sides": found, "floors": [(name, found[name]["ratio"]["median"], floor) for name, floor in floors.items()]}


def spread(values: list[float]) -> dict[str, Any]:
    """Median and spread, and the values themselves."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": values}


# ------------------------------------------------------------------------------------------------ the four parts


def translator(root: Path, size: Size, data: Path | None, cell: str, unit: str) -> tuple[Bench, list[str]]:
    """The folder of a translator of subwords or characters, and sentences to translate."""
    import plain_translation

    if data is None:
        random = np.random.default_rng(1)
        pairs = made_up_pairs(size.examples + 1000, random)
        pairs, test = pairs[: size.examples], [x for x, _ in pairs[size.examples :]]
    else:
        pairs, test = multi30k(data)
        pairs = pairs[: size.examples]
    hidden = size.hidden if unit == "subword" else min(size.hidden, 256)
    settings = {
        "cell": cell, "hidden": hidden, "embedding": size.embedding, "batch_size": 64, "lr": 1e-3,
        "betas": [0.9, 0.99], "clip": 1.0, "epochs": 2, "beam": 5, "barred": [0],
    }  # fmt: skip
    ends = {"kind": "text", "unit": unit, "embedding": size.embedding}
    source, target = size.vocabularies if unit == "subword" else (None, None)
    config: dict[str, Any] = {
        "input": ends | {"columns": ["source"], "max_vocabulary": source},
        "core": {"cell": cell, "hidden": hidden, "layers": 1, "bidirectional": True, "dropout": 0.0},
        "output": ends | {"columns": ["target"], "max_vocabulary": target, "attention": "dot"},
    }

    def as_plain(name: str) -> str:
        for ours, plain in (("reader.table", "source_embedding.weight"), ("writer.table", "target_embedding.weight")):
            if name == ours:
                return plain
        if name.startswith("core.layers.0."):
            way, kind = name.removeprefix("core.layers.0.").split(".")
            return f"encoder.{kind}_l0{'_reverse' if way == '1' else ''}"
        if name.startswith("writer.core.layers.0.0."):
            return f"decoder.{name.removeprefix('writer.core.layers.0.0.')}_l0"
        name = name.removeprefix("writer.").replace("bridge.maps.0.", "bridges.")
        return f"output.{name}" if name in ("weight", "bias") else name

    bench = Bench(root / f"translation-{unit}-{cell}", pairs, config, settings, plain_translation, as_plain)
    lengths = bench.examples.lengths, bench.examples.outputs[0].lengths
    kind = "made-up sentences" if data is None else "Multi30k, German to English"
    print(
        f"{kind}: {len(pairs):,} pairs of {lengths[0].mean():.1f} and {lengths[1].mean():.1f} {unit}s on average, "
        f"vocabularies {bench.settings['sources']:,} and {bench.settings['targets']:,}"
    )
    return bench, test[: size.sentences]


def translation(root: Path, size: Size, data: Path | None) -> list[dict[str, Any]]:
    rows = []
    for unit in ("subword", "char"):
        for cell in ("gru", "lstm")[: 1 if size.quick else None]:
            bench, _ = translator(root, size, data, cell, unit)
            hidden = bench.settings["hidden"]
            work = f"translation of {unit}s, training, {cell.upper()} {hidden}, dot attention, batch 64"
            rows.append(compare(bench, work, "translation", size, "plain_translation.py", f"{unit}s"))
    return rows


def classification(root: Path, size: Size, data: Path | None) -> list[dict[str, Any]]:
    import plain_classification

    random = np.random.default_rng(2)
    hidden = min(size.hidden, 256)
    rows = []
    for layers in (1, 2)[: 1 if size.quick else None]:
        settings = {
            "hidden": hidden, "embedding": min(size.embedding, 128), "layers": layers, "batch_size": 64, "lr": 1e-3,
            "betas": [0.9, 0.99], "clip": 1.0, "epochs": 1,
        }  # fmt: skip
        config: dict[str, Any] = {
            "input": {"kind": "text", "unit": "char", "embedding": settings["embedding"], "columns": ["source"]},
            "core": {"cell": "lstm", "hidden": hidden, "layers": layers, "bidirectional": True, "dropout": 0.0},
            "output": {"kind": "label", "columns": ["target"]},
        }

        def as_plain(name: str) -> str:
            if name.startswith("core.layers."):
                layer, way, kind = name.removeprefix("core.layers.").split(".")
                return f"lstm.{kind}_l{layer}{'_reverse' if way == '1' else ''}"
            return name.replace("reader.table", "embedding.weight").replace("writer.classes.", "output.")

        reviews = made_up_reviews(min(size.examples, 12_800), random)
        bench = Bench(root / f"classification-{layers}", reviews, config, settings, plain_classification, as_plain)
        print(f"made-up reviews: {len(reviews):,} of {bench.examples.lengths.mean():.1f} characters on average")
        work = f"classification, training, LSTM {layers} x {hidden} in both directions, batch 64"
        rows.append(compare(bench, work, "classification", size, "plain_classification.py", "characters"))
    return rows


def beam(root: Path, size: Size, data: Path | None) -> list[dict[str, Any]]:
    """Both sides search with the weights that ours has learnt."""
    import torch

    import unrolled

    folder = root / "beam"
    folder.mkdir()
    bench, test = translator(folder, size, data, "gru", "subword")
    (bench.folder / "test.txt").write_text("".join(f"{line}\n" for line in test), "utf-8")
    source: Any = bench.ends.input
    ids = [source.vocabulary.encode(text).tolist() for text in test]
    (bench.folder / "test.json").write_text(json.dumps(ids), "utf-8")
    plain, ours, bf16, _ = sides("plain_translation.py")
    print(f"the translator learns: {size.learn} updates", flush=True)
    bench.run(bf16, "train", "--updates", str(size.learn), "--model", str(bench.folder / "trained"))
    torch.save(bench.plain_weights(unrolled.load(bench.folder / "trained")), bench.folder / "trained.pt")
    rates: dict[str, list[float]] = {}
    last: dict[str, Any] = {}
    for number in range(size.rounds):
        used = (plain, ours) if size.quick else (plain, ours, bf16)
        for side in used if number % 2 == 0 else used[::-1]:
            last[side.name] = run = bench.run(side, "translate")
            rates.setdefault(side.name, []).append(len(test) / run["seconds"])
    both = last[plain.name]["log_probabilities"], last[ours.name]["log_probabilities"]
    apart = [abs(x - y) for x, y in zip(*both, strict=True)]
    output: Any = bench.ends.output
    texts = [output.text(symbols) for symbols in last[plain.name]["symbols"]]
    other = sum(x != y for x, y in zip(texts, last[ours.name]["texts"], strict=True))
    work = f"translating {len(test):,} sentences, beam 5, GRU {size.hidden}, dot attention"
    unequal = []
    if max(apart) > SCORE_TOLERANCE:
        far = sum(value > SCORE_TOLERANCE for value in apart)
        unequal = [f"log-probabilities of {far} sentences are up to {max(apart):.1e} apart"]
    words = sum(map(len, last[plain.name]["symbols"])) / len(test)
    print(f"== {work}")
    print(f"log-probabilities: {max(apart):.1e} apart at most; {other} texts differ; {words:.1f} subwords a sentence")
    row = {"work": work, "unit": "sentences per second", "apart": max(apart), "other_texts": other, "unequal": unequal}
    return [row | speeds(rates, "sentences", {ours.name: FLOORS["beam"]})]


def memory(root: Path, size: Size, data: Path | None) -> list[dict[str, Any]]:
    """A table of so many megabytes, and one of an eighth: what a process that trains on it has in memory at most."""
    rows = []
    measured = []
    for megabytes in (size.megabytes,) if size.quick else (size.megabytes / 8, size.megabytes):
        script = HERE / "train_from_large_table.py"
        measured.append(run_json([sys.executable, str(script), str(root), "--megabytes", str(megabytes)]))
        m = measured[-1]
        print(
            f"== table of {m['bytes'] / 1e6:,.0f} MB, {m['rows']:,} rows: peak {m['peak'] / 1e6:,.0f} MB, "
            f"{m['seconds']:.0f} s, of which {m['updates_seconds']:.1f} s for {m['updates']} updates"
        )
    print()
    work = f"training from a table of {size.megabytes:,.0f} MB"
    peak = measured[-1]["peak"] / 1e6
    fault = [f"peak memory is {peak:,.0f} MB, allowed {size.memory_limit:,.0f} MB"] if peak > size.memory_limit else []
    rows.append({"work": work, "measured": measured, "unequal": fault, "floors": []})
    return rows


if __name__ == "__main__":
    sys.exit(main())
