# Written by `make export` from notebooks/4_practice/06_hub.py: edit that file.

"""A tokenizer.json as the library tokenizers reads it."""

__all__ = ["library_json"]


# imports of the library's reader
import json

from llmnb.files import package, read_small, what_is


# a tokenizer.json, read
def library_json(path, most):
    """The library's tokenizer of a tokenizer.json, and what that holds.

    most: the file's bytes, at most. Raises as `read_tokenizer_json`.

    Derived in chapter 4.6.
    """
    library = package("tokenizers", "tokenizers", path)
    raw = read_small(path, most)
    try:
        theirs = library.Tokenizer.from_str(raw.decode("utf-8"))
        said = json.loads(raw)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust's is no Exception
        what = what_is(path) or f"not a tokenizer ({error!s:.200})"
        raise ValueError(f"{path}: {what}") from None
    theirs.no_truncation()
    theirs.no_padding()
    return theirs, said
