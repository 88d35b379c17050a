"""A separate model as the teacher: what is refused, how it is loaded and known again, and what it teaches."""

import contextlib
import copy
import logging

import pytest

pytest.importorskip("trl")

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from egrsd_kernels import token_statistics, with_head
from egrsd_kernels.trl import EGRSDTrainer
from egrsd_kernels.trl.errors import CheckpointError
from egrsd_kernels.trl.teacher import EarlierWeights, SeparateModel, Teacher, prove_teacher, separate_teacher
from tests.support.devices import two_gpus
from tests.support.trl_tiny import make, tiny_model, tokenizer, weights

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
    prove_teacher(teacher.model, SIZE)


def test_a_name_is_loaded_as_it_is_stored(tmp_path):
    name = saved(tmp_path, larger().to(torch.bfloat16), tokenizer())
    assert teacher_of(name).model.dtype == torch.bfloat16
    assert teacher_of(tmp_path, init_kwargs={"dtype": "float32"}).model.dtype == torch.float32
    placed = teacher_of(name, init_kwargs={"device_map": {"": "cpu"}})
    prove_teacher(placed.model, SIZE)
    assert placed.model.device == CPU
    given = larger()
    assert refusal(given, init_kwargs={"dtype": "float32"}) == (
        "teacher_model_init_kwargs: expected None, as teacher_model is already a model, got {'dtype': 'float32'}"
    )
    assert refusal(given, revision="main").startswith("teacher_model_revision: expected None, as teacher_model is ")


@pytest.mark.heavy
@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_a_device_map_may_spread_it(tmp_path, where):
    layers = {f"model.layers.{index}": where for index in range(3)}
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    options = {"device_map": rest | layers, "offload_folder": str(tmp_path / "offloaded")}
    teacher = teacher_of(saved(tmp_path / "model", larger(), tokenizer()), init_kwargs=options)
    assert any(weight.is_meta for weight in teacher.model.parameters()) == (where == "disk")
    prove_teacher(teacher.model, SIZE)
    ids = torch.randint(6, SIZE, (1, 12))
    with torch.no_grad(), teacher.active() as model:
        found, _ = with_head(model, lambda *read: token_statistics(*read, ids.roll(-1, 1)), input_ids=ids)
        logp = larger().eval()(ids).logits.log_softmax(-1).gather(-1, ids.roll(-1, 1)[..., None])[..., 0]
    torch.testing.assert_close(found.logp, logp, rtol=1e-4, atol=1e-4)
    assert len(teacher.digest) == 64


def test_what_is_no_model_of_its_own_is_refused():
    message = "teacher_model: expected a model that reads images, as the student does, got one that does not"
    assert refusal(larger(), images=True) == message
    assert refusal(7) == "teacher_model: expected a model, the name or path of one, or a Teacher, got 7"
    student = tiny_model()
    assert refusal(student, student=student).startswith(
        "teacher_model: expected a model of its own, got one that shares weights with the student; "
    )


def test_another_number_of_logits_is_refused():
    teacher = teacher_of(larger(vocabulary=SIZE + 3))
    with pytest.raises(ValueError) as caught:
        prove_teacher(teacher.model, SIZE)
    assert str(caught.value) == (
        "teacher_model: expected 76 logits, as the student has, got 79; where the difference is padding, load it "
        "yourself and call resize_token_embeddings(76)"
    )
    teacher.model.resize_token_embeddings(SIZE)
    prove_teacher(teacher.model, SIZE)


class Shifted(Qwen3ForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.arange(output.logits.shape[-1])
        return output


def test_a_head_that_does_more_is_refused():
    with pytest.raises(ValueError, match=r"^teacher_model: Shifted: ") as caught:
        prove_teacher(Shifted(larger().config), SIZE)
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


# -------------------------------------------------------------------------------------------------------- the trainer


@pytest.mark.heavy
@pytest.mark.parametrize("peft, dtype", [(True, torch.float32), (False, torch.bfloat16)])
def test_it_teaches(tmp_path, peft, dtype):
    """Its log p and entropy against its own full logits, a row at a time, without padding; and it stays as it was."""
    run, logs = make(tmp_path, peft=peft, teacher_model=larger().to(dtype).train(), temperature=0.8)
    examples = {f"<user>{e['prompt'][0]['content']}<end><assistant>": e for e in run.train_dataset}
    calls, compute = [], run._compute_loss
    run._compute_loss = lambda model, inputs: calls.append(dict(inputs)) or compute(model, inputs)
    before = {key: value.clone() for key, value in run.teacher.model.state_dict().items()}
    run.train()
    teacher = run.teacher.model
    assert not teacher.training and all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    plain = larger().to(dtype).float().eval()
    # In bfloat16 each of some 16 sums on the way moves a logit of below 8 by 8 · 2^-9, and log p twice as far.
    off = 1e-4 if dtype == torch.float32 else 0.5
    for inputs in calls:
        mask = inputs["completion_mask"].bool()
        for index, (ids, attended) in enumerate(zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)):
            messages = run.teacher_prompt(examples[tokenizer().decode(ids[attended.bool()])])
            words = tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
            completion = inputs["completion_ids"][index][mask[index]]
            with torch.no_grad():
                logits = plain(torch.tensor([[*words, *completion.tolist()]])).logits[0, -len(completion) - 1 : -1]
            logp = (logits / 0.8).log_softmax(-1)
            want = logp.gather(-1, completion[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
            for name, expected in zip(("teacher_logp", "teacher_entropy"), want, strict=True):
                torch.testing.assert_close(inputs[name][index][mask[index]].float(), expected, rtol=off, atol=off)
    assert len(calls) == 4 and logs.steps[0]["abs_log_ratio/mean"] > 0.1


class OnOneGPU(EGRSDTrainer):
    """Without torch's DataParallel, which Trainer takes for a second GPU in one process."""

    def __init__(self, *, args, **options):
        assert args.device.type == "cuda"
        args._n_gpu = 1
        super().__init__(args=args, **options)


@pytest.mark.cuda
@two_gpus
@pytest.mark.parametrize("layers_on", [[1, 1, 1], [0, 1, 1]])
def test_it_teaches_from_another_gpu(tmp_path, layers_on):
    """A device_map places it, whole or in parts; the student trains on the first GPU as beside a teacher there."""
    name = saved(tmp_path / "teacher", larger(), tokenizer())
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), 1)
    spread = {f"model.layers.{index}": gpu for index, gpu in enumerate(layers_on)} | rest
    seen = []
    for places in (None, spread):
        options = {"use_cpu": False, "max_steps": 1, "teacher_model_init_kwargs": {"device_map": places}}
        run, logs = make(tmp_path / str(places is None), cls=OnOneGPU, teacher_model_name_or_path=name, **options)
        calls, compute = [], run._compute_loss
        run._compute_loss = lambda model, inputs, calls=calls, compute=compute: (
            calls.append(dict(inputs)) or compute(model, inputs)
        )
        run.train()
        devices = {weight.device.index for weight in run.teacher.model.parameters()}
        assert devices == ({0} if places is None else {1, *layers_on})
        seen.append((calls, logs.steps[0]["loss"], weights(run)))
    (here, loss, trained), (there, other_loss, others) = seen
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one["completion_ids"], other["completion_ids"])
        for key in ("teacher_logp", "teacher_entropy"):
            assert one[key].device.index == other[key].device.index == 0
            torch.testing.assert_close(one[key], other[key], rtol=1e-5, atol=1e-5)
    assert other_loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
    for key, value in trained.items():
        torch.testing.assert_close(others[key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_no_checkpoint_holds_it_and_a_run_goes_on_beside_it(tmp_path):
    name = saved(tmp_path / "teacher", larger(), tokenizer())
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "peft": False}
    options |= {"teacher_model_name_or_path": name, "teacher_model_init_kwargs": {"dtype": "float32"}}
    straight, _ = make(tmp_path / "run", **options)
    straight.train()
    held = torch.load(tmp_path / "run" / "checkpoint-1" / "egrsd_state_0.pt", weights_only=True)["teacher"]
    assert list(held) == ["teacher_model"] and isinstance(held["teacher_model"], str)
    (tmp_path / "teacher").rename(tmp_path / "moved")
    resumed, _ = make(tmp_path / "run", **options | {"teacher_model_name_or_path": str(tmp_path / "moved")})
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert all(torch.equal(value, weights(resumed)[key]) for key, value in weights(straight).items())
    options = {key: value for key, value in options.items() if not key.startswith("teacher_model")}
    other, _ = make(tmp_path / "run", teacher_model=larger(seed=8), **options)
    with pytest.raises(CheckpointError, match=r"^teacher_model: not the one that this run began with$"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def recurrent():
    """A sum over all that went before, padding included."""
    model = larger()
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: output + (output + 0.1).cumsum(1) / 8)
    return model


@pytest.mark.parametrize(
    "options, says",
    [
        (
            {"teacher_model": larger, "teacher_model_kind": "ema"},
            "teacher_model_kind: expected 'base' beside a teacher",
        ),
        (
            {"teacher_model": larger, "teacher_model_name_or_path": "a"},
            "teacher_model_name_or_path: expected None beside the trainer's teacher_model, got 'a'",
        ),
        ({"teacher_model_revision": "a"}, "teacher_model_revision: expected None without a teacher_model_name_or_path"),
        (
            {"teacher_model": larger, "token_advantage": "grpo", "gamma": None, "lookahead": None},
            "teacher_model: expected None, as no context is read by a teacher",
        ),
        (
            {"teacher_model": lambda: larger(vocabulary=80)},
            "teacher_model: expected 76 logits, as the student has, got",
        ),
        ({"teacher_model": recurrent}, "teacher_model: reads a padded row differently from the same row alone"),
        (
            {"teacher_model": lambda: larger(max_position_embeddings=60)},
            "train_dataset, row 0: the teacher's prompt has ",
        ),
    ],
)
def test_what_cannot_teach_is_refused(tmp_path, options, says):
    model = {"teacher_model": options["teacher_model"]()} if "teacher_model" in options else {}
    with pytest.raises(ValueError) as caught:
        make(tmp_path, **options | model)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


class Mine:
    """A teacher by the protocol: a model that is made elsewhere, and how often it was asked."""

    def __init__(self, model):
        self.model, self.asked = model, 0

    @contextlib.contextmanager
    def active(self):
        self.asked += 1
        yield self.model

    def state_dict(self):
        return {"asked": self.asked}

    def load_state_dict(self, state):
        self.asked = state["asked"]


@pytest.mark.slow
def test_a_teacher_of_ones_own_is_what_its_model_is(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    plain, _ = make(tmp_path / "a", teacher_model=larger(), **options)
    plain.train()
    teacher = Mine(larger(attention_dropout=0.5).train())
    assert isinstance(teacher, Teacher)
    run, _ = make(tmp_path / "b", teacher_model=teacher, **options)
    asked = teacher.asked
    run.train()
    assert teacher.asked == asked + 2 and teacher.model.training  # once a generation; its mode is its own
    assert all(torch.equal(value, weights(run)[key]) for key, value in weights(plain).items())
    again = Mine(larger())
    resumed, _ = make(tmp_path / "b", teacher_model=again, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-1"))
    assert again.asked == teacher.asked
    assert all(torch.equal(value, weights(resumed)[key]) for key, value in weights(plain).items())


def test_what_a_teacher_of_ones_own_has_to_give(tmp_path):
    with pytest.raises(TypeError, match=r"^teacher_model: expected active\(\) to give a model, got None$"):
        make(tmp_path, teacher_model=Mine(None))
    with pytest.raises(ValueError, match=r"^teacher_model: expected 76 logits, as the student has, got 79"):
        make(tmp_path, teacher_model=Mine(larger(vocabulary=SIZE + 3)))
    model = tiny_model()
    with pytest.raises(
        ValueError, match=r"^teacher_model: expected earlier weights of all that is trained, got others"
    ):
        make(tmp_path, model=model, teacher_model=EarlierWeights(model, moves=True))  # adapters come on top
    assert refusal(Mine(larger()), sharded=True) == (
        "teacher_model: a Teacher of one's own is not supported with sharded weights; pass a model"
    )
