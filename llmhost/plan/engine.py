"""Which engine, which model, and with which flags on this very host. Pure."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from llmhost.catalogue import LockEntry, ModelEntry, locks, models
from llmhost.hardware import Hardware
from llmhost.plan.driver import accelerator_of, has_gpu
from llmhost.plan.engine_gpu import fit_gpu
from llmhost.plan.fit import Fit
from llmhost.plan.model import EnginePlan, Model, Release, Scalar, Service
from llmhost.plan.notes import Notes
from llmhost.plan.release import plan_release
from llmhost.settings import Settings

GIB = 1 << 30
MIB = 1 << 20

MODELS = "/var/lib/llmhost/models"
MIDDLEWARE = "/usr/local/lib/llmhost/python"
LOOPBACK, EVERYWHERE = "127.0.0.1", "0.0.0.0"

# The engine's processes without weights and KV cache: 2.9 GB resident with 0.27 GB of weights and 1 GiB of cache
# (field notes, lab.md, section 3; vLLM 0.32.0, CPU, eager).
ENGINE_OVERHEAD_BYTES = 1700 * MIB
# Open WebUI (0.3 GB resident) and the operating system with its page cache.
NEIGHBOURS_BYTES = 1024 * MIB
# vLLM hands out KV cache in blocks; the CPU backend's default block (vllm/platforms/cpu.py, 0.32.0).
CPU_BLOCK_TOKENS = 128
# A context shorter than this is no use to a chat.
LEAST_CONTEXT_TOKENS = 1024


@dataclass(frozen=True)
class Profile:
    """What a tuning profile asks for on a CPU host: full contexts held at once, and sequences admitted at once."""

    contexts: int
    sequences: int


CPU_PROFILES = {"latency": Profile(1, 4), "balanced": Profile(4, 16), "throughput": Profile(8, 64)}


def plan_engine(settings: Settings, hardware: Hardware, notes: Notes) -> EnginePlan | None:
    """The engine's plan; None where the notes say why there can be none."""
    accelerator = _accelerator(settings, hardware, notes)
    lock = _lock(settings, accelerator, notes)
    release = plan_release(lock, hardware, "current", notes) if lock else None
    model = _model(settings, notes)
    if lock is None or release is None or model is None:
        return None
    entry = _entry(model.repository) if model.repository else None
    if not _context_is_trained(settings, entry, notes):
        return None
    if accelerator == "cpu":
        fit = _fit_cpu(settings, hardware, entry, notes)
    else:
        fit = fit_gpu(settings, hardware, lock, release, entry, notes)
    return _engine(settings, accelerator, release, model, fit, notes) if fit else None


def _accelerator(settings: Settings, hardware: Hardware, notes: Notes) -> str:
    count = len(hardware.nvidia_gpus)
    seen = f"sysfs shows {count or 'no'} NVIDIA GPU{'(s)' if count else ''}"
    if has_gpu(hardware) and not count:
        seen = "nvidia-smi of WSL shows one"
    reason = seen if settings.accelerator == "auto" else notes.given("accelerator")
    accelerator = notes.decide("engine", "accelerator", accelerator_of(settings, hardware), reason)
    if accelerator == "nvidia" and not has_gpu(hardware):
        notes.refuse("accelerator", f"expected an NVIDIA GPU, but {seen}", 'Set accelerator = "cpu" for a trial')
    return accelerator


def _lock(settings: Settings, accelerator: str, notes: Notes) -> LockEntry | None:
    known = {lock.version: lock for lock in locks() if lock.accelerator == accelerator}
    lock = known.get(settings.engine_version)
    if lock is None:
        notes.refuse(
            "engine_version",
            f"there is no lock for vLLM {settings.engine_version} on {accelerator}",
            f"Use one of: {', '.join(known)}, or add a lock (docs/locks.md)",
        )
        return None
    notes.decide("engine", "engine_version", lock.version, f"pinned with hashes in {lock.path}")
    return lock


def _model(settings: Settings, notes: Notes) -> Model | None:
    if settings.model.startswith("/"):
        return _local_model(settings, notes)
    entry = _entry(settings.model)
    if entry is not None:
        return _catalogue_model(settings, entry, notes)
    if settings.model.count("/") == 1:
        return _hub_model(settings, notes)
    close = difflib.get_close_matches(settings.model, models(), n=1, cutoff=0.4)
    hint = f"Did you mean {close[0]}? " if close else ""
    notes.refuse(
        "model",
        f"there is no model {settings.model!r} in the catalogue",
        f"{hint}Known: {', '.join(models())}; or give a hub repository (owner/name) or an absolute path",
    )
    return None


def _entry(name: str) -> ModelEntry | None:
    return next((entry for entry in models().values() if name in (entry.name, entry.repository)), None)


def _catalogue_model(settings: Settings, entry: ModelEntry, notes: Notes) -> Model:
    notes.decide(
        "model", "model", entry.name, f"{entry.repository}, {entry.licence}, {entry.weights_bytes / GIB:.2f} GiB"
    )
    revision = settings.model_revision or entry.revision
    reason = notes.given("model_revision") if settings.model_revision else "the catalogue's pinned commit"
    notes.decide("model", "model_revision", revision, reason)
    return Model(
        name=entry.name,
        repository=entry.repository,
        revision=revision,
        directory=_directory(entry.repository, revision),
        served_name=entry.name,
        weights_bytes=entry.weights_bytes,
        licence=entry.licence,
        proof_question=entry.proof_question,
        proof_answer=entry.proof_answer,
    )


def _hub_model(settings: Settings, notes: Notes) -> Model | None:
    if not settings.model_revision:
        notes.refuse(
            "model_revision",
            f"{settings.model} is not in the catalogue, so its commit must be given",
            "Set model_revision to the commit (40 hex digits) shown on the model's page, under Files",
        )
        return None
    notes.decide("model", "model", settings.model, "a hub repository outside the catalogue: its fit is not computed")
    notes.decide("model", "model_revision", settings.model_revision, notes.given("model_revision"))
    return _unknown_model(settings.model, settings.model_revision, _directory(settings.model, settings.model_revision))


def _local_model(settings: Settings, notes: Notes) -> Model | None:
    if settings.model.startswith(("/home/", "/root/", "/run/user/", "/tmp/", "/var/tmp/")):
        notes.refuse(
            "model",
            f"{settings.model} lies where the engine, being confined, does not see it",
            "Move it to another place, such as /srv/models or /var/lib/llmhost/models",
        )
        return None
    notes.decide(
        "model", "model", settings.model, "a directory on the host: nothing is fetched, its fit is not computed"
    )
    return _unknown_model("", "", settings.model)


def _unknown_model(repository: str, revision: str, directory: str) -> Model:
    name = repository or directory.rstrip("/").rpartition("/")[2]
    return Model(
        name=name,
        repository=repository,
        revision=revision,
        directory=directory,
        served_name=name,
        weights_bytes=None,
        licence="unknown",
        proof_question="What is the capital of France?",
        proof_answer="",
    )


def _directory(repository: str, revision: str) -> str:
    return f"{MODELS}/{repository.replace('/', '--')}/{revision}"


def _context_is_trained(settings: Settings, entry: ModelEntry | None, notes: Notes) -> bool:
    wish = settings.engine_context_tokens
    if entry is None or not wish or wish <= entry.context_tokens:
        return True
    notes.refuse(
        "engine_context_tokens",
        f"{wish} tokens asked, but {entry.name} was trained on {entry.context_tokens}",
        f"Set engine_context_tokens to at most {entry.context_tokens}",
    )
    return False


def _engine(settings: Settings, accelerator: str, release: Release, model: Model, fit: Fit, notes: Notes) -> EnginePlan:
    address = _address(settings, notes)
    port = notes.decide("engine", "engine_port", settings.engine_port, notes.given("engine_port"))
    key = notes.given("engine_api_key") if settings.engine_api_key else "generated on the host at the first run"
    notes.decide("engine", "engine_api_key", "(secret)", key)
    return EnginePlan(
        accelerator=accelerator,
        version=release.version,
        runtime=settings.engine_runtime,
        host=address,
        port=port,
        release=release,
        model=model,
        service=Service(
            unit="vllm.service",
            inputs=(
                "/etc/systemd/system/vllm.service",
                "/etc/llmhost/vllm.yaml",
                "/etc/llmhost/vllm.env",
                "/etc/llmhost/secrets/vllm.env",
                f"{MIDDLEWARE}/require_key.py",
            ),
            start_timeout_seconds=fit.start_timeout_seconds,
        ),
        flags={**_flags(model, address, port), **fit.flags},
        environment={**_environment(release), **fit.environment},
        kv_cache_tokens=fit.kv_cache_tokens,
        kv_cache_bytes=fit.kv_cache_bytes,
        memory_bytes=fit.memory_bytes,
    )


def _fit_cpu(settings: Settings, hardware: Hardware, entry: ModelEntry | None, notes: Notes) -> Fit | None:
    if hardware.machine == "x86_64" and "avx2" not in hardware.cpu_flags:
        notes.refuse(
            "accelerator",
            f"the CPU ({hardware.cpu_model}) lacks AVX2, without which vLLM's CPU build has no kernels",
            "Use a host whose CPU has AVX2 (Intel Haswell, AMD Zen or newer)",
        )
    cache = _known_cache(settings, hardware, entry, notes) if entry else _unknown_cache(settings, hardware, notes)
    if cache is None:
        return None
    flags: dict[str, Scalar] = {
        "max-num-seqs": _sequences(settings, notes),
        "kv-cache-memory-bytes": cache.bytes,
        # Ready in 17 s; compiled 66 s, and the host would need g++ and Python.h (field notes, lab.md, section 3).
        "enforce-eager": True,
    }
    if cache.context_tokens:
        flags["max-model-len"] = cache.context_tokens
    if settings.engine_gpu_memory_utilization:
        notes.decide("engine", "engine_gpu_memory_utilization", None, "set, but without effect on a CPU host")
    return Fit(
        flags=flags,
        environment={},
        kv_cache_tokens=cache.tokens,
        kv_cache_bytes=cache.bytes,
        memory_bytes=None if entry is None else entry.weights_bytes + cache.bytes + ENGINE_OVERHEAD_BYTES,
        start_timeout_seconds=600,
    )


@dataclass(frozen=True)
class Cache:
    """The KV cache: its size, how many tokens it holds and the longest context; None where the shape is unknown."""

    bytes: int
    tokens: int | None
    context_tokens: int | None


def _known_cache(settings: Settings, hardware: Hardware, entry: ModelEntry, notes: Notes) -> Cache | None:
    budget = _usable(hardware) - NEIGHBOURS_BYTES - ENGINE_OVERHEAD_BYTES - entry.weights_bytes
    native, wish = entry.context_tokens, settings.engine_context_tokens
    block = CPU_BLOCK_TOKENS * entry.kv_bytes_per_token
    most = max(0, budget // block) * CPU_BLOCK_TOKENS
    if most < (wish or LEAST_CONTEXT_TOKENS):
        _refuse_for_memory(hardware, entry, wish or LEAST_CONTEXT_TOKENS, notes)
        return None
    context = notes.decide(
        "engine",
        "engine_context_tokens",
        wish or min(native, most),
        notes.given("engine_context_tokens") if wish else _context_reason(native, most),
    )
    wanted, reason = _wanted_cache(settings, entry, context, notes)
    if wanted < context * entry.kv_bytes_per_token:
        _refuse_small_cache(context, entry, wanted, notes)
        return None
    if wanted > budget and (settings.engine_kv_cache_gib or settings.engine_concurrency):
        _refuse_cache(settings, budget, wanted, notes)
        return None
    if wanted > budget:
        reason = f"what memory leaves of {wanted / GIB:.2f} GiB for {reason}"
    blocks = max(-(-context // CPU_BLOCK_TOKENS), min(wanted, budget) // block)
    size = notes.decide("engine", "kv_cache_bytes", blocks * block, reason)
    notes.decide("engine", "kv_cache_tokens", blocks * CPU_BLOCK_TOKENS, f"whole blocks of {CPU_BLOCK_TOKENS} tokens")
    return Cache(size, blocks * CPU_BLOCK_TOKENS, context)


def _wanted_cache(settings: Settings, entry: ModelEntry, context: int, notes: Notes) -> tuple[int, str]:
    """Bytes of KV cache asked for, and by what."""
    if settings.engine_kv_cache_gib:
        unused = ", so engine_concurrency does not size it" if settings.engine_concurrency else ""
        return int(settings.engine_kv_cache_gib * GIB), notes.given("engine_kv_cache_gib") + unused
    contexts = settings.engine_concurrency or CPU_PROFILES[settings.tuning_profile].contexts
    asked = f"profile {settings.tuning_profile}"
    if settings.engine_concurrency:
        asked = notes.given("engine_concurrency")
    reason = f"{contexts} contexts of {context} tokens at {entry.kv_bytes_per_token} bytes a token ({asked})"
    return contexts * context * entry.kv_bytes_per_token, reason


def _usable(hardware: Hardware) -> int:
    """Memory to plan with, in quarters of a GiB: MemTotal moves with each kernel by a few MiB, a plan must not."""
    return hardware.memory_bytes // (256 * MIB) * (256 * MIB)


def _context_reason(native: int, most: int) -> str:
    return "the model's own" if native <= most else f"of the {native} it was trained on, what memory holds"


def _refuse_for_memory(hardware: Hardware, entry: ModelEntry, context: int, notes: Notes) -> None:
    fixed = NEIGHBOURS_BYTES + ENGINE_OVERHEAD_BYTES
    cache = context * entry.kv_bytes_per_token
    needed = fixed + entry.weights_bytes + cache
    has = _usable(hardware)
    fitting = [m.name for m in models().values() if _least_bytes(m) <= _usable(hardware)]
    notes.refuse(
        "model",
        f"{entry.name} needs {needed / GIB:.1f} GiB of memory ({entry.weights_bytes / GIB:.1f} weights, "
        f"{cache / GIB:.1f} KV cache for {context} tokens, {fixed / GIB:.1f} engine and system); "
        f"the host has {has / GIB:.1f} GiB, {(needed - has) / GIB:.1f} GiB too little",
        f"What would fit: {', '.join(fitting) or 'no model of the catalogue'}",
    )


def _least_bytes(entry: ModelEntry) -> int:
    cache = LEAST_CONTEXT_TOKENS * entry.kv_bytes_per_token
    return NEIGHBOURS_BYTES + ENGINE_OVERHEAD_BYTES + entry.weights_bytes + cache


def _refuse_small_cache(context: int, entry: ModelEntry, wanted: int, notes: Notes) -> None:
    needed = context * entry.kv_bytes_per_token
    notes.refuse(
        "engine_kv_cache_gib",
        f"{wanted / GIB:.3f} GiB hold less than one context of {context} tokens, which takes {needed / GIB:.3f} GiB",
        "Raise engine_kv_cache_gib, or lower engine_context_tokens",
    )


def _refuse_cache(settings: Settings, budget: int, wanted: int, notes: Notes) -> None:
    name = "engine_kv_cache_gib" if settings.engine_kv_cache_gib else "engine_concurrency"
    notes.refuse(
        name,
        f"asks for {wanted / GIB:.2f} GiB of KV cache, {(wanted - budget) / GIB:.2f} GiB more than memory leaves",
        f"Lower {name} or engine_context_tokens: at most {budget / GIB:.2f} GiB fit",
    )


def _unknown_cache(settings: Settings, hardware: Hardware, notes: Notes) -> Cache | None:
    gib = settings.engine_kv_cache_gib or 1.0
    budget = _usable(hardware) - NEIGHBOURS_BYTES - ENGINE_OVERHEAD_BYTES
    if gib * GIB > budget:
        _refuse_cache(settings, budget, int(gib * GIB), notes)
        return None
    reason = (
        notes.given("engine_kv_cache_gib") if settings.engine_kv_cache_gib else "1 GiB: the model's shape is unknown"
    )
    return Cache(notes.decide("engine", "kv_cache_bytes", int(gib * GIB), reason), None, settings.engine_context_tokens)


def _sequences(settings: Settings, notes: Notes) -> int:
    if settings.engine_max_num_seqs:
        return notes.decide(
            "engine", "engine_max_num_seqs", settings.engine_max_num_seqs, notes.given("engine_max_num_seqs")
        )
    wanted = max(CPU_PROFILES[settings.tuning_profile].sequences, settings.engine_concurrency or 0)
    return notes.decide("engine", "engine_max_num_seqs", wanted, f"profile {settings.tuning_profile}")


def _address(settings: Settings, notes: Notes) -> str:
    if settings.engine_publish:
        return notes.decide("engine", "host", EVERYWHERE, notes.given("engine_publish"))
    return notes.decide("engine", "host", LOOPBACK, "not published: only this host reaches the engine")


def _flags(model: Model, address: str, port: int) -> dict[str, Scalar]:
    return {
        "model": model.directory,
        "served-model-name": model.served_name,
        "host": address,
        "port": port,
        "disable-fastapi-docs": True,
        # vLLM itself guards /v1 and leaves /invocations, full inference, to anyone (runtime/require_key.py).
        "middleware": "require_key.RequireKey",
        "shutdown-timeout": 15,
    }


def _environment(release: Release) -> dict[str, str]:
    return {
        # FlashInfer looks for ninja here, and systemd's own PATH lacks the environment (field notes, vllm.md, 0).
        "PATH": f"{release.path}/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": MIDDLEWARE,
        "HOME": "/var/lib/llmhost/cache",
        "HF_HOME": "/var/lib/llmhost/cache/huggingface",
        "VLLM_CACHE_ROOT": "/var/lib/llmhost/cache/vllm",
        # Weights lie on the disk, verified: nothing is fetched at run time.
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # Without these two about 14 worker ports listen on the LAN (field notes, vllm.md).
        "VLLM_HOST_IP": LOOPBACK,
        "GLOO_SOCKET_IFNAME": "lo",
    }
