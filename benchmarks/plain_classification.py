"""A classifier as one writes it in torch alone: the peer of `examples_with_unrolled.py`.

Packed sequences through a bidirectional `torch.nn.LSTM`, the last states of both directions, a linear layer.

    python plain_classification.py FOLDER train --updates 20 --out RESULT.json

FOLDER is made by `examples.py`: settings.json, examples.json, batches.json and the weights.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence


class Classifier(nn.Module):
    """ids [T B] and lengths -> scores of the labels [B C]."""

    def __init__(self, symbols: int, labels: int, embedding: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, bidirectional=True)
        self.output = nn.Linear(2 * hidden, labels)

    def forward(self, ids, lengths):  # type: ignore[no-untyped-def]
        packed = pack_padded_sequence(self.embedding(ids), lengths, enforce_sorted=False)
        _, (h, _) = self.lstm(packed)
        return self.output(torch.cat([h[-2], h[-1]], dim=1))


def batch_of(examples, rows):  # type: ignore[no-untyped-def]
    texts = [torch.tensor(examples["source"][row]) for row in rows]
    labels = torch.tensor([examples["target"][row][0] for row in rows])
    return pad_sequence(texts), torch.tensor([len(ids) for ids in texts]), labels


def build(settings):  # type: ignore[no-untyped-def]
    s = settings
    return Classifier(s["sources"], s["targets"], s["embedding"], s["hidden"], s["layers"])


def train(folder, updates, precision):  # type: ignore[no-untyped-def]
    s = json.loads((folder / "settings.json").read_text("utf-8"))
    examples = json.loads((folder / "examples.json").read_text("utf-8"))
    batches = json.loads((folder / "batches.json").read_text("utf-8"))
    model = build(s)
    model.load_state_dict(torch.load(folder / "plain.pt"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=s["lr"], betas=tuple(s["betas"]), weight_decay=0.0)
    losses, clock = [], [time.perf_counter()]
    for rows in batches[:updates]:
        ids, lengths, labels = batch_of(examples, rows)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = F.cross_entropy(model(ids, lengths).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), s["clip"])
        optimizer.step()
        losses.append(loss.item())
        clock.append(time.perf_counter())
    return {"losses": losses, "clock": clock}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("what", choices=("train",))
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: under torch.autocast")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.write_text(json.dumps(train(given.folder, given.updates, given.precision)), "utf-8")


if __name__ == "__main__":
    main()
