"""What happens in a call of the model: it is screened without a graph, or passes through, or runs kept rows only."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import CoroutineType, GeneratorType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kondo_hooks import private
from kondo_hooks.core.call import Call
from kondo_hooks.core.readings import Learned, find_anchor, settle_outputs, sizes_of_inputs
from kondo_hooks.core.sequences import Named as Counted
from kondo_hooks.core.sequences import Sequences
from kondo_hooks.core.step import Step
from kondo_hooks.core.texts import Named, find_texts
from kondo_hooks.delight.graph import find_sources
from kondo_hooks.delight.inner_loss import Tape
from kondo_hooks.errors import ReplayMismatchError, WarnOnce, unbatched, unknown_batch
from kondo_hooks.rows.axes import Rows, infer_batch_size
from kondo_hooks.rows.conventions import tells_texts
from kondo_hooks.rows.tree import Tree, flatten, hidden_tensors, is_atom, map_tensors
from kondo_hooks.same.state import forked_rng

_HOOKED_CALLS, _MOST_UNSEEN = 8, 32
Name = str | int | Callable[[Any], Tensor]


@dataclass
class Reading:
    """How the model's inputs and outputs are to be read.

    Attributes:
        named: which output holds the policy, and as what.
        batch_dim: axis of the rows.
        pairs: two rows are one sample.
        shared_loss: a term without rows of the model's own loss is taken on the kept rows.
        warmup_steps: backwards that pass straight through at first.
        segments: what tells the texts that a row holds, where the user named it.
        sequences: how many sequences a call's rows are the steps of, where the user said so.
    """

    named: tuple[str, Name] | None
    batch_dim: int
    pairs: bool
    shared_loss: bool
    warmup_steps: int
    segments: Named = None
    sequences: Counted = None


class DecidedFirst(Protocol):
    """A decision that was taken before its call, which then runs the kept rows alone."""

    batch: int
    forwarded: int
    hooks: list[Any]

    def run(self, call: Call, batch_dim: int, learned: Learned, learned_outputs: dict[str, Rows | None]) -> Tree:
        """Call the model on the kept rows, with a graph; returns its outputs in full size."""


class Forward:
    """The forward side of a gate.

    Attributes:
        model: what is gated.
        pairs: two rows are one sample.
        shared_loss: a term without rows of the model's own loss is taken on the kept rows.
        screened: a decision that waits for its call.
        tape: whether losses that the model computes are looked for.
        calls: how many were made with grad.
    """

    def __init__(
        self, model: nn.Module, step: Step, reading: Reading, warn: WarnOnce, refuse: Callable[[nn.Module], None]
    ):
        self.model = model
        self.pairs = reading.pairs
        self.shared_loss = reading.shared_loss
        self.screened: DecidedFirst | None = None
        self.tape = True
        self.calls = 0
        self._step, self._refuse = step, refuse
        self._named = reading.named
        step.shared.segments = reading.segments
        self._batch_dim = reading.batch_dim
        self._sequences = Sequences(model, False if reading.batch_dim else reading.sequences)
        self._warmup_steps = reading.warmup_steps
        self._warn = warn
        self._outputs_learned: dict[str, Rows | None] = {}
        self._settled: dict[str, Rows] = {}
        self._record, self._draws_at_times = True, False
        self._anchors: dict[tuple[str, ...], int | None] = {}
        self._with_batch: dict[tuple[str, ...], int] = {}
        self._learned_tape = False
        self._ungated_task = -1
        self._unseen: list[int] = []
        self._rows: dict[torch.Size | None, int] = {}

    def passes_through(self) -> bool:
        """Whether all rows are kept now, so that nothing needs to be done."""
        shared = self._step.shared
        return shared.selector.step < self._warmup_steps or shared.selector.rate() == 1.0 or shared.pace.passes()

    def intercept(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stands in for the model's call."""
        shared = self._step.shared
        is_asleep = shared.watcher.asleep and shared.pace.is_long() and torch.is_grad_enabled()
        if is_asleep and not torch.compiler.is_compiling():
            return self._sleep_through(original, args, kwargs)
        return self._intercept(original, args, kwargs)

    @private.uncompiled
    def _intercept(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        shared = self._step.shared
        if shared.watcher.asleep or (shared.watcher.paused and shared.pace.is_long()):
            if torch.is_grad_enabled() and shared.pace.is_long():
                shared.watcher.sleep()
                return self._sleep_through(original, args, kwargs)
            if torch.is_grad_enabled():
                shared.watcher.wake()
        shared.watcher.paused = paused = shared.pace.passes() and not shared.living
        if paused:  # nothing to see, so nothing is taken off either
            return self._call(original, args, kwargs)[0]
        with self._step.shared.watcher.off():
            result, call, outputs = self._call(original, args, kwargs)
        # The steps of the model's own loss are loss code: they run watched.
        return result if call is None or call.inner is None else call.with_losses(result, outputs)

    def _call(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tree, Call | None, Sequence[Tensor]]:
        """What the model returned and, where the call was screened, its record and the node's outputs."""
        if not torch.is_grad_enabled() or self._step.shared.running:
            with self._step.shared.watcher.off():  # a sampler's many small calls would pay for being watched
                return original(*args, **kwargs), None, ()
        self.calls += 1
        start = self._step.shared.pace.mark()
        try:
            return self._call_with_grad(original, args, kwargs)
        finally:
            self._step.shared.pace.called(start)

    def _call_with_grad(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tree, Call | None, Sequence[Tensor]]:
        if self.calls == 1:
            self._refuse(self.model)
        if not self._step.shared.state.trainable() and not any(
            leaf.requires_grad for leaf in flatten((args, kwargs))[1]
        ):
            return original(*args, **kwargs), None, ()
        if self.passes_through():
            self._step.shared.idle.ran()
            return self._run_ungated(original, args, kwargs), None, ()
        if self._step.shared.state.is_unfinished():
            with torch.no_grad(), self._step.shared.state.untouched():
                original(*args, **kwargs)
            self._step.shared.state.read()
        self._check_call()
        self._step.shared.engine.check_call((*args, *kwargs.values()))
        step = self._step
        call = Call(
            original, (args, kwargs), step.shared.state, step.receive, self.pairs, self.shared_loss, step.checks
        )
        call = self._sequences.read(call, not step.shared.engine.communicates)
        if call.layout is not None:
            step.shared.learned.learn(call, call.layout)
        if self.screened is not None:
            self._step.shared.idle.ran()
            return self._run_screened(call), None, ()
        return self._screen_call(call)

    def _run_screened(self, call: Call) -> Tree:
        assert self.screened is not None
        screened, self.screened = self.screened, None
        if (norm := self._step.shared.state.mixes_batch()) is not None:
            raise RuntimeError(
                f"gated: after preselect() the kept rows run alone, and {norm} in training mode would take "
                "its statistics from them; put it in eval mode, or leave preselect() away"
            )
        result = screened.run(call, self._batch_dim, self._step.shared.learned, self._outputs_learned)
        self._step.ran_first(screened.hooks)
        self._step.shared.pace.forget()
        self._step.shared.stats.replayed(screened.forwarded, screened.batch)
        return result

    def _check_call(self) -> None:
        """Refuse what would take gradients past the parameters that the replay reaches."""
        if private.in_transform():
            raise RuntimeError("gated: torch.func transforms (grad, vmap) of a gated model are not supported")
        if not self._step.shared.state.same_parameters():
            raise RuntimeError(
                "gated: parameters or submodules of the model were replaced inside the context (functional_call, an "
                "adapter put in?), which the replay would not see; do it before the context"
            )
        if private.caches_parametrizations():
            raise RuntimeError(
                "gated: parametrize.cached() would keep the screen's weights, which have no graph; use it inside the "
                "model's forward, or leave it away"
            )

    def _screen_call(self, call: Call) -> tuple[Tree, Call | None, Sequence[Tensor]]:
        call.syncs = self._step.shared.engine.syncs()
        texts = None if self._batch_dim or call.sequences else find_texts(call, self._step.shared.segments)
        if texts is not None:
            call.expect(texts.segments.rows, 0)
        self._step.shared.engine.before_call()
        key = tuple(call.input_paths)
        if not call.sequences and (anchor := self._anchors.get(key)) is not None:
            call.expect(call.inputs[anchor].shape[self._batch_dim], self._batch_dim)
        result = self._screen(call, self._record, self.tape)
        state = self._step.shared.state
        # What this forward made for good, layers or hooks, is there from the start for the one that counts.
        if made := not state.same_parameters():
            call.scene.undo()
            state.read()
        if made or (call.scene.change.changes_state and state.has_new_hooks()):
            call = call.anew()
            result = self._screen(call, self._record, self.tape)
        scalars = [*flatten(result)[1], *call.left_with_graph()]
        returns_loss = any(leaf.dim() == 0 and leaf.is_floating_point() for leaf in scalars)
        if returns_loss and not self.tape:
            result = self._screen_instead(call, self._record, True)
        if not self._learned_tape or returns_loss:
            self.tape, self._learned_tape = returns_loss, True
        call.texts = texts
        several = texts is None and not call.sequences and key not in self._anchors
        if several and call.outputs and len(sizes_of_inputs(call)) > 1:
            anchor = self._anchors[key] = self._find_anchor(call)
            if anchor is not None and (rows := call.inputs[anchor].shape[self._batch_dim]) != call.size:
                call.expect(rows, self._batch_dim)
                result = self._screen_instead(call, True, self.tape)
        if call.scene.random and not self._record:
            self._draws_at_times = True
            if not self._step.shared.engine.communicates:
                result = self._screen_instead(call, True, self.tape)
        self._check_reach(call, result)
        if not call.outputs:
            return result, None, ()
        # Recording costs time on every operation: it stops when a screen draws nothing, and comes back for good when
        # one does (that one is screened again or, where ranks make the same passes, replayed whole).
        self._record = call.scene.random or self._draws_at_times
        if not self._step.shared.engine.communicates and self._with_batch.get(tuple(call.input_paths)) != call.batch:
            if call.lacks_batch():
                raise ReplayMismatchError(unbatched(call.batch))
            self._with_batch[tuple(call.input_paths)] = call.batch
        config = self._step.shared.selector.config
        unchecked = call.whole is not None or config.reweighs
        with self._step.shared.engine.one_pass(False):
            settle_outputs(call, self._settled, unchecked, self._warn, not self._step.shared.engine.communicates)
        self._check_outputs(call)
        if call.scene.carried:
            self._warn(
                "chain",
                f"gated: this call reads the attribute {call.scene.carried[0]}, where an earlier one has left a "
                "tensor with its graph (features that two methods share, a recurrent state?). No gradient goes through "
                "it, for a replay runs one call. Do both in one call (method=), or detach what is carried over.",
            )
        if any(self._descends(leaf) for leaf in call.inputs if leaf.requires_grad):
            self._warn(
                "chain",
                "gated: an output of this model goes into another call of it with its gradient (a recurrent state?). "
                "Each call then chooses its own rows, and a row dropped in one call passes nothing back through it. "
                "Put the whole sequence into one call (method=), or detach what is carried over.",
            )
        self._step.shared.idle.screened()
        self._step.shared.streams.note([*call.inputs, *call.outputs])
        shared = self._step.shared
        known = shared.learned.known(call) is not None
        holds = shared.waits or shared.engine.balance or self._named or call.texts is not None
        call.lets_go = known and not holds
        live, outputs = call.attach_node(result, self._step.entry.anchor)
        if shared.pace.auto:
            shared.living.add(call)
        if self._named is not None:
            call.named = self._resolve(live, outputs)
        return live, call, outputs

    def _screen(self, call: Call, record: bool, tape: bool) -> Tree:
        probe = None if self._step.shared.engine.communicates else self._step.looks.find_graphs
        return call.screen(self._batch_dim, record, self._step.reader.copy_outputs, Tape() if tape else None, probe)

    def _screen_instead(self, call: Call, record: bool, tape: bool) -> Tree:
        """Once more, as if the first time had not been."""
        self._step.shared.state.attributes.undo(call.scene.change)
        with forked_rng(call.scene.rng), call.scene.buffers.restored():
            return self._screen(call, record, tape)

    def _find_anchor(self, call: Call) -> int | None:
        """Which input has the rows on ``batch_dim``, where the inputs have several sizes there."""
        if self._step.shared.engine.communicates:
            found = None
            doubtful = call.arguments[0].shape[call.batch_dim : call.batch_dim + 1] != (call.size,)
        else:
            with self._step.shared.engine.one_pass(False):
                found = find_anchor(call)
            doubtful = found is None
        if doubtful:
            self._warn("batch", unknown_batch(call.size, sizes_of_inputs(call), call.batch_dim))
        return found

    def _sleep_through(self, original: Any, args: Any, kwargs: Any) -> Any:
        """Pass straight through for as little as can be: only rows and backwards are counted.

        A hook costs more than all else here. Where no window has to be met only every few calls have one, and stand for
        those before them.
        """
        result = original(*args, **kwargs)
        outputs = _leaves((result,))
        shape = args[0].shape if args and type(args[0]) is Tensor else None
        batch = self._rows.get(shape)
        if batch is None or shape is None:
            batch = self._rows[shape] = self._infer(_leaves(args), outputs)
        self._unseen.append(batch)
        if len(self._unseen) % _HOOKED_CALLS and not self._step.waits():
            return result
        if len(self._unseen) > _MOST_UNSEEN:  # what the loss uses is not returned, so that nobody sees its backwards
            self._step.shared.pace.begin()
        for leaf in outputs:
            if leaf.grad_fn is not None:
                leaf.register_hook(self._slept)
        return result

    def _slept(self, _grad: Tensor) -> None:
        shared = self._step.shared
        steps = max(1, len(self._unseen) // shared.pace.calls)
        if self._count_steps(steps):
            shared.stats.ungated(sum(self._unseen))
            self._unseen = []
            shared.pace.slept(steps)
            shared.idle.ran()

    def _count_steps(self, steps: int) -> bool:
        """Count steps that passed straight through, once a backward; returns whether this is the first time in it."""
        task = private.graph_task()
        if task == self._ungated_task:
            return False
        self._ungated_task = task
        self._step.forget_told()
        self._step.shared.selector.step += steps
        self._step.shared.stats.steps += steps
        return True

    def _infer(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
        try:
            return infer_batch_size(inputs, outputs, self._batch_dim)
        except ValueError:
            return 0

    def _texts_in(self, original: Any, args: Any, kwargs: Any) -> int:
        """How many texts a call's rows hold that is not screened; 0 where rows are the samples."""
        shared = self._step.shared
        if self._batch_dim or not (any(map(tells_texts, kwargs)) if shared.segments is None else shared.segments):
            return 0
        texts = find_texts(Call(original, (args, kwargs), shared.state, self._step.receive), shared.segments)
        return 0 if texts is None else len(texts)

    def _run_ungated(self, original: Any, args: Any, kwargs: Any) -> Any:
        """Pass straight through; only count, when a backward comes."""
        attributes = self._step.shared.state.attributes
        known = {id(leaf) for leaf in attributes.take().tensors().values()}
        inputs = _leaves(args) if not kwargs else flatten((args, kwargs))[1]
        result = original(*args, **kwargs)
        outputs = [leaf for leaf in _leaves((result,)) if leaf.grad_fn is not None]
        left = [leaf for leaf in attributes.take().tensors().values() if id(leaf) not in known]
        batch = self._texts_in(original, args, kwargs) or self._infer(inputs, outputs)
        counted = -1

        def count(_grad: Tensor) -> None:
            nonlocal counted
            task = private.graph_task()
            if task != counted:
                counted = task
                self._step.shared.stats.ungated(batch)
                self._step.shared.pace.passed(batch)
            self._count_steps(1)

        for leaf in (*outputs, *left):
            if leaf.grad_fn is not None:
                leaf.register_hook(count)
        return result

    def _descends(self, leaf: Tensor) -> bool:
        sources = find_sources(leaf, trust=True) or []
        return any(getattr(source.call, "state", None) is self._step.shared.state for source in sources)

    def _check_reach(self, call: Call, result: Tree) -> None:
        """Refuse outputs that hold tensors where they cannot be replaced."""

        def look(value: Any) -> None:
            if is_atom(value) or type(value).__module__ == "transformers.cache_utils":
                return  # every decoder returns such a cache, and training uses none
            hidden = [t for t in hidden_tensors(value) if t.is_floating_point()]
            state = self._step.shared.state
            if hidden:
                known = {id(t) for t in (*state.parameters(), *state.buffers(), *call.inputs)}
                hidden = [t for t in hidden if id(t) not in known]
            if hidden or isinstance(value, (GeneratorType, CoroutineType)):
                raise RuntimeError(
                    f"gated: the model returned a {type(value).__name__}, which holds tensors where the gate cannot "
                    "reach them, so they would have no gradient; return them in a tuple, a dict or an object"
                )

        if not isinstance(result, Tensor):
            map_tensors(lambda _path, leaf: leaf, result, other=look)

    def _check_outputs(self, call: Call) -> None:
        if self._step.shared.state.has_forward_hooks():
            self._warn(
                "hooks",
                "gated: the model has forward hooks. They run without a graph when the batch is screened and again on "
                "the kept rows; a loss on what they capture gets no gradient through it: return it from forward.",
            )
        if call.whole is not None:
            self._warn(
                "whole",
                f"gated: {call.whole}, so only a replay of the whole batch gives the exact gradient: this model "
                "trains correctly but saves nothing. Put such layers in eval mode where you can.",
            )

    def _resolve(self, live: Tree, outputs: Sequence[Tensor]) -> tuple[str, int]:
        """Which output ``logp=``, ``logits=`` or ``probs=`` names."""
        assert self._named is not None
        kind, name = self._named
        try:
            if callable(name):
                found = name(live)
            elif isinstance(name, int):
                found = live if isinstance(live, Tensor) and name == 0 else live[name]
            elif isinstance(live, Mapping):
                found = live[name]
            else:
                found = getattr(live, name)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"{kind}={name!r} names no output of {type(self.model).__name__}") from error
        for i, leaf in enumerate(outputs):
            if leaf is found:
                return kind, i
        raise ValueError(f"{kind}={name!r} must name an output tensor of {type(self.model).__name__} itself")


def _leaves(trees: tuple[Tree, ...]) -> Sequence[Tensor]:
    """The tensors in these; plain ones pay for no walk."""
    return trees if all(type(tree) is Tensor for tree in trees) else flatten(trees)[1]
