# Written by `make export` from notebooks/4_practice/14_folders.py: edit that file.

"""The model that a run starts with, new or from a checkpoint."""

__all__ = ["checked_size", "empty_model", "new_model"]


# imports of start
import numpy as np

from llmnb.arena import footprint
from llmnb.checks import check_room
from llmnb.formats.checkpoint import read_config
from llmnb.model.gpt2 import GPT2
from llmnb.model.layout import gpt2_layout
from llmnb.train.folder import weights_path


# the model and its batches
def new_model(config, vocab_size):
    """The GPT2 that a run starts with, for a vocabulary of this size.

    Freshly initialised, or with the weights of `config.init`. Raises
    ValueError when these are for another vocabulary, and as `checked_size`
    and GPT2.from_checkpoint do.

    Derived in chapter 4.14.
    """
    if not config.init:
        return empty_model(config, config.model(vocab_size), config.seed)
    path = weights_path(config.init)
    how = checked_size(config, read_config(path, vocab_size))
    return GPT2.from_checkpoint(path, **how, tokens=vocab_size)


def empty_model(config, cfg, seed=None):
    """A GPT2 of a run, with first weights; without a seed, with none.

    Derived in chapter 4.14.
    """
    return GPT2(cfg, **checked_size(config, cfg), seed=seed)


def checked_size(config, cfg):
    """A run's batches, backend and precision, if its model fits in memory.

    cfg: the GPT2Config. All of the model counts here, as training writes to
    all of it; a GPU's memory answers for itself. Raises MemoryError.

    Derived in chapter 4.14.
    """
    if config.backend != "cuda":
        dtype = np.float64 if config.precision == "fp64" else np.float32
        layout = gpt2_layout(cfg, config.batch_size, config.seq_len, dtype)
        check_room(sum(footprint(layout).values()))
    return config.some("batch_size", "seq_len", "backend", "precision")
