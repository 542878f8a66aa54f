"""python -m refengine"""

import os

try:
    from refengine.cli import main

    main()
except KeyboardInterrupt:  # before there was anyone to say it to
    os._exit(130)
