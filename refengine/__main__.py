"""Run the command line: python -m refengine."""

import os

try:
    from refengine.cli import main

    main()
except KeyboardInterrupt:  # before the command line could print anything
    os._exit(130)
