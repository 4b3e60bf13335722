"""The process that renders chat templates: one JSON line in, one JSON line out. Run as a script; imports no headrace.

A template comes from outside. Its process may use argv[1] seconds for a chat and MEMORY_LIMIT_BYTES of address space,
and the kernel ends it if it needs more; it opens no file and starts no program. Templates may use what
transformers (utils/chat_template_utils.py) gives them, except that `strftime_now` always returns FIXED_DATE: rows must
not depend on the day of making.
"""

from __future__ import annotations

import datetime
import json
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MEMORY_LIMIT_BYTES, MAX_TEXT_CHARS = 1 << 30, 64 << 20
# The date that Llama's templates write where the date is unknown.
FIXED_DATE = datetime.datetime(2024, 7, 26)
# Private-use characters around a mark; a text that holds them already is refused.
_OPEN, _CLOSE = "\ue000\ue001", "\ue001\ue000"
_MARK = re.compile(f"{_OPEN}(.*?){_CLOSE}")
_REASONING = ("reasoning_content", "thinking", "reasoning")

Message = dict[str, Any]


class _Marks:
    """What the marked rendering writes; nothing while `on` is false."""

    def __init__(self) -> None:
        self.on = False
        self.numbers: dict[int, int] = {}

    def item(self, value: Any, loop: int) -> str:
        """A turn begins, where the loop's item is a message."""
        number = self.numbers.get(id(value))
        return f"{_OPEN}turn {number} {loop}{_CLOSE}" if self.on and number is not None else ""

    def end(self, loop: int) -> str:
        """A loop has ended."""
        return f"{_OPEN}end {loop}{_CLOSE}" if self.on else ""


class _GenerationBlocks(Extension):
    """`{% generation %}...{% endgeneration %}`: what it encloses is written by the assistant."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own interface
    marks: _Marks

    def parse(self, parser: Parser) -> nodes.Node:
        """Replace the block by a call that wraps its text in marks."""
        line_number = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line_number)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{_OPEN}open{_CLOSE}{caller()}{_OPEN}close{_CLOSE}" if self.marks.on else caller()


class _Dict:
    """`dict` without the attributes of a Python class."""

    def __call__(self, *pairs: Any, **values: Any) -> dict[Any, Any]:
        return dict(*pairs, **values)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        """As dict.fromkeys."""
        return dict.fromkeys(*arguments)


class _Namespace(Namespace):
    """`namespace` that keeps no names of Python's own."""

    def __init__(*pairs: Any, **values: Any) -> None:
        for name in dict(*pairs[1:], **values):
            _refuse_private(name)
        Namespace.__init__(*pairs, **values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        Namespace.__setitem__(self, name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")


class Renderer:
    """One compiled template, and the same one with marks at the turns.

    Raises:
        jinja2.TemplateError: not valid Jinja.
    """

    def __init__(self, text: str, special_tokens: dict[str, str]) -> None:
        self._special_tokens, self._marks, self.used_date = special_tokens, _Marks(), False
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, "jinja2.ext.loopcontrols"]
        )
        next(e for e in environment.extensions.values() if isinstance(e, _GenerationBlocks)).marks = self._marks
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": self._strftime_now}
        environment.globals |= {"dict": _Dict(), "namespace": _Namespace}
        environment.globals |= {"headrace_item": self._marks.item, "headrace_end": self._marks.end}
        self.has_blocks = re.search(r"\{%-?\s*generation\s*-?%\}", text) is not None
        self._plain = environment.from_string(text)
        tree = environment.parse(text)
        _mark_loops(tree)
        tree.set_environment(environment)
        self._marked = environment.from_string(tree)

    def render(self, messages: list[Message], variables: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """Text and target ranges of one chat.

        Raises:
            Anything that the template raises. _Undecided: the borders of an assistant turn cannot be found.
        """
        messages = [_as_transformers(message) for message in messages]
        text = self._text(messages, variables)
        if len(text) > MAX_TEXT_CHARS:
            raise ValueError(f"the chat has {len(text)} characters, {MAX_TEXT_CHARS} are the limit")
        if _OPEN in text or _CLOSE in text:
            raise ValueError("the chat holds the private-use characters U+E000 U+E001 that headrace marks turns with")
        if self.has_blocks:
            return text, _blocks(self._events(self._plain, messages, variables, text))
        if not any(message.get("role") == "assistant" for message in messages):
            return text, []
        try:
            ranges = self._turns(messages, variables, text)
        except _Undecided:
            ranges = [self._by_prefix(messages, variables, text, i) for i in _assistants(messages)]
        return text, ranges

    def _text(self, messages: list[Message], variables: dict[str, Any], *, prompt: bool = False) -> str:
        return self._plain.render(self._context(messages, variables, prompt))

    def _context(self, messages: list[Message], variables: dict[str, Any], prompt: bool) -> dict[str, Any]:
        always = {"tools": None, "documents": None, "add_generation_prompt": prompt}
        return {**self._special_tokens, **always, **variables, "messages": messages}

    def _events(
        self, template: jinja2.Template, messages: list[Message], variables: dict[str, Any], wanted: str | None, *,
        prompt: bool = False,
    ) -> list[tuple[int, str]]:  # fmt: skip
        """Marks of a rendering with their places in the text without marks; `("", length)` last."""
        self._marks.numbers = {id(message): i for i, message in enumerate(messages)}
        self._marks.on = True
        try:
            marked = template.render(self._context(messages, variables, prompt))
        finally:
            self._marks.on = False
        parts = _MARK.split(marked)
        text = "".join(parts[::2])
        if wanted is not None and text != wanted:
            raise _Undecided("the template reads its own output")
        events, length = [], 0
        for i, part in enumerate(parts):
            if i % 2:
                events.append((length, part))
            else:
                length += len(part)
        return [*events, (length, text)]

    def _turns(self, messages: list[Message], variables: dict[str, Any], text: str) -> list[tuple[int, int]]:
        """What the template's loop over the messages writes for each turn of the assistant."""
        spans = _spans(self._events(self._marked, messages, variables, text))
        if not spans:
            raise _Undecided("no loop over the messages writes the turns")
        prompt = self._generation_prompt(messages, variables)
        ranges = []
        for i in _assistants(messages):
            own = spans.get(i, [])
            if len(own) > 1:
                raise _Undecided(f"message {i} is written in several places")
            for begin, end in own:
                begins_chat = self._special_tokens.get("bos_token", "")
                begin += len(begins_chat) * text[begin:end].startswith(begins_chat)
                ranges.append((begin + _num_prompt(prompt, text[begin:end]), end))
        return ranges

    def _generation_prompt(self, messages: list[Message], variables: dict[str, Any]) -> str:
        """What `add_generation_prompt` writes behind the turns, whatever a chat's own variables make of it."""
        shared = {key: value for key, value in variables.items() if key in ("tools", "documents")}
        for chat in (messages[: _assistants(messages)[0]], messages):
            prompts = []
            for given in (shared, variables):
                with suppress(Exception):  # a template may refuse half a chat
                    events = self._events(self._marked, chat, given, None, prompt=True) if chat else []
                    if spans := _spans(events):
                        prompts.append(events[-1][1][max(end for own in spans.values() for _, end in own) :])
            if any(prompts):
                return min(filter(None, prompts), key=len)
        return ""

    def _by_prefix(self, messages: list[Message], variables: dict[str, Any], text: str, number: int) -> tuple[int, int]:
        prompt = self._text(messages[:number], variables, prompt=True)
        whole = text if number == len(messages) - 1 else self._text(messages[: number + 1], variables)
        if not (text.startswith(whole) and whole.startswith(prompt)):
            raise _Undecided(
                f"it cannot be found out where assistant message {number} begins and ends; put {{% generation %}} and "
                "{% endgeneration %} around what the assistant writes in the template"
            )
        return len(prompt), len(whole)

    def _strftime_now(self, format: str) -> str:
        self.used_date = True
        return FIXED_DATE.strftime(format)


class _Undecided(ValueError):
    """The turns cannot be distinguished."""


def _assistants(messages: list[Message]) -> list[int]:
    return [i for i, message in enumerate(messages) if message.get("role") == "assistant"]


def _as_transformers(message: Message) -> Message:
    """Keys that are null are left out; reasoning is found under the names that templates read."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _num_prompt(prompt: str, turn: str) -> int:
    """Characters of a turn that the generation prompt has said already: the whole of it, or up to a header's end."""
    ends = [len(prompt), *(header.end() for header in reversed([*re.finditer(r"[>\]:\n]", prompt)]))]
    return next((end for end in ends if turn.startswith(prompt[:end])), 0)


def _spans(events: list[tuple[int, str]]) -> dict[int, list[tuple[int, int]]]:
    """Message number -> the non-empty (begin, end) that loops wrote for it."""
    spans: dict[int, list[tuple[int, int]]] = {}
    running: dict[str, tuple[int, int]] = {}
    for place, mark in events[:-1]:
        kind, *numbers = mark.split()
        number, begin = running.pop(numbers[-1], (-1, place))
        if place > begin:
            spans.setdefault(number, []).append((begin, place))
        if kind == "turn":
            running[numbers[-1]] = (int(numbers[0]), place)
    return spans


def _blocks(events: list[tuple[int, str]]) -> list[tuple[int, int]]:
    places = [place for place, mark in events[:-1] if mark in ("open", "close")]
    return [(begin, end) for begin, end in zip(places[::2], places[1::2], strict=True) if end > begin]


def _mark_loops(tree: nodes.Template) -> None:
    """Write a mark at the start of every iteration and behind every loop."""
    count = iter(range(sys.maxsize))

    def call(name: str, *arguments: nodes.Expr) -> nodes.Output:
        return nodes.Output([nodes.Call(nodes.Name(name, "load"), list(arguments), [], None, None)])

    def with_ends(statements: list[Any]) -> Iterator[Any]:
        for statement in statements:
            yield statement
            if isinstance(statement, nodes.For) and isinstance(statement.target, nodes.Name):
                loop = nodes.Const(next(count))
                statement.body.insert(0, call("headrace_item", nodes.Name(statement.target.name, "load"), loop))
                yield call("headrace_end", loop)

    def visit(node: nodes.Node) -> None:
        for child in node.iter_child_nodes():
            visit(child)
        for name, value in node.iter_fields():
            if isinstance(value, list):
                setattr(node, name, list(with_ends(value)))

    visit(tree)
    for output in tree.find_all((nodes.Output, nodes.Call, nodes.Name, nodes.Const)):
        if output.lineno is None:
            output.lineno = 1


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Templates:
    """Templates by name, compiled when they are first used; `default` at once."""

    def __init__(self, texts: dict[str, str], special_tokens: dict[str, str]) -> None:
        self._texts, self._special_tokens = texts, special_tokens
        self._compiled: dict[str, Renderer] = {}
        if "default" in texts:
            self._named("default")

    def answer(self, messages: list[Message], variables: dict[str, Any]) -> dict[str, Any]:
        """The reply for one chat. Chats with tools take the template `tool_use` where there is one."""
        has_tools = variables.get("tools") is not None and "tool_use" in self._texts
        renderer = self._named("tool_use" if has_tools else "default")
        text, targets = renderer.render(messages, variables)
        return {"text": text, "targets": targets, "exact": renderer.has_blocks, "used_date": renderer.used_date}

    def _named(self, name: str) -> Renderer:
        if name not in self._texts:
            raise ValueError(f"there is no template {name!r} among {sorted(self._texts)}")
        if name not in self._compiled:
            self._compiled[name] = Renderer(self._texts[name], self._special_tokens)
        return self._compiled[name]


def main() -> None:
    """Compile the templates of the first line, then answer one chat a line."""
    with suppress(ZeroDivisionError):  # jinja2 loads what it needs; no file can be opened afterwards
        Renderer("{{ '\\n' }}{{ 1 / 0 }}", {}).render([], {})
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    cpu_limit_s = float(sys.argv[1])
    templates: _Templates | None = None
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)  # its signal ends the process
        answer: dict[str, Any] = {}
        try:
            request = json.loads(line)
            if templates is None:
                templates = _Templates(request["templates"], request["special_tokens"])
            else:
                answer = templates.answer(request["messages"], request["variables"])
            reply = json.dumps(answer)
        except Exception as error:  # every error of a template is reported
            reply = json.dumps({"error": f"{type(error).__name__}: {error}"[:2000]})
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(reply, flush=True)


if __name__ == "__main__":
    main()
