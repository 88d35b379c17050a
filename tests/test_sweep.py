"""``egrsd sweep``: which trainings it starts, and what it makes of their logs. Mostly a script stands in for them."""

import json
import statistics
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("rich", reason="rich is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

import yaml

from egrsd_kernels import cli
from egrsd_kernels.cli import sweep
from egrsd_kernels.cli.cells import Cell, draw, final_value, read_cell, table

# Logs reward = γ + W / 10 + seed for ten steps with one outlier at the start. γ = 9 fails; γ = 8 fails the first time
# and leaves a checkpoint behind.
FAKE = """
import json, os, sys
from pathlib import Path
calls = Path(__file__).with_name("calls")
options = dict(argument[2:].split("=") for argument in sys.argv[2:] if "=" in argument)
gamma, lookahead, seed = (float(options[name]) for name in ("gamma", "lookahead", "seed"))
with calls.open("a") as file:
    file.write(json.dumps(sys.argv[1:] + [os.environ.get("CUDA_VISIBLE_DEVICES")]) + "\\n")
run = Path(options["output_dir"])
if gamma == 8 and "--resume" not in sys.argv:
    (run / "checkpoint-1").mkdir()
    sys.exit("killed")
if gamma == 9:
    sys.exit("out of memory")
reward = gamma + lookahead / 10 + seed
rows = [{"step": 1, "loss": 0.0, "reward": 1e6, "completions/mean_length": 1e6}]
rows += [{"step": step, "loss": 0.0, "reward": reward, "completions/mean_length": 100 * reward} for step in range(9)]
rows += [{"step": 9, "eval_reward": -reward, "eval_completions/mean_length": 7.0}, {"train_loss": 0.0}]
(run / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
print("trained")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Starts sweeps of the stand-in; gives the exit status. ``fake.calls()``: the commands' arguments so far."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "_visible_gpus", lambda: [])
    Path("fake.py").write_text(FAKE)
    Path("config.yaml").write_text("seed: 5\n")
    monkeypatch.setattr(sweep, "TRAIN", (sys.executable, "-S", str(tmp_path / "fake.py")))

    def start(*arguments: str) -> int:
        return cli.main(["sweep", "config.yaml", "--output", "out", *arguments])

    start.calls = lambda: [json.loads(line) for line in Path("calls").read_text().splitlines()]
    return start


def cells() -> dict[tuple, dict]:
    content = json.loads(Path("out/sweep.json").read_text())
    return {(cell["gamma"], cell["lookahead"], cell["seed"]): cell for cell in content["cells"]}


def test_every_cell_is_trained_and_gamma_0_once(fake, capsys):
    grid = ["--gamma", "0", "0.5", "--lookahead", "0", "3", "--seeds", "1", "2", "--max_steps", "9"]
    assert fake(*grid) == 0
    assert len(fake.calls()) == 6
    for call in fake.calls():
        assert call[:3] == ["out/config.yaml", "--max_steps", "9"]
        if "--gamma=0.0" in call:
            assert "--lookahead=0" in call
    assert Path("out/config.yaml").read_text() == "# egrsd train config.yaml --max_steps 9\nseed: 5\n"
    got = cells()
    assert list(got) == [(g, w, s) for g in (0.0, 0.5) for w in (0, 3) for s in (1, 2)]
    for (gamma, lookahead, seed), cell in got.items():
        value = gamma + (lookahead / 10 if gamma else 0) + seed
        assert cell["value"] == pytest.approx(value) and cell["response_length"] == pytest.approx(100 * value)
        assert cell["error"] is None and Path(cell["run"], "train.log").read_text() == "trained\n"
    assert got[0.0, 0, 1]["run"] == got[0.0, 3, 1]["run"] != got[0.0, 0, 2]["run"]
    assert Path("out/sweep.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "│ 0.5 │ 3 │ 2.3 ± 0.71 │ 230 ± 71 " in printed and printed.endswith("out: sweep.json, sweep.png\n")


def test_a_finished_run_is_not_trained_again(fake):
    assert fake("--gamma", "0.5", "--lookahead", "0") == 0
    assert fake("--gamma", "0.5", "1", "--lookahead", "0", "--metric", "eval_reward") == 0
    assert len(fake.calls()) == 2
    assert cells()[1.0, 0, 5]["value"] == -6 and cells()[0.5, 0, 5]["response_length"] == 7  # the config's seed: 5


@pytest.mark.heavy
@pytest.mark.parametrize("damaged", ["[]", "{}", '{"log_history": 3}', '{"log_history": [3]}', '{"log_hi', "3", None])
def test_a_run_whose_log_is_damaged_is_trained_again(fake, damaged):
    """It is not finished; from its checkpoint where it has one, else in the place of what it has left."""
    grid = ["--gamma", "0.5", "1", "--lookahead", "0"]
    assert fake(*grid) == 0
    state = Path("out/gamma0.5-lookahead0-seed5/trainer_state.json")
    state.unlink() if damaged is None else state.write_text(damaged)
    assert fake(*grid) == 0
    (again,) = fake.calls()[2:]
    assert "--gamma=0.5" in again and "--overwrite_output_dir=True" in again and "--resume" not in again
    assert cells()[0.5, 0, 5]["value"] == 5.5
    state.write_text(damaged or "")
    (state.parent / "checkpoint-1").mkdir()
    assert fake(*grid) == 0
    assert fake.calls()[3][-2] == "--resume" and "--overwrite_output_dir=True" not in fake.calls()[3]


def test_a_damaged_log_costs_one_cell(tmp_path):
    for text, says in {
        "[]": "expected an object with log_history",
        '{"log_history": [{"reward": "x"}]}': "reward: ",
    }.items():
        (tmp_path / "trainer_state.json").write_text(text)
        cell = read_cell("reward", 1.0, 0, 5, str(tmp_path))
        assert cell.value is None and says in cell.error


def test_with_a_schedule_gamma_0_is_no_special_case(fake):
    assert fake("--gamma", "0", "--lookahead", "0", "3", "--gamma-schedule=linear", "--gamma_end=1") == 0
    assert len(fake.calls()) == 2 and cells()[0.0, 3, 5]["value"] == pytest.approx(5.3)


def test_a_failed_run_is_named_and_the_others_go_on(fake, capsys):
    grid = ["--gamma", "9", "8", "1", "--lookahead", "0", "--jobs", "2"]
    assert fake(*grid) == 2
    error = "egrsd: error: 2 of 3 runs failed: exit status 1, see out/gamma9.0-lookahead0-seed5/train.log; "
    error += "exit status 1, see out/gamma8.0-lookahead0-seed5/train.log\n"
    out, err = capsys.readouterr()
    assert err == error and out.count("failed") == 4
    assert Path("out/gamma9.0-lookahead0-seed5/train.log").read_text() == "out of memory\n"
    got = cells()
    assert got[1.0, 0, 5]["value"] == 6 and got[8.0, 0, 5]["value"] is None
    assert got[8.0, 0, 5]["error"] == "exit status 1, see out/gamma8.0-lookahead0-seed5/train.log"

    assert fake(*grid) == 2  # what failed is trained again, from its checkpoint where it has one
    assert ["--resume" in call for call in fake.calls()[3:]] in ([True, False], [False, True])
    assert cells()[8.0, 0, 5]["value"] == 13 and cells()[9.0, 0, 5]["error"]


def test_each_job_has_a_gpu_of_its_own(fake, monkeypatch):
    monkeypatch.setattr(sweep, "_visible_gpus", lambda: ["3", "7"])
    assert fake("--gamma", "1", "2", "3", "4", "--lookahead", "1", "--jobs", "1") == 0
    assert [call[-1] for call in fake.calls()] == ["3"] * 4
    assert fake("--gamma", "5", "6", "7", "--lookahead", "1", "--jobs", "3") == 0
    assert sorted(call[-1] for call in fake.calls()[4:]) == ["3", "3", "7"]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--metric", "rewad"], "1 of 1 runs failed: rewad: not in the log; did you mean reward?"),
        (["--seed=3"], "--seed=3: a sweep sets it; see --seeds and --output"),
        (["--output-dir", "x"], "--output-dir: a sweep sets it"),
        (["--jobs", "0"], "jobs: expected at least 1, got 0"),
        (["--max_steps", "3"], "output: out holds runs of another config or with other options; see out/config.yaml"),
        (["--output", "config.yaml"], "output: "),
        (["--gamma", "1", "-1"], "gamma: expected a finite number at least 0, got -1.0"),
        (["--gamma", "nan"], "gamma: expected a finite number at least 0, got nan"),
        (["--lookahead", "-1"], "lookahead: expected at least 0, got -1"),
        (["--seeds", "-3"], "seed: expected at least 0, got -3"),
        (["--gamma", "x"], "argument --gamma: invalid float value: 'x'"),
    ],
)
def test_bad_arguments(fake, capsys, arguments, says):
    assert fake("--gamma", "1", "--lookahead", "0") == 0
    try:
        status = fake("--gamma", "1", "--lookahead", "0", *arguments)
    except SystemExit as exited:  # argparse's own errors
        status = exited.code
    assert status == 2 and f"error: {says}" in capsys.readouterr().err.splitlines()[-1]
    assert len(fake.calls()) == 1


def test_a_missing_config_starts_nothing(fake, capsys):
    assert cli.main(["sweep", "absent.yaml", "--gamma", "1", "--lookahead", "0", "--output", "out"]) == 2
    assert capsys.readouterr().err.startswith("egrsd: error: absent.yaml: no such file, nor a preset (")
    assert not Path("out").exists()


@pytest.mark.parametrize("count, last", [(3, 1), (10, 1), (11, 2), (40, 4)])
def test_final_value_is_the_last_tenth(count, last):
    rows = [{"reward": float(step**2)} for step in range(count)]
    assert final_value([*rows, {"loss": 1.0}], "reward") == statistics.fmean(row["reward"] for row in rows[-last:])


def test_final_value_of_an_evaluation_is_the_last():
    assert final_value([{"eval_x": float(step)} for step in range(40)], "eval_x") == 39
    with pytest.raises(ValueError, match=r"^x: nan$"):
        final_value([{"x": float("nan")}], "x")


def test_the_picture_says_what_the_cells_are(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    texts, text = [], Axes.text
    monkeypatch.setattr(
        Axes, "text", lambda self, x, y, s, **more: (texts.append((x, y, s)), text(self, x, y, s, **more))
    )
    some = [Cell(0.3, 5, seed, "run", value=float(seed), response_length=9.0) for seed in (1, 3)]
    some += [Cell(0.0, 5, seed, "run", error="why") for seed in (1, 3)]
    some += [Cell(0.3, 0, 1, "run", value=0.25, response_length=8.0), Cell(0.3, 0, 3, "run", error="why")]
    some += [Cell(0.0, 0, 1, "run", value=0.5, response_length=7.0)]
    draw(tmp_path / "a.png", some, "reward")
    assert texts[:4] == [(0, 0, "0.5"), (1, 0, "failed"), (0, 1, "0.25\n(1 of 2)"), (1, 1, "2\n± 1.4")]
    assert [s for _, _, s in texts[4:]] == ["7", "failed", "8\n(1 of 2)", "9\n± 0"]
    assert list(table(some, "reward").columns[2].cells) == ["0.5", "failed", "0.25 (1 of 2)", "2 ± 1.4"]


@pytest.mark.slow
def test_real_trainings(tmp_path, monkeypatch):
    from tests.support.trl_tiny import OPTIONS, dataset, tiny_model, tokenizer

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[2]))
    tiny_model().save_pretrained("model")
    tokenizer().save_pretrained("model")
    dataset().save_to_disk("data")
    Path("rewards.py").write_text(
        "def length(completions, **_):\n    return [len(c[0]['content']) for c in completions]"
    )
    keys = {"model_name_or_path": "model", "dataset_name": "data", "reward_funcs": ["rewards.length"], "max_steps": 1}
    Path("tiny.yaml").write_text(yaml.safe_dump(OPTIONS | keys))
    assert cli.main(["sweep", "tiny.yaml", "--gamma", "0", "0.5", "--lookahead", "0", "3"]) == 0
    content = json.loads(Path("tiny-sweep/sweep.json").read_text())
    gates = []
    for cell in content["cells"]:
        (logged, _) = json.loads(Path(cell["run"], "trainer_state.json").read_text())["log_history"]
        assert (cell["value"], cell["response_length"]) == (logged["reward"], logged["completions/mean_length"])
        assert logged["gamma"] == cell["gamma"] and cell["seed"] == 42
        gates.append(logged["gate/mean"])
    assert gates[0] == gates[1] == 1 > gates[3] > gates[2]  # a lookahead opens gates
