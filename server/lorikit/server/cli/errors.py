# SPDX-License-Identifier: Apache-2.0
"""Any error as an exit code and one sentence."""

from __future__ import annotations

import grpc
import pydantic

from lorikit.server.cli import missing_part_sentence
from lorikit.server.cli.exit_codes import OF_REFUSAL, CommandError, ExitCode
from lorikit.server.config import ConfigError
from lorikit.server.config import explain as explain_settings
from lorikit.server.errors import CompileError, LorikitError, RequestError
from lorikit.server.identity.errors import AuthorityError
from lorikit.server.planner import DoesNotFitError


def explain(error: Exception) -> tuple[ExitCode, str]:
    """The exit code and the sentence a user gets for an error."""
    if isinstance(error, CommandError):
        return error.code, str(error)
    if isinstance(error, RequestError):
        return OF_REFUSAL.get(error.code, ExitCode.REFUSED), str(error)
    if isinstance(error, CompileError):
        return ExitCode.MODEL, str(error)
    if isinstance(error, pydantic.ValidationError):
        return ExitCode.CONFIG, explain_settings(error)
    if isinstance(error, ConfigError | AuthorityError):
        return ExitCode.CONFIG, str(error)
    if isinstance(error, DoesNotFitError):
        return ExitCode.DOES_NOT_FIT, str(error)
    if isinstance(error, grpc.RpcError):
        return ExitCode.UNREACHABLE, f"the call failed: {error}"
    if isinstance(error, ModuleNotFoundError) and not _is_ours(error.name):
        return ExitCode.MISSING_PART, missing_part_sentence(error.name or "a module")
    if isinstance(error, FileNotFoundError):
        return ExitCode.NOT_FOUND, f"no such file or folder: {error.filename}"
    if isinstance(error, OSError):
        return ExitCode.STORAGE, f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")
    if isinstance(error, LorikitError):
        return ExitCode.RUN_FAILED, str(error)
    return ExitCode.INTERNAL, f"{type(error).__name__}: {error} (--debug shows where)"


def _is_ours(name: str | None) -> bool:
    return (name or "").partition(".")[0] == "lorikit"
