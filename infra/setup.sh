#!/usr/bin/env bash
# Makes .venv from the hashed lock. Needs Python 3.11 alone; uv is fetched into .uv where there is none.
#   TORCH_BACKEND=cpu   takes the small CPU-only build of torch, from an index of its own that must be reachable.
set -euo pipefail
cd "$(dirname "$0")/.."

uv=$(command -v uv || true)
if [ -z "$uv" ]; then
  uv=.uv/bin/uv
  if [ ! -x "$uv" ]; then
    echo "setup: fetching uv into .uv"
    python3 -m pip install --quiet --disable-pip-version-check --target .uv uv 2>/dev/null ||
      { python3 -m venv .uv && .uv/bin/pip install --quiet --disable-pip-version-check uv; } ||
      { echo "setup: uv could not be installed; install pip for python3, or uv itself, and try again" >&2; exit 1; }
  fi
fi

[ -x .venv/bin/python ] || "$uv" venv --quiet --python 3.11 .venv
if [ -n "${TORCH_BACKEND:-}" ]; then
  # Another build of torch has other hashes, so here the lock only says the versions.
  sed -e 's/ *\\$//' -e '/^ *--hash/d' -e '/^ *#/d' -e '/^nvidia-/d' -e '/^triton/d' requirements.txt >.venv/versions.txt
  "$uv" pip install --quiet --python .venv/bin/python --torch-backend "$TORCH_BACKEND" -r .venv/versions.txt
else
  "$uv" pip sync --quiet --python .venv/bin/python requirements.txt
fi
"$uv" pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
# Compiles what the commands import: the first of them then starts as fast as the others.
env -u PYTHONDONTWRITEBYTECODE .venv/bin/python -W ignore -c \
  'import mlflow.store.tracking.sqlalchemy_store, features.content.lsa, features.jobs.beam, serving.api.app, streaming.log.kafka, tessera.stream_service, tessera.pipeline.run, tessera.pages.console.app, uvicorn' \
  >/dev/null 2>&1 || echo "setup: something cannot be imported; \`tessera doctor\` says what" >&2
touch .venv/.installed
