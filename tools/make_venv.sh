# make_venv.sh PYTHON DIRECTORY: a virtual environment with pip, unless there is one that works.
set -eu
python=$1
directory=$2
if "$directory/bin/python" -m pip --version >/dev/null 2>&1 &&
    "$directory/bin/python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))'; then
    exit 0
fi
[ -n "$python" ] || exit 1
rm -rf "$directory"
if "$python" -c 'import ensurepip' 2>/dev/null; then
    "$python" -m venv "$directory"
else  # Debian without python3-venv
    "$python" -m venv --without-pip "$directory"
    "$python" -m pip --python "$directory/bin/python" install --quiet pip
fi
