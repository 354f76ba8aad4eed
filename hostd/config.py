# SPDX-License-Identifier: GPL-2.0-or-later
"""The configuration file (etc/hostd.toml documents every key): read, checked, and complained about by key."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from hostd.errors import ConfigError
from hostd.lifecycle import Policy
from hostd.migration.views import DEFAULT_DOWNTIME_MS, Connections, Milliseconds
from hostd.model import (
    DEFAULT_CACHE,
    DEFAULT_MEMORY,
    MAX_MEMORY,
    MIN_MEMORY,
    PAGE,
    BtCpu,
    Cap,
    Monitor,
    Timeout,
    Weight,
)

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(\d+)([KMGT]?)(?:i?B)?", re.IGNORECASE)

#: a pool below this holds no guest worth having
MIN_POOL = 16 << 20
#: a translation cache below this turns over too soon; its jumps reach 2 GiB, but nothing gains from so much
MIN_CACHE, MAX_CACHE = 1 << 20, 1 << 30
#: a migration that is held to less than this would take hours
MIN_BANDWIDTH = 64 << 10
#: a slot of the swap file has 32 bits and counts 64 bytes (hostd/swapfile.py)
MAX_SWAP = 64 << 32


class Size:
    """A number of bytes written as an integer or like "128M" (binary units)."""

    def __init__(self, bytes: int) -> None:
        self.bytes = bytes

    @classmethod
    def parse(cls, value: object) -> Size:
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return cls(value)
        match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
        if match is None:
            raise ValueError(f'expected a size such as 134217728 or "128M", got {value!r}')
        return cls(int(match[1]) * _UNITS[match[2].upper()])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Size) and other.bytes == self.bytes

    def __hash__(self) -> int:
        return hash(self.bytes)

    def __repr__(self) -> str:
        return f"Size({self.bytes})"


class Section(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A table of the file."""


class HostSection(Section, frozen=True):
    #: empty: what systemd's StateDirectory=/RuntimeDirectory= gives, else the usual place
    state_dir: str = ""
    runtime_dir: str = ""
    #: None: three quarters of the machine's RAM
    memory: Size | None = None
    #: 0: one per CPU this process may use
    workers: Annotated[int, Meta(ge=0, le=256)] = 0
    shutdown_timeout: Timeout = 20.0
    on_shutdown: Literal["stop", "suspend"] = "stop"


class ApiSection(Section, frozen=True):
    #: empty: hostd.sock in the runtime directory
    socket: str = ""
    socket_mode: Annotated[str, Meta(pattern=r"^0?[0-7]{3}\Z")] = "0660"
    group: str = ""
    max_upload: Size = Size(256 << 20)


class MetricsSection(Section, frozen=True):
    #: host:port; empty: no metrics
    address: str = "127.0.0.1:9177"


class SchedulerSection(Section, frozen=True):
    slice_ms: Annotated[float, Meta(ge=1, le=100)] = 4.0
    balance_interval: Annotated[float, Meta(ge=0.1, le=60)] = 1.0


class MemorySection(Section, frozen=True):
    #: of the pool: what the memory of all VMs may come to
    overcommit_ratio: Annotated[float, Meta(gt=0, le=1000)] = 2.0
    #: most bytes of the swap file; 0: no swap
    swap: Size = Size(4 << 30)


class SharingSection(Section, frozen=True):
    enabled: bool = True
    pages_per_second: Annotated[int, Meta(ge=1, le=10_000_000)] = 10_000


class DefaultsSection(Section, frozen=True):
    memory: Size = Size(DEFAULT_MEMORY)
    vmm: Monitor = "hw"
    weight: Weight = 100
    cap: Cap = 0
    on_crash: Policy = Policy.STOP
    on_poweroff: Policy = Policy.STOP


class BtSection(Section, frozen=True):
    cpu: BtCpu = "native"
    cache: Size = Size(DEFAULT_CACHE)


class TlsSection(Section, frozen=True):
    """Files in PEM; all of them or none."""

    certificate: str = ""
    key: str = ""
    ca: str = ""


class MigrationSection(Section, frozen=True):
    #: host:port; empty: no guests come in
    address: str = ""
    #: without TLS, to and from other machines
    allow_plain: bool = False
    downtime_ms: Milliseconds = DEFAULT_DOWNTIME_MS
    #: bytes a second that go out, for all migrations together; 0: no limit
    bandwidth: Size = Size(0)
    connections: Connections = 1
    #: guests that come in at a time
    max_incoming: Annotated[int, Meta(ge=1, le=256)] = 8
    post_copy: bool = True
    tls: TlsSection = TlsSection()

    def bind(self) -> tuple[str, int] | None:
        """(host, port) of the listener."""
        return _host_port(self.address)


class LogSection(Section, frozen=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


class Config(Section, frozen=True):
    host: HostSection = HostSection()
    api: ApiSection = ApiSection()
    metrics: MetricsSection = MetricsSection()
    scheduler: SchedulerSection = SchedulerSection()
    memory: MemorySection = MemorySection()
    sharing: SharingSection = SharingSection()
    defaults: DefaultsSection = DefaultsSection()
    bt: BtSection = BtSection()
    migration: MigrationSection = MigrationSection()
    log: LogSection = LogSection()

    @property
    def state_dir(self) -> Path:
        return Path(self.host.state_dir or _systemd_dir("STATE_DIRECTORY") or "/var/lib/hostd")

    @property
    def runtime_dir(self) -> Path:
        return Path(self.host.runtime_dir or _systemd_dir("RUNTIME_DIRECTORY") or "/run/hostd")

    @property
    def socket(self) -> Path:
        return Path(self.api.socket) if self.api.socket else self.runtime_dir / "hostd.sock"

    @property
    def worker_count(self) -> int:
        return self.host.workers or len(os.sched_getaffinity(0))

    @property
    def pool_bytes(self) -> int:
        """The pool's size, whole frames.  The memfd is sparse: only what guests touch costs memory."""
        if self.host.memory is not None:
            return self.host.memory.bytes // PAGE * PAGE
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return max(MIN_POOL, machine * 3 // 4 // PAGE * PAGE)

    def metrics_bind(self) -> tuple[str, int] | None:
        """(host, port) of the metrics listener."""
        return _host_port(self.metrics.address)


def _host_port(address: str) -> tuple[str, int] | None:
    """What a listener binds to; None: there is none."""
    if not address:
        return None
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _is_host_port(address: str) -> bool:
    port = address.rpartition(":")[2]
    return ":" in address and port.isdecimal() and int(port) < 65536


def _systemd_dir(variable: str) -> str:
    """The first directory of systemd's colon-separated list (systemd.exec(5), RuntimeDirectory=)."""
    return os.environ.get(variable, "").split(":")[0]


def _decode_size(kind: type, value: Any) -> Any:
    return Size.parse(value)


def load(path: Path) -> Config:
    """The configuration in the file at `path`.  Raises ConfigError naming the file and the key."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None
    try:
        return parse(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse(text: str) -> Config:
    """The configuration written in `text`.  Raises ConfigError naming the key."""
    try:
        config = msgspec.convert(tomllib.loads(text), Config, dec_hook=_decode_size)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not TOML: {error}") from None
    except msgspec.ValidationError as error:
        raise ConfigError(_by_key(str(error))) from None
    _check(config)
    return config


def _by_key(message: str) -> str:
    """msgspec's sentence with the key first: "host.workers: expected `int` >= 0"."""
    what, _, where = message.partition(" - at `$.")
    key = where.rstrip("`")
    unknown = re.match(r"Object contains unknown field `(.*)`", what)
    if unknown:
        return f"{key + '.' if key else ''}{unknown[1]}: unknown key"
    return f"{key}: {what[:1].lower()}{what[1:]}"


def _check(config: Config) -> None:
    """What a type cannot say."""
    if config.host.memory is not None and config.host.memory.bytes < MIN_POOL:
        raise ConfigError(f'host.memory: at least "{MIN_POOL >> 20}M" is needed')
    memory = config.defaults.memory.bytes
    if not MIN_MEMORY <= memory <= MAX_MEMORY or memory % PAGE:
        raise ConfigError('defaults.memory: must be between "1M" and "3G" and a multiple of 4096 bytes')
    if config.memory.swap.bytes > MAX_SWAP:
        raise ConfigError(f'memory.swap: at most "{MAX_SWAP >> 30}G" can be used')
    if not MIN_CACHE <= config.bt.cache.bytes <= MAX_CACHE:
        raise ConfigError(f'bt.cache: must be between "{MIN_CACHE >> 20}M" and "{MAX_CACHE >> 20}M"')
    for key in "state_dir", "runtime_dir":
        value = getattr(config.host, key)
        if value and not value.startswith("/"):
            raise ConfigError(f"host.{key}: must be an absolute path, got {value!r}")
    # sun_path of unix(7) holds 107 bytes and a NUL
    if len(os.fsencode(config.socket)) > 107:
        raise ConfigError(f"api.socket: a Unix socket's path has at most 107 bytes, got {config.socket}")
    for name in "metrics", "migration":
        address = getattr(config, name).address
        if address and not _is_host_port(address):
            raise ConfigError(f'{name}.address: expected "host:port", got {address!r}')
    if config.migration != MigrationSection():
        _check_migration(config.migration)


def _check_migration(migration: MigrationSection) -> None:
    # who does not migrate need not wait for OpenSSL
    from hostd.migration import security

    if 0 < migration.bandwidth.bytes < MIN_BANDWIDTH:
        raise ConfigError(f'migration.bandwidth: at least "{MIN_BANDWIDTH >> 10}K" is needed; 0 is no limit')
    bind = migration.bind()
    encrypted = security.load(migration.tls) is not None
    if bind is not None and not (encrypted or migration.allow_plain or security.is_loopback(bind[0])):
        raise ConfigError(f"migration.address: without [migration.tls] it must be a loopback address, got "
                          f"{bind[0]!r}; allow_plain = true lets guests come in unencrypted, from anybody")
