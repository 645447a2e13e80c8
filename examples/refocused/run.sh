#!/bin/sh
set -e
# One recipe for each task, each with the metrics of its task. More words go to train; ROWS=4 judges four rows, for a try.
cd "$(dirname "$0")"
for task in chat code instruct domain; do
  tunesmith train --config $task.toml --output-dir runs/$task "$@"
  tunesmith evaluate runs/$task ${ROWS:+--rows $ROWS --samples 0 --weighed $ROWS}
done
tunesmith train --config custom.toml --output-dir runs/custom "$@"
tunesmith evaluate runs/custom ${ROWS:+--rows $ROWS --samples 0 --weighed $ROWS} --metric 're:\d+ (am|pm)'
