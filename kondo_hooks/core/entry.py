"""Where a backward begins: what the user asked of it, seen just before it starts."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from kondo_hooks import private
from kondo_hooks.core.arrival import Arrival
from kondo_hooks.core.shared import Shared
from kondo_hooks.delight.beside import Meeting, find_meetings, retaining
from kondo_hooks.delight.graph import probe_scales
from kondo_hooks.rules.samples import Kept
from kondo_hooks.same.attributes import version_of

_Gradients = list[tuple[Tensor | None, int]]


class Entry:
    """Stands in for ``Tensor.backward``, ``torch.autograd.backward`` and ``torch.autograd.grad``.

    Args:
        shared: what the parts of the gate share.
        settled_after: around the backward; decides and replays when it has returned.

    Attributes:
        anchor: the leaf that every node hangs on, so that a backward reaches it.
        keeps_graph: whether the user wants the graph kept, where the gate keeps it anyway; None where it does not.
        ran_first: whether rows of a call that was decided on before it ran may be in the coming backward.
    """

    def __init__(self, shared: Shared, settled_after: Callable[[], AbstractContextManager[None]]):
        self.shared = shared
        self._settled_after = settled_after
        self.anchor = torch.zeros((), requires_grad=True, device="cpu")
        self.keeps_graph: bool | None = None
        self._capture: dict[int, Tensor | None] | None = None
        self._only: list[Tensor] | None = None
        self._meetings: list[Meeting] = []
        self.ran_first = False

    def called(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stands in for ``Tensor.backward``, ``torch.autograd.backward`` and ``torch.autograd.grad``."""
        if self.shared.watcher.paused:
            start = self.shared.pace.enter()
            try:
                return func(*args, **kwargs)
            finally:
                self.shared.pace.leave(start)
        roots: Any = args[0] if args else kwargs.get("tensors", kwargs.get("outputs"))
        roots = [roots] if isinstance(roots, Tensor) else list(roots)
        nodes = [root.grad_fn for root in roots if getattr(root, "grad_fn", None) is not None]
        start = self.shared.pace.enter()
        probes: list[Any] = []
        meetings: list[Meeting] = []
        before: _Gradients | None = None
        try:
            probes, leaves = probe_scales(nodes)
            if leaves and self.shared.idle.waits:
                before = self._gradients()
            if func is not torch.autograd.grad:
                self._refuse_half_a_step(leaves)
            wanted = kwargs.get("inputs", args[1] if func is torch.autograd.grad and len(args) > 1 else None)
            wanted = [wanted] if isinstance(wanted, Tensor) else None if wanted is None else list(wanted)
            if self.ran_first and leaves:
                self._mark_met(nodes, leaves)
            if meetings := self._find_meetings(nodes, leaves, wanted):
                probes += [meeting.hold() for meeting in meetings]
                self._meetings += meetings
                args, kwargs, self.keeps_graph = retaining(func, args, kwargs)
            if func is torch.autograd.grad:
                return self._autograd_grad(*args, **kwargs)
            if wanted is not None:
                mine = {id(p) for p in self.shared.state.parameters()}
                only = [leaf for leaf in wanted if id(leaf) in mine]
                if only:
                    self._only = only
                    kwargs = {**kwargs, "inputs": [*wanted, self.anchor]}
            with self._settled_after():
                result = func(*args, **kwargs)
            if before is not None and self.shared.idle.waits:
                self._tell_what_came_past(before)
            return result
        except BaseException:
            self.shared.pace.forget()
            raise
        finally:
            self._only, self.keeps_graph = None, None
            self._meetings = [m for m in self._meetings if m not in meetings]
            for probe in probes:
                probe.remove()
            self.shared.pace.leave(start)

    def _gradients(self) -> _Gradients:
        """What each parameter holds: its gradient, and how often that was written to."""
        with self.shared.watcher.off():
            grads = [p.grad for p in self.shared.state.parameters()]
        return [(grad, version_of(grad)) for grad in grads]

    def _tell_what_came_past(self, before: _Gradients) -> None:
        """Warn of a gradient from a backward that reached none of the calls that wait for theirs."""
        names = (name for name, _ in self.shared.state.named_parameters())
        for name, (grad, version), (old, old_version) in zip(names, self._gradients(), before, strict=True):
            if grad is not None and (grad is not old or version != old_version):
                self.shared.warn(
                    "past",
                    f"gated: between a gated call and its own backward another one gave {name} a gradient. It went "
                    "past the gate, so it is that of all rows. Does the loss code run a part of the model itself, on "
                    "detached outputs (a head in chunks)? Gate both with method=, or leave the chunks away. After "
                    "gate.preselect(), mask the dropped rows' terms. (A penalty on parameters alone does no harm.)",
                )
                return

    def steps_inside(self) -> list[torch.nn.Parameter]:
        """The parameters that an optimizer may step as soon as their gradient is there."""
        if self.shared.engine.wrappers:
            return []  # the hooks are the engine's
        return [p for p in self.shared.state.parameters() if private.has_hook_after_accumulation(p)]

    def _refuse_half_a_step(self, leaves: list[Tensor]) -> None:
        """Refuse a loss that reaches such a parameter past the gate, before anything is stepped."""
        stepped = {id(p): p for p in self.steps_inside()} if leaves else {}
        for leaf in leaves:
            if id(leaf) in stepped:
                raise RuntimeError(
                    f"gated: hooks step the optimizer inside of the backward, and the loss uses "
                    f"{self.shared.state.name_of(stepped[id(leaf)])} itself beside the gated outputs (a penalty on "
                    "parameters?): it would be stepped twice, by half of its gradient each. Put weight decay into the "
                    "optimizer, or step after the backward. Nothing was changed."
                )

    def _mark_met(self, roots: list[Any], leaves: list[Tensor]) -> None:
        """Have rows that ran first refuse a gradient at dropped ones where the loss code applies a leaf to them."""
        names = {id(p): name for name, p in self.shared.state.named_parameters()}
        told = {id(leaf): names.get(id(leaf), f"a parameter of shape {tuple(leaf.shape)}") for leaf in leaves}
        for meeting in find_meetings(roots, list(told)):
            for node in meeting.first:
                node.kondo_met = told[min(meeting.leaves, key=list(told).index)]

    def _find_meetings(self, roots: list[Any], leaves: list[Tensor], wanted: list[Tensor] | None) -> list[Meeting]:
        """Where parameters of the model meet rows in the loss code; told where rows cannot be told apart there.

        Args:
            roots: the loss's ``grad_fn``.
            leaves: that it leads to past the gated calls.
            wanted: what alone gets a gradient, if not all of them do.
        """
        shared = self.shared
        names = {id(p): name for name, p in shared.state.named_parameters()} if leaves else {}
        mine = [id(leaf) for leaf in leaves if id(leaf) in names]
        if not mine or (wanted is not None and not any(id(leaf) in names for leaf in wanted)):
            return []
        whole = shared.engine.wrappers or shared.engine.balance or shared.selector.config.tokens
        # What waits for others would be asked again when the user's code may have changed what it is made of.
        whole = whole or shared.waits or not all(id(leaf) in names for leaf in wanted or ())
        split = []
        for meeting in find_meetings(roots, mine):
            here = all(source.call.state is shared.state for source in meeting.sources or ())
            if meeting.is_split and here and not whole and not (meeting.others and wanted is not None):
                split.append(meeting)
                continue
            name = names[min(meeting.leaves, key=mine.index)]
            shared.warn(
                f"outside {name}",
                f"gated: the loss code uses the model's parameter {name} together with its outputs, so rows that are "
                "dropped still reach that parameter. Return it from forward, expanded to the batch, and use what "
                "forward returned.",
            )
        return split

    def send_to_met(self, arrivals: list[Arrival], kept: Callable[[], list[Kept]]) -> None:
        """The kept rows' share in the gradients of parameters that the loss code uses itself."""
        if not self._meetings:
            return
        shares = zip(arrivals, kept(), strict=True)
        by_call = {id(a.call): mine.spread(a.call.batch, torch.float64) for a, mine in shares}
        ready = [m for m in self._meetings if m.is_ready(by_call)]
        self._meetings = [m for m in self._meetings if m not in ready]
        due = [pair for meeting in ready for pair in meeting.release(by_call)]
        if due:
            retain = any(a.keep_graph for a in arrivals)
            with self.shared.replaying():
                self.to_parameters([edge for edge, _ in due], [grad for _, grad in due], [], True, retain)

    def _autograd_grad(self, outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """``torch.autograd.grad``, where the model's parameters hang on the node and not on the graph."""
        inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        mine = {id(p) for p in self.shared.state.parameters()}
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

    def to_parameters(
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
                self.shared.engine.backward(outputs, grads, only)
            else:
                torch.autograd.backward(outputs, grads, retain_graph, inputs=only)
            return
        capture = self._capture or {}
        wanted = [p for p in self.shared.state.parameters() if id(p) in capture and to_parameters]
        found = torch.autograd.grad(outputs, [*wanted, *leaves], grads, retain_graph, allow_unused=True)
        for leaf, grad in zip([*wanted, *leaves], found, strict=True):
            if id(leaf) not in capture:
                leaf.grad = grad
            elif grad is not None:
                held = capture[id(leaf)]
                capture[id(leaf)] = grad if held is None else held + grad
