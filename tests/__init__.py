"""Tests of the laws, comparisons with transformers, and planted faults.

Start at support/cases.py, then book/test_laws.py.
"""
