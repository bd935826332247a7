# Written by `make export` from notebooks/6_machines/05_gpus.py: edit that file.

"""A group whose models lie on GPUs: over NCCL, or through the hosts."""

__all__ = [
    "DeviceTree", "OnGPUs", "OverNCCL", "Staged", "placed", "tree_order",
]


# imports of the group
import platform

import numpy as np

from llmnb.arena import put
from llmnb.cpu.adamw import PIECES, piece_length
from llmnb.cuda.residual import residual_forward
from llmnb.cuda.sums import clip_by_pieces, square_pieces, tree_sum
from llmnb.gpu.launch import empty, missing, to_device, to_host
from llmnb.gpu.nccl import Communicator, nccl_version, new_key
from llmnb.gpu.toolkit import gpus, numba_cuda
from llmnb.model.gpt2 import GPT2
from llmnb.train.exchange import BUFFER, exchange
from llmnb.train.group import GradientTree, Tree
from llmnb.train.machines import check_alike
from llmnb.train.sharded import Sharded


# through the hosts
class Staged:
    """A group whose arrays lie on GPUs, and are sent through the hosts.

    group: the Group that sends what is on the hosts, and does all but
    `exchange` and `spread`.

    Derived in chapter 6.5.
    """

    on_gpus, in_graph = True, False  # a host's call cannot be recorded

    def __init__(self, group):
        self._group = group

    def __getattr__(self, name):
        return getattr(self._group, name)

    def exchange(self, out, array, spans, senders):
        """As of the group within, on a device's arrays."""
        lengths = [stop - start for start, stop in spans]
        ends = np.cumsum([0, *lengths]).tolist()
        there = np.empty(out.shape, out.dtype)
        if array is not None:
            parts = [to_host(array[a:b]) for a, b in spans if a < b]
            array = np.concatenate(parts)
        packed = list(zip(ends[:-1], ends[1:], strict=True))
        self._group.exchange(there, array, packed, senders)
        mine = lengths[self.rank]
        for rank, sends in enumerate(senders):
            if sends and mine:
                put(out[rank][:mine], there[rank, :mine])

    def spread(self, array, spans):
        """As of the group within, on a device's array."""
        there = np.empty(array.size, array.dtype)
        start, stop = spans[self.rank]
        if start < stop:
            there[start:stop] = to_host(array[start:stop])
        self._group.spread(there, spans)
        put(array, there)


# the list of a tree
def tree_order(held):
    """The tree of (4.13.3) over the blocks of all ranks, for `tree_sum`.

    held: of each rank a list of (start, stop). Returns int32, flat: for each
    block in order its row, where row i R + r is the i-th of rank r, and
    how many of the blocks that wait it joins.

    Derived in chapter 6.5.
    """
    steps, ranks = [], len(held)

    def join(before, array):
        steps[-1][1] += 1

    tree = Tree(join)
    for rank, blocks in enumerate(held):
        for i, (start, stop) in enumerate(blocks):
            steps.append([i * ranks + rank, 0])
            tree.push(start, stop, None)
    tree.whole()
    return np.array(steps, np.int32).reshape(-1)


# gradients that wait, on a GPU
class DeviceTree(GradientTree):
    """A `GradientTree` whose arrays lie on a GPU.

    Derived in chapter 6.5.
    """

    def _aside(self, array):
        fresh = not self._spare
        aside = empty(array.size, like=array) if fresh else self._spare.pop()
        aside.copy_to_device(array)
        return aside

    def _sum(self, before, array):
        residual_forward(array, before, array)  # float32, as gradients are
        self._spare.append(before)
        return array


# the model
class OnGPUs(Sharded):
    """A `Sharded` whose parameters, gradients and averages lie on GPUs.

    The backend is "cuda". Made as that, by OnGPUs.of(group); the group is
    one of `placed`.

    Derived in chapter 6.5.
    """

    backends, tree = ("cuda",), DeviceTree

    def _allocate(self, layout):
        landing = np.float32, {"came": (BUFFER // 4,)}
        super()._allocate(layout | {"landing": landing})
        self._orders = {}

    def exchange(self, blocks, count):
        """Sum the gradients of all processes; see train.exchange."""
        grads, came = self.memory.flat("grads"), self.memory["landing"]["came"]

        def add(out, held, came):
            if count not in self._orders:
                self._orders[count] = to_device(tree_order(held))
            rows = came.reshape(-1), self._orders[count]
            tree_sum(out, *rows, came.shape[-1])

        exchange(self.group, grads, blocks, count, came, add)

    def clip_gradients(self, max_norm):
        """As GPT2.clip_gradients, of the sum over the group."""
        self._check_gradients("clip_gradients")
        self._clip(max_norm)
        return self._norm()

    def _clip(self, max_norm):
        """Launch the clipping; nothing waits for the norm."""
        work, grads = self.memory["work"]["floats"], self._own("grads")
        R = self.group.size
        spans = [(r * PIECES // R, (r + 1) * PIECES // R) for r in range(R)]
        sums, mine = work[1 : 1 + PIECES], slice(*spans[self.group.rank])
        square_pieces(sums[mine], grads, piece_length(self.shards[-1][1]))
        self.group.spread(sums, spans)
        clip_by_pieces(grads, max_norm, work, PIECES)

    step = GPT2.step

    def _whole_step(self, max_norm, decay):
        """All of a step with one batch a rank; nothing waits for a GPU."""
        rank, ranks = self.group.rank, self.group.size
        self._forward()
        self._classify()
        self._weigh_losses(1 / ranks)
        self._backward()
        block = rank, rank + 1, self.memory.flat("grads")
        self.exchange([block], ranks)
        self._clip(max_norm)
        self._apply(decay)


# over NCCL
class OverNCCL(Staged):
    """A group whose arrays lie on GPUs, and are sent over NCCL.

    group: as for `Staged`; it hands out the key, and counts what is sent
    (what a recorded step sends again is not counted).
    Raises ImportError where there is no NCCL, ValueError where ranks have
    different ones.

    Derived in chapter 6.5.
    """

    in_graph = True

    def __init__(self, group):
        super().__init__(group)
        check_alike(group, {"version of NCCL": str(nccl_version())})
        key = group.gather(new_key() if group.first else "")[0]
        self._nccl = Communicator(group.rank, group.size, key)

    def gather(self, x):
        """As of the group within; tells, too, what has failed on a GPU."""
        self._nccl.check()
        return self._group.gather(x)

    def exchange(self, out, array, spans, senders):
        """As of the group within, on a device's arrays."""
        start, stop = spans[self.rank]
        with self._nccl.together():
            for rank, (a, b) in enumerate(spans):
                if senders[self.rank] and a < b:
                    self._nccl.send(array[a:b], rank)
                if senders[rank] and start < stop:
                    self._nccl.recv(out[rank][: stop - start], rank)
        if senders[self.rank]:
            others = sum(b - a for a, b in spans) - (stop - start)
            self._sent(others, array)

    def spread(self, array, spans):
        """As of the group within, on a device's array."""
        with self._nccl.together():
            for rank, (a, b) in enumerate(spans):
                if a < b:
                    self._nccl.broadcast(array[a:b], rank)
        start, stop = spans[self.rank]
        self._sent((self.size - 1) * (stop - start), array)

    def _sent(self, count, array):
        self._group.sent += count * array.dtype.itemsize


# a group for a backend
def placed(group, backend):
    """A Group as models of a backend need it; of GPUs each rank takes one.

    All ranks call it, before anything else is asked of a GPU. For "cuda"
    the result is over NCCL where there are GPUs, unless the group's kind is
    "mpi", and through the hosts on the simulator, unless it is "nccl"; for
    others it is the group itself. Raises ValueError where the ranks differ
    in that, or two of them have one GPU; and as `OverNCCL`.

    Derived in chapter 6.5.
    """
    kind = getattr(group, "kind", "")
    facts = {"backend": backend, "group": kind or "default"}
    if backend == "cuda":
        facts["kind of GPU"] = "simulated" if missing() else "real"
    check_alike(group, facts)
    if backend != "cuda" and kind == "nccl":
        raise ValueError(
            "--group nccl is of GPUs: it needs the backend 'cuda', got "
            f"{backend!r}"
        )
    if backend != "cuda":
        return group
    if not missing():
        _take_gpu(group, numba_cuda(), gpus())
    over = kind == "nccl" or (kind == "" and not missing())
    return (OverNCCL if over else Staged)(group)


def _take_gpu(group, real, count):
    """Make one of `count` GPUs current that no other rank has.

    real: numba.cuda.
    """
    machine = platform.node()
    before = group.gather(machine)[: group.rank].count(machine)
    real.select_device(before % count)
    mine = [machine, str(real.get_current_device().uuid)]
    taken = group.gather(mine)
    for rank, gpu in enumerate(taken):
        if taken.index(gpu) < rank:
            raise ValueError(
                f"{group.name(rank)} would share a GPU with "
                f"{group.name(taken.index(gpu))}: a machine takes as many "
                f"ranks as it has GPUs, here {count}"
            )
