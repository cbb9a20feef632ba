"""What comes next in a series as output: forecasting. (What comes next in a text is in `unrolled.kinds.text`.)"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unrolled.errors import ConfigError, DataError
from unrolled.kinds.contract import Answer, Arrays, Loss, Output, Run, Score, Steps, Targets, Writer, register
from unrolled.kinds.label import real
from unrolled.kinds.number import Scale
from unrolled.kinds.scores import SeriesScore
from unrolled.kinds.series import NumbersReader, Series, series_of

if TYPE_CHECKING:
    from jaxtyping import Float

    from unrolled.config import Config
    from unrolled.nn import Core

__all__ = ["Next", "SeriesWriter"]


@register
class Next(Output):
    """The next steps of the series that is read.

    Args:
        scale: of the columns, as in the input.
        change: root mean square, per column, of the change from one step to the next; the scale's deviation where
            there is none.
        naive: mean absolute error, per column, of the forecast "as one season ago" within the training part; what MASE
            divides by (Hyndman and Koehler 2006).
        horizon: how many steps ahead; quantiles: to forecast beside the middle.
    """

    kind: ClassVar[str] = "next"
    aligned: ClassVar[bool] = True
    best = ("mase", "min")

    def __init__(
        self,
        scale: Scale,
        change: Sequence[float],
        naive: Sequence[float],
        horizon: int,
        quantiles: Sequence[float] = (),
    ) -> None:
        self.scale = scale
        self.change, self.naive = np.asarray(change, np.float64), np.asarray(naive, np.float64)
        self.horizon, self.quantiles = horizon, tuple(sorted(set(quantiles)))

    @classmethod
    def learn(cls, values: Iterable[Any], config: Config) -> Next:
        """
        Raises:
            DataError: a value is no series, or none is longer than a season.
        """
        output = config.output
        season, longest = output.season, 0
        changes, squares, pairs, errors = 0, np.zeros(1), 0, np.zeros(1)

        def passing() -> Iterator[npt.NDArray[np.float64]]:
            nonlocal longest, changes, squares, pairs, errors
            for value in values:
                series = series_of(value)
                yield series
                longest = max(longest, len(series))
                changes, squares = changes + len(series) - 1, squares + (np.diff(series, axis=0) ** 2).sum(0)
                pairs += max(len(series) - season, 0)
                errors = errors + np.abs(series[season:] - series[:-season]).sum(0)

        scale = Scale.learn(passing())
        if not pairs:
            raise DataError(
                f"output.season: expected a season shorter than the series, whose longest in the training part has "
                f"{longest} steps, got {season}"
            )
        change = np.sqrt(squares / changes)
        change = np.where(change > 0, change, scale.deviation)
        return cls(scale, change.tolist(), (errors / pairs).tolist(), output.horizon, output.quantiles)

    def encode(self, value: Any) -> Arrays:
        """The scaled numbers, float32 [T F]: what is to be forecast is what is read, a step later."""
        return Series(self.scale).encode(value)

    def writer(self, config: Config, reader: Any, core: Core) -> Writer:
        """
        Raises:
            ConfigError: the input is no series of as many columns: a forecast could not be read as the next step.
        """
        if not isinstance(reader, NumbersReader) or reader.step_size != self.scale.width:
            raise ConfigError("output.kind: next forecasts the series that is read: expected input.kind series")
        return SeriesWriter(core.output_size, self.change / self.scale.deviation, self.horizon, self.quantiles)

    def answer(self, raw: Tensor) -> Answer:
        """raw: scaled forecasts [1+Q horizon F], the middle and then each quantile."""
        middle, *quantiles = self.scale.undo(raw.double().numpy()).tolist()
        text = "; ".join(" ".join(f"{number:.6g}" for number in step) for step in middle)
        named = {f"{share:g}": found for share, found in zip(self.quantiles, quantiles, strict=True)}
        return Answer(middle, text, {"quantiles": named} if named else {})

    def trivial(self, context: npt.NDArray[Any], config: Config) -> npt.NDArray[Any]:
        """The forecast that a model has to beat, [horizon F]: each step as one season before; where the context is
        shorter than a season, as its last step."""
        season = config.output.season if config.output.season <= len(context) else 1
        rows = len(context) - season + np.arange(self.horizon) % season
        return np.asarray(context)[rows]

    def score(self, config: Config) -> Score:
        return SeriesScore(self.naive)

    def to_json(self) -> dict[str, Any]:
        return {
            "scale": self.scale.to_json(),
            "change": self.change.tolist(),
            "naive": self.naive.tolist(),
            "horizon": self.horizon,
            "quantiles": list(self.quantiles),
        }

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> Next:
        return cls(Scale.from_json(obj["scale"]), obj["change"], obj["naive"], int(obj["horizon"]), obj["quantiles"])


class SeriesWriter(Writer):
    """Hidden states -> the next step: y_{t+1} = x_t + d (W h_t + b), with d the size of a usual change.

    What is learnt is the change: untrained, with W and b zero, the forecast is the naive one, that nothing changes, and
    a level that the training part never had is carried on and not drawn back to the mean. Errors too are in units of d:
    where a series is sampled densely, its changes are tiny beside its level, and would be learnt late.

    With quantiles, y_{t+1} is the median, and each quantile further from it lies d times a softplus of its own
    W h_t + b beyond its neighbour, so that they never cross. The loss is the pinball loss of them all; without, it is
    Huber's, which a few wild steps do not rule.

    Ahead of the next step the forecast is fed back: the middle is the path on which each step is the median given the
    path so far. Quantiles of a step further on are of that step's own distribution, not sums of one-step quantiles:
    they are read off sample paths, on which each step is drawn at random from the quantiles given the path so far, each
    column on its own. Between the quantiles that are learnt, and beyond them, a number is linear in the standard normal
    that is drawn, so that the tails are a normal distribution's. The draws are the same in each call and for each row.

    Args:
        size: H, of a hidden state vector.
        change: d of each of F columns, scaled as they are read; kept in the model's JSON, not among its weights.
        horizon: how many steps `answer` goes ahead.
        quantiles: each in (0, 1), rising; 0.5 is there always.
    """

    paths = 100
    """How many are sampled. Each step's draws are spread evenly over them, so that few tell as much as many."""

    change: Tensor
    knots: Tensor

    def __init__(self, size: int, change: npt.ArrayLike, horizon: int, quantiles: Sequence[float] = ()) -> None:
        super().__init__()
        self.register_buffer("change", torch.tensor(change, dtype=torch.float32), persistent=False)
        self.columns, self.horizon, self.quantiles = len(self.change), horizon, tuple(quantiles)
        self.shares = sorted({*quantiles, 0.5})
        self.linear = nn.Linear(size, len(self.shares) * self.columns)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("knots", torch.special.ndtri(torch.tensor(self.shares)), persistent=False)

    def forward(self, hidden: Float[Tensor, "*n H"], last: Float[Tensor, "*n F"]) -> Float[Tensor, "*n K F"]:
        """The next step after `last`, at each of K shares: the quantiles and the middle."""
        found = self.linear(hidden).view(*hidden.shape[:-1], len(self.shares), self.columns)
        at = self.shares.index(0.5)
        middle = found[..., at : at + 1, :]
        above = middle + F.softplus(found[..., at + 1 :, :]).cumsum(-2)
        below = middle - F.softplus(found[..., :at, :]).flip(-2).cumsum(-2).flip(-2)
        return last[..., None, :] + self.change * torch.cat([below, middle, above], dim=-2)

    def loss(self, read: Callable[[], Any], run: Run, steps: Steps, targets: Targets) -> Loss:
        """Of all steps of each row but its first, each told from those before it."""
        series = targets.tensors[0]
        hidden = run(read(), lengths=steps.lengths).outputs[:-1]
        mask = real(steps.lengths - 1, len(hidden), hidden.device)
        found = self(hidden[mask], series[:-1][mask])  # [M K F]
        missed = (series[1:][mask][:, None] - found) / self.change
        count = len(missed) * self.columns
        if not self.quantiles:
            return Loss(F.huber_loss(missed, torch.zeros_like(missed), reduction="sum"), count)
        shares = torch.tensor(self.shares, device=missed.device)[:, None]
        return Loss(torch.maximum(shares * missed, (shares - 1) * missed).sum(), count)

    def scores(self, read: Callable[[], Any], run: Run, steps: Steps, targets: Targets | None = None) -> Tensor:
        series = read()
        return self.at(run(series, lengths=steps.lengths).outputs, series)

    def at(self, hidden: Float[Tensor, "*n H"], last: Float[Tensor, "*n F"]) -> Float[Tensor, "*n F"]:
        """The middle of the next step after `last`, scaled."""
        return self(hidden, last)[..., self.shares.index(0.5), :]  # type: ignore[no-any-return]

    def answer(self, read: Callable[[], Any], run: Run, steps: Steps) -> list[Any]:
        """Scaled forecasts [1+Q horizon F] of each row: the middle, then each quantile."""
        series = read()
        context = run(series, lengths=steps.lengths)
        ends = steps.lengths.to(series.device) - 1
        rows = torch.arange(len(ends), device=series.device)
        forecast = self.forecast(run, series[ends, rows], context.outputs[ends, rows], context.state)
        return list(forecast.float().cpu())

    def forecast(
        self, run: Run, last: Float[Tensor, "B F"], hidden: Float[Tensor, "B H"], state: Any
    ) -> Float[Tensor, "B Q+1 horizon F"]:
        """What comes after `last`, whose reading left `state` and the core's output `hidden`."""
        batch, paths = len(last), self.paths if self.quantiles else 0
        # The middle goes along as one path more, on which each draw is 0.
        rows = torch.arange(batch, device=last.device).repeat_interleave(1 + paths)
        last, hidden, state = last[rows], hidden[rows], state.select(rows)
        generator = torch.Generator().manual_seed(0)
        taken = []
        for ahead in range(self.horizon):
            if ahead:
                further = run(last[None], state=state)
                hidden, state = further.outputs[0], further.state
            order = torch.rand(paths, self.columns, generator=generator).argsort(0)
            draws = torch.special.ndtri((order + 0.5) / max(paths, 1))
            draws = torch.cat([torch.zeros(1, self.columns), draws]).to(last).repeat(batch, 1)
            last = self._between(self(hidden, last), draws)
            taken.append(last)
        steps = torch.stack(taken, dim=1).view(batch, 1 + paths, self.horizon, self.columns)
        middle = steps[:, :1]
        if not self.quantiles:
            return middle
        shares = torch.tensor(self.quantiles, dtype=steps.dtype, device=steps.device)
        return torch.cat([middle, steps[:, 1:].quantile(shares, dim=1).transpose(0, 1)], dim=1)

    def _between(self, found: Float[Tensor, "N K F"], draws: Float[Tensor, "N F"]) -> Float[Tensor, "N F"]:
        """The numbers at standard normal draws, on lines through those at the knots."""
        knots = self.knots.to(found.dtype)
        if len(knots) == 1:
            return found[:, 0]
        right = torch.searchsorted(knots, draws.contiguous()).clamp(1, len(knots) - 1)
        low, high = (found.gather(1, side[:, None])[:, 0] for side in (right - 1, right))
        share = (draws - knots[right - 1]) / (knots[right] - knots[right - 1])
        return torch.lerp(low, high, share)
