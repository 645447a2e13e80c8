#!/bin/sh
set -e
# Train, and measure what the guide promises: tokens saved, emoji per answer, technical terms kept. More words go to train; ROWS=4 judges four rows and asks for short answers, for a try.
cd "$(dirname "$0")"
tunesmith train --config recipe.toml --output-dir run "$@"
tunesmith evaluate run ${ROWS:+--rows $ROWS --samples 0 --weighed $ROWS}
tunesmith test run ${ROWS:+--max-tokens 8}
