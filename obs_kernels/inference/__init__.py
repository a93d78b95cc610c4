# SPDX-License-Identifier: Apache-2.0
"""Whole models measured: sparse against the best dense, and what the kernels alone let expect."""
