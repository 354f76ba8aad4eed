# SPDX-License-Identifier: GPL-2.0-or-later
"""The rows of the instruction table, one module for each part of the opcode space."""
