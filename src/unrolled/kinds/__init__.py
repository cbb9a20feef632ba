"""Kinds: what may stand at an end of a model. A reader turns a raw value into steps of vectors; a writer turns
hidden states into scores, a loss, and output. One file per kind; importing any of them makes all of them known."""

from unrolled.kinds.image import Image
from unrolled.kinds.label import Label, Labels
from unrolled.kinds.next import Next
from unrolled.kinds.number import Number, Numbers
from unrolled.kinds.series import Series, Vector
from unrolled.kinds.text import Text
from unrolled.kinds.video import Video

__all__ = ["Image", "Label", "Labels", "Next", "Number", "Numbers", "Series", "Text", "Vector", "Video"]
