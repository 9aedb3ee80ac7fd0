"""What happens in a backward: calls arrive, wait until their window is full, are decided on as one population, and
their kept rows are replayed."""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from kondo_hooks.core.arrival import Arrival, OutputProbe, find_scales, find_signal
from kondo_hooks.core.audit import Audit
from kondo_hooks.core.call import Call
from kondo_hooks.core.idle import Idle
from kondo_hooks.core.kept_rows import Part
from kondo_hooks.core.readings import Learned, find_positions
from kondo_hooks.core.replay import AmbiguousRowsError, Replayed, find_graphs, have_graph, input_grads, replay
from kondo_hooks.core.verify import name_of
from kondo_hooks.delight.beside import Meeting, find_meetings, retaining
from kondo_hooks.delight.graph import Path, probe_scales, selects_log_prob
from kondo_hooks.delight.loss_code import LossWatcher
from kondo_hooks.errors import DelightError, ReplayMismatchError, WarnOnce, unknown_positions
from kondo_hooks.ranks import passes
from kondo_hooks.ranks import together as world
from kondo_hooks.ranks.engines import Engine
from kondo_hooks.routes.window import Spread, Window, in_doubt, without_gone
from kondo_hooks.rules.readback import Readback
from kondo_hooks.rules.selection import Decision, Kept, Samples, Selector, Signal, check_finite, forced_mask
from kondo_hooks.same.rounding import Checks
from kondo_hooks.same.state import ModuleState
from kondo_hooks.same.streams import Streams
from kondo_hooks.stats import Stats

_RESIDUAL = 0.1
_NO_GRAPH = (
    "gated: the kept rows ran again with grad, but no output that the loss uses has a graph, so nothing would learn; "
    "plain PyTorch raises here too. Likely: a reentrant checkpoint whose inputs need no gradient (use_reentrant=False, "
    "or model.enable_input_require_grads()), a forward under no_grad, outputs that the model detaches."
)
_AUDITED = 0.1  # share of the rows that a look takes where the user gave a price


class _Population:
    """The calls that one backward has reached; goes with the backward if that fails."""

    def __init__(self) -> None:
        self.arrivals: list[Arrival] = []


class Backward:
    """The backward side of a gate.

    Attributes:
        state: the model's.
        engine: that runs the model.
        spread: which rows form a population.
        selector: decides.
        checks: how strictly replays are held against their screens.
        idle: notices steps that the gate had no part in.
        stats: counts.
        last: the last decision.
        forced: rows of the next population that are kept whatever their delight.
        anchor: the leaf that every node hangs on, so that a backward reaches it.
        watcher: sees the loss code and every call of a backward.
        window: what waits.
        copy_outputs: whether the user's code has been seen to write into outputs.
        running: whether the model runs in a replay.
        learned: where inputs keep their rows, as it was found by replaying.
        streams: that calls and their gradients were made on.
    """

    def __init__(
        self,
        state: ModuleState,
        engine: Engine,
        spread: Spread,
        selector: Selector,
        checks: Checks,
        audit: Audit,
        idle: Idle,
        warn: WarnOnce,
    ):
        self.state = state
        self.engine = engine
        self.spread = spread
        self.selector = selector
        self.checks = checks
        self._audit = audit
        self.idle = idle
        self.stats = Stats()
        self.last: Decision | None = None
        self.forced: Tensor | None = None
        self.anchor = torch.zeros((), requires_grad=True, device="cpu")
        self.watcher = LossWatcher(self._called)
        self.window = Window(spread.window)
        self.copy_outputs = False
        self.running = False
        self.streams = Streams()
        self._warn = warn
        self._populations: weakref.WeakValueDictionary[int, _Population] = weakref.WeakValueDictionary()
        self._ended: list[_Population] | None = None
        self._hooks: list[Any] = []
        self._screened_first = False
        self.learned = Learned(warn)
        self._capture: dict[int, Tensor | None] | None = None
        self._only: list[Tensor] | None = None
        self._meetings: list[Meeting] = []
        self._keeps_graph: bool | None = None
        self._probed: dict[tuple[str, ...], OutputProbe] = {}
        self._positions: dict[str, bool] = {}
        self._constants: dict[str, bool] = {}

    def flush(self) -> int:
        """Decide on what waits and replay it; returns how many calls that were."""
        populations = list(self._populations.values())
        waiting = sum(len(population.arrivals) for population in populations) + len(self.window.arrivals)
        for population in populations:
            self._settle(population)
        if self.window.arrivals:
            with self.streams.joined():
                self._finish()
        return waiting

    def respread(self, spread: Spread) -> None:
        """Form populations otherwise, from now on."""
        self.spread = spread
        self.window = Window(spread.window)

    def waits(self) -> bool:
        """Whether a backward may leave its calls waiting for others."""
        return self.spread.window != 1

    def check_step(self) -> None:
        """Refuse a step of the optimizer while backwards wait: it would step without their gradients."""
        if waiting := self.window.backwards:
            raise RuntimeError(
                f"gated: optimizer.step() while {waiting} of window={self.spread.window!r} backwards wait for their "
                "decision, so their gradients are not there yet. Call gate.flush() before clipping and stepping, let "
                "window divide the accumulation steps, or use window='auto' where a host accumulates."
            )

    # The backward itself.

    def _called(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stands in for ``Tensor.backward``, ``torch.autograd.backward`` and ``torch.autograd.grad``."""
        roots: Any = args[0] if args else kwargs.get("tensors", kwargs.get("outputs"))
        roots = [roots] if isinstance(roots, Tensor) else list(roots)
        nodes = [root.grad_fn for root in roots if getattr(root, "grad_fn", None) is not None]
        probes: list[Any]
        probes, leaves = probe_scales(nodes)
        meetings: list[Meeting] = []
        try:
            if func is not torch.autograd.grad:
                self._refuse_half_a_step(leaves)
            if meetings := self._find_meetings(nodes, leaves):
                probes += [meeting.hold() for meeting in meetings]
                self._meetings += meetings
                args, kwargs, self._keeps_graph = retaining(func, args, kwargs)
            if func is torch.autograd.grad:
                return self._autograd_grad(*args, **kwargs)
            wanted = kwargs.get("inputs")
            if wanted is not None:
                wanted = [wanted] if isinstance(wanted, Tensor) else list(wanted)
                mine = {id(p) for p in self.state.parameters()}
                only = [leaf for leaf in wanted if id(leaf) in mine]
                if only:
                    self._only = only
                    kwargs = {**kwargs, "inputs": [*wanted, self.anchor]}
            with self._settled_after():
                return func(*args, **kwargs)
        except BaseException:
            self._meetings = [m for m in self._meetings if m not in meetings]
            raise
        finally:
            self._only, self._keeps_graph = None, None
            self._meetings = [m for m in self._meetings if m.sent is not None]
            for probe in probes:
                probe.remove()

    def _steps_inside(self) -> list[torch.nn.Parameter]:
        """The parameters that an optimizer may step as soon as their gradient is there."""
        if self.engine.wrappers:
            return []  # the hooks are the engine's
        return [p for p in self.state.parameters() if p._post_accumulate_grad_hooks]

    def _refuse_half_a_step(self, leaves: list[Tensor]) -> None:
        """Refuse a loss that reaches such a parameter past the gate, before anything is stepped."""
        stepped = {id(p): p for p in self._steps_inside()} if leaves else {}
        for leaf in leaves:
            if id(leaf) in stepped:
                raise RuntimeError(
                    f"gated: hooks step the optimizer inside of the backward, and the loss uses "
                    f"{self.state.name_of(stepped[id(leaf)])} itself beside the gated outputs (a penalty on "
                    "parameters?): it would be stepped twice, by half of its gradient each. Put weight decay into the "
                    "optimizer, or step after the backward. Nothing was changed."
                )

    def _find_meetings(self, roots: list[Any], leaves: list[Tensor]) -> list[Meeting]:
        """Where parameters of the model meet rows in the loss code; told where rows cannot be told apart there."""
        names = {id(p): name for name, p in self.state.named_parameters()} if leaves else {}
        mine = [id(leaf) for leaf in leaves if id(leaf) in names]
        meetings = find_meetings(roots, mine) if mine else []
        if not meetings:
            return []
        shared = self.engine.wrappers or self.spread.balance or self.selector.config.unit == "token"
        if not shared and all(meeting.is_split for meeting in meetings):
            return meetings
        first = next((m for m in meetings if not m.is_split), meetings[0])
        self._warn(
            "outside",
            f"gated: the loss code uses the model's parameter {names[min(first.leaves, key=mine.index)]} together with "
            "its outputs, so rows that are dropped still reach that parameter. Return it from forward, expanded to the "
            "batch, and use what forward returned.",
        )
        return []

    def _send_to_met(self, arrivals: list[Arrival], kept: list[Kept]) -> None:
        """The kept rows' share in the gradients of parameters that the loss code uses itself."""
        by_call = {
            (id(a.call), a.task): mine.spread(a.call.batch, torch.float64)
            for a, mine in zip(arrivals, kept, strict=True)
        }
        ready = [m for m in self._meetings if m.is_ready(by_call)]
        self._meetings = [m for m in self._meetings if m not in ready]
        due = [pair for meeting in ready for pair in meeting.release(by_call)]
        if due:
            retain = any(a.keep_graph for a in arrivals)
            self._to_parameters([edge for edge, _ in due], [grad for _, grad in due], [], True, retain)

    def run_backward(self, loss: Tensor, retain_graph: bool, to_calls_alone: bool) -> None:
        """The backward of an engine that was taken over: down to the gated calls, whose replay then drives it.

        Args:
            loss: the user's.
            retain_graph: as the user asked.
            to_calls_alone: leave what else the graph leads to for another backward.
        """
        if to_calls_alone:
            torch.autograd.backward(loss, inputs=[self.anchor], retain_graph=True)
        else:
            loss.backward(retain_graph=retain_graph)

    def ran_first(self, hooks: list[Any]) -> None:
        """A call that was screened before it ran has built its graph.

        Args:
            hooks: on rows that stand in, to be removed after the next backward.
        """
        self._hooks += hooks
        self._screened_first = True

    def unhook(self) -> None:
        """Take off what made rows that stand in silent."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @contextlib.contextmanager
    def _settled_after(self) -> Iterator[None]:
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
        if not self.engine.reduces_later:
            self.raise_failures()

    def raise_failures(self) -> None:
        """After the reduction that ends a backward of rows that ran first: raise if a rank could not decide on them."""
        if self._screened_first and self.engine.syncs():
            self._screened_first = False
            self.engine.ranks.raise_failures(self.state.devices())

    def _autograd_grad(self, outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """``torch.autograd.grad``, where the model's parameters hang on the node and not on the graph."""
        inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        mine = {id(p) for p in self.state.parameters()}
        wanted = [leaf for leaf in inputs if id(leaf) in mine]
        if not wanted:
            with self._settled_after():
                return torch.autograd.grad(outputs, inputs, *args, **kwargs)
        names = ("grad_outputs", "retain_graph", "create_graph", "only_inputs", "allow_unused")
        options = {**dict(zip(names, args, strict=False)), **kwargs}
        allow_unused = options.pop("allow_unused", None)
        zeros = options.pop("materialize_grads", False)
        self._capture = {id(leaf): None for leaf in wanted}
        try:
            with self._settled_after():
                grads = torch.autograd.grad(outputs, [*inputs, self.anchor], allow_unused=True, **options)[:-1]
            captured = self._capture
        finally:
            self._capture = None
        result = []
        for leaf, grad in zip(inputs, grads, strict=True):
            extra = captured.get(id(leaf))
            total = extra if grad is None else grad if extra is None else grad + extra
            if total is None and zeros:
                total = torch.zeros_like(leaf)
            if total is None and not allow_unused:
                raise RuntimeError(
                    "One of the differentiated Tensors appears to not have been used in the graph. "
                    "Set allow_unused=True if this is the desired behavior."
                )
            result.append(total)
        return tuple(result)

    @_disable_dynamo
    def receive(self, call: Call, node: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The node's backward: wait for the end of the backward, or decide at once for an input's gradient."""
        if self.running:
            return ()  # an engine goes through the loss once more, for what else it leads to
        self.streams.note(grads)
        keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph()
        arrival = Arrival(
            call,
            node,
            list(grads),
            keeps_graph if self._keeps_graph is None else self._keeps_graph,
            torch._C._current_graph_task_id(),
            torch._C._will_engine_execute_node(node.next_functions[0][0]),
        )
        self.idle.reached()
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
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._end(waiting))
        waiting.arrivals.append(arrival)
        return ()

    def _replay_everything(self, arrival: Arrival) -> list[Tensor | None]:
        """Gradients of the inputs alone (adversarial examples): nothing learns from these rows, so all count."""
        back, call = Readback(), arrival.call
        arrival.check(back)
        rows = torch.arange(call.batch, device=call.outputs[0].device)
        return self._replay([arrival], [0], [Part.of(call, rows, arrival.grads)], None, False, back)

    def _end(self, population: _Population) -> None:
        if self._ended is None:
            self._settle(population)
        else:
            self._ended.append(population)

    # A population.

    @_disable_dynamo
    def _settle(self, population: _Population) -> list[Tensor | None]:
        """Read the calls of one backward, and decide if that fills the window; returns inputs' gradients."""
        arrivals = sorted(population.arrivals, key=lambda a: a.call.serial)
        population.arrivals = []
        if not arrivals:
            return []
        ranks = self.engine.ranks
        with self.streams.joined():
            back = Readback()
            for step in (lambda each: self._read(each, back), self._find_readings, self._look):
                try:
                    step(arrivals)
                except Exception as error:
                    self._raise_or_announce(error)
            self.window.add(arrivals)
            self.window.back.take_over(back)
            if self.window.is_full(self.engine.ends_accumulation(arrivals[-1].call)):
                return self._finish()
            if self.forced is None:
                together = ranks.size if self.spread.scope == "global" else 1
                self.window.compact(arrivals, self.selector, together, self.learned, self.engine.communicates)
            self.stats.waiting_bytes = max(self.stats.waiting_bytes, self.window.nbytes())
            return []

    def _read(self, arrivals: list[Arrival], back: Readback) -> None:
        """Find each call's signal; some of what may be wrong is told when ``back`` is read."""
        for a in arrivals:
            if a.unsplit():
                self._forget_constants(a)
            a.check(back)
            if a.call.overwritten():
                self.copy_outputs = True
                with self._model_running():
                    a.call.screen_again()
        tokens = self.selector.config.unit == "token"
        read: list[Arrival] = []
        unread: list[tuple[Arrival, DelightError]] = []
        paths: list[list[list[Path]]] = []
        for a in arrivals:
            a.forced = a.overflowed()
            try:
                a.signal, a.offset, taken = find_signal(a, tokens, self._probe_outputs, self._warn_residual)
                a.call.policy = a.policy()
                read.append(a)
                paths.append(taken)
            except DelightError as error:
                unread.append((a, error))
            self._warn_critic(a)
        for a, scale in zip(read, find_scales(paths, [a.call.batch for a in read], self._warn), strict=True):
            assert a.signal is not None
            u = a.signal.advantages
            a.signal = replace(a.signal, advantages=u / (scale.to(u.device) if isinstance(scale, Tensor) else scale))
            a.scale = scale
        for a in arrivals:
            for observation in a.call.observations:
                observation.release()
            if tokens and a.signal is not None:
                self._find_positions(a)
        for a, cause in unread:
            a.follow(b for b in arrivals if b.signal is not None)
            if a.follows is None:
                if self.selector.config.priority != "uniform" or tokens:
                    raise cause
                rows = torch.zeros(a.call.batch, 1, device=a.call.outputs[0].device)  # random rows need no delight
                a.signal, a.offset = Signal(rows, rows, rows == 0), 0

    def _warn_critic(self, arrival: Arrival) -> None:
        """Say once where a rule that prefers some rows decides what something else than the policy learns from."""
        config = self.selector.config
        unbiased = config.priority == "uniform" or (config.unbiased and config.hard)
        if unbiased or not self._warn.is_new("critic"):
            return
        for i in arrival.others():
            self._warn(
                "critic",
                f"gated: {name_of(arrival.call, i)} gets a gradient but holds no policy (a critic, an entropy bonus?). "
                "It learns from the chosen rows alone, which are no fair sample: a critic learns the value of lucky "
                "rows. Train it on all rows (a model of its own outside of the gate), or draw without bias: "
                "priority='uniform', or deterministic=False, unbiased=True.",
            )
            return

    def _look(self, arrivals: list[Arrival]) -> None:
        """Audit what is new, or due; where passes communicate, also on a rank that failed to read its calls."""
        if self.engine.ranks.failed and not self.engine.communicates:
            return
        rate = self.selector.rate() or _AUDITED
        with self._model_running():
            self._audit(arrivals, self.selector.step, rate, self.engine, self.state, self.learned)

    def _find_positions(self, a: Arrival) -> None:
        """Find out which outputs have the positions of the signal's, and which an axis that is as long by chance."""
        call = a.call
        length, others = a.with_positions()
        for i, shape in a.summed_over_positions().items():
            self._warn("positions", unknown_positions(call.output_name(i), shape, by_row=True))
        if any(call.paths[i] not in self._positions for i in others):
            found: dict[int, bool] = {}
            if a.source is not None and not self.engine.communicates:
                with self._model_running(), self.engine.one_pass(False):
                    found = find_positions(call, list(others), a.source, length)
            for i, shape in others.items():
                several = shape.count(length) > 1
                if i not in found:
                    self._warn("positions", unknown_positions(call.output_name(i), shape, by_row=several))
                self._positions[call.paths[i]] = found.get(i, not several)
        a.positions = {i: self._positions[call.paths[i]] for i in others}

    def _find_readings(self, arrivals: list[Arrival]) -> None:
        """Find out where inputs keep their rows, by a row of each call in doubt, before other rows are let go."""
        if not self.waits() or self.engine.communicates or self.engine.ranks.failed:
            return
        for a in arrivals:
            if a.call.whole is None and self.learned.known(a.call) is None and in_doubt(a.call):
                some = a.some()
                if some is not None:
                    with self._model_running(), self.engine.one_pass(False), contextlib.suppress(AmbiguousRowsError):
                        replay([some], self.learned)

    def _finish(self) -> list[Tensor | None]:
        """Decide on the window's calls and replay their kept rows; returns gradients for inputs that want one."""
        back, least = self.window.back, self.window.least
        arrivals = self.window.take()
        ranks, engine = self.engine.ranks, self.engine
        reduces = engine.reduces(arrivals[-1].call)
        before = self.selector.state_dict()
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
                if self.spread.scope == "global":
                    raise
                self._raise_or_announce(error)
            inputs = self._replay(arrivals, slots, parts, counts, reduces, back)
            if kept and self._meetings:
                with self._replaying():
                    self._send_to_met(arrivals, kept)
            if counts is not None and not engine.wrappers:
                ranks.meet()  # no reduction of gradients comes after which all ranks could look
            if reduces:
                ranks.raise_failures(self.state.devices())
        except BaseException:
            self.selector.load_state_dict(before)
            raise
        if decision is None or ranks.failed:
            return inputs
        if self.last is None and decision.samples == 1:
            self._warn_single(arrivals)
        self.last = decision
        self.stats.decision(decision)
        self.stats.replayed(0, sum(a.call.batch for a in arrivals))
        for a in arrivals:
            if not a.keep_graph:
                a.call.release()
        return inputs

    def _decide(
        self, arrivals: list[Arrival], slots: list[int], least: float, back: Readback
    ) -> tuple[Decision, list[Kept], Tensor | None]:
        """The decision, what is kept of each call, and with all ranks as one batch how many each rank keeps."""
        leaders = [a for a in arrivals if a.follows is None]
        if len(leaders) < len(arrivals) and self.spread.balance:
            raise RuntimeError(
                "gated: balance=True moves rows of one call between ranks, but here two calls (a policy's and a "
                "value's?) share their rows. Make them one call (method=), or leave balance away."
            )
        signals = [a.signal for a in leaders if a.signal is not None]
        found: Signals = signals if len(signals) == len(leaders) and not self.engine.ranks.failed else None
        forced = None if found is None else self._forced(leaders, found)
        of_leaders = [slot for a, slot in zip(arrivals, slots, strict=True) if a.follows is None]
        decision, chosen, counts = self.choose(found, forced, of_leaders, back)
        by_leader = {id(a): mine for a, mine in zip(leaders, chosen, strict=True)}
        kept = [by_leader[id(a.follows or a)] for a in arrivals]
        if counts is None and len(decision.kept) <= least:
            return decision, kept, counts
        kept, lost = without_gone(arrivals, kept)
        if lost:
            self._warn(
                "window",
                "gated: a window ended with more rows than its first backwards let expect, so fewer rows than rate "
                "are kept: rows that could have been chosen were no longer held.",
            )
        return decision, kept, counts

    def _forced(self, arrivals: list[Arrival], signals: list[Signal]) -> Tensor | None:
        """(N,) samples whose gradients overflowed float16, over the population; None if there are none."""
        if all(a.forced is None for a in arrivals):
            return None
        rows = [
            torch.zeros(a.call.batch, dtype=torch.bool, device=s.valid.device) if a.forced is None else a.forced
            for a, s in zip(arrivals, signals, strict=True)
        ]
        if self.selector.config.unit == "token":
            rows = [r.repeat_interleave(s.valid.numel() // len(r)) for r, s in zip(rows, signals, strict=True)]
        return torch.cat(rows)

    def choose(
        self,
        signals: "Signals",
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
        ranks, together = self.engine.ranks, self.spread.scope == "global" and self.engine.ranks.size > 1
        samples: Samples | None = None
        try:
            if signals is None:
                raise RuntimeError("gated: a call of this window could not be read")
            samples = self.selector.samples(signals)
            if ranks.tensor_parallel:
                samples = ranks.share_samples(samples)
            forced = self._with_users(forced, samples)
            if together and samples.scores is not None:
                ignored = torch.zeros_like(samples.delight, dtype=torch.bool) if forced is None else forced
                check_finite(samples.scores.masked_fill(ignored, 0), samples.delight.masked_fill(ignored, 0))
        except Exception as error:
            if not together:
                raise
            ranks.announce(error)
            samples = None
        if not together:
            assert samples is not None and signals is not None
            decision = self.selector.choose(samples, forced, back)
            return decision, self.selector.kept_of(decision, signals), None
        found = signals or []
        all_ranks = world.decide(self.selector, samples, found, slots or [0] * len(found), forced, ranks)
        return all_ranks.decision, all_ranks.kept, all_ranks.counts

    def _with_users(self, forced: Tensor | None, samples: Samples) -> Tensor | None:
        if self.forced is None:
            return forced
        rows, self.forced = self.forced.to(samples.delight.device), None
        mine = forced_mask(rows, len(samples.delight))
        return mine if forced is None else mine | forced

    def _forget_constants(self, arrival: Arrival) -> None:
        """Drop the gradients of outputs without rows that have no graph, as one row shows: they are constants."""
        if self.engine.communicates:
            return  # one more pass, that other ranks might not make
        call = arrival.call
        outputs = [i for i in arrival.unsplit() if not call.makes_loss(i)]
        unknown = [i for i in outputs if call.paths[i] not in self._constants]
        if unknown:
            part = arrival.stand_in().whole() if call.whole else arrival.stand_in()
            with self._model_running():
                try:
                    graphs = have_graph(part, self.learned)
                except ReplayMismatchError:
                    return  # refused, then, as what has a graph and no rows
            self._constants.update({call.paths[i]: not graphs[i] for i in unknown})
        for i in outputs:
            if self._constants[call.paths[i]]:
                arrival.grads[i] = None

    def _probe_outputs(self, arrival: Arrival) -> OutputProbe | None:
        """How a call's outputs are made: once for each structure, one row is run with a graph to see."""
        if self.engine.communicates:
            return None  # one more pass, that other ranks might not make
        key = tuple(arrival.call.paths)
        if key not in self._probed:
            with self._model_running():
                replayed = passes.forward([arrival.stand_in()], self.learned)
            outputs = {i: output for r in replayed for i, output in r.all_outputs.items()}
            self._probed[key] = OutputProbe(
                {i for i, output in outputs.items() if output.requires_grad},
                {i for i, output in outputs.items() if output.requires_grad and selects_log_prob(output)},
                set(outputs),
            )
        return self._probed[key]

    def _warn_residual(self, residual: float) -> None:
        if residual > _RESIDUAL:
            self._warn(
                "residual",
                f"gated: the loss is far from a policy gradient: {residual:.0%} of its gradient at the model's output "
                "is something else (an entropy bonus, a KL term, a regression?). Delight was read off all of it; "
                "mark the log-prob with gate.logp(...) to read it off the policy term alone.",
            )

    def _warn_single(self, arrivals: list[Arrival]) -> None:
        """The first population is one row: a gate that keeps a share of the rows always keeps it."""
        config = self.selector.config
        always = config.price is None and not config.history and config.hard and config.deterministic
        if not always or config.unit == "token" or (self.spread.scope == "global" and self.engine.ranks.size > 1):
            return
        self._warn(
            "single",
            f"gated: a backward here is one row, {arrivals[0].call.described()}, and of one row the gate always keeps "
            "it: nothing is saved. Samples that are packed into one row, (1, total), are one to the gate: give each a "
            "row of its own, (B, T), padded; where a step is several backwards, window=N chooses among their rows.",
        )

    def find_graphs(self, call: Call) -> None:
        """Find out which of the tensors that a screen left in attributes have a graph."""
        with self._model_running():
            find_graphs(call, self.learned)

    @contextlib.contextmanager
    def _model_running(self) -> Iterator[None]:
        """While the gate runs the model itself. A forward may renormalise weights in place: that is no step."""
        self.running = True
        before = self.state.versions()
        try:
            with self.watcher.off():
                yield
        finally:
            self.running = False
            self.state.forgive(before)

    @contextlib.contextmanager
    def _replaying(self) -> Iterator[None]:
        """The same for the replay itself: an optimizer may step in its backward, and what a forward counts counts."""
        self.running = self.state.attributes.counts = True
        try:
            with self.watcher.off():
                yield
        finally:
            self.running = self.state.attributes.counts = False

    def _replay(
        self,
        arrivals: list[Arrival],
        slots: list[int],
        parts: list[Part | None],
        counts: Tensor | None,
        reduces: bool,
        back: Readback,
    ) -> list[Tensor | None]:
        """Run the kept rows again with a graph, check them, and run the backward through them."""
        engine, first = self.engine, arrivals[0]
        planned = passes.plan(arrivals, slots, parts, counts, engine, self.spread, self.learned)
        if counts is not None:
            self.stats.spread(world.imbalance(counts), world.imbalance(planned.counts))
        done: list[Replayed] = []
        if len(planned.groups) > 1 and self._steps_inside() and self._one_at_a_time(planned):
            raise RuntimeError(
                "gated: hooks step the optimizer inside of the backward, but the kept rows need several passes, and "
                "each would step it by its share. Leave micro_batch_size away, or step after the backward. Nothing was "
                "changed."
            )
        with self._replaying():
            if not self._one_at_a_time(planned):
                done = [r for group in planned.groups for r in passes.forward(group, self.learned, back)]
                back.read()
                done = passes.settled(done, self.learned)
                has_graph = [bool(r.outputs) for r in done]
                with passes.as_in_screen(done):
                    self._backward(first, done)
            else:
                has_graph = []
                # One pass at a time: a graph holds no more than one, and only the last reduces gradients.
                with self._taking_back(done):
                    for n, group in enumerate(planned.groups):
                        last = n == len(planned.groups) - 1
                        with engine.one_pass(reduces and last):
                            replayed = passes.forward_as_one_of_many(group, first, engine, self.learned, back)
                            with passes.as_in_screen(replayed):
                                self._backward(first, replayed)
                        has_graph += [bool(r.outputs) for r in replayed]
                        done += [r.summary() for r in replayed] if not last else replayed
        if not any(has_graph):
            self._raise_or_announce(RuntimeError(_NO_GRAPH))
        for call in {id(part.call): part.call for r in done for part in r.group}.values():
            if call.in_buffers:
                self._warn(
                    "buffer",
                    f"gated: the model's forward puts a tensor with a graph into its buffer {call.in_buffers[0]}. No "
                    "gradient goes through it: return the tensor, or keep it in an attribute that is no buffer.",
                )
            if call.left_behind:
                self._warn(
                    "attribute",
                    "gated: it was not known before the first replay that the model's forward leaves tensors with a "
                    f"graph in its attributes ({', '.join(call.left_behind)}). If this step's loss used them, it had "
                    "no gradient through them; from the next call on it has. Return them from forward to be sure.",
                )
        self.stats.replayed(sum(len(part) for r in done for part in r.group), 0)
        return input_grads(done[-1])

    @contextlib.contextmanager
    def _taking_back(self, done: list[Replayed]) -> Iterator[None]:
        """Around several passes: where one fails, the gradients that those before it, ``done``, made are gone, too."""
        parameters = list(self.state.parameters())
        without_grad = [p for p in parameters if p.grad is None]
        try:
            yield
        except Exception as error:
            if done and not self.engine.wrappers:
                for p in without_grad:
                    p.grad = None
                if len(without_grad) < len(parameters):
                    error.add_note("gated: earlier passes of this replay have added to the gradients: zero them.")
            raise

    def _one_at_a_time(self, planned: passes.Plan) -> bool:
        """Whether each pass has a backward of its own."""
        return bool(
            self.engine.wrappers or self.spread.micro_batch_size is not None or passes.share_draws(planned.groups)
        )

    def _raise_or_announce(self, error: Exception) -> None:
        if self.engine.ranks.alone:
            raise error
        self.engine.ranks.announce(error)

    def _backward(self, first: Arrival, replayed: list[Replayed]) -> None:
        """Into ``.grad``, or into what ``torch.autograd.grad`` asked for."""
        outputs = [output for r in replayed for output in r.outputs]
        grads = [grad for r in replayed for grad in r.grads]
        leaves = [leaf for r in replayed for leaf, _ in r.leaves]
        if outputs:
            self._to_parameters(outputs, grads, leaves, first.to_parameters)

    def _to_parameters(
        self,
        outputs: Sequence[Any],
        grads: Sequence[Tensor],
        leaves: list[Tensor],
        to_parameters: bool,
        retain_graph: bool | None = None,
    ) -> None:
        """A backward from ``outputs``, tensors or edges: to ``leaves`` and, where it wants these, the parameters."""
        if to_parameters and self._capture is None:
            only = None if self._only is None else [*self._only, *leaves]
            if retain_graph is None:
                self.engine.backward(outputs, grads, only)
            else:
                torch.autograd.backward(outputs, grads, retain_graph, inputs=only)
            return
        capture = self._capture or {}
        wanted = [p for p in self.state.parameters() if id(p) in capture and to_parameters]
        found = torch.autograd.grad(outputs, [*wanted, *leaves], grads, retain_graph, allow_unused=True)
        for leaf, grad in zip([*wanted, *leaves], found, strict=True):
            if id(leaf) not in capture:
                leaf.grad = grad
            elif grad is not None:
                held = capture[id(leaf)]
                capture[id(leaf)] = grad if held is None else held + grad


def _note_scale(decision: Decision, first: Arrival, back: Readback) -> None:
    """The loss's own scale of a population, as its first call has it."""
    scale = first.scale
    if not isinstance(scale, Tensor):
        decision.scale = scale
        return

    def note(found: list[float]) -> None:
        limits = torch.finfo(scale.dtype)
        decision.scale = found[0] if limits.tiny < found[0] < limits.max else 1 / first.call.batch

    back.ask([scale], note)


Signals = list[Signal] | None
