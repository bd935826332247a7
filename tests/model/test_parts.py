"""The parts of a block, and the table of tensors that follows from them."""

from typing import ClassVar

import numpy as np
import pytest

import llmnb
from llmnb import reference
from llmnb.book.verify import numerical_gradient
from llmnb.formats.published import write_safetensors
from llmnb.formats.safetensors import TensorFile
from llmnb.model import parts
from llmnb.model.tensors import decaying, parameter_shapes, tensor_table


def test_gpt2_decays_its_matrices_and_tables():
    names = ["wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw"]
    assert decaying(llmnb.GPT2Config()) == names


def test_who_decays_lies_first_in_memory():
    cfg = llmnb.GPT2Config(8, 20, 2, 2, 8)
    model = llmnb.GPT2(cfg, 1, 8, "reference")
    ranges = model._ranges(decaying(cfg))
    assert [x[2] for x in ranges] == [True, False]
    assert ranges[0][1] == ranges[1][0]
    assert ranges[1][1] == model.memory.flat("params").size
    assert len(model._ranges(("wte", "fcw"))) == 4
    assert model._ranges(None) == [(0, ranges[1][1], True)]


# A second architecture: one part, one preset


def rmsnorm_forward(ops, name, out, inp, w, a):
    rstd = a[f"{name}_rstd"]
    rstd[...] = 1 / np.sqrt((inp**2).mean(axis=-1) + 1e-5)
    out[...] = inp * rstd[..., None] * w[f"{name}w"]


def rmsnorm_backward(ops, name, dinp, dout, inp, w, a, dw):
    rstd = a[f"{name}_rstd"][..., None]
    hat = inp * rstd
    dw[f"{name}w"] += (dout * hat).sum(axis=(0, 1))
    dhat = dout * w[f"{name}w"]
    dinp += rstd * (dhat - hat * (dhat * hat).mean(axis=-1, keepdims=True))


def rmsnorm_tensors(cfg, name, there, stacked=True):
    how = {"stacked": stacked, "added": True, "start": 1.0}
    weight = parts.Tensor(
        f"{name}w", (cfg.channels,), f"{there}.weight", **how
    )
    return [weight]


RMSNORM = parts.Part(
    rmsnorm_tensors,
    lambda cfg, B, T, name: {f"{name}_rstd": (B, T)},
    lambda cfg, B, T: {},
    rmsnorm_forward,
    rmsnorm_backward,
)


class Toy(llmnb.GPT2Config):
    """RMSNorm instead of LayerNorm, and no biases."""

    norm: ClassVar[str] = "rmsnorm"
    bias: ClassVar[bool] = False


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(parts.NORMS, "rmsnorm", RMSNORM)


CFG = Toy(8, 13, 2, 2, 8)


def toy(**how):
    model = llmnb.GPT2(CFG, 2, 5, "reference", "fp64", **how)
    return model, *np.random.default_rng(0).integers(0, 13, (2, 2, 5))


def test_another_architecture_has_its_own_tensors():
    names = "wte wpe ln1w qkvw attprojw ln2w fcw fcprojw lnfw"
    assert [*parameter_shapes(CFG)] == names.split()
    assert not any(x.name.endswith("b") for x in tensor_table(CFG))
    model, *_ = toy()
    assert "ln1_mean" not in model.memory["acts"]


def test_another_architectures_gradient_is_right():
    model, tokens, targets = toy()
    draw = np.random.default_rng(1)
    for x in model.params.values():
        x[...] = draw.normal(scale=0.5, size=x.shape)
    model.forward(tokens, targets)
    model.backward()
    got = model.memory.flat("grads").copy()
    flat = model.memory.flat("params")
    want = numerical_gradient(lambda: model.forward(tokens, targets), flat)
    assert np.abs(got - want).max() < 1e-8


def test_another_architecture_is_written_by_its_table(tmp_path):
    model, *_ = toy(seed=5)
    path = tmp_path / "toy.safetensors"
    write_safetensors(path, CFG, model.params)
    file = TensorFile(path)
    assert len(file.names) == 4 + 2 * 6 - 1
    for x in tensor_table(CFG):
        for i in range(2) if x.stacked else [slice(x.used)]:
            want = model.params[x.name][i].astype(np.float32)
            got = file[x.there.format(i)]
            assert np.array_equal(got.T if x.turned else got, want), x.name


def test_a_block_without_biases_is_the_same_as_with_zeros():
    plain, biased = toy()[0], llmnb.GPT2Config(8, 13, 2, 2, 8)
    block = parts.block_of(biased)._replace(norm=RMSNORM)
    (w, a, _), x = plain._layers[0], np.ones((2, 5, 8))
    out, same = np.empty_like(x), np.empty_like(x)
    parts.block_forward(block, reference, out, x, w, a)
    zeros = {f"{n}b": np.zeros(len(w[f"{n}w"])) for n in ("qkv", "attproj")}
    zeros |= {f"{n}b": np.zeros(len(w[f"{n}w"])) for n in ("fc", "fcproj")}
    parts.block_forward(block, reference, same, x, w | zeros, a)
    assert np.array_equal(out, same)
