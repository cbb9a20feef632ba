"""Training: a text or a table in, a model folder out.

`courses` say what one update goes through, `loop` does the updates; here both are set up.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from unrolled.allocator import keep_freed_memory
from unrolled.cells import cell_names
from unrolled.checkpoints import (
    begin_folder,
    checkpoint_steps,
    holds_model,
    load,
    load_weights,
    prune_checkpoints,
    read_checkpoint,
    read_config,
    read_ends,
    weights_of,
)
from unrolled.config import Config, difference, flag_key, flat_keys, load_config, parse_end, resolve, to_dict
from unrolled.errors import ConfigError, StorageError, TrainingError
from unrolled.model import Model, build_model, form_of
from unrolled.progress import Silent, Watcher
from unrolled.storage import make_folder, write_yaml
from unrolled.training.courses import Course, ExampleCourse, TextCourse
from unrolled.training.loop import Training, learning_rate

__all__ = ["learning_rate", "prepare_config", "train"]

_CHANGEABLE = ("training.epochs", "training.steps", "training.patience", "training.log_every", "training.save_every",
               "training.keep_memory", "training.init_from")  # fmt: skip
Settings = Mapping[str, Any]


def train(
    data: Any,
    out: str | Path,
    *,
    input: str | None = None,
    output: str | None = None,
    config: str | Path | Settings | None = None,
    valid: Any = None,
    resume: bool = False,
    force: bool = False,
    watcher: Watcher | None = None,
    report: bool = False,
    **settings: Any,
) -> Model:
    """Train a model on a text or on a table of examples and leave it in a model folder; that with the best weights.

    Args:
        data: for a language model, text files (`.txt`, `.txt.gz`, `.txt.xz`) or folders of them. Else a table: a file
            (TSV, CSV, JSONL, Parquet, CoNLL; packed or not), two text files side by side, or rows in Python: an
            iterable of dictionaries, a Hugging Face dataset.
        out: the model folder to write.
        input, output: what goes in and what comes out, `KIND` or `KIND:COLUMN,...`: `text:document`, `label:label`.
            Without them it is a language model: text in, the next symbol out.
        config: a YAML file or a dictionary of settings, as in `unrolled.config`.
        valid: what to validate on, given like `data`; if None, the last `data.valid_fraction` of a text or series, or
            so many examples drawn at random.
        resume: go on from the last checkpoint in `out`, bit for bit as if never interrupted. Settings come from
            the folder; those given must agree, but for `epochs`, `steps` and `patience`, which may change.
        force: replace a model that `out` holds.
        watcher: where progress is shown (`unrolled.progress.open_bar()`); nowhere if None.
        report: at the end write `report.html` into the folder, a page on the model (see `unrolled.inspect`), and
            `examples.json`, a few examples of the validation part that reports show. The command line does; from
            Python, where a program may train many models, it must be asked for. If it cannot be written that is said,
            and the training is finished all the same.
        settings: single settings by their plain names: `hidden=256, epochs=3`.

    Raises:
        ConfigError: a setting is unknown, out of range or does not fit the others.
        DataError: the data cannot be used: empty, not UTF-8, too short for one window, a column missing.
        StorageError: `out` holds a model, or lacks one to resume, or cannot be written.
        TrainingError: a loss or gradient is not finite; the text or settings differ at resume.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once a checkpoint is written.
    """
    watcher = watcher or Silent()
    out = Path(out)
    config_ = prepare_config(out, config, input=input, output=output, resume=resume, **settings)
    if out.exists() and not out.is_dir():
        raise StorageError(f"{out} is a file, expected a folder to write the model to")
    if not resume and not force and holds_model(out):
        raise StorageError(
            f"{out} already holds a model: go on with it (--resume), replace it (--force) or choose another --out"
        )
    if config_.training.keep_memory:
        keep_freed_memory()
    device = _device(config_.training.device)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            return _train(_paths(data), _paths(valid), out, config_, resume, device, watcher, report)
    finally:
        watcher.stop()  # an error's message must not land in a bar


def prepare_config(
    out: str | Path,
    config: str | Path | Settings | None = None,
    *,
    input: str | None = None,
    output: str | None = None,
    resume: bool = False,
    **settings: Any,
) -> Config:
    """The resolved config that `train` with these arguments uses.

    Raises:
        ConfigError: see `train`.
        TrainingError: settings differ from those of the model to resume.
    """
    layers: list[Settings] = []
    if isinstance(config, str | Path):
        layers.append(load_config(config))
    elif config is not None:
        layers.append(config)
    layers += [parse_end(end, text) for end, text in (("input", input), ("output", output)) if text is not None]
    for name, value in settings.items():
        section, key = flag_key(name).split(".")
        layers.append({section: {key: value}})
    if not resume:
        given = resolve(*layers, cells=cell_names())
        _expect_embedding_that_counts(given)
        if given.training.init_from is None:
            return given
        return _config_from(given, layers)
    if not holds_model(out):
        raise StorageError(f"{out} holds no model to resume: leave --resume out to start one")
    stored = read_config(Path(out))
    wanted = resolve(to_dict(stored), *layers)
    changed = [line for line in difference(stored, wanted) if line.split(":")[0] not in _CHANGEABLE]
    if changed:
        raise TrainingError(
            f"the model in {out} was trained with other settings ({'; '.join(changed)}): leave them out to go on "
            "with it, or start anew in another folder"
        )
    return wanted


def _expect_embedding_that_counts(given: Config) -> None:
    """One core reads the first step and then its own words, so all are of one size, which the first step rules.

    The default is let pass, since --dump-config writes it for every form; and models saved with another size load.
    """
    embedding = given.output.embedding
    if given.output.kind != "text" or form_of(given).name != "one-to-many":
        return
    if given.input.kind == "image":
        size, rule = given.input.features, f"set input.features (now {given.input.features}) in its place"
    else:
        size, rule = None, "leave it out"
    if embedding not in (size, flat_keys()["output.embedding"].default):
        raise ConfigError(
            f"output.embedding: one core reads the {given.input.kind} and then the words that it writes, whose vectors "
            f"are as long as the {given.input.kind}'s: {rule}; got {embedding}"
        )


def _config_from(given: Config, layers: list[Settings]) -> Config:
    """The config of a training that starts from another model: its ends and core, unless they contradict."""
    source = Path(str(given.training.init_from))
    theirs = to_dict(read_config(source))
    sections = ("input", "core", "output") if theirs["output"]["kind"] == given.output.kind else ("input", "core")
    ends = {section: theirs[section] for section in sections}
    wanted = resolve(ends, *layers)
    own = {"core.dropout", "core.locked", "core.recurrent_dropout", "core.init", "core.forget_bias", "core.chrono",
           "input.max_vocabulary", "input.min_count", "input.columns", "input.dropout",
           "input.word_dropout"}  # fmt: skip
    base = resolve({**to_dict(wanted), **ends})
    changed = [line for line in difference(base, wanted) if line.split(":")[0] not in own]
    if changed:
        raise ConfigError(f"training.init_from: {source} is another model than the one asked for: {'; '.join(changed)}")
    return wanted


def _paths(data: Any) -> Any:
    return [data] if isinstance(data, str | Path) else data


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("training.device: cuda is not available here: use cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _train(
    data: Any,
    valid: Any,
    out: Path,
    config: Config,
    resume: bool,
    device: torch.device,
    watcher: Watcher,
    report: bool,
) -> Model:
    steps = checkpoint_steps(out) if resume else []
    source = None if config.training.init_from is None else Path(config.training.init_from)
    running = config.output.kind == "next" and config.input.kind == "text"
    course_of: Any = TextCourse if running else ExampleCourse
    form_of(config)  # ends that no form has are refused before anything is read
    make_folder(out.parent)
    known: dict[str, Any] = {}
    ends = read_ends(out) if steps else None
    if ends is None and source is not None:
        ends = read_ends(source)
        if read_config(source).output.kind != config.output.kind:
            known, ends = {"input": ends.input}, None
    ends, parts = course_of.prepare(data, valid, config, ends, out.parent, watcher, **known)

    torch.manual_seed(config.training.seed)
    model = build_model(config, ends)
    if source is not None and not steps:
        _start_from(model, source)
    elif config.input.vectors is not None and not steps:
        watcher.say(ends.input.load_vectors(model.reader, config.input.vectors))
    model.to(device)
    course = course_of(model, config, parts, device)
    run = Training(model, config.training, out, course, device, watcher)
    if steps:
        run.restore(read_checkpoint(out, steps[-1]))
        prune_checkpoints(out, {run.at.step, run.at.best_step})  # whoever was killed may not have come to it
        write_yaml(out / "config.yaml", "config", to_dict(config))
    else:
        begin_folder(out, config, ends, overwrite=True)
        run.checkpoint()
    watcher.say(str(model.form))
    watcher.say(course.describe(run.total))
    if steps:
        watcher.say(f"going on at update {run.at.step:,}")
    run.go()
    if report:
        _report(out, course, watcher)
    return load(out)


def _report(out: Path, course: Course, watcher: Watcher) -> None:
    """Write report.html; whatever goes wrong, the training is finished and its model is written."""
    try:
        from unrolled.report import inspect, write_examples

        write_examples(out, course.examples(6))
        inspect(out).save(out / "report.html")
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        watcher.say(f"note: {out / 'report.html'} could not be written: {message}")
    else:
        watcher.say(f"report: {out / 'report.html'}")


def _start_from(model: Model, source: Path) -> None:
    """Another model's weights: all of them, or of one with another output the reader and the core."""
    theirs = load(source)
    weights = weights_of(theirs)
    if theirs.config.output.kind != model.config.output.kind:
        kept = {name: t for name, t in weights.items() if name.startswith(("reader.", "core."))}
        own = {name: t for name, t in weights_of(model).items() if not name.startswith(("reader.", "core."))}
        weights = {**own, **kept}
    load_weights(model, weights, source)
