import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from egrsd_kernels.rl import length_shaped_reward


def test_worked_example():
    rewards = length_shaped_reward(torch.tensor([True, True, True, False]), torch.tensor([0, 50, 100, 10]), 100)
    assert rewards.dtype == torch.float32
    assert rewards.tolist() == [1.5, 1.25, 1.0, 0.0]


def test_beta_zero_is_the_bare_reward():
    correct = torch.tensor([1, 0, 1])
    assert length_shaped_reward(correct, torch.tensor([3, 4, 5]), 8, beta=0.0).tolist() == [1.0, 0.0, 1.0]


@given(st.integers(1, 2000), st.floats(0.01, 2.0), st.data())
def test_correct_beats_wrong_and_short_beats_long(max_length, beta, data):
    short, long = sorted(data.draw(st.tuples(st.integers(0, max_length), st.integers(0, max_length))))
    correct = torch.tensor([True, True, False])
    first, second, wrong = length_shaped_reward(correct, torch.tensor([short, long, short]), max_length, beta).tolist()
    assert wrong == 0.0
    assert 1.0 <= second <= first <= 1.0 + beta + 1e-6
    assert (first > second) == (long > short)


@pytest.mark.parametrize(
    "error, name, arguments",
    [
        (TypeError, "correct", ([True], torch.tensor([1]), 4)),
        (TypeError, "lengths", (torch.tensor([True]), [1], 4)),
        (ValueError, "lengths", (torch.tensor([True]), torch.tensor([1, 2]), 4)),
        (ValueError, "lengths", (torch.tensor([True]), torch.tensor([5]), 4)),
        (ValueError, "lengths", (torch.tensor([True]), torch.tensor([-1]), 4)),
        (ValueError, "correct", (torch.tensor([0.5]), torch.tensor([1]), 4)),
        (ValueError, "correct", (torch.tensor([float("nan")]), torch.tensor([1]), 4)),
        (ValueError, "max_length", (torch.tensor([True]), torch.tensor([0]), 0)),
        (ValueError, "beta", (torch.tensor([True]), torch.tensor([1]), 4, -0.1)),
        (ValueError, "beta: .*got nan", (torch.tensor([True]), torch.tensor([1]), 4, float("nan"))),
        (TypeError, "beta: .*got '0.5'", (torch.tensor([True]), torch.tensor([1]), 4, "0.5")),
        (ValueError, "max_length: .*got inf", (torch.tensor([True]), torch.tensor([1]), float("inf"))),
        (TypeError, "max_length: .*got None", (torch.tensor([True]), torch.tensor([1]), None)),
        (TypeError, "max_length: .*got True", (torch.tensor([True]), torch.tensor([1]), True)),
        (ValueError, "correct: .*0 for an answer that cannot be verified", (torch.tensor([2]), torch.tensor([1]), 4)),
        (TypeError, "correct: .*torch.complex64", (torch.ones(1, dtype=torch.complex64), torch.tensor([1]), 4)),
        (TypeError, "lengths: .*torch.complex64", (torch.tensor([1]), torch.ones(1, dtype=torch.complex64), 4)),
        (TypeError, "correct: expected a dense", (torch.ones(1).to_sparse(), torch.tensor([1]), 4)),
        (ValueError, "correct: .*on meta", (torch.ones(1, device="meta"), torch.tensor([1]), 4)),
        (ValueError, "lengths: .*got nan", (torch.tensor([1]), torch.tensor([float("nan")]), 4)),
    ],
)
def test_bad_input_names_the_argument(error, name, arguments):
    with pytest.raises(error, match=f"^{name}"):
        length_shaped_reward(*arguments)
