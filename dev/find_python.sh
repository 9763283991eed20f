#!/bin/sh
# Prints a Python that can build pgolf, or says which package is missing and how to install it.
# Usage: find_python.sh [PYTHON]; without an argument, the first suitable one of those in PATH. A name such as python3.12 that
# PATH does not know, or of which it knows pyenv's shim alone, is looked for where pyenv and uv install their Pythons.

fail() {
    echo "pgolf: $1" >&2
    shift
    for line in "$@"; do echo "  $line" >&2; done
    exit 1
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

elsewhere() {
    for found in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/"$1" "$HOME"/.local/share/uv/python/*/bin/"$1"; do
        if new_enough "$found"; then echo "$found"; return; fi
    done
}

python=$1
if [ -n "$python" ]; then
    new_enough "$python" || python=$(elsewhere "$python")
    python=${python:-$1}
    command -v "$python" >/dev/null || fail "PYTHON is \"$python\", which is no command."
    new_enough "$python" || fail "PYTHON is \"$python\" ($("$python" --version 2>&1)); pgolf needs Python 3.10 or newer."
else
    for name in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if new_enough "$name"; then python=$name; break; fi
    done
    [ -n "$python" ] || fail "Python 3.10 or newer is missing." \
        "Debian, Ubuntu: sudo apt install python3 python3-venv python3-dev" \
        "Fedora:         sudo dnf install python3 python3-devel" \
        "macOS:          brew install python" \
        "or name one that lies elsewhere: make PYTHON=/path/to/python3"
fi

"$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python has no venv module, so no environment can be made." \
    "Debian, Ubuntu: sudo apt install $("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"

"$python" -c '
import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
    fail "$python has no header files (Python.h), which native modules are compiled with." \
        "Debian, Ubuntu: sudo apt install $("$python" -c 'import sys; print("python%d.%d-dev" % sys.version_info[:2])')" \
        "Fedora:         sudo dnf install python3-devel"

if [ -n "$CXX" ]; then
    command -v "${CXX%% *}" >/dev/null || fail "CXX is \"$CXX\", which is no command; it must name a C++ compiler."
elif ! command -v c++ >/dev/null && ! command -v g++ >/dev/null && ! command -v clang++ >/dev/null; then
    fail "a C++ compiler is missing (gcc 11 or clang 14, or newer)." \
        "Debian, Ubuntu: sudo apt install g++" \
        "Fedora:         sudo dnf install gcc-c++" \
        "macOS:          xcode-select --install"
fi

echo "$python"
