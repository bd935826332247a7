# Written by `make export` from notebooks/1_by_hand/04_gpt2.py: edit that file.

"""The numbers that fix a GPT-2's shape, and what they count."""

__all__ = [
    "GPT2Config",
    "flops_per_token",
    "parameter_count",
    "parameter_shapes",
]


# imports of the configuration
import math
from dataclasses import dataclass


# the configuration
@dataclass(frozen=True)
class GPT2Config:
    """The numbers that fix a GPT-2's shape; the defaults are its 124M.

    max_seq_len: positions the model knows. vocab_size: tokens it knows (V).
    num_layers (L), num_heads (NH) and channels (C): C must be a multiple of
    NH. Every number must be a positive integer, or ValueError is raised.

    Derived in chapter 1.4.
    """

    max_seq_len: int = 1024
    vocab_size: int = 50257
    num_layers: int = 12
    num_heads: int = 12
    channels: int = 768

    def __post_init__(self):
        for name, value in vars(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"GPT2Config: {name} must be a positive integer, "
                    f"got {value!r}"
                )
        if self.channels % self.num_heads:
            raise ValueError(
                f"GPT2Config: channels must be a multiple of num_heads, "
                f"got {self.channels} and {self.num_heads}"
            )

    @property
    def padded_vocab_size(self):
        """Vp: the vocabulary rounded up to a multiple of 128."""
        return -(-self.vocab_size // 128) * 128


# the sixteen tensors
def parameter_shapes(cfg):
    """Shapes of the 16 parameter tensors by llm.c's names, in its order.

    Derived in chapter 1.4.
    """
    L, C, Vp = cfg.num_layers, cfg.channels, cfg.padded_vocab_size
    return {
        "wte": (Vp, C),
        "wpe": (cfg.max_seq_len, C),
        "ln1w": (L, C),
        "ln1b": (L, C),
        "qkvw": (L, 3 * C, C),
        "qkvb": (L, 3 * C),
        "attprojw": (L, C, C),
        "attprojb": (L, C),
        "ln2w": (L, C),
        "ln2b": (L, C),
        "fcw": (L, 4 * C, C),
        "fcb": (L, 4 * C),
        "fcprojw": (L, C, 4 * C),
        "fcprojb": (L, C),
        "lnfw": (C,),
        "lnfb": (C,),
    }


# count parameters and operations
def parameter_count(cfg, padded=True):
    """How many parameters a configuration has, with or without padding.

    Derived in chapter 1.4.
    """
    count = sum(math.prod(s) for s in parameter_shapes(cfg).values())
    unused = cfg.padded_vocab_size - cfg.vocab_size
    return count if padded else count - unused * cfg.channels


def flops_per_token(cfg, seq_len):
    """Floating-point operations to train on one token: 6 N + 6 L C T.

    N counts the parameters without padding. Six is two (multiply and add)
    for each of three products: one forward, two backward. The second term
    is attention's, with a causal mask.

    Derived in chapter 1.4.
    """
    attention = 6 * cfg.num_layers * cfg.channels * seq_len
    return 6 * parameter_count(cfg, padded=False) + attention
