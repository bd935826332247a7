# Written by `make export` from notebooks/4_practice/12_options.py: edit that file.

"""The numbers of a run, in one dataclass."""

__all__ = [
    "DataOptions", "FAMILY", "KeepOptions", "LearningOptions", "ModelOptions",
    "SHAPE", "TrainConfig", "UpdateOptions", "depth_shape", "option",
]


# imports of options
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields

import numpy as np

from llmnb.backend import choose
from llmnb.config import GPT2Config
from llmnb.train.schedule import KINDS, learning_rate


# an option
def option(default, text, least=None, below=math.inf, **how):
    """A field of an option table: its default, its help, its range.

    least, below: what a number must not be less than, and must be less than;
    no least: it has no range of its own. how: further arguments of argparse's
    add_argument, such as metavar and nargs; positional=True for what is named
    by its place.

    Derived in chapter 4.12.
    """
    known = {"help": text, "range": (least, below), "how": how}
    return field(default=default, metadata=known)


# what a run reads
@dataclass(frozen=True)
class DataOptions:
    """What a run reads; see `TrainConfig`.

    Derived in chapter 4.12.
    """

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


# what the model looks like
@dataclass(frozen=True)
class ModelOptions:
    """What the model looks like; see `TrainConfig`.

    Derived in chapter 4.12.
    """

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


# how it learns
@dataclass(frozen=True)
class LearningOptions:
    """How a run learns; see `TrainConfig`.

    Derived in chapter 4.12.
    """

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


# what an update is
@dataclass(frozen=True)
class UpdateOptions:
    """What an update of the weights is; see `TrainConfig`.

    Derived in chapter 4.12.
    """

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


# what it keeps
@dataclass(frozen=True)
class KeepOptions:
    """What a run keeps and shows on its way; see `TrainConfig`.

    Derived in chapter 4.12.
    """

    save_every: int = option(
        250, "steps between two checkpoints; 0: only when it stops", 0
    )
    keep: int = option(2, "checkpoints that are kept, the newest ones", 1)
    sample_every: int = option(
        0, "steps between two samples in the terminal; 0: none", 0
    )


# a number in its range, a value of its kind
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


# a shape from a depth
SHAPE = "num_layers", "num_heads", "channels"
FAMILY = "arch", "num_kv_heads", "window"  # what else a checkpoint fixes
_WIDTHS = {0: 0, 6: 384, 12: 768, 24: 1024, 36: 1280, 48: 1600}


def depth_shape(depth):
    """Layers, heads and channels of a GPT-2 of this depth.

    Heads have 64 channels. Raises ValueError unless 1 <= depth <= 48.

    Derived in chapter 4.12.
    """
    check_range("depth", depth, 1, 1 + max(_WIDTHS))
    width = round(np.interp(depth, [*_WIDTHS], [*_WIDTHS.values()]))
    heads = -(-width // 64)
    return depth, heads, heads * 64


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


# a run
@dataclass(frozen=True)
class TrainConfig(
    KeepOptions, UpdateOptions, LearningOptions, ModelOptions, DataOptions
):
    """Every number that fixes a training run.

    With a depth, num_layers, num_heads and channels are set by it. A path
    becomes a str, a number of NumPy's one of Python's: a run keeps them as
    JSON. Raises TypeError or ValueError, in one sentence, when a number is of
    another kind, out of its range, or does not go with another.

    Derived in chapter 4.12.
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
