# Written by `make export` from notebooks/6_machines/02_shards.py: edit that file.

"""A group of processes on one or many machines, over MPI."""

__all__ = [
    "LONGEST", "Machines", "PATIENCE", "RANKS", "Watch", "check_alike",
    "find_group", "launched",
]


# imports of the machines
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


# how many were launched
_SIZES = "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"
RANKS = "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"


def launched(names=_SIZES, alone=1):
    """How many processes a launcher says that it has started; else 1.

    Known are mpirun of Open MPI, of MPICH and of Intel, and Slurm's srun,
    which is asked last: an mpirun within Slurm starts its own by srun.
    Of the names `RANKS` and with alone = 0: which of them this is.

    Derived in chapter 6.2.
    """
    found = (os.environ.get(name, "") for name in names)
    return next((int(x) for x in found if x.isdigit()), alone)


def find_group(kind=""):
    """The Group of this process: of those that were launched with it.

    kind: "none", "mpi" or "nccl", whatever the launcher says; over NCCL go
    the arrays of GPUs alone, and all else over MPI. Raises ImportError when
    mpi4py is missing, sees another number of processes than were launched,
    or lets no second thread call MPI.

    Derived in chapter 6.2.
    """
    choose("group", kind, ("", "none", "mpi", "nccl"))
    wanted = launched()
    if kind == "none" or (kind == "" and wanted == 1):
        return ALONE
    group = Machines(kind)
    if group.size != wanted and wanted > 1:
        raise ImportError(
            f"{wanted} processes were launched, and mpi4py sees "
            f"{group.size}: the launcher is of another MPI than the one that "
            "mpi4py has loaded"
        )
    return group


# a group over MPI
LONGEST = 2**31 - 1  # elements of an array that an MPI before 4 can count


class Machines(Group):
    """The processes that one mpirun or srun has started.

    names: of the machine of each. sent: bytes of arrays that this process
    has sent to others. kind: as `find_group` was told. Until close(), each
    watches its neighbour, and a process that is silent for `PATIENCE` seconds
    ends all. An array has at most `LONGEST` elements, unless the MPI takes
    longer counts, as MPI 4 may.

    Derived in chapter 6.2.
    """

    def __init__(self, kind=""):
        self.kind = kind
        self._mpi = package("mpi4py.MPI", "mpi", "a group of processes")
        self._world = self._mpi.COMM_WORLD
        self.rank, self.size = self._world.rank, self._world.size
        level = self._mpi.Query_thread()
        if self.size > 1 and level < self._mpi.THREAD_MULTIPLE:
            raise ImportError(
                "a group needs an MPI that several threads may call at once, "
                f"MPI_THREAD_MULTIPLE, and mpi4py has begun one of level "
                f"{level}: see MPI4PY_RC_THREAD_LEVEL, or build MPI with it"
            )
        self.sent, self.names = 0, [""] * self.size
        self.names = self.gather(platform.node())
        self._watch = Watch(self._world.Dup(), self) if self.size > 1 else None

    def gather(self, x):
        """What each has given, a list in order of rank; as JSON."""
        raw = np.frombuffer(json.dumps(x).encode(), np.uint8)
        lengths = np.empty(self.size, np.int64)
        self._world.Allgather(np.array([raw.size], np.int64), lengths)
        found = np.empty(lengths.sum(), np.uint8)
        self._world.Allgatherv(raw, [found, lengths])
        parts = np.split(found, np.cumsum(lengths)[:-1])
        return [json.loads(part.tobytes()) for part in parts]

    def exchange(self, out, array, spans, senders):
        """Send each its span of an array; out[r] begins with what r sent.

        array: flat, or None for who does not send. spans: a (start, stop)
        for each. senders: whether it sends, for each. Raises ValueError for
        an array that is too long, as `spread` does.
        """
        self._check_length(spans)
        starts, stops = np.array(spans).T
        if array is None:  # nothing, and not from where it will arrive
            array, starts = np.empty(0, out.dtype), np.zeros_like(starts)
        counts = (stops - starts) * senders[self.rank]
        come = np.array(senders) * np.diff(spans[self.rank])
        places = np.arange(self.size) * out.shape[1]
        self._world.Alltoallv([array, (counts, starts)], [out, (come, places)])
        self.sent += (counts.sum() - counts[self.rank]) * array.itemsize

    def spread(self, array, spans):
        """Have all of an array, of which each has its own span."""
        self._check_length(spans)
        starts, stops = np.array(spans).T
        how = [array, (stops - starts, starts)]
        self._world.Allgatherv(self._mpi.IN_PLACE, how)
        mine = (stops - starts)[self.rank]
        self.sent += (self.size - 1) * mine * array.itemsize

    def _check_length(self, spans):
        end, version = spans[-1][1], self._mpi.Get_version()
        if end > LONGEST and version < (4, 0):
            raise ValueError(
                f"a group over MPI {'.'.join(map(str, version))} sends arrays "
                f"of at most {LONGEST:,} elements, and this is one of {end:,}"
            )

    def collect(self, part, lengths):
        """The parts of all in one array, for the first; None for others."""
        whole = np.empty(sum(lengths), part.dtype) if self.first else None
        come = [whole, lengths] if self.first else None
        self._world.Gatherv(part, come)
        return whole

    def rest(self):
        """Wait for all, asleep: others may need this core meanwhile."""
        come = self._world.Ibarrier()
        while not come.Test():
            time.sleep(0.01)

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


# the watch
PATIENCE = 8  # seconds of silence


class Watch:
    """Sends the next process a sign of life each second, and hears the last.

    comm: a communicator of its own. group: the Machines.

    Derived in chapter 6.2.
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


# are all alike
def check_alike(group, facts):
    """Raise ValueError unless all of a group have the same before them.

    facts: a dict of str to str. The message names the first that differs.

    Derived in chapter 6.2.
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
    left = [[x for x in words[i] if x not in words[1 - i]] for i in (0, 1)]
    if not any(left):  # other spaces, or another order
        at = len(os.path.commonprefix([first, this]))
        return [repr(x[at : at + 60]) for x in (first, this)]
    return [" ".join(x)[:60] or "nothing more" for x in left]
