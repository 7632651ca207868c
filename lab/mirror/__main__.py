"""`python -m lab.mirror prepare` and `python -m lab.mirror serve`; see the package's docstring."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from lab import LabError, state
from lab.mirror import (
    APT_PROXY_PORT,
    HUB_PORT,
    INDEX_PORT,
    VENDOR_PORT,
    apt,
    cache,
    hub,
    index,
    model,
    python_builds,
    vendor,
    web,
    wheelhouse,
)


def main() -> int:
    options = parse_arguments()
    try:
        if options.command == "prepare":
            prepare(options.cache, with_python_builds=options.python_builds, with_vendor=options.vendor)
        else:
            serve(options.bind, options.cache)
    except LabError as error:
        print(f"lab.mirror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lab.mirror", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare", help="fill the cache: wheels, trial model; a second run takes no time")
    preparing.add_argument(
        "--python-builds", action="store_true", help="also the Python that hosts without a python3.11 fetch through uv"
    )
    preparing.add_argument(
        "--vendor",
        action="store_true",
        help="also NVIDIA's and Docker's packages for hosts with a simulated GPU",
    )
    serving = commands.add_parser("serve", help="serve from the cache until SIGTERM")
    serving.add_argument("--bind", required=True, metavar="IP", help="the only address to listen on")
    for command in (preparing, serving):
        command.add_argument("--cache", type=Path, default=state.cache_directory() / "mirror", metavar="DIRECTORY")
    return parser.parse_args()


def prepare(directory: Path, *, with_python_builds: bool, with_vendor: bool) -> None:
    """Fetch and convert what is missing from the cache."""
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - started:5.1f} s] {line}", flush=True)

    with cache.exclusive(directory), ThreadPoolExecutor() as pool:  # side by side: most of the time is spent waiting
        jobs = [pool.submit(wheelhouse.prepare, directory, lock, say) for lock in wheelhouse.locks()]
        jobs.append(pool.submit(model.prepare, directory, say))
        if with_python_builds:
            jobs.append(pool.submit(python_builds.prepare, directory, say))
        if with_vendor:
            jobs.append(pool.submit(vendor.prepare, directory, say))
        for job in jobs:
            job.result()
    say(f"the mirror's cache is complete: {directory}")


def serve(address: str, directory: Path) -> None:
    """Listen on `address`, say so in one line of JSON, and go on until SIGTERM."""
    wheels = index.Index(wheelhouse.load(directory))
    repository = model.load(directory)
    builds = python_builds.PythonBuilds(directory)
    archives = apt.AptCache(directory / "apt")
    repositories = vendor.Repositories(directory)
    # Blocked before any thread starts, so that the signal waits for sigwait below instead of ending the process.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    web.start(address, INDEX_PORT, partial(index.IndexHandler, wheels, builds))
    web.start(address, HUB_PORT, partial(hub.HubHandler, hub.Hub(repository)))
    web.start(address, VENDOR_PORT, partial(vendor.VendorHandler, repositories))
    web.start(address, APT_PROXY_PORT, partial(apt.AptHandler, archives))
    print(json.dumps(announcement(address, repository.revision, vendor.key(directory))), flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


def announcement(address: str, revision: str, vendor_key: Path) -> dict[str, object]:
    """What a host must be told to use this mirror: apt's proxy, and settings; some for hosts with simulated GPUs."""
    python_index = f"http://{address}:{INDEX_PORT}"
    vendors = f"http://{address}:{VENDOR_PORT}"
    return {
        "apt_proxy": f"http://{address}:{APT_PROXY_PORT}",
        "settings": {
            "mirror_python_index": f"{python_index}/simple/",
            "mirror_torch_index": f"{python_index}/simple/",
            "mirror_hub": f"http://{address}:{HUB_PORT}",
            "mirror_python_builds_index": f"{python_index}/python/downloads.json",
            "model_revision": revision,
        },
        "gpu_settings": {
            "mirror_cuda": f"{vendors}/cuda",
            "mirror_cuda_key": str(vendor_key),
            "mirror_container_toolkit": f"{vendors}/toolkit",
            "mirror_container_toolkit_key": str(vendor_key),
            "mirror_docker": f"{vendors}/docker",
            "mirror_docker_key": str(vendor_key),
        },
    }


if __name__ == "__main__":
    sys.exit(main())
