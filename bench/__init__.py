# SPDX-License-Identifier: Apache-2.0
"""Measurements: accuracy tables, and the report of the GPU tests. Run from a checkout."""
