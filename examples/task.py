"""The task that the demo and the experiment share: sums, the model's tokenizer and prompts, and the warm-up's lessons.

A problem is a sum such as 13-8+1. Demonstrations are a careless student's, who chatters half of the time and forgets
most carries; reference solutions are terse and right.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from egrsd_kernels.extras import how_to_install
from egrsd_kernels.rl import align_responses, length_shaped_reward, pad_inputs, response_hidden, teacher_messages

try:
    from peft import PeftModel
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
except ImportError as error:
    raise ImportError(f"the examples need {error.name}: {how_to_install('train')}") from error

MAX_RESPONSE = 56  # L_max, tokens
LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# ------------------------------------------------------------------------------------------------------------ problems

PAUSES = ["hmm", "well", "okay", "now", "then", "so"]
CHATTER_RATE = 0.5  # share of the warm-up's demonstrations that are in words
SLIP_RATE = 0.8  # share of their carries that are forgotten
LARGEST = 29  # number that can turn up: the largest total is 20, and a forgotten borrow makes it ten more


@dataclass(frozen=True)
class Problem:
    """A sum of signed terms whose running total stays within 0..20."""

    terms: tuple[int, ...]

    @property
    def question(self) -> str:
        return _sum(self.terms)

    @property
    def answer(self) -> int:
        return sum(self.terms)

    def solution(self, chatter: random.Random | None = None, slips: random.Random | None = None) -> str:
        """The working, step by step: terse (``=15-4=11``), or with ``chatter`` in words and with pauses for thought.

        With ``slips`` it is the careless student's: most carries and borrows are forgotten, the work goes on with the
        wrong number, and so arrives at a wrong answer.
        """
        lines, rest = [], list(self.terms)
        while len(rest) > 1:
            first, second, *others = rest
            total = first + second
            if slips is not None and total // 10 != first // 10 and slips.random() < SLIP_RATE:
                slipped = total + (10 if second < 0 else -10)
                if all(0 <= later <= LARGEST for later in accumulate([slipped, *others])):
                    total = slipped
            rest = [total, *others]
            if chatter is None:
                lines.append(f"={_sum(rest)}")
            else:
                pause = " ".join(chatter.choices(PAUSES, k=chatter.randint(2, 6)))
                lines.append(f"{pause} {first}{second:+d}={total}\nleaves {_sum(rest)}\n")
        return "".join(lines) + ("" if chatter is None else f"the answer is {rest[0]}")

    def accepts(self, response: str) -> bool:
        """The verifier: the number at the end alone counts, in whatever style."""
        found = re.search(r"(?:=|is )(\d+)$", response)
        return found is not None and int(found[1]) == self.answer


def _sum(terms: Sequence[int]) -> str:
    return str(terms[0]) + "".join(f"{term:+d}" for term in terms[1:])


def sample_problems(
    rng: random.Random, count: int, exclude: frozenset[Problem] = frozenset(), additions: Sequence[int] = (2, 3)
) -> list[Problem]:
    """Problems with one of ``additions`` as the number of signs, none of them in ``exclude``."""
    problems: list[Problem] = []
    while len(problems) < count:
        terms = [rng.randint(1, 20)]
        for _ in range(rng.choice(additions)):
            terms.append(rng.choice([term for term in range(-9, 10) if term and 0 <= sum(terms) + term <= 20]))
        if Problem(tuple(terms)) not in exclude:
            problems.append(Problem(tuple(terms)))
    return problems


# -------------------------------------------------------------------------------------------------- tokenizer and model

SPECIAL = ["<pad>", "<end>", "<user>", "<assistant>"]
WORDS = [*(f"{word} " for word in [*PAUSES, "leaves", "the", "answer", "is"]), "again"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# The teacher's two turns in the words this model knows; a pretrained model takes the default of teacher_messages.
TEACHER_TEMPLATE = ({"role": "assistant", "content": "{solution}"}, {"role": "user", "content": "again"})


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word, number and signed term."""
    numbers = [str(number) for number in range(LARGEST + 1)]
    terms = [f"{term:+d}" for term in range(-9, 10) if term]
    vocabulary = [*SPECIAL, *WORDS, *numbers, *terms, "=", "\n"]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z]+ ?|[+-]?\d+|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=SPECIAL[2:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, width: int = 128, layers: int = 3) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.06,  # near 1/sqrt(hidden_size); the default 0.02 suits wide models and learns slowly here
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


# --------------------------------------------------------------------------------------------------- prompts, responses


class Classroom:
    """A model with its tokenizer: writes prompts for student and teacher, and lets the model answer them."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerFast,
        device: torch.device,
        max_response: int = MAX_RESPONSE,
    ):
        self.model, self.tokenizer, self.device, self.max_response = model, tokenizer, device, max_response

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.tokenizer.encode(text)

    def student_prompt(self, problem: Problem) -> list[int]:
        return self._prompt([{"role": "user", "content": problem.question}])

    def teacher_prompt(self, problem: Problem) -> list[int]:
        return self._prompt(teacher_messages(problem.question, problem.solution(), TEACHER_TEMPLATE))

    def response(self, text: str) -> list[int]:
        return [*self.tokenizer.encode(text), self.tokenizer.eos_token_id]

    @torch.no_grad()
    def answer(self, prompts: Sequence[list[int]], sample: bool) -> list[list[int]]:
        """Responses of the model as token ids, up to and with <end>."""
        inputs = pad_inputs(prompts, self.tokenizer.pad_token_id, padding_side="left")
        # top_k = 0: sampling from the full softmax, the distribution that the loss differentiates.
        how = {"do_sample": True, "top_k": 0} if sample else {"do_sample": False}
        output = self.model.generate(
            input_ids=inputs["input_ids"].to(self.device),
            attention_mask=inputs["attention_mask"].to(self.device),
            max_new_tokens=self.max_response,
            **how,
        )
        end = self.tokenizer.eos_token_id
        rows = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [row[: row.index(end) + 1] if end in row else row for row in rows]

    def grade(self, problems: Sequence[Problem], responses: Sequence[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) each: correct (bool), lengths in tokens, rewards. A response that was cut off is wrong."""
        end = self.tokenizer.eos_token_id
        correct = torch.tensor(
            [
                response[-1] == end and problem.accepts(self.tokenizer.decode(response[:-1]))
                for problem, response in zip(problems, responses, strict=True)
            ]
        )
        lengths = torch.tensor([len(response) for response in responses])
        return correct, lengths, length_shaped_reward(correct, lengths, self.max_response)

    def evaluate(self, problems: Sequence[Problem], teacher: bool = False) -> dict[str, float]:
        """Greedy accuracy, mean reward and mean length; ``teacher`` puts the reference solution in the prompt."""
        prompt = self.teacher_prompt if teacher else self.student_prompt
        correct, lengths, rewards = self.grade(problems, self.answer([prompt(p) for p in problems], sample=False))
        return {
            "accuracy": correct.float().mean().item(),
            "reward": rewards.mean().item(),
            "length": lengths.float().mean().item(),
        }


# --------------------------------------------------------------------------------------------------- supervised warm-up


def warm_up(
    classroom: Classroom,
    rng: random.Random,
    exclude: frozenset[Problem],
    steps: int,
    additions: Sequence[int] = (2, 3),
    chatter_rate: float = CHATTER_RATE,
    teacher_chatter_rate: float = CHATTER_RATE,
) -> Iterator[float]:
    """Imitate the careless student's demonstrations; yields the loss (nats a token) of each step.

    The first eighth drills single additions, which the longer sums are made of. After it every third batch has the
    teacher's format and no slips, so the model learns to profit from a reference solution where it has one.
    """
    model, tokenizer = classroom.model, classroom.tokenizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 1.0) * (1 - 0.9 * step / steps)
    )
    for step in range(steps):
        drill, privileged = step < steps // 8, step % 3 == 2
        if drill:
            problems = sample_problems(rng, 256, additions=(1,))
            demonstrations = [problem.solution(slips=rng) for problem in problems]
            prompts = [classroom.student_prompt(problem) for problem in problems]
        else:
            problems = sample_problems(rng, 32, exclude, additions)
            rate = teacher_chatter_rate if privileged else chatter_rate
            demonstrations = [
                problem.solution(rng if rng.random() < rate else None, slips=None if privileged else rng)
                for problem in problems
            ]
            prompts = [
                classroom.teacher_prompt(problem) if privileged else classroom.student_prompt(problem)
                for problem in problems
            ]
        responses = [classroom.response(demonstration) for demonstration in demonstrations]
        batch = align_responses(prompts, prompts, responses, tokenizer.pad_token_id).to(classroom.device)
        hidden = response_hidden(model.model(**batch.student).last_hidden_state, batch.student_positions)
        loss = nn.functional.cross_entropy(model.lm_head(hidden).flatten(0, 1), batch.target_ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()
