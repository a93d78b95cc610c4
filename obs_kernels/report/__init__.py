# SPDX-License-Identifier: Apache-2.0
"""Reports of runs: plain dicts in, Markdown, plots and one self-contained HTML page out."""
