"""A language model over a text -> figures."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unrolled.data import EncodedText, encode_texts
from unrolled.errors import ConfigError, DataError
from unrolled.kinds.text import IGNORE
from unrolled.model import LanguageModel
from unrolled.progress import Silent, Watcher

__all__ = ["Evaluation", "evaluate_text"]


@dataclass(frozen=True)
class Evaluation:
    """How well a language model predicts a text.

    Attributes:
        nats_per_char: the summed cross-entropy of all predicted symbols in nats, divided by the number of
            characters they make: comparable between models of any unit. A jamo or subword model's figure is per
            character (Korean: per syllable) too.
        bits_per_char: the same in bits.
        perplexity: exp of the nats per symbol of the model's own unit.
        nats_per_unit: the same before exp.
        characters: characters that were predicted: those that begin in a symbol that was.
        units: symbols that were predicted: all but each document's first.
        unknown: symbols of the text that the model never saw. They count as the one unknown symbol, so that with
            many of them the figures flatter the model.
        seconds: how long it took.
    """

    nats_per_char: float
    bits_per_char: float
    perplexity: float
    nats_per_unit: float
    characters: int
    units: int
    unknown: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers, for JSON."""
        return asdict(self)


def evaluate_text(
    model: LanguageModel,
    texts: str | Path | Sequence[str | Path] | EncodedText,
    *,
    lanes: int = 1,
    warm: int = 256,
    errors: str | None = None,
    watcher: Watcher | None = None,
) -> Evaluation:
    """The cross-entropy of a text under a model, the state carried through the whole of it.

    Args:
        texts: files or folders, or a text that is encoded already. Documents begin with a fresh state.
        lanes: 1 reads the text from end to end, exactly. More read it at so many places at once, faster; each
            lane but the first reads `warm` symbols before its part without counting them, so that the state is
            almost what it would be.
        errors: `"strict"` or `"replace"` for bytes that are not UTF-8; the model's own setting if None.

    Raises:
        DataError: a text that cannot be read, or with fewer than two symbols.
        ConfigError: lanes below 1 or warm below 0.
    """
    if lanes < 1:
        raise ConfigError(f"lanes: expected at least 1, got {lanes}")
    if warm < 0:
        raise ConfigError(f"warm: expected at least 0 symbols, got {warm}")
    watcher = watcher or Silent()
    if not isinstance(texts, EncodedText):
        data = model.config.data
        paths = [texts] if isinstance(texts, str | Path) else list(texts)
        texts = encode_texts(paths, model.vocabulary, documents=data.documents, errors=errors or data.errors)
    if len(texts) < 2:
        raise DataError(
            f"the text has {len(texts)} symbol; evaluating takes at least 2, one to read and one to predict"
        )
    began = time.perf_counter()
    nats, units = _cross_entropy(model, texts, min(lanes, len(texts) - 1), warm, watcher)
    if units == 0:
        raise DataError("every document of the text is a single symbol: there is nothing to predict")
    characters = max(texts.predicted_characters, 1)
    return Evaluation(
        nats_per_char=nats / characters,
        bits_per_char=nats / characters / math.log(2),
        perplexity=_exp(nats / units),
        nats_per_unit=nats / units,
        characters=characters,
        units=units,
        unknown=texts.unknown,
        seconds=time.perf_counter() - began,
    )


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


@torch.inference_mode()
def _cross_entropy(
    model: LanguageModel, text: EncodedText, lanes: int, warm: int, watcher: Watcher
) -> tuple[float, int]:
    """Summed nats and the number of predicted symbols."""
    steps = len(text) - 1
    per_lane = -(-steps // lanes)
    warm = warm if lanes > 1 else 0
    # Lane b counts the steps [b * per_lane, (b + 1) * per_lane) and starts `warm` earlier; positions before the
    # text read its first symbol, uncounted, and the reset at position 0 then clears what they did.
    first = np.arange(lanes) * per_lane
    starts = text.starts
    window = max(1, min(2048, 8192 // lanes))  # so that measuring takes no more memory than training does
    device = model.writer.weight.device
    training = model.training
    model.eval()
    state = model.begin(batch=lanes)
    nats, units = 0.0, 0
    watcher.start("evaluating", warm + per_lane)
    try:
        for t in range(-warm, per_lane, window):
            offsets = np.arange(t, min(t + window, per_lane))[:, None]
            position = first[None, :] + offsets
            counted = (offsets >= 0) & (position < steps)
            position = np.clip(position, 0, steps - 1)
            border = np.isin(position, starts)
            counted &= ~np.isin(position + 1, starts)
            ids = torch.from_numpy(text.ids[position].astype(np.int64)).to(device)
            target = np.where(counted, text.ids[position + 1].astype(np.int64), IGNORE)
            reset = torch.from_numpy(border).to(device) if border.any() else None
            loss, state = model.loss(ids, torch.from_numpy(target).to(device), state, reset=reset)
            nats += float(loss)
            units += int(counted.sum())
            watcher.update(t + warm + len(offsets), f"{nats / max(units, 1):.4f} nats per symbol")
    finally:
        watcher.stop()
        model.train(training)
    return nats, units
