# Written by `make export` from notebooks/4_practice/14_folders.py: edit that file.

"""The model that a run starts with, new or from a checkpoint."""

__all__ = ["checked_size", "empty_model", "new_model"]


# imports of start
import platform

import numpy as np

from llmnb.arena import footprint
from llmnb.checks import check_room
from llmnb.formats.checkpoint import read_config
from llmnb.model.gpt2 import GPT2
from llmnb.model.layout import gpt2_layout
from llmnb.train.folder import weights_path
from llmnb.train.group import ALONE, waiting


# the model and its batches
def new_model(config, vocab_size, group=ALONE):
    """The GPT2 that a run starts with, for a vocabulary of this size.

    Freshly initialised, or with the weights of `config.init`. Raises
    ValueError when these are for another vocabulary, and as `checked_size`
    and GPT2.from_checkpoint do. group: the Group that trains it, of which
    each process calls this.

    Derived in chapter 4.14.
    """
    if not config.init:
        cfg = config.model(vocab_size)
        return empty_model(config, cfg, config.seed, group)
    path = weights_path(config.init)
    how = checked_size(config, read_config(path, vocab_size), group)
    made = _model_class(config, group)
    return made.from_checkpoint(path, **how, tokens=vocab_size)


def empty_model(config, cfg, seed=None, group=ALONE):
    """A GPT2 of a run, with first weights; without a seed, with none.

    Derived in chapter 4.14.
    """
    how = checked_size(config, cfg, group)
    return _model_class(config, group)(cfg, **how, seed=seed)


def _model_class(config, group):
    if config.in_backward:
        from llmnb.model.inbackward import InBackward  # Part 5

        return InBackward
    if group.on_gpus:
        from llmnb.train.gpus import OnGPUs  # Part 6

        return OnGPUs.of(group)
    if group.size == 1:
        return GPT2
    from llmnb.train.sharded import Sharded  # Part 6

    return Sharded.of(group)


def checked_size(config, cfg, group=ALONE):
    """A run's batches, backend and precision, if its model fits in memory.

    cfg: the GPT2Config. All of the model counts here, as training writes to
    all of it, with the gradients that wait for others and without what
    other processes of the group hold; the processes on one machine count
    together. A GPU's memory answers for itself. Raises MemoryError.

    Derived in chapter 4.14.
    """
    here, size = platform.node(), 0
    if config.backend != "cuda":
        dtype = np.float64 if config.precision == "fp64" else np.float32
        layout = gpt2_layout(cfg, config.batch_size, config.seq_len, dtype)
        if config.in_backward:
            from llmnb.model.inbackward import in_backward_layout  # Part 5

            layout = in_backward_layout(cfg, layout)
        sizes = footprint(layout)
        wait = waiting(group.share(config.micro_batches)) * sizes["grads"]
        others = (sizes["m"] + sizes["v"]) * (1 - 1 / group.size)
        size = int(sum(sizes.values()) + wait - others)
    everyone = group.gather([here, size])
    check_room(sum(n for machine, n in everyone if machine == here))
    return config.some("batch_size", "seq_len", "backend", "precision")
