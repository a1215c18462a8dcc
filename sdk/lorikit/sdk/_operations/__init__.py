# SPDX-License-Identifier: Apache-2.0
"""Operations a plan may name: one a file, pure functions."""
