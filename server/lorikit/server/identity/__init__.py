# SPDX-License-Identifier: Apache-2.0
"""Who may come in, what they may do, and the log of it."""
