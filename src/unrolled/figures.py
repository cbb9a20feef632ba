"""A trace -> pictures, with plotly: the same in a notebook, in a report and on a page.

A figure needs no model, only what was recorded. It is drawn on white with ink that a dark page can exchange; colour
scales are transparent where zero stands, so that they hold on both. `CONFIG` has the button in a figure's corner save
it as SVG: `figure.show(config=figures.CONFIG)`.
"""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from unrolled.errors import DataError, ModelError
from unrolled.trace import Trace, gradient_norms

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = [
    "CONFIG",
    "FONT",
    "attention_map",
    "gradient_curves",
    "layer_name",
    "learning_curve",
    "next_symbols",
    "number_lines",
    "output_labels",
    "plain",
    "reads_text",
    "shown",
    "state_map",
    "step_labels",
    "unit_text",
]

CONFIG: Mapping[str, Any] = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
    "toImageButtonOptions": {"format": "svg", "filename": "unrolled"},
}
"""How plotly shows a figure: no advertisement, and a button that saves it as SVG."""

FONT = (
    "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'Apple SD Gothic Neo', 'Malgun Gothic', "
    "'Noto Sans KR', 'Noto Sans CJK KR', sans-serif"
)
"""Fonts that a reader's system has, those with Hangul among them."""
_MONO = "ui-monospace, 'SF Mono', Menlo, Consolas, 'Noto Sans Mono CJK KR', 'D2Coding', monospace"

_INK, _GRID = "#30363d", "rgba(128,136,148,0.25)"
_LINES = ("#2f6fde", "#d9623b", "#2a9d6f", "#9358c9", "#c08a10", "#3d98ab", "#c7457f", "#707a86")
_SHARE = ((0.0, "rgba(47,111,222,0)"), (0.5, "rgba(47,111,222,0.45)"), (1.0, "rgba(30,84,190,1)"))
_SIGNED = (
    (0.0, "rgba(30,84,190,1)"),
    (0.25, "rgba(47,111,222,0.55)"),
    (0.5, "rgba(128,128,128,0)"),
    (0.75, "rgba(217,98,59,0.55)"),
    (1.0, "rgba(196,70,30,1)"),
)
_SOFT = ((0.0, "rgba(47,111,222,0.7)"), (0.5, "rgba(128,128,128,0)"), (1.0, "rgba(217,98,59,0.7)"))  # below text
_UNITS = 48  # rows of a state map: more could not be told apart
_LABELLED = 90  # steps that each have their own label; of more, some


def plain(piece: str) -> str:
    """What a step reads or writes, with white space and control characters made visible."""
    text = piece.strip(" ") or piece
    for blank, mark in ((" ", "␣"), ("\n", "↵"), ("\t", "⇥")):
        text = text.replace(blank, mark)
    return "".join(c if c.isprintable() else f"U+{ord(c):04X}" for c in text)


def shown(piece: str) -> str:
    """The same as a label: nothing is left that plotly, or a page, would take for HTML."""
    return html.escape(plain(piece), quote=False)


def reads_text(trace: Trace) -> bool:
    """Whether the steps of a trace read text, so that they can be named by it."""
    return str(trace.about.get("form", "")).startswith("text")


def step_labels(trace: Trace, core: str = "core") -> list[str]:
    """A label for each step of a core: what it reads; of a decoder, the word it writes; else the step's number."""
    pieces = trace.written if core == "decoder" else trace.read if reads_text(trace) else ()
    layers = trace.layers(core)
    steps = len(trace.tensors[f"{layers[0]}.h"]) if layers else len(pieces)
    if len(pieces) == steps:
        return [shown(piece) for piece in pieces]
    return [str(t + 1) for t in range(steps)]


def _figure(height: int, *, width: int = 0, **layout: Any) -> go.Figure:
    """An empty figure in the common style. width: below so many pixels a page lets it scroll."""
    import plotly.graph_objects as go

    axis = dict(gridcolor=_GRID, zeroline=False, linecolor=_GRID, ticks="", automargin=True)
    figure = go.Figure()
    figure.update_layout(
        template="none",
        height=height,
        font=dict(family=FONT, size=13, color=_INK),
        paper_bgcolor="#ffffff",
        plot_bgcolor="rgba(0,0,0,0)",
        margin=dict(l=56, r=16, t=20, b=48),
        colorway=list(_LINES),
        xaxis=axis,
        yaxis=axis,
        hoverlabel=dict(font=dict(family=FONT, size=13)),
        legend=dict(orientation="h", yanchor="bottom", y=1.02, x=0, xanchor="left"),
        meta=dict(least_width=width),
    )
    figure.update_layout(**layout)
    return figure


def _ticks(labels: Sequence[str]) -> dict[str, Any]:
    """Labels of steps on an axis: all of them, or so many as there is room for."""
    every = max(1, math.ceil(len(labels) / _LABELLED))
    at = list(range(0, len(labels), every))
    return dict(tickmode="array", tickvals=at, ticktext=[labels[i] for i in at], tickfont=dict(size=12))


def _numbers(tensor: Tensor) -> Any:
    return tensor.detach().float().cpu().numpy()


# ---------------------------------------------------------------------------------------------------- attention


def attention_map(trace: Trace) -> go.Figure:
    """Where a decoder looked: source words along, the words it wrote down, the weight [U S] as colour.

    Raises:
        ModelError: the model has no attention.
    """
    import plotly.graph_objects as go

    weights = _numbers(trace.attention)
    source = step_labels(trace)
    target = [shown(piece) for piece in trace.written]
    longest = max(map(_width, source), default=1)
    figure = _figure(32 + 24 * len(target) + 7 * min(longest, 16), width=80 + 17 * len(source))
    figure.add_trace(
        go.Heatmap(
            z=weights,
            x=list(range(len(source))),
            y=list(range(len(target))),
            text=[[f"<b>{word}</b> looks at <b>{read}</b>" for read in source] for word in target],
            hovertemplate="%{text}: %{z:.3f}<extra></extra>",
            colorscale=_SHARE,
            zmin=0,
            zmax=1,
            xgap=1,
            ygap=1,
            colorbar=dict(thickness=10, outlinewidth=0, title=dict(text="weight", side="right"), len=0.9),
        )
    )
    figure.update_layout(margin=dict(b=12))
    figure.update_xaxes(**_ticks(source), side="top", showgrid=False, tickangle=-50 if longest > 2 else 0)
    figure.update_yaxes(**_ticks(target), autorange="reversed", showgrid=False)
    return figure


# ------------------------------------------------------------------------------------------------------- states

_FIELDS = {
    "h": "state h", "c": "cell state c", "i": "input gate i", "f": "forget gate f", "g": "candidate g",
    "o": "output gate o", "r": "reset gate r", "z": "update gate z", "n": "candidate n",
}  # fmt: skip


def layer_name(layer: str) -> str:
    """`core.0.forward` -> `layer 1`."""
    core, k, direction = layer.split(".")
    name = "layer" if core == "core" else f"{core} layer"
    return f"{name} {int(k) + 1}" + (", read backwards" if direction == "reverse" else "")


def _liveliest(values: Tensor, count: int) -> list[int]:
    """The units [T H] that change most, in order of their numbers."""
    spread = values.float().std(0, correction=0)
    return sorted(spread.argsort(descending=True, stable=True)[:count].tolist())


def state_map(trace: Trace, layer: str | None = None, *, core: str = "core", units: int = _UNITS) -> go.Figure:
    """States along time: a row for each unit (of many those that change most), a column for each step. A menu changes
    to other layers, the cell state and the gates.

    Args:
        layer: one layer only, as in `trace.layers()`; if None all of a core, the highest shown first.

    Raises:
        ModelError: there is no such layer.
    """
    import plotly.graph_objects as go

    layers = trace.layers(core)
    if layer is not None:
        core = layer.split(".")[0]
        layers = [name for name in trace.layers(core) if name == layer]
    if not layers:
        known = ", ".join(name for core in trace.cores for name in trace.layers(core))
        raise ModelError(f"no layer {layer or core} was recorded: there are {known or 'none'}")
    labels = step_labels(trace, core)
    steps = len(labels)
    figure = _figure(
        max(260, 110 + 9 * min(units, trace.tensors[f"{layers[0]}.h"].shape[1])), width=min(90 + 12 * steps, 2400)
    )
    buttons: list[str] = []
    for name in reversed(layers):
        for field, title in _FIELDS.items():
            values = trace.tensors.get(f"{name}.{field}")
            if values is None:
                continue
            chosen = _liveliest(values, units)
            gate = field in ("i", "f", "o", "r", "z")
            most = 1.0 if field != "c" else max(float(values.abs().max()), 1e-6)
            figure.add_trace(
                go.Heatmap(
                    z=_numbers(values[:, chosen]).T,
                    text=[[f"unit {unit}, step {t + 1}: {labels[t]}" for t in range(steps)] for unit in chosen]
                    if steps * len(chosen) <= 4000
                    else None,
                    hovertemplate="%{text}<br>%{z:.3f}<extra></extra>"
                    if steps * len(chosen) <= 4000
                    else "row %{y}, step %{x}: %{z:.3f}<extra></extra>",
                    colorscale=_SHARE if gate else _SIGNED,
                    zmin=0 if gate else -most,
                    zmax=most,
                    visible=not buttons,
                    name=f"{name}.{field}",
                    colorbar=dict(thickness=10, outlinewidth=0, len=0.9),
                )
            )
            buttons.append(f"{layer_name(name)}: {title}")
    menu = [
        dict(label=label, method="restyle", args=[{"visible": [i == k for i in range(len(buttons))]}])
        for k, label in enumerate(buttons)
    ]
    figure.update_layout(
        margin=dict(t=52),
        updatemenus=[dict(buttons=menu, x=0, xanchor="left", y=1, yanchor="bottom", pad=dict(b=8), showactive=True)]
        if len(menu) > 1
        else [],
    )
    figure.update_xaxes(**_ticks(labels), showgrid=False, title=None if reads_text(trace) else "step")
    figure.update_yaxes(autorange="reversed", showgrid=False, showticklabels=False, title="units")
    return figure


def _width(text: str) -> int:
    """Half-width cells that a text takes: a Hangul syllable is two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 0 if unicodedata.combining(c) else 1 for c in text)


def _wrapped(pieces: Sequence[str], columns: int) -> list[tuple[int, int, int]]:
    """Row, column and width of each piece, in lines of so many cells; a line break is a cell and ends its line."""
    places = []
    row = column = 0
    for piece in pieces:
        width = min(max(_width(piece.replace("\n", "↵")), 1), columns)
        if column + width > columns:
            row, column = row + 1, 0
        places.append((row, column, width))
        column += width
        if piece.endswith("\n"):
            row, column = row + 1, 0
    return places


def unit_text(
    trace: Trace, units: int | Sequence[int] | None = None, *, layer: str | None = None, columns: int = 96
) -> go.Figure:
    """The text that was read, each step coloured by what one unit holds after it: an LSTM's cell state (through tanh),
    else h. A menu changes the unit.

    Source: Karpathy, Johnson and Fei-Fei 2016.

    Args:
        units: which; if None the six of the layer that change most.
        layer: as in `trace.layers()`; if None the highest, read forwards.
        columns: half-width characters in a line.

    Raises:
        DataError: the trace has not read text. ModelError: there is no such layer or unit.
    """
    import plotly.graph_objects as go

    if not reads_text(trace):
        raise DataError(f"a unit colours text, and here there is none to colour: {trace.about.get('form', 'no text')}")
    layers = trace.layers()
    layer = [name for name in layers if name.endswith(".forward")][-1] if layer is None else layer
    if layer not in layers:
        raise ModelError(f"no layer {layer} was recorded: there are {', '.join(layers)}")
    cell = trace.tensors.get(f"{layer}.c")
    values = trace.tensors[f"{layer}.h"] if cell is None else cell.float().tanh()
    size = values.shape[1]
    if units is None:
        spread = values.float().std(0, correction=0)
        units = spread.argsort(descending=True, stable=True)[:6].tolist()
    chosen = [units] if isinstance(units, int) else list(units)
    wrong = [unit for unit in chosen if not 0 <= unit < size]
    if wrong or not chosen:
        raise ModelError(f"unit: expected 0 to {size - 1}, got {wrong[0] if wrong else 'none'}")
    pieces = trace.read[: len(values)]
    places = _wrapped(pieces, columns)
    rows = places[-1][0] + 1
    columns = max(column + width for _, column, width in places)
    figure = _figure(30 + (62 if len(chosen) > 1 else 20) + 24 * rows, width=min(60 + 9 * columns, 900))
    where = np.full((rows, columns), -1)
    for t, (row, column, width) in enumerate(places):
        where[row, column : column + width] = t
    hover = [["" if t < 0 else f"step {t + 1}: {shown(pieces[t])}" for t in line] for line in where.tolist()]
    numbers = _numbers(values)
    for k, unit in enumerate(chosen):
        figure.add_trace(
            go.Heatmap(
                z=np.where(where < 0, np.nan, numbers[where, unit]),
                text=hover,
                hovertemplate="%{text}<br>%{z:.3f}<extra></extra>",
                hoverongaps=False,
                colorscale=_SOFT,
                zmin=-1,
                zmax=1,
                showscale=False,
                visible=k == 0,
                name=f"{layer} unit {unit}",
            )
        )
    letters = [
        (row, column, c)
        for piece, (row, start, _) in zip(pieces, places, strict=True)
        for column, c in _letters(piece, start)
        if c.strip()
    ]
    figure.add_trace(
        go.Scatter(
            x=[column for _, column, _ in letters],
            y=[row for row, _, _ in letters],
            text=[shown(c) for _, _, c in letters],
            mode="text",
            textfont=dict(family=_MONO, size=13),
            hoverinfo="skip",
            showlegend=False,
        )
    )
    menu = [
        dict(
            label=f"unit {unit}",
            method="restyle",
            args=[{"visible": [i == k for i in range(len(chosen))] + [True]}],
        )
        for k, unit in enumerate(chosen)
    ]
    figure.update_layout(
        margin=dict(l=8, r=8, t=52 if len(menu) > 1 else 12, b=8),
        updatemenus=[
            dict(
                type="buttons", direction="right", buttons=menu, x=0, xanchor="left", y=1, yanchor="bottom",
                pad=dict(b=10), showactive=True,
            )
        ]
        if len(menu) > 1
        else [],
    )  # fmt: skip
    figure.update_xaxes(visible=False, range=[-0.5, columns - 0.5], fixedrange=True)
    figure.update_yaxes(visible=False, range=[rows - 0.5, -0.5], fixedrange=True)
    return figure


def _letters(piece: str, start: int) -> list[tuple[float, str]]:
    """Each character of a piece and the middle of its cells."""
    found, column = [], float(start)
    for c in piece.replace("\n", "↵"):
        width = _width(c)
        found.append((column + (max(width, 1) - 1) / 2, c))
        column += width
    return found


# ------------------------------------------------------------------------------------------------ what comes out


def next_symbols(trace: Trace, *, start: int = 0, steps: int = 40, best: int = 6) -> go.Figure:
    """What the model expects at each output step: the likeliest symbols or labels, the likeliest on top, probability as
    colour; what was said, or really came, is framed. Where there is one answer to the whole input, bars.

    Args:
        start, steps: which part of it.
        best: how many symbols a step.

    Raises:
        ModelError: numbers come out, which are no choice among symbols.
        DataError: there is no such step.
    """
    import plotly.graph_objects as go

    if "scores.names" not in trace.tensors:
        raise ModelError("numbers come out of this model, no choice among symbols: see number_lines")
    names, values = trace.tensors["scores.names"], trace.tensors["scores.values"]
    if not 0 <= start < len(names):
        raise DataError(f"start: expected a step, 0 to {len(names) - 1}, got {start}")
    names, values = names[start : start + steps, :best], values[start : start + steps, :best]
    share = _numbers(values.float().exp())
    text = [[shown(trace.names[i]) for i in row] for row in names.tolist()]
    if len(trace.tensors["scores.names"]) == 1:
        figure = _figure(60 + 30 * len(text[0]))
        figure.add_trace(
            go.Bar(
                x=share[0], y=list(range(len(text[0]))), orientation="h", marker=dict(color=_LINES[0]),
                text=[f"{p:.1%}" for p in share[0].tolist()], textposition="auto", width=0.7,
                customdata=text[0], hovertemplate="%{customdata}: %{x:.4f}<extra></extra>",
            )
        )  # fmt: skip
        figure.update_xaxes(range=[0, 1.0], tickformat=".0%")
        figure.update_yaxes(
            tickmode="array", tickvals=list(range(len(text[0]))), ticktext=text[0], autorange="reversed", showgrid=False
        )
        figure.update_layout(margin=dict(l=90))
        return figure
    at = output_labels(trace)[start : start + steps]
    longest = max(_width(word) for word in [*at, *(word for row in text for word in row)])
    figure = _figure(56 + 30 * len(text[0]), width=90 + max(30, 8 * min(longest, 14) + 10) * len(at))
    figure.add_trace(
        go.Heatmap(
            z=share.T,
            text=[list(row) for row in zip(*text, strict=True)],
            texttemplate="%{text}",
            textfont=dict(size=13),
            customdata=[at] * share.shape[1],
            hovertemplate="at %{customdata}: <b>%{text}</b> %{z:.3f}<extra></extra>",
            colorscale=((0.0, "rgba(47,111,222,0)"), (1.0, "rgba(47,111,222,0.75)")),
            zmin=0,
            zmax=1,
            xgap=2,
            ygap=2,
            colorbar=dict(thickness=10, outlinewidth=0, tickformat=".0%", len=1.0),
        )
    )
    said = trace.tensors["chosen"][start : start + steps]
    frames = [
        dict(
            type="rect", x0=t - 0.47, x1=t + 0.47, y0=rank - 0.45, y1=rank + 0.45, line=dict(color=_LINES[1], width=2)
        )
        for t, row in enumerate(names.tolist())
        for rank, i in enumerate(row)
        if i == int(said[t])
    ]  # fmt: skip
    figure.update_layout(shapes=frames)
    figure.update_xaxes(**_ticks(at), showgrid=False, side="top", range=[-0.5, len(at) - 0.5])
    figure.update_yaxes(
        tickmode="array", tickvals=list(range(len(text[0]))), ticktext=[f"{i + 1}." for i in range(len(text[0]))],
        autorange="reversed", showgrid=False,
    )  # fmt: skip
    figure.update_layout(margin=dict(t=40, b=12, l=34))
    return figure


def output_labels(trace: Trace) -> list[str]:
    """What stands over each output step: what is read there, else what is written."""
    steps = len(trace.tensors["scores.names"])
    if "decoder" in trace.cores or not reads_text(trace):
        words: Sequence[str] = trace.written
        return [shown(word) for word in words] if "decoder" in trace.cores else [str(t + 1) for t in range(steps)]
    if len(trace.read) == steps:
        return [shown(piece) for piece in trace.read]
    words = "".join(trace.read).split()  # characters are read, and words are labelled
    return [shown(word) for word in words] if len(words) == steps else [str(t + 1) for t in range(steps)]


def number_lines(trace: Trace, *, columns: int = 4) -> go.Figure:
    """The numbers that come out, step by step; of a forecast beside those that were read, each at the step it is of.

    Where the trace knows the scale they are in their own units, else in deviations from the training part's mean.

    Raises:
        ModelError: no numbers come out.
    """
    import plotly.graph_objects as go

    if "numbers" not in trace.tensors:
        raise ModelError("no numbers come out of this model: see next_symbols")
    out = _unscaled(trace, "written", trace.tensors["numbers"])
    forecast = " -> next" in str(trace.about.get("form", ""))
    figure = _figure(340, width=480)
    for column in range(min(columns, out.shape[1])):
        name, colour = (f"column {column + 1}" if out.shape[1] > 1 else ""), _LINES[column % len(_LINES)]
        if forecast:
            read = _unscaled(trace, "read", trace.tensors["core.inputs"])[:, column]
            figure.add_trace(
                go.Scatter(
                    y=read, x=list(range(1, len(read) + 1)), name=f"read {name}".strip(), mode="lines",
                    line=dict(color=colour, width=1.5), opacity=0.45,
                )
            )  # fmt: skip
        figure.add_trace(
            go.Scatter(
                y=out[:, column],
                x=list(range(1 + forecast, len(out) + 1 + forecast)),
                name=f"{'forecast' if forecast else 'answer'} {name}".strip(),
                mode="lines" if len(out) > 1 else "markers",
                line=dict(color=colour, width=2, dash="dot" if forecast else "solid"),
                marker=dict(size=10),
            )
        )
    figure.update_xaxes(title="step")
    figure.update_yaxes(title=None if "scales" in trace.about else "deviations from the mean")
    figure.update_layout(showlegend=True, margin=dict(t=40))
    return figure


def _unscaled(trace: Trace, side: str, numbers: Tensor) -> Any:
    """Numbers [T F] as they were before they were scaled, if that is known."""
    found = _numbers(numbers).reshape(len(numbers), -1).astype(np.float64)
    scale = trace.about.get("scales", {}).get(side)
    return found if scale is None else found * np.asarray(scale["deviation"]) + np.asarray(scale["mean"])


# ------------------------------------------------------------------------------------------------------ gradients


def gradient_curves(traces: Trace | Mapping[str, Trace], *, core: str = "core") -> go.Figure:
    """How far a gradient reaches: its norm |dL/dh| at so many steps before the last one that has any, as a share of the
    norm there, for every layer of every trace, on a logarithmic scale; of an LSTM also |dL/dc|, dashed. Several models
    stand side by side when the same text was recorded with each.

    traces: recorded with `gradient=True, at=-1`; several by their names.

    Raises:
        ModelError: a trace has no gradients.
    """
    import plotly.graph_objects as go

    several = not isinstance(traces, Trace)
    named: Mapping[str, Trace] = traces if isinstance(traces, Mapping) else {"": traces}
    figure = _figure(340, width=320)
    number = lowest = 0
    for name, trace in named.items():
        parts = [
            (layer, field) for layer in trace.layers(core) for field in "hc" if f"{layer}.d{field}" in trace.tensors
        ]
        for layer, field in parts or [(layer, "h") for layer in trace.layers(core)]:
            norms = gradient_norms(trace, layer, field)
            back = (norms if layer.endswith(".reverse") else norms.flip(0)).double()
            real = back.nonzero()
            back = back[int(real[0]) :] if len(real) else back[:0]
            if not len(back):
                continue
            curve = (back / back[0]).tolist()
            lowest = min(lowest, *(math.floor(math.log10(y)) for y in curve if y > 0))
            label = layer_name(layer) + (", c" if field == "c" else "")
            number += field == "h"
            figure.add_trace(
                go.Scatter(
                    x=list(range(len(curve))),
                    y=[y if y > 0 else None for y in curve],
                    mode="lines" if len(curve) > 1 else "markers",
                    name=f"{name}, {label}" if several else label,
                    line=dict(
                        width=2,
                        color=_LINES[(number - 1) % len(_LINES)],
                        dash="dash" if field == "c" else "solid",
                    ),
                    hovertemplate="%{x} steps back: %{y:.3g}",
                )
            )
    if len(figure.data):
        figure.add_hline(y=1e-3, line=dict(color="#8a93a0", width=1, dash="dot"))
    figure.update_xaxes(title="steps back")
    figure.update_yaxes(
        type="log", title="share of the gradient", exponentformat="power", dtick=max(1, math.ceil(-lowest / 6))
    )
    figure.update_layout(showlegend=True, margin=dict(t=40, l=72), hovermode="closest")
    return figure


# --------------------------------------------------------------------------------------------------------- learning


def learning_curve(metrics: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Mapping[str, Any]]]) -> go.Figure:
    """The loss of training and of validation over the updates; several models by their names.

    metrics: the lines of `metrics.jsonl`.

    Raises:
        DataError: there is no line with a loss.
    """
    import plotly.graph_objects as go

    named = metrics if isinstance(metrics, Mapping) else {"": metrics}
    lines_of = {name: [line for line in lines if "step" in line] for name, lines in named.items()}
    every = [line for lines in lines_of.values() for line in lines]
    key = "nats_per_char" if every and all("nats_per_char" in line for line in every) else "loss"
    if not any(key in line for line in every):
        raise DataError("there is no learning curve: the log of the training has no line with a loss")
    figure = _figure(320, width=320)
    for k, (name, lines) in enumerate(lines_of.items()):
        colour = _LINES[k % len(_LINES)]
        for kind, title in (("train", "training"), ("valid", "validation")):
            rows = [line for line in lines if line.get("kind") == kind and key in line]
            if not rows:
                continue
            validation = kind == "valid"
            figure.add_trace(
                go.Scatter(
                    x=[row["step"] for row in rows],
                    y=[row[key] for row in rows],
                    mode="lines+markers" if validation else "lines",
                    name=f"{name}, {title}" if name else title,
                    opacity=1 if validation else 0.5,
                    line=dict(width=2 if validation else 1.5, color=_LINES[1] if validation and not name else colour),
                    marker=dict(size=6),
                    customdata=[row.get("epoch", 0) for row in rows],
                    hovertemplate="update %{x}, epoch %{customdata:.1f}: %{y:.4f}",
                )
            )
    figure.update_xaxes(title="updates", rangemode="tozero")
    figure.update_yaxes(title="nats per character" if key == "nats_per_char" else "loss")
    figure.update_layout(showlegend=True, margin=dict(t=40))
    return figure
