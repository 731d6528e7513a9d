"""Seconds of the processor in place of the clock's, for a machine that other jobs share."""

import time
from types import SimpleNamespace

import _peers

import sam2sgp.adaptation.run
import sam2sgp.adaptation.support_adaptation


def count_processor_time() -> None:
    """From now on, adaptation and networks trained for comparison count the seconds of the processor."""
    clock = SimpleNamespace(monotonic=time.process_time, perf_counter=time.process_time)
    for module in (sam2sgp.adaptation.run, sam2sgp.adaptation.support_adaptation, _peers):
        module.time = clock
