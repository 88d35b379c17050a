"""``egrsd train``: what a YAML file and a command line say is what is trained; what they get wrong is named."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="TRL is not installed")

import datasets
import huggingface_hub
import torch
import trl.rewards
import yaml
from safetensors.torch import load_file

from egrsd_kernels import cli
from egrsd_kernels.cli.train import find_config, read_config
from egrsd_kernels.trl import PRESETS
from egrsd_kernels.trl.run import last_checkpoint, load_reward, load_splits, make_trainer
from egrsd_kernels.trl.settings import parse_settings
from tests.support.devices import two_gpus
from tests.support.egrsd_processes import SHARDED, train_in_two
from tests.support.trl_tiny import OPTIONS, dataset, row, tiny_model, tokenizer

REWARDS = '''
def odd(completions, answer, **_):
    """Right by a rule that an untrained model meets half of the time."""
    return [float(sum(map(ord, completion[0]["content"])) % 2) for completion in completions]

def of_one(prompt, completions):
    return 0.0

def too_few(completions, **_):
    return [1.0]

not_a_function = 1

class Judge:
    def __call__(self, completions, **_):
        return [0.0] * len(completions)

def by_position(completions, /, **_):
    return [0.0] * len(completions)
'''


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a model, its tokenizer, a data set and a reward function."""
    home = tmp_path_factory.mktemp("home")
    tiny_model().save_pretrained(home / "model")
    tokenizer().save_pretrained(home / "model")
    datasets.DatasetDict(train=dataset(), test=dataset(4)).save_to_disk(str(home / "data"))
    (home / "rewards.py").write_text(REWARDS)
    (home / "broken.py").write_text("import nothing_of_that_name")
    return home


@pytest.fixture
def config(home, tmp_path, monkeypatch):
    """Writes a config with some keys changed (``...`` takes one away) and gives its path."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)  # what is absent is not asked for over the network

    def write(**changes) -> str:
        keys = OPTIONS | {
            "model_name_or_path": "model",
            "dataset_name": "data",
            "reward_funcs": ["rewards.py:odd"],
            "output_dir": str(tmp_path / "run"),
            "use_peft": True,
            "lora_r": 4,
            "lora_target_modules": ["q_proj", "v_proj"],
        }
        keys = {key: value for key, value in (keys | changes).items() if value is not ...}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(keys))
        return str(tmp_path / "config.yaml")

    return write


def history(run: Path) -> list[dict]:
    """The logged steps of a run."""
    return [row for row in json.loads((run / "trainer_state.json").read_text())["log_history"] if "loss" in row]


FORMATS = "expected a file that ends in .jsonl, .json, .parquet, a folder, or a data set of the Hub"


# --------------------------------------------------------------------------------------------------------------- runs


def check_the_same(one: Path, other: Path, rounding: float, absolute: float = 0.0) -> None:
    """Two runs have logged and saved the same, but for rounding, and for ``absolute`` where terms cancel."""
    for mine, theirs in zip(history(one), history(other), strict=True):
        generated = {"reward", "completions/mean_length"} & theirs.keys()  # by this step or an earlier one
        for key in ("loss", "grad_norm", "gate/mean", *generated):
            assert mine[key] == pytest.approx(theirs[key], rel=rounding, abs=absolute), key
    adapters, same = (load_file(run / "adapter_model.safetensors") for run in (one, other))
    assert adapters.keys() == same.keys()
    for name, tensor in adapters.items():
        assert torch.allclose(tensor, same[name], rtol=10 * rounding, atol=rounding), name


# Two updates of one generation, so that the checkpoint is in its middle.
TRLS = {"loss_type": "grpo", "num_iterations": 2, "beta": 0.1, "entropy_coef": 0.01}


@pytest.mark.slow
@pytest.mark.parametrize("loss", [{}, TRLS], ids=["direct", "TRL's"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, two_gpus])])
def test_trains_on_two_processes(config, home, tmp_path, device, loss):
    """And the same under FSDP2, which shards every parameter; also from a checkpoint on."""
    saved = {"save_strategy": "steps", "save_steps": 1, "use_cpu": device == "cpu", **loss}
    rounding = 1e-5 if device == "cpu" else 1e-3
    run = tmp_path / "run"
    said = train_in_two(home, config(**saved))
    assert said.count(f"{run}: the model after step 2\n") == 1
    assert (run / "adapter_model.safetensors").is_file() and (run / "tokenizer.json").is_file()
    assert {path.name for path in (run / "checkpoint-2").glob("egrsd_state_*")} == {
        "egrsd_state_0.pt",
        "egrsd_state_1.pt",
    }
    assert [row["gamma"] for row in history(run)] == [0.8, 0.8]

    sharded = tmp_path / "sharded"
    layers = {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]}
    fsdp = saved | {"fsdp": "full_shard auto_wrap", "fsdp_config": layers, "output_dir": str(sharded)}
    for options in ([], [f"--resume_from_checkpoint={sharded / 'checkpoint-1'}"]):
        said = train_in_two(home, config(**fsdp), *options, fsdp=True)
        counts = re.findall(f"{SHARDED} (\\d+) of (\\d+)", said)
        assert len(counts) == 2 and all(some == every != "0" for some, every in counts)
        check_the_same(sharded, run, rounding)


@pytest.mark.slow
def test_a_whole_teacher_on_two_processes_that_shard_the_student(config, home, tmp_path):
    """Another model, by name, teaches all weights: under FSDP2, which shards the student, as under DDP."""
    torch.manual_seed(5)
    other = tiny_model().apply(
        lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None
    )
    other.save_pretrained(home / "teacher")
    tokenizer().save_pretrained(home / "teacher")
    keys = {"use_peft": False, "teacher_model_name_or_path": "teacher", "save_strategy": "no"}
    run, sharded = tmp_path / "run", tmp_path / "sharded"
    train_in_two(home, config(**keys))
    layers = {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]}
    fsdp = {"fsdp": "full_shard auto_wrap", "fsdp_config": layers, "output_dir": str(sharded)}
    train_in_two(home, config(**keys | fsdp), fsdp=True)
    for mine, theirs in zip(history(sharded), history(run), strict=True):
        for key in ("loss", "grad_norm", "teacher_entropy/mean", "abs_log_ratio/mean"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4), key
        assert mine["abs_log_ratio/mean"] > 0.1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_trains_under_deepspeed(config, home, tmp_path, monkeypatch):
    """On two processes as under DDP: ZeRO-2, and ZeRO-3, which shards every parameter, also from a checkpoint on."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    saved = {"save_strategy": "steps", "save_steps": 1}
    run, sharded = tmp_path / "run", tmp_path / "sharded"
    train_in_two(home, config(**saved))
    optimizer = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}
    for zero in ({"stage": 2}, {"stage": 3, "stage3_param_persistence_threshold": 0}):
        settings = dict.fromkeys(
            ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
        )
        settings |= {"zero_optimization": zero, "optimizer": {"type": "AdamW", "params": optimizer}}
        deepspeed = saved | {"deepspeed": settings, "output_dir": str(sharded), "overwrite_output_dir": True}
        said = train_in_two(home, config(**deepspeed))
        assert f"{sharded}: the model after step 2\n" in said
        assert (sharded / "checkpoint-2/global_step2").is_dir(), "DeepSpeed's engine has saved nothing"
        check_the_same(sharded, run, 1e-5, 1e-6)
    train_in_two(home, config(**deepspeed), f"--resume_from_checkpoint={sharded / 'checkpoint-1'}")
    check_the_same(sharded, run, 1e-5, 1e-6)


def test_command_line_overrides_the_file(config, tmp_path, capsys):
    options = [
        "--max_steps",
        "1",
        "--gamma=0.5",
        "--lora-target-modules",
        "k_proj",
        "o_proj",
        "--reward_weights",
        "-2.5",
    ]
    assert cli.main(["train", config(reward_weights=[1]), *options]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path / 'run'}: the model after step 1"
    (logged,) = history(tmp_path / "run")
    assert logged["gamma"] == 0.5 and logged["reward"] < 0
    adapter = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert set(adapter["target_modules"]) == {"k_proj", "o_proj"} and adapter["r"] == 4


@pytest.mark.slow
def test_full_fine_tuning_with_evaluation(config, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, "max_steps": 1}
    assert cli.main(["train", config(use_peft=False, **options)]) == 0
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert sum("eval_reward" in row for row in state["log_history"]) == 1
    before, after = tiny_model().state_dict(), load_file(tmp_path / "run" / "model.safetensors")
    assert before.keys() == after.keys()
    assert not before["lm_head.weight"].equal(after["lm_head.weight"])


def test_resume_goes_on_where_the_checkpoint_is(config, tmp_path, capsys):
    path = config(save_strategy="steps", save_steps=1)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert cli.main(["train", path, "--output_dir", str(straight)]) == 0
    assert cli.main(["train", path, "--output_dir", str(resumed), "--max_steps", "1"]) == 0
    first = history(resumed)
    assert cli.main(["train", path, "--resume", "--output_dir", str(resumed)]) == 0
    assert history(resumed)[:1] == first and len(history(resumed)) == 2
    files = [load_file(run / "adapter_model.safetensors") for run in (straight, resumed)]
    assert all(value.equal(files[1][key]) for key, value in files[0].items())

    # A checkpoint that a kill cut short is passed over.
    for cut in ("{", None):
        state = resumed / "checkpoint-2" / "trainer_state.json"
        state.unlink() if cut is None else state.write_text(cut)
        assert last_checkpoint(str(resumed)) == str(resumed / "checkpoint-1")
    assert cli.main(["train", path, "--resume", "--output_dir", str(resumed)]) == 0
    again = load_file(resumed / "adapter_model.safetensors")
    assert all(value.equal(again[key]) for key, value in files[0].items())

    capsys.readouterr()
    other = ["--output_dir", str(resumed), "--teacher_model_kind=frozen", "--max_steps=3"]
    assert cli.main(["train", "--resume", path, *other]) == 2
    says = "egrsd: error: teacher_model_kind: the checkpoint was written with another kind of teacher"
    assert capsys.readouterr().err.splitlines()[-1] == says


def test_a_run_of_other_settings_is_refused_before_a_model_is_loaded(config, tmp_path, capsys, monkeypatch):
    path = config(save_strategy="steps", save_steps=1, max_steps=1)
    assert cli.main(["train", path]) == 0
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("egrsd_kernels.trl.run.EGRSDTrainer", None)
        other = f"resume_from_checkpoint: {run / 'checkpoint-1'} is of a run with other settings "
        says = other + "(gamma: 0.8 there, 0.3 here); "
        assert fails([path, "--resume", "--gamma=0.3", "--max_steps=2"], capsys).startswith(says)
        says = f"output_dir: {run} holds another run (checkpoint-1, trainer_state.json): resume that, "
        assert fails([path], capsys).startswith(says)
    assert fails([path, "--resume"], capsys).startswith(
        "resume_from_checkpoint: already finished at step 1; raise max_s"
    )
    # What only the trainer knows.
    says = other + "(lora_r: 4 there, 8 here); "
    assert fails([path, "--resume", "--lora_r=8", "--max_steps=2"], capsys).startswith(says)

    # Killed after its last checkpoint: the model is saved now.
    (run / "trainer_state.json").unlink()
    (run / "adapter_model.safetensors").unlink()
    assert cli.main(["train", path, "--resume"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{run}: the model after step 1"
    assert len(history(run)) == 1
    saved, last = (load_file(folder / "adapter_model.safetensors") for folder in (run, run / "checkpoint-1"))
    assert all(value.equal(last[key]) for key, value in saved.items())

    (run / "checkpoint-1" / "egrsd_state_0.pt").write_bytes(b"PK")
    says = f"resume_from_checkpoint: {run / 'checkpoint-1' / 'egrsd_state_0.pt'} cannot be read: "
    assert fails([path, "--resume", "--max_steps=2"], capsys).startswith(says)
    assert cli.main(["train", path, "--overwrite_output_dir=True"]) == 0


# ----------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load_by_name(name, monkeypatch):
    monkeypatch.setattr("egrsd_kernels.trl.EGRSDConfig.world_size", 8)
    with pytest.raises(ValueError, match=r"^dataset_name: missing$"):
        parse_settings(read_config(find_config(name)), ["--use_cpu"])
    given = ["--use_cpu", "--dataset_name", "d", "--reward_funcs", "r", "--output_dir", "o"]
    arguments, training, model = parse_settings(read_config(find_config(name)), given)
    assert arguments.reward_funcs == ["r"]
    assert (training.gate_floor, training.learning_rate, training.bf16) == (0.1, 5e-6, True)
    assert (training.lookahead > 0) == ("-cl-" in name)
    assert model.model_name_or_path == "Qwen/Qwen3-" + ("4B" if "4b" in name else "8B")
    assert (model.dtype, model.lora_alpha, model.use_peft) == ("bfloat16", 128, True)
    assert model.lora_target_modules[-1] == "down_proj"


def test_every_kind_of_value(config):
    values = {
        "max_completion_length": None,
        "length_beta": 0,
        "save_strategy": False,  # how YAML reads a bare no
        "learning_rate": "5e-6",  # YAML takes a number without a point for text
        "report_to": ["none"],
        "chat_template_kwargs": {"enable_thinking": False},
        "entropy_scale": 3,
        "lora_target_modules": "all-linear",
        "reward_funcs": "rewards.odd",
    }
    arguments, training, model = parse_settings(read_config(Path(config(**values))))
    assert training.max_completion_length is None and training.save_strategy == "no"
    assert training.learning_rate == 5e-6 and training.entropy_scale == 3.0
    assert training.chat_template_kwargs == {"enable_thinking": False}
    assert model.lora_target_modules == "all-linear" and arguments.reward_funcs == ["rewards.odd"]


def test_the_trainer_gets_what_the_file_says(config):
    template = [{"role": "user", "content": "Known: {solution}"}]
    path = config(teacher_template=template, dtype="bfloat16", reward_funcs=["rewards.odd", "think_format_reward"])
    trainer = make_trainer(*parse_settings(read_config(Path(path))))
    example = row(1, 2)
    assert trainer.teacher_prompt(example)[-1]["content"].endswith("Known: 1 plus 2 is 3.")
    base = trainer.model.get_base_model()
    assert str(base.lm_head.weight.dtype) == "torch.bfloat16"
    assert [function.__name__ for function in trainer.reward_funcs] == ["odd", "think_format_reward"]


@pytest.mark.heavy
@pytest.mark.parametrize("given, trained", [("q_proj", 2), (["q_proj"], 2), ("self_attn.q_proj", 2), ("all-linear", 14),
                                           (["all-linear"], 14), (r".*\.0\..*q_proj", 1)])  # fmt: skip
def test_one_entry_of_lora_target_modules_means_a_module(config, given, trained):
    trainer = make_trainer(*parse_settings(read_config(Path(config(lora_target_modules=given)))))
    assert sum("lora_A" in name for name, _ in trainer.model.named_parameters()) == trained


def test_rewards_by_path_module_and_name(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    by_path, by_module = load_reward(str(home / "rewards.py") + ":odd"), load_reward("rewards.odd")
    assert by_path([[{"content": "a"}], [{"content": "b"}]], None) == [1.0, 0.0]
    assert by_module.__code__.co_filename == by_path.__code__.co_filename
    assert load_reward("think_format_reward") is trl.rewards.think_format_reward


def test_data_sets_on_disk(config, tmp_path):
    config()  # sets the cache
    rows = dataset()
    rows.save_to_disk(str(tmp_path / "one"))
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.to_json(tmp_path / "rows.jsonl")
    for name in ("one", "rows.parquet", "rows.jsonl"):
        splits = load_splits(str(tmp_path / name))
        assert list(splits) == ["train"] and splits["train"].to_list() == rows.to_list()
    assert {name: len(split) for name, split in load_splits("data").items()} == {"train": 12, "test": 4}


# ------------------------------------------------------------------------------------------------------------- errors


def fails(arguments: list[str], capsys) -> str:
    """The one line that a run with these arguments ends with."""
    assert cli.main(["train", *arguments]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("egrsd: error: ")
    return line.removeprefix("egrsd: error: ")


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"gama": 0.3}, "gama: unknown key; did you mean gamma?"),
        ({"gamma": "high"}, "gamma: invalid float value: 'high'"),
        ({"gate_floor": None}, "gate_floor: expected float, got None"),
        ({"gate_floor": [0.3]}, "gate_floor: expected float, got [0.3]"),
        ({"lookahead": 1.5}, "lookahead: invalid int value: '1.5'"),
        ({"bf16": "maybe"}, "bf16: "),
        ({"save_strategy": "sometimes"}, "save_strategy: invalid choice: 'sometimes'"),
        ({"gate_floor": 2}, "gate_floor: expected a finite number at least 0 and at most 1, got 2"),
        ({"lora_r": "big"}, "lora_r: invalid int value: 'big'"),
        ({"lora_target_modules": [1]}, "lora_target_modules: expected list[str] or null, got [1]"),
        ({"lora_target_modules": ["nowhere"]}, "Target modules "),
        ({"output_dir": ...}, "output_dir: missing"),
        ({"model_name_or_path": ...}, "model_name_or_path: missing"),
        ({"model_name_or_path": "nobody/nothing"}, "model_name_or_path: nobody/nothing: "),
        ({"model_name_or_path": "data"}, "model_name_or_path: data: "),
        ({"dataset_name": ...}, "dataset_name: missing"),
        ({"dataset_name": "absent.jsonl"}, "dataset_name: absent.jsonl: no such file"),
        ({"dataset_name": "nobody/nothing"}, "dataset_name: nobody/nothing: "),
        (
            {"dataset_name": "no json.jsonl"},
            # As this or that version of datasets says it.
            (
                "dataset_name: no json.jsonl: JSON parse error",
                "dataset_name: no json.jsonl: Unexpected character found",
            ),
        ),
        ({"dataset_train_split": "tran"}, "dataset_train_split: expected one of train, test, got 'tran'"),
        (
            {"dataset_test_split": "dev", "eval_strategy": "steps", "eval_steps": 1},
            "dataset_test_split: expected one of train, test, got 'dev'",
        ),
        ({"solution_column": "proof"}, "train_dataset: expected a column 'proof', got prompt, solution, answer"),
        ({"dataset_name": "no answers"}, "reward_funcs: rewards.py:odd: no column 'answer'; it can have prompts, "),
        ({"dataset_name": "texts"}, "train_dataset, row 0: prompt: expected a conversation"),
        ({"dataset_name": "few"}, "train_dataset: expected at least 4 rows"),
        ({"lora_r": 0}, "lora_r: expected at least 1, got 0"),
        ({"output_dir": "/proc/nope"}, "output_dir: "),
        ({"model_init_kwargs": {"a": 1}}, "model_init_kwargs: "),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: expected at least 1, got 0"),
        ({"reward_funcs": []}, "reward_funcs: missing"),
        ({"reward_funcs": ["absent.py:f"]}, "reward_funcs: absent.py:f: FileNotFoundError"),
        ({"reward_funcs": ["broken.py:f"]}, "reward_funcs: broken.py:f: ModuleNotFoundError: No module named 'nothing"),
        ({"reward_funcs": ["rewards.py:even"]}, "reward_funcs: rewards.py:even: no function 'even' in rewards.py"),
        ({"reward_funcs": ["rewards.py:not_a_function"]}, "reward_funcs: rewards.py:not_a_function: no function"),
        ({"reward_funcs": ["rewards.py:of_one"]}, "reward_funcs: rewards.py:of_one: no column 'prompt'; it can have"),
        ({"reward_funcs": ["no.such.module"]}, "reward_funcs: no.such.module: ModuleNotFoundError: No module named"),
        ({"reward_funcs": ["accuracy"]}, "reward_funcs: accuracy: no function 'accuracy' in trl.rewards; TRL's own"),
        ({"teacher_template": ["s"]}, "teacher_template: expected list[dict] or null, got ['s']"),
        ({"teacher_template": [{"role": "user"}]}, "teacher_template[0]: expected role and content as text, got"),
        ({"teacher_template": [{"role": "user", "content": "?"}]}, "teacher_template: expected '{solution}'"),
        ({"resume_from_checkpoint": "absent"}, "resume_from_checkpoint: no such folder: absent"),
        ({"remove_unused_columns": True}, "remove_unused_columns: expected False: reward functions read"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"model_init_kwargs": {"tp_plan": "auto"}}, "model_init_kwargs: tp_plan: tensor parallelism is not supported"),
        ({"dataset_name": "empty"}, "dataset_name: empty: expected rows, got none"),
        ({"dataset_name": "empty.jsonl"}, "dataset_name: empty.jsonl: expected rows, got none"),
        ({"dataset_name": "empty.json"}, "dataset_name: empty.json: expected rows, got none"),
        ({"dataset_name": "rows.csv"}, f"dataset_name: rows.csv: {FORMATS}"),
        ({"dataset_name": "broken.py"}, f"dataset_name: broken.py: {FORMATS}"),
        ({"dataset_name": "rows.jsonl.gz"}, f"dataset_name: rows.jsonl.gz: {FORMATS}"),
        ({"reward_funcs": ["rewards.py:Judge"]}, "reward_funcs: rewards.py:Judge: expected a function, got the class"),
        ({"reward_funcs": ["exits.py:f"]}, "reward_funcs: exits.py:f: SystemExit: no licence"),
        ({"reward_funcs": ["exits.f"]}, "reward_funcs: exits.f: SystemExit: no licence"),
        ({"reward_funcs": ["reads.py:f"]}, "reward_funcs: reads.py:f: "),
        ({"reward_funcs": ["typing_error.py:f"]}, "reward_funcs: typing_error.py:f: SyntaxError: "),
        (
            {"reward_funcs": ["rewards.py:by_position"]},
            "reward_funcs: rewards.py:by_position: expected arguments by name, got the positional 'completions'",
        ),
        ({"report_to": "nobody"}, "report_to: nobody is not supported, only "),
        pytest.param(
            {"report_to": "wandb"},
            "report_to: WandbCallback requires wandb",
            marks=pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is there"),
        ),
    ],
)
def test_a_bad_key_is_named_in_one_line(config, home, capsys, changes, says):
    if not (home / "texts").exists():
        (home / "no json.jsonl").write_text("{nothing")
        dataset().remove_columns("answer").save_to_disk(str(home / "no answers"))
        datasets.Dataset.from_list([row(1, 2) | {"prompt": "1+2?"}] * 4).save_to_disk(str(home / "texts"))
        dataset(3).save_to_disk(str(home / "few"))
        dataset(3).select([]).save_to_disk(str(home / "empty"))
        (home / "empty.json").write_text("[]")
        for name in ("empty.jsonl", "rows.csv", "rows.jsonl.gz"):
            (home / name).write_text("")
        (home / "exits.py").write_text("import sys\nsys.exit('no licence')")
        (home / "reads.py").write_text("f = input()")
        (home / "typing_error.py").write_text("def f(:")
    assert fails([config(**changes)], capsys).startswith(says)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--gama", "1"], "gama: unknown key; did you mean gamma?"),
        (["--gamma", "high"], "gamma: invalid float value: 'high'"),
        (["--gamma"], "gamma: expected one argument"),
        (["gamma"], "gamma: expected --field value"),
        (["--resume"], "resume: no checkpoint in "),
    ],
)
def test_a_bad_option_is_named_in_one_line(config, capsys, arguments, says):
    assert fails([config(), *arguments], capsys).startswith(says)


def test_a_bad_file_is_named_in_one_line(tmp_path, capsys):
    for text, says in {
        "a: [": "while parsing",
        "- a": "expected keys and values, got list",
        "": "expected keys",
        "gamma: 1\nlookahead: 0\ngamma: 2": "gamma: given twice, in lines 1 and 3",
        "a: {b: 1, 'b': 2}": "b: given twice, in lines 1 and 1",
        "- {b: 1,\n b: 2}": "b: given twice, in lines 1 and 2",
    }.items():
        (tmp_path / "c.yaml").write_text(text)
        assert fails([str(tmp_path / "c.yaml")], capsys).startswith(f"{tmp_path / 'c.yaml'}: {says}")
    assert fails(["qwen3-4b"], capsys).startswith(
        "qwen3-4b: no such file, nor a preset (qwen3-4b-cl-egrsd, qwen3-4b-eg"
    )


def test_a_key_that_a_merge_repeats_is_not_given_twice(tmp_path):
    (tmp_path / "c.yaml").write_text("a: &a {x: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, x: 3}")
    assert read_config(tmp_path / "c.yaml") == {"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 3}}


def test_rewards_of_a_wrong_length_end_a_run_in_one_line(config, capsys):
    assert fails([config(reward_funcs=["rewards.py:too_few"])], capsys) == (
        "reward_funcs: too_few: expected a list of 8 numbers or None, one for each completion, got 1"
    )


def test_without_trl_the_message_says_what_to_install(config, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "egrsd_kernels.trl.run", None)
    assert "pip install '.[trl]' in a checkout" in fails([config()], capsys)
