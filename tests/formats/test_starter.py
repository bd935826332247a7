"""llm.c's starter pack: its files, and the acceptance test that reads them.

The pack is made here from what PyTorch computed (parity_narrow.npz), byte
by byte, and not by the functions under test.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from fuzz import header, put_number, refused

from llmnb.config import GPT2Config
from llmnb.formats import starter
from llmnb.formats.starter import accept, read_debug_state, relative_error
from llmnb.model.tensors import parameter_shapes

DATA = Path(__file__).parents[1] / "data"
CFG = GPT2Config(19, 67, 3, 7, 21)
NAMES = list(parameter_shapes(CFG))
B, T, V = 1, 19, 67


@pytest.fixture(scope="module")
def recorded():
    """What PyTorch computed in ten steps, with llm.c's settings."""
    with np.load(DATA / "parity_narrow.npz") as file:
        arrays = dict(file)
    case = json.loads(str(arrays["meta"]))["case"]
    assert GPT2Config(**case["model"]) == CFG
    assert case["learning_rate"] == 1e-4 and case["betas"] == [0.9, 0.999]
    assert case["weight_decay"] == 0.01 and case["decay"] == "all"
    assert case["max_norm"] is None
    return arrays


@pytest.fixture
def pack(recorded, tmp_path):
    """A starter pack of the recorded model, and its arrays."""
    a = recorded
    weights = [a[f"initial.{n}"].astype("<f4").tobytes() for n in NAMES]
    raw = header(20240326, 3, 19, V, 3, 7, 21, 128) + b"".join(weights)
    (tmp_path / "m.bin").write_bytes(raw)
    tokens = a["tokens"].astype("<i4")
    held = [tokens[:, :-1], tokens[:, 1:]]
    floats = [a["logits.fp32"], a["losses.fp32"][0]]
    floats += [a[f"grads.fp32.{n}"] for n in NAMES]
    held += [np.asarray(x, "<f4") for x in floats]
    raw = header(20240327, 2, B, T) + b"".join(x.tobytes() for x in held)
    (tmp_path / "m_debug_state.bin").write_bytes(raw)
    losses = "".join(f"{x:.6f}\n" for x in a["losses.fp32"])
    (tmp_path / "m_losses.txt").write_text(losses)
    return tmp_path


# the acceptance test


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_pack_of_pytorchs_is_accepted(pack, backend):
    checks = list(accept(pack, backend))
    names = [f"loss {i}" for i in range(1, 11)]
    assert [c.name for c in checks] == ["logits", "loss", *NAMES, *names]
    assert all(c.ok for c in checks)
    assert max(c.error / c.allowed for c in checks) < 0.25


def failing(pack):
    return [c.name for c in accept(pack, "reference") if not c.ok]


def change(pack, at, by):
    """Add to one float32 of the debug state, counted behind the header."""
    raw = bytearray((pack / "m_debug_state.bin").read_bytes())
    numbers = np.frombuffer(raw, "<f4", offset=1024)
    assert numbers[at] != 0
    numbers[at] += by
    (pack / "m_debug_state.bin").write_bytes(raw)


LOGITS_AT = 2 * B * T
LOSS_AT = LOGITS_AT + B * T * V
GRADS_AT = LOSS_AT + 1


@pytest.mark.parametrize(("changes", "fails"), [
    ({LOGITS_AT + 70: 1e-4}, ["logits"]),  # llm.c allows 1e-2
    ({LOSS_AT: 1e-3}, ["loss"]),
    ({LOGITS_AT + 70: np.nan, GRADS_AT: np.nan}, ["logits", "wte"]),
])  # fmt: skip
def test_a_wrong_number_is_caught(pack, changes, fails):
    for at, by in changes.items():
        change(pack, at, by)
    assert failing(pack) == fails


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_gradient_is_caught(pack, recorded, name):
    shapes = parameter_shapes(CFG)
    before = NAMES[: NAMES.index(name)]
    at = GRADS_AT + sum(int(np.prod(shapes[n])) for n in before)
    want = recorded[f"grads.fp32.{name}"].ravel()
    largest = int(np.abs(want).argmax())
    change(pack, at + largest, 1e-3 * float(want[largest]))
    assert failing(pack) == [name]


@pytest.mark.parametrize("step", [1, 2, 10])
def test_a_wrong_later_loss_is_caught(pack, step):
    losses = (pack / "m_losses.txt").read_text().split()
    losses[step - 1] = str(float(losses[step - 1]) + 1e-3)  # llm.c: 1e-2
    (pack / "m_losses.txt").write_text(" ".join(losses))
    assert failing(pack) == [f"loss {step}"]


def test_a_wrong_step_of_adamw_is_caught(pack, monkeypatch):
    def counts_from_2(self, lr, beta1, beta2, eps, decay, step):
        update(self, lr, beta1, beta2, eps, decay, step + 1)

    update = starter.GPT2.update
    monkeypatch.setattr(starter.GPT2, "update", counts_from_2)
    assert failing(pack) == [f"loss {i}" for i in range(2, 11)]


def test_the_losses_of_gpt2_are_known(pack):
    cfg, gone = GPT2Config(), pack / "none.txt"
    tokens = np.zeros((4, 64), np.int32)
    state = starter.DebugState(tokens, tokens, None, 5.2700073, {})
    assert starter._expected(gone, cfg, state) == starter.LOSSES
    for other in (
        state._replace(loss=10.9),  # random weights
        state._replace(tokens=np.zeros((4, 32), np.int32)),
    ):
        assert starter._expected(gone, cfg, other) == [None] * 10
    assert starter._expected(gone, CFG, state) == [None] * 10


@pytest.mark.parametrize(
    ("text", "says"),
    [("1 2 3", "10 losses, got 3"), ("a", "could not"), ("\xff", "could not")],
)
def test_losses_that_are_none(pack, text, says):
    (pack / "m_losses.txt").write_text(text, "latin-1")
    with pytest.raises(ValueError, match=f"m_losses.txt: .*{says}"):
        list(accept(pack, "reference"))


def test_a_folder_without_a_pack(pack):
    with pytest.raises(FileNotFoundError, match="no folder .*none"):
        list(accept(pack / "none"))
    (pack / "empty").mkdir()
    with pytest.raises(ValueError, match="must hold one file .*, got 0"):
        list(accept(pack / "empty"))
    raw = (pack / "m_debug_state.bin").read_bytes()
    (pack / "n_debug_state.bin").write_bytes(raw)
    with pytest.raises(ValueError, match="must hold one file .*, got 2"):
        list(accept(pack))
    (pack / "m_debug_state.bin").unlink()
    with pytest.raises(FileNotFoundError, match="n.bin"):
        list(accept(pack))


def test_the_size_of_an_error():
    want = np.array([1.0, -50.0, 3.0], np.float32)
    assert relative_error(want, want) == 0
    assert relative_error(want + np.float32(0.5), want) == pytest.approx(0.01)
    assert relative_error(np.full(3, 1e-8), np.zeros(3)) == pytest.approx(1e-5)
    assert np.isnan(relative_error(want, want * np.nan))
    for i in range(10):  # found in every place
        assert relative_error(np.ones(10) + np.eye(10)[i], np.ones(10)) == 1
        wrong = np.where(np.arange(10) == i, np.nan, 1)
        assert np.isnan(relative_error(wrong, np.ones(10)))


def test_live_packs_of_pytorchs(tmp_path):
    pytest.importorskip("torch")
    from record_starter import record

    record(tmp_path, GPT2Config(23, 200, 1, 5, 40), 2, 21)
    assert all(c.ok for c in accept(tmp_path))


# the command


def test_verify_prints_a_table(pack, llmnb):
    code, out, err = llmnb("verify", pack, "--backend", "reference")
    assert code == 0 and not err
    lines = out.splitlines()
    assert len(lines) == 29
    assert all(line.endswith(" ok") for line in lines[1:])


def test_verify_says_what_failed(pack, llmnb):
    """Without the file of losses there is no reference for the later."""
    change(pack, LOSS_AT, 1e-3)
    (pack / "m_losses.txt").unlink()
    code, out, err = llmnb("verify", pack, "--backend", "reference")
    assert code == 1 and err == "1 of 28 checks failed\n"
    verdicts = {x.split()[0]: x.split("  ")[-1] for x in out.splitlines()[1:]}
    assert verdicts["loss"] == "no reference"  # the last line that begins so
    assert out.count("no reference") == 10 and out.count("FAIL") == 1


# the debug state


def test_a_state_comes_back(pack):
    path = pack / "m_debug_state.bin"
    state = read_debug_state(path, CFG)
    assert state.logits.shape == (B, T, V) and list(state.grads) == NAMES
    with pytest.raises(ValueError, match="read-only"):
        state.logits[0] = 0
    again = pack / "again.bin"
    starter.write_debug_state(again, CFG, state)
    assert again.read_bytes() == path.read_bytes()
    again.unlink()
    bad = state._replace(logits=state.logits[:, :, 1:])
    says = r"logits must have shape \(1, 19, 67"
    with pytest.raises(ValueError, match=says):
        starter.write_debug_state(again, CFG, bad)
    bad = state._replace(targets=state.targets + np.int64(1 << 32))
    with pytest.raises(ValueError, match="state: targets must lie in"):
        starter.write_debug_state(again, CFG, bad)
    bad = state._replace(tokens=state.tokens + 0.5)
    with pytest.raises(TypeError, match="state: tokens must hold integers"):
        starter.write_debug_state(again, CFG, bad)
    assert not again.exists()


@pytest.mark.parametrize(("index", "value", "says"), [
    (0, 20240326, "magic number must be 20240327, got 20240326"),
    (1, 1, "version must be 2, got 1"),
    (2, 0, "batch size must be positive, got 0"),
    (2, -1, "batch size must be positive, got -1"),
    (2, 2**31 - 1, "size for this model must be"),
    (2, 2, "size for this model must be"),
    (3, 20, r"length must be in \[1, 19\], got 20"),
    (3, -19, "length must be in"),
    (256, 67, r"tokens must lie in \[0, 67\), got 67 at \(0, 0\)"),
    (275, -1, "targets must lie in"),
])  # fmt: skip
def test_a_bad_state_is_refused(pack, index, value, says):
    path = pack / "m_debug_state.bin"
    put_number(path, 4 * index, value)
    refused(f"m_debug_state.bin: .*{says}", read_debug_state, path, CFG)
