# SPDX-License-Identifier: Apache-2.0
"""The demo: a real server and twelve real device processes on one machine."""
