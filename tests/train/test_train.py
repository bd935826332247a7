"""Training: the configuration, the data, the loop, the run folder."""

import gzip
import json
import math
from dataclasses import asdict, replace
from itertools import count, cycle
from types import SimpleNamespace

import numpy as np
import pytest
from fuzz import fuzzed, refused
from hypothesis import strategies as st
from problems import assert_threads_change_no_bit
from runs import PLAIN

from llmnb.formats.shard import write_shard
from llmnb.text import tokenizer
from llmnb.train import loop
from llmnb.train.feed import Data, landmarks, loaders, make_encoding, prepare
from llmnb.train.finetune import starting_from
from llmnb.train.folder import (
    config_from,
    load_run,
    read_run,
    write_log,
)
from llmnb.train.landmarks import ngram_entropy
from llmnb.train.loop import Progress, train, train_step
from llmnb.train.options import TrainConfig, depth_shape
from llmnb.train.start import new_model


def tiny_data():
    text = b"for i in range(10):\n    print(i)\n" * 66
    tokens = np.frombuffer(text, np.uint8).astype(np.uint16)
    return Data(tokenizer.byte(), tokens[300:], tokens[:300], "a test")


def tiny_run(config=PLAIN):
    data = tiny_data()
    model = new_model(config, data.encoding.n_vocab)
    return data, model, list(train(config, model, *loaders(config, data)))


# the configuration


@pytest.mark.parametrize(("wrong", "message"), [
    ({"steps": 0}, "steps must be at least 1, got 0"),
    ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
    ({"eval_every": 0}, "eval_every must be at least 1, got 0"),
    ({"seq_len": 0}, "max_seq_len must be a positive integer"),
    ({"channels": 130}, "channels must be a multiple of num_heads"),
    ({"learning_rate": -1.0}, "learning_rate must be at least 0, got -1.0"),
    ({"learning_rate": math.nan}, "learning_rate must be at least 0, got nan"),
    ({"learning_rate": math.inf}, "at least 0 and below inf, got inf"),
    ({"warmup_fraction": 1.5}, r"warmup_fraction must lie in .0, 1., got 1.5"),
    ({"warmup_fraction": 1e307}, "warmup_fraction must lie in"),
    ({"warmup_fraction": -0.1}, "warmup_fraction must lie in"),
    ({"warmup_fraction": math.nan}, "warmup_fraction must lie in"),
    ({"final_fraction": 2.0}, r"final_fraction must lie in .0, 1., got 2.0"),
    ({"final_fraction": math.nan}, "final_fraction must lie in"),
    ({"schedule": "stairs"}, "schedule must be one of .* got 'stairs'"),
    ({"beta1": 1.0}, "beta1 must be at least 0 and below 1, got 1.0"),
    ({"beta2": -0.1}, "beta2 must be at least 0 and below 1"),
    ({"eps": -1e-8}, "eps must be at least 1e-38"),
    ({"eps": 0.0}, "eps must be at least 1e-38"),
    ({"weight_decay": math.inf}, "weight_decay .* and below inf, got inf"),
    ({"corpus": ("",)}, "corpus must be names of texts, got ''"),
    ({"clip": -1.0}, "clip must be at least 0, got -1.0"),
    ({"seed": -1}, "seed must be at least 0"),
    ({"seed": 2**32}, "seed must be at least 0 and below 4294967296"),
    ({"limit": -1}, "limit must be at least 0"),
    ({"depth": 49}, "depth must be at least 1 and below 49, got 49"),
    ({"depth": 12, "channels": 64}, "depth 12 makes channels 768, not 64"),
    ({"total_batch": 700}, "multiple of a batch's 512 tokens .* got 700"),
    ({"skip_window": 1}, "skip_window must be at least 2, got 1"),
    ({"skip_loss": -1.0}, "skip_loss must be at least 0"),
    ({"keep": 0}, "keep must be at least 1, got 0"),
    ({"save_every": -1}, "save_every must be at least 0"),
])  # fmt: skip
def test_config_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**wrong)


def test_config(tmp_path):
    """Its rates, and that a corpus alone is one."""
    for one in (str(tmp_path), tmp_path, [tmp_path], iter([tmp_path])):
        assert TrainConfig(corpus=one).corpus == (str(tmp_path),)
    config = TrainConfig(steps=100, learning_rate=1.0, warmup_fraction=0.1)
    rates = [config.rate(s) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert config.rate(100) == pytest.approx(0.1)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"steps": 100.0}, "steps must be int, got 100.0"),
    ({"steps": "3"}, "steps must be int, got '3'"),
    ({"depth": True}, "depth must be int, got True"),
    ({"overfit": "no"}, "overfit must be bool, got 'no'"),
    ({"learning_rate": None}, "learning_rate must be float, got None"),
    ({"tokenizer": b"gpt2"}, "tokenizer must be str, got b'gpt2'"),
    ({"corpus": ["a", 3]}, "corpus must be str, got 3"),
    ({"corpus": 3}, "corpus must be names of texts, got 3"),
    ({"corpus": b"a"}, "corpus must be names of texts, got b'a'"),
])  # fmt: skip
def test_config_refuses_another_kind(wrong, message):
    """A run of it could not be read back."""
    with pytest.raises(TypeError, match=message):
        TrainConfig(**wrong)


def test_a_config_is_what_its_run_keeps(tmp_path):
    given = {"corpus": tmp_path, "shards": tmp_path, "seed": np.int64(3)}
    config = TrainConfig(**given, clip=np.float32(0.5), overfit=np.True_)
    kept = json.loads(json.dumps(asdict(config)))
    assert config_from(kept) == config


CHANNELS = {
    1: 64, 4: 256, 6: 384, 8: 512, 12: 768, 13: 832, 18: 896, 24: 1024,
    36: 1280, 42: 1472, 48: 1600,
}  # fmt: skip


def test_depth():
    shapes = {depth: depth_shape(depth) for depth in range(1, 49)}
    channels = {depth: x for depth, (_, _, x) in shapes.items()}
    assert CHANNELS.items() <= channels.items()
    assert [*channels.values()] == sorted(channels.values())
    for depth, shape in shapes.items():
        assert shape == (depth, channels[depth] // 64, channels[depth])
        config = TrainConfig(depth=depth)
        assert (config.num_layers, config.num_heads, config.channels) == shape
        assert TrainConfig(**asdict(config)) == config


# landmarks


def chance(text, before, token, V, trust):
    """(1.18.4), by looking at each place of the text."""
    if not before:
        return (text.count(token) + 1) / (len(text) + V)
    n, came = len(before), []
    for i in range(len(text) - n):
        if text[i : i + n] == before:
            came.append(text[i + n])
    shorter = chance(text, before[1:], token, V, trust)
    return (came.count(token) + trust * shorter) / (len(came) + trust)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize(("known", "asked"), [(60, 40), (2, 40), (60, 2)])
def test_ngram_entropy(n, known, asked):
    """Of texts that are shorter than a run, too."""
    rng = np.random.default_rng(n)
    text, tokens = (rng.integers(0, 3, x).tolist() for x in (known, asked))
    costs = []
    for i, token in enumerate(tokens):
        before = tokens[max(0, i - n + 1) : i]
        costs.append(-np.log(chance(text, before, token, 3, 2)))
    found = ngram_entropy(text, tokens, 3, n, trust=2)
    assert found == pytest.approx(np.mean(costs))


@pytest.mark.parametrize("kind", [int, np.int64, np.uint32, np.int8])
def test_runs_that_no_number_holds(kind):
    """However the size of the vocabulary is given."""
    V, n = (100, 10) if kind is np.int8 else (2**16, 4)
    with pytest.raises(ValueError, match=f"{V} .. {n} runs do not fit"):
        ngram_entropy([0, 1], [0, 1], kind(V), kind(n))
    assert ngram_entropy([0, 1], [1], kind(4), kind(2)) == np.log(3)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"n": 0}, ValueError, "ngram_entropy: n must be at least 1, got 0"),
        ({"n": 1.5}, TypeError, "'float' object cannot be interpreted"),
        ({"n": -1}, ValueError, "ngram_entropy: n must be at least 1, got -1"),
        ({"trust": 0}, ValueError, "trust must be above 0, got 0"),
        ({"trust": np.nan}, ValueError, "trust must be above 0, got nan"),
        ({"tokens": []}, ValueError, "tokens must hold at least one token"),
        (
            {"tokens": [0, -1]},
            ValueError,
            r"tokens must lie in \[0, 3\), got -1",
        ),
        (
            {"tokens": [0, 3]},
            ValueError,
            r"tokens must lie in \[0, 3\), got 3",
        ),
        (
            {"train_tokens": [7]},
            ValueError,
            r"train_tokens must lie in \[0, 3\)",
        ),
        ({"tokens": [0.5]}, TypeError, "tokens must hold integers, got float"),
    ],
)
def test_a_table_that_cannot_be(change, error, says):
    good = {"train_tokens": [0, 1, 2], "tokens": [0, 1], "n": 2}
    with pytest.raises(error, match=says):
        ngram_entropy(**good | change, vocab_size=3)


def test_landmarks_use_the_tokens_of_validation():
    data = tiny_data()
    used = PLAIN.eval_batches * PLAIN.batch_size * PLAIN.seq_len
    changed = data.val_tokens.copy()
    changed[used + 1 :] = 255
    marks = landmarks(PLAIN, data)
    assert marks == landmarks(PLAIN, data._replace(val_tokens=changed))
    assert marks["uniform"] == pytest.approx(math.log(257))
    changed[used] = 255
    assert marks != landmarks(PLAIN, data._replace(val_tokens=changed))


# data


def test_prepare_files(tmp_path):
    """Text, and JSON lines of which one holds none."""
    lines = [{"body": "one two three " * 50}, {"body": None}]
    lines.append({"body": "four <|endoftext|> five " * 50})
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, lines)))
    (tmp_path / "b.txt").write_text("six seven " * 50, "utf-8")
    names = tuple(str(tmp_path / x) for x in ("a.jsonl.gz", "b.txt"))
    how = {"corpus": names, "field": "body", "tokenizer": "bpe"}
    config = replace(PLAIN, vocab_size=270, **how)
    with pytest.raises(ValueError, match=r"gz:2: 'body' must be text, got N"):
        prepare(config)
    said = "; passed over: bad records 1"
    more = "; <|endoftext|> as ordinary text: 50 (--endoftext takes it as the"
    for endoftext, number, end in (
        (False, 3, f"2,400 characters{said}{more} token)"),
        (True, 53, f"2,400 characters{said}"),
    ):
        data = prepare(replace(config, skip_bad=True, endoftext=endoftext))
        assert str(tmp_path) in data.source
        assert data.source.endswith(f"3 documents, {end}")
        tokens = np.concatenate([data.val_tokens, data.train_tokens])
        assert (tokens == data.encoding.eot_token).sum() == number
        text = data.encoding.decode(tokens.tolist())
        assert "three <|endoftext|>four" in text
        assert "five <|endoftext|>six" in text
    learnt = [data.encoding.decode([i]) for i in range(256, 269)]
    assert not any(x in "<|endoftext|>" for x in learnt if len(x) > 2)


def test_prepare_many_shards(tmp_path, monkeypatch):
    data = tiny_data()
    parts = {"train": data.train_tokens, "val": data.val_tokens}
    for name, tokens in parts.items():
        for k, part in enumerate(np.array_split(tokens, 3)):
            write_shard(tmp_path / f"x_{name}_{k:06}.bin", part)
    write_shard(tmp_path / "x_train_000003.bin", [1])
    config = replace(PLAIN, shards=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="such as --tokenizer gpt2"):
        prepare(replace(config, tokenizer="bpe"))
    tokenizer.save(data.encoding, tmp_path / "tokenizer.tiktoken")
    got = prepare(config)
    (tmp_path / "tokenizer.tiktoken").unlink()
    other = prepare(replace(config, tokenizer="byte"))
    for found in (got, other):
        tokens = np.array(found.train_tokens)
        assert np.array_equal(tokens[:-1], data.train_tokens)
        assert np.array_equal(np.array(found.val_tokens), data.val_tokens)
        assert found.encoding.n_vocab == 257
    batches, validation = loaders(config, got)
    assert batches.batches_per_epoch > 3
    assert len(batches.next_batch()[0]) == PLAIN.batch_size
    seen = [validation.next_batch()[1].ravel().copy() for _ in range(2)]
    assert np.isin(np.concatenate(seen), data.val_tokens).all()
    assert landmarks(config, got)["unigram"] < math.log(257)
    for path in tmp_path.glob("*_train_*"):
        write_shard(path, [1])
    with pytest.raises(ValueError, match="has 1 tokens, one batch"):
        loaders(config, prepare(replace(config, tokenizer="byte")))


@pytest.mark.parametrize("name", ["train", "val"])
def test_shards_of_another_tokenizer_are_refused(name, tmp_path):
    for part in ("train", "val"):
        write_shard(tmp_path / f"{part}.bin", [1, 300 if part == name else 2])
    config = replace(PLAIN, shards=str(tmp_path), tokenizer="byte")
    with pytest.raises(ValueError, match="the token 300, its tokenizer, byte"):
        prepare(config)


def test_an_encoding_learns_from_the_beginning(monkeypatch):
    monkeypatch.setattr("llmnb.train.feed.TOKENIZER_TEXT", 100)
    config = replace(PLAIN, tokenizer="bpe", vocab_size=258)
    encoding = make_encoding(config, ["ab " * 33 + "9", "xy " * 1000])
    assert encoding.decode_single_token_bytes(256) == b"ab"


# the loop


def test_steps_reported():
    data, _, steps = tiny_run()
    assert [s.step for s in steps] == list(range(13))
    known = [s.step for s in steps if s.val_loss is not None]
    assert known == [0, 5, 10, 12]
    assert steps[-1][3:] == (None,) * 4 and steps[-1].loss is None
    for s in steps[:-1]:
        assert s.learning_rate == PLAIN.rate(s.step)
        assert s.grad_norm > 0 and s.tokens_per_second > 0
    assert steps[0].val_loss == pytest.approx(math.log(257), abs=0.1)
    assert steps[-1].val_loss < landmarks(PLAIN, data)["uniform"] - 0.5
    batches = loaders(PLAIN, data)[0]
    alone = list(train(PLAIN, new_model(PLAIN, 257), batches))
    losses = [s.loss for s in alone]
    assert losses == [s.loss for s in steps[:-1]], "validation leaves it be"
    assert all(s.val_loss is None for s in alone)
    for best in (None, 0.5):
        at, model = Progress(best_loss=best), new_model(PLAIN, 257)
        seen = [*train(PLAIN, model, *loaders(PLAIN, data), at=at)]
        losses = [s.val_loss for s in seen if s.val_loss is not None]
        assert at.best_loss == (best or min(losses))
        assert at.last_loss == seen[-2].loss


def test_evaluate_reads_the_same_batches():
    data = tiny_data()
    model = new_model(PLAIN, 257)
    _, batches = loaders(PLAIN, data)
    first = loop.evaluate(model, batches, 3)
    batches.next_batch()
    assert loop.evaluate(model, batches, 3) == first
    everything = loop.evaluate(model, batches, batches.batches_per_epoch)
    assert loop.evaluate(model, batches, 10**6) == everything
    place = batches.state
    for none in 0, -1:
        with pytest.raises(ValueError, match=f"at least 1, got {none}"):
            loop.evaluate(model, batches, none)
    assert batches.state == place
    batches.reset()
    losses = [model.forward(*batches.next_batch()) for _ in range(3)]
    assert first == pytest.approx(np.mean(losses))


def feeding(*batches):
    """A loader that gives some batches in turn."""
    return SimpleNamespace(next_batch=cycle(batches).__next__)


# accumulation


def test_a_run_that_accumulates_takes_the_path_of_large_batches():
    """The order in which a loader cuts its text is that of its batches."""
    large = replace(PLAIN, precision="fp64", batch_size=4, eval_every=100)
    small = replace(large, batch_size=2, total_batch=64)
    runs = [tiny_run(config)[2][:-1] for config in (large, small)]
    losses = [[s.loss for s in steps] for steps in runs]
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-9)
    assert losses[0][0] - losses[0][-1] > 0.5


def test_overfit():
    config = replace(PLAIN, overfit=True, total_batch=64, steps=60)
    steps = tiny_run(replace(config, schedule="constant"))[2]
    assert steps[59].loss < 0.5 * steps[-1].val_loss < steps[0].val_loss
    whole = tiny_run(replace(config, overfit=False, steps=3))[2]
    assert whole[0].loss == steps[0].loss and whole[2].loss != steps[2].loss


# outliers


def test_z_score():
    recent = [1.0, 2.0, 3.0, 4.0]
    assert loop.z_score(recent, 2.5) == 0
    assert loop.z_score(recent, 5.0) == pytest.approx(2.5 / math.sqrt(1.25))
    assert loop.z_score(recent, 0.0) == pytest.approx(-2.5 / math.sqrt(1.25))
    assert loop.z_score([2.0, 2.0], 9.0) == 0


def shouting(batches, at):
    """A loader whose batch number `at` is random."""
    noise = np.random.RandomState(1).randint(0, 257, (2, 2, 16))
    given = (noise if k == at else batches.next_batch() for k in count())
    return SimpleNamespace(next_batch=given.__next__)


@pytest.mark.parametrize("name", ["skip_loss", "skip_norm"])
def test_an_outlier_is_skipped(name):
    config = replace(PLAIN, steps=60, skip_window=20, clip=0.0, **{name: 8.0})
    model, batches = new_model(config, 257), loaders(config, tiny_data())[0]
    at, weights, moments = Progress(), [], []
    for s in train(config, model, shouting(batches, 50), at=at):
        weights.append(model.memory.flat("params").copy())
        moments.append(model.memory.flat("m").copy())
        assert s.skipped == (s.step == 50)
        assert 0 < s.grad_norm < math.inf, "without clipping"
    assert np.array_equal(weights[50], weights[49])
    assert np.array_equal(moments[50], moments[49])
    assert not np.array_equal(weights[51], weights[50])
    assert (at.step, at.updates) == (60, 59)
    assert len(at.losses) == len(at.norms) == 20


def test_bias_correction_counts_the_updates():
    """A skipped step leaves no trace but in the schedule."""
    config = replace(PLAIN, schedule="constant", warmup_fraction=0.0)
    feed = feeding(loaders(config, tiny_data())[0].next_batch())
    one, two = new_model(config, 257), new_model(config, 257)
    train_step(config, one, feed, Progress())
    train_step(config, two, feed, Progress(step=7, updates=0))
    assert np.array_equal(*(m.memory.flat("params") for m in (one, two)))


def test_nothing_is_skipped_before_the_window_is_full():
    config = replace(PLAIN, skip_loss=1e-9, skip_norm=1e-9, skip_window=30)
    assert not any(s.skipped for s in tiny_run(config)[2])
    some = [s.skipped for s in tiny_run(replace(config, skip_window=5))[2]]
    assert some[:5] == [0] * 5 and any(some[5:-1])


# from a checkpoint


def test_starting_from_a_file(tmp_path):
    model, path = new_model(PLAIN, 257), tmp_path / "some.bin"
    model.save_checkpoint(path)
    refused("some.bin: which tokenizer.*name it", starting_from, path)
    config = starting_from(path, tokenizer="byte")
    assert (config.seq_len, config.tokenizer) == (16, "byte")
    for wrong, message in (
        ({"channels": 64}, "has channels 16, not 64"),
        ({"depth": 4}, "has num_layers 1, not 4"),
        ({"seq_len": 17}, "seq_len must be at least 1 and below 17"),
    ):
        with pytest.raises(ValueError, match=message):
            starting_from(path, **wrong)
    with pytest.raises(FileNotFoundError):
        starting_from(tmp_path / "none.bin")
    path.write_bytes(b"x" * 2000)
    refused("some.bin", starting_from, path)


# divergence


@np.errstate(all="ignore")
def test_diverging_stops_with_one_error():
    config = replace(PLAIN, learning_rate=1e30, clip=0.0, steps=50)
    with pytest.raises(FloatingPointError, match=r"is (nan|inf) at step \d+"):
        tiny_run(config)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@np.errstate(all="ignore")
def test_bad_weights_are_noticed_before_the_update(backend):
    config = replace(PLAIN, backend=backend)
    model = new_model(config, 257)
    model.params["wte"][ord("i")] = np.nan
    before = model.memory.flat("params").copy()
    batches = loaders(config, tiny_data())[0]
    with pytest.raises(FloatingPointError, match="loss is nan at step 3"):
        train_step(config, model, batches, Progress(step=3))
    after = model.memory.flat("params")
    assert np.array_equal(before, after, equal_nan=True)


def test_rerun_and_threads_give_the_same_bits():
    def work():
        model, steps = tiny_run(replace(PLAIN, backend="cpu", steps=6))[1:]
        losses = [s[:3] for s in steps[:-1] if s.val_loss is not None]
        return np.array(losses), model.memory.flat("params").copy()

    assert_threads_change_no_bit(work)


# the run folder


def test_log(tmp_path):
    steps = [loop.Step(0, 1 / 3, 2.5, 1e-3, 0.5, 1e4), loop.Step(1, None, 2.0)]
    write_log(tmp_path / "log.csv", steps)
    assert (tmp_path / "log.csv").read_text() == (
        "step,loss,val_loss,learning_rate,grad_norm,tokens_per_second,skipped"
        "\n0,0.333333333,2.5,0.001,0.5,10000,\n1,,2,,,,\n"
    )


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:1\n"


@pytest.mark.parametrize(("text", "why"), [
    ("", "this is an empty file"), ("{", "not JSON"),
    ("[]", "must hold a JSON object"), ("{}", "'config'"),
    ('{"config": {"corpus": ["x"], "stepz": 1}}', ".*stepz"),
    (POINTER, "this is a Git LFS pointer"), ("[" * 100_000, "not JSON"),
    ('{"config": [' + "[]," * 700_000 + "[]]}", "must have at most"),
], ids=range(8))  # fmt: skip
def test_a_damaged_configuration(tmp_path, text, why):
    (tmp_path / "config.json").write_text(text, "utf-8")
    refused(f"config.json.*: {why}", load_run, tmp_path)


@fuzzed(300, derandomize=True)
def test_any_configuration(tmp_path_factory, data):
    """A changed value, or changed bytes: a configuration or one error."""
    found = {"config": json.loads(json.dumps(asdict(PLAIN)))}
    name = data.draw(st.sampled_from([*found["config"]]))
    scalars = st.none() | st.booleans() | st.integers() | st.floats()
    found["config"][name] = data.draw(
        scalars | st.text() | st.lists(scalars | st.text(), max_size=2)
    )
    text = bytearray(json.dumps(found).encode())
    for at in data.draw(st.lists(st.integers(0, len(text) - 1), max_size=1)):
        text[at] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_bytes(text)
    try:
        config = read_run(path.parent)
    except ValueError as error:
        assert str(error).startswith(str(path))
    else:
        assert isinstance(config, TrainConfig)
        assert config.rate(0) >= 0 and config.micro_batches >= 1
        assert isinstance(config.tokenizer, str)


def test_a_gpus_run_is_read_in_float32_elsewhere(tmp_path, monkeypatch):
    """bf16 and tf32 mean other roundings on a CPU, or none."""
    config, asked = replace(PLAIN, backend="cuda", precision="bf16"), []
    monkeypatch.setattr("llmnb.train.folder.read_run", lambda folder: config)
    monkeypatch.setattr("llmnb.train.folder.open_encoding", lambda folder: 0)
    made = "llmnb.train.folder.GPT2.from_checkpoint"
    monkeypatch.setattr(made, lambda *args: asked.append(args[-2:]))
    (tmp_path / "model.bin").touch()
    load_run(tmp_path, backend="cpu")
    load_run(tmp_path)
    assert asked == [("cpu", "fp32"), ("cuda", "bf16")]
