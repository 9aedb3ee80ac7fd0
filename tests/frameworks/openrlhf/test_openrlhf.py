"""OpenRLHF's own trainer of the actor, gated, and with the gradients of dropped rows masked."""

import os
import socket
from unittest import mock

import pytest
import torch

pytest.importorskip("openrlhf", reason="make frameworks ONLY=openrlhf")

from tests.frameworks.openrlhf import cpu
from tests.frameworks.openrlhf.trainers import compared
from tests.ranks.launch import launch


@pytest.fixture(scope="module", autouse=True)
def _one_rank():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with mock.patch.dict(os.environ, rank), cpu.without_cuda():
        yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def checkpointed(**options):
    def made():
        model = cpu.llama()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        return model

    return made


CONFIGURATIONS = {
    "padded": {},
    "packing": {"packing": True},
    "entropy": {"entropy": 0.1},
    "packing, entropy": {"packing": True, "entropy": 0.1},
    "kl in the loss": {"kl": True},
    "gspo": {"loss": "gspo"},
    "seq-mean": {"aggregation": "seq-mean", "packing": True},
    "dual clip": {"dual_clip": 3.0},
    "correction": {"correction": "token"},
    "two epochs, clipped": {"epochs": 2, "max_norm": 0.05, "packing": True},
    "checkpoints": {"model": checkpointed(use_reentrant=False), "packing": True},
    "reentrant checkpoints": {"model": checkpointed(use_reentrant=True)},
    "experts": {"model": cpu.mixtral},
    "experts, packing": {"model": cpu.mixtral, "packing": True},
    "zero 0": {"stage": 0},
    "zero 1": {"stage": 1, "packing": True},
    "zero 3": {"stage": 3, "packing": True, "entropy": 0.1},
    "dynamic": {"dynamic": True, "max_tokens": 24},
    "dynamic, packing": {"dynamic": True, "max_tokens": 24, "packing": True, "entropy": 0.1},
    "dynamic, zero 3": {"dynamic": True, "max_tokens": 24, "packing": True, "stage": 3},
}
SAME = ("policy_loss", "entropy_loss", "kl", "logprobs_diff", "ppo_kl", "ppo_clip_ratio", "vllm_kl", "reward")


def check(case, name):
    assert case["difference"] < (1e-4 if "epochs" in name else 2e-5)
    assert case["from plain"] > 1e-2
    assert 0 < case["gate"].stats.kept < case["gate"].stats.rows
    assert case["logged"]["actor_grad_norm"] == pytest.approx(case["masked"]["actor_grad_norm"], rel=1e-4)


@pytest.mark.filterwarnings("ignore::kondo_hooks.KondoWarning")  # entropy and KL in the loss are told
@pytest.mark.parametrize("rule", [{"rate": 0.25}, {"noise": 0.7}], ids=str)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_training_equals_that_with_dropped_rows_masked(name, rule):
    case = compared("GatedTrainer", rule, **CONFIGURATIONS[name])
    check(case, name)
    assert case["tokens"] < case["full"]
    assert {*case["logged"]} == {*case["plain"]}
    for key in SAME:  # what is logged is that of all rows
        if key in case["logged"]:
            assert case["logged"][key] == pytest.approx(case["masked"][key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("unit", ["token", "prefix"])
@pytest.mark.parametrize("name", ["padded", "packing", "zero 3"])
@pytest.mark.filterwarnings("ignore::kondo_hooks.KondoWarning")
def test_tokens_and_prefixes(name, unit):
    case = compared("GatedTrainer", {"noise": 0.7, "unit": unit}, **CONFIGURATIONS[name])
    check(case, name)
    assert case["tokens"] < case["full"]


@pytest.mark.filterwarnings("ignore::kondo_hooks.KondoWarning")
@pytest.mark.parametrize("rule", [{"rate": 0.25}, {"noise": 0.7}], ids=str)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_decided_before_the_forward_from_the_old_log_probs(name, rule):
    case = compared("ScreenFirstTrainer", rule, **CONFIGURATIONS[name])
    check(case, name)
    assert case["tokens"] < case["full"]
    assert not case["screened"]


@pytest.mark.filterwarnings("ignore::kondo_hooks.KondoWarning")
@pytest.mark.parametrize("name", ["GatedTrainer", "ScreenFirstTrainer"])
def test_half_precision_of_a_model_from_a_folder(name, tmp_path):
    cpu.llama().save_pretrained(tmp_path)
    case = compared(name, {"rate": 0.25}, model=lambda: str(tmp_path), packing=True, dtype="bf16")
    assert case["difference"] < case["from plain"] / 3 < 0.2


@pytest.mark.filterwarnings("ignore::kondo_hooks.KondoWarning")
@pytest.mark.parametrize("packing", [False, True])
def test_a_routers_balancing_loss_is_refused(packing):
    with pytest.raises(RuntimeError, match="aux_loss of has no row"):
        compared("GatedTrainer", {"rate": 0.25}, model=cpu.mixtral, aux=0.01, packing=packing)
    with pytest.raises(AttributeError, match="aux_loss"):
        compared("ScreenFirstTrainer", {"rate": 0.25}, model=cpu.mixtral, aux=0.01, packing=packing)


ON_RANKS = [
    ("GatedTrainer", {"rate": 0.25}, {"packing": True, "batch": 16}),
    ("GatedTrainer", {"noise": 0.7, "scope": "global"}, {"entropy": 0.1, "batch": 16}),
    ("GatedTrainer", {"rate": 0.25, "scope": "global", "balance": True}, {"packing": True}),
    ("GatedTrainer", {"rate": 0.25}, {"stage": 3, "packing": True}),
    ("GatedTrainer", {"price": 0.0}, {"dynamic": True, "max_tokens": 24, "packing": True, "stage": 3}),
    ("ScreenFirstTrainer", {"rate": 0.25}, {"packing": True, "entropy": 0.1, "batch": 16}),
    ("ScreenFirstTrainer", {"rate": 0.25}, {"dynamic": True, "max_tokens": 24, "stage": 3, "max_norm": 1.0}),
]


def test_two_ranks():
    for found in launch("tests.frameworks.openrlhf.ranks", 2, ON_RANKS, 200, fresh=True):
        assert "tensor_parallel_group" in found.pop()  # ring attention
        for case, (_, _, options) in zip(found, ON_RANKS, strict=True):
            assert case["difference"] < 2e-5 < 1e-2 < case["from plain"], options
            assert 0 < case["kept"] < case["rows"] and case["tokens"] < case["full"], options
            assert case["norms"][0] == pytest.approx(case["norms"][1], rel=1e-4), options
