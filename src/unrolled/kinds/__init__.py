"""What may stand at an end of a model. A new kind is a file here that keeps `contract.Input` or `contract.Output`."""

from __future__ import annotations

from unrolled.kinds.contract import INPUTS, OUTPUTS, Answer, Ends, Input, Output, register
from unrolled.kinds.label import Label, Labels
from unrolled.kinds.number import Number, Numbers
from unrolled.kinds.text import NextSymbol, Text
from unrolled.kinds.written import Written

__all__ = [
    "INPUTS",
    "OUTPUTS",
    "Answer",
    "Ends",
    "Input",
    "Label",
    "Labels",
    "NextSymbol",
    "Number",
    "Numbers",
    "Output",
    "Text",
    "Written",
    "register",
]
