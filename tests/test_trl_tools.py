"""Tools, environments, rollout functions: the teacher reads what generation got, and scores what the policy made."""

from __future__ import annotations

import functools
import math
import shutil

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

import transformers
import trl.chat_template_utils
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import reference
from egrsd_kernels.trl.context import images_of, in_parts
from tests.support.trl_tiny import exported, make, row, tiny_model, weights
from tests.support.vlm_tiny import dataset_with_images, picture, qwen2_vl, qwen2_vl_processor

pytestmark = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="TRL calls tools with transformers 5"
)
SPECIAL = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]


@functools.cache
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, with Qwen3's template, which has tools."""
    characters = [chr(code) for code in range(32, 127)] + ["\n", "…", "×"]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *characters])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<|endoftext|>", eos_token="<|im_end|>", padding_side="left",
        additional_special_tokens=SPECIAL[2:], chat_template=trl.chat_template_utils.qwen3_chat_template,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def multiply(a: int, b: int) -> int:
    """
    Multiplies two numbers.

    Args:
        a: The first.
        b: The second.

    Returns:
        Their product.
    """
    return a * b


CALL = '<tool_call>\n{"name": "multiply", "arguments": {"a": 6, "b": 7}}\n</tool_call><|im_end|>'
ANSWERS = ("It is 42.<|im_end|>", "No idea at all.<|im_end|>", "42<|im_end|>")


def scripted(run, calls=True, call=CALL):
    """Every second rollout calls the tool and then answers; the others answer at once."""
    count = 0

    def generate(prompt_ids, *_, num_generations=None, **__):
        nonlocal count
        texts = []
        for ids in prompt_ids:
            asked = "<tool_response>" in chat_tokenizer().decode(ids)
            texts.append(call if calls and not asked and count % 2 else ANSWERS[count % 3])
            count += 1
        return [chat_tokenizer()(text, add_special_tokens=False)["input_ids"] for text in texts], None

    run._generate_single_turn = generate


def build(path, **options):
    arguments = {
        "model": model(), "processing_class": chat_tokenizer(), "tools": [multiply], "max_completion_length": 200,
        "train_dataset": Dataset.from_list([row(i, 7) for i in range(8)]), "rollout_steps": 1, "max_steps": 1,
        "learning_rate": 1e-2,
    }  # fmt: skip
    run, logs = make(path, **arguments | options)
    scripted(run, calls=bool(run.tools))
    return run, logs


def model():
    tiny = tiny_model(len(chat_tokenizer()))
    tiny.config.max_position_embeddings = 2048
    return tiny


def check_teacher(run, plain, tools_of=lambda index: None):
    """Holds the teacher's statistics against the plain model's logits behind a prompt that is rendered here."""
    generate, checked = run._generate_and_score_completions, []

    @torch.no_grad()
    def compare(inputs):
        output = generate(inputs)
        for index, example in enumerate(inputs):
            given = run._given[index]
            conversation = run.teacher_prompt({**example, "prompt": given})
            assert example["solution"] in conversation[-2]["content"] and conversation[: len(given)] == given
            ids = run._tokenizer.apply_chat_template(
                conversation, tools=tools_of(index), add_generation_prompt=True, return_dict=True,
                chat_template=run.chat_template,
            )["input_ids"]  # fmt: skip
            count = int(output["completion_mask"][index].sum())
            completion = output["completion_ids"][index, :count]
            logits = plain(torch.tensor([[*ids, *completion.tolist()]])).logits[0, len(ids) - 1 : -1]
            own = output["tool_mask"][index, :count] if "tool_mask" in output else torch.ones(count)
            expected = reference.log_prob(logits, completion) * own, reference.entropy(logits) * own
            found = output["teacher_logp"][index, :count], output["teacher_entropy"][index, :count]
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
            checked.append((given, own))
        return output

    run._generate_and_score_completions = compare
    return checked


@pytest.mark.heavy
@pytest.mark.parametrize("options", [{}, {"loss_type": "grpo", "num_iterations": 2}])
def test_what_tools_answer_is_read_and_not_learned(tmp_path, options):
    run, logs = build(tmp_path, **options)
    checked = check_teacher(run, model(), lambda index: [multiply])
    masks, compute_loss = [], run._compute_loss

    def look(model, inputs):
        loss = compute_loss(model, inputs)
        masks.append((inputs["completion_mask"], inputs["tool_mask"]))
        return loss

    run._compute_loss = look
    before = weights(run)
    run.train()
    assert logs.steps[0]["tools/call_frequency"] == 0.5 and math.isfinite(logs.steps[0]["loss"])
    assert {bool((own == 0).any()) for _, own in checked} == {True, False}
    assert any(not torch.equal(before[key], value) for key, value in weights(run).items())
    texts = ["".join(rollout.tokens) for rollout in exported(tmp_path)]
    assert any("tool_call" in text for text in texts) and not any("tool_response" in text for text in texts)
    assert any(text.endswith("</tool_call><|im_end|>" + answer) for text in texts for answer in ANSWERS)
    if not options:  # the normaliser counts the policy's own tokens
        own = sum(int((mask * tools).sum()) for mask, tools in masks)
        assert own < sum(int(mask.sum()) for mask, _ in masks)
        assert sum(len(rollout.tokens) for rollout in exported(tmp_path)) == own


@pytest.mark.heavy
@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo"])
def test_both_paths_mask_tools_alike(tmp_path, loss_type):
    from tests.test_trl_losses import check_both_paths

    run, _ = build(tmp_path, loss_type=loss_type)
    check_both_paths(run, 2)


@pytest.mark.heavy
def test_the_length_bonus_counts_the_policys_own_tokens(tmp_path):
    run, _ = build(tmp_path, reward_funcs=lambda completions, **_: [1.0] * len(completions))
    run.train()
    rollouts = exported(tmp_path)
    assert len({len(rollout.tokens) for rollout in rollouts}) > 1
    for rollout in rollouts:
        assert rollout.reward == pytest.approx(1 + 0.5 * (1 - len(rollout.tokens) / 200), rel=1e-5)


def see(a: int, b: int) -> list:
    """
    Shows a picture.

    Args:
        a: Which one.
        b: Which other.

    Returns:
        The picture.
    """
    return [{"type": "image", "image": picture(a * b)}, {"type": "text", "text": "Here."}]


@pytest.mark.heavy
@pytest.mark.parametrize("options", [{}, {"loss_type": "grpo", "num_iterations": 2}])
def test_images_that_tools_answer_with_are_read_by_both(tmp_path, options):
    """In prompts of one or two images; by the model's own logits, row by row."""
    processor = qwen2_vl_processor(chat_tokenizer(), trl.chat_template_utils.qwen3_vl_chat_template)
    plain = qwen2_vl(processor).eval()
    small = {"max_position_embeddings": 2048}
    plain.config.text_config.update(small)
    tiny = qwen2_vl(processor)
    tiny.config.text_config.update(small)
    run, logs = build(
        tmp_path, model=tiny, processing_class=processor, tools=[see], peft=False, learning_rate=1e-3,
        train_dataset=dataset_with_images(8), **options,
    )  # fmt: skip
    scripted(run, call=CALL.replace("multiply", "see"))
    generate, images = run._generate_and_score_completions, []

    def logp_behind(conversation, completion, more):
        text = processor.apply_chat_template(
            [in_parts(message) for message in conversation], tools=[see], tokenize=False, add_generation_prompt=True,
            chat_template=run.chat_template,
        )  # fmt: skip
        shown = [*images_of(conversation), *more]
        inputs = processor(text=[text], images=[images_of(conversation)], return_tensors="pt")
        ids = torch.cat([inputs["input_ids"][0], completion])
        pixels = processor.image_processor(images=shown, return_tensors="pt")
        types = (ids == processor.image_token_id).int()[None]
        logits = plain(input_ids=ids[None], mm_token_type_ids=types, **pixels, use_cache=False).logits[0]
        return reference.log_prob(logits[-len(completion) - 1 : -1], completion)

    @torch.no_grad()
    def compare(inputs):
        output = generate(inputs)
        for index, example in enumerate(inputs):
            given = run._given[index]
            count = int(output["completion_mask"][index].sum())
            completion, own = output["completion_ids"][index, :count], output["tool_mask"][index, :count]
            more = [picture(42)] * int((completion == processor.image_token_id).any())
            images.append(len(more))
            teacher = run.teacher_prompt({**example, "prompt": given})
            found = output["teacher_logp"][index, :count]
            torch.testing.assert_close(found, logp_behind(teacher, completion, more) * own, rtol=1e-3, atol=1e-4)
            if "old_per_token_logps" in output:
                found = output["old_per_token_logps"][index, :count] * own
                torch.testing.assert_close(found, logp_behind(given, completion, more) * own, rtol=1e-3, atol=1e-4)
        return output

    run._generate_and_score_completions = compare
    run.train()
    assert set(images) == {0, 1} and math.isfinite(logs.steps[0]["loss"])


# -------------------------------------------------------------------------------------------------------- environments


class Box:
    """Says a number first; what is in the box multiplies it."""

    def reset(self, prompt=None, solution=None, **_):
        self.number = len(solution)
        return f" The number is {self.number}."

    def multiply(self, a: int, b: int) -> int:
        """
        Multiplies two numbers.

        Args:
            a: The first.
            b: The second.

        Returns:
            Their product.
        """
        return a * b * self.number

    def get_reward(self) -> float:
        return float(self.number % 2)


class Other(Box):
    """Another environment, with a tool less."""

    multiply = None

    def reset(self, **_):
        self.number = 3

    def divide(self, a: int) -> int:
        """
        Halves a number.

        Args:
            a: The number.

        Returns:
            Its half.
        """
        return a // 2


@pytest.mark.heavy
@pytest.mark.parametrize("options", [{"reward_funcs": None}, {"loss_type": "grpo", "num_iterations": 2}])
def test_the_teacher_reads_an_environments_first_observation(tmp_path, options):
    run, logs = build(tmp_path, tools=None, environment_factory=Box, **options)
    checked = check_teacher(run, model(), lambda index: run._env_tools[None])
    run.train()
    for given, _ in checked:
        assert " The number is " in given[-1]["content"]
    assert logs.steps[0]["tools/call_frequency"] == 0.5 and math.isfinite(logs.steps[0]["loss"])
    assert "rewards/Box/mean" in logs.steps[0]
    assert {rollout.reward is not None for rollout in exported(tmp_path)} == {True}


@pytest.mark.heavy
def test_each_row_has_its_environment_and_that_its_tools(tmp_path):
    rows = Dataset.from_list(
        [{"solution": f"{i} is right.", "answer": "1", "environment": ("box", "other")[i % 2]} for i in range(8)]
    )
    run, logs = build(
        tmp_path, tools=None, environment_factory={"box": Box, "other": Other}, train_dataset=rows, reward_funcs=None
    )
    checked = check_teacher(run, model(), lambda index: run._env_tools[run._batch_environments[index]])
    run.train()
    assert {given[-1]["content"] for given, _ in checked} >= {""} and len(checked) == 8
    assert math.isfinite(logs.steps[0]["loss"])


@pytest.mark.slow
def test_resume_between_turns_of_a_generation(tmp_path):
    options = {"max_steps": 4, "num_iterations": 2, "save_strategy": "steps", "save_steps": 3, "rollout_steps": 0}
    straight, expected = build(tmp_path / "a", **options)
    straight.train()
    shutil.copytree(tmp_path / "a" / "checkpoint-3", tmp_path / "checkpoint-3")
    resumed, rest = build(tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for key, value in weights(straight).items():
        assert torch.equal(value, weights(resumed)[key]), key
    assert rest.steps[0]["loss"] == expected.steps[-1]["loss"]


# ------------------------------------------------------------------------------------------------------ rollout_func


def rollouts(prompts, trainer, more=""):
    words = trainer.processing_class
    texts = [
        words.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **trainer.chat_template_kwargs)
        for prompt in prompts
    ]
    answers = [words(ANSWERS[i % 3] + "ok", add_special_tokens=False)["input_ids"] for i in range(len(prompts))]
    return {
        "prompt_ids": [words(text + more, add_special_tokens=False)["input_ids"] for text in texts],
        "completion_ids": answers,
        "logprobs": [[0.0] * len(ids) for ids in answers],
        "env_mask": [[1] * (len(ids) - 2) + [0, 0] for ids in answers],
        "judged": [float(i % 2) for i in range(len(prompts))],
    }


def judged(completions, judged, **_):
    return judged


@pytest.mark.heavy
def test_a_rollout_function_has_the_teachers_prompt(tmp_path):
    run, logs = build(tmp_path, tools=None, rollout_func=rollouts, reward_funcs=judged)
    checked = check_teacher(run, model())
    run.train()
    assert math.isfinite(logs.steps[0]["loss"]) and all((own == 0).sum() == 2 for _, own in checked)
    assert not any("ok" in "".join(rollout.tokens) for rollout in exported(tmp_path))


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"rollout_func": functools.partial(rollouts, more="Hint."), "reward_funcs": judged, "tools": None},
            "rollout_func: expected prompt_ids as the chat template renders them, since the teacher's are made from",
        ),
        (
            {"environment_factory": Box, "tools": None, "train_dataset": None},
            "train_dataset: expected rows with a column 'solution', got None",
        ),
        (
            {
                "environment_factory": {"box": Box},
                "tools": None,
                "train_dataset": Dataset.from_list([row(1, 2) | {"environment": "ball"}] * 4),
            },
            "train_dataset, row 0: environment: expected one of box, as environment_factory has them, got 'ball'",
        ),
        ({"reward_funcs": None}, "reward_funcs: expected at least one reward function"),
    ],
)
def test_what_the_teacher_could_not_follow_is_refused_in_one_line(tmp_path, options, message):
    with pytest.raises(ValueError) as caught:
        build(tmp_path, **options)[0].train()
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_tools_are_part_of_what_fits_into_the_window(tmp_path):
    small = model()
    small.config.max_position_embeddings = 700
    build(tmp_path, model=small, tools=None)
    with pytest.raises(ValueError, match=r"^train_dataset, row 0: the (teacher's )?prompt has \d+ tokens"):
        build(tmp_path, model=small)
