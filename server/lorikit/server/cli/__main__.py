# SPDX-License-Identifier: Apache-2.0
"""``python -m lorikit.server.cli``: the command ``lorikit`` where it is not on the path."""

from __future__ import annotations

from lorikit.server.cli import main

if __name__ == "__main__":
    main()
