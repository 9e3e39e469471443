"""`tokenmill explain`: the receipt of one request as a page of text.

`page` is pure; `fetch` asks the gateways that are named, one after the other.
"""

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import httpx

TIMEOUT_S = 5.0
MISSES = {
    "none": "as much as any worker held",
    "lost_to_load": "another worker held more, and was too busy",
    "expected": "a request sent just before should have computed the rest, and had not yet",
    "evicted": "the rest gave way while the request waited at the worker",
    "event_lag": "the rest had gone before, and the router had not heard of it yet",
    "hash_mismatch": "the worker names these blocks otherwise: its hashes are not the gateway's",
}
BECAUSE = {
    "cost": "it cost least",
    "price": "it is cheaper, and about as fast as the fastest",
    "cache": "others cost the same, and it held more",
    "hint": "others were its equals; the request's cache hint named it",
    "chance": "others were its equals",
}


class ExplainFailed(Exception):
    """There is nothing to show; the message says why."""


def fetch(urls: Sequence[str], request_id: str, key: str = "") -> dict[str, Any]:
    """The receipt from the first gateway that has it; `key`: of who asked. Raises ExplainFailed."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    reasons = []
    for url in urls:
        address = f"{url.rstrip('/')}/v1/requests/{quote(request_id, safe='')}/receipt"
        try:
            response = httpx.get(address, headers=headers, timeout=TIMEOUT_S)
            body = response.json()
        except httpx.HTTPError as error:
            reasons.append(f"{url}: {error or type(error).__name__}: is this a gateway's address?")
        except (httpx.InvalidURL, ValueError):
            reasons.append(f"{url} is not a gateway's address: use one such as http://127.0.0.1:8000")
        else:
            if response.status_code == 200 and isinstance(body, dict) and body.get("object") == "receipt":
                return body
            said = body.get("error", {}) if isinstance(body, dict) else {}
            reasons.append(f"{url}: {said.get('message', 'answered something else than a receipt')}")
    raise ExplainFailed("\n".join(reasons))


def page(receipt: dict[str, Any]) -> list[str]:
    """Lines that say where the request went, what else was weighed, and what the cache gave."""
    lines = [f"request {receipt['request_id']}   response {receipt['response_id']}   model {receipt['model']}"]
    choices = receipt["choices"]
    for choice in choices:
        lines.append("")
        lines += _choice(choice, several=len(choices) > 1)
    return lines


def _choice(choice: dict[str, Any], several: bool) -> list[str]:
    head = f"choice {choice['index']}: " if several else ""
    ended = choice["ended"] or "still running"
    where = f" on {choice['worker']}" if choice["worker"] else ""
    lines = [f"{head}{choice['prompt_tokens']} prompt tokens, {ended}{where}, "
             f"{_plural(choice['attempts_made'], 'attempt')}"]
    for attempt in choice["attempts"]:
        lines.append("")
        lines += _attempt(attempt, choice["prompt_tokens"])
    if not choice["attempts"]:
        lines.append("no receipt came with it: its messages got lost, or its router is of an older version")
    lines += ["", _cache(choice), *_drafts(choice)]
    return lines


def _attempt(attempt: dict[str, Any], prompt_tokens: int) -> list[str]:
    lines = []
    if attempt["refused"]:
        lines.append(f"attempt {attempt['attempt']}: refused by {attempt['router']} ({attempt['refused']})")
    else:
        why = BECAUSE.get(attempt["because"], f"policy {attempt['because']}")
        lines.append(f"attempt {attempt['attempt']}: {attempt['router']} chose {attempt['worker']} among "
                     f"{attempt['considered']} because {why}; decided in {attempt['decision_ms']:.2f} ms")
        if attempt["runner_up"]:
            margin = attempt["margin_ms"]
            by = "" if margin is None else f", {abs(margin):.2f} ms {'behind' if margin >= 0 else 'ahead'}"
            lines.append(f"runner-up {attempt['runner_up']}{by}")
        lines.append(f"predicted {attempt['predicted_cached_tokens']} cached tokens "
                     f"({attempt['certain_tokens']} of them told by the worker); the most anywhere was "
                     f"{attempt['most_cached_tokens']}")
        lines += ["", *_table(attempt)]
        left_out = attempt["considered"] - len(attempt["candidates"])
        if left_out > 0:
            lines.append(f"and {_plural(left_out, 'worker')} that cost more")
        lines += _learned(attempt, prompt_tokens)
    for wall in attempt["filtered"]:
        more = ", ..." if wall["count"] > len(wall["workers"]) else ""
        lines.append(f"not eligible: {wall['reason']}: {wall['count']} ({', '.join(wall['workers'])}{more})")
    return lines


def _learned(attempt: dict[str, Any], prompt_tokens: int) -> list[str]:
    """The rates behind the terms of the chosen one and the runner-up, as their workers had measured them."""
    lines = []
    for row in attempt["candidates"]:
        computed, terms_ms = prompt_tokens - row["cached_tokens"], row["terms_ms"]
        if row["worker"] in (attempt["worker"], attempt["runner_up"]) and terms_ms.get("prefill", 0.0) > 0 < computed:
            step = f", {terms_ms['step']:.2f} ms a step with this request in it" if "step" in terms_ms else ""
            lines.append(f"learned of {row['worker']}: {1000 * computed / terms_ms['prefill']:,.0f} prompt tokens a "
                         f"second{step}")
    return lines


def _table(attempt: dict[str, Any]) -> list[str]:
    """One row per worker that was weighed; terms in milliseconds."""
    terms = list(dict.fromkeys(name for row in attempt["candidates"] for name in row["terms_ms"]))
    rows = [["", "worker", "cached", "cost ms", *terms, "sent", "$/h"]]
    for row in attempt["candidates"]:
        mark = "*" if row["worker"] == attempt["worker"] else ""
        sent = f"{row['sent_requests']}/{row['sent_tokens']}"
        rows.append([mark, row["worker"], str(row["cached_tokens"]), f"{row['cost_ms']:.2f}",
                     *(f"{row['terms_ms'][name]:.2f}" if name in row["terms_ms"] else "" for name in terms), sent,
                     f"{row['price_usd_per_hour']:g}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) if column < 2 else cell.rjust(width)
                      for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]


def _cache(choice: dict[str, Any]) -> str:
    if choice["miss"] is None:
        known = choice["actual_cached_tokens"]
        return "what was cached in the end is not known" if known is None else f"{known} tokens were cached"
    why = MISSES.get(choice["miss"], choice["miss"])
    missed = f", {choice['missed_tokens']} fewer" if choice["missed_tokens"] else ""
    return f"{choice['actual_cached_tokens']} tokens were cached{missed} ({choice['miss']}: {why})"


def _drafts(choice: dict[str, Any]) -> list[str]:
    """What drafts brought, if a drafter worked on it."""
    said = choice.get("speculation")
    if not said:
        return []
    steps = said["num_spec_steps"]
    verified = (f"{said['num_accepted_draft_tokens']} of {said['num_draft_tokens']} drafts agreed, in "
                f"{_plural(steps, 'step')} of {said['mean_acceptance_length']:.2f} tokens" if steps
                else "no draft was verified")
    late = f", {said['late_draft_tokens']} came too late" if said["late_draft_tokens"] else ""
    saved_ms = said["time_saved_ms"]
    return [f"{said['drafter']}: {verified}{late}",
            f"{'saved' if saved_ms >= 0 else 'lost'} {abs(saved_ms):.0f} ms for {said['drafter_ms']:.1f} ms of the "
            f"drafter's time (${said['drafter_usd']:.2g})"]


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
