"""runtime/gpu-image: an image of this machine's own files. Docker's end is a stand-in; what it is given is unpacked
and run in a root of its own where this user may (real Docker: docs/acceptance.md says where that was tried).
"""

from __future__ import annotations

import os
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "runtime" / "gpu-image"

DOCKER = """#!/bin/sh
echo "$@" >>"$STATE/asked"
test -e "$STATE/down" && { echo "Cannot connect to the Docker daemon" >&2; exit 1; }
case "$1 $2" in
"image inspect")
    test -e "$STATE/label" || { echo "Error response from daemon: No such image: $5" >&2; exit 1; }
    case "$4" in *Id*) cat "$STATE/id" ;; *) cat "$STATE/label" ;; esac ;;
"import --change")
    echo "${3#LABEL llmhost.inputs=}" >"$STATE/label"
    cp "$6" "$STATE/image.tar"
    date +%s%N >"$STATE/id" ;;
esac
"""


@dataclass
class Docker:
    state: Path

    def gpu_image(self, what: str, program: Path = PROGRAM) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PATH": f"{self.state}:{os.environ['PATH']}", "STATE": str(self.state)}
        return subprocess.run([program, what], check=False, capture_output=True, text=True, env=environment)

    @property
    def asked(self) -> str:
        return (self.state / "asked").read_text()


@pytest.fixture
def docker(tmp_path: Path) -> Docker:
    (tmp_path / "docker").write_text(DOCKER)
    (tmp_path / "docker").chmod(0o755)
    return Docker(tmp_path)


def test_absent_then_built_then_up_to_date(docker: Docker) -> None:
    absent = docker.gpu_image("check")
    assert (absent.returncode, absent.stdout) == (1, "llmhost/gpu-check is absent\n")
    assert docker.gpu_image("build").returncode == 0
    assert docker.gpu_image("check").returncode == 0
    assert docker.gpu_image("build").returncode == 0
    assert docker.asked.count("import") == 1


def test_other_files_make_it_stale_and_the_old_image_goes(docker: Docker, tmp_path: Path) -> None:
    docker.gpu_image("build")
    old = (docker.state / "id").read_text().strip()
    (docker.state / "label").write_text("of another Python\n")
    stale = docker.gpu_image("check")
    assert (stale.returncode, stale.stdout) == (1, "llmhost/gpu-check is made of other files than this host has now\n")
    assert docker.gpu_image("build").returncode == 0
    assert docker.gpu_image("check").returncode == 0
    assert f"image rm {old}" in docker.asked


def test_another_version_of_the_program_makes_another_image(docker: Docker, tmp_path: Path) -> None:
    docker.gpu_image("build")
    newer = tmp_path / "gpu-image"
    newer.write_text(PROGRAM.read_text() + "# newer\n")
    newer.chmod(0o755)
    assert docker.gpu_image("check", newer).returncode == 1


def test_docker_that_does_not_answer_is_neither(docker: Docker) -> None:
    (docker.state / "down").touch()
    for what in ("check", "build"):
        done = docker.gpu_image(what)
        assert done.returncode == 2
        assert "Cannot connect to the Docker daemon" in done.stderr


def test_same_files_make_the_same_image(docker: Docker) -> None:
    docker.gpu_image("build")
    first = (docker.state / "image.tar").read_bytes()
    (docker.state / "label").write_text("other\n")
    docker.gpu_image("build")
    assert (docker.state / "image.tar").read_bytes() == first


def test_the_image_runs_by_itself(docker: Docker, tmp_path: Path) -> None:
    """Python, ctypes, sh, sleep, and ldconfig as CDI's hooks call it: with no file of this machine's in reach."""
    if os.geteuid() != 0:
        pytest.skip("chroot needs root")
    docker.gpu_image("build")
    root = tmp_path / "root"
    with tarfile.open(docker.state / "image.tar") as tar:
        tar.extractall(root, filter="fully_trusted")
    (root / "dev/null").touch()
    code = "import ctypes, json; print(json.dumps(ctypes.CDLL('libm.so.6').abs(-7)))"
    assert inside(root, "/usr/bin/python3", "-I", "-c", code) == "7\n"
    assert inside(root, "/usr/bin/python3", "-c", "import sys; print(sys.version_info.major)") == "3\n"
    assert inside(root, "/bin/sh", "-c", "sleep 0.01 && echo slept") == "slept\n"
    (root / "etc/ld.so.conf.d/00-nvcr.conf").write_text("/usr/local/nvidia\n")
    library = next((root / "usr/lib").rglob("libm.so.6"))
    (root / "usr/local/nvidia").mkdir(parents=True)
    (root / "usr/local/nvidia/libcuda.so.1").write_bytes(library.read_bytes())
    inside(root, "/sbin/ldconfig")
    assert (root / "etc/ld.so.cache").stat().st_size
    libraries = ("libdl.so.2", "libpthread.so.0", "librt.so.1", "libc.so.6")  # what libcuda is linked against
    loads = "; ".join(f"ctypes.CDLL({name!r})" for name in libraries)
    assert inside(root, "/usr/bin/python3", "-I", "-c", f"import ctypes; {loads}; print('ok')") == "ok\n"


def inside(root: Path, *command: str) -> str:
    done = subprocess.run(["chroot", str(root), *command], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
