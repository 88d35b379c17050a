import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from egrsd_kernels.rl import WelfordAdvantage

REWARDS = st.lists(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=7), min_size=2, max_size=25)


@given(REWARDS, st.integers(1, 12))
def test_whitens_with_the_history_before_the_step(batches, warmup_steps):
    advantage = WelfordAdvantage(warmup_steps=warmup_steps)
    history = np.array([])
    for step, batch in enumerate(batches):
        got = advantage(torch.tensor(batch))
        if step < warmup_steps:
            expected = np.array(batch) - 0.5
        else:
            std = history.std()
            expected = (np.array(batch) - history.mean()) / (std if std > 1e-6 else 1.0)
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-4)
        history = np.concatenate([history, batch])
    assert advantage.count == len(history)
    np.testing.assert_allclose([advantage.mean, advantage.std], [history.mean(), history.std()], rtol=1e-9, atol=1e-9)


def test_ten_warmup_steps_by_default():
    advantage = WelfordAdvantage()
    for _ in range(10):
        assert advantage(torch.tensor([0.0, 1.0])).tolist() == [-0.5, 0.5]
    assert advantage(torch.tensor([0.0, 1.0, 2.0])).tolist() == [-1.0, 1.0, 3.0]  # r̄ = σ = 1/2


def test_large_offset_keeps_its_precision():
    # Σr² − (Σr)²/n would keep no digit of this variance.
    offset = 2.0**30
    advantage = WelfordAdvantage(warmup_steps=1)
    for _ in range(1000):
        advantage(torch.tensor([offset - 1, offset + 1], dtype=torch.float64))
    assert advantage.mean == offset
    assert advantage.std == 1.0


def test_equal_rewards_give_no_division_by_zero():
    advantage = WelfordAdvantage(warmup_steps=1)
    advantage(torch.zeros(8))
    assert advantage(torch.zeros(4)).tolist() == [0.0] * 4
    assert advantage(torch.tensor([1.0, 0.0])).tolist() == [1.0, 0.0]  # centred alone: no scale is known yet
    assert torch.isfinite(advantage(torch.ones(3))).all()


@given(REWARDS, st.integers(0, 24))
def test_resumes_exactly_through_json(batches, cut):
    whole, first, second = (WelfordAdvantage(warmup_steps=3) for _ in range(3))
    for batch in batches[:cut]:
        whole(torch.tensor(batch))
        first(torch.tensor(batch))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for batch in batches[cut:]:
        assert torch.equal(whole(torch.tensor(batch)), second(torch.tensor(batch)))
    assert whole.state_dict() == second.state_dict()


@pytest.mark.parametrize(
    "error, rewards",
    [
        (TypeError, [1.0]),
        (ValueError, torch.zeros(2, 2)),
        (ValueError, torch.zeros(0)),
        (ValueError, torch.tensor([1.0, float("nan")])),
        (ValueError, torch.tensor([float("inf")])),
        (ValueError, torch.tensor([0.0, 1e200], dtype=torch.float64)),  # its square is infinite
        (TypeError, torch.ones(2, dtype=torch.complex64)),
    ],
)
def test_bad_rewards_leave_the_statistics_alone(error, rewards):
    advantage = WelfordAdvantage()
    advantage(torch.tensor([1.0, 0.0]))
    before = advantage.state_dict()
    with pytest.raises(error, match=r"^rewards"):
        advantage(rewards)
    assert advantage.state_dict() == before


def test_bad_settings():
    with pytest.raises(ValueError, match=r"^warmup_steps"):
        WelfordAdvantage(warmup_steps=0)
    with pytest.raises(ValueError, match=r"^min_std"):
        WelfordAdvantage(min_std=-1.0)
    with pytest.raises(ValueError, match=r"^state"):
        WelfordAdvantage().load_state_dict({"mean": 0.0})
    with pytest.raises(ValueError, match=r"^min_std"):
        WelfordAdvantage(min_std=float("nan"))
    with pytest.raises(ValueError, match=r"^warmup_baseline"):
        WelfordAdvantage(warmup_baseline=float("nan"))


@given(REWARDS, st.data())
def test_what_is_not_judged_is_as_if_it_were_not_there(batches, data):
    whole, judged_only = WelfordAdvantage(warmup_steps=3), WelfordAdvantage(warmup_steps=3)
    for batch in batches:
        judged = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(batch), max_size=len(batch))))
        unknown = data.draw(st.sampled_from([float("nan"), float("inf"), 5.0]))
        rewards = torch.tensor(batch)
        got = whole(rewards.masked_fill(~judged, unknown), judged)
        assert got.dtype == torch.float32 and got.shape == rewards.shape
        assert not got[~judged].any()
        if judged.any():
            assert torch.equal(got[judged], judged_only(rewards[judged]))
        assert whole.state_dict() == judged_only.state_dict()


@pytest.mark.parametrize(
    "error, judged",
    [(TypeError, [True, False]), (TypeError, torch.ones(2)), (ValueError, torch.ones(3, dtype=torch.bool))],
)
def test_bad_masks(error, judged):
    advantage = WelfordAdvantage()
    with pytest.raises(error, match=r"^judged: expected "):
        advantage(torch.zeros(2), judged)
    assert advantage.steps == 0
    with pytest.raises(ValueError, match=r"^rewards: expected finite values .*\(see judged for one not known\)"):
        advantage(torch.tensor([1.0, float("nan")]), torch.tensor([True, True]))
