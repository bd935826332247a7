# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       train.options: "The numbers of a run, in one dataclass."
#       train.feed: "The text of a run as tokens, and its batches."
# ---

# %% [markdown]
# # Options: the numbers of a run, and its text
#
# > Every number that fixes a run stands in one frozen dataclass, with a sentence
# > of help; the text it names becomes tokens, and tokens become batches.
#
# *Reading time: 24 minutes. You need: [chapter 1.17](../1_by_hand/17_training.ipynb) and the texts of
# [chapter 4.8](08_corpora.ipynb).*

# %% [markdown]
# ## Where we are
#
# A training run is fixed by its numbers: what it reads, what the model looks
# like, how it learns. This chapter gathers them in one place, where the loop,
# the command line and the files of a run find them, and turns the text they name
# into batches. At its end you can
#
# - list what fixes a run, and add a number to it in one place;
# - say which text a run reads, and with which tokenizer;
# - say why a loader of shards leaves some of them out.

# %% [markdown]
# ## Setup

# %% setup
from dataclasses import replace

from llmnb.book.verify import verdict

# %% [markdown]
# ## The numbers of a run
#
# A run is fixed by its numbers: what it reads, what the model looks like,
# how it learns. They live in one frozen dataclass, `TrainConfig`, in five
# parts. Each number carries a sentence of help, because the command line
# of [chapter 4.23](../4_practice/23_commands.ipynb) makes its options from these fields.

# %% imports of options tags=["export"]
import math
from dataclasses import dataclass, field

import numpy as np

from llmnb.config import GPT2Config
from llmnb.train.schedule import learning_rate


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
def check_range(name, value, least, below):
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
    check_range("depth", depth, 1, 1 + max(WIDTHS))
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
                check_range(name, getattr(self, name), least, math.inf)
        if self.depth:
            _take_shape(self, depth_shape(self.depth))
        for name in ("beta1", "beta2"):
            check_range(name, getattr(self, name), 0, 1)
        check_range("seed", self.seed, 0, 2**32)
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
# `prepare` does what chapters [1.2](../1_by_hand/02_tokens.ipynb) and
# [1.3](../1_by_hand/03_batches.ipynb) taught, in order: load the documents, train
# or load a tokenizer, encode, split. It returns the
# tokenizer, the two token arrays, and a sentence that says where the text came
# from and what of it was passed over. The tokenizer learns from the first two
# million characters: the documents come in a mixed order, and more text would
# change the merges little and take longer.

# %% imports of feed tags=["export"] module="train.feed"
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmnb.checks import check_room
from llmnb.formats.vocabulary import open_encoding
from llmnb.formats.shard import Shards, find_shards, sample_tokens
from llmnb.text.data import DataLoader
from llmnb.train.landmarks import unigram_entropy


# %% the data of a run tags=["export"] module="train.feed"
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


# %% from text to tokens tags=["export"] module="train.feed"
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
    characters = sum(map(len, documents))
    source = corpus.describe(sources, len(documents), characters)
    source += tally.words(config.endoftext)
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


# %% from a folder of shards tags=["exporti"] module="train.feed"
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
# A run may use a tokenizer that another program made. Chapter 4.6 derives how
# such files are read.


# %% the tokenizer of a run tags=["export"] module="train.feed"
def make_encoding(config, documents):
    """The tokenizer that a TrainConfig names, trained if it is "bpe".

    documents: an iterable of str, of which the first `TOKENIZER_TEXT`
    characters are learnt from, with `config.endoftext` but for
    `<|endoftext|>`. Raises ValueError, OSError or RuntimeError,
    in one sentence.
    """
    from llmnb.text import tokenizer

    if config.tokenizer != "bpe":
        encoding = open_encoding(config.tokenizer)
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


# %% its batches tags=["export"] module="train.feed"
def loaders(config, data):
    """The DataLoaders of a run: shuffled for training, fixed to validate.

    A shard of fewer tokens than one batch takes is left out. Raises
    ValueError when all are.
    """
    return (
        _loader(config, data.train_tokens, seed=config.seed),
        _loader(config, data.val_tokens, shuffle=False),
    )


# %% a loader of an array or of shards tags=["exporti"] module="train.feed"
def _loader(config, tokens, **how):
    shape = config.batch_size, config.seq_len
    if not isinstance(tokens, Shards):
        return DataLoader([tokens], *shape, **how)
    pairs = zip(tokens.paths, tokens.lengths, strict=True)
    long = [path for path, n in pairs if n > math.prod(shape)]
    return DataLoader(long or tokens.paths, *shape, **how)


# %% [markdown]
# The losses of a run are to be held against something. What a uniform guess pays
# and what counting pays are known from the tokens alone
# ([chapter 1.17](../1_by_hand/17_training.ipynb)).


# %% the landmarks tags=["export"] module="train.feed"
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


# %% batches and landmarks
batches, validation = loaders(config, data)
marks = landmarks(config, data)
print([x.shape for x in batches.next_batch()])
verdict("landmarks", marks["unigram"] < marks["uniform"], "counting helps")

# %% [markdown]
# ## Take away
#
# - One frozen dataclass holds what fixes a run; what cannot be a run is refused
#   where it is made.
# - A tokenizer that is trained sees the first two million characters only.
#
# ## Exercises
#
# **1** (★). How many channels and heads has a model of depth 9? Ask the rule
# first, then the function.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# 9 lies half way between 6 and 12, so half way between 384 and 768 channels: 576,
# which is nine heads of 64 already, and nothing is rounded.
# :::

# %% exercise 1, checked tags=["hide-cell"]
verdict("depth 9", depth_shape(9) == (9, 9, 576), "nine heads of 64")

# %% [markdown]
# **2** (★★). An update shall see 2,048 tokens, and memory holds 8 rows of 64. How
# many batches go into it, and what happens if 2,000 tokens are asked for?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# $2048 / (8 \cdot 64) = 4$. 2,000 is no multiple of 512, and the configuration is
# refused: a piece of another size would weigh each of its tokens differently.
# :::

# %% exercise 2, checked tags=["hide-cell"]
pieces = TrainConfig(total_batch=2048).micro_batches
try:
    TrainConfig(total_batch=2000)
except ValueError as error:
    print(error)
verdict("pieces", pieces == 4, "four batches an update")

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("4.12")
