# Written by `make export` from notebooks/1_by_hand/04_gpt2.py: edit that file.

"""The numbers that fix a GPT-2's shape, and what they count."""

__all__ = ["GPT2Config"]


# imports of the configuration
from dataclasses import dataclass
from numbers import Integral
from typing import ClassVar


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

    family: ClassVar[str] = "gpt2"
    # what its blocks are made of, by the names in llmnb.model.parts
    norm: ClassVar[str] = "layernorm"
    feedforward: ClassVar[str] = "gelu"
    bias: ClassVar[bool] = True  # whether linear layers have one

    def __post_init__(self):
        for name, value in vars(self).items():
            whole = isinstance(value, Integral) and value is not True
            if not whole or value < 1:
                raise ValueError(
                    f"GPT2Config: {name} must be a positive integer, "
                    f"got {value!r}"
                )
            # NumPy's become Python's, which do not overflow
            object.__setattr__(self, name, int(value))
        if self.channels % self.num_heads:
            raise ValueError(
                f"GPT2Config: channels must be a multiple of num_heads, "
                f"got {self.channels} and {self.num_heads}"
            )

    @property
    def padded_vocab_size(self):
        """Vp: the vocabulary rounded up to a multiple of 128."""
        return -(-self.vocab_size // 128) * 128  # two minuses round up

    @property
    def head_size(self):
        """hs: the channels of a head."""
        return self.channels // self.num_heads

    @property
    def num_kv_heads(self):
        """Heads that have keys and values of their own: in GPT-2 all."""
        return self.num_heads
