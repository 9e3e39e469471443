"""Who reads every message as it leaves, and notes what no service may ever say.

Delay, loss and doubling happen behind this point, so each message is seen once and in the order it was sent. What a
service says while its broker is gone is not seen.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from shared import subjects
from shared.messages import (
    Accepted,
    Cancel,
    Close,
    Commit,
    Drafts,
    Failed,
    Finished,
    Follow,
    Generate,
    Open,
    Reply,
    Residency,
    StepReplies,
    Tokens,
    decode,
)
from shared.residency import allows
from shared.tokens import unpack

GENERATE = f"{subjects.PREFIX}.generate."
REPLIES = f"{subjects.PREFIX}.replies."
WORKER = f"{subjects.PREFIX}.worker."
DRAFTER = f"{subjects.PREFIX}.drafter."


@dataclass
class Said:
    """What one worker, in one life, said of one attempt."""

    next_index: int
    ended: bool = False
    accepted: bool = False


@dataclass
class Asked:
    """What gateways said of one request."""

    first: Generate
    latest: Generate | None = None
    attempt: int = 0
    starts: dict[int, int] = field(default_factory=dict)  # attempt -> tokens that stood before it
    unwanted_s: dict[int, float] = field(default_factory=dict)  # attempt -> since when nobody wants it
    gone_s: float | None = None  # since when nobody wants any of it


class Witness:
    """`complaints` are the laws broken on the wire. `patience_s`: how long work nobody wants may go on."""

    def __init__(self, patience_s: float, always_connected: bool, truth: Callable[[str], tuple[int, ...]],
                 delivered: Callable[[str], int], residency: Callable[[str], Residency]) -> None:
        self.complaints: list[str] = []
        self.under_policy = 0  # times that tokens under a policy were where they may be
        self.tokens: dict[tuple[str, int], int] = {}  # (worker, epoch) -> tokens it sent
        self._patience_s = patience_s
        self._always_connected = always_connected
        self._truth = truth
        self._delivered = delivered
        self._residency = residency
        self._asked: dict[str, Asked] = {}
        self._said: dict[tuple[str, int, str, int], Said] = {}
        self._placements: dict[tuple[str, int], int] = {}
        self._followed: set[tuple[str, str, int]] = set()  # (worker, request, attempt) told to a drafter and not closed
        self._seqs: dict[tuple[str, int, str], int] = {}

    def unwanted(self, request_id: str, now_s: float) -> None:
        """The client hung up, or its gateway died."""
        if request_id in self._asked:
            self._asked[request_id].gone_s = now_s

    def see(self, subject: str, data: bytes, now_s: float, zone: str = "") -> None:
        """One message, as it leaves a sender in `zone`."""
        what = _what(subject)
        if subject.startswith(GENERATE):
            self._submitted(decode(data, Generate), now_s)
        elif subject.startswith(REPLIES):
            replies = decode(data, StepReplies)
            self._replied(replies, subject, now_s)
            for reply in replies.replies:
                if isinstance(reply, Accepted | Tokens):
                    self._wall(reply.request_id, zone, f"{type(reply).__name__} of {replies.sender}")
        elif what == "worker generate":
            request = decode(data, Generate)
            key = request.request_id, request.attempt
            self._placements[key] = self._placements.get(key, 0) + 1
        elif what == "drafter follow":
            self._told(decode(data, Follow))
        elif what == "worker drafts":
            drafts = decode(data, Drafts)
            for proposal in drafts.proposals:
                self._wall(proposal.request_id, zone, f"a proposal of {drafts.drafter}")
        elif subject.startswith(WORKER) and subject.endswith(".cancel"):
            cancel = decode(data, Cancel)
            asked = self._asked.get(cancel.request_id)
            if asked is None or cancel.attempt not in asked.starts:
                self.complain(f"{cancel.request_id}/{cancel.attempt} is cancelled and was never asked for")

    def arrived(self, subject: str, data: bytes, zone: str) -> None:
        """Law 7: one message, as it reaches a service in `zone`. No token under a policy may be outside of it."""
        match _what(subject):
            case "worker generate":
                self._wall(decode(data, Generate).request_id, zone, f"the request at {subject}")
            case "worker drafts":
                for proposal in decode(data, Drafts).proposals:
                    self._wall(proposal.request_id, zone, f"a proposal at {subject}")
            case "drafter follow":
                for event in decode(data, Follow).events:
                    if isinstance(event, Open | Commit):
                        self._wall(event.request_id, zone, f"{type(event).__name__} at {subject}")

    def placed_twice(self) -> list[str]:
        """Only where no worker died may nothing be placed again."""
        placed = self._placements.items()
        return [f"{name}/{attempt}: placed {count} times" for (name, attempt), count in placed if count > 1]

    def never_closed(self) -> list[str]:
        """Only where nobody died is every stream closed at its drafter."""
        return [f"{worker} never told its drafter that {name}/{attempt} ended"
                for worker, name, attempt in sorted(self._followed)]

    def complain(self, what: str) -> None:
        self.complaints.append(what)

    def _wall(self, request_id: str, zone: str, what: str) -> None:
        residency = self._residency(request_id)
        if not allows(residency, zone):
            self.complain(f"law 7: {what}, {request_id} in zone {zone}: allowed is {', '.join(residency.zones)}")
        self.under_policy += bool(residency.zones)

    def _told(self, message: Follow) -> None:
        for event in message.events:
            key = message.worker, event.request_id, event.attempt
            match event:
                case Open():
                    self._followed.add(key)
                case Close():
                    self._followed.discard(key)

    def _submitted(self, request: Generate, now_s: float) -> None:
        name = f"{request.request_id}/{request.attempt}"
        asked = self._asked.setdefault(request.request_id, Asked(request))
        if request == asked.latest:
            return  # what nobody heard is said again
        if request.attempt <= asked.attempt:
            self.complain(f"{name}: the attempt is used twice")
        generated = tuple(unpack(request.generated))
        if generated != self._truth(request.request_id)[:len(generated)]:
            self.complain(f"{name}: resubmitted behind tokens that are not the stream's")
        if len(generated) != self._delivered(request.request_id):
            self.complain(f"{name}: resubmitted behind {len(generated)} tokens, the client has "
                          f"{self._delivered(request.request_id)}")
        if (request.tokens, request.sampling, request.deadline, request.tenant) != (
                asked.first.tokens, asked.first.sampling, asked.first.deadline, asked.first.tenant):
            self.complain(f"{name}: another request than before")
        asked.unwanted_s |= {attempt: now_s for attempt in asked.starts if attempt not in asked.unwanted_s}
        asked.attempt, asked.latest = request.attempt, request
        asked.starts[request.attempt] = len(generated)

    def _replied(self, message: StepReplies, subject: str, now_s: float) -> None:
        key = message.sender, message.epoch, subject
        if message.seq <= self._seqs.get(key, 0):
            self.complain(f"{message.sender}: number {message.seq} comes after {self._seqs[key]}")
        if self._always_connected and message.seq != self._seqs.get(key, 0) + 1:
            self.complain(f"{message.sender}: number {message.seq} left out what stands before it")
        self._seqs[key] = message.seq
        for reply in message.replies:
            self._heard(message, reply, now_s)

    def _heard(self, message: StepReplies, reply: Reply, now_s: float) -> None:
        name = f"{message.sender} on {reply.request_id}/{reply.attempt}"
        asked = self._asked.get(reply.request_id)
        if asked is None or reply.attempt not in asked.starts:
            self.complain(f"{name}: nobody asked for that")
            return
        key = message.sender, message.epoch, reply.request_id, reply.attempt
        said = self._said.setdefault(key, Said(asked.starts[reply.attempt]))
        if said.ended:
            self.complain(f"{name}: {type(reply).__name__} behind its last word")
        match reply:
            case Accepted():
                said.accepted = True
            case Tokens(index=index):
                self._spoke(name, said, asked, reply, index, now_s)
                self.tokens[key[:2]] = self.tokens.get(key[:2], 0) + len(reply.tokens) // 4
            case Finished():
                said.ended = True
                if self._always_connected and reply.reason != "cancelled" \
                        and reply.completion_tokens != said.next_index:
                    self.complain(f"{name}: finished with {reply.completion_tokens} tokens, sent {said.next_index}")
            case Failed():
                said.ended = True

    def _spoke(self, name: str, said: Said, asked: Asked, reply: Tokens, index: int, now_s: float) -> None:
        tokens = tuple(unpack(reply.tokens))
        if not said.accepted and self._always_connected:
            self.complain(f"{name}: tokens before it was accepted")
        if index < said.next_index or (index != said.next_index and self._always_connected):
            self.complain(f"{name}: token {index} where {said.next_index} was due")
        if not tokens or tokens != self._truth(reply.request_id)[index:index + len(tokens)]:
            self.complain(f"{name}: law 1: token {index} is not the stream's")
        said.next_index = index + len(tokens)
        since_s = asked.unwanted_s.get(reply.attempt)
        gone_s = asked.gone_s if since_s is None else min(since_s, asked.gone_s or since_s)
        if gone_s is not None and now_s - gone_s > self._patience_s:
            self.complain(f"{name}: still at work {now_s - gone_s:.1f} s after nobody wanted it")
            asked.gone_s = asked.unwanted_s[reply.attempt] = now_s  # once is enough


def _what(subject: str) -> str:
    """Kind of receiver and last word of an address to one service: `worker generate`, whatever its name and zone."""
    if not subject.startswith((WORKER, DRAFTER)):
        return ""
    _, _, kind, _, what, *_ = subject.split(".")
    return f"{kind} {what}"
