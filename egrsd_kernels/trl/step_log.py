"""What is kept of an optimizer step's micro-batches until its last one: its metrics, and its rollouts for the disk."""

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from egrsd_kernels import TokenStats
from egrsd_kernels.rollouts import Rollout, write_rollouts

from .evidence import learned
from .export import rollout_file, rollouts_of
from .metrics import evidence_metrics, gathered_tokens, peak_memory_gib, token_metrics

logger = logging.getLogger(__name__)


class StepLog:
    """The optimizer step in progress of an :class:`.trainer.EGRSDTrainer`."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._export_failed = False
        # By mode: tokens since the last log, and when their first step began.
        self._pace: dict[str, tuple[int, float]] = {}
        self.begin()

    def begin(self) -> None:
        """Forget the micro-batches of the optimizer step before, which is logged, or was interrupted for good."""
        self.signals: list[dict[str, Tensor]] = []  # and the entropy scale: (valid tokens,) of each micro-batch so far
        self.aux_losses: list[Tensor] = []  # load-balancing losses, one a micro-batch
        self._rollouts: list[Rollout] = []

    def start_clock(self) -> None:
        """Where none runs since the last log."""
        self._pace.setdefault(self.trainer._mode, (0, time.perf_counter()))

    def stop_clock(self) -> None:
        self._pace.pop(self.trainer._mode, None)

    def add(self, inputs: dict[str, Any], signals: dict[str, Tensor]) -> None:
        """Keep a micro-batch's signals (B, T) for the metrics of its optimizer step, which its last one logs."""
        trainer, mask = self.trainer, learned(inputs)
        signals["entropy_scale"] = inputs["entropy_scale"].expand(mask.shape)
        kept = torch.stack(list(signals.values()))[:, mask]  # at once: the host waits for how many they are
        self.signals.append(dict(zip(signals, kept, strict=True)))
        step, every = trainer.state.global_step + 1, trainer.args.rollout_steps
        export = trainer._mode == "train" and every and step % every == 0
        if export:
            stats = TokenStats(*(signals[name] for name in TokenStats._fields))
            self._rollouts += rollouts_of(inputs, mask, stats, step, trainer._vocab_size, trainer._tokenizer)
        if trainer._mode == "eval" or trainer.accelerator.sync_gradients:  # the step's last micro-batch
            self._log()
            if export:
                self._write(step)
            self.begin()

    def _log(self) -> None:
        """Metrics of one optimizer step, exact over its micro-batches and processes, into TRL's own averages."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        tokens = gathered_tokens(self.signals, accelerator)
        metrics = self.metrics_of(tokens, len(self.signals) * accelerator.num_processes)
        memory = torch.tensor([peak_memory_gib(accelerator.device)], device=accelerator.device)
        metrics["peak_memory_gib"] = accelerator.gather(memory).max().item()
        if self.aux_losses:
            metrics["aux_loss"] = accelerator.gather(torch.stack(self.aux_losses)).mean().item()
        logged = trainer._metrics[trainer._mode]
        for name, value in metrics.items():
            logged[name].append(value)
        # TRL logs a mean over steps, of which only some generate: hence one value, of all tokens and all the time.
        before, start = self._pace[trainer._mode]
        count = before + len(tokens["student_logp"])
        self._pace[trainer._mode] = count, start
        logged["tokens_per_second"] = [count / (time.perf_counter() - start)]

    def metrics_of(self, tokens: Mapping[str, Tensor], calls: int) -> dict[str, float]:
        """Metrics of ``tokens``: by name, (N,) each, the signals and the entropy scale of ``calls`` micro-batches."""
        trainer, args = self.trainer, self.trainer.args
        if "gate" not in tokens:
            metrics = evidence_metrics(tokens, trainer._contexts)
            if not math.isfinite(metrics.get("token_advantage/abs_mean", 0.0)):  # on a GPU nobody has looked yet
                raise ValueError("token_advantage: expected no NaN and no infinity at a valid position, got some")
            return metrics
        return {"gamma": trainer.gamma} | token_metrics(
            tokens,
            gamma=trainer.gamma,
            gate_floor=args.gate_floor,
            clip_eps=args.clip_eps,
            scale=tokens["entropy_scale"],
            log_vocab=math.log(trainer._vocab_size),
            tau_low=args.tau_low,
            tau_high=args.tau_high,
            divergence=args.divergence is not None,
            sparse_calls=calls if trainer._direct and args.grad_mode == "sparse" else 0,
        )

    def _write(self, step: int) -> None:
        rollouts = gather_object(self._rollouts)
        path = rollout_file(self.trainer.args.output_dir, step)
        if self.trainer.accelerator.is_main_process:
            try:
                write_rollouts(path, rollouts)
            except OSError as error:  # a full disk, for example: no reason to lose the run
                if not self._export_failed:
                    logger.warning(
                        f"rollout_steps: {path}: {error.strerror or error}; training goes on without this file, and "
                        f"without a word on later ones that cannot be written"
                    )
                self._export_failed = True
