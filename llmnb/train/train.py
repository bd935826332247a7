# Written by `make export` from notebooks/1_by_hand/16_training.py: edit that file.

"""The training loop and its options."""

__all__ = [
    "AT_LEAST",
    "Data",
    "DataOptions",
    "HEAD",
    "KeepOptions",
    "LANDMARK_TOKENS",
    "LearningOptions",
    "ModelOptions",
    "Progress",
    "SHAPE",
    "Step",
    "TOKENIZER_TEXT",
    "TrainConfig",
    "UpdateOptions",
    "WIDTHS",
    "accumulate",
    "check_memory",
    "config_from",
    "depth_shape",
    "draw_losses",
    "evaluate",
    "landmarks",
    "load_run",
    "loaders",
    "log_row",
    "make_encoding",
    "model_step",
    "new_model",
    "note_model",
    "prepare",
    "read_run",
    "run_folder",
    "save_figure",
    "save_run",
    "sparing",
    "starting_from",
    "train",
    "train_step",
    "unigram_entropy",
    "weights_path",
    "write_log",
    "write_record",
    "z_score",
]


# imports of the trainer
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


# the unigram entropy
def unigram_entropy(train_tokens, tokens, vocab_size):
    """Mean -log p of `tokens` under the token frequencies of a text.

    train_tokens, tokens: 1-D integer arrays with values in [0, vocab_size).
    Every count is raised by 1. Returns nats a token, a float.

    Derived in chapter 1.16.
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

    Derived in chapter 1.16.
    """

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


# what the model looks like
@dataclass(frozen=True)
class ModelOptions:
    """What the model looks like; see `TrainConfig`.

    Derived in chapter 1.16.
    """

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


# how it learns
@dataclass(frozen=True)
class LearningOptions:
    """How a run learns; see `TrainConfig`.

    Derived in chapter 1.16.
    """

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


# what an update is
@dataclass(frozen=True)
class UpdateOptions:
    """What an update of the weights is; see `TrainConfig`.

    Derived in chapter 1.16.
    """

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


# what it keeps
@dataclass(frozen=True)
class KeepOptions:
    """What a run keeps and shows on its way; see `TrainConfig`.

    Derived in chapter 1.16.
    """

    save_every: int = _option(
        250, "steps between two checkpoints; 0: only when it stops"
    )
    keep: int = _option(2, "checkpoints that are kept, the newest ones")
    sample_every: int = _option(
        0, "steps between two samples in the terminal; 0: none"
    )


# a number in its range
def _check_range(name, value, least, below):
    if not least <= value < below:
        end = f"and below {below}" if below < math.inf else ""
        raise ValueError(
            f"{name} must be at least {least} {end}".rstrip()
            + f", got {value}"
        )


# a shape from a depth
WIDTHS = {0: 0, 6: 384, 12: 768, 24: 1024, 36: 1280, 48: 1600}
HEAD = 64  # channels of a head


def depth_shape(depth):
    """Layers, heads and channels of a GPT-2 of this depth.

    Heads have 64 channels. Raises ValueError unless 1 <= depth <= 48.

    Derived in chapter 1.16.
    """
    _check_range("depth", depth, 1, 1 + max(WIDTHS))
    width = round(np.interp(depth, [*WIDTHS], [*WIDTHS.values()]))
    heads = -(-width // HEAD)
    return depth, heads, heads * HEAD


# the least values
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


# numbers that go together
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


# a run
@dataclass(frozen=True)
class TrainConfig(
    KeepOptions, UpdateOptions, LearningOptions, ModelOptions, DataOptions
):
    """Every number that fixes a training run.

    With a depth, num_layers, num_heads and channels are set by it. Raises
    ValueError, in one sentence, when a number is out of its range or does
    not go with another.

    Derived in chapter 1.16.
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


# the data of a run
TOKENIZER_TEXT = 2_000_000  # characters the bpe tokenizer learns from


class Data(NamedTuple):
    """The tokens of a run: what `prepare` returns.

    encoding: a tiktoken.Encoding. train_tokens, val_tokens: 1-D uint16
    arrays, or the `Shards` of a folder. source: a sentence that
    says where the text came from.

    Derived in chapter 1.16.
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

    Derived in chapter 1.16.
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


# the tokenizer of a run
def _hub():
    """The module that reads the tokenizers of other programs."""
    return importlib.import_module("llmnb.formats.vocabulary")


def make_encoding(config, documents):
    """The tokenizer that a TrainConfig names, trained if it is "bpe".

    documents: an iterable of str, of which the first `TOKENIZER_TEXT`
    characters are learnt from, with `config.endoftext` but for
    `<|endoftext|>`. Raises ValueError, OSError or RuntimeError,
    in one sentence.

    Derived in chapter 1.16.
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


# the gradient of an update
def accumulate(config, model, batches, step=0):
    """Leave the gradient of one update in model.grads; return its loss.

    Takes `config.micro_batches` batches from `batches`, whatever has a
    next_batch. The loss, a float, is the mean over all of them, and the
    gradient is that of this mean. Raises FloatingPointError, naming the
    step, at a loss that is not finite.

    Derived in chapter 1.16.
    """
    count, losses = config.micro_batches, []
    for k in range(count):
        losses.append(model.forward(*batches.next_batch()))
        _check_finite("loss", losses[-1], step, config.rate(step))
        model.backward(add=k > 0, share=1 / count)  # (1.16.5)
    return sum(losses) / count


# finite or not
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


# how far out a value is
def z_score(recent, value):
    """How many standard deviations `value` lies above the mean of `recent`.

    recent: a list of floats. 0 where they have no spread. A float.

    Derived in chapter 1.16.
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

    Derived in chapter 1.16.
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
def evaluate(model, batches, count):
    """Mean loss of a model over the first `count` batches; trains nothing.

    batches: a DataLoader, which is set back to its first batch. At most one
    epoch is read. Returns nats a token, a float. Raises FloatingPointError
    when it is not finite.

    Derived in chapter 1.16.
    """
    loss = _mean_loss(model, batches, count)
    _check_finite("validation loss", loss)
    return loss


def _mean_loss(model, batches, count):
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
    step. skipped: 1 if the step made no update, else 0. In the last report,
    which follows the last update, only step and val_loss are given.

    Derived in chapter 1.16.
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

    Derived in chapter 1.16.
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


# validation, and the best so far
def _validate(config, model, validation, at):
    loss = _mean_loss(model, validation, config.eval_batches)
    _check_finite("validation loss", loss, at.step, config.rate(at.step))
    at.best_loss = loss if at.best_loss is None else min(at.best_loss, loss)
    return loss


# one step
def train_step(config, model, batches, at):
    """Update a GPT2 once, or skip it; returns loss, rate, norm, skipped.

    batches: as in `accumulate`. at: a `Progress`, changed in place. skipped
    is 1 if the loss or the norm stood out, else 0. Raises
    FloatingPointError when one is not finite, before the update, or after
    it where the GPU makes the step in one launch.

    Derived in chapter 1.16.
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


# the numbers of an update
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


# the model and its batches
def new_model(config, vocab_size):
    """The GPT2 that a run starts with, for a vocabulary of this size.

    Freshly initialised, or with the weights of `config.init`. Raises
    ValueError when these are for another vocabulary, and as `check_memory`
    and GPT2.from_checkpoint do.

    Derived in chapter 1.16.
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

    Derived in chapter 1.16.
    """
    if config.backend != "cuda":
        dtype = np.float64 if config.precision == "fp64" else np.float32
        layout = gpt2_layout(cfg, config.batch_size, config.seq_len, dtype)
        check_room(sum(footprint(layout).values()))


# where the weights are
def weights_path(path):
    """The newest weights in a run's folder; any other path as it is.

    They are in the newest state, unless model.bin was written at its step or
    later: config.json says at which. No clock is asked.

    Derived in chapter 1.16.
    """
    from llmnb.train.run import _step_of, states

    folder, model = Path(path), Path(path, "model.bin")
    last = states(folder)[-1:] if folder.is_dir() else []
    whole = model.is_file()
    if last and not (whole and model_step(folder) >= _step_of(last[0])):
        return last[0]
    return model if whole else folder


def model_step(folder):
    """The step at which a run's model.bin was written, or -1: not known.

    Derived in chapter 1.16.
    """
    with suppress(OSError, ValueError, KeyError, TypeError):
        text = read_small(Path(folder, "config.json"), 1 << 20)
        return int(json.loads(text)["model_step"])
    return -1


# its batches
def loaders(config, data):
    """The DataLoaders of a run: shuffled for training, fixed to validate.

    A shard of fewer tokens than one batch takes is left out. Raises
    ValueError when all are.

    Derived in chapter 1.16.
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

    Derived in chapter 1.16.
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

    Derived in chapter 1.16.
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

    Derived in chapter 1.16.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file, not a folder")
    make_folder(path)
    if any(x.name != LOCK for x in path.iterdir()) and not force:
        state = in_use(path) or "exists and is not empty"
        raise FileExistsError(f"{path} {state}")
    return path


# the log
def write_log(path, steps):
    """Write a list of `Step` as CSV; what a step does not give stays empty.

    Derived in chapter 1.16.
    """
    lines = [",".join(Step._fields), *map(log_row, steps)]
    _write_text(path, "\n".join(lines) + "\n")


def log_row(step):
    """The row of a `Step` in a log: numbers with nine digits, and commas.

    Derived in chapter 1.16.
    """
    given = ("" if x is None else f"{x:.9g}" for x in step[1:])
    return ",".join([str(step.step), *given])


def _write_text(path, text):
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


# what may fail
@contextmanager
def sparing(what):
    """Turn an error within into a warning that says what there is not.

    Derived in chapter 1.16.
    """
    try:
        yield
    except Exception as error:  # a picture can fail with any
        why = " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(f"goes on without {what}: {why}", stacklevel=3)


# the folder's files
def save_run(folder, config, model, data, steps):
    """Write model.bin, config.json, the tokenizer, log.csv and loss.png.

    folder: the Path that `run_folder` made. steps: list of `Step`. A log or
    a figure that cannot be written is a warning.

    Derived in chapter 1.16.
    """
    model.save_checkpoint(folder / "model.bin")
    marks = write_record(folder, config, data)
    with sparing(folder / "log.csv"):
        write_log(folder / "log.csv", steps)
    with sparing(folder / "loss.png"):
        save_figure(folder / "loss.png", steps, marks)


# what a run was
def write_record(folder, config, data):
    """Write tokenizer.tiktoken and config.json; returns the landmarks.

    Derived in chapter 1.16.
    """
    from llmnb.text import tokenizer

    folder, marks = Path(folder), landmarks(config, data)
    tokenizer.save(data.encoding, folder / "tokenizer.tiktoken")
    record = json.dumps(_facts(config, data, marks), indent=1)
    _write_text(folder / "config.json", record + "\n")
    return marks


def note_model(folder, step):
    """Note in config.json at which step model.bin was written.

    Derived in chapter 1.16.
    """
    path = Path(folder) / "config.json"
    record = json.loads(path.read_text("utf-8")) | {"model_step": step}
    _write_text(path, json.dumps(record, indent=1) + "\n")


# what is written down
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


# the figure
def save_figure(path, steps, landmarks):
    """Write the loss curves of a run as PNG, needing no display.

    The user's own settings of matplotlib, such as fonts, are left aside.

    Derived in chapter 1.16.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context("default"), replacing(path) as file:
        figure = Figure(figsize=(8, 4.5), dpi=100, layout="tight")
        draw_losses(figure.subplots(), steps, landmarks)
        figure.savefig(file, format="png")


# a run read back
def load_run(folder, batch_size=1, seq_len=None, backend=None):
    """Read the model, the tokenizer and the TrainConfig of a run folder.

    seq_len and backend default to the run's own; of a run in TF32 the model
    computes in float32 on another backend. Raises OSError or ValueError, in
    one sentence, when a file is missing or damaged.

    Derived in chapter 1.16.
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


# the numbers of a run, read back
def read_run(folder):
    """The TrainConfig in a run folder's config.json.

    Raises OSError or ValueError, in one sentence, when it is missing or
    holds something else.

    Derived in chapter 1.16.
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

    Derived in chapter 1.16.
    """
    config = TrainConfig(**{**found, "corpus": tuple(found["corpus"])})
    for each in fields(config):
        value = getattr(config, each.name)
        if type(value) not in (each.type, int if each.type is float else None):
            kind = each.type.__name__
            raise TypeError(f"{each.name} must be {kind}, got {value!r}")
    return config


# a run from a checkpoint
def starting_from(init, **given):
    """The TrainConfig of a run that starts from a checkpoint's weights.

    init: the path of a run's folder, or of what GPT2.from_checkpoint reads.
    given: other fields. Unless given, the learning rate is 1e-4, the
    tokenizer that of llmnb.formats.vocabulary.tokenizer_of, and seq_len no more than the
    checkpoint allows. Raises OSError or ValueError when it cannot be read,
    has another shape than is given, or no tokenizer is certain.

    Derived in chapter 1.16.
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
