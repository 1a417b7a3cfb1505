"""A process that holds a sweep's folder until it is killed."""

import sys
import time
from pathlib import Path


def main() -> None:
    from coldstill.pipeline.sweeps.state import hold_sweep

    with hold_sweep(Path(sys.argv[1])):
        sys.stdout.write("held\n")
        sys.stdout.flush()
        time.sleep(60)
