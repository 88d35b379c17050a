"""Entropy-guided reinforced self-distillation for real, small enough for a CPU: train, plot, and show the tokens.

    python examples/demo.py                  # a few minutes on a CPU; takes a GPU where there is one
    python examples/demo.py --lookahead 0    # EGRSD instead of CL-EGRSD
    python examples/demo.py --gamma 0        # without the entropy gate

A small Qwen3 model learns sums such as 13-8+1. A short supervised warm-up lets it imitate a careless student, who
chatters half of the time and forgets most carries. Then comes the method: the model samples its own answers, a checker
rewards the right ones, short ones more, and the same backbone with its LoRA adapters disabled, which has read a
reference solution, says how much each token should count. The method is ``train``; the sums, the tokenizer and the
warm-up are in examples/task.py.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from egrsd_kernels import TokenStats, fused_egrsd_loss
from egrsd_kernels.credit import regime_shares, token_regimes
from egrsd_kernels.extras import how_to_install
from egrsd_kernels.rl import WelfordAdvantage, align_responses, response_hidden
from egrsd_kernels.rollouts import Rollout, write_token_report

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script finds its neighbours only, and not examples.task

from examples.task import LORA_MODULES, Classroom, Problem, build_model, build_tokenizer, sample_problems, warm_up

try:
    import matplotlib
    from peft import LoraConfig, get_peft_model
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from rich.text import Text
    from transformers import PreTrainedTokenizerFast
except ImportError as error:
    raise ImportError(f"the demo needs {error.name}: {how_to_install('train')}") from error

HELD_OUT = 256  # problems that no training sees
SHOWN = 4  # rollouts on the page from the first, the middle and the last step

# ---------------------------------------------------------------------------------------------------- the method itself


def train(
    classroom: Classroom, rng: random.Random, exclude: frozenset[Problem], args: argparse.Namespace
) -> Iterator[Step]:
    """Entropy-guided reinforced self-distillation of the LoRA adapters; the backbone and the head stay frozen."""
    model, tokenizer, device = classroom.model, classroom.tokenizer, classroom.device
    base = model.get_base_model()
    backbone, head = base.model, base.lm_head.weight
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    advantage = WelfordAdvantage()

    for _ in range(args.steps):
        start = time.perf_counter()
        # Rollouts: the model answers, and the checker rewards it.
        problems = sample_problems(rng, args.batch, exclude)
        student_prompts = [classroom.student_prompt(problem) for problem in problems]
        teacher_prompts = [classroom.teacher_prompt(problem) for problem in problems]
        responses = classroom.answer(student_prompts, sample=True)
        correct, lengths, rewards = classroom.grade(problems, responses)
        advantages = advantage(rewards)

        # The teacher is the frozen backbone, whose prompt has the reference solution. Both read the same answers.
        batch = align_responses(student_prompts, teacher_prompts, responses, tokenizer.pad_token_id).to(device)
        with torch.no_grad(), model.disable_adapter():
            teacher_hidden = response_hidden(backbone(**batch.teacher).last_hidden_state, batch.teacher_positions)
        student_hidden = response_hidden(backbone(**batch.student).last_hidden_state, batch.student_positions)

        # The loss: each token's log-probability, weighted with its credit. The logits are never stored.
        loss, stats = fused_egrsd_loss(
            student_hidden,
            head,
            teacher_hidden,
            batch.target_ids,
            advantages.to(device),
            mask=batch.mask,
            gamma=args.gamma,
            lookahead=args.lookahead,
            return_stats=True,
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

        yield Step(
            problems, responses, correct, lengths, rewards, advantages, batch.mask, stats, loss.item(),
            seconds=time.perf_counter() - start,
        )  # fmt: skip


METRICS = (
    "reward",
    "accuracy",
    "length",
    "entropy",
    "gate",
    "loss",
    "lock",
    "fork",
    "pivot",
    "mid",
    "tokens_per_second",
)


@dataclass(frozen=True)
class Step:
    """What one step of :func:`train` saw and did. (B,) each, but for the mask and the statistics, which are (B, T)."""

    problems: list[Problem]
    responses: list[list[int]]
    correct: Tensor
    lengths: Tensor
    rewards: Tensor
    advantages: Tensor
    mask: Tensor
    stats: TokenStats
    loss: float
    seconds: float

    def metrics(self, vocabulary: int) -> dict[str, float]:
        """The ``METRICS``; entropy in nats."""
        stats, scale = self.stats, math.log(vocabulary)
        regimes = token_regimes(stats.teacher_entropy / scale, stats.lookahead_entropy / scale, mask=self.mask)
        return {
            "reward": self.rewards.mean().item(),
            "accuracy": self.correct.float().mean().item(),
            "length": self.lengths.float().mean().item(),
            "entropy": stats.teacher_entropy[self.mask].mean().item(),
            "gate": stats.gate[self.mask].mean().item(),
            "loss": self.loss,
            **regime_shares(regimes),
            "tokens_per_second": self.lengths.sum().item() / self.seconds,
        }

    def rollouts(self, tokenizer: PreTrainedTokenizerFast, title: str) -> list[Rollout]:
        """The first ``SHOWN`` of them, for the page."""
        return [
            Rollout.from_stats(
                self.stats,
                row,
                title=title,
                prompt=problem.question,
                tokens=[tokenizer.decode([token]) for token in self.responses[row]],
                reward=self.rewards[row].item(),
                advantage=self.advantages[row].item(),
                reference=problem.solution(),
            )
            for row, problem in enumerate(self.problems[:SHOWN])
        ]


# -------------------------------------------------------------------------------------------------------------- results


def plot_curves(path: Path, curves: dict[str, list[float]], before: dict[str, float], after: dict[str, float]) -> None:
    """Smoothed curves over the faint raw ones; dots are the greedy answers to held-out problems."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter

    panels = {
        "reward": "Reward",
        "accuracy": "Accuracy",
        "length": "Response length, tokens",
        "entropy": "Teacher entropy, nats a token",
        "gate": "Gate ω",
    }
    steps = range(1, len(curves["reward"]) + 1)
    style = {
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e6e9ee",
        "axes.edgecolor": "#8a93a3",
        "legend.frameon": False,
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
        for axis, (name, label) in zip(axes.flat, panels.items(), strict=False):
            axis.plot(steps, curves[name], color="#2563eb", alpha=0.25, linewidth=1)
            axis.plot(steps, smooth(curves[name]), color="#2563eb", linewidth=2.2, label="sampled rollouts")
            if name in before:
                dots = [before[name], after[name]]
                axis.plot([0, len(steps)], dots, "o", color="#c2410c", markersize=7, label="held-out, greedy", zorder=3)
                axis.legend(loc="best", fontsize=9)
            axis.set_title(label)
        axes.flat[1].yaxis.set_major_formatter(PercentFormatter(1.0))
        shares = axes.flat[5]
        shares.grid(False)
        colors = {"lock": "#94a3b8", "mid": "#0f766e", "pivot": "#6d28d9", "fork": "#dc2626"}
        shares.stackplot(steps, [smooth(curves[name]) for name in colors], labels=list(colors), colors=colors.values())
        shares.set(title="Token regimes", ylim=(0, 1))
        shares.yaxis.set_major_formatter(PercentFormatter(1.0))
        shares.legend(loc="lower left", ncols=4, fontsize=9, frameon=True)
        for axis in axes.flat:
            axis.margins(x=0.02)
            axis.set_xlabel("step")
        figure.savefig(path, dpi=150)
        plt.close(figure)


def smooth(values: Sequence[float], half_life: float = 3.0) -> list[float]:
    """Exponential moving average, its weights normalised so that the start is not pulled to zero."""
    keep = 0.5 ** (1 / half_life)
    total = weight = 0.0
    smoothed = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight)
    return smoothed


# ----------------------------------------------------------------------------------------------------------------- main


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Entropy-guided reinforced self-distillation of a small model, on a CPU or a GPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=80, help="reinforcement steps")
    parser.add_argument("--warmup-steps", type=int, default=500, help="supervised steps before them")
    parser.add_argument("--batch", type=int, default=64, help="rollouts a step")
    parser.add_argument("--lookahead", type=int, default=3, help="the lookahead window W, tokens; 0 is EGRSD")
    parser.add_argument("--gamma", type=float, default=1.0, help="strength γ of the entropy gate; 0 is RLSD")
    parser.add_argument("--lr", type=float, default=5e-4, help="learning rate of the LoRA adapters")
    parser.add_argument("--seed", type=int, default=0, help="of the problems, the model and the sampling")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for what it makes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, …")
    args = parser.parse_args(argv)
    for name in ("steps", "warmup_steps", "batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1")
    return args


class Display:
    """A line of live figures over the progress bars, and a line kept for every tenth of the way."""

    def __init__(self, console: Console):
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self.live = Live(self.progress, console=console, refresh_per_second=8)

    def track(self, name: str, total: int) -> Callable[[str], None]:
        """Add a bar; the function returned advances it and shows the figures."""
        task = self.progress.add_task(name, total=total)
        done = 0

        def advance(figures: str) -> None:
            nonlocal done
            done += 1
            self.progress.advance(task)
            self.live.update(Group(Text(f"{done:>4}  {figures}"), self.progress))
            if done % max(total // 10, 1) == 0:
                self.console.print(f"{done:>4}  {figures}", style="dim", highlight=False)

        return advance


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    console = Console()
    start = time.perf_counter()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # peft asks it for old names
    # Matrices this small gain nothing from a second thread, and threads that wait for a busy core lose a lot.
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    held_out = sample_problems(rng, HELD_OUT)
    exclude = frozenset(held_out)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).to(args.device)
    classroom = Classroom(model, tokenizer, torch.device(args.device))
    size = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"Qwen3 with {size / 1e6:.1f} M parameters, {len(tokenizer)} tokens, on {args.device}")
    console.print(
        f"a problem {held_out[0].question}   its reference solution {held_out[0].solution()}", highlight=False
    )

    display = Display(console)
    curves: dict[str, list[float]] = {name: [] for name in METRICS}
    shown: list[Rollout] = []
    with display.live:
        advance = display.track("warm-up", args.warmup_steps)
        for loss in warm_up(classroom, rng, exclude, args.warmup_steps):
            advance(f"loss {loss:.3f}")

        before, teacher = classroom.evaluate(held_out), classroom.evaluate(held_out, teacher=True)
        lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=LORA_MODULES)
        classroom.model = get_peft_model(model, lora)

        advance = display.track("training", args.steps)
        for index, step in enumerate(train(classroom, rng, exclude, args)):
            metrics = step.metrics(len(tokenizer))
            for name, value in metrics.items():
                curves[name].append(value)
            if index in {0, args.steps // 2, args.steps - 1}:
                shown += step.rollouts(tokenizer, title=f"step {index + 1}")
            advance(
                "reward {reward:.2f}  acc {accuracy:.0%}  len {length:.1f}  H {entropy:.2f}  gate {gate:.2f}  "
                "loss {loss:+.2f}  {tokens_per_second:.0f} tok/s".format(**metrics)
            )
        after = classroom.evaluate(held_out)

    args.output.mkdir(parents=True, exist_ok=True)
    plot_curves(args.output / "curves.png", curves, before, after)
    write_token_report(args.output / "rollouts.html", shown, vocab_size=len(tokenizer), title="EGRSD: sampled rollouts")
    record = {
        "settings": {name: value for name, value in vars(args).items() if name != "output"},
        "held_out": {"before": before, "after": after, "teacher": teacher},
        "seconds": time.perf_counter() - start,
        "curves": curves,
    }
    (args.output / "curves.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    table = Table("held-out, greedy", "accuracy", "reward", "tokens")
    for name, figures in {"before": before, "after": after, "teacher (has the reference)": teacher}.items():
        table.add_row(name, f"{figures['accuracy']:.1%}", f"{figures['reward']:.3f}", f"{figures['length']:.1f}")
    console.print()
    console.print(table)
    console.print(f"{record['seconds']:.0f} s. In {args.output}: curves.png, curves.json, rollouts.html")


if __name__ == "__main__":
    main()
