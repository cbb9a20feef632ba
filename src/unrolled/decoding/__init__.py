"""Decoding: symbols chosen one after the other from a model's scores, each fed back as the next input.

    sampling   how one symbol is chosen
    writing    text from a language model

Works over `begin`, `step` and `select` only, never over a class name.
"""

from __future__ import annotations

from unrolled.decoding.sampling import Sampling, choose, next_distribution
from unrolled.decoding.writing import generate

__all__ = [
    "Sampling",
    "choose",
    "generate",
    "next_distribution",
]
