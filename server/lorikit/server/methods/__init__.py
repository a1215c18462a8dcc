# SPDX-License-Identifier: Apache-2.0
"""Federated methods: one a file."""
