"""One optimiser step of a Qwen3 model with LoRA adapters, on one GPU, with several heads for the loss.

    python -m benchmarks.end_to_end --output benchmarks/results/end_to_end-h100.json
    python -m benchmarks.end_to_end --output end_to_end.json --models 4b --layers 8 --skip-largest

The weights are random, the shapes real. A step is the teacher's forward pass (the same weights, adapters off, a longer
prompt), the student's, the CL-EGRSD loss, the backward pass, the clipping of gradients and AdamW. The variants differ
in the loss head alone, from the hidden states of the response positions to the loss:

- eager: full bfloat16 logits of the response positions (what transformers computes with ``logits_to_keep``), a
  float32 log-softmax, and the method's equations on it;
- liger: Liger's fused linear cross-entropy a token for the student, eager logits in chunks for the teacher;
- liger-mean: the same with Liger's uniform mean, which cannot weight tokens: less work, and another loss;
- liger-scaled: Liger's fused scaled cross-entropy for both (on Hopper it needs nvidia-cutlass-dsl);
- ours: ``fused_egrsd_loss``.

All of them start from the same adapters and the same batch, and report the loss and the gradient's norm of the first
step: variants that compute the same loss agree in both.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3Config

from benchmarks.measure import Stopwatch, command, environment, write
from benchmarks.peers import GAMMA, HEADS, LOOKAHEAD, LossHead

SHAPES = {
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
}
SHARED_SHAPE = {
    "vocab_size": 151_936,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}
LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WARM_UP_STEPS = 2
OUT_OF_MEMORY = "out of memory"
MIB = 2**20


# ------------------------------------------------------------------------------------------------- the model, the batch


class Lengths(NamedTuple):
    """Tokens of x, of what the teacher alone reads, and of y."""

    prompt: int = 256
    solution: int = 256
    response: int = 1024


@dataclass(frozen=True)
class Batch:
    """B rollouts of equal length, so that no variant pays for padding."""

    student_ids: Tensor  # (B, prompt + response)
    teacher_ids: Tensor  # (B, prompt + solution + response)
    target_ids: Tensor  # (B, response)
    advantages: Tensor  # (B,), none of them 0, whose tokens would need no gradient

    @classmethod
    def random(cls, vocabulary: int, rollouts: int, lengths: Lengths, device: str, seed: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        ids = [torch.randint(vocabulary, (rollouts, n), generator=generator).to(device) for n in lengths]
        prompt, solution, response = ids
        advantages = torch.randn(rollouts, generator=generator)
        advantages += 0.1 * advantages.sign()
        return cls(
            torch.cat([prompt, response], 1),
            torch.cat([prompt, solution, response], 1),
            response,
            advantages.to(device),
        )


@dataclass(frozen=True)
class Policy:
    """A model with adapters; the frozen model below them is the teacher, and lends its head to both."""

    model: PeftModel

    @cached_property
    def backbone(self) -> nn.Module:
        return self.model.get_base_model().model

    @cached_property
    def head(self) -> nn.Linear:
        return self.model.get_base_model().lm_head

    @cached_property
    def adapters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @cached_property
    def last_adapters(self) -> list[nn.Parameter]:
        """Those of the last layer, the first that the backward pass reaches."""
        return [parameter for parameter in self.backbone.layers[-1].parameters() if parameter.requires_grad]

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def hidden(self, ids: Tensor, response: int) -> Tensor:
        """(B, response, D): the states that predict the last ``response`` tokens."""
        return self.backbone(input_ids=ids, use_cache=False).last_hidden_state[:, -response - 1 : -1]

    def reset(self, seed: int = 0) -> None:
        """The same adapters every time. B is small but not 0, where it starts in training: teacher ≠ student."""
        generator = torch.Generator(self.device).manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    spread = 0.01 if "lora_B" in name else parameter.shape[1] ** -0.5
                    parameter.normal_(0, spread, generator=generator)


def qwen3_config(name: str, layers: int | None = None) -> Qwen3Config:
    shape = {**SHARED_SHAPE, **SHAPES[name]}
    return Qwen3Config(**{**shape, "num_hidden_layers": layers or shape["num_hidden_layers"]})


def build_policy(
    config: Qwen3Config, device: str, dtype: torch.dtype, attention: str = "sdpa", checkpointing: bool = True
) -> Policy:
    """A model with random weights, made on the device, with LoRA r = 64, α = 128 on every projection."""
    torch.manual_seed(0)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = LoraConfig(r=64, lora_alpha=128, lora_dropout=0.0, target_modules=LORA_MODULES)
    # Adapters in the model's dtype: float32 ones, PEFT's default, would run float32 products beside every projection.
    policy = Policy(get_peft_model(base, lora, autocast_adapter_dtype=False).train())
    policy.reset()
    return policy


# -------------------------------------------------------------------------------------------------------------- a step


def head_ms(watch: Stopwatch) -> float:
    """The loss head alone: the teacher's half, the student's, and the backward pass down to the hidden states."""
    return watch.ms("teacher hidden", "teacher") + watch.ms("student hidden", "head backward")


def compute_loss(policy: Policy, head: LossHead, batch: Batch, watch: Stopwatch) -> Tensor:
    """The loss of one batch, from token ids."""
    response = batch.target_ids.shape[1]
    watch.mark("start")
    with torch.no_grad(), policy.model.disable_adapter():
        teacher = policy.hidden(batch.teacher_ids, response)
        watch.mark("teacher hidden")
        teacher = head.teacher(teacher, policy.head.weight, batch.target_ids)
        watch.mark("teacher")
    hidden = policy.hidden(batch.student_ids, response)
    hidden.register_hook(lambda gradient: watch.mark("head backward"))
    watch.mark("student hidden")
    return head.loss(hidden, policy.head.weight, batch.target_ids, batch.advantages, teacher)


def training_step(
    policy: Policy, head: LossHead, batch: Batch, optimizer: torch.optim.Optimizer, watch: Stopwatch
) -> tuple[Tensor, Tensor]:
    """One optimiser step; (loss, norm of the gradient before it is clipped), 0-d tensors."""
    loss = compute_loss(policy, head, batch, watch)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(policy.adapters, 0.1)
    optimizer.step()
    optimizer.zero_grad()
    watch.mark("end")
    return loss.detach(), norm


def peak_step(policy: Policy, head: LossHead, batch: Batch) -> None:
    """As much of a step as its peak of memory takes: down to the last layer's adapters.

    There the activations of all layers still stand. Every layer further down frees more of them than the gradients of
    its adapters take.
    """
    torch.autograd.grad(compute_loss(policy, head, batch, Stopwatch(policy.device)), policy.last_adapters)


# -------------------------------------------------------------------------------------------------------------- memory


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def out_of_memory(error: Exception) -> bool:
    """PyTorch's own error, or the one of a library that asked for memory itself."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in ("out of memory", "ALLOC_FAILED"))
    )


def attempt(run: Callable[[], object]) -> str | None:
    """None, or what went wrong. The exception, whose frames hold tensors, is gone by then."""
    try:
        run()
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name
        return f"{missing.split('.')[0]} is not installed" if missing else f"ImportError: {error}"
    except Exception as error:  # one variant that fails must not cost the others
        return OUT_OF_MEMORY if out_of_memory(error) else f"{type(error).__name__}: {str(error)[:400]}"
    return None


def largest_batch(
    probe: Callable[[int], float | None],
    capacity: float,
    start: int,
    seconds: float,
    tolerance: float = 0.03,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[int, int | None]:
    """(the largest size that was seen to fit, or 0; the smallest that was seen not to, or None).

    ``probe(n)`` returns the peak memory of a step with n rollouts, or None where it does not fit. Memory grows in a
    straight line, so a few small sizes, quadrupled, say where the end is; one that fails after all is approached by
    bisection, from near the end. It stops within ``tolerance`` of the end, or when ``seconds`` are over.
    """
    fits: dict[int, float] = {}
    fails: int | None = None
    size: int | None = start
    stop = clock() + seconds
    while size is not None and clock() < stop:
        peak = probe(size)
        if peak is None:
            fails = size
        else:
            fits[size] = peak
        size = _next_size(fits, fails, capacity, tolerance)
    return max(fits, default=0), fails


def _next_size(fits: dict[int, float], fails: int | None, capacity: float, tolerance: float) -> int | None:
    *_, below, best = [0, 0, *sorted(fits)]
    end = 4 * best if fails is None else fails - 1
    if below:
        slope = max(fits[best] - fits[below], 1.0) / (best - below)
        end = min(end, best + int((capacity - fits[best]) / slope))
    if end - best <= tolerance * best:
        return None
    if fails is None:
        return end
    middle = (best + fails) // 2
    return max(middle, int(0.95 * end)) if below else max(middle, 1)


# ------------------------------------------------------------------------------------------------------------- measure


def measure(
    policy: Policy, variant: str, rollouts: int, lengths: Lengths, steps: int, largest_seconds: float | None
) -> dict[str, object]:
    """One row: times in ms (median and quartiles), memory in MiB, and the largest batch in rollouts and tokens."""
    device = policy.device
    on_gpu = device.type == "cuda"
    row: dict[str, object] = dict.fromkeys(ROW)
    row.update(variant=variant, rollouts=rollouts, tokens=rollouts * lengths.response)

    def random_batch(size: int) -> Batch:
        return Batch.random(policy.head.out_features, size, lengths, str(device))

    def run() -> None:
        head = HEADS[variant]()
        row["note"] = head.note
        policy.reset()
        optimizer = torch.optim.AdamW(policy.adapters, lr=5e-6, fused=on_gpu)
        row["error"] = attempt(lambda: time_steps(head, optimizer))
        if largest_seconds is not None and row["error"] in (None, OUT_OF_MEMORY):
            search(head, optimizer)

    def time_steps(head: LossHead, optimizer: torch.optim.Optimizer) -> None:
        batch, watch = random_batch(rollouts), Stopwatch(device)
        for step in range(WARM_UP_STEPS):
            loss, norm = training_step(policy, head, batch, optimizer, watch)
            if step == 0:
                row.update(loss=loss.item(), grad_norm=norm.item())
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()  # weights, optimizer, token ids
        of_steps, of_heads = [], []
        for _ in range(steps):
            training_step(policy, head, batch, optimizer, watch)
            of_steps.append(watch.ms("start", "end"))
            of_heads.append(head_ms(watch))
        low, median, high = statistics.quantiles(of_steps, n=4, method="inclusive")
        row.update(step_ms=median, low=low, high=high, head_ms=statistics.median(of_heads))
        row["tokens_per_second"] = row["tokens"] / median * 1e3
        if on_gpu:
            peak = torch.cuda.max_memory_allocated()
            row.update(peak_mib=peak / MIB, peak_above_weights_mib=(peak - before) / MIB)

    def search(head: LossHead, optimizer: torch.optim.Optimizer) -> None:
        policy.model.zero_grad()
        training_step(policy, head, random_batch(1), optimizer, Stopwatch(device))  # the optimizer has its state
        release(device)
        capacity = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()

        def probe(size: int) -> float | None:
            release(device)
            start = time.perf_counter()
            error = attempt(lambda: peak_step(policy, head, random_batch(size)))
            peak = torch.cuda.max_memory_allocated()
            seconds = time.perf_counter() - start
            print(f"    {size} rollouts: {error or f'{peak / MIB:.0f} MiB'}, {seconds:.1f} s", flush=True)
            if error not in (None, OUT_OF_MEMORY):
                raise RuntimeError(f"{size} rollouts: {error}")
            if size == rollouts and error is None:
                row["probe_peak_mib"] = peak / MIB  # as peak_mib, if the part of a step stands for all of it
            return None if error else peak

        # Two in a hundred stay out: fragments, and what libraries take beside PyTorch.
        best, fails = largest_batch(probe, 0.98 * capacity, rollouts, largest_seconds)
        row.update(largest_rollouts=best, largest_batch_tokens=best * lengths.response, failing_rollouts=fails)

    row["error"] = attempt(run) or row["error"]
    policy.model.zero_grad()
    broken = attempt(lambda: release(device))  # after an illegal access the device answers no more
    row["error"] = row["error"] or broken
    return row


ROW = (
    "model", "layers", "variant", "rollouts", "tokens", "step_ms", "low", "high", "head_ms", "tokens_per_second",
    "peak_mib", "peak_above_weights_mib", "probe_peak_mib", "largest_rollouts", "largest_batch_tokens",
    "failing_rollouts", "loss", "grad_norm", "command", "commit", "note", "error",
)  # fmt: skip
ENVIRONMENT = ("device", "torch", "triton", "transformers", "peft", "attn_implementation", "settings")


def merge(report: dict[str, object], earlier: dict[str, object] | None) -> dict[str, object]:
    """``report`` and the rows of ``earlier`` that it does not replace (same model, layers and variant), in order."""
    if earlier is None:
        return report
    differing = [name for name in ENVIRONMENT if earlier.get(name) != report.get(name)]
    if differing:
        raise ValueError(f"rows measured with another {', '.join(differing)}: give another output file")

    def place(row: dict[str, object]) -> tuple[object, ...]:
        return row["model"], row["layers"], list(HEADS).index(row["variant"])

    rows = {place(row): row for row in [*earlier["rows"], *report["rows"]]}
    return {**report, "rows": [rows[key] for key in sorted(rows)]}


def show(row: dict[str, object]) -> str:
    """One line for people."""
    if row["step_ms"] is None:
        return f"  {row['variant']:12s} {row['error']}"
    line = f"  {row['variant']:12s} {row['step_ms']:8.1f} ms ({row['low']:.1f} to {row['high']:.1f}), "
    line += f"head {row['head_ms']:7.1f} ms, {row['tokens_per_second']:7.0f} tokens/s, "
    if row["peak_mib"] is not None:
        line += f"peak {row['peak_mib']:.0f} MiB ({row['peak_above_weights_mib']:.0f} above weights), "
    if row["largest_rollouts"] is not None:
        line += f"largest {row['largest_rollouts']}, "
    return line + f"loss {row['loss']:+.6f}, gradient {row['grad_norm']:.5f}" + f"  {row['error'] or ''}"


# ---------------------------------------------------------------------------------------------------------------- main


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON; rows of other variants in it are kept")
    parser.add_argument("--models", default="4b,8b", help=f"comma-separated, of {', '.join(SHAPES)}")
    parser.add_argument("--variants", default="eager,liger,ours", help=f"comma-separated, of {', '.join(HEADS)}")
    parser.add_argument("--layers", type=int, default=None, help="default: all 36")
    parser.add_argument("--rollouts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after the warm-up; at least 2")
    parser.add_argument("--prompt", type=int, default=Lengths().prompt, help="tokens")
    parser.add_argument("--solution", type=int, default=Lengths().solution, help="tokens that the teacher alone reads")
    parser.add_argument("--response", type=int, default=Lengths().response, help="tokens")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep the activations of every layer")
    parser.add_argument("--skip-largest", action="store_true", help="do not look for the largest batch")
    parser.add_argument("--largest-seconds", type=float, default=25.0, help="no new probe starts after them")
    parser.add_argument("--attention", default=None, help="default: flash_attention_2 where installed, else sdpa")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--commit", default=None, help="recorded in the result; default: git's HEAD")
    args = parser.parse_args(argv)
    args.command = command("benchmarks.end_to_end", parser, args)
    for name, known in (("models", SHAPES), ("variants", HEADS)):
        chosen = getattr(args, name).split(",")
        if unknown := set(chosen) - set(known):
            parser.error(f"--{name}: unknown {', '.join(sorted(unknown))}")
        setattr(args, name, chosen)
    if args.steps < 2:
        parser.error("--steps: expected at least 2")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)  # names that transformers and PEFT are about to change
    on_gpu = torch.device(args.device).type == "cuda"
    flash = on_gpu and importlib.util.find_spec("flash_attn_2_cuda") is not None
    attention = args.attention or ("flash_attention_2" if flash else "sdpa")
    lengths = Lengths(args.prompt, args.solution, args.response)
    machine = environment(torch.device(args.device), ["transformers", "peft"], args.commit)
    report = {
        **{name: value for name, value in machine.items() if name not in ("packages", "commit")},
        **machine["packages"],
        "attn_implementation": attention,
        "settings": {
            **lengths._asdict(),
            "dtype": args.dtype,
            "lora": "r 64, alpha 128, in the model's dtype",
            "gradient_checkpointing": not args.no_checkpointing,
            "gamma": GAMMA,
            "lookahead": LOOKAHEAD,
            "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
        },
        "rows": [],
    }

    earlier = json.loads(args.output.read_text()) if args.output.exists() else None
    # Refuses a file that other hardware or versions wrote, before any GPU time is spent.
    write(args.output, merge(report, earlier))
    print(*(f"{name} {report[name]}" for name in ENVIRONMENT[:-1]), sep=", ", flush=True)
    largest_seconds = None if args.skip_largest or not on_gpu else args.largest_seconds
    for name in args.models:
        config = qwen3_config(name, args.layers)
        head = {"model": name, "layers": config.num_hidden_layers, "command": args.command, "commit": machine["commit"]}
        policies: list[Policy] = []
        start = time.perf_counter()

        def build(config: Qwen3Config = config, policies: list[Policy] = policies) -> None:
            dtype = getattr(torch, args.dtype)
            policies.append(build_policy(config, args.device, dtype, attention, not args.no_checkpointing))

        error = attempt(build)
        seconds = time.perf_counter() - start
        print(f"{name}, {config.num_hidden_layers} layers: {error or f'made in {seconds:.1f} s'}", flush=True)
        for variant in args.variants:
            if policies:
                row = measure(policies[0], variant, args.rollouts, lengths, args.steps, largest_seconds)
            else:
                row = {**dict.fromkeys(ROW), "variant": variant, "error": f"the model: {error}"}
            report["rows"].append({**row, **head})
            write(args.output, merge(report, earlier))
            print(show(row), flush=True)
        policies.clear()
        attempt(lambda: release(torch.device(args.device)))
    rows = [row for row in report["rows"] if row["loss"] is not None]
    for name in args.models:
        losses = {row["variant"]: row["loss"] for row in rows if row["model"] == name}
        if {"eager", "ours"} <= losses.keys():
            gap = abs(losses["eager"] - losses["ours"])
            print(f"{name}: the losses of eager and ours differ by {gap:.2e} at the first step", flush=True)


if __name__ == "__main__":
    main()
