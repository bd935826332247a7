"""Perplexity of any text, and multiple choice as llm.c scores it."""

import gzip
import json
import math

import numpy as np
import pytest
from commands import BYTES
from fuzz import header, refused
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnb.config import GPT2Config
from llmnb.model.gpt2 import GPT2
from llmnb.text import tokenizer
from llmnb.text.bpe import from_tokens
from llmnb.text.reader import Tally
from llmnb.train import choices, evaluation
from llmnb.train.choices import Example, choices_of, read_examples_json
from llmnb.train.evaluation import row_losses, score_pieces, score_text
from llmnb.train.rehearsal import rehearse

QUICK = settings(max_examples=300, deadline=None, derandomize=True)
CFG = GPT2Config(48, 257, 2, 2, 16)
SENTENCES = [
    ("The kettle boiled, so she", ["made tea.", "ran the tap dry.",
     "sang to the roof.", "sold it."], 0),
    ("He opened the umbrella as the", ["sun set.", "rain began.", "cat",
     "letter was read."], 1),
    ("The bridge was closed, and", ["so", "birds swim.", "they went round.",
     "it was tea."], 2),
]  # fmt: skip


def model_of(batch_size, seq_len, precision="fp64"):
    model = GPT2(CFG, batch_size, seq_len, "reference", precision, seed=7)
    rng = np.random.RandomState(7)
    for name in ("wte", "wpe"):
        known = model.params[name][: CFG.vocab_size]
        known[:] = rng.normal(0, 0.5, known.shape)
    return model


def plain_losses(model, row):
    """-log p of row[1:], from the logits."""
    tokens = np.zeros((model.batch_size, model.seq_len), int)
    tokens[0, : len(row) - 1] = row[:-1]
    model.forward(tokens)
    z = model.logits[0, : len(row) - 1].astype(np.float64)
    z = z - z.max(axis=1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    return -log_p[np.arange(len(row) - 1), row[1:]]


def lines_of(path, sentences=SENTENCES):
    keys = "ctx", "endings", "label"
    lines = [json.dumps(dict(zip(keys, x, strict=True))) for x in sentences]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def examples(tmp_path):
    path = lines_of(tmp_path / "a.jsonl")
    return read_examples_json(path, tokenizer.byte())


# rows and windows


def test_rows_of_any_length():
    model, alone = model_of(3, 20), model_of(1, 20)
    rng = np.random.RandomState(1)
    rows = [rng.randint(0, 257, n) for n in (2, 21, 7, 20, 5)]
    got = list(row_losses(model, iter(rows)))
    for row, losses in zip(rows, got, strict=True):
        assert losses.dtype == np.float64
        assert np.allclose(losses, plain_losses(alone, row), atol=1e-12)
    for length in (0, 1, 22):
        with pytest.raises(ValueError, match=f"2 to 21 tokens, got {length}"):
            list(row_losses(alone, [np.zeros(length, int)]))


@QUICK
@given(N=st.integers(1, 60), T=st.integers(1, 20), data=st.data())
def test_windows_score_each_token_once(N, T, data):
    s = data.draw(st.integers(1, T))
    scored = []
    for start, first, end in evaluation.windows(N, T, s):
        assert start <= first < end <= start + T and start % s == 0
        assert first - start >= (T - s if start else 0)
        scored += range(first, end)
    assert scored == list(range(N))


@pytest.mark.parametrize("stride", [0, 9, -1])
def test_a_stride_that_leaves_tokens_out(stride):
    with pytest.raises(ValueError, match=r"stride must lie in \[1, 8\]"):
        list(evaluation.windows(29, 8, stride))


# a text


def test_the_score_of_a_text():
    model, encoding = model_of(2, 16), tokenizer.byte()
    texts = ["naïve text", "", "and another one that is longer"]
    score = score_text(model, encoding, texts)
    assert score.bytes == score.tokens == sum(len(x.encode()) for x in texts)
    tokens = np.concatenate([[256, *x.encode()] for x in texts])
    losses = np.concatenate(list(evaluation.text_losses(model, tokens)))
    assert score.nats == pytest.approx(losses[tokens[1:] != 256].sum())
    pieces = [(True, "naïve"), (False, " text"), (True, ""), (True, texts[2])]
    assert score_pieces(model, encoding, pieces) == score
    assert score.loss == score.nats / score.tokens
    assert score.perplexity == pytest.approx(math.exp(score.loss))
    parted = [(True, "one<|endoftext|>two")]
    got = score_pieces(model, encoding, parted, endoftext=True)
    assert got == score_text(model, encoding, ["one", "two"])
    assert got.bytes == 6 and got.tokens == 6
    for none in ([], "", ["", ""]):
        with pytest.raises(ValueError, match="there is no text to score"):
            score_text(model, encoding, none)


# multiple choice


@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_choices(examples, batch_size):
    assert examples[1].context.tolist() == [*SENTENCES[1][0].encode()]
    assert examples[1].endings[2].tolist() == [*b" cat"]
    assert choices.longest_row(examples[0]) == len(SENTENCES[0][0]) + 18
    alone = model_of(1, 48)
    got = list(choices_of(model_of(batch_size, 48), examples))
    assert [x.label for x in got] == [0, 1, 2]
    for (first, endings, _), choice in zip(examples, got, strict=True):
        rows = [np.concatenate([first, x]) for x in endings]
        losses = [plain_losses(alone, x)[len(first) - 1 :] for x in rows]
        assert [*map(len, losses)] == [*map(len, endings)]
        means = [x.mean() for x in losses]
        assert np.allclose(choice.losses, means, atol=1e-12)
        assert choice.by_mean == np.argmin(means)
        assert choice.by_sum == np.argmin([x.sum() for x in losses])


@pytest.mark.parametrize(
    "context, ending", [(9, 4), (40, 3), (2, 12), (5, 30)]
)
def test_a_row_that_is_too_long_loses_its_beginning(context, ending):
    rng, model = np.random.RandomState(3), model_of(4, 12)
    first = rng.randint(0, 257, context)
    endings = [rng.randint(0, 257, n) for n in (ending, 2, 1, 4)]
    (got,) = choices_of(model, [Example(first, endings, 0)])
    for mean, tokens in zip(got.losses, endings, strict=True):
        row = np.concatenate([first, tokens])[-13:]
        want = plain_losses(model, row)[-len(tokens) :].mean()
        assert abs(mean - want) < 1e-12


# llm.c's format


@pytest.fixture
def binary(tmp_path, examples):
    """The path of a file of llm.c's, and the file's bytes."""
    choices.write_examples(tmp_path / "a.bin", examples)
    return tmp_path / "a.bin", (tmp_path / "a.bin").read_bytes()


def test_the_format_is_llm_c_s(binary, examples):
    path, raw = binary
    blocks = []
    for i, x in enumerate(examples):
        body = [i, x.label, 4, len(x.context), *x.context]
        for ending in x.endings:
            body += [len(ending), *ending]
        blocks.append([65535, 2 * len(body) + 4, *body])
    want = header(20240522, 1, 3, 2 * max(map(len, blocks)))
    want += b"".join(np.array(x, "<u2").tobytes() for x in blocks)
    assert raw == want
    for a, b in zip(examples, choices.read_examples(path), strict=True):
        assert a.label == b.label and np.array_equal(a.context, b.context)
        assert all(map(np.array_equal, a.endings, b.endings))


def changed(raw, place, value, size):
    return raw[:place] + value.to_bytes(size, "little") + raw[place + size :]


@pytest.mark.parametrize("change, message", [
    (lambda x: x[:900], "the size must be at least 1024 bytes, got 900"),
    (lambda x: x[:-1], "size must be even"),
    (lambda x: x[:-2], r"example 2 must have an even size of 30 to"),
    (lambda x: x + b"\0\0", "2 bytes follow the last example"),
    (lambda x: changed(x, 0, 20240520, 4), "magic number must be 202405"),
    (lambda x: changed(x, 4, 2, 4), "version must be 1, got 2"),
    (lambda x: changed(x, 8, 2**31 - 1, 4), "count must be 1 to 1[0-9] "),
    (lambda x: changed(x, 8, 0, 4), "count must be 1 to"),
    (lambda x: changed(x, 8, 4, 4), "example 3 must begin with 65535"),
    (lambda x: changed(x, 12, 40, 4), "the header says at most 40"),
    (lambda x: changed(x, 1024, 1, 2), "example 0 must begin with 65535"),
    (lambda x: changed(x, 1026, 65534, 2), "must have an even size"),
    (lambda x: changed(x, 1026, 28, 2), "must have an even size"),
    (lambda x: changed(x, 1030, 4, 2), "a label of 0 to 3, got 4 and 4"),
    (lambda x: changed(x, 1032, 5, 2), "must have 4 endings"),
    (lambda x: changed(x, 1034, 60000, 2), "text of 60000 tokens cannot"),
    (lambda x: changed(x, 1034, 0, 2), "a text of 0 tokens cannot fit"),
])  # fmt: skip
def test_bad_files(binary, change, message):
    path, raw = binary
    path.write_bytes(change(raw))
    refused(message, choices.read_examples, path)


@pytest.mark.parametrize("line, message", [
    ("[]", "must be a JSON object, got list"),
    ("{", "must be JSON"),
    ({"endings": ["a"] * 4, "label": 0}, "must have a field 'ctx'"),
    ({"ctx": 3}, "'ctx' must be text, got int"),
    ({"ctx": "a", "endings": ["a"] * 3, "label": 0}, "list of four"),
    ({"ctx": "a", "endings": "abcd", "label": 0}, "list of four"),
    ({"ctx": "a", "endings": [1] * 4, "label": 0}, "must be text, got"),
    ({"ctx": "a", "endings": ["a"] * 4, "label": 4}, "must be 0 to 3"),
    ({"ctx": "a", "endings": ["a"] * 4}, "must be 0 to 3, got None"),
    ({"ctx": "", "endings": ["a"] * 4, "label": 1}, "not be empty"),
    ({"ctx": "a", "endings": ["\ud800"] * 4, "label": 1}, "half a char"),
])  # fmt: skip
def test_bad_lines(tmp_path, line, message):
    path, byte, tally = tmp_path / "a.jsonl", tokenizer.byte(), Tally()
    good = lines_of(path).read_text()
    bad = line if isinstance(line, str) else json.dumps(line)
    path.write_text(f"{good}\n{bad}\n{bad}")
    refused(rf"a\.jsonl:4: ?.*{message}", read_examples_json, path, byte)
    found = read_examples_json(path, byte, True, tally)
    assert [x.label for x in found] == [0, 1, 2]
    assert tally.words() == "; passed over: bad records 2"
    path.write_text(bad)
    refused("holds no example", read_examples_json, path, byte, True, tally)


@pytest.mark.parametrize("examples, message", [
    ([Example(np.zeros(40_000, int), [[1]] * 4, 0)], "less than 65536 by"),
    ([Example(np.array([70_000]), [[1]] * 4, 0)], "tokens below 65536"),
    ([Example([1], [[1]] * 3, 0)], "example 0 must .* have 15 numbers"),
    ([Example([1, 2, 3], [[1]] * 3, 0)], "must have 4 endings"),
    ([Example([1], [[1]] * 4, 4)], "a label of 0 to 3, got 4 and 4"),
    ([Example([1], [[1, 2], [1], [], [1]], 0)], "of 0 tokens cannot fit"),
    ([], "no examples"),
])  # fmt: skip
def test_examples_that_cannot_be_written(tmp_path, examples, message):
    with pytest.raises(ValueError, match=message):
        choices.write_examples(tmp_path / "a.bin", examples)
    assert not list(tmp_path.iterdir())


# numbers that are none


@pytest.mark.parametrize("value", [np.nan, np.inf])
@np.errstate(all="ignore")
def test_a_loss_that_is_no_number_gets_no_score(value):
    """Neither a perplexity nor an accuracy, which argmin would find."""
    model, encoding = model_of(4, 48), tokenizer.byte()
    model.params["lnfb"][3] = value
    example = Example(np.array([1, 2]), [np.array([3, 4])] * 4, 0)
    for score in (
        lambda: list(row_losses(model, [np.arange(9)])),
        lambda: list(choices_of(model, [example])),
        lambda: score_text(model, encoding, "some text"),
    ):
        with pytest.raises(FloatingPointError, match="loss of a token is nan"):
            score()


# the command


@pytest.fixture
def saved(tmp_path, llmnb):
    model_of(1, 8, "fp32").save_checkpoint("m.bin")
    return tmp_path


def test_eval_text(saved, llmnb):
    text = "some text é\n" * 9
    (saved / "a.txt").write_text(text, "utf-8")
    with gzip.open("a.jsonl.gz", "wt") as file:
        file.write(json.dumps({"body": text}))
    ask = "eval", "m.bin", *BYTES, "--text"
    first = llmnb(*ask, "a.txt")[1]
    model = GPT2.from_checkpoint("m.bin", 1, 48)
    score = score_text(model, tokenizer.byte(), text)
    assert f"{score.loss:.4f} nats a token" in first
    assert f"{score.perplexity:.2f} a token" in first
    assert f"{score.bits_per_byte:.4f} a byte" in first
    assert "117 bytes" in first and "context 48, stride 24" in first
    again = llmnb(*ask, "a.jsonl.gz", "--field", "body")[1]
    assert again.splitlines()[3:] == first.splitlines()[3:]


def test_eval_hellaswag(saved, llmnb, binary, examples):
    one, two = (
        llmnb("eval", "m.bin", *BYTES, "--hellaswag", name)[1].splitlines()[2:]
        for name in ("a.bin", "a.jsonl")
    )
    assert one == two
    model = GPT2.from_checkpoint("m.bin", 4, 48)
    right = [x.by_mean == x.label for x in choices_of(model, examples)]
    assert f"acc_norm   {np.mean(right):.4f} +- " in one[0]


def test_eval_says_what_it_left_out(saved, llmnb):
    long = "x" * 99, ["y"] * 4, 2
    with open(lines_of(saved / "a.jsonl", [*SENTENCES, long]), "a") as file:
        file.write("\n[]")
    ask = "eval", "m.bin", *BYTES, "--skip-bad"
    passed = "passed over: bad records 1"
    cut = f"4 examples, 1 cut on the left to 48 tokens; {passed}\n"
    assert cut in llmnb(*ask, "--hellaswag", "a.jsonl")[1]
    (saved / "b.jsonl").write_text('{"text": "a<|endoftext|>b"}\n{}\n')
    out = llmnb(*ask, "--text", "b.jsonl")[1]
    more = "<|endoftext|> as ordinary text: 1 ("
    assert f"b.jsonl: 15 bytes; {passed}; {more}" in out
    out = llmnb(*ask, "--text", "b.jsonl", "--endoftext")[1]
    assert f"b.jsonl: 2 bytes; {passed}\n" in out and "tokens     2," in out


@pytest.mark.parametrize("command, message", [
    ("m.bin", "name a file: --text FILE or --hellaswag FILE"),
    ("none --text a.txt", "there is no run none"),
    ("m.bin --text a.txt --tokenizer gpt2", "tokens, the tokenizer gpt2"),
    ("m.bin --text a.txt", "m.bin: which tokenizer? None of"),
    ("m.bin --tokenizer byte --text none", "no file called none"),
    ("m.bin --tokenizer byte --text a.txt --stride 99", "lie in [1, 48]"),
    ("m.bin --tokenizer byte --text a.txt --limit -1", "at least 0"),
    ("m.bin --tokenizer byte --hellaswag none.bin", "none.bin"),
    ("m.bin --tokenizer byte --hellaswag m.bin", "magic number"),
    ("a.txt --text a.txt", "a.txt"),
])  # fmt: skip
def test_mistakes_get_one_line(saved, llmnb, monkeypatch, command, message):
    tokens = [bytes([i]) for i in range(256)] + [b"ab"]
    monkeypatch.setattr(tokenizer, "gpt2", lambda: from_tokens("", tokens))
    (saved / "a.txt").write_text("text")
    code, _, err = llmnb("eval", *command.split())
    assert code == 1 and message in err and err.count("\n") == 1


def test_more_ranks_than_windows():
    """Some have nothing to score, and all have the same bits."""
    pieces = [(True, "spam and eggs"), (True, "more")]

    def score(group):
        how = {"stride": 8, "group": group}
        return score_pieces(model_of(1, 8), tokenizer.byte(), pieces, **how)

    (one,) = rehearse(1, score)
    assert one == score_pieces(model_of(1, 8), tokenizer.byte(), pieces, 8)
    for size in (2, 5):
        assert rehearse(size, score) == [one] * size
