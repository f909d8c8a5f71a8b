"""Records what statsmodels and scipy make of tallies of votes, for src/experiments.

    python tests/golden/make_preference.py

writes preference.json beside itself. Needs statsmodels and scipy. `ln_ratio` is the logarithm of the
likelihood of the votes under a preference that is uniform on (0, 1), divided by that under one half.
"""

import json
import math
from pathlib import Path

import scipy
import statsmodels
from scipy.special import betaln
from statsmodels.stats.proportion import proportion_confint


def case(wins, losses):
    votes = wins + losses
    return {
        "wins": wins,
        "losses": losses,
        "wilson": [float(end) for end in proportion_confint(wins, votes, 0.05, "wilson")],
        "ln_ratio": float(betaln(wins + 1, losses + 1) + votes * math.log(2)),
    }


tallies = [(1, 0), (0, 1), (1, 1), (5, 0), (0, 5), (7, 3), (3, 7), (40, 60), (512, 488), (100_000, 99_000)]
report = {
    "scipy": scipy.__version__,
    "statsmodels": statsmodels.__version__,
    "cases": [case(*tally) for tally in tallies],
}
(Path(__file__).parent / "preference.json").write_text(json.dumps(report, indent=1) + "\n")
