# Written by `make export` from notebooks/13_training.py: edit that file.

"""Train a GPT-2 and watch it learn.

Text becomes batches, batches become gradients, gradients become a model that
predicts better than counting can, along the curve PyTorch draws.
"""

__all__ = [
    "AT_LEAST",
    "Data",
    "DataOptions",
    "LANDMARK_TOKENS",
    "LearningOptions",
    "ModelOptions",
    "Step",
    "TOKENIZER_TEXT",
    "TrainConfig",
    "draw_losses",
    "evaluate",
    "landmarks",
    "load_run",
    "loaders",
    "make_encoding",
    "new_model",
    "prepare",
    "read_run",
    "run_folder",
    "save_figure",
    "save_run",
    "train",
    "train_step",
    "unigram_entropy",
    "write_log",
]


# imports of the trainer
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


# the unigram entropy
def unigram_entropy(train_tokens, tokens, vocab_size):
    """Mean -log p of `tokens` under the token frequencies of a text.

    train_tokens, tokens: 1-D integer arrays with values in [0, vocab_size).
    Every count is raised by 1. Returns nats a token, a float.

    Derived in chapter 13.
    """
    counts = np.bincount(train_tokens, minlength=vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[tokens].mean())


# an option with its help
def _option(default, text):
    return field(default=default, metadata={"help": text})


# what a run reads
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


# what the model looks like
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


# how it learns
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


# a number in its range
def _check_range(name, value, least, below):
    if not least <= value < below:
        end = f"and below {below}" if below < math.inf else ""
        raise ValueError(
            f"{name} must be at least {least} {end}".rstrip()
            + f", got {value}"
        )


# a run
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


# the data of a run
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


# from text to tokens
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


# where the text came from
def _describe(sources, documents):
    where = " ".join(str(x) for x in sources)
    if where == "stdlib":
        version = ".".join(str(x) for x in sys.version_info[:3])
        where += f" (Python {version})"
    size = sum(len(x) for x in documents)
    return f"{where}: {len(documents):,} documents, {size:,} characters"


# from a folder of shards
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


# the tokenizer of a run
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


# validation
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


# what a step reports
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


# the loop
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


# one step
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


# finite or not
def _check_finite(what, value, step, rate):
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the {what} is {value} at step {step} (learning rate {rate:.3g})"
            ": try a lower learning rate or a longer warm-up"
        )


# the model and its batches
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


# its batches
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


# a loader of an array or of shards
def _loader(config, tokens, **how):
    shape = config.batch_size, config.seq_len
    if not isinstance(tokens, Shards):
        return DataLoader([tokens], *shape, **how)
    pairs = zip(tokens.paths, tokens.lengths, strict=True)
    long = [path for path, n in pairs if n > math.prod(shape)]
    return DataLoader(long or tokens.paths, *shape, **how)


# the landmarks
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


# draw the losses
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


# points of a curve
SMOOTH = 20  # steps in the running mean of the training loss


def _series(steps, name):
    points = [
        (s.step, getattr(s, name))
        for s in steps
        if getattr(s, name) is not None
    ]
    return np.array(points, float).reshape(-1, 2).T


# a folder for a run
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


# the log
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


# the folder's files
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


# what is written down
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


# the figure
def save_figure(path, steps, landmarks):
    """Write the loss curves of a run as PNG, needing no display.

    Derived in chapter 13.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=100, layout="tight")
    draw_losses(figure.subplots(), steps, landmarks)
    with replacing(path) as file:
        figure.savefig(file, format="png")


# a run read back
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


# the numbers of a run, read back
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
