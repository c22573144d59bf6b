"""Batch scripts: what sbatch reads in them, what bash makes of them, and what never reaches a shell unquoted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdscale.cli import main
from fdscale.cluster.submit import Job, batch_script, quoted, sbatch_command, site_file, submit
from fdscale.config.errors import UserError

REPOSITORY = Path(__file__).parents[2]
PRINT_ARGV = f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([os.environ.get('SITE'), *sys.argv[1:]]))\n"
# what a path may hold, and what a shell would read
WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12) | st.text(
    st.sampled_from(" a$`\"'\\;*?!(){}=~#&|<>\t\n\r%@-\x1b"), max_size=12
)
SMALL = ["digits_teacher", "--gpu", "H100-80GB", "--gpus-per-node", "2"]


def job(arguments: list[str], name: str = "vit_b", time: str | None = None) -> Job:
    return Job(name, arguments, nodes=2, ranks_per_node=8, cpus_per_rank=4, gpus=True, time=time)


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@given(arguments=st.lists(WORDS, max_size=4), folder=WORDS.filter(lambda name: "/" not in name and len(name) > 2))
def test_bash_hands_on_every_word_as_it_was_typed(
    tmp_path_factory: pytest.TempPathFactory, arguments: list[str], folder: str
) -> None:
    place = tmp_path_factory.mktemp("odd") / folder
    python = executable(place / "python", PRINT_ARGV)
    site = place / "site.env"
    site.write_text("export SITE=sourced\n")
    script = batch_script(job(arguments), str(python), site)
    done = subprocess.run(["bash", "-s"], input=os.fsencode(script), capture_output=True, cwd=place, check=True)
    assert json.loads(done.stdout) == ["sourced", "-m", "fdscale", "launch", *arguments]
    assert done.stderr == b""
    assert os.listdir(place.parent) == [folder]  # nothing was written by a redirection, nothing was removed


@given(st.lists(WORDS, max_size=4), WORDS)
def test_sbatch_reads_numbers_and_fixed_text(arguments: list[str], python: str) -> None:
    """Its last look for #SBATCH is at the first line that is neither empty nor a comment."""
    lines = batch_script(job(arguments, time="1-00:30"), python, Path(python)).split("\n")
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    read = [line for line in lines[:first_command] if line.startswith("#SBATCH")]
    assert read == [line for line in lines if line.startswith("#SBATCH")]
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+(=[\w@:%.-]+)?", line) for line in read)
    assert "#SBATCH --time=1-00:30" in read
    assert not any("\r" in line for line in lines), "sbatch refuses carriage returns"


@given(WORDS)
def test_a_quoted_word_is_one_line_and_one_word(word: str) -> None:
    assert "\n" not in quoted(word)
    done = subprocess.run(["bash", "-c", f"printf %s {quoted(word)}"], capture_output=True, check=True)
    assert done.stdout.decode() == word


@pytest.mark.parametrize("time", ["soon", "1h", "10\n#SBATCH --wrap=id", "", "-1"])
def test_what_is_no_time_limit_is_refused(time: str) -> None:
    with pytest.raises(UserError, match="--time"):
        batch_script(job([], time=time), "python", None)


def test_a_name_is_made_harmless_and_sbatchs_own_arguments_come_after_it(tmp_path: Path) -> None:
    further = ["--job-name=a $(b)", "-p", "low"]
    command = sbatch_command(job([], name="my recipe\n$(id)"), further, None)
    assert command == ["sbatch", "--parsable", "--job-name=my_recipe___id_", *further]
    site = tmp_path / "si'te $x.env"
    site.write_text("export SITE=sourced\nfalse\n")
    tool = executable(tmp_path / "tools" / "sbatch", PRINT_ARGV)
    env = {**os.environ, "PATH": f"{tool.parent}:{os.environ['PATH']}"}
    done = subprocess.run(sbatch_command(job([]), further, site), env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["sourced", "--parsable", "--job-name=vit_b", *further]


def test_sbatchs_refusal_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = executable(tmp_path / "sbatch", "#!/bin/sh\necho 'invalid partition' >&2\nexit 1\n")
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")
    with pytest.raises(UserError, match="code 1: invalid partition; nothing was submitted"):
        submit("#!/bin/bash\n", sbatch_command(job([]), [], None))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="sbatch is not on the PATH"):
        submit("#!/bin/bash\n", sbatch_command(job([]), [], None))


def test_a_site_that_is_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="FDSCALE_SITE"):
        site_file({"FDSCALE_SITE": str(tmp_path / "none.env")})
    (tmp_path / "one.env").touch()
    assert site_file({"FDSCALE_SITE": str(tmp_path / "one.env")}) == tmp_path / "one.env"


Submit = Callable[..., tuple[int, str, str]]


@pytest.fixture
def submit_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Submit:
    """`fdscale submit` in `tmp_path`: code, output, errors; its sbatch keeps what it got and answers with a number."""
    told = "import json, sys\njson.dump([sys.argv[1:], sys.stdin.read()], open('got', 'w'))\nprint(12)\n"
    tool = executable(tmp_path / "tools" / "sbatch", f"#!{sys.executable}\n{told}")
    (tmp_path / "site.env").touch()
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    monkeypatch.setenv("FDSCALE_SITE", str(tmp_path / "site.env"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["submit", *arguments])
        return code, *capsys.readouterr()

    return run


def test_a_recipe_is_planned_and_submitted(tmp_path: Path, submit_command: Submit) -> None:
    typed = ["run_dir=my $(run)", "data.shards=a b"]
    code, out, err = submit_command(*SMALL, *typed, "--time", "2:00:00", "--", "-p", "low", "--comment=$(id) 'x'")
    assert code == 0, out + err
    arguments, script = json.loads((tmp_path / "got").read_text())
    assert arguments == ["--parsable", "--job-name=digits_teacher", "-p", "low", "--comment=$(id) 'x'"]
    assert "#SBATCH --nodes=1\n#SBATCH --ntasks-per-node=2\n#SBATCH --gpus-per-node=2\n" in script
    assert script.endswith(" -m fdscale launch finetune digits_teacher 'run_dir=my $(run)' 'data.shards=a b'\n")
    told = out.splitlines()
    assert told[:2] == ["job 12", f"run {tmp_path}/my $(run)"]
    assert told[2].startswith(f"log {tmp_path}/my $(run)/logs/12_0.log")


def test_what_does_not_fit_never_reaches_the_queue(tmp_path: Path, submit_command: Submit) -> None:
    config = json.loads((REPOSITORY / "ds_configs" / "laptop.json").read_text())
    (tmp_path / "big.json").write_text(json.dumps(config | {"train_micro_batch_size_per_gpu": 2**19}))
    big = [f"deepspeed={tmp_path}/big.json", f"data.global_batch={2**20}"]
    code, out, err = submit_command(*SMALL, *big)
    assert code == 2, out + err
    assert "digits_teacher does not fit on 1 x 2 ranks (see above): nothing was submitted" in err
    assert "peak" in out
    assert not (tmp_path / "got").exists()


def test_a_dry_run_prints_the_script_and_the_command_and_nothing_else(tmp_path: Path, submit_command: Submit) -> None:
    code, out, err = submit_command(*SMALL, "--dry-run", "--", "-p", "low")
    assert code == 0, out + err
    lines = out.splitlines()
    assert lines[0] == "#!/bin/bash"
    assert lines[-1].endswith("sbatch --parsable --job-name=digits_teacher -p low")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["site.env", "tools"]
    subprocess.run(["bash", "-n"], input=out, text=True, check=True)


def test_a_complete_run_is_not_submitted_again(tmp_path: Path, submit_command: Submit) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "complete.json").write_text('{"step": 9}')
    (run / "recipe.toml").write_text("epochs = 10\n")
    _, out, _ = submit_command(*SMALL, "run_dir=run")
    assert f"already complete at step 9: {run}; nothing was submitted" in out
    assert not (tmp_path / "got").exists()
    assert submit_command(*SMALL, "run_dir=run", "epochs=400")[0] == 0
    assert (tmp_path / "got").exists()


def test_a_login_node_without_gpus_must_be_told_what_the_nodes_have(
    submit_command: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "--gpu H100-80GB" in submit_command("digits_teacher")[2]
    assert "--gpus-per-node 8" in submit_command("digits_teacher", "--gpu", "H100-80GB")[2]


def test_on_cpus_no_gpus_are_asked_for(submit_command: Submit) -> None:
    script = submit_command("digits_teacher", "--gpu", "cpu", "--gpus-per-node", "2", "--dry-run")[1]
    assert "#SBATCH --ntasks-per-node=2" in script
    assert "gpus-per-node" not in script
