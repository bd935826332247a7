"""Random arrays of a layer or a model, and what it makes of them."""

import numba
import numpy as np
import pytest

from llmnb.arena import put

TOLERANCE = {np.float32: 2e-6, np.float64: 1e-13}


class Problem:
    """Random arrays of the layer; outputs begin at drawn values."""

    def __init__(self, B, T, C, OC, bias=True, dtype=np.float32, seed=0):
        rng = np.random.default_rng(seed)

        def draw(*shape):
            return rng.normal(size=shape).astype(dtype)

        self.inp, self.weight = draw(B, T, C), draw(OC, C)
        self.bias = draw(OC) if bias else None
        self.out, self.dout = draw(B, T, OC), draw(B, T, OC)
        self.dinp, self.dweight = draw(B, T, C), draw(OC, C)
        self.dbias = draw(OC) if bias else None

    def forward(self, backend, **how):
        out = self.out.copy()
        arrays = out, self.inp, self.weight, self.bias
        backend.matmul_forward(*arrays, **how)
        return out

    def forward_in_place(self, backend, work):
        """The output written over the residual."""
        out = self.out.copy()
        arrays = out, self.inp, self.weight, self.bias
        backend.matmul_forward(*arrays, residual=out, work=work)
        return out

    def backward(self, backend, **how):
        grads = [self.dinp.copy(), self.dweight.copy()]
        grads.append(None if self.dbias is None else self.dbias.copy())
        arrays = *grads, self.dout, self.inp, self.weight
        backend.matmul_backward(*arrays, **how)
        return [grad for grad in grads if grad is not None]

    def results(self, backend, **how):
        return [self.forward(backend, **how), *self.backward(backend, **how)]

    def assert_close(self, got, want):
        """Equal but for the rounding of sums as long as the layer's."""
        dtype = self.inp.dtype
        tokens = self.inp.size // self.inp.shape[-1]
        longest = max(*self.weight.shape, tokens)
        for x, y in zip(got, want, strict=True):
            assert x.dtype == dtype
            scale = np.sqrt(longest) * max(1, np.abs(y).max())
            assert np.abs(x - y).max() < TOLERANCE[dtype.type] * scale


def problem(B, T, NH, hs, dtype, seed=0):
    rng = np.random.default_rng(seed)
    inp = rng.normal(size=(B, T, 3 * NH * hs)).astype(dtype)
    dout = rng.normal(size=(B, T, NH * hs)).astype(dtype)
    return inp, dout


def run(layer, inp, dout, NH, **how):
    """out, lse and dinp; dinp starts at 1 to show that backward adds."""
    B, T, _ = inp.shape
    out = np.full_like(dout, 7)
    lse = np.full((B, NH, T), 7, inp.dtype)
    dinp = np.ones_like(inp)
    layer.attention_forward(out, lse, inp, **how)
    layer.attention_backward(dinp, dout, inp, out, lse, **how)
    return out, lse, dinp


def assert_threads_change_no_bit(work):
    """work(): some arrays; they must not depend on the number of threads."""
    before, results = numba.get_num_threads(), []
    if before < 2:
        pytest.skip("needs two threads")
    try:
        for threads in (1, 2, before):
            numba.set_num_threads(threads)
            results.append(work())
    finally:
        numba.set_num_threads(before)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(got, want)


def batch(cfg, B, T, seed=0):
    """Random tokens and targets."""
    return np.random.default_rng(seed).integers(0, cfg.vocab_size, (2, B, T))


def wide(model, seed=0):
    """Give a model weights so large that no gradient is tiny."""
    flat = model.memory.flat("params")
    rng = np.random.default_rng(seed)
    put(flat, rng.normal(scale=0.5, size=flat.size))
    return model
