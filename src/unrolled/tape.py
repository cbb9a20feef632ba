"""The built-in cells over time with backpropagation through time written out by hand, in plain torch operations.

The reference loop in `unroll` lets autograd record some ten operations for every step and adds up each weight's
gradient step by step. Here one forward loop writes what the backward needs on a *tape*, allocated once, and
one backward loop walks it from the last step to the first; the weights' gradients are then a single product
over all steps. Values and gradients are those of the reference loop up to rounding (law 6); the gain is that
the small operations between the products are fewer and in place.

Notation, with d(x) for the gradient of the loss with respect to x and * elementwise:

    RNN    d(a) = d(h') * (1 - h'^2)     or d(h') where h' > 0     d(h) = W_hh^T d(a)
    LSTM   d(o) = d(h') tanh(c')         d(c') += d(h') o (1 - tanh(c')^2)
           d(i) = d(c') g    d(f) = d(c') c    d(g) = d(c') i      d(c) = d(c') f
           each gate's gradient times s (1 - s), or 1 - g^2, is d(a);      d(h) = W_hh^T d(a)
    GRU    d(z) = d(h') (h - n)          d(n) = d(h') (1 - z)      d(r) = d(a_n) (W_hn h + b_hn)
           d(h) = d(h') z + W_hh^T [d(a_r), d(a_z), d(a_n) r]

    d(W_hh) = sum over t of d(a_t) h_{t-1}^T = D^T P        D [T*B G*H], P [T*B H]

Source: Werbos 1990, "Backpropagation through time: what it does and how to do it".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unrolled.cells import GRU, LSTM, RNN, BoundCell, ReluRNN
from unrolled.errors import ModelError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = ["recurrence", "supports", "uses_onednn"]

_EQUATIONS = tuple(cell.equation for cell in (RNN, ReluRNN, LSTM, GRU))
_tanh_backward = torch.ops.aten.tanh_backward
_sigmoid_backward = torch.ops.aten.sigmoid_backward


def supports(cell: BoundCell) -> str | None:
    """None if `recurrence` can run this cell here, else the reason why not."""
    weight = cell.weights.hh
    if weight.device.type != "cpu":
        return f"the weights are on {weight.device.type}"
    if weight.dtype not in (torch.float32, torch.float64):
        return f"the weights are {str(weight.dtype).removeprefix('torch.')}"
    if cell.equation not in _EQUATIONS:
        return f"the equation {cell.equation.name!r} is not a built-in one"
    if torch.compiler.is_compiling():
        return "the model is being compiled"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    return None


def recurrence(
    cell: BoundCell,
    projected: Float[Tensor, "T B G*H"],
    state: Any,
    *,
    reverse: bool = False,
    keep: Bool[Tensor, "T B 1"] | None = None,
    clear: Bool[Tensor, "T B 1"] | None = None,
) -> tuple[Float[Tensor, "T B H"], Float[Tensor, "T B H"] | None]:
    """The states after every step: `(h, c)`, c None for a cell without one. T >= 1.

    Args:
        projected: what the inputs contribute, `cell.project(inputs)`.
        state: the state before the first step.
        reverse: go from the last step to the first; the state before "the first step" then precedes step T-1.
        keep: where false the step is padding: the state passes through unchanged.
        clear: where true the state before this step counts as zero.

    Differentiable once: a second derivative raises ModelError, which names the reference path.
    """
    # Autocast leaves float64 alone.
    cast = torch.is_autocast_enabled("cpu") and projected.dtype != torch.float64
    compute = torch.get_autocast_dtype("cpu") if cast else projected.dtype
    c0 = state.c if cell.equation.name == "lstm" else None
    outputs: tuple[Tensor, Tensor | None] = _Recurrence.apply(  # type: ignore[no-untyped-call]
        cell.equation.name,
        projected,
        state.h,
        c0,
        cell.weights.hh,
        cell.weights.bias_hh,
        reverse,
        keep,
        clear,
        compute,
        torch.is_grad_enabled(),
    )
    return outputs


def _linear(weight: Tensor, bias: Tensor | None, compute: torch.dtype) -> Callable[[Tensor], Tensor]:
    """`x -> x W^T + b` for a small batch and many calls, computed in `compute`, returned in the weight's dtype."""
    dtype = weight.dtype
    w, b = weight.to(compute), None if bias is None else bias.to(compute)
    if compute != dtype:
        return lambda x: F.linear(x.to(compute), w, b).to(dtype)
    if dtype == torch.float32 and _onednn is not None:
        # oneDNN's product is a third faster than the BLAS behind F.linear for 64 rows (183 against 134 GFLOP/s
        # at 64 x 512 x 2048 on two AVX-512 cores); torch reaches it by this operator only.
        product = _onednn
        w = w.contiguous()
        return lambda x: product(x, w, b, "none", [], "")
    return lambda x: F.linear(x, w, b)


def _find_onednn() -> Callable[..., Tensor] | None:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_onednn = _find_onednn()


def uses_onednn() -> bool:
    """Whether the product of a single step goes through oneDNN in float32."""
    return _onednn is not None


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        name: str,
        projected: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        reverse: bool,
        keep: Tensor | None,
        clear: Tensor | None,
        compute: torch.dtype,
        record: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        steps, batch, rows = projected.shape
        hidden = weight.shape[1]
        new = weight.new_empty
        with torch.autocast("cpu", enabled=False):
            linear = _linear(weight, bias, compute)
            # Slot s holds the state before step s (forward) or after it (reverse); the spare slot is the start.
            h = new(steps + 1, batch, hidden)
            c = new(steps + 1, batch, hidden) if c0 is not None else None
            first = steps if reverse else 0
            h[first] = h0
            if c is not None and c0 is not None:
                c[first] = c0
            kept = steps if record else 1
            gates = new(kept, batch, rows)
            # LSTM: tanh(c'); GRU: W_hn h + b_hn, which the reset gate multiplies.
            extra = new(kept, batch, hidden) if name in ("lstm", "gru") else None
            for t in range(steps - 1, -1, -1) if reverse else range(steps):
                before, after = (t + 1, t) if reverse else (t, t + 1)
                slot = t if record else 0
                hp = h[before] if clear is None else h[before].masked_fill(clear[t], 0)
                a = gates[slot]
                if name == "lstm":
                    assert c is not None and extra is not None
                    cp = c[before] if clear is None else c[before].masked_fill(clear[t], 0)
                    torch.add(projected[t], linear(hp), out=a)
                    _lstm_forward(a, cp, c[after], extra[slot], h[after])
                elif name == "gru":
                    assert extra is not None
                    _gru_forward(projected[t], linear(hp), hp, a, extra[slot], h[after])
                else:
                    torch.add(projected[t], linear(hp), out=a)
                    torch.tanh(a, out=h[after]) if name == "rnn" else torch.clamp_min(a, 0, out=h[after])
                if keep is not None:
                    h[after] = torch.where(keep[t], h[after], h[before])
                    if c is not None:
                        c[after] = torch.where(keep[t], c[after], c[before])
        if record:
            ctx.save_for_backward(h, c, gates if name in ("lstm", "gru") else None, extra, weight, keep, clear)
            ctx.name, ctx.reverse, ctx.compute, ctx.has_bias = name, reverse, compute, bias is not None
            ctx.projected_dtype = projected.dtype
        outputs = slice(0, steps) if reverse else slice(1, steps + 1)
        return h[outputs], None if c is None else c[outputs]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise ModelError(
                "the tape path is differentiable once; for second derivatives (create_graph=True) "
                "use backend='reference'"
            )
        dh_all, dc_all = grads
        h, c, gates, extra, weight, keep, clear = ctx.saved_tensors
        name, reverse, compute = ctx.name, ctx.reverse, ctx.compute
        steps, batch, hidden = h.shape[0] - 1, h.shape[1], h.shape[2]
        back = _linear(weight.t(), None, compute)
        d = weight.new_empty(steps, batch, weight.shape[0])
        # The GRU's recurrent product has its own gradient in the candidate's rows: d(a_n) r.
        d_candidate = weight.new_empty(steps, batch, hidden) if name == "gru" else None
        scratch = weight.new_empty(batch, weight.shape[0]) if name == "gru" else None
        dh = weight.new_zeros(batch, hidden)
        dc = weight.new_zeros(batch, hidden) if name == "lstm" else None
        for t in range(steps) if reverse else range(steps - 1, -1, -1):
            before, after = (t + 1, t) if reverse else (t, t + 1)
            if dh_all is not None:
                dh = dh + dh_all[t]
            if dc is not None and dc_all is not None:
                dc = dc + dc_all[t]
            a = d[t]
            through = direct = dh
            if dc is not None:
                cp = c[before] if clear is None else c[before].masked_fill(clear[t], 0)
                dc_before = _lstm_backward(a, dh, dc, gates[t], cp, extra[t])
                if keep is not None:
                    dc_before = torch.where(keep[t], dc_before, dc)
                if clear is not None:
                    dc_before = dc_before.masked_fill(clear[t], 0)
                dc = dc_before
            elif name == "gru":
                assert d_candidate is not None and scratch is not None
                hp = h[before] if clear is None else h[before].masked_fill(clear[t], 0)
                through = _gru_backward(a, scratch, dh, gates[t], hp, extra[t])
                direct = dh
            elif name == "rnn":
                _tanh_backward(dh, h[after], grad_input=a)
            else:
                torch.mul(dh, h[after] > 0, out=a)
            if keep is not None:
                a.masked_fill_(~keep[t], 0)
                if scratch is not None:
                    scratch.masked_fill_(~keep[t], 0)
            if d_candidate is not None and scratch is not None:
                d_candidate[t] = scratch[:, 2 * hidden :]
            dh = back(a if scratch is None else scratch)
            if name == "gru":
                dh = dh.add_(through if keep is None else torch.where(keep[t], through, direct))
            elif keep is not None:
                dh = torch.where(keep[t], dh, direct)
            if clear is not None:
                dh = dh.masked_fill(clear[t], 0)

        # One product over all steps; cleared rows saw a zero state.
        previous = h[1:] if reverse else h[:-1]
        if clear is not None:
            previous = previous.masked_fill(clear, 0)
        needs = ctx.needs_input_grad
        dw = db = None
        if needs[4]:
            p = previous.flatten(0, 1).to(compute)
            flat = d.flatten(0, 1).to(compute)
            if d_candidate is None:
                dw = flat.t() @ p
            else:
                dw = torch.cat([flat[:, : 2 * hidden].t() @ p, d_candidate.flatten(0, 1).to(compute).t() @ p])
            dw = dw.to(weight.dtype)
        if needs[5]:
            db = d.sum((0, 1))
            if d_candidate is not None:
                db[2 * hidden :] = d_candidate.sum((0, 1))
        dx = d.to(ctx.projected_dtype) if needs[1] else None
        return None, dx, dh, dc, dw, db, None, None, None, None, None


def _lstm_forward(a: Tensor, cp: Tensor, c: Tensor, tanh_c: Tensor, h: Tensor) -> None:
    """a [B 4H] in: the sums before the gates, out: the gates; writes c, tanh(c) and h [B H]."""
    n = h.shape[1]
    i, f, g, o = a[:, :n], a[:, n : 2 * n], a[:, 2 * n : 3 * n], a[:, 3 * n :]
    a[:, : 2 * n].sigmoid_()
    g.tanh_()
    o.sigmoid_()
    torch.mul(f, cp, out=c)
    c.addcmul_(i, g)
    torch.tanh(c, out=tanh_c)
    torch.mul(o, tanh_c, out=h)


def _lstm_backward(a: Tensor, dh: Tensor, dc: Tensor, gates: Tensor, cp: Tensor, tanh_c: Tensor) -> Tensor:
    """Writes the gradient of the gates' sums to a [B 4H]; returns d(c) before the step."""
    n = dh.shape[1]
    i, f, g, o = gates[:, :n], gates[:, n : 2 * n], gates[:, 2 * n : 3 * n], gates[:, 3 * n :]
    dc = dc + _tanh_backward(dh * o, tanh_c)
    torch.mul(dc, g, out=a[:, :n])
    torch.mul(dc, cp, out=a[:, n : 2 * n])
    _sigmoid_backward(a[:, : 2 * n], gates[:, : 2 * n], grad_input=a[:, : 2 * n])
    _tanh_backward(dc * i, g, grad_input=a[:, 2 * n : 3 * n])
    _sigmoid_backward(dh * tanh_c, o, grad_input=a[:, 3 * n :])
    return dc.mul_(f)


def _gru_forward(x: Tensor, hh: Tensor, hp: Tensor, gates: Tensor, hn: Tensor, h: Tensor) -> None:
    """x, hh [B 3H]: both products; writes the gates [B 3H], W_hn h + b_hn and h [B H]."""
    n = hp.shape[1]
    rz, candidate = gates[:, : 2 * n], gates[:, 2 * n :]
    torch.add(x[:, : 2 * n], hh[:, : 2 * n], out=rz)
    rz.sigmoid_()
    hn.copy_(hh[:, 2 * n :])
    torch.addcmul(x[:, 2 * n :].to(hn.dtype), rz[:, :n], hn, out=candidate)
    candidate.tanh_()
    torch.sub(hp, candidate, out=h)
    h.mul_(rz[:, n:]).add_(candidate)


def _gru_backward(a: Tensor, recurrent: Tensor, dh: Tensor, gates: Tensor, hp: Tensor, hn: Tensor) -> Tensor:
    """Writes the gradients of both products' sums: of x's to a [B 3H], of h's to recurrent [B 3H]; returns what
    reaches the earlier h without a product."""
    n = dh.shape[1]
    r, z, candidate = gates[:, :n], gates[:, n : 2 * n], gates[:, 2 * n :]
    through = dh * z
    da = a[:, 2 * n :]
    _tanh_backward(dh - through, candidate, grad_input=da)
    torch.mul(da, hn, out=a[:, :n])
    torch.mul(dh, hp - candidate, out=a[:, n : 2 * n])
    _sigmoid_backward(a[:, : 2 * n], gates[:, : 2 * n], grad_input=a[:, : 2 * n])
    recurrent[:, : 2 * n] = a[:, : 2 * n]
    torch.mul(da, r, out=recurrent[:, 2 * n :])
    return through
