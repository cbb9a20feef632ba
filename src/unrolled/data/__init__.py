"""Files to text, text to ids, ids to windows.

    find_texts -> read_text -> encode_texts -> EncodedText -> split_text -> Lanes -> Window

Text is read as a stream and its ids lie in a file that is mapped into memory, so that a text may be larger than the
memory. A text is one or more documents; between them the state is reset, and nothing is predicted across.
"""

from __future__ import annotations

from unrolled.data.encoding import DOCUMENTS, EncodedText, encode_texts, split_text
from unrolled.data.lanes import Lanes, Window
from unrolled.data.reading import ERRORS, find_texts, read_text

__all__ = [
    "DOCUMENTS",
    "ERRORS",
    "EncodedText",
    "Lanes",
    "Window",
    "encode_texts",
    "find_texts",
    "read_text",
    "split_text",
]
