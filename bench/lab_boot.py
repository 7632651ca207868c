"""How long a lab takes: an image from nothing, then hosts from the cached image to SSH answering and back to nothing.

    python -m bench.lab_boot [--os debian-12] [--hosts 1 2 4] [--with-image] [--json]

As root, from the root of the repository. Seconds; a boot counts from the command to the last host's finished boot.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial

from lab import LabError, images, life, preflight, state

PREFIX = "bench"


def main() -> int:
    """Prints the figures; exit code 1 with the reason where this machine cannot run the lab."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--os", default="debian-12", choices=images.OPERATING_SYSTEMS)
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 2, 4], metavar="N")
    parser.add_argument("--with-image", action="store_true", help="also build the image, in a cache of its own")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    try:
        preflight.require([arguments.os])
        figures = measure(arguments.os, arguments.hosts, with_image=arguments.with_image)
    except LabError as error:
        print(error, file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(figures, indent=2))
    else:
        for name, seconds in figures.items():
            print(f"{name:<32} {seconds:6.2f} s")
    return 0


def measure(system: str, counts: list[int], *, with_image: bool) -> dict[str, float]:
    """Seconds by figure."""
    figures: dict[str, float] = {}
    if with_image:
        figures["image_build_seconds"] = timed(partial(build_in_empty_cache, system))
    images.ensure(system, say=quiet)
    for count in counts:
        wanted = life.requests([system], count)
        try:
            boot = partial(life.up, wanted, PREFIX, life.Options(mirror=False), quiet)
            figures[f"up_{count}_hosts_seconds"] = timed(boot)
        finally:
            figures[f"down_{count}_hosts_seconds"] = timed(partial(life.down, PREFIX, quiet))
    return figures


def build_in_empty_cache(system: str) -> None:
    """Builds the image in a cache that is thrown away: the operator's own stays as it is."""
    before = os.environ.get("LLMHOST_CACHE")
    with tempfile.TemporaryDirectory(dir=state.cache_directory().parent) as cache:
        os.environ["LLMHOST_CACHE"] = cache
        try:
            images.ensure(system, say=quiet)
        finally:
            del os.environ["LLMHOST_CACHE"]
            if before is not None:
                os.environ["LLMHOST_CACHE"] = before


def timed(action: Callable[[], object]) -> float:
    """Seconds that the action takes."""
    started = time.monotonic()
    action()
    return round(time.monotonic() - started, 2)


def quiet(line: str) -> None:
    """The figures are the report."""


if __name__ == "__main__":
    sys.exit(main())
