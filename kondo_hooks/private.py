"""What is private in torch and no public way leads to, each behind one function, and what versions differ in.

Each looks for its name when it is first used, and says which versions are known where it is gone.
``tests/test_private.py`` calls all of them, so it fails loudly when torch changes.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# Decorates what Dynamo must not trace. ``torch.compiler.disable`` would import the compiler to do it.
from torch._compile import _disable_dynamo as uncompiled

_OLDEST, _NEWEST = (2, 8), (2, 15)
_KNOWN = f"{'.'.join(map(str, _OLDEST))} to {'.'.join(map(str, _NEWEST))}"

__all__ = ["uncompiled"]


def _version() -> tuple[int, int]:
    """Of torch."""
    major, minor, *_ = torch.__version__.split(".")
    return int(major), int(minor)


@functools.cache
def untested_version() -> str | None:
    """What to say of a torch that the gate's tests do not run on; None of one that they do."""
    if _OLDEST <= _version() <= _NEWEST:
        return None
    return (
        f"gated: torch {torch.__version__} is none of the versions that the gate is tested with, {_KNOWN}. It goes on; "
        "if something of torch is missing, it says so."
    )


@functools.cache
def _named(path: str) -> Any:
    """What stands in torch under a dotted name."""
    found: Any = torch
    for name in path.split("."):
        found = _of(found, name)
    return found


def _of(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError as error:
        where = getattr(owner, "__name__", type(owner).__name__)
        raise RuntimeError(
            f"gated: torch {torch.__version__} has no {name} in {where}, which the gate needs; it is known to work "
            f"with torch {_KNOWN}. Install that, or report the version."
        ) from error


# Autograd.


_watching: list[Callable[..., Any]] = []
"""``torch.autograd.backward`` as it was, once for each who has something stand in for it."""


def watch_backwards() -> Callable[[], None]:
    """Have modes see ``torch.autograd.backward``, which before torch 2.11 asks none; returns what ends that."""
    original = _watching[0] if _watching else torch.autograd.backward
    if "has_torch_function" in original.__code__.co_names:
        return lambda: None

    @functools.wraps(original)
    def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
        every = (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)
        if torch.overrides.has_torch_function(every):
            torch.overrides.handle_torch_function(original, every, tensors, *args, **kwargs)
        else:
            original(tensors, *args, **kwargs)

    _watching.append(original)
    torch.autograd.backward = backward

    def end() -> None:
        _watching.pop()
        if not _watching:
            torch.autograd.backward = original

    return end


def graph_task() -> int:
    """Number of the backward that runs now; -1 if none does."""
    return int(_named("_C._current_graph_task_id")())


def keeps_graph() -> bool:
    """Whether the backward that runs now keeps its graph."""
    return bool(_named("_C._autograd._get_current_graph_task_keep_graph")())


def will_run(node: Any) -> bool:
    """Whether the backward that runs now goes on to this node."""
    return bool(_named("_C._will_engine_execute_node")(node))


def at_the_end(callback: Callable[[], None]) -> None:
    """Have the backward that runs now call this when it has ended."""
    _named("autograd.Variable._execution_engine.queue_callback")(callback)


def result_shapes(node: Any) -> list[tuple[int, ...]]:
    """Shapes of an operation's results, which its backward is given gradients of."""
    return [tuple(metadata.shape) for metadata in _of(node, "_input_metadata")]


def result_shape(node: Any, i: int) -> tuple[int, ...]:
    """Shape of one of them."""
    return tuple(_of(node, "_input_metadata")[i].shape)


def has_hook_after_accumulation(parameter: nn.Parameter) -> bool:
    """Whether a hook runs as soon as a parameter's gradient is there: an optimizer that steps in the backward?"""
    return bool(_of(parameter, "_post_accumulate_grad_hooks"))


# Modes and transforms.


def pop_mode() -> Any:
    """Take the uppermost ``TorchFunctionMode`` off; None if there is none."""
    return _named("overrides._pop_mode")() if _named("_C._len_torch_function_stack")() else None


def push_mode(mode: Any) -> None:
    """Put a ``TorchFunctionMode`` on."""
    _named("overrides._push_mode")(mode)


def without_modes() -> Any:
    """A context in which no ``TorchFunctionMode`` and no subclass sees what is done."""
    return _named("_C.DisableTorchFunction")()


def in_transform() -> bool:
    """Whether ``torch.func`` transforms are at work."""
    return bool(_named("_C._are_functorch_transforms_active")())


def caches_parametrizations() -> bool:
    """Whether ``torch.nn.utils.parametrize.cached()`` is open."""
    return bool(_of(_named("nn.utils.parametrize"), "_cache_enabled"))


def forget_casts() -> None:
    """After a run without a graph under autocast: before torch 2.11 a later one took weights that it had cast, which
    have no graph either."""
    if _version() < (2, 11):
        torch.clear_autocast_cache()


def product_precision(kind: str) -> str:
    """What float32 products are made of on a kind of device.

    ``allow_tf32`` and ``set_float32_matmul_precision`` set this switch, too; to read them raises once it was used.
    Before torch 2.9 there is none, and they are all there is.
    """
    backend: Any = torch.backends.cuda if kind == "cuda" else torch.backends.mkldnn
    matmul: Any = getattr(backend, "matmul", None)
    if hasattr(matmul, "fp32_precision"):
        return str(matmul.fp32_precision)
    if kind == "cuda":
        return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    return "bf16" if torch.get_float32_matmul_precision() == "medium" else "ieee"


# Several ranks.


def default_store() -> Any:
    """The key-value store behind the default process group."""
    return _named("distributed.distributed_c10d._get_default_store")()


def collective_device(group: Any) -> str:
    """Kind of device where a group can run collectives, the host if it can: where torch puts its own objects."""
    return str(_named("distributed.distributed_c10d._get_object_coll_device")(group))


def carried_devices(group: Any) -> set[str]:
    """Kinds of devices whose tensors a group can exchange."""
    return {device.type for device in _of(group, "_device_types")}


def rebuild_buckets(wrapper: Any) -> None:
    """What a forward of ``DistributedDataParallel`` with grad does once, after the first backward: a broadcast."""
    _of(_of(wrapper, "reducer"), "_rebuild_buckets")()


def is_in_forward(wrapper: Any) -> bool:
    """Whether the forward of a ``DistributedDataParallel`` runs now."""
    return _of(_named("nn.parallel.DistributedDataParallel"), "_active_ddp_module") is wrapper


def fsdp1_syncs(wrapper: Any) -> bool:
    """What ``FullyShardedDataParallel.no_sync`` sets."""
    return bool(_of(wrapper, "_sync_gradients"))


def fsdp2_groups(module: Any) -> list[Any]:
    """Parameter groups of a ``fully_shard`` module, which alone have its flags, and its mesh without others' axes."""
    state = _of(module, "_get_fsdp_state")()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    group = _of(state, "_fsdp_param_group")  # one for each module, until torch 2.11
    return [] if group is None else [group]


def fsdp2_types(group: Any) -> set[torch.dtype | None]:
    """What a parameter group's parameters are cast to; each of them has its own from torch 2.15 on."""
    if hasattr(group, "mp_policy"):
        return {group.mp_policy.param_dtype}
    return {_of(parameter, "mp_policy").param_dtype for parameter in _of(group, "fsdp_params")}


# Modules.


def call_of(module: nn.Module) -> Callable[..., Any]:
    """What ``module(...)`` runs, hooks and all, unless something stands in ``CALLED_FIRST``."""
    found: Callable[..., Any] = _of(module, "_call_impl")
    return found


CALLED_FIRST = "_compiled_call_impl"
"""The attribute of a module that its call looks at before anything else."""


MARK: Any = "kondo_hooks"
"""The key of what ``make_dynamo_call`` puts among a module's hooks; theirs are numbers."""


def make_dynamo_call(module: nn.Module) -> Callable[[], None]:
    """Have compiled code go through ``module(...)`` and what stands in ``CALLED_FIRST``; returns what ends that.

    Dynamo goes straight to ``forward`` where a module has no hooks: an entry that belongs to no hook and does nothing
    sends it through the call. Before torch 2.11 it goes on inside of that call, past the attribute, up to a hook that
    it must not trace.
    """
    hooks_with_kwargs(module)[MARK] = True
    if _version() < (2, 11):
        _of(module, "_forward_pre_hooks")[MARK] = _nothing

    def end() -> None:
        hooks_with_kwargs(module).pop(MARK, None)
        _of(module, "_forward_pre_hooks").pop(MARK, None)

    return end


@uncompiled
def _nothing(module: nn.Module, args: Any) -> None:
    """A forward pre-hook."""


def hooks_with_kwargs(module: nn.Module) -> dict[Any, bool]:
    """Which forward hooks of a module take keyword arguments."""
    found: dict[Any, bool] = _of(module, "_forward_hooks_with_kwargs")
    return found
