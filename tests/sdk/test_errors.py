# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
import subprocess
import sys

import lorikit.sdk
from lorikit.sdk import _errors
from lorikit.sdk._errors import LorikitError, RefusedError


def test_tree_in_the_docstring_is_the_tree_in_the_code() -> None:
    drawn = re.findall(r"^([│├└─ ]*)(\w+Error)\b", _errors.__doc__ or "", flags=re.MULTILINE)
    defined = {n for n, kind in vars(_errors).items() if isinstance(kind, type) and n[0] != "_"}

    assert {name for _, name in drawn} == {n for n in defined if n.endswith("Error")}
    parents = {0: LorikitError}
    for indent, name in drawn[1:]:
        depth = len(indent) // 4
        kind = getattr(_errors, name)
        assert kind.__bases__ == (parents[depth - 1],)
        parents[depth] = kind


def test_refusal_carries_reason_and_remedy() -> None:
    error = RefusedError("It does not fit.", "Allow 20 MB more.")

    assert (error.reason, error.remedy) == ("It does not fit.", "Allow 20 MB more.")
    assert str(error) == "It does not fit. Allow 20 MB more."


def test_public_names_are_sorted_and_are_all_a_user_sees() -> None:
    visible = {
        name
        for name, value in vars(lorikit.sdk).items()
        if not name.startswith("_") and not isinstance(value, type(sys))
    }

    assert lorikit.sdk.__all__ == sorted(lorikit.sdk.__all__)
    assert set(lorikit.sdk.__all__) == visible - {"annotations"}


def test_every_error_is_public() -> None:
    names = {n for n, kind in vars(_errors).items() if isinstance(kind, type)}

    assert {n for n in names if n.endswith("Error")} <= set(lorikit.sdk.__all__)


def test_importing_the_sdk_loads_no_engine() -> None:
    heavy = ("onnxruntime", "tokenizers", "torch", "transformers", "lorikit.server", "onnx")
    code = f"import sys, lorikit.sdk; print([m for m in {heavy} if m in sys.modules])"

    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert out.stdout == "[]\n"
