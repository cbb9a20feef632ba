"""The lowest rung of the ladder: the recurrent equations one scalar at a time, in Python floats and `math`.

No torch and no arrays, so that nothing here can share a defect with what it judges. Everything is written the
slow and obvious way: a row by itself, padding cut off, a reversed row read from its end, a document run by itself.
Vectors are lists of floats, sequences lists of vectors; a state is a tuple of vectors: (h,), or (h, c) for "lstm".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

Vector = list[float]
Matrix = list[Vector]
RowState = tuple[Vector, ...]


class Weights(NamedTuple):
    """In torch's layout and gate order: ih `[G*H][I]`, hh `[G*H][H]`, the biases `[G*H]` or None."""

    ih: Matrix
    hh: Matrix
    bias_ih: Vector | None
    bias_hh: Vector | None


class Run(NamedTuple):
    """outputs `[T][B][H]`, state: fields `[B][H]`, states: fields `[T][B][H]`."""

    outputs: list[Matrix]
    state: tuple[Matrix, ...]
    states: tuple[list[Matrix], ...]


# ---------------------------------------------------------------------------------------------- one step


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def affine(matrix: Matrix, bias: Vector | None, x: Vector) -> Vector:
    """`matrix x + bias`, each sum rounded once (fsum)."""
    return [
        math.fsum([*(w * v for w, v in zip(row, x, strict=True)), 0.0 if bias is None else bias[j]])
        for j, row in enumerate(matrix)
    ]


def step(kind: str, weights: Weights, x: Vector, state: RowState) -> RowState:
    """The next state of one row. kind: "rnn", "rnn_relu", "lstm" or "gru"."""
    h = state[0]
    n = len(h)
    from_x = affine(weights.ih, weights.bias_ih, x)
    from_h = affine(weights.hh, weights.bias_hh, h)
    if kind == "rnn":
        return ([math.tanh(from_x[k] + from_h[k]) for k in range(n)],)
    if kind == "rnn_relu":
        return ([max(from_x[k] + from_h[k], 0.0) for k in range(n)],)
    if kind == "lstm":
        c = state[1]
        new_h, new_c = [], []
        for k in range(n):
            i = sigmoid(from_x[k] + from_h[k])
            f = sigmoid(from_x[n + k] + from_h[n + k])
            g = math.tanh(from_x[2 * n + k] + from_h[2 * n + k])
            o = sigmoid(from_x[3 * n + k] + from_h[3 * n + k])
            new_c.append(f * c[k] + i * g)
            new_h.append(o * math.tanh(new_c[k]))
        return new_h, new_c
    if kind == "gru":
        new_h = []
        for k in range(n):
            r = sigmoid(from_x[k] + from_h[k])
            z = sigmoid(from_x[n + k] + from_h[n + k])
            candidate = math.tanh(from_x[2 * n + k] + r * from_h[2 * n + k])
            new_h.append((1 - z) * candidate + z * h[k])
        return (new_h,)
    raise KeyError(kind)


def zeros(state: RowState) -> RowState:
    return tuple([0.0] * len(field) for field in state)


# ------------------------------------------------------------------------------------------- over time


def run_row(
    kind: str, weights: Weights, xs: Sequence[Vector], state: RowState, resets: Sequence[bool] | None = None
) -> list[RowState]:
    """One row's own steps in the order of reading: the state after each; `resets` clear the state before a step."""
    states = []
    for t, x in enumerate(xs):
        state = step(kind, weights, x, zeros(state) if resets is not None and resets[t] else state)
        states.append(state)
    return states


def run(
    kind: str,
    weights: Weights,
    inputs: list[Matrix],
    state: Sequence[Matrix],
    *,
    lengths: Sequence[int] | None = None,
    reverse: bool = False,
    reset: list[list[bool]] | None = None,
) -> Run:
    """What `unroll` must return: every row by itself over its own steps, then put back in place.

    inputs `[T][B][I]`, state: fields `[B][H]`, reset `[T][B]`.
    """
    steps, batch, fields = len(inputs), len(state[0]), len(state)
    size = len(state[0][0]) if batch else 0
    outputs = [[[0.0] * size for _ in range(batch)] for _ in range(steps)]
    states = tuple([[[0.0] * size for _ in range(batch)] for _ in range(steps)] for _ in range(fields))
    final: tuple[Matrix, ...] = tuple([] for _ in range(fields))
    for b in range(batch):
        own = range(steps if lengths is None else lengths[b])
        order = list(own)[::-1] if reverse else list(own)
        first = tuple(field[b] for field in state)
        after = run_row(
            kind,
            weights,
            [inputs[t][b] for t in order],
            first,
            None if reset is None else [reset[t][b] for t in order],
        )
        last = after[-1] if after else first
        # Padding comes after a row's own steps, or before them in reverse; the state is held there.
        held = first if reverse else last
        for k in range(fields):
            final[k].append(last[k])
            for t in range(steps):
                states[k][t][b] = held[k]
        for t, now in zip(order, after, strict=True):
            outputs[t][b] = now[0]
            for k in range(fields):
                states[k][t][b] = now[k]
    return Run(outputs, final, states)


# -------------------------------------------------------------------------------------------- in a stack


def documents(starts: Sequence[bool]) -> list[range]:
    """The steps of each document of a row; one starts at every mark, and at step 0 whether marked or not."""
    edges = [t for t in range(len(starts)) if t == 0 or starts[t]]
    return [range(a, b) for a, b in pairwise([*edges, len(starts)])]


def run_layers(
    kind: str,
    layers: Sequence[Sequence[Weights]],
    inputs: list[Matrix],
    states: Sequence[Sequence[Matrix]],
    *,
    lengths: Sequence[int] | None = None,
    reset: list[list[bool]] | None = None,
) -> tuple[list[Matrix], list[tuple[Matrix, ...]]]:
    """What a stack must return: outputs `[T][B][directions*H]`, and each cell's final state.

    `reset` marks the first step of a document. Every document is run by itself, in both directions. The given
    states precede what is read first: row's step 0 (unless marked), and in reverse the row's last step.
    """
    batch = len(states[0][0])
    x, finals = inputs, []
    remaining = iter(states)
    for directions in layers:
        joined: list[Matrix] = [[[] for _ in range(batch)] for _ in x]
        for d, weights in enumerate(directions):
            given = next(remaining)
            final: tuple[Matrix, ...] = tuple([] for _ in given)
            for b in range(batch):
                length = len(x) if lengths is None else lengths[b]
                parts = documents([reset is not None and reset[t][b] for t in range(length)])
                now = tuple(field[b] for field in given)
                out: dict[int, Vector] = {}
                for part in parts[::-1] if d else parts:
                    order = list(part)[::-1] if d else list(part)
                    # The first document read goes on from the given state; forward, a mark at step 0 forbids it.
                    carries = part is parts[-1] if d else part is parts[0] and not (reset is not None and reset[0][b])
                    after = run_row(kind, weights, [x[t][b] for t in order], now if carries else zeros(now))
                    out.update(zip(order, (state[0] for state in after), strict=True))
                    now = after[-1]
                for t in range(len(x)):
                    joined[t][b] = joined[t][b] + out.get(t, [0.0] * len(given[0][b]))
                for field, vector in zip(final, now, strict=True):
                    field.append(vector)
            finals.append(final)
        x = joined
    return x, finals


# --------------------------------------------------------------------------------------------- gradients


def central_differences(function: Callable[[Vector], float], point: Vector, width: float = 1e-6) -> Vector:
    """The gradient of `function` at `point`, its error some width^2 (curvature) + 1e-16 / width (rounding)."""
    gradient = []
    for k in range(len(point)):
        sides = []
        for sign in (1, -1):
            moved = list(point)
            moved[k] += sign * width
            sides.append(function(moved))
        gradient.append((sides[0] - sides[1]) / (2 * width))
    return gradient
