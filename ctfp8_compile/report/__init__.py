"""What became of each FP8 weight: as data, as text, as a picture."""

from .report import Entry, Ran, Report

__all__ = ["Entry", "Ran", "Report"]
