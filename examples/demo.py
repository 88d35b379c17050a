"""Entropy-guided reinforced self-distillation for real, small enough for a CPU: train, plot, and show the tokens.

    python examples/demo.py                      # about three minutes on two CPU cores; a GPU is used where there is one
    python examples/demo.py --gamma 0            # without the entropy gate
    python examples/demo.py --lookahead 0        # EGRSD instead of CL-EGRSD

A small Qwen3 model learns sums such as ``23+8-5+9``. A short supervised warm-up shows it three ways to answer: to work
in verbose steps, to work in terse steps, or to blurt the answer out. Then comes what the method is about: it samples its
own answers, a checker rewards the right ones (and the shorter ones more), and the same backbone with its LoRA adapters
disabled, which has seen a reference solution, says how much each token should count.
"""

import argparse
import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from egrsd_kernels import fused_egrsd_loss
from torch import Tensor, nn

from egrsd_kernels.advantages import WelfordAdvantage
from egrsd_kernels.regimes import regime_shares
from egrsd_kernels.report import Rollout, write_token_report
from egrsd_kernels.rewards import length_shaped_reward
from egrsd_kernels.teacher import AlignedBatch, align_responses, pad_inputs, response_hidden, teacher_messages

try:
    from peft import LoraConfig, PeftModel, get_peft_model
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
except ImportError as error:
    raise ImportError(f"the demo needs {error.name}: pip install 'egrsd-kernels[train]'") from error

MAX_RESPONSE = 64  # L_max, tokens
HELD_OUT = 256  # problems never trained on

# ---------------------------------------------------------------------------------------------------------------- task


@dataclass(frozen=True)
class Problem:
    """A sum of signed terms whose running total stays within 0..20."""

    terms: tuple[int, ...]

    @property
    def question(self) -> str:
        return str(self.terms[0]) + "".join(f"{term:+d}" for term in self.terms[1:])

    @property
    def answer(self) -> int:
        return sum(self.terms)

    def solution(self, style: str) -> str:
        """A right answer in one of three styles: verbose steps, terse steps, or none at all."""
        lines, total = [], self.terms[0]
        if style == "verbose":
            lines.append(f"start with {total}")
        for term in self.terms[1:]:
            step = f"{total}{term:+d}={total + term}"
            if style == "verbose":
                step = f"{'add' if term > 0 else 'take'} {abs(term)}: {step}"
            lines.append(step)
            total += term
        final = f"so the answer is {total}" if style == "verbose" else f"answer {total}"
        return "\n".join([final] if style == "blurt" else [*lines, final])

    def accepts(self, response: str) -> bool:
        """The verifier: the final answer alone counts, in whatever style."""
        found = re.search(r"answer (?:is )?(\d+)$", response)
        return found is not None and int(found[1]) == self.answer


def sample_problem(rng: random.Random) -> Problem:
    terms = [rng.randint(1, 20)]
    for _ in range(rng.randint(2, 4)):
        total = sum(terms)
        terms.append(rng.choice([term for term in range(-9, 10) if term and 0 <= total + term <= 20]))
    return Problem(tuple(terms))


def sample_problems(rng: random.Random, count: int, exclude: frozenset[Problem] = frozenset()) -> list[Problem]:
    problems: list[Problem] = []
    while len(problems) < count:
        problem = sample_problem(rng)
        if problem not in exclude:
            problems.append(problem)
    return problems


# -------------------------------------------------------------------------------------------------- tokenizer and model

SPECIAL = ["<pad>", "<end>", "<user>", "<assistant>"]
WORDS = ["start", " with", "add", "take", "so", " the", "answer", " answer", " is", "again"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# The teacher's two turns in the words this model knows; a pretrained model takes the default of teacher_messages.
TEACHER_TEMPLATE = ({"role": "assistant", "content": "{solution}"}, {"role": "user", "content": "again"})


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words, and every digit, sign, blank and line break a token of its own."""
    vocabulary = [*SPECIAL, *WORDS, *"0123456789", "+", "-", "=", ":", " ", "\n"]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[a-z]+|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=SPECIAL[2:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=256,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
