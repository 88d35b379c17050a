"""One EGRSD step of a Qwen3 model with LoRA, from token ids to gradients, by the ways there are to feed a model.

    python -m benchmarks.step --output benchmarks/results/step-h200.json
    python -m benchmarks.step --output step.json --shapes 1.7b --ways padded,prefix-compiled --layers 8

A step is the teacher's forward pass (the same weights, adapters off, prompt and solution), the student's forward and
backward pass, and the CL-EGRSD loss. Rollouts come in groups, which repeat their prompt; their lengths are spread as
those of a policy that trains. Weights are random, shapes real; bfloat16 under autocast, LoRA r = 64 on seven modules.

- trl: padded rows and TRL's own head, what TRL's trainers do;
- padded, padded-compiled: the same with our head, and with each layer compiled;
- packed-compiled: rows without padding, one after another, each with its whole prompt: verl's way;
- prefix, prefix-compiled: ours, every shared prefix once.

A way whose name ends in "-kept" keeps activations; the others compute each layer again in the backward pass. All start
from the same adapters. Before a time counts, log p of student and teacher is compared with float32 on the first group:
off by no more than four times what padded rows are (TRL's head, which rounds its logits to 16 bits, by 0.1 nat more).
``products``: the bare products of the layers' frozen weights, none twice and no token twice (teacher forward; student
forward and hidden gradient), of the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, Qwen3Config

from benchmarks.end_to_end import LORA_MODULES, MIB
from benchmarks.measure import command, environment, failure, write
from benchmarks.peers import GAMMA, LOOKAHEAD
from egrsd_kernels import Head, credit, fused_egrsd_loss, token_statistics, with_head
from egrsd_kernels.packing import Pack, pack_rows, packed

SHAPES = {
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
}
SHARED_SHAPE = {
    "vocab_size": 151_936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}
WAYS = ("trl", "padded", "padded-compiled", "packed-compiled", "prefix", "prefix-compiled")
LOGITS_IN_16_BITS = 0.1  # nat
Function = Callable[[Tensor, Head], Any]


# -------------------------------------------------------------------------------------------------------- the rollouts


@dataclass(frozen=True)
class Rollouts:
    """Groups of rollouts on the CPU. Their response tokens have numbers, rollout by rollout, 0 to N - 1."""

    prompts: list[Tensor]  # one for each rollout, equal within a group
    solutions: list[Tensor]
    responses: list[Tensor]

    @classmethod
    def random(cls, args: argparse.Namespace, vocabulary: int) -> Rollouts:
        generator = torch.Generator().manual_seed(args.seed)

        def tokens(count: int) -> Tensor:
            return torch.randint(vocabulary, (int(count),), generator=generator)

        prompts, solutions, responses = [], [], []
        for _ in range(args.groups):
            prompt, solution = tokens(args.prompt), tokens(args.solution)
            # exp(6 + 0.6 z): 434 tokens on average where 1,024 are the most.
            lengths = torch.empty(args.group).log_normal_(6.0, 0.6, generator=generator) * args.response / 1024
            for length in lengths.clamp(args.response // 16, args.response).tolist():
                prompts.append(prompt)
                solutions.append(solution)
                responses.append(tokens(length))
        responses[0] = tokens(args.response)
        return cls(prompts, solutions, responses)

    def contexts(self, teacher: bool) -> list[Tensor]:
        pairs = zip(self.prompts, self.solutions, strict=True)
        return [torch.cat([prompt, solution]) for prompt, solution in pairs] if teacher else self.prompts

    @cached_property
    def lengths(self) -> Tensor:
        return torch.tensor([len(response) for response in self.responses])

    @cached_property
    def first(self) -> Tensor:
        """The number of each rollout's first token."""
        return self.lengths.cumsum(0) - self.lengths


# ----------------------------------------------------------------------------------------------------------- the ways


@dataclass(frozen=True)
class Pass:
    """A forward pass that predicts the response tokens of these numbers (M,), sequence by sequence.

    run: of a function of hidden (M, D) and the head; its result. cu_seqlens: (S + 1,), where sequences begin among M.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    rollouts: Tensor
    run: Callable[[nn.Module, Function], Any]


def padded_passes(rollouts: Rollouts, teacher: bool, device: torch.device) -> list[Pass]:
    """All rollouts in one batch, padded to the longest."""
    contexts = rollouts.contexts(teacher)
    rows = [torch.cat(pair) for pair in zip(contexts, rollouts.responses, strict=True)]
    ids = pad_sequence(rows, batch_first=True)
    width = ids.shape[1]
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    starts = [index * width + len(context) - 1 for index, context in enumerate(contexts)]
    picked = torch.cat([start + torch.arange(n) for start, n in zip(starts, rollouts.lengths.tolist(), strict=True)])
    ids, mask, picked = ids.to(device), mask.long().to(device), picked.to(device)

    def run(model: nn.Module, function: Function) -> Any:
        def at_responses(hidden: Tensor, head: Head) -> Any:
            return function(hidden.flatten(0, 1).index_select(0, picked), head)

        return with_head(model, at_responses, input_ids=ids, attention_mask=mask)[0]

    return [_pass(rollouts, torch.arange(len(rows)), run, device)]


def packed_passes(
    rollouts: Rollouts, teacher: bool, device: torch.device, budget: int, compiled: bool, shared: bool
) -> list[Pass]:
    contexts = rollouts.contexts(teacher)
    rows = [torch.cat(pair) for pair in zip(contexts, rollouts.responses, strict=True)]
    asked = [torch.arange(len(row)) >= len(context) for row, context in zip(rows, contexts, strict=True)]
    packs = pack_rows(rows, budget=budget, targets=asked) if shared else apart(rows, budget, asked)

    def run_of(pack: Pack) -> Callable[[nn.Module, Function], Any]:
        return lambda model, function: packed(model, pack, function, compile_layers=compiled)[0]

    return [_pass(rollouts, torch.tensor(pack.rows), run_of(pack.to(device)), device) for pack in packs]


def apart(rows: list[Tensor], budget: int, targets: list[Tensor]) -> list[Pack]:
    """Packs in which nothing is shared: a first token that no other row has keeps rows apart, and is put back."""
    marked = [torch.cat([torch.tensor([number]), row[1:]]) for number, row in enumerate(rows)]
    packs = pack_rows(marked, budget=budget, targets=targets)
    for pack in packs:
        for row, places in zip(pack.rows, pack.places, strict=True):
            pack.input_ids[places[0]] = rows[row][0]
    return packs


def _pass(rollouts: Rollouts, which: Tensor, run: Callable[[nn.Module, Function], Any], device: torch.device) -> Pass:
    lengths = rollouts.lengths[which]
    tokens = torch.cat([rollouts.first[row] + torch.arange(rollouts.lengths[row]) for row in which.tolist()])
    cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0))
    return Pass(tokens.to(device), cu_seqlens.to(device), which.to(device), run)


# -------------------------------------------------------------------------------------------------------------- a step


@dataclass(frozen=True)
class Batch:
    target_ids: Tensor  # (N,)
    advantages: Tensor  # (B,), none of them 0, whose tokens would need no gradient
    teacher: list[Pass]
    student: list[Pass]

    @classmethod
    def of(cls, rollouts: Rollouts, way: str, device: torch.device, budget: int) -> Batch:
        def passes(teacher: bool) -> list[Pass]:
            if way.startswith(("trl", "padded")):
                return padded_passes(rollouts, teacher, device)
            return packed_passes(rollouts, teacher, device, budget, "compiled" in way, way.startswith("prefix"))

        signs = 1.0 - 2.0 * (torch.arange(len(rollouts.responses)) % 2)
        return cls(torch.cat(rollouts.responses).to(device), signs.to(device), passes(True), passes(False))


@dataclass(frozen=True)
class Seen:
    """(N,) each: what a step sees of every token."""

    student_logp: Tensor
    teacher_logp: Tensor
    teacher_entropy: Tensor


def ours(batch: Batch, step: Pass, seen: Seen, scale: Tensor) -> Function:
    def loss(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        value, stats = fused_egrsd_loss(
            hidden, head, None, batch.target_ids[step.tokens], batch.advantages[step.rollouts],
            cu_seqlens=step.cu_seqlens, teacher_logp=seen.teacher_logp[step.tokens],
            teacher_entropy=seen.teacher_entropy[step.tokens], gamma=GAMMA, lookahead=LOOKAHEAD,
            entropy_scale=scale, normalizer=float(len(batch.target_ids)), return_stats=True,
        )  # fmt: skip
        return value, stats.student_logp

    return loss


def trl_head(hidden: Tensor, head: Head, target_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(log p, entropy) by the function that TRL's trainers call."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as WIDTH

    outputs = ("log_probs", "entropy")
    return ChunkedLogProbFunction.apply(hidden, head.weight, None, target_ids, 1.0, WIDTH, None, 1.0, outputs)[:2]


def trls(batch: Batch, step: Pass, seen: Seen, scale: Tensor) -> Function:
    def loss(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        logp, _ = trl_head(hidden, head, batch.target_ids[step.tokens])
        with torch.no_grad():
            counts = step.cu_seqlens.diff()
            ends = (step.cu_seqlens[1:] - 1).repeat_interleave(counts)
            advantages = batch.advantages[step.rollouts].repeat_interleave(counts)
            entropy, valid = seen.teacher_entropy[step.tokens], torch.ones_like(step.tokens, dtype=torch.bool)
            ahead = credit.lookahead_entropy(entropy, valid, ends, credit.Lookahead(LOOKAHEAD))
            gate = credit.gate(ahead, scale, GAMMA, gate_floor=0.1)
            magnitude = credit.magnitude(advantages, seen.teacher_logp[step.tokens] - logp, clip_eps=0.2)
            weights = credit.token_advantage(advantages, magnitude, gate)
        return -(weights * logp).sum() / len(batch.target_ids), logp.detach()

    return loss


def run_step(model: nn.Module, batch: Batch, head: str) -> tuple[Tensor, Seen]:
    """(loss, what was seen); the gradients are added to the adapters'."""
    seen = Seen(*(torch.zeros(len(batch.target_ids), device=batch.target_ids.device) for _ in range(3)))
    with torch.autocast(batch.target_ids.device.type, torch.bfloat16):
        with torch.no_grad(), model.disable_adapter() if head == "trl" else adapters_off(model):
            for step in batch.teacher:
                seen.teacher_logp[step.tokens], seen.teacher_entropy[step.tokens] = step.run(
                    model, statistics_by(head, batch.target_ids[step.tokens])
                )
        scale = credit.batch_max(seen.teacher_entropy).clamp(min=1.0)
        total = torch.zeros((), device=batch.target_ids.device)
        for step in batch.student:
            loss, logp = step.run(model, (trls if head == "trl" else ours)(batch, step, seen, scale))
            loss.backward()
            seen.student_logp[step.tokens] = logp
            total += loss.detach()
    return total, seen


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """What PEFT's disable_adapter does between two reports on the state of every module."""
    model.base_model.disable_adapter_layers()
    try:
        yield
    finally:
        model.base_model.enable_adapter_layers()


def statistics_by(head: str, target_ids: Tensor) -> Function:
    if head == "trl":
        return lambda hidden, weights: trl_head(hidden, weights, target_ids)
    return lambda hidden, weights: token_statistics(hidden, weights, target_ids)[:2]


# ----------------------------------------------------------------------------------------------------------- the model


def build(shape: str, layers: int | None, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    settings = {**SHARED_SHAPE, **SHAPES[shape]}
    tied = settings["hidden_size"] < 4096
    settings = {**settings, "num_hidden_layers": layers or settings["num_hidden_layers"], "tie_word_embeddings": tied}
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(Qwen3Config(**settings), dtype=torch.bfloat16)
        lora = LoraConfig(r=64, lora_alpha=128, target_modules=LORA_MODULES, init_lora_weights=False)
        model = get_peft_model(base, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # small but not 0, where it starts in training: the teacher is another model
            parameter.data.normal_(0, 0.01)
    return model.train()  # teacher, too: there is no dropout


@contextlib.contextmanager
def prepared(model: nn.Module, way: str) -> Iterator[None]:
    """The model as a way wants it, and as it was after."""
    layers = model.get_base_model().model.layers
    if not way.endswith("-kept"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    if way.startswith("padded-compiled"):
        for layer in layers:
            layer.compile(dynamic=False)
    try:
        with torch._dynamo.config.patch(recompile_limit=64):
            yield
    finally:
        model.gradient_checkpointing_disable()
        for layer in layers:
            layer._compiled_call_impl = None
        torch._dynamo.reset()
        model.zero_grad()
        gc.collect()


def products_ms(model: nn.Module, rollouts: Rollouts) -> float:
    """The bare products of the layers' frozen weights over tokens that stand once: teacher 1, student 2."""
    total = 0.0
    for teacher, count in ((True, 1), (False, 2)):
        rows = [torch.cat(pair) for pair in zip(rollouts.contexts(teacher), rollouts.responses, strict=True)]
        tokens = sum(len(pack) for pack in pack_rows(rows, budget=1 << 30))
        layer = model.get_base_model().model.layers[0]
        weights = [part.base_layer.weight for part in layer.modules() if hasattr(part, "base_layer")]
        inputs = [weight.new_empty(tokens, weight.shape[1]).normal_() for weight in weights]

        def run(inputs: list[Tensor] = inputs, weights: list[Tensor] = weights) -> None:
            for x, weight in zip(inputs, weights, strict=True):
                x @ weight.T

        total += count * len(model.get_base_model().model.layers) * timed(run, 5, inputs[0].device)
    return total


def timed(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    run()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------------------- measure


def seen_alone(model: nn.Module, rollouts: Rollouts, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(student's, teacher's) log p of padded rows, without gradients; in float32 without autocast."""
    targets = torch.cat(rollouts.responses).to(device)
    found = []
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=dtype != torch.float32):
        for teacher in (False, True):
            with model.disable_adapter() if teacher else contextlib.nullcontext():
                (step,) = padded_passes(rollouts, teacher, device)
                found.append(step.run(model, lambda hidden, head: token_statistics(hidden, head, targets)[0]))
    return found[0], found[1]


def exact_and_rounding(model: nn.Module, rollouts: Rollouts, device: torch.device) -> tuple[list[Tensor], list[float]]:
    """For student and teacher: log p of the first group in float32, and how far padded rows in bfloat16 are from it."""
    size = next(n for n, prompt in enumerate([*rollouts.prompts, None]) if prompt is not rollouts.prompts[0])
    first = Rollouts(*(part[:size] for part in (rollouts.prompts, rollouts.solutions, rollouts.responses)))
    rounded = seen_alone(model, first, device, torch.bfloat16)
    exact = seen_alone(copy.deepcopy(model).float(), first, device, torch.float32)
    return [*exact], [rms(*pair) for pair in zip(rounded, exact, strict=True)]


def rms(one: Tensor, other: Tensor) -> float:
    return (one - other).square().mean().sqrt().item()


def measure(
    model: nn.Module,
    rollouts: Rollouts,
    way: str,
    args: argparse.Namespace,
    exact: list[Tensor],
    rounding: list[float],
) -> dict[str, Any]:
    """One row: ms of a step and of the host's share of it, MiB above the weights, and what log p is off by, in nats."""
    device = torch.device(args.device)
    batch = Batch.of(rollouts, way, device, args.budget)
    head = "trl" if way.startswith("trl") else "ours"
    row: dict[str, Any] = {"way": way}
    with prepared(model, way):
        start = time.perf_counter()
        loss, seen = run_step(model, batch, head)
        row |= {"loss": loss.item(), "first_s": round(time.perf_counter() - start, 1)}
        row["gradient"] = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
        for name, found, wanted, rounded in zip(
            ("student", "teacher"), (seen.student_logp, seen.teacher_logp), exact, rounding, strict=True
        ):
            row[f"{name}_off"], row[f"{name}_rounding"] = rms(found[: len(wanted)], wanted), rounded
            if not row[f"{name}_off"] <= 4 * rounded + (LOGITS_IN_16_BITS if head == "trl" else 0):  # NaN, too
                return row | {"error": f"log p of the {name} is off"}
        run_step(model, batch, head)
        if device.type == "cuda":
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        hosts: list[float] = []

        def step() -> None:
            start = time.perf_counter()
            run_step(model, batch, head)
            hosts.append((time.perf_counter() - start) * 1e3)

        row |= {"ms": timed(step, args.repeats, device), "host_ms": statistics.median(hosts[1:])}
        if device.type == "cuda":
            row["above_weights_mib"] = (torch.cuda.max_memory_allocated() - held) / MIB
        if args.profile:
            profile(lambda: run_step(model, batch, head))
    return row


def profile(run: Callable[[], object]) -> None:
    """The kernels that take the time, on the terminal."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    kernels = sorted(recorded.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
    busy, launches = sum(k.self_device_time_total for k in kernels) / 1e3, sum(k.count for k in kernels)
    print(f"    GPU busy {busy:.1f} ms, {launches} launches", flush=True)
    for kernel in kernels[:16]:
        print(f"    {kernel.self_device_time_total / 1e3:8.2f} ms {kernel.count:6d} {kernel.key[:96]}", flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    parser.add_argument("--shapes", default="1.7b", help=f"comma-separated, of {', '.join(SHAPES)}")
    parser.add_argument("--ways", default=",".join(WAYS), help="comma-separated; each may end in -kept")
    parser.add_argument("--layers", type=int, default=None, help="default: all")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--group", type=int, default=8, help="rollouts of a prompt")
    parser.add_argument("--prompt", type=int, default=300, help="tokens")
    parser.add_argument("--solution", type=int, default=600, help="tokens that the teacher alone reads")
    parser.add_argument("--response", type=int, default=1024, help="tokens of the longest")
    parser.add_argument("--budget", type=int, default=16_384, help="tokens of a pack")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps, after two that warm up")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="print the kernels that take the time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", default=None, help="recorded in the result; default: git's HEAD")
    args = parser.parse_args(argv)
    args.command = command("benchmarks.step", parser, args)
    args.shapes, args.ways = args.shapes.split(","), args.ways.split(",")
    if unknown := set(args.shapes) - set(SHAPES):
        parser.error(f"--shapes: unknown {', '.join(sorted(unknown))}")
    if unknown := {way.removesuffix("-kept") for way in args.ways} - set(WAYS):
        parser.error(f"--ways: unknown {', '.join(sorted(unknown))}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)  # names that transformers and PEFT are about to change
    device = torch.device(args.device)
    machine = environment(device, ["transformers", "peft", "trl"], args.commit)
    settings = {name: getattr(args, name) for name in ("groups", "group", "prompt", "solution", "response", "budget")}
    report: dict[str, Any] = {**machine, "settings": settings, "command": args.command, "shapes": []}
    for shape in args.shapes:
        model = build(shape, args.layers, device)
        rollouts = Rollouts.random(args, model.config.vocab_size)
        layers = model.config.num_hidden_layers
        entry: dict[str, Any] = {"shape": shape, "layers": layers, "tokens": int(rollouts.lengths.sum()), "rows": []}
        entry["products_ms"] = products_ms(model, rollouts)
        print(f"{shape}, {layers} layers, {entry['tokens']} response tokens: "
              f"bare products {entry['products_ms']:.1f} ms", flush=True)  # fmt: skip
        report["shapes"].append(entry)
        exact, rounding = exact_and_rounding(model, rollouts, device)
        gc.collect()
        for way in args.ways:
            try:
                row = measure(model, rollouts, way, args, exact, rounding)
            except Exception as error:  # one way that fails must not cost the others
                row = {"way": way, "error": failure(error)}
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if "ms" in row:
                row["over_products"] = row["ms"] / entry["products_ms"]
                first = next((one["ms"] for one in entry["rows"] if "ms" in one), row["ms"])
                row["over_first"] = first / row["ms"]
            entry["rows"].append(row)
            write(args.output, report)
            print(
                "  " + json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True
            )
        del model
        gc.collect()


if __name__ == "__main__":
    main()
