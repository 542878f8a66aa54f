"""Build the documentation into build/site; exit 1 on a broken link.

`python -m tools.site` needs MkDocs Material: pip install -e '.[docs]'.
"""

import os
import subprocess
import sys
from pathlib import Path

CONFIG = Path(__file__).with_name("mkdocs.yml")
COMMAND = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", CONFIG]
sys.exit(subprocess.run(COMMAND, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}).returncode)
