"""A model's tokenizer, in any file that it may lie in."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiktoken
from commands import raising
from fuzz import header, refused
from spelling import merges_of, own_files, tokenizer_bin, tokens_of, vocab_of

from llmnb.config import GPT2Config
from llmnb.formats import vocabulary
from llmnb.formats.checkpoint import write_folder
from llmnb.formats.foreign import Foreign
from llmnb.formats.letters import byte_letters
from llmnb.formats.vocabulary import (
    open_encoding,
    read_tokenizer,
    read_tokenizer_json,
    read_vocab,
    tokenizer_of,
)
from llmnb.model.gpt2 import GPT2
from llmnb.text import tokenizer
from llmnb.text.bpe import WORDS, from_tokens

CFG = GPT2Config(8, 258, 1, 2, 32)


@pytest.fixture(scope="module")
def trained():
    return tokenizer.train("low lower lowest, newer newest " * 3, 270)


# the vocabulary


def test_the_letters_of_gpt2():
    letters = byte_letters()
    assert len(letters) == 256 and set(letters.values()) == set(range(256))
    # as every vocab.json of GPT-2 shows: a space is Ġ, a newline Ċ
    assert letters["Ġ"] == ord(" ") and letters["Ċ"] == ord("\n")
    assert letters["A"] == ord("A") and letters["Ń"] == 173


WRITERS = {
    "vocab.json": lambda path, x: path.write_text(json.dumps(vocab_of(x))),
    "t.bin": vocabulary.write_tokenizer,
    "tokenizer.tiktoken": lambda path, x: tokenizer.save(x, path),
}
TEXTS = "It's naïve: 東京 \U0001f600\r\n\t  x = 3.14", "low lowest", ""


def alike(one, other, *more):
    """Fail unless two encodings give texts the same tokens."""
    assert (one.n_vocab, one.eot_token) == (other.n_vocab, other.eot_token)
    for text in (*TEXTS, *more):
        assert one.encode_ordinary(text) == other.encode_ordinary(text)


@pytest.mark.parametrize("name", ["trained", "gpt2"])
@pytest.mark.parametrize("kind", WRITERS)
def test_an_encoding_comes_back(request, tmp_path, name, kind):
    encoding, path = request.getfixturevalue(name), tmp_path / kind
    WRITERS[kind](path, encoding)
    long = Path(__file__).read_text("utf-8")
    alike(open_encoding(path), encoding, "é\x00ÿ", long)


@pytest.mark.parametrize(("vocab", "says"), [
    ([], "must hold a JSON object"),
    ({}, "the last token must be"),
    ({"a": 1}, "must number its tokens 0, 1, 2"),
    ({"a": 0, "b": 0}, "must number its tokens 0, 1, 2"),
    ({"a": True, "b": 0}, "must number its tokens 0, 1, 2"),
    ({"a": 0.0}, "must number its tokens 0, 1, 2"),
    ({"a": "0"}, "must number its tokens 0, 1, 2"),
    ({"a b": 0}, "'a b' has letters of no byte"),
    ({"<|endoftext|>": 0}, "no token for the byte 0"),
])  # fmt: skip
def test_a_vocabulary_that_is_none(tmp_path, vocab, says):
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps(vocab))
    refused(f"vocab.json: .*{says}", read_vocab, path)


# merges, and tokens that no text becomes

SPECIAL = ["<s>", "<|endoftext|>", "<pad>"]


@pytest.mark.parametrize("before", [[], SPECIAL, ["<|endoftext|>"]])
@pytest.mark.parametrize("behind", [[], ["[PAD]"], ["[PAD]", "<|user|>"]])
@pytest.mark.parametrize("kind", ["vocab.json", "whole", "short"])
def test_a_models_own_vocabulary(tmp_path, trained, before, behind, kind):
    """In two files, in tokenizer.json, and in one that cuts texts short."""
    if kind == "vocab.json":
        path = own_files(tmp_path, trained, before, behind)
    else:
        path = tokenizer_json(tmp_path, trained, before, behind, kind)
    ours = open_encoding(path)
    for text in TEXTS:
        want = [len(before) + x for x in trained.encode_ordinary(text)]
        assert ours.encode_ordinary(text) == want
        assert ours.decode(want) == text
    eot = before.index("<|endoftext|>") if before else 269
    assert ours.eot_token == eot
    # what stands behind the last token of a text is padding
    assert ours.n_vocab == 270 - bool(before) + len(before)


def test_a_run_keeps_a_vocabulary_with_one_special_token(tmp_path, trained):
    kept = tmp_path / "tokenizer.tiktoken"
    for before in [], ["<|endoftext|>"]:
        ours = read_vocab(own_files(tmp_path, trained, before))
        tokenizer.save(ours, kept)
        alike(tokenizer.load(kept), ours)
    ours = read_vocab(own_files(tmp_path, trained, SPECIAL))
    with pytest.raises(ValueError, match=r"one special token .*'<pad>'"):
        tokenizer.save(ours, kept)


@pytest.mark.parametrize(("line", "says"), [
    ("l o w", "merges.txt:2: a line must be two tokens, got 'l o w'"),
    ("low", "merges.txt:2: a line must be two tokens"),
    ("lo w", "vocab.json: the merge of 'lo' and 'w' must join earlier"),
    ("a b", "the merge of 'a' and 'b' must join earlier"),
    ("x" * 300_000 + " y", "the merge of 'xxx"),
])  # fmt: skip
def test_merges_that_are_none(tmp_path, trained, line, says):
    path, merges = own_files(tmp_path, trained), tmp_path / "merges.txt"
    lines = merges.read_text("utf-8").split("\n")
    merges.write_text("\n".join([lines[0], line, *lines[1:]]), "utf-8")
    with pytest.raises(ValueError, match=says) as error:
        read_vocab(path)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("before", [[], ["<|endoftext|>"]])
def test_merges_that_are_cut_short(tmp_path, trained, before):
    path = own_files(tmp_path, trained, before)
    lines = (tmp_path / "merges.txt").read_bytes().splitlines(True)
    for count in (1, 2, len(lines) - 1):
        short = b"".join(lines[:count])
        (tmp_path / "merges.txt").write_bytes(short)
        refused("vocab.json: no merge makes", read_vocab, path)


@pytest.mark.parametrize("token", ["<\ud800>", "[\udfff]"])
def test_half_a_character_is_no_special_token(tmp_path, trained, token):
    path = own_files(tmp_path, trained, [token, "<|endoftext|>"])
    refused("vocab.json: no merge makes the token", read_vocab, path)


def test_a_vocabulary_without_an_end_of_text(tmp_path, trained):
    path = own_files(tmp_path, trained, ["<s>", "</s>"])
    refused("vocab.json: has no <.endoftext.>", read_vocab, path)


@pytest.mark.parametrize("merges", [False, True])
def test_a_token_of_300_kilobytes_takes_no_time(tmp_path, trained, merges):
    long = "<" + "Ġ" * 300_000 + ">"
    path = own_files(tmp_path, trained, [], [long], merges)
    vocab = json.loads(path.read_text("utf-8"))
    if not merges:  # then the last must be the end of a text
        vocab |= {long: 269, "<|endoftext|>": 270}
        path.write_text(json.dumps(vocab), "utf-8")
    start = time.process_time()
    if merges:
        assert read_vocab(path).n_vocab == 270
    else:
        refused("at most 255 bytes, number 269", read_vocab, path)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(("name", "size"), [
    ("vocab.json", 1 << 23), ("merges.txt", 1 << 23),
    ("tokenizer.tiktoken", 1 << 24), ("tokenizer.json", 1 << 26),
    ("tokenizer.bin", (1 << 24) + 1024),
])  # fmt: skip
def test_a_tokenizers_file_is_small(tmp_path, trained, name, size):
    own_files(tmp_path, trained)
    if name == "tokenizer.json":
        pytest.importorskip("tokenizers")
    path = tmp_path / name
    with open(path, "wb") as file:
        if name == "tokenizer.bin":  # as large as its header allows
            file.write(header(20240328, 2, 1 << 20, (1 << 20) - 1))
        file.truncate(size + 1)
    path = tmp_path / "vocab.json" if name == "merges.txt" else path
    with pytest.raises(ValueError, match=f"{name}: must have at most"):
        open_encoding(path)


# tokenizer.json


def tokenizer_json(folder, encoding, before=(), behind=(), change=""):
    """tokenizer.json, as the library writes it."""
    library = pytest.importorskip("tokenizers")
    path = own_files(folder, encoding, before, behind)
    vocab = json.loads(path.read_text("utf-8"))
    merges = [tuple(x) for x in merges_of(encoding)]
    plain = {x: n for x, n in vocab.items() if x not in (*before, *behind)}
    made = library.Tokenizer(library.models.BPE(plain | vocab, merges))
    prefix = {"add_prefix_space": change == "prefix"}
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(**prefix)
    made.decoder = library.decoders.ByteLevel()
    made.add_special_tokens([*before, *behind, "<|endoftext|>"])
    if change == "lower":
        made.normalizer = library.normalizers.Lowercase()
    if change == "short":
        made.enable_truncation(3)
        made.enable_padding(length=500)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("change", ["lower", "prefix"])
def test_a_tokenizer_json_that_cuts_otherwise(tmp_path, trained, change):
    path = tokenizer_json(tmp_path, trained, change=change)
    refused("json: cuts or merges", read_tokenizer_json, path)


def test_a_number_without_a_token(tmp_path, trained):
    """Such a token could be drawn, and is no text."""
    path = tokenizer_json(tmp_path, trained)
    found = json.loads(path.read_text("utf-8"))
    vocab = found["model"]["vocab"]
    vocab["<|endoftext|>"] = found["added_tokens"][0]["id"] = 270
    path.write_text(json.dumps(found), "utf-8")
    refused("must number its tokens 0, 1, 2", read_tokenizer_json, path)


def test_two_bytes_of_one_number(tmp_path, trained):
    path = tokenizer_json(tmp_path, trained)
    found = json.loads(path.read_text("utf-8"))
    vocab = found["model"]["vocab"]
    vocab["a"], vocab["[X]"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(found), "utf-8")
    refused("must number its tokens 0, 1, 2", read_tokenizer_json, path)


def test_a_tokenizer_json_of_another_kind(tmp_path):
    library = pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    made = library.Tokenizer(library.models.WordPiece({"a": 0, "[UNK]": 1}))
    made.save(str(path))
    refused("must be a BPE .*, is WordPiece", read_tokenizer_json, path)
    refused("tokenizer.json: no eos_token in", open_encoding, path)
    said = json.dumps({"eos_token": "[UNK]"})
    (tmp_path / "tokenizer_config.json").write_text(said)
    other = open_encoding(path)
    assert isinstance(other, Foreign) and other.eot_token == 1
    assert other.encode_ordinary("a") == [0]
    for raw, says in (
        (b"{}", ""), (b'{"model": [[[]]]}', ""), (b"[" * 9000, ""),
        (b"[]", ""), (b"\xff", ""), (b"", "this is an empty file"),
        (b"<!doctype html>\n<p>", "this is a web page"),
        (b"version https://git-lfs.github", "this is a Git LFS pointer"),
    ):  # fmt: skip
        path.write_bytes(raw)
        refused(f"tokenizer.json: {says}", open_encoding, tmp_path)


def test_a_panic_of_the_library_is_one_sentence(tmp_path, monkeypatch):
    """As some files make, which no error of Python's is."""

    class Panic(BaseException):
        pass

    def stand_in(error):
        made = SimpleNamespace(from_str=raising(error, "slice index"))
        return lambda *_: SimpleNamespace(Tokenizer=made)

    place, path = "llmnb.formats.library.package", tmp_path / "tokenizer.json"
    path.write_text("{}")
    monkeypatch.setattr(place, stand_in(Panic))
    refused("json: not a tokenizer .slice index", open_encoding, path)
    monkeypatch.setattr(place, stand_in(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        open_encoding(path)


# which tokenizer


def test_what_lies_beside_the_weights_is_taken(tmp_path, trained):
    model = GPT2(CFG, 1, 4, "reference")
    write_folder(tmp_path, CFG, model.params)
    weights = tmp_path / "model.safetensors"
    with pytest.raises(OSError, match="holds none of tokenizer"):
        open_encoding(tmp_path)
    for path in (tmp_path, weights):
        refused("which tokenizer.*--tokenizer g", tokenizer_of, path, 258)
        # as many tokens as GPT-2's say nothing
        refused("which tokenizer", tokenizer_of, path, 50257)
    writers = {
        "gpt2_tokenizer.bin": WRITERS["t.bin"],
        "tokenizer.json": lambda path, _: path.write_text("{}"),
        "vocab.json": lambda _, encoding: own_files(tmp_path, encoding),
        "tokenizer.tiktoken": WRITERS["tokenizer.tiktoken"],
    }
    for name, write in writers.items():
        write(tmp_path / name, trained)
        for path in (tmp_path, weights):
            assert tokenizer_of(path, 258) == str(tmp_path / name)
        if name != "tokenizer.json":
            got = open_encoding(str(tmp_path))
            assert got.encode_ordinary("low") == trained.encode_ordinary("low")


@pytest.mark.parametrize("rows", [50257, 50258, 50304])
def test_llm_cs_models_have_gpt2s_tokens(tmp_path, rows):
    path = tmp_path / "gpt2_124M.bin"
    path.write_bytes(b"")
    assert tokenizer_of(path, rows) == "gpt2"
    for other in (50256, 50305, 257):
        refused("gpt2_124M.bin: which tokenizer", tokenizer_of, path, other)


# the tokenizer


def test_the_bytes_are_llm_cs(trained, tmp_path):
    path, tokens = tmp_path / "t.bin", tokens_of(trained)
    vocabulary.write_tokenizer(path, trained)
    assert path.read_bytes() == tokenizer_bin(tokens, 269)
    assert read_tokenizer(path) == (tokens, 269)


def test_a_long_token_is_not_written(tmp_path):
    long = from_tokens("long", [*BYTES, b"x" * 256])
    with pytest.raises(ValueError, match="number 256 has 256"):
        vocabulary.write_tokenizer(tmp_path / "t.bin", long)
    assert not list(tmp_path.iterdir())


def test_a_gap_in_the_numbers_is_refused(tmp_path):
    ranks = {x: i for i, x in enumerate(BYTES)} | {b"ab": 300}
    gap = tiktoken.Encoding(
        "gap", pat_str=WORDS, mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 301},
    )  # fmt: skip
    with pytest.raises(ValueError, match="no token has the number 256"):
        vocabulary.write_tokenizer(tmp_path / "t.bin", gap)
    with pytest.raises(ValueError, match="of 301 numbers 257 have a token"):
        tokenizer.save(gap, tmp_path / "t.tiktoken")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("change", "says"), [
    (lambda raw: raw[:1000], "size must be at least 1024 bytes"),
    (lambda raw: raw[:-1], "token 3 is empty or cut off"),
    (lambda raw: raw[:-3], "right for 4 tokens"),
    (lambda raw: raw + b"x", "1 bytes behind the last token"),
    (lambda raw: raw + b"x" * 2000, "right for 4 tokens"),
    (lambda raw: header(1) + raw[1024:], "magic number must be 20240328"),
    (lambda raw: header(20240328, 1) + raw[1024:], "version must be 2"),
    (lambda raw: header(20240328, 2, 2**31 - 1, 3) + raw[1024:],
     "right for 2147483647 tokens"),
    (lambda raw: header(20240328, 2, 4, 4) + raw[1024:], "EOT must be"),
    (lambda raw: header(20240328, 2, -4, -5) + raw[1024:], "positive"),
    (lambda raw: raw[:1024] + b"\0" + raw[1025:], "token 0 is empty"),
])  # fmt: skip
def test_a_bad_tokenizer_is_refused(tmp_path, change, says):
    good = tokenizer_bin([b"a", b"b", b"ab", b"cd"], 3)
    (tmp_path / "t.bin").write_bytes(change(good))
    refused(f"t.bin: .*{says}", read_tokenizer, tmp_path / "t.bin")


BYTES = [bytes([i]) for i in range(256)]
EOT = b"<|endoftext|>"


@pytest.mark.parametrize(("tokens", "says"), [
    ([*BYTES, b"ab"], "the last token must be"),
    ([*BYTES[1:], b"ab", EOT], "no token for the byte 0"),
    ([*BYTES, b"ab", b"ab", EOT], "comes twice"),
    ([*BYTES, b"abc", b"ab", EOT], "token 256 joins no two earlier ones"),
    ([*BYTES, *(EOT[:n] for n in range(2, 14)), EOT], "comes twice"),
])  # fmt: skip
def test_a_decoder_without_an_encoder(tmp_path, tokens, says):
    with pytest.raises(ValueError, match=f"t: .*{says}"):
        vocabulary.encoding_of("t", tokens)
    path = tmp_path / "t.bin"
    path.write_bytes(tokenizer_bin(tokens, 0))
    assert read_tokenizer(path) == (tokens, 0)
    says = "t.bin: EOT must be the last token"
    refused(says, vocabulary.read_encoding, path)
