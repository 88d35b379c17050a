"""Random operands for the Triton kernels, and what they should make of them."""

from __future__ import annotations

import math

import torch

from egrsd_kernels.backends import Needs, VocabularyStatistics, no_statistics
from egrsd_kernels.backends import triton as triton_backend
from egrsd_kernels.head import Head
from egrsd_kernels.rows import Rows

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
CHUNK_BYTES = 1 << 30

# The largest relative error of rounding to the operands' dtype: of exponentials, of scaled rows, and of the result.
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-20}
# The same in the root mean square, over many terms: 0.42 of the unit for each rounding of a log-uniform mantissa, and
# sqrt(3) of that for three, 2.8e-3 and 3.6e-4. float32 is left with its accumulation.
GRADIENT_ERROR = {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 1e-5}


class Case:
    """Random operands on the device, and their float64 softmax."""

    def __init__(self, n, d, v, dtype, *, bias=False, softcap=None, temperature=1.0, logit_scale=1.0, scale=1.0):
        g = torch.Generator().manual_seed(1000 * n + d)

        def normal(*shape):
            return torch.randn(*shape, generator=g).to(dtype).to(DEVICE)

        self.hidden = normal(1, n, d) * scale
        self.head = Head(normal(v, d) * (3 / math.sqrt(d)), normal(v) if bias else None, logit_scale, softcap)
        self.temperature = temperature
        self.targets = torch.randint(0, v, (n,), generator=g).to(DEVICE)
        self.valid = (torch.rand(n, generator=g) < 0.8).to(DEVICE)
        self.gradient = torch.randn(n, generator=g).to(DEVICE)
        self.gradient[::3] = 0
        self.rows = Rows.build(self.valid, self.gradient != 0)

    def reference(self):
        """(logp, entropy, logsumexp, gradients of Σ g · logp over the valid rows), in float64."""
        leaves = [x.detach().double().requires_grad_() for x in (self.hidden, self.head.weight)]
        product = leaves[0][0] @ leaves[1].t()
        if self.head.bias is not None:
            leaves.append(self.head.bias.double().requires_grad_())
            product = product + leaves[2]
        product.retain_grad()
        z = product * self.head.logit_scale
        if self.head.softcap is not None:
            z = self.head.softcap * torch.tanh(z / self.head.softcap)
        z = z / self.temperature
        log_p = z.log_softmax(-1)
        logp = log_p.gather(1, self.targets[:, None]).squeeze(1)
        p = log_p.exp()
        entropy = -torch.where(p > 0, p * log_p, 0).sum(-1)
        (logp * self.gradient)[self.valid].sum().backward()
        # A float32 accumulation over D terms errs by a few units in the last place of the largest partial sums.
        size = (leaves[0][0].abs() @ leaves[1].abs().t()).max() / self.temperature
        self.tolerance = 4 * 2.0**-24 * float(size.detach()) * math.sqrt(self.hidden.shape[-1]) + 4e-6
        if CUDA:  # tensor cores truncate where an FMA rounds
            self.tolerance *= 4
        with torch.no_grad():
            # dL/d(product) errs by its own rounding, by the one that the row's factor undoes for the target, and by the
            # scaled row's; and each p by as much as its logit does.
            unit = UNIT[self.hidden.dtype]
            weighed = (self.gradient.abs() * self.valid)[:, None] * p / self.temperature
            error = 3 * unit * product.grad.abs() + 2 * self.tolerance * weighed
            bounds = [(error @ leaves[1].abs())[None], error.t() @ leaves[0][0].abs(), error.sum(0)]
            gradients = [x.grad for x in leaves]
            self.bounds = [b + unit * g.abs() + 1e-7 for b, g in zip(bounds, gradients, strict=False)]
        return logp.detach(), entropy.detach(), z.logsumexp(-1).detach(), gradients

    def statistics(self):
        found = no_statistics(self.targets.numel(), self.hidden)
        out = VocabularyStatistics(*found)
        triton_backend.statistics(
            self.head, self.temperature, self.hidden, self.targets, self.rows, out, CHUNK_BYTES
        )  # fmt: skip
        return found

    def student_pass(self, needs=(True, True, True), chunk_bytes=CHUNK_BYTES, factor=None):
        logp = torch.zeros(self.targets.numel(), device=DEVICE)
        needs = Needs(*needs[:2], needs[2] and self.head.bias is not None)
        finish = triton_backend.student_pass(
            self.head, self.temperature, self.hidden, self.targets, self.rows, VocabularyStatistics(logp),
            lambda *_: self.gradient, needs, chunk_bytes,
        )  # fmt: skip
        return logp, finish(factor)


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()
