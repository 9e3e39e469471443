"""Messages of the mesh, bent: from a service of another version, a damaged one or a hostile one.

All services run unchanged on the memory bus, in virtual time. Whatever bytes arrive, no handler raises and no service
ends, and a request that comes afterwards gets the tokens that it gets in a mesh that heard none of it.
"""

import asyncio
import contextlib
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import msgspec

from shared import memory_bus, subjects
from shared.messages import encode
from shared.tokens import pack
from tests.gateway.world import PROMPT, World, world
from tests.laws.mutations import ODD, bent, changed
from tests.shared.golden_messages import EXAMPLES
from tests.virtual_time import run_virtual

Play = Callable[[int], None]
MESSAGES = 60  # of one case
HASHES = tuple(bytes([number]) * size for number, size in ((0, 0), (1, 16), (2, 160), (3, 15), (4, 17)))
PACKED = tuple(pack(ids) for ids in ((), (1,), (1, 2, 3), (2**32 - 1,), [5] * 40))
VALUES: tuple[Any, ...] = (*HASHES, *PACKED, b"\x01", b"\x01\x02\x03\x04\x05", *ODD, "w1", "r1", "g1", "d1", "tiny")


def _subjects() -> dict[str, tuple[str, ...]]:
    """Where messages of each kind go, of those that are there and of those that only say so."""
    strange = [(kind, name) for kind in ("worker", "router", "drafter", "gateway") for name in (f"{kind[0]}9", "x")]
    statuses = tuple(subjects.status(kind, name) for kind, name in strange)
    return {
        "Generate": (subjects.generate("tiny"), subjects.worker_generate("w1"), subjects.worker_generate("w1", "eu"),
                     subjects.placed("r9")),
        "Cancel": (subjects.worker_cancel("w1"), subjects.router_cancel("r1")),
        "StepReplies": (subjects.replies("g1"),),
        "KvEvents": (subjects.worker_kv("w9"), subjects.worker_kv("w1")),
        "KvSnapshot": (subjects.worker_kv("w9"), subjects.worker_kv("w1")),
        "SnapshotRequest": (subjects.worker_kv_request("w1"),),
        "Follow": (subjects.drafter_follow("d1"), subjects.drafter_follow("d1", "eu")),
        "Drafts": (subjects.worker_drafts("w1"), subjects.worker_drafts("w1", "eu")),
        "WorkerStatus": statuses, "RouterStatus": statuses, "DrafterStatus": statuses, "GatewayStatus": statuses,
    }


SUBJECTS = _subjects()
EVERYWHERE = sorted({subject for each in SUBJECTS.values() for subject in each})
# who is there, in place of those in the examples; statuses and cache events are of strangers, as NATS lets nobody else
KNOWN = {"gateway-a": "g1", "router-a": "r1", "SmolLM2": "tiny", "drafter-a": "d1", "eu-north1": "eu"}


def _documents() -> dict[str, Any]:
    plain = {kind: msgspec.msgpack.decode(encode(EXAMPLES[kind])) for kind in SUBJECTS}
    for kind in SUBJECTS:
        told = KNOWN | {"worker-a": "w9" if kind in ("WorkerStatus", "KvEvents", "KvSnapshot") else "w1"}
        if kind.endswith("Status"):
            told |= {"gateway-a": "g9", "router-a": "r9", "drafter-a": "d9"}
        plain[kind] = _renamed(plain[kind], told)
    plain["Generate"] |= {"deadline": 1e12, "residency": {}, "recipe": "", "vocabulary": "", "pooling": "",
                          "grammar": None, "exclude_workers": []}
    return plain


def _renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _renamed(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [_renamed(inner, names) for inner in value]
    return names.get(value, value) if isinstance(value, str) else value


DOCUMENTS = _documents()


def message(chooser: random.Random) -> tuple[str, bytes]:
    """A subject, and bytes for whoever listens there."""
    kind = chooser.choice([*SUBJECTS])
    subject = chooser.choice(SUBJECTS[kind] if chooser.random() < 0.9 else EVERYWHERE)
    document = DOCUMENTS[kind]
    if chooser.random() < 0.3:
        document = document | {name: chooser.choice((0, 1, 1, 2, 2**62)) for name in ("epoch", "seq", "attempt")
                               if name in document}
    if chooser.random() < 0.9:
        document = changed(document, chooser, VALUES)
    try:
        data = msgspec.msgpack.encode(document)
    except (OverflowError, UnicodeEncodeError):  # has no bytes
        return message(chooser)
    match chooser.randrange(10):
        case 0:
            data = bent(data, chooser)
        case 1:
            data = b"\x91" * chooser.choice((50, 5000, 500_000)) + data
        case 2:
            data = b"\x81\xa4type" * 20_000 + data
    return subject, data[:1 << 20]


@contextlib.contextmanager
def wire() -> Iterator[Play]:
    def play(seed: int) -> None:
        run_virtual(_played(seed), timeout_s=400.0)

    yield play


async def _played(seed: int) -> None:
    chooser = random.Random(seed)
    with mock.patch.object(memory_bus, "_log", Raised()) as raised:
        async with world(zones=("eu",), drafters=1) as mesh:
            whole = (await mesh.ask()).json()["choices"][0]["text"]
            tenders = [asyncio.create_task(_meanwhile(mesh, number)) for number in range(3)]
            for _ in range(MESSAGES):
                subject, data = message(chooser)
                await mesh.buses[0].publish(subject, data)
                await asyncio.sleep(chooser.choice((0.0, 0.0, 0.001, 0.05)))
            await asyncio.gather(*tenders)
            await asyncio.sleep(20.0)  # strangers fall silent
            response = await mesh.client.post("/v1/completions", json={
                "prompt": PROMPT, "max_tokens": 4, "temperature": 0})
            assert not raised.by, raised.by
            assert response.status_code == 200, response.text
            assert response.json()["choices"][0]["text"] == whole


class Raised:
    """What handlers raised, in place of a log of it."""

    def __init__(self) -> None:
        self.by: list[str] = []

    def exception(self, event: str, **fields: Any) -> None:
        error = sys.exc_info()[1]
        assert error is not None
        last = traceback.extract_tb(error.__traceback__)[-1]
        self.by.append(f"{fields.get('subject')}: {error!r:.200} in {last.filename.rpartition('/')[2]}:{last.lineno}")


async def _meanwhile(mesh: World, number: int) -> None:
    """A stream in the midst of it, which may be answered or end with an error, but ends."""
    await mesh.client.post("/v1/completions", json={"prompt": f"{number} {PROMPT}", "max_tokens": 60, "seed": number})


