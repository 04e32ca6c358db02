#!/usr/bin/env bash
# Makes the peers' environments beside this file. PYTHON_SPU and PYTHON_CRYPTEN name interpreters; else the first that is found.
set -euo pipefail
cd "$(dirname "$0")"

# Prints the path of the first Python of these versions that runs: on the PATH, of pyenv, or of uv, which may fetch one.
python() {
    local version found
    for version in "$@"; do
        for found in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/python; do
            if "$found" -c 'import ensurepip' 2>/dev/null; then
                echo "$found"
                return
            fi
        done
        if command -v uv >/dev/null && found=$(uv python find "$version" 2>/dev/null || { uv python install -q "$version" && uv python find "$version"; }); then
            echo "$found"
            return
        fi
    done
    echo "no Python $* was found: install one (pyenv install $1) or name it in PYTHON_SPU or PYTHON_CRYPTEN" >&2
    return 1
}

spu=${PYTHON_SPU:-$(python 3.10 3.11)}
"$spu" -m venv --clear .venv-spu
.venv-spu/bin/pip install --quiet -r requirements-spu.txt
.venv-spu/bin/python -c 'import spu, jax' && echo "SPU is ready"

crypten=${PYTHON_CRYPTEN:-$(python 3.9)}
"$crypten" -m venv --clear .venv-crypten
.venv-crypten/bin/pip install --quiet -r requirements-crypten.txt
.venv-crypten/bin/pip install --quiet --no-deps crypten==0.4.1
.venv-crypten/bin/python -c 'import crypten' && echo "CrypTen is ready"
