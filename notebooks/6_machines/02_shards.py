# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       train.sharded: "A model whose optimiser lies in shards on a group of processes."
#       train.machines: "A group of processes on one or many machines, over MPI."
#       cli.together: "What a command says and does when several processes run it."
# ---

# %% [markdown]
# # Shards: the optimiser in parts
#
# > Summary.

# %% imports of the shards tags=["export"] module="train.sharded"
import math

import numpy as np

from llmnb.backend import choose
from llmnb.cpu.adamw import PIECES, piece_length, shrink, squares
from llmnb.model.gpt2 import GPT2
from llmnb.train.exchange import exchange, shards
from llmnb.train.group import ALONE


# %% a tensor that lies in parts tags=["export"] module="train.sharded"
class Spread:
    """A tensor of m or v, of which each process of a group holds a part.

    part: this process's, flat, maybe empty. To others it looks like an array
    on a device: np.asarray gives a copy of the whole, to the first process
    when all call `collect`, and llmnb.arena.put overwrites it.
    """

    def __init__(self, group, shape, part, places):
        self.group, self.shape, self.part = group, shape, part
        self.dtype, self.itemsize = part.dtype, part.itemsize
        self.nbytes = math.prod(shape) * part.itemsize
        self._places = places  # a slice of the flat tensor for each process

    def collect(self):
        """The whole tensor for the first process, None for the others."""
        lengths = [x.stop - x.start for x in self._places]
        whole = self.group.collect(self.part, lengths)
        return whole if whole is None else whole.reshape(self.shape)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.collect(), dtype)

    def copy_to_device(self, values):
        """Keep of a whole tensor what lies here."""
        mine = self._places[self.group.rank]
        self.part[:] = values.reshape(-1)[mine]


# %% the model tags=["export"] module="train.sharded"
class Sharded(GPT2):
    """A GPT2 that trains in a group: each process holds its shard of m, v.

    Sharded.of(group) is the class to make one of, with the arguments of
    GPT2; the backend is "cpu". All processes of the group make one, and
    call its methods in the same order. grads holds, after `exchange`, the
    sum over the group in this process's shard, and elsewhere what was left.
    """

    group = ALONE

    @classmethod
    def of(cls, group):
        """A class of models of this group."""
        return type(cls.__name__, (cls,), {"group": group})

    def __init__(
        self, cfg, batch_size, seq_len, backend="cpu", precision="fp32",
        seed=42,
    ):  # fmt: skip
        choose("Sharded: backend", backend, ("cpu",))
        super().__init__(cfg, batch_size, seq_len, backend, precision, seed)

    def _allocate(self, layout):
        dtype, shapes = layout["params"]
        size = sum(map(math.prod, shapes.values()))
        self.shards = shards(size, self.group.size)
        start, stop = self.shards[self.group.rank]
        own = dtype, {"shard": (stop - start,)}
        super()._allocate(layout | {"m": own, "v": own})
        for kind in ("m", "v"):
            tensors, at = self.memory[kind], 0
            shard = tensors.pop("shard")
            for name, shape in shapes.items():
                tensors[name] = self._spread(shard, at, shape)
                at += math.prod(shape)

    def _spread(self, shard, at, shape):
        """The tensor that begins at an element of the flat parameters."""
        size = math.prod(shape)
        ends = np.clip(np.array(self.shards) - at, 0, size).tolist()
        places = [slice(*pair) for pair in ends]
        mine, (start, _) = (
            places[self.group.rank],
            self.shards[self.group.rank],
        )
        first = max(0, at - start)
        part = shard[first : first + mine.stop - mine.start]
        return Spread(self.group, shape, part, places)

    def exchange(self, blocks, count):
        """Sum the gradients of all processes; see train.exchange."""
        exchange(self.group, self.memory.flat("grads"), blocks, count)

    def _own(self, kind):
        """This process's shard of params or grads."""
        return self.memory.flat(kind)[slice(*self.shards[self.group.rank])]

    def clip_gradients(self, max_norm):
        """As GPT2.clip_gradients, of the sum over the group."""
        self._check_gradients("clip_gradients")
        grads, size = self._own("grads"), self.shards[-1][1]
        found = squares(grads, piece_length(size)).tolist()
        found = sum(self.group.gather(found), [])
        sums = np.zeros(PIECES)
        sums[: len(found)] = found
        norm = math.sqrt(sums.sum())
        shrink(grads, norm, max_norm)
        return norm

    def _apply(self, decay):
        """AdamW on the own shard; then all parameters, from all."""
        update = getattr(self.ops, self._machine.update)
        own = [self._own(kind) for kind in ("params", "grads")]
        own += [self.memory.flat(kind) for kind in ("m", "v")]
        begin, end = self.shards[self.group.rank]
        for start, stop, decays in self._ranges(decay):
            start, stop = max(start, begin), min(stop, end)
            if start < stop:
                row = self._settings[not decays]
                update(*[x[start - begin : stop - begin] for x in own], row)
        self.group.spread(self.memory.flat("params"), self.shards)


# %% imports of the machines tags=["export"] module="train.machines"
import json
import os
import platform
import sys
import threading
import time

import numpy as np

from llmnb.backend import choose
from llmnb.files import package
from llmnb.train.group import ALONE, Group

# %% how many were launched tags=["export"] module="train.machines"
_SIZES = "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"


def launched():
    """How many processes a launcher says that it has started; else 1.

    Known are mpirun of Open MPI, of MPICH and of Intel, and Slurm's srun.
    """
    found = (os.environ.get(name, "") for name in _SIZES)
    return max([1, *(int(x) for x in found if x.isdigit())])


def find_group(kind=""):
    """The Group of this process: of those that were launched with it.

    kind: "none" or "mpi", whatever the launcher says. Raises ImportError
    when mpi4py is missing, or sees another number of processes than were
    launched.
    """
    choose("group", kind, ("", "none", "mpi"))
    wanted = launched()
    if kind == "none" or (kind == "" and wanted == 1):
        return ALONE
    group = Machines()
    if group.size != wanted and wanted > 1:
        raise ImportError(
            f"{wanted} processes were launched, and mpi4py sees "
            f"{group.size}: the launcher is of another MPI than the one that "
            "mpi4py has loaded"
        )
    return group


# %% a group over MPI tags=["export"] module="train.machines"
class Machines(Group):
    """The processes that one mpirun or srun has started.

    names: of the machine of each. sent: bytes of arrays that this process
    has sent to others. Until close(), each watches its neighbour, and a
    process that is silent for `PATIENCE` seconds ends all.
    """

    def __init__(self):
        self._mpi = package("mpi4py.MPI", "mpi", "a group of processes")
        self._world = self._mpi.COMM_WORLD
        self.rank, self.size = self._world.rank, self._world.size
        self.sent, self.names = 0, [""] * self.size
        self.names = self.gather(platform.node())
        self._watch = Watch(self._world.Dup(), self) if self.size > 1 else None

    def gather(self, x):
        """What each has given, a list in order of rank; as JSON."""
        raw = np.frombuffer(json.dumps(x).encode(), np.uint8)
        lengths = np.empty(self.size, np.int64)
        self._world.Allgather(np.array([raw.size]), lengths)
        found = np.empty(lengths.sum(), np.uint8)
        self._world.Allgatherv(raw, [found, lengths])
        parts = np.split(found, np.cumsum(lengths)[:-1])
        return [json.loads(part.tobytes()) for part in parts]

    def exchange(self, out, array, spans, senders):
        """Send each its span of an array; out[r] begins with what r sent.

        array: flat, or None for who does not send. spans: a (start, stop)
        for each. senders: whether it sends, for each.
        """
        starts, stops = np.array(spans).T
        counts = (stops - starts) * senders[self.rank]
        array = out[0] if array is None else array
        come = np.array(senders) * (stops - starts)[self.rank]
        places = np.arange(self.size) * out.shape[1]
        self._world.Alltoallv([array, (counts, starts)], [out, (come, places)])
        self.sent += (counts.sum() - counts[self.rank]) * array.itemsize

    def spread(self, array, spans):
        """Have all of an array, of which each has its own span."""
        starts, stops = np.array(spans).T
        how = [array, (stops - starts, starts)]
        self._world.Allgatherv(self._mpi.IN_PLACE, how)
        mine = (stops - starts)[self.rank]
        self.sent += (self.size - 1) * mine * array.itemsize

    def collect(self, part, lengths):
        """The parts of all in one array, for the first; None for others."""
        whole = np.empty(sum(lengths), part.dtype) if self.first else None
        come = [whole, lengths] if self.first else None
        self._world.Gatherv(part, come)
        return whole

    def name(self, rank):
        """A rank in words, with its machine."""
        return f"rank {rank} on {self.names[rank]}"

    def end(self, message):
        """End all processes, with one line on standard error."""
        print(f"llmnb: error: {message}", file=sys.stderr, flush=True)
        self._world.Abort(1)

    def close(self):
        """Watch no longer: this process is about to leave."""
        if self._watch:
            self._watch.close()


# %% the watch tags=["export"] module="train.machines"
PATIENCE = 8  # seconds of silence


class Watch:
    """Sends the next process a sign of life each second, and hears the last.

    comm: a communicator of its own. group: the Machines.
    """

    def __init__(self, comm, group):
        self._comm, self._group, self._closed = comm, group, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        comm, size = self._comm, self._comm.size
        after, before = (comm.rank + 1) % size, (comm.rank - 1) % size
        sign, heard, there = np.ones(1, np.uint8), time.monotonic(), True
        sent, last = [], heard
        while not self._closed.wait(1):
            sent = [x for x in sent if not x.Test()]
            sent.append(comm.Isend(sign, after))
            now, there = time.monotonic(), there and not self._left(before)
            if self._heard or now - last > PATIENCE / 2:  # it slept itself
                heard = now
            last = now
            if there and now - heard > PATIENCE:
                name = self._group.name(before)
                self._group.end(f"{name} has not answered for {PATIENCE} s")

    def _left(self, rank):
        """Whether it has said goodbye; notes whether it said anything."""
        self._heard, sign = False, np.ones(1, np.uint8)
        while self._comm.Iprobe(rank):
            self._comm.Recv(sign, rank)
            self._heard = True
        return sign[0] == 0

    def close(self):
        """Say goodbye."""
        self._closed.set()
        self._thread.join()
        after = (self._comm.rank + 1) % self._comm.size
        self._comm.Send(np.zeros(1, np.uint8), after)


# %% are all alike tags=["export"] module="train.machines"
def check_alike(group, facts):
    """Raise ValueError unless all of a group have the same before them.

    facts: a dict of str to str. The message names the first that differs.
    """
    everyone = group.gather(facts)
    for rank, other in enumerate(everyone):
        for name in sorted(everyone[0] | other):
            pair = [x.get(name, "none") for x in (everyone[0], other)]
            if pair[0] != pair[1]:
                first, this = _differing(*pair)
                raise ValueError(
                    f"{group.name(rank)} has another {name} than rank 0: "
                    f"{this}, not {first}"
                )


def _differing(first, this):
    """Two texts, cut to where they differ if they are long."""
    if max(len(first), len(this)) < 60:
        return first, this
    words = first.split(), this.split()
    left = ([x for x in words[i] if x not in words[1 - i]] for i in (0, 1))
    return [" ".join(x)[:60] or "nothing more" for x in left]


# %% imports of together tags=["export"] module="cli.together"
import contextlib
import os
import sys
import time
import traceback
import warnings

from llmnb.cli.__main__ import USER_ERRORS
from llmnb.cli.options import one_line


# %% one speaks for all tags=["export"] module="cli.together"
@contextlib.contextmanager
def together(group):
    """Within, the first of several processes speaks; an error ends all.

    The error is one line that names the process. Where it befalls several,
    the first of them is a moment ahead, and says it for the others.
    """
    with contextlib.ExitStack() as quiet:
        if not group.first:
            nowhere = quiet.enter_context(open(os.devnull, "w"))
            quiet.enter_context(contextlib.redirect_stdout(nowhere))
            warnings.simplefilter("ignore")
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            time.sleep(min(0.3 * group.rank, 5))
            known = isinstance(error, (*USER_ERRORS, KeyboardInterrupt))
            if not known or "LLMNB_TRACEBACK" in os.environ:
                traceback.print_exc()
            group.end(f"{group.name(group.rank)}: {one_line(error)}")
        finally:
            group.close()
