"""Which URLs may be opened."""

from __future__ import annotations

import pytest

from fdscale.config.errors import UserError
from fdscale.data.index import load_index
from fdscale.data.remote.cache import GIB, Cache
from fdscale.data.remote.urls import readable_name, refuse_url, url_of

COMMANDS = [
    "http://host/$(touch marker)",
    "http://host/`touch marker`",
    "http://host/$HOME",
    "http://host/a;b",
    "http://host/a|b",
    "http://host/a&b",
    "http://host/a>b",
    "http://host/(a)",
    "http://host/a#b",
    "http://host/~!a",
    "http://host/'a'",
    'http://host/"a"',
    "http://host/a\nb",
    "http://host/a b",
    "http://host/[1-99]",
    "http://host/{a,b}",
    "http://host/a?key=1",
    "gs://bucket/*",
    "s3://bucket/a\\b",
    "s3://",
    "file://ho\0st/a",
    "http://host/a\n",
]


@pytest.mark.parametrize("url", COMMANDS)
def test_addresses_that_a_shell_would_read_otherwise_are_refused(tmp_path, cache, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GOPEN_REWRITE", r"([a-z0-9]+://.*)=pipe:echo \1")  # a shell, were it not refused
    with pytest.raises(UserError, match=r"is not the URL of a folder of shards: allowed after SCHEME:// are"):
        load_index(url, Cache(cache.folder, GIB, allow_pipe=True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["ftp://host/a", "gopher://host/a", "dict://host/a", "xyz://host"])
def test_an_unknown_scheme_is_refused(cache, url):
    with pytest.raises(UserError, match=r"scheme \w+ is unknown; allowed: file, http, https, s3, gs, .*pipe:"):
        load_index(url, cache)


def test_a_pipe_needs_leave_and_a_place(tmp_path, cache):
    command = f"pipe:touch {tmp_path}/marker; cat {{}}"
    with pytest.raises(UserError, match=r"runs a command in a shell on every node; .* data\.allow_pipe = true"):
        load_index(command, cache)
    with pytest.raises(UserError, match=r"has no place for a file's name: write \{\}"):
        load_index("pipe:cat /in1k", Cache(cache.folder, GIB, allow_pipe=True))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("url", "readable"),
    [
        ("https://host/data/in1k/", "in1k"),
        ("s3://bucket", "bucket"),
        ("pipe:ssh host cat /data/in22k/{} | pv", "in22k"),
        ("pipe:{}", "pipe"),
        ("https://host/...", "host"),
    ],
)
def test_a_folder_of_the_cache_has_a_readable_name(url, readable):
    assert readable_name(url) == readable


def test_the_url_of_a_file():
    assert url_of("s3://bucket/in1k/", "a.tar") == url_of("s3://bucket/in1k", "a.tar") == "s3://bucket/in1k/a.tar"
    assert url_of("pipe:cat /x/{}", "a.tar") == "pipe:cat /x/a.tar"
    refuse_url("hf://datasets/user/in1k@main/train", False)
