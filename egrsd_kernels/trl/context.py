"""What student and teacher read: the rows of the data set, as the chat template renders them, in the model's window."""

import copy
import html
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from datasets import Dataset

from egrsd_kernels.rl import Message, teacher_messages

IMAGES = ("images", "image")  # columns of them
NO_PROMPT = [{"role": "user", "content": ""}]  # as TRL has it
BATCH = 512  # rows that are tokenised in one call
# No tokenizer makes more tokens of a byte than this, so short texts need no counting.
TOKENS_PER_BYTE = 4
REASONING = ("reasoning_content", "reasoning", "thinking")  # where messages keep text beside their content


def privileged_conversation(
    example: Mapping[str, Any], solution_column: str, template: Sequence[Message]
) -> list[dict[str, str]]:
    """The teacher's conversation for one row of the dataset, or a ValueError that names the column at fault."""
    for column in ("prompt", solution_column):
        if column not in example:
            raise ValueError(f"{column}: missing in a row of the dataset")
    prompt, solution = example["prompt"], example[solution_column]
    if isinstance(prompt, str) or not prompt:
        raise ValueError(f"prompt: expected a conversation, a list of messages, got {prompt!r}")
    for message in prompt:
        if not (isinstance(message, Mapping) and isinstance(message.get("role"), str)) or (
            message.get("content") is None and not message.get("tool_calls")
        ):
            raise ValueError(f"prompt: expected messages with role and content, got {message!r}")
    if not isinstance(solution, str) or not solution.strip():
        raise ValueError(f"{solution_column}: expected the text of a reference solution, got {solution!r}")
    return teacher_messages(prompt, solution, template)


def check_columns(name: str, dataset: Any, expected: Sequence[str]) -> None:
    """A ValueError where the dataset (or one of several in a mapping) lacks a column. ``name``: the argument's."""
    for part in _parts(dataset):
        columns = getattr(part, "column_names", None)
        for column in expected:
            if columns is not None and column not in columns:
                raise ValueError(f"{name}: expected a column {column!r}, got {', '.join(columns)}")


def check_rows(name: str, dataset: Any, reader: "Reader") -> None:
    """A ValueError for the first row that ``reader`` refuses, before anything is generated."""
    for part in _parts(dataset):
        if isinstance(part, Dataset):  # a stream is checked as it comes
            if reader.images and reader.teacher == "teacher_template":  # texts are checked: nothing needs decoding
                part = part.remove_columns([name for name in IMAGES if name in part.column_names])
            rows = ((f"{name}, row {index}", example) for index, example in enumerate(part))
            while batch := list(islice(rows, BATCH)):
                reader.read(batch)


def _parts(dataset: Any) -> Sequence[Any]:
    return list(dataset.values()) if isinstance(dataset, Mapping) else [dataset]


def context_window(config: Any) -> int | None:
    """The tokens that a model with ``config`` reads at most, or None where nothing bounds them."""
    config = config.get_text_config(decoder=True)
    window = getattr(config, "max_position_embeddings", None) or 0  # XLNet's is -1: no limit
    alibi = getattr(config, "alibi", False) or getattr(config, "position_embedding_type", None) == "alibi"
    if window <= 0 or alibi:
        return None
    # Command R states its window there.
    window = max(window, getattr(config, "model_max_length", None) or 0)
    # With these scalings the config states the window before the extension. With others, and where each kind of layer
    # has a scaling of its own, it states the extended window.
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if (rope.get("rope_type") or rope.get("type")) in ("linear", "dynamic", "yarn"):
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        window = max(window, int(original * (rope.get("factor") or 1)))
    return window


@dataclass(frozen=True)
class Reader:
    """Reads rows as generation and the teacher's pass will, and refuses what one of them could not read.

    ``tokenizer``: a tokenizer, or the processor of a model that reads ``images``. Such prompts may be longer than
    what is measured here, where each image is a token or so.
    ``options``: what apply_chat_template gets beside the conversation; ``tools``: and the tools of a row.
    ``teacher``: what words the teacher's conversation. ``generated``: a bound on prompt and completion together that
    generation keeps by itself. ``environments``: a row need not have a prompt, they begin with one.
    ``window``: the student's, and the teacher's unless that has one of its own.
    """

    tokenizer: Any
    options: Mapping[str, Any]
    conversation_of: Callable[[Mapping[str, Any]], Any]
    solution_column: str
    window: int | None
    completion: int | None
    teacher: str = "teacher_template"
    generated: int | None = None
    images: bool = False
    tools: Callable[[Mapping[str, Any]], Sequence[Any] | None] = lambda _: None
    environments: bool = False
    teacher_window: float | None = None

    def __post_init__(self):
        longest = min(self.completion or 1, self.generated or self.completion or 1)
        if self.window is not None and longest >= self.window:
            raise ValueError(
                f"max_completion_length: expected less than the model's window of {self.window} tokens, "
                f"got {self.completion}"
            )

    def read(self, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Any]:
        """The teacher's conversations of (name, row) pairs, or a ValueError with the name of the first at fault."""
        read = []  # (prompt, its text), (the teacher's conversation, its text)
        for name, example in rows:
            try:
                if self.environments:
                    example = {"prompt": NO_PROMPT, **example}
                if not self.images:
                    self._refuse_images(example)
                conversation, prompt = self.conversation_of(_copied(example)), example["prompt"]
                tools = self.tools(example) or None  # some templates write about tools where there is an empty list
                text = self._render("prompt", prompt, tools), self._render(self.teacher, conversation, tools)
                self._find_solution(example, conversation, text[1])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            read.append(((prompt, text[0]), (conversation, text[1])))
        self._fit([name for name, _ in rows], read)
        return [conversation for _, (conversation, _) in read]

    def _refuse_images(self, example: Mapping[str, Any]) -> None:
        column = next((name for name in IMAGES if name in example), IMAGES[-1])
        prompt = example.get("prompt")
        parts = [part for message in _messages(prompt) for part in _parts_of(message)]
        if example.get(column, []) != []:
            name = column
        elif any(isinstance(part, Mapping) and part.get("type") == "image" for part in parts):
            name = "prompt"
        else:
            return
        raise ValueError(
            f"{name}: images need a model that reads them, and its processor as processing_class; leave the images out"
        )

    def _render(self, name: str, conversation: Any, tools: Sequence[Any] | None) -> str:
        if isinstance(conversation, str):
            return conversation
        if self.images:
            conversation = [in_parts(message) for message in conversation]
        try:
            return self.tokenizer.apply_chat_template(
                [conversation], tools=tools, add_generation_prompt=True, tokenize=False, **self.options
            )[0]
        except Exception as error:  # whatever a template raises
            reason = " ".join(str(error).split()) or type(error).__name__
            roles = ", ".join(str(message.get("role")) for message in _messages(conversation))
            raise ValueError(
                f"{name}: the chat template refuses this conversation ({reason}); its roles are {roles}: "
                "word it with roles, in an order, and contents that the template takes"
            ) from error

    def _find_solution(self, example: Mapping[str, Any], conversation: Any, text: str) -> None:
        """A ValueError where the chat template drops what the teacher's conversation adds to the prompt.

        That is the solution. Where the conversation words it anew, it is all that was added. A conversation without
        anything of it is the user's choice.
        """
        if isinstance(conversation, str):
            return
        prompt = list(_messages(example["prompt"]))
        added = [said for message in conversation if message not in prompt for said in _texts(message)]
        solution = example.get(self.solution_column)
        solution = solution.strip() if isinstance(solution, str) else ""
        if solution and any(solution in said for said in added):
            added = [solution]
        for said in added:
            if not _contains(text, said.strip()):
                raise ValueError(
                    f"{self.solution_column}: the chat template drops it, or a part of it, from the teacher's "
                    f"conversation ({_beginning(said)}); store it without tags such as <think>, or put it into a "
                    f"user message by {self.teacher}"
                )

    def _fit(self, names: Sequence[str], read: Sequence[Sequence[tuple[Any, str]]]) -> None:
        """A ValueError where a prompt and the completion behind it are longer than the window."""
        student_window = math.inf if self.window is None else self.window
        windows = student_window, student_window if self.teacher_window is None else self.teacher_window
        rooms = [window - (self.completion or 1) for window in windows]

        def may_be_long(row: Sequence[tuple[Any, str]]) -> bool:
            each = zip(row, rooms, strict=True)
            return any(len(text.encode()) * TOKENS_PER_BYTE > room for (_, text), room in each)

        long = [i for i, row in enumerate(read) if may_be_long(row)]
        lengths = (self._lengths([read[i][side] for i in long]) for side in (0, 1))
        for i, student, teacher in zip(long, *lengths, strict=True):
            completion = self.completion or 1
            if self.generated is not None:
                completion = min(completion, max(self.generated - student, 1))
            sides = (student, "prompt", "prompt"), (teacher, "teacher's prompt", self.solution_column)
            for (tokens, whose, remedy), window in zip(sides, windows, strict=True):
                if tokens + completion > window:
                    raise ValueError(
                        f"{names[i]}: the {whose} has {tokens} tokens, and with a completion of up to {completion} "
                        f"that is more than the model's window of {window}; shorten the {remedy}, set a smaller "
                        "max_completion_length, or extend the window by rope scaling where the model allows it"
                    )

    def _lengths(self, read: Sequence[tuple[Any, str]]) -> list[int]:
        """Tokens of (conversation, its text) pairs. A plain text gets the tokens that a template would have put in."""
        if not read:
            return []
        tokenizer = getattr(self.tokenizer, "tokenizer", self.tokenizer)
        plain = isinstance(read[0][0], str)
        ids = tokenizer([text for _, text in read], add_special_tokens=plain)["input_ids"]
        return [len(row) for row in ids]


def row_name(dataset: str, example: Mapping[str, Any]) -> str:
    """A name for a row without an index."""
    messages = list(_messages(example.get("prompt")))
    texts = _texts(messages[-1]) if messages else [str(example.get("prompt"))]
    return f"{dataset}, the row {_beginning(' '.join(texts))}"


def in_parts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with its content as a list of parts, which processors' templates read."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def images_of(conversation: Any) -> list[Any]:
    """The images in a conversation's parts, in their order."""
    parts = (part for message in _messages(conversation) for part in _parts_of(message))
    return [part["image"] for part in parts if isinstance(part, Mapping) and part.get("type") == "image"]


def _copied(example: Mapping[str, Any]) -> dict[str, Any]:
    """A row that a function may write into, or into its prompt, which is the student's; with the very same images."""
    images = {id(image): image for image in images_of(example.get("prompt"))}
    return {**example} | ({"prompt": copy.deepcopy(example["prompt"], images)} if "prompt" in example else {})


def _beginning(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "…")


def _messages(conversation: Any) -> Iterator[Mapping[str, Any]]:
    listed = conversation if isinstance(conversation, Sequence) and not isinstance(conversation, str) else ()
    return (message for message in listed if isinstance(message, Mapping))


def _parts_of(message: Mapping[str, Any]) -> Sequence[Any]:
    content = message.get("content")
    return content if isinstance(content, list | tuple) else [content]


def _texts(message: Mapping[str, Any]) -> list[str]:
    """The texts of a message: its content, as a whole or in parts, and the reasoning beside it."""
    parts = [part.get("text") if isinstance(part, Mapping) else part for part in _parts_of(message)]
    return [text for text in (*parts, *(message.get(key) for key in REASONING)) if isinstance(text, str)]


def _contains(rendered: str, text: str) -> bool:
    """Whether a template that may trim, break or escape ``text`` left it in ``rendered``."""
    letters = _letters(text)
    return text in rendered or any(
        letters and letters in _letters(form) for form in (rendered, html.unescape(rendered), _unescaped(rendered))
    )


def _letters(text: str) -> str:
    return re.sub(r"\W+", "", text)


def _unescaped(text: str) -> str:
    """``text`` without the escapes of JSON."""

    def character(match: re.Match) -> str:
        return chr(int(match[1], 16)) if match[1] else " " if match[2] in "nrtbf" else match[2]

    return re.sub(r"\\(?:u([0-9a-fA-F]{4})|(.))", character, text)
