"""The training loop of the fine-tuned kinds.

One loop for all of them: AdamW steps with a learning rate that rises and falls, validation at
intervals, stopping early, the best weights kept, and checkpoints from which a killed training goes
on to the same weights. A kind says what is learnt (`Learner`) and how it goes (`Course`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routellm.embeddings.base import Progress
from routellm.errors import TrainingError
from routellm.routers.checkpoint import Checkpoint, copied, resumable, resume
from routellm.routers.several_devices import Group

log = logging.getLogger(__name__)

Rows = NDArray[np.int64]

_APART = 1_000_003  # between the seeds of processes: none draws another one's dropout
WINDOW = 32  # batches among which examples of like length are put together

# --- what a training is --------------------------------------------------------------------------


@dataclass(frozen=True)
class Learner:
    """What is learnt.

    Attributes
    ----------
    module : torch.nn.Module
        Dropout in it is on while training and off in validation.
    parameters : mapping of str to torch.nn.Parameter
        What is trained, by name; in float32.
    optimizer : torch.optim.Optimizer
        Over these parameters.
    epoch : callable
        From a generator to an epoch's steps, each a list of passes: rows that are computed at
        once. Their gradients add up to the step's.
    loss : callable
        From rows to the sum of their losses, a tensor.
    validate : callable
        Returns the validation loss.
    """

    module: Any
    parameters: Mapping[str, Any]
    optimizer: Any
    epoch: Callable[[np.random.Generator], list[list[Rows]]]
    loss: Callable[[Rows], Any]
    validate: Callable[[], float]


@dataclass(frozen=True)
class Course:
    """How a training goes. A step is the optimizer's.

    Attributes
    ----------
    kind, setting : str
        Whose training it is, and where its options are: errors name both.
    seed : int
        What order and dropout follow from, with the step.
    steps, steps_an_epoch : int
        Steps at most, and in a pass over the examples.
    learning_rate : float
        The highest.
    rise, fall : int
        Steps in which the learning rate goes up to it, and down to nothing at the end.
    clip_norm : float
        Largest norm of a gradient.
    evaluate_every, checkpoint_every : int
        Steps between validations, and between checkpoints; a validation leaves one too.
    patience : int
        Validations without a gain before it stops early.
    """

    kind: str
    setting: str
    seed: int
    steps: int
    steps_an_epoch: int
    learning_rate: float
    rise: int
    fall: int
    clip_norm: float
    evaluate_every: int
    checkpoint_every: int
    patience: int

    def rate(self, step: int) -> float:
        """Return the learning rate at a step: up in a line, then down in one."""
        share = min(1.0, (step + 1) / self.rise, (self.steps - step) / self.fall)
        return self.learning_rate * share

    def diverged(self, step: int, what: str, value: float) -> TrainingError:
        return TrainingError(
            f"{self.kind} diverged in step {step}: the {what} loss is {value}; lower "
            f"`{self.setting}.learning_rate`, or check the weights of the examples"
        )


@dataclass(frozen=True)
class Training:
    """What a training came to: steps done, the step of the weights kept, losses, and time."""

    steps: int
    best_step: int
    validation_loss: float
    history: dict[str, list[float]]
    seconds: float


# --- the loop ------------------------------------------------------------------------------------


def finetune(
    learner: Learner,
    course: Course,
    run: str,
    *,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Training:
    """Train, and leave the weights that had the lowest validation loss.

    Parameters
    ----------
    run : str
        Digest of all that the weights follow from (`fingerprint`): a checkpoint of another run is
        left aside.
    checkpoint : Path, optional
        Folder in which a killed training finds where it stood.
    progress : callable, optional
        Called after each step, when its checkpoint is on disk.

    Raises
    ------
    TrainingError
        If a loss is not finite, or a CUDA device has no memory for a single example.
    """
    import torch

    started = time.monotonic()
    together = Group.here()  # of several processes, where several devices share the training
    first = together is None or together.rank == 0
    module, parameters, optimizer = learner.module, learner.parameters, learner.optimizer
    history: dict[str, list[float]] = {"train_loss": [], "validation_loss": []}
    losses = history["validation_loss"]
    best: dict[str, Any] = {}
    done, total, earlier_s = 0, 0.0, 0.0  # total of the losses since the last validation
    most = 0  # rows that a pass may have, once a device had too little memory; 0: any
    if checkpoint and (saved := Checkpoint.read(checkpoint, run)):
        done, history = saved.step, saved.history
        losses = history["validation_loss"]
        best = resume(saved.tensors, parameters, optimizer)
        total, earlier_s = (saved.tensors[name].item() for name in ("total", "elapsed_s"))
        if "pass_rows" in saved.tensors:  # a run that goes on draws the same dropout
            most = int(saved.tensors["pass_rows"].item())

    steps: list[list[Rows]] = []
    while done < course.steps and since_best(losses) < course.patience:
        # order and dropout follow from seed and step: a resumed run draws the same
        epoch, at = divmod(done, course.steps_an_epoch)
        if at == 0 or not steps:
            steps = learner.epoch(np.random.default_rng([course.seed, epoch]))
        for group in optimizer.param_groups:
            group["lr"] = course.rate(done)

        module.train()
        value, most = _gradient_that_fits(learner, steps[at], most, course, done, together)
        if together:
            value = together.add(parameters, value)
        done, total = done + 1, total + value
        if not np.isfinite(value):
            raise course.diverged(done, "training", value)
        torch.nn.utils.clip_grad_norm_(parameters.values(), course.clip_norm)
        optimizer.step()

        evaluates = done % course.evaluate_every == 0 or done == course.steps
        if evaluates:
            module.eval()
            validate = learner.validate
            validation = together.from_first(validate) if together else validate()
            if not np.isfinite(validation):
                raise course.diverged(done, "validation", validation)
            history["train_loss"].append(total / ((done - 1) % course.evaluate_every + 1))
            losses.append(validation)
            total = 0.0
            if since_best(losses) == 0:
                best = copied(parameters, "")
        if checkpoint and first and (evaluates or done % course.checkpoint_every == 0):
            spent_s = earlier_s + time.monotonic() - started
            tensors = resumable(parameters, best, optimizer)
            tensors["total"] = torch.tensor(total, dtype=torch.float64)
            tensors["elapsed_s"] = torch.tensor(spent_s, dtype=torch.float64)
            tensors["pass_rows"] = torch.tensor(most)
            Checkpoint(run, done, history, tensors).write(checkpoint)
        if progress:
            progress(done, course.steps)

    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(best[name])
    module.eval()
    if progress:
        progress(course.steps, course.steps)
    chosen = int(np.argmin(losses))
    best_step = min((chosen + 1) * course.evaluate_every, course.steps)
    spent_s = earlier_s + time.monotonic() - started
    return Training(done, best_step, losses[chosen], history, spent_s)


def _gradient_that_fits(
    learner: Learner, passes: list[Rows], most: int, course: Course, step: int, group: Group | None
) -> tuple[float, int]:
    """Do as `_gradient`, in as small passes as the CUDA device's memory asks for.

    In a group, of this process's part of the rows.

    Returns the loss, and how many rows a pass may have from now on (0: any). The gradients of a
    step's passes add up to the same, however it is cut.
    """
    import torch

    examples, seed = float(sum(map(len, passes))), course.seed + step
    if group:
        seed += _APART * group.rank
        shared = [rows[group.rank :: group.size] for rows in passes]
        if any(map(len, shared)):
            passes = [rows for rows in shared if len(rows)]
        else:  # fewer rows than processes: a gradient of nothing, in the same shape as the others'
            passes, examples = [passes[0][:1]], math.inf
    while True:
        cut = _cut(passes, most)
        torch.manual_seed(seed)
        try:
            return _gradient(learner, cut, examples), most
        except torch.OutOfMemoryError as error:
            rows = max(map(len, cut))
            if rows == 1:
                raise TrainingError(
                    f"the CUDA device has no memory for one example of {course.kind}: lower "
                    f"`{course.setting}.max_length`, name a smaller model, or end "
                    "what else is on the device"
                ) from error
            most = -(-rows // 2)
        # what the failed pass held is free from here on
        log.warning(
            "step %d of %s: the CUDA device has no memory for %d examples at once; from now on "
            "they are computed %d at once, and each step is the same as before",
            step + 1, course.kind, rows, most,
        )  # fmt: skip
        learner.optimizer.zero_grad()
        torch.cuda.empty_cache()


def _cut(passes: list[Rows], most: int) -> list[Rows]:
    if not most:
        return passes
    return [rows[i : i + most] for rows in passes for i in range(0, len(rows), most)]


def _gradient(learner: Learner, passes: list[Rows], examples: float) -> float:
    """Leave the gradient of what these rows add to a step's mean loss, and return what they add.

    `examples` is how many rows the step has.
    """
    learner.optimizer.zero_grad()
    value: Any = 0.0
    for rows in passes:
        loss = learner.loss(rows) / examples
        loss.backward()
        value = value + loss.detach().double()
    return float(value)  # a GPU is waited for here, once a step


def since_best(losses: Sequence[float]) -> int:
    """Return how many validations have passed since the one with the lowest loss."""
    return len(losses) - 1 - int(np.argmin(losses)) if losses else 0


def epoch_batches(lengths: NDArray[np.int64], size: int, rng: np.random.Generator) -> list[Rows]:
    """Return an epoch's batches of rows, in random order, alike in length within a batch.

    Rows are shuffled and cut into windows of `WINDOW` batches; only within these are they sorted,
    so that a batch has little padding and still meets other rows in each epoch.
    """
    order = rng.permutation(len(lengths))
    batches: list[Rows] = []
    for start in range(0, len(order), size * WINDOW):
        window = order[start : start + size * WINDOW]
        window = window[np.argsort(lengths[window], kind="stable")]
        batches += [window[i : i + size] for i in range(0, len(window), size)]
    return [batches[i] for i in rng.permutation(len(batches))]
