"""What happens in a backward: calls arrive, wait until their window is full, are decided on as one population, and
their kept rows are replayed."""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from kondo_hooks import passes, world
from kondo_hooks.audit import Audit
from kondo_hooks.batch import Layout
from kondo_hooks.engines import Engine
from kondo_hooks.errors import DelightError, WarnOnce
from kondo_hooks.idle import Idle
from kondo_hooks.node import Call
from kondo_hooks.parts import Part
from kondo_hooks.population import Arrival, find_scales, find_signal
from kondo_hooks.replay import Replayed, have_graph, input_grads
from kondo_hooks.rounding import Checks
from kondo_hooks.selection import Decision, Samples, Selector, Signal, check_finite, forced_mask
from kondo_hooks.state import ModuleState
from kondo_hooks.stats import Stats
from kondo_hooks.trace import find_loss_scales, reaches, selects_log_prob
from kondo_hooks.verify import name_of
from kondo_hooks.watch import LossWatcher
from kondo_hooks.window import Spread, Window, gone

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
        learned: by their paths, where inputs keep their rows, as it was found by replaying.
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
        self._warn = warn
        self._populations: weakref.WeakValueDictionary[int, _Population] = weakref.WeakValueDictionary()
        self._ended: list[_Population] | None = None
        self._hooks: list[Any] = []
        self._screened_first = False
        self.learned: dict[tuple[str, ...], Layout] = {}
        self._capture: dict[int, Tensor | None] | None = None
        self._only: list[Tensor] | None = None
        self._selected: dict[str, bool] = {}
        self._constants: dict[str, bool] = {}

    def flush(self) -> int:
        """Decide on what waits and replay it; returns how many calls that were."""
        populations = list(self._populations.values())
        waiting = sum(len(population.arrivals) for population in populations) + len(self.window.arrivals)
        for population in populations:
            self._settle(population)
        if self.window.arrivals:
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
        if func is not torch.autograd.grad:
            self._refuse_half_a_step(roots)
        if len(roots) == 1 and isinstance(roots[0], Tensor) and roots[0].grad_fn is not None:
            gradient = args[1] if func is torch.Tensor.backward and len(args) > 1 else kwargs.get("gradient")
            factor = float(gradient.abs().mean()) if isinstance(gradient, Tensor) else 1.0
            find_loss_scales(roots[0].grad_fn, factor)
        try:
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
        finally:
            self._only = None

    def _steps_inside(self) -> list[torch.nn.Parameter]:
        """The parameters that an optimizer may step as soon as their gradient is there."""
        if self.engine.wrappers:
            return []  # the hooks are the engine's
        return [p for p in self.state.parameters() if p._post_accumulate_grad_hooks]

    def _refuse_half_a_step(self, roots: Sequence[Any]) -> None:
        """Refuse a loss that reaches such a parameter past the gate, before anything is stepped."""
        if stepped := {id(p): p for p in self._steps_inside()}:
            for loss in roots:
                for leaf in reaches(loss)[1]:
                    if id(leaf) in stepped:
                        raise RuntimeError(
                            f"gated: hooks step the optimizer inside of the backward, and the loss uses "
                            f"{self.state.name_of(stepped[id(leaf)])} itself beside the gated outputs (a penalty on "
                            "parameters?): it would be stepped twice, by half of its gradient each. Put weight decay "
                            "into the optimizer, or step after the backward. Nothing was changed."
                        )

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
            self.engine.ranks.raise_failures()

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
        arrival = Arrival(
            call,
            node,
            list(grads),
            torch._C._autograd._get_current_graph_task_keep_graph(),
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
        arrival.check()
        call = arrival.call
        rows = torch.arange(call.batch, device=call.outputs[0].device)
        return self._replay([arrival], [0], [Part.of(call, rows, arrival.grads)], None, reduces=False)

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
        try:
            self._read(arrivals)
        except Exception as error:
            if ranks.alone:
                raise
            ranks.announce(error)
        try:
            self._look(arrivals)
        except Exception as error:
            if ranks.alone:
                raise
            ranks.announce(error)
        self.window.add(arrivals)
        if self.window.is_full(self.engine.ends_accumulation(arrivals[-1].call)):
            return self._finish()
        if self.forced is None:
            together = ranks.size if self.spread.scope == "global" else 1
            self.window.compact(self.selector, together, self.learned, self.engine.communicates)
        self.stats.waiting_bytes = max(self.stats.waiting_bytes, self.window.nbytes())
        return []

    def _read(self, arrivals: list[Arrival]) -> None:
        """Find each call's signal."""
        for a in arrivals:
            if a.unsplit():
                self._forget_constants(a)
            a.check()
            if a.call.overwritten():
                self.copy_outputs = True
                with self._model_running():
                    a.call.screen_again()
        tokens = self.selector.config.unit == "token"
        unread: list[tuple[Arrival, DelightError]] = []
        for a, scale in zip(arrivals, find_scales(arrivals), strict=True):
            a.scale = scale
            a.forced = a.overflowed()
            try:
                a.signal, a.offset = find_signal(a, scale, tokens, self._is_selected, self._warn_residual)
                a.call.policy = a.policy()
            except DelightError as error:
                unread.append((a, error))
            self._warn_critic(a)
            for observation in a.call.observations:
                observation.release()
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
        if unbiased or self._warn.given("critic"):
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

    def _finish(self) -> list[Tensor | None]:
        """Decide on the window's calls and replay their kept rows; returns gradients for inputs that want one."""
        arrivals = self.window.take()
        ranks, engine = self.engine.ranks, self.engine
        reduces = engine.reduces(arrivals[-1].call)
        before = self.selector.state_dict()
        try:
            decision: Decision | None = None
            parts: list[Part | None] = [None] * len(arrivals)
            slots = passes.find_slots(arrivals)
            counts: Tensor | None = None
            try:
                decision, parts, counts = self._decide(arrivals, slots)
                decision.scale = arrivals[0].scale
            except Exception as error:
                if ranks.alone or self.spread.scope == "global":
                    raise
                ranks.announce(error)
            inputs = self._replay(arrivals, slots, parts, counts, reduces)
            if counts is not None and not engine.wrappers:
                ranks.meet()  # no reduction of gradients comes after which all ranks could look
            if reduces:
                ranks.raise_failures()
        except BaseException:
            self.selector.load_state_dict(before)
            raise
        if decision is None or ranks.failed:
            return inputs
        self.last = decision
        self.stats.decision(decision)
        self.stats.replayed(0, sum(a.call.batch for a in arrivals))
        for a in arrivals:
            if not a.keep_graph:
                a.call.release()
        return inputs

    def _decide(self, arrivals: list[Arrival], slots: list[int]) -> tuple[Decision, list[Part | None], Tensor | None]:
        """The decision, each call's kept rows, and with all ranks as one batch how many each rank keeps."""
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
        decision, chosen, counts = self.choose(found, forced, of_leaders)
        by_leader = {id(a): f for a, f in zip(leaders, chosen, strict=True)}
        factors = [by_leader[id(a.follows or a)] for a in arrivals]
        for a, f in zip(arrivals, factors, strict=True):
            if a.held is None:
                continue
            rows = f if f.dim() == 1 else f.ne(0).any(1)
            if (missing := gone(a, rows != 0)).any():
                f[missing] = 0
                self._warn(
                    "window",
                    "gated: a window ended with more rows than its first backwards let expect, so fewer rows than rate "
                    "are kept: rows that could have been chosen were no longer held.",
                )
        return decision, [a.part(f) for a, f in zip(arrivals, factors, strict=True)], counts

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
        self, signals: "Signals", forced: Tensor | None = None, slots: list[int] | None = None
    ) -> tuple[Decision, list[Tensor], Tensor | None]:
        """Choose; ``forced`` rows, and those that the user forced, are kept.

        Args:
            signals: of each call; None if this rank failed to read them.
            forced: (N,) samples.
            slots: which of the structures that ranks have in common each call has.
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
            decision = self.selector.choose(samples, forced)
            return decision, self.selector.split(decision.factors(), signals), None
        found = signals or []
        all_ranks = world.decide(
            self.selector, samples, found, slots or [0] * len(found), forced, ranks, self._device(found)
        )
        return all_ranks.decision, all_ranks.factors, all_ranks.counts

    def _device(self, signals: list[Signal]) -> torch.device:
        return signals[0].valid.device if signals else self.state.device()

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
        unknown = [i for i in arrival.unsplit() if arrival.call.paths[i] not in self._constants]
        if unknown:
            with self._model_running():
                graphs = have_graph(arrival.stand_in(), self.learned)
            self._constants.update({arrival.call.paths[i]: not graphs[i] for i in unknown})
        for i in arrival.unsplit():
            if self._constants[arrival.call.paths[i]]:
                arrival.grads[i] = None

    def _is_selected(self, arrival: Arrival) -> bool:
        """Whether the output that the loss used was picked from log-probs: one row is run with a graph to see."""
        if self.engine.communicates:
            return False  # one more pass, that other ranks might not make
        key = arrival.call.paths[0]
        if key not in self._selected:
            with self._model_running():
                outputs = [o for r in passes.forward([arrival.stand_in()], self.learned) for o in r.outputs]
            self._selected[key] = len(outputs) == 1 and selects_log_prob(outputs[0])
        return self._selected[key]

    def _warn_residual(self, residual: float) -> None:
        if residual > _RESIDUAL:
            self._warn(
                "residual",
                f"gated: the loss is far from a policy gradient: {residual:.0%} of its gradient at the model's output "
                "is something else (an entropy bonus, a KL term, a regression?). Delight was read off all of it; "
                "mark the log-prob with gate.logp(...) to read it off the policy term alone.",
            )

    @contextlib.contextmanager
    def _model_running(self) -> Iterator[None]:
        self.running = True
        try:
            with self.watcher.off():
                yield
        finally:
            self.running = False

    def _replay(
        self,
        arrivals: list[Arrival],
        slots: list[int],
        parts: list[Part | None],
        counts: Tensor | None,
        reduces: bool,
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
        with self._model_running():
            if not self._one_at_a_time(planned):
                done = [r for group in planned.groups for r in passes.forward(group, self.learned)]
                has_graph = [bool(r.outputs) for r in done]
                with passes.as_in_screen(done):
                    self._backward(first, done)
            else:
                has_graph = []
                # One pass at a time: a graph holds no more than one, and only the last reduces gradients.
                for n, group in enumerate(planned.groups):
                    last = n == len(planned.groups) - 1
                    with engine.one_pass(reduces and last):
                        replayed = passes.forward_as_one_of_many(group, first, engine, self.learned)
                        with passes.as_in_screen(replayed):
                            self._backward(first, replayed)
                    has_graph += [bool(r.outputs) for r in replayed]
                    done += [r.summary() for r in replayed] if not last else replayed
        if not any(has_graph):
            self._raise_or_announce(RuntimeError(_NO_GRAPH))
        for call in {id(part.call): part.call for r in done for part in r.group}.values():
            if call.left_behind:
                self._warn(
                    "attribute",
                    f"gated: the model's forward leaves tensors with a graph in its attributes "
                    f"({', '.join(call.left_behind)}). A loss that uses them gets no gradient through them; return "
                    "them from forward instead.",
                )
        self.stats.replayed(sum(len(part) for r in done for part in r.group), 0)
        return input_grads(done[-1])

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
        if not outputs:
            return
        if first.to_parameters and self._capture is None:
            only = None if self._only is None else [*self._only, *leaves]
            self.engine.backward(outputs, grads, only)
            return
        capture = self._capture or {}
        wanted = [p for p in self.state.parameters() if id(p) in capture and first.to_parameters]
        found = torch.autograd.grad(outputs, [*wanted, *leaves], grads, allow_unused=True)
        for leaf, grad in zip([*wanted, *leaves], found, strict=True):
            if id(leaf) not in capture:
                leaf.grad = grad
            elif grad is not None:
                held = capture[id(leaf)]
                capture[id(leaf)] = grad if held is None else held + grad


Signals = list[Signal] | None
