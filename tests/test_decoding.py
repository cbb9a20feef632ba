"""Writing: what is chosen, what is written, where it ends; and what the caller sees of it."""

from __future__ import annotations

import itertools
import math
import re
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from samples import ENGLISH, KOREAN, small_model
from torch import Tensor

from unrolled import native
from unrolled.decoding import Sampling, choose, generate, next_distribution
from unrolled.decoding.writing import _limit
from unrolled.errors import ConfigError, DataError, ModelError
from unrolled.model import LanguageModel
from unrolled.vocabulary import UNITS

every_unit = pytest.mark.parametrize("unit", UNITS)
PROMPT = "나는 닭이"


def write(model: LanguageModel, prompt: str = PROMPT, **settings: Any) -> str:
    return "".join(generate(model, prompt, **settings))


# The distribution of one step, against plain Python.


def by_hand(scores: list[float], sampling: Sampling, written: list[int]) -> list[float]:
    """What `Sampling` says, one symbol after the other."""
    scores = list(scores)
    for symbol in set(written):
        penalty = sampling.repetition_penalty
        scores[symbol] = scores[symbol] / penalty if scores[symbol] > 0 else scores[symbol] * penalty
    if sampling.temperature == 0:
        best = scores.index(max(scores))
        return [float(symbol == best) for symbol in range(len(scores))]
    highest = max(scores)
    weights = [math.exp((score - highest) / sampling.temperature) for score in scores]
    order = sorted(range(len(scores)), key=lambda symbol: -scores[symbol])
    if sampling.top_k is not None:
        order = order[: sampling.top_k]
    if sampling.top_p is not None:
        total = math.fsum(weights[symbol] for symbol in order)
        kept: list[int] = []
        for symbol in order:
            if math.fsum(weights[k] for k in kept) >= sampling.top_p * total:
                break
            kept.append(symbol)
        order = kept
    total = math.fsum(weights[symbol] for symbol in order)
    return [weights[symbol] / total if symbol in order else 0.0 for symbol in range(len(scores))]


@given(
    scores=st.lists(st.integers(-40, 40), min_size=1, max_size=9, unique=True),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.none() | st.integers(1, 10),
    top_p=st.none() | st.sampled_from([0.01, 0.33, 0.5, 0.77, 0.999, 1.0]),
    penalty=st.sampled_from([0.7, 1.0, 1.3]),
    data=st.data(),
)
def test_the_distribution_is_the_one_computed_by_hand(
    scores: list[int],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    penalty: float,
    data: st.DataObject,
) -> None:
    written = data.draw(st.lists(st.integers(0, len(scores) - 1), max_size=4))
    sampling = Sampling(penalty, 64, temperature, top_k, top_p)
    plain = [score / 10 for score in scores]
    penalised = by_hand_penalised(plain, penalty, written)
    assume(len(set(penalised)) == len(penalised))  # equals may be ranked either way
    expected = by_hand(plain, sampling, written)
    given_scores = torch.tensor(plain, dtype=torch.float64)
    p = next_distribution(given_scores, sampling, deque(written))
    assert p.dtype == torch.float64
    assert p.tolist() == pytest.approx(expected, abs=1e-12)
    assert [value > 0 for value in p.tolist()] == [value > 0 for value in expected]
    assert given_scores.tolist() == plain, "the scores of the caller were changed"


def by_hand_penalised(scores: list[float], penalty: float, written: list[int]) -> list[float]:
    return [
        (score / penalty if score > 0 else score * penalty) if k in written else score for k, score in enumerate(scores)
    ]


@settings(max_examples=60)
@given(
    size=st.sampled_from([1, 2, 7, 300]),
    rows=st.integers(1, 3),
    levels=st.integers(1, 4),
    top_k=st.none() | st.sampled_from([1, 3, 299]),
    top_p=st.none() | st.sampled_from([0.01, 0.5, 0.99]),
    penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 99),
)
def test_several_rows_at_once_and_equal_scores(
    size: int, rows: int, levels: int, top_k: int | None, top_p: float | None, penalty: float, seed: int
) -> None:
    # Few levels: many scores are equal, of which the first stay. The sums of hundreds may differ in the last digit,
    # where a symbol more or less stays: the levels of 0.37 keep sums away from top_p.
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (rows, size), generator=generator).double() * 0.37
    written = torch.randint(size, (rows, 4), generator=generator)
    sampling = Sampling(penalty, temperature=0.9, top_k=top_k, top_p=top_p)
    p = next_distribution(scores, sampling, written)
    for row in range(rows):
        alone = next_distribution(scores[row], sampling, deque(written[row].tolist()))
        assert torch.equal(p[row] > 0, alone > 0)
        assert p[row].tolist() == pytest.approx(alone.tolist(), abs=1e-12)
        if levels > 1 or top_p is None or size < 300:
            assert p[row].tolist() == pytest.approx(by_hand(scores[row].tolist(), sampling, written[row].tolist()))


def test_some_distributions_to_look_at() -> None:
    log = [math.log(p) for p in (0.5, 0.25, 0.125, 0.125)]
    scores = torch.tensor(log, dtype=torch.float64)

    def p(**settings: Any) -> list[float]:
        written = deque(settings.pop("written", []))
        return [round(value, 9) for value in next_distribution(scores, Sampling(**settings), written).tolist()]

    assert p() == [0.5, 0.25, 0.125, 0.125]
    assert p(temperature=0) == [1, 0, 0, 0]
    # p ** 2, normalised: 16 + 4 + 1 + 1 = 22
    assert p(temperature=0.5) == pytest.approx([16 / 22, 4 / 22, 1 / 22, 1 / 22])
    assert p(top_k=1) == [1, 0, 0, 0]
    assert p(top_k=2) == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert p(top_k=4) == p(top_k=100) == p(top_p=1.0) == p()
    assert p(top_p=0.5) == [1, 0, 0, 0]
    assert p(top_p=0.51) == pytest.approx([2 / 3, 1 / 3, 0, 0])
    # top_p counts within what top_k left: 2/3 of it reaches 0.6 by itself.
    assert p(top_k=2, top_p=0.6) == [1, 0, 0, 0]
    # A logarithm is negative, so the penalty multiplies: 0.5 ** 2 = 0.25.
    assert p(repetition_penalty=2.0, written=[0]) == pytest.approx([1 / 3, 1 / 3, 1 / 6, 1 / 6])
    assert p(repetition_penalty=2.0, written=[0, 0, 0]) == p(repetition_penalty=2.0, written=[0])
    assert p(repetition_penalty=2.0) == p()


def test_what_is_ruled_out_has_no_chance() -> None:
    scores = torch.tensor([-torch.inf, 1.0, 0.0])
    for sampling in (Sampling(), Sampling(temperature=0), Sampling(1.5, 5, 2.0, 3, 0.99)):
        assert next_distribution(scores, sampling, deque([0, 1]))[0] == 0


@pytest.mark.parametrize(
    "setting, value, expected",
    [
        ("repetition_penalty", 0, "above 0"),
        ("repetition_window", 0, "at least 1"),
        ("temperature", -0.1, "at least 0 (0 is greedy)"),
        ("temperature", math.nan, "at least 0 (0 is greedy)"),
        ("top_k", 0, "at least 1"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.01, "above 0 and at most 1"),
    ],
)
def test_ranges_are_refused_at_once(setting: str, value: float, expected: str) -> None:
    message = re.escape(f"{setting}: expected {expected}, got {value}")
    with pytest.raises(ConfigError, match=message):
        Sampling(**{setting: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        generate(small_model(), PROMPT, **{setting: value})  # type: ignore[arg-type]


def test_other_ranges_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="length: expected at least 0 characters, got -1"):
        generate(small_model(), PROMPT, length=-1)
    with pytest.raises(ConfigError, match="stop: expected at least one character, got an empty string"):
        generate(small_model(), PROMPT, stop="")


# What is written, against the whole of it read anew for every symbol.


def symbols_by_hand(model: LanguageModel, prompt: str, count: int, sampling: Sampling, seed: int) -> list[int]:
    """Symbols drawn from the scores of `model(everything so far)`; nothing is stepped."""
    ids = model.vocabulary.encode(prompt or "\n").tolist()
    start, generator = len(ids), torch.Generator().manual_seed(seed)
    for _ in range(count):
        scores, _ = model(torch.tensor(ids)[:, None])
        row = scores[-1, 0].detach()
        row[0] = -torch.inf
        p = next_distribution(row.float(), sampling, deque(ids[-sampling.repetition_window :]))
        ids.append(choose(p, float(torch.rand(1, dtype=torch.float64, generator=generator))))
    return ids[start:]


@every_unit
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 4},
        {"top_p": 0.6, "repetition_penalty": 1.4, "repetition_window": 3},
    ],
    ids=str,
)
def test_text_is_drawn_from_the_models_own_scores(unit: str, cell: str, settings: dict[str, Any]) -> None:
    model = small_model(unit, cell=cell, layers=2)
    prompt = "나는 집" if unit != "word" else "나는 집에"
    symbols = symbols_by_hand(model, prompt, 12, Sampling(**settings), seed=5)
    expected = model.vocabulary.decode(symbols)
    # The last character may still be open; and as many characters as all symbols make may take one symbol more.
    sure = expected[:-1].rstrip("\ufffd")
    assert sure
    assert write(model, prompt, length=len(sure), seed=5, **settings) == sure


def test_greedy_takes_the_highest_score() -> None:
    model = small_model()
    state, last, expected = model.begin(), "\n", ""
    for _ in range(30):
        scores, state = model.step(torch.from_numpy(model.vocabulary.encode(last).astype("int64")), state)
        scores[0, 0] = -torch.inf
        last = model.vocabulary.decode([int(scores[0].argmax())])
        expected += last
    assert write(model, "\n", length=30, temperature=0) == expected
    assert write(model, "", length=30, temperature=0, seed=9) == expected


def test_the_penalty_sees_the_prompt_and_forgets_what_is_older() -> None:
    model = small_model("char", "ab\n")
    with torch.no_grad():  # whatever was read, "a" is far likelier than "b", and "\n" is out of the question
        model.writer.weight.zero_()
        for symbol, score in zip("ab\n", (2.0, 1.5, -1000.0), strict=True):
            model.writer.bias[int(model.vocabulary.encode(symbol)[0])] = score
    assert write(model, "b", length=6, temperature=0) == "aaaaaa"
    # 2 / 1.5 < 1.5: after an "a" comes a "b", and with both in sight "a" again.
    assert write(model, "b", length=6, temperature=0, repetition_penalty=1.5) == "aaaaaa"
    assert write(model, "b", length=6, temperature=0, repetition_penalty=1.5, repetition_window=1) == "ababab"
    assert write(model, "a", length=6, temperature=0, repetition_penalty=1.5, repetition_window=1) == "bababa"


@every_unit
def test_the_same_seed_writes_the_same_text(unit: str) -> None:
    model = small_model(unit)
    prompt = "나는"
    first = write(model, prompt, length=60, seed=3)
    torch.manual_seed(17)
    assert write(model, prompt, length=60, seed=3) == first
    assert write(model, prompt, length=60, seed=4) != first
    assert write(model, prompt, length=30, seed=3) == first[:30]
    assert write(model, prompt, length=60) != write(model, prompt, length=60), "no seed: another text each time"


def test_the_random_state_of_the_caller_is_untouched() -> None:
    before = torch.get_rng_state()
    write(small_model(), length=5)
    write(small_model(), length=5, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


# The prompt.


@pytest.mark.parametrize("unit", ["char", "jamo"])
def test_unknown_characters_of_a_prompt_are_all_named(unit: str) -> None:
    with pytest.raises(DataError) as refused:
        generate(small_model(unit), "나x는é x")
    message = "the prompt has symbols that the model never saw: 'x' (U+0078), 'é' (U+00E9)"
    assert str(refused.value) == message
    with pytest.raises(DataError, match=r"the prompt has a symbol that the model never saw: 'x' \(U\+0078\)$"):
        generate(small_model(unit), "x")


def test_unknown_jamo_and_words_of_a_prompt_are_named() -> None:
    with pytest.raises(DataError, match=r"never saw: 'ㅞ' \(U\+315E\), 'ㅀ' \(U\+3140\)$"):
        generate(small_model("jamo"), "궤 닳는")
    with pytest.raises(DataError, match=r"never saw: '나비', ' frog'$"):
        generate(small_model("word"), "나비 frog")


def test_an_empty_prompt_stands_for_a_line_break() -> None:
    model = small_model()
    assert write(model, "", length=20, seed=1) == write(model, "\n", length=20, seed=1)
    with pytest.raises(DataError, match="an empty prompt stands for a line break, which this model never saw: give a"):
        generate(small_model("char", "abc"), "")


def test_a_prompt_of_many_characters_is_read_to_its_end() -> None:
    model = small_model()
    for end in "나a":  # another last character, another text: the prompt is read to its end
        ids = model.vocabulary.encode(KOREAN[:200] + end).tolist()
        state = model.begin(torch.tensor(ids[:-1])[:, None])
        scores, _ = model.step(torch.tensor(ids[-1:]), state)
        scores[0, 0] = -torch.inf
        best = model.vocabulary.decode([int(scores[0].argmax())])
        assert write(model, KOREAN[:200] + end, length=1, temperature=0) == best


# What comes out.


class Counted:
    """A model's steps, counted."""

    def __init__(self, model: LanguageModel) -> None:
        self.steps, original = 0, model.step

        def step(ids: Tensor, state: Any) -> Any:
            self.steps += 1
            return original(ids, state)

        model.step = step  # type: ignore[method-assign]


def test_text_appears_as_it_is_made() -> None:
    model = small_model()
    counted = Counted(model)
    pieces = generate(model, PROMPT, length=50, seed=1)
    assert counted.steps == 0
    first = next(pieces)
    assert (len(first), counted.steps) == (1, 1)
    for number, _ in zip(range(2, 12), pieces, strict=False):
        assert counted.steps == number


@every_unit
@settings(max_examples=30)
@given(length=st.integers(0, 40), seed=st.integers(0, 50))
def test_length_counts_characters(unit: str, length: int, seed: int) -> None:
    model = MODELS[unit]
    pieces = list(generate(model, "나는", length=length, seed=seed))
    text = "".join(pieces)
    assert len(text) == length
    assert all(pieces)
    assert text == write(model, "나는", length=40, seed=seed)[:length]


MODELS = {unit: small_model(unit) for unit in UNITS}


@every_unit
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_unknown_symbol_is_never_written(unit: str, temperature: float) -> None:
    model = small_model(unit)
    with torch.no_grad():
        model.writer.bias[0] += 1000
    chosen = []
    feed = type(model.vocabulary.decoder()).feed

    class Decoder:
        def __init__(self) -> None:
            self.inner = type(model.vocabulary).decoder(model.vocabulary)

        held = property(lambda self: self.inner.held)

        def feed(self, index: int) -> str:
            chosen.append(index)
            return feed(self.inner, index)

    model.vocabulary.decoder = Decoder  # type: ignore[assignment,method-assign]
    text = write(model, "나는", length=30, temperature=temperature, seed=1)
    assert len(text) == 30
    assert len(chosen) >= 5
    assert 0 not in chosen


@settings(max_examples=30)
@given(
    prompt=st.text("나는닭이 aㅋ\n집", min_size=1, max_size=6),
    seed=st.integers(0, 500),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
)
def test_a_prompts_last_syllable_is_closed(prompt: str, seed: int, temperature: float) -> None:
    # A final consonant right behind 나 would make it 난, which stands on the screen already.
    model = MODELS["jamo"]
    text = write(model, prompt, length=8, seed=seed, temperature=temperature)
    written = model.vocabulary.encode(prompt).tolist()
    generator = torch.Generator().manual_seed(seed)
    state = model.begin()
    for symbol in written[:-1]:
        _, state = model.step(torch.tensor([symbol]), state)
    start = len(written)
    while len(model.vocabulary.decode(written)) < len(prompt) + 9:
        scores, state = model.step(torch.tensor(written[-1:]), state)
        row = scores[0].detach().float()
        row[0] = -torch.inf
        if len(written) == start:
            for symbol in range(len(model.vocabulary)):
                if not model.vocabulary.decode([*written, symbol]).startswith(prompt):
                    row[symbol] = -torch.inf
        p = next_distribution(row, Sampling(temperature=temperature))
        written.append(choose(p, float(torch.rand(1, dtype=torch.float64, generator=generator))))
    assert model.vocabulary.decode(written)[: len(prompt) + 8] == prompt + text


# Where it ends.


def cut(text: str, length: int, stop: str | None) -> str:
    at = text.find(stop) if stop is not None else -1
    return text[: min(length, at if at >= 0 else len(text))]


@settings(max_examples=300)
@example(pieces=["aab"], length=1, stop="b")  # the stop lies beyond the length, in the same piece
@given(
    pieces=st.lists(st.text("ab", max_size=3), max_size=12),
    length=st.integers(0, 14),
    stop=st.none() | st.text("ab", min_size=1, max_size=5),
)
def test_length_and_stop_against_a_plain_search(pieces: list[str], length: int, stop: str | None) -> None:
    text = "".join(pieces)
    endless = itertools.chain(pieces, itertools.repeat("z"))
    assert "".join(_limit(endless, length, stop)) == cut(text + "z" * 20, length, stop)


@given(text=st.text("ab", max_size=14), stop=st.text("ab", min_size=1, max_size=4))
def test_only_what_may_begin_the_stop_is_held_back(text: str, stop: str) -> None:
    read = 0

    def pieces() -> Iterator[str]:
        nonlocal read
        for character in itertools.chain(text, itertools.repeat("z")):
            read += 1
            yield character

    out = ""
    for piece in _limit(pieces(), 30, stop):
        out += piece
        so_far = (text + "z" * 40)[:read]
        if stop not in so_far:
            held = len(so_far) - len(out)
            assert held == max(n for n in range(len(stop)) if so_far.endswith(stop[:n]))


@every_unit
def test_a_stop_string_ends_the_text_before_it(unit: str) -> None:
    model = MODELS[unit]
    text = write(model, "나는", length=80, seed=6)
    for begin, end in ((0, 1), (10, 13), (30, 31), (40, 52)):
        stop = text[begin:end]
        assert write(model, "나는", length=80, seed=6, stop=stop) == text[: text.find(stop)]
    assert write(model, "나는", length=80, seed=6, stop="never this") == text
    # It is not looked for in the prompt.
    assert write(model, "나는", length=80, seed=6, stop="나는" + text[0]) == cut(text, 80, "나는" + text[0])


def test_a_model_that_never_makes_a_character_ends() -> None:
    assert list(_limit(itertools.repeat(""), 5, None)) == []
    assert "".join(_limit(itertools.chain(["ab"], itertools.repeat("")), 5, "b!")) == "a"


# What the caller sees of it.


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_and_the_gradients_are_the_callers(training: bool) -> None:
    model = small_model(dropout=0.5, layers=2).train(training)
    expected = write(small_model(dropout=0.5, layers=2), length=20, seed=2)
    pieces, text = generate(model, PROMPT, length=20, seed=2), ""
    for piece in pieces:
        text += piece
        assert model.training == training
        assert all(module.training == training for module in model.modules())
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    assert text == expected, "dropout was on"
    ids = torch.tensor([[1], [2]])
    half_read = generate(model, PROMPT, length=20, seed=2)
    next(half_read)
    loss, _ = model.loss(ids, ids)
    loss.backward()  # type: ignore[no-untyped-call]
    assert next(iter(model.parameters())).grad is not None
    with torch.no_grad():
        next(half_read)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    half_read.close()  # type: ignore[attr-defined]
    assert model.training == training


def test_texts_that_are_written_in_turns() -> None:
    model = small_model().train()
    settings = [{"seed": 1}, {"seed": 2, "temperature": 0.5}, {"seed": 1}]
    alone = [write(model, length=25, **chosen) for chosen in settings]
    together = zip(*(generate(model, PROMPT, length=25, **chosen) for chosen in settings), strict=True)
    assert ["".join(pieces) for pieces in zip(*together, strict=True)] == alone
    assert alone[0] == alone[2] != alone[1]


def test_english_too() -> None:
    model = small_model("char", ENGLISH, cell="gru")
    text = write(model, "The cat ", length=30, seed=1)
    assert len(text) == 30
    assert set(text) <= set(ENGLISH)


# Without Python between the symbols.


@pytest.mark.skipif(native.why_absent() is not None, reason="the native kernels are not there")
@every_unit
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 4},
        {"top_p": 0.6, "repetition_penalty": 1.4, "repetition_window": 3},
        {"temperature": 2.0, "repetition_penalty": 0.8},
    ],
)
def test_the_kernels_write_what_the_reference_writes(cell: str, unit: str, settings: dict[str, Any]) -> None:
    # Float32 scores differ in their last digits; a random number within them of a border would be one in a million.
    texts = []
    for backend in ("reference", "native"):
        model = small_model(unit, dtype=torch.float32, cell=cell, layers=2, hidden=24, backend=backend)
        texts.append(write(model, PROMPT, length=150, seed=7, **settings))
        assert (model.hold_still() is None) == (backend == "reference")
    assert texts[0] == texts[1]


# What cannot be written.


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("which, score", [(slice(2, 3), math.nan), (slice(2, 3), math.inf), (slice(None), -math.inf)])
def test_scores_that_are_not_finite_are_refused(backend: str, temperature: float, which: slice, score: float) -> None:
    model = small_model(dtype=torch.float32, backend=backend)
    with torch.no_grad():
        model.writer.bias[which] = score
    with pytest.raises(ModelError, match=r"^the model's scores are not finite: its weights or its state hold NaN"):
        next(generate(model, PROMPT, temperature=temperature))
