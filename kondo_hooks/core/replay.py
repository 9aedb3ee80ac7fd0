"""The replay: kept rows run again, with a graph, and checked against what the screen returned for them."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kondo_hooks.core.call import Call
from kondo_hooks.core.compact import RankOne
from kondo_hooks.core.kept_rows import Part, reading
from kondo_hooks.core.packs import among_others, input_grad
from kondo_hooks.core.readings import Learned
from kondo_hooks.core.verify import rows_of, verify, verify_later
from kondo_hooks.delight.inner_loss import Tape
from kondo_hooks.errors import ReplayMismatchError, failed_replay, overwritten_input
from kondo_hooks.rows.axes import Layout, Rows, has_rows_on, join_rows, pad_to
from kondo_hooks.rows.encoded import Unread
from kondo_hooks.rows.tree import Tree, flatten
from kondo_hooks.rules.readback import Readback
from kondo_hooks.same.randomness import TakeDraws
from kondo_hooks.same.scene import uncompiled
from kondo_hooks.same.uses import Uses


@dataclass
class Replayed:
    """A replay of parts: outputs, their gradients, and the leaves that stand for inputs wanting a gradient.

    ``layout`` says how the inputs were read; None for a pass that stands in for rows that failed. ``in_doubt`` says
    that a quick comparison with the screen did not show them to be the same.
    """

    group: list[Part]
    outputs: list[Tensor]
    grads: list[Tensor]
    leaves: list[tuple[Tensor, Rows | None]]
    all_outputs: dict[int, Tensor] = field(default_factory=dict)
    layout: Layout | None = None
    in_doubt: bool = False

    @property
    def silent(self) -> bool:
        """Whether no row of it is kept."""
        return all(part.silent for part in self.group)

    def alone(self, part: Part) -> dict[int, Tensor] | None:
        """A part's rows of each output, run without a graph in a batch of the screen's size that has no other rows.

        Each row stands in its own place, so that random numbers are the screen's; copies of them fill the others.
        None where there are no others.
        """
        call = part.call
        if part.texts is not None and call.whole is None:
            return among_others(part) if part.origin else None
        if self.layout is None or call.whole or len(part) >= call.batch:
            return None
        inputs, _ = assemble([part], self.layout)
        outputs = call.run_without_graph(self._in_its_places(part, inputs))
        found = {}
        for i in self.all_outputs:
            if (where := call.rows[i]) is not None:
                rows = where.take(outputs[i], part.rows)
                found[i] = rows if part.is_cut else pad_to(rows, _as_long(rows, where, call.outputs[i].shape))
        return found

    def _in_its_places(self, part: Part, inputs: list[Tensor]) -> list[Tensor]:
        """The inputs of a batch of the screen's size that a part's rows fill."""
        assert self.layout is not None
        index = torch.arange(part.call.batch, device=part.rows.device) % len(part)
        index[part.rows] = torch.arange(len(part), device=part.rows.device)
        return [
            leaf if rows is None else rows.take(leaf, index) for leaf, rows in zip(inputs, self.layout, strict=True)
        ]

    def depends_on_size(self, part: Part, i: int) -> bool:
        """Whether rows of output ``i`` depend on the batch size without autocast, too: that is no rounding."""
        call, where = part.call, part.call.rows[i]
        if not call.scene.autocast.enabled or where is None or self.layout is None or part.texts is not None:
            return False
        inputs, _ = assemble([part], self.layout)
        autocast, call.scene.autocast = call.scene.autocast, call.scene.autocast.off()
        try:
            few = call.run_without_graph(inputs)[i]
            many = where.take(call.run_without_graph(self._in_its_places(part, inputs))[i], part.rows)
            if few.shape != many.shape:
                return False
            return bool((few - many).abs().max() > 10 * call.scene.autocast.tolerance(many) * many.abs().max())
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return False  # inputs of a low type, which the parameters' layers take under autocast alone
        finally:
            call.scene.autocast = autocast

    def summary(self) -> "Replayed":
        """Without its graph."""
        return Replayed(self.group, [], [], [])

    def hush(self) -> None:
        """Make it stand in for a pass that failed: its gradient is zero."""
        self.group = [replace(part, silent=True) for part in self.group]
        self.grads = [torch.zeros_like(grad) for grad in self.grads]


def replay(group: list[Part], learned: Learned) -> Replayed:
    """Run the rows of one group again with a graph, and check them against the screen.

    Args:
        group: parts that ``pack`` put together.
        learned: which reading of the inputs' batch axes reproduced a screen; updated.

    Raises:
        ReplayMismatchError: if no reading does.
        AmbiguousRowsError: if two do.
    """
    try:
        return _replay(group, learned)
    except (torch.OutOfMemoryError, AmbiguousRowsError):
        raise
    except Exception:
        if (twice := _twice(group)) is None:
            raise
        try:
            return _replay([twice], learned)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            pass  # the row's own failure says more
        raise


def replay_as_known(group: list[Part], learned: Learned, back: Readback) -> Replayed | None:
    """Run the rows of a group whose reading is known, and have them compared when ``back`` is read.

    Returns:
        None where ``replay`` has to find out more, or to say what is wrong.
    """
    call = group[0].call
    layout = held_layout(group) or learned.known(call)
    if layout is None and len(group) == 1 and group[0].all_rows:
        layout = next(call.readings())
    if layout is None:
        return None
    try:
        check_unchanged(group)
        replayed = run(group, layout)
        verify_later(replayed, back)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return None
    return replayed


def _twice(group: list[Part]) -> Part | None:
    """A single row beside copies with a gradient of zero, for models that take one row for none: ``squeeze()``.

    They are as many as no other axis of the outputs is long.
    """
    part = group[0]
    call = part.call
    if len(group) > 1 or len(part) != 1 or part.all_rows or call.decides_at_once:
        return None
    if any(call.is_shared(i) for i in range(len(call.rows))):
        return None
    device, sizes = part.rows.device, {size for output in call.outputs for size in output.shape}
    each = 2 if call.pairs else 1
    n = next(n for n in range(2, len(sizes) + 3) if n * each not in sizes)
    weights = torch.zeros(n, device=device)
    weights[0] = 1
    return part.repeat(torch.zeros(n, dtype=torch.long, device=device)).weighted(weights, 0)


def _replay(group: list[Part], learned: Learned) -> Replayed:
    call = group[0].call
    check_unchanged(group)
    if (held := held_layout(group)) is not None:
        replayed = run(group, held)
        verify(replayed)
        return replayed
    readings = list(call.readings())
    everything = len(group) == 1 and group[0].all_rows
    known = learned.known(call)
    if everything:
        readings = readings[:1]
    elif known is not None:
        readings.insert(0, known)
    elif any(part.tells() for part in group) and learned.waits(call):
        raise AmbiguousRowsError
    failure: Exception | None = None
    for layout in readings:
        try:
            replayed = run(group, layout)
            verify(replayed)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model may check its inputs, and raise anything where they are misread
            failure = failure or error
            continue
        if layout not in (readings[0], known) and not _is_anchored(group, layout):
            continue
        if not everything and known != layout and any(part.tells() for part in group):
            if (doubtful := _read_otherwise(group, layout, readings)) is not None:
                learned.doubt(call, doubtful)
                raise AmbiguousRowsError
            learned.learn(call, layout)
        return replayed
    assert failure is not None
    if call.writes_into is not None:
        raise ReplayMismatchError(overwritten_input(call.writes_into)) from failure
    raise failure


def check_unchanged(group: list[Part]) -> None:
    """Refuse to replay what can be seen to have changed since the screen."""
    for call in {id(part.call): part.call for part in group}.values():
        if (cause := call.changed_since()) is not None:
            raise ReplayMismatchError(f"gated: {cause}: the kept rows cannot be replayed. Clone it first.")


def held_layout(group: list[Part]) -> Layout | None:
    """The layout of a group's parts that are held; None if none is."""
    return next((part.held.layout for part in group if part.held is not None), None)


class AmbiguousRowsError(Exception):
    """Two readings of which input holds rows reproduce the screen: only the whole batch is sure to be right."""


def _read_otherwise(group: list[Part], layout: Layout, readings: list[Layout]) -> int | None:
    """An input that could be read otherwise, too: a zero-initialised path hides what is wrong. None if there is none.

    An input that no operation of the model is given cannot be misread.
    """
    call = group[0].call
    doubtful = call.doubtful()
    if (repeated := _twice(group)) is not None:
        group = [repeated]  # one row goes with all that is shared
    for other in readings:
        differs = [i for i, (a, b) in enumerate(zip(layout, other, strict=True)) if a != b]
        if len(differs) == 1 and doubtful[differs[0]] and any(other):
            inputs, leaves = assemble(group, other)
            try:
                with uncompiled(), Uses(inputs[differs[0]]) as uses:
                    outputs = forward(group, inputs).outputs()
                verify(with_gradients(group, outputs, leaves, other))
            except torch.OutOfMemoryError:
                raise
            except Exception:
                continue
            if uses.found and (not call.is_encoded(differs[0]) or _is_read(group, inputs, outputs, differs[0])):
                return differs[0]
    return None


def _is_read(group: list[Part], inputs: list[Tensor], outputs: list[Tensor], i: int) -> bool:
    """Whether the model fails without input ``i``, or gives something else: what it reads of an array is not seen."""
    without: list[Any] = [Unread(leaf.shape) if j == i else leaf for j, leaf in enumerate(inputs)]
    try:
        with uncompiled():
            found = forward(group, without).outputs()
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return True
    return not all(torch.equal(a, b) for a, b in zip(outputs, found, strict=True))


def _is_anchored(group: list[Part], layout: Layout) -> bool:
    """Whether an input that the model uses has its rows on ``batch_dim``, if any has rows there.

    Where none has, positions were taken for rows, or the whole batch ran beside rows of what nobody reads.
    """
    call = group[0].call
    if not has_rows_on(next(call.readings()), call.batch_dim):
        return True
    inputs, _ = assemble(group, layout)
    there = [leaf for leaf, rows in zip(inputs, layout, strict=True) if rows and rows.axis == call.batch_dim]
    with uncompiled(), Uses(*there) as uses:
        forward(group, inputs)
    return uses.found


def assemble(group: list[Part], layout: Layout) -> tuple[list[Tensor], list[tuple[Tensor, Rows | None]]]:
    """The inputs of a replay, and those of them that want a gradient."""
    call = group[0].call
    lone = len(group) == 1 and group[0].all_rows
    leaves: list[tuple[Tensor, Rows | None]] = []
    inputs = []
    for i, (leaf, rows) in enumerate(zip(group[0].inputs(), layout, strict=True)):
        taken = leaf.detach()
        if rows is not None and not lone:
            taken = join_rows([part.input(i, rows) for part in group], rows.axis)
        if call.inputs[i].requires_grad:
            taken.requires_grad_()
            leaves.append((taken, rows))
        inputs.append(taken)
    return inputs, leaves


def run(group: list[Part], layout: Layout) -> Replayed:
    """Run the rows of a group with a graph, each input read by ``layout``."""
    inputs, leaves = assemble(group, layout)
    return with_gradients(group, forward(group, inputs).outputs(), leaves, layout)


@dataclass
class Forwarded:
    """What a run of the model returned, and the tape of it."""

    call: Call
    result: Tree
    args: Tree
    left: Mapping[str, Tensor]
    tape: Tape | None

    def outputs(self) -> list[Tensor]:
        """Those of the screen; raises ReplayMismatchError if a loss of the model's own was made otherwise."""
        return self.call.outputs_in(self.result, self.args, self.left, self.tape)

    def everything(self) -> list[Tensor]:
        """All that has a graph."""
        return [leaf for leaf in flatten((self.result, self.args, self.left))[1] if leaf.requires_grad]


def forward(group: list[Part], inputs: list[Tensor]) -> Forwarded:
    """Run the model on what ``assemble`` put together."""
    call = group[0].call
    tape = call.tape()
    with (
        call.scene.again(call.states(inputs)),
        torch.enable_grad(),
        taking_draws(group),
        tape or contextlib.nullcontext(),
    ):
        try:
            result, args = call.run_again(inputs)
        except (torch.OutOfMemoryError, ReplayMismatchError):
            raise
        except Exception as error:
            rows, batch = sum(map(len, group)), sum(part.call.batch for part in group)
            raise ReplayMismatchError(failed_replay(call.described(), rows, batch, error)) from error
        left = call.scene.learn_left(call.left_paths)
    return Forwarded(call, result, args, left, tape)


def find_graphs(call: Call, learned: Learned) -> None:
    """Run a row with a graph, to see which of the tensors that the screen left in attributes have one."""
    device = next((leaf.device for leaf in call.inputs), None)
    rows = torch.arange(call.batch if call.whole else 1, device=device)
    part = Part(call, rows, [])
    # If it cannot run one row, the replay will say why; until then they are taken to have one.
    with contextlib.suppress(ReplayMismatchError):
        forward([part], assemble([part], reading(part, learned))[0])
    call.scene.left_behind = ()


def have_graph(part: Part, learned: Learned) -> list[bool]:
    """Whether each output of a call has a graph, as a run of some of its rows shows."""
    part = part.whole() if part.call.whole else part
    inputs, _ = assemble([part], reading(part, learned))
    return [output.requires_grad for output in forward([part], inputs).outputs()]


def silenced(group: list[Part], outputs: list[Tensor]) -> Replayed:
    """A pass whose rows failed: its gradient is zero, and its backward goes everywhere it would have gone."""
    replayed = Replayed(group, outputs, [torch.zeros_like(output) for output in outputs], [])
    replayed.hush()
    return replayed


def with_gradients(
    group: list[Part], outputs: list[Tensor], leaves: list[tuple[Tensor, Rows | None]], layout: Layout
) -> Replayed:
    """The outputs of a replay and what the loss sent to them."""
    call = group[0].call
    if len(outputs) != len(call.outputs):
        raise ReplayMismatchError(
            f"gated: the model returned {len(call.outputs)} tensors for the whole batch but {len(outputs)} for "
            "the kept rows; its output must not depend on how many rows it gets"
        )
    replayed = Replayed(group, [], [], leaves, layout=layout)
    for i, output in enumerate(outputs):
        if all(part.grads[i] is None for part in group):
            continue
        if call.is_shared(i):
            replayed.outputs.append(output)
            shares = [grad for part in group if isinstance(grad := part.grads[i], Tensor)]
            replayed.grads.append(torch.stack(shares).sum(0))
            continue
        if call.rows[i] is None:
            continue
        output = call.widened(i, output, [grad.shape for part in group if (grad := part.grads[i]) is not None])
        output = _lengthened(group, i, output)
        replayed.all_outputs[i] = output
        if output.requires_grad:
            replayed.outputs.append(output)
            replayed.grads.append(_gradient(group, i, output))
    return replayed


def _as_long(output: Tensor, where: Rows, shape: torch.Size) -> list[int]:
    """The output's shape, but as long on other axes than the rows' as ``shape`` is."""
    if output.dim() != len(shape):
        return list(output.shape)
    return [n if axis == where.axis else max(n, shape[axis]) for axis, n in enumerate(output.shape)]


def _lengthened(group: list[Part], i: int, output: Tensor) -> Tensor:
    """Output ``i`` of rows that are shorter together than the batch was, padded where the loss sent no gradient."""
    where = group[0].call.rows[i]
    assert where is not None
    for grad in (part.grads[i] for part in group):
        if not isinstance(grad, Tensor) or (shape := _as_long(output, where, grad.shape)) == list(output.shape):
            continue
        inside = tuple(slice(None) if axis == where.axis else slice(n) for axis, n in enumerate(output.shape))
        if grad[inside].count_nonzero() == grad.count_nonzero():
            output = pad_to(output, shape)
    return output


def _gradient(group: list[Part], i: int, output: Tensor) -> Tensor:
    """What the loss sent to the rows of an output, in the output's shape."""
    where = group[0].call.rows[i]
    assert where is not None
    pieces = []
    for part, rows in zip(group, rows_of(group, i, output), strict=True):
        grad = part.grads[i]
        if isinstance(grad, RankOne):
            grad = grad.grad(rows[tuple(slice(n) for n in grad.shape)])
        elif grad is None:
            expected = part.output(i)
            grad = torch.zeros_like(rows if expected is None else expected)
        pieces.append(grad)
    joined = join_rows(pieces, where.axis)
    return pad_to(joined, output.shape)


@contextlib.contextmanager
def taking_draws(group: Iterable[Part]) -> Iterator[None]:
    """Hand out the rows' share of the random numbers that the screen drew."""
    parts = [part for part in group if part.call.scene.draws.shapes and not part.all_rows]
    calls = [(part.call.scene.draws, part.call.batch, part.rows, part.call.pairs, part.call.parts) for part in parts]
    if not calls:
        yield
        return
    with TakeDraws(calls):
        yield


def input_grads(replayed: Replayed) -> list[Tensor | None]:
    """Gradients of the inputs that want one, in full size: zero at the rows that were not replayed."""
    part = replayed.group[0]
    wanting = [leaf for leaf in part.call.inputs if leaf.requires_grad]
    if not replayed.leaves:
        return [None] * len(wanting)  # the rows failed, and all ranks are about to raise
    full: list[Tensor | None] = []
    for like, (leaf, where) in zip(wanting, replayed.leaves, strict=True):
        if leaf.grad is None or part.all_rows or (where is None and part.texts is None):
            full.append(leaf.grad)
        elif part.texts is not None:
            full.append(input_grad(like, part, leaf.grad))
        else:
            assert where is not None
            full.append(where.put(torch.zeros_like(like), part.rows, leaf.grad))
    return full
