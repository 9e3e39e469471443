"""`tokenmill explain` prints what a gateway remembers, or says in a sentence why it cannot."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from msgspec.structs import replace
from typer.testing import CliRunner, Result

from deploy import cli
from deploy.explain import page
from gateway.receipts import Kept, Note, Outcome, document
from gateway.speculation import speculation_of
from shared.messages import Finished
from shared.receipts import Receipt, Weighed, pack

TOLD = Receipt("r1", "cost", 160, "w2", 64, 32, 96, "cost", "w1", ("queue", "prefill"),
               (Weighed("w2", 64, 12_500, (0, 11_000)), Weighed("w1", 96, 20_000, (9_000, 7_250), 2, 300, 1.5)), 12,
               decision_us=310)
RECEIPT = document(Kept("req 1", "chatcmpl-1", "tiny", 0.0, (
    Outcome((Note(1, "w2", pack(TOLD)),), 160, "stop", "w2", 1, 48, "evicted"),), "default"))


class _Gateway(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        known = self.path == "/v1/requests/req%201/receipt"
        body = json.dumps(RECEIPT if known else {"error": {"message": "no receipt of this request is kept here"}})
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def gateway() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Gateway)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join(5.0)


def explain(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["explain", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})


def test_the_page_names_choice_terms_and_miss(gateway: str) -> None:
    shown = explain("req 1", "--url", gateway)
    assert shown.exit_code == 0
    assert shown.output.splitlines() == page(RECEIPT) == [
        "request req 1   response chatcmpl-1   model tiny",
        "",
        "160 prompt tokens, stop on w2, 1 attempt",
        "",
        "attempt 1: r1 chose w2 among 12 because it cost least; decided in 0.31 ms",
        "runner-up w1, 7.50 ms behind",
        "predicted 64 cached tokens (32 of them told by the worker); the most anywhere was 96",
        "",
        "   worker  cached  cost ms  queue  prefill   sent  $/h",
        "*  w2          64    12.50   0.00    11.00    0/0    0",
        "   w1          96    20.00   9.00     7.25  2/300  1.5",
        "and 10 workers that cost more",
        "learned of w2: 8,727 prompt tokens a second",
        "learned of w1: 8,828 prompt tokens a second",
        "",
        "48 tokens were cached, 16 fewer (evicted: the rest gave way while the request waited at the worker)",
    ]


def test_what_drafts_brought_and_cost_is_on_the_page() -> None:
    def said(**more: Any) -> list[str]:
        end = Finished("r", 1, "stop", drafter="suffix-1", draft_tokens=12, accepted_draft_tokens=9, draft_steps=3,
                       accepted_counts=(0, 1, 0, 0, 2), late_draft_tokens=5, draft_saved_s=0.0421, drafter_s=0.0032,
                       drafter_usd=2.5e-7)
        outcome = Outcome((), 160, "stop", "w2", 1, 48, "", speculation_of(replace(end, **more)))
        return page(document(Kept("req", "chatcmpl-1", "tiny", 0.0, (outcome,), "default")))[-2:]

    assert said() == ["suffix-1: 9 of 12 drafts agreed, in 3 steps of 4.00 tokens, 5 came too late",
                      "saved 42 ms for 3.2 ms of the drafter's time ($2.5e-07)"]
    assert said(draft_saved_s=-0.007)[1].startswith("lost 7 ms")
    assert said(draft_steps=0, late_draft_tokens=0)[0] == "suffix-1: no draft was verified"
    assert "suffix" not in "".join(said(drafter=""))


def test_several_gateways_are_asked_in_turn(gateway: str) -> None:
    shown = explain("req 1", "--url", "http://127.0.0.1:9", "--url", gateway, "--json")
    assert json.loads(shown.output) == RECEIPT


@pytest.mark.parametrize(("url", "says"), [
    ("http://127.0.0.1:9", "is this a gateway's address?"), ("nonsense", "nonsense"), ("http://", "http://")])
def test_a_gateway_that_is_none_is_named(url: str, says: str) -> None:
    shown = explain("req 1", "--url", url)
    assert shown.exit_code == 1
    assert says in shown.stderr and "Traceback" not in shown.stderr


def test_an_unknown_request_is_said_in_the_gateways_words(gateway: str) -> None:
    shown = explain("other", "--url", gateway)
    assert shown.exit_code == 1
    assert shown.stderr == f"{gateway}: no receipt of this request is kept here\n"
