"""Print the first Python example of the README that stands by itself: it imports torch and prints something."""

import re
import sys
from pathlib import Path

readme = (Path(__file__).parent.parent / "README.md").read_text()
blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
alone = next((block for block in blocks if "import torch" in block and "\nprint(" in block), None)
if alone is None:
    sys.exit("README.md: must have a Python block that imports torch and prints, got none")
print(alone.strip())
