"""A translator as one writes it in torch alone, trained and searched: the peer of `examples_with_unrolled.py`.

The encoder reads packed sequences in both directions, the decoder is a Python loop over the target's steps with dot
attention, the output layer comes at the end, over all steps.

    python plain_translation.py FOLDER train --updates 20 --out RESULT.json
    python plain_translation.py FOLDER translate --out RESULT.json

FOLDER is made by `examples.py`: settings.json, examples.json (symbols of both sides), batches.json, test.json and the
weights.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

IGNORE = -100


class Translator(nn.Module):
    """GRU or LSTM; symbols of the target, its end and its start are numbered 0..V-1, V, V+1."""

    def __init__(self, cell: str, sources: int, targets: int, embedding: int, hidden: int) -> None:
        super().__init__()
        layer = {"gru": nn.GRU, "lstm": nn.LSTM}[cell]
        self.cell, self.end, self.start = cell, targets, targets + 1
        self.source_embedding = nn.Embedding(sources, embedding)
        self.target_embedding = nn.Embedding(targets + 2, embedding)
        self.encoder = layer(embedding, hidden, bidirectional=True)
        self.decoder = layer(embedding, hidden)
        # h, and for an LSTM c, of both directions -> those of the decoder.
        self.bridges = nn.ModuleList(nn.Linear(2 * hidden, hidden) for _ in range(2 if cell == "lstm" else 1))
        self.memory = nn.Linear(2 * hidden, hidden, bias=False)  # what a decoder's state is multiplied with
        self.output = nn.Linear(2 * hidden, targets + 1)

    def encode(self, source, lengths):  # type: ignore[no-untyped-def]
        """source [S B] -> memory [B S H], mask [B S], the decoder's first state."""
        packed = pack_padded_sequence(self.source_embedding(source), lengths, enforce_sorted=False)
        outputs, state = self.encoder(packed)
        outputs, _ = pad_packed_sequence(outputs)
        fields = state if self.cell == "lstm" else (state,)
        first = [bridge(torch.cat([h[0], h[1]], dim=-1)) for bridge, h in zip(self.bridges, fields, strict=True)]
        first[0] = torch.tanh(first[0])
        first = [h.unsqueeze(0) for h in first]
        mask = torch.arange(len(source)) < lengths[:, None]
        return self.memory(outputs).transpose(0, 1), mask, tuple(first) if self.cell == "lstm" else first[0]

    def step(self, words, state, memory, mask):  # type: ignore[no-untyped-def]
        """words [B] -> the decoder's output and its context [B 2H], the state after."""
        hidden, state = self.decoder(self.target_embedding(words).unsqueeze(0), state)
        hidden = hidden.squeeze(0)
        scores = torch.bmm(memory, hidden.unsqueeze(2)).squeeze(2)
        weights = torch.softmax(scores.masked_fill(~mask, -torch.inf).float(), dim=1).to(memory.dtype)
        context = torch.bmm(weights.unsqueeze(1), memory).squeeze(1)
        return torch.cat([hidden, context], dim=1), state

    def forward(self, source, lengths, target):  # type: ignore[no-untyped-def]
        """The mean cross-entropy of target [U B], which holds the end and then IGNORE."""
        memory, mask, state = self.encode(source, lengths)
        words = torch.full_like(target[0], self.start)
        joined = []
        for u in range(len(target)):
            both, state = self.step(words, state, memory, mask)
            joined.append(both)
            words = target[u].clamp(min=0)  # teacher forcing
        scores = self.output(torch.stack(joined))
        return F.cross_entropy(scores.flatten(0, 1).float(), target.flatten(), ignore_index=IGNORE)

    @torch.no_grad()
    def beam_search(self, source, beam, longest, barred):  # type: ignore[no-untyped-def]
        """source [S], one sentence -> (symbols, log-probability) of the best by the mean of a step's log-probability.

        The beam's hypotheses are a batch.
        """
        memory, mask, state = self.encode(source[:, None], torch.tensor([len(source)]))
        words, written = torch.tensor([self.start]), torch.empty(1, 0, dtype=torch.int64)
        totals = torch.zeros(1, dtype=torch.float64)
        finished = []
        for u in range(1, longest + 1):
            rows = len(words)
            joined, state = self.step(words, state, memory.expand(rows, -1, -1), mask.expand(rows, -1))
            gains = torch.log_softmax(self.output(joined).float(), dim=1)
            gains[:, barred] = -torch.inf
            best, at = (totals[:, None] + gains).flatten().topk(2 * beam)
            lines, symbols = at // gains.shape[1], at % gains.shape[1]
            onward = []
            for k, (total, line, symbol) in enumerate(
                zip(best.tolist(), lines.tolist(), symbols.tolist(), strict=True)
            ):
                if symbol != self.end:
                    onward.append(k)
                elif k < beam:
                    finished.append((total / u, total, written[line].tolist()))
            if len(finished) >= beam:
                break
            chosen = torch.tensor(onward[:beam])
            totals, words, lines = best[chosen], symbols[chosen], lines[chosen]
            written = torch.cat([written[lines], words[:, None]], dim=1)
            state = tuple(h[:, lines] for h in state) if self.cell == "lstm" else state[:, lines]
        if not finished:
            finished = [(float(totals[0]) / longest, float(totals[0]), written[0].tolist())]
        _, total, symbols = max(finished)
        return symbols, total


def batch_of(examples, rows, end):  # type: ignore[no-untyped-def]
    source = [torch.tensor(examples["source"][row]) for row in rows]
    target = [torch.tensor([*examples["target"][row], end]) for row in rows]
    lengths = torch.tensor([len(ids) for ids in source])
    return pad_sequence(source), lengths, pad_sequence(target, padding_value=IGNORE)


def build(settings):  # type: ignore[no-untyped-def]
    s = settings
    return Translator(s["cell"], s["sources"], s["targets"], s["embedding"], s["hidden"])


def train(folder, updates, precision):  # type: ignore[no-untyped-def]
    s = json.loads((folder / "settings.json").read_text("utf-8"))
    examples = json.loads((folder / "examples.json").read_text("utf-8"))
    batches = json.loads((folder / "batches.json").read_text("utf-8"))
    model = build(s)
    model.load_state_dict(torch.load(folder / "plain.pt"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=s["lr"], betas=tuple(s["betas"]), weight_decay=0.0)
    losses, clock = [], [time.perf_counter()]
    for rows in batches[:updates]:
        source, lengths, target = batch_of(examples, rows, model.end)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(source, lengths, target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), s["clip"])
        optimizer.step()
        losses.append(loss.item())
        clock.append(time.perf_counter())
    return {"losses": losses, "clock": clock}


def translate(folder):  # type: ignore[no-untyped-def]
    s = json.loads((folder / "settings.json").read_text("utf-8"))
    sentences = [torch.tensor(ids) for ids in json.loads((folder / "test.json").read_text("utf-8"))]
    model = build(s).eval()
    model.load_state_dict(torch.load(folder / "trained.pt"))
    for source in sentences[:10]:  # warm
        model.beam_search(source, s["beam"], 2 * len(source) + 50, s["barred"])
    began = time.perf_counter()
    found = [model.beam_search(source, s["beam"], 2 * len(source) + 50, s["barred"]) for source in sentences]
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "symbols": [ids for ids, _ in found],
        "log_probabilities": [total for _, total in found],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("what", choices=("train", "translate"))
    parser.add_argument("--updates", type=int, default=0)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: under torch.autocast")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    result = train(given.folder, given.updates, given.precision) if given.what == "train" else translate(given.folder)
    given.out.write_text(json.dumps(result), "utf-8")


if __name__ == "__main__":
    main()
