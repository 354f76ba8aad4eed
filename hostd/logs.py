# SPDX-License-Identifier: GPL-2.0-or-later
"""Log records as one line each on standard error: key=value pairs or JSON."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

#: attributes every record has; what a caller passes in `extra` is the rest
_STANDARD = {*logging.makeLogRecord({}).__dict__, "message", "asctime", "taskName"}


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    fields: dict[str, Any] = {
        "time": f"{moment}.{int(record.msecs):03d}Z", "level": record.levelname.lower(),
        "logger": record.name, "msg": record.getMessage()}
    fields.update((key, value) for key, value in record.__dict__.items() if key not in _STANDARD)
    if record.exc_info:
        fields["exception"] = logging.Formatter().formatException(record.exc_info)
    return fields


class TextFormatter(logging.Formatter):
    """logfmt: key=value, values quoted as JSON strings where they need it."""

    def format(self, record: logging.LogRecord) -> str:
        return " ".join(f"{key}={self._quote(str(value))}" for key, value in _fields(record).items())

    @staticmethod
    def _quote(value: str) -> str:
        plain = value.isprintable() and value and not any(c in value for c in ' ="')
        return value if plain else json.dumps(value)


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(_fields(record), default=str)


_FORMATS: dict[str, type[logging.Formatter]] = {"text": TextFormatter, "json": JsonFormatter}


def configure(level: str, format: str) -> None:
    """Send all records of at least `level` to standard error.  May be called again."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_FORMATS[format]())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # the ASGI server's own chatter and the HTTP protocol's are no news at debug level either
    for name in "hypercorn.access", "wsproto", "hpack":
        logging.getLogger(name).setLevel(logging.WARNING)
