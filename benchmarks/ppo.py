"""PPO as people run it: which rows may be left out of its updates, by each rule, and what that saves.

    python benchmarks/ppo.py                    # pole cart, Acrobot and Breakout on pixels, about two hours of 2 cores
    python benchmarks/ppo.py --only ppo_pixels  # one file
    python benchmarks/ppo.py --quick            # the pole cart by four rules, one seed

The update is CleanRL's: 4 epochs of 4 minibatches, clipped ratios and values, GAE, an entropy bonus, normalised
advantages, gradients clipped at 0.5, Adam 2.5e-4 (1e-3 on pixels), annealed. Pole cart and Acrobot (gymnasium) have an
MLP for actor and critic in one module; Breakout (MinAtar, 10 x 10 pixels) a small convolutional network. "first" rules
decide before the forward, from the rollout's own log-probs and the advantages, so that the learner runs the kept rows
alone. "small batch" is a share of the rows without a gate. Seconds are of a CPU, one thread a run; the learner's are of
its updates.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import gymnasium
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import record
import style
import torch
from minatar import Environment
from torch import Tensor, nn
from torch.distributions import Categorical

import kondo_hooks as kondo

POINTS = 20
EPOCHS, MINIBATCHES = 4, 4
GAMMA, LAMBDA = 0.99, 0.95


class Pixels:
    """A MinAtar game with gymnasium's reset and step."""

    def __init__(self, name: str):
        self._game = Environment(name, sticky_action_prob=0.1)
        self.shape = tuple(self._game.state_shape())
        self.actions = self._game.num_actions()

    def reset(self, seed: int | None = None) -> tuple[np.ndarray, dict]:
        if seed is not None:
            self._game.seed(seed)
        self._game.reset()
        return self._game.state().astype(np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward, done = self._game.act(action)
        return self._game.state().astype(np.float32), float(reward), bool(done), False, {}


class ActorCritic(nn.Module):
    """Actor and critic in one module, so that both learn from the kept rows."""

    def __init__(self, shape: tuple[int, ...], actions: int):
        super().__init__()
        self.pixels = len(shape) == 3
        if self.pixels:
            height, width, channels = shape
            self.body = nn.Sequential(
                *(nn.Conv2d(channels, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten()),
                *(layer(32 * (height - 4) * (width - 4), 256), nn.ReLU()),
            )
            self.actor, self.critic = layer(256, actions, 0.01), layer(256, 1, 1.0)
        else:
            self.actor, self.critic = mlp(shape[0], actions, 0.01), mlp(shape[0], 1, 1.0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x.permute(0, 3, 1, 2)) if self.pixels else x
        return self.actor(features), self.critic(features).squeeze(-1)


def layer(inputs: int, outputs: int, gain: float = 2**0.5) -> nn.Linear:
    made = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(made.weight, gain)
    nn.init.zeros_(made.bias)
    return made


def mlp(inputs: int, outputs: int, gain: float) -> nn.Sequential:
    return nn.Sequential(layer(inputs, 64), nn.Tanh(), layer(64, 64), nn.Tanh(), layer(64, outputs, gain))


@dataclass(frozen=True)
class Setting:
    """An environment, and how many of its steps make a rollout and a run."""

    make: Callable[[], Any]
    steps: int
    envs: int
    rollout: int
    lr: float = 2.5e-4


SETTINGS = {
    "CartPole-v1": Setting(lambda: gymnasium.make("CartPole-v1"), 50_000, 4, 128),
    "Acrobot-v1": Setting(lambda: gymnasium.make("Acrobot-v1"), 80_000, 4, 128),
    "Breakout, pixels": Setting(lambda: Pixels("breakout"), 200_000, 16, 128, 1e-3),
}


@dataclass(frozen=True)
class Method:
    """A way to update.

    Attributes:
        gate: what ``kondo.gated`` is given, or None.
        first: decide before the forward.
        drawn: share of each minibatch that is used at all.
    """

    gate: dict[str, Any] | None = None
    first: bool = False
    drawn: float = 1.0


def by(priority: str, rate: float, **options: Any) -> dict[str, Any]:
    return {"rate": rate, "priority": priority, **options}


RULES = {
    "all rows": Method(),
    "small batch 10%": Method(drawn=0.1),
    **{f"delight {rate:.0%}": Method({"rate": rate}) for rate in (0.03, 0.1, 0.25)},
    "delight price 0": Method({"price": 0.0}),
    **{f"|advantage| {rate:.0%}": Method(by("abs_advantage", rate)) for rate in (0.03, 0.1, 0.25)},
    **{f"random {rate:.0%}": Method(by("uniform", rate)) for rate in (0.03, 0.1, 0.25)},
    "surprisal 10%": Method(by("surprisal", 0.1)),
    "advantage 25%": Method(by("advantage", 0.25)),
    "|advantage| 25%, DG weights": Method(by("abs_advantage", 0.25, weight="dg")),
    "norm 10%, drawn": Method(by("norm", 0.1, unbiased=True)),
    **{f"noise {noise:g}": Method({"noise": noise}) for noise in (0.25, 0.5, 1.0, 2.0)},
    "lossless": Method({"rate": "lossless"}),
    "auto": Method({"rate": "auto"}),
}
PIXELS = {
    "all rows": Method(),
    **{f"small batch {share:.0%}": Method(drawn=share) for share in (0.1, 0.25)},
    "|advantage| 10%, first": Method(by("abs_advantage", 0.1), first=True),
    **{f"random {rate:.0%}, first": Method(by("uniform", rate), first=True) for rate in (0.1, 0.25)},
    "delight 10%, first": Method({"rate": 0.1}, first=True),
    "noise 1, first": Method({"noise": 1.0}, first=True),
    "auto": Method({"rate": "auto"}),
}


@dataclass(frozen=True)
class Task:
    """One run."""

    setting: str
    method: str
    seed: int


def advantages_of(rewards: Tensor, values: Tensor, dones: Tensor, last: Tensor) -> Tensor:
    """GAE; all of them (T, N), the value after the last step (N,)."""
    result, following, running = torch.zeros_like(rewards), last, torch.zeros_like(last)
    for t in reversed(range(len(rewards))):
        alive = 1 - dones[t]
        running = rewards[t] + GAMMA * following * alive - values[t] + GAMMA * LAMBDA * alive * running
        result[t], following = running, values[t]
    return result


def train(task: Task) -> record.Rows:
    """Points of a learning curve: mean return of the episodes since the last, seconds so far, and rows with a graph."""
    setting, method = SETTINGS[task.setting], (PIXELS if "pixels" in task.setting else RULES)[task.method]
    torch.manual_seed(task.seed)
    envs = [setting.make() for _ in range(setting.envs)]
    states = [env.reset(seed=1000 * task.seed + i)[0] for i, env in enumerate(envs)]
    actions = getattr(envs[0], "actions", None) or int(envs[0].action_space.n)
    model = ActorCritic(states[0].shape, actions)
    optimizer = torch.optim.Adam(model.parameters(), lr=setting.lr, eps=1e-5)
    batch = setting.envs * setting.rollout
    iterations, updates = setting.steps // batch, setting.steps // batch * EPOCHS * MINIBATCHES
    returns, recent, done_updates = [0.0] * setting.envs, list[float](), 0
    spent = {"learner": 0.0, "all": 0.0}
    rows: record.Rows = []
    trained = 0
    gated = nullcontext() if method.gate is None else kondo.gated(model, **method.gate, seed=task.seed)
    with gated as gate:
        for iteration in range(iterations):
            start = time.process_time()
            seen, taken, logps, values, rewards, dones = ([] for _ in range(6))
            for _ in range(setting.rollout):
                x = torch.as_tensor(np.stack(states), dtype=torch.float32)
                with torch.no_grad():
                    logits, value = model(x)
                    policy = Categorical(logits=logits)
                    action = policy.sample()
                seen.append(x), taken.append(action), values.append(value), logps.append(policy.log_prob(action))
                reward, done = torch.zeros(setting.envs), torch.zeros(setting.envs)
                for i, env in enumerate(envs):
                    states[i], reward[i], ended, cut, _ = env.step(int(action[i]))
                    returns[i] += float(reward[i])
                    if ended or cut:
                        done[i] = 1
                        recent.append(returns[i])
                        returns[i], states[i] = 0.0, env.reset()[0]
                rewards.append(reward), dones.append(done)
            with torch.no_grad():
                last = model(torch.as_tensor(np.stack(states), dtype=torch.float32))[1]
            old_values = torch.stack(values)
            advantages = advantages_of(torch.stack(rewards), old_values, torch.stack(dones), last).flatten()
            x, a, old = (torch.stack(parts).flatten(0, 1) for parts in (seen, taken, logps))
            target, old_values = advantages + old_values.flatten(), old_values.flatten()
            learning = time.process_time()
            for _ in range(EPOCHS):
                for index in torch.randperm(batch).chunk(MINIBATCHES):
                    optimizer.param_groups[0]["lr"] = setting.lr * (1 - done_updates / updates)
                    done_updates += 1
                    if method.drawn < 1:
                        index = index[: round(method.drawn * len(index))]
                    u = advantages[index]
                    u = (u - u.mean()) / (u.std() + 1e-8)
                    if method.first:
                        gate.preselect(logp=old[index], advantages=u)
                    logits, value = model(x[index])
                    policy = Categorical(logits=logits)
                    ratio = (policy.log_prob(a[index]) - old[index]).exp()
                    surrogate = torch.min(ratio * u, ratio.clamp(0.8, 1.2) * u).mean()
                    clipped = old_values[index] + (value - old_values[index]).clamp(-0.2, 0.2)
                    error = torch.max((value - target[index]).square(), (clipped - target[index]).square()).mean()
                    loss = 0.5 * 0.5 * error - surrogate - 0.01 * policy.entropy().mean()
                    loss.backward()
                    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    optimizer.zero_grad()
                    trained += len(index)
            spent["learner"] += time.process_time() - learning
            spent["all"] += time.process_time() - start
            if (iteration + 1) * POINTS // iterations > len(rows):
                graphs = trained if gate is None else gate.stats.forwarded
                point = {"step": (iteration + 1) * batch, "return": float(np.mean(recent)) if recent else np.nan}
                rows.append({**point, "rows": graphs, "learner_seconds": spent["learner"], "seconds": spent["all"]})
                recent = []
    return rows


def final(runs: pd.DataFrame) -> "pd.Series[float]":
    """Of each seed the mean return over the second half of the run."""
    late = runs[runs.step > runs.step.max() / 2]
    return late.groupby("seed")["return"].mean()


def table(runs: pd.DataFrame) -> str:
    """A row a rule: return over the second half, rows with a graph and seconds, against those of all rows."""
    tables = []
    for setting, of_setting in runs.groupby("setting", sort=False):
        ends = of_setting.drop(columns="setting").groupby(["method", "seed"], sort=False).last()
        base = ends.loc["all rows"].mean()
        lines = [f"{setting:<28} {'return, second half':>20} {'rows':>6} {'learner s':>10} {'all s':>7}"]
        for method, of_method in of_setting.groupby("method", sort=False):
            own = ends.loc[method].mean()
            lines.append(
                f"  {method:<26} {record.spread(final(of_method)):>20} {own.rows / base.rows:>6.0%} "
                f"{own.learner_seconds / base.learner_seconds:>9.2f}x {own.seconds / base.seconds:>6.2f}x"
            )
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


TITLES = {
    "CartPole-v1": "pole cart: delight stays at a random policy",
    "Acrobot-v1": "Acrobot: a lottery for every rule",
    "Breakout, pixels": "Breakout: delight and the largest |advantage| do not learn",
}


def draw(runs: pd.DataFrame) -> plt.Figure:
    """Return against environment steps, and against the learner's seconds; a row of pictures a setting."""
    settings = list(runs.setting.unique())
    figure, axes = plt.subplots(len(settings), 2, figsize=(12, 3.8 * len(settings)), squeeze=False, sharey="row")
    shown = ["all rows", "small batch 10%", "delight 25%", "|advantage| 25%", "random 25%", "noise 0.5", "auto"]
    for (left, right), setting in zip(axes, settings, strict=True):
        of_setting = runs[runs.setting == setting]
        for method in [m for m in of_setting.method.unique() if "pixels" in setting or m in shown]:
            mean = of_setting[of_setting.method == method].groupby("step").mean(numeric_only=True)
            look = {"label": method, "color": style.color(method)}
            left.plot(mean.index, mean["return"], **look)
            right.plot(mean.learner_seconds, mean["return"], **look)
        left.set(title=TITLES[setting], xlabel="steps of the environment", ylabel="return")
        right.set(xlabel="CPU seconds of the learner", title="against the learner's seconds")
        style.label_ends(left)
        style.label_ends(right)
    return figure


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--only", choices=["ppo", "ppo_pixels"], help="one file instead of both")
    args = parser.parse_args()
    if args.quick:
        quick = [Task("CartPole-v1", m, 0) for m in ("all rows", "delight 25%", "|advantage| 25%", "noise 0.5")]
        tasks = {"ppo": quick}
    else:
        seeds = range(args.seeds)
        tasks = {
            "ppo": [Task(s, m, seed) for seed in seeds for s in list(SETTINGS)[:2] for m in RULES],
            "ppo_pixels": [Task("Breakout, pixels", m, seed) for seed in seeds for m in PIXELS],
        }
    for n, (name, runs) in enumerate(record.collect_each({name: (train, each) for name, each in tasks.items()}, args)):
        print("\n" * (n > 0) + table(runs))
        record.save(draw(runs), args.out / f"{name}.png")


if __name__ == "__main__":
    main()
