"""The engines that run a model on several ranks, as a gate sees them.

An engine says which ranks train the model, whether a pass through it communicates, whether the coming backward
reduces gradients, and how to run one pass of several without reducing them yet.
"""

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kondo_hooks import private
from kondo_hooks.core.arrival import Arrival
from kondo_hooks.core.call import Call
from kondo_hooks.core.engine import Engine, Force
from kondo_hooks.core.kept_rows import Part
from kondo_hooks.core.passes import Plan
from kondo_hooks.core.readings import Learned
from kondo_hooks.core.replay import Replayed
from kondo_hooks.ranks import passes, together
from kondo_hooks.ranks.agreement import Ranks
from kondo_hooks.rules.readback import Readback
from kondo_hooks.rules.samples import Decision, Kept, Samples, Signal
from kondo_hooks.rules.selection import Selector


class OnRanks(Engine):
    """Plain PyTorch on several ranks that the user's code keeps together; the base of engines that wrap a model."""

    ranks: Ranks

    def __init__(self, wrappers: Sequence[Any], ranks: Ranks):
        super().__init__(wrappers, ranks)

    def decide(
        self, selector: Selector, signals: list[Signal] | None, slots: list[int], force: Force, back: Readback | None
    ) -> tuple[Decision, list[Kept], Tensor | None]:
        """As one batch over all ranks, if they decide together."""
        if not self.together:
            return super().decide(selector, signals, slots, force, back)
        samples: Samples | None = None
        forced: Tensor | None = None
        try:
            samples = self.samples(selector, signals)
            forced = force(samples)
        except Exception as error:
            self.ranks.fail(error)
            samples = None
        found = signals or []
        decided = together.decide(selector, samples, found, slots or [0] * len(found), forced, self.ranks)
        return decided.decision, decided.kept, decided.counts

    def samples(self, selector: Selector, signals: list[Signal] | None) -> Samples:
        """The same on ranks that see the same rows."""
        samples = super().samples(selector, signals)
        return self.ranks.share_samples(samples) if self.ranks.tensor_parallel else samples

    def plan(
        self,
        arrivals: list[Arrival],
        slots: list[int],
        parts: list[Part | None],
        counts: Tensor | None,
        limit: int | None,
        learned: Learned,
    ) -> Plan:
        """The same passes on every rank."""
        return passes.plan(arrivals, slots, parts, counts, self, self.ranks, limit, learned)

    def run(self, group: list[Part], first: Arrival, learned: Learned, back: Readback) -> list[Replayed]:
        """A failure is told to the others, and a silent pass takes its place."""
        return passes.forward_as_one_of_many(group, first, self, learned, back)


class DDP(OnRanks):
    """``DistributedDataParallel``: forwards make no collectives but for buffers, and DDP's own flags see to these."""

    name = "DistributedDataParallel"

    def __init__(self, wrappers: Sequence[Any], ranks: Ranks):
        super().__init__(wrappers, ranks)
        # A static graph cannot do without a reduction in any pass: DDP fails under ``no_sync`` by itself.
        self.communicates = any(wrapper.static_graph for wrapper in wrappers)

    def before_call(self) -> None:
        """Buckets are rebuilt by a collective in the first forward with grad, which may be one of a rank's own."""
        self.inside = any(map(private.is_in_forward, self.wrappers))
        for wrapper in self.wrappers:
            private.rebuild_buckets(wrapper)

    def syncs(self) -> bool:
        """As DDP reads it, at the forward."""
        return all(wrapper.require_backward_grad_sync for wrapper in self.wrappers)

    def reduces(self, call: Call) -> bool:
        """As it was at the call's forward: a backward outside of ``no_sync`` changes nothing."""
        return call.syncs

    @contextlib.contextmanager
    def one_pass(self, reduces: bool) -> Iterator[None]:
        """Under ``no_sync`` or, for a forward that had been outside of it, with gradients reduced again.

        Buffers were broadcast when the batch was screened. Without another broadcast a rank may run as many forwards
        as it needs to find out where its inputs keep their rows.
        """
        before = [(w, w.require_backward_grad_sync, w.broadcast_buffers) for w in self.wrappers]
        for wrapper in self.wrappers:
            wrapper.require_backward_grad_sync = reduces or self.communicates
            wrapper.broadcast_buffers = False
        try:
            yield
        finally:
            for wrapper, sync, broadcast in before:
                wrapper.require_backward_grad_sync, wrapper.broadcast_buffers = sync, broadcast


class FSDP1(OnRanks):
    """``FullyShardedDataParallel``."""

    name = "FullyShardedDataParallel"
    communicates = True
    takes_gradients = False
    swaps_parameters = True

    def types(self, model: nn.Module) -> frozenset[torch.dtype]:
        """With those of its mixed precision."""
        lower = {wrapper.mixed_precision.param_dtype for wrapper in self.wrappers}
        return super().types(model) | {dtype for dtype in lower if dtype is not None}

    def syncs(self) -> bool:
        """What ``no_sync`` sets."""
        return all(private.fsdp1_syncs(wrapper) for wrapper in self.wrappers)

    @contextlib.contextmanager
    def one_pass(self, reduces: bool) -> Iterator[None]:
        """Under ``no_sync`` unless it reduces."""
        with contextlib.ExitStack() as stack:
            if not reduces:
                for wrapper in self.wrappers:
                    stack.enter_context(wrapper.no_sync())
            yield


class FSDP2(OnRanks):
    """``fully_shard``."""

    name = "fully_shard"
    communicates = True
    takes_gradients = False
    swaps_parameters = True

    def types(self, model: nn.Module) -> frozenset[torch.dtype]:
        """With those of its mixed precision."""
        groups = [group for wrapper in self.wrappers for group in _fsdp2_groups(wrapper)]
        lower = {dtype for group in groups for dtype in private.fsdp2_types(group) if dtype is not None}
        return super().types(model) | lower

    def syncs(self) -> bool:
        """What ``set_requires_gradient_sync`` last set."""
        return all(_fsdp2_syncs(wrapper) for wrapper in self.wrappers)

    def rest(self) -> None:
        """A screen leaves parameters gathered, as forwards do for their backward: they are none of an optimizer's."""
        for module in (module for wrapper in self.wrappers for module in wrapper.modules() if _is_fsdp2(module)):
            module.reshard()  # of this module alone, not of those inside of it

    @contextlib.contextmanager
    def one_pass(self, reduces: bool) -> Iterator[None]:
        """With gradients kept unsharded unless it reduces."""
        held = [] if reduces else [wrapper for wrapper in self.wrappers if _fsdp2_syncs(wrapper)]
        for wrapper in held:
            wrapper.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            for wrapper in held:
                wrapper.set_requires_gradient_sync(True)


def _fsdp2_groups(wrapper: Any) -> list[Any]:
    """Parameter groups of all ``fully_shard`` modules inside of one."""
    return [g for module in wrapper.modules() if _is_fsdp2(module) for g in private.fsdp2_groups(module)]


def _fsdp2_syncs(wrapper: Any) -> bool:
    return all(group.reduce_grads for group in _fsdp2_groups(wrapper))


def _is_fsdp2(module: nn.Module) -> bool:
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _is_fsdp1(module: nn.Module) -> bool:
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel

    return isinstance(module, FullyShardedDataParallel)


def _is_deepspeed(module: nn.Module) -> bool:
    deepspeed = sys.modules.get("deepspeed")
    return deepspeed is not None and isinstance(module, deepspeed.DeepSpeedEngine)


def find_engine(
    model: nn.Module, tensor_parallel: Any = None, global_scope: bool = False, balance: bool = False
) -> Engine:
    """The engine that runs ``model``, by the wrappers in it.

    Args:
        model: what is gated, with whatever wraps it.
        tensor_parallel: process group of the ranks that see the same rows.
        global_scope: all ranks decide as one; without a wrapper, these are the default process group's.
        balance: kept rows then move between them.

    Raises:
        ValueError: naming a kind of parallelism that cannot be gated.
    """
    engine = _find_engine(model, tensor_parallel, global_scope)
    engine.together, engine.balance = global_scope and engine.ranks.size > 1, balance
    return engine


def _find_engine(model: nn.Module, tensor_parallel: Any, global_scope: bool) -> Engine:
    _refuse_pipeline(model)
    if any(isinstance(module, nn.DataParallel) and len(module.device_ids) > 1 for module in model.modules()):
        raise ValueError(
            "gated: nn.DataParallel runs replicas of the model in threads of their own, where calls cannot be seen. "
            "Use DistributedDataParallel (torchrun; a transformers Trainer then picks it), or one device."
        )
    if tops := _topmost(model, _is_deepspeed):
        from kondo_hooks.integrations.deepspeed import DeepSpeed, refuse

        refuse(tops[0], tensor_parallel)
        return DeepSpeed(tops[0], tensor_parallel)
    if tops := _topmost(model, lambda m: isinstance(m, DistributedDataParallel)):
        _refuse_tensor_parallel(model, tensor_parallel, 0)
        return DDP(tops, Ranks(tops[0].process_group, tensor_parallel))
    if tops := _topmost(model, _is_fsdp1):
        _refuse_tensor_parallel(model, tensor_parallel, 0)
        hybrid = any("HYBRID" in str(top.sharding_strategy) for top in tops)
        return FSDP1(tops, Ranks(dist.group.WORLD if hybrid else tops[0].process_group, tensor_parallel))
    if tops := _topmost(model, _is_fsdp2):
        meshes = {group.mesh_info.mesh for top in tops for group in _fsdp2_groups(top)}
        _refuse_tensor_parallel(model, tensor_parallel, max((mesh.ndim for mesh in meshes), default=1))
        return FSDP2(tops, Ranks(_group_of(meshes), tensor_parallel))
    _refuse_tensor_parallel(model, tensor_parallel, 0)
    on_ranks = global_scope and dist.is_available() and dist.is_initialized()
    if not on_ranks and tensor_parallel is None:
        return Engine()
    return OnRanks([], Ranks(dist.group.WORLD if on_ranks else None, tensor_parallel))


def refuse_outer_wrapper(model: nn.Module) -> None:
    """Refuse a model that an engine wraps from outside: its replay would pass the engine by.

    Raises:
        ValueError: naming the engine.
    """
    _refuse_pipeline(model)
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    for found in gc.get_objects():
        if not issubclass(type(found), nn.Module) or found is model or not _is_wrapper(found):
            continue
        if any(module is model for module in found.modules()):
            raise ValueError(
                f"gated: {type(model).__name__} is run by a {type(found).__name__} around it, which reduces its "
                "gradients and would not see the replay. Gate what the host returned (the wrapper); in a Trainer, "
                "gate trainer.model or use its KondoCallback."
            )


def _refuse_pipeline(model: nn.Module) -> None:
    pipelining = sys.modules.get("torch.distributed.pipelining")
    if pipelining is None:
        return
    mine = set(model.modules())
    for found in gc.get_objects():
        if issubclass(type(found), pipelining.PipelineStage) and not mine.isdisjoint(found.submod.modules()):
            raise ValueError(
                f"gated: {type(model).__name__} is in a stage of a pipeline (torch.distributed.pipelining). Each stage "
                "has backwards of its own and all but the last see no loss, so they would choose other rows. Train "
                "without pipeline parallelism, with FSDP for one."
            )


def _is_wrapper(module: nn.Module) -> bool:
    return isinstance(module, DistributedDataParallel) or _is_fsdp1(module) or _is_deepspeed(module)


def _topmost(model: nn.Module, is_wrapper: Callable[[nn.Module], bool]) -> list[Any]:
    found: list[nn.Module] = []
    stack = [model]
    while stack:
        module = stack.pop()
        if is_wrapper(module):
            found.append(module)
        else:
            stack.extend(reversed(list(module.children())))
    return found


def _group_of(meshes: set[Any]) -> Any:
    """The ranks of the mesh that a model is sharded on."""
    if len(meshes) == 1:
        (mesh,) = meshes
        if mesh.ndim == 1:
            return mesh.get_group()
        if mesh.size() == dist.get_world_size():
            return dist.group.WORLD
    raise ValueError(
        "gated: model is sharded by fully_shard on several device meshes, or on a part of a mesh of several "
        "dimensions: which ranks train it together cannot be told. Shard it on one mesh of one dimension, or "
        "on one that holds all ranks."
    )


def _refuse_tensor_parallel(model: nn.Module, group: Any, data_dims: int) -> None:
    """Parameters sharded over more mesh dimensions than data parallelism uses: ranks share a batch."""
    if group is not None or not dist.is_available():
        return
    from torch.distributed.tensor import DTensor

    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and parameter.device_mesh.ndim > data_dims:
            raise ValueError(
                f"gated: {name} of {type(model).__name__} is a tensor-parallel parameter: its ranks see the same rows "
                "and must take one decision. Name them: gated(..., tensor_parallel_group=mesh['tp'].get_group())"
            )
