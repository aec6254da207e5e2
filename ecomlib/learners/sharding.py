"""The tasks of an iteration, shared out over processes: each collects and differentiates its own part, and gradients
are averaged by one all-reduce (chapter "Running experiments")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from ..families.base import require, whole


class Shards:
    """Which part of the tasks this process has, and means over all processes.

    The caller initialises the process group (``torch.distributed.init_process_group``: gloo on CPUs, nccl on GPUs) and
    says which of its processes this is. Without arguments: one process, nothing to average. Parts are of equal size, so
    that the mean over processes of means over their tasks is the mean over all tasks. ``all_reduces`` counts calls of
    all-reduce, and ``bytes_moved`` the bytes of this process's buffers handed to them, since this object was made.
    """

    def __init__(self, rank: int = 0, size: int = 1):
        require(whole(size, 1), "Shards.size", size, "a whole number >= 1")
        require(whole(rank, 0, size - 1), "Shards.rank", rank, f"a whole number in 0..size - 1 = {size - 1}")
        self.rank, self.size = rank, size
        self.all_reduces = 0
        self.bytes_moved = 0

    def part(self, tasks: int) -> slice:
        """This process's tasks among those of an iteration. Raises ``ValueError`` unless all get equally many."""
        if tasks % self.size:
            raise ValueError(
                f"tasks = {tasks} with {self.size} ranks; allowed: a number of tasks that the number of ranks divides"
            )
        own = tasks // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def average(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Mean over processes of each tensor, by one all-reduce of one flat buffer. Every process must call this, with
        tensors of the same shapes."""
        tensors = list(tensors)
        if self.size == 1:
            return tensors
        flat = torch.cat([t.detach().flatten() for t in tensors])
        distributed.all_reduce(flat)
        self.all_reduces, self.bytes_moved = self.all_reduces + 1, self.bytes_moved + flat.numel() * flat.element_size()
        parts = (flat / self.size).split([t.numel() for t in tensors])
        return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors)]


ALONE = Shards()
"""One process that has all tasks."""
