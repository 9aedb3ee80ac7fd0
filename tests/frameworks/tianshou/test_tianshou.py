"""tianshou's own PPO and A2C, gated, train the parameters that they train where the dropped rows' terms are masked."""

import re
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Independent, Normal

pytest.importorskip("tianshou", reason="make frameworks ONLY=tianshou")

from tianshou.algorithm import A2C, PPO
from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Batch, Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.utils.net.common import Net
from tianshou.utils.net.continuous import ContinuousActorProbabilistic, ContinuousCritic
from tianshou.utils.net.discrete import DiscreteActor, DiscreteCritic
from tianshou.utils.torch_utils import policy_within_training_step

import kondo_hooks as kondo

PAGE = Path(__file__).parents[3] / "docs" / "frameworks" / "tianshou.md"
ENVIRONMENTS, LENGTH = 4, 8


class Weights:
    """Factors on the gradients that each minibatch's distribution gets."""

    def __init__(self, factors):
        self.factors, self.now = factors, None

    def on(self, distribution):
        """Weigh what is asked of a distribution of the update."""
        if self.factors is None or not torch.is_grad_enabled():
            return distribution
        now = self.factors.pop(0)
        log_prob, entropy = distribution.log_prob, distribution.entropy

        def weighed(tensor):
            tensor.register_hook(lambda grad: grad * now)
            return tensor

        distribution.log_prob = lambda value: weighed(log_prob(value))
        distribution.entropy = lambda: weighed(entropy())
        return distribution


def make(kind, discrete, shared=False, weights=None, observations=4, actions=3, **options):
    """An algorithm with tianshou's own networks."""
    weights = weights or Weights(None)
    net = Net(state_shape=(observations,), hidden_sizes=[16])
    other = net if shared else Net(state_shape=(observations,), hidden_sizes=[16])
    if discrete:
        actor = DiscreteActor(preprocess_net=net, action_shape=actions, softmax_output=False)
        critic = DiscreteCritic(preprocess_net=other)
        space, dist = gymnasium.spaces.Discrete(actions), lambda logits: weights.on(Categorical(logits=logits))
    else:
        actor = ContinuousActorProbabilistic(preprocess_net=net, action_shape=(2,), unbounded=True)
        critic = ContinuousCritic(preprocess_net=other)
        space, dist = gymnasium.spaces.Box(-1, 1, (2,)), lambda pair: weights.on(Independent(Normal(*pair), 1))
    policy = ProbabilisticActorPolicy(
        actor=actor, dist_fn=dist, action_space=space, action_scaling=False, action_bound_method=None
    )
    return kind(policy=policy, critic=critic, optim=AdamOptimizerFactory(lr=1e-2, eps=1e-3), **options)


def rollout(discrete):
    """A buffer of four environments, in numpy."""
    buffer, rng = VectorReplayBuffer(ENVIRONMENTS * LENGTH, ENVIRONMENTS), np.random.default_rng(1)
    for step in range(LENGTH):
        last = np.full(ENVIRONMENTS, step == LENGTH - 1)
        taken = rng.integers(3, size=ENVIRONMENTS) if discrete else rng.normal(size=(ENVIRONMENTS, 2))
        buffer.add(
            Batch(
                obs=rng.normal(size=(ENVIRONMENTS, 4)).astype(np.float32),
                act=taken if discrete else taken.astype(np.float32),
                rew=rng.normal(size=ENVIRONMENTS),
                terminated=np.zeros(ENVIRONMENTS, bool),
                truncated=last,
                done=last,
                obs_next=rng.normal(size=(ENVIRONMENTS, 4)).astype(np.float32),
                info=Batch(env_id=np.arange(ENVIRONMENTS), seed=rng.normal(size=ENVIRONMENTS)),
            ),
            buffer_ids=np.arange(ENVIRONMENTS),
        )
    return buffer


class Run:
    """One update of two passes over two minibatches: plain, gated, or with factors on rows."""

    def __init__(self, kind, discrete=True, rule=None, factors=None, gate_policy=False, **options):
        torch.manual_seed(0)
        np.random.seed(0)
        weights = Weights(None if factors is None else list(factors))
        algorithm = make(kind, discrete, weights=weights, **options)
        buffer = rollout(discrete)
        self.start, self.factors, self.graphs = self.parameters(algorithm), [], 0
        actor = algorithm.policy.actor
        actor.preprocess.register_forward_hook(self.count)
        algorithm.optim._optim.register_step_post_hook(
            lambda *_: None if rule is None else self.factors.append(gate.last.factors())
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            enabled = rule is not None
            with (
                policy_within_training_step(algorithm.policy),
                kondo.gated(
                    algorithm.policy if gate_policy else actor, **(rule or {"rate": 1.0}), enabled=enabled
                ) as gate,
            ):
                self.stats = algorithm.update(buffer, ENVIRONMENTS * LENGTH // 2, 2)
        told = [str(w.message) for w in caught if issubclass(w.category, kondo.KondoWarning)]
        self.told = [message for message in told if "forward hooks" not in message]
        self.end, self.skipped = self.parameters(algorithm), gate.stats.skipped

    @staticmethod
    def parameters(algorithm):
        return [p.detach().clone().double() for p in algorithm.parameters()]

    def count(self, _module, given, _output):
        if torch.is_grad_enabled():
            self.graphs += len(given[0])

    def distance(self, other):
        """Largest difference of the parameters, relative to how far they moved."""
        moved = max(float((p - q).abs().max()) for p, q in zip(other.end, self.start, strict=True))
        return max(float((p - q).abs().max()) for p, q in zip(self.end, other.end, strict=True)) / moved


CASES = [
    (PPO, True, {"rate": 0.25}, {}),
    (PPO, True, {"noise": 0.5}, {"dual_clip": 2.0, "value_clip": True, "recompute_advantage": True}),
    (PPO, True, {"rate": 0.25, "priority": "abs_advantage"}, {"max_grad_norm": 0.5}),
    (PPO, False, {"rate": 0.25}, {}),
    (PPO, False, {"noise": 0.5}, {"return_scaling": True}),
    (PPO, True, {"noise": 0.5}, {"shared": True}),
    (PPO, False, {"noise": 0.5}, {"gate_policy": True}),
    (A2C, True, {"rate": 0.25}, {}),
    (A2C, False, {"noise": 0.5}, {"ent_coef": 0.0}),
]


@pytest.mark.parametrize(("kind", "discrete", "rule", "options"), CASES, ids=str)
def test_parameters_are_those_of_masked_terms(kind, discrete, rule, options):
    gated = Run(kind, discrete, rule, **options)
    masked = Run(kind, discrete, factors=gated.factors, **options)
    assert gated.distance(masked) < 2e-4 < 1e-2 < gated.distance(Run(kind, discrete, **options))  # all in float32
    shared = 2 if options.get("shared") else 1
    rows = shared * 2 * ENVIRONMENTS * LENGTH
    looks = 32 if options.get("gate_policy") else 0  # at the arrays of the first minibatch: which of them are read
    assert not gated.told and 0 < gated.graphs < rows + looks and masked.graphs == rows
    assert gated.skipped > 0.2
    for name, value in masked.stats.get_loss_stats_dict().items():  # what tianshou logs is of all rows
        assert gated.stats.get_loss_stats_dict()[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_the_page_s_recipe(tmp_path):
    block = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL).group(1)
    environments = DummyVectorEnv([lambda: gymnasium.make("CartPole-v1") for _ in range(4)])
    algorithm = make(PPO, True, actions=2)
    logged = {}
    names = {
        "algorithm": algorithm,
        "collector": Collector(algorithm, environments, VectorReplayBuffer(200, 4)),
        "log": logged.__setitem__,
        "sizes": {"max_epochs": 1, "epoch_num_steps": 128, "collection_step_num_env_steps": 64, "batch_size": 32},
    }
    exec(block, names)
    assert names["gate"].stats.steps and 0 < names["gate"].stats.skipped < 1
    assert {"kondo/rate", "kondo/kept"} <= logged.keys()
