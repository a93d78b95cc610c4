# SPDX-License-Identifier: Apache-2.0
"""Worked examples of training with pruning: question answering, metric, callback and the demo that ships."""
