"""A run that is killed and resumed goes on bit for bit: weights, logs, rollouts and reward statistics."""

import copy
import shutil

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

from peft import get_peft_model
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from egrsd_kernels.credit import LOOKAHEAD_SETTINGS
from egrsd_kernels.trl.checkpoint import CheckpointError, Finished
from tests.support.trl_tiny import LORA, correct, dataset, make, row, tiny_model, weights

# Twelve prompts, four a generation: epochs end after steps 3 and 6. With two passes over the rollouts of two steps a
# generation serves four steps.
TWICE = {"num_iterations": 2, "steps_per_generation": 4}
SAVED_MODEL = {"peft": False, "model": "saved"}  # where the reference model comes from
SETTINGS = {
    "adapters off, in the middle of an epoch": ({}, 1),
    "adapters off, at the end of an epoch": ({}, 3),
    "adapters, moving teacher": ({"teacher_model_kind": "ema", "teacher_update_rate": 0.5}, 4),
    "frozen copy": ({"peft": False}, 2),
    "periodic copy": (
        {"peft": False, "teacher_model_kind": "ema", "teacher_update_rate": 1.0, "teacher_sync_steps": 2},
        3,
    ),
    "rollouts still in use": (TWICE, 1),
    "rollouts in their second pass": (TWICE, 3),
    "rollouts used up": (TWICE, 4),
    "schedule": ({"gamma_schedule": "cosine", "gamma_end": 0.0, "lr_scheduler_type": "linear"}, 2),
    "metrics not logged yet": ({"logging_steps": 3}, 4),
    "a generation that ends within an update": (
        {"steps_per_generation": 3, "per_device_train_batch_size": 2, "loss_type": "grpo"},
        2,
    ),
    "two generations an update": ({"steps_per_generation": 1}, 3),
    "a reference model": ({**TWICE, **SAVED_MODEL, "beta": 0.1}, 2),
    "a reference model that moves": (
        {**SAVED_MODEL, "beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5},
        3,
    ),
    "a reference adapter": ({**TWICE, "peft": False, "model": "adapters", "beta": 0.1}, 3),
    "an entropy bonus that adapts": ({"use_adaptive_entropy": True, "entropy_target": 3.1}, 3),
    "masks": ({**TWICE, "top_entropy_quantile": 0.5, "off_policy_mask_threshold": 0.01}, 3),
    "GSPO-token": ({**TWICE, "importance_sampling_level": "sequence_token", "loss_type": "grpo"}, 3),
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


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict:
    """By the names in SETTINGS: what makes the model that a run begins with."""
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    adapters = get_peft_model(tiny_model(), LORA)
    with torch.no_grad():
        for name, weight in adapters.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return {"saved": lambda: str(path), "adapters": lambda: copy.deepcopy(adapters)}


@pytest.mark.heavy
@pytest.mark.parametrize("name", SETTINGS)
def test_resume_is_bit_exact(tmp_path, name, models):
    settings, step = SETTINGS[name]
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "rollout_steps": 1, **settings}

    def begin(folder, **more):
        model = {"model": models[options["model"]]()} if "model" in options else {}
        return make(tmp_path / folder, **options | more | model)

    straight, expected = begin("a", save_strategy="no")
    straight.train()
    killed, first = begin("b", callbacks=[Kill(step)])
    with pytest.raises(Killed):
        killed.train()
    shutil.rmtree(tmp_path / "b" / "rollouts")

    torch.manual_seed(99)
    resumed, rest = begin("b")
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

    run, _ = make(tmp_path, **options, teacher_model_kind="ema")
    with pytest.raises(
        ValueError, match=r"^teacher_model_kind: the checkpoint was written with another kind of teacher"
    ):
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


# ------------------------------------------------------------------------------------------------- which run goes on

SAVED = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}


def refused(run, checkpoint=None) -> str:
    """The line that a run is refused with, before it has done anything."""
    with pytest.raises(CheckpointError) as caught:
        run.train(resume_from_checkpoint=checkpoint)
    assert run.state.global_step == 0 and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a run of one step, with its checkpoint."""
    path = tmp_path_factory.mktemp("saved")
    run, _ = make(path, **SAVED)
    run.train()
    return path


def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def other(reward: str):
    def graded(completions, **_):
        return [0.5] * len(completions)

    graded.__name__ = reward
    return graded


def named(name: str):
    model = tiny_model()
    model.config._name_or_path = name
    return model


@pytest.mark.heavy
@pytest.mark.parametrize(
    "changes, says",
    [
        ({"gamma": 0.3}, "gamma: 0.8 there, 0.3 here"),
        ({"gamma": 0.3, "seed": 1}, "gamma: 0.8 there, 0.3 here; seed: 42 there, 1 here"),
        ({"learning_rate": 1e-3}, "learning_rate: 0.005 there, 0.001 here"),
        ({"reward_funcs": other("other")}, 'reward_funcs: ["correct"] there, ["other"] here'),
        ({"train_dataset": dataset(13)}, 'train_dataset: "12 rows, '),
        ({"train_dataset": dataset(11).add_item(row(1, 1))}, 'train_dataset: "12 rows, '),
        ({"teacher_template": [{"role": "user", "content": "{solution}"}]}, "teacher_template: "),
        ({"peft": False}, 'peft_type: "LORA" there, null here)'),
        ({"model": named("over/there/qwen")}, 'model_name_or_path: "" there, "qwen" here)'),
    ],
)
def test_a_run_of_other_settings_is_not_taken_for_this_one(saved, tmp_path, changes, says):
    folder = saved / "checkpoint-1"
    run, _ = make(tmp_path, **{"max_steps": 2} | changes)
    line = refused(run, str(folder))
    assert line.startswith(f"resume_from_checkpoint: {folder} is of a run with other settings ({says}")
    assert line.endswith("; resume_changed=True goes on from it all the same")


@pytest.mark.slow
def test_a_checkpoint_in_former_words_is_understood(tmp_path):
    options = {"peft": False, "teacher_model_kind": "ema", "teacher_update_rate": 0.001, "max_steps": 2}
    run, _ = make(tmp_path / "a", **options | SAVED)
    run.train()
    folder = tmp_path / "a" / "checkpoint-1"
    state = folder / "egrsd_state_0.pt"
    saved = torch.load(state)
    later = ("teacher_model_kind", "teacher_update_rate", "teacher_sync_steps", *LOOKAHEAD_SETTINGS)
    later += ("position_weight", "prefix_weight")
    former = {name: value for name, value in saved["settings"].items() if name not in later}
    former |= {"teacher": "ema", "teacher_ema_decay": 0.999, "grad_mode": "auto"}
    torch.save(saved | {"settings": former}, state)

    changes = {
        "teacher_update_rate: 0.001 there, 0.25 here": {"teacher_update_rate": 0.25},
        "teacher_sync_steps: 1 there, 2 here": {"teacher_sync_steps": 2},
        'lookahead_filter: "minimum" there, "discounted" here': {"lookahead_filter": "discounted"},
        'lookahead_filter: "minimum" there, "quantile" here; lookahead_quantile: 0.0 there, 0.5 here': {
            "lookahead_filter": "quantile",
            "lookahead_quantile": 0.5,
        },
        "position_weight: 0.0 there, 0.5 here": {"position_weight": 0.5},
    }
    for says, changed in changes.items():
        run, _ = make(tmp_path / "b", **options | changed)
        assert f"is of a run with other settings ({says}); " in refused(run, str(folder))
    for words in (options, {**former_of(options), "grad_mode": "auto"}):
        run, _ = make(tmp_path / f"{len(words)}", **words)
        run.train(resume_from_checkpoint=str(folder))
        assert run.state.global_step == 2


def former_of(options) -> dict:
    rest = {name: value for name, value in options.items() if not name.startswith("teacher_")}
    return rest | {"teacher": "ema", "teacher_ema_decay": 0.999}


@pytest.mark.slow
def test_a_run_is_watched_otherwise_and_moved_and_goes_on(saved, tmp_path):
    """Another length, another folder, other logs: the same run. And one of other settings where that is agreed to."""
    for changes in ({"logging_steps": 2, "rollout_steps": 1, "save_steps": 5}, {"gamma": 0.3, "resume_changed": True}):
        path = tmp_path / str(len(changes))
        run, _ = make(path, **{"max_steps": 2} | changes)
        run.train(resume_from_checkpoint=str(saved / "checkpoint-1"))
        assert run.state.global_step == 2


@pytest.mark.slow
def test_a_folder_that_holds_a_run_is_not_written_into(saved, tmp_path, caplog):
    folder = copied(saved, tmp_path)
    (folder / "rollouts").mkdir()
    (folder / "rollouts" / "rollouts-step000009.jsonl").write_text("{}")
    run, _ = make(folder, **SAVED, rollout_steps=1)
    assert refused(run) == (
        f"output_dir: {folder} holds another run (checkpoint-1, rollouts): resume that, take another folder, "
        "or set overwrite_output_dir=True, which removes them"
    )
    # Nor from another folder's checkpoint on, were it of the same run.
    assert refused(run, str(saved / "checkpoint-1")).startswith(f"output_dir: {folder} holds another run")

    run, _ = make(folder, rollout_steps=1, max_steps=1, overwrite_output_dir=True)
    run.train()
    assert not (folder / "checkpoint-1").exists() and list(rollouts(folder)) == ["rollouts-step000001.jsonl"]
    assert f"output_dir: removed from {folder}: checkpoint-1, rollouts" in caplog.text

    run.save_state()
    shutil.rmtree(folder / "rollouts")
    run, _ = make(folder, max_steps=1)
    assert "holds another run (trainer_state.json)" in refused(run)


@pytest.mark.slow
def test_what_follows_a_checkpoint_goes_when_the_run_changes(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "rollout_steps": 1}
    run, _ = make(tmp_path, max_steps=3, **options)
    run.train()
    run, _ = make(tmp_path, max_steps=2, gamma=0.3, resume_changed=True, **options)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    assert len(rollouts(tmp_path)) == 2


def test_a_finished_run_does_not_go_on(saved, tmp_path):
    folder = copied(saved, tmp_path)
    run, logs = make(folder, **SAVED)
    with pytest.raises(Finished, match=r"^resume_from_checkpoint: already finished at step 1; raise max_steps or num"):
        run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 1 and not logs.steps
    # Where an epoch's part is the end, too.
    run, logs = make(folder, max_steps=-1, num_train_epochs=1 / 3)
    with pytest.raises(Finished, match="already finished at step 1"):
        run.train(resume_from_checkpoint=True)
    assert not logs.steps


@pytest.mark.slow
def test_true_means_the_last_whole_checkpoint(saved, tmp_path):
    folder = copied(saved, tmp_path)
    shutil.copytree(folder / "checkpoint-1", folder / "checkpoint-2")
    for damaged in ("{", "[]", "3", '{"global_step": "2"}', '{"nothing": 1}'):
        (folder / "checkpoint-2" / "trainer_state.json").write_text(damaged)
        run, _ = make(folder, max_steps=2)
        line = refused(run, str(folder / "checkpoint-2"))
        assert line.endswith("trainer_state.json is missing or damaged: the checkpoint is not whole")
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 2
    run, _ = make(tmp_path / "none")
    assert refused(run, True) == f"resume: no checkpoint in {tmp_path / 'none'}"
    assert refused(run, "absent") == "resume_from_checkpoint: no such folder: absent"


@pytest.mark.heavy
@pytest.mark.parametrize("cls, config", [(None, None), (GRPOTrainer, GRPOConfig)])
def test_a_checkpoint_without_a_runs_state_is_called_what_it_is(tmp_path, cls, config):
    if cls is None:
        run, _ = make(tmp_path, **SAVED, save_only_model=True)
    else:
        run, _ = make(tmp_path, cls=cls, config=config, **SAVED)
    run.train()
    run, _ = make(tmp_path, max_steps=2)
    line = refused(run, str(tmp_path / "checkpoint-1"))
    assert (
        "egrsd_state_0.pt is missing: the checkpoint was saved with save_only_model=True or by another trainer" in line
    )
    assert line.endswith("but a new one can begin with its model (model_name_or_path)")


def test_processes_are_counted_where_they_saved(saved, tmp_path):
    folder = copied(saved, tmp_path) / "checkpoint-1"
    (folder / "egrsd_state_0.pt").rename(folder / "egrsd_state_1.pt")
    run, _ = make(tmp_path / "new", max_steps=2)
    assert refused(run, str(folder)).endswith(
        "there are those of 1 other processes; as many have to go on as saved it, got 1"
    )


def cut(file) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file) -> None:
    file.write_bytes(b"")


def overwritten(file) -> None:
    file.write_bytes(b"\x00garbage" * 50)


def of_other_keys(file) -> None:
    torch.save({"processes": 1}, file)


def a_list(file) -> None:
    torch.save([1], file)


FILES = ("egrsd_state_0.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors")
DAMAGED = [(name, damage) for name in FILES for damage in (cut, emptied, overwritten)]
DAMAGED += [("egrsd_state_0.pt", of_other_keys), ("egrsd_state_0.pt", a_list)]


@pytest.mark.heavy
@pytest.mark.parametrize("name, damage", DAMAGED)
def test_a_damaged_file_is_named_in_one_line(saved, tmp_path, name, damage):
    folder = copied(saved, tmp_path) / "checkpoint-1"
    damage(folder / name)
    run, _ = make(tmp_path / "new", max_steps=2)
    with pytest.raises(CheckpointError) as caught:
        run.train(resume_from_checkpoint=str(folder))
    line = str(caught.value)
    assert "\n" not in line and "mmap" not in line
    assert line.startswith("resume_from_checkpoint: ") and str(folder) in line
    if name == "egrsd_state_0.pt":
        assert f"{folder / name} cannot be read: " in line or f"{folder / name} is damaged: it lacks " in line


def test_a_model_in_parts_is_refused(tmp_path):
    model = tiny_model()
    model._tp_size = 2
    with pytest.raises(ValueError, match=r"^model: expected one that is whole on each process, tensor parallelism is"):
        make(tmp_path, model=model)


def test_data_sets_without_rows_and_rewards_that_are_classes(tmp_path):
    with pytest.raises(ValueError, match=r"^train_dataset: expected at least 4 rows, .*, got 0$"):
        make(tmp_path, train_dataset=dataset(4).select([]))
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    with pytest.raises(ValueError, match=r"^eval_dataset: expected at least 1 row, got 0$"):
        make(tmp_path, eval_dataset={"a": dataset(4), "b": dataset(4).select([])}, **evaluated)
    run, _ = make(tmp_path, train_dataset=dataset(4).to_iterable_dataset().filter(lambda _: False))
    with pytest.raises(ValueError, match=r"^train_dataset: expected at least 1 row, got an empty stream$"):
        run.train()
    for reward in (Killed, 3):
        with pytest.raises(TypeError, match=r"^reward_funcs\[1\]: expected a function or a model, got "):
            make(tmp_path, reward_funcs=[correct, reward])
