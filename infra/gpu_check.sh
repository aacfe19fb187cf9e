#!/usr/bin/env bash
# Checks and measures Tessera on a machine with an NVIDIA card. Ends within seven minutes.
#
#   infra/gpu_check.sh [PART…]     parts: versions tests training-speed semantic-ids encoders; all by default
#   DEVICE=cpu                     runs the parts without a card, at small sizes
#   OUT=folder                     folder of the JSON files and the log, out/gpu by default
#   PYTHON=path                    interpreter, .venv/bin/python or python3 by default
#
# Each part has its own time limit, and a failed part does not stop the others. Exit 1 if a part failed.
set -uo pipefail
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda}
out=${OUT:-out/gpu}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
mkdir -p "$out"
export PYTHONUNBUFFERED=1

versions() {
  "$python" - "$device" "$out/versions.json" <<'PYTHON'
import json, sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from features.device import missing_part, resolve

def found(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None

names = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "numpy", "polars", "faiss-cpu")
about = {"python": sys.version.split()[0], **{name: found(name) for name in names}, "missing": missing_part()}
about |= dict(resolve(sys.argv[1]).about)
Path(sys.argv[2]).write_text(json.dumps(about))
print(json.dumps(about, indent=1))
PYTHON
}

tests() {
  "$python" -m pytest -o filterwarnings=default -W ignore -p no:cacheprovider --basetemp "$(mktemp -d)/t" -ra tests/gpu
}

training-speed() {
  local size=(--rows 3000000)
  [ "$device" = cuda ] || size=(--rows 20000 --small)
  "$python" -m tessera.bench.device.training "$out" --device "$device" "${size[@]}"
}

semantic-ids() {
  local size=()
  [ "$device" = cuda ] || size=(--fitted 3000 --coded 5000 --steps 40)
  "$python" -m tessera.bench.device.codebook "$out" --device "$device" "${size[@]}"
}

encoders() {
  local size=()
  [ "$device" = cuda ] || size=(--texts 60)
  "$python" -m tessera.bench.device.encoders "$out" --device "$device" "${size[@]}"
}

limit_s() { case $1 in versions) echo 40 ;; tests) echo 80 ;; training-speed) echo 150 ;; semantic-ids) echo 85 ;; encoders) echo 60 ;; esac; }

# A part runs again as a child of its own, because `timeout` starts programs and no functions.
if [ "${1:-}" = --part ]; then
  "$2"
  exit
fi
parts=("$@")
[ $# -gt 0 ] || parts=(versions tests training-speed semantic-ids encoders)
failed=()
for part in "${parts[@]}"; do
  limit=$(limit_s "$part")
  [ -n "$limit" ] || { echo "gpu_check: no part $part; expected versions, tests, training-speed, semantic-ids, encoders" >&2; exit 2; }
  began=$SECONDS
  timeout --kill-after=5 "${LIMIT_S:-$limit}" bash "infra/gpu_check.sh" --part "$part" 2>&1 | tee -a "$out/gpu_check.log"
  status=${PIPESTATUS[0]}
  rm -f "$out"/*.parquet # a bench reads its examples from here; they are no result
  [ "$status" = 0 ] || failed+=("$part (exit $status)")
  echo "gpu_check: $part took $((SECONDS - began)) s, exit $status"
done
[ ${#failed[@]} = 0 ] || { echo "gpu_check: failed: ${failed[*]}"; exit 1; }
