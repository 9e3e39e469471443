"""What each service can be told, and how: flag over environment over file over default.

Pure but for `load`, which reads the file named by `--config`. A field `drain_s` is the flag `--drain-s`, the variable
TOKENMILL_DRAIN_S and the key `drain_s` in the service's table of the TOML file.
"""

import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

S = TypeVar("S", bound="Settings")


class Settings(Struct, frozen=True, kw_only=True):
    """What every service has."""

    id: str = ""  # empty: made up at start, kind plus random letters
    nats: str = "nats://127.0.0.1:4222"
    nats_creds: str = ""  # file of an NKey seed or a JWT, or a folder of them; empty: the broker asks nobody
    nats_ca: str = ""  # PEM file that a tls:// broker's certificate is checked against; empty: the system's
    zone: str = "local"
    heartbeat_s: float = 0.5
    silence_s: float = 2.0  # a peer unheard for this long is taken for dead
    drain_s: float = 30.0
    metrics_port: int = 0  # 0: none
    metrics_host: str = "127.0.0.1"  # 0.0.0.0 where Prometheus runs elsewhere
    log: str = "console"  # or json
    log_level: str = "info"
    otlp: str = ""  # OTLP/HTTP endpoint; empty: no export


class GatewaySettings(Settings, frozen=True, kw_only=True):
    host: str = "127.0.0.1"
    port: int = 8000
    tls_cert: str = ""  # PEM file of the certificate that clients see, with its chain; empty: plain HTTP
    tls_key: str = ""  # PEM file of its key
    model: str = ""  # path of a pulled model (folder), for its tokenizer and template; empty: none served
    model_name: str = "default"
    models: str = ""  # further ones, by their names in the mesh: `a=FOLDER,b=FOLDER`
    aliases: str = ""  # other names for them: `fast=a,best=b`
    # how models write calls and thoughts, where their templates do not say: `a=hermes,b=none`, `a=think`
    tool_formats: str = ""  # hermes, llama3, mistral, harmony or none
    reasoning_formats: str = ""  # think, harmony or none
    residency: str = ""  # zones that requests may use, split by commas; empty: any. A request may narrow it
    # file of tenants, their keys and limits (`gateway/tenants_file.py`); empty: nobody needs a key
    tenants: str = ""
    max_active: int = 1024  # streams at once; more is refused with Retry-After
    max_body_bytes: int = 4 << 20
    body_s: float = 60.0  # for the whole body of a request to arrive
    default_max_tokens: int = 512
    request_timeout_s: float = 600.0
    accept_s: float = 2.0  # a request nobody accepted in this time is sent again
    stall_s: float = 20.0  # no token for this long though its worker lives: sent again
    max_attempts: int = 4
    keep_alive_s: float = 15.0
    cache_secret: str = "tokenmill"  # of cache salts, where there is no tenants file
    prices: str = ""  # price sheet (`deploy/prices.toml` is one); empty: nothing costs anything
    # ledger, and tenants where no file of them is named: sqlite:///FILE or postgresql://USER@HOST/NAME; empty: neither
    database: str = ""
    # folder of this gateway alone, for what the ledger has not been told yet; empty: that is lost when it is killed
    journal: str = ""
    record: str = ""  # file to which lengths, times and block names of all traffic go, never its text; empty: none
    record_mib: int = 256  # the file grows to this size and no further


class RouterSettings(Settings, frozen=True, kw_only=True):
    policy: str = "cost"  # or prefix, least_loaded, round_robin, random
    max_queue_s: float = 60.0  # a first token expected later than this is refused
    max_held: int = 1024  # places for requests of one model that wait until a worker has room
    tenant_weights: str = ""  # shares of a full mesh, as in `acme=4,example=0.5`; others have what gateways say


class WorkerSettings(Settings, frozen=True, kw_only=True):
    model: str = ""  # path of a pulled model; unused by the mock engine
    model_name: str = "default"
    engine: str = "auto"  # auto, cpu, cuda, mock, reference
    threads: int = 0  # 0: one per core
    # processes that compute one model together, each with its part of the weights and of the KV cache
    tensor_parallel: int = 1
    rank_timeout_s: float = 30.0  # how long one of them may be silent in a step before the worker gives up
    sku: str = "cpu"
    price_usd_per_hour: float = 0.0
    kv_blocks: int = 0  # 0: from kv_mib
    kv_mib: int = 256
    # engine cuda on one GPU, instead of kv_mib: of its memory, for weights, the largest step and the KV cache
    device_share: float = 0.9
    kv_format: str = "fp16"  # or int8, fp8: twice the blocks in the same memory, each a recipe of its own; engine cpu
    # host memory for blocks that the pool evicts; 0: none. On a CPU more kv_mib does the same without a copy
    kv_tier_mib: int = 0
    max_running: int = 64
    max_waiting: int = 256
    step_tokens: int = 256  # token budget of one step
    max_draft_tokens: int = 8
    speculation: bool = True
    mock_step_s: float = 0.010  # mock engine: a step costs base + rows * row + prefill tokens * token
    mock_row_s: float = 0.0001
    mock_token_s: float = 0.00005
    mock_vocabulary: int = 49152


class DrafterSettings(Settings, frozen=True, kw_only=True):
    kind: str = "suffix"  # or model, hybrid
    max_draft_tokens: int = 8
    max_contexts: int = 1024
    model: str = ""  # kinds model and hybrid: path of the small model that drafts
    engine: str = "cpu"  # where that runs: cpu (the native step), cuda, reference
    threads: int = 1  # of the small model on a CPU
    kv_mib: int = 64  # of its KV cache
    draft_temperature: float = 1.0  # times the temperature of the request; 0: greedy drafts
    max_branches: int = 4  # outcomes of the step under way that are prepared for a stream, at most; 0: none
    price_usd_per_hour: float = 0.0


def load(kind: type[S], table: str, argv: Sequence[str], environ: Mapping[str, str]) -> S:
    """The settings of one service. Raises ValueError naming the flag, variable or key that is wrong."""
    flags = _flags(argv)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    config = flags.pop("config", environ.get("TOKENMILL_CONFIG", ""))
    if config:
        for key, value in _table(config, table).items():
            values[key], origins[key] = value, f"{key} in [{table}] of {config}"
    for field in kind.__struct_fields__:
        variable = f"TOKENMILL_{field.upper()}"
        if variable in environ:
            values[field], origins[field] = environ[variable], variable
    for field, value in flags.items():
        values[field], origins[field] = value, f"--{field.replace('_', '-')}"
    unknown = sorted(set(values) - set(kind.__struct_fields__))
    if unknown:
        raise ValueError(f"unknown settings for {table}: {', '.join(origins[field] for field in unknown)}")
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$.")
        field = path.rstrip("`")
        raise ValueError(f"bad setting for {table}: {origins.get(field, field)} = {values.get(field)!r}: "
                         f"{what}") from None


def check_price(usd_per_hour: float) -> None:
    """Raises ValueError for what nobody can be charged."""
    if not (math.isfinite(usd_per_hour) and usd_per_hour >= 0.0):
        raise ValueError(f"price_usd_per_hour is {usd_per_hour:g}: say 0 or more")


def to_flags(settings: Settings) -> list[str]:
    """The command-line flags that `load` turns back into `settings`; defaults left out."""
    defaults = type(settings)()
    flags = []
    for field in settings.__struct_fields__:
        value = getattr(settings, field)
        if value != getattr(defaults, field):
            flags.append(f"--{field.replace('_', '-')}={value}")
    return flags


def _table(config: str, table: str) -> dict[str, Any]:
    try:
        found = tomllib.loads(Path(config).read_text()).get(table, {})
    except OSError as error:
        raise ValueError(f"cannot read the settings file {config}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"the settings file {config} is no TOML: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{table} in {config} must be a table: write [{table}]")
    return found


def _flags(argv: Sequence[str]) -> dict[str, str]:
    found = {}
    rest = list(argv)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ValueError(f"expected a --flag, got {flag!r}")
        name, equals, value = flag[2:].partition("=")
        if not equals:
            if not rest:
                raise ValueError(f"--{name} needs a value")
            value = rest.pop(0)
        found[name.replace("-", "_")] = value
    return found
