"""The whole model: its gradient, both backends, wrong calls, the same bits."""

from dataclasses import asdict
from threading import Thread
from types import SimpleNamespace

import numba
import numpy as np
import pytest
from llamas import FAMILIES, cfg_of
from problems import assert_threads_change_no_bit, batch, wide

from llmnb import GPT2, GPT2Config, cpu
from llmnb.backend import backend_named, noted, recorded
from llmnb.model.tensors import parameter_count

TINY = GPT2Config(
    max_seq_len=4, vocab_size=5, num_layers=2, num_heads=2, channels=4
)
ODD = GPT2Config(
    max_seq_len=39, vocab_size=331, num_layers=2, num_heads=3, channels=51
)
BACKENDS = ["reference", "cpu"]
LAYERS = [x for x in cpu.__all__ if x.endswith(("_forward", "_backward"))]


@pytest.fixture(autouse=True)
def on_the_simulator(monkeypatch):
    monkeypatch.setenv("LLMNB_CUDA", "simulator")


def run(precision="fp32"):
    """Losses and last weights of a short run."""
    model, losses = GPT2(ODD, 3, 37, precision=precision, seed=7), []
    for step in range(1, 6):
        losses.append(model.forward(*batch(ODD, 3, 37, step)))
        model.backward()
        model.clip_gradients(1.0)
        model.update(1e-3, step=step, decay=["wte", "fcw"])
    return np.array(losses), model.memory.flat("params").copy()


@pytest.fixture(scope="module")
def once():
    return run()


@pytest.fixture
def emulated(monkeypatch):
    """bfloat16 on any processor."""
    monkeypatch.setenv("LLMNB_BF16", "emulate")


def test_bf16_trains(once, emulated):
    losses, params = run("bf16")
    assert GPT2(ODD, 1, 1, precision="bf16").precision == "bf16"
    assert losses == pytest.approx(once[0], rel=2e-3)
    assert (losses != once[0]).any() and (params != once[1]).any()
    assert_threads_change_no_bit(lambda: run("bf16"))


@pytest.mark.parametrize("family", ["gpt2", *FAMILIES])
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_a_replayed_step_is_a_called_one(family, precision, monkeypatch):
    """From the second step on no layer is called, and all is done."""
    cfg = ODD if family == "gpt2" else cfg_of(family)
    models = [GPT2(cfg, 3, 7, precision=precision, seed=5) for _ in range(2)]
    models[0].ops = SimpleNamespace(**vars(cpu))  # watched, so always called

    def step(model, number):
        tokens, targets = batch(cfg, 3, 7, number)
        loss = model.forward(tokens, targets)
        model.backward(add=number == 3, share=0.25 * number)
        model.update(1e-3, step=number)
        return loss, *[x.copy() for x in model.grads.values()]

    want = [step(models[0], number) for number in (1, 2, 3, 4)]
    found = [step(models[1], 1)]
    threads = numba.get_num_threads()
    for number in (2, 3, 4):
        if number != 3:  # whose gradients are added: another pass
            for name in LAYERS:
                monkeypatch.delattr(cpu, name)
        numba.set_num_threads(1 if number == 4 else threads)
        found.append(step(models[1], number))
        numba.set_num_threads(threads)
        monkeypatch.undo()
    for x, y in zip(want, found, strict=True):
        for a, b in zip(x, y, strict=True):
            np.testing.assert_array_equal(a, b)
    a, b = (model.memory.flat("params") for model in models)
    np.testing.assert_array_equal(a, b)


def test_what_is_noted_down():
    """Only this thread's calls, and none once it is over or has failed."""
    elsewhere = Thread(target=noted, args=(print, "elsewhere"))

    def work(fails=False):
        noted(elsewhere.start)
        elsewhere.join()
        noted(max, 1, 2)
        if fails:
            raise KeyboardInterrupt

    calls = recorded(work)
    assert calls == [(elsewhere.start, ()), (max, (1, 2))]
    assert noted(min, 3, 4) == 3 and len(calls) == 2
    elsewhere = Thread(target=print)
    with pytest.raises(KeyboardInterrupt):
        recorded(lambda: work(fails=True))
    assert recorded(lambda: noted(max, 5, 6)) == [(max, (5, 6))]


def test_bf16_on_a_processor_without_it(once, monkeypatch):
    """One warning, and float32 to the last bit."""
    monkeypatch.setattr(cpu, "has_bf16", lambda: False)
    message = r"no bfloat16 products \(AVX512-BF16\); computing in fp32"
    with pytest.warns(UserWarning, match=message) as seen:
        losses, params = run("bf16")
    assert len(seen) == 1 and seen[0].filename == __file__
    assert (losses == once[0]).all() and (params == once[1]).all()
    with pytest.warns(UserWarning, match=message):
        assert GPT2(TINY, 2, 3, precision="bf16").precision == "fp32"


SHARED = [
    (cfg, backend, "fp64", 1e-12)
    for cfg in (TINY, cfg_of("llama", 21), cfg_of("gemma2", 21))
    for backend in BACKENDS
]


@pytest.mark.parametrize(
    ("cfg", "backend", "precision", "tolerance"),
    [*SHARED, (TINY, "cuda", "fp32", 1e-5)],
)
def test_parts_of_a_batch_add_up(cfg, backend, precision, tolerance):
    """Every gradient of two halves, each with its share, is the whole's."""
    whole, half = (wide(GPT2(cfg, B, 3, backend, precision)) for B in (4, 2))
    tokens, targets = batch(cfg, 4, 3)
    whole.forward(tokens, targets)
    whole.backward()
    for rows in (slice(0, 2), slice(2, 4)):
        half.forward(tokens[rows], targets[rows])
        half.backward(add=rows.start > 0, share=0.5)
    for name, want in whole.grads.items():
        got, want = np.array(half.grads[name]), np.array(want)
        assert np.abs(got - want).max() < tolerance * np.abs(want).max(), name


@pytest.mark.parametrize("decay", [None, ["wte", "fcprojw"], []])
@pytest.mark.parametrize(
    ("backend", "precision", "tolerance"),
    [("cpu", "fp64", 1e-15), ("cuda", "fp32", 1e-6)],
)
def test_decay_reaches_the_tensors_named(decay, backend, precision, tolerance):
    """With no gradient, a step multiplies what decays and nothing else."""
    model = wide(GPT2(TINY, 1, 3, backend, precision))
    before = {name: np.array(x) for name, x in model.params.items()}
    model.forward(*batch(TINY, 1, 3))
    model.backward(share=0.0)
    model.update(0.1, weight_decay=0.5, step=1, decay=decay)
    for name, x in model.params.items():
        factor = 0.95 if decay is None or name in decay else 1.0
        np.testing.assert_allclose(x, factor * before[name], rtol=tolerance)


@pytest.mark.parametrize("whole", [True, False])
def test_names_of_decay_that_can_be_read_once(whole):
    ends, names = [], ["wte", "fcw"]
    for decay in (names, iter(names)):
        model, pair = GPT2(TINY, 2, 3, "reference"), batch(TINY, 2, 3)
        how = {"weight_decay": 0.5, "learning_rate": 0.1, "decay": decay}
        if whole:
            model.step(*pair, **how)
        else:
            model.forward(*pair)
            model.backward()
            model.update(**how)
        ends.append(model.memory.flat("params"))
    assert (ends[0] == ends[1]).all()


def test_decay_of_a_tensor_that_is_none():
    model = GPT2(TINY, 1, 3)
    before = model.memory.flat("params").copy()
    for decay in (["wet"], "wte"):
        with pytest.raises(ValueError, match="a name in decay must be one of"):
            model.update(decay=decay)
    assert (model.memory.flat("params") == before).all()


SHAPE = r"must have shape \(2, 3\), got"
RANGE = r"must lie in \[0, 5\), got"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("tokens", "error", "says"),
    [
        (np.zeros((2, 4), int), ValueError, rf"{SHAPE} \(2, 4\)"),
        ([0, 1, 2], ValueError, rf"{SHAPE} \(3,\)"),
        ([[0, 1, 2], [0, 5, 1]], ValueError, rf"{RANGE} 5 at \(1, 1\)"),
        ([[0, 1, 2], [0, -1, 1]], ValueError, rf"{RANGE} -1 at \(1, 1\)"),
        (np.zeros((2, 3)), TypeError, "must hold integers, got float64"),
        (None, ValueError, rf"{SHAPE} \(\)"),
    ],
)
def test_bad_tokens(backend, tokens, error, says):
    model = GPT2(TINY, 2, 3, backend)
    good = np.zeros((2, 3), int)
    with pytest.raises(error, match=f"GPT2.forward: tokens .*{says}"):
        model.forward(tokens, good)
    with pytest.raises(error, match=f"GPT2.forward: targets .*{says}"):
        model.step(good, tokens)  # forward does without targets


@pytest.mark.parametrize("refused", [True, False])
@pytest.mark.parametrize("backend", ["reference", "cuda"])
def test_a_batch_is_kept_until_the_next(refused, backend):
    """A refused one leaves no trace, and the caller's arrays are copied."""
    model = wide(GPT2(TINY, 2, 3, backend))
    tokens, targets = batch(TINY, 2, 3)
    model.forward(tokens, targets)
    model.backward()
    want = np.array(model.memory.flat("grads"))
    model.forward(tokens, targets)
    if refused:
        with pytest.raises(ValueError, match="targets must lie in"):
            model.forward((tokens + 1) % 5, targets + 9)
    tokens[:], targets[:] = 0, 0
    model.backward()
    assert (np.array(model.memory.flat("grads")) == want).all()


@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda"])
def test_calls_out_of_order(backend):
    model = GPT2(TINY, 2, 3, backend)
    tokens, targets = batch(TINY, 2, 3)
    before = np.array(model.memory.flat("params"))
    calls = {
        "logits": (lambda: model.logits, "there are none .* call forward"),
        "backward": (model.backward, r"call forward\(tokens, targets\) first"),
        "update": (model.update, "call backward first"),
        "clip_gradients": (lambda: model.clip_gradients(1.0), "call backward"),
    }

    def refused(*names):
        for name in names:
            call, says = calls[name]
            with pytest.raises(RuntimeError, match=f"GPT2.{name}: {says}"):
                call()

    refused(*calls)
    assert model.forward(tokens) is None and model.logits.shape == (2, 3, 5)
    refused("backward", "update", "clip_gradients")
    model.forward(tokens, targets)
    assert model.logits.shape == (2, 3, 5)
    refused("update", "clip_gradients")
    assert np.array_equal(np.array(model.memory.flat("params")), before)
    model.backward()
    refused("logits", "backward")
    assert model.clip_gradients(1.0) > 0
    assert not np.array(model.memory.flat("v")).any()
    model.update()
    assert np.array(model.memory.flat("v")).any()


@pytest.mark.parametrize(
    ("cut", "refused"),
    [
        ("matmul_forward", ["logits", "backward", "update"]),
        ("crossentropy_softmax_forward", ["backward", "update"]),
        ("attention_backward", ["logits", "backward", "update"]),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_what_was_cut_short_is_not_used(cut, refused, whole):
    """As when Ctrl-C ends a cell: no half of a pass is taken for a whole."""
    model, (tokens, targets) = GPT2(TINY, 2, 3), batch(TINY, 2, 3)
    model.forward(tokens, targets)  # an earlier batch, all of it there

    def interrupted(*_, **how):
        raise KeyboardInterrupt

    model.ops = SimpleNamespace(**vars(cpu) | {cut: interrupted})
    with pytest.raises(KeyboardInterrupt):
        if whole:
            model.step(tokens, targets)
        else:
            model.forward(tokens, targets)
            model.backward()
    calls = {"backward": model.backward, "update": model.update}
    for name in refused:
        with pytest.raises(RuntimeError, match=f"GPT2.{name}: "):
            calls.get(name, lambda: model.logits)()
    model.ops = cpu
    model.forward(tokens, targets)
    model.backward()
    model.update()


@pytest.mark.parametrize("whole", [True, False])
def test_gradients_that_were_cut_short_are_not_used(whole):
    """Nor where a step before them was whole."""
    model, (tokens, targets) = GPT2(TINY, 2, 3), batch(TINY, 2, 3)
    model.step(tokens, targets)
    model.forward(tokens, targets)
    model.update()  # of the step's gradients, which are all there
    before = model.memory.flat("params").copy()

    def interrupted(*_, **how):
        raise KeyboardInterrupt

    model.ops = SimpleNamespace(**vars(cpu) | {"gelu_backward": interrupted})
    with pytest.raises(KeyboardInterrupt):
        model.step(tokens, targets) if whole else model.backward()
    for call in model.update, lambda: model.clip_gradients(1.0):
        with pytest.raises(RuntimeError, match="call backward first"):
            call()
    assert np.array_equal(model.memory.flat("params"), before)
    model.ops = cpu
    model.forward(tokens, targets)
    model.backward()
    model.update()


def test_a_batch_that_was_half_copied_is_not_used(monkeypatch):
    model, (tokens, targets) = GPT2(TINY, 2, 3), batch(TINY, 2, 3)
    model.forward(tokens, targets)

    def interrupted(array, values):
        if values is targets:
            raise KeyboardInterrupt
        array[...] = values

    monkeypatch.setattr("llmnb.model.gpt2.put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.forward((tokens + 1) % 5, targets)
    with pytest.raises(RuntimeError, match="GPT2.backward: call forward"):
        model.backward()


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"step": 0}, ValueError, "step must be at least 1, got 0"),
        ({"learning_rate": -1e-3}, ValueError, "learning_rate must be at lea"),
        ({"beta2": np.nan}, ValueError, r"beta2 must be in \[0, 1\), got nan"),
        ({"weight_decay": None}, TypeError, "weight_decay must be a number"),
        ({"eps": "1e-8"}, TypeError, "eps must be a number, got str"),
        ({"max_norm": 0}, ValueError, "max_norm must be above 0, got 0"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda"])
def test_a_steps_settings_are_looked_at_first(backend, settings, error, says):
    model = GPT2(TINY, 2, 3, backend)
    with pytest.raises(error, match=f"GPT2.step: {says}"):
        model.step(*batch(TINY, 2, 3), **settings)
    with pytest.raises(RuntimeError, match="GPT2.logits: there are none"):
        _ = model.logits
    if "max_norm" not in settings:
        with pytest.raises(error, match=f"GPT2.update: {says}"):
            model.update(**settings)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"backend": "gpu"}, "backend must be one of 'reference', 'cpu', 'c"),
        ({"precision": "fp16"}, "precision must be one of 'fp32', 'fp64'"),
        ({"precision": "tf32"}, "'tf32' needs the backend 'cuda'"),
        ({"precision": "bf16", "backend": "reference"},
         "'bf16' needs the backend 'cpu'"),
        ({"precision": "fp64", "backend": "cuda"},
         "'fp64' needs the backend 'reference' or 'cpu'"),
        ({"precision": "half", "backend": "cuda"},
         "precision must be one of 'fp32', 'fp64', 'bf16', 'tf32'"),
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({"batch_size": 2.0}, "batch_size must be a positive integer, got 2"),
        ({"seq_len": -1}, "seq_len must be a positive integer, got -1"),
        ({"seq_len": 5}, "seq_len must be at most max_seq_len = 4, got 5"),
        ({"seed": -1}, "seed must lie in"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be(wrong, says):
    with pytest.raises(ValueError, match=says):
        GPT2(TINY, **{"batch_size": 2, "seq_len": 3, **wrong})


@pytest.mark.parametrize("bad", [0, 2.0, True, "3", None])
def test_a_config_is_of_whole_numbers(bad):
    says = f"num_layers must be a positive integer, got {bad!r}"
    with pytest.raises(ValueError, match=f"GPT2Config: {says}"):
        GPT2Config(num_layers=bad)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int64])
def test_sizes_of_numpy(kind):
    """Are taken, and their narrow arithmetic is left behind."""
    cfg = GPT2Config(*map(kind, (100, 120, 1, 2, 100)))
    assert cfg == GPT2Config(100, 120, 1, 2, 100)
    assert {type(x) for x in asdict(cfg).values()} == {int}
    assert parameter_count(cfg) == 144_300
    model = GPT2(cfg, kind(2), kind(99), "reference", seed=kind(7))
    assert type(model.batch_size) is type(model.seq_len) is int
    assert model.memory["acts"]["qkv"].shape == (1, 2, 99, 300)
    for wrong in np.float32(4), np.float64(4), "4", None, np.array([4]):
        with pytest.raises(ValueError, match="channels must be a positive in"):
            GPT2Config(channels=wrong)
        with pytest.raises(ValueError, match="seq_len must be a positive in"):
            GPT2(TINY, 2, wrong)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_backend_that_cannot_be(precision):
    with pytest.raises(ValueError, match="GPT2: precision "):
        backend_named("reference", precision)
