# SPDX-License-Identifier: GPL-2.0-or-later
"""How a command fails: a sentence, and the exit status that goes with it."""

from __future__ import annotations

from typing import IO, Any

import click

FAILED = 1
USAGE = 2
NOT_FOUND = 3
TIMEOUT = 4

#: HTTP status of a refusal -> exit status; all others are plain failures
_EXIT_OF_STATUS = {404: NOT_FOUND, 408: TIMEOUT}


class CtlError(click.ClickException):
    """A command cannot do what was asked."""

    def __init__(self, sentence: str, exit_code: int = FAILED) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code  # type: ignore[misc]

    @classmethod
    def of_status(cls, status: int, sentence: str) -> CtlError:
        """The error for a refusal of the daemon."""
        return cls(sentence, _EXIT_OF_STATUS.get(status, FAILED))

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"hostctl: {self.message}", file=file, err=file is None)
