import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from examples import demo, task

DEMO = Path(demo.__file__)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "made" / "here"
    command = [sys.executable, DEMO, "--warmup-steps", "5", "--steps", "2", "--batch", "8", "--device", "cpu"]
    finished = subprocess.run(
        [*command, "--output", folder],
        capture_output=True,
        text=True,
        cwd=DEMO.parents[1],
        env={**os.environ, "COLUMNS": "200"},  # no line breaks inside the paths that it prints
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder, finished.stdout


def test_writes_curves_page_and_json(outcome):
    folder, _ = outcome
    assert sorted(path.name for path in folder.iterdir()) == ["curves.json", "curves.png", "rollouts.html"]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "rollouts.html").read_text("utf-8")
    assert page.count("<article>") == 8  # four of each of the two steps
    assert page.count('<span class="title">step 2</span>') == 4


def test_figures_make_sense(outcome):
    record = json.loads((outcome[0] / "curves.json").read_text())
    curves = record["curves"]
    assert curves.keys() == set(demo.METRICS)
    assert all(len(values) == 2 and all(map(math.isfinite, values)) for values in curves.values())
    for step in range(2):
        assert sum(curves[name][step] for name in ("lock", "fork", "pivot", "mid")) == pytest.approx(1.0)
        assert 0 < curves["entropy"][step] <= math.log(len(task.build_tokenizer())) + 1e-4
        assert 0.1 <= curves["gate"][step] < 1
        assert 0 < curves["length"][step] <= task.MAX_RESPONSE
    assert record["held_out"].keys() == {"before", "after", "teacher"}
    assert record["settings"]["lookahead"] == 3


def test_says_where_things_are(outcome):
    folder, printed = outcome
    words = " ".join(printed.split())
    assert "before" in words and "after" in words and "rollouts.html" in words
    assert folder.name in words


def test_bad_flags_are_refused(capsys):
    with pytest.raises(SystemExit):
        demo.parse(["--steps", "0"])
    assert "--steps" in capsys.readouterr().err


def test_solutions_are_right_unless_they_slip():
    rng = random.Random(0)
    problems = task.sample_problems(rng, 300)
    tokenizer = task.build_tokenizer()
    for problem in problems:
        for text in (problem.solution(), problem.solution(chatter=rng)):
            assert problem.accepts(text)
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text and tokenizer.pad_token_id not in ids
            assert len(ids) < task.MAX_RESPONSE
    slipped = sum(not problem.accepts(problem.solution(slips=rng)) for problem in problems)
    assert 0.3 < slipped / len(problems) < 0.6


@pytest.mark.parametrize("response", ["", "=", "the answer is ", "=12-5=7=", "7", "=17", "=7 "])
def test_the_verifier_refuses(response):
    assert not task.Problem((12, -5)).accepts(response)


def test_held_out_problems_are_held_out():
    rng = random.Random(1)
    held_out = frozenset(task.sample_problems(rng, 50))
    assert not held_out & set(task.sample_problems(rng, 2000, exclude=held_out))


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value():
    assert demo.smooth([2.0] * 9) == pytest.approx([2.0] * 9)
    smoothed = demo.smooth([1.0, 0.0, 0.0, 0.0])
    assert smoothed[0] == 1.0
    assert smoothed == sorted(smoothed, reverse=True)
