"""Nested containers: their tensors found by path, and replaced.

Knows containers and objects, and nothing of rows or gates.
"""

import collections
import copy
import dataclasses
import enum
import functools
import gc
import types
import weakref
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from kondo_hooks.rows.encoded import Encoded, is_array

Tree = Any

_Handler = Callable[["Walk", Any, str], Any]
_OPEN = object()
"""Stands for a container whose items are being visited."""
_MOST_OBJECTS = 10_000


def map_tensors(
    fn: Callable[[str, Tensor], Any],
    tree: Tree,
    path: str = "",
    other: Callable[[Any], None] | None = None,
) -> Tree:
    """Rebuild ``tree`` with every tensor replaced by ``fn(path, tensor)``.

    Goes through tuples, lists, dicts, deques and whatever has attributes or slots: dataclasses, namespaces,
    distributions, mappings of all kinds. A container in which nothing changes is returned itself. A tensor or container
    that stands at several paths is visited once, and is one object in the result, too.

    Args:
        fn: gets the first path of a tensor.
        tree: what to go through.
        path: of ``tree``.
        other: shown everything that is no tensor and cannot be gone through.
    """
    return Walk(fn, other)(tree, path)


def flatten(tree: Tree, path: str = "") -> tuple[list[str], list[Tensor]]:
    """The paths and tensors of ``tree``, each tensor once, in the order in which ``map_tensors`` meets them."""
    if isinstance(tree, Tensor):
        return [path], [tree]
    paths: list[str] = []
    leaves: list[Tensor] = []

    def collect(path: str, leaf: Tensor) -> Tensor:
        paths.append(path)
        leaves.append(leaf)
        return leaf

    Walk(collect)(tree, path)
    return paths, leaves


def unflatten(tree: Tree, leaves: Sequence[Any]) -> Tree:
    """``tree`` with its tensors replaced, in order, by ``leaves``."""
    remaining = iter(leaves)
    return map_tensors(lambda _path, _leaf: next(remaining), tree)


class Walk:
    """One way through one or more trees; what they share is visited once.

    Args:
        fn: ``map_tensors``'s.
        other: ``map_tensors``'s.
        own: ids of the containers that are changed in place, where others are copied.
        fresh: copy every container that a model could write into, whether something in it changes or not, and the
            objects that hold tensors.
        everything: copy all objects.
        wanted: paths of lists that are to be replaced.
        repeat: call ``fn`` for a tensor at each of its paths.
        encode: may have a tensor stand in for a list, tuple, array or tensor of another layout, given its path.
        decode: put what a tensor stands for in its place again.

    Attributes:
        memo: what became of every tensor and container, by id.
        copies: how many containers were copied.
        objects: how many objects other than Python's own containers were met.
        spare: copies of the objects that were not copied, as they were.
    """

    __slots__ = (
        "copies",
        "decode",
        "encode",
        "everything",
        "fn",
        "fresh",
        "memo",
        "objects",
        "other",
        "own",
        "repeat",
        "shared",
        "spare",
        "wanted",
    )

    def __init__(
        self,
        fn: Callable[[str, Tensor], Any],
        other: Callable[[Any], None] | None = None,
        own: Container[int] = (),
        fresh: bool = False,
        everything: bool = False,
        wanted: Collection[str] = (),
        repeat: bool = False,
        encode: Callable[[str, Any], Encoded | None] | None = None,
        decode: bool = False,
    ):
        self.fn = fn
        self.other = other
        self.own = own
        self.fresh = fresh
        self.everything = everything
        self.wanted = wanted
        self.spare: list[tuple[Any, Any]] = []
        self.repeat = repeat
        self.encode = encode
        self.decode = decode
        self.shared: dict[Any, Any] = {}
        self.memo: dict[int, Any] = {}
        self.copies = 0
        self.objects = 0

    def __call__(self, tree: Tree, path: str = "") -> Tree:
        """``tree`` with what ``fn`` makes of its tensors."""
        handler = _handler(type(tree))
        if handler is None:
            if self.other is not None:
                self.other(tree)
            return tree
        key = id(tree)
        found = self.memo.get(key, self)
        if found is self or (self.repeat and handler is _tensor):
            self.memo[key] = _OPEN
            found = self.memo[key] = handler(self, tree, path)
        elif found is _OPEN:  # a cycle: the copy is made now, and filled when its items are known
            found = self.memo[key] = tree if isinstance(tree, tuple) else self._copy(tree)
        return found

    def place(self, tree: Tree, changed: Any) -> Tree:
        """Where the changed items of a mutable container go: into a copy, if there has to be one."""
        early = self.memo[id(tree)]
        if early is not _OPEN:
            return early
        return self._copy(tree) if changed or self.fresh else tree

    def _copy(self, tree: Tree) -> Tree:
        if id(tree) in self.own:
            return tree
        self.copies += 1
        return shallow_copy(tree)


def _tensor(walk: Walk, tree: Tensor, path: str) -> Any:
    if walk.encode is not None and (tree.layout is not torch.strided or tree.is_nested):
        encoded = walk.encode(path, tree)
        if encoded is not None:
            return _encoded(walk, encoded, path, tree)
    return walk.fn(path, tree)


def _encoded(walk: Walk, tree: Encoded, path: str, given: Any = None) -> Any:
    """What stands in for a value; ``given`` is that value, if it was met itself."""
    new = walk.fn(path, tree.part)
    if walk.decode:
        return given if given is not None and new is tree.part else tree.decode(new, walk.shared)
    return tree if new is tree.part else dataclasses.replace(tree, part=new)


def _array(walk: Walk, tree: Any, path: str) -> Any:
    encoded = None if walk.encode is None else walk.encode(path, tree)
    if encoded is not None:
        return _encoded(walk, encoded, path, tree)
    if walk.other is not None:
        walk.other(tree)
    return tree


def _tuple(walk: Walk, tree: tuple[Any, ...], path: str) -> Any:
    if walk.encode is not None and (encoded := walk.encode(path, tree)) is not None:
        return _encoded(walk, encoded, path, tree)
    changed = False
    items = []
    for i, item in enumerate(tree):
        new = walk(item, f"{path}[{i}]")
        changed = changed or new is not item
        items.append(new)
    if not changed:
        return tree
    if type(tree) is tuple:
        return tuple(items)
    return tuple.__new__(type(tree), items) if hasattr(tree, "_fields") else type(tree)(items)


def _list(walk: Walk, tree: Any, path: str) -> Any:
    if walk.encode is not None and (encoded := walk.encode(path, tree)) is not None:
        return _encoded(walk, encoded, path, tree)
    changed = {}
    for i, item in enumerate(tree):
        new = walk(item, f"{path}[{i}]")
        if new is not item:
            changed[i] = new
    result = walk.place(tree, changed)
    for i, new in changed.items():
        result[i] = new
    return _attributes_of(walk, tree, result, path) if type(tree) is not list else result


def _dict(walk: Walk, tree: dict[Any, Any], path: str) -> Any:
    changed = {}
    for key, item in dict.items(tree):
        new = walk(item, f"{path}[{key!r}]")
        if new is not item:
            changed[key] = new
    result = walk.place(tree, changed)
    for key, new in changed.items():
        dict.__setitem__(result, key, new)  # of a key that is there: a class's own rules for new ones do not matter
    return _attributes_of(walk, tree, result, path) if type(tree) is not dict else result


def _object(walk: Walk, tree: Any, path: str) -> Any:
    walk.objects += 1
    if walk.objects > _MOST_OBJECTS:
        if walk.other is not None:
            walk.other(tree)
        return tree
    if walk.fresh and not walk.everything and not _holds_rows(walk, tree, path):
        # A configuration, an environment; or one for the model to write into, which shows when it has.
        if walk.encode is not None:
            walk.spare.append((tree, Walk(lambda _path, leaf: leaf, fresh=True, everything=True)(tree)))
        return tree
    return _attributes_of(walk, tree, tree, path)


def _holds_rows(walk: Walk, tree: Any, path: str) -> bool:
    """Whether there is anything of a batch in an object."""
    found = any(wanted.startswith(path) for wanted in walk.wanted)

    def note(_path: str, leaf: Any) -> Any:
        nonlocal found
        found = True
        return leaf

    def look(path: str, value: Any) -> None:
        nonlocal found
        asked = walk.encode is not None and not is_array(value) and not isinstance(value, Tensor)
        found = found or is_array(value) or (asked and walk.encode(path, value) is not None)  # type: ignore[misc]

    Walk(note, encode=look)(tree, path)
    return found


def _attributes_of(walk: Walk, tree: Any, result: Any, path: str) -> Any:
    """Go through the attributes of ``tree``, of which ``result`` is the copy, if one was made."""
    inner = isinstance(tree, Mapping) and not isinstance(tree, dict)
    changed = {}
    for name, value in attributes(tree):
        if inner and type(value) is dict:  # a mapping's dict stands for it: its items have the paths that a user writes
            inner = False
            new = walk(value, path)
        else:
            new = walk(value, f"{path}.{name}")
        if new is not value:
            changed[name] = new
    if result is tree:
        result = walk.place(tree, changed)
    for name, new in changed.items():
        set_attribute(result, name, new)
    if result is not tree:
        _resize(tree, result)
        if isinstance(tree, Distribution):
            result._batch_shape = resized(tree._batch_shape, vars(tree), vars(result))
    return result


def resized(size: torch.Size, before: Mapping[str, Any], after: Mapping[str, Any]) -> torch.Size:
    """The batch shape that a distribution keeps beside its parameters, which changes with theirs.

    Args:
        size: its batch shape.
        before: its attributes as they were.
        after: as they are, a distribution among them with a shape that was put right.
    """
    for name, old in before.items():
        new = after.get(name)
        a, b = (v._batch_shape if isinstance(v, Distribution) else getattr(v, "shape", ()) for v in (new, old))
        if new is not old and a != b and len(a) == len(b) >= len(size):
            return torch.Size(x if y == n else n for n, x, y in zip(size, a, b, strict=False))
    return size


def counts_rows(name: str, value: Any) -> bool:
    """Whether an object's attribute says how many rows its tensors have, as a TensorDict's does."""
    return name.endswith("batch_size") and isinstance(value, (int, torch.Size))


def _resize(tree: Any, result: Any) -> None:
    """Let an object that says how many rows its tensors have say it of the new ones."""
    for name, value in attributes(tree):
        if not counts_rows(name, value):
            continue
        size = torch.Size([value]) if isinstance(value, int) else value
        for old, new in zip(flatten(tree)[1], flatten(result)[1], strict=False):
            if old.shape[: len(size)] == size:
                now = new.shape[: len(size)]
                set_attribute(result, name, now[0] if isinstance(value, int) else now)
                break


_ATOMS = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.Size,
    torch.Generator,
    slice,
    range,
    type(...),
    enum.Enum,
)
_NOT_ENTERED = (
    type,
    nn.Module,
    torch.optim.Optimizer,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    functools.partial,
    weakref.ref,
    BaseException,
)


_WHOLE = {("numpy", "ndarray"), ("torch.nn.attention.flex_attention", "BlockMask")}
"""Types of objects that are encoded or left alone, and never gone into."""


def is_entered(value: Any) -> bool:
    """Whether it is an object whose attributes are gone through."""
    return _handler(type(value)) is _object


def is_atom(value: Any) -> bool:
    """Whether it is plain data that holds nothing else."""
    return isinstance(value, _ATOMS)


def _find_handler(kind: type) -> _Handler | None:
    """How to go through what is of this type; None if it is left alone."""
    if issubclass(kind, Tensor):
        return _tensor
    if issubclass(kind, _ATOMS) or issubclass(kind, _NOT_ENTERED):
        return None
    if kind.__module__ == "transformers.cache_utils":
        return None  # every decoder returns one, and training uses none
    if (kind.__module__, kind.__name__) in _WHOLE:
        return _array
    if kind is Encoded:
        return _encoded
    if issubclass(kind, tuple):
        return _tuple
    if issubclass(kind, (list, collections.deque)):
        return _list
    if issubclass(kind, dict):
        return _dict
    # The copy of an object that holds a resource would release it a second time.
    holds = kind.__dictoffset__ != 0 or _slots(kind)
    return _object if holds and not hasattr(kind, "__del__") else None


def _find_slots(kind: type) -> tuple[tuple[str, Any], ...]:
    """The slots of a type and of those that it comes from: name and descriptor."""
    return tuple(
        (name, found)
        for base in kind.__mro__
        if "__slots__" in vars(base)
        for name, found in vars(base).items()
        if isinstance(found, types.MemberDescriptorType)
    )


_handler: Callable[[type], _Handler | None] = functools.cache(_find_handler)
_slots: Callable[[type], tuple[tuple[str, Any], ...]] = functools.cache(_find_slots)


def attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """What stands in an object's own dict and slots; no property is asked, and nothing of the class's is run."""
    kind = type(value)
    if kind.__dictoffset__ != 0:
        yield from list(object.__getattribute__(value, "__dict__").items())
    for name, slot in _slots(kind):
        try:
            yield name, slot.__get__(value, kind)
        except AttributeError:
            continue


def hidden_tensors(value: Any, depth: int = 3) -> Iterator[Tensor]:
    """Tensors in what ``map_tensors`` does not go into: closures, bound methods, iterators, objects of C."""
    if isinstance(value, Tensor):
        yield value
        return
    if not depth or is_atom(value) or isinstance(value, (type, nn.Module, torch.optim.Optimizer, types.ModuleType)):
        return
    inside: list[Any]
    if isinstance(value, types.FunctionType):
        cells = value.__closure__ or ()
        inside = [cell.cell_contents for cell in cells if cell != types.CellType()] + [value.__defaults__]
    elif isinstance(value, types.MethodType):
        inside = [value.__self__]
    elif isinstance(value, weakref.ref):
        inside = []
    else:
        inside = gc.get_referents(value)
    for item in inside:
        if isinstance(item, (tuple, list, dict)) or _handler(type(item)) is _object:
            yield from flatten(item)[1]
        else:
            yield from hidden_tensors(item, depth - 1)


def set_attribute(value: Any, name: str, new: Any) -> None:
    """Set what ``attributes`` found, past ``__setattr__``, properties and frozen classes."""
    for slot_name, slot in _slots(type(value)):
        if slot_name == name:
            slot.__set__(value, new)
            return
    object.__getattribute__(value, "__dict__")[name] = new


def shallow_copy(tree: Any) -> Any:
    """A copy with the same items and attributes, made without running the class's own code where that can be."""
    kind = type(tree)
    if kind in (dict, list, collections.OrderedDict, collections.defaultdict, collections.deque):
        return tree.copy()
    try:
        new: Any
        if issubclass(kind, collections.OrderedDict):
            new = collections.OrderedDict.__new__(kind)
            for key in collections.OrderedDict.__iter__(tree):
                collections.OrderedDict.__setitem__(new, key, dict.__getitem__(tree, key))
        elif issubclass(kind, dict):
            new = dict.__new__(kind)
            dict.update(new, tree)
            if isinstance(tree, collections.defaultdict):
                new.default_factory = tree.default_factory
        elif issubclass(kind, list):
            new = list.__new__(kind)
            list.extend(new, list.__iter__(tree))
        else:
            new = object.__new__(kind)
    except TypeError:  # a part of it is C's
        return copy.copy(tree)
    for name, value in attributes(tree):
        set_attribute(new, name, value)
    return new
