"""The forward that TRL takes log p from, ``model(..., labels=labels, fused_lm_head=True)``, by our own pass.

TRL's ``add_fused_lm_head`` gives a model such a forward, and :func:`fuse_head` ours. The head is read where the model
itself reads it (:func:`egrsd_kernels.with_head`) and proved against the model's own logits at the first such call; all
before and beside it, a router's loss for example, is the model's own forward.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, Literal

import trl.trainer.grpo_trainer
import trl.trainer.utils
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput

from egrsd_kernels import Head, VocabularyStatistics, checks, linear_logp, with_head
from egrsd_kernels.backends import EXTRAS
from egrsd_kernels.models import ModelError
from egrsd_kernels.models.reading import InForward

OUTPUTS = ("log_probs", "entropy", *EXTRAS)
_KEPT = "_fused_forwards"


def fuse_head(
    model: nn.Module,
    temperature: float = 1.0,
    outputs: Collection[str] = ("log_probs",),
    *,
    entropy_grad: bool = False,
) -> None:
    """Give a model the forward that TRL's ``add_fused_lm_head`` would, computed here; in the place of TRL's, if any.

    ``model(**inputs, labels=labels, fused_lm_head=True)`` returns TRL's ``FusedCausalLMOutput``; any other call is the
    model's own forward, so generation stays as it is. Adapters may be on the model, also on its head, or come later.

    Args:
        model: a transformers model, below PEFT, DDP and torch.compile. Its head is proved at the first call; a head
            that is refused is a :class:`egrsd_kernels.ModelError` then. A later change behind the head, such as another
            scale in the config or a hook, has to be followed by :func:`egrsd_kernels.head_of`, which proves it again.
        temperature: logits are divided by it.
        outputs: names of what is made of each token, others are None: "log_probs" (always made), "entropy", "is_top1",
            "mean_logits", "log_sum_sq_probs".
        entropy_grad: whether to be ready for a gradient of the entropy, as an entropy bonus has it, from the first call
            on. Otherwise the backward pass that first brings one takes longer, and later calls are ready.

    The fields, with labels (B, L) of any integer dtype, -100 where there is nothing to learn: float32, in nats, and 0
    or False where there is no label:

    - loss: -Σ log p over ``num_items_in_batch``, or over the number of labels, at least 1; and ``router_aux_loss_coef``
      of the model's config times aux_loss.
    - log_probs, entropy: (B, L - 1), of the labels that follow each token but the last, both differentiable; or (B, L)
      with ``shift_labels`` (B, L), where label j is what token j predicts.
    - log_sum_sq_probs, mean_logits, is_top1: shaped alike, without gradient; log Σ p², the mean of the logits over the
      vocabulary, and (bool) whether the label is the most likely token, the first one of equals.
    - label_mask: bool, shaped alike, where there is a label.
    - aux_loss: the model's own, where it returns one.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it expects.
    """
    checks.instance("model", model, nn.Module, "a model")
    checks.number("temperature", temperature, low=0, strict=True)
    names = checks.names("outputs", outputs, OUTPUTS)
    checks.flag("entropy_grad", entropy_grad)
    take_off_fused_head(model)
    vars(model)["forward"] = FusedForward(model, temperature, names, entropy_grad)


def score_labels(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    outputs: Collection[str],
    entropy_grad: bool | Literal["lazy"] = False,
    **options: Any,
) -> dict[str, Any]:
    """The fields of TRL's ``FusedCausalLMOutput`` that are one a token: ``outputs``, log_probs and label_mask.

    hidden: (B, L, D). labels: (B, L), what each of them predicts, on any device; -100: a token that counts as 0.
    options: others of :func:`egrsd_kernels.linear_logp`. Fields that nobody asked for are None.
    """
    labels = labels.to(hidden.device)  # of a model that is spread over devices
    found = linear_logp(
        hidden, head, labels, return_entropy="entropy" in outputs,
        entropy_grad=entropy_grad if "entropy" in outputs else False,
        extras=[name for name in EXTRAS if name in outputs], **options,
    )  # fmt: skip
    if not isinstance(found, VocabularyStatistics):
        found = VocabularyStatistics(*(found if isinstance(found, tuple) else (found,)))
    return {
        "log_probs": found.logp,
        "entropy": found.entropy,
        **{name: getattr(found, name) for name in EXTRAS},
        "label_mask": labels.long() != checks.IGNORE_INDEX,  # in uint8 it would be 156, an id
    }


class FusedForward:
    """A model's ``forward`` that knows ``fused_lm_head``.

    An object, where a closure would hold on to the model: a deep copy of the model gets one that runs the copy, and a
    pickle brings it back. It looks like a bound method, of which Accelerate wraps the ``__func__``: that of this one
    finds the object of the model that it is called with.
    """

    def __init__(self, model: Any, temperature: float, outputs: tuple[str, ...], entropy_grad: bool):
        self.model, self.temperature, self.outputs = model, temperature, outputs
        self.entropy_grad = entropy_grad
        self.below: Callable[..., Any] | None = vars(model).get("forward")  # None: the class's
        kept = vars(model).setdefault(_KEPT, [])
        self.index = len(kept)
        kept.append(self)

    def take_off(self) -> None:
        """Give the model back what is below; this one is its forward."""
        del self.model.forward
        if self.below is not None:
            self.model.forward = self.below
        kept = vars(self.model)[_KEPT]
        if kept[-1] is self:  # else the others keep their places
            kept.pop()

    @property
    def own(self) -> Callable[..., Any]:
        """The model's forward without this one."""
        return self.below or MethodType(type(self.model).forward, self.model)

    @property
    def __signature__(self) -> inspect.Signature:
        """The model's own: ``generate()`` and Trainer look into it for what the model takes."""
        return inspect.signature(self.own)

    @property
    def __self__(self) -> Any:
        return self.model

    @property
    def __func__(self) -> Callable[..., Any]:
        index = self.index

        def forward(model: nn.Module, *args: Any, **inputs: Any) -> Any:
            return vars(model)[_KEPT][index](*args, **inputs)

        forward.__signature__ = inspect.signature(type(self.model).forward)  # type: ignore[attr-defined]
        return forward

    def __call__(self, *args: Any, fused_lm_head: bool = False, **inputs: Any) -> Any:
        if not fused_lm_head:
            return self.own(*args, **inputs)
        return self._fused(**self.__signature__.bind_partial(*args).arguments, **inputs)

    def _fused(
        self,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **inputs: Any,
    ) -> FusedCausalLMOutput:
        if labels is None and shift_labels is None:
            raise ValueError("labels: expected labels or shift_labels beside fused_lm_head=True, got neither")

        def score(hidden: Tensor, head: Head) -> dict[str, Any]:
            if shift_labels is not None:
                return self._score(hidden, head, shift_labels, num_items_in_batch)
            assert labels is not None
            return self._score(hidden[:, :-1], head, labels[:, 1:], num_items_in_batch)

        try:
            fields, output = with_head(InForward(self.model, self.own), score, **inputs)
        except ModelError as refusal:
            raise ModelError(f"{refusal}; egrsd_kernels.trl.unfuse_heads() leaves the head to TRL") from refusal
        config, aux_loss = self.model.config.get_text_config(), getattr(output, "aux_loss", None)
        asked = inputs.get("output_router_logits")
        asked = getattr(config, "output_router_logits", False) if asked is None else asked
        if isinstance(aux_loss, Tensor):
            weight = getattr(config, "router_aux_loss_coef", 0.0)
            fields["loss"] = fields["loss"] + weight * aux_loss.to(fields["loss"].device)
        elif asked:
            raise ModelError(
                f"model: {type(self.model).__name__}: it returns no load-balancing loss: "
                "set router_aux_loss_coef to 0, or output_router_logits to False, to train without one"
            )
        return FusedCausalLMOutput(**fields, aux_loss=aux_loss)

    def _score(self, hidden: Tensor, head: Head, labels: Tensor, count: Tensor | int | None) -> dict[str, Any]:
        fields = score_labels(
            hidden, head, labels, outputs=self.outputs, entropy_grad=self.entropy_grad or "lazy",
            temperature=self.temperature,
        )  # fmt: skip
        entropy = fields["entropy"]
        if entropy is not None and entropy.requires_grad:
            entropy.register_hook(self._entropy_asked)
        count = fields["label_mask"].sum().clamp(min=1) if count is None else count
        count = count.to(hidden.device) if isinstance(count, Tensor) else count
        return {"loss": -fields["log_probs"].sum() / count, **fields}

    def _entropy_asked(self, gradient: Tensor | None) -> None:
        self.entropy_grad |= gradient is not None


# ------------------------------------------------------------------------------------------ what TRL does about a head


@contextmanager
def adapters_on_head_allowed() -> Iterator[None]:
    """While this is entered, TRL's constructor takes adapters on the head. It refuses what its own loss cannot train.

    The check is an ``isinstance`` in the constructor's middle, of a class that nothing else there asks for:
    cast_lm_head_to_fp32 does, which EGRSDConfig refuses.
    """
    module = vars(trl.trainer.grpo_trainer)
    checked = module.get("BaseTunerLayer")  # without PEFT there is neither
    module["BaseTunerLayer"] = ()
    try:
        yield
    finally:
        if checked is None:
            del module["BaseTunerLayer"]
        else:
            module["BaseTunerLayer"] = checked


def take_off_fused_head(model: Any) -> None:
    """Give a model the forward back that it had before :func:`fuse_head` or TRL's ``add_fused_lm_head``.

    With TRL's a deep copy of the model would compute with the original's weights, and a pickle would not come back.
    """
    while True:
        forward = vars(model).get("forward")
        if isinstance(forward, FusedForward):
            forward.take_off()
        elif is_trls(getattr(forward, "__func__", None)):
            _take_off_trls(model)
        else:
            return


def is_trls(function: Any) -> bool:
    """Whether TRL's module of ``add_fused_lm_head`` defines the function."""
    return getattr(function, "__globals__", None) is vars(trl.trainer.utils)


def _take_off_trls(model: Any) -> None:
    original = inspect.getclosurevars(vars(model)["forward"].__func__).nonlocals["original_forward"]
    del model.forward
    # In a copy of a model that had the fused head, the original is still the other model's.
    owner = original.args[0] if isinstance(original, functools.partial) else getattr(original, "__self__", None)
    if owner not in (None, model):
        original = copy.deepcopy(original, {id(owner): model})
    if original != model.forward:
        model.forward = original
