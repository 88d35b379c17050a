"""Settings of a training run: GRPOConfig's, and the method's own."""

import argparse
import contextlib
import json
import math
import os
import sys
import typing
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, ClassVar

from transformers import TrainingArguments
from transformers.hf_argparser import string_to_bool
from trl import GRPOConfig

from egrsd_kernels.backends import DEFAULT_SPARSE_TOL, Divergence
from egrsd_kernels.checks import expect, flag, integer, number
from egrsd_kernels.credit import ENTROPY_SCALES, FILTER_NUMBERS, FILTERS, TAU_HIGH, TAU_LOW, Lookahead
from egrsd_kernels.packing.head import check_compile_layers
from egrsd_kernels.packing.layers import CUDA_GRAPHS
from egrsd_kernels.rl.token_advantages import WITHOUT_TEACHER

from .former import RENAMED, check_former, in_present_words
from .grpo_settings import KNOWN
from .methods import TEACHER, settle
from .packed_rows import MAX_TOKENS_PER_PACK

if typing.TYPE_CHECKING:
    from egrsd_kernels.packing.head import CompileLayers
else:
    CompileLayers = str | None  # a parser of command lines takes one type

CHOICES = {
    "advantage": ("welford", "group"),
    "backend": ("auto", "triton", "torch"),
    "grad_mode": ("exact", "sparse"),
    "lookahead_filter": FILTERS,
    "gamma_schedule": ("constant", "linear", "cosine"),
    "loss_type": ("dapo", "dr_grpo", "grpo", "bnpo", "cispo", "sapo", "vespo", "luspo"),
    "teacher_model_kind": ("base", "adapters_off", "frozen", "ema"),
}
# Whole numbers; and others, which are at least 0.
AT_LEAST = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
    "num_generations": 1, "num_iterations": 1, "max_completion_length": 1, "welford_warmup_steps": 1,
    "teacher_sync_steps": 1, "chunk_mib": 1, "max_tokens_per_pack": 1, "lookahead": 0, "rollout_steps": 0, "seed": 0,
    "data_seed": 0,
}  # fmt: skip
BOUNDS: dict[str, dict[str, float]] = {
    "learning_rate": {},
    "beta": {},
    "epsilon": {},
    "epsilon_high": {},
    "delta": {"strict": True},
    "top_entropy_quantile": {"high": 1},
    "off_policy_mask_threshold": {},
    "temperature": {"strict": True},
    "min_p": {"high": 1},
    "top_p": {"high": 1, "strict": True},
    "gamma": {},
    "gate_floor": {"high": 1},
    "clip_eps": {"high": 1},
    "min_entropy_scale": {"strict": True},
    "position_weight": {"low": -1, "high": 1},
    "prefix_weight": {},
    "sparse_tol": {"high": 1, "strict": True},
    "length_beta": {},
    **{f"lookahead_{name}": bounds for name, (_, bounds) in FILTER_NUMBERS.items()},
    "teacher_update_rate": {"high": 1},
    "tau_low": {},
    "tau_high": {"high": 1},
}
SCALES = (*ENTROPY_SCALES, "log_vocab")

# TRL's settings that have to keep their defaults, and why: ignoring one in silence would be worse than an error.
REFUSED = {
    "cast_lm_head_to_fp32": "logits are made in float32 anyway",
    "use_liger_kernel": 'TRL gives it up; model_init_kwargs={"use_kernels": True} has such layers',
}
LEVELS = ("token", "sequence_token")
# Terms and masks of TRL's loss that its plain policy gradient lacks. With their defaults they change nothing.
TERMS = (
    "beta", "delta", "entropy_coef", "off_policy_mask_threshold", "top_entropy_quantile", "use_adaptive_entropy",
)  # fmt: skip
GROUP_ONLY = ("multi_objective_aggregation", "scale_rewards")
PARALLEL = {"tp_size": "tensor", "cp_size": "context", "sp_size": "sequence"}

# A run is told by all settings of ours but SAME_RUN, and by OTHER_RUN of TRL's and transformers'. Its length may
# change, and what it logs, saves and writes.
# What token_advantage makes of other settings tells a run, and so does what packing has come to; which model teaches,
# the checkpoint knows by its weights.
SAME_RUN = (
    "packing", "max_tokens_per_pack", "compile_layers", "backend", "chunk_mib", "rollout_steps", "tau_low", "tau_high",
    "overwrite_output_dir", "resume_changed", "token_advantage", "teacher_model_name_or_path",
    "teacher_model_revision", "teacher_model_init_kwargs",
)  # fmt: skip
OTHER_RUN = (
    "adam_beta1", "adam_beta2", "adam_epsilon", "beta", "bf16", "chat_template_kwargs", "data_seed", "delta",
    "entropy_coef", "entropy_coef_delta", "entropy_coef_max", "entropy_coef_min", "entropy_target", "epsilon",
    "epsilon_high", "fp16", "generation_batch_size", "generation_kwargs", "gradient_accumulation_steps",
    "importance_sampling_level", "learning_rate", "loss_type", "lr_scheduler_kwargs", "lr_scheduler_type",
    "mask_truncated_completions", "max_completion_length", "max_grad_norm", "max_tool_calling_iterations", "min_p",
    "multi_objective_aggregation", "num_generations", "num_iterations", "off_policy_mask_threshold", "optim",
    "optim_args", "per_device_train_batch_size", "ref_model_mixup_alpha", "ref_model_sync_steps", "repetition_penalty",
    "reward_weights", "router_aux_loss_coef", "sapo_temperature_neg", "sapo_temperature_pos", "scale_rewards", "seed",
    "shuffle_dataset", "steps_per_generation", "sync_ref_model", "temperature", "top_entropy_quantile", "top_k",
    "top_p", "use_adaptive_entropy", "use_bias_correction_kl", "vespo_k_neg", "vespo_k_pos", "vespo_lambda_neg",
    "vespo_lambda_pos", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min",
    "vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "warmup_ratio", "warmup_steps",
    "weight_decay",
)  # fmt: skip


@dataclass
class EGRSDConfig(GRPOConfig):
    """GRPOConfig with the settings of EGRSD and CL-EGRSD (arXiv 2605.13255); each field's ``help`` says what it does.

    Baselines have names, as ``token_advantage``; ``gamma=0`` is RLSD, too, and ``gamma=0, clip_eps=0`` is REINFORCE
    that watches a teacher.

    The objective is TRL's, with Â = A · w · ω in the place of its advantage: ``loss_type``, ``num_iterations``,
    ``epsilon``, ``beta`` and the others mean what GRPOConfig says. :attr:`direct` tells where it is the paper's plain
    policy gradient.

    Raises:
        TypeError, ValueError: in one line that names the setting, what it got and what it expects.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*GRPOConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

    # None is the default that the help states, or what token_advantage fixes; it tells what is given from what is not.
    token_advantage: str | None = field(
        default=None,
        metadata={
            "help": 'What a token is worth: "grpo" or "reinforce", without a teacher; "rlsd", without a gate; "egrsd"; '
            '"cl_egrsd". Default: what gamma, lookahead and clip_eps make of EGRSD.'
        },
    )
    gamma: float | None = field(
        default=None, metadata={"help": "Strength γ of the entropy gate. 0 is RLSD. Default: 0.3."}
    )
    gamma_schedule: str = field(
        default="constant", metadata={"help": '"constant", or "linear" or "cosine" from gamma to gamma_end.'}
    )
    gamma_end: float | None = field(default=None, metadata={"help": "γ at the end of its schedule."})
    gamma_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps until gamma_end is reached. Default: the whole run."}
    )
    gate_floor: float = field(default=0.1, metadata={"help": "Lower bound of the gate."})
    lookahead: int | None = field(
        default=None,
        metadata={"help": "Lookahead window W in tokens. 0 is EGRSD, more CL-EGRSD. Default: 0; 3 for cl_egrsd."},
    )
    lookahead_filter: str = field(
        default="minimum",
        metadata={
            "help": 'How entropies are filtered over the window, each at most H_t: "minimum", of H_j; "discounted", '
            'the minimum of λ^-(j - t) H_j; "softmin", -τ log mean exp(-H_j / τ); "quantile", the q-quantile of H_j.'
        },
    )
    lookahead_decay: float = field(
        default=1.0, metadata={"help": 'λ in (0, 1], of the filter "discounted"; 1 is the minimum.'}
    )
    lookahead_temperature: float = field(
        default=0.0, metadata={"help": 'τ, nats, of the filter "softmin"; 0 is the minimum, a large one near the mean.'}
    )
    lookahead_quantile: float = field(
        default=0.0, metadata={"help": 'q in [0, 1], of the filter "quantile"; 0 is the minimum, 1 no lookahead.'}
    )
    position_weight: float = field(
        default=0.0,
        metadata={
            "help": "κ in [-1, 1]: A is weighed by 1 + κ (2u - 1), u the token's relative position in its response; "
            "above 0 the end counts more, below 0 the beginning."
        },
    )
    prefix_weight: float = field(
        default=0.0,
        metadata={
            "help": "η: A is weighed by 1 + η (1 - a), a the share of the response's |log p_T - log p_S| that lies "
            "before the token. The gradient is then made by TRL's loss."
        },
    )
    clip_eps: float | None = field(
        default=None, metadata={"help": "ε: the magnitude is clipped to 1 ± ε. 0 turns it off. Default: 0.2."}
    )
    entropy_scale: str = field(
        default="batch_max",
        metadata={
            "help": 'What entropies are divided by: "batch_max", the largest teacher entropy of the optimizer step '
            '(Eq. 8), or of the generation where that does not hold whole steps; "batch_max_lookahead", the largest '
            'after the lookahead (Algorithm 1); "log_vocab"; or nats.'
        },
    )
    min_entropy_scale: float = field(default=1.0, metadata={"help": "Lower bound of that scale, nats."})
    divergence: str | None = field(
        default=None,
        metadata={
            "help": 'Adds divergence_weight · ω · D: "reverse_kl", KL(p_S ‖ p_T); "forward_kl"; or "jsd". Each rollout '
            "then serves one update, and TRL's loss has no further term. Default: none."
        },
    )
    divergence_weight: float = field(default=1.0, metadata={"help": "The divergence's weight, above 0."})
    divergence_beta: float = field(default=0.5, metadata={"help": 'β in (0, 1), the teacher\'s share of "jsd".'})
    divergence_top_k: int | None = field(
        default=None,
        metadata={"help": "Of the teacher's k likeliest entries and all others as one. Default: the full vocabulary."},
    )
    policy_weight: float = field(
        default=1.0, metadata={"help": "The weight of −Â log p beside a divergence; 0: the divergence alone."}
    )
    loss_type: str = field(
        default="dapo",
        metadata={
            "help": 'The policy loss, in TRL\'s words: "dapo" is divided by the response tokens of the optimizer step, '
            '"dr_grpo" by its rollouts times max_completion_length; "grpo", "bnpo", "cispo", "sapo", "vespo" and '
            '"luspo" are as GRPOConfig has them.'
        },
    )
    importance_sampling_level: str = field(
        default="token",
        metadata={
            "help": 'Of the ratio π/π_old: "token"; or "sequence_token" (GSPO-token), the sequence\'s ratio with each '
            "token's own gradient. TRL's \"sequence\" is refused: it gives every token the mean of their credits."
        },
    )
    advantage: str | None = field(
        default=None,
        metadata={
            "help": '"welford": running statistics of all rewards; "group": TRL\'s, relative to the prompt. Default: '
            '"welford"; "group" for grpo.'
        },
    )
    welford_warmup_steps: int = field(
        default=10, metadata={"help": "Generations with a judged rollout that have the fixed baseline 0.5."}
    )
    length_beta: float = field(
        default=0.5,
        metadata={"help": "β_L: the largest bonus for a short response, where the sum of its rewards is positive."},
    )
    solution_column: str = field(default="solution", metadata={"help": "Dataset column of the reference solution."})
    # These three are TRL's words. None is the default that the help states; it tells what is given from what is not.
    teacher_model_kind: str | None = field(
        default=None,
        metadata={
            "help": '"adapters_off": the base model under the adapters; "frozen": a copy of the trained weights as '
            'they were at the start; "ema": their moving average; "base": adapters_off with adapters, else frozen. '
            'Default: "base".'
        },
    )
    teacher_update_rate: float | None = field(
        default=None,
        metadata={"help": "Share of the student in each update of the EMA teacher; 1: a copy. Default: 0.001."},
    )
    teacher_sync_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps between updates of the EMA teacher. Default: 1."}
    )
    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A model of its own as the teacher. Default: teacher_model_kind makes one of the student."},
    )
    teacher_model_revision: str | None = field(default=None, metadata={"help": "Its revision."})
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "What its from_pretrained gets, for example dtype and device_map."},
    )
    backend: str = field(default="auto", metadata={"help": 'Kernels: "auto", "triton" or "torch".'})
    packing: bool | None = field(
        default=None,
        metadata={
            "help": "Whether rollouts are read in packs, every prefix that they share once and no padding, and those "
            "of a prompt stay beside one another. Default: on a GPU in 16 bits, where the model and the other settings "
            "allow it; the log says why not."
        },
    )
    max_tokens_per_pack: int = field(
        default=MAX_TOKENS_PER_PACK,
        metadata={
            "help": "With packing, the most tokens of a forward, and four times as many of one on a GPU without a "
            "gradient; a longer rollout is one alone."
        },
    )
    compile_layers: CompileLayers = field(
        default=None,
        metadata={
            "help": "With packing, whether decoder layers run compiled; "
            '"cudagraphs": as CUDA graphs as well. Default: compiled on a GPU in 16 bits, unless weights are sharded, '
            "a forward with dropout is made twice, or a layer does not compile."
        },
    )
    chunk_mib: int = field(default=1024, metadata={"help": "The most working memory of the loss, MiB."})
    grad_mode: str = field(
        default="exact",
        metadata={
            "help": '"exact"; or, experimental, "sparse": leaves out what carries little of the gradient, within '
            "sparse_tol."
        },
    )
    sparse_tol: float = field(
        default=DEFAULT_SPARSE_TOL, metadata={"help": "The most that sparse gradients leave out, of their L1 norm."}
    )
    tau_low: float = field(default=TAU_LOW, metadata={"help": "Regimes: H / log V up to this is certain."})
    tau_high: float = field(default=TAU_HIGH, metadata={"help": "Regimes: H / log V from this on is uncertain."})
    rollout_steps: int = field(
        default=0,
        metadata={"help": "Export the rollouts of every n-th step to output_dir/rollouts (JSON lines). 0: never."},
    )
    # A name that transformers had until its version 5.
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Remove another run's checkpoints, rollouts and trainer_state.json from output_dir."},
    )
    resume_changed: bool = field(
        default=False, metadata={"help": "Resume from a checkpoint although this run's settings are others."}
    )
    teacher: str | None = field(default=None, metadata={"help": "Deprecated: teacher_model_kind."})
    teacher_ema_decay: float | None = field(
        default=None, metadata={"help": "Deprecated: teacher_update_rate, which is 1 less this."}
    )
    teacher_copy_steps: int | None = field(default=None, metadata={"help": "Deprecated: teacher_sync_steps."})

    def __post_init__(self):
        self._check_parallelism()
        why = "False: reward functions read the columns that it would remove"
        expect(not self.remove_unused_columns, "remove_unused_columns", self.remove_unused_columns, why)
        self._take_former_names()
        settle(self)
        self._check_values()  # before TRL divides by some of them
        super().__post_init__()
        for name, ours in {"max_new_tokens": "max_completion_length", "temperature": "temperature"}.items():
            absent = name not in (self.generation_kwargs or {})
            expect(absent, "generation_kwargs", self.generation_kwargs, f"no {name}: set {ours}, which the loss reads")

        defaults = {f.name: f.default for f in fields(GRPOConfig)}
        for name, why in REFUSED.items():
            value, default = getattr(self, name), defaults[name]
            expect(value == default, name, value, f"{default!r}: {why}")
        if self.advantage == "welford":
            for name in GROUP_ONLY:
                value, default = getattr(self, name), defaults[name]
                expect(value == default, name, value, f'{default!r} unless advantage is "group"')
        if self.length_beta or self.loss_type == "dr_grpo":
            why = 'a number of tokens: length_beta and loss_type="dr_grpo" divide by it'
            expect(self.max_completion_length is not None, "max_completion_length", None, why)
        self._check_loss()

    def _check_loss(self) -> None:
        """A ValueError for settings of TRL's loss that contradict one another, or token credit."""
        level, why = self.importance_sampling_level, '"sequence" would give each token the mean of the tokens\' credits'
        expect(level in LEVELS, "importance_sampling_level", level, f"one of {', '.join(LEVELS)}: {why}")
        bound = 'at least 1 with loss_type="cispo", which clamps the weight of the gradient there'
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        expect(self.loss_type != "cispo" or high >= 1, "epsilon_high", self.epsilon_high, bound)
        why = (
            "None unless each rollout serves one update, with a teacher, loss_type dapo or dr_grpo and no further term"
        )
        expect(self.divergence is None or self.direct, "divergence", self.divergence, why)
        why = "False with beta 0, which has no reference model"
        expect(bool(self.beta) or not self.sync_ref_model, "sync_ref_model", self.sync_ref_model, why)
        bonus = bool(self.entropy_coef) or self.use_adaptive_entropy
        why = '"exact" with an entropy bonus, whose gradient is not sparse'
        expect(self.grad_mode == "exact" or not bonus, "grad_mode", self.grad_mode, why)

    @property
    def direct(self) -> bool:
        """Whether the loss is −Σ Â log p over the tokens of an optimizer step, or over their most, and nothing else.

        So it is where each rollout serves one update, by the policy that made it (TRL's ratio is 1 then), and no
        setting adds a term or a mask, nor is one given that only a later TRL knows; and where no weight of a token asks
        for log p of the tokens after it.
        :func:`egrsd_kernels.fused_egrsd_loss` then makes it, with the gradient in the same pass. A generation is one
        optimizer step's, whose tokens are therefore known before its first backward.
        """
        defaults = {f.name: f.default for f in fields(GRPOConfig)}
        once = self.num_iterations == 1 and self.steps_per_generation == self.gradient_accumulation_steps
        plain = self.loss_type in ("dapo", "dr_grpo")
        taught = self.token_advantage not in WITHOUT_TEACHER
        unknown = defaults.keys() - KNOWN - {f.name for f in fields(TrainingArguments)}
        plain = plain and not self.prefix_weight
        return taught and once and plain and all(getattr(self, name) == defaults[name] for name in {*TERMS, *unknown})

    def _take_former_names(self) -> None:
        """Say by their present names what is given by former ones."""
        if self.grad_mode == "auto":
            self.grad_mode = "exact"
            _deprecated("grad_mode='auto'", "grad_mode='exact'")
        former = {name: getattr(self, name) for name in RENAMED if getattr(self, name) is not None}
        if not former:
            return
        check_former(former)
        present = in_present_words(former)
        words = " and ".join(f"{name}={value!r}" for name, value in former.items())
        for name, value in present.items():
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: given twice, also by the former {words}: leave that out")
            setattr(self, name, value)
        for name in former:
            setattr(self, name, None)
        _deprecated(words, ", ".join(f"{name}={value!r}" for name, value in present.items()))

    def _check_values(self) -> None:
        """Each setting by itself, and what only settings of ours say of one another."""
        # TRL says what None means there.
        hints = typing.get_type_hints(GRPOConfig)  # a parser has changed the fields' own types
        optional = {
            f.name for f in fields(GRPOConfig) if f.default is None or NoneType in typing.get_args(hints[f.name])
        }
        checks: list[tuple[Callable[..., Any], str, dict[str, Any]]]
        checks = [(integer, name, {"low": low}) for name, low in AT_LEAST.items()]
        checks += [(number, name, {"low": 0} | bounds) for name, bounds in BOUNDS.items()]
        checks += [(_one_of, name, {"allowed": allowed}) for name, allowed in CHOICES.items()]
        checks += [(_scale, "entropy_scale", {})]
        for check, name, bounds in checks:
            value = getattr(self, name)
            if value is not None or name not in optional or name in CHOICES:
                setattr(self, name, check(name, value, **bounds))
        if self.packing is not None:
            flag("packing", self.packing)
        self.compile_layers = _compile_layers(self.compile_layers)
        why = "None or False without packing"
        expect(self.packing is not False or not self.compile_layers, "compile_layers", self.compile_layers, why)
        expect(self.tau_low < self.tau_high, "tau_low", self.tau_low, f"less than tau_high = {self.tau_high}")
        Lookahead.of(self)
        weights = self.divergence_weight, self.policy_weight
        # The vocabulary is not known yet: the loss compares the number with it.
        Divergence.of_loss(self.divergence, *weights, self.divergence_beta, self.divergence_top_k, sys.maxsize)
        expect(
            self.divergence is None or self.grad_mode == "exact",
            "grad_mode",
            self.grad_mode,
            '"exact", since there is a divergence',
        )
        self._check_schedule()

    def _check_schedule(self) -> None:
        if self.gamma_schedule == "constant":
            for name in ("gamma_end", "gamma_steps"):
                expect(getattr(self, name) is None, name, getattr(self, name), "None with a constant gamma_schedule")
            return
        expect(self.gamma_end is not None, "gamma_end", None, f'a number with gamma_schedule="{self.gamma_schedule}"')
        self.gamma_end = number("gamma_end", self.gamma_end, low=0)
        if self.gamma_steps is not None:
            integer("gamma_steps", self.gamma_steps, low=1)

    def _check_parallelism(self) -> None:
        """A ValueError for what spreads a model or a sequence over processes: the loss would read parts as wholes."""
        # Not every version of transformers has the field; `accelerate launch` passes it on in the environment.
        parallelism = getattr(self, "parallelism_config", None)
        launched = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() == "true"
        for name, kind in PARALLEL.items():
            size = getattr(parallelism, name, None) or 1
            if parallelism is None and launched:
                size = int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1"))
            expect(size == 1, "parallelism_config", size, f"{name} 1, {kind} parallelism is not supported")
        loading = self.model_init_kwargs if isinstance(self.model_init_kwargs, dict) else {}
        for name in ("tp_plan", "tp_size", "device_mesh"):
            value = loading.get(name)
            if value not in (None, 1):
                raise ValueError(f"model_init_kwargs: {name}: tensor parallelism is not supported, got {value!r}")

    def of_the_run(self) -> dict[str, Any]:
        """The settings that a run cannot change and remain the same run, as JSON has them."""
        ours = {f.name for f in fields(self)} - {f.name for f in fields(GRPOConfig)}
        names = ours.difference(SAME_RUN, RENAMED, TEACHER).union(OTHER_RUN)
        if self.teacher_model_kind == "ema":  # the checkpoint knows the other kinds
            names |= TEACHER.keys()
        return json.loads(json.dumps({name: getattr(self, name) for name in sorted(names) if hasattr(self, name)}))

    def gamma_at(self, step: int, max_steps: int) -> float:
        """γ of the optimizer step after ``step`` finished ones, in a run of ``max_steps``."""
        assert self.gamma is not None  # settle has put in its default
        if self.gamma_end is None:  # a constant schedule
            return self.gamma
        done = min(step / max(self.gamma_steps or max_steps, 1), 1.0)
        if self.gamma_schedule == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.gamma + (self.gamma_end - self.gamma) * done


def _deprecated(old: str, new: str) -> None:
    """Warn where the config is made: below this are _take_former_names, __post_init__ and __init__."""
    warnings.warn(f"{old}: deprecated, write {new}", FutureWarning, stacklevel=5)


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> str:
    expect(value in allowed, name, value, "one of " + ", ".join(allowed))
    return value


def _compile_layers(value: Any) -> CompileLayers:
    if isinstance(value, str) and value != CUDA_GRAPHS:  # a command line passes text
        with contextlib.suppress(argparse.ArgumentTypeError):
            value = string_to_bool(value)
    return check_compile_layers(value)


def _scale(name: str, value: Any) -> str | float:
    if value in SCALES:
        return value
    try:  # a command line passes text
        value = float(value)
    except (TypeError, ValueError):
        expect(False, name, value, f"one of {', '.join(SCALES)}, or nats")
    return number(name, value, low=0, strict=True)
