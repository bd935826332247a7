"""Adapters beside frozen weights: gradients, steps, merging, files."""

import json
from functools import partial

import numpy as np
import problems
import pytest

import llmnb
from llmnb.formats.safetensors import TensorFile, write_tensors
from llmnb.model import lora
from llmnb.model.lora import LoRA, load_adapters, merge, save_adapters

B, T = 2, 7
CONFIGS = {
    "gpt2": llmnb.GPT2Config(16, 61, 2, 2, 24),
    "llama": llmnb.LlamaConfig(16, 61, 2, 4, 24, num_kv_heads=2, head_size=6),
    "tied": llmnb.LlamaConfig(16, 61, 2, 4, 24, head_size=6, tied=True),
    "qwen2": llmnb.Qwen2Config(16, 61, 2, 4, 24, num_kv_heads=1, head_size=8),
    "qwen3": llmnb.Qwen3Config(16, 61, 2, 4, 24, num_kv_heads=1, head_size=8),
    "gemma2": llmnb.Gemma2Config(16, 61, 2, 4, 24, head_size=6, window=3),
}


batch = partial(problems.batch, CONFIGS["gpt2"], B, T)


def moved(cfg, backend="reference", precision="fp64", **how):
    """A LoRA whose adapters do something."""
    model = LoRA(cfg, B, T, backend, precision, **({"rank": 3} | how))
    rng = np.random.default_rng(1)
    for x in model.adapters.values():
        x += rng.normal(scale=0.1, size=x.shape)
    return model


near = partial(np.testing.assert_allclose, rtol=0, atol=1e-12)


def trained(model, steps=3):
    how = {"learning_rate": 1e-2}
    return [model.step(*batch(i), step=i + 1, **how)[0] for i in range(steps)]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_new_adapter_changes_nothing(name):
    ours = LoRA(CONFIGS[name], B, T, "reference", "fp64")
    plain = llmnb.GPT2(CONFIGS[name], B, T, "reference", "fp64")
    assert ours.forward(*batch()) == plain.forward(*batch())
    assert np.array_equal(ours.logits, plain.logits)


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_cpu_computes_what_the_reference_does(name, precision):
    limit = {"fp64": 1e-12, "fp32": 1e-4}[precision]
    ours = trained(moved(CONFIGS[name], "cpu", precision))
    want = trained(moved(CONFIGS[name], "reference", "fp64"))
    np.testing.assert_allclose(ours, want, rtol=limit)


def test_no_step_changes_a_weight():
    model = moved(CONFIGS["tied"])
    before = {key: x.copy() for key, x in model.params.items()}
    losses = trained(model, 4)
    assert len(set(losses)) == 4
    for key, x in model.params.items():
        assert np.array_equal(x, before[key]), key


def test_gradients_of_two_batches_add_up():
    model, total = moved(CONFIGS["llama"]), {}
    for i in range(2):
        model.forward(*batch(i))
        model.backward()
        for key in model.adapters:
            total[key] = total.get(key, 0) + model.grads[key] / 2
    for i in range(2):
        model.forward(*batch(i))
        model.backward(add=i > 0, share=0.5)
    for key in model.adapters:
        near(model.grads[key], total[key])


def test_only_named_targets_decay():
    def after(decay):
        model = moved(CONFIGS["llama"], targets=("qkvw", "fcw"))
        how = {"learning_rate": 1e-2, "weight_decay": 0.5}
        model.step(*batch(), step=1, decay=decay, **how)
        return model.adapters

    none, one, all_ = after([]), after(["fcw", "wte"]), after(None)
    assert np.array_equal(none["qkvw.up"], one["qkvw.up"])
    assert not np.array_equal(none["fcw.up"], one["fcw.up"])
    assert np.array_equal(all_["fcw.up"], one["fcw.up"])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_merged_model_computes_the_same(name):
    """And its dW gives the adapters' gradients by the chain rule."""
    model = moved(CONFIGS[name])
    plain = llmnb.GPT2(CONFIGS[name], B, T, "reference", "fp64")
    untouched, want = plain.forward(*batch()), model.forward(*batch())
    logits = model.logits.copy()
    model.backward()
    kept = {key: x.copy() for key, x in model.adapters.items()}
    merge(model)
    assert not any(model.adapters[f"{x}.up"].any() for x in model.targets)
    for key, x in plain.params.items():
        x[...] = model.params[key]
    assert abs(plain.forward(*batch()) - want) < 1e-12
    assert abs(want - untouched) > 1e-4
    near(plain.logits, logits)
    plain.backward()
    for key in model.targets:
        dw = model.scale * plain.grads[key]
        down, up = kept[f"{key}.down"], kept[f"{key}.up"]
        near(model.grads[f"{key}.down"], np.swapaxes(up, 1, 2) @ dw)
        near(model.grads[f"{key}.up"], dw @ np.swapaxes(down, 1, 2))


def test_a_merge_that_is_stopped_half_way_goes_on():
    """No block's adapters are added twice."""
    model, whole = moved(CONFIGS["llama"]), moved(CONFIGS["llama"])
    merge(whole)
    weights = model.params["fcw"]
    last = weights[1:].copy()
    last.flags.writeable = False
    model.params["fcw"] = [weights[0], last[0]]
    with pytest.raises(ValueError, match="read-only"):
        merge(model)
    model.params["fcw"] = weights
    merge(model)
    for name, want in whole.params.items():
        assert np.array_equal(model.params[name], want), name


def test_targets_may_come_one_at_a_time_and_twice():
    names = "fcw", "qkvw", "fcw"
    model = LoRA(CONFIGS["llama"], B, T, "reference", targets=iter(names))
    assert model.targets == ("fcw", "qkvw")
    assert len(model.adapters) == 4
    shapes = lora.adapter_shapes(CONFIGS["llama"], targets=iter(names))
    assert shapes.keys() == model.adapters.keys()
    assert len(set(trained(model))) == 3


def test_adapters_are_written_and_read(tmp_path):
    path = tmp_path / "adapters.safetensors"
    first = moved(CONFIGS["llama"], alpha=7, targets=("qkvw", "fcw"))
    want = first.forward(*batch())
    save_adapters(path, first)
    settings = lora.adapter_settings(path)
    assert settings == {"rank": 3, "alpha": 7, "targets": ["qkvw", "fcw"]}
    second = LoRA(CONFIGS["llama"], B, T, "reference", "fp64", **settings)
    assert second.forward(*batch()) != want
    for average in "m", "v":
        second.memory.flat(average).fill(1)
    load_adapters(path, second)
    assert second.forward(*batch()) == want
    assert not any(second.memory.flat(x).any() for x in "mv")


def test_a_checkpoint_is_the_frozen_model(tmp_path):
    plain = llmnb.GPT2(CONFIGS["tied"], B, T, "reference", "fp64")
    plain.save_checkpoint(tmp_path / "model.safetensors")
    file = tmp_path / "model.safetensors"
    how = {"rank": 2, "targets": ("fcw",)}
    model = LoRA.from_checkpoint(file, B, T, "reference", "fp64", **how)
    want = plain.forward(*batch())
    assert abs(model.forward(*batch()) - want) < 1e-6
    assert model.rank == 2 and set(model.adapters) == {"fcw.down", "fcw.up"}
    assert trained(model, 3)[-1] != want


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"rank": 0}, "rank must be 1 to 24, got 0"),
        ({"rank": 25}, "rank must be 1 to 24, got 25"),
        ({"rank": 2.0}, "rank must be 1 to 24, got 2.0"),
        ({"alpha": 0}, "alpha must be above 0"),
        ({"targets": ()}, "at least one weight"),
        ({"targets": ("wte",)}, "must be one of 'qkvw', .*got 'wte'"),
        ({"targets": ("ln1w",)}, "got 'ln1w'"),
        ({"backend": "cuda"}, "backend must be one of 'cpu', 'reference'"),
    ],
)
def test_what_makes_no_sense_is_refused(how, says):
    with pytest.raises(ValueError, match=says):
        LoRA(CONFIGS["llama"], B, T, **how)


def changed(path, change):
    """A file of adapters with another record."""
    file = TensorFile(path)
    tensors = {name: file[name] for name in file.names}
    record = json.loads(file.metadata["record"])
    note = {"format": lora.ADAPTERS} | change(tensors, record)
    write_tensors(path, tensors, note | {"record": json.dumps(record)})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t, r: {"format": "x"}, "its format must be"),
        (lambda t, r: r.pop("rank") and {}, "holds no adapters: 'rank'"),
        (lambda t, r: r.update(rank=4) or {}, "rank is 4, the model's is 3"),
        (lambda t, r: r["model"].update(channels=8) or {}, "model is "),
        (lambda t, r: t.pop("fcw.up") is None or {}, "has no fcw.up"),
        (
            lambda t, r: t.update({"fcw.up": t["fcw.up"][:1]}) or {},
            r"fcw.up must have shape",
        ),
        (
            lambda t, r: t["fcw.up"].fill(np.nan) or {},
            "fcw.up is nan",
        ),
        (  # finite, but not as a float32
            lambda t, r: t["fcw.up"].fill(1e300) or {},
            "fcw.up is inf",
        ),
    ],
)  # fmt: skip
def test_adapters_that_do_not_fit_are_refused(change, says, tmp_path):
    path, model = tmp_path / "a.safetensors", moved(CONFIGS["llama"])
    save_adapters(path, model)
    changed(path, change)
    model = moved(CONFIGS["llama"], precision="fp32")
    before = model.adapters["qkvw.up"].copy()
    with pytest.raises(ValueError, match=says) as error:
        load_adapters(path, model)
    assert str(path) in str(error.value)
    assert np.array_equal(model.adapters["qkvw.up"], before)
