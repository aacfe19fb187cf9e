#!/usr/bin/env bash
# Prepares another commit of this repository beside the working tree and runs its command line: what a bench compares with.
#
#   infra/baseline.sh setup             makes the worktree and its virtual environment; prints the directory
#   infra/baseline.sh run ARGUMENTS…    runs that commit's `tessera`, in the caller's directory
#   BASELINE=<commit>                   another commit; 310ca4f (version 1) by default
#
# Both live in infra/.run/baseline-COMMIT and are made once. `tessera bench NAME --against COMMIT` alternates the two.
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")/.."
root=$PWD
commit=${BASELINE:-310ca4f}

usage() { sed -n '2,8s/^# \{0,1\}//p' "$root/infra/baseline.sh" >&2; exit 2; }

full=$(git rev-parse --verify --quiet "$commit^{commit}") || {
  echo "baseline: commit $commit is not in this clone; fetch it (git fetch --unshallow), or set BASELINE to one that is" >&2
  exit 1
}
place=$root/infra/.run/baseline-${full:0:7}

setup() {
  mkdir -p infra/.run
  exec 9>"$place.lock"
  flock 9 # two callers prepare one after the other
  if [ ! -d "$place" ]; then
    git worktree prune
    git worktree add --quiet --detach "$place" "$full"
  fi
  if [ ! -e "$place/.venv/.installed" ]; then
    [ -e "$place/.uv" ] || [ ! -d .uv ] || ln -s "$root/.uv" "$place/.uv"
    (cd "$place" && bash infra/setup.sh) >&2
  fi
  exec 9>&-
}

case ${1:-} in
setup) setup; echo "$place" ;;
run) shift; setup; cd "$caller"; exec env -u PYTHONPATH "$place/.venv/bin/tessera" "$@" ;;
*) usage ;;
esac
