"""The check of devices and network before a restart: the script that every rank runs, and its exit codes.

The script needs torch and so lives on a higher floor; deepy.py knows it by its path. Standard library only.
"""

from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "engine" / "node_check.py"
# What a rank could not do. In this order: each needs those before it.
CANNOT_COMPUTE, CANNOT_CONNECT, CANNOT_TALK = 3, 4, 5
# The phases of its heartbeats.
MULTIPLYING, TALKING = "multiplying", "talking"
# A rank that cannot reach rank 0 says so before those that wait for it give up.
CONNECT_SECONDS, TALK_SECONDS = 30, 90
