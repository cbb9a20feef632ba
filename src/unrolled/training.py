"""The loop: truncated BPTT over a text with the state carried on, optimiser, schedule, validation, stop and resume.

One update reads one window of every lane of the text:

    loss = mean over the window's steps and lanes of -log p(next symbol)
    gradient through the window only, its norm clipped; optimiser step; average of the weights
    the state at the window's end is the next window's first state (the carry)

Everything that decides the next update is in a checkpoint (weights, optimiser, averages, carry, position, random
state), so an interrupted training goes on bit for bit as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from unrolled.allocator import keep_freed_memory
from unrolled.cells import cell_names, map_state
from unrolled.checkpoints import (
    Checkpoint,
    begin_folder,
    checkpoint_steps,
    fingerprint,
    holds_model,
    load,
    load_weights,
    prune_checkpoints,
    read_checkpoint,
    read_config,
    read_vocabulary,
    weights_of,
    write_checkpoint,
    write_weights,
)
from unrolled.config import Config, TrainingConfig, difference, flag_key, load_config, resolve, to_dict
from unrolled.data import EncodedText, Lanes, encode_texts, find_texts, read_text, split_text
from unrolled.errors import ConfigError, DataError, StorageError, TrainingError
from unrolled.evaluation import evaluate
from unrolled.kinds.text import IGNORE
from unrolled.metrics import MetricsLog, Recent
from unrolled.model import Model
from unrolled.progress import Silent, Watcher
from unrolled.storage import make_folder, write_yaml
from unrolled.vocabulary import Vocabulary, build_vocabulary

__all__ = ["learning_rate", "prepare_config", "train"]

_CHANGEABLE = ("training.epochs", "training.steps", "training.patience", "training.log_every", "training.save_every",
               "training.keep_memory", "training.init_from")  # fmt: skip
_SAVE_SECONDS = 600.0  # a checkpoint at least so often, whatever `save_every` and `valid_every` say

Settings = Mapping[str, Any]


def train(
    texts: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    config: str | Path | Settings | None = None,
    valid: str | Path | Sequence[str | Path] | None = None,
    resume: bool = False,
    force: bool = False,
    watcher: Watcher | None = None,
    **settings: Any,
) -> Model:
    """Train a language model on a text and leave it in a model folder; the model with the best weights.

    Args:
        texts: files (`.txt`, `.txt.gz`, `.txt.xz`) or folders of them.
        out: the model folder to write.
        config: a YAML file or a dictionary of settings, as in `unrolled.config`.
        valid: files to validate on; the last `data.valid_fraction` of the text if None.
        resume: go on from the last checkpoint in `out`, bit for bit as if never interrupted. Settings come from
            the folder; those given must agree, but for `epochs`, `steps` and `patience`, which may change.
        force: replace a model that `out` holds.
        watcher: where progress is shown (`unrolled.progress.open_bar()`); nowhere if None.
        settings: single settings by their plain names: `hidden=256, epochs=3`.

    Raises:
        ConfigError: a setting is unknown, out of range or does not fit the others.
        DataError: the text cannot be used: empty, not UTF-8, too short for one window.
        StorageError: `out` holds a model, or lacks one to resume, or cannot be written.
        TrainingError: a loss or gradient is not finite; the text or settings differ at resume.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once a checkpoint is written.
    """
    watcher = watcher or Silent()
    out = Path(out)
    config_ = prepare_config(out, config, resume=resume, **settings)
    if out.exists() and not out.is_dir():
        raise StorageError(f"{out} is a file, expected a folder to write the model to")
    if not resume and not force and holds_model(out):
        raise StorageError(
            f"{out} already holds a model: go on with it (--resume), replace it (--force) or choose another --out"
        )
    if config_.training.keep_memory:
        keep_freed_memory()
    device = _device(config_.training.device)
    held_out = None if valid is None else _paths(valid)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            return _train(_paths(texts), held_out, out, config_, resume, device, watcher)
    finally:
        watcher.stop()  # an error's message must not land in a bar


def prepare_config(
    out: str | Path, config: str | Path | Settings | None = None, *, resume: bool = False, **settings: Any
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
    for name, value in settings.items():
        section, key = flag_key(name).split(".")
        layers.append({section: {key: value}})
    if not resume:
        given = resolve(*layers, cells=cell_names())
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


def _config_from(given: Config, layers: list[Settings]) -> Config:
    """The config of a training that starts from another model: its ends and core, unless they contradict."""
    source = Path(str(given.training.init_from))
    theirs = to_dict(read_config(source))
    ends = {section: theirs[section] for section in ("input", "core", "output")}
    wanted = resolve(ends, *layers)
    own = {"core.dropout", "core.locked", "core.recurrent_dropout", "core.init", "core.forget_bias", "core.chrono",
           "input.max_vocabulary", "input.min_count"}  # fmt: skip
    base = resolve({**to_dict(wanted), **ends})
    changed = [line for line in difference(base, wanted) if line.split(":")[0] not in own]
    if changed:
        raise ConfigError(f"training.init_from: {source} is another model than the one asked for: {'; '.join(changed)}")
    return wanted


def _paths(texts: str | Path | Sequence[str | Path]) -> list[str | Path]:
    return [texts] if isinstance(texts, str | Path) else list(texts)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("training.device: cuda is not available here: use cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _train(
    texts: list[str | Path],
    valid: list[str | Path] | None,
    out: Path,
    config: Config,
    resume: bool,
    device: torch.device,
    watcher: Watcher,
) -> Model:
    steps = checkpoint_steps(out) if resume else []
    init_from = config.training.init_from
    if steps:
        vocabulary = read_vocabulary(out)
    elif init_from is not None:
        vocabulary = read_vocabulary(Path(init_from))
    else:
        vocabulary = _build_vocabulary(texts, config, watcher)
    scratch = out.parent
    make_folder(scratch)
    text = _encode(texts, vocabulary, config, scratch, watcher)
    if valid is None:
        text, held_out = split_text(text, config.data.valid_fraction)
    else:
        held_out = _encode(valid, vocabulary, config, scratch, watcher)

    if len(held_out) <= len(held_out.starts):
        raise DataError(
            f"the validation text has {len(held_out)} symbols, expected at least two in one document, one to read and "
            "one to predict: give more text, a larger data.valid_fraction, or --valid"
        )

    training = config.training
    torch.manual_seed(training.seed)
    model = Model(config, vocabulary)
    if init_from is not None and not steps:
        load_weights(model, weights_of(load(init_from)), init_from)
    model.to(device)
    run = _Run(model, config, out, text, held_out, device, watcher)
    if steps:
        run.restore(read_checkpoint(out, steps[-1]))
        prune_checkpoints(out, {run.at.step, run.at.best_step})  # whoever was killed may not have come to it
        write_yaml(out / "config.yaml", "config", to_dict(config))
    else:
        begin_folder(out, config, vocabulary, overwrite=True)
        run.checkpoint()
    watcher.say(str(model.form))
    watcher.say(_describe(model, text, held_out, run))
    if steps:
        watcher.say(f"going on at update {run.at.step:,}")
    run.go()
    return load(out)


def _build_vocabulary(texts: list[str | Path], config: Config, watcher: Watcher) -> Vocabulary:
    settings, paths = config.input, find_texts(texts)
    total = sum(path.stat().st_size for path in paths)

    blank = True

    def chunks() -> Iterator[str]:
        nonlocal blank
        done = 0
        for path in paths:
            for chunk in read_text(path, errors=config.data.errors):
                blank = blank and chunk.isspace()
                yield chunk
            done += path.stat().st_size
            watcher.update(done)
        if blank:
            names = f"{', '.join(map(str, paths[:3]))}{', ...' if paths[3:] else ''}"
            raise DataError(f"there is no text in {names}, or nothing but white space")

    watcher.start("counting symbols", total)
    vocabulary = build_vocabulary(
        settings.unit, chunks(), max_size=settings.max_vocabulary, min_count=settings.min_count
    )
    watcher.stop()
    return vocabulary


def _encode(
    paths: list[str | Path], vocabulary: Vocabulary, config: Config, scratch: Path, watcher: Watcher
) -> EncodedText:
    watcher.start("encoding", sum(path.stat().st_size for path in find_texts(paths)))
    text = encode_texts(
        paths,
        vocabulary,
        documents=config.data.documents,
        errors=config.data.errors,
        directory=scratch,
        progress=watcher.update,
    )
    watcher.stop()
    return text


def _describe(model: Model, text: EncodedText, valid: EncodedText, run: _Run) -> str:
    weights = sum(t.numel() for t in weights_of(model).values())
    symbols = {"char": "characters", "word": "words", "subword": "subwords"}.get(model.vocabulary.unit, "jamo")
    not_known, unseen = (f" ({part.unknown:,} of them unknown)" if part.unknown else "" for part in (text, valid))
    return (
        f"{len(text):,} {symbols} to train on{not_known}, {len(valid):,} to validate{unseen}; vocabulary "
        f"{len(model.vocabulary):,}; {weights:,} weights; {run.total:,} updates, {len(run.lanes):,} an epoch"
    )


@dataclass
class _Position:
    """Where a training stands; what a checkpoint keeps as JSON."""

    step: int = 0  # updates done
    epoch: int = 0
    window: int = 0  # next window of the epoch
    best: float | None = None  # nats per character
    best_step: int = 0
    bad: int = 0  # validations since the best
    plateau_bad: int = 0
    plateau_scale: float = 1.0
    seconds: float = 0.0
    nats: float = 0.0  # summed loss since the last line of the log
    units: int = 0  # symbols it is of


class _Run:
    """One training in progress: the values that change, and what is done with them."""

    def __init__(
        self,
        model: Model,
        config: Config,
        out: Path,
        text: EncodedText,
        valid: EncodedText,
        device: torch.device,
        watcher: Watcher,
    ) -> None:
        settings = config.training
        self.model, self.settings, self.out, self.device, self.watcher = model, settings, out, device, watcher
        self.text, self.valid = text, valid
        # One rank today. Several would each take their own lanes of the text and keep their own carry.
        self.lanes = Lanes(
            text,
            settings.batch_size,
            None if settings.window == "full" else settings.window,
            settings.stride,
            rank=0,
            ranks=1,
        )
        self.total = settings.epochs * len(self.lanes)
        if settings.steps is not None:
            self.total = min(self.total, settings.steps)
        self.parameters = dict(model.named_parameters())
        self.optimizer = _optimizer(self.parameters, settings)
        self.average = (
            {name: p.detach().clone() for name, p in self.parameters.items()} if settings.average > 0 else None
        )
        self.carry: Any = model.begin(batch=settings.batch_size)
        self.at = _Position()
        self.metrics = MetricsLog(out / "metrics.jsonl")
        self.chars_per_unit = text.characters / len(text)
        self.saved = time.monotonic()

    # -------------------------------------------------------------------------------------------- the loop

    def go(self) -> None:
        """Train to the end; a checkpoint at the end, and when stopped."""
        at, settings, watcher = self.at, self.settings, self.watcher
        if at.step >= self.total:
            watcher.say(f"nothing left to do: {at.step:,} updates are done; give more --epochs to go on")
            return
        if self._out_of_patience():
            watcher.say(f"nothing left to do: no better for {at.bad} validations; give a larger --patience to go on")
            return
        self.metrics.open(at.step)
        self.model.train()
        watcher.start("training", self.total, at.step)
        recent = Recent(at, self.chars_per_unit)
        last = time.monotonic()
        with _stop_requests() as stop_requested:
            try:
                while at.step < self.total and not self._out_of_patience():
                    loss, units, norm, rate = self._update()
                    recent.add(loss, units)
                    now = time.monotonic()
                    at.seconds += now - last
                    last = now
                    watcher.update(at.step, recent.note())
                    if at.step % settings.log_every == 0 or at.step == self.total:
                        self.metrics.write({"kind": "train", **self._where(), **recent.pop(), "lr": rate, "norm": norm})
                    if self._validation_due():
                        self._validate()
                        self.checkpoint()
                    elif self._save_due():
                        self.checkpoint()
                    if stop_requested():
                        self._stop()
            finally:
                watcher.stop()
                self.metrics.close()
        watcher.say(f"best: {at.best:.4f} nats per character at update {at.best_step:,}; kept in {self.out}")

    def _update(self) -> tuple[float, int, float, float]:
        """One update: its mean loss in nats per symbol, how many symbols that was, gradient norm, learning rate."""
        at, settings, model = self.at, self.settings, self.model
        window = self.lanes.window(at.window)
        ids, targets = window.inputs.to(self.device), window.targets.to(self.device)
        targets[: window.warm] = IGNORE
        reset = None if window.reset is None else window.reset.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            # The next window starts `advance` steps further on: the state there is its carry. With stride = window
            # that is the end of this window; with stride < window the windows overlap.
            nats, carry = model.loss(ids, targets, self.carry, reset=reset, after=window.advance)
        units = window.counted
        mean = nats / max(units, 1)
        value = float(mean.detach())
        number = at.step + 1
        if not math.isfinite(value):
            raise TrainingError(
                f"update {number}: the loss is {value}; training stopped before it changed the weights. Lower --lr, "
                f"or set --clip; the last checkpoint is of update {max(checkpoint_steps(self.out), default=0)}"
            )
        self.optimizer.zero_grad(set_to_none=True)
        mean.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        total = torch.nn.utils.get_total_norm(gradients)
        norm = float(total)
        if not math.isfinite(norm):
            name = _first_not_finite(self.parameters)
            raise TrainingError(
                f"update {number}: the gradient of {name} is not finite; training stopped before it changed the "
                f"weights. Lower --lr, or shorten --window; the last checkpoint is of update "
                f"{max(checkpoint_steps(self.out), default=0)}"
            )
        if settings.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), settings.clip, total)
        rate = learning_rate(settings, at.step, self.total) * at.plateau_scale
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.average is not None:
            # The average forgets its start: early on it follows the weights closely.
            weight = 1 - min(settings.average, (1 + at.step) / (10 + at.step))
            torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.parameters.values()], weight)
        self.carry = map_state(lambda t: t.detach().clone(), carry)
        at.step, at.window = number, at.window + 1
        if at.window == len(self.lanes):
            at.epoch, at.window = at.epoch + 1, 0
            self.carry = model.begin(batch=settings.batch_size)
        return value, units, norm, rate

    # --------------------------------------------------------------------------------- validation and saving

    def _validation_due(self) -> bool:
        every = self.settings.valid_every
        return self.at.step == self.total or (self.at.window == 0 if every is None else self.at.step % every == 0)

    def _save_due(self) -> bool:
        every = self.settings.save_every
        return (every is not None and self.at.step % every == 0) or time.monotonic() - self.saved > _SAVE_SECONDS

    def _validate(self) -> None:
        at, settings = self.at, self.settings
        with self._averaged():
            lanes = max(1, min(settings.batch_size, len(self.valid) // 512))
            result = evaluate(self.model, self.valid, lanes=lanes)
        nats = result.nats_per_char
        if not math.isfinite(nats):
            raise TrainingError(f"update {at.step}: the validation loss is {nats}; lower --lr")
        better = at.best is None or nats < at.best
        figures = {key: value for key, value in result.to_dict().items() if key != "seconds"}
        self.metrics.write({"kind": "valid", **self._where(), **figures, "best": better})
        if better:
            at.best, at.best_step, at.bad, at.plateau_bad = nats, at.step, 0, 0
            self._write_weights()
        else:
            at.bad, at.plateau_bad = at.bad + 1, at.plateau_bad + 1
        if settings.schedule == "plateau" and at.plateau_bad > settings.plateau_patience:
            at.plateau_scale, at.plateau_bad = at.plateau_scale * settings.plateau_factor, 0
        epoch = round(at.epoch + at.window / len(self.lanes), 2)
        self.watcher.say(
            f"epoch {epoch:g}  update {at.step:,}  valid {nats:.4f} nats/char  "
            f"{result.bits_per_char:.4f} bits/char  perplexity {result.perplexity:.2f}"
            + ("" if better else f"  (best {at.best:.4f})")
        )
        if self._out_of_patience():
            self.watcher.say(f"stopped early: no better for {at.bad} validations")

    def _out_of_patience(self) -> bool:
        return self.settings.patience is not None and self.at.bad >= self.settings.patience

    def _write_weights(self) -> None:
        at = self.at
        about = {"step": str(at.step)} | ({} if at.best is None else {"valid_nats_per_char": f"{at.best:.6f}"})
        with self._averaged():
            write_weights(self.out, weights_of(self.model), self.model.vocabulary, about)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in the model's place, if there are any."""
        if self.average is None:
            yield
            return
        current = {name: p.detach().clone() for name, p in self.parameters.items()}
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.average[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(current[name])

    def _where(self) -> dict[str, Any]:
        at = self.at
        return {"step": at.step, "epoch": at.epoch + at.window / len(self.lanes), "seconds": round(at.seconds, 3)}

    def _stop(self) -> None:
        self.checkpoint()
        if self.at.best is None:
            self._write_weights()
        self.watcher.stop()
        self.watcher.say(
            f"stopped at update {self.at.step:,}, saved in {self.out}. Go on with the same command and --resume"
        )
        raise KeyboardInterrupt

    def checkpoint(self) -> None:
        """Save everything that decides the next update; the best and the last checkpoint stay."""
        self.metrics.flush()
        tensors = {f"weights.{name}": t for name, t in weights_of(self.model).items()}
        if self.average is not None:
            tensors |= {f"average.{name}": t for name, t in self.average.items()}
        for name, p in self.parameters.items():
            tensors |= {f"optimizer.{name}.{key}": t for key, t in self.optimizer.state[p].items() if t is not None}
        tensors |= {f"carry.{i}": t for i, t in enumerate(_flatten(self.carry))}
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        content = {
            "position": asdict(self.at),
            "text": self.text.fingerprint,
            "valid": self.valid.fingerprint,
            "vocabulary": fingerprint(self.model.vocabulary),
            "torch": torch.__version__,
        }
        write_checkpoint(self.out, Checkpoint(self.at.step, tensors, content), keep={self.at.best_step})
        self.saved = time.monotonic()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to the moment of a checkpoint.

        Raises:
            TrainingError: it was made on another text.
            StorageError: it does not fit this model.
        """
        content, tensors = checkpoint.content, checkpoint.tensors
        for key, text, what in (("text", self.text, "training"), ("valid", self.valid, "validation")):
            if content[key] != text.fingerprint:
                raise TrainingError(
                    f"the {what} text is not the one that {self.out} was trained with (its sha256 begins "
                    f"{text.fingerprint[:12]}, expected {content[key][:12]}): give the same files, or start anew in "
                    "another folder"
                )
        source = f"{self.out}: checkpoint {checkpoint.step}"
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "average": {}, "optimizer": {}, "carry": {}, "random": {}}
        for name, tensor in tensors.items():
            part, rest = name.split(".", 1)
            parts[part][rest] = tensor
        carry = {str(i): t for i, t in enumerate(_flatten(self.carry))}
        if content["vocabulary"] != fingerprint(self.model.vocabulary) or any(
            {name: t.shape for name, t in parts[part].items()} != {name: t.shape for name, t in expected.items()}
            for part, expected in (("average", self.average or {}), ("carry", carry))
        ):
            raise StorageError(
                f"{source} is another model's: its vocabulary, batch size or layers are not those of the config and "
                "vocabulary beside it; put the original folder back"
            )
        load_weights(self.model, parts["weights"], source)
        if self.average is not None:
            self.average = {name: parts["average"][name].to(self.device) for name in self.average}
        for name, tensor in parts["optimizer"].items():
            parameter, key = name.rsplit(".", 1)
            place = "cpu" if key == "step" and self.device.type == "cpu" else self.device
            self.optimizer.state[self.parameters[parameter]][key] = tensor.to(place)
        saved = iter(parts["carry"][str(i)] for i in range(len(parts["carry"])))
        self.carry = map_state(lambda t: next(saved).to(self.device), self.carry)
        torch.set_rng_state(parts["random"]["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(parts["random"]["cuda"], self.device)
        self.at = _Position(**content["position"])


def _flatten(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else [t for part in state for t in _flatten(part)]


def _first_not_finite(parameters: Mapping[str, torch.nn.Parameter]) -> str:
    for name, p in parameters.items():
        if p.grad is not None and not bool(torch.isfinite(p.grad).all()):
            return name
    return "all parameters together"  # each is finite, the norm of all overflows


def _optimizer(parameters: Mapping[str, torch.nn.Parameter], settings: TrainingConfig) -> torch.optim.Optimizer:
    # Weight decay pulls matrices towards zero; a bias has no scale to keep small.
    groups = [
        {"params": [p for p in parameters.values() if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)


def learning_rate(settings: TrainingConfig, step: int, total: int) -> float:
    """The learning rate of update `step` (from 0) of `total`: linear warm-up, then constant or half a cosine down
    to `min_lr_ratio` of it."""
    rate: float = settings.lr
    if step < settings.warmup:
        return rate * (step + 1) / settings.warmup
    if settings.schedule != "cosine":
        return rate
    share = (step - settings.warmup) / max(total - settings.warmup, 1)
    low = settings.min_lr_ratio
    return rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C or SIGTERM only leaves word (an update must not be cut in two); the second one acts."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
