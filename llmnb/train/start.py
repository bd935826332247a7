# Written by `make export` from notebooks/4_practice/14_folders.py: edit that file.

"""The model that a run starts with, new or from a checkpoint."""

__all__ = [
    "check_memory",
    "new_model",
]


# imports of start
import numpy as np

from llmnb.arena import footprint
from llmnb.checks import check_room
from llmnb.formats.checkpoint import read_config
from llmnb.model.layout import gpt2_layout
from llmnb.train.folder import weights_path


# the model and its batches
def new_model(config, vocab_size):
    """The GPT2 that a run starts with, for a vocabulary of this size.

    Freshly initialised, or with the weights of `config.init`. Raises
    ValueError when these are for another vocabulary, and as `check_memory`
    and GPT2.from_checkpoint do.

    Derived in chapter 4.14.
    """
    from llmnb.model.gpt2 import GPT2

    names = "batch_size", "seq_len", "backend", "precision"
    how = {name: getattr(config, name) for name in names}
    if not config.init:
        cfg = config.model(vocab_size)
        check_memory(config, cfg)
        return GPT2(cfg, **how, seed=config.seed)
    path = weights_path(config.init)
    cfg = read_config(path)
    known, padded = cfg.vocab_size, -(-vocab_size // 128) * 128
    if not vocab_size <= known <= padded:
        raise ValueError(
            f"{path} knows {known} tokens, the text is made of {vocab_size}: "
            "choose the tokenizer that it was trained with"
        )
    check_memory(config, cfg)
    return GPT2.from_checkpoint(path, **how, tokens=vocab_size)


def check_memory(config, cfg):
    """Raise MemoryError when a run's model is more than fits in memory.

    cfg: the GPT2Config. All of the model counts here, as training writes to
    all of it; a GPU's memory answers for itself.

    Derived in chapter 4.14.
    """
    if config.backend != "cuda":
        dtype = np.float64 if config.precision == "fp64" else np.float32
        layout = gpt2_layout(cfg, config.batch_size, config.seq_len, dtype)
        check_room(sum(footprint(layout).values()))
