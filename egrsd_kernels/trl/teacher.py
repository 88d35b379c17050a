"""Who the teacher is: the model without its adapters, its trained weights of an earlier moment, or another model."""

import hashlib
import inspect
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate.utils import gather_object, is_peft_model, patch_environment, send_to_device
from torch import Tensor, nn
from transformers import AutoTokenizer, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer.utils import create_model_from_path, pad

from egrsd_kernels import head_of
from egrsd_kernels.models import ModelError
from egrsd_kernels.models.adapters import adapters_off

from .calling import Called
from .context import context_window
from .errors import CheckpointError

logger = logging.getLogger(__name__)


@runtime_checkable
class Teacher(Protocol):
    """Who teaches: a model to read as it is while :meth:`active` is entered, and how a resumed run knows it again.

    Of one's own it is passed as ``EGRSDTrainer(teacher_model=...)``.
    """

    def active(self) -> AbstractContextManager[nn.Module]:
        """While this is entered, the model that it gives computes as the teacher; the student's, or another."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as tensors, numbers and texts: weights where they move, else what tells them."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`; a CheckpointError where that is another teacher's."""
        ...


class NoTeacher:
    """Of a token advantage without one."""

    def active(self) -> AbstractContextManager[nn.Module]:
        raise ValueError("teacher: there is none without a context")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _expect_kind(state, ())


class AdaptersOff:
    """The base model under the adapters of a PEFT model: no second copy of anything."""

    def __init__(self, model: Any):
        self.model = model

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        with adapters_off(self.model):
            yield self.model

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _expect_kind(state, ())


class EarlierWeights:
    """The trained weights of an earlier moment, exchanged in place while the teacher reads.

    One copy of what is trained (all weights, or the adapters) and no second module. The exchange restores the
    student's bits. moves: :meth:`move` is going to be called, so a checkpoint holds the copy.
    """

    def __init__(self, model: nn.Module, moves: bool):
        self.model = model
        self.moves = moves
        self.own = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.kept = [parameter.detach().clone() for parameter in self.own]

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        self._exchange()
        try:
            yield self.model
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
        return {"kept": self.kept} if self.moves else {"digest": digest_of(self.kept)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _expect_kind(state, ("kept",) if self.moves else ("digest",))
        if self.moves:
            for kept, saved in zip(self.kept, state["kept"], strict=True):
                kept.copy_(saved)
        elif state["digest"] != digest_of(self.kept):
            raise CheckpointError("model: not the one that this run began with, so the frozen teacher would differ")


class SeparateModel:
    """A model of its own, which stays as it is: of another size, head, dtype or place, with the student's vocabulary.

    It is whole on each process, is never trained, and no checkpoint holds it.
    """

    def __init__(self, model: nn.Module):
        self.model = model.requires_grad_(False).eval()

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        yield self.model

    @cached_property
    def digest(self) -> str:
        """What its weights are recognised by."""
        return digest_of(self.model.parameters())

    def state_dict(self) -> dict[str, Any]:
        return {"teacher_model": self.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _expect_kind(state, ("teacher_model",))
        if state["teacher_model"] != self.digest:
            raise CheckpointError("teacher_model: not the one that this run began with")


def prove_teacher(model: nn.Module, vocabulary: int, images: bool = False) -> None:
    """A ModelError where a model's log p cannot be read, a ValueError where it has not ``vocabulary`` logits.

    images: it is called with some.
    """
    try:
        head = head_of(Called(model, False, images))
    except ModelError as error:
        raise ModelError(f"teacher_{error}") from error
    if len(head.weight) != vocabulary:
        raise ValueError(
            f"teacher_model: expected {vocabulary} logits, as the student has, got {len(head.weight)}; where the "
            f"difference is padding, load it yourself and call resize_token_embeddings({vocabulary})"
        )


def window_of(model: nn.Module) -> float:
    """The tokens that a teacher reads at most."""
    config = getattr(model, "config", None)
    return math.inf if config is None else context_window(config) or math.inf


def _expect_kind(state: Mapping[str, Any], keys: Sequence[str]) -> None:
    if state.keys() != set(keys):
        raise CheckpointError("teacher_model_kind: the checkpoint was written with another kind of teacher")


def digest_of(weights: Iterable[Tensor]) -> str:
    """What weights are recognised by; those that accelerate keeps on the disk are left out."""
    # Sums of the bits as whole numbers: the same in any order, so on any number of threads and on any device.
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    at_hand = (weight.detach() for weight in weights if not weight.is_meta)
    sums = [weight.view(bits[weight.dtype.itemsize]).sum(dtype=torch.int64).cpu() for weight in at_hand]
    return hashlib.sha256(torch.stack(sums).numpy().tobytes()).hexdigest()


class MoveTeacher(TrainerCallback):
    """Moves an EMA teacher every teacher_sync_steps, by teacher_update_rate."""

    def __init__(self, teacher: EarlierWeights):
        self.teacher = teacher

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.teacher_sync_steps == 0:
            self.teacher.move(args.teacher_update_rate)


def make_teacher(model: nn.Module, kind: str, sharded: bool, update_rate: float = 1.0) -> AdaptersOff | EarlierWeights:
    """The teacher that ``teacher_model_kind`` makes of the student; sharded: its weights are spread over processes."""
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
        raise ValueError(
            f"teacher_model_kind: {kind!r} is not supported with sharded weights; "
            "train adapters, or pass a teacher_model"
        )
    teacher = EarlierWeights(model, moves=kind != "frozen")
    halves = {str(weight.dtype) for weight in teacher.own if weight.dtype.itemsize < 4}
    if kind == "ema" and update_rate < 1 and halves:
        # Its small moves would round to nothing.
        got = ", ".join(sorted(halves))
        raise ValueError(f"teacher_model_kind: 'ema' expects trained weights in float32, got {got}")
    return teacher


def separate_teacher(
    teacher_model: Any,
    student: nn.Module,
    tokenizer: Any,
    device: torch.device,
    *,
    images: bool = False,
    distributed: bool = False,
    sharded: bool = False,
    revision: str | None = None,
    init_kwargs: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> Teacher:
    """The teacher that ``teacher_model`` is: a model, the name or path of one, or a :class:`Teacher`.

    Args:
        student: the model that is trained. tokenizer: what makes its token ids.
        device: where the teacher goes, unless a device_map has placed it.
        images: the student reads some.
        distributed: there are several processes, and each gets a teacher of its own.
        sharded: the student's weights are spread over them.
        revision, init_kwargs, trust_remote_code: how a name is loaded; its dtype is the stored one by default.

    Raises:
        TypeError, ValueError: in one line, for what cannot teach this student.
    """
    placed = False
    if isinstance(teacher_model, (str, os.PathLike)):
        if is_deepspeed_zero3_enabled():  # from_pretrained would take its weights apart
            raise ValueError(
                "teacher_model: under ZeRO-3, expected a model loaded before the config is made, got a name"
            )
        name = os.fspath(teacher_model)
        options: dict[str, Any] = {"dtype": "auto", "trust_remote_code": trust_remote_code}
        options |= {"revision": revision} if revision is not None else {}
        options |= {"device_map": None} if distributed else {}
        options |= init_kwargs or {}
        placed = options.get("device_map") is not None
        # Under FSDP transformers would load the weights on one process only.
        with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
            teacher_model = create_model_from_path(name, **options)
    elif isinstance(teacher_model, (nn.Module, Teacher)):
        for setting, given in {"teacher_model_init_kwargs": init_kwargs, "teacher_model_revision": revision}.items():
            if given is not None:
                raise ValueError(f"{setting}: expected None, as teacher_model is already a model, got {given!r}")
    else:
        expected = "a model, the name or path of one, or a Teacher"
        raise TypeError(f"teacher_model: expected {expected}, got {teacher_model!r}")
    if not isinstance(teacher_model, nn.Module):
        if sharded:  # what it makes of the student's weights would be made of parts of them
            raise ValueError(
                "teacher_model: a Teacher of one's own is not supported with sharded weights; pass a model"
            )
        trained = {id(weight) for weight in student.parameters() if weight.requires_grad}
        if isinstance(teacher_model, EarlierWeights) and {id(weight) for weight in teacher_model.own} != trained:
            raise ValueError(
                "teacher_model: expected earlier weights of all that is trained, got others; make it of the model that "
                "the trainer gets, with its adapters, and pass no peft_config"
            )
        return teacher_model
    weights = list(teacher_model.parameters())
    if any(hasattr(weight, "ds_id") for weight in weights):
        raise ValueError(
            "teacher_model: expected a whole model, got one that ZeRO-3 has taken apart: load it before "
            "the config is made"
        )
    if {id(weight) for weight in weights} & {id(weight) for weight in student.parameters()}:
        raise ValueError(
            "teacher_model: expected a model of its own, got one that shares weights with the student; "
            "of the student itself teacher_model_kind makes a teacher"
        )
    if images and "pixel_values" not in inspect.signature(teacher_model.forward).parameters:
        raise ValueError(
            "teacher_model: expected a model that reads images, as the student does, got one that does not"
        )
    _check_tokenizer(teacher_model, tokenizer, revision, trust_remote_code)
    if getattr(teacher_model, "hf_device_map", None) is None:
        if not placed:
            teacher_model.to(device)
        teacher_model.register_forward_pre_hook(_to_its_device, with_kwargs=True)
    teacher = SeparateModel(teacher_model)
    if distributed and len(set(gather_object([teacher.digest]))) > 1:
        raise ValueError(
            "teacher_model: expected the same weights on each process, got others; load it before the config is made, "
            "which may tell transformers to load on one process only"
        )
    return teacher


def _to_its_device(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """What a model is called with, beside its weights; over several devices accelerate spreads it."""
    return send_to_device((args, kwargs), next(model.parameters()).device)


def _check_tokenizer(model: Any, tokenizer: Any, revision: str | None, trust_remote_code: bool) -> None:
    """A ValueError where the tokenizer that lies beside the teacher means other tokens by the same ids."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    try:
        if not name:
            raise OSError("the model has no name")
        other = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        logger.warning(
            f"teacher_model: that its tokenizer is the student's is not checked, as none was found: {reason}"
        )
        return
    ours, theirs = getattr(tokenizer, "tokenizer", tokenizer).get_vocab(), other.get_vocab()
    if ours != theirs:
        token, index = sorted(ours.items() ^ theirs.items(), key=lambda item: (item[1], item[0]))[0]
        whose = "the student's" if ours.get(token) == index else "the teacher's"
        raise ValueError(
            f"teacher_model: expected the student's tokenizer, got one where id {index} is another: "
            f"{token!r} is in {whose}"
        )


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
