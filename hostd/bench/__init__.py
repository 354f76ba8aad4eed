# SPDX-License-Identifier: GPL-2.0-or-later
"""`hostctl bench`: what the host costs, measured; every figure beside what it is to reach.

Benchmarks report, they never judge: a figure that misses its mark is printed, not an error.
"""
