"""An encoding of 70,000 tokens, more than two bytes can number."""

from functools import cache
from itertools import islice, product

from llmnb.text.bpe import from_tokens

TEXT = "abcdefghijklmnop " * 400


@cache
def large_encoding():
    """Bytes, all their pairs, then triples of letters, over 65,536."""
    bytes_ = [bytes([x]) for x in range(256)]
    pairs = [b + a for a, b in product(bytes_, bytes_)]
    letters = [bytes([x]) for x in b"abcdefghijklmnopq"]
    triples = map(b"".join, product(letters, repeat=3))
    return from_tokens("large", [*bytes_, *pairs, *islice(triples, 4207)])
