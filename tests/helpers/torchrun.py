"""Starting processes as `torchrun` does, for tests: on this machine's CPU, one core each."""

import os
import subprocess
import sys

from tests.helpers.bundle_runs import BUNDLE
from tests.helpers.lean import lean_path

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{BUNDLE}:{BUNDLE.parent}:{lean_path()}",
}


def bundle_command(run_id: str, *configs: str, **settings: object) -> list[str]:
    """`-m monai.bundle run …`, to be started in the bundle's folder."""
    names = "[" + ",".join(f"'configs/{name}'" for name in configs) + "]"
    words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    return ["-m", "monai.bundle", "run", run_id, "--config_file", names, *words]


def start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        cwd=BUNDLE,
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(command: list[str]) -> str:
    """Start, and wait for a good end; what was written."""
    process = start(command)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-3000:]
    return output
