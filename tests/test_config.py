"""Settings: every message that a user can meet is read here, word for word."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from unrolled import config, storage
from unrolled.config import (
    Config,
    difference,
    flag_key,
    flat_keys,
    load_config,
    parse_override,
    resolve,
    to_dict,
)
from unrolled.errors import ConfigError


def message(action: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def setting(key: str, value: Any) -> dict[str, dict[str, Any]]:
    section, name = key.split(".")
    return {section: {name: value}}


# ---------------------------------------------------------------- what there is


def test_defaults() -> None:
    assert to_dict(resolve()) == {
        "input": {
            "kind": "text",
            "columns": [],
            "unit": "char",
            "embedding": None,
            "max_vocabulary": None,
            "min_count": 1,
            "characters": 64,
            "dropout": 0.0,
            "word_dropout": 0.0,
            "vectors": None,
            "width": 1,
            "size": 48,
            "rows": False,
            "features": 128,
            "places": 0,
            "augment": True,
        },
        "core": {
            "cell": "lstm",
            "hidden": 512,
            "layers": 2,
            "bidirectional": False,
            "dropout": 0.3,
            "locked": True,
            "recurrent_dropout": 0.0,
            "init": "uniform",
            "forget_bias": None,
            "chrono": None,
        },
        "output": {
            "kind": "next",
            "columns": [],
            "tied": False,
            "pooling": "last",
            "unit": None,
            "embedding": 256,
            "max_vocabulary": None,
            "min_count": 1,
            "attention": "dot",
            "feed": "word",
            "input_feeding": False,
            "label_smoothing": 0.0,
            "scheduled_sampling": 0.0,
            "horizon": 24,
            "season": 1,
            "base": "season",
            "ahead": 1,
            "changes": False,
            "quantiles": [],
        },
        "data": {
            "documents": "file",
            "valid_fraction": 0.1,
            "errors": "strict",
            "format": None,
            "names": [],
            "group": None,
            "max_tokens": None,
            "skip_bad": False,
        },
        "training": {
            "window": 128,
            "stride": None,
            "batch_size": 64,
            "epochs": 10,
            "steps": None,
            "optimizer": "adamw",
            "lr": 0.002,
            "betas": [0.9, 0.99],
            "weight_decay": 0.01,
            "momentum": 0.9,
            "schedule": "cosine",
            "warmup": 100,
            "min_lr_ratio": 0.05,
            "plateau_factor": 0.5,
            "plateau_patience": 2,
            "clip": 1.0,
            "average": 0.0,
            "patience": None,
            "valid_every": None,
            "save_every": None,
            "precision": "fp32",
            "device": "auto",
            "seed": 1,
            "log_every": 10,
            "backend": "auto",
            "tape_budget": None,
            "init_from": None,
            "keep_memory": True,
        },
    }


def test_every_setting_explains_itself() -> None:
    settings = flat_keys()
    assert list(settings) == [f"{section}.{name}" for section, keys in to_dict(resolve()).items() for name in keys]
    for key, about in settings.items():
        assert about.key == key == f"{about.section}.{about.name}"
        assert re.fullmatch(r"[A-Z][^\n]{20,115}\.", about.description), about
        assert about.expected
        assert all(option in about.expected for option in about.options)
        assert getattr(getattr(resolve(), about.section), about.name) == about.default


def test_each_message_says_what_is_expected() -> None:
    said = {key: about.expected for key, about in flat_keys().items()}
    assert said == {
        "input.kind": "text, image, video, series or vector",
        "input.columns": "a list of names",
        "input.unit": "char, jamo, word, subword or word+char",
        "input.embedding": "an integer >= 1 or null",
        "input.max_vocabulary": "an integer >= 1 or null",
        "input.min_count": "an integer >= 1",
        "input.characters": "an integer >= 1",
        "input.dropout": "a number >= 0 and < 1",
        "input.word_dropout": "a number >= 0 and < 1",
        "input.vectors": "a text or null",
        "input.width": "an integer >= 1",
        "input.size": "an integer >= 8",
        "input.rows": "true or false",
        "input.features": "an integer >= 1",
        "input.places": "an integer >= 0",
        "input.augment": "true or false",
        "core.cell": "a text",
        "core.hidden": "an integer >= 1",
        "core.layers": "an integer >= 1",
        "core.bidirectional": "true or false",
        "core.dropout": "a number >= 0 and < 1",
        "core.locked": "true or false",
        "core.recurrent_dropout": "a number >= 0 and < 1",
        "core.init": "uniform or orthogonal",
        "core.forget_bias": "a number or null",
        "core.chrono": "an integer >= 3 or null",
        "output.kind": "next, label, labels, number, numbers or text",
        "output.columns": "a list of names",
        "output.tied": "true or false",
        "output.pooling": "last, mean, max or attention",
        "output.unit": "char, jamo, word, subword or null",
        "output.embedding": "an integer >= 1",
        "output.max_vocabulary": "an integer >= 1 or null",
        "output.min_count": "an integer >= 1",
        "output.attention": "none, dot, general, additive or strongest",
        "output.feed": "word or zeros",
        "output.input_feeding": "true or false",
        "output.label_smoothing": "a number >= 0 and < 1",
        "output.scheduled_sampling": "a number >= 0 and <= 1",
        "output.horizon": "an integer >= 1",
        "output.season": "an integer >= 1",
        "output.base": "season or last",
        "output.ahead": "an integer >= 1",
        "output.changes": "true or false",
        "output.quantiles": "a list of numbers > 0 and < 1",
        "data.documents": "file, line or paragraph",
        "data.valid_fraction": "a number > 0 and < 1",
        "data.errors": "strict or replace",
        "data.format": "tsv, csv, jsonl, parquet, conllu, conll, text or null",
        "data.names": "a list of names",
        "data.group": "a text or null",
        "data.max_tokens": "an integer >= 1 or null",
        "data.skip_bad": "true or false",
        "training.window": "an integer >= 1 or full",
        "training.stride": "an integer >= 1 or null",
        "training.batch_size": "an integer >= 1",
        "training.epochs": "an integer >= 1",
        "training.steps": "an integer >= 1 or null",
        "training.optimizer": "adamw or sgd",
        "training.lr": "a number > 0",
        "training.betas": "a list of 2 numbers >= 0 and < 1",
        "training.weight_decay": "a number >= 0",
        "training.momentum": "a number >= 0 and < 1",
        "training.schedule": "constant, cosine or plateau",
        "training.warmup": "an integer >= 0",
        "training.min_lr_ratio": "a number >= 0 and <= 1",
        "training.plateau_factor": "a number > 0 and < 1",
        "training.plateau_patience": "an integer >= 0",
        "training.clip": "a number > 0 or null",
        "training.average": "a number >= 0 and < 1",
        "training.patience": "an integer >= 1 or null",
        "training.valid_every": "an integer >= 1 or null",
        "training.save_every": "an integer >= 1 or null",
        "training.precision": "fp32 or bf16",
        "training.device": "auto, cpu or cuda",
        "training.seed": "an integer >= 0 and < 9223372036854775808",
        "training.log_every": "an integer >= 1",
        "training.backend": "auto, reference, tape or native",
        "training.tape_budget": "an integer >= 1 or null",
        "training.init_from": "a text or null",
        "training.keep_memory": "true or false",
    }


def candidates(expected: str) -> tuple[list[Any], list[Any]]:
    """(taken, refused): values that the words `expected` allow, and values that they do not."""
    taken: list[Any] = []
    refused: list[Any] = [{"a": 1}, [], "no such thing", float("nan"), float("inf"), -(10**30), 1j]
    for words in expected.split(" or ") if "true or false" not in expected else [expected]:
        low = re.search(r"(>=?) (\d+)", words)
        high = re.search(r"(<=?) (\d+)", words)
        if words.startswith("an integer"):
            assert low
            taken += [int(low[2]), int(low[2]) + 1]
            refused += [int(low[2]) - 1, float(low[2]) + 1, str(low[2]), True]
            if high:
                taken.append(int(high[2]) - 1)
                refused.append(int(high[2]))
        elif words.startswith("a number"):
            bottom, top = int(low[2]) if low else -5, int(high[2]) if high else 100
            taken += [bottom + 1e-9, (bottom + top) / 2, top - 1e-9]
            refused += ["0.5", False]
            if not low:
                refused.remove(-(10**30))
            if low:
                (taken if low[1] == ">=" else refused).append(bottom)
                refused.append(bottom - 1e-9)
            if high:
                (taken if high[1] == "<=" else refused).append(top)
                refused.append(top + 1e-9)
        elif words == "a list of names":
            taken += [[], ["a"], ("a", "한글")]
            refused.remove([])
            refused += [[""], [1], "a"]
        elif words.startswith("a list of numbers"):
            taken += [[], [0.1, 0.9], (0.5,)]
            refused.remove([])
            refused += [[0], [1.0], 0.5, ["a"], "ab"]
        elif words.startswith("a list"):
            taken += [[0, 0.5], (0.9, 0.999)]
            refused += [[0.5], [0.5] * 3, [0.5, 1], [-0.1, 0.5], 0.5, ["a", "b"], "ab"]
        elif words == "true or false":
            taken += [True, False]
            refused += [0, 1, "true", "yes", None]
        elif words == "null":
            taken.append(None)
        elif words == "a text":
            taken += ["a", "ㅎ", "no such thing"]
            refused.remove("no such thing")
            refused += [1, True]
        else:
            taken += words.split(", ")
            refused += [words.upper(), f"{words}x", 1.5, True]
    if None not in taken:
        refused.append(None)
    return taken, refused


@pytest.mark.parametrize("key", flat_keys())
def test_each_setting_takes_what_it_says_and_nothing_else(key: str) -> None:
    about = flat_keys()[key]
    taken, refused = candidates(about.expected)
    fitting: dict[str, Any] = {
        "core.bidirectional": {"core": {"bidirectional": False}},
        "output.tied": {"core": {"hidden": 8}, "input": {"embedding": 8}},
        "input.places": {"input": {"kind": "video"}},
        "training.stride": {"training": {"window": 1000}},
    }
    for value in taken:
        layers = [fitting.get(key, {}), setting(key, value)]
        if (key, value) == ("core.bidirectional", True):
            continue  # only a language model exists yet
        resolved = resolve(*layers)
        back = getattr(getattr(resolved, about.section), about.name)
        assert back == (tuple(value) if isinstance(value, list) else value)
        assert type(back) in (type(value), float, tuple)
        assert resolve(to_dict(resolved)) == resolved
    for value in refused:
        said = message(lambda value=value: resolve(setting(key, value)))
        assert said.startswith(f"{key}: expected {about.expected}, got {config._show(value)}"), said


# ---------------------------------------------------------------- messages

OUTPUT = (
    "ahead, attention, base, changes, columns, embedding, feed, horizon, input_feeding, kind, label_smoothing, "
    "max_vocabulary, min_count, pooling, quantiles, scheduled_sampling, season, tied, unit"
)
OUTPUT_ORDER = (
    "kind, columns, tied, pooling, unit, embedding, max_vocabulary, min_count, attention, feed, "
    "input_feeding, label_smoothing, scheduled_sampling, horizon, season, base, ahead, changes, quantiles"
)
CORE = "bidirectional, cell, chrono, dropout, forget_bias, hidden, init, layers, locked, recurrent_dropout"


@pytest.mark.parametrize(
    "given_value, shown",
    [
        (None, "null"),
        (True, "true"),
        ("256", "'256'"),
        (2.0, "2.0"),
        ([1, None], "[1, None]"),
        ("a\nb", r"'a\nb'"),
        ("x" * 500, "'" + "x" * 78 + "…"),
    ],
)
def test_what_came_is_shown_on_one_line(given_value: object, shown: str) -> None:
    assert message(lambda: resolve(setting("core.hidden", given_value))) == (
        f"core.hidden: expected an integer >= 1, got {shown}"
    )


@pytest.mark.parametrize(
    "layer, said",
    [
        ({"training": {"lr": -1}}, "training.lr: expected a number > 0, got -1"),
        ({"training": {"lr": "abc"}}, "training.lr: expected a number > 0, got 'abc'"),
        (
            {"training": {"window": "ful"}},
            "training.window: expected an integer >= 1 or full, got 'ful'; did you mean 'full'?",
        ),
        (
            {"training": {"betas": [0.9, 1.5]}},
            "training.betas: expected a list of 2 numbers >= 0 and < 1, got [0.9, 1.5]",
        ),
        (
            {"training": {"optimizer": "adam"}},
            "training.optimizer: expected adamw or sgd, got 'adam'; did you mean 'adamw'?",
        ),
        ({"input": {"unit": "자모"}}, "input.unit: expected char, jamo, word, subword or word+char, got '자모'"),
        ({"input": {"kind": "sound"}}, "input.kind: expected text, image, video, series or vector, got 'sound'"),
        # unknown names
        ({"training": {"lrr": 1}}, "unknown setting 'training.lrr': did you mean 'lr'?"),
        ({"core": {"hiden": 1}}, "unknown setting 'core.hiden': did you mean 'hidden'?"),
        ({"core": {"lr": 1}}, "unknown setting 'core.lr': did you mean 'training.lr'?"),
        ({"training": {"kind": "x"}}, "unknown setting 'training.kind': did you mean 'input.kind' or 'output.kind'?"),
        ({"output": {"xyz": 1}}, "unknown setting 'output.xyz': known: " + OUTPUT),
        ({"cor": {"hidden": 1}}, "unknown setting 'cor': did you mean 'core'?"),
        ({"hidden": 1}, "unknown setting 'hidden': did you mean 'core.hidden'?"),
        ({"hiden": 1}, "unknown setting 'hiden': did you mean 'hidden'?"),
        ({"core": {1: 2}}, f"unknown setting 'core.1': known: {CORE}"),
        # sections
        ({"output": 5}, f"output: expected settings ({OUTPUT_ORDER}), got 5"),
        ({"output": ["kind"]}, f"output: expected settings ({OUTPUT_ORDER}), got ['kind']"),
        # several at once
        ({"core": {"hidden": 0, "layers": 0}}, "core.hidden: expected an integer >= 1, got 0 (and 1 more)"),
        (
            {"core": {"hiden": 0}, "training": {"window": 0, "lr": 0}},
            "unknown setting 'core.hiden': did you mean 'hidden'? (and 2 more)",
        ),
        # settings that do not fit together
        (
            {"training": {"window": 64, "stride": 65}},
            "training.stride: expected at most training.window (64), else steps are skipped, got 65",
        ),
        (
            {"training": {"window": "full", "stride": 5}},
            (
                "training.stride: a full window is the whole lane, so there is nothing to step on by: expected "
                "null, got 5"
            ),
        ),
        (
            {"core": {"bidirectional": True}},
            (
                "core.bidirectional: a language model reads left to right: one that sees what comes next has nothing "
                "to predict; expected false with output.kind next, got true"
            ),
        ),
        (
            {"output": {"tied": True}},
            (
                "output.tied: the output layer can only be the embedding if both are of one size: expected "
                "input.embedding == core.hidden (512), got null (one-hot)"
            ),
        ),
        (
            {"output": {"tied": True}, "input": {"unit": "word"}},
            (
                "output.tied: the output layer can only be the embedding if both are of one size: expected "
                "input.embedding == core.hidden (512), got 256"
            ),
        ),
        (
            {"core": {"cell": "rnn", "chrono": 50}},
            (
                "core.chrono: it starts the gates that keep the state, and rnn has none that unrolled knows: expected "
                "null, or core.cell lstm or gru"
            ),
        ),
        (
            {"core": {"cell": "gru", "forget_bias": 1}},
            "core.forget_bias: gru has no forget gate that unrolled knows: expected null, or core.cell lstm",
        ),
        (
            {"input": {"places": 16}},
            "input.places: only pictures have places: expected 0, or input.kind image or video, got 16",
        ),
        (
            {"input": {"kind": "image", "rows": True, "places": 16}},
            (
                "input.places: nothing looks for places in an image that is read row by row: expected 0, or "
                "input.rows false, got 16"
            ),
        ),
        (
            {"core": {"chrono": 50, "forget_bias": 1.0}},
            "core.chrono: it sets the forget gate's bias, as core.forget_bias does: expected one of them to be null",
        ),
        (
            {"core": {"cell": "my_cell", "chrono": 50, "forget_bias": 1}, "training": {"window": 1, "stride": 2}},
            "training.stride: expected at most training.window (1), else steps are skipped, got 2 (and 3 more)",
        ),
    ],
)
def test_messages(layer: dict[str, Any], said: str) -> None:
    assert message(lambda: resolve(layer)) == said


@pytest.mark.parametrize("layer", [5, "core", None, ["core"]])
def test_a_layer_that_is_none(layer: Any) -> None:
    assert message(lambda: resolve(layer)) == (
        f"expected sections (input, core, output, data, training), got {config._show(layer)}"
    )


def test_cells_are_checked_when_their_names_are_given() -> None:
    layer = setting("core.cell", "lsmt")
    assert resolve(layer).core.cell == "lsmt"
    assert message(lambda: resolve(layer, cells=["rnn", "lstm"])) == (
        "core.cell: unknown cell 'lsmt': did you mean 'lstm'?"
    )
    assert message(lambda: resolve(setting("core.cell", "xyz"), cells=iter(["rnn", "lstm"]))) == (
        "core.cell: unknown cell 'xyz': known: lstm, rnn"
    )
    assert resolve(setting("core.cell", "rnn"), cells={"rnn"}).core.cell == "rnn"


# ---------------------------------------------------------------- layers


def test_later_layers_come_over_earlier_ones_key_by_key() -> None:
    file = {"core": {"hidden": 64, "layers": 1}, "training": None}
    before = repr(file)
    resolved = resolve(file, {"core": {"hidden": 32}}, {"training": {"lr": 1e-3}}, {"training": None}, {})
    assert (resolved.core.hidden, resolved.core.layers, resolved.training.lr) == (32, 1, 1e-3)
    assert repr(file) == before
    assert resolve(setting("core.hidden", 0), setting("core.hidden", 8)).core.hidden == 8


def test_words_are_embedded_and_characters_are_not() -> None:
    for unit, size in {"char": None, "jamo": None, "word": 256, "subword": 256}.items():
        assert resolve(setting("input.unit", unit)).input.embedding == size
        assert resolve({"input": {"unit": unit, "embedding": None}}).input.embedding == size
        assert resolve({"input": {"unit": unit, "embedding": 7}}).input.embedding == 7
    assert config.InputConfig(unit="word").embedding == 256


def test_tied_weights_fit() -> None:
    layers = [setting("input.unit", "word"), setting("core.hidden", 256), setting("output.tied", True)]
    assert resolve(*layers).output.tied


@pytest.mark.parametrize("cell, key", [("lstm", "chrono"), ("gru", "chrono"), ("lstm", "forget_bias")])
def test_gate_biases_of_cells_that_have_the_gate(cell: str, key: str) -> None:
    assert getattr(resolve({"core": {"cell": cell, key: 5}}).core, key) == 5


def test_a_config_is_frozen_and_its_sections_refuse_what_is_unknown() -> None:
    resolved = resolve()
    with pytest.raises(ValidationError, match="frozen"):
        resolved.core.hidden = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="hiden"):
        config.CoreConfig(hiden=3)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="reads left to right"):
        Config(core=config.CoreConfig(bidirectional=True))
    assert hash(resolve()) == hash(Config())
    assert resolve({"core": config.CoreConfig(hidden=3)}).core.hidden == 3


def test_a_path_from_python_becomes_a_text() -> None:
    assert resolve(setting("training.init_from", Path("a") / "b")).training.init_from == "a/b"


def test_difference_is_what_changed() -> None:
    a = resolve()
    assert difference(a, resolve()) == []
    b = resolve(
        {
            "core": {"cell": "gru", "locked": False},
            "training": {"lr": 0.003, "clip": None, "betas": [0.9, 0.95], "window": "full"},
        }
    )
    assert difference(a, b) == [
        "core.cell: lstm -> gru",
        "core.locked: true -> false",
        "training.window: 128 -> full",
        "training.lr: 0.002 -> 0.003",
        "training.betas: [0.9, 0.99] -> [0.9, 0.95]",
        "training.clip: 1.0 -> null",
    ]


# ---------------------------------------------------------------- flags


SHARED = ("unit", "embedding", "max_vocabulary", "min_count")
"""What the input and the output have both: the plain name is the input's."""


def test_every_plain_name_is_a_flag() -> None:
    for key, about in flat_keys().items():
        assert flag_key(key) == key
        shared = {"dropout": "core.dropout"} | {name: f"input.{name}" for name in SHARED}
        if about.name not in ("kind", "columns"):
            assert flag_key(about.name) == shared.get(about.name, key)
            assert flag_key(about.name.replace("_", "-")) == shared.get(about.name, key)


@pytest.mark.parametrize(
    "name, said",
    [
        ("hiden", "unknown setting 'hiden': did you mean 'hidden'?"),
        ("batchsize", "unknown setting 'batchsize': did you mean 'batch_size'?"),
        ("core.hiden", "unknown setting 'core.hiden': did you mean 'hidden'?"),
        ("core.lr", "unknown setting 'core.lr': did you mean 'training.lr'?"),
        ("kind", "'kind' is the name of several settings: write input.kind or output.kind"),
    ],
)
def test_unknown_flags(name: str, said: str) -> None:
    assert message(lambda: flag_key(name)) == said


def test_a_flag_like_no_other_is_answered_with_all_of_them() -> None:
    said = message(lambda: flag_key("qqq"))
    assert said.startswith(
        "unknown setting 'qqq': known: ahead, attention, augment, average, backend, base, batch_size, betas, "
    )
    assert all(about.name in said for about in flat_keys().values())


@pytest.mark.parametrize(
    "text, key, value",
    [
        ("core.hidden=256", "core.hidden", 256),
        ("hidden=256", "core.hidden", 256),
        (" batch-size = 8 ", "training.batch_size", 8),
        ("lr=1e-3", "training.lr", 1e-3),
        ("lr=1E-3", "training.lr", 1e-3),
        ("lr=1.5e3", "training.lr", 1500.0),
        ("lr=.5e-1", "training.lr", 0.05),
        ("lr=2.e-1", "training.lr", 0.2),
        ("clip=null", "training.clip", None),
        ("locked=false", "core.locked", False),
        ("betas=[0.9, 95e-2]", "training.betas", [0.9, 0.95]),
        ("window=full", "training.window", "full"),
        ("init_from=a=b", "training.init_from", "a=b"),
        ("init_from='#1'", "training.init_from", "#1"),
        ("init_from=모델/하나", "training.init_from", "모델/하나"),
        ("init_from=1e", "training.init_from", "1e"),
    ],
)
def test_overrides(text: str, key: str, value: Any) -> None:
    parsed = parse_override(text)
    assert parsed == setting(key, value)
    assert repr(parsed) == repr(setting(key, value))
    resolve(parsed)


@pytest.mark.parametrize(
    "text, said",
    [
        ("core.hidden", "expected KEY=VALUE, e.g. core.hidden=256 (null for none), got 'core.hidden'"),
        ("=3", "expected KEY=VALUE, e.g. core.hidden=256 (null for none), got '=3'"),
        ("clip=", "expected KEY=VALUE, e.g. core.hidden=256 (null for none), got 'clip='"),
        ("", "expected KEY=VALUE, e.g. core.hidden=256 (null for none), got ''"),
        ("core.hiden=3", "unknown setting 'core.hiden': did you mean 'hidden'?"),
        ("init_from=#1", "'init_from=#1': YAML takes what follows the # for a comment: put the value in quotes"),
        ("betas=[0.9", "'betas=[0.9', line 1: not YAML: expected ',' or ']', but got '<stream end>'"),
        ("lr=a: b: c", "'lr=a: b: c', line 1: not YAML: mapping values are not allowed here"),
        ("lr=!!int x", "'lr=!!int x': not YAML: invalid literal for int() with base 10: 'x'"),
        (
            "lr=\x00",
            (
                r"'lr=\x00': not YAML: unacceptable character #x0000: special characters are not allowed in "
                '"<unicode string>", position 0'
            ),
        ),
    ],
)
def test_overrides_that_are_refused(text: str, said: str) -> None:
    assert message(lambda: parse_override(text)) == said


# ---------------------------------------------------------------- files


def test_a_file_is_read_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "\ufeff# a comment\ncore: {cell: gru}\ntraining:\n  lr: 1e-3\n  window: full\ndata:\n", encoding="utf-8"
    )
    assert load_config(path) == {"core": {"cell": "gru"}, "training": {"lr": 1e-3, "window": "full"}, "data": None}
    assert resolve(load_config(str(path))).training.lr == 1e-3


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "null\n", "{}"])
def test_an_empty_file_changes_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    assert load_config(path) == {}


def test_anchors_and_merge_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("core: &core\n  hidden: 8\n  layers: 1\ntraining: {lr: 0.1}\n")
    assert load_config(path)["core"] == {"hidden": 8, "layers": 1}
    path.write_text("core:\n  <<: {hidden: 8, layers: 1}\n  hidden: 16\n")
    assert load_config(path)["core"] == {"hidden": 16, "layers": 1}
    path.write_text("core:\n  <<: {hidden: -8}\n")
    assert message(lambda: load_config(path)) == f"{path}, line 1: core.hidden: expected an integer >= 1, got -8"


@pytest.mark.parametrize(
    "text, said",
    [
        ("core:\n  hidden: 8\n  lrr: 3\n", f", line 3: unknown setting 'core.lrr': known: {CORE}"),
        ("training:\n  lr: 1\n\n  windw: 3\n", ", line 4: unknown setting 'training.windw': did you mean 'window'?"),
        ("\ncor:\n  hidden: 8\n", ", line 2: unknown setting 'cor': did you mean 'core'?"),
        ("hidden: 8\n", ", line 1: unknown setting 'hidden': did you mean 'core.hidden'?"),
        (
            "core:\n  hidden: 8\ntraining:\n  lr: fast\n  clip: 0\n",
            ", line 4: training.lr: expected a number > 0, got 'fast' (and 1 more)",
        ),
        (
            "core: 5\n",
            (
                ", line 1: core: expected settings (cell, hidden, layers, bidirectional, dropout, locked, "
                "recurrent_dropout, init, forget_bias, chrono), got 5"
            ),
        ),
        ("core:\n  hidden: 8\n  hidden: 9\n", ", line 3: core.hidden was set on line 2 already"),
        ("core:\n  hidden: 8\ncore:\n  layers: 9\n", ", line 3: core was set on line 1 already"),
        ("core:\n  1: 2\n", f", line 2: unknown setting 'core.1': known: {CORE}"),
        ("core:\n\thidden: 8\n", ", line 2: not YAML: found character '\\t' that cannot start any token"),
        ("core: [1\n", ", line 2: not YAML: expected ',' or ']', but got '<stream end>'"),
        ("core: *x\n", ", line 1: not YAML: found undefined alias 'x'"),
        ("a: 1\n---\nb: 2\n", ", line 2: not YAML: but found another document"),
        (
            "core: !!python/object:os.system {}\n",
            (
                ", line 1: not YAML: could not determine a constructor for the tag "
                "'tag:yaml.org,2002:python/object:os.system'"
            ),
        ),
        ("core: {[1]: 2}\n", ", line 1: not YAML: found unhashable key"),
        ("data: 2024-13-45\n", ": not YAML: month must be in 1..12"),
        ("just text\n", ": expected sections (input, core, output, data, training), got 'just text'"),
        ("- core\n", ": expected sections (input, core, output, data, training), got ['core']"),
        ("[" * 5000, ": not YAML: maximum recursion depth exceeded"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    assert message(lambda: load_config(path)).startswith(f"{path}{said}")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    assert message(lambda: load_config(path)) == f"cannot read config file {path}: No such file or directory"
    assert message(lambda: load_config(tmp_path)) == f"cannot read config file {tmp_path}: Is a directory"
    path.write_bytes("core: 한".encode("euc-kr"))
    assert message(lambda: load_config(path)) == f"{path}: expected UTF-8, got other bytes at position 6"


def test_a_file_is_not_blamed_for_what_a_flag_may_mend(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("training:\n  window: 64\n  stride: 128\n")
    layer = load_config(path)
    assert "training.stride: expected at most training.window (64)" in message(lambda: resolve(layer))
    assert resolve(layer, parse_override("window=128")).training.stride == 128


@given(st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_file_is_taken_or_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    for prefix in (b"", b"core:\n  hidden: "):
        path.write_bytes(prefix + data)
        try:
            resolve(load_config(path))
        except ConfigError as error:
            assert len(str(error).splitlines()) == 1  # noqa: PT017


def test_what_storage_wrote_is_a_config_file_again(tmp_path: Path) -> None:
    resolved = resolve({"training": {"init_from": "모델", "lr": 1e-5, "betas": (0.5, 0.25)}, "input": {"unit": "word"}})
    path = tmp_path / "config.yaml"
    storage.write_yaml(path, "config", to_dict(resolved))
    assert resolve(storage.read_yaml(path, "config")) == resolved
    assert resolve(load_config(path)) == resolved
    path.write_text(yaml.safe_dump(to_dict(resolved), allow_unicode=True), encoding="utf-8")
    assert resolve(load_config(path)) == resolved


def test_config_loads_without_torch_and_fast() -> None:
    script = "import sys, unrolled.config; print({'torch', 'numpy', 'yaml', 'safetensors'} & {*sys.modules})"
    source = str(Path(config.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={"PYTHONPATH": source}
    )
    assert done.stdout.strip() == "set()"
