#!/usr/bin/env python3
# llmhost: lab/gpu/programs/nvidia_ctk.py - stand-in for nvidia-ctk on lab hosts.
"""The three commands of NVIDIA's toolkit that llmhost uses.

nvidia-ctk --version
nvidia-ctk runtime configure --runtime=docker [--config=FILE] [--cdi.enabled] [--set-as-default]
nvidia-ctk cdi generate [--output=FILE]     a real CDI 0.7 specification, of the stand-ins' devices and files
nvidia-ctk cdi list
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

VERSION = "@VERSION@"
SPECIFICATION = "/var/run/cdi/nvidia.yaml"
LIBRARIES = Path("/usr/lib/x86_64-linux-gnu")


def main(words: list[str]) -> int:
    words, options = [w for w in words if not w.startswith("-")], dict(option(w) for w in words if w.startswith("-"))
    match words:
        case [] if "version" in options:
            print(f"NVIDIA Container Toolkit CLI version {VERSION}\ncommit: none, a stand-in")
            return 0
        case ["runtime", "configure"]:
            return configure(options)
        case ["cdi", "generate"]:
            return generate(Path(options.get("output") or os.environ.get("NVIDIA_CTK_CDI_OUTPUT_FILE_PATH", "-")))
        case ["cdi", "list"]:
            return list_devices()
    print(f"nvidia-ctk: the lab's stand-in knows no {' '.join(words)}", file=sys.stderr)
    return 1


def option(word: str) -> tuple[str, str]:
    name, _, value = word.lstrip("-").partition("=")
    return name, value


def configure(options: dict[str, str]) -> int:
    """Adds to the file what containers need, and keeps all else in it."""
    if options.get("runtime", "docker") != "docker":
        print("nvidia-ctk: the lab's stand-in configures docker only", file=sys.stderr)
        return 1
    file = Path(options.get("config", "") or "/etc/docker/daemon.json")
    config: dict[str, Any] = json.loads(file.read_text()) if file.exists() and file.read_text().strip() else {}
    config.setdefault("runtimes", {})["nvidia"] = {"args": [], "path": "nvidia-container-runtime"}
    if {"cdi.enabled", "enable-cdi"} & options.keys():
        config.setdefault("features", {})["cdi"] = True
    if {"set-as-default", "nvidia-set-as-default"} & options.keys():
        config["default-runtime"] = "nvidia"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(config, indent=4, sort_keys=True))
    print(f'level=info msg="Wrote updated config to {file}"', file=sys.stderr)
    return 0


def generate(output: Path) -> int:
    """One device for each GPU, by number and UUID, and "all"."""
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    if listed.returncode:
        print(f"failed to generate CDI spec: {listed.stdout.strip()}", file=sys.stderr)
        return 1
    found = re.findall(r"^GPU (\d+): .*UUID: (\S+)\)", listed.stdout, re.MULTILINE)
    version = re.sub(r".*\.so\.", "", str((LIBRARIES / "libcuda.so.1").resolve()))
    files = [f"{LIBRARIES}/libcuda.so.{version}", "/usr/bin/nvidia-smi"]
    mounts = [mount(file, file) for file in files]
    # In the place of the vendor's hooks, which make links and write the linker's cache.
    mounts.append(mount(files[0], f"{LIBRARIES}/libcuda.so.1"))
    # Where the stand-ins look instead of asking a kernel.
    mounts.append(mount("/run/llmhost-lab", "/run/llmhost-lab"))
    names = [("all", [number for number, _ in found])]
    names += [(name, [number]) for number, uuid in found for name in (number, uuid)]
    spec = {
        "cdiVersion": "0.7.0",
        "kind": "nvidia.com/gpu",
        "devices": [{"name": name, "containerEdits": {"deviceNodes": nodes(numbers)}} for name, numbers in names],
        "containerEdits": {
            "env": ["NVIDIA_VISIBLE_DEVICES=void", "NVIDIA_CTK_LIBCUDA_DIR=/usr/lib/x86_64-linux-gnu"],
            "deviceNodes": [
                {"path": f"/dev/{name}"} for name in ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools") if exists(name)
            ],
            "mounts": mounts,
        },
    }
    text = f"# Stand-in, for driver {version}. JSON is YAML.\n{json.dumps(spec, indent=2)}\n"
    if str(output) == "-":
        sys.stdout.write(text)
        return 0
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)
    print(f'level=info msg="Generated CDI spec with version 0.7.0 at {output}"', file=sys.stderr)
    return 0


def exists(name: str) -> bool:
    return Path("/dev", name).exists()


def nodes(numbers: list[str]) -> list[dict[str, str]]:
    return [{"path": f"/dev/nvidia{number}"} for number in numbers]


def mount(source: str, place: str) -> dict[str, object]:
    return {"hostPath": source, "containerPath": place, "options": ["ro", "nosuid", "nodev", "bind"]}


def list_devices() -> int:
    found = []
    for directory in (Path("/etc/cdi"), Path("/var/run/cdi")):
        for file in sorted(directory.glob("*.yaml")):
            spec = json.loads("".join(line for line in file.open() if not line.startswith("#")))
            found += [f"{spec['kind']}={device['name']}" for device in spec["devices"]]
    print(f'level=info msg="Found {len(found)} CDI devices"', file=sys.stderr)
    print("".join(f"{name}\n" for name in sorted(found)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
