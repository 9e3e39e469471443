"""The `tokenmill` command.

tokenmill up      the whole mesh on this machine
tokenmill pull    fetch a model into the cache
tokenmill models  what is in the cache, and whether it can be served here
tokenmill distil  a drafter out of the model it drafts for
tokenmill compress  a model in fewer bits a weight
tokenmill certify  what it kept of the model it was made from
tokenmill replay  a trace of traffic on a virtual clock
tokenmill price-sheet  what tokens cost here, measured
tokenmill plan    how many workers and drafters a trace needs, and what they cost
tokenmill explain why a request went where it went
tokenmill keys    the keys of tenants
tokenmill projects  tenants in a database, and their limits
tokenmill usage   what was used, what was charged for it and what it cost
tokenmill ledger  whether that adds up
tokenmill nats-config  a NATS that knows its clients
tokenmill scale   how many of each service the load needs
tokenmill doctor  what is missing here, and what to do about it
"""

import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from deploy import keys_command, ledger_command, nats_command, price_command, scale_command
from deploy.database import opened

PACKAGES = ("gateway", "router", "worker", "drafter", "shared", "kernels", "deploy")
MODEL_HELP = "default, a GGUF file, a model folder or a Hugging Face id (owner/name, owner/name:Q4_K_M)"
LOG_LEVELS = ("debug", "info", "warning", "error")
PRICES = Path(__file__).with_name("prices.toml")
ENGINES = ("auto", "cpu", "cuda", "mock", "reference")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="An inference mesh for open-weight language models.",
)
app.add_typer(keys_command.app, name="keys")
app.add_typer(ledger_command.projects_app, name="projects")
app.add_typer(ledger_command.ledger_app, name="ledger")
app.command(name="usage")(ledger_command.usage)
app.command(name="nats-config")(nats_command.nats_config)
app.command(name="scale")(scale_command.scale)
app.command(name="price-sheet")(price_command.price_sheet)
app.command(name="plan")(price_command.plan)


def main() -> None:
    """Entry point: refuse to run when another project's package shadows one of ours."""
    home = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None or Path(spec.origin).resolve().parent.parent != home:
            where = spec.origin if spec else "nowhere"
            sys.exit(
                f"the package {name!r} resolves to {where}, not to tokenmill in {home}: "
                "install tokenmill into an environment of its own (python -m venv)"
            )
    app()


@app.command()
def pull(model: Annotated[str, typer.Argument(help=MODEL_HELP)] = "default") -> None:
    """Fetch a model into the cache and compile the CPU step; both are kept."""
    folder = _pull(model)
    _compile()
    typer.echo(str(folder))


@app.command()
def models(
    json: Annotated[bool, typer.Option("--json", help="as JSON, one list")] = False,
) -> None:
    """List the pulled models: family, precision, size, memory, and whether they can be served here."""
    import msgspec

    from deploy import models as shelf

    found = shelf.shelf()
    if json:
        typer.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
        return
    console = Console()
    if not found:
        console.print("no model has been pulled: `tokenmill pull` fetches the default one")
    else:
        console.print(shelf.table(found))
    console.print(Text(f"served: {shelf.supported()}", "dim"), soft_wrap=True)


@app.command()
def up(
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="PORT", help="port of the first gateway")] = 8000,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="address the gateways listen on")] = "127.0.0.1",
    workers: Annotated[str, typer.Option(metavar="N|N..M", help="how many of each model; N..M: as many as the load "
                                         "needs (`tokenmill scale`)")] = "1",
    tensor_parallel: Annotated[
        int, typer.Option(metavar="N", help="processes that share each worker's model, on a GPU each or on the CPU",
                          min=1)
    ] = 1,
    drafters: Annotated[int, typer.Option(metavar="N", help="how many", min=0)] = 1,
    routers: Annotated[int, typer.Option(metavar="N", help="how many", min=1)] = 1,
    gateways: Annotated[int, typer.Option(metavar="N", help="how many", min=1)] = 1,
    model: Annotated[list[str] | None, typer.Option(metavar="MODEL", help=f"{MODEL_HELP}; may be given several "
                                                    "times")] = None,
    alias: Annotated[list[str] | None, typer.Option(metavar="NAME=MODEL", help="another name for a model's name; may "
                                                    "be given several times")] = None,
    drafter_kind: Annotated[str, typer.Option(metavar="KIND", help="suffix, model or hybrid")] = "suffix",
    drafter_model: Annotated[
        str, typer.Option(metavar="MODEL", help="for kinds model and hybrid: a small model of the same vocabulary")
    ] = "",
    engine: Annotated[str, typer.Option(metavar="ENGINE", help="auto, cpu, cuda, mock or reference (slow)")] = "auto",
    nats: Annotated[str, typer.Option(metavar="URL", help="URL of an existing NATS; default: an embedded one")] = "",
    nats_creds: Annotated[
        Path | None,
        typer.Option(metavar="DIR", envvar="TOKENMILL_NATS_CREDS", show_envvar=False,
                     help="folder of everyone's credentials for it, as `tokenmill nats-config` writes it"),
    ] = None,
    nats_ca: Annotated[
        Path | None,
        typer.Option(metavar="FILE", envvar="TOKENMILL_NATS_CA", show_envvar=False,
                     help="PEM file to check a tls:// NATS against"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="folder for logs and the broker's store; default: one per port in your home"),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="PEM file of a certificate, for HTTPS", exists=True, dir_okay=False)
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PEM file of its key", exists=True, dir_okay=False)
    ] = None,
    all_in_one: Annotated[bool, typer.Option("--all-in-one", help="one process, no NATS")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="leave out the first answer")] = False,
    otlp: Annotated[
        str, typer.Option(metavar="URL", help="OTLP/HTTP endpoint for traces, e.g. http://127.0.0.1:4318")
    ] = "",
    metrics_port: Annotated[
        int,
        typer.Option(min=0, max=65535, metavar="PORT", envvar="TOKENMILL_METRICS_PORT", show_envvar=False,
                     help="port of the first router's figures; drafters' and workers' follow; 0: none"),
    ] = 0,
    log_level: Annotated[str, typer.Option(metavar="LEVEL", help="debug, info, warning or error")] = "info",
    tenants: Annotated[
        Path | None,
        typer.Option(metavar="FILE", envvar="TOKENMILL_TENANTS", show_envvar=False,
                     help="who may use it, as `tokenmill keys` writes it; default: everybody, without a key"),
    ] = None,
    prices: Annotated[
        Path,
        typer.Option(metavar="FILE", envvar="TOKENMILL_PRICES", show_envvar=False, show_default=False,
                     help="what tokens cost; default: deploy/prices.toml, an example"),
    ] = PRICES,
    database: Annotated[
        str,
        typer.Option(metavar="URL", envvar="TOKENMILL_DATABASE", show_envvar=False,
                     help="ledger, and tenants where no file of them is named: sqlite:///FILE or "
                     "postgresql://USER@HOST/NAME; default: neither"),
    ] = "",
    drain_s: Annotated[float, typer.Option(min=0.0, metavar="S", help="seconds running streams get at the end")] = 30.0,
) -> None:
    """Start gateway, router, workers, drafters and NATS here; stop with Ctrl-C."""
    import uvloop

    from deploy import up as bring_up
    from deploy.local_mesh import Options, UpFailed
    from deploy.paths import data_folder
    from gateway.tls import Certificate

    if engine not in ENGINES:
        _leave(f"--engine {engine!r} is unknown: choose one of {', '.join(ENGINES)}")
    if log_level not in LOG_LEVELS:
        _leave(f"--log-level {log_level!r} is unknown: choose one of {', '.join(LOG_LEVELS)}")
    if all_in_one and nats:
        _leave("--all-in-one needs no NATS: leave out --nats")
    if all_in_one and metrics_port:
        _leave("--metrics-port is for services that are processes: leave out --all-in-one")
    least_workers, most_workers = _between(workers)
    if all_in_one and most_workers > least_workers:
        _leave("--workers N..M is for services that are processes: leave out --all-in-one, or say one number")
    if (nats_creds or nats_ca) and not nats:
        _leave("--nats-creds and --nats-ca are for a NATS that --nats names: the embedded one is open, on loopback")
    try:
        Certificate.of(str(tls_cert or ""), str(tls_key or ""))
    except ValueError as error:
        _leave(str(error))
    if tenants is not None:
        _check_tenants(tenants)
    if database:
        with opened(database):
            pass
    if engine == "cuda":
        _check_cuda()
    aliases = _pairs(alias or [])
    folder, *more = map(_pull, model or ["default"])
    if engine in ("auto", "cpu"):
        _check_memory([folder, *more], most_workers, tensor_parallel)
    small = _pull(drafter_model) if drafter_model else None
    if engine in ("auto", "cpu"):
        _compile()
    options = Options(
        model=folder,
        data=data or data_folder() / str(port),
        host=host,
        port=port,
        tls_cert=tls_cert,
        tls_key=tls_key,
        gateways=gateways,
        routers=routers,
        workers=least_workers,
        most_workers=most_workers,
        tensor_parallel=tensor_parallel,
        drafters=drafters,
        drafter_kind=drafter_kind,
        drafter_model=small,
        engine=engine,
        nats=nats,
        nats_creds=nats_creds,
        nats_ca=nats_ca,
        otlp=otlp,
        metrics_port=metrics_port,
        log_level=log_level,
        drain_s=drain_s,
        tenants=tenants,
        prices=prices,
        database=database,
        more_models=more,
        aliases=aliases,
    )
    try:
        uvloop.run(bring_up.run(options, Console(), one_process=all_in_one, quiet=quiet))
    except UpFailed as error:
        _leave(str(error))


@app.command()
def doctor(
    nats: Annotated[str, typer.Option(metavar="URL", envvar="TOKENMILL_NATS", show_envvar=False,
                                      help="NATS that services will use; default: the embedded one")] = "",
    nats_creds: Annotated[str, typer.Option(metavar="FILE|DIR", envvar="TOKENMILL_NATS_CREDS", show_envvar=False,
                                            help="an observer's credential for it")] = "",
    nats_ca: Annotated[str, typer.Option(metavar="FILE", envvar="TOKENMILL_NATS_CA", show_envvar=False,
                                         help="PEM file to check a tls:// NATS against")] = "",
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="where a gateway will listen")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="PORT", help="of that gateway")] = 8000,
    json: Annotated[bool, typer.Option("--json", help="the findings as JSON")] = False,
) -> None:
    """Look whether this machine can serve, and say what to do. Exit code 0: fine, 1: advice, 2: broken."""
    import msgspec

    from deploy import doctor as examining

    findings = examining.examine(examining.Wanted(nats, nats_creds, nats_ca, host, port))
    if json:
        typer.echo(msgspec.json.format(msgspec.json.encode(findings)).decode())
    else:
        console = Console()
        colours = {"ok": "green", "advice": "yellow", "broken": "red"}
        for found in findings:
            console.print(Text.assemble((f"{found.state:<7}", colours[found.state]), f" {found.name:<9} {found.said}"),
                          soft_wrap=True)
            if found.do:
                console.print(Text(f"{'':17} -> {found.do}", "bold"), soft_wrap=True)
    raise SystemExit(examining.exit_code(findings))


@app.command()
def replay(
    trace: Annotated[Path | None, typer.Argument(metavar="TRACE", help="requests as JSON lines: a Mooncake trace, or "
                                                 "what a gateway wrote with --record", exists=True, dir_okay=False,
                                                 readable=True)] = None,
    synthetic: Annotated[str, typer.Option(metavar="KIND", help="no TRACE but traffic made up: chat, agents or "
                                           "files")] = "",
    requests: Annotated[int, typer.Option(metavar="N", help="of made up traffic: how many requests", min=1)] = 6000,
    seed: Annotated[int, typer.Option(metavar="N", help="of made up traffic: another seed, other requests")] = 0,
    workers: Annotated[int, typer.Option(metavar="N", help="how many", min=1)] = 8,
    policy: Annotated[str, typer.Option(metavar="P[,P2...]", help="cost, prefix, least_loaded, round_robin, random; "
                                        "or all")] = "all",
    block_size: Annotated[int, typer.Option(metavar="TOKENS", help="tokens of a KV block", min=1)] = 64,
    blocks_per_worker: Annotated[int, typer.Option(metavar="N", help="KV blocks of a worker", min=1)] = 16_384,
    speed: Annotated[float, typer.Option(metavar="X", help="play the trace X times as fast")] = 1.0,
    step_ms: Annotated[float, typer.Option(metavar="MS", help="a step without rows", min=0.001)] = 6.0,
    row_ms: Annotated[float, typer.Option(metavar="MS", help="each stream in a step", min=0.0)] = 0.1,
    token_ms: Annotated[float, typer.Option(metavar="MS", help="each prompt token computed", min=0.0)] = 0.019,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the figures there")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="draw the page (needs matplotlib)")] = None,
) -> None:
    """Play a trace through the mesh's own router and scheduler on a virtual clock, and compare policies."""
    import msgspec

    from deploy import replay as replaying
    from deploy import replay_plot, replay_synthetic
    from deploy.replay_fleet import Device, Fleet
    from deploy.replay_report import drawing, table
    from deploy.replay_trace import BadTrace, read

    if (trace is None) == (not synthetic):
        _leave("name a TRACE, or a kind of traffic to make up with --synthetic")
    if not speed > 0:
        _leave(f"--speed {speed:g} is no speed: give a number above 0")
    if plot is not None and not replay_plot.possible():
        _leave(replay_plot.MISSING)
    fleet = Fleet(workers, blocks_per_worker, Device(step_ms / 1e3, row_ms / 1e3, token_ms / 1e3))
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
               TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def report(name: str, done: int, requests: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=requests)
            progress.update(tasks[name], completed=done)

        try:
            if trace is not None:
                name, arrivals = trace.name, read(trace, speed)
            else:
                name = f"{synthetic}, seed {seed}"
                arrivals = replay_synthetic.synthetic(synthetic, requests, seed, speed)
            page = replaying.replay(name, arrivals, replaying.policies_named(policy), fleet, block_size, speed, report)
        except (BadTrace, OSError, ValueError) as error:
            _leave(str(error))
    typer.echo("\n".join([*table(page.report), "", *drawing(page.ttft_ms)]))
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(page.report), indent=2) + b"\n")
    if plot is not None:
        replay_plot.draw(plot, page.report, page.ttft_ms)


@app.command()
def distil(
    target: Annotated[str, typer.Argument(metavar="TARGET", help=MODEL_HELP)] = "default",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="folder of the drafter; what was begun there goes on. Without: "
                                  "one beside the pulled models, with the target's name", show_default=False)
    ] = None,
    layers: Annotated[str, typer.Option(metavar="N|A,B,...", help="how many layers to copy, or which")] = "4",
    vocabulary: Annotated[int, typer.Option(metavar="N", help="token ids that the drafter can say", min=1)] = 8192,
    minutes: Annotated[float, typer.Option(metavar="M", help="about how long it may take in all", min=0.01)] = 20.0,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu or cuda")] = "cpu",
    texts: Annotated[int, typer.Option(metavar="N", help="answers to learn from; 0: as minutes allow", min=0)] = 0,
    steps: Annotated[int, typer.Option(metavar="N", help="steps of training; 0: as minutes allow", min=0)] = 0,
    batch: Annotated[int, typer.Option(metavar="N", help="texts of a step; 0: 8 on a CPU, 256 on a GPU", min=0)] = 0,
    on_policy: Annotated[float, typer.Option(metavar="SHARE", min=0.0, max=1.0, help="of the steps, the last ones, "
                                             "that learn from the drafter's own continuations")] = 0.1,
    peak_rate: Annotated[float, typer.Option(metavar="RATE", help="the highest learning rate", min=0.0)] = 5e-4,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="prompts of your own, one a line; every eighth "
                                                 "is held out", exists=True, dir_okay=False, readable=True)] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0)] = 0,
    json: Annotated[bool, typer.Option("--json", help="print the certificate")] = False,
) -> None:
    """Make a drafter out of the model that it is to draft for, with a certificate."""
    from deploy import distil as distilling

    if device not in ("cpu", "cuda"):
        _leave(f"--device {device!r} is unknown: choose cpu or cuda")
    if device == "cuda":
        _check_cuda()
    folder = _pull(target)
    out = out or distilling.folder_for(folder)
    if device == "cpu":
        _compile()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=not console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        def report(phase: str, done: int, total: int, figures: str) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(phase, figures=figures)
            progress.update(tasks[phase], completed=done, total=total or None, figures=figures)

        try:
            certificate = distilling.distil(
                folder, out, layers=layers, prompts_file=prompts, device=device, report=report, vocabulary=vocabulary,
                minutes=minutes, texts=texts, steps=steps, batch=batch or (8 if device == "cpu" else 256), seed=seed,
                on_policy=on_policy, peak_rate=peak_rate)
        except distilling.DistilFailed as error:
            _leave(str(error))
    console.print(f"the drafter is in {out}", soft_wrap=True)
    typer.echo(distilling.encoded(certificate).decode() if json else "\n".join(distilling.summary(certificate)))


@app.command()
def compress(
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder of the smaller model; what was begun there goes on")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = "default",
    recipe: Annotated[str, typer.Option(metavar="NAME", help="rtn: to the nearest")] = "rtn",
    bits: Annotated[int, typer.Option(metavar="N", help="4, or 8: int8 with a scale for each output")] = 4,
    group: Annotated[int, typer.Option(metavar="N", help="inputs that share a scale: 32, 64 or 128")] = 64,
    zero_point: Annotated[bool, typer.Option("--zero-point", help="ranges that need not be symmetric; kept in four "
                                             "bits on a GPU only")] = False,
    json: Annotated[bool, typer.Option("--json", help="print compression.json")] = False,
) -> None:
    """Write a model in fewer bits a weight, in the format compressed-tensors, which other engines read too."""
    import msgspec

    from deploy import compress as compressing
    from worker.compress.compressing import Recipe

    folder = _pull(model)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=not console.is_terminal) as progress:
        task = progress.add_task("layers", total=1)
        try:
            done = compressing.compress(
                folder, out, Recipe(name=recipe, bits=bits, group=group, symmetric=not zero_point),
                lambda phase, at, total, figures: progress.update(task, completed=at, total=total))
        except compressing.CompressFailed as error:
            _leave(str(error))
    console.print(f"the model is in {out}", soft_wrap=True)
    typer.echo(msgspec.json.format(msgspec.json.encode(done)).decode() if json
               else "\n".join(compressing.summary(done)))


@app.command()
def certify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    against: Annotated[str, typer.Option(metavar="MODEL", help="what it is measured against")] = "default",
    tokens: Annotated[int, typer.Option(metavar="N", help="positions of each text, at least", min=1)] = 5000,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="a text of your own instead of those that come "
                                              "along", exists=True, dir_okay=False, readable=True)] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="where certificate.json and certificate.md go; "
                                             "without: beside the model's weights", show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="print certificate.json")] = False,
) -> None:
    """Measure what a model kept of another: perplexity, divergence and agreement, with 95 % intervals."""
    from deploy import certify as certifying
    from deploy.certificate import page

    folder, baseline = _pull(model), _pull(against)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=not console.is_terminal) as progress:
        task = progress.add_task("windows", total=1)
        try:
            certificate = certifying.certify(
                folder, baseline, out=out or folder, tokens=tokens, text=text,
                report=lambda done, total: progress.update(task, completed=done, total=total))
        except certifying.CertifyFailed as error:
            _leave(str(error))
    console.print(f"the certificate is in {out or folder}", soft_wrap=True)
    typer.echo(certifying.encoded(certificate).decode() if json else page(certificate))


@app.command()
def explain(
    request_id: Annotated[str, typer.Argument(metavar="REQUEST_ID", help="the x-request-id of a response, or its id")],
    url: Annotated[list[str] | None, typer.Option(metavar="URL", help="address of a gateway; several are asked in "
                                                  "turn; default: http://127.0.0.1:8000")] = None,
    json: Annotated[bool, typer.Option("--json", help="the receipt as JSON")] = False,
    key: Annotated[str, typer.Option(metavar="KEY", envvar="TOKENMILL_API_KEY", show_envvar=False,
                                     help="of the tenant that asked, where keys are needed")] = "",
) -> None:
    """Say why a request went where it went, what it cost there and elsewhere, and what the cache gave."""
    import msgspec

    from deploy import explain as explaining

    try:
        receipt = explaining.fetch(url or ["http://127.0.0.1:8000"], request_id, key)
    except explaining.ExplainFailed as error:
        _leave(str(error))
    typer.echo(msgspec.json.format(msgspec.json.encode(receipt)).decode() if json
               else "\n".join(explaining.page(receipt)))


def _pairs(said: list[str]) -> dict[str, str]:
    """`NAME=MODEL` of each --alias."""
    from gateway.catalogue import pairs_of

    try:
        return pairs_of(",".join(said), "--alias")
    except ValueError as error:
        _leave(str(error))


def _between(said: str) -> tuple[int, int]:
    """Fewest and most, of `N` or `N..M`."""
    numbers = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", said, re.ASCII)
    found = (int(numbers[1]), int(numbers[2] or numbers[1])) if numbers else (0, 0)
    if not 1 <= found[0] <= found[1]:
        raise typer.BadParameter(f"{said!r} is neither a number of 1 or more nor two such as 1..4",
                                 param_hint="--workers")
    return found


def _pull(ref: str) -> Path:
    """Pull with a progress bar; a failure is one sentence and exit code 1."""
    from deploy import pull as pulling

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    tasks: dict[str, TaskID] = {}

    def report(what: str, done: int, total: int) -> None:
        progress.start()  # only now: where nothing is to be fetched nothing is drawn
        if what not in tasks:
            tasks[what] = progress.add_task(f"{ref}: {what}", total=total or None)
        progress.update(tasks[what], completed=done)

    try:
        return pulling.pull(ref, report)
    except pulling.PullFailed as error:
        reason = str(error)
    finally:
        if tasks:
            progress.stop()
    _leave(reason)


def _check_memory(folders: Sequence[Path], workers: int, ranks: int) -> None:
    """Say before anything is started that it would not fit, one beside the other, or not be shared so."""
    from deploy import models as shelf
    from kernels.checkpoint import open_checkpoint

    left = shelf.available_memory()
    for folder in folders:
        try:
            needed = shelf.memory_needed(open_checkpoint(folder), ranks=ranks)
        except ValueError as error:
            _leave(str(error))
        if problem := shelf.too_large(needed, left, workers):
            _leave(f"{folder.name} {problem}")
        left -= workers * needed


def _compile() -> None:
    """Compile the CPU step once; without a compiler say what that costs and go on."""
    from kernels.native import build

    console = Console(stderr=True)
    reason = build.available()
    if reason is None:
        try:
            with console.status("compiling the CPU step, once ..."):
                build.build()
        except (RuntimeError, OSError) as error:
            reason = str(error)
    if reason:
        warning = Text(f"no fast CPU step: {reason}; the torch path serves, slowly", "yellow")
        console.print(warning, soft_wrap=True)


def _check_tenants(path: Path) -> None:
    from gateway.tenants_file import TenantsFile

    try:
        TenantsFile(path).read()
    except ValueError as error:
        _leave(f"{error}. `tokenmill keys create NAME --tenants {path}` makes a file, or adds to it")


def _check_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        _leave("torch finds no CUDA device here: choose --engine auto or cpu")


def _leave(reason: str) -> NoReturn:
    """One clear sentence, exit code 1."""
    Console(stderr=True).print(Text(reason, "red"), soft_wrap=True)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
