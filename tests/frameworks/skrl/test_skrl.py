"""skrl's own PPO agent, gated, trains the parameters that it trains where the dropped rows' terms are masked."""

import re
import warnings
from pathlib import Path

import gymnasium
import pytest
import torch
from torch import nn

pytest.importorskip("skrl", reason="make frameworks ONLY=skrl")

from skrl.agents.torch.ppo import PPO, PPO_CFG
from skrl.envs.wrappers.torch import wrap_env
from skrl.memories.torch import RandomMemory
from skrl.models.torch import CategoricalMixin, DeterministicMixin, GaussianMixin, Model
from skrl.resources.preprocessors.torch import RunningStandardScaler
from skrl.resources.schedulers.torch import KLAdaptiveLR

import kondo_hooks as kondo
from kondo_hooks.integrations.skrl import gated_ppo

PAGE = Path(__file__).parents[3] / "docs" / "frameworks" / "skrl.md"
ENVIRONMENTS, LENGTH = 4, 8
OBSERVATIONS, BOX = gymnasium.spaces.Box(-1, 1, (4,)), gymnasium.spaces.Box(-1, 1, (2,))
DISCRETE = gymnasium.spaces.Discrete(3)


@pytest.fixture(autouse=True)
def double():  # skrl keeps its memory in float32
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Weighed:
    """With factors on the gradients of each update's log-probs, entropy and, if it is the same model, values."""

    factors, now, graphs = None, None, 0

    def weigh(self, tensor):
        if self.factors is not None and self.now is not None and tensor.requires_grad:
            now = self.now
            tensor.register_hook(lambda grad: grad * now.view(-1, *[1] * (grad.dim() - 1)))
        return tensor

    def act(self, inputs, *, role=""):
        learns = torch.is_grad_enabled() and "taken_actions" in inputs
        if self.factors is not None and learns:
            self.now = self.factors.pop(0)
        actions, outputs = super().act(inputs, role=role)
        if "log_prob" in outputs:
            outputs["log_prob"] = self.weigh(outputs["log_prob"])
        return (self.weigh(actions) if role == "value" else actions), outputs

    def get_entropy(self, *, role=""):
        return self.weigh(super().get_entropy(role=role))


class Gaussian(Weighed, GaussianMixin, Model):
    def __init__(self, observations, actions, device):
        Model.__init__(self, observation_space=observations, action_space=actions, device=device)
        GaussianMixin.__init__(self, clip_actions=False)
        width = self.num_observations
        self.net = nn.Sequential(nn.Linear(width, 16), nn.ELU(), nn.Linear(16, self.num_actions))
        self.log_std = nn.Parameter(torch.zeros(self.num_actions))

    def compute(self, inputs, role=""):
        return self.net(inputs["observations"].double()), {"log_std": self.log_std}


class Categorical(Weighed, CategoricalMixin, Model):
    def __init__(self, observations, actions, device):
        Model.__init__(self, observation_space=observations, action_space=actions, device=device)
        CategoricalMixin.__init__(self, unnormalized_log_prob=True)
        self.net = nn.Sequential(nn.Linear(self.num_observations, 16), nn.ELU(), nn.Linear(16, self.num_actions))

    def compute(self, inputs, role=""):
        return self.net(inputs["observations"].double()), {}


class Value(DeterministicMixin, Model):
    def __init__(self, observations, actions, device):
        Model.__init__(self, observation_space=observations, action_space=actions, device=device)
        DeterministicMixin.__init__(self)
        self.net = nn.Sequential(nn.Linear(self.num_observations, 16), nn.ELU(), nn.Linear(16, 1))

    def compute(self, inputs, role=""):
        return self.net(inputs["observations"].double()), {}


class Both(GaussianMixin, DeterministicMixin, Model):
    """Two heads on one trunk; ``carries`` hands the trunk's output from the policy's call to the value's."""

    def __init__(self, observations, actions, device, carries=False):
        Model.__init__(self, observation_space=observations, action_space=actions, device=device)
        GaussianMixin.__init__(self, role="policy")
        DeterministicMixin.__init__(self, role="value")
        self.net = nn.Sequential(nn.Linear(self.num_observations, 16), nn.ELU())
        self.mean, self.value = nn.Linear(16, self.num_actions), nn.Linear(16, 1)
        self.log_std = nn.Parameter(torch.zeros(self.num_actions))
        self.carries, self.carried = carries, None

    def act(self, inputs, role=""):
        kind = GaussianMixin if role == "policy" else DeterministicMixin
        return kind.act(self, inputs, role=role)

    def compute(self, inputs, role=""):
        if role == "policy":
            hidden = self.net(inputs["observations"].double())
            self.carried = hidden if self.carries else None
            return self.mean(hidden), {"log_std": self.log_std}
        hidden = self.net(inputs["observations"].double()) if self.carried is None else self.carried
        self.carried = None
        return self.value(hidden), {}


class WeighedBoth(Weighed, Both):
    """The same, weighed."""


def make(kind=Gaussian, carries=False, **options):
    """An agent, and its memory full of one rollout."""
    torch.manual_seed(0)
    actions = DISCRETE if kind is Categorical else BOX
    if kind is Both:
        model = WeighedBoth(OBSERVATIONS, actions, "cpu", carries)
        models = {"policy": model, "value": model}
    else:
        models = {"policy": kind(OBSERVATIONS, actions, "cpu"), "value": Value(OBSERVATIONS, actions, "cpu")}
    config = PPO_CFG(**{"rollouts": LENGTH, "learning_epochs": 2, "mini_batches": 2, "learning_rate": 1e-2} | options)
    config.experiment.write_interval = config.experiment.checkpoint_interval = 0
    agent = PPO(
        models=models,
        memory=RandomMemory(memory_size=LENGTH, num_envs=ENVIRONMENTS, device="cpu"),
        observation_space=OBSERVATIONS,
        state_space=None,
        action_space=actions,
        device="cpu",
        cfg=config,
    )
    agent.init()
    agent.enable_training_mode(True)
    for step in range(LENGTH):
        observations = torch.randn(ENVIRONMENTS, 4)
        with torch.no_grad():
            taken, _ = agent.act(observations, None, timestep=step, timesteps=LENGTH)
            agent.record_transition(
                observations=observations,
                states=None,
                actions=taken,
                rewards=torch.randn(ENVIRONMENTS, 1),
                next_observations=torch.randn(ENVIRONMENTS, 4),
                next_states=None,
                terminated=torch.rand(ENVIRONMENTS, 1) < 0.1,
                truncated=torch.zeros(ENVIRONMENTS, 1, dtype=torch.bool),
                infos={},
                timestep=step,
                timesteps=LENGTH,
            )
    return agent


class Run:
    """One update: plain, gated, or with factors on rows."""

    def __init__(self, rule=None, factors=None, first=False, **options):
        agent = make(**options)
        self.start, self.factors, self.graphs = self.parameters(agent), [], 0
        agent.policy.factors = None if factors is None else list(factors)
        agent.policy.net[0].register_forward_hook(self.count)
        agent.optimizer.register_step_post_hook(
            lambda *_: None if rule is None else self.factors.append(gate.last.factors())
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with gated_ppo(agent, screen_first=first, **(rule or {"rate": 1.0}), enabled=rule is not None) as gate:
                torch.manual_seed(1)
                agent.update(timestep=LENGTH, timesteps=LENGTH)
        told = [str(w.message) for w in caught if issubclass(w.category, kondo.KondoWarning)]
        self.told = [message for message in told if "hooks" not in message and "chosen rows alone" not in message]
        self.end, self.logged = self.parameters(agent), {k: v[-1] for k, v in agent.tracking_data.items() if v}
        self.drawn = torch.rand(())

    @staticmethod
    def parameters(agent):
        both = {id(p): p for model in (agent.policy, agent.value) for p in model.parameters()}
        return [p.detach().clone() for p in both.values()]

    def count(self, _module, given, _output):
        if torch.is_grad_enabled():
            self.graphs += len(given[0])

    def distance(self, other):
        """Largest difference of the parameters, relative to how far they moved."""
        moved = max(float((p - q).abs().max()) for p, q in zip(other.end, self.start, strict=True))
        return max(float((p - q).abs().max()) for p, q in zip(self.end, other.end, strict=True)) / moved


SCALED = {"observation_preprocessor": RunningStandardScaler, "value_preprocessor": RunningStandardScaler}
SIZES = {"observation_preprocessor_kwargs": {"size": 4}, "value_preprocessor_kwargs": {"size": 1}}
ADAPTS = {"learning_rate_scheduler": KLAdaptiveLR, "learning_rate_scheduler_kwargs": {"kl_threshold": 0.008}}
CASES = [
    ({"rate": 0.25}, {}),
    ({"noise": 0.5}, {"entropy_loss_scale": 0.01}),
    ({"rate": 0.25, "priority": "abs_advantage"}, {"value_clip": 0.2, "grad_norm_clip": 0.5}),
    ({"noise": 0.5}, {**SCALED, **SIZES}),
    ({"noise": 0.5}, {**ADAPTS}),
    ({"rate": 0.25}, {"kind": Categorical}),
    ({"noise": 0.5}, {"kind": Categorical, "entropy_loss_scale": 0.01}),
    ({"noise": 0.5}, {"kind": Both, "entropy_loss_scale": 0.01}),
    ({"rate": 0.25}, {"kind": Both}),
]


@pytest.mark.parametrize(("rule", "options"), CASES, ids=str)
def test_parameters_are_those_of_masked_terms(rule, options):
    gated = Run(rule, **options)
    masked = Run(factors=gated.factors, **options)
    assert gated.distance(masked) < 1e-10 < 1e-3 < gated.distance(Run(**options))
    assert "Kondo / rate" in gated.logged
    assert not gated.told and 0 < gated.graphs < masked.graphs
    assert torch.equal(gated.drawn, masked.drawn)
    for name, value in masked.logged.items():
        if name.startswith(("Loss", "Policy", "Learning")):
            assert gated.logged[name] == pytest.approx(value, rel=1e-9, nan_ok=True), name


def test_an_update_that_stops_early_leaves_nothing_behind():
    options = {"kl_threshold": 1e-9}
    gated = Run({"noise": 0.5}, **options)
    assert gated.distance(Run(factors=[*gated.factors, *gated.factors[-1:] * 4], **options)) < 1e-10
    assert 0 < len(gated.factors) < 4 and not gated.told


def test_a_trunk_that_is_carried_from_the_policy_to_the_value_is_told():
    gated = Run({"noise": 0.5}, kind=Both, carries=True)
    assert any("reads the attribute carried" in message for message in gated.told)


@pytest.mark.parametrize("kind", [Gaussian, Categorical])
@pytest.mark.parametrize("rule", [{"rate": 0.25}, {"noise": 1.0}], ids=str)
def test_screen_first_from_the_memory(rule, kind):
    once = {
        "kind": kind,
        "learning_epochs": 1,
    }  # act() draws for kept rows alone, so a second epoch's shuffle is another
    gated = Run(rule, first=True, **once)
    masked = Run(factors=gated.factors, **once)
    assert gated.distance(masked) < 1e-10 < 1e-3 < gated.distance(Run(**once))
    assert not gated.told and 0 < gated.graphs < ENVIRONMENTS * LENGTH


@pytest.mark.parametrize(
    ("options", "says"),
    [({"kind": Both}, "of its own"), ({"kl_threshold": 0.1}, "kl_threshold"), (ADAPTS, "KLAdaptiveLR")],
)
def test_screen_first_is_refused_where_it_cannot_be(options, says):
    with pytest.raises(ValueError, match=says):
        Run({"rate": 0.25}, first=True, **options)


def test_the_page_s_recipe():
    block = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL).group(1)
    torch.set_default_dtype(torch.float32)
    environment = wrap_env(gymnasium.make_vec("Pendulum-v1", num_envs=4, vectorization_mode="sync"))
    spaces = environment.observation_space, environment.action_space
    models = {"policy": Gaussian(*spaces, "cpu").double(), "value": Value(*spaces, "cpu").double()}
    config = PPO_CFG(rollouts=LENGTH, learning_epochs=2, mini_batches=2)
    config.experiment.write_interval = config.experiment.checkpoint_interval = 0
    memory = RandomMemory(memory_size=LENGTH, num_envs=4, device="cpu")
    agent = PPO(
        models=models,
        memory=memory,
        observation_space=spaces[0],
        state_space=None,
        action_space=spaces[1],
        device="cpu",
        cfg=config,
    )
    short = {"timesteps": 2 * LENGTH, "headless": True, "disable_progressbar": True}
    names = {"environment": environment, "agent": agent, "config": short}
    exec(block, names)
    assert names["gate"].stats.rows == 2 * 2 * 4 * LENGTH and 0 < names["gate"].stats.skipped < 1
    assert "Kondo / rate" in agent.tracking_data
