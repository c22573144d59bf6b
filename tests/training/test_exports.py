"""The ways out around a loop: what is there while it runs, and what stays behind, by how it ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from fdscale.cluster.ranks import Rank
from fdscale.config.errors import SettingsError, StartAgain, UserError
from fdscale.training.attempts import Attempt, claim
from fdscale.training.exports import Exports, Ways
from fdscale.training.live import Live
from tests.training.gateway import Gateway, grouping

HOST = socket.gethostname()
ALONE = Rank(0, 0, 2, 2, "127.0.0.1", 29500)
OTHER_NODE = Rank(2, 0, 4, 2, "127.0.0.1", 29500)
FAILURES = "telemetry_failures_total"


def begun(folder: Path) -> Attempt:
    """The next attempt at a run, the one before ended."""
    attempt = claim(folder / "attempts", 1, 100, {})
    attempt.record_ranks([{"host": HOST}])
    attempt.end(0, "for the test")
    return attempt


@pytest.fixture
def targets(tmp_path: Path) -> Path:
    (tmp_path / "targets").mkdir()
    return tmp_path / "targets"


@pytest.fixture
def ways(targets: Path) -> Ways:
    return Ways(port=0, targets=str(targets))


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    server = Gateway()
    yield server
    server.shutdown()
    server.server_close()


def listed(targets: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text())[0] for path in sorted(targets.glob("*.json"))]


def scraped(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        return answer.read().decode()


def test_the_run_is_found_and_scraped_before_its_engine_starts(tmp_path: Path, targets: Path, ways: Ways):
    with Exports(ways, Live(), begun(tmp_path / "runs" / "my run"), ALONE) as exports:
        (target,) = listed(targets)
        assert target["labels"] == {"run": "my run", "node": HOST}
        (address,) = target["targets"]
        assert address.startswith("127.0.0.1:")
        assert 'fdscale_run_state{run="my run",state="starting"} 1.0' in scraped(address)
        exports.done = True
    with pytest.raises(OSError):  # noqa: PT011 (urllib's own words)
        scraped(address)
    assert listed(targets) == []


@pytest.mark.parametrize(
    ("raised", "done", "slurm", "ended"),
    [
        (None, True, False, "removed"),
        (None, True, True, "removed"),
        (None, False, False, "removed"),
        (None, False, True, "stopped"),
        (KeyboardInterrupt(), False, False, "removed"),
        (KeyboardInterrupt(), False, True, "stopped"),
        (StartAgain("a teacher changed"), False, False, "canary"),
        (UserError("a mistake"), False, True, "mistake"),
        (SettingsError(["a mistake"]), False, False, "mistake"),
        (RuntimeError("out of memory"), False, True, "error"),
        (SystemExit(1), False, False, "error"),
        (RuntimeError("after its last step"), True, False, "error"),
    ],
)
def test_the_end_decides_what_stays(tmp_path, targets, ways, monkeypatch, raised, done, slurm, ended):
    monkeypatch.delenv("FDSCALE_REQUEUES", raising=False)
    if slurm:
        monkeypatch.setenv("FDSCALE_REQUEUES", "1")
    exports = Exports(ways, Live(), begun(tmp_path / "run"), ALONE)
    with nullcontext() if raised is None else pytest.raises(type(raised)), exports:
        exports.done = done
        address = listed(targets)[0]["targets"]
        if raised is not None:
            raise raised
    if ended == "removed":
        assert listed(targets) == []
    else:
        assert listed(targets) == [{"targets": address, "labels": {"run": "run", "node": HOST, "ended": ended}}]


def test_a_kill_leaves_the_target_as_it_was_and_the_next_attempt_replaces_it(tmp_path, targets, ways):
    code = (
        "import sys, time; from pathlib import Path; from fdscale.cluster.ranks import Rank\n"
        "from fdscale.training.attempts import claim; from fdscale.training.live import Live\n"
        "from fdscale.training.exports import Exports, Ways\n"
        "attempt = claim(Path(sys.argv[1]) / 'attempts', 1, 100, {})\n"
        "with Exports(Ways(port=0, targets=sys.argv[2]), Live(), attempt, Rank(0, 0, 1, 1, '127.0.0.1', 1)):\n"
        "    print('up', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run"), str(targets)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    (before,) = listed(targets)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert listed(targets) == [before]
    assert "ended" not in before["labels"]
    with Exports(ways, Live(), begun(tmp_path / "run"), ALONE):
        (now,) = listed(targets)
        assert now["targets"] != before["targets"]


def test_a_run_that_was_complete_takes_away_what_a_kill_left(tmp_path, targets, ways):
    Exports(ways, Live(), begun(tmp_path / "run"), ALONE).__enter__()
    assert len(listed(targets)) == 1
    later = begun(tmp_path / "run")
    Exports(ways, Live(), later, OTHER_NODE).forget_older()
    assert len(listed(targets)) == 1
    Exports(ways, Live(), later, ALONE).forget_older()
    assert listed(targets) == []


def test_an_attempt_that_was_superseded_leaves_nothing(tmp_path, targets, ways):
    exports = Exports(ways, Live(), begun(tmp_path / "run"), OTHER_NODE).__enter__()
    assert len(listed(targets)) == 1
    begun(tmp_path / "run")
    exports.__exit__(UserError, UserError("attempt 2 has begun meanwhile"), None)
    assert listed(targets) == []


def test_each_node_shows_its_own_and_only_the_main_rank_tidies(tmp_path, targets, ways):
    older, attempt = begun(tmp_path / "run"), begun(tmp_path / "run")
    Exports(ways, Live(), older, OTHER_NODE).__enter__()
    live = Live()
    live.note({"loss": 0.5, "node_memory_available_bytes": 3})
    with Exports(ways, live, attempt, OTHER_NODE) as exports:
        assert len(listed(targets)) == 2
        text = scraped(f"127.0.0.1:{exports.endpoint.port}")
        assert "fdscale_node_memory_available_bytes" in text
        assert "fdscale_loss" not in text
    neighbour = Rank(3, 1, 4, 2, "127.0.0.1", 29500)
    with Exports(ways, live, attempt, neighbour) as exports:
        assert exports.endpoint is None


def test_several_nodes_are_served_where_they_see_each_other(tmp_path, targets, ways, caplog):
    far = Rank(0, 0, 4, 2, "192.0.2.1", 29500)  # an address of documentation: a route to it, or none
    with Exports(ways, Live(), begun(tmp_path / "run"), far) as exports:
        if exports.endpoint is None:
            assert "unreachable" in caplog.text
        else:
            assert listed(targets)[0]["targets"] == [f"{exports.endpoint.host}:{exports.endpoint.port}"]
            assert not exports.endpoint.host.startswith("127.")
    caplog.clear()
    with Exports(ways, Live(), begun(tmp_path / "run"), OTHER_NODE):
        assert "set log.prometheus_host" in caplog.text


def test_an_endpoint_on_all_addresses_is_listed_under_one(tmp_path, targets, ways):
    everywhere = Ways(port=0, host="0.0.0.0", targets=str(targets))
    for rank, host in ((ALONE, HOST), (OTHER_NODE, "127.0.0.1")):
        with Exports(everywhere, Live(), begun(tmp_path / "run"), rank) as exports:
            assert [target["targets"] for target in listed(targets)][-1] == [f"{host}:{exports.endpoint.port}"]
            exports.done = True


def test_a_port_that_is_taken_is_one_warning_and_no_target(tmp_path, targets, caplog):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port, live = taken.getsockname()[1], Live()
        with Exports(Ways(port=port, targets=str(targets)), live, begun(tmp_path / "run"), ALONE) as exports:
            assert exports.endpoint is None
        (record,) = caplog.records
    assert record.levelname == "WARNING"
    for part in (f":{port}", "log.prometheus_port", "in use", "training goes on"):
        assert part in record.message
    assert live.values[f"{FAILURES}/prometheus"] == 1
    assert list(targets.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_warning_and_the_metrics_are_served(tmp_path, caplog):
    (tmp_path / "a file").touch()
    live = Live()
    ways = Ways(port=0, targets=str(tmp_path / "a file"))
    with Exports(ways, live, begun(tmp_path / "run"), ALONE) as exports:
        assert "fdscale_run_state" in scraped(f"127.0.0.1:{exports.endpoint.port}")
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert str(tmp_path / "a file") in warnings[0]
    assert live.values[f"{FAILURES}/targets"] == 3  # to tidy, at the start, at the end


@pytest.mark.parametrize(
    ("raised", "done", "last"),
    [
        (None, True, "DELETE"),
        (None, False, "DELETE"),
        (StartAgain("a teacher changed"), False, "DELETE"),
        (UserError("a mistake"), False, "PUT"),
        (RuntimeError("out of memory"), False, "PUT"),
    ],
)
def test_a_gateway_forgets_who_is_not_missed(tmp_path, monkeypatch, gateway, raised, done, last):
    monkeypatch.setenv("FDSCALE_REQUEUES", "1")
    exports = Exports(Ways(pushgateway=gateway.url), Live(), begun(tmp_path / "my run"), ALONE).__enter__()
    exports.done = done
    exports.__exit__(raised and type(raised), raised, None)
    assert set(gateway.methods[:-1]) == {"PUT"}
    assert gateway.methods[-1] == last
    assert {tuple(grouping(path).values()) for _, path, _ in gateway.requests} == {("fdscale", HOST, "my run")}


def test_two_nodes_of_one_host_are_found_both(tmp_path, targets, ways):
    attempt = claim(tmp_path / "run" / "attempts", 4, 100, {})
    attempt.record_ranks([{"host": HOST}] * 4)
    with Exports(ways, Live(), attempt, Rank(0, 0, 4, 2, "127.0.0.1", 29500)) as first:
        with Exports(ways, Live(), attempt, OTHER_NODE) as second:
            second.done = True
            assert [one["labels"]["node"] for one in listed(targets)] == [HOST, f"{HOST}-1"]
            assert len({one["targets"][0] for one in listed(targets)}) == 2
        assert [one["labels"]["node"] for one in listed(targets)] == [HOST], "its neighbour's end takes its own away"
        first.done = True
    attempt.end(0, "for the test")


def test_an_address_that_cannot_be_told_ends_no_run(tmp_path, targets):
    """Two nodes, an endpoint on every address, and a main node whose name nobody knows."""
    live, rank = Live(), Rank(0, 0, 4, 2, "no.such.host.invalid", 29500)
    with Exports(Ways(port=0, host="0.0.0.0", targets=str(targets)), live, begun(tmp_path / "run"), rank):
        assert listed(targets) == []
    assert live.values[f"{FAILURES}/prometheus"] == 1


def test_a_gateway_forgets_the_nodes_that_older_attempts_had(tmp_path, gateway):
    ways = Ways(pushgateway=gateway.url)
    attempt = claim(tmp_path / "run" / "attempts", 1, 100, {})
    attempt.record_ranks([{"host": "gone"}, {"host": HOST}])
    attempt.end(1, "for the test")
    with Exports(ways, Live(), begun(tmp_path / "run"), OTHER_NODE):
        pass
    assert {grouping(path)["node"] for _, path, _ in gateway.requests} == {f"{HOST}-1"}, "the main rank does that"
    gateway.requests.clear()
    with Exports(ways, Live(), begun(tmp_path / "run"), ALONE):
        deadline = time.monotonic() + 5
        while len(gateway.requests) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    told = [(method, grouping(path)["node"]) for method, path, _ in gateway.requests]
    assert told[:2] == [("PUT", HOST), ("DELETE", "gone")]
    gateway.requests.clear()
    Exports(ways, Live(), begun(tmp_path / "run"), ALONE).forget_older()
    assert {(method, grouping(path)["node"]) for method, path, _ in gateway.requests} == {
        ("DELETE", HOST),
        ("DELETE", "gone"),
    }


def test_a_password_without_tls_is_warned_of_where_others_listen(tmp_path, targets, caplog):
    secret = tmp_path / "secret"
    secret.write_text("prometheus:word\n")
    secret.chmod(0o600)
    for host, warned in (("127.0.0.1", False), ("0.0.0.0", True)):
        caplog.clear()
        ways = Ways(port=0, host=host, password_file=str(secret), targets=str(targets))
        with Exports(ways, Live(), begun(tmp_path / "run"), ALONE) as exports:
            assert ("log.prometheus_certificate" in caplog.text) == warned
            with pytest.raises(urllib.error.HTTPError, match="401"):
                scraped(f"127.0.0.1:{exports.endpoint.port}")


@pytest.mark.parametrize("run", ['q"uote', "new\nline", "back\\slash", "ünï ☃", "a b", "x" * 255, "bytes \udcff"])
def test_odd_names_of_runs_come_out_as_they_are(tmp_path, targets, ways, run):
    with Exports(ways, Live(), begun(tmp_path / run), ALONE) as exports:
        (target,) = listed(targets)
        text = scraped(target["targets"][0])
        exports.done = True
    name = run.replace("\udcff", "?")
    assert target["labels"]["run"] == name
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
    assert f'fdscale_run_state{{run="{escaped}",state="starting"}} 1.0' in text
    assert listed(targets) == []


def test_a_run_directory_that_ends_in_dots_has_its_real_name(tmp_path, targets, ways):
    begun(tmp_path / "run")
    inside = Attempt(tmp_path / "run" / "checkpoints" / ".." / "attempts" / "0001")
    (tmp_path / "run" / "checkpoints").mkdir()
    with Exports(ways, Live(), inside, ALONE):
        assert listed(targets)[0]["labels"]["run"] == "run"


def test_a_folder_that_hangs_holds_no_run(tmp_path, targets, monkeypatch, caplog):
    monkeypatch.setattr("fdscale.training.outage.PATIENCE", 0.2)
    attempt, live = begun(tmp_path / "run"), Live()
    ways = Ways(port=0, targets=str(targets))
    exports = Exports(ways, live, attempt, ALONE)
    beside = exports._target.file.with_suffix(".new")
    os.mkfifo(beside)  # opened for writing it waits for a reader, as a share does for its server
    began = time.monotonic()
    with exports:
        assert "no answer within" in caplog.text
    assert time.monotonic() - began < 3
    assert live.values[f"{FAILURES}/targets"] >= 1
    released = os.open(beside, os.O_RDONLY | os.O_NONBLOCK)
    os.close(released)


def test_without_any_way_out_nothing_of_the_library_is_imported(tmp_path):
    code = (
        "import sys; from pathlib import Path; from fdscale.cluster.ranks import Rank\n"
        "from fdscale.training.attempts import claim; from fdscale.training.live import Live\n"
        "from fdscale.training.exports import Exports, Ways\n"
        "attempt = claim(Path(sys.argv[1]) / 'attempts', 1, 100, {})\n"
        "with Exports(Ways(), Live(), attempt, Rank(0, 0, 1, 1, '127.0.0.1', 1)): pass\n"
        "assert not {'prometheus_client', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=True)
