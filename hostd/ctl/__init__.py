# SPDX-License-Identifier: GPL-2.0-or-later
"""hostctl's rooms: the client, one file per group of commands, and the makers of images."""
