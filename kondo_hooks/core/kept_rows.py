"""Rows of a call that are to be replayed: taken, held while they wait, cut, packed with others and moved."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kondo_hooks.core.call import Call
from kondo_hooks.core.compact import RankOne
from kondo_hooks.core.readings import Learned
from kondo_hooks.delight.loss_code import Picked
from kondo_hooks.errors import DelightError
from kondo_hooks.rows.axes import Layout, Rows, at_positions, carried_over
from kondo_hooks.rows.conventions import says_longest
from kondo_hooks.rows.encoded import Encoded
from kondo_hooks.rows.tree import Tree, attributes, counts_rows, is_entered
from kondo_hooks.same.attributes import same_facts
from kondo_hooks.same.rounding import by_column, measure

if TYPE_CHECKING:
    from kondo_hooks.core.packs import Packed
    from kondo_hooks.core.positions import Positions

Gradient = Tensor | RankOne


@dataclass
class Held:
    """What a part keeps for itself, so that its call can let go of the rest.

    Attributes:
        layout: where the inputs keep their rows.
        inputs: the rows of each input, or all of it where it is shared.
        outputs: what the screen returned for the rows; None where the loss did not use it, or its gradient tells.
        measures: of each of these, the magnitudes of its columns over all rows of the call, if that has them no more.
    """

    layout: Layout
    inputs: list[Tensor]
    outputs: list[Tensor | None]
    measures: list[Tensor | None] | None


@dataclass
class Part:
    """Rows of a call that are to be replayed, and the gradient at each output's rows.

    Attributes:
        call: the call.
        rows: indices into its batch; of no meaning for rows that came from another rank.
        grads: per output, None where the loss did not use it.
        held: set once the rows are no longer taken from the call.
        silent: stands in where no row is kept: its gradient is zero, whatever its activations are.
        repeated: rows may stand in it more than once.
        lengths: (n,) positions until the last one that is kept of each row, where rows are to be cut there.
        positions: where the call keeps them.
        until: how many positions are left of each row, where the rows were cut.
        packed: the texts of a packed row that it stands for, still to be cut out of it.
        texts: how many texts it has, where they were cut out.
        counted: how many texts it has, where they were not.
        origin: the parts that these texts were cut out of, each with its own.
    """

    call: Call
    rows: Tensor
    grads: list[Gradient | None]
    held: Held | None = None
    silent: bool = False
    repeated: bool = False
    lengths: Tensor | None = None
    positions: "Positions | None" = None
    until: int | None = None
    packed: "Packed | None" = None
    texts: int | None = None
    counted: int | None = None
    origin: "Sequence[tuple[Part, Packed]]" = ()

    @classmethod
    def of(cls, call: Call, rows: Tensor, grads: Sequence[Tensor | None]) -> "Part":
        """Rows of a call, and theirs of the gradients at its whole outputs."""
        return cls(call, rows, [_take(call, i, grad, rows) for i, grad in enumerate(grads)])

    @classmethod
    def stand_in(cls, call: Call, rows: Tensor, like: Sequence[Tensor | None]) -> "Part":
        """Rows with a gradient of zero at every output that has rows and that ``like`` has a tensor for."""
        return cls.of(call, rows, like).silenced()

    def silenced(self) -> "Part":
        """The same rows with a gradient of zero."""
        grads: list[Gradient | None] = []
        for grad in self.grads:
            if isinstance(grad, RankOne):
                grads.append(replace(grad, coefficient=torch.zeros_like(grad.coefficient)))
            else:
                grads.append(None if grad is None else torch.zeros_like(grad))
        return replace(self, grads=grads, silent=True)

    def tells(self) -> bool:
        """Whether a comparison with the screen says anything: where no gradient was sent, nothing is compared."""
        tensors = [grad.coefficient if isinstance(grad, RankOne) else grad for grad in self.grads]
        return any(bool(grad.any()) for grad in tensors if grad is not None)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def samples(self) -> int:
        """How many rows, or texts of packed rows, it has."""
        return next((n for n in (self.texts, self.counted) if n is not None), len(self))

    @property
    def of_packs(self) -> bool:
        """Whether it stands for texts of packed rows, cut out or still to be cut."""
        return self.packed is not None or self.texts is not None

    @property
    def is_cut(self) -> bool:
        """Whether its rows were cut."""
        return self.until is not None

    @property
    def all_rows(self) -> bool:
        """Whether it is the whole call."""
        return self.held is None and not self.repeated and len(self.rows) == self.call.batch

    def input(self, i: int, where: Rows) -> Tensor:
        """Its rows of an input."""
        if self.held is not None:
            return self.held.inputs[i]
        leaf = self.call.inputs[i].detach()
        return where.take(leaf, self.rows)

    def inputs(self) -> list[Tensor]:
        """Tensors that have the shapes of the inputs, but for the number of rows."""
        return self.call.inputs if self.held is None else self.held.inputs

    def output(self, i: int) -> Tensor | None:
        """What the screen returned for its rows."""
        if self.held is not None:
            return self.held.outputs[i]
        where = self.call.rows[i]
        assert where is not None
        return where.take(self.call.outputs[i], self.rows)

    def measure(self, i: int) -> Tensor | None:
        """(columns,) magnitudes of an output over all rows of the call; None where that was not kept."""
        where = self.call.rows[i]
        if self.held is not None and self.held.measures is not None:
            found = self.held.measures[i]
        elif where is None or i in self.call.picked or any(isinstance(grad, RankOne) for grad in self.grads[i : i + 1]):
            found = None
        else:
            found = measure(by_column(self.call.outputs[i], where.axis))
        if found is None or self.call.outputs[i].dim() > 2 or not (self.is_cut or self.texts):
            return found
        if self.texts is not None:  # its columns are the tokens
            output = None if self.held is None else self.held.outputs[i]
            return None if output is None else found.amax().expand(output.shape[1])
        assert self.positions is not None and self.until is not None  # its columns are the positions
        return found[: self.until * len(found) // self.positions.length]

    def repeat(self, index: Tensor) -> "Part":
        """Its rows, by position, some of them more than once."""
        return replace(self.select(index), repeated=True)

    def between(self, first: int, last: int) -> "Part":
        """Some of its rows, or of the texts that are still to be cut out of it, by position."""
        if self.packed is not None:
            return replace(self, packed=self.packed.between(first, last))
        everything = last - first == len(self)
        return self if everything else self.select(torch.arange(first, last, device=self.rows.device))

    def select(self, index: Tensor) -> "Part":
        """Some of its rows, by position."""
        grads = [_take(self.call, i, grad, index, len(index) / len(self)) for i, grad in enumerate(self.grads)]
        held = self.held
        if held is not None:
            inputs = [
                leaf if where is None else where.take(leaf, index)
                for where, leaf in zip(held.layout, held.inputs, strict=True)
            ]
            outputs = [
                None if leaf is None or where is None else where.take(leaf, index)
                for where, leaf in zip(self.call.rows, held.outputs, strict=True)
            ]
            held = replace(held, inputs=inputs, outputs=outputs)
        lengths = None if self.lengths is None else self.lengths[index]
        return replace(self, rows=self.rows[index], grads=grads, held=held, lengths=lengths)

    def weighted(
        self,
        factors: Tensor,
        offset: int = 0,
        source: int | None = None,
        positions: Mapping[int, bool] | None = None,
        cut: "Positions | None" = None,
    ) -> "Part":
        """Its gradients times factors.

        Args:
            factors: (n,), or (n, P) for positions of output ``source``.
            offset: the first of these positions.
            source: the output that the positions were read from; the first with a gradient where that is not known.
            positions: of other outputs, whether their rows begin with these positions, where that is known.
            cut: where the positions are, if rows are to be cut after the last one with a factor.

        Raises:
            DelightError: if the output does not have these positions.
        """
        if factors.device.type == "cpu" and bool((factors == 1).all()):
            return self  # elsewhere it would be a wait for what is hardly ever so
        shapes = [self._row_shape(i) for i in range(len(self.grads))]
        lengths = None
        if factors.dim() == 2:
            if source is None or shapes[source] is None:
                source = next((i for i, shape in enumerate(shapes) if shape is not None), None)
            shape = None if source is None else shapes[source]
            placed = factors.amax(1) if shape is None else at_positions(factors, shape, offset)
            if placed is None:
                raise DelightError(
                    f"gated: unit='token': {factors.shape[1]} values a row were seen in the loss, and output "
                    f"{self.call.paths[source or 0] or 'of the model'} has rows of shape {tuple(shape or ())}: which "
                    "position each belongs to is not known. Mark (B, T) log-probs with gate.logp(...), or leave "
                    "unit='sample'"
                )
            factors = placed
            if cut is not None and placed.dim() > 1:
                used = placed.flatten(2).ne(0).any(2) if placed.dim() > 2 else placed.ne(0)
                place = torch.arange(1, used.shape[1] + 1, device=used.device)
                lengths = torch.where(used, place, 1).amax(1)
        grads: list[Gradient | None] = []
        for i, (where, grad, shape) in enumerate(zip(self.call.rows, self.grads, shapes, strict=True)):
            if grad is None or where is None or shape is None:
                grads.append(grad)
                continue
            mine = factors
            if i != source:
                mine = carried_over(factors, shape, (positions or {}).get(i), i in self.call.policy)
            grads.append(grad.weighted(mine) if isinstance(grad, RankOne) else where.weighted(grad, mine))
        return replace(self, grads=grads, lengths=lengths, positions=cut)

    def _row_shape(self, i: int) -> torch.Size | None:
        """Of a row of an output's gradient; None where there is none."""
        where, grad = self.call.rows[i], self.grads[i]
        if grad is None or where is None:
            return None
        return grad.shape[1:] if isinstance(grad, RankOne) else where.first(grad).shape[1:]

    def whole(self) -> "Part":
        """The whole call, with a gradient of zero at the rows that were not in this part."""
        grads: list[Gradient | None] = []
        for output, where, grad in zip(self.call.outputs, self.call.rows, self.grads, strict=True):
            if grad is None or where is None:
                grads.append(grad)
            else:
                assert isinstance(grad, Tensor)
                grads.append(where.put(torch.zeros_like(output, dtype=grad.dtype), self.rows, grad))
        return replace(
            self, rows=torch.arange(self.call.batch, device=self.rows.device), grads=grads, repeated=False, lengths=None
        )

    @classmethod
    def holding(
        cls,
        call: Call,
        rows: Tensor,
        grads: Sequence[Tensor | None],
        layout: Layout,
        picked: Mapping[int, Picked],
    ) -> "Part":
        """Rows of a call with their own copy of what a replay needs, out of the gradients at its whole outputs."""
        return cls(call, rows, [])._hold(layout, grads, rows, lambda i: call.outputs[i], picked)

    def hold(self, layout: Layout) -> "Part":
        """The same with its own copy of what a replay needs."""
        if self.held is not None:
            return self
        return self._hold(layout, self.grads, torch.arange(len(self), device=self.rows.device), self.output)

    def _hold(
        self,
        layout: Layout,
        grads: Sequence[Gradient | None],
        index: Tensor,
        outputs: Callable[[int], Tensor | None],
        picked: Mapping[int, Picked] = MappingProxyType({}),
    ) -> "Part":
        """In the least space that is exact: gradients and outputs are those at ``index`` of what is given."""
        inputs = [
            leaf.detach() if where is None else self.input(i, where)
            for i, (leaf, where) in enumerate(zip(self.call.inputs, layout, strict=True))
        ]
        forms: list[Gradient | None] = []
        held: list[Tensor | None] = []
        for i, (where, grad) in enumerate(zip(self.call.rows, grads, strict=True)):
            output = None if grad is None or where is None else outputs(i)
            form = None
            if output is not None and where == Rows(0) and isinstance(grad, Tensor):
                form = RankOne.of_picked(picked.get(i), grad, index) or RankOne.of(output, grad, index.to(grad.device))
            forms.append(form or _take(self.call, i, grad, index))
            held.append(None if output is None or where is None or form else where.take(output, index))
        measures = [None if output is None else self.measure(i) for i, output in enumerate(held)]
        return replace(self, grads=forms, held=Held(layout, inputs, held, measures))

    def nbytes(self) -> int:
        """Bytes that it holds of its own."""
        if self.held is None:
            return 0
        tensors = [leaf for leaf, where in zip(self.held.inputs, self.held.layout, strict=True) if where is not None]
        tensors += [leaf for leaf in self.held.outputs if leaf is not None]
        for grad in self.grads:
            tensors += grad.tensors() if isinstance(grad, RankOne) else [] if grad is None else [grad]
        return sum(t.numel() * t.element_size() for t in tensors)

    # As a list of tensors, for another rank.

    def to_tensors(self) -> list[Tensor]:
        """Its rows' inputs, gradients and outputs; it must be held."""
        assert self.held is not None
        tensors = [leaf for leaf, where in zip(self.held.inputs, self.held.layout, strict=True) if where is not None]
        kinds, sent = [], []
        for grad, output in zip(self.grads, self.held.outputs, strict=True):
            if isinstance(grad, RankOne):
                kinds.append(2)
                sent += [
                    torch.tensor(grad.shape, device="cpu"),
                    torch.empty(0, dtype=grad.dtype, device="cpu"),
                    *grad.tensors(),
                ]
            elif grad is not None and output is not None:
                kinds.append(1)
                sent += [grad, output]
            else:
                kinds.append(0)
        return [torch.tensor(kinds, device="cpu"), *tensors, *sent]

    @classmethod
    def from_tensors(cls, template: "Part", tensors: Sequence[Tensor]) -> "Part":
        """Rows of another rank, as a part of ``template``'s call, whose shared inputs are taken to be the same."""
        assert template.held is not None
        received = iter(tensors)
        kinds = next(received).tolist()
        inputs = [
            leaf if where is None else next(received).to(leaf.device)
            for leaf, where in zip(template.held.inputs, template.held.layout, strict=True)
        ]
        grads: list[Gradient | None] = []
        outputs: list[Tensor | None] = []
        n = 0
        for kind, like in zip(kinds, template.call.outputs, strict=True):
            grad: Gradient | None = None
            output = None
            if kind == 2:
                shape, dtype = torch.Size(next(received).tolist()), next(received).dtype
                coefficient, action, logp = (next(received).to(like.device) for _ in range(3))
                grad = RankOne(coefficient, action, logp, shape, dtype)
                n = shape[0]
            elif kind == 1:
                grad, output = next(received).to(like.device), next(received).to(like.device)
            grads.append(grad)
            outputs.append(output)
        for leaf, where in zip(inputs, template.held.layout, strict=True):
            n = n if where is None or template.texts else leaf.shape[where.axis] // where.repeat
        held = replace(template.held, inputs=inputs, outputs=outputs)
        if template.texts is not None:
            return replace(template, grads=grads, held=held, silent=False, origin=())
        return cls(template.call, torch.arange(n, device=template.rows.device), grads, held)


def _take(call: Call, i: int, grad: Gradient | None, index: Tensor, share: float = 1.0) -> Gradient | None:
    """Rows of a gradient; of one at a term that all rows share, a share."""
    where = call.rows[i]
    if grad is None or isinstance(grad, RankOne):
        return None if grad is None else grad.take(index)
    if where is None:
        return grad * share if call.is_shared(i) else None
    return where.take(grad, index)


def pack(parts: list[Part]) -> list[list[Part]]:
    """Group parts whose rows can go through the model as one batch."""
    groups: list[list[Part]] = []
    for part in parts:
        for group in groups:
            if _fits(group[0], part):
                group.append(part)
                break
        else:
            groups.append([part])
    return groups


def split(group: list[Part], limit: int | None) -> list[list[Part]]:
    """Cut a group into as few as possible of at most ``limit`` rows, alike in size."""
    total = sum(map(len, group))
    if limit is None or total <= limit or any(part.call.whole or part.call.decides_at_once for part in group):
        return [group]
    return cut(group, -(-total // limit))


def cut(group: list[Part], pieces: int) -> list[list[Part]]:
    """Cut a group into this many of nearly equal size; some are empty where there are fewer rows."""
    total, result = sum(map(len, group)), []
    for piece in range(pieces):
        first, last = total * piece // pieces, total * (piece + 1) // pieces
        taken = []
        for n, low, high in overlaps(map(len, group), first, last):
            taken.append(group[n].between(low, high))
        result.append(taken)
    return result


def overlaps(sizes: Iterable[int], first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """Of things of these sizes, one after another: which reach into a span, and from where to where of each."""
    start = 0
    for n, size in enumerate(sizes):
        low, high = max(first - start, 0), min(last - start, size)
        start += size
        if low < high:
            yield n, low, high


def same_structure(a: Call, b: Call) -> bool:
    """Whether two calls are alike in everything but sizes and values, so on every rank or on none."""
    return (
        a.run == b.run
        and a.input_paths == b.input_paths
        and a.paths == b.paths
        and a.scene.flags == b.scene.flags
        and a.scene.autocast == b.scene.autocast
        and same_facts(a.scene.change, b.scene.change)
        and [(x.dtype, x.dim()) for x in a.inputs] == [(x.dtype, x.dim()) for x in b.inputs]
        and [(x.dtype, x.dim()) for x in a.outputs] == [(x.dtype, x.dim()) for x in b.outputs]
    )


def stands_alone(call: Call) -> bool:
    """Whether its rows cannot go through the model together with another call's."""
    scene = call.scene
    changes = scene.buffers.entries or scene.change.changes_state
    return bool(scene.random or call.whole or changes or call.decides_at_once or call.steps > 1)


def _fits(first: Part, second: Part) -> bool:
    a, b = first.call, second.call
    if stands_alone(a) or stands_alone(b) or not same_structure(a, b) or a.rows != b.rows:
        return False
    layout, other = reading(first), reading(second)
    if layout != other:
        return False
    for x, y, rows in zip(first.inputs(), second.inputs(), layout, strict=True):
        if x.device != y.device:
            return False
        if rows is None:
            if x is not y and not same_values(x, y):
                return False
        elif _without(x.shape, rows.axis) != _without(y.shape, rows.axis):
            return False
    return same_constants(a.args, b.args)


def reading(part: Part, learned: Learned | None = None) -> Layout:
    """Where a part's inputs keep their rows: as it is held, as it was found, else the likeliest."""
    if part.held is not None:
        return part.held.layout
    known = None if learned is None else learned.known(part.call)
    return known or next(part.call.readings())


def same_values(x: Tensor, y: Tensor) -> bool:
    """Whether two shared inputs are the same."""
    if x is y or x.layout is not torch.strided or y.layout is not torch.strided:
        return x is y
    return x.shape == y.shape and torch.equal(x, y)


def _without(shape: torch.Size, axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


def same_constants(a: Tree, b: Tree, longest: list[tuple[int, int]] | None = None) -> bool:
    """Whether two trees differ in nothing but their tensors.

    Args:
        a: one.
        b: the other.
        longest: takes what the two say of their longest text, by its name, which may then differ.
    """
    return _same_constants(a, b, set(), longest)


def _same_constants(
    a: Tree, b: Tree, seen: set[tuple[int, int]], longest: list[tuple[int, int]] | None, name: object = ""
) -> bool:
    if longest is not None and type(a) is type(b) is int and says_longest(str(name)):
        longest.append((a, b))
        return True
    if (a is b and longest is None) or (isinstance(a, Tensor) and isinstance(b, Tensor)) or (id(a), id(b)) in seen:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, (Encoded, tuple, list, dict)) or is_entered(a):
        seen.add((id(a), id(b)))
    if isinstance(a, Encoded):
        return _same_constants(a.constant, b.constant, seen, longest)
    if isinstance(a, (tuple, list)):
        names = getattr(a, "_fields", range(len(a)))
        return len(a) == len(b) and all(
            _same_constants(x, y, seen, longest, item) for item, x, y in zip(names, a, b, strict=True)
        )
    if isinstance(a, dict) or is_entered(a):
        mine, theirs = (x if isinstance(x, dict) else dict(attributes(x)) for x in (a, b))
        counts = set() if isinstance(a, dict) else {key for key in mine if counts_rows(key, mine[key])}
        return mine.keys() == theirs.keys() and all(
            _same_constants(mine[key], theirs[key], seen, longest, key) for key in mine if key not in counts
        )
    try:
        return a is b or bool(a == b)
    except Exception:
        return False
