"""One long rollout, teacher and student: whether a step of it fits, in what memory and time.

    python -m benchmarks.long_rollout --tokens 65536 --output benchmarks/results/long_rollout-h200.json

A Qwen3 backbone of the given shape (4B's by default, with few layers), in bfloat16, random, frozen, with a LoRA on the
student's layers, which are checkpointed. The teacher reads the rollout without gradients; the loss reads both in
chunks. Of a step: the time of the two backbones and the loss with their backward passes, the most memory above the
weights, and how much of that there is without the loss.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Qwen3Config, Qwen3Model

from benchmarks.measure import command, environment, write
from egrsd_kernels import fused_egrsd_loss

ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def backbone(args: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    config = Qwen3Config(
        vocab_size=args.vocabulary, hidden_size=args.width, intermediate_size=args.inner, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=max(1, args.heads // 4), head_dim=128,
        max_position_embeddings=args.tokens, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    with device:
        model = Qwen3Model(config).to(torch.bfloat16)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return get_peft_model(model, LoraConfig(r=64, lora_alpha=128, target_modules=ADAPTED)).train()


def step(model: torch.nn.Module, head: Tensor, ids: Tensor, advantages: Tensor, fused: bool) -> None:
    """A step of one rollout (1, T + 1); without ``fused``, a sum of the student's hidden states is the loss."""
    with torch.no_grad(), model.disable_adapter():
        teacher = model(input_ids=ids[:, :-1]).last_hidden_state
    student = model(input_ids=ids[:, :-1]).last_hidden_state
    loss = fused_egrsd_loss(student, head, teacher, ids[:, 1:], advantages, lookahead=3) if fused else student.sum()
    loss.backward()


def measured(model: torch.nn.Module, *given: Tensor, fused: bool, device: torch.device) -> dict[str, float]:
    """Milliseconds of a second step, and the most memory above what the weights take, in MiB."""
    found = {}
    for _ in range(2):
        model.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        called = time.perf_counter()
        step(model, *given, fused)
        if device.type == "cuda":
            torch.cuda.synchronize()
            found["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        found["ms"] = (time.perf_counter() - called) * 1e3
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=2560)
    parser.add_argument("--inner", type=int, default=9728)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--commit", help="recorded instead of git's HEAD")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = backbone(args, device)
    head = (torch.randn(args.vocabulary, args.width, device=device) / args.width**0.5).bfloat16()
    ids = torch.randint(args.vocabulary, (1, args.tokens + 1), device=device)
    advantages = torch.tensor([0.7], device=device)
    report = {
        "command": command("benchmarks.long_rollout", parser, args),
        "environment": environment(device, ["transformers", "peft"], args.commit),
        "tokens": args.tokens, "layers": args.layers, "width": args.width, "vocabulary": args.vocabulary,
        "logits_gib": args.tokens * args.vocabulary * 2 / 2**30,
    }  # fmt: skip
    for name, fused in (("step", True), ("without_loss", False)):
        report[name] = measured(model, head, ids, advantages, fused=fused, device=device)
        print(f"{name}: {report[name]}")
    if args.output:
        write(args.output, report)


if __name__ == "__main__":
    main()
