"""Writing: symbols chosen one after the other from a model's scores, each fed back as the next input.

Works over `begin` and `step` only, never over a class name.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unrolled.errors import ConfigError, DataError, ModelError
from unrolled.model import Model
from unrolled.vocabulary import Vocabulary

if TYPE_CHECKING:
    from jaxtyping import Float

    from unrolled.native import Writer

__all__ = ["Sampling", "choose", "generate", "next_distribution"]


@dataclass(frozen=True)
class Sampling:
    """How the next symbol is chosen from its scores; applied in the order of the fields.

    Attributes:
        repetition_penalty: > 0; scores of the last `repetition_window` symbols are divided by it if positive
            and multiplied by it if negative (Keskar et al. 2019); 1 changes nothing.
        repetition_window: how many of the last symbols are penalised.
        temperature: >= 0; scores are divided by it; 0 takes the highest score (greedy).
        top_k: choose among the k most probable symbols only.
        top_p: choose among the fewest most probable symbols that together reach this probability
            (Holtzman et al. 2020).

    Raises:
        ConfigError: a value out of its range.
    """

    repetition_penalty: float = 1.0
    repetition_window: int = 64
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        checks = {
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
            "repetition_window": (self.repetition_window >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "at least 0 (0 is greedy)"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise ConfigError(f"{name}: expected {expected}, got {getattr(self, name)}")


_NOT_FINITE = "the model's scores are not finite: its weights or its state hold NaN or infinity; train it anew"


def next_distribution(
    scores: Float[Tensor, "V"], sampling: Sampling, written: deque[int] | None = None
) -> Float[Tensor, "V"]:
    """The probabilities from which the next symbol is drawn, float64; those that `sampling` rules out are zero.

    Args:
        scores: the model's scores; -inf for a symbol that must not be written.
        written: the symbols to penalise.

    Raises:
        ModelError: a score is NaN or infinite, or all symbols are ruled out.
    """
    scores = scores.double().clone()
    if not bool((scores < torch.inf).all()) or bool((scores == -torch.inf).all()):
        raise ModelError(_NOT_FINITE)
    if sampling.repetition_penalty != 1 and written:
        seen = torch.tensor(sorted(set(written)))
        old = scores[seen]
        scores[seen] = torch.where(old > 0, old / sampling.repetition_penalty, old * sampling.repetition_penalty)
    if sampling.temperature == 0:
        only = torch.zeros_like(scores)
        only[scores.argmax()] = 1
        return only
    p = torch.softmax(scores / sampling.temperature, dim=0)
    if sampling.top_k is not None and sampling.top_k < p.numel():
        p[p.sort(descending=True, stable=True).indices[sampling.top_k :]] = 0  # of equal ones the first stay
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = p.sort(descending=True, stable=True)
        # A symbol goes if those before it reach top_p already, so at least one always stays.
        before = ordered.cumsum(0) - ordered
        p[order[before >= sampling.top_p * p.sum()]] = 0
    return p / p.sum()


def generate(
    model: Model,
    prompt: str = "",
    *,
    length: int = 400,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    repetition_window: int = 64,
    seed: int | None = None,
    stop: str | None = None,
) -> Iterator[str]:
    """Text that the model writes after the prompt, piece by piece as it is made; `"".join` gives the whole.

    It is written with the weights that the model has when the first piece is asked for.

    Args:
        prompt: what comes before; it is not repeated in the output. An empty prompt stands for a line break, if
            the model knows one: something has to be read before anything can be predicted.
        length: how many characters to write at most, whatever the model's unit.
        temperature, top_k, top_p, repetition_penalty, repetition_window: see `Sampling`.
        seed: the same seed gives the same text on the same machine; None: another one at each call.
        stop: writing ends before the first occurrence of this string, which is not written.

    Raises:
        ConfigError: a setting out of range.
        DataError: the prompt has symbols that the vocabulary lacks (all of them are named).
        ModelError: while writing, if the model's scores are not finite.
    """
    sampling = Sampling(repetition_penalty, repetition_window, temperature, top_k, top_p)
    if length < 0:
        raise ConfigError(f"length: expected at least 0 characters, got {length}")
    if stop == "":
        raise ConfigError("stop: expected at least one character, got an empty string")
    ids = _prompt_ids(model, prompt)
    return _limit(_write(model, ids, sampling, seed), length, stop)


def _prompt_ids(model: Model, prompt: str) -> Tensor:
    missing = model.vocabulary.missing(prompt)
    if missing:
        raise DataError(
            f"the prompt has {'symbols' if len(missing) > 1 else 'a symbol'} that the model never saw: "
            + ", ".join(_show(unit) for unit in missing)
        )
    if not prompt:
        if model.vocabulary.missing("\n"):
            raise DataError("an empty prompt stands for a line break, which this model never saw: give a prompt")
        prompt = "\n"
    return torch.from_numpy(model.vocabulary.encode(prompt).astype("int64"))


def _show(unit: str) -> str:
    return f"{unit!r} (U+{ord(unit):04X})" if len(unit) == 1 else repr(unit)


def choose(p: Float[Tensor, "V"], uniform: float) -> int:
    """The symbol that a random number in [0, 1) stands for: the first at which the summed probabilities exceed it."""
    reached = p.cumsum(0)
    choice = int(torch.searchsorted(reached, uniform * reached[-1], right=True))
    return choice if choice < p.numel() else int(p.nonzero()[-1])  # rounding: 0.99... may come out as all of it


_AHEAD = 64  # symbols whose random numbers are drawn at once


def _uniforms(seed: int | None) -> Iterator[Tensor]:
    """Random numbers in [0, 1), float64, by the `_AHEAD`: the same ones on every path."""
    random = torch.Generator()
    if seed is None:
        random.seed()
    else:
        random.manual_seed(seed)
    while True:
        yield torch.rand(_AHEAD, dtype=torch.float64, generator=random)


@torch.inference_mode()  # torch enters and leaves it around every piece, so the caller's own mode stays as it was
def _write(model: Model, ids: Tensor, sampling: Sampling, seed: int | None) -> Iterator[str]:
    """The endless text: one decided piece per symbol, empty while nothing is decided yet."""
    written: deque[int] = deque(ids.tolist(), maxlen=sampling.repetition_window)
    decoder = model.vocabulary.decoder()
    device = model.writer.weight.device
    with _evaluating(model):
        state = model.begin(ids[:-1, None].to(device)) if len(ids) > 1 else model.begin()
        writer = model.hold_still()
    last = ids[-1:].to(device)
    barred = [model.vocabulary.unknown, *_joining(model.vocabulary, ids)]
    if writer is not None:
        for choice in _write_natively(writer, int(last), state, len(model.vocabulary), barred, written, sampling, seed):
            yield decoder.feed(choice)
    for uniforms in _uniforms(seed):
        for uniform in uniforms.tolist():
            with _evaluating(model):
                scores, state = model.step(last, state)
            row = scores[0].float().cpu()
            row[barred] = -torch.inf
            choice = choose(next_distribution(row, sampling, written), uniform)
            written.append(choice)
            last = torch.tensor([choice], device=device)
            barred = [model.vocabulary.unknown]
            yield decoder.feed(choice)


def _write_natively(
    writer: Writer,
    last: int,
    state: Any,
    symbols: int,
    barred: list[int],
    written: deque[int],
    sampling: Sampling,
    seed: int | None,
) -> Iterator[int]:
    """The same endless choice, some symbols at a time, without Python between them.

    barred: for the first symbol; its first entry for all others too.
    """
    h = torch.cat([cell.h for cell in state.cells]).float()
    c = torch.cat([cell.c for cell in state.cells]).float() if hasattr(state.cells[0], "c") else None
    never, at_first = (torch.zeros(symbols, dtype=torch.bool) for _ in range(2))
    never[barred[0]] = True
    at_first[barred] = True
    recent = torch.zeros(sampling.repetition_window, dtype=torch.int64)
    recent[: len(written)] = torch.tensor(list(written))
    count = torch.tensor([len(written)])
    first = True
    for uniforms in _uniforms(seed):
        # The text appears as it is made: little at first, so that nobody waits for the first letters.
        size = 8 if first else 32
        for piece in (uniforms[i : i + size] for i in range(0, len(uniforms), size)):
            chosen = writer.write(
                last,
                h,
                c,
                piece,
                recent,
                count,
                barred=never,
                barred_first=at_first if first else None,
                repetition_penalty=sampling.repetition_penalty,
                temperature=sampling.temperature,
                top_k=sampling.top_k or 0,
                top_p=1.0 if sampling.top_p is None else sampling.top_p,
            ).tolist()
            first = False
            last = chosen[-1]
            for choice in chosen:
                if choice < 0:
                    raise ModelError(_NOT_FINITE)
                yield choice


@contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """The model in evaluation mode; what the caller had set it to is there again before anything is yielded."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def _joining(vocabulary: Vocabulary, ids: Tensor) -> list[int]:
    """The symbols that would change the text of the ids before them: a final consonant after the jamo of 나, for
    example, makes it 난. The prompt is text that stands; its syllables are closed."""
    decoder = vocabulary.decoder()
    for index in ids.tolist():
        decoder.feed(index)
    held = decoder.held
    if not held:
        return []
    text = vocabulary.decode(held)
    return [index for index in range(len(vocabulary)) if not vocabulary.decode([*held, index]).startswith(text)]


def _limit(pieces: Iterator[str], length: int, stop: str | None) -> Iterator[str]:
    """Cut after `length` characters and before `stop`; what may be the start of `stop` is held back until known."""
    left, held, silent = length, "", 0
    while left > 0:
        piece = next(pieces)
        silent = 0 if piece else silent + 1
        held += piece
        if stop is not None and (at := held.find(stop)) >= 0:
            yield held[: min(at, left)]
            return
        safe = len(held) - _overlap(held, stop) if stop is not None else len(held)
        if silent > 1000:  # symbols that never make a character, from a model that learned nothing
            return
        if safe:
            out, held = held[: min(safe, left)], held[safe:]
            left -= len(out)
            yield out


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a proper start of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
