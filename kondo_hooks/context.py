"""``gated``: the one line, and the handle that it returns.

    batch -> screen -> (the user's loss) -> delight -> gate -> replay

Inside the context a call of the model is screened without a graph and becomes an autograd node. At the end
of the backward that reaches it, all calls of that backward form one population: delight is read, the gate
chooses, and the kept rows are replayed with a graph and drive the backward.
"""

import dataclasses
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kondo_hooks.attach import attach
from kondo_hooks.backward import Backward
from kondo_hooks.batch import Rows, Tree, flatten, infer_batch_size, map_tensors
from kondo_hooks.engines import Engine, find_engine, refuse_outer_wrapper
from kondo_hooks.errors import DelightError, WarnOnce
from kondo_hooks.hosts import adopt
from kondo_hooks.inner_loss import Tape
from kondo_hooks.node import Call
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
from kondo_hooks.state import ModuleState, forked_rng
from kondo_hooks.stats import Stats
from kondo_hooks.trace import find_sources
from kondo_hooks.watch import observe_logp
from kondo_hooks.window import Size, Spread

Name = str | int | Callable[[Any], Tensor]

DEFAULT_RATE = 0.03
_active: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


class Gated:
    """A gate around a model. Made by :func:`gated`; use it as a context manager.

    Attributes:
        model: what is gated.
        enabled: False if it was switched off, by argument or by the environment.
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
        pairs: bool,
        shared_loss: bool,
        unsaid: set[str],
        find_engine: Callable[[nn.Module], Engine],
        spread: Spread,
    ):
        self.model = model
        self.enabled = enabled and os.environ.get("KONDO_DISABLE", "").lower() not in ("1", "true", "yes", "on")
        self._warmup_steps = warmup_steps
        self._method = method
        self._named = named
        self._batch_dim = batch_dim
        self._pairs = pairs
        self._unsaid = unsaid
        self._shared_loss = shared_loss
        self._warn = WarnOnce()
        self._find_engine = find_engine
        self._spread = spread
        self._engine = find_engine(model)
        self._engine.check_window(self._spread.window)
        self._selector = Selector(config, self._stream())
        self._backward = Backward(self._state(), self._engine, self._spread, self._selector, self._warn)
        self._detach: Callable[[], bool] | None = None
        self._close: list[Callable[[], None]] = []
        self._unadopt: Callable[[], None] = lambda: None
        self._screened: Screened | None = None
        self._outputs_learned: dict[str, Rows] = {}
        self._record = True
        self._tape = True
        self._learned_tape = False
        self._calls = 0
        self._ungated_task = -1

    @property
    def stats(self) -> Stats:
        """Counters of what was done so far."""
        return self._backward.stats

    @property
    def last(self) -> Decision | None:
        """The last decision: ``last.delight`` has one value a row of the population, in the order of the calls,
        and ``last.kept`` holds row indices into it. None before the first.
        """
        return self._backward.last

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
        self._unadopt = adopt(self)
        self._attach()
        self._backward.watcher.__enter__()
        return self

    def _attach(self) -> None:
        _active.add(self.model)
        self._backward.state = self._state()
        self._detach = attach(self.model, self._method, self._intercept)
        self._close = [
            self._engine.open(self._backward),
            register_optimizer_step_pre_hook(self._before_step).remove,
        ]

    def _take_off(self) -> bool:
        assert self._detach is not None
        ours = self._detach()
        self._detach = None
        for close in self._close:
            close()
        _active.discard(self.model)
        return ours

    def _state(self) -> ModuleState:
        return ModuleState(self.model, self._engine.swaps_parameters)

    def _stream(self) -> int:
        return self._engine.ranks.rank if self._spread.scope == "local" else 0

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Look for waiting backwards if the optimizer is this model's; a closure may still bring the last."""
        if self._backward.window.backwards and not any(callable(value) for value in (*args, *kwargs.values())):
            mine = {id(p) for p in (*self._backward.state.parameters(), *self.model.parameters())}
            if any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
                self._backward.check_step()

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if self._detach is None:
            return
        self._backward.watcher.take_off()
        ours = self._take_off()
        self._unadopt()
        self._backward.unhook()
        self._screened = None
        waiting = self._backward.window.backwards
        self._backward.window.take()
        if kind is not None:
            return
        self._engine.ranks.raise_own()
        if waiting:
            raise RuntimeError(
                f"gated: the context ended while {waiting} of window={self._backward.spread.window!r} backwards waited "
                "for their decision; they are lost. Call gate.flush() before the end, or let window divide "
                "their number."
            )
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

    # What a host says.

    def follow(self, model: nn.Module) -> None:
        """Gate ``model`` from now on: what a host has put around the gated one, or made of it.

        Raises:
            ValueError: naming a kind of parallelism that cannot be gated.
        """
        if not self.enabled:
            return
        if self._backward.window.backwards:
            raise RuntimeError("gated: follow() while backwards wait for their decision; call gate.flush() first")
        engine = self._find_engine(model)
        engine.check_window(self._spread.window)
        is_open = self._detach is not None
        if is_open:
            self._take_off()
        self.model, self._engine = model, engine
        self._calls = 0
        self._backward.engine = engine
        if not self._selector.step:
            self._selector.reseed(self._stream())
        if is_open:
            self._attach()

    def host_defaults(self, *, window: Size, pairs: bool) -> None:
        """Options that the user left open, as the host knows them."""
        if "window" in self._unsaid:
            self._spread = dataclasses.replace(self._spread, window=window)
            self._backward.respread(self._spread)
        if "pairs" in self._unsaid and self._selector.config.unit == "sample":
            self._pairs = pairs

    # What the user says of a batch.

    def screen(
        self,
        logp: Tensor | None = None,
        advantages: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        delight: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Decision | None:
        """Decide before the forward: the next call of the model runs the kept rows only, with a graph.

        Its outputs come back in full size, so the loss code still fits; dropped rows hold a copy of a kept
        row, without a graph, so their share of the loss's *value* means nothing.

        Args:
            logp: (B,) or (B, T) log-probs of the actions, from the sampler, say.
            advantages: (B,) or (B, T).
            mask: (B,) or (B, T), nonzero where a token counts.
            delight: (B,), or (B, T) with ``unit="token"``, instead of the three above.
            kept: (B,) the rows to keep as they were decided by :meth:`select`, instead of all of these: True or False,
                or the factors of a decision.

        Returns:
            The decision; None if it was ``kept``. The units are exact here: advantage x nats.

        Raises:
            ValueError: on missing arguments, shapes that do not fit, NaN or infinity.
        """
        if self._screened is not None:
            raise RuntimeError("screen: called twice without a call of the model in between")
        if kept is not None:
            if any(given is not None for given in (logp, advantages, mask, delight)):
                raise ValueError("screen: kept is decided already; give it alone")
            if not isinstance(kept, Tensor) or kept.dim() != 1:
                raise ValueError("screen: kept must be a tensor of shape (B,), bool or factors")
            if self.enabled and not self._passes_through():
                factors = kept.detach().float()
                self._screened = self._screen_rows(factors, torch.ones_like(factors, dtype=torch.bool))
            return None
        signal = self._signal("screen", logp, advantages, mask, delight)
        if self._passes_through() or not self.enabled:
            return _everything(signal)
        try:
            decision, factors = self._select(signal)
        except Exception as error:
            ranks = self._engine.ranks
            if ranks.alone or self._spread.scope == "global":
                raise
            ranks.announce(error)  # and keep nothing, until the others know
            self._screened = self._screen_rows(torch.zeros(len(signal.delight)), signal.valid)
            return Decision(signal.delight, torch.arange(0), None, float("nan"), 0.0)
        self._screened = self._screen_rows(factors, signal.valid)
        return decision

    def select(
        self,
        logp: Tensor | None = None,
        advantages: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        delight: Tensor | None = None,
    ) -> Decision:
        """Decide on rows that the model will get in several calls: give each its share by ``screen(kept=...)``.

        Arguments, units and errors are those of :meth:`screen`.
        """
        signal = self._signal("select", logp, advantages, mask, delight)
        if self._passes_through() or not self.enabled:
            return _everything(signal)
        return self._select(signal)[0]

    def _select(self, signal: Signal) -> tuple[Decision, Tensor]:
        decision, factors, _ = self._backward.choose([signal])
        self._backward.last = decision
        self.stats.decision(decision)
        return decision, factors[0]

    def _screen_rows(self, factors: Tensor, valid: Tensor) -> Screened:
        return Screened(factors, valid, self._engine.communicates, self._shared_loss)

    def _signal(
        self, name: str, logp: Tensor | None, advantages: Tensor | None, mask: Tensor | None, delight: Tensor | None
    ) -> Signal:
        if (delight is None) == (logp is None or advantages is None):
            raise ValueError(f"{name}: give logp and advantages (and mask), or delight alone")
        if delight is None:
            assert logp is not None and advantages is not None
            return Signal.of(logp, advantages, mask)
        if mask is not None or logp is not None or advantages is not None:
            raise ValueError(f"{name}: delight already holds logp, advantages and mask; give it alone")
        if self._selector.config.priority not in ("delight", "uniform"):
            raise ValueError(f"{name}: this priority needs logp and advantages, not delight alone")
        if not isinstance(delight, Tensor) or delight.dim() not in (1, 2):
            raise ValueError(f"{name}: delight must be a tensor of shape (B,), or (B, T)")
        delight = delight.detach()
        return Signal(delight, torch.ones_like(delight), torch.ones_like(delight, dtype=torch.bool))

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
        if not isinstance(rows, Tensor) or rows.is_floating_point() or rows.is_complex():
            raise ValueError("force: give a bool mask or integer indices, as a tensor")
        self._backward.forced = rows.detach().flatten()

    def flush(self) -> int:
        """Decide and replay what waits now; returns how many calls that were.

        With ``window=1`` the end of every backward does it. On several ranks, all of them must call it.
        """
        return self._backward.flush()

    def state_dict(self) -> dict[str, Any]:
        """History, generator and counters: a run that loads them takes the same decisions."""
        return {"selector": self._selector.state_dict(), "stats": dict(vars(self.stats))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        self._selector.load_state_dict(state["selector"])
        self._backward.stats = Stats(**state["stats"])

    # A call of the model.

    def _passes_through(self) -> bool:
        return self._selector.step < self._warmup_steps or self._selector.rate() == 1.0

    @_disable_dynamo
    def _intercept(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._backward.watcher.off():
            result, call, outputs = self._call(original, args, kwargs)
        # The steps of the model's own loss are loss code: they run watched.
        return result if call is None or call.inner is None else call.with_losses(result, outputs)

    def _call(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tree, Call | None, Sequence[Tensor]]:
        """What the model returned and, where the call was screened, its record and the node's outputs."""
        if not torch.is_grad_enabled() or self._backward.running:
            return original(*args, **kwargs), None, ()
        self._calls += 1
        if self._calls == 1 and not self._engine.wrappers:
            refuse_outer_wrapper(self.model)
        inputs = flatten((args, kwargs))[1]
        if not (self._backward.state.trainable() or any(leaf.requires_grad for leaf in inputs)):
            return original(*args, **kwargs), None, ()
        if self._passes_through():
            return self._run_ungated(original, args, kwargs, inputs), None, ()
        self._check_call()
        call = Call(
            original, (args, kwargs), self._backward.state, self._backward.receive, self._pairs, self._shared_loss
        )
        if self._screened is not None:
            return self._run_screened(call), None, ()
        return self._screen_call(call)

    def _run_screened(self, call: Call) -> Tree:
        assert self._screened is not None
        screened, self._screened = self._screened, None
        if (norm := self._backward.state.mixes_batch()) is not None:
            raise RuntimeError(
                f"gated: after screen() the kept rows run alone, and {norm} in training mode would take "
                "its statistics from them; put it in eval mode, or leave screen() away"
            )
        result = screened.run(call, self._batch_dim, self._backward.learned, self._outputs_learned)
        self._backward.ran_first(screened.hooks)
        self.stats.replayed(screened.forwarded, len(screened.factors))
        return result

    def _check_call(self) -> None:
        """Refuse what would take gradients past the parameters that the replay reaches."""
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError("gated: torch.func transforms (grad, vmap) of a gated model are not supported")
        if not self._backward.state.same_parameters():
            raise RuntimeError(
                "gated: parameters or submodules of the model were replaced inside the context (functional_call, an "
                "adapter put in?), which the replay would not see; do it before the context"
            )
        if parametrize._cache_enabled:
            raise RuntimeError(
                "gated: parametrize.cached() would keep the screen's weights, which have no graph; use it inside the "
                "model's forward, or leave it away"
            )

    def _screen_call(self, call: Call) -> tuple[Tree, Call | None, Sequence[Tensor]]:
        call.syncs = self._engine.syncs()
        copy = self._backward.copy_outputs
        result = call.screen(self._batch_dim, self._record, copy, Tape() if self._tape else None)
        returns_loss = any(leaf.dim() == 0 and leaf.is_floating_point() for leaf in flatten(result)[1])
        if returns_loss and not self._tape:
            with forked_rng(call.rng), call.buffers.restored():
                result = call.screen(self._batch_dim, self._record, copy, Tape())
        if not self._learned_tape or returns_loss:
            self._tape, self._learned_tape = returns_loss, True
        if not call.outputs:
            return result, None, ()
        # Recording costs time on every operation: it stops when a screen draws nothing, and comes back
        # when one does (that one is replayed whole).
        self._record = call.random
        self._check_outputs(call, result)
        if any(self._descends(leaf) for leaf in call.inputs if leaf.requires_grad):
            self._warn(
                "chain",
                "gated: an output of this model goes into another call of it with its gradient (a recurrent state?). "
                "Each call then chooses its own rows, and a row dropped in one call passes nothing back through it. "
                "Put the whole sequence into one call (method=), or detach what is carried over.",
            )
        live, outputs = call.attach_node(result, self._backward.anchor)
        if self._named is not None:
            call.named = self._resolve(call, live)
        return live, call, outputs

    def _run_ungated(self, original: Any, args: Any, kwargs: Any, inputs: Sequence[Tensor]) -> Any:
        """Pass straight through; only count, when a backward comes."""
        result = original(*args, **kwargs)
        outputs = flatten(result)[1]
        try:
            batch = infer_batch_size(inputs, outputs, self._batch_dim)
        except ValueError:
            batch = 0
        counted = -1

        def count(_grad: Tensor) -> None:
            nonlocal counted
            task = torch._C._current_graph_task_id()
            if task != counted:
                counted = task
                self.stats.ungated(batch)
            if task != self._ungated_task:
                self._ungated_task = task
                self._selector.step += 1
                self.stats.steps += 1

        for leaf in outputs:
            if leaf.grad_fn is not None:
                leaf.register_hook(count)
        return result

    def _descends(self, leaf: Tensor) -> bool:
        sources = find_sources(leaf, trust=True) or []
        return any(source.call.state is self._backward.state for source in sources)

    def _check_outputs(self, call: Call, result: Tree) -> None:
        hidden: list[str] = []

        def look(value: Any) -> None:
            inside = getattr(value, "__dict__", None)
            if type(value).__module__ == "transformers.cache_utils":
                return  # every decoder returns one, and training uses none
            if inside and any(leaf.is_floating_point() for leaf in _tensors_within(inside, 3)):
                hidden.append(type(value).__name__)

        map_tensors(lambda _path, leaf: leaf, result, other=look)
        if hidden:
            self._warn(
                "hidden",
                f"gated: the model returned a {hidden[0]}, which holds tensors that the gate cannot reach into; they "
                "carry no gradient. (Training needs no KV cache: use_cache=False saves its memory.)",
            )
        if self._backward.state.has_forward_hooks():
            self._warn(
                "hooks",
                "gated: the model has forward hooks. They run without a graph when the batch is screened and again on "
                "the kept rows; a loss on what they capture gets no gradient through it: return it from forward.",
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
        for i, leaf in enumerate(call.outputs_in(live)):
            if leaf is found:
                return kind, i
        raise ValueError(f"{kind}={name!r} must name an output tensor of {type(self.model).__name__} itself")


def _everything(signal: Signal) -> Decision:
    return Decision(signal.delight, torch.arange(len(signal.delight)), None, float("nan"), 1.0)


def _tensors_within(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    inside: Any = ()
    if isinstance(value, dict):
        inside = value.values()
    elif isinstance(value, (list, tuple)):
        inside = value
    elif hasattr(value, "__dict__"):
        inside = vars(value).values()
    for item in inside if depth else ():
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
    pairs: bool | None = None,
    shared_loss: Literal["refuse", "kept"] = "refuse",
    window: Size | None = None,
    scope: Literal["local", "global"] = "local",
    balance: bool = False,
    micro_batch_size: int | None = None,
    tensor_parallel_group: Any = None,
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
        pairs: row i and the row half a batch below it are one sample, kept or dropped as one: chosen and rejected
            answers, as DPO concatenates them. By default so in TRL's ``DPOTrainer``, and nowhere else.
        shared_loss: what to do with a term of a loss computed inside the model that is no sum over rows (a router's
            balancing loss): "refuse" it, or take it on the "kept" rows alone, which is another term.
        window: how many backwards form one population, whose kept rows are replayed together at the end of the last:
            3% of 8 rows is no row, 3% of 8 backwards of 32 is 8. "auto" takes the host's gradient accumulation
            (accelerate, DeepSpeed, ``no_sync``), and is the default inside of a transformers Trainer; elsewhere it is
            1. What has not been decided when the optimizer steps is an error.
        scope: "local", each rank chooses among its own rows, or "global", among the rows of all ranks as one batch.
        balance: with ``scope="global"``, move kept rows between ranks so that each replays as many, within one.
        micro_batch_size: most rows in one pass of the replay; by default all kept rows are one pass.
        tensor_parallel_group: process group of the ranks that see the same rows as this one; they share its decisions.

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
    if method is not None and not (isinstance(method, str) and callable(getattr(model, method, None))):
        raise ValueError(f"method={method!r} is no method of {type(model).__name__}")
    if isinstance(batch_dim, bool) or not isinstance(batch_dim, int) or batch_dim < 0:
        raise ValueError(f"batch_dim must be an axis >= 0, got {batch_dim!r}")
    if pairs is not None and not isinstance(pairs, bool):
        raise ValueError(f"pairs must be True or False, got {pairs!r}")
    if pairs and unit == "token":
        raise ValueError("pairs are kept or dropped as one: they need unit='sample'")
    if shared_loss not in ("refuse", "kept"):
        raise ValueError(f"shared_loss must be 'refuse' or 'kept', got {shared_loss!r}")
    if shared_loss == "kept" and balance:
        raise ValueError("shared_loss='kept' takes a term on each rank's own kept rows, which balance=True moves away")
    spread = Spread(1 if window is None else window, scope, balance, micro_batch_size)
    return Gated(
        model,
        config,
        find_engine=lambda found: find_engine(found, tensor_parallel_group, scope == "global"),
        spread=spread,
        warmup_steps=warmup_steps,
        enabled=enabled,
        method=method,
        named=named[0] if named else None,
        batch_dim=batch_dim,
        pairs=bool(pairs),
        unsaid={name for name, value in (("pairs", pairs), ("window", window)) if value is None},
        shared_loss=shared_loss == "kept",
    )
