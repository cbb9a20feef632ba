"""Attention: what a decoder looks at among an encoder's hidden states, and how much at each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from unrolled.errors import ConfigError, ShapeError, expect_shape, nearest

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["ATTENTIONS", "Attention", "Memory"]

ATTENTIONS = ("dot", "general", "additive", "strongest")
"""The kinds of attention, see `Attention`."""


@dataclass(frozen=True)
class Memory:
    """What attention looks at: some source sentences, made ready once, and which of them each row of a batch looks at.

    A value: selecting gives another. The rows of a beam look at the same sentence, so it is not copied for them and is
    read once for all of them.

    Attributes:
        values: `[N S H_m]`, the encoder's hidden states, zero in the padding; a sentence's are side by side in memory.
        keys: `[N S K]`, what queries are compared with; `values` itself where they are not projected.
        mask: `[N S]`, true where a source step is real.
        sentence: `[R]`, which of the N each row looks at; None: each of N rows at its own.
        place: `[R]`, the how-manieth of that sentence's rows it is.
        crowd: the number of rows of the sentence that has most.
    """

    values: Float[Tensor, "N S H_m"]
    keys: Float[Tensor, "N S K"]
    mask: Bool[Tensor, "N S"]
    sentence: Int[Tensor, "R"] | None = None
    place: Int[Tensor, "R"] | None = None
    crowd: int = 1

    @property
    def states(self) -> Float[Tensor, "S R H_m"]:
        """The encoder's hidden states of each row, zero in the padding."""
        values = self.values if self.sentence is None else self.values[self.sentence]
        return values.transpose(0, 1)

    @property
    def lengths(self) -> Int[Tensor, "R"]:
        """How many real source steps each row has."""
        lengths = self.mask.sum(dim=1)
        return lengths if self.sentence is None else lengths[self.sentence]

    def select(self, rows: Tensor) -> Memory:
        """The rows with these indices (int64), or where this mask (bool) is true."""
        if rows.dtype == torch.bool:
            rows = rows.nonzero()[:, 0]
        sentence = rows if self.sentence is None else self.sentence[rows]
        kept, among, counts = torch.unique(sentence, return_inverse=True, return_counts=True)
        order = among.argsort(stable=True)
        starts = counts.cumsum(0) - counts
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device) - starts[among[order]]
        crowd = int(counts.max()) if len(counts) else 1
        if 2 * len(kept) > len(self.values):
            return Memory(self.values, self.keys, self.mask, sentence, place, crowd)
        # What nobody looks at is let go when it is half of all: each sentence is then moved a few times at most.
        values = self.values[kept]
        keys = values if self.keys is self.values else self.keys[kept]
        return Memory(values, keys, self.mask[kept], among, place, crowd)

    def gather(self, queries: Float[Tensor, "U R *F"]) -> Float[Tensor, "N Q *F"]:
        """Each sentence's queries side by side, Q = crowd * U."""
        byrow = queries.transpose(0, 1)  # [R U *F]
        if self.sentence is None:
            return byrow
        grid = byrow.new_zeros(len(self.values), self.crowd, *byrow.shape[1:])
        return grid.index_put((self.sentence, self.place), byrow).flatten(1, 2)

    def scatter(self, answers: Float[Tensor, "N Q *F"]) -> Float[Tensor, "U R *F"]:
        """The way back."""
        if self.sentence is not None:
            crowded = answers.view(len(self.values), self.crowd, -1, *answers.shape[2:])
            answers = crowded[self.sentence, self.place]  # [R U *F]
        return answers.transpose(0, 1)


class Attention(nn.Module):
    """A decoder's look at the encoder's hidden states h_1..h_S: for the decoder state s

        weights a = softmax(score(s, h_1), ..., score(s, h_S)), over real source steps only
        context   = sum_j a_j h_j

    with, by kind,

        dot        score = s^T h                            (Luong et al. 2015, "dot")
        general    score = s^T W h                          (Luong et al. 2015, "general")
        additive   score = v^T tanh(W s + U h)              (Bahdanau et al. 2015)
        strongest  score = s^T h, and a is 1 for the h of the greatest score, 0 for all others; of equal ones one.

    `strongest` is the lecture notes' variant that hands on only the most heavily weighted state. Its choice has no
    gradient of its own; so that it can learn what to look at, a's gradient is passed straight through to the softmax
    that dot would have used (the straight-through estimator, Bengio et al. 2013), while h gets that of what was handed
    on.

    A row without source steps has weights and a context of zero. Softmax is in float32 at least, under autocast too.

    Args:
        kind: one of `ATTENTIONS`.
        query_size: H, the size of s.
        memory_size: H_m, the size of h.

    Raises:
        ConfigError: an unknown kind, a size below 1, or two sizes for a kind that multiplies s and h.
    """

    def __init__(self, kind: str, query_size: int, memory_size: int) -> None:
        super().__init__()
        if kind not in ATTENTIONS:
            raise ConfigError(f"attention: unknown kind {kind!r}: {nearest(kind, ATTENTIONS)}")
        for name, size in (("query_size", query_size), ("memory_size", memory_size)):
            if size < 1:
                raise ConfigError(f"attention.{name}: expected at least 1, got {size}")
        if kind in ("dot", "strongest") and query_size != memory_size:
            raise ConfigError(
                f"attention: {kind} multiplies decoder states with encoder states, which have {query_size} and "
                f"{memory_size} numbers: make the sizes equal (a bidirectional encoder has twice its hidden size), or "
                "use general or additive"
            )
        self.kind, self.query_size, self.memory_size = kind, query_size, memory_size
        if kind in ("general", "additive"):
            self.key = nn.Linear(memory_size, query_size, bias=False)
        if kind == "additive":
            self.query = nn.Linear(query_size, query_size, bias=False)
            self.v = nn.Parameter(torch.empty(query_size).uniform_(-(query_size**-0.5), query_size**-0.5))

    def extra_repr(self) -> str:
        return f"{self.kind}, query_size={self.query_size}, memory_size={self.memory_size}"

    def remember(
        self, states: Float[Tensor, "S B H_m"], lengths: Int[Tensor, "B"] | Sequence[int] | None = None
    ) -> Memory:
        """The memory of some source sentences, from the encoder's hidden states; None: none has padding.

        What stands in the padding, NaN too, has no effect.

        Raises:
            ShapeError: states are not `[S B H_m]`, or lengths not one whole number 0..S per row.
        """
        expect_shape("states", states, "S B H_m", H_m=self.memory_size)
        steps, batch = states.shape[:2]
        mask = _real(lengths, steps, batch, states.device)
        values = states.transpose(0, 1)
        if lengths is not None:
            values = values.masked_fill(~mask[..., None], 0)
        # Beside each other, a sentence's states are read in one piece at every look.
        values = self._wide(values).contiguous()
        return Memory(values, self._wide(self.key(values)) if hasattr(self, "key") else values, mask)

    def forward(
        self, queries: Float[Tensor, "U R H"] | Float[Tensor, "R H"], memory: Memory
    ) -> tuple[Float[Tensor, "*U R H_m"], Float[Tensor, "*U R S"]]:
        """Contexts and weights of decoder states, of all U target steps at once or of a single one.

        Raises:
            ShapeError: not as many rows as the memory has, or not the size of a decoder state.
        """
        rows = len(memory.values if memory.sentence is None else memory.sentence)
        if queries.dim() == 2:
            expect_shape("queries", queries, "R H", R=rows, H=self.query_size)
            context, weights = self(queries[None], memory)
            return context[0], weights[0]
        expect_shape("queries", queries, "U R H", R=rows, H=self.query_size)
        if self.kind == "additive":
            queries = self.query(queries)
        queries = self._wide(queries)
        with torch.autocast(queries.device.type, enabled=False):
            return self._look(queries, memory)

    @staticmethod
    def _wide(x: Tensor) -> Tensor:
        """As float32 under autocast. These products are a hundredth of the work around them, and there are as many
        shapes of them as there are pairs of lengths: for each shape of a product in bfloat16 torch's oneDNN keeps code
        and memory, a megabyte at a time, until a thousand are there."""
        return x.float() if torch.is_autocast_enabled(x.device.type) else x

    def _look(
        self, queries: Float[Tensor, "U R K"], memory: Memory
    ) -> tuple[Float[Tensor, "U R H_m"], Float[Tensor, "U R S"]]:
        asked = memory.gather(queries)  # [N Q K]
        if self.kind == "additive":
            keys, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (memory.keys, self.v))
            scores = _AdditiveScores.apply(asked.to(keys.dtype), keys, v)  # type: ignore[no-untyped-call]
        else:
            scores = torch.bmm(asked, memory.keys.transpose(1, 2))
        weights = _distribution(scores, memory.mask[:, None])
        if self.kind == "strongest" and weights.shape[-1]:
            chosen = torch.zeros_like(weights).scatter_(-1, weights.argmax(dim=-1, keepdim=True), 1)
            # The difference is zero, bit for bit; its gradient is the softmax's.
            weights = chosen * memory.mask[:, None] + (weights - weights.detach())
        context = torch.bmm(weights.to(memory.values.dtype), memory.values)
        return memory.scatter(context), memory.scatter(weights)


def _real(
    lengths: Int[Tensor, "B"] | Sequence[int] | None, steps: int, batch: int, device: torch.device
) -> Bool[Tensor, "B S"]:
    if lengths is None:
        return torch.ones(batch, steps, dtype=torch.bool, device=device)
    sizes = torch.as_tensor(lengths, device=device)
    expect_shape("lengths", sizes, "B", B=batch)
    if batch and (sizes.is_floating_point() or sizes.dtype == torch.bool):  # torch makes [] a float
        raise ShapeError(f"lengths: expected whole numbers, got {str(sizes.dtype).removeprefix('torch.')}")
    if batch and (int(sizes.min()) < 0 or int(sizes.max()) > steps):
        raise ShapeError(
            f"lengths: expected 0..{steps} (the number of source steps), got {int(sizes.min())}..{int(sizes.max())}"
        )
    return torch.arange(steps, device=device) < sizes[:, None]


def _distribution(scores: Float[Tensor, "N Q S"], mask: Bool[Tensor, "N 1 S"]) -> Float[Tensor, "N Q S"]:
    """Softmax over real steps; zeros where there are none, which -inf for all of them would make NaN."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    lowest = torch.finfo(scores.dtype).min
    return torch.softmax(scores.masked_fill(~mask, lowest), dim=-1).masked_fill(~mask, 0)


_BLOCK = 1 << 16
"""How many tanh are computed at once: 256 KB in float32, so that a block is still in the cache at its next use."""


class _AdditiveScores(torch.autograd.Function):
    """v^T tanh(q + k) for every query and key, `[N Q S]`, a block of queries at a time: `[N Q S K]` never exists.

    Nothing of that size is kept for the backward either, which computes each block anew.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Float[Tensor, "N Q K"], k: Float[Tensor, "N S K"], v: Float[Tensor, "K"]
    ) -> Float[Tensor, "N Q S"]:
        ctx.save_for_backward(q, k, v)
        scores = q.new_empty(*q.shape[:2], k.shape[1])
        for n, some in _blocks(q, k):
            scores[n, some] = _tanh(q[n, some], k[n]) @ v
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_scores: Float[Tensor, "N Q S"]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for n, some in _blocks(q, k):
            h = _tanh(q[n, some], k[n])  # [n q S K]
            d = d_scores[n, some]
            d_v += d.flatten() @ h.flatten(0, 2)
            d_h = h.square_().neg_().add_(1).mul_(v).mul_(d[..., None])  # (1 - tanh^2) v d
            d_q[n, some] = d_h.sum(dim=2)
            d_k[n] += d_h.sum(dim=1)
        return d_q, d_k, d_v


def _tanh(q: Float[Tensor, "n q K"], k: Float[Tensor, "n S K"]) -> Float[Tensor, "n q S K"]:
    return (q[:, :, None] + k[:, None]).tanh_()


def _blocks(q: Tensor, k: Tensor) -> Any:
    """Ranges of sentences and of their queries that together cover all, each of about `_BLOCK` numbers."""
    one = max(1, k.shape[1] * k.shape[2])  # of a single query
    queries = max(1, min(q.shape[1], _BLOCK // one))
    sentences = max(1, _BLOCK // (one * queries))
    for n in range(0, q.shape[0], sentences):
        for u in range(0, q.shape[1], queries):
            yield slice(n, n + sentences), slice(u, u + queries)
