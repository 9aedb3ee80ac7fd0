"""The step: a backward arrives, its calls are read and decided on, and their kept rows are replayed.

Read it after ``screen.py``, which made the calls, and before ``replay.py``, which runs them again. What holds:

1. A call that was screened without a graph gets its gradient from a replay, or the step raises.
2. Until every row that was replayed has been held against its screen, no gradient of this process is touched.
3. An error leaves the gate as it was: the next decision is the one that would have been taken.
4. Where ranks must agree, nothing is raised by one alone: ``engine.ranks.fail`` tells the others.
5. The host waits for the device once in a decision: ``Readback`` collects what it has to know.
"""

import contextlib
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from kondo_hooks import private
from kondo_hooks.core import passes
from kondo_hooks.core.arrival import Arrival
from kondo_hooks.core.audit import Audit
from kondo_hooks.core.call import Call
from kondo_hooks.core.engine import Engine
from kondo_hooks.core.entry import Entry
from kondo_hooks.core.idle import Idle
from kondo_hooks.core.kept_rows import Part
from kondo_hooks.core.looks import Looks
from kondo_hooks.core.reader import Reader
from kondo_hooks.core.readings import Learned
from kondo_hooks.core.replays import Replays
from kondo_hooks.core.shared import Shared
from kondo_hooks.delight.loss_code import LossWatcher
from kondo_hooks.errors import WarnOnce
from kondo_hooks.rules.readback import Readback
from kondo_hooks.rules.samples import Decision, Kept, Samples, Signal, forced_mask
from kondo_hooks.rules.selection import Selector
from kondo_hooks.same.rounding import Checks
from kondo_hooks.same.state import ModuleState

_T = TypeVar("_T")


class AtOnce:
    """Which backwards form a population: each one alone, so that nothing waits.

    Attributes:
        size: how many backwards make one; "auto" leaves it to the host's gradient accumulation, "step" to whoever
            first wants a gradient.
        arrivals: calls that backwards have reached, in order.
        backwards: how many backwards those are.
        back: what is to be read of them when they are decided on.
        least: a decision that keeps no more samples than this finds all of their rows.
    """

    def __init__(self) -> None:
        self.size: int | Literal["auto", "step"] = 1
        self.arrivals: list[Arrival] = []
        self.backwards = 0
        self.back = Readback()
        self.least: float = math.inf

    def add(self, arrivals: list[Arrival]) -> None:
        """One more backward."""
        self.arrivals += arrivals
        self.backwards += 1

    def is_full(self, host_syncs: bool) -> bool:
        """Whether this was the last backward of the population."""
        return True

    def take(self) -> list[Arrival]:
        """The population, and nothing is left."""
        arrivals, self.arrivals = self.arrivals, []
        self.back, self.backwards = Readback(), 0
        return arrivals

    def compact(self, new: list[Arrival], selector: Selector, ranks: int, learned: Learned, communicates: bool) -> None:
        """Let go of rows that cannot be chosen any more."""

    def without_gone(self, arrivals: list[Arrival], kept: list[Kept]) -> tuple[list[Kept], bool]:
        """What is kept of each call, without rows that it has let go; and whether there were any."""
        return kept, False

    def nbytes(self) -> int:
        """Bytes of the rows that wait."""
        return 0


@dataclass
class _Population:
    """The calls that one backward has reached; goes with the backward if that fails."""

    arrivals: list[Arrival] = field(default_factory=list)

    __hash__ = object.__hash__


class Step:
    """The backward side of a gate.

    Attributes:
        shared: what its parts share.
        entry: sees each backward begin.
        looks: at the model.
        reader: of delight.
        checks: how strictly replays are held against their screens.
        window: which backwards form a population, and what waits.
        last: the last decision.
        forced: rows of the next population that are kept whatever their delight.
        observer: shown the calls of each backward, read and not yet decided on.
    """

    def __init__(
        self,
        state: ModuleState,
        engine: Engine,
        selector: Selector,
        checks: Checks,
        audit: Audit,
        idle: Idle,
        warn: WarnOnce,
        window: AtOnce,
        micro_batch_size: int | None,
    ):
        watcher = LossWatcher(lambda *call: self.entry.called(*call))
        self.shared = Shared(state, engine, selector, idle, warn, Learned(warn), watcher, micro_batch_size)
        self.entry = Entry(self.shared, self.settled_after)
        self.looks = Looks(self.shared, audit)
        self.reader = Reader(self.shared, self.looks)
        self.checks = checks
        self.last: Decision | None = None
        self.forced: Tensor | None = None
        self.observer: Callable[[list[Arrival]], None] | None = None
        self._replays = Replays(self.shared, self.entry)
        self._populations: weakref.WeakValueDictionary[int, _Population] = weakref.WeakValueDictionary()
        self._ended: list[_Population] | None = None
        self._hooks: list[Any] = []
        self._before: dict[str, Any] | None = None
        self._screened_first = False
        self.respread(window)

    def flush(self) -> int:
        """Decide on what waits and replay it; returns how many calls that were."""
        populations = list(self._populations.values())
        waiting = sum(len(population.arrivals) for population in populations) + len(self.window.arrivals)
        for population in populations:
            self._settle(population)
        if self.window.arrivals:
            with self.shared.streams.joined():
                self._finish()
        return waiting

    def _wanted(self, tensor: Tensor) -> None:
        """The gradient of a tensor is about to be read: of a parameter, what waits for it comes now."""
        waits = self.window.backwards and not self.shared.running
        if waits and any(tensor is p for p in self.shared.state.parameters()):
            with torch.enable_grad():  # who clips reads it without
                self.flush()

    def drop(self) -> None:
        """Forget what waits, as if it had not been."""
        self.window.take()
        self.shared.selector.forget()
        if self._before is not None:
            self.shared.selector.load_state_dict(self._before)
        self._before = None

    def forget_told(self) -> None:
        """What the user said of a population was of one that is over."""
        self.forced = self.shared.selector.groups = None

    def respread(self, window: AtOnce) -> None:
        """Form populations otherwise, from now on."""
        self.window = window
        self.shared.waits = window.size != 1
        self.shared.pace.begin(window.size if isinstance(window.size, int) else 1)
        self.shared.watcher.on_grad = self._wanted if window.size == "step" else None

    def waits(self) -> bool:
        """Whether a backward may leave its calls waiting for others."""
        return self.shared.waits

    def check_step(self) -> None:
        """Refuse a step of the optimizer while backwards wait: it would step without their gradients."""
        if waiting := self.window.backwards:
            raise RuntimeError(
                f"gated: optimizer.step() while {waiting} of window={self.window.size!r} backwards wait for their "
                "decision, so their gradients are not there yet. Call gate.flush() before clipping and stepping, let "
                "window divide the accumulation steps, or use window='auto' where a host accumulates."
            )

    def run_backward(self, loss: Tensor, retain_graph: bool, to_calls_alone: bool) -> None:
        """The backward of an engine that was taken over: down to the gated calls, whose replay then drives it.

        Args:
            loss: the user's.
            retain_graph: as the user asked.
            to_calls_alone: leave what else the graph leads to for another backward.
        """
        if to_calls_alone:
            torch.autograd.backward(loss, inputs=[self.entry.anchor], retain_graph=True)
        else:
            loss.backward(retain_graph=retain_graph)

    def ran_first(self, hooks: list[Any]) -> None:
        """A call that was screened before it ran has built its graph.

        Args:
            hooks: on rows that stand in, to be removed after the next backward.
        """
        self._hooks += hooks
        self._screened_first = self.entry.ran_first = True

    def unhook(self) -> None:
        """Take off what made rows that stand in silent."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @contextlib.contextmanager
    def settled_after(self) -> Iterator[None]:
        """Populations of a backward inside are settled when it has returned, out of autograd's engine.

        FSDP takes a forward inside of it for a recomputation, and would keep all layers gathered.
        """
        outer, self._ended = self._ended, []
        try:
            yield
            ended = self._ended
        finally:
            self._ended = outer
            self.unhook()
        for population in ended:
            self._settle(population)
        if not self.shared.engine.reduces_later:
            self.raise_failures()

    def raise_failures(self) -> None:
        """After the reduction that ends a backward of rows that ran first: raise if a rank could not decide on them."""
        if self._screened_first and self.shared.engine.syncs():
            self._screened_first = False
            self.shared.engine.ranks.raise_failures(self.shared.state.devices())

    @private.uncompiled
    def receive(self, call: Call, node: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The node's backward: wait for the end of the backward, or decide at once for an input's gradient."""
        if self.shared.running:
            return ()  # an engine goes through the loss once more, for what else it leads to
        self.shared.streams.note(grads)
        keeps_graph = private.keeps_graph()
        arrival = Arrival(
            call,
            node,
            list(grads),
            keeps_graph if self.entry.keeps_graph is None else self.entry.keeps_graph,
            private.graph_task(),
            private.will_run(node.next_functions[0][0]),
            cuts=self.shared.selector.config.unit == "prefix",
        )
        self.shared.idle.reached()
        if call.decides_at_once and not arrival.to_parameters:
            return tuple(self._replay_everything(arrival))
        if call.decides_at_once:
            if self.waits():
                raise RuntimeError(
                    "gated: with window other than 1 no input of the model may require grad, for its gradient has to "
                    "be returned in this backward; detach it, or use window=1"
                )
            population = _Population()
            population.arrivals.append(arrival)
            return tuple(self._settle(population))
        if not arrival.to_parameters:
            return ()
        waiting = self._populations.get(arrival.task)
        if waiting is None:
            waiting = self._populations[arrival.task] = _Population()
            private.at_the_end(lambda: self._end(waiting))
        waiting.arrivals.append(arrival)
        return ()

    def _replay_everything(self, arrival: Arrival) -> list[Tensor | None]:
        """Gradients of the inputs alone (adversarial examples): nothing learns from these rows, so all count."""
        back, call = Readback(), arrival.call
        arrival.check(back)
        rows = torch.arange(call.batch, device=call.outputs[0].device)
        return self._replays([arrival], [0], [Part.of(call, rows, arrival.grads)], None, False, back)

    def _end(self, population: _Population) -> None:
        if self._ended is None:
            self._settle(population)
        else:
            self._ended.append(population)

    # A population.

    @private.uncompiled
    def _settle(self, population: _Population) -> list[Tensor | None]:
        """Read the calls of one backward, and decide if that fills the window; returns inputs' gradients."""
        arrivals = sorted(population.arrivals, key=lambda a: a.call.serial)
        population.arrivals = []
        if not arrivals:
            return []
        engine, back = self.shared.engine, Readback()
        with self.shared.streams.joined():
            for step in (
                lambda each: self.reader.read(each, back),
                self.looks.find_readings,
                self.looks.find_prefixes,
                self.looks.audit,
            ):
                try:
                    step(arrivals)
                except Exception as error:
                    engine.ranks.fail(error)
            if self.observer is not None:
                self.observer(arrivals)
            if self._before is None:
                self._before = self.shared.selector.state_dict()
            self.window.add(arrivals)
            self.window.back.take_over(back)
            if self.window.is_full(engine.ends_accumulation(arrivals[-1].call)):
                return self._finish()
            if self.forced is None:
                deciding = engine.ranks.size if engine.together else 1
                self.window.compact(arrivals, self.shared.selector, deciding, self.shared.learned, engine.communicates)
            self.shared.stats.waiting_bytes = max(self.shared.stats.waiting_bytes, self.window.nbytes())
            if self.window.size == "step":
                engine.rest()
            return []

    def _finish(self) -> list[Tensor | None]:
        """Decide on the window's calls and replay their kept rows; returns gradients for inputs that want one."""
        back, least = self.window.back, self.window.least
        arrivals = self.window.take()
        engine = self.shared.engine
        ranks = engine.ranks
        reduces = engine.reduces(arrivals[-1].call)
        before, self._before = self._before or self.shared.selector.state_dict(), None
        try:
            decision: Decision | None = None
            parts: list[Part | None] = [None] * len(arrivals)
            kept: list[Kept] = []
            slots = passes.find_slots(arrivals)
            counts: Tensor | None = None
            try:
                decision, kept, counts = self._decide(arrivals, slots, least, back)
                parts = [a.part(mine) for a, mine in zip(arrivals, kept, strict=True)]
                _note_scale(decision, arrivals[0], back)
            except Exception as error:
                if engine.together:
                    raise
                ranks.fail(error)
            inputs = self._replays(arrivals, slots, parts, counts, reduces, back)
            if kept:
                self.entry.send_to_met(arrivals, lambda: self._met(arrivals, kept, decision))
            if counts is not None and not engine.wrappers:
                ranks.meet()  # no reduction of gradients comes after which all ranks could look
            if reduces:
                ranks.raise_failures(self.shared.state.devices())
        except BaseException:
            self.shared.selector.load_state_dict(before)
            raise
        if decision is None or ranks.failed:
            return inputs
        self.shared.pace.decided(sum(a.samples for a in arrivals))
        if reduces:
            self.shared.selector.costs = self.shared.pace.settle(decision, ranks) or self.shared.selector.costs
        if self.last is None and decision.samples == 1:
            self.reader.warn_single(arrivals)
        decision.explain([a.signal for a in arrivals if a.signal is not None])
        leaders = [a.call for a in arrivals if a.follows is None]
        if any(call.sequences for call in leaders) and not self.shared.selector.config.tokens:
            decision.steps_of = _steps_of(leaders)
        self.last = decision
        self.forget_told()
        self.shared.stats.decision(decision)
        self.shared.stats.replayed(0, sum(a.samples for a in arrivals))
        for a in arrivals:
            if not a.keep_graph:
                a.call.release()
        return inputs

    def _met(self, arrivals: list[Arrival], kept: list[Kept], decision: Decision | None) -> list[Kept]:
        """What counts of each call at parameters in the loss code.

        A row that no draw can keep, for its gradient is zero at the outputs, may have one there: it counts as it is.
        """
        config, selector = self.shared.selector.config, self.shared.selector
        if any(a.texts is not None for a in arrivals):
            self.shared.warn(
                "outside texts",
                "gated: the loss code uses a parameter of the model together with its outputs, which are packed, so "
                "texts that are dropped still reach that parameter. Return it from forward, and use what it returned.",
            )
            return [Kept(torch.arange(a.call.batch, device=a.call.outputs[0].device), None) for a in arrivals]
        if decision is None or decision.norm is None or not config.weighs or config.asks or config.tokens:
            return kept
        idle = decision.delight.sigmoid() if config.weight == "dg" else torch.ones_like(decision.delight)
        factors = torch.where(decision.norm.to(idle.device) == 0, idle, decision.factors())
        each = selector.split(factors, [a.signal for a in arrivals if a.signal is not None])
        found = _of_each(arrivals, each)
        return [Kept(torch.arange(len(mine), device=mine.device), mine) for mine in found]

    def _decide(
        self, arrivals: list[Arrival], slots: list[int], least: float, back: Readback
    ) -> tuple[Decision, list[Kept], Tensor | None]:
        """The decision, what is kept of each call, and with all ranks as one batch how many each rank keeps."""
        leaders = [a for a in arrivals if a.follows is None]
        if len(leaders) < len(arrivals) and self.shared.engine.balance:
            raise RuntimeError(
                "gated: balance=True moves rows of one call between ranks, but here two calls (a policy's and a "
                "value's?) share their rows. Make them one call (method=), or leave balance away."
            )
        signals = [a.signal for a in leaders if a.signal is not None]
        found = signals if len(signals) == len(leaders) and not self.shared.engine.ranks.failed else None
        forced = None if found is None else self._forced(leaders, found)
        by_user = self.forced is not None
        of_leaders = [slot for a, slot in zip(arrivals, slots, strict=True) if a.follows is None]
        decision, chosen, counts = self.choose(found, forced, of_leaders, back)
        kept = _of_each(arrivals, chosen)
        if counts is None and not by_user and len(decision.kept) <= least:
            return decision, kept, counts
        kept, lost = self.window.without_gone(arrivals, kept)
        if lost:
            cause = "gate.force() names rows of backwards before it" if by_user else "it has more rows than expected"
            self.shared.warn(
                "window",
                f"gated: rows of this window that were to be kept were no longer held, so they are dropped: {cause}. "
                "Say force() before the first backward of a window; let its backwards have about as many rows.",
            )
            left = [mine for a, mine in zip(arrivals, kept, strict=True) if a.follows is None]
            shares = zip(leaders, left, strict=True)
            decision.cut([mine.spread(a.samples, decision.delight.dtype) for a, mine in shares])
        return decision, kept, counts

    def _forced(self, arrivals: list[Arrival], signals: list[Signal]) -> Tensor | None:
        """(N,) samples whose gradients overflowed float16, over the population; None if there are none."""
        if all(a.forced is None for a in arrivals):
            return None
        rows = [
            torch.zeros(a.samples, dtype=torch.bool, device=s.valid.device)
            if a.forced is None
            else a.of_samples(a.forced)
            for a, s in zip(arrivals, signals, strict=True)
        ]
        if self.shared.selector.config.tokens:
            rows = [r.repeat_interleave(s.valid.numel() // len(r)) for r, s in zip(rows, signals, strict=True)]
        return torch.cat(rows)

    def choose(
        self,
        signals: list[Signal] | None,
        forced: Tensor | None = None,
        slots: list[int] | None = None,
        back: Readback | None = None,
    ) -> tuple[Decision, list[Kept], Tensor | None]:
        """Choose; ``forced`` rows, and those that the user forced, are kept.

        Args:
            signals: of each call; None if this rank failed to read them.
            forced: (N,) samples.
            slots: which of the structures that ranks have in common each call has.
            back: brings the decision's numbers; without, they are there.
        """
        engine = self.shared.engine
        return engine.decide(
            self.shared.selector, signals, slots or [], lambda samples: self._with_users(forced, samples), back
        )

    def _with_users(self, forced: Tensor | None, samples: Samples) -> Tensor | None:
        if self.forced is None:
            return forced
        try:
            mine = forced_mask(self.forced.to(samples.delight.device), len(samples.delight))
        except ValueError:
            self.forced = None  # said once, and not at every step to come
            raise
        return mine if forced is None else mine | forced


def _of_each(arrivals: list[Arrival], of_leaders: list[_T]) -> list[_T]:
    """What was decided for the calls that others follow, for each call."""
    leaders = [a for a in arrivals if a.follows is None]
    by_leader = {id(a): mine for a, mine in zip(leaders, of_leaders, strict=True)}
    return [by_leader[id(a.follows or a)] for a in arrivals]


def _note_scale(decision: Decision, first: Arrival, back: Readback) -> None:
    """The loss's own scale of a population, as its first call has it."""
    scale = first.scale
    if not isinstance(scale, Tensor):
        decision.scale = scale
        return

    def note(found: list[float]) -> None:
        limits = torch.finfo(scale.dtype)
        decision.scale = found[0] if limits.tiny < found[0] < limits.max else 1 / first.samples

    back.ask([scale], note)


def _steps_of(calls: Iterable[Call]) -> Tensor:
    """Of each row that the loop gave to these calls, its sample: a sequence where rows are steps, else itself."""
    found, first = list[Tensor](), 0
    for call in calls:
        index = torch.arange(first, first + call.batch, device="cpu")
        first += call.batch
        each = max((where.repeat for where in call.rows if where is not None), default=1) if call.sequences else 1
        found.append(index.repeat(each) if call.steps > 1 else index.repeat_interleave(each))
    return torch.cat(found)
