"""What may stand at an end of a model. A new kind is a file here that keeps `contract.Input` or `contract.Output`; to
import any of them makes all of them known."""

from __future__ import annotations

from unrolled.kinds.contract import INPUTS, OUTPUTS, Answer, Ends, Input, Output, register
from unrolled.kinds.image import Image
from unrolled.kinds.label import Label, Labels
from unrolled.kinds.next import Next
from unrolled.kinds.number import Number, Numbers
from unrolled.kinds.series import Series, Vector
from unrolled.kinds.text import NextSymbol, Text
from unrolled.kinds.video import Video
from unrolled.kinds.written import Written

__all__ = [
    "INPUTS",
    "OUTPUTS",
    "Answer",
    "Ends",
    "Image",
    "Input",
    "Label",
    "Labels",
    "Next",
    "NextSymbol",
    "Number",
    "Numbers",
    "Output",
    "Series",
    "Text",
    "Vector",
    "Video",
    "Written",
    "register",
]
