"""The README: its programs run as they stand and print what it shows; its numbers are in the committed files."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import kondo_hooks as kondo
from tests import forks
from tests.forks import ROOT
from tests.test_evidence import EVIDENCE, RESULTS, record, scripts  # noqa: F401  (fixtures)
from tests.test_integrations import SETUP

TEXT = (ROOT / "README.md").read_text()
FIRST, *SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.S)
PRINTED = re.search(r"rows\"\)\n```\n```\n(.*?)```", TEXT, re.S)[1]
REPORT = re.search(r"```\n(kondo\.gated, .*?)```", TEXT, re.S)[1]


def run(program, tmp_path, **environment):
    path = tmp_path / "program.py"
    path.write_text(program)
    done = forks.program(path, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 167


def test_the_first_program_prints_what_is_shown(tmp_path):
    out = run(FIRST + "gate.report()\n", tmp_path)
    assert out.startswith(PRINTED)
    ours, told = (re.sub(r"\d+(\.\d+)? (ms|us)", "_", text).splitlines() for text in (out[len(PRINTED) :], REPORT))
    assert told[:4] == ours[:4] and len(told) == len(ours)
    assert told[4:] == ours[4:]


def batches(actions, positions=()):
    """Eight batches of twelve rows, with all that the snippets read of one."""
    g = torch.Generator().manual_seed(0)
    for _ in range(8):
        shape = (12, *positions)
        yield SimpleNamespace(
            obs=torch.randn(12, 6, generator=g),
            ids=torch.randint(0, actions, shape, generator=g),
            actions=torch.randint(0, actions, shape, generator=g),
            advantages=torch.randn(12, generator=g),
            returns=torch.randn(12, generator=g),
            logp=-torch.rand(shape, generator=g),
            old_logp=-torch.rand(shape, generator=g),
            mask=torch.ones(shape, dtype=torch.bool),
        )


class Agent(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.policy, self.value = nn.Linear(6, 16), nn.Linear(16, 4), nn.Linear(16, 1)

    def forward(self, obs):
        hidden = self.body(obs).tanh()
        return self.policy(hidden), self.value(hidden)[:, 0]


def logp(logits, actions):
    return logits.log_softmax(-1).gather(-1, actions[..., None])[..., 0]


def ppo():
    agent = Agent()
    return {"agent": agent, "minibatches": batches(4), "Categorical": torch.distributions.Categorical}, agent


def grpo():
    model = nn.Sequential(nn.Embedding(9, 16), nn.Linear(16, 9))

    def grpo_loss(logits, batch):
        ratio = (logp(logits, batch.ids) - batch.old_logp).exp()
        return -(ratio * batch.advantages[:, None] * batch.mask).sum() / batch.mask.sum()

    return {"model": model, "batches": batches(9, (5,)), "grpo_loss": grpo_loss}, model


@pytest.mark.parametrize(("first_words", "make"), [("with kondo.gated(agent", ppo), ("with kondo.gated(model", grpo)])
def test_the_loops_run_as_they_stand(first_words, make, monkeypatch):
    (snippet,) = [text for text in SNIPPETS if text.startswith(first_words) and "fully_shard" not in text]
    names, model = make()
    gates, gated = [], kondo.gated
    monkeypatch.setattr(kondo, "gated", lambda *a, **k: gates.append(gated(*a, **k)) or gates[-1])
    before = [p.clone() for p in model.parameters()]
    exec(snippet, {"kondo": kondo, "torch": torch, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), **names})
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert gates[0].stats.steps == 8 and gates[0].stats.forwarded < gates[0].stats.rows == 96


TRAINER = """
from trl import GRPOConfig, GRPOTrainer
import kondo_hooks as kondo
tokenizer.save_pretrained("model")
prompts = Dataset.from_dict({"prompt": ["a b", "c d", "e f", "g h"] * 4})
args = GRPOConfig("out", **common, num_generations=4, max_completion_length=8)
"""

SHARDED = """
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
import kondo_hooks as kondo
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
from torch.distributed.device_mesh import init_device_mesh
mesh = init_device_mesh("cpu", (1,))
shard, fully_shard = fully_shard, lambda module: shard(module, mesh=mesh)
from tests.test_readme import batches, logp
model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
batches = batches(4)
policy_loss = lambda logits, batch: -(logp(logits, batch.actions) * batch.advantages).mean()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first_words", "before"), [("trainer = GRPOTrainer", SETUP + TRAINER), ("fully_shard(model)", SHARDED)]
)
def test_the_loops_of_hosts_run_as_they_stand(first_words, before, tmp_path):
    (snippet,) = [text for text in SNIPPETS if text.startswith(first_words)]
    named = snippet.replace("):\n", ") as seen:\n", 1)
    assert "as seen" in named
    run(before + named + "assert 0 < seen.stats.forwarded < seen.stats.rows, seen\n", tmp_path, PYTHONPATH=str(ROOT))


def test_every_snippet_is_run():
    starts = ["with kondo.gated(agent", "with kondo.gated(model", "trainer = GRPOTrainer", "fully_shard(model)"]
    assert len(SNIPPETS) == len(starts)
    assert all(text.startswith(start) for text, start in zip(SNIPPETS, starts, strict=True))


def test_what_it_saves_is_in_the_committed_files(scripts, record):  # noqa: F811
    read = {
        name: record.read(RESULTS / f"{name}.csv") for name in ("step", "ranks", "llm", "ppo", "ppo_pixels", "smollm")
    }
    step = read["step"].set_index(["model", "step"]).of_full
    llm = read["llm"].assign(all=lambda turns: turns.learner + turns.generation)
    batch = llm[llm.setting == "batch"]
    pixels = read["ppo_pixels"].groupby(["method", "seed"]).learner_seconds.last().groupby("method").mean()
    cart = read["ppo"][read["ppo"].setting == "CartPole-v1"]
    cart = cart.groupby(["method", "seed"]).learner_seconds.last().groupby("method").mean()
    runs = scripts("reversal").timed(record.read(RESULTS / "reversal.csv"))
    to_5 = {m: record.reached(runs[runs.method == m], 0.05).seconds.mean() for m in runs.method.unique()}
    ranks = read["ranks"].set_index(["engine", "window", "step"]).of_full

    def of_step(model):
        name = next(name for name in step.index.levels[0] if name.startswith(model))
        return step[name, "gated, 3%"], step[name, "gated screen-first, 3%"]

    def of_llm(phase):
        ratio = scripts("llm").ratios(batch, phase, "full step").median()
        return ratio["windowed, 3%"], ratio["screen-first, 3%"]

    language = read["smollm"].groupby(["method", "seed"])["all"].last().groupby("method").mean()
    expected = {
        "GRPO on SmolLM2-135M, with sampling": tuple(
            language[name] / language["all rows"] for name in ("noise 0.5", "noise 0.5, screen-first")
        ),
        "a step of a Llama-like model": of_step("Llama-like"),
        "a step of an MLP": of_step("MLP"),
        "a GRPO step, 10M parameters": of_llm("learner"),
        "the same, with generation": of_llm("all"),
        "FSDP2 on two ranks": (ranks["fsdp2", 8, "gated, global, balanced"], None),
        "PPO on Breakout from pixels": (None, pixels["noise 1, first"] / pixels["all rows"]),
        "token reversal to 5% error": (to_5["DG-K 10%"] / to_5["DG"], to_5["DG-K 10%, screen-first"] / to_5["DG"]),
        "PPO on a pole cart": (cart["noise 0.5"] / cart["all rows"], None),
    }
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in TEXT.splitlines() if line.startswith("| ")]
    told = {row[0]: row[2:] for row in rows if row[0] in expected}
    assert told.keys() == expected.keys()
    for name, values in expected.items():
        for cell, value in zip(told[name], values, strict=True):
            assert (cell == "") if value is None else abs(float(cell) - value) <= 0.00501, (name, cell, value)


def test_returns_of_ppo_are_those_of_the_evidence():
    told = re.search(
        r"return (\S+) at 10%, where all rows reach (\S+)\. Breakout: (\S+) against (\S+)\. ", TEXT.replace("\n ", "")
    )
    rows = {
        line.split(" | ")[0]: re.sub(r"\*", "", line).split(" | ")
        for line in EVIDENCE.split("| | pole cart")[1].splitlines()[:8]
    }
    assert [*told.groups()] == [*(rows[name][i] for i in (1, 2) for name in ("| delight 10%", "| all rows"))]


def test_files_that_it_links_are_there():
    links = re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", TEXT)
    assert len(links) > 15
    assert [link for link in links if not (ROOT / link).exists()] == []
