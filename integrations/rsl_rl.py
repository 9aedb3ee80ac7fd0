"""rsl_rl's ``PPO``: its actor gated, its logger told, and each minibatch decided on by what the storage has of it.

with gated_ppo(runner.alg, noise=0.5, screen_first=True):
    runner.learn(1000)
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import kondo_hooks as kondo
from kondo_hooks.integrations.attributes import put


@contextlib.contextmanager
def gated_ppo(alg: Any, *, screen_first: bool = False, **options: Any) -> Iterator[kondo.Gated]:
    """Gate the actor of an rsl_rl algorithm; the critic learns from every row.

    What ``alg.update()`` returns for rsl_rl's logger then holds ``kondo/rate``, ``kondo/kept`` and so on.

    Args:
        alg: an ``rsl_rl.algorithms.PPO``: ``runner.alg``.
        screen_first: decide on each minibatch by the log-probs and the advantages that the storage has of it, so that
            the actor runs on the kept rows alone. What is logged of the loss, the entropy and the KL is then of these
            rows and of copies of them, so the learning rate must not follow the KL.
        options: of :func:`kondo_hooks.gated`.

    Raises:
        ValueError: on ``screen_first`` with a learning rate that follows the KL, with a recurrent actor, or with
            symmetric copies of the rows.
    """
    if screen_first:
        if alg.schedule == "adaptive" and alg.desired_kl is not None:
            raise ValueError(
                "gated_ppo: screen_first=True runs the actor on the kept rows alone, so the KL is that of these rows "
                "and of copies of them, and schedule='adaptive' would follow it: set schedule='fixed', or leave "
                "screen_first away"
            )
        if alg.actor.is_recurrent or alg.symmetry:
            raise ValueError("gated_ppo: screen_first=True is for actors that take single rows, without symmetry")
    with kondo.gated(alg.actor, **options) as gate, contextlib.ExitStack() as stack:
        update, batches = alg.update, alg.storage.mini_batch_generator

        def logged() -> dict[str, float]:
            before = copy.copy(gate.stats)
            losses: dict[str, float] = update()
            return losses | (gate.stats.metrics(before) if gate.enabled else {})

        def screened(*args: Any, **kwargs: Any) -> Iterator[Any]:
            for batch in batches(*args, **kwargs):
                gate.preselect(logp=batch.old_actions_log_prob.squeeze(-1), advantages=batch.advantages.squeeze(-1))
                yield batch

        put(stack, alg, "update", logged)
        if screen_first:
            put(stack, alg.storage, "mini_batch_generator", screened)
        yield gate
