"""Small models, rows that share prefixes, and a model's log p over rows alone and over packs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from egrsd_kernels import Head, linear_logp
from egrsd_kernels.packing import Pack, layers, pack_rows, packed
from tests.support.tree_attention import on_cpus

COMMON = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


BUDGETS = (1000, 45)  # of group_rows: one pack, and several that repeat the system's prompt


def tiny(model_type: str, **settings_: object) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(model_type, **{**COMMON, **settings_})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=settings_.get("attn_implementation", "eager" if model_type == "gemma2" else None)
    )
    return sum_experts_one_by_one(model).float().eval()


def sum_experts_one_by_one(model: nn.Module) -> nn.Module:
    """The grouped product knows no float64."""
    for module in model.modules():
        config = getattr(module, "config", None)
        for one in (config, getattr(config, "text_config", None)):
            if hasattr(one, "_experts_implementation"):
                one._experts_implementation = "eager"
    return model


def group_rows(seed: int = 0) -> tuple[list[list[int]], list[list[bool]]]:
    """Rollouts of two prompts that begin alike, an empty response, equal rows, and a row of another tree."""
    random = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(10, 90, (count,), generator=random).tolist()

    system, one, two, other, turn = tokens(9), tokens(3), tokens(6), tokens(1), tokens(5)
    answers = [(system + one, tokens(13)), (system + one, turn + tokens(4)), (system + one, turn + tokens(7))]
    answers += [(system + two, tokens(11)), (system + two, []), (other, tokens(17)), (other, tokens(2))]
    answers.append(answers[0])
    rows = [prompt + answer for prompt, answer in answers]
    return rows, [[False] * len(prompt) + [True] * len(answer) for prompt, answer in answers]


@contextmanager
def counted_layers() -> Iterator[list[str]]:
    """What runs compiled, on a CPU and without a compiler, layer by layer: "graph" or "plain"; and each "begin".

    As a CUDA graph's, a graph's output is overwritten when the next begin.
    """
    seen: list[str] = []
    outputs: list[Tensor] = []

    def compile_(function: Callable[..., Any], *, options: Any, **_: Any) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            seen.append("graph" if options else "plain")
            assert options in (None, layers.OPTIONS)
            output = function(*args, **kwargs)
            if options:
                outputs.extend(_pytree.tree_leaves(output))
            return output

        return run

    def begin() -> None:
        seen.append("begin")
        for output in outputs:
            output.detach().fill_(torch.nan)
        outputs.clear()

    layers._compiled.cache_clear()
    with (
        mock.patch.object(layers, "SMALLEST", 128),
        mock.patch.object(torch, "compile", compile_),
        mock.patch.object(torch.compiler, "cudagraph_mark_step_begin", begin),
        on_cpus(),
    ):
        yield seen
    layers._compiled.cache_clear()


class Float64(TorchFunctionMode):
    """Layers that go on in float32 for a norm or a softmax stay in float64, so that sums alone are rounded."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is Tensor.float:
            return args[0].double()  # positions, too
        if func is torch.full and isinstance(args[1], float):
            kwargs.setdefault("dtype", torch.float64)  # the least number, as a mask
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            args = tuple(torch.float64 if one is torch.float32 else one for one in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def logp_alone(model: nn.Module, rows: list[list[int]], targets: list[list[bool]]) -> Tensor:
    """(M,) of the targets, row by row, each row by itself and unpadded."""
    found = []
    for row, asked in zip(rows, targets, strict=True):
        ids = torch.tensor([row])
        logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        found.append(logp[torch.tensor(asked[1:], dtype=torch.bool)])
    return torch.cat(found)


def logp_padded(model: nn.Module, rows: list[list[int]], targets: list[list[bool]]) -> Tensor:
    """(M,) of the targets, row by row, of one padded batch with its mask."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
    asked = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, (row, wanted) in enumerate(zip(rows, targets, strict=True)):
        ids[number, : len(row)], mask[number, : len(row)] = torch.tensor(row), 1
        asked[number, : len(row)] = torch.tensor(wanted)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0][asked[:, 1:]]


def logp_packed(model: nn.Module, pack: Pack) -> Tensor:
    """By layers as they are."""
    logp, _ = packed(model, pack, lambda hidden, head: logp_of(hidden, head, pack), compile_layers=False)
    return logp


def logp_of(hidden: Tensor, head: Head, pack: Pack) -> Tensor:
    return linear_logp(hidden, head, pack.target_ids, backend="torch")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def check_same_in_float64(
    model: nn.Module,
    rows: list[list[int]] | None = None,
    targets: list[list[bool]] | None = None,
    *,
    budgets: tuple[int, ...] = BUDGETS,
    seed: int = 0,
    grad: bool = True,
) -> None:
    """log p over packs is that of the rows alone to 1e-12 nat, and every gradient to 1e-12 of the whole one's size.

    The gradient is that of a sum of all targets with random weights. Without rows: those of :func:`group_rows`.
    """
    if rows is None or targets is None:
        rows, targets = group_rows()
    expected = logp_alone(model, rows, targets)
    assert expected.dtype == torch.float64
    weights = torch.randn(len(expected), dtype=expected.dtype, generator=torch.Generator().manual_seed(seed))
    alone = {}
    if grad:
        (weights * expected).sum().backward()
        alone = gradients(model)
        assert alone
    first = torch.tensor([0, *map(sum, targets)]).cumsum(0).tolist()
    for budget in budgets:
        seen = 0
        for pack in pack_rows(rows, budget=budget, targets=targets):
            logp = logp_packed(model, pack)
            mine = torch.cat([torch.arange(first[row], first[row + 1]) for row in pack.rows])
            seen += len(mine)
            torch.testing.assert_close(logp, expected[mine].detach(), rtol=0, atol=1e-12)
            if grad:
                (weights[mine] * logp).sum().backward()
        assert seen == len(expected)
        found = gradients(model)
        assert found.keys() == alone.keys()
        size = torch.cat([gradient.flatten() for gradient in alone.values()]).norm() if grad else 0
        for name, gradient in alone.items():
            assert (found[name] - gradient).norm() <= 1e-12 * size, name
