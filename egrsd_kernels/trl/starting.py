"""What a trainer is refused for, and what is proved of its model and teacher, before anything is generated.

All functions are of an :class:`.trainer.EGRSDTrainer` whose GRPOTrainer has been constructed.
"""

import logging
from typing import Any

from torch import nn

from egrsd_kernels import head_of
from egrsd_kernels.models import ModelError
from egrsd_kernels.models.places import tensors_of
from egrsd_kernels.packing import varlen

from .calling import Called, in_training
from .packed_step import PackedStep
from .packing import check_rows_in_packs, check_training_in_packs, fault_of
from .roles import Roles
from .teacher import (
    AdaptersOff,
    EarlierWeights,
    MoveTeacher,
    NoTeacher,
    Teacher,
    make_teacher,
    prove_teacher,
    separate_teacher,
    window_of,
)

logger = logging.getLogger(__name__)


def check_constructed(trainer: Any) -> None:
    """A ValueError for what GRPOTrainer takes and token credit cannot honour."""
    args = trainer.args
    if trainer.get_tp_size() > 1:
        raise ValueError("deepspeed: expected autotp_size 1, tensor parallelism is not supported")
    if trainer.processing_class.chat_template is None:
        kind = "processor" if trainer._is_vlm else "tokenizer"
        raise ValueError(f"processing_class: expected a {kind} with a chat template, which this model's has not")
    if trainer._sharded and args.sync_ref_model:
        raise ValueError("sync_ref_model: not supported with sharded weights, a checkpoint would lack the reference")
    if args.divergence is not None:
        if trainer._token_advantage is not None:
            raise ValueError("divergence: expected None, as the trainer is given a token_advantage of its own")
        if trainer._sharded:
            raise ValueError("divergence: expected None, not supported with sharded weights")


def teacher_of(trainer: Any, teacher_model: Any) -> Teacher:
    """The teacher that a trainer's settings name, or ``teacher_model``."""
    args = trainer.args
    if not trainer._contexts:
        return NoTeacher()
    if teacher_model is not None:
        return separate_teacher(
            teacher_model,
            trainer.model,
            trainer.processing_class,
            trainer.accelerator.device,
            images=trainer._is_vlm,
            distributed=trainer.accelerator.num_processes > 1,
            sharded=trainer._sharded,
            revision=args.teacher_model_revision,
            init_kwargs=args.teacher_model_init_kwargs,
            trust_remote_code=args.trust_remote_code,
        )
    # EGRSDConfig has put in the defaults.
    teacher = make_teacher(trainer.model, args.teacher_model_kind, trainer._sharded, args.teacher_update_rate)
    if isinstance(teacher, EarlierWeights) and teacher.moves:
        trainer.add_callback(MoveTeacher(teacher))
    return teacher


def may_be_another(teacher: Teacher) -> bool:
    """Whether the teacher may be another model than the student's, and has to be proved by itself."""
    return not isinstance(teacher, (AdaptersOff, EarlierWeights, NoTeacher))


def other_window(trainer: Any) -> float | None:
    """The teacher's window, where that is not the student's."""
    if not may_be_another(trainer.teacher):
        return None
    with trainer.teacher.active() as teacher:
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher_model: expected active() to give a model, got {teacher!r}")
        return None if teacher is trainer.model else window_of(teacher)


def packed_step_of(trainer: Any) -> PackedStep | None:
    """What reads rollouts in packs; None: they are read padded."""
    args, accelerator = trainer.args, trainer.accelerator
    wanted = args.packing or args.compile_layers
    if args.packing is False or (accelerator.device.type not in varlen.DEVICES and not wanted):
        return None
    fault = fault_of(trainer)
    if fault is None:
        try:
            check_rows_in_packs(accelerator, trainer.model, trainer.ref_model, by_default=not wanted)
            if trainer._contexts:
                with trainer.teacher.active() as teacher:
                    check_rows_in_packs(accelerator, teacher, by_default=not wanted)
            check_training_in_packs(accelerator, trainer.model, args.compile_layers, twice=not trainer._direct)
            return PackedStep(accelerator, args.max_tokens_per_pack, args.compile_layers)
        except ModelError as refusal:
            fault = str(refusal)
    if wanted:
        raise ModelError(fault)
    logger.warning("Rollouts are read padded, not packed: %s", fault)
    return None


def prove(trainer: Any) -> int:
    """Run the model on a few tokens: what we compute is what it computes, and each has its role. V comes back."""
    called = Called(trainer.model, trainer.aux_loss_enabled, trainer._is_vlm)
    with trainer.accelerator.autocast(), in_training(trainer.model):
        head = head_of(called)
    if head.low_rank is not None and isinstance(trainer.teacher, AdaptersOff):  # whose head is another
        with trainer.accelerator.autocast(), trainer._as_teacher():
            head_of(called)
    vocabulary = int(getattr(head.weight, "ds_shape", head.weight.shape)[0])  # ZeRO-3 has taken the rows away
    if may_be_another(trainer.teacher):
        with trainer.accelerator.autocast(), trainer._as_teacher() as teacher:
            prove_teacher(teacher, vocabulary, trainer._is_vlm)
    check_roles(trainer, vocabulary)
    return vocabulary


def check_roles(trainer: Any, vocabulary: int) -> None:
    """A ValueError where the student trains nothing, or the teacher depends on what is trained or on padding."""
    roles = Roles(
        model=trainer.model,
        embeddings=lambda model: trainer.accelerator.unwrap_model(model).get_input_embeddings(),
        as_teacher=trainer._as_teacher,
        read=lambda *row: trainer._read(lambda hidden, head: (hidden, *tensors_of(head)), *row)[0],
        vocabulary=min(vocabulary, len(trainer._tokenizer)),
        pad_token_id=trainer._pad_token_id,
        device=trainer.accelerator.device,
    )
    if not trainer._sharded:  # a forward with gradients and no backward would disturb FSDP
        roles.check_student()
        if isinstance(trainer.teacher, AdaptersOff):
            roles.check_adapters_off()
    if _may_pad(trainer):
        another = may_be_another(trainer.teacher)
        if another or not trainer._contexts:  # else the teacher is of the student's architecture
            roles.check_padding("model", trainer._as_student)
        if trainer._contexts:
            roles.check_padding("teacher_model" if another else "model", trainer._as_teacher)


def _may_pad(trainer: Any) -> bool:
    """Whether a process ever generates for prompts of different lengths at once."""
    args = trainer.args
    train = args.per_device_train_batch_size * args.steps_per_generation
    several = trainer.num_generations % train or trainer.num_generations_eval % args.per_device_eval_batch_size
    return bool(several) or trainer.pad_to_multiple_of is not None
