"""The public functions where PyTorch traces: no graph break, no frame for each size; fake and functional tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from egrsd_kernels import Head, token_statistics
from tests.support.devices import Combo, few_combos

WIDTH, VOCABULARY = 16, 40
SIZES = ((2, 3), (3, 5), (4, 7), (2, 9))


def operands(combo: Combo, b: int, t: int) -> dict[str, torch.Tensor]:
    """hidden (b, t, WIDTH), weight, bias, target_ids and mask, without gradients."""
    g = torch.Generator().manual_seed(10 * b + t)
    tensors = {
        "hidden": torch.randn(b, t, WIDTH, generator=g).to(combo.dtype),
        "weight": torch.randn(VOCABULARY, WIDTH, generator=g).to(combo.dtype),
        "bias": torch.randn(VOCABULARY, generator=g).to(combo.dtype),
        "target_ids": torch.randint(VOCABULARY, (b, t), generator=g),
        "mask": torch.rand(b, t, generator=g) < 0.7,
    }
    return {name: x.to(combo.device) for name, x in tensors.items()}


def statistics(combo: Combo, hidden, weight, bias, target_ids, mask) -> tuple[torch.Tensor, ...]:
    head = Head(weight, bias, logit_scale=1.3, softcap=5.0)
    found = token_statistics(hidden, head, target_ids, mask=mask, extras=("is_top1",), backend=combo.backend)
    return tuple(x for x in found if x is not None)


def check_compiled(function: Callable[..., Any], combo: Combo, prepared: Callable[[dict], dict] = dict) -> None:
    """No graph break, two frames for four sizes, and what the function makes without being compiled, to the bit."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda **x: function(combo, **x), fullgraph=True, backend=counter)
    for b, t in SIZES:
        given = operands(combo, b, t)
        want, got = function(combo, **prepared(given)), compiled(**prepared(given))
        for x, y in zip(want, got, strict=True):
            assert torch.equal(x, y)
    assert counter.frame_count <= 2, "a frame for the first size, and one for all others"


@few_combos
def test_compiled_statistics(combo):
    check_compiled(statistics, combo)


@few_combos
def test_statistics_of_fake_tensors(combo):
    given = operands(combo, 2, 5)
    want = statistics(combo, **given)
    with FakeTensorMode() as mode:
        got = statistics(combo, **{name: mode.from_tensor(x) for name, x in given.items()})
    assert [(x.shape, x.dtype, x.device) for x in want] == [(x.shape, x.dtype, x.device) for x in got]


@few_combos
@pytest.mark.parametrize("extras", [[], ["mean_logits", "is_top1"]])
def test_opcheck_of_statistics(combo, extras):
    x = operands(combo, 2, 5)
    flat = x["target_ids"].view(-1), x["mask"].view(-1)
    arguments = x["hidden"], x["weight"], x["bias"], 1.3, 5.0, 0.7, *flat, extras, combo.backend, 1 << 20
    torch.library.opcheck(torch.ops.egrsd_kernels.statistics.default, arguments)
