# SPDX-License-Identifier: GPL-2.0-or-later
"""How users write where another host listens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostd.errors import Invalid
from hostd.migration.links import parse_peer, peer_name


@pytest.mark.parametrize(("text", "parsed"), [
    ("web", ("web", 9178)), ("web.example:80", ("web.example", 80)), ("10.0.0.1:65535", ("10.0.0.1", 65535)),
    ("[::1]", ("::1", 9178)), ("[fe80::1%eth0]:1", ("fe80::1%eth0", 1)),
])
def test_a_peer_is_a_host_and_perhaps_a_port(text: str, parsed: tuple[str, int]) -> None:
    assert parse_peer(text) == parsed
    assert parse_peer(peer_name(*parsed)) == parsed


@pytest.mark.parametrize(("text", "sentence"), [
    ("", "'' is no host name"), (":9178", "'' is no host name"), ("a b", "'a b' is no host name"),
    ("-x", "'-x' is no host name"), ("::1", "expected HOST or HOST:PORT, with an IPv6 address in brackets"),
    ("[web]", "'web' is no IPv6 address"), ("[::1", "expected HOST"), ("[::1]x", "expected HOST"),
    ("web:", "a port is a number from 1 to 65535, got ''"), ("web:0", "a port is"), ("web:65536", "a port"),
    ("web:٣", "a port is"), ("[::1]:-1", "a port is"),
])
def test_what_is_no_peer(text: str, sentence: str) -> None:
    with pytest.raises(Invalid) as failure:
        parse_peer(text)
    assert str(failure.value).startswith(sentence)


@given(st.text(alphabet="[]:%.-_1aZ\n\x00é", max_size=20) | st.text(max_size=40))
def test_any_text_is_a_peer_or_refused(text: str) -> None:
    try:
        host, port = parse_peer(text)
    except Invalid as error:
        assert "\n" not in str(error)
    else:
        assert parse_peer(peer_name(host, port)) == (host, port)
