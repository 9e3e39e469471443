"""How much of a tenant's limits is used: token buckets for requests and tokens a minute, a count of what is under way.

Rules: a bucket holds a minute's worth and refills evenly, so nobody gets more than a minute's worth at once, or in the
long run more than the rate. Tokens are reserved before a request starts (prompts and the most it may generate) and
settled when it ended (what it used). What is refused takes nothing from what refused it. Exact for one gateway: behind
N gateways a tenant may have up to N times as much.
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
    """What is left of so many a minute."""

    def __init__(self, now_s: float) -> None:
        self._used = 0.0
        self._at_s = now_s

    def left(self, most: int, now_s: float) -> float:
        """What may be taken now; below 0 after more was used than reserved."""
        self._used = max(0.0, self._used - most * (now_s - self._at_s) / MINUTE_S)
        self._at_s = now_s
        return most - self._used

    def take(self, count: int) -> None:
        """Take so many, or give them back."""
        self._used += count

    def full_in_s(self, most: int) -> float:
        """Seconds until all of it is there, from the last look."""
        return self._used * MINUTE_S / most


class Meter:
    """One tenant at one gateway. `streams` are under way."""

    def __init__(self, now_s: float) -> None:
        self.streams = 0
        self._requests = Bucket(now_s)
        self._tokens = Bucket(now_s)

    def count(self, limits: Limits, now_s: float) -> None:
        """One request more. Raises RateLimited, and counts none."""
        if (most := limits.requests_per_minute) is None:
            return
        left = self._requests.left(most, now_s)
        if left < 1:
            raise RateLimited(f"this tenant has sent its {most} requests a minute: retry later",
                              retry_after_s=(1 - left) * MINUTE_S / most)
        self._requests.take(1)

    def enter(self, limits: Limits, streams: int) -> None:
        """So many streams more under way. Raises RateLimited, and enters none."""
        if (most := limits.concurrency) is not None:
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

    def reserve(self, limits: Limits, tokens: int, now_s: float) -> None:
        """Set `tokens` aside. Raises RateLimited, and sets none aside."""
        most = limits.tokens_per_minute
        if most is None:
            return
        if tokens > most:
            raise TooMuch(f"this request may come to {tokens} tokens, and this tenant has {most} a minute: shorten the "
                          "prompt, or ask for fewer with max_tokens")
        left = self._tokens.left(most, now_s)
        if left < tokens:
            raise RateLimited(f"this tenant has {_whole(left)} of its {most} tokens a minute left, and this request "
                              f"may come to {tokens}: retry later",
                              retry_after_s=(tokens - left) * MINUTE_S / most)
        self._tokens.take(tokens)

    def settle(self, limits: Limits, reserved: int, used: int) -> None:
        """A request that had `reserved` has ended."""
        if limits.tokens_per_minute is not None:
            self._tokens.take(used - reserved)

    def headers(self, limits: Limits, now_s: float) -> Headers:
        """What is left, as OpenAI's clients read it."""
        found: Headers = []
        for what, most, bucket in ((b"requests", limits.requests_per_minute, self._requests),
                                   (b"tokens", limits.tokens_per_minute, self._tokens)):
            if most is not None:
                left = _whole(bucket.left(most, now_s))
                found += [(b"x-ratelimit-limit-" + what, b"%d" % most),
                          (b"x-ratelimit-remaining-" + what, b"%d" % left),
                          (b"x-ratelimit-reset-" + what, span(bucket.full_in_s(most)).encode())]
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
