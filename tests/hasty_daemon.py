# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs `python -m hostd.daemon ...` (its arguments), a daemon that waits for other hosts for moments only."""

from __future__ import annotations

import sys

from hostd import daemon
from hostd.migration import doubt, farewells, leaving, links, peers, serving_pages

PATIENCE = {
    (leaving, "ANSWER_S"): 0.6,
    (doubt, "FIRST_S"): 0.05, (doubt, "LAST_S"): 0.3, (doubt, "ANSWER_S"): 0.6,
    (farewells, "FIRST_S"): 0.05, (farewells, "LAST_S"): 0.3,
    (serving_pages, "FIRST_S"): 0.05, (serving_pages, "LAST_S"): 0.3, (serving_pages, "SILENT_S"): 1.0,
    (links, "CLOSE_S"): 0.3, (peers, "HELLO_S"): 1.0,
}

if __name__ == "__main__":
    for (module, name), seconds in PATIENCE.items():
        assert hasattr(module, name), name
        setattr(module, name, seconds)
    daemon.main(sys.argv[4:])
