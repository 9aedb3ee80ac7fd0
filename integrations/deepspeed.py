"""DeepSpeed ZeRO: ``engine.backward`` is taken over while a context is open.

DeepSpeed divides by the accumulation steps and scales the loss in ``engine.backward``, and finishes ZeRO's reductions
there. So the user's loss goes back to the gated calls by plain autograd, and each replay goes through the engine's own
``backward``, as a scalar whose gradient at the kept rows is what the loss sent: scaled once, reduced once.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kondo_hooks.delight.graph import reaches
from kondo_hooks.ranks.agreement import Ranks
from kondo_hooks.ranks.engines import OnRanks


def refuse(engine: Any, tensor_parallel: Any) -> None:
    """Kinds of parallelism that cannot be gated, or not without being told.

    Raises:
        ValueError: naming it.
    """
    from deepspeed import PipelineEngine

    if isinstance(engine, PipelineEngine):
        raise ValueError(
            "gated: DeepSpeed's PipelineEngine runs forward and backward of micro-batches itself, in train_batch(): "
            "there is no loss of yours to gate. Use ZeRO without pipeline stages."
        )
    if engine.sequence_parallel_size > 1:
        raise ValueError(
            "gated: DeepSpeed sequence parallelism (sequence_parallel_size > 1) spreads each row over ranks, which a "
            "gate of rows does not support; train with sequence_parallel_size=1"
        )
    if tensor_parallel is None and engine.mp_world_size > 1:
        raise ValueError(
            "gated: this DeepSpeed engine has tensor (model) parallel ranks, which see the same rows and must take one "
            "decision. Name them: gated(..., tensor_parallel_group=group)"
        )


class DeepSpeed(OnRanks):
    """ZeRO 0 to 3."""

    name = "DeepSpeed"
    communicates = True
    swaps_parameters = True
    reduces_later = True

    def __init__(self, engine: Any, tensor_parallel: Any):
        super().__init__([engine], Ranks(engine.data_parallel_group, tensor_parallel))
        self._engine = engine
        self._own_backward: Callable[..., Any] = engine.backward
        self._loss: Tensor | None = None
        self._direct = False

    def window(self, size: Any) -> Any:
        """Until the step is until the backward before it, in which DeepSpeed reduces its accumulation's gradients."""
        return super().window("auto" if size == "step" else size)

    def syncs(self) -> bool:
        """Whether this micro-batch is the engine's accumulation boundary."""
        return bool(self._engine.is_gradient_accumulation_boundary())

    @contextlib.contextmanager
    def one_pass(self, reduces: bool) -> Iterator[None]:
        """Away from the boundary unless it reduces."""
        if reduces:
            yield
            return
        before = self._engine._is_gradient_accumulation_boundary
        self._engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self._engine._is_gradient_accumulation_boundary = before

    def backward(self, outputs: Sequence[Tensor], grads: Sequence[Tensor], inputs: Sequence[Tensor] | None) -> None:
        """Through ``engine.backward`` where the user called that; by its hooks where they called ``loss.backward``."""
        if self._loss is None:
            super().backward(outputs, grads, inputs)
            return
        scalar = _Inject.apply(self._loss.detach(), list(grads), *outputs)
        if self._direct:
            # The loss once more: its gated calls are done, what it makes of the parameters without them is not.
            scalar = scalar + (self._loss - self._loss.detach())
            self._direct = False
        self._own_backward(scalar, scale_wrt_gas=False)

    def open(self, gate: Any) -> Callable[[], None]:
        """Take ``engine.backward`` over, and have ``engine.step`` look for what waits."""
        engine = self._engine
        before = {name: engine.__dict__.get(name) for name in ("backward", "step")}
        self._own_backward, own_step = engine.backward, engine.step

        def backward(loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Any:
            calls, leaves = reaches(loss)
            if not calls:
                result = self._own_backward(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)
                gate.raise_failures()
                return result
            if scale_wrt_gas:
                loss = loss / engine.gradient_accumulation_steps()
            mine = {id(p) for p in engine.module.parameters()}
            self._direct = any(id(leaf) in mine for leaf in leaves)
            if self._direct and gate.waits():
                raise RuntimeError(
                    "gated: under DeepSpeed with window > 1 the loss must reach the engine's parameters through its "
                    "outputs alone; move the penalty on parameters into the optimizer (weight decay), or use window=1"
                )
            self._loss = loss
            try:
                gate.run_backward(loss, retain_graph, self._direct)
            finally:
                self._loss, self._direct = None, False
            return loss.detach()

        def step(*args: Any, **kwargs: Any) -> Any:
            if engine.is_gradient_accumulation_boundary():
                gate.check_step()
                gate.raise_failures()
            return own_step(*args, **kwargs)

        engine.backward, engine.step = backward, step

        def close() -> None:
            for name, attribute in before.items():
                if attribute is None:
                    delattr(engine, name)
                else:
                    setattr(engine, name, attribute)

        return close


class _Inject(torch.autograd.Function):
    """A scalar of the loss's value whose gradient at the outputs is what the loss sent there."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: list[Tensor], *outputs: Tensor) -> Tensor:
        ctx.grads = grads
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # A product in the gradient's own type: half precision must not overflow before it is scaled.
        return (None, None, *(g * grad.to(g.dtype) for g in ctx.grads))
