# SPDX-License-Identifier: GPL-2.0-or-later
"""Live migration between hosts over TCP (docs/MIGRATION.md)."""
