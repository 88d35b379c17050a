"""Who the teacher is: the model without its adapters, or the trained weights of an earlier moment."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback
from trl.trainer.utils import pad

from .errors import CheckpointError


class AdaptersOff:
    """The base model under the adapters of a PEFT model: no second copy of anything."""

    moves = False

    def __init__(self, model: Any):
        self.model = model

    @contextmanager
    def active(self) -> Iterator[None]:
        """While this is entered, the model computes as the teacher."""
        flags = {name: (parameter, parameter.requires_grad) for name, parameter in self.model.named_parameters()}
        try:
            with self.model.disable_adapter():
                yield
        finally:
            # On leaving, PEFT turns requires_grad on for whatever is active, frozen or not.
            for name, parameter in self.model.named_parameters():
                entered, flag = flags[name]
                for tensor in (entered, parameter):  # FSDP2 exchanges them in between
                    tensor.requires_grad_(flag)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise CheckpointError("teacher_model_kind: the checkpoint was written with another kind of teacher")


class EarlierWeights:
    """The trained weights of an earlier moment, exchanged in place while the teacher reads.

    One copy of what is trained (all weights, or the adapters) and no second module. The exchange restores the
    student's bits.
    """

    def __init__(self, model: nn.Module, moves: bool):
        self.moves = moves
        self.own = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.kept = [parameter.detach().clone() for parameter in self.own]

    @contextmanager
    def active(self) -> Iterator[None]:
        """While this is entered, the model computes as the teacher."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for own, kept in zip(self.own, self.kept, strict=True):
            student = own.detach().clone()
            own.copy_(kept)
            kept.copy_(student)

    @torch.no_grad()
    def move(self, rate: float) -> None:
        """kept = (1 − rate) · kept + rate · own; rate 1 is a copy."""
        for own, kept in zip(self.own, self.kept, strict=True):
            kept.lerp_(own, rate)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the weights where they move, else a digest to recognise them by."""
        return {"kept": self.kept} if self.moves else {"digest": self._digest()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.keys() != self.state_dict().keys():
            raise CheckpointError("teacher_model_kind: the checkpoint was written with another kind of teacher")
        if self.moves:
            for kept, saved in zip(self.kept, state["kept"], strict=True):
                kept.copy_(saved)
        elif state["digest"] != self._digest():
            raise CheckpointError("model: not the one that this run began with, so the frozen teacher would differ")

    def _digest(self) -> str:
        # Sums of the bits as whole numbers: the same in any order, so on any number of threads and on any device.
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        sums = [weight.view(bits[weight.dtype.itemsize]).sum(dtype=torch.int64) for weight in self.kept]
        return hashlib.sha256(torch.stack(sums).cpu().numpy().tobytes()).hexdigest()


class MoveTeacher(TrainerCallback):
    """Moves an EMA teacher every teacher_sync_steps, by teacher_update_rate."""

    def __init__(self, teacher: EarlierWeights):
        self.teacher = teacher

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.teacher_sync_steps == 0:
            self.teacher.move(args.teacher_update_rate)


def make_teacher(model: nn.Module, kind: str, sharded: bool, update_rate: float = 1.0) -> AdaptersOff | EarlierWeights:
    """The teacher that ``teacher_model_kind`` names; sharded: the weights are spread over processes."""
    adapters = is_peft_model(model)
    if kind == "base":
        kind = "adapters_off" if adapters else "frozen"
    if kind == "adapters_off":
        if not adapters:
            raise ValueError("teacher_model_kind: 'adapters_off' expects a model with PEFT adapters")
        if sharded:
            # Names tell, as they tell PEFT what it trains. Of other models roles.py asks what a forward uses.
            owned = (getattr(model.base_model, "prefix", "prompt_encoder"), "modules_to_save.", "trainable_tokens_")
            trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
            refuse_trained_teacher([name for name in trained if not any(part in name for part in owned)])
        return AdaptersOff(model)
    if sharded:
        # Sharding replaces the parameters after this point. And FSDP2 keeps the root's gathered after a forward
        # without a backward, so that the student would read the teacher's.
        raise ValueError(f"teacher_model_kind: {kind!r} is not supported with sharded weights; train adapters")
    teacher = EarlierWeights(model, moves=kind != "frozen")
    halves = {str(weight.dtype) for weight in teacher.own if weight.dtype.itemsize < 4}
    if kind == "ema" and update_rate < 1 and halves:
        # Its small moves would round to nothing.
        got = ", ".join(sorted(halves))
        raise ValueError(f"teacher_model_kind: 'ema' expects trained weights in float32, got {got}")
    return teacher


def refuse_trained_teacher(names: Sequence[str]) -> None:
    """A ValueError where these weights, which are trained, are the teacher's too. names: the model's, of parameters."""
    if names:
        raise ValueError(
            "teacher_model_kind: 'adapters_off' expects that without its adapters the model is as it was before "
            f"training, but {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''} would be trained and stay; "
            "use bias=\"none\", freeze it, or take 'frozen'"
        )


def pad_prompts(prompts: list[list[int]], pad_token_id: int, multiple: int | None) -> tuple[Tensor, Tensor]:
    """input_ids and attention mask (B, L) of prompts padded on the left, L a multiple of ``multiple``."""
    rows = [torch.tensor(row) for row in prompts]
    options = {"padding_side": "left", "pad_to_multiple_of": multiple}
    ids = pad(rows, padding_value=pad_token_id, **options)
    return ids, pad([torch.ones_like(row) for row in rows], padding_value=0, **options)
