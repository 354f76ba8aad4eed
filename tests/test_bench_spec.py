# SPDX-License-Identifier: GPL-2.0-or-later
"""`hostctl bench spec`: the same code computes the same everywhere."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from hostd.bench import spec, spec_build
from hostd.bench.paper_engines import NATIVE, Guest, NoFigure, output, run_guest
from hostd.bench.spec import ROUNDS, Settings, timed
from hostd.cli import main
from hostd.ctl.bench_spec import Report, show
from hostd.ctl.errors import CtlError
from hostd.loader import BootFiles
from tests.tools import needs

#: one round of what is not small
FEW = " ".join(f"{name}={20 if rounds >= 50_000 else 1}" for name, rounds in ROUNDS.items())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> spec_build.Built:
    try:
        return spec_build.build(tmp_path_factory.mktemp("spec"))
    except NoFigure as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("engine", ["hw", "bt", pytest.param("qemu", marks=needs("qemu-system-x86_64"))])
def test_guests_and_the_host_compute_the_same(built: spec_build.Built, engine: str) -> None:
    guest = Guest(BootFiles(built.kernel.read_bytes(), None, FEW), 16 << 20, 60)
    native, other = output([str(built.process), FEW]), run_guest(engine, guest)
    for name in ROUNDS:
        assert timed(native, name).checksum == timed(other, name).checksum


def test_checksums_depend_on_the_rounds(built: spec_build.Built) -> None:
    first, second = (output([str(built.process), words]) for words in (FEW, FEW.replace("=1", "=2")))
    for name in ("fib", "sieve", "copy", "string", "compress"):
        assert timed(first, name).checksum != timed(second, name).checksum


def test_primes_are_those_of_the_paper(built: spec_build.Built) -> None:
    expected = 0
    for number in (2, 3, 5, 7, 11, 13, 17, 19):
        expected = (expected ^ number) * 16777619 & 0xFFFF_FFFF
    assert timed(output([str(built.process), "primes=20"]), "primes").checksum == expected


def test_a_program_that_said_nothing_has_no_time() -> None:
    assert timed("spec fib 3 400 5\r\n", "fib") == (400, 5)
    with pytest.raises(NoFigure, match="no result"):
        timed("spec fib 3 400 5\r\n", "primes")


def test_a_wrong_result_is_an_error_and_a_missing_one_a_blank(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def console(engine: str, built: object, word: str) -> str:
        ran.append(engine)
        name, rounds = word.split("=")
        if engine == "qemu":
            raise NoFigure("not installed")
        return f"spec {name} {rounds} {200 if engine == 'hw' else 100} {7 if engine != 'bt' else 8}\n"

    monkeypatch.setattr(spec, "_console", console)
    monkeypatch.setattr(spec_build, "build", lambda directory: spec_build.Built(Path(), Path()))
    figures, blanks = spec.measure(Settings((NATIVE, "hw", "qemu"), runs=2))
    assert [figure.ratios for figure in figures] == [{NATIVE: 1.0, "hw": 2.0}] * len(ROUNDS)
    assert [(blank.engine, blank.reason) for blank in blanks] == [("qemu", "not installed")] * len(ROUNDS)
    assert ran.count("qemu") == len(ROUNDS) and ran.count("hw") == 2 * len(ROUNDS)
    with pytest.raises(CtlError, match="primes computes different things: native 7, bt 8"):
        spec.measure(Settings((NATIVE, "bt"), runs=1))


def test_a_report_as_json_and_as_a_table(built: spec_build.Built, capsys: pytest.CaptureFixture[str]) -> None:
    done = CliRunner().invoke(main, ["bench", "spec", "--json", "--engine", "bt", "--runs", "1",
                                     "--scale", "1e-4"])
    assert done.exit_code == 0, done.output
    report = msgspec.json.decode(done.stdout, type=Report)
    assert report.engines == [NATIVE, "bt"]
    assert [figure.name for figure in report.figures] == list(ROUNDS)
    show(report)
    assert any(line.startswith("sieve ") and line.endswith("strided stores")
               for line in capsys.readouterr().out.splitlines())
