"""Every lock is exact, hashed, free of addresses, and described in locks/index.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = sorted((ROOT / "locks").glob("*.txt"))
COMPILED = [*LOCKS, ROOT / "requirements.txt", ROOT / "requirements-dev.txt"]
INDEX: dict[str, dict[str, Any]] = tomllib.loads((ROOT / "locks/index.toml").read_text())

PIN = re.compile(r"([a-z0-9-]+)(?:\[[a-z0-9,-]+\])?==([^ ;]+)( ; [^\\]+)? \\")
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")

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
    for requirement in wanted:
        name, _, version = requirement.partition("==")
        assert pins(lock)[name] == version


def test_index_describes_every_lock_and_nothing_else() -> None:
    assert sorted(INDEX) == [lock.name for lock in LOCKS]


@each_lock
def test_index_agrees_with_the_lock(lock: Path) -> None:
    described = INDEX[lock.name]
    assert pins(lock)[described["package"]] == described["version"]
    assert described["torch_index"] == any(version.endswith("+cpu") for version in pins(lock).values())
    assert described["python"] in lock.read_text().splitlines()[1]
    assert sorted(described["platforms_tested"] + described["platforms_untested"]) == ["aarch64", "x86_64"]
    assert 0 < described["download_mib"] < described["disk_mib"]


def test_metadata_alias_is_recognised_as_a_cpu_build_of_the_same_version() -> None:
    described = INDEX["vllm-0.32.0-cpu-py311.txt"]
    assert described["metadata_alias"] == {"name": "vllm", "version": f"{described['version']}+cpu"}


@each_lock
def test_markers_name_an_architecture_and_nothing_else(lock: Path) -> None:
    markers = {found[3] for line in lock.read_text().splitlines() if (found := PIN.fullmatch(line)) and found[3]}
    assert markers <= {' ; platform_machine == "x86_64"', ' ; platform_machine == "aarch64"'}


@each_lock
def test_what_the_overrides_drop_is_absent(lock: Path) -> None:
    overrides = lock.with_suffix(".overrides")
    text = overrides.read_text() if overrides.exists() else ""
    dropped = {line.split(" ;")[0] for line in text.splitlines() if line and not line.startswith("#")}
    assert dropped.isdisjoint(pins(lock))


@each_lock
def test_no_cuda_library_comes_along(lock: Path) -> None:
    assert [name for name in pins(lock) if name.startswith(("nvidia-", "triton"))] == []


def test_engine_lock_covers_torch_on_both_architectures() -> None:
    text = (ROOT / "locks/vllm-0.32.0-cpu-py311.txt").read_text()
    [block] = re.findall(r"^torch==2\.13\.0\+cpu \\\n((?:    --hash=\S+(?: \\)?\n)+)", text, re.MULTILINE)
    table = re.findall(r'"torch-\S+\.whl",\n\s+"([0-9a-f]{64})"', (ROOT / "scripts/lock").read_text())
    assert len(table) == 2
    assert sorted(re.findall(r"sha256:(\w+)", block)) == sorted(table)
