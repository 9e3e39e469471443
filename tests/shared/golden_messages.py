"""One example of every struct on the wire, each field off its default.

`python -m tests.shared.golden_messages` writes the bytes of new ones to tests/shared/golden/. Bytes that are there
already are left alone: a change of format is a new field with a default, or a decision.
"""

from pathlib import Path

from shared.messages import (
    Accepted,
    Adjust,
    Cancel,
    Cleared,
    Close,
    Commit,
    DrafterStatus,
    Drafts,
    Failed,
    Finished,
    Follow,
    GatewayStatus,
    Generate,
    Grammar,
    KvEvents,
    KvSnapshot,
    Open,
    Placement,
    Proposal,
    Queued,
    Removed,
    Residency,
    RouterStatus,
    Sampling,
    Scored,
    SnapshotRequest,
    StepReplies,
    Stored,
    Tokens,
    Wire,
    WorkerStatus,
    encode,
)
from shared.tokens import pack

FOLDER = Path(__file__).parent / "golden"
HASH = bytes(range(16))

sampling = Sampling(temperature=0.5, top_p=0.9, top_k=40, min_p=0.05, seed=2**64 - 1)
adjust = Adjust(repetition_penalty=1.25, frequency_penalty=0.5, presence_penalty=-0.5, biased=pack([7]),
                biases=b"\x00\x00\x80\xbf", min_tokens=4, bad_words=(pack([8, 9]), pack([3])), allowed=pack([3, 7]))
grammar = Grammar(kind="regex", text="a+")
residency = Residency(zones=("eu", "us-east1"))
placement = Placement(router="router-a", worker="worker-a", cached_tokens=32, estimate_s=0.25, policy="prefix",
                      certain_tokens=16, receipt=b"why")
accepted = Accepted(request_id="r-1", attempt=2, worker="worker-a", cached_tokens=32, receipt=b"why")
queued = Queued(request_id="r-1", attempt=2)
tokens = Tokens(request_id="r-1", attempt=2, index=3, tokens=pack([1, 2**32 - 1]), logprobs=bytes(16))
scored = Scored(request_id="r-1", attempt=2, index=1, logprobs=bytes(range(16)))
finished = Finished(request_id="r-1", attempt=2, reason="stop", worker="worker-a", prompt_tokens=40, cached_tokens=32,
                    completion_tokens=7, draft_tokens=6, accepted_draft_tokens=4, drafter="drafter-a", queue_s=0.5,
                    prefill_s=0.25, decode_s=1.5, miss="evicted", draft_steps=3, accepted_counts=(1, 0, 2),
                    late_draft_tokens=5, draft_saved_s=0.5, drafter_s=0.125, drafter_usd=0.0625, embedding=bytes(8),
                    worker_s=0.75)
failed = Failed(request_id="r-1", attempt=2, code="overloaded", message="full", retryable=True, retry_after_s=1.5,
                receipt=b"why not")
stored, removed, cleared = Stored(hashes=HASH), Removed(hashes=HASH * 2), Cleared()
opened = Open(request_id="r-1", attempt=2, tokens=pack([1, 2]), tenant="acme", prompt_tokens=2, sampling=sampling,
              max_draft_tokens=4, traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
              prediction=pack([5, 6]))
commit = Commit(request_id="r-1", attempt=2, base_length=2, tokens=pack([3]), digest=2**32 - 1)
close = Close(request_id="r-1", attempt=2)
proposal = Proposal(request_id="r-1", attempt=2, base_length=3, tokens=pack([4, 5]), assumed=pack([6]),
                    digest=2**32 - 1, confidence=bytes([50, 255, 100]))

EXAMPLES: dict[str, Wire] = {type(message).__name__: message for message in (
    sampling, adjust, residency, placement, accepted, tokens, finished, failed, stored, removed, cleared, opened,
    commit, close, proposal,
    Generate(request_id="r-1", attempt=2, gateway="gateway-a", model="SmolLM2", tokens=pack([1, 2, 3]), max_tokens=9,
             deadline=1_700_000_000.5, sampling=sampling, tenant="acme", cache_salt=HASH, block_hashes=HASH * 2,
             generated=pack([4]), stop_token_ids=(0, 2), priority=1, residency=residency,
             exclude_workers=("worker-b",), cache_hint="session 5", placement=placement,
             recipe="int8-g32", vocabulary="abcd", tier="flex", prediction=pack([5, 6]), weight=2.5,
             adjust=adjust, logprobs=2, prompt_logprobs=0, grammar=grammar, pooling="mean"),
    queued, scored, grammar,
    Cancel(request_id="r-1", attempt=2),
    StepReplies(sender="worker-a", epoch=1_700_000_000_000, seq=5, replies=(accepted, tokens, finished, failed),
                recipe="int8-g32"),
    KvEvents(worker="worker-a", epoch=1_700_000_000_000, seq=5, events=(stored, removed, cleared)),
    KvSnapshot(worker="worker-a", epoch=1_700_000_000_000, seq=5, hashes=HASH * 3, part=1, parts=2),
    SnapshotRequest(router="router-a"),
    Follow(worker="worker-a", epoch=1_700_000_000_000, seq=5, events=(opened, commit, close), zone="eu-north1",
           lead_tokens=3),
    Drafts(drafter="drafter-a", epoch=1_700_000_000_000, proposals=(proposal,), worker_epoch=1_700_000_000_001,
           seconds=0.125),
    WorkerStatus(id="worker-a", epoch=1_700_000_000_000, model="SmolLM2", state="draining", engine="cuda",
                 recipe="int8-g32", vocabulary="abcd", zone="eu-north1", sku="h100", price_usd_per_hour=2.5,
                 block_size_tokens=32, blocks_total=1000, blocks_used=10, context_length=8192, running=3, waiting=1,
                 queued_tokens=500, max_running=64, prefill_tok_s=1000.0, step_base_s=0.005, step_row_s=0.0005,
                 decode_tok_s=300.0, kv_seq=77, replies_sent={"gateway-a": 5}, tokens_total=10000,
                 draft_tokens_total=600, accepted_draft_tokens_total=400, drafter="drafter-a", steps_total=5000,
                 kv_digest=HASH, parity=HASH, drafting="on", draft_steps_total=300, abilities=("adjust", "grammar"),
                 stream_tokens=96.5),
    RouterStatus(id="router-a", epoch=1_700_000_000_000, state="draining", placed_total=9, refused_total=1,
                 indexed_blocks=500, held=3, busy=0.5),
    DrafterStatus(id="drafter-a", epoch=1_700_000_000_000, kind="model", vocabulary="abcd", state="draining",
                  zone="eu-north1", following=3, proposed_total=600, busy=0.25, price_usd_per_hour=0.5),
    GatewayStatus(id="gateway-a", epoch=1_700_000_000_000, state="draining", active=3, url="http://127.0.0.1:8000",
                  busy=0.5),
)}


def write_new() -> list[str]:
    """Write the bytes of examples that have none yet; returns their names."""
    FOLDER.mkdir(exist_ok=True)
    new = [name for name in EXAMPLES if not (FOLDER / f"{name}.bin").exists()]
    for name in new:
        (FOLDER / f"{name}.bin").write_bytes(encode(EXAMPLES[name]))
    return new


if __name__ == "__main__":
    print("written:", ", ".join(write_new()) or "nothing new")
