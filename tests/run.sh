#!/usr/bin/env bash
# Installs what the tests need if it is missing, and runs pytest with the arguments given: tests/run.sh tests/config -x
set -euo pipefail
unset CDPATH
ROOT=$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# shellcheck source=scripts/python_env.sh
. "$ROOT/scripts/python_env.sh"
prepare_python dev titanmoe torch torchao pytest pytest-xdist transformers peft

cd "$ROOT"
exec "$PYTHON" -m pytest --numprocesses 2 --dist loadfile "$@"
