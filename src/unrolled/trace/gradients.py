"""How far back a gradient reaches, and why: vanishing and exploding gradients as numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unrolled.cells import Lookup
from unrolled.errors import ModelError
from unrolled.nn import Core
from unrolled.trace.recording import Trace

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = [
    "Flow",
    "Reach",
    "fall",
    "gradient_flow",
    "gradient_norms",
    "growth",
    "memory_length",
    "saturation",
    "step_singular_values",
    "verdict",
]

_SATURATED = 0.1  # a gate below this or above 1 - this; Karpathy, Johnson and Fei-Fei 2016, section 4.2


def gradient_norms(trace: Trace, layer: str, field: str = "h") -> Float[Tensor, "T"]:
    """The Euclidean norm of dL/dh_t at each step of a layer, or with field c that of dL/dc_t of an LSTM.

    Raises:
        ModelError: the trace has no gradients.
    """
    name = f"{layer}.d{field}"
    if name not in trace.tensors:
        raise ModelError("this trace has no gradients: record it with gradient=True")
    norms: Tensor = torch.linalg.vector_norm(trace.tensors[name].double(), dim=-1)
    return norms


def fall(norms: Float[Tensor, "T"], factor: float) -> int | None:
    """How many steps before the last one with a gradient the norm has fallen by `factor` for the first time; None if it
    does not within these steps.

    norms: in the order in which the cell reads; for a reverse direction flip them before.
    """
    last = _last(norms)
    for distance, norm in enumerate(norms[: last + 1].flip(0).tolist()):
        if norm <= float(norms[last]) / factor:
            return distance
    return None


def growth(norms: Float[Tensor, "T"]) -> float:
    """By what the norm is multiplied at each step back, on average: the geometric mean of |dL/dh_{t-1}| / |dL/dh_t|.
    Below 1 it vanishes, above 1 it explodes (Bengio et al. 1994; Pascanu et al. 2013).

    The slope of a straight line through the logarithms, so that neither end rules it; steps after the norm has fallen
    to nothing are left out. NaN with fewer than two steps.
    """
    last = _last(norms)
    back = norms[: last + 1].flip(0)
    back = back[: int((back > back[0] * 1e-30).long().cumprod(0).sum())]
    if len(back) < 2:
        return math.nan
    t = torch.arange(len(back), dtype=torch.float64)
    t, y = t - t.mean(), back.log()
    return math.exp(float((t * (y - y.mean())).sum() / (t * t).sum()))


def _last(norms: Tensor) -> int:
    """The last step that has a gradient at all."""
    real = (norms > 0).nonzero()
    return int(real[-1]) if len(real) else 0


def saturation(trace: Trace, layer: str) -> dict[str, float]:
    """Of each gate that is a sigmoid, the share of its values below 0.1 or above 0.9: there its own gradient is small.
    Source of the bounds: Karpathy, Johnson and Fei-Fei 2016."""
    shares = {}
    for gate in ("i", "f", "o", "r", "z"):
        values = trace.tensors.get(f"{layer}.{gate}")
        if values is not None:
            closed = (values < _SATURATED) | (values > 1 - _SATURATED)
            shares[gate] = float(closed.double().mean())
    return shares


def memory_length(trace: Trace, layer: str) -> float | None:
    """After how many steps a cell has forgotten all but 1/e of what it held, if its gate were always at its mean m:
    1 / (1 - m). m is that of the forget gate (LSTM) or of the update gate, which keeps (GRU, torch's variant). None for
    a cell without one. Source: Tallec and Ollivier 2018."""
    for gate in ("f", "z"):
        values = trace.tensors.get(f"{layer}.{gate}")
        if values is not None:
            mean = float(values.double().mean())
            return math.inf if mean >= 1 else 1 / (1 - mean)
    return None


@dataclass(frozen=True)
class Reach:
    """How far back a gradient reaches: `fall` by 10 and by 1000, and `growth`."""

    tenth: int | None
    thousandth: int | None
    growth: float

    @classmethod
    def of(cls, norms: Float[Tensor, "T"]) -> Reach:
        return cls(fall(norms, 10), fall(norms, 1000), growth(norms))

    def beyond(self, other: Reach) -> bool:
        """Whether it falls later."""
        mine, others = (
            [math.inf if steps is None else steps for steps in (reach.thousandth, reach.tenth)]
            for reach in (self, other)
        )
        return mine > others


@dataclass(frozen=True)
class Flow:
    """The gradient flow of one layer; see the functions of the same names.

    norms, tenth, thousandth, growth: of dL/dh; c: the reach of dL/dc of an LSTM, which remembers in c: there a gradient
    may live on while that of h falls; steps: how many steps back there are.
    """

    layer: str
    norms: tuple[float, ...]
    steps: int
    tenth: int | None
    thousandth: int | None
    growth: float
    saturation: dict[str, float]
    memory: float | None
    c: Reach | None = None

    @property
    def reach(self) -> Reach:
        """That of h, or of c where it reaches further."""
        h = Reach(self.tenth, self.thousandth, self.growth)
        return self.c if self.c is not None and self.c.beyond(h) else h


def gradient_flow(trace: Trace, core: str = "core") -> list[Flow]:
    """The gradient flow of every layer and direction of a trace that was recorded with `gradient=True, at=-1`, lowest
    layer first."""
    flows = []
    for layer in trace.layers(core):

        def along(field: str, layer: str = layer) -> Tensor:
            norms = gradient_norms(trace, layer, field)
            return norms.flip(0) if layer.endswith(".reverse") else norms

        h = Reach.of(along("h"))
        flows.append(
            Flow(
                layer,
                tuple(gradient_norms(trace, layer).tolist()),
                _last(along("h")),
                h.tenth,
                h.thousandth,
                h.growth,
                saturation(trace, layer),
                memory_length(trace, layer),
                Reach.of(along("c")) if f"{layer}.dc" in trace.tensors else None,
            )
        )
    return flows


def verdict(flow: Flow, cell: str) -> str:
    """What a gradient flow means, in a sentence, with the figure behind it."""
    reach = flow.reach
    whose = "The gradient"
    if reach is flow.c:
        whose = "The gradient of c, in which an LSTM remembers,"
    if reach.thousandth is not None:
        advice = {
            "lstm": "try a forget bias of 1 or more, or chrono initialisation",
            "gru": "try chrono initialisation, or an LSTM",
        }.get(cell, "try an LSTM or a GRU, or start from orthogonal matrices")
        return (
            f"{whose} falls 1000-fold in {reach.thousandth} steps: what stands further back than that teaches almost "
            f"nothing; {advice}."
        )
    if reach.growth > 1.05:
        return (
            f"{whose} grows {reach.growth:.2f}-fold at each step back, {reach.growth**flow.steps:.3g}-fold over "
            f"these {flow.steps} steps: it explodes; keep --clip, and try a lower learning rate."
        )
    if reach.tenth is not None:
        return (
            f"{whose} falls 10-fold in {reach.tenth} steps and not 1000-fold within these {flow.steps}: near words "
            "teach more than far ones, which still teach something."
        )
    whose = whose.replace("The", "the", 1)
    return f"Over these {flow.steps} steps {whose} neither falls 10-fold nor explodes: all of them teach."


def step_singular_values(
    core: Core, trace: Trace, layer: str, step: int, *, count: int = 3, iterations: int = 50, seed: int = 0
) -> Float[Tensor, "count"]:
    """The greatest singular values of one step's Jacobian d(state_t) / d(state_{t-1}), the state being h, or h and c:
    by what the step can at most stretch a change of the state, and a gradient on its way back.

    By subspace iteration with products with the Jacobian and its transpose alone, so that it is never made in full.
    Source: Halko, Martinsson and Tropp 2011, algorithm 4.4.

    Args:
        core: the core that was recorded (`model.core`, or `model.writer.core` for `decoder`).
        layer: as in `trace.layers()`.
        step: which t.
        count: how many values.
    """
    name, k, direction = layer.split(".")
    reverse = direction == "reverse"
    cell = core.layers[int(k)][int(reverse)]  # type: ignore[index]
    fields = [field for field in ("h", "c") if f"{layer}.{field}" in trace.tensors]
    steps = len(trace.tensors[f"{layer}.h"])
    if not 0 <= step < steps:
        raise ModelError(f"step: expected 0 to {steps - 1}, got {step}")
    before = step + 1 if reverse else step - 1
    dtype = next(core.parameters()).dtype
    kind: Any = type(cell.initial_state(1))
    first = cell.initial_state(1)
    held = [
        trace.tensors[f"{layer}.{field}"][before].to(dtype) if 0 <= before < steps else getattr(first, field)[0]
        for field in fields
    ]
    x = _input(core, trace, name, int(k), step, dtype)
    size = len(held[0])

    def advance(flat: Tensor) -> Tensor:
        _, state = cell.step(x, kind(*(part[None] for part in torch.split(flat, size))))
        return torch.cat([getattr(state, field)[0] for field in fields])

    with torch.no_grad():
        at = torch.cat(held)
        total = len(at)
        count = min(count, total)
        width = min(total, count + 5)
        random = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(total, width, generator=random).to(at)).Q

        def forward(v: Tensor) -> Tensor:
            return torch.stack([torch.func.jvp(advance, (at,), (column,))[1] for column in v.T], dim=1)

        back: Any = torch.func.vjp(advance, at)[1]
        for _ in range(iterations):
            image = torch.linalg.qr(forward(basis)).Q
            basis = torch.linalg.qr(torch.stack([back(column)[0] for column in image.T], dim=1)).Q
        values: Tensor = torch.linalg.svdvals(forward(basis))[:count]
    return values


def _input(core: Core, trace: Trace, name: str, k: int, step: int, dtype: torch.dtype) -> Any:
    """What layer k read at a step: the layer below's outputs, or the core's own inputs."""
    if k > 0:
        sides = ("forward", "reverse")[: core.directions]
        return torch.cat([trace.tensors[f"{name}.{k - 1}.{side}.h"][step].to(dtype) for side in sides])[None]
    inputs = trace.tensors[f"{name}.inputs"][step]
    return inputs.to(dtype)[None] if inputs.is_floating_point() else Lookup(inputs[None], None)
