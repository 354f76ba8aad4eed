# SPDX-License-Identifier: GPL-2.0-or-later
"""Booting: Linux (bzImage, vmlinux), Multiboot 1 and flat images, without firmware in the guest."""

from vmm.boot.image import BootError, BootImage, load, unpack

__all__ = ["BootError", "BootImage", "load", "unpack"]
