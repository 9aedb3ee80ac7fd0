"""What a replay must find as the screen did: training flags, buffers, random numbers, autocast."""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import is_, sub
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kondo_hooks import private
from kondo_hooks.same.attributes import Attributes, version_of


class ModuleState:
    """The parts of a module that a replay must find as the screen did; lists are made once.

    Attributes:
        name: of the module's class.
        has_fast_path: whether layers in it take another path without grad, in eval mode.

    Args:
        module: the module.
        swaps_parameters: an engine puts other parameters, or views of them, into the modules while they run. Then
            parameters cannot be told by identity, and are not looked at.
    """

    def __init__(self, module: nn.Module, swaps_parameters: bool = False):
        self.name = type(module).__name__
        self._root = module
        self._swaps = swaps_parameters
        self.read()

    def read(self) -> None:
        """Make the lists, anew where layers were made late."""
        self._modules = list(self._root.modules())
        self._named_parameters = list(self._root.named_parameters())
        self._parameters = [parameter for _, parameter in self._named_parameters]
        kinds = ("_modules",) if self._swaps else ("_modules", "_parameters")
        self._children = [(m, kind, dict(getattr(m, kind).items())) for m in self._modules for kind in kinds]
        self._dropping_rnns = [m for m in self._modules if isinstance(m, nn.RNNBase) and m.dropout]
        kinds_with_fast_path = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
        self.has_fast_path = any(isinstance(m, kinds_with_fast_path) for m in self._modules)
        self._batch_norms = [m for m in self._modules if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        values = (value for m in self._modules for value in m.__dict__.values())
        self._generators = [value for value in values if isinstance(value, torch.Generator)]
        self._mutable: dict[tuple[bool, ...], set[tuple[int, str]]] = {}
        self._rewritten: set[tuple[int, str]] = set()  # with the values that they have, as DDP's broadcast does
        self._forgiven: dict[int, int] = {}
        self.attributes = Attributes(self._root)
        self._hooks = self._count_hooks()
        # Thousands of calls may wait for one backward, and hold these: those that are equal are one.
        self._last_flags: Flags = (), ()
        self._last_versions: Sequence[int] = ()

    def _count_hooks(self) -> int:
        hooks = (hooks for m in self._modules for hooks in (m._forward_hooks, m._forward_pre_hooks))
        return sum(len(each) - (private.MARK in each) for each in hooks)  # the gate's own is no news

    def has_new_hooks(self) -> bool:
        """Whether hooks were put on, or taken off, since this was last asked."""
        before, self._hooks = self._hooks, self._count_hooks()
        return before != self._hooks

    def is_unfinished(self) -> bool:
        """Whether the first forward is still to give parameters their shapes."""
        return any(is_lazy(p) for p in self._parameters)

    def flags(self) -> "Flags":
        """Training flags of the modules, requires-grad flags of the parameters."""
        parameters = [] if self._swaps else self._parameters
        flags = tuple([m.training for m in self._modules]), tuple([p.requires_grad for p in parameters])
        if flags != self._last_flags:
            self._last_flags = flags
        return self._last_flags

    def trainable(self) -> bool:
        """Whether any parameter requires grad."""
        return any(p.requires_grad for p in self._parameters)

    def parameters(self) -> list[nn.Parameter]:
        """The parameters, each once."""
        return self._parameters

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters, each once, with their names."""
        return self._named_parameters

    def name_of(self, parameter: nn.Parameter) -> str:
        """What the model calls a parameter."""
        return next((name for name, p in self._named_parameters if p is parameter), "a parameter")

    def buffers(self) -> list[Tensor]:
        """The buffers, as they are now."""
        return [buffer for m in self._modules if m._buffers for buffer in m._buffers.values() if buffer is not None]

    def buffers_with_graph(self) -> list[str]:
        """Names, in their modules, of the buffers that hold what a graph leads to."""
        every = (item for m in self._modules if m._buffers for item in m._buffers.items())
        return [name for name, buffer in every if buffer is not None and buffer.grad_fn is not None]

    def devices(self) -> set[torch.device]:
        """Where parameters and buffers are now."""
        return {tensor.device for tensor in (*self._parameters, *self.buffers())}

    def generators(self) -> list[torch.Generator]:
        """Generators of random numbers that the modules have of their own."""
        return self._generators

    def versions(self) -> Sequence[int]:
        """In-place version of each parameter, as the user's code has made it."""
        if self._swaps:
            return ()
        versions = tuple([version_of(p) for p in self._parameters])
        if self._forgiven:
            forgiven = [self._forgiven.get(id(p), 0) for p in self._parameters]
            versions = tuple(map(sub, versions, forgiven))
        if versions != self._last_versions:
            self._last_versions = versions
        return self._last_versions

    def forgive(self, before: Sequence[int]) -> None:
        """Do not count what was written to the parameters since their versions were ``before``."""
        for p, old, new in zip(self._parameters, before, self.versions(), strict=False):
            if new != old:
                self._forgiven[id(p)] = self._forgiven.get(id(p), 0) + new - old

    def same_parameters(self) -> bool:
        """Whether the module still has the children and parameters that it had."""
        return all(_same_children(getattr(module, kind), children) for module, kind, children in self._children)

    @contextlib.contextmanager
    def restored_children(self) -> Iterator[None]:
        """Children and parameters as every screen found them, and back."""
        if self.same_parameters():
            yield
            return
        now = [(module, kind, dict(getattr(module, kind).items())) for module, kind, _ in self._children]
        try:
            _set_children(self._children)
            yield
        finally:
            _set_children(now)

    def has_forward_hooks(self) -> bool:
        """Whether any module has a forward hook of the user's, which may keep what it sees."""
        return any(not _is_hosts(hook) for m in self._modules for hook in m._forward_hooks.values())

    @contextlib.contextmanager
    def plain_dropout(self) -> Iterator[None]:
        """RNNs with dropout run without cuDNN, which draws their masks from a state that nobody can put back."""
        if not any(m.training for m in self._dropping_rnns):
            yield
            return
        before = torch.backends.cudnn.enabled
        torch.backends.cudnn.enabled = False
        try:
            yield
        finally:
            torch.backends.cudnn.enabled = before

    def mixes_batch(self) -> str | None:
        """Name of the type of a batch norm that uses the statistics of its batch, if there is one."""
        for m in self._batch_norms:
            if m.training or m.running_mean is None:
                return type(m).__name__
        return None

    @contextlib.contextmanager
    def restored_flags(self, flags: "Flags") -> Iterator[None]:
        """Training and requires-grad flags as ``flags``, and back."""
        now = self.flags()
        try:
            if now != flags:
                self._set_flags(flags)
            yield
        finally:
            if now != flags:
                self._set_flags(now)

    def _set_flags(self, flags: "Flags") -> None:
        for m, training in zip(self._modules, flags[0], strict=True):
            m.training = training
        for p, requires_grad in zip(self._parameters, flags[1], strict=False):  # none where they are swapped
            p.requires_grad_(requires_grad)

    def buffers_before(self) -> "BufferRecord":
        """The buffers before a forward, and the values of those that it may change: all at first, then those it did."""
        held = [(m, dict(m._buffers.items())) for m in self._modules if m._buffers]
        if not held:
            return BufferRecord()
        mutable = self._mutable.get(self._mode())
        wanted = None if mutable is None else mutable | self._rewritten
        copies = {
            (id(m), name): _clone(buffer)
            for m, buffers in held
            for name, buffer in buffers.items()
            if buffer is not None and (wanted is None or (id(m), name) in wanted)
        }
        return BufferRecord(held, [version_of(b) for _, buffers in held for b in buffers.values()], copies)

    def note_changes(self, record: "BufferRecord") -> None:
        """After a screen: find the buffers that it changed, replaced, made or took away, and remember these.

        Values are compared only the first time in this mode: batch norm's kernels write without counting up a version.
        """
        if not record.held and not any(m._buffers for m in self._modules):
            return
        mutable = self._mutable.get(self._mode())
        entries: list[Buffer] = []
        versions = iter(record.versions)
        before = {id(m): buffers for m, buffers in record.held}
        for m, buffers in record.held:
            for name, old in buffers.items():
                key = (id(m), name)
                version, saved = next(versions), record.copies.get(key)
                if _get_buffer(m, name)[0] is not old:
                    in_place = old is not None and version_of(old) != version
                    entries.append((m, name, saved if in_place and saved is not None else old, True))
                elif (
                    old is not None
                    and (mutable is None or key in self._rewritten)
                    and _is_rewritten(old, version, saved)
                ):
                    self._rewritten.add(key)
                elif old is not None and (version_of(old) != version or (mutable is None and _differ(old, saved))):
                    # If nobody knew that it would change, what it was is lost; the replay must not change it again.
                    entries.append((m, name, saved if saved is not None else _clone(old), True))
                elif saved is not None and mutable is not None and key in mutable:
                    entries.append((m, name, saved, True))
        for m in self._modules:
            if m._buffers:
                known = before.get(id(m), {})
                entries += [(m, name, None, False) for name in m._buffers.keys() if name not in known]  # noqa: SIM118
        changed = {(id(m), name) for m, name, *_ in entries}
        self._mutable[self._mode()] = changed | (mutable or set())
        record.held, record.versions, record.copies, record.entries = (), (), {}, tuple(entries)

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """Run with copies of all buffers; the module's own stay as they are."""
        record = BufferRecord()
        record.entries = [(m, n, buffer, True) for m in self._modules if m._buffers for n, buffer in m._buffers.items()]
        now, hooks = self.attributes.take(), self._count_hooks()
        try:
            with record.restored():
                yield
        finally:
            if self._count_hooks() == hooks:  # what notes that hooks were put on has to stay with them
                self.attributes.put_back(now)

    def _mode(self) -> tuple[bool, ...]:
        return tuple(m.training for m in self._modules)


Flags = tuple[tuple[bool, ...], tuple[bool, ...]]
"""Training flags of the modules, requires-grad flags of the parameters."""


def _same_children(now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether a module has the same: a name that holds None, as a cache leaves it that was taken out, is no child."""
    if len(now) == len(before) and all(map(is_, now.values(), before.values())):
        return True
    mine, theirs = ([child for child in each.values() if child is not None] for each in (now, before))
    return len(mine) == len(theirs) and all(map(is_, mine, theirs))


def _set_children(children: list[tuple[nn.Module, str, dict[str, Any]]]) -> None:
    for module, kind, values in children:
        place = getattr(module, kind)
        if isinstance(place, dict) and not (
            list(place) == list(values) and all(map(is_, place.values(), values.values()))
        ):
            place.clear()
            place.update(values)


Buffer = tuple[nn.Module, str, Tensor | None, bool]
"""Of which module, its name, its value before a screen, and whether it was there."""


@dataclass
class BufferRecord:
    """The buffers that a screen changed, as they were before it.

    Attributes:
        held: all buffers before the screen, until it has run.
        versions: theirs.
        copies: the values of those that may change in place.
        entries: the buffers that it changed.
    """

    held: Sequence[tuple[nn.Module, dict[str, Tensor | None]]] = ()
    versions: Sequence[int] = ()
    copies: Mapping[tuple[int, str], Tensor | None] = field(default_factory=dict)
    entries: Sequence[Buffer] = ()

    def undo(self) -> None:
        """As it was before a screen, for another that takes its place."""
        for module, name, values, existed in self.entries:
            _put_buffer(module, name, _clone(values), existed)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Run with copies that hold the values from before the screen; the module's own stay untouched."""
        now = [(m, name, *_get_buffer(m, name)) for m, name, *_ in self.entries]
        try:
            for module, name, values, existed in self.entries:
                _put_buffer(module, name, _clone(values), existed)
            yield
        finally:
            for module, name, buffer, exists in now:
                _put_buffer(module, name, buffer, exists)


def _get_buffer(module: nn.Module, name: str) -> tuple[Tensor | None, bool]:
    return (module._buffers[name], True) if name in module._buffers else (None, False)


def _put_buffer(module: nn.Module, name: str, buffer: Tensor | None, exists: bool) -> None:
    if exists:
        module._buffers[name] = buffer
    elif name in module._buffers:
        del module._buffers[name]


def _is_hosts(hook: object) -> bool:
    """Whether a hook is part of an engine, or of a library that trains the model."""
    function = getattr(hook, "func", hook)
    return (getattr(function, "__module__", None) or type(function).__module__).split(".")[0] in _HOSTS


_HOSTS = "torch deepspeed accelerate transformers trl peft lightning pytorch_lightning lightning_fabric".split()


def _differ(buffer: Tensor, saved: Tensor | None) -> bool:
    """By value, where there are values to compare."""
    return saved is not None and _comparable(buffer) and not torch.equal(buffer, saved)


def _is_rewritten(buffer: Tensor, version: int, saved: Tensor | None) -> bool:
    """Whether it was written into, and holds the values that it held."""
    return version_of(buffer) != version and saved is not None and _comparable(buffer) and torch.equal(buffer, saved)


def _comparable(buffer: Tensor) -> bool:
    return buffer.layout == torch.strided and not buffer.is_meta


def _clone(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None else buffer.detach().clone()


RngSource = torch.device | torch.Generator
RngState = list[tuple[RngSource, Tensor]]


def rng_state(devices: Iterable[torch.device], generators: Iterable[torch.Generator] = ()) -> RngState:
    """The state of the CPU's generator, of each accelerator's among ``devices``, and of others."""
    accelerators = sorted({d for d in devices if d.type not in ("cpu", "meta")}, key=str)
    return states_of([torch.device("cpu"), *accelerators, *generators])


def rng_state_now(state: RngState) -> RngState:
    """The same generators' states as they are now."""
    return states_of(source for source, _ in state)


def states_of(sources: Iterable[RngSource]) -> RngState:
    """The states of generators, and of devices' own."""
    return [(source, _state(source)) for source in sources]


def _state(source: RngSource) -> Tensor:
    if isinstance(source, torch.Generator):
        return source.get_state()
    if source.type == "cpu":
        return torch.get_rng_state()
    module = torch.get_device_module(source.type)
    state: Tensor = module.get_rng_state() if source.type == "mps" else module.get_rng_state(source)
    return state


def set_rng_state(state: RngState) -> None:
    """Put back what ``rng_state`` took."""
    for source, values in state:
        if isinstance(source, torch.Generator):
            source.set_state(values)
        elif source.type == "cpu":
            torch.set_rng_state(values)
        elif source.type == "mps":  # there is one such device, and its functions take none
            torch.mps.set_rng_state(values)
        else:
            torch.get_device_module(source.type).set_rng_state(values, source)


def same_rng_state(a: RngState, b: RngState) -> bool:
    """Whether no random number was drawn between the two."""
    return all(torch.equal(x, y) for (_, x), (_, y) in zip(a, b, strict=True))


@contextlib.contextmanager
def forked_rng(state: RngState) -> Iterator[None]:
    """Run from ``state``; the user's stream goes on as if nothing had been drawn."""
    now = rng_state_now(state)
    try:
        set_rng_state(state)
        yield
    finally:
        set_rng_state(now)


_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 8e-2}


# By what float32 products are made of: as it comes out where those are rounded on the way.
_PRODUCTS = {"tf32": 1e-2, "bf16": _TOLERANCE[torch.bfloat16]}


def products(device: torch.device) -> str:
    """What float32 products are made of on a device: "tf32", "bf16", or else float32 itself."""
    return private.product_precision(device.type)


@dataclass(frozen=True)
class Autocast:
    """Autocast state of the CPU and of one accelerator."""

    states: tuple[tuple[str, bool, torch.dtype], ...]
    cache: bool

    @classmethod
    def current(cls, devices: Iterable[torch.device]) -> "Autocast":
        """As it is now."""
        kinds = sorted({"cpu"} | {device.type for device in devices if device.type != "meta"})
        states = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
        return _autocast(tuple(states), torch.is_autocast_cache_enabled())

    @property
    def enabled(self) -> bool:
        """Whether it was on for any device."""
        return any(on for _, on, _ in self.states)

    def off(self) -> "Autocast":
        """The same, switched off."""
        return Autocast(tuple((kind, False, dtype) for kind, _, dtype in self.states), self.cache)

    def lowest(self, output: Tensor, others: Iterable[torch.dtype] = ()) -> torch.dtype:
        """The least precise type that an output was computed in, by what is known of it, and of ``others``."""
        used = [output.real.dtype if output.is_complex() else output.dtype, *others]
        used += [dtype for _, on, dtype in self.states if on]
        return max((dtype for dtype in used if dtype in _TOLERANCE), key=_TOLERANCE.__getitem__)

    def tolerance(self, output: Tensor, others: Iterable[torch.dtype] = ()) -> float:
        """How far a row may come out otherwise in a batch of another size, relative to the largest value."""
        lowest = self.lowest(output, others)
        if lowest is torch.float32:
            return max(_TOLERANCE[lowest], _PRODUCTS.get(products(output.device), 0.0))
        return _TOLERANCE[lowest]

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Autocast as it was."""
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.states:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=self.cache))
            yield


_autocast = functools.lru_cache(Autocast)
