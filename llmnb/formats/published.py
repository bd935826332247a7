# Written by `make export` from notebooks/4_practice/04_published.py: edit that file.

"""Hugging Face's layout: written, and GPT-2's read."""

__all__ = [
    "IGNORED", "INDEX", "Piece", "RECORD", "check_tensors", "open_published",
    "pieces", "published_tensors", "write_safetensors",
]


# imports for the layout
import json
import re
from functools import partial
from typing import NamedTuple

import numpy as np

from llmnb.files import read_json
from llmnb.formats.llmc import check_shapes, config_of
from llmnb.formats.safetensors import TensorFile, write_tensors
from llmnb.model.tensors import tensor_table


# where each tensor belongs
class Piece(NamedTuple):
    """Where one published tensor lies in our arrays.

    name: ours. block: its number, or None. rows: a slice of the rows. turned:
    whether it stands the other way round there. shape: as it stands there.

    Derived in chapter 4.4.
    """

    name: str
    block: int | None
    rows: slice
    turned: bool
    shape: tuple

    def of(self, params):
        """Our rows, a view, as they stand there."""
        x = params[self.name]
        rows = (x if self.block is None else x[self.block])[self.rows]
        return rows.T if self.turned else rows


def pieces(cfg):
    """Published name -> `Piece`, for all tensors of a model.

    Derived in chapter 4.4.
    """
    found = {}
    for x in tensor_table(cfg):
        for i in range(cfg.num_layers) if x.stacked else [None]:
            at = 0
            for name, rows in x.pieces or [(x.there, x.used or x.shape[0])]:
                here, shape = slice(at, at + rows), (rows, *x.shape[1:])
                shape = shape[::-1] if x.turned else shape
                found[name.format(i)] = Piece(x.name, i, here, x.turned, shape)
                at += rows
    return found


# write safetensors
RECORD = "llmnb"  # where the metadata hold another family's configuration


def write_safetensors(path, cfg, params):
    """Write a model as safetensors, in Hugging Face's layout.

    params: a mapping from our names to arrays, as `GPT2.params`. The tensors
    are float32, without padding. What no shape shows stands in the metadata:
    GPT-2's number of heads, or all of another configuration. The file
    appears whole or not at all. Raises ValueError for arrays of another
    model's shapes.

    Derived in chapter 4.4.
    """
    check_shapes("write_safetensors", cfg, params)
    tensors = {
        name: place.of(params).astype(np.float32, copy=False)
        for name, place in pieces(cfg).items()
    }
    note = {"n_head": str(cfg.num_heads)}
    if cfg.family != "gpt2":
        from llmnb.model.architectures import architecture_record  # Part 5

        note = {RECORD: json.dumps(architecture_record(cfg))}
    # the library transformers wants the format named
    write_tensors(path, tensors, {"format": "pt"} | note)


# the model's description
# settings that change what a GPT-2 computes, and the values we compute with
FIXED = {
    "model_type": ["gpt2"],
    "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
    "layer_norm_epsilon": [1e-5],
    "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False],
    "add_cross_attention": [False],
    "tie_word_embeddings": [True],
}


def _described(cfg):
    """The sizes of a model by the names of config.json."""
    return {
        "n_positions": cfg.max_seq_len,
        "vocab_size": cfg.vocab_size,
        "n_layer": cfg.num_layers,
        "n_head": cfg.num_heads,
        "n_embd": cfg.channels,
    }


def gpt2_description(cfg):
    """The config.json of a GPT-2, a dict, as `transformers` reads it."""
    found = {name: values[0] for name, values in FIXED.items()}
    found |= _described(cfg)
    found["architectures"] = ["GPT2LMHeadModel"]
    # our encodings end with the token that ends a text
    found["bos_token_id"] = found["eos_token_id"] = cfg.vocab_size - 1
    return found


# files and their index
INDEX = "model.safetensors.index.json"


def _indexed(path):
    """Tensor name -> TensorFile, for the files that an index names."""
    table = read_json(path).get("weight_map")
    names = table.values() if isinstance(table, dict) else [None]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: weight_map must map tensors to files")
    files = {name: _neighbour(path, name) for name in set(names)}
    held = {name: set(file.names) for name, file in files.items()}
    for tensor, name in table.items():
        if tensor not in held[name]:
            raise ValueError(f"{path}: {name} has no tensor {tensor}")
    return {tensor: files[name] for tensor, name in table.items()}


def _neighbour(path, name):
    """The TensorFile of that name in the folder of `path`."""
    if name in ("", ".", "..") or set(name) & set("/\\:\0"):
        raise ValueError(
            f"{path}: {name!r:.80} must name a file in the same folder"
        )
    return TensorFile(path.parent / name)


# tensors by their names
def published_tensors(path):
    """Name -> (TensorFile, the same name), of a file or an index of several.

    Raises ValueError, naming the file, when one is not whole or missing.

    Derived in chapter 4.4.
    """
    if path.suffix == ".json":
        found = _indexed(path)
    else:
        file = TensorFile(path)
        found = dict.fromkeys(file.names, file)
    return {name: (file, name) for name, file in found.items()}


# by their short names
def _tensors(path):
    """Name without prefix -> (TensorFile, name in it)."""
    tensors = {}
    for name, (file, _) in published_tensors(path).items():
        short = name.removeprefix("transformer.")
        if short in tensors:
            raise ValueError(f"{path}: {short} comes twice")
        tensors[short] = file, name
    if "lm_head.weight" in tensors:
        tensors.setdefault("wte.weight", tensors["lm_head.weight"])
    return tensors


# the configuration of a set of tensors
def _published_config(path, tensors):
    """The configuration that the shapes give, checked tensor by tensor."""
    described = path.parent / "config.json"
    config = read_json(described) if described.exists() else {}
    _check_kind(described, config.get("model_type", "gpt2"))
    for name, known in FIXED.items():
        if config.get(name, known[0]) not in known:
            raise ValueError(
                f"{described}: {name} is {config[name]!r:.80}, where a GPT-2 "
                f"has {known[0]!r}"
            )
    sizes = _sizes_of(path, tensors)
    heads = _heads(path, tensors, config, sizes[2:])
    cfg = config_of(path, [*sizes[:3], heads, sizes[-1]])
    for name, value in _described(cfg).items():
        if config.get(name, value) != value:
            raise ValueError(
                f"{described}: {name} is {config[name]!r:.80}, where "
                f"{path.name} has {value}"
            )
    check_tensors(path, "GPT-2", tensors, pieces(cfg), IGNORED)
    return cfg


def _check_kind(path, kind):
    """Raise for the description of a model that is of another kind."""
    from llmnb.model.architectures import ARCHITECTURES  # Part 5

    if kind != "gpt2":
        raise ValueError(
            f"{path}: model_type is {kind!r:.80}, where known are "
            f"{', '.join(ARCHITECTURES)}"
        )


# sizes from shapes
def _sizes_of(path, tensors):
    """max_T, V, L and C from the embeddings and the number of blocks."""
    for name in ("wte.weight", "wpe.weight"):
        if name not in tensors:
            raise ValueError(f"{path}: no GPT-2, it has no tensor {name}")
        file, full = tensors[name]
        if len(file.shape(full)) != 2:
            raise ValueError(
                f"{path}: {full} must be a matrix, got {file.shape(full)}"
            )
    (wte, long), (wpe, full) = tensors["wte.weight"], tensors["wpe.weight"]
    layers = 0
    while f"h.{layers}.ln_1.weight" in tensors:
        layers += 1
    vocab_size, channels = wte.shape(long)
    return wpe.shape(full)[0], vocab_size, layers, channels


# heads of the published models, by their blocks and channels
PUBLISHED = {(12, 768): 12, (24, 1024): 16, (36, 1280): 20, (48, 1600): 25}


def _heads(path, tensors, config, shape):
    """The number of heads: written down, or that of a published model."""
    file, _ = tensors["wte.weight"]
    written = file.metadata.get("n_head", "")
    if written.isdecimal() and len(written) < 10:
        return int(written)
    heads = config.get("n_head", PUBLISHED.get(shape))
    if heads is None:
        raise ValueError(
            f"{path}: how many heads? No tensor shows it: put the model's "
            'config.json beside it, or one that holds {"n_head": 12}, if it '
            "is 12"
        )
    return heads


# check all shapes
# masks, and the output matrix that is wte once more
IGNORED = re.compile(r"h\.\d+\.attn\.(masked_)?bias|lm_head\.weight")


def check_tensors(path, kind, tensors, wanted, ignored):
    """Raise ValueError unless there is each tensor of a model, and no other.

    kind: of model. tensors: name -> (TensorFile, name in it). wanted: its
    `pieces`. ignored: a pattern of names that may be there too.

    Derived in chapter 4.4.
    """
    for name, place in wanted.items():
        if name not in tensors:
            raise ValueError(f"{path}: has no tensor {name}")
        (file, full), want = tensors[name], place.shape
        if file.shape(full) != want:
            raise ValueError(
                f"{path}: {full} must be {want}, got {file.shape(full)}"
            )
        if file.dtype(full) not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(
                f"{path}: {full} must be a float, got {file.dtype(full)}"
            )
    for name in sorted(set(tensors) - set(wanted)):
        if not ignored.fullmatch(name):
            raise ValueError(f"{path}: a {kind} has no tensor {name}")


# read tensors into place
def read_pieces(cfg, tensors, params):
    """Fill params, checked before, one tensor at a time; padding with 0."""
    for name, place in pieces(cfg).items():
        file, full = tensors[name]
        place.of(params)[...] = file[full]
    for x in tensor_table(cfg):
        if x.used:
            params[x.name][x.used :] = 0


def _read_published(path, cfg, tensors, params):
    file, wte = tensors["wte.weight"]
    head, name = tensors.get("lm_head.weight", (file, wte))
    if name != wte and not np.array_equal(head[name], file[wte], True):
        raise ValueError(f"{path}: lm_head.weight must equal {wte}")
    read_pieces(cfg, tensors, params)


# open a published model
def open_published(path):
    """A model's configuration, and the function that fills its params.

    Derived in chapter 4.4.
    """
    tensors = _tensors(path)
    cfg = _published_config(path, tensors)
    return cfg, partial(_read_published, path, cfg, tensors)
