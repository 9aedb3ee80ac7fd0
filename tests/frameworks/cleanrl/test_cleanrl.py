"""CleanRL's own PPO scripts, gated by one line, hold the parameters of those where dropped rows' terms are masked."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("cleanrl", reason="make frameworks ONLY=cleanrl")

import kondo_hooks as kondo
from tests.frameworks.cleanrl import scripts

PAGE = Path(__file__).parents[3] / "docs" / "frameworks" / "cleanrl.md"
LINE = re.search(r"^(with kondo\.gated.*:)", PAGE.read_text(), re.M).group(1)
PRESELECT, CALL = re.search(r"^(gate\.preselect.*)\n(.*)", PAGE.read_text(), re.M).groups()
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*holds no policy.*:kondo_hooks.KondoWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::SyntaxWarning"),
]

SMALL = ["--num-envs", 4, "--num-steps", 16, "--num-minibatches", 4, "--update-epochs", 2, "--total-timesteps", 128]
SCRIPTS = {
    "ppo": SMALL,
    "ppo_continuous_action": SMALL,
    "ppo_atari": [
        "--num-envs",
        2,
        "--num-steps",
        8,
        "--num-minibatches",
        2,
        "--update-epochs",
        2,
        "--total-timesteps",
        16,
    ],
    "ppo_atari_lstm": [
        *("--num-envs", 8, "--num-steps", 3, "--num-minibatches", 2, "--update-epochs", 2, "--total-timesteps", 48)
    ],
}
RULES = [{"noise": 0.7}, {"rate": 0.25}, {"rate": 0.25, "priority": "abs_advantage"}, {"rate": "lossless"}]


def masking(factors):
    """Puts hooks on what the agent returned for a minibatch: each row's gradient times its factor."""
    queue = iter(factors)

    def watch(agent, _optimizer):
        call = agent.get_action_and_value

        def get_action_and_value(*args):
            outputs = call(*args)
            if torch.is_grad_enabled():
                mine = next(queue)
                for output in outputs[1:4]:
                    weights = mine.repeat(len(output) // len(mine)).view(-1, *[1] * (output.dim() - 1))
                    output.register_hook(lambda grad, weights=weights: grad * weights)
            return outputs

        agent.get_action_and_value = get_action_and_value

    return watch


def parameters(found):
    return torch.cat([p.detach().flatten() for p in found["agent"].parameters()])


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", SCRIPTS)
def test_one_line_around_the_updates(name, rule, monkeypatch):
    decided, held = [], {}

    def watch(_agent, optimizer):
        optimizer.register_step_pre_hook(lambda *_: decided.append(held["gate"].last.factors().double()))

    class Held:
        """The package, whose gates are kept."""

        def gated(self, model, **options):
            held["gate"] = kondo.gated(model, **{**options, **rule})
            return held["gate"]

    line = LINE.replace(", noise=0.5", "")
    ours = scripts.run(name, SCRIPTS[name], monkeypatch, line, {"kondo": Held()}, watch)
    logs = scripts.Writer.last.scalars
    theirs = scripts.run(name, SCRIPTS[name], monkeypatch, watch=masking(decided))
    assert logs == pytest.approx(scripts.Writer.last.scalars, rel=1e-6, abs=1e-9)
    full = scripts.run(name, SCRIPTS[name], monkeypatch)
    a, b, c = (parameters(found) for found in (ours, theirs, full))
    assert (a - b).abs().max() < 1e-10
    gate = held["gate"]
    if rule == {"rate": "lossless"}:
        assert (a - c).abs().max() < 1e-10
        return
    assert (a - c).abs().max() > 1e-5 and 0 < gate.stats.forwarded < gate.stats.rows_screened
    if name == "ppo_atari_lstm":
        steps = decided[0].view(-1, 4)  # of four sequences, which are whole
        assert len(steps) == 3 and (steps == steps[0]).all()
    else:
        assert len(decided[0]) == gate.last.delight.numel()


def test_one_line_more_saves_the_screen(monkeypatch):
    decided = []

    def watch(_agent, optimizer):
        optimizer.register_step_pre_hook(lambda *_: decided.append(names["gate"].last.factors().double()))

    class Held:
        """The package, whose gate the watch sees."""

        def gated(self, *args, **options):
            names["gate"] = kondo.gated(*args, **options)
            return names["gate"]

    names = {"kondo": Held()}
    ours = scripts.run("ppo", SMALL, monkeypatch, LINE, names, watch, before=(CALL, PRESELECT))
    theirs = scripts.run("ppo", SMALL, monkeypatch, watch=masking(decided))
    full = scripts.run("ppo", SMALL, monkeypatch)
    a, b, c = (parameters(found) for found in (ours, theirs, full))
    assert (a - b).abs().max() < 1e-10 < 1e-5 < (a - c).abs().max()
    stats = names["gate"].stats
    assert stats.forwarded == stats.kept < stats.rows
