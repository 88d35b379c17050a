"""The peers: what one would take today for an EGRSD step, each through its own package.

A step is T and S. T is the teacher's statistics: log p of the targets and entropy, without a gradient. S is the
student's log p of the targets, forward and backward, with a weight for each token. The head is frozen (a hidden
gradient only) or trained. The step of ``ours`` is the whole method: weights, gate and lookahead included.

A peer does as much of the step as it can. Its ``cannot`` says what it cannot do, and its step does without that. The
bare matrix product, a lower bound, stands for T where a peer cannot do T at all.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from torch.utils.checkpoint import checkpoint

from benchmarks.problem import Problem, Step
from egrsd_kernels import TokenStats, fused_egrsd_loss, linear_logp, token_statistics

CHUNK = 1024  # rows, for those who leave chunking to the caller

# log p (N,) and, where the peer knows it, entropy (N,)
Statistics = tuple[torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class Calls:
    """A peer on one problem. statistics: None where T cannot be had alone. step: takes whether the head is trained."""

    statistics: Callable[[], Statistics] | None
    step: Callable[[bool], Step]


@dataclass(frozen=True)
class Peer:
    key: str
    name: str
    build: Callable[[Problem], Calls]  # imports the package; raises ImportError where it is missing
    package: str | None  # the distribution whose version is recorded
    cannot: str | None
    per_token: bool  # takes any weight for each token


PEERS: dict[str, Peer] = {}
NO_ENTROPY = "entropy"
FROZEN_GRADIENT = "leave out a frozen head's gradient"
UNIFORM = "a weight for each token; log p; entropy (the bare product stands for the teacher)"


def packages() -> list[str]:
    """The distributions that a result depends on: the peers', and what Liger and quack compile for Hopper with."""
    return sorted({peer.package for peer in PEERS.values() if peer.package} | {"nvidia-cutlass-dsl"})


def peer(key: str, name: str, package: str | None = None, cannot: str | None = None, per_token: bool = True):
    def register(build: Callable[[Problem], Calls]) -> Callable[[Problem], Calls]:
        PEERS[key] = Peer(key, name, build, package, cannot, per_token)
        return build

    return register


def _per_token(p: Problem, statistics: Callable[[], Statistics], logp: Callable[..., torch.Tensor]) -> Calls:
    """From T and a differentiable log p of (hidden, weight), whose backward pass takes a weight for each token."""

    def step(trained: bool) -> Step:
        with torch.no_grad():
            teacher_logp, entropy = statistics()
        hidden, weight = p.leaves(trained)
        out, credit = logp(hidden, weight), p.credit
        out.backward(credit.to(out.dtype))
        return Step(teacher_logp, entropy, out.detach(), credit, hidden.grad, weight.grad)

    return Calls(torch.no_grad()(statistics), step)


def _uniform(p: Problem, loss: Callable[..., torch.Tensor], credit: float) -> Calls:
    """From a scalar loss of (hidden, weight) in which every token's dL/dlogp is ``credit``."""

    def step(trained: bool) -> Step:
        p.forward_product(p.teacher_hidden)
        hidden, weight = p.leaves(trained)
        loss(hidden, weight).backward()
        return Step(None, None, None, torch.full_like(p.advantages, credit), hidden.grad, weight.grad)

    return Calls(None, step)


def _chunked(function: Callable, p: Problem, hidden: torch.Tensor, *more) -> list:
    pairs = zip(hidden.split(CHUNK), p.targets.split(CHUNK), strict=True)
    return [function(rows, targets, *more) for rows, targets in pairs]


def without_parents(name: str) -> ModuleType:
    """Import a module whose packages may want more than the module itself does.

    verl's top level imports its whole training stack, and flash_attn's its CUDA extension; a Triton kernel inside needs
    neither. The packages above the module become empty ones on the same path where their import fails.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        root, *inner = name.split(".")[:-1]
        found = importlib.util.find_spec(root)
        if found is None:
            raise
    path = Path(found.submodule_search_locations[0])
    for depth in range(len(inner) + 1):
        package = ModuleType(".".join([root, *inner[:depth]]))
        package.__path__ = [str(path.joinpath(*inner[:depth]))]
        sys.modules[package.__name__] = package
    return importlib.import_module(name)


# ------------------------------------------------------------------------------------------------ ours


def egrsd_step(p: Problem, trained: bool, **options) -> tuple[torch.Tensor, torch.Tensor | None, TokenStats]:
    """The whole method: gradients of hidden states and of a trained head, and the statistics."""
    hidden, weight = p.leaves(trained)
    loss, stats = fused_egrsd_loss(
        hidden, weight, p.teacher_hidden, p.targets, p.advantages, lookahead=3, return_stats=True, **options
    )
    loss.backward()
    return hidden.grad, weight.grad, stats


def _ours(p: Problem, **options) -> Calls:
    def statistics() -> Statistics:
        return token_statistics(p.teacher_hidden, p.weight, p.targets, **options)[:2]

    def step(trained: bool) -> Step:
        d_hidden, d_weight, stats = egrsd_step(p, trained, **options)
        credit = -stats.token_advantage / len(p.targets)
        return Step(stats.teacher_logp, stats.teacher_entropy, stats.student_logp, credit, d_hidden, d_weight)

    return Calls(statistics, step)


@peer("ours", "egrsd_kernels", "egrsd-kernels")
def ours(p: Problem) -> Calls:
    return _ours(p)


@peer(
    "ours-sparse",
    "egrsd_kernels, sparse gradients",
    "egrsd-kernels",
    "gradients to the last bit: up to 2^-10 of their L1 norm is left out",
)
def ours_sparse(p: Problem) -> Calls:
    return Calls(None, _ours(p, grad_mode="sparse").step)


@peer("ours-pointer", "egrsd_kernels, pointer kernels", "egrsd-kernels")
def ours_pointer(p: Problem) -> Calls:
    """The kernels that GPUs without TMA take."""
    calls, pointer = _ours(p), mock.patch.dict(os.environ, EGRSD_KERNELS_TMA="0")
    return Calls(pointer(calls.statistics), pointer(calls.step))


@peer("ours-torch", "egrsd_kernels, PyTorch backend", "egrsd-kernels")
def ours_torch(p: Problem) -> Calls:
    return _ours(p, backend="torch")


@peer("ours-logp", "egrsd_kernels, token_statistics + linear_logp", "egrsd-kernels")
def ours_logp(p: Problem) -> Calls:
    """The building blocks, used like the others here: log p first, weights afterwards."""

    def statistics() -> Statistics:
        return token_statistics(p.teacher_hidden, p.weight, p.targets)[:2]

    return _per_token(p, statistics, lambda hidden, weight: linear_logp(hidden, weight, p.targets))


# ------------------------------------------------------------------------------------------------ PyTorch


def _logp(hidden: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    log_p = (hidden @ weight.t()).float().log_softmax(-1)
    return log_p.gather(1, targets[:, None]).squeeze(1)


def _statistics(hidden: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> Statistics:
    log_p = (hidden @ weight.t()).float().log_softmax(-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


@peer("eager", "PyTorch eager, full logits")
def eager(p: Problem) -> Calls:
    return _per_token(
        p,
        lambda: _statistics(p.teacher_hidden, p.targets, p.weight),
        lambda hidden, weight: _logp(hidden, p.targets, weight),
    )


@peer("compile", "torch.compile, chunked and checkpointed")
def compiled(p: Problem) -> Calls:
    logp, both = (torch.compile(function, dynamic=False) for function in (_logp, _statistics))

    def statistics() -> Statistics:
        parts = _chunked(both, p, p.teacher_hidden, p.weight)
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def student(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        def recomputed(rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return checkpoint(logp, rows, targets, weight, use_reentrant=False)

        return torch.cat(_chunked(recomputed, p, hidden))

    return _per_token(p, statistics, student)


# ------------------------------------------------------------------------------------------------ other packages


@peer("trl", "TRL ChunkedLogProbFunction", "trl")
def trl(p: Problem) -> Calls:
    """What GRPOTrainer calls, with its chunks; only the teacher's entropy, which costs a little, is asked for."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as WIDTH  # the backward pass imports that module

    def function(hidden: torch.Tensor, weight: torch.Tensor, *outputs: str) -> tuple[torch.Tensor | None, ...]:
        bias, temperature, softcap, logit_scale = None, 1.0, None, 1.0
        return ChunkedLogProbFunction.apply(
            hidden, weight, bias, p.targets, temperature, WIDTH, softcap, logit_scale, outputs
        )

    return _per_token(
        p,
        lambda: function(p.teacher_hidden, p.weight, "entropy")[:2],
        lambda hidden, weight: function(hidden, weight)[0],
    )


@peer("verl", "verl linear_cross_entropy", "verl", FROZEN_GRADIENT)
def verl(p: Problem) -> Calls:
    function = without_parents("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    return _per_token(
        p,
        lambda: function(p.teacher_hidden, p.weight, p.targets, 1.0, "none"),
        lambda hidden, weight: function(hidden, weight, p.targets, 1.0, "none")[0],
    )


def _cut_cross_entropy(p: Problem, **options) -> Calls:
    from cut_cross_entropy import linear_cross_entropy

    def logp(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return -linear_cross_entropy(hidden, weight, p.targets, reduction="none", **options)

    return _per_token(p, lambda: (logp(p.teacher_hidden, p.weight), None), logp)


@peer("cce", "cut-cross-entropy, gradient filtered (its default)", "cut-cross-entropy", NO_ENTROPY)
def cce(p: Problem) -> Calls:
    return _cut_cross_entropy(p)


@peer("cce-exact", "cut-cross-entropy, unfiltered", "cut-cross-entropy", NO_ENTROPY)
def cce_exact(p: Problem) -> Calls:
    return _cut_cross_entropy(p, filter_eps=None)


@peer("liger", "Liger fused linear cross entropy, mean", "liger-kernel", UNIFORM, per_token=False)
def liger(p: Problem) -> Calls:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="mean")
    return _uniform(p, lambda hidden, weight: loss(weight, hidden, p.targets), -1 / len(p.targets))


@peer("liger-none", "Liger fused linear cross entropy, a loss a token", "liger-kernel", NO_ENTROPY)
def liger_none(p: Problem) -> Calls:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="none")
    return _per_token(
        p,
        lambda: (-loss(p.weight, p.teacher_hidden, p.targets), None),
        lambda hidden, weight: -loss(weight, hidden, p.targets),
    )


@peer(
    "liger-scaled",
    "Liger fused linear scaled cross entropy",
    "liger-kernel",
    f"{FROZEN_GRADIENT}; entropy in more than bfloat16",
)
def liger_scaled(p: Problem) -> Calls:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Scaled

    if p.weight.is_cuda and torch.cuda.get_device_capability(p.weight.device) == (9, 0):
        importlib.import_module("cutlass")  # the Hopper kernels need it, and import it only when they are called

    def statistics() -> Statistics:
        nll, entropy = Scaled.apply(p.teacher_hidden, p.weight, p.targets, return_entropy=True)
        return -nll, entropy

    return _per_token(p, statistics, lambda hidden, weight: -Scaled.apply(hidden, weight, p.targets))


@peer(
    "liger-grpo",
    "Liger fused linear GRPO",
    "liger-kernel",
    "show log p; entropy; weights that depend on the student's log p",
)
def liger_grpo(p: Problem) -> Calls:
    """Every token as a sequence of its own, which gives each its own advantage; the teacher is the reference model."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=True, chunk_size=CHUNK)
    mask = torch.ones_like(p.targets)[:, None]
    teacher = {"ref_input": p.teacher_hidden[:, None], "ref_weight": p.weight}

    def step(trained: bool) -> Step:
        hidden, weight = p.leaves(trained)
        loss(hidden[:, None], weight, p.targets[:, None], mask, p.advantages, **teacher)[0].backward()
        return Step(None, None, None, p.credit, hidden.grad, weight.grad)

    return Calls(None, step)


@peer("quack", "quack chunked linear cross entropy, sum", "quack-kernels", UNIFORM, per_token=False)
def quack(p: Problem) -> Calls:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    # The default, 4096 rows, is refused where the hidden size is the same: rows and columns could not be told apart.
    options = {"reduction": "sum", "chunk_size": 4096 if p.weight.shape[1] != 4096 else 2048}
    return _uniform(p, lambda hidden, weight: chunked_linear_cross_entropy(hidden, weight, p.targets, **options), -1.0)


@peer("flash-attn", "flash-attn Triton cross entropy, chunked and checkpointed", "flash-attn", NO_ENTROPY)
def flash_attn(p: Problem) -> Calls:
    cross_entropy_loss = without_parents("flash_attn.ops.triton.cross_entropy").cross_entropy_loss

    def logp(rows: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return -cross_entropy_loss(rows @ weight.t(), targets, inplace_backward=True)[0]

    def student(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        def recomputed(rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return checkpoint(logp, rows, targets, weight, use_reentrant=False)

        return torch.cat(_chunked(recomputed, p, hidden))

    return _per_token(p, lambda: (torch.cat(_chunked(logp, p, p.teacher_hidden, p.weight)), None), student)
