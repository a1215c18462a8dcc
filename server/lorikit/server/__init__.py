# SPDX-License-Identifier: Apache-2.0
"""The coordinator: compiles packages, hands out work, aggregates."""
