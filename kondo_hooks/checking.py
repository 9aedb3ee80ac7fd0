"""``check``: what a gate would do with a model, before anything is trained."""

import contextlib
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kondo_hooks.api import gated
from kondo_hooks.core.arrival import Arrival
from kondo_hooks.core.attach import owner_of
from kondo_hooks.core.kept_rows import Part, reading
from kondo_hooks.core.readings import Learned, run_rows
from kondo_hooks.errors import KondoWarning
from kondo_hooks.handle import Gated
from kondo_hooks.report import duration
from kondo_hooks.rows.tree import flatten
from kondo_hooks.rules.draw import bounded_noise, cheapest, fixed_share, inclusion, second_moment
from kondo_hooks.rules.samples import Rows
from kondo_hooks.same.state import ModuleState

Loss = Callable[[Any], Tensor]
_ROUNDS = 3
_OF_THE_RULE = (
    *("rate", "price", "noise", "rule", "priority", "groups", "temperature", "hard", "deterministic", "unit"),
    *("reduction", "history", "weight", "unbiased", "normalize", "warmup_steps", "window", "enabled"),
)


@dataclass(frozen=True)
class Way:
    """A rule, and what a step by it takes.

    Attributes:
        name: the rule, as a user writes it.
        kept: the share of the rows that it keeps.
        seconds: what a step takes.
        seconds_first: what a step takes that is decided before the forward; NaN where it cannot be.
        noise: what the rule adds to the gradient's second moment at the outputs, relative to it; NaN where the rule is
            not fair.

    Examples:
        >>> import torch, kondo_hooks as kondo
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> obs, actions, u = torch.randn(20, 8), torch.randint(0, 4, (20,)), torch.randn(20)
        >>> def loss(logits):
        ...     return -(logits.log_softmax(-1)[torch.arange(20), actions] * u).mean()
        >>> found = kondo.check(model, obs, loss=loss)
        >>> found.ways[0].name, found.ways[0].kept
        ('no gate', 1.0)
    """

    name: str
    kept: float
    seconds: float
    seconds_first: float
    noise: float


@dataclass
class Checked:
    """What :func:`check` has found. Its ``str`` says it in plain words.

    Attributes:
        model: the model's name.
        problem: why the model cannot be gated as it is; None if it can.
        told: the warnings that a first step would give.
        rows: how many rows the batch has.
        inputs: each tensor that the model was given: its name, its shape, and the axis of its rows (None if they share
            it).
        outputs: each tensor that the loss uses, likewise.
        whole: why all rows are replayed whenever one is kept; None if the kept ones alone are.
        kernel_noise: how far rows of each output come out otherwise in a smaller batch, relative to its largest value.
        policy: whether the loss shows a policy. Rules by delight, advantage or surprisal need one.
        seconds: what a step takes without a gate.
        seconds_screen: what a forward takes without a graph.
        seconds_fixed: what a gated step takes that keeps no row, its screen included.
        seconds_row: what one replayed row takes.
        ways: the rules, and what they would take.
        stands_in: whether no loss was given, so that rows were taken to matter alike.

    Examples:
        >>> import torch, kondo_hooks as kondo
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> obs, actions, u = torch.randn(20, 8), torch.randint(0, 4, (20,)), torch.randn(20)
        >>> def loss(logits):
        ...     return -(logits.log_softmax(-1)[torch.arange(20), actions] * u).mean()
        >>> found = kondo.check(model, obs, loss=loss)
        >>> found.inputs, found.outputs
        ([('args[0]', (20, 8), 0)], [('the output', (20, 4), 0)])
        >>> print(found)  # doctest: +ELLIPSIS
        kondo.check, Linear
          20 rows
        ...
    """

    model: str
    problem: str | None = None
    told: list[str] = field(default_factory=list)
    rows: int = 0
    inputs: list[tuple[str, tuple[int, ...], int | None]] = field(default_factory=list)
    outputs: list[tuple[str, tuple[int, ...], int | None]] = field(default_factory=list)
    whole: str | None = None
    kernel_noise: dict[str, float] = field(default_factory=dict)
    policy: bool = False
    seconds: float = float("nan")
    seconds_screen: float = float("nan")
    seconds_fixed: float = float("nan")
    seconds_row: float = float("nan")
    ways: list[Way] = field(default_factory=list)
    stands_in: bool = False

    @property
    def best(self) -> Way | None:
        """The fair rule of the fewest seconds times noise; None if that is no gate."""
        fair = [way for way in self.ways if way.noise == way.noise]
        best = min(fair, key=lambda way: way.seconds * (1 + way.noise), default=None)
        return best if best is not None and best.seconds * (1 + best.noise) < self.seconds else None

    def __str__(self) -> str:
        return "\n".join(self._lines())

    __repr__ = __str__

    def _lines(self) -> Iterator[str]:
        yield f"kondo.check, {self.model}"
        if self.problem is not None:
            yield f"  cannot be gated as it is: {self.problem}"
        if self.rows:
            yield f"  {self.rows} rows"
        inputs = [(f"input {name}", shape, axis) for name, shape, axis in self.inputs]
        for name, shape, axis in (*inputs, *self.outputs):
            yield f"  {name} {shape}: " + ("shared by all rows" if axis is None else f"rows on axis {axis}")
        if self.whole is not None:
            yield f"  all rows are replayed whenever one is kept: {self.whole}"
        for name, apart in self.kernel_noise.items():
            told = "exactly the same" if apart == 0 else f"within {apart:.1e} of its largest value"
            yield f"  {name}: some rows alone come out {told}"
        yield from (f"  would be told: {message}" for message in self.told)
        if self.problem is not None or not self.ways:
            return
        if not self.policy:
            yield "  no policy was seen in this loss: rules by delight, advantage and surprisal need one"
        yield (
            f"  a step takes {duration(self.seconds)} without a gate, a screen {duration(self.seconds_screen)}; a "
            f"gated step {duration(self.seconds_fixed)} and {duration(self.seconds_row)} for each kept row"
        )
        if self.stands_in:
            yield "  no loss= was given: all rows are taken to matter alike, and what drawing them saves is least"
        columns = f"{'kept':>6} {'seconds':>9} {'noise':>6} {'seconds x noise':>16} {'before the forward':>19}"
        yield f"  {'rule':<34} {columns}"
        for way in self.ways:
            fair = way.noise == way.noise
            product = f"{way.seconds * (1 + way.noise) / self.seconds:.2f}" if fair else "not fair"
            first = f"{way.seconds_first / self.seconds:.2f}" if way.seconds_first == way.seconds_first else "-"
            noise = f"{way.noise:.2f}" if fair else ""
            share = f"{way.seconds / self.seconds:.2f}"
            yield f"  {way.name:<34} {way.kept:>6.0%} {share:>9} {noise:>6} {product:>16} {first:>19}"
        yield f"  least seconds x noise: {'no gate' if self.best is None else self.best.name}"


def check(
    model: nn.Module, *inputs: Any, loss: Loss | None = None, options: dict[str, Any] | None = None, **named: Any
) -> Checked:
    """Try a gate on one batch, and say what it would do and save. Nothing of the model changes.

        print(kondo.check(model, obs, loss=lambda out: policy_loss(out, batch)))

    The model runs about twenty times. Gradients, buffers and random numbers are as before, and what the forward puts
    into attributes; what it writes into a tensor of its own in place, or a hook that steps an optimizer, is not undone.

    Args:
        model: as the loop calls it, before an engine wraps it.
        *inputs, **named: a batch, as the model is called with it.
        loss: from what the model returns to the loss; by default a loss that the model returns, else one to which all
            rows matter alike: it tells everything but which rows could be left out.
        options: arguments of :func:`gated`, such as ``method``, ``batch_dim`` or ``unit``; those that say how many rows
            are kept do not matter.

    Raises:
        ValueError: for a model that DDP, FSDP or DeepSpeed wraps.
        Exception: what the model or the loss raises by itself, without a gate.

    Examples:
        >>> import torch, kondo_hooks as kondo
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> obs, actions, u = torch.randn(20, 8), torch.randint(0, 4, (20,)), torch.randn(20)
        >>> def loss(logits):
        ...     return -(logits.log_softmax(-1)[torch.arange(20), actions] * u).mean()
        >>> found = kondo.check(model, obs, loss=loss)
        >>> found.problem is None, found.rows, found.policy
        (True, 20, True)
    """
    told = {name: value for name, value in (options or {}).items() if name not in _OF_THE_RULE}
    method = told.get("method")
    name = owner_of(model, method)[1]
    found = Checked(type(model).__name__ + (f".{name}" if name else ""))
    gates = {kept: gated(model, rule=_first(kept), **told).discard() for kept in (1.0, 0.125, 0.5)}
    if wrappers := gates[1.0]._step.shared.engine.wrappers:
        raise ValueError(f"check: give the model before {type(wrappers[0]).__name__} wraps it; the same is gated")
    unit = (options or {}).get("unit", "sample")
    by_unit = None if unit == "sample" else gated(model, noise=0.5, unit=unit, **told).discard()
    state, before = ModuleState(model), _Before(model)

    def run() -> Any:
        owner, name = owner_of(model, method)
        return (owner if name is None else getattr(owner, name))(*inputs, **named)

    def step(gate: Gated | None = None) -> None:
        before.clear()
        with contextlib.nullcontext() if gate is None else gate:
            result = run()
            value = _usual_loss(result, found) if loss is None else loss(result)
            before.note(value)
            value.backward()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KondoWarning)  # that nothing was called in it
        with gates[1.0]:
            pass  # fails where the model is gated already
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(), before:
        with state.untouched():
            step()  # what fails here is no matter of a gate
        with state.untouched():
            norm = _look(found, gates[1.0], step)
            if norm is not None and by_unit is not None:
                norm = norm if _runs(found, lambda: step(by_unit)) else None
            if norm is not None:
                _time_steps(found, gates, step, run)
                found.ways = list(_ways(found, norm))
    return found


class _Before:
    """Gradients and random numbers as they were: of the model, and of what else the loss reaches."""

    def __init__(self, model: nn.Module):
        self._grads: dict[int, tuple[Tensor, Tensor | None]] = {id(p): (p, p.grad) for p in model.parameters()}
        self._generators = [(g, g.get_state()) for g in ModuleState(model).generators()]
        self._python = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy = None if numpy is None else (numpy.random, numpy.random.get_state())

    def clear(self) -> None:
        """No gradients, for a step."""
        for leaf, _ in self._grads.values():
            leaf.grad = None

    def note(self, loss: Tensor) -> None:
        """Take what else the loss reaches into account: another model's parameters, an input."""
        stack, seen = [loss.grad_fn], set[Any]()
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if isinstance(leaf, Tensor) and id(leaf) not in self._grads:
                self._grads[id(leaf)] = (leaf, leaf.grad)
                leaf.grad = None
            stack.extend(parent for parent, _ in node.next_functions)

    def __enter__(self) -> None:
        """Nothing is to be done."""

    def __exit__(self, *error: Any) -> None:
        """Put all of it back."""
        for leaf, grad in self._grads.values():
            leaf.grad = grad
        for generator, state in self._generators:
            generator.set_state(state)
        random.setstate(self._python)
        if self._numpy is not None:
            self._numpy[0].set_state(self._numpy[1])


def _first(share: float) -> Callable[[Rows], Tensor]:
    """A rule that keeps the first rows."""

    def rule(rows: Rows) -> Tensor:
        return (torch.arange(len(rows), device="cpu") < max(1, round(share * len(rows)))).double()

    rule.unbiased, rule.needs_policy = True, False  # type: ignore[attr-defined]
    return rule


def _usual_loss(result: Any, found: Checked) -> Tensor:
    """A loss that the model returns, else one to which all rows matter alike."""
    leaves = [leaf for leaf in flatten(result)[1] if leaf.requires_grad]
    own = next((leaf for leaf in leaves if leaf.dim() == 0), None)
    if own is not None:
        return own
    found.stands_in = True
    if not leaves:
        raise ValueError(
            "check: the model returns nothing that has a graph (is everything frozen?): give loss=, or its method in "
            "options"
        )
    return torch.stack([(leaf * torch.randn_like(leaf)).mean().real for leaf in leaves]).sum()


def _runs(found: Checked, work: Callable[[], None]) -> bool:
    """Whether something runs; what the gate has against it is noted, and what the user's code raises is raised."""
    try:
        work()
    except Exception as error:
        if not (type(error).__module__.startswith("kondo_hooks") or str(error).startswith("gated: ")):
            raise
        found.problem = f"{type(error).__name__}: {error}".replace("gated: ", "", 1)
    return found.problem is None


def _look(found: Checked, gate: Gated, step: Callable[[Gated], None]) -> Tensor | None:
    """Run two gated steps and note what is to be seen; returns the norms of the rows, None if the gate refuses."""
    seen: list[list[Arrival]] = []
    norms: list[Tensor] = []

    def observe(arrivals: list[Arrival]) -> None:
        seen.append(arrivals)
        if len(seen) == 2:  # by now it is known where rows are
            norms.extend(_describe(found, arrivals, gate._step.shared.learned))

    gate._step.observer = observe
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _ = _runs(found, lambda: step(gate)) and _runs(found, lambda: step(gate))
    found.told = list(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, KondoWarning)))
    if found.problem is None and not norms:
        found.problem = "no backward reached a call of it: the loss does not use what the gated model returns"
    return torch.cat(norms) if norms and found.problem is None else None


def _describe(found: Checked, arrivals: list[Arrival], learned: Learned) -> Iterator[Tensor]:
    """Note what one backward's calls are, and yield the norms of their rows."""
    found.policy = any(a.signal is not None and a.signal.is_known for a in arrivals)
    for a in arrivals:
        call = a.call
        layout = reading(Part(call, torch.zeros(0, dtype=torch.long, device="cpu"), []), learned)
        if a.follows is None:
            found.rows += call.batch
            if a.signal is not None and a.signal.norm is not None:
                yield a.signal.norm.detach().double().cpu().reshape(call.batch, -1).square().sum(1).sqrt()
        for i, (leaf, where) in enumerate(zip(call.inputs, layout, strict=True)):
            found.inputs.append((call.input_name(i), tuple(leaf.shape), None if where is None else where.axis))
        some = torch.arange(max(1, call.batch // 4), device=call.outputs[0].device)
        taken = [
            leaf if where is None else where.take(leaf, some) for leaf, where in zip(call.inputs, layout, strict=True)
        ]
        whole, part = run_rows(call, call.inputs), run_rows(call, taken)
        for i, (grad, where) in enumerate(zip(a.grads, call.rows, strict=True)):
            if grad is None:
                continue
            name = call.output_name(i)
            found.outputs.append((name, tuple(call.outputs[i].shape), None if where is None else where.axis))
            if whole is not None and part is not None and where is not None and not call.whole:
                expected = where.take(whole[i], some)
                if expected.shape == part[i].shape and expected.numel():
                    largest = float(expected.abs().max()) or 1.0
                    found.kernel_noise[name] = float((expected - part[i]).abs().max()) / largest
        found.whole = found.whole or call.whole


def _time_steps(found: Checked, gates: dict[float, Gated], step: Callable[..., None], run: Callable[[], Any]) -> None:
    """Measure steps with and without a gate, in turns."""

    def forward() -> None:
        with torch.no_grad():
            run()

    few, many = gates[0.125], gates[0.5]
    works: dict[str, Callable[[], None]] = {
        "full": step,
        "screen": forward,
        "few": lambda: step(few),
        "many": lambda: step(many),
    }
    spent: dict[str, list[float]] = {name: [] for name in works}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KondoWarning)
        for turn in range(_ROUNDS + 2):  # the first two get to know the model
            for name, work in works.items():
                begun = _now()
                work()
                if turn > 1:
                    spent[name].append(_now() - begun)
    full, screen, with_few, with_many = (statistics.median(each) for each in spent.values())
    less, more = (max(1, round(share * found.rows)) for share in (0.125, 0.5))
    found.seconds, found.seconds_screen = full, screen
    found.seconds_row = max(0.0, (with_many - with_few) / max(1, more - less))
    found.seconds_fixed = max(screen, with_few - less * found.seconds_row)


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _ways(found: Checked, norm: Tensor) -> Iterator[Way]:
    """What rules would take on these rows."""
    n, total = len(norm), float(norm.square().sum())
    fixed, row, screen, nan = found.seconds_fixed, found.seconds_row, found.seconds_screen, float("nan")
    yield Way("no gate", 1.0, found.seconds, nan, 0.0)
    if found.whole is not None:
        fixed, row = fixed + row * n, 0.0
    slopes = {
        'rate="lossless"': float("inf"),
        "noise=0.5": bounded_noise(norm, 0.5),
        "noise=1.0": bounded_noise(norm, 1.0),
        'rate=0.1, priority="norm", unbiased': fixed_share(norm, max(1.0, 0.1 * n)),
        'rate="auto", while it gates': cheapest(norm, fixed, max(row, 1e-12))[0],
    }
    for name, c in slopes.items() if total > 0 else ():
        p = inclusion(norm, c)
        rows = float(p.sum())
        seconds = fixed + row * rows
        decided_later = name.startswith('rate="')
        noise = second_moment(norm, p) / total - 1
        yield Way(name, rows / n, seconds, nan if decided_later else seconds - screen, max(0.0, noise))
    for name, share in (("rate=0.03, by delight", 0.03), ('rate=0.25, priority="abs_advantage"', 0.25)):
        kept = max(1, round(share * n))
        if found.policy:
            yield Way(name, kept / n, fixed + row * kept, fixed + row * kept - screen, nan)
