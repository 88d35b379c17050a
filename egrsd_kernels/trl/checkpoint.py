"""Which run may go on, and what it needs beside TRL's own checkpoint to go on bit for bit.

Each process writes one small file into a checkpoint. The file holds the run's settings too: a run of other settings is
refused unless resume_changed is set. A new run is refused in a folder that holds another run.
"""

import hashlib
import json
import logging
import pickle
import re
import shutil
import textwrap
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model, wait_for_everyone
from datasets import Dataset
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerState
from trl.trainer.utils import RepeatSampler

from egrsd_kernels.credit import Lookahead
from egrsd_kernels.rl import Message

from .config import EGRSDConfig
from .errors import CheckpointError, Finished
from .former import in_present_words

logger = logging.getLogger(__name__)
STATE = ("step", "rollouts", "metrics", "welford", "teacher")  # what a trainer goes on with
# What torch, safetensors and transformers raise for files that are cut short, overwritten or another model's.
UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, SafetensorError,
              pickle.UnpicklingError)  # fmt: skip
SAMPLED_ROWS = 64
# What a run was before these settings existed.
BEFORE = {
    **{f"lookahead_{name}": value for name, value in Lookahead._field_defaults.items()},
    "divergence": None, "divergence_beta": 0.5, "divergence_top_k": None, "divergence_weight": 1.0,
    "policy_weight": 1.0, "position_weight": 0.0, "prefix_weight": 0.0, "teacher_sync_steps": 1,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- which run goes on


def begin(config: EGRSDConfig, checkpoint: str | None, settings: Mapping[str, Any]) -> None:
    """Let a run begin, or go on from ``checkpoint``; its folder is free of what is another run's afterwards.

    Arguments as in :func:`check_start`.

    Raises:
        CheckpointError: on every process, what :func:`check_start` finds on any.
    """
    fault = ""
    try:
        check_start(config, checkpoint, settings)
    except CheckpointError as error:
        fault = str(error)
    faults = [fault for fault in gather_object([fault]) if fault]
    if faults:
        raise CheckpointError(faults[0])
    if config.should_save:
        _make_room(config, checkpoint)
    wait_for_everyone()


def check_start(config: EGRSDConfig, checkpoint: str | None, settings: Mapping[str, Any] | None = None) -> None:
    """Refuse a checkpoint that is not whole or is another run's, and a folder that holds another run.

    Args:
        config: of the run that is to begin.
        checkpoint: what it is to go on from; None for a new run.
        settings: what the run is; default: as much of it as ``config`` says.

    Raises:
        CheckpointError: in one line that says what can be done.
    """
    if checkpoint is not None:
        if not Path(checkpoint).is_dir():
            raise CheckpointError(f"resume_from_checkpoint: no such folder: {checkpoint}")
        if step_of(checkpoint) is None:
            file = Path(checkpoint, "trainer_state.json")
            raise CheckpointError(f"resume_from_checkpoint: {file} is missing or damaged: the checkpoint is not whole")
        saved = _settings(read_state(config, checkpoint, mmap=True))
        mine = config.of_the_run() if settings is None else settings
        # Not every version of TRL has every setting.
        changed = [name for name in mine if name in saved and saved[name] != mine[name]]
        if changed and not config.resume_changed:
            values = "; ".join(f"{name}: {_short(saved[name])} there, {_short(mine[name])} here" for name in changed)
            raise CheckpointError(
                f"resume_from_checkpoint: {checkpoint} is of a run with other settings ({values}); "
                "resume_changed=True goes on from it all the same"
            )
    found = [] if _own(config, checkpoint) else _traces(config)
    if found and not config.overwrite_output_dir:
        names = ", ".join(path.name for path in found[:4]) + ", ..." * (len(found) > 4)
        raise CheckpointError(
            f"output_dir: {config.output_dir} holds another run ({names}): resume that, take another folder, "
            "or set overwrite_output_dir=True, which removes them"
        )


def _settings(state: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's settings, in words of today; the first versions saved none."""
    saved = state.get("settings")
    return BEFORE | in_present_words(saved) if saved else {}


def last_checkpoint(output_dir: str) -> str:
    """The latest whole checkpoint in a run's folder, or a ValueError where there is none."""
    steps = {str(folder): step_of(folder) for folder in Path(output_dir).glob("checkpoint-*")}
    whole = {folder: step for folder, step in steps.items() if step is not None}
    if not whole:
        raise CheckpointError(f"resume: no checkpoint in {output_dir}")
    return max(whole, key=whole.__getitem__)


def step_of(folder: str | Path) -> int | None:
    """The step of the trainer_state.json in a folder: what Trainer writes last. None if a kill cut that short."""
    try:
        step = TrainerState.load_from_json(str(Path(folder, "trainer_state.json"))).global_step
    except (OSError, ValueError, TypeError):
        return None
    return step if type(step) is int else None


def identity(
    model: Any,
    reward_names: Sequence[str],
    train_dataset: Any,
    columns: Sequence[str],
    contexts: Sequence[Message] | Mapping[str, Callable[..., Any]],
    token_advantage: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """What a run is beside its config, as JSON has it.

    Args:
        model: of transformers or PEFT; nothing wraps it yet.
        columns: of the dataset, what student and teacher read.
        contexts: the template of the teacher's conversation, or functions by name.
        token_advantage: the user's, if any.
    """
    adapters = next(iter(model.peft_config.values())) if is_peft_model(model) else None
    base = model.get_base_model() if adapters else model
    named = {
        # A name without its folder: a run goes on where its files have been moved to.
        "model_name_or_path": Path(base.config._name_or_path or "").name,
        "reward_funcs": reward_names,
        "train_dataset": _digest(train_dataset, columns),
        "teacher_template": None if isinstance(contexts, Mapping) else [dict(message) for message in contexts],
        "contexts": {name: _name(one) for name, one in contexts.items()} if isinstance(contexts, Mapping) else None,
        "token_advantage": token_advantage and _name(token_advantage),
        "peft_type": adapters and adapters.peft_type,
    }
    if adapters:
        modules = getattr(adapters, "target_modules", None)
        named["lora_target_modules"] = sorted(modules) if isinstance(modules, set) else modules
        for name in ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"):
            named["lora_r" if name == "r" else name] = getattr(adapters, name, None)
    return json.loads(json.dumps(named, default=str))


class EndAtMaxSteps(TrainerCallback):
    """Ends a run that is resumed at its end: Trainer looks at max_steps after a step, and would do one more."""

    def on_train_begin(self, args, state, control, **_):
        if state.max_steps and state.global_step >= state.max_steps:
            raise Finished(
                f"resume_from_checkpoint: already finished at step {state.global_step}; raise max_steps or "
                "num_train_epochs to go on"
            )


def _own(config: EGRSDConfig, checkpoint: str | None) -> bool:
    return checkpoint is not None and Path(checkpoint).resolve().parent == Path(config.output_dir).resolve()


def _traces(config: EGRSDConfig) -> list[Path]:
    """What a run has left in its folder, beside the model."""
    folder = Path(config.output_dir)
    found = [path for path in (folder / "rollouts", folder / "trainer_state.json") if path.exists()]
    return [*sorted(folder.glob("checkpoint-*"), key=_number), *found]


def _make_room(config: EGRSDConfig, checkpoint: str | None) -> None:
    """Remove what another run, or this one under other settings, has left. :func:`check_start` saw that it may go."""
    if checkpoint is None or not _own(config, checkpoint):
        old = _traces(config)
    elif config.resume_changed:  # what comes after the checkpoint was done under other settings
        folder, step = Path(config.output_dir), step_of(checkpoint)
        assert step is not None  # check_start saw one
        every = [*folder.glob("checkpoint-*"), *folder.glob("rollouts/rollouts-step*.jsonl")]
        old = [path for path in every if _number(path) > step]
    else:
        old = []
    for path in old:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if old:
        logger.warning("output_dir: removed from %s: %s", config.output_dir, ", ".join(path.name for path in old))


def _number(path: Path) -> int:
    digits = re.search(r"\d+$", path.stem)
    return int(digits[0]) if digits else -1


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)


def _digest(dataset: Any, columns: Sequence[str]) -> str | None:
    """How many rows, and a digest of some: the names of all columns, and what is in ``columns``. None for a stream."""
    if not isinstance(dataset, Dataset):
        return None
    digest = hashlib.sha256(repr(sorted(dataset.column_names)).encode())
    for index in range(0, len(dataset), -(-len(dataset) // SAMPLED_ROWS)):
        example = dataset[index]
        texts = [example[column] for column in columns]
        digest.update(json.dumps(texts, sort_keys=True, default=lambda _: None).encode())
    return f"{len(dataset)} rows, {digest.hexdigest()[:8]}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:76] + " ..."


# --------------------------------------------------------------------------------------------- what it goes on with


@contextmanager
def reading(what: str | Path) -> Iterator[None]:
    """A CheckpointError in the place of what damaged files make their readers raise."""
    try:
        yield
    except (CheckpointError, torch.cuda.OutOfMemoryError):
        raise
    except UNREADABLE as error:
        text = textwrap.shorten(f"{type(error).__name__}: {error}", 240, placeholder=" ...")
        raise CheckpointError(f"resume_from_checkpoint: {what} cannot be read: {text}") from error


def write_state(config: EGRSDConfig, folder: str, settings: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write what this process goes on with, for :func:`read_state`; ``state`` has the keys ``STATE``."""
    torch.save({"settings": settings, "processes": config.world_size, **state}, _path(config, folder))


def _path(config: EGRSDConfig, folder: str) -> Path:
    return Path(folder) / f"egrsd_state_{config.process_index}.pt"


def read_state(config: EGRSDConfig, folder: str, mmap: bool = False) -> dict[str, Any]:
    """What :func:`write_state` wrote for this process; with ``mmap``, tensors stay on the disk.

    Raises:
        CheckpointError: the checkpoint is damaged, or was written by another number of processes.
    """
    path = _path(config, folder)
    if not path.is_file():
        others = len(list(Path(folder).glob("egrsd_state_*.pt")))
        why = (
            f"there are those of {others} other processes; as many have to go on as saved it, got {config.world_size}"
            if others
            else "the checkpoint was saved with save_only_model=True or by another trainer; no run can go on from it, "
            "but a new one can begin with its model (model_name_or_path)"
        )
        raise CheckpointError(f"resume_from_checkpoint: {path} is missing: {why}")
    with reading(path):
        mmap = mmap and zipfile.is_zipfile(path)  # of anything else, torch would say that it cannot be mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if missing := [key for key in ("processes", *STATE) if key not in state]:
            raise CheckpointError(f"resume_from_checkpoint: {path} is damaged: it lacks {', '.join(missing)}")
    if state["processes"] != config.world_size:
        raise CheckpointError(
            f"resume_from_checkpoint: expected {state['processes']} processes, as {folder} was saved by, "
            f"got {config.world_size}"
        )
    return state


class ResumableSampler(RepeatSampler):
    """RepeatSampler whose order depends on seed and epoch alone: TRL's own begins at epoch 0 in a resumed run."""

    epoch: Callable[[], int]

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(self.epoch()):  # the draws of the epochs before
                torch.randperm(self.num_samples, generator=self.generator)
        return super().__iter__()
