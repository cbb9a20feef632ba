"""`unrolled.nn.replace` and `unrolled.nn.freeze`: whole models and kept copies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import unrolled.nn
from unrolled import native
from unrolled.errors import ModelError

needs_native = pytest.mark.skipif(native.why_absent() is not None, reason="the native kernels are not there")


class Tagger(nn.Module):
    """A model as people have them: an embedding, two recurrent layers of different kinds, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.encoder = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True, dropout=0.3)
        self.rest = nn.ModuleDict({"gru": nn.GRU(10, 7), "rnn": nn.RNN(7, 4, nonlinearity="relu", bias=False)})
        self.again = self.rest["gru"]

    def forward(self, ids: Tensor, lengths: list[int]) -> Tensor:
        packed = pack_padded_sequence(self.embedding(ids), lengths, batch_first=True, enforce_sorted=False)
        out, _ = nn.utils.rnn.pad_packed_sequence(self.encoder(packed)[0], batch_first=True)
        out, _ = self.rest["gru"](out)
        out, _ = self.rest["rnn"](out)
        return out


def gradients(model: nn.Module, ids: Tensor, lengths: list[int]) -> tuple[Tensor, list[Tensor]]:
    out = model(ids, lengths)
    parameters = list(model.parameters())
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    return out, list(torch.autograd.grad((out * weights).sum(), parameters))


def test_a_replaced_model_is_the_same_model() -> None:
    torch.manual_seed(0)
    model = Tagger().eval()
    ids, lengths = torch.randint(11, (3, 8)), [5, 8, 1]
    expected, expected_gradients = gradients(model, ids, lengths)
    before = dict(model.named_parameters())
    seen: list[int] = []
    model.encoder.register_forward_hook(lambda *_: seen.append(1))
    assert unrolled.nn.replace(model) is model
    assert type(model.encoder) is unrolled.nn.LSTM
    assert type(model.rest["gru"]) is unrolled.nn.GRU
    assert model.again is model.rest["gru"]
    assert type(model.rest["rnn"]) is unrolled.nn.RNN
    assert all(p is before[name] for name, p in model.named_parameters()), "an optimiser holds the old ones"
    assert not model.encoder.training
    out, found = gradients(model, ids, lengths)
    assert seen == [1]
    # Two float32 computations of sums of some 20 terms: a few roundings of 6e-8 each, through four layers.
    torch.testing.assert_close(out, expected, rtol=2e-6, atol=2e-6)
    for a, b in zip(found, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_replaced_model_trains_saves_and_copies() -> None:
    torch.manual_seed(1)
    model = unrolled.nn.replace(Tagger())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids, lengths = torch.randint(11, (3, 8)), [5, 8, 2]
    losses = []
    for _ in range(20):
        loss = (model(ids, lengths) - 0.3).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    plain = Tagger()
    plain.load_state_dict(model.state_dict(), strict=True)
    twin = copy.deepcopy(model).eval()
    torch.testing.assert_close(twin(ids, lengths), plain.eval()(ids, lengths), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind, ours", [(nn.RNN, "RNN"), (nn.LSTM, "LSTM"), (nn.GRU, "GRU")])
def test_a_layer_itself_is_replaced(kind: Any, ours: str) -> None:
    layer = kind(3, 4)
    assert type(unrolled.nn.replace(layer)) is getattr(unrolled.nn, ours)
    assert unrolled.nn.replace(layer) is layer  # a second time changes nothing


def test_what_cannot_be_replaced_stays() -> None:
    class Own(nn.LSTM):
        def forward(self, *inputs: Any) -> Any:
            return "own"

    model = nn.ModuleList([nn.LSTM(3, 4, proj_size=2), Own(3, 4), nn.LSTMCell(3, 4), nn.Linear(3, 4)])
    kinds = [type(module) for module in model]
    unrolled.nn.replace(model)
    assert [type(module) for module in model] == kinds


@needs_native
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_frozen_layer_keeps_its_copy_until_the_block_ends(kind: str, bf16: bool) -> None:
    torch.manual_seed(2)
    layer = getattr(unrolled.nn, kind)(6, 9, num_layers=2, bidirectional=True)
    x = torch.randn(5, 3, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        before, _ = layer(x)
        with unrolled.nn.freeze(layer):
            layer.weight_hh_l0.data.mul_(3)
            layer.bias_ih_l1.data.add_(1)
            frozen, _ = layer(x)
            assert torch.equal(frozen, before), "the copy answers, to the bit"
        after, _ = layer(x)
    assert not torch.allclose(after, before, atol=1e-2)


@needs_native
def test_a_frozen_layer_still_learns_from_its_own_weights() -> None:
    layer = unrolled.nn.LSTM(3, 4)
    x = torch.randn(5, 2, 3)
    expected, _ = layer(x)
    with unrolled.nn.freeze(layer):
        out, _ = layer(x)
    assert out.requires_grad
    assert torch.equal(out, expected)


def test_a_layer_that_the_kernels_cannot_run_is_not_frozen() -> None:
    layer = unrolled.nn.LSTM(3, 4).double()
    with (
        pytest.raises(ModelError, match=r"^freeze: the native kernels cannot run this layer: "),
        unrolled.nn.freeze(layer),
    ):
        raise AssertionError("unreachable")
