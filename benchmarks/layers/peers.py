"""The peers that are not torch.nn: ONNX Runtime, a scan in JAX, and a loop that writes text with torch alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layers.rounds import Missing

__all__ = ["onnx_layer", "scan_training", "write"]

# ONNX's gate order in terms of torch's: i o f c of i f g o; z r h of r z n.
_ONNX_GATES = {"LSTM": [0, 3, 1, 2], "GRU": [1, 0, 2]}


def onnx_layer(layer: torch.nn.RNNBase, x: Tensor, state: tuple[Tensor, ...], threads: int) -> Callable[[], list[Any]]:
    """A torch layer of one direction in ONNX Runtime, bound to these inputs: a run gives `Y [T 1 B H]` and the final
    states, as numpy's."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise Missing(f"{error.name} is not installed") from None

    def reordered(*names: str) -> np.ndarray:
        parts = [getattr(layer, name).detach().unflatten(0, (-1, layer.hidden_size)) for name in names]
        return torch.cat([part[_ONNX_GATES[layer.mode]].flatten(0, 1) for part in parts])[None].numpy()

    weights = {
        "W": reordered("weight_ih_l0"), "R": reordered("weight_hh_l0"), "B": reordered("bias_ih_l0", "bias_hh_l0")
    }  # fmt: skip
    helper, real = onnx.helper, onnx.TensorProto.FLOAT
    states, finals = ("h0", "c0")[: len(state)], ("Y_h", "Y_c")[: len(state)]
    # torch's GRU applies the reset gate after the recurrent product; for LSTM there is no such attribute.
    attributes = {"linear_before_reset": 1} if layer.mode == "GRU" else {}
    node = helper.make_node(
        layer.mode,
        ["X", "W", "R", "B", "", *states],
        ["Y", *finals],
        hidden_size=layer.hidden_size,
        layout=0,
        **attributes,
    )
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info(name, real, None) for name in ("X", *states)],
        [helper.make_tensor_value_info(name, real, None) for name in ("Y", *finals)],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    # The oldest versions that have `layout`, so that any ONNX Runtime of today reads them.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=7)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {"X": x.numpy(), **{name: part.numpy() for name, part in zip(states, state, strict=True)}}
    return lambda: session.run(None, feeds)


def scan_training(layer: torch.nn.RNNBase, x: Tensor, state: tuple[Tensor, ...], seeds: list[Tensor]) -> Any:
    """Forward and backward of a torch layer as `jax.lax.scan`, compiled: a run gives the values and the gradients of
    x, the states and the weights. The inputs of all steps are projected in one product before the scan."""
    try:
        import jax
    except ImportError as error:
        raise Missing(f"{error.name} is not installed") from None
    jnp, nn = jax.numpy, jax.nn

    def lstm(a: Any, state: Any, hh: Any, bias: Any) -> Any:
        i, f, g, o = jnp.split(a + state[0] @ hh.T + bias, 4, axis=-1)
        c = nn.sigmoid(f) * state[1] + nn.sigmoid(i) * jnp.tanh(g)
        return nn.sigmoid(o) * jnp.tanh(c), c

    def gru(a: Any, state: Any, hh: Any, bias: Any) -> Any:
        xr, xz, xn = jnp.split(a, 3, axis=-1)
        hr, hz, hn = jnp.split(state[0] @ hh.T + bias, 3, axis=-1)
        z = nn.sigmoid(xz + hz)
        n = jnp.tanh(xn + nn.sigmoid(xr + hr) * hn)
        return (n + z * (state[0] - n),)

    cell, count = {"LSTM": lstm, "GRU": gru}[layer.mode], len(state)

    def forward(x: Any, *rest: Any) -> Any:
        state, (ih, hh, bias_ih, bias_hh) = tuple(part[0] for part in rest[:count]), rest[count:]

        def step(state: Any, a: Any) -> Any:
            state = cell(a, state, hh, bias_hh)
            return state, state[0]

        final, outputs = jax.lax.scan(step, state, x @ ih.T + bias_ih)
        return (outputs, *(part[None] for part in final))

    @jax.jit
    def both(arguments: Any, seeds: Any) -> Any:
        values, backward = jax.vjp(forward, *arguments)
        return (*values, *backward(seeds))

    arguments = tuple(jnp.asarray(t.detach().numpy()) for t in (x, *state, *layer.parameters()))
    cotangents = tuple(jnp.asarray(seed.numpy()) for seed in seeds)
    return lambda: jax.block_until_ready(both(arguments, cotangents))


@torch.no_grad()
def write(model: torch.nn.Module, first: int, length: int) -> list[int]:
    """Symbols that a `plain_torch.LanguageModel` writes after the first one, as one writes such a loop."""
    x, state, written = torch.tensor([[first]]), None, []
    for _ in range(length):
        scores, state = model(x, state)
        x = torch.multinomial(torch.softmax(scores[0], dim=-1), 1)
        written.append(x.item())
    return written
