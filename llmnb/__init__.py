# Written by `make export` from notebooks/22_colophon.py: edit that file.

"""Build the book from itself.

The exporter turns marked cells into the package; the builder runs the
notebooks and keeps what they print.
"""

__all__ = []


# imports of the package
import importlib
import importlib.util


# the package's front door
__version__ = "0.1.0"
_HOME = {"GPT2": "llmnb.gpt2", "GPT2Config": "llmnb.config"}


def __getattr__(name):
    """Import a module, GPT2 or GPT2Config when it is first asked for."""
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if importlib.util.find_spec(f"llmnb.{name}"):
        return importlib.import_module(f"llmnb.{name}")
    raise AttributeError(f"llmnb has no {name!r}")
