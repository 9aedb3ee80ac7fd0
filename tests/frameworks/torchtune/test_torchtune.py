"""torchtune's own GRPO recipe, gated, holds the parameters that it gets where the dropped answers' terms are masked."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchtune", reason="make frameworks ONLY=torchtune")

import kondo_hooks as kondo
from tests.frameworks.torchtune import grpo
from tests.ranks.launch import launch

PAGE = Path(__file__).parents[3] / "docs" / "frameworks" / "torchtune.md"


@pytest.fixture(autouse=True)
def as_torchrun_has_it(monkeypatch):
    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_PORT": 0,
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, str(value))


def trained(options, ranks=1, **argument):
    """What the recipe returns on each rank."""
    argument = {"options": options, **argument}
    if ranks == 1:
        return [grpo.main(argument)]
    return launch("tests.frameworks.torchtune.grpo", ranks, argument, 120, fresh=True)


def distance(ours, theirs):
    """Largest difference of two runs' parameters, relative to how far they moved."""
    a, b, start = ([torch.tensor(p) for p in run] for run in (ours["end"], theirs["end"], theirs["start"]))
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
    block = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL).group(1)
    recipe = grpo.load_recipe(grpo.RECIPE).FullGRPOFinetuneRecipeDistributed
    names = {"FullGRPOFinetuneRecipeDistributed": recipe, "cfg": grpo.configured(tmp_path)}
    exec(block, names)
    assert isinstance(names["gate"], kondo.Gated) and names["gate"].stats.forwarded == 16
