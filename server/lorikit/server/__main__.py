# SPDX-License-Identifier: Apache-2.0
"""``python -m lorikit.server SETTINGS.toml``: a server without the command line's extras."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

from lorikit.server.app import Coordinator, serve
from lorikit.server.config import ServerConfig, read_server_config
from lorikit.server.errors import LorikitError


def main(arguments: list[str]) -> int:
    """Serve until a signal comes; the address is the only line on standard output."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        config = read_server_config(Path(arguments[0])) if arguments else ServerConfig()
        asyncio.run(serve(config, started=_print_address))
    except LorikitError as error:
        print(f"lorikit: {error}", file=sys.stderr)
        return 1
    return 0


def _print_address(coordinator: Coordinator) -> None:
    print(coordinator.address, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
