"""One record of JSON or Parquet to a text or a chat, checked.

| keys | what |
|---|---|
| `text` | a text |
| `messages`, and `tools`, `documents`, `chat_template_kwargs` | a chat as transformers' apply_chat_template takes it |
| `conversations` of `from` and `value`, and `system`, `tools` | ShareGPT |
| `instruction`, `output`, and `input`, `system`, `history` | Alpaca; an input is a line behind its instruction |
| `prompt` or `messages`, `responses`, and what a chat has | responses to one prompt; only they count in the loss |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from headrace.storage.core.errors import ErrorId, InputError
from headrace.storage.core.outside import parse_json

Messages = list[dict[str, Any]]
# What a record of a chat may hold besides its turns, as transformers' apply_chat_template takes it.
CHAT_VARIABLES = ("tools", "documents", "chat_template_kwargs")
# The key that tells what a record is, and what else is read of it.
PROMPTS = ("prompt", "messages")
KEYS = {
    "responses": (*PROMPTS, "weights", *CHAT_VARIABLES),
    "messages": CHAT_VARIABLES,
    "conversations": ("system", *CHAT_VARIABLES),
    "instruction": ("input", "output", "system", "history"),
    "text": (),
}
WANTED = (
    "`text`, chat `messages`, ShareGPT `conversations`, Alpaca `instruction` and `output`, or `prompt` and `responses`"
)
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
# No chat needs more, and code that walks through one may recurse.
_MAX_DEPTH = 64


@dataclass(frozen=True)
class Responses:
    """A prompt and what follows it, each time alone: texts, or messages of a chat."""

    prompt: str | Messages
    responses: tuple[str | Messages, ...]

    @property
    def sequences(self) -> list[str | Messages]:
        """The prompt with every response."""
        return [self.prompt + response for response in self.responses]  # type: ignore[operator]


Content = str | Messages | Responses


@dataclass(frozen=True)
class Record:
    """What a record holds.

    Args:
        content: text, the messages of a chat, or a prompt with responses.
        variables: of a chat: what its template sees besides the messages (`tools`, `documents`, ...).
    """

    content: Content
    variables: dict[str, Any] = field(default_factory=dict)


def wrong(text: str) -> InputError:
    """The error of a record or file that cannot be read."""
    return InputError(text, id=ErrorId.data_wrong)


def kind_of(keys: Iterable[str], where: str) -> str:
    """The key of KEYS that tells what a record, or a table of them, is.

    Raises:
        InputError: none is there.
    """
    names = list(keys)
    beside = {"instruction": ("output",), "responses": PROMPTS}
    for key in KEYS:
        if key in names and (key not in beside or any(other in names for other in beside[key])):
            return key
    raise wrong(f"{where}: none of {WANTED} among its keys {sorted(names)[:8]}")


def read_record(values: Any, where: str) -> Record | None:
    """A record; None of one that is null.

    Raises:
        InputError: it is none of these kinds, or a part of another type; names `where`.
    """
    if values is None:
        return None
    if not isinstance(values, dict):
        raise wrong(f"{where}: an object with {WANTED} is wanted, got {kind_name(values)}")
    key = kind_of(values, where)
    if key == "responses" and values[key] is None and "messages" in values:
        key = "messages"  # of a table, some of whose chats have responses
    value = values[key]
    if value is None:
        return None
    if key == "text":
        if not isinstance(value, str):
            raise wrong(f"{where}: `text` must be a string, got {kind_name(value)}")
        return Record(value)
    if _is_too_deep(values):
        raise wrong(f"{where}: nested more than {_MAX_DEPTH} deep")
    if key == "instruction":
        return Record(_alpaca(values, where))
    if key == "responses":
        return Record(_responses(values, where), _chat_variables(values, where))
    messages = value if key == "messages" else _sharegpt(value, values.get("system"), where)
    return Record(check_messages(messages, where), _chat_variables(values, where))


def texts_of(content: Content) -> list[str]:
    """The text, or the texts of all messages; a prompt once, and those of its responses."""
    if isinstance(content, Responses):
        return [text for part in (content.prompt, *content.responses) for text in texts_of(part)]
    return [content] if isinstance(content, str) else [text for message in content for text in _strings(message)]


def _strings(value: Any) -> Iterator[str]:
    """All texts in a message, without its keys and its role."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
    elif isinstance(value, dict):
        for key, part in value.items():
            if key not in ("role", "type"):
                yield from _strings(part)


def without_nulls(value: Any) -> Any:
    """A value of Parquet without the keys that only the column's type puts there."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            part
            for node in level
            if isinstance(node, dict | list)
            for part in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return False
    return True


def _alpaca(values: dict[str, Any], where: str) -> Messages:
    def text(key: str, *, may_miss: bool = False) -> str:
        value = values.get(key)
        if value is None and may_miss:
            return ""
        if not isinstance(value, str):
            raise wrong(f"{where}: `{key}` must be a string, got {kind_name(value) if key in values else 'nothing'}")
        return value

    turns = []
    for pair in values.get("history") or ():
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise wrong(f"{where}: `history` must be pairs of an instruction and its answer, got {kind_name(pair)}")
        turns.append(pair)
    given = text("input", may_miss=True)
    turns.append([text("instruction") + ("\n" + given if given else ""), text("output")])
    system = text("system", may_miss=True)
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def _responses(values: dict[str, Any], where: str) -> Responses:
    """A prompt is a text or the messages of a chat; there a response is a turn, or several, or the assistant's text."""
    found = [key for key in PROMPTS if values.get(key) is not None]
    if len(found) != 1:
        raise wrong(
            f"{where}: `responses` belong to one of `prompt` and `messages`, got {' and '.join(found) or 'none'}"
        )
    prompt, responses = values[found[0]], values["responses"]
    if values.get("weights") is not None:
        raise wrong(f"{where}: `weights` of responses are not supported: every target counts alike; leave them out")
    if not isinstance(responses, list) or not responses:
        raise wrong(f"{where}: `responses` must be a non-empty list, got {kind_name(responses)}")
    if isinstance(prompt, str) and found == ["prompt"]:
        for number, response in enumerate(responses):
            if not isinstance(response, str):
                raise wrong(
                    f"{where}: response {number}: `prompt` is a text, so a string is wanted, got {kind_name(response)}"
                )
        return Responses(prompt, tuple(responses))
    turns = [[{"role": "assistant", "content": each}] if isinstance(each, str) else each for each in responses]
    turns = [[each] if isinstance(each, dict) else each for each in turns]
    checked = [check_messages(each, f"{where}: response {number}") for number, each in enumerate(turns)]
    return Responses(check_messages(prompt, where), tuple(checked))


def _sharegpt(turns: Any, system: Any, where: str) -> Any:
    """Messages of `conversations`; turns that have a `role` are messages already."""
    if not isinstance(turns, list):
        raise wrong(f"{where}: `conversations` must be a list, got {kind_name(turns)}")
    messages: list[Any] = [{"role": "system", "content": system}] if system else []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or "role" in turn:
            messages.append(turn)
            continue
        speaker = turn.get("from")
        role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise wrong(
                f"{where}: turn {i}: `from` is {speaker!r}, one of {', '.join(_SHAREGPT_ROLES)} is wanted; write other "
                "chats as `messages` with `role`, `content` and `tool_calls`"
            )
        if not isinstance(turn.get("value"), str):
            raise wrong(f"{where}: turn {i} needs `value` as a string, got {kind_name(turn.get('value'))}")
        messages.append({"role": role, "content": turn["value"]})
    return messages


def _chat_variables(record: dict[str, Any], where: str) -> dict[str, Any]:
    """What the template sees besides the messages."""
    variables: dict[str, Any] = {}
    for key in CHAT_VARIABLES:
        value = record.get(key)
        if value is None or value == "":
            continue
        if isinstance(value, str):  # Parquet files often hold them as JSON text
            try:
                value = parse_json(value)
            except ValueError as error:
                raise wrong(f"{where}: `{key}` is text that is not JSON ({error})") from error
            if _is_too_deep(value):
                raise wrong(f"{where}: `{key}` is nested more than {_MAX_DEPTH} deep")
        if key == "chat_template_kwargs":
            if not isinstance(value, dict):
                raise wrong(f"{where}: `{key}` must be an object, got {kind_name(value)}")
            reserved = {"messages", "add_generation_prompt", "continue_final_message"} & set(value)
            if reserved:
                raise wrong(f"{where}: `{key}` may not set {sorted(reserved)}")
            variables |= value
        elif not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
            raise wrong(f"{where}: `{key}` must be a list of objects, got {kind_name(value)}")
        else:
            variables[key] = value
    return variables


def check_messages(value: Any, where: str) -> Messages:
    """Chat messages as plain dicts.

    Raises:
        InputError: not a non-empty list of objects with a `role`; `content` is a string, a list of parts, or null.
    """
    if not isinstance(value, list) or not value:
        raise wrong(f"{where}: `messages` must be a non-empty list, got {kind_name(value)}")
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise wrong(f"{where}: message {i} must be an object with `role` and `content`, got {kind_name(message)}")
        if not isinstance(message.get("role"), str):
            got = kind_name(message["role"]) if "role" in message else "nothing"
            raise wrong(f"{where}: message {i} needs `role` as a string, got {got}")
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        may_be_null = content is None and message["role"] == "assistant"  # a turn of tool calls only
        if not may_be_null and not isinstance(content, str | list):
            got = kind_name(content) if "content" in message else "nothing"
            raise wrong(f"{where}: message {i} needs `content` as a string, got {got}")
        for part in parts:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise wrong(f"{where}: message {i}: parts of `content` must be of type text, with a `text`")
    # A key that is null looks missing to a template, as in transformers.
    return [{key: part for key, part in message.items() if part is not None} for message in value]


def kind_name(value: Any) -> str:
    """The type of a JSON value, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    if value == []:
        return "an empty list"
    return names.get(type(value), "a number")
