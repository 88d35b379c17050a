"""Every kernel at odd shapes, without a reference beside it: what compute-sanitizer watches for accesses out of bounds.

make memcheck, which runs each family, dtype and shape in a process of its own: compute-sanitizer is slow, and a GPU has
room for many.

    python -m tests.memcheck            what to run, a line a process
    python -m tests.memcheck tma bfloat16 131 515 72
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator

import torch

from egrsd_kernels import Head, fused_egrsd_loss, linear_divergence, linear_logp, token_statistics
from egrsd_kernels.backends import EXTRAS
from egrsd_kernels.backends.protocol import KINDS
from tests.support.memory import Used

# Tokens, vocabulary: one, few, just past whole tiles, a chunk that is full beside an odd number of tiles, and rows that
# several programs of an elementwise pass share.
SHAPES = [(1, 1), (3, 130), (131, 515), (300, 1003), (128, 190), (20, 9001)]
SIZES = [72, 17]  # hidden size: rows that TMA can read, and rows that it cannot


def run(n: int, vocabulary: int, size: int, dtype: torch.dtype) -> None:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").to(dtype).requires_grad_()

    hidden, weight, bias = normal(n, size), normal(vocabulary, size), normal(vocabulary)
    target_ids = torch.randint(0, vocabulary, (n,), device="cuda")
    advantages = torch.randn(n, device="cuda")
    if n % 128:
        target_ids[::7] = -100
        target_ids[1::50] = vocabulary + 5  # must not be read
        advantages[::3] = 0
    ends = torch.tensor([0, n // 2, n], device="cuda")
    discounted = {"lookahead_filter": "discounted", "lookahead_decay": 0.9}
    for transform in ({}, {"student_bias": bias, "softcap": 5.0, "temperature": 0.8} | discounted):
        for chunk_bytes in (1, 1 << 30):
            options = {"cu_seqlens": ends, "lookahead": 5, "chunk_bytes": chunk_bytes, **transform}
            for head in (weight, weight.detach()):  # a frozen head takes the vocabulary in slices
                for mode in ("exact", "sparse"):
                    arguments = hidden, head, hidden + 1, target_ids, advantages
                    fused_egrsd_loss(*arguments, **options, grad_mode=mode).backward()
    for head, softcap in itertools.product((weight, weight.detach()), (None, 5.0)):
        for keep_bytes, entropy_grad in itertools.product((0, 1 << 30), (False, True)):
            options = {"return_entropy": True, "entropy_grad": entropy_grad, "keep_bytes": keep_bytes}
            logp, entropy = linear_logp(hidden, head, target_ids, softcap=softcap, **options)
            (logp + entropy if entropy_grad else logp).sum().backward()
    entropies = {"teacher_logp": -torch.rand(n, device="cuda"), "teacher_entropy": torch.rand(n, device="cuda")}
    for name, own in (("softmin", {"lookahead_temperature": 0.1}), ("quantile", {"lookahead_quantile": 0.5})):
        options = {"cu_seqlens": ends, "lookahead": 5, "lookahead_filter": name, **own, **entropies}
        with torch.no_grad():
            fused_egrsd_loss(hidden, weight, None, target_ids, advantages, **options)
    low_rank = normal(5, size), normal(vocabulary, 5), 0.5
    linear_logp(hidden, Head(weight.detach(), bias, low_rank=low_rank), target_ids).sum().backward()
    linear_logp(hidden, weight * 200, target_ids).sum().backward()  # 1/p_y beyond float32: done again
    token_statistics(hidden, weight, target_ids)
    token_statistics(hidden, weight, target_ids, bias=bias, extras=EXTRAS)
    for mode in ("exact", "sparse"):
        linear_logp(hidden, weight.detach() * 200, target_ids, extras=EXTRAS, grad_mode=mode)
    other = normal(vocabulary, 2 * size).detach()
    for kind, head in itertools.product(KINDS, (weight, weight.detach())):
        for target, teacher in ((target_ids, weight.detach()), (None, other)):  # one head, and two of two sizes
            h = hidden.detach() + 1 if teacher is not other else normal(n, 2 * size).detach()
            for keep_bytes, chunk_bytes in ((0, 1 << 30), (1 << 30, 1)) if head is weight else ((0, 1),):
                options = {"keep_bytes": keep_bytes, "chunk_bytes": chunk_bytes, "backend": "triton"}
                options |= {"kind": kind, "beta": 0.3 if n % 2 and kind == "jsd" else 0.5, "target_ids": target}
                linear_divergence(hidden, Head(head, bias, softcap=5.0), h, teacher, **options).sum().backward()
    # Beyond float32 unless it is done again.
    arguments = hidden, weight * 200, hidden + 1, weight * 200
    linear_divergence(*arguments, target_ids=target_ids, return_stats=True, backend="triton")


def cases() -> Iterator[tuple[str, str, int, int, int]]:
    """(family, dtype, tokens, vocabulary, hidden size)"""
    for (n, vocabulary), dtype in itertools.product(SHAPES, ("bfloat16", "float16", "float32")):
        for family, size in (*(("tma", size) for size in SIZES), ("pointer", SIZES[0])):
            yield family, dtype, n, vocabulary, size


def main(family: str, dtype: str, n: str, vocabulary: str, size: str) -> None:
    os.environ["EGRSD_KERNELS_TMA"] = "1" if family == "tma" else "0"
    with Used("cuda"):
        run(int(n), int(vocabulary), int(size), getattr(torch, dtype))
    torch.cuda.synchronize()
    print(family, dtype, n, vocabulary, size, "done", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(*sys.argv[1:])
    else:
        print("\n".join(" ".join(map(str, case)) for case in cases()))
