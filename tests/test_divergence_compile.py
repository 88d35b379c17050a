"""``linear_divergence`` where PyTorch traces: no graph break, no frame for each size; fake tensors and torch.func."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from egrsd_kernels import Head, linear_divergence
from tests.support.devices import CPU_COMBOS, CUDA_COMBOS, Combo

combos = pytest.mark.parametrize("combo", [CPU_COMBOS[1], CUDA_COMBOS[3]])
frozen_or_trained = pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])


def operands(combo: Combo, b: int, t: int, trained: bool = False) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(10 * b + t)
    tensors = {
        "hidden": torch.randn(b, t, 16, generator=g),
        "weight": torch.randn(40, 16, generator=g),
        "teacher_hidden": torch.randn(b, t, 24, generator=g),
        "teacher_weight": torch.randn(40, 24, generator=g),
        "target_ids": torch.randint(40, (b, t), generator=g),
        "mask": torch.rand(b, t, generator=g) < 0.7,
    }
    learned = ("hidden", "weight") if trained else ("hidden",)
    return {k: x.to(combo.device).requires_grad_(k in learned) for k, x in tensors.items()}


def found(combo: Combo, hidden, weight, teacher_hidden, teacher_weight, target_ids, mask) -> tuple[torch.Tensor, ...]:
    return linear_divergence(
        hidden.tanh() * 2, Head(weight, softcap=5.0), teacher_hidden, Head(teacher_weight), kind="jsd", beta=0.3,
        target_ids=target_ids, mask=mask, return_stats=True, backend=combo.backend,
    )  # fmt: skip


def weighed(divergence: torch.Tensor) -> torch.Tensor:
    """A sum of it, each token with a weight of its own."""
    return (divergence * torch.linspace(-1, 2, divergence.numel(), device=divergence.device).view_as(divergence)).sum()


def gradients(function, given: dict) -> tuple[torch.Tensor, ...]:
    made = tuple(function(**given))
    return *made, *torch.autograd.grad(weighed(made[0]), [x for x in given.values() if x.requires_grad])


@pytest.mark.slow
@combos
@frozen_or_trained
def test_compiled(combo, trained):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(functools.partial(found, combo), fullgraph=True, backend=counter)
    for b, t in ((2, 3), (3, 5), (4, 7), (2, 9)):
        given = operands(combo, b, t, trained)
        want, got = gradients(functools.partial(found, combo), given), gradients(compiled, given)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2, "a frame for the first size, and one for all others"


@combos
@frozen_or_trained
def test_functional_gradients(combo, trained):
    given = operands(combo, 2, 5, trained)
    learned = {k: x for k, x in given.items() if x.requires_grad}
    want = gradients(functools.partial(found, combo), given)[5:]
    got = torch.func.grad(lambda leaves: weighed(found(combo, **{**given, **leaves})[0]))(
        {k: x.detach() for k, x in learned.items()}
    )
    for name, x in zip(learned, want, strict=True):
        torch.testing.assert_close(got[name], x, rtol=1e-5, atol=1e-6)


@combos
@frozen_or_trained
def test_fake_tensors(combo, trained):
    given = operands(combo, 2, 5, trained)
    want = gradients(functools.partial(found, combo), given)
    with FakeTensorMode() as mode:
        got = gradients(functools.partial(found, combo), {name: mode.from_tensor(x) for name, x in given.items()})
    assert [(x.shape, x.dtype, x.device) for x in want] == [(x.shape, x.dtype, x.device) for x in got]


@combos
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@frozen_or_trained
def test_opcheck(combo, dtype, trained):
    """What the operators say of their results is what they return."""
    from egrsd_kernels.backends import Needs
    from egrsd_kernels.divergence import _Operands, _Options
    from egrsd_kernels.operators import flat

    given = operands(combo, 2, 5)
    given = {k: x.detach().to(dtype) if x.is_floating_point() else x.flatten() for k, x in given.items()}
    tensors = _Operands(
        given["hidden"], given["weight"], torch.zeros_like(given["weight"][:, 0]), given["teacher_hidden"],
        given["teacher_weight"], None, given["target_ids"], given["mask"],
    )  # fmt: skip
    names = ("divergence", "student_logp", "teacher_logp", "student_entropy", "teacher_entropy")
    numbers = flat(
        _Options(1.0, 5.0, 1.0, None, 0.8, "jsd", 0.3, None, combo.backend, 1 << 20, 1 << 20,
                 Needs(True, trained, trained), names)
    )  # fmt: skip
    operators = torch.ops.egrsd_kernels
    torch.library.opcheck(operators.linear_divergence.default, (*tensors, *numbers))
    incoming = torch.randn(10, device=combo.device)
    if trained:
        torch.library.opcheck(operators.linear_divergence_backward.default, (*tensors, incoming, *numbers))
    else:
        share = torch.ones_like(incoming) if dtype == torch.float16 else None
        torch.library.opcheck(operators.scale_directions.default, (given["hidden"], share, incoming))
