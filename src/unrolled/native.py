"""The native kernels: the only module that imports the extension `unrolled._native`.

A layer (one cell in one or both directions over a whole sequence) is one call forward and one call backward, for
float32 on the CPU; under `torch.autocast("cpu", dtype=torch.bfloat16)` the operands of its products are bfloat16 and
everything else stays float32. The contract is in src/native/kernels.h, the equations in `unrolled.cells` and
`unrolled.tape`.

Where the caller is traced (`torch.compile`, `torch.export`, a dispatch mode) the call goes through operators of
`torch.library`: `unrolled::layer`, `unrolled::linear`, `unrolled::cross_entropy`. Elsewhere the same functions are
recorded by autograd without the operators' detour, and where no gradient is wanted the kernels are called directly,
which is what makes a single step short.

Weights are laid out anew for the kernels at each call (a small share of its work, and where there are few rows it is
done on the way), so that no change of a weight, by whatever means, is ever missed. `pack` does it once for the many
calls of one pass, forward or backward, and `Frozen` keeps a copy, because it was asked to.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias
from urllib.parse import unquote, urlsplit

import torch
import torch.nn.functional as F
from torch import Tensor

from unrolled.errors import ConfigError

if TYPE_CHECKING:
    from types import ModuleType

    from jaxtyping import Bool, Float, Int

__all__ = [
    "Direction",
    "Frozen",
    "Gradients",
    "Layer",
    "Writer",
    "backward_into",
    "call",
    "cross_entropy",
    "forward_into",
    "freeze",
    "instruction_sets",
    "layer",
    "linear",
    "new_whole",
    "pack",
    "peak",
    "plain",
    "recurrence_only",
    "release_scratch",
    "scratch_held",
    "set_block_steps",
    "set_reference",
    "stack",
    "threads",
    "unstack",
    "unsuited",
    "why_absent",
]

CELLS = {"rnn": 0, "rnn_relu": 1, "lstm": 2, "gru": 3}
"""The kernels' numbers of the built-in equations."""

_GATES = {"rnn": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
_TAPE_GATES = {"rnn": 0, "rnn_relu": 0, "lstm": 4, "gru": 4}


# ------------------------------------------------------------------------------------------------ the extension


def _load() -> ModuleType | None:
    try:
        extension = importlib.import_module("unrolled._native")
    except ImportError:
        return None
    wanted = os.environ.get("UNROLLED_ISA")
    if wanted:
        try:
            extension.use_instruction_set(wanted)
        except ValueError as error:
            raise ConfigError(f"UNROLLED_ISA: {error}") from None
    _share_threads(extension)
    return extension


def _share_threads(extension: ModuleType) -> None:
    """Have the kernels run on the threads of torch's own OpenMP runtime, where it can be found."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    runtimes = sorted(p for p in paths if Path(p).name.startswith(("libgomp", "libomp", "libiomp")))
    # With several it cannot be told which one is torch's, but for the one that lies beside torch.
    beside = [p for p in runtimes if Path(p).is_relative_to(Path(torch.__file__).parent)] or runtimes
    if len(beside) == 1:
        extension.share_openmp(beside[0])


_native: Any = _load()


def instruction_sets() -> list[tuple[str, str]]:
    """(name, presence) of each, slowest first; presence: "in use", "available", "not on this processor", "not built".

    Empty without the extension.
    """
    return [] if _native is None else list(_native.instruction_sets())


def threads() -> str:
    """Which threads the kernels run on, in words."""
    return "none" if _native is None else str(_native.describe_threads())


def peak(bf16: bool, threads: int, seconds: float) -> float:
    """FLOP/s of a loop that multiplies and adds in registers and does nothing else: this machine's limit."""
    return float(_native.peak(bf16, threads, seconds))


def scratch_held() -> int:
    """Bytes of scratch memory that the kernels use or keep for the next call."""
    return 0 if _native is None else int(_native.scratch_held())


def release_scratch() -> None:
    """Give the scratch memory that is kept for the next call back to the system."""
    if _native is not None:
        _native.release_scratch()


def unsuited(weight: Tensor, name: str | None = None) -> str | None:
    """None if the kernels can work with weights like this one here, else the reason why not. name: of the equation."""
    if _native is None:
        return f"the native kernels are not there: {why_absent()}"
    if name is not None and name not in CELLS:
        return f"the equation {name!r} is not a built-in one"
    if weight.device.type != "cpu":
        return f"the weights are on {weight.device.type}"
    if weight.dtype != torch.float32:
        return f"the weights are {str(weight.dtype).removeprefix('torch.')}, and the native kernels take float32"
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return "autocast is on for another dtype than bfloat16"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    return None


def _bf16() -> bool:
    return torch.is_autocast_enabled("cpu")


def plain() -> bool:
    """Whether tensors are what they seem: no tracing, no dispatch mode between the call and the memory."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0


# --------------------------------------------------------------------------------------------------- a layer


class Direction(NamedTuple):
    """What one direction of a layer computes with.

    Shapes: source: W_ih `[G*H I]`, or, if inputs are looked up, the table `[V G*H]` of what each symbol contributes,
    `W_ih e + b_ih`; hh `[G*H H]`; bias_ih (not with a table) and bias_hh `[G*H]` or None; h0 and, for an lstm, c0
    `[B H]`; reset bool `[T B]` or None.
    """

    source: Tensor
    hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    h0: Tensor
    c0: Tensor | None
    reset: Bool[Tensor, "T B"] | None
    reverse: bool


class Layer(NamedTuple):
    """What a layer gives. outputs `[T B D*H]`, zero at padding; h, c: after each row's last step, `[D B H]`, c only for
    an lstm; cs: c after every step `[D T B H]`, undefined at padding, or None if not asked for."""

    outputs: Tensor
    h: Tensor
    c: Tensor | None
    cs: Tensor | None


def layer(
    name: str,
    inputs: Float[Tensor, "T B I"] | Int[Tensor, "T B"],
    directions: Sequence[Direction],
    *,
    lengths: Int[Tensor, "B"] | None = None,
    block: int,
    all_states: bool = False,
    packs: Sequence[Any] = (),
) -> Layer:
    """One or two directions of the built-in equation `name` over a sequence.

    Args:
        inputs: vectors, or int64 ids of rows of the directions' tables.
        lengths: int64 on the CPU, 0..T; None: all rows have T steps.
        block: steps in a block of the weights' gradients, see `unrolled.budget`; 0 while a graph is traced, whose sizes
            are not known yet: `set_block_steps` says what it then is.
        all_states: return every c of an lstm too.
        packs: what `Frozen` keeps, one for each direction.

    Raises:
        ValueError: a tensor of another type or shape, a length or id out of its range. The message names it.
    """
    tensors = [inputs]
    for d in directions:
        tensors += [t for t in (d.source, d.hh, d.bias_ih, d.bias_hh, d.h0, d.c0) if t is not None]
    record = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    # Unrecorded, and on memory: no operator's detour.
    if not record and plain():
        return forward_into(
            name, inputs, directions, lengths, bf16=_bf16(), packs=packs, cs=all_states and name == "lstm"
        )[0]
    bf16 = _bf16()
    looked_up = inputs.dtype == torch.int64
    one, two = directions[0], directions[1] if len(directions) == 2 else None
    states = [stack([getattr(d, k) for d in directions]) if getattr(one, k) is not None else None for k in ("h0", "c0")]
    with torch.autocast("cpu", enabled=False):
        outputs, h, c, _, cs = (_layer_recorded if plain() else _layer_op)(
            None if looked_up else inputs.float(),
            inputs if looked_up else None,
            states[0].float(),  # type: ignore[union-attr]
            None if states[1] is None else states[1].float(),
            lengths,
            one.reset,
            None if two is None else two.reset,
            one.source,
            one.hh,
            one.bias_ih,
            one.bias_hh,
            None if two is None else two.source,
            None if two is None else two.hh,
            None if two is None else two.bias_ih,
            None if two is None else two.bias_hh,
            name,
            "both" if two is not None else "reverse" if one.reverse else "forward",
            bf16,
            record,
            block,
        )
    lstm = name == "lstm"
    return Layer(outputs, h, c if lstm else None, cs if lstm and all_states else None)


def stack(parts: Sequence[Tensor]) -> Tensor:
    """`torch.stack`. A single part is not copied: to a small layer's call its states' copies are a percent each."""
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(tuple(parts))


def unstack(whole: Tensor) -> tuple[Tensor, ...]:
    """The parts that `stack` put together; of a single one even the gradient is no copy."""
    return (whole.squeeze(0),) if whole.shape[0] == 1 else tuple(whole[k] for k in range(whole.shape[0]))


def _recorded(run: Any, save: Any, gradient: Any) -> Any:
    """`run` as autograd records it without an operator's detour through the dispatcher, which takes as long as a small
    layer computes. For where nobody looks at what is called; the arguments are those of the operator."""

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            found = run(*arguments)
            save(ctx, arguments, found)
            return found

        backward = staticmethod(gradient)

    return Recorded.apply


def _new(*shape: int) -> Tensor:
    """Memory for the kernels to write: float32 on the CPU, whatever the caller's defaults are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def new_whole(steps: int, batch: int, size: int) -> Tensor:
    """Memory `[T B size]` for what several calls of the kernels write piece by piece, on large pages where the system
    has them; for what one call writes as a whole, that call sees to it."""
    memory = _new(steps, batch, size)
    if _native is not None:
        _native.prefer_large_pages(memory)
    return memory


def _ready(x: Tensor) -> Tensor:
    """A tensor as the kernels read it: float32, not kept negated, last dimension without gaps."""
    x = x.resolve_neg()
    if x.dtype != torch.float32:
        x = x.float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _dense(x: Tensor) -> Tensor:
    x = x.resolve_neg()
    return x.contiguous() if x.dtype == torch.float32 else x.float().contiguous()


def _arguments(d: Direction, looked_up: bool) -> tuple[Tensor | None, ...]:
    return (
        None if looked_up else d.source.contiguous(),
        d.hh.contiguous(),
        None if d.bias_ih is None or looked_up else d.bias_ih.contiguous(),
        None if d.bias_hh is None else d.bias_hh.contiguous(),
        d.source.contiguous() if looked_up else None,
        _dense(d.h0),
        None if d.c0 is None else _dense(d.c0),
        None if d.reset is None else d.reset.contiguous(),
    )


def call(layer: torch.nn.Module, x: Any, hx: Any) -> tuple[Tensor, Any] | None:
    """What a drop-in layer's own call returns, for a dense float32 batch whose gradient nobody asks for; None where
    that does not hold, or something is wrong: the caller must see to it. Not while a graph is traced.

    The layer is asked for its weights, by name, as they are now. In C++: one step of one row is a few microseconds of
    arithmetic, and in Python each look at a tensor takes as long as a thousand multiplications.
    """
    return None


if _native is not None:
    call = _native.call


def forward_into(
    name: str,
    inputs: Tensor,
    directions: Sequence[Direction],
    lengths: Tensor | None,
    *,
    bf16: bool,
    record: bool = False,
    cs: bool = False,
    packs: Sequence[Any] = (),
    outputs: Tensor | None = None,
    tape: Tensor | None = None,
) -> tuple[Layer, Tensor | None]:
    """The kernels' forward, without autograd: the layer, and its tape `[D T B tape_gates*H]` if `record`.

    outputs, tape: memory for outputs `[T B D*H]` and tape to write to; new memory if None. cs: whether to return every
    c (a tape has them).
    """
    looked_up = inputs.dtype == torch.int64
    steps, batch = inputs.shape[:2]
    count, hidden = len(directions), directions[0].hh.shape[1]
    lstm = name == "lstm"
    empty = _new
    if outputs is None:
        outputs = empty(steps, batch, count * hidden)
    h = empty(count, batch, hidden)
    c = empty(count, batch, hidden) if lstm else None
    gates = _TAPE_GATES[name]
    if tape is None and record and gates:
        tape = empty(count, steps, batch, gates * hidden)
    every = empty(count, steps, batch, hidden) if lstm and (record or cs) else None
    _native.forward(
        CELLS[name],
        bf16,
        [d.reverse for d in directions],
        None if looked_up else _ready(inputs),
        inputs.contiguous() if looked_up else None,
        lengths,
        [_arguments(d, looked_up) for d in directions],
        packs,
        outputs,
        [
            (
                h[d],
                None if c is None else c[d],
                None if tape is None else tape[d],
                None if every is None else every[d],
            )
            for d in range(count)
        ],
        torch.get_num_threads(),
    )
    return Layer(outputs, h, c, every), tape


class Gradients(NamedTuple):
    """Where a direction's gradients go: source, hh and biases are added to, None is not wanted."""

    source: Tensor | None
    hh: Tensor | None
    bias_ih: Tensor | None
    bias_hh: Tensor | None


def backward_into(
    name: str,
    inputs: Tensor,
    directions: Sequence[Direction],
    lengths: Tensor | None,
    outputs: Tensor,
    tape: Tensor | None,
    cs: Tensor | None,
    d_outputs: Tensor | None,
    d_h: Tensor | None,
    d_c: Tensor | None,
    d_cs: Tensor | None,
    into: Sequence[Gradients],
    d_x: Tensor | None,
    *,
    bf16: bool,
    block: int,
    packs: Sequence[Any] = (),
) -> tuple[Tensor, Tensor | None]:
    """The kernels' backward: writes d_x `[T B I]`, adds to `into`; returns d(h0), d(c0) `[D B H]`.

    outputs, tape, cs: what `forward_into` gave. d_outputs `[T B D*H]`, d_h, d_c `[D B H]`, d_cs `[D T B H]`; None is
    zero.
    """
    looked_up = inputs.dtype == torch.int64
    count = len(directions)
    _, batch = inputs.shape[:2]
    hidden = directions[0].hh.shape[1]
    d_h0 = _new(count, batch, hidden)
    d_c0 = _new(count, batch, hidden) if name == "lstm" else None

    def part(t: Tensor | None, d: int) -> Tensor | None:
        return None if t is None else _dense(t[d])

    _native.backward(
        CELLS[name],
        bf16,
        [d.reverse for d in directions],
        None if looked_up else _ready(inputs),
        inputs.contiguous() if looked_up else None,
        lengths,
        [_arguments(d, looked_up) for d in directions],
        packs,
        outputs,
        [(None if tape is None else tape[d], None if cs is None else cs[d]) for d in range(count)],
        None if d_outputs is None else _ready(d_outputs),
        [(part(d_h, d), part(d_c, d), part(d_cs, d)) for d in range(count)],
        d_x,
        [
            (
                d_h0[d],
                None if d_c0 is None else d_c0[d],
                None if looked_up else g.source,
                g.hh,
                None if looked_up else g.bias_ih,
                g.bias_hh,
                g.source if looked_up else None,
            )
            for d, g in enumerate(into)
        ],
        block,
        torch.get_num_threads(),
    )
    return d_h0, d_c0


# ---------------------------------------------------------------------------------------- torch's operators

_INPUTS = (
    "Tensor? x, Tensor? ids, Tensor h0, Tensor? c0, Tensor? lengths, Tensor? reset, Tensor? reset_reverse, "
    "Tensor source, Tensor hh, Tensor? bias_ih, Tensor? bias_hh, Tensor? source_reverse, Tensor? hh_reverse, "
    "Tensor? bias_ih_reverse, Tensor? bias_hh_reverse, str cell, str direction, bool bf16"
)
_TENSORS = 15  # of them tensors


def _split(arguments: Sequence[Any]) -> tuple[Tensor, list[Direction]]:
    """(x or ids, the directions) from an operator's arguments."""
    x, ids, h0, c0, _, reset, reset_reverse, *weights = arguments[:_TENSORS]
    direction = arguments[_TENSORS + 1]
    directions = []
    for d in range(2 if direction == "both" else 1):
        source, hh, bias_ih, bias_hh = weights[4 * d : 4 * d + 4]
        directions.append(
            Direction(
                source,
                hh,
                bias_ih,
                bias_hh,
                h0[d],
                None if c0 is None else c0[d],
                reset_reverse if d else reset,
                reverse=d == 1 or direction == "reverse",
            )
        )
    return (x if ids is None else ids), directions


def _layer_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    name, bf16, record = arguments[_TENSORS], arguments[_TENSORS + 2], arguments[_TENSORS + 3]
    inputs, directions = _split(arguments)
    with torch.no_grad():
        run, tape = forward_into(name, inputs, directions, arguments[4], bf16=bf16, record=record, cs=True)
    absent = [_new(0) if t is None else t for t in (run.c, tape, run.cs)]
    return run.outputs, run.h, absent[0], absent[1], absent[2]


_layer_op = torch.library.custom_op(
    "unrolled::layer",
    _layer_forward,
    mutates_args=(),
    device_types="cpu",
    schema=f"({_INPUTS}, bool record, int block) -> (Tensor outputs, Tensor h, Tensor c, Tensor tape, Tensor cs)",
)


@_layer_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    name, record = arguments[_TENSORS], arguments[_TENSORS + 3]
    inputs, directions = _split(arguments)
    steps, batch = inputs.shape[:2]
    count, hidden = len(directions), directions[0].hh.shape[1]
    new = directions[0].hh.new_empty
    lstm, gates = name == "lstm", _TAPE_GATES[name]
    return (
        new(steps, batch, count * hidden),
        new(count, batch, hidden),
        new(count, batch, hidden) if lstm else new(0),
        new(count, steps, batch, gates * hidden) if record and gates else new(0),
        new(count, steps, batch, hidden) if lstm else new(0),
    )


def _layer_backward(*arguments: Any) -> list[Tensor]:
    """Gradients of x, h0, c0 and then of the eight weights; an empty tensor where there is none."""
    name, bf16, block = arguments[_TENSORS], arguments[_TENSORS + 2], arguments[_TENSORS + 3]
    outputs, tape, cs, d_outputs, d_h, d_c, d_cs, needs = arguments[_TENSORS + 4 :]
    if name != "lstm":
        d_c = d_cs = None
    inputs, directions = _split(arguments)
    weights = arguments[7:_TENSORS]
    block = block or _block_steps(*inputs.shape[:2])
    with torch.no_grad():
        grads = [torch.zeros_like(w, memory_format=torch.contiguous_format) if n else None
                 for w, n in zip(weights, needs[7:], strict=True)]  # fmt: skip
        d_x = _new(*inputs.shape) if needs[0] else None
        d_h0, d_c0 = backward_into(
            name,
            inputs,
            directions,
            arguments[4],
            outputs,
            tape if tape.numel() or (inputs.numel() == 0 and _TAPE_GATES[name]) else None,
            cs if name == "lstm" else None,
            d_outputs,
            d_h,
            d_c,
            d_cs,
            [Gradients(*grads[4 * d : 4 * d + 4]) for d in range(len(directions))],
            d_x,
            bf16=bf16,
            block=block,
        )
    return [_new(0) if t is None else t for t in (d_x, d_h0, d_c0, *grads)]


_layer_backward_op = torch.library.custom_op(
    "unrolled::layer_backward",
    _layer_backward,
    mutates_args=(),
    device_types="cpu",
    schema=f"({_INPUTS}, int block, Tensor outputs, Tensor tape, Tensor cs, Tensor? d_outputs, Tensor? d_h, "
    "Tensor? d_c, Tensor? d_cs, bool[] needs) -> Tensor[]",
)


@_layer_backward_op.register_fake
def _(*arguments: Any) -> list[Tensor]:
    needs = arguments[-1]
    inputs, _ = _split(arguments)
    h0, c0, weights = arguments[2], arguments[3], arguments[7:_TENSORS]
    new = h0.new_empty
    return [
        new(inputs.shape) if needs[0] else new(0),
        new(h0.shape),
        new(0) if c0 is None else new(c0.shape),
        *(new(w.shape) if n else new(0) for w, n in zip(weights, needs[7:], strict=True)),
    ]


def _save_layer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    outputs, _, _, tape, cs = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_TENSORS], outputs, tape, cs)
    ctx.plain, ctx.block = inputs[_TENSORS : _TENSORS + 3], inputs[_TENSORS + 4]
    # Of another cell than the lstm c and cs are empty.
    ctx.mark_non_differentiable(tape, *(() if inputs[_TENSORS] == "lstm" else (output[2], cs)))


def _layer_gradient(
    ctx: Any, d_outputs: Tensor | None, d_h: Tensor | None, d_c: Tensor | None, _: Any, d_cs: Tensor | None
) -> tuple[Any, ...]:
    *tensors, outputs, tape, cs = ctx.saved_tensors
    needs = [bool(n) and t is not None for n, t in zip(ctx.needs_input_grad[:_TENSORS], tensors, strict=True)]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # A second derivative may be wanted: the reference path's gradient has a history of its own.
        return _reference_gradient(ctx.plain, tensors, needs, (d_outputs, d_h, d_c, d_cs))
    d_x, d_h0, d_c0, *d_weights = (_layer_backward if plain() else _layer_backward_op)(
        *tensors, *ctx.plain, ctx.block, outputs, tape, cs, d_outputs, d_h, d_c, d_cs, needs
    )
    found = [d_x, None, d_h0, d_c0, None, None, None, *d_weights]
    return (*(g if n else None for g, n in zip(found, needs, strict=True)), *[None] * 5)


def _reference_gradient(
    plain: Sequence[Any], tensors: Sequence[Tensor | None], needs: Sequence[bool], grads: Sequence[Tensor | None]
) -> tuple[Any, ...]:
    """The same gradient from the equations in torch's own operations, recorded by autograd.

    The loop over the steps stands a floor above; it is handed down by `set_reference` so that imports go one way.
    """
    if _reference is None:
        raise RuntimeError("unrolled.unroll hands the reference path down when it is imported")
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        # Stand-ins: a tensor that comes in twice, or was computed from another that comes in, has its own share only.
        tensors = [t.view_as(t) if n and t is not None else t for t, n in zip(tensors, needs, strict=True)]
        wanted = [t for t, n in zip(tensors, needs, strict=True) if n and t is not None]
        inputs, directions = _split([*tensors, *plain])
        outputs = _reference(plain[0], inputs, directions, tensors[4])
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o is not None and g is not None]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True
            )
        )
    return (*(next(found) if n else None for n in needs), *[None] * 5)


_reference: Any = None
_block_steps: Any = None


def set_block_steps(block_steps: Any) -> None:
    """`block_steps(T, B) -> steps`, from a floor above."""
    global _block_steps
    _block_steps = block_steps


def set_reference(reference: Any) -> None:
    """`reference(name, inputs, directions, lengths) -> (outputs, h, c, cs)`, differentiable any number of times."""
    global _reference
    _reference = reference


_layer_op.register_autograd(_layer_gradient, setup_context=_save_layer)


_layer_recorded = _recorded(_layer_forward, _save_layer, _layer_gradient)


# -------------------------------------------------------------------------------------------- the output side


def linear(x: Float[Tensor, "... K"], weight: Float[Tensor, "N K"], bias: Float[Tensor, "N"] | None) -> Tensor:
    """`x W^T + b`, `[... N]`, in float32: a row's bits do not depend on the other rows, nor on the number of threads.

    Under bfloat16 autocast the operands are rounded to bfloat16. Differentiable.
    """
    flat = x.reshape(-1, x.shape[-1]).float()
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    bf16 = _bf16()
    if not grad and plain():
        y = _linear(flat, weight, bias, bf16)
    else:
        with torch.autocast("cpu", enabled=False):
            y = (_linear_recorded if plain() else _linear_op)(flat, weight, bias, bf16)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, bf16: bool) -> Tensor:
    y = _new(x.shape[0], weight.shape[0])
    _native.linear(
        bf16,
        _ready(x),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        None,
        y,
        torch.get_num_threads(),
    )
    return y


@torch.library.custom_op(
    "unrolled::linear",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor weight, Tensor? bias, bool bf16) -> Tensor",
)
def _linear_op(x: Tensor, weight: Tensor, bias: Tensor | None, bf16: bool) -> Tensor:
    with torch.no_grad():
        return _linear(x, weight, bias, bf16)


@_linear_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, bf16: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.bf16 = inputs
    ctx.save_for_backward(x, weight)


def _linear_gradient(ctx: Any, d_y: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    with torch.autocast("cpu", torch.bfloat16, enabled=ctx.bf16):
        d_x = (d_y @ weight).to(x.dtype) if needs[0] else None
        d_weight = (d_y.t() @ x).to(weight.dtype) if needs[1] else None
    return d_x, d_weight, d_y.sum(0) if needs[2] else None, None


_linear_op.register_autograd(_linear_gradient, setup_context=_save_linear)
_linear_recorded = _recorded(_linear, _save_linear, _linear_gradient)


def cross_entropy(
    x: Float[Tensor, "M K"], weight: Float[Tensor, "N K"], bias: Float[Tensor, "N"] | None, targets: Int[Tensor, "M"]
) -> Float[Tensor, ""]:
    """The summed softmax cross-entropy, in nats, of the scores `x W^T + b`; a row with a negative target is not counted
    and may hold anything.

    The scores of a block of rows at a time, never `[M N]`: where a gradient is wanted it is taken from the same block,
    so that what waits for the backward is d(x), d(W) and d(b). Under bfloat16 autocast operands are rounded to it.

    Raises:
        ValueError: a target of N or more.
    """
    needs = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    bf16 = _bf16()
    with torch.autocast("cpu", enabled=False):
        run = _cross_entropy_recorded if plain() else _cross_entropy_op
        loss: Tensor = run(x.float(), weight, bias, targets, bf16, needs)[0]
    return loss


def _cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, bf16: bool, gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.no_grad():
        new = torch.empty_like if len(x) else torch.zeros_like  # without rows the kernels have nothing to write
        d_x, d_weight, d_bias = (
            None if t is None or not gradient else new(t, memory_format=torch.contiguous_format)
            for t in (x, weight, bias)
        )
        loss = _native.cross_entropy(
            bf16,
            _ready(x),
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            targets.contiguous(),
            d_x,
            d_weight,
            d_bias,
            torch.get_num_threads(),
        )
        absent = [_new(0) if t is None else t for t in (d_x, d_weight, d_bias)]
        return torch.tensor(loss, dtype=torch.float32, device="cpu"), absent[0], absent[1], absent[2]


_cross_entropy_op = torch.library.custom_op(
    "unrolled::cross_entropy",
    _cross_entropy,
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor targets, bool bf16, bool gradient) "
    "-> (Tensor loss, Tensor d_x, Tensor d_weight, Tensor d_bias)",
)


@_cross_entropy_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, bf16: bool, gradient: bool
) -> tuple[Tensor, ...]:
    return x.new_empty(()), *(
        x.new_empty(0) if t is None or not gradient else torch.empty_like(t) for t in (x, weight, bias)
    )


def _save_cross_entropy(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, targets, _, _ = inputs
    _, d_x, d_weight, d_bias = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(d_x, d_weight, d_bias)
    ctx.save_for_backward(x, weight, bias, targets, d_x, d_weight, d_bias)


def _cross_entropy_gradient(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    x, weight, bias, targets, d_x, d_weight, d_bias = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if d_loss is None:
        return (None,) * 6
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            x, weight = x.view_as(x), weight.view_as(weight)
            bias = None if bias is None else bias.view_as(bias)
            wanted = [t for t, n in zip((x, weight, bias), needs, strict=False) if n and t is not None]
            counted = targets >= 0
            loss = F.cross_entropy(F.linear(x[counted], weight, bias), targets[counted], reduction="sum")
            found = iter(torch.autograd.grad(loss, wanted, d_loss, create_graph=True))
        given = zip((x, weight, bias), needs, strict=False)
        return (*(next(found) if n and t is not None else None for t, n in given), None, None, None)
    grads = (d * d_loss if n and d.numel() else None for d, n in zip((d_x, d_weight, d_bias), needs, strict=False))
    return (*grads, None, None, None)


_cross_entropy_op.register_autograd(_cross_entropy_gradient, setup_context=_save_cross_entropy)
_cross_entropy_recorded = _recorded(_cross_entropy, _save_cross_entropy, _cross_entropy_gradient)


# ------------------------------------------------------------------------------------------------ kept copies


_Four: TypeAlias = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


class Frozen(NamedTuple):
    """Weights laid out once and kept: what `freeze` gives. A later change of the weights does not reach it."""

    name: str
    bf16: bool
    directions: tuple[_Four, ...]
    packs: tuple[Any, ...]


def pack(name: str, ih: Tensor | None, hh: Tensor, *, bf16: bool, backward: bool) -> Any:
    """A direction's weights laid out for `forward_into` or `backward_into`; ih: None if inputs are looked up.

    A copy, which a later change of the weights does not reach: it must not outlive the pass that it is made for.
    """
    return _native.pack(
        CELLS[name], bf16, backward, None if ih is None else ih.contiguous(), hh.contiguous(), torch.get_num_threads()
    )


def freeze(name: str, directions: Sequence[_Four], bf16: bool) -> Frozen:
    """Copies of each direction's (W_ih, W_hh, b_ih, b_hh), laid out for the kernels.

    The copy is what is used from then on, whatever becomes of the weights.
    """

    def copy(bias: Tensor | None) -> Tensor | None:
        return None if bias is None else bias.detach().clone()

    kept = tuple((ih.detach().clone(), hh.detach().clone(), copy(b), copy(c)) for ih, hh, b, c in directions)
    packs = tuple(pack(name, ih, hh, bf16=bf16, backward=False) for ih, hh, _, _ in kept)
    return Frozen(name, bf16, kept, packs)


class Writer:
    """A language model held still for writing: its weights laid out once, a whole step without Python in between.

    Args:
        name: the cell's.
        table: `[V G*H]`, what each symbol contributes to the first layer, b_ih included.
        layers: (W_ih, W_hh, b_ih, b_hh) of each; the first one's W_ih and b_ih are in the table.
        output_weight, output_bias: `[V H]`, `[V]` or None.
        bf16: operands of the products in bfloat16.
    """

    def __init__(
        self,
        name: str,
        table: Tensor,
        layers: Sequence[_Four],
        output_weight: Tensor,
        output_bias: Tensor | None,
        *,
        bf16: bool = False,
    ) -> None:
        def flat(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().contiguous()

        self._kept = [tuple(flat(t) for t in weights) for weights in layers]
        self._writer = _native.Writer(
            CELLS[name],
            bf16,
            flat(table),
            self._kept,
            flat(output_weight),
            flat(output_bias),
            torch.get_num_threads(),
        )

    def write(
        self,
        last: int,
        h: Float[Tensor, "layers H"],
        c: Float[Tensor, "layers H"] | None,
        uniform: Float[Tensor, "count"],
        recent: Int[Tensor, "window"],
        recent_count: Int[Tensor, "1"],
        *,
        barred: Bool[Tensor, "V"] | None,
        barred_first: Bool[Tensor, "V"] | None,
        repetition_penalty: float,
        temperature: float,
        top_k: int,
        top_p: float,
    ) -> Int[Tensor, "count"]:
        """Read `last`, then write as many symbols as `uniform` (float64 in [0, 1)) has numbers, each but the last one
        read in turn. h, c, recent and recent_count are taken on in place.

        The choice is that of `unrolled.decoding.Sampling` (top_k 0 and top_p 1: no limit).
        """
        written = torch.empty(uniform.shape[0], dtype=torch.int64, device="cpu")
        self._writer.write(
            last,
            h,
            c,
            barred,
            barred_first,
            uniform,
            recent,
            recent_count,
            written,
            repetition_penalty,
            temperature,
            top_k,
            top_p,
        )
        return written


def recurrence_only(name: str, steps: int, batch: int, hidden: int, bf16: bool, repeats: int) -> float:
    """Median seconds of the recurrence alone, forward, without recording: the inputs are looked up in a table that is
    projected already and the weights are laid out before. For the benchmarks."""
    import statistics
    import time

    generator = torch.Generator().manual_seed(0)
    gates = _GATES[name]
    hh = torch.randn(gates * hidden, hidden, generator=generator) * hidden**-0.5
    table = torch.randn(64, gates * hidden, generator=generator)
    ids = torch.randint(64, (steps, batch), generator=generator)
    state = torch.randn(batch, hidden, generator=generator)
    direction = Direction(table, hh, None, None, state, state.clone() if name == "lstm" else None, None, reverse=False)
    packs = [pack(name, None, hh, bf16=bf16, backward=False)]
    outputs = torch.empty(steps, batch, hidden)
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        forward_into(name, ids, [direction], None, bf16=bf16, packs=packs, outputs=outputs)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


# ------------------------------------------------------------------------------------------- why it is absent


@functools.cache
def why_absent() -> str | None:
    """None where the extension is loaded; else why it is not, what mends that, and the command to run then.

    Looks for what a build needs as things stand now, which takes a fraction of a second, once in a process.
    """
    again = _install_again()
    if importlib.util.find_spec("unrolled._native") is not None:
        try:
            importlib.import_module("unrolled._native")
        except ImportError as error:
            return f"it is installed but does not load ({error}); build it anew: {again}"
        return None
    missing, mending = _missing()
    if not missing:
        return (
            "it was not built when unrolled was installed; a C++ compiler and Python's headers are here now, so build "
            f"it, or see why that fails: UNROLLED_REQUIRE_NATIVE=1 {again}"
        )
    return f"it was not built, for want of {' and of '.join(missing)}. {mending}, then: {again}"


def _missing() -> tuple[list[str], str]:
    """What a build lacks here, and what installs it."""
    named = os.environ.get("CXX")
    compilers = [named] if named else ["c++", "g++", "clang++"]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    headers = Path(sysconfig.get_path("include"))
    missing, debian, fedora = [], [], []
    if not any(_compiles(compiler) for compiler in compilers):
        tried = f"CXX={named} is none" if named else f"tried {', '.join(compilers)}"
        missing.append(f"a C++20 compiler ({tried})")
        debian.append("g++")
        fedora.append("gcc-c++")
    if not (headers / "Python.h").is_file():
        missing.append(f"Python's headers (no Python.h in {headers})")
        # The system's own Python has the plain name; another beside it has its version in the name.
        plain = Path("/usr/bin/python3").resolve().name == f"python{version}"
        debian.append("python3-dev" if plain else f"python{version}-dev")
        fedora.append("python3-devel" if plain else f"python{version}-devel")
    if sys.platform == "darwin":
        return missing, "Run `xcode-select --install`; a Python from python.org or Homebrew has its headers"
    mending = f"On Debian or Ubuntu: apt install {' '.join(debian)}; on Fedora: dnf install {' '.join(fedora)}"
    if sys.base_prefix != "/usr" and not (headers / "Python.h").is_file():
        mending += f"; a Python that the system did not install ({sys.base_prefix}): install it anew with its headers"
    return missing, mending


def _compiles(compiler: str) -> bool:
    # Trying beats looking: a compiler can be too old, lack its standard library, or be a stub (macOS).
    probe = "#include <concepts>\nstatic_assert(std::integral<int>);\n"
    command = [*shlex.split(compiler), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    try:
        done = subprocess.run(command, input=probe, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _install_again() -> str:
    """The command that builds and installs this very package anew."""
    root = Path(__file__).resolve().parents[2]
    if (root / "CMakeLists.txt").is_file() and (root / "Makefile").is_file():
        return "make setup"
    source = "unrolled"
    try:  # where pip had it from, if not from an index
        origin = json.loads(importlib.metadata.distribution("unrolled").read_text("direct_url.json") or "{}")
    except importlib.metadata.PackageNotFoundError:
        origin = {}
    if "vcs_info" in origin:
        source = f"{origin['vcs_info']['vcs']}+{origin['url']}"
    elif Path(local := unquote(urlsplit(origin.get("url", "")).path)).exists() and local:
        source = local
    # A wheel that was built without the extension may lie in pip's cache.
    return f"pip install --no-cache-dir --force-reinstall --no-deps {shlex.quote(source)}"
