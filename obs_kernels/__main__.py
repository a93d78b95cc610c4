# SPDX-License-Identifier: Apache-2.0
"""``python -m obs_kernels`` is ``obs-kernels doctor``."""

import sys

from obs_kernels.cli import main

if __name__ == "__main__":
    main(["doctor", *sys.argv[1:]])
