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
# # Averages in shards: the optimiser in parts
#
# > AdamW's averages exist once over all ranks; a run on many machines writes the
# > bytes of a run on one, is killed like one, and goes on with another number
# > of ranks.
#
# *Reading time: 25 minutes. You need: [chapter 6.1](01_gradients.ipynb), states
# ([chapter 4.15](../4_practice/15_states.ipynb)) and how a run is resumed
# ([chapter 4.16](../4_practice/16_resume.ipynb)).*

# %% [markdown]
# ## Where we are
#
# After the exchange of chapter 6.1 the sum of all gradients exists, in shards, each with
# its owner. This chapter lets the owner go on with it. At the end of it you
# can
#
# - say what a rank must hold, and what it need not;
# - train over several processes with the command that you know, under `mpirun`;
# - kill one of them, and go on with more, or fewer, to the same bits;
# - say what ends a run when a rank dies, hangs, or is unlike the others.
#
# ## Setup

# %% setup
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from llmnb.book.verify import verdict

# %% [markdown]
# ## What a rank need not hold
#
# Training holds four numbers for each of $P$ parameters: itself, its gradient, and the
# averages $m$ and $v$. A rank needs all parameters for its forward pass and
# writes all gradients going back. But AdamW works element by element
# ([chapter 1.12](../1_by_hand/12_adamw.ipynb)), and the owner of a shard has its
# whole gradient. So only the owner needs $m$ and $v$ of it. It updates its
# parameters, and then all ranks send each other theirs. In bytes of float32, a rank
# of $R$ holds
#
# $$ 4 P + 4 P + 2 \cdot 4 \frac{P}{R} = 8 P \left(1 + \frac1R\right)
# \tag{6.2.1} $$
#
# instead of $16P$: at four ranks 10 in place of 16. This is the first stage of
# ZeRO, the *Zero Redundancy Optimizer*, whose aim is that no number is held by
# two ranks. It costs no byte on the wire. Without shards the owners
# would have sent their sums to all, with them they send their parameters, and
# those are as many.
#
# ## A tensor in parts
#
# The rest of the program sees $m$ as a tensor with a name, and a state has to hold it
# whole. It need not learn of shards for that. There are arrays already that
# do not lie in this process's memory: a GPU's. `np.asarray` copies one here,
# and `put` of [chapter 1.16](../1_by_hand/16_memory.ipynb) overwrites it. A tensor that lies
# on several ranks can offer the same two:

# %% imports of the shards tags=["export"] module="train.sharded"
import math

import numpy as np

from llmnb.arena import put
from llmnb.checks import check_fit
from llmnb.cpu.adamw import PIECES, piece_length, shrink, squares
from llmnb.model.gpt2 import GPT2
from llmnb.shapes import shapes
from llmnb.train.exchange import exchange, shards
from llmnb.train.group import ALONE


# %% a tensor that lies in parts tags=["export"] module="train.sharded"
class Spread:
    """A tensor of m or v, of which each process of a group holds a part.

    part: this process's, flat, maybe empty. To others it looks like an array
    on a device: np.asarray gives a copy of the whole, in the first process,
    while the others call `collect` (it raises TypeError there), and
    llmnb.arena.put overwrites it.
    """

    def __init__(self, group, shape, part, places):
        self.group, self.shape, self.part = group, shape, part
        self.dtype, self.itemsize = part.dtype, part.dtype.itemsize
        self.nbytes = math.prod(shape) * self.itemsize
        self._places = places  # a slice of the flat tensor for each process

    def collect(self):
        """The whole tensor for the first process, None for the others."""
        lengths = [x.stop - x.start for x in self._places]
        whole = self.group.collect(np.asarray(self.part), lengths)
        return whole if whole is None else whole.reshape(self.shape)

    def __array__(self, dtype=None, copy=None):
        if not self.group.first:
            raise TypeError(
                "only the first process of a group gets a whole tensor of m "
                "or v, while the others call collect(): this is "
                f"{self.group.name(self.group.rank)}"
            )
        return np.asarray(self.collect(), dtype)

    def copy_to_device(self, values):
        """Keep of a whole tensor what lies here."""
        check_fit("put: values", values, self.shape, self.dtype)
        mine = self._places[self.group.rank]
        put(self.part, values.reshape(-1)[mine])


# %% [markdown]
# `save_state` asks for the tensors one at a time, so that the first rank never
# holds more than one whole, and the others call `collect` in the same order.
# `restore` puts a whole tensor, of which each rank keeps its part. So a state
# has no trace of the number of ranks.
#
# The model differs from any other in four places: it allocates a shard for $m$ and
# $v$; it sums over the group; it takes the norm of the sum from the squares of all shards;
# and it updates its own shard and spreads the result. The norm is every rank's, to the
# last bit, so that all clip alike, and all skip the same updates.


# %% the model tags=["export"] module="train.sharded"
class Sharded(GPT2):
    """A GPT2 that trains in a group: each process holds its shard of m, v.

    Sharded.of(group) is the class to make one of, with the arguments of
    GPT2; the backend is "cpu". All processes of the group make one, and
    call its methods in the same order. grads holds, after `exchange`, the
    sum over the group in this process's shard, and elsewhere what was left.
    """

    group, backends = ALONE, ("cpu",)

    @classmethod
    def of(cls, group):
        """A class of models of this group."""
        return type(cls.__name__, (cls,), {"group": group})

    def _allocate(self, layout):
        dtype, named = layout["params"]
        size = sum(map(math.prod, named.values()))
        self.shards = shards(size, self.group.size)
        start, stop = self.shards[self.group.rank]
        own = dtype, {"shard": (stop - start,)}
        super()._allocate(layout | {"m": own, "v": own})
        for kind in ("m", "v"):
            tensors, at = self.memory[kind], 0
            shard = tensors.pop("shard")
            for name, shape in named.items():
                tensors[name] = self._spread(shard, at, shape)
                at += math.prod(shape)

    def _spread(self, shard, at, shape):
        """The tensor that begins at an element of the flat parameters."""
        size = math.prod(shape)
        ends = np.clip(np.array(self.shards) - at, 0, size).tolist()
        places = [slice(*pair) for pair in ends]
        rank = self.group.rank
        mine, first = places[rank], max(0, at - self.shards[rank][0])
        part = shard[first : first + mine.stop - mine.start]
        return Spread(self.group, shape, part, places)

    def step(self, *batch, **settings):
        """Refused: it would learn from this process's batch alone."""
        raise RuntimeError(
            "Sharded.step: a group exchanges gradients within a step; call "
            "llmnb.train.loop.train_step"
        )

    def exchange(self, blocks, count):
        """Sum the gradients of all processes; see train.exchange."""
        exchange(self.group, self.memory.flat("grads"), blocks, count)

    def _own(self, kind):
        """This process's shard of params or grads."""
        return self.memory.flat(kind)[slice(*self.shards[self.group.rank])]

    @shapes("-, above 0")
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


# %% [markdown]
# ## Proof
#
# A run with everything in it, as in [chapter 4.16](../4_practice/16_resume.ipynb):
# it accumulates, skips, validates, saves a state every three steps and keeps
# the last two. First by one process, then by 2, 3 and 4 ranks, which are
# threads here. Every file that matters must have the same bytes.

# %% a run with everything in it
from llmnb.files import own_folder
from llmnb.formats.shard import read_shard
from llmnb.train.feed import loaders, prepare
from llmnb.train.group import ALONE
from llmnb.train.loop import Progress, train_step
from llmnb.train.options import TrainConfig
from llmnb.train.rehearsal import rehearse
from llmnb.train.run import begin, finish, follow, resume
from llmnb.train.start import new_model

place = TemporaryDirectory()
page = Path(place.name, "page.txt")
letters = read_shard("../../tests/data/curve_tokens.bin")[:40_000]
letters = bytes(letters[letters < 256].astype(np.uint8))
page.write_text(letters.decode("utf-8", "ignore"), "utf-8")
config = TrainConfig(
    corpus=(str(page),), tokenizer="byte", num_layers=1, num_heads=2,
    channels=32, seq_len=32, batch_size=2, total_batch=12 * 64, steps=9,
    eval_every=4, eval_batches=3, skip_loss=1.0, skip_norm=1.0,
    skip_window=4, save_every=3,
)  # fmt: skip


def trained(group, folder, steps=None, again=False):
    """Train in a folder, or go on there; leave it after some steps."""
    if group.first and not again:
        own_folder(folder)
    group.gather("the folder is there")
    if again:
        run, _ = resume(folder, group)
    else:
        run = begin(folder, config, group)
    seen = [x.skipped for x in islice(follow(run), steps)]
    if steps is None:
        finish(run)
    elif group.first:
        run.lock.release()
    return seen


def kept(folder):
    files = [*folder.glob("state_*"), folder / "model.bin"]
    return {x.name: x.read_bytes() for x in sorted(files)}


one = Path(place.name, "one")
skipped = trained(ALONE, one)
print(*kept(one), "skipped:", sum(x or 0 for x in skipped))
for R in (2, 3, 4):
    folder = Path(place.name, f"ranks{R}")
    seen = rehearse(R, lambda group, folder=folder: trained(group, folder))
    verdict(f"{R} ranks", seen == [skipped] * R, "skip alike")
    verdict(f"{R} ranks", kept(folder) == kept(one), "the same bytes")

# %% [markdown]
# The text, the first weights, the place in the data, the learning rate: nothing of
# these depends on the rank. A place is a number of micro-batches read by all; a
# rank passes over what is not its own, unread (`skip` of
# [chapter 1.3](../1_by_hand/03_batches.ipynb)). So a run may go on with another number of
# ranks, as long as it divides the micro-batches. Four, cut after the fifth step,
# which leave a state of step 3; three, which take four steps from there and
# leave one of step 6; and one to the end:

# %% cut, and on with others
folder = Path(place.name, "cut")
for R, steps, again in (4, 5, False), (3, 4, True), (1, None, True):
    rehearse(R, lambda group, how=(steps, again): trained(
        group, folder, *how))  # fmt: skip
    print(R, "leave", *sorted(x.stem for x in folder.glob("state_*")))
verdict("4, 3, then 1", kept(folder) == kept(one), "the same bytes")

# %% [markdown]
# What a rank holds, in bytes: of one process, and of each of four ranks. The last
# shard is a little shorter, for the pieces do not divide the model evenly.

# %% what a rank holds
sizes = rehearse(4, lambda g: new_model(config, 257, g).memory.sizes())
whole = new_model(config, 257).memory.sizes()
for kind in ("params", "grads", "m", "v"):
    print(kind, whole[kind], [x[kind] for x in sizes])


# %% [markdown]
# And a mistake: a rank that does not exchange gradients has weights of its own.


# %% a mistake, caught
class Early(Sharded):
    """Updates with what this rank has, before the exchange."""

    def exchange(self, blocks, count):
        pass


def weights(group, made, config=config):
    shape = config.model(257), 2, 32
    model = made.of(group)(*shape) if group.size > 1 else GPT2(*shape)
    feed = loaders(config, prepare(config))[0]
    train_step(config, model, feed, Progress())
    return model.memory.flat("params").copy()


want = weights(ALONE, None)
for made, claim in (Sharded, True), (Early, False):
    found = rehearse(2, lambda g, made=made: weights(g, made))
    same = all(np.array_equal(x, want) for x in found)
    verdict(made.__name__, same == claim, "the same" if claim else "caught")

# %% [markdown]
# ## Machines
#
# Now processes in place of threads. A *launcher* starts them, `mpirun` or a
# cluster's `srun`, on this machine or on many, and tells each by a variable of the
# environment how many there are. MPI does the rest; it knows
# shared memory, TCP and the networks of clusters, and `mpi4py` brings it to
# NumPy's arrays. Nothing else of the command changes, except that ranks must
# have something to share. A micro-batch is by default 8 rows of 64 tokens, so
# that the two lines with `mpirun` give each rank 2 of 4 micro-batches, and 4 of
# 32:
#
#     pip install -e ".[mpi]"
#     mpirun -n 2 llmnb train --total-batch 2048
#     mpirun -n 8 --hostfile hosts llmnb train --total-batch 16384
#     srun -n 8 llmnb train --total-batch 16384


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
RANKS = "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"


def launched(names=_SIZES, alone=1):
    """How many processes a launcher says that it has started; else 1.

    Known are mpirun of Open MPI, of MPICH and of Intel, and Slurm's srun,
    which is asked last: an mpirun within Slurm starts its own by srun.
    Of the names `RANKS` and with alone = 0: which of them this is.
    """
    found = (os.environ.get(name, "") for name in names)
    return next((int(x) for x in found if x.isdigit()), alone)


def find_group(kind=""):
    """The Group of this process: of those that were launched with it.

    kind: "none", "mpi" or "nccl", whatever the launcher says; over NCCL go
    the arrays of GPUs alone, and all else over MPI. Raises ImportError when
    mpi4py is missing, sees another number of processes than were launched,
    or lets no second thread call MPI.
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


# %% [markdown]
# The methods are those of the rehearsal. `Alltoallv` and `Allgatherv` take the
# places of what goes out and what comes in, so that nothing is packed; what is
# not an array travels as JSON. Who waits in them keeps its core busy, as MPI
# asks again and again, which is quickest when all come at once. `rest` waits
# asleep, for where one has more to do than the others.


# %% a group over MPI tags=["export"] module="train.machines"
LONGEST = 2**31 - 1  # elements of an array that an MPI before 4 can count


class Machines(Group):
    """The processes that one mpirun or srun has started.

    names: of the machine of each. sent: bytes of arrays that this process
    has sent to others. kind: as `find_group` was told. Until close(), each
    watches its neighbour, and a process that is silent for `PATIENCE` seconds
    ends all. An array has at most `LONGEST` elements, unless the MPI takes
    longer counts, as MPI 4 may.
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


# %% [markdown]
# ## When a rank is lost
#
# A rank that is killed closes its connections, and `mpirun` ends the others. But one
# that is alive and does nothing, because its machine swaps or someone
# stopped it, would be waited for without end. So each rank sends its neighbour a byte each
# second, by a thread of its own, and listens to the other neighbour. Eight seconds
# of silence end all, with a line that names the silent one. Kernels let go of Python's
# lock, so that a long one is no silence. The thread of the watch and the main
# one are in MPI at once, which not every MPI allows; one that does not is
# refused.
#
# What is lost when all have ended? The steps since the last state, at most
# `--save-every` of them and the one that was under way. `--resume` computes them
# again, to the same bits. Of the log it keeps the rows before the state, so that
# each step has one row in the end, and only their speeds tell.


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


# %% [markdown]
# A rank may be alive and wrong: an older version on one machine, another
# option, a text that was not copied to the end, a checkpoint that has the name
# of another, a processor with other instructions, whose last bits differ. All of
# that is compared before anything is written. `begin` and `resume` hand over the
# options, the sums of the text and of the weights, and what else decides the bits
# ([chapter 4.15](../4_practice/15_states.ipynb)):


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
    left = [[x for x in words[i] if x not in words[1 - i]] for i in (0, 1)]
    if not any(left):  # other spaces, or another order
        at = len(os.path.commonprefix([first, this]))
        return [repr(x[at : at + 60]) for x in (first, this)]
    return [" ".join(x)[:60] or "nothing more" for x in left]


# %% a rank with another text
def differing(group):
    check_alike(group, {"text": "a page" if group.rank < 2 else "half a page"})


try:
    rehearse(3, differing)
except ValueError as error:
    print(error)

# %% [markdown]
# Last, who speaks? The first rank does, on the screen and on the disk. An error
# is said by the rank that has it, with its name, and ends all; so does a rank
# that exits by itself, since the others would wait for it. Where all have the
# same error, such as a text that is missing, the first says it before the others
# come to it. Only who has come to the end says goodbye to its neighbour.


# %% imports of together tags=["export"] module="cli.together"
import contextlib
import os
import time
import traceback
import warnings

from llmnb.cli.__main__ import USER_ERRORS
from llmnb.cli.options import one_line
from llmnb.train.machines import check_alike, find_group
from llmnb.train.state import surroundings


# %% one speaks for all tags=["export"] module="cli.together"
@contextlib.contextmanager
def together(group):
    """Within, the first of several processes speaks; an error ends all.

    The error is one line that names the process. Where it befalls several,
    the first of them is some seconds ahead, and says it for the others. So
    ends also a process that exits within: the others would wait for it.
    """
    with contextlib.ExitStack() as quiet:
        if not group.first:
            nowhere = quiet.enter_context(
                open(os.devnull, "w", errors="replace")
            )
            quiet.enter_context(contextlib.redirect_stdout(nowhere))
            warnings.simplefilter("ignore")
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(KeyboardInterrupt):  # a second one
                time.sleep(min(2 * group.rank, 6))
            bug = isinstance(error, Exception)
            bug = bug and not isinstance(error, USER_ERRORS)
            if bug or "LLMNB_TRACEBACK" in os.environ:
                traceback.print_exc()
            said = one_line(error)
            if isinstance(error, SystemExit):
                said = f"it has left with {said}"
            group.end(f"{group.name(group.rank)}: {said}")
            raise
        group.close()


# %% [markdown]
# A command hands over its work, a function of its options and of the group.
# Where it is told nothing but options, these are what must be alike; training
# compares more.


# %% a command in a group tags=["export"] module="cli.together"
def in_group(args, work):
    """work(args, group) for the group of this process; what it returns.

    args: the values of a command's options, of which group says what kind.
    """
    group = find_group(args.group)
    if group.size == 1:
        return work(args, group)
    with together(group):
        return work(args, group)


def check_command(args, group, **facts):
    """Raise ValueError unless a group was given one command, and is alike.

    facts: more that has to be alike, of any kind; see `check_alike`. And
    unless MPI is enough: such a command has nothing on GPUs.
    """
    if args.group == "nccl":
        raise ValueError("--group nccl is for `llmnb train` on GPUs alone")
    facts = {name: str(value) for name, value in (args.given | facts).items()}
    check_alike(group, surroundings() | facts)


# %% [markdown]
# The tests start real ranks with `mpirun`: 1, 2 and 4 of them, with one and two threads,
# end with the same bytes after 50 steps; one is killed by a signal that cannot be
# caught, at a random moment, and another number of ranks goes on; one is
# stopped, one exits, one gets no memory, one has another option or processor
# (`tests/train/test_group_mpi.py`).
#
# ## What it does not do
#
# Every rank reads the text and the run's folder itself, so all machines need
# them under the same path, as clusters have. Each rank holds all
# parameters and all gradients, $8P$ bytes, and ranks on one machine do not share
# them: eight there hold $64P$. Where memory is short, start fewer ranks with more
# threads each. Ctrl-C reaches
# `mpirun`, which gives its ranks about a second; the last state is whole in any case.
#
# The kernels are the CPU's. For a group of GPUs see [chapter 6.5](05_gpus.ipynb).
#
# ## Take away
#
# - The owner of a shard has the whole gradient of it, so it alone needs $m$ and $v$.
# - Owners send parameters in place of sums: shards cost nothing on the wire.
# - Neither the place in the data nor a state depends on the number of ranks, so
#   a run can go on with another.
# - What decides the bits is compared before the first step, and a rank that is
#   silent for eight seconds ends the run.
#
# ## Design note
#
# Why a watch of our own, when MPI has error handlers? Those are called when a
# connection breaks. A process that was stopped keeps its connections, and so
# does a machine that has lost its power, until TCP gives up after many minutes.
# A sign of life that does not come is the same in all these cases.
#
# ## Exercises
#
# **1** (★). How much memory do parameters, gradients and averages of GPT-2's 124
# million parameters take on each of 1, 2, 4 and 64 ranks? What is the least,
# however many there are?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# By (6.2.1) it falls from 16 bytes a parameter to 12, 10 and 8.125; never below 8, for
# parameters and gradients stay whole.
# :::

# %% exercise 1, checked tags=["hide-cell"]
for R in (1, 2, 4, 64):
    print(R, f"{8 * 124e6 * (1 + 1 / R) / 1e6:,.0f} MB")

# %% [markdown]
# **2** (★★). Let each rank clip its shard by the norm of this shard alone. Do the ranks
# still have the same parameters as each other? As one process?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# As each other, since each gets every shard from its owner: a comparison of ranks
# finds nothing. Not as one process: a shard's norm is less than that of the whole,
# so it is shrunk less, or not at all, and each shard by a factor of its own.
# :::

# %% exercise 2, checked tags=["hide-cell"]
from dataclasses import replace


class Alone(Sharded):
    """Clips its shard as if there were no other."""

    def clip_gradients(self, max_norm):
        grads = self._own("grads")
        norm = math.sqrt(squares(grads, piece_length(grads.size)).sum())
        shrink(grads, norm, max_norm)
        return norm


short = replace(config, clip=0.1)
want = weights(ALONE, None, short)
for made, claim in (Sharded, True), (Alone, False):
    found = rehearse(2, lambda g, made=made: weights(g, made, short))
    verdict(made.__name__, np.array_equal(*found), "ranks agree")
    same = np.array_equal(found[0], want)
    verdict(made.__name__, same == claim, f"as one process: {claim}")

# %% [markdown]
# ## Further reading
#
# - Rajbhandari et al. (2020), [ZeRO: Memory Optimizations Toward Training
#   Trillion Parameter Models](https://arxiv.org/abs/1910.02054): stages two and three
#   put gradients and parameters into shards too.
# - Dalcin and Fang (2021), [mpi4py: Status Update After 12 Years of
#   Development](https://doi.org/10.1109/MCSE.2021.3083216): how MPI comes to Python.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

place.cleanup()
gained("6.2")
