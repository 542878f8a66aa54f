"""The laws, the witness and the planted faults. Start at cases.py, then test_laws.py, then test_teeth.py."""
