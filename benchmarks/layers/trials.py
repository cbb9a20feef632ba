"""What the rows run: each function here makes a row of one size ready, both sides on the same weights and inputs."""

from __future__ import annotations

import copy
import inspect
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import peak_memory, restart_peak, run_json
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import unrolled.nn
from layers.peers import onnx_layer, scan_training, write
from layers.rounds import Missing, Setting, Side, Size, Trial, distances, same_bits

__all__ = [
    "cpu_after_call", "denormals", "generating", "in_turn", "limit", "memory", "onnx", "peak_of_process", "recurrence",
    "scan", "step", "tape_budget", "training",
]  # fmt: skip

SCRIPT = Path(__file__).resolve().parents[1] / "native.py"
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
bfloat16 = partial(torch.autocast, "cpu", torch.bfloat16)


class Pair:
    """Torch's layer and ours with the same weights; inputs, initial states and gradients that go into either."""

    def __init__(
        self, cell: str, size: Size, setting: Setting, *, layers: int = 1, both: bool = False, ragged: bool = False
    ) -> None:
        torch.manual_seed(1)
        self.cell, self.size, self.layers, self.directions = cell, size, layers, 2 if both else 1
        kind: dict[str, Any] = {"num_layers": layers, "bidirectional": both}
        self.torch = getattr(torch.nn, cell)(size.hidden, size.hidden, **kind)
        self.ours = getattr(unrolled.nn, cell)(size.hidden, size.hidden, backend=setting.backend, **kind)
        self.ours.load_state_dict(self.torch.state_dict())
        fields = 2 if cell == "LSTM" else 1
        steps, batch, hidden = size.steps, size.batch, size.hidden
        self.x = torch.randn(steps, batch, hidden)
        self.state = tuple(torch.randn(layers * self.directions, batch, hidden) for _ in range(fields))
        self.seeds = [torch.randn(steps, batch, hidden * self.directions), *map(torch.randn_like, self.state)]
        self.lengths = torch.full((batch,), steps)
        if ragged:  # one row goes to the end, so that both sides return T steps
            self.lengths[1:] = torch.randint(steps // 2, steps + 1, (batch - 1,))

    def names(self, backward: bool = True) -> dict[str, int]:
        """The tensors that a run returns -> how many products are summed to an element of them."""
        values = {"output": 2 * self.size.hidden}
        values |= {f"final {name}": 2 * self.size.hidden for name in "hc"[: len(self.state)]}
        if not backward:
            return values
        inputs = {f"gradient of {name}": 2 * self.size.hidden for name in ("input", "h_0", "c_0")[: len(values)]}
        rows = self.size.steps * self.size.batch
        return values | inputs | {f"gradient of {name}": rows for name, _ in self.torch.named_parameters()}

    def flop(self, products: int) -> float:
        """Of a run with 2 products (forward) or 6 (and backward), real steps only."""
        hidden = self.size.hidden
        inputs = [hidden, *[hidden * self.directions] * (self.layers - 1)]
        each = sum(2.0 * GATES[self.cell] * hidden * (n + hidden) for n in inputs) * self.directions
        return float(self.lengths.sum()) * each * products / 2

    def call(self, layer: Any, how: str, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A call of either layer: "dense", with "lengths", or with a "packed" sequence. Output and final states."""
        hx: Any = state if self.cell == "LSTM" else state[0]
        if how == "dense":
            out, final = layer(x, hx)
        elif how == "lengths":
            out, final = layer(x, hx, lengths=self.lengths)
        else:
            out, final = layer(pack_padded_sequence(x, self.lengths, enforce_sorted=False), hx)
            out, _ = pad_packed_sequence(out)
        return (out, *final) if self.cell == "LSTM" else (out, final)

    def forward(self, layer: Any, how: str = "dense", *, bf16: bool = False, frozen: bool = False) -> Side:
        """Inference. Autocast is entered at every call, as a user does: entered once, it would keep cast weights."""
        layer.eval()
        dtype = next(layer.parameters()).dtype
        x, state = self.x.to(dtype), tuple(part.to(dtype) for part in self.state)

        def run() -> tuple[Tensor, ...]:
            return self.call(layer, how, x, state)

        def cast() -> tuple[Tensor, ...]:
            with bfloat16():
                return run()

        return Side(cast if bf16 else run, (torch.no_grad, *([partial(freezing(), layer)] if frozen else [])))

    def training(self, layer: Any, how: str = "dense", *, bf16: bool = False) -> Side:
        """Forward, and backward to the input, the initial states and the weights, from every value returned."""
        dtype = next(layer.parameters()).dtype
        x, *state = (t.to(dtype, copy=True).requires_grad_() for t in (self.x, *self.state))
        leaves = (x, *state, *layer.parameters())
        seeds: list[Tensor] = []

        def run() -> tuple[Tensor, ...]:
            with bfloat16(enabled=bf16):
                values = self.call(layer, how, x, tuple(state))
            if not seeds:  # now it is known which types the values have
                seeds.extend(seed.to(value.dtype) for seed, value in zip(self.seeds, values, strict=True))
            return (*values, *torch.autograd.grad(values, leaves, seeds))

        return Side(run)

    def oracle(self) -> Any:
        """Torch's layer in float64."""
        return copy.deepcopy(self.torch).double()


def freezing() -> Any:
    """`unrolled.nn.freeze`: a context in which a layer keeps its packed weights."""
    if not hasattr(unrolled.nn, "freeze"):
        raise Missing("unrolled.nn.freeze is not there")
    return unrolled.nn.freeze


def native(name: str) -> Any:
    """What the extension offers for measuring."""
    try:
        import unrolled.native as extension
    except ImportError:
        raise Missing("unrolled.native is not there") from None
    if not hasattr(extension, name):
        raise Missing(f"unrolled.native.{name} is not there")
    return getattr(extension, name)


def limit(precision: str, setting: Setting) -> float | None:
    """FLOP/s that a loop of multiply-adds reaches which never leaves the registers; None without the extension."""
    try:
        peak = native("peak")
    except Missing:
        return None
    return max(peak(precision == "bf16", setting.threads, setting.seconds) for _ in range(3))


def training(
    cell: str,
    size: Size,
    setting: Setting,
    *,
    ours: str = "dense",
    peer: str = "dense",
    bf16: bool = False,
    peer_bf16: bool = False,
    layers: int = 1,
    both: bool = False,
) -> Trial:
    """Forward and backward against torch.nn; `ours`, `peer`: how they are called."""
    pair = Pair(cell, size, setting, layers=layers, both=both, ragged=peer != "dense")
    mine, theirs = pair.training(pair.ours, ours, bf16=bf16), pair.training(pair.torch, peer, bf16=peer_bf16)
    # bf16 is judged by torch's bf16, whatever the speed is compared with.
    measure = pair.training(pair.torch, peer, bf16=bf16)

    def check() -> list[dict[str, Any]]:
        oracle = pair.training(pair.oracle(), peer)
        return distances(pair.names(), mine.values(), measure.values(), oracle.values())

    return Trial(mine.seconds, theirs.seconds, check, flop=pair.flop(6), bf16=bf16)


def scan(cell: str, size: Size, setting: Setting) -> Trial:
    """Forward and backward against a scan in JAX."""
    pair = Pair(cell, size, setting)
    mine = pair.training(pair.ours)
    theirs = Side(scan_training(pair.torch, pair.x, pair.state, pair.seeds))

    def check() -> list[dict[str, Any]]:
        values = [torch.from_numpy(np.array(t)) for t in theirs.values()]
        return distances(pair.names(), mine.values(), values, pair.training(pair.oracle()).values())

    return Trial(mine.seconds, theirs.seconds, check, flop=pair.flop(6))


def step(cell: str, size: Size, setting: Setting, *, frozen: bool = False) -> Trial:
    """The layer's own call against torch.nn's, without gradients; with one step, batch 1, it is all overhead."""
    pair = Pair(cell, size, setting)
    mine, theirs = pair.forward(pair.ours, frozen=frozen), pair.forward(pair.torch)

    def check() -> list[dict[str, Any]]:
        oracle = pair.forward(pair.oracle())
        return distances(pair.names(backward=False), mine.values(), theirs.values(), oracle.values())

    return Trial(mine.seconds, theirs.seconds, check, flop=pair.flop(2))


def onnx(cell: str, size: Size, setting: Setting, *, frozen: bool = False, bf16: bool = False) -> Trial:
    """A call without gradients against ONNX Runtime (in fp32: it has no LSTM in bf16)."""
    pair = Pair(cell, size, setting)
    mine = pair.forward(pair.ours, frozen=frozen, bf16=bf16)
    theirs = Side(onnx_layer(pair.torch, pair.x, pair.state, setting.threads))

    def check() -> list[dict[str, Any]]:
        output, *final = (torch.from_numpy(array) for array in theirs.values())
        values = [output.squeeze(1), *final]
        names, oracle = pair.names(backward=False), pair.forward(pair.oracle()).values()
        if not bf16:
            return distances(names, mine.values(), values, oracle)
        # The peer has to be right too, and for ours torch's bf16 is the measure.
        peer = distances({f"{name} of the peer": n for name, n in names.items()}, values, values, oracle)
        return peer + distances(names, mine.values(), pair.forward(pair.torch, bf16=True).values(), oracle)

    return Trial(mine.seconds, theirs.seconds, check, flop=pair.flop(2), bf16=bf16)


def recurrence(cell: str, size: Size, setting: Setting, *, bf16: bool = False) -> Trial:
    """The recurrence without the projection of its inputs, weights packed, against the machine's limit."""
    peak, alone = native("peak"), native("recurrence_only")
    flop = 2.0 * size.steps * size.batch * GATES[cell] * size.hidden**2

    def ours(budget: float) -> float:
        run = partial(alone, cell.lower(), size.steps, size.batch, size.hidden, bf16)
        return float(run(max(1, int(budget / run(1)))))

    return Trial(ours, lambda budget: flop / peak(bf16, setting.threads, budget), flop=flop, bf16=bf16)


def generating(size: Size, setting: Setting) -> Trial:
    """`unrolled.generate` against the loop that one writes over torch.nn, same untrained weights."""
    from language_model import as_unrolled
    from plain_torch import LanguageModel

    from unrolled.config import resolve
    from unrolled.vocabulary import build_vocabulary

    symbols = ["\n", *map(chr, range(ord(" "), ord(" ") + 63))]  # 64, and the one for all that is unknown
    vocabulary = build_vocabulary("char", ["".join(symbols)])
    torch.manual_seed(1)
    plain = LanguageModel(len(vocabulary), size.hidden, layers=2, embedding=size.hidden).eval()
    settings = {"cell": "lstm", "hidden": size.hidden, "layers": 2, "dropout": 0.0}
    config = resolve({"input": {"embedding": size.hidden}, "core": settings, "training": {"backend": setting.backend}})
    model = unrolled.LanguageModel(config, vocabulary).eval()
    model.load_state_dict(as_unrolled(plain.state_dict()))
    first = int(vocabulary.encode("\n")[0])  # what an empty prompt stands for
    mine = Side(lambda: "".join(unrolled.generate(model, length=size.steps, seed=1)))
    theirs = Side(lambda: write(plain, first, size.steps))

    def check() -> list[dict[str, Any]]:
        # They draw from the same distribution with other random numbers, so the scores are compared, over one text.
        ids = torch.randint(len(vocabulary), (min(size.steps, 100), 1))
        with torch.no_grad():
            scores = [m(ids)[0] for m in (model, plain, copy.deepcopy(plain).double())]
        if len(mine.values()) != size.steps or len(theirs.values()) != size.steps:
            raise RuntimeError(f"expected {size.steps} characters from both sides")
        return distances({"scores": 2 * size.hidden}, *([s] for s in scores))

    inputs_and_states = 2 * 2 * size.hidden  # of two layers
    flop = size.steps * 2.0 * (GATES["LSTM"] * size.hidden * inputs_and_states + size.hidden * len(vocabulary))
    return Trial(mine.seconds, theirs.seconds, check, flop=flop)


def memory(cell: str, size: Size, setting: Setting) -> Trial:
    """Peak memory of forward and backward, each time in a new process."""
    job = {"cell": cell, "hidden": size.hidden, "batch": size.batch, "steps": size.steps, "backend": setting.backend}

    def peak(side: str, _: float) -> float:
        return float(run_json([sys.executable, str(SCRIPT), "--run", json.dumps(job | {"side": side})])["bytes"])

    return Trial(partial(peak, "ours"), partial(peak, "torch"), unit="B")


def peak_of_process(job: dict[str, Any]) -> dict[str, Any]:
    """What `memory` runs. A tiny run comes before: what is loaded at first use is no part of the measurement."""
    setting = Setting(1, 0, torch.get_num_threads(), job["backend"])
    tiny = Pair(job["cell"], Size(8, 2, 3), setting)
    tiny.training(getattr(tiny, job["side"])).values()
    pair = Pair(job["cell"], Size(job["hidden"], job["batch"], job["steps"]), setting)
    side = pair.training(getattr(pair, job["side"]))
    before = restart_peak()
    values = side.values()  # held, as an optimiser's step would
    # A tiny run may fit into what was there already; a page is the least that can be told apart.
    return {"bytes": max(peak_memory() - before, 4096), "values": len(values)}


def in_turn(cell: str, size: Size, setting: Setting) -> Trial:
    """Calls of ours and products of torch in turn, against each alone, added up.

    Threads that spin when their work is done would take the other's cores.
    """
    pair = Pair(cell, size, setting)
    square = torch.randn(64 if setting.quick else 512, 64 if setting.quick else 512)
    call = pair.forward(pair.ours)
    product = Side(lambda: square @ square)
    both = Side(lambda: (call.run(), product.run()), call.around)
    return Trial(both.seconds, lambda budget: call.seconds(budget / 2) + product.seconds(budget / 2))


def cpu_after_call(cell: str, size: Size, setting: Setting) -> Trial:
    """CPU time of this process while it sleeps after a call, against what is allowed."""
    call = Pair(cell, size, setting)
    side = call.training(call.ours)

    def asleep(_: float) -> float:
        side.values()
        before = time.process_time()
        time.sleep(0.01 if setting.quick else 1)
        return time.process_time() - before

    return Trial(asleep, lambda _: 0.02)


def denormals(cell: str, size: Size, setting: Setting) -> Trial:
    """Forward and backward on numbers too small for float32's full precision, against ordinary ones.

    Without biases, so that inputs of 1e-39 keep the states there at every step, and with gradients of 1e-39.
    """
    pair, small = Pair(cell, size, setting), Pair(cell, size, setting)
    for each in (pair, small):
        for name, weight in each.ours.named_parameters():
            if name.startswith("bias"):
                torch.nn.init.zeros_(weight)
    for tensor in (small.x, *small.state, *small.seeds):
        tensor.mul_(1e-39)
    ours, peer = small.training(small.ours), pair.training(pair.ours)
    return Trial(ours.seconds, peer.seconds, flop=pair.flop(6))


def tape_budget(cell: str, size: Size, setting: Setting, *, share: float = 0.05) -> Trial:
    """Forward and backward from the final state in a share of the tape, against all of it: the same bits."""
    from unrolled.cells import build_cell
    from unrolled.unroll import unroll

    if "tape_budget" not in inspect.signature(unroll).parameters:
        raise Missing("unroll(tape_budget=...) is not there")
    torch.manual_seed(1)
    built = build_cell(cell.lower(), size.hidden, size.hidden)
    # Kept for every step: the states, the gates, and tanh(c) of an LSTM or W_hn h of a GRU.
    values = {"RNN": 1, "GRU": 5, "LSTM": 7}[cell] * size.hidden
    # Tiny sizes are not cut finely enough for a small share; a megabyte is none of a real one.
    budget = max(int(share * 4 * values * size.batch * size.steps), 2**20)
    x = torch.randn(size.steps, size.batch, size.hidden, requires_grad=True)
    state = built.initial_state(size.batch)
    seeds = [torch.randn_like(part) for part in state]
    leaves = {"gradient of input": x, **{f"gradient of {name}": p for name, p in built.named_parameters()}}

    def side(**options: Any) -> Side:
        def run() -> tuple[Tensor, ...]:
            final = unroll(built, x, state, backend=setting.backend, **options).state
            return (*final, *torch.autograd.grad(tuple(final), tuple(leaves.values()), seeds))

        return Side(run)

    mine, theirs = side(tape_budget=budget, outputs=False), side()
    names = [*(f"final {name}" for name in state._fields), *leaves]
    flop = size.steps * size.batch * GATES[cell] * size.hidden * 2.0 * size.hidden * 6
    return Trial(mine.seconds, theirs.seconds, lambda: same_bits(names, mine.values(), theirs.values()), flop=flop)
