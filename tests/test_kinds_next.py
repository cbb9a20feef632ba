"""What comes next in a series: forecasts that are the naive one untrained, and far better when trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ends import Small, again, config_of

from unrolled.errors import ConfigError, DataError
from unrolled.kinds.contract import OUTPUTS, Targets
from unrolled.kinds.next import Next, SeriesWriter
from unrolled.kinds.series import Series


def config(*settings: str) -> Any:
    return config_of("input.kind=series", "output.kind=next", *settings)


DRAW = np.random.default_rng(0)
LONG = DRAW.normal([10.0, -3.0], [2.0, 50.0], (40, 2)).cumsum(0)
SHORT = DRAW.normal(5.0, 1.0, (7, 2))


def small(values: list[Any], *settings: str, hidden: int = 16) -> Small:
    torch.manual_seed(0)
    chosen = config(f"core.hidden={hidden}", *settings)
    return Small(chosen, Series.learn(values, chosen), Next.learn(values, chosen))


def stirred(*settings: str) -> Small:
    """A model whose writer says something untrained too."""
    model = small([LONG], *settings).eval()
    with torch.no_grad():
        for parameter in model.writer.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


# --- what is learnt


def test_kind_is_known() -> None:
    assert OUTPUTS["next"] is Next


@pytest.mark.parametrize("season", [1, 3, 39])
def test_the_naive_error_is_that_of_one_season_ago(season: int) -> None:
    learnt = Next.learn([LONG, SHORT], config(f"output.season={season}"))
    series = [LONG] if season >= 7 else [LONG, SHORT]
    errors = [np.abs(one[t] - one[t - season]) for one in series for t in range(season, len(one))]
    np.testing.assert_allclose(learnt.naive, np.mean(errors, axis=0))
    np.testing.assert_allclose(learnt.scale.mean, np.concatenate([LONG, SHORT]).mean(0))
    changes = np.concatenate([np.diff(one, axis=0) for one in (LONG, SHORT)])
    np.testing.assert_allclose(learnt.change, np.sqrt((changes**2).mean(0)))


def test_a_column_that_never_changes_is_forecast_to_stay() -> None:
    still = LONG.copy()
    still[:, 1] = 4.0
    model = small([still]).eval()
    assert model.mean_loss([still], [still]).isfinite()
    np.testing.assert_allclose(np.array(model.output.answer(model.raw([still])[0]).value)[:, 1], 4.0)


def test_a_season_that_no_series_has_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        Next.learn([LONG, SHORT], config("output.season=40"))
    assert str(caught.value) == (
        "output.season: expected a season shorter than the series, whose longest in the training part has 40 steps, "
        "got 40"
    )


def test_json_gives_the_same() -> None:
    learnt = Next.learn([LONG], config("output.horizon=5", "output.quantiles=[0.9, 0.1]"))
    back = again(learnt)
    assert (back.horizon, back.quantiles) == (5, (0.1, 0.9))
    np.testing.assert_array_equal(back.naive, learnt.naive)
    np.testing.assert_array_equal(back.change, learnt.change)
    np.testing.assert_array_equal(back.encode(SHORT)[0], learnt.encode(SHORT)[0])


def test_what_is_to_be_forecast_is_what_is_read() -> None:
    chosen = config()
    np.testing.assert_array_equal(
        Next.learn([LONG], chosen).encode(SHORT)[0], Series.learn([LONG], chosen).encode(SHORT)[0]
    )
    with pytest.raises(DataError, match="expected 2 numbers a step, got 1"):
        Next.learn([LONG], chosen).encode(SHORT[:, :1])


def test_only_the_series_that_is_read_can_be_forecast() -> None:
    chosen = config()
    with pytest.raises(ConfigError) as caught:
        Small(chosen, Series.learn([LONG[:, :1]], chosen), Next.learn([LONG], chosen))
    assert str(caught.value) == "output.kind: next forecasts the series that is read: expected input.kind series"


@pytest.mark.parametrize("season, wanted", [(1, [6, 6, 6, 6, 6]), (3, [4, 5, 6, 4, 5]), (9, [6, 6, 6, 6, 6])])
def test_the_trivial_forecast_is_that_of_one_season_ago(season: int, wanted: list[int]) -> None:
    chosen = config(f"output.season={season}", "output.horizon=5")
    found = Next.learn([LONG], chosen).trivial(SHORT, chosen)
    np.testing.assert_array_equal(found["naive"], SHORT[wanted])
    assert ("last" in found) == (season > 1)  # else the two are one
    if season > 1:
        np.testing.assert_array_equal(found["last"], SHORT[[6] * 5])


# --- the loss


@pytest.mark.parametrize("quantiles", [(), (0.1, 0.9), (0.7,), (0.25, 0.5)])
def test_the_loss_is_that_of_every_step_from_those_before_it(quantiles: tuple[float, ...]) -> None:
    model = stirred(f"output.quantiles={list(quantiles)}")
    shares = sorted({*quantiles, 0.5})
    total, count = 0.0, 0
    for raw in (LONG, SHORT):
        (series,) = model.input.encode(raw)
        state = model.core.initial_state(1)
        for t in range(len(series) - 1):
            now = torch.from_numpy(series[t])[None]
            hidden, state = model.core.step(now, state)
            found = model.writer(hidden, now)[0]
            for k, share in enumerate(shares):
                for f in range(2):
                    missed = (float(series[t + 1, f]) - found[k, f].item()) / model.writer.change[f].item()
                    if quantiles:
                        total += share * missed if missed > 0 else (share - 1) * missed
                    else:
                        total += missed**2 / 2 if abs(missed) < 1 else abs(missed) - 0.5
            count += 2
    loss = model.mean_loss([LONG, SHORT], [LONG, SHORT])
    assert loss.item() == pytest.approx(total / count, rel=1e-4)


def test_padding_changes_no_loss_and_gets_no_gradient() -> None:
    model = stirred("output.quantiles=[0.2]")
    steps = model.input.collate([model.input.encode(one) for one in (LONG, SHORT)])
    (given,) = steps.tensors
    wild = given.clone()
    wild[7:, 1] = 1e4

    def loss(x: torch.Tensor) -> Any:
        x = x.clone().requires_grad_()
        found = model.writer.loss(lambda: x, model.run, steps, Targets((x.detach(),), steps.lengths))
        found.total.backward()
        return found, x.grad

    (plain, _), (padded, gradient) = loss(given), loss(wild)
    torch.testing.assert_close(plain.total, padded.total)
    assert plain.count == padded.count == (39 + 6) * 2
    assert not gradient[7:, 1].any()


def test_a_single_step_has_nothing_to_predict() -> None:
    model = stirred()
    steps = model.input.collate([model.input.encode(SHORT[:1])])
    loss = model.writer.loss(lambda: steps.tensors[0], model.run, steps, Targets(steps.tensors, steps.lengths))
    assert (loss.total.item(), loss.count) == (0.0, 0)
    loss.total.backward()


@pytest.mark.parametrize("quantiles", ["[]", "[0.1, 0.3, 0.9]"])
def test_gradients_reach_every_weight(quantiles: str) -> None:
    model = stirred(f"output.quantiles={quantiles}")
    model.mean_loss([LONG], [LONG]).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


# --- the forecast


def test_untrained_it_says_that_nothing_changes() -> None:
    model = small([LONG], "output.horizon=4").eval()
    for answer, raw in zip(model.raw([LONG, SHORT]), (LONG, SHORT), strict=True):
        value = model.output.answer(answer).value
        np.testing.assert_allclose(value, np.repeat(raw[-1:], 4, 0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("quantiles", ["[]", "[0.1, 0.9]"])
def test_the_forecast_is_its_own_next_step_fed_back(quantiles: str) -> None:
    model = stirred("output.horizon=6", f"output.quantiles={quantiles}")
    found = model.raw([SHORT])[0][0]
    (series,) = model.input.encode(SHORT)
    state, wanted = model.core.initial_state(1), []
    fed = list(torch.from_numpy(series))
    for t in range(len(series) + 5):
        with torch.no_grad():
            hidden, state = model.core.step(fed[t][None], state)
            further = model.writer(hidden, fed[t][None])[0, model.writer.shares.index(0.5)]
        if t >= len(series) - 1:
            wanted.append(further)
            fed.append(further)
    torch.testing.assert_close(found, torch.stack(wanted))


@pytest.mark.parametrize("quantiles", ["[]", "[0.05, 0.3, 0.9]"])
def test_a_rows_forecast_does_not_depend_on_the_batch(quantiles: str) -> None:
    model = stirred("output.horizon=5", f"output.quantiles={quantiles}")
    alone, together = model.raw([SHORT]), model.raw([LONG, SHORT, LONG[:3]])
    assert together[1].shape == (1 if quantiles == "[]" else 4, 5, 2)
    torch.testing.assert_close(together[1], alone[0])
    torch.testing.assert_close(model.raw([SHORT])[0], alone[0], rtol=0, atol=0)


def test_quantiles_never_cross() -> None:
    torch.manual_seed(0)
    writer = SeriesWriter(8, [1.0, 0.5, 2.0], 1, (0.05, 0.2, 0.6, 0.95))
    torch.nn.init.normal_(writer.linear.weight, std=3.0)
    last = torch.randn(50, 3)
    found = writer(torch.randn(50, 8), last)
    assert found.shape == (50, 5, 3)
    assert (found.diff(dim=1) >= 0).all()
    middle = last + writer.change * writer.linear(torch.zeros(50, 8)).view(50, 5, 3)[:, 2]
    torch.testing.assert_close(writer(torch.zeros(50, 8), last)[:, 2], middle)


def test_the_first_steps_quantiles_are_the_learnt_ones() -> None:
    model = stirred("output.horizon=1", "output.quantiles=[0.1, 0.25, 0.8]")
    found = model.raw([SHORT])[0][:, 0]
    (series,) = model.input.encode(SHORT)
    with torch.no_grad():
        hidden = model.core(torch.from_numpy(series)[:, None]).outputs[-1]
        wanted = model.writer(hidden, torch.from_numpy(series[-1:]))[0]
    torch.testing.assert_close(found[0], wanted[2])
    # 100 paths tell a quantile up to the gap between two of them.
    torch.testing.assert_close(found[1:], wanted[[0, 1, 3]], rtol=0, atol=0.04)


def test_a_walk_of_even_steps_has_the_quantiles_of_a_normal_distribution() -> None:
    # Each step adds a normal number of the same deviation: after n steps it is sqrt(n) times as large.
    model = small([LONG], "output.horizon=25", "output.quantiles=[0.1, 0.9]").eval()
    model.writer.paths = 4000
    width = 0.3
    with torch.no_grad():
        model.writer.linear.bias[[0, 1, 4, 5]] = np.log(np.expm1(width))  # softplus gives the width
    middle, low, high = model.raw([SHORT])[0]
    wanted = width * model.writer.change * torch.arange(1, 26).sqrt()[:, None]
    torch.testing.assert_close(high - middle, wanted, rtol=0.08, atol=0)
    torch.testing.assert_close(middle - low, wanted, rtol=0.08, atol=0)


# --- seasons


def told(model: Small, series: Any) -> list[Any]:
    """What the equation tells after each step of a scaled series [T F], step by step."""
    s, state, found = model.writer.season, model.core.initial_state(1), []
    x = torch.from_numpy(series)
    with torch.no_grad():
        for t in range(len(x)):
            moved = (x[t] - x[t - 1]) / model.writer.change if t else torch.zeros_like(x[0])
            hidden, state = model.core.step((moved if model.writer.changes else x[t])[None], state)
            base = x[t] if t < s or s == 1 else x[t + 1 - s] + model.writer.kept * (x[t] - x[t - s])
            found.append(model.writer(hidden, base[None])[0, model.writer.shares.index(0.5)])
    return found


def test_with_its_base_the_last_step_it_says_that_nothing_changes() -> None:
    """And is judged by the same scale as one that starts from a season ago."""
    settings = ("output.horizon=9", "output.season=5", "output.base=last")
    model = small([LONG], *settings).eval()
    (answer,) = model.raw([LONG])
    value = model.output.answer(answer).value
    np.testing.assert_allclose(value, model.output.trivial(LONG, config(*settings))["last"], rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(model.output.naive, small([LONG], *settings[:2]).output.naive)
    assert model.writer.reach == 1


@pytest.mark.parametrize("season", [1, 2, 5, 7, 30])
def test_untrained_it_says_that_all_is_as_a_season_ago(season: int) -> None:
    model = small([LONG], "output.horizon=9", f"output.season={season}").eval()
    chosen = config("output.horizon=9", f"output.season={season}")
    for answer, raw in zip(model.raw([LONG, SHORT]), (LONG, SHORT), strict=True):
        if len(raw) > season:
            value = model.output.answer(answer).value
            np.testing.assert_allclose(value, model.output.trivial(raw, chosen)["naive"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("changes", ["false", "true"])
@pytest.mark.parametrize("season", [1, 2, 6, 9])
def test_all_runs_say_the_same(season: int, changes: str) -> None:
    """The equation step by step, a whole run over padded rows, a stream, and a forecast, which is fed back."""
    model = stirred("output.horizon=6", f"output.season={season}", f"output.changes={changes}")
    rows = [model.input.encode(one)[0] for one in (LONG, SHORT)]
    steps = model.input.collate([(row,) for row in rows])
    with torch.no_grad():
        whole = model.writer.scores(lambda: steps.tensors[0], model.run, steps)
        for b, row in enumerate(rows):
            torch.testing.assert_close(whole[: len(row), b], torch.stack(told(model, row)))
        state = model.writer.first(model.core, 1)
        for t, x in enumerate(torch.from_numpy(rows[1])):
            said, state = model.writer.step(model.core, x[None], state)
            torch.testing.assert_close(said[0], whole[t, 1])
            state = state.select(torch.tensor([0, 0])).select(torch.tensor([1]))
    fed = list(rows[1])
    for _ in range(6):
        fed.append(told(model, np.stack(fed))[-1].numpy())
    found = model.raw([LONG, SHORT])[1]
    torch.testing.assert_close(found[0], torch.from_numpy(np.stack(fed[-6:])))


def test_steps_without_a_season_behind_them_are_not_learnt_from() -> None:
    model = stirred("output.season=3")
    series = model.input.encode(SHORT)[0]
    total = 0.0
    for t, middle in enumerate(told(model, series)[:-1]):
        if t >= 3:
            missed = (torch.from_numpy(series[t + 1]) - middle) / model.writer.change
            total += torch.nn.functional.huber_loss(missed, torch.zeros(2), reduction="sum").item()
    assert model.mean_loss([SHORT], [SHORT]).item() == pytest.approx(total / (3 * 2), rel=1e-4)
    short = SHORT[:4]  # no step has one: all are learnt from
    steps = model.input.collate([model.input.encode(short)])
    loss = model.writer.loss(lambda: steps.tensors[0], model.run, steps, Targets(steps.tensors, steps.lengths))
    assert loss.count == 3 * 2


@pytest.mark.parametrize("changes", ["false", "true"])
@pytest.mark.parametrize("season", [1, 3])
def test_learning_ahead_is_of_forecasts_fed_back(season: int, changes: str) -> None:
    """Beside the loss of one step: the model's own forecast from the places that were drawn, step by step."""
    settings = [f"output.season={season}", "output.horizon=5", f"output.changes={changes}"]
    model, plain = stirred(*settings, "output.ahead=5"), stirred(*settings)
    rows = [model.input.encode(one)[0] for one in (LONG, SHORT, LONG[:4])]
    steps = model.input.collate([(row,) for row in rows])
    targets = Targets(steps.tensors, steps.lengths)
    losses = []
    for one in (model, plain):
        torch.manual_seed(7)
        losses.append(one.writer.loss(lambda: steps.tensors[0], one.run, steps, targets))
    least = season if season > 1 else 0
    room = {b: len(row) - 5 - least for b, row in enumerate(rows)}
    torch.manual_seed(7)
    drawn = torch.rand(sum(model.writer.starts for space in room.values() if space > 0))
    total, places = 0.0, [(b, space) for b, space in room.items() if space > 0 for _ in range(model.writer.starts)]
    assert {b for b, _ in places} == ({0, 1} if season == 1 else {0})
    for share, (b, space) in zip(drawn.tolist(), places, strict=True):
        place = least + int(share * space)
        fed = list(rows[b][: place + 1])
        for n in range(1, 6):
            fed.append(told(model, np.stack(fed))[-1].numpy())
            if n > 1:
                missed = (torch.from_numpy(rows[b][place + n]) - torch.from_numpy(fed[-1])) / model.writer.change
                total += torch.nn.functional.huber_loss(missed, torch.zeros(2), reduction="sum").item()
    assert losses[0].count - losses[1].count == len(places) * 4 * 2
    assert (losses[0].total - losses[1].total).item() == pytest.approx(total, rel=1e-3)
    losses[0].total.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


def test_a_model_from_before_there_were_seasons_has_none() -> None:
    learnt = Next.learn([LONG], config("output.season=3"))
    assert again(learnt).season == 3
    old = learnt.to_json()
    del old["season"], old["ahead"], old["changes"]
    assert Next.from_json(old).season == Next.from_json(old).ahead == 1
    assert not Next.from_json(old).changes


def test_where_changes_are_read_the_level_does_not_matter() -> None:
    """A series a hundred deviations higher is forecast to go on as the same one lower down."""
    model = stirred("output.horizon=6", "output.changes=true")
    assert again(model.output).changes
    higher = LONG + 100 * model.output.scale.deviation
    low, high = (model.raw([series])[0] for series in (LONG, higher))
    torch.testing.assert_close(high - 100, low, rtol=0, atol=1e-3)
    levels = stirred("output.horizon=6")
    assert (levels.raw([higher])[0] - 100 - levels.raw([LONG])[0]).abs().max() > 0.01


def test_an_answer_is_in_the_series_own_units() -> None:
    learnt = Next.learn([LONG], config("output.horizon=3", "output.quantiles=[0.1, 0.9]"))
    raw = torch.from_numpy(learnt.scale.apply(np.arange(18.0).reshape(3, 3, 2)))
    answer = learnt.answer(raw)
    np.testing.assert_allclose(answer.value, np.arange(6.0).reshape(3, 2), atol=1e-4)
    assert list(answer.details["quantiles"]) == ["0.1", "0.9"]
    np.testing.assert_allclose(answer.details["quantiles"]["0.9"], np.arange(12.0, 18).reshape(3, 2), atol=1e-4)
    flat = Next.learn([LONG[:, :1]], config()).answer(torch.zeros(1, 2, 1))
    mean = f"{LONG[:, 0].mean():.6g}"
    assert flat.text == f"{mean}; {mean}"
    assert not flat.details


def test_a_forecasts_score_divides_by_the_naive_error() -> None:
    chosen = config("output.season=2", "output.horizon=3")
    learnt = Next.learn([LONG], chosen)
    wanted = LONG[-3:]
    answer = learnt.answer(torch.from_numpy(learnt.scale.apply(wanted + np.array([1.0, 2.0])))[None])
    score = learnt.score(chosen)
    score.add(answer, wanted)
    figures = score.figures()
    naive = np.abs(LONG[2:] - LONG[:-2]).mean(0)
    assert figures[learnt.best[0]] == pytest.approx(float(np.mean([1.0, 2.0] / naive)), rel=1e-3)


# --- learning


def sine(steps: int, start: float = 0.0) -> Any:
    """Two columns of one period, 25 steps, far from zero."""
    t = np.arange(steps) + start
    return np.stack([100 + 10 * np.sin(2 * np.pi * t / 25), 3 + np.cos(2 * np.pi * t / 25)], axis=1)


def test_a_sine_is_forecast_far_better_than_by_the_naive_forecast() -> None:
    training = sine(500)
    model = small([training], "output.horizon=24", hidden=32)
    draw = np.random.default_rng(1)

    def windows() -> list[Any]:
        return [training[start : start + 75] for start in draw.integers(0, 425, 16)]

    batches = [windows() for _ in range(150)]
    model.learn([(batch, batch) for batch in batches])
    score, naive = (model.output.score(config()) for _ in range(2))
    contexts = [sine(60, start) for start in (500.3, 511.9, 523.1)]
    answers = [model.output.answer(raw) for raw in model.raw(contexts)]
    for answer, context, start in zip(answers, contexts, (500.3, 511.9, 523.1), strict=True):
        expected = sine(24, start + 60)
        score.add(answer, expected)
        naive.add(type(answer)(np.repeat(context[-1:], 24, 0).tolist(), ""), expected)
    assert score.figures()["mase"] < naive.figures()["mase"] / 5


def test_quantiles_cover_their_share_of_a_noisy_series() -> None:
    draw = np.random.default_rng(3)
    walk = draw.normal(0.0, 1.0, (4000, 1)).cumsum(0)
    model = small([walk], "output.horizon=8", "output.quantiles=[0.1, 0.9]", hidden=8)
    starts = draw.integers(0, 3000, (120, 16))
    batches = [[walk[start : start + 40] for start in row] for row in starts]
    model.learn([(batch, batch) for batch in batches], lr=1e-2)
    contexts = [walk[start : start + 30] for start in range(3000, 3960, 5)]
    below = np.zeros((2, 8))
    for raw, start in zip(model.raw(contexts), range(3000, 3960, 5), strict=True):
        named = model.output.answer(raw).details["quantiles"]
        expected = walk[start + 30 : start + 38, 0]
        below += [expected <= np.array(named[share])[:, 0] for share in ("0.1", "0.9")]
    shares = below / len(contexts)
    # 192 overlapping forecasts: some 40 independent ones, a standard error of 0.05.
    assert np.abs(shares - [[0.1], [0.9]]).max() < 0.15
