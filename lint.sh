#!/usr/bin/env bash
# Format, lint and types. With --fix: reformat and apply ruff's safe fixes first. Every check runs; one failure fails all.
set -u
cd "$(dirname "$0")" || exit 1

case "${1-}" in
  "") ;;
  --fix)
    ruff check --fix-only --quiet .
    ruff format --quiet .
    ;;
  *)
    echo "usage: ./lint.sh [--fix]" >&2
    exit 2
    ;;
esac

failed=0
run() {
  echo "+ $*"
  "$@" || failed=1
}
run ruff format --check .
run ruff check .
run mypy
exit $failed
