#!/bin/sh
# Makes $VENV and installs ssmtrain with its development tools, as `make install` calls it.
# With no NVIDIA GPU it takes the CPU build of torch where one can be had; TORCH_INDEX_URL names its index.
set -eu
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}

say() { printf '%s\n' "$*"; }
fail() { say "$@" >&2; exit 1; }

# The command that installs a system package here.
system() {
  if command -v apt-get >/dev/null 2>&1; then say "sudo apt-get install -y $1"
  elif command -v dnf >/dev/null 2>&1; then say "sudo dnf install -y $2"
  elif command -v pacman >/dev/null 2>&1; then say "sudo pacman -S --needed $3"
  elif command -v apk >/dev/null 2>&1; then say "sudo apk add $4"
  else say "install $1 with your system's package manager"; fi
}

command -v "$PYTHON" >/dev/null 2>&1 || fail "No $PYTHON here: $(system python3 python3 python python3)"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "ssmtrain needs Python 3.11 or newer; $PYTHON is $("$PYTHON" -V 2>&1). Name another: make install PYTHON=python3.12"

if [ ! -x "$VENV/bin/python" ]; then
  "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "Python's venv module is missing: $(system python3-venv python3 python python3)"
  say "Making $VENV"
  "$PYTHON" -m venv "$VENV"
fi

command -v cc >/dev/null 2>&1 || command -v gcc >/dev/null 2>&1 || command -v clang >/dev/null 2>&1 ||
  say "No C compiler here: training works, torch.compile and Triton kernels do not. $(system build-essential gcc base-devel build-base)"

pip="$VENV/bin/python -m pip --disable-pip-version-check"
torch=$(sed -n 's/^torch==\([^ ;]*\).*/\1/p' constraints.txt)
if ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
  if [ -n "${TORCH_INDEX_URL:-}" ]; then
    say "Installing torch $torch from TORCH_INDEX_URL"
    $pip install -q --index-url "$TORCH_INDEX_URL" "torch==$torch"
  elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
    say "Installing torch $torch for the GPU"
    $pip install -q "torch==$torch"
  else
    say "Installing torch $torch (no NVIDIA GPU: the CPU build, where there is one)"
    $pip install -q "torch==$torch+cpu" 2>/dev/null || $pip install -q "torch==$torch"
  fi
fi
say "Installing ssmtrain and its development tools"
# DeepSpeed would look for compilers; nothing here uses kernels of its own.
export DS_BUILD_OPS=0
$pip install -q -c constraints.txt -e '.[dev]'
say "Ready: $VENV/bin/ssmtrain --help"
