"""The README's example runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


def test_example_trains_the_adapters():
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config = transformers.Qwen3Config(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(transformers.Qwen3ForCausalLM(config), lora)
    names = {
        "torch": torch, "model": model, "device": "cpu", "pad_token_id": 0, "advantages": torch.tensor([1.0, -0.5]),
        "student_prompts": [[1, 2, 3], [4, 5]], "teacher_prompts": [[1, 2, 3, 9, 9], [4, 5, 9]],
        "responses": [[6, 7, 8, 9], [10, 11]],
    }  # fmt: skip
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    exec(example, names)
    # The adapters start as the identity, so the loss is that of plain likelihoods under the gate.
    assert names["loss"].isfinite() and names["loss"] != 0
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora" in name for name in gradients)
    assert any(g.abs().max() > 0 for g in gradients.values())
