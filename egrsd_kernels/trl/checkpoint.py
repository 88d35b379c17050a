"""What a run needs beside TRL's own checkpoint to go on bit for bit: one small file for each process."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import send_to_device
from trl.trainer.utils import RepeatSampler

if TYPE_CHECKING:
    from .trainer import EGRSDTrainer


class CheckpointError(ValueError):
    """A checkpoint does not fit the run that is to go on from it."""


def save_state(trainer: "EGRSDTrainer", folder: str) -> None:
    """Write this process's rollouts still in use, counters, reward statistics, pending metrics and moving teacher."""
    every = trainer.args.steps_per_generation * trainer.num_iterations
    torch.save(
        {
            "processes": trainer.args.world_size,
            "step": trainer._step,
            "rollouts": trainer._buffered_inputs if trainer._step % every else None,
            "metrics": {name: list(values) for name, values in trainer._metrics["train"].items()},
            "welford": trainer.welford.state_dict(),
            "teacher": trainer.teacher.state_dict(),
        },
        _path(trainer, folder),
    )


def load_state(trainer: "EGRSDTrainer", folder: str) -> None:
    """Take up what :func:`save_state` wrote.

    Raises:
        CheckpointError: the checkpoint was written by another number of processes, with another kind of teacher, or
            (with a frozen teacher) from another initial model.
    """
    path = _path(trainer, folder)
    if not path.is_file():
        raise CheckpointError(f"resume_from_checkpoint: {path} is missing; was it saved by as many processes?")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["processes"] != trainer.args.world_size:
        raise CheckpointError(
            f"resume_from_checkpoint: expected {state['processes']} processes, as {folder} was saved by, "
            f"got {trainer.args.world_size}"
        )
    trainer.teacher.load_state_dict(state["teacher"])
    trainer.welford.load_state_dict(state["welford"])
    trainer._metrics["train"].update(state["metrics"])
    trainer._buffered_inputs = send_to_device(state["rollouts"], trainer.accelerator.device)
    trainer._step = state["step"]


def _path(trainer: "EGRSDTrainer", folder: str) -> Path:
    return Path(folder) / f"egrsd_state_{trainer.args.process_index}.pt"


class ResumableSampler(RepeatSampler):
    """RepeatSampler whose order depends on seed and epoch alone: TRL's own begins at epoch 0 in a resumed run."""

    epoch: Callable[[], int]

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(self.epoch()):  # the draws of the epochs before
                torch.randperm(self.num_samples, generator=self.generator)
        return super().__iter__()
