# SPDX-License-Identifier: GPL-2.0-or-later
"""Log records as lines that programs can read."""

from __future__ import annotations

import json
import logging
import shlex
from typing import Any

import pytest

from hostd.logs import JsonFormatter, TextFormatter


def record(message: str, *arguments: object, **extra: Any) -> logging.LogRecord:
    fields = {"name": "hostd.test", "levelname": "INFO", "msg": message, "args": arguments}
    return logging.makeLogRecord({**fields, **extra})


def test_text_is_key_value() -> None:
    line = TextFormatter().format(record("guest ended", vm="web", why="powered off"))
    fields = dict(part.split("=", 1) for part in shlex.split(line))
    assert fields.pop("time").endswith("Z")
    assert fields == {"level": "info", "logger": "hostd.test", "msg": "guest ended", "vm": "web",
                      "why": "powered off"}


@pytest.mark.parametrize("value", ["two\nlines", 'a "quote"', "a=b", "", "\x1b[31m"])
def test_no_value_breaks_the_line(value: str) -> None:
    line = TextFormatter().format(record("said", what=value))
    assert "\n" not in line and "\x1b" not in line
    assert json.loads(line.split(" what=", 1)[1]) == value


def test_json_is_one_object_a_line() -> None:
    line = JsonFormatter().format(record("%d guests", 3, path=object))
    fields = json.loads(line)
    assert (fields["msg"], fields["level"]) == ("3 guests", "info")
    assert "\n" not in line


def test_exceptions_are_a_field() -> None:
    try:
        raise ValueError("inner")
    except ValueError as error:
        made = record("failed", exc_info=(type(error), error, error.__traceback__))
    assert "ValueError: inner" in json.loads(JsonFormatter().format(made))["exception"]
