"""The loop: updates, validation, checkpoints, stop and resume, whatever is trained on.

One update of a `Course` (`unrolled.training.courses`):

    loss = mean over what the course gives; its gradient, the norm clipped; optimiser step; average of the weights

Everything that decides the next update is in a checkpoint (weights, optimiser, averages, carry, position, random
state), so an interrupted training goes on bit for bit as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from unrolled.checkpoints import (
    Checkpoint,
    checkpoint_steps,
    fingerprint,
    load_weights,
    weights_of,
    write_checkpoint,
    write_weights,
)
from unrolled.config import TrainingConfig
from unrolled.errors import StorageError, TrainingError
from unrolled.metrics import MetricsLog, Recent
from unrolled.model import Model
from unrolled.progress import Watcher
from unrolled.training.courses import Course

__all__ = ["Training", "learning_rate"]

_SAVE_SECONDS = 600.0  # a checkpoint at least so often, whatever `save_every` and `valid_every` say


@dataclass
class _Position:
    """Where a training stands; what a checkpoint keeps as JSON."""

    step: int = 0  # updates done
    epoch: int = 0
    window: int = 0  # next window or batch of the epoch
    best: float | None = None  # the figure by which a course judges
    best_step: int = 0
    bad: int = 0  # validations since the best
    plateau_bad: int = 0
    plateau_scale: float = 1.0
    seconds: float = 0.0
    nats: float = 0.0  # summed loss since the last line of the log
    units: int = 0  # targets it is of


class Training:
    """One training in progress: the values that change, and what is done with them."""

    def __init__(
        self, model: Model, settings: TrainingConfig, out: Path, course: Course, device: torch.device, watcher: Watcher
    ) -> None:
        self.model, self.settings, self.out, self.device, self.watcher = model, settings, out, device, watcher
        self.course = course
        self.total, most = 0, math.inf if settings.steps is None else settings.steps
        for epoch in range(settings.epochs):
            if self.total >= most:
                break  # to count an epoch may mean to put it in order
            self.total += course.updates(epoch)
        self.total = int(min(self.total, most))
        self.parameters = dict(model.named_parameters())
        self.optimizer = _optimizer(self.parameters, settings)
        self.average = (
            {name: p.detach().clone() for name, p in self.parameters.items()} if settings.average > 0 else None
        )
        self.at = _Position()
        self.metrics = MetricsLog(out / "metrics.jsonl")
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
        recent = Recent(at, self.course.unit, self.course.chars_per_unit)
        last = time.monotonic()
        with _stop_requests() as stop_requested:
            try:
                while at.step < self.total and not self._out_of_patience():
                    began = time.monotonic()
                    loss, units, norm, rate = self._update()
                    now = time.monotonic()
                    recent.add(loss, units, now - began)
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
        watcher.say(f"best: {self.course.words(at.best)} at update {at.best_step:,}; kept in {self.out}")

    def _update(self) -> tuple[float, int, float, float]:
        """One update: its mean loss, how many targets it is of, gradient norm, learning rate."""
        at, settings = self.at, self.settings
        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            nats, units = self.course.loss(at.epoch, at.window)
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
        at.step, at.window = number, at.window + 1
        if at.window == self.course.updates(at.epoch):
            at.epoch, at.window = at.epoch + 1, 0
            self.course.begin_epoch()
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
            found = self.course.judge()
        if not math.isfinite(found.value):
            raise TrainingError(f"update {at.step}: the validation loss is {found.value}; lower --lr")
        better = at.best is None or (found.value < at.best if self.course.best[1] == "min" else found.value > at.best)
        self.metrics.write({"kind": "valid", **self._where(), **found.figures, "best": better})
        if better:
            at.best, at.best_step, at.bad, at.plateau_bad = found.value, at.step, 0, 0
            self._write_weights()
        else:
            at.bad, at.plateau_bad = at.bad + 1, at.plateau_bad + 1
        if settings.schedule == "plateau" and at.plateau_bad > settings.plateau_patience:
            at.plateau_scale, at.plateau_bad = at.plateau_scale * settings.plateau_factor, 0
        self.watcher.say(
            f"epoch {round(self._epochs(), 2):g}  update {at.step:,}  valid {found.note}"
            + ("" if better else f"  (best {at.best:.4f})")
        )
        if self._out_of_patience():
            self.watcher.say(f"stopped early: no better for {at.bad} validations")

    def _out_of_patience(self) -> bool:
        return self.settings.patience is not None and self.at.bad >= self.settings.patience

    def _write_weights(self) -> None:
        at = self.at
        about = {"step": str(at.step)} | ({} if at.best is None else {f"valid_{self.course.best[0]}": f"{at.best:.6f}"})
        with self._averaged():
            write_weights(self.out, weights_of(self.model), self.model.ends, about)

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
        return {"step": at.step, "epoch": self._epochs(), "seconds": round(at.seconds, 3)}

    def _epochs(self) -> float:
        at = self.at
        return at.epoch + at.window / self.course.updates(at.epoch)

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
        tensors |= {f"carry.{i}": t for i, t in enumerate(self.course.carry)}
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        content = {
            "position": asdict(self.at),
            **self.course.fingerprints,
            "vocabulary": fingerprint(self.model.ends),
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
        for key, what in (("text", "training"), ("valid", "validation")):
            given = self.course.fingerprints[key]
            if content[key] != given:
                raise TrainingError(
                    f"the {what} text is not the one that {self.out} was trained with (its sha256 begins {given[:12]}, "
                    f"expected {content[key][:12]}): give the same files, or start anew in another folder"
                )
        source = f"{self.out}: checkpoint {checkpoint.step}"
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "average": {}, "optimizer": {}, "carry": {}, "random": {}}
        for name, tensor in tensors.items():
            part, rest = name.split(".", 1)
            parts[part][rest] = tensor
        carry = {str(i): t for i, t in enumerate(self.course.carry)}
        if content["vocabulary"] != fingerprint(self.model.ends) or any(
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
        self.course.carry = [parts["carry"][str(i)].to(self.device) for i in range(len(parts["carry"]))]
        torch.set_rng_state(parts["random"]["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(parts["random"]["cuda"], self.device)
        self.at = _Position(**content["position"])


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
