import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from egrsd_kernels.rl import (
    TWO_TURN,
    align_responses,
    pad_inputs,
    response_hidden,
    response_positions,
    teacher_messages,
)

PAD = 0
IDS = st.integers(1, 99)
ROLLOUTS = st.lists(
    st.tuples(
        st.lists(IDS, min_size=1, max_size=6),  # prompt
        st.lists(IDS, min_size=1, max_size=9),  # teacher prompt
        st.lists(IDS, min_size=0, max_size=7),  # response
    ),
    min_size=1,
    max_size=5,
)


def fake_hidden(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, L, 2): the token read at each position and, as a model that has learned by heart, the token after it."""
    ids, attended = inputs["input_ids"], inputs["attention_mask"].bool()
    hidden = torch.full((*ids.shape, 2), -1.0)
    for row in range(len(ids)):
        real = ids[row, attended[row]].float()
        hidden[row, attended[row], 0] = real
        hidden[row, attended[row].nonzero()[:-1, 0], 1] = real[1:]
    return hidden


@given(ROLLOUTS, st.sampled_from(["left", "right"]))
def test_both_models_predict_the_same_response_token(rollouts, side):
    prompts, teacher_prompts, responses = (list(column) for column in zip(*rollouts, strict=True))
    batch = align_responses(prompts, teacher_prompts, responses, PAD, side)
    student = response_hidden(fake_hidden(batch.student), batch.student_positions)
    teacher = response_hidden(fake_hidden(batch.teacher), batch.teacher_positions)

    assert batch.mask.sum(1).tolist() == [len(response) for response in responses]
    assert (batch.target_ids[~batch.mask] == -100).all()
    for row, (prompt, teacher_prompt, response) in enumerate(rollouts):
        valid = batch.mask[row]
        assert batch.target_ids[row, valid].tolist() == response
        assert student[row, valid, 1].tolist() == teacher[row, valid, 1].tolist() == response
        # What stands just before is the end of the own prompt, then the response itself.
        assert student[row, valid, 0].tolist() == [prompt[-1], *response][: len(response)]
        assert teacher[row, valid, 0].tolist() == [teacher_prompt[-1], *response][: len(response)]


@given(ROLLOUTS)
def test_positions_follow_attention_through_any_padding(rollouts):
    """Prompts padded left and completions padded right, as generation leaves them, with padding between the two."""
    prompts, _, responses = (list(column) for column in zip(*rollouts, strict=True))
    left, right = pad_inputs(prompts, PAD, "left"), pad_inputs([[*r, 7] for r in responses], PAD, "right")
    right["attention_mask"][right["position_ids"] >= torch.tensor([len(r) for r in responses])[:, None]] = 0
    gap = torch.zeros(len(prompts), 2, dtype=torch.int64)
    inputs = {
        key: torch.cat([left[key], gap + filler, right[key]], dim=1)
        for key, filler in (("input_ids", 55), ("attention_mask", 0))
    }
    lengths = torch.tensor([len(response) for response in responses])
    positions = response_positions(inputs["attention_mask"], lengths)
    picked = response_hidden(fake_hidden(inputs), positions)
    for row, response in enumerate(responses):
        assert picked[row, : len(response), 1].tolist() == response

    wide = response_positions(inputs["attention_mask"], lengths, width=20)
    assert wide.shape == (len(rollouts), 20)
    assert torch.equal(wide[:, : positions.shape[1]], positions)
    assert wide.min() >= 0 and wide.max() < inputs["input_ids"].shape[1]


def test_gradient_reaches_the_predicting_positions_alone():
    batch = align_responses([[1, 2], [3]], [[1, 2, 9], [3, 9]], [[4, 5], [6, 7]], PAD)
    hidden = torch.randn(2, 4, 3, requires_grad=True)
    response_hidden(hidden, batch.student_positions).sum().backward()
    assert hidden.grad[..., 0].tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_inputs_of_a_model(side):
    inputs = pad_inputs([[5, 6, 7], [8]], PAD, side)
    row = {"left": [PAD, PAD, 8], "right": [8, PAD, PAD]}[side]
    assert inputs["input_ids"].tolist() == [[5, 6, 7], row]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [int(token != PAD) for token in row]]
    assert inputs["position_ids"][0].tolist() == [0, 1, 2]
    assert inputs["position_ids"][1, row.index(8)] == 0


def test_batch_moves_as_a_whole():
    moved = align_responses([[1]], [[1, 2]], [[3]], PAD).to("meta")
    tensors = [*moved.student.values(), *moved.teacher.values(), moved.student_positions, moved.target_ids, moved.mask]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_padding_side_changes_no_hidden_state_of_a_real_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=PAD, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.Qwen3Model(config).eval()
    rollouts = [[1, 2, 3], [4]], [[1, 2, 3, 9, 9], [4, 9]], [[5, 6], [7, 8, 5]]
    left, right = (align_responses(*rollouts, PAD, side) for side in ("left", "right"))
    with torch.no_grad():
        for name in ("student", "teacher"):
            one, other = (
                response_hidden(
                    model(**getattr(batch, name)).last_hidden_state, getattr(batch, f"{name}_positions")
                )[batch.mask]
                for batch in (left, right)
            )  # fmt: skip
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_teacher_reads_prompt_then_solution_then_the_second_turn():
    messages = teacher_messages("What is 1+1?", "1+1=2")
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert [message["content"] for message in messages[:2]] == ["What is 1+1?", "1+1=2"]
    assert messages[2] == TWO_TURN[1]


def test_template_and_conversation_can_be_given():
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x?"}]
    template = [{"role": "user", "content": r"Hint: \frac{1}{2} {solution}"}]
    messages = teacher_messages(conversation, r"\boxed{3} {solution}", template)
    assert messages == [*conversation, {"role": "user", "content": r"Hint: \frac{1}{2} \boxed{3} {solution}"}]
    assert messages[0] is not conversation[0]


@pytest.mark.parametrize(
    "name, call",
    [
        ("template", lambda: teacher_messages("x", "s", [{"role": "user", "content": "again"}])),
        ("student_prompts", lambda: align_responses([[]], [[1]], [[2]], PAD)),
        ("teacher_prompts", lambda: align_responses([[1]], [[]], [[2]], PAD)),
        ("responses", lambda: align_responses([], [], [], PAD)),
        ("expected as many", lambda: align_responses([[1]], [[1], [2]], [[2]], PAD)),
        ("padding_side", lambda: pad_inputs([[1]], PAD, "middle")),
        ("response_lengths", lambda: response_positions(torch.ones(1, 3), torch.tensor([3]))),
        ("expected hidden", lambda: response_hidden(torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64))),
    ],
)
def test_bad_input_says_what(name, call):
    with pytest.raises(ValueError, match=f"^{name}"):
        call()


def align(**changes):
    arguments = {"student_prompts": [[1]], "teacher_prompts": [[1, 2]], "responses": [[3]], "pad_token_id": PAD}
    return align_responses(**arguments | changes)


@pytest.mark.parametrize(
    "ids",
    [
        [(3,)], torch.tensor([[3]]), [torch.tensor([3], dtype=torch.int32)], [[torch.tensor(3)]], [range(3, 4)],
    ],
)  # fmt: skip
def test_what_holds_token_ids(ids):
    assert align(responses=ids).target_ids.tolist() == [[3]]


def test_arrays_hold_token_ids():
    numpy = pytest.importorskip("numpy")
    for ids in (numpy.array([[3]]), [numpy.array([3], dtype=numpy.uint8)], [[numpy.int64(3)]]):
        assert align(responses=ids).target_ids.tolist() == [[3]]
    assert align(responses=[numpy.array([])]).target_ids.shape == (1, 0)
    for ids in (numpy.array([[3.0]]), [numpy.array([True])], [[numpy.float32(3)]]):
        with pytest.raises(
            TypeError, match=r"^responses: expected token ids, integers of at least 0, in sequence 0, got"
        ):
            align(responses=ids)


@pytest.mark.parametrize("name", ["student_prompts", "teacher_prompts", "responses"])
@pytest.mark.parametrize(
    "ids, error, got",
    [
        ([[1.5]], TypeError, "1.5"),
        ([[2.0]], TypeError, "2.0"),
        ([[True]], TypeError, "True"),
        ([[None]], TypeError, "None"),
        ([["1"]], TypeError, "'1'"),
        (["text"], TypeError, "'text'"),
        ([b"text"], TypeError, "b'text'"),
        ([3], TypeError, "3"),
        ([[[3]]], TypeError, r"\[3\]"),
        ([{"input_ids": [3]}], TypeError, "{'input_ids'"),
        ("text", TypeError, "'text'"),
        (None, TypeError, "None"),
        (3, TypeError, "3"),
        (torch.tensor([[3.0]]), TypeError, "3.0"),
        (torch.ones(1, 1, dtype=torch.complex64), TypeError, r"\(1\+0j\)"),
        (torch.ones(1, 1, dtype=torch.int64).to_sparse(), TypeError, "a torch.sparse_coo"),
        ([[-1]], ValueError, "-1"),
        ([[2**63]], ValueError, f"{2**63}"),
        (torch.ones(1, 1, device="meta"), ValueError, "a torch.float32 tensor .* on meta"),
        ([[torch.ones((), device="meta")]], ValueError, "a torch.float32 tensor .* on meta"),
    ],
)
def test_what_is_no_token_id(name, ids, error, got):
    with pytest.raises(error, match=rf"^{name}: expected .*, got {got}"):
        align(**{name: ids})
    if name == "responses":
        with pytest.raises(error, match=rf"^sequences: expected .*, got {got}"):
            pad_inputs(ids, PAD)


M, L = torch.ones(2, 3), torch.tensor([1, 2])
HIDDEN, POSITIONS = torch.zeros(2, 3, 4), torch.tensor([[0], [2]])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: align(pad_token_id=None), TypeError, "pad_token_id: expected an integer, got None"),
        (lambda: align(pad_token_id=1.0), TypeError, "pad_token_id: expected an integer, got 1.0"),
        (lambda: align(pad_token_id=-100), ValueError, "pad_token_id: expected at least 0, got -100"),
        (lambda: align(padding_side=["left"]), ValueError, "padding_side: expected 'left' or 'right'"),
        (lambda: pad_inputs([], PAD), ValueError, "sequences: expected at least one"),
        (lambda: response_positions([[1]], L), TypeError, "attention_mask: expected a tensor"),
        (lambda: response_positions(M[0], L), ValueError, r"attention_mask: expected shape \(B, L\)"),
        (lambda: response_positions(2 * M, L), ValueError, "attention_mask: expected only 0 and 1"),
        (lambda: response_positions(-M / 0, L), ValueError, "attention_mask: expected only 0 and 1"),
        (lambda: response_positions(M.to("meta"), L), ValueError, "attention_mask: .* on meta"),
        (lambda: response_positions(M, [1, 2]), TypeError, r"response_lengths: expected a tensor, got \[1, 2\]"),
        (lambda: response_positions(M, L.float()), TypeError, "response_lengths: expected an integer tensor"),
        (lambda: response_positions(M, L[:1]), ValueError, r"response_lengths: expected shape \(2,\)"),
        (lambda: response_positions(M, -L), ValueError, r"response_lengths: expected at least 0 .*got \[-1, -2\]"),
        (lambda: response_positions(M[:0], L[:0]), ValueError, "attention_mask: expected .*B > 0, or a width"),
        (lambda: response_positions(M, L, 1.5), TypeError, "width: expected an integer, got 1.5"),
        (lambda: response_positions(M, L, -1), ValueError, "width: expected at least 0, got -1"),
        (lambda: response_hidden("h", POSITIONS), TypeError, "hidden: expected a tensor, got 'h'"),
        (lambda: response_hidden(HIDDEN.long(), POSITIONS), TypeError, "hidden: expected a floating-point"),
        (lambda: response_hidden(HIDDEN.to_sparse(), POSITIONS), TypeError, "hidden: expected a dense tensor"),
        (lambda: response_hidden(HIDDEN, [[0], [1]]), TypeError, "positions: expected a tensor"),
        (lambda: response_hidden(HIDDEN, POSITIONS.float()), TypeError, "positions: expected an integer tensor"),
        (lambda: response_hidden(HIDDEN, POSITIONS + 1), ValueError, r"positions: expected .* in \[0, 3\), got 3"),
        (lambda: response_hidden(HIDDEN, POSITIONS - 1), ValueError, r"positions: expected .* in \[0, 3\), got -1"),
        (lambda: response_hidden(HIDDEN, POSITIONS.to("meta")), ValueError, "positions: .* on meta"),
    ],
)
def test_what_cannot_be_right_is_one_line(call, error, message):
    with pytest.raises(error, match=f"^{message}") as caught:
        call()
    assert "\n" not in str(caught.value)


def test_positions_of_every_integer_dtype():
    for dtype in (torch.int32, torch.uint8, torch.int16):
        positions = response_positions(M.bool(), L.to(dtype), 2)
        assert torch.equal(positions, response_positions(M, L))
        assert torch.equal(response_hidden(HIDDEN, positions.to(dtype)), response_hidden(HIDDEN, positions))
