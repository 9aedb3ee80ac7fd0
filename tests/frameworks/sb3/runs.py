"""Runs of an algorithm of stable-baselines3 in float64: gated, with the dropped rows' terms masked, or plain."""

import gymnasium
import numpy as np
import torch
from stable_baselines3.common.torch_layers import FlattenExtractor

ENVIRONMENTS = {"cart": "CartPole-v1", "pendulum": "Pendulum-v1"}


class Spaces(gymnasium.Env):
    """Observations and rewards without a meaning, of any space, in episodes of seven steps."""

    def __init__(self, observations, actions):
        self.observation_space, self.action_space, self.steps = observations, actions, 0

    def reset(self, seed=None, options=None):
        self.steps = 0
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), float(np.sum(action)), self.steps >= 7, False, {}


class Double(FlattenExtractor):
    """Makes float64 of observations: the library's own are float32."""

    def forward(self, observations):
        return super().forward(observations).double()


class Rows:
    """Counts the rows that the policy's linear layers run with a graph."""

    def __init__(self, policy):
        self.graph = 0
        policy.action_net.register_forward_hook(self._note)

    def _note(self, _module, _given, output):
        if torch.is_grad_enabled():
            self.graph += len(output)


def made(kind, environment, policy="MlpPolicy", **options):
    """An algorithm whose policy computes in float64."""
    environment = gymnasium.make(ENVIRONMENTS[environment]) if isinstance(environment, str) else environment
    options = {"n_steps": 32, "seed": 0, "device": "cpu", **options}
    options = {name: value for name, value in options.items() if value is not None}
    options["policy_kwargs"] = {
        "features_extractor_class": Double,
        "net_arch": [16],
        **options.get("policy_kwargs", {}),
    }
    model = kind(policy, environment, **options)
    if options["policy_kwargs"]["features_extractor_class"] is Double:
        model.policy.double()
    return model


def masked(model, factors):
    """Multiplies the gradients of what the policy returned by each row's factor, batch by batch."""
    evaluate, factors = model.policy.evaluate_actions, iter(factors)

    def evaluate_actions(*args, **kwargs):
        outputs = evaluate(*args, **kwargs)
        mine = next(factors)
        for output in (each for each in outputs if each is not None and each.requires_grad):
            weights = mine.repeat_interleave(len(output) // len(mine))
            weights = weights.to(output.dtype).view(-1, *[1] * (output.dim() - 1))
            output.register_hook(lambda grad, weights=weights: grad * weights)
        return outputs

    model.policy.evaluate_actions = evaluate_actions


def noted(gate_of, model):
    """The factors of each decision, as the optimizer steps."""
    found = []
    model.policy.optimizer.register_step_pre_hook(lambda *_: found.append(gate_of().last.factors().double()))
    return found


def parameters(model):
    return np.concatenate([p.detach().numpy().ravel() for p in model.policy.parameters()])


def distance(a, b):
    return float(np.abs(a - b).max())


def logged(model):
    """What the algorithm itself recorded of its last training."""
    values = model.logger.name_to_value
    return {name: float(value) for name, value in values.items() if name.startswith("train/")}
