"""torchrl's own losses, gated, train the parameters that they train where the dropped rows' terms are masked."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("torchrl", reason="make frameworks ONLY=torchrl")

from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer, SamplerWithoutReplacement
from torchrl.envs import GymEnv
from torchrl.modules import (
    ActorValueOperator,
    NormalParamExtractor,
    ProbabilisticActor,
    QValueActor,
    TanhNormal,
    ValueOperator,
)
from torchrl.objectives import A2CLoss, ClipPPOLoss, DQNLoss, KLPENPPOLoss, PPOLoss
from torchrl.objectives.value import GAE

import kondo_hooks as kondo

PAGE = Path(__file__).parents[3] / "docs" / "frameworks" / "torchrl.md"
ROWS, STEPS = 32, 4


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def networks(discrete, shared=False, actions=3):
    """Actor and critic, as torchrl's tutorials make them."""
    torch.manual_seed(0)
    width = 16 if shared else 4
    layers = [] if shared else [nn.Linear(4, 16), nn.Tanh()]
    body, seen = nn.Sequential(nn.Linear(4, 16), nn.Tanh()), ["hidden"] if shared else ["observation"]
    if discrete:
        head, keys, kind = nn.Sequential(*layers, nn.Linear(16, actions)), ["logits"], torch.distributions.Categorical
    else:
        net = nn.Sequential(*layers, nn.Linear(16, 4), NormalParamExtractor())
        head, keys, kind = net, ["loc", "scale"], TanhNormal
    policy = TensorDictModule(head, seen, keys)
    actor = ProbabilisticActor(policy, in_keys=keys, distribution_class=kind, return_log_prob=True)
    critic = ValueOperator(nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 1)), in_keys=seen)
    if not shared:
        return actor, critic
    both = ActorValueOperator(TensorDictModule(body, ["observation"], ["hidden"]), actor, critic)
    return both.get_policy_operator(), both.get_value_operator()


def rollout(actor, critic):
    """Two trajectories of 16 steps, with advantages by GAE; the sampler's policy is an older one."""
    torch.manual_seed(1)
    done = torch.zeros(2, ROWS // 2, 1, dtype=torch.bool)
    done[:, -1] = True
    after = TensorDict(
        {
            "observation": torch.randn(2, ROWS // 2, 4),
            "reward": torch.randn(2, ROWS // 2, 1),
            "done": done,
            "terminated": done,
        },
        [2, ROWS // 2],
    )
    data = TensorDict({"observation": torch.randn(2, ROWS // 2, 4), "next": after}, [2, ROWS // 2])
    with torch.no_grad():
        actor(data)
        GAE(gamma=0.99, lmbda=0.95, value_network=critic, average_gae=True)(data)
    data = data.reshape(-1).detach()
    data["action_log_prob"] += 0.3 * torch.randn(ROWS)
    return data


def total(out):
    return sum(value for name, value in out.items() if name.startswith("loss_"))


class Run:
    """Some updates by a torchrl loss: plain, gated, or with rows' terms multiplied by factors.

    Attributes:
        parameters: after the last update.
        start: and before the first.
        logged: by torchrl, in each update.
        factors: of each decision.
        graphs: rows that the first layer ran with a graph.
    """

    def __init__(
        self, kind, discrete=True, shared=False, rule=None, factors=None, gate="actor", first=False, **options
    ):
        actor, critic = networks(discrete, shared)
        data = rollout(actor, critic)
        weighed = {} if factors is None else {"reduction": "none"}
        loss = kind(actor, critic, **weighed, **options)
        self.start = [p.detach().clone() for p in loss.parameters()]
        self.logged, self.factors, self.graphs, self.told = [], [], 0, []
        layer = next(m for m in actor.modules() if isinstance(m, nn.Linear))
        optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
        model, method = (actor, "get_dist") if gate == "actor" else (loss, None)
        handle = kondo.gated(model, method=method, **(rule or {"rate": 1.0}), enabled=rule is not None)
        with warnings.catch_warnings(record=True) as told, handle:
            warnings.simplefilter("always")
            layer.register_forward_hook(self._count)
            for step in range(STEPS):
                if first:
                    handle.preselect(logp=data["action_log_prob"], advantages=data["advantage"].squeeze(-1))
                out = loss(data.clone())
                if factors is not None:
                    masked = [name for name in list(out.keys()) if gate == "loss" or name != "loss_critic"]
                    out = TensorDict(
                        {
                            name: (value.reshape(ROWS) * (factors[step] if name in masked else 1)).mean()
                            if name.startswith("loss_")
                            else value
                            for name, value in out.items()
                        }
                    )
                optimizer.zero_grad()
                total(out).backward()
                norm = nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                optimizer.step()
                self.logged.append({"norm": norm.item()} | {k: v.mean().item() for k, v in out.items()})
                if rule is not None:
                    self.factors.append(handle.last.factors())
        self.told = [
            str(w.message) for w in told if issubclass(w.category, kondo.KondoWarning) and "hooks" not in str(w)
        ]
        self.parameters = [p.detach() for p in loss.parameters()]

    def _count(self, _module, given, _output):
        if torch.is_grad_enabled():
            self.graphs += given[0].numel() // given[0].shape[-1]

    def distance(self, other):
        """Largest difference of the parameters, relative to how far they moved."""
        moved = max(float((p - q).abs().max()) for p, q in zip(other.parameters, self.start, strict=True))
        return max(float((p - q).abs().max()) for p, q in zip(self.parameters, other.parameters, strict=True)) / moved


CASES = [
    (ClipPPOLoss, {}, {"rate": 0.25}),
    (ClipPPOLoss, {"discrete": False}, {"rate": 0.25}),
    (ClipPPOLoss, {"discrete": False}, {"noise": 0.5}),
    (ClipPPOLoss, {"normalize_advantage": True}, {"rate": 0.25, "priority": "abs_advantage"}),
    (ClipPPOLoss, {"entropy_bonus": False, "clip_epsilon": 0.05}, {"rate": "lossless"}),
    (ClipPPOLoss, {"functional": False}, {"noise": 0.5}),
    (ClipPPOLoss, {"delay_actor": True}, {"noise": 0.5}),
    (ClipPPOLoss, {"shared": True}, {"noise": 0.5}),
    (PPOLoss, {}, {"rate": 0.25}),
    (A2CLoss, {}, {"rate": 0.25}),
    (A2CLoss, {"discrete": False}, {"noise": 0.5}),
]


def name(value):
    return getattr(value, "__name__", None) or ", ".join(f"{k}={v}" for k, v in value.items()) or "plain"


@pytest.mark.parametrize(("kind", "options", "rule"), CASES, ids=name)
def test_parameters_are_those_of_masked_terms(kind, options, rule):
    gated = Run(kind, rule=rule, **options)
    masked = Run(kind, factors=gated.factors, **options)
    full = Run(kind, **options)
    assert gated.distance(masked) < 1e-10
    if rule["rate" if "rate" in rule else "noise"] != "lossless":
        assert gated.distance(full) > 1e-3
    assert 0 < sum(int((f != 0).sum()) for f in gated.factors) < STEPS * ROWS and not gated.told


@pytest.mark.parametrize(("kind", "options", "rule"), CASES, ids=name)
def test_torchrl_logs_all_rows_and_the_gated_gradient(kind, options, rule):
    gated = Run(kind, rule=rule, **options)
    masked = Run(kind, factors=gated.factors, **options)
    for ours, theirs in zip(gated.logged, masked.logged, strict=True):
        assert ours["norm"] == pytest.approx(theirs["norm"], rel=1e-9)
        for key in ours.keys() - {"norm", "loss_objective", "loss_entropy"}:  # the masked losses are others
            assert ours[key] == pytest.approx(theirs[key], rel=1e-9), key


WHOLE = [
    (ClipPPOLoss, {}, {"noise": 0.5}),
    (ClipPPOLoss, {"discrete": False}, {"rate": 0.4, "priority": "norm", "unbiased": True}),
    (ClipPPOLoss, {"shared": True}, {"noise": 0.5}),
    (A2CLoss, {}, {"noise": 0.5}),
    (KLPENPPOLoss, {}, {"noise": 0.5}),
]


@pytest.mark.parametrize(("kind", "options", "rule"), WHOLE, ids=name)
def test_the_loss_module_gated_gates_actor_and_critic(kind, options, rule):
    gated = Run(kind, rule=rule, gate="loss", **options)
    masked = Run(kind, factors=gated.factors, gate="loss", **options)
    assert gated.distance(masked) < 1e-10 < 1e-3 < gated.distance(Run(kind, **options))
    assert 0 < gated.graphs < masked.graphs and not gated.told
    for ours, theirs in zip(gated.logged, Run(kind, **options).logged[:1], strict=False):
        for key in ours.keys() - {"norm"}:  # before the first step all losses are those of all rows
            assert ours[key] == pytest.approx(theirs[key], rel=1e-9), key


@pytest.mark.parametrize("rule", [{"noise": 0.5}, {"rate": 0.5, "priority": "norm"}], ids=name)
def test_dqn(rule):
    def run(rule=None, factors=None):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
        values = QValueActor(net, in_keys=["observation"], action_space="one-hot")
        data = rollout(*networks(True))
        data["action"] = torch.nn.functional.one_hot(data["action"], 3)
        loss = DQNLoss(
            values, action_space="one-hot", delay_value=True, reduction="mean" if factors is None else "none"
        )
        optimizer, found = torch.optim.SGD(loss.parameters(), lr=0.1), []
        with kondo.gated(loss, **(rule or {"rate": 1.0}), enabled=rule is not None) as gate:
            for step in range(STEPS):
                out = loss(data.clone())["loss"]
                (out if factors is None else (out * factors[step]).mean()).backward()
                optimizer.step()
                optimizer.zero_grad()
                found.append(None if rule is None else gate.last.factors())
        return torch.cat([p.detach().flatten() for p in net.parameters()]), found

    with pytest.raises(kondo.DelightError, match="priority='norm'"):
        run({"rate": 0.5})
    gated, factors = run(rule)
    assert torch.allclose(gated, run(factors=factors)[0], rtol=0, atol=1e-12)
    assert float((gated - run()[0]).abs().max()) > 1e-4


def test_what_cannot_be_gated_says_so():
    normalized = {"gate": "loss", "normalize_advantage": True}
    with pytest.raises(RuntimeError, match="depends on the other rows of the batch"):
        Run(ClipPPOLoss, rule={"noise": 0.5}, **normalized)
    with pytest.raises(kondo.DelightError, match="ratios of probabilities"):
        Run(ClipPPOLoss, rule={"rate": 0.25}, gate="loss")
    actor, critic = networks(True)
    data, loss = rollout(actor, critic), ClipPPOLoss(actor, critic)
    optimizer = torch.optim.Adam(loss.parameters())
    with pytest.warns(kondo.KondoWarning, match="name it with method="), kondo.gated(actor, noise=0.5):
        total(loss(data)).backward()
        optimizer.step()


def test_the_page_s_recipe():
    block = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL).group(1)
    torch.set_default_dtype(torch.float32)
    actor, critic = networks(True, actions=2)
    environment = GymEnv("CartPole-v1", categorical_action_encoding=True)
    collector = Collector(environment, actor, frames_per_batch=64, total_frames=128)
    logged = []
    names = {
        "actor": actor,
        "critic": critic,
        "collector": collector,
        "advantage": GAE(gamma=0.99, lmbda=0.95, value_network=critic, average_gae=True),
        "buffer": ReplayBuffer(storage=LazyTensorStorage(64), sampler=SamplerWithoutReplacement(), batch_size=32),
        "log": lambda name, value: logged.append(name),
        "epochs": 2,
    }
    exec(block, names)
    assert names["gate"].stats.steps == 8 and 0 < names["gate"].stats.skipped < 1
    assert {"kondo/rate", "kondo/kept", "kondo/noise"} <= set(logged)
