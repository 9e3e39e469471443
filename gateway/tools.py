"""The tools a client lets a model call.

Pure. Each API has its own words for them (`gateway.openai.tools`, ...); this is what they come to.
"""

from typing import Any

from msgspec import Struct

MOST_TOOLS = 128


class Tool(Struct, frozen=True):
    """A function of the client's. `parameters`: the JSON schema of its arguments, an object."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False  # arguments have to fit the schema even where the model may choose not to call

    def shown(self) -> dict[str, Any]:
        """As chat templates read it."""
        parameters = self.parameters or {}
        if not {"type", "properties"} <= set(parameters):
            # templates walk through them, and add to texts
            parameters = {"type": "object", "properties": {}} | parameters
        return {"type": "function", "function": {
            "name": self.name, "description": self.description or "", "parameters": parameters}}


class Tools(Struct, frozen=True):
    """What is on offer. `callable` are the names that may be called; all are shown."""

    offered: tuple[Tool, ...]
    callable: frozenset[str]
    required: bool = False  # the answer has to be a call
    parallel: bool = True  # more than one call in an answer

    def callables(self) -> list[Tool]:
        """Those that may be called, in the client's order."""
        return [tool for tool in self.offered if tool.name in self.callable]
