"""A run that is killed and resumed goes on bit for bit: weights, logs, rollouts and reward statistics."""

import shutil

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

from transformers import TrainerCallback

from tests.trl_tiny import make, tiny_model, weights

# Twelve prompts, four a generation: epochs end after steps 3 and 6. With two passes over the rollouts of two steps a
# generation serves four steps.
TWICE = {"num_iterations": 2, "steps_per_generation": 4}
SETTINGS = {
    "adapters off, in the middle of an epoch": ({}, 1),
    "adapters off, at the end of an epoch": ({}, 3),
    "adapters, moving teacher": ({"teacher": "ema", "teacher_ema_decay": 0.5}, 4),
    "frozen copy": ({"peft": False}, 2),
    "periodic copy": ({"peft": False, "teacher": "copy", "teacher_copy_steps": 2}, 3),
    "rollouts still in use": (TWICE, 1),
    "rollouts in their second pass": (TWICE, 3),
    "rollouts used up": (TWICE, 4),
    "schedule": ({"gamma_schedule": "cosine", "gamma_end": 0.0, "lr_scheduler_type": "linear"}, 2),
    "metrics not logged yet": ({"logging_steps": 3}, 4),
}
CLOCK = {"step_time", "tokens_per_second", "peak_memory_gib", "train_runtime"}


class Killed(Exception):
    pass


class Kill(TrainerCallback):
    """Ends the run at once when the checkpoint of ``step`` is complete."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Killed


def rollouts(path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (path / "rollouts").iterdir()}


def without_clock(rows, skip=()) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in CLOCK.union(skip)} for row in rows]


@pytest.mark.parametrize("name", SETTINGS)
def test_resume_is_bit_exact(tmp_path, name):
    settings, step = SETTINGS[name]
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "rollout_steps": 1, **settings}
    straight, expected = make(tmp_path / "a", **options | {"save_strategy": "no"})
    straight.train()
    killed, first = make(tmp_path / "b", callbacks=[Kill(step)], **options)
    with pytest.raises(Killed):
        killed.train()
    shutil.rmtree(tmp_path / "b" / "rollouts")

    torch.manual_seed(99)
    resumed, rest = make(tmp_path / "b", **options)
    torch.rand(17)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / f"checkpoint-{step}"))
    for key, value in weights(straight).items():
        assert torch.equal(value, weights(resumed)[key]), key
    # The trainer's own mean of losses since the last log begins anew in a resumed run.
    skip = ("loss",) if options.get("logging_steps") else ()
    assert without_clock([*first.steps, *rest.steps], skip) == without_clock(expected.steps, skip)
    assert straight.welford.state_dict() == resumed.welford.state_dict()
    later = {f"rollouts-step{number:06d}.jsonl" for number in range(step + 1, 7)}
    whole = rollouts(tmp_path / "a")
    assert rollouts(tmp_path / "b") == {file: whole[file] for file in later}


def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(tmp_path):
    options = {"peft": False, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    run, _ = make(tmp_path, **options)
    run.train()
    folder = tmp_path / "checkpoint-1"
    options |= {"max_steps": 2, "save_strategy": "no"}

    other = tiny_model()
    with torch.no_grad():
        other.lm_head.weight.add_(0.01)
    run, _ = make(tmp_path, **options, model=other)
    with pytest.raises(ValueError, match=r"^model: not the one that this run began with"):
        run.train(resume_from_checkpoint=str(folder))

    run, _ = make(tmp_path, **options, teacher="ema")
    with pytest.raises(ValueError, match=r"^teacher: the checkpoint was written with another kind of teacher"):
        run.train(resume_from_checkpoint=str(folder))

    state = folder / "egrsd_state_0.pt"
    torch.save(torch.load(state) | {"processes": 2}, state)
    run, _ = make(tmp_path, **options)
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: expected 2 processes"):
        run.train(resume_from_checkpoint=str(folder))

    state.unlink()
    run, _ = make(tmp_path, **options)
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .*egrsd_state_0\.pt is missing"):
        run.train(resume_from_checkpoint=str(folder))
