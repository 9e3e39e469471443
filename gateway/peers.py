"""Who else is in the mesh, as far as this gateway has heard.

Rule: what was not heard for `silence_s` is taken for dead; what was not heard for long is forgotten.
Pure: the caller passes `now_s`, monotonic seconds.
"""

from shared.messages import RouterStatus, Status, WorkerStatus

_FORGET_AFTER_S = 60.0


class Peers:
    """The last status of every worker and router, and when it came."""

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._workers: dict[str, tuple[WorkerStatus, float]] = {}
        self._routers: dict[str, tuple[RouterStatus, float]] = {}

    def note(self, status: Status, now_s: float) -> None:
        """Take in one status; drafters and gateways are of no concern here."""
        match status:
            case WorkerStatus():
                self._workers[status.id] = (status, now_s)
            case RouterStatus():
                self._routers[status.id] = (status, now_s)

    def worker(self, name: str) -> WorkerStatus | None:
        """The last status of this worker, alive or not."""
        known = self._workers.get(name)
        return known[0] if known else None

    def silent(self, worker: str, now_s: float) -> bool:
        """Whether this worker used to speak and has stopped."""
        known = self._workers.get(worker)
        return known is not None and now_s - known[1] > self._silence_s

    def workers(self, now_s: float) -> list[WorkerStatus]:
        """The workers heard lately, by id."""
        self._workers = {name: known for name, known in self._workers.items() if now_s - known[1] < _FORGET_AFTER_S}
        return [status for _, (status, at_s) in sorted(self._workers.items()) if now_s - at_s <= self._silence_s]

    def routers(self, now_s: float) -> list[RouterStatus]:
        """The routers heard lately, by id."""
        self._routers = {name: known for name, known in self._routers.items() if now_s - known[1] < _FORGET_AFTER_S}
        return [status for _, (status, at_s) in sorted(self._routers.items()) if now_s - at_s <= self._silence_s]
