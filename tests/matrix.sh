#!/usr/bin/env bash
# The suite on every supported Python and megatron-core: 3.11 with 0.16.1, 3.12 and 3.13 with 0.19.2, all of it; and on
# 3.12 the tests where megatron-core is met with the releases between, each in a folder of its own on PYTHONPATH.
# Words choose: tests/matrix.sh 3.12 0.18.2
set -uo pipefail
cd "$(dirname "$0")/.."
source tests/pythons.sh

whole_suite() {
    local python
    python=$(python_of "$1") && make test PYTHON="$python"
}

with_release() {
    local python folder=$PWD/.venv-megatron-core-$1
    python=$(python_of 3.12) || return 1
    if [ ! -d "$folder" ]; then
        # Not the packages that it wants: those of the environment serve all releases.
        rm -rf "$folder.partial"
        "$python" -m pip install --quiet --no-deps --target "$folder.partial" "megatron-core==$1" || return 1
        mv "$folder.partial" "$folder"
    fi
    PYTHONPATH=$folder make test-megatron PYTHON="$python"
}

[ $# -gt 0 ] || set -- 3.11 0.17.1 0.18.2 3.12 3.13
failed=()
for what in "$@"; do
    echo "== $what"
    case $what in
    3.*) whole_suite "$what" ;;
    *) with_release "$what" ;;
    esac || failed+=("$what")
done
[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
