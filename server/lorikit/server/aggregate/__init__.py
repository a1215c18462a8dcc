# SPDX-License-Identifier: Apache-2.0
"""The few primitives that methods share: pure functions of arrays, summed in float64."""
