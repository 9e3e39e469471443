"""Tools and calls in messages, for templates that know of neither.

The system message says which tools there are and how to call them; a call stands in the assistant's text as Hermes
writes it, and what tools gave back is said by the user.
Pure. Messages come as `ChatTemplate.read` leaves them: contents are text, arguments objects.
"""

import json
from collections.abc import Sequence
from typing import Any

from gateway.dialects.hermes import CLOSING, OPENING

_FORM = json.dumps({"name": "...", "arguments": {}})
_RESULT = "<tool_response>\n{}\n</tool_response>"


def with_tools(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, with `tools` in the system's, and as text all that was called and given back."""
    shown: list[dict[str, Any]] = []
    results: list[str] = []  # of tools, one after the other: templates want users and assistants to take turns
    for message in messages:
        if message["role"] in ("tool", "function"):
            results.append(_RESULT.format(message["content"]))
            continue
        shown += _said_by_user(results)
        results = []
        shown.append(_as_text(message))
    shown += _said_by_user(results)
    if not tools:
        return shown
    if shown and shown[0]["role"] == "system":
        return [{**shown[0], "content": f"{shown[0]['content']}\n\n{_introduction(tools)}"}, *shown[1:]]
    return [{"role": "system", "content": _introduction(tools)}, *shown]


def _introduction(tools: Sequence[dict[str, Any]]) -> str:
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    return (f"You may call these functions, each given with the JSON schema of its arguments:\n{listed}\n\n"
            f"To call one, answer with its name and arguments in this form, once for each call:\n"
            f"{OPENING}\n{_FORM}\n{CLOSING}")


def _said_by_user(results: Sequence[str]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "\n".join(results)}] if results else []


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    shown = dict(message)
    if calls := shown.pop("tool_calls", None):
        written = [f"{OPENING}\n{_written(call['function'])}\n{CLOSING}" for call in calls]
        shown["content"] = "\n".join(filter(None, [shown["content"], *written]))
    return shown


def _written(function: dict[str, Any]) -> str:
    return json.dumps({"name": function.get("name"), "arguments": function.get("arguments") or {}}, ensure_ascii=False)
