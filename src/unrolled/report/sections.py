"""A trace -> what there is to be seen in it: pictures and the sentences beside them, from what was recorded alone."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from typing import Any

from unrolled import figures
from unrolled.picture import unrolled_svg
from unrolled.report.page import Section, table
from unrolled.trace import Flow, Trace, gradient_flow, verdict
from unrolled.trace.gradients import Reach
from unrolled.trace.looking import alignments, coverage, entropy, monotonicity, overlooked, pharaoh

__all__ = ["bits_of", "gradient_section", "trace_sections"]

_END = "</s>"
_DRAWN = 300  # steps: a picture of more shows nothing that one of these does not
_WRITTEN_OUT = 3000  # symbols of a text
_CELLS = {"rnn": "an RNN", "rnn_relu": "an RNN (relu)", "lstm": "an LSTM", "gru": "a GRU"}


def trace_sections(trace: Trace) -> list[Section]:
    """All that can be shown of a trace, in the order of a page; what the form lacks is left out."""
    found = [_answer(trace), _unrolled(trace)]
    if "attention" in trace.tensors:
        found.append(_attention(trace))
    if "scores.names" in trace.tensors and len(trace.tensors["scores.names"]) > 1:
        found.append(_next(trace))
    found.append(_states(trace))
    if figures.reads_text(trace) and len(trace.read) > 1:
        found.append(_unit(trace))
    if any(name.endswith(".dh") for name in trace.tensors):
        found.append(gradient_section({"": trace}))
    return found


def _escape(text: str) -> str:
    return html.escape(text, quote=True)


def _is_language_model(trace: Trace) -> bool:
    return figures.reads_text(trace) and " -> next" in str(trace.about.get("form", ""))


def _unrolled(trace: Trace) -> Section:
    text = (
        "The network as the lecture notes draw it, one column a step, with what each box held in this run. The same "
        "weights stand in every column; what differs is the state that goes from one to the next. Point at a thing to "
        "read its values."
    )
    columns = 4 if "decoder" in trace.cores else 7  # about what a page is wide; more of them are scrolled to
    picture = f'<div class="scroll picture">{unrolled_svg(trace, steps=columns)}</div>'
    return Section("unrolled", "The network, unrolled", text, picture)


# -------------------------------------------------------------------------------------- what goes in, what comes out


def _answer(trace: Trace) -> Section:
    if _is_language_model(trace):
        return _surprise(trace)
    if "decoder" in trace.cores or "text" in str(trace.about.get("form", "")).partition("->")[2].partition(":")[0]:
        return _written(trace)
    if "numbers" in trace.tensors:
        return _numbers(trace)
    if len(trace.tensors["scores.names"]) == 1:
        return _one_label(trace)
    return _labels(trace)


def bits_of(trace: Trace) -> list[float]:
    """Of a language model: by how many bits each symbol but the first surprised it, -log2 p."""
    return [-score / math.log(2) for score in trace.tensors["chosen.score"][: len(trace.read) - 1].tolist()]


def _surprise_text(trace: Trace) -> str:
    """The text that a language model read, each symbol the warmer the more it surprised; HTML."""
    bits = [0.0, *bits_of(trace)]
    parts = []
    for t, (piece, b) in enumerate(zip(trace.read[:_WRITTEN_OUT], bits, strict=False)):
        drawn = _escape(piece.replace("\n", "↵\n"))
        about = "the first symbol: nothing was expected yet" if t == 0 else f"{b:.2f} bits: probability {2**-b:.3g}"
        tint = f' style="background:rgba(var(--warm),{min(b / 8, 1) * 0.75:.2f})"' if b >= 0.2 else ""
        parts.append(f'<span{tint} title="{about}">{drawn}</span>')
    more = len(trace.read) - len(parts)
    rest = f'<span class="soft"> … {more:,} more</span>' if more else ""
    return f'<div class="text">{"".join(parts)}{rest}</div>'


def _surprise(trace: Trace) -> Section:
    bits = bits_of(trace)
    if not bits:
        text = "One symbol was read; a surprise takes two."
    else:
        worst = sorted(range(len(bits)), key=lambda t: -bits[t])[:3]
        named = ", ".join(
            f"<b>{figures.shown(trace.read[t + 1])}</b> at step {t + 2} ({bits[t]:.1f} bits)" for t in worst
        )
        right = sum(a == b for a, b in zip(trace.written, trace.expected, strict=False)) / len(bits)
        text = (
            f"Each symbol is the warmer the more it surprised the model: on average {sum(bits) / len(bits):.2f} bits, "
            f"and for {right:.0%} of them its first guess was right. It expected least: {named}."
        )
    return Section("answer", "What it read, and how much that surprised it", text, _surprise_text(trace))


def _written(trace: Trace) -> Section:
    words = [piece for piece in trace.written if piece != _END]
    looks = "attention" in trace.tensors
    target = "".join(_word(piece, looks) for piece in trace.written)
    body = ""
    if figures.reads_text(trace):
        source = "".join(_word(piece, False) for piece in trace.read)
        body += f'<div class="say source"><span class="label">read</span> {source}</div>'
    body += f'<div class="say target"><span class="label">written</span> {target}</div>'
    text = f"{len(trace.read)} steps were read and {len(words)} symbols written"
    if "log_probability" in trace.about:
        each = math.exp(float(trace.about["log_probability"]) / max(len(trace.written), 1))
        text += f"; the model gives each of them a probability of {each:.0%} in the (geometric) mean"
    text += "." + (" What was to be written was given; that is shown." if trace.expected else "")
    if looks and figures.reads_text(trace):
        text += " Point at a written word: the words it looked at light up."
        weights = json.dumps([[round(w, 4) for w in row] for row in trace.attention.tolist()])
        body = (
            f'<div class="looking">{body}<p class="row">Point at a word of the second line.</p>'
            f'<script type="application/json">{weights}</script></div>'
        )
    return Section("answer", "What it read, and what it wrote", text, body)


def _word(piece: str, looks: bool) -> str:
    end = ' title="the end of the text"' if piece == _END else ""
    lead = " " if piece.startswith(" ") or piece == _END else ""
    focus = ' tabindex="0"' if looks else ""
    return f'{lead}<span class="word"{focus}{end}>{_escape(piece.removeprefix(" ") or "␣")}</span>'


def _read_text(trace: Trace) -> str:
    return f"<blockquote>{_escape(''.join(trace.read).strip())}</blockquote>" if figures.reads_text(trace) else ""


def _one_label(trace: Trace) -> Section:
    share = math.exp(float(trace.tensors["chosen.score"][0]))
    text = f"One answer to the whole input of {_count(trace.read, 'step')}, with a probability of {share:.1%}."
    if trace.expected:
        hit = trace.expected[0] == trace.written[0]
        text += " It is right." if hit else f" It should be <b>{_escape(trace.expected[0])}</b>."
    body = f'{_read_text(trace)}<p class="answer">{_escape(trace.written[0])}</p>'
    return Section("answer", "What it read, and its answer", text, body, [figures.next_symbols(trace)])


def _count(things: Sequence[Any], name: str) -> str:
    return f"{len(things):,} {name}{'' if len(things) == 1 else 's'}"


def _labels(trace: Trace) -> Section:
    scores = trace.tensors["chosen.score"].exp()
    least = int(scores.argmin())
    labels = figures.output_labels(trace)
    text = (
        f"{_count(trace.written, 'label')}, one a step; their probabilities go from {float(scores.max()):.1%} "
        f"down to {float(scores.min()):.1%}, at <b>{labels[least]}</b> ({_escape(trace.written[least])})."
    )
    right = trace.expected
    if right:
        hits = sum(a == b for a, b in zip(trace.written, right, strict=False))
        text += f" {hits} of {len(right)} are right; the others have what is right beside them."
    said = []
    for u, label in enumerate(trace.written[:_DRAWN]):
        wrong = bool(right) and u < len(right) and right[u] != label
        under = f"{_escape(label)}{f' ({_escape(right[u])})' if wrong else ''}"
        said.append(f"<ruby>{labels[u]}<rt{' class=wrong' if wrong else ''}>{under}</rt></ruby>")
    body = f'<div class="tags">{" ".join(said)}</div>'
    if not figures.reads_text(trace):
        body = f'<div class="say">{_runs(trace.written)}</div>'
    return Section("answer", "What it read, and a label for each step", text, body)


def _runs(labels: Sequence[str]) -> str:
    """Labels of a series: each once for as long as it lasts, with its steps."""
    runs: list[tuple[str, int, int]] = []
    for t, label in enumerate(labels):
        if runs and runs[-1][0] == label:
            runs[-1] = (label, runs[-1][1], t)
        else:
            runs.append((label, t, t))
    return " → ".join(f'{_escape(label)} <span class="soft">{a + 1}–{b + 1}</span>' for label, a, b in runs[:60])


def _numbers(trace: Trace) -> Section:
    if " -> next" in str(trace.about.get("form", "")):
        text = (
            "At each step the model forecasts the next one (dotted); it is drawn where it should lie on what was then "
            "read. The closer the lines, the better."
        )
        read, said = trace.tensors["core.inputs"].float(), trace.tensors["numbers"].float()
        if len(read) > 1:
            error = float((read[1:] - said[:-1]).abs().mean())
            naive = float((read[1:] - read[:-1]).abs().mean())
            text += f" Mean absolute error {error:.3f}, and {naive:.3f} for the forecast that nothing changes."
        return Section("answer", "What it read, and its forecasts", text, "", [figures.number_lines(trace)])
    one = len(trace.tensors["numbers"]) == 1
    text = (
        f"{'One answer to the whole input' if one else 'A number for each step'}, scaled as the model reads and gives."
    )
    values = trace.tensors["numbers"].float().flatten().tolist()
    body = _read_text(trace)
    if one:
        body += f'<p class="answer">{", ".join(f"{value:.4g}" for value in values)}</p>'
        return Section("answer", "What it read, and its answer", text, body)
    return Section("answer", "What it read, and its numbers", text, body, [figures.number_lines(trace)])


# ------------------------------------------------------------------------------------------------------- attention


def _attention(trace: Trace) -> Section:
    weights = trace.attention
    ended = bool(trace.written) and trace.written[-1] == _END
    words = weights[:-1] if ended and len(weights) > 1 else weights
    source = figures.step_labels(trace)
    bits = entropy(words)
    most = math.log2(max(weights.shape[1], 2))
    given = coverage(words)
    missed = [source[s] for s in overlooked(words)]
    order = monotonicity(words)
    sharp = float(bits.mean())
    how = "sharply" if sharp < 0.35 * most else "broadly" if sharp > 0.7 * most else "at a few words at a time"
    moves = (
        "straight from left to right"
        if order > 0.9
        else "mostly from left to right"
        if order > 0.7
        else "back and forth"
    )
    text = (
        "A row is a written word, a column one that was read; the stronger the colour, the more it was looked at. It "
        f"looks {how} ({sharp:.2f} bits on average; {most:.2f} would be at all words alike), and moves {moves} "
        f"({order:.0%} of the steps do not go back)."
    )
    if missed:
        named = ", ".join(f"<b>{word}</b>" for word in missed[:12]) + (", …" if len(missed) > 12 else "")
        text += f" No word looked much at {named}."
    links = alignments(words)
    rows = [
        (
            trace.written[u].strip() or "␣",
            trace.read[s].strip() or "␣",
            f"{float(words[u, s]):.0%}",
            f"{float(bits[u]):.2f}",
        )
        for s, u in links[:60]
    ]
    covered = [(trace.read[s].strip() or "␣", f"{float(given[s]):.2f}") for s in range(len(given))][:60]
    body = (
        '<details><summary class="soft">The figures: strongest alignments, coverage, Pharaoh format</summary>'
        f'<p class="note"><code>{pharaoh(links)}</code> (source-target, from 0)</p><div class="pair">'
        + table(rows, ("written", "looks most at", "weight", "entropy, bits"))
        + table(covered, ("read", "coverage: attention in all"))
        + "</div></details>"
    )
    return Section("attention", "Where it looked", text, body, [figures.attention_map(trace)])


# ------------------------------------------------------------------------------------------------ next, states, units


def _next(trace: Trace) -> Section:
    what = "label" if " -> label" in str(trace.about.get("form", "")) else "symbol"
    scores = trace.tensors["scores.values"].float().exp()[:, 0]
    steps = len(scores)
    first = scores > 0.5
    said = "really came next" if _is_language_model(trace) else "was chosen"
    text = (
        f"Each column is a step, with the likeliest {what}s from the top; framed is what {said}. The likeliest has "
        f"more than half of the probability at {int(first.sum())} of {steps} steps."
    )
    if steps > 40:
        text += " The first 40 are drawn."
    return Section("next", f"Which {what} it expects", text, "", [figures.next_symbols(trace)])


def _states(trace: Trace) -> Section:
    short = _first(trace, _DRAWN)
    size = trace.about.get("hidden", 0)
    drawn = [figures.state_map(short, core=core) for core in short.cores]
    text = (
        f"A row is a unit, a column a step: blue is negative, orange positive. Of {size} units those are drawn that "
        "change most. Bands along a row are memory: a unit that keeps what it holds; the menu has the other layers"
    )
    gates = any(name.endswith((".f", ".z")) for name in trace.tensors)
    text += " and the gates, strong where they are open." if gates else "."
    if len(drawn) == 2:
        text += " First the encoder, then the decoder."
    return Section("states", "States along time", text, "", drawn)


def _first(trace: Trace, steps: int) -> Trace:
    """The first steps of a trace, for a picture."""
    if len(trace.read) <= steps and len(trace.written) <= steps:
        return trace
    tensors = {name: value[:steps] for name, value in trace.tensors.items()}
    return Trace(trace.read[:steps], trace.written[:steps], trace.expected[:steps], tensors, trace.names, trace.about)


def _unit(trace: Trace) -> Section:
    text = (
        "The text again, coloured by what a single unit of the highest layer holds after each step: blue negative, "
        "orange positive. Six of those that change most are on the buttons; some turn out to follow something one can "
        "name, as words, quotations or line ends."
    )
    return Section("units", "A single unit over the text", text, "", [figures.unit_text(_first(trace, 2 * _DRAWN))])


# ---------------------------------------------------------------------------------------------------------- gradients


def gradient_section(traces: dict[str, Trace]) -> Section:
    """How far the gradient reaches in one trace, or in several by the models' names."""
    named = {name: trace for name, trace in traces.items() if any(key.endswith(".dh") for key in trace.tensors)}
    only = next(iter(named.values())) if len(named) == 1 else None
    said, rows = [], []
    for name, trace in named.items():
        cell = str(trace.about.get("cell", ""))
        summed = _is_summed(trace)
        for core in trace.cores:
            for flow in gradient_flow(trace, core):
                label = figures.layer_name(flow.layer)
                for part, cells in _figures(flow).items():
                    rows.append((name, label + part, *cells) if only is None else (label + part, *cells))
                if not summed and flow.steps > 0:
                    kind = f"{name}, {_CELLS.get(cell, cell)}, {label}"
                    whose = label[0].upper() + label[1:] if only is not None else kind
                    said.append(f"<li><b>{_escape(whose)}.</b> {_escape(verdict(flow, cell))}</li>")
    text = (
        "The loss of the last output, followed backwards through time: how much a change of the state so many steps "
        "ago would still change it. A straight line down is a gradient that vanishes exponentially; below the dotted "
        "line, a thousandth, little can be learnt."
    )
    if any(_is_summed(trace) for trace in named.values()):
        text = (
            "How much a change of the state at each step would change the loss. It is summed over all steps, each of "
            "which adds its own part, so this does not tell how far a single one reaches back."
        )
    head = ("layer", "10-fold fall", "1000-fold fall", "at each step back", "memory of the gate", "gates saturated")
    body = f"<ul>{''.join(said)}</ul>" if said else ""
    body += table(rows, head if only is not None else ("model", *head))
    drawn = [
        figures.gradient_curves(named if only is None else only, core=core)
        for core in ("core", "decoder")
        if any(trace.layers(core) for trace in named.values())
    ]
    return Section("gradient", "How far back it learns", text, body, drawn)


def _is_summed(trace: Trace) -> bool:
    return trace.about.get("at", -1) is None and _outputs(trace) > 1


def _outputs(trace: Trace) -> int:
    for name in ("scores.names", "numbers"):
        if name in trace.tensors:
            return len(trace.tensors[name])
    return 1


def _figures(flow: Flow) -> dict[str, tuple[str, ...]]:
    """Rows of a table: that of h, and of an LSTM's c."""

    def reach(of: Reach) -> tuple[str, ...]:
        falls = (
            f"not in {flow.steps} steps" if fall is None else f"{fall} steps" for fall in (of.tenth, of.thousandth)
        )
        return *falls, "–" if math.isnan(of.growth) else f"× {of.growth:.3f}"

    memory = "–" if flow.memory is None else "∞" if math.isinf(flow.memory) else f"{flow.memory:.1f} steps"
    gates = ", ".join(f"{gate} {share:.0%}" for gate, share in flow.saturation.items()) or "–"
    rows = {"": (*reach(Reach(flow.tenth, flow.thousandth, flow.growth)), memory, gates)}
    if flow.c is not None:
        rows[", c"] = (*reach(flow.c), "", "")
    return rows
