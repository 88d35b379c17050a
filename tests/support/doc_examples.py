"""How the examples of README and docs/ run on a CPU: which blocks there are, and what stands in for a real model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


def blocks(page: str, language: str = "python") -> list[str]:
    """The fenced blocks of ``page``, a path below the repository's root, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def language_model() -> dict[str, Any]:
    """A tiny Qwen3 with adapters, two rollouts and their advantages, by the names that the examples use."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config = transformers.Qwen3Config(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(transformers.Qwen3ForCausalLM(config), lora)
    return {
        "model": model, "device": "cpu", "pad_token_id": 0, "advantages": torch.tensor([1.0, -0.5]),
        "student_prompts": [[1, 2, 3], [4, 5]], "teacher_prompts": [[1, 2, 3, 9, 9], [4, 5, 9]],
        "responses": [[6, 7, 8, 9], [10, 11]],
    }  # fmt: skip
