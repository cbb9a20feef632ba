"""A character language model as one writes it in torch alone: the peer of `with_unrolled.py`.

Embedding or one-hot input, `torch.nn.LSTM`, a linear layer; truncated BPTT with the state carried on and detached.

    python plain_torch.py FOLDER --input embedding --updates 20 --out RESULT.json

FOLDER is made by `language_model.py`: settings.json, train.npy (the ids of the text) and the initial weights.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class LanguageModel(nn.Module):
    """ids `[T B]` -> scores of the next symbol `[T B V]`."""

    def __init__(self, symbols: int, hidden: int, layers: int, embedding: int | None) -> None:
        super().__init__()
        self.symbols = symbols
        self.embedding = None if embedding is None else nn.Embedding(symbols, embedding)
        self.lstm = nn.LSTM(embedding or symbols, hidden, layers)
        self.output = nn.Linear(hidden, symbols)

    def forward(self, ids, state=None):  # type: ignore[no-untyped-def]
        x = F.one_hot(ids, self.symbols).float() if self.embedding is None else self.embedding(ids)
        h, state = self.lstm(x, state)
        return self.output(h), state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--input", choices=("embedding", "one-hot"), required=True)
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: under torch.autocast")
    parser.add_argument("--keep-memory", action="store_true", help="with unrolled's setting of glibc's allocator")
    parser.add_argument("--start", type=Path, help="other initial weights than FOLDER's")
    parser.add_argument("--weights", type=Path, help="where to leave the weights at the end")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.keep_memory:
        from unrolled.allocator import keep_freed_memory

        keep_freed_memory()

    s = json.loads((given.folder / "settings.json").read_text("utf-8"))
    ids = torch.from_numpy(np.load(given.folder / "train.npy").astype(np.int64))
    batch, window = s["batch_size"], s["window"]
    steps = (len(ids) - 1) // batch
    inputs = ids[: batch * steps].view(batch, steps).t().contiguous()  # [steps B]
    targets = ids[1 : batch * steps + 1].view(batch, steps).t().contiguous()

    torch.manual_seed(s["seed"])
    embedding = s["embedding"] if given.input == "embedding" else None
    model = LanguageModel(s["symbols"], s["hidden"], s["layers"], embedding)
    model.load_state_dict(torch.load(given.start or given.folder / f"{given.input}.pt"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=s["lr"], betas=tuple(s["betas"]), weight_decay=0.0)

    losses, norms, symbols, clock = [], [], [], [time.perf_counter()]
    state, at = None, 0
    for _ in range(given.updates):
        x, y = inputs[at : at + window], targets[at : at + window]
        with torch.autocast("cpu", torch.bfloat16, enabled=given.precision == "bf16"):
            scores, state = model(x, state)
            loss = F.cross_entropy(scores.flatten(0, 1).float(), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), s["clip"])
        optimizer.step()
        state = tuple(part.detach() for part in state)
        at += window
        if at >= steps:  # the next epoch
            state, at = None, 0
        losses.append(loss.item())
        norms.append(norm.item())
        symbols.append(x.numel())
        clock.append(time.perf_counter())

    if given.weights is not None:
        torch.save(model.state_dict(), given.weights)
    result = {"losses": losses, "norms": norms, "symbols": symbols, "clock": clock, "threads": torch.get_num_threads()}
    given.out.write_text(json.dumps(result), "utf-8")


if __name__ == "__main__":
    main()
