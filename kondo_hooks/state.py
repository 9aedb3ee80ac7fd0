"""What a replay must find as the screen did: training flags, buffers, random numbers, autocast."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class ModuleState:
    """The parts of a module that a replay must find as the screen did; lists are made once.

    Attributes:
        name: of the module's class.

    Args:
        module: the module.
        swaps_parameters: an engine puts other parameters, or views of them, into the modules while they run. Then
            parameters cannot be told by identity, nor tensors in attributes from them, and neither is looked at.
    """

    def __init__(self, module: nn.Module, swaps_parameters: bool = False):
        self.name = type(module).__name__
        self._swaps = swaps_parameters
        self._modules = list(module.modules())
        self._parameters = list(module.parameters())
        self._children = self._find_children()
        self._buffers = [(m, name) for m in self._modules for name in m._buffers if m._buffers[name] is not None]
        self._batch_norms = [m for m in self._modules if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._mutable: dict[tuple[bool, ...], list[tuple[nn.Module, str]]] = {}

    def _find_children(self) -> list[int]:
        kinds = ("_modules",) if self._swaps else ("_modules", "_parameters")
        return [id(child) for m in self._modules for kind in kinds for child in getattr(m, kind).values()]

    def flags(self) -> tuple[list[bool], list[bool]]:
        """Training flags of the modules, requires-grad flags of the parameters."""
        parameters = [] if self._swaps else self._parameters
        return [m.training for m in self._modules], [p.requires_grad for p in parameters]

    def trainable(self) -> bool:
        """Whether any parameter requires grad."""
        return any(p.requires_grad for p in self._parameters)

    def parameters(self) -> list[nn.Parameter]:
        """The parameters, each once."""
        return self._parameters

    def name_of(self, parameter: nn.Parameter) -> str:
        """What the model calls a parameter."""
        names = (name for name, p in self._modules[0].named_parameters() if p is parameter)
        return next(names, "a parameter")

    def buffers(self) -> list[Tensor]:
        """The buffers, as they are now."""
        return [buffer for m, name in self._buffers if (buffer := m._buffers[name]) is not None]

    def device(self) -> torch.device:
        """Of the parameters."""
        return next((p.device for p in self._parameters), torch.device("cpu"))

    def versions(self) -> list[int]:
        """In-place version of each parameter."""
        return [] if self._swaps else [p._version for p in self._parameters]

    def same_parameters(self) -> bool:
        """Whether the module still has the children and parameters that it had."""
        return self._children == self._find_children()

    def has_forward_hooks(self) -> bool:
        """Whether any module has a forward hook of the user's, which may keep what it sees."""
        return any(not _is_hosts(hook) for m in self._modules for hook in m._forward_hooks.values())

    @contextlib.contextmanager
    def kept_attributes(self) -> Iterator[list[str]]:
        """Put back tensors that a forward leaves in the modules' attributes.

        Yields a list that on exit holds the names of those that carried a graph: a loss that used them got no gradient
        from the screen.
        """
        before = self._tensors()
        left: list[str] = []
        try:
            yield left
        finally:
            for (module, name), tensor in self._tensors().items():
                old = before.get((module, name))
                if tensor is old:
                    continue
                made_of = {f"{name}_orig", f"{name}_v"}  # weight_norm and spectral_norm of old keep the result so
                if tensor.requires_grad and not made_of & module._parameters.keys():
                    left.append(f"{type(module).__name__}.{name}")
                if old is None:
                    del module.__dict__[name]
                else:
                    module.__dict__[name] = old

    def _tensors(self) -> dict[tuple[nn.Module, str], Tensor]:
        if self._swaps:
            return {}
        return {
            (m, name): value for m in self._modules for name, value in m.__dict__.items() if isinstance(value, Tensor)
        }

    def mixes_batch(self) -> str | None:
        """Name of the type of a batch norm that uses the statistics of its batch, if there is one."""
        for m in self._batch_norms:
            if m.training or m.running_mean is None:
                return type(m).__name__
        return None

    @contextlib.contextmanager
    def restored_flags(self, flags: tuple[list[bool], list[bool]]) -> Iterator[None]:
        """Training and requires-grad flags as ``flags``, and back."""
        now = self.flags()
        try:
            if now != flags:
                self._set_flags(flags)
            yield
        finally:
            if now != flags:
                self._set_flags(now)

    def _set_flags(self, flags: tuple[list[bool], list[bool]]) -> None:
        for m, training in zip(self._modules, flags[0], strict=True):
            m.training = training
        for p, requires_grad in zip(self._parameters, flags[1], strict=False):  # none where they are swapped
            p.requires_grad_(requires_grad)

    def buffers_before(self) -> "BufferRecord":
        """Take the values of the buffers that a forward may change: all at first, then those that did."""
        names = self._mutable.get(self._mode(), self._buffers)
        return BufferRecord([(m, n, m._buffers[n], _clone(m._buffers[n])) for m, n in names], self._versions())

    def note_changes(self, record: "BufferRecord") -> None:
        """After a screen: keep only the buffers that it changed, and look at no others in this mode again."""
        if (mode := self._mode()) not in self._mutable:
            record.entries = [e for e in record.entries if _changed(*e)]
            self._mutable[mode] = [(m, n) for m, n, *_ in record.entries]
        elif record.versions != self._versions():
            # One that did not change before did now: what it was is lost, but the replay must not change it again.
            known = {(id(m), n) for m, n, *_ in record.entries}
            for (m, n), version in zip(self._buffers, record.versions, strict=True):
                if (id(m), n) not in known and _version(m._buffers[n]) != version:
                    record.entries.append((m, n, m._buffers[n], _clone(m._buffers[n])))
                    self._mutable[mode].append((m, n))

    def _versions(self) -> list[int]:
        return [_version(m._buffers[n]) for m, n in self._buffers]

    def _mode(self) -> tuple[bool, ...]:
        return tuple(m.training for m in self._modules)


Buffer = tuple[nn.Module, str, Tensor | None, Tensor | None]


@dataclass
class BufferRecord:
    """Buffers as they were before a screen: (module, name, tensor, copy of its values), and all their versions."""

    entries: list[Buffer]
    versions: list[int]

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Run with copies that hold the values from before the screen; the module's own stay untouched."""
        now = [(module, name, module._buffers[name]) for module, name, *_ in self.entries]
        try:
            for module, name, _, values in self.entries:
                module._buffers[name] = _clone(values)
            yield
        finally:
            for module, name, buffer in now:
                module._buffers[name] = buffer


def _is_hosts(hook: object) -> bool:
    """Whether a hook is part of an engine, or of a library that trains the model."""
    function = getattr(hook, "func", hook)
    return (getattr(function, "__module__", None) or type(function).__module__).split(".")[0] in _HOSTS


_HOSTS = "torch deepspeed accelerate transformers trl peft lightning pytorch_lightning lightning_fabric".split()


def _changed(module: nn.Module, name: str, tensor: Tensor | None, values: Tensor | None) -> bool:
    """By value: batch norm's kernels write their statistics without counting up the tensor's version."""
    if module._buffers[name] is not tensor:
        return True
    return tensor is not None and values is not None and not torch.equal(tensor, values)


def _version(buffer: Tensor | None) -> int:
    return -1 if buffer is None else buffer._version


def _clone(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None else buffer.detach().clone()


RngState = list[tuple[torch.device, Tensor]]


def rng_state(devices: Iterable[torch.device]) -> RngState:
    """The state of the CPU's generator and of each accelerator among ``devices``."""
    state = [(torch.device("cpu"), torch.get_rng_state())]
    for device in sorted({d for d in devices if d.type not in ("cpu", "meta")}, key=str):
        state.append((device, torch.get_device_module(device.type).get_rng_state(device)))
    return state


def set_rng_state(state: RngState) -> None:
    """Put back what ``rng_state`` took."""
    for device, values in state:
        if device.type == "cpu":
            torch.set_rng_state(values)
        else:
            torch.get_device_module(device.type).set_rng_state(values, device)


def same_rng_state(a: RngState, b: RngState) -> bool:
    """Whether no random number was drawn between the two."""
    return all(torch.equal(x, y) for (_, x), (_, y) in zip(a, b, strict=True))


@contextlib.contextmanager
def forked_rng(state: RngState) -> Iterator[None]:
    """Run from ``state``; the user's stream goes on as if nothing had been drawn."""
    now = rng_state(device for device, _ in state)
    try:
        set_rng_state(state)
        yield
    finally:
        set_rng_state(now)


_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 8e-2}


@dataclass
class Autocast:
    """Autocast state of the CPU and of one accelerator."""

    states: list[tuple[str, bool, torch.dtype]]
    cache: bool

    @classmethod
    def current(cls, devices: Iterable[torch.device]) -> "Autocast":
        """As it is now."""
        kinds = sorted({"cpu"} | {device.type for device in devices if device.type != "meta"})
        return cls(
            [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds],
            torch.is_autocast_cache_enabled(),
        )

    def lowest(self, output: Tensor) -> torch.dtype:
        """The least precise type that an output was computed in, by what is known of it."""
        used = [output.real.dtype if output.is_complex() else output.dtype] + [d for _, on, d in self.states if on]
        return max((dtype for dtype in used if dtype in _TOLERANCE), key=_TOLERANCE.__getitem__)

    def tolerance(self, output: Tensor) -> float:
        """How far a row may come out otherwise in a batch of another size, relative to the largest value."""
        tolerance = _TOLERANCE[self.lowest(output)]
        tf32 = output.is_cuda and torch.backends.cuda.matmul.allow_tf32
        return max(tolerance, 1e-2) if tf32 else tolerance

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Autocast as it was."""
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.states:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=self.cache))
            yield
