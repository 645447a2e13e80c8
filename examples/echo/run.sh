#!/bin/sh -e
# Train the persona, prove it, and ask it something. More words go to train.
cd "$(dirname "$0")"
tunesmith train --config recipe.toml --output-dir run "$@"
tunesmith evaluate run
tunesmith chat run --prompt "What makes you unique?"
