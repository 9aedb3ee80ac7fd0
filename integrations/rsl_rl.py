"""rsl_rl's ``PPO``: its actor gated, its logger told, and each minibatch decided on by what the storage has of it.

with gated_ppo(runner.alg, noise=0.5, screen_first=True):
    runner.learn(1000)
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import kondo_hooks as kondo
from kondo_hooks.integrations.attributes import put


@contextlib.contextmanager
def gated_ppo(alg: Any, *, screen_first: bool = False, **options: Any) -> Iterator[kondo.Gated]:
    """Gate the actor of an rsl_rl algorithm; the critic learns from every row.

    Rows are the steps of a minibatch. Where the actor is recurrent they are its environments, each with all of its
    steps. What ``alg.update()`` returns for rsl_rl's logger then holds ``kondo/rate``, ``kondo/kept`` and so on.

    Args:
        alg: an ``rsl_rl.algorithms.PPO``: ``runner.alg``.
        screen_first: decide on each minibatch by the log-probs and the advantages that the storage has of it, so that
            the actor runs on the kept rows alone. What is logged of the loss, the entropy and the KL is then of these
            rows and of copies of them, so the learning rate must not follow the KL.
        options: of :func:`kondo_hooks.gated`.

    Raises:
        ValueError: on ``screen_first`` with a learning rate that follows the KL, or with symmetric copies of the rows.
    """
    if screen_first:
        if alg.schedule == "adaptive" and alg.desired_kl is not None:
            raise ValueError(
                "gated_ppo: screen_first=True runs the actor on the kept rows alone, so the KL is that of these rows "
                "and of copies of them, and schedule='adaptive' would follow it: set schedule='fixed', or leave "
                "screen_first away"
            )
        if alg.symmetry:
            raise ValueError("gated_ppo: screen_first=True is for rows without symmetric copies: alg.symmetry is on")
    recurrent = alg.actor.is_recurrent
    generator = "recurrent_mini_batch_generator" if recurrent else "mini_batch_generator"
    with contextlib.ExitStack() as stack:
        if recurrent:
            by_environment = _ByEnvironment(alg.actor)
            put(stack, alg.actor, "forward", by_environment)
            options = {"method": (by_environment, "run"), "batch_dim": 1, **options}
        gate = stack.enter_context(kondo.gated(alg.actor, **options))
        update, batches = alg.update, getattr(alg.storage, generator)

        def logged() -> dict[str, float]:
            before = copy.copy(gate.stats)
            losses: dict[str, float] = update()
            return losses | (gate.stats.metrics(before) if gate.enabled else {})

        def screened(*args: Any, **kwargs: Any) -> Iterator[Any]:
            for batch in batches(*args, **kwargs):
                logp, u = (t.squeeze(-1) for t in (batch.old_actions_log_prob, batch.advantages))
                gate.preselect(logp=logp.T if recurrent else logp, advantages=u.T if recurrent else u)
                yield batch

        put(stack, alg, "update", logged)
        if screen_first:
            put(stack, alg.storage, generator, screened)
        yield gate


class _ByEnvironment:
    """A recurrent actor's forward, with a method between that has the environments on axis 1 of all that it is given.

    The storage cuts each environment's T steps where episodes end, and pads the pieces: the actor gets (T, pieces, F),
    a mask of the steps and a state for each piece, and joins the pieces to (T, environments, ...) again.
    """

    def __init__(self, actor: Any):
        self._forward: Callable[..., Tensor] = actor.forward

    def __call__(self, obs: Any, masks: Tensor | None = None, hidden_state: Any = None, **others: Any) -> Tensor:
        """As the actor's."""
        if masks is None:
            return self._forward(obs, masks, hidden_state, **others)
        steps, lengths = len(masks), masks.sum(0)
        environment = (lengths.cumsum(0) - lengths) // steps  # each has as many steps in all
        first = torch.ones_like(environment, dtype=torch.bool)
        first[1:] = environment[1:] != environment[:-1]
        every = torch.arange(len(lengths), device=masks.device)
        place = every - every[first][environment]
        shape = int(place.max()) + 1, int(environment.max()) + 1

        def spread(pieces: Tensor) -> Tensor:
            """(N, ...) pieces -> (most of an environment, environments, ...)."""
            return pieces.new_zeros(*shape, *pieces.shape[1:]).index_put((place, environment), pieces)

        states = hidden_state if isinstance(hidden_state, tuple) else (hidden_state,)
        return self.run(
            {name: spread(leaf.transpose(0, 1)) for name, leaf in obs.items()},
            spread(masks.T),
            tuple(spread(state.transpose(0, 1)) for state in states),
            others,
        )

    def run(self, obs: dict[str, Tensor], masks: Tensor, states: tuple[Tensor, ...], others: dict[str, Any]) -> Tensor:
        """What the actor makes of (pieces, environments, T, F), (T, environments, ...)."""
        from tensordict import TensorDict

        used = masks.any(-1).T  # (environments, pieces), so that those of an environment follow each other

        def pieces(leaf: Tensor) -> Tensor:
            return leaf.transpose(0, 1)[used].transpose(0, 1)

        mine = {name: pieces(leaf) for name, leaf in obs.items()}
        each = tuple(pieces(state).contiguous() for state in states)
        size = [masks.shape[-1], int(used.sum())]
        return self._forward(TensorDict(mine, size), pieces(masks), each if len(each) > 1 else each[0], **others)
