# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       formats.published: "Hugging Face's layout: written, and GPT-2's read."
#       formats.checkpoint: "Models on disk, in every format that is known."
# ---

# %% [markdown]
# # Published models: other programs' files
#
# > Hugging Face's layout of GPT-2, read and written; and one function that
# > opens a model of any known format.
#
# *Reading time: 29 minutes. You need: [chapter 4.2](02_checkpoints.ipynb),
# [chapter 4.3](03_safetensors.ipynb).*

# %% [markdown]
# ## Where we are
#
# Most GPT-2 models that you can download were made by other programs than this
# one, and most programs that you would give yours to expect their layout. At
# the end of this chapter you can
#
# - find the one transposed matrix that no check of shapes can find;
# - tell a model's sizes from its tensors, all but one;
# - open any model without knowing its format, and be sure that its weights are
#   numbers.

# %% [markdown]
# ## Setup

# %% setup
import os
import tempfile
from pathlib import Path

from llmnb.book.verify import compare, verdict
from llmnb.formats.llmc import write_checkpoint
from llmnb.model.gpt2 import GPT2
from llmnb.text import bpe

folder = Path(tempfile.mkdtemp())

# %% imports for the layout tags=["export"]
import json
import re
from functools import partial
from typing import NamedTuple

import numpy as np

from llmnb.files import read_json
from llmnb.formats.llmc import check_shapes, config_of
from llmnb.formats.safetensors import TensorFile, write_tensors
from llmnb.model.tensors import tensor_table

# %% [markdown]
# A small model to work with, which learns in a few steps to repeat one line,
# the expression that cuts a text into words:

# %% a small trained model
from llmnb.config import GPT2Config

CFG = GPT2Config(64, 257, 2, 4, 64)
ids = np.array(bpe.byte().encode(bpe.WORDS * 40)[: 4 * 64 + 1])
batch = ids[:-1].reshape(4, 64), ids[1:].reshape(4, 64)
model = GPT2(CFG, 4, 64)
first = model.forward(*batch)
for step in range(1, 41):
    loss = model.forward(*batch)
    model.backward()
    model.update(learning_rate=3e-3, step=step)
loss = model.forward(*batch)
verdict("training", loss < first / 4, "loss below a quarter")

# %% [markdown]
# ## The matrix that stands the other way round
#
# PyTorch's linear layer, llm.c and this book compute $y = x W^\top + b$ with
# $W$ of shape (outputs, inputs). The first GPT-2 used a convolution of width
# one, *Conv1D*, which computes $y = x A + b$ with $A$ of shape (inputs,
# outputs). They are the same layer if $A = W^\top$, and files in Hugging
# Face's layout hold $A$. With three inputs and two outputs:

# %% one layer, two ways to store it
W = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])  # (outputs, inputs)
A = np.ascontiguousarray(W.T)  # (inputs, outputs)
x = np.array([1.0, 10.0, 100.0])
print("W in memory:", W.ravel().tolist(), " x W^T =", (x @ W.T).tolist())
print("A in memory:", A.ravel().tolist(), " x A   =", (x @ A).tolist())

# %% [markdown]
# The layout has names of its own too, each block's tensors by themselves, and
# no padding. `pieces` says of each tensor there which of ours it belongs to,
# and where in it. Reading, writing and checking all go by it. (Of GPT-2 each
# is a whole matrix; the models of Part 5 publish three where we have one.)


# %% where each tensor belongs tags=["export"]
class Piece(NamedTuple):
    """Where one published tensor lies in our arrays.

    name: ours. block: its number, or None. rows: a slice of the rows. turned:
    whether it stands the other way round there. shape: as it stands there.
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
    """Published name -> `Piece`, for all tensors of a model."""
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


# %% write safetensors tags=["export"]
RECORD = "llmnb"  # where the metadata hold another family's configuration


def write_safetensors(path, cfg, params):
    """Write a model as safetensors, in Hugging Face's layout.

    params: a mapping from our names to arrays, as `GPT2.params`. The tensors
    are float32, without padding. What no shape shows stands in the metadata:
    GPT-2's number of heads, or all of another configuration. The file
    appears whole or not at all. Raises ValueError for arrays of another
    model's shapes.
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


# %% what is in the file
write_safetensors(folder / "right.safetensors", CFG, model.params)
file = TensorFile(folder / "right.safetensors")
for name in file.names[:4]:
    print(name, file.shape(name))
qkvw = model.params["qkvw"]
compare("qkvw", file["h.1.attn.c_attn.weight"].T, qkvw[1], tol=1e-30)

# %% [markdown]
# A *model folder* holds such a file as `model.safetensors`, and the numbers
# of the configuration in `config.json`. With the two, `transformers` loads
# the model by the folder's name.

# %% the model's description tags=["exporti"]
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


# %% [markdown]
# Files by others vary. Some names begin with `transformer.`; some files hold
# the causal masks, `attn.bias` and `attn.masked_bias`, which are no
# parameters; some hold the output matrix once more as `lm_head.weight`, which
# must then equal `wte`. Others hold it *only* under that name: it and `wte`
# are one tensor with two names, of which safetensors' `save_model` keeps one.
# And a large model lies in several files, with an *index* that names the file
# of each tensor. A name from a file is used as a path here, and must not lead
# out of the folder.

# %% files and their index tags=["export"]
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


# %% tensors by their names tags=["export"]
def published_tensors(path):
    """Name -> (TensorFile, the same name), of a file or an index of several.

    Raises ValueError, naming the file, when one is not whole or missing.
    """
    if path.suffix == ".json":
        found = _indexed(path)
    else:
        file = TensorFile(path)
        found = dict.fromkeys(file.names, file)
    return {name: (file, name) for name, file in found.items()}


# %% by their short names tags=["exporti"]
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


# %% [markdown]
# The shapes tell the configuration, all but the number of heads: our own files
# name it, and a `config.json` beside the file does. Without either it is known
# for the four shapes that OpenAI published. A wrong guess would give a model
# that writes nonsense without a word, so of any other we ask for it. A
# `config.json` that contradicts the shapes is an error, and so is one that
# asks for another computation than ours.


# %% the configuration of a set of tensors tags=["exporti"]
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


# %% sizes from shapes tags=["exporti"]
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


# %% check all shapes tags=["export"]
# masks, and the output matrix that is wte once more
IGNORED = re.compile(r"h\.\d+\.attn\.(masked_)?bias|lm_head\.weight")


def check_tensors(path, kind, tensors, wanted, ignored):
    """Raise ValueError unless there is each tensor of a model, and no other.

    kind: of model. tensors: name -> (TensorFile, name in it). wanted: its
    `pieces`. ignored: a pattern of names that may be there too.
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


# %% read tensors into place tags=["exporti"]
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


# %% open a published model tags=["export"]
def open_published(path):
    """A model's configuration, and the function that fills its params."""
    tensors = _tensors(path)
    cfg = _published_config(path, tensors)
    return cfg, partial(_read_published, path, cfg, tensors)


# %% [markdown]
# ## One door for every format
#
# A run in progress ([chapter 4.15](15_states.ipynb)) keeps its state in
# the container of chapter 4.3: the weights under their own names, with
# `params.` before them, and beside them what only training needs. Its metadata
# holds a page of JSON, the **record**, with the configuration; the sums of the
# container cover it too. Whoever wants the model reads a third of the file.

# %% imports of the door tags=["export"] module="formats.checkpoint"
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmnb.backend import choose
from llmnb.checks import check_array
from llmnb.files import make_folder, read_json, what_is, write_whole
from llmnb.formats.llmc import bin_header, read_bin, write_checkpoint
from llmnb.formats.published import INDEX, RECORD, gpt2_description
from llmnb.formats.published import open_published, write_safetensors
from llmnb.formats.safetensors import TensorFile
from llmnb.model.tensors import parameter_shapes

# %% a training state tags=["export"] module="formats.checkpoint"
STATE = "llmnb training state 1"


def state_record(file):
    """The record of a training state: a dict.

    file: its TensorFile. Raises ValueError or KeyError when it is no state.
    A bit that is not what it was is found by the sum of any array.
    """
    if file.metadata.get("format") != STATE:
        raise ValueError(f"its format must be {STATE!r}")
    return json.loads(file.metadata["record"])


# %% its weights tags=["exporti"] module="formats.checkpoint"
def _open_state(path, file):
    """A state's configuration, and the function that fills its params."""
    from llmnb.model.architectures import architecture_from  # Part 5

    try:
        cfg = architecture_from(state_record(file)["model"])
        for name, shape in parameter_shapes(cfg).items():
            got = file.shape(f"params.{name}")
            if got != shape:
                raise ValueError(f"params.{name} must be {shape}, got {got}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole state: {error}") from None
    return cfg, partial(_read_state, file)


def _read_state(file, params):
    """Fill params, checked before."""
    for name, array in params.items():
        array[...] = file[f"params.{name}"]


# %% [markdown]
# A caller should not need to know which format it has. A folder is looked
# into; otherwise the name's ending decides. A folder with a model in another
# format says which.

# %% which file it is tags=["export"] module="formats.checkpoint"
# endings of models that we do not read, which is to be said
_OTHERS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".npz")


def find_model(path):
    """The file to read: the path itself, or what a folder holds."""
    path = Path(path)
    if not path.is_dir():
        return path
    names = "model.safetensors", INDEX, "model.bin"
    for name in names:
        if (path / name).exists():
            return path / name
    packed = sorted(path.glob("*.gguf"))
    if len(packed) == 1:
        return packed[0]
    if packed:
        raise ValueError(f"{path}: holds {len(packed)} GGUF files: name one")
    for other in sorted(path.glob("*.*")):
        known = other.suffix in _OTHERS and other.is_file()
        if known and (what := what_is(other)):
            raise ValueError(f"{other}: {what}")
    raise FileNotFoundError(f"{path}: holds none of {', '.join(names)}")


# %% which reader it is tags=["exporti"] module="formats.checkpoint"
def _open(path):
    """A model's configuration, and the function that fills its params."""
    path = find_model(path)
    if path.suffix == ".gguf":
        from llmnb.formats.gguf import open_gguf  # Part 5

        return open_gguf(path)
    if path.suffix not in (".safetensors", ".json"):
        version, cfg = bin_header(path)
        return cfg, partial(read_bin, path, version)
    file = TensorFile(path) if path.suffix == ".safetensors" else None
    if file and file.metadata.get("format") == STATE:
        return _open_state(path, file)
    if _of_a_family(path, file):
        from llmnb.formats.families import open_family  # Part 5

        return open_family(path)
    return open_published(path)


def _of_a_family(path, file):
    """Whether a file's record, or the config.json beside it, says so."""
    from llmnb.formats.families import family_of  # Part 5

    described = path.parent / "config.json"
    if file and RECORD in file.metadata:
        return True
    return described.exists() and family_of(described) is not None


# %% [markdown]
# A model may have more rows in `wte` than its tokenizer has tokens: 50,304 for
# GPT-2's 50,257, which makes a product faster, or 50,258 where somebody has
# added a token to pad with. No text contains them, and none may be written.
# We have rows without a token already, those up to the next multiple of 128,
# which every layer leaves out. So whoever knows the number of tokens says it,
# and the rows beyond become padding like the others; if there are more than
# those, the tokenizer is probably another.


# %% tokens and padding tags=["export"] module="formats.checkpoint"
def without_padding(path, cfg, tokens, tokenizer=""):
    """The configuration of a model on disk for a tokenizer's tokens.

    path, tokens: as for open_model. cfg: what the file holds. Raises
    ValueError, which names the path and the tokenizer, when it must be
    another model's.
    """
    images = cfg.family == "gemma3_text"  # whose tokenizer has one for them
    if cfg.family != "gpt2" and tokens <= cfg.vocab_size + images:
        return cfg  # of these some have hundreds of rows to spare
    few = replace(cfg, vocab_size=tokens)
    if not tokens <= cfg.vocab_size <= few.padded_vocab_size:
        named = "the tokenizer" + (tokenizer and f" {tokenizer}")
        raise ValueError(
            f"{path} has {cfg.vocab_size} tokens, {named} has {tokens}"
        )
    return few


# %% [markdown]
# Through this door also comes every weight that is ever read, so here is the
# place to ask whether it is a number at all. A single NaN spreads to all
# logits, and what is computed from them can look like a result. A sum of
# squares is infinite or NaN if one of its terms is, and takes one pass; only
# when it is are the terms looked at.


# %% is it a number tags=["export"] module="formats.checkpoint"
def first_not_finite(arrays):
    """Which of some arrays holds an infinity or a NaN, and where; or None.

    arrays: a mapping from name to array. Returns a text.
    """
    for name, x in arrays.items():
        with np.errstate(all="ignore"):
            total = np.vdot(x, x)
        if not np.isfinite(total) and not np.isfinite(x).all():
            where = tuple(int(i) for i in np.argwhere(~np.isfinite(x))[0])
            return f"{name} is {x[where]} at {where}"
    return None


# %% open any model tags=["export"] module="formats.checkpoint"
class Opened(NamedTuple):
    """A model on disk whose files are checked, and whose weights are not read.

    path: of the model. cfg: its configuration, for a tokenizer's tokens. rows:
    the tokens that the file counts. fill: reads the weights into arrays.
    """

    path: object
    cfg: object
    rows: int
    fill: object

    def read(self, params):
        """Read the weights into arrays, in place.

        params: a mapping from llm.c's names to arrays in the shapes of
        parameter_shapes(cfg), float32 or float64, as `GPT2.params`. Raises
        KeyError, ValueError or TypeError when they do not fit the file, before
        any is written to, and ValueError when the file ends early after all,
        does not match its checksum, or when a weight is not finite.
        """
        ours = {}
        for name, shape in parameter_shapes(self.cfg).items():
            ours[name] = params[name]
            label = f"Opened.read: {name}"
            check_array(label, params[name], shape, written=True)
        self.fill(ours)
        if self.cfg.vocab_size != self.rows:
            ours["wte"][self.cfg.vocab_size :] = 0
        if wrong := first_not_finite(ours):
            raise ValueError(
                f"{self.path}: {wrong}, where weights must be finite"
            )


def open_model(path, tokens=None):
    """An `Opened` model, of any format that is known.

    path: llm.c's .bin (float32 or bfloat16), a .safetensors file or the
    index of several in Hugging Face's layout, or a folder that holds one
    of these as model.bin, model.safetensors or model.safetensors.index.json;
    or a state of a run, see llmnb.train.run. tokens: how many its tokenizer
    has; rows beyond, up to the next multiple of 128, are not counted as
    tokens. Raises ValueError, naming the file, when it is no GPT-2, or when
    its sizes, its shapes or its length do not fit, or the tokens; OSError
    when it cannot be read. Nothing is allocated before that is known.
    """
    cfg, fill = _open(path)
    rows = cfg.vocab_size
    if tokens is not None:
        cfg = without_padding(path, cfg, tokens)
    return Opened(path, cfg, rows, fill)


def read_config(path, tokens=None):
    """The configuration of a model on disk; path, tokens: as open_model's."""
    return open_model(path, tokens).cfg


# %% [markdown]
# To write there is one door too. The name decides. A model folder is written
# whole, with the description that fits.


# %% write any model tags=["export"] module="formats.checkpoint"
def write_model(path, cfg, params, precision="fp32"):
    """Write a model in the format that the name asks for.

    Hugging Face's layout for a name that ends in .safetensors, float32 only;
    else llm.c's .bin, with precision "fp32" version 3, with "bf16" version
    5, half as long, which holds GPT-2 only. params: a mapping from llm.c's
    names to arrays. Raises ValueError for a precision that the format lacks,
    and for the name of a file that open_model would take for another format.
    """
    if str(path).endswith((".json", ".gguf")):
        raise ValueError(
            f"{path}: a model's name must end in .safetensors or .bin"
        )
    if str(path).endswith(".safetensors"):
        choose("GPT2: precision", precision, ["fp32"])
        write_safetensors(path, cfg, params)
    elif cfg.family != "gpt2":
        raise ValueError(
            f"{path}: llm.c's format holds GPT-2 only; for a {cfg.family} "
            "let the name end in .safetensors"
        )
    else:
        version = {"fp32": 3, "bf16": 5}
        choose("GPT2: precision", precision, version)
        write_checkpoint(path, cfg, params, version[precision])


def write_folder(folder, cfg, params):
    """Write a model folder that `transformers` reads, of any family.

    The folder is made if it is not there; in it config.json and
    model.safetensors are replaced. params: as for write_safetensors. Raises
    ValueError when there is a config.json of another family, and for a setting
    that the family's has no name for.
    """
    folder, said = Path(folder), gpt2_description(cfg)
    path = folder / "config.json"
    if path.exists() and read_json(path).get("model_type") != cfg.family:
        raise ValueError(
            f"{path}: describes no {cfg.family}, and is left alone"
        )
    if cfg.family != "gpt2":
        from llmnb.formats.families import family_description  # Part 5

        said = family_description(cfg)
    make_folder(folder)
    write_safetensors(folder / "model.safetensors", cfg, params)
    write_whole(path, json.dumps(said, indent=1).encode() + b"\n")


# %% there and back
small = {n: np.zeros_like(x) for n, x in model.params.items()}
write_folder(folder / "elsewhere", CFG, model.params)
for name, precision in (("whole.bin", "fp32"), ("half.bin", "bf16")):
    write_model(folder / name, CFG, model.params, precision)
want = model.params["fcw"]
for name, tol in (("whole.bin", 0), ("elsewhere", 0), ("half.bin", 2**-8)):
    open_model(folder / name).read(small)
    error = np.abs(small["fcw"] - want).max() / np.abs(want).max()
    verdict(name, error <= tol, f"within {tol}")

# %% a folder that leads elsewhere
index = {"weight_map": {"wte.weight": "../model.safetensors"}}
(folder / "index.json").write_text(json.dumps(index))
try:
    read_config(folder / "index.json")
except ValueError as error:
    print(str(error).replace(f"{folder}{os.sep}", ""))

# %% [markdown]
# ## The square matrix
#
# A forgotten transpose shows in the shape of three of a block's four
# matrices: `qkvw` (3C, C), `fcw` (4C, C) and `fcprojw` (C, 4C). The fourth,
# `attprojw`, is square. No check of shapes can see which way round it is, and
# a model with it turned still writes words. So we turn it on purpose:

# %% a square matrix, the wrong way round
tensors = {name: file[name] for name in file.names}
for layer in range(CFG.num_layers):
    name = f"h.{layer}.attn.c_proj.weight"
    tensors[name] = tensors[name].T
write_tensors(folder / "turned.safetensors", tensors, file.metadata)
for name, same in (("right", True), ("turned", False)):
    other = GPT2.from_checkpoint(folder / f"{name}.safetensors", 4, 64)
    equal = other.forward(*batch) == loss
    found = "the same loss" if equal else "read without complaint, another"
    verdict(name, equal is same, found)

# %% [markdown]
# Only numbers can tell. To trust a reader you need a batch, and what a trusted
# program made of it. That is what [chapter 4.5](05_acceptance.ipynb) is about.

# %% [markdown]
# ## Take away
#
# - Shapes catch three of four forgotten transposes. The square matrix needs
#   numbers.
# - Shapes tell all of a GPT-2's sizes but the number of heads.
# - A name that stands in a file is not a path until it has been looked at.
# - Every weight that is read passes one door, where it is asked to be a
#   number.
#
# ## Design note
#
# We could have stored our matrices as Hugging Face does, and saved the
# transposing. But then every layer of the book would compute $x A$ where the
# papers and llm.c have $x W^\top$, to please a file. A layout belongs at the
# border of a program; inside, one convention is enough, and it should be that
# of the arithmetic.
#
# ## Exercises
#
# **1** (★★). A folder has `config.json` with `"n_head": 3`, and the tensors of
# a model with $C = 64$. What is said, and by which line? What if it says 8,
# where 4 is right?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# `GPT2Config` refuses 3, which does not divide 64. That 8 is wrong nothing can
# tell from the tensors: the model is read and computes another attention. Our own
# files name the heads in their metadata, which wins.
# :::

# %% exercise 1, checked tags=["hide-cell"]
tensors = {n: x.copy() for n, x in tensors.items()}
heads = folder / "heads"
heads.mkdir()
write_tensors(heads / "model.safetensors", tensors)
for n_head in (3, 8):
    (heads / "config.json").write_text(json.dumps({"n_head": n_head}))
    try:
        print(read_config(heads).num_heads, "heads, and nothing is said")
    except ValueError as error:
        print(str(error).replace(f"{folder}{os.sep}", ""))

# %% [markdown]
# ## Further reading
#
# - [transformers](https://github.com/huggingface/transformers):
#   `models/gpt2/modeling_gpt2.py`, whose names and shapes these are.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("4.4")
