"""Records numpy's percentiles of lists of numbers, for src/load/tally.rs.

    python tests/golden/make_percentiles.py

writes percentiles.json beside itself. Needs numpy. Its method "inverted_cdf" is the nearest rank; the lists
hold one number, ties, heavy tails, and lengths around multiples of a hundred.
"""

import json
from pathlib import Path

import numpy as np

random = np.random.default_rng(7)
lists = [random.lognormal(-2, 1.5, n).round(6) for n in (1, 2, 7, 99, 100, 101, 300)]
lists.append(random.integers(0, 5, 60).astype(float))
cases = [
    {
        "values": values.tolist(),
        "percentiles": {
            p: float(np.percentile(values, p, method="inverted_cdf")) for p in (1, 50, 90, 99, 100)
        },
    }
    for values in lists
]
out = Path(__file__).with_name("percentiles.json")
out.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")
