# shellcheck shell=bash
# Finds or makes the Python environment of this checkout. Sourced by run_train.sh, tests/run.sh and .ci/run, which set ROOT,
# the absolute path of the checkout, and run under `set -euo pipefail`. `prepare_python` sets PYTHON.
#
# A .venv made here holds the file titanmoe-env: "installing" while it is being filled, and afterwards a hash of what was
# installed. An interrupted installation is thus told from a finished one, and a changed list of dependencies from an old one.

say() { printf 'titanmoe: %s\n' "$*" >&2; }

fail() { # CODE TEXT...
    local code=$1
    shift
    say "$@"
    exit "$code"
}

# prepare_python EXTRA DISTRIBUTION...: set PYTHON to an interpreter that has these distributions. One on PATH is used as
# it is; otherwise .venv is made or brought up to date, with the optional dependencies EXTRA ("run" for none).
prepare_python() {
    local extra=$1 hash
    shift
    VENV=$ROOT/.venv
    if PYTHON=$(installed_python "$@"); then return; fi
    PYTHON=$VENV/bin/python
    if [ -d "$VENV" ] && [ ! -e "$VENV/titanmoe-env" ]; then
        has_distributions "$PYTHON" "$@" && return
        fail 2 "$VENV was not made by this script and lacks one of: $*. Install it there with" \
            "'.venv/bin/python -m pip install -e \"$ROOT[dev]\" -c constraints.txt', or remove the folder."
    fi
    hash=$({ printf '%s\n' "$ROOT"; cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt"; } | cksum | tr ' ' -)
    is_finished "$hash" "$extra" && return
    [ -w "$ROOT" ] || fail 2 "cannot make $VENV: the folder is not writable. Copy the checkout to one that is."
    if command -v flock >/dev/null; then
        exec 9>"$ROOT/.venv.lock"
        if ! flock -n 9; then
            say "another start is installing into $VENV: waiting for it"
            flock 9
        fi
    fi
    is_finished "$hash" "$extra" || install_titanmoe "$hash" "$extra"
    exec 9>&-
}

is_finished() { # HASH EXTRA: what was installed for "dev" also runs
    local state
    state=$(cat "$VENV/titanmoe-env" 2>/dev/null) || return 1
    [ "$state" = "$1 $2" ] || [ "$state" = "$1 dev" ] || return 1
    "$PYTHON" -c '' 2>/dev/null # its base interpreter may be gone
}

installed_python() { # DISTRIBUTION...
    local name path
    for name in "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" python python3; do
        path=$(command -v "${name:-none}") || continue
        [ "$(dirname "$path")" -ef "$VENV/bin" ] && continue # ours: its own state decides
        has_distributions "$path" "$@" || continue
        printf '%s\n' "$path"
        return
    done
    return 1
}

# Asked from / for what is installed: in the current folder a checkout would look like an installation.
has_distributions() { # PYTHON DISTRIBUTION...
    local python=$1
    shift
    (cd / && "$python" -c '
import importlib.metadata, sys
for name in sys.argv[1:]:
    importlib.metadata.version(name)
sys.exit(sys.version_info < (3, 10))
' "$@") 2>/dev/null
}

# The first interpreter on PATH that is new enough and can make environments; not the one inside .venv, which may be remade.
base_python() {
    local name path version="" lacking=""
    for name in python3 python python3.13 python3.12 python3.11 python3.10 python3.14; do
        while IFS= read -r path; do
            [ "$(dirname "$path")" -ef "$VENV/bin" ] && continue
            version=$("$path" -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 10))' \
                2>/dev/null) || continue
            if "$path" -c 'import ensurepip, venv' 2>/dev/null; then
                printf '%s\n' "$path"
                return
            fi
            lacking=${lacking:-"$path, which lacks the modules venv and ensurepip. On Debian and Ubuntu: apt install python$version-venv"}
        done < <(type -aP "$name")
    done
    [ -z "$lacking" ] || fail 2 "found $lacking"
    fail 2 "found no Python 3.10 or newer (tried python3, python and python3.10 to 3.14 on PATH)." \
        "Install one; on Debian and Ubuntu: apt install python3 python3-venv"
}

install_titanmoe() { # HASH EXTRA
    local hash=$1 extra=$2 base state started=$SECONDS target=$ROOT
    state=$(cat "$VENV/titanmoe-env" 2>/dev/null) || true
    case $state in *" dev") extra=dev ;; esac
    [ "$extra" = run ] || target="$ROOT[$extra]"
    if [ "$state" = installing ]; then
        say "an earlier installation was interrupted: starting it anew"
    fi
    # Packages that were being unpacked look installed, so nothing of an interrupted installation is kept.
    if [ ! -e "$VENV" ] || [ "$state" = installing ] || ! "$PYTHON" -c '' 2>/dev/null; then
        base=$(base_python) || exit
        say "making $VENV with $("$base" --version 2>&1), and installing titanmoe into it (some minutes, once)"
        rm -rf "$VENV"
        mkdir "$VENV"
        echo installing >"$VENV/titanmoe-env"
        "$base" -m venv "$VENV" || fail 1 "'$base -m venv' failed"
    else
        say "what titanmoe needs has changed: bringing $VENV up to date"
        echo installing >"$VENV/titanmoe-env"
    fi
    pip_install "pip>=22" # the first that can make the editable installation; no network where it is there
    pip_install --editable "$target" --constraint "$ROOT/constraints.txt"
    echo "$hash $extra" >"$VENV/titanmoe-env"
    say "installed in $((SECONDS - started)) s; pip's own report is in .venv/install.log"
}

# pip's full report goes to a file; what takes time goes to the screen.
pip_install() {
    if ! "$PYTHON" -m pip install --progress-bar off --no-color "$@" 2>&1 | tee -a "$VENV/install.log" | show_progress; then
        tail -n 20 "$VENV/install.log" >&2
        fail 1 "the installation failed; the lines above are the end of $VENV/install.log. The next start tries again."
    fi
}

show_progress() { # a line such as "  Downloading torch-2.13.0-cp312-...whl (915.3 MB)" becomes "torch 2.13.0 (915.3 MB)"
    local verb file size name version
    while read -r verb file size; do
        case "$verb $size" in
            "Downloading ("*[MG]B\))
                IFS=- read -r name version _ <<<"$file"
                say "  downloading $name $version $size"
                ;;
            "Installing packages: "*) say "  unpacking" ;;
        esac
    done
}
