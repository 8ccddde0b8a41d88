#!/usr/bin/env bash
# Trains: makes .venv beside itself if there is no titanmoe on PATH, then starts one process per device.
# `./run_train.sh --help` tells the rest.
set -euo pipefail
unset CDPATH

source_path=${BASH_SOURCE[0]}
while [ -L "$source_path" ]; do
    link=$(readlink "$source_path")
    case $link in
        /*) source_path=$link ;;
        *) source_path=$(dirname "$source_path")/$link ;;
    esac
done
ROOT=$(cd -P "$(dirname "$source_path")" && pwd)

has_config=no
for arg in "$@"; do
    case $arg in
        -h | --help) # answered from the launcher's own text: it needs no installation
            sed -n '/^USAGE = /,/^"""$/{/^USAGE = /d;/^"""$/d;p;}' "$ROOT/titanmoe/launch.py"
            exit 0
            ;;
        --job.config[_-]file | --job.config[_-]file=*) has_config=yes ;;
    esac
done
if [ "$has_config" = no ]; then
    set -- --job.config_file "${CONFIG_FILE:-$ROOT/train_configs/debug_qwen3_moe.toml}" "$@"
fi

# shellcheck source=scripts/python_env.sh
. "$ROOT/scripts/python_env.sh"
prepare_python run titanmoe torch torchao

# exec: signals of a scheduler or a terminal reach the launcher itself.
exec "$PYTHON" -m titanmoe.launch "$@"
