"""What all tests share: one thread per process, as several processes share the cores."""

import os

# before torch is imported; with more threads than free cores, small matrices take ten times as long
os.environ.setdefault("OMP_NUM_THREADS", "1")
