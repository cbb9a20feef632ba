"""Writing: text from a language model, each symbol drawn from its scores and fed back as the next input."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unrolled.decoding.sampling import NOT_FINITE, Sampling, choose, next_distribution, uniforms
from unrolled.errors import ConfigError, DataError, ModelError
from unrolled.model import LanguageModel, Model
from unrolled.vocabulary import Vocabulary

if TYPE_CHECKING:
    from unrolled.native import Writer

__all__ = ["generate"]


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
        ModelError: the model is no language model; while writing, if the model's scores are not finite.
    """
    if not isinstance(model, LanguageModel):
        raise ModelError(f"this model is {model.form}: only a language model (text -> next) writes on; see predict")
    sampling = Sampling(repetition_penalty, repetition_window, temperature, top_k, top_p)
    if length < 0:
        raise ConfigError(f"length: expected at least 0 characters, got {length}")
    if stop == "":
        raise ConfigError("stop: expected at least one character, got an empty string")
    ids = _prompt_ids(model, prompt)
    return _limit(_write(model, ids, sampling, seed), length, stop)


def _prompt_ids(model: LanguageModel, prompt: str) -> Tensor:
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


@torch.inference_mode()  # torch enters and leaves it around every piece, so the caller's own mode stays as it was
def _write(model: LanguageModel, ids: Tensor, sampling: Sampling, seed: int | None) -> Iterator[str]:
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
    for ahead in uniforms(seed):
        for uniform in ahead.tolist():
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
    for ahead in uniforms(seed):
        # The text appears as it is made: little at first, so that nobody waits for the first letters.
        size = 8 if first else 32
        for piece in (ahead[i : i + size] for i in range(0, len(ahead), size)):
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
                    raise ModelError(NOT_FINITE)
                yield choice


@contextmanager
def _evaluating(model: LanguageModel) -> Iterator[None]:
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
