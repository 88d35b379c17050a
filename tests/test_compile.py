"""The public functions where PyTorch traces: no graph break, no frame for each size; fake and functional tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from egrsd_kernels import Head, fused_egrsd_loss, linear_logp, token_statistics
from tests.support.devices import CPU_COMBOS, CUDA_COMBOS, Combo

WIDTH, VOCABULARY = 16, 40
INTERPRETED = CPU_COMBOS[3]
# To compile takes seconds, in Triton's interpreter many of them.
COMBOS = [
    CPU_COMBOS[1], pytest.param(*INTERPRETED.values, marks=[*INTERPRETED.marks, pytest.mark.slow], id=INTERPRETED.id),
    CUDA_COMBOS[0], CUDA_COMBOS[3],
]  # fmt: skip
few_combos = pytest.mark.parametrize("combo", COMBOS)


def with_cases(name: str, cases: dict[str, Any]) -> pytest.MarkDecorator:
    """Each case with each combo, the interpreter with the first one alone; the first one is quick."""
    first = next(iter(cases))
    return pytest.mark.parametrize(
        ("combo", name),
        [
            pytest.param(
                *combo.values, case, id=f"{case}-{combo.id}",
                marks=[*combo.marks, *([] if case == first else [pytest.mark.slow])],
            )
            for case in cases
            for combo in COMBOS
            if case == first or combo.id != INTERPRETED.id
        ],
    )  # fmt: skip


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


def assert_same(x: torch.Tensor, y: torch.Tensor) -> None:
    """Within float32's rounding of another sum. A 16-bit gradient is rounded once more where it is traced, and with an
    entropy's it comes of other roundings, of logits or of entries: by 2^-8 of its norm each."""
    if x.dtype == torch.float32:
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    else:
        assert (x - y).float().norm() <= 2.0**-6 * y.float().norm()


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


# --------------------------------------------------------------------------------------------------------- linear_logp

FORMS: dict[str, dict[str, Any]] = {
    "log p": {},
    "entropy": {"return_entropy": True, "extras": ("mean_logits",)},
    "entropy, gradient": {"return_entropy": True, "entropy_grad": True},
    "entropy, lazy gradient": {"return_entropy": True, "entropy_grad": "lazy"},
    "sparse": {"grad_mode": "sparse"},
}
with_forms = with_cases("form", FORMS)
frozen_or_trained = pytest.mark.parametrize(
    "trained", [pytest.param(False, id="frozen"), pytest.param(True, id="trained", marks=pytest.mark.slow)]
)


def log_p(combo: Combo, form: str, hidden, weight, bias, target_ids, mask) -> tuple[torch.Tensor, ...]:
    """What linear_logp makes of the operands, and the gradients of a sum of it."""
    found = linear_logp(
        hidden.tanh() * 2, Head(weight, bias, softcap=5.0), target_ids, mask=mask, backend=combo.backend, **FORMS[form]
    )
    return (found,) if isinstance(found, torch.Tensor) else tuple(x for x in found if x is not None)


def weighed(found: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A sum of what is differentiable, each token with a weight of its own."""
    weights = torch.linspace(-1, 2, found[0].numel(), device=found[0].device).view(found[0].shape)
    return sum((x * weights).sum() for x in found if x.requires_grad)


def with_gradients(given: dict, trained: bool) -> dict:
    learned = ("hidden", "weight", "bias") if trained else ("hidden",)
    return {k: x.detach().clone().requires_grad_() if k in learned else x for k, x in given.items()}


@frozen_or_trained
@with_forms
def test_compiled_log_p(combo, form, trained):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda **x: log_p(combo, form, **x), fullgraph=True, backend=counter)
    for b, t in SIZES[:: 1 if form == "log p" else 2]:
        made = []
        for function in (lambda **x: log_p(combo, form, **x), compiled):
            given = with_gradients(operands(combo, b, t), trained)
            found = function(**given)
            weighed(found).backward()
            made.append((*found, *(x.grad for x in given.values() if x.requires_grad)))
        for x, y in zip(*made, strict=True):
            assert_same(x, y)  # without tracing, exponentials are kept where they are made again here
    assert counter.frame_count <= 2


@frozen_or_trained
@with_forms
def test_functional_gradients_of_log_p(combo, form, trained):
    given = with_gradients(operands(combo, 2, 5), trained)
    learned = {k: x for k, x in given.items() if x.requires_grad}
    weighed(log_p(combo, form, **given)).backward()

    def loss(leaves: dict) -> torch.Tensor:
        return weighed(log_p(combo, form, **{**given, **leaves}))

    leaves = {k: x.detach() for k, x in learned.items()}
    value, vjp = torch.func.vjp(loss, leaves)
    (twice,) = vjp(torch.full_like(value, 2.0))
    once = torch.func.grad(loss)(leaves)
    for k, x in learned.items():
        assert_same(once[k], x.grad)
        assert_same(twice[k] / 2, x.grad)


@few_combos
@frozen_or_trained
def test_log_p_of_fake_tensors(combo, trained):
    given = with_gradients(operands(combo, 2, 5), trained)
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(x) for k, x in given.items()}
        (logp,) = log_p(combo, "log p", **fake)
        gradients = torch.autograd.grad(weighed((logp,)), [x for x in fake.values() if x.requires_grad])
    assert logp.shape == (2, 5) and logp.dtype == torch.float32
    assert [g.shape for g in gradients] == [x.shape for x in given.values() if x.requires_grad]


@few_combos
@frozen_or_trained
def test_opcheck_of_log_p(combo, trained):
    x = operands(combo, 2, 5)
    flat = x["hidden"], x["weight"], x["bias"], x["target_ids"].view(-1), x["mask"].view(-1)
    numbers = 1.3, 5.0, 0.7, combo.backend, 1 << 20, 1 << 20, True, trained, trained, 0, None
    options = *numbers, True, trained, False, ["is_top1"]
    tests = torch.ops.egrsd_kernels
    torch.library.opcheck(tests.linear_logp.default, (*flat, *options))
    state = tests.linear_logp(*flat, *options)[3:]
    weights = torch.linspace(-1, 1, 10, device=combo.device)
    d_entropy = weights.flip(0) if trained else None
    torch.library.opcheck(tests.linear_logp_backward.default, (*flat, state, weights, d_entropy, *options))
    if not trained:
        torch.library.opcheck(tests.scale_rows.default, (state[0], weights))


# ---------------------------------------------------------------------------------------------------- fused_egrsd_loss

SETTINGS: dict[str, dict[str, Any]] = {
    "EGRSD": {},
    "CL-EGRSD": {"lookahead": 2, "normalizer": 7.0, "entropy_scale": 1.3},
    "soft minimum, sparse": {
        "lookahead": 1, "lookahead_filter": "softmin", "lookahead_temperature": 0.2, "grad_mode": "sparse",
    },
    "divergence": {"divergence": "jsd", "divergence_weight": 0.3, "policy_weight": 0.5, "backend": "torch"},
}  # fmt: skip
with_settings = with_cases("settings", SETTINGS)


def loss_and_stats(combo: Combo, settings: str, hidden, weight, bias, target_ids, mask) -> tuple[torch.Tensor, ...]:
    advantages = torch.linspace(-1, 1, hidden.shape[0], device=hidden.device)
    loss, stats = fused_egrsd_loss(
        hidden.tanh(), weight, hidden.detach().flip(0), target_ids, advantages, student_bias=bias, mask=mask,
        return_stats=True, **{"backend": combo.backend, **SETTINGS[settings]},
    )  # fmt: skip
    return loss, *stats


@frozen_or_trained
@with_settings
def test_compiled_loss(combo, settings, trained):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda **x: loss_and_stats(combo, settings, **x), fullgraph=True, backend=counter)
    for b, t in SIZES[::2]:
        made = []
        for function in (lambda **x: loss_and_stats(combo, settings, **x), compiled):
            given = with_gradients(operands(combo, b, t), trained)
            loss, *stats = function(**given)
            (1.7 * loss).backward()
            assert not any(x.requires_grad for x in stats)
            made.append((loss, *stats, *(x.grad for x in given.values() if x.requires_grad)))
        for x, y in zip(*made, strict=True):
            assert_same(x, y)
    assert counter.frame_count <= 2


@frozen_or_trained
@with_settings
def test_functional_gradients_of_the_loss(combo, settings, trained):
    given = with_gradients(operands(combo, 2, 5), trained)
    learned = {k: x for k, x in given.items() if x.requires_grad}
    loss_and_stats(combo, settings, **given)[0].backward()
    gradients = torch.func.grad(lambda leaves: loss_and_stats(combo, settings, **{**given, **leaves})[0])(
        {k: x.detach() for k, x in learned.items()}
    )
    for k, x in learned.items():
        assert_same(gradients[k], x.grad)


@few_combos
@frozen_or_trained
def test_loss_of_fake_tensors(combo, trained):
    given = with_gradients(operands(combo, 2, 5), trained)
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(x) for k, x in given.items()}
        loss, *stats = loss_and_stats(combo, "EGRSD", **fake)
        gradients = torch.autograd.grad(loss, [x for x in fake.values() if x.requires_grad])
    assert loss.shape == () and all(x.shape == (2, 5) for x in stats)
    assert [g.shape for g in gradients] == [x.shape for x in given.values() if x.requires_grad]


@few_combos
@frozen_or_trained
def test_opcheck_of_the_loss(combo, trained):
    x = operands(combo, 2, 5)
    ids, valid, of = x["target_ids"].view(-1), x["mask"].view(-1), torch.ops.egrsd_kernels
    numbers = [1.0, None, 1.0, None, 1.0, combo.backend, 1 << 20, 0.3, 0.1, 0.2, 1.0, None, None, 0.5, None, 1.0, 1.0]
    given = x["hidden"], ids, valid, torch.tensor([1.0, -0.5], device=combo.device), None
    teacher = x["hidden"].flip(0), x["weight"], x["bias"], None, None
    evidence = *given, *teacher, 5, 2, "minimum", 1.0, 0.0, 0.0, *numbers
    torch.library.opcheck(of.egrsd_evidence.default, evidence)
    order, counts, advantages, ahead, logp, entropy = of.egrsd_evidence(*evidence)
    known = ids, order, counts, advantages, logp, entropy, ahead, entropy.max(), None, None, None, None
    student = x["hidden"], x["weight"], x["bias"], *known, *numbers, True, trained, trained, 0
    torch.library.opcheck(of.egrsd_student.default, student)
    _, _, *gradients = of.egrsd_student(*student)
    torch.library.opcheck(of.scale.default, (gradients, torch.tensor(0.3, device=combo.device)))


@few_combos
def test_exported_programs(combo):
    """An exported program has the operators themselves, and gives the same to the bit."""

    class Model(torch.nn.Module):
        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(weight)

        def forward(self, hidden, target_ids, mask):
            return linear_logp(hidden, self.weight, target_ids, mask=mask, backend=combo.backend)

    given = operands(combo, 2, 5)
    model, inputs = Model(given["weight"]), tuple(given[k] for k in ("hidden", "target_ids", "mask"))
    program = torch.export.export(model, inputs)
    assert "egrsd_kernels.linear_logp" in str(program.graph)
    with torch.no_grad():
        assert torch.equal(program.module()(*inputs), model(*inputs))
