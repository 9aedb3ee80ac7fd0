"""torchtune's own GRPO recipe, gated, holds the parameters that it gets where the dropped answers' terms are masked."""

import pytest
import torch

pytest.importorskip("torchtune", reason="make frameworks ONLY=torchtune")

import kondo_hooks as kondo
from tests.frameworks.torchtune import grpo, others, sft
from tests.ranks.launch import launch

pytestmark = pytest.mark.usefixtures("as_torchrun_has_it")


def trained(options, ranks=1, **argument):
    """What the recipe returns on each rank."""
    argument = {"options": options, **argument}
    if ranks == 1:
        return [grpo.main(argument)]
    return launch("tests.frameworks.torchtune.grpo", ranks, argument, 120, fresh=True)


def distance(ours, theirs):
    """Largest difference of two runs' parameters, relative to how far they moved."""
    a, b, start = ([torch.as_tensor(p) for p in run] for run in (ours["end"], theirs["end"], theirs["start"]))
    moved = max((x - y).abs().max() for x, y in zip(b, start, strict=True))
    assert moved > 1e-3
    return float(max((x - y).abs().max() for x, y in zip(a, b, strict=True)) / moved)


# torchtune's logits are float32 whatever the model's type: factors that are not 0 or 1 round there.
CASES = [
    ({}, {"rate": 0.25}, 1e-12),
    ({"model": "llama3"}, {"rate": 0.25}, 1e-12),
    ({"simple": True, "enable_activation_checkpointing": True}, {"rate": 0.25}, 1e-12),
    ({"ppo_epochs": 1}, {"price": 0.0}, 1e-12),
    ({}, {"noise": 0.8}, 1e-6),
    ({}, {"rate": 0.3, "unit": "token"}, 1e-12),
    ({}, {"rate": 0.3, "unit": "prefix"}, 1e-12),
    ({}, {"rate": 0.25, "screen_first": True}, 1e-12),
]


@pytest.mark.parametrize(("options", "rule", "bar"), CASES, ids=str)
def test_the_parameters_are_those_of_the_masked_recipe(options, rule, bar):
    [gated] = trained(options, rule=rule)
    [masked] = trained(options, masks=[gated["decided"]])
    [full] = trained(options)
    assert distance(gated, masked) < bar < 1e-3 < distance(gated, full)
    assert not gated["told"] and 0 < gated["tokens"] < gated["asked"] == masked["tokens"]
    if "screen_first" not in rule:  # what the recipe logs is of all answers, and the norm is the gradient's
        for ours, theirs in zip(gated["logged"], masked["logged"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"scope": "global"}, {"screen_first": True}], ids=str)
def test_on_two_ranks_with_fsdp(options):
    gated = trained({}, 2, rule={"rate": 0.25, **options})
    masked = trained({}, 2, masks=[run["decided"] for run in gated])
    full = trained({}, 2)
    for mine, theirs, plain in zip(gated, masked, full, strict=True):
        assert distance(mine, theirs) < 1e-12 < 1e-3 < distance(mine, plain)
        assert 0 < mine["tokens"] < mine["asked"]
    assert gated[0]["decided"] != gated[1]["decided"]


def test_the_page_s_recipe(tmp_path):
    recipe = grpo.load_recipe(grpo.RECIPE).FullGRPOFinetuneRecipeDistributed
    names = {"FullGRPOFinetuneRecipeDistributed": recipe, "cfg": grpo.configured(tmp_path)}
    exec(grpo.BLOCKS[0], names)
    assert isinstance(names["gate"], kondo.Gated) and names["gate"].stats.forwarded == 16


def weights_of(run, packed):
    """(B, T) of each micro-batch: the factor of the sample that each token belongs to."""
    factors, found = torch.cat(run["decided"]), []
    for batch in run["asked"]:
        begins = batch["input_pos"] == 0 if packed else torch.zeros_like(batch["tokens"], dtype=torch.bool)
        begins[:, 0] = True
        sample = begins.flatten().cumsum(0).view(begins.shape) - 1
        count = int(sample.max()) + 1
        found.append(factors[:count][sample])
        factors = factors[count:]
    assert not len(factors)
    return found


SFT = [
    ({"loss": "chunks"}, {"rate": 0.25, "window": "step"}, False),
    ({"loss": "whole"}, {"rate": 0.25, "window": "step"}, False),
    ({"loss": "chunks", "enable_activation_checkpointing": True}, {"rate": 0.25, "window": 2}, False),
    (
        {"loss": "whole", "optimizer_in_bwd": True, "gradient_accumulation_steps": 1, "clip_grad_norm": None},
        {"rate": 0.25},
        False,
    ),
    ({"loss": "whole", "packed": True}, {"rate": 0.25, "window": "step", "segments": "input_pos"}, True),
    ({"loss": "whole", "packed": True, "batch_size": 2}, {"rate": 0.2, "window": 2, "segments": "input_pos"}, True),
]


@pytest.mark.parametrize(("options", "rule", "packed"), SFT, ids=str)
def test_supervised_fine_tuning_in_chunks_and_in_packs(options, rule, packed):
    gated = sft.main(options, rule={**rule, "audit": 0})
    masked = sft.main(options, masks=weights_of(gated, packed))
    full = sft.main(options)
    assert distance(gated, masked) < 1e-6 < 1e-3 < distance(gated, full)  # the logits are float32
    asked = sum(batch["tokens"].numel() for batch in gated["asked"])
    assert not gated["told"] and gated["tokens"] < 0.6 * asked and masked["tokens"] == asked
    for ours, theirs in zip(gated["logged"], masked["logged"], strict=True):
        names = ours.keys() & {"loss", "grad_norm"}
        assert {name: ours[name] for name in names} == pytest.approx({name: theirs[name] for name in names})


def test_packs_whose_head_runs_in_chunks_are_refused():
    with pytest.raises(kondo.DelightError, match="packed into rows, need one log-prob a token"):
        sft.main({"loss": "chunks", "packed": True}, rule={"rate": 0.25, "window": "step", "segments": "input_pos"})


def test_layers_that_are_compiled(monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")
    [gated] = trained({"compile": True, "num_steps": 1}, rule={"rate": 0.25})
    [masked] = trained({"compile": True, "num_steps": 1}, masks=[gated["decided"]])
    assert distance(gated, masked) < 1e-12 and gated["tokens"] < gated["asked"]


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("ppo", {"rate": 0.25, "window": 2}),
        ("ppo", {"rate": 0.25, "window": "step"}),
        ("dpo", {"rate": 0.25, "window": 2, "pairs": True}),
        ("dpo", {"rate": 0.25, "window": "step", "pairs": True}),
    ],
    ids=str,
)
def test_ppo_with_a_value_model_of_its_own_and_dpo_of_pairs(name, rule):
    gated = others.main(name, rule={**rule, "audit": 0})
    masked = others.main(name, masks=[factors for step in gated["decided"] for factors in step.split(4)])
    full = others.main(name)
    assert distance(gated, masked) < 1e-6 < 1e-3 < distance(gated, full)
    assert gated["tokens"] < 0.5 * masked["tokens"] and gated["stats"].rows == (32 if name == "ppo" else 16)
