import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from egrsd_kernels.credit import Regime, regime_shares, token_regimes

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


def test_a_nan_of_a_run_that_diverged_is_mid():
    entropy = torch.tensor([float("nan"), 0.0])
    assert token_regimes(entropy, entropy).tolist() == [Regime.MID, Regime.LOCK]


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"normalised_entropy": [0.0]}, TypeError, r"normalised_entropy: expected a tensor, got \[0.0\]"),
        (
            {"normalised_entropy": torch.zeros(3, dtype=torch.complex64)},
            TypeError,
            "normalised_entropy: expected .*real",
        ),
        ({"normalised_lookahead_entropy": "low"}, TypeError, "normalised_lookahead_entropy: .*, got 'low'"),
        ({"normalised_lookahead_entropy": torch.zeros(3, device="meta")}, ValueError, "normalised_look.* on meta"),
        ({"mask": [1, 1, 0]}, TypeError, r"mask: expected a tensor, got \[1, 1, 0\]"),
        ({"mask": torch.tensor([0, 1, 2])}, ValueError, "mask: expected only 0 and 1"),
        ({"tau_low": "low"}, TypeError, "tau_low: expected a number, got 'low'"),
        ({"tau_low": float("nan")}, ValueError, "tau_low: expected a finite number, got nan"),
        ({"tau_high": True}, TypeError, "tau_high: expected a number, got True"),
    ],
)
def test_what_is_no_entropy_mask_or_threshold(changes, error, message):
    arguments = {"normalised_entropy": torch.zeros(3), "normalised_lookahead_entropy": torch.zeros(3)}
    with pytest.raises(error, match=f"^{message}"):
        token_regimes(**arguments | changes)


def test_what_is_no_regime():
    assert regime_shares(torch.tensor([-1, 0, 3], dtype=torch.int8))["mid"] == 0.5
    with pytest.raises(TypeError, match=r"^codes: expected a tensor, got \[0\]"):
        regime_shares([0])
    with pytest.raises(TypeError, match=r"^codes: expected an integer tensor.*, got a torch.float32"):
        regime_shares(torch.zeros(2))
    with pytest.raises(ValueError, match=r"^codes: expected codes of -1 to 3, got 4 in"):
        regime_shares(torch.tensor([0, 4]))


def test_bad_input_names_the_argument():
    entropy = torch.zeros(3)
    with pytest.raises(ValueError, match=r"^normalised_lookahead_entropy"):
        token_regimes(entropy, torch.zeros(2))
    with pytest.raises(ValueError, match=r"^mask"):
        token_regimes(entropy, entropy, mask=torch.ones(2))
    with pytest.raises(ValueError, match=r"^tau_low"):
        token_regimes(entropy, entropy, tau_low=0.2, tau_high=0.2)
