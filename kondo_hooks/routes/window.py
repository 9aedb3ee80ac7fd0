"""What waits for a decision: the calls of the backwards so far, and of each only the rows that can still be chosen."""

import contextlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kondo_hooks.core.arrival import Arrival
from kondo_hooks.core.readings import Learned
from kondo_hooks.core.step import AtOnce
from kondo_hooks.rows.axes import Layout
from kondo_hooks.rules.draw import top_k
from kondo_hooks.rules.readback import to_device
from kondo_hooks.rules.samples import Kept, Signal, by_batch
from kondo_hooks.rules.selection import Selector

Size = int | Literal["auto", "step"]
_FEW = 64


@dataclass(frozen=True)
class Spread:
    """Which rows form a population, and how its kept rows are run again.

    Attributes:
        window: how many backwards form one, "auto", or "step".
        scope: "local", each rank on its own, or "global", all ranks as one batch.
        balance: move kept rows, so that ranks replay as many.
        micro_batch_size: most rows in one pass of the replay; None for all in one.
    """

    window: Size = 1
    scope: Literal["local", "global"] = "local"
    balance: bool = False
    micro_batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.window not in ("auto", "step") and not _is_count(self.window):
            raise ValueError(f"window must be a number of backwards >= 1, 'auto' or 'step', got {self.window!r}")
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


@dataclass
class _Waiting:
    """Calls on the same rows, and how many of these wait, with how many samples each."""

    group: list[Arrival]
    rows: int
    positions: int

    def is_held(self) -> bool:
        """Whether rows can be let go."""
        return all(a.held is not None and a.forced is None for a in self.group)

    def best(self, flags: Tensor) -> Tensor:
        """Positions of the rows with a sample among the best, at least one of them all."""
        found = flags.view(self.rows, self.positions).any(1).nonzero().flatten()
        return found if len(found) else found.new_zeros(1)

    def cut(self, rows: Tensor, places: Tensor) -> Tensor:
        """Of the samples' places those that are left with these rows."""
        left = places.view(self.rows, self.positions)[rows].reshape(-1)
        self.rows = len(rows)
        return left


class Window(AtOnce):
    """The population that is being collected; attributes as of ``AtOnce``."""

    def __init__(self, size: Size):
        super().__init__()
        self.size: Size = size
        self._longest = 0
        self._largest = 0
        self._forget()

    def _forget(self) -> None:
        self._waiting: list[_Waiting] = []
        self._scores: Tensor | None = None
        self._samples = 0
        self.least: float = math.inf

    def add(self, arrivals: list[Arrival]) -> None:
        """One more backward."""
        super().add(arrivals)
        self._largest = max(self._largest, sum(a.call.batch for a in arrivals))

    def is_full(self, host_syncs: bool) -> bool:
        """Whether this was the last backward of the population."""
        if self.size == "step":
            return False  # when a gradient is wanted, or the optimizer steps
        return host_syncs if self.size == "auto" else self.backwards >= self.size

    def take(self) -> list[Arrival]:
        """The population, and an empty window."""
        self._longest = max(self._longest, self.backwards)
        self._forget()
        return super().take()

    def compact(self, new: list[Arrival], selector: Selector, ranks: int, learned: Learned, communicates: bool) -> None:
        """Let go of the rows that cannot be chosen any more, and hold the others in the least space.

        Newcomers are ranked among the rows that wait. Those that they leave behind go at once while they are few, for
        then only few ever come and go, and else when twice as many wait as the whole window can keep.

        Args:
            new: the calls of this backward.
            selector: of the decision to come.
            ranks: how many ranks choose together.
            learned: where inputs keep their rows.
            communicates: every pass must be the same on all ranks, so doubtful inputs are read in the likeliest way.
        """
        if any(a.texts is not None for a in new):
            for a in new:  # packs are cut when it is known which texts are kept
                a.condense()
            return
        leaders = [a for a in new if a.follows is None]
        signals = [a.signal for a in leaders if a.signal is not None]
        if len(signals) < len(leaders):
            return
        groups = [[a for a in new if a is leader or a.follows is leader] for leader in leaders]
        if selector.config.asks:  # about the whole window, so that nothing is known before
            self._hold_all(groups, learned, communicates)
            return
        if selector.config.weighs:
            self._hold_drawn(groups, signals, selector, ranks, learned, communicates)
            return
        if ranks == 1:
            selector.draw(signals)
        samples = selector.samples(signals)
        most, config, scores = self._most(selector, len(samples.delight), ranks), selector.config, samples.scores
        if scores is None or (most is None and (config.price is None or not (config.hard and config.deterministic))):
            self._hold_all(groups, learned, communicates)
            return
        if samples.valid is not None:
            scores = scores.masked_fill(~samples.valid.to(scores.device), -torch.inf)
        each = [part.reshape(len(part), -1) for part in selector.split(scores, signals)]
        if most is None:
            assert config.price is not None
            flags = [part >= config.price for part in each]  # what is equal may be above it in another type
            rows = torch.cat([mine.any(1) for mine in flags]).nonzero().flatten()
            for group, mine in zip(groups, by_batch(rows, [len(part) for part in each]), strict=True):
                self._hold(group, mine, learned, communicates)
            return
        self._rank(groups, each, most, learned, communicates)

    def _hold_drawn(
        self,
        groups: list[list[Arrival]],
        signals: list[Signal],
        selector: Selector,
        ranks: int,
        learned: Learned,
        communicates: bool,
    ) -> None:
        """Hold what this backward draws for itself, or where all ranks draw as one, what has a gradient."""
        forced = any(a.forced is not None for group in groups for a in group)
        alone = ranks == 1 or selector.config.is_lossless
        if alone and not forced:
            with contextlib.suppress(ValueError):  # what is NaN is told by the decision, to all ranks
                selector.draw(signals)
        for group, signal in zip(groups, signals, strict=True):
            every = torch.arange(len(signal.valid), device="cpu")
            flags = signal.factors
            if flags is None and selector.config.needs_norm and not forced and signal.norm is not None:
                flags = signal.norm.cpu()
            if flags is None:
                rows = every
            else:
                rows = flags.reshape(len(every), -1).ne(0).any(1).nonzero().flatten()
            self._hold(group, rows, learned, communicates)

    def _rank(
        self, groups: list[list[Arrival]], scores: list[Tensor], most: int, learned: Learned, communicates: bool
    ) -> None:
        """Hold the newcomers among the ``most`` best, and let go of others; waits for the device once.

        Args:
            groups: calls on the same rows.
            scores: of each group, (B, P).
            most: samples that the window can keep.
            learned, communicates: as of ``compact``.
        """
        before = scores[0].new_zeros(0) if self._scores is None else self._scores.to(scores[0].device)
        every = torch.cat([before, *(part.reshape(-1) for part in scores)])
        best = torch.zeros_like(every, dtype=torch.bool)
        best[top_k(every, most)] = True
        flags = best.cpu().split(
            [waiting.rows * waiting.positions for waiting in self._waiting] + [s.numel() for s in scores]
        )
        old, new = flags[: len(self._waiting)], flags[len(self._waiting) :]
        index = torch.arange(len(every), device="cpu")
        places = list(index.split([len(part) for part in flags]))
        for i, (group, mine, part) in enumerate(zip(groups, new, scores, strict=True), len(old)):
            waiting = _Waiting(group, len(part), part.shape[1])
            if all(a.forced is None for a in group):
                rows = waiting.best(mine)
                if self._hold(group, rows, learned, communicates):
                    places[i] = waiting.cut(rows, places[i])
            else:
                self._hold(group, torch.arange(len(part), device="cpu"), learned, communicates)
            self._waiting.append(waiting)
        can = [i for i, waiting in enumerate(self._waiting) if waiting.is_held()]
        if sum(self._waiting[i].rows for i in can) > (most if most < _FEW else 2 * most):
            for i in can:
                if i < len(old):
                    waiting = self._waiting[i]
                    rows = waiting.best(old[i])
                    if len(rows) < waiting.rows:
                        places[i] = waiting.cut(rows, places[i])
                        for a in waiting.group:
                            a.keep(rows)
        self._scores = every[to_device(torch.cat(places), every.device)]

    def _hold_all(self, groups: list[list[Arrival]], learned: Learned, communicates: bool) -> None:
        """Hold every row: any may still be chosen."""
        for group in groups:
            self._hold(group, torch.arange(group[0].call.batch, device="cpu"), learned, communicates)

    def _hold(self, group: list[Arrival], rows: Tensor, learned: Learned, communicates: bool) -> bool:
        """Cut newcomers to these rows; False where that is in doubt, and all of them are held."""
        for a in group:
            if a.call.whole is not None or (layout := _layout(a, learned, communicates)) is None:
                continue
            a.hold(to_device(rows, a.call.outputs[0].device), layout)
        return all(a.held is not None for a in group)

    def _most(self, selector: Selector, samples: int, ranks: int) -> int | None:
        """How many samples the whole window can keep; None if that cannot be told."""
        length = self.size if isinstance(self.size, int) else self._longest
        self._samples += samples
        if not length:
            return None
        rows = sum(a.call.batch for a in self.arrivals if a.follows is None)
        coming = max(length - self.backwards, 0) * self._largest
        most = selector.most((rows + coming) * self._samples / rows * ranks)
        self.least = self.least if most is None else min(self.least, most)
        return most

    def without_gone(self, arrivals: list[Arrival], kept: list[Kept]) -> tuple[list[Kept], bool]:
        """What is kept of each call, without rows that it has let go; and whether there were any."""
        held = []
        for a, mine in zip(arrivals, kept, strict=True):
            if a.held is None:
                held.append(torch.ones_like(mine.rows, dtype=torch.bool))
            else:
                have, rows = a.held.rows, mine.rows.to(a.held.rows.device)
                held.append(have[torch.searchsorted(have, rows).clamp_max(len(have) - 1)] == rows)
        device = next((a.held.rows.device for a in arrivals if a.held is not None), held[0].device)
        if bool(torch.cat([to_device(flags, device) for flags in held]).all()):
            return kept, False
        cut = [
            Kept(k.rows[flags.to(k.rows.device)], None if k.factors is None else k.factors[flags.to(k.factors.device)])
            for k, flags in zip(kept, held, strict=True)
        ]
        return cut, True

    def nbytes(self) -> int:
        """Bytes of the rows that wait."""
        total = 0
        for a in self.arrivals:
            if a.held is not None:
                total += a.held.nbytes()
            else:
                tensors = [*a.call.inputs, *a.call.outputs, *(g for g in a.grads if g is not None)]
                tensors += [t for form in a.forms.values() for t in form.tensors()]
                total += sum(t.element_size() * (t.numel() if any(t.stride()) else 1) for t in tensors)
        return total


def _layout(arrival: Arrival, learned: Learned, communicates: bool) -> Layout | None:
    """How to cut the call's inputs into rows; None while that is in doubt."""
    if arrival.held is not None:
        assert arrival.held.held is not None
        return arrival.held.held.layout
    call = arrival.call
    if (known := learned.known(call)) is not None:
        return known
    return next(call.readings()) if communicates or not call.in_doubt() else None
