"""Tokenizer files of published models, written for tests."""

import json

from llmnb.formats.vocabulary import _letters


def vocab_of(encoding):
    """vocab.json of an encoding, by the letters of GPT-2's own table."""
    letters = {byte: letter for letter, byte in _letters().items()}
    tokens = [
        encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)
    ]
    return {"".join(letters[b] for b in x): i for i, x in enumerate(tokens)}


def own_files(folder, encoding, before=(), behind=(), merges=True):
    """vocab.json and merges.txt: special tokens first, or EOT alone last."""
    *spelt, eot = vocab_of(encoding)
    tokens = [*before, *spelt] if before else [*spelt, eot]
    vocab = {x: i for i, x in enumerate([*tokens, *behind])}
    (folder / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    lines = ["#version: 0.2"] + [" ".join(x) for x in merges_of(encoding)]
    if merges:
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    return folder / "vocab.json"


def merges_of(encoding):
    """The pairs, in letters, that were joined to the tokens, in order."""
    spelt = [x for x in vocab_of(encoding) if x != "<|endoftext|>"]
    rank, pairs = {}, []
    for number, token in enumerate(spelt):
        parts = list(token)
        while len(parts) > 2:
            found = [rank.get(a + b, 1 << 30) for a, b in
                     zip(parts, parts[1:], strict=False)]  # fmt: skip
            i = found.index(min(found))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        rank[token] = number
        if len(parts) == 2:
            pairs.append(parts)
    return pairs
