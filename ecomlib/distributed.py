"""The processes of one training: ``torchrun`` starts them, this joins them (chapter "Running experiments")."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from .learners.sharding import Shards

PATIENCE = timedelta(minutes=10)
"""How long a process waits for another before it gives up."""


class Processes:
    """This process among those that train together; alone unless ``torchrun`` started it."""

    def __init__(self, device: str, shards: Shards):
        self.device, self.shards = device, shards

    @classmethod
    @contextmanager
    def start(cls, device: str) -> Iterator[Processes]:
        """Join the group that ``torchrun`` describes in the environment: gloo on CPUs, nccl on GPUs."""
        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        if "WORLD_SIZE" not in os.environ:
            yield cls("cuda" if cuda else "cpu", Shards())
            return
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # The store outlives a restart of the processes: without a name of their own for each start, they would find the
        # addresses of those that died.
        store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
        try:
            yield cls(
                f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu", Shards(dist.get_rank(), dist.get_world_size())
            )
        finally:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """The process that writes files."""
        return self.shards.rank == 0

    @property
    def restarted(self) -> bool:
        """Whether ``torchrun`` started this group again after a process died."""
        return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.shards.size > 1:
            dist.barrier()
