"""Docker on a GPU host: its configuration merged, never clobbered, and the CDI specification of what is there."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from pyinfra import host, logger
from pyinfra.api import FunctionCommand, QuoteString, StringCommand, operation

from infra.facts import JsonFact, failed_look
from infra.halt import halt

DAEMON = "/etc/docker/daemon.json"
DROP_IN = "/etc/systemd/system/docker.service.d/llmhost.conf"
IMAGE = "/usr/local/lib/llmhost/gpu-image"

Commands = Generator[StringCommand | FunctionCommand]


# --- daemon.json ------------------------------------------------------------------------------------------------


class DaemonState(JsonFact):
    """What a host's Docker is configured for: {"fault", "runtime", "cdi", "mirrors", "adoptable"}."""

    program = r"""
import json, os, subprocess, sys
path = sys.argv[1]
fault, settings, written = "", {}, 0.0
try:
    with open(path) as stream: settings = json.loads(stream.read() or "{}")
    written = os.stat(path).st_mtime
except FileNotFoundError: pass
except (OSError, ValueError) as error: fault = str(error)
if not isinstance(settings, dict): fault, settings = "it holds no JSON object", {}
def show(name):
    command = ["systemctl", "show", "docker.service", "--value", "--property=" + name]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
def started():
    try:
        with open("/proc/stat") as stat, open("/proc/%s/stat" % show("MainPID")) as process:
            boot = next(int(line.split()[1]) for line in stat if line.startswith("btime"))
            return boot + int(process.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, StopIteration): return 0.0
recorded = os.path.exists("/run/llmhost/docker.service.inputs")
features, runtimes = settings.get("features") or {}, settings.get("runtimes") or {}
print(json.dumps({"fault": fault, "runtime": "nvidia" in runtimes, "cdi": bool(features.get("cdi")),
    "mirrors": settings.get("registry-mirrors") or [],
    # Two seconds: the kernel's boot time is rounded.
    "adoptable": not recorded and show("ActiveState") == "active" and started() > written + 2}))
"""


# One key of a file that is not ours: the rest stays as it is, in its order.
_SET_MIRROR = r"""
import json, os, sys
path, mirror = sys.argv[1:]
try:
    with open(path) as stream: settings = json.loads(stream.read() or "{}")
except FileNotFoundError: settings = {}
others = [url for url in settings.get("registry-mirrors") or [] if url.rstrip("/") != mirror.rstrip("/")]
settings["registry-mirrors"] = [mirror, *others]
os.makedirs(os.path.dirname(path), exist_ok=True)
part = path + ".llmhost-part"
with open(part, "w") as stream:
    json.dump(settings, stream, indent=4)
    stream.write("\n")
if os.path.exists(path): os.chmod(part, os.stat(path).st_mode & 0o7777)
else: os.chmod(part, 0o644)
os.rename(part, path)
"""


@operation()
def configured(toolkit: bool, registry_mirror: str, inputs: tuple[str, ...], proxied: bool) -> Commands:
    """daemon.json has the NVIDIA runtime, CDI and the mirror, each only where it lacks it. Does not restart Docker.

    The mirror is a key of daemon.json and no flag of dockerd: given as both, even by an operator's later hand, dockerd
    refuses to start.

    + toolkit: whether the NVIDIA runtime and CDI are wanted
    + inputs: files that Docker is restarted for
    + proxied: whether its drop-in says more than to record those
    """
    seen: dict[str, Any] | None = host.get_fact(DaemonState, argument=DAEMON)
    if failed_look(seen):
        return
    found = seen or {"fault": "", "runtime": False, "cdi": False, "mirrors": [], "adoptable": False}
    if found["fault"]:
        yield halt(
            f"{DAEMON} cannot be read: {found['fault']}. It is not llmhost's to replace: mend it, or move it away"
        )
        return
    changes = 0
    if toolkit and not (found["runtime"] and found["cdi"]):
        _announce(f"add the NVIDIA runtime and CDI to {DAEMON}")
        changes += 1
        yield StringCommand("nvidia-ctk", "runtime", "configure", "--runtime=docker", "--cdi.enabled")
    if registry_mirror and found["mirrors"][:1] != [registry_mirror]:
        _announce(f"add {registry_mirror} to {DAEMON}")
        changes += 1
        yield StringCommand("python3", "-c", QuoteString(_SET_MIRROR), DAEMON, QuoteString(registry_mirror))
    if not changes and not proxied and found["adoptable"]:
        # A Docker that was there before, and started from these very files: its containers need not be disturbed.
        _announce("Docker runs from its present configuration: it is left running")
        changes += 1
        yield StringCommand("/usr/local/lib/llmhost/inputs", "record", "docker.service", *map(QuoteString, inputs))
    if not changes:
        host.noop(f"{DAEMON} is as planned")


# --- CDI --------------------------------------------------------------------------------------------------------


class CdiState(JsonFact):
    """What the CDI specification on a host says, and what is there: {"fault", "disabled"}.

    The argument is "another system" where the driver is Windows's (WSL) or the machine's that a container runs on:
    there is no module to compare with then, the libraries have versions of their own, and WSL has no /dev/nvidia0.

    MIG devices are not compared: after a change of MIG mode nvidia-cdi-refresh must be restarted by hand (#1828).
    """

    program = r"""
import glob, json, os, re, subprocess, sys
own = sys.argv[1] != "another system"
def text(path):
    try:
        with open(path, errors="replace") as stream: return stream.read()
    except OSError: return ""
def said(*command):
    try: return subprocess.run(command, capture_output=True, text=True).stdout
    except OSError: return ""
specs = [path for path in ("/var/run/cdi/nvidia.yaml", "/etc/cdi/nvidia.yaml") if os.path.exists(path)]
spec = text(specs[0]) if specs else ""
loaded = text("/sys/module/nvidia/version").strip()
named = sorted(set(re.findall(r"lib(?:cuda|nvidia-ml)\.so\.(\d+\.[\d.]*\d)", spec)))
nodes, there = sorted(set(re.findall(r"/dev/nvidia\d+\b", spec))), sorted(glob.glob("/dev/nvidia[0-9]*"))
def fault():
    if own and (different := differing()): return different
    listed = "nvidia.com/gpu=all" in said("nvidia-ctk", "cdi", "list").split()
    return "" if listed else "nvidia-ctk does not list nvidia.com/gpu=all"
def differing():
    if not loaded: return "no NVIDIA driver is loaded"
    if not specs: return "there is none"
    if named != [loaded]: return "it is for driver %s, loaded is %s" % (" and ".join(named) or "unknown", loaded)
    if nodes != there: return "it names %s, the host has %s" % (" ".join(nodes) or "no GPU", " ".join(there) or "none")
units = ("nvidia-cdi-refresh.service", "nvidia-cdi-refresh.path")
disabled = [unit for unit in units if said("systemctl", "is-enabled", unit).strip() == "disabled"]
print(json.dumps({"fault": fault(), "disabled": disabled}))
"""


_REFRESH = r"""
systemctl restart nvidia-cdi-refresh.service && exit 0
journalctl --unit=nvidia-cdi-refresh.service --lines=15 --output=cat --no-pager >&2
exit 1
"""


@operation()
def cdi_specified(of_another_system: bool = False) -> Commands:
    """The CDI specification is of the loaded driver and of the GPUs that are there, and is kept so at each boot.

    + of_another_system: the driver is: it counts only that the GPUs are named
    """
    whose = "another system" if of_another_system else "this system"
    seen: dict[str, Any] | None = host.get_fact(CdiState, argument=whose)
    if failed_look(seen):
        return
    found = seen or {"fault": "the host cannot be asked yet", "disabled": []}
    if found["disabled"]:
        _announce(f"enable {', '.join(found['disabled'])}")
        yield StringCommand("systemctl", "enable", "--quiet", *found["disabled"])
    if not found["fault"]:
        if not found["disabled"]:
            host.noop("the CDI specification is as it should be")
        return
    _announce(f"CDI specification: {found['fault']}")
    yield StringCommand("sh", "-c", QuoteString(_REFRESH))
    after = host.get_fact(CdiState, argument=whose)
    if after is None or after["fault"]:
        why = after["fault"] if after else "it cannot be read"
        yield halt(f"the CDI specification is still wrong after nvidia-cdi-refresh.service: {why}. See docs/driver.md")


# --- the image of the GPU check ---------------------------------------------------------------------------------


class GpuImage(JsonFact):
    """Whether the image in which acceptance tries the GPU is up to date."""

    program = r"""
import json, subprocess, sys
try: print(json.dumps(subprocess.run([sys.argv[1], "check"], capture_output=True).returncode == 0))
except OSError: print("false")
"""


@operation()
def gpu_image_built() -> Commands:
    """The image in which acceptance tries the GPU, made of the host's own files by runtime/gpu-image."""
    if host.get_fact(GpuImage, argument=IMAGE):
        host.noop("the image of the GPU check is up to date")
        return
    _announce("build the image of the GPU check")
    yield StringCommand(IMAGE, "build")


def _announce(text: str) -> None:
    logger.info(f"{host.print_prefix}{text}")
