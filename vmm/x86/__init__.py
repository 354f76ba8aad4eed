# SPDX-License-Identifier: GPL-2.0-or-later
"""Facts of the x86 architecture that both monitors share: tables and pure functions."""
