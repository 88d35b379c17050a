"""Vision-language models: student and teacher read the same images, each in its own prompt."""

from __future__ import annotations

import math
import shutil

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("PIL", reason="Pillow is not installed")

import transformers
from datasets import Dataset, Image, Sequence

import reference
from egrsd_kernels.trl import EGRSDTrainer
from tests.support.trl_tiny import exported, make, row, weights
from tests.support.vlm_tiny import VLMS, dataset_with_images, picture
from tests.test_trl_losses import check_both_paths

pytestmark = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="the tiny processors are of transformers 5"
)
IMAGES = ("pixel_values", "image_grid_thw")


def build(path, name, **options):
    model, processor = VLMS[name]
    return make(
        path, **{"model": model(), "processing_class": processor(), "train_dataset": dataset_with_images()} | options
    )


def by_row(run, model, conversation, completion):
    """(log p, entropy) of a completion behind a conversation, by the processor and the model's own logits, unpadded."""
    from egrsd_kernels.trl.context import images_of, in_parts

    processor = run.processing_class
    text = processor.apply_chat_template(
        [in_parts(message) for message in conversation], tokenize=False, add_generation_prompt=True
    )
    inputs = processor(text=[text], images=[images_of(conversation)], return_tensors="pt")
    inputs["input_ids"] = torch.cat([inputs["input_ids"], completion[None]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        types = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.cat([types, types.new_zeros(1, len(completion))], dim=1)
    logits = model(**inputs, use_cache=False).logits[0, -len(completion) - 1 : -1] / run.temperature
    return reference.log_prob(logits, completion), reference.entropy(logits)


@pytest.mark.heavy
@pytest.mark.parametrize("name", VLMS)
@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_iterations": 2, "loss_type": "grpo"}])
def test_teacher_and_student_read_the_images(tmp_path, name, peft, options):
    """Teacher statistics, log p of the policy before, and the loss of TRL: by the model's own logits, row by row."""
    plain = VLMS[name][0]().eval()
    options = {"temperature": 0.8, "learning_rate": 1e-2, "rollout_steps": 1} | options
    run, logs = build(tmp_path, name, peft=peft, **options)
    generate, compute_loss, seen, student = run._generate_and_score_completions, run._compute_loss, [], []

    @torch.no_grad()
    def checked(inputs):
        output = generate(inputs)
        given = run._given
        for index, example in enumerate(inputs):
            count = int(output["completion_mask"][index].sum())
            completion = output["completion_ids"][index, :count]
            teacher = run.teacher_prompt({**example, "prompt": given[index]})
            assert len(teacher) == len(given[index]) + 2
            found = output["teacher_logp"][index, :count], output["teacher_entropy"][index, :count]
            for one, other in zip(found, by_row(run, plain, teacher, completion), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
            if "old_per_token_logps" in output:
                other = by_row(run, run.model, given[index], completion)[0]
                torch.testing.assert_close(output["old_per_token_logps"][index, :count], other, rtol=1e-3, atol=1e-4)
        seen.append(len(inputs))
        return output

    def both(model, inputs):
        """The policy's log p of a micro-batch, whose images TRL has cut out of the generation's."""
        loss = compute_loss(model, inputs)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        images = {key: inputs[key] for key in (*IMAGES, "mm_token_type_ids") if key in inputs}
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **images).logits
            logits = logits[:, -inputs["completion_ids"].shape[1] - 1 : -1] / run.temperature
        expected = reference.log_prob(logits, inputs["completion_ids"])[inputs["completion_mask"].bool()]
        torch.testing.assert_close(student[-1], expected, rtol=1e-3, atol=1e-4)
        return loss

    for own in ("_direct_loss", "_trl_loss"):
        made = getattr(run, own)

        def remember(model, inputs, made=made):
            loss, signals = made(model, inputs)
            student.append(signals["student_logp"][inputs["completion_mask"].bool()])
            return loss, signals

        setattr(run, own, remember)
    run._generate_and_score_completions, run._compute_loss = checked, both
    before = weights(run)
    run.train()
    assert seen and all(math.isfinite(row["loss"]) for row in logs.steps)
    assert any(not torch.equal(before[key], value) for key, value in weights(run).items())
    assert len(exported(tmp_path)) == 16


@pytest.mark.heavy
@pytest.mark.parametrize("name", VLMS)
def test_another_image_gives_other_statistics(tmp_path, name):
    """Else the checks above would hold for models that look away."""
    model = VLMS[name][0]().eval()
    run, _ = build(tmp_path, name, peft=False)
    completion = torch.arange(10, 16)

    def statistics(seed):
        content = [{"type": "image", "image": picture(seed)}, {"type": "text", "text": "1+1?"}]
        return by_row(run, model, [{"role": "user", "content": content}], completion)[0]

    with torch.no_grad():
        assert (statistics(1) - statistics(2)).abs().max() > 0.01


@pytest.mark.heavy
@pytest.mark.parametrize("name", VLMS)
def test_resume_with_images_is_bit_exact(tmp_path, name):
    options = {"num_iterations": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 3}
    straight, expected = build(tmp_path / "a", name, **options)
    straight.train()
    shutil.copytree(tmp_path / "a" / "checkpoint-3", tmp_path / "checkpoint-3")
    resumed, rest = build(tmp_path / "b", name, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for key, value in weights(straight).items():
        assert torch.equal(value, weights(resumed)[key]), key
    assert rest.steps[0]["loss"] == expected.steps[-1]["loss"]


def test_one_image_a_row_in_a_column_of_its_own(tmp_path):
    rows = Dataset.from_list([row(i, 1) | {"image": picture(i)} for i in range(8)]).cast_column("image", Image())
    run, logs = build(tmp_path, "llava", train_dataset=rows, max_steps=1)
    run.train()
    assert math.isfinite(logs.steps[0]["loss"])


def test_a_dataset_without_images(tmp_path):
    rows = Dataset.from_list([row(i, 1) for i in range(8)])
    run, logs = build(tmp_path, "qwen2-vl", train_dataset=rows, max_steps=1, num_iterations=2)
    run.train()
    assert math.isfinite(logs.steps[0]["loss"])


class WithoutImages(EGRSDTrainer):
    def teacher_prompt(self, example):
        return [message for message in super().teacher_prompt(example) if isinstance(message["content"], str)]


def test_a_teacher_without_the_images_is_refused(tmp_path):
    run, _ = build(tmp_path, "qwen2-vl", cls=WithoutImages)
    with pytest.raises(ValueError, match=r"teacher_prompt: expected the \d images of the prompt in their order, got 0"):
        run.train()


def test_images_that_fill_the_window_are_refused(tmp_path):
    model = VLMS["qwen2-vl"][0]()
    model.config.get_text_config().max_position_embeddings = 190
    large = [row(i, 1) | {"images": [picture(i, 32, 32), picture(i, 32, 32)]} for i in range(8)]
    rows = Dataset.from_list(large).cast_column("images", Sequence(Image()))
    run, _ = build(tmp_path, "qwen2-vl", model=model, train_dataset=rows)
    with pytest.raises(
        ValueError, match=r"the teacher's prompt has \d+ tokens with its images, and the window has roo"
    ):
        run.train()


@pytest.mark.heavy
@pytest.mark.parametrize("name", VLMS)
def test_both_paths_read_the_images_alike(tmp_path, name):
    run, _ = build(tmp_path, name, peft=False, max_steps=1)
    check_both_paths(run, 2)
