"""sb3-contrib's algorithms, gated as those of stable-baselines3: masked actions, sequences of a recurrent policy."""

import pytest
import torch

pytest.importorskip("sb3_contrib", reason="make frameworks ONLY=sb3")

from sb3_contrib import QRDQN, TRPO, CrossQ, MaskablePPO, RecurrentPPO
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import FlattenExtractor

import kondo_hooks as kondo
from kondo_hooks.integrations.sb3 import KondoCallback
from tests.frameworks.sb3 import runs

pytestmark = pytest.mark.filterwarnings("ignore:.*holds no policy.*:kondo_hooks.KondoWarning")
SMALL = {"batch_size": 16, "n_epochs": 2}
SINGLE = {"features_extractor_class": FlattenExtractor, "lstm_hidden_size": 8}  # its buffer keeps float32 states
RULES = [{"rate": 0.4}, {"noise": 0.7}, {"rate": 0.4, "priority": "abs_advantage"}]


def masked_actions():
    return runs.made(MaskablePPO, InvalidActionEnvDiscrete(dim=8, n_invalid_actions=3), **SMALL, ent_coef=0.01)


def recurrent(**more):
    envs = make_vec_env("CartPole-v1", n_envs=2, seed=0)
    options = {**SMALL, "n_steps": 32, "batch_size": 32, "policy_kwargs": {**SINGLE, **more}}
    return runs.made(RecurrentPPO, envs, "MlpLstmPolicy", **options)


ALGORITHMS = {
    "masked actions": (masked_actions, 1e-10),
    "recurrent": (recurrent, 1e-5),
    "recurrent, two layers": (lambda: recurrent(n_lstm_layers=2), 1e-5),
    "recurrent, one for both": (lambda: recurrent(shared_lstm=True, enable_critic_lstm=False), 1e-5),
    "recurrent, policy alone": (lambda: recurrent(enable_critic_lstm=False), 1e-5),
}


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("screen_first", [None, True, False], ids=["context", "callback", "callback that screens"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_parameters_are_those_of_the_masked_run(name, screen_first, rule):
    make, bar = ALGORITHMS[name]
    ours = make()
    counted = runs.Rows(ours.policy)
    if screen_first is None:
        with kondo.gated(ours.policy, method="evaluate_actions", **rule) as gate:
            decided = runs.noted(lambda: gate, ours)
            ours.learn(128)
    else:
        callback = KondoCallback(**rule, screen_first=screen_first)
        decided = runs.noted(lambda: callback.gate, ours)
        ours.learn(128, callback=callback)
        gate = callback.gate
    theirs = make()
    every = runs.Rows(theirs.policy)
    runs.masked(theirs, decided)
    theirs.learn(128)
    full = make()
    full.learn(128)
    a, b, c = (runs.parameters(model) for model in (ours, theirs, full))
    assert runs.distance(a, b) < bar < 50 * bar < runs.distance(b, c)
    assert 0 < gate.stats.forwarded < gate.stats.rows_screened
    assert (
        not screen_first or counted.graph < every.graph
    )  # of all rows some are looked at once, to tell readings apart
    if not screen_first:
        assert runs.logged(ours) == pytest.approx(runs.logged(theirs), rel=1e-4, abs=1e-5)


def test_a_sequence_is_one_sample():
    model = recurrent()
    with kondo.gated(model.policy, method="evaluate_actions", rate=0.4) as gate:
        model.learn(64)
    assert gate.stats.rows < 0.5 * 64 * SMALL["n_epochs"]


def test_no_gradient_of_trust_region_passes_the_gate():
    """It differentiates twice, and calls another method: nothing is gated, and that is told."""
    model = runs.made(TRPO, "cart", batch_size=16)
    with pytest.warns(kondo.KondoWarning, match=r"was never called with grad"):
        model.learn(32, callback=KondoCallback(rate=0.25))


OFF = {"features_extractor_class": FlattenExtractor}


def test_a_critic_with_batch_norm_is_refused():
    model = runs.made(CrossQ, "pendulum", n_steps=None, learning_starts=20, batch_size=16, policy_kwargs=OFF)
    with pytest.raises(kondo.ReplayMismatchError), kondo.gated(model.critic, noise=0.5, audit=0):
        model.learn(40)


def test_quantiles_by_a_noise():
    model = runs.made(QRDQN, "cart", n_steps=None, learning_starts=20, batch_size=16, policy_kwargs=OFF)
    with kondo.gated(model.quantile_net, noise=0.5) as gate:
        model.learn(60)
    assert 0 < gate.stats.forwarded < gate.stats.rows_screened
    assert all(bool(torch.isfinite(p).all()) for p in model.quantile_net.parameters())
