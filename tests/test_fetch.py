"""`fdscale fetch` against a hub on this machine that speaks the hub's protocol over real sockets."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from fdscale.config.errors import UserError
from fdscale.config.recipe import load_recipe
from fdscale.fetch import HubFile, fetch, hub_file
from fdscale.teachers.table import TEACHERS

TEACHER = TEACHERS["clip_vit_b16"]
NEW, OLD = "a" * 40, "b" * 40  # commits


def weights(value: float) -> bytes:
    return save({"blocks.0.attn.qkv.weight": np.full((64, 64), value, np.float32)})


@dataclass
class Hub:
    """What the hub holds and how it misbehaves; `served` counts the downloads, `asked` every request."""

    revisions: dict[str, str] = field(default_factory=lambda: {"main": NEW, "v1": OLD, NEW: NEW, OLD: OLD})
    files: dict[str, bytes] = field(default_factory=lambda: {NEW: weights(1), OLD: weights(2)})
    file: str = TEACHER.file
    access: str = ""  # or the error code that everyone gets
    body: str = "whole"
    under_lfs: bool = True
    asked: list[str] = field(default_factory=list)
    served: int = 0
    port: int = 0

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a path: a file's entry, or its bytes on the content host."""
        if path.startswith("/cdn/"):
            return 200, {}, self._body(self.files[path.removeprefix("/cdn/")])
        repository, _, rest = path.removeprefix("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        if self.access or repository != TEACHER.repository:
            return 401, {"X-Error-Code": self.access or "RepoNotFound", "X-Error-Message": "no"}, b""
        if revision not in self.revisions:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if file != self.file:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.revisions[revision]}, b""
        return self._entry(self.revisions[revision])

    def _entry(self, commit: str) -> tuple[int, dict[str, str], bytes]:
        content = self.files[commit]
        etag = hashlib.sha256(content).hexdigest() if self.under_lfs else hashlib.sha1(content).hexdigest()
        linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content)), "X-Repo-Commit": commit}
        # another name of this machine: the hub's bytes lie on another host
        return 302, {**linked, "ETag": '"a-redirect"', "Location": f"http://localhost:{self.port}/cdn/{commit}"}, b""

    def _body(self, content: bytes) -> bytes:
        self.served += 1
        match self.body:
            case "truncated":
                return content[: len(content) // 2]
            case "altered":
                return content[:-1] + b"!"
        return content


@pytest.fixture
def hub() -> Iterator[Hub]:
    held = Hub()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            held.asked.append(self.path)
            status, headers, body = held.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD = answer

        def log_message(self, format: str, *arguments: object) -> None:
            """Into `asked`, not onto the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    held.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield held
    server.shutdown()
    thread.join()
    server.server_close()


class Answer(NamedTuple):
    code: int
    text: str


@dataclass
class LoginNode:
    """A machine with caches of its own under `home`, that knows the hub by its address alone."""

    home: Path
    endpoint: str

    def fetch(self, *overrides: str, **environment: str) -> Answer:
        """`fdscale fetch vit_b_clip_b …` in a process of its own: the hub's client reads its settings on import."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k}
        settings = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.home / "hf"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "FDSCALE_WEIGHTS": str(self.home / "weights"),
        }
        command = [sys.executable, "-m", "fdscale", "fetch", "vit_b_clip_b", *overrides]
        done = subprocess.run(command, env={**inherited, **settings, **environment}, capture_output=True, text=True)
        return Answer(done.returncode, done.stdout + done.stderr)

    def record(self, name: str = "clip_vit_b16") -> dict[str, str]:
        stored: dict[str, str] = json.loads((self.home / "weights" / f"{name}.json").read_text())
        return stored

    def refused(self, *overrides: str, **environment: str) -> str:
        """The one sentence that `fetch` is refused with; nothing is recorded then."""
        code, text = self.fetch(*overrides, **environment)
        assert code == 2, text
        assert "Traceback" not in text
        assert not (self.home / "weights").exists()
        (told,) = [line for line in text.splitlines() if line.startswith("error: ")]
        return told


@pytest.fixture
def node(tmp_path: Path, hub: Hub) -> LoginNode:
    return LoginNode(tmp_path, f"http://127.0.0.1:{hub.port}")


def test_the_weights_come_once_and_are_recorded(node: LoginNode, hub: Hub) -> None:
    code, text = node.fetch()
    assert code == 0, text
    found = node.record()
    assert found["teacher"] == "clip_vit_b16"
    assert (found["repository"], found["revision"]) == (TEACHER.repository, NEW)
    assert found["sha256"] == hashlib.sha256(weights(1)).hexdigest()
    assert found["size"] == len(weights(1))
    path = Path(found["path"])
    assert path.is_relative_to(node.home / "hf" / "hub")  # where everybody's other hub files lie
    assert path.name == "model.safetensors"
    assert load_file(path)["blocks.0.attn.qkv.weight"].mean() == 1
    for part in (found["path"], NEW, found["sha256"]):
        assert part in text.replace("\n", "")
    assert hub.served == 1


def test_a_second_time_nothing_is_asked_of_the_network(node: LoginNode, hub: Hub) -> None:
    node.fetch()
    asked = len(hub.asked)
    code, text = node.fetch(HF_HUB_OFFLINE="1")
    assert code == 0
    assert "fetched before and whole: nothing to download" in text
    assert len(hub.asked) == asked


def test_a_file_that_lies_in_the_hubs_cache_already_is_used(node: LoginNode, hub: Hub) -> None:
    node.fetch()
    (node.home / "weights" / "clip_vit_b16.json").unlink()
    code, text = node.fetch()
    assert code == 0
    assert "in the hub's cache and whole: nothing to download" in text
    assert hub.served == 1
    assert node.record()["revision"] == NEW


@pytest.mark.parametrize("recorded", [True, False])
def test_a_file_damaged_on_the_disk_comes_again(recorded: bool, node: LoginNode, hub: Hub) -> None:
    node.fetch()
    path = Path(node.record()["path"])
    path.write_bytes(weights(1)[:-5])
    if not recorded:
        (node.home / "weights" / "clip_vit_b16.json").unlink()
    code, text = node.fetch()
    assert code == 0, text
    assert f"{path} is damaged and is downloaded again" in text
    assert path.read_bytes() == weights(1)
    assert hub.served == 2


def test_a_pinned_revision_is_fetched_beside_the_newest(node: LoginNode, hub: Hub) -> None:
    node.fetch()
    code, text = node.fetch("teacher.revision=v1")
    assert code == 0, text
    pinned = node.record("clip_vit_b16@v1")
    assert pinned["revision"] == OLD
    assert Path(pinned["path"]).read_bytes() == weights(2)
    assert node.record()["revision"] == NEW


def test_a_branch_that_moved_on_does_not_move_what_was_fetched(node: LoginNode, hub: Hub) -> None:
    node.fetch()
    hub.revisions["main"] = OLD
    node.fetch()
    assert node.record()["revision"] == NEW


@pytest.mark.parametrize("body", ["truncated", "altered"])
def test_other_bytes_than_the_hub_names_are_refused_and_leave_nothing(body: str, node: LoginNode, hub: Hub) -> None:
    hub.body = body
    told = node.refused()
    assert told.startswith(f"error: {TEACHER.repository}/model.safetensors: ")
    if body == "truncated":
        size = len(weights(1))
        assert f"should be of size {size} but has size {size // 2}" in told
    else:
        got = hashlib.sha256(weights(1)[:-1] + b"!").hexdigest()
        assert f"has SHA-256 {got}, the hub names {hashlib.sha256(weights(1)).hexdigest()}" in told
    assert "fetch it again" in told
    left = [path for path in (node.home / "hf" / "hub").rglob("*") if path.is_file() and path.stat().st_size > 4096]
    assert left == []
    hub.body = "whole"
    assert node.fetch().code == 0


def test_a_hub_that_names_no_sha256_is_not_trusted(node: LoginNode, hub: Hub) -> None:
    hub.under_lfs = False
    assert "names no commit, size or SHA-256 for it, so it cannot be checked" in node.refused()
    assert hub.served == 0


def test_a_revision_that_is_not_there_is_refused(node: LoginNode) -> None:
    told = node.refused("teacher.revision=v9")
    assert (
        f"no branch, tag or commit 'v9' there; allowed: those of {node.endpoint}/{TEACHER.repository}/commits" in told
    )


def test_a_gated_repository_names_the_page_and_the_login(node: LoginNode, hub: Hub) -> None:
    hub.access = "GatedRepo"
    told = node.refused()
    assert f"its licence must be accepted: do so at {node.endpoint}/{TEACHER.repository}, then `hf auth login`" in told


def test_a_private_or_missing_repository_is_told(node: LoginNode, hub: Hub) -> None:
    hub.access = "RepoNotFound"
    assert "does not exist or is not for everyone: `hf auth login` with an account that sees it" in node.refused()


def test_a_repository_without_the_file_is_told(node: LoginNode, hub: Hub) -> None:
    hub.file = "pytorch_model.bin"
    assert "no such file at revision 'main'" in node.refused()


def test_without_network_the_remedy_is_another_node_or_a_file(node: LoginNode, port: object) -> None:
    assert callable(port)
    node.endpoint = f"http://127.0.0.1:{port()}"
    told = node.refused()
    assert f"{node.endpoint} cannot be reached (ConnectError: " in told
    assert "on a node with network, or name a file of your own with teacher.weights=FILE" in told


def test_offline_mode_is_named(node: LoginNode, hub: Hub) -> None:
    assert "HF_HUB_OFFLINE is set: unset it" in node.refused(HF_HUB_OFFLINE="1")
    assert hub.asked == []


@pytest.mark.parametrize(
    ("recipe", "override", "why"),
    [
        ("vit_b_clip_b", "teacher.weights=random", 'teacher.weights = "random"'),
        ("vit_b_clip_b", f"teacher.weights='{__file__}'", f"teacher.weights is {__file__}, which is used as it is"),
        ("digits_finetune", "seed=1", "`fdscale finetune` has no teacher"),
    ],
)
def test_where_nothing_is_needed_nothing_is_fetched(
    recipe: str, override: str, why: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("fdscale"), "propagate", True)  # the command line takes its lines itself
    with caplog.at_level("INFO", "fdscale.fetch"):
        assert fetch(load_recipe(recipe, [override])) == []
    assert set(caplog.messages) == {f"nothing to fetch: {why}"}  # told twice where another test made caplog listen


@pytest.mark.parametrize(
    ("recipe", "remedy"),
    [
        ("vit_b_clip_b", "leave teacher.weights out, and this brings the hub's"),
        ("swinv2_b_esvit", "teacher.name=esvit_swin_b: no hub carries it; get the checkpoint from its authors' pages"),
        ("swinv2_g_self", "teacher.name=swinv2_g: no hub carries it; a student file of your own is needed"),
    ],
)
def test_a_file_that_is_named_and_not_there_is_told(recipe: str, remedy: str) -> None:
    with pytest.raises(UserError) as error:
        fetch(load_recipe(recipe, ["teacher.weights=no.pt"]))
    assert str(error.value).startswith(f"teacher.weights: no such file: no.pt; {remedy}")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("esvit_swin_b", "no hub carries it; get the checkpoint from its authors' pages"),
        ("student_file", "a student file of your own is needed"),
        ("swinv2_g", "a student file of your own is needed"),
        ("own", "your Python call gives the network with its weights"),
        ("clip_vit_b61", "unknown teacher 'clip_vit_b61'; did you mean 'clip_vit_b16'?"),
        ("timm:vit_base_patch16_224.dinosaur", "Invalid pretrained tag (dinosaur)"),
        ("timm:vit_base_patch61_224", "did you mean 'vit_base_patch16_224'?"),
        ("timm:regnetz_b16_evos.untrained", "timm knows no hub that has its weights; name a file of them with"),
        ("timm:vit_huge_patch14_gap_224.in1k_ijepa", "they lie at https://dl.fbaipublicfiles.com/ijepa/IN1K-vit.h.14"),
    ],
)
def test_teachers_that_no_hub_has_are_refused_with_what_is_needed(name: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        hub_file(name)
    assert told in str(error.value)
    assert str(error.value).startswith(("teacher.name", f"teacher.name={name}"))


def test_any_network_of_timms_is_found_by_timms_own_table() -> None:
    assert hub_file("timm:vit_small_patch16_224.dino") == HubFile(
        "timm/vit_small_patch16_224.dino", "model.safetensors"
    )


def test_the_teachers_table_names_the_repositories_that_timm_names() -> None:
    import timm

    for name, spec in TEACHERS.items():
        if spec.source == "timm" and spec.repository:
            config = timm.get_pretrained_cfg(f"{spec.model}.{spec.pretrained}", allow_unregistered=False)
            assert config is not None
            assert hub_file(name) == (config.hf_hub_id, "model.safetensors"), name
