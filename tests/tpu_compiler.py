"""The compiler of TPUs where there is none."""

import json
import os
import subprocess
import sys

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def check_compiles(script, *call):
    """Run a script, with its call as JSON, in a process of its own: libtpu reads the environment once."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_LOG_DIR": "disabled",
    }
    child = subprocess.run(
        [sys.executable, "-c", script, json.dumps(call)], env=environment, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0 and "compiled" in child.stdout, child.stderr[-3000:]
