"""Make a large table of texts and labels, train some updates on it, and say what that took at most.

    python train_from_large_table.py FOLDER --megabytes 2000

The table is deleted afterwards. The last line printed is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import peak_memory
from with_unrolled import Clock


def write_table(path: Path, size: int) -> int:
    """Reviews of random syllables, some 570 bytes a row; how many rows they are."""
    random = np.random.default_rng(3)
    letters = np.array([chr(0xAC00 + 7 * k) for k in range(1500)] + [" "] * 400)
    written = rows = 0
    with path.open("wb") as file:
        file.write(b"document\tlabel\n")
        while written < size:
            lengths = random.integers(20, 400, min(10_000, 1 + size // 500))
            text = random.choice(letters, int(lengths.sum()))
            ends = np.cumsum(lengths).tolist()
            joined = "".join(text.tolist())
            labels = random.integers(0, 2, len(ends)).tolist()
            begins = [0, *ends[:-1]]
            part = "".join(
                f"가{joined[a:b]}다\t{label}\n" for a, b, label in zip(begins, ends, labels, strict=True)
            ).encode()
            file.write(part)
            written, rows = written + len(part), rows + len(ends)
    return rows


def train(table: Path, out: Path, updates: int) -> dict[str, float]:
    import unrolled

    clock, began = Clock(), time.perf_counter()
    valid = table.with_name("valid.tsv")
    unrolled.train(
        table, out, input="text:document", output="label:label", valid=valid, watcher=clock, embedding=64, hidden=64,
        layers=1, bidirectional=True, steps=updates, epochs=1, valid_every=updates, batch_size=64, device="cpu",
    )  # fmt: skip
    return {
        "peak": peak_memory(), "seconds": time.perf_counter() - began, "updates": updates,
        "updates_seconds": clock.times[-1] - clock.times[0],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=float, required=True)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--table", type=Path, help="train on this one and write none")
    given = parser.parse_args()
    if given.table is not None:
        print(json.dumps(train(given.table, given.folder / "model", given.updates)))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        table = Path(folder) / "table.tsv"
        rows = write_table(table, int(given.megabytes * 1e6))
        write_table(table.with_name("valid.tsv"), 1)
        # In a process of its own, which has had nothing to do with the writing.
        command = [sys.executable, __file__, folder, "--megabytes", "0", "--table", str(table)]
        command += ["--updates", str(given.updates)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result = json.loads(done.stdout.splitlines()[-1])
        print(json.dumps(result | {"bytes": table.stat().st_size, "rows": rows}))


if __name__ == "__main__":
    main()
