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
from llmnb.data import DataLoader, read_shard
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
# of [chapter 14](14_generation.ipynb) makes its options from these fields.


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
    arrays. source: a sentence that says where the text came from.

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
        return _from_shards(Path(config.shards))
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


def _from_shards(folder):
    from llmnb import tokenizer

    encoding = tokenizer.load(folder / "tokenizer.tiktoken")
    parts = [read_shard(folder / f"{x}.bin") for x in ("train", "val")]
    total = sum(len(x) for x in parts)
    return Data(encoding, *parts, f"shards in {folder}: {total:,} tokens")


# %% the tokenizer of a run tags=["export"]
def make_encoding(config, documents):
    """The tokenizer that a TrainConfig names, trained if it is "bpe".

    documents: list of str, of which the first `TOKENIZER_TEXT` characters
    are learnt from. Raises ValueError, OSError or RuntimeError, in one
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

    Raises ValueError when there are fewer tokens than one batch takes.

    Derived in chapter 13.
    """
    shape = config.batch_size, config.seq_len
    return (
        DataLoader([data.train_tokens], *shape, seed=config.seed),
        DataLoader([data.val_tokens], *shape, shuffle=False),
    )


# %% the landmarks tags=["export"]
def landmarks(config, data):
    """The losses a run is measured against, in nats a token.

    Returns a dict: "uniform", log V; "unigram", what the token frequencies
    of the training text pay on the tokens that validation uses.

    Derived in chapter 13.
    """
    V = data.encoding.n_vocab
    batch = config.batch_size * config.seq_len
    count = min(config.eval_batches, (len(data.val_tokens) - 1) // batch)
    targets = data.val_tokens[1 : count * batch + 1]
    unigram = unigram_entropy(data.train_tokens, targets, V)
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
# ## Fast on a CPU: where the time goes
#
# Chapters 3 to 10 timed their layers alone. In a training step they run
# together, and we want to know which one to make faster next. The model
# calls its layers through one object, its backend. `Stopwatch` stands in
# for that object: it hands out the same functions, each wrapped so that
# its time is added up.

# %% imports of the benchmark tags=["export"] module="bench"
import time


# %% a stopwatch around a backend tags=["export"] module="bench"
class Stopwatch:
    """A backend whose functions add up the seconds they take.

    backend: an object with functions as attributes. seconds, calls: dicts
    from function name to what has been added up since `reset`.

    Derived in chapter 13.
    """

    def __init__(self, backend):
        self._backend = backend
        self.reset()

    def reset(self):
        """Forget what has been measured."""
        self.seconds, self.calls = {}, {}

    def __getattr__(self, name):
        function = getattr(self._backend, name)
        if not callable(function):
            return function

        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0) + spent
            self.calls[name] = self.calls.get(name, 0) + 1
            return result

        return timed


# %% [markdown]
# The step that we measure is forward, backward and update. It does not clip
# gradients: llm.c's program on a CPU does not, and further down all programs
# must do the same work.


# %% one measured step tags=["export"] module="bench"
PARTS = ("forward", "backward", "update")


def timed_step(model, tokens, targets, step):
    """Train a GPT2 once; say what each part and each layer took.

    model.ops must be a `Stopwatch`. step: counts from 1. Returns a dict: the
    loss, a float; parts and layers, dicts from name to seconds; calls, a
    dict from layer to a count.

    Derived in chapter 13.
    """
    model.ops.reset()
    times = [time.perf_counter()]
    loss = model.forward(tokens, targets)
    times.append(time.perf_counter())
    model.backward()
    times.append(time.perf_counter())
    model.update(step=step)
    times.append(time.perf_counter())
    spent = [b - a for a, b in zip(times, times[1:], strict=False)]
    return {
        "loss": loss,
        "parts": dict(zip(PARTS, spent, strict=True)),
        "layers": model.ops.seconds,
        "calls": model.ops.calls,
    }


# %% the model above, measured tags=["nbval-ignore-output"]
from llmnb.bench import Stopwatch, timed_step

tokens, targets = batches.next_batch()
layers, model.ops = model.ops, Stopwatch(model.ops)
found = [timed_step(model, tokens, targets, 1 + i) for i in range(5)][-1]
model.ops = layers
whole = sum(found["parts"].values())
for name, spent in found["layers"].items():
    print(f"{name:<30} {found['calls'][name]:3} {spent / whole:6.1%}")

# %% [markdown]
# Most of the time goes into `matmul`, as the counts of
# [chapter 5](05_matmul.ipynb) foretold, and the backward pass takes more
# than the forward pass: it forms two products for each one of the forward
# pass. `llmnb bench` prints such a table for any configuration, and
# `llmnb bench --plot layers.png` draws it.
#
# The arena keeps a promise of [chapter 2](02_memory.ipynb). It is laid out
# before the first step and holds weights, gradients, optimiser state and
# activations. What the process holds beyond it is Python, the libraries,
# the compiled kernels and the text.

# %% where the memory goes
for group, size in model.memory.sizes().items():
    print(f"{group:<8} {size / 1e6:8.2f} MB")

# %% [markdown]
# ## Fast compared with what?
#
# A time says little until it stands beside another: the time PyTorch takes
# for the same step, or llm.c. Such a comparison goes wrong in three ways,
# and `llmnb bench` has an answer to each.
#
# **The machine changes.** Another program wakes up, the processor gets hot
# and lowers its clock. Run all steps of one program and then all of the
# other, and the second may meet another machine. So the programs take
# turns: a **round** is one step of each, and a disturbance that lasts longer
# than a round hits all of them.
#
# **One number hides the noise.** Within a round, take the ratio of two
# times: what slows both cancels. Over the rounds, take the median of the
# ratios: a disturbance that hits a single step makes one bad ratio, and the
# median ignores it.
#
# **Programs disturb each other.** Two libraries in one process share its
# memory, and their threads compete for the cores. So each program has a
# process of its own, and there it sleeps until its turn: it waits for a line
# on its standard input.
#
# Let us try the first two answers on a machine that we make up. Program a
# takes 1 second a step, program b takes 1.1. The machine gets slower by half
# at a third of the way, and now and then a step takes three times as long.

# %% a machine with moods
draw = np.random.RandomState(13)
turns = np.arange(60)
slow = np.where(turns < 20, 1.0, 1.5) * draw.uniform(0.98, 1.02, 60)
slow *= np.where(draw.random_sample(60) < 0.1, 3.0, 1.0)
blocks = np.mean(1.1 * slow[30:]) / np.mean(1.0 * slow[:30])
each = (1.1 * slow[1::2]) / (1.0 * slow[0::2])
print(f"one after the other, means: {blocks:.2f}")
print(f"in turns, mean of ratios:   {np.mean(each):.2f}")
print(f"in turns, median of ratios: {np.median(each):.2f}")
verdict("median of ratios", abs(np.median(each) - 1.1) < 0.03, "is near 1.1")
verdict("blocks", abs(blocks - 1.1) > 0.1, "mislead")

# %% [markdown]
# ### What runs in the process
#
# The programs are contestants, and `peers` is the file that each of them
# runs, except llm.c. It must also run in a Python that has PyTorch and not
# llmnb, so it imports nothing but the standard library at its top.

# %% imports of the peers tags=["export"] module="peers"
import json
import os
import sys
import time
from statistics import median


# %% peak memory tags=["export"] module="peers"
def peak_memory(pid="self"):
    """The most bytes a process has held in memory; None if unknown.

    pid: a process's number; only Linux knows about others. It counts
    everything: Python, NumPy, the compiler, the model.

    Derived in chapter 13.
    """
    try:
        with open(f"/proc/{pid}/status") as file:
            rows = dict(line.split(":", 1) for line in file)
        return int(rows["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    if pid != "self":
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# %% [markdown]
# On Linux a process inherits the peak that `getrusage` reports from the
# process that started it. The line `VmHWM` of `/proc/self/status` begins
# anew with each program, so we read that where it exists.
#
# `serve` is the contestant's side of the conversation. It answers each line
# `step` with a line of JSON, and any other line with the facts it has
# gathered. It also watches itself sleep: a library whose threads spin while
# they wait takes time from the program whose turn it is. So it reports the
# processor time that a wait cost, all threads together.


# %% take orders tags=["export"] module="peers"
def serve(step, facts, commands, reply):
    """Train one step for each line "step" of a file, until another line.

    step: a function that returns a dict, which is answered with the
    seconds it took. facts: a function that returns what to answer at the
    end. commands: a text file. reply: takes each answer, a dict.

    Derived in chapter 13.
    """
    waits = []
    while True:
        start = time.process_time()
        command = commands.readline().strip()
        waits.append(time.process_time() - start)
        if command != "step":
            break
        start = time.perf_counter()
        found = step()
        reply({"seconds": time.perf_counter() - start, **found})
    waited = {"cpu_seconds_a_wait": median(waits)}
    reply({"peak_bytes": peak_memory(), **waited, **facts()})


# %% the batch tags=["export"] module="peers"
def random_batch(spec):
    """Tokens and targets for a spec: the same for every contestant.

    spec: a dict with model, batch_size and seq_len. Returns an int64 array
    (2, B, T).

    Derived in chapter 13.
    """
    import numpy as np

    shape = 2, spec["batch_size"], spec["seq_len"]
    draw = np.random.RandomState(0)
    return draw.randint(0, spec["model"]["vocab_size"], shape, np.int64)


# %% [markdown]
# Our own contestant is a `GPT2` behind a `Stopwatch`. A precision that this
# processor lacks is refused, not replaced by another: timing float32 twice
# would tell you that bfloat16 gains nothing.


# %% why a precision is missing tags=["export"] module="peers"
def missing(precision, backend="cpu"):
    """Why a backend cannot train with a precision here; None if it can.

    Derived in chapter 13.
    """
    if precision != "bf16":
        return None
    if backend != "cpu":
        return f"not available in the {backend} backend"
    from llmnb.cpu.tile import has_bf16

    return None if has_bf16() else "not available on this CPU"


# %% our contestant tags=["export"] module="peers"
def llmnb_contestant(spec):
    """A step of a GPT2 and its facts: two functions for `serve`.

    spec: a dict with model, batch_size, seq_len, backend and precision.
    Raises NotImplementedError, saying why, when the precision is missing.

    Derived in chapter 13.
    """
    from itertools import count

    from llmnb.bench import Stopwatch, timed_step
    from llmnb.config import GPT2Config
    from llmnb.gpt2 import GPT2

    backend, precision = spec["backend"], spec["precision"]
    if missing(precision, backend):
        raise NotImplementedError(missing(precision, backend))
    cfg = GPT2Config(**spec["model"])
    sizes = spec["batch_size"], spec["seq_len"]
    model = GPT2(cfg, *sizes, backend=backend, precision=precision)
    model.ops = Stopwatch(model.ops)
    batch, numbers = random_batch(spec), count(1)
    return (
        lambda: timed_step(model, *batch, next(numbers)),
        lambda: {"arena_bytes": model.memory.nbytes, **_our_facts(backend)},
    )


# %% our facts tags=["exporti"] module="peers"
def _our_facts(backend):
    """Threads, versions, and for the cpu backend the peak of FMAs."""
    from importlib.metadata import version

    import numba

    names = "llmnb", "numpy", "numba"
    facts = {"threads": numba.get_num_threads()}
    facts["versions"] = {name: version(name) for name in names}
    if backend == "cpu":
        from llmnb.cpu.peak import fma_peak

        facts["fma_peak"] = float(fma_peak())
    return facts


# %% [markdown]
# PyTorch's contestant is the GPT-2 that a user of PyTorch would write:
# fused attention, fused AdamW, the head tied to the embedding. The
# vocabulary is padded as ours is, so that both form products of the same
# shapes.


# %% a block in PyTorch tags=["exporti"] module="peers"
def _torch_block(C, NH):
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
            self.qkv, self.attproj = nn.Linear(C, 3 * C), nn.Linear(C, C)
            self.fc, self.fcproj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

        def attention(self, x):
            B, T, _ = x.shape
            qkv = self.qkv(x).view(B, T, 3, NH, C // NH)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.attproj(y.transpose(1, 2).reshape(B, T, C))

        def forward(self, x):
            x = x + self.attention(self.ln1(x))
            h = F.gelu(self.fc(self.ln2(x)), approximate="tanh")
            return x + self.fcproj(h)

    return Block()


# %% GPT-2 in PyTorch tags=["exporti"] module="peers"
def _torch_gpt2(max_seq_len, vocab_size, num_layers, num_heads, channels):
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte = nn.Embedding(-(-vocab_size // 128) * 128, channels)
            self.wpe = nn.Embedding(max_seq_len, channels)
            blocks = [_torch_block(channels, num_heads)]
            for _ in range(num_layers - 1):
                blocks.append(_torch_block(channels, num_heads))
            self.blocks = nn.Sequential(*blocks)
            self.lnf = nn.LayerNorm(channels)

        def forward(self, tokens, targets):
            x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
            x = self.lnf(self.blocks(x))
            logits = F.linear(x, self.wte.weight)
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    model = Model()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0.0, 0.02)
    return model


# %% PyTorch's contestant tags=["export"] module="peers"
def torch_contestant(spec):
    """A step of PyTorch's GPT-2 and its facts: two functions for `serve`.

    spec: a dict with model, batch_size, seq_len, compile and bf16. Raises
    ImportError where there is no torch.

    Derived in chapter 13.
    """
    import torch

    torch.manual_seed(0)
    model = _torch_gpt2(**spec["model"])
    run = torch.compile(model) if spec["compile"] else model
    rules = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, fused=True, **rules
    )
    batch = torch.from_numpy(random_batch(spec))
    half = {"dtype": torch.bfloat16, "enabled": spec["bf16"]}

    def step():
        with torch.autocast("cpu", **half):
            loss = run(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss.item()}

    versions = {"torch": torch.__version__}
    facts = {"threads": torch.get_num_threads(), "versions": versions}
    return step, lambda: facts


# %% the contestant's program tags=["export"] module="peers"
CONTESTANTS = {"llmnb": llmnb_contestant, "torch": torch_contestant}


def main(argv=None):
    """Be a contestant: build what a spec says, then `serve` standard input.

    argv: one argument, the spec as JSON; its kind is a name in
    `CONTESTANTS`. The first answer says {"ready": true}, or why not. What
    libraries print goes to standard error.

    Derived in chapter 13.
    """
    spec = json.loads((sys.argv[1:] if argv is None else argv)[0])
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)

        def reply(answer):
            print(json.dumps(answer), file=out, flush=True)

        try:
            contestant = CONTESTANTS[spec["kind"]](spec)
        except NotImplementedError as why:
            return reply({"unmeasured": str(why)})
        except Exception as error:
            return reply({"error": str(error) or type(error).__name__})
        reply({"ready": True})
        return serve(*contestant, sys.stdin, reply)


# %% [markdown]
# ### The race
#
# The other side starts the processes and gives the turns. All contestants
# get the same number of threads. How their idle threads wait is left as each
# library sets it, because a setting that puts threads to sleep at once slows
# the program it is meant for: GNU's OpenMP, which PyTorch uses, lets a thread
# spin for some milliseconds before it sleeps; numba's sleep sooner, because
# `kernel` of [chapter 3](03_encoder.ipynb) says so. Between two turns we
# pause until the threads of the last contestant are asleep. The processor
# time of a wait is written down with the results, so you can see that the
# pause is long enough.

# %% imports of the race tags=["export"] module="race"
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from llmnb import peers
from llmnb.arena import Arena
from llmnb.checkpoint import write_checkpoint
from llmnb.config import GPT2Config, parameter_shapes
from llmnb.data import write_shard
from llmnb.init import init_params


# %% what a race is told tags=["export"] module="race"
WARM_UP = 2  # rounds that are not measured: they compile and touch memory
PAUSE = 0.05  # seconds between two turns, in which threads fall asleep
PEERS = {
    "torch": {"kind": "torch", "compile": False, "bf16": False},
    "torch-compile": {"kind": "torch", "compile": True, "bf16": False},
    "torch-bf16": {"kind": "torch", "compile": False, "bf16": True},
}


class Settings(NamedTuple):
    """How to race: what llmnb computes in, against whom, how often.

    precisions: of `GPT2`. against: names of `PEERS`, and "llmc=PATH", where
    PATH is llm.c's compiled train_gpt2. steps: how many are measured, one a
    round. threads: of each contestant, or None for all cores. backend: of
    `GPT2`. torch_python: the interpreter that has torch.

    Derived in chapter 13.
    """

    precisions: tuple = ("fp32",)
    against: tuple = ()
    steps: int = 10
    threads: int | None = None
    backend: str = "cpu"
    torch_python: str = sys.executable


# %% the cores tags=["export"] module="race"
def cores():
    """How many cores this process may use.

    Derived in chapter 13.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# %% the contestant's environment tags=["exporti"] module="race"
def _environment(threads, cache=None):
    """Threads for every library; a folder for every compiler's cache."""
    count = str(threads or cores())
    env = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), count)
    if cache:
        env |= {"LLMNB_CACHE": cache, "TORCHINDUCTOR_CACHE_DIR": cache}
    # a file's own folder is no place to look for modules
    env = os.environ | env | {"PYTHONSAFEPATH": "1"}
    env.pop("GOMP_SPINCOUNT", None)  # ours would slow PyTorch: see `kernel`
    return env


# %% a contestant tags=["export"] module="race"
class Contestant:
    """A process that runs `peers` and trains one step on command.

    name: for messages. spec: see `peers`. python: the interpreter. cache: a
    folder for compiled code, or None for the usual ones. unmeasured: None,
    or why there is nothing to measure. Raises ChildProcessError, in one
    sentence, when the process cannot do what it was asked.

    Derived in chapter 13.
    """

    def __init__(self, name, spec, python, threads=None, cache=None):
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        env = _environment(threads, cache)
        if spec["kind"] == "llmnb":
            package = str(Path(peers.__file__).parents[1])
            env["PYTHONPATH"] = package
        self._process = subprocess.Popen(
            [python, peers.__file__, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=env,
        )
        try:
            self.unmeasured = self._answer().get("unmeasured")
        except ChildProcessError:
            self.close()
            raise

    def _answer(self):
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise ChildProcessError(f"{self.name}: {answer['error']}")
        return answer

    def _last_words(self):
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().split("\n")
        said = [x for x in lines if x.strip()]
        if code < 0:
            name = signal.Signals(-code).name
            return f"was ended by {name}: is there enough memory?"
        return said[-1] if said else f"ended with code {code}"

    def _ask(self, command):
        with suppress(OSError):  # the answer will say why
            print(command, file=self._process.stdin, flush=True)
        return self._answer()

    def step(self):
        """Train once; a dict with the seconds and the loss."""
        return self._ask("step")

    def finish(self):
        """Stop; a dict of what the process knows about itself."""
        return self._ask("finish")

    def close(self):
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            with suppress(OSError):
                file.close()


# %% [markdown]
# llm.c's program takes no orders: it trains forty-one steps and prints a line
# after each. We let it believe that it runs alone. When its line has come, we
# stop the process with a signal, and when its turn is there another signal
# wakes it. Its own times would include the sleep, so we take the time from
# the wake-up, or from the last other line it printed, to the step's line.
# What it computes between printing and falling asleep is lost to the
# measurement: well below a millisecond of a step that takes seconds.
#
# The program has its batch of 4 times 64 tokens compiled in, and it wants its
# model and its tokens under certain names.


# %% what llm.c reads tags=["exporti"] module="race"
def _llmc_folder(folder, cfg):
    """A folder with a random model and random tokens for train_gpt2."""
    arena = Arena({"params": (np.float32, parameter_shapes(cfg))})
    init_params(arena["params"], cfg, 42)
    path = Path(folder)
    write_checkpoint(path / "gpt2_124M.bin", cfg, arena.flat("params"))
    data = path / "dev" / "data" / "tinyshakespeare"
    data.mkdir(parents=True)
    tokens = np.random.RandomState(0).randint(0, cfg.vocab_size, 1 << 16)
    for part in ("train", "val"):
        name = f"tiny_shakespeare_{part}.bin"
        write_shard(data / name, tokens.astype(np.uint16))


# %% llm.c as a contestant tags=["export"] module="race"
class LlmC:
    """llm.c's train_gpt2, asleep between its steps; see `Contestant`.

    binary: the path of the program. shape: a dict with model, batch_size and
    seq_len.

    Derived in chapter 13.
    """

    def __init__(self, binary, shape, threads=None):
        self.unmeasured = None
        if (shape["batch_size"], shape["seq_len"]) != (4, 64):
            self.unmeasured = "has B=4 T=64 compiled in"
        if os.name != "posix":
            self.unmeasured = "can be put to sleep on Linux and macOS only"
        if self.unmeasured:
            return
        import pty  # its end of a terminal makes C print line by line

        self._folder = tempfile.TemporaryDirectory()
        _llmc_folder(self._folder.name, GPT2Config(**shape["model"]))
        screen, keyboard = pty.openpty()
        self._lines = os.fdopen(screen, errors="replace")
        self._process = subprocess.Popen(
            [str(Path(binary).resolve())],
            cwd=self._folder.name,
            stdin=subprocess.DEVNULL,
            stdout=keyboard,
            stderr=keyboard,
            env=_environment(threads),
        )
        os.close(keyboard)
        self._sleep()

    def _sleep(self):
        self._process.send_signal(signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)

    def step(self):
        """Train once; a dict with the seconds and the loss."""
        self._process.send_signal(signal.SIGCONT)
        start, line = time.perf_counter(), ""
        while True:
            try:
                line = self._lines.readline()
            except OSError:  # how a terminal says that its program has ended
                line = ""
            now = time.perf_counter()
            if not line:
                raise ChildProcessError("llm.c: the program has ended")
            found = re.match(r"step \d+: train loss (\S+)", line)
            if found:
                self._sleep()
                return {"seconds": now - start, "loss": float(found[1])}
            start = now

    def finish(self):
        """A dict of what is known about the process."""
        return {"peak_bytes": peers.peak_memory(self._process.pid)}

    def close(self):
        """End the process and remove its folder."""
        if self.unmeasured is None:
            self._process.kill()
            self._process.wait()
            self._lines.close()
            self._folder.cleanup()


# %% who races tags=["export"] module="race"
def lineup(settings):
    """The names of all contestants of some `Settings`, each with its spec.

    Returns a dict; llm.c's spec holds the path of its program. Raises
    ValueError for a name that nobody has and a number below 1, OSError for
    a program that is not there.

    Derived in chapter 13.
    """
    for name in ("steps", "threads"):
        number = getattr(settings, name)
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    specs = {}
    for precision in settings.precisions:
        ours = {"backend": settings.backend, "precision": precision}
        specs[f"llmnb {precision}"] = {"kind": "llmnb", **ours}
    for name in settings.against:
        kind, _, path = name.partition("=")
        if kind == "llmc" and path:
            if not os.access(path, os.X_OK):
                raise FileNotFoundError(f"{path} is not a program")
            specs["llm.c"] = {"kind": "llmc", "path": path}
        elif name in PEERS:
            specs[name] = PEERS[name]
        else:
            known = ", ".join([*PEERS, "llmc=PATH"])
            raise ValueError(f"no contestant {name!r}: choose from {known}")
    return specs


# %% start a contestant tags=["exporti"] module="race"
def _start(name, spec, shape, settings, cache=None):
    spec = {**shape, **spec}
    if spec["kind"] == "llmc":
        return LlmC(spec["path"], shape, settings.threads)
    ours = spec["kind"] == "llmnb"
    python = sys.executable if ours else settings.torch_python
    try:
        return Contestant(name, spec, python, settings.threads, cache)
    except ChildProcessError as error:
        if "No module named 'torch'" not in str(error):
            raise
        raise ChildProcessError(
            f"{name}: {python} has no torch; name a Python that has it with "
            "--torch-python"
        ) from None


# %% in turns tags=["export"] module="race"
def take_turns(contestants, rounds):
    """One step of each contestant a round; who begins changes each round.

    contestants: a dict from name to an object with `step`. rounds: an
    iterable of round numbers. Returns a dict from name to a list of what
    `step` returned.

    Derived in chapter 13.
    """
    names = [*contestants]
    replies = {name: [] for name in names}
    for number in rounds:
        first = number % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(PAUSE)
            replies[name].append(contestants[name].step())
    return replies


# %% the race tags=["export"] module="race"
def race(shape, settings, bar=iter):
    """Race all contestants of some `Settings` on one shape.

    shape: a dict with model (what GPT2Config takes), batch_size, seq_len.
    bar: takes the rounds and gives them back, such as tqdm. Returns two
    dicts by name: of each contestant its steps (one dict a round, the
    `WARM_UP` rounds first) and its facts, or else why it is unmeasured.

    Derived in chapter 13.
    """
    found, why = {}, {}
    with ExitStack() as stack:
        runners = {}
        for name, spec in lineup(settings).items():
            runner = _start(name, spec, shape, settings)
            stack.callback(runner.close)
            if runner.unmeasured:
                why[name] = runner.unmeasured
            else:
                runners[name] = runner
        if runners:
            rounds = bar(range(WARM_UP + settings.steps))
            replies = take_turns(runners, rounds)
            for name, runner in runners.items():
                facts = runner.finish()
                found[name] = {"steps": replies[name], "facts": facts}
    return found, why


# %% ratios tags=["export"] module="race"
def ratios(seconds):
    """Compare every llmnb with every peer, round by round.

    seconds: a dict from name to a list, one number a round; ours begin with
    "llmnb". Returns a list of dicts: ours, peer, and of the rounds' ratios
    of our time to the peer's the median, the lowest and the highest.

    Derived in chapter 13.
    """
    ours = [x for x in seconds if x.startswith("llmnb")]
    table = []
    for a in ours:
        for b in [x for x in seconds if x not in ours]:
            pairs = zip(seconds[a], seconds[b], strict=True)
            each = [x / y for x, y in pairs]
            row = {"ours": a, "peer": b, "ratio": median(each)}
            table.append(row | {"low": min(each), "high": max(each)})
    return table


# %% [markdown]
# Two contestants that do nothing but wait show that the turns are given as
# promised: who begins changes, and the ratios are taken within a round.

# %% a race of two clocks
from itertools import cycle

from llmnb.race import ratios, take_turns


class Clock:
    def __init__(self, *seconds):
        self.seconds = cycle(seconds)

    def step(self):
        return {"seconds": next(self.seconds)}


clocks = {"llmnb fp32": Clock(1.0, 3.0), "other": Clock(2.0, 6.0)}
turns = take_turns(clocks, range(4))
seconds = {k: [x["seconds"] for x in v] for k, v in turns.items()}
print(ratios(seconds))

# %% [markdown]
# ### How long until the first step
#
# A program that compiles itself makes you wait. `llmnb bench --start`
# measures from the start of a process to the end of its first step: **cold**,
# with an empty folder for compiled code, then **warm**, with what the cold
# start has left there. Python's own files are in the system's memory in both
# cases.


# %% time to the first step tags=["export"] module="race"
STARTS = 3  # how often each contestant is started, cold and warm


def start_times(shape, settings, bar=iter):
    """Seconds from starting a process to the end of its first step.

    shape, bar: see `race`. In each of `STARTS` rounds each contestant starts
    cold and then warm. Returns a list of dicts: name, cold and warm (lists
    of seconds), or name and unmeasured. llm.c is left out: it has no
    compiled code to keep.

    Derived in chapter 13.
    """
    specs = lineup(settings)
    specs.pop("llm.c", None)
    rows = {name: {"name": name, "cold": [], "warm": []} for name in specs}
    for _ in bar(range(STARTS)):
        for name, spec in specs.items():
            with tempfile.TemporaryDirectory() as cache:
                for kind in ("cold", "warm"):
                    what = spec, shape, settings, cache
                    spent, why = _first_step(name, *what)
                    rows[name][kind].append(spent)
            if why:
                rows[name] = {"name": name, "unmeasured": why}
                specs = {k: v for k, v in specs.items() if k != name}
    return [*rows.values()]


# %% one start tags=["exporti"] module="race"
def _first_step(name, spec, shape, settings, cache):
    """Seconds to the first step, and why there are none."""
    start = time.perf_counter()
    runner = _start(name, spec, shape, settings, cache)
    try:
        if not runner.unmeasured:
            runner.step()
        return time.perf_counter() - start, runner.unmeasured
    finally:
        runner.close()


# %% [markdown]
# ### The benchmark
#
# What is left is to gather numbers, print them and draw them. Three
# configurations have names: a small model, and GPT-2 with 124 million
# parameters on a short and on a long text.
#
# Taking turns does not make a busy machine a quiet one. When a third program
# wants a core, the contestants suffer differently: threads that spin until
# all of them have finished lose the most. So the report states the machine's
# **load** before the race. A load far below 1 is a quiet machine.

# %% imports of the report tags=["export"] module="bench"
import os
import re
import subprocess
from datetime import date
from pathlib import Path
from statistics import median

from llmnb import peers
from llmnb.config import GPT2Config, flops_per_token, parameter_count
from llmnb.race import (
    WARM_UP,
    Settings,
    cores,
    lineup,
    race,
    ratios,
    start_times,
)
from llmnb.timing import machine

# %% named configurations tags=["export"] module="bench"
SMALL = GPT2Config(64, 256, 4, 4, 128)
CONFIGS = {
    "small": (SMALL, 12, 64),
    "124m-64": (GPT2Config(), 4, 64),
    "124m-256": (GPT2Config(), 4, 256),
    "124m-1024": (GPT2Config(), 1, 1024),
}


# %% a shape tags=["exporti"] module="bench"
def _shape(cfg, batch_size, seq_len):
    sizes = {"batch_size": batch_size, "seq_len": seq_len}
    return {"model": dict(vars(cfg)), **sizes}


# %% the benchmark tags=["export"] module="bench"
def bench(configs, settings=None, start=False, bar=iter):
    """Measure training steps, and starts; a dict ready for JSON.

    configs: a dict from name to (GPT2Config, batch_size, seq_len), such as
    `CONFIGS`. settings: a `race.Settings`. start: whether to measure
    `start_times` of the small model too. bar: see `race`. Seconds are those
    of the rounds, in order; memory is in bytes. Raises ValueError or
    ChildProcessError in one sentence.

    Derived in chapter 13.
    """
    settings = settings or Settings()
    lineup(settings)  # so that a mistake is found before anything is built
    result = {"date": date.today().isoformat(), "commit": _commit()}
    result |= {"machine": machine(), "threads": settings.threads or cores()}
    result |= {"load": load(), "backend": settings.backend}
    result["configs"] = [
        _config_result(name, *what, settings, bar)
        for name, what in configs.items()
    ]
    shape = _shape(*CONFIGS["small"])
    result["start"] = start_times(shape, settings, bar) if start else []
    return shares(result)


# %% is the machine busy tags=["export"] module="bench"
def load():
    """How many threads have wanted to run in the last minute, on average.

    None where the system does not say.

    Derived in chapter 13.
    """
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


# %% which llmnb tags=["exporti"] module="bench"
def _commit():
    """The commit of the checkout that this file is in; None elsewhere."""
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(peers.__file__).parents[1]
    if not (folder / ".git").exists():
        return None
    try:
        found = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() or None


# %% one configuration tags=["exporti"] module="bench"
def _config_result(name, cfg, batch_size, seq_len, settings, bar):
    shape = _shape(cfg, batch_size, seq_len)
    found, why = race(shape, settings, bar)
    flops = flops_per_token(cfg, seq_len) * batch_size * seq_len
    rows = [_row(name, flops, shape, **x) for name, x in found.items()]
    rows += [{"name": k, "unmeasured": v} for k, v in why.items()]
    order = [*lineup(settings)]
    rows.sort(key=lambda row: order.index(row["name"]))
    seconds = {x["name"]: x["seconds"] for x in rows if "seconds" in x}
    facts = {"parameters": parameter_count(cfg), "flops_per_step": flops}
    facts |= {"contestants": rows, "ratios": ratios(seconds)}
    return {"name": name, **shape, **facts}


# %% shares of the peak tags=["export"] module="bench"
def shares(result):
    """Give each row of a result its share of the machine's FMA peak.

    The peak is the highest that any row has measured: other programs can
    only lower it. Changes result in place and returns it.

    Derived in chapter 13.
    """
    rows = [row for c in result["configs"] for row in c["contestants"]]
    peak = max((row.get("fma_peak", 0) for row in rows), default=0)
    for row in rows:
        if peak and "flops_per_second" in row:
            row["share_of_peak"] = row["flops_per_second"] / peak
    return result


# %% one contestant tags=["exporti"] module="bench"
def _row(name, flops, shape, steps, facts):
    measured = steps[WARM_UP:]
    seconds = [x["seconds"] for x in measured]
    middle = median(seconds)
    row = {"name": name, "seconds": seconds, "step_seconds": middle}
    tokens = shape["batch_size"] * shape["seq_len"]
    row["tokens_per_second"] = tokens / middle
    row["flops_per_second"] = flops / middle
    row |= {"first_loss": steps[0]["loss"], **facts}
    if "layers" in steps[0]:
        row |= {"parts": _parts(measured), "layers": _layers(measured)}
    return row


# %% medians tags=["exporti"] module="bench"
def _parts(steps):
    return {x: median(s["parts"][x] for s in steps) for x in PARTS}


def _layers(steps):
    """One dict a backend function, in the order of first use."""
    table = []
    for name, calls in steps[0]["calls"].items():
        seconds = median(x["layers"][name] for x in steps)
        table.append({"name": name, "calls": calls, "seconds": seconds})
    rest = [x["seconds"] - sum(x["layers"].values()) for x in steps]
    table.append({"name": "(the rest)", "calls": 1, "seconds": median(rest)})
    return table


# %% a report in words tags=["export"] module="bench"
def report(result):
    """The result of `bench` as a text of lines to print.

    Derived in chapter 13.
    """
    lines = [f"machine  {result['machine']}, {result['threads']} threads"]
    if result["load"] is not None:
        lines += [f"load     {result['load']:.2f} before the race"]
    for config in result["configs"]:
        lines += ["", *_config_lines(config)]
    if result["start"]:
        lines += ["", "seconds to the first step of the small model", ""]
        lines += [f"{'':<16} {'cold':>9} {'warm':>9}"]
        for row in result["start"]:
            times = row.get("unmeasured") or " ".join(
                f"{median(row[kind]):9.2f}" for kind in ("cold", "warm")
            )
            lines.append(f"{row['name']:<16} {times}")
    return "\n".join(lines)


# %% one configuration in words tags=["exporti"] module="bench"
def _config_lines(config):
    shape = "L {num_layers}  NH {num_heads}  C {channels}  V {vocab_size}"
    yield (
        f"{config['name']}  {shape.format(**config['model'])}  "
        f"B {config['batch_size']}  T {config['seq_len']}: "
        f"{config['parameters']:,} parameters"
    )
    titles = "ms a step", "tokens/s", "GFLOP/s", "of peak", "peak MB"
    yield ""
    yield f"{'':<16}" + "".join(f"{x:>11}" for x in titles)
    for row in config["contestants"]:
        yield f"{row['name']:<16}" + _numbers(row)
    yield ""
    for x in config["ratios"]:
        yield (
            f"{x['ours']} / {x['peer']}: {x['ratio']:.2f} of its time, median "
            f"of the rounds ({x['low']:.2f} to {x['high']:.2f})"
        )
    for row in config["contestants"]:
        if "layers" in row:
            yield from ("", f"{row['name']}, where the time goes", "")
            yield from _table(row)


# %% the numbers of a row tags=["exporti"] module="bench"
def _numbers(row):
    if "unmeasured" in row:
        return "  " + row["unmeasured"]
    share, peak = row.get("share_of_peak"), row["peak_bytes"]
    cells = [
        f"{row['step_seconds'] * 1e3:.1f}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['flops_per_second'] / 1e9:.1f}",
        f"{share:.0%}" if share else "-",
        f"{peak / 1e6:,.0f}" if peak else "-",
    ]
    return "".join(f"{x:>11}" for x in cells)


# %% the table tags=["exporti"] module="bench"
def _table(row):
    total = row["step_seconds"]
    rows = [(name, "", s) for name, s in row["parts"].items()]
    rows += [("", "", None)]
    rows += [(x["name"], x["calls"], x["seconds"]) for x in row["layers"]]
    yield f"{'':<30} {'calls':>6} {'ms':>9} {'share':>7}"
    for name, calls, s in rows:
        if s is None:
            yield ""
            continue
        yield f"{name:<30} {calls:>6} {s * 1e3:9.2f} {s / total:7.1%}"


# %% the bars tags=["export"] module="bench"
def layers_figure(result):
    """Where the time goes: a matplotlib figure, a panel for each llmnb row.

    result: of `bench`. Raises ValueError when it has no such row.

    Derived in chapter 13.
    """
    from matplotlib.figure import Figure

    rows = [
        (f"{config['name']}, {row['name']}", row)
        for config in result["configs"]
        for row in config["contestants"]
        if "layers" in row
    ]
    if not rows:
        raise ValueError("there is nothing to draw: no layer was measured")
    fig = Figure(figsize=(8, 0.4 + 2.9 * len(rows)), dpi=100)
    panels = fig.subplots(len(rows), squeeze=False)[:, 0]
    for ax, (title, row) in zip(panels, rows, strict=True):
        _draw_bars(ax, row)
        ax.set_title(title, loc="left", size=11)
    fig.tight_layout()
    return fig


# %% one panel tags=["exporti"] module="bench"
def _draw_bars(ax, row):
    """Bars of milliseconds: a layer's forward and backward in one bar."""
    from llmnb.diagram import PALETTE

    times, names = {x["name"]: x["seconds"] * 1e3 for x in row["layers"]}, {}
    for name in times:
        names.setdefault(re.sub(r"_(for|back)ward$", "", name), None)
    left = dict.fromkeys(names, 0.0)
    for way, colour in (("forward", "blue"), ("backward", "orange")):
        width = [times.get(f"{x}_{way}", 0.0) for x in names]
        ax.barh([*names], width, left=[*left.values()], label=way,
                color=PALETTE[colour])  # fmt: skip
        left = dict(zip(names, width, strict=True))
    ax.barh([*names], [times.get(x, 0.0) for x in names], label="neither",
            color=PALETTE["grey"])  # fmt: skip
    ax.invert_yaxis()
    ax.set_xlabel("milliseconds of a step")
    ax.legend(loc="lower right")


# %% [markdown]
# Here is the benchmark on this chapter's configuration, three rounds and
# nobody to race against. The load is this notebook's own: it has trained a
# minute ago.

# %% measured in a process of its own tags=["nbval-ignore-output"]
from llmnb.bench import bench, report
from llmnb.race import Settings

what = config.model(V), config.batch_size, config.seq_len
print(report(bench({"this chapter": what}, Settings(steps=3))))

# %% [markdown]
# With PyTorch or llm.c on your machine, `llmnb bench --config 124m-64
# --against torch llmc=PATH` races against them. The
# [results page](../book/results.md) shows such races.

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
# - Compare speeds in turns, each program in its own process, by the median
#   of the rounds' ratios.

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
