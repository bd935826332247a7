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
# *Reading time: 24 minutes. You need: [chapter 1.18](../1_by_hand/18_training.ipynb) and the texts of
# [chapter 4.8](08_corpora.ipynb).*

# %% [markdown]
# ## Where we are
#
# Part 1 trained with numbers that stood here and there in its cells. This
# chapter gathers them in one place, where the loop, the command line and the
# files of a run find them, and turns the text they name into batches. At its end
# you can
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
# parts. Each number carries its range and a sentence of help, because the
# command line of [chapter 4.23](23_commands.ipynb) makes its options from these
# fields, and from those of a few tables of its own: every option of every command
# is a field that `option` made.

# %% imports of options tags=["export"]
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields

import numpy as np

from llmnb.backend import choose
from llmnb.config import GPT2Config
from llmnb.train.schedule import KINDS, learning_rate


# %% an option tags=["export"]
def option(default, text, least=None, below=math.inf, **how):
    """A field of an option table: its default, its help, its range.

    least, below: what a number must not be less than, and must be less than;
    no least: it has no range of its own. how: further arguments of argparse's
    add_argument, such as metavar and nargs; positional=True for what is named
    by its place.
    """
    known = {"help": text, "range": (least, below), "how": how}
    return field(default=default, metadata=known)


# %% what a run reads tags=["export"]
@dataclass(frozen=True)
class DataOptions:
    """What a run reads; see `TrainConfig`."""

    corpus: tuple = option(
        ("stdlib",),
        "text to learn: stdlib, tinyshakespeare, or files and folders",
    )
    limit: int = option(0, "read at most this many characters; 0 means all", 0)
    tokenizer: str = option(
        "bpe",
        "bpe (trained on the text), byte, gpt2, or a file: a rank file, "
        "vocab.json, tokenizer.json, tokenizer.model or a .gguf",
    )
    vocab_size: int = option(1024, "tokens that the bpe tokenizer has", 1)
    field: str = option("text", "field of a JSON line that has the text")
    skip_bad: bool = option(
        False, "pass over bad records of JSON lines, and count them"
    )
    endoftext: bool = option(
        False, "take <|endoftext|> in a text as the token, not as text"
    )
    shards: str = option(
        "", "a folder written by `llmnb data`, instead of a corpus"
    )


# %% what the model looks like tags=["export"]
@dataclass(frozen=True)
class ModelOptions:
    """What the model looks like; see `TrainConfig`."""

    arch: str = option(
        "gpt2",
        "gpt2, llama, mistral, qwen2, qwen3, gemma, gemma2 or gemma3_text",
    )
    depth: int = option(
        0, "layers of a usual shape (12: GPT-2's 124M); 0: as said below", 0
    )
    num_layers: int = option(4, "transformer blocks (L)")
    num_heads: int = option(4, "attention heads (NH)")
    channels: int = option(128, "channels (C), a multiple of the heads")
    num_kv_heads: int = option(
        0, "heads of keys and values, not of gpt2; 0: as many as heads", 0
    )
    window: int = option(
        0, "positions that a query sees, not of gpt2; 0: as usual there", 0
    )
    seq_len: int = option(64, "tokens the model sees at once (T)")
    batch_size: int = option(8, "sequences in a batch (B)", 1)
    backend: str = option(
        "cpu", "cpu, cuda (a GPU), or reference (NumPy, slow)"
    )
    precision: str = option("fp32", "fp32, bf16, tf32 (cuda), or fp64 (slow)")


# %% how it learns tags=["export"]
@dataclass(frozen=True)
class LearningOptions:
    """How a run learns; see `TrainConfig`."""

    init: str = option(
        "", "start from this checkpoint, a file or a folder, at a rate of 1e-4"
    )
    steps: int = option(3000, "updates of the weights", 1)
    learning_rate: float = option(3e-3, "the highest learning rate", 0)
    warmup_fraction: float = option(0.1, "share of steps spent rising to it")
    schedule: str = option("cosine", f"one of {', '.join(KINDS)}")
    final_fraction: float = option(0.1, "the last rate over the highest")
    eval_every: int = option(100, "steps between two validations", 1)
    eval_batches: int = option(20, "batches in a validation", 1)
    seed: int = option(42, "seed of the weights and of the shuffle", 0, 2**32)


# %% what an update is tags=["export"]
@dataclass(frozen=True)
class UpdateOptions:
    """What an update of the weights is; see `TrainConfig`."""

    beta1: float = option(0.9, "AdamW: memory of the gradient", 0, 1)
    beta2: float = option(0.95, "AdamW: memory of its square", 0, 1)
    eps: float = option(1e-8, "AdamW: added to the denominator", 1e-38)
    weight_decay: float = option(0.1, "AdamW: decay of 2-D tensors", 0)
    clip: float = option(1.0, "largest gradient norm; 0 means no limit", 0)
    total_batch: int = option(
        0, "tokens in an update, a multiple of B*T; 0: one batch", 0
    )
    skip_loss: float = option(
        0.0, "skip updates whose loss stands out by this z-score; 0: never", 0
    )
    skip_norm: float = option(
        0.0, "the same for the norm of the gradient; 0: never", 0
    )
    skip_window: int = option(128, "steps that an update is compared with", 2)
    overfit: bool = option(False, "learn the first batch again and again")
    in_backward: bool = option(
        False, "let matrices learn while going back, which takes less "
        "memory; wants --clip 0, one batch in an update, no skipping, a CPU",
    )  # fmt: skip


# %% what it keeps tags=["export"]
@dataclass(frozen=True)
class KeepOptions:
    """What a run keeps and shows on its way; see `TrainConfig`."""

    save_every: int = option(
        250, "steps between two checkpoints; 0: only when it stops", 0
    )
    keep: int = option(2, "checkpoints that are kept, the newest ones", 1)
    sample_every: int = option(
        0, "steps between two samples in the terminal; 0: none", 0
    )


# %% [markdown]
# A number that makes no sense is refused when the configuration is built,
# not twenty seconds into a run. The ranges of single numbers stand beside them;
# which shapes are possible `GPT2Config` knows, so building one asks it.
#
# A single number can stand for the shape. The GPT-2 models that were
# published have 12, 24, 36 and 48 layers with 768, 1024, 1280 and 1600
# channels, and heads of 64 channels each. `depth` names such a model by its
# layers. We add d6 with 384 channels, at the same ratio as d12; below it
# the ratio stays, and between two of these the width lies on the line that
# joins them, rounded up to whole heads.


# %% a number in its range, a value of its kind tags=["exporti"]
def check_range(name, value, least, below=math.inf):
    if not least <= value < below:
        limited = below < math.inf or value == math.inf
        end = f" and below {below}" if limited else ""
        raise ValueError(f"{name} must be at least {least}{end}, got {value}")


def _of_kind(name, value, kind):
    """The value of an option as JSON keeps it, else TypeError."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if kind is tuple:
        many = (value,) if isinstance(value, str) else value  # not letters
        if isinstance(many, bytes) or not isinstance(many, Iterable):
            raise TypeError(f"{name} must be names of texts, got {value!r}")
        return tuple(_of_kind(name, x, str) for x in many)
    if type(value) not in ((int, float) if kind is float else (kind,)):
        raise TypeError(f"{name} must be {kind.__name__}, got {value!r}")
    return value


# %% a shape from a depth tags=["export"]
SHAPE = "num_layers", "num_heads", "channels"
FAMILY = "arch", "num_kv_heads", "window"  # what else a checkpoint fixes
_WIDTHS = {0: 0, 6: 384, 12: 768, 24: 1024, 36: 1280, 48: 1600}


def depth_shape(depth):
    """Layers, heads and channels of a GPT-2 of this depth.

    Heads have 64 channels. Raises ValueError unless 1 <= depth <= 48.
    """
    check_range("depth", depth, 1, 1 + max(_WIDTHS))
    width = round(np.interp(depth, [*_WIDTHS], [*_WIDTHS.values()]))
    heads = -(-width // 64)
    return depth, heads, heads * 64


# %% the shapes of some depths
for depth in (4, 6, 12, 16, 24, 36, 48):
    print(f"d{depth:<3}", *depth_shape(depth))


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


def _check_schedule(config):
    """By the names of the options, which `learning_rate` does not know."""
    choose("schedule", config.schedule, KINDS)
    for name in ("warmup_fraction", "final_fraction"):
        value = getattr(config, name)
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value}")


def _check_total(config):
    batch = config.batch_size * config.seq_len
    if config.total_batch % batch:
        raise ValueError(
            f"total_batch must be a multiple of a batch's {batch} tokens "
            f"(batch_size times seq_len), got {config.total_batch}"
        )


def _check_in_backward(config):
    """Weights learn before the whole gradient, and its norm, are known."""
    one = {0, config.batch_size * config.seq_len}
    usable = dict.fromkeys(("clip", "skip_loss", "skip_norm"), {0})
    usable |= {"total_batch": one, "backend": {"cpu", "reference"}}
    for name, values in usable.items():
        value = getattr(config, name)
        if value not in values:
            want = " or ".join(map(str, sorted(values)))
            raise ValueError(f"in_backward wants {name} {want}, got {value}")


# %% a run tags=["export"]
@dataclass(frozen=True)
class TrainConfig(
    KeepOptions, UpdateOptions, LearningOptions, ModelOptions, DataOptions
):
    """Every number that fixes a training run.

    With a depth, num_layers, num_heads and channels are set by it. A path
    becomes a str, a number of NumPy's one of Python's: a run keeps them as
    JSON. Raises TypeError or ValueError, in one sentence, when a number is of
    another kind, out of its range, or does not go with another.
    """

    def __post_init__(self):
        for each in fields(self):
            value = _of_kind(each.name, getattr(self, each.name), each.type)
            object.__setattr__(self, each.name, value)
        if "" in self.corpus:  # which would be the current folder
            raise ValueError("corpus must be names of texts, got ''")
        for each in fields(self):
            limits = each.metadata["range"]
            if limits[0] is not None:
                check_range(each.name, getattr(self, each.name), *limits)
        if self.depth:
            _take_shape(self, depth_shape(self.depth))
        if self.init:  # which has a shape
            check_range("seq_len", self.seq_len, 1, math.inf)
        else:
            self.model(self.vocab_size)
        _check_schedule(self)
        _check_total(self)
        if self.in_backward:
            _check_in_backward(self)

    @property
    def micro_batches(self):
        """Batches whose gradients make one update."""
        return max(1, self.total_batch // (self.batch_size * self.seq_len))

    def some(self, *names):
        """The fields of these names, a dict."""
        return {name: getattr(self, name) for name in names}

    def model(self, vocab_size):
        """The configuration of this run for a vocabulary of this size."""
        shape = self.num_layers, self.num_heads, self.channels
        shape = self.seq_len, vocab_size, *shape
        others = self.some("num_kv_heads", "window")
        others = {name: x for name, x in others.items() if x}
        if self.arch == "gpt2":
            for name, x in others.items():
                raise ValueError(f"{name} is not of gpt2, got {x}")
            return GPT2Config(*shape)
        from llmnb.model.architectures import ARCHITECTURES  # Part 5

        choose("arch", self.arch, ARCHITECTURES)
        return ARCHITECTURES[self.arch](*shape, **others)

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
    {"in_backward": True},
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
from llmnb.formats.vocabulary import open_encoding, tokenizer_beside
from llmnb.formats.shard import Shards, find_shards, sample_tokens
from llmnb.text import corpus, tokenizer
from llmnb.text.data import DataLoader, split
from llmnb.text.reader import Tally
from llmnb.train.landmarks import unigram_entropy


# %% the data of a run tags=["export"] module="train.feed"
class Data(NamedTuple):
    """The tokens of a run: what `prepare` returns.

    encoding: a tiktoken.Encoding, or one of llmnb.formats.foreign.
    train_tokens, val_tokens: 1-D arrays of uint16 or uint32, or the `Shards`
    of a folder. source: a sentence that says where the text came from.
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
    documents = corpus.load_corpus(source, *how)
    encoding = make_encoding(config, documents)
    tokens = corpus.encode_documents(encoding, documents, config.endoftext)
    characters = sum(map(len, documents))
    source = corpus.describe(sources, len(documents), characters)
    source += tally.words(config.endoftext)
    return Data(encoding, *split(tokens), source)


def _text_bytes(path):
    """Bytes of text that must be in memory if this file or folder is read.

    At least: what is packed, or holds fields, may be less when it is read.
    """
    path, kinds = Path(path), (".gz", ".zst", ".jsonl")
    if path.is_file():
        return path.stat().st_size * (path.suffix not in kinds)
    found = corpus.files_below(path)
    return sum(x.stat().st_size for x in found if x.suffix == ".txt")


# %% from a folder of shards tags=["exporti"] module="train.feed"
def _from_shards(config):
    """The tokens of a folder, whose files are left closed."""
    folder = Path(config.shards)
    own = tokenizer_beside(folder)
    train, val = (Shards(paths) for paths in find_shards(folder))
    if own:
        encoding = open_encoding(own)
    elif config.tokenizer == "bpe":
        raise FileNotFoundError(
            f"{folder} has no tokenizer: name the one of its tokens, "
            "such as --tokenizer gpt2"
        )
    else:
        encoding = make_encoding(config, [])
    top = max(int(sample_tokens(x, 1 << 20).max()) for x in (train, val))
    if top >= encoding.n_vocab:
        raise ValueError(
            f"{folder} has the token {top}, its tokenizer, "
            f"{own or config.tokenizer}, has {encoding.n_vocab}: another one "
            "wrote these shards"
        )
    source = f"shards in {folder}: {len(train) + len(val):,} tokens"
    return Data(encoding, train, val, source)


# %% [markdown]
# A run may use a tokenizer that another program made; [chapter
# 4.6](06_hub.ipynb) reads its file.


# %% the tokenizer of a run tags=["export"] module="train.feed"
TOKENIZER_TEXT = 2_000_000  # characters the bpe tokenizer learns from


def make_encoding(config, documents):
    """The tokenizer that a TrainConfig names, trained if it is "bpe".

    documents: an iterable of str, of which the first `TOKENIZER_TEXT`
    characters are learnt from, with `config.endoftext` but for
    `<|endoftext|>`. Raises ValueError, OSError or RuntimeError,
    in one sentence.
    """
    if config.tokenizer != "bpe":
        encoding = open_encoding(config.tokenizer)
        if not hasattr(encoding, "files"):  # a run keeps its tokenizer
            tokenizer.check_special(encoding)
        return encoding
    learnt, left = [], TOKENIZER_TEXT
    for text in documents:
        text = text[:left]
        learnt += text.split(tokenizer.EOT) if config.endoftext else [text]
        left -= len(text)
        if not left:
            break
    if not any(learnt):
        raise ValueError("there is no text for a tokenizer to learn from")
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
# Tokens become batches in the loader of [chapter
# 1.3](../1_by_hand/03_batches.ipynb), which wants at least one whole batch of
# each shard. The last shard of a text may be shorter than that: it is left out,
# for one short file should not stop a run of thousands.


# %% its batches tags=["export"] module="train.feed"
def loaders(config, data):
    """The DataLoaders of a run: shuffled for training, fixed to validate.

    A shard of fewer tokens than one batch takes is left out. Raises
    ValueError when all are.
    """
    train, val = data.train_tokens, data.val_tokens
    batches = _loader(config, train, "train on", seed=config.seed)
    return batches, _loader(config, val, "validate on", shuffle=False)


# %% a loader of an array or of shards tags=["exporti"] module="train.feed"
def _loader(config, tokens, what, **how):
    shape = config.batch_size, config.seq_len
    if not isinstance(tokens, Shards):
        if len(tokens) <= math.prod(shape):
            raise ValueError(
                f"the text has {len(tokens)} tokens to {what}, a batch of "
                f"{shape[0]} x {shape[1]} needs {math.prod(shape) + 1}: give "
                "more text, or a smaller batch_size or seq_len"
            )
        return DataLoader([tokens], *shape, **how)
    pairs = zip(tokens.paths, tokens.lengths, strict=True)
    long = [path for path, n in pairs if n > math.prod(shape)]
    return DataLoader(long or tokens.paths, *shape, **how)


# %% [markdown]
# The losses of a run are to be held against something. What a uniform guess pays
# and what counting pays are known from the tokens alone
# ([chapter 1.18](../1_by_hand/18_training.ipynb)).


# %% the landmarks tags=["export"] module="train.feed"
_LANDMARK_TOKENS = 8_000_000  # training tokens that are counted


def landmarks(config, data):
    """The losses a run is measured against, in nats a token.

    Returns a dict: "uniform", log V; "unigram", what the token frequencies
    of the training text pay on the tokens that validation uses. Of a long
    training text a sample of eight million tokens is counted.
    """
    V = data.encoding.n_vocab
    batches = _loader(config, data.val_tokens, "validate on", shuffle=False)
    count = min(config.eval_batches, batches.batches_per_epoch)
    targets = [batches.next_batch()[1].ravel().copy() for _ in range(count)]
    sample = sample_tokens(data.train_tokens, _LANDMARK_TOKENS)
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
