#!/usr/bin/env bash
# Chromium and its driver, with which the tests of the report page open it: Debian's packages. `make browser` calls it.
set -euo pipefail
if command -v chromium > /dev/null && command -v chromedriver > /dev/null; then
    exit 0
fi
ROOT=()
if (( EUID != 0 )); then
    ROOT=(sudo)
fi
"${ROOT[@]}" apt-get update -q
"${ROOT[@]}" apt-get install -q -y --no-install-recommends chromium chromium-driver
