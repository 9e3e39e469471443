"""Tenants, their keys, and the ledger.

Rule: a migration says itself what it makes, so that it makes the same when the tables have changed since.
"""

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_APPEND_ONLY = "the ledger is only ever added to"


def upgrade() -> None:
    """Make everything."""
    settings = op.create_table("settings", sa.Column("name", sa.Text, primary_key=True),
                               sa.Column("value", sa.Text, nullable=False))
    op.bulk_insert(settings, [{"name": "secret", "value": secrets.token_urlsafe(48)},
                              {"name": "revision", "value": "1"}])
    op.create_table("organisations", sa.Column("name", sa.Text, primary_key=True),
                    sa.Column("created", _NUMBER, nullable=False))
    op.create_table(
        "projects", sa.Column("name", sa.Text, primary_key=True),
        sa.Column("organisation", sa.Text, sa.ForeignKey("organisations.name"), nullable=False, index=True),
        sa.Column("created", _NUMBER, nullable=False), sa.Column("weight", sa.Float, nullable=False),
        sa.Column("residency", sa.Text, nullable=False), sa.Column("models", sa.Text), sa.Column("tiers", sa.Text),
        *(sa.Column(name, _NUMBER) for name in ("requests_per_minute", "tokens_per_minute", "concurrency",
                                                "spend_per_day", "spend_per_month")))
    op.create_table(
        "keys", sa.Column("prefix", sa.Text, primary_key=True), sa.Column("sha256", sa.Text, nullable=False),
        sa.Column("project", sa.Text, sa.ForeignKey("projects.name"), index=True), sa.Column("role", sa.Text),
        sa.Column("organisation", sa.Text, sa.ForeignKey("organisations.name"), index=True),
        sa.Column("scopes", sa.Text), sa.Column("created", _NUMBER, nullable=False), sa.Column("expires", _NUMBER),
        sa.Column("revoked", _NUMBER), sa.Column("replaces", sa.Text),
        sa.CheckConstraint("(project IS NULL) <> (role IS NULL)", name="of_a_project_or_a_person"))
    op.create_table(
        "leases", sa.Column("id", sa.Text, primary_key=True),
        sa.Column("gateway", sa.Text, nullable=False, index=True), sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("day", sa.Text, nullable=False), sa.Column("renewed", _NUMBER, nullable=False),
        sa.Column("closed", sa.Boolean, nullable=False, index=True), sa.Column("seq", _NUMBER, nullable=False),
        sa.Column("digest", sa.Text, nullable=False), sa.Column("left", _NUMBER, nullable=False))
    op.create_table(
        "ledger", sa.Column("id", _NUMBER, primary_key=True, autoincrement=True),
        sa.Column("lease", sa.Text, sa.ForeignKey("leases.id"), nullable=False),
        sa.Column("seq", _NUMBER, nullable=False), sa.Column("kind", sa.Text, nullable=False),
        sa.Column("at", _NUMBER, nullable=False), sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("day", sa.Text, nullable=False), sa.Column("amount", _NUMBER, nullable=False),
        sa.Column("digest", sa.Text, nullable=False), sa.Column("request", sa.Text, unique=True),
        *(sa.Column(name, sa.Text) for name in ("key", "model", "tier", "region")), sa.Column("batch", sa.Boolean),
        *(sa.Column(name, _NUMBER) for name in ("input", "cached_input", "output", "prompt_tokens", "cached_tokens",
                                                "generated_tokens", "draft_tokens", "accepted_draft_tokens",
                                                "attempts")),
        sa.Column("outcome", sa.Text), sa.Column("worker_us", _NUMBER), sa.Column("cost", _NUMBER),
        sa.UniqueConstraint("lease", "seq", name="one_entry_in_each_place"),
        sa.CheckConstraint("amount >= 0", name="amounts_are_not_negative"),
        sa.CheckConstraint("kind IN ('reserve', 'settle', 'release')", name="kinds_of_entries"),
        sa.CheckConstraint("(kind = 'settle') = (request IS NOT NULL)", name="settled_is_a_request"))
    op.create_index("ledger_by_tenant_and_day", "ledger", ["tenant", "day"])
    op.create_table(
        "spending", sa.Column("tenant", sa.Text, primary_key=True), sa.Column("period", sa.Text, primary_key=True),
        sa.Column("held", _NUMBER, nullable=False), sa.Column("spent", _NUMBER, nullable=False))
    _watch_over_the_ledger()


def _watch_over_the_ledger() -> None:
    if op.get_bind().dialect.name == "sqlite":
        for what in ("UPDATE", "DELETE"):
            op.execute(f"CREATE TRIGGER ledger_no_{what.lower()} BEFORE {what} ON ledger "
                       f"BEGIN SELECT RAISE(ABORT, '{_APPEND_ONLY}'); END")
        return
    op.execute(f"CREATE FUNCTION ledger_is_append_only() RETURNS trigger LANGUAGE plpgsql AS "
               f"$$ BEGIN RAISE EXCEPTION '{_APPEND_ONLY}'; END $$")
    op.execute("CREATE TRIGGER ledger_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON ledger "
               "FOR EACH STATEMENT EXECUTE FUNCTION ledger_is_append_only()")
