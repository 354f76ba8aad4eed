# SPDX-License-Identifier: GPL-2.0-or-later
"""What goes wrong with a kernel, its initrd or its command line."""

from __future__ import annotations


class BootError(ValueError):
    """A machine cannot be booted from these files.  The message is one sentence for the user."""
