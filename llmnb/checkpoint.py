# Written by `make export` from notebooks/02_memory.py: edit that file.

"""Lay out one block of memory.

One allocation holds every tensor of the model as a named view, so the
footprint is known before training begins and never grows.
"""

__all__ = [
    "CHUNK",
    "HEADER",
    "INNER",
    "MAGIC",
    "OUTER",
    "VERSION",
    "read_checkpoint",
    "read_config",
    "write_checkpoint",
    "write_safetensors",
]


# imports of the checkpoint
import os

import numpy as np

from llmnb.config import GPT2Config, parameter_count
from llmnb.files import replacing


# the header
MAGIC, VERSION = 20240326, 3
HEADER = 256  # int32 numbers, 1,024 bytes
CHUNK = 1 << 22  # numbers read or written at a time: 16 MiB of float32


# write a checkpoint
def write_checkpoint(path, cfg, params):
    """Write a model in llm.c's .bin format, version 3 (float32).

    params: the flat 1-D array of all parameters in the order of
    parameter_shapes(cfg). The file appears whole or not at all.

    Derived in chapter 2.
    """
    header = np.zeros(HEADER, "<i4")
    header[:8] = MAGIC, VERSION, *_sizes(cfg)
    with replacing(path) as file:
        file.write(header.tobytes())
        for first in range(0, params.size, CHUNK):
            part = params[first : first + CHUNK]
            file.write(part.astype("<f4", copy=False).data)


# the six sizes
def _sizes(cfg):
    return (
        cfg.max_seq_len,
        cfg.vocab_size,
        cfg.num_layers,
        cfg.num_heads,
        cfg.channels,
        cfg.padded_vocab_size,
    )


# read a header
def read_config(path):
    """The configuration in a checkpoint's header, checked against the file.

    Raises ValueError, naming the file, when it is not llm.c's .bin of
    version 3, when its sizes make no model, or when its length is not what
    these sizes require. Nothing is allocated before that is known.

    Derived in chapter 2.
    """
    with open(path, "rb") as file:
        raw = file.read(4 * HEADER)
    if len(raw) < 4 * HEADER:
        raise ValueError(
            f"{path}: {len(raw)} bytes are too few for a header of 1024"
        )
    magic, version, *sizes = np.frombuffer(raw, "<i4")[:8].tolist()
    if (magic, version) != (MAGIC, VERSION):
        raise ValueError(
            f"{path}: magic {magic} and version {version}, where a float32 "
            f"model has {MAGIC} and {VERSION}"
        )
    try:
        cfg = GPT2Config(*sizes[:5])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if cfg.padded_vocab_size != sizes[5]:
        raise ValueError(
            f"{path}: padded vocabulary {sizes[5]}, where "
            f"{cfg.vocab_size} tokens make {cfg.padded_vocab_size}"
        )
    _check_length(path, cfg)
    return cfg


# check the length
def _check_length(path, cfg):
    count = parameter_count(cfg)
    want, got = 4 * HEADER + 4 * count, os.path.getsize(path)
    if got != want:
        raise ValueError(
            f"{path}: {got:,} bytes, where the header's model takes {want:,}"
        )


# read a checkpoint
def read_checkpoint(path, params):
    """Read a checkpoint's parameters into a flat array, in place.

    params: 1-D, float32 or float64, as long as the file's model, whose
    header read_config has checked. Raises ValueError when the file is
    shorter.

    Derived in chapter 2.
    """
    with open(path, "rb") as file:
        file.seek(4 * HEADER)
        for first in range(0, params.size, CHUNK):
            part = params[first : first + CHUNK]
            body = np.fromfile(file, "<f4", count=part.size)
            if body.size != part.size:
                raise ValueError(
                    f"{path}: ends after {first + body.size:,} numbers, "
                    f"where the model has {params.size:,}"
                )
            part[...] = body


# names elsewhere
OUTER = {
    "wte": "wte.weight",
    "wpe": "wpe.weight",
    "lnfw": "ln_f.weight",
    "lnfb": "ln_f.bias",
}
INNER = {
    "ln1": "ln_1",
    "qkv": "attn.c_attn",
    "attproj": "attn.c_proj",
    "ln2": "ln_2",
    "fc": "mlp.c_fc",
    "fcproj": "mlp.c_proj",
}


# write safetensors
def write_safetensors(path, cfg, params):
    """Write a model as safetensors, in Hugging Face's layout of GPT-2.

    params: a mapping from llm.c's names to arrays, as `GPT2.params`. The
    tensors are float32, without padding. The file appears whole or not at
    all.

    Derived in chapter 2.
    """
    from safetensors.numpy import save

    tensors = {OUTER[n]: params[n] for n in OUTER}
    tensors["wte.weight"] = params["wte"][: cfg.vocab_size]
    for layer in range(cfg.num_layers):
        for ours, theirs in INNER.items():
            weight, bias = params[ours + "w"][layer], params[ours + "b"][layer]
            name = f"h.{layer}.{theirs}"
            tensors[f"{name}.weight"] = weight.T
            tensors[f"{name}.bias"] = bias
    tensors = {
        name: np.ascontiguousarray(x, np.float32)
        for name, x in tensors.items()
    }
    with replacing(path) as file:
        file.write(save(tensors, metadata={"format": "pt"}))
