"""Requests that came with an idempotency key: charged once, however often they are sent.

Nothing of an answer is kept. Whoever sends such a request again gets it computed again, from the same seed, so the same
tokens (law 1), and pays for those alone that were not charged before: what the ledger has under the key's name.
Rules: the name of a key ends with the transaction that settles its request; one that is under way is not begun again;
another body under the same key is a mistake. A key is forgotten after a day. Everything here may wait.
"""

import secrets
from typing import NamedTuple

from sqlalchemy import Connection, delete, func, insert, select, update

from gateway.state.database import Database
from gateway.state.tables import ledger, once
from shared.errors import MillError

KEPT_MS = 24 * 3600 * 1000
_BACK_SOON_S = 1.0


class InProgress(MillError):
    """Of the same key."""

    status, type, code, retryable = 409, "invalid_request_error", "request_in_progress", True


class KeyReused(MillError):
    """For another request."""

    status, type, code = 422, "invalid_request_error", "idempotency_key_reused"


class Once(NamedTuple):
    """A key under which a request runs, and what was charged under it before. Tokens."""

    name: str
    prompt_tokens: int = 0
    generated_tokens: int = 0


class Onces:
    """The keys of one database. `gone_ms`: a request that began so long ago has ended, said or not."""

    def __init__(self, database: Database, gone_ms: int) -> None:
        self._database = database
        self._gone_ms = gone_ms

    def begin(self, tenant: str, key: str, body: str, at: int) -> Once:
        """A request of this key begins; `key` and `body`: digests. Raises InProgress, KeyReused, DatabaseFailed."""
        with self._database.writing() as connection:
            here = (once.c.tenant == tenant) & (once.c.key == key)
            row = connection.execute(select(once).where(here).with_for_update()).one_or_none()
            if row is not None and row.began < at - KEPT_MS:
                connection.execute(delete(once).where(here))
                row = None
            if row is None:
                name = secrets.token_hex(12)
                connection.execute(insert(once).values(tenant=tenant, key=key, name=name, body=body, began=at))
                return Once(name)
            if row.body != body:
                raise KeyReused("this idempotency key was used for another request: use another key, or send the same")
            if row.ended is None and row.began > at - self._gone_ms:
                raise InProgress("a request with this idempotency key is under way: retry when it has ended",
                                 retry_after_s=_BACK_SOON_S)
            connection.execute(update(once).where(here).values(began=at, ended=None))
            charged = connection.execute(select(
                func.sum(ledger.c.prompt_tokens), func.sum(ledger.c.generated_tokens)).where(
                    ledger.c.once == row.name)).one()
            return Once(row.name, int(charged[0] or 0), int(charged[1] or 0))

    def end(self, name: str, at: int) -> None:
        """Nothing came of the request that began under this name. Raises DatabaseFailed."""
        with self._database.writing() as connection:
            ended(connection, [name], at)

    def forget(self, at: int) -> None:
        """Keys that are older than a day. Raises DatabaseFailed."""
        with self._database.writing() as connection:
            connection.execute(delete(once).where(once.c.began < at - KEPT_MS))


def ended(connection: Connection, names: list[str], at: int) -> None:
    """What ran under these names is in the ledger."""
    connection.execute(update(once).where(once.c.name.in_(names)).values(ended=at))
