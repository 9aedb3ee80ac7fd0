"""What waits for a decision: the calls of the backwards so far, and of each only the rows that can still be chosen."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kondo_hooks.batch import Layout
from kondo_hooks.node import Call
from kondo_hooks.population import Arrival
from kondo_hooks.readings import Learned
from kondo_hooks.selection import Selector

Size = int | Literal["auto"]


@dataclass(frozen=True)
class Spread:
    """Which rows form a population, and how its kept rows are run again.

    Attributes:
        window: how many backwards form one, or "auto".
        scope: "local", each rank on its own, or "global", all ranks as one batch.
        balance: move kept rows, so that ranks replay as many.
        micro_batch_size: most rows in one pass of the replay; None for all in one.
    """

    window: Size = 1
    scope: Literal["local", "global"] = "local"
    balance: bool = False
    micro_batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.window != "auto" and not _is_count(self.window):
            raise ValueError(f"window must be a number of backwards >= 1, or 'auto', got {self.window!r}")
        if self.scope not in ("local", "global"):
            raise ValueError(f"scope must be 'local' or 'global', got {self.scope!r}")
        if self.micro_batch_size is not None and not _is_count(self.micro_batch_size):
            raise ValueError(f"micro_batch_size must be a number of rows >= 1, got {self.micro_batch_size!r}")
        if not isinstance(self.balance, bool):
            raise ValueError(f"balance must be True or False, got {self.balance!r}")
        if self.balance and self.scope == "local":
            raise ValueError("balance moves rows that all ranks chose together: it needs scope='global'")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


class Window:
    """The population that is being collected.

    Attributes:
        size: how many backwards make one; "auto" leaves it to the host's gradient accumulation.
        arrivals: calls that backwards have reached, in order.
        backwards: how many backwards those are.
    """

    def __init__(self, size: Size):
        self.size = size
        self.arrivals: list[Arrival] = []
        self.backwards = 0
        self._longest = 0
        self._largest = 0

    def add(self, arrivals: list[Arrival]) -> None:
        """One more backward."""
        self.arrivals += arrivals
        self.backwards += 1
        self._largest = max(self._largest, sum(a.call.batch for a in arrivals))

    def is_full(self, host_syncs: bool) -> bool:
        """Whether this was the last backward of the population."""
        return host_syncs if self.size == "auto" else self.backwards >= self.size

    def take(self) -> list[Arrival]:
        """The population, and an empty window."""
        arrivals, self.arrivals = self.arrivals, []
        self._longest = max(self._longest, self.backwards)
        self.backwards = 0
        return arrivals

    def compact(self, selector: Selector, ranks: int, learned: Learned, communicates: bool) -> None:
        """Let go of the rows that cannot be chosen any more, and hold the others in the least space.

        Args:
            selector: of the decision to come.
            ranks: how many ranks choose together.
            learned: where inputs keep their rows.
            communicates: every pass must be the same on all ranks, so doubtful inputs are read in the likeliest way.
        """
        length = self._longest if self.size == "auto" else self.size
        leaders = [a for a in self.arrivals if a.follows is None]
        arrivals = [a for a in leaders if a.signal is not None]
        if len(arrivals) < len(leaders):
            return
        signals = [a.signal for a in arrivals if a.signal is not None]
        samples = selector.samples(signals)
        contenders = None
        if length:
            rows = sum(a.call.batch for a in arrivals)
            coming = max(length - self.backwards, 0) * self._largest
            contenders = selector.contenders(samples, (rows + coming) * len(samples.delight) / rows * ranks)
        if contenders is None:
            contenders = torch.ones_like(samples.delight, dtype=torch.bool)
        by_leader = {id(a): mine for a, mine in zip(arrivals, selector.split(contenders, signals), strict=True)}
        for arrival in self.arrivals:
            mine = by_leader[id(arrival.follows or arrival)]
            mine = mine if mine.dim() == 1 else mine.any(1)
            if arrival.forced is not None:
                mine = mine | arrival.forced
            if arrival.held is not None:
                still = torch.zeros_like(mine)
                still[arrival.held.rows] = True
                mine = mine & still
                if int(mine.sum()) == len(arrival.held):
                    continue
            if arrival.call.whole is None and (layout := _layout(arrival, learned, communicates)) is not None:
                arrival.hold(mine.nonzero().flatten(), layout)

    def nbytes(self) -> int:
        """Bytes of the rows that wait."""
        total = 0
        for a in self.arrivals:
            if a.held is not None:
                total += a.held.nbytes()
            else:
                tensors = [*a.call.inputs, *a.call.outputs, *(g for g in a.grads if g is not None)]
                total += sum(t.numel() * t.element_size() for t in tensors)
        return total


def in_doubt(call: Call) -> bool:
    """Whether an input may be read otherwise than is likeliest, so that a guess could let go of what a replay needs."""
    return call.reads_several() or any(call.doubtful())


def _layout(arrival: Arrival, learned: Learned, communicates: bool) -> Layout | None:
    """How to cut the call's inputs into rows; None while that is in doubt."""
    if arrival.held is not None:
        assert arrival.held.held is not None
        return arrival.held.held.layout
    call = arrival.call
    if (known := learned.known(call)) is not None:
        return known
    return next(call.readings()) if communicates or not in_doubt(call) else None


def gone(arrival: Arrival, kept: Tensor) -> Tensor:
    """(B,) bool: kept rows that the call has let go."""
    missing = kept.clone()
    if arrival.held is None:
        return torch.zeros_like(missing)
    missing[arrival.held.rows] = False
    return missing
