# SPDX-License-Identifier: Apache-2.0
"""The device: takes part in rounds, trains on its own data, keeps it."""
