"""vocab.json of an encoding, for tests."""

from llmnb.formats.vocabulary import _letters


def vocab_of(encoding):
    """vocab.json of an encoding, by the letters of GPT-2's own table."""
    letters = {byte: letter for letter, byte in _letters().items()}
    tokens = [
        encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)
    ]
    return {"".join(letters[b] for b in x): i for i, x in enumerate(tokens)}
