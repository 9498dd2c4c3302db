"""The benchmark suite: what ours and the dense baselines cost, in rows that anybody can measure again. See README.md."""

import os

# PyTorch's profiler, which counts memory here, writes two lines to stderr each time otherwise. Read when torch is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
