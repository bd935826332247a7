# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       train.train: "The training loop and its options."
#       train.run: 'Runs that survive: their folders, their states, their resumption.'
# ---

# %% [markdown]
# # Train a GPT-2 and watch it learn
#
# > Text becomes batches, batches become gradients, gradients become a model
# > that predicts better than counting can, along the curve PyTorch draws.

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="all")

# %% [markdown]
# *Figure 1.16.1. Every box is lit: each has a forward pass, a proven backward
# pass and a compiled kernel. What is missing is the loop around them.*
#
# This chapter writes that loop, runs it on your machine until a model has
# read half a million tokens of Python, and makes it safe to stop. At its
# end you can
#
# - say what loss to expect before the first step, and which two numbers a
#   trained model must beat;
# - write a training step as five calls, in the one order that works;
# - read a loss curve: the fall, the bend, the gap between training and
#   validation;
# - show that our arithmetic is PyTorch's, step after step;
# - train on batches larger than your memory, and from somebody's weights;
# - pull the plug in the middle of a run, and go on to the same last bit.
#
# You need all chapters before this one, and above all
# [chapter 1.12](12_adamw.ipynb) for the optimiser and
# [chapter 1.15](15_model.ipynb) for the model.

# %% [markdown]
# ## Setup

# %% setup
from itertools import islice

import matplotlib.pyplot as plt

from llmnb.book.diagram import PALETTE
from llmnb.book.verify import compare, verdict

# %% imports of the trainer tags=["export"]
import importlib
import json
import math
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmnb.formats.checkpoint import read_config
from llmnb.config import GPT2Config
from llmnb.formats.shard import Shards, find_shards, sample_tokens
from llmnb.text.data import DataLoader
from llmnb.files import make_folder, read_small, replacing, what_is
from llmnb.arena import footprint
from llmnb.model.layout import gpt2_layout
from llmnb.model.tensors import decaying
from llmnb.files import LOCK, in_use
from llmnb.room import check_room
from llmnb.train.schedule import learning_rate
from llmnb.timing import machine

# %% [markdown]
# ## By hand: what a loss means
#
# The loss is the mean of $-\log p$ over the tokens that came true, in nats.
# A model that gives every one of $V$ tokens the probability $1/V$ pays
#
# $$ \mathcal L_\text{uniform} = \log V \tag{1.16.1} $$
#
# for each token. For a toy language of four tokens that is
# $\log 4 = 1.3863$. Suppose its text is `a a a a b b c d`. A model that has
# counted says $p = (\tfrac12, \tfrac14, \tfrac18, \tfrac18)$ and pays
# $\tfrac12 \log 2 + \tfrac14 \log 4 + \tfrac28 \log 8 = 1.2130$.

# %% two guesses by hand
p = np.array([4, 2, 1, 1]) / 8
print("uniform", np.round(np.log(4), 4))
print("counted", np.round(-(p * np.log(p)).sum(), 4))

# %% [markdown]
# Counting is the best that can be done without looking at the context, and
# here is why. Let $n_v$ count how often token $v$ occurs among $N$ tokens,
# and let a model that ignores its input give token $v$ the probability
# $q_v$. Its loss is
#
# $$ \mathcal L(q) = -\sum_v \frac{n_v}{N} \log q_v ,
#    \qquad \sum_v q_v = 1 . \tag{1.16.2} $$
#
# With a multiplier $\lambda$ for the constraint, the derivative by $q_v$ is
# $-n_v / (N q_v) + \lambda$. It vanishes when $q_v = n_v / (\lambda N)$, and
# the sum over $v$ gives $\lambda = 1$:
#
# $$ q_v = \frac{n_v}{N} . \tag{1.16.3} $$
#
# The loss at this $q$ is the **unigram entropy**. A network whose loss is
# above it has not yet learned how frequent each token is; a network below
# it must be using the tokens that came before. We count on the training
# text and charge the validation text, and add 1 to every count so that a
# token never seen does not cost infinitely much.


# %% the unigram entropy tags=["export"]
def unigram_entropy(train_tokens, tokens, vocab_size):
    """Mean -log p of `tokens` under the token frequencies of a text.

    train_tokens, tokens: 1-D integer arrays with values in [0, vocab_size).
    Every count is raised by 1. Returns nats a token, a float.
    """
    counts = np.bincount(train_tokens, minlength=vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[tokens].mean())


# %% the toy language again
toy = np.array([0, 0, 0, 0, 1, 1, 2, 3])
far = unigram_entropy(np.tile(toy, 1000), toy, 4)
compare("toy language", far, -(p * np.log(p)).sum(), tol=1e-3)

# %% [markdown]
# ## The numbers of a run
#
# A run is fixed by its numbers: what it reads, what the model looks like,
# how it learns. They live in one frozen dataclass, `TrainConfig`, in five
# parts. Each number carries a sentence of help, because the command line
# of [chapter 4.18](../4_practice/18_commands.ipynb) makes its options from these fields.


# %% an option with its help tags=["exporti"]
def _option(default, text):
    return field(default=default, metadata={"help": text})


# %% what a run reads tags=["export"]
@dataclass(frozen=True)
class DataOptions:
    """What a run reads; see `TrainConfig`."""

    corpus: tuple = _option(
        ("stdlib",),
        "text to learn: stdlib, tinyshakespeare, or files and folders",
    )
    limit: int = _option(0, "read at most this many characters; 0 means all")
    tokenizer: str = _option(
        "bpe",
        "bpe (trained on the text), byte, gpt2, or a file: a rank file, "
        "vocab.json or tokenizer.json",
    )
    vocab_size: int = _option(1024, "tokens that the bpe tokenizer has")
    field: str = _option("text", "field of a JSON line that has the text")
    skip_bad: bool = _option(
        False, "pass over bad records of JSON lines, and count them"
    )
    endoftext: bool = _option(
        False, "take <|endoftext|> in a text as the token, not as text"
    )
    shards: str = _option(
        "", "a folder written by `llmnb data`, instead of a corpus"
    )


# %% what the model looks like tags=["export"]
@dataclass(frozen=True)
class ModelOptions:
    """What the model looks like; see `TrainConfig`."""

    depth: int = _option(
        0, "layers of a usual shape (12: GPT-2's 124M); 0: as said below"
    )
    num_layers: int = _option(4, "transformer blocks (L)")
    num_heads: int = _option(4, "attention heads (NH)")
    channels: int = _option(128, "channels (C), a multiple of the heads")
    seq_len: int = _option(64, "tokens the model sees at once (T)")
    batch_size: int = _option(8, "sequences in a batch (B)")
    backend: str = _option(
        "cpu", "cpu, cuda (a GPU), or reference (NumPy, slow)"
    )
    precision: str = _option(
        "fp32", "fp32, bf16 (cpu), tf32 (cuda), or fp64 (slow)"
    )


# %% how it learns tags=["export"]
@dataclass(frozen=True)
class LearningOptions:
    """How a run learns; see `TrainConfig`."""

    init: str = _option(
        "", "start from this checkpoint, a file or a folder, at a rate of 1e-4"
    )
    steps: int = _option(1000, "updates of the weights")
    learning_rate: float = _option(2e-3, "the highest learning rate")
    warmup_fraction: float = _option(0.1, "share of steps spent rising to it")
    schedule: str = _option("cosine", "cosine, linear, constant or wsd")
    final_fraction: float = _option(0.1, "the last rate over the highest")
    eval_every: int = _option(100, "steps between two validations")
    eval_batches: int = _option(20, "batches in a validation")
    seed: int = _option(42, "seed of the weights and of the shuffle")


# %% what an update is tags=["export"]
@dataclass(frozen=True)
class UpdateOptions:
    """What an update of the weights is; see `TrainConfig`."""

    beta1: float = _option(0.9, "AdamW: memory of the gradient")
    beta2: float = _option(0.95, "AdamW: memory of its square")
    eps: float = _option(1e-8, "AdamW: added to the denominator")
    weight_decay: float = _option(0.1, "AdamW: decay of 2-D tensors")
    clip: float = _option(1.0, "largest gradient norm; 0 means no limit")
    total_batch: int = _option(
        0, "tokens in an update, a multiple of B*T; 0: one batch"
    )
    skip_loss: float = _option(
        0.0, "skip updates whose loss stands out by this z-score; 0: never"
    )
    skip_norm: float = _option(
        0.0, "the same for the norm of the gradient; 0: never"
    )
    skip_window: int = _option(128, "steps that an update is compared with")
    overfit: bool = _option(False, "learn the first batch again and again")


# %% what it keeps tags=["export"]
@dataclass(frozen=True)
class KeepOptions:
    """What a run keeps and shows on its way; see `TrainConfig`."""

    save_every: int = _option(
        250, "steps between two checkpoints; 0: only when it stops"
    )
    keep: int = _option(2, "checkpoints that are kept, the newest ones")
    sample_every: int = _option(
        0, "steps between two samples in the terminal; 0: none"
    )


# %% [markdown]
# A number that makes no sense is refused when the configuration is built,
# not twenty seconds into a run. Most of the checks exist already:
# `GPT2Config` knows which shapes are possible and `learning_rate` which
# schedules, so building one of each asks them.
#
# A single number can stand for the shape. The GPT-2 models that were
# published have 12, 24, 36 and 48 layers with 768, 1024, 1280 and 1600
# channels, and heads of 64 channels each. `depth` names such a model by its
# layers. We add d6 with 384 channels, at the same ratio as d12; below it
# the ratio stays, and between two of these the width lies on the line that
# joins them, rounded up to whole heads.


# %% a number in its range tags=["exporti"]
def _check_range(name, value, least, below):
    if not least <= value < below:
        end = f"and below {below}" if below < math.inf else ""
        raise ValueError(
            f"{name} must be at least {least} {end}".rstrip()
            + f", got {value}"
        )


# %% a shape from a depth tags=["export"]
WIDTHS = {0: 0, 6: 384, 12: 768, 24: 1024, 36: 1280, 48: 1600}
HEAD = 64  # channels of a head


def depth_shape(depth):
    """Layers, heads and channels of a GPT-2 of this depth.

    Heads have 64 channels. Raises ValueError unless 1 <= depth <= 48.
    """
    _check_range("depth", depth, 1, 1 + max(WIDTHS))
    width = round(np.interp(depth, [*WIDTHS], [*WIDTHS.values()]))
    heads = -(-width // HEAD)
    return depth, heads, heads * HEAD


# %% the shapes of some depths
for depth in (4, 6, 12, 16, 24, 36, 48):
    print(f"d{depth:<3}", *depth_shape(depth))

# %% the least values tags=["export"]
SHAPE = "num_layers", "num_heads", "channels"
AT_LEAST = {
    2: ("skip_window",),
    1: (
        "vocab_size", "batch_size", "steps", "eval_every", "eval_batches",
        "keep",
    ),
    0: (
        "limit", "warmup_fraction", "eps", "weight_decay", "clip", "seed",
        "depth", "total_batch", "skip_loss", "skip_norm", "save_every",
        "sample_every",
    ),
}  # fmt: skip


# %% numbers that go together tags=["exporti"]
def _take_shape(config, shape):
    for name, value in zip(SHAPE, shape, strict=True):
        was = getattr(config, name)
        if was not in (value, getattr(TrainConfig, name)):
            raise ValueError(
                f"depth {config.depth} makes {name} {value}, not {was}: "
                "choose one of the two"
            )
        object.__setattr__(config, name, value)


def _check_total(config):
    batch = config.batch_size * config.seq_len
    if config.total_batch % batch:
        raise ValueError(
            f"total_batch must be a multiple of a batch's {batch} tokens "
            f"(batch_size times seq_len), got {config.total_batch}"
        )


# %% a run tags=["export"]
@dataclass(frozen=True)
class TrainConfig(
    KeepOptions, UpdateOptions, LearningOptions, ModelOptions, DataOptions
):
    """Every number that fixes a training run.

    With a depth, num_layers, num_heads and channels are set by it. Raises
    ValueError, in one sentence, when a number is out of its range or does
    not go with another.
    """

    def __post_init__(self):
        for least, names in AT_LEAST.items():
            for name in names:
                _check_range(name, getattr(self, name), least, math.inf)
        if self.depth:
            _take_shape(self, depth_shape(self.depth))
        for name in ("beta1", "beta2"):
            _check_range(name, getattr(self, name), 0, 1)
        _check_range("seed", self.seed, 0, 2**32)
        self.model(self.vocab_size)
        self.rate(0)
        _check_total(self)

    @property
    def micro_batches(self):
        """Batches whose gradients make one update."""
        return max(1, self.total_batch // (self.batch_size * self.seq_len))

    def model(self, vocab_size):
        """The GPT2Config of this run for a vocabulary of this size."""
        shape = self.num_layers, self.num_heads, self.channels
        return GPT2Config(self.seq_len, vocab_size, *shape)

    def rate(self, step):
        """The learning rate of a step, counted from 0."""
        warmup = round(self.warmup_fraction * self.steps)
        plan = self.learning_rate, warmup, self.steps
        return learning_rate(step, *plan, self.schedule, self.final_fraction)


# %% a number out of range
config = TrainConfig()
print(config.num_layers, config.channels, config.seq_len, config.seed)
for wrong in (
    {"beta2": 1.0},
    {"channels": 130},
    {"schedule": "stairs"},
    {"depth": 12, "channels": 512},
    {"total_batch": 700},
):
    try:
        TrainConfig(**wrong)
    except ValueError as error:
        print(error)

# %% [markdown]
# ## The data
#
# `prepare` does what [chapter 1.2](02_tokens.ipynb) taught, in order: load the
# documents, train or load a tokenizer, encode, split. It returns the
# tokenizer, the two token arrays, and a sentence that says where the text came
# from and what of it was passed over. The tokenizer learns from the first two
# million characters: the documents come in a mixed order, and more text would
# change the merges little and take longer.

# %% the data of a run tags=["export"]
TOKENIZER_TEXT = 2_000_000  # characters the bpe tokenizer learns from


class Data(NamedTuple):
    """The tokens of a run: what `prepare` returns.

    encoding: a tiktoken.Encoding. train_tokens, val_tokens: 1-D uint16
    arrays, or the `Shards` of a folder. source: a sentence that
    says where the text came from.
    """

    encoding: object
    train_tokens: np.ndarray
    val_tokens: np.ndarray
    source: str


# %% from text to tokens tags=["export"]
def prepare(config):
    """Load the text of a run and turn it into tokens; returns a `Data`.

    Raises ValueError, OSError or RuntimeError, in one sentence, when the
    text is missing, too short, or cannot be downloaded.
    """
    from llmnb.text import corpus, data
    from llmnb.text.reader import Tally

    if config.shards:
        return _from_shards(config)
    sources, tally = [*config.corpus], Tally()
    source = sources[0] if len(sources) == 1 else sources
    size = sum(map(_text_bytes, config.corpus))
    check_room(
        min(size, config.limit or size),
        "a limit, or shards made with `llmnb data`, take less",
    )
    how = config.limit or None, config.field, config.skip_bad, tally
    documents = corpus.load(source, *how)
    encoding = make_encoding(config, documents)
    tokens = corpus.encode_documents(encoding, documents, config.endoftext)
    source = _describe(sources, documents) + tally.words(config.endoftext)
    return Data(encoding, *data.split(tokens), source)


def _text_bytes(path):
    """Bytes of text that must be in memory if this file or folder is read.

    At least: what is packed, or holds fields, may be less when it is read.
    """
    from llmnb.text.corpus import files_below

    path = Path(path)
    if path.is_file():
        known = path.suffix not in (".gz", ".zst", ".jsonl")
        return path.stat().st_size * known
    found = [x for x in files_below(path) if x.suffix == ".txt"]
    return sum(x.stat().st_size for x in found if x.is_file())


# %% where the text came from tags=["exporti"]
def _describe(sources, documents):
    where = " ".join(str(x) for x in sources)
    if where == "stdlib":
        version = ".".join(str(x) for x in sys.version_info[:3])
        where += f" (Python {version})"
    size = sum(len(x) for x in documents)
    return f"{where}: {len(documents):,} documents, {size:,} characters"


# %% from a folder of shards tags=["exporti"]
def _from_shards(config):
    """The tokens of a folder, whose files are left closed."""
    folder = Path(config.shards)
    parts = [Shards(x) for x in find_shards(folder)]
    encoding = _encoding_of(config, folder)
    total = sum(len(x) for x in parts)
    return Data(encoding, *parts, f"shards in {folder}: {total:,} tokens")


def _encoding_of(config, folder):
    """The tokenizer in a folder, or the one that the run names."""
    from llmnb.text import tokenizer

    path = folder / "tokenizer.tiktoken"
    if path.exists():
        return tokenizer.load(path)
    if config.tokenizer == "bpe":
        raise FileNotFoundError(
            f"{folder} has no tokenizer.tiktoken: name the tokenizer of its "
            "tokens, such as --tokenizer gpt2"
        )
    return make_encoding(config, [])


# %% [markdown]
# A run may use a tokenizer that another program made. Chapter 4.4 derives how
# such files are read; the loop only needs the result, so it asks for that
# module by its name.


# %% the tokenizer of a run tags=["export"]
def _hub():
    """The module that reads the tokenizers of other programs."""
    return importlib.import_module("llmnb.formats.vocabulary")


def make_encoding(config, documents):
    """The tokenizer that a TrainConfig names, trained if it is "bpe".

    documents: an iterable of str, of which the first `TOKENIZER_TEXT`
    characters are learnt from, with `config.endoftext` but for
    `<|endoftext|>`. Raises ValueError, OSError or RuntimeError,
    in one sentence.
    """
    from llmnb.text import tokenizer

    if config.tokenizer != "bpe":
        encoding = _hub().open_encoding(config.tokenizer)
        tokenizer.check_special(encoding)  # a run keeps its tokenizer
        return encoding
    learnt, left = [], TOKENIZER_TEXT
    for text in documents:
        text = text[:left]
        learnt += text.split(tokenizer.EOT) if config.endoftext else [text]
        left -= len(text)
        if not left:
            break
    return tokenizer.train(learnt, config.vocab_size)


# %% [markdown]
# The default corpus is the standard library of your own Python: text that
# is there, in a language you read. It is another text in every version. So
# that this page computes the same on all of them, it learns from the first two
# million characters of Python 3.11's, which are kept beside the book's tests.

# %% text becomes tokens
config = replace(config, corpus=("../../tests/data/library.jsonl.gz",))
data = prepare(config)
print(data.source)
print(f"{len(data.train_tokens):,} tokens to train on")
print(f"{len(data.val_tokens):,} tokens to validate on")

# %% one line of it
line = "    def __init__(self, name):\n"
encoded = data.encoding.encode_ordinary(line)
verdict("tokenizer", data.encoding.decode(encoded) == line, "round trip")
verdict("tokenizer", len(encoded) < len(line) / 2, "halves the length")

# %% [markdown]
# ## The loop
#
# One **training step** is five calls, and their order is forced:
#
# | call | reads | writes |
# |---|---|---|
# | `forward` | a batch, the weights | activations, the loss |
# | `backward` | activations, the weights | gradients |
# | `clip_gradients` | gradients | gradients, if their norm is above 1 |
# | `rate` | the step's number | nothing: it is a function of the step |
# | `update` | gradients | the weights, AdamW's two averages |
#
# `backward` needs the activations of the very `forward` before it, clipping
# must see all gradients together, and `update` spends them.
#
# **A batch larger than memory.** The activations of a batch of $B$ rows take
# memory in proportion to $B$, and large models learn best from batches of
# half a million tokens. But the gradient of a large batch can be had in
# pieces. Cut it into $n$ *micro-batches* of equal size, $M$ tokens each, and
# let $\ell_{kj}$ be the loss of token $j$ of piece $k$. The mean over all
# tokens is the mean of the pieces' means,
#
# $$ \mathcal L = \frac1{nM} \sum_{k=1}^n \sum_{j=1}^M \ell_{kj}
#    = \frac1n \sum_{k=1}^n \mathcal L_k , \qquad
#    \mathcal L_k = \frac1M \sum_{j=1}^M \ell_{kj} , \tag{1.16.4} $$
#
# and since differentiation is linear, its gradient is the mean of theirs:
#
# $$ \frac{\partial \mathcal L}{\partial \theta}
#    = \sum_{k=1}^n \frac1n
#    \frac{\partial \mathcal L_k}{\partial \theta} . \tag{1.16.5} $$
#
# It is exact, and not an approximation, as long as the weights stand still
# while the pieces pass and no token is masked out; only the order of the
# sum, and so its rounding, differs. This is **gradient accumulation**. The
# factor $1/n$ costs nothing: `backward` begins with the derivative of the
# loss by each token's loss, a constant that it writes anyway, $1/M$. With
# `share=1/n` it writes $1/(nM)$, and everything behind it is linear.


# %% the gradient of an update tags=["export"]
def accumulate(config, model, batches, step=0):
    """Leave the gradient of one update in model.grads; return its loss.

    Takes `config.micro_batches` batches from `batches`, whatever has a
    next_batch. The loss, a float, is the mean over all of them, and the
    gradient is that of this mean. Raises FloatingPointError, naming the
    step, at a loss that is not finite.
    """
    count, losses = config.micro_batches, []
    for k in range(count):
        losses.append(model.forward(*batches.next_batch()))
        _check_finite("loss", losses[-1], step, config.rate(step))
        model.backward(add=k > 0, share=1 / count)  # (1.16.5)
    return sum(losses) / count


# %% finite or not tags=["exporti"]
def _check_finite(what, value, step=None, rate=0.0):
    """Raise unless a number is finite; without a step nothing is trained."""
    if math.isfinite(value):
        return
    when = (
        f" at step {step} (learning rate {rate:.3g}): try a lower learning "
        "rate or a longer warm-up"
    )
    raise FloatingPointError(
        f"the {what} is {value}{'' if step is None else when}"
    )


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
# $$ z = \frac{x - \mu}{\sigma} . \tag{1.16.6} $$
#
# If losses were normally distributed, $z > 5$ would come once in 3.5
# million steps. Only large values are suspect: a small loss does no harm.
#
# The window moves on by one step: $x$ enters and the oldest, $a$, leaves.
# The mean and the variance follow without another pass over the window:
#
# $$ \mu' = \mu + \frac{x - a}{W} , \tag{1.16.7} $$
#
# and as $Q = \sum_i x_i^2 - W \mu^2$, before and after,
#
# $$ Q' - Q = x^2 - a^2 - W (\mu'^2 - \mu^2)
#    = (x - a)(x + a) - W (\mu' - \mu)(\mu' + \mu)
#    = (x - a) \bigl[ (x - \mu') + (a - \mu) \bigr] , \tag{1.16.8} $$
#
# where the last step put in (1.16.7). The two sums and a ring of $W$ values
# are all it takes. Try it on a window through which a huge loss passes:


# %% a running variance, and an outlier that passes through
def slide(mean, Q, new, old, W):
    after = mean + (new - old) / W  # (1.16.7)
    return after, Q + (new - old) * ((new - after) + (old - mean))  # (1.16.8)


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
verdict("before it", far[:80].max() < 1e-6, "(1.16.8) is right")
verdict("after it", far[-1] > 10, "(1.16.8) is never right again")

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
# [chapter 1.12](12_adamw.ipynb) divides by $1 - \beta^t$ because the averages
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
def evaluate(model, batches, count):
    """Mean loss of a model over the first `count` batches; trains nothing.

    batches: a DataLoader, which is set back to its first batch. At most one
    epoch is read. Returns nats a token, a float. Raises FloatingPointError
    when it is not finite.
    """
    loss = _mean_loss(model, batches, count)
    _check_finite("validation loss", loss)
    return loss


def _mean_loss(model, batches, count):
    batches.reset()
    count = min(count, batches.batches_per_epoch)
    losses = [model.forward(*batches.next_batch()) for _ in range(count)]
    return sum(losses) / count


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
    at = Progress() if at is None else at
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
    loss = _mean_loss(model, validation, config.eval_batches)
    _check_finite("validation loss", loss, at.step, config.rate(at.step))
    at.best_loss = loss if at.best_loss is None else min(at.best_loss, loss)
    return loss


# %% one step tags=["export"]
def train_step(config, model, batches, at):
    """Update a GPT2 once, or skip it; returns loss, rate, norm, skipped.

    batches: as in `accumulate`. at: a `Progress`, changed in place. skipped
    is 1 if the loss or the norm stood out, else 0. Raises
    FloatingPointError when one is not finite, before the update, or after
    it where the GPU makes the step in one launch.
    """
    rate, settings = config.rate(at.step), _settings(config, model, at)
    most, whole = config.clip or math.inf, _in_one_launch(config, model)
    if whole:
        batch = batches.next_batch()
        loss, norm = model.step(*batch, most, **settings)
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
    names = "beta1", "beta2", "eps", "weight_decay"
    return {name: getattr(config, name) for name in names} | {
        "learning_rate": config.rate(at.step),
        "step": at.updates + 1,
        "decay": decaying(model.cfg),
    }


def _in_one_launch(config, model):
    """Whether nothing has to be decided between a gradient and its use."""
    decides = config.micro_batches > 1 or config.skip_loss or config.skip_norm
    return model.backend == "cuda" and not decides


# %% [markdown]
# AdamW counts its updates from 1, the schedule its steps from 0. Only the
# matrices and the two embedding tables decay;
# [chapter 1.12](12_adamw.ipynb) says why.
#
# On a GPU a whole step can be one launch (`step` of
# [chapter 1.15](15_model.ipynb)), if nothing has to be decided between its
# parts: one batch to an update, and no updates that are skipped. Then the
# loss is looked at when the update is done. A run whose loss is not finite
# ends there all the same, and its last state on the disk is from before.

# %% [markdown]
# ## Before the first step
#
# Three short functions make what the loop takes: the model, the two
# loaders, and the two landmarks of its loss, (1.16.1) and the unigram entropy
# of the very tokens that validation uses.


# %% the model and its batches tags=["export"]
def new_model(config, vocab_size):
    """The GPT2 that a run starts with, for a vocabulary of this size.

    Freshly initialised, or with the weights of `config.init`. Raises
    ValueError when these are for another vocabulary, and as `check_memory`
    and GPT2.from_checkpoint do.
    """
    from llmnb.model.gpt2 import GPT2

    names = "batch_size", "seq_len", "backend", "precision"
    how = {name: getattr(config, name) for name in names}
    if not config.init:
        cfg = config.model(vocab_size)
        check_memory(config, cfg)
        return GPT2(cfg, **how, seed=config.seed)
    path = weights_path(config.init)
    cfg = read_config(path)
    known, padded = cfg.vocab_size, -(-vocab_size // 128) * 128
    if not vocab_size <= known <= padded:
        raise ValueError(
            f"{path} knows {known} tokens, the text is made of {vocab_size}: "
            "choose the tokenizer that it was trained with"
        )
    check_memory(config, cfg)
    return GPT2.from_checkpoint(path, **how, tokens=vocab_size)


def check_memory(config, cfg):
    """Raise MemoryError when a run's model is more than fits in memory.

    cfg: the GPT2Config. All of the model counts here, as training writes to
    all of it; a GPU's memory answers for itself.
    """
    if config.backend != "cuda":
        dtype = np.float64 if config.precision == "fp64" else np.float32
        layout = gpt2_layout(cfg, config.batch_size, config.seq_len, dtype)
        check_room(sum(footprint(layout).values()))


# %% where the weights are tags=["export"]
def weights_path(path):
    """The newest weights in a run's folder; any other path as it is.

    They are in the newest state, unless model.bin was written at its step or
    later: config.json says at which. No clock is asked.
    """
    from llmnb.train.run import _step_of, states

    folder, model = Path(path), Path(path, "model.bin")
    last = states(folder)[-1:] if folder.is_dir() else []
    whole = model.is_file()
    if last and not (whole and model_step(folder) >= _step_of(last[0])):
        return last[0]
    return model if whole else folder


def model_step(folder):
    """The step at which a run's model.bin was written, or -1: not known."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        text = read_small(Path(folder, "config.json"), 1 << 20)
        return int(json.loads(text)["model_step"])
    return -1


# %% its batches tags=["export"]
def loaders(config, data):
    """The DataLoaders of a run: shuffled for training, fixed to validate.

    A shard of fewer tokens than one batch takes is left out. Raises
    ValueError when all are.
    """
    return (
        _loader(config, data.train_tokens, seed=config.seed),
        _loader(config, data.val_tokens, shuffle=False),
    )


# %% a loader of an array or of shards tags=["exporti"]
def _loader(config, tokens, **how):
    shape = config.batch_size, config.seq_len
    if not isinstance(tokens, Shards):
        return DataLoader([tokens], *shape, **how)
    pairs = zip(tokens.paths, tokens.lengths, strict=True)
    long = [path for path, n in pairs if n > math.prod(shape)]
    return DataLoader(long or tokens.paths, *shape, **how)


# %% the landmarks tags=["export"]
LANDMARK_TOKENS = 8_000_000  # training tokens that are counted


def landmarks(config, data):
    """The losses a run is measured against, in nats a token.

    Returns a dict: "uniform", log V; "unigram", what the token frequencies
    of the training text pay on the tokens that validation uses. Of a long
    training text a sample of `LANDMARK_TOKENS` is counted.
    """
    V = data.encoding.n_vocab
    batches = _loader(config, data.val_tokens, shuffle=False)
    count = min(config.eval_batches, batches.batches_per_epoch)
    targets = [batches.next_batch()[1].ravel().copy() for _ in range(count)]
    sample = sample_tokens(data.train_tokens, LANDMARK_TOKENS)
    unigram = unigram_entropy(sample, np.concatenate(targets), V)
    return {"uniform": math.log(V), "unigram": unigram}


# %% one model
V = data.encoding.n_vocab
model = new_model(config, V)
batches, validation = loaders(config, data)
marks = landmarks(config, data)
count = sum(x.size for x in model.params.values())
print(f"V {V}, {count:,} parameters")
verdict("landmarks", marks["unigram"] < marks["uniform"], "counting helps")

# %% [markdown]
# What will the very first loss be? The last LayerNorm makes vectors $x$ of
# $C$ channels with variance 1, and the logits are their products with the
# rows of `wte`, drawn from $N(0, \sigma^2)$ with $\sigma = 0.02$. A sum of
# $C$ products is close to normal with variance $s^2 = C \sigma^2$. If the
# logits $z_v$ are such numbers and independent of the target, the loss is
#
# $$ \mathbb E \Bigl[ \log \sum_v e^{z_v} - z_\text{target} \Bigr]
#    \approx \log \bigl( V\, \mathbb E\, e^{z} \bigr) - 0
#    = \log V + \tfrac12 C \sigma^2 , \tag{1.16.9} $$
#
# because the mean of $e^z$ for a normal $z$ of variance $s^2$ is
# $e^{s^2/2}$. With 128 channels the excess over (1.16.1) is
# $\tfrac12 \cdot 128 \cdot 0.0004 = 0.0256$. A first loss that is far from
# this means that something is broken before training has begun: a wrong
# initialisation, or targets that are not shifted by one.

# %% the first loss, predicted
predicted = marks["uniform"] + config.channels * 0.02**2 / 2
first = evaluate(model, validation, config.eval_batches)
verdict("first loss", abs(first - predicted) < 0.05, "as predicted, +-0.05")

# %% [markdown]
# And how long will it take? A token costs $6N + 6LCT$ floating-point
# operations ([chapter 1.4](04_gpt2.ipynb)). Times the tokens of all steps:

# %% the work ahead
tokens = config.steps * config.batch_size * config.seq_len
L, C, T = config.num_layers, config.channels, config.seq_len
flops = tokens * (6 * count + 6 * L * C * T)
print(f"{tokens:,} tokens, {flops / 1e12:.2f} TFLOP")

# %% [markdown]
# ## The run
#
# `train` is a generator, so we may take its steps in portions and look in
# between. First one step, in which the kernels are compiled if this
# machine has not run them before:

# %% the first step
run = train(config, model, batches, validation)
steps = [next(run)]
verdict("step 0", steps[0].val_loss == first, "validates as before")
verdict("step 0", math.isfinite(steps[0].grad_norm), "gradient is finite")

# %% the first half
steps += islice(run, config.steps // 2 - 1)
half = np.mean([x.loss for x in steps[-20:]])
verdict("half way", half < marks["unigram"], "below the unigram entropy")

# %% the second half
steps += run
final = steps[-1].val_loss
verdict("at the end", steps[-1].step == config.steps, "all updates made")
verdict("at the end", final < half, "lower than half way")

# %% the numbers of this run tags=["nbval-ignore-output"]
print(f"{marks['uniform']:.4f}  a uniform guess")
print(f"{marks['unigram']:.4f}  the frequencies of the tokens")
print(f"{final:.4f}  the model, on text it has not seen")
speed = np.median([x.tokens_per_second for x in steps[:-1]])
print(f"{speed:,.0f} tokens a second")

# %% [markdown]
# ## See it
#
# The training loss of a single step is noisy: each batch is another handful
# of text, and some text is easier. The plot shows each step as a dot and
# draws a running mean through them. Validation uses many batches, the same
# each time, so its curve is smooth without help.


# %% draw the losses tags=["export"]
def draw_losses(ax, steps, landmarks):
    """Draw losses over steps into a matplotlib axes, with the landmarks.

    steps: list of `Step`. landmarks: dict from name to a loss, each drawn
    as a dashed line with its name.
    """
    from llmnb.book.diagram import PALETTE

    x, y = _series(steps, "loss")
    ax.plot(x, y, ".", color=PALETTE["grey"], ms=3, label="one batch")
    if len(y) >= 2 * SMOOTH:
        mean = np.convolve(y, np.ones(SMOOTH) / SMOOTH, "valid")
        middle = x[SMOOTH - 1 :] - (SMOOTH - 1) / 2
        label = f"mean of {SMOOTH} batches"
        ax.plot(middle, mean, color=PALETTE["blue"], label=label)
    x, y = _series(steps, "val_loss")
    ax.plot(x, y, "o-", color=PALETTE["orange"], ms=4, label="validation")
    for name, loss in landmarks.items():
        ax.axhline(loss, color=PALETTE["ink"], lw=1, ls="--")
        place = {"transform": ax.get_yaxis_transform(), "ha": "right"}
        ax.text(0.99, loss, name, va="bottom", parse_math=False, **place)
    ax.set(xlabel="step", ylabel="loss (nats a token)")
    ax.legend(frameon=False)


# %% points of a curve tags=["exporti"]
SMOOTH = 20  # steps in the running mean of the training loss


def _series(steps, name):
    points = [
        (s.step, getattr(s, name))
        for s in steps
        if getattr(s, name) is not None
    ]
    return np.array(points, float).reshape(-1, 2).T


# %% the loss curve
fig, ax = plt.subplots(figsize=(8, 4.5), dpi=100)
draw_losses(ax, steps, marks)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.16.2. The loss falls steeply from the uniform guess to the unigram
# entropy while the model learns which tokens are frequent, bends below it,
# and falls on more slowly as it learns what follows what. Validation runs a
# little above training and falls with it to the end.*
#
# A gap between the two curves can mean that the model memorises its
# training text. Exercise 1 shows that here it cannot.

# %% [markdown]
# ## Keep the run
#
# A run folder holds what it takes to use the model again, and to say where
# it came from:
#
# | file | what it holds |
# |---|---|
# | `config.json` | the `TrainConfig`, the corpus, the landmarks, versions |
# | `log.csv` | one line for every `Step` |
# | `loss.png` | the figure above |
# | `model.bin` | the weights, in the format of [chapter 1.13](13_memory.ipynb) |
# | `state_*.safetensors` | what it takes to go on; see *Nothing lost* |
# | `tokenizer.tiktoken` | the tokenizer's ranks |
#
# Each file is written beside its place and renamed into it, by `replacing`
# from [chapter 1.4](04_gpt2.ipynb). A run that is stopped in the middle of
# writing leaves the old file or the new one, and never half of one.
#
# The files are not equally dear. A log or a figure shows a run, the model
# *is* the run, and there are many ways for a picture to fail that have
# nothing to do with it: a font, a setting, a package that is missing. So the
# model is written first, and what only shows it may fail with a warning.
#
# Two writers are a danger too, so a run **locks** its folder
# ([chapter 4.1](../4_practice/01_files.ipynb)).


# %% a folder for a run tags=["export"]
def run_folder(path, force=False):
    """Make the folder of a run; returns it as a Path.

    Raises FileExistsError when it holds anything, unless `force`.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file, not a folder")
    make_folder(path)
    if any(x.name != LOCK for x in path.iterdir()) and not force:
        state = in_use(path) or "exists and is not empty"
        raise FileExistsError(f"{path} {state}")
    return path


# %% the log tags=["export"]
def write_log(path, steps):
    """Write a list of `Step` as CSV; what a step does not give stays empty."""
    lines = [",".join(Step._fields), *map(log_row, steps)]
    _write_text(path, "\n".join(lines) + "\n")


def log_row(step):
    """The row of a `Step` in a log: numbers with nine digits, and commas."""
    given = ("" if x is None else f"{x:.9g}" for x in step[1:])
    return ",".join([str(step.step), *given])


def _write_text(path, text):
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


# %% what may fail tags=["export"]
@contextmanager
def sparing(what):
    """Turn an error within into a warning that says what there is not."""
    try:
        yield
    except Exception as error:  # a picture can fail with any
        why = " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(f"goes on without {what}: {why}", stacklevel=3)


# %% the folder's files tags=["export"]
def save_run(folder, config, model, data, steps):
    """Write model.bin, config.json, the tokenizer, log.csv and loss.png.

    folder: the Path that `run_folder` made. steps: list of `Step`. A log or
    a figure that cannot be written is a warning.
    """
    model.save_checkpoint(folder / "model.bin")
    marks = write_record(folder, config, data)
    with sparing(folder / "log.csv"):
        write_log(folder / "log.csv", steps)
    with sparing(folder / "loss.png"):
        save_figure(folder / "loss.png", steps, marks)


# %% what a run was tags=["export"]
def write_record(folder, config, data):
    """Write tokenizer.tiktoken and config.json; returns the landmarks."""
    from llmnb.text import tokenizer

    folder, marks = Path(folder), landmarks(config, data)
    tokenizer.save(data.encoding, folder / "tokenizer.tiktoken")
    record = json.dumps(_facts(config, data, marks), indent=1)
    _write_text(folder / "config.json", record + "\n")
    return marks


def note_model(folder, step):
    """Note in config.json at which step model.bin was written."""
    path = Path(folder) / "config.json"
    record = json.loads(path.read_text("utf-8")) | {"model_step": step}
    _write_text(path, json.dumps(record, indent=1) + "\n")


# %% what is written down tags=["exporti"]
def _facts(config, data, marks):
    names = "llmnb", "numpy", "numba", "tiktoken"
    return {
        "config": asdict(config),
        "data": data.source,
        "train_tokens": len(data.train_tokens),
        "val_tokens": len(data.val_tokens),
        "landmarks": marks,
        "versions": {name: version(name) for name in names},
        "machine": machine(),
    }


# %% the figure tags=["export"]
def save_figure(path, steps, landmarks):
    """Write the loss curves of a run as PNG, needing no display.

    The user's own settings of matplotlib, such as fonts, are left aside.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context("default"), replacing(path) as file:
        figure = Figure(figsize=(8, 4.5), dpi=100, layout="tight")
        draw_losses(figure.subplots(), steps, landmarks)
        figure.savefig(file, format="png")


# %% [markdown]
# Reading it back builds the model at whatever batch size the reader needs:
# one row is enough to write a text.


# %% a run read back tags=["export"]
def load_run(folder, batch_size=1, seq_len=None, backend=None):
    """Read the model, the tokenizer and the TrainConfig of a run folder.

    seq_len and backend default to the run's own; of a run in TF32 the model
    computes in float32 on another backend. Raises OSError or ValueError, in
    one sentence, when a file is missing or damaged.
    """
    from llmnb.text import tokenizer
    from llmnb.model.gpt2 import GPT2

    folder = Path(folder)
    config = read_run(folder)
    backend, precision = backend or config.backend, config.precision
    if precision == "tf32" and backend != "cuda":
        precision = "fp32"
    encoding = tokenizer.load(folder / "tokenizer.tiktoken")
    model = GPT2.from_checkpoint(
        weights_path(folder),
        batch_size=batch_size,
        seq_len=seq_len or config.seq_len,
        backend=backend,
        precision=precision,
    )
    return model, encoding, config


# %% the numbers of a run, read back tags=["export"]
def read_run(folder):
    """The TrainConfig in a run folder's config.json.

    Raises OSError or ValueError, in one sentence, when it is missing or
    holds something else.
    """
    path = Path(folder) / "config.json"
    raw = read_small(path, 1 << 20)
    try:
        return config_from(json.loads(raw)["config"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = what_is(path) or error
        raise ValueError(f"{path} is not a run's: {what!s:.200}") from None


def config_from(found):
    """The TrainConfig of its fields, a dict as JSON holds them.

    Raises KeyError, TypeError or ValueError when it holds anything else.
    """
    config = TrainConfig(**{**found, "corpus": tuple(found["corpus"])})
    for each in fields(config):
        value = getattr(config, each.name)
        if type(value) not in (each.type, int if each.type is float else None):
            kind = each.type.__name__
            raise TypeError(f"{each.name} must be {kind}, got {value!r}")
    return config


# %% write and read back
from tempfile import TemporaryDirectory

with TemporaryDirectory() as folder:
    save_run(run_folder(folder), config, model, data, steps)
    print(*sorted(x.name for x in Path(folder).iterdir()))
    writer, encoding, same = load_run(folder)
verdict("read back", same == config, "the same numbers")
same = all(
    np.array_equal(writer.params[n], model.params[n]) for n in model.params
)
verdict("read back", same, "the same weights")

# %% [markdown]
# ## A sample
#
# The model gives a probability to every possible next token. Draw one,
# append it, ask again: that is all there is to writing text, and
# [chapter 1.17](17_writing.ipynb) does it with more care. The model
# returns logits for all `seq_len` positions. We read the one where our text
# ends; what stands behind it is padding, which causal attention cannot see.

# %% draw, append, repeat
rng = np.random.RandomState(13)


def continued(prompt, count):
    ids = [encoding.eot_token, *encoding.encode_ordinary(prompt)]
    window = np.zeros((1, config.seq_len), np.int32)
    for _ in range(count):
        last = ids[-config.seq_len :]
        window[0, : len(last)] = last
        writer.forward(window, None)
        logits = writer.logits[0, len(last) - 1].astype(np.float64)
        p = np.exp(logits - logits.max())
        ids.append(rng.choice(V, p=p / p.sum()))
    return encoding.decode(ids[1:])


# %% a text that nobody wrote tags=["nbval-ignore-output"]
print(continued("def read(self, name", 100))

# %% [markdown]
# It is not a program. But indentation, `self`, brackets, strings and
# comments stand where Python has them, and none of it was told to the
# model: it saw numbers from 0 to 1,023 and was asked for the next one.

# %% [markdown]
# ## Start from a trained model
#
# A model that has read the web knows English; to make it write like
# Shakespeare one goes on from its weights, with a small learning rate. This
# is **fine-tuning**, and the loop need not know: only the beginning
# differs. The shape comes from the checkpoint, and a wish for another one
# is refused. The tokenizer must be the one that the model was trained with:
# a run's folder holds it, and so do most model folders. Where nothing tells
# ([chapter 4.4](../4_practice/04_published.ipynb)), it has to be named.
#
# A run that is not over has no `model.bin` yet, or an old one; its newest
# state has the weights too. (`config.json` says at which step `model.bin` was
# written, so no clock has to tell which is the newer.) This is also the way
# out of a run whose loss is no number any more. Its learning rate cannot be
# changed, since a run is fixed by its numbers, but another run can begin where
# the last state was good, at a lower rate.


# %% a run from a checkpoint tags=["export"]
def starting_from(init, **given):
    """The TrainConfig of a run that starts from a checkpoint's weights.

    init: the path of a run's folder, or of what GPT2.from_checkpoint reads.
    given: other fields. Unless given, the learning rate is 1e-4, the
    tokenizer that of llmnb.formats.vocabulary.tokenizer_of, and seq_len no more than the
    checkpoint allows. Raises OSError or ValueError when it cannot be read,
    has another shape than is given, or no tokenizer is certain.
    """
    cfg, usual = read_config(weights_path(init)), {"learning_rate": 1e-4}
    usual["seq_len"] = min(TrainConfig.seq_len, cfg.max_seq_len)
    shape = {name: getattr(cfg, name) for name in SHAPE}
    asked = dict(given)
    if asked.get("depth"):
        asked |= zip(SHAPE, depth_shape(asked["depth"]), strict=True)
    for name, value in shape.items():
        if asked.get(name, value) != value:
            raise ValueError(
                f"{init} has {name} {value}, not {asked[name]}: leave out "
                "the shape, or do not start from it"
            )
    config = TrainConfig(**{**usual, **given, **shape, "init": str(init)})
    _check_range("seq_len", config.seq_len, 1, cfg.max_seq_len + 1)
    brought = Path(config.shards) / "tokenizer.tiktoken"
    if "tokenizer" in given or (config.shards and brought.is_file()):
        return config
    return replace(config, tokenizer=_hub().tokenizer_of(init, cfg.vocab_size))


# %% go on from the run above
with TemporaryDirectory() as folder:
    save_run(run_folder(folder), config, model, data, steps)
    tuning = starting_from(folder, steps=5)
    tuned = new_model(tuning, V)
    try:
        starting_from(folder, channels=64)
    except ValueError as error:
        print(str(error).replace(folder, "RUN"))
before = evaluate(tuned, loaders(tuning, data)[1], config.eval_batches)
verdict("fine-tuning", before == final, "begins where the run ended")

# %% [markdown]
# ## Proof: the same curve as PyTorch
#
# A falling loss does not prove that the arithmetic is right. A wrong
# gradient often points downhill too, and the model learns, only worse. So
# we compare with an implementation that shares no line with ours. PyTorch
# has trained the same model from the same seed on the same batches, and the
# loss of each of its 200 steps is recorded, once in float32 and once in
# float64. Two hundred steps are a severe test: an error in one step changes
# the weights of all later ones.
#
# The tokens come from a file this time, because the text of the standard
# library differs between Python versions. They are bytes of five modules of
# Python 3.11, and every byte is read once.

# %% the run that PyTorch recorded
recorded = Path("../../tests/data/torch_curve.csv").read_text("utf-8")
lines = recorded.splitlines()
rows = [x.split(",") for x in lines if x[0].isdigit()]
theirs, theirs64 = np.array(rows, float).T[1:]
print(*[x for x in lines if x.startswith(("# torch", "# seed"))], sep="\n")
print(len(theirs), "steps")

# %% [markdown]
# To keep each batch varied without a shuffle, the text is cut into eight
# equal parts and row $b$ of the batch reads part $b$ from its beginning,
# `seq_len` tokens a step. Whatever has a `next_batch` can feed `train`.


# %% eight readers of one text
class Readers:
    def __init__(self, tokens, B, T):
        tokens = np.array(tokens, np.int32)
        self.tokens = tokens[:-1].reshape(B, -1, T)
        self.targets = tokens[1:].reshape(B, -1, T)
        self.step = 0

    def next_batch(self):
        s, self.step = self.step, self.step + 1
        return self.tokens[:, s], self.targets[:, s]


# %% the same numbers for our run
from llmnb.formats.shard import read_shard

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


def curve(config, steps):
    student = new_model(config, 257)
    batches = Readers(text, config.batch_size, config.seq_len)
    run = islice(train(config, student, batches), steps)
    return np.array([x.loss for x in run])


# %% our curve
ours = curve(small, 200)
worst = np.abs(ours - theirs).max()
verdict("200 losses", worst < 1e-4, "within 1e-04 of PyTorch's")
verdict("a rerun", np.array_equal(curve(small, 40), ours[:40]), "equal bits")

# %% the largest difference tags=["nbval-ignore-output"]
print(f"ours and PyTorch's, at most {worst:.1e} apart")
print(f"PyTorch's own two, at most {np.abs(theirs - theirs64).max():.1e}")

# %% [markdown]
# Would the comparison notice a mistake? Make one that is hard to see in a
# falling loss: let the update count its steps from 2, so that AdamW's bias
# correction is off by one step.


# %% a mistake, seen in the curve
class Late:
    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def update(self, step, **numbers):
        self.model.update(step=step + 1, **numbers)


run = train(small, Late(new_model(small, 257)), Readers(text, 8, 64))
wrong = np.array([x.loss for x in islice(run, 60)])
verdict("the mistake", wrong[-1] < wrong[0] - 1, "learns all the same")
far = np.abs(wrong - theirs[:60]).max()
verdict("the mistake", far > 1e-3, "is far from the curve")

# %% two curves and their difference
fig, (top, low) = plt.subplots(
    2, 1, figsize=(8, 5.5), dpi=100, sharex=True, height_ratios=(2, 1)
)
top.plot(theirs, color=PALETTE["yellow"], lw=5, label="PyTorch")
top.plot(ours, color=PALETTE["blue"], lw=1.2, label="llmnb")
top.set(ylabel="loss (nats a byte)")
top.legend(frameon=False)
low.semilogy(np.abs(ours - theirs), color=PALETTE["blue"], label="llmnb")
low.semilogy(
    np.abs(theirs64 - theirs), color=PALETTE["orange"], label="PyTorch float64"
)
low.semilogy(
    np.abs(wrong - theirs[:60]), color=PALETTE["grey"], label="the mistake"
)
low.set(xlabel="step", ylabel="distance to PyTorch", ylim=(1e-8, 9))
low.legend(frameon=False, ncols=3)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.16.3. Our curve covers PyTorch's, bump for bump. Below, on a
# logarithmic scale, the distance to PyTorch's float32 run: ours is as small
# as that of PyTorch's own float64 run, and the mistake stands thousands of
# times further off.*
#
# The two runs cannot agree to the last digit, because float32 rounds and
# each implementation adds its sums in its own order. A difference in the
# eighth digit goes into the weights and is carried on. The orange line
# shows how far rounding alone takes PyTorch from itself: that is the scale
# on which to judge ours.
#
# The verdict on the rerun is stricter: our own run, repeated, gives the
# same bits. Every kernel takes its sums in one fixed order, so neither the
# number of threads nor their timing can change a digit; and
# [chapter 1.5](05_encoder.ipynb) sees to it that a process which has just
# compiled its kernels computes like one that finds them in the cache.
#
# **In bfloat16.** `precision="bf16"` rounds the factors of every product to
# 8 significant bits, and the products of its backward pass likewise. Then
# float32's agreement is out of reach: two correct programs need not round
# the same numbers. PyTorch's autocast also rounds the results of products,
# the logits among them, which we keep in float32. What can be asked is that
# the two stay together, and a yardstick is at hand: how far PyTorch's curve
# under autocast is from its own in float32.
#
# On a CPU with AVX512-BF16 the next cell runs on its instructions. On any
# other, `LLMNB_BF16=emulate` has the same pairs multiplied in float32,
# which is slower than float32 itself but rounds the factors the same.

# %% the curve in bfloat16
import os
from dataclasses import replace
from unittest.mock import patch

recorded = Path("../../tests/data/torch_curve_bf16.csv").read_text("utf-8")
rows = [x.split(",") for x in recorded.splitlines() if x[0].isdigit()]
their_half = np.array(rows, float).T[1]
with patch.dict(os.environ, LLMNB_BF16="emulate"):
    half = curve(replace(small, precision="bf16"), 200)


def distance(x, y):
    return np.sqrt(np.mean((x - y) ** 2))


apart, yardstick = distance(half, their_half), distance(theirs, their_half)
worst = np.abs(half - their_half).max()
verdict("200 losses", worst < 3e-3, "in bf16 within 3e-03 of PyTorch's")
verdict("on average", apart < 0.75 * yardstick, "closer than its float32 is")

# %% three distances tags=["nbval-ignore-output"]
print("root mean square of the difference over 200 steps, and the largest:")
for name, x, y in (
    ("ours and PyTorch's, both bf16", half, their_half),
    ("PyTorch's, bf16 and float32", their_half, theirs),
    ("ours, bf16 and float32", half, ours),
):
    print(f"{name:<30}{distance(x, y):.1e}  {np.abs(x - y).max():.1e}")

# %% draw the differences
fig, ax = plt.subplots(figsize=(8, 3.2), dpi=100)
difference = 1e3 * (their_half - theirs)
ax.plot(difference, color=PALETTE["orange"], label="PyTorch bf16")
ax.plot(1e3 * (half - theirs), color=PALETTE["blue"], label="llmnb bf16")
ax.axhline(0, color=PALETTE["grey"], lw=1)
ax.set(xlabel="step", ylabel="loss minus float32's, in 1/1000")
ax.legend(frameon=False, ncols=2)
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.16.4. What bfloat16 changes in the loss, against PyTorch's float32
# run. Both curves rise and fall about zero by a few thousandths at most,
# and largely together.*
#
# They move together because most of the deviation comes from rounding the
# same weights and the same inputs of the products, which both programs do.
# So the second verdict has teeth: a run that forgot to round would be our
# float32 curve, which lies on PyTorch's, as far off as the yardstick. What
# is left between the two comes from what only PyTorch rounds, and from
# sums taken in another order, and like any rounding it is carried on from
# step to step.

# %% [markdown]
# ## Proof: pieces and skips
#
# Equation (1.16.5) says that four batches of two rows have the gradient of
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
# updates whose loss lies six standard deviations above the last 32, and a
# third is spared the garbage.


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
# *Figure 1.16.5. One batch of random bytes, at the dashed line, and what it
# costs the steps behind it. The run that takes the batch still pays for it
# thirty steps later; the run that skips it stays close to the run that was
# spared, one batch behind.*

# %% [markdown]
# ## Nothing lost
#
# A run of a week will be interrupted: a power cut, a full disk, a machine
# that is wanted for something else. What must be on disk so that it can go
# on as if nothing had happened? Not roughly, but **to the last bit**: a run
# that was cut and resumed shall end with the weights of one that was not.
#
# The loop is a function from a state to the next. So the question is what
# it reads that changes. Go through its lines:
#
# | what | read by | kept as |
# |---|---|---|
# | the weights | `forward` | `params` |
# | AdamW's two averages | `update` | `m`, `v` |
# | the place in the data | `next_batch` | epoch, shard, position |
# | the steps taken | the schedule, validation | `step` |
# | the updates made | AdamW's bias correction | `updates` |
# | the two windows | skipping | `losses`, `norms` |
#
# *Table 14.1. All that one step hands to the next.*
#
# What is not in the table matters as much. Activations and gradients are
# overwritten in each step before they are read. There is no generator with
# a hidden state: the loader draws the order of an epoch anew from the seed
# and the epoch's number ([chapter 1.2](02_tokens.ipynb)), a sample has a seed
# of its own, and the first weights are drawn once. And some things decide
# the next step but never change: the configuration, the text, the program,
# the machine. We keep the first, compare the second, and write down the
# others, to warn when they have changed.
#
# The claim is that the table is complete. Below we drop one row after the
# other, and see the run go astray each time; and with all rows, not at all.

# %% imports of the run tags=["export"] module="train.run"
import errno
import json
import math
import os
import platform
import re
import shlex
import warnings
import zlib
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields, replace
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmnb.arena import put
from llmnb.formats.checkpoint import STATE, first_not_finite, state_record
from llmnb.config import GPT2Config
from llmnb.model.tensors import parameter_shapes
from llmnb.formats.llmc import HEADER_BYTES
from llmnb.formats.shard import shard_length
from llmnb.text.data import DataLoader
from llmnb.files import BESIDE, replacing
from llmnb.files import Lock
from llmnb.formats.safetensors import TensorFile, write_tensors
from llmnb.train.train import (
    SHAPE,
    Data,
    Progress,
    Step,
    TrainConfig,
    check_memory,
    config_from,
    landmarks,
    loaders,
    log_row,
    new_model,
    note_model,
    prepare,
    read_run,
    save_figure,
    sparing,
    train,
    write_log,
    write_record,
)


# %% a run tags=["export"] module="train.run"
class Run(NamedTuple):
    """A run in progress: all that `follow` works with.

    folder: a Path. model: a GPT2. batches, validation: DataLoaders. at: the
    Progress. text: a fingerprint of the text, see `fingerprint`. begun: the
    `surroundings` at its beginning. kept: the steps of the states to go on
    from, the oldest first. lock: the folder's, see `Lock`.
    """

    folder: Path
    config: TrainConfig
    data: Data
    model: object
    batches: DataLoader
    validation: DataLoader
    at: Progress
    text: list
    begun: dict
    kept: list
    lock: Lock


# %% what text it is tags=["export"] module="train.run"
def fingerprint(*batches):
    """What tells one text from another, for JSON.

    For each DataLoader: the number of its batches, and a sha256 of all
    tokens of all its shards. One shard is open at a time.
    """
    return [[x.batches_per_epoch, _digest(x.shards)] for x in batches]


def _digest(shards):
    """A sha256 of tokens, each as two bytes, and of where shards end."""
    digest = sha256()
    for shard in shards:
        path = isinstance(shard, (str, os.PathLike))
        length = shard_length(shard) if path else len(shard)
        digest.update(length.to_bytes(8, "little"))
        for part in _parts_of_file(shard) if path else _parts(shard):
            digest.update(part)
    return digest.hexdigest()


def _parts(tokens, size=1 << 20):
    for at in range(0, len(tokens), size):
        yield np.ascontiguousarray(tokens[at : at + size], "<u2")


def _parts_of_file(path, size=1 << 21):
    """Its tokens as bytes; read, for to map a file is to die if it is cut."""
    with open(path, "rb") as file:
        file.seek(HEADER_BYTES)
        while part := file.read(size):
            yield part


def _first_batches(batches):
    """What stood for `fingerprint` once: it saw the first batch alone."""
    found = []
    for loader in batches:
        loader.reset()
        first = zlib.crc32(b"".join(x.tobytes() for x in loader.next_batch()))
        loader.reset()
        found.append([loader.batches_per_epoch, first])
    return found


# %% [markdown]
# The whole text is read for that, once, when a run begins or goes on. A core
# gets through about a gigabyte in a second, half a billion tokens: seconds
# before a run of days.
#
# The program and the machine leave their mark as well. Another version of
# numba, or a processor with other vectors, may add in another order and so end
# in other bits. All of that is written down when a run begins.

# %% what else decides the bits tags=["export"] module="train.run"
SETTINGS = (
    "LLMNB_BF16", "LLMNB_CUDA", "LLMNB_MATMUL", "LLMNB_TILE",
    "NUMBA_BOUNDSCHECK", "NUMBA_CPU_FEATURES", "NUMBA_CPU_NAME",
    "NUMBA_DISABLE_JIT", "NUMBA_LOOP_VECTORIZE", "NUMBA_OPT",
    "NUMBA_SLP_VECTORIZE",
)  # fmt: skip


def surroundings(backend="cpu"):
    """What the bits of a run depend on besides its options and its text.

    A dict of str to str: versions, the processor and its features, the GPU
    if that is the backend, and the variables in `SETTINGS` that are set.
    """
    from llmnb.cpu.tile import cpu_features

    names = "llmnb", "numpy", "numba", "llvmlite"
    found = {name: version(name) for name in names}
    found["Python"] = ".".join(platform.python_version_tuple()[:2])
    found["processor"] = f"{platform.system()} {platform.machine()}"
    found["features"] = " ".join(sorted(cpu_features()))
    if backend == "cuda":
        from llmnb.cuda.model import gpu

        found["numba-cuda"], found["GPU"] = _version("numba-cuda"), gpu()
    chosen = {x: os.environ[x] for x in SETTINGS if x in os.environ}
    return found | chosen


def _version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _differences(begun, now):
    """A list of one sentence on what has changed, or an empty one."""
    found = []
    for name in sorted(begun | now):
        pair = [str(x.get(name, "none")) for x in (begun, now)]
        words = [set(x.split()) for x in pair]
        if name == "features":  # a hundred words: those that differ
            pair = [" ".join(sorted(words[i] - words[1 - i])) for i in (0, 1)]
        if words[0] != words[1]:
            found.append(
                f"{name} {pair[0] or 'none'}, now {pair[1] or 'none'}"
            )
    if not found:
        return []
    return [
        "the weights may differ in their last bits from those of a run that "
        f"was not interrupted: it began with {'; '.join(found)}"
    ]


# %% [markdown]
# The arrays go into one file in the format of
# [chapter 1.13](13_memory.ipynb), written from where they lie; everything else
# is a few numbers and goes into its header as JSON. Python writes a float
# with as many digits as it takes to read the same float back, so the
# windows survive the detour through text.
#
# Such a file may live on a disk for months. A checksum for each array, and
# one for the record, tell later that every bit is still what it was.
#
# A state takes the place of an older one, so it must be worth it. The update
# itself can spoil the weights, and the next loss, which would show it, has
# not been computed yet. So all arrays are looked at before they are written.


# %% save the state tags=["export"] module="train.run"
GROUPS = "params", "m", "v"


def save_state(run):
    """Write the state of a run into its folder; return the path.

    The file appears whole or not at all. Then all up to this step are
    removed but the newest `config.keep` that the run itself has written or
    gone on from. Those from beyond the step, which may be damaged, stay
    until the run has come there. Raises FloatingPointError, and keeps what
    there is, when an array is not finite.
    """
    memory, path = run.model.memory, state_path(run.folder, run.at.step)
    tensors = {
        f"{group}.{name}": np.asarray(memory[group][name])  # from a GPU too
        for group in GROUPS
        for name in parameter_shapes(run.model.cfg)
    }
    wrong = first_not_finite(tensors)
    if wrong:
        raise FloatingPointError(
            f"after the update at step {run.at.step - 1}, {wrong}: try a "
            "lower learning rate or a longer warm-up"
        )
    record = {
        "config": asdict(run.config),
        "model": asdict(run.model.cfg),
        "progress": asdict(run.at),
        "place": run.batches.state,
        "text": run.text,
        "begun": run.begun,
        "sums": {name: zlib.crc32(x) for name, x in tensors.items()},
    }
    record = json.dumps(record)
    check = str(zlib.crc32(record.encode()))
    note = {"format": STATE, "record": record, "sum": check}
    run.lock.check()
    write_tensors(path, tensors, note)
    _forget_old(run)
    return path


def _forget_old(run):
    step, kept = run.at.step, run.kept
    kept[:] = [*(x for x in kept if x < step), step][-run.config.keep :]
    for old in states(run.folder):
        if _step_of(old) <= step and _step_of(old) not in kept:
            old.unlink()


# %% the files of the states tags=["export"] module="train.run"
def state_path(folder, step):
    """Where the state after so many steps is kept."""
    return Path(folder) / f"state_{step:08d}.safetensors"


def states(folder):
    """The paths of the states in a run's folder, the oldest first.

    Only what `state_path` names: no file of another name is a state.
    """
    found = Path(folder).glob("state_*.safetensors")
    return sorted(filter(_is_state, found), key=_step_of)


def _is_state(path):
    digits = path.stem.removeprefix("state_")
    return bool(re.fullmatch("[0-9]{8}|[1-9][0-9]{8,17}", digits))


def _step_of(path):
    """The step of a state, from its name."""
    return int(path.stem.removeprefix("state_"))


# %% [markdown]
# **Why a rename is enough.** A system keeps a folder as a table from names
# to files. `replacing` writes the new file under another name, asks the
# system to bring its bytes to the disk (`fsync`), and then has the name
# moved, which changes one entry of the table. A process can be killed
# before that change or after it; there is no moment in between at which the
# name leads to half a file. What a kill can leave is the unfinished file
# under its other name, which nobody reads and the next start sweeps away.
#
# The old states are removed only when the new one has its name, on the disk
# too. So at every moment there is at least one whole state, once there has been
# one. Only `state_` and digits make a state: a copy that you keep beside them
# under a name of your own is neither gone on from nor removed.
#
# Reading trusts nothing. All is checked, each array against its checksum,
# before a single weight is touched.


# %% a state read back tags=["export"] module="train.run"
class State(NamedTuple):
    """What a file of `save_state` holds, but for the arrays.

    cfg: the model's GPT2Config. place: of the DataLoader. text: as
    `fingerprint` gives it. begun: as `surroundings` gives it, or empty.
    """

    path: Path
    config: TrainConfig
    cfg: GPT2Config
    at: Progress
    place: dict
    text: list
    begun: dict


# %% read and check tags=["export"] module="train.run"
def read_state(path):
    """Read and check a state; returns a `State`, whose arrays are not kept.

    Raises OSError when it cannot be read, and ValueError, naming the file
    and the defect, when it is not whole: names, shapes, types and checksums
    of all arrays are checked.
    """
    file = TensorFile(path)
    try:
        record = state_record(file)
        state = State(
            Path(path),
            config_from(record["config"]),
            GPT2Config(**record["model"]),
            Progress(**record["progress"]),
            record["place"],
            record["text"],
            dict(record.get("begun", {})),
        )
        _check_progress(state.at)
        _check_arrays(file, state, record["sums"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole state: {error}") from None
    return state


# %% its parts tags=["exporti"] module="train.run"
def _check_progress(at):
    whole = all(isinstance(x, int) for x in (at.step, at.updates))
    known = [x for x in (at.last_loss, at.best_loss) if x is not None]
    numbers = at.losses + at.norms + known
    floats = all(isinstance(x, float) and math.isfinite(x) for x in numbers)
    if not (whole and floats and 0 <= at.updates <= at.step):
        raise ValueError(f"its progress makes no sense: {at}")


def _check_arrays(file, state, sums):
    kind = "F64" if state.config.precision == "fp64" else "F32"
    shapes = parameter_shapes(state.cfg)
    want = {f"{g}.{n}": (kind, s) for g in GROUPS for n, s in shapes.items()}
    got = {name: (file.dtype(name), file.shape(name)) for name in file.names}
    for name in want | got:
        if got.get(name) != want.get(name):
            raise ValueError(
                f"{name} must be {want.get(name)}, got {got.get(name)}"
            )
        if zlib.crc32(file[name]) != sums[name]:
            raise ValueError(f"{name} is damaged")


# %% the model of a state tags=["export"] module="train.run"
def restore(state):
    """The GPT2 of a `State`: its weights and AdamW's averages."""
    from llmnb.model.gpt2 import GPT2

    names = "batch_size", "seq_len", "backend", "precision"
    how = {name: getattr(state.config, name) for name in names}
    check_memory(state.config, state.cfg)
    model, file = GPT2(state.cfg, **how, seed=None), TensorFile(state.path)
    for group in GROUPS:
        for name, x in model.memory[group].items():
            put(x, file[f"{group}.{name}"])
    return model


# %% the newest state that is whole tags=["export"] module="train.run"
def newest_state(folder):
    """The newest whole state in a folder, and what is wrong with newer ones.

    Returns (a `State` or None when there is none, a list of sentences).
    Raises ValueError when there are states and none of them is whole.
    """
    wrong = []
    for path in reversed(states(folder)):
        try:
            return read_state(path), wrong
        except (OSError, ValueError) as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError(f"{folder} has no state to go on from: {wrong[0]}")
    return None, wrong


# %% [markdown]
# **The log** is another matter: a row is added at each step, and rewriting
# the whole file each time would take longer and longer. So it is appended
# to, and handed to the system after each row; a kill can leave half a row
# at its end. That does no harm, since resuming drops every row at or after
# the state's step. They will be written again, with the same numbers. Only
# when a state is kept need the rows before it be safe on the disk too.
#
# A log is also what people open in other programs, sort, and save again. A
# row that is none any more is left out, and said, and the others count. And
# as long as such a program keeps the file to itself, the rows wait.


# %% the log of a run tags=["export"] module="train.run"
def start_log(path, step=0):
    """Begin a log.csv, or keep of an old one the rows before a step."""
    old = read_steps(path) if step and Path(path).exists() else []
    rows = [row for row in old if row.step < step]
    if rows:
        write_log(path, rows)
    else:
        Path(path).write_bytes((",".join(Step._fields) + "\n").encode())


def add_to_log(path, *steps):
    """Add the row of each `Step` to a log."""
    rows = "".join(f"{log_row(step)}\n" for step in steps)
    with open(path, "ab") as file:
        file.write(rows.encode())


# %% rows that wait tags=["exporti"] module="train.run"
def _log(path, rows):
    """Add rows to a log; returns those that must wait for it."""
    try:
        add_to_log(path, *rows)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise  # the next state would have no room either
        if len(rows) == 1:
            why = error.strerror or error
            warnings.warn(
                f"{path}: {why}; rows wait until it can be written",
                stacklevel=3,
            )
        return rows
    return []


# %% rows safe on the disk tags=["export"] module="train.run"
def sync_log(path):
    """Have the system bring all rows of a log to the disk."""
    with open(path, "ab") as file:
        os.fsync(file.fileno())


# %% a log read back tags=["export"] module="train.run"
ROW = 1000  # characters that a row has at most


def read_rows(path, columns=None):
    """The columns of a log.csv, and an iterator over its lines.

    columns: their names in a log that does not begin with them; None: it
    must. The iterator yields a line's number, its row, a dict from name to
    number or None, and None; or, for a line that is no row, None and what is
    wrong with it. A last line without an end is left out. Raises OSError, or
    ValueError naming the file.
    """
    lines, start = _lines(path), 2
    head = next(lines, "")
    names = head.split(",")
    if names[0] == "step" and len({*names}) == len(names):
        columns = names
    elif columns is None:
        raise ValueError(
            f"{path}: the first line must name the columns, step first"
        )
    elif head:
        lines, start = chain([head], lines), 1
    return columns, _rows(columns, enumerate(lines, start))


# %% line by line tags=["exporti"] module="train.run"
def _lines(path):
    """The lines of a text that have an end, without it."""
    how = {"encoding": "utf-8-sig", "errors": "replace", "newline": "\n"}
    with open(path, **how) as file:
        for line in file:
            if line.endswith("\n"):
                yield line.rstrip("\r\n")


def _rows(names, lines):
    for number, line in lines:
        try:
            yield number, _row(names, line), None
        except ValueError as error:
            yield number, None, str(error)


# %% one row tags=["exporti"] module="train.run"
def _row(names, line):
    """A line as a dict from name to number, or ValueError."""
    if len(line) > ROW:
        raise ValueError(
            f"must have at most {ROW:,} characters, has {len(line):,}"
        )
    words = line.split(",")
    if len(words) != len(names):
        raise ValueError(f"must have {len(names)} values, has {len(words)}")
    if not words[0]:
        raise ValueError("has no step")
    try:
        row = [float(x) if x else None for x in words]
    except ValueError:
        row = [math.nan]
    if not all(x is None or math.isfinite(x) for x in row):
        raise ValueError(f"must hold numbers, not {line[:80]!r}")
    if not row[0].is_integer():
        raise ValueError(f"must begin with a whole number, not {words[0]}")
    return dict(zip(names, row, strict=True))


# %% the steps of a log tags=["export"] module="train.run"
def read_steps(path):
    """The rows of a log.csv as a list of `Step`.

    A line that is none is left out, and a warning says which. Raises
    OSError.
    """
    steps, left_out = [], []
    _, *names = Step._fields
    for line, row, wrong in read_rows(path, Step._fields)[1]:
        if wrong:
            left_out.append(f"line {line} ({wrong})")
        else:
            steps.append(Step(int(row["step"]), *map(row.get, names)))
    if left_out:
        said, more = ", ".join(left_out[:3]), len(left_out) - 3
        said += f", and {more} more" if more > 0 else ""
        warnings.warn(f"{path}: left out {said}", stacklevel=2)
    return steps


# %% [markdown]
# A run **begins** with its configuration and its tokenizer on disk, so that
# a kill in the very first steps loses nothing that matters: without a state
# it begins anew, and as it depends on nothing but these, it takes the same
# way. To **resume** is to build the same loaders, check that they hold the
# same text, and take over the newest whole state. A few options may change
# on the way, those that do not touch the path of the weights, and the
# number of steps, for a run that shall go on longer. The text may lie in
# another place by now, as long as it is the same.


# %% begin a run tags=["export"] module="train.run"
def begin(folder, config):
    """Make ready a new run in an existing folder; returns a `Run`.

    Locks the folder until `finish`, or until the Run is gone. Writes
    config.json and the tokenizer, and removes the states of an older run
    there. Raises ValueError, OSError, RuntimeError or MemoryError.
    """
    folder = Path(folder)
    with ExitStack() as undo:
        lock = undo.enter_context(Lock(folder))
        data = prepare(config)
        feeds = loaders(config, data)
        model = new_model(config, data.encoding.n_vocab)
        begun = surroundings(config.backend)
        record = fingerprint(*feeds), begun, [], lock
        _sweep(folder, states(folder))
        write_record(folder, config, data)
        undo.pop_all()  # the lock stays
    return Run(folder, config, data, model, *feeds, Progress(), *record)


# %% what a kill leaves tags=["exporti"] module="train.run"
HALF = re.compile(
    r"(config\.json|log\.csv|loss\.png|model\.bin|sample\.txt"
    r"|state_[0-9]+\.safetensors|tokenizer\.tiktoken)" + BESIDE
)


def _sweep(folder, old=()):
    """Remove old states, and what was left half written."""
    half = [x for x in folder.iterdir() if HALF.fullmatch(x.name)]
    for path in [*old, *half]:
        path.unlink()


# %% what may change tags=["export"] module="train.run"
CHANGEABLE = (
    "steps", "eval_every", "eval_batches", "save_every", "keep",
    "sample_every", "corpus", "shards",
)  # fmt: skip


# %% go on with a run tags=["export"] module="train.run"
def resume(folder, **changes):
    """Take up the run in a folder; returns a `Run` and a list of warnings.

    changes: fields of the TrainConfig, of which only those in `CHANGEABLE`
    may differ from the run's; `corpus` and `shards` say where the text is
    now. The folder is locked as by `begin`. The warnings say which newer
    states are damaged, and what else has changed since the beginning that
    may change bits. Nothing is written before all is checked. Raises
    OSError or ValueError when the folder holds no run, no state of it is
    whole, or the text is not the one it began with.
    """
    folder = Path(folder)
    read_run(folder)  # only a run is locked
    with ExitStack() as undo:
        lock = undo.enter_context(Lock(folder))
        config = _changed(folder, changes)
        state, warnings = newest_state(folder)
        data = _same_data(folder, config, state)
        feeds = loaders(config, data)
        text, begun = fingerprint(*feeds), surroundings(config.backend)
        if state:
            warnings += _check_text(state, text, feeds)
            warnings += _differences(state.begun or begun, begun)
            feeds[0].state, begun = state.place, state.begun or begun
            model, at = restore(state._replace(config=config)), state.at
        else:
            model, at = new_model(config, data.encoding.n_vocab), Progress()
        kept = [x for x in map(_step_of, states(folder)) if x <= at.step]
        _sweep(folder)
        write_record(folder, config, data)
        undo.pop_all()  # the lock stays
    record = at, text, begun, kept, lock
    return Run(folder, config, data, model, *feeds, *record), warnings


# %% the text again tags=["exporti"] module="train.run"
def _same_data(folder, config, state):
    """The Data of a run that goes on, if the state goes with it."""
    if state:
        _check_run(state, config)
    own = str(folder / "tokenizer.tiktoken")
    try:
        return prepare(replace(config, tokenizer=own))
    except FileNotFoundError as error:
        if error.filename == own:
            raise
        raise FileNotFoundError(
            f"{error}; if the text has moved, name its new place with "
            "--corpus or --shards"
        ) from None


def _check_text(state, text, feeds):
    """Raise if the text is another; warn if that cannot be said for sure."""
    if state.text == text:
        return []
    if state.text == _first_batches(feeds):
        return [
            f"{state.path} was written by an older llmnb: only the first "
            "batch of the text was compared"
        ]
    folder = state.path.parent
    raise ValueError(f"{folder}: the text is not the one it began with")


# %% change it tags=["exporti"] module="train.run"
def _changed(folder, changes):
    """The run's configuration with changes, if they are possible."""
    config = read_run(folder)
    if "corpus" in changes:  # shards come first where both are given
        changes = {"shards": "", **changes}
    for name, value in changes.items():
        was = getattr(config, name)
        if value != was and name not in CHANGEABLE:
            raise ValueError(
                f"{name} of a run in progress cannot change: {folder} has "
                f"{was}, got {value}"
            )
    return replace(config, **changes)


def _check_run(state, config):
    """Raise unless the state is this run's, and not beyond its end."""
    names = {name: getattr(config, name) for name in CHANGEABLE}
    if replace(state.config, **names) != config:
        raise ValueError(f"{state.path} is of a run with other options")
    if state.at.step > config.steps:
        raise ValueError(
            f"steps must be at least {state.at.step}, which are done, "
            f"got {config.steps}"
        )


# %% [markdown]
# The loop needs no change. `follow` wraps one generator into another: it
# takes each step from `train`, writes its row, saves the state when it is
# time, and hands the step on.


# %% train and keep tags=["export"] module="train.run"
def follow(run):
    """Train a `Run` to its end; yield each `Step`, its row in the log.

    Writes the state every `config.save_every` steps and after the last.
    Raises OSError, in one sentence that says which checkpoint is the last
    good one, when something cannot be written; and as `train` does.
    """
    config, at, log = run.config, run.at, run.folder / "log.csv"
    steps, rows = train(config, run.model, run.batches, run.validation, at), []
    with telling(run):
        run.lock.check(hold=True)
        start_log(log, at.step)
        for step in steps:
            run.lock.check(hold=True)
            rows = _log(log, [*rows, step])
            due = config.save_every and at.step % config.save_every == 0
            if step.loss is not None and (due or at.step == config.steps):
                if not rows:
                    sync_log(log)
                save_state(run)
            yield step


# %% the end of a run tags=["export"] module="train.run"
def finish(run):
    """Write model.bin, then loss.png, at any step; returns the log's steps.

    A log without the lines that do not count takes the old one's place. When
    a log or a figure fails, that is a warning; a model raises as `follow`
    does. Then the folder is no longer locked.
    """
    log, figure, steps = run.folder / "log.csv", run.folder / "loss.png", []
    with telling(run):
        run.lock.check(hold=True)
        run.model.save_checkpoint(run.folder / "model.bin")
        note_model(run.folder, run.at.step)
    with sparing(log):
        steps = read_steps(log)
        write_log(log, steps)
    with sparing(figure):
        save_figure(figure, steps, landmarks(run.config, run.data))
    run.lock.release()
    return steps


# %% what is left when it fails tags=["export"] module="train.run"
@contextmanager
def telling(run):
    """Make an error within say what is left, and what to do.

    An OSError names the last good checkpoint; a FloatingPointError a command
    that starts from it, at half the learning rate.
    """
    try:
        yield
    except BlockingIOError:  # the folder is another's
        raise
    except FloatingPointError as error:
        raise FloatingPointError(f"{error}: {_gentler(run)}") from error
    except OSError as error:
        what, kept = error.strerror or str(error), _kept(run)
        left = (
            f"the last checkpoint is {kept[-1].name}"
            if kept
            else ("there is no checkpoint yet")
        )
        raise OSError(f"{error.filename or run.folder}: {what}; {left}") from (
            error
        )


def _kept(run):
    """The states it has written or gone on from, the oldest first."""
    return [state_path(run.folder, step) for step in run.kept]


# %% the same at half the rate tags=["exporti"] module="train.run"
def _gentler(run):
    """The command of a run, from its last state on, at half the rate."""
    config, now = run.config, state_path(run.folder, run.at.step)
    # a state of this very step has the weights that gave no number
    kept = [x for x in _kept(run) if x != now]
    asked = {"learning_rate": float(f"{config.learning_rate / 2:.3g}")}
    for each in fields(config):
        value = getattr(config, each.name)
        if value != each.default:
            asked.setdefault(each.name, value)
    for name in SHAPE if config.depth or kept else ():
        asked.pop(name, None)  # the depth or the state says them
    if kept:
        for name in ("init", "depth", "tokenizer", "vocab_size"):
            asked.pop(name, None)
        asked = {"init": kept[-1]} | asked
    words = ["llmnb", "train"]
    for name, value in asked.items():
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += map(str, value if type(value) is tuple else [value])
    return shlex.join(words)


# %% [markdown]
# Now the proof. The run is small, and chosen so that every row of the table
# has work to do: it accumulates, it skips some updates, and a state is kept
# every five steps. First it runs straight to its end.

# %% a run with everything in it
from llmnb.model.tensors import parameter_count
from llmnb.model.init import init_params

place = TemporaryDirectory()
page = Path(place.name, "page.txt")
letters = text[:40_000][text[:40_000] < 256].astype(np.uint8)
excerpt = bytes(letters).decode("utf-8", "ignore")
page.write_text(excerpt, "utf-8")
careful = TrainConfig(
    corpus=(str(page),), tokenizer="byte", num_layers=1, num_heads=2,
    channels=32, seq_len=32, batch_size=2, total_batch=128, steps=20,
    eval_every=8, eval_batches=2, skip_loss=1.0, skip_norm=1.0,
    skip_window=8, save_every=5,
)  # fmt: skip


def straight(folder, config):
    run = begin(run_folder(folder), config)
    return run, list(follow(run))


first, steps_of = straight(Path(place.name, "straight"), careful)
finish(first)
whole = first.model.memory.flat("params").copy()
skipped = [x.step for x in steps_of if x.skipped]
print("skipped", skipped)
verdict("skips", skipped[0] < 10 < skipped[-1], "before and after step 10")
print(*sorted(x.name for x in first.folder.iterdir()), sep="\n")

# %% [markdown]
# Then one that is cut down at step 13. Leaving the generator is what a kill
# does: the arrays in memory are gone, and the folder is as it was. The last
# state is that of step 10, the log has rows beyond it.


# %% cut and resumed
def cut(folder, config, forget=lambda run: None):
    run = begin(run_folder(folder, force=True), config)
    list(islice(follow(run), 13))
    run, _ = resume(folder)
    forget(run)
    list(follow(run))
    return run


second = cut(Path(place.name, "cut"), careful)
finish(second)
verdict("resumed", second.at == first.at, "at the same place")
for name in ("model.bin", "state_00000020.safetensors", "loss.png"):
    same = [(x.folder / name).read_bytes() for x in (first, second)]
    verdict(name, same[0] == same[1], "the same bytes")
rows = [
    [step._replace(tokens_per_second=None) for step in read_steps(x)]
    for x in (first.folder / "log.csv", second.folder / "log.csv")
]
verdict("log.csv", rows[0] == rows[1], "the same rows, but for the speed")

# %% [markdown]
# The same bytes, in every file. Would we have noticed if the state were not
# complete? Forget one row of table 14.1 at a time:


# %% forget one thing
def zero(group):
    return lambda run: run.model.memory.flat(group).fill(0)


ITEMS = {
    "weights": lambda run: init_params(run.model.params, run.model.cfg, 42),
    "m": zero("m"),
    "v": zero("v"),
    "place": lambda run: run.batches.reset(),
    "step": lambda run: setattr(run.at, "step", 9),
    "updates": lambda run: setattr(run.at, "updates", run.at.step),
    "windows": lambda run: (run.at.losses.clear(), run.at.norms.clear()),
}
for name, forget in ITEMS.items():
    run = cut(Path(place.name, "forgetful"), careful, forget)
    same = np.array_equal(run.model.memory.flat("params"), whole)
    verdict(f"without {name}", not same, "ends elsewhere")

# %% [markdown]
# Every row is needed, and all rows together are enough. (Forgotten updates
# were replaced by the steps taken, which is what a program does that does
# not tell the two apart.)
#
# Now the other dangers. A disk that fills up while a state is written, at
# any byte of it; a bit that flips on the disk; a text that has changed.


# %% a disk with so many bytes left
import errno
import io


class Small(io.FileIO):
    left = 0

    def write(self, data):
        self.left -= memoryview(data).nbytes
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def disk(left):
    def opened(path, mode):
        file = Small(path, mode)
        file.left = left
        return file

    return patch("llmnb.files.open", opened, create=True)


# %% full in the middle of a state
before = sorted(x.name for x in second.folder.iterdir())
size = states(second.folder)[-1].stat().st_size
failed, sizes = 0, range(0, size, size // 50)
for left in sizes:
    try:
        with disk(left):
            save_state(second)
    except OSError:
        failed += 1
    same = before == sorted(x.name for x in second.folder.iterdir())
    assert same and newest_state(second.folder)[0].at.step == 20, left
verdict("always", failed == len(sizes) > 49, "the old state stays whole")

# %% what the user sees
run = begin(run_folder(Path(place.name, "full")), careful)
try:
    for step in follow(run):
        if step.step == 12:
            disk(1000).start()
except OSError as error:
    print(str(error).replace(str(run.folder), "RUN"))
finally:
    patch.stopall()
run, _ = resume(run.folder)
list(follow(run))
same = np.array_equal(run.model.memory.flat("params"), whole)
verdict("room made", same, "and the end is the same")

# %% a bit flips
newest = states(second.folder)[-1]
damaged = bytearray(newest.read_bytes())
damaged[-1000] ^= 16
newest.write_bytes(damaged)
run, warnings = resume(second.folder)
print(*warnings[0].replace(str(second.folder), "RUN").split(": "), sep="\n")
print("goes on from step", run.at.step)
list(follow(run))
same = np.array_equal(run.model.memory.flat("params"), whole)
verdict("a flipped bit", same, "costs five steps")

# %% another text, another shape
page.write_text(excerpt.replace("self", "this"), "utf-8")
for change in ({}, {"channels": 64}, {"steps": 5}):
    try:
        resume(second.folder, **change)
    except ValueError as error:
        print(str(error).replace(str(second.folder), "RUN"))
place.cleanup()

# %% [markdown]
# A stop that you wish for is the gentlest kind. Whoever iterates over
# `follow` leaves its loop after a step and calls `save_state`;
# [chapter 4.18](../4_practice/18_commands.ipynb) does so on Ctrl-C and on the signal by which
# a system asks a program to end. The tests go further: they kill the process
# with a signal that cannot be caught, at random moments, and compare.
#
# **What it costs.** A parameter takes 12 bytes in a state: its weight and
# AdamW's two averages. The checksums read these once more from memory, and
# the disk gets them once.

# %% bytes of a state
for depth in (12, 48):
    shape = GPT2Config(1024, 50257, *depth_shape(depth))
    size = 12 * parameter_count(shape)
    print(f"d{depth}: {size / 1e9:.1f} GB a state")

# %% [markdown]
# **What is not promised.** Another machine or another version of numba may
# lead elsewhere; `resume` warns of both.

# %% [markdown]
# ## Take away
#
# - Before training, the loss must be near $\log V$, by (1.16.9). The unigram
#   entropy is the first thing to beat: below it, a model uses context.
# - A step is forward, backward, clip, rate, update. The loop around it is a
#   generator that reports and knows nothing of its readers.
# - Validation on fixed batches makes losses comparable between steps.
# - Two hundred losses equal to PyTorch's test every gradient, the
#   optimiser, the schedule and the initialisation at once, and show a
#   mistake that a falling loss hides.
# - The gradient of a mean is the mean of the gradients: a batch of any size
#   fits into memory, in pieces.
# - A run can go on to the last bit if all that one step hands to the next
#   is kept, and if the file that keeps it appears whole or not at all.

# %% [markdown]
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
# in the next epoch. We stop with the step, the value and the learning rate,
# before the update has spoilt the weights, and name the command that begins
# again where they were good. What we skip, if asked to, is finite and rare,
# and the log says so.
#
# A third concerns the state of a run. It would be shorter to pickle the
# loader, the model and the rest, as they are. But a pickle runs code when it
# is read, and it breaks when a class is renamed. Arrays with names, and a
# page of JSON, can be read by any program, checked before they are used,
# and understood in ten years.

# %% [markdown]
# ## Exercises
#
# **1** (★). How much of its training text did the run read, in epochs? What
# does that say about the gap between the two curves of figure 1.16.2?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# Steps times B·T, divided by the number of training tokens: below one.
# No batch came twice, so each was new to the model when its loss was taken,
# as new as the validation text, and nothing could be remembered. What gap
# there is comes from the documents: those held out are a little harder or
# easier than the rest, and the unigram entropy sees that too.
# :::

# %% exercise 1, checked tags=["hide-cell"]
seen = config.steps * config.batch_size * config.seq_len
verdict("epochs", seen < len(data.train_tokens), "less than one")

# %% exercise 1, how hard the texts are tags=["nbval-ignore-output"]
whole = unigram_entropy(data.train_tokens, data.train_tokens, V)
print(f"{whole:.3f} training, {marks['unigram']:.3f} validation (unigram)")

# %% [markdown]
# **2** (★★). The next landmark is a table of pairs: predict each token from
# the one before it, with $p(v \mid u) = \bigl(n_{uv} + \alpha q_v\bigr) /
# \bigl(n_u + \alpha\bigr)$, where $q$ is the unigram distribution and
# $\alpha = 20$ says how much to trust it. Count on as many tokens as the
# model has read. Does our model beat the table?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# Count pairs with `np.add.at` into a (V, V) table. It has over a million
# entries and pays a good deal less than the unigram entropy. The model pays
# less still, with fewer numbers: it sees more than one token.
# :::


# %% exercise 2, the table tags=["hide-cell"]
def bigram_entropy(text, tokens, V, trust=20):
    q = (np.bincount(text, minlength=V) + 1.0) / (len(text) + V)
    pairs = np.zeros((V, V))
    np.add.at(pairs, (text[:-1], text[1:]), 1)
    before, after = tokens[:-1], tokens[1:]
    known = pairs[before, after] + trust * q[after]
    return -np.log(known / (pairs.sum(axis=1)[before] + trust)).mean()


# %% exercise 2, checked
used = config.eval_batches * config.batch_size * config.seq_len
held_out = data.val_tokens[: used + 1]
pair_loss = bigram_entropy(data.train_tokens[:seen], held_out, V)
verdict("bigrams", pair_loss < marks["unigram"], "below the unigrams")
verdict("the model", final < pair_loss, "below the bigrams")

# %% [markdown]
# **3** (★★). A test that finds many bugs in a minute: train on one batch
# again and again. What loss do you expect after 100 steps? Use the small
# configuration above with a constant rate.
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# Close to zero. A model with more parameters than the batch has tokens can
# remember it. If the loss settles well above zero, targets and tokens do
# not belong together, or some gradient is missing.
# :::


# %% exercise 3, the same batch again tags=["hide-cell"]
class Same:
    def __init__(self, batch):
        self.batch = batch

    def next_batch(self):
        return self.batch


# %% exercise 3, checked
from dataclasses import replace

again = replace(small, steps=100, schedule="constant")
one = Same(Readers(text, 8, 64).next_batch())
losses = [x.loss for x in train(again, new_model(again, 257), one)]
verdict("one batch", losses[-1] < 0.5, "is learnt by heart")

# %% [markdown]
# **4** (★★★). Which rows of table 14.1 may a run forget without harm if it
# never skips an update?
#
# :::{admonition} Solution to exercise 4
# :class: dropdown
# The windows, which nothing reads then, and the number of updates, for
# which the number of steps stands in. The others matter at once.
# :::

# %% exercise 4, checked tags=["hide-cell"]
same = []
with TemporaryDirectory() as folder:
    page = Path(folder, "page.txt")
    page.write_text(excerpt, "utf-8")
    calm = replace(careful, corpus=(str(page),), skip_loss=0.0, skip_norm=0.0)
    run, _ = straight(Path(folder, "a"), calm)
    whole = run.model.memory.flat("params")
    for name, forget in ITEMS.items():
        run = cut(Path(folder, "b"), calm, forget)
        if np.array_equal(run.model.memory.flat("params"), whole):
            same.append(name)
print(*same)
verdict("no skips", same == ["updates", "windows"], "two can be missed")

# %% [markdown]
# ## Further reading
#
# - Karpathy (2019),
#   [A Recipe for Training Neural Networks](https://karpathy.github.io/2019/04/25/recipe/):
#   the first loss, the single batch, and the order in which to distrust
#   things.
# - Shannon (1951),
#   [Prediction and Entropy of Printed English](https://doi.org/10.1002/j.1538-7305.1951.tb01366.x):
#   the landmarks of this chapter for English letters, measured with people
#   in place of the network.
# - Hoffmann et al. (2022),
#   [Training Compute-Optimal Large Language Models](https://arxiv.org/abs/2203.15556):
#   section 3, on how many tokens a model of a given size should read.
# - McCandlish et al. (2018),
#   [An Empirical Model of Large-Batch Training](https://arxiv.org/abs/1812.06162):
#   why the dots of figure 1.16.2 scatter, and how large a batch is worth it.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.16")
