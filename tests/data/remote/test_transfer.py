"""Transfers that break off, say nothing or give other bytes, and the programs that they come from."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from fdscale.config.errors import UserError
from fdscale.data.index import load_index
from fdscale.data.remote import transfer
from fdscale.data.remote.cache import GIB, Cache
from tests.data.shard_server import ShardServer


def test_a_url_that_does_not_answer_is_told(folder, cache):
    server = ShardServer(folder)
    server.server_close()
    with pytest.raises(UserError, match=rf"cannot fetch {server.url}/index\.json: curl ended with 7 .*try 3 of 3"):
        load_index(server.url, cache)


def test_what_is_not_there_is_told_at_once(folder, server, cache):
    with pytest.raises(
        UserError, match=r"/elsewhere/index\.json: curl ended with 22 after 0 bytes \(the server answers 404\); check"
    ):
        load_index(f"{server.url}/elsewhere", cache)
    with pytest.raises(UserError, match=r"/nowhere/index\.json is not there; check"):
        load_index("file:///nowhere", cache)
    assert server.asked == {"elsewhere/index.json": 2}, "and once for its status"


def test_a_server_that_is_overloaded_for_long_is_told_by_its_status(server, cache, monkeypatch):
    monkeypatch.setattr(transfer, "SILENCE_SECONDS", 0.5)  # within which curl waits, to try again
    monkeypatch.setattr(transfer, "WAITS", ())
    server.statuses["index.json"] = 503
    with pytest.raises(
        UserError, match=r"nothing came for 0 s, after 0 bytes \(the server answers 503\) \(try 1 of 1\)"
    ):
        load_index(server.url, cache)


FAULTS = {
    "truncated": (lambda content, n: (content[:700], 700), r"700 of \d+ bytes came"),
    "broken off": (lambda content, n: (content[:700], len(content)), r"curl ended with 18 after 700 bytes"),
    "empty": (lambda content, n: (b"", 0), r"0 of \d+ bytes came"),
    "growing": (lambda content, n: (content + b"0" * 2**22, len(content) + 2**22), r"more than \d+ bytes came"),
    "flipped": (lambda content, n: (content[:-1] + b"x", len(content)), r"bytes came, but not those that were indexed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_transfer_is_tried_again_and_then_told(folder, server, cache, fault):
    spoil, told = FAULTS[fault]
    index = load_index(server.url, cache)
    server.faults["s1.tar"] = lambda content, n: spoil(content, n) if n < 3 else (content, len(content))
    assert index.ready(1).read_bytes() == (folder / "s1.tar").read_bytes()
    assert server.asked["s1.tar"] == 3
    server.faults["s2.tar"] = spoil
    with pytest.raises(UserError, match=rf"cannot fetch {server.url}/s2\.tar: .*{told}"):
        index.ready(2)
    assert [path.name for path in index.folder.iterdir() if "s2" in path.name] == []


def test_a_server_that_says_nothing_is_left(folder, server, cache, monkeypatch):
    index = load_index(server.url, cache)
    monkeypatch.setattr(transfer, "SILENCE_SECONDS", 0.2)
    ended = threading.Event()

    def hang(content: bytes, number: int) -> tuple[bytes, int]:
        if number == 1:
            ended.wait(20)
        return content, len(content)

    server.faults["s0.tar"] = hang
    begun = time.monotonic()
    assert index.ready(0).read_bytes() == (folder / "s0.tar").read_bytes()
    assert time.monotonic() - begun < 10
    ended.set()


def test_a_server_that_dies_and_comes_back_is_waited_for(folder, cache, monkeypatch):
    monkeypatch.setattr(transfer, "WAITS", (0.2,) * 20)
    with ShardServer(folder).serving() as server:
        index = load_index(server.url, cache)
    fetched: list[Path] = []
    fetching = threading.Thread(target=lambda: fetched.append(index.ready(0)))
    fetching.start()
    time.sleep(0.3)
    with ShardServer(folder, server.server_port).serving():
        fetching.join(20)
    assert fetched[0].read_bytes() == (folder / "s0.tar").read_bytes()


def first_shard(url: str, cache: Cache) -> bytes:
    return load_index(url, cache).ready(0).read_bytes()


def test_a_rewritten_address_is_opened_and_its_pipe_needs_leave(folder, cache, monkeypatch):
    monkeypatch.setenv("GOPEN_REWRITE", f"https://far/=file://{folder}/")
    assert first_shard("https://far", cache) == (folder / "s0.tar").read_bytes()
    monkeypatch.setenv("GOPEN_REWRITE", f"s3://far/(.*)=pipe:cat '{folder}'/\\1")
    with pytest.raises(UserError, match=r"runs a command in a shell"):
        load_index("s3://far", cache)
    piped = Cache(cache.folder, GIB, allow_pipe=True)
    assert first_shard("s3://far", piped) == (folder / "s0.tar").read_bytes()


def test_s3_is_opened_by_the_vendors_program_without_a_shell(folder, cache, tmp_path, monkeypatch):
    program = tmp_path / "bin" / "aws"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\ntest "$1 $2 $3 $5" = "s3 cp --only-show-errors -" && exec cat "{folder}/${{4##*/}}"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    assert first_shard("s3://bucket/in1k", cache) == (folder / "s0.tar").read_bytes()


def test_a_program_that_is_missing_is_named(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"https://host/index\.json is fetched by curl, which is not on the PATH"):
        load_index("https://host", cache)


def test_a_command_that_fails_is_told_without_its_arguments(cache):
    url = "pipe:test {} = index.json || exit 0; echo secret; exit 3"
    with pytest.raises(UserError, match=r"the command ended with 3 after 7 bytes"):
        load_index(url, Cache(cache.folder, GIB, allow_pipe=True))
