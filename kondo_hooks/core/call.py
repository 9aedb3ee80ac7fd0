"""The autograd node: a call that was screened without a graph.

A ``Call`` is what the screen leaves behind, for the replay of its kept rows. Its node hands the outputs to the
user's loss and receives ``g = dL/d(outputs)``.
"""

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from kondo_hooks.delight.distributions import LogProbs
from kondo_hooks.delight.graph import Path
from kondo_hooks.delight.inner_loss import InnerLoss, Tape, find_losses
from kondo_hooks.delight.loss_code import Picked
from kondo_hooks.errors import ReplayMismatchError
from kondo_hooks.rows.axes import (
    Layout,
    Rows,
    candidate_rows,
    infer_batch_size,
    is_doubtful,
    layouts,
    output_rows,
    pad_to,
)
from kondo_hooks.rows.block_masks import encode_block_mask
from kondo_hooks.rows.conventions import is_list_of_lengths
from kondo_hooks.rows.encoded import (
    Encoded,
    are_alike,
    encode_input,
    encode_numbers,
    encode_output,
    encode_row_list,
    encode_rows,
    is_array,
)
from kondo_hooks.rows.tree import Tree, Walk, flatten, map_tensors, unflatten
from kondo_hooks.same.attributes import version_of
from kondo_hooks.same.rounding import Checks
from kondo_hooks.same.scene import Scene, no_fast_path
from kondo_hooks.same.state import ModuleState
from kondo_hooks.same.uses import memory_of

_serial = itertools.count()
_NONE: frozenset[Any] = frozenset()
_NOTHING_GIVEN: Tree = ((), {})
_GIVEN = "the input "
LEFT = "the attribute "


@dataclass(eq=False)
class Call:
    """One screened call: what is needed to run its rows again, and the gradient that came back.

    Attributes:
        run: the function that was called.
        args: positional and keyword arguments, tensors in nested containers; the containers are its own.
        pairs: whether row i and the row half a batch below it are one sample, and so one row here.
        shared_loss: whether a term without rows in a loss of the model's own is taken on the kept rows alone.
        outputs: the differentiable output tensors, as the screen returned them; for a loss that the model computed, the
            tensors that it was computed from.
        rows: where each output keeps its rows; None for an output without a batch axis.
        batch: number of rows.
        inner: the losses that the model computed.
        sequences: whether a row is a sequence, whose steps stand on an axis of the outputs with those of all others.
        steps: of a sequence, where the sequences of a step follow each other on that axis; else 1.
        layout: where the arguments keep their rows, if that was found out before the call.
        whole: why only a replay of the whole batch can be exact, if so.
        scene: what the replay has to find as the screen did. Tensors with rows that the screen replaced in attributes
            are inputs, too, after the arguments: a state that it may have read.
        paths: of the outputs in what the model returned, and in the attributes.
        named: which output the user named, and as what.
        checks: how strictly a replay is held against the screen.
        policy: the outputs that hold the policy, once its delight was found.
        syncs: whether the host meant to reduce gradients in the backward of this call, at its forward.
        lets_go: whether log-probs of the actions may stand for logits once the loss has been computed.
        picked: the log-probs that stand for an output.
        writes_into: an input that the model writes into in place, if there is one.
    """

    run: Callable[..., Any]
    args: Tree
    state: ModuleState
    receive: Callable[["Call", Any, Sequence[Tensor | None]], tuple[Tensor | None, ...]]
    pairs: bool = False
    shared_loss: bool = False
    checks: Checks = field(default_factory=Checks)
    whole: str | None = None
    paths: list[str] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    rows: Layout = field(default_factory=list)
    batch: int = 0
    named: Any = None
    policy: frozenset[int] = frozenset()
    syncs: bool = True
    lets_go: bool = False
    inner: InnerLoss | None = None
    sequences: bool = False
    steps: int = 1
    layout: Layout | None = None

    def __post_init__(self) -> None:
        self.serial = next(_serial)
        self.released = False
        self.input_paths: list[str] = []
        self.inputs: list[Tensor] = []
        self._given: Tree = self.args
        self._ids: set[int] = set()
        self._rowwise: Set[str] = _NONE
        self._has_lists = False
        self._rowwise_outputs: Set[str] = _NONE
        self._ragged: Set[str] = _NONE
        self._encoded: Set[str] = _NONE
        walk = Walk(self._note_input, fresh=True, encode=self._encode_input)
        self.args = walk(self.args)
        # The dict of keyword arguments is new in every call of a function.
        self._spare: Sequence[tuple[Any, Any]] = walk.spare
        self._may_write = walk.copies > 1 or walk.objects > 0
        self._writes = False
        self.scene = Scene(self.state, {leaf.device for leaf in self.inputs})
        self._aliases: dict[str, str] = {}
        self._observations: tuple[weakref.ref[Any], ...] = ()
        self._output_versions: list[int] = []
        self.writes_into: str | None = None
        self.picked: dict[int, Picked] = {}
        self.log_probs: dict[int, Literal["logp", "nll"]] = {}
        self.loss_paths: dict[int, list[Path]] = {}
        self.returned: Sequence[Tensor] = ()
        self._arguments = len(self.inputs)
        self.left_paths: Sequence[str] = ()
        self._left_live: dict[int, Tensor] = {}
        self.texts: Any = None
        self._returned = 0
        self._expected = 0

    @property
    def size(self) -> int:
        """Of the axis that holds the rows."""
        return self.batch * (2 if self.pairs else 1)

    def anew(self) -> "Call":
        """The same call, not yet run."""
        made = Call(
            *(self.run, self.args, self.state, self.receive, self.pairs, self.shared_loss, self.checks),
            sequences=self.sequences,
            steps=self.steps,
            layout=self.layout,
        )
        if self.sequences:
            made.expect(self.batch, self.batch_dim)
        return made

    @property
    def parts(self) -> int:
        """Of an axis with more than one entry of each row, each of which has a share of every row."""
        return 2 if self.pairs else self.steps

    @property
    def arguments(self) -> list[Tensor]:
        """The inputs but for states in attributes."""
        return self.inputs[: self._arguments]

    def _note_input(self, path: str, leaf: Tensor) -> Tensor:
        self._ids.add(id(leaf))
        self.input_paths.append(path)
        # One made under inference_mode has no version and cannot be saved for a backward.
        self.inputs.append(leaf.clone() if leaf.is_inference() else leaf)
        return self.inputs[-1]

    def _encode_input(self, path: str, value: Any) -> Encoded | None:
        if path in self._rowwise:
            return encode_rows(value)
        if is_list_of_lengths(path, value):
            return encode_numbers(value)
        if isinstance(value, (list, tuple)) and not isinstance(value, PackedSequence):
            self._has_lists |= len(path) > 3
            return None
        if is_array(value) and value.dtype.hasobject:
            self._has_lists = True
        encoded = encode_input(value) or encode_block_mask(value)
        if encoded is not None:
            self._encoded |= {path}
            self._ids.update(map(id, flatten(value)[1]))
        return encoded

    @property
    def observations(self) -> list[Any]:
        """What was seen of this call in the loss; each lives as long as the loss's graph."""
        return [seen for ref in self._observations if (seen := ref()) is not None]

    def observe(self, observation: Any) -> None:
        """Note a log-prob seen in the loss; it refers to this call, so only weakly."""
        self._observations += (weakref.ref(observation),)

    @property
    def decides_at_once(self) -> bool:
        """Whether an input wants its gradient back from the node's own backward."""
        return any(leaf.requires_grad for leaf in self.inputs)

    def screen(
        self,
        batch_dim: int,
        record: bool,
        copy: bool,
        tape: Tape | None = None,
        probe: Callable[["Call"], None] | None = None,
    ) -> Tree:
        """Run the whole batch without a graph; returns what the model returned.

        Args:
            batch_dim: axis that holds the rows.
            record: note random operations, so that a replay of some rows can repeat them.
            copy: keep a copy of the outputs, for a loss that writes into them.
            tape: notes how the model computes a loss of its own.
            probe: finds out which of the tensors that the forward left in attributes have a graph.
        """
        scene = self.scene
        before = [version_of(leaf) for leaf in self.inputs]
        with scene.screened(record, self.inputs), tape or contextlib.nullcontext(), LogProbs() as log_probs:
            result = self.run_given()
        self._input_versions = tuple([version_of(leaf) for leaf in self.inputs])
        overwritten = [i for i, (old, new) in enumerate(zip(before, self._input_versions, strict=True)) if old != new]
        self._overwritten = {id(self.inputs[i]) for i in overwritten} if overwritten else _NONE
        self.writes_into = _argument(self.input_paths[overwritten[0]]) if overwritten else None
        self.whole = scene.whole
        self._find_batch(result, batch_dim)
        scene.compare(self._is_state)
        self._add_states()
        if probe is not None and self.state.attributes.unknown(scene.change):
            probe(self)
        self.left_paths = self.state.attributes.with_graph(scene.change, probe is not None)
        self._take_outputs(result, copy, tape, log_probs)
        return result

    def _find_batch(self, result: Tree, batch_dim: int) -> None:
        self._writes = self._may_write and self._has_written()
        outputs = [leaf for _, leaf in self._every(result, {})]
        lengths = [*self._list_lengths(self.args), *self._list_lengths(result)] if self._has_lists else []
        self.batch = self._expected or infer_batch_size(self.arguments, outputs, batch_dim, lengths)
        if self.pairs and self.batch % 2:
            raise ValueError(f"gated: pairs=True, but the model was called on {self.batch} rows, which is not even")
        self.batch //= 2 if self.pairs else 1
        if self.whole is None and self.batch > 1 and any(n % self.batch == 0 for n in self.scene.draws.permuted):
            self.whole = "a random permutation (randperm) in it may be one of the rows"
        self.batch_dim = batch_dim
        self._cut_lists(result)

    def _is_state(self, tensor: Tensor) -> bool:
        return candidate_rows(tensor, self.batch, self.batch_dim, self.pairs)[0] is not None

    def _add_states(self) -> None:
        """Make the tensors that the forward replaced in attributes inputs of the call."""
        states, n = self.scene.change.states, self._arguments
        if states or len(self.inputs) > n:
            self.input_paths = self.input_paths[:n] + [f"[2][{path!r}]" for path in states]
            self.inputs = self.inputs[:n] + list(states.values())
            self._input_versions = tuple([version_of(leaf) for leaf in self.inputs])

    def _take_outputs(self, result: Tree, copy: bool, tape: Tape | None, log_probs: LogProbs) -> None:
        every = self._every(result, self.scene.change.new)
        if tape is not None:
            constants = [*self.inputs, *self.state.buffers()]
            self.inner = find_losses(tape.steps, every, constants, self._shares)
        same = self._constants()
        kept = [(path, leaf) for path, leaf in every if self._is_output(path, leaf) and id(leaf) not in same]
        self._returned = len(kept)
        if self.inner is not None:
            kept += [(self.inner.name(i), tensor) for i, tensor in enumerate(self.inner.tensors)]
        self.paths = [path for path, _ in kept]
        self.log_probs = {i: kind for i, (_, leaf) in enumerate(kept) if (kind := log_probs.kind(leaf)) is not None}
        # Aliases that are no views: the user may write into what is returned, and `detach` shares the
        # version counter, which tells that it was done.
        self.returned = [leaf.data for _, leaf in kept]
        self.outputs = [leaf.clone() if copy else leaf.detach() for leaf in self.returned]
        self.rows = [
            output_rows(leaf, self.batch, self.batch_dim, self.pairs, self.parts)
            for leaf in self.outputs[: self._returned]
        ]
        self.rows += [self._loss_rows(leaf) for leaf in self.outputs[self._returned :]]
        self._output_versions = [version_of(leaf) for leaf in self.outputs]

    def _every(self, result: Tree, left: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
        """What came out of the screen, by path, each tensor once; ``left`` are those that it left in attributes."""
        every: list[tuple[str, Tensor]] = []
        paths: dict[int, str] = {}
        self._aliases = {}
        for path, leaf in self._found(result, self._given, left).items():
            if id(leaf) in paths:
                self._aliases[path] = paths[id(leaf)]
            else:
                paths[id(leaf)] = path
                every.append((path, leaf))
        return every

    def _list_lengths(self, tree: Tree) -> list[int]:
        """Lengths of the outermost lists in a tree, each as often as there are tensors in it."""
        lengths: list[int] = []
        inside: list[str] = []

        def look(path: str, value: Any) -> None:
            if len(path) > 3 and isinstance(value, (list, tuple)) and not any(map(path.startswith, inside)):
                inside.append(path)
                lengths.extend([len(value)] * max(1, len(flatten(value)[1])))

        Walk(lambda _path, leaf: leaf, encode=look)(tree)
        return lengths

    def _shares(self, reduced: Tensor) -> bool:
        return self.shared_loss and self._loss_rows(reduced) is None

    def _loss_rows(self, tensor: Tensor) -> Rows | None:
        """Where a tensor that a loss was made of keeps its rows; stricter, for nobody has seen it come out."""
        rows = output_rows(tensor, self.batch, self.batch_dim, self.pairs, self.parts)
        if rows is None or (rows.axis != self.batch_dim and rows.repeat == 1):
            return None
        if self.whole is None:
            return rows  # a replay of fewer rows tells
        plain = tensor.shape[rows.axis] == self.size
        return rows if plain and list(tensor.shape).count(tensor.shape[rows.axis]) == 1 else None

    def is_shared(self, i: int) -> bool:
        """Whether output ``i`` is a term of a loss that all replayed rows share."""
        return self.shared_loss and self.rows[i] is None and self.makes_loss(i)

    def makes_loss(self, i: int) -> bool:
        """Whether output ``i`` is what a loss of the model's own was made of."""
        return i >= self._returned

    def has_policy(self, i: int) -> bool:
        """Whether delight may be read off output ``i``."""
        return self.inner is None or i < self._returned or self.inner.has_policy(i - self._returned)

    def is_summed(self, i: int) -> bool:
        """Whether output ``i`` holds the terms of a sum or mean that is a loss of the model's own."""
        return self.inner is not None and i >= self._returned and self.inner.is_summed(i - self._returned)

    def _is_output(self, path: str, leaf: Tensor) -> bool:
        ends = () if self.inner is None else self.inner.ends
        return differentiable(leaf) and not leaf.is_inference() and path not in ends

    def _constants(self) -> set[int]:
        """Ids of the inputs and buffers that the screen did not change: a model that returns one returns a constant."""
        changed = self.scene.changed_buffers()
        buffers = {id(buffer) for buffer in self.state.buffers()}
        return (self._ids - self._overwritten) | (buffers - changed)

    def _has_written(self) -> bool:
        """Whether the screen put tensors into the containers that it was given."""
        written = any(id(leaf) not in self._ids for leaf in flatten(self._given)[1])
        if written and self._spare:
            walk = Walk(lambda _path, leaf: leaf)
            walk.memo.update({id(given): before for given, before in self._spare})
            self.args = walk(self.args)
        self._spare = ()
        return written

    def _found(self, result: Tree, args: Tree, left: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By path, what a run returned and, where the model writes into what it is given, what stands there now.

        ``left`` are tensors in attributes: those at paths where the forward leaves a graph are added.
        """
        found: dict[str, Tensor] = {}
        plain = type(result) is Tensor and not (result.is_nested or result.layout is not torch.strided)
        if plain and not (self._writes or self.left_paths):
            return {"": result}  # the plainest case pays for no walk
        walk = Walk(lambda path, leaf: found.setdefault(path, leaf), repeat=True, encode=self._encode_output)
        walk(result)
        if self._writes:
            walk(args, _GIVEN)
        found.update((LEFT + path, left[path]) for path in self.left_paths if path in left)
        return found

    def _encode_output(self, path: str, value: Any) -> Encoded | None:
        if isinstance(value, (list, tuple)) and not isinstance(value, PackedSequence):
            encoded = encode_row_list(value) if path in self._rowwise_outputs and are_alike(value) else None
        else:
            encoded = encode_output(value)
        if encoded is not None:
            self._ragged |= {path}
        return encoded

    def _find_rowwise(self, tree: Tree, inputs: bool, rows: int | None = None) -> set[str]:
        """Paths of the lists, outermost, that have an entry a row."""
        paths: set[str] = set()
        n = rows or self.size

        def look(path: str, value: Any) -> None:
            objects = is_array(value) and value.dtype.hasobject
            if not objects and (not isinstance(value, (list, tuple)) or hasattr(value, "_fields")):
                return
            if len(value) != n or (inputs and len(path) <= 3) or any(map(path.startswith, paths)):
                return
            leaves = flatten(list(value))[1]
            if inputs and any(leaf.requires_grad for leaf in leaves):
                return
            # Tensors of n rows each. One alone may be a row that is as long by chance.
            batched = [n in leaf.shape[self.batch_dim : self.batch_dim + 1] for leaf in leaves]
            if any(batched) and (all(batched) or len({(leaf.dim(), leaf.dtype) for leaf in leaves}) > 1):
                return
            if leaves and all(leaf.dim() > 2 and leaf.shape[1] == n for leaf in leaves):
                return  # an LSTM's states (layers, B, H)
            if not inputs and not (not objects and are_alike(value) and differentiable(value[0])):
                return
            # A tuple of numbers is a shape, or the like.
            if isinstance(value, tuple) and all(isinstance(item, (int, float)) for item in value):
                return
            paths.add(path)

        Walk(lambda _path, leaf: leaf, encode=look)(tree)
        return paths

    def expect(self, batch: int, batch_dim: int) -> None:
        """Say how many rows the call has, before it is run: lists with an entry a row are then rows."""
        self.batch, self.batch_dim, self._expected = batch, batch_dim, batch
        self._cut_input_lists()

    def refuse_row_lists(self, result: Tree, rows: int, is_constant: Callable[[str, int], bool]) -> None:
        """Refuse what a run of some rows returned if a list in it has an entry for each: the others have none.

        Args:
            result: what it returned.
            rows: how many rows it had.
            is_constant: whether the list at a path has as many tensors whatever the number of rows.
        """
        packed: list[str] = []

        def look(path: str, value: Any) -> None:
            if encode_output(value) is not None:
                packed.append(path)

        if type(result) is not Tensor or result.is_nested or result.layout is not torch.strided:
            Walk(lambda _path, leaf: leaf, encode=look)(result)
        if packed:
            raise RuntimeError(
                f"gated: after preselect() the model returned {packed[0] or 'its output'} packed or jagged, where the "
                "dropped rows have no place: pad it, or leave preselect() away"
            )
        if isinstance(result, Tensor):
            return
        for path in sorted(self._find_rowwise(result, inputs=False, rows=rows)):
            if not is_constant(path, sum(leaf.startswith(path) for leaf in flatten(result)[0])):
                raise RuntimeError(
                    f"gated: after preselect() the model returned {path or 'its output'} as a list with an entry a "
                    "row, in which the dropped rows have none: pad or stack it, or leave preselect() away"
                )

    def _cut_lists(self, result: Tree) -> None:
        """Take lists with an entry a row as rows, among the inputs and the outputs."""
        self._cut_input_lists()
        if not isinstance(result, Tensor):
            self._rowwise_outputs = self._find_rowwise(result, inputs=False)

    def _cut_input_lists(self) -> None:
        if self._has_lists and (paths := self._find_rowwise(self.args, inputs=True)):
            self._rowwise = paths
            self.input_paths, self.inputs = [], []
            self.args = Walk(self._note_input, fresh=True, wanted=paths, encode=self._encode_input)(self.args)
            self._arguments = len(self.inputs)
            self._input_versions = tuple([version_of(leaf) for leaf in self.inputs])

    def run_again(self, inputs: Sequence[Tensor]) -> tuple[Tree, Tree]:
        """Run the model on other tensors in containers of their own; returns its result, and those containers."""
        remaining = iter(inputs)
        args = Walk(lambda _path, _leaf: next(remaining), fresh=True, everything=self._writes, decode=True)(self.args)
        result = self.run(*args[0], **args[1])
        change = getattr(self.scene, "change", None)  # not there where this is the first run
        if not isinstance(result, Tensor) and change is not None and change.paths:
            result = Walk(lambda _path, leaf: leaf, fresh=True)(result)  # it may be the module's, which is put back
        return result, args

    def widened(self, i: int, output: Tensor, shapes: Sequence[Sequence[int]]) -> Tensor:
        """Output ``i`` of a replay, padded as widely as any of ``shapes``, if its rows are padded at all."""
        for shape in shapes if self.paths[i] in self._ragged else ():
            output = _widened(output, shape)
        return output

    def run_given(self) -> Tree:
        """Run the model on what it was given."""
        return self.run(*self._given[0], **self._given[1])

    def run_kept(self, inputs: Sequence[Tensor]) -> Tree:
        """Run the model on the kept rows alone, after ``preselect()``; refuses one that writes into its arguments."""
        result, args = self.run_again(inputs)
        known = {id(leaf) for leaf in inputs}
        made = (*self._rowwise, *self._encoded)  # for this run, so that they are no tensors of ours either
        written = [
            path
            for path, leaf in zip(*flatten(args), strict=True)
            if id(leaf) not in known and not path.startswith(made)
        ]
        if self._may_write and written:
            raise RuntimeError(
                f"gated: after preselect() the kept rows run alone, and the model writes {_argument(written[0])} into "
                "its arguments, where it would have fewer rows than the batch: return it, or leave preselect() away"
            )
        return result

    def outputs_in(
        self, result: Tree, args: Tree, left: Mapping[str, Tensor], tape: Tape | None = None, check: bool = True
    ) -> list[Tensor]:
        """The outputs in what the model returned and left in attributes; an empty tensor where it left none.

        Args:
            result: of a run.
            args: of that run, after it.
            left: tensors in attributes after that run, by path.
            tape: of that run, where losses are to be taken apart.
            check: whether it ran with a graph, which is to be held against the losses.
        """
        found = self._found(result, args, left)
        paths = self.paths[: self._returned]
        for path in (*paths, *self._aliases):
            if path.startswith(LEFT) and path not in found:
                found[path] = found.get(self._aliases.get(path, ""), torch.empty(0, device="cpu"))
        if missing := [path for path in paths if path not in found]:
            raise ReplayMismatchError(
                f"gated: the model returned {missing[0] or 'a tensor'} for the whole batch and not for the kept rows; "
                "what it returns must not depend on how many rows it gets (a list with an entry a row? pad or stack it)"
            )
        if check and (split := [path for path, first in self._aliases.items() if found[path] is not found[first]]):
            raise ReplayMismatchError(
                f"gated: the model returned one tensor as {self._aliases[split[0]] or 'output'} and {split[0]} without "
                "a graph, and two with one: return copies of it (clone())"
            )
        outputs = [
            _widened(found[path], screened.shape) if path in self._ragged else found[path]
            for path, screened in zip(paths, self.outputs, strict=False)
        ]
        if self.inner is not None and tape is not None:
            outputs += self.inner.in_replay(tape.steps, check)
        return outputs

    def tape(self) -> Tape | None:
        """For another run of the model, if this one computed a loss."""
        return None if self.inner is None else Tape()

    def attach_node(self, result: Tree, anchor: Tensor) -> tuple[Tree, list[Tensor]]:
        """``result`` with its differentiable tensors as outputs of this call's autograd node, and all of these."""
        inputs = [leaf for leaf in self.inputs if leaf.requires_grad]
        returned = list(_Node.apply(self, anchor.view_as(anchor), *inputs))
        self.returned = ()
        by_path = dict(zip(self.paths[: self._returned], returned, strict=False))
        live = self._with_live(lambda path, leaf: by_path.get(path, leaf), result)
        self._given = _NOTHING_GIVEN  # it may hold the node's outputs now, and a cycle through autograd is never freed
        if self.left_paths:
            self._left_live = {
                id(leaf): by_path[at]
                for path, leaf in self.scene.change.new.items()
                if (at := self._aliases.get(LEFT + path, LEFT + path)) in by_path
            }
        if self.inner is None:
            self._put_live()
        return live, returned

    def _put_live(self) -> None:
        """Put what now has a graph where the forward left it."""
        change = self.scene.change
        if change.after is not None:
            if self._left_live:
                change.after.substitute(self._left_live)
            change.after, change.new = None, {}
        self._left_live = {}

    def _with_live(self, fn: Callable[[str, Tensor], Tensor], result: Tree) -> Tree:
        """``result`` with its tensors replaced; what the model was given is changed in place, and stays the user's."""
        if type(result) is Tensor and not (self._writes or result.is_nested or result.layout is not torch.strided):
            return fn("", result)
        inside = Walk(lambda _path, leaf: leaf)
        if self._writes:
            inside(self._given)
        walk = Walk(fn, own=inside.memo.keys(), encode=self._encode_output, decode=True)
        live = walk(result)
        if self._writes:
            walk(self._given, _GIVEN)
        return live

    def with_losses(self, result: Tree, returned: Sequence[Tensor]) -> Tree:
        """``result`` with the model's own losses computed from the node's outputs."""
        assert self.inner is not None
        ends = {path: LEFT + path for path in self.left_paths}
        new = self.scene.change.new
        left = {self._aliases.get(end, end): leaf for path, leaf in new.items() if (end := ends.get(path))}
        losses = self.inner.run(returned[self._returned :])
        self._left_live |= {id(leaf): losses[end] for end, leaf in left.items() if end in losses}
        self._put_live()
        return map_tensors(lambda path, leaf: losses.get(path, leaf), result)

    def is_left(self, i: int) -> bool:
        """Whether the forward left output ``i`` in an attribute."""
        return self.paths[i].startswith(LEFT)

    def lacks_batch(self) -> bool:
        """Whether the only axis of a call of one-dimensional tensors holds features: the first cannot be run alone."""
        shape = (self.batch,)
        if self.whole or self.pairs or self.batch < 2 or not self.outputs or any(out.dim() > 1 for out in self.outputs):
            return False
        if not all(x.dim() == 0 or (x.shape == shape and x.is_floating_point()) for x in self.inputs):
            return False
        try:
            outputs = self.run_without_graph([x[:1] if x.dim() else x for x in self.inputs])
        except Exception:
            return True
        for where, screened, output in zip(self.rows, self.outputs, outputs, strict=True):
            first = screened if where is None else screened[: where.repeat]
            if output.shape != first.shape or not (self.scene.random or torch.allclose(output, first, 0.1, 1e-2)):
                return True
        return False

    def readings(self) -> Iterator[Layout]:
        """Which inputs hold rows, the likeliest reading first; a state is cut as is likeliest, or at last not."""
        arguments, states = self.inputs[: self._arguments], self.inputs[self._arguments :]
        cut = [candidate_rows(leaf, self.batch, self.batch_dim, self.pairs)[0] for leaf in states]
        if self.layout is not None:
            yield [*self.layout, *cut]
            return
        for layout in layouts(arguments, self.batch, self.batch_dim, self.pairs):
            yield [*layout, *cut]
        if states:
            yield [*next(layouts(arguments, self.batch, self.batch_dim, self.pairs)), *[None] * len(states)]

    def doubtful(self) -> list[bool]:
        """For each input, whether it can be read otherwise than as is likeliest."""
        candidates = [candidate_rows(leaf, self.batch, self.batch_dim, self.pairs) for leaf in self.inputs]
        several = self.reads_several()
        return [
            i < self._arguments
            and (is_doubtful(options, self.batch_dim) or (several and leaf.dim() == 1 and options[0] is not None))
            for i, (leaf, options) in enumerate(zip(self.inputs, candidates, strict=True))
        ]

    def is_encoded(self, i: int) -> bool:
        """Whether input ``i`` stands for an array, or the like."""
        return self.input_paths[i] in self._encoded

    def reads_several(self) -> bool:
        """Whether more than one input looks like rows, so that one of them may be shared."""
        return sum(self.size in leaf.shape for leaf in self.arguments) > 1

    def in_doubt(self) -> bool:
        """Whether an input may be read otherwise than is likeliest, so that a guess could let go of needed rows."""
        return self.reads_several() or any(self.doubtful())

    def let_go(self, i: int, picked: Picked) -> None:
        """Keep log-probs for the logits of output ``i``, unless the user's code has written into these."""
        output = self.outputs[i]
        unchanged = version_of(output) == self._output_versions[i] and i not in self.picked
        if self.lets_go and unchanged and i < self._returned and self.rows[i] == Rows(0):
            self.picked[i] = picked
            self.forget(i)

    def forget(self, i: int) -> None:
        """Let go of the values of an output, and keep its shape."""
        output = self.outputs[i]
        self.outputs[i] = torch.zeros((), dtype=output.dtype, device=output.device).expand(output.shape)
        self._output_versions[i] = version_of(self.outputs[i])

    def overwritten(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether the user's code has written into the outputs since the screen.

        A kernel that puts its gradient in the place of the logits (flash-attention's and Liger's cross-entropies do)
        leaves no trace but that the gradient stands there.
        """
        return any(
            version_of(leaf) != version or (grad is not None and memory_of(grad) == memory_of(leaf))
            for leaf, version, grad in zip(self.outputs, self._output_versions, grads, strict=True)
        )

    def screen_again(self) -> None:
        """Get back outputs that were written over, by one more run without a graph."""
        self.outputs, self.picked = self.run_without_graph(self.inputs), {}
        self._output_versions = [version_of(leaf) for leaf in self.outputs]

    def run_without_graph(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of another run as the screen's, on these tensors in place of its inputs."""
        tape = self.tape()
        with torch.no_grad(), no_fast_path(), self.scene.again(self.states(inputs)), tape or contextlib.nullcontext():
            result, args = self.run_again(inputs)
            left = self.scene.left()
        return self.outputs_in(result, args, left, tape, check=False)

    def left_with_graph(self) -> list[Tensor]:
        """What the screen left in attributes and has a graph when it is run with one."""
        return [self.scene.change.new[path] for path in self.left_paths]

    def states(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Those of a run's inputs that stand for states in attributes."""
        return inputs[self._arguments :]

    def input_name(self, i: int) -> str:
        """An input, as a message names it."""
        return _argument(self.input_paths[i])

    def output_name(self, i: int) -> str:
        """An output, as a message names it."""
        path = self.paths[i]
        return path if path.startswith("the ") else f"output {path}" if path else "the output"

    def described(self) -> str:
        """What was called, with the shapes of its inputs, for a message."""
        name = getattr(self.run, "__name__", "")
        method = "" if name in ("", "__call__", "_call_impl") else f".{name}"
        shapes = ", ".join(
            f"{'' if path.startswith('[0]') else _argument(path) + '='}{tuple(leaf.shape)}"
            for path, leaf in list(zip(self.input_paths, self.inputs, strict=True))[: self._arguments]
        )
        return f"{self.state.name}{method}({shapes})"

    def changed_since(self) -> str | None:
        """What the replay would see otherwise than the screen, if it can be told."""
        for path, leaf, version in zip(self.input_paths, self.inputs, self._input_versions, strict=True):
            if version_of(leaf) != version:
                return f"the input {_argument(path)} was modified in place after the call"
        if not self.scene.same_parameters():
            return "the parameters were changed between the call and its backward (an optimizer step?)"
        return None

    def slim(self) -> None:
        """Let go of the tensors, and keep what tells how the call was made."""

        def stub(leaf: Tensor) -> Tensor:
            return torch.empty((0,) * leaf.dim(), dtype=leaf.dtype, device=leaf.device)

        self.inputs = [stub(leaf) for leaf in self.inputs]
        self.args = unflatten(self.args, self.inputs)
        self.outputs, self.picked = [stub(leaf) for leaf in self.outputs], {}
        self._input_versions = tuple([version_of(leaf) for leaf in self.inputs])
        self._output_versions = [version_of(leaf) for leaf in self.outputs]

    def release(self) -> None:
        """Let go of inputs and outputs after the last backward."""
        self.released = True
        self.args, self.inputs, self.outputs, self.picked = ((), {}), [], [], {}
        self._given = _NOTHING_GIVEN
        # What the forward left in the model may lead here: a cycle through autograd is never freed.
        del self.scene, self.run, self.receive, self.state


def _widened(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Rows that were padded among themselves, padded as in ``shape`` where that is more."""
    return pad_to(rows, [len(rows), *map(max, rows.shape[1:], shape[1:])])


def differentiable(leaf: Tensor) -> bool:
    """Whether a loss could send a gradient into this output."""
    return leaf.dtype.is_floating_point or leaf.dtype.is_complex


def _argument(path: str) -> str:
    """A path in (args, kwargs) as the caller wrote it."""
    return "args" + path[3:] if path.startswith("[0]") else path[3:].strip("[]'")


class _Node(torch.autograd.Function):
    """Outputs of a screened call. Its inputs are an anchor, so that it is reached, and what needs a gradient."""

    @staticmethod
    def forward(ctx: Any, call: Call, anchor: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.kondo_call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(anchor)
        return tuple(call.returned)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # raises autograd's own error if the graph was freed
        if torch.is_grad_enabled():
            raise RuntimeError(
                "gated: create_graph=True (double backward) needs the graph of every row. "
                "Compute this loss outside the context, or with the gate disabled."
            )
        call = ctx.kondo_call
        if call.released:
            raise RuntimeError(
                "Trying to backward through the graph a second time: a gated call lets go of its tensors when it has "
                "been replayed. Specify retain_graph=True if you need to backward through it again."
            )
        inputs = call.receive(call, ctx, grads)
        return (None, None, *inputs)
