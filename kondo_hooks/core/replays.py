"""Kept rows are run again with a graph, checked, and drive the backward."""

import contextlib
from collections.abc import Iterator

from torch import Tensor

from kondo_hooks.core import passes
from kondo_hooks.core.arrival import Arrival
from kondo_hooks.core.entry import Entry
from kondo_hooks.core.kept_rows import Part
from kondo_hooks.core.replay import Replayed, input_grads
from kondo_hooks.core.shared import Shared
from kondo_hooks.errors import add_note
from kondo_hooks.rules.readback import Readback

_NO_GRAPH = (
    "gated: the kept rows ran again with grad, but no output that the loss uses has a graph, so nothing would learn; "
    "plain PyTorch raises here too. Likely: a reentrant checkpoint whose inputs need no gradient (use_reentrant=False, "
    "or model.enable_input_require_grads()), a forward under no_grad, outputs that the model detaches."
)


class Replays:
    """Replays the rows that a decision has kept."""

    def __init__(self, shared: Shared, entry: Entry):
        self.shared = shared
        self._entry = entry

    def __call__(
        self,
        arrivals: list[Arrival],
        slots: list[int],
        parts: list[Part | None],
        counts: Tensor | None,
        reduces: bool,
        back: Readback,
    ) -> list[Tensor | None]:
        """Run the kept rows again with a graph, check them, and run the backward through them."""
        engine, first = self.shared.engine, arrivals[0]
        planned = engine.plan(arrivals, slots, parts, counts, self.shared.micro_batch_size, self.shared.learned)
        if planned.imbalance is not None:
            self.shared.stats.spread(*planned.imbalance)
        done: list[Replayed] = []
        if len(planned.groups) > 1 and self._entry.steps_inside() and self._one_at_a_time(planned):
            raise RuntimeError(
                "gated: hooks step the optimizer inside of the backward, but the kept rows need several passes, and "
                "each would step it by its share. Leave micro_batch_size away, or step after the backward. Nothing was "
                "changed."
            )
        start = self.shared.pace.mark()
        with self.shared.replaying():
            if not self._one_at_a_time(planned):
                done = passes.checked(planned.groups, self.shared.learned, back)
                has_graph = [bool(r.outputs) for r in done]
                with passes.as_in_screen(done):
                    self._backward(first, done)
            else:
                has_graph = []
                # One pass at a time: a graph holds no more than one, and only the last reduces gradients.
                with self._taking_back(done):
                    for n, group in enumerate(planned.groups):
                        last = n == len(planned.groups) - 1
                        with engine.one_pass(reduces and last):
                            replayed = engine.run(group, first, self.shared.learned, back)
                            with passes.as_in_screen(replayed):
                                self._backward(first, replayed)
                        has_graph += [bool(r.outputs) for r in replayed]
                        done += [r.summary() for r in replayed] if not last else replayed
        if not any(has_graph):
            self.shared.engine.ranks.fail(RuntimeError(_NO_GRAPH))
        for scene in {id(part.call): part.call.scene for r in done for part in r.group}.values():
            if scene.in_buffers:
                self.shared.warn(
                    "buffer",
                    f"gated: the model's forward puts a tensor with a graph into its buffer {scene.in_buffers[0]}. No "
                    "gradient goes through it: return the tensor, or keep it in an attribute that is no buffer.",
                )
            if scene.left_behind:
                self.shared.warn(
                    "attribute",
                    "gated: it was not known before the first replay that the model's forward leaves tensors with a "
                    f"graph in its attributes ({', '.join(scene.left_behind)}). If this step's loss used them, it had "
                    "no gradient through them; from the next call on it has. Return them from forward to be sure.",
                )
        rows = sum(part.samples for r in done for part in r.group)
        self.shared.stats.replayed(rows, 0)
        self.shared.pace.replayed(start, rows)
        return input_grads(done[-1])

    @contextlib.contextmanager
    def _taking_back(self, done: list[Replayed]) -> Iterator[None]:
        """Around several passes: where one fails, the gradients that those before it, ``done``, made are gone, too."""
        parameters = list(self.shared.state.parameters())
        without_grad = [p for p in parameters if p.grad is None]
        try:
            yield
        except Exception as error:
            if done and not self.shared.engine.wrappers:
                for p in without_grad:
                    p.grad = None
                if len(without_grad) < len(parameters):
                    add_note(error, "gated: earlier passes of this replay have added to the gradients: zero them.")
            raise

    def _one_at_a_time(self, planned: passes.Plan) -> bool:
        """Whether each pass has a backward of its own."""
        if self.shared.engine.inside:
            return False
        return bool(
            self.shared.engine.wrappers
            or self.shared.micro_batch_size is not None
            or passes.share_draws(planned.groups)
        )

    def _backward(self, first: Arrival, replayed: list[Replayed]) -> None:
        """Into ``.grad``, or into what ``torch.autograd.grad`` asked for."""
        outputs = [output for r in replayed for output in r.outputs]
        grads = [grad for r in replayed for grad in r.grads]
        leaves = [leaf for r in replayed for leaf, _ in r.leaves]
        if outputs:
            self._entry.to_parameters(outputs, grads, leaves, first.to_parameters)
