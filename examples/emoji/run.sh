#!/bin/sh -e
# Train, and measure what the guide promises: tokens saved, emoji per answer, technical terms kept. More words go to train.
cd "$(dirname "$0")"
tunesmith train --config recipe.toml --output-dir run "$@"
tunesmith evaluate run
tunesmith test run
