"""CleanRL's scripts, run as they are installed but for the line that gates them, in environments of random numbers.

The scripts import gym 0.23, stable-baselines3's Atari wrappers and TensorBoard, which do not install beside this torch
or are not needed. Tiny modules stand in for them: a vector of environments, names that are only imported, and a writer
that keeps scalars.
"""

import importlib.util
import sys
import textwrap
import types
from pathlib import Path

import numpy as np
import torch

HERE = "cleanrl"
LOOP = "    for update in range(1, num_updates + 1):"
MADE = "    optimizer = optim.Adam("


class Discrete:
    n, shape = 3, ()


class Box:
    shape = (2,)


class Envs:
    """Observations of random numbers, a reward that depends on the action, and episodes of random lengths."""

    channels, continuous = 0, False

    def __init__(self, makers):
        self.n, self.random = len(makers), np.random.default_rng(0)
        self.single_action_space = Box() if self.continuous else Discrete()
        self.single_observation_space = types.SimpleNamespace(shape=(self.channels, 84, 84) if self.channels else (4,))

    def _observe(self):
        shape = (self.n, *self.single_observation_space.shape)
        return self.random.integers(0, 255, shape).astype(float) if self.channels else self.random.normal(size=shape)

    def reset(self, seed=None):
        return self._observe() if seed is None else (self._observe(), {})

    def step(self, actions):
        reward = self.random.normal(size=self.n) + np.asarray(actions, dtype=float).reshape(self.n, -1).sum(1)
        done = self.random.random(self.n) < 0.2
        if self.continuous:
            return self._observe(), reward, done, np.zeros(self.n, dtype=bool), {}
        return self._observe(), reward, done, []

    def close(self):
        pass


class Writer:
    """Keeps the scalars that a script logs."""

    def __init__(self, *_):
        self.scalars = []
        Writer.last = self

    def add_text(self, *_):
        pass

    def add_scalar(self, name, value, _step):
        if name.startswith("losses/"):
            self.scalars.append(float(value))

    def close(self):
        pass


def stand_ins(channels, continuous):
    kind = type("Envs", (Envs,), {"channels": channels, "continuous": continuous})
    gym = types.ModuleType("gym")
    gym.vector = types.SimpleNamespace(SyncVectorEnv=kind)
    gym.spaces = types.SimpleNamespace(Discrete=Discrete, Box=Box)
    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = Writer
    wrappers = types.ModuleType("stable_baselines3.common.atari_wrappers")
    for name in ("ClipRewardEnv", "EpisodicLifeEnv", "FireResetEnv", "MaxAndSkipEnv", "NoopResetEnv"):
        setattr(wrappers, name, None)
    parents = {name: types.ModuleType(name) for name in ("stable_baselines3", "stable_baselines3.common")}
    return {"gym": gym, "gymnasium": gym, board.__name__: board, wrappers.__name__: wrappers, **parents}


def run(name, arguments, monkeypatch, line=None, names=None, watch=lambda agent, optimizer: None, before=()):
    """Run a script in float64; returns its names.

    Args:
        name: of the script.
        arguments: of its command line.
        monkeypatch: pytest's.
        line: a context to put around its loop of updates.
        names: that the line uses.
        before: a line of the script, and one to put before it.
        watch: called with the agent and the optimizer once they are made.
    """
    [folder] = importlib.util.find_spec(HERE).submodule_search_locations
    path = Path(folder) / f"{name}.py"
    source = path.read_text()
    begin, loop = source.split(LOOP)
    loop, end = loop.split("\n    envs.close()")
    if line is not None:
        source = f"{begin}    {line}\n" + textwrap.indent(LOOP + loop, "    ") + f"\n    envs.close(){end}"
    lines = source.splitlines()
    if before:
        at = next(i for i, text in enumerate(lines) if text.strip() == before[0])
        lines.insert(at, lines[at].replace(*before))
    made = next(i for i, text in enumerate(lines) if text.startswith(MADE))
    lines.insert(made + 1, "    watch(agent, optimizer)")
    for module, stand_in in stand_ins((1 if "lstm" in name else 4) * ("atari" in name), "continuous" in name).items():
        monkeypatch.setitem(sys.modules, module, stand_in)
    monkeypatch.setattr(sys, "argv", [str(path), "--cuda", "False", *map(str, arguments)])
    torch.set_default_dtype(torch.float64)
    try:
        found = {"__name__": "__main__", "__file__": str(path), "watch": watch, **(names or {})}
        exec(compile("\n".join(lines), str(path), "exec"), found)
    finally:
        torch.set_default_dtype(torch.float32)
    return found
