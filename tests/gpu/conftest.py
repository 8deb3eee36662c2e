import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "numerics"))  # the checks that are the same on a GPU
