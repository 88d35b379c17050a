"""Hidden states instead of logits: reading a causal language model just below its LM head."""

import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

# Settings by which some architectures change their logits after the head: softcaps, which the loss knows, and scales.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
LOGIT_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def check_head(model: nn.Module) -> float | None:
    """The model's softcap (None: it has none), or a ValueError where its logits are not h·Wᵀ + b, softcapped."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if type(head) is not nn.Linear:
        raise ValueError(f"model: expected a plain nn.Linear as LM head, got {type(head).__name__}")
    for name in LOGIT_SCALES:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ValueError(f"model: {config.model_type} scales its logits ({name}), which is not supported")
    if getattr(config, "unpadded_vocab_size", None) not in (None, head.out_features):
        raise ValueError(f"model: {config.model_type} cuts its logits (unpadded_vocab_size), which is not supported")
    return next((cap for name in SOFTCAPS if (cap := getattr(config, name, None)) is not None), None)


def hand_out_hidden_states(model: nn.Module) -> None:
    """Let ``model(..., read_hidden=f)`` return ``f(hidden, weight, bias)`` instead of making logits.

    hidden is (B, L, D) after the last norm; weight (V, D) and bias (V,) or None are the head's. f runs inside the
    model's forward, so DDP, FSDP and DeepSpeed see an ordinary pass through their wrapper: the weights are there,
    gradients are reduced, and mixed precision casts only what f returns.
    """
    original = model.forward

    def forward(self, *args, read_hidden: Callable[[Tensor, Tensor, Tensor | None], Any] | None = None, **kwargs):
        if read_hidden is None:
            return original(*args, **kwargs)
        hidden = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        head = self.get_output_embeddings()
        with _gathered(head.weight, head.bias) as (weight, bias):
            return read_hidden(hidden, weight, bias)

    # generate() validates its arguments against the signature. Not functools.wraps: Accelerate unwraps what has a
    # __wrapped__, and would take this off with its own wrappers.
    forward.__signature__ = inspect.signature(type(model).forward)
    model.forward = types.MethodType(forward, model)


@contextmanager
def _gathered(weight: Tensor, bias: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The head's parameters, whole where FSDP2 or ZeRO-3 has sharded them."""
    if hasattr(weight, "full_tensor"):
        yield weight.full_tensor(), None if bias is None else bias.full_tensor()
    elif hasattr(weight, "ds_status"):
        from trl.trainer.utils import maybe_gather_lm_head_ctx

        with maybe_gather_lm_head_ctx(weight, bias):
            yield weight, bias
    else:
        yield weight, bias
