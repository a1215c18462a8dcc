# SPDX-License-Identifier: Apache-2.0
"""Where runs, rounds, updates and artefacts are kept."""
