# SPDX-License-Identifier: Apache-2.0
"""The contract: what a device and the server must agree on, bit for bit."""
