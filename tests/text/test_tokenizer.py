"""Tokenizers in files, GPT-2's own, and any text encoded."""

import base64
import os
import time

import pytest
import regex
import tiktoken
import tiktoken.load
from fuzz import refused
from hypothesis import given, settings
from spelling import STORY, TEXT, tokens_of

from llmnb.text import bpe, tokenizer

# files


def single_bytes(special=(), pattern="."):
    """An encoding of the single bytes; special: text to number."""
    return tiktoken.Encoding(
        "single", pat_str=pattern, special_tokens=dict(special),
        mergeable_ranks={bytes([i]): i for i in range(256)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def story():
    return tokenizer.train(STORY, 330)


def test_file_is_tiktokens(story, tmp_path):
    path = tmp_path / "story.tiktoken"
    tokenizer.save(story, path)
    ranks = tiktoken.load.load_tiktoken_bpe(str(path))
    tokens = tokens_of(story)[:-1]
    assert ranks == {token: i for i, token in enumerate(tokens)}
    assert path.read_bytes().startswith(b"AA== 0\nAQ== 1\n")
    assert tokens_of(tokenizer.load(path)) == tokens_of(story)
    assert os.listdir(tmp_path) == ["story.tiktoken"]


def test_save_replaces_and_leaves_the_old_file_when_it_fails(story, tmp_path):
    path = tmp_path / "a.tiktoken"
    tokenizer.save(story, path)
    before = path.read_bytes()
    other = single_bytes(special={"<|stop|>": 256})
    with pytest.raises(ValueError, match=r"the last rank, got \['<|stop|>'\]"):
        tokenizer.save(other, path)
    assert path.read_bytes() == before
    tokenizer.save(tokenizer.byte(), path)
    assert tokenizer.load(path).n_vocab == 257


def line(token, rank):
    return f"{base64.b64encode(token).decode()} {rank}"


BYTES = [line(bytes([i]), i) for i in range(256)]


@pytest.mark.parametrize("lines, message", [
    ([*BYTES, "?? 256"], r":257: the token must be base64, got '\?\?'"),
    ([*BYTES, "é= 256"], ":257: the token must be base64"),
    ([*BYTES, "YWI="], ":257: a line must be a token and its rank"),
    ([*BYTES, "YWI= 256 1"], ":257: a line must be a token and its rank"),
    *(
        ([*BYTES, f"YWI= {x}"], ":257: the rank must be a whole number")
        for x in ("x", "-1", "1.0", "9" * 5000, "1" * 10, "\u0663")
    ),
    ([*BYTES, line(b"ab", 7)], ":257: rank 7 comes twice"),
    ([*BYTES, line(b"a", 256)], ":257: b'a' comes twice"),
    ([*BYTES, line(b"ab", 257)], "no token of rank 256"),
    (BYTES[:65] + BYTES[66:], "no token for the byte 65"),
    ([], "no token for the byte 0"),
])  # fmt: skip
def test_malformed_file(tmp_path, lines, message):
    path = tmp_path / "bad.tiktoken"
    path.write_text("\n".join(lines), "utf-8")
    refused(message, tokenizer.load, path)


def test_blank_lines_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "a.tiktoken"
    path.write_bytes("\r\n".join([*BYTES, "", line(b"ab", 256), ""]).encode())
    assert tokenizer.load(path).encode_ordinary("ab") == [256]


# any text


@pytest.fixture(scope="module")
def blanks():
    """A vocabulary that merges blanks of several kinds, also mixed."""
    text = "a    b\n\n\nc\n    d\u3000\u3000e \n \n f\t\t\tg        h" * 9
    return tokenizer.train(text, 273)


def encoded(encoding, text, **options):
    return tokenizer.encode_text(encoding, text, **options).tolist()


def test_what_counts_as_a_blank_is_what_tiktoken_counts():
    one = single_bytes(pattern=r"\s")
    every = map(chr, [*range(0xD800), *range(0xE000, 0x110000)])
    assert {x for x in every if one.encode_ordinary(x)} == {*tokenizer.SPACES}


@pytest.mark.parametrize("run", [" ", "\n", "\u00a0", "\u3000", " \n\t"])
@pytest.mark.parametrize("name", ["blanks", "gpt2"])
def test_a_long_run_keeps_its_tokens(request, name, run):
    encoding, run = request.getfixturevalue(name), run * (80_000 // len(run))
    for text in (run, f"{run}a", f"a.{run}'s", f"a{run}b {run}1{run}"):
        whole = encoding.encode_ordinary(text)
        assert len(list(tokenizer._long_words(text))) == text.count(run)
        assert encoded(encoding, text) == whole


@pytest.mark.parametrize("char", [*" \n\u3000a中1^🙂\x1c"])
@pytest.mark.parametrize("name", ["blanks", "gpt2"])
def test_a_million_of_any_character(request, name, char):
    encoding, text = request.getfixturevalue(name), char * 1_000_000 + "a."
    assert encoding.decode(encoded(encoding, text)) == text


def test_a_word_of_five_million_characters_is_not_quadratic(blanks):
    start = time.process_time()
    assert len(encoded(blanks, "a" * 5_000_000)) == 5_000_000
    long = encoded(blanks, " " * 2_000_000)
    assert time.process_time() - start < 20
    assert blanks.decode(long) == " " * 2_000_000


def test_the_special_token_is_taken_when_asked_for(blanks):
    eot, text = blanks.eot_token, "a<|endoftext|>  b<|endoftext|>"
    got = encoded(blanks, text, endoftext=True)
    want = blanks.encode(text, allowed_special={"<|endoftext|>"})
    assert got == want and got.count(eot) == 2
    assert encoded(blanks, text) == blanks.encode_ordinary(text)
    long = f"{' ' * 200_000}<|endoftext|>a"
    want = blanks.encode(long, allowed_special={"<|endoftext|>"})
    assert encoded(blanks, long, endoftext=True) == want
    assert encoded(blanks, "<|endoftext|>", endoftext=True) == [eot]
    assert encoded(blanks, "", endoftext=True) == []
    # half a character becomes a replacement
    assert encoded(blanks, "a\ud800") == blanks.encode_ordinary("a\ufffd")


# GPT-2's


def test_gpt2(gpt2):
    assert (gpt2.n_vocab, gpt2.eot_token) == (50257, 50256)
    assert gpt2.encode_ordinary("Hello world") == [15496, 995]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(TEXT)
def test_gpt2_cuts_words_as_we_do(gpt2, text):
    words = regex.findall(bpe.WORDS, text)
    assert "".join(words) == text
    apart = [i for word in words for i in gpt2.encode_ordinary(word)]
    assert gpt2.encode_ordinary(text) == apart


def test_gpt2_without_a_connection(monkeypatch):
    def refuse(name):
        raise OSError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(ConnectionError, match="in TIKTOKEN_CACHE_DIR$"):
        tokenizer.gpt2()
