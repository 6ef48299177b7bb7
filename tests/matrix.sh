#!/usr/bin/env bash
# The suite on every supported Python and megatron-core: 3.11 with 0.16.1, 3.12 and 3.13 with 0.19.2, all of it; and on
# 3.12 what meets megatron-core with the releases between, each in a folder of its own on PYTHONPATH.
# Words choose: tests/matrix.sh 3.12 0.18.2
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/pythons.sh

wanted=("${@:-3.11 0.17.1 0.18.2 3.12 3.13}")
failed=()
for what in ${wanted[*]}; do
    echo "== $what"
    case $what in
    3.*)
        make test PYTHON="$(python_of "$what")" || failed+=("$what")
        ;;
    *)
        # Not the packages that it wants: those of the environment serve all releases.
        folder=$PWD/.venv-megatron-core-$what
        PYTHON=$(python_of 3.12)
        [ -d "$folder" ] || "$PYTHON" -m pip install --quiet --no-deps --target "$folder" "megatron-core==$what"
        PYTHONPATH=$folder make test-megatron PYTHON="$PYTHON" || failed+=("$what")
        ;;
    esac
done
[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
