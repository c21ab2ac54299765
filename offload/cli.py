"""The `offload` command. Each command loads what it needs when it runs, so that help is immediate."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from offload.environment import set_defaults

app = typer.Typer(
    name="offload",
    help="Fine-tune models bigger than your machine: plan, run and report, from one config file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="Config file: .yaml, .toml or .json.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.SUB=VALUE", help="Override one key of the config; may be repeated."),
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run directory (`output` in the config).")]


def _version(wanted: bool) -> None:
    if wanted:
        import offload

        typer.echo(f"offload {offload.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the last committed step; starts the run if there is none.")
    ] = False,
    steps: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="End after step N of the run; 0 loads, commits and ends.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before starting.")] = False,
) -> None:
    """Plan, print the plan, run, report. Relative paths in the config start at the current directory."""
    from offload.config import Config

    cfg = Config.load(config, overrides or [])
    ask = sys.stdin.isatty() and sys.stdout.isatty() and not yes
    from offload import train as training

    raise typer.Exit(training.run(cfg, resume=resume, last_step=steps, confirm=_confirm if ask else None))


def _confirm() -> bool:
    try:
        return typer.confirm("Start?", default=True)
    except typer.Abort:  # Ctrl-C at the question
        raise KeyboardInterrupt from None


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print plan.json.")] = False,
    hardware: Annotated[
        str | None,
        typer.Option(metavar="PRESET_OR_FILE", help="Plan for another machine: rtx4090, h100, ... or a file."),
    ] = None,
) -> None:
    """What would live where, its peaks and its speed. Needs no weights and no GPU. Exit 0 fits, 3 does not fit."""
    from offload.config import Config

    cfg = Config.load(config, overrides or [])
    from offload import api, tables

    found = api.plan(cfg, hardware=hardware).to_json()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        tables.open_console().print(tables.plan_tables(found), tables.verdict(found))
    raise typer.Exit(0 if found["fits"] else 3)


@app.command()
def report(
    run_dir: RunDir,
    open_it: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    other: Annotated[
        Path | None, typer.Option("--compare", metavar="RUN_DIR", help="Put another run beside it: compare.html.")
    ] = None,
) -> None:
    """Rebuild report.html from what the run logged, with what would make it faster, and print the summary."""
    from offload import report as reporting
    from offload import tables

    console = tables.open_console()
    if other is None:
        data = reporting.build(run_dir, advise=True)
        page = data.path / "report.html"
        console.print(tables.run_table(reporting.summary(data)))
    else:
        from offload import compare

        page, figures, settings = compare.build(run_dir, other)
        console.print(compare.table(str(run_dir), str(other), figures, settings))
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    if open_it:
        import webbrowser

        webbrowser.open(page.absolute().as_uri())


@app.command()
def export(run_dir: RunDir, out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR")]) -> None:
    """Write the last committed step as a Hugging Face model: safetensors, config and tokenizer."""
    from offload import train as training

    training.export_run(run_dir, out_dir)
    typer.echo(f"model in {out_dir}")


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    store: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH", help="Measure this path, list the stores in it and verify all they hold; may be repeated."
        ),
    ] = None,
) -> None:
    """What this machine is, what works on it, and what would make it faster. Exit 1 when a store is damaged."""
    from offload import doctor as examination

    found = examination.examine(store or [Path.cwd()], verify=bool(store))
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        from offload import tables

        tables.open_console().print(examination.render(found))
    raise typer.Exit(1 if examination.damaged(found) else 0)


@app.command()
def init(
    model: Annotated[str | None, typer.Option(metavar="ID_OR_DIR", help="Model to fine-tune.")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write; - for standard output.")] = Path(
        "offload.yaml"
    ),
) -> None:
    """Write a commented config for this machine."""
    from offload import init as starting

    if str(out) == "-":
        typer.echo(starting.config_text(model), nl=False)
        return
    starting.write(out, model)
    typer.echo(f"wrote {out}; next: offload plan {out}")


def main() -> None:
    """Entry point: what a user can act on becomes one message on stderr with its exit code, without a traceback."""
    set_defaults()
    try:
        app()
    except Exception as error:
        if os.environ.get("OFFLOAD_DEBUG") == "1" or not _is_for_the_user(error):
            raise
        advice = ". Free space there; a run goes on with --resume" if _is_full(error) else ""
        print(f"offload: {error}{advice}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))


def _is_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _is_for_the_user(error: Exception) -> bool:
    from offload.errors import OffloadError

    if isinstance(error, OffloadError) or _is_full(error):
        return True
    io = sys.modules.get("offload.io.errors")  # loaded if one of its errors was raised
    return io is not None and isinstance(error, io.StoreError)


if __name__ == "__main__":
    main()
