"""Log-probs seen in the user's loss code.

While the context is open a ``TorchFunctionMode`` watches the few functions that pick an action's log-prob
(``gather``, indexing, ``cross_entropy``, ``nll_loss``, ``binary_cross_entropy_with_logits``) on tensors that descend
from a gated call, and ``log_prob`` of any distribution (``distributions.py``). A hook on what they return gives
``dL/dlogp = -s * U``, pure also when the loss has entropy terms.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode

from kondo_hooks import private
from kondo_hooks.delight.distributions import is_inside, listen, parameters, put_on, take_all_off, take_off
from kondo_hooks.delight.graph import OBSERVATION, Node, Path, Source, find_sources, is_log_softmax
from kondo_hooks.rules.samples import Signal


@dataclass(eq=False)
class Observation:
    """A log-prob seen in the loss: its values now, the loss's gradient there once a backward reaches it.

    Attributes:
        read: gives (advantage times s, surprisal) in the shape of the picked values, from the gradient.
        sources: the calls whose rows it holds, in order.
        own_scale: 1/N if what was seen is itself a mean over N samples, 1 if a sum, None if not reduced.
        told: marked by the user with ``gate.logp``.
        raw: picked from raw logits, which a value loss does too: believed only if the boundary agrees.
        position_axis: the axis of what was picked from that holds positions, unless they are flattened into the rows.
        values_axis: the axis of the values that holds positions, if that is another.
        picked_axis: the axis of what was picked from that the actions are on, if there is one.
        parameters: the calls whose outputs are parameters of the distribution that was asked.
        picked: what can stand for an output's logits where it is picked from their log-softmax.
        alone: whether the loss of the coming backward takes nothing else from these logits.
        paths: the ways from the loss that a backward takes to it, found as that starts.
    """

    read: Callable[[Tensor], tuple[Tensor, Tensor]]
    sources: list[Source]
    own_scale: float | Tensor | None = None
    told: bool = False
    raw: bool = False
    position_axis: int = 1
    values_axis: int | None = None
    picked_axis: int | None = None
    grad: Tensor | None = None
    picked: "Picked | None" = None
    alone: bool = False
    task: int = -1
    parameters: list[Source] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    signals: dict[int, Signal] = field(default_factory=dict)
    shape: tuple[int, ...] = ()

    def attach(self, tensor: Tensor) -> None:
        """Take the gradient at ``tensor`` when a backward reaches it."""

        def hook(grad: Tensor) -> None:
            self.grad, self.task = grad.detach(), private.graph_task()
            self.signals.clear()
            if self.picked is not None and self.alone:
                self.picked = replace(self.picked, sent=self.grad)
                if not private.keeps_graph():
                    self.sources[0].call.let_go(self.sources[0].output, self.picked)

        node: Node = tensor.grad_fn
        if OBSERVATION in node.metadata:
            return  # another open gate, around another model, has seen it
        # It lives as long as the loss's node, and must not hold it: that would be a cycle.
        tensor.register_hook(hook)
        node.metadata[OBSERVATION] = self
        for source in {id(s.call): s for s in self.sources}.values():
            source.call.observe(self)

    def used_by(self, task: int) -> bool:
        """Whether the backward with this id went through it."""
        return self.grad is not None and self.task == task

    def signal(self, call: Any) -> Signal | None:
        """This observation's share of ``call``, (B, P)."""
        if not self.signals:
            self._split()
        return self.signals.get(id(call))

    def is_of(self, call: Any, output: int) -> bool:
        """Whether it was picked from this output of the call."""
        return any(source.call is call and source.output == output for source in self.sources)

    def offset(self, call: Any) -> int | None:
        """Where on the output's positions those of ``signal`` start; None if that cannot be told."""
        source = next(source for source in self.sources if source.call is call)
        signal = self.signal(call)
        if source.position_axis == self.picked_axis is not None and signal is not None and signal.valid.shape[1] > 1:
            return None  # what looks like positions are the actions, and the positions are elsewhere
        return None if source.position_axis not in (source.row_axis, self.position_axis) else source.offset

    def output(self, call: Any) -> int:
        """Which of the call's outputs it was picked from."""
        return int(next(source.output for source in self.sources if source.call is call))

    def _split(self) -> None:
        assert self.grad is not None
        advantages, surprisal = self.read(self.grad)
        self.shape = surprisal.shape
        each = [t.movedim(self.sources[0].row_axis, 0) for t in (advantages, surprisal)]
        start = 0
        for source in self.sources:
            u, ell = (source.rows(t[start : start + source.entries]) for t in each)
            start += source.entries
            signal = Signal(u, ell, u != 0)
            if (other := self.signals.get(id(source.call))) is not None:
                signal = join([other, signal])
            self.signals[id(source.call)] = signal

    def release(self) -> None:
        """Forget the gradient after a decision; a second backward brings its own."""
        self.grad = None
        self.signals.clear()


@dataclass(frozen=True)
class Picked:
    """The log-probs of the actions, for which logits need not be kept to hold another run against.

    Attributes:
        index: (B, 1) or (B, P, ..., 1), or more entries at each position.
        values: the log-probs, in its shape.
        offset: the logits' position that the first of P is for.
        sent: the loss's gradient at them.
    """

    index: Tensor
    values: Tensor
    offset: int
    sent: Tensor | None = None

    def until(self, length: int) -> "Picked":
        """Those of the logits' first positions."""
        index, values, sent = (
            None if t is None else t[:, : length - self.offset] for t in (self.index, self.values, self.sent)
        )
        assert index is not None and values is not None
        return Picked(index, values, self.offset, sent)

    def of(self, logits: Tensor, rows: Tensor) -> Tensor:
        """(n, ...) log-probs of the same actions by the logits of another run of some rows."""
        index = self.index.index_select(0, rows)
        cut = logits.narrow(1, self.offset, index.shape[1]) if logits.dim() > 2 else logits
        return cut.log_softmax(-1, self.values.dtype).gather(-1, index)


def join(signals: list[Signal]) -> Signal:
    """Several signals of the same rows as one, positions side by side."""
    if len(signals) == 1:
        return signals[0]
    dtype = torch.promote_types(signals[0].advantages.dtype, signals[-1].advantages.dtype)
    device = signals[0].advantages.device
    return Signal(
        torch.cat([s.advantages.to(device, dtype) for s in signals], 1),
        torch.cat([s.surprisal.to(device, dtype) for s in signals], 1),
        torch.cat([s.valid.to(device) for s in signals], 1),
    )


def observe_logp(logp: Tensor, told: bool) -> Observation | None:
    """Watch a tensor of log-probs; None if its rows are not those of a gated call.

    Args:
        logp: (B,) or (B, T), or of more axes.
        told: whether it was the user who marked it.
    """
    sources = find_sources(logp) or find_sources(logp, trust=True)
    return _observe(logp, sources, told) if sources else None


def _observe_rows_of(distribution: Distribution, log_probs: Tensor) -> Observation | None:
    """Where the way to log-probs cannot be followed: their last axes are those of the distribution's batch."""
    batch = len(distribution.batch_shape)
    for parameter in parameters(distribution):
        sources = find_sources(parameter, trust=True)
        if sources and sources[0].row_axis < batch <= log_probs.dim():
            axis = sources[0].row_axis + log_probs.dim() - batch
            if log_probs.shape[axis] == sum(source.entries for source in sources):
                return _observe(log_probs, [replace(s, row_axis=axis, position_axis=None) for s in sources], False)
    return None


def _observe(logp: Tensor, sources: list[Source], told: bool) -> Observation:
    values = logp.detach().clone()
    position_axis = 0 if sources[0].row_axis == 1 else 1
    observation = Observation(lambda g: (-g, -values), sources, told=told, position_axis=position_axis)
    observation.attach(logp)
    return observation


_GRAD: Any = getattr(Tensor.grad, "__get__")  # noqa: B009 - a property, and no tensor


class LossWatcher(TorchFunctionMode):
    """Watches the loss code for log-probs of gated calls, and tells the gate of each backward.

    Attributes:
        paused: nothing is gated now, so there is nothing to see but backwards.
        asleep: nor are these told.
        on_grad: is told of each tensor whose ``.grad`` is about to be read.
    """

    def __init__(self, on_backward: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]):
        super().__init__()
        self._on_backward = on_backward
        self._on = False
        self.paused = self.asleep = False
        self.on_grad: Callable[[Tensor], None] | None = None
        self._put_off: list[Callable[[], None]] = []
        self._ends: list[Callable[[], None]] = []

    def open(self) -> None:
        """Begin to watch."""
        self.__enter__()
        self._on = True
        self._ends = [listen(self._see_log_prob), private.watch_backwards()]

    def close(self) -> None:
        """Leave no trace."""
        take_off(self)
        self.paused = self.asleep = False
        self._on = False
        for end in self._ends:
            end()
        self._ends = []

    def sleep(self) -> None:
        """See nothing at all for a while, backwards neither."""
        if not self.asleep:
            self.asleep = take_off(self) is not None

    def wake(self) -> None:
        """Begin to watch again. At the bottom: what lies above was put there by others, who will take off the top."""
        if self.asleep:
            others = take_all_off()
            self.asleep = False
            put_on([*others, self])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` as it is; look at what it returned if it can pick a log-prob."""
        kwargs = kwargs or {}
        if self.on_grad is not None and func == _GRAD and args and not torch.compiler.is_compiling():
            self.on_grad(args[0])
        if torch.compiler.is_compiling() or (self.paused and func not in _BACKWARD):
            return func(*args, **kwargs)
        if func in _BACKWARD:
            return self._on_backward(func, args, kwargs)
        result = func(*args, **kwargs)
        watcher = _WATCHED.get(func)
        if watcher is not None and isinstance(result, Tensor) and result.requires_grad:
            look = functools.partial(watcher, result, *args, **kwargs)
            if is_inside():
                self._put_off.append(look)
            else:
                with private.without_modes():
                    look()
        return result

    def _see_log_prob(self, distribution: Distribution, log_probs: Tensor) -> None:
        """What a distribution returned stands for all that was picked inside of it, if its rows can be followed."""
        inside, self._put_off = self._put_off, []
        if not self._on or self.paused or log_probs.grad_fn is None or not log_probs.dim():
            return
        with private.without_modes():
            observation = observe_logp(log_probs, False) or _observe_rows_of(distribution, log_probs)
            if observation is None:
                for look in inside:
                    look()
            else:
                found = (find_sources(p) for p in parameters(distribution) if p.grad_fn is not None and p.dim())
                observation.parameters = [source for sources in found for source in sources or ()]

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Without this mode while the model itself runs; the user's own stay on."""
        above, was_on = take_off(self), self._on
        self._on = False
        try:
            yield
        finally:
            self._on = was_on
            if above is not None:
                for _ in above:
                    private.pop_mode()
                put_on([*above, self])


_BACKWARD = {torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad}


def _sources(tensor: Any) -> list[Source] | None:
    if not isinstance(tensor, Tensor) or tensor.grad_fn is None or not tensor.dim():
        return None
    return find_sources(tensor)


def _gather(result: Tensor, input: Tensor, dim: int, index: Tensor, **_: Any) -> None:
    if result.dim():
        _pick(result, input, dim % result.dim(), index)


def _take_along_dim(result: Tensor, input: Tensor, indices: Tensor, dim: int | None = None) -> None:
    if dim is not None:
        _gather(result, input, dim, indices)


def _getitem(result: Tensor, input: Tensor, index: Any) -> None:
    """``logp[arange(B), actions]`` and ``logp[arange(B)[:, None], arange(T), actions]``."""
    if not isinstance(index, tuple) or len(index) != input.dim() or len(index) < 2:
        return
    *leading, action = index
    if isinstance(action, (list, tuple)):
        action = torch.as_tensor(action, device=input.device)
    if not (isinstance(action, Tensor) and action.dtype in (torch.int64, torch.int32)):
        return
    for axis, rows in enumerate(leading):
        rows = torch.as_tensor(rows, device=action.device) if isinstance(rows, (list, range)) else rows
        if not isinstance(rows, Tensor) or rows.dtype != torch.int64:
            return
        shape = [1] * result.dim()
        if result.dim() != len(leading) or result.shape[axis] != input.shape[axis]:
            return
        shape[axis] = -1
        expected = torch.arange(input.shape[axis], device=rows.device).view(shape)
        if not torch.equal(torch.broadcast_to(rows, result.shape), expected.expand(result.shape)):
            return
    _pick(result, input, input.dim() - 1)


def _pick(result: Tensor, input: Tensor, dim: int, index: Tensor | None = None) -> None:
    """``result`` picks one entry of ``input`` along ``dim`` at each position, the one that ``index`` says."""
    if (sources := _sources(input)) is None:
        return
    axis, kind = sources[0].row_axis, sources[0].kind
    if axis == dim or result.dim() <= axis or result.shape[axis] != input.shape[axis]:
        return
    values = result.detach().clone()
    if kind == "logp":
        observation = Observation(lambda g: (-g, -values), sources)
    elif kind == "nll":
        observation = Observation(lambda g: (g, values), sources)
    else:
        observation = _pick_unknown(values, input.detach(), dim, sources)
    observation.position_axis, observation.picked_axis = 0 if axis == 1 else 1, dim
    if kind == "logp" and index is not None and len(sources) == 1 and dim == input.dim() - 1 and is_log_softmax(input):
        (source,), alike = sources, (index.shape[0], *index.shape[2:-1]) == (input.shape[0], *input.shape[2:-1])
        alike = alike and index.shape == result.shape
        if axis == 0 and source.repeat == 1 and alike and (dim == 1 or source.position_axis == 1):
            observation.picked = Picked(index, values, source.offset if dim > 1 else 0)
    observation.attach(result)


def _pick_unknown(values: Tensor, table: Tensor, dim: int, sources: list[Source]) -> Observation:
    """What was picked from tells by its values whether it is logits, log-probs or probabilities."""
    tolerance = 1e-6 if table.dtype == torch.float64 else 1e-3
    few = table.narrow(0, 0, min(len(table), 8))
    if bool((few >= 0).all()) and bool(((few.sum(dim) - 1).abs() < tolerance).all()):
        return Observation(lambda g: (-g * values, -values.log()), sources)
    if bool((few.logsumexp(dim).abs() < tolerance).all()):
        return Observation(lambda g: (-g, -values), sources)
    version = table._version

    def read(grad: Tensor) -> tuple[Tensor, Tensor]:
        if table._version != version:
            raise RuntimeError("gated: logits were modified in place after the action's logit was picked")
        if values.dim() < table.dim():
            return -grad, table.logsumexp(dim) - values
        # gather may pick from the first positions only, and several entries of each.
        first = tuple(slice(None) if axis == dim else slice(n) for axis, n in enumerate(values.shape))
        return -grad, table[first].logsumexp(dim, keepdim=True) - values

    return Observation(read, sources, raw=True)


def _indexed_loss(
    result: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    logits: bool,
) -> None:
    """``cross_entropy`` (of logits) and ``nll_loss`` (of log-probs)."""
    if target.dtype.is_floating_point or label_smoothing or size_average is not None or reduce is not None:
        return
    if input.dim() < 2 or (sources := _sources(input)) is None or sources[0].row_axis != 0:
        return
    table, version, nll = input.detach(), input._version, None
    counted = target != ignore_index
    index = target.where(counted, 0)
    factor = counted.to(table.dtype) if weight is None else weight[index] * counted
    if reduction == "none" and weight is None:
        nll = result.detach().clone()

    def read(grad: Tensor) -> tuple[Tensor, Tensor]:
        surprisal = nll
        if surprisal is None:
            if table._version != version:
                raise RuntimeError("gated: the input of the loss was modified in place before its backward")
            surprisal = -table.gather(1, index.unsqueeze(1)).squeeze(1)
            if logits:
                surprisal = surprisal + table.logsumexp(1)
        return grad * own * factor, surprisal

    own: float | Tensor = 1.0
    if reduction == "mean":
        own = 1 / factor.sum().clamp_min(1e-30)
    own_scale = None if reduction == "none" else own
    observation = Observation(read, sources, own_scale)
    # (B, V, T): the classes are on axis 1.
    observation.position_axis, observation.values_axis = (2 if input.dim() > 2 else 1), 1
    observation.picked_axis = 1
    observation.attach(result)


def _binary_loss(
    result: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    loss: Callable[..., Tensor],
) -> None:
    """``binary_cross_entropy``, with and without logits."""
    if any(option is not None for option in (weight, pos_weight, size_average, reduce)):
        return
    if (sources := _sources(input)) is None or target.requires_grad:
        return
    if not bool(((target == 0) | (target == 1)).all()):
        return  # an entropy, or soft labels: no action
    nll = result.detach().clone() if reduction == "none" else loss(input.detach(), target, reduction="none")

    def read(grad: Tensor) -> tuple[Tensor, Tensor]:
        return (grad * own).expand_as(nll), nll

    own = 1 / nll.numel() if reduction == "mean" else 1.0
    own_scale = None if reduction == "none" else own
    Observation(read, sources, own_scale).attach(result)


_WATCHED: dict[Any, Callable[..., None]] = {
    torch.gather: _gather,
    torch.Tensor.gather: _gather,
    torch.take_along_dim: _take_along_dim,
    torch.Tensor.take_along_dim: _take_along_dim,
    torch.Tensor.__getitem__: _getitem,
    F.cross_entropy: functools.partial(_indexed_loss, logits=True),
    F.nll_loss: functools.partial(_indexed_loss, logits=False),
    F.binary_cross_entropy_with_logits: functools.partial(_binary_loss, loss=F.binary_cross_entropy_with_logits),
    F.binary_cross_entropy: functools.partial(_binary_loss, loss=F.binary_cross_entropy),
}
