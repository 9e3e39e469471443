"""Subject -> who listens and what arrives there.

Pure. Ids are lower-case words without dots; model names are encoded because they may hold anything.

Rule: what holds tokens that may not be everywhere is sent to a name *and* a zone (`worker.<id>.generate.<zone>`,
`worker.<id>.drafts.<zone>`, `drafter.<id>.follow.<zone>`). A service listens in its own zone alone, so that one which
comes back under the same id elsewhere is not reached by what was meant for the one before (law 7).

| subject                    | message                    | from -> to                                    |
|----------------------------|----------------------------|-----------------------------------------------|
| generate.<model>           | Generate                   | gateway -> one router (queue group `router`)  |
| worker.<id>.generate       | Generate with a placement  | router -> that worker                         |
| worker.<id>.generate.<zone>| the same, under a policy   | router -> that worker, while it is there      |
| worker.<id>.cancel         | Cancel                     | gateway -> worker                             |
| router.<id>.cancel         | Cancel                     | gateway -> a router that holds the request    |
| replies.<gateway>          | StepReplies                | worker, or a refusing router -> gateway       |
| replies.<gateway>          | StepReplies of Queued      | router that holds requests -> gateway         |
| worker.<id>.kv             | KvEvents, KvSnapshot       | worker -> every router                        |
| worker.<id>.kv_request     | SnapshotRequest            | router -> worker                              |
| drafter.<id>.follow.<zone> | Follow                     | worker -> its drafter, while it is there      |
| worker.<id>.drafts.<zone>  | Drafts                     | drafter -> worker, while it is there          |
| placed.<router>            | Generate, tokens left out  | router -> the other routers                   |
| status.<kind>.<id>         | a Status                   | each -> all                                   |
"""

import re
from urllib.parse import quote

PREFIX = "mill.v1"
ROUTER_QUEUE = "router"
ALL_GENERATE = f"{PREFIX}.generate.*"
ALL_KV = f"{PREFIX}.worker.*.kv"
ALL_STATUS = f"{PREFIX}.status.>"
ALL_PLACED = f"{PREFIX}.placed.*"

_ID = re.compile(r"[a-z0-9][a-z0-9_-]*")


def check_id(name: str) -> str:
    """`name` unchanged if it can stand in a subject. Raises ValueError otherwise."""
    if not _ID.fullmatch(name):
        raise ValueError(f"{name!r} cannot be an id: use lower-case letters, digits, '-' and '_'")
    return name


def generate(model: str) -> str:
    # quote() leaves . and ~ alone; a dot would split the subject
    return f"{PREFIX}.generate.{quote(model, safe='').replace('.', '%2E')}"


def worker_generate(worker: str, zone: str = "") -> str:
    return f"{PREFIX}.worker.{worker}.generate{_in(zone)}"


def worker_cancel(worker: str) -> str:
    return f"{PREFIX}.worker.{worker}.cancel"


def router_cancel(router: str) -> str:
    return f"{PREFIX}.router.{router}.cancel"


def replies(gateway: str) -> str:
    return f"{PREFIX}.replies.{gateway}"


def worker_kv(worker: str) -> str:
    return f"{PREFIX}.worker.{worker}.kv"


def worker_kv_request(worker: str) -> str:
    return f"{PREFIX}.worker.{worker}.kv_request"


def drafter_follow(drafter: str, zone: str = "") -> str:
    return f"{PREFIX}.drafter.{drafter}.follow{_in(zone)}"


def worker_drafts(worker: str, zone: str = "") -> str:
    return f"{PREFIX}.worker.{worker}.drafts{_in(zone)}"


def placed(router: str) -> str:
    return f"{PREFIX}.placed.{router}"


def status(kind: str, name: str) -> str:
    return f"{PREFIX}.status.{kind}.{name}"


def inbox(role: str, zone: str = "") -> str:
    """Where one connection hears itself and the broker, behind a word of its own; what others may not listen to."""
    return f"_INBOX.{role}{_in(zone)}"


def _in(zone: str) -> str:
    return f".{quote(zone.lower(), safe='').replace('.', '%2E')}" if zone else ""
