"""What a replay has to find as the screen did, and what the screen itself drew and changed there."""

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kondo_hooks import private
from kondo_hooks.same.attributes import Change
from kondo_hooks.same.randomness import NO_DRAWS, Draws, RecordDraws
from kondo_hooks.same.state import (
    Autocast,
    BufferRecord,
    ModuleState,
    forked_rng,
    rng_state,
    rng_state_now,
    same_rng_state,
)
from kondo_hooks.same.uses import Uses, memory_of


class Scene:
    """What stands around one call of a model.

    Args:
        state: of the model.
        devices: that the call's inputs are on.

    Attributes:
        flags: training flags of the modules, requires-grad flags of the parameters.
        autocast: as it was.
        rng: the generators' states before the screen.
        draws: the screen's random operations.
        random: whether it drew a random number.
        whole: why a replay of some rows cannot see the same, if so.
        buffers: that it changed.
        change: what it found and left in the modules' attributes.
        carried: attributes that it read, in which an earlier call has left a tensor with its graph.
        left_behind: attributes in which it left a graph that nobody knew of.
        in_buffers: buffers in which it left a graph.
    """

    def __init__(self, state: ModuleState, devices: Collection[torch.device]):
        self.state = state
        devices = state.devices().union(devices)
        self.flags = state.flags()
        self.autocast = Autocast.current(devices)
        self.rng = rng_state(devices, state.generators())
        self.draws = NO_DRAWS
        self.random = False
        self.whole: str | None = None
        self.carried: Sequence[str] = ()
        self.left_behind: Sequence[str] = ()
        self.in_buffers: Sequence[str] = ()
        self.buffers: BufferRecord
        self.change: Change

    @contextlib.contextmanager
    def screened(self, record: bool, inputs: Sequence[Tensor]) -> Iterator[None]:
        """Around the screen, which runs without a graph.

        Args:
            record: note random operations, so that a replay of some rows can repeat them.
            inputs: of the call.
        """
        state = self.state
        self.draws, self.whole = Draws() if record else NO_DRAWS, None
        self.buffers = state.buffers_before()
        self._before = state.attributes.before()
        carried = state.attributes.with_graphs(self._before)
        if carried:
            own = {memory_of(leaf) for leaf in (*state.parameters(), *inputs)}
            carried = {path: leaf for path, leaf in carried.items() if memory_of(leaf) not in own}
        uses = Uses(*carried.values()) if carried else None
        with (
            torch.no_grad(),
            no_fast_path() if state.has_fast_path else contextlib.nullcontext(),
            state.plain_dropout(),
            uncompiled() if record or uses else contextlib.nullcontext(),
            uses or contextlib.nullcontext(),
            RecordDraws(self.draws, self.rng) if record else contextlib.nullcontext(),
        ):
            yield
        if self.autocast.enabled:
            private.forget_casts()
        self.carried = state.attributes.read_of(carried, uses.each) if uses else ()
        state.note_changes(self.buffers)
        self._parameter_versions = state.versions()
        if self.draws.others:
            self.rng = [*self.rng, *self.draws.others]
        self.random = not same_rng_state(self.rng, rng_state_now(self.rng))
        if self.draws.missed or (self.random and not record):
            self.whole = "a random operation in it was not recorded"
        elif self.draws.indivisible:
            self.whole = f"{self.draws.indivisible} draws its random numbers inside the kernel"
        elif (norm := state.mixes_batch()) is not None:
            self.whole = f"{norm} in training mode computes statistics over the batch"

    def compare(self, has_rows: Callable[[Tensor], bool]) -> None:
        """After the screen, once it is known which tensors hold the rows of the batch."""
        self.change = self.state.attributes.compare(self._before, has_rows)
        del self._before

    def undo(self) -> None:
        """As it was before the screen, for another that takes its place."""
        self.state.attributes.undo(self.change)
        self.buffers.undo()

    @contextlib.contextmanager
    def again(self, states: Sequence[Tensor]) -> Iterator[None]:
        """As the screen saw it; undone on exit.

        Args:
            states: rows of the tensors that it replaced in attributes.
        """
        state = self.state
        with (
            state.restored_children(),
            state.restored_flags(self.flags),
            state.plain_dropout(),
            self.autocast.restored(),
            self.buffers.restored() if self.buffers.entries else contextlib.nullcontext(),
            forked_rng(self.rng) if self.random else contextlib.nullcontext(),
            self.attributes_again(states),
        ):
            yield

    def attributes_again(self, states: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
        """What stood in the modules' attributes before the screen alone."""
        return self.state.attributes.as_before(self.change, states)

    def left(self) -> Mapping[str, Tensor]:
        """What stands in attributes now, where the screen left tensors."""
        return self.state.attributes.take().tensors() if self.change.paths else {}

    def learn_left(self, known: Collection[str]) -> Mapping[str, Tensor]:
        """The same after a run with a graph, which shows what has one; ``known`` are attributes that were known to."""
        left = self.left()
        self.in_buffers = self.state.buffers_with_graph()
        if left:
            graphs = self.state.attributes.learn(self.change, left)
            self.left_behind = [path for path in graphs if path not in known]
        return left

    def same_parameters(self) -> bool:
        """Whether nobody has written to the parameters since the screen."""
        return self.state.versions() == self._parameter_versions

    def changed_buffers(self) -> set[int]:
        """Ids of the buffers that the screen changed, as they are now."""
        return {id(module._buffers[name]) for module, name, *_ in self.buffers.entries}


@contextlib.contextmanager
def no_fast_path() -> Iterator[None]:
    """Transformer layers in eval mode take another path without grad, which zeroes padding: the replay would differ."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def uncompiled() -> Any:
    """A compiled model runs as it is written: under a dispatch mode Dynamo would give its frame up for good."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
