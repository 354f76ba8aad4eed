# SPDX-License-Identifier: GPL-2.0-or-later
"""Machine memory: the pool, who owns which frame, and the P2M of each guest."""

import os

# numpy sweeps P2M arrays and ledgers, never matrices: without this its linear algebra library starts a
# thread per core in every worker, which must stay single-threaded for its signals' sake
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
