# SPDX-License-Identifier: Apache-2.0
"""Profile and memory model -> precision, rank, depth, micro-batch."""
