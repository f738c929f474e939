#!/usr/bin/env bash
# For a person who wants a picture: eight tries at one anagram, two views each.
set -euo pipefail
mtl-anagram generate "a snowman" "a skull" --views identity rotate_180 --style "a sketch of" --seed 0-7 --out output
