# Written by `make export` from notebooks/3_gpu/03_encoder.py: edit that file.

"""The encoder on a GPU, forward and backward."""

__all__ = [
    "encoder_backward", "encoder_forward", "encoder_scratch", "into_buckets",
]


# imports of the encoder
import numpy as np

from llmnb.gpu.launch import DEVICE, aligned, device, given_work, kernel
from llmnb.gpu.simulator import cuda, load4, store4
from llmnb.shapes import shapes


# block size
THREADS = 128  # in a block


# forward, a thread an element
@kernel
def forward_by_one(out, inp, wte, wpe, T):
    i = cuda.grid(1)
    rows, C = out.shape
    if i < rows * C:
        n, c = i // C, i % C
        out[n, c] = wte[inp[n], c] + wpe[n % T, c]


# forward, a thread four channels
@kernel
def _forward_by_four(out, inp, wte, wpe, T):
    i = cuda.grid(1) * 4
    rows, C = out.shape
    if i < rows * C:
        n, c = i // C, i % C
        x, y, z, w = load4(wte, int(inp[n]) * C + c)
        p, q, r, s = load4(wpe, n % T * C + c)
        store4(out, i, x + p, y + q, z + r, w + s)


# the encoder, forward
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

    Derived in chapter 3.3.
    """
    B, T, C = out.shape
    run, each = forward_by_one, 1
    if C % 4 == 0 and aligned(out, wte, wpe):
        run, each = _forward_by_four, 4
    rows, places = out.reshape(B * T, C), inp.reshape(B * T)
    grid = -(-out.size // (each * THREADS))
    run[grid, THREADS](rows, places, wte, wpe, T)


# the first place of a token
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


# the rows of a position
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


# places into buckets
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


# buckets in scratch memory
def _buckets(rows):
    """How many buckets rows places go into: a power of two, at most 1,024.

    There is one for 16 places, rounded down; none where there is no place.
    """
    return 1 << min(_MOST, -(-rows // 16)).bit_length() >> 1


def encoder_scratch(rows):
    """How many elements `work` needs for B * T = rows places.

    Derived in chapter 3.3.
    """
    return rows + _buckets(rows) + 1


def into_buckets(inp, work):
    """Sort places into buckets by their tokens; launches one kernel.

    inp: a device's int32 (rows,). work: a device's float32 of
    `encoder_scratch(rows)` elements. Returns three things: the places,
    bucket after bucket, each in the order of the text; where each bucket
    begins, and where the last ends, both int32 in work; how many there are.

    Derived in chapter 3.3.
    """
    rows, K, ints = inp.size, _buckets(inp.size), work.view(np.int32)
    order, starts = ints[:rows], ints[rows : rows + K + 1]
    _into_buckets[-(-K * 32 // THREADS), THREADS](order, starts, inp, K)
    return order, starts, K


# a vote on 32 entries
@device
def _where(inp, order, first, end, token):
    """A bit for each lane's entry, first + lane: whether token stands there.

    Entries from end on do not count. For whole warps.
    """
    i = first + cuda.laneid
    return cuda.ballot_sync(_ALL, i < end and inp[order[i]] == token)


# four channels a thread
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


# four channels of a position
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


# the encoder, backward
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

    Derived in chapter 3.3.
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
