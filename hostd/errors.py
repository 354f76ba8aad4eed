# SPDX-License-Identifier: GPL-2.0-or-later
"""What can go wrong for a user of the host, each as one sentence.

`str(error)` is that sentence.  `status` is the HTTP status the API answers with; everything else that
escapes from the host is a bug and is answered with 500.
"""

from __future__ import annotations


class HostError(Exception):
    """The base of all errors a user is told about."""

    status = 500


class Invalid(HostError):
    """The request itself is wrong: it can never succeed as it stands."""

    status = 400


class NotFound(HostError):
    """There is no such VM, image, blob or operation."""

    status = 404


class TimedOut(HostError):
    """What was waited for did not happen in time."""

    status = 408


class Conflict(HostError):
    """The request does not fit the present state of the VM or the host."""

    status = 409


class TooLarge(HostError):
    """An upload is larger than the configuration allows."""

    status = 413


class Failed(HostError):
    """The host could not do it: no memory, a full disk, a worker that died."""

    status = 500


class ConfigError(Exception):
    """The configuration file is unusable; the sentence names the key."""
