# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that changes hosts has one owner: the records, and every order in which things can go wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hostd import storage
from hostd.errors import Conflict, Failed
from hostd.migration import handover
from hostd.migration.handover import FOLLOWS, OUTCOMES, Arriving, Handovers, Step, moved
from tests.handover_model import Tables, explore
from tests.test_hostd_inventory import definition, fail_after

TOKEN, OTHER = "0123456789abcdef" * 2, "f" * 32
PEER = "far.example:9178"


# --- every order of things ----------------------------------------------------------------------------------

def test_whatever_goes_wrong_there_is_one_owner_in_the_end() -> None:
    """Two crashes of each host, two broken lines, a full disk: all states that any of it can lead to."""
    explored = explore(Tables(), (2, 2, 2, 1, 0))
    assert explored.wrong == []
    assert set(explored.ends) == {"source", "target"}
    assert explored.states > 5000


def test_a_user_can_take_it_back_from_a_host_that_is_gone() -> None:
    explored = explore(Tables(), (1, 1, 1, 0, 1))
    assert explored.wrong == []


def test_without_faults_it_goes_over() -> None:
    assert explore(Tables(), (0, 0, 0, 0, 0)).ends.keys() == {"source", "target"}


def without(gone: tuple[Arriving, Step]) -> Callable[[Arriving, Step], Arriving]:
    return lambda arriving, step: arriving if (arriving, step) == gone else moved(arriving, step)


def also(more: tuple[Arriving, Step], to: Arriving) -> Callable[[Arriving, Step], Arriving]:
    return lambda arriving, step: to if (arriving, step) == more else moved(arriving, step)


@pytest.mark.parametrize(("broken", "mistake"), [
    ({"follows": {**FOLLOWS, ("committing", "lost"): "go on"}}, "the source runs what is the target's"),
    ({"follows": {**FOLLOWS, ("restarted", "lost"): "halt"}}, "both own it"),
    ({"follows": {**FOLLOWS, ("committing", "running"): "go on"}}, "the source runs what is the target's"),
    ({"follows": {**FOLLOWS, ("restarted", "aborted"): "go on"}}, "it runs without memory"),
    ({"follows": {**FOLLOWS, ("fenced", "lost"): "depart"}}, "it runs without memory"),
    ({"outcomes": {**OUTCOMES, "committing": "aborted"}}, "the source runs what is the target's"),
    ({"outcomes": {**OUTCOMES, "expected": "committed"}}, "nobody owns it"),
    ({"outcomes": {**OUTCOMES, "unknown": "running"}}, "no end"),
    ({"moved": without(("expected", "resolve"))}, "the source runs what is the target's"),
    ({"moved": without(("expected", "lost"))}, "the target stays expected"),
    ({"moved": also(("unknown", "commit"), "committing")}, "it runs without memory"),
    ({"leaving": ("stop", "say final")}, "both own it"),
    ({"arrival": ("say committed", "write", "save definition", "run")}, "nobody owns it"),
    ({"arrival": ("run", "write", "save definition", "say committed")}, "it runs without memory"),
    ({"departure": ("remove record", "remove definition", "drop guest", "say forget")}, "both own it"),
    ({"departure": ("say forget", "remove definition", "drop guest", "remove record")}, "both own it"),
])
def test_other_rules_would_not_do(broken: dict[str, Any], mistake: str) -> None:
    found = explore(Tables(**broken), (1, 1, 1, 1, 0), at_most=1).wrong
    assert found and found[0].startswith(mistake)


# --- records ------------------------------------------------------------------------------------------------

WEB = definition("web")


def test_a_source_keeps_its_record_until_it_is_over(tmp_path: Path) -> None:
    Handovers(tmp_path).fence(TOKEN, WEB, PEER)
    again = Handovers(tmp_path)
    record = again.fence_of("web")
    assert record is not None and again.fence_of("other") is None
    assert (record.token, record.peer, record.definition) == (TOKEN, PEER, WEB)
    assert again.fenced() == [record] and again.unkept() == []
    again.forget(TOKEN)
    again.forget(TOKEN)
    assert again.fence_of("web") is None
    assert os.listdir(tmp_path / "migrations") == []


def test_a_user_is_told_what_is_asked_and_what_to_do(tmp_path: Path) -> None:
    handovers = Handovers(tmp_path)
    handovers.fence(TOKEN, WEB, PEER)
    said = (f"VM web was being handed over to {PEER} ({TOKEN})%s: {PEER} is asked whether it has it; if that "
            "is gone for good: hostctl recover web")
    assert handovers.doubt_sentence(TOKEN) == said % ""
    assert Handovers(tmp_path).doubt_sentence(TOKEN) == said % " when this hostd ended"


def test_a_target_keeps_its_record_until_the_source_knows(tmp_path: Path) -> None:
    handovers = Handovers(tmp_path)
    with handovers.expected(TOKEN):
        handovers.commit(TOKEN, WEB, PEER)
    assert handovers.answer(TOKEN) == "committed"
    again = Handovers(tmp_path)
    assert again.answer(TOKEN) == "committed"
    assert [record.definition for record in again.unkept()] == [WEB]
    again.kept(TOKEN)
    assert again.unkept() == Handovers(tmp_path).unkept() == []
    assert Handovers(tmp_path).answer(TOKEN) == "committed"
    again.forget(TOKEN)
    assert again.answer(TOKEN) == Handovers(tmp_path).answer(TOKEN) == "aborted"


def test_aborted_is_for_ever(tmp_path: Path) -> None:
    handovers = Handovers(tmp_path)
    with handovers.expected(TOKEN):
        assert handovers.answer(TOKEN) == "aborted"
        with pytest.raises(Conflict, match="was broken off"):
            handovers.commit(TOKEN, WEB, PEER)
    with pytest.raises(Conflict, match="was broken off"):
        handovers.commit(OTHER, WEB, PEER)
    assert os.listdir(tmp_path / "migrations") == []


def test_who_asks_in_the_middle_asks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handovers, answers = Handovers(tmp_path), []
    real = storage.write

    def write(path: Path, data: bytes) -> None:
        answers.append(handovers.answer(TOKEN))
        real(path, data)

    monkeypatch.setattr(storage, "write", write)
    with handovers.expected(TOKEN):
        handovers.commit(TOKEN, WEB, PEER)
    assert [*answers, handovers.answer(TOKEN)] == ["running", "committed"]


def test_a_token_is_good_for_once(tmp_path: Path) -> None:
    handovers = Handovers(tmp_path)
    with handovers.expected(TOKEN):
        assert handovers.knows(TOKEN)
        with pytest.raises(Conflict, match="under way or over"), handovers.expected(TOKEN):
            pass
        handovers.commit(TOKEN, WEB, PEER)
    handovers.fence(OTHER, definition("b"), PEER)
    for token, sentence in (TOKEN, "under way or over"), (OTHER, "this host is the source"):
        with pytest.raises(Conflict, match=sentence), handovers.expected(token):
            pass
    assert handovers.knows(TOKEN) and handovers.knows(OTHER) and not handovers.knows("0" * 32)


@pytest.mark.parametrize("synced", [0, 1])
def test_what_could_not_be_written_never_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             synced: int) -> None:
    """The file's sync fails, or the directory's, when the record has its name already."""
    handovers = Handovers(tmp_path)
    with handovers.expected(TOKEN):
        fail_after(synced, monkeypatch)
        with pytest.raises(Failed, match="no space left"):
            handovers.commit(TOKEN, WEB, PEER)
        with pytest.raises(Failed, match="no space left"):
            handovers.fence(OTHER, WEB, PEER)
        monkeypatch.undo()
        assert handovers.answer(TOKEN) == "aborted"
        with pytest.raises(Conflict):
            handovers.commit(TOKEN, WEB, PEER)
    assert handovers.fence_of("web") is None
    assert os.listdir(tmp_path / "migrations") == []


def test_a_definition_that_could_not_be_taken_out_stays(tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    handovers = Handovers(tmp_path)
    with handovers.expected(TOKEN):
        handovers.commit(TOKEN, WEB, PEER)
    fail_after(0, monkeypatch)
    with pytest.raises(Failed):
        handovers.kept(TOKEN)
    monkeypatch.undo()
    assert [record.definition for record in Handovers(tmp_path).unkept()] == [WEB]


def test_records_nobody_asks_about_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "MAX_RECORDS", 1)
    handovers = Handovers(tmp_path)
    with handovers.expected(TOKEN):
        handovers.commit(TOKEN, WEB, PEER)
    with handovers.expected(OTHER):
        with pytest.raises(Failed, match="1 hand-overs are not over"):
            handovers.commit(OTHER, definition("b"), PEER)
        assert handovers.answer(OTHER) == "aborted"


@pytest.mark.parametrize("change", [
    {"version": 2}, {"token": "x"}, {"token": OTHER}, {"phase": "lost"}, {"vm": "other"}, {"vm": "../web"},
    {"peer": ""}, {"peer": "a b"}, {"definition": None}, {"definition": {}}, {"time": "now"}, {"more": 1},
    None,
])
def test_a_malformed_record_is_set_aside(tmp_path: Path, change: dict[str, Any] | None,
                                         caplog: pytest.LogCaptureFixture) -> None:
    handovers = Handovers(tmp_path)
    handovers.fence(TOKEN, WEB, PEER)
    handovers.fence("a" * 32, definition("good"), PEER)
    path = tmp_path / "migrations" / f"{TOKEN}.json"
    content = b"{" if change is None else msgspec.json.encode(msgspec.json.decode(path.read_bytes()) | change)
    path.write_bytes(content)
    assert [record.vm for record in Handovers(tmp_path).fenced()] == ["good"]
    assert path.with_suffix(".broken").read_bytes() == content
    assert [record.message for record in caplog.records] == ["file set aside"]


def test_a_prepared_record_is_none_until_it_is_committed(tmp_path: Path) -> None:
    handovers = Handovers(tmp_path)
    with handovers.expected(TOKEN):
        handovers.prepare(TOKEN, WEB, PEER)
        assert not handovers.unkept() and not (tmp_path / "migrations" / f"{TOKEN}.json").exists()
    assert not list((tmp_path / "migrations").iterdir())
    with handovers.expected(TOKEN):
        handovers.prepare(TOKEN, WEB, PEER)
        handovers.commit(TOKEN, WEB, PEER)
    assert [record.token for record in Handovers(tmp_path).unkept()] == [TOKEN]
