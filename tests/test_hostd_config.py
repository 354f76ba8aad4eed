# SPDX-License-Identifier: GPL-2.0-or-later
"""The configuration file: documented whole, and every mistake told by its key."""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec
import pytest

from hostd.config import Config, Size, load, parse
from hostd.errors import ConfigError
from hostd.lifecycle import Policy

FILE = Path(__file__).parent.parent / "etc" / "hostd.toml"


def test_the_file_in_the_tree_says_the_defaults() -> None:
    assert load(FILE) == Config()


def test_the_file_in_the_tree_documents_every_key() -> None:
    text = FILE.read_text()
    written = tomllib.loads(text.replace('\n#memory = "8G"', '\nmemory = "8G"'))
    for section in msgspec.structs.fields(Config):
        keys = {field.name for field in msgspec.structs.fields(section.type)}
        assert set(written[section.name]) == keys


def test_an_empty_file_is_a_configuration() -> None:
    assert parse("") == Config()


@pytest.mark.parametrize(("text", "sentence"), [
    ("[host]\nwrokers = 2", "host.wrokers: unknown key"),
    ("[hots]\n", "hots: unknown key"),
    ("[host]\nworkers = -1", "host.workers: expected `int` >= 0"),
    ("[host]\nworkers = true", "host.workers: expected `int`, got `bool`"),
    ("host = 3", "host: expected `object`, got `int`"),
    ("[host]\nmemory = 1", "host.memory: at least"),
    ("[host]\nstate_dir = 'relative'", "host.state_dir: must be an absolute path"),
    ("[host]\nshutdown_timeout = -1", "host.shutdown_timeout: "),
    ("[defaults]\nmemory = '12Q'", "defaults.memory: expected a size"),
    ("[defaults]\nmemory = '4097'", "defaults.memory: must be"),
    ("[defaults]\nmemory = '4G'", "defaults.memory: must be"),
    ("[defaults]\non_crash = 'explode'", "defaults.on_crash: invalid enum value 'explode'"),
    ("[defaults]\nvmm = 'kvm'", "defaults.vmm: invalid enum value 'kvm'"),
    ("[bt]\ncpu = 'kvm'", "bt.cpu: invalid enum value 'kvm'"),
    ("[bt]\ncache = '64K'", 'bt.cache: must be between "1M" and "1024M"'),
    ("[bt]\ncache = '2G'", "bt.cache: must be"),
    ("[defaults]\nweight = 0", "defaults.weight: expected `int` >= 1"),
    ("[defaults]\ncap = 101", "defaults.cap: expected `int` <= 100"),
    ("[memory]\novercommit_ratio = 0", "memory.overcommit_ratio: expected `float` > 0"),
    ("[memory]\nswap = 'none'", "memory.swap: expected a size"),
    ("[memory]\nswap = '257G'", 'memory.swap: at most "256G" can be used'),
    ("[sharing]\npages_per_second = 0", "sharing.pages_per_second: expected `int` >= 1"),
    ("[sharing]\nenabled = 1", "sharing.enabled: expected `bool`, got `int`"),
    ("[metrics]\naddress = 'nowhere'", "metrics.address: expected \"host:port\""),
    ("[metrics]\naddress = 'localhost:99999'", "metrics.address: expected \"host:port\""),
    ("[api]\nsocket_mode = '999'", "api.socket_mode: "),
    (f"[api]\nsocket = '/{'x' * 120}'", "api.socket: a Unix socket's path has at most 107 bytes"),
    ("[migration]\naddress = 'nowhere'", "migration.address: expected \"host:port\""),
    ("[migration]\nbandwidth = '1K'", 'migration.bandwidth: at least "64K" is needed; 0 is no limit'),
    ("[migration]\ndowntime_ms = 0", "migration.downtime_ms: expected `float` >= 1"),
    ("[migration]\nconnections = 17", "migration.connections: expected `int` <= 16"),
    ("[migration.tls]\nkeys = ''", "migration.tls.keys: unknown key"),
    ("[log]\nformat = 'xml'", "log.format: invalid enum value 'xml'"),
    ("[scheduler]\nslice_ms = 0", "scheduler.slice_ms: "),
    ("[host", "not TOML: "),
])
def test_a_mistake_is_told_by_its_key(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as failure:
        parse(text)
    assert str(failure.value).startswith(sentence)
    assert "\n" not in str(failure.value)


def test_a_missing_file_is_told_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*/absent.toml: No such file"):
        load(tmp_path / "absent.toml")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hostd.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(path)


@pytest.mark.parametrize(("value", "size"), [
    (4096, 4096), ("4096", 4096), ("64K", 64 << 10), ("128M", 128 << 20), ("3G", 3 << 30),
    ("2MiB", 2 << 20), (" 5m ", 5 << 20), ("1T", 1 << 40),
])
def test_sizes(value: object, size: int) -> None:
    assert Size.parse(value).bytes == size


@pytest.mark.parametrize("value", ["", "M", "1.5G", "-1", -1, True, None, "1 M B", "0x10"])
def test_what_is_no_size(value: object) -> None:
    with pytest.raises(ValueError, match="expected a size"):
        Size.parse(value)


def test_the_service_manager_s_directories_are_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", "/state:/other")
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/runtime")
    assert Config().state_dir == Path("/state")
    assert Config().socket == Path("/runtime/hostd.sock")
    assert parse("[host]\nstate_dir = '/mine'").state_dir == Path("/mine")


def test_values_arrive() -> None:
    config = parse("[host]\nmemory = '64M'\nworkers = 3\n[defaults]\non_crash = 'restart'\n"
                   "[metrics]\naddress = '[::1]:9000'\n[bt]\ncache = '1M'")
    assert (config.bt.cpu, config.bt.cache.bytes) == ("native", 1 << 20)
    assert config.pool_bytes == 64 << 20
    assert config.worker_count == 3
    assert config.defaults.on_crash is Policy.RESTART
    assert config.metrics_bind() == ("::1", 9000)


def test_no_metrics() -> None:
    assert parse("[metrics]\naddress = ''").metrics_bind() is None
