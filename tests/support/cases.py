"""Fresh random problems, each from one seed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from tests.support.devices import Combo

SPARSE = {"grad_mode": "sparse", "sparse_tol": 1e-6}  # hardly more than rounding: all that holds for exact gradients


@dataclass
class Draw:
    """Random tensors on the CPU, in float32, from one seed."""

    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=self.generator)


def draw_head(draw: Draw, vocabulary: int, width: int) -> torch.Tensor:
    """(V, D) with rows of norm about 1, so that hidden states have the norm of their logits."""
    return draw.normal(vocabulary, width) / math.sqrt(width)


def draw_hidden(draw: Draw, kind: str, weight: torch.Tensor, *shape: int) -> torch.Tensor:
    """Hidden states (..., D). peaked: like a language model's, from undecided to decided, each token drawn towards one
    vocabulary entry; flat: nearly uniform; extreme: logits up to some ±1e4."""
    vocabulary, width = weight.shape
    noise = draw.normal(*shape, width)
    if kind == "flat":
        return 0.02 * noise
    if kind == "extreme":
        return 1e4 * noise / noise.norm(dim=-1, keepdim=True) / weight.norm(dim=-1).max()
    assert kind == "peaked"
    favourite = weight[draw.integers(vocabulary, *shape)]
    favourite = favourite / favourite.norm(dim=-1, keepdim=True)
    return noise + 2 * math.log(vocabulary + 1) * draw.uniform(*shape, 1) * favourite


def draw_targets(draw: Draw, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Target ids (...): three quarters sampled from the softmax, as rollouts are, and the rest from anywhere."""
    p = torch.softmax(hidden.flatten(0, -2) @ weight.T, -1)
    sampled = torch.multinomial(p, 1, generator=draw.generator)[:, 0] if len(p) else p.new_zeros(0, dtype=torch.long)
    anywhere = draw.integers(weight.shape[0], len(p))
    return torch.where(draw.uniform(len(p)) < 0.25, anywhere, sampled).view(hidden.shape[:-1])


def make_case(
    combo: Combo,
    *,
    seed: int = 0,
    layout: str = "padded",  # "packed": with cu_seqlens; "one sequence": packed without
    lengths: tuple[int, ...] = (6, 6, 6),  # padded: every sequence is as long as the first
    width: int = 16,
    vocabulary: int = 61,
    kind: str = "peaked",
    bias: bool = False,
    per_token: bool = False,
    mask: str | None = None,  # "holes" | "a sequence" | "all"
    ignored: bool = False,
    teacher: str = "shared head",  # | "own head" | "statistics"
    **options,
) -> dict:
    """Arguments of ``fused_egrsd_loss``; operands rounded to the combo's dtype, everything on its device."""
    draw = Draw(seed)
    if layout == "padded":
        shape = (len(lengths), lengths[0] if lengths else 4)
    else:
        shape = (sum(lengths),)
    case = dict(options)
    weight = draw_head(draw, vocabulary, width)
    hidden = draw_hidden(draw, kind, weight, *shape)
    case["student_hidden"], case["student_weight"] = hidden, weight
    case["target_ids"] = draw_targets(draw, hidden, weight)
    if bias:
        case["student_bias"] = draw.normal(vocabulary)
    scale = 0.3 * hidden.norm(dim=-1, keepdim=True) / math.sqrt(width)
    case["teacher_hidden"] = hidden + scale * draw.normal(*shape, width)
    if teacher == "own head":
        case["teacher_weight"] = draw_head(draw, vocabulary, 40)
        case["teacher_hidden"] = draw_hidden(draw, kind, case["teacher_weight"], *shape)
        if bias:
            case["teacher_bias"] = draw.normal(vocabulary)
    case = {
        k: x.to(combo.dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() and k not in options else x
        for k, x in case.items()
    }
    if teacher == "statistics":
        case["teacher_hidden"] = None
        case["teacher_logp"] = -3 * draw.normal(*shape).abs()
        case["teacher_entropy"] = 2 * draw.normal(*shape).abs()

    sequences = 1 if layout == "one sequence" else len(lengths)
    advantages = draw.normal(*shape) if per_token else draw.normal(sequences)
    if per_token:
        advantages[draw.uniform(*shape) < 0.2] = 0.0
    case["advantages"] = advantages
    if layout == "packed":
        case["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    if mask is not None:
        keep = draw.uniform(*shape) < 0.7
        if mask == "a sequence":
            keep.view(-1)[: lengths[0]] = False
        elif mask == "all":
            keep[...] = False
        case["mask"] = keep
    if ignored:
        case["target_ids"][draw.uniform(*shape) < 0.3] = -100
    return {k: x.to(combo.device) if isinstance(x, torch.Tensor) else x for k, x in case.items()}
