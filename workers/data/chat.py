"""Chats to text, with the character ranges that the assistant wrote: only those count in the loss.

A tokenizer that brings a chat template (`chat_template` of tokenizer_config.json, or chat_template.jinja) is obeyed.
Its ranges come from its own `{% generation %}` blocks. Where it has none, a turn is all that the template's loop writes
for the message, behind what `add_generation_prompt` writes. Without a template DEFAULT_TEMPLATE is used. Templates run
in a process of their own (chat_render.py), with a limit of time and memory.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.storage.core.errors import ErrorId, InputError
from headrace.storage.core.outside import parse_json
from headrace.workers.data.chat_render import FIXED_DATE, MEMORY_LIMIT_BYTES

# A chat takes a template about a millisecond.
CPU_LIMIT_S = 5.0
# The names of the tokens are replaced by their texts.
DEFAULT_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages -%}
{{ '<|' + message['role'] + '|>\n' }}
{%- if message['content'] is not defined -%}
{%- set content = '' -%}
{%- elif message['content'] is string -%}
{%- set content = message['content'] -%}
{%- else -%}
{%- set content = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{{ content }}
{%- if message['tool_calls'] -%}{{ message['tool_calls'] | tojson }}{%- endif -%}
{{ eos_token }}
{%- endgeneration -%}
{%- else -%}
{{ content }}
{%- endif -%}
{%- if not loop.last -%}{{ '\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '\n<|assistant|>\n' }}{%- endif -%}"""


@dataclass(frozen=True)
class RenderedChat:
    """A chat as one text, and the (begin, end) character ranges that are targets, in order.

    `exact`: the template's own `{% generation %}` blocks are the ranges.
    """

    text: str
    targets: tuple[tuple[int, int], ...]
    exact: bool


class ChatTemplate:
    """A template, or several by name (`tool_use` serves chats with tools), in a process that renders it.

    Args:
        template: Jinja text, or texts by name.
        special_tokens: names that templates use (`bos_token`, `eos_token`, ...) and their texts.
        where: the file the template comes from, for errors.

    Raises:
        InputError: the template is not valid Jinja.
    """

    def __init__(self, template: str | dict[str, str], *, special_tokens: dict[str, str], where: str) -> None:
        self._where = where
        # The day that the template got as today; empty before its first call.
        self.date = ""
        self._wrote_parts = False
        script = Path(__file__).with_name("chat_render.py")
        # -P: the folder of the script must not be searched for modules.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script), str(CPU_LIMIT_S)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        weakref.finalize(self, _end, self._process)
        templates = template if isinstance(template, dict) else {"default": template}
        answer = self._ask({"templates": templates, "special_tokens": special_tokens}, where)
        if "error" in answer:
            raise InputError(
                f"{where}: its chat_template is not valid Jinja ({answer['error']})", id=ErrorId.chat_template_failed
            )

    def render(self, messages: list[dict[str, Any]], where: str, **variables: Any) -> RenderedChat:
        """Render one chat.

        Args:
            messages: dicts with `role`, and whatever else the template reads.
            where: file and line of the chat, for errors.
            variables: `tools`, `documents` and any other that the template shall see.

        Raises:
            InputError: the template refuses the chat, does not end, needs too much memory, or its assistant turns
                cannot be distinguished.
        """
        answer = self._ask({"messages": messages, "variables": variables}, where)
        if "error" in answer:
            raise InputError(
                f"{where}: the chat template of {self._where} refuses it ({answer['error']})",
                id=ErrorId.chat_template_failed,
            )
        if answer["used_date"] and not self.date:
            self.date = FIXED_DATE.date().isoformat()
            warnings.warn(
                f"{self._where}: its chat template writes today's date; the rows say {FIXED_DATE:%d %b %Y}, so that "
                "they do not depend on the day. Set it in a record's chat_template_kwargs (often `date_string`)",
                stacklevel=2,
            )
        if not self._wrote_parts and any(str(parts) in answer["text"] for parts in _parts(messages)):
            self._wrote_parts = True
            warnings.warn(
                f"{where}: the chat template of {self._where} does not support content in parts: it "
                "writes the list as Python prints it, in transformers too; give `content` as one string",
                stacklevel=2,
            )
        return RenderedChat(answer["text"], tuple((begin, end) for begin, end in answer["targets"]), answer["exact"])

    def _ask(self, request: dict[str, Any], where: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if reply:
            answer: dict[str, Any] = parse_json(reply)
            return answer
        code = self._process.wait()
        reason = f"did not end within {CPU_LIMIT_S:.0f} s" if code == -signal.SIGPROF else f"ended its process ({code})"
        raise InputError(
            f"{where}: the chat template of {self._where} {reason} (memory limit {MEMORY_LIMIT_BYTES >> 20} MiB); mend "
            "the template",
            id=ErrorId.chat_template_failed,
        )


def _parts(messages: list[dict[str, Any]]) -> list[Any]:
    return [message["content"] for message in messages if isinstance(message.get("content"), list)]


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
