"""The lecture notes' network that learns to write "hello": one-hot letters, three hidden units, no biases.

    h_t = tanh(W_xh x_t + W_hh h_{t-1}),   y_t = W_hy h_t,   p_t = softmax(y_t)

Run it: python examples/hello.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unrolled.cells import RNN, Lookup
from unrolled.unroll import unroll

LETTERS = "helo"


class Hello(nn.Module):
    """W_xh [3 4], W_hh [3 3] and W_hy [4 3]; nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = RNN(len(LETTERS), 3, bias=False)  # its weight_ih is the notes' W_xh, its weight_hh their W_hh
        self.W_hy = nn.Parameter(torch.empty(len(LETTERS), 3).uniform_(-0.5, 0.5))

    def forward(self, ids: Tensor) -> Tensor:
        """Letters [T B] -> scores of the next letter [T B 4]. A one-hot letter times W_xh is one of its columns."""
        return F.linear(unroll(self.cell, Lookup(ids, None)).outputs, self.W_hy)


def show(model: Hello, ids: Tensor) -> list[str]:
    """One line a step: the letter, h_t, and the probability of each letter to come."""
    with torch.no_grad():
        states = unroll(model.cell, Lookup(ids, None)).outputs[:, 0]
        probabilities = torch.softmax(model(ids)[:, 0], -1)
    lines = []
    for t, letter in enumerate(ids[:, 0].tolist()):
        h = " ".join(f"{value:+.2f}" for value in states[t].tolist())
        p = "  ".join(f"{name} {value:.2f}" for name, value in zip(LETTERS, probabilities[t].tolist(), strict=True))
        lines.append(f"  x_{t + 1} = {LETTERS[letter]}   h_{t + 1} = [{h}]   next: {p}")
    return lines


def write(model: Hello, first: str, length: int) -> str:
    """Autoregressive: each letter is the likeliest, and is read next."""
    state, text = model.cell.initial_state(1), first
    with torch.no_grad():
        while len(text) < length:
            h, state = model.cell.step(Lookup(torch.tensor([LETTERS.index(text[-1])]), None), state)
            text += LETTERS[int((model.W_hy @ h[0]).argmax())]
    return text


def main(updates: int = 200, lr: float = 0.5) -> str:
    torch.manual_seed(2)
    model = Hello()
    word = torch.tensor([LETTERS.index(letter) for letter in "hello"])[:, None]
    inputs, targets = word[:-1], word[1:]
    print("Before training:", *show(model, inputs), sep="\n")
    for update in range(1, updates + 1):
        loss = F.cross_entropy(model(inputs)[:, 0], targets[:, 0])
        model.zero_grad()
        loss.backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad
        if update in (1, 10, 100, updates):
            moved = "  ".join(
                f"{name} {float((p - before[key]).detach().norm()):.3f}"
                for name, (key, p) in zip(("W_hy", "W_xh", "W_hh"), model.named_parameters(), strict=True)
            )
            print(f"update {update:>3}: loss {float(loss.detach()):.3f} nats; moved by {moved}")
    print("After:", *show(model, inputs), sep="\n")
    text = write(model, "h", 5)
    print("It writes:", text)
    return text


if __name__ == "__main__":
    main()
