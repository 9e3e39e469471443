"""How much of a tenant's limits is used: token buckets for requests and tokens a minute, a count of what is under way.

Rules: a bucket holds a minute's worth and refills evenly, so nobody gets more than a minute's worth at once, or in the
long run more than the rate. Tokens are set aside before a request starts (prompts and the most it may generate) and
settled when it ended (what it used). Only what was used flows back with time: what is set aside takes its place for as
long as it is, and a request that holds much and uses little earns nothing by it. What is refused takes nothing from
what refused it. Under a lowered limit a tenant waits a minute at most for what it used under the old one. Exact for one
gateway: behind N gateways a tenant may have up to N times as much.
Pure: the caller passes monotonic seconds.
"""

import math

from gateway.tenants import Limits
from shared.errors import RateLimited

MINUTE_S = 60.0
_BUSY_S = 1.0  # when one of a tenant's own streams ends is not known

Headers = list[tuple[bytes, bytes]]


class TooMuch(RateLimited):
    """More than the limit ever allows at once: coming back later does not help."""

    retryable = False


class Bucket:
    """So many a minute, `most`; None: no limit, and nothing is remembered of what was used."""

    def __init__(self, most: int | None, now_s: float) -> None:
        self.most = most
        self._used = 0.0
        self._set_aside = 0
        self._at_s = now_s

    def left(self, now_s: float) -> float:
        """What may be taken or set aside now; below 0 while more is set aside than a limit that was lowered since."""
        self._flow(now_s)
        return math.inf if self.most is None else self.most - self._used - self._set_aside

    def take(self, count: int, now_s: float) -> None:
        """So many were used."""
        self._flow(now_s)
        self._used += count
        if self.most is not None:
            # more was set aside under a higher limit: it costs a minute's worth and no more
            self._used = min(self._used, self.most)

    def set_aside(self, count: int) -> None:
        """Keep so many for who may use them."""
        self._set_aside += count

    def settle(self, set_aside: int, used: int, now_s: float) -> None:
        """Of what was set aside `used` were used, from now on: the rest was never taken."""
        self._set_aside -= set_aside
        self.take(used, now_s)

    def change(self, most: int | None, now_s: float) -> None:
        """Another limit from now on."""
        self._flow(now_s)
        self.most = most
        self.take(0, now_s)

    def left_in_s(self, count: int) -> float:
        """Seconds from the last look until `count` are left, if nothing is set aside any more by then."""
        if self.most is None:
            return 0.0
        short = self._used + self._set_aside + count - self.most
        return max(0.0, min(short, self._used)) * MINUTE_S / self.most

    def full_in_s(self) -> float:
        """Seconds from the last look until all of it is there, if what is set aside is used now."""
        return 0.0 if self.most is None else (self._used + self._set_aside) * MINUTE_S / self.most

    def holds_back(self, count: int) -> bool:
        """Whether time alone does not make room for `count`: what is set aside has to be settled."""
        return self.most is not None and self._set_aside + count > self.most

    def _flow(self, now_s: float) -> None:
        flowed = math.inf if self.most is None else self.most * (now_s - self._at_s) / MINUTE_S
        self._used = max(0.0, self._used - flowed)
        self._at_s = now_s


class Meter:
    """One tenant at one gateway. `streams` are under way."""

    def __init__(self, limits: Limits, now_s: float) -> None:
        self.streams = 0
        self.limits = limits
        self._requests = Bucket(limits.requests_per_minute, now_s)
        self._tokens = Bucket(limits.tokens_per_minute, now_s)

    def change(self, limits: Limits, now_s: float) -> None:
        """These limits from now on, also for what is under way."""
        self.limits = limits
        self._requests.change(limits.requests_per_minute, now_s)
        self._tokens.change(limits.tokens_per_minute, now_s)

    def count(self, now_s: float) -> None:
        """One request more. Raises RateLimited, and counts none."""
        if self._requests.left(now_s) < 1:
            raise RateLimited(f"this tenant has sent its {self._requests.most} requests a minute: retry later",
                              retry_after_s=self._requests.left_in_s(1))
        self._requests.take(1, now_s)

    def enter(self, streams: int) -> None:
        """So many streams more under way. Raises RateLimited, and enters none."""
        if (most := self.limits.concurrency) is not None:
            if streams > most:
                raise TooMuch(f"this request is {streams} streams, and this tenant may have {most} at once: ask for "
                              "fewer choices or prompts")
            if self.streams + streams > most:
                raise RateLimited(f"{self.streams} streams of this tenant are under way, and it may have {most} at "
                                  "once: let one end", retry_after_s=_BUSY_S)
        self.streams += streams

    def leave(self, streams: int) -> None:
        """So many less."""
        self.streams -= streams

    def reserve(self, tokens: int, now_s: float) -> None:
        """Set `tokens` aside. Raises RateLimited, and sets none aside."""
        most, bucket = self._tokens.most, self._tokens
        if most is not None and tokens > most:
            raise TooMuch(f"this request may come to {tokens} tokens, and this tenant has {most} a minute: shorten the "
                          "prompt, or ask for fewer with max_tokens")
        left = bucket.left(now_s)
        if left < tokens:
            wait_s = bucket.left_in_s(tokens)
            raise RateLimited(f"this tenant has {_whole(left)} of its {most} tokens a minute left, and this request "
                              f"may come to {tokens}: retry later",
                              retry_after_s=max(wait_s, _BUSY_S) if bucket.holds_back(tokens) else wait_s)
        bucket.set_aside(tokens)

    def settle(self, reserved: int, used: int, now_s: float) -> None:
        """A request that had `reserved` has ended."""
        self._tokens.settle(reserved, used, now_s)

    def headers(self, now_s: float) -> Headers:
        """What is left, as OpenAI's clients read it."""
        found: Headers = []
        for what, bucket in ((b"requests", self._requests), (b"tokens", self._tokens)):
            if bucket.most is not None:
                left = _whole(bucket.left(now_s))
                found += [(b"x-ratelimit-limit-" + what, b"%d" % bucket.most),
                          (b"x-ratelimit-remaining-" + what, b"%d" % left),
                          (b"x-ratelimit-reset-" + what, span(bucket.full_in_s()).encode())]
        return found


def _whole(left: float) -> int:
    return max(0, math.floor(left + 1e-9))


def span(seconds: float) -> str:
    """`6m0s`, `1.5s`, `20ms`: a time as OpenAI writes it, rounded up to a millisecond."""
    milliseconds = math.ceil(1000 * seconds - 1e-6)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{f'{minutes}m' if minutes else ''}{rest / 1000:g}s"
