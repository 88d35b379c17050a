"""What a whole step is measured on: Qwen3's shapes with random weights and LoRA, and groups of rollouts.

Rollouts of a group repeat their prompt. Their lengths are spread as those of a policy that trains: 434 tokens on
average where 1,024 are the most.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES = {
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
           "tie_word_embeddings": False},
    # For CPUs: whether all runs, and nothing of its time.
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 500},
}  # fmt: skip
SHARED_SHAPE = {
    "vocab_size": 151_936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": True,
}


def build(shape: str, device: torch.device, attention: str = "sdpa", layers: int | None = None) -> nn.Module:
    """The same weights every time: bfloat16, random and frozen, with LoRA r = 64 in float32 on seven modules."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    settings = {**SHARED_SHAPE, **SHAPES[shape]} | ({"num_hidden_layers": layers} if layers else {})
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(
            Qwen3Config(**settings), dtype=torch.bfloat16, attn_implementation=attention
        )
        lora = LoraConfig(r=64, lora_alpha=128, target_modules=LORA_MODULES, init_lora_weights=False)
        model = get_peft_model(base, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # small but not 0, where it starts in training: the teacher is another model
            parameter.data.normal_(0, 0.01)
    return model.train()  # teacher, too: there is no dropout


@dataclass(frozen=True)
class Rollouts:
    """Groups of rollouts on the CPU. Their response tokens have numbers, rollout by rollout, 0 to N - 1."""

    prompts: list[Tensor]  # one for each rollout, equal within a group
    solutions: list[Tensor]  # which the teacher reads after the prompt
    responses: list[Tensor]

    @classmethod
    def random(
        cls, vocabulary: int, groups: int, group: int, prompt: int, solution: int, response: int, seed: int = 1
    ) -> Rollouts:
        generator = torch.Generator().manual_seed(seed)

        def tokens(count: float) -> Tensor:
            return torch.randint(2, vocabulary, (int(count),), generator=generator)  # 0 and 1 are special

        prompts, solutions, responses = [], [], []
        for _ in range(groups):
            of_group = tokens(prompt), tokens(solution)
            # exp(6 + 0.6 z): 434 tokens on average where 1,024 are the most.
            lengths = torch.empty(group).log_normal_(6.0, 0.6, generator=generator) * response / 1024
            for length in lengths.clamp(response // 16, response).tolist():
                prompts.append(of_group[0])
                solutions.append(of_group[1])
                responses.append(tokens(length))
        responses[0] = tokens(response)
        return cls(prompts, solutions, responses)

    def part(self, first: int, last: int) -> Rollouts:
        """Rollouts ``first`` to ``last`` - 1."""
        return Rollouts(*(one[first:last] for one in (self.prompts, self.solutions, self.responses)))

    def contexts(self, teacher: bool) -> list[Tensor]:
        pairs = zip(self.prompts, self.solutions, strict=True)
        return [torch.cat([prompt, solution]) for prompt, solution in pairs] if teacher else self.prompts

    def rows(self, teacher: bool) -> list[Tensor]:
        return [torch.cat(pair) for pair in zip(self.contexts(teacher), self.responses, strict=True)]

    @property
    def group(self) -> int:
        """Rollouts of the first prompt."""
        return sum(prompt is self.prompts[0] for prompt in self.prompts)

    @cached_property
    def lengths(self) -> Tensor:
        return torch.tensor([len(response) for response in self.responses])

    @cached_property
    def first(self) -> Tensor:
        """The number of each rollout's first token."""
        return self.lengths.cumsum(0) - self.lengths

    @cached_property
    def advantages(self) -> Tensor:
        """None of them 0, whose tokens would need no gradient."""
        return 1.0 - 2.0 * (torch.arange(len(self.responses)) % 2)

    def tokens(self, which: Tensor) -> Tensor:
        """The numbers of the tokens of these rollouts, one rollout after another."""
        return torch.cat([self.first[row] + torch.arange(self.lengths[row]) for row in which.tolist()])
