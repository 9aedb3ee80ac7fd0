"""How small RL programs call their policies: one step at a time, a distribution beside the log-prob, an own sample."""

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Normal
from torch.nn import functional as F

import kondo_hooks as kondo
from tests.reference import copies, grads, largest_relative_difference

STEPS, B = 20, 16
RULES = [{"rate": 0.25}, {"noise": 0.5}, {"rate": 0.25, "priority": "abs_advantage"}, {"rate": "lossless"}]
pytestmark = pytest.mark.filterwarnings("ignore:.*holds no policy.*:kondo_hooks.KondoWarning")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TwoHeads(nn.Module):
    """Probabilities of actions and a value, for one observation at a time."""

    def __init__(self):
        super().__init__()
        self.affine, self.action, self.value = nn.Linear(4, 16), nn.Linear(16, 2), nn.Linear(16, 1)

    def forward(self, x):
        x = F.relu(self.affine(x))
        return F.softmax(self.action(x), dim=-1), self.value(x)


def episode(model, critic, factors=None):
    """Log-probs and values are collected step by step, and one loss is made of the lists."""
    actions = torch.randint(2, (STEPS, 1), generator=torch.Generator().manual_seed(1))
    saved = []
    for observation, action in zip(normal(STEPS, 1, 4), actions, strict=True):
        probs, value = model(observation)
        saved.append((Categorical(probs).log_prob(action), value))
    policy, values = [], []
    for i, ((log_prob, value), reward) in enumerate(zip(saved, normal(STEPS, seed=2), strict=True)):
        factor = 1 if factors is None else factors[i]
        advantage = reward - value.item() if critic else reward
        policy.append(-log_prob * advantage * factor)
        values.append(F.smooth_l1_loss(value, reward.view(1, 1)) * factor)
    return torch.stack(policy).sum() + (torch.stack(values).sum() if critic else 0)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("critic", [False, True])
def test_an_episode_of_single_steps(critic, rule):
    ours, theirs = copies(TwoHeads().double())
    with kondo.gated(ours, **rule) as gate:
        episode(ours, critic).backward()
    episode(theirs, critic, gate.last.factors().double()).backward()
    ours_grads, theirs_grads = ({k: g for k, g in grads(m).items() if g is not None} for m in (ours, theirs))
    assert largest_relative_difference(ours_grads, theirs_grads) < 1e-10
    assert gate.stats.forwarded < STEPS or rule["rate"] == "lossless"


def test_single_observations_without_a_batch_axis_are_refused():
    model = TwoHeads().double()
    with pytest.raises(kondo.ReplayMismatchError, match=r"x\[None\]"), kondo.gated(model, noise=0.5):
        probs, _ = model(normal(4))
        (-Categorical(probs).log_prob(torch.tensor(1))).backward()


class Actor(nn.Module):
    """Returns its distribution, and the log-prob of an action that it is given."""

    def __init__(self, continuous):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
        self.log_std = nn.Parameter(-0.5 * torch.ones(3)) if continuous else None

    def forward(self, observations, actions=None):
        out = self.net(observations)
        if self.log_std is None:
            policy = Categorical(logits=out)
            return policy, None if actions is None else policy.log_prob(actions)
        policy = Normal(out, self.log_std.exp())
        return policy, None if actions is None else policy.log_prob(actions).sum(-1)


class ActorCritic(nn.Module):
    def __init__(self, continuous):
        super().__init__()
        self.pi, self.v = Actor(continuous), nn.Linear(4, 1)


def clipped(agent, continuous, old, factors=1.0, entropy=0.0):
    actions = normal(B, 3, seed=3) if continuous else torch.arange(B) % 3
    advantages = normal(B, seed=4)
    policy, logp = agent.pi(normal(B, 4), actions)
    ratio = torch.exp(logp - old)
    bonus = policy.entropy().flatten(1).sum(1) if continuous else policy.entropy()
    terms = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) + entropy * bonus
    return -(terms * factors).mean()


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("entropy", [0.0, 0.01])
@pytest.mark.parametrize("continuous", [False, True])
def test_a_distribution_beside_its_log_prob(continuous, entropy, rule):
    ours, theirs = copies(ActorCritic(continuous).double())
    with torch.no_grad():
        old = theirs.pi(normal(B, 4), normal(B, 3, seed=3) if continuous else torch.arange(B) % 3)[1]
        old = old + 0.2 * normal(B, seed=5)
    with kondo.gated(ours.pi, **rule) as gate:
        clipped(ours, continuous, old, entropy=entropy).backward()
    clipped(theirs, continuous, old, gate.last.factors().double(), entropy).backward()
    assert largest_relative_difference(grads(ours.pi), grads(theirs.pi)) < 1e-10
    assert gate.stats.forwarded < B or (entropy and rule["rate"] == "lossless")  # which every row has


class Sampler(nn.Module):
    """A squashed Gaussian that learns through its own sample, as off-policy actors do; returns it with its log-prob."""

    def __init__(self, inside):
        super().__init__()
        self.net, self.inside = nn.Linear(4, 4), inside

    def policy(self, x):
        mean, log_std = self.net(x).chunk(2, -1)
        return Normal(mean, log_std.exp())

    def forward(self, x):
        return drawn(self.policy(x)) if self.inside else self.net(x)


def drawn(policy):
    sample = policy.rsample()
    return sample.tanh(), (policy.log_prob(sample) - torch.log(1 - sample.tanh() ** 2 + 1e-6)).sum(-1)


def actor_loss(model, critic, factors=1.0):
    torch.manual_seed(7)
    out = model(normal(B, 4))
    if not model.inside:
        mean, log_std = out.chunk(2, -1)
        out = drawn(Normal(mean, log_std.exp()))
    action, log_prob = out
    return ((0.2 * log_prob - critic(action)[:, 0]) * factors).mean()


@pytest.mark.parametrize("inside", [False, True])
def test_a_log_prob_of_an_own_sample_is_no_policy_gradient(inside):
    model, critic = Sampler(inside).double(), nn.Linear(2, 1).double()
    with pytest.raises(kondo.DelightError, match=r"noise=0.5"), kondo.gated(model, rate=0.25):
        actor_loss(model, critic).backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("rule", [{"noise": 0.7}, {"rate": 0.25, "priority": "norm"}, {"rate": "lossless"}], ids=str)
def test_it_is_exact_by_a_rule_that_needs_no_policy(inside, rule):
    ours, theirs = copies(Sampler(inside).double())
    critic = nn.Linear(2, 1).double()
    with kondo.gated(ours, **rule) as gate:
        actor_loss(ours, critic).backward()
    actor_loss(theirs, critic, gate.last.factors().double()).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
    assert gate.stats.forwarded < B or rule["rate"] == "lossless"


class Resampler(nn.Module):
    """Draws the action anew where it is given none: of a Beta, whose ``sample`` is made of ``rsample``."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 2)

    def forward(self, x):
        policy = torch.distributions.Beta(*(1 + self.net(x).exp()).unbind(-1))
        return policy.log_prob(policy.sample())


def test_a_sample_without_a_gradient_is_an_action():
    ours, theirs = copies(Resampler().double())

    def loss(model, factors=1.0):
        torch.manual_seed(7)
        return -(normal(B, seed=4) * model(normal(B, 4)) * factors).mean()

    with kondo.gated(ours, rate=0.25) as gate:
        loss(ours).backward()
    loss(theirs, gate.last.factors().double()).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10 and gate.stats.delight_kept > 0
