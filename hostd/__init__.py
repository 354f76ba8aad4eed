# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon that runs many x86 guests on one host, and its command line."""

__version__ = "0.1.0"
