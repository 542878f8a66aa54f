"""Cases, comparisons, planted faults and processes that the tests share. Start at cases.py."""
