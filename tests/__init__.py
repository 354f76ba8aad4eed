# SPDX-License-Identifier: GPL-2.0-or-later
"""The tests; a package, so that they can share helpers."""
