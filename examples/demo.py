"""Entropy-guided reinforced self-distillation for real, small enough for a CPU: train, plot, and show the tokens.

    python examples/demo.py                  # a few minutes on a CPU; takes a GPU where there is one
    python examples/demo.py --lookahead 0    # EGRSD instead of CL-EGRSD
    python examples/demo.py --gamma 0        # without the entropy gate

A small Qwen3 model learns sums such as 13-8+1. A short supervised warm-up lets it imitate a careless student, who
chatters half of the time and forgets most carries. Then comes the method: the model samples its own answers, a checker
rewards the right ones, short ones more, and the same backbone with its LoRA adapters disabled, which has read a
reference solution, says how much each token should count.
"""

import argparse
import json
import math
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from egrsd_kernels import fused_egrsd_loss
from egrsd_kernels.credit import regime_shares, token_regimes
from egrsd_kernels.extras import how_to_install
from egrsd_kernels.rl import (
    WelfordAdvantage,
    align_responses,
    length_shaped_reward,
    pad_inputs,
    response_hidden,
    teacher_messages,
)
from egrsd_kernels.rollouts import Rollout, write_token_report

try:
    import matplotlib
    from peft import LoraConfig, PeftModel, get_peft_model
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from rich.text import Text
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
except ImportError as error:
    raise ImportError(f"the demo needs {error.name}: {how_to_install('train')}") from error

MAX_RESPONSE = 56  # L_max, tokens
HELD_OUT = 256  # problems that no training sees
SHOWN = 4  # rollouts on the page from the first, the middle and the last step

# ---------------------------------------------------------------------------------------------------------------- task

PAUSES = ["hmm", "well", "okay", "now", "then", "so"]
CHATTER_RATE = 0.5  # share of the warm-up's demonstrations that are in words
SLIP_RATE = 0.8  # share of their carries that are forgotten
LARGEST = 29  # number that can turn up: the largest total is 20, and a forgotten borrow makes it ten more


@dataclass(frozen=True)
class Problem:
    """A sum of signed terms whose running total stays within 0..20."""

    terms: tuple[int, ...]

    @property
    def question(self) -> str:
        return _sum(self.terms)

    @property
    def answer(self) -> int:
        return sum(self.terms)

    def solution(self, chatter: random.Random | None = None, slips: random.Random | None = None) -> str:
        """The working, step by step: terse (``=15-4=11``), or with ``chatter`` in words and with pauses for thought.

        With ``slips`` it is the careless student's: most carries and borrows are forgotten, the work goes on with the
        wrong number, and so arrives at a wrong answer.
        """
        lines, rest = [], list(self.terms)
        while len(rest) > 1:
            first, second, *others = rest
            total = first + second
            if slips is not None and total // 10 != first // 10 and slips.random() < SLIP_RATE:
                slipped = total + (10 if second < 0 else -10)
                if all(0 <= later <= LARGEST for later in accumulate([slipped, *others])):
                    total = slipped
            rest = [total, *others]
            if chatter is None:
                lines.append(f"={_sum(rest)}")
            else:
                pause = " ".join(chatter.choices(PAUSES, k=chatter.randint(2, 6)))
                lines.append(f"{pause} {first}{second:+d}={total}\nleaves {_sum(rest)}\n")
        return "".join(lines) + ("" if chatter is None else f"the answer is {rest[0]}")

    def accepts(self, response: str) -> bool:
        """The verifier: the number at the end alone counts, in whatever style."""
        found = re.search(r"(?:=|is )(\d+)$", response)
        return found is not None and int(found[1]) == self.answer


def _sum(terms: Sequence[int]) -> str:
    return str(terms[0]) + "".join(f"{term:+d}" for term in terms[1:])


def sample_problems(
    rng: random.Random, count: int, exclude: frozenset[Problem] = frozenset(), additions: Sequence[int] = (2, 3)
) -> list[Problem]:
    """Problems with one of ``additions`` as the number of signs, none of them in ``exclude``."""
    problems: list[Problem] = []
    while len(problems) < count:
        terms = [rng.randint(1, 20)]
        for _ in range(rng.choice(additions)):
            terms.append(rng.choice([term for term in range(-9, 10) if term and 0 <= sum(terms) + term <= 20]))
        if Problem(tuple(terms)) not in exclude:
            problems.append(Problem(tuple(terms)))
    return problems


# -------------------------------------------------------------------------------------------------- tokenizer and model

SPECIAL = ["<pad>", "<end>", "<user>", "<assistant>"]
WORDS = [*(f"{word} " for word in [*PAUSES, "leaves", "the", "answer", "is"]), "again"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# The teacher's two turns in the words this model knows; a pretrained model takes the default of teacher_messages.
TEACHER_TEMPLATE = ({"role": "assistant", "content": "{solution}"}, {"role": "user", "content": "again"})


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word, number and signed term."""
    numbers = [str(number) for number in range(LARGEST + 1)]
    terms = [f"{term:+d}" for term in range(-9, 10) if term]
    vocabulary = [*SPECIAL, *WORDS, *numbers, *terms, "=", "\n"]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z]+ ?|[+-]?\d+|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=SPECIAL[2:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, width: int = 128, layers: int = 3) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.06,  # near 1/sqrt(hidden_size); the default 0.02 suits wide models and learns slowly here
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


# --------------------------------------------------------------------------------------------------- prompts, responses


class Classroom:
    """A model with its tokenizer: writes prompts for student and teacher, and lets the model answer them."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerFast,
        device: torch.device,
        max_response: int = MAX_RESPONSE,
    ):
        self.model, self.tokenizer, self.device, self.max_response = model, tokenizer, device, max_response

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.tokenizer.encode(text)

    def student_prompt(self, problem: Problem) -> list[int]:
        return self._prompt([{"role": "user", "content": problem.question}])

    def teacher_prompt(self, problem: Problem) -> list[int]:
        return self._prompt(teacher_messages(problem.question, problem.solution(), TEACHER_TEMPLATE))

    def response(self, text: str) -> list[int]:
        return [*self.tokenizer.encode(text), self.tokenizer.eos_token_id]

    @torch.no_grad()
    def answer(self, prompts: Sequence[list[int]], sample: bool) -> list[list[int]]:
        """Responses of the model as token ids, up to and with <end>."""
        inputs = pad_inputs(prompts, self.tokenizer.pad_token_id, padding_side="left")
        # top_k = 0: sampling from the full softmax, the distribution that the loss differentiates.
        how = {"do_sample": True, "top_k": 0} if sample else {"do_sample": False}
        output = self.model.generate(
            input_ids=inputs["input_ids"].to(self.device),
            attention_mask=inputs["attention_mask"].to(self.device),
            max_new_tokens=self.max_response,
            **how,
        )
        end = self.tokenizer.eos_token_id
        rows = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [row[: row.index(end) + 1] if end in row else row for row in rows]

    def grade(self, problems: Sequence[Problem], responses: Sequence[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) each: correct (bool), lengths in tokens, rewards. A response that was cut off is wrong."""
        end = self.tokenizer.eos_token_id
        correct = torch.tensor(
            [
                response[-1] == end and problem.accepts(self.tokenizer.decode(response[:-1]))
                for problem, response in zip(problems, responses, strict=True)
            ]
        )
        lengths = torch.tensor([len(response) for response in responses])
        return correct, lengths, length_shaped_reward(correct, lengths, self.max_response)

    def evaluate(self, problems: Sequence[Problem], teacher: bool = False) -> dict[str, float]:
        """Greedy accuracy, mean reward and mean length; ``teacher`` puts the reference solution in the prompt."""
        prompt = self.teacher_prompt if teacher else self.student_prompt
        correct, lengths, rewards = self.grade(problems, self.answer([prompt(p) for p in problems], sample=False))
        return {
            "accuracy": correct.float().mean().item(),
            "reward": rewards.mean().item(),
            "length": lengths.float().mean().item(),
        }


# --------------------------------------------------------------------------------------------------- supervised warm-up


def warm_up(
    classroom: Classroom,
    rng: random.Random,
    exclude: frozenset[Problem],
    steps: int,
    additions: Sequence[int] = (2, 3),
    chatter_rate: float = CHATTER_RATE,
    teacher_chatter_rate: float = CHATTER_RATE,
) -> Iterator[float]:
    """Imitate the careless student's demonstrations; yields the loss (nats a token) of each step.

    The first eighth drills single additions, which the longer sums are made of. After it every third batch has the
    teacher's format and no slips, so the model learns to profit from a reference solution where it has one.
    """
    model, tokenizer = classroom.model, classroom.tokenizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 1.0) * (1 - 0.9 * step / steps)
    )
    for step in range(steps):
        drill, privileged = step < steps // 8, step % 3 == 2
        if drill:
            problems = sample_problems(rng, 256, additions=(1,))
            demonstrations = [problem.solution(slips=rng) for problem in problems]
            prompts = [classroom.student_prompt(problem) for problem in problems]
        else:
            problems = sample_problems(rng, 32, exclude, additions)
            rate = teacher_chatter_rate if privileged else chatter_rate
            demonstrations = [
                problem.solution(rng if rng.random() < rate else None, slips=None if privileged else rng)
                for problem in problems
            ]
            prompts = [
                classroom.teacher_prompt(problem) if privileged else classroom.student_prompt(problem)
                for problem in problems
            ]
        responses = [classroom.response(demonstration) for demonstration in demonstrations]
        batch = align_responses(prompts, prompts, responses, tokenizer.pad_token_id).to(classroom.device)
        hidden = response_hidden(model.model(**batch.student).last_hidden_state, batch.student_positions)
        loss = nn.functional.cross_entropy(model.lm_head(hidden).flatten(0, 1), batch.target_ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()


# ---------------------------------------------------------------------------------------------------- the method itself


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
    """One step of :func:`train`: its ``METRICS`` (entropy in nats) and the rollouts behind them."""

    metrics: dict[str, float]
    rollouts: list[Rollout]


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
        problems = sample_problems(rng, args.batch, exclude)
        student_prompts = [classroom.student_prompt(problem) for problem in problems]
        teacher_prompts = [classroom.teacher_prompt(problem) for problem in problems]
        responses = classroom.answer(student_prompts, sample=True)
        correct, lengths, rewards = classroom.grade(problems, responses)
        advantages = advantage(rewards)

        batch = align_responses(student_prompts, teacher_prompts, responses, tokenizer.pad_token_id).to(device)
        with torch.no_grad(), model.disable_adapter():  # the frozen backbone, which sees the reference solution
            teacher_hidden = response_hidden(backbone(**batch.teacher).last_hidden_state, batch.teacher_positions)
        student_hidden = response_hidden(backbone(**batch.student).last_hidden_state, batch.student_positions)
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

        scale = math.log(len(tokenizer))
        regimes = token_regimes(stats.teacher_entropy / scale, stats.lookahead_entropy / scale, mask=batch.mask)
        metrics = {
            "reward": rewards.mean().item(),
            "accuracy": correct.float().mean().item(),
            "length": lengths.float().mean().item(),
            "entropy": stats.teacher_entropy[batch.mask].mean().item(),
            "gate": stats.gate[batch.mask].mean().item(),
            "loss": loss.item(),
            **regime_shares(regimes),
            "tokens_per_second": lengths.sum().item() / (time.perf_counter() - start),
        }
        rollouts = [
            Rollout.from_stats(
                stats,
                row,
                prompt=problem.question,
                tokens=[tokenizer.decode([token]) for token in responses[row]],
                reward=rewards[row].item(),
                advantage=advantages[row].item(),
                reference=problem.solution(),
            )
            for row, problem in enumerate(problems[:SHOWN])
        ]
        yield Step(metrics, rollouts)


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

LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


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
            for name, value in step.metrics.items():
                curves[name].append(value)
            if index in {0, args.steps // 2, args.steps - 1}:
                shown += [replace(rollout, title=f"step {index + 1}") for rollout in step.rollouts]
            advance(
                "reward {reward:.2f}  acc {accuracy:.0%}  len {length:.1f}  H {entropy:.2f}  gate {gate:.2f}  "
                "loss {loss:+.2f}  {tokens_per_second:.0f} tok/s".format(**step.metrics)
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
