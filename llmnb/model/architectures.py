# Written by `make export` from notebooks/5_modern/06_files.py: edit that file.

"""Llama, Mistral, Gemma, Qwen: the numbers that fix each."""

__all__ = [
    "ARCHITECTURES", "Gemma2Config", "Gemma3Config", "GemmaConfig",
    "LlamaConfig", "MistralConfig", "PRESETS", "Qwen2Config", "Qwen3Config",
    "architecture_from", "architecture_record",
]


# imports of the architectures
import sys
from dataclasses import asdict, dataclass, fields
from typing import ClassVar

from llmnb.config import GPT2Config
from llmnb.model.modern import modern_block, modern_table

_LARGEST = sys.float_info.max


# Llama
@dataclass(frozen=True)
class LlamaConfig(GPT2Config):
    """The numbers that fix a Llama's shape; the defaults are GPT-2 124M's.

    max_seq_len, vocab_size, num_layers, num_heads and channels: as in
    GPT2Config. num_kv_heads: heads of keys and values, which divide
    num_heads; None is as many. head_size: an even number; None is channels
    / num_heads. hidden: channels of the feed-forward layer; None is 8/3 of
    channels, up to a multiple of 64. rope_theta, rope_scaling: as for
    llmnb.reference.rope_table. norm_eps: of RMSNorm. tied: whether the token
    table also makes the logits. window: how many positions a query sees, of
    the blocks that look back a window; None for all. global_every: of so
    many blocks the last has no window; 0 for none. local_theta: rope_theta
    of the blocks with a window, where it is another. attention_scale: of
    the scores; None is 1 / sqrt(head_size). attention_softcap,
    final_softcap: caps of scores and of logits, or None. Raises ValueError
    for a value out of range.

    Derived in chapter 5.6.
    """

    num_kv_heads: int | None = None
    head_size: int | None = None
    hidden: int | None = None
    rope_theta: float = 10000.0
    rope_scaling: tuple | None = None
    norm_eps: float = 1e-5
    tied: bool = False
    window: int | None = None
    global_every: int = 0
    local_theta: float | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None

    family: ClassVar[str] = "llama"
    norm: ClassVar[str] = "rmsnorm"
    feedforward: ClassVar[str] = "swiglu"
    bias: ClassVar[bool] = False
    qkv_bias: ClassVar[bool] = False  # whether queries, keys, values have one
    offset: ClassVar[float] = 0.0  # added to the norms' weights
    qk_norm: ClassVar[bool] = False  # whether queries and keys have norms
    post_norms: ClassVar[bool] = False  # whether norms follow each half too
    embedding_scaled: ClassVar[bool] = False  # by the root of channels

    def __post_init__(self):
        self._check_whole("num_heads", "channels")
        C, NH = self.channels, self.num_heads
        if self.head_size is None and C % NH:
            self._refuse("channels", f"a multiple of num_heads = {NH}")
        filled = {
            "num_kv_heads": NH,
            "head_size": C // NH,
            "hidden": -(-8 * C // 192) * 64,
        }
        for name, value in filled.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        scaling = self.rope_scaling or None
        if isinstance(scaling, list):  # as JSON has it
            scaling = tuple(scaling)
        object.__setattr__(self, "rope_scaling", scaling)
        self._check()

    def _refuse(self, name, wanted):
        kind, value = type(self).__name__, getattr(self, name)
        raise ValueError(f"{kind}: {name} must be {wanted}, got {value!r:.80}")

    def _check_whole(self, *names):
        for name in names:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                self._refuse(name, "a positive integer")
            if value >= 2**31:
                self._refuse(name, "less than 2**31")

    def _check(self):
        whole = [x.name for x in fields(GPT2Config)]
        self._check_whole(*whole, "num_kv_heads", "head_size", "hidden")
        if self.num_heads % self.num_kv_heads:
            self._refuse("num_kv_heads", f"a divisor of {self.num_heads}")
        if self.head_size % 2:
            self._refuse("head_size", "even: its channels turn in pairs")
        if self.window is not None:
            self._check_whole("window")
        if type(self.global_every) is not int or self.global_every < 0:
            self._refuse("global_every", "0 or a positive integer")
        numbers = "local_theta", "attention_scale", "attention_softcap"
        for name in ("rope_theta", "norm_eps", *numbers, "final_softcap"):
            value = getattr(self, name)
            if value is not None or name in ("rope_theta", "norm_eps"):
                number = isinstance(value, (int, float))
                if not number or not 0 < value <= _LARGEST:
                    self._refuse(name, "a positive number")
                object.__setattr__(self, name, float(value))
        if type(self.tied) is not bool:
            self._refuse("tied", "True or False")
        self._check_scaling()

    def _check_scaling(self):
        said = self.rope_scaling or ("linear", 1.0)
        kind, *numbers = said if isinstance(said, tuple) else [said]
        count = {"linear": 1, "llama3": 4}.get(str(kind))
        good = all(isinstance(x, (int, float)) for x in numbers)
        good = good and all(0 < x <= _LARGEST for x in numbers)
        if count != len(numbers) or not good:
            self._refuse(
                "rope_scaling",
                "('linear', factor) or ('llama3', factor, low, high, length)",
            )
        if kind == "llama3" and numbers[1] >= numbers[2]:
            self._refuse("rope_scaling", "of a low that is less than high")

    def block(self, i=0):
        """The parts of block i: a Block of llmnb.model.parts."""
        return modern_block(self, i)

    def tensors(self):
        """All tensors, a list of `Tensor`."""
        return modern_table(self)

    def is_local(self, i):
        """Whether block i looks back a window only."""
        whole = self.global_every and (i + 1) % self.global_every == 0
        return self.window is not None and not whole


# its relatives
@dataclass(frozen=True)
class MistralConfig(LlamaConfig):
    """A Mistral's shape: a Llama's; the first of them had a window.

    Derived in chapter 5.6.
    """

    family: ClassVar[str] = "mistral"


@dataclass(frozen=True)
class Qwen2Config(LlamaConfig):
    """A Qwen 2's shape: a Llama's, with biases of queries, keys and values.

    Derived in chapter 5.6.
    """

    rope_theta: float = 1000000.0
    norm_eps: float = 1e-6

    family: ClassVar[str] = "qwen2"
    qkv_bias: ClassVar[bool] = True


@dataclass(frozen=True)
class Qwen3Config(Qwen2Config):
    """A Qwen 3's shape: norms of queries and keys in place of biases.

    Derived in chapter 5.6.
    """

    family: ClassVar[str] = "qwen3"
    qkv_bias: ClassVar[bool] = False
    qk_norm: ClassVar[bool] = True


@dataclass(frozen=True)
class GemmaConfig(LlamaConfig):
    """A Gemma's shape: GeGLU, norms by 1 + w, token vectors scaled.

    Derived in chapter 5.6.
    """

    norm_eps: float = 1e-6
    tied: bool = True

    family: ClassVar[str] = "gemma"
    feedforward: ClassVar[str] = "geglu"
    offset: ClassVar[float] = 1.0
    embedding_scaled: ClassVar[bool] = True


@dataclass(frozen=True)
class Gemma2Config(GemmaConfig):
    """A Gemma 2's shape: norms after each half, soft caps, windows.

    Derived in chapter 5.6.
    """

    window: int | None = 4096
    global_every: int = 2
    attention_softcap: float | None = 50.0
    final_softcap: float | None = 30.0

    family: ClassVar[str] = "gemma2"
    post_norms: ClassVar[bool] = True


@dataclass(frozen=True)
class Gemma3Config(GemmaConfig):
    """A Gemma 3's shape, of its text models: five short looks to a long.

    Derived in chapter 5.6.
    """

    rope_theta: float = 1000000.0
    window: int | None = 512
    global_every: int = 6
    local_theta: float | None = 10000.0

    family: ClassVar[str] = "gemma3_text"
    qk_norm: ClassVar[bool] = True
    post_norms: ClassVar[bool] = True


# by their names
ARCHITECTURES = {
    x.family: x
    for x in (
        GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config,
        GemmaConfig, Gemma2Config, Gemma3Config,
    )
}  # fmt: skip


def architecture_record(cfg):
    """A configuration as a dict that JSON can hold; GPT-2's as it was.

    Derived in chapter 5.6.
    """
    record = asdict(cfg)
    return record if cfg.family == "gpt2" else {"family": cfg.family} | record


def architecture_from(record):
    """The configuration of a record; ValueError or TypeError if none is.

    Derived in chapter 5.6.
    """
    record = dict(record)
    family = record.pop("family", "gpt2")
    if family not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"family must be one of {known}, got {family!r}")
    return ARCHITECTURES[family](**record)


# published ones
_LLAMA3 = {"rope_theta": 500000.0, "num_kv_heads": 8}
_SCALED = "llama3", 8.0, 1.0, 4.0, 8192
# max_seq_len, vocab_size, num_layers, num_heads, channels, and what differs
PRESETS = {
    "llama-2-7b": LlamaConfig(4096, 32000, 32, 32, 4096, hidden=11008),
    "llama-3-8b": LlamaConfig(
        8192, 128256, 32, 32, 4096, hidden=14336, **_LLAMA3
    ),
    "llama-3.1-8b": LlamaConfig(
        131072, 128256, 32, 32, 4096, hidden=14336, rope_scaling=_SCALED,
        **_LLAMA3,
    ),
    "llama-3.2-1b": LlamaConfig(
        131072, 128256, 16, 32, 2048, hidden=8192, tied=True,
        rope_scaling=("llama3", 32.0, 1.0, 4.0, 8192), **_LLAMA3,
    ),
    "smollm2-135m": LlamaConfig(
        8192, 49152, 30, 9, 576, num_kv_heads=3, hidden=1536,
        rope_theta=100000.0, tied=True,
    ),
    "mistral-7b-v0.1": MistralConfig(
        32768, 32000, 32, 32, 4096, num_kv_heads=8, hidden=14336, window=4096
    ),
    "mistral-7b-v0.3": MistralConfig(
        32768, 32768, 32, 32, 4096, num_kv_heads=8, hidden=14336,
        rope_theta=1000000.0,
    ),
    "gemma-2b": GemmaConfig(
        8192, 256000, 18, 8, 2048, num_kv_heads=1, head_size=256, hidden=16384
    ),
    "gemma-2-2b": Gemma2Config(
        8192, 256000, 26, 8, 2304, num_kv_heads=4, head_size=256, hidden=9216
    ),
    "gemma-3-270m": Gemma3Config(
        32768, 262144, 18, 4, 640, num_kv_heads=1, head_size=256, hidden=2048
    ),
    "gemma-3-1b": Gemma3Config(
        32768, 262144, 26, 4, 1152, num_kv_heads=1, head_size=256, hidden=6912
    ),
    "qwen2.5-0.5b": Qwen2Config(
        32768, 151936, 24, 14, 896, num_kv_heads=2, hidden=4864, tied=True
    ),
    "qwen3-0.6b": Qwen3Config(
        40960, 151936, 28, 16, 1024, num_kv_heads=8, head_size=128,
        hidden=3072, tied=True,
    ),
}  # fmt: skip
