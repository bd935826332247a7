"""Tokenizers of other models, which the tests train through libraries."""

import json
import sys

import numpy as np
import pytest
from fuzz import answer, mangled, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from llamas import begin_with, byte_level, sentencepiece, write_gguf

from llmnb.formats.foreign import (
    foreign_gguf,
    foreign_json,
    foreign_sentencepiece,
    open_foreign,
)
from llmnb.formats.vocabulary import open_encoding

pytest.importorskip("tokenizers")

TEXT = (
    "The lowest of the newer towers fell in 1997; the newest, lower than "
    "most, has 12,345 windows. It isn't naïve, it's 東京's own ½.\n\n"
    "def f(x):\n    return x + 1  # the lower\n"
)
PROBE = (
    "It's 1,234.5 naïve  cafés:\n\n\tdef f(x):\r\n    return 'x'  # ok\n"
    "東京 ½ ① é \u00a0 \U0001f600 \x00\x7f I'LL we've don't__ end  "
)
MARKUP = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def trained(cut="smollm", size=330):
    """A byte-level BPE, trained on a few lines."""
    return byte_level(TEXT, MARKUP, size, cut == "smollm")


def folder_of(theirs, folder):
    """A tokenizer.json, with what transformers writes beside it."""
    theirs.save(str(folder / "tokenizer.json"))
    said = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder / "tokenizer.json"


@pytest.fixture
def theirs():
    return trained()


@pytest.fixture
def ours(theirs, tmp_path):
    return foreign_json(folder_of(theirs, tmp_path))


def test_a_text_has_the_librarys_tokens(ours, theirs):
    for text in TEXT, PROBE, "", " ", "1997":
        want = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode_ordinary(text) == want
        assert ours.decode(want) == text
        found = ours.encode_to_numpy(text)
        assert found.dtype == np.uint32 and found.tolist() == want


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A tokenizer for many texts."""
    folder = tmp_path_factory.mktemp("foreign")
    return foreign_json(folder_of(trained(), folder))


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_comes_back(text, kept):
    assert kept.decode(kept.encode_ordinary(text)) == text


def test_half_a_character_is_no_text_and_no_error(ours):
    assert ours.decode(ours.encode_ordinary("a\ud800b")) == "a\ufffdb"


def test_markup_is_a_token_where_it_is_meant(ours, theirs):
    text = "<|im_start|>user\nhi<|im_end|>"
    start, end = (theirs.token_to_id(x) for x in MARKUP[1:])
    meant = ours.encode(text, allowed_special="all")
    assert meant[0] == start and meant[-1] == end
    assert meant[1:-1] == ours.encode_ordinary("user\nhi")
    assert ours.decode(meant) == text
    said = ours.encode_ordinary(text)
    assert not {start, end} & set(said)
    assert ours.decode(said) == text
    assert ours.encode(text, allowed_special=()) == said
    assert ours.special_tokens_set == set(MARKUP)


def test_one_tokens_bytes_make_the_texts(ours):
    found = ours.encode_ordinary(PROBE)
    parts = [ours.decode_single_token_bytes(x) for x in found]
    assert b"".join(parts) == PROBE.encode("utf-8")
    assert len(parts) > 20


def test_its_ends_come_from_the_files_beside_it(theirs, tmp_path):
    ours = foreign_json(folder_of(theirs, tmp_path))
    assert ours.eot_token == theirs.token_to_id("<|im_end|>")
    assert ours.bos_token is None  # it puts nothing before a text
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="where a text ends is not known"):
        foreign_json(tmp_path / "tokenizer.json")
    config = tmp_path / "config.json"
    for eos in 7, [7, 8]:
        config.write_text(json.dumps({"eos_token_id": eos}))
        assert foreign_json(tmp_path / "tokenizer.json").eot_token == 7
    for eos in 330, -1, "7", 1.5, []:
        config.write_text(json.dumps({"eos_token_id": eos}))
        refused("tokenizer.json: ", foreign_json, tmp_path / "tokenizer.json")


def test_a_begin_is_known_where_the_library_puts_one(theirs, tmp_path):
    start = theirs.token_to_id("<|im_start|>")
    begin_with(theirs, "<|im_start|>", start)
    ours = foreign_json(folder_of(theirs, tmp_path))
    assert ours.bos_token == start
    assert start not in ours.encode_ordinary(TEXT)


def test_added_tokens_may_leave_holes(theirs, tmp_path):
    path = folder_of(theirs, tmp_path)
    said = json.loads(path.read_text())
    added = dict(said["added_tokens"][0], content="<far>", id=400)
    said["added_tokens"].append(added)
    path.write_text(json.dumps(said))
    try:
        ours = foreign_json(path)
    except ValueError as error:  # newer libraries refuse it
        assert str(path) in str(error)
        return
    for token in ours.encode("a<far>b", allowed_special="all"):
        assert ours.decode_single_token_bytes(token)


def test_the_door_knows_all_kinds(theirs, tmp_path):
    path = folder_of(theirs, tmp_path)
    want = theirs.encode("the lower").ids
    for name in path, tmp_path:
        found = open_encoding(str(name))
        assert found.encode_ordinary("the lower") == want
    assert open_foreign(path).n_vocab == theirs.get_vocab_size()


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "empty file"),
        (b"{}", "not a tokenizer"),
        (b"[1, 2]", "not a tokenizer"),
        (b"\xff\xfe", "not a tokenizer"),
        (b"version https://git-lfs", "Git LFS pointer"),
    ],
)
def test_what_is_no_tokenizer_is_refused(raw, says, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(raw)
    refused(says, foreign_json, path)


# SentencePiece


@pytest.fixture(scope="module")
def proto():
    """A SentencePiece BPE with bytes to fall back on, as Llama 2's."""
    return sentencepiece(
        TEXT.splitlines(), vocab_size=340, byte_fallback=True,
        character_coverage=0.99, normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )  # fmt: skip


def test_a_sentencepiece_has_the_librarys_tokens(proto, tmp_path):
    library = pytest.importorskip("sentencepiece")
    theirs = library.SentencePieceProcessor(model_proto=proto)
    (tmp_path / "tokenizer.model").write_bytes(proto)
    ours = open_foreign(tmp_path / "tokenizer.model")
    assert ours.n_vocab == theirs.vocab_size() == 340
    assert (ours.bos_token, ours.eot_token) == (1, 2)
    for text in TEXT, PROBE.replace("\x00", ""), "a<s>b</s>":
        found = ours.encode_ordinary(text)
        assert found == theirs.encode(text)
        # such tokenizers put a space before a text
        assert ours.decode(found) == " " + text
        assert not {1, 2} & set(found)
    meant = ours.encode("<s>a</s>", allowed_special="all")
    assert (meant[0], meant[-1]) == (1, 2)
    assert ours.special_tokens_set == {"<s>", "</s>"}


def test_a_character_without_a_piece_is_its_bytes(proto, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(proto)
    ours = open_foreign(tmp_path / "tokenizer.model")
    found = ours.encode_ordinary("\U0001f600")
    parts = [ours.decode_single_token_bytes(x) for x in found]
    assert parts[-4:] == [b"\xf0", b"\x9f", b"\x98", b"\x80"]


def test_what_is_no_sentencepiece_is_refused(tmp_path):
    pytest.importorskip("sentencepiece")
    path = tmp_path / "tokenizer.model"
    for raw, says in ((b"", "empty"), (b"no such thing", "not a tokenizer")):
        path.write_bytes(raw)
        refused(says, foreign_sentencepiece, path)


def test_a_sentencepiece_without_an_end_is_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    lines = TEXT.splitlines()
    path.write_bytes(sentencepiece(lines, vocab_size=80, eos_id=-1))
    refused("token -1, which is none of 80", foreign_sentencepiece, path)


# what a GGUF file holds


def tables(theirs):
    """A tokenizer's tables, as llama.cpp's converter writes them."""
    model = json.loads(theirs.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [x if type(x) is str else " ".join(x) for x in model["merges"]]
    kinds = [3 if x in MARKUP else 1 for x in tokens]
    said = {
        "model": "gpt2", "pre": "smollm", "tokens": tokens, "merges": merges,
        "token_type": kinds, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return {f"tokenizer.ggml.{name}": x for name, x in said.items()}


@pytest.mark.parametrize("cut", ["smollm", "gpt-2", "default"])
def test_tables_in_a_gguf_cut_and_merge_alike(cut, tmp_path):
    theirs = trained(cut)
    keys = tables(theirs) | {"tokenizer.ggml.pre": cut}
    ours = open_foreign(write_gguf(tmp_path / "a.gguf", keys))
    for text in TEXT, PROBE:
        want = theirs.encode(text).ids
        assert ours.encode_ordinary(text) == want
        assert ours.decode(want) == text
    assert ours.n_vocab == theirs.get_vocab_size()
    assert ours.special_tokens_set == set(MARKUP)
    assert (ours.bos_token, ours.eot_token) == (None, 2)


def test_a_gguf_says_whether_a_text_has_a_begin(theirs, tmp_path):
    keys = tables(theirs) | {"tokenizer.ggml.add_bos_token": True}
    ours = open_foreign(write_gguf(tmp_path / "a.gguf", keys))
    assert ours.bos_token == 1


@pytest.mark.parametrize(
    ("cut", "want"),
    [
        ("gpt-2", ["1234", "5"]),
        ("smollm", ["1", "2", "3", "4", "5"]),
        ("llama-bpe", ["123", "4", "5"]),
        ("qwen2", ["1", "2", "3", "4", "5"]),
    ],
)
def test_digits_are_cut_as_the_name_says(cut, want, theirs, tmp_path):
    keys = tables(theirs) | {"tokenizer.ggml.pre": cut}
    keys["tokenizer.ggml.tokens"] += ["12", "123", "1234"]
    keys["tokenizer.ggml.token_type"] += [1, 1, 1]
    keys["tokenizer.ggml.merges"] += ["1 2", "12 3", "123 4"]
    ours = open_foreign(write_gguf(tmp_path / "a.gguf", keys))
    assert [ours.decode([x]) for x in ours.encode_ordinary("12345")] == want
    assert ours.decode(ours.encode_ordinary(TEXT)) == TEXT


@pytest.mark.parametrize("cut", ["smollm", "qwen2"])
def test_accents_are_composed_as_the_name_says(cut, theirs, tmp_path):
    keys = tables(theirs) | {"tokenizer.ggml.pre": cut}
    ours = open_foreign(write_gguf(tmp_path / "a.gguf", keys))
    apart, whole = map(ours.encode_ordinary, ("cafe\u0301", "caf\u00e9"))
    assert (apart == whole) == (cut == "qwen2")


def test_added_tokens_of_a_gguf_stand_in_texts(theirs, tmp_path):
    keys = tables(theirs)
    keys["tokenizer.ggml.tokens"].append("<think>")
    keys["tokenizer.ggml.token_type"].append(4)
    ours = open_foreign(write_gguf(tmp_path / "a.gguf", keys))
    assert len(ours.encode_ordinary("<think>")) == 1
    assert "<think>" not in ours.special_tokens_set


def key(name, value):
    return lambda keys: keys.update({f"tokenizer.ggml.{name}": value})


def drop(name):
    return lambda keys: keys.pop(f"tokenizer.ggml.{name}")


def begin(value):
    """A token that is put before texts."""
    said = {"add_bos_token": True, "bos_token_id": value}
    return lambda keys: [key(*x)(keys) for x in said.items()]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (key("model", "llama"), "must be a byte-level BPE .* got 'llama'"),
        (drop("model"), "got None"),
        (key("pre", "tekken"), "got 'gpt2' and 'tekken'"),
        (key("pre", 7), "and 7"),
        (drop("tokens"), "not whole"),
        (drop("merges"), "not whole"),
        (key("tokens", "abc"), "not whole"),
        (key("merges", ["a"]), "not whole"),
        (key("merges", ["zz zz"]), "not whole"),
        (key("token_type", [1, 1]), "not whole"),
        (key("eos_token_id", 330), "token 330, which is none of 330"),
        (drop("eos_token_id"), "token None"),
        (key("eos_token_id", "2"), "token '2'"),
        (begin(999), "not whole"),
        (begin("1"), "not whole"),
    ],
)
def test_tables_that_make_no_tokenizer_are_refused(
    change, says, theirs, tmp_path
):
    keys = tables(theirs)
    change(keys)
    refused(says, foreign_gguf, write_gguf(tmp_path / "a.gguf", keys))


def test_a_token_that_comes_twice_is_refused(theirs, tmp_path):
    keys = tables(theirs)
    keys["tokenizer.ggml.tokens"][-1] = keys["tokenizer.ggml.tokens"][-2]
    path = write_gguf(tmp_path / "a.gguf", keys)
    refused("a token comes twice", foreign_gguf, path)


def test_without_sentencepiece_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match=r"package sentencep.*\[modern\]"):
        open_foreign("tokenizer.model")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The folder of a small tokenizer, and its bytes."""
    folder = tmp_path_factory.mktemp("damaged")
    path = folder_of(trained(size=262), folder)
    return path, path.read_bytes()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_tokenizer_gives_one_error(data, good):
    path, raw = good
    found = answer(foreign_json, path, data.draw(mangled(raw)))
    assert isinstance(found, Exception) or found.n_vocab


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_sentencepiece_gives_one_error(data, good, proto):
    path = good[0].with_name("tokenizer.model")
    found = answer(foreign_sentencepiece, path, data.draw(mangled(proto)))
    assert isinstance(found, Exception) or found.n_vocab
