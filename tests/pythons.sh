# python_of 3.12: prints the path of a Python of that version, found on PATH or by pyenv. Ends with 1 where there is none,
# with 2 where there is one that does not start.
python_of() {
    local name=python$1 version
    command -v "$name" >/dev/null || { echo "no $name on PATH" >&2; return 1; }
    # pyenv puts a name for each of its versions on PATH; it starts the one that PYENV_VERSION names.
    for version in "${PYENV_VERSION:-}" $(pyenv versions --bare 2>/dev/null | grep "^$1\." || true); do
        if PYENV_VERSION=$version "$name" -c 'import sys; print(sys.executable)' 2>/dev/null; then
            return 0
        fi
    done
    echo "$(command -v "$name") does not start" >&2
    return 2
}
