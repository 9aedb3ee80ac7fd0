"""The evidence: runs resume, the committed pictures and tables are those of the committed files, orderings hold."""

import importlib
import re
import shutil
from dataclasses import dataclass

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch

from tests.test_examples import ROOT, run

RESULTS = ROOT / "benchmarks" / "results"
EVIDENCE = (ROOT / "docs" / "evidence.md").read_text()
SCRIPTS = {
    "reversal": ["reversal", "reversal_init", "reversal_rules", "reversal_difficulty"],
    "bandit": ["bandit", "bandit_rules"],
    "robustness": ["robustness_noise", "robustness_screens", "robustness_gambling", "robustness_vocabulary"],
    "gradients": ["gradients"],
    "llm": ["llm"],
    "ppo": ["ppo", "ppo_pixels"],
    "pretrained": ["pretrained"],
    "smollm": ["smollm"],
}


@pytest.fixture
def scripts(monkeypatch):
    """Imports a benchmark by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def record(scripts):
    return scripts("record")


@dataclass(frozen=True)
class Task:
    name: str
    noise: float
    seed: int


TASKS = [Task("a", 0.0, 0), Task("a", 0.5, 0), Task("b", 2.0, 1)]


def test_a_run_that_was_stopped_goes_on_where_it_was(record, tmp_path):
    path, seen = tmp_path / "runs.csv", []

    def work(task, failing=True):
        seen.append(task)
        if failing and task.name == "b":
            raise RuntimeError("stopped")
        return [{"step": step, "error": task.noise + step} for step in (1, 2)]

    with pytest.raises(RuntimeError, match="stopped"):
        record.collect(TASKS, work, path, workers=1)
    assert seen == TASKS and len(record.read(path)) == 4
    frame = record.collect(TASKS, lambda task: work(task, False), path, workers=1)
    assert seen == [*TASKS, TASKS[2]]
    assert frame.noise.tolist() == [0, 0, 0.5, 0.5, 2, 2] and frame.error.tolist() == [1, 2, 1.5, 2.5, 3, 4]
    assert path.read_text().count("name,noise,seed") == 1 and path.read_text().startswith("# python ")


def test_a_file_that_holds_all_runs_is_left_as_it_is(record, tmp_path, monkeypatch):
    path = tmp_path / "runs.csv"
    record.collect(TASKS, lambda task: [{"error": 0.0}], path, workers=1)
    before = path.read_text()
    monkeypatch.setattr("sys.argv", ["another", "--command"])
    record.collect(TASKS, lambda task: pytest.fail("run again"), path, workers=1)
    assert path.read_text() == before


def test_rows_are_in_the_order_of_the_tasks(record, tmp_path):
    def work(task):
        return [{"error": task.noise + step} for step in (2, 1)]

    record.collect(TASKS[1:], work, tmp_path / "runs.csv", workers=1)
    frame = record.collect(TASKS, work, tmp_path / "runs.csv", workers=1)
    assert frame.error.tolist() == [2, 1, 2.5, 1.5, 4, 3]


@pytest.mark.parametrize("rows", [[], [{"error": 0.0}], [{"step": 1, "error": 0.0}]])
def test_rows_of_other_columns_are_refused(record, tmp_path, rows):
    path = tmp_path / "runs.csv"
    record.collect(TASKS[:1], lambda task: [{"error": 0.0, "step": 1}], path, workers=1)
    before = path.read_text()
    with pytest.raises(ValueError, match=r"left \d rows of .*, where the file has name,noise,seed,error,step"):
        record.collect(TASKS, lambda task: rows, path, workers=1)
    assert path.read_text() == before


def test_names_that_look_like_missing_values_are_names(record, tmp_path):
    path, tasks = tmp_path / "runs.csv", [Task("NA", 0.0, 0), Task("None", 0.0, 0)]
    record.collect(tasks[:1], lambda task: [{"error": 0.0}], path, workers=1)
    assert record.collect(tasks, lambda task: [{"error": 1.0}], path, workers=1).name.tolist() == ["NA", "None"]


def test_runs_that_were_not_asked_for_are_left_alone(record, tmp_path):
    path = tmp_path / "runs.csv"
    record.collect(TASKS, lambda task: [{"error": 0.0}], path, workers=1)
    before = path.read_text()
    with pytest.raises(SystemExit, match=r"holds runs that were not asked for, such as \('b'"):
        record.collect(TASKS[:2], lambda task: [{"error": 0.0}], path, workers=1)
    assert path.read_text() == before


def test_a_file_made_with_other_versions_is_left_alone(record, tmp_path):
    path = tmp_path / "runs.csv"
    record.collect(TASKS, lambda task: [{"error": 0.0}], path, workers=1)
    path.write_text(path.read_text().replace("torch 2", "torch 1", 1))
    with pytest.raises(SystemExit, match="was made elsewhere"):
        record.collect(TASKS, lambda task: [{"error": 0.0}], path, workers=1)


def test_interval_is_students(record):
    assert record.interval(pd.Series([1.0, 2.0, 3.0])) == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert (
        record.spread(pd.Series([1.0, 2.0, 3.0, np.nan])) == "2.0 +- 2.5" and record.spread(pd.Series([2.0])) == "2.0"
    )


def test_cost_counts_the_seeds_that_never_got_there(record):
    runs = pd.DataFrame({"seed": [0, 0, 0, 1, 1], "step": [3, 1, 2, 1, 2], "error": [0.01, 0.5, 0.04, 0.5, 0.3]})
    runs = runs.assign(backward_rows=1000 * runs.step, seconds=runs.step / 2)
    assert record.reached(runs, 0.05).step.tolist() == [2]
    assert list(record.cost(runs, 0.05).values()) == ["1 of 2 seeds"]
    assert list(record.cost(runs, 0.5).values()) == ["1 | 1,000 | 0.5 +- 0.0"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """What the scripts print and draw from the committed files alone."""
    folder, printed = tmp_path_factory.mktemp("drawn"), {}
    for script, files in SCRIPTS.items():
        for name in files:
            shutil.copy(RESULTS / f"{name}.csv", folder)
        printed[script] = run(f"benchmarks/{script}.py", "--draw", "--out", str(folder))
    return folder, printed


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_committed_picture_is_that_of_the_committed_files(script, drawn):
    ours, theirs = (matplotlib.image.imread(folder / f"{script}.png") for folder in (drawn[0], RESULTS))
    assert ours.shape == theirs.shape and (np.abs(ours - theirs) > 0.02).mean() < 1e-5


@pytest.mark.slow
def test_tables_of_the_evidence_are_those_of_the_committed_files(drawn):
    pages = [(ROOT / "docs" / "evidence" / f"{script}.md").read_text() for script in SCRIPTS]
    tables = [block.strip("\n").splitlines() for text in pages for block in text.split("```\n")[1::2]]
    assert len(tables) >= 20
    printed = [block.strip("\n").splitlines() for output in drawn[1].values() for block in output.split("\n\n")]
    by_title = {lines[0].strip(): {line.rstrip() for line in lines} for lines in printed}
    for title, *lines in tables:
        assert {line.rstrip() for line in lines} <= by_title[title], title


SECONDS = {
    "MLP 784-100-100-10, batch 100 (10%)": ("bandit", "MLP 100, batch 100", 0.1),
    "MLP 784-100-100-10, batch 1,000 (10%)": ("bandit", "MLP 100, batch 1000", 0.1),
    "MLP 784-512-512-10, batch 1,000 (10%)": ("bandit", "MLP 512, batch 1000", 0.1),
    "the same (8%)": ("bandit", "MLP 512, batch 1000", 0.08),
    "CNN, batch 100 (8%)": ("bandit", "CNN, batch 100", 0.08),
    "the same, Adam 3e-4 (10%)": ("bandit", "CNN, batch 100, lr 3e-4", 0.1),
    "token reversal, a small transformer (5%)": ("reversal", None, 0.05),
}


def test_seconds_of_the_summary_are_those_of_the_committed_files(scripts):
    record, reversal = scripts("record"), scripts("reversal")
    lines = [line for line in EVIDENCE.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    head = next(row for row in table if row[:2] == ["", "PG"])
    told = {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in table if row[0] in SECONDS}
    assert told.keys() == SECONDS.keys()
    for label, (name, setting, target) in SECONDS.items():
        frame = record.read(RESULTS / f"{name}.csv")
        frame = reversal.timed(frame) if setting is None else frame[frame.setting == setting]
        for method, cell in told[label].items():
            runs = frame[frame.method == method]
            if runs.empty:
                assert cell == "", (label, method)
                continue
            first = record.reached(runs, target)
            expected = f"{first.seconds.mean():.1f}" if len(first) == 5 else f"{len(first)} of 5"
            assert cell.strip("*") == expected, (label, method)


def test_sampler_with_its_cache_sees_the_log_probs_of_the_model(scripts):
    reversal = scripts("reversal")
    torch.manual_seed(0)
    model = reversal.Decoder(3, 9)
    batch = reversal.sample(model, 5, 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(reversal.answers_logp(model(batch.sequences), batch), batch.logp)
    assert torch.equal(batch.right, batch.answers == batch.sequences[:, :5].flip(1))


def test_answers_of_the_language_model_have_the_log_probs_that_it_learns_from(scripts, monkeypatch):
    smollm = scripts("smollm")
    from transformers import LlamaConfig, LlamaForCausalLM

    class Tokenizer:
        """Digits, and a line's end at 10."""

        def convert_tokens_to_ids(self, _):
            return 10

        def batch_decode(self, answers):
            return ["".join("\n" if t == 10 else str(int(t)) for t in answer) for answer in answers]

    class Task:
        """Right is what begins with an even digit."""

        def score_answer(self, text, entry):
            return float(text[:1] in "02468" and text != "") if entry else 0.01

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=11, bos_token_id=None, eos_token_id=None, **sizes))
    monkeypatch.setattr(smollm, "pretrained", lambda: (model, Tokenizer()))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    asked = smollm.Prompts(torch.randint(0, 10, (2, 5)) * mask, mask, [(Task(), True), (Task(), False)])
    sampled = smollm.sample(model, asked, torch.Generator().manual_seed(1))
    assert sampled.ids.shape == sampled.logp.shape == sampled.mask.shape == (16, smollm.LENGTH)
    for row, mask, right in zip(sampled.ids.tolist(), sampled.mask.tolist(), sampled.right.tolist(), strict=True):
        end = row.index(10) + 1 if 10 in row else len(row)
        assert sum(mask) == end and all(mask[:end])
        assert right in (0, 1)
    text = [int(row[0]) for row in sampled.ids[:8]]
    assert sampled.right.tolist() == [float(t % 2 == 0 and t != 10) for t in text] + [0.0] * 8
    # The ratio is 1 where the learner's log-probs are the sampler's, in bfloat16.
    assert float(smollm.loss_of(model, asked, sampled, torch.ones(16, 1))) == pytest.approx(-1, abs=0.02)


@pytest.mark.parametrize(
    ("solvable", "tried"),
    [
        ({}, [(10, 2), (5, 2), (10, 4)]),
        ({(5, 2), (15, 2), (10, 4)}, [(10, 2), (5, 2), (10, 4), (10, 8)]),
        ({(10, 2), (15, 2), (25, 2)}, [(10, 2), (15, 2), (20, 2), (10, 4)]),
        ({(h, m) for h in (10, 15, 20, 25) for m in (2, 4, 8)}, [(10, 2), (15, 2), (20, 2), (25, 2), (10, 4), (10, 8)]),
    ],
)
def test_difficulty_climbs_until_one_is_not_solved(scripts, monkeypatch, solvable, tried):
    reversal = scripts("reversal")

    def learn(method, seed, horizon, tokens, steps, budget):
        seconds = dict.fromkeys(reversal.PHASES, 0.0) | {"sampling": budget}
        return [{"error": 0.6}, {"error": 0.05 if (horizon, tokens) in solvable else 0.06, **seconds}]

    monkeypatch.setattr(reversal, "learn", learn)
    rows = reversal.climb(reversal.ClimbTask("DG", 0, 15.0))
    assert [(row["horizon"], row["tokens"]) for row in rows] == tried
    assert {shape for shape, row in zip(tried, rows, strict=True) if row["solved"]} == {*tried} & {*solvable}


def test_what_is_solved_after_its_seconds_is_not_solved(scripts, monkeypatch):
    reversal = scripts("reversal")
    late = dict.fromkeys(reversal.PHASES, 0.0) | {"sampling": 14.9, "replay": 0.2}
    monkeypatch.setattr(reversal, "learn", lambda *args, **kwargs: [{"error": 0.01, **late}])
    assert not any(row["solved"] for row in reversal.climb(reversal.ClimbTask("DG", 0, 15.0)))


def test_longest_answer_that_each_seed_solved(scripts):
    runs = [(0, 10, 2, True), (0, 15, 2, True), (0, 20, 2, False), (1, 10, 2, False), (1, 5, 2, True), (2, 10, 4, True)]
    frame = pd.DataFrame(runs, columns=["seed", "horizon", "tokens", "solved"])
    assert scripts("reversal").longest(frame).to_dict() == {0: 15, 1: 5, 2: 0}


@pytest.mark.parametrize("name", ["reversal", "reversal_difficulty"])
def test_every_method_is_in_the_tables_of_reversal(scripts, name):
    frame = scripts("record").read(RESULTS / f"{name}.csv")
    assert list(frame.method.unique()) == list(scripts("reversal").METHODS)


@pytest.mark.parametrize("name", [name for files in SCRIPTS.values() for name in files])
def test_files_say_how_they_were_made(name):
    with (RESULTS / f"{name}.csv").open() as file:
        command, versions, device = file.readline().split(" | ")
    assert command.startswith(f"# python benchmarks/{name.split('_')[0]}.py") and "/tmp" not in command
    assert "torch 2." in versions and "kondo-hooks" in versions and device
    frame = pd.read_csv(RESULTS / f"{name}.csv", comment="#")
    if "seed" in frame:
        names = ("method", "signal", "gate", "setting", "task", "init", "tokens", "noise", "noisy")
        names = ("method",) if "solved" in frame else names  # seeds climb to different H and M
        seeds = 3 if name == "smollm" else 5
        assert (frame.groupby([key for key in names if key in frame]).seed.nunique() == seeds).all()


def test_ppo_is_stopped_by_delight_and_not_by_rules_that_draw():
    for name, setting, bar in (("ppo", "CartPole-v1", 60), ("ppo_pixels", "Breakout, pixels", 2)):
        frame = pd.read_csv(RESULTS / f"{name}.csv", comment="#")
        frame = frame[(frame.setting == setting) & (frame.step > frame.step.max() / 2)]
        end = frame.groupby(["method", "seed"])["return"].mean()
        for method in end.index.levels[0]:
            if method.startswith("delight") and "price" not in method:
                assert (end[method] < bar).all(), method
            if method.startswith(("noise", "auto", "all rows")):
                assert (end[method] > bar).all(), method


def test_on_a_pre_trained_policy_fair_rules_follow_all_rows_and_few_rows_do_not():
    frame = pd.read_csv(RESULTS / "pretrained.csv", comment="#")
    right = frame[frame.step == 1000].groupby(["task", "method"]).right.mean().unstack()
    for method in ("lossless", "auto", "noise 0.25", "noise 0.5", "delight 30%"):
        assert (right[method] > right["all rows"] - 0.05).all(), method
    for method in ("random 30%", "quarter of the batch", "delight 3%", "delight 10%"):
        assert (right[method] < right["all rows"] - 0.05).all(), method


def test_every_seed_tells_delight_from_random_rows_at_300_steps():
    frame = pd.read_csv(RESULTS / "reversal.csv", comment="#")
    error = frame[frame.step == 300].set_index(["method", "seed"]).error
    assert (error["DG-K 10%"] < 0.05).all() and (error["random 10%"] > 0.15).all()


def last(path, key, value="error"):
    """The last ``value`` of each run, by ``key``."""
    frame = pd.read_csv(path, comment="#")
    return frame.groupby(key)[value].last()


@pytest.mark.slow
def test_reversal_is_learned_by_delight_and_not_by_random_rows(tmp_path):
    run("benchmarks/reversal.py", "--quick", "--workers", "1", "--out", str(tmp_path))
    error = last(tmp_path / "reversal_init.csv", "method")
    assert error["DG-K 10%"] < 0.05 < 0.15 < error["random 10%"]
    assert last(tmp_path / "reversal_init.csv", "method", "backward_rows").tolist() == [6000, 6000]


@pytest.mark.slow
def test_bandit_is_learned_by_delight_and_not_by_random_rows(tmp_path):
    run("benchmarks/bandit.py", "--quick", "--workers", "2", "--out", str(tmp_path))
    error = last(tmp_path / "bandit.csv", "method")
    assert error["DG-K 3%"] < 0.2 < 0.3 < error["random 3%"] and error["PG"] < error["random 3%"]
    rows = last(tmp_path / "bandit.csv", "method", "backward_rows")
    assert rows["PG"] == 80_000 and rows["DG-K 3%"] == rows["random 3%"] == 2_400
    assert (tmp_path / "bandit.png").stat().st_size > 10_000


@pytest.mark.slow
def test_robustness_shows_what_the_gate_tolerates(tmp_path):
    run("benchmarks/robustness.py", "--quick", "--workers", "1", "--out", str(tmp_path))
    overlap = last(tmp_path / "robustness_screens.csv", "signal", "overlap")
    assert overlap["bf16 copy"] > 0.9 and overlap["5 updates old"] > 0.6 and overlap["random rows"] < 0.3
    gambling = last(tmp_path / "robustness_gambling.csv", "noisy", "gambles")
    assert gambling["one arm"] > 0.6 > 0.4 > gambling["all arms"]
    vocabulary = last(tmp_path / "robustness_vocabulary.csv", "method")
    assert vocabulary["DG-K price 0"] < 0.3 < vocabulary["DG-K 3%"]


@pytest.mark.slow
def test_gradients_are_biased_where_they_should_be(tmp_path):
    run("benchmarks/gradients.py", "--quick", "--workers", "1", "--out", str(tmp_path))
    frame = pd.read_csv(tmp_path / "gradients.csv", comment="#").set_index(["step", "gate"])
    assert (frame.xs("PG", level="gate").cos_pg > 0.999).all() and (frame.xs("DG", level="gate").cos_dg > 0.999).all()
    assert (frame.xs("delight price 0", level="gate").cos_pg > frame.xs("delight 1%", level="gate").cos_pg).all()
    excess = (frame.draw_bias / frame.draw_chance).groupby("gate").mean()
    assert excess["delight drawn, unbiased"] < 3 < 6 < excess["delight drawn"]


@pytest.mark.slow
def test_llm_step_costs_its_kept_rows(tmp_path):
    run("benchmarks/llm.py", "--quick", "--threads", "1", "--out", str(tmp_path))
    frame = pd.read_csv(tmp_path / "llm.csv", comment="#")
    assert (frame.groupby(["setting", "step"])["round"].nunique() == 3).all()
    batch = frame[frame.setting == "batch"].groupby("step")[["rows", "learner", "peak"]].median()
    full = batch.loc["full step"]
    assert batch.learner["screen-first, 3%"] < 0.4 * full.learner < batch.learner["kondo-gate 0.1.0, 3%"]
    assert batch.learner["windowed, 3%"] < 0.85 * batch.learner["kondo-gate 0.1.0, 3%"]
    assert batch.peak["screen-first, 3%"] < 0.5 * full.peak
    rows = {"full step": 64, "kondo-gate 0.1.0, 3%": 64, "gated, 3%": 8, "windowed, 3%": 2, "screen-first, 3%": 2}
    assert {name: int(batch.rows[name]) for name in rows} == rows
    assert (tmp_path / "llm.png").stat().st_size > 10_000


PPO = {
    "all rows": ("all rows", "all rows"),
    "delight 10%": ("delight 10%", "delight 10%, first"),
    "\\|advantage\\| 10%": ("|advantage| 10%", "|advantage| 10%, first"),
    "`noise=1`": ("noise 1", "noise 1, first"),
    '`rate="auto"`': ("auto", "auto"),
    "random rows 25%": ("random 25%", "random 25%, first"),
    "a small batch, 25%": (None, "small batch 25%"),
}


def test_returns_of_the_summary_are_those_of_the_committed_files(scripts):
    ppo, record = scripts("ppo"), scripts("record")
    lines = EVIDENCE[EVIDENCE.index("| | pole cart") :].partition("\n\n")[0].splitlines()
    told = [[cell.strip().strip("*") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    rows = {row[0]: row[1:] for row in told if row[0] in PPO and len(row) == 5}
    assert rows.keys() == PPO.keys()
    cart, pixels = (record.read(RESULTS / f"{name}.csv") for name in ("ppo", "ppo_pixels"))
    cart = cart[cart.setting == "CartPole-v1"]
    ends = pixels.drop(columns="setting").groupby(["method", "seed"]).last()
    for name, (of_cart, of_pixels) in PPO.items():
        share = ends.loc[of_pixels].mean() / ends.loc["all rows"].mean()
        expected = ["" if of_cart is None else f"{ppo.final(cart[cart.method == of_cart]).mean():.0f}"]
        expected += [f"{ppo.final(pixels[pixels.method == of_pixels]).mean():.1f}"]
        assert rows[name] == [*expected, f"{share.rows:.0%}", f"{share.learner_seconds:.2f}"], name


PRETRAINED = {
    "all rows": "all rows",
    "`noise=0.5`": "noise 0.5",
    "delight 30%": "delight 30%",
    "delight 10%": "delight 10%",
    "random rows 30%": "random 30%",
    "a small batch, 25%": "quarter of the batch",
}


def test_what_the_summary_says_of_pre_trained_policies_is_in_the_committed_file(scripts):
    pretrained, record = scripts("pretrained"), scripts("record")
    runs = record.read(RESULTS / "pretrained.csv")
    table = pretrained.table(runs).set_index("method")
    lines = [line for line in EVIDENCE.splitlines() if line.startswith("|")]
    told = [[cell.strip().strip("*") for cell in line.split("|")[1:-1]] for line in lines]
    rows = {row[0]: row[1:] for row in told if row[0] in PRETRAINED and len(row) == 6}
    assert rows.keys() == PRETRAINED.keys()
    for name, method in PRETRAINED.items():
        of_method = table.loc[method]
        expected = [of_method[f"{task} 1000"].partition(" ")[0] for task in ("addition", "sorting")]
        costs = of_method["cost at 0"].split(" / ")
        misses = of_method["steps to half"].startswith("misses")
        assert rows[name] == [*expected, of_method.kept, *(["misses"] * 2 if misses else [costs[0], costs[-1]])], name


def rows_of(head):
    """The rows of the table of the summary whose first line begins so: {first cell: the others}."""
    table = EVIDENCE[EVIDENCE.index(head) :].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    return {row[0]: [float(cell) for cell in row[1:]] for row in cells}


METHODS = {
    "PG, all rows": "PG",
    "DG, all rows": "DG",
    "delight 3%": "DG-K 3%",
    "delight 10%": "DG-K 10%",
    "`price=0`": "DG-K price 0",
    "`noise=0.5`": "noise 0.5",
    '`rate="auto"`': "auto",
    "random rows 10%": "random 10%",
}


def test_vocabularies_of_the_summary_are_those_of_the_committed_file(record):
    frame = record.read(RESULTS / "robustness_vocabulary.csv")
    last = frame.groupby(["method", "tokens", "seed"]).error.last().groupby(["method", "tokens"]).mean()
    told = rows_of("| | 2 tokens")
    assert told.keys() == METHODS.keys()
    for name, values in told.items():
        assert values == [round(100 * last[METHODS[name], tokens], 1) for tokens in (2, 8, 32)], name


def test_gambling_of_the_summary_is_that_of_the_committed_file(record):
    frame = record.read(RESULTS / "robustness_gambling.csv")
    frame = frame[frame.noisy == "one arm"]
    last = frame.groupby(["method", "noise", "seed"]).gambles.last().groupby(["method", "noise"]).mean()
    for name, values in rows_of("| | 0 | 1 |").items():
        assert values == [round(100 * last[METHODS[name], noise], 1) for noise in (0, 1, 3, 10)], name


def test_steps_of_the_summary_are_those_of_the_committed_files(scripts, record):
    told = rows_of("| | one line | decided")
    names = ["gated, 3%", "gated screen-first, 3%", "kondo-gate 0.1.0, 3%"]
    for model, step in record.read(RESULTS / "step.csv").groupby("model"):
        (values,) = [values for name, values in told.items() if name.split(",")[0] == model.split(",")[0]]
        assert np.allclose(values, step.set_index("step").of_full[names], atol=0.00501), model
    turns = record.read(RESULTS / "llm.csv").assign(all=lambda turns: turns.learner + turns.generation)
    turns, names = turns[turns.setting == "batch"], ["windowed, 3%", "screen-first, 3%", "kondo-gate 0.1.0, 3%"]
    for name, phase in (("GRPO step, learner", "learner"), ("GRPO step, with generation", "all")):
        ratio = scripts("llm").ratios(turns, phase, "full step").median()
        assert np.allclose(told[name], ratio[names], atol=0.00501), name


def test_the_summary_has_few_tables():
    assert EVIDENCE.count("\n|---") <= 8


@pytest.mark.parametrize("name", ["mnist_bandit", "trl_reversal", "trainer_sft"])
def test_examples_draw_a_method_in_the_colour_that_it_has_elsewhere(scripts, monkeypatch, name):
    color = scripts("style").color
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = importlib.import_module(name)
    arguments = {"mnist_bandit": ([0.03, 0.1],), "trl_reversal": (0.1,), "trainer_sft": ([0.1], 40)}[name]
    assert [method.color for method in example.methods(*arguments)] == [
        color(method.name) for method in example.methods(*arguments)
    ]


def test_a_kind_of_method_has_one_hue_and_an_unknown_one_is_refused(scripts):
    color = scripts("style").color
    assert color("DG-K 3%") == color("delight 3%") == color("gated 3%, first") != color("DG-K 10%") != color("DG")
    with pytest.raises(ValueError, match="has no colour"):
        color("something new")


def test_the_summary_of_the_language_model_is_that_of_the_committed_file(scripts):
    runs = scripts("record").read(RESULTS / "smollm.csv")
    last = runs[runs.step == runs.step.max()].groupby("method").mean(numeric_only=True)
    text = EVIDENCE[EVIDENCE.index("**A real language model.**") :]
    names = {"`noise=0.5`": "noise 0.5", r"\|advantage\| 25%": "|advantage| 25%", "random rows 25%": "random 25%"}
    rows = [[cell.strip(" *") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines()[:12]]
    table = [row for row in rows if len(row) == 6 and row[1].isdigit()]
    assert len(table) == 5
    for name, right, passed, kept, seconds, before in table:
        method = names.get(name, name)
        found = last.loc[method]
        of_all = lambda m: f"{last.loc[m, 'all'] / last.loc['all rows', 'all']:.2f}"  # noqa: E731
        assert [right, passed] == [f"{100 * found.right:.0f}", f"{100 * found['pass@8']:.0f}"], name
        assert [kept, seconds] == [f"{found.rows / runs.step.max():.0f}", of_all(method)], name
        if before:
            first = f"{method}, screen-first"
            assert before == f"{of_all(first)} ({100 * last.loc[first, 'right']:.0f} right)", name
