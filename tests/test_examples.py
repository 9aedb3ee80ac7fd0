"""The programs a user copies run as they are, and show what they claim."""

import csv
from pathlib import Path

import pytest

from tests.forks import ROOT, program
from tests.ranks.launch import run_ranks, script_on_a_rank


def run(script, *args):
    done = program(ROOT / script, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_mnist_bandit_learns_by_delight_and_not_by_random_rows(tmp_path):
    out = run("examples/mnist_bandit.py", "--steps", "500", "--seeds", "1", "--rates", "0.03", "--out", str(tmp_path))
    assert "DG-K 3%" in out and (tmp_path / "mnist_bandit.png").stat().st_size > 10_000
    with (tmp_path / "mnist_bandit.csv").open() as file:
        last = {row["method"]: row for row in csv.DictReader(file) if row["step"] == "500"}
    error = {name: float(row["test_error"]) for name, row in last.items()}
    assert error["DG-K 3%"] < 0.2 < 0.3 < error["random 3%"]
    assert {name: int(row["backward_rows"]) for name, row in last.items()} == {
        "PG": 50_000,
        "DG": 50_000,
        "DG-K 3%": 1_500,
        "random 3%": 1_500,
    }


@pytest.mark.slow
def test_quickstart():
    out = run("examples/quickstart.py")
    assert "before: test error" in out and "skipped=97.0%" in out


@pytest.mark.slow
def test_benchmark_of_a_step(tmp_path):
    out = run("benchmarks/step.py", "--rounds", "2", "--model", "MLP", "--out", str(tmp_path))
    with (tmp_path / "step.csv").open() as file:
        assert file.readline().startswith("# python benchmarks/step.py")
        rows = {row["step"]: row for row in csv.DictReader(file)}
    assert set(rows) >= {"full step", "kondo-gate 0.1.0, 3%", "floor, 3%: the three below", "gated, 3%"}
    assert float(rows["gated, 3%"]["saved_mb"]) < 0.1 * float(rows["full step"]["saved_mb"])
    assert "x floor" in out


@pytest.mark.slow
@pytest.mark.parametrize("script", ["fsdp2", "deepspeed_zero", "accelerate_loop", "fabric_loop"])
def test_programs_on_two_ranks_learn_and_report(script, tmp_path):
    # What torchrun does, as far as the programs and Fabric see it; the benchmarks of ranks start torchrun itself.
    path, elastic = ROOT / "examples" / f"{script}.py", {"TORCHELASTIC_RUN_ID": "none", "GROUP_RANK": "0"}
    run_ranks(script_on_a_rank, 2, (str(path),), tmp_path, 200, **elastic)
    out = "".join((tmp_path / f"{rank}.out").read_text() for rank in range(2))
    assert len(path.read_text().splitlines()) < 120
    rewards = [float(line.rsplit(" ", 1)[1]) for line in out.splitlines() if "reward" in line]
    assert rewards[-1] > rewards[0] + 0.15, rewards
    lines = out.splitlines()
    gated = float(next(line for line in lines if line.startswith("gated")).split()[-1])
    assert gated < 0.9, out
    first = next(i for i, line in enumerate(lines) if line.startswith("rank"))
    replayed = [[int(n) for n in line.split()] for line in lines[first + 1 : first + 3]]
    assert all(forwarded < 0.2 * rows for _, rows, _, forwarded in replayed), replayed


@pytest.mark.slow
def test_benchmark_of_ranks(tmp_path):
    small = ["--rounds", "1", "--width", "32", "--depth", "1", "--length", "16"]
    run("benchmarks/ranks.py", "--engines", "fsdp2", *small, "--out", str(tmp_path))
    with (tmp_path / "ranks.csv").open() as file:
        assert file.readline().startswith("# python benchmarks/ranks.py")
        rows = {(row["window"], row["step"]): row for row in csv.DictReader(file)}
    assert len(rows) == 18
    for window in ("1", "8"):
        full, balanced = rows[window, "full step"], rows[window, "gated, global, all kept on one rank, balanced"]
        assert float(full["of_full"]) == 1 and int(full["collectives"]) > 0 and float(full["peak_mb"]) > 0
        assert len(set(balanced["rows_a_rank"].split("/"))) == 1
    assert float(rows["8", "gated, local"]["received_mb"]) < 0.8 * float(rows["8", "full step"]["received_mb"])


@pytest.mark.slow
def test_cost_model_of_ranks(tmp_path):
    out = run("benchmarks/scaling.py", "--rounds", "1", "--ranks", "2", "--out", str(tmp_path))
    with (tmp_path / "scaling_predicted.csv").open() as file:
        file.readline()
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 3 * 6 and "model/measured" in out
    ratio = {(r["model"], r["gpus"], r["tokens"], r["window"]): float(r["of_full"]) for r in rows}
    assert ratio["8B", "1024", "2048", "1"] > 1 > ratio["8B", "1024", "2048", "8"]


def test_the_page_on_large_models_shows_what_the_cost_model_says(tmp_path):
    out = run("benchmarks/scaling.py", "--ranks", "--out", str(tmp_path))
    table = out[out.index("step               route") :]
    assert "\n".join(map(str.rstrip, table.splitlines())) in Path("docs/large-models.md").read_text()
    name = "scaling_learner.csv"
    assert (tmp_path / name).read_text() == Path(f"benchmarks/results/{name}").read_text()


@pytest.mark.slow
def test_reversal_with_an_unmodified_grpo_trainer(tmp_path):
    out = run("examples/trl_reversal.py", "--quick", "--out", str(tmp_path))
    assert (tmp_path / "trl_reversal.png").stat().st_size > 10_000
    with (tmp_path / "trl_reversal.csv").open() as file:
        assert file.readline().startswith("# python examples/trl_reversal.py")
        rows = list(csv.DictReader(file))
    methods = ["all rows", "gated 10%", "random 10%", "screen-first 10%"]
    assert [row["method"] for row in rows if row["step"] == "60"] == methods
    table = {name: line.split("|")[0] for name in methods for line in out.splitlines() if line.startswith(name)}
    assert all(("6,000" if name == "all rows" else " 600 ") in table[name] for name in methods), out


@pytest.mark.slow
def test_reversal_is_learned_by_delight_alone(tmp_path):
    methods = ["all rows", "gated 10%", "random 10%"]
    run("examples/trl_reversal.py", "--seeds", "1", "--steps", "250", "--only", *methods, "--out", str(tmp_path))
    with (tmp_path / "trl_reversal.csv").open() as file:
        file.readline()
        rows = list(csv.DictReader(file))
    last = {m: [float(r["reward"]) for r in rows if r["method"] == m and int(r["step"]) > 225] for m in methods}
    mean = {m: sum(values) / len(values) for m, values in last.items()}
    assert mean["gated 10%"] > 0.75 > max(mean["all rows"], mean["random 10%"]), mean


@pytest.mark.slow
def test_supervised_training_says_what_it_measured(tmp_path):
    out = run("examples/trainer_sft.py", "--quick", "--out", str(tmp_path))
    assert (tmp_path / "trainer_sft.png").stat().st_size > 10_000
    with (tmp_path / "trainer_sft.csv").open() as file:
        assert file.readline().startswith("# python examples/trainer_sft.py")
        last = {row["method"]: row for row in csv.DictReader(file) if row["step"] == "20"}
    wanted = {"full": "800", "delight 10%": "80", "random 10%": "80", "small batch 10%": "80"}
    assert {name: row["backward_rows"] for name, row in last.items()} == wanted
    assert "delight 10% against small batch" in out


def test_help_of_every_program():
    programs = ["examples/mnist_bandit.py", "examples/trl_reversal.py", "examples/trainer_sft.py"]
    programs += [f"benchmarks/{name}.py" for name in ("step", "ranks", "scaling", "reversal", "bandit", "robustness")]
    programs += ["benchmarks/gradients.py", "benchmarks/llm.py"]
    for script in programs:
        assert "usage:" in run(script, "--help")
