# Written by `make export` from notebooks/4_practice/23_commands.py: edit that file.

"""`llmnb fetch`: download a published model."""

__all__ = [
    "DESCRIPTION",
    "add",
    "run",
]


# llmnb fetch
from llmnb.formats.hub import SOURCES, fetch

DESCRIPTION = (
    "Download a model, or llm.c's starter pack, with huggingface_hub, and "
    "print its folder."
)


def add(parser):
    """Declare the options.

    Derived in chapter 4.23.
    """
    text = f"one of {', '.join(SOURCES)}"
    parser.add_argument("name", metavar="NAME", help=text)


def run(args):
    """Download, and print the folder.

    Derived in chapter 4.23.
    """
    print(fetch(args.name))
