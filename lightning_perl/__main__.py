"""``python -m lightning_perl``."""

import os

# Before torch is loaded: its threads sleep instead of spinning while they wait for each other. A small
# model on a few shared cores is many times slower otherwise.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from lightning_perl.cli import run

if __name__ == "__main__":
    run()
