"""The unrolled network of the lecture notes, drawn from one run: boxes x_t -> h_t -> y_t with the values they had.

A picture is one SVG text that needs nothing else: no script, no font, no other file. Steps are counted from 1, as in
the notes: h_0 is the state before the first.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unrolled.errors import ConfigError, ModelError, StorageError
from unrolled.trace import Trace

__all__ = ["Picture", "unrolled_svg"]

_WIDTH, _GAP = 92, 36  # of a box, and between two columns
_HALF = 78  # the width of a box where a column has two, one for each direction
_DOTS = 34  # the column that stands for the steps left out
_CELL = 13  # the height of the row of units
_MOST = 8  # units shown at most
_LINE = 7.0  # the width of the line of an attention weight of 1


def unrolled_svg(
    trace: Trace,
    *,
    rolled: bool = False,
    start: int | None = None,
    steps: int = 8,
    units: Sequence[int] | None = None,
    title: str | None = None,
) -> str:
    """One recorded run as the picture of the lecture notes, an SVG text.

    Every box holds what it held in the run: x_t the symbol, word or numbers that were read; h_t some units of the state
    (and of an LSTM's c below it) as coloured cells, one colour above zero and one below, as strong as the value is
    great; y_t what was said and its probability, also as a bar. Pointing at a thing tells its exact values.

    Arrows: solid, what a step computes with; dashed, a symbol that is written and read again at the next step (of a
    text that was read: where what the model finds likeliest is what came); lines into a small circle, attention, as
    wide as its weight is great.

    Args:
        trace: of any model or layer.
        rolled: one step in place of many, and a loop in place of the arrows to the next.
        start: the first step to show, from 0; None: the first. Of a core with fewer steps, or too few left, the last
            `steps` are shown. Rolled, it is the step that is shown; None: the last one of what reads, the first one of
            what writes.
        steps: how many at most; what is left out before or after is told by an ellipsis.
        units: which units are shown; None: 8 of each layer, those that vary most over the run.
        title: the headline; None: the form.

    Raises:
        ConfigError: steps below 1, or a start or unit that the trace does not have.
        ModelError: the trace holds no states.
    """
    if steps < 1:
        raise ConfigError(f"steps: expected at least 1, got {steps}")
    if not trace.cores:
        raise ModelError("this trace holds no states: there is nothing to draw")
    longest = max(_length(trace, core) for core in trace.cores)
    if start is not None and not 0 <= start < longest:
        raise ConfigError(f"start: expected 0 to {longest - 1}, got {start}")
    hidden = min(trace.tensors[f"{layer}.h"].shape[1] for core in trace.cores for layer in trace.layers(core))
    for unit in units or ():
        if not 0 <= unit < hidden:
            raise ConfigError(f"units: expected 0 to {hidden - 1}, got {unit}")
    if units is not None and not 1 <= len(units) <= 16:
        raise ConfigError(f"units: expected 1 to 16 of them, got {len(units)}")
    return _Drawing(trace, rolled, start, steps, units, title).svg()


@dataclass(frozen=True)
class Picture:
    """A picture that notebooks show by themselves."""

    svg: str

    @classmethod
    def of(cls, trace: Trace, **settings: Any) -> Picture:
        """The picture of a trace; settings and errors are those of `unrolled_svg`."""
        return cls(unrolled_svg(trace, **settings))

    def save(self, path: str | Path) -> None:
        """Write the picture as a file.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            Path(path).write_text(self.svg, encoding="utf-8")
        except OSError as error:
            raise StorageError(f"{path}: cannot write the picture: {error.strerror or error}") from error

    def _repr_svg_(self) -> str:
        return self.svg


# --------------------------------------------------------------------------------------------------- what is said


def _length(trace: Trace, core: str) -> int:
    return len(trace.tensors[f"{trace.layers(core)[0]}.h"])


@dataclass(frozen=True)
class _Said:
    """What comes out at one step. at: the core's step it belongs to, or its last where it is of all of them."""

    at: int
    text: str
    share: float | None  # its probability; None: numbers
    more: str  # for pointing at


def _numbers(row: Tensor, scale: Mapping[str, Any] | None) -> list[float]:
    values = row.double().flatten().tolist()
    if scale is None or len(values) % len(scale["mean"]):
        return values
    times = len(values) // len(scale["mean"])
    columns = zip(values, scale["mean"] * times, scale["deviation"] * times, strict=True)
    # What float32 leaves of a 0 is no number to show.
    return [0.0 if abs(v * d + m) < 1e-6 * d else v * d + m for v, m, d in columns]


def _short(values: Sequence[float]) -> str:
    """As many numbers as a box has room for, whole ones."""
    text = f"{values[0]:.3g}"
    for n, value in enumerate(values[1:], 2):
        more = f"{text}, {value:.3g}"
        if len(more) + (0 if n == len(values) else 3) > 11:
            return f"{text}, …"
        text = more
    return text


def _exact(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values[:64]) + (", …" if len(values) > 64 else "")


def _said(trace: Trace) -> list[_Said]:
    tensors = trace.tensors
    last = "decoder" if "decoder" in trace.cores else "core"
    length = _length(trace, last)
    if "numbers" in tensors:
        scale = trace.about.get("scales", {}).get("written")
        rows = [_numbers(row, scale) for row in tensors["numbers"]]
        return [_Said(at, _short(row), None, _exact(row)) for at, row in zip(_places(trace, length), rows, strict=True)]
    if "chosen" not in tensors:
        return []
    said = []
    best, log_p = tensors["scores.names"], tensors["scores.values"].double()
    score = tensors["chosen.score"].double().exp()
    for u, at in enumerate(_places(trace, length)):
        # Of a text that was read, what was chosen is what came next; what the model says is what it finds likeliest.
        share = float(log_p[u, 0].exp() if _is_language_model(trace) else score[u])
        named = zip(best[u].tolist()[:5], log_p[u].exp().tolist()[:5], strict=True)
        more = "; ".join(f"{_plain(trace.names[i])} {p:.4g}" for i, p in named)
        right = trace.expected[u] if u < len(trace.expected) else None
        more += "" if right is None or right == trace.written[u] else f"; expected {_plain(right)}"
        said.append(_Said(at, trace.written[u], share, more))
    return said


def _places(trace: Trace, length: int) -> list[int]:
    """The step at which each output is given."""
    if "ends" in trace.tensors:
        return [int(at) for at in trace.tensors["ends"].tolist()]
    count = len(trace.tensors["numbers" if "numbers" in trace.tensors else "chosen"])
    return [length - 1] if count == 1 else list(range(count))


def _is_language_model(trace: Trace) -> bool:
    return len(trace.expected) == len(trace.read) - 1 and "autoregressive" in str(trace.about.get("form"))


@dataclass(frozen=True)
class _Read:
    text: str
    more: str
    fed: bool = False  # what was written a step before is read again
    number: bool = False


def _reads(trace: Trace, core: str) -> list[_Read]:
    """What each step of a core reads."""
    length = _length(trace, core)
    if core == "decoder":
        words = ["<s>", *trace.written[:-1]]
        return [_Read(word, _plain(word), fed=t > 0) for t, word in enumerate(words)]
    scale = trace.about.get("scales", {}).get("read")
    inputs = trace.tensors.get("core.inputs")
    if scale is not None and inputs is not None and inputs.is_floating_point():
        rows = [_numbers(row, scale) for row in inputs[: len(trace.read)]]
        found = [_Read(_short(row), _exact(row), number=True) for row in rows]
    else:
        found = [_named(trace, t, text) for t, text in enumerate(trace.read)]
    if _is_language_model(trace):
        found = [
            _Read(one.text, one.more, fed=t > 0 and trace.written[t - 1] == one.text) for t, one in enumerate(found)
        ]
    if len(found) < length:  # one-to-many: the input is the first step
        zeros = trace.about.get("feed") == "zeros"
        for word in trace.written[: length - len(found)]:
            found.append(_Read("0", "zeros") if zeros else _Read(word, _plain(word), fed=True))
    return found


def _named(trace: Trace, t: int, text: str) -> _Read:
    """A step of text as it is; of an image or video its name; of other numbers the first of them."""
    given = str(trace.about.get("form")).split(" ")[0]
    inputs = trace.tensors.get("core.inputs")
    if given in ("image", "video"):
        name = f"frame {t + 1}" if given == "video" else "image" if len(trace.read) == 1 else f"row {t + 1}"
        return _Read(name, f"{name}, its first numbers {text}", number=True)
    if given == "text" or inputs is None or not inputs.is_floating_point():
        return _Read(text, _plain(text))
    return _Read(_short([float(number) for number in text.split()]), _exact(inputs[t].tolist()), number=True)


# ------------------------------------------------------------------------------------------------------ text


def _plain(text: str) -> str:
    """Text in which nothing is invisible, and nothing that XML forbids."""
    return "".join(_mark(c) or c for c in text)


def _mark(c: str) -> str | None:
    """What stands for a character that cannot be seen, or that XML does not know."""
    known = {" ": "␣", "\u00a0": "␣", "\u3000": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍", "\x7f": "␡"}
    if c in known:
        return known[c]
    code = ord(c)
    if code < 0x20:
        return chr(0x2400 + code)
    if 0xD800 <= code < 0xE000 or code & 0xFFFE == 0xFFFE or unicodedata.category(c) == "Cc":
        return "\ufffd"
    return "␣" if unicodedata.category(c).startswith("Z") else None


def _escape(text: str) -> str:
    for c, name in (("&", "amp"), ("<", "lt"), (">", "gt"), ('"', "quot")):
        text = text.replace(c, f"&{name};")
    return text


def _clusters(text: str) -> list[str]:
    """What is drawn as one sign each: marks, joined emoji and the parts of a syllable stay with what they belong to."""
    found: list[str] = []
    for c in text:
        joined = (
            unicodedata.category(c).startswith("M")
            or c == "\u200d"
            or "\u1160" <= c <= "\u11ff"
            or "\U0001f3fb" <= c <= "\U0001f3ff"
        )
        if found and (joined or found[-1].endswith("\u200d")):
            found[-1] += c
        else:
            found.append(c)
    return found


def _em(cluster: str) -> float:
    """How wide a sign is, in units of the font's size, about."""
    return 1.05 if unicodedata.east_asian_width(cluster[0]) in "WF" else 0.6


def _fitting(text: str, width: float, size: float) -> tuple[list[str], float]:
    """The signs of a text that fit, and the size at which: a little smaller first, then cut with an ellipsis."""
    signs = _clusters(text)
    for smaller in (size, size - 1.5, size - 3):
        if sum(map(_em, signs)) * smaller <= width:
            return signs, smaller
    size -= 3
    kept, room = [], width - 0.9 * size
    for sign in signs:
        room -= _em(sign) * size
        if room < 0:
            break
        kept.append(sign)
    return [*kept, "…"], size


def _signs(signs: Sequence[str], number: bool) -> str:
    """Markup: what stands for an invisible character is fainter than what is written. Of numbers, spaces are spaces."""
    parts = []
    for sign in signs:
        mark = _mark(sign) if len(sign) == 1 and not (number and sign == " ") else None
        parts.append(f'<tspan class="faint">{mark}</tspan>' if mark else _escape(sign if sign == " " else _plain(sign)))
    return "".join(parts)


_SMALL = str.maketrans("0123456789-", "₀₁₂₃₄₅₆₇₈₉₋")


def _at(name: str, t: int | str) -> str:
    return name + (str(t).translate(_SMALL) if isinstance(t, int) else t)


# -------------------------------------------------------------------------------------------------- drawing


@dataclass(frozen=True)
class _Box:
    x: float
    y: float
    width: float
    height: float

    @property
    def centre(self) -> float:
        return self.x + self.width / 2

    @property
    def middle(self) -> float:
        return self.y + self.height / 2

    @property
    def right(self) -> float:
        return self.x + self.width

    @property
    def bottom(self) -> float:
        return self.y + self.height


@dataclass
class _Window:
    """The steps of one core that are shown, and where: columns from left to right."""

    core: str
    length: int
    first: int
    stop: int
    columns: dict[int, float] = field(default_factory=dict)  # step -> its column's centre
    before: float | None = None  # the centres of the ellipses
    after: float | None = None
    left: float = 0
    right: float = 0


_STYLE = """
.unrolled-picture { --paper: #ffffff; --ink: #1f2430; --soft: #6b7280; --line: #9aa3b2; --box: #f6f7f9;
  --read: #e8eef9; --said: #e9f5ec; --edge: #c3cad6; --up: #d9480f; --down: #1c6fd1; --look: #8b3fd1;
  --fed: #1f8a4c; color: var(--ink);
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Apple SD Gothic Neo", "Malgun Gothic", "Noto Sans KR",
  "Noto Sans CJK KR", sans-serif; }
@media (prefers-color-scheme: dark) { .unrolled-picture { --paper: #14171c; --ink: #e6e9ef; --soft: #98a2b3;
  --line: #6c7688; --box: #1e232b; --read: #1d2a40; --said: #1b3326; --edge: #3d4654; --up: #ff8a4c; --down: #5ea8ff;
  --look: #c08bff; --fed: #57c785; } }
.unrolled-picture .paper { fill: var(--paper); }
.unrolled-picture text { fill: currentColor; text-anchor: middle; white-space: pre; }
.unrolled-picture .left { text-anchor: start; }
.unrolled-picture .soft, .unrolled-picture .faint { fill: var(--soft); }
.unrolled-picture .box { fill: var(--box); stroke: var(--edge); }
.unrolled-picture .read { fill: var(--read); }
.unrolled-picture .said { fill: var(--said); }
.unrolled-picture .cell { stroke: var(--edge); stroke-width: 0.5; fill: var(--paper); }
.unrolled-picture .up { fill: var(--up); }
.unrolled-picture .down { fill: var(--down); }
.unrolled-picture .share { fill: var(--fed); }
.unrolled-picture .arrow { fill: none; stroke: var(--line); stroke-width: 1.6; }
.unrolled-picture .head { fill: var(--line); }
.unrolled-picture .fed { stroke: var(--fed); stroke-dasharray: 5 4; }
.unrolled-picture .fed-head { fill: var(--fed); }
.unrolled-picture .look { fill: none; stroke: var(--look); }
.unrolled-picture g:hover > .look { opacity: 1; }
.unrolled-picture .seen { fill: var(--paper); stroke: var(--look); stroke-width: 1.6; }
.unrolled-picture .join { fill: var(--line); }
"""


class _Drawing:
    """One picture while it is drawn: boxes by name, and what is drawn under and over them."""

    def __init__(
        self,
        trace: Trace,
        rolled: bool,
        start: int | None,
        steps: int,
        units: Sequence[int] | None,
        title: str | None,
    ) -> None:
        self.trace, self.rolled, self.units = trace, rolled, units
        form = str(trace.about.get("form", "a recurrent network")).replace("->", "→")
        self.title = form if title is None else title
        self.boxes: dict[str, _Box] = {}
        self.lines: list[str] = []
        self.shapes: list[str] = []
        self.over: list[str] = []
        self.directions = {core: 2 if any(".reverse" in n for n in trace.layers(core)) else 1 for core in trace.cores}
        self.depth = {core: len(trace.layers(core)) // self.directions[core] for core in trace.cores}
        self.cell = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN", "rnn_relu": "RNN (relu)"}.get(
            str(trace.about.get("cell")), str(trace.about.get("cell", "cell"))
        )
        self.fields = ["h", "c"] if f"{trace.layers(trace.cores[0])[0]}.c" in trace.tensors else ["h"]
        self.state_height = 22 + (_CELL + 3) * len(self.fields)
        self.scale = {
            f: max(float(trace.tensors[f"{n}.{f}"].abs().max()) for core in trace.cores for n in trace.layers(core))
            or 1.0
            for f in self.fields
        }
        self.said = _said(trace)
        self.looks = "attention" in trace.tensors
        self.last = trace.cores[-1]
        self.pooling = str(trace.about.get("pooling", "last"))
        self.whole = len(self.said) == 1 and "pooling" in trace.about and self.last == "core"
        self.windows = {core: self._window(core, start, steps) for core in trace.cores}
        self._place_columns()
        self._place_rows()

    # ---- where things are

    def _window(self, core: str, start: int | None, steps: int) -> _Window:
        length = _length(self.trace, core)
        if self.rolled:
            first = (0 if core == "decoder" else length - 1) if start is None else min(start, length - 1)
            return _Window(core, length, first, first + 1)
        first = min(start or 0, max(length - steps, 0))
        return _Window(core, length, first, min(first + steps, length))

    def _place_columns(self) -> None:
        x = 92.0
        for core, window in self.windows.items():
            wide = _WIDTH if self.directions[core] == 1 else 2 * _HALF + 10
            if core == "decoder":
                x += 44 + (46 if self.directions["core"] == 2 else 0)
            elif not self.rolled or self._loops_left("core", "forward"):
                x += 52 if self.rolled else 34  # the loop, or h_0
            window.left = x
            if window.first > 0 and not self.rolled:
                window.before = x + _DOTS / 2
                x += _DOTS + _GAP
            for t in range(window.first, window.stop):
                window.columns[t] = x + wide / 2
                x += wide + _GAP
            if window.stop < window.length and not self.rolled:
                window.after = x + _DOTS / 2
                x += _DOTS + _GAP
            window.right = x - _GAP
            if self.rolled and not (core == "core" and self.directions[core] == 1 and len(self.windows) == 2):
                x += 40  # a loop on the right
        if self.directions["core"] == 2 and not self.rolled and len(self.windows) == 1:
            x += 34
        self.width = max(x + 4, 560, min(17 * sum(map(_em, _clusters(self.title))) + 60, 900))

    def _place_rows(self) -> None:
        y = 74.0
        self.said_y = y
        pooled = self.whole and self.pooling != "last"
        if self.said:
            y += 44 + (140 if self.looks else 34) + (44 if pooled else 0)
            if self.whole and self.directions["core"] == 2:
                y += 8
        self.pool_y = self.said_y + 44 + 30
        deepest = max(self.depth.values())
        both = max(self.directions.values()) == 2
        self.layer_y: dict[tuple[int, int], float] = {}
        for k in reversed(range(deepest)):
            if both:
                y += 18  # where the two directions are joined
                self.layer_y[k, 1] = y
                y += self.state_height + 16
            self.layer_y[k, 0] = y
            y += self.state_height + (36 if k else 32)
        self.read_y = y
        self.bottom = y + 34
        self.caption_y = y + 66  # where encoder and decoder are named

    def _state_box(self, layer: str, t: int) -> _Box:
        core, k, side = layer.split(".")
        centre = self.windows[core].columns[t]
        if self.directions[core] == 1:
            return _Box(centre - _WIDTH / 2, self.layer_y[int(k), 0], _WIDTH, self.state_height)
        x = centre + 5 if side == "reverse" else centre - _HALF - 5
        return _Box(x, self.layer_y[int(k), int(side == "reverse")], _HALF, self.state_height)

    # ---- what is drawn

    def _text(self, x: float, y: float, markup: str, size: float, *, bold: bool = False, kind: str = "") -> str:
        weight = ' font-weight="600"' if bold else ""
        look = f' class="{kind}"' if kind else ""
        return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}"{weight}{look}>{markup}</text>'

    def _group(self, name: str, box: _Box, kind: str, told: str, inner: Sequence[str], radius: float = 7) -> None:
        self.boxes[name] = box
        self.shapes.append(
            f'<g data-node="{name}"><title>{_escape(told)}</title><rect class="box {kind}" x="{box.x:.1f}" '
            f'y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" rx="{radius:g}"/>{"".join(inner)}</g>'
        )

    def _arrow(
        self, source: str, target: str, points: Sequence[tuple[float, float]], *, fed: bool = False, told: str = ""
    ) -> None:
        """A line through points, its corners round, and its head at the last."""
        (x0, y0), (x1, y1) = points[-2:]
        length = (
            max(abs(x1 - x0) + abs(y1 - y0), 1e-6) if x0 == x1 or y0 == y1 else ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        )
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        near = (x1 - 6 * dx, y1 - 6 * dy)  # the line ends within the head, so that its tip stays sharp
        path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
        for before, here, after in zip(points, points[1:-1], points[2:], strict=False):
            a, b = _towards(here, before, 7), _towards(here, after, 7)
            path += f" L{a[0]:.1f} {a[1]:.1f} Q{here[0]:.1f} {here[1]:.1f} {b[0]:.1f} {b[1]:.1f}"
        path += f" L{near[0]:.1f} {near[1]:.1f}"
        head = (
            f"M{x1:.1f} {y1:.1f} L{x1 - 8 * dx - 4 * dy:.1f} {y1 - 8 * dy + 4 * dx:.1f} "
            f"L{x1 - 8 * dx + 4 * dy:.1f} {y1 - 8 * dy - 4 * dx:.1f}Z"
        )
        self._line(source, target, path, head, fed, told)

    def _line(self, source: str, target: str, path: str, head: str, fed: bool, told: str) -> None:
        kind, tip = ("arrow fed", "fed-head") if fed else ("arrow", "head")
        title = f"<title>{_escape(told)}</title>" if told else ""
        self.lines.append(
            f'<g data-from="{source}" data-to="{target}">{title}<path class="{kind}" d="{path}"/>'
            f'<path class="{tip}" d="{head}"/></g>'
        )

    def _join(self, name: str, x: float, y: float) -> None:
        self.boxes[name] = _Box(x - 3.5, y - 3.5, 7, 7)
        self.shapes.append(
            f'<g data-node="{name}"><title>both directions, side by side</title>'
            f'<circle class="join" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/></g>'
        )

    def svg(self) -> str:
        for core in self.windows:
            self._read_boxes(core)
            for layer in self.trace.layers(core):
                self._state_boxes(layer)
            self._upwards(core)
            for layer in self.trace.layers(core):
                self._along(layer)
        if "decoder" in self.windows:
            self._bridge()
        self._said_boxes()
        self._fed_back()
        self._captions()
        about = f"{self.title}: {self.cell}, {'rolled' if self.rolled else 'unrolled'}"
        height = self.bottom + 52
        body = "\n".join([*self.lines, *self.shapes, *self.over])
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="unrolled-picture" '
            f'viewBox="0 0 {self.width:.0f} {height:.0f}" width="{self.width:.0f}" height="{height:.0f}" '
            f'role="img" aria-label="{_escape(_plain_line(about))}">\n'
            f"<title>{_escape(_plain_line(about))}</title>\n"
            f"<desc>{_escape(_plain_line(self._described()))}</desc>\n"
            f"<style>{_STYLE}</style>\n"
            f'<rect class="paper" width="100%" height="100%" rx="10"/>\n{body}\n</svg>\n'
        )

    def _described(self) -> str:
        """The picture in words, for who cannot see it."""
        parts = []
        for core, window in self.windows.items():
            reads = [_plain(one.text) for one in _reads(self.trace, core)[window.first : window.stop]]
            parts.append(
                f"{core} reads {', '.join(reads)} (steps {window.first + 1} to {window.stop} of {window.length})"
            )
        said = [_plain(one.text) for one in self.said if one.at in self.windows[self.last].columns or self.whole]
        return "; ".join([*parts, f"says {', '.join(said)}"] if said else parts)

    def _read_boxes(self, core: str) -> None:
        reads = _reads(self.trace, core)
        for t, x in self.windows[core].columns.items():
            one = reads[t]
            signs, size = _fitting(one.text, _WIDTH - 10, 15)
            box = _Box(x - _WIDTH / 2, self.read_y, _WIDTH, 34)
            label = _at("x", "ₜ") if self.rolled else _at("x", t + 1)
            self._group(
                f"x.{core}.{t}", box, "read", f"x_{t + 1} = {one.more}",
                [self._text(x, box.middle + size * 0.36, _signs(signs, one.number), size, bold=True)],
            )  # fmt: skip
            self.over.append(self._text(x, box.bottom + 14, label, 11, kind="soft"))

    def _state_boxes(self, layer: str) -> None:
        core = layer.split(".")[0]
        window = self.windows[core]
        chosen = self._chosen(layer)
        for t in window.columns:
            box = self._state_box(layer, t)
            name = f"{layer}.{t}"
            label = _at("h", "ₜ") if self.rolled else _at("h", t + 1)
            inner = [self._text(box.centre, box.y + 14, label, 12)]
            told = [f"{self.cell}, layer {int(layer.split('.')[1]) + 1}, step {t + 1}"]
            side = (box.width - 12) / len(chosen)
            for row, name_of in enumerate(self.fields):
                values = self.trace.tensors[f"{layer}.{name_of}"][t]
                told.append(f"{name_of}: " + " ".join(f"{float(values[u]):.6g}" for u in chosen))
                y = box.y + 20 + row * (_CELL + 3)
                for n, u in enumerate(chosen):
                    inner.append(self._cell(box.x + 6 + n * side, y, side, name_of, t, u, float(values[u])))
            self._group(name, box, "state", "\n".join(told), inner)
        for where, x in (("before", window.before), ("after", window.after)):
            if x is not None:
                side = layer.split(".")[2] == "reverse" and self.directions[core] == 2
                y = self.layer_y[int(layer.split(".")[1]), int(side)] + self.state_height / 2
                left = window.first if where == "before" else window.length - window.stop
                self.boxes[f"{layer}.{where}"] = _Box(x - _DOTS / 2, y - 8, _DOTS, 16)
                self.shapes.append(
                    f'<g data-node="{layer}.{where}"><title>{left} more steps</title>'
                    f"{self._text(x, y + 5, '⋯', 20, kind='soft')}</g>"
                )

    def _cell(self, x: float, y: float, width: float, name: str, t: int, unit: int, value: float) -> str:
        strength = min(abs(value) / self.scale[name], 1.0)
        place = f'x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{_CELL}"'
        return (
            f'<g><title>{name}_{t + 1}, unit {unit}: {value:.6g}</title><rect class="cell" {place}/>'
            f'<rect class="{"up" if value >= 0 else "down"}" {place} fill-opacity="{strength:.4f}"/></g>'
        )

    def _chosen(self, layer: str) -> list[int]:
        if self.units is not None:
            return list(self.units)
        h = self.trace.tensors[f"{layer}.h"].double()
        # Over a single step all variances are 0: the first units are as good as others.
        most = torch.sort(h.var(0, correction=0), descending=True, stable=True).indices[:_MOST]
        return sorted(most.tolist())

    def _along(self, layer: str) -> None:
        """The arrows of one layer through time, or its loop."""
        core, k, side = layer.split(".")
        window = self.windows[core]
        shown = list(window.columns)
        back = side == "reverse"
        what = "h and c" if "c" in self.fields else "h"
        if self.rolled:
            (t,) = shown
            self._loop(f"{layer}.{t}", f"{what} of the {'next' if back else 'last'} step", back)
            return
        names = [f"{layer}.{t}" for t in shown]
        if window.before is not None:
            names.insert(0, f"{layer}.before")
        if window.after is not None:
            names.append(f"{layer}.after")
        y = self.layer_y[int(k), int(back)] + self.state_height / 2
        for one, other in pairwise(names):
            a, b = self.boxes[one], self.boxes[other]
            if back:
                self._arrow(other, one, [(b.x, y), (a.right, y)], told=f"{what}, from right to left")
            else:
                self._arrow(one, other, [(a.right, y), (b.x, y)], told=what)
        # The state before the first step that is read.
        if core == "core" and (window.after if back else window.before) is None:
            box = self.boxes[names[-1 if back else 0]]
            x = box.right + 26 if back else box.x - 26
            node = f"{layer}.zero"
            self.boxes[node] = _Box(x - 10 if not back else x, y - 8, 10, 16)
            label = _at("h", window.length + 1) if back else _at("h", 0)
            self.shapes.append(
                f'<g data-node="{node}"><title>{label} = 0: the state before anything is read</title>'
                f"{self._text(x + (9 if back else -9), y + 4, '0', 12, kind='soft')}</g>"
            )
            self._arrow(
                node, names[-1 if back else 0], [(x, y), (box.right if back else box.x, y)], told=f"{label} = 0"
            )

    def _loops_left(self, core: str, side: str) -> bool:
        """Whether a loop stands on its box's left: where something else goes out on the right."""
        return side == "forward" and core == "core" and (self.directions[core] == 2 or len(self.windows) == 2)

    def _loop(self, name: str, told: str, back: bool) -> None:
        """An arrow from a box round to itself."""
        core, _, side, _ = name.split(".")
        box = self.boxes[name]
        way, edge = (-1, box.x) if self._loops_left(core, side) else (1, box.right)
        high, low = box.y + box.height * 0.22, box.y + box.height * 0.72
        far = edge + way * 26
        self._arrow(name, name, [(edge, low), (far, low), (far, high), (edge, high)], told=told)
        label = "hₜ₊₁" if back else "hₜ₋₁"
        self.over.append(self._text(far + way * 17, (high + low) / 2 + 4, label, 11, kind="soft"))

    def _upwards(self, core: str) -> None:
        """From what is read to the first layer, and from each layer to the next, at every step."""
        both = self.directions[core] == 2
        sides = ("forward", "reverse") if both else ("forward",)
        for t, x in self.windows[core].columns.items():
            for k in range(self.depth[core]):
                below = (
                    f"x.{core}.{t}"
                    if k == 0
                    else (f"{core}.{k - 1}.join.{t}" if both else f"{core}.{k - 1}.forward.{t}")
                )
                source = self.boxes[below]
                for side in sides:
                    name = f"{core}.{k}.{side}.{t}"
                    box = self.boxes[name]
                    self._arrow(
                        below, name, [(source.centre if k == 0 or not both else x, source.y), (box.centre, box.bottom)]
                    )
                if both and (k < self.depth[core] - 1 or self._joins(core, t)):
                    y = self.layer_y[k, 1] - 18
                    self._join(f"{core}.{k}.join.{t}", x, y)
                    for side in sides:
                        box = self.boxes[f"{core}.{k}.{side}.{t}"]
                        way = -1 if side == "forward" else 1
                        points = [(box.centre, box.y), (box.centre, y), (x + way * 3.5, y)]
                        self._arrow(f"{core}.{k}.{side}.{t}", f"{core}.{k}.join.{t}", points)

    def _joins(self, core: str, t: int) -> bool:
        """Whether the last layer's two directions are read together at this step."""
        if core != self.last:
            return self.looks
        if self.whole:
            return self.pooling != "last"
        return any(one.at == t for one in self.said)

    def _top(self, core: str, t: int) -> str:
        """What the output reads of a step."""
        k = self.depth[core] - 1
        return f"{core}.{k}.join.{t}" if self.directions[core] == 2 else f"{core}.{k}.forward.{t}"

    def _bridge(self) -> None:
        """The encoder's last state is the decoder's first."""
        encoder, decoder = self.windows["core"], self.windows["decoder"]
        told = "the encoder's last state is the decoder's first"
        end = "after" if encoder.after is not None else encoder.stop - 1
        begin = "before" if decoder.before is not None else decoder.first
        if self.directions["core"] == 1:
            for k in range(self.depth["core"]):
                source, target = f"core.{k}.forward.{end}", f"decoder.{k}.forward.{begin}"
                a, b = self.boxes[source], self.boxes[target]
                self._arrow(source, target, [(a.right, a.middle), (b.x, b.middle)], told=told)
            return
        # Of both directions, each one's own last, through a matrix: the reverse one's is at the first step.
        x = encoder.right + (84 if self.rolled else 50)
        top, low = self.layer_y[self.depth["core"] - 1, 1], self.layer_y[0, 0] + self.state_height
        bar = _Box(x, top, 14, low - top)
        middle = self._text(0, 0, "bridge", 10, kind="soft").replace(
            'x="0.0" y="0.0"', f'transform="translate({bar.centre + 3.5:.1f} {bar.middle:.1f}) rotate(-90)"'
        )
        self._group("bridge", bar, "state", f"{told}, through a matrix", [middle], 5)
        first = "before" if encoder.before is not None else encoder.first
        for k in range(self.depth["core"]):
            forward, reverse = f"core.{k}.forward.{end}", f"core.{k}.reverse.{first}"
            a, b = self.boxes[forward], self.boxes[reverse]
            self._arrow(forward, "bridge", [(a.right, a.middle), (bar.x, a.middle)], told="last state, forward")
            if self.rolled:
                low = b.bottom - 4  # below the loop
                self._arrow(reverse, "bridge", [(b.right, low), (bar.x, low)], told="last state, reverse")
            else:
                left, under = encoder.left - 10 - 7 * k, self.read_y + 58 + 7 * k
                out = b.middle if first == "before" else b.middle + 8
                points = [(b.x, out), (left, out), (left, under), (bar.centre, under)]
                self._arrow(reverse, "bridge", [*points, (bar.centre, bar.bottom)], told="last state, reverse")
            target = f"decoder.{k}.forward.{begin}"
            c = self.boxes[target]
            self._arrow("bridge", target, [(bar.right, c.middle), (c.x, c.middle)], told=told)
        if not self.rolled:
            self.caption_y = self.read_y + 70 + 7 * self.depth["core"]

    def _said_boxes(self) -> None:
        window = self.windows[self.last]
        for u, one in enumerate(self.said):
            x = window.columns.get(one.at)
            if x is None and self.whole:
                x = window.after if window.after is not None else next(reversed(window.columns.values()))
            if x is None:
                continue
            if self.whole and self.directions[self.last] == 2 and window.after is None and self.pooling == "last":
                x -= 14  # so that the forward state's arrow meets it
            box = _Box(x - _WIDTH / 2, self.said_y, _WIDTH, 44)
            signs, size = _fitting(one.text, _WIDTH - 10, 15)
            label = "y" if self.whole else "yₜ" if self.rolled else _at("y", one.at + 1)
            inner = [
                self._text(
                    x, box.y + (18 if one.share is not None else 27), _signs(signs, one.share is None), size, bold=True
                )
            ]
            if one.share is not None:
                inner.append(self._text(x, box.y + 33, f"{one.share:.3g}", 11, kind="soft"))
                inner.append(
                    f'<rect class="share" x="{box.x + 6:.1f}" y="{box.bottom - 6:.1f}" height="3" rx="1.5" '
                    f'width="{(_WIDTH - 12) * one.share:.2f}"/>'
                )
            name = f"y.{u}"
            probability = "" if one.share is None else f", probability {one.share:.6g}"
            told = f"{label} = {_plain(one.text)}{probability} ({one.more})"
            self._group(name, box, "said", told, inner)
            self.over.append(self._text(x, box.y - 6, label, 11, kind="soft"))
            self._to_output(u, one, box)

    def _to_output(self, u: int, one: _Said, box: _Box) -> None:
        name, core = f"y.{u}", self.last
        window = self.windows[core]
        if not self.whole:
            source = self._top(core, one.at)
            a = self.boxes[source]
            self._arrow(source, name, [(a.centre, a.y), (a.centre, box.bottom)])
            if self.looks:
                self._look(u, box)
            return
        if self.pooling != "last":
            columns = list(window.columns)
            top = f"{core}.{self.depth[core] - 1}.{'reverse' if self.directions[core] == 2 else 'forward'}"
            dots = [name for name in (f"{top}.before", f"{top}.after") if name in self.boxes]
            left = min([window.columns[columns[0]] - _WIDTH / 2, *(self.boxes[name].x for name in dots)])
            bar = _Box(left, self.pool_y, max(box.right, window.right) - left, 24)
            words = {"mean": "mean of all hₜ", "max": "greatest of all hₜ, unit by unit"}
            text = words.get(self.pooling, "attention over all hₜ")
            if bar.width < 170:
                text = self.pooling
            self._group("pool", bar, "state", text, [self._text(bar.centre, bar.y + 16, text, 11, kind="soft")])
            for t in columns:
                a = self.boxes[self._top(core, t)]
                self._arrow(self._top(core, t), "pool", [(a.centre, a.y), (a.centre, bar.bottom)])
            for dot in dots:
                a = self.boxes[dot]
                self._arrow(dot, "pool", [(a.centre, a.y), (a.centre, bar.bottom)], told="the steps that are not shown")
            self._arrow("pool", name, [(box.centre, bar.y), (box.centre, box.bottom)])
            return
        k = self.depth[core] - 1
        end = "after" if window.after is not None else window.stop - 1
        source = f"{core}.{k}.forward.{end}"
        a = self.boxes[source]
        if self.directions[core] == 1:
            self._arrow(source, name, [(a.centre, a.y), (a.centre, box.bottom)], told="the last state")
            return
        into = min(max(a.centre, box.x + 12), box.right - 12)
        self._arrow(source, name, [(a.centre, a.y), (into, box.bottom)], told="the last state, forward")
        source = f"{core}.{k}.reverse.{'before' if window.before is not None else window.first}"
        b = self.boxes[source]
        points = [(b.centre, b.y), (b.centre, box.bottom + 22), (into + 24, box.bottom + 22), (into + 24, box.bottom)]
        if b.centre > into:  # a single step: it stands to the right
            points = [(b.centre, b.y), (b.centre, box.middle), (box.right, box.middle)]
        self._arrow(source, name, points, told="the last state, reverse")

    def _look(self, u: int, box: _Box) -> None:
        """What the decoder saw: one line from each of the encoder's states, as wide as the weight is great."""
        encoder = self.windows["core"]
        x, y = box.x + 14, box.bottom + 22
        name = f"context.{u}"
        self.boxes[name] = _Box(x - 5, y - 5, 10, 10)
        weights = self.trace.attention[u]
        for t in encoder.columns:
            a = self.boxes[self._top("core", t)]
            weight = float(weights[t])
            told = f"attention of y_{u + 1} to x_{t + 1}: {weight:.6g}"
            span = y + 5
            way, rise = x - a.centre, a.y - span
            path = f"M{a.centre:.1f} {a.y:.1f} C{a.centre + way * 0.1:.1f} {a.y - rise * 0.6:.1f} "
            path += f"{a.centre + way * 0.6:.1f} {span + rise * 0.35:.1f} {x:.1f} {span:.1f}"
            self.lines.insert(
                0,
                f'<g data-from="{self._top("core", t)}" data-to="{name}"><title>{told}</title>'
                f'<path class="look" stroke-width="{_LINE * weight:.4f}" opacity="{0.3 + 0.7 * weight:.3f}" '
                f'd="{path}"/></g>',
            )
        hidden = 1 - sum(float(weights[t]) for t in encoder.columns)
        rest = f"; {hidden:.3g} of it to steps that are not shown" if len(encoder.columns) < encoder.length else ""
        self.shapes.append(
            f'<g data-node="{name}"><title>c_{u + 1}: what attention saw{rest}</title>'
            f'<circle class="seen" cx="{x:.1f}" cy="{y:.1f}" r="5"/></g>'
        )
        self._arrow(name, f"y.{u}", [(x, y - 5), (x, box.bottom)], told="what attention saw")

    def _fed_back(self) -> None:
        """What is written is read at the next step."""
        core = self.last
        reads, window = _reads(self.trace, core), self.windows[core]
        if self.rolled:
            self._fed_round(core, any(one.fed for one in reads) or _is_language_model(self.trace))
            return
        for t in window.columns:
            if not (reads[t].fed and t - 1 in window.columns):
                continue
            said, box = self.boxes[f"y.{t - 1}"], self.boxes[f"x.{core}.{t}"]
            x = (said.right + box.x) / 2
            points = [(said.right, said.middle), (x, said.middle), (x, box.middle), (box.x, box.middle)]
            told = f"y_{t} is read as x_{t + 1}"
            self._arrow(f"y.{t - 1}", f"x.{core}.{t}", points, fed=True, told=told)

    def _fed_round(self, core: str, fed: bool) -> None:
        (t,) = self.windows[core].columns
        if not fed or f"y.{t}" not in self.boxes:
            return
        said, box = self.boxes[f"y.{t}"], self.boxes[f"x.{core}.{t}"]
        x = said.right + 66
        points = [(said.right, said.middle), (x, said.middle), (x, box.middle), (box.right, box.middle)]
        self._arrow(f"y.{t}", f"x.{core}.{t}", points, fed=True, told="what is written is read at the next step")
        self.width = max(self.width, x + 24)

    def _captions(self) -> None:
        signs, size = _fitting(_plain_line(self.title), self.width - 48, 17)
        self.over.append(self._text(24, 30, _escape("".join(signs)), size, bold=True, kind="left"))
        layers = max(self.depth.values())
        hidden = self.trace.tensors[f"{self.trace.layers(self.trace.cores[0])[0]}.h"].shape[1]
        parts = [f"{self.cell} with {hidden} units", f"{layers} layers" if layers > 1 else "1 layer"]
        if max(self.directions.values()) == 2:
            parts.append("both directions")
        for core, window in self.windows.items():
            name = {"core": "encoder " if "decoder" in self.windows else "", "decoder": "decoder "}[core]
            shown = (
                f"step {window.first + 1}"
                if window.stop == window.first + 1
                else f"steps {window.first + 1}–{window.stop}"
            )
            parts.append(f"{name}{shown} of {window.length}")
        self.over.append(self._text(24, 50, " · ".join(parts), 12, kind="left soft"))
        for (k, side), y in self.layer_y.items():
            arrow = (" →", " ←")[side] if max(self.directions.values()) == 2 else ""
            name = f"layer {k + 1}{arrow}" if layers > 1 else f"{self.cell}{arrow}"
            self.over.append(self._text(24, y + self.state_height / 2 + 4, name, 12, kind="left soft"))
        if self.said:
            self.over.append(self._text(24, self.said_y + 26, "says", 12, kind="left soft"))
        self.over.append(self._text(24, self.read_y + 21, "reads", 12, kind="left soft"))
        if "decoder" in self.windows:
            for core, name in (("core", "encoder"), ("decoder", "decoder")):
                columns = list(self.windows[core].columns.values())
                self.over.append(
                    self._text((columns[0] + columns[-1]) / 2, self.caption_y, name, 12, bold=True, kind="soft")
                )
            self.bottom = self.caption_y - 4
        self._legend(hidden)

    def _legend(self, hidden: int) -> None:
        y = self.bottom + 34
        shown = len(self._chosen(self.trace.layers(self.trace.cores[0])[0]))
        which = "its units" if shown == hidden else f"{shown} of {hidden} units"
        x = 24.0
        for name, text in (
            ("down", "below 0"),
            (
                "up",
                f"above 0 · {which}, full colour at " + ", ".join(f"|{f}| = {self.scale[f]:.3g}" for f in self.fields),
            ),
        ):
            self.over.append(f'<rect class="{name}" x="{x:.1f}" y="{y - 10:.1f}" width="12" height="12" rx="2"/>')
            self.over.append(self._text(x + 18, y, text, 11, kind="left soft"))
            x += 78
        x = 24.0
        fed = any('"arrow fed"' in line for line in self.lines)
        notes = []
        if fed:
            notes.append("dashed: what is written is read at the next step")
        if self.looks:
            notes.append("violet: attention, as wide as its weight")
        if self.trace.about.get("input_feeding") and self.looks:
            notes.append("the decoder also reads what attention saw a step before")
        if notes:
            self.over.append(self._text(x, y + 18, " · ".join(notes), 11, kind="left soft"))
            self.bottom += 16


def _plain_line(text: str) -> str:
    """Words with their spaces, and nothing that XML forbids."""
    return "".join(c if c == " " else _mark(c) or c for c in " ".join(text.split()))


def _towards(here: tuple[float, float], there: tuple[float, float], most: float) -> tuple[float, float]:
    """A point on the way, at most so far and at most half of it."""
    dx, dy = there[0] - here[0], there[1] - here[1]
    length = (dx * dx + dy * dy) ** 0.5 or 1.0
    share = min(most, length / 2) / length
    return here[0] + dx * share, here[1] + dy * share
