"""Loggers that speak on rank 0 unless told otherwise, without secrets; no handler is installed before `setup`."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

from mmscale.redact import redact

_ROOT = "mmscale"


class _RankFilter(logging.Filter):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        record.rank = self.rank
        return self.rank == 0 or getattr(record, "all_ranks", False) or record.levelno >= logging.ERROR


class _RedactingFormatter(logging.Formatter):
    """Tracebacks are redacted too: this is the last thing that touches the text."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class RankLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger whose calls take `all_ranks=True` for a line that every rank shall print."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        kwargs["extra"] = {"all_ranks": kwargs.pop("all_ranks", False)}
        return msg, kwargs


def get_logger(name: str) -> RankLogger:
    """The logger of a module: `log = get_logger(__name__)`."""
    return RankLogger(logging.getLogger(name), {})


def setup(rank: int = 0, level: str = "INFO") -> None:
    """Sends log lines to standard error, once per process; lines of other ranks than 0 only when they ask for it."""
    handler = logging.StreamHandler(sys.stderr)
    text = "%(asctime)s [%(rank)s] %(levelname).1s %(name)s: %(message)s"
    handler.setFormatter(_RedactingFormatter(text, "%H:%M:%S"))
    handler.addFilter(_RankFilter(rank))
    root = logging.getLogger(_ROOT)
    root.handlers[:] = [handler]
    root.setLevel(level)
    root.propagate = False
    if logging.lastResort is not None:  # what libraries say that have set up no handler of their own
        logging.lastResort.setFormatter(_RedactingFormatter())
