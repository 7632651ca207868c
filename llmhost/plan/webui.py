"""How Open WebUI is set up, whatever it runs in: one table of environment variables, each with its reason.

Most defaults of Open WebUI suit a laptop with Ollama and the Internet. Each row below mends one of them for a host
that must talk to its own engine and to nothing else; tests/lab/test_webui_traps.py shows each trap and its remedy on
the real program. What differs between a venv and a container is one small value, `Runtime`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from llmhost.plan.model import Decision, EnginePlan, Release, Service, WebuiPlan
from llmhost.settings import Settings

# Written on the host by the `secrets` program, never part of a plan.
SECRETS = ("WEBUI_SECRET_KEY", "WEBUI_ADMIN_PASSWORD", "OPENAI_API_KEY")

# A fresh database is ready in 5 to 12 s on two cores. An upgrade migrates it for minutes, and a start killed in the
# middle of that leaves SQLite broken (open-webui issue 21349), so the wait is long; a start that fails ends it at once.
START_TIMEOUT_SECONDS = 600

# Below this a model strays when sampled: about half a billion parameters in 2 bytes each.
SMALL_MODEL_BYTES = 1 << 30


@dataclass(frozen=True)
class Runtime:
    """What differs between the runtimes: where the program sees its data and the engine."""

    data_dir: str
    engine_host: str  # a name or address, as seen from inside


# A container adds its row here (data in its volume, the engine by its host's name); the table below stays as it is.
RUNTIMES = {"venv": Runtime(data_dir="/var/lib/llmhost/webui", engine_host="127.0.0.1")}


@dataclass(frozen=True)
class Situation:
    """What the values of the table depend on."""

    settings: Settings
    engine: EnginePlan
    runtime: Runtime

    @property
    def engine_url(self) -> str:
        """The engine's OpenAI API as the program sees it."""
        return f"http://{self.runtime.engine_host}:{self.engine.port}/v1"

    @property
    def origins(self) -> tuple[str, ...]:
        """Where a browser on this host finds the page; none where it is published, as the host has many names."""
        if self.settings.webui_publish:
            return ()
        return tuple(f"http://{name}:{self.settings.webui_port}" for name in ("127.0.0.1", "localhost"))

    @property
    def calls_tools(self) -> bool:
        """Whether the engine parses the model's tool calls."""
        return bool(self.engine.flags.get("enable-auto-tool-choice"))

    @property
    def on_gpu(self) -> bool:
        """Whether a further completion costs little."""
        return self.engine.accelerator != "cpu"

    @property
    def model_is_small(self) -> bool:
        """Whether the model is known to be too small to be sampled."""
        weights = self.engine.model.weights_bytes
        return weights is not None and weights < SMALL_MODEL_BYTES


@dataclass(frozen=True)
class Variable:
    """One environment variable of Open WebUI: its value in a situation, and why, in one line."""

    name: str
    value: str | Callable[[Situation], str]
    why: str
    decision: bool = False  # worth a line in the plan; all are explained in the rendered file

    def resolve(self, situation: Situation) -> str:
        """The value in this situation."""
        return self.value if isinstance(self.value, str) else self.value(situation)


def plan_webui(settings: Settings, engine: EnginePlan, release: Release) -> tuple[WebuiPlan, list[Decision]]:
    """Plan Open WebUI in front of `engine`; the decisions are those an operator would ask about."""
    plan = WebuiPlan(
        version=release.version,
        runtime=settings.webui_runtime,
        host="0.0.0.0" if settings.webui_publish else "127.0.0.1",
        port=settings.webui_port,
        admin_email=settings.webui_admin_email,
        release=release,
        service=Service(
            unit="open-webui.service",
            inputs=(
                "/etc/systemd/system/open-webui.service",
                "/etc/llmhost/open-webui.env",
                "/etc/llmhost/secrets/open-webui.env",
            ),
            start_timeout_seconds=START_TIMEOUT_SECONDS,
        ),
        environment=environment(settings, engine, RUNTIMES[settings.webui_runtime]),
    )
    return plan, [_listening(plan), *_decisions(plan)]


def environment(settings: Settings, engine: EnginePlan, runtime: Runtime) -> dict[str, str]:
    """All of Open WebUI's environment but its secrets, as seen from inside `runtime`."""
    situation = Situation(settings, engine, runtime)
    return {variable.name: variable.resolve(situation) for variable in ENVIRONMENT}


def _listening(plan: WebuiPlan) -> Decision:
    reason = "Loopback only, unless webui_publish is set." if plan.host == "127.0.0.1" else "webui_publish is set."
    return Decision("webui", "listen", f"{plan.host}:{plan.port}", reason)


def _decisions(plan: WebuiPlan) -> list[Decision]:
    return [Decision("webui", v.name, plan.environment[v.name], v.why) for v in ENVIRONMENT if v.decision]


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _connection(situation: Situation) -> str:
    served = [situation.engine.model.served_name]
    return json.dumps({"0": {"enable": True, "model_ids": served, "connection_type": "local"}})


def _model_parameters(situation: Situation) -> str:
    parameters: dict[str, object] = {"function_calling": "native" if situation.calls_tools else "legacy"}
    if situation.model_is_small:
        # No max_tokens: near the end of a long chat vLLM refuses what no longer fits instead of shortening it.
        parameters["temperature"] = 0
    return json.dumps(parameters)


def _model_metadata(situation: Situation) -> str:
    return json.dumps({"capabilities": {"builtin_tools": situation.calls_tools}})


def _engine_url(situation: Situation) -> str:
    return situation.engine_url


# The rows follow a request: the files, who may enter, the engine, the chat, then all that stays switched off.
ENVIRONMENT: tuple[Variable, ...] = (
    # --- the program and its files
    Variable("ENV", "prod", "As in the published image; the default `dev` serves the API's documentation to anyone."),
    Variable("DATA_DIR", lambda s: s.runtime.data_dir, "Database, uploads and caches; the default is inside the venv."),
    Variable(
        "STATIC_DIR",
        lambda s: f"{s.runtime.data_dir}/static",
        "Assets are copied here at every start; the default is inside the installation, which is read-only.",
    ),
    Variable("USE_SLIM_DOCKER", "true", "Only the slim requirements are installed; read without Docker too."),
    Variable("PYTHONUNBUFFERED", "1", "The journal gets each line when it is written, also a crash's last one."),
    Variable("UVICORN_WORKERS", "1", "SQLite and settings held in memory allow one process; more need Redis."),
    Variable(
        "ENABLE_PERSISTENT_CONFIG",
        "false",
        "This file decides at every start, so changed settings take effect; edits in the admin panel last until then.",
        decision=True,
    ),
    # --- who may enter
    Variable("WEBUI_ADMIN_EMAIL", lambda s: s.settings.webui_admin_email, "The first account, made while none exists."),
    Variable("WEBUI_ADMIN_NAME", lambda s: s.settings.webui_admin_name, "The first account's name."),
    Variable(
        "ENABLE_SIGNUP",
        "false",
        "Closed at every start; left out, it closes after the first account and opens again at the next start.",
        decision=True,
    ),
    Variable("DEFAULT_USER_ROLE", "pending", "Should signup ever be opened, an admin still lets each account in."),
    Variable(
        "BYPASS_MODEL_ACCESS_CONTROL",
        "true",
        "Every account may use the host's model; without it ordinary users see none.",
        decision=True,
    ),
    Variable(
        "JWT_EXPIRES_IN",
        "24h",
        "Without Redis signing out cannot revoke a token, so it ends by itself; the default is four weeks.",
        decision=True,
    ),
    Variable("WEBUI_SESSION_COOKIE_SAME_SITE", "strict", "Other sites cannot use the session; OIDC would need lax."),
    Variable("WEBUI_SESSION_COOKIE_SECURE", "false", "Plain HTTP: browsers drop a secure cookie. True with TLS."),
    Variable(
        "CORS_ALLOW_ORIGIN",
        lambda s: ";".join(s.origins) or "*",
        "Loopback: only the page itself may open the chat's socket. Published: any name, as the host has many.",
        decision=True,
    ),
    Variable("FORWARDED_ALLOW_IPS", "127.0.0.1", "Only a proxy on this host may name the client; default: anyone."),
    Variable("WEBUI_URL", lambda s: s.origins[0] if s.origins else "", "For links in messages; empty when unknown."),
    # --- the engine
    Variable("OPENAI_API_BASE_URL", _engine_url, "The engine on this host; unset means api.openai.com.", decision=True),
    Variable(
        "OPENAI_API_CONFIGS",
        _connection,
        "Names the model, so that page loads never ask the engine for its list and do not stall while it starts.",
        decision=True,
    ),
    Variable("DEFAULT_MODELS", lambda s: s.engine.model.served_name, "Selected when a chat opens."),
    Variable("ENABLE_OLLAMA_API", "false", "There is no Ollama here."),
    Variable("OLLAMA_BASE_URL", "http://127.0.0.1:11434", "Never called; if unset, each start probes two ports."),
    # --- the chat
    Variable(
        "DEFAULT_MODEL_PARAMS",
        _model_parameters,
        "Native tool calls only if the engine parses them (else vLLM answers 400 to every chat from the page); "
        "a model under 1 GiB answers greedily, as sampling makes it stray.",
        decision=True,
    ),
    Variable(
        "DEFAULT_MODEL_METADATA",
        _model_metadata,
        "Built-in tools only if the engine parses tool calls; this holds even where a user asks for native calls.",
        decision=True,
    ),
    Variable(
        "ENABLE_TITLE_GENERATION",
        lambda s: _flag(s.on_gpu),
        "A second completion for each new chat: fine on a GPU; on a CPU it delays the reply, and the question will do.",
        decision=True,
    ),
    Variable("ENABLE_TAGS_GENERATION", "false", "One more completion for each new chat."),
    Variable("ENABLE_FOLLOW_UP_GENERATION", "false", "One more completion, over the whole chat, for each reply."),
    Variable("ENABLE_AUTOCOMPLETE_GENERATION", "false", "One more completion for each pause in typing."),
    Variable("ENABLE_RETRIEVAL_QUERY_GENERATION", "false", "One more completion before each reply about a document."),
    Variable("ENABLE_SEARCH_QUERY_GENERATION", "false", "One more completion before each reply, for no web search."),
    # --- documents
    Variable(
        "BYPASS_EMBEDDING_AND_RETRIEVAL",
        "true",
        "A text file is put into the prompt whole: neither an embedding model nor a vector database is at hand yet.",
        decision=True,
    ),
    Variable("VECTOR_DB", "pgvector", "The only one the slim set has; opened on first use, so none need exist."),
    Variable("RAG_EMBEDDING_ENGINE", "openai", "Over HTTP; empty loads a model in this process, which slim cannot."),
    Variable("RAG_OPENAI_API_BASE_URL", _engine_url, "Own default: api.openai.com, whatever OPENAI_API_BASE_URL says."),
    Variable("RAG_EMBEDDING_MODEL_TRUST_REMOTE_CODE", "false", "A model's own code never runs here; default: true."),
    Variable("RAG_RERANKING_MODEL_TRUST_REMOTE_CODE", "false", "A model's own code never runs here; default: true."),
    Variable("ENABLE_MEMORIES", "false", "Needs embeddings and a vector database."),
    # --- nothing leaves the host
    Variable(
        "OFFLINE_MODE",
        "true",
        "No download of models, no check for updates, no pip: the host needs no Internet once installed.",
        decision=True,
    ),
    Variable("ENABLE_VERSION_UPDATE_CHECK", "false", "Versions are pinned in locks/; asks api.github.com otherwise."),
    Variable("IMAGES_OPENAI_API_BASE_URL", _engine_url, "Image generation is off; its default is api.openai.com."),
    Variable("IMAGES_EDIT_OPENAI_API_BASE_URL", _engine_url, "Image editing is off; its default is api.openai.com."),
    Variable("AUDIO_STT_OPENAI_API_BASE_URL", _engine_url, "Dictation is off; its default is api.openai.com."),
    Variable("AUDIO_TTS_OPENAI_API_BASE_URL", _engine_url, "Reading aloud is the browser's; default: api.openai.com."),
    Variable("AUDIO_REALTIME_OPENAI_API_BASE_URL", _engine_url, "Calls are off; their default is api.openai.com."),
    Variable("USER_PERMISSIONS_CHAT_WEB_UPLOAD", "false", "Users cannot make the host fetch a web page."),
    Variable("USER_PERMISSIONS_CHAT_STT", "false", "The slim set has no speech recognition."),
    Variable("USER_PERMISSIONS_CHAT_CALL", "false", "A call needs speech recognition."),
    Variable("ENABLE_COMMUNITY_SHARING", "false", "No button that uploads a chat to openwebui.com."),
    Variable("ANONYMIZED_TELEMETRY", "false", "No telemetry from libraries, as in the published image."),
    Variable("DO_NOT_TRACK", "true", "The same, by its common name."),
    Variable("SCARF_NO_ANALYTICS", "true", "The same, for one library."),
    # --- no code from the page runs on the host
    Variable(
        "ENABLE_PLUGINS",
        "false",
        "Tools and functions are Python that an admin's browser session could run on the host.",
        decision=True,
    ),
    Variable("ENABLE_PIP_INSTALL_FRONTMATTER_REQUIREMENTS", "false", "Nothing is installed from the page."),
    Variable("ENABLE_CODE_EXECUTION", "false", "No Run button below a reply's code."),
    Variable("ENABLE_CODE_INTERPRETER", "false", "The model does not run code."),
)

REASONS = {variable.name: variable.why for variable in ENVIRONMENT}
