"""Who may say what to whom on the bus: the least that each role needs, per zone and, where wanted, per id.

Rule: a subscription is a wall. What holds tokens under a policy is sent to a subject that ends in the receiver's zone
(see `subjects`), and a role's credential lets it listen there in its own zone alone, so that law 7 holds on the wire
too, whatever a process says of itself. Pure; `deploy.nats_config` writes it in the words of nats-server.
"""

from collections.abc import Callable
from dataclasses import dataclass

from shared import subjects
from shared.residency import check_zone

ROLES = ("gateway", "router", "worker", "drafter", "observer")
ZONED = ("worker", "drafter")  # those that hold tokens under a policy; where the others are is no secret of a request
DEFAULT_ZONE = "local"

_ANY = "*"


@dataclass(frozen=True)
class Principal:
    """Who connects. `zone`: of workers and drafters. `id`: the only name it may use; empty: any."""

    role: str
    zone: str = ""
    id: str = ""

    @property
    def name(self) -> str:
        """As people write it, and the stem of its file: `gateway`, `worker@eu-north1`, `worker.w7@eu-north1`."""
        return self.role + (f".{self.id}" if self.id else "") + (f"@{self.zone}" if self.zone else "")


@dataclass(frozen=True)
class Permissions:
    """Patterns of subjects. One of `subscribe` may end in a space and a queue: there only as a member of that queue."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


def principal(text: str) -> Principal:
    """Who is meant by `text`, as `Principal.name` has it; a worker or drafter without a zone is in `local`.

    Raises ValueError for a role, an id or a zone that is none.
    """
    named, at, zone = text.partition("@")
    role, dot, id = named.partition(".")
    if role not in ROLES:
        raise ValueError(f"{text!r} begins with no role: write one of {', '.join(ROLES)}, as in worker@eu-north1")
    if at and role not in ZONED:
        raise ValueError(f"{text!r}: only {' and '.join(ZONED)} have a zone, leave out {at}{zone}")
    if dot and role == "observer":
        raise ValueError(f"{text!r}: an observer says nothing and has no name, leave out .{id}")
    if role in ZONED:
        zone = check_zone(zone if at else DEFAULT_ZONE)
    return Principal(role, zone, subjects.check_id(id) if dot else "")


def permissions(who: Principal) -> Permissions:
    """The subjects on which `who` may publish and subscribe; everything else is refused."""
    own = who.id or _ANY
    inbox = f"{subjects.inbox(who.role, who.zone)}.>"
    said, heard = _SAID[who.role](own), _HEARD[who.role](own, who.zone)
    return Permissions((*said, inbox), (*heard, inbox))


def table(zone: str = "ZONE") -> list[str]:
    """The permissions of every role as a Markdown table, `zone` standing for a worker's or drafter's own."""
    lines = ["| role | may publish | may subscribe |", "|---|---|---|"]
    for role in ROLES:
        allowed = permissions(Principal(role, zone.lower() if role in ZONED else ""))
        cells = [", ".join(f"`{_short(pattern).replace(zone.lower(), zone)}`" for pattern in patterns)
                 for patterns in (allowed.publish, allowed.subscribe)]
        lines.append(f"| {role} | {cells[0]} | {cells[1]} |")
    return lines


def _short(pattern: str) -> str:
    """Without what all subjects begin with, and with a queue told apart."""
    subject, _, queue = pattern.removeprefix(f"{subjects.PREFIX}.").partition(" ")
    return f"{subject} (queue {queue})" if queue else subject


def _in_any_zone(subject: str) -> tuple[str, str]:
    return subject, f"{subject}.*"


_SAID: dict[str, Callable[[str], tuple[str, ...]]] = {
    "gateway": lambda own: (subjects.ALL_GENERATE, subjects.worker_cancel(_ANY), subjects.router_cancel(_ANY),
                            subjects.status("gateway", own)),
    "router": lambda own: (*_in_any_zone(subjects.worker_generate(_ANY)), subjects.replies(_ANY),
                           subjects.placed(own), subjects.worker_kv_request(_ANY), subjects.status("router", own)),
    "worker": lambda own: (subjects.replies(_ANY), subjects.worker_kv(own),
                           *_in_any_zone(subjects.drafter_follow(_ANY)), subjects.status("worker", own)),
    "drafter": lambda own: (*_in_any_zone(subjects.worker_drafts(_ANY)), subjects.status("drafter", own)),
    "observer": lambda own: (),
}
_HEARD: dict[str, Callable[[str, str], tuple[str, ...]]] = {
    "gateway": lambda own, zone: (subjects.replies(own), subjects.status("worker", _ANY),
                                  subjects.status("router", _ANY)),
    # a request reaches one router: none may listen beside the queue
    "router": lambda own, zone: (f"{subjects.ALL_GENERATE} {subjects.ROUTER_QUEUE}", subjects.router_cancel(own),
                                 subjects.ALL_KV, subjects.ALL_PLACED, subjects.status("worker", _ANY),
                                 subjects.status("router", _ANY)),
    "worker": lambda own, zone: (subjects.worker_generate(own), subjects.worker_generate(own, zone),
                                 subjects.worker_cancel(own), subjects.worker_drafts(own),
                                 subjects.worker_drafts(own, zone), subjects.worker_kv_request(own),
                                 subjects.status("drafter", _ANY), subjects.status("gateway", _ANY),
                                 subjects.status("router", _ANY)),
    "drafter": lambda own, zone: (subjects.drafter_follow(own), subjects.drafter_follow(own, zone),
                                  subjects.status("worker", _ANY)),
    "observer": lambda own, zone: (subjects.ALL_STATUS,),
}
