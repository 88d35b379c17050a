"""Launches that are looked up are those that Triton would make: the same compiled kernel, the same arguments."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from typing import Any
from unittest import mock

import numpy as np
import torch

from tests.support.doc_examples import ROOT


def misaligned(shape: tuple[int, ...], dtype: torch.dtype, skip: int) -> torch.Tensor:
    """Without values, and ``skip`` elements behind an address that is divisible by 16."""
    size = torch.Size(shape).numel()
    return torch.empty(size + skip, dtype=dtype)[skip:].view(shape)


def calls(rng: random.Random) -> None:
    """One call of everything, with a backward pass, on operands without values."""
    from egrsd_kernels import fused_egrsd_loss, linear_logp, token_statistics

    dtype = rng.choice([torch.bfloat16, torch.float16, torch.float32])
    vocabulary, width = rng.choice([2048, 2049, 5000]), rng.choice([64, 65, 72])
    b, n = rng.choice([(1, 1), (1, 16), (3, 100), (4, 128), (2, 900)])
    skips = (0, 0, 0, 1, 2, 8)
    student, teacher = (misaligned((b, n, width), dtype, rng.choice(skips)) for _ in range(2))
    if rng.random() < 0.2:
        student = student.transpose(0, 1).contiguous().transpose(0, 1)
    weight = misaligned((vocabulary, width), dtype, rng.choice(skips))
    if rng.random() < 0.2:
        weight = weight.t().contiguous().t()
    bias = None
    if rng.random() < 0.4:
        bias = misaligned((vocabulary,), rng.choice([dtype, torch.float32]), rng.choice(skips))
    trained = rng.random() < 0.5
    learned = [student.detach().requires_grad_(), weight.detach().requires_grad_(trained)]
    learned += [] if bias is None else [bias.detach().requires_grad_(trained)]
    options: dict[str, Any] = {"backend": "triton", "softcap": rng.choice([None, 30.0])}
    chunk_bytes = rng.choice([1 << 20, 1 << 30])
    ids = torch.randint(vocabulary, (b, n), dtype=rng.choice([torch.int64, torch.int32]))
    mask, sparse = torch.rand(b, n) < 0.8, rng.choice([{}, {}, {"grad_mode": "sparse"}])
    per_token, of_bias = torch.randn(b, n), {"student_bias": learned[2]} if bias is not None else {}
    advantages = rng.choice([per_token, per_token[:, 0].to(torch.bfloat16)])
    window = {"lookahead": rng.choice([0, 1, 5, 16]), "temperature": rng.choice([1.0, 0.7, np.float64(0.7)])}
    loss = fused_egrsd_loss(
        learned[0], learned[1], teacher, ids, advantages, mask=mask, chunk_bytes=chunk_bytes, **of_bias, **window,
        **options, **sparse,
    )  # fmt: skip
    loss.backward()
    ends = torch.tensor([0, b * n // 2, b * n], dtype=rng.choice([torch.int32, torch.int64]))
    hidden, of_teacher = (x.reshape(b * n, -1) for x in (learned[0], teacher))
    fused_egrsd_loss(
        hidden, learned[1], of_teacher, ids.view(-1), per_token.view(-1), cu_seqlens=ends, chunk_bytes=chunk_bytes,
        normalizer=rng.choice([None, 7.0]), **of_bias, **options,
    )  # fmt: skip
    of_bias = {"bias": learned[2]} if bias is not None else {}
    common = {**of_bias, **options, "chunk_bytes": chunk_bytes}
    linear_logp(*learned[:2], ids, mask=mask, **common, **sparse).sum().backward()
    keep = rng.choice([0, 1 << 30])  # all or nothing: a part is chosen by what no kernel has written here
    announced = rng.choice([True, False, "lazy"])
    found = linear_logp(*learned[:2], ids, return_entropy=True, entropy_grad=announced, keep_bytes=keep, **common)
    sum(x.sum() for x in found[: 2 if announced else 1]).backward()
    extras = rng.sample(["is_top1", "mean_logits", "log_sum_sq_probs"], k=rng.randrange(4))
    token_statistics(teacher, weight, ids, mask=mask, extras=extras, **common)


def compare(seed: int) -> None:
    from egrsd_kernels.backends.triton.launch import Kernel
    from tests.support import fake_gpu

    fake_gpu.install()
    ours, looked_up = Kernel.__getitem__, 0

    def both(self: Kernel, grid: tuple[int, ...]):
        def launch(*arguments: Any, **constants: Any) -> None:
            nonlocal looked_up
            fake_gpu.Compiled.notes = notes = []
            known = len(self._known)
            ours(self, grid)(*arguments, **constants)
            self.jit[grid](*arguments, **constants)
            fake_gpu.Compiled.notes = None
            mine, tritons = notes
            assert mine.compiled is tritons.compiled, (mine, tritons)
            assert mine.grid == tritons.grid
            assert all(x is y or x == y for x, y in zip(mine.arguments, tritons.arguments, strict=True))
            looked_up += len(self._known) == known

        return launch

    rng = random.Random(seed)
    torch.manual_seed(seed)
    with mock.patch.object(Kernel, "__getitem__", both):
        for _ in range(60):
            calls(rng)
    print(looked_up, "launches were looked up")
    assert looked_up > 500


def test_launches_are_tritons():
    seed = random.randrange(1 << 30)
    script = f"from tests.test_launch import compare; compare({seed})"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, (seed, run.stdout, run.stderr[-3000:])
