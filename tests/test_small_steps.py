"""What a small step costs the host: launches, plans, and kernels compiled for row counts not seen before."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from egrsd_kernels import checks, fused_egrsd_loss, linear_divergence, linear_logp, token_statistics
from reference import divergence as exact_divergence
from tests.support.devices import INTERPRETED
from tests.support.launches import TensorWork, launches

interpreted = pytest.mark.skipif(not INTERPRETED, reason="launches are counted in Triton's interpreter")
WIDTH, VOCABULARY = 64, 5000


def step(n: int, trained: bool, **options) -> None:
    """One call of everything, and its backward pass, on fresh operands of n tokens in 1 to 3 sequences."""
    g = torch.Generator().manual_seed(n)
    student, teacher = (torch.randn(n, WIDTH, generator=g) for _ in range(2))
    weight = torch.randn(VOCABULARY, WIDTH, generator=g)
    ids = torch.randint(VOCABULARY, (n,), generator=g)
    mask, advantages = torch.rand(n, generator=g) < 0.8, torch.randn(n, generator=g)
    student.requires_grad_()
    weight.requires_grad_(trained)
    cu_seqlens = torch.tensor(sorted({0, n // 3, n // 2, n}), dtype=torch.int32)
    loss = fused_egrsd_loss(
        student, weight, teacher, ids, advantages, mask=mask, cu_seqlens=cu_seqlens, backend="triton", **options
    )
    logp, entropy = linear_logp(
        student, weight, ids, mask=mask, backend="triton", return_entropy=True, entropy_grad=trained
    )
    (loss + (logp * advantages).sum() + (entropy * advantages).sum()).backward()
    token_statistics(teacher, weight, ids, mask=mask, backend="triton", extras=("is_top1", "mean_logits"))
    with torch.no_grad():
        fused_egrsd_loss(student, weight, teacher, ids, advantages, mask=mask, backend="triton", **options)


@interpreted
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_new_number_of_rows_compiles_nothing(trained):
    with launches() as seen:
        step(500, trained, lookahead=2)
        step(16, trained, lookahead=2)
    known = set(seen)
    for n in (1, 16, 17, 130, 512, 1000, 4100, 9001):
        with launches() as more:
            step(n, trained, lookahead=n % 5)
        new = {launch.kernel for launch in set(more) - known}
        assert not new, (n, new)


@interpreted
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_launches_of_a_step(trained, layout):
    """The loss and its backward pass at N = 512, in one slice of the vocabulary: at most 30 launches."""
    n = 512
    shape = (4, n // 4) if layout == "padded" else (n,)
    student, teacher = (torch.randn(*shape, WIDTH) for _ in range(2))
    weight, ids = torch.randn(VOCABULARY, WIDTH), torch.randint(VOCABULARY, shape)
    mask, advantages = torch.rand(shape) < 0.9, torch.randn(4)
    student.requires_grad_()
    weight.requires_grad_(trained)
    ends = {"cu_seqlens": torch.tensor([0, 5, 200, 300, n], dtype=torch.int32)} if layout == "packed" else {}
    given = student, weight, teacher, ids, advantages

    def work() -> int:
        with launches() as kernels, TensorWork() as torch_s:
            fused_egrsd_loss(*given, mask=mask, lookahead=3, backend="triton", **ends).backward()
        print([launch.kernel for launch in kernels], torch_s.found, sep="\n")
        return len(kernels) + len(torch_s.found)

    with mock.patch.object(checks, "values_checked", lambda _: False):  # as on a GPU
        assert work() <= 30


# ------------------------------------------------------------------------------------------------------------- the GPU


def on_the_gpu(n: int, vocabulary: int = 20_000, width: int = 512, trained: bool = False) -> dict:
    """Arguments of the loss, of n tokens in two sequences."""
    g = torch.Generator("cuda").manual_seed(n)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=g).bfloat16()

    return {
        "student_hidden": normal(n, width).requires_grad_(),
        "student_weight": (normal(vocabulary, width) / width**0.5).requires_grad_(trained),
        "teacher_hidden": normal(n, width),
        "target_ids": torch.randint(vocabulary, (n,), device="cuda", generator=g),
        "advantages": torch.randn(n, device="cuda", generator=g),
        "mask": torch.rand(n, device="cuda", generator=g) < 0.9,
        "cu_seqlens": torch.tensor([0, n // 3, n], dtype=torch.int32, device="cuda"),
    }


@pytest.mark.cuda
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_launches_and_compilations_on_the_gpu(trained):
    """At most 30 launches at N = 512; and after two steps, other row counts compile nothing."""
    import triton

    def step(n: int) -> None:
        fused_egrsd_loss(**on_the_gpu(n, trained=trained), lookahead=3, backend="triton").backward()

    step(512)
    step(100)
    given = on_the_gpu(512, trained=trained)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiled:
        fused_egrsd_loss(**given, lookahead=3, backend="triton").backward()
        torch.cuda.synchronize()
    launched = [x.name for x in profiled.events() if x.device_type == torch.autograd.DeviceType.CUDA]
    assert 15 < len(launched) <= 30, launched

    compiled: list[str] = []
    hook = mock.patch.object(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **given: compiled.append(given["repr"])
    )
    with hook:
        for n in (1, 3, 16, 17, 130, 511, 513, 700, 1000):
            step(n)
    assert not compiled


@pytest.mark.cuda
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_cuda_graph(trained):
    """Forward and backward pass are captured, and replayed on other operands they give what a call gives."""
    static = on_the_gpu(300, trained=trained)
    learned = [x for x in static.values() if x.requires_grad]

    def step(given: dict) -> torch.Tensor:
        loss = fused_egrsd_loss(**given, lookahead=3, backend="triton")
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(static)
    torch.cuda.current_stream().wait_stream(stream)
    for x in learned:
        x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(static)

    other = on_the_gpu(300, trained=trained)
    generator = torch.Generator("cuda").manual_seed(1)
    other["student_hidden"] = torch.randn(300, 512, device="cuda", generator=generator).bfloat16().requires_grad_()
    other["mask"] = torch.rand(300, device="cuda", generator=generator) < 0.5
    want = step(other)
    with torch.no_grad():
        for name, x in static.items():
            x.copy_(other[name])
    graph.replay()
    assert torch.equal(loss, want)
    for x, y in zip(learned, (x for x in other.values() if x.requires_grad), strict=True):
        assert torch.equal(x.grad, y.grad)


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "vocabulary", "width", "trained"),
    [(65_613, 151_936, 64, False), (300, 151_936, 16_384, False), (300, 151_936, 16_384, True)],
    ids=["rows by vocabulary", "vocabulary by width", "vocabulary by width, trained"],
)
def test_beyond_two_to_the_31st(n, vocabulary, width, trained):
    """N V, or V D: some rows of log p and of the gradients, the last ones among them, against float32 logits."""
    given = on_the_gpu(n, vocabulary, width, trained)
    assert max(n * vocabulary, vocabulary * width) > 2**31
    hidden, weight, ids = (given[k] for k in ("student_hidden", "student_weight", "target_ids"))
    ids[-1] = vocabulary - 1  # its logit and gradient lie behind all others
    logp = linear_logp(hidden, weight, ids, backend="triton")
    factor = torch.randn(n, device="cuda", generator=torch.Generator("cuda").manual_seed(2))
    (logp * factor).sum().backward()
    found = token_statistics(hidden, weight, ids, backend="triton")

    rows = torch.tensor([0, 1, n // 2, n - 2, n - 1], device="cuda")
    z = torch.cat([hidden[rows].float() @ part.float().t() for part in weight.detach().split(8192)], 1)
    log_p = z.log_softmax(1)
    want = log_p.gather(1, ids[rows, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    # A dot product of D terms of size 1 / sqrt(D) in float32, in another order: far below 1e-3 nat.
    for got in (logp[rows], found.logp[rows]):
        assert (got - want).abs().max() < 1e-3
    assert (found.entropy[rows] - entropy).abs().max() < 1e-3

    dz = -log_p.exp()
    dz[torch.arange(len(rows), device="cuda"), ids[rows]] += 1
    dz *= factor[rows, None]
    parts = zip(dz.split(8192, 1), weight.detach().split(8192), strict=True)
    d_hidden = sum(g @ part.float() for g, part in parts)
    # Exponentials and results are rounded to bfloat16, each by at most 2^-8.
    assert (hidden.grad[rows].float() - d_hidden).norm() < 2**-6 * d_hidden.norm()
    if trained:
        for last in (weight.grad[-1], weight.grad[vocabulary // 2]):
            assert last.isfinite().all()
        entry = vocabulary - 1
        p = torch.cat([(hidden[part].float() @ weight[entry].float())[None] for part in [slice(None)]]).squeeze(0)
        p = (p - found.logsumexp).exp()
        g = factor * ((ids == entry).float() - p)
        want_row = g @ hidden.detach().float()
        assert (weight.grad[entry].float() - want_row).norm() < 2**-6 * want_row.norm()


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize(("n", "vocabulary", "width"), [(65_613, 151_936, 64), (300, 151_936, 16_384)])
def test_losses_beyond_two_to_the_31st(n, vocabulary, width):
    """The loss and a divergence, and some rows of their gradients, against float32 logits and float64 behind them."""
    assert max(n * vocabulary, vocabulary * width) > 2**31
    given = on_the_gpu(n, vocabulary, width)
    given["mask"][[0, 1, n // 2, n - 2, n - 1]] = True
    check_losses(given)


def check_losses(given: dict) -> None:
    hidden, weight, teacher, ids = (
        given[k] for k in ("student_hidden", "student_weight", "teacher_hidden", "target_ids")
    )
    n, vocabulary = len(ids), len(weight)
    ids[-1] = vocabulary - 1
    rows = torch.tensor([0, 1, n // 2, n - 2, n - 1], device=ids.device)
    parts = weight.float().split(8192)
    z, y = (torch.cat([h[rows].detach().float() @ part.t() for part in parts], 1).double() for h in (hidden, teacher))

    loss, stats = fused_egrsd_loss(**given, lookahead=3, backend="triton", return_stats=True)
    loss.backward()
    log_p = z.log_softmax(1)
    assert (stats.student_logp[rows] - log_p.gather(1, ids[rows, None]).squeeze(1)).abs().max() < 1e-3
    teacher_entropy = -(y.softmax(1) * y.log_softmax(1)).sum(1)
    assert (stats.teacher_entropy[rows] - teacher_entropy).abs().max() < 1e-3
    dz = log_p.exp() - torch.nn.functional.one_hot(ids[rows], vocabulary)
    dz *= (stats.token_advantage[rows] / given["mask"].sum())[:, None]
    gradients = [(hidden.grad[rows].clone(), dz)]

    hidden.grad = None
    found = linear_divergence(hidden, weight, teacher, weight, kind="jsd", target_ids=ids, backend="triton")
    found.sum().backward()
    z.requires_grad_()
    want = exact_divergence(z, y, "jsd")
    assert ((found[rows] - want).abs() <= (1e-3 * want).clamp(min=4e-6)).all()
    gradients.append((hidden.grad[rows], *torch.autograd.grad(want.sum(), z)))
    for got, dz in gradients:
        exact = sum(g.float() @ part for g, part in zip(dz.split(8192, 1), parts, strict=True))
        # Entries and results are rounded to bfloat16, each by at most 2^-8.
        assert (got.float() - exact).norm() < 2**-6 * exact.norm()
