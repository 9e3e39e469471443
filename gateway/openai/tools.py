"""`tools`, `tool_choice` and what goes with them, of chat completions and responses.

Pure.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from gateway.tools import MOST_TOOLS, Tool, Tools
from shared.errors import BadRequest

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")


def tools_of(tools: Sequence[Any] | None, choice: Any, parallel: bool | None) -> Tools | None:
    """What a request lets the model call; None where it lets it call nothing.

    Functions stand in an object of their own (chat) or beside the type (responses). Raises BadRequest.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise BadRequest("tool_choice needs tools: send them, or leave it out", param="tool_choice")
        return None
    if len(tools) > MOST_TOOLS:
        raise BadRequest(f"tools takes at most {MOST_TOOLS} functions, got {len(tools)}", param="tools")
    offered = tuple(_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools))
    names = [tool.name for tool in offered]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise BadRequest(f"tools names {twice!r} twice: give each function a name of its own", param="tools")
    required, allowed = _choice(choice, names)
    if allowed is None:
        return None
    return Tools(offered, frozenset(allowed), required, parallel is not False)


def _tool(tool: Any, where: str) -> Tool:
    if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
        raise BadRequest(f"{where}.type must be function: hosted and custom tools are not supported", param=where)
    function = tool["function"] if isinstance(tool.get("function"), Mapping) else tool
    return checked_tool(function.get("name"), function.get("description"), function.get("parameters"),
                        function.get("strict"), where)


def checked_tool(name: Any, description: Any, parameters: Any, strict: Any, where: str) -> Tool:
    """A function as a client describes it. Raises BadRequest."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadRequest(f"{where} needs a name of 1 to 128 letters, digits, dots, dashes or underscores", param=where)
    if not isinstance(description, str | None):
        raise BadRequest(f"{where}: the description must be a string", param=where)
    if parameters is not None and (not isinstance(parameters, dict) or parameters.get("type", "object") != "object"):
        raise BadRequest(f"{where}: the parameters must be a JSON schema of an object", param=where)
    if not isinstance(strict, bool | None):
        raise BadRequest(f"{where}: strict must be true or false", param=where)
    return Tool(name, description, parameters, bool(strict))


def _choice(choice: Any, names: list[str]) -> tuple[bool, list[str] | None]:
    """Whether a call has to come, and of which tools it may be; of None no call may come at all."""
    match choice:
        case None | "auto":
            return False, names
        case "required" | "any":
            return True, names
        case "none":
            return False, None
        case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
            return True, [_known(name, names)]
        case {"type": "allowed_tools", **rest}:
            told = rest.get("allowed_tools", rest)
            if not isinstance(told, Mapping) or told.get("mode") not in ("auto", "required"):
                raise BadRequest("tool_choice of allowed_tools needs a mode, auto or required", param="tool_choice")
            allowed = told.get("tools")
            if not isinstance(allowed, list) or not allowed:
                raise BadRequest("tool_choice of allowed_tools needs tools, a list of one at least; to allow none send "
                                 '"none"', param="tool_choice")
            return told["mode"] == "required", [_allowed(tool, names) for tool in allowed]
    raise BadRequest('tool_choice must be "none", "auto", "required", a function or allowed_tools', param="tool_choice")


def _allowed(tool: Any, names: list[str]) -> str:
    match tool:
        case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
            return _known(name, names)
    raise BadRequest("tool_choice.allowed_tools takes functions by their names", param="tool_choice")


def _known(name: str, names: list[str]) -> str:
    if name not in names:
        # the name is not repeated: it may be a prompt in the wrong field, and clients log errors
        raise BadRequest("tool_choice names a function that is not among tools: send it there too", param="tool_choice")
    return name
