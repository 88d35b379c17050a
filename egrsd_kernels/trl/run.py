"""What ``egrsd train`` does: the trainer that a run's settings describe, and its training."""

import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import trl.rewards
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from transformers import AutoConfig
from transformers.integrations import get_reporting_integration_callbacks
from trl import ModelConfig, get_peft_config, get_quantization_config

from egrsd_kernels.checks import integer
from egrsd_kernels.rl import TWO_TURN, Message

from .checkpoint import check_start, last_checkpoint, step_of
from .config import EGRSDConfig
from .errors import Finished
from .settings import RunArguments
from .trainer import EGRSDTrainer

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
# What GRPOTrainer passes to a reward function beside columns of the data set, and the columns that it does not pass.
PASSED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
KEPT = ("prompt", "completion")


def make_trainer(arguments: RunArguments, config: EGRSDConfig, model: ModelConfig) -> EGRSDTrainer:
    """The trainer of a run. The cheap checks come first: a typing error costs no loaded model.

    Raises:
        ValueError, OSError, ImportError: in a message that names the key, column or package.
    """
    try:
        os.makedirs(config.output_dir, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir: {error}") from error
    integer("lora_r", model.lora_r, low=1)
    dataset, names = arguments.dataset_name, arguments.reward_funcs
    assert dataset is not None and names is not None  # parse_settings requires them
    rewards = [load_reward(name) for name in names]
    _check_reporters(config.report_to)
    template = _template(arguments.teacher_template)
    options = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    try:
        AutoConfig.from_pretrained(
            model.model_name_or_path, revision=model.model_revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"model_name_or_path: {model.model_name_or_path}: {error}") from error

    splits = load_splits(dataset, arguments.dataset_config)
    train = _split(splits, "dataset_train_split", arguments.dataset_train_split)
    evaluates = config.eval_strategy != "no"
    evaluation = _split(splits, "dataset_test_split", arguments.dataset_test_split) if evaluates else None
    for name, reward in zip(names, rewards, strict=True):
        _check_arguments(name, reward, train.column_names)

    adapters = get_peft_config(model)
    if adapters is not None:
        adapters.target_modules = _target_modules(adapters.target_modules)
    quantization = get_quantization_config(model)
    if quantization is not None:
        options["quantization_config"] = quantization
    own = config.model_init_kwargs
    config.model_init_kwargs = {**options, **(own or {})}
    try:
        return EGRSDTrainer(
            model.model_name_or_path,
            rewards,
            config,
            train,
            evaluation,
            peft_config=adapters,
            teacher_template=template,
        )
    except TypeError as error:
        if own:  # they go to the model's constructor as they are
            raise ValueError(f"model_init_kwargs: {error}") from error
        raise


def find_checkpoint(config: EGRSDConfig, resume: bool) -> str | None:
    """What a run goes on from: the last checkpoint in its folder with ``resume``, else the one that it names, if any.

    Raises:
        ValueError: there is none, or what :func:`egrsd_kernels.trl.checkpoint.check_start` refuses.
    """
    checkpoint = last_checkpoint(config.output_dir) if resume else config.resume_from_checkpoint or None
    check_start(config, checkpoint)  # the trainer looks at more, but only when the model is loaded
    return checkpoint


def train(trainer: EGRSDTrainer, checkpoint: str | None = None) -> None:
    """Train, from ``checkpoint`` on where one is given, and leave model and trainer_state.json in output_dir."""
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except Finished:
        if step_of(trainer.args.output_dir) == trainer.state.global_step:
            raise
        # The run ended after its last checkpoint, before its model was saved.
    trainer.save_model()
    trainer.save_state()  # last: whoever finds it knows that the run is complete
    trainer.accelerator.end_training()


def load_splits(name: str, config: str | None = None) -> Mapping[str, Dataset]:
    """The splits of a data set: a file, a folder that save_to_disk wrote, or anything that load_dataset knows."""
    path = Path(name)
    builder = BUILDERS.get(path.suffix.lower())
    try:
        if builder:
            if not path.is_file():
                raise FileNotFoundError("no such file")
            return load_dataset(builder, data_files=str(path))
        if path.is_file():
            raise ValueError(f"expected a file that ends in {', '.join(BUILDERS)}, a folder, or a data set of the Hub")
        if (path / "dataset_dict.json").is_file():
            return load_from_disk(name)
        if (path / "state.json").is_file():
            return DatasetDict(train=load_from_disk(name))
        return load_dataset(name, config)
    except (OSError, ValueError, DatasetsError, IndexError, StopIteration) as error:
        cause = error.__cause__ or error
        # Without rows, datasets looks for the first of no tables, or says that its split is no data.
        empty = isinstance(cause, (IndexError, StopIteration)) or "corresponds to no data" in str(cause)
        text = "expected rows, got none" if empty else cause
        raise ValueError(f"dataset_name: {name}: {text}") from error


def _split(splits: Mapping[str, Dataset], key: str, name: str) -> Dataset:
    if name not in splits:
        raise ValueError(f"{key}: expected one of {', '.join(splits)}, got {name!r}")
    return splits[name]


def load_reward(name: str) -> Callable[..., Any]:
    """The reward function that ``path/to/file.py:function``, ``package.module.function`` or a name of TRL's means."""
    file, colon, function = name.rpartition(":")
    if not colon:
        file, _, function = name.rpartition(".")
    try:
        if colon:
            # Under a name of its own: a file called math.py must not become the module math.
            spec = importlib.util.spec_from_file_location(f"egrsd_reward_{Path(file).stem}", file)
            if spec is None or spec.loader is None:
                raise ImportError(f"{file}: not a Python file")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        elif file:
            if os.getcwd() not in sys.path:  # the console script's path lacks it
                sys.path.insert(0, os.getcwd())
            module = importlib.import_module(file)
        else:
            module = trl.rewards
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        raise ValueError(f"reward_funcs: {name}: {type(error).__name__}: {error}") from error
    reward = getattr(module, function, None)
    if not callable(reward):
        known = [one for one in dir(module) if one.endswith("_reward") and not one.startswith("get_")]
        has = f"; TRL's own are {', '.join(known)}" if module is trl.rewards else ""
        raise ValueError(f"reward_funcs: {name}: no function {function!r} in {file or 'trl.rewards'}{has}")
    if inspect.isclass(reward):
        raise ValueError(
            f"reward_funcs: {name}: expected a function, got the class {function!r}; give an instance a name"
        )
    return reward


def _target_modules(given: str | list[str] | None) -> str | list[str] | None:
    """ModelConfig makes a list of one its entry, which PEFT reads as a pattern of whole names, not as a module's."""
    if isinstance(given, str) and given != "all-linear" and re.fullmatch(r"[\w.]+", given):
        return [given]
    return given


def _check_reporters(names: Sequence[str]) -> None:
    """A ValueError for a reporter that is unknown, or whose package is missing."""
    try:
        for callback in get_reporting_integration_callbacks(names):
            callback()
    except (ValueError, ImportError, RuntimeError) as error:
        raise ValueError(f"report_to: {error}") from error


def _check_arguments(name: str, reward: Callable[..., Any], columns: Sequence[str]) -> None:
    """A ValueError for an argument of a reward function that nothing will fill."""
    passed = [*PASSED, *(column for column in columns if column not in KEPT)]
    try:
        parameters = inspect.signature(reward).parameters.values()
    except ValueError as error:  # some of what is written in C
        raise ValueError(f"reward_funcs: {name}: {error}") from error
    for parameter in parameters:
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise ValueError(f"reward_funcs: {name}: expected arguments by name, got the positional {parameter.name!r}")
        variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not variable and parameter.name not in passed:
            raise ValueError(f"reward_funcs: {name}: no column {parameter.name!r}; it can have {', '.join(passed)}")


def _template(messages: Sequence[Mapping[str, Any]] | None) -> Sequence[Message]:
    if messages is None:
        return TWO_TURN
    for index, message in enumerate(messages):
        if set(message) != {"role", "content"} or not all(isinstance(value, str) for value in message.values()):
            raise ValueError(f"teacher_template[{index}]: expected role and content as text, got {message!r}")
    if not any("{solution}" in message["content"] for message in messages):
        raise ValueError("teacher_template: expected '{solution}' in one of its messages")
    return messages
