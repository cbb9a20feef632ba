"""Small texts and small models, for tests that need some and do not care which."""

from __future__ import annotations

import random
from typing import Any

import torch

from unrolled.config import flag_key, resolve
from unrolled.model import LanguageModel
from unrolled.vocabulary import build_vocabulary


def sentences(words: str, lines: int, seed: int = 0) -> str:
    """Lines of words drawn at random, the same for the same seed."""
    draw, choice = random.Random(seed), words.split()
    return "".join(" ".join(draw.choice(choice) for _ in range(draw.randint(2, 6))) + ".\n" for _ in range(lines))


ENGLISH = sentences("the The a cat dog sat saw on mat hill and red old sun", 120)
KOREAN = sentences("나는 너는 학교에 집에 갑니다 옵니다 밥을 물을 먹고 닭이 운다 ㅋㅋㅋ a", 120)


def small_model(
    unit: str = "char", text: str = KOREAN, *, dtype: torch.dtype = torch.float64, seed: int = 0, **settings: Any
) -> LanguageModel:
    """A model with random weights, large enough that what it has read makes its next scores clearly differ.

    In float64 and in evaluation mode; settings are plain names.
    """
    chosen = {"hidden": 8, "layers": 1, "max_vocabulary": 300, "unit": unit, **settings}
    layers = []
    for name, value in chosen.items():
        section, key = flag_key(name).split(".")
        layers.append({section: {key: value}})
    config = resolve(*layers)
    vocabulary = build_vocabulary(unit, [text], max_size=config.input.max_vocabulary)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LanguageModel(config, vocabulary)
        with torch.no_grad():
            for parameter in model.core.parameters():
                parameter.mul_(3)
            model.writer.weight.copy_(torch.randn(model.writer.weight.shape))
    return model.to(dtype).eval()
