#!/usr/bin/env python3
"""Whether configs/recipe.schema.json says of recipes what their parser does.

    python3 -m venv V && V/bin/pip install jsonschema && V/bin/python tests/recipes/schema.py

Holds the committed recipes and good/ against the schema, and bad/, of which it refuses all but those that say
`# schema: passes`: what only the parser can know. `cargo test --test distill` holds the parser to the same files.
"""

import json
import pathlib
import sys
import tomllib

import jsonschema

HERE = pathlib.Path(__file__).resolve().parent
CONFIGS = HERE.parent.parent / "configs"


def main():
    schema = json.loads((CONFIGS / "recipe.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    wrong = 0
    for path in sorted([*CONFIGS.glob("*.toml"), *HERE.glob("*/*.toml")]):
        text = path.read_text()
        try:
            problems = [error.message for error in validator.iter_errors(tomllib.loads(text))]
        except tomllib.TOMLDecodeError as error:
            print(f"ok      {path.name}: no TOML ({error})")
            continue
        expected = path.parent.name == "bad" and "# schema: passes" not in text
        well = bool(problems) == expected
        wrong += not well
        print(f"{'ok' if well else 'FAILED':7} {path.name}: {problems[0] if problems else 'passes'}")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
