"""The method's functions against the reference, and the Triton kernels against these functions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from egrsd_kernels import credit
from egrsd_kernels.backends import triton as in_triton
from egrsd_kernels.credit import CreditOptions, Lookahead, TokenStats
from egrsd_kernels.rows import Rows

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
LAMBDAS = [1.0, 0.9, 0.5, 0.01]

pytestmark = [pytest.mark.cuda] if CUDA else []


def sequences(lengths: list[int], seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Entropies from far below a nat to ten, some of them 0; which are valid; the end of each one's sequence."""
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    entropy = 10 ** (torch.rand(n, generator=g) * 12 - 11)
    entropy[torch.rand(n, generator=g) < 0.05] = 0
    ends = torch.tensor(lengths).cumsum(0).repeat_interleave(torch.tensor(lengths)) - 1
    return entropy, torch.rand(n, generator=g) < 0.8, ends.to(torch.int32)


def naive(entropy: torch.Tensor, valid: torch.Tensor, ends: torch.Tensor, lookahead: Lookahead) -> torch.Tensor:
    found = torch.zeros(len(entropy), dtype=torch.float64)
    for t in range(len(entropy)):
        if valid[t]:
            window = [j for j in range(t, min(t + lookahead.window, int(ends[t])) + 1) if valid[j]]
            distances, seen = [j - t for j in window], entropy[window].double()
            found[t] = min(float(entropy[t]), NAIVE[lookahead.filter](seen, distances, lookahead))
    return found


def naive_discounted(seen: torch.Tensor, distances: list[int], lookahead: Lookahead) -> float:
    # In logarithms no factor leaves float64's range.
    rate = -math.log(lookahead.decay)
    exponents = [
        math.log(h) + rate * k if (h := float(x)) > 0 else -math.inf for x, k in zip(seen, distances, strict=True)
    ]
    return min(math.exp(min(x, 700.0)) for x in exponents)


def naive_softmin(seen: torch.Tensor, distances: list[int], lookahead: Lookahead) -> float:
    if lookahead.temperature == 0:
        return float(seen.min())
    least = float(seen.min())
    shifted = [-(float(x) - least) / lookahead.temperature for x in seen]
    mean = math.fsum(map(math.expm1, shifted)) / len(shifted)
    # Of two ways to write the logarithm of a mean, each is exact where the other is not.
    return least - lookahead.temperature * (
        math.log1p(mean) if mean > -0.5 else math.log(math.fsum(map(math.exp, shifted)) / len(shifted))
    )


NAIVE = {
    "minimum": lambda seen, distances, lookahead: float(seen.min()),
    "discounted": naive_discounted,
    "softmin": naive_softmin,
    "quantile": lambda seen, distances, lookahead: float(torch.quantile(seen, lookahead.quantile)),
}


def powers_error(lookahead: Lookahead, dtype: torch.dtype) -> float:
    """Of λ^-k H relative to itself, where it is below some H_t <= 10 and H >= 1e-11.

    The exponent k log2(1/λ) is then at most log2(10 / 1e-11) < 40, and its rounding by u moves 2^x by x u ln 2 < 28 u.
    Both factors, their squares and products are rounded, too: 8 u.
    """
    return (28 + 8) * torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("decay", LAMBDAS)
@pytest.mark.parametrize("window", [0, 1, 3, 8, 1000])
@pytest.mark.parametrize("where", ["torch", "triton"])
def test_discounted_lookahead(window, decay, where):
    entropy, valid, ends = sequences([1, 7, 300, 1, 55, 0, 2], seed=window)
    lookahead = Lookahead(window, "discounted", decay)
    want = naive(entropy, valid, ends, lookahead)
    if where == "torch":
        dtype = torch.float64
        entropy, function = entropy.double(), credit.lookahead_entropy
    else:
        dtype, function = torch.float32, in_triton.lookahead_entropy
    got = function(entropy.to(DEVICE), valid.to(DEVICE), ends.to(DEVICE), lookahead).cpu()
    assert got.dtype == dtype
    tolerance = powers_error(lookahead, dtype) * want
    assert ((got.double() - want).abs() <= tolerance).all()
    assert (got <= torch.where(valid, entropy, 0)).all()
    if decay == 1:  # the minimum, to the bit
        assert torch.equal(got, function(*(x.to(DEVICE) for x in (entropy, valid, ends)), Lookahead(window)).cpu())


@pytest.mark.parametrize("where", [credit, in_triton], ids=["torch", "triton"])
def test_discount_of_what_is_no_entropy(where):
    """NaN is kept; what rounding leaves below 0 is not blown up; the tiniest numbers come out right from far away."""
    tiny = 2.0**-126
    entropy = torch.tensor([5.0, -1e-7, 3.0, math.nan, 5.0, 0.0, *[9.0] * 129, tiny], device=DEVICE)
    n = len(entropy)
    valid, ends = torch.ones(n, dtype=torch.bool, device=DEVICE), torch.full((n,), n - 1, device=DEVICE).int()

    def ahead(window: int) -> torch.Tensor:
        return where.lookahead_entropy(entropy, valid, ends, Lookahead(window, "discounted", 0.5)).cpu()

    got = ahead(1)
    assert torch.equal(got[:2], torch.tensor([-1e-7, -1e-7])) and got[2:4].isnan().all() and not got[4:].isnan().any()
    assert got[4] == 0 and abs(got[-2] / tiny - 2) < 1e-6
    assert abs(ahead(10**6)[6] - 8) < 1e-4  # the one factor, 2^129, is beyond float32


def rounding(lookahead: Lookahead, dtype: torch.dtype) -> float:
    """What a soft minimum or a quantile may be off by, nats, for entropies of at most 10.

    Each is a weighted mean of entropies: four roundings of at most 10 nats. A soft minimum has a logarithm that float64
    rounds, times τ, whose own rounding to float32 moves it by at most 10 u. A quantile's rank, at most W, is off by 2 u
    of itself, and two neighbours in order are at most 10 nats apart.
    """
    u = torch.finfo(dtype).eps / 2
    own = {"softmin": lookahead.temperature * (lookahead.window + 8) * 2.0**-53, "quantile": 20 * lookahead.window * u}
    return 50 * u + own[lookahead.filter]


SOFT = (0, 0.3), (1, 1e-3), (3, 0.3), (8, 50.0), (60, 1e6)
QUANTILES = (0, 0.5), (1, 0.25), (3, 0.5), (8, 0.9), (20, 0.37)
SMOOTH = [
    *(Lookahead(window, "softmin", temperature=tau) for window, tau in SOFT),
    *(Lookahead(window, "quantile", quantile=q) for window, q in QUANTILES),
    Lookahead(3, "quantile", quantile=1.0),
]  # fmt: skip


@pytest.mark.parametrize("lookahead", SMOOTH, ids=str)
@pytest.mark.parametrize("where", ["torch", "triton"])
def test_soft_minimum_and_quantile(lookahead, where):
    entropy, valid, ends = sequences([1, 7, 60, 1, 25, 0, 2], seed=lookahead.window)
    want = naive(entropy, valid, ends, lookahead)
    dtype, function = (torch.float64, credit) if where == "torch" else (torch.float32, in_triton)
    arguments = [x.to(DEVICE) for x in (entropy.to(dtype), valid, ends)]
    got = function.lookahead_entropy(*arguments, lookahead).cpu()
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() <= rounding(lookahead, dtype)
    least = function.lookahead_entropy(*arguments, Lookahead(lookahead.window)).cpu()
    assert (least <= got).all() and (got <= torch.where(valid, entropy, 0)).all()
    if lookahead.window == 0 or lookahead.quantile == 1:  # the token's own entropy, to the bit
        assert torch.equal(got, torch.where(valid, entropy, 0).to(dtype))


@pytest.mark.parametrize("filter", credit.FILTERS)
@pytest.mark.parametrize("where", [credit, in_triton], ids=["torch", "triton"])
def test_every_filter_is_the_minimum_by_default(filter, where):
    """To the bit, with equal entropies, rounded ones below 0 and NaN in the window, which is kept."""
    entropy, valid, ends = (x.to(DEVICE) for x in sequences([1, 9, 40, 0, 2], seed=3))
    entropy[5], entropy[20:24], entropy[30], valid[30] = -1e-7, 0.5, math.nan, True
    least = where.lookahead_entropy(entropy, valid, ends, Lookahead(4))
    assert torch.equal(
        where.lookahead_entropy(entropy, valid, ends, Lookahead(4, filter)).nan_to_num(9), least.nan_to_num(9)
    )
    assert least[26:31][valid[26:31]].isnan().all() and not least[31:].isnan().any()


@pytest.mark.parametrize("where", [credit, in_triton], ids=["torch", "triton"])
def test_soft_minimum_and_quantile_of_odd_windows(where):
    """Equal entropies are themselves, whatever the window holds; NaN is kept; the tiniest τ is the minimum."""
    filters = [{"filter": "softmin", "temperature": 0.2}, {"filter": "quantile", "quantile": 0.4}]
    entropy = torch.tensor([3.0, 0.7, 0.7, 0.7, math.nan, 2.0, 2.0], device=DEVICE)
    valid = torch.tensor([True, True, True, True, True, True, False], device=DEVICE)
    ends = torch.full((7,), 6, device=DEVICE).int()
    for filter in filters:
        got = where.lookahead_entropy(entropy, valid, ends, Lookahead(2, **filter)).cpu()
        assert got.isnan().tolist() == [False, False, True, True, True, False, False]
        assert got[1] == entropy[1] and got[5:].tolist() == [2.0, 0.0]
    tiny = Lookahead(2, "softmin", temperature=1e-300)
    entropy = torch.tensor([3.0, 0.7, 0.9, 0.0, 5.0, 2.0, 2.0], device=DEVICE)
    got = where.lookahead_entropy(entropy, valid, ends, tiny).cpu()
    assert torch.allclose(got, where.lookahead_entropy(entropy, valid, ends, Lookahead(2)).cpu(), rtol=0, atol=1e-38)


def test_windows_in_pieces_are_the_windows(monkeypatch):
    entropy, valid, ends = sequences([30, 4, 50], seed=8)
    filters = [
        Lookahead(6, "discounted", 0.8),
        Lookahead(6, "softmin", temperature=0.1),
        Lookahead(6, "quantile", quantile=0.3),
    ]
    whole = [credit.lookahead_entropy(entropy, valid, ends, filter) for filter in filters]
    monkeypatch.setattr(credit, "WINDOW_ELEMENTS", 7 * 13)
    for filter, want in zip(filters, whole, strict=True):
        assert torch.equal(credit.lookahead_entropy(entropy, valid, ends, filter), want)


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    seed=st.integers(0, 2**20),
    window=st.integers(0, 12),
    filter=st.one_of(
        st.just({}),
        st.floats(0.05, 1.0).map(lambda x: {"filter": "discounted", "decay": x}),
        st.sampled_from([0.0, 1e-3, 0.1, 1.0, 1e3]).map(lambda x: {"filter": "softmin", "temperature": x}),
        st.floats(0.0, 1.0).map(lambda x: {"filter": "quantile", "quantile": x}),
    ),
)
def test_lookahead_is_the_reference(lengths, seed, window, filter):
    entropy, valid, ends = sequences(lengths, seed)
    got = credit.lookahead_entropy(entropy.double(), valid, ends, Lookahead(window, **filter))
    want = reference.lookahead_entropy(entropy.double(), valid, ends, window, **filter)
    # The logarithm of a sum, times τ, is rounded on either side; the minima are exact but for λ's power.
    atol = 0 if filter.get("filter", "discounted") == "discounted" else 1e-13 * (10 + filter.get("temperature", 0))
    assert torch.allclose(got, want, rtol=1e-13, atol=atol)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    seed=st.integers(0, 2**20),
    window=st.integers(0, 6),
    filter=st.one_of(
        st.sampled_from([0.0, 1e-3, 0.1, 1e3]).map(lambda x: Lookahead(0, "softmin", temperature=x)),
        st.floats(0.0, 1.0).map(lambda x: Lookahead(0, "quantile", quantile=x)),
    ),
)
def test_the_kernel_is_the_function(lengths, seed, window, filter):
    entropy, valid, ends = sequences(lengths, seed)
    lookahead = filter._replace(window=window)
    want = credit.lookahead_entropy(entropy.double(), valid, ends, lookahead)
    got = in_triton.lookahead_entropy(*(x.to(DEVICE) for x in (entropy, valid, ends)), lookahead).cpu()
    assert (got - want).abs().max() <= rounding(lookahead, torch.float32)


def statistics(n: int, seed: int = 0) -> tuple[torch.Tensor, TokenStats]:
    """Advantages (some 0) and the statistics of n tokens; what is to be written holds 7."""
    g = torch.Generator().manual_seed(seed)
    advantages = torch.randn(n, generator=g)
    advantages[::5] = 0
    student, teacher = -3 * torch.rand(2, n, generator=g)
    entropy = 2 * torch.rand(n, generator=g)
    written = torch.full((5, n), 7.0)
    return advantages, TokenStats(student, teacher, entropy, 0.5 * entropy, *written)


@pytest.mark.parametrize("where", [credit, in_triton], ids=["torch", "triton"])
def test_token_credit_is_the_reference_on_its_rows(where):
    """The valid rows of the slice get the method's numbers; everything else stays as it is."""
    n, first_row, n_rows = 700, 128, 384
    advantages, stats = statistics(n)
    valid = torch.rand(n, generator=torch.Generator().manual_seed(1)) < 0.6
    rows, written = Rows.build(valid, advantages != 0), torch.full((2, n), 7.0)
    options, scale = CreditOptions(gamma=0.8, gate_floor=0.3, clip_eps=0.25), torch.tensor(1.3)
    on = TokenStats(*(x.to(DEVICE) for x in stats))
    share, (loss, gradient) = torch.tensor(-0.3, device=DEVICE), written.to(DEVICE).unbind()
    device_rows, given = Rows(*(x.to(DEVICE) for x in rows)), (advantages.to(DEVICE), scale.to(DEVICE), share, options)
    where.token_credit(device_rows, first_row, n_rows, *given, on, loss, gradient)
    index = rows.order[first_row : min(first_row + n_rows, int(rows.counts[0]))].long()
    rest = torch.ones(n, dtype=torch.bool).index_fill(0, index, False)
    assert 0 < len(index) < n_rows  # some of the slice is masked

    a, logp_s, logp_t, h_cl = (x[index].double() for x in (advantages, *stats[:2], stats.lookahead_entropy))
    w = reference.magnitude(a, logp_t, logp_s, 0.25)
    omega = reference.gate(h_cl / 1.3, 0.8, 0.3)
    credit_ = reference.token_advantage(a, w, omega)
    for name, got, want in (
        ("magnitude", on.magnitude, w), ("gate", on.gate, omega), ("token_advantage", on.token_advantage, credit_),
        ("loss", loss, -credit_ * logp_s), ("gradient", gradient, -0.3 * credit_),
    ):  # fmt: skip
        got = got.cpu()
        # A dozen roundings of numbers of at most 3.
        assert (got[index] - want).abs().max() <= 12 * 2.0**-24 * 3, name
        assert (got[rest] == 7).all(), name


def test_the_functions_are_the_reference():
    advantages, stats = statistics(2000, seed=3)
    a, (logp_s, logp_t, _, h_cl) = advantages.double(), (x.double() for x in stats[:4])
    w = credit.magnitude(a, logp_t - logp_s, 0.2)
    omega = credit.gate(h_cl, torch.tensor(1.7).double(), 0.4, 0.1)
    assert torch.equal(w, reference.magnitude(a, logp_t, logp_s, 0.2))
    want = reference.gate(h_cl / torch.tensor(1.7).double(), 0.4, 0.1)
    assert torch.allclose(omega, want, rtol=1e-15)
    assert torch.equal(credit.token_advantage(a, w, omega), reference.token_advantage(a, w, omega))
    assert credit.batch_max(stats.teacher_entropy) == stats.teacher_entropy.max()
    assert credit.batch_max(torch.zeros(0)) == 0
