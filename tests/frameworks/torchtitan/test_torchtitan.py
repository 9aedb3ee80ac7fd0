"""torchtitan's own trainers, gated, get the gradients that they get where the dropped texts' terms are masked."""

import asyncio
import contextlib
import re
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchtitan", reason="make frameworks ONLY=torchtitan")

from torchtitan.components.loss import IGNORE_INDEX, CrossEntropyLoss
from torchtitan.config import ParallelismConfig
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.trainer import Trainer

import kondo_hooks as kondo
from tests.frameworks.torchtitan import policy
from tests.frameworks.torchtitan.parts import VOCABULARY, spec
from tests.ranks.launch import launch
from tests.reference import Runs, copies, grads, largest_relative_difference

PAGE = Path(__file__).parents[3] / "docs" / "frameworks" / "torchtitan.md"


@pytest.fixture(autouse=True)
def one_rank(as_torchrun_has_it):
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(options, ranks=1, **argument):
    argument = {"options": {**options, "ranks": ranks}, **argument}
    if ranks == 1:
        return [policy.main(argument)]
    return launch("tests.frameworks.torchtitan.policy", ranks, argument, 120, fresh=True)


def distance(ours, theirs):
    """Largest difference of the first step's gradients; the later ones are those of other parameters."""
    a, b = ([torch.tensor(grad) for grad in found["gradients"][0]] for found in (ours, theirs))
    return float(max((x - y).abs().max() for x, y in zip(a, b, strict=True)) / max(y.abs().max() for y in b))


CASES = [
    ({}, {"rate": 0.3}),
    ({"model": "qwen3"}, {"rate": 0.3}),
    ({"rows": 2, "ac": "selective"}, {"rate": 0.3}),
    ({"loss": "dapo", "ac": "full", "count": 3}, {"rate": 0.3, "window": "step"}),
    ({"count": 3}, {"rate": 0.3, "window": 3}),
    ({"longest": False, "count": 3}, {"rate": 0.3, "window": 3}),
    ({}, {"noise": 0.8}),
    ({}, {"rate": 0.3, "unit": "prefix"}),
    ({}, {"rate": 0.3, "first": True}),
    ({"chunks": 3}, {"rate": 0.3, "first": True}),
    ({"chunks": 3}, {"noise": 0.9, "first": True}),
    ({"chunks": 4, "rows": 2, "model": "qwen3", "ac": "full"}, {"rate": 0.3, "first": True}),
]


@pytest.mark.parametrize(("options", "rule"), CASES, ids=str)
def test_the_policy_trainer_s_gradient_is_that_of_the_masked_loss(options, rule):
    [gated] = run(options, rule=rule)
    [masked] = run(options, masks=[gated["decided"]])
    [full] = run(options)
    assert distance(gated, masked) < 2e-6 < 1e-2 < distance(gated, full)
    assert not gated["told"] and 0 < gated["tokens"] < 0.8 * gated["asked"] and masked["tokens"] == gated["asked"]
    norms = [
        [each["trainer/grad_norm/mean"] for each in found["metrics"] if len(each) == 3] for found in (gated, masked)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    if "first" not in rule:  # what the loss logs is of all texts
        for ours, theirs in zip(gated["metrics"][: options.get("count", 2)], full["metrics"], strict=False):
            assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("rule", [{"rate": 0.3}, {"rate": 0.3, "first": True}], ids=str)
def test_on_two_ranks_with_fsdp(rule):
    options = {"chunks": 3} if "first" in rule else {}
    gated = run(options, 2, rule=rule)
    masked = run(options, 2, masks=[each["decided"] for each in gated])
    full = run(options, 2)
    for mine, theirs, plain in zip(gated, masked, full, strict=True):
        assert distance(mine, theirs) < 2e-6 < 1e-2 < distance(mine, plain) and mine["tokens"] < mine["asked"]
    assert gated[0]["decided"] != gated[1]["decided"]


def test_a_loss_in_chunks_without_a_decision_before_the_forward_is_told():
    with pytest.raises(kondo.DelightError, match="no policy was found"):
        run({"chunks": 3}, rule={"rate": 0.3})
    torch.distributed.destroy_process_group()
    [found] = run({"chunks": 3}, rule={"rate": 0.3, "priority": "uniform"})
    assert any("gave lm_head.weight a gradient. It went past the gate" in each for each in found["told"])


# The model alone, in float64, and the trainer of pretraining.


def model_of(attention=None, **options):
    torch.manual_seed(0)
    config = spec(**options).model
    for layer in config.layers:
        layer.attention.inner_attention = attention or layer.attention.inner_attention
    made = config.build()
    with torch.no_grad():
        made.init_weights(buffer_device=None)
    return made.double()


def loss_of(model, pack, weights=1.0, masks=True):
    given = {"attention_masks": model.get_attention_masks(pack.positions)} if masks else {}
    log_probs = model(pack.token_ids, positions=pack.positions, **given).log_softmax(-1)
    taken = log_probs.gather(-1, pack.labels[..., None])[..., 0]
    return -(taken * pack.advantages * weights).sum() / 24


@pytest.mark.parametrize("kind", ["plain", *policy.AC])
@pytest.mark.parametrize("model", ["llama3", "qwen3"])
def test_a_policy_gradient_of_the_model_in_float64(model, kind):
    ours, theirs = copies(model_of(model=model))
    if kind != "plain":
        for each in (ours, theirs):
            policy.AC[kind].Config().build(dump_folder="").apply(each)
    packs = policy.micro_batches(3)
    runs = Runs(ours, VOCABULARY)
    with kondo.gated(ours, rate=0.3, window=3) as gate:
        for pack in packs:
            loss_of(ours, pack).backward()
    factors = gate.last.factors().split([int(policy.texts_of(pack).max()) + 1 for pack in packs])
    for pack, mine in zip(packs, factors, strict=True):
        loss_of(theirs, pack, mine[policy.texts_of(pack)]).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10
    assert 0 < sum(runs.tokens) < 3 * 24


def test_attention_that_goes_across_texts_is_refused():
    model = model_of(ScaledDotProductAttention.Config())
    with (
        pytest.raises(kondo.ReplayMismatchError, match="texts of one row see each other"),
        kondo.gated(model, rate=0.3),
    ):
        loss_of(model, policy.micro_batches(1)[0], masks=False).backward()


def trainer_of(model):
    """A Trainer that has what its step of forward and backward reads."""
    trainer = object.__new__(Trainer)
    trainer.model_parts, trainer.model_config, trainer.ntokens_seen = [model], model.config, 0
    trainer.loss_fn = CrossEntropyLoss.Config(global_vocab_size=VOCABULARY).build(compile_config=None)
    trainer.config = types.SimpleNamespace(parallelism=ParallelismConfig(spmd_backend="partial_dtensor"))
    trainer.parallel_dims = types.SimpleNamespace(pp_enabled=False, cp_enabled=False)
    trainer.train_context, trainer.fwd_bwd_fn = contextlib.nullcontext, trainer._forward_backward_body
    return trainer


def pretrain(model, packs, factors=None):
    """Its step on packs; the labels of dropped texts are those that the loss ignores."""
    losses = []
    for n, pack in enumerate(packs):
        labels = pack.labels
        if factors is not None:
            labels = torch.where(factors[n][policy.texts_of(pack)] != 0, labels, IGNORE_INDEX)
        given = {"input": pack.token_ids, "positions": pack.positions}
        step = trainer_of(model).forward_backward_step
        losses.append(step(input_dict=given, labels=labels, global_valid_tokens=torch.tensor(48)).item())
    return losses


def test_the_step_of_pretraining():
    ours, theirs = copies(model_of().float())
    packs = policy.micro_batches(2, rows=2)
    runs = Runs(ours, VOCABULARY)
    with kondo.gated(ours, rate=0.3, window=2) as gate:
        gated = pretrain(ours, packs)
    sizes = [int(policy.texts_of(pack).max()) + 1 for pack in packs]
    pretrain(theirs, packs, gate.last.factors().split(sizes))
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-5
    assert 0 < sum(runs.tokens) < 96
    theirs.zero_grad()
    assert gated == pytest.approx(pretrain(theirs, packs))


def test_the_page_s_recipe(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {"trainer": policy.made(tmp_path), "asyncio": asyncio, "batches": policy.micro_batches(2)}
    exec(blocks[0], names)
    assert names["gate"].stats.forwarded < names["gate"].stats.rows
    torch.distributed.destroy_process_group()
    names = {"trainer": policy.made(tmp_path, chunks=3), "asyncio": asyncio, "batches": policy.micro_batches(2)}
    exec(blocks[1], names)
    assert 0 < names["gate"].stats.forwarded < names["gate"].stats.rows
