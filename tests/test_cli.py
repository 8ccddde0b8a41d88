"""The `titanmoe` command: what it prints, its exit codes, and that it starts without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from titanmoe import cli
from titanmoe.config import load_config

ROOT = Path(__file__).resolve().parents[1]


def run(capsys, *args: str) -> tuple[int, str, str]:
    code = cli.main(args)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def in_shell(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        ["bash", "-c", command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_config_prints_a_toml_that_reads_back(capsys, tmp_path):
    code, out, err = run(capsys, "config", "--training.seq_len=64", "--compile.enable")
    assert (code, err) == (0, "")
    (tmp_path / "a.toml").write_text(out)
    assert load_config(str(tmp_path / "a.toml")) == load_config(None, ["--training.seq_len=64", "--compile.enable"])
    assert run(capsys, "config", "--job.config_file", str(tmp_path / "a.toml"))[1] == out


def test_explain_says_where_values_come_from_and_notes_go_to_stderr(capsys):
    code, out, err = run(capsys, "config", "--training.seq_len=64", "--explain", "--training.dataset=c4_test")
    assert code == 0
    assert "# Tokens per sequence.\nseq_len = 64  # command line\n" in out
    assert err == 'note: training.dataset = "c4_test" (command line) is read as "stdlib"\n'


@pytest.mark.parametrize("args", [["config", "--help"], ["config", "--training.steps=x", "-h"]])
def test_help_of_config(capsys, args):
    code, out, err = run(capsys, *args)
    assert (code, err) == (0, "")
    assert out.startswith("usage: titanmoe config [--explain]") and "--training.seq_len" in out


def test_help_of_the_command(capsys):
    code, out, err = run(capsys, "--help")
    assert code == 0 and out.startswith("usage: titanmoe COMMAND") and "  config    print" in out and err == ""
    code, out, err = run(capsys)
    assert code == 2 and out == "" and "usage: titanmoe COMMAND" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["confg"], 'error: titanmoe: there is no command "confg"\n  Commands: config'),
        (["generate", "--prompt=a"], "error: titanmoe generate: which model is meant is not clear"),
        (["generate", "--model=a", "--seed=x"], "`titanmoe generate --help` lists the options"),
        (["eval", "--json"], "error: titanmoe eval: there is no evaluation '--json'\n  There is: recall."),
        (["config", "--training.sequence_len=1"], "Did you mean training.seq_len?"),
        (["config", "--job.config_file=gone.toml"], "error: gone.toml: there is no such config file"),
        (["config", "--checkpoint.keep_latest_k=1"], "error: checkpoint.keep_latest_k: 1 was given"),
        (["config", "--parallelism.expert_parallel_comm_backend=deepep"], "not supported yet"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(capsys, args, message):
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, "")
    assert message in err and "Traceback" not in err


def test_a_broken_file_gives_its_place(capsys, tmp_path):
    (tmp_path / "a.toml").write_text("[training]\nsteps = = 3\n")
    code, out, err = run(capsys, "config", f"--job.config_file={tmp_path / 'a.toml'}")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {tmp_path / 'a.toml'}:2:9: ")


def test_it_starts_without_torch(tmp_path):
    check = (
        "import sys; from titanmoe.cli import main; code = main(['config', '--explain']); "
        "heavy = {'torch', 'numpy', 'datasets', 'transformers', 'tokenizers'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    result = in_shell(f'{sys.executable} -c "{check}"', tmp_path)
    assert result.returncode == 0, result.stderr
    assert "[training]" in result.stdout


def test_a_reader_that_leaves_early_gives_no_traceback(tmp_path):
    result = in_shell(f"{sys.executable} -m titanmoe.cli config --explain | head -n 1", tmp_path)
    assert result.stdout.startswith("#") and result.stderr == ""
    # A closed pipe, for certain: the only reader is a process that ends before the command writes.
    for arguments in ("config --explain", "--help"):
        command = f"(sleep 0.5; {sys.executable} -m titanmoe.cli {arguments}; echo $? >code) | true; cat code"
        result = in_shell(command, tmp_path)
        assert (result.stdout, result.stderr) == ("1\n", "")
