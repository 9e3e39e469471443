"""The tables of the database: who may ask, and what was charged.

Rules: money is whole nano-dollars, times are unix milliseconds; the same tables in SQLite and PostgreSQL; the ledger is
only ever added to, which triggers of the database itself watch over (`migrations`). What the other tables say about
money, they say for speed: `gateway.state.check` holds them against the ledger.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData()

# SQLite counts up only what it calls INTEGER, which has 64 bits there
_Number = BigInteger().with_variant(Integer, "sqlite")

# secret: of cache salts; revision: one more with each change of who may ask
settings = Table(
    "settings", metadata,
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

organisations = Table(
    "organisations", metadata,
    Column("name", Text, primary_key=True),
    Column("created", _Number, nullable=False),
)

projects = Table(
    "projects", metadata,
    Column("name", Text, primary_key=True),  # the tenant of the mesh
    Column("organisation", Text, ForeignKey("organisations.name"), nullable=False, index=True),
    Column("created", _Number, nullable=False),
    Column("weight", Float, nullable=False),
    Column("residency", Text, nullable=False),  # zones split by commas; empty: any
    Column("models", Text),  # names split by commas; null: all
    Column("tiers", Text),
    Column("requests_per_minute", _Number),  # null: no limit, as the next four
    Column("tokens_per_minute", _Number),
    Column("concurrency", _Number),
    Column("spend_per_day", _Number),
    Column("spend_per_month", _Number),
)

keys = Table(
    "keys", metadata,
    Column("prefix", Text, primary_key=True),
    Column("sha256", Text, nullable=False),
    Column("project", Text, ForeignKey("projects.name"), index=True),
    # of people who run it, not of a project: what they may, and in which organisation; null: in all
    Column("role", Text),
    Column("organisation", Text, ForeignKey("organisations.name"), index=True),
    Column("scopes", Text),  # split by commas; null: all of its kind
    Column("created", _Number, nullable=False),
    Column("expires", _Number),
    Column("revoked", _Number),
    Column("replaces", Text),  # the prefix of the key in whose place it came
    CheckConstraint("(project IS NULL) <> (role IS NULL)", name="of_a_project_or_a_person"),
)

leases = Table(
    "leases", metadata,
    Column("id", Text, primary_key=True),
    Column("gateway", Text, nullable=False, index=True),
    Column("tenant", Text, nullable=False),
    Column("day", Text, nullable=False),  # YYYY-MM-DD, in UTC
    Column("renewed", _Number, nullable=False),
    Column("closed", Boolean, nullable=False, index=True),
    # the head of its part of the ledger
    Column("seq", _Number, nullable=False),
    Column("digest", Text, nullable=False),
    Column("left", _Number, nullable=False),
)

ledger = Table(
    "ledger", metadata,
    Column("id", _Number, primary_key=True, autoincrement=True),
    Column("lease", Text, ForeignKey("leases.id"), nullable=False),
    Column("seq", _Number, nullable=False),  # 1, 2, ... within the lease
    Column("kind", Text, nullable=False),  # reserve, settle, release
    Column("at", _Number, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("day", Text, nullable=False),
    Column("amount", _Number, nullable=False),
    Column("digest", Text, nullable=False),  # over this entry and the one before it
    # of a settled request; null in other entries
    Column("request", Text, unique=True),
    Column("key", Text),
    Column("model", Text),
    Column("tier", Text),
    Column("region", Text),
    Column("batch", Boolean),
    Column("input", _Number),  # the price: nano-dollars for a million tokens, as the next two
    Column("cached_input", _Number),
    Column("output", _Number),
    Column("prompt_tokens", _Number),
    Column("cached_tokens", _Number),
    Column("generated_tokens", _Number),
    Column("draft_tokens", _Number),
    Column("accepted_draft_tokens", _Number),
    Column("attempts", _Number),
    Column("outcome", Text),
    Column("worker_us", _Number),
    Column("cost", _Number),  # ours; null: not known
    Column("once", Text),  # as `once.name`
    UniqueConstraint("lease", "seq", name="one_entry_in_each_place"),
    CheckConstraint("amount >= 0", name="amounts_are_not_negative"),
    CheckConstraint("kind IN ('reserve', 'settle', 'release')", name="kinds_of_entries"),
    CheckConstraint("(kind = 'settle') = (request IS NOT NULL)", name="settled_is_a_request"),
)
Index("ledger_by_tenant_and_day", ledger.c.tenant, ledger.c.day)
Index("ledger_by_once", ledger.c.once)

once = Table(
    "once", metadata,
    Column("tenant", Text, primary_key=True),
    Column("key", Text, primary_key=True),  # digest of a client's idempotency key
    Column("name", Text, nullable=False, unique=True),  # never used again
    Column("body", Text, nullable=False),  # digest of the request
    Column("began", _Number, nullable=False, index=True),
    Column("ended", _Number),
)

spending = Table(
    "spending", metadata,
    Column("tenant", Text, primary_key=True),
    Column("period", Text, primary_key=True),  # YYYY-MM-DD or YYYY-MM
    Column("held", _Number, nullable=False),  # reserved by open leases, and not settled yet
    Column("spent", _Number, nullable=False),
)
