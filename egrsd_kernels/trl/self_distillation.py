"""TRL's SDPO and SDFT trainers without full logits.

Both make logits of student and teacher in one method, ``_forward_logits``, and give them to functions of their modules,
each of which wants little of them: log p of the completion, or a divergence. :func:`without_logits` makes a subclass
whose method returns that little, and in whose other methods those names are ours; TRL's code is neither copied nor
changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from egrsd_kernels import Head, linear_divergence, linear_logp, with_head
from egrsd_kernels.checks import IGNORE_INDEX, autocast, expect

from .fused_divergence import KINDS

LOGP, FULL, SAMPLED = (
    "selective_log_softmax", "compute_full_logit_self_distillation_loss",
    "compute_sampled_token_self_distillation_loss",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Completion:
    """What is needed of the logits that predict a completion; it goes where TRL's trainers hand on logits."""

    ids: Tensor
    """The completion's tokens (B, T); -100 where masked."""
    temperature: float
    scored: Tensor | None
    """log p of them (B, T), nats, 0 where masked: made in the model's forward, unless the states were kept."""
    hidden: Tensor | None
    """(B, T, D), kept for a divergence over the full vocabulary, with the head that reads them; else None."""
    head: Head | None

    @cached_property
    def logp(self) -> Tensor:
        if self.scored is not None:
            return self.scored
        hidden, head = self.states
        return linear_logp(hidden, head, self.ids, temperature=self.temperature)

    @property
    def states(self) -> tuple[Tensor, Head]:
        assert self.hidden is not None and self.head is not None
        return self.hidden, self.head

    def sum(self) -> Tensor:
        """Of which TRL makes a loss of 0 where there is nothing to learn: on it hangs all that logits hang on.

        DDP waits for the gradient of each weight, the head's too, from a process that has nothing to learn as well.
        """
        return self.logp.sum()


def without_logits(trainer: type) -> type:
    """A subclass of TRL's ``SDPOTrainer`` or ``SDFTTrainer`` that makes no full logits, of student or teacher.

    Arguments, losses, gradients and metrics are the trainer's. ``distillation_mode="sampled_token"`` takes log p from
    :func:`egrsd_kernels.linear_logp`, and ``"full_logits"`` its divergence from
    :func:`egrsd_kernels.linear_divergence`. What needs logits remains TRL's: ``"topk_logits"``, whose support is the
    student's likeliest tokens, and a teacher behind a server. Heads are read off the models and proved, as by
    :func:`egrsd_kernels.with_head`.

    Raises:
        TypeError: it is no such trainer.
        ValueError: from the subclass's constructor, for ``"full_logits"`` under FSDP or ZeRO-3: the divergence is made
            after the teacher's forward, when its head is no longer whole there.
    """
    names = _names_of(trainer)
    fits = hasattr(trainer, "_forward_logits") and {LOGP, FULL, SAMPLED} <= names.keys()
    expect(fits, "trainer", trainer, "TRL's SDPOTrainer or SDFTTrainer", TypeError)
    theirs_logp, theirs_full = names[LOGP], names[FULL]

    def logp(logits: Any, index: Tensor) -> Tensor:
        return logits.logp if isinstance(logits, Completion) else theirs_logp(logits, index)

    def full(student_logits: Any, teacher_logits: Any, *, distillation_alpha: float) -> Tensor:
        if not isinstance(student_logits, Completion):
            return theirs_full(student_logits, teacher_logits, distillation_alpha=distillation_alpha)
        return _divergence(student_logits, teacher_logits, distillation_alpha)

    ours: dict[str, Any] = {LOGP: logp, FULL: full, SAMPLED: _with_names(names[SAMPLED], {LOGP: logp})}

    class WithoutLogits(trainer):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            whole = not (self.is_fsdp_enabled or is_deepspeed_zero3_enabled())
            mode, why = self.args.distillation_mode, "another mode than full_logits under FSDP and ZeRO-3"
            expect(whole or mode != "full_logits", "distillation_mode", mode, why)

        def _forward_logits(
            self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int
        ) -> Completion | Tensor:
            if self.args.distillation_mode == "topk_logits" or self.use_teacher_server:
                return super()._forward_logits(model, input_ids, attention_mask, logits_to_keep)
            inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
            if "logits_to_keep" in self.model_kwarg_keys:
                inputs["logits_to_keep"] = logits_to_keep + 1
            keep = self.args.distillation_mode == "full_logits"
            # A prepared model enters autocast by itself, but its proof and the divergence are outside of its forward.
            with self.accelerator.autocast():
                return _completion(model, inputs, logits_to_keep, self.temperature, keep)

    for name, method in _methods_of(trainer):
        if not ours.keys().isdisjoint(method.__code__.co_names):
            setattr(WithoutLogits, name, _with_names(method, ours))
    WithoutLogits.__name__ = WithoutLogits.__qualname__ = trainer.__name__
    return WithoutLogits


def _completion(model: Any, inputs: dict[str, Any], length: int, temperature: float, keep: bool) -> Completion:
    """Of the last ``length`` tokens of ``inputs``. keep: hidden states and head, in the place of log p."""
    mask = inputs["attention_mask"][:, -length:].bool()
    ids = torch.where(mask, inputs["input_ids"][:, -length:], IGNORE_INDEX)

    def read(hidden: Tensor, head: Head) -> Any:
        hidden = hidden[:, :-1][:, -length:]
        if keep:  # as tensors they leave the model as part of its output, so that its wrappers see what is used
            return hidden, vars(head)
        return linear_logp(hidden, head, ids.to(hidden.device), temperature=temperature)

    found, _ = with_head(model, read, **inputs)
    if not keep:
        return Completion(ids.to(found.device), temperature, found, None, None)
    hidden, head = autocast(found[0], Head(**found[1]))  # here: whoever makes the divergence has left autocast
    return Completion(ids.to(hidden.device), temperature, None, hidden, head)


def _divergence(student: Completion, teacher: Completion, alpha: float) -> Tensor:
    kind = KINDS.get(alpha, "jsd")
    found = linear_divergence(
        *student.states, *teacher.states, kind=kind, beta=alpha if kind == "jsd" else 0.5,
        temperature=student.temperature, mask=student.ids != IGNORE_INDEX,
    )  # fmt: skip
    assert isinstance(found, Tensor)
    return found


def _methods_of(trainer: Any) -> list[tuple[str, FunctionType]]:
    """Plain methods that the class itself defines."""
    own = vars(trainer).items() if isinstance(trainer, type) else ()
    return [(name, method) for name, method in own if isinstance(method, FunctionType)]


def _names_of(trainer: Any) -> dict[str, Any]:
    """The globals of those methods."""
    return next((method.__globals__ for _, method in _methods_of(trainer)), {})


def _with_names(function: FunctionType, names: dict[str, Any]) -> FunctionType:
    """The function, with other values of these global names."""
    found = {**function.__globals__, **names}
    made = FunctionType(
        function.__code__, found, function.__name__, function.__defaults__, function.__closure__
    )  # fmt: skip
    made.__kwdefaults__ = function.__kwdefaults__
    return made
