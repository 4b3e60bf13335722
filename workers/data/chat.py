"""Chats to text, with the character ranges that the assistant wrote: only those count in the loss.

A tokenizer that brings a chat template (`chat_template` of tokenizer_config.json, or chat_template.jinja) is obeyed.
Its ranges come from its own `{% generation %}` blocks; where it has none, an assistant turn begins where the prompt
rendered up to it ends, and stops behind its content and the special token that closes the turn. Without a template
DEFAULT_TEMPLATE is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from headrace.storage.core.errors import InputError

DEFAULT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|' + message['role'] + '|>\n' }}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{ message['content'] + eos_token }}{%- endgeneration -%}
{%- else -%}
{{ message['content'] }}
{%- endif -%}
{%- if not loop.last -%}{{ '\n' }}{%- endif -%}
{%- endfor -%}"""

# Private-use characters that no text of a template is likely to hold; checked before use.
_OPEN, _CLOSE, _SENTINEL = "\ue000\ue001", "\ue001\ue000", "\ue000\ue002\ue000"


@dataclass(frozen=True)
class RenderedChat:
    """A chat as one text, and the (begin, end) character ranges that are targets, in order."""

    text: str
    targets: tuple[tuple[int, int], ...]


class _GenerationBlocks(Extension):
    """`{% generation %}...{% endgeneration %}`: marks what it encloses, so that the ranges survive rendering."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own interface

    def parse(self, parser: Parser) -> nodes.Node:
        """Replace the block by a call that wraps its text in the marks."""
        line_number = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line_number)

    def _mark(self, caller: Callable[[], str]) -> str:
        return _OPEN + caller() + _CLOSE


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, **options: Any) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(value, **{"ensure_ascii": False, **options})


class ChatTemplate:
    """A compiled template. `strftime_now` is not offered: rows must not depend on the day they were made.

    Args:
        template: Jinja text; None takes DEFAULT_TEMPLATE.
        special_tokens: names that templates use (`bos_token`, `eos_token`, ...) and their texts.
        closing_tokens: texts of all special tokens; the one right behind an assistant's content is a target too.
        where: the file the template comes from, for errors.

    Raises:
        InputError: the template is not valid Jinja.
    """

    def __init__(
        self, template: str | None, *, special_tokens: dict[str, str], closing_tokens: tuple[str, ...], where: str
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        text = DEFAULT_TEMPLATE if template is None else template
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateError as error:
            raise InputError(f"{where}: its chat_template is not valid Jinja ({error})") from error
        self._has_blocks = re.search(r"\{%-?\s*generation\s*-?%\}", text) is not None
        self._special_tokens, self._where = special_tokens, where
        longest_first = sorted(closing_tokens, key=len, reverse=True)
        alternatives = "|".join(re.escape(token) for token in longest_first)
        self._closing = re.compile(rf"\s*(?:{alternatives})") if alternatives else None

    def render(self, messages: list[dict[str, Any]], where: str) -> RenderedChat:
        """Render one chat.

        Args:
            messages: dicts with `role` and `content`.
            where: file and line of the chat, for errors.

        Raises:
            InputError: the template refuses the chat, or its assistant turns cannot be told apart.
        """
        if any(mark in message["content"] for message in messages for mark in (_OPEN, _CLOSE, _SENTINEL)):
            raise InputError(f"{where}: holds private-use characters U+E000..U+E002 that headrace marks turns with")
        text = self._render(messages, where)
        if self._has_blocks:
            return _unmark(text)
        ranges = [
            self._turn(text, messages, i, where) for i, message in enumerate(messages) if message["role"] == "assistant"
        ]
        return RenderedChat(text, tuple(ranges))

    def _render(self, messages: list[dict[str, Any]], where: str, *, add_generation_prompt: bool = False) -> str:
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._special_tokens
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise InputError(f"{where}: the chat template of {self._where} refuses it ({error})") from error

    def _turn(self, text: str, messages: list[dict[str, Any]], number: int, where: str) -> tuple[int, int]:
        """Character range of the assistant's message `number` in the whole rendering."""
        prompt = self._render(messages[:number], where, add_generation_prompt=True)
        marked = [dict(message) for message in messages]
        content = marked[number]["content"]
        words = content.rstrip()  # the sentinel must not protect spaces that the template strips
        marked[number]["content"] = words + _SENTINEL + content[len(words) :]
        with_sentinel = self._render(marked, where)
        end = with_sentinel.find(_SENTINEL)
        if not text.startswith(prompt) or with_sentinel.replace(_SENTINEL, "") != text or end < len(prompt):
            raise InputError(
                f"{where}: the chat template of {self._where} renders assistant message {number} in a way that "
                "depends on the rest of the chat; mark what counts with {% generation %} blocks in the template"
            )
        closing = self._closing.match(text, end) if self._closing else None
        return len(prompt), closing.end() if closing else end


def _unmark(marked: str) -> RenderedChat:
    """Take the marks out of a rendering and keep where they were."""
    parts: list[str] = []
    ranges: list[tuple[int, int]] = []
    length = begin = 0
    for part in re.split(f"({_OPEN}|{_CLOSE})", marked):
        if part == _OPEN:
            begin = length
        elif part == _CLOSE:
            ranges.append((begin, length))
        else:
            parts.append(part)
            length += len(part)
    return RenderedChat("".join(parts), tuple(ranges))
