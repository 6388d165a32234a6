#!/usr/bin/env bash
# Builds MinkowskiEngine 0.5.4 for the CPU, for `engine=minkowski`, and installs it into a Python that has torch.
#
#   PYTHON=.venv/bin/python launch/install_minkowski.sh
#
#   PYTHON     the interpreter to install it into (python)
#   MAX_JOBS   compilers that run at once, of up to 2 GB each (ninja's choice: the cores and two more)
#   WHEELS     where the built wheel is kept for the next environment, by versions of torch and Python
#              (~/.cache/fcmae/minkowski)
#
# PyPI has the sources of 2021 alone: they compile in some minutes, and import on Python 3.10 and newer only after
# a few lines are corrected. An installed MinkowskiEngine, such as your own build for CUDA, is corrected but not
# replaced. It takes a C++ compiler, Python's headers and OpenBLAS; as root on Debian or Ubuntu they are
# installed as well.
set -euo pipefail

VERSION=0.5.4
python=${PYTHON:-python}
wheels=${WHEELS:-${XDG_CACHE_HOME:-$HOME/.cache}/fcmae/minkowski}

fail() {
    echo "install_minkowski.sh: $*" >&2
    exit 2
}

# Since Python 3.10 the abstract base classes are in collections.abc alone.
mend() {
    local folder
    folder=$("$python" -c 'import importlib.util as u; s = u.find_spec("MinkowskiEngine")
print(s.submodule_search_locations[0] if s else "")')
    if [[ -n $folder ]]; then
        find "$folder" -name '*.py' -exec sed -i \
            -e 's/^from collections import Sequence$/from collections.abc import Sequence/' \
            -e 's/^from collections import Sequence, namedtuple$/from collections import namedtuple\n&/' \
            -e 's/\nfrom collections import Sequence, namedtuple$/\nfrom collections.abc import Sequence/' {} +
    fi
}

report() {
    "$python" -c 'import MinkowskiEngine as me
print("MinkowskiEngine", me.__version__, "for CUDA" if me.is_cuda_available() else "for the CPU", "in", me.__path__[0])'
}

compiles() {
    local headers
    headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    printf '#include <Python.h>\n#include <cblas.h>\nint main() {}\n' |
        g++ -I"$headers" -x c++ - -lopenblas -o /dev/null 2>/dev/null
}

versions=$("$python" -c 'import sys, torch; print(f"torch-{torch.__version__}-{sys.implementation.cache_tag}")') ||
    fail "$python has no torch; name one that has: PYTHON=..."
mend
if report 2>/dev/null; then
    exit 0
fi
if ! compiles && [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    packages=(g++ libopenblas-dev)
    if [[ $("$python" -c 'import sys; print(sys.base_prefix)') == /usr ]]; then
        packages+=(python3-dev)
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
fi
compiles || fail "needs a C++ compiler, Python's headers and OpenBLAS: on Debian or Ubuntu the packages" \
    "g++, python3-dev and libopenblas-dev"

pip=("$python" -m pip --quiet --disable-pip-version-check)

# Leaves the wheel in folder $1, all of it or nothing.
build() {
    local scripts unfinished
    "${pip[@]}" install setuptools wheel numpy ninja
    scripts=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
    mkdir -p "$(dirname "$1")"
    unfinished=$(mktemp -d "$1.XXXXXX")
    # torch finds ninja by PATH. Without isolation, because the build imports torch; without dependencies, because torch
    # is there; without pip's cache, which does not know that a wheel belongs to the torch that it was built with.
    PATH="$scripts:$PATH" CC=gcc CXX=g++ "${pip[@]}" wheel --no-cache-dir --use-pep517 --no-build-isolation --no-deps \
        --config-settings="--global-option=--blas=openblas --cpu_only" --wheel-dir "$unfinished" \
        "MinkowskiEngine==$VERSION" || { rm -rf "$unfinished"; fail "the build has failed"; }
    rm -rf "$1"
    mv "$unfinished" "$1"
}

if ! compgen -G "$wheels/$versions/*.whl" >/dev/null; then
    build "$wheels/$versions"
fi
"${pip[@]}" install --no-deps "$wheels/$versions"/*.whl
mend
report
