import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "numerics"))  # the checks that are the same on a GPU
sys.path.append(str(Path(__file__).parents[2]))  # the model and the measures of the benchmarks
