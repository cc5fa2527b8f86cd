# Sourced by scripts/run and scripts/test: makes the virtual environment .venv, or brings it up to
# date, and puts it first on the path. Arguments are the requirement files.
#
#   PYTHON   the interpreter to make it with, 3.11 or newer (default: python3); to change it later,
#            remove .venv

cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH # so that only packages of the environment are imported
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "error: $python is missing or older than Python 3.11: set PYTHON to a newer one" >&2
        exit 2
    fi
    if ! "$python" -m venv --clear .venv; then
        echo "error: $python cannot make .venv; on Debian: apt install python3-venv" >&2
        exit 2
    fi
fi
for requirements in "$@"; do
    installed=.venv/$(echo "$requirements" | tr / -)
    if ! cmp -s "$requirements" "$installed"; then
        echo "Installing $requirements into .venv (a few minutes the first time)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
        cp "$requirements" "$installed"
    fi
done
PATH=$PWD/.venv/bin:$PATH
