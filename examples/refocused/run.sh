#!/bin/sh -e
# One recipe for each task, each with the metrics of its task. More words go to train.
cd "$(dirname "$0")"
for task in chat code instruct domain; do
  tunesmith train --config $task.toml --output-dir runs/$task "$@"
  tunesmith evaluate runs/$task
done
tunesmith train --config custom.toml --output-dir runs/custom "$@"
tunesmith evaluate runs/custom --metric 're:\d+ (am|pm)'
