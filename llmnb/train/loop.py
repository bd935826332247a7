# Written by `make export` from notebooks/4_practice/13_loop.py: edit that file.

"""The training loop: a generator of steps."""

__all__ = [
    "Progress", "Step", "accumulate", "evaluate", "train", "train_step",
    "z_score",
]


# imports of loop
import math
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from llmnb.model.tensors import decaying
from llmnb.train.group import group_of, tree_of


# the gradient of an update
def accumulate(config, model, batches, step=0):
    """Leave the gradient of one update in model.grads; return its loss.

    Takes `config.micro_batches` batches from `batches`, whatever has a
    next_batch. The loss, a float, is the mean over all of them, and the
    gradient is that of this mean, in the order of `Tree`. In a group each
    process computes its share of the batches. Raises FloatingPointError,
    naming the step, at a loss that is not finite.

    Derived in chapter 4.13.
    """
    group, count = group_of(model), config.micro_batches
    mine, tree, losses = group.share(count), tree_of(model), []
    _skip(batches, mine.start)
    for k in mine:
        losses.append(model.forward(*batches.next_batch()))
        if not math.isfinite(losses[-1]):
            break
        _piece(model, tree, k, 1 / count)  # (4.13.2)
    _skip(batches, count - mine.stop)
    losses = sum(group.gather(losses), [])
    for loss in losses:
        _check_finite("loss", loss, step, config.rate(step))
    if _shares(model):
        model.exchange(tree.blocks, count)
    elif model.backend != "cuda":
        tree.whole()
    return sum(losses) / count


# a piece of it
def _piece(model, tree, k, share):
    """Compute the gradient of piece k, and add it to its neighbours."""
    if model.backend == "cuda" and not _shares(model):
        model.backward(add=k > 0, share=share)
        return
    tree.make_room()
    model.backward(share=share)
    tree.push(k, k + 1, tree.grads)


def _shares(model):
    """Whether its gradients are summed over a group (Part 6)."""
    return hasattr(model, "exchange")


def _skip(batches, count):
    """Pass over batches that others compute."""
    if count:
        batches.skip(count)


# finite or not
GENTLER = "try a lower learning rate or a longer warm-up"


def _check_finite(what, value, step=None, rate=0.0):
    """Raise unless a number is finite; without a step nothing is trained."""
    when = f" at step {step} (learning rate {rate:.3g}): {GENTLER}"
    if not math.isfinite(value):
        when = "" if step is None else when
        raise FloatingPointError(f"the {what} is {value}{when}")


# how far out a value is
def z_score(recent, value):
    """How many standard deviations `value` lies above the mean of `recent`.

    recent: a list of floats. 0 where they have no spread. A float.

    Derived in chapter 4.13.
    """
    spread = np.std(recent)
    return float((value - np.mean(recent)) / spread) if spread > 0 else 0.0


# where a run stands
@dataclass
class Progress:
    """Where a run stands, apart from its weights and its data.

    step: steps taken, which set the learning rate. updates: those that were
    not skipped, which AdamW counts. losses, norms: of the last
    `skip_window` steps. last_loss, best_loss: the latest training loss and
    the lowest validation loss, or None.

    Derived in chapter 4.13.
    """

    step: int = 0
    updates: int = 0
    losses: list = field(default_factory=list)
    norms: list = field(default_factory=list)
    last_loss: float | None = None
    best_loss: float | None = None


# does it stand out
def _stands_out(config, at, loss, norm):
    """Whether a limit is exceeded; notes the step's loss and its norm."""
    found, size = False, config.skip_window
    for recent, value, limit in (
        (at.losses, loss, config.skip_loss),
        (at.norms, norm, config.skip_norm),
    ):
        full = len(recent) == size
        found |= full and 0 < limit < z_score(recent, value)
        recent.append(value)
        del recent[:-size]
    return found


# validation
def evaluate(model, batches, count, step=None, rate=0.0):
    """Mean loss of a model over the first `count` batches; trains nothing.

    batches: a DataLoader, which is set back to its first batch. At most one
    epoch is read, by a group in parts. Returns nats a token, a float. Raises
    ValueError for a count below 1, and FloatingPointError when the loss is
    not finite, naming the step and the rate of a run.

    Derived in chapter 4.13.
    """
    if count < 1:
        raise ValueError(f"evaluate: count must be at least 1, got {count}")
    count = min(count, batches.batches_per_epoch)
    group = group_of(model)
    mine = group.share(count)
    batches.reset()
    _skip(batches, mine.start)
    losses = [model.forward(*batches.next_batch()) for _ in mine]
    loss = sum(sum(group.gather(losses), [])) / count
    _check_finite("validation loss", loss, step, rate)
    return loss


# what a step reports
class Step(NamedTuple):
    """What `train` reports about one step.

    step: updates made before it. loss: on the step's batch, before its
    update. val_loss: with the same weights, or None between validations.
    learning_rate, grad_norm (before clipping), tokens_per_second: of the
    step. skipped: 1 if the step made no update, else 0. In the last report,
    which follows the last update, only step and val_loss are given.

    Derived in chapter 4.13.
    """

    step: int
    loss: float | None
    val_loss: float | None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    skipped: int | None = None


# the loop
def train(config, model, batches, validation=None, at=None):
    """Train a GPT2 in place; yield a `Step` after each step, one at the end.

    config: a TrainConfig. batches: a DataLoader, read on from where it is.
    validation: None or a DataLoader whose first `config.eval_batches`
    batches are evaluated every `config.eval_every` steps and at the end.
    at: the `Progress` to go on from, changed in place; None for the start.
    Raises FloatingPointError when a loss or a gradient is not finite.

    Derived in chapter 4.13.
    """
    at = at or Progress()
    tokens = config.micro_batches * config.batch_size * config.seq_len
    while at.step < config.steps:
        step, val_loss = at.step, None
        if validation and step % config.eval_every == 0:
            val_loss = _validate(config, model, validation, at)
        start = time.perf_counter()
        if config.overfit:
            batches.reset()
        *result, skipped = train_step(config, model, batches, at)
        speed = tokens / (time.perf_counter() - start)
        yield Step(step, result[0], val_loss, *result[1:], speed, skipped)
    if validation:
        yield Step(at.step, None, _validate(config, model, validation, at))


# validation, and the best so far
def _validate(config, model, validation, at):
    now = at.step, config.rate(at.step)
    loss = evaluate(model, validation, config.eval_batches, *now)
    at.best_loss = loss if at.best_loss is None else min(at.best_loss, loss)
    return loss


# one step
def train_step(config, model, batches, at):
    """Update a GPT2 once, or skip it; returns loss, rate, norm, skipped.

    batches: as in `accumulate`. at: a `Progress`, changed in place. skipped
    is 1 if the loss or the norm stood out, else 0. Raises
    FloatingPointError when one is not finite, before the update, or after
    it where a step is made whole.

    Derived in chapter 4.13.
    """
    rate, settings = config.rate(at.step), _settings(config, model, at)
    most, whole = config.clip or math.inf, _is_whole(config, model)
    if whole:
        loss, norm = _whole_step(config, model, batches, most, settings)
        _check_finite("loss", loss, at.step, rate)
    else:
        loss = accumulate(config, model, batches, at.step)
        norm = model.clip_gradients(most)
    _check_finite("norm of the gradient", norm, at.step, rate)
    skipped = _stands_out(config, at, loss, norm)
    if not skipped:
        at.updates += 1
        if not whole:
            model.update(**settings)
    at.step, at.last_loss = at.step + 1, loss
    return loss, rate, norm, int(skipped)


# the numbers of an update
def _settings(config, model, at):
    """AdamW's numbers for the next update, by their names in `update`."""
    return config.some("beta1", "beta2", "eps", "weight_decay") | {
        "learning_rate": config.rate(at.step),
        "step": at.updates + 1,
        "decay": decaying(model.cfg),
    }


def _is_whole(config, model):
    """Whether nothing is, or can be, decided between gradient and update."""
    if config.in_backward:
        return True
    group = group_of(model)
    many = config.micro_batches > group.size
    decides = many or config.skip_loss or config.skip_norm
    return model.backend == "cuda" and group.in_graph and not decides


def _whole_step(config, model, batches, most, settings):
    """A whole step, on this process's batch; its loss and norm."""
    group, count = group_of(model), config.micro_batches
    mine = group.share(count)
    _skip(batches, mine.start)
    loss, norm = model.step(*batches.next_batch(), most, **settings)
    _skip(batches, count - mine.stop)
    return sum(group.gather(loss)) / count, norm
