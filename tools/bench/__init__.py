"""Measure speed, memory and rounding, of this engine and of its peers."""
