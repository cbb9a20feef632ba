"""What a user may set, in one place: names, types, ranges, defaults and what each setting does.

    input     what goes in                        core      the recurrent layers
    output    what comes out                      data      how files become examples
    training  truncated BPTT, optimiser, schedule, when to stop and to save

Settings come in layers, each over the one before: the defaults, a YAML file (`load_config`), flags
(`parse_override`, `flag_key`); `resolve` makes one frozen `Config` of them, `to_dict` writes it back, whole.
Nothing is guessed: an unknown key names the nearest known one, a text that looks like a number is not one.

A setting's text is written once, in its Field; the command line, `--dump-config` and the docs read it with `flat_keys`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from unrolled.errors import ConfigError, nearest

__all__ = [
    "Config",
    "CoreConfig",
    "DataConfig",
    "InputConfig",
    "OutputConfig",
    "Setting",
    "TrainingConfig",
    "difference",
    "explain",
    "flag_key",
    "flat_keys",
    "load_config",
    "parse_end",
    "parse_override",
    "resolve",
    "to_dict",
]

_WORD_EMBEDDING = 256
_CHRONO_CELLS = ("lstm", "gru")
_FORGETFUL_CELLS = ("lstm",)

# YAML and JSON know lists only; paths come from Python.
_Pair = Annotated[
    tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
]
_Path = Annotated[str, BeforeValidator(lambda value: os.fspath(value) if isinstance(value, os.PathLike) else value)]
_Count = Annotated[int, Field(ge=1)]
_Names = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
]
_Shares = Annotated[
    tuple[Annotated[float, Field(gt=0, lt=1)], ...],
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class InputConfig(_Section):
    """What goes in."""

    kind: Literal["text", "image", "video", "series", "vector"] = Field(
        "text", description="What the model reads: text, which unit cuts into steps, or images, video, series, vectors."
    )
    columns: _Names = Field((), description="Which columns of the table it is in; none: the usual one of its kind.")
    unit: Literal["char", "jamo", "word", "subword", "word+char"] = Field(
        "char",
        description="What one step reads: a character, a letter of Hangul (jamo), a word, a piece of one, or a word "
        "and its characters.",
    )
    embedding: _Count | None = Field(
        None,
        description="Size of the vector learnt for each symbol; null: one-hot for char and jamo, 256 for word and "
        "subword.",
    )
    max_vocabulary: _Count | None = Field(
        None,
        description="Keep only so many symbols, the most frequent; null: all of them (30,000 words, 8,000 subwords).",
    )
    min_count: int = Field(1, ge=1, description="Leave out symbols that occur less often than this.")
    characters: int = Field(
        64, ge=1, description="Size, per direction, of the small reader of a word's characters (word+char only)."
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of the values of symbols' and steps' vectors set to zero in training."
    )
    word_dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of symbols read as unknown in training, so that unknown ones can be."
    )
    vectors: _Path | None = Field(
        None, description="Text file of pretrained word vectors (word2vec, fastText) that the embedding starts from."
    )
    width: int = Field(1, ge=1, description="How many numbers make a step, where a row of a table is a whole series.")
    size: int = Field(48, ge=8, description="Side in pixels to which images and frames are brought.")
    rows: bool = Field(False, description="Read an image row by row, a step each, not as one step.")
    features: int = Field(
        128, ge=1, description="Size of the vector that the convolutional reader makes of an image or frame."
    )
    places: int = Field(
        0, ge=0, description="Read where in an image or frame so many things are, not what is in it; 0: what is in it."
    )
    augment: bool = Field(
        True,
        description="Train on copies of images and films that are turned, scaled, moved and recoloured a little.",
    )

    @model_validator(mode="before")
    @classmethod
    def _words_are_embedded(cls, given: Any) -> Any:
        wordy = ("word", "subword", "word+char")
        if isinstance(given, dict) and given.get("unit") in wordy and given.get("embedding") is None:
            return {**given, "embedding": _WORD_EMBEDDING}
        return given


class CoreConfig(_Section):
    """The recurrent core: the cell, and how many of them."""

    cell: str = Field(
        "lstm",
        description="The function repeated at each step: rnn, rnn_relu, lstm, gru, or a cell you registered, by name.",
    )
    hidden: int = Field(512, ge=1, description="Units in each layer: the size of the state a stream carries.")
    layers: int = Field(2, ge=1, description="Layers stacked on each other; each reads the one below.")
    bidirectional: bool = Field(
        False,
        description="Read in both directions; what needs the future cannot stream, and cannot predict what is next.",
    )
    dropout: float = Field(
        0.3, ge=0, lt=1, description="Share of values set to zero between layers and before the output, in training."
    )
    locked: bool = Field(
        True, description="Keep one dropout mask for all steps of a window (variational), not a new one each step."
    )
    recurrent_dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of recurrent weights set to zero for a whole window (DropConnect)."
    )
    init: Literal["uniform", "orthogonal"] = Field(
        "uniform",
        description="How weights start: torch's uniform, or orthogonal recurrent matrices, which keep gradients' size.",
    )
    forget_bias: float | None = Field(
        None, description="Where the LSTM's forget bias starts; 1 or 2 has it remember from the first update on."
    )
    chrono: Annotated[int, Field(ge=3)] | None = Field(
        None,
        description="Start the gates' biases for memories of up to so many steps (chrono initialisation; lstm, gru).",
    )


class OutputConfig(_Section):
    """What comes out."""

    kind: Literal["next", "label", "labels", "number", "numbers", "text"] = Field(
        "next",
        description="What comes out: what is next at each step, one label or number, one a step, or written text.",
    )
    columns: _Names = Field((), description="Which columns of the table it is in; none: the usual one of its kind.")
    tied: bool = Field(
        False, description="Have the output layer share the embedding's weights; needs input.embedding == core.hidden."
    )
    pooling: Literal["last", "mean", "max", "attention"] = Field(
        "last", description="What of the steps a label or number is told from: the last state, or a pool of all."
    )
    unit: Literal["char", "jamo", "word", "subword"] | None = Field(
        None, description="What one step of written text is; null: as in the text that is read, else char."
    )
    embedding: int = Field(
        256,
        ge=1,
        description="Size of the vector learnt for each symbol of written text; one-to-many: the input step's.",
    )
    max_vocabulary: _Count | None = Field(
        None, description="Keep only so many symbols of written text; null: all (30,000 words, 8,000 subwords)."
    )
    min_count: int = Field(1, ge=1, description="Leave out written symbols that occur less often than this.")
    attention: Literal["none", "dot", "general", "additive", "strongest"] = Field(
        "dot", description="How the decoder looks at the encoder's states: not at all, or by which score."
    )
    feed: Literal["word", "zeros"] = Field(
        "word", description="What a writing core reads next: its own last word, or zeros (one-to-many only)."
    )
    input_feeding: bool = Field(
        False, description="Have the decoder read what attention saw a step before; slower, step by step."
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Share of the target's probability that is spread over all symbols or labels."
    )
    scheduled_sampling: float = Field(
        0.0, ge=0, le=1, description="Share of the decoder's inputs that are its own words, in training; 0: forced."
    )
    horizon: int = Field(24, ge=1, description="How many steps ahead a series is forecast.")
    season: int = Field(1, ge=1, description="Steps of a season of the series that is forecast (1: it has none).")
    base: Literal["season", "last"] = Field(
        "season", description="What a forecast starts from: what was a season ago, or the last step."
    )
    ahead: int = Field(1, ge=1, description="How many steps ahead are learnt, own forecasts fed back as in use.")
    changes: bool = Field(
        False, description="Read how much a series changes from step to step, in place of its levels."
    )
    quantiles: _Shares = Field((), description="Quantiles to forecast beside the middle, e.g. [0.1, 0.9].")


class DataConfig(_Section):
    """How files become examples."""

    documents: Literal["file", "line", "paragraph"] = Field(
        "file", description="What is one document: the state starts anew before each."
    )
    valid_fraction: float = Field(
        0.1, gt=0, lt=1, description="Share of the text, its end, held out for validation if no files are given for it."
    )
    errors: Literal["strict", "replace"] = Field(
        "strict", description="Bytes that are not UTF-8: strict refuses the file, replace reads each as U+FFFD."
    )
    format: Literal["tsv", "csv", "jsonl", "parquet", "conllu", "conll", "text"] | None = Field(
        None, description="What the table's files are; null: as their names' extensions say, packed or not."
    )
    names: _Names = Field((), description="Names for the columns of a table without a header; none: as it says itself.")
    group: str | None = Field(
        None, description="Column that names the series or video each row belongs to; null: each row is an example."
    )
    max_tokens: _Count | None = Field(
        None, description="Most steps, padding counted, in one batch of examples; null: batch_size alone decides."
    )
    skip_bad: bool = Field(
        False, description="Leave out, count and list examples that cannot be read; false: stop at the first."
    )


class TrainingConfig(_Section):
    """Truncated BPTT, the optimiser and its schedule, when to validate, save and stop."""

    window: _Count | Literal["full"] = Field(
        128, description="Steps that the gradient goes back (k2 of truncated BPTT); full: a lane, text / batch_size."
    )
    stride: _Count | None = Field(
        None, description="Steps from one update to the next (k1), at most the window; null: the window itself."
    )
    batch_size: int = Field(64, ge=1, description="Lanes: how many places of the text are read at once.")
    epochs: int = Field(10, ge=1, description="How often the whole text is read.")
    steps: _Count | None = Field(None, description="Stop after so many updates, if that is sooner than the epochs.")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="AdamW, or gradient descent with momentum.")
    lr: float = Field(2e-3, gt=0, description="Learning rate: the size of an update, at its highest.")
    betas: _Pair = Field(
        (0.9, 0.99), description="How slowly AdamW's averages of gradients and of their squares forget."
    )
    weight_decay: float = Field(0.01, ge=0, description="How strongly weights are drawn towards zero.")
    momentum: float = Field(0.9, ge=0, lt=1, description="How much of the last update goes into the next (sgd only).")
    schedule: Literal["constant", "cosine", "plateau"] = Field(
        "cosine", description="The learning rate: constant, falling along a cosine, or lowered when validation stalls."
    )
    warmup: int = Field(100, ge=0, description="Updates over which the learning rate rises from zero.")
    min_lr_ratio: float = Field(0.05, ge=0, le=1, description="Where the cosine ends, as a share of lr.")
    plateau_factor: float = Field(0.5, gt=0, lt=1, description="What plateau multiplies the learning rate by.")
    plateau_patience: int = Field(
        2,
        ge=0,
        description="Validations without a better one that plateau lets pass before it lowers the learning rate.",
    )
    clip: Annotated[float, Field(gt=0)] | None = Field(
        1.0,
        description="Largest norm of the gradient: a longer one, which would explode, is scaled down to it; null: off.",
    )
    average: float = Field(
        0.0, ge=0, lt=1, description="Validate and keep an exponential average of the weights with this decay; 0: off."
    )
    patience: _Count | None = Field(
        None, description="Stop after so many validations without a better one; null: go on to the end."
    )
    valid_every: _Count | None = Field(None, description="Updates between validations; null: once an epoch.")
    save_every: _Count | None = Field(None, description="Updates between checkpoints; null: one at each validation.")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Numbers of the large products: fp32, or bf16, faster where the CPU has it and less exact."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to compute; auto: cuda if there is one.")
    seed: int = Field(
        1,
        ge=0,
        lt=2**63,
        description="Start of all random numbers: the same seed on the same machine gives the same model.",
    )
    log_every: int = Field(10, ge=1, description="Updates between two lines in metrics.jsonl.")
    backend: Literal["auto", "reference", "tape", "native"] = Field(
        "auto",
        description="How the core runs: reference is the plain loop, tape and native are the fast ones; auto: the "
        "fastest that can.",
    )
    tape_budget: _Count | None = Field(
        None,
        description="Bytes the core may keep for going back, computing the rest anew, to the same bits; null: no "
        "bound.",
    )
    init_from: _Path | None = Field(
        None, description="Model folder whose weights training starts from; null: fresh ones."
    )
    keep_memory: bool = Field(
        True, description="Keep freed memory in the process between windows: faster; false gives it back to the system."
    )


class Config(_Section):
    """Every setting, resolved and frozen. Build one with `resolve`: its errors are made for people."""

    input: InputConfig = Field(default_factory=InputConfig)
    core: CoreConfig = Field(default_factory=CoreConfig)
    output: OutputConfig = Field(default_factory=OutputConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)

    @model_validator(mode="before")
    @classmethod
    def _text_to_text_reads_subwords(cls, given: Any) -> Any:
        """A translator's steps are pieces of words unless said otherwise: characters are many to remember."""
        if isinstance(given, dict) and isinstance(given.get("output"), dict) and given["output"].get("kind") == "text":
            read = given.get("input") or {}
            if isinstance(read, dict) and read.get("kind", "text") == "text" and "unit" not in read:
                return {**given, "input": {**read, "unit": "subword"}}
        return given

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Config:
        faults = list(_contradictions(self))
        if faults:
            raise ValueError(_first(faults))
        return self


class Setting(NamedTuple):
    """One setting, as the docs and the command line show it.

    name: the plain name (`lr`); expected: in words what it may be (`a number > 0`); options: the words it may be,
    if any; default: before other settings change it (`input.embedding` of words).
    """

    key: str
    section: str
    name: str
    expected: str
    options: tuple[str, ...]
    default: Any
    description: str


def resolve(*layers: Mapping[str, Any], cells: Iterable[str] | None = None) -> Config:
    """One Config from the defaults and `layers`, each a nested mapping of sections, later ones over earlier ones.

    Args:
        layers: e.g. `load_config(file), parse_override("core.hidden=256")`; `to_dict` of a Config is one too.
        cells: the names that `core.cell` may have (`unrolled.cells.cell_names()`); None: not checked here.

    Raises:
        ConfigError: one line: the first setting that is unknown, of the wrong type, out of range or that does not
            fit another one, what was expected and what came, "(and N more)".
    """
    given = _merge(layers)
    try:
        config = Config.model_validate(given)
    except ValidationError as error:
        raise ConfigError(_first(_problems(error, given).values())) from None
    known = None if cells is None else list(cells)
    if known is not None and config.core.cell not in known:
        raise ConfigError(f"core.cell: unknown cell {config.core.cell!r}: {nearest(config.core.cell, known)}")
    return config


def load_config(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file, sections of keys, as they stand there: a layer for `resolve`.

    Its keys and values are checked here, so that a message can name the line; how settings fit together is
    checked by `resolve`, since flags may still change one of them.

    Raises:
        ConfigError: the file is missing, not UTF-8 or not YAML, names a setting twice, an unknown one, or gives one
            a value it cannot have.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8, got other bytes at position {error.start}") from None
    except OSError as error:
        raise ConfigError(f"cannot read config file {path}: {error.strerror}") from None
    lines, given = _parse_yaml(text, str(path))
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: expected sections ({', '.join(_SECTIONS)}), got {_show(given)}")
    layer = _merge([given])
    try:
        Config.model_validate(layer)
    except ValidationError as error:
        problems = _problems(error, layer)
        problems.pop("", None)  # about several settings at once
        for key in problems:
            line = lines.get(key, lines.get(key.partition(".")[0]))
            where = f"{path}, line {line}" if line else str(path)
            raise ConfigError(f"{where}: {_first(problems.values())}") from None
    return given


def parse_override(text: str) -> dict[str, dict[str, Any]]:
    """One setting written `KEY=VALUE`, as a layer for `resolve`; VALUE is YAML: `256`, `true`, `null`, `[0.9, 0.95]`.

    KEY is a dotted key or a plain name: `core.hidden=256`, `hidden=256`.

    Raises:
        ConfigError: no `=`, an unknown key, or a value that is not YAML. Its type is checked by `resolve`.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise ConfigError(f"expected KEY=VALUE, e.g. core.hidden=256 (null for none), got {text!r}")
    section, key = flag_key(name.strip()).split(".")
    if value.lstrip().startswith("#"):
        raise ConfigError(f"{text!r}: YAML takes what follows the # for a comment: put the value in quotes")
    return {section: {key: _parse_yaml(value, repr(text))[1]}}


def parse_end(section: str, text: str) -> dict[str, dict[str, Any]]:
    """What goes in or comes out, written `KIND` or `KIND:COLUMN,...`, as a layer for `resolve`.

    >>> parse_end("input", "series:x1,y1")
    {'input': {'kind': 'series', 'columns': ['x1', 'y1']}}

    Raises:
        ConfigError: an unknown kind, or a column without a name.
    """
    kind, colon, names = text.partition(":")
    known = _SETTINGS[f"{section}.kind"].options
    if kind not in known:
        raise ConfigError(f"--{section}: unknown kind {kind!r}: {nearest(kind, known)}")
    columns = [name.strip() for name in names.split(",")] if colon else []
    if not all(columns):
        raise ConfigError(f"--{section}: expected KIND:COLUMN,COLUMN, got {text!r}")
    return {section: {"kind": kind, "columns": columns}}


def flag_key(name: str) -> str:
    """The dotted key of a setting's plain name, with `_` or `-`: `hidden` -> `core.hidden`; a dotted key is its own.
    A name that the output has too is the input's: `unit` -> `input.unit`.

    Raises:
        ConfigError: no setting has this name, or more than one has (`kind`).
    """
    plain = name.replace("-", "_")
    if plain in _SETTINGS:
        return plain
    keys = [key for key, setting in _SETTINGS.items() if setting.name == plain]
    if plain == "dropout":
        return "core.dropout"
    if f"input.{plain}" in keys and plain not in ("kind", "columns"):
        return f"input.{plain}"  # what is written follows what is read, unless it is named: output.unit
    if len(keys) > 1:
        raise ConfigError(f"{name!r} is the name of several settings: write {' or '.join(keys)}")
    if not keys:
        raise ConfigError(_unknown(plain, _NAMES))
    return keys[0]


def flat_keys() -> dict[str, Setting]:
    """Every setting by its dotted key, in the order in which people read them."""
    return dict(_SETTINGS)


def to_dict(config: Config) -> dict[str, Any]:
    """All settings as nested plain values, for YAML or JSON; `resolve(to_dict(config)) == config`."""
    return config.model_dump(mode="json")


def explain(config: Config) -> str:
    """All settings as YAML that `load_config` reads, each under a comment that says what it does."""
    import yaml

    lines = ["# Every setting of `unrolled train`; give this file back, changed as you like, with --config."]
    for section, values in to_dict(config).items():
        lines += ["", f"{section}:"]
        for name, value in values.items():
            setting = _SETTINGS[f"{section}.{name}"]
            text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9)
            lines += [f"  # {setting.description} Expected: {setting.expected}."]
            lines += [f"  {name}: {text.removesuffix(chr(10)).removesuffix('...').rstrip()}"]
    return "\n".join(lines) + "\n"


def difference(a: Config, b: Config) -> list[str]:
    """What differs from `a` to `b`, a line each: `training.lr: 0.002 -> 0.003`."""
    before, after = to_dict(a), to_dict(b)
    return [
        f"{key}: {_bare(before[section][name])} -> {_bare(after[section][name])}"
        for key, (_, section, name, *_) in _SETTINGS.items()
        if before[section][name] != after[section][name]
    ]


def _contradictions(config: Config) -> Iterable[str]:
    """What no single setting is to blame for."""
    core, training = config.core, config.training
    if training.stride is not None:
        if training.window == "full":
            yield (
                f"training.stride: a full window is the whole lane, so there is nothing to step on by: expected "
                f"null, got {training.stride}"
            )
        elif training.stride > training.window:
            yield (
                f"training.stride: expected at most training.window ({training.window}), else steps are skipped, got "
                f"{training.stride}"
            )
    if config.input.places and config.input.kind not in ("image", "video"):
        yield (
            f"input.places: only pictures have places: expected 0, or input.kind image or video, got "
            f"{config.input.places}"
        )
    elif config.input.places and config.input.rows:
        yield (
            f"input.places: nothing looks for places in an image that is read row by row: expected 0, or input.rows "
            f"false, got {config.input.places}"
        )
    if training.tape_budget is not None and training.backend == "reference":
        yield (
            f"training.tape_budget: backend reference keeps all that autograd does: expected null, or training.backend "
            f"auto, native or tape, got {training.tape_budget}"
        )
    if core.bidirectional and config.output.kind == "next":
        yield (
            "core.bidirectional: a language model reads left to right: one that sees what comes next has nothing to "
            "predict; expected false with output.kind next, got true"
        )
    if config.output.tied and config.input.embedding != core.hidden:
        yield (
            f"output.tied: the output layer can only be the embedding if both are of one size: expected "
            f"input.embedding == core.hidden ({core.hidden}), got {config.input.embedding or 'null (one-hot)'}"
        )
    if core.chrono is not None and core.cell not in _CHRONO_CELLS:
        yield (
            f"core.chrono: it starts the gates that keep the state, and {core.cell} has none that unrolled knows: "
            f"expected null, or core.cell {' or '.join(_CHRONO_CELLS)}"
        )
    if core.forget_bias is not None and core.cell not in _FORGETFUL_CELLS:
        yield (
            f"core.forget_bias: {core.cell} has no forget gate that unrolled knows: expected null, or core.cell "
            f"{' or '.join(_FORGETFUL_CELLS)}"
        )
    if core.chrono is not None and core.forget_bias is not None:
        yield "core.chrono: it sets the forget gate's bias, as core.forget_bias does: expected one of them to be null"


def _merge(layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for layer in layers:
        if not isinstance(layer, Mapping):
            raise ConfigError(f"expected sections ({', '.join(_SECTIONS)}), got {_show(layer)}")
        for section, settings in layer.items():
            if settings is None:  # `core:` with nothing below it, all of it commented out
                merged.setdefault(section, {})
            elif isinstance(settings, Mapping) and isinstance(merged.get(section), dict):
                merged[section] = {**merged[section], **settings}
            else:
                merged[section] = dict(settings) if isinstance(settings, Mapping) else settings
    return merged


def _problems(error: ValidationError, given: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key -> one line, in the order in which they were found; "" -> about several settings at once."""
    problems: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        # Each member of a union, and each item of a list, reports for itself below the setting.
        section, name = [*(str(part) for part in detail["loc"][:2]), "", ""][:2]
        key = f"{section}.{name}" if name else section
        if key in problems:
            continue
        if detail["type"] in ("extra_forbidden", "invalid_key"):
            problems[key] = _unknown(key, [*_SECTIONS, *_NAMES])
        elif detail["type"] == "value_error":
            problems[key] = str(detail["ctx"]["error"])
        elif key in _SETTINGS:
            problems[key] = _refusal(_SETTINGS[key], given[section][name])
        else:
            problems[key] = f"{key}: expected settings ({', '.join(_SECTIONS[key])}), got {_show(given[section])}"
    return problems


def _first(problems: Iterable[str]) -> str:
    first, *others = problems
    return f"{first} (and {len(others)} more)" if others else first


def _unknown(key: str, known: Iterable[str]) -> str:
    section, _, name = key.rpartition(".")
    elsewhere = [repr(setting.key) for setting in _SETTINGS.values() if setting.name == name]
    if elsewhere:
        hint = f"did you mean {' or '.join(elsewhere)}?"
    else:
        hint = nearest(name, _SECTIONS.get(section, known))
    return f"unknown setting {key!r}: {hint}"


def _refusal(setting: Setting, value: Any) -> str:
    line = f"{setting.key}: expected {setting.expected}, got {_show(value)}"
    hint = nearest(value, setting.options) if isinstance(value, str) else ""
    return f"{line}; {hint}" if hint.startswith("did you mean") else line


def _show(value: Any) -> str:
    """A value on one line, as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:79] + "…"


def _bare(value: Any) -> str:
    return value if isinstance(value, str) else _show(value)


def _parse_yaml(text: str, where: str) -> tuple[dict[str, int], Any]:
    """The line of each section and each setting (`core`, `core.hidden`), and the value."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    # YAML 1.1, which PyYAML reads, takes 1e-3 for a text.
    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+\Z")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return {}, None
        return _lines(node, where), loader.construct_document(node)
    except ConfigError:
        raise
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{where}{line}: not YAML: {error.problem}") from None
    except Exception as error:  # a tag written out has PyYAML's constructors raise anything: `!!int x`, `!!timestamp x`
        raise ConfigError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def _lines(node: Any, where: str) -> dict[str, int]:
    import yaml

    lines: dict[str, int] = {}

    def walk(mapping: Any, prefix: str) -> None:
        for key, value in mapping.value:
            name = f"{prefix}{key.value}"
            if name in lines:
                raise ConfigError(
                    f"{where}, line {key.start_mark.line + 1}: {name} was set on line {lines[name]} already"
                )
            if key.tag != "tag:yaml.org,2002:merge":
                lines[name] = key.start_mark.line + 1
            if not prefix and isinstance(value, yaml.MappingNode):
                walk(value, f"{name}.")

    if isinstance(node, yaml.MappingNode):
        walk(node, "")
    return lines


def _settings() -> Iterable[Setting]:
    for section, model in _MODELS.items():
        schema = model.model_json_schema()["properties"]
        for name, field in model.model_fields.items():
            expected, options = _expected(schema[name]), tuple(_options(schema[name]))
            about = field.description or ""
            yield Setting(f"{section}.{name}", section, name, expected, options, field.default, about)


def _expected(schema: Mapping[str, Any]) -> str:
    """In words what a JSON schema allows: `an integer >= 1 or null`."""
    if "anyOf" in schema:
        parts = [_expected(member) for member in schema["anyOf"]]
        if len(parts) == 2 and " or " in parts[0]:  # a list of words, or null
            return f"{parts[0].replace(' or ', ', ')} or {parts[1]}"
        return " or ".join(parts)
    if "enum" in schema:
        *most, last = schema["enum"]
        return f"{', '.join(most)} or {last}"
    if "const" in schema:
        return str(schema["const"])
    kind = schema["type"]
    if kind == "array":
        if "prefixItems" not in schema:
            item = schema["items"]
            return "a list of names" if item["type"] == "string" else "a list of numbers" + _range(item)
        return f"a list of {schema['minItems']} numbers" + _range(schema["prefixItems"][0])
    words = {
        "null": "null",
        "boolean": "true or false",
        "string": "a text",
        "integer": "an integer",
        "number": "a number",
    }
    return words[kind] + _range(schema)


def _options(schema: Mapping[str, Any]) -> Iterable[str]:
    yield from schema.get("enum", [])
    if "const" in schema:
        yield schema["const"]
    for member in schema.get("anyOf", []):
        yield from _options(member)


def _range(schema: Mapping[str, Any]) -> str:
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    said = {sign: schema[name] for name, sign in bounds.items() if name in schema}
    return " and".join(f" {sign} {f'{bound:g}' if isinstance(bound, float) else bound}" for sign, bound in said.items())


_MODELS: dict[str, type[_Section]] = {
    "input": InputConfig,
    "core": CoreConfig,
    "output": OutputConfig,
    "data": DataConfig,
    "training": TrainingConfig,
}
_SETTINGS = {setting.key: setting for setting in _settings()}
_SECTIONS = {section: list(model.model_fields) for section, model in _MODELS.items()}
_NAMES = [setting.name for setting in _SETTINGS.values()]
