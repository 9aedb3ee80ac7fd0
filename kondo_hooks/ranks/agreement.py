"""The processes that train one model: what they agree on, and how.

Ranks must make the same passes through the model, whatever each of them keeps. So nothing here is decided by one
rank alone: a rank that fails tells the others through the process group's store, which is no collective, and goes on
taking part until all of them know; choices over the whole world are computed by every rank from the same table.
"""

import pickle
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kondo_hooks import private
from kondo_hooks.core.engine import Alone
from kondo_hooks.errors import RankError, add_note
from kondo_hooks.rules.samples import Samples


def _collective_device(group: Any) -> torch.device:
    """Where a group can run collectives, the host if it can.

    Never read off tensors of this rank: parameters may be offloaded, and a rank that failed has no others, while all
    ranks must use one backend.
    """
    kind = private.collective_device(group)
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())


def _synchronise(devices: Iterable[torch.device]) -> None:
    """Wait until the current accelerator and ``devices`` have done what they were given."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or not getattr(torch.get_device_module(accelerator), "is_initialized", lambda: True)():
        return
    used = {device.index for device in devices if device.type == accelerator.type and device.index is not None}
    for index in used | {torch.accelerator.current_device_index()}:
        torch.accelerator.synchronize(index)


# How often the ranks of a group have looked for failures together. A failure is announced for the next look: a rank
# that is still at an earlier one does not see it, and comes along.
_looks: Counter[str] = Counter()


class Ranks(Alone):
    """A process group, or the lone process when there is none.

    Args:
        group: the ranks that train one model on different rows; None for a process on its own.
        tensor_parallel: the ranks that see the same rows as this one, and so share its decisions.
    """

    def __init__(self, group: Any = None, tensor_parallel: Any = None):
        self._group = group
        self._tensor_parallel = tensor_parallel
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self._failed: BaseException | None = None
        self._store: Any = None
        if not self.alone:
            self._store = private.default_store()
            members = dist.get_process_group_ranks(group) if tensor_parallel is None else ["world"]
            self._prefix = "kondo_hooks/" + ",".join(map(str, members))

    @property
    def alone(self) -> bool:  # type: ignore[override]
        """Whether there is no other rank to agree with."""
        return self.size == 1 and self._tensor_parallel is None

    @property
    def tensor_parallel(self) -> bool:  # type: ignore[override]
        """Whether other ranks see the same rows as this one."""
        return self._tensor_parallel is not None

    @property
    def device(self) -> torch.device:
        """Where numbers that the ranks exchange have to be."""
        return torch.device("cpu") if self._group is None else _collective_device(self._group)

    def carries(self, device: torch.device) -> bool:
        """Whether the ranks can exchange tensors that are there."""
        return device.type in private.carried_devices(self._group)

    # Failures.

    @property
    def failed(self) -> bool:  # type: ignore[override]
        """Whether this rank holds a failure that the others do not all know of yet."""
        return self._failed is not None

    def announce(self, error: BaseException) -> None:
        """Tell the others, before the next collective, that this rank failed."""
        if self._failed is None:
            self._failed = error
            rank = dist.get_rank()
            key = self._key()
            number = self._store.add(f"{key}/count", 1)
            self._store.set(f"{key}/{number}", f"rank {rank}: {type(error).__name__}: {error}")

    def fail(self, error: BaseException) -> None:
        """Raise ``error``; where there are other ranks, tell them, and go on until all know."""
        if self.alone:
            raise error
        self.announce(error)

    def _key(self) -> str:
        return f"{self._prefix}/{_looks[self._prefix]}"

    def raise_failures(self, devices: Iterable[torch.device] = ()) -> None:
        """Raise on every rank if one failed; to be called where a collective that all of them entered has ended.

        Args:
            devices: that it ran on, beside the current accelerator; the host waits for them. All of their streams: an
                engine may reduce on one of its own that it lets nobody wait for.
        """
        if self.alone:
            return
        _synchronise(devices)
        first = self._first_failure()
        mine, self._failed = self._failed, None
        if first is None:
            if mine is not None:
                raise mine
            return
        advice = "Gradients of this step are incomplete: zero them before another."
        if mine is not None:
            add_note(mine, f"Every rank stops here; the first to fail was {first.split(':')[0]}. {advice}")
            raise mine
        raise RankError(f"gated: {first}\nEvery rank stops here. {advice}")

    def _first_failure(self) -> str | None:
        """What was announced for this look, if anything."""
        announced = f"{self._key()}/1"
        _looks[self._prefix] += 1
        try:
            return self._store.get(announced).decode() if self._store.check([announced]) else None
        except dist.DistNetworkError:
            # The process that keeps the store has looked and ended: after its last step, or this rank would not be
            # here but in the collective that the two have just left.
            return None

    def raise_own(self) -> None:
        """Raise what this rank still holds."""
        mine, self._failed = self._failed, None
        if mine is not None:
            raise mine

    # Collectives: made in the global scope, and for a bound on the size of a pass; local decisions make none.

    def gather(self, table: Tensor | None, columns: int) -> list[Tensor]:
        """Each rank's (n, columns) float64 table, on ``device`` and in the order of the ranks; sizes may differ.

        A rank that failed gives None, and every rank raises.
        """
        device = self.device
        mine = torch.tensor([-1 if table is None else len(table)], device=device)
        sizes = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(sizes, mine, group=self._group)
        lengths = torch.cat(sizes).tolist()
        if min(lengths) < 0:
            self.raise_failures()
            raise RuntimeError("gated: a rank failed without a word")
        assert table is not None
        padded = torch.zeros(max(lengths), columns, dtype=torch.float64, device=device)
        padded[: len(table)] = table
        tables = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(tables, padded, group=self._group)
        return [t[:n] for t, n in zip(tables, lengths, strict=True)]

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """The largest of each number over the ranks."""
        values = torch.tensor(list(numbers), device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group)
        return values.tolist()

    def mean(self, numbers: Sequence[float]) -> list[float]:
        """Of each number over the ranks."""
        if self.size == 1:
            return list(numbers)
        values = torch.tensor(list(numbers), dtype=torch.float32, device=self.device)
        dist.all_reduce(values, group=self._group)
        return (values / self.size).tolist()

    def meet(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self._group)

    def share_samples(self, samples: Samples) -> Samples:
        """What the first of the ranks that see the same rows makes of them; the others differ by rounding."""
        names = ("delight", "scores", "norm", "advantages", "surprisal", "factors")
        own = {name: value for name in names if (value := getattr(samples, name)) is not None}
        device, dtype = _collective_device(self._tensor_parallel), samples.delight.dtype
        shared = torch.stack([value.to(device, dtype) for value in own.values()])
        first = dist.get_process_group_ranks(self._tensor_parallel)[0]
        dist.broadcast(shared, first, group=self._tensor_parallel)
        found = dict(zip(own, shared.to(samples.delight.device), strict=True))
        if "factors" in found:
            found["factors"] = found["factors"].cpu().double()
        return replace(samples, **found)

    def exchange(self, parcels: list[list[list[Tensor]]], device: torch.device) -> list[list[list[Tensor]]]:
        """Send ``parcels[r]``, lists of tensors of any shape and type, to rank r; returns what each rank sent here."""
        sent = [_wrap(parcel, device) for parcel in parcels]
        sizes = torch.tensor([len(data) for data in sent], device=device)
        coming = torch.empty_like(sizes)
        dist.all_to_all_single(coming, sizes, group=self._group)
        lengths = coming.tolist()
        received = torch.empty(sum(lengths), dtype=torch.uint8, device=device)
        dist.all_to_all_single(received, torch.cat(sent), lengths, [len(data) for data in sent], group=self._group)
        return [_unwrap(data) for data in received.split(lengths)]


_HEADER = 8  # bytes that hold the length of the description
_ALIGN = 16


def _wrap(parcel: list[list[Tensor]], device: torch.device) -> Tensor:
    """A description of shapes and types, then the bytes of every tensor, as one tensor."""
    if not parcel:
        return torch.empty(0, dtype=torch.uint8, device=device)
    described = pickle.dumps([[(tuple(t.shape), t.dtype) for t in bundle] for bundle in parcel])
    head = len(described).to_bytes(_HEADER, "little") + described
    pieces = [torch.frombuffer(bytearray(_padded(head)), dtype=torch.uint8).to(device)]
    for tensor in (t for bundle in parcel for t in bundle):
        data = tensor.detach().to(device).contiguous().reshape(-1).view(torch.uint8)
        pieces += [data, data.new_zeros(-len(data) % _ALIGN)]
    return torch.cat(pieces)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGN)


def _unwrap(data: Tensor) -> list[list[Tensor]]:
    if not len(data):
        return []
    length = int.from_bytes(bytes(data[:_HEADER].tolist()), "little")
    described = pickle.loads(bytes(data[_HEADER : _HEADER + length].cpu().numpy()))
    start = _HEADER + length + -(_HEADER + length) % _ALIGN
    parcel = []
    for bundle in described:
        tensors = []
        for shape, dtype in bundle:
            size = torch.Size(shape).numel() * dtype.itemsize
            tensors.append(data[start : start + size].clone().view(dtype).view(shape))
            start += size + -size % _ALIGN
        parcel.append(tensors)
    return parcel
