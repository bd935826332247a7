"""Groups of simulated GPUs, rehearsed by threads; NCCL has a stand-in.

The stand-in is compiled from tests/gpu/standin_libnccl.c. It moves what a
simulated GPU holds, which lies in the host's memory.
"""

import ctypes
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from runs import TINY, begun

from llmnb.config import GPT2Config
from llmnb.cuda.sums import clip_by_pieces, square_pieces, tree_sum
from llmnb.gpu import nccl
from llmnb.gpu.launch import missing, simulated, to_host
from llmnb.gpu.simulator import watch
from llmnb.train import gpus
from llmnb.train.exchange import blocks_of
from llmnb.train.gpus import OnGPUs, placed, tree_order
from llmnb.train.group import ALONE, Tree
from llmnb.train.loop import Progress, train_step
from llmnb.train.options import TrainConfig
from llmnb.train.rehearsal import rehearse
from llmnb.train.run import finish, follow, resume

pytest.importorskip("greenlet", reason="the simulator needs greenlet")
pytestmark = [
    pytest.mark.skipif(not missing(), reason="there is a GPU"),
    pytest.mark.filterwarnings("ignore:GPT2. "),
]
RUN = TrainConfig(seq_len=4, batch_size=1, total_batch=6 * 4, clip=0.5)
CFG = GPT2Config(4, 20, 1, 1, 8)


class Drawn:
    """A loader of random tokens, the same for every rank."""

    def __init__(self):
        self.stream = np.random.default_rng(0)

    def next_batch(self):
        return self.stream.integers(0, 20, (2, 1, 4))

    def skip(self, count):
        for _ in range(count):
            self.next_batch()


@pytest.fixture
def standin(nccl_path, monkeypatch):
    """The stand-in, in NCCL's place in this process; its counts at 0."""
    library = ctypes.CDLL(str(nccl_path))
    library.standin_nccl.restype = ctypes.c_long
    library.standin_nccl_refused.restype = ctypes.c_char_p
    library.standin_nccl_reset()
    nccl._library.cache_clear()  # by its name it is found now
    monkeypatch.setenv("STANDIN_PATIENCE", "60")
    yield SimpleNamespace(
        count=lambda name: library.standin_nccl(name.encode()),
        refused=lambda: library.standin_nccl_refused().decode(),
    )
    nccl._library.cache_clear()


def steps(group, config=RUN, over="", count=1):
    """Train for some steps; the losses and norms, the weights, the bytes."""
    group.kind = over
    model = OnGPUs.of(placed(group, "cuda"))(CFG, 1, 4, "cuda")
    feed, at = Drawn(), Progress()
    said = [train_step(config, model, feed, at) for _ in range(count)]
    return said, to_host(model.memory.flat("params")), group.sent


@pytest.fixture(scope="module")
def one():
    return rehearse(1, steps)[0]


def check_bits(found, one):
    """The numbers are those of one, and so many bytes are sent."""
    assert all(said == one[0] for said, *_ in found)
    assert all(np.array_equal(weights, one[1]) for _, weights, _ in found)
    ranks, size = len(found), one[1].size
    blocks = {1: 2, 2: 2, 3: 1}[ranks]
    want = 4 * (ranks - 1) * (size * (blocks + 1) + 256)  # (6.5.1)
    assert sum(sent for *_, sent in found) == want
    return want


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_over_nccl_the_bits_are_those_of_one(ranks, one, standin):
    found = rehearse(ranks, lambda group: steps(group, over="nccl"))
    assert standin.refused() == ""
    assert standin.count("bytes") == check_bits(found, one)
    assert standin.count("broadcasts") == 2 * ranks**2
    assert standin.count("sends") == standin.count("receives") > 0


WHOLE = replace(RUN, total_batch=2 * 4)  # one batch a rank of two


def test_a_whole_step_has_the_bits_of_its_parts(standin, monkeypatch):
    """Over NCCL it is one launch; through the hosts it is called in parts."""
    run, parts = [], []
    whole = OnGPUs._whole_step
    monkeypatch.setattr(
        OnGPUs, "_whole_step", lambda *x: run.append(whole(*x))
    )
    for over in ("nccl", "mpi"):
        found = rehearse(2, lambda g, over=over: steps(g, WHOLE, over, 2))
        parts.append(found)
        assert len(run) == 4  # two steps of two ranks, over NCCL alone
    for one, other in zip(*parts, strict=True):
        assert one[0] == other[0] and np.array_equal(one[1], other[1])


@pytest.mark.parametrize(("count", "ranks"), [(1, 1), (5, 5), (12, 2), (7, 3)])
def test_the_kernel_adds_as_the_tree(count, ranks):
    rng = np.random.default_rng(count)
    held = rehearse(ranks, lambda group: blocks_of(group.share(count)))
    rounds, width, size = max(map(len, held)), 40, 37
    came = rng.normal(size=(rounds, ranks, width)).astype(np.float32)
    tree = Tree(np.add)
    for rank, blocks in enumerate(held):
        for i, (start, stop) in enumerate(blocks):
            tree.push(start, stop, came[i, rank, :size])
    out = simulated(np.zeros(size, np.float32))
    with watch():
        order = simulated(tree_order(held))
        tree_sum(out, simulated(came.reshape(-1)), order, width)
    np.testing.assert_array_equal(to_host(out), tree.whole())


@pytest.mark.parametrize("size", [1, 255, 5000])
def test_the_norm_by_pieces(size):
    grads = np.random.default_rng(size).normal(size=size).astype(np.float32)
    there, work = simulated(grads), simulated(np.zeros(2000, np.float32))
    length = -(-size // 256)
    with watch():
        square_pieces(work[1:257], there, length)
        sums = to_host(work[1:257])
        clip_by_pieces(there, 0.25, work, 256)
    exact = [np.square(grads[k * length : (k + 1) * length].astype(float))
             for k in range(256)]  # fmt: skip
    np.testing.assert_allclose(sums, [x.sum() for x in exact], rtol=1e-6)
    norm = np.sqrt(sum(x.sum() for x in exact))
    assert to_host(work[:1])[0] == pytest.approx(norm, rel=1e-6)
    want = grads * min(1, 0.25 / norm)
    np.testing.assert_allclose(to_host(there), want, rtol=1e-5)


# what is refused


def pair(work):
    """work(communicator, rank) on two ranks; the errors they end in."""

    def part(group):
        key = group.gather(nccl.new_key() if group.first else "")[0]
        there = nccl.Communicator(group.rank, group.size, key)
        group.gather("both are there")
        try:
            work(there, group.rank)
        except RuntimeError as error:
            return str(error)

    return rehearse(2, part)


def numbers(count):
    return simulated(np.arange(count, dtype=np.float32))


def test_a_wrong_count_is_refused(standin):
    def work(there, rank):
        with there.together():
            (there.recv if rank else there.send)(numbers(5 + rank), 1 - rank)

    said = pair(work)
    assert said == [None, "NCCL: ncclGroupEnd: invalid argument (4)"]
    assert "rank 0 sends 5 numbers" in standin.refused()
    assert "rank 1 expects 6" in standin.refused()


def test_a_call_outside_a_group_is_refused(standin):
    said = pair(lambda there, rank: there.send(numbers(3), 1 - rank))
    assert said == ["NCCL: ncclSend: invalid usage (5)"] * 2
    assert "outside a group" in standin.refused()


def test_a_group_that_is_not_ended_is_noticed(standin):
    def work(there, rank):
        nccl._asked("ncclGroupStart")
        try:
            there.send(numbers(3), 1 - rank)
            there.check()
        finally:
            nccl._library().ncclGroupEnd()

    assert pair(work) == ["NCCL: a call failed later: invalid usage"] * 2


def test_arrays_of_the_host_are_not_sent(standin):
    def work(there, rank):
        with pytest.raises(TypeError, match="must be a device's array"):
            there.send(np.zeros(3, np.float32), 1 - rank)

    assert pair(work) == [None, None]


def test_a_rank_without_nccl_is_told(monkeypatch):
    def nowhere(*args):
        raise OSError("no such file")

    nccl._library.cache_clear()
    monkeypatch.setattr(nccl.ctypes, "CDLL", nowhere)
    with pytest.raises(ImportError, match=r"llmnb\[nccl\].*--group mpi"):
        nccl.nccl_version()


def test_what_does_not_go_together(standin, monkeypatch):
    def work(group, backend, kinds=("", "")):
        group.kind = kinds[group.rank]
        placed(group, backend)

    with pytest.raises(ValueError, match="needs the backend 'cuda', got 'cpu"):
        rehearse(2, lambda group: work(group, "cpu", ("nccl", "nccl")))
    with pytest.raises(ValueError, match="another group than rank 0: mpi"):
        rehearse(2, lambda group: work(group, "cuda", ("", "mpi")))
    here = iter(("", "LLMNB_CUDA asks for the simulator"))
    with monkeypatch.context() as patch:  # one of them has a GPU
        patch.setattr(gpus, "missing", lambda: next(here))
        with pytest.raises(ValueError, match="another kind of GPU than rank"):
            rehearse(2, lambda group: work(group, "cuda"))
    versions = iter((23203, 22000))
    monkeypatch.setattr(gpus, "nccl_version", lambda: next(versions))
    with pytest.raises(ValueError, match="another version of NCCL than rank"):
        rehearse(2, lambda group: work(group, "cuda", ("nccl", "nccl")))


def test_each_rank_takes_a_gpu_of_its_own(monkeypatch):
    """Those of a launcher that shows each rank one are told apart too."""

    def work(group, count, bound):
        chosen = []

        def device():
            mine = group.rank if bound else chosen[-1]
            return SimpleNamespace(uuid=f"GPU-{mine}")

        real = SimpleNamespace(get_current_device=device)
        real.select_device = chosen.append
        gpus._take_gpu(group, real, count)
        return chosen

    assert rehearse(2, lambda g: work(g, 2, False)) == [[0], [1]]
    assert rehearse(2, lambda g: work(g, 1, True)) == [[0], [0]]
    with pytest.raises(ValueError, match="rank 2 would share a GPU with rank"):
        rehearse(3, lambda g: work(g, 2, False))


# a run


SHORT = replace(
    TINY, backend="cuda", num_heads=1, channels=8, seq_len=4, batch_size=1,
    total_batch=2 * 4, skip_loss=0.0, skip_norm=0.0, steps=1, eval_every=2,
    eval_batches=1, save_every=1,
)  # fmt: skip


def test_a_run_goes_on_with_other_ranks(tmp_path):
    """Its state is whole; to leave the group is a change of the bits."""

    def whole(group):
        run = begun(group, tmp_path / "a", SHORT)
        assert isinstance(run.model, OnGPUs)
        list(follow(run))
        finish(run)
        return to_host(run.model.memory.flat("params"))

    def more(group):
        run, found = resume(tmp_path / "a", group)
        if group.first:
            run.lock.release()
        averages = [np.asarray(x.part) for x in run.model.memory["m"].values()]
        return found, to_host(run.model.memory.flat("params")), averages

    first = rehearse(2, whole)
    for ranks in (1, 2):
        for found, weights, averages in rehearse(ranks, more):
            assert not found and np.array_equal(weights, first[0])
            assert any(x.any() for x in averages)
    run, found = resume(tmp_path / "a", ALONE)
    run.lock.release()
    assert len(found) == 1 and "group of GPUs yes, now none" in found[0]
