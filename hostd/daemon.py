# SPDX-License-Identifier: GPL-2.0-or-later
"""`hostd`: the daemon.  What lives how long, and what signals do.

    host         state directory, pool, workers, operations        from the first to the last
      servers    the API and the metrics                           while guests are stopped, too
        signals  SIGTERM and SIGINT end it, SIGHUP reloads         until the first of the two

What is inside ends before what is outside.  A second SIGTERM or SIGINT does not wait for guests any longer.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import trio

from hostd import __version__, logs, sockets
from hostd.config import Config, load
from hostd.errors import ConfigError, HostError
from hostd.importing import load_module
from hostd.notify import Notifier, listen_fds, watchdog_interval

if TYPE_CHECKING:
    from hostd.host import Host

log = logging.getLogger("hostd")

DEFAULT_CONFIG = Path("/etc/hostd/hostd.toml")

#: how old the status may be that the service manager shows
STATUS_S = 2.0

ENDING = (signal.SIGTERM, signal.SIGINT)


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script."""
    options = _parser().parse_args(arguments)
    try:
        if options.check_config is not None:
            load(options.check_config)
            print(f"{options.check_config}: good")
            return
        _run(partial(_configuration, options))
    except* (HostError, ConfigError) as group:
        sys.exit(f"hostd: {_first(group)}")


def _first(group: BaseExceptionGroup) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("hostd", description="Runs the virtual machines of this host.")
    parser.add_argument("--config", type=Path, metavar="FILE",
                        help=f"configuration file (default: {DEFAULT_CONFIG}, if it is there)")
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="instead of host.state_dir")
    parser.add_argument("--socket", type=Path, metavar="PATH", help="instead of api.socket")
    parser.add_argument("--check-config", type=Path, metavar="FILE",
                        help="check a configuration file and exit")
    parser.add_argument("--version", action="version", version=f"hostd {__version__}")
    return parser


def _configuration(options: argparse.Namespace) -> Config:
    """The configuration file with the command line's word over it.  Raises ConfigError."""
    path = options.config or (DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None)
    config = load(path) if path else Config()
    replace = msgspec.structs.replace
    if options.state_dir is not None:
        config = replace(config, host=replace(config.host, state_dir=str(options.state_dir.absolute())))
    if options.socket is not None:
        config = replace(config, api=replace(config.api, socket=str(options.socket.absolute())))
    return config


def _run(configure: Callable[[], Config]) -> None:
    config = configure()
    logs.configure(config.log.level, config.log.format)
    trio.run(_daemon, config, configure)


async def _daemon(config: Config, configure: Callable[[], Config]) -> None:
    # The largest imports (numpy, the web stack) are done here, so that --version and --check-config have not
    # to wait for them; what the first answer of the API does not need comes after it.
    from hostd import serving
    from hostd.api import make_app
    from hostd.host import Host

    notifier = Notifier()
    api, metrics = sockets.adopt(listen_fds())
    async with trio.open_nursery() as outer:
        host = Host(config, outer)
        own_socket: Path | None = None
        try:
            if api is None:
                api = sockets.unix_listener(config.socket, int(config.api.socket_mode, 8), config.api.group)
                own_socket = config.socket
            bind = config.metrics_bind()
            if metrics is None and bind is not None:
                metrics = sockets.tcp_listener(*bind)
            if metrics is not None:
                host.overview.metrics_url = sockets.url(metrics) + "/metrics"
            with trio.open_signal_receiver(*ENDING, signal.SIGHUP) as signals:
                async with trio.open_nursery() as servers:
                    closing = trio.Event()
                    await servers.start(serving.serve, make_app(host), api, closing)
                    outer.start_soon(host.run)
                    if metrics is not None:
                        module = await load_module("hostd.metrics")
                        await servers.start(serving.serve, module.make_metrics_app(host), metrics, closing)
                    servers.start_soon(_watch, host, notifier)
                    notifier.ready(host.overview.summary())
                    servers.start_soon(_tell_status, host, notifier)
                    log.info("ready", extra={"socket": str(config.socket),
                                             "metrics": host.overview.metrics_url})
                    await _obey(signals, host, configure, notifier)
                    notifier.stopping("stopping guests")
                    await _shut_down(signals, host, notifier)
                    closing.set()
                    servers.cancel_scope.deadline = trio.current_time() + serving.DRAIN_S
        finally:
            if own_socket is not None:
                own_socket.unlink(missing_ok=True)
            host.close()
        outer.cancel_scope.cancel()
    log.info("stopped")


async def _obey(signals: AsyncIterator[int], host: Host, configure: Callable[[], Config],
                notifier: Notifier) -> None:
    """Act on signals until one of them says to end."""
    async for number in signals:
        if number in ENDING:
            log.info("stopping", extra={"signal": signal.Signals(number).name})
            return
        notifier.reloading()
        try:
            config = configure()
        except ConfigError as error:
            log.error("configuration not reloaded", extra={"why": str(error)})
        else:
            logs.configure(config.log.level, config.log.format)
            host.reload(config)
            log.info("configuration reloaded")
        notifier.ready(host.overview.summary())


async def _shut_down(signals: AsyncIterator[int], host: Host, notifier: Notifier) -> None:
    """Stop guests and workers; at once after another ending signal."""
    async with trio.open_nursery() as nursery:

        async def lose_patience() -> None:
            async for number in signals:
                if number in ENDING:
                    nursery.cancel_scope.cancel()

        nursery.start_soon(lose_patience)
        await host.shut_down(notifier.extend)
        nursery.cancel_scope.cancel()


async def _tell_status(host: Host, notifier: Notifier) -> None:
    """Keep what `systemctl status` shows up to date."""
    told = host.overview.summary()
    while True:
        await trio.sleep(STATUS_S)
        summary = host.overview.summary()
        if summary != told:
            notifier.status(summary)
            told = summary


async def _watch(host: Host, notifier: Notifier) -> None:
    """Tell the service manager's watchdog that all is well, for as long as it is."""
    interval = watchdog_interval()
    if interval is None:
        return
    while True:
        if host.healthy():
            notifier.watchdog()
        await trio.sleep(interval)


if __name__ == "__main__":
    main()
