"""Chat templates: the ranges of the assistant, against what templates of known families must give."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.helpers.tiers import has_id
from headrace.storage.core.errors import ErrorId, InputError
from headrace.workers.data import chat
from headrace.workers.data.chat import DEFAULT_TEMPLATE, ChatTemplate

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# As Qwen3's: only the turn that nothing follows has its empty thoughts written out.
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GENERATION = (
    "{% for message in messages %}{% if message.role == 'assistant' %}A:{% generation %}{{ message.content }}<|im_end|>"
    "{% endgeneration %}{% else %}Q:{{ message.content }}{% endif %}\n{% endfor %}"
)
SPECIALS = {"bos_token": "<|bos|>", "eos_token": "</s>"}
CHAT = [
    {"role": "user", "content": "what is a mill?"},
    {"role": "assistant", "content": "a mill grinds."},
    {"role": "user", "content": "a mill grinds."},  # the assistant's words in another mouth do not count
    {"role": "assistant", "content": "indeed "},
]


def template(text: str) -> ChatTemplate:
    return ChatTemplate(text, special_tokens=SPECIALS, where="tokenizer.json")


@pytest.mark.parametrize(
    ("text", "begins", "targets"),
    [
        (DEFAULT_TEMPLATE, "<|bos|><|user|>\nwhat is", ["a mill grinds.</s>", "indeed </s>"]),
        (CHATML, "<|im_start|>user\nwhat", ["a mill grinds.<|im_end|>", "indeed <|im_end|>"]),
        (LLAMA3, "<|bos|><|start_header_id|>user", ["a mill grinds.<|eot_id|>", "indeed<|eot_id|>"]),
        (LLAMA2, "<|bos|>[INST] what", [" a mill grinds. </s>", " indeed </s>"]),
        (THINKING, "<|im_start|>user", ["a mill grinds.<|im_end|>", "<think>\n\n</think>\n\nindeed <|im_end|>"]),
        (GENERATION, "Q:what", ["a mill grinds.<|im_end|>", "indeed <|im_end|>"]),
    ],
)
def test_targets_are_what_the_assistant_writes(text: str, begins: str, targets: list[str]) -> None:
    rendered = template(text).render(CHAT, "here")
    assert rendered.text.startswith(begins)
    assert [rendered.text[begin:end].removesuffix("\n") for begin, end in rendered.targets] == targets
    assert "\ue000" not in rendered.text


def test_default_template_in_full() -> None:
    text = template(DEFAULT_TEMPLATE).render(CHAT[:2], "here").text
    assert text == "<|bos|><|user|>\nwhat is a mill?\n<|assistant|>\na mill grinds.</s>"


def test_a_chat_without_an_assistant_has_no_targets() -> None:
    assert template(CHATML).render(CHAT[:1], "here").targets == ()
    assert template(DEFAULT_TEMPLATE).render(CHAT[:1], "here").targets == ()


def test_ranges_equal_those_of_transformers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, ranges = render_jinja_template(
        [CHAT], chat_template=GENERATION, return_assistant_tokens_mask=True, **SPECIALS
    )
    ours = template(GENERATION).render(CHAT, "here")
    assert ours.text == texts[0]
    assert list(ours.targets) == [tuple(r) for r in ranges[0]]
    for text in (CHATML, LLAMA3, LLAMA2, THINKING):
        theirs, _ = render_jinja_template([CHAT], chat_template=text, **SPECIALS)
        assert template(text).render(CHAT, "here").text == theirs[0]


def test_templates_that_cannot_be_used_are_named() -> None:
    with pytest.raises(InputError, match=r"tokenizer.json: its chat_template is not valid Jinja"):
        template("{% for %}")
    with pytest.raises(InputError, match=r"line 7: .*tokenizer.json refuses it \(TemplateError: roles must"):
        template("{{ raise_exception('roles must alternate') }}").render(CHAT, "line 7")
    by_index = "{% for i in range(messages | length) %}{{ messages | length }}{{ messages[i].content }}{% endfor %}"
    with pytest.raises(InputError, match=r"line 7: .* assistant message 1 .*generation"):
        template(by_index).render(CHAT, "line 7")
    with pytest.raises(InputError, match=r"line 7: .*holds the private-use characters"):
        template(DEFAULT_TEMPLATE).render([{"role": "user", "content": "\ue000\ue001"}], "line 7")


def test_templates_run_in_a_sandbox_and_know_no_date() -> None:
    with pytest.raises(InputError, match="refuses it"):
        template("{{ ''.__class__.__mro__[1].__subclasses__() }}").render(CHAT, "here")
    with pytest.warns(UserWarning, match="writes today's date"):
        assert template("{{ strftime_now('%d %b %Y') }}").render(CHAT[:1], "here").text == "26 Jul 2024"


def test_parts_that_a_template_does_not_know_are_said() -> None:
    chat = [{"role": "user", "content": [{"type": "text", "text": "what?"}]}]
    with pytest.warns(UserWarning, match="line 3: .*give `content` as one string"):
        assert "[{'type': 'text', 'text': 'what?'}]" in template(LLAMA3).render(chat, "line 3").text


@pytest.mark.parametrize(
    "text",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10 ** 10 }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ messages[0].role.nothing.there }}",
        "{{ 1 / 0 }}",
        "{{ 'ab' * 2 ** 26 }}",
        "{{ namespace(__class__='x') }}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}{{ ns }}",
        "{{ dict.__base__.x }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
        "{{ (messages | attr('append'))(1) }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% include '/etc/passwd' %}",
        "{{ lipsum() }}",
        "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    ],
)
def test_a_hostile_template_ends_in_an_input_error(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "CPU_LIMIT_S", 1.0)
    with pytest.raises(InputError, check=has_id(ErrorId.chat_template_failed)):
        template(text).render(CHAT, "line 7")


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
TOOL_CHAT = [
    {"role": "user", "content": "sum?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
    {"role": "assistant", "content": ""},
]
TOOLS = (
    "{% if tools is not none %}T{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}{% for c in m.tool_calls %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "add"}}]])
def test_tool_calls_and_closing_tokens_are_targets(tools: list[dict[str, Any]] | None) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    chat = [{key: part for key, part in message.items() if part is not None} for message in TOOL_CHAT]
    theirs, _ = render_jinja_template([chat], tools=tools, chat_template=TOOLS, **SPECIALS)
    rendered = template(TOOLS).render(TOOL_CHAT, "here", **({"tools": tools} if tools else {}))
    assert rendered.text == theirs[0]
    call = '<call>{"name": "add", "arguments": {"a": 1, "b": null}}</call><|im_end|>\n'
    wanted = [call, "It is 3.<|im_end|>\n", "<|im_end|>\n"]
    assert [rendered.text[begin:end] for begin, end in rendered.targets] == wanted
