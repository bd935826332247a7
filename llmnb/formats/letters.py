# Written by `make export` from notebooks/4_practice/06_hub.py: edit that file.

"""The letters in which GPT-2's vocabulary writes bytes."""

__all__ = ["LETTERS", "byte_letters"]


# GPT-2's letters
def byte_letters():
    """The byte that each letter of vocab.json stands for.

    Bytes that print stand for themselves, the others in order for the
    letters from number 256.

    Derived in chapter 4.6.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [x for x in range(256) if x not in plain]
    letters = {chr(x): x for x in plain}
    return letters | {chr(256 + i): x for i, x in enumerate(others)}


LETTERS = byte_letters()
