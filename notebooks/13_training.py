# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     module: train
# ---

# %% [markdown]
# # Train a GPT-2 and watch it learn
#
# > Text becomes batches, batches become gradients, gradients become a model
# > that predicts better than counting can, along the curve PyTorch draws.

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.diagram import gpt2_diagram

gpt2_diagram(lit="all")

# %% [markdown]
# *Figure 13.1. Every box is lit: each has a forward pass, a proven backward
# pass and a compiled kernel. What is missing is the loop around them.*
#
# This chapter writes that loop, thirty lines of it, and runs it on your
# machine until a model has read half a million tokens of Python. At its
# end you can
#
# - say what loss to expect before the first step, and which two numbers a
#   trained model must beat;
# - write a training step as five calls, in the one order that works;
# - read a loss curve: the fall, the bend, the gap between training and
#   validation;
# - show that our arithmetic is PyTorch's, step after step.
#
# You need all chapters before this one, and above all
# [chapter 10](10_adamw.ipynb) for the optimiser and
# [chapter 12](12_model.ipynb) for the model.

# %% [markdown]
# ## Setup

# %% setup
from itertools import islice

import matplotlib.pyplot as plt

from llmnb.diagram import PALETTE
from llmnb.verify import compare, verdict

# %% imports of the trainer tags=["export"]
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmnb.config import GPT2Config
from llmnb.data import (
    DataLoader,
    Shards,
    find_shards,
    read_shard,
    sample_tokens,
)
from llmnb.files import replacing
from llmnb.schedule import decayed, learning_rate
from llmnb.timing import machine

# %% [markdown]
# ## By hand: what a loss means
#
# The loss is the mean of $-\log p$ over the tokens that came true, in nats.
# A model that gives every one of $V$ tokens the probability $1/V$ pays
#
# $$ \mathcal L_\text{uniform} = \log V \tag{13.1} $$
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
#    \qquad \sum_v q_v = 1 . \tag{13.2} $$
#
# With a multiplier $\lambda$ for the constraint, the derivative by $q_v$ is
# $-n_v / (N q_v) + \lambda$. It vanishes when $q_v = n_v / (\lambda N)$, and
# the sum over $v$ gives $\lambda = 1$:
#
# $$ q_v = \frac{n_v}{N} . \tag{13.3} $$
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

    Derived in chapter 13.
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
# how it learns. They live in one frozen dataclass, `TrainConfig`, in three
# parts. Each number carries a sentence of help, because the command line
# of [chapter 20](20_command.ipynb) makes its options from these fields.


# %% an option with its help tags=["exporti"]
def _option(default, text):
    return field(default=default, metadata={"help": text})


# %% what a run reads tags=["export"]
@dataclass(frozen=True)
class DataOptions:
    """What a run reads; see `TrainConfig`.

    Derived in chapter 13.
    """

    corpus: tuple = _option(
        ("stdlib",),
        "text to learn: stdlib, tinyshakespeare, or files and folders",
    )
    limit: int = _option(0, "read at most this many characters; 0 means all")
    tokenizer: str = _option(
        "bpe", "bpe (trained on the text), byte, gpt2, or a rank file"
    )
    vocab_size: int = _option(1024, "tokens that the bpe tokenizer has")
    shards: str = _option(
        "", "a folder written by `llmnb data`, instead of a corpus"
    )


# %% what the model looks like tags=["export"]
@dataclass(frozen=True)
class ModelOptions:
    """What the model looks like; see `TrainConfig`.

    Derived in chapter 13.
    """

    num_layers: int = _option(4, "transformer blocks (L)")
    num_heads: int = _option(4, "attention heads (NH)")
    channels: int = _option(128, "channels (C), a multiple of the heads")
    seq_len: int = _option(64, "tokens the model sees at once (T)")
    batch_size: int = _option(8, "sequences in a batch (B)")
    backend: str = _option("cpu", "cpu, or reference (NumPy, slow)")
    precision: str = _option("fp32", "fp32, bf16, or fp64 (slow)")


# %% how it learns tags=["export"]
@dataclass(frozen=True)
class LearningOptions:
    """How a run learns; see `TrainConfig`.

    Derived in chapter 13.
    """

    steps: int = _option(1000, "updates of the weights")
    learning_rate: float = _option(2e-3, "the highest learning rate")
    warmup_fraction: float = _option(0.1, "share of steps spent rising to it")
    schedule: str = _option("cosine", "cosine, linear, constant or wsd")
    final_fraction: float = _option(0.1, "the last rate over the highest")
    beta1: float = _option(0.9, "AdamW: memory of the gradient")
    beta2: float = _option(0.95, "AdamW: memory of its square")
    eps: float = _option(1e-8, "AdamW: added to the denominator")
    weight_decay: float = _option(0.1, "AdamW: decay of 2-D tensors")
    clip: float = _option(1.0, "largest gradient norm; 0 means no limit")
    eval_every: int = _option(100, "steps between two validations")
    eval_batches: int = _option(20, "batches in a validation")
    seed: int = _option(42, "seed of the weights and of the shuffle")


# %% [markdown]
# A number that makes no sense is refused when the configuration is built,
# not twenty seconds into a run. Most of the checks exist already:
# `GPT2Config` knows which shapes are possible and `learning_rate` which
# schedules, so building one of each asks them.


# %% a number in its range tags=["exporti"]
def _check_range(name, value, least, below):
    if not least <= value < below:
        end = f"and below {below}" if below < math.inf else ""
        raise ValueError(
            f"{name} must be at least {least} {end}".rstrip()
            + f", got {value}"
        )


# %% a run tags=["export"]
AT_LEAST = {
    1: ("vocab_size", "batch_size", "steps", "eval_every", "eval_batches"),
    0: ("limit", "warmup_fraction", "eps", "weight_decay", "clip", "seed"),
}


@dataclass(frozen=True)
class TrainConfig(LearningOptions, ModelOptions, DataOptions):
    """Every number that fixes a training run.

    Raises ValueError, in one sentence, when a number is out of its range.

    Derived in chapter 13.
    """

    def __post_init__(self):
        for least, names in AT_LEAST.items():
            for name in names:
                _check_range(name, getattr(self, name), least, math.inf)
        for name in ("beta1", "beta2"):
            _check_range(name, getattr(self, name), 0, 1)
        _check_range("seed", self.seed, 0, 2**32)
        self.model(self.vocab_size)
        self.rate(0)

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
for wrong in ({"beta2": 1.0}, {"channels": 130}, {"schedule": "stairs"}):
    try:
        TrainConfig(**wrong)
    except ValueError as error:
        print(error)

# %% [markdown]
# ## The data
#
# `prepare` does what [chapter 1](01_tokens.ipynb) taught, in order: load
# the documents, train or load a tokenizer, encode, split. It returns the
# tokenizer, the two token arrays, and a sentence that says where the text
# came from. The tokenizer learns from the first two million characters: the
# documents come in a mixed order, and more text would change the merges
# little and take longer.

# %% the data of a run tags=["export"]
TOKENIZER_TEXT = 2_000_000  # characters the bpe tokenizer learns from


class Data(NamedTuple):
    """The tokens of a run: what `prepare` returns.

    encoding: a tiktoken.Encoding. train_tokens, val_tokens: 1-D uint16
    arrays, or `Shards` where a folder holds several. source: a sentence that
    says where the text came from.

    Derived in chapter 13.
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

    Derived in chapter 13.
    """
    from llmnb import corpus

    if config.shards:
        return _from_shards(config)
    sources = [*config.corpus]
    source = sources[0] if len(sources) == 1 else sources
    documents = corpus.load(source, limit=config.limit or None)
    encoding = make_encoding(config, documents)
    tokens = corpus.encode_documents(encoding, documents)
    parts = corpus.split(tokens)
    return Data(encoding, *parts, _describe(sources, documents))


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
    """The tokens of a folder: one shard is mapped, many are left closed."""
    folder = Path(config.shards)
    found = find_shards(folder)
    encoding = _encoding_of(config, folder)
    parts = [read_shard(x[0]) if len(x) == 1 else Shards(x) for x in found]
    total = sum(len(x) for x in parts)
    return Data(encoding, *parts, f"shards in {folder}: {total:,} tokens")


def _encoding_of(config, folder):
    """The tokenizer in a folder, or the one that the run names."""
    from llmnb import tokenizer

    path = folder / "tokenizer.tiktoken"
    if path.exists():
        return tokenizer.load(path)
    if config.tokenizer == "bpe":
        raise FileNotFoundError(
            f"{folder} has no tokenizer.tiktoken: name the tokenizer of its "
            "tokens, such as --tokenizer gpt2"
        )
    return make_encoding(config, [])


# %% the tokenizer of a run tags=["export"]
def make_encoding(config, documents):
    """The tokenizer that a TrainConfig names, trained if it is "bpe".

    documents: an iterable of str, of which the first `TOKENIZER_TEXT`
    characters are learnt from. Raises ValueError, OSError or RuntimeError, in one
    sentence.

    Derived in chapter 13.
    """
    from llmnb import tokenizer

    if config.tokenizer in ("byte", "gpt2"):
        return getattr(tokenizer, config.tokenizer)()
    if config.tokenizer != "bpe":
        return tokenizer.load(config.tokenizer)
    learnt, left = [], TOKENIZER_TEXT
    for text in documents:
        learnt.append(text[:left])
        left -= len(learnt[-1])
        if not left:
            break
    return tokenizer.train(learnt, config.vocab_size)


# %% [markdown]
# The default corpus is the standard library of your own Python: text that
# is there, in a language you read. Its size depends on your version, so the
# next output is not compared when this notebook is verified.

# %% text becomes tokens tags=["nbval-ignore-output"]
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
# **Validation** runs the forward pass alone on tokens that no step trains
# on. The batches are the same each time, so two validation losses differ
# because the weights differ and for no other reason.


# %% validation tags=["export"]
def evaluate(model, batches, count):
    """Mean loss of a model over the first `count` batches; trains nothing.

    batches: a DataLoader, which is set back to its first batch. At most one
    epoch is read. Returns nats a token, a float.

    Derived in chapter 13.
    """
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
    step. In the last report, which follows the last update, only step and
    val_loss are given.

    Derived in chapter 13.
    """

    step: int
    loss: float | None
    val_loss: float | None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None


# %% the loop tags=["export"]
def train(config, model, batches, validation=None):
    """Train a GPT2 in place; yield a `Step` before each update, one after.

    config: a TrainConfig. batches: a DataLoader, read on from where it is.
    validation: None or a DataLoader whose first `config.eval_batches`
    batches are evaluated every `config.eval_every` steps and at the end.
    Raises FloatingPointError when a loss or a gradient is not finite.

    Derived in chapter 13.
    """
    for step in range(config.steps):
        val_loss = None
        if validation and step % config.eval_every == 0:
            val_loss = evaluate(model, validation, config.eval_batches)
        start = time.perf_counter()
        tokens, targets = batches.next_batch()
        result = train_step(config, model, step, tokens, targets)
        speed = tokens.size / (time.perf_counter() - start)
        loss, rate, norm = result
        yield Step(step, loss, val_loss, rate, norm, speed)
    if validation:
        val_loss = evaluate(model, validation, config.eval_batches)
        yield Step(config.steps, None, val_loss)


# %% one step tags=["export"]
def train_step(config, model, step, tokens, targets):
    """Update a GPT2 once; returns the loss, the rate and the norm.

    step: updates made before this one. tokens, targets: int arrays (B, T).
    Raises FloatingPointError, before the update, when the loss or the norm
    of the gradient is not finite.

    Derived in chapter 13.
    """
    rate = config.rate(step)
    loss = model.forward(tokens, targets)
    _check_finite("loss", loss, step, rate)
    model.backward()
    norm = model.clip_gradients(config.clip or math.inf)
    _check_finite("norm of the gradient", norm, step, rate)
    model.update(
        learning_rate=rate,
        beta1=config.beta1,
        beta2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        step=step + 1,
        decay=[name for name in model.params if decayed(name)],
    )
    return loss, rate, norm


# %% finite or not tags=["exporti"]
def _check_finite(what, value, step, rate):
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the {what} is {value} at step {step} (learning rate {rate:.3g})"
            ": try a lower learning rate or a longer warm-up"
        )


# %% [markdown]
# AdamW counts its updates from 1, so the step passed to it is one more than
# the number of updates made before. Only the matrices and the two embedding
# tables decay; [chapter 10](10_adamw.ipynb) says why.

# %% [markdown]
# ## Before the first step
#
# Three short functions make what the loop takes: the model, the two
# loaders, and the two landmarks of its loss, (13.1) and the unigram entropy
# of the very tokens that validation uses.


# %% the model and its batches tags=["export"]
def new_model(config, vocab_size):
    """A freshly initialised GPT2 for a TrainConfig and a vocabulary size.

    Derived in chapter 13.
    """
    from llmnb.gpt2 import GPT2

    return GPT2(
        config.model(vocab_size),
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        backend=config.backend,
        precision=config.precision,
        seed=config.seed,
    )


# %% its batches tags=["export"]
def loaders(config, data):
    """The DataLoaders of a run: shuffled for training, fixed to validate.

    A shard of fewer tokens than one batch takes is left out. Raises
    ValueError when all are.

    Derived in chapter 13.
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

    Derived in chapter 13.
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
#    = \log V + \tfrac12 C \sigma^2 , \tag{13.4} $$
#
# because the mean of $e^z$ for a normal $z$ of variance $s^2$ is
# $e^{s^2/2}$. With 128 channels the excess over (13.1) is
# $\tfrac12 \cdot 128 \cdot 0.0004 = 0.0256$. A first loss that is far from
# this means that something is broken before training has begun: a wrong
# initialisation, or targets that are not shifted by one.

# %% the first loss, predicted
predicted = marks["uniform"] + config.channels * 0.02**2 / 2
first = evaluate(model, validation, config.eval_batches)
verdict("first loss", abs(first - predicted) < 0.05, "as predicted, +-0.05")

# %% [markdown]
# And how long will it take? A token costs $6N + 6LCT$ floating-point
# operations ([chapter 0](00_gpt2.ipynb)). Times the tokens of all steps:

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

    Derived in chapter 13.
    """
    from llmnb.diagram import PALETTE

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
        place = ax.get_yaxis_transform()
        ax.text(0.99, loss, name, ha="right", va="bottom", transform=place)
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
# *Figure 13.2. The loss falls steeply from the uniform guess to the unigram
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
# | `model.bin` | the weights, in the format of [chapter 2](02_memory.ipynb) |
# | `tokenizer.tiktoken` | the tokenizer's ranks |
#
# Each file is written beside its place and renamed into it, by `replacing`
# from [chapter 0](00_gpt2.ipynb). A run that is stopped in the middle of
# writing leaves the old file or the new one, and never half of one.


# %% a folder for a run tags=["export"]
def run_folder(path, force=False):
    """Make the folder of a run; returns it as a Path.

    Raises FileExistsError when it holds anything, unless `force`.

    Derived in chapter 13.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file, not a folder")
    if path.exists() and any(path.iterdir()) and not force:
        raise FileExistsError(f"{path} exists and is not empty")
    path.mkdir(parents=True, exist_ok=True)
    return path


# %% the log tags=["export"]
def write_log(path, steps):
    """Write a list of `Step` as CSV; what a step does not give stays empty.

    Derived in chapter 13.
    """
    lines = [",".join(Step._fields)]
    for step in steps:
        given = ("" if x is None else f"{x:.9g}" for x in step[1:])
        lines.append(",".join([str(step.step), *given]))
    _write_text(path, "\n".join(lines) + "\n")


def _write_text(path, text):
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


# %% the folder's files tags=["export"]
def save_run(folder, config, model, data, steps):
    """Write config.json, log.csv, loss.png, model.bin and the tokenizer.

    folder: the Path that `run_folder` made. steps: list of `Step`.

    Derived in chapter 13.
    """
    from llmnb import tokenizer

    marks = landmarks(config, data)
    record = json.dumps(_record(config, data, marks), indent=1)
    _write_text(folder / "config.json", record + "\n")
    write_log(folder / "log.csv", steps)
    save_figure(folder / "loss.png", steps, marks)
    model.save_checkpoint(folder / "model.bin")
    tokenizer.save(data.encoding, folder / "tokenizer.tiktoken")


# %% what is written down tags=["exporti"]
def _record(config, data, marks):
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

    Derived in chapter 13.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=100, layout="tight")
    draw_losses(figure.subplots(), steps, landmarks)
    with replacing(path) as file:
        figure.savefig(file, format="png")


# %% [markdown]
# Reading it back builds the model at whatever batch size the reader needs:
# one row is enough to write a text.


# %% a run read back tags=["export"]
def load_run(folder, batch_size=1, seq_len=None, backend=None):
    """Read the model, the tokenizer and the TrainConfig of a run folder.

    seq_len and backend default to the run's own. Raises OSError or
    ValueError, in one sentence, when a file is missing or damaged.

    Derived in chapter 13.
    """
    from llmnb import tokenizer
    from llmnb.gpt2 import GPT2

    folder = Path(folder)
    config = read_run(folder)
    encoding = tokenizer.load(folder / "tokenizer.tiktoken")
    model = GPT2.from_checkpoint(
        folder / "model.bin",
        batch_size=batch_size,
        seq_len=seq_len or config.seq_len,
        backend=backend or config.backend,
        precision=config.precision,
    )
    return model, encoding, config


# %% the numbers of a run, read back tags=["export"]
def read_run(folder):
    """The TrainConfig in a run folder's config.json.

    Raises OSError or ValueError, in one sentence, when it is missing or
    holds something else.

    Derived in chapter 13.
    """
    path = Path(folder) / "config.json"
    try:
        found = json.loads(path.read_text("utf-8"))["config"]
        return TrainConfig(**{**found, "corpus": tuple(found["corpus"])})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a run's: {error}") from None


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
# [chapter 14](14_generation.ipynb) does it with more care. The model
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
recorded = Path("../tests/data/torch_curve.csv").read_text("utf-8")
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
small = TrainConfig(
    tokenizer="byte",
    num_layers=2,
    channels=64,
    seq_len=64,
    batch_size=8,
    steps=200,
    learning_rate=2e-3,
)
text = read_shard("../tests/data/curve_tokens.bin")


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
# *Figure 13.3. Our curve covers PyTorch's, bump for bump. Below, on a
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
# number of threads nor their timing can change a digit. The compiler can: a
# process that has just compiled its kernels may round a last bit otherwise
# than a later one that finds them in the cache, because numba optimises some
# code once more when it stores it. Runs that are to agree bit for bit should
# both start with the kernels in the cache.
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

recorded = Path("../tests/data/torch_curve_bf16.csv").read_text("utf-8")
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
# *Figure 13.4. What bfloat16 changes in the loss, against PyTorch's float32
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
# ## Take away
#
# - Before training, the loss must be near $\log V$, by (13.4). The unigram
#   entropy is the first thing to beat: below it, a model uses context.
# - A step is forward, backward, clip, rate, update. The loop around it is a
#   generator that reports and knows nothing of its readers.
# - Validation on fixed batches makes losses comparable between steps.
# - Two hundred losses equal to PyTorch's test every gradient, the
#   optimiser, the schedule and the initialisation at once, and show a
#   mistake that a falling loss hides.

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
# before the update has spoilt the weights.

# %% [markdown]
# ## Exercises
#
# **1** (★). How much of its training text did the run read, in epochs? What
# does that say about the gap between the two curves of figure 13.2?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# Steps times B·T, divided by the number of training tokens: well below one.
# No batch came twice, so each was new to the model when its loss was taken,
# as new as the validation text, and nothing could be remembered. What gap
# there is comes from the documents: those held out are a little harder or
# easier than the rest, and the unigram entropy sees that too.
# :::

# %% exercise 1, checked tags=["hide-cell"]
seen = config.steps * config.batch_size * config.seq_len
verdict("epochs", seen < len(data.train_tokens) / 4, "less than a quarter")

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
# **4** (★★★). A batch of eight does not fit into memory, a batch of four
# does. Get the gradient of the batch of eight from two passes of four.
#
# :::{admonition} Solution to exercise 4
# :class: dropdown
# The loss is a mean over B·T tokens, so the gradient of the large batch is
# the mean of the gradients of its halves. This is gradient accumulation:
# run `backward` on each half, keep a copy of the first gradients, average.
# :::


# %% exercise 4, two halves tags=["hide-cell"]
def gradients(batch_size, tokens, targets):
    student = new_model(replace(small, batch_size=batch_size), 257)
    total = np.zeros(student.memory.flat("grads").shape)
    parts = len(tokens) // batch_size
    for x, y in zip(
        np.split(tokens, parts), np.split(targets, parts), strict=True
    ):
        student.forward(x, y)
        student.backward()
        total += student.memory.flat("grads") / parts
    return total


# %% exercise 4, checked
batch = one.next_batch()
compare("two halves", gradients(4, *batch), gradients(8, *batch), tol=1e-6)

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
#   why the dots of figure 13.2 scatter, and how large a batch is worth it.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.index import gained

gained("13_training")
