"""Requests that are to be charged once, however often they are sent."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Make the table, and the column by which the ledger's entries are found again."""
    op.create_table(
        "once", sa.Column("tenant", sa.Text, primary_key=True), sa.Column("key", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False, unique=True), sa.Column("body", sa.Text, nullable=False),
        sa.Column("began", _NUMBER, nullable=False, index=True), sa.Column("ended", _NUMBER))
    op.add_column("ledger", sa.Column("once", sa.Text))
    op.create_index("ledger_by_once", "ledger", ["once"])
