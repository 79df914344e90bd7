#!/usr/bin/env bash
# bash tools/install.sh VENV PYTHON
# Makes the virtual environment VENV with PYTHON and installs this package into it with the versions in constraints.txt.
# Called by `make install`; safe to run again after an interruption.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:-.venv}
python=${2:-python3}
constraints=constraints.txt
cpu_index=https://download.pytorch.org/whl/cpu

say() { printf '[install] %s\n' "$*"; }
fail() {
    printf '[install] error: %s\n' "$*" >&2
    exit 1
}

# Prints the version when `$1` is an interpreter that the locked packages support.
supported_version() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'
}

command -v "$python" >/dev/null || fail "no interpreter '$python'; name one: make install PYTHON=python3.12"
version=$(supported_version "$python") ||
    fail "'$python' is Python ${version:-unknown}; 3.11 or 3.12 is needed. Name one: make install PYTHON=python3.12"

if [ ! -x "$venv/bin/python" ]; then
    say "making $venv with Python $version"
    "$python" -m venv "$venv" || fail "'$python -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv"
fi
supported_version "$venv/bin/python" >/dev/null ||
    fail "$venv holds another Python than 3.11 or 3.12; remove it and run again: rm -rf $venv"

# -qq: errors only. What runs and how long it may take is said here instead.
pip_install() { "$venv/bin/python" -m pip install -qq --disable-pip-version-check "$@"; }

torch_version=$(sed -n 's/^torch==//p' "$constraints")
installed_torch=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true)
if [ "${installed_torch%%+*}" = "$torch_version" ]; then
    say "torch $installed_torch is there already"
elif command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    say "torch $torch_version with CUDA (about 3 GB, some minutes)"
    pip_install "torch==$torch_version"
else
    # torch goes first, so that no other package can draw in the CUDA build with its gigabytes of libraries.
    say "torch $torch_version, CPU build, since nvidia-smi finds no GPU (about 200 MB)"
    pip_install "torch==$torch_version+cpu" 2>/dev/null ||
        pip_install "torch==$torch_version+cpu" --index-url "$cpu_index" --retries 1 --timeout 15 2>/dev/null ||
        {
            say "no CPU build within reach (neither in pip's own indexes nor at $cpu_index);"
            say "taking the default build: it runs on CPU too, but is about 3 GB"
            pip_install "torch==$torch_version"
        }
fi

say "the other packages, locked by $constraints (about 300 MB, a minute or two)"
pip_install -c "$constraints" setuptools wheel
# No build isolation: the setuptools just locked is used, and nothing else is downloaded.
pip_install -c "$constraints" --no-build-isolation -e '.[dev]'
# Its Python code, which the tests run without a GPU; compiled it is the extra `gpu`. On no path: where its library is
# missing, importing it fails, and with it Megatron-Core.
te_version=$(sed -n 's/^transformer-engine==//p' "$constraints")
if [ ! -d "$venv/transformer-engine/transformer_engine-$te_version.dist-info" ]; then
    say "Python code of transformer-engine $te_version, for the tests (1 MB)"
    rm -rf "$venv/transformer-engine"
    pip_install --no-deps --target "$venv/transformer-engine" "transformer-engine==$te_version"
fi
say "done: $("$venv/bin/python" -c 'import torch; from importlib.metadata import version
print("torch", torch.__version__, "· megatron-core", version("megatron-core"), "· transformers", version("transformers"))')"
