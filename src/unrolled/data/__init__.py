"""Files to text, text to ids, ids to windows; files to tables, tables to examples, examples to batches.

    find_texts -> read_text -> encode_texts -> EncodedText -> split_text -> Lanes -> Window
    open_data -> Table -> read_values -> Values -> encode_examples -> Examples -> Batches

Text is read as a stream and its ids lie in a file that is mapped into memory, so that a text may be larger than the
memory. A text is one or more documents; between them the state is reset, and nothing is predicted across.
"""

from __future__ import annotations

from unrolled.data.encoding import DOCUMENTS, EncodedText, encode_texts, split_text
from unrolled.data.examples import (
    Bad,
    Batches,
    Examples,
    Values,
    encode_examples,
    forecast_values,
    read_values,
    series_values,
    whole_series,
)
from unrolled.data.formats import format_of
from unrolled.data.lanes import Lanes, Window
from unrolled.data.opening import open_data
from unrolled.data.reading import ERRORS, find_texts, read_text
from unrolled.data.tables import Table

__all__ = [
    "DOCUMENTS",
    "ERRORS",
    "Bad",
    "Batches",
    "EncodedText",
    "Examples",
    "Lanes",
    "Table",
    "Values",
    "Window",
    "encode_examples",
    "encode_texts",
    "find_texts",
    "forecast_values",
    "format_of",
    "open_data",
    "read_text",
    "read_values",
    "series_values",
    "split_text",
    "whole_series",
]
