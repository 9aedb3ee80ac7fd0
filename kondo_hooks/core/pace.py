"""What steps take, and with ``rate="auto"`` which of them pass straight through because the gate would not pay."""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from kondo_hooks.core.engine import Alone
from kondo_hooks.rules.samples import Decision
from kondo_hooks.rules.weigh import Costs

_RECENT = 9
_UNGATED_FIRST = 2  # of which the first warms up
_COLD = 2  # gated steps in which the gate gets to know the model
_PAUSE, _LONGEST_PAUSE = 8, 2048
_AGAIN = 256


@dataclass
class _Spans:
    """Seconds of one step: pairs of marks, of calls and backwards, and of the replay in them."""

    rows: int = 0
    replayed: int = 0
    gated: bool = False
    forgotten: bool = False
    steps: list[tuple[Any, Any]] = field(default_factory=list)
    replays: list[tuple[Any, Any]] = field(default_factory=list)

    def is_known(self) -> bool:
        """Whether the device has come by all marks."""
        ends = [end for _, end in (*self.steps, *self.replays)]
        return all(isinstance(end, float) or end.query() for end in ends)


def _seconds(spans: list[tuple[Any, Any]]) -> float:
    return sum(e - s if isinstance(s, float) else s.elapsed_time(e) / 1e3 for s, e in spans)


class Pace:
    """Watches how long calls, backwards and replays take. On an accelerator by events, so that the host never waits.

    Args:
        auto: whether steps pass through where the gate does not pay.
        device: of the model.

    Attributes:
        auto: as it was told.
        calls: of the model in the last step that was seen.
    """

    def __init__(self, auto: bool, device: Callable[[], torch.device]):
        self.auto, self._device = auto, device
        self.calls = 1
        self._on: torch.device | None = None
        self._asked = True
        self._now = _Spans()
        self._closed: deque[_Spans] = deque(maxlen=4 * _RECENT)
        self._full, self._fixed, self._row = (deque[float](maxlen=_RECENT) for _ in range(3))
        self._last = 0, 0
        self._depth = 0
        self._window = 1  # backwards of a step
        self._ungated = _UNGATED_FIRST if auto else 0
        self._cold = _COLD
        self._decisions = 0
        self._since = 0
        self._pause = _PAUSE
        self._probing = self._chosen = False

    def begin(self, window: int | None = None) -> None:
        """Measure from the start, by steps that pass straight through; ``window`` backwards are one from now on."""
        self._window = window or self._window
        if self.auto:
            self._ungated = _UNGATED_FIRST * self._window

    def passes(self) -> bool:
        """Whether the coming step passes straight through."""
        return self._ungated > 0

    def is_long(self) -> bool:
        """Whether so many steps are still to pass through that nobody needs to see them."""
        return self._ungated > _PAUSE

    def slept(self, steps: int) -> None:
        """Steps passed through that nobody saw."""
        self._ungated = max(0, self._ungated - steps)

    # Marks.

    def mark(self) -> Any:
        """Now, on the device; None where that is not asked for."""
        if self._on is None:
            self._on = self._device()
            # Events are not free, and there are none everywhere.
            self._asked = self._on.type == "cpu" or (self.auto and self._on.type in ("cuda", "xpu"))
        if not self._asked:
            return None
        if self._on.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self._on, enable_timing=True)
        event.record()
        return event

    def called(self, start: Any) -> None:
        """A call of the model has ended."""
        if start is not None:
            self._now.steps.append((start, self.mark()))

    def replayed(self, start: Any, rows: int) -> None:
        """A replay has ended."""
        if start is not None:
            self._now.replays.append((start, self.mark()))
            self._now.replayed += rows

    def passed(self, rows: int) -> None:
        """A backward of all rows was met."""
        self._now.rows += rows

    def forget(self) -> None:
        """The step that now runs is none to measure: it was decided on before, or has failed."""
        self._now.forgotten = True

    def decided(self, rows: int) -> None:
        """A population of so many rows was decided on."""
        self._now.rows += rows
        self._now.gated = True

    def enter(self) -> Any:
        """A backward begins."""
        self._depth += 1
        return self.mark() if self._depth == 1 else None

    def leave(self, start: Any) -> None:
        """A backward has ended; so has a step, if rows were decided on or passed straight through."""
        self._depth -= 1
        if self._depth:
            return
        self.calls = max(1, len(self._now.steps))
        if start is not None:
            self._now.steps.append((start, self.mark()))
        if self._now.forgotten:
            self._now = _Spans()
        if not self._now.rows:
            return
        if not self._now.gated and self._ungated:
            self._ungated -= 1
        if start is not None:
            self._closed.append(self._now)
        self._now = _Spans()

    # What follows.

    def _read(self) -> None:
        while self._closed and self._closed[0].is_known():
            step = self._closed.popleft()
            whole, replay = _seconds(step.steps), _seconds(step.replays)
            if not step.gated:
                self._full.append(whole / step.rows)
                continue
            self._last = step.rows, step.replayed
            if self._cold:
                self._cold -= 1
            else:
                self._fixed.append((whole - replay) / step.rows)
                if step.replayed:
                    self._row.append(replay / step.replayed)

    def seconds(self) -> tuple[float, float, float]:
        """Of a step like the last: beside its replay, of the replay, and without a gate; NaN where not known."""
        self._read()
        fixed, row, full = (statistics.median(each) if each else math.nan for each in self._measured)
        rows, replayed = self._last
        return fixed * rows, row * replayed, full * rows

    @property
    def _measured(self) -> tuple[deque[float], ...]:
        return self._fixed, self._row, self._full

    def settle(self, decision: Decision, ranks: Alone) -> Costs | None:
        """After a decision, where all ranks are: what steps cost, and whether the next pass straight through.

        Args:
            decision: the last.
            ranks: take the mean of what each has measured.

        Returns:
            Seconds a row, to be used until the next time; None where they are as they were, or not known.
        """
        self._decisions += 1
        self._since += 1
        if not self.auto or not (not self._chosen or self._decisions % 8 == 0 or self._probing):
            return None
        self._read()
        known = [statistics.median(each) if each else math.nan for each in self._measured]
        fixed, row, full, cost = ranks.mean([*known, decision.cost])
        if not (math.isfinite(fixed) and math.isfinite(row)):
            return None
        if math.isfinite(full) and math.isfinite(cost):
            self._choose(cost >= full, fixed / full if full else 1.0)
        return Costs(fixed, row)

    def _choose(self, is_dear: bool, times: float) -> None:
        """For how long steps pass through: if the gate is dear, so long that to try it again costs 1% of them.

        Args:
            is_dear: whether a step of all rows is worth more.
            times: a gated step's seconds over one's without a gate.
        """
        self._chosen, self._probing = True, is_dear
        if is_dear:
            self._pause = min(max(self._pause, math.ceil(100 * (times - 1))), _LONGEST_PAUSE)
            self._ungated, self._pause = self._pause * self._window, min(2 * self._pause, _LONGEST_PAUSE)
        else:
            self._pause = _PAUSE
            if self._since >= _AGAIN:
                self._ungated = self._window
        if self._ungated:
            self._since = 0
