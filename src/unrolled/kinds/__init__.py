"""Kinds: what may stand at an end of a model. A reader turns a raw value into steps of vectors; a writer turns
hidden states into scores, a loss, and output. One file per kind."""

__all__: list[str] = []
