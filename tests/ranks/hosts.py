"""The table of engines. Each builds a host around a small model: what a user's loop calls."""

import contextlib
import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from tests.forks import compile_nothing

FEATURES, WIDTH, K = 6, 16, 7


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))


class Net(nn.Module):
    """A policy over K actions, for rows (B, 6) or sequences (B, T, 6); each position only sees those before."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(FEATURES, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, K)
        self.register_buffer("shift", torch.linspace(-0.1, 0.1, K))

    def forward(self, x):
        x = self.embed(x.to(self.embed.weight.dtype))
        if x.dim() == 3:
            x = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device).unsqueeze(-1)
        for block in self.blocks:
            x = block(x)
        return self.head(x) + self.shift.to(x.dtype)


def make_net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


class Counting(Net):
    """The same; it counts its calls, so those of a window are no batch."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def make_counting(seed: int = 0) -> Counting:
    torch.manual_seed(seed)
    return Counting()


@dataclass
class Host:
    """What a loop sees.

    Attributes:
        model: to be called, and gated.
        backward: of a loss.
        micro: context of the micro-batch i of n.
        step: clip, step and zero.
        full: the parameters, unsharded.
        divides: whether the host divides losses by the accumulation steps itself; it is then stepped at every
            micro-batch, and knows itself which of them end in an update.
    """

    model: nn.Module
    backward: Callable[[Tensor], Any]
    micro: Callable[[int, int], Any]
    step: Callable[[], Any]
    full: Callable[[], dict[str, Tensor]]
    divides: bool = False


LR = 0.1


def _plain_step(model: nn.Module, clip: float | None) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def step() -> None:
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ddp(net: nn.Module, accumulation: int, clip: float | None = None, syncs: bool = False, **options: Any) -> Host:
    model = DistributedDataParallel(net, **options)

    def micro(i: int, n: int) -> Any:
        return contextlib.nullcontext() if syncs or i == n - 1 else model.no_sync()

    def full() -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in net.named_parameters()}

    return Host(model, lambda loss: loss.backward(), micro, _plain_step(model, clip), full)


def fsdp1(net: nn.Module, accumulation: int, clip: float | None = None, half: bool = False, **options: Any) -> Host:
    if half:
        options["mixed_precision"] = MixedPrecision(torch.bfloat16, torch.float32)
    model = FullyShardedDataParallel(
        net, auto_wrap_policy=ModuleWrapPolicy({Block}), device_id=torch.device("cpu"), **options
    )

    def micro(i: int, n: int) -> Any:
        return contextlib.nullcontext() if i == n - 1 else model.no_sync()

    def full() -> dict[str, Tensor]:
        with FullyShardedDataParallel.summon_full_params(model):
            return {n.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for n, p in model.named_parameters()}

    optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def step() -> None:
        if clip:
            model.clip_grad_norm_(clip)
        optimizer.step()
        optimizer.zero_grad()

    return Host(model, lambda loss: loss.backward(), micro, step, full)


def fsdp2(
    net: nn.Module,
    accumulation: int,
    clip: float | None = None,
    half: bool = False,
    checkpointed: bool = False,
    syncs: bool = False,
    **options: Any,
) -> Host:
    if half:
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    if checkpointed:
        for i, block in enumerate(net.blocks):
            net.blocks[i] = checkpoint_wrapper(block)
    for block in net.blocks:
        fully_shard(block, **options)
    model = fully_shard(net, **options)

    @contextlib.contextmanager
    def micro(i: int, n: int) -> Any:
        model.set_requires_gradient_sync(syncs or i == n - 1)
        yield

    def full() -> dict[str, Tensor]:
        found = {n: p.full_tensor().detach().clone() for n, p in model.named_parameters()}
        return {n.replace("_checkpoint_wrapped_module.", ""): p for n, p in found.items()}

    return Host(model, lambda loss: loss.backward(), micro, _plain_step(model, clip), full)


def deepspeed(
    net: nn.Module, accumulation: int, stage: int, clip: float = 0.0, half: bool = False, offload: bool = False
) -> Host:
    import deepspeed

    compile_nothing()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": clip,
    }
    if half:
        config["bf16"] = {"enabled": True}
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)

    def full() -> dict[str, Tensor]:
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            return {n: p.detach().float().clone() for n, p in engine.module.named_parameters()}

    # Looked up at every call, as a loop does: the gate takes `backward` over inside its context.
    backward = lambda loss: engine.backward(loss)  # noqa: E731
    return Host(engine, backward, lambda i, n: contextlib.nullcontext(), engine.step, full, divides=True)


def accelerated(net: nn.Module, accumulation: int, kind: str, clip: float | None = None) -> Host:
    from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "FSDP_VERSION"):
        os.environ.pop(variable, None)
    options: dict[str, Any] = {}
    if kind.startswith("fsdp"):
        options["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=int(kind[-1]),
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            **({"use_orig_params": True} if kind == "fsdp1" else {"reshard_after_forward": True}),
        )
    if kind.startswith("zero"):
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulation,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": int(kind[-1]), "stage3_param_persistence_threshold": 0},
            "gradient_clipping": clip or 0.0,
        }
        options["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=config)
    cpu = not kind.startswith("zero")
    accelerator = Accelerator(cpu=cpu, gradient_accumulation_steps=accumulation, **options)
    if kind.startswith("fsdp"):
        # accelerate offers FSDP on accelerators alone; what it does with it is the same.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.device = torch.device("cpu")
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        PartialState._shared_state["device"] = torch.device("cpu")
        accelerator.state.fsdp_plugin = options["fsdp_plugin"]
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    model, optimizer = accelerator.prepare(net, optimizer)
    expected = {"p": DistributedDataParallel, "1": FullyShardedDataParallel, "2": FSDPModule}[kind[-1]] if cpu else None
    assert expected is None or isinstance(model, expected), type(model)
    assert cpu or type(model).__name__ == "DeepSpeedEngine", type(model)

    def step() -> None:
        if clip and accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()

    def full() -> dict[str, Tensor]:
        inner = model
        if kind.startswith("zero"):
            import deepspeed

            with deepspeed.zero.GatheredParameters(list(inner.module.parameters())):
                return {n: p.detach().float().clone() for n, p in inner.module.named_parameters()}
        if kind == "fsdp1":
            with FullyShardedDataParallel.summon_full_params(model):
                return {n.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for n, p in model.named_parameters()}
        found = {}
        for n, p in inner.named_parameters():
            found[n.removeprefix("module.")] = (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        return found

    return Host(model, accelerator.backward, lambda i, n: accelerator.accumulate(model), step, full, divides=True)


@dataclass(frozen=True)
class HostCase:
    """A row of the table. ``exact`` engines are compared with the single-process reference at fp32 precision."""

    name: str
    build: Callable[..., Host]
    options: dict[str, Any]
    exact: bool = True


def _case(name: str, build: Callable[..., Host], exact: bool = True, **options: Any) -> HostCase:
    return HostCase(name, build, options, exact)


HOSTS = {
    case.name: case
    for case in [
        _case("ddp", ddp),
        _case("ddp-unused", ddp, find_unused_parameters=True),
        _case("ddp-static", ddp, static_graph=True, syncs=True),  # DDP itself refuses it with no_sync
        _case("ddp-view-clip", ddp, gradient_as_bucket_view=True, clip=0.05),
        _case("fsdp1", fsdp1, use_orig_params=False),
        _case("fsdp1-orig", fsdp1, use_orig_params=True, clip=0.05),
        _case("fsdp1-bf16", fsdp1, exact=False, half=True, use_orig_params=True),
        _case("fsdp2", fsdp2, clip=0.05),
        _case("fsdp2-noreshard", fsdp2, reshard_after_forward=False),
        _case("fsdp2-checkpointed", fsdp2, checkpointed=True),
        _case("fsdp2-syncs", fsdp2, syncs=True),
        _case("fsdp2-bf16", fsdp2, exact=False, half=True),
        _case("zero0", deepspeed, stage=0),
        _case("zero1-clip", deepspeed, stage=1, clip=0.05),
        _case("zero2", deepspeed, stage=2),
        _case("zero2-offload", deepspeed, stage=2, offload=True),
        _case("zero3-clip", deepspeed, stage=3, clip=0.05),
        _case("zero1-bf16", deepspeed, exact=False, stage=1, half=True),
        _case("zero3-bf16", deepspeed, exact=False, stage=3, half=True),
        _case("accelerate-ddp-clip", accelerated, kind="ddp", clip=0.05),
        _case("accelerate-fsdp1", accelerated, kind="fsdp1"),
        _case("accelerate-fsdp2", accelerated, kind="fsdp2"),
        _case("accelerate-zero2", accelerated, kind="zero2"),
        _case("accelerate-zero3", accelerated, kind="zero3"),
    ]
}


def build(case: HostCase, net: nn.Module, accumulation: int) -> Host:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return case.build(copy.deepcopy(net), accumulation, **case.options)
