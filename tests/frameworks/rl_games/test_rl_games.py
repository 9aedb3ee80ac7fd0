"""rl_games' own agents, gated, train the parameters that they train where the dropped rows' terms are masked."""

import re
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

pytest.importorskip("rl_games", reason="make frameworks ONLY=rl_games")

from rl_games.common import env_configurations, vecenv
from rl_games.torch_runner import Runner

import kondo_hooks as kondo

PAGE = Path(__file__).parents[3] / "docs" / "frameworks" / "rl_games.md"
ENVIRONMENTS, LENGTH, MINIBATCH, EPOCHS = 8, 8, 32, 2


class Points(vecenv.IVecEnv):
    """Points that wander whatever is done."""

    def __init__(self, name, count, **_):
        self.random, self.age = np.random.default_rng(0), np.zeros(count, int)
        self.state = self.random.normal(size=(count, 4)).astype(np.float32)
        box, some = gymnasium.spaces.Box(-1, 1, (2,), np.float32), gymnasium.spaces.Discrete(3)
        spaces = {"observation_space": gymnasium.spaces.Box(-9, 9, (4,), np.float32)}
        self.spaces = {**spaces, "action_space": box if name == "continuous" else some}

    def step(self, _actions):
        self.state = (self.state + 0.1 * self.random.normal(size=self.state.shape)).astype(np.float32)
        self.age += 1
        done = self.age >= 10
        self.age[done] = 0
        return self.state, -np.square(self.state).sum(1), done, {}

    def reset(self):
        return self.state

    def get_number_of_agents(self):
        return 1

    def get_env_info(self):
        return self.spaces


vecenv.register("POINTS", Points)
for name in ("continuous", "discrete"):
    env_configurations.register(name, {"vecenv_type": "POINTS", "env_creator": lambda **_: None})


def configured(name, folder, **options):
    """A configuration as rl_games' own files have it."""
    constant = {"name": "const_initializer", "val": 0}
    activations = {"mu_activation": "None", "sigma_activation": "None", "mu_init": {"name": "default"}}
    space = {**activations, "sigma_init": constant, "fixed_sigma": True} if name == "continuous" else {}
    config = {
        "name": "points",
        "env_name": name,
        "device": "cpu",
        "device_name": "cpu",
        "train_dir": str(folder),
        "reward_shaper": {"scale_value": 0.1},
        "normalize_advantage": True,
        "normalize_input": True,
        "normalize_value": True,
        "gamma": 0.99,
        "tau": 0.95,
        "learning_rate": 1e-2,
        "lr_schedule": None,
        "score_to_win": 1e9,
        "grad_norm": 1.0,
        "truncate_grads": True,
        "entropy_coef": 0.01,
        "critic_coef": 1,
        "e_clip": 0.2,
        "clip_value": True,
        "num_actors": ENVIRONMENTS,
        "horizon_length": LENGTH,
        "minibatch_size": MINIBATCH,
        "mini_epochs": EPOCHS,
        "max_epochs": 2,
        "save_frequency": 0,
        "save_best_after": 1000,
        "print_stats": False,
        "ppo": True,
        "bounds_loss_coef": 0.0,
        **options,
    }
    mlp = {"units": [16], "activation": "elu", "initializer": {"name": "default"}}
    network = {"name": "actor_critic", "separate": False, "space": {name: space}, "mlp": mlp}
    model = {"name": "continuous_a2c_logstd" if name == "continuous" else "discrete_a2c"}
    return {
        "params": {"seed": 1, "algo": {"name": f"a2c_{name}"}, "model": model, "network": network, "config": config}
    }


def make(name, folder, **options):
    runner = Runner()
    runner.load(configured(name, folder, **options))
    runner.reset()
    torch.manual_seed(0)
    np.random.seed(0)
    agent = runner.algo_factory.create(runner.algo_name, base_name="run", params=runner.params)
    agent.init_tensors()
    agent.obs = agent.env_reset()
    return agent


class Run:
    """One epoch: plain, gated, or with factors on what the network returns of each row."""

    def __init__(self, name, folder, rule=None, factors=None, whole=False, **options):
        agent = make(name, folder, **options)
        self.start, self.factors, self.graphs = self.parameters(agent), [], 0
        factors = None if factors is None else list(factors)

        def hook(_module, given, outputs):
            if not torch.is_grad_enabled():
                return
            self.graphs += len(given[0]["obs"])
            if factors is not None:
                now = factors.pop(0)
                for output in outputs:
                    if isinstance(output, torch.Tensor) and output.requires_grad:
                        output.register_hook(lambda grad: grad * now.view(-1, 1))

        agent.model.a2c_network.register_forward_hook(hook)
        agent.optimizer.register_step_post_hook(
            lambda *_: None if rule is None else self.factors.append(gate.last.factors())
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = agent.model if whole else agent.model.a2c_network
            with kondo.gated(model, **(rule or {"rate": 1.0}), enabled=rule is not None) as gate:
                _, _, _, _, *losses = agent.train_epoch()
        self.losses = [float(torch.stack(each).mean()) for each in losses[:2]]
        told = [str(w.message) for w in caught if issubclass(w.category, kondo.KondoWarning)]
        self.told = [message for message in told if "forward hooks" not in message]
        self.end, self.skipped = self.parameters(agent), gate.stats.skipped
        self.normalizers = [buffer.clone() for buffer in agent.model.buffers()]

    @staticmethod
    def parameters(agent):
        return [p.detach().clone().double() for p in agent.model.parameters()]

    def distance(self, other):
        """Largest difference of the parameters, relative to how far they moved."""
        moved = max(float((p - q).abs().max()) for p, q in zip(other.end, self.start, strict=True))
        return max(float((p - q).abs().max()) for p, q in zip(self.end, other.end, strict=True)) / moved


CASES = [
    ("continuous", {"noise": 0.5}, {}),
    ("continuous", {"rate": 0.4, "priority": "norm", "unbiased": True}, {"bounds_loss_coef": 0.01}),
    ("discrete", {"noise": 0.5}, {}),
    ("discrete", {"noise": 0.5}, {"normalize_input": False, "normalize_value": False, "clip_value": False}),
]


@pytest.mark.parametrize(("name", "rule", "options"), CASES, ids=str)
def test_parameters_are_those_of_masked_terms(name, rule, options, tmp_path):
    gated = Run(name, tmp_path, rule, **options)
    masked = Run(name, tmp_path, factors=gated.factors, **options)
    assert gated.distance(masked) < 1e-3 < 1e-2 < gated.distance(Run(name, tmp_path, **options))  # all in float32
    assert not gated.told and gated.skipped > 0.2 and gated.graphs < masked.graphs
    assert len(gated.normalizers) == len(masked.normalizers)
    assert all(map(torch.allclose, gated.normalizers, masked.normalizers))
    assert gated.losses == pytest.approx(masked.losses, rel=1e-3)  # rl_games logs the losses of all rows


def test_what_cannot_be_gated_says_so(tmp_path):
    with pytest.raises(RuntimeError, match="state that a forward updates"):
        Run("continuous", tmp_path, {"noise": 0.5}, whole=True)
    with pytest.raises(kondo.DelightError, match="no policy was found"):
        Run("continuous", tmp_path, {"rate": 0.25})


def test_the_page_s_recipe(tmp_path):
    block = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL).group(1)
    names = {"agent": make("continuous", tmp_path)}
    exec(block, names)
    assert names["gate"].stats.rows == 2 * EPOCHS * ENVIRONMENTS * LENGTH and names["gate"].stats.skipped > 0.2
