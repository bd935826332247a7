"""Processes that train together, rehearsed by threads: no MPI is needed."""

import signal
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
from runs import TINY, begun, small_data

from llmnb.arena import put
from llmnb.cli import train as train_command
from llmnb.cli.__main__ import _parsed
from llmnb.cli.together import check_command
from llmnb.cli.together import together as together_within
from llmnb.config import GPT2Config
from llmnb.model.gpt2 import GPT2
from llmnb.train import run as run_module
from llmnb.train.exchange import blocks_of, exchange, shards
from llmnb.train.feed import loaders
from llmnb.train.group import ALONE, Group, Tree, waiting
from llmnb.train.loop import accumulate
from llmnb.train.machines import Machines, check_alike, find_group, launched
from llmnb.train.rehearsal import rehearse
from llmnb.train.run import follow, resume
from llmnb.train.start import checked_size, new_model

# twelve batches to an update: groups of 1, 2, 3, 4, 6 and 12 can share them
RUN = replace(
    TINY, backend="cpu", total_batch=12 * 32, steps=9, eval_every=4,
    save_every=3,
)  # fmt: skip


def words(count, size):
    """The sum of `count` letters as each of `size` ranks' owner adds it."""
    whole = Tree("({}+{})".format)
    for rank in range(size):
        tree = Tree(whole.add)
        for k in range(rank * count // size, (rank + 1) * count // size):
            tree.push(k, k + 1, f"{k:x}")
        for block in tree.blocks:
            whole.push(*block)
    return whole.whole()


def test_a_sum_does_not_tell_how_many_add():
    assert words(1, 1) == "0" and words(2, 1) == "(0+1)"
    assert words(7, 1) == "(((0+1)+(2+3))+((4+5)+6))"
    for count in range(1, 25):
        for size in range(1, count + 1):
            assert words(count, size) == words(count, 1)


def test_what_waits_and_what_is_sent():
    assert [waiting(range(n)) for n in (1, 2, 3, 4, 8)] == [0, 1, 1, 2, 3]
    assert blocks_of(range(4, 8)) == [(4, 8)]
    assert blocks_of(range(3, 6)) == [(3, 4), (4, 6)]
    for size in (1, 300, 256 * 64, 10**6 + 7):
        for ranks in (1, 2, 3, 7, 256):
            spans = shards(size, ranks)
            starts, ends = zip(*spans, strict=True)
            assert (*starts, size) == (0, *ends)
    with pytest.raises(ValueError, match="at most 256 ranks, got 257"):
        shards(1000, 257)


# a group; chapters 6.1 and 6.2 show that its bits are those of one


def together(size, folder, steps=None, again=False):
    """A run of so many ranks, begun or gone on with, and left."""

    def work(group):
        run = resume(folder, group)[0] if again else begun(group, folder, RUN)
        list(islice(follow(run), steps))
        if run.lock:
            run.lock.release()

    rehearse(size, work)


def test_a_whole_step_alone_is_refused():
    """Each rank would learn from its own batch."""

    def tried(group):
        with pytest.raises(RuntimeError, match="a group exchanges gradients"):
            new_model(RUN, 257, group).step(None, None)

    rehearse(2, tried)


def test_the_check_of_memory_knows_the_group(monkeypatch):
    asked = []
    monkeypatch.setattr("llmnb.train.start.check_room", asked.append)
    cfg = RUN.model(257)
    checked_size(RUN, cfg)
    rehearse(12, lambda group: checked_size(RUN, cfg, group))
    P = 4 * sum(x.size for x in new_model(RUN, 257).params.values())
    whole, *rest = asked[:13]
    less = pytest.approx(3 * P + 2 * P * 11 / 12, abs=2)
    assert [whole - x / 12 for x in rest] == [less] * 12, "on one machine"


def test_an_exchange_in_many_parts(monkeypatch):
    """Shards that arrive a few numbers at a time, of lengths unlike."""
    monkeypatch.setattr("llmnb.train.exchange.BUFFER", 400)
    given = np.random.default_rng(0).normal(size=(6, 1001)).astype("f4")

    def work(group):
        tree = Tree(lambda a, b: np.add(a, b, out=b))
        for k in group.share(6):
            tree.push(k, k + 1, given[k].copy())
        grads = tree.blocks[-1][2]
        exchange(group, grads, tree.blocks, 6)
        return grads[slice(*shards(1001, group.size)[group.rank])]

    tree = Tree(np.add)
    for k in range(6):
        tree.push(k, k + 1, given[k])
    whole = tree.whole()
    for size in (2, 3, 6):
        found = np.concatenate(rehearse(size, work))
        np.testing.assert_array_equal(found, whole)


# what is refused


@pytest.mark.parametrize(("size", "changes", "says"), [
    (5, lambda _: {},
     r"be a multiple of 160 tokens \(5 batches of 32\), got 384"),
    (2, lambda rank: {"seed": 42 + rank},
     "^rank 1 has another seed than rank 0: 43, not 42$"),
    (2, lambda _: {"backend": "reference"},
     "backend must be one of 'cpu', got 'reference'"),
])  # fmt: skip
def test_what_does_not_go_together(tmp_path, size, changes, says):
    def work(group):
        begun(group, tmp_path / "a", replace(RUN, **changes(group.rank)))

    with pytest.raises(ValueError, match=says):
        rehearse(size, work)
    assert not [x for x in (tmp_path / "a").iterdir() if x.name != ".lock"]


def kept(folder):
    """All that lies in a folder but its lock."""
    found = {x.name: x for x in folder.glob("*") if x.name != ".lock"}
    return {name: path.read_bytes() for name, path in found.items()}


@pytest.mark.parametrize("again", [False, True])
def test_ranks_with_other_weights_are_refused(again, tmp_path, monkeypatch):
    """A checkpoint on one machine may be another one of the same name."""
    if again:
        together(2, tmp_path / "a", steps=3)
    before = kept(tmp_path / "a")
    name = "restore" if again else "new_model"
    made = getattr(run_module, name)

    def other(*args):
        model = made(*args)
        model.params["lnfb"][0] += args[-1].rank
        return model

    monkeypatch.setattr(run_module, name, other)
    with pytest.raises(ValueError, match="^rank 1 has another checksum of"):
        together(2, tmp_path / "a", again=again)
    assert kept(tmp_path / "a") == before


def test_one_speaks_of_what_is_damaged(tmp_path, monkeypatch):
    together(2, tmp_path / "a", steps=7)
    (path,) = (tmp_path / "a").glob("state_*6.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    said, how = [], {"out": None, "force": False, "given": {}}
    args = SimpleNamespace(**how, resume=str(tmp_path / "a"))
    monkeypatch.setattr(train_command, "warn", said.append)
    rehearse(2, lambda group: train_command._resumed(args, group))
    assert len(said) == 1 and path.name in said[0]


def test_one_speaks_of_tokens_that_are_left_out(tmp_path, monkeypatch):
    model, page = tmp_path / "a.bin", tmp_path / "a.txt"
    page.write_text("a page " * 20)
    GPT2(GPT2Config(16, 300, 1, 2, 16), 1, 16, seed=1).save_checkpoint(model)
    words = ["eval", str(model), "--text", str(page), "--tokenizer", "byte"]
    command, args = _parsed(words)
    said = []
    monkeypatch.setattr("llmnb.cli.models.remark", said.append)
    rehearse(2, lambda group: command._run(args, group))
    assert len(said) == 1 and "the others are left out" in said[0]


def test_a_long_fact_is_cut_to_what_differs():
    def work(group):
        words = [f"+feature{k}" for k in range(40)]
        check_alike(group, {"features": " ".join(words[group.rank :])})

    def spaced(group):
        check_alike(group, {"text": "a word " * 20 + " " * group.rank + "end"})

    with pytest.raises(ValueError, match="nothing more, not .feature0"):
        rehearse(2, work)
    with pytest.raises(ValueError, match="another text .*: ' end', not 'end'"):
        rehearse(2, spaced)


def test_only_the_first_gets_a_whole_tensor():
    def work(group):
        m = new_model(RUN, 257, group).memory["m"]["wte"]
        assert m.collect() is None or group.first
        np.asarray(m)

    with pytest.raises(TypeError, match=r"collect\(\): this is rank 1"):
        rehearse(2, work)


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_limit_of_the_norm_is_above_0(limit):
    """One below it would turn the gradient round."""

    def work(group):
        model, batches = new_model(RUN, 257, group), loaders(RUN, small_data())
        accumulate(RUN, model, batches[0])
        model.clip_gradients(limit)

    with pytest.raises(ValueError, match="max_norm must be"):
        rehearse(2, work)


def test_a_tensor_of_another_shape_is_not_kept():
    """A single number would be spread over a part of it."""

    def work(group):
        m = new_model(RUN, 257, group).memory["m"]["wte"]
        put(m, np.ones((1, 1), np.float32))

    with pytest.raises(ValueError, match=r"put: values must have shape"):
        rehearse(2, work)


def test_an_array_that_mpi_cannot_count_is_refused():
    group = Machines.__new__(Machines)
    group._mpi = SimpleNamespace(Get_version=lambda: (3, 1))
    spans = [(0, 9), (9, 2**31)]
    for call in (
        lambda: group.spread(None, spans),
        lambda: group.exchange(None, None, spans, [True, True]),
    ):
        with pytest.raises(ValueError, match="over MPI 3.1 sends .* 2,147,48"):
            call()


def test_a_thread_that_returns_early_is_named():
    def work(group):
        if group.rank != 1:
            group.gather("is anybody there?")

    with pytest.raises(RuntimeError, match="rank 1 .* returned, and rank 0 w"):
        rehearse(3, work)


class Ended(Group):
    """Notes how a group that is not there would be left."""

    rank, size = 0, 2

    def __init__(self):
        self.said = []

    def name(self, rank):
        return f"rank {rank} here"

    def end(self, message):
        self.said.append(message)

    def close(self):
        self.said.append("goodbye")


@pytest.mark.parametrize(("error", "said"), [
    (SystemExit(141), "rank 0 here: it has left with 141"),
    (KeyboardInterrupt(), "rank 0 here: KeyboardInterrupt"),
    (ValueError("a  seed"), "rank 0 here: a seed"),
])  # fmt: skip
def test_who_leaves_early_ends_all(error, said):
    group = Ended()
    with pytest.raises(type(error)), together_within(group):
        raise error
    assert group.said == [said], "and no goodbye"
    with together_within(group):
        pass
    assert group.said[1:] == ["goodbye"]


def test_a_second_interrupt_ends_all_at_once(monkeypatch):
    """It must not end this process alone, while the others wait for it."""

    def again(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("llmnb.cli.together.time.sleep", again)
    group = Ended()
    group.rank = 1
    with pytest.raises(ValueError), together_within(group):
        raise ValueError("a seed")
    assert group.said == ["rank 1 here: a seed"]


def test_who_is_silent_may_say_anything():
    """A file whose name is not UTF-8, which the first shows, ends no group."""
    group = Ended()
    group.rank = 1
    with together_within(group):
        print("a\udcff.txt")
    assert group.said == ["goodbye"]


class Late(Group):
    """A signal comes to this process just after all have been asked."""

    def __init__(self, stop):
        self.stop = stop

    def gather(self, x):
        self.stop.signal = signal.SIGTERM
        return [x, 0]


def test_a_signal_that_comes_late_is_seen_at_the_next_step():
    """Else one process would save while the others go on."""
    stop = train_command._Stop()
    model = SimpleNamespace(group=Late(stop))
    run = SimpleNamespace(model=model)
    assert train_command._stopped(run, stop) == 0
    assert train_command._stopped(run, stop) == signal.SIGTERM


def test_a_loss_that_is_not_finite_is_everyones(tmp_path):
    def work(group):
        model = new_model(RUN, 257, group)
        if group.rank == 1:
            model.params["lnfb"][:] = np.nan
        try:
            accumulate(RUN, model, loaders(RUN, small_data())[0])
        except FloatingPointError as error:
            return str(error)

    first, second = rehearse(2, work)
    assert first == second and "loss is nan at step 0" in first


def test_who_was_launched(monkeypatch):
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == 1 and find_group() is ALONE
    monkeypatch.setenv("PMI_SIZE", "4")
    assert launched() == 4 and find_group("none") is ALONE
    with pytest.raises(ValueError, match="group must be one of .* got 'all'"):
        find_group("all")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")  # a daemon on each node
    assert launched() == 4
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    assert launched() == 1


def test_the_first_of_several_speaks_for_all(monkeypatch, llmnb):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    for rank in "013":
        monkeypatch.setenv("OMPI_COMM_WORLD_RANK", rank)
        assert llmnb("train", "--stepz")[0] == 2
        assert llmnb("info", "--depth", "-1")[0] == 1
    assert waits == [0, 0, 2, 2, 6, 6]


def test_only_training_on_gpus_takes_nccl():
    args = SimpleNamespace(group="nccl", given={})
    with pytest.raises(ValueError, match="nccl is for `llmnb train` on GPUs"):
        check_command(args, ALONE)
