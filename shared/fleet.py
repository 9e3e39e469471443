"""Statuses folded into a picture of who lives, as far as this process has heard.

Rule: the newest epoch of an id is the only one; whoever has been silent for too long is dead. Pure: the caller says
when a status was heard and what time it is, both in seconds of one clock.

    event                                        what the fleet does
    a status of an unknown id                    it joins
    a status of the same epoch                   replaces the one before
    a status of a higher epoch                   replaces it: the service has started again
    a status of a lower epoch                    is ignored: a late message of the service that was; but not for longer
                                                 than `LATE_S` after that one died: then a clock was set back
    a status of an epoch that fell silent        it joins again: it was only unreachable
"""

from operator import attrgetter
from typing import NamedTuple, TypeVar

from shared.messages import DrafterStatus, GatewayStatus, RouterStatus, Status, WorkerStatus

S = TypeVar("S", WorkerStatus, RouterStatus, DrafterStatus, GatewayStatus)

REMEMBERED_DEAD = 4096
LATE_S = 60.0  # no message is under way for longer

_id = attrgetter("id")


class Seen(NamedTuple):
    """One service and when it was last heard."""

    status: Status
    heard_s: float


class Fleet:
    """Everyone heard lately. Services of different kinds may share an id."""

    def __init__(self) -> None:
        self._seen: dict[tuple[type[Status], str], Seen] = {}
        self._dead_epochs: dict[tuple[type[Status], str], tuple[int, float]] = {}  # with when it was last heard

    def fold(self, status: Status, now: float) -> bool:
        """Take in a status heard at `now`. True when it is of a start not known before: a new id or a new epoch."""
        key = (type(status), status.id)
        known = self._seen.get(key)
        if known is None:
            last_epoch, heard_s = self._dead_epochs.get(key, (-1, now))
            if status.epoch < last_epoch and now - heard_s <= LATE_S:
                return False
            self._dead_epochs.pop(key, None)
            self._seen[key] = Seen(status, now)
            return True
        if status.epoch < known.status.epoch:
            return False
        self._seen[key] = Seen(status, max(now, known.heard_s))
        return status.epoch > known.status.epoch

    def forget_silent(self, now: float, silence_s: float) -> list[str]:
        """Drop whoever has not been heard for more than `silence_s`, and name them, longest silent first."""
        dead = sorted((key for key, seen in self._seen.items() if now - seen.heard_s > silence_s),
                      key=lambda key: self._seen[key].heard_s)
        for key in dead:
            self._bury(key)
        return [name for _, name in dead]

    def forget(self, status: Status) -> None:
        """Drop who sent `status`, which said that it leaves. Nothing happens when a newer epoch has come."""
        key = (type(status), status.id)
        known = self._seen.get(key)
        if known is not None and known.status.epoch <= status.epoch:
            self._bury(key)

    def workers(self, model: str | None = None) -> list[WorkerStatus]:
        """Workers by id, those of one model if it is named. Starting and draining ones too: see their `state`."""
        return [worker for worker in self._all(WorkerStatus) if model is None or worker.model == model]

    def workers_heard_since(self, since_s: float) -> list[WorkerStatus]:
        """Workers by id that were heard at `since_s` or later."""
        found = [seen.status for seen in self._seen.values()
                 if seen.heard_s >= since_s and isinstance(seen.status, WorkerStatus)]
        found.sort(key=_id)
        return found

    def worker(self, name: str) -> WorkerStatus | None:
        """One worker, if it lives."""
        return self._one(WorkerStatus, name)

    def drafters(self) -> list[DrafterStatus]:
        """Drafters by id."""
        return self._all(DrafterStatus)

    def drafter(self, name: str) -> DrafterStatus | None:
        """One drafter, if it lives."""
        return self._one(DrafterStatus, name)

    def gateways(self) -> list[GatewayStatus]:
        """Gateways by id."""
        return self._all(GatewayStatus)

    def gateway(self, name: str) -> GatewayStatus | None:
        """One gateway, if it lives."""
        return self._one(GatewayStatus, name)

    def routers(self) -> list[RouterStatus]:
        """Routers by id."""
        return self._all(RouterStatus)

    def models(self) -> list[str]:
        """Names of the models that workers serve, sorted."""
        return sorted({worker.model for worker in self._all(WorkerStatus)})

    def silent_s(self, status: Status, now: float) -> float | None:
        """Seconds since the sender of `status` was last heard; None when it is not in the fleet."""
        seen = self._seen.get((type(status), status.id))
        return None if seen is None else now - seen.heard_s

    def _all(self, kind: type[S]) -> list[S]:
        found = [seen.status for seen in self._seen.values() if isinstance(seen.status, kind)]
        return sorted(found, key=lambda status: status.id)

    def _one(self, kind: type[S], name: str) -> S | None:
        seen = self._seen.get((kind, name))
        return seen.status if seen is not None and isinstance(seen.status, kind) else None

    def _bury(self, key: tuple[type[Status], str]) -> None:
        last = self._seen.pop(key)
        self._dead_epochs[key] = last.status.epoch, last.heard_s
        if len(self._dead_epochs) > REMEMBERED_DEAD:
            del self._dead_epochs[next(iter(self._dead_epochs))]
