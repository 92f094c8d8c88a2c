"""Print the shell command of the README that follows the marker `<!-- command: NAME -->`."""

import re
import sys
from pathlib import Path

name = sys.argv[1]
readme = (Path(__file__).parent.parent / "README.md").read_text()
block = re.search(rf"<!-- command: {name} -->\n+```bash\n(.*?)```", readme, re.DOTALL)
if block is None:
    sys.exit(f"README.md: must have a bash block after <!-- command: {name} -->, got none")
print(block[1].strip())
