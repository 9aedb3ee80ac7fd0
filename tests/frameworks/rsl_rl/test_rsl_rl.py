"""rsl_rl's own PPO, gated, trains the parameters that it trains where the dropped rows' terms are masked."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("rsl_rl", reason="make frameworks ONLY=rsl_rl")

from rsl_rl.algorithms import PPO
from rsl_rl.models import MLPModel, RNNModel
from rsl_rl.modules import BetaDistribution, GaussianDistribution, HeteroscedasticGaussianDistribution
from rsl_rl.storage import RolloutStorage
from tensordict import TensorDict

import kondo_hooks as kondo
from kondo_hooks.integrations.rsl_rl import gated_ppo

PAGE = Path(__file__).parents[3] / "docs" / "frameworks" / "rsl_rl.md"
ENVIRONMENTS, LENGTH = 8, 6


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def masked(kind):
    """``kind`` with factors on the gradients that each update's log-probs and entropy send."""

    class Masked(kind):
        factors = None

        def get_output_log_prob(self, outputs):
            return self._weighed(super().get_output_log_prob(outputs), advance=False)

        @property
        def output_entropy(self):
            return self._weighed(super().output_entropy, advance=True)

        def _weighed(self, tensor, advance):
            if self.factors and tensor.requires_grad:
                now = self.factors.pop(0) if advance else self.factors[0]
                tensor.register_hook(lambda grad: grad * now.view(-1))
            return tensor

    return Masked


class Run:
    """One update of rsl_rl's PPO, of four minibatches: plain, gated, or with factors on rows.

    Attributes:
        start: the parameters before it.
        end: and after it.
        logged: what PPO returns for its logger.
        factors: of each decision.
        graphs: rows that the actor's first layer ran with a graph.
    """

    def __init__(self, rule=None, factors=None, kind=MLPModel, distribution=GaussianDistribution, **options):
        torch.manual_seed(0)
        self.factors, self.graphs, self.told = [], 0, []
        first, done = options.pop("first", False), options.pop("done", 0.2)
        obs = TensorDict({"policy": torch.randn(ENVIRONMENTS, 4)}, [ENVIRONMENTS])
        groups = {"actor": ["policy"], "critic": ["policy"]}
        extra = {"rnn_type": options.pop("rnn_type", "gru"), "rnn_hidden_dim": 8} if kind is RNNModel else {}
        network = {"hidden_dims": [16], "obs_normalization": True, **extra}
        actor = masked(kind)(obs, groups, "actor", 2, distribution_cfg={"class_name": distribution}, **network)
        critic = kind(obs, groups, "critic", 1, **network)
        storage = RolloutStorage("rl", ENVIRONMENTS, LENGTH, obs, [2], "cpu")
        alg = PPO(actor, critic, storage, num_learning_epochs=2, num_mini_batches=2, learning_rate=1e-2, **options)
        self.roll(alg, done)
        self.start = self.parameters(alg)
        next(m for m in actor.mlp if isinstance(m, nn.Linear)).register_forward_hook(self.count)
        actor.factors = None if factors is None else list(factors)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with gated_ppo(alg, **(rule or {"rate": 1.0}), screen_first=first, enabled=rule is not None) as gate:
                alg.optimizer.register_step_post_hook(
                    lambda *_: None if rule is None else self.factors.append(gate.last.factors())
                )
                self.logged = alg.update()
        self.told = [str(w.message) for w in caught if issubclass(w.category, kondo.KondoWarning)]
        self.told = [message for message in self.told if "forward hooks" not in message]
        self.end, self.rate = self.parameters(alg), alg.learning_rate
        self.normalizer = actor.obs_normalizer._mean.clone()

    @staticmethod
    def roll(alg, done):
        with torch.inference_mode():
            for _ in range(LENGTH):
                obs = TensorDict({"policy": torch.randn(ENVIRONMENTS, 4)}, [ENVIRONMENTS])
                alg.act(obs)
                ended = torch.rand(ENVIRONMENTS) < done
                alg.process_env_step(obs, torch.randn(ENVIRONMENTS), ended, {})
            alg.compute_returns(obs)

    @staticmethod
    def parameters(alg):
        return [p.detach().clone() for p in (*alg.actor.parameters(), *alg.critic.parameters())]

    def count(self, _module, given, _output):
        if torch.is_grad_enabled():
            self.graphs += given[0].numel() // given[0].shape[-1]

    def distance(self, other):
        """Largest difference of the parameters, relative to how far they moved."""
        moved = max(float((p - q).abs().max()) for p, q in zip(other.end, self.start, strict=True))
        return max(float((p - q).abs().max()) for p, q in zip(self.end, other.end, strict=True)) / moved


FIXED = {"schedule": "fixed"}
CASES = [
    ({"rate": 0.25}, {}),
    ({"rate": 0.25, "priority": "abs_advantage"}, FIXED),
    ({"noise": 0.5}, {}),
    ({"noise": 0.5}, {"distribution": HeteroscedasticGaussianDistribution}),
    ({"noise": 0.5}, {"normalize_advantage_per_mini_batch": True}),
    ({"rate": 0.25}, {"kind": RNNModel, "done": 0.0}),
    ({"rate": 0.25}, {"kind": RNNModel}),
    ({"noise": 1.0}, {"kind": RNNModel, "done": 0.5}),
    ({"noise": 1.0}, {"kind": RNNModel, "rnn_type": "lstm"}),
    ({"rate": 0.25}, {"kind": RNNModel, "first": True, **FIXED}),
    ({"noise": 0.5}, {"kind": RNNModel, "rnn_type": "lstm", "done": 0.5, "first": True, **FIXED}),
    ({"rate": 0.25}, {"first": True, **FIXED}),
    ({"noise": 1.0}, {"first": True, **FIXED}),
]


@pytest.mark.parametrize(("rule", "options"), CASES, ids=str)
def test_parameters_are_those_of_masked_terms(rule, options):
    others = {name: value for name, value in options.items() if name != "first"}
    gated = Run(rule, **options)
    terms = Run(factors=gated.factors, **others)
    assert gated.distance(terms) < 1e-10
    assert gated.distance(Run(**others)) > 1e-3
    assert not gated.told and 0 < gated.graphs < 4 * ENVIRONMENTS * LENGTH * 2 // 3
    assert torch.equal(gated.normalizer, terms.normalizer)
    assert {"kondo/rate", "kondo/kept", "kondo/skipped"} <= gated.logged.keys()
    if "first" not in options:  # what is logged is of all rows
        for name in ("value", "surrogate", "entropy"):
            assert gated.logged[name] == pytest.approx(terms.logged[name], rel=1e-9)
        assert gated.rate == terms.rate


def test_lossless_drops_clipped_rows_and_changes_nothing():
    options = {"entropy_coef": 0.0, "clip_param": 0.01}
    gated = Run({"rate": "lossless"}, **options)
    assert gated.distance(Run(**options)) < 1e-10
    assert 0 < gated.graphs < 4 * ENVIRONMENTS * LENGTH // 2


def test_a_beta_policy_is_exact_and_saves_nothing():
    gated = Run({"rate": 0.25}, distribution=BetaDistribution)
    assert gated.distance(Run(factors=gated.factors, distribution=BetaDistribution)) < 1e-10
    assert any("saves nothing" in message for message in gated.told)


def test_screen_first_is_refused_where_the_learning_rate_follows_the_kl():
    with pytest.raises(ValueError, match="schedule='fixed'"):
        Run({"rate": 0.25}, first=True)


class Environment:
    """Eight points that the actor is to bring to the origin, as rsl_rl's runner wants an environment."""

    num_envs, num_actions, max_episode_length, device, cfg = ENVIRONMENTS, 2, 10, "cpu", {}

    def __init__(self):
        self.episode_length_buf = torch.zeros(ENVIRONMENTS, dtype=torch.long)
        self.state = torch.randn(ENVIRONMENTS, 2)

    def get_observations(self):
        return TensorDict({"policy": self.state.clone()}, [ENVIRONMENTS])

    def step(self, actions):
        self.state = (self.state + 0.1 * actions).clamp(-3, 3)
        self.episode_length_buf += 1
        done = self.episode_length_buf >= self.max_episode_length
        self.episode_length_buf[done], self.state[done] = 0, torch.randn(int(done.sum()), 2)
        return self.get_observations(), -self.state.square().sum(-1), done, {"time_outs": done}


def test_the_page_s_recipe(tmp_path):
    block = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL).group(1)
    model = {"class_name": "MLPModel", "hidden_dims": [16], "activation": "elu", "obs_normalization": True}
    actor = {**model, "distribution_cfg": {"class_name": "GaussianDistribution", "init_std": 1.0}}
    config = {
        "algorithm": {"class_name": "PPO", "schedule": "fixed", "num_learning_epochs": 2, "num_mini_batches": 2},
        "actor": actor,
        "critic": model,
        "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
        "num_steps_per_env": LENGTH,
        "save_interval": 100,
        "run_name": "",
        "logger": "tensorboard",
    }
    names = {"environment": Environment(), "config": config, "log_dir": str(tmp_path), "iterations": 2}
    exec(block, names)
    assert isinstance(names["gate"], kondo.Gated) and names["gate"].stats.rows == 2 * 2 * ENVIRONMENTS * LENGTH
    assert 0 < names["gate"].stats.skipped < 1
    assert b"kondo/rate" in b"".join(path.read_bytes() for path in tmp_path.glob("events*"))
