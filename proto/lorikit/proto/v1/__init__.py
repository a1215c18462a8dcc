# SPDX-License-Identifier: Apache-2.0
"""Wire format, version 1: generated from the .proto files beside it, never edited."""
