# Written by `make export` from notebooks/5_modern/07_gguf.py: edit that file.

"""Models in GGUF files, read through the library gguf."""

__all__ = ["GGUFFile", "gguf_config", "half_split", "interleaved", "open_gguf"]


# imports of GGUF
import os
import re
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from llmnb.files import package, what_is
from llmnb.formats.published import check_tensors, pieces
from llmnb.model.architectures import ARCHITECTURES
from llmnb.model.tensors import tensor_table
from llmnb.reference.rotary import rope_frequencies


# the file
class GGUFFile:
    """A GGUF file: its metadata, and its tensors as float32.

    Raises ImportError without the library gguf, OSError when the file cannot
    be read, and ValueError, naming it, when it is not a whole GGUF file.
    names: of the tensors. file[name] is a new array; shape(name) a tuple.

    Derived in chapter 5.7.
    """

    def __init__(self, path):
        self.path = Path(path)
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                what = what_is(path) or "it does not begin with GGUF"
                raise ValueError(f"{path}: not a GGUF file ({what})")
        gguf = package("gguf", "modern", path)
        now = os.stat(path)
        which = now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns
        try:
            reader = _read(gguf, self.path, which)
            if reader.byte_order != "I":
                raise ValueError("its numbers begin with their other byte")
            self._fields = reader.fields
            self._tensors = {x.name: x for x in reader.tensors}
        except Exception as error:  # the library has no class of its own
            raise ValueError(
                f"{path}: not a whole GGUF file ({error!s:.200})"
            ) from None
        self._dequantize = gguf.dequantize
        self.names = list(self._tensors)

    def get(self, name, default=None):
        """A value of the metadata: a number, a text or a list."""
        field = self._fields.get(name)
        try:
            return default if field is None else field.contents()
        except Exception as error:  # a text that is no UTF-8, for one
            raise ValueError(
                f"{self.path}: {name} cannot be read ({error!s:.200})"
            ) from None

    def shape(self, name):
        """The shape of a tensor as NumPy has it, a tuple of int."""
        return tuple(int(n) for n in self._tensors[name].shape[::-1])

    def dtype(self, name):
        """The type that a tensor is read in, by its name in safetensors."""
        return "F32"

    def __getitem__(self, name):
        x = self._tensors[name]
        try:
            found = self._dequantize(x.data, x.tensor_type)
        except NotImplementedError:
            kind = x.tensor_type.name
            raise ValueError(
                f"{self.path}: {name} is {kind}, which gguf cannot unpack"
            ) from None
        return np.asarray(found, np.float32).reshape(self.shape(name))


# read once
@lru_cache(maxsize=1)
def _read(gguf, path, which):
    """The library's reader of a file; which: one of another time is another.

    A vocabulary takes it seconds, and model, tokenizer and template are asked
    for one after the other.
    """
    return _strict(gguf.GGUFReader)(path)


# no further than the end
def _strict(reader):
    """The library's reader, which does not read on behind the end of a file.

    Its own takes what is not there for empty, and counts on: a damaged
    length of an array keeps it busy for years.
    """

    class Strict(reader):
        @property
        def data(self):
            return self._bytes

        @data.setter
        def data(self, x):  # a memmap, whose slices take ten times as long
            self._bytes = x.view(np.ndarray)

        def _get(self, offset, dtype, count=1, **how):
            found = super()._get(offset, dtype, count, **how)
            if len(found) < int(count):
                raise ValueError(f"it ends within {int(count)} numbers")
            return found

    return Strict


# names there
# the last words of published names -> the names in GGUF files
_THERE = {
    "embed_tokens": "token_embd", "lm_head": "output", "norm": "output_norm",
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
    "o_proj": "attn_output", "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm", "gate_proj": "ffn_gate", "up_proj": "ffn_up",
    "down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "pre_feedforward_layernorm": "ffn_norm",
}  # fmt: skip
# architectures there -> ours; a Mistral is stored as a llama
_FAMILIES = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma",
    "gemma2": "gemma2", "gemma3": "gemma3_text",
}  # fmt: skip


def gguf_name(published, cfg):
    """The name in GGUF files of a tensor that is published as `published`."""
    *_, word, last = published.split(".")
    there = _THERE.get(word)
    if word == "post_attention_layernorm":
        there = "post_attention_norm" if cfg.post_norms else "ffn_norm"
    if not published.startswith("model.layers."):
        return f"{there}.weight"
    return f"blk.{published.split('.')[2]}.{there}.{last}"


# its configuration
# our name -> the key there; a file without one of the first is not whole
_NEEDED = {
    "max_seq_len": "context_length",
    "num_layers": "block_count",
    "num_heads": "attention.head_count",
    "channels": "embedding_length",
    "hidden": "feed_forward_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
}
_USUAL = {
    "num_kv_heads": "attention.head_count_kv",
    "head_size": "attention.key_length",
    "rope_theta": "rope.freq_base",
    "attention_softcap": "attn_logit_softcapping",
    "final_softcap": "final_logit_softcapping",
    "window": "attention.sliding_window",
}


def gguf_config(file):
    """The configuration that the metadata of a GGUFFile describe.

    Raises ValueError, naming the file, for an architecture that is none of
    ours and for a number that is missing or makes no sense.

    Derived in chapter 5.7.
    """
    kind = file.get("general.architecture")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise ValueError(
            f"{file.path}: the architecture must be one of "
            f"{', '.join(_FAMILIES)}, got {kind!r:.80}"
        )
    made, keys = ARCHITECTURES[_FAMILIES[kind]], _NEEDED | _USUAL
    given = {ours: file.get(f"{kind}.{x}") for ours, x in keys.items()}
    for ours, there in _NEEDED.items():
        if given[ours] is None:
            raise ValueError(f"{file.path}: lacks {kind}.{there}")
    given = {name: _said(x) for name, x in given.items() if x is not None}
    table = "token_embd.weight"
    if table not in file.names or len(file.shape(table)) != 2:
        raise ValueError(f"{file.path}: has no table {table}")
    given["vocab_size"] = file.shape(table)[0]
    given["tied"] = "output.weight" not in file.names
    try:
        cfg = _with_scaling(file, kind, made(**given))
        return _with_scale(kind, _checked(file, kind, cfg))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file.path}: {error}") from None


# what else it may say
def _said(x):
    """A value as it was meant: 1e-05, where a float32 is 9.99999975e-06."""
    return float(str(np.float32(x))) if isinstance(x, float) else x


def _checked(file, kind, cfg):
    """The configuration, if nothing in the file is at odds with it."""
    if cfg.num_layers > len(file.names):
        raise ValueError(
            f"{kind}.block_count is {cfg.num_layers}, with "
            f"{len(file.names)} tensors"
        )
    for name in ("rope.dimension_count", "attention.value_length"):
        found = file.get(f"{kind}.{name}", cfg.head_size)
        if found != cfg.head_size:
            raise ValueError(
                f"{kind}.{name} must be the head size, {cfg.head_size}, "
                f"got {found!r:.80}"
            )
    return cfg


# the largest Gemmas, by their blocks, scale scores by another number,
# which the files do not say
_WIDE = {"gemma2": 46, "gemma3": 62}


def _with_scale(kind, cfg):
    if _WIDE.get(kind) != cfg.num_layers:
        return cfg
    scale = (cfg.channels / cfg.num_heads) ** -0.5
    return replace(cfg, attention_scale=scale)


# scaled rotations
# what a file says in one tensor, the factors of all frequencies
_KNOWN_SCALINGS = (
    ("llama3", 8.0, 1.0, 4.0, 8192), ("llama3", 32.0, 1.0, 4.0, 8192),
)  # fmt: skip


def _with_scaling(file, kind, cfg):
    """The configuration with the scaling that the file speaks of."""
    factor = file.get(f"{kind}.rope.scaling.factor")
    usual = "linear" if factor else "none"  # llama.cpp's
    scaling, there = None, file.get(f"{kind}.rope.scaling.type", usual)
    if there == "linear":
        scaling = "linear", _said(factor)
    elif there != "none":
        raise ValueError(f"the rotation's scaling {there!r:.80} is not known")
    if "rope_freqs.weight" in file.names:
        factors = file["rope_freqs.weight"]
        plain = rope_frequencies(cfg.head_size, cfg.rope_theta)
        for known in _KNOWN_SCALINGS:
            want = rope_frequencies(cfg.head_size, cfg.rope_theta, known)
            alike = factors.shape == plain.shape
            if alike and np.allclose(plain / want, factors, rtol=1e-4):
                scaling = known
        if scaling is None:
            raise ValueError("the factors of rope_freqs.weight are not known")
    return replace(cfg, rope_scaling=scaling)


# rows back in order
def half_split(weight, hs):
    """Rows of heads with pairs (2i, 2i + 1) as rows with pairs (i, i + hs/2).

    weight: (n hs, C), n heads of hs rows. Returns a new array.

    Derived in chapter 5.7.
    """
    heads = weight.reshape(-1, hs // 2, 2, weight.shape[1])
    return heads.swapaxes(1, 2).reshape(weight.shape)


def interleaved(weight, hs):
    """The inverse of `half_split`.

    Derived in chapter 5.7.
    """
    heads = weight.reshape(-1, 2, hs // 2, weight.shape[1])
    return heads.swapaxes(1, 2).reshape(weight.shape)


# open a file
def open_gguf(path):
    """A model's configuration, and the function that fills its params.

    path: of a .gguf file. Raises as GGUFFile and gguf_config do, and
    ValueError when a tensor is missing, too many or of another shape, before
    any is unpacked.

    Derived in chapter 5.7.
    """
    file = GGUFFile(path)
    cfg = gguf_config(file)
    names = {gguf_name(x, cfg): place for x, place in pieces(cfg).items()}
    tensors = {name: (file, name) for name in file.names}
    factors = re.compile(r"rope_freqs\.weight")
    check_tensors(path, cfg.family, tensors, names, factors)
    return cfg, partial(_read_gguf, file, cfg, names)


def _read_gguf(file, cfg, names, params):
    """Fill params, checked before, one tensor at a time."""
    turned = file.get("general.architecture") == "llama"
    for name, place in names.items():
        x = file[name]
        if turned and name.endswith(("attn_q.weight", "attn_k.weight")):
            x = half_split(x, cfg.head_size)
        if cfg.offset and name.endswith("norm.weight"):
            x = x - np.float32(cfg.offset)
        place.of(params)[...] = x
    for x in tensor_table(cfg):
        if x.used:
            params[x.name][x.used :] = 0
