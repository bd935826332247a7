# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       train.loop: "The training loop: a generator of steps."
#       train.group: "The processes that train together: here one; and the order of a sum."
# ---

# %% [markdown]
# # Loop: a generator of steps
#
# > Five calls a step, and around them what a long run needs: batches in pieces,
# > outliers left out, validation, and a report of each step.
#
# *Reading time: 26 minutes. You need: [chapter 1.18](../1_by_hand/18_training.ipynb) and
# [chapter 4.12](12_options.ipynb).*

# %% [markdown]
# ## Where we are
#
# The plain loop of Part 1 learns. A run that is meant to last needs more: batches
# in pieces, updates that can be left out, a word about every step. At the end of
# this chapter you can
#
# - train on a batch that is larger than memory, and get its exact gradient;
# - skip an update that stands out, and say when that is wise;
# - use a loop that yields instead of calling back.

# %% [markdown]
# ## Setup

# %% setup
from dataclasses import replace
from itertools import islice

import matplotlib.pyplot as plt

from llmnb.book.diagram import PALETTE
from llmnb.book.verify import compare, verdict
from llmnb.train.options import TrainConfig
from llmnb.train.start import new_model

# %% [markdown]
# ## The loop
#
# A training step is the five calls of
# [chapter 1.18](../1_by_hand/18_training.ipynb), in their one order: `forward`,
# `backward`, `clip_gradients`, the rate, `update`. Two things are new here: the
# first two may be called several times, and the last may be left out.
#
# **A batch larger than memory.** The activations of a batch of $B$ rows take
# memory in proportion to $B$, and large models learn best from batches of
# half a million tokens. But the gradient of a large batch can be had in
# pieces. Cut it into $n$ *micro-batches* of equal size, $M$ tokens each, and
# let $\ell_{kj}$ be the loss of token $j$ of piece $k$. The mean over all
# tokens is the mean of the pieces' means,
#
# $$ \begin{aligned}
#    \mathcal L &= \frac1{nM} \sum_{k=0}^{n-1} \sum_{j=0}^{M-1} \ell_{kj}
#      = \frac1n \sum_{k=0}^{n-1} \mathcal L_k , \\
#    \mathcal L_k &= \frac1M \sum_{j=0}^{M-1} \ell_{kj} ,
#    \end{aligned} \tag{4.13.1} $$
#
# and since differentiation is linear, its gradient is the mean of theirs:
#
# $$ \frac{\partial \mathcal L}{\partial \theta}
#    = \sum_{k=0}^{n-1} \frac1n
#    \frac{\partial \mathcal L_k}{\partial \theta} . \tag{4.13.2} $$
#
# It is exact, and not an approximation, as long as the weights stand still
# while the pieces pass and no token is masked out; only the order of the
# sum, and so its rounding, differs. This is **gradient accumulation**. The
# factor $1/n$ costs nothing: `backward` begins with the derivative of the
# loss by each token's loss, a constant that it writes anyway, $1/M$. With
# `share=1/n` it writes $1/(nM)$, and everything behind it is linear.
#
# **The order of the sum.** A sum of floats depends on the order of its
# additions. A run may be spread over processes some day (Part 6), each with
# some of the pieces, and the result must have the same bits however many
# processes there are. So we fix an order that any of them can take a part of.
# It is that of a binary counter: the gradients of pieces 0 and 1 are added,
# those of 2 and 3, and then the two sums; two neighbouring blocks of equal
# length $L$ become one if the first begins at a multiple of $2L$:
#
# $$ \begin{aligned}
#      &\bigl( (g_0 + g_1) + (g_2 + g_3) \bigr) \\
#    {}+{} &\bigl( (g_4 + g_5) + (g_6 + g_7) \bigr) .
#    \end{aligned} \tag{4.13.3} $$
#
# When $n$ is no power of two, several blocks are left, and they are added
# from right to left: of seven pieces,
# $(\dots) + \bigl( (g_4 + g_5) + g_6 \bigr)$ with the first four in the dots.
# Whoever has pieces 4 to 7, and no others, can make the second bracket of
# (4.13.3) alone. A stack holds the blocks that wait for their neighbour:

# %% imports of the group tags=["export"] module="train.group"
from weakref import WeakKeyDictionary


# %% the order of a sum tags=["export"] module="train.group"
class Tree:
    """A sum over 0, 1, 2, ... in an order that does not depend on who adds.

    add: a function of two arrays, of an earlier and of a later block, that
    returns their sum. blocks: what waits for its neighbour, a list of
    (start, stop, array), each a sum over range(start, stop).
    """

    def __init__(self, add):
        self.add, self.blocks = add, []

    def push(self, start, stop, array):
        """Put a block behind the others; it joins those it can. (4.13.3)"""
        while self.blocks and _joins(self.blocks[-1], stop):
            start, _, before = self.blocks.pop()
            array = self.add(before, array)
        self.blocks.append((start, stop, array))

    def whole(self):
        """The sum of all that was pushed; no block is left."""
        _, _, array = self.blocks.pop()
        while self.blocks:
            array = self.add(self.blocks.pop()[2], array)
        return array


# %% do two blocks become one tags=["exporti"] module="train.group"
def _joins(block, end):
    """Whether a block and the one behind it, to `end`, make one."""
    start, stop, _ = block
    length = stop - start
    return end - stop == length and start % (2 * length) == 0


# %% seven pieces, and their order
tree = Tree(lambda a, b: f"({a}+{b})")
for k in range(7):
    tree.push(k, k + 1, str(k))
print(tree.whole())

# %% [markdown]
# The price is memory: a block that waits is a gradient of its own. While piece $k$
# is computed, counted from 0, as many wait as $k$ has ones in base two: at most
# $\log_2 n$ of $n$ pieces, where $n$ is a power of two. So one piece takes nothing,
# two take one gradient more, and 16 take four, as much as the weights, their gradient and AdamW's
# averages together. A plain sum, each piece added to those before, would take none
# but could not be divided.
#
# In a model the newest block lies where `backward` writes, in `model.grads`. Before
# the next piece is computed it is copied aside; and when two become one, the place
# of the earlier is free again. The arrays are kept from step to step, for fresh memory
# costs time. Where the model is on a GPU, which has less memory, and trains
# alone, the pieces are added in place, one by one.


# %% the tree of a model's gradients tags=["export"] module="train.group"
class GradientTree(Tree):
    """A `Tree` of gradients, whose newest block lies in a model's grads.

    grads: these, flat; ops: layers that add. On the host.
    """

    def __init__(self, grads, ops):
        super().__init__(self._sum)
        self.grads, self._ops, self._spare = grads, ops, []

    def clear(self):
        """Forget all blocks; their memory is kept."""
        self._spare += [x for *_, x in self.blocks if x is not self.grads]
        self.blocks.clear()

    def make_room(self):
        """Copy the newest block aside: grads will be overwritten."""
        if self.blocks:
            start, stop, array = self.blocks.pop()
            self.blocks.append((start, stop, self._aside(array)))

    def _aside(self, array):
        aside = self._spare.pop() if self._spare else array.copy()
        aside[:] = array
        return aside

    def _sum(self, before, array):
        self._ops.residual_forward(array, before, array)
        self._spare.append(before)
        return array


_TREES = WeakKeyDictionary()  # of models


def tree_of(model):
    """The GradientTree of a model, empty."""
    if model not in _TREES:
        kind = getattr(model, "tree", GradientTree)
        _TREES[model] = kind(model.memory.flat("grads"), model.ops)
    _TREES[model].clear()
    return _TREES[model]


def waiting(pieces):
    """How many gradients wait at most while a range of pieces is computed.

    Besides the one in model.grads.
    """
    tree, most = Tree(lambda before, array: None), 0
    for k in pieces:
        most = max(most, len(tree.blocks))
        tree.push(k, k + 1, None)
    return most


# %% so many wait
print([waiting(range(n)) for n in (1, 2, 3, 4, 8, 16)])

# %% [markdown]
# The loop asks the processes that train together, its *group*, for little:
# which one this is, of how many, and what each of them says. A group of one answers:


# %% one process tags=["export"] module="train.group"
class Group:
    """The processes that train together: a group of one.

    rank: which of them this is, from 0 on. size: how many there are. Of
    several, each calls the same methods in the same order; those of a larger
    group, which chapter 6.1 adds, move parts of arrays. on_gpus: whether
    these lie on GPUs. in_graph: whether a recorded step may hold such calls.
    """

    rank, size = 0, 1
    on_gpus, in_graph = False, True

    @property
    def first(self):
        """Whether this is the one that writes and speaks for all."""
        return self.rank == 0

    def gather(self, x):
        """What each of them has given, a list in order of rank.

        x: numbers, texts, lists and dicts, as JSON has them.
        """
        return [x]

    def share(self, count, rank=None):
        """The range of `count` things, in order, that this one does.

        rank: of another one.
        """
        rank = self.rank if rank is None else rank
        first, last = (r * count // self.size for r in (rank, rank + 1))
        return range(first, last)


ALONE = Group()


def group_of(model):
    """The Group that a model trains in."""
    return getattr(model, "group", ALONE)


# %% imports of loop tags=["export"]
import math
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from llmnb.model.tensors import decaying
from llmnb.train.group import group_of, tree_of


# %% the gradient of an update tags=["export"]
def accumulate(config, model, batches, step=0):
    """Leave the gradient of one update in model.grads; return its loss.

    Takes `config.micro_batches` batches from `batches`, whatever has a
    next_batch. The loss, a float, is the mean over all of them, and the
    gradient is that of this mean, in the order of `Tree`. In a group each
    process computes its share of the batches. Raises FloatingPointError,
    naming the step, at a loss that is not finite.
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


# %% a piece of it tags=["exporti"]
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


# %% finite or not tags=["exporti"]
GENTLER = "try a lower learning rate or a longer warm-up"


def _check_finite(what, value, step=None, rate=0.0):
    """Raise unless a number is finite; without a step nothing is trained."""
    when = f" at step {step} (learning rate {rate:.3g}): {GENTLER}"
    if not math.isfinite(value):
        when = "" if step is None else when
        raise FloatingPointError(f"the {what} is {value}{when}")


# %% [markdown]
# **A batch that does not belong.** Text from the web holds stretches of
# garbage: a table of numbers, a thousand times the same line. Such a batch
# has a loss or a gradient far from all others, and its update can undo an
# hour's work. Clipping shortens the step but keeps its direction. One may
# pass over it instead, and needs a rule for what *far* means. Keep the
# losses of the last $W$ steps, with mean $\mu$ and variance
# $\sigma^2 = Q / W$, where $Q = \sum_i (x_i - \mu)^2$. The **z-score** of
# a new loss $x$ is its distance from the mean, counted in standard
# deviations:
#
# $$ z = \frac{x - \mu}{\sigma} . \tag{4.13.4} $$
#
# If losses were normally distributed, $z > 5$ would come once in 3.5
# million steps. Only large values are suspect: a small loss does no harm.
#
# The window moves on by one step: $x$ enters and the oldest, $a$, leaves.
# The mean and the variance follow without another pass over the window:
#
# $$ \mu' = \mu + \frac{x - a}{W} , \tag{4.13.5} $$
#
# and as $Q = \sum_i x_i^2 - W \mu^2$, before and after,
#
# $$ \begin{aligned}
#    Q' - Q &= x^2 - a^2 - W (\mu'^2 - \mu^2) \\
#      &= (x - a)(x + a) \\
#      &\qquad {} - W (\mu' - \mu)(\mu' + \mu) \\
#      &= (x - a) \bigl[ (x - \mu') + (a - \mu) \bigr] ,
#    \end{aligned} \tag{4.13.6} $$
#
# where the last step put in (4.13.5). The two sums and a ring of $W$ values
# are all it takes. Try it on a window through which a huge loss passes:


# %% a running variance, and an outlier that passes through
def slide(mean, Q, new, old, W):
    after = mean + (new - old) / W  # (4.13.5)
    return after, Q + (new - old) * ((new - after) + (old - mean))  # (4.13.6)


W = 8
stream = np.random.RandomState(13).normal(3.0, 0.1, 200)
stream[100] = 1e9
mean, Q = stream[:W].mean(), ((stream[:W] - stream[:W].mean()) ** 2).sum()
running = []
for i in range(W, 200):
    mean, Q = slide(mean, Q, stream[i], stream[i - W], W)
    running.append(math.sqrt(max(Q, 0) / W))
true = [stream[i - W + 1 : i + 1].std() for i in range(W, 200)]
far = np.abs(np.array(running) - true) / true
verdict("before it", far[:80].max() < 1e-6, "(4.13.6) is right")
verdict("after it", far[-1] > 10, "(4.13.6) is never right again")

# %% [markdown]
# The derivation is right and the arithmetic is not. $Q$ rose to $10^{18}$,
# where a float64 counts in steps of about a hundred, and fell back to less
# than a tenth: what was rounded away stays away. And outliers are what the window
# is there for. A window has some hundred numbers, a step takes millions of
# operations for each; so we take the sums anew at every step, and have
# nothing to remember but the window.


# %% how far out a value is tags=["export"]
def z_score(recent, value):
    """How many standard deviations `value` lies above the mean of `recent`.

    recent: a list of floats. 0 where they have no spread. A float.
    """
    spread = np.std(recent)
    return float((value - np.mean(recent)) / spread) if spread > 0 else 0.0


# %% the score of some losses
recent = [3.0, 3.2, 2.8, 3.1, 2.9]
print([round(z_score(recent, x), 2) for x in (3.0, 3.3, 9.0)])

# %% [markdown]
# The new value is judged by the values *before* it, so it cannot hide by
# widening the spread; then it enters the window, skipped or not. If skipped
# values stayed out, a lasting rise of the loss, as at the border between
# two kinds of text, would be skipped forever. No value is judged before the
# window is full.
#
# **What a skipped update leaves.** The weights and AdamW's averages stay as
# they are, as if the batch had not been in the text; the loader and the
# schedule have moved on. The bias correction of
# [chapter 1.12](../1_by_hand/12_adamw.ipynb) divides by $1 - \beta^t$ because the averages
# have seen $t$ gradients. So $t$ must count the updates made, and the
# schedule the steps taken, and the two differ from the first skip on.
#
# So a run has a place in itself, beside the weights and the data:


# %% where a run stands tags=["export"]
@dataclass
class Progress:
    """Where a run stands, apart from its weights and its data.

    step: steps taken, which set the learning rate. updates: those that were
    not skipped, which AdamW counts. losses, norms: of the last
    `skip_window` steps. last_loss, best_loss: the latest training loss and
    the lowest validation loss, or None.
    """

    step: int = 0
    updates: int = 0
    losses: list = field(default_factory=list)
    norms: list = field(default_factory=list)
    last_loss: float | None = None
    best_loss: float | None = None


# %% does it stand out tags=["exporti"]
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


# %% [markdown]
# **Validation** runs the forward pass alone on tokens that no step trains
# on. The batches are the same each time, so two validation losses differ
# because the weights differ and for no other reason.


# %% validation tags=["export"]
def evaluate(model, batches, count, step=None, rate=0.0):
    """Mean loss of a model over the first `count` batches; trains nothing.

    batches: a DataLoader, which is set back to its first batch. At most one
    epoch is read, by a group in parts. Returns nats a token, a float. Raises
    ValueError for a count below 1, and FloatingPointError when the loss is
    not finite, naming the step and the rate of a run.
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


# %% [markdown]
# The loop is a **generator**: after each step it hands a `Step` to its
# caller and waits. The notebook plots the steps, the command line draws a
# progress bar with them, and neither needs to know how training works.


# %% what a step reports tags=["export"]
class Step(NamedTuple):
    """What `train` reports about one step.

    step: updates made before it. loss: on the step's batch, before its
    update. val_loss: with the same weights, or None between validations.
    learning_rate, grad_norm (before clipping), tokens_per_second: of the
    step. skipped: 1 if the step made no update, else 0. In the last report,
    which follows the last update, only step and val_loss are given.
    """

    step: int
    loss: float | None
    val_loss: float | None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    skipped: int | None = None


# %% the loop tags=["export"]
def train(config, model, batches, validation=None, at=None):
    """Train a GPT2 in place; yield a `Step` after each step, one at the end.

    config: a TrainConfig. batches: a DataLoader, read on from where it is.
    validation: None or a DataLoader whose first `config.eval_batches`
    batches are evaluated every `config.eval_every` steps and at the end.
    at: the `Progress` to go on from, changed in place; None for the start.
    Raises FloatingPointError when a loss or a gradient is not finite.
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


# %% validation, and the best so far tags=["exporti"]
def _validate(config, model, validation, at):
    now = at.step, config.rate(at.step)
    loss = evaluate(model, validation, config.eval_batches, *now)
    at.best_loss = loss if at.best_loss is None else min(at.best_loss, loss)
    return loss


# %% one step tags=["export"]
def train_step(config, model, batches, at):
    """Update a GPT2 once, or skip it; returns loss, rate, norm, skipped.

    batches: as in `accumulate`. at: a `Progress`, changed in place. skipped
    is 1 if the loss or the norm stood out, else 0. Raises
    FloatingPointError when one is not finite, before the update, or after
    it where a step is made whole.
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


# %% the numbers of an update tags=["exporti"]
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


# %% [markdown]
# AdamW counts its updates from 1, the schedule its steps from 0. Only the
# matrices and the two embedding tables decay;
# [chapter 1.12](../1_by_hand/12_adamw.ipynb) says why.
#
# On a GPU a whole step can be one launch (`step` of
# [chapter 3.11](../3_gpu/11_step.ipynb)), if nothing has to be decided between its
# parts: one batch to an update, and no updates that are skipped. A model that learns
# in its backward pass ([chapter 5.11](../5_modern/11_inbackward.ipynb)) takes whole
# steps always. Then the
# loss is looked at when the update is done. A run whose loss is not finite
# ends there all the same, and its last state on the disk is from before.

# %% [markdown]
# ## Proof: pieces and skips
#
# The text is bytes of five modules of Python 3.11, cut into eight equal parts;
# row $b$ of a batch reads part $b$, `seq_len` tokens a step (`Readers` of
# [chapter 1.18](../1_by_hand/18_training.ipynb)). Whatever has a `next_batch` can
# feed `train`.


# %% the same numbers for our run
from llmnb.formats.shard import read_shard
from llmnb.text.readers import Readers

small = TrainConfig(
    tokenizer="byte",
    num_layers=2,
    channels=64,
    seq_len=64,
    batch_size=8,
    steps=200,
    learning_rate=2e-3,
)
text = read_shard("../../tests/data/curve_tokens.bin")

# %% [markdown]
# Equation (4.13.2) says that four batches of two rows have the gradient of
# one batch of eight. In float64 the two must agree to the rounding of their
# sums, on the NumPy backend and on the kernels:


# %% one batch in four pieces
class Pieces:
    def __init__(self, rows):
        shape = -1, rows, 64
        pairs = zip(
            text[:512].reshape(shape), text[1:513].reshape(shape), strict=True
        )
        self.next_batch = pairs.__next__


def gradient_of(rows, backend="cpu"):
    sizes = {"batch_size": rows, "total_batch": 512, "precision": "fp64"}
    pieces = replace(small, backend=backend, **sizes)
    student = new_model(pieces, 257)
    loss = accumulate(pieces, student, Pieces(rows))
    return loss, student.memory.flat("grads").copy()


whole_loss, whole = gradient_of(8)
for backend in ("reference", "cpu"):
    loss, pieces = gradient_of(2, backend)
    compare(f"{backend} gradient", pieces, whole, tol=1e-12)
    compare(f"{backend} loss", loss, whole_loss, tol=1e-12)

# %% [markdown]
# And the mistake that is made most often, to forget the factor $1/n$?

# %% the factor forgotten
student = new_model(replace(small, batch_size=2, precision="fp64"), 257)
feed = Pieces(2)
for k in range(4):
    student.forward(*feed.next_batch())
    student.backward(add=k > 0)
wrong = student.memory.flat("grads")
ratio = np.linalg.norm(wrong) / np.linalg.norm(whole)
verdict("no 1/n", abs(ratio - 4) < 1e-9, "is 4 times too long, and caught")

# %% [markdown]
# Adam divides a gradient by its usual size, so a factor of 4 changes its
# path little and nobody notices. But the clip sees a norm four times too
# large, and shortens nearly every step.
#
# Now a batch that does not belong: at step 100, and only there, the small
# model gets random bytes. One run takes the batch as it comes, one skips
# updates whose loss lies six standard deviations above the mean of the last
# 32, and a third never gets the garbage.


# %% garbage at step 100
class Spoilt(Readers):
    def next_batch(self):
        x, y = super().next_batch()
        if self.step != 101:
            return x, y
        noise = np.random.RandomState(0).randint(0, 256, (2, *x.shape))
        return noise.astype(np.int32)


exposed = replace(small, clip=0.0, schedule="constant", learning_rate=1e-2)
guarded = replace(exposed, skip_loss=6.0, skip_window=32)
runs = {}
for name, options, feed in (
    ("spared", exposed, Readers),
    ("taken", exposed, Spoilt),
    ("skipped", guarded, Spoilt),
):
    run = train(options, new_model(options, 257), feed(text, 8, 64))
    runs[name] = list(islice(run, 130))
print("skipped at", [x.step for x in runs["skipped"] if x.skipped])
spared, *rest = ([x.loss for x in run[101:109]] for run in runs.values())
taken, skipped = (np.mean(x) - np.mean(spared) for x in rest)
verdict("taken", taken > 0.04, "costs something")
verdict("skipped", skipped < 0.5 * taken, "costs less than half")

# %% draw both
fig, ax = plt.subplots(figsize=(8, 3), dpi=100)
base, *curves = (np.array([x.loss for x in run]) for run in runs.values())
for name, losses, colour in zip(
    ("taken", "skipped"), curves, ("orange", "blue"), strict=True
):
    losses[100] = np.nan
    ax.plot(losses - base, ".-", color=PALETTE[colour], label=name)
ax.axvline(100, color=PALETTE["grey"], lw=1, ls="--")
ax.set(xlim=(90, 130), xlabel="step", ylabel="loss minus the spared run's")
ax.legend(frameon=False)
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 4.13.1. One batch of random bytes, at the dashed line, and what it
# costs the steps behind it. The run that takes the batch still pays for it
# thirty steps later; the run that skips it stays close to the run that was
# spared, one batch behind.*

# %% [markdown]
# ## Take away
#
# - The gradient of a mean is the mean of the gradients: a batch of any size
#   fits into memory, in pieces.
# - A step is forward, backward, clip, rate, update. The loop around it is a
#   generator that reports and knows nothing of its readers.
# - With `skip_loss` or `skip_norm`, an update whose loss or norm stands out is
#   skipped, and the log marks it. A value that is not finite ends the run.
#
# ## Design note
#
# Many libraries offer a `Trainer` class with hooks: a method that runs after
# each step, another before validation, a third on saving. The loop then
# belongs to the class, and the reader looks for it among the hooks. We
# turned it inside out. `train` yields, and whoever iterates over it decides
# what to do between steps: plot, print, save, stop. Stopping needs no flag;
# the caller leaves its `for` loop.
#
# The price: a caller that never asks for the next step leaves the training
# where it stands, which surprises those who expect `train(...)` to train
# when it is called. Its docstring says "yield" for that reason.
#
# A second choice concerns an infinite or undefined loss. Some trainers skip
# such a step and go on. Skipping hides the cause, and the batch comes again
# in the next epoch. We stop before the update has spoilt the weights, and
# say the step, the value, the learning rate and what to try. What is skipped,
# if you ask for it, is finite, and the log marks it.
#
# ## Exercises
#
# **1** (★★). A test that finds many bugs in a minute: train on one batch
# again and again. What loss do you expect after 100 steps? Use the
# configuration `small` with a constant rate.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# Close to zero. A model with more parameters than the batch has tokens can
# remember it. If the loss settles well above zero, targets and tokens do
# not belong together, or some gradient is missing.
# :::


# %% exercise 1, the same batch again tags=["hide-cell"]
class Same:
    def __init__(self, batch):
        self.batch = batch

    def next_batch(self):
        return self.batch


# %% exercise 1, checked
again = replace(small, steps=100, schedule="constant")
one = Same(Readers(text, 8, 64).next_batch())
losses = [x.loss for x in train(again, new_model(again, 257), one)]
verdict("one batch", losses[-1] < 0.5, "is learnt by heart")

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("4.13")
