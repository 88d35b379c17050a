"""EGRSD and CL-EGRSD (arXiv 2605.13255) in TRL: :class:`EGRSDTrainer`, and how a rollout becomes a loss.

Generation, reward functions, the loss, logging, checkpoints and Accelerate stay GRPOTrainer's. What is ours hangs on a
few of its methods, each the narrowest that does the job. In the order in which a rollout meets them, with the module
beside this one that does the most of it:

    __init__                             starting      what token credit cannot honour; the proof of the model's head
    _generate                                          the prompts that generation was given, for the teacher's
    _calculate_rewards                   rewards       no infinite reward; length-shaped; those of all processes
    _generate_and_score_completions      teacher_pass  Welford advantages; one teacher pass over the fresh rollouts
    _prepare_inputs                      evidence      entropy scale and normaliser, over a step and all processes
    _compute_loss                        direct_loss   fused_egrsd_loss, padded or in packs; or TRL's, on Â
    _get_per_token_logps_and_entropies   packed_step   log p without logits of student, reference and teacher; Â
    log                                  step_log      metrics of an optimizer step, and its rollouts on disk
    train                                resuming      which run goes on, and all that a bit-exact resume needs

The teacher's log p and entropy of each rollout token are (B, T) tensors, made once in each context, when the rollout is
made, and named after it: teacher_logp, teacher_entropy. They ride through TRL's buffer like its own
old_per_token_logps: a teacher batch is never kept, and several passes over the same rollouts cost one teacher pass. The
token advantage Â = A · w · ω is made anew in each of them, with w against the log p of the policy as it is then: in a
rollout's second update w asks whether the teacher still is further along in the direction of A, while TRL's ratio
π/π_old accounts for what the first update has done.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput

from egrsd_kernels import with_head
from egrsd_kernels.models.proof import evaluating
from egrsd_kernels.rl import TWO_TURN, Message, TokenAdvantage, WelfordAdvantage, length_shaped_reward

from .arguments import check_arguments
from .calling import inputs_of
from .checkpoint import EndAtMaxSteps, identity
from .config import EGRSDConfig
from .context import Reader, check_columns, check_rows, privileged_conversation, row_name
from .direct_loss import Arguments, packed_loss, padded_loss, signals_of_stats
from .divergence import TeacherStates
from .evidence import evidence_of, learned, measure_steps, signals_of
from .fused_head import adapters_on_head_allowed, score_labels, take_off_fused_head
from .images import MODEL_IMAGES, TOKEN_TYPES
from .methods import Context, contexts_of, function_of, teacher_model_of
from .packing import regrouped, with_index
from .resuming import ResumableTrainer
from .rewards import InfiniteRewards, checked, without_infinite
from .roles import check_trained, weights_at_hand
from .starting import check_constructed, other_window, packed_step_of, prove, teacher_of
from .step_log import StepLog
from .teacher_pass import check_rendered, read_rollouts, readers_of

OUTPUTS = ("log_probs", "entropy")


class EGRSDTrainer(ResumableTrainer):
    """GRPOTrainer with EGRSD's token advantages.

    The dataset needs a column ``prompt`` (conversations) and one with the reference solution as text, which the teacher
    reads and the student never does; none without a teacher, nor with ``contexts``. The tokenizer's chat template
    renders both, with ``chat_template_kwargs`` (for example ``{"enable_thinking": False}``). The teacher's prompt
    begins with what generation was given: images, tools, what an environment says first. What tools return is read by
    both, and learned by neither.

    Args:
        model, reward_funcs, args, datasets, and further keywords: as GRPOTrainer's; args is an :class:`EGRSDConfig`.
        teacher_template: messages that follow the prompt in the teacher's conversation, ``{solution}`` where the
            solution goes.
        contexts: in the place of that, by name, functions from a row of the dataset to the teacher's messages. The
            teacher reads each rollout once in every context. Only a ``token_advantage`` of one's own reads several.
        token_advantage: what a token is worth, a function of an :class:`egrsd_kernels.rl.TokenEvidence`. Default: the
            one that ``args`` names.
        teacher_model: a model of its own as the teacher, or the name or path of one: larger, or with a head, a dtype or
            a device_map of its own; or a :class:`egrsd_kernels.trl.Teacher`. It has the student's vocabulary. Default:
            the one that ``args`` names, if any, else what teacher_model_kind makes of the student.

    Raises:
        TypeError, ValueError: in one line that names the setting, argument, column or row.
    """

    _tag_names = ["trl", "egrsd"]  # noqa: RUF012
    _name = "EGRSD"
    _paper = {  # noqa: RUF012
        "title": "Respecting Self-Uncertainty in On-Policy Self-Distillation for Efficient LLM Reasoning",
        "id": "2605.13255",
    }

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: EGRSDConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        teacher_template: Sequence[Message] = TWO_TURN,
        contexts: Mapping[str, Context] | None = None,
        token_advantage: TokenAdvantage | None = None,
        teacher_model: Any = None,
        **kwargs: Any,
    ):
        args = EGRSDConfig("egrsd") if args is None else args
        if not isinstance(args, EGRSDConfig):
            raise TypeError(f"args: expected an EGRSDConfig, got {type(args).__name__}")
        self._token_advantage = function_of(args, token_advantage)
        self._contexts = contexts_of(args, token_advantage is not None, contexts, self.teacher_prompt)
        teacher_model = teacher_model_of(args, teacher_model, bool(self._contexts))
        if teacher_template is not TWO_TURN and (contexts is not None or not self._contexts):
            why = "beside contexts, which word all that the teacher reads" if contexts else "as there is no teacher"
            raise ValueError(f"teacher_template: expected none {why}")
        environments = kwargs.get("environment_factory") is not None
        adapters = kwargs.get("peft_config") is not None or (isinstance(model, nn.Module) and is_peft_model(model))
        check_arguments(args, model, reward_funcs, train_dataset, eval_dataset, environments, adapters)
        datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        columns = [] if environments else ["prompt"]
        if contexts is None and self._contexts:
            columns.append(args.solution_column)
            if train_dataset is None:
                raise ValueError(f"train_dataset: expected rows with a column {args.solution_column!r}, got None")
        for name, dataset in datasets.items():
            check_columns(name, dataset, columns)
        with adapters_on_head_allowed():
            super().__init__(model, reward_funcs, args, **datasets, **kwargs)
        zero_stage = getattr(self.accelerator.state.deepspeed_plugin, "zero_stage", 0)
        self._sharded = self.is_fsdp_enabled or zero_stage == 3
        check_constructed(self)
        check_trained(self.model, self.optimizer)
        # GSPO-token reaches TRL's loss through π_old: see _put_token_advantages.
        self.importance_sampling_level = "token"
        self._teacher_template = teacher_template
        take_off_fused_head(self.model.get_base_model() if is_peft_model(self.model) else self.model)
        self.teacher = teacher_of(self, teacher_model)
        self._teacher_states: TeacherStates | None = None  # while they are kept
        self._teacher_head: Any = None  # that reads them
        self._teacher_window = other_window(self)
        for name, dataset in datasets.items():
            for reader in self._readers.values():
                check_rows(name, dataset, reader)
        self._packed = packed_step_of(self)
        self._vocab_size = 0  # until the model is proved
        if not self._sharded and weights_at_hand(self.model, self.accelerator.device):
            self._vocab_size = prove(self)
        self.welford = WelfordAdvantage(args.welford_warmup_steps)
        self._in_loss: dict[str, Any] | None = None  # the batch of the loss of TRL's that is being made
        self._signals: dict[str, Tensor] = {}  # of that batch
        self._step_log = StepLog(self)
        named = zip(self.reward_funcs, self.reward_func_names, strict=True)
        self.reward_funcs: list[Any] = [checked(*pair) for pair in named]
        self._infinite = InfiniteRewards(self.reward_func_names)
        self.add_callback(EndAtMaxSteps())
        self._identity = identity(
            self.model,
            self.reward_func_names,
            self.train_dataset,
            columns,
            teacher_template if contexts is None and self._contexts else self._contexts,
            token_advantage,
        )

    @property
    def gamma(self) -> float:
        """γ of the optimizer step in progress."""
        return self.args.gamma_at(self.state.global_step, self.state.max_steps)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def _proved(self) -> bool:
        return self._vocab_size > 0

    @property
    def _direct(self) -> bool:
        return self.args.direct and self._token_advantage is None

    def teacher_prompt(self, example: Mapping[str, Any]) -> list[dict[str, str]]:
        """The teacher's conversation for one row of the dataset. Override it for another context.

        The row's ``prompt`` is what generation was given: with its images in the content's parts, and with what an
        environment says first.
        """
        return privileged_conversation(example, self.args.solution_column, self._teacher_template)

    @property
    def _readers(self) -> dict[str, Reader]:
        own = type(self).teacher_prompt is EGRSDTrainer.teacher_prompt
        return readers_of(self, "teacher_template" if own else "teacher_prompt")

    # ---------------------------------------------------------------------------------------- from prompts to a batch

    def _generate(self, prompts):
        found = super()._generate(prompts)
        prompt_ids, responses, own, *_, tool_images = found
        # With the rows' images, and what environments say first. The teacher's prompt is made from these.
        self._given = prompts
        self._lengths = [len(ids) for ids in responses] if own is None else [sum(mask) for mask in own]
        self._tool_images = any(tool_images)
        if self.rollout_func is not None and self._contexts:
            check_rendered(self, prompts, prompt_ids)
        return found

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # of all processes
        weights = self.reward_weights.to(rewards.device)
        as_returned = rewards
        rewards, infinite = without_infinite(rewards, weights)
        self._infinite.warn(as_returned, infinite, prompts, completions, self.accelerator.process_index)
        if self.args.length_beta:
            lengths = self.accelerator.gather(torch.tensor(self._lengths, device=rewards.device))
            bonus = length_shaped_reward(
                torch.ones_like(lengths), lengths, self.max_completion_length, self.args.length_beta
            )
            earned = (rewards * weights).nansum(dim=1) > 0
            rewards = torch.where(earned[:, None], rewards * bonus[:, None], rewards)
        unjudged = rewards.isnan().all(dim=1)  # so TRL tells them
        self._rewards = (rewards * weights).nansum(dim=1).masked_fill(unjudged, math.nan)
        self._responses = completion_ids_list
        for name, rows in {"unjudged": unjudged, "infinite": infinite.any(dim=1)}.items():
            self._metrics[self._mode][f"rewards/{name}"].append(rows.float().mean().item())
        return rewards

    def _welford_advantages(self) -> Tensor:
        """Advantages of all processes' rollouts. Evaluation uses the statistics and leaves them alone."""
        state = self.welford.state_dict()
        advantages = self.welford(self._rewards, judged=~self._rewards.isnan())
        if self._mode == "eval":
            self.welford.load_state_dict(state)
        logged = self._logs["advantages"]  # TRL has put its own there
        for _ in range(min(len(advantages), len(logged))):
            logged.pop()
        logged.extend(advantages.tolist())
        return advantages

    def _generate_and_score_completions(self, inputs):
        # A stream's rows are seen here first, so they are checked before anything is generated.
        names = [row_name(f"{self._mode}_dataset", example) for example in inputs]
        readers = self._readers
        for reader in readers.values():
            reader.read(list(zip(names, inputs, strict=True)))
        output = super()._generate_and_score_completions(inputs)
        start = self.accelerator.process_index * len(inputs)
        ours = slice(start, start + len(inputs))
        if self.args.advantage == "welford":
            output["advantages"] = self._welford_advantages()[ours]
        output["reward"] = self._rewards[ours]
        given = [{**example, "prompt": prompt} for example, prompt in zip(inputs, self._given, strict=True)]
        read_rollouts(self, readers, names, given, output)
        if self.args.rollout_steps:
            output["reference"] = [example.get(self.args.solution_column) for example in inputs]
            ends = {*self.eos_token_ids, self._pad_token_id}
            output["truncated"] = [not ids or ids[-1] not in ends for ids in self._responses]
        return output if self._packed is None else with_index(self, output)

    # ---------------------------------------------------------------------------------------- from a batch to its loss

    def _prepare_inputs(self, generation_batch):
        if not self._proved:  # weights that were elsewhere at construction
            self._vocab_size = prove(self)
        self._step_log.start_clock()
        buffered = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._packed is not None:
            inputs = regrouped(self, buffered, inputs)
        if self._mode == "eval":
            self._step_log.begin()
            measure_steps(self, [inputs])
        elif self._buffered_inputs is not buffered:
            measure_steps(self, self._buffered_inputs)
        return inputs

    def _compute_loss(self, model, inputs):
        if self._direct and self._packed is not None:
            return packed_loss(
                self._packed, model, inputs, self._arguments(inputs),
                done=lambda stats: self._step_log.add(inputs, self._signals_of(inputs, stats)),
            )  # fmt: skip
        loss, signals = (self._direct_loss if self._direct else self._trl_loss)(model, inputs)
        self._step_log.add(inputs, signals)
        return loss

    def _direct_loss(self, model, inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """EGRSD's with the gradient in the loss's own pass: see :attr:`EGRSDConfig.direct`."""
        keys = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        batch = (inputs[key] for key in keys)
        images = {key: inputs[key] for key in (*MODEL_IMAGES, *TOKEN_TYPES) if key in inputs}
        loss_of = padded_loss(self._arguments(inputs))
        (loss, stats), output = self._read(loss_of, model, *batch, router=self.aux_loss_enabled, **images)
        if self.aux_loss_enabled:
            # As TRL weighs it: the mean over micro-batches, whatever their tokens.
            accumulation = self.current_gradient_accumulation_steps if self._mode == "train" else 1
            loss = loss + self.router_aux_loss_coef * output.aux_loss / accumulation
            self._step_log.aux_losses.append(output.aux_loss.detach())
        return loss, self._signals_of(inputs, stats)

    def _arguments(self, inputs) -> Arguments:
        """The direct loss's, of a micro-batch."""
        (context,) = self._contexts
        scoring = {**self._head_options, **self._gradient_options}
        return Arguments.of(inputs, context, self.args, self.gamma, scoring, self._teacher_head)

    def _signals_of(self, inputs, stats) -> dict[str, Tensor]:
        (context,) = self._contexts
        return signals_of_stats(inputs, stats, context, self.args, self.gamma)

    def _trl_loss(self, model, inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """TRL's loss of a batch whose advantages are Â. The batch itself stays: it may serve another update."""
        batch = {name: value for name, value in inputs.items() if name != "advantages"}  # read too early, it is missed
        batch["sequence_advantages"] = inputs["advantages"]
        self._in_loss = batch
        try:
            loss = super()._compute_loss(model, batch)
        finally:
            self._in_loss = None
        signals, self._signals = self._signals, {}
        return loss, signals

    def _put_token_advantages(self, inputs: dict[str, Any], student_logp: Tensor) -> None:
        """Put Â (B, T), a constant, into the batch of TRL's loss, which reads it after the policy's log p."""
        advantages = inputs.pop("sequence_advantages")
        evidence = evidence_of(inputs, advantages, student_logp, self._contexts, self.args, self.gamma)
        self._signals = signals_of(evidence, self._token_advantage)
        inputs["advantages"] = self._signals["token_advantage"]
        old = inputs.get("old_per_token_logps")
        if self.args.importance_sampling_level == "sequence_token" and old is not None:
            # GSPO-token: π/π_old of each token is the sequence's as a number, and π's own as a gradient.
            mask = learned(inputs)
            log_ratio = ((student_logp - old) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
            inputs["old_per_token_logps"] = student_logp - log_ratio

    def log(self, *args, **kwargs):
        super().log(*args, **kwargs)
        self._step_log.stop_clock()

    # -------------------------------------------------------------------------------------------------- reading a model

    @property
    def _pad_token_id(self) -> int:
        return self._tokenizer.pad_token_id

    @contextmanager
    def _as_student(self) -> Iterator[nn.Module]:
        """The model as it is, without dropout and gradient checkpointing."""
        with evaluating(self.model):
            yield self.model

    @contextmanager
    def _as_teacher(self) -> Iterator[nn.Module]:
        """The teacher, without dropout and gradient checkpointing."""
        with evaluating(self.model), self.teacher.active() as teacher, evaluating(teacher):
            yield teacher

    def _read(
        self, function: Callable, model, prompt_ids, prompt_mask, completion_ids, completion_mask, *, router=False,
        **images,
    ):  # fmt: skip
        """(function(hidden, head), output), with the (B, T, D) hidden states that predict the completion's tokens."""
        ids, mask = torch.cat([prompt_ids, completion_ids], dim=1), torch.cat([prompt_mask, completion_mask], dim=1)
        # Prompts are padded on the left, so every completion begins in the same column and is predicted one column
        # earlier. That holds for student and teacher, whatever the lengths of their prompts.
        rows = slice(-completion_ids.shape[1] - 1, -1)
        with self.accelerator.autocast():
            return with_head(
                model,
                lambda hidden, head: function(hidden[:, rows], head),
                **inputs_of(ids, mask, router, self._is_vlm),
                **images,
            )

    @torch.no_grad()
    def _statistics(self, model, prompt_ids, prompt_mask, completion_ids, completion_mask, mask, size: int, **images):
        """log p and entropy (B, T) of the completion's tokens, from the model as it is now, ``size`` rows at a time."""
        ids, attended = torch.cat([prompt_ids, completion_ids], dim=1), torch.cat([prompt_mask, completion_mask], dim=1)
        logp, entropy, _ = self._get_per_token_logps_and_entropies(
            model, ids, attended, completion_ids.shape[1], size, compute_entropy=True, **images
        )
        return tuple(x.to(mask.device).masked_fill(mask == 0, 0) for x in (logp, entropy))

    def _rows_at_a_time(self) -> int:
        train = self._mode == "train"
        return self.args.per_device_train_batch_size if train else self.args.per_device_eval_batch_size

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        """TRL's, in front of ``model`` as we read it: TRL cuts batches into parts, and images with them.

        Packs are cut by their tokens instead, and have no images.
        """

        def read(input_ids, attention_mask, labels, fused_lm_head, output_router_logits=False, **images):
            parts = (x.tensor_split([-logits_to_keep], dim=1) for x in (input_ids, attention_mask, labels))
            ids, attended, (_, labels) = parts
            row = ids[0], attended[0], ids[1], attended[1]
            score = functools.partial(score_labels, labels=labels, outputs=OUTPUTS, **self._scoring)
            if self._teacher_states is not None:
                score = self._teacher_states.keeping(score)
            fields, output = self._read(score, model, *row, router=output_router_logits, **images)
            return FusedCausalLMOutput(**fields, aux_loss=output.aux_loss if output_router_logits else None)

        if self._packed is not None:
            options = {**self._scoring, "states": self._teacher_states}
            found = *self._packed.read(model, input_ids, attention_mask, logits_to_keep, **options), None
        else:
            found = super()._get_per_token_logps_and_entropies(
                read, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        if self._in_loss is not None:
            self._put_token_advantages(self._in_loss, found[0].detach())
        return found

    @property
    def _scoring(self) -> dict[str, Any]:
        """How :func:`.fused_head.score_labels` reads a model: entropies are differentiable for a bonus."""
        return {
            "entropy_grad": self._entropy_bonus_enabled,
            "keep_bytes": self.args.chunk_mib << 20,
            **self._head_options,
            **self._gradient_options,
        }

    @property
    def _head_options(self) -> dict[str, Any]:
        args = self.args
        return {"temperature": self.temperature, "backend": args.backend, "chunk_bytes": args.chunk_mib << 20}

    @property
    def _gradient_options(self) -> dict[str, Any]:
        return {"grad_mode": self.args.grad_mode, "sparse_tol": self.args.sparse_tol}
