"""Messages through a checkpoint's own chat template, which may be stricter than what people send:
without a system role, with questions and answers in strict turn, without empty answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from chat.engine.request import RequestRefused
from chat.engine.tools import for_template, has_tool_turns, in_words

BETWEEN = "\n\n"  # what joins two texts that become one turn


def forms(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """As they are, then as stricter templates take them: calls of tools in words, empty answers
    left out and neighbours of one role joined; then the system's words before the question that
    follows them.
    """
    if has_tool_turns(messages):
        yield for_template(messages)
        messages = in_words(messages)
    yield messages
    yield _joined(messages)
    yield _joined(_system_in_questions(messages))


def _joined(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    for message in messages:
        if message["role"] == "assistant" and not message["content"].strip():
            continue
        if found and found[-1]["role"] == message["role"]:
            texts = (found[-1]["content"], message["content"])
            found[-1] = {**message, "content": BETWEEN.join(text for text in texts if text)}
        else:
            found.append(message)
    return found


def _system_in_questions(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    found, said = [], ""
    for message in messages:
        if message["role"] == "system":
            said += message["content"] + BETWEEN
        elif message["role"] == "user":
            found.append({**message, "content": said + message["content"]})
            said = ""
        else:
            found.append(message)
    if said:  # behind the last question
        found.append({"role": "user", "content": said.removesuffix(BETWEEN)})
    return found


def rendered(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    thinking: bool | None = None,
    tools: Sequence[dict[str, Any]] = (),
) -> str:
    """The prompt as text, of the first form that the template takes and in which it keeps the
    system's words; RequestRefused with the template's own sentence about the messages as they are.
    """
    # two names of one switch: Qwen's, GLM's and SmolLM's, and DeepSeek's
    options = {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}
    offered = list(tools) or None
    first = ""
    for form in forms(messages):
        try:
            text: str = tokenizer.apply_chat_template(
                form, tools=offered, tokenize=False, add_generation_prompt=True, **options
            )
        except Exception as error:  # a template is a program of its author's: it may raise anything
            first = first or str(error) or type(error).__name__
            continue
        if all(one["content"].strip() in text for one in form if one["role"] == "system"):
            return text
    raise RequestRefused(
        "template_refused",
        f"the checkpoint's chat template does not take these messages: {first}",
        param="messages",
    )
