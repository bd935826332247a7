"""The model on a GPU, which is simulated where there is none.

Its gradients and its steps are in test_cuda_families.py.
"""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from gpu import SIMULATED, check_machine_code
from problems import batch, wide
from runs import PLAIN, cut, log_of, small_data, straight

from llmnb import GPT2, GPT2Config, cuda
from llmnb.arena import Arena, put
from llmnb.cuda import model_layout, products
from llmnb.cuda.model import fill, no_gpu
from llmnb.files import own_folder
from llmnb.formats.safetensors import TensorFile
from llmnb.gpu import launch
from llmnb.gpu.simulator import watch
from llmnb.model.decode import Decoder
from llmnb.model.generate import generate, window_logits
from llmnb.train.feed import loaders
from llmnb.train.folder import load_run, save_run
from llmnb.train.loop import Progress, evaluate, train_step
from llmnb.train.run import follow, resume
from llmnb.train.start import new_model

SMALL = GPT2Config(5, 29, 1, 2, 8)
DEEP = GPT2Config(7, 61, 2, 3, 12)
ADAMW = {"learning_rate": 1e-2, "weight_decay": 0.1, "decay": ["wte", "fcw"]}
no_gpu_here = pytest.mark.skipif(not SIMULATED, reason="there is a GPU")


def host(model, group):
    return np.asarray(model.memory.flat(group)).copy()


def test_a_step_calls_the_layers_of_whoever_watches():
    """Also one half of the classifier alone, which a whole step fuses."""
    tokens, targets = batch(SMALL, 2, 5)
    plain, watched = (GPT2(SMALL, 2, 5, "cuda") for _ in range(2))
    calls, name = [], "crossentropy_softmax_forward"

    def forward(*arrays):
        calls.append(name)
        getattr(cuda, name)(*arrays)

    watched.ops = SimpleNamespace(**vars(watched.ops) | {name: forward})
    for k in (1, 2, 3):
        settings = ADAMW | {"step": k}
        want = plain.step(tokens, targets, **settings)
        assert watched.step(tokens, targets, **settings) == want
        assert len(calls) == k
    assert (host(watched, "params") == host(plain, "params")).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_is_its_parts(precision):
    """In bfloat16 too, though its classifier is one launch, theirs are two."""
    cfg = SMALL if precision == "fp32" else GPT2Config(5, 61, 1, 2, 32)
    tokens, targets = batch(cfg, 2, 5)
    whole, parts = (GPT2(cfg, 2, 5, "cuda", precision) for _ in range(2))
    with watch(races=False) as seen:
        result = whole.step(tokens, targets, 0.5, **ADAMW)
    loss = parts.forward(tokens, targets)
    parts.backward()
    norm = parts.clip_gradients(0.5)
    parts.update(**ADAMW)
    assert result == (loss, norm) and norm > 0.5
    for group in ("params", "grads", "m", "v"):
        assert (host(whole, group) == host(parts, group)).all(), group
    names = {kernel.__name__ for kernel, *_ in seen.launches}
    if precision == "bf16":
        assert "_both_of_rows" in names
        assert not {"_losses_of_rows", "_slopes_of_rows"} & names
    with pytest.raises(RuntimeError, match="there are none"):
        _ = whole.logits
    with pytest.raises(RuntimeError, match="call forward"):
        whole.backward()
    whole.step(tokens, targets, 0.25)
    assert len(whole._machine._graphs) == 2


def test_the_same_first_weights_and_checkpoints(tmp_path):
    model, other = (GPT2(DEEP, 2, 3, x, seed=5) for x in ("cuda", "cpu"))
    assert (host(model, "params") == other.memory.flat("params")).all()
    assert not host(model, "m").any() and not host(model, "grads").any()
    assert not host(GPT2(DEEP, 1, 3, "cuda", seed=None), "params").any()
    for name in ("model.bin", "model.safetensors"):
        model.save_checkpoint(tmp_path / name)
        other.save_checkpoint(tmp_path / "other")
        for backend in ("cuda", "cpu"):
            path = tmp_path / name
            back = GPT2.from_checkpoint(path, 1, 2, backend)
            assert (host(back, "params") == host(model, "params")).all()
    same = (tmp_path / "model.bin").read_bytes()
    assert same == (tmp_path / "other").read_bytes()


@pytest.mark.parametrize(
    ("asked", "precision", "says"),
    [
        ("llmnb", "tf32", "'tf32' needs cuBLASLt: "),
        ("mkl", "fp32", "must be 'cublas' or 'llmnb', got"),
        pytest.param(
            "cublas", "fp32", "asks for cuBLASLt: ", marks=no_gpu_here
        ),
    ],
)
def test_products_that_are_not_there(asked, precision, says, monkeypatch):
    monkeypatch.setenv("LLMNB_MATMUL", asked)
    assert asked != "llmnb" or products() == "llmnb"
    with pytest.raises(ValueError, match=says):
        GPT2(SMALL, 1, 5, "cuda", precision)


@no_gpu_here
def test_without_a_gpu_one_warning_says_why(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert no_gpu() == ""
        GPT2(SMALL, 1, 5, "cuda", seed=None)
    monkeypatch.delenv("LLMNB_CUDA")
    with pytest.warns(UserWarning, match="simulator") as seen:
        GPT2(SMALL, 1, 5, "cuda", seed=None)
    assert len(seen) == 1 and seen[0].filename == __file__
    assert str(seen[0].message).startswith(f"GPT2: {launch.missing()}; ")


@pytest.mark.parametrize("sizes", [(3, 1, 4), (1, 3, 12)])
def test_layouts_agree(sizes):
    """A group the layers may take for rows of vectors begins at 16 bytes."""
    arena = GPT2(GPT2Config(3, 5, *sizes), 1, 3, "cuda", seed=None).memory
    for group, name, shape, _, at, _ in arena.table():
        if shape[-1] % 4 == 0:
            assert at % 16 == 0, (group, name)
    groups = model_layout(SMALL, 2, 5)
    assert set(groups) == {"work", "settings"}


def test_fill():
    layout = {"x": (np.float32, {"a": (3, 5), "b": (300,)})}
    arena = Arena(layout, lambda n: launch.simulated(np.zeros(n, np.uint8)))
    with watch() as seen:
        fill(arena["x"]["b"], 1 / 3)
    assert not np.asarray(arena["x"]["a"]).any()
    assert (np.asarray(arena["x"]["b"]) == np.float32(1 / 3)).all()
    check_machine_code(seen)


SIZES = {"channels": 8, "seq_len": 6, "batch_size": 1, "eval_batches": 1}
RUN = replace(PLAIN, **SIZES, steps=2, eval_every=9, backend="cuda")
RUN = replace(RUN, save_every=1, learning_rate=3e-3)


@pytest.fixture
def small_text(monkeypatch):
    data = small_data()
    monkeypatch.setattr("llmnb.train.feed.prepare", lambda config: data)
    return data


def test_a_resumed_run_is_the_undisturbed_one(tmp_path, small_text):
    """To the last bit; and the state is one that the CPU can go on from."""
    straight(tmp_path / "a", RUN)
    cut(tmp_path / "b", 1, RUN)
    other, told = resume(tmp_path / "b")
    assert not told and other.at.step == 1
    assert other.model.backend == "cuda"
    [*follow(other)]
    for name in ("state_00000001", "state_00000002"):
        files = [
            TensorFile(tmp_path / x / f"{name}.safetensors") for x in "ab"
        ]
        assert len(files[0].names) == 48
        for tensor in files[0].names:
            pair = [file[tensor] for file in files]
            assert pair[0].any() and (pair[0] == pair[1]).all(), tensor
    logs = [log_of(tmp_path / x) for x in "ab"]
    assert logs[0] == logs[1] and len(logs[0]) == 3


def test_steps_with_something_to_decide(small_text):
    """Several batches, or a limit: no step in one launch, and the CPU's."""
    for options in ({"total_batch": 12}, {"skip_norm": 5.0}):
        results = []
        for backend in ("cpu", "cuda"):
            config = replace(RUN, backend=backend, **options)
            model = new_model(config, 257)
            feed = loaders(config, small_text)[0]
            results.append(train_step(config, model, feed, Progress()))
            assert not getattr(model._machine, "_graphs", None)
        assert results[1] == pytest.approx(results[0], rel=1e-5)


def test_a_loss_that_is_not_finite(small_text):
    model, at = new_model(RUN, 257), Progress()
    put(model.params["lnfb"], np.full(8, np.nan))
    feed = loaders(RUN, small_text)[0]
    with pytest.raises(FloatingPointError, match="loss is nan at step 0"):
        train_step(RUN, model, feed, at)


def test_evaluation_and_writing(small_text, tmp_path):
    models = [wide(GPT2(RUN.model(257), 2, 6, x)) for x in ("cpu", "cuda")]
    config = replace(RUN, batch_size=2)
    losses = [evaluate(m, loaders(config, small_text)[1], 1) for m in models]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    texts = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    logits = [window_logits(m, texts) for m in models]
    assert logits[1].shape == (3, 257)
    assert np.abs(logits[1] - logits[0]).max() < 1e-4
    written = [list(generate(m, [3], 3, 0.0)) for m in models]
    written += [list(generate(Decoder.of(m), [3], 3, 0.0)) for m in models]
    assert all(text == written[0] for text in written)


def test_a_run_in_tf32_read_on_another_backend(small_text, tmp_path):
    folder = own_folder(tmp_path / "run")
    model = GPT2(RUN.model(257), 1, 6, "cuda")
    save_run(folder, replace(RUN, precision="tf32"), model, small_text, [])
    model, _, config = load_run(folder, backend="cpu")
    assert config.precision == "tf32" and model.precision == "fp32"


@no_gpu_here
@pytest.mark.parametrize("command", ["train", "generate .", "verify ."])
def test_a_command_refuses_a_gpu_that_is_not_there(
    llmnb, command, tmp_path, monkeypatch
):
    monkeypatch.delenv("LLMNB_CUDA")
    code, _, said = llmnb(*command.split(), "--backend", "cuda")
    assert code == 1 and said.count("\n") == 1
    assert f"no backend cuda here: {launch.missing()}; LLMNB_CUDA" in said
    assert not list(tmp_path.iterdir())


@no_gpu_here
def test_a_run_from_the_command_line(llmnb, tmp_path):
    """Train and write, on the simulator that was asked for."""
    text = "one two three four five six seven eight " * 40
    (tmp_path / "text.txt").write_text(text)
    sizes = "--num-layers 1 --num-heads 1 --channels 4 --seq-len 4"
    sizes += " --batch-size 1 --steps 1 --eval-batches 1 --tokenizer byte"
    ask = f"--corpus text.txt --out run --backend cuda {sizes}"
    code, out, err = llmnb("train", *ask.split())
    assert code == 0 and "1 layers, 1 heads, 4 channels" in out
    assert "arning" not in err
    ask = "run --tokens 2 --prompt one --backend cuda"
    code, out, _ = llmnb("generate", *ask.split())
    assert code == 0 and out.startswith("one")
