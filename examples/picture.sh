#!/usr/bin/env bash
# For a person who wants a picture: eight tries at one anagram, each with its two views side by side.
set -euo pipefail
mtl-anagram generate "a tree" "a house plant" --views identity rotate_180 --style "a poster of" --seed 0-7
