"""EGRSD and CL-EGRSD (arXiv 2605.13255) in TRL: :class:`EGRSDTrainer`.

Generation, reward functions, the loss, logging, checkpoints and Accelerate stay GRPOTrainer's. What is ours hangs on a
few of its methods, each the narrowest that does the job:

    __init__                              refuse what token credit cannot honour; prove the model's head
    _calculate_rewards                    no infinite reward; length-shaped reward; remember those of all processes
    _generate                             remember the prompts that generation was given, for the teacher's
    _generate_and_score_completions       Welford advantages; one teacher pass over the fresh rollouts
    _prepare_inputs                       entropy scale and normaliser, over an optimizer step and all processes
    _get_per_token_logps_and_entropies    log p without logits, for student, reference and teacher; token advantages
    _compute_loss                         TRL's on those, or fused_egrsd_loss; metrics; export of rollouts
    log                                   tokens per second begin anew
    train                                 which run goes on, in which folder
    _save_rng_state, _load_rng_state      everything else that a bit-exact resume needs
    _get_train_sampler                    the same order of prompts after a resume

What needs no trainer has a module of its own beside this one.

The teacher's log p and entropy of each rollout token are (B, T) tensors, made once in each context, when the rollout is
made, and named after it: teacher_logp, teacher_entropy. They ride through TRL's buffer like its own
old_per_token_logps: a teacher batch is never kept, and several passes over the same rollouts cost one teacher pass. The
token advantage Â = A · w · ω is made anew in each of them, with w against the log p of the policy as it is then: in a
rollout's second update w asks whether the teacher still is further along in the direction of A, while TRL's ratio
π/π_old accounts for what the first update has done.
"""

import copy
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model, send_to_device
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from egrsd_kernels import TokenStats, fused_egrsd_loss, head_of, with_head
from egrsd_kernels.credit import ENTROPY_SCALES, LOOKAHEAD_SETTINGS
from egrsd_kernels.models import ModelError
from egrsd_kernels.models.places import tensors_of
from egrsd_kernels.models.proof import evaluating
from egrsd_kernels.rl import (
    TWO_TURN,
    Message,
    TokenAdvantage,
    WelfordAdvantage,
    length_shaped_reward,
    position_weights,
)
from egrsd_kernels.rollouts import Rollout, write_rollouts

from .arguments import check_arguments
from .calling import Called, in_training, inputs_of
from .checkpoint import (
    EndAtMaxSteps,
    ResumableSampler,
    begin,
    identity,
    last_checkpoint,
    read_state,
    reading,
    write_state,
)
from .config import EGRSDConfig
from .context import Reader, check_columns, check_rows, context_window, privileged_conversation, row_name
from .divergence import TeacherStates
from .evidence import evidence_of, learned, peak_entropy, signals_of
from .export import rollout_file, rollouts_of
from .fused_head import adapters_on_head_allowed, score_labels, take_off_fused_head
from .images import MODEL_IMAGES, TOKEN_TYPES, check_prompt, token_types
from .methods import Context, contexts_of, function_of, teacher_model_of
from .metrics import evidence_metrics, gathered_tokens, peak_memory_gib, token_metrics
from .packed_step import PackedStep
from .packing import check_rows_in_packs, check_training_in_packs, fault_of, regrouped, with_index
from .rewards import InfiniteRewards, checked, excerpt, without_infinite
from .roles import Roles, check_trained, weights_at_hand
from .teacher import (
    AdaptersOff,
    EarlierWeights,
    MoveTeacher,
    NoTeacher,
    Teacher,
    make_teacher,
    pad_prompts,
    prove_teacher,
    separate_teacher,
    window_of,
)

logger = logging.getLogger(__name__)
OUTPUTS = ("log_probs", "entropy")
# Settings that the fused loss has by the same names; γ is the step's.
DIVERGENCE = ("divergence", "divergence_weight", "divergence_beta", "divergence_top_k", "policy_weight")
CREDIT = ("gate_floor", "lookahead", *LOOKAHEAD_SETTINGS, "clip_eps", "min_entropy_scale")


class EGRSDTrainer(GRPOTrainer):
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
        if self.get_tp_size() > 1:
            raise ValueError("deepspeed: expected autotp_size 1, tensor parallelism is not supported")
        if self.processing_class.chat_template is None:
            kind = "processor" if self._is_vlm else "tokenizer"
            raise ValueError(f"processing_class: expected a {kind} with a chat template, which this model's has not")
        check_trained(self.model, self.optimizer)
        # GSPO-token reaches TRL's loss through π_old: see _put_token_advantages.
        self.importance_sampling_level = "token"
        self._teacher_template = teacher_template
        take_off_fused_head(self.model.get_base_model() if is_peft_model(self.model) else self.model)
        zero_stage = getattr(self.accelerator.state.deepspeed_plugin, "zero_stage", 0)
        self._sharded = self.is_fsdp_enabled or zero_stage == 3
        if self._sharded and args.sync_ref_model:
            raise ValueError(
                "sync_ref_model: not supported with sharded weights, a checkpoint would lack the reference"
            )
        self.teacher = self._make_teacher(teacher_model)
        if args.divergence is not None:
            if self._token_advantage is not None:
                raise ValueError("divergence: expected None, as the trainer is given a token_advantage of its own")
            if self._sharded:
                raise ValueError("divergence: expected None, not supported with sharded weights")
        self._teacher_states: TeacherStates | None = None  # while they are kept
        self._teacher_window = self._other_window()
        for name, dataset in datasets.items():
            for reader in self._readers.values():
                check_rows(name, dataset, reader)
        self._packed = self._packed_step()
        self._proved = False
        if not self._sharded and weights_at_hand(self.model, self.accelerator.device):
            self._prove()
        self.welford = WelfordAdvantage(args.welford_warmup_steps)
        self._in_loss: dict[str, Any] | None = None  # the batch of the loss of TRL's that is being made
        self._signals: dict[str, Tensor] = {}  # of that batch
        self._begin_step()
        self._export_failed = False
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
        self._pace: dict[str, list] = {}  # by mode: tokens since the last log, and when their first step began

    def _make_teacher(self, teacher_model: Any) -> Teacher:
        args = self.args
        if not self._contexts:
            return NoTeacher()
        if teacher_model is not None:
            return separate_teacher(
                teacher_model,
                self.model,
                self.processing_class,
                self.accelerator.device,
                images=self._is_vlm,
                distributed=self.accelerator.num_processes > 1,
                sharded=self._sharded,
                revision=args.teacher_model_revision,
                init_kwargs=args.teacher_model_init_kwargs,
                trust_remote_code=args.trust_remote_code,
            )
        # EGRSDConfig has put in the defaults.
        teacher = make_teacher(self.model, args.teacher_model_kind, self._sharded, args.teacher_update_rate)
        if isinstance(teacher, EarlierWeights) and teacher.moves:
            self.add_callback(MoveTeacher(teacher))
        return teacher

    @property
    def _teacher_is_another(self) -> bool:
        """Whether the teacher may be another model than the student's, and has to be proved by itself."""
        return not isinstance(self.teacher, (AdaptersOff, EarlierWeights, NoTeacher))

    def _other_window(self) -> float | None:
        """The teacher's window, where that is not the student's."""
        if not self._teacher_is_another:
            return None
        with self.teacher.active() as teacher:
            if not isinstance(teacher, nn.Module):
                raise TypeError(f"teacher_model: expected active() to give a model, got {teacher!r}")
            return None if teacher is self.model else window_of(teacher)

    def _packed_step(self) -> PackedStep | None:
        """What reads rollouts in packs; None: they are read padded."""
        wanted = self.args.packing or self.args.compile_layers
        if self.args.packing is False or (self.accelerator.device.type == "cpu" and not wanted):
            return None
        fault = fault_of(self)
        if fault is None:
            try:
                check_rows_in_packs(self.accelerator, self.model, self.ref_model)
                if self._contexts:
                    with self.teacher.active() as teacher:
                        check_rows_in_packs(self.accelerator, teacher)
                layers = self.args.compile_layers
                check_training_in_packs(self.accelerator, self.model, layers, twice=not self._direct)
                return PackedStep(self.accelerator, self.args.max_tokens_per_pack, self.args.compile_layers)
            except ModelError as refusal:
                fault = str(refusal)
        if wanted:
            raise ModelError(fault)
        logger.warning("Rollouts are read padded, not packed: %s", fault)
        return None

    def _prove(self) -> None:
        """Run the model on a few tokens: what we compute is what it computes, and each has its role."""
        called = Called(self.model, self.aux_loss_enabled, self._is_vlm)
        with self.accelerator.autocast(), in_training(self.model):
            head = head_of(called)
        if head.low_rank is not None and isinstance(self.teacher, AdaptersOff):  # whose head is another
            with self.accelerator.autocast(), self._as_teacher():
                head_of(called)
        self._vocab_size = getattr(head.weight, "ds_shape", head.weight.shape)[0]  # ZeRO-3 has taken the rows away
        if self._teacher_is_another:
            with self.accelerator.autocast(), self._as_teacher() as teacher:
                prove_teacher(teacher, self._vocab_size, self._is_vlm)
        self._check_roles()
        self._proved = True

    def _check_roles(self) -> None:
        """A ValueError where the student trains nothing, or the teacher depends on what is trained or on padding."""
        roles = Roles(
            model=self.model,
            embeddings=lambda model: self.accelerator.unwrap_model(model).get_input_embeddings(),
            as_teacher=self._as_teacher,
            read=lambda *row: self._read(lambda hidden, head: (hidden, *tensors_of(head)), *row)[0],
            vocabulary=min(self._vocab_size, len(self._tokenizer)),
            pad_token_id=self._pad_token_id,
            device=self.accelerator.device,
        )
        if not self._sharded:  # a forward with gradients and no backward would disturb FSDP
            roles.check_student()
            if isinstance(self.teacher, AdaptersOff):
                roles.check_adapters_off()
        if self._may_pad:
            if self._teacher_is_another or not self._contexts:  # else the teacher is of the student's architecture
                roles.check_padding("model", self._as_student)
            if self._contexts:
                roles.check_padding("teacher_model" if self._teacher_is_another else "model", self._as_teacher)

    @property
    def _may_pad(self) -> bool:
        """Whether a process ever generates for prompts of different lengths at once."""
        train = self.args.per_device_train_batch_size * self.args.steps_per_generation
        several = self.num_generations % train or self.num_generations_eval % self.args.per_device_eval_batch_size
        return bool(several) or self.pad_to_multiple_of is not None

    @property
    def gamma(self) -> float:
        """γ of the optimizer step in progress."""
        return self.args.gamma_at(self.state.global_step, self.state.max_steps)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    # ------------------------------------------------------------------------------------------- rewards, advantages

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

    # ------------------------------------------------------------------------------------------------------- teacher

    def teacher_prompt(self, example: Mapping[str, Any]) -> list[dict[str, str]]:
        """The teacher's conversation for one row of the dataset. Override it for another context.

        The row's ``prompt`` is what generation was given: with its images in the content's parts, and with what an
        environment says first.
        """
        return privileged_conversation(example, self.args.solution_column, self._teacher_template)

    @property
    def _readers(self) -> dict[str, Reader]:
        """By context, what reads and checks a row; without a teacher, one under no name for the student's prompt."""
        overridden = type(self).teacher_prompt is not EGRSDTrainer.teacher_prompt
        own = "teacher_prompt" if overridden else "teacher_template"
        words = {name: own if function == self.teacher_prompt else name for name, function in self._contexts.items()}
        return {
            name: Reader(
                self.processing_class,
                {"chat_template": self.chat_template, **self.chat_template_kwargs},
                self._contexts.get(name, lambda example: example["prompt"]),
                self.args.solution_column,
                context_window(self.model.config),
                self.max_completion_length,
                word,
                self.args.vllm_max_model_length if self.use_vllm and self.vllm_mode == "colocate" else None,
                self._is_vlm,
                self._tools_of,
                self.environment_factories is not None,
                self._teacher_window,
            )
            for name, word in (words or {"": own}).items()
        }

    def _tools_of(self, example: Mapping[str, Any]) -> Sequence[Any] | None:
        """The tools that the row's prompt is rendered with."""
        if self.environment_factories is None:
            return self.tools
        name = example.get("environment") if self._multi_environment else None
        if name not in self._env_tools:
            known = ", ".join(map(str, self._env_tools))
            raise ValueError(f"environment: expected one of {known}, as environment_factory has them, got {name!r}")
        return self._env_tools[name]

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

        if self._packed is not None and self._teacher_states is None:  # hidden states are kept padded
            found = *self._packed.read(model, input_ids, attention_mask, logits_to_keep, **self._scoring), None
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

    def _generate_and_score_completions(self, inputs):
        # A stream's rows are seen here first, so they are checked before anything is generated.
        names = [row_name(f"{self._mode}_dataset", example) for example in inputs]
        for reader in self._readers.values():
            reader.read(list(zip(names, inputs, strict=True)))
        output = super()._generate_and_score_completions(inputs)
        start = self.accelerator.process_index * len(inputs)
        ours = slice(start, start + len(inputs))
        if self.args.advantage == "welford":
            output["advantages"] = self._welford_advantages()[ours]
        output["reward"] = self._rewards[ours]
        given = [{**example, "prompt": prompt} for example, prompt in zip(inputs, self._given, strict=True)]
        completion = output["completion_ids"], output["completion_mask"], learned(output)
        size = self._rows_at_a_time()  # of the student's mode: the teacher's is another
        for context in self._contexts:
            prompts, images = self._teacher_prompts(context, names, given, output)
            batch = [
                x.to(self.accelerator.device) for x in pad_prompts(prompts, self._pad_token_id, self.pad_to_multiple_of)
            ]
            if self.args.divergence is not None:
                self._teacher_states = TeacherStates(self.teacher, self.accelerator.device)
            try:
                with self._as_teacher() as teacher:
                    output[f"{context}_logp"], output[f"{context}_entropy"] = self._statistics(
                        teacher, *batch, *completion, size, **images
                    )
                if self._teacher_states is not None:
                    # The generation is one optimizer step's: the head is the same for all of its micro-batches.
                    output[f"{context}_hidden"], self._teacher_head = self._teacher_states.take()
            finally:
                self._teacher_states = None
        if self.args.rollout_steps:
            output["reference"] = [example.get(self.args.solution_column) for example in inputs]
            ends = {*self.eos_token_ids, self._pad_token_id}
            output["truncated"] = [not ids or ids[-1] not in ends for ids in self._responses]
        return output if self._packed is None else with_index(self, output)

    def _generate(self, prompts):
        found = super()._generate(prompts)
        prompt_ids, responses, own, *_, tool_images = found
        # With the rows' images, and what environments say first. The teacher's prompt is made from these.
        self._given = prompts
        self._lengths = [len(ids) for ids in responses] if own is None else [sum(mask) for mask in own]
        self._tool_images = any(tool_images)
        if self.rollout_func is not None and self._contexts:
            rendered = self._tokenize_prompts(copy.deepcopy(prompts))[0]
            for prompt, ids, expected in zip(prompts, prompt_ids, rendered, strict=True):
                if list(ids) != list(expected):
                    raise ValueError(
                        "rollout_func: expected prompt_ids as the chat template renders them, since the teacher's are "
                        f"made from the same messages, got others for {excerpt(prompt)}"
                    )
        return found

    def _teacher_prompts(
        self, context: str, names: list[str], rows: list[dict[str, Any]], output: dict[str, Any]
    ) -> tuple[list[list[int]], dict[str, Any]]:
        """A context's prompts as token ids, and what TRL's pass over them takes of images: the student's, there."""
        reader = self._readers[context]
        conversations = reader.read(list(zip(names, rows, strict=True)))
        prompts, _, fields = self._tokenize_prompts(conversations)
        if not self._is_vlm:
            return prompts, {}
        for name, row, conversation, ids in zip(names, rows, conversations, prompts, strict=True):
            check_prompt(name, reader, row["prompt"], conversation, ids, output["completion_ids"].shape[1])
        images = {key: output[key] for key in (*MODEL_IMAGES, "num_images", "num_tiles") if key in output}
        kinds = None
        if self._tool_images:  # which TRL may have left out, and then all others with them
            shown = "pixel_values" in output
            kinds = {self._image_pad_token_id: 1, self._video_pad_token_id: 2} if shown else {}
        for key in TOKEN_TYPES:  # of the prompt's tokens, where images are; the student's are of its own
            if key in output:
                completion = output["completion_ids"]
                types = token_types(prompts, fields.get(key), completion, kinds, self.pad_to_multiple_of)
                images[key] = types.to(output[key])
        return prompts, images

    # ---------------------------------------------------------------------------------------------------------- loss

    def _prepare_inputs(self, generation_batch):
        if not self._proved:  # weights that were elsewhere at construction
            self._prove()
        self._pace.setdefault(self._mode, [0, time.perf_counter()])
        buffered = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._packed is not None:
            inputs = regrouped(self, buffered, inputs)
        if self._mode == "eval":
            self._begin_step()
            self._measure_steps([inputs])
        elif self._buffered_inputs is not buffered:
            self._measure_steps(self._buffered_inputs)
        return inputs

    def _begin_step(self) -> None:
        """Forget the micro-batches of the optimizer step before, which is logged, or was interrupted for good."""
        # Signals and entropy scale (valid tokens,) of the micro-batches so far.
        self._step_signals: list[dict[str, Tensor]] = []
        self._step_aux: list[Tensor] = []  # load-balancing losses, one a micro-batch
        self._step_rollouts: list[Rollout] = []

    def _measure_steps(self, batches: list[dict[str, Any]]) -> None:
        """Put the entropy scale of its optimizer step, and the direct loss's normaliser, into each micro-batch.

        Both are taken over the step's micro-batches on all processes: the loss is then the same however a step's
        rollouts are cut up. Where a generation does not hold whole steps, its micro-batches are one group.
        """
        local = torch.stack([self._amount_and_peak(batch) for batch in batches])
        every = self.accelerator.gather(local[None])  # (processes, batches, 2)
        accumulation = self.args.gradient_accumulation_steps
        size = len(batches) if len(batches) % accumulation else accumulation
        for start in range(0, len(batches), size):
            group = every[:, start : start + size]
            scale = group[..., 1].max().clamp(min=self.args.min_entropy_scale)
            # DDP, FSDP and DeepSpeed average gradients over processes: hence the division.
            normalizer = group[..., 0].sum().clamp(min=1) / self.accelerator.num_processes
            for batch in batches[start : start + size]:
                batch["entropy_scale"] = scale.float()
                if self._direct:
                    batch["normalizer"] = normalizer.float()

    def _amount_and_peak(self, batch: dict[str, Any]) -> Tensor:
        """(2,) float64 of one micro-batch: what it adds to the normaliser, and its entropy scale in nats."""
        mask, scale = learned(batch), self.args.entropy_scale
        if scale in ENTROPY_SCALES:
            peak = peak_entropy(batch, self._contexts, self.args)
        else:
            peak = torch.tensor(math.log(self._vocab_size) if scale == "log_vocab" else scale, device=mask.device)
        dr_grpo = self.args.loss_type == "dr_grpo"
        amount = torch.tensor(len(mask) * self.max_completion_length, device=mask.device) if dr_grpo else mask.sum()
        return torch.stack([amount.double(), peak.double()])

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

    @property
    def _direct(self) -> bool:
        return self.args.direct and self._token_advantage is None

    def _compute_loss(self, model, inputs):
        if self._direct and self._packed is not None:
            return self._packed_direct_loss(self._packed, model, inputs, done=functools.partial(self._account, inputs))
        loss, signals = (self._direct_loss if self._direct else self._trl_loss)(model, inputs)
        self._account(inputs, signals)
        return loss

    def _account(self, inputs: dict[str, Any], signals: dict[str, Tensor]) -> None:
        """Keep a micro-batch's signals for the metrics of its optimizer step, which its last one logs."""
        mask = learned(inputs)
        signals["entropy_scale"] = inputs["entropy_scale"].expand(mask.shape)
        kept = torch.stack(list(signals.values()))[:, mask]  # at once: the host waits for how many they are
        self._step_signals.append(dict(zip(signals, kept, strict=True)))
        step = self.state.global_step + 1
        export = self._mode == "train" and self.args.rollout_steps and step % self.args.rollout_steps == 0
        if export:
            stats = TokenStats(*(signals[name] for name in TokenStats._fields))
            self._step_rollouts += rollouts_of(inputs, mask, stats, step, self._vocab_size, self._tokenizer)
        if self._mode == "eval" or self.accelerator.sync_gradients:  # the step's last micro-batch
            self._log_step()
            if export:
                self._write_rollouts(step)
            self._begin_step()

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

    def _direct_loss(self, model, inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """The same with the gradient in the loss's own pass: see :attr:`EGRSDConfig.direct`."""
        advantages, of_tokens, options = self._fused_arguments(inputs)
        teacher_hidden = of_tokens.pop("teacher_hidden", None)

        def loss_of(hidden, head):
            return fused_egrsd_loss(
                hidden, head, teacher_hidden, inputs["completion_ids"], advantages, **of_tokens, **options,
                return_stats=True,
            )  # fmt: skip

        keys = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        batch = (inputs[key] for key in keys)
        images = {key: inputs[key] for key in (*MODEL_IMAGES, *TOKEN_TYPES) if key in inputs}
        (loss, stats), output = self._read(loss_of, model, *batch, router=self.aux_loss_enabled, **images)
        if self.aux_loss_enabled:
            # As TRL weighs it: the mean over micro-batches, whatever their tokens.
            accumulation = self.current_gradient_accumulation_steps if self._mode == "train" else 1
            loss = loss + self.router_aux_loss_coef * output.aux_loss / accumulation
            self._step_aux.append(output.aux_loss.detach())
        return loss, self._fused_signals(inputs, stats)

    def _packed_direct_loss(
        self, packed: PackedStep, model, inputs, done: Callable[[dict[str, Tensor]], None]
    ) -> Tensor:
        """The same in packs, in one forward of each; its signals are known, and done called with them, after these."""
        advantages, of_tokens, options = self._fused_arguments(inputs)
        target_ids = inputs["completion_ids"]
        if advantages.ndim == 1:
            advantages = advantages[:, None].expand(target_ids.shape)
        stats = TokenStats(*(torch.zeros(target_ids.shape, device=target_ids.device) for _ in TokenStats._fields))

        def share_of(part, hidden, head):
            here = {name: part.of(values) for name, values in of_tokens.items()}
            here["mask"] = here["mask"] & part.counted
            loss, found = fused_egrsd_loss(
                hidden, head, here.pop("teacher_hidden", None), part.target_ids, part.of(advantages),
                cu_seqlens=part.cu_seqlens, **here, **options, return_stats=True,
            )  # fmt: skip
            for into, values in zip(stats, found, strict=True):
                part.put(into, values)
            return loss

        pair = ("prompt", "completion")
        ids, mask = (torch.cat([inputs[f"{name}_{kind}"] for name in pair], dim=1) for kind in ("ids", "mask"))
        parts = packed.parts(model, ids, mask, target_ids.shape[1])
        return packed.direct(model, parts, share_of, lambda: done(self._fused_signals(inputs, stats)))

    def _fused_arguments(self, inputs) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
        """Advantages (B,) or (B, T), further arguments of the fused loss (B, T) or (B, T, D) each, and the others."""
        mask, advantages = learned(inputs), inputs["advantages"]
        (context,) = self._contexts
        ratio = inputs.get("importance_sampling_ratio")
        if ratio is not None:  # vLLM's correction; it is not negative, so it leaves sign(A) alone
            advantages = (advantages[:, None] * ratio).expand(mask.shape)
            if self.args.divergence is not None:  # it has no advantage that could be 0 where the correction drops
                mask = mask & (ratio != 0)
        if self.args.position_weight:
            place = position_weights(mask, position=self.args.position_weight)
            advantages = (advantages if advantages.ndim == 2 else advantages[:, None]) * place
        of_tokens = {
            "mask": mask,
            "teacher_logp": inputs[f"{context}_logp"],
            "teacher_entropy": inputs[f"{context}_entropy"],
        }
        options = {
            "entropy_scale": inputs["entropy_scale"],
            "normalizer": inputs["normalizer"],
            "gamma": self.gamma,
            **{name: getattr(self.args, name) for name in CREDIT},
            **self._head_options,
            **self._gradient_options,
        }
        if self.args.divergence is not None:
            of_tokens["teacher_hidden"] = inputs[f"{context}_hidden"]
            options |= {"teacher_weight": self._teacher_head} | {name: getattr(self.args, name) for name in DIVERGENCE}
        return advantages, of_tokens, options

    def _fused_signals(self, inputs, stats: TokenStats) -> dict[str, Tensor]:
        if inputs.get("importance_sampling_ratio") is None:
            return stats._asdict()
        # What is logged is the method's, as on the other path.
        evidence = evidence_of(inputs, inputs["advantages"], stats.student_logp, self._contexts, self.args, self.gamma)
        own = {name: getattr(stats, name) for name in ("gradient_error_bound", "divergence")}
        return signals_of(evidence, None) | own

    def _log_step(self) -> None:
        """Metrics of one optimizer step, exact over its micro-batches and processes, into TRL's own averages."""
        calls = len(self._step_signals) * self.accelerator.num_processes
        tokens = gathered_tokens(self._step_signals, self.accelerator)
        metrics = self._token_metrics(tokens, calls)
        memory = torch.tensor([peak_memory_gib(self.accelerator.device)], device=self.accelerator.device)
        metrics["peak_memory_gib"] = self.accelerator.gather(memory).max().item()
        if self._step_aux:
            metrics["aux_loss"] = self.accelerator.gather(torch.stack(self._step_aux)).mean().item()
        for name, value in metrics.items():
            self._metrics[self._mode][name].append(value)
        # TRL logs a mean over steps, of which only some generate: hence one value, of all tokens and all the time.
        pace = self._pace[self._mode]
        pace[0] += len(tokens["student_logp"])
        self._metrics[self._mode]["tokens_per_second"] = [pace[0] / (time.perf_counter() - pace[1])]

    def _token_metrics(self, tokens: Mapping[str, Tensor], calls: int) -> dict[str, float]:
        """Metrics of ``tokens``: by name, (N,) each, the signals and the entropy scale of ``calls`` micro-batches."""
        args = self.args
        if "gate" not in tokens:
            metrics = evidence_metrics(tokens, self._contexts)
            if not math.isfinite(metrics.get("token_advantage/abs_mean", 0.0)):  # on a GPU nobody has looked yet
                raise ValueError("token_advantage: expected no NaN and no infinity at a valid position, got some")
            return metrics
        return {"gamma": self.gamma} | token_metrics(
            tokens,
            gamma=self.gamma,
            gate_floor=args.gate_floor,
            clip_eps=args.clip_eps,
            scale=tokens["entropy_scale"],
            log_vocab=math.log(self._vocab_size),
            tau_low=args.tau_low,
            tau_high=args.tau_high,
            divergence=args.divergence is not None,
            sparse_calls=calls if self._direct and args.grad_mode == "sparse" else 0,
        )

    def log(self, *args, **kwargs):
        super().log(*args, **kwargs)
        self._pace.pop(self._mode, None)

    def _write_rollouts(self, step: int) -> None:
        rollouts = gather_object(self._step_rollouts)
        path = rollout_file(self.args.output_dir, step)
        if self.accelerator.is_main_process:
            try:
                write_rollouts(path, rollouts)
            except OSError as error:  # a full disk, for example: no reason to lose the run
                if not self._export_failed:
                    logger.warning(
                        f"rollout_steps: {path}: {error.strerror or error}; training goes on without this file, and "
                        f"without a word on later ones that cannot be written"
                    )
                self._export_failed = True

    # --------------------------------------------------------------------------------------------------- checkpoints

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        sampler.__class__ = ResumableSampler
        sampler.epoch = lambda: int(self.state.epoch or 0)
        return sampler

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
        self._begin_step()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    @property
    def _settings(self) -> dict[str, Any]:
        """What this run is, as JSON has it."""
        return self.args.of_the_run() | self._identity | {"packing": self._packed is not None}

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
