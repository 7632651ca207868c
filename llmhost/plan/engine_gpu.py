"""The engine on NVIDIA GPUs: what differs from vLLM's own defaults there, and why. Pure.

vLLM measures the card when it starts and sizes the KV cache, the batches and the captured graphs from that. On an H200
its defaults were 3.3 times as fast at one stream as a well-known set of hand-made flags (field notes, vllm.md,
measured), so a flag is set here only where the operator asks for it or where the default would not start. Which driver
the host gets, and whether its cards will do at all, is decided in plan/driver.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmhost.catalogue import Card, LockEntry, ModelEntry, card
from llmhost.hardware import Hardware
from llmhost.plan.fit import Fit
from llmhost.plan.model import Release, Scalar
from llmhost.plan.notes import Notes
from llmhost.settings import Settings

GIB = 1 << 30
CACHE = "/var/lib/llmhost/cache"

# vLLM's default share of each card's memory (vllm/config/cache.py, 0.26.0 and 0.32.0); told, not set.
DEFAULT_MEMORY_SHARE = 0.92
# On older cards vLLM refuses bf16, which most models are published in (vllm/platforms/cuda.py).
BF16_CAPABILITY = (8, 0)
# From start to ready took 99 s on an H200 without weights to read, elsewhere up to 11 min, cold and from a slow disk
# (field notes, vllm.md, 4 and measured).
START_TIMEOUT_SECONDS = 1800


def fit_gpu(
    settings: Settings,
    hardware: Hardware,
    lock: LockEntry,
    release: Release,
    entry: ModelEntry | None,
    notes: Notes,
) -> Fit | None:
    """The engine's flags and environment on the host's GPUs; None where the notes say why there can be none.

    `entry` is None where the catalogue does not know the model.
    """
    cards = tuple(card(gpu.device) for gpu in hardware.nvidia_gpus)
    toolkit = _toolkit_environment(settings, lock, release, notes)
    if toolkit is None:
        return None
    return Fit(
        flags={
            "max-model-len": _context(settings, notes),
            **_memory(settings, notes),
            **_sequences(settings, notes),
            **_cards(cards, entry, notes),
            **_number_format(cards, notes),
        },
        environment={
            # nvidia-smi's order: else CUDA puts the fastest first, and card 0 is another than the one the reports name.
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "TRITON_CACHE_DIR": f"{CACHE}/triton",
            # As for gloo: several cards talk to each other on this host, and no port of theirs is to be seen outside.
            "NCCL_SOCKET_IFNAME": "lo",
            "VLLM_ENGINE_READY_TIMEOUT_S": str(START_TIMEOUT_SECONDS),
            **toolkit,
        },
        kv_cache_tokens=None,
        kv_cache_bytes=int(settings.engine_kv_cache_gib * GIB) if settings.engine_kv_cache_gib else None,
        memory_bytes=None,
        start_timeout_seconds=START_TIMEOUT_SECONDS,
    )


def _toolkit_environment(settings: Settings, lock: LockEntry, release: Release, notes: Notes) -> dict[str, str] | None:
    """Where the CUDA compiler is, for FlashInfer, which compiles its kernels at the engine's first start."""
    version = settings.cuda_toolkit_version
    if settings.cuda_toolkit == "venv" and version != lock.cuda:
        notes.refuse(
            "cuda_toolkit_version",
            f"is {version}, but vLLM {lock.version} brings the compiler of CUDA {lock.cuda} along",
            f'Set cuda_toolkit_version = "{lock.cuda}", or cuda_toolkit = "system"',
        )
        return None
    if settings.cuda_toolkit == "none":
        # Left on, the sampler looks for nvcc at the first request and takes the engine down (vLLM issue 49497).
        reason = "its kernels are compiled by nvcc, and cuda_toolkit is none: vLLM samples with its own"
        notes.decide("engine", "flashinfer_sampler", "off", reason)
        return {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
    home = release.cuda_home if settings.cuda_toolkit == "venv" else f"/usr/local/cuda-{version}"
    reason = f"nvcc is in {home}/bin: FlashInfer compiles its kernels at the first start, which takes minutes"
    notes.decide("engine", "flashinfer_sampler", "on", reason)
    return {"CUDA_HOME": home}


def _context(settings: Settings, notes: Notes) -> int | str:
    if settings.engine_context_tokens:
        tokens = settings.engine_context_tokens
        return notes.decide("engine", "engine_context_tokens", tokens, notes.given("engine_context_tokens"))
    reason = "the model's own, or the longest that the card's memory holds: vLLM finds it when it starts"
    return notes.decide("engine", "engine_context_tokens", "auto", reason)


def _memory(settings: Settings, notes: Notes) -> dict[str, Scalar]:
    flags: dict[str, Scalar] = {}
    if share := settings.engine_gpu_memory_utilization:
        flags["gpu-memory-utilization"] = share
        notes.decide("engine", "engine_gpu_memory_utilization", share, notes.given("engine_gpu_memory_utilization"))
    else:
        reason = "vLLM's own default, of each card; llmhost does not plan a card's memory yet"
        notes.decide("engine", "engine_gpu_memory_utilization", DEFAULT_MEMORY_SHARE, reason)
    if gib := settings.engine_kv_cache_gib:
        flags["kv-cache-memory-bytes"] = int(gib * GIB)
        reason = (
            f"{notes.given('engine_kv_cache_gib')}; vLLM then measures nothing and takes exactly this, on each card"
        )
        notes.decide("engine", "kv_cache_bytes", int(gib * GIB), reason)
    else:
        notes.decide("engine", "kv_cache_bytes", None, "what vLLM finds left on the card once the model is loaded")
    return flags


def _sequences(settings: Settings, notes: Notes) -> dict[str, Scalar]:
    if settings.engine_concurrency:
        notes.decide("engine", "engine_concurrency", None, "set, but without effect on an NVIDIA host yet")
    if settings.tuning_profile != "balanced":
        notes.decide("engine", "tuning_profile", None, "set, but without effect on an NVIDIA host yet")
    if not settings.engine_max_num_seqs:
        notes.decide(
            "engine", "engine_max_num_seqs", None, "vLLM's own choice for the card: 256, or 1024 from 70 GiB on"
        )
        return {}
    wanted = settings.engine_max_num_seqs
    return {"max-num-seqs": notes.decide("engine", "engine_max_num_seqs", wanted, notes.given("engine_max_num_seqs"))}


def _cards(cards: Sequence[Card], entry: ModelEntry | None, notes: Notes) -> dict[str, Scalar]:
    """Spread the model over all cards where it can be divided among them."""
    used, reason = _cards_used(cards, entry)
    notes.decide("engine", "tensor_parallel_size", used, reason)
    return {"tensor-parallel-size": used} if used > 1 else {}


def _cards_used(cards: Sequence[Card], entry: ModelEntry | None) -> tuple[int, str]:
    count = len(cards)
    if count < 2:
        return 1, "there is one GPU"
    first = f"vLLM takes the first of {count} GPUs by PCI address"
    if len({each.device for each in cards}) > 1:
        return 1, f"{first}: they are not alike, and the smallest would set the pace and the memory"
    if entry is None:
        return 1, f"{first}: the model is not in the catalogue, and may not divide among them"
    if entry.kv_heads % count:
        return 1, f"{first}: the model's {entry.kv_heads} key-value heads do not divide among {count}"
    return (
        count,
        f"all GPUs are alike, and each gets {entry.kv_heads // count} of the model's {entry.kv_heads} key-value heads",
    )


def _number_format(cards: Sequence[Card], notes: Notes) -> dict[str, Scalar]:
    old = [each for each in cards if each.capability and _number(each.capability) < BF16_CAPABILITY]
    if not old:
        notes.decide("engine", "dtype", "auto", "as the model was published")
        return {}
    reason = f"{old[0].title} has compute capability {old[0].capability}, and bf16 needs 8.0"
    return {"dtype": notes.decide("engine", "dtype", "half", reason)}


def _number(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))
