#!/bin/sh
set -e
# Train the persona, prove it, and ask it something. More words go to train; ROWS=4 judges four rows, for a try.
cd "$(dirname "$0")"
tunesmith train --config recipe.toml --output-dir run "$@"
tunesmith evaluate run ${ROWS:+--rows $ROWS --samples 0 --weighed $ROWS}
tunesmith chat run --prompt "What makes you unique?"
