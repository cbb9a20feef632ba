"""Looking inside one run: what it recorded, where it looked, how far its gradient reaches.

recording   a run as a value (`Trace`), kept as one file
looking     attention as numbers
gradients   gradient flow as numbers, and what they mean
units       single units over a whole text: what drives them, and what is lost without them
"""

from __future__ import annotations

from unrolled.trace.gradients import Flow, gradient_flow, gradient_norms, step_singular_values, verdict
from unrolled.trace.recording import Trace, load_trace, record, record_layer, save_trace

__all__ = [
    "Flow",
    "Trace",
    "gradient_flow",
    "gradient_norms",
    "load_trace",
    "record",
    "record_layer",
    "save_trace",
    "step_singular_values",
    "verdict",
]
