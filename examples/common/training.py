"""A training loop whose runs can be interrupted at any step and resumed to exactly the same result."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from fused_elbo import ELBO, gaussian_kl

from . import ranks
from .checkpoint import save_checkpoint
from .data import Splits, to_unit

COLUMNS = ("loss", "distortion", "rate", "sigma")
EVAL_SEED = 0  # of the latent noise in evaluation: the same in every epoch, so that its curves are comparable
SIGMA_LR = 10.0  # a learned log sigma has a few units to travel at about one learning rate per Adam step


class TrainingError(RuntimeError):
    """Training cannot go on. The message is one line, meant for the user."""


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of raising, so that a step is never cut in half; a second Ctrl-C raises at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield stop
        return

    def on_interrupt(signum: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


def warmup_cosine(total: int) -> Callable[[int], float]:
    """Factor of the learning rate: linear over the first tenth of `total` steps, then a half cosine down to 0."""
    warmup = max(1, total // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return factor


class Trainer:
    """AdamW under `warmup_cosine`, on an objective that maps a batch of images (or other data) to its ELBO.

    All state of a run is in `state_dict()`: the order of an epoch's batches is a function of (seed, epoch), so the
    position inside the epoch, the weights and the random generators' states determine the rest of the run.

    `probe` measures the objective after each epoch, for the history; it must leave the global random state alone.

    Under torchrun each process takes its part of every batch; all evaluate, and the first one writes.
    """

    def __init__(
        self,
        objective: nn.Module,
        images: Splits,
        *,
        epochs: int,
        batch_size: int,
        lr: float,
        seed: int,
        device: torch.device,
        checkpoint: Path,
        settings: dict[str, Any],
        weight_decay: float = 0.01,
        compile: bool = False,
        probe: Callable[[nn.Module], dict[str, float]] | None = None,
    ) -> None:
        self.objective = objective.to(device)
        self.forward: Any = torch.compile(self.objective) if compile else self.objective
        if ranks.group() is not None:
            self.forward = DistributedDataParallel(self.forward)
        self.images, self.device, self.seed = images, device, seed
        self.epochs, self.batch_size = epochs, min(batch_size, len(images.train))
        self.checkpoint, self.settings, self.probe = checkpoint, settings, probe

        log_sigmas = [p for name, p in objective.named_parameters() if name.endswith("log_sigma")]
        weights = [p for name, p in objective.named_parameters() if not name.endswith("log_sigma")]
        groups = [{"params": weights, "lr": lr}]
        if log_sigmas:
            groups.append({"params": log_sigmas, "lr": SIGMA_LR * lr, "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)
        self.steps_per_epoch = len(images.train) // self.batch_size  # whole batches only: nothing is recompiled
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, warmup_cosine(epochs * self.steps_per_epoch))

        self.epoch = self.step = 0  # the next step to do
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.totals = torch.zeros(len(COLUMNS), device=device)  # this epoch's sums so far

    def fit(self, title: str = "") -> None:
        """Train to the last epoch; a checkpoint after each, and on Ctrl-C, which then raises KeyboardInterrupt."""
        total, done = self.epochs * self.steps_per_epoch, self.epoch * self.steps_per_epoch + self.step
        self.save()
        # The first call on a machine compiles the kernels, and says so: before the bar, which would stand still.
        gaussian_kl(*torch.zeros(2, 1, 1, device=self.device))
        # Where the bar is not redrawn in place (a log file) it is printed seldom.
        interval = 0.2 if sys.stderr.isatty() else 15.0
        bar = tqdm(
            desc=title, total=total, initial=done, unit="step", mininterval=interval, disable=not ranks.is_first()
        )
        with deferred_interrupt() as stop, bar:
            while self.epoch < self.epochs:
                order = self.epoch_order()
                while self.step < self.steps_per_epoch:
                    started = time.perf_counter()
                    elbo = self.train_step(order[self.step])
                    self.seconds += time.perf_counter() - started
                    self.step += 1
                    bar.update()
                    if self.step % 10 == 0:  # reading the numbers waits for the device
                        bar.set_postfix(self.progress(elbo), refresh=False)
                    if ranks.agree(stop.is_set()):
                        self.save()
                        raise KeyboardInterrupt
                self.end_epoch()
            if ranks.agree(stop.is_set()):
                raise KeyboardInterrupt

    def epoch_order(self) -> Tensor:
        """Indices of this epoch's training images, [steps, batch]."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        order = torch.randperm(len(self.images.train), generator=generator)
        return order[: self.steps_per_epoch * self.batch_size].view(self.steps_per_epoch, self.batch_size)

    def batch(self, images: Tensor) -> Tensor:
        return to_unit(images.to(self.device, non_blocking=True))

    def train_step(self, index: Tensor) -> ELBO:
        self.objective.train()
        self.optimizer.zero_grad()
        elbo = self.gradients(self.batch(self.images.train[ranks.part(index)]))
        self.optimizer.step()
        self.scheduler.step()
        self.totals += torch.stack(elbo).detach()
        return elbo

    def gradients(self, x: Tensor) -> ELBO:
        """Leaves the gradients of a batch in the parameters."""
        elbo: ELBO = self.forward(x)
        elbo.loss.backward()
        return elbo

    def progress(self, elbo: ELBO) -> dict[str, str]:
        return {"epoch": f"{self.epoch + 1}/{self.epochs}", "distortion": f"{elbo.distortion.item():.1f}",
                "rate": f"{elbo.rate.item():.2f}", "sigma": f"{elbo.sigma.item():.4f}"}  # fmt: skip

    def end_epoch(self) -> None:
        started = time.perf_counter()
        self.totals = ranks.mean(self.totals)
        train = dict(zip(COLUMNS, (self.totals / self.steps_per_epoch).tolist(), strict=True))
        if not torch.isfinite(self.totals).all():
            raise TrainingError(
                f"training diverged in epoch {self.epoch + 1} (loss is {train['loss']}): try a smaller --lr; "
                f"the checkpoint of the epoch before is intact"
            )
        entry = {"epoch": self.epoch + 1, "train": train, "val": self.evaluate(self.images.val)}
        if self.probe is not None:
            entry["probe"] = self.probe(self.objective)
        self.history.append(entry)
        self.epoch, self.step = self.epoch + 1, 0
        self.totals.zero_()
        self.seconds += time.perf_counter() - started
        self.save()

    @torch.no_grad()
    def evaluate(self, images: Tensor) -> dict[str, float]:
        """Mean ELBO over a split, in evaluation mode, without touching the training's random numbers."""
        self.objective.eval()
        totals = torch.zeros(len(COLUMNS), device=self.device)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(EVAL_SEED)
            for chunk in images.split(self.batch_size):
                totals += len(chunk) * torch.stack(self.objective(self.batch(chunk)))
        return dict(zip(COLUMNS, (totals / len(images)).tolist(), strict=True))

    def save(self) -> None:
        state = {"settings": self.settings, "trainer": self.state_dict()}
        if ranks.is_first():
            save_checkpoint(self.checkpoint, state)

    def state_dict(self) -> dict[str, Any]:
        """The same on all ranks, which make it together."""
        return {
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "history": self.history,
            "seconds": self.seconds,
            "totals": ranks.gather(self.totals),
            "rng": ranks.gather(torch.get_rng_state()),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.step, self.history = state["epoch"], state["step"], state["history"]
        self.seconds = state["seconds"]
        self.totals.copy_(state["totals"][ranks.number()])
        # A copy, for set_rng_state reads from the start of the storage, whatever is a row of it (torch 2.13).
        torch.set_rng_state(state["rng"][ranks.number()].clone())
        if self.device.type == "cuda" and state["cuda_rng"]:
            torch.cuda.set_rng_state_all(state["cuda_rng"])
