import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from egrsd_kernels.regimes import Regime, regime_shares, token_regimes

LOW, HIGH = 0.01, 0.17
ENTROPIES = st.one_of(st.floats(0, 1, width=32), st.sampled_from([0.0, 0.01, 0.17, 1.0]))


def definition(entropy: float, lookahead: float) -> list[Regime]:
    """Every regime whose definition holds, one test each."""
    uncertain = entropy >= HIGH
    holds = {
        Regime.LOCK: entropy <= LOW,
        Regime.FORK: uncertain and lookahead >= HIGH,
        Regime.PIVOT: uncertain and lookahead <= LOW,
    }
    return [regime for regime, true in holds.items() if true] or [Regime.MID]


@given(st.lists(st.tuples(ENTROPIES, ENTROPIES), min_size=1, max_size=50))
def test_exactly_one_regime_and_the_defined_one(pairs):
    entropy, lookahead = torch.tensor(pairs, dtype=torch.float64).T
    codes = token_regimes(entropy, lookahead)
    assert codes.dtype == torch.int64
    assert [[Regime(code)] for code in codes.tolist()] == [definition(*pair) for pair in pairs]
    shares = regime_shares(codes)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["pivot"] == pytest.approx(codes.tolist().count(Regime.PIVOT) / len(pairs))


def test_thresholds_belong_to_the_outer_regimes():
    codes = token_regimes(torch.tensor([0.25, 0.5, 0.5, 0.5]), torch.tensor([0.0, 0.5, 0.25, 0.375]), 0.25, 0.5)
    assert codes.tolist() == [Regime.LOCK, Regime.FORK, Regime.PIVOT, Regime.MID]


def test_masked_tokens_count_nowhere():
    entropy = torch.tensor([[0.0, 0.5], [0.5, 0.5]])
    codes = token_regimes(entropy, entropy, mask=torch.tensor([[1, 1], [0, 0]]))
    assert codes.tolist() == [[Regime.LOCK, Regime.FORK], [Regime.PADDING, Regime.PADDING]]
    assert regime_shares(codes) == {"lock": 0.5, "fork": 0.5, "pivot": 0.0, "mid": 0.0}


def test_no_valid_token():
    nothing = torch.zeros(0)
    assert set(regime_shares(token_regimes(nothing, nothing)).values()) == {0.0}


def test_bad_input_names_the_argument():
    entropy = torch.zeros(3)
    with pytest.raises(ValueError, match=r"^normalised_lookahead_entropy"):
        token_regimes(entropy, torch.zeros(2))
    with pytest.raises(ValueError, match=r"^mask"):
        token_regimes(entropy, entropy, mask=torch.ones(2))
    with pytest.raises(ValueError, match=r"^tau_low"):
        token_regimes(entropy, entropy, tau_low=0.2, tau_high=0.2)
