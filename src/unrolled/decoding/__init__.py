"""Decoding: symbols chosen one after the other from a model's scores, each fed back as the next input.

    sampling     how one symbol is chosen
    writing      text from a language model, as it is made
    beam         whole sequences for many rows at once: beam search, greedy, drawn
    hypotheses   what came of a search, and what its ways share

Works over `begin`, `step` and `select` only, never over a class name.
"""

from __future__ import annotations

from unrolled.decoding.beam import BeamSettings, beam_search, greedy, sample
from unrolled.decoding.hypotheses import Hypothesis, Stepped
from unrolled.decoding.sampling import Sampling, choose, next_distribution
from unrolled.decoding.writing import generate

__all__ = [
    "BeamSettings",
    "Hypothesis",
    "Sampling",
    "Stepped",
    "beam_search",
    "choose",
    "generate",
    "greedy",
    "next_distribution",
    "sample",
]
