"""SkyRL's own policy worker, gated and with the gradient at its log-probs masked."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("skyrl", reason="make frameworks ONLY=skyrl")
import tests.frameworks.skyrl.absent  # noqa: F401  before SkyRL's own modules

from skyrl.backends.skyrl_train.workers.model_wrapper import HFModelWrapper  # isort: skip
from skyrl.backends.skyrl_train.workers.worker import PolicyWorkerBase  # isort: skip
from skyrl.train.config import TrainerConfig
from skyrl.train.dataset.replay_buffer import Experience
from transformers import LlamaConfig, LlamaForCausalLM

import kondo_hooks as kondo
from tests.reference import Runs, grads, largest_relative_difference, told

pytestmark = pytest.mark.filterwarnings("ignore")
V, B, PROMPT, T = 29, 6, 4, 5
PAGE = {}
for code in re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[3] / "docs/frameworks/skyrl.md").read_text(), re.DOTALL
):
    exec(code, PAGE)


class Strategy:
    """In the place of FSDP: a plain backward, and a step that clips."""

    def backward(self, loss, model, optimizer):
        loss.backward()

    def optimizer_step(self, optimizer, model, scheduler, name):
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        self.grads = grads(model)
        optimizer.step()
        optimizer.zero_grad()
        return norm


class Plain(PolicyWorkerBase):
    """A policy worker with a small model, and without Ray."""

    def __init__(self, packed=False, **algorithm):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        config = LlamaConfig(vocab_size=V, **sizes, initializer_range=0.2, use_cache=False)
        self.cfg = TrainerConfig()
        options = {"temperature": 0.9, "use_entropy_loss": True, "kl_loss_coef": 0.05, **algorithm}
        for name, value in options.items():
            setattr(self.cfg.algorithm, name, value)
        self.model = HFModelWrapper(LlamaForCausalLM(config).double())
        self.model.remove_microbatch_padding = packed
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.scheduler = SimpleNamespace(get_last_lr=lambda: [0.1])
        self.strategy, self.mesh_rank = Strategy(), SimpleNamespace(dp_size=1)
        from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry

        self.policy_loss_fn = PolicyLossRegistry.get(self.cfg.algorithm.policy_loss_type)


def experience(seed):
    g = torch.Generator().manual_seed(seed)
    prompts, answers = (torch.randint(2, n + 1, (B, 1), generator=g) for n in (PROMPT, T))
    mask = torch.cat([torch.arange(PROMPT).flip(0) < prompts, torch.arange(T) < answers], 1).long()
    loss_mask = mask[:, PROMPT:]

    def log_probs():
        return torch.randn(B, T, generator=g, dtype=torch.float64) * 0.2 - 3.4

    return Experience(
        sequences=torch.randint(1, V, (B, PROMPT + T), generator=g) * mask,
        action_log_probs=log_probs(),
        base_action_log_probs=log_probs(),
        values=None,
        returns=None,
        advantages=torch.randn(B, 1, generator=g, dtype=torch.float64).expand(B, T) / (2 * B),
        attention_mask=mask,
        loss_mask=loss_mask,
        action_mask=loss_mask,
        rollout_logprobs=None,
        rollout_expert_indices=None,
        num_actions=T,
        info=None,
    )


def step(worker, number):
    found = [worker._forward_backward_micro(experience(seed), 1 / number) for seed in range(number)]
    worker.optim_step()
    return found


def masked(worker, factors):
    """The same worker, whose log-probs and entropies send back each row's share alone."""

    def hook(module, args, output):
        log_probs, found = output
        keep = next(factors)[:, None]
        for tensor in (log_probs, found["entropy"]):
            if tensor.requires_grad:
                tensor.register_hook(lambda grad: grad * keep)
        return output

    worker.model.register_forward_hook(hook)
    return worker


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("options", [{"rate": 0.25}, {"noise": 0.7}], ids=told)
@pytest.mark.parametrize("loss", ["regular", "dual_clip", "gspo", "cispo"])
def test_the_worker_s_gradient_is_that_of_the_masked_loss(loss, options, packed):
    number = 3
    worker = Plain(packed, policy_loss_type=loss)
    with kondo.gated(worker.model, window="step", logp=0, **options) as gate:
        found = step(worker, number)
    factors = gate.last.factors()
    assert len(factors) == number * B and 0 < gate.stats.forwarded == gate.stats.kept < gate.stats.rows
    reference = masked(Plain(packed, policy_loss_type=loss), iter(factors.split(B)))
    wanted = step(reference, number)
    assert largest_relative_difference(worker.strategy.grads, reference.strategy.grads) < 1e-10
    for ours, theirs in zip(found, wanted, strict=True):
        for name in set(theirs) - {"loss_fn_outputs"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name
    full = Plain(packed, policy_loss_type=loss)
    step(full, number)
    assert largest_relative_difference(worker.strategy.grads, full.strategy.grads) > 1e-2


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", ["GatedPolicyWorker", "ScreenFirst"])
def test_the_page_s_workers(name, packed):
    class Worker(PAGE[name], Plain):
        pass

    worker, reference = Worker(packed), Plain(packed)
    seen = []
    masked(reference, (seen.pop(0) for _ in iter(int, 1)))
    runs, every = Runs(worker.model, V), Runs(reference.model, V)
    factors = []
    for _ in range(2):
        runs.shapes.clear(), every.shapes.clear(), factors.clear()
        for seed in range(3):
            worker._forward_backward_micro(experience(seed), 1 / 3)
            if name == "ScreenFirst":
                factors.append(worker.gate.last.factors())
        worker.optim_step()
        seen += factors or worker.gate.last.factors().split(B)
        step(reference, 3)
        assert largest_relative_difference(worker.strategy.grads, reference.strategy.grads) < 1e-10
    assert 0 < sum(runs.tokens) < 0.6 * sum(every.tokens)
    worker.gate.__exit__(None, None, None)
