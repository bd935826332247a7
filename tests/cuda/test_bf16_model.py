"""A GPT-2 that trains in bfloat16, on the simulator."""

import numpy as np
import pytest
from gpu import check_five_steps, check_gradients
from standin import check_steps

from llmnb import GPT2, GPT2Config
from llmnb.gpu.launch import to_host
from llmnb.gpu.simulator import watch
from llmnb.reference.bfloat16 import from_bfloat16, to_bfloat16

TINY = {"max_seq_len": 16, "vocab_size": 61, "num_layers": 1, "num_heads": 2}
BATCH = np.random.default_rng(3).integers(0, 61, (2, 1, 16))


def model(channels=32, T=16, **how):
    cfg = GPT2Config(channels=channels, **TINY)
    how = {"backend": "cuda", "precision": "bf16", "seed": 7} | how
    return GPT2(cfg, 1, T, **how)


def test_five_steps_go_along_those_of_float32():
    check_five_steps(model(), model(backend="cpu", precision="fp32"))


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


@pytest.mark.parametrize(
    ("cfg", "B", "T", "launches", "GB"),
    [((), 16, 1024, 360, 7.5), ("smollm2-135m", 1, 64, 900, 2.4)],
)
def test_a_step_is_one_graph(on_standin, cfg, B, T, launches, GB):
    """On the stand-in driver, of GPT-2 and of a published Llama."""
    found, nbytes = check_steps(on_standin, cfg, B, T, "bf16")
    assert found > launches
    assert GB < nbytes / 1e9 < GB + 0.1  # float32's are 11.5 of GPT-2
