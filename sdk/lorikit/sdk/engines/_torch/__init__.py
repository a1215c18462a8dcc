# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs executed node by node with torch; only the ``torch`` engine imports this package."""
