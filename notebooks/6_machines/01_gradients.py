# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       train.exchange: "Gradients that many processes have computed, summed in one order."
#       train.rehearsal: "A group of threads that stand for processes."
# ---

# %% [markdown]
# # Many gradients: one sum, one order
#
# > Processes that each compute some micro-batches add up their gradients in the
# > order of one process; what has to cross the wire for it is counted and sent.
#
# *Reading time: 22 minutes. You need: the loop and its tree
# ([chapter 4.13](../4_practice/13_loop.ipynb)) and the norm in pieces
# ([chapter 2.3](../2_cpu/03_loss.ipynb)).*

# %% [markdown]
# ## Where we are
#
# One machine has so many cores, and a run on it takes so many days. Another machine
# would halve them, if both could train the same model. This chapter
# splits the batch of an update among processes, and says what they must tell
# each other. They are threads of this notebook, so that it runs anywhere; the next
# chapter puts machines in their place. At the end of it you can
#
# - say why a sum over processes has other bits than a sum in one, and what is done
#   about it;
# - name the blocks that a process sends, and who adds them;
# - count the bytes of a step for any model and any number of processes.
#
# ## Setup

# %% setup
import matplotlib.pyplot as plt

from llmnb.book.diagram import PALETTE
from llmnb.book.verify import verdict

# %% [markdown]
# ## What can be split
#
# The gradient of an update is a mean over $n$ micro-batches (4.13.2), and each term
# needs the weights and its own tokens, nothing of the others. So give $R$
# processes the same weights, and number them: the *rank* $r$ of a process
# goes from 0 to $R - 1$. Each computes $n / R$ of the gradients and adds
# them. What is left is a sum of $R$ arrays, each as long as the model, which
# lie in different memories. This is **data parallel** training.
#
# Who adds? If rank 0 did, it would receive $R - 1$ whole gradients through one
# wire, add for all while the others wait, and send $R - 1$ results. But
# a sum of arrays is a sum element by element, so elements can be divided among
# ranks: cut the flat gradient into $R$ *shards*. Every rank sends shard 0 of
# its gradient to rank 0, shard 1 to rank 1, and so on; each rank adds the $R$
# arrays that it receives. Then every wire carries the same, and every
# processor adds as much. In MPI, the library that clusters use, the sending
# is one call, *all-to-all*.
#
# ## The order of the sum
#
# Floats do not add up alike in every order. At a hundred million, float32 counts in
# steps of eight. Here is one sum, in truth 100,000,021, taken by one process,
# by two and by four that each add up their own and then the sums:

# %% one sum, three results
import numpy as np

values = np.array([1e8, 3, 3, 3, 3, 3, 3, 3], np.float32)


def plain(values):
    """One after the other, in float32."""
    total = np.float32(0)
    for x in values:
        total += x
    return total


for R in (1, 2, 4):
    print(R, int(plain([plain(x) for x in np.split(values, R)])))

# %% [markdown]
# A difference in the last bit grows from step to step until the curves part.
# The run is no worse for it, but you can no longer tell it from a run with a
# mistake. So we want the bits of one process for any number of ranks, and
# need an order of additions that all of them can keep.
#
# Let rank $r$ have the micro-batches from $r n / R$ up to, and without,
# $(r + 1) n / R$, and look at the tree of (4.13.3) over all $n$. Leave aside
# its last sums, over the blocks that are left when $n$ is no power of two.
# Which of the others can a rank make alone? Those whose leaves are all its
# own. A block of the tree begins at a multiple of its own length, a power of
# two. So what a rank makes are the longest such blocks that fit into its
# range: the same that the binary counter of chapter 4.13 leaves on its stack
# when it is fed with this range only.

# %% imports of the exchange tags=["export"] module="train.exchange"
import math
from itertools import pairwise

import numpy as np

from llmnb.cpu.adamw import PIECES, piece_length
from llmnb.train.group import Tree


# %% what a process has to send tags=["export"] module="train.exchange"
def blocks_of(pieces):
    """The blocks of a `Tree` to which a range of micro-batches adds up.

    Returns a list of (start, stop).
    """
    tree = Tree(lambda before, array: None)
    for k in pieces:
        tree.push(k, k + 1, None)
    return [(start, stop) for start, stop, _ in tree.blocks]


# %% [markdown]
# For some numbers $n$ and $R$, the blocks of each rank, from a first micro-batch up to
# and without a last:

# %% blocks of some ranks
for n, R in (8, 2), (8, 4), (12, 4), (12, 2):
    ranges = [range(r * n // R, (r + 1) * n // R) for r in range(R)]
    print(n, R, *[blocks_of(x) for x in ranges])

# %% [markdown]
# When $n / R$ is a power of two, a rank has one block. Else it has a few: of
# twelve micro-batches and two ranks, rank 0 has $0$ to $3$ and $4$ to $5$, for
# $6$ and $7$, which would complete the block, are with rank 1. It must not add
# these two blocks to each other, since one process would not. It sends both.
#
# How many can there be, in a range of $k = n / R$? From its beginning they
# grow, as far as the beginning allows; then they shrink, as far as the end
# allows. So each length occurs at most twice, once on the way up and once on
# the way down. The lengths are $1, 2, 4, \dots, 2^m$ with
# $m = \lfloor \log_2 k \rfloor$, and the last at most once, since two of it
# would be longer than $k$:
#
# $$ \text{blocks of a rank} \le 2 \log_2 (n / R) + 1 . \tag{6.1.1} $$
#
# The owner of a shard pushes the blocks of all ranks onto a stack of its own,
# in order of their beginnings, and the same rule joins them. The result is the
# same tree. For suppose that it pushed single leaves. Could the first $j$ leaves of
# a longer block join what lies before it? Only if that were $j$ long too, and
# began at a multiple of $2j$. But the block itself begins at a multiple of its
# length, and so of $2j$, and what begins $j$ before it does not. The leaves
# of a block thus join each other first, and the stack is then the one that
# pushing the whole block leaves.

# %% the tree, drawn tags=["hide-input"]
fig, axes = plt.subplots(1, 2, figsize=(9, 3.1), dpi=100)
COLOURS = ("blue", "orange", "green", "purple")


def draw_tree(ax, n, R):
    """A tree over n leaves; what one rank adds has its colour."""
    stack = []
    for start, stop, x, y in [(k, k + 1, float(k), 0) for k in range(n)]:
        owner = COLOURS[start * R // n]
        ax.text(x, -0.05, str(start), ha="center", va="top",
                color=PALETTE[owner])  # fmt: skip
        node = start, stop, x, y
        while (
            stack
            and stack[-1][1] - stack[-1][0] == stop - node[0]
            and (stack[-1][0] % (2 * (stop - node[0])) == 0)
        ):
            node = join(ax, stack.pop(), node, n, R)
        stack.append(node)
    while len(stack) > 1:
        node = stack.pop()
        stack.append(join(ax, stack.pop(), node, n, R))


def join(ax, a, b, n, R):
    x, y = (a[2] + b[2]) / 2, max(a[3], b[3]) + 1
    one = a[0] * R // n == (b[1] - 1) * R // n
    colour = PALETTE[COLOURS[a[0] * R // n] if one else "ink"]
    for child in a, b:
        ax.plot([child[2], x], [child[3] + 0.25, y + 0.05], color=colour,
                lw=1.4, ls="-" if one else "--")  # fmt: skip
    ax.text(x, y + 0.05, "+", ha="center", va="bottom", color=colour,
            weight="bold")  # fmt: skip
    return a[0], b[1], x, y


for ax, (n, R) in zip(axes, ((8, 4), (12, 2)), strict=True):
    draw_tree(ax, n, R)
    ax.set_title(f"{n} micro-batches, {R} ranks", size=10)
    ax.set(ylim=(-0.6, 4.7))
    ax.axis("off")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 6.1.1. The order of the sum, with the sums that a rank makes alone in
# its colour. Dashed are the sums over blocks of different ranks, which the
# owner of a shard makes. The tree depends on the micro-batches only; the
# colours change with the number of ranks.*
#
# ## Who owns what
#
# A shard could be any range. One thing decides: the norm of the gradient,
# by which it is clipped, is a sum over all of it, and its bits must not depend on
# $R$ either. [Chapter 2.3](../2_cpu/03_loss.ipynb) takes it over 256 pieces
# whose bounds depend on the length alone. So let a shard be a run of whole
# pieces. Then a rank sums the squares of its own pieces, all ranks tell each
# other these few numbers, and each of them adds the 256 in the one order. The
# loss is treated alike: all ranks gather the losses of all micro-batches, and
# add them in the order of these.


# %% who owns what tags=["export"] module="train.exchange"
def shards(size, ranks):
    """Where the shards of a flat array begin and end: a list of pairs.

    size: elements of the array. ranks: processes, a shard each, of
    whole pieces of the norm's sum (see `llmnb.cpu.global_norm`). Raises
    ValueError when there are more processes than such pieces.
    """
    if ranks > PIECES:
        raise ValueError(f"a group has at most {PIECES} ranks, got {ranks}")
    length = piece_length(size)
    ends = (r * PIECES // ranks * length for r in range(ranks + 1))
    return list(pairwise(min(size, end) for end in ends))


# %% the shards of a million numbers
print(shards(1_000_000, 3))

# %% [markdown]
# So a group has at most 256 ranks. Their shards are equal up to one piece,
# 1/256 of the model. That is little beside the shard of one of eight ranks.
# But of 200 ranks some own one piece and some two, and the most loaded has
# over one and a half times its part.
#
# ## The exchange
#
# If all arrived at once, a rank would need $R$ shards of memory for what comes, a whole
# gradient once more. So it comes in parts, sixteen megabytes at a time: a part
# of each rank's shard is exchanged, added, and written over the rank's own.
# That is safe, because what it overwrites has been sent (to itself) the moment before,
# and nobody else is sent that range.

# %% the exchange tags=["export"] module="train.exchange"
BUFFER = 1 << 24  # bytes that arrive at a time


def exchange(group, grads, blocks, count, came=None, add=None):
    """Leave in this process's shard of grads the sum over all processes.

    group: a Group of several, each of which calls this. grads: a model's
    gradients, flat. blocks: those of its `GradientTree`, which may lie in
    grads. count: micro-batches of the update. The rest of grads is left as
    it is. came: None, or a flat array for what arrives. add: None, or what
    adds that up, a function (out, blocks of each rank, what came).
    """
    spans, rank = shards(grads.size, group.size), group.rank
    held = [blocks_of(group.share(count, r)) for r in range(group.size)]
    parts = max(map(len, held)), group.size
    if came is None:
        size = max(BUFFER // grads.itemsize, math.prod(parts))
        came = np.empty(size, grads.dtype)
    width = came.size // math.prod(parts)
    came = came[: math.prod(parts) * width].reshape(*parts, width)
    for at in range(0, max(b - a for a, b in spans), width):
        cut = [(min(a + at, b), min(a + at + width, b)) for a, b in spans]
        for i in range(parts[0]):
            mine = blocks[i][2] if i < len(blocks) else None
            group.exchange(came[i], mine, cut, [i < len(x) for x in held])
        start, stop = cut[rank]
        if start < stop:
            (add or _add)(grads[start:stop], held, came)


def _add(out, held, came):
    """The tree of (4.13.3) over the blocks of all, in their order."""
    tree = Tree(lambda before, array: np.add(before, array, out=array))
    for rank, blocks in enumerate(held):
        for i, (start, stop) in enumerate(blocks):
            tree.push(start, stop, came[i, rank, : out.size])
    out[:] = tree.whole()


# %% [markdown]
# ## A rehearsal
#
# To try it we need ranks. Threads will do: each is given a `Rehearsal`, with
# the methods that a group over MPI has, and they meet at a barrier where real
# ones would send. Besides `gather` of chapter 4.13 there are four methods:
# `exchange` sends everyone its part, `spread` gives everyone the whole of what
# each has a part of (*all-gather*), and `collect` brings all parts to the first
# rank; `rest` only waits for all. The first two, which every step calls, count the bytes that the thread
# would have sent. A thread that returns meets the others once more to say so;
# if they still expect a part of it, that is an error, and not a wait for ever.

# %% imports of the rehearsal tags=["export"] module="train.rehearsal"
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from llmnb.train.group import Group


# %% threads that stand for processes tags=["export"] module="train.rehearsal"
LEFT = object()  # what a thread brings that has returned


class Rehearsal(Group):
    """One of a group of threads, with what a group of processes does.

    sent: bytes that it would have sent to others in exchange and spread.
    """

    def __init__(self, rank, table, barrier):
        self.rank, self.size, self.sent = rank, len(table), 0
        self._table, self._barrier = table, barrier

    def _meet(self, x=None):
        """What each has brought, when all are there."""
        self._table[self.rank] = x
        self._barrier.wait()
        found = list(self._table)
        self._barrier.wait()
        gone = [other is LEFT for other in found]
        if any(gone) and not all(gone):
            raise RuntimeError(
                f"{self.name(gone.index(True))} of the group has returned, "
                f"and {self.name(gone.index(False))} waits for it"
            )
        return found

    def name(self, rank):
        """A rank in words."""
        return f"rank {rank}"

    def gather(self, x):
        return self._meet(x)

    def exchange(self, out, array, spans, senders):
        """Send each its span of an array; out[r] begins with what r sent.

        array: flat, or None for who does not send. spans: a (start, stop)
        for each. senders: whether it sends, for each.
        """
        start, stop = spans[self.rank]
        for rank, other in enumerate(self._meet(array)):
            if senders[rank]:
                out[rank, : stop - start] = other[start:stop]
        self._meet()  # until all have read
        if senders[self.rank]:
            others = sum(b - a for a, b in spans) - (stop - start)
            self.sent += others * array.itemsize

    def spread(self, array, spans):
        """Have all of an array, of which each has its own span."""
        for other, span in zip(self._meet(array), spans, strict=True):
            if other is not array:
                array[slice(*span)] = other[slice(*span)]
        self._meet()
        start, stop = spans[self.rank]
        self.sent += (self.size - 1) * (stop - start) * array.itemsize

    def collect(self, part, lengths):
        """The parts of all in one array, for the first; None for others."""
        found = self._meet(part)
        whole = np.concatenate(found) if self.first else None
        self._meet()
        return whole

    def rest(self):
        """Wait for all; as threads do at each call."""
        self._meet()


# %% rehearse tags=["export"] module="train.rehearsal"
def rehearse(size, work):
    """What work(group) returns in each of `size` threads, a list.

    An error in one of them ends all, and is raised. Raises RuntimeError
    when one returns while others wait for it.
    """
    table, barrier = [None] * size, threading.Barrier(size)

    def part(rank):
        try:
            group = Rehearsal(rank, table, barrier)
            result = work(group)
            group._meet(LEFT)
            return result
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        made = [pool.submit(part, rank) for rank in range(size)]
    for error in [x.exception() for x in made if x.exception()]:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [x.result() for x in made]


# %% [markdown]
# Twelve gradients of a made-up model, which one process adds by its tree, and then 2,
# 3, 4, 6 and 12 ranks:

# %% the same bits from any number of ranks
given = np.random.default_rng(6).normal(size=(12, 10_007)).astype(np.float32)


def added(group):
    """This rank's shard of the sum over all twelve."""
    tree = Tree(lambda before, array: np.add(before, array, out=array))
    for k in group.share(12):
        tree.push(k, k + 1, given[k].copy())
    grads = tree.blocks[-1][2]
    exchange(group, grads, tree.blocks, 12)
    return grads[slice(*shards(grads.size, group.size)[group.rank])]


tree = Tree(np.add)
for k in range(12):
    tree.push(k, k + 1, given[k])
alone = tree.whole()
for R in (2, 3, 4, 6, 12):
    same = np.array_equal(np.concatenate(rehearse(R, added)), alone)
    verdict(f"{R} ranks", same, "the bits of one process")

# %% [markdown]
# And if a rank added all that it has, instead of sending two blocks? With
# two ranks of six the bits must differ, or the tree would be for nothing:


# %% a rank that adds too much
def hasty(r):
    tree = Tree(np.add)
    for k in range(6 * r, 6 * r + 6):
        tree.push(k, k + 1, given[k])
    return tree.whole()


verdict("added too early", not np.array_equal(hasty(0) + hasty(1), alone),
        "other bits, and caught")  # fmt: skip

# %% [markdown]
# ## Count it
#
# Let the model have $P$ parameters of four bytes. A rank that has $h$ blocks sends of each
# all shards but its own, and afterwards, when the owners have updated their
# parameters, it sends its own shard of these to $R - 1$ others:
#
# $$
# \begin{aligned}
# \text{bytes sent} &= 4 P h \left(1 - \frac1R\right) \\
#    &\quad {} + 4 \frac{P}{R} (R - 1) \\
#    &= 4 P (h + 1) \left(1 - \frac1R\right) .
# \end{aligned}
# \tag{6.1.2}
# $$
#
# That is exact for shards of equal length. Else it is the mean over the ranks,
# if all have $h$ blocks: who owns more sends less of its gradient, and more
# parameters. With one block it is $8P (1 - 1/R)$: once the model for two
# ranks, nearly twice for many, and however large the batch. That is why data
# parallelism scales: more ranks compute more tokens for the same bytes. The
# formula also says what to avoid: a number of micro-batches to a rank that is
# no power of two.


# %% counted
def sent(group):
    added(group)
    group.spread(np.zeros(10_007, np.float32), shards(10_007, group.size))
    return group.sent


for R in (2, 3, 4, 6, 12):
    blocks = [blocks_of(range(r * 12 // R, (r + 1) * 12 // R))
              for r in range(R)]  # fmt: skip
    derived = sum(len(x) + 1 for x in blocks) * 4 * 10_007 * (1 - 1 / R)
    close = abs(sum(rehearse(R, sent)) / derived - 1) < 0.02
    verdict(f"{R} ranks, {sum(map(len, blocks))} blocks", close,
            "sent as derived, to 2 %")  # fmt: skip

# %% [markdown]
# ## What it does not do
#
# All gradients are sent as they are, in four bytes a number; many programs
# round them to two. And it sends when the backward pass is over; the gradient
# of the last layer is there long before that of the first, and could travel
# meanwhile ([chapter 6.3](03_cost.ipynb) says what that would save).
#
# ## Take away
#
# - A batch is split without loss, because its gradient is a sum.
# - Sums are split by elements: rank $r$ owns shard $r$, and everyone sends it there.
# - A tree over micro-batches, and not over ranks, has the same bits for any number of
#   ranks. The price is memory for what waits, and more blocks to send
#   where ranges do not fit the tree.
# - With one block, each rank sends less than twice the model in a step, however
#   many ranks there are.
#
# ## Design note
#
# MPI has a call for the whole, `Allreduce`, which leaves the sum on every rank. In which
# order it adds is the library's choice, which changes with the length of the
# array, the number of ranks and their places in the network. We use the calls that only
# move bytes, and add ourselves.
#
# Another way to the same bits is a sum of integers, which adds up alike in any
# order: scale, round to 64 bits, add, scale back. It needs twice the bytes, or
# a bound on the numbers, and one process has to add in integers too, or its
# bits would differ.
#
# ## Exercises
#
# **1** (★). A model of 124 million parameters trains on 16 ranks, one
# micro-batch each. How many bytes does a rank send in a step, and how long does that take
# at 1 gigabit a second?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# $8 \cdot 124 \cdot 10^6 \cdot 15/16$ bytes are 930 megabytes: 7.4 seconds, in
# which nothing is computed.
# :::

# %% exercise 1, checked tags=["hide-cell"]
print(
    f"{8 * 124e6 * 15 / 16 / 1e6:.0f} MB, {8 * 124e6 * 15 / 16 / 125e6:.1f} s"
)

# %% [markdown]
# **2** (★★). Which numbers of micro-batches let any of 1 to 8 ranks share them, and how
# many gradients wait at most in one process then?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# The multiples of 840, the least common multiple of 1 to 8. If one process
# computes all 840, at most nine gradients wait: while piece 511 is computed,
# which has nine ones in base two. Few need that: 24 can be shared by 1, 2, 3,
# 4, 6 and 8 ranks, and at most four wait.
# :::

# %% exercise 2, checked tags=["hide-cell"]
from llmnb.train.group import waiting

print(math.lcm(*range(1, 9)), waiting(range(840)), waiting(range(24)))

# %% [markdown]
# ## Further reading
#
# - Message Passing Interface Forum, [MPI: A Message-Passing Interface
#   Standard](https://www.mpi-forum.org/docs/): the chapter on collective
#   communication says what each call promises, and what it does not.
# - Rajbhandari et al. (2020), [ZeRO: Memory Optimizations Toward Training
#   Trillion Parameter Models](https://arxiv.org/abs/1910.02054): shards, first
#   for the optimiser, then for more.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("6.1")
