"""Tokenizers of other models, which the tests train through libraries."""

import json

import numpy as np
import pytest
from fuzz import altered, answer, fuzzed, mangled, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from llamas import PROBE, begin_with, byte_level, sentencepiece, write_gguf

from llmnb.formats.foreign import foreign_gguf, foreign_json, open_foreign
from llmnb.formats.vocabulary import open_encoding, tokenizer_beside

pytest.importorskip("tokenizers")

TEXT = (
    "The lowest of the newer towers fell in 1997; the newest, lower than "
    "most, has 12,345 windows. It isn't naïve, it's 東京's own ½.\n\n"
    "def f(x):\n    return x + 1  # the lower\n"
)
MARKUP = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def trained(size=330, digits=True):
    """A byte-level BPE, trained on a few lines."""
    return byte_level(TEXT, MARKUP, size, digits)


def folder_of(theirs, folder):
    """A tokenizer.json, with what transformers writes beside it."""
    theirs.save(str(folder / "tokenizer.json"))
    said = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder / "tokenizer.json"


@pytest.fixture
def theirs():
    return trained()


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """The same, read by us."""
    return foreign_json(folder_of(trained(), tmp_path_factory.mktemp("a")))


def test_markup_behind_all_other_tokens(tmp_path):
    """As in Qwen's; a small vocabulary may merge as GPT-2's does."""
    theirs = byte_level(TEXT, [], 300)
    theirs.add_special_tokens(MARKUP)
    text = "<|im_start|>user\nthe low<|im_end|>"
    want = theirs.encode(text, add_special_tokens=False).ids
    ours = open_encoding(folder_of(theirs, tmp_path))
    assert ours.encode(text, allowed_special="all") == want
    assert ours.n_vocab == 303 and ours.special_tokens_set == {*MARKUP}
    assert ours.eot_token == theirs.token_to_id("<|im_end|>")


def test_of_another_family_vocab_json_is_the_last_choice(tmp_path):
    """Qwen's folders hold it, without the markup, beside the whole."""
    files = "gpt2_tokenizer.bin", "tokenizer.json"
    for others in files, files[:1], ():
        folder = tmp_path / str(len(others))
        folder.mkdir()
        for file in (*others, "vocab.json"):
            (folder / file).write_text("{}")
        for kind in "qwen3", "gpt2", None:
            described = json.dumps({"model_type": kind})
            (folder / "config.json").write_text(described)
            own = others[-1] if others and kind == "qwen3" else "vocab.json"
            assert tokenizer_beside(folder) == folder / own


def test_a_text_has_the_librarys_tokens(ours, theirs):
    for text in TEXT, PROBE, "", " ", "1997":
        want = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode_ordinary(text) == want
        assert ours.decode(want) == text
        found = ours.encode_to_numpy(text)
        assert found.dtype == np.uint32 and found.tolist() == want
        parts = map(ours.decode_single_token_bytes, want)
        assert b"".join(parts) == text.encode("utf-8")


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_comes_back(text, ours):
    assert ours.decode(ours.encode_ordinary(text)) == text
    # half a character is no text, and no error
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
    few = ours.encode(text, allowed_special={"<|im_end|>"})
    assert few[-1] == end and start not in few
    assert ours.decode(few) == text
    assert ours.special_tokens_set == set(MARKUP)


def test_its_ends_come_from_the_files_beside_it(theirs, tmp_path):
    path = folder_of(theirs, tmp_path)
    ours = foreign_json(path)
    assert ours.eot_token == theirs.token_to_id("<|im_end|>")
    assert ours.bos_token is None  # it puts nothing before a text
    (tmp_path / "tokenizer_config.json").unlink()
    refused("where a text ends is not known", foreign_json, path)
    config = tmp_path / "config.json"
    for eos in 7, [7, 8]:
        config.write_text(json.dumps({"eos_token_id": eos}))
        assert foreign_json(path).eot_token == 7
    for eos in 330, -1, "7", 1.5, []:
        config.write_text(json.dumps({"eos_token_id": eos}))
        refused("tokenizer.json: ", foreign_json, path)
    beside = tmp_path / "tokenizer_config.json"
    for word in 5, True, ["x"], {"content": 5}:
        for kind in "bos_token", "eos_token":
            beside.write_text(json.dumps({kind: word}))
            says = f"tokenizer_config.json: {kind} must be a text"
            with pytest.raises(ValueError, match=says):
                foreign_json(path)
    # Gemma 3's is this long
    said = {"eos_token": "<|im_end|>", "more": "x" * 1_156_999}
    beside.write_text(json.dumps(said))
    assert foreign_json(path).eot_token == theirs.token_to_id("<|im_end|>")
    # a begin is known where the library puts one
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


NONE = "not a tokenizer"


@pytest.mark.parametrize(
    ("name", "raw", "says"),
    [
        ("json", b"{}", NONE), ("json", b"\xff\xfe", NONE),
        ("model", b"", "empty"), ("model", b"no such thing", NONE),
    ],
)  # fmt: skip
def test_what_is_no_tokenizer_is_refused(name, raw, says, tmp_path):
    if name == "model":
        pytest.importorskip("sentencepiece")
    path = tmp_path / f"tokenizer.{name}"
    path.write_bytes(raw)
    refused(says, open_foreign, path)


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
    """A character without a piece is its bytes."""
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
    found = ours.encode_ordinary("\U0001f600")
    parts = [ours.decode_single_token_bytes(x) for x in found]
    assert parts[-4:] == [b"\xf0", b"\x9f", b"\x98", b"\x80"]


def test_a_sentencepiece_without_an_end_is_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    lines = TEXT.splitlines()
    path.write_bytes(sentencepiece(lines, vocab_size=80, eos_id=-1))
    refused("token -1, which is none of 80", open_foreign, path)


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


def in_gguf(folder, theirs, change=lambda keys: None, **said):
    """The path of a GGUF file with such tables, some of them changed."""
    said = {f"tokenizer.ggml.{name}": x for name, x in said.items()}
    keys = altered(tables(theirs), said)
    change(keys)
    return write_gguf(folder / "a.gguf", keys)


@pytest.mark.parametrize("cut", ["smollm", "gpt-2", "default"])
def test_tables_in_a_gguf_cut_and_merge_alike(cut, tmp_path):
    theirs = trained(digits=cut == "smollm")
    ours = open_foreign(in_gguf(tmp_path, theirs, pre=cut))
    for text in TEXT, PROBE:
        want = theirs.encode(text).ids
        assert ours.encode_ordinary(text) == want
        assert ours.decode(want) == text
    assert ours.n_vocab == theirs.get_vocab_size()
    assert ours.special_tokens_set == set(MARKUP)
    assert (ours.bos_token, ours.eot_token) == (None, 2)
    begins = in_gguf(tmp_path, theirs, pre=cut, add_bos_token=True)
    assert open_foreign(begins).bos_token == 1


@pytest.mark.parametrize(
    ("cut", "want"),
    [("gpt-2", "1234 5"), ("smollm", "1 2 3 4 5"),
     ("llama-bpe", "123 4 5"), ("qwen2", "1 2 3 4 5")],
)  # fmt: skip
def test_a_gguf_cuts_as_the_name_says(cut, want, theirs, tmp_path):
    """Digits, accents, and a token that was added later."""

    def more(keys):
        keys["tokenizer.ggml.tokens"] += ["12", "123", "1234", "<think>"]
        keys["tokenizer.ggml.token_type"] += [1, 1, 1, 4]
        keys["tokenizer.ggml.merges"] += ["1 2", "12 3", "123 4"]

    ours = open_foreign(in_gguf(tmp_path, theirs, more, pre=cut))
    digits = [ours.decode([x]) for x in ours.encode_ordinary("12345")]
    assert " ".join(digits) == want
    assert ours.decode(ours.encode_ordinary(TEXT)) == TEXT
    apart, whole = map(ours.encode_ordinary, ("cafe\u0301", "caf\u00e9"))
    assert (apart == whole) == (cut == "qwen2")
    assert len(ours.encode_ordinary("<think>")) == 1
    assert "<think>" not in ours.special_tokens_set


BEGIN = {"add_bos_token": True}  # a token is put before texts


@pytest.mark.parametrize(("change", "says"), [
    ({"model": "llama"}, "must be a byte-level BPE .* got 'llama'"),
    ({"model": None}, "got None"),
    ({"pre": "tekken"}, "got 'gpt2' and 'tekken'"), ({"pre": 7}, "and 7"),
    ({"tokens": None}, "not whole"), ({"merges": None}, "not whole"),
    ({"tokens": "abc"}, "not whole"), ({"merges": ["a"]}, "not whole"),
    ({"merges": ["zz zz"]}, "not whole"), ({"token_type": [1]}, "not whole"),
    ({"eos_token_id": 330}, "token 330, which is none of 330"),
    ({"eos_token_id": None}, "token None"),
    ({"eos_token_id": "2"}, "token '2'"),
    (BEGIN | {"bos_token_id": 999}, "not whole"),
    (BEGIN | {"bos_token_id": "1"}, "not whole"),
])  # fmt: skip
def test_tables_that_make_no_tokenizer(change, says, theirs, tmp_path):
    refused(says, foreign_gguf, in_gguf(tmp_path, theirs, **change))


def test_a_token_that_comes_twice_is_refused(theirs, tmp_path):
    def twice(keys):
        keys["tokenizer.ggml.tokens"][-1] = keys["tokenizer.ggml.tokens"][-2]

    path = in_gguf(tmp_path, theirs, twice)
    refused("a token comes twice", foreign_gguf, path)


@pytest.fixture(scope="module")
def good(tmp_path_factory, proto):
    """The path of a small tokenizer.json, and the bytes of each kind."""
    path = folder_of(trained(262), tmp_path_factory.mktemp("damaged"))
    return path, {".json": path.read_bytes(), ".model": proto}


@pytest.mark.parametrize("kind", [".json", ".model"])
@fuzzed(200)
def test_a_damaged_tokenizer_gives_one_error(kind, data, good):
    path, raw = good[0].with_suffix(kind), good[1][kind]
    found = answer(open_foreign, path, data.draw(mangled(raw)))
    assert isinstance(found, Exception) or found.n_vocab
