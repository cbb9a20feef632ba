"""A cell of your own in the place of an LSTM: it trains, saves, loads and writes like a built-in one.

The minimal gated unit (Zhou et al. 2016) has one gate, which both forgets and updates:

    f  = sigmoid(W_f [x; h])
    h' = (1 - f) * h + f * tanh(W_h [x; f * h])

Run it: python examples/own_cell.py TEXT.txt
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import unrolled
from unrolled.cells import Cell, HiddenState, register


@register("mgu")
class MinimalGatedUnit(Cell):
    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.gate = nn.Linear(input_size + hidden_size, hidden_size)
        self.candidate = nn.Linear(input_size + hidden_size, hidden_size)

    def step(self, x: torch.Tensor, state: HiddenState) -> tuple[torch.Tensor, HiddenState]:
        f = torch.sigmoid(self.gate(torch.cat([x, state.h], dim=-1)))
        new = torch.tanh(self.candidate(torch.cat([x, f * state.h], dim=-1)))
        h = (1 - f) * state.h + f * new
        return h, HiddenState(h)


def main(text: str, out: str, **settings: object) -> str:
    unrolled.train(text, out, cell="mgu", embedding=32, **settings)
    model = unrolled.load(out)  # from the folder alone: `mgu` is registered, so its name is enough
    print(f"{unrolled.evaluate(model, text, lanes=32).nats_per_char:.3f} nats per character")
    written = "".join(unrolled.generate(model, "The ", length=100, temperature=0.7, seed=1))
    print("The " + written)
    return written


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(sys.argv[1], str(Path(folder) / "mgu"), hidden=128, layers=1, epochs=1)
