"""skrl's ``PPO``: its policy gated, its logger told, and each minibatch decided on by what the memory has of it.

with gated_ppo(agent, noise=0.5):
    trainer.train()
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import kondo_hooks as kondo
from kondo_hooks.integrations.attributes import put


@contextlib.contextmanager
def gated_ppo(agent: Any, *, screen_first: bool = False, **options: Any) -> Iterator[kondo.Gated]:
    """Gate the policy of a skrl agent; a value model of its own learns from every row.

    The agent then tracks ``Kondo / rate``, ``Kondo / kept`` and so on beside its losses.

    Args:
        agent: a ``skrl.agents.torch.ppo.PPO``.
        screen_first: decide on each minibatch by the log-probs and the advantages that the memory has of it, so that
            the policy runs on the kept rows alone. What is tracked of the loss is then of these rows and of copies of
            them, so nothing must follow the KL.
        options: of :func:`kondo_hooks.gated`.

    Raises:
        ValueError: on ``screen_first`` with one model for policy and value, or where something follows the KL.
    """
    if screen_first:
        if agent.policy is agent.value:
            raise ValueError("gated_ppo: screen_first=True needs a value model of its own, which runs on every row")
        if agent.cfg.kl_threshold or "KL" in type(agent.scheduler).__name__:
            raise ValueError(
                "gated_ppo: screen_first=True runs the policy on the kept rows alone, so the KL is that of these rows "
                "and of copies of them: set kl_threshold=0 and no KLAdaptiveLR, or leave screen_first away"
            )
    with kondo.gated(agent.policy, method="act", **options) as gate, contextlib.ExitStack() as stack:
        update, sample = agent.update, agent.memory.sample

        def tracked(**kwargs: Any) -> None:
            before = copy.copy(gate.stats)
            update(**kwargs)
            for name, value in gate.stats.metrics(before, "Kondo").items() if gate.enabled else ():
                agent.track_data(name.replace("/", " / "), value)

        def screened(names: Any, **kwargs: Any) -> Iterator[Any]:
            logp, advantages = names.index("log_prob"), names.index("advantages")
            for batch in sample(names, **kwargs):
                gate.preselect(logp=batch[logp].squeeze(-1), advantages=batch[advantages].squeeze(-1))
                yield batch

        put(stack, agent, "update", tracked)
        if screen_first:
            put(stack, agent.memory, "sample", lambda *, names, **kwargs: screened(names, **kwargs))
        yield gate
