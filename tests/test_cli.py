"""The commands as a user calls them: by `ssl-kernels` or `python -m ssl_kernels`, in a clone or from a wheel."""

import importlib.metadata
import json
import pathlib
import subprocess
import sys
import tomllib

import pytest

import ssl_kernels
from ssl_kernels import bench, cli

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def call_installed(monkeypatch, *argv):
    """What the script that pip writes does, with `argv`; the exit code."""
    ((name, target),) = SCRIPTS.items()
    monkeypatch.setattr(sys, "argv", [f"/usr/local/bin/{name}", *argv])
    entry = importlib.metadata.EntryPoint(name, target, "console_scripts").load()
    try:
        return entry()
    except SystemExit as stopped:
        return stopped.code


def test_installed_command_runs_and_calls_itself_by_its_name(monkeypatch, capsys):
    assert call_installed(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"ssl_kernels {ssl_kernels.__version__}\n"
    assert call_installed(monkeypatch, "info") == 0
    assert "contrastive on cpu" in capsys.readouterr().out
    assert call_installed(monkeypatch, "check", "nonesuch") == 2
    assert capsys.readouterr().err.startswith("ssl-kernels check: error: ")
    assert call_installed(monkeypatch, "nonesuch") == 2
    assert capsys.readouterr().err.startswith("ssl-kernels: error: ")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_under_both_names(command, monkeypatch, capsys):
    assert call_installed(monkeypatch, command, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: ssl-kernels {command} ")
    monkeypatch.setattr(sys, "argv", [str(ROOT / "ssl_kernels" / "__main__.py"), command])
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: python -m ssl_kernels {command} ")


def test_bench_shows_a_stored_result(monkeypatch, capsys, tmp_path):
    stored = next((ROOT / "benchmarks" / "results").glob("*/batch_hard.csv"))
    (tmp_path / stored.name).write_text(stored.read_text())
    assert call_installed(monkeypatch, "bench", "--show", str(tmp_path / stored.name)) == 0
    printed = capsys.readouterr().out
    machine = json.loads(stored.read_text().splitlines()[0].removeprefix("# "))["machine"]
    assert "batch_hard" in printed and machine["cpu"] in printed


def test_bench_is_reached_from_any_folder(tmp_path):
    """The folder benchmarks/ of the clone, not one that lies where the user is."""
    (tmp_path / "benchmarks").mkdir()
    run = (
        f"import sys; sys.path.append({str(ROOT)!r}); from ssl_kernels.cli import main; main(['bench', 'no'])"
    )
    done = subprocess.run([sys.executable, "-c", run], cwd=tmp_path, capture_output=True, text=True)
    assert (
        "error: op must be one of " in done.stderr and " batch_hard, compile, contrastive," in done.stderr
    ), done.stderr


@pytest.mark.parametrize("argv", [[], ["contrastive", "--quick"], ["--help"]], ids=str)
def test_bench_of_a_wheel_says_where_it_runs(argv, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "REPOSITORY", tmp_path)
    assert call_installed(monkeypatch, "bench", *argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ssl-kernels bench: error: ") and "clone" in line and str(tmp_path) in line


def test_a_missing_command_is_asked_for_alone(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ssl-kernels"])
    with pytest.raises(SystemExit, match="2"):
        cli.main([])
    assert capsys.readouterr().err == "ssl-kernels: error: the following arguments are required: COMMAND\n"
