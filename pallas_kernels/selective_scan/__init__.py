"""Mamba's selective scan (arXiv 2312.00752): a diagonal recurrence whose step size, writes and reads depend on x."""

from pallas_kernels.selective_scan.api import (
    IMPLEMENTATIONS,
    selective_scan,
    selective_scan_step,
    selective_scan_support,
)

__all__ = ["IMPLEMENTATIONS", "selective_scan", "selective_scan_step", "selective_scan_support"]
