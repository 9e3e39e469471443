"""One stream's life across its attempts: what was delivered, who works on it, and what to do when that goes wrong.

Rule: the tokens a client has are the truth; every attempt continues behind them, and by law 1 they fit, because it asks
for the numeric recipe that the first of them came from and takes tokens of no other. Whoever calls performs the
returned actions in order. A stream that has ended answers every input with nothing.
Pure: no clock and no bus; `now_s` is monotonic seconds.

    submitted --Accepted, Tokens--> running --Finished--> ended      (Queued: a router holds it, patience starts again)
        ^   \\                        |
        |    `- nobody accepted ------+-- gap, death, lost reply, stall, retryable failure
        |                             v
        +----- after a pause ----- waiting          (refusals and deaf meshes wait longer each time)

What counts against `max_attempts`: attempts that were lost or failed, one after the other, without progress between
them: a long stream may meet with more than a short one. Progress is one token where only messages were lost, and
`PROGRESS_TOKENS` where the worker failed. What does not count: publishes that nobody heard, and refusals once tokens
were delivered; those end when `accept_s` (nothing delivered yet) or `stall_s` have passed.
"""

from collections.abc import Collection
from typing import Literal

import msgspec
from msgspec import Struct

from shared.blocks import BLOCK_SIZE_TOKENS, hash_chain, join_hashes, split_hashes
from shared.errors import (
    DeadlineExceeded,
    MeshUnavailable,
    MillError,
    NoEligibleWorker,
    Overloaded,
    RateLimited,
    WorkerFailed,
    from_code,
)
from shared.logprobs import record_bytes
from shared.messages import Accepted, Cancel, Failed, Finished, Generate, Queued, Reply, Scored, Tokens
from shared.tokens import pack, unpack

PROGRESS_TOKENS = 16
_LOST_MESSAGES = ("gap", "lost_reply")
_NO_ROOM = (Overloaded, RateLimited)
_PAUSE_S = 0.1  # first pause before a publish is repeated; doubles each time
_MAX_PAUSE_S = 2.0
_RETRY_AFTER_S = 1.0
_MAX_EARLY = 64  # messages that came before their turn


class Limits(Struct, frozen=True):
    """How patient the gateway is. Seconds and counts."""

    accept_s: float = 2.0  # for a worker to take an attempt
    stall_s: float = 20.0  # between tokens
    # An accepted stream may queue this long for its first token: longer than routers let anybody queue, because sending
    # waiting streams again is what turns an overload into a collapse.
    queue_s: float = 90.0
    # A message may be overtaken by the next: what is early waits so long for what is missing. NATS keeps the order of
    # one sender, so there this only delays the repair of a loss.
    reorder_s: float = 0.2
    suspect_s: float = 1.0  # after a lost reply, for the stream to show that it lives
    max_attempts: int = 4  # without progress between them
    max_deaths: int = 2  # workers that may die under one stream and it is still sent on
    max_barren_deaths: int = 2  # deaths without a token of that attempt: the mark of a request that kills workers


class Deliver(Struct, frozen=True):
    """The next tokens of the stream, each once, in order."""

    tokens: list[int]


class Submit(Struct, frozen=True):
    """Publish this attempt. `cause` is empty for the first, otherwise why it is not the first."""

    message: Generate
    cause: str = ""


class SendCancel(Struct, frozen=True):
    """Tell `worker` to stop an attempt that nobody listens to."""

    worker: str
    message: Cancel


class Withdraw(Struct, frozen=True):
    """Tell `router` to let go of an attempt that it holds."""

    router: str
    message: Cancel


class Finish(Struct, frozen=True):
    """The stream is whole. `message.completion_tokens` is what was delivered."""

    message: Finished


class Fail(Struct, frozen=True):
    """The stream ends with an error."""

    error: MillError


Action = Deliver | Submit | SendCancel | Withdraw | Finish | Fail


class StreamState:
    """One stream. `request` is its first attempt; `deadline_s` is on the caller's monotonic clock."""

    __slots__ = ("_accepted_once", "_barren_deaths", "_deaths", "_early", "_early_end", "_excluded",
                 "_first_of_attempt", "_gap_s", "_mourned", "_pause_s", "_progress_s", "_prompt_hashes", "_resume_s",
                 "_since_s", "_suspect_s", "_tries", "_unheard_since_s", "attempt", "cached_tokens", "deadline_s",
                 "delivered", "epoch", "held_by", "limits", "logprobs", "prompt_logprobs", "recipe", "request",
                 "state", "worker")

    def __init__(self, request: Generate, limits: Limits, deadline_s: float) -> None:
        self.request = request
        self.limits = limits
        self.deadline_s = deadline_s
        self.delivered: list[int] = []
        self.logprobs: dict[int, bytes] = {}  # record of each token that is not yet taken, where asked for
        self.prompt_logprobs: dict[int, bytes] = {}  # record of each prompt token but the first, where asked for
        self.attempt = request.attempt
        self.state = "new"  # submitted, running, waiting, ended
        self.worker = ""  # of the current attempt
        self.epoch = 0
        self.held_by = ""  # the router that keeps the current attempt until a worker has room
        self.cached_tokens = 0
        self.recipe = ""  # of all delivered tokens; empty while there are none, or nobody named it
        self._prompt_hashes = split_hashes(request.block_hashes)
        self._excluded: tuple[str, ...] = request.exclude_workers
        self._tries = 1
        self._deaths = 0
        self._barren_deaths = 0
        self._mourned: dict[str, tuple[int, bool]] = {}  # for silence: in which epoch, and whether without a token
        self._accepted_once = False
        self._first_of_attempt = 0
        self._pause_s = _PAUSE_S
        self._since_s = 0.0  # when the present state began
        self._progress_s = 0.0  # when a token last came, or the stream began
        self._resume_s = 0.0  # waiting: when to publish
        self._suspect_s: float | None = None
        self._early: dict[int, list[int]] = {}  # index -> tokens that wait for the ones before them
        self._early_end: Finished | None = None
        self._gap_s: float | None = None  # when waiting for the missing ends
        self._unheard_since_s: float | None = None

    @property
    def begun(self) -> bool:
        """Whether a worker has ever taken it."""
        return self._accepted_once

    @property
    def mourned(self) -> Collection[str]:
        """Workers that it takes for dead because they fell silent."""
        return self._mourned.keys()

    # --- inputs ------------------------------------------------------------------------------------------------------

    def start(self, now_s: float) -> list[Action]:
        """Publish the first attempt."""
        self._progress_s = now_s
        self._enter("submitted", now_s)
        return [Submit(self.request)]

    def hear(self, reply: Reply, sender: str, epoch: int, now_s: float, from_worker: bool = False,
             recipe: str = "") -> list[Action]:
        """One reply about this request, from whatever attempt and sender.

        `from_worker`: the sender is known for a worker. What one worker refuses (its queue is full, it is leaving)
        another may take; what a router refuses is refused. `recipe`: how the sender computes, if it said so.
        """
        if self.state == "ended":
            return []
        if reply.attempt != self.attempt:
            return _cancel_stale(reply, sender)
        if isinstance(reply, Accepted | Tokens | Scored) and (not self.worker or sender == self.worker):
            if not self.delivered:
                self.recipe = recipe
            elif self.recipe and recipe and recipe != self.recipe:
                self.worker = sender
                return self._resubmit("other_recipe", now_s, exclude=sender)
        match reply:
            case Queued():
                return self._on_queued(sender, now_s)
            case Accepted():
                return self._on_accepted(reply, sender, epoch, now_s)
            case Tokens():
                return self._on_tokens(reply, sender, epoch, now_s)
            case Scored():
                return self._on_scored(reply, sender, epoch, now_s)
            case Finished():
                return self._on_finished(reply, sender, now_s)
            case Failed():
                return self._on_failed(reply, sender, now_s, from_worker)

    def hear_next(self, reply: Tokens, sender: str, now_s: float, recipe: str) -> list[int] | None:
        """What `hear` would deliver of nearly every message: the next tokens of a running stream, and not its last.

        None: it is something else, nothing has changed, ask `hear`.
        """
        delivered = self.delivered
        if (not delivered or reply.index != len(delivered) or sender != self.worker or self.state != "running"
                or reply.attempt != self.attempt or recipe != self.recipe or self._early
                or self._early_end is not None):
            return None
        fresh = unpack(reply.tokens)
        request = self.request
        if not fresh or len(delivered) + len(fresh) >= request.max_tokens or fresh[-1] in request.stop_token_ids:
            return None
        if reply.logprobs:
            self._note(self.logprobs, len(delivered), len(fresh), reply.logprobs)
        delivered += fresh
        self._progress_s = self._since_s = now_s
        self._pause_s = _PAUSE_S
        self._gap_s = self._suspect_s = None
        return fresh

    def unheard(self, attempt: int, now_s: float) -> list[Action]:
        """Nobody listens where `attempt` was published, or there is no bus: try again, for a while."""
        if self.state != "submitted" or attempt != self.attempt:
            return []
        if self._unheard_since_s is None:
            self._unheard_since_s = now_s
        patience_s = self.limits.stall_s if self.delivered else self.limits.accept_s
        if now_s - self._unheard_since_s >= patience_s:
            return self._fail(MeshUnavailable("no router is listening: start one (tokenmill up), or retry shortly",
                                              retry_after_s=_RETRY_AFTER_S))
        self._wait(now_s)
        return []

    def worker_died(self, worker: str, now_s: float, back_in_epoch: int | None = None) -> list[Action]:
        """`worker` fell silent, or is back in a later epoch and has forgotten everything."""
        if self.state != "running" or worker != self.worker:
            return []
        if back_in_epoch is not None and back_in_epoch <= self.epoch:
            return []
        barren = len(self.delivered) == self._first_of_attempt
        self._deaths += 1
        self._barren_deaths += barren
        if back_in_epoch is None:
            self._mourned[worker] = (self.epoch, barren)
        return self._resubmit("worker_died", now_s, exclude=worker if back_in_epoch is None else "", cancel=False)

    def lives(self, worker: str, epoch: int) -> None:
        """`worker` is heard again: if in the life in which it was taken for dead, it had only been silent."""
        if self._mourned and self._mourned.get(worker, (None, False))[0] == epoch:
            _, barren = self._mourned.pop(worker)
            self._deaths -= 1
            self._barren_deaths -= barren

    def lost_reply(self, worker: str, now_s: float) -> list[Action]:
        """A message of `worker` went missing and may have been about this stream: watch it."""
        if self.state == "running" and worker == self.worker and self._suspect_s is None:
            self._suspect_s = now_s + self.limits.suspect_s
        return []

    def found_reply(self, worker: str) -> list[Action]:
        """What was missing of `worker` was only late."""
        if self.state == "running" and worker == self.worker and not self._end_reason():
            self._suspect_s = None
        return []

    def cancel(self) -> list[Action]:
        """Nobody wants the rest: the client left, or a stop string matched."""
        if self.state == "ended":
            return []
        self.state = "ended"
        return self._cancel_current()

    def give_up(self, error: MillError) -> list[Action]:
        """End with an error of the caller's, for instance because the gateway itself must stop."""
        return [] if self.state == "ended" else self._cancel_current() + self._fail(error)

    def tick(self, now_s: float, queueing: bool = False) -> list[Action]:
        """Time has passed. `queueing`: the worker says that requests wait there for their first token."""
        if self.state == "ended":
            return []
        if now_s >= self.deadline_s:
            return self.give_up(DeadlineExceeded("the request's deadline passed before the last token: ask for fewer "
                                                 "tokens or raise the timeout"))
        if self.state == "waiting":
            return self._publish("unheard" if self._unheard_since_s is not None else "refused", now_s) \
                if now_s >= self._resume_s else []
        if self._gap_s is not None and now_s >= self._gap_s:
            return self._resubmit("gap", now_s)
        waited_s = now_s - self._since_s
        if self.state == "submitted":
            return self._resubmit("not_accepted", now_s) if waited_s >= self.limits.accept_s else []
        barren = len(self.delivered) == self._first_of_attempt
        if self._suspect_s is not None and now_s >= self._suspect_s and not (barren and queueing):
            return self._resubmit("lost_reply", now_s)
        if waited_s >= (max(self.limits.queue_s, self.limits.stall_s) if barren else self.limits.stall_s):
            return self._resubmit("stalled", now_s, exclude=self.worker)
        return []

    # --- replies of the current attempt -------------------------------------------------------------------------------

    def _on_queued(self, router: str, now_s: float) -> list[Action]:
        """It says so with each heartbeat: when it falls silent the attempt counts as not accepted."""
        if self.state == "submitted":
            self.held_by, self._since_s, self._unheard_since_s = router, now_s, None
        return []

    def _on_accepted(self, reply: Accepted, sender: str, epoch: int, now_s: float) -> list[Action]:
        if not self._accepted_once:
            self.cached_tokens = reply.cached_tokens
        return self._own(sender, epoch, now_s)

    def _on_tokens(self, reply: Tokens, sender: str, epoch: int, now_s: float) -> list[Action]:
        actions = self._own(sender, epoch, now_s)
        if sender == self.worker:
            if self._prompt_missing:
                # what came before the first token got lost
                return self._resubmit("gap", now_s)
            self._note(self.logprobs, reply.index, len(reply.tokens) // 4, reply.logprobs)
        if reply.index > len(self.delivered):
            return actions or self._hold(now_s, reply.index, unpack(reply.tokens))
        fresh = self._in_turn(reply.index, unpack(reply.tokens))
        if not fresh:
            return actions
        self.delivered += fresh
        self._progress_s = self._since_s = now_s
        self._pause_s = _PAUSE_S
        if not self._early:
            self._gap_s = None
        # its last word should be in the same message: if it got lost, do not wait for a stall
        self._suspect_s = now_s + self.limits.suspect_s if self._end_reason() else None
        if self._early_end is not None and self._early_end.completion_tokens == len(self.delivered):
            return [Deliver(fresh), *actions, *self._finish(self._early_end)]
        return [Deliver(fresh), *actions]

    def _on_scored(self, reply: Scored, sender: str, epoch: int, now_s: float) -> list[Action]:
        actions = self._own(sender, epoch, now_s)
        if sender == self.worker:
            count = len(reply.logprobs) // record_bytes(self.request.prompt_logprobs)
            self._note(self.prompt_logprobs, reply.index, count, reply.logprobs)
            self._since_s = now_s
        return actions

    @property
    def _prompt_missing(self) -> bool:
        wanted = self.request.prompt_logprobs >= 0
        return wanted and len(self.prompt_logprobs) < len(self.request.tokens) // 4 - 1

    def _note(self, records: dict[int, bytes], index: int, count: int, packed: bytes) -> None:
        """Keep the records of `count` tokens from `index` on; a second copy of one says the same."""
        size = len(packed) // count if count else 0
        for number in range(count if size else 0):
            records.setdefault(index + number, packed[number * size:(number + 1) * size])

    def _in_turn(self, index: int, tokens: list[int]) -> list[int]:
        """What of `tokens`, and of early ones that follow them, is new; never more than was asked for."""
        have = len(self.delivered)
        fresh = tokens[have - index:]
        for early in sorted(self._early):
            if early > have + len(fresh):
                break
            fresh += self._early.pop(early)[have + len(fresh) - early:]
        return fresh[:self.request.max_tokens - have]

    def _hold(self, now_s: float, index: int, tokens: list[int]) -> list[Action]:
        """Keep what came too early, for as long as a message may be late."""
        self._early[index] = tokens
        if len(self._early) > _MAX_EARLY:
            return self._resubmit("gap", now_s)
        if self._gap_s is None:
            self._gap_s = now_s + self.limits.reorder_s
        return []

    def _on_finished(self, reply: Finished, sender: str, now_s: float) -> list[Action]:
        if reply.reason != "cancelled" and reply.completion_tokens == len(self.delivered):
            return self._finish(reply)
        if self.worker and sender != self.worker:
            return []
        if reply.reason == "cancelled" or reply.completion_tokens < len(self.delivered):
            return self._resubmit("cancelled" if reply.reason == "cancelled" else "gap", now_s)
        self._early_end = reply
        if self._gap_s is None:
            self._gap_s = now_s + self.limits.reorder_s
        return []

    def _on_failed(self, reply: Failed, sender: str, now_s: float, from_worker: bool) -> list[Action]:
        if self.worker and sender != self.worker:
            return []  # a second copy of the request was refused elsewhere
        error = from_code(reply.code, reply.message, reply.retry_after_s or None)
        local = bool(self.worker) or from_worker or not isinstance(error, _NO_ROOM)
        if reply.retryable and local and (self._tries < self.limits.max_attempts or not isinstance(error, _NO_ROOM)):
            return self._resubmit("worker_failed", now_s, exclude=sender, cancel=False)
        if isinstance(error, NoEligibleWorker) and self._excluded:
            self._excluded = ()  # better the worker that failed once than none
        elif not self.delivered or not (reply.retryable or isinstance(error, NoEligibleWorker)):
            return self._fail(error)
        if now_s - self._progress_s >= self.limits.stall_s:
            return self._fail(error)
        self._next_attempt()
        self._wait(now_s)
        return []

    # --- what inputs have in common -----------------------------------------------------------------------------------

    def _own(self, sender: str, epoch: int, now_s: float) -> list[Action]:
        """Take `sender` for the attempt's worker; a second one (the request was duplicated) is told to stop."""
        if self.worker and sender != self.worker:
            return [SendCancel(sender, Cancel(self.request.request_id, self.attempt))]
        if self.state != "running":
            self.worker, self.epoch, self.held_by = sender, epoch, ""
            self._accepted_once = True
            self._unheard_since_s = None
            self._enter("running", now_s)
        return []

    def _resubmit(self, cause: str, now_s: float, exclude: str = "", cancel: bool = True) -> list[Action]:
        """Send what is left to do on its way again, unless there is nothing left or this happened too often."""
        actions = self._cancel_current() if cancel else []
        if reason := self._end_reason():
            return [*actions, *self._finish(Finished(
                request_id=self.request.request_id, attempt=self.attempt, reason=reason, worker=self.worker,
                prompt_tokens=len(self.request.tokens) // 4, cached_tokens=self.cached_tokens))]
        if self._deaths > self.limits.max_deaths or self._barren_deaths >= self.limits.max_barren_deaths:
            return [*actions, *self._fail(WorkerFailed(f"{self._deaths} workers died while serving this request: it is "
                                                       "not sent to another"))]
        progress = 1 if cause in _LOST_MESSAGES else PROGRESS_TOKENS
        if len(self.delivered) - self._first_of_attempt >= progress:
            self._tries = 0
        if self._tries >= self.limits.max_attempts:
            return [*actions, *self._fail(self._used_up(cause))]
        self._tries += 1
        if exclude and exclude not in self._excluded:
            self._excluded = (*self._excluded, exclude)
        self._next_attempt()
        return [*actions, *self._publish(cause, now_s)]

    def _used_up(self, cause: str) -> MillError:
        if self._accepted_once:
            return WorkerFailed(f"gave up after {self._tries} attempts, the last one ended by: {cause}")
        return MeshUnavailable(f"no worker took the request in {self._tries} attempts of {self.limits.accept_s:g} s",
                               retry_after_s=_RETRY_AFTER_S)

    def _next_attempt(self) -> None:
        self.attempt += 1
        self.worker = self.held_by = ""
        self._first_of_attempt = len(self.delivered)
        self._unheard_since_s = None
        self._gap_s = self._early_end = None
        self._early.clear()

    def _publish(self, cause: str, now_s: float) -> list[Action]:
        self._enter("submitted", now_s)
        return [Submit(msgspec.structs.replace(
            self.request, attempt=self.attempt, generated=pack(self.delivered), exclude_workers=self._excluded,
            block_hashes=self._hashes(), recipe=self.recipe if self.delivered else "",
            prompt_logprobs=self.request.prompt_logprobs if self._prompt_missing else -1), cause)]

    def _hashes(self) -> bytes:
        """The chain over prompt and delivered tokens; the prompt's part is not computed again."""
        if not self.request.block_hashes and len(self.request.tokens) >= 4 * BLOCK_SIZE_TOKENS:
            return b""  # the caller works without hashes
        done = self._prompt_hashes
        tail = unpack(self.request.tokens[4 * BLOCK_SIZE_TOKENS * len(done):]) + self.delivered
        rest = hash_chain(tail, self.request.cache_salt, parent=done[-1] if done else b"")
        return self.request.block_hashes + join_hashes(rest)

    def _wait(self, now_s: float) -> None:
        self._enter("waiting", now_s)
        self._resume_s = now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, _MAX_PAUSE_S)

    def _enter(self, state: str, now_s: float) -> None:
        self.state, self._since_s, self._suspect_s = state, now_s, None

    def _end_reason(self) -> Literal["stop", "length"] | None:
        """How the stream ended, if what was delivered already is all of it."""
        if self.delivered and self.delivered[-1] in self.request.stop_token_ids:
            return "stop"
        return "length" if len(self.delivered) >= self.request.max_tokens else None

    def _finish(self, message: Finished) -> list[Action]:
        self.state = "ended"
        return [Finish(msgspec.structs.replace(message, completion_tokens=len(self.delivered)))]

    def _fail(self, error: MillError) -> list[Action]:
        self.state = "ended"
        return [Fail(error)]

    def _cancel_current(self) -> list[Action]:
        message = Cancel(self.request.request_id, self.attempt)
        if self.worker:
            return [SendCancel(self.worker, message)]
        return [Withdraw(self.held_by, message)] if self.held_by else []


class Senders:
    """Counts `StepReplies` per sender and start of it, to notice the ones that never came."""

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._last: dict[str, tuple[int, int]] = {}  # sender -> (epoch, seq)
        self._missing: dict[str, set[int]] = {}  # sender -> numbers below that which never came

    def heard(self, sender: str, epoch: int, seq: int) -> str:
        """Note one message: "fine", "gap" (one before it is missing), "filled" (it was the last one missing, and only
        late) or "restarted" (a new life of the sender).
        """
        known = self._last.get(sender)
        if known is None or epoch > known[0]:
            self._missing.pop(sender, None)
            self._note(sender, epoch, seq)
            return "fine" if known is None else "restarted"
        if epoch < known[0]:
            return "fine"
        if seq <= known[1]:  # late or twice: indices sort it out
            return "filled" if self._fill(sender, seq) else "fine"
        self._note(sender, epoch, seq)
        if seq == known[1] + 1:
            return "fine"
        self._miss(sender, range(known[1] + 1, seq))
        return "gap"

    def told(self, sender: str, epoch: int, sent: int) -> bool:
        """Note that `sender` says it has sent up to `sent`. Returns whether something is missing, once per loss."""
        known = self._last.get(sender)
        if known is None or epoch != known[0] or sent <= known[1]:
            return False
        self._note(sender, epoch, sent)
        self._miss(sender, range(known[1] + 1, sent + 1))
        return True

    def _miss(self, sender: str, numbers: range) -> None:
        missing = self._missing.setdefault(sender, set())
        missing.update(numbers[-_MAX_EARLY:])
        if len(missing) > _MAX_EARLY:
            self._missing[sender] = set(sorted(missing)[-_MAX_EARLY:])

    def _fill(self, sender: str, seq: int) -> bool:
        """Whether nothing is missing any more, now that `seq` has come."""
        missing = self._missing.get(sender)
        if not missing or seq not in missing:
            return False
        missing.discard(seq)
        return not missing

    def _note(self, sender: str, epoch: int, seq: int) -> None:
        if sender not in self._last and len(self._last) >= self._most:
            oldest = next(iter(self._last))
            del self._last[oldest]
            self._missing.pop(oldest, None)
        self._last[sender] = (epoch, seq)


def _cancel_stale(reply: Reply, sender: str) -> list[Action]:
    if isinstance(reply, Queued):
        return [Withdraw(sender, Cancel(reply.request_id, reply.attempt))]
    if isinstance(reply, Accepted | Tokens | Scored):
        return [SendCancel(sender, Cancel(reply.request_id, reply.attempt))]
    return []
