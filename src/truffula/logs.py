"""Log lines on stderr, as text or as one JSON object per line, in the API and engine processes."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass

import msgspec


@dataclass(frozen=True)
class LogSettings:
    """``format`` is ``text`` or ``json``; ``level`` the minimum level, as in the option."""

    format: str = "text"
    level: str = "info"


class TextLines(logging.Formatter):
    """``2026-01-31 12:00:00.123 info truffula.access id=… status=200``"""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        line = f"{stamp}.{int(record.msecs):03d} {record.levelname.lower()} {record.name} {record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonLines(logging.Formatter):
    """One JSON object per line; the field ``exception`` holds a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields = getattr(record, "fields", None)
        if fields is not None:
            entry |= fields
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(entry).decode()


def setup_logs(settings: LogSettings) -> None:
    """Send truffula's log lines, and warnings of uvicorn and asyncio, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if settings.format == "json" else TextLines())
    for name, level in (("truffula", settings.level.upper()), ("uvicorn.error", "WARNING"), ("asyncio", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
