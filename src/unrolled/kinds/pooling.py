"""From the steps of an input to one vector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from unrolled.kinds.contract import Run

__all__ = ["Pooling"]


class Pooling(nn.Module):
    """One vector [B H] of an unrolled input.

        last        the last layer's final state; of both directions, each one's own last
        mean, max   of the outputs of all real steps, per unit
        attention   softmax over the real steps of v . tanh(W h_t + b), weighted sum (Yang et al. 2016)

    Args:
        how: one of these.
        size: H, of an output vector.
    """

    def __init__(self, how: str, size: int) -> None:
        super().__init__()
        self.how, self.size = how, size
        if how == "attention":
            self.inner = nn.Linear(size, size)
            self.scorer = nn.Linear(size, 1, bias=False)

    def forward(self, run: Run, inputs: Any, lengths: Int[Tensor, "B"]) -> Float[Tensor, "B H"]:
        """run: the model's core over `inputs`."""
        if self.how == "last":
            cells = run(inputs, lengths=lengths, outputs=False).state.cells
            # The last layer's one or two directions make up an output vector.
            width = cells[-1].h.shape[-1]
            last: Tensor = torch.cat([cell.h for cell in cells[-(self.size // width) :]], dim=-1)
            return run.drop(last)
        outputs = run(inputs, lengths=lengths).outputs
        mask = torch.arange(len(outputs), device=outputs.device)[:, None] < lengths.to(outputs.device)[None]
        if self.how == "max":
            return outputs.masked_fill(~mask[..., None], -torch.inf).amax(0)  # type: ignore[no-any-return]
        if self.how == "mean":
            weights = mask.to(outputs.dtype) / lengths.to(outputs.device).clamp(min=1)
        else:
            scores = self.scorer(torch.tanh(self.inner(outputs)))[..., 0].float()
            weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), 0).to(outputs.dtype)
        pooled: Tensor = torch.einsum("tb,tbh->bh", weights, outputs)
        return pooled
