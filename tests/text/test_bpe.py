"""Byte-pair encoding; chapter 1.2 compares it with its definition."""

import random
import time

import pytest
from hypothesis import given, settings
from spelling import STORY, TEXT, tokens_of

from llmnb.text import bpe

QUICK = settings(max_examples=25, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def story():
    return bpe.train(STORY, 330)


def test_vocabulary_counts_bytes_merges_and_the_special_token(story):
    assert (story.n_vocab, story.eot_token) == (330, 329)
    assert story.special_tokens_set == {"<|endoftext|>"}
    assert tokens_of(story)[:256] == [bytes([i]) for i in range(256)]
    assert len(set(tokens_of(story))) == 330
    # in a text it is ordinary text
    ids = story.encode_ordinary("a<|endoftext|>b")
    assert story.eot_token not in ids
    assert story.decode(ids) == "a<|endoftext|>b"


def test_documents_train_as_one_text_where_words_do_not_cross():
    lines = STORY.splitlines(keepends=True)
    a, b = bpe.train(iter(lines), 300), bpe.train(STORY, 300)
    assert tokens_of(a) == tokens_of(b)


@QUICK
@given(TEXT)
def test_byte_encoding_is_utf8(text):
    encoding = bpe.byte()
    assert (encoding.n_vocab, encoding.eot_token) == (257, 256)
    assert bytes(encoding.encode_ordinary(text)) == text.encode()


@pytest.mark.parametrize("size", [0, 256, 65537, 258.5, "258"])
def test_vocabulary_size_out_of_range(size):
    with pytest.raises(ValueError, match=rf"\[257, 65536\], got {size!r}"):
        bpe.train("text", size)


@pytest.mark.parametrize("text", ["", "abc", "aaaa"])
def test_text_too_small_for_the_vocabulary(text):
    most = 259 if text else 257
    assert bpe.train(text, most).n_vocab == most
    with pytest.raises(ValueError, match=f"at most {most}, got {most + 1}"):
        bpe.train(text, most + 1)


@pytest.mark.parametrize("text, kind", [
    (b"raw", "bytes"), ([b"raw"], "bytes"), ([1], "int"),
    (["good", None], "NoneType"),
])  # fmt: skip
def test_text_of_another_type(text, kind):
    with pytest.raises(TypeError, match=f"text must be str, got {kind}"):
        bpe.train(text, 257)


def test_one_long_word_is_not_quadratic():
    rng = random.Random(3)
    word = "".join(rng.choices("abcdefgh", k=100_000))
    start = time.process_time()
    bpe.train(word, 2000)
    assert time.process_time() - start < 10
