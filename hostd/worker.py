# SPDX-License-Identifier: GPL-2.0-or-later
"""A worker process: one physical CPU, and the guests that take turns on it (hostd/turns.py).

    python -m hostd.worker SOCKET INDEX POOL POOL_BYTES TSC_KHZ LOG_LEVEL LOG_FORMAT SLICE_NS BT_CPU BT_CACHE
        REFILL

SOCKET and POOL are inherited descriptors: the stream to the daemon (hostd/protocol.py) and machine memory.
REFILL is how many frames are asked for at once.
"""

from __future__ import annotations

import faulthandler
import logging
import signal
import socket
import sys
from typing import cast

import unicorn

from hostd import logs
from hostd.model import BtCpu
from hostd.translator import Translator
from hostd.turns import WorkerLoop
from vmm.memory.pool import Pool
from vmm.silicon import selftest
from vmm.silicon.cpu import Cpu, new_engine
from vmm.silicon.layout import SiliconError

log = logging.getLogger(__name__)


def main(arguments: list[str]) -> None:
    """What `python -m hostd.worker` does."""
    socket_fd, index, pool_fd, pool_bytes, tsc_khz, level, format, slice_ns, bt_cpu, bt_cache, \
        refill = arguments
    # The daemon decides when a worker ends: a service manager or a terminal that signals the whole group must
    # not take the guests' CPU from under them.
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, signal.SIG_IGN)
    logs.configure(level, format)
    # what guests run is close to the machine: should it take this process down, the log says where it was
    faulthandler.enable()
    channel = socket.socket(fileno=int(socket_fd))
    engine = new_engine()
    pool = Pool(int(pool_bytes), int(pool_fd))
    try:
        cpu = Cpu(pool, engine)
        selftest.run(cpu)
    except SiliconError as error:
        sys.exit(f"hostd worker {index}: {error}")
    translator = Translator(pool, cpu.kicker, cast(BtCpu, bt_cpu), int(bt_cache))
    loop = WorkerLoop(channel, pool, cpu, translator, int(tsc_khz), int(slice_ns), int(refill))
    cpu.kicker.on_readable(channel.fileno())
    loop.hello(f"Unicorn {unicorn.__version__} AMD-V")
    log.debug("started", extra={"worker": index})
    loop.run()
    translator.close()
    cpu.close()


if __name__ == "__main__":
    main(sys.argv[1:])
