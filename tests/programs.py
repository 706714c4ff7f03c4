"""Run Python programs, each forked off a process that has imported what all of them import, 12 s of a core's time."""

import atexit
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(
    ["monai.bundle", "monai.handlers", "biovfm_monai.cli", "biovfm_monai.data", "biovfm_monai.engines",
     "biovfm_monai.evaluation", "biovfm_monai.methods"]
)  # fmt: skip


def kill_when_it_prints(text, arguments, cwd, timeout=120):
    """Start a program, and send it SIGKILL as soon as it has printed this line."""
    with started(arguments, cwd) as (process, (printed, errors)):
        deadline = time.monotonic() + timeout
        while not (printed.exists() and f"{text}\n" in printed.read_text()):
            assert process.exitcode is None, errors.read_text()
            assert time.monotonic() < deadline, f"it did not print {text}"
            time.sleep(0.01)


@contextmanager
def started(arguments, cwd, **env):
    """A program that goes on until it ends, or this does: its process, and the files of what it prints."""
    arguments = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory(prefix="program-") as folder:
        printed = [Path(folder) / name for name in ("out", "err")]
        if arguments[0] == "-c":
            program = Path(folder) / "program.py"
            program.write_text(arguments[1])
            arguments = [str(program), *arguments[2:]]
        process = _FORKED.Process(target=_program, args=(arguments, str(cwd), {**os.environ, **env}, printed))
        process.start()
        try:
            yield process, printed
        finally:
            process.kill()
            process.join()


def run_python(arguments, cwd, timeout=240, **env):
    """What `subprocess.run([sys.executable, *arguments], capture_output=True, text=True)` returns."""
    with started(arguments, cwd, **env) as (process, printed):
        process.join(timeout)
        texts = [path.read_text() if path.exists() else "" for path in printed]
        if process.exitcode is None:
            raise subprocess.TimeoutExpired(arguments, timeout, *texts)
        return subprocess.CompletedProcess(arguments, process.exitcode, *texts)


def run_together(processes, arguments, cwd, timeout=240, status=0, machines=1):
    """A program as so many processes that torch's own variables let meet, all to end with a status; what they print."""
    here = processes // machines
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes), "TMPDIR": str(cwd)}
    common |= {"LOCAL_WORLD_SIZE": str(here)}
    with ExitStack() as stack:
        all_of_them = [
            stack.enter_context(started(arguments, cwd, **common, RANK=str(rank), LOCAL_RANK=str(rank % here)))
            for rank in range(processes)
        ]
        deadline = time.monotonic() + timeout
        for process, _ in all_of_them:
            process.join(max(deadline - time.monotonic(), 0))
        texts = [[path.read_text() if path.exists() else "" for path in printed] for _, printed in all_of_them]
        assert [process.exitcode for process, _ in all_of_them] == [status] * processes, texts
        return "".join(text for both in texts for text in both)


def torchrun(processes, arguments, cwd, timeout=240):
    """Run a module or script under torchrun, which leaves a folder in TMPDIR behind."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "TMPDIR": str(cwd)}
    with subprocess.Popen([*launcher, *map(str, arguments)], cwd=cwd, env=environment, **pipes) as process:
        try:
            _, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            # torchrun ends its workers when it is asked to end; killed, it would leave them behind.
            process.terminate()
            process.communicate(timeout=60)
            raise
    assert process.returncode == 0, errors


def _program(arguments, cwd, env, printed):
    for number, path in enumerate(printed, start=1):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    tempfile.tempdir = None
    multiprocessing.set_start_method(None, force=True)
    sys.path.insert(0, cwd)
    status = 0
    try:
        _run(*arguments)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
    except BaseException:  # noqa: BLE001 - what ends a program is shown by its hook
        sys.excepthook(*sys.exc_info())
        status = 1
    # Processes of multiprocessing end without them; a pool would be waited for until it is tired of having no work.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run(how, *arguments):
    if how == "-m":
        sys.argv = list(arguments)
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [how, *arguments]
        sys.path[0] = str(Path(how).parent)
        runpy.run_path(how, run_name="__main__")
