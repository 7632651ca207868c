"""How long a run takes that has nothing to do: the converge part, and the whole with acceptance.

    LLMHOST_LAB=NAME .venv/bin/python bench/second_run.py [RUNS] [PYINFRA OPTIONS]

The lab must hold hosts that were deployed already (python -m lab up; pyinfra inventories/lab.py deploy.py -y). Prints
each run and the medians; refuses to count a run that changed something. Open WebUI allows 15 sign-ins in 3 minutes and
a run uses two, so at most 7 runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKS = "Starting operation: Acceptance | checks"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", type=int, default=5)
    arguments, options = parser.parse_known_args()
    runs = [measure(options) for _ in range(arguments.runs)]
    for converge, whole in runs:
        print(f"converge {converge:.2f} s, with acceptance {whole:.2f} s")
    columns = [statistics.median(column) for column in zip(*runs, strict=True)]
    print(f"median of {len(runs)}: converge {columns[0]:.2f} s, with acceptance {columns[1]:.2f} s")


def measure(options: list[str]) -> tuple[float, float]:
    """Seconds until acceptance begins, and until the end; from the start of the process."""
    pyinfra = str(Path(sys.executable).parent / "pyinfra")
    command = [pyinfra, "inventories/lab.py", "deploy.py", "-y", *options]
    began, converged = time.monotonic(), 0.0
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout
    for line in process.stdout:
        if CHECKS in line:
            converged = time.monotonic() - began
        if "Success" in line and "Operation" not in line and "|" not in line:
            raise SystemExit(f"this run changed something, so it is no second run: {line.strip()}")
    if process.wait():
        raise SystemExit(f"{json.dumps(command)} ended with {process.returncode}")
    return converged, time.monotonic() - began


if __name__ == "__main__":
    main()
