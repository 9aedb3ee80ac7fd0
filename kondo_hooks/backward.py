"""What happens in a backward: calls arrive, are decided on as one population, and their kept rows are replayed."""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from kondo_hooks.batch import Layout
from kondo_hooks.errors import WarnOnce
from kondo_hooks.node import Call
from kondo_hooks.population import Arrival, find_scales, find_signal, overflow_mask
from kondo_hooks.replay import AmbiguousRowsError, Part, Replayed, input_grads, pack, replay, taking_draws
from kondo_hooks.selection import Decision, Selector, Signal, forced_mask
from kondo_hooks.state import ModuleState
from kondo_hooks.stats import Stats
from kondo_hooks.trace import find_loss_scales, selects_log_prob
from kondo_hooks.watch import LossWatcher

_RESIDUAL = 0.1


class _Population:
    """The calls of one backward, until its end; goes with the backward if that fails."""

    def __init__(self) -> None:
        self.arrivals: list[Arrival] = []


class Backward:
    """The backward side of a gate.

    Attributes:
        state: the model's.
        selector: decides.
        stats: counts.
        last: the last decision.
        forced: rows of the next population that are kept whatever their delight.
        anchor: the leaf that every node hangs on, so that a backward reaches it.
        watcher: sees the loss code and every call of a backward.
        copy_outputs: whether the user's code has been seen to write into outputs.
        running: whether the model runs in a replay.
        learned: by their paths, where inputs keep their rows, as it was found by replaying.
    """

    def __init__(self, state: ModuleState, selector: Selector, warn: WarnOnce):
        self.state = state
        self.selector = selector
        self.stats = Stats()
        self.last: Decision | None = None
        self.forced: Tensor | None = None
        self.anchor = torch.zeros((), requires_grad=True)
        self.watcher = LossWatcher(self._called)
        self.copy_outputs = False
        self.running = False
        self._warn = warn
        self._populations: weakref.WeakValueDictionary[int, _Population] = weakref.WeakValueDictionary()
        self.learned: dict[tuple[str, ...], Layout] = {}
        self._capture: dict[int, Tensor | None] | None = None
        self._only: list[Tensor] | None = None
        self._selected: dict[str, bool] = {}

    def flush(self) -> int:
        """Settle every population that waits; returns how many calls that were."""
        populations = list(self._populations.values())
        waiting = sum(len(population.arrivals) for population in populations)
        for population in populations:
            self._settle(population)
        return waiting

    def _called(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stands in for ``Tensor.backward``, ``torch.autograd.backward`` and ``torch.autograd.grad``."""
        roots: Any = args[0] if args else kwargs.get("tensors", kwargs.get("outputs"))
        roots = [roots] if isinstance(roots, Tensor) else list(roots)
        if len(roots) == 1 and isinstance(roots[0], Tensor) and roots[0].grad_fn is not None:
            gradient = args[1] if func is torch.Tensor.backward and len(args) > 1 else kwargs.get("gradient")
            factor = float(gradient.abs().mean()) if isinstance(gradient, Tensor) else 1.0
            find_loss_scales(roots[0].grad_fn, factor)
        try:
            if func is torch.autograd.grad:
                return self._autograd_grad(*args, **kwargs)
            wanted = kwargs.get("inputs")
            if wanted is None:
                return func(*args, **kwargs)
            wanted = [wanted] if isinstance(wanted, Tensor) else list(wanted)
            mine = {id(p) for p in self.state.parameters()}
            self._only = [leaf for leaf in wanted if id(leaf) in mine]
            if not self._only:
                return func(*args, **kwargs)
            return func(*args, **{**kwargs, "inputs": [*wanted, self.anchor]})
        finally:
            self._only = None

    def _autograd_grad(self, outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """``torch.autograd.grad``, where the model's parameters hang on the node and not on the graph."""
        inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        mine = {id(p) for p in self.state.parameters()}
        wanted = [leaf for leaf in inputs if id(leaf) in mine]
        if not wanted:
            return torch.autograd.grad(outputs, inputs, *args, **kwargs)
        names = ("grad_outputs", "retain_graph", "create_graph", "only_inputs", "allow_unused")
        options = {**dict(zip(names, args, strict=False)), **kwargs}
        allow_unused = options.pop("allow_unused", None)
        zeros = options.pop("materialize_grads", False)
        self._capture = {id(leaf): None for leaf in wanted}
        try:
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
        arrival = Arrival(
            call,
            node,
            list(grads),
            torch._C._autograd._get_current_graph_task_keep_graph(),
            torch._C._current_graph_task_id(),
            torch._C._will_engine_execute_node(node.next_functions[0][0]),
        )
        if call.decides_at_once:
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

    def _end(self, population: _Population) -> None:
        self._settle(population)

    @_disable_dynamo
    def _settle(self, population: _Population) -> list[Tensor | None]:
        """Decide on a population and replay its kept rows; returns gradients for inputs that want one."""
        arrivals = sorted(population.arrivals, key=lambda a: a.call.serial)
        population.arrivals = []
        if not arrivals:
            return []
        before = self.selector.state_dict()
        try:
            for a in arrivals:
                a.check()
                if a.call.overwritten():
                    self.copy_outputs = True
                    with self._model_running():
                        a.call.screen_again()
            scales = find_scales(arrivals)
            tokens = self.selector.config.unit == "token"
            signals = [
                find_signal(a, scale, tokens, self._is_selected, self._warn_residual)
                for a, scale in zip(arrivals, scales, strict=True)
            ]
            forced = overflow_mask(arrivals, [s for s, _ in signals], tokens)
            decision, factors = self.decide([s for s, _ in signals], forced)
            decision.scale = scales[0]
            parts = [a.part(f, offset) for a, f, (_, offset) in zip(arrivals, factors, signals, strict=True)]
            chosen = [part for part in parts if part is not None] or [arrivals[0].silent_part()]
            chosen = [part.whole() if part.call.whole else part for part in chosen]
            inputs = self._replay(arrivals[0], chosen)
        except BaseException:
            self.selector.load_state_dict(before)
            raise
        self.last = decision
        self.stats.decision(decision)
        self.stats.replayed(0, sum(a.call.batch for a in arrivals))
        for a in arrivals:
            for observation in a.call.observations:
                observation.release()
            if not a.keep_graph:
                a.call.release()
        return inputs

    def decide(self, signals: list[Signal], forced: Tensor | None = None) -> tuple[Decision, list[Tensor]]:
        """Choose; ``forced`` rows, and those that the user forced, are kept."""
        if self.forced is not None:
            tokens = self.selector.config.unit == "token"
            n = sum(s.valid.numel() if tokens else len(s.valid) for s in signals)
            rows, self.forced = self.forced.to(signals[0].valid.device), None
            mine = forced_mask(rows, n)
            forced = mine if forced is None else mine | forced
        return self.selector.decide(signals, forced)

    def _is_selected(self, arrival: Arrival) -> bool:
        """Whether the output that the loss used was picked from log-probs: one row is run with a graph to see."""
        key = arrival.call.paths[0]
        if key not in self._selected:
            with self._model_running():
                outputs = [output for r in self._forward([arrival.silent_part()]) for output in r.outputs]
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

    def _replay(self, first: Arrival, parts: list[Part]) -> list[Tensor | None]:
        """Forward all parts with a graph and check them; only then run one backward through them."""
        with self._model_running():
            groups = pack(parts)
            if _share_draws(parts):
                # Checkpointing repeats draws in the backward by the generator's state alone: one group at a time.
                replayed = []
                for group in groups:
                    replayed += (done := self._forward(group))
                    with taking_draws(group):
                        self._backward(first, done)
            else:
                replayed = [r for group in groups for r in self._forward(group)]
                with taking_draws(parts):
                    self._backward(first, replayed)
        for call in {id(part.call): part.call for part in parts}.values():
            if call.left_behind:
                self._warn(
                    "attribute",
                    f"gated: the model's forward leaves tensors with a graph in its attributes "
                    f"({', '.join(call.left_behind)}). A loss that uses them gets no gradient through them; return "
                    "them from forward instead.",
                )
        forwarded = sum(len(part.rows) for r in replayed for part in r.group)
        self.stats.replayed(forwarded, 0)
        return input_grads(replayed[0])

    def _forward(self, group: list[Part]) -> list[Replayed]:
        try:
            return [replay(group, self.learned)]
        except AmbiguousRowsError:
            return [replay([part.whole()], self.learned) for part in group]

    def _backward(self, first: Arrival, replayed: list[Replayed]) -> None:
        """Into ``.grad``, or into what ``torch.autograd.grad`` asked for."""
        outputs = [output for r in replayed for output in r.outputs]
        grads = [grad for r in replayed for grad in r.grads]
        leaves = [leaf for r in replayed for leaf, _ in r.leaves]
        if not outputs:
            return
        if first.to_parameters and self._capture is None:
            only = None if self._only is None else [*self._only, *leaves]
            torch.autograd.backward(outputs, grads, inputs=only)
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


def _share_draws(parts: list[Part]) -> bool:
    """Whether two calls drew from the same state of a generator: the user had seeded it alike."""
    keys = [key for part in parts for key in part.call.draws.shapes]
    return len(set(keys)) < len(keys)
