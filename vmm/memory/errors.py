# SPDX-License-Identifier: GPL-2.0-or-later
"""What can go wrong with machine memory."""


class FrameError(Exception):
    """Base of the errors of this room."""


class BadAddress(FrameError):
    """A guest-physical address with no RAM behind it."""

    def __init__(self, gpa: int) -> None:
        super().__init__(f"guest-physical address {gpa:#x} has no memory")
        self.gpa = gpa


class OutOfFrames(FrameError):
    """No machine frame is free at this moment."""
