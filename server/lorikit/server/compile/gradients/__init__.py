# SPDX-License-Identifier: Apache-2.0
"""Reverse-mode differentiation of a graph.

Only what lies between the trained tensors and the loss is differentiated, so backward stops at the
lowest trained layer by itself. Each operator has one rule that emits the vector-Jacobian product
with operators of stock onnxruntime; a rule reads forward values by name, and what no rule reads is
free to be released. So a rule reads as little as it can: what is cheap to compute again from an
input that lives on anyway is computed again, masks are kept as one byte a value, and lengths come
from the graph's inputs instead of the values that have them.
"""

from __future__ import annotations

from lorikit.server.compile.gradients.norms import layer_norm_statistics
from lorikit.server.compile.gradients.parts import Rule
from lorikit.server.compile.gradients.reverse import add_gradients
from lorikit.server.compile.gradients.rules import RULES

__all__ = ["RULES", "Rule", "add_gradients", "layer_norm_statistics"]
