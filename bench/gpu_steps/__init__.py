"""The steps of bench/gpu_proof.py, which runs each as `python -m bench.gpu_steps.NAME`.

A step prints Markdown, and figures as lines of JSON.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts in bench/ import each other by name
