# Written by `make export` from notebooks/4_practice/23_commands.py: edit that file.

"""`llmnb info`: versions, threads, and the size of a model."""

__all__ = ["OPTIONS", "run"]


# llmnb info
from dataclasses import fields
from importlib.metadata import version

import numba

from llmnb.cli.options import say, shape_config, some_of
from llmnb.model.tensors import flops_per_token, parameter_count
from llmnb.cuda.model import gpu
from llmnb.arena import footprint
from llmnb.model.layout import gpt2_layout
from llmnb.timing import machine
from llmnb.train.options import DataOptions, ModelOptions

OPTIONS = {"": some_of(DataOptions, "vocab_size") + fields(ModelOptions)}


def run(args):
    """Print versions, and what a configuration takes.

    That is parameters, bytes, and operations a token.

    Derived in chapter 4.23.
    """
    config = shape_config(args)
    cfg = config.model(config.vocab_size)
    names = "llmnb", "numpy", "numba", "tiktoken"
    say("versions", ", ".join(f"{x} {version(x)}" for x in names))
    say("machine", machine())
    say("threads", numba.get_num_threads())
    say("gpu", gpu())
    say("parameters", f"{parameter_count(cfg):,}")
    sizes = footprint(gpt2_layout(cfg, config.batch_size, config.seq_len))
    shown = ", ".join(f"{k} {v / 1e6:.1f}" for k, v in sizes.items())
    say("memory", f"{sum(sizes.values()) / 1e6:.1f} MB ({shown})")
    flops = flops_per_token(cfg, config.seq_len)
    say("work", f"{flops / 1e6:.1f} MFLOP to train on a token")
