"""Single units over a whole text: what they answer to, what drives them, and what is lost without them.

A unit is one entry of a layer's hidden state h (or of an LSTM's c, or of a gate). Its sign carries no meaning by
itself: with its weights turned round, the network computes the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from unrolled.cells import BoundCell, GatedCell, Lookup
from unrolled.data.scratch import Scratch
from unrolled.errors import ConfigError, DataError, ModelError, nearest
from unrolled.kinds import Text
from unrolled.model import LanguageModel, Model
from unrolled.nn import CoreState
from unrolled.trace.recording import GATES, Trace, gates_of
from unrolled.unroll import unroll

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = [
    "Activity",
    "Driver",
    "Effect",
    "Interesting",
    "Peak",
    "Switched",
    "activity",
    "activity_of",
    "drivers",
    "importance",
    "interesting",
    "intervene",
    "peaks",
    "persistence",
    "switched_on",
    "symbol_dependence",
]

Array: TypeAlias = npt.NDArray[Any]

_IN_MEMORY = 1 << 28  # bytes of values; more of them lie in a file without a name
_BLOCK = 1 << 22  # values in work at once, where all of them are read
_SCORES = 1 << 23  # numbers of one window of an intervention: gates and scores of all its rows


# ------------------------------------------------------------------------------------------------- activity


@dataclass(frozen=True)
class Activity:
    """The values of every unit of one layer after each symbol of a text was read.

    Attributes:
        layer, field: which; as in a `Trace`.
        ids: what was read, int [N], numbers into `names`.
        names: what to show for each symbol.
        values: float16 or float32 [N H]; above 256 MiB they lie in a file that is mapped into memory.
    """

    layer: str
    field: str
    ids: Int[Array, "N"]
    names: tuple[str, ...]
    values: Float[Array, "N H"]

    def __len__(self) -> int:
        """Symbols."""
        return len(self.ids)

    @property
    def units(self) -> int:
        """H."""
        return int(self.values.shape[1])

    def symbols(self, start: int, stop: int) -> tuple[str, ...]:
        """What was read from `start` to before `stop`; what lies outside the text is left out."""
        return tuple(self.names[i] for i in self.ids[max(start, 0) : max(stop, 0)].tolist())

    def unit(self, unit: int) -> Float[Array, "N"]:
        """One unit's values, float64.

        Raises:
            ModelError: there is no such unit.
        """
        if not 0 <= unit < self.units:
            raise ModelError(f"unit: expected 0 to {self.units - 1}, got {unit}")
        return self.values[:, unit].astype(np.float64)

    def _blocks(self, more: int = 0) -> Iterator[tuple[int, Tensor]]:
        """All values, float64, block by block, each with the place of its first; `more` of the next block at its
        end."""
        size = max(1, _BLOCK // max(self.units, 1))
        for start in range(0, len(self), size):
            yield start, torch.from_numpy(self.values[start : start + size + more].astype(np.float64))


def activity(
    model: Model, text: str, *, layer: str = "core.0.forward", field: str = "h", dtype: str = "float16"
) -> Activity:
    """The values of every unit of a layer over a whole text, of any length.

    The text is read in windows with the state handed on, by the model's ordinary run: what is rounded to float16 here
    are its own values. No more than one window of float32 states is in memory at a time.

    Args:
        model: a language model, or any other that reads text by a core in one direction.
        text: one document; it begins with a fresh state.
        layer: `core.K.forward`.
        field: h, c of an LSTM, or a gate (see `unrolled.trace.recording.GATES`).
        dtype: `"float16"`, or `"float32"`, which loses nothing and takes twice the room.

    Raises:
        DataError: the text is empty.
        ModelError: the model reads no text, or both directions, has no such layer or field, or a value is too large
            for float16.
        ConfigError: an unknown dtype.
    """
    if dtype not in ("float16", "float32"):
        raise ConfigError(f"dtype: expected float16 or float32, got {dtype!r}")
    k = _layer_number(model, layer)
    ids, names = _read(model, text)
    cell: Any = model.core.layers[k][0]  # type: ignore[index]
    _expect_field(cell, layer, field)
    hidden = model.core.hidden_size
    values = _Rows(len(ids), hidden, np.dtype(dtype))
    window = max(1, min(2048, (1 << 21) // (hidden * len(model.core.layers))))
    with _evaluating(model), torch.inference_mode():
        state = model.core.initial_state(1)
        for start in range(0, len(ids), window):
            piece = model.reader(ids[start : start + window, None])
            before = state.cells[k]
            run = model.core(piece, state, outputs=False, all_states=True)
            state, states = run.state, run.states.cells
            if field in states[k]._fields:
                found = getattr(states[k], field)
            else:
                x = states[k - 1].h if k else piece
                found = gates_of(cell, x, torch.cat([before.h[None].to(states[k].h.dtype), states[k].h[:-1]]))[field]
            values.add(found[:, 0].float().cpu().numpy(), layer, field)
    return Activity(layer, field, ids.cpu().numpy(), names, values.all())


def activity_of(trace: Trace, layer: str = "core.0.forward", field: str = "h") -> Activity:
    """The same of one recorded run, whatever the model is: both directions and decoders too.

    Raises:
        ModelError: the trace has no such layer or field.
    """
    name = f"{layer}.{field}"
    if name not in trace.tensors:
        raise ModelError(f"this trace has no {name}: {nearest(name, [n for n in trace.tensors if n.count('.') == 3])}")
    shown = trace.read
    if layer.startswith("decoder."):
        shown = ("<s>", *trace.written[:-1])
    values = trace.tensors[name].float().numpy()
    if len(shown) != len(values):
        raise ModelError(f"{layer}: it ran over {len(values)} steps, of which {len(shown)} have a name")
    numbers = {symbol: i for i, symbol in enumerate(dict.fromkeys(shown))}
    return Activity(layer, field, np.array([numbers[s] for s in shown], np.int64), tuple(numbers), values)


class _Rows:
    """Rows of numbers that come window by window; in memory if they are few, else in a mapped file."""

    def __init__(self, rows: int, size: int, dtype: np.dtype[Any]) -> None:
        self._shape, self._dtype, self._filled = (rows, size), dtype, 0
        self._file = Scratch(None, "the values of the units") if rows * size * dtype.itemsize > _IN_MEMORY else None
        self._memory = None if self._file else np.empty(self._shape, dtype)

    def add(self, values: Array, layer: str, field: str) -> None:
        with np.errstate(over="ignore"):
            rows = values.astype(self._dtype)
        if not np.isfinite(rows).all() and np.isfinite(values).all():
            raise ModelError(
                f"{layer}.{field}: its values go to {np.abs(values).max():.3g}, float16 to 65504: use dtype='float32'"
            )
        if self._file is not None:
            self._file.write(np.ascontiguousarray(rows))
        else:
            assert self._memory is not None
            self._memory[self._filled : self._filled + len(rows)] = rows
        self._filled += len(rows)

    def all(self) -> Array:
        if self._file is None:
            assert self._memory is not None
            return self._memory
        with self._file:
            return np.frombuffer(self._file.map(), self._dtype).reshape(self._shape)


def _read(model: Model, text: str) -> tuple[Tensor, tuple[str, ...]]:
    """The ids of a text [N], and the names of all symbols."""
    source = model.ends.input
    if not isinstance(source, Text) or source.characters is not None:
        what = "words with their characters" if isinstance(source, Text) else f"{source.kind}, not text"
        raise ModelError(f"this model reads {what}: record one run, and take activity_of(trace)")
    if not text:
        raise DataError("the text is empty: expected at least one symbol")
    encoded = model.vocabulary.encode(text) if isinstance(model, LanguageModel) else source.encode(text)[0]
    ids = torch.from_numpy(np.asarray(encoded).astype(np.int64)).to(model.device)
    return ids, tuple(source.vocabulary.name(i) for i in range(len(source.vocabulary)))


def _layer_number(model: Model, layer: str) -> int:
    if model.core.directions == 2:
        raise ModelError(
            "this model reads both directions, so that a text cannot be read window by window: record one run, and "
            "take activity_of(trace)"
        )
    known = [f"core.{k}.forward" for k in range(len(model.core.layers))]
    if layer not in known:
        raise ModelError(f"layer: there is no {layer!r} here: {nearest(layer, known)}")
    return known.index(layer)


def _expect_field(cell: Any, layer: str, field: str) -> None:
    bound = cell.bind() if isinstance(cell, GatedCell) and cell.keeps_equation() else None
    gates = () if bound is None else GATES[bound.equation.name]
    known = [*cell.initial_state(1)._fields, *gates]
    if field not in known:
        raise ModelError(f"field: {layer} has no {field!r}: expected {', '.join(known)}")


class _evaluating:
    """The model in evaluation mode, and then as it was."""

    def __init__(self, model: Model) -> None:
        self._model, self._training = model, model.training

    def __enter__(self) -> None:
        self._model.eval()

    def __exit__(self, *_: object) -> None:
        self._model.train(self._training)


# ------------------------------------------------------------------------------------- units in a stretch


@dataclass(frozen=True)
class Switched:
    """One unit in a chosen stretch of a text.

    Attributes:
        unit: which.
        difference: (mean inside - mean outside) / standard deviation outside, all of the text that is not in the
            stretch being outside; infinite where the unit never varies outside and is different inside.
        inside, outside: the two means.
        on: whether it is switched on in the stretch: at every step of it beyond the threshold, on one side of zero, and
            at none of the steps just before and after.
        sign: 1 if it goes up in the stretch, -1 if it goes down.
    """

    unit: int
    difference: float
    inside: float
    outside: float
    on: bool
    sign: int


def switched_on(
    activity: Activity, start: int, stop: int, *, threshold: float = 0.3, margin: int = 1
) -> list[Switched]:
    """How every unit behaves in the symbols [start, stop): those that are switched on there first, and among these and
    the others those that differ most from the rest of the text.

    Sources: on inside, off around it: LSTMVis, Strobelt et al. 2018, section 4, here on both sides of zero;
    the difference in standard deviations of the rest: Glass 1976.

    Args:
        threshold: beyond which a unit is on.
        margin: of how many steps before and after the stretch it must be off; those outside the text do not count.

    Raises:
        DataError: the stretch is empty, not within the text, or all of it.
        ConfigError: a threshold or margin below 0.
    """
    if not 0 <= start < stop <= len(activity):
        raise DataError(f"expected a stretch within 0 to {len(activity)}, got {start} to {stop}")
    if stop - start == len(activity):
        raise DataError("the stretch is the whole text: nothing is left to compare it with")
    if threshold < 0 or margin < 0:
        raise ConfigError(f"expected a threshold and a margin of at least 0, got {threshold} and {margin}")
    values = activity.values
    within = torch.from_numpy(values[start:stop].astype(np.float64))
    beside = np.concatenate([values[max(start - margin, 0) : start], values[stop : stop + margin]])
    around = torch.from_numpy(beside.astype(np.float64))

    total = torch.zeros(activity.units, dtype=torch.float64)
    for _, block in activity._blocks():
        total += block.sum(0)
    count = len(activity) - (stop - start)
    outside = (total - within.sum(0)) / count
    squares = -((within - outside) ** 2).sum(0)
    for _, block in activity._blocks():
        squares += ((block - outside) ** 2).sum(0)
    inside = within.mean(0)
    spread = (squares.clamp(min=0) / count).sqrt()
    gap = inside - outside
    # What is left of a variance of nothing is rounding.
    still = spread <= 1e-9 * outside.abs().clamp(min=1e-9)
    difference = torch.where(gap == 0, 0.0, gap / torch.where(still, 0.0, spread))

    sign = torch.where(inside >= outside, 1.0, -1.0)
    on = ((within * sign) > threshold).all(0) & ((around * sign) <= threshold).all(0)
    found = [
        Switched(u, float(difference[u]), float(inside[u]), float(outside[u]), bool(on[u]), int(sign[u]))
        for u in range(activity.units)
    ]
    return sorted(found, key=lambda one: (not one.on, -abs(one.difference), one.unit))


# ---------------------------------------------------------------------------------------- what drives a unit


@dataclass(frozen=True)
class Driver:
    """What reading one symbol does to a unit.

    Attributes:
        symbol: which.
        count: how often it was read (the text's first symbol aside).
        change: by how much the unit's value changes when it is read, on average.
        error: that mean's standard error, s / sqrt(count); NaN where it was read once.
        sure: the end of change +- 1.96 errors that is nearer to zero, 0 if zero lies within or it was read too rarely:
            what a symbol does at the least, and by what they are ranked.
    """

    symbol: str
    count: int
    change: float
    error: float
    sure: float


def drivers(activity: Activity, unit: int, *, least: int = 5) -> list[Driver]:
    """What every symbol of the text does to a unit: those that drive it up first, those that drive it down last.

    The change at a symbol is v_t - v_{t-1}. The first symbol has nothing before it and is left out.

    Args:
        least: how often a symbol must be read to be ranked; rarer ones come in the middle, with their figures.

    Raises:
        ModelError: there is no such unit.
        DataError: the text has one symbol only.
    """
    values = activity.unit(unit)
    if len(values) < 2:
        raise DataError("the text is one symbol: nothing changes")
    read, change = activity.ids[1:].astype(np.int64), np.diff(values)
    counts = np.bincount(read)
    means = np.bincount(read, change) / np.maximum(counts, 1)
    squares = np.bincount(read, (change - means[read]) ** 2)
    found = []
    for i in np.flatnonzero(counts).tolist():
        n, mean = int(counts[i]), float(means[i])
        error = math.sqrt(squares[i] / (n - 1) / n) if n > 1 else math.nan
        sure = max(abs(mean) - 1.96 * error, 0.0) if n >= max(least, 2) else 0.0
        found.append(Driver(activity.names[i], n, mean, error, math.copysign(sure, mean) if sure else 0.0))
    return sorted(found, key=lambda one: (-one.sure, -one.change))


@dataclass(frozen=True)
class Peak:
    """A place where a unit's value is extreme.

    Attributes:
        at: which symbol of the text, from 0.
        value: of the unit after it was read.
        start: the first symbol of the context.
        symbols, values: the context, that symbol within it, and the unit's value after each.
    """

    at: int
    value: float
    start: int
    symbols: tuple[str, ...]
    values: tuple[float, ...]

    @property
    def text(self) -> str:
        """The context as text."""
        return "".join(self.symbols)


def peaks(activity: Activity, unit: int, count: int = 10, *, context: int = 30, sign: int = 1) -> list[Peak]:
    """Where in the text a unit's value is highest, with what stands around: the pictures of Karpathy et al. 2016.

    Each place is more than `context` symbols from every one before it in the list, which has a higher value, so that
    one place is not told ten times.

    Args:
        context: so many symbols before and after are given.
        sign: -1: where it is lowest.

    Raises:
        ModelError: there is no such unit.
        ConfigError: a sign that is neither 1 nor -1, or a count or context below 0.
    """
    if sign not in (1, -1):
        raise ConfigError(f"sign: expected 1 or -1, got {sign}")
    if count < 0 or context < 0:
        raise ConfigError(f"expected a count and a context of at least 0, got {count} and {context}")
    values = activity.unit(unit)
    free = np.ones(len(values), bool)
    found: list[Peak] = []
    for at in np.argsort(-sign * values, kind="stable").tolist():
        if len(found) == count:
            break
        if not free[at]:
            continue
        start, stop = max(at - context, 0), at + context + 1
        free[start:stop] = False
        around = tuple(values[start:stop].tolist())
        found.append(Peak(at, float(values[at]), start, activity.symbols(start, stop), around))
    return found


# --------------------------------------------------------------------------------- which units are worth a look


def symbol_dependence(activity: Activity) -> Float[Tensor, "H"]:
    """The share of each unit's variance that the symbol just read explains, 0 to 1: the correlation ratio eta^2, the
    variance of the symbols' means over the whole. 1: the unit tells the last symbol and nothing else; near 0: it tells
    something that goes on. NaN for a unit that never varies. Source: Pearson 1905."""
    symbols = len(activity.names)
    counts = torch.from_numpy(np.bincount(activity.ids.astype(np.int64), minlength=symbols)).double()
    sums = torch.zeros(symbols, activity.units, dtype=torch.float64)
    mean, whole = _moments(activity)
    for start, block in activity._blocks():
        ids = torch.from_numpy(activity.ids[start : start + len(block)].astype(np.int64))
        sums.index_add_(0, ids, block - mean)
    between = (sums**2 / counts.clamp(min=1)[:, None]).sum(0)
    return between / torch.where(whole > 0, whole, math.nan)


def persistence(activity: Activity, lag: int = 10) -> Float[Tensor, "H"]:
    """How much of each unit's value is still there `lag` symbols later: its autocorrelation at that lag, -1 to 1. NaN
    for a unit that never varies.

    Raises:
        DataError: the text is not longer than the lag, or the lag is below 1.
    """
    if not 1 <= lag < len(activity):
        raise DataError(f"lag: expected 1 to {len(activity) - 1}, the text being {len(activity)} symbols, got {lag}")
    mean, whole = _moments(activity)
    products = torch.zeros(activity.units, dtype=torch.float64)
    size = max(1, _BLOCK // max(activity.units, 1))
    for _, block in activity._blocks(more=lag):
        centred = block - mean
        rows = min(size, len(block) - lag)
        if rows > 0:
            products += (centred[:rows] * centred[lag : lag + rows]).sum(0)
    return products / torch.where(whole > 0, whole, math.nan)


def _moments(activity: Activity) -> tuple[Tensor, Tensor]:
    """Each unit's mean, and the sum of its squared deviations, 0 where it never varies."""
    total = torch.zeros(activity.units, dtype=torch.float64)
    low = torch.full((activity.units,), math.inf, dtype=torch.float64)
    high = -low
    for _, block in activity._blocks():
        total += block.sum(0)
        low, high = torch.minimum(low, block.amin(0)), torch.maximum(high, block.amax(0))
    mean = total / len(activity)
    squares = torch.zeros_like(total)
    for _, block in activity._blocks():
        squares += ((block - mean) ** 2).sum(0)
    return mean, torch.where(high > low, squares, 0.0)


@dataclass(frozen=True)
class Interesting:
    """A unit that is worth a look, and why: `matters` (the nats per symbol that its removal costs), `reads` (the share
    of its variance that the last symbol explains) or `keeps` (its autocorrelation), with that figure."""

    unit: int
    why: Literal["matters", "reads", "keeps"]
    figure: float


def interesting(
    activity: Activity, effects: Sequence[Effect] = (), *, count: int = 6, lag: int = 10
) -> list[Interesting]:
    """A handful of units that are worth a look, in turn the next best of each ranking, no unit twice: what matters most
    to the model (`importance`, if given), what depends most on the symbol just read (`symbol_dependence`), and what
    lasts longest (`persistence`).

    Args:
        effects: what `importance` found for this layer.
        lag: for `persistence`; a short text's own length less one, if that is less.

    Raises:
        DataError: the text is one symbol.
    """
    rankings: dict[Any, dict[int, float]] = {
        "matters": {effect.unit: effect.cost for effect in effects},
        "reads": dict(enumerate(symbol_dependence(activity).tolist())),
        "keeps": dict(enumerate(persistence(activity, max(1, min(lag, len(activity) - 1))).tolist())),
    }
    orders = {
        why: sorted((u for u, figure in ranking.items() if not math.isnan(figure)), key=lambda u: -ranking[u])
        for why, ranking in rankings.items()
    }
    found: list[Interesting] = []
    taken: set[int] = set()
    while len(found) < count and any(orders.values()):
        for why, order in orders.items():
            while order and order[0] in taken:
                order.pop(0)
            if order and len(found) < count:
                taken.add(order[0])
                found.append(Interesting(order[0], why, rankings[why][order.pop(0)]))
    return found


# -------------------------------------------------------------------------------------------- interventions


@dataclass(frozen=True)
class Effect:
    """What a language model does differently over a text when one unit is held at a value.

    Attributes:
        layer, field, unit: which.
        value: what it was held at, on average over the steps.
        nats_before, nats: the mean cross-entropy of the text's symbols, ordinary and with the unit held.
        kl: the mean Kullback-Leibler divergence of the held model's distribution of the next symbol from the ordinary
            one, KL(ordinary || held), in nats.
        changed: the share of steps whose likeliest next symbol is another.
        symbols: the symbols whose probability changes most, on average over the steps, and by how much; the greatest
            change first, whichever way.
    """

    layer: str
    field: str
    unit: int
    value: float
    nats_before: float
    nats: float
    kl: float
    changed: float
    symbols: tuple[tuple[str, float], ...]

    @property
    def cost(self) -> float:
        """What holding it costs, in nats per symbol; below 0 the model does better so."""
        return self.nats - self.nats_before


def intervene(
    model: LanguageModel,
    text: str,
    layer: str,
    unit: int,
    value: float | Float[Tensor, "N"] | Literal["mean"] = 0.0,
    *,
    field: str = "h",
    top: int = 5,
) -> Effect:
    """A text read with one unit held at a value after every step: what the next step, the layer above and the output
    read is the held one. 0 removes it.

    The state before the first symbol is the ordinary one. A held c of an LSTM makes its h by the equation,
    h = o * tanh(c). Sources: a unit held fixed: Radford et al. 2017; removed: Meyes et al. 2019.

    Args:
        value: a number; `"mean"`: the unit's own mean over this text, which takes away what it tells and leaves the
            others the level they are used to; or a value for each symbol.
        field: h, or c of an LSTM.
        top: how many of the symbols whose probability changes are told.

    Raises:
        ModelError: no language model, or there is no such layer, unit or field, or the cell is one of your own whose
            output is not its h.
        DataError: a text of fewer than two symbols, or values of another number than its symbols.
    """
    (effect,) = _interventions(model, text, layer, [unit], value, field, top, 1)
    return effect


def importance(
    model: LanguageModel,
    text: str,
    layer: str = "core.0.forward",
    *,
    units: Iterable[int] | None = None,
    value: float | Literal["mean"] = 0.0,
    field: str = "h",
    top: int = 5,
    at_once: int = 512,
) -> list[Effect]:
    """Every unit of a layer held in turn (see `intervene`): what costs most first.

    The units are rows of one batch. On one core, 1,000 symbols take an LSTM of 512 units some 15 seconds.

    Args:
        units: only these.
        at_once: so many rows at most.

    Raises:
        ModelError, DataError: as `intervene`.
        ConfigError: at_once below 1.
    """
    if at_once < 1:
        raise ConfigError(f"at_once: expected at least 1 row, got {at_once}")
    if not isinstance(model, LanguageModel):
        raise ModelError("expected a language model: what is measured is how well it predicts the next symbol")
    chosen = range(model.core.hidden_size) if units is None else list(units)
    effects = _interventions(model, text, layer, chosen, value, field, top, at_once)
    return sorted(effects, key=lambda effect: (-effect.cost, effect.unit))


def _interventions(
    model: LanguageModel,
    text: str,
    layer: str,
    units: Sequence[int],
    value: float | Tensor | Literal["mean"],
    field: str,
    top: int,
    at_once: int,
) -> list[Effect]:
    if not isinstance(model, LanguageModel):
        raise ModelError("expected a language model: what is measured is how well it predicts the next symbol")
    k = _layer_number(model, layer)
    ids, names = _read(model, text)
    if len(ids) < 2:
        raise DataError("the text is one symbol: an effect takes one to read and one to predict")
    cell: Any = model.core.layers[k][0]  # type: ignore[index]
    fields = cell.initial_state(1)._fields
    if field not in fields:
        raise ModelError(
            f"field: only the state of {layer} can be held, and that has no {field!r}: {nearest(field, fields)}"
        )
    for unit in units:
        if not 0 <= unit < model.core.hidden_size:
            raise ModelError(f"unit: expected 0 to {model.core.hidden_size - 1}, got {unit}")
    if isinstance(value, Tensor) and value.shape != ids.shape:
        raise DataError(f"value: expected one for each of the text's {len(ids)} symbols, got {list(value.shape)}")
    means = activity(model, text, layer=layer, field=field, dtype="float32").values.mean(0) if value == "mean" else None
    effects: list[Effect] = []
    with _evaluating(model), torch.inference_mode():
        for first in range(0, len(units), at_once):
            rows = torch.tensor(list(units[first : first + at_once]), device=model.device)
            dtype = next(model.core.parameters()).dtype
            if means is not None:
                held = torch.from_numpy(means).to(model.device, dtype)[rows].expand(len(ids), -1)
            elif isinstance(value, Tensor):
                held = value.to(model.device, dtype)[:, None].expand(-1, len(rows))
            else:
                held = torch.full((1, 1), float(value), dtype=dtype, device=model.device).expand(len(ids), len(rows))
            effects += _hold(model, ids, names, k, rows, held, layer, field, top)
    return effects


def _hold(
    model: LanguageModel,
    ids: Int[Tensor, "N"],
    names: Sequence[str],
    k: int,
    rows: Int[Tensor, "B"],
    held: Float[Tensor, "N B"],
    layer: str,
    field: str,
    top: int,
) -> list[Effect]:
    """Row b of the batch holds unit rows[b] of layer k; what lies below the layer is read once, in one row."""
    core, batch = model.core, len(rows)
    cells: list[Any] = [directions[0] for directions in core.layers]  # type: ignore[index]
    ordinary = core.initial_state(1)
    states = [cell.initial_state(batch) for cell in cells[k:]]
    gates = 4  # the most that a cell has
    window = max(1, min(1024, _SCORES // (batch * (gates * core.hidden_size + len(names)))))
    steps = len(ids) - 1
    before, differing = 0.0, torch.zeros(batch, dtype=torch.float64, device=ids.device)
    nats, kl = torch.zeros_like(differing), torch.zeros_like(differing)
    moved = torch.zeros(batch, len(names), dtype=torch.float64, device=ids.device)
    for start in range(0, steps, window):
        stop = min(start + window, steps)
        x = model.reader(ids[start:stop, None])
        run = core(x, CoreState(ordinary.cells), all_states=True)
        p = torch.log_softmax(model.writer(run.outputs)[:, 0].double(), dim=-1)  # [T V]
        ordinary = run.state
        below: Any = run.states.cells[k - 1].h if k else x
        y, states[0] = _held_layer(cells[k], below, states[0], rows, held[start:stop], field)
        for n, cell in enumerate(cells[k + 1 :], 1):
            above = unroll(cell, y, states[n], backend=core.backend)
            y, states[n] = above.outputs, above.state
        q = torch.log_softmax(model.writer(y).double(), dim=-1)  # [T B V]
        target = ids[start + 1 : stop + 1]
        before -= float(p.gather(1, target[:, None]).sum())
        nats -= q.gather(2, target[:, None, None].expand(-1, batch, 1)).sum((0, 2))
        differing += (q.argmax(-1) != p.argmax(-1)[:, None]).sum(0)
        likely = p.exp()
        kl += (torch.xlogy(likely, likely).sum() - torch.einsum("tv,tbv->b", likely, q)).clamp(min=0)
        moved += q.exp_().sum(0) - likely.sum(0)
    moved /= steps
    found = []
    for b, unit in enumerate(rows.tolist()):
        most = moved[b].abs().topk(min(top, len(names))).indices.tolist()
        found.append(
            Effect(
                layer,
                field,
                unit,
                float(held[:steps, b].double().mean()),
                before / steps,
                float(nats[b]) / steps,
                float(kl[b]) / steps,
                float(differing[b]) / steps,
                tuple((names[i], float(moved[b, i])) for i in most),
            )
        )
    return found


def _held_layer(
    cell: Any, x: Any, state: Any, rows: Int[Tensor, "B"], held: Float[Tensor, "T B"], field: str
) -> tuple[Float[Tensor, "T B H"], Any]:
    """A layer over one row of inputs, in as many rows as there are units to hold: outputs, and the last state."""
    bound = cell.bind() if isinstance(cell, GatedCell) and cell.keeps_equation() else cell
    built_in = isinstance(bound, BoundCell)
    projected: Any = bound.project(x) if built_in else None  # [T 1 G*H], the same for all rows
    here = torch.arange(len(rows), device=rows.device)
    outputs = []
    for t, values in enumerate(held):
        old = state
        if built_in:
            state = bound.recur(projected[t], old)
            y = state.h
        else:
            one = x.vectors()[t] if isinstance(x, Lookup) else x[t]
            y, state = cell.step(one.expand(len(rows), -1), old)
            if y is not state.h or field != "h":
                raise ModelError(
                    "a cell of your own can have a unit of h held if that is what its step gives out: expected step to "
                    "return (h, state) with state.h the very same tensor, and field='h'"
                )
        part = getattr(state, field).clone()
        part[here, rows] = values
        state = state._replace(**{field: part})
        if field == "c":
            h = state.h.clone()
            h[here, rows] = _output_gate(bound, projected[t], old.h, rows) * torch.tanh(values)
            state = state._replace(h=h)
        outputs.append(state.h)
    return torch.stack(outputs), state


def _output_gate(bound: BoundCell, projected: Tensor, h: Float[Tensor, "B H"], rows: Tensor) -> Float[Tensor, "B"]:
    """o of one unit in each row, as in `unrolled.cells.LSTM`."""
    weights, at = bound.weights, 3 * bound.hidden_size + rows
    bias = 0.0 if weights.bias_hh is None else weights.bias_hh[at]
    recurrent = (F.embedding(at, weights.hh) * h).sum(-1) + bias
    return torch.sigmoid(projected[0, at] + recurrent)
