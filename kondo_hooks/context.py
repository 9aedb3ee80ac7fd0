"""``gated``: the one line, and the handle that it returns.

    batch -> screen -> (the user's loss) -> delight -> gate -> replay

Inside the context a call of the model is screened without a graph and becomes an autograd node. At the end
of the backward that reaches it, all calls of that backward form one population: delight is read, the gate
chooses, and the kept rows are replayed with a graph and drive the backward.
"""

import contextlib
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from kondo_hooks.attach import attach
from kondo_hooks.batch import Tree, flatten, infer_batch_size, map_tensors
from kondo_hooks.delight import DelightError
from kondo_hooks.node import Call, differentiable
from kondo_hooks.population import Arrival, find_scales, find_signal
from kondo_hooks.replay import Part, Replayed, input_grads, pack, replay, taking_draws
from kondo_hooks.screened import Screened
from kondo_hooks.selection import (
    Decision,
    Normalize,
    Reduction,
    SelectionConfig,
    Selector,
    Signal,
    Unit,
    Weight,
    additive,
)
from kondo_hooks.state import ModuleState
from kondo_hooks.watch import LossWatcher, find_loss_scales, observe_logp

Name = str | int | Callable[[Any], Tensor]

DEFAULT_RATE = 0.03
_RESIDUAL = 0.1
_active: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


class KondoWarning(UserWarning):
    """Something that the gate does, or cannot do, that the user should know of."""


@dataclass
class Stats:
    """What the gate has done since the context was made.

    Attributes:
        steps: decisions taken, and backwards that passed straight through.
        rows: samples seen (rows, or tokens when ``unit="token"``).
        kept: samples kept.
        forwarded: rows run with a graph. Above the kept rows where a whole batch had to be replayed.
        rows_screened: rows that ``forwarded`` is to be compared with.
        price: of the last decision, in advantage x nats.
        delight_kept: mean delight of all kept samples.
        delight_dropped: mean delight of all dropped samples.
    """

    steps: int = 0
    rows: int = 0
    kept: int = 0
    forwarded: int = 0
    rows_screened: int = 0
    price: float = float("nan")
    delight_kept: float = float("nan")
    delight_dropped: float = float("nan")

    @property
    def rate(self) -> float:
        """Effective rate: kept / seen."""
        return self.kept / self.rows if self.rows else float("nan")

    @property
    def skipped(self) -> float:
        """Fraction of rows that never built a graph."""
        return 1 - self.forwarded / self.rows_screened if self.rows_screened else float("nan")

    def __repr__(self) -> str:
        return (
            f"Stats(steps={self.steps}, rows={self.rows}, kept={self.kept} ({self.rate:.1%}), "
            f"forwarded={self.forwarded}, skipped={self.skipped:.1%}, price={self.price:.4g}, "
            f"delight_kept={self.delight_kept:.4g}, delight_dropped={self.delight_dropped:.4g})"
        )


class _Population:
    """The calls of one backward, until its end; goes with the backward if that fails."""

    def __init__(self) -> None:
        self.arrivals: list[Arrival] = []


class Gated:
    """A gate around a model. Made by :func:`gated`; use it as a context manager.

    Attributes:
        stats: counters, see :class:`Stats`.
        last: the last :class:`~kondo_hooks.selection.Decision`, or None. ``last.delight`` has one value a
            row of the population, in the order of the calls; ``last.kept`` holds row indices into it.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SelectionConfig,
        *,
        warmup_steps: int,
        enabled: bool,
        method: str | None,
        named: tuple[str, Name] | None,
        batch_dim: int,
    ):
        self.model = model
        self.stats = Stats()
        self.last: Decision | None = None
        self.enabled = enabled and os.environ.get("KONDO_DISABLE", "").lower() not in (
            "1",
            "true",
            "yes",
            "on",
        )
        self._selector = Selector(config)
        self._warmup_steps = warmup_steps
        self._method = method
        self._named = named
        self._batch_dim = batch_dim
        self._state = ModuleState(model)
        self._watcher = LossWatcher(self._backward_called)
        self._anchor = torch.zeros((), requires_grad=True)
        self._populations: weakref.WeakValueDictionary[int, _Population] = weakref.WeakValueDictionary()
        self._detach: Callable[[], bool] | None = None
        self._forced: Tensor | None = None
        self._capture: dict[int, Tensor | None] | None = None
        self._only: list[Tensor] | None = None
        self._screened: Screened | None = None
        self._hints: dict[tuple[str, ...], int] = {}
        self._record = True
        self._copy = False
        self._replaying = False
        self._ungated_task = -1
        self._calls = 0
        self._warned: set[str] = set()
        self._sums = [0.0, 0, 0.0, 0]

    # The context.

    def __enter__(self) -> "Gated":
        if not self.enabled:
            return self
        if self._detach is not None:
            raise RuntimeError("gated: this context is already open; call kondo.gated(...) again for another")
        mine = set(self.model.modules())
        for other in _active:
            if other in mine or any(module in mine and module is self.model for module in other.modules()):
                raise RuntimeError(
                    f"gated: {type(self.model).__name__} is already inside a gated context "
                    f"(of {type(other).__name__}); contexts may nest only around separate models"
                )
        _active.add(self.model)
        self._state = ModuleState(self.model)
        self._detach = attach(self.model, self._method, self._intercept)
        self._watcher.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if self._detach is None:
            return
        self._watcher.__exit__(kind, error, traceback)
        ours = self._detach()
        self._detach = None
        _active.discard(self.model)
        self._screened = None
        if kind is not None:
            return
        if not ours:
            raise RuntimeError(
                "gated: the model was compiled or patched inside the context, which took the gate off without "
                "a word; call model.compile() before the context"
            )
        if not self._calls:
            target = f"{type(self.model).__name__}.{self._method or '__call__'}"
            self._warn(
                "unused",
                f"gated: {target} was never called with grad inside the context, so nothing was gated. If the "
                "loop calls a wrapper (torch.compile, DDP) gate that; if it calls another method, name it "
                "with method=.",
            )

    def __repr__(self) -> str:
        config = self._selector.config
        by = f"price={config.price}" if config.rate is None else f"rate={config.rate}"
        state = "off" if not self.enabled else "open" if self._detach is not None else "closed"
        return f"Gated({type(self.model).__name__}, {by}, priority={config.priority!r}, {state}, {self.stats})"

    # What the user says of a batch.

    def screen(
        self,
        logp: Tensor | None = None,
        advantages: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        delight: Tensor | None = None,
    ) -> Decision:
        """Decide before the forward: the next call of the model runs the kept rows only, with a graph.

        Its outputs come back in full size, so the loss code still fits; dropped rows hold a copy of a kept
        row, without a graph, so their share of the loss's *value* means nothing.

        Args:
            logp: (B,) or (B, T) log-probs of the actions, from the sampler, say.
            advantages: (B,) or (B, T).
            mask: (B,) or (B, T), nonzero where a token counts.
            delight: (B,), or (B, T) with ``unit="token"``, instead of the three above.

        Returns:
            The decision. The units are exact here: advantage x nats.

        Raises:
            ValueError: on missing arguments, shapes that do not fit, NaN or infinity.
        """
        if (delight is None) == (logp is None or advantages is None):
            raise ValueError("screen: give logp and advantages (and mask), or delight alone")
        if self._screened is not None:
            raise RuntimeError("screen: called twice without a call of the model in between")
        if delight is None:
            assert logp is not None and advantages is not None
            signal = Signal.of(logp, advantages, mask)
        else:
            if mask is not None or logp is not None or advantages is not None:
                raise ValueError("screen: delight already holds logp, advantages and mask; give it alone")
            if self._selector.config.priority not in ("delight", "uniform"):
                raise ValueError("screen: this priority needs logp and advantages, not delight alone")
            delight = delight.detach()
            signal = Signal(delight, torch.ones_like(delight), torch.ones_like(delight, dtype=torch.bool))
        if self._passes_through() or not self.enabled:
            return Decision(signal.delight, torch.arange(len(signal.delight)), None, float("nan"), 1.0)
        decision, factors = self._decide([signal], 1.0)
        self._screened = Screened(factors[0])
        self._count(decision)
        return decision

    def logp(self, log_probs: Tensor) -> Tensor:
        """Mark the log-prob of the actions taken, (B,) or (B, T); returns it. First source of delight.

        Use it where the gate cannot see the policy (``Normal``, a compiled loss) or where the log-prob also
        stands in a KL term: marked inside the policy-gradient term alone, delight is that term's alone.
        """
        if self._detach is None or log_probs.grad_fn is None:
            return log_probs
        marked = log_probs.view_as(log_probs)
        if observe_logp(marked) is None and self._calls and not self._passes_through():
            raise DelightError(
                f"gate.logp: a tensor of shape {tuple(log_probs.shape)} could not be traced to the rows of a "
                "gated call; mark the (B,) or (B, T) log-probs, in the batch's order"
            )
        return marked

    def force(self, rows: Tensor) -> None:
        """Keep these samples of the next population, whatever their delight: a bool mask, or indices."""
        self._forced = rows.detach().flatten()

    def flush(self) -> int:
        """Decide and replay what waits now; returns how many calls that were.

        The end of every backward does it, so between backwards nothing waits.
        """
        waiting = [a for population in list(self._populations.values()) for a in population.arrivals]
        for population in list(self._populations.values()):
            self._settle(population)
        return len(waiting)

    def state_dict(self) -> dict[str, Any]:
        """History, generator and counters: a run that loads them takes the same decisions."""
        return {
            "selector": self._selector.state_dict(),
            "stats": dict(vars(self.stats)),
            "sums": list(self._sums),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        self._selector.load_state_dict(state["selector"])
        self.stats = Stats(**state["stats"])
        self._sums = list(state["sums"])

    # A call of the model.

    def _passes_through(self) -> bool:
        return self._selector.step < self._warmup_steps or self._selector.rate() == 1.0

    @_disable_dynamo
    def _intercept(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._watcher.off():
            if not torch.is_grad_enabled() or self._replaying:
                return original(*args, **kwargs)
            self._calls += 1
            if torch._C._are_functorch_transforms_active():
                raise RuntimeError("gated: torch.func transforms (grad, vmap) of a gated model are not supported")
            inputs = flatten((args, kwargs))[1]
            if not (self._state.trainable() or any(leaf.requires_grad for leaf in inputs)):
                return original(*args, **kwargs)
            if self._passes_through():
                return self._run_ungated(original, args, kwargs, inputs)
            if self._screened is not None:
                screened, self._screened = self._screened, None
                if (norm := self._state.mixes_batch()) is not None:
                    raise RuntimeError(
                        f"gated: after screen() the kept rows run alone, and {norm} in training mode would take "
                        "its statistics from them; put it in eval mode, or leave screen() away"
                    )
                result = screened.run(original, args, kwargs, self._batch_dim)
                self.stats.forwarded += screened.forwarded
                self.stats.rows_screened += len(screened.factors)
                return result
            return self._screen_call(original, args, kwargs)

    def _screen_call(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tree:
        call = Call(original, (args, kwargs), self._state, self._receive)
        result = call.screen(self._batch_dim, self._record, self._copy)
        if not call.outputs:
            return result
        # Recording costs time on every operation: it stops when a screen draws nothing, and comes back
        # when one does (that one is replayed whole).
        self._record = call.random
        self._check_outputs(call, result)
        live = call.attach_node(result, self._anchor)
        if self._named is not None:
            call.named = self._resolve(call, live)
        return live

    def _run_ungated(self, original: Any, args: Any, kwargs: Any, inputs: Sequence[Tensor]) -> Any:
        """Pass straight through; only count, when a backward comes."""
        result = original(*args, **kwargs)
        outputs = flatten(result)[1]
        batch = infer_batch_size(inputs, outputs, self._batch_dim)
        counted = -1

        def count(_grad: Tensor) -> None:
            nonlocal counted
            task = torch._C._current_graph_task_id()
            if task == counted:
                return
            counted, stats = task, self.stats
            stats.rows += batch
            stats.kept += batch
            stats.forwarded += batch
            stats.rows_screened += batch
            if task != self._ungated_task:
                self._ungated_task = task
                self._selector.step += 1
                stats.steps += 1

        for leaf in outputs:
            if leaf.requires_grad:
                leaf.register_hook(count)
        return result

    def _check_outputs(self, call: Call, result: Tree) -> None:
        hidden: list[str] = []

        def look(value: Any) -> None:
            inside = getattr(value, "__dict__", None)
            if inside and any(leaf.is_floating_point() for leaf in _tensors_within(inside, 3)):
                hidden.append(type(value).__name__)

        map_tensors(lambda _path, leaf: leaf, result, other=look)
        if hidden:
            self._warn(
                "hidden",
                f"gated: the model returned a {hidden[0]}, which holds tensors that the gate cannot reach into; they "
                "carry no gradient. (Training needs no KV cache: use_cache=False saves its memory.)",
            )
        if call.whole is not None:
            self._warn(
                "whole",
                f"gated: {call.whole}, so only a replay of the whole batch gives the exact gradient: this model "
                "trains correctly but saves nothing. Put such layers in eval mode where you can.",
            )

    def _resolve(self, call: Call, live: Tree) -> tuple[str, int]:
        """Which output ``logp=``, ``logits=`` or ``probs=`` names."""
        assert self._named is not None
        kind, name = self._named
        try:
            if callable(name):
                found = name(live)
            elif isinstance(name, int):
                found = live if isinstance(live, Tensor) and name == 0 else live[name]
            elif isinstance(live, Mapping):
                found = live[name]
            else:
                found = getattr(live, name)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"{kind}={name!r} names no output of {type(self.model).__name__}") from error
        leaves = [leaf for leaf in flatten(live)[1] if differentiable(leaf)]
        for i, leaf in enumerate(leaves):
            if leaf is found:
                return kind, i
        raise ValueError(f"{kind}={name!r} must name an output tensor of {type(self.model).__name__} itself")

    # A backward.

    def _backward_called(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stands in for ``Tensor.backward``, ``torch.autograd.backward`` and ``torch.autograd.grad``."""
        roots = args[0] if args else kwargs.get("tensors", kwargs.get("outputs"))
        roots = [roots] if isinstance(roots, Tensor) else list(roots)
        if len(roots) == 1 and roots[0].grad_fn is not None:
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
            mine = {id(p) for p in self._state.parameters()}
            self._only = [leaf for leaf in wanted if id(leaf) in mine]
            if not self._only:
                return func(*args, **kwargs)
            return func(*args, **{**kwargs, "inputs": [*wanted, self._anchor]})
        finally:
            self._only = None

    def _autograd_grad(self, outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """``torch.autograd.grad``, where the model's parameters hang on the node and not on the graph."""
        inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        mine = {id(p) for p in self._state.parameters()}
        wanted = [leaf for leaf in inputs if id(leaf) in mine]
        if not wanted:
            return torch.autograd.grad(outputs, inputs, *args, **kwargs)
        names = ("grad_outputs", "retain_graph", "create_graph", "only_inputs", "allow_unused")
        options = {**dict(zip(names, args, strict=False)), **kwargs}
        allow_unused = options.pop("allow_unused", None)
        zeros = options.pop("materialize_grads", False)
        self._capture = {id(leaf): None for leaf in wanted}
        try:
            grads = torch.autograd.grad(outputs, [*inputs, self._anchor], allow_unused=True, **options)[:-1]
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
    def _receive(self, call: Call, node: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The node's backward: wait for the end of the backward, or decide at once for an input's gradient."""
        arrival = Arrival(
            call,
            node,
            list(grads),
            torch._C._autograd._get_current_graph_task_keep_graph(),
            torch._C._will_engine_execute_node(node.next_functions[0][0]),
        )
        if call.decides_at_once:
            population = _Population()
            population.arrivals.append(arrival)
            return tuple(self._settle(population))
        if not arrival.to_parameters:
            return ()
        task = torch._C._current_graph_task_id()
        population = self._populations.get(task)
        if population is None:
            population = waiting = self._populations[task] = _Population()
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._settle(waiting))
        population.arrivals.append(arrival)
        return ()

    @_disable_dynamo
    def _settle(self, population: _Population) -> list[Tensor | None]:
        """Decide on a population and replay its kept rows; returns gradients for inputs that want one."""
        arrivals = sorted(population.arrivals, key=lambda a: a.call.serial)
        population.arrivals = []
        if not arrivals:
            return []
        before = self._selector.state_dict()
        try:
            for a in arrivals:
                a.check()
                if a.call.overwritten():
                    self._copy = True
                    with self._model_running():
                        a.call.screen_again()
            scales = find_scales(arrivals)
            tokens = self._selector.config.unit == "token"
            signals = [
                find_signal(a, scale, tokens, self._warn_residual) for a, scale in zip(arrivals, scales, strict=True)
            ]
            decision, factors = self._decide([s for s, _ in signals], scales[0], [a.overflowed() for a in arrivals])
            parts = [a.part(f, offset) for a, f, (_, offset) in zip(arrivals, factors, signals, strict=True)]
            chosen = [part for part in parts if part is not None] or [arrivals[0].silent_part()]
            inputs = self._replay(arrivals[0], [part.whole() if part.call.whole else part for part in chosen])
        except BaseException:
            self._selector.load_state_dict(before)
            raise
        self._count(decision)
        self.stats.rows_screened += sum(a.call.batch for a in arrivals)
        for a in arrivals:
            for observation in a.call.observations:
                observation.release()
            if not a.keep_graph:
                a.call.release()
        return inputs

    def _decide(
        self, signals: list[Signal], scale: float, overflowed: list[Tensor] | None = None
    ) -> tuple[Decision, list[Tensor]]:
        """Choose among all rows, or tokens, of a population; returns each call's factors, 0 where dropped."""
        config, selector = self._selector.config, self._selector
        tokens = config.unit == "token"

        def samples(signal: Signal, values: Tensor) -> Tensor:
            return values.reshape(-1) if tokens else signal.reduce(values, config.reduction)

        delight = torch.cat([samples(s, _wide(s.delight)) for s in signals])
        if config.priority == "uniform":
            score = selector.uniform(len(delight)).to(delight.device)
        else:
            score = torch.cat([samples(s, _wide(s.score(config.priority))) for s in signals])
        forced = self._forced_mask(len(delight), delight.device)
        if overflowed is not None and any(bool(rows.any()) for rows in overflowed):
            spread = (
                [
                    rows.repeat_interleave(len(samples(s, s.valid)) // len(rows))
                    for s, rows in zip(signals, overflowed, strict=True)
                ]
                if tokens
                else overflowed
            )
            forced = torch.cat(spread) if forced is None else forced | torch.cat(spread)
        valid = torch.cat([s.valid.reshape(-1) for s in signals]) if tokens else None
        if valid is None or valid.all():
            decision = selector(delight, score, forced)
        else:
            decision = _decide_valid(selector, delight, score, forced, valid)
        decision.scale = scale
        factors = delight.new_zeros(len(delight))
        factors[decision.kept] = 1 if decision.weights is None else decision.weights
        shapes = [s.valid.shape if tokens else s.valid.shape[:1] for s in signals]
        split = factors.split([shape.numel() for shape in shapes])
        return decision, [part.view(shape) for part, shape in zip(split, shapes, strict=True)]

    def _forced_mask(self, n: int, device: torch.device) -> Tensor | None:
        if self._forced is None:
            return None
        rows, self._forced = self._forced.to(device), None
        if rows.dtype == torch.bool:
            if len(rows) != n:
                raise ValueError(f"force: the mask has {len(rows)} entries, the population {n}")
            return rows
        if len(rows) and (rows.min() < 0 or rows.max() >= n):
            raise ValueError(f"force: row indices must be in [0, {n}), got {rows.tolist()}")
        mask = torch.zeros(n, dtype=torch.bool, device=device)
        mask[rows] = True
        return mask

    @contextlib.contextmanager
    def _model_running(self) -> Iterator[None]:
        self._replaying = True
        try:
            with self._watcher.off():
                yield
        finally:
            self._replaying = False

    def _replay(self, first: Arrival, parts: list[Part]) -> list[Tensor | None]:
        """Forward all parts with a graph and check them; only then run one backward through them."""
        with self._model_running():
            groups = pack(parts)
            replayed = [replay(group, self._hints) for group in groups]
            with taking_draws(parts):  # activation checkpointing draws again in the backward
                self._backward(first, replayed)
        self.stats.forwarded += sum(len(part.rows) for part in parts)
        return input_grads(first.call, parts[0], replayed[0])

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
        wanted = [p for p in self._state.parameters() if id(p) in capture and first.to_parameters]
        found = torch.autograd.grad(outputs, [*wanted, *leaves], grads, allow_unused=True)
        for leaf, grad in zip([*wanted, *leaves], found, strict=True):
            if id(leaf) not in capture:
                leaf.grad = grad
            elif grad is not None:
                held = capture[id(leaf)]
                capture[id(leaf)] = grad if held is None else held + grad

    def _count(self, decision: Decision) -> None:
        self.last = decision
        stats, delight = self.stats, decision.delight
        total, kept = torch.stack([delight.sum(), delight[decision.kept].sum()]).tolist()
        self._sums[0] += kept
        self._sums[1] += len(decision.kept)
        self._sums[2] += total - kept
        self._sums[3] += len(delight) - len(decision.kept)
        stats.steps += 1
        stats.rows += len(delight)
        stats.kept += len(decision.kept)
        stats.price = decision.price
        stats.delight_kept = self._sums[0] / max(self._sums[1], 1)
        stats.delight_dropped = self._sums[2] / max(self._sums[3], 1)

    def _warn_residual(self, residual: float) -> None:
        if residual > _RESIDUAL:
            self._warn(
                "residual",
                f"gated: the loss is far from a policy gradient: {residual:.0%} of its gradient at the model's output "
                "is something else (an entropy bonus, a KL term, a regression?). Delight was read off all of it; "
                "mark the log-prob with gate.logp(...) to read it off the policy term alone.",
            )

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, KondoWarning, stacklevel=3)


def _wide(values: Tensor) -> Tensor:
    """Half precision is too coarse to rank by."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _decide_valid(selector: Selector, delight: Tensor, score: Tensor, forced: Tensor | None, valid: Tensor) -> Decision:
    """Decide among the valid tokens only; indices are into all of them."""
    index = valid.nonzero().flatten()
    if not len(index):
        selector.step += 1
        return Decision(delight, index, None, float("nan"), 0.0)
    decision = selector(delight[index], score[index], None if forced is None else forced[index])
    decision.delight, decision.kept = delight, index[decision.kept]
    return decision


def _tensors_within(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth:
        if isinstance(value, dict):
            inside: Any = value.values()
        else:
            inside = (
                value
                if isinstance(value, (list, tuple))
                else vars(value).values()
                if hasattr(value, "__dict__")
                else ()
            )
        for item in inside:
            yield from _tensors_within(item, depth - 1)


def gated(
    model: nn.Module,
    rate: float | Callable[[int], float] | None = None,
    *,
    price: float | None = None,
    priority: str | additive = "delight",
    temperature: float = 0.1,
    hard: bool = True,
    deterministic: bool = True,
    unit: Unit = "sample",
    reduction: Reduction = "sum",
    history: int = 0,
    weight: Weight = "pg",
    unbiased: bool = False,
    normalize: Normalize = "batch",
    warmup_steps: int = 0,
    enabled: bool = True,
    seed: int = 0,
    method: str | None = None,
    logp: Name | None = None,
    logits: Name | None = None,
    probs: Name | None = None,
    batch_dim: int = 0,
) -> Gated:
    """Skip most backward passes of ``model`` in whatever training loop runs inside the context.

        with kondo.gated(model, rate=0.03) as gate:
            for batch in loader:
                loss = policy_loss(model(batch.obs), batch)
                loss.backward()
                optimizer.step(); optimizer.zero_grad()

    Each call of the model runs without a graph; the loss code runs as it is; every sample is scored by its
    delight, and the kept samples alone run again, with a graph. The gradient is exactly that of the same loss
    with the dropped samples' terms multiplied by zero, and with the user's own denominators. A dropped sample
    loses all of its terms, its value loss and entropy bonus too.

    Args:
        model: any ``nn.Module``; give the object that the loop calls.
        rate: fraction of samples to keep, in (0, 1], or a function of the step; 1.0 passes straight through.
            0.03 if neither ``rate`` nor ``price`` is given.
        price: keep samples of more delight than this, in advantage x nats, instead of a rate.
        priority, temperature, hard, deterministic, unit, reduction, history, weight, unbiased, normalize, seed:
            see :class:`SelectionConfig`.
        warmup_steps: backwards that pass straight through at first.
        enabled: False, or ``KONDO_DISABLE=1`` in the environment, makes the context do nothing.
        method: gate this method instead of the call, e.g. "get_action_and_value".
        logp, logits, probs: the output that holds the policy, where the gate cannot tell: a field name, an
            index, or a function of the model's output. At most one.
        batch_dim: axis of the inputs and outputs that holds the samples.

    Raises:
        ValueError, TypeError: on an argument that cannot be right, naming it.

    Source: Osband 2026, "Does This Gradient Spark Joy?", arXiv 2603.20526.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if rate is None and price is None:
        rate = DEFAULT_RATE
    config = SelectionConfig(
        rate=rate,
        price=price,
        priority=priority,
        temperature=temperature,
        hard=hard,
        deterministic=deterministic,
        unit=unit,
        reduction=reduction,
        history=history,
        weight=weight,
        unbiased=unbiased,
        normalize=normalize,
        seed=seed,
    )
    named = [(kind, name) for kind, name in (("logp", logp), ("logits", logits), ("probs", probs)) if name is not None]
    if len(named) > 1:
        raise ValueError("give at most one of logp, logits and probs")
    if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int) or warmup_steps < 0:
        raise ValueError(f"warmup_steps must be a number of backwards >= 0, got {warmup_steps!r}")
    if method is not None and not callable(getattr(model, method, None)):
        raise ValueError(f"method={method!r} is no method of {type(model).__name__}")
    if isinstance(batch_dim, bool) or not isinstance(batch_dim, int) or batch_dim < 0:
        raise ValueError(f"batch_dim must be an axis >= 0, got {batch_dim!r}")
    return Gated(
        model,
        config,
        warmup_steps=warmup_steps,
        enabled=enabled,
        method=method,
        named=named[0] if named else None,
        batch_dim=batch_dim,
    )
