# SPDX-License-Identifier: Apache-2.0
"""The commands put together, and errors turned into exit codes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Annotated

import typer

from lorikit.server.cli.audit import audit_app
from lorikit.server.cli.certs import certs_app
from lorikit.server.cli.compile import compile_model
from lorikit.server.cli.demo import demo
from lorikit.server.cli.doctor import doctor_app
from lorikit.server.cli.errors import explain
from lorikit.server.cli.exit_codes import ExitCode
from lorikit.server.cli.methods import methods
from lorikit.server.cli.profile import profile
from lorikit.server.cli.quantize import quantize
from lorikit.server.cli.run import run_app
from lorikit.server.cli.server import server
from lorikit.server.cli.version import version

_DEBUG = "--debug"

app = typer.Typer(
    name="lorikit",
    help="Federated fine-tuning of foundation models on the devices people really have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
"""The Typer application; ``run`` is the way to start it."""


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option(_DEBUG, help="Show tracebacks and the log in full.")
    ] = False,
) -> None:
    """Federated fine-tuning of foundation models on the devices people really have."""
    level = logging.DEBUG if debug else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def device() -> None:
    """Take part in training from this machine; `lorikit device --help` shows its options.

    Example: lorikit device --server localhost:50051 --insecure --data rows.jsonl
    """
    raise AssertionError("lorikit.server.cli.main runs this before Typer is loaded")


app.command("compile")(compile_model)
app.command("server")(server)
app.command("device")(device)
app.add_typer(run_app, name="run")
app.add_typer(certs_app, name="certs")
app.add_typer(audit_app, name="audit")
app.add_typer(doctor_app, name="doctor")
app.command("profile")(profile)
app.command("quantize")(quantize)
app.command("methods")(methods)
app.command("demo")(demo)
app.command("version")(version)


def run(arguments: Sequence[str]) -> int:
    """Carry out a command line; returns the exit code.

    Errors become one line on the error stream, unless ``--debug`` asks for the traceback.
    """
    try:
        app(args=list(arguments), prog_name="lorikit")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except Exception as error:
        if _DEBUG in arguments:
            raise
        code, sentence = explain(error)
        typer.echo(f"lorikit: {sentence}", err=True)
        return code
    return ExitCode.OK
