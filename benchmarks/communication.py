"""Counts the collectives of whatever runs inside, the bytes received in them, and the peak of the memory."""

import collections
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

# Bytes that one rank receives, for a payload of one byte on each of n ranks, in the best known algorithm.
_RECEIVED = {
    "all_gather": lambda n: n - 1,
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "broadcast": lambda n: 1,
    "all_to_all": lambda n: (n - 1) / n,
    "barrier": lambda n: 0,
}


@dataclass
class Communication:
    """Collectives by name, the bytes that this rank received in them, and the most that tensors on the CPU took.

    The CPU backend's are read from the profiler, which tells shapes and not types: four bytes an element are assumed.
    """

    calls: collections.Counter[str] = field(default_factory=collections.Counter)
    received: float = 0.0
    peak: int = 0

    def note(self, name: str, elements: int, itemsize: int = 4) -> None:
        """One collective with a payload of so many elements on this rank."""
        kind = next((kind for kind in _RECEIVED if name.replace("allgather", "all_gather").startswith(kind)), None)
        if kind is not None:
            self.calls[kind] += 1
            self.received += elements * itemsize * _RECEIVED[kind](dist.get_world_size())


@contextlib.contextmanager
def recorded() -> Iterator[Communication]:
    """Record the collectives of this rank."""
    found = Communication()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True) as profile,
        _without_shared_memory(),
    ):
        yield found
    held = 0
    allocations = (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(allocations, key=lambda e: e.start_ns()):
        held += event.nbytes()
        found.peak = max(found.peak, held)
    for event in profile.events():
        backend, _, name = event.name.partition(":")
        if backend in ("gloo", "nccl"):
            shapes = [shape for shape in event.input_shapes if shape]
            found.note(name.removeprefix("_"), sum(torch.Size(shape).numel() for shape in shapes[:1]))


@contextlib.contextmanager
def _without_shared_memory() -> Iterator[None]:
    """DeepSpeed sends what it can through shared memory on one machine, past the backend: not while we count."""
    from_deepspeed = sys.modules.get("deepspeed.comm.comm")
    backend = getattr(from_deepspeed, "cdb", None)
    operation = getattr(backend, "shm_comm_op", None)
    if backend is None or operation is None:
        yield
        return
    backend.shm_comm_op = None
    try:
        yield
    finally:
        backend.shm_comm_op = operation
