"""Chat templates render as Hugging Face renders them, within bounds. data/template_golden.json holds the cases."""

import json
from pathlib import Path
from typing import Any

import pytest

from gateway import template as module
from gateway.model_files import UnusableModel, load_card
from gateway.template import ChatTemplate
from shared.errors import BadRequest
from tests.laws.fuzz import bounded_memory, bounded_time
from tests.models import default_folder

GOLDEN = json.loads((Path(__file__).parent / "data" / "template_golden.json").read_text())
NOW_S = 1_780_000_000.0  # 28 May 2026
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def default() -> ChatTemplate:
    return ChatTemplate.of(load_card(default_folder()))


def render(source: str, messages: list[dict[str, Any]] = HELLO, **options: Any) -> str:
    return ChatTemplate(source).render(messages, now_s=NOW_S, **options)


@pytest.mark.parametrize("name", GOLDEN["templates"])
def test_rendering_equals_hugging_face(name: str) -> None:
    template = ChatTemplate(GOLDEN["templates"][name], GOLDEN["variables"])
    cases = [case for case in GOLDEN["cases"] if case["template"] == name]
    assert len(cases) >= 30
    for case in cases:
        messages = GOLDEN["conversations"][case["conversation"]]
        if case["expected"] is None:
            with pytest.raises(BadRequest):
                template.render(messages, now_s=NOW_S, **case["options"])
        else:
            assert template.render(messages, now_s=NOW_S, **case["options"]) == case["expected"], case


def test_the_golden_template_is_the_default_models_own(default: ChatTemplate) -> None:
    assert default.source == GOLDEN["templates"]["default model"]


def test_the_messages_handed_in_stay_as_they_were(default: ChatTemplate) -> None:
    messages = [{"role": "developer", "content": None}, {"role": "assistant", "content": "so"}]
    before = json.dumps(messages)
    default.render(messages, now_s=NOW_S, add_generation_prompt=False, continue_final_message=True)
    assert json.dumps(messages) == before


# --- what OpenAI clients send and templates do not know --------------------------------------------------------------


def test_missing_content_is_empty_text(default: ChatTemplate) -> None:
    for message in ({"role": "assistant", "content": None}, {"role": "assistant"}):
        text = default.render([*HELLO, message], now_s=NOW_S, add_generation_prompt=False)
        assert text.endswith("<|im_start|>assistant\n<|im_end|>\n")


def test_text_parts_are_lines_of_one_text(default: ChatTemplate) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "user\na\nb<|im_end|>" in default.render([{"role": "user", "content": parts}], now_s=NOW_S)


@pytest.mark.parametrize("content", [7, [{"type": "image_url", "image_url": {"url": "x"}}], ["a"], [{"type": "text"}]])
def test_content_that_is_not_text_names_the_message(default: ChatTemplate, content: Any) -> None:
    with pytest.raises(BadRequest, match="content") as caught:
        default.render([*HELLO, {"role": "user", "content": content}], now_s=NOW_S)
    assert caught.value.param == "messages[1].content"


def test_a_developer_speaks_as_the_system_unless_the_template_knows_him() -> None:
    message = {"role": "developer", "content": "x"}
    assert render("{{ messages[0].role }}", [message]) == "system"
    knowing = "{% if messages[0].role == 'developer' %}{{ messages[0].role }}{% endif %}"
    assert render(knowing, [message]) == "developer"


def test_tool_arguments_reach_the_template_as_objects() -> None:
    def call(arguments: Any) -> list[dict[str, Any]]:
        return [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": arguments}}]}]

    shown = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    assert render(shown, call('{"city": "Zürich"}')) == '{"city": "Zürich"}'
    assert render(shown, call({"city": "Zürich"})) == '{"city": "Zürich"}'
    assert render(shown, call("")) == "{}"
    # half a surrogate pair has no UTF-8
    assert render(shown, call(r'{"city": "\ud83d"}')) == r'{"city": "\ud83d"}'
    for unreadable in ('{"city": ', '{"city": ' * 5000):
        with pytest.raises(BadRequest, match="arguments"):
            render(shown, call(unreadable))


@pytest.mark.parametrize("messages", [[], [{"content": "x"}], [{"role": None, "content": "x"}]])
def test_messages_without_a_role_and_no_messages_at_all_are_refused(
    default: ChatTemplate, messages: list[dict[str, Any]]
) -> None:
    with pytest.raises(BadRequest):
        default.render(messages, now_s=NOW_S)


def test_a_model_without_a_template_says_where_to_go() -> None:
    with pytest.raises(BadRequest, match="/v1/completions"):
        render("")


# --- what a template may do ------------------------------------------------------------------------------------------


def test_a_template_refuses_in_its_own_words() -> None:
    with pytest.raises(BadRequest, match="no system role here"):
        render("{{ raise_exception('no system role here') }}")


@pytest.mark.parametrize(
    "source", ["{{ 1 + 'a' }}", "{{ nothing.at.all }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"]
)
def test_a_template_that_fails_is_a_bad_request_and_not_a_crash(source: str) -> None:
    with pytest.raises(BadRequest, match="chat template"):
        render(source)


def test_a_template_that_is_no_jinja_is_told_at_start() -> None:
    with pytest.raises(UnusableModel, match="line 2"):
        ChatTemplate("fine\n{% for %}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set n = namespace(__class__=1) %}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ dict.__subclasses__() }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(source: str) -> None:
    with pytest.raises(BadRequest):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "{% for a in range(9999) %}{% for b in range(9999) if false %}{% endfor %}{% endfor %}",
        "{% macro f() %}{% for b in range(9999) %}{% endfor %}{% endmacro %}"
        "{% for a in range(9999) %}{{ f() }}{% endfor %}",
    ],
)
def test_loops_are_bounded(source: str) -> None:
    with pytest.raises(BadRequest, match="rounds"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 9999999999 }}",
        "{{ [0] * 9999999999 }}",
        "{{ 9 ** 999999999 }}",
        "{% set n = namespace(x=9) %}{% for a in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for a in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for a in range(99) %}{% set n.x = n.x|replace('a', n.x) %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for a in range(99) %}{% set n.x = n.x.replace('', n.x) %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for a in range(99) %}{% set n.x = n.x.join(n.x) %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for a in range(99) %}{% set n.x = n.x|join(n.x) %}{% endfor %}",
        "{% set n = namespace(l=[], x='a') %}{% for a in range(9999) %}"
        "{% set n.l = n.l + [('a' * 9999999) ~ a] %}{% endfor %}",
        "{{ 'a'|center(9999999999) }}",
        "{{ 'a'.zfill(9999999999) }}",
        "{{ 'a\tb'.expandtabs(9999999999) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%*d' % (9999999999, 1) }}",
        "{{ '%9999999999d'|format(1) }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 9999999999) }}",
        "{{ [1, [2]]|tojson(indent=999999999) }}",
        "{{ [1]|batch(9999999999, 0)|list }}",
        "{% for a in range(9999) %}{{ range(99999)|sum }}{% endfor %}",
    ],
)
def test_what_expressions_make_is_bounded(source: str) -> None:
    with bounded_memory(512 << 20), bounded_time(10.0), pytest.raises(BadRequest, match="template was stopped"):
        render(source)


@pytest.mark.parametrize("source", ["{{ " + "(" * 5000, "{{ " + "-" * 9999 + "1 }}", "{{ " + "9" * 5000 + " }}",
                                    "{% if a %}" * 500 + "{% endif %}" * 500])
def test_a_template_nested_too_deep_is_unusable(source: str) -> None:
    with pytest.raises(UnusableModel):
        ChatTemplate(source)


def test_expressions_make_what_they_made_without_bounds() -> None:
    assert render("{{ 3 * 'ab' ~ (1 + 2) }} {{ '%5.2f' % 1.5 }} {{ '{:>4}'.format(7) }} {{ 2 ** 10 }}|") \
        == "ababab3  1.50    7 1024|"
    assert render("{{ ['a', 'b']|map('upper')|join('-') }} {{ (1, 2)|list + [3] }}") == "A-B [1, 2, 3]"
    assert render("{{ 'a b'|replace(' ', '_') }}") == "a_b"


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_OUTPUT_CHARACTERS", 1000)
    assert render("{% for a in range(100) %}0123456789{% endfor %}") == "0123456789" * 100
    with pytest.raises(BadRequest, match="more than 1000 characters"):
        render("{% for a in range(101) %}0123456789{% endfor %}")


def test_the_date_is_the_one_passed_in() -> None:
    assert render("{{ strftime_now('%d %b %Y') }}") == "28 May 2026"


def test_variables_reach_the_template_and_do_not_replace_the_messages() -> None:
    shown = render("{{ thinking }} {{ messages[0].content }}", variables={"thinking": "off", "messages": 1})
    assert shown == "off Hello"


def test_writing_on_excludes_a_new_turn(default: ChatTemplate) -> None:
    with pytest.raises(BadRequest, match="add_generation_prompt"):
        default.render(HELLO, now_s=NOW_S, add_generation_prompt=True, continue_final_message=True)
