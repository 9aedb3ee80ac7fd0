"""The context and the handle: what is attached, for how long, and what a user or a host can say of it.

    batch -> screen -> (the user's loss) -> delight -> gate -> replay

Inside the context a call of the model is screened without a graph and becomes an autograd node. At the end
of the backward that reaches it, all calls of that backward form one population: delight is read, the gate
chooses, and the kept rows are replayed with a graph and drive the backward.
"""

import os
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from kondo_hooks.core.attach import Method, attach, owner_of
from kondo_hooks.core.audit import Audit
from kondo_hooks.core.engine import Engine
from kondo_hooks.core.idle import Idle, moves
from kondo_hooks.core.prefix import MOST_PASSES
from kondo_hooks.core.screen import Forward, Reading
from kondo_hooks.core.step import AtOnce, Step
from kondo_hooks.delight.loss_code import observe_logp
from kondo_hooks.errors import DelightError, WarnOnce
from kondo_hooks.hosts import adopt, parts_of_rows
from kondo_hooks.ranks.engines import refuse_outer_wrapper
from kondo_hooks.report import report
from kondo_hooks.routes.screen_first import Screened
from kondo_hooks.routes.window import Size, Spread, Window
from kondo_hooks.rules.config import SelectionConfig
from kondo_hooks.rules.readback import Readback
from kondo_hooks.rules.samples import Decision, Kept, Signal
from kondo_hooks.rules.selection import Selector
from kondo_hooks.same.rounding import Checks
from kondo_hooks.same.state import ModuleState
from kondo_hooks.stats import Stats

_active: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


class Gated:
    """A gate around a model. Made by :func:`gated`; use it as a context manager.

    Attributes:
        model: what is gated.
        enabled: False if it was switched off, by argument or by the environment.

    Examples:
        >>> import torch, kondo_hooks as kondo
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> obs, actions, u = torch.randn(20, 8), torch.randint(0, 4, (20,)), torch.randn(20)
        >>> def loss(logits):
        ...     return -(logits.log_softmax(-1)[torch.arange(20), actions] * u).mean()
        >>> with kondo.gated(model, rate=0.1) as gate:
        ...     loss(model(obs)).backward()
        >>> gate.last.kept.shape, gate.stats.forwarded
        (torch.Size([2]), 2)
        >>> with gate:  # a gate may be entered again, and counts on
        ...     loss(model(obs)).backward()
        >>> gate.stats.steps
        2
    """

    def __init__(
        self,
        model: nn.Module,
        config: SelectionConfig,
        *,
        enabled: bool,
        method: Method | None,
        reading: Reading,
        unsaid: set[str],
        find_engine: Callable[[nn.Module], Engine],
        spread: Spread,
        checks: Checks,
        audit: int | None,
    ):
        self.model = model
        self.enabled = enabled and os.environ.get("KONDO_DISABLE", "").lower() not in ("1", "true", "yes", "on")
        self._method = method
        self._unsaid = unsaid
        self._warn = WarnOnce()
        self._find_engine = find_engine
        engine = find_engine(model)
        window = engine.window(spread.window)
        self._selector = Selector(config)
        self._step = Step(
            ModuleState(model),
            engine,
            self._selector,
            checks,
            Audit(model, audit),
            Idle(self._target(), self._warn),
            self._warn,
            _window(window),
            spread.micro_batch_size,
        )
        self._forward = Forward(model, self._step, reading, self._warn, self._refuse)
        self._selector.reseed(self._stream())
        self._detach: Callable[[], bool] | None = None
        self._entered = False
        self._unwatch: Callable[[], None] = self._watch_steps() if self.enabled else lambda: None
        self._close: list[Callable[[], None]] = []
        self._unadopt: Callable[[], None] = lambda: None

    @property
    def stats(self) -> Stats:
        """Counters of what was done so far."""
        shared = self._step.shared
        shared.stats.time(*shared.pace.seconds())
        return shared.stats

    @property
    def last(self) -> Decision | None:
        """The last decision: ``last.delight`` has one value a row of the population, in the order of the calls,
        and ``last.kept`` holds row indices into it. None before the first.
        """
        return self._step.last

    # The context.

    def _watch_steps(self) -> Callable[[], None]:
        """Until the context is entered: say so at a step of the model's optimizer. Returns what ends that."""
        handle = weakref.ref(self)

        def before_step(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
            gate = handle()
            if gate is not None and moves(optimizer, list(gate.model.parameters())):
                gate._warn("entered", gate._not_entered())

        return weakref.finalize(self, register_optimizer_step_pre_hook(before_step).remove)

    def _not_entered(self) -> str:
        return (
            f"gated: this gate around {type(self.model).__name__} was not entered, so it does nothing: write "
            "`with kondo.gated(...):` around the training loop."
        )

    def discard(self) -> "Gated":
        """Say that this gate is not meant to be entered; returns it. For hosts that only have its options checked."""
        self._entered = True
        self._unwatch()
        return self

    def __del__(self) -> None:
        if not getattr(self, "_entered", True) and self.enabled and not sys.is_finalizing():
            self._warn("entered", self._not_entered())

    def __enter__(self) -> "Gated":
        if not self.enabled:
            return self
        self._entered = True
        self._unwatch()
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
        self._step.shared.watcher.open()
        return self

    def _attach(self) -> None:
        _active.add(self.model)
        self._step.shared.state = self._state()
        self._step.checks.reruns = not self._step.shared.engine.communicates
        self._step.checks.types = self._step.shared.engine.types(self.model)
        self._detach = attach(self.model, self._method, self._forward.intercept)
        self._close = [
            self._step.shared.engine.open(self._step),
            register_optimizer_step_pre_hook(self._before_step).remove,
            register_optimizer_step_post_hook(self._after_step).remove,
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
        return ModuleState(self.model, self._step.shared.engine.swaps_parameters)

    def _refuse(self, model: nn.Module) -> None:
        """What cannot be gated and shows when the model is first called.

        Raises:
            ValueError, RuntimeError: naming what it is.
        """
        if not self._step.shared.engine.wrappers:
            refuse_outer_wrapper(model)
        if owner_of(model, self._method)[0] is model and (option := parts_of_rows()) is not None:
            raise RuntimeError(
                f"gated: by {option} each rank is given a part of every text, and the ranks meet inside of the model, "
                "so no rank can run some texts alone. Gate what is given whole texts, method=(object, 'name'), with "
                "tensor_parallel_group= the ranks that share them."
            )

    def _target(self) -> str:
        owner, name = owner_of(self.model, self._method)
        return f"{getattr(owner, '__name__', type(owner).__name__)}.{name or '__call__'}"

    def _stream(self) -> int:
        engine = self._step.shared.engine
        return 0 if engine.together else engine.ranks.rank

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Look for waiting backwards; a closure may still bring the last, so then after it."""
        if not (self._step.shared.watcher.asleep or any(callable(value) for value in (*args, *kwargs.values()))):
            self._check_step(optimizer)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Look for waiting backwards that a closure did not finish."""
        if not self._step.shared.watcher.asleep and any(callable(value) for value in (*args, *kwargs.values())):
            self._check_step(optimizer)

    def _check_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse to leave backwards waiting, or calls that none reached, if the optimizer is this model's."""
        parameters = [*self._step.shared.state.parameters(), *self.model.parameters()]
        if self._step.window.backwards and moves(optimizer, parameters):
            if self._step.window.size == "step":
                self._step.flush()
            else:
                self._step.check_step()
        self._step.shared.idle.check(optimizer, parameters)

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if self._detach is None:
            return
        if kind is None and self._step.window.size == "step":
            self._step.flush()
        self._step.shared.watcher.close()
        ours = self._take_off()
        self._unadopt()
        self._step.unhook()
        self._forward.screened = None
        waiting = self._step.window.backwards
        self._step.drop()
        if kind is not None:
            return
        self._step.shared.engine.ranks.raise_own()
        if waiting:
            raise RuntimeError(
                f"gated: the context ended while {waiting} of window={self._step.window.size!r} backwards waited "
                "for their decision; they are lost. Call gate.flush() before the end, or let window divide "
                "their number."
            )
        if not ours:
            raise RuntimeError(
                "gated: the model was compiled or patched inside the context, which took the gate off without "
                "a word; call model.compile() before the context"
            )
        if not self._forward.calls:
            self._warn(
                "unused",
                f"gated: {self._target()} was never called with grad inside the context, so nothing was gated. If the "
                "loop calls a wrapper (torch.compile, DDP) gate that; if it calls another method, name it "
                "with method=.",
            )

    def __repr__(self) -> str:
        state = "off" if not self.enabled else "open" if self._detach is not None else "closed"
        return f"Gated({type(self.model).__name__}, {self._selector.config.told()}, {state}, {self.stats})"

    def report(self) -> None:
        """Print what was saved and what it cost: rows, noise, seconds, and which rule would cost least.

        Examples:
            >>> import torch, kondo_hooks as kondo
            >>> _ = torch.manual_seed(0)
            >>> model = torch.nn.Linear(8, 4)
            >>> obs, actions, u = torch.randn(20, 8), torch.randint(0, 4, (20,)), torch.randn(20)
            >>> def loss(logits):
            ...     return -(logits.log_softmax(-1)[torch.arange(20), actions] * u).mean()
            >>> with kondo.gated(model, noise=0.5) as gate:
            ...     loss(model(obs)).backward()
            >>> gate.report()  # doctest: +ELLIPSIS
            kondo.gated, noise=0.5: 1 steps, 20 samples, ...
        """
        print(report(self._selector.config.told(), self.stats, self.last))

    # What a host says.

    def follow(self, model: nn.Module) -> None:
        """Gate ``model`` from now on: what a host has put around the gated one, or made of it.

        Backwards that still wait for their decision are dropped: a host wraps a model before it trains, or trains anew.

        Raises:
            ValueError: naming a kind of parallelism that cannot be gated.
        """
        if not self.enabled:
            return
        self._step.drop()
        engine = self._find_engine(model)
        window = engine.window(self._step.window.size)
        is_open = self._detach is not None
        if is_open:
            self._take_off()
        self.model = self._forward.model = model
        self._forward.calls = 0
        self._step.shared.engine = engine
        if window != self._step.window.size:
            self._step.respread(_window(window))
        if not self._selector.step:
            self._selector.reseed(self._stream())
        if is_open:
            self._attach()

    def host_defaults(self, *, window: Size, pairs: bool) -> None:
        """Options that the user left open, as the host knows them."""
        if "window" in self._unsaid:
            self._step.respread(_window(window))
        if "pairs" in self._unsaid and self._selector.config.unit == "sample":
            self._forward.pairs = pairs

    # What the user says of a batch.

    def preselect(
        self,
        logp: Tensor | None = None,
        advantages: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        delight: Tensor | None = None,
        norm: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Decision | None:
        """Decide before the forward: the next call of the model runs the kept rows only, with a graph.

        Its outputs come back in full size, so the loss code still fits; dropped rows hold a copy of a kept
        row, without a graph, so their share of the loss's *value* means nothing. Parameters that the loss code applies
        to them (a head outside of the model) must be given the kept rows alone, which is checked.

        Args:
            logp: (B,) or (B, T) log-probs of the actions, from the sampler, say; of packed rows, of each text.
            advantages: (B,) or (B, T), one for each row or each of its tokens.
            mask: (B,) or (B, T), nonzero where a token counts.
            delight: (B,), or (B, T) with ``unit="token"``. Give it instead of the three above.
            norm: (B,), or (B, T) with ``unit="token"``: how large each gradient is, for rules that draw by it. Give it
                instead of log-probs, from which it is ``|advantage| * sqrt(sum_t (1 - pi)^2)``: the norm at the logits
                but for what the other actions add.
            kept: (B,) the rows to keep as they were decided by :meth:`select`, instead of all of these: True or False,
                or the factors of a decision.

        Returns:
            The decision; None if it was ``kept``. The units are exact here: advantage x nats.

        Raises:
            ValueError: on missing arguments, shapes that do not fit, NaN or infinity.

        Examples:
            >>> import torch, kondo_hooks as kondo
            >>> _ = torch.manual_seed(0)
            >>> model = torch.nn.Linear(8, 4)
            >>> obs, actions, u = torch.randn(20, 8), torch.randint(0, 4, (20,)), torch.randn(20)
            >>> def loss(logits):
            ...     return -(logits.log_softmax(-1)[torch.arange(20), actions] * u).mean()
            >>> old = model(obs).detach().log_softmax(-1)[torch.arange(20), actions]
            >>> with kondo.gated(model, rate=0.1) as gate:
            ...     decision = gate.preselect(logp=old, advantages=u)
            ...     loss(model(obs)).backward()  # the model runs two rows
            >>> decision.kept.shape
            torch.Size([2])
        """
        if self._forward.pairs:
            raise ValueError("preselect: pairs=True is for rows that the gate screens itself; it takes single rows")
        if self._forward.screened is not None:
            raise RuntimeError("preselect: called twice without a call of the model in between")
        if kept is not None:
            if any(given is not None for given in (logp, advantages, mask, delight, norm)):
                raise ValueError("preselect: kept is decided already; give it alone")
            if not isinstance(kept, Tensor) or kept.dim() != 1:
                raise ValueError("preselect: kept must be a tensor of shape (B,), bool or factors")
            if self.enabled and not self._forward.passes_through():
                rows = kept.detach().nonzero().flatten()
                mine = Kept(rows, kept.detach()[rows] if kept.is_floating_point() else None)
                self._forward.screened = self._screen_rows(mine, torch.ones_like(kept, dtype=torch.bool))
            return None
        signal = self._signal("preselect", logp, advantages, mask, delight, norm)
        if self._forward.passes_through() or not self.enabled:
            return _everything(signal)
        try:
            decision, mine = self._select(signal)
        except Exception as error:
            ranks = self._step.shared.engine.ranks
            if self._step.shared.engine.together:
                raise
            ranks.fail(error)  # and keep nothing, until the others know
            nothing = torch.arange(0, device=signal.delight.device)
            self._forward.screened = self._screen_rows(Kept(nothing, None), signal.valid)
            return Decision(signal.delight, nothing, None, float("nan"), 0.0)
        self._forward.screened = self._screen_rows(mine, signal.valid)
        return decision

    screen = preselect  # its name until it was seen that it is the call that does not screen

    def select(
        self,
        logp: Tensor | None = None,
        advantages: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        delight: Tensor | None = None,
        norm: Tensor | None = None,
    ) -> Decision:
        """Decide on rows that the model will get in several calls: give each its share by ``preselect(kept=...)``.

        Arguments, units and errors are those of :meth:`preselect`.

        Examples:
            >>> import torch, kondo_hooks as kondo
            >>> _ = torch.manual_seed(0)
            >>> model = torch.nn.Linear(8, 4)
            >>> obs, actions, u = torch.randn(20, 8), torch.randint(0, 4, (20,)), torch.randn(20)
            >>> def loss(logits):
            ...     return -(logits.log_softmax(-1)[torch.arange(20), actions] * u).mean()
            >>> old = model(obs).detach().log_softmax(-1)[torch.arange(20), actions]
            >>> with kondo.gated(model, rate=0.1) as gate:
            ...     factors = gate.select(logp=old, advantages=u).factors()
            ...     for half in (slice(0, 10), slice(10, 20)):
            ...         _ = gate.preselect(kept=factors[half])
            ...         logp = model(obs[half]).log_softmax(-1)[torch.arange(10), actions[half]]
            ...         (-(logp * u[half]).sum() / 20).backward()
            >>> int((factors > 0).sum())
            2
        """
        signal = self._signal("select", logp, advantages, mask, delight, norm)
        if self._forward.passes_through() or not self.enabled:
            return _everything(signal)
        return self._select(signal)[0]

    def _select(self, signal: Signal) -> tuple[Decision, Kept]:
        back, before = Readback(), self._selector.state_dict()
        try:
            decision, (kept,), _ = self._step.choose([signal], back=back)
            back.read()
        except BaseException:
            self._selector.load_state_dict(before)
            raise
        decision.explain([signal])
        self._step.last = decision
        self._step.forget_told()
        self._step.shared.stats.decision(decision)
        return decision, kept

    def _screen_rows(self, kept: Kept, valid: Tensor) -> Screened:
        engine = self._step.shared.engine
        passes = 0
        if self._selector.config.unit == "prefix":
            passes = 1 if engine.wrappers else MOST_PASSES
        segments = self._step.shared.segments
        return Screened(len(valid), kept, valid, engine.communicates, self._forward.shared_loss, passes, segments)

    def _signal(
        self,
        name: str,
        logp: Tensor | None,
        advantages: Tensor | None,
        mask: Tensor | None,
        delight: Tensor | None,
        norm: Tensor | None,
    ) -> Signal:
        config = self._selector.config
        if config.rate == "auto":
            raise ValueError(
                f"{name}: rate='auto' weighs the kept rows against what the step costs anyway, and before the forward "
                "it costs nothing: give noise=, or a rate"
            )
        both = logp is not None and advantages is not None
        if [both, delight is not None, norm is not None].count(True) != 1:
            raise ValueError(f"{name}: give logp and advantages (and mask), or delight or norm alone")
        if logp is not None and advantages is not None:
            if config.is_lossless:
                raise ValueError(
                    f"{name}: rate='lossless' drops what has no gradient, which log-probs do not tell (a clipped ratio "
                    "has none, an entropy bonus has one): give norm=, 0 where you know of none, or use noise="
                )
            signal = Signal.of(logp, advantages, mask)
            signal.norm = signal.norm_at_logits(tokens=config.tokens)
            return signal
        kind, given = ("delight", delight) if norm is None else ("norm", norm)
        if mask is not None or logp is not None or advantages is not None:
            raise ValueError(f"{name}: {kind} already holds logp, advantages and mask; give it alone")
        by_norm = not config.needs_delight and config.priority != "uniform"
        by_delight = config.priority in ("delight", "uniform") and not by_norm and config.rule is None
        is_enough = by_delight if norm is None else by_norm or config.priority == "uniform"
        if not is_enough:
            rule = "rule" if config.weighs and config.priority == "delight" else "priority"
            raise ValueError(f"{name}: this {rule} needs logp and advantages, not {kind} alone")
        if not isinstance(given, Tensor) or given.dim() not in (1, 2):
            raise ValueError(f"{name}: {kind} must be a tensor of shape (B,), or (B, T)")
        given = given.detach() if given.is_floating_point() else given.float()
        every = torch.ones_like(given, dtype=torch.bool)
        if norm is None:
            return Signal(given, torch.ones_like(given), every)
        if config.unit == "sample" and given.dim() > 1:
            raise ValueError(f"{name}: norm must have one value a row, (B,), got {tuple(given.shape)}")
        nothing = torch.zeros_like(given)
        return Signal(nothing, nothing, every, norm=given)

    def logp(self, log_probs: Tensor) -> Tensor:
        """Mark the log-prob of the actions taken, (B,), (B, T) or jagged; returns it. First source of delight.

        Use it where the gate cannot see the policy (a density written out, a compiled loss) or where the log-prob also
        stands in a KL term: marked inside the policy-gradient term alone, delight is that term's alone.

        Examples:
            >>> import torch, kondo_hooks as kondo
            >>> _ = torch.manual_seed(0)
            >>> model = torch.nn.Linear(8, 4)
            >>> obs, actions, u = torch.randn(20, 8), torch.randint(0, 4, (20,)), torch.randn(20)
            >>> def loss(logits):
            ...     return -(logits.log_softmax(-1)[torch.arange(20), actions] * u).mean()
            >>> chosen = torch.nn.functional.one_hot(actions, 4)
            >>> with kondo.gated(model, rate=0.1) as gate:
            ...     log_probs = gate.logp((model(obs).log_softmax(-1) * chosen).sum(-1))
            ...     (-(log_probs * u).mean()).backward()
            >>> gate.stats.kept
            2
        """
        if self._detach is None or not torch.is_grad_enabled():
            return log_probs
        if log_probs.grad_fn is None:
            if self._forward.calls and not self._forward.passes_through():
                raise DelightError(
                    "gate.logp: these log-probs have no graph, so no loss of them trains the model. Were they "
                    "detached, or made under no_grad? Mark the log-probs that the loss is made of."
                )
            return log_probs
        if log_probs.is_nested:
            jagged: Any = log_probs
            values = self.logp(jagged.values())
            return torch.nested.nested_tensor_from_jagged(values, jagged.offsets(), jagged.lengths())
        marked = log_probs.view_as(log_probs)
        if observe_logp(marked, told=True) is None and self._forward.calls and not self._forward.passes_through():
            raise DelightError(
                f"gate.logp: a tensor of shape {tuple(log_probs.shape)} could not be traced to the rows of a "
                "gated call; mark the (B,) or (B, T) log-probs, in the batch's order"
            )
        return marked

    def force(self, rows: Tensor) -> None:
        """Keep these samples of the next population, whatever the rule says.

        Args:
            rows: a bool mask (N,), or indices.

        Examples:
            >>> import torch, kondo_hooks as kondo
            >>> _ = torch.manual_seed(0)
            >>> model = torch.nn.Linear(8, 4)
            >>> obs, actions, u = torch.randn(20, 8), torch.randint(0, 4, (20,)), torch.randn(20)
            >>> def loss(logits):
            ...     return -(logits.log_softmax(-1)[torch.arange(20), actions] * u).mean()
            >>> with kondo.gated(model, rate=0.1) as gate:
            ...     gate.force(torch.tensor([7]))
            ...     loss(model(obs)).backward()
            >>> 7 in gate.last.kept
            True
        """
        if not isinstance(rows, Tensor) or rows.is_floating_point() or rows.is_complex():
            raise ValueError("force: give a bool mask or integer indices, as a tensor")
        self._step.forced = rows.detach().flatten()

    def groups(self, ids: Tensor) -> None:
        """Say which prompt each row of the next population is an answer to, for rules that compare these.

        Args:
            ids: (N,) integers, alike for rows of one group.

        Examples:
            >>> import torch, kondo_hooks as kondo
            >>> _ = torch.manual_seed(0)
            >>> model = torch.nn.Linear(8, 4)
            >>> obs, actions, u = torch.randn(20, 8), torch.randint(0, 4, (20,)), torch.randn(20)
            >>> def loss(logits):
            ...     return -(logits.log_softmax(-1)[torch.arange(20), actions] * u).mean()
            >>> with kondo.gated(model, rule=kondo.rules.cppo(0.25)) as gate:
            ...     gate.groups(torch.arange(20) % 5)  # five prompts, four answers to each
            ...     loss(model(obs)).backward()
            >>> gate.stats.kept
            5
        """
        if not isinstance(ids, Tensor) or ids.dim() != 1 or ids.is_floating_point() or ids.is_complex():
            raise ValueError("groups: give one integer a row, as a tensor of shape (N,)")
        if self._selector.config.tokens:
            raise ValueError("groups are of rows: they need unit='sample'")
        self._selector.groups = ids.detach()

    def flush(self) -> int:
        """Decide and replay what waits now; returns how many calls that were.

        With ``window=1`` the end of every backward does it. On several ranks, all of them must call it.

        Examples:
            >>> import torch, kondo_hooks as kondo
            >>> _ = torch.manual_seed(0)
            >>> model = torch.nn.Linear(8, 4)
            >>> obs, actions, u = torch.randn(20, 8), torch.randint(0, 4, (20,)), torch.randn(20)
            >>> def loss(logits):
            ...     return -(logits.log_softmax(-1)[torch.arange(20), actions] * u).mean()
            >>> with kondo.gated(model, rate=0.1, window=4) as gate:
            ...     loss(model(obs)).backward()
            ...     loss(model(obs)).backward()
            ...     gate.flush()  # two backwards of four: decide now
            2
        """
        return self._step.flush()

    def state_dict(self) -> dict[str, Any]:
        """History, generator and counters: a run that loads them takes the same decisions.

        Examples:
            >>> import torch, kondo_hooks as kondo
            >>> _ = torch.manual_seed(0)
            >>> model = torch.nn.Linear(8, 4)
            >>> obs, actions, u = torch.randn(20, 8), torch.randint(0, 4, (20,)), torch.randn(20)
            >>> def loss(logits):
            ...     return -(logits.log_softmax(-1)[torch.arange(20), actions] * u).mean()
            >>> with kondo.gated(model, noise=0.5) as gate:
            ...     loss(model(obs)).backward()
            >>> resumed = kondo.gated(model, noise=0.5).discard()
            >>> resumed.load_state_dict(gate.state_dict())
            >>> resumed.stats.steps
            1
        """
        return {"selector": self._selector.state_dict(), "stats": dict(vars(self.stats))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned: history, generator and counters."""
        self._selector.load_state_dict(state["selector"])
        self._step.shared.stats = Stats(**state["stats"])


def _everything(signal: Signal) -> Decision:
    return Decision(
        signal.delight, torch.arange(len(signal.delight), device=signal.delight.device), None, float("nan"), 1.0
    )


def _window(size: Size) -> AtOnce:
    return AtOnce() if size == 1 else Window(size)
