# SPDX-License-Identifier: Apache-2.0
"""``lorikit version``: what is installed."""

from __future__ import annotations

import platform
from importlib import metadata

from lorikit.proto.limits import PROTOCOL_VERSION
from lorikit.proto.plan import PLAN_VERSION
from lorikit.server.cli.display import Format, FormatOption, print_json, print_table

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "onnx", "onnxruntime", "grpcio")


def version(output: FormatOption = Format.TEXT) -> None:
    """Show the versions of Lorikit, its wire formats and the libraries it stands on.

    Example: lorikit version --format json
    """
    facts: dict[str, object] = {
        "lorikit": metadata.version("lorikit"),
        "protocol": PROTOCOL_VERSION,
        "plan": PLAN_VERSION,
        "python": platform.python_version(),
        "platform": f"{platform.system().lower()}-{platform.machine()}",
        "packages": {name: _installed(name) for name in _PACKAGES},
    }
    if output is Format.JSON:
        print_json(facts)
        return
    packages = [(name, _installed(name) or "not installed") for name in _PACKAGES]
    plain = [(name, value) for name, value in facts.items() if name != "packages"]
    print_table(("part", "version"), [*plain, *packages])


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
