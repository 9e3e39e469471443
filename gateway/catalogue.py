"""The models of a gateway, and the names by which they are asked for.

A model is known by its name in the mesh, by its aliases, and by the name its files give it, in this order. Pure.
"""

from collections.abc import Collection, Mapping, Sequence

from gateway.prompt import ServedModel
from shared.errors import BadRequest, ModelNotFound

MOST_NAMED = 128  # characters of an unknown name, and names of known ones, that an error repeats
MOST_NARROWED = 1024


class Catalogue:
    """What a gateway serves. May be empty."""

    def __init__(self, models: Sequence[ServedModel], aliases: Mapping[str, str] | None = None) -> None:
        """`aliases`: other name -> name in the mesh. Raises ValueError for one that is taken, or leads nowhere."""
        self.models = tuple(models)
        self.aliases = dict(aliases or {})
        self._named = {model.name: model for model in models}
        if len(self._named) < len(models):
            raise ValueError("two models of this gateway have the same name: give each a name of its own")
        for alias, name in self.aliases.items():
            if alias in self._named:
                raise ValueError(f"the alias {alias!r} is the name of a model: choose another")
            if name not in self._named:
                raise ValueError(f"the alias {alias!r} stands for {name!r}, which this gateway does not serve: "
                                 f"it serves {_listed(self._named)}")
        own = [model.card.name for model in models]
        # a name that two models' files share says nothing
        self._known = {model.card.name: model for model in models if own.count(model.card.name) == 1}
        self._known |= {alias: self._named[name] for alias, name in self.aliases.items()} | self._named
        self._narrowed: dict[Collection[str], Catalogue] = {}

    def named(self, name: str | None, elsewhere: Sequence[str] = ()) -> ServedModel:
        """The model of this name; None means the only one. Raises ModelNotFound, BadRequest when several are meant.

        `elsewhere`: models that the mesh serves, whether or not this gateway does.
        """
        if not self.models:
            raise ModelNotFound("this gateway serves no model: start it with --model", param="model")
        if name is None:
            if len(self.models) > 1:
                raise BadRequest(f"say which model: this gateway serves {_listed(self._named)}", param="model")
            return self.models[0]
        found = self._known.get(name)
        if found is not None:
            return found
        if name in elsewhere:
            raise ModelNotFound(f"workers serve the model {_shortened(name)!r}, but this gateway has no tokenizer for "
                                "it: start it with --models", param="model")
        raise ModelNotFound(f"the model {_shortened(name)!r} does not exist here: this gateway serves "
                            f"{_listed(self._named)}", param="model")

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def only(self, names: tuple[str, ...] | None) -> "Catalogue":
        """What is left for somebody who may use the models of these names or aliases; None: all."""
        if names is None:
            return self
        found = self._narrowed.get(names)
        if found is None:
            if len(self._narrowed) >= MOST_NARROWED:
                self._narrowed.clear()
            models = [model for model in self.models if any(self._known.get(name) is model for name in names)]
            kept = {model.name for model in models}
            found = Catalogue(models, {alias: name for alias, name in self.aliases.items() if name in kept})
            self._narrowed[names] = found
        return found

    def names(self) -> list[tuple[str, ServedModel]]:
        """Every name to ask for, models first: what is listed."""
        return [*self._named.items(), *((alias, self._named[name]) for alias, name in self.aliases.items())]


def pairs_of(said: str, flag: str) -> dict[str, str]:
    """`a=x,b=y` as a mapping. Raises ValueError naming `flag`."""
    found: dict[str, str] = {}
    for pair in filter(None, (part.strip() for part in said.split(","))):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not (name and equals and value):
            raise ValueError(f"{flag} takes NAME=VALUE pairs split by commas, got {pair!r}")
        if name in found:
            raise ValueError(f"{flag} names {name!r} twice")
        found[name] = value
    return found


def _shortened(name: str) -> str:
    return name if len(name) <= MOST_NAMED else f"{name[:MOST_NAMED]}..."


def _listed(names: Mapping[str, object]) -> str:
    shown = ", ".join(map(repr, list(names)[:MOST_NAMED]))
    return shown if len(names) <= MOST_NAMED else f"{shown}, ..."
