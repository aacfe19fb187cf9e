#!/usr/bin/env bash
# Builds Prism, Beam's engine for one machine, once. A job starts it by itself: tessera features D.toml --runner prism
set -euo pipefail
cd "$(dirname "$0")/.."
command -v go >/dev/null || { echo "prism.sh: go is not on the PATH; install Go 1.24 or newer" >&2; exit 1; }
version=$(.venv/bin/python -c 'import apache_beam; print(apache_beam.__version__)' 2>/dev/null)
[ -x infra/prism/.run/prism ] || GOBIN="$PWD/infra/prism/.run" go install "github.com/apache/beam/sdks/v2/go/cmd/prism@v$version"
echo "prism.sh: infra/prism/.run/prism"
