# Written by `make export` from notebooks/4_practice/04_published.py: edit that file.

"""Models on disk, in every format that is known."""

__all__ = [
    "Opened", "STATE", "find_model", "first_not_finite", "open_model",
    "read_config", "state_record", "without_padding", "write_folder",
    "write_model",
]


# imports of the door
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


# a training state
STATE = "llmnb training state 1"


def state_record(file):
    """The record of a training state: a dict.

    file: its TensorFile. Raises ValueError or KeyError when it is no state.
    A bit that is not what it was is found by the sum of any array.

    Derived in chapter 4.4.
    """
    if file.metadata.get("format") != STATE:
        raise ValueError(f"its format must be {STATE!r}")
    return json.loads(file.metadata["record"])


# its weights
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


# which file it is
# endings of models that we do not read, which is to be said
_OTHERS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".npz")


def find_model(path):
    """The file to read: the path itself, or what a folder holds.

    Derived in chapter 4.4.
    """
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


# which reader it is
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


# tokens and padding
def without_padding(path, cfg, tokens, tokenizer=""):
    """The configuration of a model on disk for a tokenizer's tokens.

    path, tokens: as for open_model. cfg: what the file holds. Raises
    ValueError, which names the path and the tokenizer, when it must be
    another model's.

    Derived in chapter 4.4.
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


# is it a number
def first_not_finite(arrays):
    """Which of some arrays holds an infinity or a NaN, and where; or None.

    arrays: a mapping from name to array. Returns a text.

    Derived in chapter 4.4.
    """
    for name, x in arrays.items():
        with np.errstate(all="ignore"):
            total = np.vdot(x, x)
        if not np.isfinite(total) and not np.isfinite(x).all():
            where = tuple(int(i) for i in np.argwhere(~np.isfinite(x))[0])
            return f"{name} is {x[where]} at {where}"
    return None


# open any model
class Opened(NamedTuple):
    """A model on disk whose files are checked, and whose weights are not read.

    path: of the model. cfg: its configuration, for a tokenizer's tokens. rows:
    the tokens that the file counts. fill: reads the weights into arrays.

    Derived in chapter 4.4.
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

    Derived in chapter 4.4.
    """
    cfg, fill = _open(path)
    rows = cfg.vocab_size
    if tokens is not None:
        cfg = without_padding(path, cfg, tokens)
    return Opened(path, cfg, rows, fill)


def read_config(path, tokens=None):
    """The configuration of a model on disk; path, tokens: as open_model's.

    Derived in chapter 4.4.
    """
    return open_model(path, tokens).cfg


# write any model
def write_model(path, cfg, params, precision="fp32"):
    """Write a model in the format that the name asks for.

    Hugging Face's layout for a name that ends in .safetensors, float32 only;
    else llm.c's .bin, with precision "fp32" version 3, with "bf16" version
    5, half as long, which holds GPT-2 only. params: a mapping from llm.c's
    names to arrays. Raises ValueError for a precision that the format lacks,
    and for the name of a file that open_model would take for another format.

    Derived in chapter 4.4.
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

    Derived in chapter 4.4.
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
