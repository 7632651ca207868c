"""Every lock is exact, hashed, free of addresses, and described in locks/index.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
LOCKS = sorted((ROOT / "locks").glob("*.txt"))
COMPILED = [*LOCKS, ROOT / "requirements.txt", ROOT / "requirements-dev.txt"]
INDEX: dict[str, dict[str, Any]] = tomllib.loads((ROOT / "locks/index.toml").read_text())

PIN = re.compile(r"([a-z0-9-]+)(?:\[[a-z0-9,-]+\])?==([^ ;]+)( ; [^\\]+)? \\")
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")

# CUDA libraries that must be of one CUDA: a compiler newer than the runtime writes what the driver cannot load.
COMPILER = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-cccl", "nvidia-nvjitlink")
RUNTIME = ("nvidia-cuda-runtime", "nvidia-cuda-nvrtc", "nvidia-cuda-cupti", "nvidia-nvtx", "cuda-toolkit")
CUDA_LOCKS = [lock for lock in LOCKS if INDEX[lock.name].get("cuda")]
TARGETS = [
    (lock, python, machine)
    for lock in LOCKS
    for python in INDEX[lock.name]["pythons"]
    for machine in ("x86_64", "aarch64")
]

each_cuda_lock = pytest.mark.parametrize("lock", CUDA_LOCKS, ids=lambda path: path.name)
each_lock = pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)


def pins(lock: Path) -> dict[str, str]:
    return {found[1]: found[2] for line in lock.read_text().splitlines() if (found := PIN.fullmatch(line))}


@pytest.mark.parametrize("lock", COMPILED, ids=lambda path: path.name)
def test_every_line_is_an_exact_pin_or_its_hash(lock: Path) -> None:
    lines = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
    strangers = [line for line in lines if not PIN.fullmatch(line) and not HASH.fullmatch(line)]
    assert strangers == []
    unhashed = [
        line
        for line, following in zip(lines, [*lines[1:], ""], strict=True)
        if "==" in line and "--hash" not in following
    ]
    assert unhashed == []
    assert pins(lock)


@pytest.mark.parametrize("lock", COMPILED, ids=lambda path: path.name)
def test_no_lock_holds_an_address(lock: Path) -> None:
    assert "://" not in lock.read_text()
    assert "--index" not in lock.read_text()
    assert "--find-links" not in lock.read_text()


@each_lock
def test_header_names_the_script_and_an_existing_source_with_the_same_pin(lock: Path) -> None:
    first_line = lock.read_text().splitlines()[0]
    assert "scripts/lock" in first_line
    [source] = re.findall(r"locks/\S+\.in", first_line)
    wanted = [line for line in (ROOT / source).read_text().splitlines() if not line.startswith("#")]
    assert wanted
    for requirement in map(Requirement, filter(None, wanted)):
        assert pins(lock)[requirement.name] in requirement.specifier


def test_index_describes_every_lock_and_nothing_else() -> None:
    assert sorted(INDEX) == [lock.name for lock in LOCKS]


@each_lock
def test_index_agrees_with_the_lock(lock: Path) -> None:
    described = INDEX[lock.name]
    assert pins(lock)[described["package"]] == described["version"]
    assert described["torch_index"] == any(version.endswith("+cpu") for version in pins(lock).values())
    assert lock.read_text().splitlines()[1].startswith(f"# Python {', '.join(described['pythons'])}, Linux on ")
    assert described["managed_python"] in described["pythons"]
    assert sorted(described["platforms_tested"] + described["platforms_untested"]) == ["aarch64", "x86_64"]
    assert 0 < described["download_mib"] < described["disk_mib"]


def test_metadata_alias_is_recognised_as_a_cpu_build_of_the_same_version() -> None:
    described = INDEX["vllm-0.32.0-cpu-py311.txt"]
    assert described["metadata_alias"] == {"name": "vllm", "version": f"{described['version']}+cpu"}


def holds(lock: Path, python: str, machine: str) -> dict[str, list[str]]:
    """Versions of each distribution that an installer takes from the lock on one Python and architecture."""
    there = {"python_version": python, "python_full_version": f"{python}.1", "platform_machine": machine}
    there |= {"sys_platform": "linux", "platform_system": "Linux"}
    found: dict[str, list[str]] = {}
    for line in lock.read_text().splitlines():
        if pin := PIN.fullmatch(line):
            marker = (pin[3] or "").removeprefix(" ; ").strip()
            if not marker or Marker(marker).evaluate(there):
                found.setdefault(pin[1], []).append(pin[2])
    return found


@pytest.mark.parametrize(("lock", "python", "machine"), TARGETS, ids=lambda value: getattr(value, "name", value))
def test_each_target_gets_one_version_of_each_distribution(lock: Path, python: str, machine: str) -> None:
    found = holds(lock, python, machine)
    assert {name: versions for name, versions in found.items() if len(versions) != 1} == {}
    assert found[INDEX[lock.name]["package"]] == [INDEX[lock.name]["version"]]
    # A marker keeps out a few: a lock that lost most of itself on one target would show here.
    assert len(found) >= 0.97 * len(pins(lock))


@each_lock
def test_markers_tell_pythons_and_architectures_apart_and_nothing_else(lock: Path) -> None:
    markers = {found[3] for line in lock.read_text().splitlines() if (found := PIN.fullmatch(line)) and found[3]}
    names = {name for marker in markers for name in re.findall(r"\b([a-z_]+) ==", marker)}
    assert names <= {"platform_machine", "python_version"}


@each_lock
def test_what_the_overrides_drop_is_absent(lock: Path) -> None:
    overrides = lock.with_suffix(".overrides")
    text = overrides.read_text() if overrides.exists() else ""
    dropped = {line.split(" ;")[0] for line in text.splitlines() if line and not line.startswith("#")}
    assert dropped.isdisjoint(pins(lock))


@pytest.mark.parametrize("lock", [lock for lock in LOCKS if lock not in CUDA_LOCKS], ids=lambda path: path.name)
def test_no_cuda_library_comes_along(lock: Path) -> None:
    assert [name for name in pins(lock) if name.startswith(("nvidia-", "triton"))] == []


def test_engine_lock_covers_torch_on_both_architectures() -> None:
    text = (ROOT / "locks/vllm-0.32.0-cpu-py311.txt").read_text()
    [block] = re.findall(r"^torch==2\.13\.0\+cpu \\\n((?:    --hash=\S+(?: \\)?\n)+)", text, re.MULTILINE)
    table = re.findall(r'"torch-\S+\.whl",\n\s+"([0-9a-f]{64})"', (ROOT / "scripts/lock").read_text())
    assert len(table) == 2
    assert sorted(re.findall(r"sha256:(\w+)", block)) == sorted(table)


# --- CUDA -------------------------------------------------------------------------------------------------------


@each_cuda_lock
def test_the_compiler_is_of_the_runtimes_cuda(lock: Path) -> None:
    """Unheld, nvcc 13.5 came beside a runtime 13.0 (field notes, vllm.md, 0, trap 10; nvidia.md, 3)."""
    cuda = INDEX[lock.name]["cuda"]
    found = {name: pins(lock)[name] for name in (*COMPILER, *RUNTIME)}
    assert {name: version for name, version in found.items() if not version.startswith(f"{cuda}.")} == {}
    assert pins(lock)["nvidia-cuda-nvcc"] == pins(lock)["nvidia-nvvm"] == pins(lock)["nvidia-cuda-crt"]


@each_cuda_lock
def test_the_engine_is_whole(lock: Path) -> None:
    """What vLLM imports on a GPU; ninja and the compiler are what FlashInfer compiles its kernels with."""
    needed = {
        "torch",
        "triton",
        "torchvision",
        "torchaudio",
        "flashinfer-python",
        "nvidia-cudnn-cu13",
        "nvidia-nccl-cu13",
    }
    assert needed | {"ninja", "nvidia-cuda-nvcc", "xgrammar", "transformers"} <= pins(lock).keys()
    assert "+" not in pins(lock)["torch"]  # the default index's own build


@each_cuda_lock
def test_a_cuda_lock_names_what_the_planner_decides_by(lock: Path) -> None:
    described = INDEX[lock.name]
    assert (described["package"], described["accelerator"], described["role"]) == ("vllm", "nvidia", "engine")
    assert described["pythons"] == ["3.11", "3.12", "3.13", "3.14"]
    assert "gcc" in described["os_packages"] and described["system_python_packages"] == ["python3-dev"]


def test_the_newer_release_has_the_newer_torch() -> None:
    by_version = sorted(CUDA_LOCKS, key=lambda lock: Version(INDEX[lock.name]["version"]))
    assert [pins(lock)["torch"] for lock in by_version] == ["2.11.0", "2.13.0"]
