# SPDX-License-Identifier: Apache-2.0
"""Errors on the command line name the options that were typed, not the arguments behind them."""

from __future__ import annotations

import pytest

pytest.importorskip("typer")

from obs_kernels.cli_files import compress
from obs_kernels.cli_prune import prune
from obs_kernels.cli_words import in_option_words


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("measure=True needs tokens, got None", "--measure needs tokens, got None"),
        ("say dtype='bf16', or max_shard_size.", "say --dtype bf16, or --max-shard-size."),
        ("out 'measure=True' in /measure=1/max_shard_size", "out 'measure=True' in /measure=1/max_shard_size"),
        ("unknown key 'max_shard_size'; a.max_shard_size", "unknown key 'max_shard_size'; a.max_shard_size"),
        ("verify=None, backend='cuda'", "verify=None, backend='cuda'"),
    ],
)
def test_options_of_compress(text: str, wanted: str) -> None:
    assert in_option_words(text, compress) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("use sequential=False, or overwrite=False", "use --no-sequential, or no --overwrite"),
        ("set global_sparsity=False, lower fisher_block_size", "set --no-global, lower --fisher-block-size"),
        ("or on_unsupported='pad' or 'skip'; x", "or --on-unsupported pad or skip; x"),
        ("passes = 3 with damp=0.5; raise damp", "--passes 3 with --damp 0.5; raise damp"),
        ("num_grads must be 1, got 0", "--num-grads must be 1, got 0"),
    ],
)
def test_options_of_prune(text: str, wanted: str) -> None:
    assert in_option_words(text, prune) == wanted
