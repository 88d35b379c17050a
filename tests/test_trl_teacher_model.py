"""A separate model as the teacher: what is refused, how it is loaded and known again, and what it teaches."""

import copy
import logging

import pytest

pytest.importorskip("trl")

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from egrsd_kernels.trl.errors import CheckpointError
from egrsd_kernels.trl.teacher import EarlierWeights, SeparateModel, separate_teacher
from tests.support.trl_tiny import tiny_model, tokenizer

CPU = torch.device("cpu")
SIZE = len(tokenizer())


def larger(seed=7, vocabulary=None, **options) -> Qwen3ForCausalLM:
    """Deeper and wider than the student, of the same vocabulary."""
    config = tiny_model().config.to_dict() | {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "layer_types": None,
        "vocab_size": vocabulary or SIZE,
        "tie_word_embeddings": True,
        **options,
    }
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**config))


def saved(folder, model, with_tokenizer=None) -> str:
    model.save_pretrained(folder)
    if with_tokenizer is not None:
        with_tokenizer.save_pretrained(folder)
    return str(folder)


def teacher_of(model, student=None, **options) -> SeparateModel:
    return separate_teacher(model, student or tiny_model(), tokenizer(), CPU, **options)


def refusal(model, **options) -> str:
    with pytest.raises((TypeError, ValueError)) as caught:
        teacher_of(model, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_it_is_never_trained_and_reads_without_dropout():
    teacher = teacher_of(larger(attention_dropout=0.5).train())
    assert not any(weight.requires_grad for weight in teacher.model.parameters())
    with teacher.active() as model:
        assert model is teacher.model and not model.training
    teacher.prove(SIZE)


def test_a_name_is_loaded_as_it_is_stored(tmp_path):
    name = saved(tmp_path, larger().to(torch.bfloat16), tokenizer())
    assert teacher_of(name).model.dtype == torch.bfloat16
    assert teacher_of(tmp_path, init_kwargs={"dtype": "float32"}).model.dtype == torch.float32
    given = larger()
    assert refusal(given, init_kwargs={"dtype": "float32"}) == (
        "teacher_model_init_kwargs: expected None, as teacher_model is already a model, got {'dtype': 'float32'}"
    )
    assert refusal(given, revision="main").startswith("teacher_model_revision: expected None, as teacher_model is ")


def test_what_is_no_model_of_its_own_is_refused():
    assert refusal(7) == "teacher_model: expected a model, or the name or path of one, got 7"
    student = tiny_model()
    assert refusal(student, student=student).startswith(
        "teacher_model: expected a model of its own, got one that shares weights with the student; "
    )


def test_another_number_of_logits_is_refused():
    teacher = teacher_of(larger(vocabulary=SIZE + 3))
    with pytest.raises(ValueError) as caught:
        teacher.prove(SIZE)
    assert str(caught.value) == (
        "teacher_model: expected 76 logits, as the student has, got 79; where the difference is padding, load it "
        "yourself and call resize_token_embeddings(76)"
    )
    teacher.model.resize_token_embeddings(SIZE)
    teacher.prove(SIZE)


class Shifted(Qwen3ForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.arange(output.logits.shape[-1])
        return output


def test_a_head_that_does_more_is_refused():
    with pytest.raises(ValueError, match=r"^teacher_model: Shifted: ") as caught:
        teacher_of(Shifted(larger().config)).prove(SIZE)
    assert "\n" not in str(caught.value)


def test_another_tokenizer_is_refused(tmp_path, caplog):
    other = copy.deepcopy(tokenizer())
    other.add_tokens(["<more>"])
    name = saved(tmp_path / "other", larger(), other)
    assert refusal(name) == (
        "teacher_model: expected the student's tokenizer, got one where id 76 is another: '<more>' is in the teacher's"
    )
    with caplog.at_level(logging.WARNING):
        teacher_of(saved(tmp_path / "same", larger(), tokenizer()))
        assert not caplog.records
        teacher_of(larger())
    (record,) = caplog.records
    assert record.message == (
        "teacher_model: that its tokenizer is the student's is not checked, as none was found: the model has no name"
    )


def test_a_resumed_run_knows_it_again():
    teacher = teacher_of(larger())
    state = teacher.state_dict()
    assert list(state) == ["teacher_model"] and len(state["teacher_model"]) == 64
    teacher_of(larger()).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"^teacher_model: not the one that this run began with$"):
        teacher_of(larger(seed=8)).load_state_dict(state)
    frozen = EarlierWeights(tiny_model(), moves=False)
    for one, state in ((teacher, frozen.state_dict()), (frozen, teacher.state_dict()), (teacher, {})):
        with pytest.raises(CheckpointError, match=r"^teacher_model_kind: the checkpoint was written with another kind"):
            one.load_state_dict(state)
