# Written by `make export` from notebooks/4_practice/23_commands.py: edit that file.

"""`llmnb info`: versions, threads, and the size of a model."""

__all__ = ["OPTIONS", "run"]


# llmnb info
import warnings
from dataclasses import fields
from importlib.metadata import version

import numba

from llmnb.arena import footprint
from llmnb.backend import BACKENDS, PRECISIONS, backend_named, choose
from llmnb.cli.options import fields_of, say, some_of
from llmnb.cuda.model import gpu
from llmnb.model.layout import gpt2_layout
from llmnb.model.tensors import flops_per_token, parameter_count
from llmnb.timing import machine
from llmnb.train.options import DataOptions, ModelOptions, TrainConfig

OPTIONS = {"": some_of(DataOptions, "vocab_size") + fields(ModelOptions)}


def run(args):
    """Print versions, and what a configuration takes.

    That is parameters, bytes, and operations a token.

    Derived in chapter 4.23.
    """
    shape = fields_of(vars(args), ModelOptions)
    config = TrainConfig(**shape, vocab_size=args.vocab_size)
    cfg = config.model(config.vocab_size)
    sizes = footprint(_layout(config, cfg))
    names = "llmnb", "numpy", "numba", "tiktoken"
    say("versions", ", ".join(f"{x} {version(x)}" for x in names))
    say("machine", machine())
    say("threads", numba.get_num_threads())
    say("gpu", gpu())
    say("parameters", f"{parameter_count(cfg):,}")
    shown = ", ".join(f"{k} {v / 1e6:.1f}" for k, v in sizes.items())
    say("memory", f"{sum(sizes.values()) / 1e6:.1f} MB ({shown})")
    flops = flops_per_token(cfg, config.seq_len)
    say("work", f"{flops / 1e6:.1f} MFLOP to train on a token")


def _layout(config, cfg):
    """The memory in which a model trains, with its backend's own."""
    choose("backend", config.backend, BACKENDS)
    choose("precision", config.precision, PRECISIONS)
    shape = cfg, config.batch_size, config.seq_len
    with warnings.catch_warnings(action="ignore"):  # of what is not here
        backend = backend_named(config.backend, config.precision)
    return gpt2_layout(*shape, backend.dtype) | backend.groups(*shape)
