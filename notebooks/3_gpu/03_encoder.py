# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cuda.encoder: "The encoder on a GPU, forward and backward."
#       bench.rungs_encoder: "Plain versions of the encoder's kernels, for the ladder."
# ---

# %% [markdown]
# # Encoder on a GPU: an owner for every row
#
# > Forward, a thread owns four channels; backward, the first place of each
# > token owns its row, so that no addition is lost and none is out of order,
# > and it looks for the others in a bucket, not in the whole text.
#
# *Reading time: 20 minutes. You need: [chapter 1.5](../1_by_hand/05_encoder.ipynb)
# for the layer, [chapter 3.1](01_threads.ipynb) for races and votes,
# [chapter 3.2](02_sectors.ipynb) for sectors.*

# %% [markdown]
# ## Where we are
#
# The encoder is the smallest layer, and the first that we bring to a GPU. Its
# forward pass is as easy as a kernel can be. Its backward pass has the trap of
# repeated tokens once more, this time as a race between threads. We count what
# each version asks of the memory; no GPU has timed them
# ([chapter 3.1](01_threads.ipynb)). At the end you can
#
# - give the elements of a layer to threads so that no byte of a sector is
#   wasted;
# - write a sum over unknown places without a race and without atomics;
# - let a warp look at 32 places in one request;
# - put places into buckets without losing their order.

# %% [markdown]
# ## Setup

# %% setup
import matplotlib.pyplot as plt

from llmnb.book.moving import moving
from llmnb.book.owners import draw_owners, walk
from llmnb.book.verify import compare, verdict
from llmnb.cpu import encoder as cpu_encoder
from llmnb.gpu.launch import empty, simulated, to_device, to_host
from llmnb.gpu.simulator import RaceError, watch
from llmnb.reference import encoder as reference

# %% imports of the encoder tags=["export"]
import numpy as np

from llmnb.gpu.launch import DEVICE, aligned, device, given_work, kernel
from llmnb.gpu.simulator import cuda, load4, store4
from llmnb.shapes import shapes

# %% the seed
rng = np.random.default_rng(4)

# %% [markdown]
# ## Forward: who owns what
#
# The forward pass reads a row of `wte` and a row of `wpe` for each place and
# writes their sum. It has one addition for twelve bytes: memory decides.
# There is nothing to share and nothing to wait for. We must only see to it
# that neighbours in memory belong to neighbours in a warp.
#
# **A thread an element.** Thread $i$ owns element $i$ of the output, seen as
# one long array: place $n = \lfloor i / C \rfloor$ and channel
# $c = i \bmod C$. The lanes of a warp read 32 neighbours of a row of each
# table. The token `inp[n]` is the same for (nearly) all of them, and one
# sector serves the warp.

# %% block size tags=["exporti"]
THREADS = 128  # in a block


# %% forward, a thread an element tags=["exporti"]
@kernel
def forward_by_one(out, inp, wte, wpe, T):
    i = cuda.grid(1)
    rows, C = out.shape
    if i < rows * C:
        n, c = i // C, i % C
        out[n, c] = wte[inp[n], c] + wpe[n % T, c]


# %% [markdown]
# **A thread four channels.** The first version moves hardly more bytes than it
# must, but each warp makes four requests for 128 bytes of output: for the
# token, for both rows and for the result. With four channels a thread it makes
# four for 512 bytes, and finds its place once in place of four times. A row
# must begin at a multiple of 16 bytes, so $C$ must be a multiple of 4.


# %% forward, a thread four channels tags=["exporti"]
@kernel
def _forward_by_four(out, inp, wte, wpe, T):
    i = cuda.grid(1) * 4
    rows, C = out.shape
    if i < rows * C:
        n, c = i // C, i % C
        x, y, z, w = load4(wte, int(inp[n]) * C + c)
        p, q, r, s = load4(wpe, n % T * C + c)
        store4(out, i, x + p, y + q, z + r, w + s)


# %% owners in the forward pass, and their steps
fig, axes = plt.subplots(1, 2, figsize=(8, 2.4), dpi=100)
who = np.arange(32).reshape(4, 8)
names = {"rows": "place", "cols": "channel"}
draw_owners(axes[0], who.tolist(), "one element", 8, **names)
draw_owners(axes[1], (who // 4).tolist(), "four channels", 2, **names)
fig.tight_layout()
plt.show()
tables = np.arange(24).reshape(3, 8), np.arange(4)[:, None] * np.full(8, 100)
wte, wpe = (table.astype(np.float32) for table in tables)
args = np.zeros((4, 8), np.float32), np.array([2, 0, 1, 0]), wte, wpe, 4
walks = [
    walk("a thread an element", forward_by_one, 1, 32, args, 8),
    walk("a thread four channels", _forward_by_four, 1, 8, args, 2),
]
moving("threads", "both kernels, step by step", walks=walks)

# %% [markdown]
# *Figure 3.3.1. The owners of an output with four places and eight channels,
# a colour for each place: a thread for each element, or a thread for four
# channels, which makes a quarter of the threads. In both, neighbours in a row
# belong to neighbours in a warp, or to one thread, so no byte of a sector is
# left unused; and no element of the output is touched by two.*
#
# The layer takes the second where it can. Shapes and types are checked. The
# *values* of the tokens are on the device, and to look at them would mean to
# wait for it; whoever sends the tokens there must have checked them.


# %% the encoder, forward tags=["export"]
@shapes("B T C!, B T of Vp, Vp C, T+ C", DEVICE)
def encoder_forward(out, inp, wte, wpe):
    """Sum the vector of each token and the vector of its position.

    out   (B, T, C)      float32, overwritten
    inp   (B, T)         int32, each in [0, Vp): the caller sees to that
    wte   (Vp, C)        float32, the table of tokens
    wpe   (T_max, C)     float32, the table of positions; T <= T_max

    All on a device. A thread has four channels; where C % 4 or an array
    that begins elsewhere than at 16 bytes forbids it, one. Raises TypeError
    or ValueError where an array does not fit.
    """
    B, T, C = out.shape
    run, each = forward_by_one, 1
    if C % 4 == 0 and aligned(out, wte, wpe):
        run, each = _forward_by_four, 4
    rows, places = out.reshape(B * T, C), inp.reshape(B * T)
    grid = -(-out.size // (each * THREADS))
    run[grid, THREADS](rows, places, wte, wpe, T)


# %% [markdown]
# Its plain version stays as a rung: a function with the same arguments, which
# the model does not use and the ladder of
# [chapter A.7](../appendix/07_ladders.ipynb) will time beside it.

# %% imports of the rungs tags=["export"] module="bench.rungs_encoder"
from llmnb.cuda.encoder import (
    THREADS,
    forward_by_one,
    positions_by_one,
    tokens_by_one,
)
from llmnb.gpu.launch import kernel
from llmnb.gpu.simulator import cuda


# %% forward, the rung tags=["export"] module="bench.rungs_encoder"
def _forward_an_element(out, inp, wte, wpe):
    """encoder_forward with a thread for each element."""
    B, T, C = out.shape
    rows, places = out.reshape(B * T, C), inp.reshape(B * T)
    grid = -(-out.size // THREADS)
    forward_by_one[grid, THREADS](rows, places, wte, wpe, T)


ENCODER_FORWARD = (_forward_an_element,)

# %% [markdown]
# Both against NumPy, for a size that has vectors of four and one that has none:


# %% a problem, and where it runs
def problem(B, T, C, Vp, place):
    inp = rng.integers(0, Vp, (B, T), dtype=np.int32)
    wte, wpe = rng.normal(size=(2, max(Vp, T), C)).astype(np.float32)
    dout = rng.normal(size=(B, T, C)).astype(np.float32)
    arrays = inp, wte[:Vp], wpe[:T], dout
    return arrays, [place(a) for a in arrays]


FORWARD = {"an element": ENCODER_FORWARD[0], "four": encoder_forward}
for C in (5, 8):
    (inp, wte, wpe, want), there = problem(3, 7, C, 11, to_device)
    reference.encoder_forward(want, inp, wte, wpe)
    for name, layer in FORWARD.items():
        out = empty(want.shape)
        layer(out, *there[:3])
        compare(f"C = {C}, {name}", to_host(out), want, tol=1e-6)


# %% what four channels move less of
def count(name, layer, *arrays):
    with watch() as seen:
        layer(*(simulated(a) for a in arrays))
    print(f"{name:15} {seen.requests:>5} requests {seen.sectors:>6}", end="")
    print(f" sectors {seen.reads:>6} reads {seen.atomics:>5} atomics")


(inp, wte, wpe, dout), _ = problem(2, 8, 128, 11, simulated)
for name, layer in FORWARD.items():
    count(name, layer, dout, inp, wte, wpe)

# %% [markdown]
# A quarter of the requests. Three times 2048 elements of four bytes are 768
# sectors, which nobody can save; the rest is tokens, which the first reads
# for each warp of 32 elements and the second for each of 128.
#
# ## Backward: a race
#
# Backward adds each row of `dout` to the row of `dwte` that its token names.
# The forward pass turned round gives each element of `dout` a thread, which
# adds it where it belongs. Repeated tokens are the trap, as in
# [chapter 1.5](../1_by_hand/05_encoder.ipynb):


# %% a thread an element, wrong
@kernel
def scatter(dwte, dout, inp):
    i = cuda.grid(1)
    rows, C = dout.shape
    if i < rows * C:
        n, c = i // C, i % C
        dwte[inp[n], c] += dout[n, c]


def scattered(body):
    dwte = simulated(np.zeros((4, 8), np.float32))
    tokens = simulated(np.array([2, 0, 2, 2], np.int32))
    rows = simulated(np.ones((4, 8), np.float32))
    body[1, 32](dwte, rows, tokens)
    return to_host(dwte)[:, 0].astype(int)


print(scattered(scatter))
try:
    with watch():
        scattered(scatter)
    verdict("scatter", False, "is caught")
except RaceError as error:
    print(str(error).replace(", and", ",\nand"))

# %% [markdown]
# The first line is right, token 2 stands in three places, because the
# simulator runs one thread after the other. The watch says what a GPU would
# have made of it: its lanes read before any of them writes, and token 2 would
# count once.
#
# ## Atomics
#
# An atomic addition cannot be torn apart, and watch has nothing to say.


# %% backward, atomics tags=["exporti"] module="bench.rungs_encoder"
@kernel
def _backward_atomic(dwte, dwpe, dout, inp, T):
    i = cuda.grid(1)
    rows, C = dout.shape
    if i < rows * C:
        n, c = i // C, i % C
        dy = dout[n, c]
        cuda.atomic.add(dwte, (inp[n], c), dy)
        cuda.atomic.add(dwpe, (n % T, c), dy)


def _backward_with_atomics(dwte, dwpe, dout, inp, work=None):
    """encoder_backward by atomics, in an order that changes run by run."""
    B, T, C = dout.shape
    rows, places = dout.reshape(B * T, C), inp.reshape(B * T)
    grid = -(-dout.size // THREADS)
    _backward_atomic[grid, THREADS](dwte, dwpe, rows, places, T)


# %% [markdown]
# But in which order does the memory add? In that in which the requests
# arrive, and the order of a sum of float32 changes its last bits. The
# simulator adds in the order of the threads and cannot show it; on a
# GPU two runs of one training may part after the first step. This book
# has promised runs that repeat to the last bit, so atomics are a rung to
# stand on and not our choice.
#
# ## A block a place
#
# Who may own a row of `dwte`, so that nobody else adds to it? Let each
# *place* of the text have a block of threads, one thread for each channel. A
# block looks whether its token stands at an earlier place. If so, it ends:
# an earlier block will do the work. If not, it is the first, and it walks
# through the rest of the text, adds up the rows of its token in the order of
# the text, and writes the sum.


# %% the first place of a token tags=["exporti"]
@kernel
def tokens_by_one(dwte, dout, inp):
    n, c = cuda.blockIdx.x, cuda.blockIdx.y * THREADS + cuda.threadIdx.x
    rows, C = dout.shape
    token = inp[n]
    for m in range(n):
        if inp[m] == token:
            return  # the block of place m, or an earlier one, does it all
    if c < C:
        total = dwte[token, c]
        for m in range(n, rows):
            if inp[m] == token:
                total += dout[m, c]
        dwte[token, c] = total


# %% owners in the backward pass
text = "cacbca"
who = [[text.index(token)] * 4 for token in text]
fig, ax = plt.subplots(figsize=(4.4, 3.2), dpi=100)
draw_owners(ax, who, rows="place", cols="channel")
ax.set_yticks(np.arange(len(text)) + 0.5, list(text))
fig.tight_layout()
plt.show()
dout, inp = (
    np.arange(24, dtype=np.float32),
    np.array(["abc".index(x) for x in text]),
)
args = np.zeros((3, 4), np.float32), dout.reshape(6, 4), inp
steps = walk("tokens_by_one", tokens_by_one, 6, 4, args)
moving("threads", "six blocks of four threads, step by step", walks=[steps])

# %% [markdown]
# *Figure 3.3.2. Who adds the rows of `dout` for the text "cacbca". Blocks 0,
# 1 and 3 stand at the first place of their letter: each adds up all rows of
# that letter, into one row of `dwte`. Blocks 2, 4 and 5 find their letter
# before them and end. So each row of `dwte` has one owner, and nobody races.*
#
# A row of `dwpe` has an owner without any search: position $t$ occurs once
# in each of the B texts. A thread for each element adds them up.


# %% the rows of a position tags=["exporti"]
@kernel
def positions_by_one(dwpe, dout, T):
    i = cuda.grid(1)
    rows, C = dout.shape
    if i < T * C:
        t, c = i // C, i % C
        total = dwpe[t, c]
        for n in range(t, rows, T):
            total += dout[n, c]
        dwpe[t, c] = total


# %% [markdown]
# ## Votes
#
# A block a place adds few numbers and reads many tokens: each warp of each
# block asks for one token at a time, and all its lanes for the same. A warp can
# read 32 tokens in one request, each lane one, and vote. The bits of the
# vote say where the token stands. That makes a thirty-second of the requests.
# But every block still reads the whole text, and with the text grows the
# number of blocks: what all of them read grows with its square.
#
# ## Buckets
#
# Sort the places first, roughly. Bucket $k$ of $K$ holds the places whose
# token leaves $k$ when divided by $K$. All places of a token are then in one
# bucket, and with a bucket for some 16 places, up to 1,024 buckets, there is
# little to look through. What must not get lost is the order of the text.
#
# A GPU has no instruction for whole numbers that divides: it takes twenty
# others. So $K$ is a power of two. What a token leaves is then its last binary
# digits, and `token & (K - 1)` takes them in one.
#
# A warp makes a bucket. It goes through the text twice, 32 places at a time,
# and votes. The first time it counts the places that belong to buckets before
# its own: there its bucket begins. The second time it writes down its own. A
# lane whose place belongs here counts the ones among the bits of lower lanes,
# and that is how many places of this vote come before its own. So a bucket is
# in the order of the text, and no warp waits for another.


# %% places into buckets tags=["exporti"]
_ALL = 0xFFFFFFFF  # lanes
_MOST = 1024  # buckets


@kernel
def _into_buckets(order, starts, inp, K):
    k, lane = cuda.grid(1) // 32, cuda.laneid
    if k >= K:
        return
    rows, begin = len(inp), 0
    for first in range(0, rows, 32):
        n = first + lane
        lower = n < rows and inp[n] & (K - 1) < k
        begin += cuda.popc(cuda.ballot_sync(_ALL, lower))
    at = begin
    for first in range(0, rows, 32):
        n = first + lane
        mine = n < rows and inp[n] & (K - 1) == k
        bits = cuda.ballot_sync(_ALL, mine)
        if mine:
            order[at + cuda.popc(bits & ((1 << lane) - 1))] = n
        at += cuda.popc(bits)
    if lane == 0:
        starts[k] = begin
        if k == K - 1:
            starts[K] = rows


# %% buckets in scratch memory tags=["export"]
def _buckets(rows):
    """How many buckets rows places go into: a power of two, at most 1,024.

    There is one for 16 places, rounded down; none where there is no place.
    """
    return 1 << min(_MOST, -(-rows // 16)).bit_length() >> 1


def encoder_scratch(rows):
    """How many elements `work` needs for B * T = rows places."""
    return rows + _buckets(rows) + 1


def into_buckets(inp, work):
    """Sort places into buckets by their tokens; launches one kernel.

    inp: a device's int32 (rows,). work: a device's float32 of
    `encoder_scratch(rows)` elements. Returns three things: the places,
    bucket after bucket, each in the order of the text; where each bucket
    begins, and where the last ends, both int32 in work; how many there are.
    """
    rows, K, ints = inp.size, _buckets(inp.size), work.view(np.int32)
    order, starts = ints[:rows], ints[rows : rows + K + 1]
    _into_buckets[-(-K * 32 // THREADS), THREADS](order, starts, inp, K)
    return order, starts, K


# %% four buckets
text = simulated(np.array([7, 2, 5, 2, 9, 5, 2, 0], np.int32))
order = simulated(np.zeros(8, np.int32))
starts = simulated(np.zeros(5, np.int32))
with watch():
    _into_buckets[1, 128](order, starts, text, 4)
places, ends = to_host(order), to_host(starts)
for k in range(4):
    mine = places[ends[k] : ends[k + 1]]
    tokens = ", ".join(map(str, to_host(text)[mine]))
    print(f"bucket {k}: places {mine.tolist()}, tokens {tokens}")

# %% [markdown]
# Now a block for each entry of that list. It looks through its bucket for its
# token, backward to see whether it is the first, and on to add. The rows are
# read as vectors of four. The lanes beyond the last channel must come along
# to the votes, and touch no row.


# %% a vote on 32 entries tags=["exporti"]
@device
def _where(inp, order, first, end, token):
    """A bit for each lane's entry, first + lane: whether token stands there.

    Entries from end on do not count. For whole warps.
    """
    i = first + cuda.laneid
    return cuda.ballot_sync(_ALL, i < end and inp[order[i]] == token)


# %% four channels a thread tags=["exporti"]
@kernel
def _tokens_by_four(dwte, dout, inp, order, starts, K):
    at, i = cuda.blockIdx.x, cuda.blockIdx.y * THREADS + cuda.threadIdx.x
    C = dout.shape[1]
    if (i - cuda.laneid) * 4 >= C:
        return  # nothing is left for this warp
    token, c, mine = int(inp[order[at]]), i * 4, i * 4 < C
    begin, end = starts[token % K], starts[token % K + 1]
    for first in range(begin, at, 32):
        if _where(inp, order, first, at, token) != 0:
            return  # the block of an earlier entry does it all
    x = y = z = w = np.float32(0)
    if mine:
        x, y, z, w = load4(dwte, token * C + c)
    for first in range(at, end, 32):
        bits = _where(inp, order, first, end, token)
        if mine and bits != 0:
            for k in range(32):
                if (bits >> k) & 1:
                    p, q, r, s = load4(dout, order[first + k] * C + c)
                    x, y, z, w = x + p, y + q, z + r, w + s
    if mine:
        store4(dwte, token * C + c, x, y, z, w)


# %% four channels of a position tags=["exporti"]
@kernel
def _positions_by_four(dwpe, dout, T):
    i = cuda.grid(1) * 4
    rows, C = dout.shape
    if i < T * C:
        x, y, z, w = load4(dwpe, i)
        for n in range(0, rows, T):
            p, q, r, s = load4(dout, n * C + i)
            x, y, z, w = x + p, y + q, z + r, w + s
        store4(dwpe, i, x, y, z, w)


# %% [markdown]
# The layer takes buckets and vectors where it can, and a block a place for other
# sizes. Both add in the same order, so their bits are the same. The buckets
# want scratch memory; where none is given the layer allocates it.


# %% the encoder, backward tags=["export"]
@shapes("Vp C!, T+ C!, B T C, B T of Vp, W!?", DEVICE)
def encoder_backward(dwte, dwpe, dout, inp, work=None):
    """Add dout's rows to the rows of the tables that they came from.

    dwte  (Vp, C)        float32, added to; rows of absent tokens stay
    dwpe  (T_max, C)     float32, added to; rows from T on stay
    dout  (B, T, C)      float32
    inp   (B, T)         int32, as in the forward pass
    work  (W,)           float32, W >= encoder_scratch(B * T); overwritten,
                         allocated when None

    All on a device. The places are sorted into buckets; a block for each
    place: the first of each token adds all rows in the order of the text. A
    thread has four channels, or one and no buckets, as in `encoder_forward`,
    which says what is raised; ValueError, too, where work is too small.
    """
    B, T, C = dout.shape
    rows, places = dout.reshape(B * T, C), inp.reshape(B * T)
    if C % 4 or not aligned(dwte, dwpe, dout):
        grid = B * T, -(-C // THREADS)
        tokens_by_one[grid, THREADS](dwte, rows, places)
        positions_by_one[-(-T * C // THREADS), THREADS](dwpe, rows, T)
        return
    work = given_work("encoder_backward", work, encoder_scratch(B * T), dout)
    step = 4 * THREADS  # channels that one block owns
    grid, found = (B * T, -(-C // step)), into_buckets(places, work)
    _tokens_by_four[grid, THREADS](dwte, rows, places, *found)
    _positions_by_four[-(-T * C // step), THREADS](dwpe, rows, T)


# %% backward, the rungs tags=["export"] module="bench.rungs_encoder"
def _backward_a_place(dwte, dwpe, dout, inp, work=None):
    """encoder_backward with a thread for each channel, token by token."""
    B, T, C = dout.shape
    rows, places = dout.reshape(B * T, C), inp.reshape(B * T)
    tokens_by_one[(B * T, -(-C // THREADS)), THREADS](dwte, rows, places)
    positions_by_one[-(-T * C // THREADS), THREADS](dwpe, rows, T)


ENCODER_BACKWARD = (_backward_with_atomics, _backward_a_place)

# %% three versions against NumPy
names = "atomics", "a block a place", "buckets"
layers = *ENCODER_BACKWARD, encoder_backward
BACKWARD = dict(zip(names, layers, strict=True))
for C in (5, 8):
    (inp, wte, wpe, dout), there = problem(3, 13, C, 4, to_device)
    want = np.ones_like(wte), np.ones_like(wpe)
    reference.encoder_backward(*want, dout, inp)
    for name, layer in BACKWARD.items():
        dwte, dwpe = (to_device(np.ones_like(a)) for a in want)
        layer(dwte, dwpe, there[3], there[0])
        print(f"{name}, {C} channels")
        compare("dwte", to_host(dwte), want[0], tol=1e-5)
        compare("dwpe", to_host(dwpe), want[1], tol=1e-5)

# %% [markdown]
# The order of the text is also that of the CPU's one thread. Then even the
# bits must agree, at least where the additions are simulated:

# %% the same bits as on the CPU
(inp, wte, wpe, dout), there = problem(3, 13, 8, 4, simulated)
encoder_backward(*there[1:], there[0])
cpu_encoder.encoder_backward(wte, wpe, dout, inp)
for name, got, want in (("dwte", there[1], wte), ("dwpe", there[2], wpe)):
    same = np.array_equal(to_host(got), want)
    verdict(f"{name}, CPU", same, "the same bits")

# %% what the three ask of the memory
(inp, wte, wpe, dout), _ = problem(1, 64, 128, 30, simulated)
for name, layer in BACKWARD.items():
    count(name, layer, wte, wpe, dout, inp)

# %% [markdown]
# The counts show the price of order. Atomics move the fewest sectors, and
# there are 16,384 of them besides, two for each element, which the memory
# carries out by itself and which our requests do not count. A block a place
# reads every token again and again. Buckets cost two readings of the text a
# bucket, then each block reads little, and rows in vectors: a small part of
# the requests, and not twice as many as the atomics make before they add.
#
# ## Count it
#
# How many tokens does the search read at GPT-2's size? With votes and without
# buckets, a warp reads at worst, when no token repeats, all $BT$ of them, and
# $BT$ blocks have six warps each, with four channels a lane. With buckets, each
# of the $K$ warps reads the text twice, and then each warp of each block looks
# through one bucket of $BT / K$ places, if the tokens are spread evenly. They
# are not: the bucket of a word such as "the" is long, and every block of that
# bucket looks through it.

# %% the search at GPT-2's size
C = 768
print("B     rows of dout and dwte   tokens, no buckets   with buckets")
for B in (4, 16):
    places, warps = B * 1024, C // 128
    K = min(1024, places // 16)
    rows = 3 * places * C * 4
    worst = places * places * warps * 4
    better = 2 * K * places * 4 + places * (places // K) * warps * 8
    print(f"{B:<5} {rows / 1e6:18.0f} MB {worst / 1e6:17.0f} MB", end="")
    print(f" {better / 1e6:11.0f} MB")

# %% [markdown]
# The tokens of a batch are 16 or 64 KB, small enough for a cache, so few of
# those bytes should come from global memory. But they are asked for, one
# request after the other, and without buckets the number grows with the
# square of the batch.
#
# ## Take away
#
# - Who owns an element decides what it costs: neighbours to neighbours, four
#   channels a thread.
# - A sum whose every element has one owner needs no atomics, and has the
#   same bits every time.
# - Where the owner is not known beforehand it can be agreed on: the first
#   place of a token.
# - A vote looks at 32 places in one request, and counting the bits of lower
#   lanes gives each its place in a list that stays in order.
#
# ## Design note
#
# llm.c sorts the tokens on the CPU into buckets, one for each token and
# some of the channels, and gives each bucket a block. That reads each token
# once, and puts the CPU between the passes of the GPU. We sort on the GPU,
# which costs more reading and needs no host: the launches of a training step
# can be recorded once as a whole, a *CUDA graph*, and be started with one
# call ([chapter 3.11](11_step.ipynb)).

# %% [markdown]
# ## Exercises
#
# **1** (★★★). Give each *token of the vocabulary* a block, not each place of
# the text. Write the kernel for `dwte` and check it under watch.
# What happens to the search, and for which sizes is it the better choice?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# There is no first place to look for: the owner is there from the start. But
# all 50,257 blocks walk through all of the text, while most tokens do not
# occur in it. It is better where the vocabulary is small against the text,
# bytes for example: 256 blocks in place of $BT$.
# :::


# %% exercise 1, a solution tags=["hide-cell"]
@kernel
def block_a_token(dwte, dout, inp):
    token, c = cuda.blockIdx.x, cuda.threadIdx.x
    rows, C = dout.shape
    if c < C:
        total = dwte[token, c]
        for n in range(rows):
            if inp[n] == token:
                total += dout[n, c]
        dwte[token, c] = total


# %% exercise 1, checked
(inp, wte, wpe, dout), there = problem(2, 9, 8, 5, simulated)
with watch():
    flat = there[3].reshape(18, 8), there[0].reshape(18)
    block_a_token[5, 32](there[1], *flat)
reference.encoder_backward(wte, wpe, dout, inp)
compare("block a token", to_host(there[1]), wte, tol=1e-5)

# %% [markdown]
# ## Further reading
#
# - Karpathy, [llm.c](https://github.com/karpathy/llm.c): `encoder.cuh`, the
#   buckets, and `dev/cuda/encoder_backward.cu`, its ladder.
# - NVIDIA's programming guide, "Warp Vote Functions" and "Atomic Functions":
#   what each promises.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("3.3")
