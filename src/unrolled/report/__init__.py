"""A model or a recorded run as one page that opens without a network, with a sentence to every picture.

page        a report as a value, and as HTML; beside it the style and the script of the page
sections    a trace -> what there is to be seen in it
inspecting  a model, or two, and an input -> a report
"""

from __future__ import annotations

from unrolled.report.inspecting import compare, given, inspect, write_examples
from unrolled.report.page import Report, Section, expect_place

__all__ = ["Report", "Section", "compare", "expect_place", "given", "inspect", "write_examples"]
