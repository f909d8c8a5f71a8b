#!/usr/bin/env python3
"""Runs the scenarios beside this file against one program, for a given time.

A scenario is a module with `cases(world)`, which yields pairs of a name and a function. A function that raises
AssertionError is a promise broken. It is tried once more before it counts, since some promises are about time, and a
machine can be busy with something else; that is said. Every scenario has an equal part of the time that is left when it begins; the order
of its cases depends on the seed, and those that are left when its time is over are said to be.
"""

import argparse
import importlib
import pathlib
import random
import signal
import sys
import tempfile
import time
import traceback

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from world import World  # noqa: E402

# Failures of a scenario that are printed; one fault has many.
SHOWN = 12
SCENARIOS = [
    "hostile_files",
    "signals",
    "sockets",
    "origins",
    "kills",
    "shared_folders",
    "full_disks",
    "blocked_logs",
    "abandoned_loads",
    "swaps",
    "damaged_experiments",
    "flag_values",
    "fuzzed_requests",
]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", required=True)
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    chosen = [name for name in SCENARIOS if not options.only or name in options.only.split(",")]
    unknown = set(filter(None, options.only.split(","))) - set(SCENARIOS)
    if unknown or options.minutes <= 0:
        parser.error(f"no scenario {sorted(unknown)}; there are {SCENARIOS}" if unknown else "--minutes must be above 0")
    program = pathlib.Path(options.program).resolve()
    # A shell that runs this in the background has it ignored, and what is started here would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    passed, failed = 0, 0
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        world = World(program, pathlib.Path(folder))
        # What scenarios stand on, such as the tiny models, is no part of the time.
        end = time.monotonic() + 60 * options.minutes
        for index, name in enumerate(chosen):
            world.random = random.Random(f"{options.seed} {name}")
            share = (end - time.monotonic()) / (len(chosen) - index)
            good, bad = run(world, name, time.monotonic() + share)
            passed += good
            failed += bad
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


def run(world, scenario, end):
    """One scenario until `end`; how many cases held, and how many did not. One case always runs."""
    began = time.monotonic()
    passed, failed, again, left = 0, [], [], 0
    cases = importlib.import_module(scenario).cases(world)
    try:
        for case, check in cases:
            if passed + len(failed) and time.monotonic() >= end:
                left += 1
                continue
            problem = broken(case, check)
            if problem:
                again.append(problem)
                problem = broken(case, check)
            if problem:
                failed.append(problem)
                again.pop()
            else:
                passed += 1
    except Exception as problem:
        failed.append(f"its cases could not be made: {one_line(problem)}")
    finally:
        cases.close()
    later = f", {left} left for a longer round" if left else ""
    print(f"{scenario}: {passed} held, {len(failed)} did not{later}; {time.monotonic() - began:.0f} s", flush=True)
    for problem in again:
        print(f"  held when it was tried again: {problem}")
    for failure in failed[:SHOWN]:
        print(f"  failed: {failure}")
    if len(failed) > SHOWN:
        print(f"  and {len(failed) - SHOWN} more")
    return passed, len(failed)


def broken(case, check):
    """What a case says was not as promised; nothing where all was."""
    try:
        check()
    except Exception as problem:
        where = traceback.extract_tb(problem.__traceback__)[-1]
        place = f"{pathlib.Path(where.filename).name}:{where.lineno}"
        return f"{case}: {one_line(problem)} ({place})"
    return None


def one_line(problem):
    text = " ".join(str(problem).split()) or "no words"
    kind = "" if isinstance(problem, AssertionError) else f"{type(problem).__name__}: "
    return kind + (text if len(text) <= 400 else f"{text[:200]} … {text[-200:]}")


if __name__ == "__main__":
    main()
