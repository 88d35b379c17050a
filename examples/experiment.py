"""GRPO, REINFORCE, RLSD, EGRSD and CL-EGRSD from one checkpoint at equal budget: accuracy against response length.

    python -m examples.experiment --output experiment_output     # from the repository's root; needs the extra [trl]

A small Qwen3 model is pre-trained on long sums in words, by a careless writer (the task is the demo's). From that
checkpoint ``egrsd train`` then runs each method with several seeds, in a process each: the same problems, reward,
number of rollouts and optimizer steps. What is compared is measured afterwards, on problems that no training saw:
every checkpoint answers them at temperature 1, the last one greedily too.

GRPO's advantages are relative to the group; the others' are Welford's. REINFORCE, without magnitude and gate, stands
between GRPO and RLSD: what differs from it is the token weights' doing, and what GRPO differs by, the advantage's.

Everything that is there already is kept, so that a run that was cut off goes on where it was.
"""

import argparse
import json
import os
import random
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import yaml
from peft import PeftModel
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from benchmarks.measure import command, environment, write
from egrsd_kernels.cli.sweep import TRAIN, train_all
from examples import task

MAX_RESPONSE = 128  # L_max, tokens
ADDITIONS = (3, 4, 5)
CHATTER_RATE = 0.9  # share of the demonstrations that are in words
TEACHER_CHATTER_RATE = 0.45  # who has read the solution, hesitates half as often
HELD_OUT = 512
PROBLEMS = 4096
COLORS = {"GRPO": "#64748b", "REINFORCE": "#a16207", "RLSD": "#0f766e", "EGRSD": "#c2410c", "CL-EGRSD": "#2563eb"}


def correct(completions: list, answer: list[int], **_: Any) -> list[float]:
    """The reward: 1 where the number at the end is right."""
    found = (re.search(r"(?:=|is )(\d+)$", completion[0]["content"]) for completion in completions)
    return [float(match is not None and int(match[1]) == right) for match, right in zip(found, answer, strict=True)]


def methods(gamma: float, lookahead: int) -> dict[str, dict[str, Any]]:
    """What each method changes in the common settings."""
    return {
        "GRPO": {"gamma": 0.0, "clip_eps": 0.0, "advantage": "group"},
        "REINFORCE": {"gamma": 0.0, "clip_eps": 0.0},
        "RLSD": {"gamma": 0.0},
        "EGRSD": {"gamma": gamma},
        "CL-EGRSD": {"gamma": gamma, "lookahead": lookahead},
    }


def pretrain(folder: Path, args: argparse.Namespace) -> None:
    """The common checkpoint, its tokenizer, and the problems: ``model``, ``train.jsonl``, ``held_out.json``."""
    torch.manual_seed(0)
    rng = random.Random(0)
    held_out = task.sample_problems(rng, HELD_OUT, additions=ADDITIONS)
    exclude = frozenset(held_out)
    tokenizer = task.build_tokenizer()
    model = task.build_model(tokenizer, args.width, args.layers).to(args.device)
    classroom = task.Classroom(model, tokenizer, torch.device(args.device), MAX_RESPONSE)
    losses = task.warm_up(classroom, rng, exclude, args.pretrain_steps, ADDITIONS, CHATTER_RATE, TEACHER_CHATTER_RATE)
    for loss in track(losses, "pre-training", total=args.pretrain_steps, transient=True):
        last = loss
    problems = task.sample_problems(rng, PROBLEMS, exclude, ADDITIONS)
    rows = (
        {
            "prompt": [{"role": "user", "content": problem.question}],
            "solution": problem.solution(),
            "answer": problem.answer,
        }
        for problem in problems
    )
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "held_out.json").write_text(json.dumps([problem.terms for problem in held_out]), encoding="utf-8")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    print(f"pre-trained {args.pretrain_steps} steps, loss {last:.3f} nats a token")


def config(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What all runs have in common: the keys of ``egrsd train``."""
    return {
        "model_name_or_path": str(folder / "model"),
        "dtype": "float32",
        "bf16": False,
        "use_cpu": args.device == "cpu",
        "use_peft": True,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_target_modules": task.LORA_MODULES,
        "dataset_name": str(folder / "train.jsonl"),
        "reward_funcs": ["examples.experiment.correct"],
        "teacher_template": list(task.TEACHER_TEMPLATE),
        "per_device_train_batch_size": args.batch,
        "num_generations": 8,
        "max_completion_length": MAX_RESPONSE,
        "top_k": 0,
        "learning_rate": args.lr,
        "lr_scheduler_type": "constant",
        "max_steps": args.steps,
        "save_steps": max(1, args.steps // 5),
        "save_only_model": True,
        "overwrite_output_dir": True,  # what is not finished begins anew
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }


def run_all(folder: Path, args: argparse.Namespace) -> dict[Path, tuple[str, int]]:
    """Train what is not trained yet; the finished runs' folders with their method and seed."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config(folder, args), sort_keys=False), encoding="utf-8")
    runs, commands = {}, {}
    for seed in args.seeds:
        for method, settings in methods(args.gamma, args.lookahead).items():
            run = folder / f"{method}-{seed}"
            runs[run] = method, seed
            options = [f"--{name}={value}" for name, value in {**settings, "seed": seed, "output_dir": run}.items()]
            if not (run / "trainer_state.json").is_file():
                commands[run] = [*TRAIN, str(path), *options]
    failed = [run for run, status in train_all(commands, args.jobs).items() if status]
    if failed:
        sys.exit(f"these runs failed, see their train.log: {', '.join(map(str, failed))}")
    return runs


def evaluate(folder: Path, runs: dict[Path, tuple[str, int]], args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy and mean length on the held-out problems, of the common checkpoint and of every one of each run."""
    device = torch.device(args.device)
    held_out = [task.Problem(tuple(terms)) for terms in json.loads((folder / "held_out.json").read_text("utf-8"))]
    tokenizer = task.build_tokenizer()

    def measure(checkpoint: Path | None, greedy: bool = False, teacher: bool = False) -> dict[str, float]:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).to(device)
        if checkpoint is not None:
            model = PeftModel.from_pretrained(model, checkpoint)
        classroom = task.Classroom(model.eval(), tokenizer, device, MAX_RESPONSE)
        prompt = classroom.teacher_prompt if teacher else classroom.student_prompt
        answers = classroom.answer([prompt(problem) for problem in held_out], sample=not greedy)
        right, lengths, _ = classroom.grade(held_out, answers)
        return {"accuracy": right.float().mean().item(), "length": lengths.float().mean().item()}

    start = {"sampled": measure(None), "greedy": measure(None, greedy=True)}
    start["teacher, greedy"] = measure(None, greedy=True, teacher=True)
    results = []
    for run, (method, seed) in track(runs.items(), "evaluating", transient=True):
        checkpoints = {int(path.name.split("-")[1]): path for path in run.glob("checkpoint-*")}
        curve = [{"step": 0, **start["sampled"]}]
        curve += [{"step": step, **measure(checkpoints[step])} for step in sorted(checkpoints)]
        history = json.loads((run / "trainer_state.json").read_text("utf-8"))["log_history"]
        logged = {name: [row[name] for row in history if name in row] for name in ("reward", "gate/mean")}
        greedy = measure(checkpoints[max(checkpoints)], greedy=True)
        results.append({"method": method, "seed": seed, "curve": curve, "greedy": greedy, "log": logged})
    return {"start": start, "runs": results}


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard deviation over seeds."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def plot(path: Path, report: dict[str, Any]) -> None:
    """Accuracy against length at the end, and both over the steps: means over seeds, one deviation as bar or band."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(15, 4.8), layout="constrained")
    end, accuracy, length = figure.subplots(1, 3)
    start = report["start"]["sampled"]
    end.plot(start["length"], start["accuracy"], "k*", markersize=12, label="checkpoint that all start from")
    for method, color in COLORS.items():
        curves = [run["curve"] for run in report["runs"] if run["method"] == method]
        last = [curve[-1] for curve in curves]
        (x, dx), (y, dy) = (spread([point[name] for point in last]) for name in ("length", "accuracy"))
        end.plot([p["length"] for p in last], [p["accuracy"] for p in last], "o", color=color, alpha=0.3, markersize=5)
        end.errorbar(x, y, xerr=dx, yerr=dy, fmt="o", color=color, capsize=4, markersize=8, label=method)
        steps = [point["step"] for point in curves[0]]
        for axis, name in ((accuracy, "accuracy"), (length, "length")):
            points = [spread([curve[i][name] for curve in curves]) for i in range(len(steps))]
            axis.plot(steps, [mean for mean, _ in points], color=color, linewidth=2, label=method)
            low, high = ([mean + sign * deviation for mean, deviation in points] for sign in (-1, 1))
            axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    seeds = len({run["seed"] for run in report["runs"]})
    end.set(xlabel="mean response length, tokens", title=f"After training, {seeds} seeds", ylabel="accuracy, held-out")
    accuracy.set(xlabel="optimizer step", title="Accuracy")
    length.set(xlabel="optimizer step", title="Mean response length, tokens")
    for axis in (end, accuracy):
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axis in (end, accuracy, length):
        axis.grid(color="#e6e9ee")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=150)


def summary(report: dict[str, Any]) -> list[list[str]]:
    """Method, then accuracy and length at the end, sampled and greedy: means over seeds ± one deviation."""

    def text(values: Sequence[float], form: str) -> str:
        mean, deviation = spread(values)
        return f"{mean:{form}} ± {deviation:{form}}"

    start = report["start"]
    rows = [["checkpoint", *(f"{start[how][name]:{form}}" for how in ("sampled", "greedy") for name, form in FORMS)]]
    for method in COLORS:
        runs = [run for run in report["runs"] if run["method"] == method]
        ends = ([run["curve"][-1] for run in runs], [run["greedy"] for run in runs])
        rows.append([method, *(text([p[name] for p in end], form) for end in ends for name, form in FORMS)])
    return rows


FORMS = (("accuracy", ".1%"), ("length", ".1f"))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("experiment_output"), help="folder for all that it makes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="of the training runs")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of a run")
    parser.add_argument("--batch", type=int, default=64, help="rollouts a step, 8 for each problem")
    parser.add_argument("--lr", type=float, default=2e-4, help="learning rate of the LoRA adapters")
    parser.add_argument("--gamma", type=float, default=1.0, help="γ of EGRSD and CL-EGRSD")
    parser.add_argument("--lookahead", type=int, default=3, help="W of CL-EGRSD, tokens")
    parser.add_argument("--pretrain-steps", type=int, default=1500, help="supervised steps before")
    parser.add_argument("--width", type=int, default=256, help="hidden size of the model")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model")
    parser.add_argument("--jobs", type=int, default=4, help="runs at once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    args = parser.parse_args(argv)
    args.command = command("examples.experiment", parser, args)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    folder = args.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # Matrices this small gain nothing from a second thread; nor do those of the runs, which inherit the variable.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    disable_progress_bar()  # of each model that is loaded
    start = time.perf_counter()
    if not (folder / "held_out.json").is_file() or not (folder / "model").is_dir():
        pretrain(folder, args)
    runs = run_all(folder, args)
    report = {
        "command": args.command,
        **environment(torch.device(args.device), ["transformers", "peft", "trl"]),
        "settings": {name: value for name, value in vars(args).items() if name not in ("output", "device", "command")},
        "methods": methods(args.gamma, args.lookahead),
        **evaluate(folder, runs, args),
    }
    write(folder / "experiment.json", report)
    plot(folder / "experiment.png", report)
    table = Table("method", "accuracy", "length", "greedy accuracy", "greedy length")
    for row in summary(report):
        table.add_row(*row)
    Console().print(table)
    print(
        f"{time.perf_counter() - start:.0f} s. In {args.output}: experiment.json, experiment.png, a folder for each run"
    )


if __name__ == "__main__":
    main()
