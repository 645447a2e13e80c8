"""The first form of the database."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sql
from alembic import op

revision, down_revision = "0001", None


def _table(name: str, *columns: sql.Column[Any] | sql.UniqueConstraint) -> None:
    op.create_table(
        name,
        sql.Column("seq", sql.Integer, primary_key=True),
        sql.Column("id", sql.Text, unique=True),
        sql.Column("created_at", sql.Integer),
        *columns,
        sqlite_autoincrement=True,
    )


def _columns(kind: type, names: str) -> list[sql.Column[Any]]:
    return [sql.Column(name, kind) for name in names.split()]


def _job() -> sql.Column[Any]:
    return sql.Column("job_id", sql.Text, sql.ForeignKey("jobs.id"), index=True)


def _owner() -> sql.Column[Any]:
    return sql.Column("owner", sql.Text, nullable=False, index=True)


def upgrade() -> None:
    unique = [sql.Column(name, sql.Text, unique=True) for name in ("name", "hash")]
    _table("keys", *unique, sql.Column("admin", sql.Boolean))
    _table("files", _owner(), *_columns(sql.Integer, "bytes expires_at"), *_columns(sql.Text, "filename purpose"))
    texts = "filename purpose mime_type status file"
    _table("uploads", _owner(), *_columns(sql.Integer, "bytes expires_at keep"), *_columns(sql.Text, texts))
    upload = sql.Column("upload_id", sql.Text, sql.ForeignKey("uploads.id"), index=True)
    _table("parts", upload, sql.Column("bytes", sql.Integer))
    _table(
        "jobs",
        _owner(),
        sql.Column("status", sql.Text, index=True),
        *_columns(sql.JSON, "request hyperparameters error"),
        *_columns(sql.Text, "digest model result_file"),
        *_columns(sql.Integer, "seed finished_at trained_tokens estimated_finish read attempts"),
        sql.Column("prepared", sql.Boolean),
    )
    _table(
        "events",
        _job(),
        *_columns(sql.Text, "name level type message"),
        sql.Column("data", sql.JSON),
        sql.UniqueConstraint("job_id", "name"),
    )
    _table(
        "checkpoints",
        _job(),
        sql.Column("step", sql.Integer),
        sql.Column("model", sql.Text),
        sql.Column("metrics", sql.JSON),
        sql.UniqueConstraint("job_id", "step"),
    )
    _table("models", _owner(), _job(), sql.Column("folder", sql.Text))
