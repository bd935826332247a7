# Written by `make export` from notebooks/4_practice/18_finetuning.py: edit that file.

"""A run that starts from the weights of a trained model."""

__all__ = ["starting_from"]


# imports
from dataclasses import replace
from pathlib import Path

from llmnb.formats.checkpoint import read_config
from llmnb.formats.vocabulary import tokenizer_beside, tokenizer_of
from llmnb.train.folder import weights_path
from llmnb.train.options import SHAPE, TrainConfig, check_range, depth_shape


# a run from a checkpoint
def starting_from(init, **given):
    """The TrainConfig of a run that starts from a checkpoint's weights.

    init: the path of a run's folder, or of what GPT2.from_checkpoint reads.
    given: other fields. Unless given, the learning rate is 1e-4, the
    tokenizer that of `tokenizer_of`, and seq_len no more than the checkpoint
    allows. Raises OSError or ValueError when it cannot be read,
    has another shape than is given, or no tokenizer is certain.

    Derived in chapter 4.18.
    """
    cfg, usual = read_config(weights_path(init)), {"learning_rate": 1e-4}
    usual["seq_len"] = min(TrainConfig.seq_len, cfg.max_seq_len)
    shape = {name: getattr(cfg, name) for name in SHAPE} | _family(cfg)
    asked = dict(given)
    if asked.get("depth"):
        asked |= zip(SHAPE, depth_shape(asked["depth"]), strict=True)
    for name, value in shape.items():
        if asked.get(name) not in (None, value):
            raise ValueError(
                f"{init} has {name} {value}, not {asked[name]}: leave out "
                "the shape, or do not start from it"
            )
    config = TrainConfig(**{**usual, **given, **shape, "init": str(init)})
    check_range("seq_len", config.seq_len, 1, cfg.max_seq_len + 1)
    brought = config.shards and tokenizer_beside(Path(config.shards))
    if "tokenizer" in given or brought:
        return config
    return replace(config, tokenizer=tokenizer_of(init, cfg.vocab_size))


def _family(cfg):
    """The options that say which architecture it is, and how it attends."""
    if cfg.family == "gpt2":
        return {"arch": cfg.family, "num_kv_heads": 0, "window": 0}
    heads, window = cfg.num_kv_heads, cfg.window or 0
    return {"arch": cfg.family, "num_kv_heads": heads, "window": window}
