"""GRPOTrainer whose run goes on bit for bit: :class:`ResumableTrainer`, on which EGRSDTrainer stands.

    train                              which run goes on, in which folder
    _save_rng_state, _load_rng_state   everything beside TRL's checkpoint that goes on
    _get_train_sampler                 the same order of prompts after a resume

What is written and how it is read is :mod:`.checkpoint`'s.
"""

from collections.abc import Sized
from typing import Any

from accelerate.utils import is_peft_model, send_to_device
from trl import GRPOTrainer

from .checkpoint import ResumableSampler, begin, last_checkpoint, read_state, reading, write_state


class ResumableTrainer(GRPOTrainer):
    """Its teacher, its running statistics and its rollouts in use go on as they were."""

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """Trainer's; resume_from_checkpoint=True: from the last whole checkpoint in output_dir.

        Raises:
            CheckpointError: the checkpoint is damaged or of another run, or output_dir holds another run; in one line.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
        if not isinstance(self.train_dataset, Sized) and next(iter(self.train_dataset), None) is None:
            raise ValueError("train_dataset: expected at least 1 row, got an empty stream")
        begin(self.args, resume_from_checkpoint or None, self._settings)
        self._step_log.begin()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    @property
    def _settings(self) -> dict[str, Any]:
        """What this run is, as JSON has it."""
        return self.args.of_the_run() | self._identity | {"packing": self._packed is not None}

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        sampler.__class__ = ResumableSampler
        sampler.epoch = lambda: int(self.state.epoch or 0)
        return sampler

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)  # called on every process, and before trainer_state.json is written
        every = self.args.steps_per_generation * self.num_iterations
        state = {
            "step": self._step,
            "rollouts": self._buffered_inputs if self._step % every else None,  # those still in use
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},  # not yet logged
            "welford": self.welford.state_dict(),
            "teacher": self.teacher.state_dict(),
        }
        if self.args.sync_ref_model:  # it moves, and TRL does not save it
            state["reference"] = self.ref_model.state_dict()
        write_state(self.args, output_dir, self._settings, state)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with reading(f"the model in {resume_from_checkpoint}"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            if is_peft_model(self.model) and {"default", "ref"} <= self.model.peft_config.keys() and not self._sharded:
                # transformers 4 reads those adapters alone that have a folder of their own, and "default" has none.
                self.model.load_adapter(resume_from_checkpoint, "default", is_trainable=True)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with reading(f"the optimizer's state in {checkpoint}"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with reading(f"the random or the run's own state in {checkpoint}"):
            super()._load_rng_state(checkpoint)
            if checkpoint is None:
                return
            state = read_state(self.args, checkpoint)
            self.teacher.load_state_dict(state["teacher"])
            self.welford.load_state_dict(state["welford"])
            if self.args.sync_ref_model and "reference" in state:  # else the run has changed, and it begins here
                self.ref_model.load_state_dict(state["reference"])
            self._metrics["train"].update(state["metrics"])
            self._buffered_inputs = send_to_device(state["rollouts"], self.accelerator.device)
            self._step = state["step"]
