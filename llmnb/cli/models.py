# Written by `make export` from notebooks/4_practice/25_use.py: edit that file.

"""Which model a command means, and which tokenizer goes with it."""

__all__ = ["model_of", "with_tokenizer"]


# imports of the models
from pathlib import Path

from llmnb.cli.options import remark
from llmnb.formats.checkpoint import read_config, without_padding
from llmnb.formats.hub import SOURCES
from llmnb.formats.vocabulary import open_encoding, tokenizer_of
from llmnb.train.newest import newest_run
from llmnb.train.folder import weights_path


# which model
def model_of(args):
    """The model that was named, or the newest run's; and its weights.

    Derived in chapter 4.25.
    """
    named = Path(args.model) if args.model else newest_run()
    if not named.exists():
        hint = f"; `llmnb fetch {named}` prints the folder of that model"
        hint = hint if args.model in SOURCES else ""
        raise FileNotFoundError(f"there is no run {named}{hint}")
    return named, weights_path(named)


# which tokenizer
def with_tokenizer(path, args, aloud=True):
    """A model's configuration, for the tokenizer asked for or its own.

    aloud: whether to say which of its tokens are left out, if any.

    Derived in chapter 4.25.
    """
    cfg = read_config(path)
    name = args.tokenizer or tokenizer_of(path, cfg.vocab_size)
    encoding = open_encoding(name)
    few = without_padding(path, cfg, encoding.n_vocab, name)
    if aloud and few != cfg:
        remark(
            f"{path} has {cfg.vocab_size} tokens, the tokenizer {name} knows "
            f"{encoding.n_vocab}: the others are left out"
        )
    return few, encoding
