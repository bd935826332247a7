# Written by `make export` from notebooks/3_gpu/03_encoder.py: edit that file.

"""The encoder on a GPU, forward and backward."""

__all__ = ["encoder_backward", "encoder_forward"]


# imports of the encoder
import numpy as np

from llmnb.gpu.launch import DEVICE, aligned, device, kernel
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


# a vote on 32 places
@device
def _where(inp, first, begin, end, token):
    """A bit for each lane's place, first + lane: whether token stands there.

    Places outside begin to end do not count. For whole warps.
    """
    i = first + cuda.laneid
    here = i >= begin and i < end and inp[i] == token
    return cuda.ballot_sync(0xFFFFFFFF, here)


# four channels a thread
@kernel
def _tokens_by_four(dwte, dout, inp):
    n, i = cuda.blockIdx.x, cuda.blockIdx.y * THREADS + cuda.threadIdx.x
    rows, C = dout.shape
    if (i - cuda.laneid) * 4 >= C:
        return  # nothing is left for this warp
    token, c, mine = int(inp[n]), i * 4, i * 4 < C
    for first in range(0, n, 32):
        if _where(inp, first, 0, n, token) != 0:
            return
    x = y = z = w = np.float32(0)
    if mine:
        x, y, z, w = load4(dwte, token * C + c)
    for first in range(n // 32 * 32, rows, 32):
        bits = _where(inp, first, n, rows, token)
        if mine and bits != 0:
            for k in range(32):
                if (bits >> k) & 1:
                    p, q, r, s = load4(dout, (first + k) * C + c)
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
@shapes("Vp C!, T+ C!, B T C, B T of Vp", DEVICE)
def encoder_backward(dwte, dwpe, dout, inp):
    """Add dout's rows to the rows of the tables that they came from.

    dwte  (Vp, C)        float32, added to; rows of absent tokens stay
    dwpe  (T_max, C)     float32, added to; rows from T on stay
    dout  (B, T, C)      float32
    inp   (B, T)         int32, as in the forward pass

    All on a device. A block for each place: the first of each token adds
    all rows in the order of the text. A thread has four channels, or one,
    as in `encoder_forward`, which says what is raised.

    Derived in chapter 3.3.
    """
    B, T, C = dout.shape
    tokens, positions, each = tokens_by_one, positions_by_one, 1
    if C % 4 == 0 and aligned(dwte, dwpe, dout):
        tokens, positions, each = _tokens_by_four, _positions_by_four, 4
    rows, places = dout.reshape(B * T, C), inp.reshape(B * T)
    step = each * THREADS  # channels that one block owns
    tokens[(B * T, -(-C // step)), THREADS](dwte, rows, places)
    positions[-(-T * C // step), THREADS](dwpe, rows, T)
