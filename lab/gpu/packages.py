"""Packages with the names and versions that the vendors use, and with stand-ins inside; and a Debian kernel's.

The NVIDIA driver's packages do what theirs do to a host: preferences that pin, a source that DKMS makes modules of, a
static nvidia-persistenced.service, units that fail where the hardware is not theirs. Docker's hold real programs:
Debian 13's, put under the vendor's names.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from lab import LabError, shell

PROGRAMS = Path(__file__).parent / "programs"
DRIVER_VERSIONS = {"580.178.04": "13.0", "595.91.07": "13.2"}  # and the CUDA version that each tells
TOOLKIT_VERSIONS = ("1.19.0", "1.20.0", "1.20.1")  # the newest is not the one that is asked for
EPOCH = "1763596800"  # time of every file in a package: the same content is the same bytes
MAINTAINER = "llmhost lab <lab@invalid>"

# Debian 13's Docker runs on Debian 12 too, all but runc, which wants a newer libc: that comes from each suite itself.
DOCKER_SUITE = "trixie"
DOCKER_PACKAGES = ("docker.io", "docker-cli", "containerd", "docker-compose", "tini")
RUNC_SUITES = ("bookworm", "trixie")
DOCKER_VERSION = "5:26.1.5-1~debian.13~trixie"


@dataclass(frozen=True)
class Package:
    """A package to be built. `files` are {place: content}, programs where the place is a directory of programs."""

    name: str
    version: str
    files: dict[str, str | bytes] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    trees: dict[str, Path] = field(default_factory=dict)  # {place: file on this machine}
    scripts: dict[str, str] = field(default_factory=dict)  # {"postinst": shell commands}
    depends: str = ""
    provides: str = ""
    conflicts: str = ""

    @property
    def file_name(self) -> str:
        return f"{self.name}_{self.version.partition(':')[2] or self.version}_amd64.deb"


@dataclass(frozen=True)
class Kernel:
    """A kernel of a Debian release, and the one that comes after it."""

    running: str
    meta_version: str
    next: str
    next_meta_version: str


KERNELS = {
    "debian-12": Kernel("6.1.0-40-amd64", "6.1.153-1", "6.1.0-41-amd64", "6.1.158-1"),
    "debian-13": Kernel("6.12.48+deb13-amd64", "6.12.48-1", "6.12.57+deb13-amd64", "6.12.57-1"),
}


# --- the kernel, and DKMS ---------------------------------------------------------------------------------------


def kernel_packages(release: str, version: str) -> list[Package]:
    """An image and its headers as Debian splits them, without a kernel inside, and what makes modules for it."""
    image = Package(
        f"linux-image-{release}",
        version,
        files={
            f"/boot/vmlinuz-{release}": "a stand-in, no kernel\n",
            f"/lib/modules/{release}/modules.builtin": "",
            f"/lib/modules/{release}/modules.order": "",
        },
        scripts={
            "postinst": f"update-initramfs -c -k {release}\ndepmod {release}\n"
            f"run-parts --report --exit-on-error --arg={release} /etc/kernel/postinst.d",
            "postrm": f"rm -f /boot/initrd.img-{release}",
        },
    )
    headers = Package(
        f"linux-headers-{release}",
        version,
        files={f"/usr/src/linux-headers-{release}/Makefile": "# a stand-in, no headers\n"},
        links={f"/lib/modules/{release}/build": f"/usr/src/linux-headers-{release}"},
        scripts={
            "postinst": f"[ ! -d /etc/kernel/header_postinst.d ] || run-parts --report --exit-on-error "
            f"--arg={release} /etc/kernel/header_postinst.d"
        },
    )
    return [
        image,
        headers,
        Package("linux-image-amd64", version, depends=f"linux-image-{release} (= {version})"),
        Package("linux-headers-amd64", version, depends=f"linux-headers-{release} (= {version})"),
    ]


def dkms() -> Package:
    """DKMS by its commands and hooks; the modules that it makes are text."""
    hook = '#!/bin/sh\nexec dkms autoinstall -k "$1"\n'
    return Package(
        "dkms",
        "3.2.2-1",
        files={
            "/usr/sbin/dkms": (PROGRAMS / "dkms").read_text(),
            "/etc/kernel/postinst.d/dkms": hook,
            "/etc/kernel/header_postinst.d/dkms": hook,
        },
    )


# --- NVIDIA's driver, as the CUDA repository has it for Debian ---------------------------------------------------

PINNING = """\
Package: nvidia-* libnvidia-* libcuda1 libcudadebugger1 firmware-nvidia-* xserver-xorg-video-nvidia*
Pin: version {version}-*
Pin-Priority: 1000
"""

PERSISTENCED_UNIT = """\
[Unit]
Description=NVIDIA Persistence Daemon (stand-in)
StopWhenUnneeded=true
Before=systemd-backlight@backlight:nvidia_0.service

[Service]
Type=forking
ExecStart=/usr/bin/nvidia-persistenced --user nvidia-persistenced --no-persistence-mode --verbose
ExecStopPost=/bin/rm -rf /var/run/nvidia-persistenced
"""

FABRIC_MANAGER_UNIT = """\
[Unit]
Description=NVIDIA fabric manager service (stand-in)
After=network-online.target
Requires=network-online.target

[Service]
User=root
PrivateTmp=false
Type=forking
TimeoutStartSec=720
ExecStart=/usr/bin/nv-fabricmanager -c /usr/share/nvidia/nvswitch/fabricmanager.cfg
PIDFile=/run/nvidia-fabricmanager/nv-fabricmanager.pid
LimitCORE=infinity

[Install]
WantedBy=multi-user.target
"""

UDEV_RULES = (
    '# A stand-in: the lab\'s boot program loads modules in the place of udev.\nACTION=="add", KERNEL=="nvidia"\n'
)


# For tests that cut the power here: dpkg then leaves the package half-installed, to be installed again.
HELD_BACK = "while [ -e /run/llmhost-lab/hold-unpack ]; do sleep 0.1; done"


def driver_packages(version: str) -> list[Package]:
    """The compute-only set, and what hosts with NVSwitch get beside it."""
    full = f"{version}-1"
    same = f"(= {full})"
    daemon = (PROGRAMS / "daemon.py").read_text().replace("@VERSION@", version)
    pinning = Package(
        f"nvidia-driver-pinning-{version}",
        full,
        files={"/etc/apt/preferences.d/nvidia-driver-pinning": PINNING.format(version=version)},
        provides="nvidia-driver-pinning",
        conflicts="nvidia-driver-pinning",
    )
    return [
        pinning,
        Package(
            "nvidia-driver-cuda",
            full,
            depends=f"libcuda1 {same}, libnvidia-ml1 {same}, nvidia-smi {same}, "
            f"nvidia-kernel-dkms {same} | nvidia-kernel-open-dkms {same}",
        ),
        Package(
            "libcuda1",
            full,
            files={f"/usr/lib/x86_64-linux-gnu/libcuda.so.{version}": libcuda(version)},
            links={
                "/usr/lib/x86_64-linux-gnu/libcuda.so.1": f"libcuda.so.{version}",
                "/usr/lib/x86_64-linux-gnu/libcuda.so": "libcuda.so.1",
            },
        ),
        Package("libnvidia-ml1", full),
        Package("nvidia-smi", full, files={"/usr/bin/nvidia-smi": nvidia_smi(version)}),
        Package(
            "nvidia-persistenced",
            full,
            files={
                "/usr/bin/nvidia-persistenced": daemon,
                "/lib/systemd/system/nvidia-persistenced.service": PERSISTENCED_UNIT,
            },
            scripts={
                "postinst": "id nvidia-persistenced >/dev/null 2>&1 || "
                "useradd --system --home-dir / --shell /usr/sbin/nologin nvidia-persistenced\n" + RELOAD,
                "prerm": stop("nvidia-persistenced.service"),
            },
        ),
        Package(
            "nvidia-kernel-support",
            full,
            files={"/lib/udev/rules.d/60-nvidia.rules": UDEV_RULES},
            scripts={"preinst": HELD_BACK, "postinst": "update-initramfs -u -k all"},
        ),
        dkms_source("nvidia-kernel-open-dkms", "nvidia-kernel-dkms", version, "Dual MIT/GPL"),
        dkms_source("nvidia-kernel-dkms", "nvidia-kernel-open-dkms", version, "NVIDIA"),
        Package(
            "nvidia-fabricmanager",
            full,
            files={
                "/usr/bin/nv-fabricmanager": daemon,
                "/usr/share/nvidia/nvswitch/fabricmanager.cfg": "# a stand-in\n",
                "/lib/systemd/system/nvidia-fabricmanager.service": FABRIC_MANAGER_UNIT,
            },
            scripts={"postinst": RELOAD, "prerm": stop("nvidia-fabricmanager.service")},
        ),
        Package("libnvidia-nscq", full),
    ]


def dkms_source(name: str, other: str, version: str, licence: str) -> Package:
    modules = f"version: {version}\nlicense: {licence}\nvermagic: @KERNEL@ SMP preempt mod_unload modversions \n"
    return Package(
        name,
        f"{version}-1",
        files={
            f"/usr/src/nvidia-{version}/dkms.conf": f'PACKAGE_NAME="nvidia"\nPACKAGE_VERSION="{version}"\n',
            f"/usr/src/nvidia-{version}/modinfo": modules,
        },
        scripts={"postinst": "dkms autoinstall", "prerm": f"dkms remove nvidia/{version} --all"},
        depends=f"dkms (>= 3.1.8), nvidia-kernel-support (= {version}-1)",
        conflicts=other,
    )


@cache
def nvidia_smi(version: str) -> bytes:
    cuda = DRIVER_VERSIONS[version]
    return compiled("nvidia_smi.c", "-static", f'-DVERSION="{version}"', f'-DCUDA="{cuda}"')


@cache
def libcuda(version: str) -> bytes:
    major, minor = DRIVER_VERSIONS[version].split(".")
    number = int(major) * 1000 + int(minor) * 10
    shared = ("-shared", "-fPIC", "-Wl,-soname,libcuda.so.1")
    return compiled("libcuda.c", *shared, f'-DVERSION="{version}"', f"-DCUDA_NUMBER={number}")


def compiled(source: str, *options: str) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        shell.run("gcc", "-O1", "-Wall", "-Werror", *options, "-o", f"{directory}/out", str(PROGRAMS / source))
        return Path(directory, "out").read_bytes()


# --- NVIDIA's container toolkit ----------------------------------------------------------------------------------

CDI_SERVICE = """\
[Unit]
Description=Refresh NVIDIA CDI specification file (stand-in)
ConditionPathExists=/usr/bin/nvidia-smi
ConditionPathExists=/usr/bin/nvidia-ctk
After=multi-user.target

[Service]
Type=oneshot
Environment=NVIDIA_CTK_CDI_OUTPUT_FILE_PATH=/var/run/cdi/nvidia.yaml
EnvironmentFile=-/etc/nvidia-container-toolkit/nvidia-cdi-refresh.env
# The vendor's looks into /lib/modules/%v, which systemd fills in with the kernel that really runs.
ExecCondition=/bin/sh -c 'grep -qE "/nvidia.ko" "/lib/modules/$$(/usr/local/bin/uname -r)/modules.dep"'
ExecStart=/usr/bin/nvidia-ctk cdi generate
RemainAfterExit=yes

[Install]
WantedBy=multi-user.target
"""

CDI_PATH = """\
[Unit]
Description=Trigger CDI refresh on NVIDIA driver install / uninstall events (stand-in)

[Path]
PathChanged=/run/llmhost-lab/modules.dep

[Install]
WantedBy=multi-user.target
"""


def toolkit_packages(version: str) -> list[Package]:
    """The four packages, which must be of one version."""
    full = f"{version}-1"
    ctk = (PROGRAMS / "nvidia_ctk.py").read_text().replace("@VERSION@", version)
    return [
        Package(
            "nvidia-container-toolkit",
            full,
            depends=f"nvidia-container-toolkit-base (= {full}), libnvidia-container-tools (= {full})",
        ),
        Package(
            "nvidia-container-toolkit-base",
            full,
            files={
                "/usr/bin/nvidia-ctk": ctk,
                "/usr/bin/nvidia-container-runtime": '#!/bin/sh\n# A stand-in: it injects nothing.\nexec runc "$@"\n',
                "/etc/nvidia-container-toolkit/nvidia-cdi-refresh.env": "# NVIDIA_CTK_DEBUG=true\n",
                "/lib/systemd/system/nvidia-cdi-refresh.service": CDI_SERVICE,
                "/lib/systemd/system/nvidia-cdi-refresh.path": CDI_PATH,
            },
            scripts={
                "postinst": f"{RELOAD}\n{start('nvidia-cdi-refresh.path', 'nvidia-cdi-refresh.service')}",
                "prerm": stop("nvidia-cdi-refresh.path", "nvidia-cdi-refresh.service"),
            },
        ),
        Package("libnvidia-container-tools", full, depends=f"libnvidia-container1 (= {full})"),
        Package("libnvidia-container1", full),
    ]


# --- Docker ------------------------------------------------------------------------------------------------------

DOCKER_SERVICE = """\
[Unit]
Description=Docker Application Container Engine
After=network-online.target nss-lookup.target docker.socket containerd.service
Wants=network-online.target containerd.service
Requires=docker.socket

[Service]
Type=notify
ExecStart=/usr/bin/dockerd -H fd:// --containerd=/run/containerd/containerd.sock
ExecReload=/bin/kill -s HUP $MAINPID
TimeoutStartSec=0
RestartSec=2
Restart=always
LimitNPROC=infinity
LimitCORE=infinity
TasksMax=infinity
Delegate=yes
KillMode=process
OOMScoreAdjust=-500

[Install]
WantedBy=multi-user.target
"""

DOCKER_SOCKET = """\
[Unit]
Description=Docker Socket for the API

[Socket]
ListenStream=/run/docker.sock
SocketMode=0660
SocketUser=root
SocketGroup=docker

[Install]
WantedBy=sockets.target
"""

CONTAINERD_SERVICE = """\
[Unit]
Description=containerd container runtime
After=network.target local-fs.target

[Service]
ExecStart=/usr/bin/containerd
Type=notify
Delegate=yes
KillMode=process
Restart=always
RestartSec=5
LimitNPROC=infinity
LimitCORE=infinity
TasksMax=infinity
OOMScoreAdjust=-999

[Install]
WantedBy=multi-user.target
"""


def docker_packages(root: Path, runc: Path) -> list[Package]:
    """Docker's packages with Debian's programs, which lie unpacked below `root`, and runc below `runc`."""
    plugin = "/usr/libexec/docker/cli-plugins/docker-compose"
    return [
        Package(
            "docker-ce",
            DOCKER_VERSION,
            trees={
                "/usr/bin/dockerd": root / "usr/sbin/dockerd",
                "/usr/bin/docker-proxy": found(root, "docker-proxy"),
                "/usr/bin/docker-init": root / "usr/bin/tini-static"
                if (root / "usr/bin/tini-static").exists()
                else found(root, "docker-init"),
            },
            files={
                "/lib/systemd/system/docker.service": DOCKER_SERVICE,
                "/lib/systemd/system/docker.socket": DOCKER_SOCKET,
            },
            scripts={
                "postinst": "getent group docker >/dev/null || groupadd --system docker\n"
                f"{RELOAD}\n{start('docker.socket', 'docker.service')}",
                "prerm": stop("docker.service", "docker.socket"),
            },
            depends="containerd.io, docker-ce-cli, iptables, libseccomp2, libdevmapper1.02.1, libsystemd0",
            conflicts="docker.io",
        ),
        Package(
            "docker-ce-cli",
            DOCKER_VERSION,
            trees={"/usr/bin/docker": found(root, "docker")},
            conflicts="docker-cli",
        ),
        Package(
            "containerd.io",
            "1.7.24-1",
            trees={
                "/usr/bin/containerd": found(root, "containerd"),
                "/usr/bin/containerd-shim-runc-v2": found(root, "containerd-shim-runc-v2"),
                "/usr/bin/ctr": found(root, "ctr"),
                "/usr/bin/runc": found(runc, "runc"),
            },
            files={"/lib/systemd/system/containerd.service": CONTAINERD_SERVICE},
            scripts={"postinst": f"{RELOAD}\n{start('containerd.service')}", "prerm": stop("containerd.service")},
            provides="containerd, runc",
            conflicts="containerd, runc",
            depends="libseccomp2",
        ),
        Package("docker-buildx-plugin", "0.13.1-1~debian.13~trixie"),
        Package("docker-compose-plugin", "2.26.1-1~debian.13~trixie", trees={plugin: found(root, "docker-compose")}),
    ]


def found(root: Path, program: str) -> Path:
    """The program, wherever Debian puts it."""
    places = [path for path in root.glob(f"usr/**/{program}") if path.is_file() and os.access(path, os.X_OK)]
    programs = sorted(places, key=lambda path: -path.stat().st_size)  # completions have the same names
    if not programs:
        raise LabError(f"Debian's packages {', '.join(DOCKER_PACKAGES)} hold no program {program}.")
    return programs[0].resolve()


def unpack(root: Path, suite: str, *names: str) -> None:
    """mmdebstrap fetches, verifies and extracts packages of a Debian suite; nothing is run."""
    words = ["mmdebstrap", "--quiet", "--variant=extract", '--aptopt=APT::Install-Recommends "false"']
    words += [f"--include={','.join(names)}", suite, str(root)]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise LabError(f"mmdebstrap could not fetch {', '.join(names)} of {suite}:\n{done.stderr[-2000:]}")


# --- building ----------------------------------------------------------------------------------------------------

# apt gives maintainer scripts a PATH of its own (DPkg::Path), without the stand-ins' directories.
STAND_INS_FIRST = "PATH=/usr/local/sbin:/usr/local/bin:$PATH"
RELOAD = "[ ! -d /run/systemd/system ] || systemctl daemon-reload"


def start(*units: str) -> str:
    names = " ".join(units)
    return f"systemctl --quiet enable {names}\n[ ! -d /run/systemd/system ] || systemctl start {names} || true"


def stop(*units: str) -> str:
    return f'[ "$1" = upgrade ] || [ ! -d /run/systemd/system ] || systemctl --quiet disable --now {" ".join(units)}'


def build(package: Package, directory: Path, compression: str = "gzip") -> Path:
    """The package as a .deb in `directory`; the same content makes the same bytes."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for place, content in package.files.items():
            file = root / place.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content.encode() if isinstance(content, str) else content)
            file.chmod(0o755 if is_program(place, file) else 0o644)
        for place, source in package.trees.items():
            file = root / place.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, file)
            file.chmod(0o755)
        for place, target in package.links.items():
            link = root / place.lstrip("/")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(target)
        (root / "DEBIAN").mkdir()
        (root / "DEBIAN/control").write_text(control(package))
        configured = [place for place in package.files if place.startswith("/etc/")]
        (root / "DEBIAN/conffiles").write_text("".join(f"{place}\n" for place in configured))
        for name, commands in package.scripts.items():
            (root / "DEBIAN" / name).write_text(f"#!/bin/sh\nset -e\n{STAND_INS_FIRST}\n{commands}\n")
            (root / "DEBIAN" / name).chmod(0o755)
        root.chmod(0o755)
        deb = directory / package.file_name
        words = ["dpkg-deb", f"-Z{compression}", "-z1", "--root-owner-group", "--build", str(root), str(deb)]
        done = subprocess.run(
            words, check=False, capture_output=True, text=True, env={**os.environ, "SOURCE_DATE_EPOCH": EPOCH}
        )
    if done.returncode != 0:
        raise LabError(f"dpkg-deb could not build {deb.name}: {done.stderr.strip()}")
    return deb


def is_program(place: str, file: Path) -> bool:
    return "/bin/" in place or "/sbin/" in place or file.read_bytes()[:2] == b"#!"


def control(package: Package) -> str:
    fields = {
        "Package": package.name,
        "Version": package.version,
        "Architecture": "amd64",
        "Maintainer": MAINTAINER,
        "Section": "misc",
        "Priority": "optional",
        "Depends": package.depends,
        "Provides": package.provides,
        "Conflicts": package.conflicts,
        "Replaces": package.conflicts,
        "Description": "stand-in of the llmhost lab, not the vendor's package",
    }
    return "".join(f"{name}: {value}\n" for name, value in fields.items() if value)
