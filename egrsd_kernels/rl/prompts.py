"""The privileged teacher's conversation: the student's prompt x and a reference solution s* (arXiv 2605.13255)."""

from collections.abc import Mapping, Sequence

Message = Mapping[str, str]

TWO_TURN: tuple[Message, ...] = (
    {"role": "assistant", "content": "{solution}"},
    {
        "role": "user",
        "content": "The solution above is a correct reference. "
        "Solve the same problem again with your own reasoning, and end with the final answer.",
    },
)
"""The reference solution as a finished first turn, then a second turn that asks the problem again."""


def teacher_messages(
    prompt: str | Sequence[Message], solution: str, template: Sequence[Message] = TWO_TURN
) -> list[dict[str, str]]:
    """The teacher's conversation: the student's prompt x, then the reference solution s* as ``template`` words it.

    The result is what ``tokenizer.apply_chat_template(..., add_generation_prompt=True)`` takes. Some chat templates
    drop the reasoning of earlier turns (Qwen3's drops ``<think>…</think>``): a solution in such tags would be lost,
    so pass it without them.

    Args:
        prompt: the user's message, or the conversation that ends with it.
        solution: s*, the privileged reference solution.
        template: messages that follow the prompt, with ``{solution}`` where the solution goes. Many chat templates
            want roles to alternate: it then begins with the assistant's, behind a prompt that ends with the user's.
    """
    # replace, not str.format: solutions and templates are full of LaTeX braces.
    if not any("{solution}" in message["content"] for message in template):
        raise ValueError("template: expected '{solution}' in one of its messages; without it the teacher knows no more")
    conversation = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [dict(message) for message in conversation] + [
        {**message, "content": message["content"].replace("{solution}", solution)} for message in template
    ]
