# Written by `make export` from notebooks/1_by_hand/13_memory.py: edit that file.

"""Models on disk, in every format that is known."""

__all__ = [
    "BODIES",
    "CHUNK",
    "HEADER",
    "MAGIC",
    "STATE",
    "SUMMED",
    "first_not_finite",
    "from_bfloat16",
    "read_checkpoint",
    "read_config",
    "state_record",
    "to_bfloat16",
    "without_padding",
    "write_checkpoint",
    "write_folder",
    "write_safetensors",
]


# imports of the checkpoint
import os
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmnb.checks import check_array
from llmnb.config import GPT2Config
from llmnb.files import make_folder, read_small, replacing, what_is
from llmnb.model.tensors import (
    parameter_count,
    parameter_shapes,
    tensor_table,
)


# to bfloat16 and back
def to_bfloat16(x):
    """The 16 bits of the bfloat16 nearest to each number, equation (1.13.2).

    x: float32, of any shape. Returns uint16 of the same shape. A tie goes
    to the even neighbour, what is too large to infinity; NaN stays NaN.

    Derived in chapter 1.13.
    """
    bits = x.view(np.uint32)
    nearest = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    cut = bits >> 16 | 0x40
    return np.where(np.isnan(x), cut, nearest).astype(np.uint16)


def from_bfloat16(bits):
    """The float32 numbers that bfloat16 bits (uint16) stand for, exactly.

    Derived in chapter 1.13.
    """
    return (bits.astype(np.uint32) << 16).view(np.float32)


# the header
MAGIC = 20240326
BODIES = {3: "<f4", 5: "<u2"}  # a version and how its numbers are stored
HEADER = 256  # int32 numbers, 1,024 bytes
SUMMED = 1  # in a header with a checksum, the last number but one
CHUNK = 1 << 22  # numbers read or written at a time: 16 MiB of float32


# write a checkpoint
def write_checkpoint(path, cfg, params, version=3):
    """Write a model in llm.c's .bin format.

    params: a mapping from llm.c's names to arrays, as `GPT2.params`. version: 3 for float32, 5 for bfloat16, rounded
    from float32 to nearest; ValueError for another. The file appears whole
    or not at all.

    Derived in chapter 1.13.
    """
    if version not in BODIES:
        raise ValueError(
            f"write_checkpoint: version must be 3 (float32) or 5 (bfloat16), "
            f"got {version!r}"
        )
    header = np.zeros(HEADER, "<u4")
    header[:8] = MAGIC, version, *_sizes(cfg)
    header[-2], total = SUMMED, 0
    with replacing(path) as file:
        file.write(header.data)
        for part in _pieces(params[x] for x in parameter_shapes(cfg)):
            part = part.astype(np.float32, copy=False)
            body = to_bfloat16(part) if version == 5 else part
            body = body.astype(BODIES[version], copy=False).data
            total = zlib.crc32(body, total)
            file.write(body)
        header[-1] = zlib.crc32(header, total)
        file.seek(0)
        file.write(header.data)


# pieces, and the six sizes
def _pieces(arrays):
    """Some arrays, flat, as views of at most CHUNK numbers."""
    for array in arrays:
        flat = np.asarray(array).reshape(-1)
        for first in range(0, flat.size, CHUNK):
            yield flat[first : first + CHUNK]


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
def _bin_header(path):
    """Version and configuration of a .bin, checked against its length."""
    with open(path, "rb") as file:
        raw = file.read(4 * HEADER)
    if what := what_is(path, MAGIC):
        raise ValueError(f"{path}: {what}")
    if len(raw) < 4 * HEADER:
        raise ValueError(
            f"{path}: {len(raw)} bytes are too few for a header of 1024"
        )
    magic, version, *sizes = np.frombuffer(raw, "<i4")[:8].tolist()
    if magic != MAGIC or version not in BODIES:
        raise ValueError(
            f"{path}: magic {magic} and version {version}, where a model "
            f"has {MAGIC} and 3 or 5"
        )
    cfg = _config(path, sizes[:5])
    if cfg.padded_vocab_size != sizes[5]:
        raise ValueError(
            f"{path}: padded vocabulary {sizes[5]}, where "
            f"{cfg.vocab_size} tokens make {cfg.padded_vocab_size}"
        )
    _check_length(path, version, cfg)
    return version, cfg


# check the sizes and the length
def _config(path, sizes):
    try:
        return GPT2Config(*sizes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check_length(path, version, cfg):
    width = np.dtype(BODIES[version]).itemsize
    want = 4 * HEADER + width * parameter_count(cfg)
    got = os.path.getsize(path)
    if got != want:
        raise ValueError(
            f"{path}: {got:,} bytes, where the header's model takes {want:,}"
        )


# read a
def _read_bin(path, version, params):
    """Fill params, checked before, from the numbers behind the header."""
    with open(path, "rb") as file:
        header, total = np.fromfile(file, "<u4", HEADER), 0
        for name, array in params.items():
            for part in _pieces([array]):
                body = np.fromfile(file, BODIES[version], part.size)
                if body.size != part.size:
                    raise ValueError(f"{path}: ends within {name}")
                total = zlib.crc32(body, total)
                part[...] = from_bfloat16(body) if version == 5 else body
    _check_sum(path, header, total)


def _check_sum(path, header, total):
    """Raise unless a .bin has the sum that its header keeps, if any."""
    marked, kept = header[-2:].tolist()
    header[-1] = 0
    if marked == SUMMED and kept != zlib.crc32(header, total):
        raise ValueError(
            f"{path} is damaged, its checksum is not the one in its header: "
            "take another copy, or write it anew, as `llmnb train --resume` "
            "does for a run"
        )


# imports for the hub's layout
import json
import re

from llmnb.formats.safetensors import TensorFile, write_tensors


# where each tensor belongs
class _Place(NamedTuple):
    """Where one tensor of a published file belongs in our arrays."""

    name: str
    index: object  # a block's number, or a slice of rows
    turned: bool

    def of(self, params):
        """The part of our array: a view, as it stands there."""
        part = params[self.name][self.index]
        return part.T if self.turned else part


def _places(cfg):
    """Name in published files -> _Place."""
    places = {}
    for x in tensor_table(cfg):
        rows = slice(cfg.vocab_size if x.name == "wte" else None)
        for i in range(cfg.num_layers) if x.stacked else [rows]:
            turned = x.turned and x.stacked
            places[x.there.format(i)] = _Place(x.name, i, turned)
    return places


# write safetensors
def write_safetensors(path, cfg, params):
    """Write a model as safetensors, in Hugging Face's layout of GPT-2.

    params: a mapping from llm.c's names to arrays, as `GPT2.params`. The
    tensors are float32, without padding; the number of heads, which no
    shape shows, stands in the metadata. The file appears whole or not at
    all.

    Derived in chapter 1.13.
    """
    tensors = {
        name: place.of(params).astype(np.float32, copy=False)
        for name, place in _places(cfg).items()
    }
    # the library transformers wants the format named
    metadata = {"format": "pt", "n_head": str(cfg.num_heads)}
    write_tensors(path, tensors, metadata)


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


# write a folder
def write_folder(folder, cfg, params):
    """Write a model folder that `transformers` reads: GPT2LMHeadModel.

    The folder is made if it is not there; in it config.json and
    model.safetensors are replaced. params: as for write_safetensors. Raises
    ValueError when there is a config.json that describes no GPT-2.

    Derived in chapter 1.13.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if path.exists() and _read_json(path).get("model_type") != "gpt2":
        raise ValueError(f"{path}: describes no GPT-2, and is left alone")
    make_folder(folder)
    config = {name: values[0] for name, values in FIXED.items()}
    config |= _described(cfg)
    config["architectures"] = ["GPT2LMHeadModel"]
    # our encodings end with the token that ends a text
    config["bos_token_id"] = config["eos_token_id"] = cfg.vocab_size - 1
    write_safetensors(folder / "model.safetensors", cfg, params)
    with replacing(path) as file:
        file.write(json.dumps(config, indent=1).encode() + b"\n")


# read JSON
def _read_json(path, most=1 << 20):
    """The object in a JSON file of at most so many bytes, as a dict."""
    raw = read_small(path, most)
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        what = what_is(path) or f"not JSON ({error})"
        raise ValueError(f"{path}: {what}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return found


# files and their index
INDEX = "model.safetensors.index.json"


def _indexed(path):
    """Tensor name -> TensorFile, for the files that an index names."""
    table = _read_json(path).get("weight_map")
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


# tensors by their short names
def _tensors(path):
    """Name without prefix -> (TensorFile, name in it)."""
    if path.suffix == ".json":
        found = _indexed(path)
    else:
        file = TensorFile(path)
        found = dict.fromkeys(file.names, file)
    tensors = {}
    for name, file in found.items():
        short = name.removeprefix("transformer.")
        if short in tensors:
            raise ValueError(f"{path}: {short} comes twice")
        tensors[short] = file, name
    if "lm_head.weight" in tensors:
        tensors.setdefault("wte.weight", tensors["lm_head.weight"])
    return tensors


# the configuration of a set of tensors
def _hub_config(path, tensors):
    """The configuration that the shapes give, checked tensor by tensor."""
    described = path.parent / "config.json"
    config = _read_json(described) if described.exists() else {}
    for name, known in FIXED.items():
        if config.get(name, known[0]) not in known:
            raise ValueError(
                f"{described}: {name} is {config[name]!r:.80}, where a GPT-2 "
                f"has {known[0]!r}"
            )
    sizes = _sizes_of(path, tensors)
    heads = _heads(path, tensors, config, sizes[2:])
    cfg = _config(path, [*sizes[:3], heads, sizes[-1]])
    for name, value in _described(cfg).items():
        if config.get(name, value) != value:
            raise ValueError(
                f"{described}: {name} is {config[name]!r:.80}, where "
                f"{path.name} has {value}"
            )
    _check_shapes(path, cfg, tensors)
    return cfg


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


def _check_shapes(path, cfg, tensors):
    """Raise unless there is each tensor of the model, and no other."""
    shapes = parameter_shapes(cfg)
    empty = {x: np.broadcast_to(np.float32(0), shapes[x]) for x in shapes}
    places = _places(cfg)
    for name, place in places.items():
        if name not in tensors:
            raise ValueError(f"{path}: has no tensor {name}")
        file, full = tensors[name]
        want = place.of(empty).shape
        if file.shape(full) != want:
            raise ValueError(
                f"{path}: {full} must be {want}, got {file.shape(full)}"
            )
        if file.dtype(full) not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(
                f"{path}: {full} must be a float, got {file.dtype(full)}"
            )
    for name in sorted(set(tensors) - set(places)):
        if not IGNORED.fullmatch(name):
            raise ValueError(f"{path}: GPT-2 has no tensor {name}")


# read tensors into place
def _read_hub(path, cfg, tensors, params):
    """Fill params, checked before, one tensor at a time."""
    file, wte = tensors["wte.weight"]
    head, name = tensors.get("lm_head.weight", (file, wte))
    if name != wte and not np.array_equal(head[name], file[wte], True):
        raise ValueError(f"{path}: lm_head.weight must equal {wte}")
    for name, place in _places(cfg).items():
        file, full = tensors[name]
        place.of(params)[...] = file[full]
    params["wte"][cfg.vocab_size :] = 0


# a training state
import zlib

STATE = "llmnb training state 1"


def state_record(file):
    """The record of a training state: a dict.

    file: its TensorFile. Raises ValueError or KeyError when it is no state,
    or a damaged one.

    Derived in chapter 1.13.
    """
    note = file.metadata
    if note.get("format") != STATE:
        raise ValueError(f"its format must be {STATE!r}")
    if str(zlib.crc32(note["record"].encode())) != note["sum"]:
        raise ValueError("its record is damaged")
    return json.loads(note["record"])


# its weights
def _open_state(path, file):
    """A state's configuration, and the function that fills its params."""
    try:
        record = state_record(file)
        cfg, sums = GPT2Config(**record["model"]), record["sums"]
        for name, shape in parameter_shapes(cfg).items():
            got = file.shape(f"params.{name}")
            if got != shape:
                raise ValueError(f"params.{name} must be {shape}, got {got}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole state: {error}") from None
    return cfg, partial(_read_state, path, file, sums)


def _read_state(path, file, sums, params):
    """Fill params, checked before, and check their sums."""
    for name, array in params.items():
        x = file[f"params.{name}"]
        if zlib.crc32(x) != sums.get(f"params.{name}"):
            raise ValueError(
                f"{path} is not a whole state: params.{name} is damaged"
            )
        array[...] = x


# is it a number
def first_not_finite(arrays):
    """Which of some arrays holds an infinity or a NaN, and where; or None.

    arrays: a mapping from name to array. Returns a text.

    Derived in chapter 1.13.
    """
    for name, x in arrays.items():
        with np.errstate(all="ignore"):
            total = np.vdot(x, x)
        if not np.isfinite(total) and not np.isfinite(x).all():
            where = tuple(int(i) for i in np.argwhere(~np.isfinite(x))[0])
            return f"{name} is {x[where]} at {where}"
    return None


# which file it is
# endings of models that we do not read, which is to be said
OTHERS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".gguf", ".npz")


def _find(path):
    """The file to read: the path itself, or what a folder holds."""
    path = Path(path)
    if not path.is_dir():
        return path
    names = "model.safetensors", INDEX, "model.bin"
    for name in names:
        if (path / name).exists():
            return path / name
    for other in sorted(path.glob("*.*")):
        if other.suffix in OTHERS and (what := what_is(other)):
            raise ValueError(f"{other}: {what}")
    raise FileNotFoundError(f"{path}: holds none of {', '.join(names)}")


def _open(path):
    """A model's configuration, and the function that fills its params."""
    path = _find(path)
    if path.suffix in (".safetensors", ".json"):
        file = TensorFile(path) if path.suffix == ".safetensors" else None
        if file and file.metadata.get("format") == STATE:
            return _open_state(path, file)
        tensors = _tensors(path)
        cfg = _hub_config(path, tensors)
        return cfg, partial(_read_hub, path, cfg, tensors)
    version, cfg = _bin_header(path)
    return cfg, partial(_read_bin, path, version)


# read any model
def read_config(path, tokens=None):
    """The configuration of a model on disk, checked against its files.

    path: llm.c's .bin (float32 or bfloat16), a .safetensors file or the
    index of several in Hugging Face's layout, or a folder that holds one
    of these as model.bin, model.safetensors or model.safetensors.index.json;
    or a state of a run, see llmnb.train.run. tokens: how many its tokenizer has;
    rows beyond, up to the next multiple of 128, are not counted as tokens.
    Raises ValueError, naming the file, when it is no GPT-2, or when its
    sizes, its shapes or its length do not fit, or the tokens; OSError when
    it cannot be read. Nothing is allocated before that is known.

    Derived in chapter 1.13.
    """
    cfg = _open(path)[0]
    return cfg if tokens is None else without_padding(path, cfg, tokens)


def without_padding(path, cfg, tokens, tokenizer=""):
    """The configuration of a model on disk for a tokenizer's tokens.

    path, cfg, tokens: as for read_config. Raises ValueError, which names
    the path and the tokenizer, when it must be another model's.

    Derived in chapter 1.13.
    """
    few = replace(cfg, vocab_size=tokens)
    if not tokens <= cfg.vocab_size <= few.padded_vocab_size:
        named = "the tokenizer" + (tokenizer and f" {tokenizer}")
        raise ValueError(
            f"{path} has {cfg.vocab_size} tokens, {named} has {tokens}"
        )
    return few


def read_checkpoint(path, cfg, params):
    """Read a model's parameters into arrays, in place.

    path: as for read_config, and cfg what that returned. params: a mapping
    from llm.c's names to arrays in the shapes of parameter_shapes(cfg),
    float32 or float64, as `GPT2.params`. Raises ValueError or TypeError when
    they do not fit the file, before any is written to, and ValueError when
    the file ends early after all, does not match its checksum, or when a
    weight is not finite.

    Derived in chapter 1.13.
    """
    found, fill = _open(path)
    if without_padding(path, found, cfg.vocab_size) != cfg:
        raise ValueError(f"{path}: holds {found}, not {cfg}")
    ours = {}
    for name, shape in parameter_shapes(cfg).items():
        ours[name] = params[name]
        label = f"read_checkpoint: {name}"
        check_array(label, params[name], shape, written=True)
    fill(ours)
    if cfg != found:
        ours["wte"][cfg.vocab_size :] = 0
    wrong = first_not_finite(ours)
    if wrong:
        raise ValueError(f"{path}: {wrong}, where weights must be finite")
