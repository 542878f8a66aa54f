"""Programs for those who work on refengine: not installed. `python -m tools.write.book`, ...

tiny    trains and measures the embedded model      cuda    emulator, compile checks, rooflines
bench   measures speed, memory and rounding         write   the book, random checkpoints, a real vocabulary
"""
