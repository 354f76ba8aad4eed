# SPDX-License-Identifier: GPL-2.0-or-later
"""Virtio 1.2 devices: a virtqueue in `ring`, the MMIO transport in `mmio`, and one device a file."""
