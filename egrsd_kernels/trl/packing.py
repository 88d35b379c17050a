"""One line for TRL's GRPOTrainer and RLOOTrainer: every shared prefix is read once, in packs of bounded size."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import ProcessorMixin
from trl import GRPOTrainer, RLOOTrainer

from egrsd_kernels.checks import expect, integer
from egrsd_kernels.models import ModelError
from egrsd_kernels.models.places import language_model
from egrsd_kernels.packing.attention import implementation_of
from egrsd_kernels.packing.head import CompileLayers, check_compile_layers
from egrsd_kernels.packing.layers import CUDA_GRAPHS, check_cudagraphs, may_drop
from egrsd_kernels.packing.proof import drops, fast_road, remembers, row_limit

from .packed_rows import INDEX, MAX_TOKENS_PER_PACK, groups_together
from .packed_step import PackedStep, is_sharded

ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")
HOOKED = ("_get_per_token_logps_and_entropies", "_generate_and_score_completions", "_prepare_inputs")
_KEPT = "_unpack"  # on the trainer: what takes it back


def pack(
    trainer: Any, *, max_tokens_per_pack: int = MAX_TOKENS_PER_PACK, compile_layers: CompileLayers = None
) -> AbstractContextManager[Any]:
    """From now on the trainer reads every prefix that its rollouts share once, and no padding; its loss stays its own.

    >>> trainer = GRPOTrainer(...)
    >>> pack(trainer)
    >>> trainer.train()

    Log p and entropies (of the policy, of π_old and of a reference) come from packs of rollouts as prefix trees
    (:mod:`egrsd_kernels.packing`), by our own pass over the head, and are what each rollout has alone. A micro-batch's
    memory is that of a pack, whatever its rollouts: they are read without a graph first, and again when the gradient of
    TRL's own loss with respect to log p is known. Rollouts of a prompt stay beside one another where TRL shuffles
    them all, so that a micro-batch has whole groups. ``docs/packing.md`` says what that changes.

    Args:
        trainer: a GRPOTrainer or RLOOTrainer of text, before it trains. An EGRSDTrainer has ``packing=True`` in its
            config.
        max_tokens_per_pack: the most tokens of a forward, shared ones counted once, and four times as many of one on a
            GPU without a gradient. A longer rollout is one alone.
        compile_layers: whether decoder layers run compiled in packs, and nowhere else; see
            :func:`egrsd_kernels.packing.packed`. None: on a GPU in 16 bits, unless weights are sharded, there is
            dropout, or a layer does not compile. ``"cudagraphs"``: as CUDA graphs as well.

    Returns:
        A context whose end undoes this, as :func:`unpack` does; to call pack alone is enough.

    Raises:
        TypeError, ValueError: in one line, for a trainer whose log p cannot come from packs.
        egrsd_kernels.models.ModelError: the model's rows in a pack are not what each is alone.
    """
    if not isinstance(trainer, (GRPOTrainer, RLOOTrainer)):
        raise TypeError(f"trainer: expected a GRPOTrainer or RLOOTrainer, got {type(trainer).__name__}")
    expect(_KEPT not in vars(trainer), "trainer", type(trainer).__name__, "one that is not packed already")
    _check_own(trainer)
    if fault := fault_of(trainer):
        raise ValueError(fault)
    budget = integer("max_tokens_per_pack", max_tokens_per_pack, low=1)
    check_compile_layers(compile_layers)
    check_rows_in_packs(trainer.accelerator, trainer.model, trainer.ref_model)
    check_training_in_packs(trainer.accelerator, trainer.model, compile_layers, twice=True)
    undo = ExitStack()
    step = PackedStep(trainer.accelerator, budget, compile_layers)
    undo.callback(step.remove)
    hooks = _Hooks(trainer, step)
    for name in HOOKED:
        vars(trainer)[name] = getattr(hooks, name)
        undo.callback(vars(trainer).pop, name)
    undo.callback(vars(trainer).pop, _KEPT, None)
    vars(trainer)[_KEPT] = undo
    return undo


def unpack(trainer: Any) -> None:
    """The trainer reads padded batches again, as TRL has it; one that was not packed stays as it is."""
    undo = vars(trainer).get(_KEPT)
    if undo is not None:
        undo.close()


def check_rows_in_packs(accelerator: Accelerator, *models: nn.Module | None, by_default: bool = False) -> None:
    """A ModelError where the rows of a model in a pack are not what each is alone.

    by_default: nobody has asked for packs. Then also where they may be slower, take more memory or end a run: by a
    dense mask, and where a row that is too long for its rope is refused when it comes; and where weights are sharded,
    which no GPU has shown.
    """
    if by_default and is_sharded(accelerator):
        raise ModelError(f"model: packing by default expects whole weights, got {accelerator.distributed_type.value}")
    for model in models:
        if model is None:
            continue
        limit = row_limit(model)
        with accelerator.autocast():
            fast = fast_road(model)
        if by_default and fast is None:
            raise ModelError(f"model: packing by default {_expects_segments(model)}")
        if by_default and limit < math.inf and remembers(model):
            raise ModelError(
                f"model: packing by default expects a rope that forgets, got a dynamic one beyond {limit:.0f} tokens"
            )


def _expects_segments(model: nn.Module) -> str:
    base = language_model(model)
    return (
        f"expects a model on a GPU in 16 bits that attends by segments, got {base.dtype} on {base.device.type} with "
        f"{implementation_of(base)}"
    )


def check_training_in_packs(
    accelerator: Accelerator, model: nn.Module, compile_layers: CompileLayers, *, twice: bool
) -> None:
    """A ModelError where a model's packs would fail in training; twice: whether a gradient takes a second forward.

    Of a model that its wrapper places later, the first read says it.
    """
    base = language_model(model)
    with accelerator.autocast():
        fast = fast_road(model)
    if fast is not None:
        config = base.config.get_text_config()
        for name in ATTENTION_DROPOUT:
            if p := getattr(config, name, None):
                raise ModelError(f"{name}: packing expects 0 where attention is by segments, got {p:g}")
    elif compile_layers and base.device.type == accelerator.device.type:
        raise ModelError(f"compile_layers: {_expects_segments(model)}")
    dropping = drops(model, in_training=True)
    if compile_layers == CUDA_GRAPHS:
        check_cudagraphs(base, may_drop, is_sharded(accelerator))
        if dropping:
            raise ModelError(f"compile_layers: {type(base).__name__}: CUDA graphs expect layers without dropout")
    if compile_layers and twice and dropping:
        raise ModelError("compile_layers: expected a model without dropout, which it draws anew in each graph")
    if dropping:
        warnings.warn("packing: dropout draws once for a prefix that rollouts share, not once for each", stacklevel=2)


def fault_of(trainer: Any) -> str | None:
    """In one line, the setting of a trainer that keeps its loss from packed log p; None if there is none."""
    args = trainer.args
    if isinstance(trainer.processing_class, ProcessorMixin):
        return "model: packing expects one of text: images have no place in a prefix tree"
    if trainer.aux_loss_enabled:
        return (
            f"router_aux_loss_coef: packing expects 0, got {trainer.router_aux_loss_coef:g}: a load-balancing loss is "
            "a mean over a forward's tokens, where a shared prefix would count once and each pack for itself"
        )
    if getattr(args, "cast_lm_head_to_fp32", False):
        return "cast_lm_head_to_fp32: packing expects False: its logits are in float32 anyway"
    if args.n_gpu > 1:
        return f"trainer: packing expects a process for each GPU, got one for {args.n_gpu}"
    optim = str(getattr(args.optim, "value", args.optim))
    if "lomo" in optim or "layerwise" in optim:
        return (
            f"optim: packing expects an optimizer that steps once for all packs, got {optim}, a step in each backward"
        )
    return None


def _check_own(trainer: Any) -> None:
    """A ValueError where TRL's methods that are replaced are somebody else's already."""
    for name in HOOKED:
        owner = next(cls for cls in type(trainer).__mro__ if name in vars(cls))
        if owner not in (GRPOTrainer, RLOOTrainer) or name in vars(trainer):
            hint = ": set packing=True in its config" if hasattr(trainer.args, "packing") else ""
            who = owner.__name__ if owner not in (GRPOTrainer, RLOOTrainer) else "the instance"
            raise ValueError(f"trainer: expected TRL's own {name}, which {who} overrides{hint}")


class _Hooks:
    """What stands before a trainer's own methods of the same names."""

    def __init__(self, trainer: Any, step: PackedStep):
        self.trainer, self.step = trainer, step
        self.own: dict[str, Callable[..., Any]] = {name: getattr(trainer, name) for name in HOOKED}

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        given = [name for name, value in images.items() if value is not None]
        if compute_aux_loss or given:  # of a later TRL: fault_of knows the present one's
            raise ValueError(f"trainer: packing expects log p of text alone, got {', '.join(given) or 'an aux loss'}")
        logp, entropy = self.step.read(
            model,
            input_ids,
            attention_mask,
            logits_to_keep,
            compute_entropy=compute_entropy,
            entropy_grad=getattr(self.trainer, "_entropy_bonus_enabled", False),
            temperature=self.trainer.temperature,
        )
        return logp, entropy, None

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        return with_index(self.trainer, self.own["_generate_and_score_completions"](inputs))

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before = self.trainer._buffered_inputs
        inputs = self.own["_prepare_inputs"](generation_batch)
        return regrouped(self.trainer, before, inputs)


def with_index(trainer: Any, output: dict[str, Any]) -> dict[str, Any]:
    """A generation of a training step, with the number of each rollout among those of all processes."""
    if trainer.model.training:
        count = len(output["prompt_ids"])
        start = trainer.accelerator.process_index * count
        output[INDEX] = torch.arange(start, start + count)
    return output


def regrouped(trainer: Any, before: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The micro-batch that TRL has prepared; of a fresh generation, one with whole groups.

    before: the trainer's buffer until then.
    """
    if trainer._buffered_inputs is before or not trainer.model.training:
        return inputs
    trainer._buffered_inputs = groups_together(trainer._buffered_inputs, trainer.num_generations)
    return trainer._buffered_inputs[trainer._step % trainer.args.steps_per_generation]
