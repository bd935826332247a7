# Written by `make export` from notebooks/4_practice/12_options.py: edit that file.

"""The numbers of a run, in one dataclass."""

__all__ = [
    "AT_LEAST",
    "DataOptions",
    "HEAD",
    "KeepOptions",
    "LearningOptions",
    "ModelOptions",
    "SHAPE",
    "TrainConfig",
    "UpdateOptions",
    "WIDTHS",
    "depth_shape",
]


# imports of options
import math
from dataclasses import dataclass, field

import numpy as np

from llmnb.config import GPT2Config
from llmnb.train.schedule import learning_rate


# an option with its help
def _option(default, text):
    return field(default=default, metadata={"help": text})


# what a run reads
@dataclass(frozen=True)
class DataOptions:
    """What a run reads; see `TrainConfig`.

    Derived in chapter 4.12.
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

    Derived in chapter 4.12.
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

    Derived in chapter 4.12.
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

    Derived in chapter 4.12.
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

    Derived in chapter 4.12.
    """

    save_every: int = _option(
        250, "steps between two checkpoints; 0: only when it stops"
    )
    keep: int = _option(2, "checkpoints that are kept, the newest ones")
    sample_every: int = _option(
        0, "steps between two samples in the terminal; 0: none"
    )


# a number in its range
def check_range(name, value, least, below):
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

    Derived in chapter 4.12.
    """
    check_range("depth", depth, 1, 1 + max(WIDTHS))
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

    Derived in chapter 4.12.
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
