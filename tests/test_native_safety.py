"""The extension's edge: whatever it is given it computes or refuses, and it touches no memory but its arguments'.

What may crash runs in a process of its own, which writes down each call before it makes it.
"""

from __future__ import annotations

import ctypes
import gc
import math
import mmap
import os
import random as chance
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from unrolled import native

GATES = {0: 1, 1: 1, 2: 4, 3: 3}
TAPE = {0: 0, 1: 0, 2: 4, 3: 4}
PAGE = mmap.PAGESIZE
HARMLESS = (TypeError, ValueError, OverflowError, RuntimeError, NotImplementedError, MemoryError)
"""What a refusal may be. A SystemError, for one, would say that the extension broke Python's rules."""


def in_a_new_process(program: str, log: Path, **environment: str) -> None:
    """Run it, `log` in its environment as LOG; a failure shows the last call that it wrote down."""
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": paths, "LOG": str(log), **environment},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    last = log.read_text(errors="replace").splitlines()[-1:] if log.exists() else []
    assert done.returncode == 0, f"exit code {done.returncode} after {last}\n{done.stderr[-6000:]}"


# ------------------------------------------------------------------- memory that ends where a tensor ends

_libc = ctypes.CDLL(None, use_errno=True)
_regions: list[Any] = []


def guarded(tensor: Tensor, at_the_end: bool = True) -> Tensor:
    """A contiguous copy whose last byte (or first) is next to a page that may not be touched."""
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return tensor.clone()
    pages = -(-size // PAGE) * PAGE
    region = mmap.mmap(-1, pages + 2 * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    for fence in (start, start + PAGE + pages):
        assert _libc.mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(PAGE), 0) == 0
    offset = PAGE + (pages - size if at_the_end else 0)
    copy = torch.frombuffer(region, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    _regions.append(region)  # for as long as the process lives
    return copy.copy_(tensor)


# ------------------------------------------------------------------------------------------ valid calls


class Call:
    """A function of the extension and valid arguments for it, in nested lists, by name."""

    def __init__(self, name: str, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
        self.name, self.function, self.arguments = name, function, arguments

    def __call__(self) -> Any:
        return self.function(**{key: as_tuples(key, value) for key, value in self.arguments.items()})


def as_tuples(key: str, value: Any) -> Any:
    """Lists of lists as the lists of tuples that the extension takes."""
    nested = key in ("directions", "results", "tapes", "d_states", "layers")
    if not nested or not isinstance(value, list):
        return value
    return [tuple(part) if isinstance(part, list) else part for part in value]


def weights_of(
    draw: chance.Random, place: Callable[[Tensor], Tensor], rows: int, inputs: int | None, hidden: int
) -> list[Tensor | None]:
    """A cell's weights for what it reads (inputs None: it looks that up) and for its state, and its biases, if any."""
    weights = [place(torch.randn(rows, size)) if size is not None else None for size in (inputs, hidden)]
    return weights + [place(torch.randn(rows)) if draw.random() < 0.7 else None for _ in range(2)]


def layer_arguments(draw: chance.Random, place: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """What forward and backward are both given, and the sizes."""
    cell = draw.randrange(4)
    steps, batch, symbols = draw.choice([0, 1, 2, 5, 9]), draw.choice([0, 1, 2, 7, 13]), draw.choice([1, 4])
    inputs, hidden = draw.choice([1, 3, 16, 17]), draw.choice([1, 5, 16, 33, 70])
    count, looked_up = draw.choice([1, 2]), draw.random() < 0.4
    rows = GATES[cell] * hidden
    number = lambda *shape: place(torch.randn(shape))  # noqa: E731
    directions = []
    for _ in range(count):
        weights = weights_of(draw, place, rows, None if looked_up else inputs, hidden)
        table = number(symbols, rows) if looked_up else None
        reset = place(torch.rand(steps, batch) < 0.2) if draw.random() < 0.5 else None
        c0 = number(batch, hidden) if cell == 2 else None
        directions.append([*weights, table, number(batch, hidden), c0, reset])
    return {
        "cell": cell,
        "bf16": draw.random() < 0.4,
        "reverse": [draw.random() < 0.5 for _ in range(count)],
        "x": None if looked_up else number(steps, batch, inputs),
        "ids": place(torch.randint(symbols, (steps, batch))) if looked_up else None,
        "lengths": place(torch.randint(steps + 1, (batch,))) if draw.random() < 0.6 else None,
        "directions": directions,
        "packs": [None] * draw.choice([0, count]),
        "outputs": number(steps, batch, count * hidden),
        "sizes": (cell, steps, batch, symbols, inputs, hidden, count, looked_up),
    }


def with_packs(arguments: dict[str, Any], backward: bool, draw: chance.Random) -> None:
    if draw.random() < 0.4:
        arguments["packs"] = [
            native._native.pack(arguments["cell"], arguments["bf16"], backward, d[0], d[1], 1)
            for d in arguments["directions"]
        ]


def forward_call(draw: chance.Random, place: Callable[[Tensor], Tensor]) -> Call:
    arguments = layer_arguments(draw, place)
    cell, steps, batch, _, _, hidden, count, _ = arguments.pop("sizes")
    with_packs(arguments, False, draw)
    lstm, record = cell == 2, draw.random() < 0.5
    number = lambda *shape: place(torch.randn(shape))  # noqa: E731
    arguments["results"] = [
        [
            number(batch, hidden),
            number(batch, hidden) if lstm else None,
            number(steps, batch, TAPE[cell] * hidden) if record and TAPE[cell] else None,
            number(steps, batch, hidden) if lstm and record else None,
        ]
        for _ in range(count)
    ]
    return Call("forward", native._native.forward, {**arguments, "threads": draw.choice([1, 2, 3])})


class Attributes:
    """Has what `call` asks a layer for."""


def call_as_layer(weights: list[Any], **rest: Any) -> Any:
    layer, x, hx = Attributes(), rest.pop("x"), rest.pop("hx")
    rest["_flat_weights_names"] = [f"weight {k}" for k in range(len(weights))]
    rest["_parameters"] = dict(zip(rest["_flat_weights_names"], weights, strict=True))
    layer.__dict__.update(rest)
    return native._native.call(layer, x, tuple(hx) if isinstance(hx, list) else hx)


def call_call(draw: chance.Random, place: Callable[[Tensor], Tensor]) -> Call:
    cell, steps, batch = draw.randrange(4), draw.choice([0, 1, 1, 2, 5]), draw.choice([0, 1, 1, 2, 7])
    inputs, hidden, layers = draw.choice([1, 3, 17, 32]), draw.choice([1, 5, 33, 64]), draw.choice([1, 2, 3])
    both, bias, batch_first = (draw.random() < 0.5 for _ in range(3))
    number = lambda *shape: place(torch.randn(shape))  # noqa: E731
    rows, directions = GATES[cell] * hidden, 1 + both
    weights: list[Any] = []
    for k in range(layers):
        for _ in range(directions):
            weights += [number(rows, directions * hidden if k else inputs), number(rows, hidden)]
            weights += [number(rows), number(rows)] if bias else []
    state = lambda: number(layers * directions, batch, hidden)  # noqa: E731
    arguments = {
        "mode": ["RNN_TANH", "RNN_RELU", "LSTM", "GRU"][cell], "num_layers": layers, "input_size": inputs,
        "hidden_size": hidden, "bias": bias, "bidirectional": both, "batch_first": batch_first, "backend": "auto",
        "training": False, "dropout": 0.0, "recurrent_dropout": 0.0, "weights": weights,
        "x": number(batch, steps, inputs) if batch_first else number(steps, batch, inputs),
        "hx": None if draw.random() < 0.3 else [state(), state()] if cell == 2 else state(),
    }  # fmt: skip
    return Call("call", call_as_layer, arguments)


def backward_call(draw: chance.Random, place: Callable[[Tensor], Tensor]) -> Call:
    arguments = layer_arguments(draw, place)
    cell, steps, batch, symbols, inputs, hidden, count, looked_up = arguments.pop("sizes")
    with_packs(arguments, True, draw)
    lstm, rows = cell == 2, GATES[cell] * hidden
    number = lambda *shape: place(torch.randn(shape))  # noqa: E731
    wanted = lambda *shape: number(*shape) if draw.random() < 0.7 else None  # noqa: E731
    arguments["tapes"] = [
        [
            number(steps, batch, TAPE[cell] * hidden) if TAPE[cell] else None,
            number(steps, batch, hidden) if lstm else None,
        ]
        for _ in range(count)
    ]
    arguments["d_outputs"] = wanted(steps, batch, count * hidden)
    arguments["d_states"] = [
        [wanted(batch, hidden), wanted(batch, hidden) if lstm else None, wanted(steps, batch, hidden) if lstm else None]
        for _ in range(count)
    ]
    arguments["d_x"] = None if looked_up else wanted(steps, batch, inputs)
    arguments["results"] = [
        [
            number(batch, hidden),
            number(batch, hidden) if lstm else None,
            None if looked_up else wanted(rows, inputs),
            wanted(rows, hidden),
            None if looked_up else wanted(rows),
            wanted(rows),
            wanted(symbols, rows) if looked_up else None,
        ]
        for _ in range(count)
    ]
    arguments["block"], arguments["threads"] = draw.choice([1, 2, 4, 100]), draw.choice([1, 2, 3])
    return Call("backward", native._native.backward, arguments)


def pack_call(draw: chance.Random, place: Callable[[Tensor], Tensor]) -> Call:
    cell, hidden, inputs = draw.randrange(4), draw.choice([1, 5, 17, 70]), draw.choice([0, 1, 17])
    rows = GATES[cell] * hidden
    arguments = {
        "cell": cell,
        "bf16": draw.random() < 0.5,
        "backward": draw.random() < 0.5,
        "weight_ih": place(torch.randn(rows, inputs)) if inputs else None,
        "weight_hh": place(torch.randn(rows, hidden)),
        "threads": draw.choice([1, 2, 3]),
    }
    return Call("pack", native._native.pack, arguments)


def output_arguments(draw: chance.Random, place: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    rows, columns, terms = draw.choice([0, 1, 5, 40]), draw.choice([1, 3, 16, 67]), draw.choice([1, 2, 17, 33])
    return {
        "bf16": draw.random() < 0.5,
        "x": place(torch.randn(rows, terms)),
        "weight": place(torch.randn(columns, terms)),
        "bias": place(torch.randn(columns)) if draw.random() < 0.5 else None,
        "threads": draw.choice([1, 2, 3]),
    }


def linear_call(draw: chance.Random, place: Callable[[Tensor], Tensor]) -> Call:
    arguments = output_arguments(draw, place)
    arguments["pack"] = None
    if draw.random() < 0.5:
        arguments["pack"] = native._native.pack_linear(arguments["bf16"], arguments["weight"], 1)
    arguments["y"] = place(torch.randn(arguments["x"].shape[0], arguments["weight"].shape[0]))
    return Call("linear", native._native.linear, arguments)


def pack_linear_call(draw: chance.Random, place: Callable[[Tensor], Tensor]) -> Call:
    arguments = {key: t for key, t in output_arguments(draw, place).items() if key not in ("x", "bias")}
    return Call("pack_linear", native._native.pack_linear, arguments)


def large_pages_call(draw: chance.Random, place: Callable[[Tensor], Tensor]) -> Call:
    memory = place(torch.randn(draw.choice([0, 1, 40]), draw.choice([1, 9]), draw.choice([1, 300, 5000])))
    return Call("prefer_large_pages", native._native.prefer_large_pages, {"memory": memory})


def cross_entropy_call(draw: chance.Random, place: Callable[[Tensor], Tensor]) -> Call:
    arguments = output_arguments(draw, place)
    x, weight, bias = (arguments[key] for key in ("x", "weight", "bias"))
    arguments["targets"] = place(torch.randint(-1, weight.shape[0], (x.shape[0],)))
    wanted = draw.random() < 0.7
    for key, like in (("d_x", x), ("d_weight", weight), ("d_bias", bias)):
        arguments[key] = place(torch.randn(like.shape)) if wanted and like is not None else None
    return Call("cross_entropy", native._native.cross_entropy, arguments)


def writer_arguments(draw: chance.Random, place: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    cell, hidden, layers = draw.randrange(4), draw.choice([1, 5, 16, 33]), draw.choice([1, 2, 3])
    symbols, rows = draw.choice([1, 3, 67]), GATES[cell] * hidden
    return {
        "cell": cell,
        "bf16": draw.random() < 0.5,
        "table": place(torch.randn(symbols, rows)),
        "layers": [weights_of(draw, place, rows, hidden if k else None, hidden) for k in range(layers)],
        "output_weight": place(torch.randn(symbols, hidden)),
        "output_bias": place(torch.randn(symbols)) if draw.random() < 0.7 else None,
        "threads": draw.choice([1, 2, 3]),
    }


def writer_call(draw: chance.Random, place: Callable[[Tensor], Tensor]) -> Call:
    return Call("Writer", native._native.Writer, writer_arguments(draw, place))


def write_call(draw: chance.Random, place: Callable[[Tensor], Tensor]) -> Call:
    made = writer_arguments(draw, place)
    writer = Call("Writer", native._native.Writer, made)()
    layers, (symbols, _), hidden = len(made["layers"]), made["table"].shape, made["output_weight"].shape[1]
    window, count = draw.choice([1, 4]), draw.choice([0, 1, 9])
    barred = lambda: place(torch.rand(symbols) < 0.3) if draw.random() < 0.5 else None  # noqa: E731
    arguments = {
        "last": draw.randrange(symbols),
        "h": place(torch.randn(layers, hidden)),
        "c": place(torch.randn(layers, hidden)) if made["cell"] == 2 else None,
        "barred": barred(),
        "barred_first": barred(),
        "uniform": place(torch.rand(count, dtype=torch.float64)),
        "recent": place(torch.randint(symbols, (window,))),
        "recent_count": place(torch.randint(window + 1, (1,))),
        "written": place(torch.zeros(count, dtype=torch.int64)),
        "repetition_penalty": draw.choice([1.0, 1.3]),
        "temperature": draw.choice([0.0, 0.7, 1.0]),
        "top_k": draw.choice([0, 1, 5]),
        "top_p": draw.choice([1.0, 0.5]),
    }
    return Call("write", writer.write, arguments)


CALLS = (
    forward_call, call_call, backward_call, pack_call, linear_call, pack_linear_call, cross_entropy_call,
    writer_call, write_call,
)  # fmt: skip


# ------------------------------------------------------------------------------------------- their mutations


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all arguments, those in lists and the lists themselves too."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        found += places(part, (*path, key))
    return found


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


ODD_OBJECTS: list[Callable[[], Any]] = [
    lambda: None, object, lambda: "weights", lambda: b"0123456789abcdef", lambda: [1.0, 2.0], lambda: (), dict,
    lambda: torch.Tensor, lambda: torch, lambda: 3, lambda: -1, lambda: 1.5, lambda: math.nan, lambda: True,
    lambda: np.zeros((2, 3), np.float32), lambda: np.zeros(3, np.float16), lambda: np.array(["a"]),
    lambda: np.zeros((2, 3), np.float32)[::-1], lambda: torch.zeros(()), lambda: torch.zeros(1, 1, 1, 1, 1),
    lambda: torch.zeros(2, 3).to_sparse(), lambda: torch.zeros(2, 3, device="meta"),
    lambda: torch._efficientzerotensor((2, 3)), lambda: torch.zeros(2, 3, dtype=torch.complex64).conj(),
    lambda: FakeTensorMode(allow_non_fake_inputs=True).from_tensor(torch.zeros(2, 3)),
    lambda: torch.quantize_per_tensor(torch.zeros(2, 3), 0.1, 0, torch.qint8),
    lambda: memoryview(bytearray(24)), lambda: np.float32(1), lambda: np.int64(-1), lambda: 2**70,
]  # fmt: skip

ODD_INTEGERS = [
    -1, 0, 1, 2, 4, 5, 64, 1025, 2**31 - 1, 2**31, 2**32 + 1, 2**63 - 1, -(2**63), 2**63, 2**64, -(2**80),
]  # fmt: skip
ODD_FLOATS = [-1.0, 0.0, 1e-320, 1e-30, 1e308, math.inf, -math.inf, math.nan]


def is_plain(value: Any) -> bool:
    """Whether it is a tensor that was not made odd before, so that all can be done to it."""
    return type(value) is Tensor and value.device.type == "cpu" and value.layout == torch.strided and not (
        value.is_quantized or value._is_zerotensor() or value.requires_grad or value.is_complex())  # fmt: skip


def without_memory(tensor: Tensor) -> list[Any]:
    """Tensors of this shape and type that have no numbers, or whose numbers are not what they are."""
    fake = FakeTensorMode(allow_non_fake_inputs=True).from_tensor(tensor.detach().clone())
    return [fake, torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype), tensor.to("meta")]


def odd_tensor(draw: chance.Random, tensor: Tensor, others: list[Tensor]) -> Any:
    """Something like this tensor that is not quite it."""
    kind = draw.randrange(14)
    other = draw.choice(others)
    if kind == 0:
        return tensor.to(draw.choice([torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64,
                                      torch.uint8, torch.bool, torch.complex64]))  # fmt: skip
    if kind == 1 and tensor.dim():  # one more or one less
        dimension = draw.randrange(tensor.dim())
        return torch.cat([tensor, tensor.narrow(dimension, 0, min(1, tensor.shape[dimension]))], dimension)
    if kind == 2 and tensor.dim():
        dimension = draw.randrange(tensor.dim())
        return tensor.narrow(dimension, 0, max(tensor.shape[dimension] - 1, 0))
    if kind == 3:
        return draw.choice([tensor[None], tensor.flatten(), tensor.unsqueeze(-1), tensor.reshape(-1)[:1]])
    if kind == 4:
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor.repeat_interleave(2)[::2]
    if kind == 5:
        return tensor.flatten()[:1].expand(tensor.shape) if tensor.dim() and tensor.numel() else tensor
    if kind == 6:
        wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype) if tensor.dim() else tensor
        return wide[..., ::2] if tensor.dim() else wide
    if kind == 7:
        return other
    if kind == 8 and other.dtype == tensor.dtype and other.numel() >= tensor.numel():
        return other.flatten()[other.numel() - tensor.numel() :].view(tensor.shape)
    if kind == 9:
        return draw.choice(without_memory(tensor))
    if kind == 10:
        return torch.zeros([0] * tensor.dim(), dtype=tensor.dtype)
    if kind == 11:
        values = [-1, 2**31, 2**62, -(2**63), 2**63 - 1] if tensor.dtype == torch.int64 else [0, 1]
        odd = tensor.clone(memory_format=torch.contiguous_format)
        if tensor.dtype.is_floating_point:
            values = [math.nan, math.inf, -math.inf, 1e38, 1e-40]  # type: ignore[list-item]
        if odd.numel():
            odd.view(-1)[draw.randrange(odd.numel())] = draw.choice(values)
        return odd
    if kind == 12 and tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    return tensor.detach().clone().requires_grad_(tensor.dtype.is_floating_point)


def mutate(draw: chance.Random, call: Call) -> str:
    """Change one argument; what was changed."""
    path = draw.choice(places(call.arguments))
    container, key = at(call.arguments, path[:-1]), path[-1]
    value = container[key]
    tensors = [t for p in places(call.arguments) if is_plain(t := at(call.arguments, p))]
    if draw.random() < 0.15 or (isinstance(value, Tensor) and not is_plain(value)):
        new = draw.choice(ODD_OBJECTS)()
    elif isinstance(value, Tensor):
        new = odd_tensor(draw, value, tensors)
    elif isinstance(value, bool):
        new = draw.choice([not value, 2, None, "yes"])
    elif isinstance(value, int):
        new = draw.choice(ODD_INTEGERS)
    elif isinstance(value, float):
        new = draw.choice(ODD_FLOATS)
    elif isinstance(value, list):
        new = draw.choice([value[:-1], value * 2, [*value, None], [], [None] * len(value), value[::-1]])
    elif value is None and tensors:
        new = draw.choice(tensors)
    else:  # a pack of something else
        weight = torch.randn(8, 2)
        new = draw.choice(
            [native._native.pack_linear(False, weight, 1), native._native.pack(2, True, True, None, weight, 1)]
        )
    container[key] = new
    shown = f"{new.dtype} {list(new.shape)}" if isinstance(new, Tensor) else repr(new)[:80]
    return f"{call.name}{list(path)} = {type(new).__name__} {shown}"


def fuzz(seed: int, count: int) -> None:
    """Valid calls, each changed in one to three places."""
    draw = chance.Random(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    outcomes = {"worked": 0, "refused": 0}
    with open(os.environ["LOG"], "w", buffering=1) as log:
        for number in range(count):
            make = CALLS[number % len(CALLS)]
            call = make(draw, lambda t: t)
            changes = [mutate(draw, call) for _ in range(draw.choice([1, 1, 2, 3]))]
            log.write(f"seed {seed}, call {number}: {'; '.join(changes)}".replace("\n", " ") + "\n")
            try:
                call()
                outcomes["worked"] += 1
            except HARMLESS:
                outcomes["refused"] += 1
    # Both happen often, else the mutations are not worth much.
    assert min(outcomes.values()) > count / 10, outcomes


def unchanged(seed: int, count: int) -> None:
    """Valid calls on guarded memory: none is refused, none touches a byte beside its tensors."""
    draw = chance.Random(seed)
    torch.manual_seed(seed)
    with open(os.environ["LOG"], "w", buffering=1) as log:
        for number in range(count):
            at_the_end = number % 3 != 0
            call = CALLS[number % len(CALLS)](draw, lambda t: guarded(t, at_the_end))  # noqa: B023
            shapes = {key: list(t.shape) for key, t in call.arguments.items() if isinstance(t, Tensor)}
            log.write(f"seed {seed}, call {number}: {call.name} {shapes}, at the end: {at_the_end}\n")
            call()
            _regions.clear()
            del call
            gc.collect(0)


def seed() -> int:
    """The same in CI, another one at each run at home."""
    return 0 if os.environ.get("CI") == "true" else chance.randrange(10**6)


def test_every_call_works_or_is_refused(tmp_path: Path) -> None:
    """Thousands of calls with an argument or three that are wrong in shape, type, number, layout or value."""
    in_a_new_process(f"import test_native_safety; test_native_safety.fuzz({seed()}, 3000)", tmp_path / "log")


def test_a_plain_call_takes_the_short_way() -> None:
    """All sorts of layers and sizes: each is computed, and on torch's own kind of tensors."""
    draw = chance.Random(1)
    for _ in range(60):
        call = call_call(draw, lambda t: t)
        with torch.inference_mode(draw.random() < 0.5):
            outputs, states = call()
            assert outputs.is_inference() == torch.is_inference_mode_enabled()
        for t in (outputs, *(states if isinstance(states, tuple) else [states])):
            assert type(t) is Tensor
            assert t.dtype == torch.float32
            assert t.numel() * 4 <= t.untyped_storage().nbytes()
            assert t.untyped_storage().resizable()


@pytest.mark.parametrize("odd", ["a layer", 3, torch, torch.nn.Identity(), Attributes()], ids=str)
def test_what_is_no_drop_in_layer_is_left_to_the_caller(odd: Any) -> None:
    assert native._native.call(odd, torch.zeros(1, 1, 3), None) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guards pages with mprotect")
@pytest.mark.parametrize("name", [n for n, p in native.instruction_sets() if p in ("available", "in use")])
def test_no_byte_beside_a_tensor_is_touched(name: str, tmp_path: Path) -> None:
    """Neither read nor written: each tensor ends, or begins, at a page that must not be."""
    program = f"import test_native_safety; test_native_safety.unchanged({seed()}, 400)"
    in_a_new_process(program, tmp_path / "log", UNROLLED_ISA=name)


WITHOUT_MEMORY = """
    import os, torch
    from test_native_safety import HARMLESS, without_memory
    from unrolled import native, nn
    torch.manual_seed(0)
    for kind in ("RNN", "LSTM", "GRU"):
        layer, x = getattr(nn, kind)(5, 7, bidirectional=True), torch.zeros(6, 3, 5)
        expected = layer(x)[0]
        for number, odd in enumerate(without_memory(x)):
            for record in (True, False):
                open(os.environ["LOG"], "a").write(f"{kind} {number} {type(odd)} {record}\\n")
                with torch.set_grad_enabled(record):
                    try:
                        out = layer(odd)[0]
                    except HARMLESS:
                        pass
                    else:
                        assert type(out) is type(odd) or torch.equal(out, expected)
                        assert out.shape == (6, 3, 14)
    for odd in without_memory(torch.zeros(2, 3)):
        open(os.environ["LOG"], "a").write(f"linear {type(odd)}\\n")
        try:
            y = native.linear(odd, torch.zeros(4, 3), None)
        except HARMLESS:
            continue
        assert y.shape == (2, 4)
"""


def test_tensors_without_memory_are_no_crash(tmp_path: Path) -> None:
    """Fake tensors outside their mode, the zeros of torch's forward mode, the meta device: computed or refused."""
    in_a_new_process(WITHOUT_MEMORY, tmp_path / "log")


@pytest.mark.parametrize("odd", ["weights", b"0123456789ab", [[1.0, 2.0, 3.0]], object()])
def test_what_is_no_tensor_is_named(odd: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^x: expected a tensor, got "):
        native._native.linear(False, odd, torch.zeros(4, 3), None, None, torch.zeros(1, 4), 1)


def arguments(**changes: Any) -> dict[str, Any]:
    """Those of a small forward call of an lstm."""
    direction = (torch.zeros(8, 3), torch.zeros(8, 2), None, None, None, torch.zeros(4, 2), torch.zeros(4, 2), None)
    results = [(torch.zeros(4, 2), torch.zeros(4, 2), None, None)]
    usual = {
        "cell": 2, "bf16": False, "reverse": [False], "x": torch.zeros(5, 4, 3), "ids": None, "lengths": None,
        "directions": [direction], "packs": [], "outputs": torch.zeros(5, 4, 2), "results": results, "threads": 1,
    }  # fmt: skip
    return {**usual, **changes}


X = torch.zeros(5, 4, 3)
SHARED = torch.zeros(100)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"cell": 4}, "cell: expected 0 (rnn), 1 (rnn_relu), 2 (lstm) or 3 (gru), got 4"),
        ({"threads": 0}, "threads: expected 1..1024, got 0"),
        ({"directions": []}, "directions: expected 1 or 2, got 0"),
        ({"reverse": []}, "reverse: expected one value for each direction"),
        ({"x": None}, "expected either x or ids"),
        ({"ids": torch.zeros(5, 4, dtype=torch.int64)}, "expected either x or ids"),
        ({"directions": [(None,) * 7]}, "directions: expected tuples of 8, got 7"),
        ({"x": X.double()}, "x: expected float32, got another type (DLPack code 2, 64 bits)"),
        ({"x": X[0]}, "x: expected shape [any, any, any], got [4, 3]"),
        ({"x": X.mT.contiguous().mT}, "x: expected a last dimension without gaps, got stride 4"),
        ({"x": torch.zeros(5, 4, 2)}, "weight_ih: expected shape [8, 2], got [8, 3]"),
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, "lengths: expected shape [4], got [3]"),
        ({"lengths": torch.tensor([6, 0, 0, 0])}, "lengths: expected 0..5 (the number of steps), got 6"),
        ({"lengths": torch.tensor([0, 0, -1, 0])}, "lengths: expected 0..5 (the number of steps), got -1"),
        ({"outputs": torch.zeros(5, 4, 3)}, "outputs: expected shape [5, 4, 2], got [5, 4, 3]"),
        ({"outputs": torch.zeros(5, 2, 4).mT}, "outputs: expected a contiguous tensor, got strides that leave gaps"),
        ({"results": []}, "results: expected one tuple for each direction"),
        ({"results": [(None,) * 3]}, "results: expected tuples of 4, got 3"),
        (
            {"x": SHARED[:60].view(5, 4, 3), "outputs": SHARED[59:99].view(5, 4, 2)},
            "outputs and x: expected separate memory, got tensors that overlap",
        ),
        (
            {"results": [(SHARED[:8].view(4, 2), SHARED[7:15].view(4, 2), None, None)]},
            "h_n and c_n: expected separate memory, got tensors that overlap",
        ),
        (
            {"results": [(torch.zeros(4, 2), torch.zeros(4, 2), torch.zeros(5, 4, 8), None)]},
            "c: expected a tensor beside the tape, got None",
        ),
        (
            {"packs": "other"},
            "packs: expected a pack of these weights, got one of another cell, size, precision or instruction set",
        ),
    ],
)
def test_a_wrong_argument_is_named(changes: dict[str, Any], message: str) -> None:
    if "packs" in changes:
        changes = {"packs": [native._native.pack(3, False, False, torch.zeros(6, 3), torch.zeros(6, 2), 1)]}
    native._native.forward(**arguments())
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        native._native.forward(**arguments(**changes))
    assert str(caught.value) == message


def test_a_block_beyond_all_steps_is_the_whole_sequence() -> None:
    """However large the number is."""
    x = torch.randn(5, 4, 3)
    weights = [torch.randn(8, 3), torch.randn(8, 2), torch.randn(8), torch.randn(8)]
    state = [torch.randn(4, 2), torch.randn(4, 2)]
    direction = native.Direction(*weights, *state, None, reverse=False)
    run, tape = native.forward_into("lstm", x, [direction], None, bf16=False, record=True)
    found = []
    for block in (5, 6, 2**31, 2**62, 2**63 - 1):
        into = native.Gradients(*(torch.zeros_like(t) for t in weights))
        d_x = torch.empty_like(x)
        d_h0, d_c0 = native.backward_into(
            "lstm", x, [direction], None, run.outputs, tape, run.cs, run.outputs, None, None, None, [into], d_x,
            bf16=False, block=block,
        )  # fmt: skip
        found.append([*into, d_x, d_h0, d_c0])
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            assert torch.equal(a, b)  # type: ignore[arg-type]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts page faults as Linux does")
def test_a_large_tape_lies_on_large_pages(tmp_path: Path) -> None:
    """Tens of megabytes are fresh memory at every call: on small pages the tape's 50 MB cost 12,800 faults at least. On
    large ones there were 900, most of them for what is no tape."""
    in_a_new_process(
        """
        import pathlib, resource, torch
        from unrolled.nn import GRU
        faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.set_num_threads(1)
        layer, x = GRU(256, 512), torch.zeros(100, 64, 256)
        before = faults()
        outputs, _ = layer(x)
        had = faults() - before
        told = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
        on = told.exists() and "[never]" not in told.read_text()
        assert had < 6000 or not on, f"{had} page faults"
        """,
        tmp_path / "log",
    )
