"""Write data/template_golden.json: what Hugging Face makes of conversations and templates. Run by hand.

    python -m venv hf && hf/bin/pip install "torch==2.13.*" && hf/bin/pip install transformers jinja2 gguf
    TZ=UTC PYTHONPATH=. hf/bin/python tests/gateway/make_template_golden.py path/to/SmolLM2-135M-Instruct.gguf

The first template is the default model's own; the others were written for this test and use, between them, what the
templates of well-known models use.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from transformers.utils.chat_template_utils import render_jinja_template

TEMPLATES = {
    "tools": """\
{%- if tools %}
    {{- "<|sys|>Tools:\\n" }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {%- if not loop.last %}{{ "\\n" }}{% endif %}
    {%- endfor %}
    {{- "<|end|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "assistant" and message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- "<|call|>" + call.function.name + " " + (call.function.arguments | tojson(indent=2)) + "<|end|>" }}
        {%- endfor %}
    {%- elif message.role == "tool" %}
        {{- "<|result|>" ~ message.content ~ "<|end|>" }}
    {%- else %}
        {{- "<|" + message.role + "|>" + message.content | trim + "<|end|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|assistant|>" }}{% endif %}
""",
    "blocks": """\
{{ bos_token }}
{% set ns = namespace(system='', seen=0) %}
{% for message in messages %}
    {% if message['role'] == 'system' %}
        {% set ns.system = ns.system + message['content'] %}
        {% continue %}
    {% endif %}
    {% set ns.seen = ns.seen + 1 %}
    {% if ns.seen > 3 %}
        {% break %}
    {% endif %}
[{{ ns.seen }}/{{ loop.length }}{{ ' first' if loop.first }}{{ ' last' if loop.last }}] {{ message['role'] | upper }}:
    {% generation %}
{{ message['content'] }}
    {% endgeneration %}
{% endfor %}
SYSTEM={{ ns.system or 'none' }} {{ dict(a=1, **{'b': 2}) }} {{ 'x' in ['x'] }} {{ eos_token }}
{% macro quoted(text) %}"{{ text }}"{% endmacro %}
{{ quoted('<&>') }} {{ {'html': '<&>', 'é': None} | tojson }} {{ {'b': 1, 'a': 2} | tojson(sort_keys=True) }}
{% if undefined_thing is defined %}never{% endif %}{{ undefined_thing }}
{% if add_generation_prompt %}ASSISTANT:{% endif %}
""",
    "alternating": """\
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}{% set system = '' %}{% set rest = messages %}{% endif %}
{%- for m in rest %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant/user/...') }}
    {%- endif %}
    {%- if m.role == 'user' %}
        {{- '[INST] ' + (system + '\\n\\n' if loop.first and system else '') + m.content + ' [/INST]' }}
    {%- else %}{{ ' ' + m.content.strip() + eos_token }}{% endif %}
{%- endfor %}
""",
}


def _say(role: str) -> Callable[[str], dict[str, Any]]:
    return lambda text: {"role": role, "content": text}


USER, ASSISTANT, SYSTEM = _say("user"), _say("assistant"), _say("system")
WEATHER = {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "call_1", "type": "function", "function": WEATHER}],
}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CONVERSATIONS = [
    [USER("Hello")],
    [SYSTEM("Be brief."), USER("What is 2 < 3 & 4?")],
    [USER(" leading and trailing \n"), ASSISTANT(" spaces  "), USER("a\n\nb\t{{ not a template }} {% nor this %}")],
    [SYSTEM(""), USER("😀 你好 é"), ASSISTANT("<|im_end|>"), USER("<b>&amp;</b>"), ASSISTANT("x"), USER("y")],
    [USER("weather?"), CALL, {"role": "tool", "tool_call_id": "call_1", "content": '{"t": 21}'}],
    [USER("one"), USER("two")],
    [ASSISTANT("I begin")],
    [USER("finish this"), ASSISTANT("Once upon a ")],
    [USER("finish this"), ASSISTANT("  Once upon a time")],
    [USER("same"), ASSISTANT("same")],
]
OPTIONS = [
    {"add_generation_prompt": True},
    {"add_generation_prompt": False},
    {"add_generation_prompt": False, "continue_final_message": True},
    {"add_generation_prompt": True, "tools": [TOOL, TOOL]},
]


def main(path: str) -> None:
    own = GGUFReader(path).fields["tokenizer.chat_template"].contents()
    templates = {"default model": own, **TEMPLATES}
    variables = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    cases = []
    for name, template in templates.items():
        for number, conversation in enumerate(CONVERSATIONS):
            for options in OPTIONS:
                given = dict(options)
                if "tools" in given and name != "tools":
                    continue
                try:
                    expected = render_jinja_template([conversation], chat_template=template, **given, **variables)[0][0]
                except Exception as error:
                    expected = None
                    print(f"refused: {name} {number} {options}: {str(error).splitlines()[0][:80]}")
                cases.append({"template": name, "conversation": number, "options": options, "expected": expected})
    golden = {"templates": templates, "conversations": CONVERSATIONS, "variables": variables, "cases": cases}
    target = Path(__file__).parent / "data" / "template_golden.json"
    target.write_text(json.dumps(golden, indent=1) + "\n")
    print(f"{len(cases)} cases")


if __name__ == "__main__":
    main(sys.argv[1])
