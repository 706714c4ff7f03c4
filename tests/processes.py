"""Start programs of the tests, alone or under torchrun, and leave none behind."""

import os
import subprocess
import sys

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def call(command, out, timeout=180):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(out)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(list(map(str, command)), env=environment, **pipes) as process:
        try:
            printed, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            # torchrun ends its workers when it is asked to end; killed, it would leave them behind.
            process.terminate()
            process.communicate(timeout=60)
            raise
    assert process.returncode == 0, errors
    return printed
