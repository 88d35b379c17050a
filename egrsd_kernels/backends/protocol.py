"""What a backend is: a module with the functions of :class:`Backend`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from egrsd_kernels import checks
from egrsd_kernels.checks import expect
from egrsd_kernels.credit import CreditOptions, Lookahead, TokenStats
from egrsd_kernels.head import Head, compute_dtype
from egrsd_kernels.rows import Rows, Sequences

from .scaling import Scales
from .sparsity import Sparse

DEFAULT_CHUNK_BYTES = 1 << 30  # the most logits-sized memory that a call holds at a time


class Needs(NamedTuple):
    """Which gradients will be asked for; the weight's from ``first_column`` on."""

    hidden: bool
    weight: bool
    bias: bool
    first_column: int = 0

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor | None = None) -> Needs:
        """columns: what a head's low-rank part adds to a weight that may be frozen."""
        asked, whole, of_bias, beside = (
            torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias, columns)
        )
        return cls(asked, whole or beside, of_bias, weight.shape[1] if beside and not whole else 0)

    @property
    def head(self) -> bool:
        return self.weight or self.bias


class Gradients(NamedTuple):
    """In the operands' dtypes; None where not needed. The weight's has the columns that :class:`Needs` says."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def of_operands(self, needs: Needs, columns: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of (hidden, weight, bias, columns), as autograd takes them."""
        weight, beside = self.weight, None
        if columns is not None and weight is not None:
            width = weight.shape[1] - columns.shape[1]
            weight, beside = (weight[:, :width], weight[:, width:]) if width else (None, weight)
        return self.hidden, weight, self.bias, beside


Finish = Callable[[Tensor | None], Gradients]
"""What a student pass leaves: the gradients times a 0-d factor in the compute dtype, or times 1 for None. Once."""

Credit = Callable[[int, int], Tensor]
"""dL/dlogp (N,) in the compute dtype, of (first row of the order, number of rows) whose log p has been written, and of
the rows before them."""


class VocabularyStatistics(NamedTuple):
    """What a pass over the vocabulary says of each token; None is what nobody asked for.

    Tensors of one shape: that of ``target_ids``, or (N,) within the backends. float32 (float64 for float64 input) and
    in nats, but for is_top1, which is bool; 0 or False where masked. Only log p is ever differentiable, and entropies
    where that was asked for. A target outside the vocabulary has a NaN as log p, and is not the top one; what else is
    said of its token may be NaN.
    """

    logp: Tensor
    """log p(y) = z_y - logsumexp(z)."""
    entropy: Tensor | None = None
    """-Σ_v p_v log p_v."""
    logsumexp: Tensor | None = None
    """log Σ_v e^z_v."""
    is_top1: Tensor | None = None
    """Whether y is the most likely token: of equal logits, the first of the vocabulary is. False where log p is NaN."""
    mean_logits: Tensor | None = None
    """The mean of z over the vocabulary, -inf beside a logit of -inf."""
    log_sum_sq_probs: Tensor | None = None
    """log Σ_v p_v²: minus the Rényi entropy of order 2."""

    def view(self, shape: Sequence[int]) -> VocabularyStatistics:
        """All of it in another shape."""
        logp, *others = (None if x is None else x.view(*shape) for x in self)
        assert logp is not None
        return VocabularyStatistics(logp, *others)

    @classmethod
    def empty(cls, names: Collection[str], n: int, hidden: Tensor, new: Callable[..., Tensor]) -> list[Tensor]:
        """A tensor (n,) for each of these fields, in their order. new: makes it, such as hidden.new_zeros."""
        number = compute_dtype(hidden.dtype)
        return [new(n, dtype=torch.bool if x == "is_top1" else number) for x in cls._fields if x in names]

    @classmethod
    def of(cls, names: Collection[str], tensors: Sequence[Tensor]) -> VocabularyStatistics:
        """These fields, of as many tensors in the fields' order."""
        return cls(**dict(zip((x for x in cls._fields if x in names), tensors, strict=True)))


EXTRAS = ("is_top1", "mean_logits", "log_sum_sq_probs")
"""What is made only where asked for by name."""


def no_statistics(n: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, logsumexp) of n rows of such hidden states, zeros to begin with."""
    logp, entropy, logsumexp = torch.zeros(3, n, dtype=compute_dtype(hidden.dtype), device=hidden.device).unbind()
    return logp, entropy, logsumexp


def no_extras(like: Tensor, extras: Collection[str]) -> dict[str, Tensor]:
    """These beside a log p (N,), zeros to begin with."""
    return {x: torch.zeros_like(like, dtype=torch.bool if x == "is_top1" else like.dtype) for x in extras}


class EntropyGradient(NamedTuple):
    """dL/dentropy (N,), and what an earlier pass said of the same rows: entropy and logsumexp (N,), in nats."""

    gradient: Tensor
    entropy: Tensor
    logsumexp: Tensor


Kept = Callable[[Head, Tensor, Tensor, "EntropyGradient | None", Tensor, int], Finish]
"""A pass that has kept exponentials: what finishes the gradients, given the head and the hidden states of that pass,
dL/dlogp (N,), dL/dentropy if that was announced, the tokens (N,) that either is not 0 of, and chunk_bytes. Once."""


class Backend(Protocol):
    """All (N,) tensors are contiguous and in the callers' order; ``hidden`` is (B, T, D) with N = B T, of any strides.

    Numbers are float32, float64 for float64 operands. Nothing here waits for the device.
    """

    def takes(self, hidden: Tensor) -> bool:
        """Whether it works on operands of this dtype and device."""

    def build_rows(self, valid: Tensor, active: Tensor) -> Rows:
        """See :meth:`egrsd_kernels.rows.Rows.build`."""

    def by_token(self, values: Tensor, n: int, sequences: Sequences, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See :func:`egrsd_kernels.rows.by_token`."""

    def scales(self, peak: Tensor, least: float, rows: Rows, normalizer: Tensor | None, low: bool) -> Scales:
        """See :func:`~.scaling.scales`."""

    def statistics(
        self, head: Head, temperature: float, hidden: Tensor, target_ids: Tensor, rows: Rows,
        out: VocabularyStatistics, chunk_bytes: int,
    ) -> None:  # fmt: skip
        """Write what ``out`` has, zeros to begin with; 0 at masked rows."""

    def lookahead_entropy(self, entropy: Tensor, valid: Tensor, seq_end: Tensor, lookahead: Lookahead) -> Tensor:
        """See :func:`egrsd_kernels.credit.lookahead_entropy`."""

    def token_credit(
        self, rows: Rows, first_row: int, n_rows: int, advantages: Tensor, scale: Tensor, share: Tensor,
        options: CreditOptions, stats: TokenStats, loss: Tensor, gradient: Tensor,
    ) -> None:  # fmt: skip
        """See :func:`egrsd_kernels.credit.token_credit`."""

    def student_pass(
        self, head: Head, temperature: float, hidden: Tensor, target_ids: Tensor, rows: Rows,
        out: VocabularyStatistics, credit: Credit, needs: Needs, chunk_bytes: int, sparse: Sparse | None = None,
        entropy_gradient: EntropyGradient | None = None,
    ) -> Finish:  # fmt: skip
        """Write ``out``, which has no logsumexp, as :meth:`statistics` does, and leave the gradients all but done.

        credit: called chunk by chunk, in the order of ``rows``, once the chunk's log p is there.
        sparse: what may be left out of the gradients; takes what was. None: exact gradients. A backend whose gradients
            are always exact leaves it alone.
        entropy_gradient: what the loss takes of the entropies, which adds to the gradients. They and log p are known
            then, and ``out`` may be left as it is. Not with ``sparse``.
        """

    def keep(
        self, head: Head, temperature: float, hidden: Tensor, target_ids: Tensor, rows: Rows,
        out: VocabularyStatistics, needs: Needs, entropy_gradient: bool, keep_bytes: int,
        chunk_bytes: int,
    ) -> Kept:  # fmt: skip
        """Write ``out``, as :meth:`statistics` does, and keep what gradients are made of.

        Of as many rows as ``keep_bytes`` allow; the others' is made again. entropy_gradient: whether there will be one.
        """


Kind = Literal["reverse_kl", "forward_kl", "jsd"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Divergence(NamedTuple):
    """A divergence D of p_S and p_T, in nats; ``reference/divergence.py`` has the formulas.

    With r = ln p_S - ln p_T, 0 where both are 0, and z the student's logits:
        reverse_kl  D = Σ p_S r                        dD/dz = p_S (r - D)
        forward_kl  D = -Σ p_T r                       dD/dz = p_S - p_T
        jsd         D = Σ (1-β) p_S u + β p_T (u - r)  dD/dz = (1-β) p_S (u - Σ p_S u)
    u = ln(p_S / m) = l + min(r, 0), m = (1-β) p_S + β p_T, l = -log1p(w expm1(-|r|)) with w = β for r >= 0, else 1-β.
    """

    kind: Kind
    beta: float = 0.5
    """β in (0, 1), of "jsd"."""
    top_k: int | None = None
    """Of the partition into the teacher's k likeliest entries, one by one, and all others as one; None: all one by one.

    Then the others' r is the logarithm of the ratio of their sums, and the formulas hold; p_T is p_S e^-r in dD/dz.
    """

    @classmethod
    def checked(cls, prefix: str, kind: Any, beta: object, top_k: object, vocabulary: int) -> Divergence:
        """From arguments; prefix: of the names of beta and top_k. With one, the kind's name is "divergence"."""
        known = isinstance(kind, str) and kind in KINDS
        expect(known, "divergence" if prefix else "kind", kind, " or ".join(f'"{name}"' for name in KINDS))
        beta = checks.number(f"{prefix}beta", beta, low=0, high=1, strict=True)
        expect(beta < 1, f"{prefix}beta", beta, "a number above 0 and below 1")
        expect(beta == 0.5 or kind == "jsd", f"{prefix}beta", beta, f'0.5, since the kind is "{kind}", which has none')
        if top_k is not None:
            top_k = checks.integer(f"{prefix}top_k", top_k, low=1)
            expect(top_k <= vocabulary, f"{prefix}top_k", top_k, f"at most the vocabulary's size, {vocabulary}")
        return cls(kind, beta, top_k)

    @classmethod
    def of_loss(
        cls, kind: object, weight: object, policy_weight: object, beta: object, top_k: object, vocabulary: int
    ) -> Divergence | None:
        """From arguments of :func:`egrsd_kernels.fused_egrsd_loss`; None: there is none, nor what belongs to it."""
        checks.number("divergence_weight", weight, low=0, strict=True)
        checks.number("policy_weight", policy_weight, low=0)
        if kind is not None:
            return cls.checked("divergence_", kind, beta, top_k, vocabulary)
        others = {
            "divergence_weight": (weight, 1), "divergence_beta": (beta, 0.5), "divergence_top_k": (top_k, None),
            "policy_weight": (policy_weight, 1),
        }  # fmt: skip
        for name, (value, default) in others.items():
            expect(value == default, name, value, f"{default}, since divergence is None")
        return None


class Pair(NamedTuple):
    """Student and teacher beside each other: hidden states (B, T, D), of any strides, and heads of one vocabulary.

    D and dtype of the two may differ. The student's numbers are what results have: float32, float64 for float64.
    """

    student_hidden: Tensor
    student: Head
    teacher_hidden: Tensor
    teacher: Head
    temperature: float
    divergence: Divergence


class DivergenceStatistics(NamedTuple):
    """What a pass over student and teacher says of each token; None is what nobody asked for.

    Tensors of one shape: that of hidden states without D, or (N,) within the backends. float32 (float64 for a float64
    student) and in nats, 0 where masked. Only the divergence is ever differentiable. Of a token whose target is outside
    the vocabulary all of it is NaN.
    """

    divergence: Tensor
    """D of the student's and the teacher's distribution, at least 0; inf where the other's support does not suffice.

    dL/dz of a row whose reverse KL is inf is NaN, unless dL/dD is 0.
    """
    student_logp: Tensor | None = None
    """log p_S(y), beside targets only."""
    teacher_logp: Tensor | None = None
    """log p_T(y), beside targets only."""
    student_entropy: Tensor | None = None
    """-Σ_v p_S log p_S."""
    teacher_entropy: Tensor | None = None
    """-Σ_v p_T log p_T."""

    def view(self, shape: Sequence[int]) -> DivergenceStatistics:
        """All of it in another shape."""
        divergence, *others = (None if x is None else x.view(*shape) for x in self)
        assert divergence is not None
        return DivergenceStatistics(divergence, *others)


class PairCredit(NamedTuple):
    """What a loss takes of each token, (N,) in the compute dtype; a token whose entries are 0 has no gradient."""

    of_divergence: Tensor
    """dL/dD."""
    of_logp: Tensor | None = None
    """dL/dlog p_S(y), which adds of_logp (1_y - p_S) to the gradient of the logits. Beside targets only."""


KeptDivergence = Callable[[Pair, Tensor, Tensor, int], Finish]
"""A pass that has kept the gradients of the logits: what finishes those of the operands, given the pair of that pass,
dL/dD (N,), the tokens (N,) for which it is not 0, and chunk_bytes. Once."""


class DivergenceBackend(Protocol):
    """A module that makes divergences; what :class:`Backend` says of tensors holds. Deterministic bit for bit.

    target_ids: (N,), or None. No result depends on them but log p; kernels may take both models' target logits as the
    offset of exponentials. Without them an offset that is known before the pass, and below no logsumexp, is the mean
    logit plus ln V (Jensen's inequality), out of the head's mean row; with a bias, over the V finite entries of it. A
    fixed entry of the vocabulary may be as unlikely as can be: with it exponentials overflow.
    """

    def takes(self, pair: Pair) -> bool:
        """Whether it works on such operands, and makes that divergence."""

    def divergence_pass(
        self, pair: Pair, target_ids: Tensor | None, rows: Rows, out: DivergenceStatistics,
        credit: Callable[[int, int], PairCredit], needs: Needs, chunk_bytes: int,
    ) -> Finish:  # fmt: skip
        """Write ``out``, zeros to begin with, and leave the student's gradients all but done.

        credit: called chunk by chunk, as :data:`Credit` is, once the chunk's ``out`` is there; never without needs.
        """

    def keep_divergence(
        self, pair: Pair, target_ids: Tensor | None, rows: Rows, out: DivergenceStatistics, needs: Needs,
        keep_bytes: int, chunk_bytes: int,
    ) -> KeptDivergence:  # fmt: skip
        """Write ``out``, and keep dD/dz of as many rows as ``keep_bytes`` allow; the others' is made again."""
