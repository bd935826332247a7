"""A prototype: gradients are sent while the backward pass goes on.

What tests/record_machines.py overlap measures, for chapter 6.3; no part of
llmnb. Each rank has one micro-batch to an update, and there are two ranks.
"""

import queue
import threading
import time

import numpy as np
from mpi4py import MPI

from llmnb.model.tensors import tensor_table
from llmnb.train.sharded import Sharded


class Overlapped(Sharded):
    """Sends a block's gradients when the block's backward pass is done."""

    on = True  # else it does what Sharded does

    def _block_backward(self, i, add):
        super()._block_backward(i, add)
        if self.on:
            self._post(self._buckets[i])

    def prepare(self):
        """Find the ranges of each block, and start the thread that sends."""
        cfg, ends = self.cfg, []
        self._buckets = [[] for _ in range(cfg.num_layers)]
        flat = self.memory.flat("grads")
        base = flat.__array_interface__["data"][0]
        for x in tensor_table(cfg):
            grad = self.grads[x.name]
            at = (grad.__array_interface__["data"][0] - base) // flat.itemsize
            if x.stacked:
                size = grad[0].size
                for i, bucket in enumerate(self._buckets):
                    start = at + i * size
                    bucket.append((start, start + size))
            else:
                ends.append((at, at + grad.size))
        self._buckets.append(ends)
        self._comm = MPI.COMM_WORLD.Dup()
        self._work, self._came = queue.Queue(), queue.Queue()
        threading.Thread(target=self._drive, daemon=True).start()

    def _cut(self, bucket, rank):
        """The parts of a bucket that lie in a rank's shard."""
        first, last = self.shards[rank]
        cut = [(max(a, first), min(b, last)) for a, b in bucket]
        return [(a, b) for a, b in cut if a < b]

    def _post(self, bucket):
        """Hand what the other owns to the thread, and room for what comes."""
        grads, me = self.memory.flat("grads"), self.group.rank
        mine, other = self._cut(bucket, me), self._cut(bucket, 1 - me)
        goes = [grads[a:b] for a, b in other]
        goes = np.concatenate(goes) if goes else np.empty(0, "f4")
        comes = np.empty(sum(b - a for a, b in mine), grads.dtype)
        self.group.sent += goes.nbytes
        self._work.put((goes, comes, mine))

    def _drive(self):
        """Send and receive, bucket after bucket; asleep between looks."""
        other = 1 - self.group.rank
        while True:
            goes, comes, mine = self._work.get()
            both = [self._comm.Irecv(comes, other)]
            both.append(self._comm.Isend(goes, other))
            while not MPI.Request.Testall(both):
                time.sleep(0.0005)
            self._came.put((comes, mine))

    def exchange(self, blocks, count):
        """The last bucket; then add what has come to what is here."""
        if not self.on:
            super().exchange(blocks, count)
            return
        self._post(self._buckets[-1])
        grads = self.memory.flat("grads")
        for _ in self._buckets:
            comes, mine = self._came.get()
            at = 0
            for a, b in mine:
                grads[a:b] += comes[at : at + b - a]
                at += b - a
