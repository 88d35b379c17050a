"""How sparse a trained language model's softmax rows are: by entropy, on text and on what the model writes itself.

    python -m benchmarks.language_model --output benchmarks/results/language_model-h100.json

A small Qwen3 model learns the sources that this machine has (Python and C++ headers, of the standard library and of
installed packages), with a byte-level BPE vocabulary of its own. Its rows are then looked at where a step of
reinforcement learning meets them: on the model's own samples at temperature 1, and on held-out text. A row's gradient
is p - e_y. Entries off the target are dropped from the smallest on, by one threshold for all rows, as long as

    sum of the dropped p  <=  tolerance * sum of ||p - e_y||_1

and the report says what is kept then, for each tenth of the rows by entropy, and how much lies beyond the 1, 2, 4 ...
most probable entries. On the same rows it compares sparse gradients with exact ones, in time and in error; and it goes
on training from the same weights, on the same batches, three times with exact and once with sparse gradients.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sysconfig
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model

from benchmarks.measure import command, environment, interleaved, timer_of, write
from egrsd_kernels import fused_egrsd_loss, linear_logp

TOLERANCES = (2.0**-10, 2.0**-8, 2.0**-6)
MANY = (64, 256, 1024, 4096)  # rows that keep more entries are counted
MODES = ("exact", "exact 2", "exact 3", "sparse")  # the exact runs differ by the order of atomic sums alone
ROWS = 1024  # of logits at a time
KINDS = (".py", ".pyi", ".h", ".hpp", ".cuh")  # of source files


def sources(megabytes: float) -> list[str]:
    """Source files of this installation in random order, about so much text."""
    folders = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    found = {file for folder in folders for kind in KINDS for file in folder.rglob(f"*{kind}")}
    files = sorted(file for file in found if file.stat().st_size > 500)
    random.Random(0).shuffle(files)
    texts, size = [], 0
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8")[:200_000])
        except (OSError, UnicodeDecodeError):
            continue
        size += len(texts[-1])
        if size > megabytes * 1e6:
            break
    return texts


def tokens(texts: list[str], vocabulary: int, context: int) -> tuple[Tensor, Tensor]:
    """(training rows, held-out rows), (R, context) each; files follow one another, with an end token between them."""
    tokenizer = ByteLevelBPETokenizer()
    end = "<end>"
    some = texts[: max(1, len(texts) // 4)]
    tokenizer.train_from_iterator(some, vocab_size=vocabulary, special_tokens=[end], show_progress=False)
    last = tokenizer.token_to_id(end)
    ids = torch.cat([torch.tensor([*found.ids, last]) for found in tokenizer.encode_batch(texts)])
    rows = ids[: len(ids) // context * context].view(-1, context)
    held_out = max(4, len(rows) // 50)
    return rows[:-held_out], rows[-held_out:]


class LanguageModel(nn.Module):
    """A Qwen3 backbone in float32, run under bf16 autocast, and a head (V, D)."""

    def __init__(self, vocabulary: int, width: int, layers: int, context: int):
        super().__init__()
        self.backbone = Qwen3Model(
            Qwen3Config(
                vocab_size=vocabulary,
                hidden_size=width,
                intermediate_size=3 * width,
                num_hidden_layers=layers,
                num_attention_heads=max(1, width // 64),
                num_key_value_heads=max(1, width // 128),
                head_dim=64,
                max_position_embeddings=context,
            )
        )
        self.head = nn.Parameter(0.02 * torch.randn(vocabulary, width))
        self.states = self._states

    def _states(self, ids: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, torch.bfloat16):
            return self.backbone(input_ids=ids, use_cache=False).last_hidden_state.bfloat16()

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T, D) bfloat16 hidden states."""
        return self.states(ids)

    def loss(self, ids: Tensor, **options) -> Tensor:
        """Nats a token. options: of linear_logp."""
        return -linear_logp(self(ids)[:, :-1], self.head.bfloat16(), ids[:, 1:], **options).mean()

    @torch.no_grad()
    def continued(self, ids: Tensor, count: int) -> Tensor:
        """``ids`` with ``count`` more tokens, sampled at temperature 1."""
        cache, step = None, ids
        for _ in range(count):
            with torch.autocast(ids.device.type, torch.bfloat16):
                found = self.backbone(input_ids=step, past_key_values=cache, use_cache=True)
            cache = found.past_key_values
            step = torch.multinomial((found.last_hidden_state[:, -1].float() @ self.head.T).softmax(-1), 1)
            ids = torch.cat([ids, step], 1)
        return ids


def train(model: LanguageModel, data: Tensor, seconds: float, batch: int, rate: float = 1e-3) -> Iterator[float]:
    """AdamW with a cosine schedule over ``seconds``; yields the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    start, step = time.perf_counter(), 0
    while (done := (time.perf_counter() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        loss = model.loss(data[torch.randint(len(data), (batch,), device=data.device)])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        yield loss.item()


@torch.no_grad()
def sparsity(hidden: Tensor, head: Tensor, targets: Tensor) -> dict:
    """What is kept of the rows (N, D) x (V, D) under each tolerance. targets: (N,)."""

    entropy, others, spread = torch.empty(3, len(hidden), device=hidden.device)

    def probabilities() -> Iterator[tuple[slice, Tensor, Tensor]]:
        for start in range(0, len(hidden), ROWS):
            rows = slice(start, start + ROWS)
            logits = hidden[rows].float() @ head.float().T
            spread[rows] = logits.std(-1)
            p = logits.softmax(-1)
            yield rows, p, p.scatter(1, targets[rows, None], 0)  # with the target, and without

    # The mass below each threshold, of all rows: from it one threshold for each tolerance.
    edges = torch.exp2(-torch.arange(80, device=hidden.device) / 2)
    below = torch.zeros(len(edges), device=hidden.device, dtype=torch.float64)
    ranks = [1 << k for k in range((head.shape[0] - 1).bit_length())]
    beyond = torch.empty(len(hidden), len(ranks), device=hidden.device)
    for rows, p, off in probabilities():
        entropy[rows] = torch.special.entr(p).sum(-1)
        others[rows] = off.sum(-1)
        # From the smallest on: a sum from the largest on would end with what rounding left of 1 - 1.
        tail = p.sort(-1).values.cumsum(-1).flip(-1)
        beyond[rows] = tail[:, ranks]
        below += torch.stack([(off * (off <= edge)).sum(dtype=torch.float64) for edge in edges])
    order = entropy.argsort()
    report = {
        "rows": len(hidden),
        "entropy_mean": entropy.mean().item(),
        "entropy_deciles": entropy.quantile(torch.linspace(0.1, 0.9, 9, device=hidden.device)).tolist(),
        "share_entropy_below_0.01": (entropy < 0.01).float().mean().item(),
        "share_entropy_above_0.672": (entropy > 0.672).float().mean().item(),
        "standard_deviation_of_logits_by_entropy": [spread[part].mean().item() for part in order.tensor_split(10)],
        "ranks": ranks,
        "mass_beyond_rank_by_entropy": [beyond[part].mean(0).tolist() for part in order.tensor_split(10)],
        "tolerances": [],
    }
    for tolerance in TOLERANCES:
        fits = (below <= tolerance * 2 * others.sum(dtype=torch.float64)).nonzero()[0].item()  # edges fall
        kept, dropped = torch.empty(2, len(hidden), device=hidden.device)
        for rows, _, off in probabilities():
            keep = off > edges[fits]
            kept[rows], dropped[rows] = keep.sum(-1).float() + 1, (off * ~keep).sum(-1)
        tenths = [
            {
                "entropy": entropy[part].mean().item(),
                "kept_mean": kept[part].mean().item(),
                "kept_90th_percentile": kept[part].quantile(0.9).item(),
                "dropped_mean": dropped[part].mean().item(),
            }
            for part in order.tensor_split(10)
        ]
        shares = {f"share_above_{many}": (kept > many).float().mean().item() for many in MANY}
        report["tolerances"].append({"tolerance": tolerance, "by_entropy": tenths, **shares})
    return report


def gradients(hidden: Tensor, head: Tensor, targets: Tensor) -> dict:
    """Sparse gradients of the rows (N, D) x (V, D) beside exact ones, each token weighed alike: time and error."""
    timer = timer_of(hidden.device)
    found: dict = {}

    def step(trained: bool, **options) -> tuple[Tensor, ...]:
        leaves = hidden.detach().requires_grad_(), head.detach().requires_grad_(trained)
        linear_logp(*leaves, targets, **options).sum().backward()
        return tuple(leaf.grad for leaf in leaves if leaf.requires_grad)

    for name, trained in (("frozen", False), ("trained", True)):
        subjects = {mode: partial(step, trained, grad_mode=mode) for mode in ("exact", "sparse")}
        want, got = (subjects[mode]() for mode in subjects)
        errors = [((g.double() - w.double()).norm() / w.double().norm()).item() for g, w in zip(got, want, strict=True)]
        times = interleaved(subjects, timer, rounds=15, budget=0.5, sustained=False)
        leaves = hidden.detach().requires_grad_(), head.detach().requires_grad_(trained)
        alike = {"gamma": 0.0, "clip_eps": 0.0}  # every token's weight is its advantage
        ones = torch.ones(len(hidden), device=hidden.device)
        _, stats = fused_egrsd_loss(*leaves, hidden, targets, ones, **alike, grad_mode="sparse", return_stats=True)
        bounds = stats.gradient_error_bound
        found[name] = {
            "relative_error_of_hidden_and_head": errors,
            "certified_error": bounds.double().sum().item(),
            "share_made_exactly": (bounds == 0).float().mean().item(),
            "times": times,
        }
    return found


def curves(model: LanguageModel, data: Tensor, steps: int, batch: int, rate: float) -> dict[str, list[float]]:
    """The losses of ``steps`` more steps from the same weights, on the same batches, in each of MODES."""
    start = {name: x.clone() for name, x in model.state_dict().items()}
    found = {}
    for mode in MODES:
        model.load_state_dict(start)
        generator = torch.Generator(data.device).manual_seed(1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.05)
        losses = []
        for _ in range(steps):
            rows = data[torch.randint(len(data), (batch,), device=data.device, generator=generator)]
            loss = model.loss(rows, grad_mode=mode.split()[0])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
        found[mode] = torch.stack(losses).tolist() if losses else []
    model.load_state_dict(start)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    parser.add_argument("--seconds", type=float, default=280, help="of training")
    parser.add_argument("--megabytes", type=float, default=20, help="of text")
    parser.add_argument("--vocabulary", type=int, default=32_768)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=16, help="rows of context a step")
    parser.add_argument("--rows", type=int, default=16_384, help="softmax rows to look at")
    parser.add_argument("--curves", type=int, default=300, help="steps with exact and with sparse gradients")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit", default=None, help="recorded in the result; default: git's HEAD")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    device = torch.device(args.device)
    texts = sources(args.megabytes)
    data, held_out = (rows.to(device) for rows in tokens(texts, args.vocabulary, args.context))
    print(f"{len(texts)} files, {data.numel() / 1e6:.1f} M tokens", flush=True)
    model = LanguageModel(args.vocabulary, args.width, args.layers, args.context).to(device)
    if device.type == "cuda":
        model.states = torch.compile(model.states)
    losses = []
    for loss in train(model, data, args.seconds, args.batch):
        losses.append(loss)
        if len(losses) % 100 == 1:
            print(f"step {len(losses)}: {loss:.3f} nats a token", flush=True)
    compiled, model.states = model.states, model._states  # each shape that follows would be compiled anew
    model.eval()

    some = held_out[torch.linspace(0, len(held_out) - 1, max(1, args.rows // args.context), device=device).long()]
    half = args.context // 2
    prompts = data[torch.randperm(len(data), device=device)[: max(1, args.rows // half)], :half]
    with torch.no_grad():
        samples = model.continued(prompts, half)
        seen = {"held-out text": (some, 0), "own samples": (samples, half - 1)}
        report = {"command": command("benchmarks.language_model", parser, args)}
        report |= environment(device, ["transformers", "tokenizers"], args.commit)
        report |= {
            "vocabulary": args.vocabulary,
            "parameters": sum(p.numel() for p in model.parameters()),
            "training_tokens": data.numel(),
        }
        report |= {"losses": losses[:: max(1, len(losses) // 200)], "steps": len(losses)}
        report["held_out_loss"] = torch.stack([model.loss(rows) for rows in held_out.split(8)]).mean().item()
        report["sparsity"], report["gradients"] = {}, {}
        for name, (ids, first) in seen.items():
            hidden = torch.cat([model(rows)[:, first:-1].flatten(0, 1) for rows in ids.split(8)])
            rows = hidden, model.head.bfloat16(), ids[:, first + 1 :].flatten()
            report["sparsity"][name] = sparsity(*rows)
            with torch.enable_grad():
                report["gradients"][name] = gradients(*rows)
            print(f"{name}: done", flush=True)
    model.states = compiled
    model.train()
    report["curves"] = curves(model, data, args.curves, args.batch, 3e-4)
    write(args.output, report)
    print(f"held-out loss {report['held_out_loss']:.3f}")
    for name, found in report["sparsity"].items():
        print(f"{name}: entropy {found['entropy_mean']:.3f}, below 0.01 nat {found['share_entropy_below_0.01']:.1%}")
        for at in found["tolerances"]:
            kept = ", ".join(f"{tenth['kept_mean']:.0f}" for tenth in at["by_entropy"])
            many = ", ".join(f"> {many}: {at[f'share_above_{many}']:.1%}" for many in MANY)
            print(f"  tolerance {at['tolerance']:.1e}: kept by tenths of entropy {kept}; rows {many}")
        for figure, measured in report["gradients"][name].items():
            times = ", ".join(f"{mode} {time.get('ms', math.nan):.2f} ms" for mode, time in measured["times"].items())
            errors = ", ".join(f"{error:.1e}" for error in measured["relative_error_of_hidden_and_head"])
            dense = measured["share_made_exactly"]
            print(f"  {figure}: {times}; relative difference {errors}; {dense:.1%} of the rows made exactly")
    losses = {mode: torch.tensor(report["curves"][mode]) for mode in MODES}
    for first, second in itertools.combinations(MODES, 2):
        gap = (losses[first] - losses[second]).square().mean().sqrt()
        print(f"{first}, {second}: losses differ by {gap:.1e} nat (r.m.s.)")


if __name__ == "__main__":
    main()
