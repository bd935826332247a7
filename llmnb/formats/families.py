# Written by `make export` from notebooks/5_modern/06_files.py: edit that file.

"""Published models of Llama's kind: folders read and written."""

__all__ = [
    "FIXED_OF_FAMILIES", "described_config", "family_description",
    "family_of", "open_family",
]


# imports of the families
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


# settings we compute with
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


# a description, read
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

    Derived in chapter 5.6.
    """
    kind = read_json(path).get("model_type")
    return kind if kind in _KINDS else None


def described_config(path):
    """The configuration that a Hugging Face config.json describes.

    path: of the file; either style, with rope_theta and rope_scaling or with
    rope_parameters and layer_types. Raises ValueError, naming the file and
    the setting, where a model of that kind would compute what ours does not.

    Derived in chapter 5.6.
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


# rotary settings of both styles
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


# windows of both styles
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


# a description, written
def family_description(cfg):
    """The config.json of a configuration, a dict, as `transformers` reads it.

    In the older style, which newer versions read too, with layer_types.
    Raises ValueError for a setting that the family's readers do not know.

    Derived in chapter 5.6.
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


# check all tensors
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


# open a folder
def open_family(path):
    """A model's configuration, and the function that fills its params.

    path: a .safetensors file, or the index of several, with a config.json
    beside it or our own record inside. Raises ValueError, naming the file
    and what is wrong, before anything is read.

    Derived in chapter 5.6.
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
