# SPDX-License-Identifier: Apache-2.0
"""Every gradient rule that stock onnxruntime can run."""

from __future__ import annotations

from lorikit.server.compile.gradients import convolution, elementwise, norms, products, shapes
from lorikit.server.compile.gradients.parts import Rule

RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **shapes.RULES,
    **products.RULES,
    **norms.RULES,
    **convolution.RULES,
}
"""Gradient rule by operator."""
