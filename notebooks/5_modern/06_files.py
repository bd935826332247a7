# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       model.architectures: "Llama, Mistral, Gemma, Qwen: the numbers that fix each."
#       formats.families: "Published models of Llama's kind: folders read and written."
# ---

# %% [markdown]
# # Files since GPT-2: the same tensors under other names
#
# > A config.json in either of two styles says which architecture it is; a table
# > says which rows of ours each published tensor is.
#
# *Reading time: 30 minutes. You need: the architectures ([chapter
# 5.5](05_architectures.ipynb)) and published files ([chapter
# 4.4](../4_practice/04_published.ipynb)).*
#
# ## Where we are
#
# The weights of a Llama or a relative come as a folder: a `config.json`, and one or
# several safetensors files. Reading it *wrongly* is easy: a setting passed over
# changes what is computed, and nothing crashes. So this chapter refuses each value
# with which we would not compute what the file's makers do. At the end you can
#
# - read both styles of a config.json, and say what each setting changes;
# - find the rows of our arrays that a published tensor fills;
# - write a folder that `transformers` loads, and read it back.
#
# ## A configuration a family
#
# All inherit Llama's fields and checks, and each says only what it has of its own.
# A file may come from a stranger, so each number is checked when the configuration
# is made: whole numbers are positive and below $2^{31}$, heads of keys divide those
# of queries, and a head has an even number of channels, for they turn in pairs.

# %% imports of the architectures tags=["export"] module="model.architectures"
import sys
from dataclasses import asdict, dataclass, fields
from typing import ClassVar

from llmnb.config import GPT2Config
from llmnb.model.modern import modern_block, modern_table

_LARGEST = sys.float_info.max


# %% Llama tags=["export"] module="model.architectures"
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


# %% [markdown]
# The others are a few lines each, as chapter 5.5 says:


# %% its relatives tags=["export", "fold-input"] module="model.architectures"
@dataclass(frozen=True)
class MistralConfig(LlamaConfig):
    """A Mistral's shape: a Llama's; the first of them had a window."""

    family: ClassVar[str] = "mistral"


@dataclass(frozen=True)
class Qwen2Config(LlamaConfig):
    """A Qwen 2's shape: a Llama's, with biases of queries, keys and values."""

    rope_theta: float = 1000000.0
    norm_eps: float = 1e-6

    family: ClassVar[str] = "qwen2"
    qkv_bias: ClassVar[bool] = True


@dataclass(frozen=True)
class Qwen3Config(Qwen2Config):
    """A Qwen 3's shape: norms of queries and keys in place of biases."""

    family: ClassVar[str] = "qwen3"
    qkv_bias: ClassVar[bool] = False
    qk_norm: ClassVar[bool] = True


@dataclass(frozen=True)
class GemmaConfig(LlamaConfig):
    """A Gemma's shape: GeGLU, norms by 1 + w, token vectors scaled."""

    norm_eps: float = 1e-6
    tied: bool = True

    family: ClassVar[str] = "gemma"
    feedforward: ClassVar[str] = "geglu"
    offset: ClassVar[float] = 1.0
    embedding_scaled: ClassVar[bool] = True


@dataclass(frozen=True)
class Gemma2Config(GemmaConfig):
    """A Gemma 2's shape: norms after each half, soft caps, windows."""

    window: int | None = 4096
    global_every: int = 2
    attention_softcap: float | None = 50.0
    final_softcap: float | None = 30.0

    family: ClassVar[str] = "gemma2"
    post_norms: ClassVar[bool] = True


@dataclass(frozen=True)
class Gemma3Config(GemmaConfig):
    """A Gemma 3's shape, of its text models: five short looks to a long."""

    rope_theta: float = 1000000.0
    window: int | None = 512
    global_every: int = 6
    local_theta: float | None = 10000.0

    family: ClassVar[str] = "gemma3_text"
    qk_norm: ClassVar[bool] = True
    post_norms: ClassVar[bool] = True


# %% [markdown]
# A checkpoint of ours holds its configuration as a *record*, a dict of the fields
# and the family's name. GPT-2's names no family, as in the days when there was one
# only: old files stay readable. Published shapes have names too, in `PRESETS`.

# %% by their names tags=["export"] module="model.architectures"
ARCHITECTURES = {
    x.family: x
    for x in (
        GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config,
        GemmaConfig, Gemma2Config, Gemma3Config,
    )
}  # fmt: skip


def architecture_record(cfg):
    """A configuration as a dict that JSON can hold; GPT-2's as it was."""
    record = asdict(cfg)
    return record if cfg.family == "gpt2" else {"family": cfg.family} | record


def architecture_from(record):
    """The configuration of a record; ValueError or TypeError if none is."""
    record = dict(record)
    family = record.pop("family", "gpt2")
    if family not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"family must be one of {known}, got {family!r}")
    return ARCHITECTURES[family](**record)


# %% published ones tags=["export"] module="model.architectures"
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

# %% [markdown]
# ## One setting, two styles
#
# Until version 4 of `transformers` a config.json was flat. Version 5 gathers the
# rotation in an object, for Gemma 3 one a kind of block, and lists the kind of each
# block. Files of both styles are about, and many mix them:
#
# | what it sets | older style | newer style |
# |---|---|---|
# | base | `rope_theta` | `rope_parameters.rope_theta` |
# | stretching | `rope_scaling`, with `type` or `rope_type` | `rope_parameters.rope_type` |
# | base of short looks | `rope_local_base_freq` | `rope_parameters.sliding_attention.rope_theta` |
# | which blocks look back a window | `sliding_window_pattern`, or the family's habit | `layer_types` |
#
# What changes no result, such as how the first weights were drawn, is passed over. The
# settings that do, and for which we have one value only, stand in a table.

# %% imports of the families tags=["export"] module="formats.families"
import json
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np

from llmnb.files import read_json
from llmnb.formats.published import RECORD, check_tensors, pieces
from llmnb.formats.published import published_tensors, read_pieces
from llmnb.model.architectures import ARCHITECTURES, architecture_from

# %% settings we compute with tags=["export"] module="formats.families"
# settings that change what a model computes, and the values we compute with;
# None: as if it were not there
FIXED_OF_FAMILIES = {
    "attention_bias": [False, None],
    "mlp_bias": [False, None],
    "use_bidirectional_attention": [False, None],
    "partial_rotary_factor": [1.0, None],
    "num_local_experts": [None],
}
_ACTIVATIONS = {
    "swiglu": ("silu", "swish"),
    # Gemma's first files say gelu and mean its tanh form
    "geglu": ("gelu_pytorch_tanh", "gelu_new", "gelu"),
}
_KINDS = [x for x in ARCHITECTURES if x != "gpt2"]
# our name -> the published one
_NAMES = {
    "max_seq_len": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "channels": "hidden_size",
    "num_kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "hidden": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
    "attention_softcap": "attn_logit_softcapping",
    "final_softcap": "final_logit_softcapping",
}
# what else a family has, by our names; another's readers pass over it
_QWENS, _GEMMAS = ("qwen2", "qwen3"), ("gemma2", "gemma3_text")
_ONLY = {
    "window": ("mistral", *_QWENS, *_GEMMAS), "local_theta": _GEMMAS[1:],
    "attention_scale": _GEMMAS, "attention_softcap": _GEMMAS[:1],
    "final_softcap": _GEMMAS,
}  # fmt: skip
# without these a reader has to guess, and no two guess alike
_NEEDED = (
    "max_seq_len", "vocab_size", "num_layers", "num_heads", "channels",
    "hidden", "norm_eps",
)  # fmt: skip

# %% [markdown]
# `described_config` asks for the family, the fixed settings and the activation; then it
# translates the names, and the class checks the numbers.


# %% a description, read tags=["export"] module="formats.families"
class _Description:
    """A config.json: values by name, with errors that name the file."""

    def __init__(self, path):
        self.path, self.found = path, read_json(path)

    def refuse(self, name, wanted):
        got = self.found.get(name)
        raise ValueError(
            f"{self.path}: {name} must be {wanted}, got {got!r:.80}"
        )

    def part(self, name, within=None):
        """An object within, or in a part of it; or an empty one."""
        found = (self.found if within is None else within).get(name) or {}
        if not isinstance(found, dict):
            raise ValueError(
                f"{self.path}: {name} must be an object, got {found!r:.80}"
            )
        return found


def family_of(path):
    """The family that a config.json names, or None where it is none of ours.

    path: of the file. Raises ValueError, naming it, when it is no JSON.
    """
    kind = read_json(path).get("model_type")
    return kind if kind in _KINDS else None


def described_config(path):
    """The configuration that a Hugging Face config.json describes.

    path: of the file; either style, with rope_theta and rope_scaling or with
    rope_parameters and layer_types. Raises ValueError, naming the file and
    the setting, where a model of that kind would compute what ours does not.
    """
    said = _Description(path)
    kind = said.found.get("model_type")
    if kind not in _KINDS:
        said.refuse("model_type", f"one of {', '.join(_KINDS)}")
    for name, values in FIXED_OF_FAMILIES.items():
        if said.found.get(name) not in values:
            said.refuse(name, repr(values[0]))
    made = ARCHITECTURES[kind]
    acts = _ACTIVATIONS[made.feedforward]
    act = said.found.get("hidden_activation") or said.found.get("hidden_act")
    if (act or acts[0]) not in acts:
        raise ValueError(
            f"{path}: the activation must be {acts[0]}, got {act!r:.80}"
        )
    given = {
        ours: said.found[theirs]
        for ours, theirs in _NAMES.items()
        if theirs in said.found and kind in _ONLY.get(ours, _KINDS)
    }
    for ours in _NEEDED:
        if given.get(ours) is None:
            raise ValueError(f"{path}: lacks {_NAMES[ours]}")
    given |= _rope(said, made) | _windows(said, made) | _scale(said, made)
    try:
        return made(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


# %% [markdown]
# The rotation: the newer style first, then the older names. `_scaling` knows the two
# stretchings of chapter 5.2; a third, YaRN for one, is refused by its name. So is one of
# the blocks with a window, which no published model has and ours would not compute.


# %% rotary settings of both styles tags=["exporti", "fold-input"] module="formats.families"
def _rope(said, made):
    """theta, scaling and the local theta, of either style."""
    new, found = said.part("rope_parameters"), {}
    layers = new if "full_attention" in new else {"full_attention": new}
    whole = said.part("full_attention", layers)
    older = said.found.get("rope_theta")
    theta = whole.get("rope_theta", older)
    if older not in (None, theta):
        said.refuse("rope_theta", f"as in rope_parameters, {theta!r:.80}")
    if theta is not None:
        found["rope_theta"] = theta
    elif made.family in _QWENS:  # whose published files all have one
        said.refuse("rope_theta", "there")
    older = _scaling(said, said.part("rope_scaling"))
    scaling = _scaling(said, whole) or older
    if older not in (None, scaling):
        said.refuse("rope_scaling", "as in rope_parameters")
    found["rope_scaling"] = scaling
    local = said.part("sliding_attention", layers)
    theta = local.get("rope_theta", said.found.get("rope_local_base_freq"))
    if theta is not None and made.local_theta:
        found["local_theta"] = theta
    if _scaling(said, local):
        said.refuse("rope_parameters", "unscaled where the look is short")
    return found


# kinds of scaling, and the numbers that each takes
_SCALINGS = {
    "linear": ["factor"],
    "llama3": ["factor", "low_freq_factor", "high_freq_factor",
               "original_max_position_embeddings"],
}  # fmt: skip


def _scaling(said, part):
    if part.get("partial_rotary_factor") not in (1.0, None):
        raise ValueError(f"{said.path}: partial_rotary_factor must be 1.0")
    kind = part.get("rope_type", part.get("type", "default"))
    if kind == "default":
        return None
    if kind not in [*_SCALINGS]:
        raise ValueError(
            f"{said.path}: rope_type must be default, linear or llama3, "
            f"got {kind!r:.80}"
        )
    for name in _SCALINGS[kind]:
        if name not in part:
            raise ValueError(f"{said.path}: rope scaling lacks {name}")
    return kind, *[part[x] for x in _SCALINGS[kind]]


# %% [markdown]
# A list of kinds becomes one number, "of so many blocks the last is whole"; an
# irregular one is refused. `_scale` reads `query_pre_attn_scalar`, whose root Gemma 2
# and 3 divide scores by in place of that of the head's size. Where a file leaves out
# window or scalar, `transformers` takes 4,096 and 256, and so do we.


# %% windows of both styles tags=["exporti", "fold-input"] module="formats.families"
def _windows(said, made):
    """window and global_every, from layer_types or from a pattern."""
    if made.family not in _ONLY["window"]:
        return {}
    window = said.found.get("sliding_window", 4096)
    qwen = made.family in _QWENS  # which alone reads the next
    asked = said.found.get("use_sliding_window")
    if not window or (qwen and not asked):
        return {"window": None, "global_every": 0}
    kinds = said.found.get("layer_types")
    if kinds is None:
        if qwen:
            said.refuse("layer_types", "there where use_sliding_window is")
        every = said.found.get("sliding_window_pattern", made.global_every)
        return {"window": window, "global_every": every}
    if not isinstance(kinds, list):
        said.refuse("layer_types", "a list")
    whole = [kind == "full_attention" for kind in kinds]
    if all(whole):
        return {"window": None, "global_every": 0}
    every = whole.index(True) + 1 if any(whole) else 0
    want = [bool(every) and (i + 1) % every == 0 for i in range(len(whole))]
    if whole != want or len(whole) != said.found.get("num_hidden_layers"):
        said.refuse("layer_types", "a regular pattern, one for each layer")
    return {"window": window, "global_every": every}


def _scale(said, made):
    scalar = said.found.get("query_pre_attn_scalar", 256)
    usual = scalar is None or scalar == said.found.get("head_dim")
    if usual or made.family not in _ONLY["attention_scale"]:
        return {}
    number = isinstance(scalar, (int, float))
    if not number or not 0 < scalar <= sys.float_info.max:
        said.refuse("query_pre_attn_scalar", "a positive number")
    return {"attention_scale": scalar**-0.5}


# %% [markdown]
# A small Gemma 3 in both styles:

# %% both styles say the same
import tempfile

from llmnb.book.verify import verdict

room = tempfile.TemporaryDirectory()
base = {
    "model_type": "gemma3_text", "max_position_embeddings": 64,
    "vocab_size": 100, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 1, "hidden_size": 32, "head_dim": 8,
    "intermediate_size": 48, "sliding_window": 16, "rms_norm_eps": 1e-6,
}  # fmt: skip
older = {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
older["sliding_window_pattern"] = 2
kinds = "full_attention", "sliding_attention"
newer = {
    "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": theta}
        for kind, theta in zip(kinds, (1e6, 1e4), strict=True)
    },
    "layer_types": kinds[::-1] * 2,
}


def described(**settings):
    path = Path(room.name) / "config.json"
    path.write_text(json.dumps(base | settings), "utf-8")
    return described_config(path)


one, two = described(**older), described(**newer)
print(f"{one.window} positions, whole every {one.global_every}")
verdict("both styles", one == two, "say the same")

# %% [markdown]
# Refused are another family, a bias, a stretching that is neither of the two, and
# blocks of which the first of two sees all, and not the last.

# %% what is refused tags=["fold-input"]
bad = (
    older | {"model_type": "mamba"},
    older | {"attention_bias": True},
    older | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    newer | {"layer_types": kinds * 2},
)
for settings in bad:
    try:
        verdict(f"{described(**settings)}", False, "is refused")
    except ValueError as error:
        print(str(error).replace(room.name, "FOLDER"))

# %% [markdown]
# ## Written
#
# We write the older style with `layer_types` added, which old and new versions
# read. What is absent and what is null are not the same to every reader: caps and a
# Mistral's window are written as null, a Gemma's window is left out. Version 5 takes
# a Mistral with `layer_types` for a Ministral, which has a window, so only one whose
# blocks differ gets them. A Qwen's reader passes over a window unless
# `use_sliding_window` is there too. And a Llama with a window, which we can train, is
# refused, for its reader would compute without.


# %% a description, written tags=["export"] module="formats.families"
def family_description(cfg):
    """The config.json of a configuration, a dict, as `transformers` reads it.

    In the older style, which newer versions read too, with layer_types.
    Raises ValueError for a setting that the family's readers do not know.
    """
    for name, known in _ONLY.items():
        if cfg.family not in known and getattr(cfg, name) is not None:
            raise ValueError(f"{name} must be None to describe a {cfg.family}")
    found = {theirs: getattr(cfg, ours) for ours, theirs in _NAMES.items()}
    found |= {"model_type": cfg.family, "rope_theta": cfg.rope_theta}
    name = cfg.family.removesuffix("_text").capitalize()
    found["architectures"] = [f"{name}ForCausalLM"]
    act = _ACTIVATIONS[cfg.feedforward][0]
    found |= {"hidden_act": act, "hidden_activation": act}
    found |= {"attention_bias": False, "mlp_bias": False}
    found["pad_token_id"] = None  # a Gemma's reader takes 0, which then rests
    if cfg.rope_scaling:
        names = "rope_type", *_SCALINGS[cfg.rope_scaling[0]]
        found["rope_scaling"] = dict(zip(names, cfg.rope_scaling, strict=True))
    if cfg.family in _ONLY["local_theta"]:  # else another is taken
        found["rope_local_base_freq"] = cfg.local_theta or cfg.rope_theta
    scale = cfg.attention_scale or cfg.head_size**-0.5
    if cfg.family in _ONLY["attention_scale"]:
        # 256, not 256.0, which version 5 refuses
        found["query_pre_attn_scalar"] = json.loads(f"{scale**-2:.12g}")
    if cfg.family in _ONLY["window"]:
        local = [cfg.is_local(i) for i in range(cfg.num_layers)]
        kinds = "full_attention", "sliding_attention"
        found["use_sliding_window"] = any(local)
        if any(local) or cfg.family not in _GEMMAS:  # which want a number
            found["sliding_window"] = cfg.window if any(local) else None
        if cfg.family != "mistral" or len({*local}) > 1:
            found["layer_types"] = [kinds[x] for x in local]
    return found


# %% [markdown]
# ## Pieces
#
# Our `qkvw` of a block is one matrix, $(NH + 2\,NKV)\, hs$ rows; published are three
# (figure 5.5.2). Rows lie one after the other in memory, so a published tensor is a
# slice of rows, a view, and reading is one copy into place. The `pieces` of
# [chapter 4.4](../4_practice/04_published.ipynb) say which, and `write_folder` goes the
# same way back for every family. For the matrices of the second block of a small
# Llama, the published name, our array and the rows in it:

# %% the pieces of a block tags=["fold-input"]
cfg = LlamaConfig(64, 100, 2, 4, 32, num_kv_heads=2, hidden=48)
for name, x in pieces(cfg).items():
    if "layers.1." in name and "norm" not in name:
        print(f"{name:<40} {x.name}[{x.block}] {x.rows.start}:{x.rows.stop}")

# %% [markdown]
# ## Read, after everything has been checked
#
# A header of a safetensors file holds names, shapes and types. So all is compared
# before memory is taken and before a byte of weights is read: each tensor there, each
# of the right shape, and none too many, for a bias that we passed over would be a model
# that we do not compute. `open_family` returns the configuration and a function that
# fills; in between the caller decides how much memory it wants. Two tensors may be
# there without need: in old files the rotation's frequencies, which the configuration
# gives, and `lm_head.weight`, which must equal the table that it is tied to.

# %% check all tensors tags=["exporti", "fold-input"] module="formats.families"
# old files hold the frequencies of the rotation, which the config gives
_IGNORED = r".*\.rotary_emb\.inv_freq"


def _check_pieces(path, cfg, tensors):
    """Raise unless there is each tensor of the model, and no other."""
    if cfg.num_layers > len(tensors):  # before all of them are named
        raise ValueError(
            f"{path}: num_hidden_layers must be at most its {len(tensors)} "
            f"tensors, got {cfg.num_layers}"
        )
    ignored = re.compile(_IGNORED + r"|lm_head\.weight" * cfg.tied)
    check_tensors(path, cfg.family, tensors, pieces(cfg), ignored)


def _read_family(path, cfg, tensors, params):
    read_pieces(cfg, tensors, params)
    if cfg.tied and "lm_head.weight" in tensors:
        file, full = tensors["lm_head.weight"]
        wte = params["wte"][: cfg.vocab_size]
        # which may have been rounded when it was read
        if not np.array_equal(file[full].astype(wte.dtype), wte, True):
            raise ValueError(f"{path}: {full} must equal the token table")


# %% open a folder tags=["export"] module="formats.families"
def open_family(path):
    """A model's configuration, and the function that fills its params.

    path: a .safetensors file, or the index of several, with a config.json
    beside it or our own record inside. Raises ValueError, naming the file
    and what is wrong, before anything is read.
    """
    tensors = published_tensors(path)
    if not tensors:
        raise ValueError(f"{path}: holds no tensors")
    own = next(iter(tensors.values()))[0].metadata.get(RECORD)
    if own is None:
        cfg = described_config(Path(path).parent / "config.json")
    else:
        try:
            cfg = architecture_from(json.loads(own))
            if cfg.family not in _KINDS:
                raise ValueError("it is of no family")
        except (TypeError, ValueError, AttributeError, RecursionError) as e:
            raise ValueError(f"{path}: its record is wrong: {e}") from None
    _check_pieces(path, cfg, tensors)
    return cfg, partial(_read_family, path, cfg, tensors)


# %% written and read back
from llmnb.formats.checkpoint import write_folder
from llmnb.formats.safetensors import write_tensors
from llmnb.model.gpt2 import GPT2

model = GPT2(cfg, 1, 8, "reference", seed=3)
folder = Path(room.name) / "tiny"
write_folder(folder, cfg, model.params)
print(sorted(x.name for x in folder.iterdir()))
found, fill = open_family(folder / "model.safetensors")
copy = GPT2(found, 1, 8, "reference", seed=4)
fill(copy.params)
same = [np.array_equal(copy.params[x], model.params[x]) for x in model.params]
alike = vars(found) == vars(cfg)
verdict("weights", alike and all(same), "come back, bit for bit")

# %% [markdown]
# Then its config.json is made to say four heads of keys in place of two:

# %% a shape that is not the described one tags=["fold-input"]
tensors = {name: x.of(model.params) for name, x in pieces(cfg).items()}
write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
described, said = folder / "config.json", family_description(cfg)
described.write_text(json.dumps(said | {"num_key_value_heads": 4}), "utf-8")
try:
    open_family(folder / "model.safetensors")
    verdict("four heads", False, "is refused")
except ValueError as error:
    print(str(error).replace(room.name, "FOLDER"))
_ = described.write_text(json.dumps(said), "utf-8")

# %% [markdown]
# `GPT2.from_checkpoint` takes such a folder as it takes GPT-2's:

# %% the same model
tokens = np.array([[5, 1, 8, 2, 6, 6, 0, 3]])
loaded = GPT2.from_checkpoint(folder, 1, 8, "reference")
model.forward(tokens)
loaded.forward(tokens)
verdict("logits", np.array_equal(loaded.logits, model.logits), "the same bits")

# %% [markdown]
# `tests/model/test_families.py` holds small models against `transformers`:
# logits, gradients and ten steps of training, read and written both ways.
#
# ## Exercises
#
# **1** (★). Which published tensors of a tied model with norms of queries and keys
# has a plain Llama not, and the other way round?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# Each block has the weights of two norms more, `q_norm` and `k_norm`, and a Llama
# that is not tied has a matrix for the logits, `lm_head`.
# :::

# %% exercise 1, checked tags=["hide-cell"]
plain = set(pieces(LlamaConfig(64, 100, 1, 4, 32)))
normed = set(pieces(Qwen3Config(64, 100, 1, 4, 32, tied=True)))
attention = "model.layers.0.self_attn."
norms = {attention + "q_norm.weight", attention + "k_norm.weight"}
verdict("only Qwen 3", normed - plain == norms, "q_norm and k_norm")
verdict("only Llama", plain - normed == {"lm_head.weight"}, "lm_head")

# %% [markdown]
# **2** (★★). A large model lies in several files, and an index beside them,
# `model.safetensors.index.json`, says under `weight_map` in which file each tensor
# is. Write `split(tensors, place)`, which puts published tensors into two files, half
# of the bytes in each but for one tensor, and an index.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# The first file is filled until half of the bytes are in it, and then the second.
# :::


# %% exercise 2, two files tags=["hide-cell"]
def split(tensors, place):
    half, done = sum(x.nbytes for x in tensors.values()) / 2, 0
    parts, where = {f"model-{n}-of-2.safetensors": {} for n in (1, 2)}, {}
    for name, x in tensors.items():
        where[name] = [*parts][done >= half]
        parts[where[name]][name] = x
        done += x.nbytes
    for file, part in parts.items():
        write_tensors(place / file, part, {"format": "pt"})
    index = place / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}), "utf-8")


# %% exercise 2, checked
(two := Path(room.name) / "two").mkdir()
(two / "config.json").write_text(json.dumps(said), "utf-8")
split(tensors, two)
loaded = GPT2.from_checkpoint(two, 1, 8, "reference")
loaded.forward(tokens)
verdict("logits", np.array_equal(loaded.logits, model.logits), "the same bits")
one, other = (x.stat().st_size for x in two.glob("*.safetensors"))
verdict("halves", abs(one - other) < 30_000, "but for a tensor")

# %% [markdown]
# ## Take away
#
# - A setting passed over can be a wrong model; what we do not compute is refused.
# - A published tensor is a slice of rows of ours, and reading is a copy.
# - Everything is checked from headers, before memory is taken.
#
# **Design note.** One place translates names to fields. Where each layer looks into
# the config itself, a name spelled otherwise is a default that nobody chose.
#
# ## Further reading
#
# - Hugging Face, [safetensors](https://github.com/huggingface/safetensors): the README
#   has the format in a page.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("5.6")
