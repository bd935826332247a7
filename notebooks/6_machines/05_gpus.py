# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cuda.sums: "What a group of GPUs adds up: blocks by a tree, squares by pieces."
#       gpu.nccl: "NCCL, which moves arrays from GPU to GPU, by ctypes."
#       train.gpus: "A group whose models lie on GPUs: over NCCL, or through the hosts."
# ---

# %% [markdown]
# # A group of GPUs
#
# > Each rank has a GPU; gradients and parameters go from one to the other, by
# > NCCL or through the hosts, and are added in the order of the group.
#
# *Reading time: 25 minutes. You need: [chapter 6.2](02_shards.ipynb) and a step on
# a GPU ([chapter 3.11](../3_gpu/11_step.ipynb)).*

# %% [markdown]
# ## Where we are
#
# A rank of chapter 6.2 computes on the cores of its machine. If it has a GPU, the
# gradients lie in its memory, where MPI as a rule does not reach. This chapter
# gives the group what it lacks. **No GPU has run it**: none was at hand. So it also
# says what was tried in place of one, and what that cannot show. At the end of
# it you can
#
# - say which work of a group moves to the GPU, and which stays with MPI;
# - name the two ways of a gradient from one GPU to another, and what each costs;
# - say which parts of a step of a group can be recorded as a graph;
# - tell what a rehearsal has shown from what only hardware can show.
#
# ## Setup

# %% setup
import os

os.environ["LLMNB_CUDA"] = "simulator"  # here, even where there is a GPU

import numpy as np

from llmnb.book.verify import verdict
from llmnb.train.exchange import blocks_of

# %% [markdown]
# ## What has to be done on a GPU
#
# A step of a group asks for three things between the gradient and the next forward
# pass: the exchange, which leaves to each owner the sum of its shard; the norm;
# and the spreading of the updated parameters. Each is a sending and, but for the
# last, an addition.
#
# The additions are kernels. After the exchange the owner of a shard holds rows, one
# for each block of each rank, and must add them in the order of the tree (4.13.3).
# Which rows to join is the same for all elements. So write it as a list: for each
# row, in order, where it lies and how many waiting sums it joins. A
# thread walks through that list with one element of each row, and a stack in
# memory of its own. So each number is read once, and each sum written once; to add
# two rows at a time would read and write three numbers for each addition.

# %% imports of the sums tags=["export"] module="cuda.sums"
import numpy as np

from llmnb.cuda.adamw import WARPS, ZERO, _root_of_sum, clip_scratch, shrink
from llmnb.cuda.elementwise import BLOCK
from llmnb.gpu.launch import DEVICE, device, given_work, kernel
from llmnb.gpu.simulator import cuda
from llmnb.gpu.warp import block_sum
from llmnb.shapes import shapes


# %% add rows by a list tags=["export"] module="cuda.sums"
DEPTH = 32  # blocks that wait at most, of fewer than 2^31 micro-batches


@kernel(fastmath=False)
def _tree_sum(out, came, order, width):
    i = cuda.grid(1)
    if i >= out.size:
        return
    waiting, top = cuda.local.array(DEPTH, np.float32), 0
    for k in range(0, order.size, 2):
        total = came[order[k] * width + i]
        for _ in range(order[k + 1]):
            top -= 1
            total = waiting[top] + total
        waiting[top] = total
        top += 1
    out[i] = waiting[0]


@shapes("N!, M, K of 2147483647, at least 1", DEVICE)
def tree_sum(out, came, order, width):
    """Add the rows of what came, in the order of a list.

    out: a device's float32 array, overwritten. came: flat, rows of `width`
    floats, of which the first out.size are added. order: int32, pairs of a
    row and of how many that wait it joins, as `llmnb.train.gpus.tree_order`
    makes them; not checked, for it lies on the device. Allocates nothing and
    does not wait.
    """
    _tree_sum[-(-out.size // BLOCK), BLOCK](out, came, order, width)


# %% [markdown]
# The norm of [chapter 3.10](../3_gpu/10_adamw.ipynb) lets the threads of all blocks
# stride through the whole array, and no rank has that. A group takes the pieces
# of chapter 6.1 instead, 256 of them, each summed by one block of threads. A rank
# sums those of its shard, all send each other these few numbers, and every GPU adds the
# 256 in one order. So clipping comes out alike on all of them, and where the sending
# does not wait for a host, nothing does.


# %% the squares of a piece tags=["export"] module="cuda.sums"
@device
def _at(grads, k, stop):
    return grads[k] if k < stop else ZERO


@kernel(fastmath=False)
def _square_pieces(sums, grads, length):
    parts = cuda.shared.array(WARPS, np.float32)
    start = cuda.blockIdx.x * length
    stop = min(start + length, grads.size)
    s0 = s1 = s2 = s3 = ZERO
    threads = cuda.blockDim.x
    for k in range(start + cuda.threadIdx.x, stop, 4 * threads):
        a, b = _at(grads, k, stop), _at(grads, k + threads, stop)
        c = _at(grads, k + 2 * threads, stop)
        d = _at(grads, k + 3 * threads, stop)
        s0, s1, s2, s3 = s0 + a * a, s1 + b * b, s2 + c * c, s3 + d * d
    total = block_sum((s0 + s1) + (s2 + s3), parts)
    if cuda.threadIdx.x == 0:
        sums[cuda.blockIdx.x] = total


@shapes("N!, M, at least 1", DEVICE)
def square_pieces(sums, grads, length):
    """Leave in sums the sum of squares of each piece of `length` elements.

    sums, grads: a device's float32 arrays, flat. Of a piece beyond the end
    it is 0. The length decides the order. Allocates nothing and does not wait.
    """
    warps = min(WARPS, -(-length // 128))  # four elements or more a thread
    _square_pieces[sums.size, 32 * warps](sums, grads, length)


@shapes("N!, above 0, W!", DEVICE)
def clip_by_pieces(grads, max_norm, work, pieces):
    """Clip to `max_norm` by the pieces' sums; leave the norm in work[0].

    grads: a part of a longer array, or all of it. work: as `clip_apply`
    wants it, with the sums of all pieces from work[1] on, so many.
    """
    given_work("clip_by_pieces", work, clip_scratch(), grads)
    _root_of_sum[1, BLOCK](work, pieces)
    shrink(grads, max_norm, work)


# %% [markdown]
# ## Through the hosts
#
# Now the sending. What any cluster has is MPI, and unless it was built for GPUs
# its reach ends at the host's memory. So the plainest way is down, across, and up
# again: a `Staged` group copies to its host what it sends, lets the group that it
# wraps send it, and copies to its GPU what has come. Everything else it leaves to
# that group.

# %% imports of the group tags=["export"] module="train.gpus"
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


# %% through the hosts tags=["export"] module="train.gpus"
class Staged:
    """A group whose arrays lie on GPUs, and are sent through the hosts.

    group: the Group that sends what is on the hosts, and does all but
    `exchange` and `spread`.
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


# %% [markdown]
# Each number crosses the bus to the host twice, and the GPU waits. That is slow.
# But it needs no other library, so it is what `--group mpi` means on GPUs, and
# here it has a second use: the simulator's GPU can take this way.
#
# ## The model
#
# `OnGPUs` is the `Sharded` of chapter 6.2 with the additions done by our kernels.
# The memory for what arrives is in the model's block, and the list of the tree is
# made once for each number of micro-batches: after that no step allocates on the GPU.


# %% the list of a tree tags=["export"] module="train.gpus"
def tree_order(held):
    """The tree of (4.13.3) over the blocks of all ranks, for `tree_sum`.

    held: of each rank a list of (start, stop). Returns int32, flat: for each
    block in order its row, where row i R + r is the i-th of rank r, and
    how many of the blocks that wait it joins.
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


# %% the list of six micro-batches on two ranks
print(tree_order([blocks_of(range(3)), blocks_of(range(3, 6))]))

# %% [markdown]
# Rank 0 has $0$ to $1$ and $2$; rank 1 has $3$, and $4$ to $5$. Rows 0 and 2 are
# those of rank 0. Row 1, micro-batch 3, joins two: micro-batch 2, and then the pair
# before it. Row 3 comes last, and joins the four.


# %% gradients that wait, on a GPU tags=["export"] module="train.gpus"
class DeviceTree(GradientTree):
    """A `GradientTree` whose arrays lie on a GPU."""

    def _aside(self, array):
        fresh = not self._spare
        aside = empty(array.size, like=array) if fresh else self._spare.pop()
        aside.copy_to_device(array)
        return aside

    def _sum(self, before, array):
        residual_forward(array, before, array)  # float32, as gradients are
        self._spare.append(before)
        return array


# %% the model tags=["export"] module="train.gpus"
class OnGPUs(Sharded):
    """A `Sharded` whose parameters, gradients and averages lie on GPUs.

    The backend is "cuda". Made as that, by OnGPUs.of(group); the group is
    one of `placed`.
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


# %% [markdown]
# With a batch a rank, and no update to be skipped, nothing has to be decided on the
# host between the batch and the new parameters. `_whole_step` is then all launches
# and all sending, on one stream, and can be recorded as a graph if the group's
# calls can. NCCL's can, as its manual says; through the hosts they cannot, and the
# loop calls the parts of the step one by one.
#
# ## Proof
#
# Ranks that are threads, each with a simulated GPU, share six micro-batches: one
# rank, two or three. With two, each has two blocks to send. The gradient is longer than
# the limit, so that a norm with other bits would show in every parameter.

# %% an update on simulated GPUs
import warnings

from llmnb.config import GPT2Config
from llmnb.train.loop import Progress, train_step
from llmnb.train.options import TrainConfig
from llmnb.train.rehearsal import rehearse

warnings.filterwarnings("ignore", "GPT2: LLMNB_CUDA asks")
cfg = GPT2Config(4, 20, 1, 1, 8)
config = TrainConfig(seq_len=4, batch_size=1, total_batch=6 * 4, clip=0.5)


class Drawn:
    """A loader of random tokens, the same for every rank."""

    def __init__(self):
        self.stream = np.random.default_rng(0)

    def next_batch(self):
        return self.stream.integers(0, 20, (2, 1, 4))

    def skip(self, count):
        for _ in range(count):
            self.next_batch()


def trained(group):
    """Loss and norm, the parameters, and the bytes that this rank sent."""
    there = Staged(group)
    model = OnGPUs.of(there)(cfg, 1, 4, "cuda")
    loss, _, norm, _ = train_step(config, model, Drawn(), Progress())
    return (loss, norm), to_host(model.memory.flat("params")), there.sent


found = {R: rehearse(R, trained) for R in (1, 2, 3)}
(said, weights, _) = found[1][0]
for R in (2, 3):
    verdict(f"{R} ranks", all(x[0] == said for x in found[R]),
            "loss and norm of one")  # fmt: skip
    verdict(f"{R} ranks", all(np.array_equal(x[1], weights) for x in found[R]),
            "the same bits in every parameter")  # fmt: skip
verdict("clipped", said[1] > config.clip, "the norm is above the limit")

# %% [markdown]
# One rank is here a group of one, which `--group mpi` gives without any `mpirun`. A
# process without a group adds micro-batches in place and takes the norm of
# chapter 3.10; its last bits are others. So the number of GPUs in a group is free,
# and to leave the group is a change, of which `--resume` warns.
#
# ## NCCL
#
# NVIDIA's *Collective Communications Library* sends from GPU to GPU, over NVLink
# within a machine and over the network's cards between machines, without the
# hosts' memory where the hardware allows. Its calls are put on a stream, behind
# the kernels that make the numbers and before those that read them. They return
# at once. Of its functions we need nine, and one that puts an error into words. We
# call them as they are in C:

# %% imports of NCCL tags=["export"] module="gpu.nccl"
import ctypes
import functools
from contextlib import contextmanager

import numpy as np

from llmnb.gpu.launch import address, check_device, stream_address


# %% the library tags=["export"] module="gpu.nccl"
FLOAT = 7  # ncclFloat32
_PLACE, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t


class _Key(ctypes.Structure):
    """What tells one group from another; passed as it is."""

    _fields_ = (("bytes", ctypes.c_ubyte * 128),)


_CALLS = {
    "ncclGetVersion": [ctypes.POINTER(_INT)],
    "ncclGetUniqueId": [ctypes.POINTER(_Key)],
    "ncclCommInitRank": [ctypes.POINTER(_PLACE), _INT, _Key, _INT],
    "ncclCommGetAsyncError": [_PLACE, ctypes.POINTER(_INT)],
    "ncclGroupStart": [],
    "ncclGroupEnd": [],
    "ncclSend": [_PLACE, _SIZE, _INT, _INT, _PLACE, _PLACE],
    "ncclRecv": [_PLACE, _SIZE, _INT, _INT, _PLACE, _PLACE],
    "ncclBroadcast": [_PLACE, _PLACE, _SIZE, _INT, _INT, _PLACE, _PLACE],
}


@functools.cache
def _library():
    """libnccl with the types of its functions; of the system, or of pip."""
    try:
        library = ctypes.CDLL("libnccl.so.2")
    except OSError:
        try:
            from cuda import pathfinder

            found = pathfinder.load_nvidia_dynamic_lib("nccl")
            library = ctypes.CDLL(found.abs_path)
        except Exception as error:  # each way of not being there has its own
            raise ImportError(
                "a group of GPUs needs NCCL, libnccl.so.2: pip install "
                "'llmnb[nccl]', or take --group mpi, which sends through "
                "the hosts"
            ) from error
    for name, types in _CALLS.items():
        getattr(library, name).argtypes = types
    library.ncclGetErrorString.restype = ctypes.c_char_p
    return library


def _asked(name, *args):
    """Call a function of the library; RuntimeError when it refuses."""
    code = getattr(_library(), name)(*args)
    if code:
        said = _library().ncclGetErrorString(code).decode()
        raise RuntimeError(f"NCCL: {name}: {said} ({code})")


# %% [markdown]
# A *communicator* is a rank's membership in a group. To make one, all ranks need the
# same key, 128 bytes that one of them draws; how it comes to the others is our
# affair, and MPI's. What is sent and received between `ncclGroupStart`
# and `ncclGroupEnd` happens at once. Without that, two ranks that each send first
# would wait for each other for ever.


# %% a communicator tags=["export"] module="gpu.nccl"
def nccl_version():
    """The version of NCCL as a number, 23203 for 2.32.3.

    Raises ImportError, which says what to install, where there is none.
    """
    number = _INT()
    _asked("ncclGetVersion", ctypes.byref(number))
    return number.value


def new_key():
    """A key of a new group, as text; all its ranks must have the same."""
    key = _Key()
    _asked("ncclGetUniqueId", ctypes.byref(key))
    return bytes(key.bytes).hex()


class Communicator:
    """A rank's place in a group of GPUs; its calls do not wait.

    rank, size, key: which of how many, and the group's `new_key`. All ranks
    make one at a time, each with its own GPU current, and that waits. Arrays
    are a device's, flat, float32; what is called goes to the current stream.
    Raises RuntimeError when NCCL refuses.
    """

    def __init__(self, rank, size, key):
        self._place, made = _PLACE(), _Key()
        made.bytes[:] = bytes.fromhex(key)
        place = ctypes.byref(self._place)
        _asked("ncclCommInitRank", place, size, made, rank)

    @contextmanager
    def together(self):
        """What is called within happens at once, when it is left."""
        _asked("ncclGroupStart")
        try:
            yield
        except BaseException:
            _library().ncclGroupEnd()  # the first error is the one to tell
            raise
        _asked("ncclGroupEnd")

    def send(self, array, rank):
        """Send an array to a rank, which receives one as long."""
        _asked("ncclSend", *_numbers(array), FLOAT, rank, *self._where())

    def recv(self, array, rank):
        """Overwrite an array with what a rank sends."""
        _asked("ncclRecv", *_numbers(array), FLOAT, rank, *self._where())

    def broadcast(self, array, root):
        """Overwrite an array with the root's, everywhere."""
        place, size = _numbers(array)
        how = place, place, size, FLOAT, root
        _asked("ncclBroadcast", *how, *self._where())

    def _where(self):
        return self._place, stream_address()

    def check(self):
        """Raise RuntimeError if something failed since it was called."""
        code = _INT()
        _asked("ncclCommGetAsyncError", self._place, ctypes.byref(code))
        if code.value:
            said = _library().ncclGetErrorString(code.value).decode()
            raise RuntimeError(f"NCCL: a call failed later: {said}")


def _numbers(array):
    """Where an array lies, and how many numbers it has."""
    check_device("NCCL: array", array, kinds=np.float32)
    return address(array), array.size


# %% [markdown]
# The exchange is then a send to each rank and a receive from each,
# between one start and one end; to itself too, which NCCL does as a copy.
# Spreading is a broadcast of each owner's shard. NCCL's *all-gather* would be one
# call, but wants parts of one length, and our shards are as long as their pieces
# make them. Only arrays of GPUs go this way. What each rank says, its loss, a
# signal, a tensor for the state, stays with MPI, and so does the watch of chapter
# 6.2: a GPU that waits for a rank that is gone waits for ever, but the watch runs
# on the host, and ends all. No rank takes its communicator down when it ends:
# `ncclCommDestroy` waits until no recorded step holds a call of it, and the model's
# step lives as long as the process.


# %% over NCCL tags=["export"] module="train.gpus"
class OverNCCL(Staged):
    """A group whose arrays lie on GPUs, and are sent over NCCL.

    group: as for `Staged`; it hands out the key, and counts what is sent
    (what a recorded step sends again is not counted).
    Raises ImportError where there is no NCCL, ValueError where ranks have
    different ones.
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


# %% [markdown]
# What rank 1 of three calls in one part of an exchange, and to spread what it owns
# of seven numbers:


# %% what is called
from contextlib import contextmanager
from types import SimpleNamespace


class Noted:
    """Prints what a Communicator would be asked."""

    @contextmanager
    def together(self):
        print("start", end="; ")
        yield
        print("end")

    def __getattr__(self, name):
        return lambda array, rank: print(name, array.size, rank, end="; ")


noted = OverNCCL.__new__(OverNCCL)
noted._group = SimpleNamespace(rank=1, size=3, sent=0)
noted._nccl = Noted()
spans = [(0, 2), (2, 4), (4, 7)]
numbers = to_device(np.zeros(7, np.float32))
room = to_device(np.zeros((3, 3), np.float32))
noted.exchange(room, numbers, spans, [True] * 3)
noted.spread(numbers, spans)
print(noted.sent // 4, "numbers to others")

# %% [markdown]
# ## Which GPU, and which way
#
# With `--backend cuda` a run asks `placed` for its group. Each rank takes the GPU
# whose number is its own among the ranks of its machine. Where a launcher has
# shown each rank a GPU of its own, as `srun --gpus-per-task=1` does, that is
# number 0 of one for all of them. So ranks compare what they
# have got, not how many there are, and two with one GPU are refused. The commands:
#
#     pip install -e ".[nccl]"
#     mpirun -n 4 llmnb train --backend cuda --total-batch 2048
#     mpirun -n 4 llmnb train --backend cuda --total-batch 2048 --group mpi
#
# The second line goes over NCCL, and ends with one error where it is missing. The
# third goes through the hosts. On the simulator that is the way, unless
# `--group nccl` insists.
#
# A rank that is gone is found by the watch. What ranks do not have in common, and
# what NCCL refuses, ends all of them with one error, as in chapter 6.2.


# %% a group for a backend tags=["export"] module="train.gpus"
def placed(group, backend):
    """A Group as models of a backend need it; of GPUs each rank takes one.

    All ranks call it, before anything else is asked of a GPU. For "cuda"
    the result is over NCCL where there are GPUs, unless the group's kind is
    "mpi", and through the hosts on the simulator, unless it is "nccl"; for
    others it is the group itself. Raises ValueError where the ranks differ
    in that, or two of them have one GPU; and as `OverNCCL`.
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


# %% [markdown]
# ## Count it
#
# With $h$ blocks a rank, $P$ parameters and $R$ ranks, all ranks together send $R$
# times (6.1.2), and 256 sums to $R - 1$ others:
#
# $$ \text{bytes of all} = 4 (R - 1) \bigl( P (h + 1) + 256 \bigr) .
# \tag{6.5.1} $$
#
# It is the same for both ways. Through the hosts come the copies on top of it. A rank
# copies down its blocks, its own share with them, and the shard that it has updated,
# $4 P (h + 1/R)$ bytes; up go what has come for its shard, and all parameters, $4 P
# (h + 1)$.


# %% counted
for R, h in (2, 2), (3, 1):
    derived = 4 * (R - 1) * (weights.size * (h + 1) + 256)
    verdict(f"{R} ranks", sum(x[2] for x in found[R]) == derived,
            f"{derived:,} bytes, as derived")  # fmt: skip

# %% [markdown]
# ## What was tried, and what was not
#
# Nothing here has run on a GPU, and NCCL itself has not been called. There are
# three rehearsals, each of which can show one side.
#
# | what runs | in place of | what it shows | what it cannot |
# |---|---|---|---|
# | this chapter, and real ranks under `mpirun` with `--group mpi` | GPUs: the simulator | the order of all sums, the norm, the optimiser, states, errors: the bits are those of one rank | anything of NCCL |
# | real ranks under `mpirun` with `--group nccl` | GPUs: the simulator; NCCL: a stand-in in C | that our calls fit together: counts, types, peers, groups; bytes as derived; the same bits | streams; that NCCL finds a device, a network, a peer |
# | a group on the stand-in for the driver | driver and NCCL: stand-ins in C | that a step is recorded with NCCL's calls within, on the recorded stream, and that it allocates nothing | what is computed; that NCCL bears to be recorded |
#
# The stand-in for NCCL moves bytes between processes, and is stricter than NCCL: a
# send to which no receive of the same length and type belongs, which would hang or do
# harm there, is an error, and so is one outside a group. But it is our own: where
# we misread NCCL's manual, stand-in and program are wrong together. Nothing was
# timed.
#
# ## What it does not do
#
# Exchange and backward pass take turns, as on CPUs (chapter 6.3). Gradients that
# wait take memory of the GPU, one each. `llmnb bench` of a group is for CPUs, and
# `llmnb eval` of a group leaves to the launcher which GPU a rank sees. A group has one
# kind of GPU, since ranks are compared by its name.
#
# ## Take away
#
# - A group of GPUs needs two additions of its own, by a tree and by pieces; MPI keeps
#   what is said, NCCL takes what is sent.
# - Through the hosts needs no other library. Over NCCL a whole step is meant to be one
#   recorded launch.
# - The bits depend on there being a group, and not on how many are in it.
# - A stand-in shows what is asked of a library, not what the library does.
#
# ## Design note
#
# `nccl4py` is NVIDIA's own way from Python to NCCL. Its communicators want devices
# and streams of `cuda.core`, and so a driver, to be made at all; ours have those
# of numba. Its lower half is the same functions in C, for which `ctypes` needs no
# package. And NCCL's own sum, *reduce-scatter*, adds in an order that it chooses, by the
# number of ranks among others.
#
# ## Exercises
#
# **1** (★). A group of eight trains GPT-2's 124 million parameters with one batch a
# rank. How many bytes does a GPU send in a step, and how long does that take at 400
# gigabytes a second, or through hosts whose bus moves 25?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# $8 \cdot 124 \cdot 10^6 \cdot 7/8$ bytes are 868 megabytes: 2.2 milliseconds over the
# first. Through the hosts 558 megabytes go down and 992 come up: 62 milliseconds on
# the bus alone, if nothing overlaps.
# :::

# %% exercise 1, checked tags=["hide-cell"]
count = 8 * 124e6 * 7 / 8
down, up = 4 * 124e6 * (1 + 1 / 8), 4 * 124e6 * 2
print(f"{count / 1e6:.0f} MB, {count / 400e9 * 1e3:.1f} ms;",
      f"{down / 1e6:.0f} and {up / 1e6:.0f} MB,",
      f"{(down + up) / 25e9 * 1e3:.0f} ms")  # fmt: skip

# %% [markdown]
# **2** (★★). Add the rows of `tree_sum` from the first to the last, without the list.
# For which numbers of ranks with one micro-batch each do the bits of the sum not
# change?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# For one, two and three: $(0 + 1) + 2$ is the tree's order too. With four the tree
# adds $(0 + 1) + (2 + 3)$, and row after row is $((0 + 1) + 2) + 3$.
# :::

# %% exercise 2, checked tags=["hide-cell"]
for R in range(1, 6):
    held = [[(r, r + 1)] for r in range(R)]
    rows = np.random.default_rng(R).normal(size=(R, 500)).astype(np.float32)
    out = to_device(np.zeros(500, np.float32))
    tree_sum(out, to_device(rows.reshape(-1)),
             to_device(tree_order(held)), 500)  # fmt: skip
    plain = rows[0].copy()
    for row in rows[1:]:
        plain += row
    print(R, np.array_equal(to_host(out), plain))

# %% [markdown]
# ## Further reading
#
# - NVIDIA, [NCCL user guide](https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/):
#   point-to-point calls, groups, and what may be recorded in a graph.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("6.5")
