"""What a forward finds and leaves in its modules' attributes, and in the lists, dicts and objects that these hold.

A snapshot notes which objects stand where. A screen is put between two of them: tensors that are new are outputs of its
node, and a replay runs on what stood there before.
"""

import collections
import contextlib
import enum
import functools
import sys
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from kondo_hooks.rows.tree import attributes, is_atom, resized, set_attribute, shallow_copy

# Of torch, and of ZeRO, whose hooks count in the modules what a backward has still to do.
_INTERNAL = frozenset(nn.Module().__dict__) | {"_compiled_call_impl"}
_INTERNAL |= {"applied_pre_backward_ref_cnt", "pre_bwd_fn", "post_bwd_fn", "all_parameters"}
_INTERNAL |= {"_external_params", "_original_parameters"}
_PLAIN = (type, nn.Module, types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
# Their objects are configurations, engines, optimizers and the like.
_FOREIGN = {"torch", "numpy", "transformers", "peft", "trl", "datasets", "deepspeed", "accelerate", "lightning"}
_FOREIGN |= {"pytorch_lightning", "lightning_fabric"}
_ENGINES = ("torch.distributed", "torch.nn.parallel", "torch._dynamo", "torch.jit", "deepspeed", "accelerate")
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel")  # and what others derive from them
_HOLDERS = (list, dict, collections.deque, collections.UserDict, collections.UserList, types.SimpleNamespace)
_LONG, _MANY, _DEEP = 300, 2000, 8
_MOST_BYTES = 1 << 26
_MISSING: Any = object()

Content = dict[Any, Any] | list[Any]


@dataclass(eq=False, slots=True)
class Record:
    """What one module, object, dict or list holds.

    Attributes:
        path: from the model.
        place: the module, object or container.
        content: a shallow copy of its items, or of its attributes.
        named: whether these are attributes.
        plain: whether nothing in it can hold a tensor.
    """

    path: str
    place: Any
    content: Content
    named: bool
    plain: bool = False

    def items(self) -> Iterator[tuple[str, Any]]:
        """Paths and what stands there."""
        if isinstance(self.content, list):
            for i, value in enumerate(self.content):
                yield f"{self.path}[{i}]", value
        elif self.named:
            dot = "." if self.path else ""
            for name, value in self.content.items():
                yield f"{self.path}{dot}{name}", value
        else:
            for i, (key, value) in enumerate(self.content.items()):
                yield f"{self.path}[{key!r}]" if isinstance(key, (str, int)) else f"{self.path}[#{i}]", value

    def same(self, other: "Record") -> bool:
        """Whether the same objects stand in the same place."""
        return self is other or (
            self.place is other.place and self.named == other.named and _same(self.content, other.content)
        )


def _same(a: Content, b: Content) -> bool:
    if len(a) != len(b):
        return False
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(map(is_, a.values(), b.values()))
    return all(map(is_, a, b))


class Snapshot:
    """Records of the modules, and then of what their attributes hold."""

    def __init__(self, records: list[Record]):
        self.records = records
        self._tensors: dict[str, Tensor] | None = None

    def same(self, other: "Snapshot") -> bool:
        """Whether nothing was put anywhere between the two."""
        return self is other or (
            len(self.records) == len(other.records)
            and all(a is b or a.same(b) for a, b in zip(self.records, other.records, strict=True))
        )

    def tensors(self) -> Mapping[str, Tensor]:
        """By path, all but parameters."""
        if self._tensors is None:
            self._tensors = self._find_tensors()
        return self._tensors

    def _find_tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for record in self.records:
            if record.plain:
                continue
            parameters = record.place._parameters if isinstance(record.place, nn.Module) else {}
            for path, value in record.items():
                if isinstance(value, (Tensor, tuple)) and not _is_computed(path, parameters):
                    found.update(_tensors_in(value, path))
        return found

    def put(self, now: "Snapshot", replaced: Mapping[int, Any]) -> None:
        """Put everything back where it stood.

        Args:
            now: what stands there.
            replaced: objects to be put in the place of others, by the ids of these.
        """
        unchanged = {id(record) for record in now.records}
        for record in self.records:
            content = record.content if record.plain or not replaced else _replaced(record.content, replaced)
            if content is not record.content or id(record) not in unchanged:
                _put(record, content)

    def substitute(self, replaced: Mapping[int, Any]) -> None:
        """Put objects in the place of others, by the ids of these, where nothing else has moved since."""
        shapes: dict[int, torch.Size] = {}
        for record in reversed(self.records):  # what is inside comes first
            if record.plain:
                continue
            content = _replaced(record.content, replaced)
            if isinstance(record.place, Distribution) and isinstance(record.content, dict):
                content = _with_shape(record.content, content, shapes)
                shapes[id(record.place)] = content["_batch_shape"]
            if content is not record.content:
                _put(record, content)

    def replace(self, replaced: Mapping[int, Any]) -> "Snapshot":
        """The same with other objects in the places of some, by the ids of these."""
        records = []
        for record in self.records:
            place = replaced.get(id(record.place), record.place)
            content = record.content if record.plain else _replaced(record.content, replaced)
            if place is not record.place or content is not record.content:
                record = Record(record.path, place, content, record.named, record.plain)
            records.append(record)
        return Snapshot(records)


def _with_shape(before: dict[str, Any], after: Any, shapes: Mapping[int, torch.Size]) -> dict[str, Any]:
    """A distribution's attributes with the batch shape of its new parameters, or of the distribution in it."""
    size = before["_batch_shape"]
    new = resized(size, before, after)
    for value in before.values():
        if isinstance(value, Distribution) and (inner := shapes.get(id(value))) is not None:
            new = torch.Size([*inner[: len(size)]])
    return after if new == size else {**after, "_batch_shape": new}


def _is_computed(path: str, parameters: Mapping[str, Any]) -> bool:
    """Whether an attribute is the weight that weight_norm or spectral_norm of old compute from parameters."""
    name = path.rpartition(".")[2]
    return bool(parameters) and (f"{name}_orig" in parameters or f"{name}_v" in parameters)


def _tensors_in(value: Any, path: str, depth: int = _DEEP) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if not _is_parameter(value):
            yield path, value
    elif isinstance(value, tuple) and depth and len(value) <= _LONG:
        for i, item in enumerate(value):
            yield from _tensors_in(item, f"{path}[{i}]", depth - 1)


def _replaced(content: Content, replaced: Mapping[int, Any]) -> Content:
    new: Content
    if isinstance(content, list):
        new = [_replace(value, replaced) for value in content]
    else:
        new = {key: _replace(value, replaced) for key, value in content.items()}
    return content if _same(new, content) else new


def _replace(value: Any, replaced: Mapping[int, Any]) -> Any:
    if id(value) in replaced:
        return replaced[id(value)]
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        items = [_replace(item, replaced) for item in value]
        if not all(map(is_, items, value)):
            return tuple(items) if type(value) is tuple else tuple.__new__(type(value), items)
    return value


def _content(place: Any, named: bool) -> Content:
    if named:
        return dict(attributes(place))
    return dict(dict.items(place)) if isinstance(place, dict) else list(place)


def _put(record: Record, content: Content) -> None:
    """Make a place hold ``content`` again."""
    place = record.place
    if isinstance(place, nn.Module):
        _put_attributes(place, content)
    elif _same(now := _content(place, record.named), content):
        return
    elif isinstance(content, list):
        if isinstance(place, list):
            list.__setitem__(place, slice(None), content)
        else:
            place.clear()
            place.extend(content)
    elif record.named:
        for name in [name for name in now if name not in content]:
            object.__delattr__(place, name)
        for name, value in content.items():
            set_attribute(place, name, value)
    else:
        kind: Any = collections.OrderedDict if isinstance(place, collections.OrderedDict) else dict
        kind.clear(place)
        for key, value in content.items():
            kind.__setitem__(place, key, value)


def _put_attributes(module: nn.Module, content: Any) -> None:
    own = module.__dict__
    for name in [
        n for n, value in own.items() if not _is_internal(n) and n not in content and not _is_parameter(value)
    ]:
        del own[name]
    for name, value in content.items():
        now = own.get(name, _MISSING)
        # What has become a parameter, a buffer or a submodule meanwhile was made late, and stays.
        late = now is _MISSING and any(name in kind for kind in (module._parameters, module._buffers, module._modules))
        if now is not value and not late and not _is_parameter(now):
            own[name] = value


def _is_internal(name: str) -> bool:
    return name in _INTERNAL or name.startswith("ds_")


def _is_parameter(value: Any) -> bool:
    """A parameter, or the view of FSDP's flat one that stands in its place while a module runs."""
    return isinstance(value, nn.Parameter) or (
        isinstance(value, Tensor) and getattr(value._base, "_is_flat_param", False)
    )


def _looks_into(kind: type) -> bool:
    """Whether objects of this type may keep what a forward leaves."""
    if issubclass(kind, _HOLDERS):
        return True
    if issubclass(kind, (Tensor, nn.Module, type, enum.Enum, tuple, torch.optim.Optimizer, BaseException)):
        return False
    root = kind.__module__.partition(".")[0]
    if root == "torch":
        return kind.__module__.startswith("torch.distributions")
    return root not in _FOREIGN and root not in sys.stdlib_module_names


_is_looked_into: Callable[[type], bool] = functools.cache(_looks_into)


def _read(path: str, value: Any) -> Iterator[Record]:
    """What an object holds: its items, its attributes or both."""
    container = isinstance(value, (list, dict, collections.deque))
    if container and len(value) <= _LONG:
        yield Record(path, value, _content(value, False), False)
    if container and type(value) in (list, dict, collections.deque, collections.OrderedDict):
        return
    content = dict(attributes(value))
    # What holds a model or an optimizer is its trainer or engine.
    owner = any(isinstance(item, (nn.Module, torch.optim.Optimizer)) for item in content.values())
    if content and len(content) <= _LONG and not owner:
        yield Record(path, value, content, True)


def _is_plain(value: Any) -> bool:
    return is_atom(value) or (isinstance(value, _PLAIN) and not isinstance(value, Tensor))


def _is_engine(module: nn.Module) -> bool:
    """Whether a module is a wrapper of an engine, or a script, whose attributes are their own affair."""
    kinds = [kind for kind in type(module).__mro__ if not kind.__module__.startswith("torch.distributed")]
    wrapper = any(kind.__name__ in _WRAPPERS and kind.__module__.startswith("torch.") for kind in type(module).__mro__)
    return wrapper or kinds[0] is nn.Module or kinds[0].__module__.startswith(_ENGINES)


@dataclass
class Before:
    """What stood in the attributes before a forward; by path the tensors there, their versions and copies of some."""

    snapshot: Snapshot
    tensors: Mapping[str, Tensor]
    versions: list[int]
    copies: dict[str, Tensor]


@dataclass
class Change:
    """What a forward made of the attributes.

    Attributes:
        before: what stood there, without graphs; a stub stands for each of ``states``.
        after: what stands there, until its tensors have got a graph.
        new: tensors that it left, by path, until then.
        paths: of these.
        states: tensors with rows that it replaced, by path: what it may have read of the last call.
        stubs: what stands for them.
        written: tensors that it wrote into, and their values from before.
        numbers: numbers in the modules' attributes that it changed, by module and name, as it left them.
        changes_state: whether the next call finds other things than this one did, but for tensors with rows.
    """

    before: Snapshot
    after: Snapshot | None = None
    new: dict[str, Tensor] = field(default_factory=dict)
    paths: Sequence[str] = ()
    states: dict[str, Tensor] = field(default_factory=dict)
    stubs: Sequence[Tensor] = ()
    written: Sequence[tuple[Tensor, Tensor]] = ()
    numbers: dict[tuple[nn.Module, str], Any] = field(default_factory=dict)
    changes_state: bool = False


class Attributes:
    """The attributes of a model's modules, and what was learned of them.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module):
        self._modules = [(name, m) for name, m in model.named_modules() if not _is_engine(m)]
        self._known: list[Record | None] = [None] * len(self._modules)
        self._inside: list[list[tuple[str, Any]]] = [[] for _ in self._modules]
        self._starts = [0] * len(self._modules)
        # Paths but for the indices of lists.
        self._written: set[str] = set()
        self._not_written: set[str] = set()
        self._graphs: dict[str, bool] = {}
        self._unread: set[str] = set()
        # Thousands of calls may wait for one backward: what each of them found is one object if it is the same.
        self._last = Snapshot([])
        self._unchanged: Change | None = None
        self.counts = False

    def take(self, also: Iterable[Record] = ()) -> Snapshot:
        """A snapshot; ``also`` are records of another, whose places are looked at, too."""
        records: list[Record] = []
        found: list[tuple[str, Any]] = []
        for i, (name, module) in enumerate(self._modules):
            record, own, start = self._known[i], module.__dict__, self._starts[i]
            if (
                record is None
                or len(own) != start + len(record.content)
                or not all(map(is_, islice(own.values(), start, None), record.content.values()))  # type: ignore[union-attr]
                or list(islice(own, start, None)) != list(record.content)
            ):
                record = self._read_module(i, name, module)
            records.append(record)
            found += self._inside[i]
        if not (found or also):
            if len(records) != len(self._last.records) or not all(map(is_, records, self._last.records)):
                self._last = Snapshot(records)
            return self._last
        seen = {(id(record.place), True) for record in records}
        if found:
            self._walk(found, records, seen)
        for other in also:
            if (key := (id(other.place), other.named)) not in seen and not isinstance(other.place, nn.Module):
                seen.add(key)
                records.append(Record(other.path, other.place, _content(other.place, other.named), other.named))
        return Snapshot(records)

    def _read_module(self, i: int, name: str, module: nn.Module) -> Record:
        own = module.__dict__
        content = {n: value for n, value in own.items() if not _is_internal(n) and not _is_parameter(value)}
        plain = all(map(_is_plain, content.values()))
        record = self._known[i] = Record(name, module, content, True, plain)
        self._starts[i] = len(own) - len(content)
        self._inside[i] = [] if plain else [item for item in record.items() if not _is_plain(item[1])]
        return record

    def _walk(self, found: list[tuple[str, Any]], records: list[Record], seen: set[tuple[int, bool]]) -> None:
        stack = [(path, value, _DEEP) for path, value in reversed(found)]
        most = len(records) + _MANY
        while stack and len(records) < most:
            path, value, depth = stack.pop()
            inside: list[tuple[str, Any]] = []
            if isinstance(value, tuple) and len(value) <= _LONG:
                inside = [(f"{path}[{i}]", item) for i, item in enumerate(value)]
            elif not isinstance(value, Tensor) and _is_looked_into(type(value)):
                for record in _read(path, value):
                    if (key := (id(value), record.named)) not in seen:
                        seen.add(key)
                        records.append(record)
                        inside += record.items()
            if depth:
                stack += [(p, item, depth - 1) for p, item in reversed(inside) if not _is_plain(item)]

    def before(self) -> Before:
        """Before a forward. Tensors that it may write into are copied: all at first, then those that it did."""
        snapshot = self.take()
        tensors = snapshot.tensors()
        copies = {}
        for path, tensor in tensors.items():
            if without_indices(path) not in self._not_written and tensor.numel() * tensor.element_size() <= _MOST_BYTES:
                copies[path] = tensor.detach().clone()
        return Before(snapshot, tensors, [version_of(tensor) for tensor in tensors.values()], copies)

    def with_graphs(self, before: Before) -> dict[str, Tensor]:
        """Tensors with a graph that stand there before a forward, but for those that it is known not to read."""
        return {
            path: tensor
            for path, tensor in before.tensors.items()
            if tensor.grad_fn is not None and without_indices(path) not in self._unread
        }

    def read_of(self, carried: Iterable[str], read: Sequence[bool]) -> list[str]:
        """Paths of those that the forward has read; the others are not looked at again."""
        each = dict(zip(carried, read, strict=True))
        self._unread |= {without_indices(path) for path, found in each.items() if not found}
        return [path for path, found in each.items() if found]

    def compare(self, before: Before, has_rows: Callable[[Tensor], bool]) -> Change:
        """After the forward.

        Args:
            before: of it.
            has_rows: whether a tensor holds the rows of the batch.
        """
        after = self.take()
        written: list[tuple[Tensor, Tensor]] = []
        known = {id(tensor) for tensor in before.tensors.values()}
        for (path, tensor), version in zip(before.tensors.items(), before.versions, strict=True):
            key = without_indices(path)
            if version_of(tensor) != version:
                self._written.add(key)
                self._not_written.discard(key)
                known.discard(id(tensor))
                saved = before.copies.get(path)
                # If nobody knew that it would change, what it was is lost; the replay must not change it again.
                written.append((tensor, tensor.detach().clone() if saved is None else saved))
            elif key not in self._written:
                self._not_written.add(key)
        graphs = [tensor for tensor in before.tensors.values() if tensor.grad_fn is not None]
        if not written and not graphs and after is before.snapshot:
            if self._unchanged is None or self._unchanged.before is not after:
                self._unchanged = Change(after)
            return self._unchanged
        change = Change(before.snapshot, written=written)
        replaced: dict[int, Any] = {}
        if written or not after.same(before.snapshot):
            found = after.tensors()
            change.after = after
            earlier = _numbers(before.snapshot)
            later = _numbers(after)
            change.numbers = {key: value for key, value in later.items() if earlier.get(key) != value}
            change.new = {
                path: tensor
                for path, tensor in found.items()
                if id(tensor) not in known and (tensor.is_floating_point() or tensor.is_complex())
            }
            change.paths = list(change.new)
            gone = {path: tensor for path, tensor in before.tensors.items() if found.get(path) is not tensor}
            change.states = {path: tensor for path, tensor in gone.items() if has_rows(tensor)}
            lost = any(tensor.grad_fn is None for path, tensor in gone.items() if path not in change.states)
            change.changes_state = bool(lost or written or _facts_differ(before.snapshot, after, change.numbers))
            # What the forward has replaced is copied: it may hold tensors whose graph leads to this call.
            reached = {id(record.place) for record in after.records}
            for record in before.snapshot.records:
                if id(record.place) not in reached:
                    with contextlib.suppress(Exception):
                        replaced[id(record.place)] = shallow_copy(record.place)
        for tensor in change.states.values():
            replaced[id(tensor)] = torch.empty((0,) * tensor.dim(), dtype=tensor.dtype, device=tensor.device)
        change.stubs = [replaced[id(tensor)] for tensor in change.states.values()]
        change.states = {path: tensor.detach() for path, tensor in change.states.items()}
        for tensor in graphs:
            replaced.setdefault(id(tensor), tensor.detach())
        if replaced:
            change.before = before.snapshot.replace(replaced)
        return change

    @contextlib.contextmanager
    def as_before(self, change: Change, states: Sequence[Tensor]) -> Iterator[None]:
        """Run on what stood there before a screen; then everything is where it is now again.

        Args:
            change: that the screen made.
            states: rows of the tensors that it replaced.
        """
        now = self.take(change.before.records)
        replaced = {id(stub): rows for stub, rows in zip(change.stubs, states, strict=True)}
        replaced |= {id(tensor): values.clone() for tensor, values in change.written}
        change.before.put(now, replaced)
        counted: dict[tuple[nn.Module, str], Any] = {}
        try:
            yield
            if self.counts:
                # Only what a screen leaves alone, or makes at zero: it is counted where there is a graph.
                idle = {key: 0 for key, value in change.numbers.items() if value == 0}
                idle |= {key: n for key, n in _numbers(change.before).items() if key not in change.numbers}
                counted = {key: n - idle[key] for key, n in _numbers(self.take()).items() if key in idle}
        finally:
            self.put_back(now)
            for (module, name), more in counted.items():
                if more and type(module.__dict__.get(name)) is int:
                    module.__dict__[name] += more

    def put_back(self, snapshot: Snapshot) -> None:
        """Put everything where it stood in an earlier snapshot."""
        snapshot.put(self.take(snapshot.records), {})

    def undo(self, change: Change) -> None:
        """As it was before a screen, for another that takes its place."""
        for tensor, values in change.written:
            tensor.detach().copy_(values)
        states = {id(stub): tensor for stub, tensor in zip(change.stubs, change.states.values(), strict=True)}
        change.before.put(self.take(change.before.records), states)

    # Which of the tensors that a forward leaves have a graph when it runs with one.

    def unknown(self, change: Change) -> bool:
        """Whether that is not known yet of a tensor that a forward left."""
        return any(without_indices(path) not in self._graphs for path in change.paths)

    def with_graph(self, change: Change, otherwise: bool) -> list[str]:
        """Paths of those that have one; ``otherwise`` is said where that is not known."""
        return [path for path in change.paths if self._graphs.get(without_indices(path), otherwise)]

    def learn(self, change: Change, left: Mapping[str, Tensor]) -> list[str]:
        """Learn it from what stands in the attributes after a run with a graph; returns the paths of a graph."""
        graphs = []
        for path in change.paths:
            if path in left:
                key, has_graph = without_indices(path), left[path].grad_fn is not None
                self._graphs[key] = self._graphs.get(key, False) or has_graph
                graphs += [path] if has_graph else []
        return graphs


def without_indices(path: str) -> str:
    """A path in which indices do not count: a list grows."""
    return "[".join("]" + part.partition("]")[2] if part[:1].isdigit() else part for part in path.split("["))


def same_facts(a: Change, b: Change) -> bool:
    """Whether two calls found the same but for tensors and for numbers that they count themselves."""
    return not _facts_differ(a.before, b.before, a.numbers.keys() | b.numbers.keys())


def _numbers(snapshot: Snapshot) -> dict[tuple[nn.Module, str], Any]:
    """What stands in the modules' own attributes and is a number."""
    return {
        (record.place, name): value
        for record in snapshot.records
        if isinstance(record.place, nn.Module) and isinstance(record.content, dict)
        for name, value in record.content.items()
        if type(value) is int
    }


def _facts_differ(a: Snapshot, b: Snapshot, but: Collection[tuple[nn.Module, str]]) -> bool:
    """Whether other plain values, modules or containers stand in the places of one than of the other, but for some."""
    if len(a.records) != len(b.records):
        return True
    return any(x is not y and not _all_alike(x, y, but) for x, y in zip(a.records, b.records, strict=True))


def _all_alike(x: Record, y: Record, but: Collection[tuple[nn.Module, str]]) -> bool:
    dot = "." if x.path else ""
    ignored = {f"{x.path}{dot}{name}" for module, name in but if module is x.place}
    mine, theirs = ([item for item in record.items() if item[0] not in ignored] for record in (x, y))
    return (
        x.path == y.path
        and len(mine) == len(theirs)
        and all(p == q and _alike(a, b) for (p, a), (q, b) in zip(mine, theirs, strict=True))
    )


def _alike(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    if is_atom(a):
        return bool(a == b)
    return isinstance(a, Tensor) or _is_looked_into(type(a))


def version_of(tensor: Tensor | None) -> int:
    """How often a tensor was written to; what was made in inference mode cannot be, and does not count."""
    return -1 if tensor is None or tensor.is_inference() else tensor._version
