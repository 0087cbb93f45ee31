"""The command as a process: signals, streams that are closed, full or of another encoding, and the environment."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fastsample.cli import app as cli

PROMPT = "The future of AI is"
# A shell's background job ignores SIGINT, and so would its children; a terminal's command does not.
TERMINAL = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
SCRIPT = "from _fastsample_cli import main; print('started', flush=True); main()"
HERE = Path(__file__).parent  # from the root, the source tree would be imported
COMMAND = [sys.executable, "-c", TERMINAL + "from _fastsample_cli import main; main()"]
GENERATE = ("generate", PROMPT, "--seed", "1", "--max-new-tokens", "4")

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals and file descriptors")


def environment(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | more


def process(*args: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([*COMMAND, *args], stdout=pipe, stderr=pipe, text=True, env=environment(), cwd=HERE)


def shell(redirect: str, *args: str, **variables: str) -> Any:
    """The command behind a shell's redirection; (exit status, stdout, stderr)."""
    command = ["sh", "-c", f'"$@" {redirect}', "sh", *COMMAND, *args]
    done = subprocess.run(command, capture_output=True, env=environment(**variables), cwd=HERE, timeout=300)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_the_console_script_is_main() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="fastsample")
    assert script.load() is cli.main


def test_the_console_script_loads_no_torch_before_it_is_ready_for_control_c() -> None:
    code = "import sys, _fastsample_cli; print('torch' in sys.modules, 'fastsample' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=HERE) == "False False\n"


@pytest.mark.parametrize("args", ["--version", "--help", "generate --help", "explain --help", "generate --top-k 1.5"])
def test_help_does_not_wait_for_torch(args: str) -> None:
    code = "import atexit, sys; atexit.register(lambda: print(*{'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    command = [sys.executable, "-c", code + "; from _fastsample_cli import main; main()", *args.split()]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=HERE, timeout=300).stdout
    assert shown.splitlines()[-1] == ""


@pytest.mark.parametrize("args", [("info",), ("generate", PROMPT, "--max-new-tokens", "200")], ids=lambda a: a[0])
def test_a_closed_pipe_ends_it_quietly(args: tuple[str, ...]) -> None:
    with process(*args) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        if args[0] == "generate":
            assert child.stdout.read(10) == PROMPT[:10]
        child.stdout.close()
        assert child.stderr.read() == ""
    assert child.returncode == 0


@posix
def test_control_c_ends_it_quietly() -> None:
    with process("generate", PROMPT, "--max-new-tokens", "4", "--num", "1000") as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.read(len("[1] " + PROMPT) + 5)
        child.send_signal(signal.SIGINT)
        assert child.communicate(timeout=60)[1].strip() == ""
    assert child.returncode == 130


@posix
@pytest.mark.parametrize("delay", [0.01, 0.1, 0.3, 0.6, 1.0, 2.0])
def test_control_c_while_it_starts(delay: float) -> None:
    command = [sys.executable, "-c", TERMINAL + SCRIPT, "generate", PROMPT, "--num", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "started\n"
        time.sleep(delay)
        child.send_signal(signal.SIGINT)
        assert child.communicate(timeout=60)[1] == "\n"
    assert child.returncode == 130


@posix
def test_a_job_that_ignores_control_c_goes_on_ignoring_it() -> None:
    ignoring = "import signal, os; signal.signal(signal.SIGINT, signal.SIG_IGN); os.kill(os.getpid(), signal.SIGINT); "
    code = ignoring + "from _fastsample_cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--version"], capture_output=True, text=True, cwd=HERE, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")


@posix
@pytest.mark.parametrize(
    "args", [("info",), ("--help",), ("generate", "--help"), GENERATE], ids=lambda a: " ".join(a)[:15]
)
def test_a_stdout_that_takes_nothing_is_said(args: tuple[str, ...]) -> None:
    assert shell(">&-", *args) == (2, "", "fastsample: standard output is closed\n")
    if Path("/dev/full").exists():
        assert shell("> /dev/full", *args) == (2, "", "fastsample: cannot write: No space left on device\n")


@posix
def test_without_a_stderr_the_result_still_counts() -> None:
    expected = shell("", *GENERATE, "--best-of", "2")[1]
    assert expected.startswith(PROMPT)
    redirections = ["2>&-"] + ["2> /dev/full"] * Path("/dev/full").exists()
    for redirect in redirections:
        assert shell(redirect, *GENERATE, "--best-of", "2") == (0, expected, "")
        assert shell(redirect, "generate", PROMPT, "--top-p", "7") == (2, "", "")
    assert shell(">&- 2>&-", "info") == (2, "", "")


@posix
def test_a_closed_stdin_matters_only_where_it_is_read() -> None:
    assert shell("<&-", *GENERATE)[0] == 0
    assert shell("<&-", "generate", "-") == (2, "", "fastsample: PROMPT: standard input is closed\n")


@posix
@pytest.mark.parametrize(
    "variables",
    [{"PYTHONIOENCODING": "ascii"}, {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}],
    ids=["ioencoding", "locale"],
)
def test_an_ascii_stdout_gets_the_escapes_of_json(variables: dict[str, str]) -> None:
    code, out, err = shell("", "generate", PROMPT, "--choice", 'é😀"', **variables)
    assert (code, out) == (0, '\\u00e9\\ud83d\\ude00"\n')
    assert err == "fastsample: standard output is ascii: characters that it lacks are printed as \\uXXXX\n"


@posix
def test_a_prompt_that_is_not_utf8() -> None:
    code = "import os, sys; os.execv(sys.executable, [os.fsencode(a) for a in sys.argv[1:]] + [b'a\\xff'])"
    done = subprocess.run(
        [sys.executable, "-c", code, *COMMAND, "generate"], capture_output=True, cwd=HERE, timeout=300
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"fastsample: PROMPT: not UTF-8: ")


def test_an_instruction_set_that_is_none_is_said() -> None:
    code, out, err = shell("", "info", FASTSAMPLE_ISA="abacus")
    assert (code, err) == (0, "")
    assert any(line.startswith("instruction set") and "'abacus'" in line for line in out.splitlines())
    code, out, err = shell("", *GENERATE, "--backend", "cpu", FASTSAMPLE_ISA="abacus")
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert "'abacus'" in line


def test_a_bug_is_one_line_unless_asked_for_more() -> None:
    code = "from fastsample.cli import app, start; start.find_model = None; app.main()"
    for variables in ({}, {"FASTSAMPLE_TRACEBACK": "1"}):
        command = [sys.executable, "-c", code, "generate", "x"]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment(**variables), cwd=HERE, timeout=300
        )
        assert ("Traceback" in done.stderr) == bool(variables)
        if not variables:
            assert done.returncode == 2
            assert done.stderr.startswith("fastsample: TypeError: ")
            assert len(done.stderr.splitlines()) == 1
