#!/usr/bin/env bash
# Runs the tests of the console in a real Chromium. Fetches axe-core, the accessibility checker, from npm into .run once.
set -euo pipefail
cd "$(dirname "$0")/.."
# Tests start many processes; each would compile what it imports again, which takes longer than what it does.
unset PYTHONDONTWRITEBYTECODE

AXE=4.14.1
run=infra/.run/axe
if [ -z "${TESSERA_TEST_CHROMIUM:-}" ]; then
  for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null; then TESSERA_TEST_CHROMIUM=$(command -v "$name"); break; fi
  done
fi
if [ ! -f "$run/node_modules/axe-core/axe.min.js" ] || ! grep -q "\"version\": \"$AXE\"" "$run/node_modules/axe-core/package.json"; then
  command -v npm >/dev/null || { echo "browser.sh: npm is needed to fetch axe-core; install Node.js" >&2; exit 1; }
  mkdir -p "$run"
  npm install --silent --no-audit --no-fund --no-save --no-package-lock --ignore-scripts --prefix "$run" "axe-core@$AXE"
fi
[ -n "${TESSERA_TEST_CHROMIUM:-}" ] || { echo "browser.sh: no Chromium; install it, or set TESSERA_TEST_CHROMIUM to one" >&2; exit 1; }
export TESSERA_TEST_CHROMIUM TESSERA_TEST_AXE="$PWD/$run/node_modules/axe-core/axe.min.js"
exec .venv/bin/python -m pytest tests/browser "$@"
