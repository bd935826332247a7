"""A GPT-2 that trains in bfloat16, on the simulator."""

import json

import numpy as np
import pytest
from gpu import check_gradients

from llmnb import GPT2, GPT2Config
from llmnb.gpu.launch import to_host
from llmnb.gpu.simulator import watch
from llmnb.reference.bfloat16 import from_bfloat16, to_bfloat16

TINY = {"max_seq_len": 16, "vocab_size": 61, "num_layers": 1, "num_heads": 2}
BATCH = np.random.default_rng(3).integers(0, 61, (2, 1, 16))


@pytest.fixture(autouse=True)
def on_the_simulator(monkeypatch):
    monkeypatch.setenv("LLMNB_CUDA", "simulator")


def model(channels=32, T=16, **how):
    cfg = GPT2Config(channels=channels, **TINY)
    how = {"backend": "cuda", "precision": "bf16", "seed": 7} | how
    return GPT2(cfg, 1, T, **how)


def five_steps(model):
    how = {"learning_rate": 1e-2, "max_norm": 1.0}
    return np.array([model.step(*BATCH, step=s, **how) for s in range(1, 6)])


def test_five_steps_go_along_those_of_float32():
    """Losses within 4e-3, and the gradients' norms within 1 %."""
    half = five_steps(model())
    whole = five_steps(model(backend="cpu", precision="fp32"))
    np.testing.assert_allclose(half[:, 0], whole[:, 0], rtol=0, atol=4e-3)
    np.testing.assert_allclose(half[:, 1], whole[:, 1], rtol=1e-2)
    assert whole[-1, 0] < whole[0, 0] - 1
    assert (half[:, 0] != whole[:, 0]).any()


def test_parameters_are_float32_and_their_copies_rounded(tmp_path):
    made = model(T=3)
    made.params["wpe"].copy_to_device(np.full((16, 32), 0.1, np.float32))
    with watch(races=False):
        loss = made.forward(BATCH[0][:, :3], BATCH[1][:, :3])
    assert np.isfinite(loss)
    for name, master in made.params.items():
        assert master.dtype == np.float32
        copy = to_host(made.memory["copies"][name])
        np.testing.assert_array_equal(copy, to_bfloat16(np.asarray(master)))
    logits = to_host(made.memory["logits"]["logits"])
    np.testing.assert_array_equal(made.logits, from_bfloat16(logits)[..., :61])
    np.testing.assert_array_equal(made.logits_at(1), made.logits[:, 1])
    path = tmp_path / "model.bin"
    made.save_checkpoint(path)
    again = GPT2.from_checkpoint(path, 1, 3, backend="cpu")
    for name, master in made.params.items():
        np.testing.assert_array_equal(again.params[name], np.asarray(master))


def test_gradients_are_those_of_float32_but_for_rounding():
    whole = model(T=5, backend="cpu", precision="fp32")
    check_gradients(model(T=5), whole, BATCH[:, :, :5])


def test_a_step_leaves_the_bits_of_its_parts():
    """Though its classifier is one launch, and theirs are two."""
    whole, parts = model(T=5), model(T=5)
    batch = BATCH[:, :, :5]
    with watch(races=False) as seen:
        result = whole.step(*batch, 1.0)
    names = {kernel.__name__ for kernel, *_ in seen.launches}
    assert "_both_of_rows" in names
    assert not {"_losses_of_rows", "_slopes_of_rows"} & names
    loss = parts.forward(*batch)
    parts.backward()
    assert result == (loss, parts.clip_gradients(1.0))
    parts.update()
    a, b = (np.asarray(x.memory.flat("params")) for x in (whole, parts))
    np.testing.assert_array_equal(a, b)


def test_what_tensor_cores_do_not_take_is_refused():
    with pytest.raises(ValueError, match="multiple of 8 numbers, got 12"):
        model(channels=12)
    with pytest.raises(ValueError, match=r"\(16, 32, 64\) channels, got 8"):
        model(channels=16)


STEPS = """
import json
from llmnb import GPT2, GPT2Config
B, T, rows = 16, 1024, []
model = GPT2(GPT2Config(), B, T, "cuda", "bf16", seed=None)
batch = np.zeros((2, B, T), int)
names = ("allocations", "launches", "recorded", "recorded_copies", "replays",
         "replayed", "refusals")
for k in range(1, 4):
    driver.standin_reset()
    model.step(*batch, 1.0, step=k, decay=["wte"])
    rows.append(dict(zip(names, counts(*names))))
print(json.dumps([rows, model.memory.nbytes]))
"""


def test_a_step_of_gpt2_is_one_graph(on_standin):
    """On the stand-in driver: all kernels compiled, nothing allocated."""
    rows, nbytes = json.loads(on_standin(STEPS))
    first, second, third = rows
    for row in rows:
        assert row["allocations"] == row["recorded_copies"] == 0
        assert row["refusals"] == 0
    launches = first["launches"]
    assert launches > 30 * 12
    assert second["recorded"] == second["replayed"] == launches
    assert third["launches"] == third["recorded"] == 0
    assert (third["replays"], third["replayed"]) == (1, launches)
    assert 7.5e9 < nbytes < 7.6e9  # float32's are 11.5e9
