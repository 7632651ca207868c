"""All decisions for one host, put together. Pure: the same settings and hardware give the same plan."""

from __future__ import annotations

from llmhost.catalogue import find_locks
from llmhost.hardware import Hardware
from llmhost.plan.containers import plan_containers
from llmhost.plan.driver import accelerator_of, plan_driver
from llmhost.plan.engine import plan_engine
from llmhost.plan.model import BasePlan, ContainersPlan, DriverPlan, EnginePlan, HostPlan, WebuiPlan
from llmhost.plan.notes import Notes
from llmhost.plan.release import plan_release
from llmhost.plan.repositories import CUDA, missing
from llmhost.plan.systems import SYSTEMS, system_of
from llmhost.plan.webui import plan_webui
from llmhost.settings import Loaded, Settings

MIB = 1 << 20

MACHINES = ("x86_64", "aarch64")
# Acceptance allows no more (llmhost/checks.py); far beyond it certificates and apt's signatures are refused.
MOST_CLOCK_OFFSET_SECONDS = 60
# The compute-only driver takes 1.3 GiB installed and 0.5 GiB fetched; a compiler, headers and built modules
# 1 GiB; CUDA's toolkit 7 GiB; Docker with the container toolkit 0.7 GiB. Rounded up, not measured here.
DRIVER_BYTES, DKMS_BYTES, CUDA_BYTES, DOCKER_BYTES = 2048 * MIB, 1024 * MIB, 8192 * MIB, 1024 * MIB
OWN_UNITS = frozenset({"vllm.service", "open-webui.service"})

# What every host gets from its distribution; locks/index.toml adds what their wheels need.
PACKAGES = ("ca-certificates", "iproute2", "python3", "python3-venv")


def plan(loaded: Loaded, hardware: Hardware, host: str) -> HostPlan:
    """Every decision for `host` with its reason, or the problems for which it is refused."""
    settings, notes = loaded.settings, Notes(loaded)
    _check_system(hardware, notes)
    _check_units(hardware, notes)
    _check_ports(settings, hardware, notes)
    _check_archive(settings, hardware, notes)
    driver = plan_driver(settings, hardware, accelerator_of(settings, hardware), notes)
    containers = plan_containers(settings, hardware, driver, notes)
    engine = plan_engine(settings, hardware, notes)
    webui = _webui(settings, hardware, engine, notes)
    base = _base(settings, _components(hardware, driver, notes), engine, webui, notes)
    if engine and webui:
        new = [*_new_packages(hardware, driver, containers), *_new_bytes(hardware, engine, webui)]
        _check_disks(hardware, new, notes)
    decisions, problems = tuple(notes.decisions), tuple(notes.problems)
    return HostPlan(host, decisions, problems, base, driver, containers, engine, webui)


def _check_system(hardware: Hardware, notes: Notes) -> None:
    supported = system_of(hardware) is not None
    if not supported:
        names = ", ".join(system.name for system in SYSTEMS.values())
        notes.refuse("operating system", f"{hardware.os_name} is not supported", f"Use one of: {names}")
    if hardware.machine not in MACHINES:
        notes.refuse("machine", f"{hardware.machine} is not supported", f"Use one of: {', '.join(MACHINES)}")
    if supported and hardware.init != "systemd":
        notes.refuse(
            "init",
            f"process 1 is {hardware.init}, expected systemd: services could not be started",
            "Use a machine or virtual machine that boots systemd; for a trial without one: scripts/demo",
        )
    if not hardware.elevates:
        notes.refuse(
            "ssh_user",
            f"{hardware.user} cannot become root without a password",
            "Connect as root, or allow it in sudoers: NOPASSWD: ALL",
        )
    if abs(hardware.clock_offset_seconds) > MOST_CLOCK_OFFSET_SECONDS:
        notes.refuse(
            "clock",
            f"the host's clock is {hardware.clock_offset_seconds:+} s off this machine's; certificates and "
            "package signatures will be refused",
            "Set the clock (timedatectl set-ntp true) on whichever of the two is wrong",
        )


def _check_units(hardware: Hardware, notes: Notes) -> None:
    for unit in sorted(hardware.installed.foreign_units):
        notes.refuse(
            unit,
            f"the host has a {unit} that llmhost did not write",
            f"Remove it if it is no longer wanted: systemctl disable --now {unit}, then delete its file",
        )


def _check_ports(settings: Settings, hardware: Hardware, notes: Notes) -> None:
    if settings.engine_port == settings.webui_port:
        notes.refuse("webui_port", f"engine_port is {settings.engine_port} too", "Give each its own port")
    for name in ("engine_port", "webui_port"):
        port = getattr(settings, name)
        for holder in hardware.listeners:
            if holder.port == port and holder.unit not in OWN_UNITS - hardware.installed.foreign_units:
                notes.refuse(
                    name,
                    f"port {port} is taken by {holder.process} (process {holder.pid}, unit {holder.unit}) "
                    f"on {holder.address}",
                    f"Stop it, or set {name} to a free port",
                )
                break


def _check_archive(settings: Settings, hardware: Hardware, notes: Notes) -> None:
    if settings.mirror_apt_security and not settings.mirror_apt_archive:
        notes.refuse(
            "mirror_apt_security",
            "is set without mirror_apt_archive, so nothing would read it",
            "Set mirror_apt_archive too, or leave both out",
        )
    if settings.mirror_apt_archive and not settings.mirror_apt_security and hardware.os_id == "debian":
        notes.refuse(
            "mirror_apt_security",
            "is unset, but Debian's security updates are an archive of their own",
            "Set it to the mirror's debian-security beside mirror_apt_archive",
        )


def _webui(settings: Settings, hardware: Hardware, engine: EnginePlan | None, notes: Notes) -> WebuiPlan | None:
    (lock,) = find_locks("open-webui").values()
    release = plan_release(lock, hardware, "current-open-webui", notes)
    if engine is None:
        return None
    webui, decisions = plan_webui(settings, engine, release)
    notes.decisions.extend(decisions)
    return webui


def _components(hardware: Hardware, driver: DriverPlan | None, notes: Notes) -> tuple[str, ...]:
    if not (driver and driver.source == CUDA and hardware.os_id == "debian"):
        return ()
    why = "NVIDIA's packages for Debian need some of Debian's contrib (glx-alternative-nvidia)"
    return (notes.decide("base", "apt_components", "contrib", why),)


def _base(
    settings: Settings, components: tuple[str, ...], engine: EnginePlan | None, webui: WebuiPlan | None, notes: Notes
) -> BasePlan:
    releases = [part.release for part in (engine, webui) if part]
    needed = {package for release in releases for package in release.os_packages}
    packages = tuple(sorted({*PACKAGES, *needed}))
    notes.decide("base", "packages", " ".join(packages), "Python, and the libraries that the locked wheels load")
    for name in (name for name in Settings.model_fields if name.startswith("mirror_")):
        value = getattr(settings, name)
        if value != Settings.model_fields[name].default:
            notes.decide("base", name, value, notes.given(name))
    return BasePlan(
        packages=packages,
        apt_archive=settings.mirror_apt_archive,
        apt_security=settings.mirror_apt_security,
        apt_components=components,
        proxies=_proxies(settings),
        ca_certificate=settings.ca_certificate,
        python_index=settings.mirror_python_index,
        torch_index=settings.mirror_torch_index,
        python_builds=settings.mirror_python_builds,
        python_builds_index=settings.mirror_python_builds_index,
        hub=settings.mirror_hub,
    )


def _proxies(settings: Settings) -> dict[str, str]:
    proxies = {"http_proxy": settings.proxy_http, "https_proxy": settings.proxy_https}
    chosen = {name: url for name, url in proxies.items() if url}
    return {**chosen, "no_proxy": settings.proxy_bypass} if chosen else {}


def _check_disks(hardware: Hardware, new: list[tuple[str, int]], notes: Notes) -> None:
    needs: dict[str, int] = {}
    for path, size in new:
        mount = hardware.disk_for(path).mount
        needs[mount] = needs.get(mount, 0) + size
    for mount, needed in needs.items():
        free = next(disk.available_bytes for disk in hardware.disks if disk.mount == mount)
        if needed > free:
            notes.refuse(
                "disk",
                f"{mount} needs {needed / MIB:,.0f} MiB free for what is not yet installed, and has "
                f"{free / MIB:,.0f} MiB",
                f"Free {(needed - free) / MIB:,.0f} MiB on {mount}, or mount a larger disk there",
            )


def _new_bytes(hardware: Hardware, engine: EnginePlan, webui: WebuiPlan) -> list[tuple[str, int]]:
    """What this plan adds: (where, bytes). uv's cache is linked into the release, wheels in flight are not."""
    new = [
        (release.path, (release.disk_mib + release.download_mib) * MIB)
        for release in (engine.release, webui.release)
        if release.identity not in hardware.installed.releases
    ]
    if engine.model.directory not in hardware.installed.models and engine.model.weights_bytes:
        new.append((engine.model.directory, engine.model.weights_bytes))
    return [*new, ("/var/lib/llmhost", 512 * MIB)]  # databases, caches, logs


def _new_packages(
    hardware: Hardware, driver: DriverPlan | None, containers: ContainersPlan | None
) -> list[tuple[str, int]]:
    """What packages still to be installed take below /usr, with what apt fetches for it: (where, bytes)."""
    new = []
    if driver and (lacking := missing(hardware, driver.packages)):
        toolkit = [name for name in lacking if name.startswith("cuda-toolkit-")]
        built = driver.source != "installed" and not driver.prebuilt
        new.append(DRIVER_BYTES * (driver.source != "installed") + DKMS_BYTES * built + CUDA_BYTES * len(toolkit))
    if containers and missing(hardware, (*containers.packages, *containers.toolkit_packages)):
        new.append(DOCKER_BYTES)
    return [("/usr", size) for size in new]


def downloads(plan: HostPlan, hardware: Hardware) -> dict[str, str]:
    """What must be reached from the host before anything is touched: {setting: URL}, for what is still to fetch."""
    if not (plan.base and plan.engine and plan.webui):
        return {}
    base, model = plan.base, plan.engine.model
    missing = [p.release for p in (plan.engine, plan.webui) if p.release.identity not in hardware.installed.releases]
    builds = "mirror_python_builds_index" if base.python_builds_index else "mirror_python_builds"
    managed = any(release.python_source == "managed" for release in missing)
    needed = {
        # Unset it is uv's own default, which only uv knows: if that cannot be reached, uv says so when it is used.
        "mirror_python_index": base.python_index if missing else "",
        builds: (base.python_builds_index or base.python_builds) if managed else "",
        "mirror_torch_index": base.torch_index if any(release.torch_index for release in missing) else "",
        "mirror_hub": base.hub if model.repository and model.directory not in hardware.installed.models else "",
    }
    reached = {**needed, **_vendors(plan, hardware)}
    return {setting: url for setting, url in reached.items() if url}


def _vendors(plan: HostPlan, hardware: Hardware) -> dict[str, str]:
    """Repositories of vendors with packages still to be installed: {setting: URL}."""
    driver, containers = plan.driver, plan.containers
    sources = list(driver.repositories) if driver and missing(hardware, driver.packages) else []
    if containers:
        wanted = {"mirror_docker": containers.packages, "mirror_container_toolkit": containers.toolkit_packages}
        sources += [s for s in containers.repositories if missing(hardware, wanted[s.setting])]
    return {source.setting: source.uri for source in sources}
