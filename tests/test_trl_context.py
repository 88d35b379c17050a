"""What student and teacher read: rows that they could not read are refused before anything is generated."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

from datasets import IterableDataset
from transformers import BloomConfig, FalconConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, MambaConfig, Qwen3Config

from egrsd_kernels.trl import EGRSDConfig, EGRSDTrainer
from egrsd_kernels.trl.context import Reader, context_window
from tests.support.doc_examples import blocks
from tests.support.trl_tiny import CHAT, OPTIONS, Dataset, correct, dataset, make, row, tiny_model, tokenizer

STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "<{{ m.role }}>{{ m.content | trim }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As Qwen3's: the reasoning of earlier turns goes.
FORGETFUL = CHAT.replace(
    "{{ m.content }}", "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}"
)


def with_template(template: str):
    changed = copy.deepcopy(tokenizer())
    changed.chat_template = template
    return changed


def build(path, cls=EGRSDTrainer, template=CHAT, rows=None, model=None, teacher_template=None, **options):
    """A trainer whose tokenizer has another chat template."""
    args = EGRSDConfig(str(path), **OPTIONS | {"max_steps": 1} | options)
    words = {} if teacher_template is None else {"teacher_template": teacher_template}
    rows, model = rows if rows is not None else dataset(), model or tiny_model()
    return cls(model, correct, args, rows, processing_class=with_template(template), **words)


def changed(index: int = 2, **change) -> Dataset:
    rows = list(dataset(6))
    rows[index] = rows[index] | change
    return Dataset.from_list(rows)


def refusal(call) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def spied(run) -> list:
    """What the run generates."""
    generated, generate = [], run._generate_single_turn
    run._generate_single_turn = lambda *a, **k: generated.append(a) or generate(*a, **k)
    return generated


def gpt2(positions: int):
    torch.manual_seed(0)
    size = {"vocab_size": len(tokenizer()), "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": positions}
    return GPT2LMHeadModel(GPT2Config(**size, bos_token_id=1, eos_token_id=1, pad_token_id=0))


# ------------------------------------------------------------------------------------------------------------- window


@pytest.mark.parametrize("learned", [False, True], ids=["rotary", "learned"])
def test_a_context_beyond_the_window_is_refused(tmp_path, learned):
    """The longest solution that fits trains, learned positions included; one more character is refused."""
    window = 256 if learned else 512
    model = gpt2(window) if learned else tiny_model()
    rows = changed()
    text = rows[2]["solution"]
    used = len(build(tmp_path, rows=rows, model=model)._tokenize_prompts([_teachers(rows[2])])[0][0])
    room = window - 12 - used
    fitting = [dict(r, solution=text + "." * room) if r == rows[2] else r for r in rows]
    run = build(tmp_path, rows=Dataset.from_list([fitting[2]] * 6), model=model)
    run.train()
    message = refusal(lambda: build(tmp_path, rows=changed(solution=text + "." * (room + 1)), model=model))
    assert message == (
        f"train_dataset, row 2: the teacher's prompt has {window - 11} tokens, and with a completion of up to 12 that "
        f"is more than the model's window of {window}; shorten the solution, set a smaller max_completion_length, "
        "or extend the window by rope scaling where the model allows it"
    )


def _teachers(example):
    from egrsd_kernels.rl import teacher_messages

    return teacher_messages(example["prompt"], example["solution"])


def test_the_students_prompt_has_to_fit_too(tmp_path):
    class Summary(EGRSDTrainer):
        def teacher_prompt(self, example):
            return [{"role": "user", "content": example["solution"]}]

    rows = changed(prompt=[{"role": "user", "content": "1" * 600}])
    message = refusal(lambda: build(tmp_path, cls=Summary, rows=rows))
    assert message.startswith(
        "train_dataset, row 2: the prompt has 603 tokens, and with a completion of up to 12 that "
    )
    assert "shorten the prompt" in message


def test_a_completion_as_long_as_the_window(tmp_path):
    message = refusal(lambda: build(tmp_path, max_completion_length=512))
    assert message == "max_completion_length: expected less than the model's window of 512 tokens, got 512"


def test_a_completion_without_a_bound_counts_one_token(tmp_path):
    options = {"max_completion_length": None, "length_beta": 0.0}
    assert "a completion of up to 1 " in refusal(lambda: build(tmp_path, rows=changed(solution="a" * 500), **options))
    build(tmp_path, **options)


def test_vllm_cuts_completions_at_its_own_limit():
    """Its limit is the student's: a completion never reaches max_completion_length then."""
    prompts = {"s": [{"role": "user", "content": "a" * 90}], "t": [{"role": "user", "content": "a" * 160}]}
    example = {"prompt": prompts["s"], "solution": "a"}
    reader = Reader(tokenizer(), {}, lambda _: prompts["t"], "solution", 256, 200, generated=186)
    assert reader.read([("r", example)]) == [prompts["t"]]  # 163 + (186 − 93) = 256
    assert "a completion of up to 94 " in refusal(
        lambda: dataclasses.replace(reader, generated=187).read([("r", example)])
    )


def _config(**values):
    config = SimpleNamespace(**values)
    config.get_text_config = lambda decoder=None: config
    return config


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}


@pytest.mark.parametrize(
    "config, window",
    [
        (Qwen3Config(max_position_embeddings=300), 300),
        (GPT2Config(n_positions=70), 70),
        (MambaConfig(), None),
        (BloomConfig(), None),
        (FalconConfig(alibi=True), None),
        (FalconConfig(alibi=False, max_position_embeddings=80), 80),
        (_config(max_position_embeddings=-1), None),
        (_config(max_position_embeddings=None), None),
        (_config(max_position_embeddings=100, rope_scaling=YARN), 400),
        (_config(max_position_embeddings=120, rope_parameters=YARN), 400),  # the rest is for generation, as Qwen3's
        (_config(max_position_embeddings=400, rope_parameters=YARN), 400),
        (_config(max_position_embeddings=100, rope_scaling={"type": "linear", "factor": 2.0}), 200),
        (_config(max_position_embeddings=100, rope_scaling={"type": "dynamic", "factor": 2.0}), 200),
        (_config(max_position_embeddings=400, rope_scaling=YARN | {"rope_type": "llama3"}), 400),
        (_config(max_position_embeddings=400, rope_scaling=YARN | {"rope_type": "longrope"}), 400),
        (
            _config(max_position_embeddings=100, rope_parameters={"full": YARN, "sliding": {"rope_type": "default"}}),
            100,
        ),
        (_config(max_position_embeddings=100, model_max_length=1600), 1600),
        (
            LlamaConfig(max_position_embeddings=100, rope_scaling={"rope_type": "yarn", "factor": 3.0}),
            300,
        ),
    ],
)
def test_windows(config, window):
    assert context_window(config) == window


# ------------------------------------------------------------------------------------------------------- the solution


@pytest.mark.parametrize("solution", ["<think>3 times</think>4", "<think>3 times 4</think>"])
def test_a_template_that_drops_the_solution_is_refused(tmp_path, solution):
    message = refusal(lambda: build(tmp_path, template=FORGETFUL, rows=changed(solution=solution)))
    assert message == (
        "train_dataset, row 2: solution: the chat template drops it, or a part of it, from the teacher's conversation "
        f"({solution!r}); store it without tags such as <think>, or put it into a user message by teacher_template"
    )
    build(tmp_path, rows=changed(solution=solution))
    hint = [{"role": "user", "content": "Hint. {solution}"}]
    build(tmp_path, template=FORGETFUL, rows=changed(solution=solution), teacher_template=hint)


@pytest.mark.parametrize(
    "how", ["m.content | trim", "m.content | e", "m.content | tojson", "m.content | replace('\n', ' ')"]
)
def test_templates_may_trim_and_escape(tmp_path, how):
    rows = changed(solution=' "a < b" & b\'s\n\\nabla x.\n')
    build(tmp_path, template=CHAT.replace("m.content", how), rows=rows)


@pytest.mark.parametrize(
    "added, refused",
    [
        ({"content": "<think>9.</think> In short: 3."}, True),  # the solution worded anew, and lost
        ({"content": "In short: 3."}, False),
        ({"content": "<think>Notes.</think> {solution}"}, False),
        ({"content": "", "reasoning_content": "{solution}"}, True),
        ({"content": [{"type": "text", "text": "{solution}"}]}, False),
        (None, False),
    ],
)
def test_what_a_conversation_of_ones_own_adds_is_what_counts(tmp_path, added, refused):
    """What it leaves out is its author's choice. What the template drops of the prompt the student lacks as well."""

    class Own(EGRSDTrainer):
        def teacher_prompt(self, example):
            if added is None:
                return example["prompt"]
            fill = lambda text: text.replace("{solution}", example["solution"])  # noqa: E731
            said = {key: fill(value) if isinstance(value, str) else value for key, value in added.items()}
            if isinstance(added["content"], list):
                said["content"] = [{"type": "text", "text": example["solution"]}]
            again = {"role": "user", "content": "Again."}
            return [*example["prompt"], {"role": "assistant", **said}, again]

    history = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "<think>Easy.</think>2"},
        {"role": "user", "content": "2+2?"},
    ]
    template = FORGETFUL.replace("m.content.split", "(m.content if m.content is string else m.content[0].text).split")
    call = lambda: build(tmp_path, cls=Own, template=template, rows=changed(prompt=history))  # noqa: E731
    if refused:
        message = refusal(call)
        assert message.startswith("train_dataset, row 0: solution: the chat template drops it, or a part of it")
        assert message.endswith("put it into a user message by teacher_prompt")
    else:
        call()


def test_plain_texts_of_ones_own_pass(tmp_path):
    class Plain(EGRSDTrainer):
        def teacher_prompt(self, example):
            return f"{example['solution']} Again."

    run = build(tmp_path, cls=Plain)
    run.train()
    assert "the teacher's prompt has 606 tokens" in refusal(
        lambda: build(tmp_path, cls=Plain, rows=changed(solution="a" * 599))
    )


# ---------------------------------------------------------------------------------------------------------- templates


def test_a_template_that_refuses_roles_is_found_at_construction(tmp_path):
    words = [{"role": "user", "content": "Hint: {solution}"}]
    message = refusal(lambda: build(tmp_path, template=STRICT, teacher_template=words))
    assert message == (
        "train_dataset, row 0: teacher_template: the chat template refuses this conversation (Conversation roles must "
        "alternate user/assistant/...); its roles are user, user: word it with roles, in an order, and "
        "contents that the template takes"
    )
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    message = refusal(lambda: build(tmp_path, template=STRICT, rows=changed(prompt=system)))
    assert message.startswith(
        "train_dataset, row 2: prompt: the chat template refuses this conversation (Conversation "
    )
    assert "its roles are system, user:" in message


def test_the_template_of_the_docs_takes_strict_roles(tmp_path):
    (block,) = [block for block in blocks("docs/from-grpo.md") if "hint = [" in block]
    names = {}
    exec(block.split("trainer = ")[0], names)
    run = build(tmp_path, template=STRICT, teacher_template=names["hint"])
    run.train()
    messages = run.teacher_prompt(row(1, 2))
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == "A correct solution, for reference:\n1 plus 2 is 3."


def test_the_default_template_takes_strict_roles(tmp_path):
    build(tmp_path, template=STRICT).train()


# ------------------------------------------------------------------------------------------------------------ streams


@pytest.mark.parametrize(
    "change, message",
    [
        ({"solution": "a" * 600}, "the teacher's prompt has "),
        ({"solution": " "}, "solution: expected the text of a reference solution, got ' '"),
        ({"prompt": [{"role": "system", "content": "2+3?"}]}, "prompt: the chat template refuses this conversation ("),
        ({"images": ["a"]}, "images: images need a model that reads them, and its"),
    ],
)
def test_a_row_of_a_stream_is_refused_before_generating(tmp_path, change, message):
    """Its second generation has the row."""
    rows = [row(1, 2), row(2, 3), row(3, 4), row(4, 5), row(5, 6), row(6, 7) | change, row(7, 8), row(8, 9)]
    if "images" in change:
        rows = [{"images": []} | example for example in rows]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    run = build(tmp_path, template=STRICT, rows=stream, max_steps=2)
    generated = spied(run)
    found = refusal(run.train)
    name = "'2+3?'" if "prompt" in change else "'6+7?'"
    assert found.startswith(f"train_dataset, the row {name}: {message}")
    assert len(generated) == 1


# ------------------------------------------------------------------------------------------------------------- images


def test_images_are_refused(tmp_path):
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "1+1?"}]
    cases = {
        "image": Dataset.from_list([r | {"image": "a.png"} for r in dataset(4)]),
        "images": Dataset.from_list([r | {"images": ["a.png"]} for r in dataset(4)]),
        "prompt": Dataset.from_list([r | {"prompt": [{"role": "user", "content": parts}]} for r in dataset(4)]),
    }
    for name, rows in cases.items():
        assert refusal(lambda rows=rows: build(tmp_path, rows=rows)) == (
            f"train_dataset, row 0: {name}: images need a model that reads them, and its processor as "
            "processing_class; leave the images out"
        )
    build(tmp_path, rows=Dataset.from_list([r | {"images": []} for r in dataset(4)])).train()


def test_evaluation_names_its_own_rows(tmp_path):
    run, _ = make(tmp_path, max_steps=1, per_device_eval_batch_size=4)
    assert refusal(lambda: run.evaluate(changed(solution="a" * 600))).startswith("eval_dataset, the row '")
