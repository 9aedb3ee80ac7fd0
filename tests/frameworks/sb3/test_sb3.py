"""stable-baselines3's own algorithms, gated, hold the parameters of those in which dropped rows' terms are masked."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3", reason="make frameworks ONLY=sb3")

from gymnasium import spaces
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.torch_layers import FlattenExtractor

import kondo_hooks as kondo
from kondo_hooks.integrations.sb3 import KondoCallback
from tests.frameworks.sb3 import runs

PAGE = Path(__file__).parents[3] / "docs" / "frameworks" / "sb3.md"
SMALL = {"batch_size": 16, "n_epochs": 2}
pytestmark = pytest.mark.filterwarnings("ignore:.*holds no policy.*:kondo_hooks.KondoWarning")

ALGORITHMS = [
    (PPO, "cart", SMALL),
    (PPO, "pendulum", {**SMALL, "ent_coef": 0.01, "clip_range_vf": 0.2}),
    (A2C, "cart", {}),
    (A2C, "pendulum", {"ent_coef": 0.01, "normalize_advantage": True}),
]
RULES = [{"rate": 0.25}, {"noise": 0.5}, {"rate": 0.25, "priority": "abs_advantage"}, {"rate": "lossless"}]


def trained(kind, environment, options, learn, factors=None, **more):
    """The model after two updates of ``learn(model)``, and the rows that ran with a graph."""
    model = runs.made(kind, environment, **options, **more)
    counted = runs.Rows(model.policy)
    if factors is not None:
        runs.masked(model, factors)
    learn(model)
    return model, counted.graph


def compare(kind, environment, options, learn, decided, **more):
    """Hold a gated run against the masked and the plain one; ``decided`` is filled by ``learn``."""
    ours, ran = trained(kind, environment, options, learn, **more)
    theirs, every = trained(kind, environment, options, plain, decided, **more)
    full, _ = trained(kind, environment, options, plain, **more)
    assert runs.distance(runs.parameters(ours), runs.parameters(theirs)) < 1e-10
    return ours, theirs, runs.distance(runs.parameters(ours), runs.parameters(full)), ran, every


def plain(model):
    model.learn(64)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("kind", "environment", "options"), ALGORITHMS, ids=str)
def test_one_line_around_learn(kind, environment, options, rule):
    decided = []

    def learn(model):
        with kondo.gated(model.policy, method="evaluate_actions", **rule) as gate:
            decided.extend([runs.noted(lambda: gate, model)])
            model.learn(64)
        decided[:] = decided[0]

    ours, theirs, moved, _, _ = compare(kind, environment, options, learn, decided)
    lossless = rule == {"rate": "lossless"}
    assert (moved < 1e-10) if lossless else (moved > 1e-4)
    assert all((f != 0).sum() < len(f) for f in decided) or lossless
    assert runs.logged(ours) == pytest.approx(runs.logged(theirs), rel=1e-6)


@pytest.mark.parametrize("rule", [*RULES, {"rate": "auto"}], ids=str)
@pytest.mark.parametrize(("kind", "environment", "options"), ALGORITHMS, ids=str)
def test_the_callback_screens_from_the_buffer(kind, environment, options, rule):
    decided = []

    def learn(model):
        callback = KondoCallback(**rule)
        seen = []
        model.policy.optimizer.register_step_pre_hook(
            lambda *_: seen.append(None if callback.gate.last is None else callback.gate.last.factors().double())
        )
        model.learn(64, callback=callback)
        decided[:] = seen
        learn.callback = callback

    if rule == {"rate": "auto"}:  # which times itself: two steps pass through, then it decides as it likes
        model, _ = trained(kind, environment, options, learn)
        assert "kondo/rate" in model.logger.name_to_value
        return
    ours, theirs, moved, ran, every = compare(kind, environment, options, learn, decided)
    logs = ours.logger.name_to_value
    assert logs["kondo/rate"] == pytest.approx(logs["kondo/kept"] / (every / 2))
    if rule == {"rate": "lossless"}:
        assert moved < 1e-10
        return
    assert moved > 1e-4
    kept = sum(int((f != 0).sum()) for f in decided)
    assert kept <= ran <= kept + 2.2 * len(decided[0]) and kept < every  # the first call's shapes are looked at once
    assert runs.logged(ours)["train/explained_variance"] == pytest.approx(
        runs.logged(theirs)["train/explained_variance"]
    )
    assert "train" not in vars(ours) and "get" not in vars(ours.rollout_buffer)
    assert "evaluate_actions" not in vars(ours.policy)


def test_what_is_logged_of_dropped_rows_counts_as_not_moved():
    """With one row kept, the divergence is at most that row's share of what all rows have."""
    logs = []
    for callback in (None, KondoCallback(rate=0.25, priority="uniform")):
        model = runs.made(PPO, "cart", batch_size=32, n_epochs=10, learning_rate=3e-3)
        model.learn(32, callback=callback)
        logs.append(runs.logged(model))
    assert 0 < logs[1]["train/approx_kl"] < 0.5 * logs[0]["train/approx_kl"]


def test_a_target_divergence_sees_all_rows():
    model = runs.made(PPO, "cart", **SMALL, target_kl=1.0)
    callback = KondoCallback(rate=0.25)
    counted = runs.Rows(model.policy)
    model.learn(64, callback=callback)
    seen = model.logger.name_to_value["train/approx_kl"]
    again = runs.made(PPO, "cart", **SMALL)
    again.learn(64, callback=KondoCallback(rate=0.25, screen_first=False))
    assert seen == pytest.approx(again.logger.name_to_value["train/approx_kl"]) and counted.graph > 0


def test_an_error_in_training_leaves_nothing_on_the_algorithm():
    model = runs.made(PPO, "cart", **SMALL)
    model.policy.optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.learn(64, callback=KondoCallback(rate=0.25))
    assert "train" not in vars(model) and "get" not in vars(model.rollout_buffer)
    assert "evaluate_actions" not in vars(model.policy)
    with kondo.gated(model.policy, method="evaluate_actions", rate=0.5):  # no gate is on it
        pass


def test_a_callback_that_is_used_again_goes_on():
    model, callback = runs.made(PPO, "cart", **SMALL), KondoCallback(rate=0.25)
    model.learn(32, callback=callback)
    steps = callback.gate.stats.steps
    model.learn(32, callback=callback)
    assert callback.gate.stats.steps == 2 * steps > 0


def test_bad_options_fail_when_the_callback_is_made():
    with pytest.raises(ValueError, match="rate"):
        KondoCallback(rate=1.5)


PLANE = spaces.Box(-1, 1, (4,))
KINDS = {
    "dictionaries": ("MultiInputPolicy", spaces.Dict({"a": PLANE, "b": spaces.Discrete(3)}), spaces.Discrete(3), {}),
    "images": ("CnnPolicy", spaces.Box(0, 255, (36, 36, 3), np.uint8), spaces.Discrete(3), {}),
    "several actions": ("MlpPolicy", PLANE, spaces.MultiDiscrete([3, 4]), {"ent_coef": 0.01}),
    "bits": ("MlpPolicy", PLANE, spaces.MultiBinary(3), {"ent_coef": 0.01}),
    "noise of the state": ("MlpPolicy", PLANE, spaces.Box(-1, 1, (2,)), {"use_sde": True}),
    "squashed": (
        "MlpPolicy",
        PLANE,
        spaces.Box(-1, 1, (2,)),
        {"use_sde": True, "policy_kwargs": {"squash_output": True}},
    ),
}


@pytest.mark.parametrize("rule", [{"noise": 0.5}, {"rate": 0.25}], ids=str)
@pytest.mark.parametrize("screen_first", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_spaces_and_policies(name, screen_first, rule):
    policy, observations, actions, options = KINDS[name]

    def make():
        environment = runs.Spaces(copy.deepcopy(observations), copy.deepcopy(actions))
        return PPO(policy, environment, n_steps=32, seed=0, device="cpu", **SMALL, **options)

    ours, callback = make(), KondoCallback(**rule, screen_first=screen_first)
    decided = runs.noted(lambda: callback.gate, ours)
    ours.learn(64, callback=callback)
    theirs = make()
    runs.masked(theirs, decided)
    theirs.learn(64)
    full = make()
    full.learn(64)
    a, b, c = (runs.parameters(model) for model in (ours, theirs, full))
    assert runs.distance(a, b) < 1e-6 < 1e-4 < runs.distance(b, c)
    assert 0 < callback.gate.stats.forwarded < callback.gate.stats.rows_screened


OFF_POLICY = [(DQN, "cart", "q_net"), (SAC, "pendulum", "critic"), (TD3, "pendulum", "critic")]


def off_policy(kind, environment):
    more = {"learning_starts": 20, "batch_size": 16, "train_freq": 4}
    return runs.made(
        kind, environment, n_steps=None, policy_kwargs={"features_extractor_class": FlattenExtractor}, **more
    )


@pytest.mark.parametrize(("kind", "environment", "name"), OFF_POLICY, ids=str)
@pytest.mark.parametrize("rule", [{"noise": 0.5}, {"rate": 0.25, "priority": "norm"}], ids=str)
def test_a_critic_off_policy(kind, environment, name, rule):
    ours, decided = off_policy(kind, environment), []
    with kondo.gated(getattr(ours, name), **rule) as gate:
        # Each backward reaches one call; a step of the actor's optimizer follows one of the critic, too.
        for module in (m for m in (getattr(ours, "critic", None), getattr(ours, "actor", None), ours.policy) if m):
            if hasattr(module, "optimizer"):
                module.optimizer.register_step_pre_hook(
                    lambda *_: decided.append((gate.stats.steps, gate.last.factors()))
                )
        ours.learn(60)
    factors = [each for i, each in enumerate(decided) if i == 0 or each[0] != decided[i - 1][0]]
    assert len(factors) == gate.stats.steps
    queue = iter(factor for _, factor in factors)

    def mask(_module, _given, output):
        outputs = output if isinstance(output, tuple) else (output,)
        if torch.is_grad_enabled():
            weights = next(queue).view(-1, 1)
            for each in outputs:
                each.register_hook(lambda grad: grad * weights)

    theirs = off_policy(kind, environment)  # which seeds the library's global generators
    getattr(theirs, name).register_forward_hook(mask)
    theirs.learn(60)
    full = off_policy(kind, environment)
    full.learn(60)
    worst = runs.distance(runs.parameters(ours), runs.parameters(theirs))
    assert worst < 1e-5 and next(queue, None) is None and 0 < gate.stats.forwarded < gate.stats.rows_screened
    assert worst < 0.1 * runs.distance(runs.parameters(ours), runs.parameters(full))


@pytest.mark.parametrize(("kind", "environment", "name"), OFF_POLICY, ids=str)
def test_off_policy_there_is_no_delight(kind, environment, name):
    model = off_policy(kind, environment)
    with (
        pytest.raises(kondo.DelightError, match=r"no policy gradient .* noise=0.5"),
        kondo.gated(getattr(model, name), rate=0.25) as gate,
    ):
        model.learn(60)
    assert gate.stats.steps == 0
    with pytest.raises(ValueError, match=r"noise=0.5"):
        off_policy(kind, environment).learn(60, callback=KondoCallback(rate=0.25))


def test_an_actor_that_learns_through_its_sample_has_no_delight():
    model = off_policy(SAC, "pendulum")
    with (
        pytest.raises(kondo.DelightError, match="no policy gradient"),
        kondo.gated(model.actor, method="action_log_prob", rate=0.25),
    ):
        model.learn(60)


def test_the_page_s_recipes():
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(block, names)
    assert names["model"].num_timesteps == 60
